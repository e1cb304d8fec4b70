//! The D-Bus front: a thin adapter on the control plane. Objects live in one file each; they translate
//! arguments to commands, and what there is to properties.

mod access;
mod bitmap;
mod convert;
mod error;
mod export;
mod iothread;
mod job;
mod manager;
mod node;
mod statistics;

use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use tokio::sync::mpsc;
use vdisk_dbus::{ROOT_PATH, bitmap_path, export_path, iothread_path, job_path, node_path};
use vdisk_exports::Server;
use zbus::connection::Builder;
use zbus::{Connection, MessageStream};

use crate::control::{Event, Handle};
pub use access::Trusted;
use access::{Access, Guarded, SocketFolders};
use bitmap::BitmapObject;
use error::Failure;
use export::{ExportObject, NbdObject, VhostUserBlkObject};
use iothread::IoThreadObject;
use job::JobObject;
use manager::ManagerObject;
use node::NodeObject;

/// Which bus to be on.
#[derive(Clone, Debug)]
pub enum Bus {
    System,
    Session,
    Address(String),
}

/// How long to wait before looking for a bus that went away.
const RECONNECT: Duration = Duration::from_secs(1);

/// How long a call that the bus has passed on takes to be counted.
const ON_THE_WAY: Duration = Duration::from_millis(5);

/// How long the calls that have come may take when the daemon is to end. Guests do not wait for them.
const LAST_ANSWER: Duration = Duration::from_secs(2);

fn builder(bus: &Bus) -> zbus::Result<Builder<'static>> {
    Ok(match bus {
        Bus::System => Builder::system(),
        Bus::Session => Builder::session(),
        Bus::Address(address) => {
            let address: zbus::Address = address.parse()?;
            Builder::address(address)
        }
    })
}

/// Who decides on this bus, with a connection of its own to ask.
async fn access(bus: &Bus, control: &Handle, trusted: &Trusted) -> zbus::Result<Arc<Access>> {
    let Bus::System = bus else {
        return Ok(Arc::new(Access::for_everybody()));
    };
    let questions = builder(bus)?.build().await?;
    let sockets = {
        let world = control.world();
        SocketFolders {
            directory: world.defaults.sockets.directory.clone(),
            runtime: world.defaults.runtime.dir.clone(),
        }
    };
    let access = Access::by_polkit(trusted.clone(), sockets, questions);
    Ok(Arc::new(access))
}

/// Connects, takes the name and serves every object there is.
async fn connect(
    bus: &Bus,
    name: &str,
    control: &Handle,
    trusted: &Trusted,
) -> zbus::Result<(Connection, Arc<Access>)> {
    let access = access(bus, control, trusted).await?;
    let connection = builder(bus)?
        .serve_at(ROOT_PATH, Guarded::new(zbus::fdo::ObjectManager, &access))
        .serve_at(
            ROOT_PATH,
            Guarded::new(ManagerObject(control.clone()), &access),
        )
        .build()
        .await?;
    let (observer, mut events) = mpsc::unbounded_channel();
    control.observe(observer).await;
    let everything = {
        let world = control.world();
        let nodes = world.graph.names().map(str::to_owned).map(Event::NodeAdded);
        let exports = world.exports.keys().cloned().map(Event::ExportAdded);
        let threads = world.threads.keys().cloned().map(Event::IoThreadAdded);
        let jobs = world.jobs.keys().cloned().map(Event::JobAdded);
        let bitmaps = world.graph.names().filter_map(|n| world.graph.node(n).ok());
        let bitmaps = bitmaps.flat_map(|n| {
            let all = n.bitmaps().into_iter();
            all.map(move |b| Event::BitmapAdded(n.name().to_owned(), b.name().to_owned()))
        });
        let nodes = nodes.chain(bitmaps);
        let all: Vec<Event> = nodes.chain(exports).chain(threads).chain(jobs).collect();
        all
    };
    for event in everything {
        apply(&connection, control, &access, event).await?;
    }
    let (there, control, asks) = (connection.clone(), control.clone(), access.clone());
    tokio::spawn(async move {
        while let Some((events, done)) = events.recv().await {
            for event in events {
                if let Err(error) = apply(&there, &control, &asks, event.clone()).await {
                    tracing::warn!(?event, %error, "cannot publish on D-Bus");
                }
            }
            let _ = done.send(());
        }
    });
    // Last: whoever sees the name sees the objects.
    connection.request_name(name).await?;
    Ok((connection, access))
}

