//! Jobs: how they begin, what they are told, and what becomes of their nodes when they end.
//!
//! The life cycle is QEMU's: created, running (paused), ready (standby), waiting, pending, aborting, concluded, null. Work runs
//! on an I/O thread beside the control plane; its end is a message like a command, so that whatever it changes in the graph
//! comes in turn with everything else.

mod action;
mod end;
mod image;
mod start;

pub(super) use image::progress_of;

use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, SystemTime};

use tokio::sync::oneshot;
use vdisk_api::{BitmapMode, CopyMode, Error, JobOptions, Map, Result};
use vdisk_block::jobs::{Backup, Discard, JobState, Mirror, Stop, Stream, Work};
use vdisk_block::{Backend, Bitmap, Node, Parent};
use vdisk_io::{Bits, IoThread, IoThreadConfig};

use super::World;

/// What a running job tells the control plane.
#[derive(Debug)]
pub enum JobEvent {
    /// It may have another status.
    Changed { id: String },
    /// Its work has ended.
    Ended {
        id: String,
        result: std::result::Result<(), Stop>,
    },
    /// The work of a job on a whole image has ended.
    ImageEnded { id: String, result: Result<Map> },
}

/// QAPI `JobStatus`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    Created,
    Running,
    Paused,
    Ready,
    Standby,
    /// For the others of its group.
    Waiting,
    Pending,
    Aborting,
    Concluded,
}

impl Status {
    pub fn name(self) -> &'static str {
        match self {
            Status::Created => "created",
            Status::Running => "running",
            Status::Paused => "paused",
            Status::Ready => "ready",
            Status::Standby => "standby",
            Status::Waiting => "waiting",
            Status::Pending => "pending",
            Status::Aborting => "aborting",
            Status::Concluded => "concluded",
        }
    }
}

#[derive(Clone)]
enum Task {
    Mirror(Arc<Mirror>, Option<Increment>),
    Backup(Arc<Backup>, Option<Increment>),
    Convert(Arc<Mirror>),
    Commit(Commit),
    Stream(Streaming),
    Discard(Arc<Discard>),
}

/// The bitmap that a job goes by, and what it had when the job began.
#[derive(Clone)]
struct Increment {
    bitmap: Arc<Bitmap>,
    mode: BitmapMode,
    bits: Arc<Mutex<Option<Arc<Bits>>>>,
}

impl Increment {
    fn bits(&self) -> MutexGuard<'_, Option<Arc<Bits>>> {
        self.bits.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Takes the bits for a job. The node is drained.
    fn begin(&self, job: &str) -> Arc<Bits> {
        let bits = self.bitmap.take();
        self.bitmap.set_user(Some(job.to_owned()));
        *self.bits() = Some(bits.clone());
        bits
    }

    /// The job has ended: what the next one has to copy is in the bitmap again.
    fn end(&self, missing_of: impl FnOnce(&Bits), success: bool) {
        let Some(bits) = self.bits().take() else {
            return;
        };
        match (self.mode, success) {
            (BitmapMode::OnSuccess | BitmapMode::Always, true) => {}
            (BitmapMode::OnSuccess, false) | (BitmapMode::Never, _) => self.bitmap.merge(&bits),
            (BitmapMode::Always, false) => {
                let missing = Bits::new(bits.size(), bits.granularity());
                missing_of(&missing);
                self.bitmap.merge(&missing);
            }
        }
        self.bitmap.set_user(None);
    }
}

/// A commit of images into their base.
#[derive(Clone)]
struct Commit {
    mirror: Arc<Mirror>,
    /// From the node that is committed down to the base.
    chain: Vec<String>,
    /// Exports use the node: the base takes its place.
    active: bool,
    base: Base,
}

/// An image gets what is in its backing files.
#[derive(Clone)]
struct Streaming {
    stream: Arc<Stream>,
    base: Base,
    /// It is written for the job only.
    was_read_only: bool,
}

/// A job, and what says that the other host knows that all is there.
pub(in crate::control) type HandOver = (String, oneshot::Receiver<std::io::Result<()>>);

/// What is to be behind an image.
#[derive(Clone)]
struct Base {
    node: Option<Arc<Node>>,
    /// Name and format for the image's header.
    named: Option<(String, String)>,
}

impl Task {
    fn work(&self) -> Arc<dyn Work> {
        match self {
            Task::Mirror(m, _) | Task::Convert(m) => m.clone(),
            Task::Commit(c) => c.mirror.clone(),
            Task::Backup(b, _) => b.clone(),
            Task::Stream(s) => s.stream.clone(),
            Task::Discard(d) => d.clone(),
        }
    }

    /// A mirror that is to be ended by its user.
    fn mirror(&self) -> Option<&Arc<Mirror>> {
        match self {
            Task::Mirror(m, _) => Some(m),
            Task::Commit(c) if c.active => Some(&c.mirror),
            _ => None,
        }
    }

    /// Guests' writes do not concern it any more.
    fn stop(&self) {
        match self {
            Task::Mirror(m, _) | Task::Convert(m) => m.stop(),
            Task::Commit(c) => c.mirror.stop(),
            Task::Backup(b, _) => b.stop(),
            Task::Discard(d) => d.stop(),
            Task::Stream(_) => {}
        }
    }
}

