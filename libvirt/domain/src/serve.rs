//! What the daemon has for a domain: built before it starts, taken down after it has ended. Both can be done again.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::Path;
use std::time::{Duration, Instant};

use vdisk_dbus::{Daemon, ERROR_PREFIX, unescape};
use zbus::Variant;

use crate::access::label_socket;
use crate::{Disk, Domain};

/// How long a job may take to end that was cancelled.
const JOB_END: Duration = Duration::from_secs(3);

type Options<'a> = HashMap<&'a str, Variant<'a>>;

/// Why something cannot be served: what was done, and what the daemon or the bus says.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Failure(pub String);

const NOT_THERE: &str = "vdiskd is not running, and the bus cannot start it: systemctl start vdiskd (or vdiskd@NAME for an instance)";

impl From<zbus::Error> for Failure {
    fn from(e: zbus::Error) -> Failure {
        let message = match &e {
            zbus::Error::MethodError(name, message, _) => {
                let message = message.clone().unwrap_or_default();
                match name.as_str() {
                    "org.freedesktop.DBus.Error.ServiceUnknown"
                    | "org.freedesktop.DBus.Error.NameHasNoOwner" => NOT_THERE.into(),

                    other if other.starts_with(ERROR_PREFIX) => message,
                    other => format!("{message} ({other})"),
                }
            }
            zbus::Error::FDO(e) => match **e {
                zbus::fdo::Error::ServiceUnknown(_) | zbus::fdo::Error::NameHasNoOwner(_) => {
                    NOT_THERE.into()
                }
                // A bus that would start services by itself, and this one is only started by systemd.
                zbus::fdo::Error::SpawnChildExited(_) => NOT_THERE.into(),
                _ => e.to_string(),
            },
            e => format!("cannot talk to vdiskd: {e}"),
        };
        Failure(message)
    }
}

impl From<zbus::fdo::Error> for Failure {
    fn from(e: zbus::fdo::Error) -> Failure {
        Failure::from(zbus::Error::from(e))
    }
}

/// An export of a domain.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Served {
    pub id: String,
    pub target: String,
    /// The node that it offers.
    pub node: String,
    pub socket: String,
    /// Front-ends that are connected.
    pub clients: u64,
}

/// A node, as far as it matters here.
#[derive(Default)]
struct NodeThere {
    children: Vec<String>,
    file: String,
    active: bool,
}

/// What there is in the daemon, as far as it matters here.
#[derive(Default)]
struct There {
    exports: Vec<Served>,
    nodes: BTreeMap<String, NodeThere>,
    /// Nodes by job.
    jobs: BTreeMap<String, Vec<String>>,
    threads: BTreeSet<String>,
}

fn name_of(path: &str) -> String {
    let last = path.rsplit('/').next().unwrap_or_default();
    unescape(last).unwrap_or_default()
}

/// Names of objects in a value of type o, ao or a(so).
fn names(value: &Variant<'_>) -> Vec<String> {
    match value {
        Variant::ObjectPath(path) => vec![name_of(path.as_str())],
        Variant::Array(items) => items.iter().flat_map(names).collect(),
        Variant::Structure(s) => s.fields().iter().flat_map(names).collect(),
        Variant::Variant(v) => names(v),
        _ => Vec::new(),
    }
}

fn text(value: Option<&Variant<'_>>) -> String {
    match value {
        Some(Variant::Str(s)) => s.as_str().to_owned(),
        Some(Variant::Variant(v)) => text(Some(v)),
        _ => String::new(),
    }
}

