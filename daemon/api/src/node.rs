//! Options of block nodes (QAPI `BlockdevOptions`).

use std::os::unix::fs::FileTypeExt;
use std::path::PathBuf;
use std::time::Duration;

use crate::blkdebug::BlkdebugOptions;
use crate::error::{Error, Result};
use crate::fields::{Fields, Map, Value, expand_dotted};
use crate::job::{COPY_ERRORS, CopyErrorPolicy};

/// The drivers, by name.
pub const DRIVERS: [&str; 12] = [
    "blkdebug",
    "copy-before-write",
    "copy-on-read",
    "file",
    "host_device",
    "luks",
    "nbd",
    "null-co",
    "qcow2",
    "raw",
    "snapshot-access",
    "throttle",
];

/// Those that show their child as it is.
pub const FILTERS: [&str; 4] = ["blkdebug", "copy-before-write", "copy-on-read", "throttle"];

/// What a discard request does to the storage.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Discard {
    /// Nothing.
    #[default]
    Ignore,
    /// Frees the blocks.
    Unmap,
}

/// Whether writes are searched for zeroes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DetectZeroes {
    #[default]
    Off,
    /// Zeroes are written by an efficient zero write.
    On,
    /// As `On`, and the blocks are freed (needs `discard=unmap`).
    Unmap,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CacheOptions {
    /// Bypass the host's page cache (O_DIRECT).
    pub direct: bool,
    /// Ignore flush requests: data may be lost when the host fails.
    pub no_flush: bool,
}

/// Image locks as QEMU takes them (OFD locks).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Locking {
    /// Lock where the file system can.
    #[default]
    Auto,
    On,
    Off,
}

