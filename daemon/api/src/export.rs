//! Options of exports (QAPI `BlockExportOptions`).

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};
use crate::fields::{Fields, Map, Value, expand_dotted};
use crate::node::check_name;

/// Most queues that an export offers.
pub const MAX_QUEUES: u16 = 64;

/// Largest queue that a front-end may set up.
pub const MAX_QUEUE_SIZE: u16 = 1024;

/// `sun_path` of a Unix socket address holds this many bytes and a terminating zero.
const MAX_SOCKET_PATH: usize = 107;

/// Where front-ends connect.
#[derive(Clone, Debug)]
pub enum SocketAddress {
    Unix(PathBuf),
    /// A listening socket that the caller passed.
    Fd(Arc<OwnedFd>),
    /// One that the service manager passed to the daemon, by name. The socket itself is looked up when the export is added.
    Named(String, Option<Arc<OwnedFd>>),
}

/// Which I/O thread serves a queue.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct QueuePlacement {
    /// Threads that take the queues in turn; empty for all threads of the daemon.
    pub round_robin: Vec<String>,
    /// Queues with a thread of their own choice.
    pub pinned: Vec<(u16, String)>,
}

#[derive(Clone, Debug)]
pub struct VhostUserBlkOptions {
    pub addr: SocketAddress,
    /// Permissions and group of the socket file; the process' defaults if not given.
    pub socket_mode: Option<u32>,
    pub socket_group: Option<String>,
    pub num_queues: u16,
    /// Largest queue offered; `seg_max` follows from it.
    pub queue_size: u16,
    /// Bytes, a power of two from 512 to 4096.
    pub logical_block_size: u32,
    /// Bytes, at least the logical block size.
    pub physical_block_size: u32,
    /// At most 20 bytes, read by the guest.
    pub serial: String,
    /// Register guest memory with io_uring.
    pub fixed_buffers: bool,
}

/// Most clients of an NBD export at once, unless its options say otherwise.
const NBD_CONNECTIONS: u64 = 16;

/// An export over NBD (QAPI `BlockExportOptionsNbd` and `NbdServerOptions`: each export has a socket of its own).
#[derive(Clone, Debug)]
pub struct NbdExportOptions {
    pub addr: SocketAddress,
    /// Permissions and group of the socket file; the process' defaults if not given.
    pub socket_mode: Option<u32>,
    pub socket_group: Option<String>,
    /// What clients call it; the export's id if not given.
    pub name: Option<String>,
    pub description: String,
    /// Bytes, a power of two up to 4096; what the storage has, up to 512, if not given.
    pub logical_block_size: Option<u32>,
    pub max_connections: u32,
    /// It ends, and its node with it, when a client that has used it says goodbye. One that goes without a word may come back.
    pub until_disconnect: bool,
}

#[derive(Clone, Debug)]
pub enum ExportKind {
    VhostUserBlk(VhostUserBlkOptions),
    Nbd(NbdExportOptions),
}

impl ExportKind {
    pub const NAMES: [&'static str; 2] = ["nbd", "vhost-user-blk"];

    pub fn name(&self) -> &'static str {
        match self {
            ExportKind::VhostUserBlk(_) => "vhost-user-blk",
            ExportKind::Nbd(_) => "nbd",
        }
    }

    /// How many queues it has; of NBD none, and any number of I/O threads.
    pub fn num_queues(&self) -> Option<u16> {
        match self {
            ExportKind::VhostUserBlk(o) => Some(o.num_queues),
            ExportKind::Nbd(_) => None,
        }
    }

    pub fn addr(&self) -> &SocketAddress {
        match self {
            ExportKind::VhostUserBlk(o) => &o.addr,
            ExportKind::Nbd(o) => &o.addr,
        }
    }

    /// Address, mode and group of the socket.
    pub fn socket_mut(&mut self) -> (&mut SocketAddress, &mut Option<u32>, &mut Option<String>) {
        match self {
            ExportKind::VhostUserBlk(o) => (&mut o.addr, &mut o.socket_mode, &mut o.socket_group),
            ExportKind::Nbd(o) => (&mut o.addr, &mut o.socket_mode, &mut o.socket_group),
        }
    }
}