/// Jobs that take effect together, or not at all.
pub struct Group {
    /// How many have still to do their work.
    left: AtomicUsize,
}

impl Group {
    pub(in crate::control) fn new(jobs: usize) -> Arc<Group> {
        Arc::new(Group {
            left: AtomicUsize::new(jobs),
        })
    }
}

/// A job that has its nodes, and has not begun.
pub(in crate::control) struct PreparedJob {
    job: Arc<Job>,
    parts: Parts,
    roots: Vec<Arc<Backend>>,
    thread: IoThread,
}

impl PreparedJob {
    pub fn id(&self) -> &str {
        self.job.id()
    }

    /// The node that it is about.
    pub fn node(&self) -> &str {
        &self.job.source
    }

    /// What it writes to.
    pub fn target(&self) -> &Arc<Node> {
        &self.parts.target
    }

    /// The bitmap of that node that it takes bits out of.
    pub fn bitmap(&self) -> Option<&str> {
        self.job.options.kind.bitmap().map(|b| b.name.as_str())
    }

    /// A backup has what there is at this moment: the node is drained.
    pub fn take_moment(&self) {
        if let Task::Backup(backup, increment) = &self.parts.task {
            let bits = increment.as_ref().map(|i| i.begin(self.job.id()));
            backup.start(bits.as_deref());
        }
    }
}

/// What a job has until it is over.
#[derive(Clone)]
struct Parts {
    task: Task,
    source: Arc<Node>,
    target: Arc<Node>,
}

struct Life {
    status: Status,
    /// It has been finalized, and catches up before that.
    finalizing: bool,
    /// Guests see its effect.
    effective: bool,
    /// What its work runs with, to run it again.
    running: Option<(Vec<Arc<Backend>>, IoThread)>,
    parts: Option<Parts>,
    error: Option<Error>,
    ended: Option<SystemTime>,
    /// What was found out.
    found: Map,
}

pub struct Job {
    pub options: JobOptions,
    pub state: Arc<JobState>,
    pub started: SystemTime,
    /// Names of its nodes.
    pub source: String,
    pub target: String,
    group: Option<Arc<Group>>,
    life: Mutex<Life>,
}

impl Job {
    fn life(&self) -> MutexGuard<'_, Life> {
        self.life.lock().unwrap_or_else(|e| e.into_inner())
    }

    pub fn id(&self) -> &str {
        &self.options.id
    }

    /// Has what waits for an answer of the server that its target is on fail, unless others use it, too; see [`Node::give_up`].
    pub fn give_up(&self, world: &World, wholly: bool) -> bool {
        let target = self.life().parts.as_ref().map(|p| p.target.clone());
        target.is_some_and(|t| world.graph.is_for_job_only(t.name()) && t.give_up(wholly))
    }

    /// Whether its work is on this thread.
    pub fn runs_on(&self, thread: &IoThread) -> bool {
        let life = self.life();
        life.running
            .as_ref()
            .is_some_and(|(_, t)| t.is_same(thread))
    }

    pub fn status(&self) -> Status {
        let status = self.life().status;
        match (status, self.state.is_ready(), self.state.is_resting()) {
            (Status::Running, false, true) => Status::Paused,
            (Status::Running, true, false) => Status::Ready,
            (Status::Running, true, true) => Status::Standby,
            (status, ..) => status,
        }
    }

    /// Why it failed, or why it has paused by itself.
    pub fn error(&self) -> Option<Error> {
        let failed = self.life().error.clone();
        failed.or_else(|| self.state.trouble().map(Error::failed))
    }

    /// The next daemon is to begin it again, or to say that it cannot.
    pub fn is_to_go_on(&self) -> bool {
        let life = self.life();
        !life.effective && life.ended.is_none()
    }

    /// What it has found out.
    pub fn found(&self) -> Map {
        self.life().found.clone()
    }

    pub fn ended(&self) -> Option<SystemTime> {
        self.life().ended
    }

    fn is_over(&self) -> bool {
        self.life().status == Status::Concluded
    }

    pub fn copy_mode(&self) -> Option<CopyMode> {
        let life = self.life();
        let mirror = life.parts.as_ref()?.task.mirror()?;
        Some(match mirror.is_blocking() {
            true => CopyMode::WriteBlocking,
            false => CopyMode::Background,
        })
    }

    fn parent(&self) -> Parent {
        Parent::Job(self.options.id.clone())
    }
}

impl World {
    pub fn job(&self, id: &str) -> Result<Arc<Job>> {
        self.jobs.get(id).cloned().ok_or_else(|| {
            Error::not_found(format!("there is no job '{id}': see the list of jobs"))
        })
    }

    /// The thread for jobs that name none: guests' requests do not wait behind their copies.
    fn jobs_thread(&mut self) -> Result<IoThread> {
        if let Some(thread) = &self.jobs_thread {
            return Ok(thread.clone());
        }
        let mut config = IoThreadConfig::new("jobs");
        config.engine = self.defaults.engine;
        config.poll_max = Duration::ZERO;
        let thread = IoThread::start(config)
            .map_err(|e| Error::failed(format!("the I/O thread for jobs: {e}")))?;
        self.jobs_thread = Some(thread.clone());
        Ok(thread)
    }
}