/// A child: another node by name, or its options in place.
#[derive(Clone, Debug, PartialEq)]
pub enum NodeRef {
    Name(String),
    Options(Box<NodeOptions>),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileOptions {
    pub filename: String,
    pub locking: Locking,
    /// The node ends with a block of the storage, though the file may end before. (Not an option: it is so for the files of
    /// images.)
    pub whole_blocks: bool,
}

#[derive(Clone, Debug, PartialEq)]
pub struct RawOptions {
    pub file: NodeRef,
    /// First byte of the child that is used.
    pub offset: u64,
    /// Bytes of the child that are used; the rest if not given.
    pub size: Option<u64>,
}

/// What an image reads where it has no data of its own.
#[derive(Clone, Debug, PartialEq)]
pub enum BackingRef {
    /// Nothing was said: an image that names a backing file is refused.
    Unset,
    /// Zeroes, whatever the image names.
    None,
    Node(NodeRef),
    /// A node that is written to until this one takes its place. (Not an option: the control plane makes it for a live
    /// snapshot.)
    Active(String),
}

#[derive(Clone, Debug, PartialEq)]
pub struct Qcow2Options {
    pub file: NodeRef,
    pub backing: BackingRef,
    /// Where guest data is, of an image with an external data file.
    pub data_file: Option<NodeRef>,
    /// The secret that opens an image with LUKS encryption, by its id.
    pub key_secret: Option<String>,
    /// Bytes of L2 tables kept in memory.
    pub l2_cache_size: Option<u64>,
    /// Bytes of refcount blocks kept in memory.
    pub refcount_cache_size: Option<u64>,
    /// Whether space goes back to the storage that the guest gave up, that a deleted snapshot had, or that is free for
    /// another reason.
    pub pass_discard_request: Option<bool>,
    pub pass_discard_snapshot: Option<bool>,
    pub pass_discard_other: Option<bool>,
    /// What the guest discards keeps its place in the file.
    pub discard_no_unref: bool,
}

#[derive(Clone, Debug, PartialEq)]
pub struct LuksOptions {
    pub file: NodeRef,
    /// The secret that opens it, by its id.
    pub key_secret: String,
}

#[derive(Clone, Debug, PartialEq)]
pub struct ThrottleOptions {
    pub file: NodeRef,
    /// The group whose limits it is under, by its name.
    pub throttle_group: String,
}

#[derive(Clone, Debug, PartialEq)]
pub struct CopyOnReadOptions {
    pub file: NodeRef,
}

#[derive(Clone, Debug, PartialEq)]
pub struct CopyBeforeWriteOptions {
    pub file: NodeRef,
    /// Where what is overwritten is copied to.
    pub target: NodeRef,
    pub on_cbw_error: CopyErrorPolicy,
}

#[derive(Clone, Debug, PartialEq)]
pub struct SnapshotAccessOptions {
    /// A copy-before-write node.
    pub file: NodeRef,
}

/// Where an NBD server is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NbdServer {
    Unix(PathBuf),
    /// At the other end of a connection that the caller passed (`/dev/fdset/N`), on which nothing was said yet.
    Passed(String),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NbdOptions {
    pub server: NbdServer,
    /// The name of the server's export; often empty.
    pub export: String,
    /// How long requests wait for the server to come back.
    pub reconnect_delay: Duration,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NullOptions {
    pub size: u64,
    pub latency_ns: u64,
    /// Reads give zeroes; otherwise they leave the buffer as it is.
    pub read_zeroes: bool,
}

#[derive(Clone, Debug, PartialEq)]
pub enum DriverOptions {
    File(FileOptions),
    HostDevice(FileOptions),
    Raw(RawOptions),
    Qcow2(Qcow2Options),
    Luks(LuksOptions),
    Throttle(ThrottleOptions),
    CopyOnRead(CopyOnReadOptions),
    CopyBeforeWrite(CopyBeforeWriteOptions),
    SnapshotAccess(SnapshotAccessOptions),
    Blkdebug(BlkdebugOptions),
    Nbd(NbdOptions),
    NullCo(NullOptions),
}

/// The driver of what is at a path on this host.
pub fn file_driver(path: &str) -> &'static str {
    let is_device = |m: std::fs::Metadata| m.file_type().is_block_device();
    match std::fs::metadata(path).is_ok_and(is_device) {
        true => "host_device",
        false => "file",
    }
}

impl DriverOptions {
    pub fn name(&self) -> &'static str {
        match self {
            DriverOptions::File(_) => "file",
            DriverOptions::HostDevice(_) => "host_device",
            DriverOptions::Raw(_) => "raw",
            DriverOptions::Qcow2(_) => "qcow2",
            DriverOptions::Luks(_) => "luks",
            DriverOptions::Throttle(_) => "throttle",
            DriverOptions::CopyOnRead(_) => "copy-on-read",
            DriverOptions::CopyBeforeWrite(_) => "copy-before-write",
            DriverOptions::SnapshotAccess(_) => "snapshot-access",
            DriverOptions::Blkdebug(_) => "blkdebug",
            DriverOptions::Nbd(_) => "nbd",
            DriverOptions::NullCo(_) => "null-co",
        }
    }
}

impl Discard {
    /// As in the options.
    pub fn name(self) -> &'static str {
        match self {
            Discard::Ignore => "ignore",
            Discard::Unmap => "unmap",
        }
    }
}

impl DetectZeroes {
    /// As in the options.
    pub fn name(self) -> &'static str {
        match self {
            DetectZeroes::Off => "off",
            DetectZeroes::On => "on",
            DetectZeroes::Unmap => "unmap",
        }
    }
}

/// The options of a node.
#[derive(Clone, Debug, PartialEq)]
pub struct NodeOptions {
    /// None lets the daemon make up a name (for a node in place of a child).
    pub node_name: Option<String>,
    pub read_only: bool,
    /// Fall back to read-only if the image cannot be opened for writing.
    pub auto_read_only: bool,
    /// Open read-only although another process writes, without consistency.
    pub force_share: bool,
    pub discard: Discard,
    pub detect_zeroes: DetectZeroes,
    pub cache: CacheOptions,
    /// Opened at once. One that is not is only looked at, whoever writes to it, until it is made active.
    pub active: bool,
    pub driver: DriverOptions,
    /// The options as they were given, nested.
    pub given: Map,
}

/// Names become part of object paths and of messages: letters, digits, `-`, `.` and `_`, and a letter
/// first (as in QEMU).
pub(crate) fn check_name(what: &str, name: &str) -> Result<()> {
    let ok = name.len() <= 127
        && name.starts_with(|c: char| c.is_ascii_alphabetic())
        && name
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_'));
    if ok {
        Ok(())
    } else {
        Err(Error::invalid(format!(
            "{what} '{name}' is not a valid name: use at most 127 letters, digits, '-', '.' and '_', with a letter first"
        )))
    }
}

