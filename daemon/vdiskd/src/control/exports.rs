//! Commands on exports.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use vdisk_api::{
    Error, ExportKind, ExportOptions, Map, QueuePlacement, Reply, Result, SocketAddress,
};
use vdisk_block::{Backend, Parent, Permissions, Use};
use vdisk_exports::nbd::{Nbd, NbdSetup};
use vdisk_exports::vhost_user::VhostUserBlk;
use vdisk_exports::virtio_blk::DeviceOptions;
use vdisk_exports::{Left, Server};
use vdisk_io::IoThread;

use super::{Control, Event, Export, Sockets, World};

/// What a guest does with a node.
fn guest_use(writable: bool, share_rw: bool) -> Use {
    let read = Permissions::CONSISTENT_READ;
    if !writable {
        return Use {
            taken: read,
            shared: Permissions::ALL,
        };
    }
    let shared = if share_rw {
        Permissions::ALL
    } else {
        Permissions::ALL.without(Permissions::WRITE)
    };
    Use {
        taken: read.and(Permissions::WRITE),
        shared,
    }
}

impl Control {
    pub(super) fn add_export(&mut self, options: ExportOptions) -> Result<Reply> {
        self.check_export(&options)?;
        self.add_export_with(options, Left::default())
    }

    /// Adds an export, with what an earlier daemon has left of it.
    pub(super) fn add_export_with(&mut self, options: ExportOptions, left: Left) -> Result<Reply> {
        let id = options.id.clone();
        let mut world = self.world();
        if world.exports.contains_key(&id) {
            return Err(Error::exists(format!(
                "there is an export '{id}' already: choose another id, or remove it first"
            )));
        }
        let node = world
            .graph
            .node(&options.node_name)
            .map_err(|e| e.context(format_args!("export '{id}'")))?;
        let kind = &with_defaults(&options.kind, &world.defaults.sockets);
        if let SocketAddress::Named(name, _) = kind.addr()
            && let Some((other, _)) = world
                .exports
                .iter()
                .find(|(_, e)| e.socket_name() == Some(name))
        {
            return Err(Error::in_use(format!(
                "export '{id}': export '{other}' has the socket '{name}': give another, or remove that export first"
            )));
        }
        let given = resolved(options.given, kind);
        let threads = place_queues(&world, &id, &options.placement, kind.num_queues())?;
        let backend = Backend::new(id.clone(), node);
        let parent = Parent::Export(id.clone());
        world.graph.attach(
            &options.node_name,
            parent.clone(),
            guest_use(options.writable, options.share_rw),
            backend.clone(),
        )?;
        let events = self.export_events.clone();
        let keeper = self.keeper.clone();
        let (writable, writethrough) = (options.writable, options.writethrough);
        let started = match kind {
            ExportKind::VhostUserBlk(kind) => {
                let device = DeviceOptions {
                    id: id.clone(),
                    writable,
                    writethrough,
                    num_queues: kind.num_queues,
                    queue_size: kind.queue_size,
                    logical_block_size: kind.logical_block_size,
                    physical_block_size: kind.physical_block_size,
                    serial: kind.serial.clone(),
                };
                VhostUserBlk::start(device, kind, backend.clone(), threads, events, keeper, left)
                    .map(Server::VhostUserBlk)
            }
            ExportKind::Nbd(kind) => {
                let own = backend.node().storage_block_size().clamp(1, 512) as u32;
                let setup = NbdSetup {
                    id: id.clone(),
                    writable,
                    writethrough,
                    name: kind.name.clone().unwrap_or_else(|| id.clone()),
                    description: kind.description.clone(),
                    logical_block_size: kind.logical_block_size.unwrap_or(own),
                    max_connections: kind.max_connections,
                    until_disconnect: kind.until_disconnect,
                };
                Nbd::start(setup, kind, backend.clone(), threads, events, keeper, left)
                    .map(Server::Nbd)
            }
        };
        let server = match started {
            Ok(server) => server,
            Err(e) => {
                world.graph.detach(&options.node_name, &parent);
                return Err(e);
            }
        };
        tracing::info!(
            export = id,
            node = options.node_name,
            kind = options.kind.name(),
            writable = options.writable,
            socket = server.socket().map(|p| p.display().to_string()),
            "export added"
        );
        let export = Export {
            backend,
            writable: options.writable,
            kind: options.kind.name(),
            server,
            given,
            persistent: AtomicBool::new(false),
        };
        world.exports.insert(id.clone(), Arc::new(export));
        drop(world);
        self.lost.forget_export(&id);
        let world = self.world();
        let others = others_below(&world, &id);
        drop(world);
        self.export_changed_others(&options.node_name, others);
        self.events.push(Event::ExportAdded(id));
        Ok(Reply::Done)
    }

    pub(super) fn forget_lost(&mut self, is_export: bool, name: &str) -> Result<Reply> {
        let (kind, found) = match is_export {
            true => ("export", self.lost.forget_export(name)),
            false => ("node", self.lost.forget_node(name)),
        };
        if !found {
            return Err(Error::not_found(format!(
                "no {kind} '{name}' is lost: see 'vdiskctl status' for what is"
            )));
        }
        self.world().forget_problems_of(name);
        tracing::info!(name, "what could not be restored is given up");
        self.events.push(Event::ProblemsChanged);
        Ok(Reply::Done)
    }

