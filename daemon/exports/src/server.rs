//! What all kinds of exports have.

use std::path::Path;

use tokio::sync::oneshot;
use vdisk_api::Result;
use vdisk_block::{Backend, Direction};
use vdisk_io::IoThread;

use crate::nbd::Nbd;
use crate::statistics::QueueCounters;
use crate::vhost_user::VhostUserBlk;

/// Something about an export changed by itself, or is to be changed.
#[derive(Debug)]
pub enum ExportEvent {
    /// A front-end came or left.
    ClientsChanged { id: String },
    /// The guest is about to go on here, and the images of the node must be open; or it goes on elsewhere, and they are to be let
    /// go of.
    Activity {
        node: String,
        active: bool,
        /// Whether it is so now; not if another guest uses the images.
        done: oneshot::Sender<Result<bool>>,
    },
    /// All is written that the export was there for: it and its node are to end.
    Finished {
        id: String,
        done: oneshot::Sender<()>,
    },
}

/// An export of any kind.
pub enum Server {
    VhostUserBlk(VhostUserBlk),
    Nbd(Nbd),
}

impl Server {
    /// The socket file, unless a descriptor was passed.
    pub fn socket(&self) -> Option<&Path> {
        match self {
            Server::VhostUserBlk(e) => e.socket(),
            Server::Nbd(e) => e.socket(),
        }
    }

    /// The I/O thread of each queue, or those that connections are on.
    pub fn threads(&self) -> &[IoThread] {
        match self {
            Server::VhostUserBlk(e) => e.threads(),
            Server::Nbd(e) => e.threads(),
        }
    }

    /// Front-ends or clients connected.
    pub fn clients(&self) -> u32 {
        match self {
            Server::VhostUserBlk(e) => e.clients(),
            Server::Nbd(e) => e.clients(),
        }
    }

    /// Its guest goes on elsewhere, and its image is open still.
    pub fn owes(&self) -> bool {
        match self {
            Server::VhostUserBlk(e) => e.owes(),
            Server::Nbd(_) => false,
        }
    }

    /// Queues or connections that are used at the moment.
    pub fn running(&self) -> u32 {
        match self {
            Server::VhostUserBlk(e) => e.running_queues(),
            Server::Nbd(e) => e.clients(),
        }
    }

    /// What was counted on each queue, or each I/O thread.
    pub fn statistics(&self) -> Vec<QueueCounters> {
        match self {
            Server::VhostUserBlk(e) => e.statistics(),
            Server::Nbd(e) => e.statistics(),
        }
    }

    /// Bytes that all requests are multiples of.
    pub fn logical_block_size(&self) -> u32 {
        match self {
            Server::VhostUserBlk(e) => e.device().options.logical_block_size,
            Server::Nbd(e) => e.setup().logical_block_size,
        }
    }

    /// Why requests of one that is on `backend` take the slow path, if they do.
    pub fn slow_reason(&self, backend: &Backend, writable: bool) -> Option<String> {
        if let Server::Nbd(_) = self {
            return Some("requests come through a socket, not a virtqueue".into());
        }
        let node = backend.node();
        let read = node.slow_reason(Direction::Read);
        let write = writable
            .then(|| node.slow_reason(Direction::Write))
            .flatten();
        Some(format!("node '{}': {}", node.name(), read.or(write)?))
    }

    /// The node's size changed: tell the guest. (NBD cannot; who connects from now on sees it.)
    pub fn config_changed(&self) {
        if let Server::VhostUserBlk(e) = self {
            e.config_changed();
        }
    }

    /// Answers all requests, and ends everything.
    pub async fn stop(&self) {
        match self {
            Server::VhostUserBlk(e) => e.stop().await,
            Server::Nbd(e) => e.stop().await,
        }
    }

    /// Answers all requests, and leaves what can be left to the next process.
    pub async fn suspend(&self) {
        match self {
            Server::VhostUserBlk(e) => e.suspend().await,
            Server::Nbd(e) => e.suspend().await,
        }
    }

    /// Serves on, and lets nobody in, and nothing be changed, until another process does. Only an end can follow.
    pub async fn hold(&self) {
        match self {
            Server::VhostUserBlk(e) => e.hold().await,
            Server::Nbd(e) => e.hold(),
        }
    }
}