#[derive(Clone, Debug)]
pub struct ExportOptions {
    pub id: String,
    pub node_name: String,
    pub writable: bool,
    /// Every write is durable before it completes, and the guest cannot change that.
    pub writethrough: bool,
    /// Other writers of the node are allowed beside this one.
    pub share_rw: bool,
    pub placement: QueuePlacement,
    pub kind: ExportKind,
    /// The options as they were given, nested.
    pub given: Map,
}

impl ExportOptions {
    /// Reads the options of an export. `listener` is a socket that came with them.
    pub fn from_map(map: Map, listener: Option<OwnedFd>) -> Result<ExportOptions> {
        let given = expand_dotted(map)?;
        let mut f = Fields::new("export", given.clone());
        let id = f.required_string("id")?;
        check_name("export id", &id)?;
        f.set_what(format!("export '{id}'"));
        let kind = f.required_string("type")?;
        let node_name = f.required_string("node-name")?;
        let writable = f.boolean("writable")?.unwrap_or(false);
        let writethrough = f.boolean("writethrough")?.unwrap_or(false);
        let share_rw = f.boolean("share-rw")?.unwrap_or(false);
        let kind = match kind.as_str() {
            "vhost-user-blk" => ExportKind::VhostUserBlk(vhost_user_blk(&mut f, listener)?),
            "nbd" => ExportKind::Nbd(nbd(&mut f, listener)?),
            _ => {
                return Err(Error::new(
                    ErrorKind::NotSupported,
                    format!(
                        "export '{id}': unknown type '{kind}': there are {}",
                        ExportKind::NAMES.join(", ")
                    ),
                ));
            }
        };
        let placement = placement(&mut f, kind.num_queues())?;
        f.finish()?;
        Ok(ExportOptions {
            id,
            node_name,
            writable,
            writethrough,
            share_rw,
            placement,
            kind,
            given,
        })
    }
}

fn address(f: &mut Fields, listener: Option<OwnedFd>) -> Result<SocketAddress> {
    match (f.object("addr")?, listener) {
        (None, Some(fd)) => Ok(SocketAddress::Fd(Arc::new(fd))),
        (Some(map), None) => {
            let mut a = Fields::new(format!("{}, addr", f.what()), map);
            let kind = a.string("type")?.unwrap_or("unix".into());
            if kind == "fd" {
                let name = a.required_string("str")?;
                a.finish()?;
                return Ok(SocketAddress::Named(name, None));
            }
            if kind != "unix" {
                return Err(Error::not_supported(format!(
                    "{}: option 'type' is '{kind}': an export needs a unix socket (unix, or fd with the name of one that systemd passed)",
                    a.what()
                )));
            }
            let path = a.required_string("path")?;
            a.finish()?;
            if path.len() > MAX_SOCKET_PATH {
                return Err(f.error(
                    "addr.path",
                    format_args!(
                        "is '{path}', {} bytes long: a socket path has at most {MAX_SOCKET_PATH}",
                        path.len()
                    ),
                ));
            }
            Ok(SocketAddress::Unix(path.into()))
        }
        (Some(_), Some(_)) => {
            Err(f.error("addr", "is given beside a passed socket: give one of them"))
        }
        (None, None) => Err(f.error(
            "addr",
            "is missing: give addr.type=unix and addr.path, or pass a listening socket",
        )),
    }
}

fn nbd(f: &mut Fields, listener: Option<OwnedFd>) -> Result<NbdExportOptions> {
    let addr = address(f, listener)?;
    let text = |f: &mut Fields, key: &'static str| {
        let text = f.string(key)?;
        match text.as_ref().is_some_and(|t| t.len() > 4096) {
            true => Err(f.error(key, "has more than 4096 bytes")),
            false => Ok(text),
        }
    };
    let block = f.size("logical-block-size")?;
    if let Some(n) = block.filter(|n| !n.is_power_of_two() || *n > 4096) {
        return Err(f.error(
            "logical-block-size",
            format_args!("is {n}: give a power of two up to 4096"),
        ));
    }
    Ok(NbdExportOptions {
        addr,
        socket_mode: socket_mode(f)?,
        socket_group: f.string("socket-group")?,
        name: text(f, "name")?,
        description: text(f, "description")?.unwrap_or_default(),
        logical_block_size: block.map(|n| n as u32),
        max_connections: f
            .integer("max-connections", 1..=1000)?
            .unwrap_or(NBD_CONNECTIONS) as u32,
        until_disconnect: f.boolean("until-disconnect")?.unwrap_or(false),
    })
}

