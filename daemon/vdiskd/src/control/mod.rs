//! The control plane: owns nodes, exports and I/O threads, and carries out commands one after the other.
//!
//! Fronts (D-Bus) send [`Command`]s through a [`Handle`] and read the [`World`]; they have no behaviour
//! of their own. Whatever changes is told to the observer before the command is answered, so that an
//! object is there when the method that makes it returns.

mod activity;
pub mod bitmaps;
mod exports;
mod follow;
pub mod images;
mod iothreads;
pub mod jobs;
mod limits;
mod moves;
mod nodes;
mod reopen;
pub mod secrets;
mod state;
pub mod throttle;
mod transaction;
mod world;

use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use futures_util::future::join_all;
use tokio::sync::{mpsc, oneshot};
use vdisk_api::{Command, Error, Reply, Result};
use vdisk_block::Pending;
use vdisk_exports::ExportEvent;
use vdisk_exports::vhost_user::wrap;

pub use follow::Follow;
use jobs::JobEvent;
pub use limits::{Limits, MemoryLimit};
pub use state::files_in_use;
use state::{Lost, SharedKeeper, StateFile};
pub use world::{Defaults, Export, Sockets, World};

/// An object came, went, or has changed properties.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    NodeAdded(String),
    NodeRemoved(String),
    NodeChanged(String),
    ExportAdded(String),
    ExportRemoved(String),
    ExportChanged(String),
    /// A write to the node reached beyond its threshold, by so many bytes.
    ThresholdExceeded(String, NodeEvent),
    IoThreadAdded(String),
    IoThreadRemoved(String),
    IoThreadChanged(String),
    /// Node and name.
    BitmapAdded(String, String),
    BitmapRemoved(String, String),
    BitmapChanged(String, String),
    JobAdded(String),
    JobChanged(String),
    /// It has ended, one way or the other.
    JobCompleted(String),
    JobRemoved(String),
    /// Something is amiss, or well again.
    ProblemsChanged,
}

/// A write reached beyond the threshold of a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeEvent {
    pub node: String,
    pub threshold: u64,
    /// Bytes beyond it.
    pub amount: u64,
}

/// Told about events; answers when it has acted on them.
pub type Observer = mpsc::UnboundedSender<(Vec<Event>, oneshot::Sender<()>)>;

enum Message {
    Run(Box<Command>, oneshot::Sender<Result<Reply>>),
    Observe(Observer, oneshot::Sender<()>),
    /// Something changed that is no command's.
    Save(oneshot::Sender<()>),
    Hold(oneshot::Sender<bool>),
    Shutdown(oneshot::Sender<()>),
}

/// The way to the control plane.
#[derive(Clone)]
pub struct Handle {
    tx: mpsc::UnboundedSender<Message>,
    world: Arc<Mutex<World>>,
    keeper: SharedKeeper,
    /// See [`Handle::hold`].
    held: Arc<AtomicBool>,
}

impl Handle {
    /// Who keeps what outlives the process.
    pub fn keeper(&self) -> &SharedKeeper {
        &self.keeper
    }

    /// Takes a file that a caller passed open, and has it kept for a restart.
    pub fn pass(&self, fd: OwnedFd) -> Result<Pending> {
        let descriptors = self.world().defaults.runtime.descriptors.clone();
        let parcel = wrap(fd.as_fd());
        let parcel = parcel.map_err(|e| Error::failed(format!("a passed descriptor: {e}")))?;
        let pending = descriptors.add(fd);
        let name = state::descriptor_name(pending.number);
        if let Some(keeper) = &self.keeper
            && let Err(error) = keeper.keep(&name, parcel.as_fd())
        {
            tracing::warn!(file = pending.name(), %error, "it cannot be kept for a restart");
        }
        Ok(pending)
    }

    /// Writes the state down.
    pub async fn save(&self) {
        let (tx, rx) = oneshot::channel();
        let _ = self.tx.send(Message::Save(tx));
        let _ = rx.await;
    }

    /// Carries out a command after those before it.
    pub async fn run(&self, command: Command) -> Result<Reply> {
        let (tx, rx) = oneshot::channel();
        let gone = || Error::failed("the daemon is stopping");
        self.tx
            .send(Message::Run(Box::new(command), tx))
            .map_err(|_| gone())?;
        rx.await.map_err(|_| gone())?
    }

    /// A look at what there is. Never held across an await.
    pub fn world(&self) -> MutexGuard<'_, World> {
        world::locked(&self.world)
    }

    /// Has `observer` told about everything from now on.
    pub async fn observe(&self, observer: Observer) {
        let (tx, rx) = oneshot::channel();
        let _ = self.tx.send(Message::Observe(observer, tx));
        let _ = rx.await;
    }

    /// Guests are served on, and nothing else changes: no command is taken, and nothing that front-ends say is read. It ends with
    /// [`Handle::shutdown`]. False if it cannot be (all that it held back stays so until then).
    pub async fn hold(&self) -> bool {
        self.held.store(true, Ordering::Relaxed);
        let (tx, rx) = oneshot::channel();
        let _ = self.tx.send(Message::Hold(tx));
        rx.await.unwrap_or(false)
    }

    /// Refuses what the next process would not know of.
    fn must_not_be_held(&self) -> Result<()> {
        refuse_if(&self.held)
    }

    /// Drains and closes everything.
    pub async fn shutdown(&self) {
        let (tx, rx) = oneshot::channel();
        let _ = self.tx.send(Message::Shutdown(tx));
        let _ = rx.await;
    }
}