const DISCARDS: [(&str, Discard); 4] = [
    ("ignore", Discard::Ignore),
    ("off", Discard::Ignore),
    ("unmap", Discard::Unmap),
    ("on", Discard::Unmap),
];

const DETECT_ZEROES: [(&str, DetectZeroes); 3] = [
    ("off", DetectZeroes::Off),
    ("on", DetectZeroes::On),
    ("unmap", DetectZeroes::Unmap),
];

/// Options that can be changed while a node is in use; what is not given stays as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeChange {
    pub read_only: Option<bool>,
    pub discard: Option<Discard>,
    pub detect_zeroes: Option<DetectZeroes>,
    /// Others, of the node or (below "file" and so on) of its children: for these it is closed and opened again while whoever
    /// uses it waits.
    pub others: Map,
}

impl NodeChange {
    pub fn from_map(node: &str, map: Map) -> Result<NodeChange> {
        let at_once = ["read-only", "discard", "detect-zeroes"];
        let (own, others): (Map, Map) = expand_dotted(map)?
            .into_iter()
            .partition(|(key, _)| at_once.contains(&key.as_str()));
        let mut f = Fields::new(format!("node '{node}': reopen"), own.clone());
        if let Some(key) = ["driver", "node-name", "active"]
            .iter()
            .find(|k| others.contains_key(**k))
        {
            return Err(f.error(
                key,
                "cannot be changed: add another node, and put it in this one's place (Replace)",
            ));
        }
        let change = NodeChange {
            read_only: f.boolean("read-only")?,
            discard: f.choice("discard", &DISCARDS)?,
            detect_zeroes: f.choice("detect-zeroes", &DETECT_ZEROES)?,
            others,
        };
        if !change.others.is_empty() && !own.is_empty() {
            return Err(f.error(
                own.keys().next().map_or("", |k| k),
                "is changed at once, and others while the node is closed: change them one after the other",
            ));
        }
        let nothing = f.error(
            "read-only",
            "is missing, and there is nothing else to change",
        );
        f.finish()?;
        match change == NodeChange::default() {
            true => Err(nothing),
            false => Ok(change),
        }
    }
}

#[derive(Clone)]
struct Inherited {
    read_only: bool,
    auto_read_only: bool,
    discard: Discard,
    cache: CacheOptions,
    active: bool,
}

impl Default for Inherited {
    fn default() -> Inherited {
        Inherited {
            read_only: false,
            auto_read_only: false,
            discard: Discard::default(),
            cache: CacheOptions::default(),
            active: true,
        }
    }
}

impl NodeOptions {
    /// Reads the options of a node that must have a name.
    pub fn from_map(map: Map) -> Result<NodeOptions> {
        let options = NodeOptions::read(expand_dotted(map)?, None)?;
        if options.node_name.is_none() {
            return Err(Error::invalid(
                "node: option 'node-name' is missing: give the new node a name",
            ));
        }
        Ok(options)
    }

    /// Options of a node of any name, the daemon's own included; see [`NodeOptions::effective`].
    pub fn restored(name: &str, map: Map) -> Result<NodeOptions> {
        let options = NodeOptions::read(map, None)?;
        Ok(NodeOptions {
            node_name: Some(name.to_owned()),
            ..options
        })
    }

    /// The options as they were given, without a name, and with what was taken over from a parent.
    pub fn effective(&self) -> Map {
        let mut map = self.given.clone();
        map.remove("node-name");
        map.remove("active");
        let cache = Map::from_iter([
            ("direct".to_owned(), self.cache.direct.into()),
            ("no-flush".to_owned(), self.cache.no_flush.into()),
        ]);
        map.extend([
            ("read-only".to_owned(), self.read_only.into()),
            ("auto-read-only".to_owned(), self.auto_read_only.into()),
            ("force-share".to_owned(), self.force_share.into()),
            ("discard".to_owned(), self.discard.name().into()),
            ("detect-zeroes".to_owned(), self.detect_zeroes.name().into()),
            ("cache".to_owned(), cache.into()),
        ]);
        map
    }

