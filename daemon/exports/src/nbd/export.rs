//! An NBD export: its socket, and the clients that are connected.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicUsize, Ordering::Relaxed, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::{JoinHandle, JoinSet};
use vdisk_api::{Error, NbdExportOptions, Result};
use vdisk_block::Backend;
use vdisk_io::IoThread;
use vdisk_nbd::server::Offer;
use vdisk_nbd::wire::transmission;

use super::connection;
use crate::keeper::{Keeper, Left, listener_name};
use crate::listener::Listener;
use crate::server::ExportEvent;
use crate::statistics::{QueueCounters, QueueStats};

/// What a user chose for an export.
#[derive(Clone, Debug)]
pub struct NbdSetup {
    pub id: String,
    pub writable: bool,
    /// Every write is durable before it is answered.
    pub writethrough: bool,
    /// What clients call it.
    pub name: String,
    pub description: String,
    /// Bytes: offsets and lengths of requests are multiples of this, a power of two.
    pub logical_block_size: u32,
    /// Clients that may be connected at once; others wait.
    pub max_connections: u32,
    /// It ends with the first client that has used it, and says goodbye.
    pub until_disconnect: bool,
}

/// What a client has said about what it writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Progress {
    /// Nothing.
    Untold,
    /// There is more to come: what is there is nobody's yet.
    Unfinished,
    /// All is written.
    Finished,
}

/// What an export shares with its connections.
pub(super) struct Shared {
    pub setup: NbdSetup,
    pub backend: Arc<Backend>,
    /// Connections are on one after the other.
    pub threads: Vec<IoThread>,
    /// Of each thread.
    pub stats: Vec<Arc<QueueStats>>,
    next_thread: AtomicUsize,
    clients: AtomicU32,
    /// A [`Progress`].
    progress: AtomicU8,
    events: mpsc::UnboundedSender<ExportEvent>,
}

impl Shared {
    /// What is offered at this moment.
    pub fn offer(&self) -> Offer {
        let node = self.backend.node();
        let flags = transmission::HAS_FLAGS
            | transmission::SEND_FLUSH
            | transmission::SEND_FUA
            | transmission::SEND_DF
            // A flush makes durable what was written through any connection.
            | transmission::CAN_MULTI_CONN;
        let writes = match self.setup.writable {
            true => transmission::SEND_TRIM | transmission::SEND_WRITE_ZEROES,
            false => transmission::READ_ONLY,
        };
        let block = self.setup.logical_block_size;
        Offer {
            name: self.setup.name.clone(),
            description: self.setup.description.clone(),
            size: node.size() / u64::from(block) * u64::from(block),
            flags: flags | writes,
            min_block: block,
            preferred_block: (node.limits().zero_alignment).clamp(4096, 64 << 10) as u32,
        }
    }

    /// Notes what a client has said, or what follows from what it does; only if it is `from` by now, if that is said.
    pub fn set_progress(&self, from: Option<Progress>, to: Progress) {
        let _ = match from {
            None => Ok(self.progress.swap(to as u8, SeqCst)),
            Some(from) => self
                .progress
                .compare_exchange(from as u8, to as u8, SeqCst, SeqCst),
        };
    }

    fn has(&self, progress: Progress) -> bool {
        self.progress.load(SeqCst) == progress as u8
    }

    fn changed(&self) {
        let id = self.setup.id.clone();
        let _ = self.events.send(ExportEvent::ClientsChanged { id });
    }
}

pub struct Nbd {
    shared: Arc<Shared>,
    socket: Option<PathBuf>,
    keeper: Option<Arc<dyn Keeper>>,
    end: watch::Sender<End>,
    task: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct End {
    /// Nobody is let in any more.
    hold: bool,
    stop: bool,
    /// The socket is left to the next process.
    leave: bool,
}

impl Nbd {
    /// Starts the export. Must be called within a tokio runtime.
    pub fn start(
        setup: NbdSetup,
        options: &NbdExportOptions,
        backend: Arc<Backend>,
        threads: Vec<IoThread>,
        events: mpsc::UnboundedSender<ExportEvent>,
        keeper: Option<Arc<dyn Keeper>>,
        left: Left,
    ) -> Result<Nbd> {
        let id = setup.id.clone();
        // What a client has told an earlier process is not known any more.
        let progress = match left.listener.is_some() {
            true => Progress::Unfinished,
            false => Progress::Untold,
        };
        let network = vdisk_nbd::network::handle()
            .map_err(|e| Error::io(format_args!("export '{id}'"), &e))?;
        let listener = Listener::take_or_open(
            &id,
            &options.addr,
            options.socket_mode,
            options.socket_group.as_deref(),
            left.listener,
            keeper.as_deref(),
        )?;
        backend
            .node()
            .announce_block_size(setup.logical_block_size.into());
        let shared = Arc::new(Shared {
            stats: threads.iter().map(|_| Arc::default()).collect(),
            threads,
            setup,
            backend,
            next_thread: AtomicUsize::new(0),
            clients: AtomicU32::new(0),
            progress: AtomicU8::new(progress as u8),
            events,
        });
        let socket = listener.path().map(Path::to_owned);
        let (end, watch) = watch::channel(End::default());
        let task = tokio::spawn(serve(shared.clone(), listener, network, watch));
        Ok(Nbd {
            shared,
            socket,
            keeper,
            end,
            task: Mutex::new(Some(task)),
        })
    }