async fn look(daemon: &Daemon) -> Result<There, Failure> {
    let objects = daemon.objects().await?;
    let mut there = There::default();
    for (path, interfaces) in objects.get_managed_objects().await? {
        let name = name_of(path.as_str());
        let mut export = Served::default();
        for (interface, properties) in &interfaces {
            let get = |key: &str| properties.get(key).map(|v| &**v);
            match interface.as_str() {
                "org.vdisk1.Node" => {
                    let node = NodeThere {
                        children: get("Children").map(names).unwrap_or_default(),
                        file: text(get("Filename")),
                        // An older daemon has no others.
                        active: !matches!(get("Active"), Some(Variant::Bool(false))),
                    };
                    there.nodes.insert(name.clone(), node);
                }
                "org.vdisk1.Job" => {
                    let objects = get("Objects").map(names).unwrap_or_default();
                    there.jobs.insert(name.clone(), objects);
                }
                "org.vdisk1.IoThread" => {
                    there.threads.insert(name.clone());
                }
                "org.vdisk1.Export" => {
                    export.id = name.clone();
                    export.node = get("Node").map(names).unwrap_or_default().concat();
                    if let Some(Variant::U32(n)) = get("Clients") {
                        export.clients = (*n).into();
                    }
                }
                "org.vdisk1.Export.VhostUserBlk" => export.socket = text(get("Socket")),
                _ => {}
            }
        }
        if !export.id.is_empty() {
            there.exports.push(export);
        }
    }
    Ok(there)
}

/// The target of a socket that is a domain's.
pub(crate) fn target_of<'a>(socket: &'a str, uuid: &str) -> Option<&'a str> {
    if uuid.len() != 36 {
        return None;
    }
    let name = Path::new(socket).file_name()?.to_str()?;
    let target = name.strip_prefix(uuid)?.strip_prefix('-')?;
    target.strip_suffix(".sock")
}

/// The exports of all domains, with their UUIDs.
pub async fn all_served(daemon: &Daemon) -> Result<Vec<(String, Served)>, Failure> {
    let there = look(daemon).await?;
    let whose = |export: &Served| {
        let name = Path::new(&export.socket).file_name()?.to_str()?;
        let uuid = name.get(..36).filter(|u| is_uuid(u))?;
        let target = target_of(&export.socket, uuid)?.to_owned();
        let export = Served {
            target,
            ..export.clone()
        };
        Some((uuid.to_owned(), export))
    };
    Ok(there.exports.iter().filter_map(whose).collect())
}

fn is_uuid(text: &str) -> bool {
    text.char_indices().all(|(n, c)| match n {
        8 | 13 | 18 | 23 => c == '-',
        _ => c.is_ascii_hexdigit(),
    })
}

/// The exports of a domain, whatever its metadata say by now: they are known by their sockets.
pub async fn served(daemon: &Daemon, uuid: &str) -> Result<Vec<Served>, Failure> {
    let there = look(daemon).await?;
    Ok(of(&there, uuid))
}

fn of(there: &There, uuid: &str) -> Vec<Served> {
    let mine = there.exports.iter().filter_map(|export| {
        let target = target_of(&export.socket, uuid)?.to_owned();
        Some(Served {
            target,
            ..export.clone()
        })
    });
    mine.collect()
}

/// How the guest of a domain comes to be here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// It boots, or goes on from a file.
    Boot,
    /// It runs on another host, which has the images until then.
    Incoming,
    /// The same, and its disks have been built just now.
    Arriving,
}

/// Whether all disks of a domain are served already for a guest that is to come from another host.
fn awaits_guest(there: &There, domain: &Domain) -> bool {
    let mut disks = domain.served();
    disks.all(|(disk, socket)| {
        let name = domain.object_name(&disk.target);
        let node = there.nodes.get(&name);
        let socket = socket.to_string_lossy();
        let mut exports = there.exports.iter();
        node.is_some_and(|n| !n.active && n.file == disk.file())
            && exports.any(|e| e.id == name && e.socket == socket && e.clients == 0)
    })
}