    /// `parent` is what a child in place takes over where it does not say otherwise.
    fn read(map: Map, parent: Option<&Inherited>) -> Result<NodeOptions> {
        let given = map.clone();
        let mut f = Fields::new("node", map);
        let node_name = f.string("node-name")?;
        if let Some(name) = &node_name {
            check_name("node-name", name)?;
            f.set_what(format!("node '{name}'"));
        }
        let driver = f.required_string("driver")?;
        let defaults = parent.cloned().unwrap_or_default();
        let read_only = f.boolean("read-only")?.unwrap_or(defaults.read_only);
        let auto_read_only = f
            .boolean("auto-read-only")?
            .unwrap_or(defaults.auto_read_only);
        let force_share = f.boolean("force-share")?.unwrap_or(false);
        let active = f.boolean("active")?.unwrap_or(defaults.active);
        if let Some(parent) = parent
            && parent.active != active
        {
            return Err(f.error(
                "active",
                "differs from that of the node above: leave it out, and set it there",
            ));
        }
        let discard = f.choice("discard", &DISCARDS)?.unwrap_or(defaults.discard);
        let detect_zeroes = f
            .choice("detect-zeroes", &DETECT_ZEROES)?
            .unwrap_or_default();
        let cache = match f.object("cache")? {
            None => defaults.cache,
            Some(map) => {
                let mut c = Fields::new(format!("{}, cache", f.what()), map);
                let cache = CacheOptions {
                    direct: c.boolean("direct")?.unwrap_or(defaults.cache.direct),
                    no_flush: c.boolean("no-flush")?.unwrap_or(defaults.cache.no_flush),
                };
                c.finish()?;
                cache
            }
        };
        if detect_zeroes == DetectZeroes::Unmap && discard != Discard::Unmap {
            return Err(f.error(
                "detect-zeroes",
                "is 'unmap', which frees blocks: set discard=unmap as well",
            ));
        }
        if force_share && !read_only {
            return Err(f.error(
                "force-share",
                "is on for a writable node: set read-only as well",
            ));
        }
        // The parent decides about discards: its child does what it is told.
        let inherited = Inherited {
            read_only,
            auto_read_only,
            discard: Discard::Unmap,
            cache,
            active,
        };
        let driver = match driver.as_str() {
            "file" => DriverOptions::File(file_options(&mut f)?),
            "host_device" => DriverOptions::HostDevice(file_options(&mut f)?),
            "raw" => DriverOptions::Raw(RawOptions {
                offset: f.size("offset")?.unwrap_or(0),
                size: f.size("size")?,
                file: node_ref(&mut f, "file", &inherited)?,
            }),
            "qcow2" => DriverOptions::Qcow2(Qcow2Options {
                l2_cache_size: f.size("l2-cache-size")?,
                refcount_cache_size: f.size("refcount-cache-size")?,
                pass_discard_request: f.boolean("pass-discard-request")?,
                pass_discard_snapshot: f.boolean("pass-discard-snapshot")?,
                pass_discard_other: f.boolean("pass-discard-other")?,
                key_secret: encryption(&mut f)?,
                discard_no_unref: f.boolean("discard-no-unref")?.unwrap_or(false),
                data_file: match f.peek("data-file") {
                    Some(_) => Some(node_ref(&mut f, "data-file", &inherited)?),
                    None => {
                        f.value("data-file");
                        None
                    }
                },
                backing: backing_ref(&mut f, &inherited)?,
                file: node_ref(&mut f, "file", &inherited)?,
            }),
            "luks" => DriverOptions::Luks(LuksOptions {
                key_secret: f.required_string("key-secret")?,
                file: node_ref(&mut f, "file", &inherited)?,
            }),
            "throttle" => DriverOptions::Throttle(ThrottleOptions {
                throttle_group: f.required_string("throttle-group")?,
                file: node_ref(&mut f, "file", &inherited)?,
            }),
            "copy-on-read" => DriverOptions::CopyOnRead(CopyOnReadOptions {
                file: node_ref(&mut f, "file", &inherited)?,
            }),
            "copy-before-write" => DriverOptions::CopyBeforeWrite(CopyBeforeWriteOptions {
                on_cbw_error: f.choice("on-cbw-error", &COPY_ERRORS)?.unwrap_or_default(),
                target: node_ref(&mut f, "target", &inherited)?,
                file: node_ref(&mut f, "file", &inherited)?,
            }),
            "snapshot-access" => DriverOptions::SnapshotAccess(SnapshotAccessOptions {
                file: node_ref(&mut f, "file", &inherited)?,
            }),
            "blkdebug" => {
                let file = node_ref(&mut f, "file", &inherited)?;
                DriverOptions::Blkdebug(BlkdebugOptions::read(&mut f, file)?)
            }
            "nbd" => DriverOptions::Nbd(nbd_options(&mut f)?),
            "null-co" => DriverOptions::NullCo(NullOptions {
                size: f.size("size")?.unwrap_or(1 << 30),
                latency_ns: f.integer("latency-ns", 0..=60_000_000_000)?.unwrap_or(0),
                read_zeroes: f.boolean("read-zeroes")?.unwrap_or(false),
            }),
            other => {
                return Err(Error::new(
                    crate::ErrorKind::NotSupported,
                    format!(
                        "{}: unknown driver '{other}': there are {}",
                        f.what(),
                        DRIVERS.join(", ")
                    ),
                ));
            }
        };
        f.set_what(format!("{} (driver {})", f.what(), driver.name()));
        f.finish()?;
        Ok(NodeOptions {
            node_name,
            read_only,
            auto_read_only,
            force_share,
            discard,
            detect_zeroes,
            cache,
            active,
            driver,
            given,
        })
    }
}