fn refuse_if(held: &AtomicBool) -> Result<()> {
    match held.load(Ordering::Relaxed) {
        true => Err(Error::failed("the daemon is restarting: call again")),
        false => Ok(()),
    }
}

struct Control {
    world: Arc<Mutex<World>>,
    observer: Option<Observer>,
    export_events: mpsc::UnboundedSender<ExportEvent>,
    job_events: mpsc::UnboundedSender<JobEvent>,
    node_events: mpsc::UnboundedSender<NodeEvent>,
    /// What the command at hand has changed.
    events: Vec<Event>,
    state: StateFile,
    /// What of it outlives the machine.
    persistent: StateFile,
    keeper: SharedKeeper,
    lost: Lost,
    /// See [`Handle::hold`].
    held: Arc<AtomicBool>,
}

/// Starts the control plane. `left` is what `keeper` has kept of an earlier daemon, whose state is restored unless this one is
/// to be `fresh`.
pub async fn start(
    defaults: Defaults,
    keeper: SharedKeeper,
    left: Vec<(String, OwnedFd)>,
    fresh: bool,
) -> Result<Handle> {
    let state = StateFile::in_runtime_folder(defaults.runtime.dir.as_deref());
    let persistent = StateFile::in_state_folder(defaults.state_dir.as_deref());
    let world = Arc::new(Mutex::new(World::new(defaults)?));
    let (tx, rx) = mpsc::unbounded_channel();
    let (export_events, from_exports) = mpsc::unbounded_channel();
    let (job_events, from_jobs) = mpsc::unbounded_channel();
    let (node_events, from_nodes) = mpsc::unbounded_channel();
    let mut control = Control {
        world: world.clone(),
        observer: None,
        export_events,
        job_events,
        node_events,
        events: Vec::new(),
        state,
        persistent,
        keeper: keeper.clone(),
        lost: Lost::default(),
        held: Arc::default(),
    };
    let held = control.held.clone();
    secrets::take_credentials(&control.world().defaults.runtime.secrets);
    control.restore(left, fresh).await;
    tokio::spawn(control.serve(rx, from_exports, from_jobs, from_nodes));
    Ok(Handle {
        tx,
        world,
        keeper,
        held,
    })
}