    pub fn setup(&self) -> &NbdSetup {
        &self.shared.setup
    }

    /// Its client has said that all is written: whoever needs the node's storage may end the export.
    pub fn is_finished(&self) -> bool {
        self.shared.setup.until_disconnect && self.shared.has(Progress::Finished)
    }

    /// The socket file, unless a descriptor was passed.
    pub fn socket(&self) -> Option<&Path> {
        self.socket.as_deref()
    }

    pub fn threads(&self) -> &[IoThread] {
        &self.shared.threads
    }

    /// Clients that use it.
    pub fn clients(&self) -> u32 {
        self.shared.clients.load(Relaxed)
    }

    /// What was counted on each I/O thread.
    pub fn statistics(&self) -> Vec<QueueCounters> {
        self.shared.stats.iter().map(|s| s.counters()).collect()
    }

    /// Nobody is let in any more; those who are in are served on. Only an end can follow.
    pub fn hold(&self) {
        self.end.send_modify(|end| end.hold = true);
    }

    /// Answers all requests, ends the connections, and removes the socket.
    pub async fn stop(&self) {
        self.finish(false).await;
        if let Some(keeper) = &self.keeper {
            keeper.forget(&listener_name(&self.shared.setup.id));
        }
    }

    /// Answers all requests, ends the connections, and leaves the socket to the next process.
    pub async fn suspend(&self) {
        self.finish(self.keeper.is_some()).await;
    }

    async fn finish(&self, leave: bool) {
        self.end.send_modify(|end| {
            end.leave = leave;
            end.stop = true;
        });
        let task = self.task.lock().unwrap_or_else(|e| e.into_inner()).take();
        if let Some(task) = task {
            let _ = task.await;
        }
    }
}

async fn serve(
    shared: Arc<Shared>,
    mut listener: Listener,
    network: tokio::runtime::Handle,
    mut end: watch::Receiver<End>,
) {
    let (stop, stops) = watch::channel(false);
    let mut connections = JoinSet::new();
    loop {
        let now = *end.borrow_and_update();
        if now.stop {
            break;
        }
        let is_full = connections.len() >= shared.setup.max_connections as usize;
        tokio::select! {
            changed = end.changed() => if changed.is_err() {
                break;
            },
            Some(_) = connections.join_next(), if !connections.is_empty() => {}
            accepted = listener.socket.accept(), if !is_full && !now.hold => match accepted {
                Ok((stream, _)) => {
                    let client = client(shared.clone(), stream, stops.clone());
                    match client {
                        Ok(client) => { connections.spawn_on(client, &network); }
                        Err(error) => {
                            tracing::error!(export = shared.setup.id, %error, "a client cannot be served");
                        }
                    }
                }
                Err(error) => {
                    // Out of descriptors, most likely; the client stays in the backlog meanwhile.
                    tracing::error!(export = shared.setup.id, %error, "cannot accept a client");
                    tokio::time::sleep(Duration::from_secs(1)).await;
                }
            },
        }
    }
    stop.send_replace(true);
    while connections.join_next().await.is_some() {}
    if end.borrow().leave {
        listener.leave_file();
    }
}

/// What is done for a client, on the thread of connections.
fn client(
    shared: Arc<Shared>,
    stream: UnixStream,
    stop: watch::Receiver<bool>,
) -> std::io::Result<impl Future<Output = ()> + Send + 'static> {
    // It leaves this thread's executor for that one's.
    let stream = stream.into_std()?;
    Ok(async move {
        let mut stream = match UnixStream::from_std(stream) {
            Ok(stream) => stream,
            Err(error) => {
                tracing::error!(export = shared.setup.id, %error, "a client cannot be served");
                return;
            }
        };
        let threads = shared.threads.len().max(1);
        let thread = shared.next_thread.fetch_add(1, Relaxed) % threads;
        tracing::info!(export = shared.setup.id, "client connected");
        shared.clients.fetch_add(1, Relaxed);
        shared.changed();
        let ended = connection::serve(&shared, &mut stream, thread, stop.clone()).await;
        shared.clients.fetch_sub(1, Relaxed);
        shared.changed();
        let is_done = match ended {
            Ok(is_done) => {
                tracing::info!(export = shared.setup.id, "client disconnected");
                is_done
            }
            Err(error) => {
                tracing::error!(export = shared.setup.id, %error, "the client is disconnected");
                false
            }
        };
        let is_whole = is_done && !shared.has(Progress::Unfinished);
        if is_whole && shared.setup.until_disconnect && !*stop.borrow() {
            // Whoever ends the export waits for this one to end.
            tokio::spawn(async move {
                end_with_client(&shared).await;
                // The client sees the end now, when all is let go of.
                drop(stream);
            });
        }
    })
}

async fn end_with_client(shared: &Shared) {
    let (done, ended) = oneshot::channel();
    let id = shared.setup.id.clone();
    if shared
        .events
        .send(ExportEvent::Finished { id, done })
        .is_ok()
    {
        let _ = ended.await;
    }
}