/// Serves all disks of a domain: all of them or none. What is left of an earlier life is taken down first.
///
/// # Errors
/// If a front-end is still connected to one of them, or something cannot be opened; nothing stays then.
pub async fn build(daemon: &Daemon, domain: &Domain, start: Start) -> Result<(), Failure> {
    let there = look(daemon).await?;
    if start == Start::Arriving && awaits_guest(&there, domain) {
        return Ok(());
    }
    let before = of(&there, &domain.uuid);
    if let Some(busy) = before.iter().find(|s| s.clients > 0) {
        return Err(Failure(format!(
            "disk '{}' of domain '{}' is in use: a front-end is connected to {}; end it first",
            busy.target, domain.name, busy.socket
        )));
    }
    if !before.is_empty() {
        take_down(daemon, &domain.uuid, Busy::Stays).await?;
    }
    for (disk, socket) in domain.served() {
        if let Err(e) = build_disk(daemon, domain, disk, socket, start).await {
            let _ = take_down(daemon, &domain.uuid, Busy::Stays).await;
            return Err(e);
        }
    }
    Ok(())
}

/// Serves one disk of a domain.
pub async fn build_disk(
    daemon: &Daemon,
    domain: &Domain,
    disk: &Disk,
    socket: &Path,
    start: Start,
) -> Result<(), Failure> {
    let name = domain.object_name(&disk.target);
    let mut added = Vec::new();
    let mut done = add(daemon, &name, disk, socket, start, &mut added).await;
    // If the guest runs already. One that starts has no label yet (`label`).
    if let (Ok(()), Err(e)) = (&done, label_socket(domain, socket)) {
        if let Ok(export) = daemon.export(&name).await {
            let _ = export.remove(Options::new()).await;
        }
        done = Err(Failure(e.to_string()));
    }
    if done.is_err() {
        for node in added.iter().rev() {
            if let Ok(node) = daemon.node(node).await {
                let _ = node.remove(Options::new()).await;
            }
        }
    }
    done.map_err(|Failure(e)| {
        Failure(format!(
            "disk '{}' of domain '{}': {e}",
            disk.target, domain.name
        ))
    })
}

/// The throttle filter over the node of a disk.
fn filter_name(name: &str) -> String {
    format!("{name}-throttle")
}

async fn add(
    daemon: &Daemon,
    name: &str,
    disk: &Disk,
    socket: &Path,
    start: Start,
    added: &mut Vec<String>,
) -> Result<(), Failure> {
    let manager = daemon.manager().await?;
    let mut there = look(daemon).await?;
    if there.exports.iter().all(|e| e.id != name) {
        // A hook may have run out of time. What somebody uses is not removed, nor what is of another image.
        let is_ours = there.nodes.get(name).is_some_and(|n| n.file == disk.file());
        for left in [filter_name(name), name.to_owned()] {
            if is_ours && there.nodes.contains_key(&left) {
                let node = daemon.node(&left).await?;
                let _ = node.remove(Options::new()).await;
            }
        }
        there = look(daemon).await?;
    }
    if there.nodes.contains_key(name) || there.exports.iter().any(|e| e.id == name) {
        return Err(Failure(format!(
            "vdiskd has a node or an export '{name}' already, which is not this domain's: remove it, or rename the domain"
        )));
    }
    if let Some(thread) = disk.get("iothread")
        && !there.threads.contains(thread)
    {
        manager.add_io_thread(thread, Options::new()).await?;
    }
    let options = disk.node_options(name);
    let node = options
        .iter()
        .map(|(key, value)| (key.as_str(), value.clone()));
    let mut node: Options<'_> = node.collect();
    if start != Start::Boot {
        // Also if somebody has taken down what was built: another host has the image still.
        node.insert("active", Variant::from(false));
    }
    manager.add_node(node).await?;
    added.push(name.to_owned());
    let limits = disk.limits();
    let filter = filter_name(name);
    let top = match limits.is_empty() && disk.get("group").is_none() {
        true => name,
        false => {
            let group = disk.get("group").unwrap_or(name);
            if !limits.is_empty() {
                manager
                    .set_throttle_group(group, limits.into_iter().collect())
                    .await?;
            }
            let options = Options::from([
                ("node-name", Variant::from(filter.clone())),
                ("driver", Variant::from("throttle")),
                ("throttle-group", Variant::from(group.to_owned())),
                ("file", Variant::from(name.to_owned())),
            ]);
            manager.add_node(options).await?;
            added.push(filter.clone());
            &filter
        }
    };
    let mut export: Options<'_> = disk.export_options().into_iter().collect();
    export.extend([
        ("id", Variant::from(name.to_owned())),
        ("type", Variant::from("vhost-user-blk")),
        ("node-name", Variant::from(top.to_owned())),
        ("addr.type", Variant::from("unix")),
        (
            "addr.path",
            Variant::from(socket.to_string_lossy().into_owned()),
        ),
    ]);
    manager.add_export(export).await?;
    Ok(())
}