impl Control {
    fn world(&self) -> MutexGuard<'_, World> {
        world::locked(&self.world)
    }

    async fn serve(
        mut self,
        mut messages: mpsc::UnboundedReceiver<Message>,
        mut exports: mpsc::UnboundedReceiver<ExportEvent>,
        mut jobs: mpsc::UnboundedReceiver<JobEvent>,
        mut nodes: mpsc::UnboundedReceiver<NodeEvent>,
    ) {
        loop {
            tokio::select! {
                message = messages.recv() => match message {
                    None => return,
                    Some(Message::Run(command, reply)) => {
                        let result = self.run(*command).await;
                        self.publish().await;
                        let _ = reply.send(result);
                    }
                    Some(Message::Observe(observer, done)) => {
                        self.observer = Some(observer);
                        let _ = done.send(());
                    }
                    Some(Message::Save(done)) => {
                        self.save();
                        self.publish().await;
                        let _ = done.send(());
                    }
                    Some(Message::Hold(done)) => {
                        let exports: Vec<Arc<Export>> =
                            self.world().exports.values().cloned().collect();
                        let owes = exports.iter().any(|e| e.server.owes());
                        // What they answer may need this task: they are waited for elsewhere.
                        tokio::spawn(async move {
                            join_all(exports.iter().map(|e| e.server.hold())).await;
                            let _ = done.send(!owes);
                        });
                    }
                    Some(Message::Shutdown(done)) => {
                        self.shutdown(&mut jobs).await;
                        let _ = done.send(());
                        return;
                    }
                },
                Some(event) = exports.recv() => match event {
                    ExportEvent::ClientsChanged { id } => {
                        self.events.push(Event::ExportChanged(id));
                        self.publish().await;
                    }
                    ExportEvent::Finished { id, done } => {
                        self.finish_export(&id).await;
                        self.save();
                        self.publish().await;
                        let _ = done.send(());
                    }
                    ExportEvent::Activity { node, active: true, done } => {
                        let result = self.change_activity(&node, true, || true).await;
                        self.publish().await;
                        let _ = done.send(result);
                    }
                    // If nobody waits any more: what they do now would be undone.
                    ExportEvent::Activity { node, done, .. } => if !done.is_closed() {
                        self.let_images_go(node, done).await;
                    },
                },
                Some(event) = nodes.recv() => {
                    tracing::info!(
                        node = event.node,
                        threshold = event.threshold,
                        beyond = event.amount,
                        "a write reached beyond the threshold"
                    );
                    self.events.push(Event::ThresholdExceeded(event.node.clone(), event));
                    self.publish().await;
                }
                Some(event) = jobs.recv() => {
                    self.job_event(event).await;
                    self.publish().await;
                }
            }
        }
    }

    async fn publish(&mut self) {
        if self.events.is_empty() {
            return;
        }
        self.save();
        let events = std::mem::take(&mut self.events);
        if let Some(observer) = &self.observer {
            let (tx, rx) = oneshot::channel();
            if observer.send((events, tx)).is_ok() {
                let _ = rx.await;
            }
        }
    }

    async fn run(&mut self, command: Command) -> Result<Reply> {
        refuse_if(&self.held)?;
        self.check_memory(&command)?;
        self.check_active(&command)?;
        match command {
            Command::AddNode(options) => self.add_node(options).await,
            Command::RemoveNode { name } => self.remove_node(&name).await,
            Command::ResizeNode { name, size, shrink } => {
                self.resize_node(&name, size, shrink).await
            }
            Command::FlushNode { name } => self.flush_node(&name).await,
            Command::SetWriteThreshold { node, threshold } => {
                self.set_write_threshold(&node, threshold)
            }
            Command::ReplaceNode { node, with } => self.replace_node(&node, &with).await,
            Command::ReopenNode { node, change } => self.reopen_node(&node, change).await,
            Command::SetActive { node, active } => self.set_active(&node, active).await,
            Command::CheckNode { name, repair } => self.check_node(&name, repair).await,
            Command::AddOverlay { node, overlay } => self.add_overlay(&node, overlay).await,
            Command::InsertFilter { node, filter } => self.insert_filter(&node, filter).await,
            Command::TakeOut { name } => self.take_out(&name).await,
            Command::Snapshot {
                node,
                action,
                snapshot,
            } => self.snapshot(&node, action, snapshot).await,
            Command::Bitmap { node, action } => self.bitmap(&node, action).await,
            Command::Transaction(transaction) => self.transaction(transaction).await,
            Command::StartJob(options) => self.start_job(options).await,
            Command::Job { id, action } => self.job_action(&id, action).await,
            Command::AddExport(options) => self.add_export(options),
            Command::RemoveExport { id } => self.remove_export(&id).await,
            Command::ForgetLost { is_export, name } => self.forget_lost(is_export, &name),
            Command::SetPersistent { export, on } => self.set_persistent(&export, on),
            Command::AddIoThread(options) => self.add_iothread(options),
            Command::UpdateIoThread { name, update } => self.update_iothread(&name, update),
            Command::RemoveIoThread { name } => self.remove_iothread(&name),
        }
    }

    async fn end_jobs(&mut self, jobs: &mut mpsc::UnboundedReceiver<JobEvent>) {
        self.cancel_jobs().await;
        while self.has_jobs()
            && let Some(event) = jobs.recv().await
        {
            self.job_event(event).await;
        }
    }

    /// Cancels jobs, ends exports (their requests are answered first), makes everything durable, closes the images
    /// and stops the I/O threads. Errors are logged; nothing stops the rest.
    ///
    /// With a keeper, front-ends stay connected, and wait for the next daemon.
    async fn shutdown(&mut self, jobs: &mut mpsc::UnboundedReceiver<JobEvent>) {
        for node in self.world().graph.levels().iter().flatten() {
            node.leave();
        }
        if self.world().exports.values().any(|e| e.server.owes()) {
            // What keeps their images open ends first.
            self.end_jobs(jobs).await;
            self.let_go_of_owed().await;
        }
        // The next one finds what there was before.
        self.save();
        self.state.close();
        self.persistent.close();
        self.end_jobs(jobs).await;
        let exports: Vec<Arc<Export>> = self.world().exports.values().cloned().collect();
        let levels = self.world().graph.levels();
        let flush_all = async || {
            let flushes = levels.iter().flatten().map(async |node| {
                if let Err(error) = self.flush(node).await {
                    tracing::error!(node = node.name(), %error, "cannot flush");
                }
            });
            join_all(flushes).await;
        };
        // Guests are served meanwhile, and wait for what is left.
        flush_all().await;
        join_all(exports.iter().map(|e| e.server.suspend())).await;
        flush_all().await;
        for nodes in &levels {
            let closes = nodes.iter().map(async |node| {
                if let Err(error) = self.close(node).await {
                    tracing::error!(node = node.name(), %error, "the last changes cannot be written");
                }
            });
            join_all(closes).await;
        }
        let threads = std::mem::take(&mut self.world().threads);
        let jobs_thread = self.world().jobs_thread.take();
        for thread in threads.into_values().chain(jobs_thread) {
            thread.stop();
        }
        self.events.clear();
    }
}