/// The daemon on the bus.
#[derive(Clone)]
pub struct Front {
    name: String,
    state: Arc<Mutex<FrontState>>,
}

struct FrontState {
    connection: Connection,
    access: Arc<Access>,
    /// When the last message came.
    heard: Instant,
}

impl Front {
    fn state(&self) -> MutexGuard<'_, FrontState> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    pub fn connection(&self) -> Connection {
        self.state().connection.clone()
    }

    /// How long there has been no message.
    pub fn quiet(&self) -> Duration {
        self.state().heard.elapsed()
    }

    /// Has the bus start another daemon for calls from now on.
    pub async fn release_name(&self) {
        let connection = self.connection();
        // A bus that does not answer must not keep it.
        let released = connection.release_name(self.name.as_str());
        let _ = tokio::time::timeout(LAST_ANSWER, released).await;
    }

    /// Answers the calls that have come.
    pub async fn answer(&self) {
        tokio::time::sleep(ON_THE_WAY).await;
        let access = self.state().access.clone();
        let _ = tokio::time::timeout(LAST_ANSWER, access.answered()).await;
    }
}

/// Serves on the bus; comes back to it if it goes away. Returns when the first connection stands.
/// Others than `trusted` need polkit's word on the system bus.
pub async fn start(
    bus: Bus,
    name: String,
    control: Handle,
    trusted: Trusted,
) -> zbus::Result<Front> {
    let (connection, access) = connect(&bus, &name, &control, &trusted).await?;
    let state = FrontState {
        connection,
        access,
        heard: Instant::now(),
    };
    let front = Front {
        name,
        state: Arc::new(Mutex::new(state)),
    };
    let there = front.clone();
    tokio::spawn(async move {
        loop {
            let mut stream = MessageStream::from(there.connection());
            while let Some(Ok(_)) = stream.next().await {
                there.state().heard = Instant::now();
            }
            tracing::error!("the connection to the bus was lost; guests are served on");
            loop {
                tokio::time::sleep(RECONNECT).await;
                match connect(&bus, &there.name, &control, &trusted).await {
                    Ok((connection, access)) => {
                        let mut state = there.state();
                        (state.connection, state.access) = (connection, access);
                        tracing::info!("connected to the bus again");
                        break;
                    }
                    Err(error) => tracing::debug!(%error, "the bus is not back yet"),
                }
            }
        }
    });
    Ok(front)
}

