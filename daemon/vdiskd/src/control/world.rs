//! What there is.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, SystemTime};

use vdisk_api::{Error, Map, Result};

use vdisk_block::{Backend, Descriptors, Graph, Node, Runtime};
use vdisk_exports::Server;
use vdisk_io::{EngineChoice, EngineKind, IoThread, IoThreadConfig};

use super::jobs::Job;
use super::{Follow, Limits};

/// What new objects get if their options do not say.
#[derive(Clone, Debug)]
pub struct Defaults {
    pub engine: EngineChoice,
    pub poll_max: Duration,
    /// I/O threads to start with.
    pub io_threads: usize,
    pub runtime: Runtime,
    /// A folder that outlives the machine.
    pub state_dir: Option<PathBuf>,
    pub sockets: Sockets,
    pub limits: Limits,
    pub follow: Follow,
}

/// What sockets are like of which the options do not say that.
#[derive(Clone, Debug, Default)]
pub struct Sockets {
    /// Where those are whose path is not absolute.
    pub directory: Option<PathBuf>,
    pub mode: Option<u32>,
    pub group: Option<String>,
    /// Listening sockets that systemd passed, by name (FileDescriptorName= of a socket unit).
    pub passed: BTreeMap<String, Arc<OwnedFd>>,
}

/// An export, with what the control plane knows of it.
pub struct Export {
    pub backend: Arc<Backend>,
    pub writable: bool,
    pub kind: &'static str,
    pub server: Server,
    /// The options as they were given.
    pub given: Map,
    pub persistent: AtomicBool,
}

impl Export {
    /// The name of the node that is offered at the moment.
    pub fn node(&self) -> String {
        self.backend.node().name().to_owned()
    }

    /// The name of the socket that systemd passed for it.
    pub fn socket_name(&self) -> Option<&str> {
        self.given.get("addr")?.get("str")?.as_str()
    }

    /// Why its requests take the slow path, if they do.
    pub fn slow_reason(&self) -> Option<String> {
        self.server.slow_reason(&self.backend, self.writable)
    }

    /// It outlives the machine.
    pub fn is_persistent(&self) -> bool {
        self.persistent.load(Relaxed)
    }

    pub fn set_persistent(&self, on: bool) {
        self.persistent.store(on, Relaxed);
    }
}

pub struct World {
    pub graph: Graph,
    pub exports: BTreeMap<String, Arc<Export>>,
    pub threads: BTreeMap<String, IoThread>,
    pub jobs: BTreeMap<String, Arc<Job>>,
    /// Where jobs run if they name no thread; there is none before the first job.
    pub jobs_thread: Option<IoThread>,
    pub defaults: Defaults,
    /// What the first I/O thread came up on.
    pub engine: EngineKind,
    /// What of an earlier daemon's state could not be restored, and why.
    pub problems: Vec<String>,
    /// Why the state cannot be written.
    pub state_trouble: Vec<String>,
    /// Objects that the next daemon will try to restore.
    pub lost: usize,
    pub started: SystemTime,
}

/// The lock is only held for short looks and changes that cannot fail half-way.
pub fn locked(world: &Mutex<World>) -> MutexGuard<'_, World> {
    world.lock().unwrap_or_else(|e| e.into_inner())
}

/// Whether writes to images are noted in the runtime folder that are not in the images yet.
fn has_unfinished(dir: Option<&Path>) -> bool {
    let files = dir.and_then(|d| std::fs::read_dir(d).ok());
    let mut files = files.into_iter().flatten().flatten();
    files.any(|f| f.path().extension().is_some_and(|e| e == "redo"))
}

impl World {
    pub fn new(defaults: Defaults) -> Result<World> {
        let mut threads = BTreeMap::new();
        for i in 0..defaults.io_threads.max(1) {
            let name = format!("io{i}");
            let mut config = IoThreadConfig::new(name.clone());
            config.engine = defaults.engine;
            config.poll_max = defaults.poll_max;
            let thread = IoThread::start(config)
                .map_err(|e| Error::failed(format!("I/O thread '{name}': {e}")))?;
            threads.insert(name, thread);
        }
        let engine = threads
            .values()
            .next()
            .map_or(EngineKind::Threads, IoThread::engine);
        Ok(World {
            graph: Graph::new(defaults.runtime.clone()),
            exports: BTreeMap::new(),
            threads,
            jobs: BTreeMap::new(),
            jobs_thread: None,
            defaults,
            engine,
            problems: Vec::new(),
            state_trouble: Vec::new(),
            lost: 0,
            started: SystemTime::now(),
        })
    }

    /// Refuses to put nodes below a persistent export which could not be opened when the machine starts again.
    pub fn check_lasting(&self, name: &str, new: &[Arc<Node>]) -> Result<()> {
        let passed = |n: &&Arc<Node>| n.filename().is_some_and(|f| Descriptors::is_one(&f));
        let Some(node) = new.iter().find(passed) else {
            return Ok(());
        };
        let (_, above) = self.graph.above(name);
        let mut exports = self.exports.iter();
        let lasting =
            exports.find(|(_, e)| e.is_persistent() && above.iter().any(|n| n.name() == e.node()));
        match lasting {
            None => Ok(()),
            Some((id, _)) => Err(Error::not_supported(format!(
                "export '{id}' is persistent, and node '{}' has a file that a caller passed open, which ends with the daemon: open it by its name",
                node.name()
            ))),
        }
    }

    /// Nothing was configured, or all of it was removed.
    pub fn is_empty(&self) -> bool {
        let runtime = &self.defaults.runtime;
        let usual = self.defaults.io_threads.max(1);
        let is_usual = |name: &str| (0..usual).any(|i| name == format!("io{i}"));
        self.graph.names().next().is_none()
            && self.exports.is_empty()
            && self.jobs.is_empty()
            && self.lost == 0
            && self.threads.keys().all(|name| is_usual(name))
            && !has_unfinished(runtime.dir.as_deref())
            && runtime.secrets.ids().is_empty()
            && runtime.throttle_groups.list().is_empty()
    }

    /// What was lost is given up: it is no problem any more.
    pub fn forget_problems_of(&mut self, name: &str) {
        let quoted = format!("'{name}'");
        self.problems.retain(|p| !p.contains(&quoted));
    }

    /// All that is amiss.
    pub fn all_problems(&self) -> Vec<String> {
        let now = self.state_trouble.iter();
        self.problems.iter().chain(now).cloned().collect()
    }

    pub fn export(&self, id: &str) -> Result<Arc<Export>> {
        self.exports.get(id).cloned().ok_or_else(|| {
            Error::not_found(format!(
                "there is no export '{id}': see the list of exports"
            ))
        })
    }

    pub fn thread(&self, name: &str) -> Result<IoThread> {
        self.threads.get(name).cloned().ok_or_else(|| {
            Error::not_found(format!(
                "there is no I/O thread '{name}': see the list of I/O threads, or add it first"
            ))
        })
    }

    /// Queues on a thread: export and number.
    pub fn queues_on(&self, thread: &IoThread) -> Vec<(String, u16)> {
        let mut out = Vec::new();
        for (id, export) in &self.exports {
            for (i, t) in export.server.threads().iter().enumerate() {
                if t.is_same(thread) {
                    out.push((id.clone(), i as u16));
                }
            }
        }
        out
    }

    /// A thread for work of the control plane itself.
    pub fn any_thread(&self) -> Result<IoThread> {
        self.threads
            .values()
            .next()
            .cloned()
            .ok_or_else(|| Error::failed("there is no I/O thread"))
    }
}