fn file_options(f: &mut Fields) -> Result<FileOptions> {
    Ok(FileOptions {
        filename: f.required_string("filename")?,
        whole_blocks: false,
        locking: f
            .choice(
                "locking",
                &[
                    ("auto", Locking::Auto),
                    ("on", Locking::On),
                    ("off", Locking::Off),
                ],
            )?
            .unwrap_or_default(),
    })
}

/// QAPI `BlockdevOptionsNbd`, for unix sockets; `filename` is a connection that the caller passed.
fn nbd_options(f: &mut Fields) -> Result<NbdOptions> {
    let passed = f.string("filename")?;
    let server = match (f.object("server")?, passed) {
        (Some(map), None) => {
            let mut s = Fields::new(format!("{}, server", f.what()), map);
            let kind = s.string("type")?.unwrap_or("unix".into());
            if kind != "unix" {
                return Err(Error::not_supported(format!(
                    "{}: option 'type' is '{kind}': the daemon connects to unix sockets only; pass a connection over the network as a file descriptor (filename)",
                    s.what()
                )));
            }
            let path = s.required_string("path")?;
            if !path.starts_with('/') {
                return Err(s.error("path", format_args!("is '{path}': give a whole path")));
            }
            s.finish()?;
            NbdServer::Unix(path.into())
        }
        (None, Some(name)) if name.starts_with("/dev/fdset/") => NbdServer::Passed(name),
        (None, Some(name)) => {
            return Err(f.error(
                "filename",
                format_args!(
                    "is '{name}': it is for a connection that is passed as a file descriptor; give server.path for a socket"
                ),
            ));
        }
        (Some(_), Some(_)) => {
            return Err(f.error(
                "server",
                "is given beside a passed connection: give one of them",
            ));
        }
        (None, None) => {
            return Err(f.error(
                "server",
                "is missing: give server.type=unix and server.path, or pass a connection (filename)",
            ));
        }
    };
    let export = f.string("export")?.unwrap_or_default();
    if export.len() > 4096 {
        return Err(f.error("export", "has more than 4096 bytes"));
    }
    let is_passed = matches!(server, NbdServer::Passed(_));
    let delay = f.integer("reconnect-delay", 0..=86_400)?.unwrap_or(0);
    if is_passed && delay > 0 {
        return Err(f.error(
            "reconnect-delay",
            "is given for a connection that was passed, which cannot be made again: leave it out",
        ));
    }
    Ok(NbdOptions {
        server,
        export,
        reconnect_delay: Duration::from_secs(delay),
    })
}

/// The secret that opens an encrypted image (QAPI `BlockdevQcow2Encryption`).
fn encryption(f: &mut Fields) -> Result<Option<String>> {
    let Some(map) = f.object("encrypt")? else {
        return Ok(None);
    };
    let mut e = Fields::new(format!("{}, encrypt", f.what()), map);
    e.choice("format", &[("luks", ())])?
        .ok_or_else(|| e.error("format", "is missing: luks is supported"))?;
    let secret = e.required_string("key-secret")?;
    e.finish()?;
    Ok(Some(secret))
}

