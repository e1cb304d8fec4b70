//! A vhost-user-blk export: its socket, its device, and one front-end after the other.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use vdisk_api::{Error, Result, VhostUserBlkOptions};
use vdisk_block::Backend;
use vdisk_io::IoThread;

use super::connection::Connection;
use super::pace::Pace;
use super::parcel;
use super::state::{Descriptors, State};
use crate::keeper::{Keeper, Left, connection_name, listener_name};
use crate::listener::Listener;
use crate::server::ExportEvent;
use crate::statistics::{QueueCounters, QueueStats};
use crate::virtio_blk::{Device, DeviceOptions};

/// What connections are told.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Signals {
    /// Changes with the device's configuration.
    pub config: u64,
    pub stop: bool,
    /// Queues go on, and nothing of the front-end is read any more.
    pub hold: bool,
    /// The connection is left to the next process.
    pub suspend: bool,
}

/// What an export shares with its connections.
pub(super) struct Shared {
    pub device: Arc<Device>,
    /// The I/O thread of each queue.
    pub threads: Vec<IoThread>,
    pub stats: Vec<Arc<QueueStats>>,
    pub fixed_buffers: bool,
    clients: AtomicU32,
    events: mpsc::UnboundedSender<ExportEvent>,
    pub keeper: Option<Arc<dyn Keeper>>,
    pub pace: Pace,
    /// Of the connection that the keeper has.
    generation: AtomicU64,
    /// Queues that run.
    pub running: AtomicU32,
    /// The guest goes on elsewhere, and the image could not be let go of yet.
    pub owed: AtomicBool,
    /// That was asked for, and not answered: it may be done at any time.
    unanswered: AtomicBool,
    /// What the guest has written was copied for another host, which was told so; the image is open still.
    handed_over: AtomicBool,
    /// Nothing of front-ends is read any more.
    held: watch::Sender<bool>,
}

/// How long a front-end that stops waits until the image is let go of. It is tried again later.
const LET_GO: Duration = Duration::from_secs(10);
pub(super) const LET_GO_PAUSE: Duration = Duration::from_secs(1);

impl Shared {
    pub fn generation(&self) -> u64 {
        self.generation.load(Ordering::Relaxed)
    }

    /// The generation so far, and the next, which counts from now on.
    pub fn next_generation(&self) -> (u64, u64) {
        let old = self.generation.fetch_add(1, Ordering::Relaxed);
        (old, old + 1)
    }

    pub fn id(&self) -> &str {
        &self.device.options.id
    }

    /// Has the images of the export's node opened, or let go of.
    pub async fn set_active(&self, active: bool) -> Result<bool> {
        let node = self.device.backend.node().name().to_owned();
        let (done, answer) = oneshot::channel();
        let asked = self
            .events
            .send(ExportEvent::Activity { node, active, done });
        self.unanswered.store(true, Ordering::Relaxed);
        let answer = answer.await;
        self.unanswered.store(false, Ordering::Relaxed);
        match (asked, answer) {
            (Ok(()), Ok(result)) => {
                if result.is_ok() {
                    let is_open = self.device.backend.node().is_active();
                    self.handed_over
                        .store(!active && is_open, Ordering::Relaxed);
                }
                result
            }
            _ => Err(Error::failed("the daemon is stopping")),
        }
    }

    /// Says that nothing of front-ends is read any more.
    pub fn set_held(&self) {
        self.held.send_replace(true);
    }

    /// The image is open, and stays so, and no other host has it.
    pub fn has_image(&self) -> bool {
        !self.handed_over.load(Ordering::Relaxed)
            && self.device.backend.node().is_active()
            && !self.unanswered.load(Ordering::Relaxed)
    }