fn socket_mode(f: &mut Fields) -> Result<Option<u32>> {
    match f.string("socket-mode")? {
        None => Ok(None),
        Some(s) => u32::from_str_radix(&s, 8)
            .ok()
            .filter(|m| *m <= 0o777)
            .map(Some)
            .ok_or_else(|| {
                f.error(
                    "socket-mode",
                    format_args!("is '{s}': give octal digits from 0 to 0777"),
                )
            }),
    }
}

fn vhost_user_blk(f: &mut Fields, listener: Option<OwnedFd>) -> Result<VhostUserBlkOptions> {
    let addr = address(f, listener)?;
    let socket_mode = socket_mode(f)?;
    let logical = block_size(f, "logical-block-size")?.unwrap_or(512);
    let physical = block_size(f, "physical-block-size")?.unwrap_or(logical);
    if physical < logical {
        return Err(f.error(
            "physical-block-size",
            format_args!("is {physical}, less than the logical block size {logical}"),
        ));
    }
    let serial = f.string("serial")?.unwrap_or_default();
    if serial.len() > 20 || serial.contains('\0') {
        return Err(f.error(
            "serial",
            format_args!("is '{serial}': a serial has at most 20 bytes, none of them zero"),
        ));
    }
    let queue_size = f
        .integer("queue-size", 4..=MAX_QUEUE_SIZE.into())?
        .unwrap_or(128) as u16;
    if !queue_size.is_power_of_two() {
        return Err(f.error(
            "queue-size",
            format_args!("is {queue_size}: give a power of two"),
        ));
    }
    Ok(VhostUserBlkOptions {
        addr,
        socket_mode,
        socket_group: f.string("socket-group")?,
        num_queues: f
            .integer("num-queues", 1..=MAX_QUEUES.into())?
            .unwrap_or(MAX_QUEUES.into()) as u16,
        queue_size,
        logical_block_size: logical,
        physical_block_size: physical,
        serial,
        fixed_buffers: f.boolean("fixed-buffers")?.unwrap_or(false),
    })
}

fn block_size(f: &mut Fields, key: &'static str) -> Result<Option<u32>> {
    let Some(n) = f.size(key)? else {
        return Ok(None);
    };
    if n.is_power_of_two() && (512..=4096).contains(&n) {
        Ok(Some(n as u32))
    } else {
        Err(f.error(key, format_args!("is {n}: give 512, 1024, 2048 or 4096")))
    }
}