/// The backing node; null, or (D-Bus has no null) the empty string, is none.
fn backing_ref(f: &mut Fields, inherited: &Inherited) -> Result<BackingRef> {
    match f.peek("backing") {
        None => {
            f.value("backing");
            Ok(BackingRef::Unset)
        }
        Some(Value::Null) => {
            f.value("backing");
            Ok(BackingRef::None)
        }
        Some(Value::String(s)) if s.is_empty() => {
            f.value("backing");
            Ok(BackingRef::None)
        }
        Some(_) => {
            let inherited = Inherited {
                read_only: true,
                ..inherited.clone()
            };
            node_ref(f, "backing", &inherited).map(BackingRef::Node)
        }
    }
}

fn node_ref(f: &mut Fields, key: &'static str, inherited: &Inherited) -> Result<NodeRef> {
    match f.value(key) {
        Some(Value::String(name)) => Ok(NodeRef::Name(name)),
        Some(Value::Object(map)) => NodeOptions::read(map, Some(inherited))
            .map(|o| NodeRef::Options(Box::new(o)))
            .map_err(|e| e.context(format_args!("{}, {key}", f.what()))),
        Some(v) => Err(f.error(
            key,
            format_args!("is {v}: give a node name, or a dictionary of options"),
        )),
        None => Err(f.error(
            key,
            "is missing: give a node name, or a dictionary of options",
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(v: Value) -> Result<NodeOptions> {
        match v {
            Value::Object(m) => NodeOptions::from_map(m),
            _ => panic!("not a map"),
        }
    }

    #[test]
    fn qapi_options_are_read() {
        let o = read(json!({
            "driver": "raw", "node-name": "disk0", "offset": "1M",
            "file.driver": "file", "file.filename": "/x", "file.cache.direct": "on",
            "file.locking": "off", "discard": "unmap", "detect-zeroes": "unmap",
        }))
        .unwrap();
        let DriverOptions::Raw(raw) = &o.driver else {
            panic!()
        };
        assert_eq!((raw.offset, raw.size), (1 << 20, None));
        let NodeRef::Options(file) = &raw.file else {
            panic!()
        };
        assert!(file.cache.direct);
        let DriverOptions::File(f) = &file.driver else {
            panic!()
        };
        assert_eq!((f.filename.as_str(), f.locking), ("/x", Locking::Off));
    }

    #[test]
    fn every_mistake_names_object_and_value() {
        for (options, parts) in [
            (
                json!({"driver": "file", "filename": "/x"}),
                vec!["node-name"],
            ),
            (
                json!({"driver": "qcow9", "node-name": "a"}),
                vec!["'a'", "qcow9", "raw"],
            ),
            (
                json!({"driver": "file", "node-name": "a"}),
                vec!["'a'", "filename"],
            ),
            (
                json!({"driver": "file", "node-name": "a", "filename": "/x", "bogus": 1}),
                vec!["'a'", "'bogus'", "locking"],
            ),
            (
                json!({"driver": "file", "node-name": "a", "filename": 7}),
                vec!["'a'", "filename", "7"],
            ),
            (
                json!({"driver": "null-co", "node-name": "a", "size": "many"}),
                vec!["'a'", "size", "many"],
            ),
            (
                json!({"driver": "null-co", "node-name": "1 a"}),
                vec!["1 a", "letter"],
            ),
            (
                json!({"driver": "null-co", "node-name": "a", "cache": {"write": 1}}),
                vec!["cache", "write", "no-flush"],
            ),
            (
                json!({"driver": "raw", "node-name": "a", "file": {"driver": "file"}}),
                vec!["'a'", "file", "filename"],
            ),
            (
                json!({"driver": "null-co", "node-name": "a", "detect-zeroes": "unmap"}),
                vec!["discard=unmap"],
            ),
            (
                json!({"driver": "null-co", "node-name": "a", "force-share": true}),
                vec!["read-only"],
            ),
        ] {
            let e = read(options.clone()).unwrap_err();
            for part in parts {
                assert!(e.message.contains(part), "{options} gave: {e}");
            }
        }
    }
}