    /// Lets go of the image for another host: the front-end has logged what changed in the guest's memory, and has stopped all
    /// queues, which is how the guest goes on elsewhere. (Or goes on here: the image is opened again then.)
    ///
    /// False if it is still to be done, by this export.
    pub async fn let_go(&self, signals: &mut watch::Receiver<Signals>) -> bool {
        let gone = tokio::select! {
            gone = self.set_active(false) => gone,
            () = tokio::time::sleep(LET_GO) => Err(Error::failed("it takes too long")),
            _ = signals.wait_for(|s| s.stop) => {
                self.owed.store(true, Ordering::Relaxed);
                return false;
            }
        };
        let is_done = gone.is_ok();
        match gone {
            Ok(true) => tracing::info!(
                export = self.id(),
                "all queues are stopped for a migration, and the image is let go of"
            ),
            Ok(false) => tracing::info!(
                export = self.id(),
                "all queues are stopped for a migration, and another export uses the image: it is let go of with that"
            ),
            Err(error) if !self.owed.load(Ordering::Relaxed) => tracing::warn!(
                export = self.id(),
                %error,
                "all queues are stopped for a migration, and the image cannot be let go of yet: the guest waits on the other host"
            ),
            Err(_) => {}
        }
        self.owed.store(!is_done, Ordering::Relaxed);
        is_done
    }

    fn set_clients(&self, n: u32) {
        self.clients.store(n, Ordering::Relaxed);
        let id = self.id().to_owned();
        let _ = self.events.send(ExportEvent::ClientsChanged { id });
    }
}

pub struct VhostUserBlk {
    shared: Arc<Shared>,
    socket: Option<PathBuf>,
    signals: watch::Sender<Signals>,
    task: Mutex<Option<JoinHandle<()>>>,
}

impl VhostUserBlk {
    /// Starts the export. `threads` has the I/O thread of each queue; `left` is what an earlier process has left of it with
    /// `keeper`. Must be called within a tokio runtime.
    pub fn start(
        device: DeviceOptions,
        options: &VhostUserBlkOptions,
        backend: Arc<Backend>,
        threads: Vec<IoThread>,
        events: mpsc::UnboundedSender<ExportEvent>,
        keeper: Option<Arc<dyn Keeper>>,
        left: Left,
    ) -> Result<VhostUserBlk> {
        check_size(&device, &backend)?;
        if let Some(keeper) = &keeper {
            left.forget_superseded(&device.id, &**keeper);
        }
        let listener = Listener::take_or_open(
            &device.id,
            &options.addr,
            options.socket_mode,
            options.socket_group.as_deref(),
            left.listener,
            keeper.as_deref(),
        )?;
        backend
            .node()
            .announce_block_size(device.logical_block_size.into());
        let shared = Arc::new(Shared {
            stats: threads.iter().map(|_| Arc::default()).collect(),
            threads,
            fixed_buffers: options.fixed_buffers,
            device: Arc::new(Device::new(device, backend)),
            clients: AtomicU32::new(0),
            events,
            keeper,
            pace: Pace::default(),
            generation: AtomicU64::new(left.connection.as_ref().map_or(0, |(g, _)| *g)),
            running: AtomicU32::new(0),
            owed: AtomicBool::new(false),
            unanswered: AtomicBool::new(false),
            handed_over: AtomicBool::new(false),
            held: watch::Sender::new(false),
        });
        let connection = left.connection.map(|(_, fd)| fd);
        let socket = listener.path().map(Path::to_owned);
        let (signals, watch) = watch::channel(Signals::default());
        let task = tokio::spawn(serve(shared.clone(), listener, connection, watch));
        Ok(VhostUserBlk {
            shared,
            socket,
            signals,
            task: Mutex::new(Some(task)),
        })
    }

    pub fn device(&self) -> &Arc<Device> {
        &self.shared.device
    }

    /// The socket file, unless a descriptor was passed.
    pub fn socket(&self) -> Option<&Path> {
        self.socket.as_deref()
    }

    /// The I/O thread of each queue.
    pub fn threads(&self) -> &[IoThread] {
        &self.shared.threads
    }

    /// Front-ends connected: 0 or 1.
    pub fn clients(&self) -> u32 {
        self.shared.clients.load(Ordering::Relaxed)
    }

    /// Its guest goes on elsewhere, and its image is open still.
    pub fn owes(&self) -> bool {
        self.shared.owed.load(Ordering::Relaxed) || self.shared.unanswered.load(Ordering::Relaxed)
    }

    /// Queues that a guest uses at the moment.
    pub fn running_queues(&self) -> u32 {
        self.shared.running.load(Ordering::Relaxed)
    }

    /// What was counted on each queue.
    pub fn statistics(&self) -> Vec<QueueCounters> {
        self.shared.stats.iter().map(|s| s.counters()).collect()
    }

    /// The node's size changed: tell the guest.
    pub fn config_changed(&self) {
        self.signals.send_modify(|s| s.config += 1);
    }