/// `iothread`: a name or an array of names. `iothread-vq-mapping`: an array of
/// `{iothread, vqs: [queue, …]}`, as QEMU's virtio-blk has it.
fn placement(f: &mut Fields, num_queues: Option<u16>) -> Result<QueuePlacement> {
    let mut out = QueuePlacement::default();
    match f.value("iothread") {
        None => {}
        Some(Value::String(name)) => out.round_robin.push(name),
        Some(Value::Array(names)) if names.iter().all(Value::is_string) => {
            out.round_robin
                .extend(names.iter().filter_map(Value::as_str).map(str::to_owned));
        }
        Some(v) => {
            return Err(f.error(
                "iothread",
                format_args!("is {v}: give the name of an I/O thread, or an array of names"),
            ));
        }
    }
    let Some(mapping) = f.value("iothread-vq-mapping") else {
        return Ok(out);
    };
    let malformed = |f: &Fields| {
        f.error(
            "iothread-vq-mapping",
            format_args!("is {mapping}: give an array of {{iothread, vqs}} dictionaries"),
        )
    };
    let num_queues = num_queues.ok_or_else(|| {
        f.error(
            "iothread-vq-mapping",
            "is given for an export without virtqueues: give iothread",
        )
    })?;
    let entries = mapping.as_array().ok_or_else(|| malformed(f))?;
    for entry in entries {
        let Value::Object(entry) = entry else {
            return Err(malformed(f));
        };
        let mut e = Fields::new(format!("{}, iothread-vq-mapping", f.what()), entry.clone());
        let name = e.required_string("iothread")?;
        match e.value("vqs") {
            None => out.round_robin.push(name),
            Some(Value::Array(vqs)) => {
                for vq in &vqs {
                    let index = vq
                        .as_u64()
                        .filter(|n| *n < u64::from(num_queues))
                        .ok_or_else(|| {
                            e.error(
                                "vqs",
                                format_args!("has {vq}: give queues from 0 to {}", num_queues - 1),
                            )
                        })? as u16;
                    if out.pinned.iter().any(|(q, _)| *q == index) {
                        return Err(e.error("vqs", format_args!("has queue {index} twice")));
                    }
                    out.pinned.push((index, name.clone()));
                }
            }
            Some(v) => return Err(e.error("vqs", format_args!("is {v}: give an array"))),
        }
        e.finish()?;
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(v: Value) -> Result<ExportOptions> {
        match v {
            Value::Object(m) => ExportOptions::from_map(m, None),
            _ => panic!("not a map"),
        }
    }

    fn with(extra: Value) -> Result<ExportOptions> {
        let mut v = json!({
            "id": "e", "type": "vhost-user-blk", "node-name": "n",
            "addr": {"type": "unix", "path": "/s"},
        });
        let (Value::Object(m), Value::Object(extra)) = (&mut v, extra) else {
            panic!()
        };
        m.extend(extra);
        read(v)
    }

    #[test]
    fn defaults_and_options() {
        let o = with(json!({})).unwrap();
        assert!(!o.writable && !o.share_rw);
        let ExportKind::VhostUserBlk(v) = &o.kind else {
            panic!()
        };
        assert_eq!(
            (v.num_queues, v.queue_size, v.logical_block_size),
            (64, 128, 512)
        );
        let o = with(
            json!({"num-queues": 4, "socket-mode": "0660", "logical-block-size": "4k",
            "iothread-vq-mapping": [{"iothread": "a", "vqs": [0, 2]}, {"iothread": "b"}]}),
        )
        .unwrap();
        assert_eq!(o.placement.pinned, [(0, "a".into()), (2, "a".into())]);
        assert_eq!(o.placement.round_robin, ["b"]);
        let ExportKind::VhostUserBlk(v) = &o.kind else {
            panic!()
        };
        assert_eq!((v.socket_mode, v.physical_block_size), (Some(0o660), 4096));
    }

    #[test]
    fn mistakes_are_named() {
        for (extra, parts) in [
            (json!({"num-queues": 65}), vec!["num-queues", "65", "64"]),
            (
                json!({"logical-block-size": 8192}),
                vec!["logical-block-size", "8192"],
            ),
            (
                json!({"physical-block-size": 512, "logical-block-size": 4096}),
                vec!["physical"],
            ),
            (
                json!({"serial": "123456789012345678901"}),
                vec!["serial", "20"],
            ),
            (
                json!({"queue-size": 100}),
                vec!["queue-size", "power of two"],
            ),
            (json!({"type": "iscsi"}), vec!["iscsi", "vhost-user-blk"]),
            (
                json!({"addr": {"path": "x".repeat(108)}}),
                vec!["108", "107"],
            ),
            (json!({"addr": {"type": "inet", "path": "x"}}), vec!["inet"]),
            (json!({"addr": {"type": "fd"}}), vec!["addr", "str"]),
            (
                json!({"addr": {"type": "fd", "str": "x", "path": "/s"}}),
                vec!["path"],
            ),
            (json!({"socket-mode": "999"}), vec!["socket-mode", "999"]),
            (json!({"iothread": 7}), vec!["iothread", "7"]),
            (
                json!({"iothread-vq-mapping": [{"iothread": "a", "vqs": [64]}]}),
                vec!["vqs", "64"],
            ),
            (json!({"frobnicate": 7}), vec!["'e'", "frobnicate"]),
            (
                json!({"type": "nbd", "num-queues": 4}),
                vec!["'e'", "num-queues"],
            ),
            (
                json!({"type": "nbd", "logical-block-size": 8192}),
                vec!["logical-block-size", "8192"],
            ),
            (
                json!({"type": "nbd", "iothread-vq-mapping": [{"iothread": "a"}]}),
                vec!["virtqueues", "iothread"],
            ),
            (
                json!({"type": "nbd", "name": "x".repeat(4097)}),
                vec!["name", "4096"],
            ),
        ] {
            let e = with(extra.clone()).unwrap_err();
            for part in parts {
                assert!(e.message.contains(part), "{extra} gave: {e}");
            }
        }
    }
}