/// Makes the objects on the bus follow an event.
async fn apply(
    connection: &Connection,
    control: &Handle,
    access: &Arc<Access>,
    event: Event,
) -> zbus::Result<()> {
    let server = connection.object_server();
    let control = control.clone();
    match event {
        Event::NodeAdded(name) => {
            let path = node_path(&name);
            server
                .at(path, Guarded::new(NodeObject { control, name }, access))
                .await?;
        }
        Event::NodeRemoved(name) => {
            server
                .remove::<Guarded<NodeObject>, _>(node_path(&name))
                .await?;
        }
        // It may be gone already.
        Event::NodeChanged(name) if control.world().graph.node(&name).is_err() => {}
        Event::NodeChanged(name) => {
            if let Ok(object) = server
                .interface::<_, Guarded<NodeObject>>(node_path(&name))
                .await
            {
                let (node, emitter) = (object.get().await, object.signal_emitter());
                node.size_changed(emitter).await?;
                node.parents_changed(emitter).await?;
                node.read_only_changed(emitter).await?;
                node.children_changed(emitter).await?;
                node.write_threshold_changed(emitter).await?;
                node.discard_mode_changed(emitter).await?;
                node.detect_zeroes_changed(emitter).await?;
                node.active_changed(emitter).await?;
            }
        }
        Event::ThresholdExceeded(name, event) => {
            if let Ok(object) = server
                .interface::<_, Guarded<NodeObject>>(node_path(&name))
                .await
            {
                let (node, emitter) = (object.get().await, object.signal_emitter());
                NodeObject::write_threshold_exceeded(emitter, event.threshold, event.amount)
                    .await?;
                node.write_threshold_changed(emitter).await?;
            }
        }
        Event::ExportAdded(id) => {
            let path = export_path(&id);
            // It may be gone again.
            let Ok(export) = control.world().export(&id) else {
                return Ok(());
            };
            let (own, name) = (control.clone(), id.clone());
            match export.server {
                Server::VhostUserBlk(_) => {
                    let special = VhostUserBlkObject {
                        control: own,
                        id: name,
                    };
                    server
                        .at(path.clone(), Guarded::new(special, access))
                        .await?;
                }
                Server::Nbd(_) => {
                    let special = NbdObject {
                        control: own,
                        id: name,
                    };
                    server
                        .at(path.clone(), Guarded::new(special, access))
                        .await?;
                }
            }
            server
                .at(path, Guarded::new(ExportObject { control, id }, access))
                .await?;
        }
        Event::ExportRemoved(id) => {
            let path = export_path(&id);
            // Of what kind it was is not known any more.
            let _ = server
                .remove::<Guarded<VhostUserBlkObject>, _>(path.clone())
                .await;
            let _ = server.remove::<Guarded<NbdObject>, _>(path.clone()).await;
            server.remove::<Guarded<ExportObject>, _>(path).await?;
        }
        Event::ExportChanged(id) => {
            if let Ok(object) = server
                .interface::<_, Guarded<ExportObject>>(export_path(&id))
                .await
            {
                let (export, emitter) = (object.get().await, object.signal_emitter());
                export.clients_changed(emitter).await?;
                export.node_changed(emitter).await?;
                export.path_changed(emitter).await?;
                export.path_reason_changed(emitter).await?;
                export.persistent_changed(emitter).await?;
            }
        }
        Event::BitmapAdded(node, name) => {
            let object = BitmapObject {
                control,
                node: node.clone(),
                name: name.clone(),
            };
            server
                .at(bitmap_path(&node, &name), Guarded::new(object, access))
                .await?;
        }
        Event::BitmapRemoved(node, name) => {
            let path = bitmap_path(&node, &name);
            server.remove::<Guarded<BitmapObject>, _>(path).await?;
        }
        Event::BitmapChanged(node, name) => {
            let path = bitmap_path(&node, &name);
            if let Ok(object) = server.interface::<_, Guarded<BitmapObject>>(path).await {
                let (bitmap, emitter) = (object.get().await, object.signal_emitter());
                bitmap.recording_changed(emitter).await?;
            }
        }
        Event::JobAdded(id) => {
            // It may be gone again.
            let job = control.world().job(&id);
            if let Ok(job) = job {
                server
                    .at(
                        job_path(&id),
                        Guarded::new(JobObject { control, job }, access),
                    )
                    .await?;
            }
        }
        Event::JobRemoved(id) => {
            server
                .remove::<Guarded<JobObject>, _>(job_path(&id))
                .await?;
        }
        Event::JobChanged(id) => {
            if let Ok(object) = server
                .interface::<_, Guarded<JobObject>>(job_path(&id))
                .await
            {
                let (job, emitter) = (object.get().await, object.signal_emitter());
                job.state_changed(emitter).await?;
                job.speed_changed(emitter).await?;
                job.copy_mode_changed(emitter).await?;
                job.cancelable_changed(emitter).await?;
                job.error_changed(emitter).await?;
            }
        }
        Event::JobCompleted(id) => {
            if let Ok(object) = server
                .interface::<_, Guarded<JobObject>>(job_path(&id))
                .await
            {
                let (success, message) = object.get().await.outcome();
                JobObject::completed(object.signal_emitter(), success, message).await?;
            }
        }
        Event::ProblemsChanged => {
            if let Ok(object) = server
                .interface::<_, Guarded<ManagerObject>>(ROOT_PATH)
                .await
            {
                let (manager, emitter) = (object.get().await, object.signal_emitter());
                manager.problems_changed(emitter).await?;
            }
        }
        Event::IoThreadAdded(name) => {
            let path = iothread_path(&name);
            server
                .at(path, Guarded::new(IoThreadObject { control, name }, access))
                .await?;
        }
        Event::IoThreadRemoved(name) => {
            server
                .remove::<Guarded<IoThreadObject>, _>(iothread_path(&name))
                .await?;
        }
        Event::IoThreadChanged(name) => {
            let path = iothread_path(&name);
            if let Ok(object) = server.interface::<_, Guarded<IoThreadObject>>(path).await {
                let (thread, emitter) = (object.get().await, object.signal_emitter());
                thread.poll_max_changed(emitter).await?;
                thread.queues_changed(emitter).await?;
            }
        }
    }
    Ok(())
}