    /// Ends the connection when its requests are answered, and removes the socket.
    pub async fn stop(&self) {
        self.end(false).await;
        if let Some(keeper) = &self.shared.keeper {
            keeper.forget(&listener_name(self.shared.id()));
        }
    }

    /// Answers all requests, and leaves the connection and the socket to the next process.
    pub async fn suspend(&self) {
        self.end(self.shared.keeper.is_some()).await;
    }

    /// Guests are served on, and nothing that front-ends say is read until another process does: what they have said before is
    /// answered when this returns, and new ones wait to be accepted. Only an end can follow.
    pub async fn hold(&self) {
        let mut held = self.shared.held.subscribe();
        self.signals.send_modify(|s| s.hold = true);
        let _ = held.wait_for(|held| *held).await;
    }

    async fn end(&self, suspend: bool) {
        self.signals.send_modify(|s| {
            s.suspend = suspend;
            s.stop = true;
        });
        let task = self.task.lock().unwrap_or_else(|e| e.into_inner()).take();
        if let Some(task) = task {
            let _ = task.await;
        }
    }
}

fn check_size(device: &DeviceOptions, backend: &Backend) -> Result<()> {
    let node = backend.node();
    let block = u64::from(device.logical_block_size);
    if node.size().is_multiple_of(block) {
        return Ok(());
    }
    Err(Error::invalid(format!(
        "export '{}': node '{}' has {} bytes, which is not a multiple of the logical block size {block}: resize it to {} bytes, or choose a smaller logical-block-size",
        device.id,
        node.name(),
        node.size(),
        node.size().next_multiple_of(block)
    )))
}

/// What a parcel of an earlier process has.
fn unpack(parcel: OwnedFd) -> io::Result<(UnixStream, (State, Descriptors))> {
    let (state, fds, connection) = parcel::unpack(parcel.as_fd())?;
    let stream = std::os::unix::net::UnixStream::from(connection);
    stream.set_nonblocking(true)?;
    Ok((UnixStream::from_std(stream)?, (state, fds)))
}

async fn serve(
    shared: Arc<Shared>,
    mut listener: Listener,
    left: Option<OwnedFd>,
    mut signals: watch::Receiver<Signals>,
) {
    let (mut stop, mut hold) = (signals.clone(), signals.clone());
    let mut left = left.and_then(|parcel| match unpack(parcel) {
        Ok(left) => Some(left),
        Err(error) => {
            tracing::error!(export = shared.id(), %error, "the connection that was kept cannot be taken over, and ends");
            if let Some(keeper) = &shared.keeper {
                keeper.forget(&connection_name(shared.id(), shared.generation()));
            }
            None
        }
    });
    loop {
        let accepted = match left.take() {
            Some((stream, left)) => Some(Ok((stream, Some(left)))),
            None => {
                let is_held = signals.borrow().hold;
                if is_held {
                    shared.set_held();
                }
                tokio::select! {
                    biased;
                    _ = stop.wait_for(|s| s.stop) => {
                        if signals.borrow().suspend {
                            listener.leave_file();
                        }
                        return;
                    }
                    _ = hold.wait_for(|s| s.hold), if !is_held => continue,
                    accepted = listener.socket.accept(), if !is_held => {
                        Some(accepted.map(|(stream, _)| (stream, None)))
                    }
                    // Its front-end has gone, and the guest waits elsewhere.
                    () = tokio::time::sleep(LET_GO_PAUSE), if shared.owed.load(Ordering::Relaxed) => None,
                }
            }
        };
        let Some(accepted) = accepted else {
            shared.let_go(&mut stop).await;
            continue;
        };
        let (stream, left) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                // Out of descriptors, most likely; the front-end stays in the backlog meanwhile.
                tracing::error!(export = shared.id(), %error, "cannot accept a front-end");
                tokio::time::sleep(std::time::Duration::from_secs(1)).await;
                continue;
            }
        };
        if left.is_none() {
            tracing::info!(export = shared.id(), "front-end connected");
        }
        shared.set_clients(1);
        signals.mark_unchanged();
        let result = Connection::run(&shared, stream, left, &mut signals).await;
        match result {
            Ok(()) => tracing::info!(export = shared.id(), "front-end disconnected"),
            Err(error) => {
                tracing::error!(export = shared.id(), %error, "the front-end is disconnected");
            }
        }
        shared.set_clients(0);
    }
}