/// What becomes of exports that a front-end is connected to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Busy {
    /// It ends: its guest has.
    Ends,
    /// It stays: its guest may be another one than that of which this is about.
    Stays,
}

/// Takes down everything that a domain has, as far as possible. What others use as well stays theirs.
///
/// # Errors
/// The first of what went wrong.
pub async fn take_down(daemon: &Daemon, uuid: &str, busy: Busy) -> Result<(), Failure> {
    let mut result = Ok(());
    for export in served(daemon, uuid).await? {
        if busy == Busy::Stays && export.clients > 0 {
            continue;
        }
        result = result.and(take_down_export(daemon, &export).await);
    }
    result
}

/// Takes down one disk of a domain.
pub async fn take_down_disk(daemon: &Daemon, uuid: &str, target: &str) -> Result<(), Failure> {
    for export in served(daemon, uuid).await? {
        if export.target == target {
            take_down_export(daemon, &export).await?;
        }
    }
    Ok(())
}

async fn take_down_export(daemon: &Daemon, export: &Served) -> Result<(), Failure> {
    let there = look(daemon).await?;
    // The node and all that it stands on, parents first.
    let mut nodes: Vec<String> = vec![export.node.clone()];
    let mut next = 0;
    while let Some(name) = nodes.get(next) {
        for child in there.nodes.get(name).map_or(&[][..], |n| &n.children) {
            nodes.retain(|n| n != child);
            nodes.push(child.clone());
        }
        next = nodes.len().min(next + 1);
    }
    let proxy = daemon.export(&export.id).await?;
    proxy.remove(Options::new()).await?;
    for (job, objects) in &there.jobs {
        if objects.iter().any(|o| nodes.contains(o)) {
            let force = Options::from([("force", Variant::from(true))]);
            let job = daemon.job(job).await?;
            let _ = job.cancel(force).await;
            let _ = job.dismiss(Options::new()).await;
        }
    }
    // Ours, or those that were made for ours (snapshots, copies); what others stand on is in use, and stays. A job may take a
    // moment to end.
    let since = Instant::now();
    loop {
        for name in nodes.iter().filter(|n| !n.starts_with('#')) {
            if let Ok(node) = daemon.node(name).await {
                let _ = node.remove(Options::new()).await;
            }
        }
        let left = look(daemon).await?;
        let job = left.jobs.values().flatten().any(|o| nodes.contains(o));
        if !job || since.elapsed() > JOB_END {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let manager = daemon.manager().await?;
    let _ = manager
        .remove_throttle_group(&export.id, Options::new())
        .await;
    let left = look(daemon).await?;
    match left.nodes.contains_key(&export.id) {
        true => Err(Failure(format!(
            "node '{}' stays: something uses it still (vdiskctl tree)",
            export.id
        ))),
        false => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_say_whose_they_are() {
        let uuid = "c7a5fdbd-edaf-9455-926a-d65c16db1809";
        let socket = format!("/run/vdiskd/{uuid}-vda.sock");
        assert_eq!(target_of(&socket, uuid), Some("vda"));
        assert!(is_uuid(uuid) && !is_uuid(&uuid.replace('-', "x")));
        assert_eq!(target_of(&socket, "c7a5fdbd"), None);
        assert_eq!(target_of("/run/vdiskd/mine.sock", uuid), None);
        assert_eq!(target_of(&format!("/{uuid}-vda"), uuid), None);
    }
}