    pub(super) fn set_persistent(&mut self, id: &str, on: bool) -> Result<Reply> {
        let export = self.world().export(id)?;
        let before = export.is_persistent();
        if on && self.world().defaults.state_dir.is_none() {
            return Err(Error::not_supported(format!(
                "export '{id}': this daemon has no state folder: start it with --state-dir, or under a unit with StateDirectory="
            )));
        }
        export.set_persistent(on);
        if on && let Err(e) = self.check_persistent(id) {
            export.set_persistent(before);
            return Err(e);
        }
        self.save();
        if let Some(why) = self.persistent_trouble() {
            export.set_persistent(before);
            self.save();
            return Err(Error::failed(format!("export '{id}': {why}")));
        }
        tracing::info!(export = id, persistent = on, "export changed");
        self.events.push(Event::ExportChanged(id.to_owned()));
        Ok(Reply::Done)
    }

    /// All is there that an export was made for: it ends, and its node with it.
    pub(super) async fn finish_export(&mut self, id: &str) {
        let Ok(export) = self.world().export(id) else {
            return;
        };
        let node = export.node();
        tracing::info!(
            export = id,
            node,
            "all is written: the export ends, and its node with it"
        );
        if let Err(error) = self.remove_export(id).await {
            tracing::error!(export = id, %error, "it cannot be removed");
        }
        if let Err(error) = self.remove_node(&node).await {
            tracing::warn!(node, %error, "it stays");
        }
    }

    pub(super) async fn remove_export(&mut self, id: &str) -> Result<Reply> {
        let export = self.world().export(id)?;
        export.server.stop().await;
        let others = {
            let mut world = self.world();
            let others = others_below(&world, id);
            world
                .graph
                .detach(&export.node(), &Parent::Export(id.to_owned()));
            world.exports.remove(id);
            others
        };
        tracing::info!(export = id, "export removed");
        self.export_changed_others(&export.node(), others);
        self.events.push(Event::ExportRemoved(id.to_owned()));
        Ok(Reply::Done)
    }

    /// An export came or went: its node and its threads have other users, and other exports may have
    /// another path.
    fn export_changed_others(&mut self, node: &str, others: Others) {
        self.events.push(Event::NodeChanged(node.to_owned()));
        let threads = others.threads.into_iter().map(Event::IoThreadChanged);
        self.events.extend(threads);
        let exports = others.exports.into_iter().map(Event::ExportChanged);
        self.events.extend(exports);
    }
}

/// The options with what vdiskd.toml says of sockets.
fn with_defaults(kind: &ExportKind, sockets: &Sockets) -> ExportKind {
    let mut kind = kind.clone();
    let (addr, mode, group) = kind.socket_mut();
    *mode = mode.or(sockets.mode);
    *group = group.take().or_else(|| sockets.group.clone());
    if let SocketAddress::Named(name, socket) = addr {
        *socket = sockets.passed.get(name).cloned();
    }
    if let (SocketAddress::Unix(path), Some(directory)) = (addr, &sockets.directory) {
        // An absolute path stays what it is.
        *path = directory.join(&*path);
    }
    kind
}

/// The options as they were given, with what was found for the socket: that stays, whatever vdiskd.toml says later.
fn resolved(mut given: Map, kind: &ExportKind) -> Map {
    let mut kind = kind.clone();
    let (addr, mode, group) = kind.socket_mut();
    let SocketAddress::Unix(path) = addr else {
        return given;
    };
    let addr = [
        ("type".to_owned(), "unix".into()),
        ("path".to_owned(), path.to_string_lossy().into()),
    ];
    given.insert("addr".into(), Map::from_iter(addr).into());
    if let Some(mode) = mode {
        given.insert("socket-mode".into(), format!("{mode:o}").into());
    }
    if let Some(group) = group {
        given.insert("socket-group".into(), group.clone().into());
    }
    given
}

struct Others {
    threads: Vec<String>,
    exports: Vec<String>,
}

fn others_below(world: &World, id: &str) -> Others {
    let mut threads: Vec<String> = world.exports.get(id).map_or(Vec::new(), |e| {
        let names = e.server.threads().iter().map(|t| t.name().to_owned());
        names.collect()
    });
    threads.sort();
    threads.dedup();
    // Others have nothing to do with it.
    let node = world.exports.get(id).map(|e| e.node());
    let related = node.map(|n| world.graph.related(&n)).unwrap_or_default();
    let exports = world.exports.iter();
    let exports = exports.filter(|(k, e)| *k != id && related.contains(&e.node()));
    Others {
        threads,
        exports: exports.map(|(k, _)| k.clone()).collect(),
    }
}

/// The I/O thread of each queue; all threads in turn of an export that has none.
fn place_queues(
    world: &World,
    id: &str,
    placement: &QueuePlacement,
    num_queues: Option<u16>,
) -> Result<Vec<IoThread>> {
    let find = |name: &String| {
        world
            .thread(name)
            .map_err(|e| e.context(format_args!("export '{id}'")))
    };
    let in_turn: Vec<IoThread> = if placement.round_robin.is_empty() {
        // Guests use the first queues of the many that are offered: the next export begins elsewhere.
        let mut threads: Vec<IoThread> = world.threads.values().cloned().collect();
        let firsts = |thread: &IoThread| {
            let exports = world.exports.values();
            let first = exports.filter_map(|e| e.server.threads().first());
            first.filter(|t| t.is_same(thread)).count()
        };
        threads.sort_by_cached_key(firsts);
        threads
    } else {
        placement
            .round_robin
            .iter()
            .map(find)
            .collect::<Result<_>>()?
    };
    let Some(num_queues) = num_queues else {
        return Ok(in_turn);
    };
    let mut in_turn = in_turn.iter().cycle();
    (0..num_queues)
        .map(
            |queue| match placement.pinned.iter().find(|(q, _)| *q == queue) {
                Some((_, name)) => find(name),
                None => in_turn
                    .next()
                    .cloned()
                    .ok_or_else(|| Error::failed("there is no I/O thread")),
            },
        )
        .collect()
}
