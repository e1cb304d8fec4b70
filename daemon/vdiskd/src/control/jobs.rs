//! Jobs: how they begin, what they are told, and what becomes of their nodes when they end.
//!
//! The life cycle is QEMU's: created, running (paused), ready (standby), waiting, pending, aborting, concluded, null. Work runs
//! on an I/O thread beside the control plane; its end is a message like a command, so that whatever it changes in the graph
//! comes in turn with everything else.

use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, SystemTime};

use vdisk_api::{
    BitmapMode, CopyErrorPolicy, CopyMode, Error, ErrorPolicy, JobAction, JobKind, JobOptions,
    JobSync, Reply, Result,
};
use vdisk_block::jobs::{
    self, Backup, BackupSync, Ending, JobState, Mirror, MirrorSync, OnCopyError, OnError, Side,
    Stop, Stream, Work,
};
use vdisk_block::{Backend, Bitmap, Node, Parent, Permissions, Use, image_failed};
use vdisk_io::{Bits, IoThread, IoThreadConfig};

use super::{Control, Event, World, bitmaps};

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
    Mirror(Arc<Mirror>),
    Backup(Arc<Backup>, Option<Increment>),
    Convert(Arc<Mirror>),
    Commit(Commit),
    Stream(Arc<Stream>, Base),
}

/// Nodes that no other job may use meanwhile.
fn claims(world: &World, task: &Task) -> Vec<String> {
    match task {
        Task::Mirror(_) | Task::Backup(..) | Task::Convert(_) => Vec::new(),
        Task::Commit(c) => c.chain.clone(),
        Task::Stream(stream, _) => {
            let mut claimed = vec![stream.node().name().to_owned()];
            let mut below = Some(stream.backing().clone());
            while let Some(node) = below {
                claimed.push(node.name().to_owned());
                below = world.graph.backing(node.name()).ok().flatten();
            }
            claimed
        }
    }
}

/// The bitmap that a backup goes by, and what it had when the backup began.
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
    fn end(&self, backup: &Backup, success: bool) {
        let Some(bits) = self.bits().take() else {
            return;
        };
        match (self.mode, success) {
            (BitmapMode::OnSuccess | BitmapMode::Always, true) => {}
            (BitmapMode::OnSuccess, false) | (BitmapMode::Never, _) => self.bitmap.merge(&bits),
            (BitmapMode::Always, false) => {
                let missing = Bits::new(bits.size(), bits.granularity());
                backup.missing(&missing);
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
            Task::Mirror(m) | Task::Convert(m) => m.clone(),
            Task::Commit(c) => c.mirror.clone(),
            Task::Backup(b, _) => b.clone(),
            Task::Stream(s, _) => s.clone(),
        }
    }

    /// A mirror that is to be ended by its user.
    fn mirror(&self) -> Option<&Arc<Mirror>> {
        match self {
            Task::Mirror(m) => Some(m),
            Task::Commit(c) if c.active => Some(&c.mirror),
            _ => None,
        }
    }

    /// Guests' writes do not concern it any more.
    fn stop(&self) {
        match self {
            Task::Mirror(m) | Task::Convert(m) => m.stop(),
            Task::Commit(c) => c.mirror.stop(),
            Task::Backup(b, _) => b.stop(),
            Task::Stream(..) => {}
        }
    }
}

/// Jobs that take effect together, or not at all.
pub struct Group {
    /// How many have still to do their work.
    left: AtomicUsize,
}

impl Group {
    pub(super) fn new(jobs: usize) -> Arc<Group> {
        Arc::new(Group {
            left: AtomicUsize::new(jobs),
        })
    }
}

/// A job that has its nodes, and has not begun.
pub(super) struct PreparedJob {
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
    /// What its work runs with, to run it again.
    running: Option<(Vec<Arc<Backend>>, IoThread)>,
    parts: Option<Parts>,
    error: Option<Error>,
    ended: Option<SystemTime>,
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

fn policy(p: ErrorPolicy) -> OnError {
    match p {
        ErrorPolicy::Report => OnError::Report,
        ErrorPolicy::Ignore => OnError::Ignore,
        ErrorPolicy::Enospc => OnError::Enospc,
        ErrorPolicy::Stop => OnError::Stop,
    }
}

/// The task of a job that copies one node to another.
fn copy_task(o: &JobOptions, source: &Arc<Node>, target: &Arc<Node>) -> Result<Task> {
    let (source, target) = (source.clone(), target.clone());
    Ok(match &o.kind {
        &JobKind::Mirror {
            sync,
            copy_mode,
            granularity,
        } => {
            let sync = match sync {
                JobSync::Full => MirrorSync::Full,
                JobSync::Top => MirrorSync::Top,
                JobSync::None | JobSync::Bitmap => MirrorSync::None,
            };
            let cluster = target.limits().zero_alignment.max(65536);
            // Two pieces must not share a block of the storage.
            let block = target
                .limits()
                .request_alignment
                .max(target.storage_block_size());
            let granularity = granularity.unwrap_or(cluster).max(block);
            let blocking = copy_mode == CopyMode::WriteBlocking;
            Task::Mirror(Mirror::new(source, target, sync, granularity, blocking))
        }
        &JobKind::Backup {
            sync,
            ref bitmap,
            compress,
            on_copy_error,
        } => {
            let increment = match bitmap {
                None => None,
                Some(b) => Some(Increment {
                    bitmap: bitmaps::free(&source, &b.name)?,
                    mode: b.mode,
                    bits: Arc::default(),
                }),
            };
            let sync = match sync {
                JobSync::Full => BackupSync::Full,
                JobSync::Top => BackupSync::Top,
                JobSync::None => BackupSync::None,
                JobSync::Bitmap => BackupSync::Bits,
            };
            let on_error = match on_copy_error {
                CopyErrorPolicy::BreakSnapshot => OnCopyError::BreakSnapshot,
                CopyErrorPolicy::BreakGuestWrite => OnCopyError::BreakGuestWrite,
            };
            let backup = Backup::new(source, target, sync, compress, on_error);
            Task::Backup(backup, increment)
        }
        &JobKind::Convert { compress } => {
            Task::Convert(Mirror::once(source, target, MirrorSync::Full, compress))
        }
        JobKind::Commit { .. } | JobKind::Stream { .. } => {
            return Err(Error::failed("it copies nothing"));
        }
    })
}

/// What a job does with its source, and with its target.
fn uses(kind: &JobKind) -> [Use; 2] {
    let read = Permissions::CONSISTENT_READ;
    let all = Permissions::ALL.without(Permissions::RESIZE);
    let source = Use {
        taken: read,
        shared: match kind {
            // What is copied must not change on the way.
            JobKind::Convert { .. } => all.without(Permissions::WRITE),
            _ => all,
        },
    };
    let target = match kind {
        // What users of the images above see stays as it is.
        JobKind::Commit { .. } | JobKind::Stream { .. } => Use {
            taken: read.and(Permissions::WRITE_UNCHANGED),
            shared: all,
        },
        _ => Use {
            taken: Permissions::WRITE,
            shared: Permissions::WRITE_UNCHANGED,
        },
    };
    [source, target]
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

impl Control {
    pub(super) async fn start_job(&mut self, options: JobOptions) -> Result<Reply> {
        let prepared = self.prepare_job(options, None)?;
        if let Err(e) = self.begin(&prepared).await {
            self.forget(prepared);
            return Err(e);
        }
        self.launch(prepared);
        Ok(Reply::Done)
    }

    /// A job that was prepared does not begin.
    pub(super) fn forget(&self, prepared: PreparedJob) {
        self.let_go(&prepared.job);
    }

    /// Checks a job and takes its nodes.
    pub(super) fn prepare_job(
        &self,
        options: JobOptions,
        group: Option<Arc<Group>>,
    ) -> Result<PreparedJob> {
        let id = options.id.clone();
        let what = format!("job '{id}'");
        let (source, thread) = {
            let mut world = self.world();
            if world.jobs.contains_key(&id) {
                return Err(Error::exists(format!(
                    "there is a job '{id}' already: choose another job-id, or dismiss it first"
                )));
            }
            let source = world.graph.node(&options.node)?;
            let thread = match &options.iothread {
                Some(name) => world.thread(name).map_err(|e| e.context(&what))?,
                None => world.jobs_thread()?,
            };
            (source, thread)
        };
        let parts = match &options.kind {
            JobKind::Commit { base, backing_file } => {
                self.commit_parts(&what, &source, base.as_deref(), backing_file.clone())?
            }
            JobKind::Stream { base, backing_file } => {
                self.stream_parts(&what, &source, base.as_deref(), backing_file.clone())?
            }
            _ => {
                let name = options.target.as_deref().unwrap_or_default();
                let target = self.world().graph.node(name);
                let target = target.map_err(|e| e.context(&what))?;
                self.check_copy(&what, &options, &source, &target)?;
                let task = copy_task(&options, &source, &target).map_err(|e| e.context(&what))?;
                Parts {
                    task,
                    source,
                    target,
                }
            }
        };
        let changed = {
            let (events, id) = (self.job_events.clone(), id.clone());
            move || {
                let _ = events.send(JobEvent::Changed { id: id.clone() });
            }
        };
        let policies = [options.on_source_error, options.on_target_error].map(policy);
        let job = Arc::new(Job {
            state: Arc::new(JobState::new(options.speed, policies, Box::new(changed))),
            started: SystemTime::now(),
            source: parts.source.name().to_owned(),
            target: parts.target.name().to_owned(),
            group,
            life: Mutex::new(Life {
                status: Status::Created,
                finalizing: false,
                running: None,
                parts: Some(parts.clone()),
                error: None,
                ended: None,
            }),
            options,
        });
        self.check_claims(&what, &parts)?;
        let roots = self.take_nodes(&job, &parts)?;
        Ok(PreparedJob {
            job,
            parts,
            roots,
            thread,
        })
    }

    /// Has a job that has begun do its work.
    pub(super) fn launch(&mut self, prepared: PreparedJob) {
        let PreparedJob {
            job,
            parts,
            roots,
            thread,
        } = prepared;
        let id = job.id().to_owned();
        job.life().running = Some((roots, thread));
        self.work(&job, &parts.task);
        tracing::info!(
            job = id,
            operation = job.options.kind.name(),
            node = job.source,
            target = job.target,
            "job started"
        );
        self.world().jobs.insert(id.clone(), job.clone());
        self.events.push(Event::JobAdded(id));
        self.nodes_changed(&job);
    }

    fn work(&self, job: &Arc<Job>, task: &Task) {
        let mut life = job.life();
        let Some((roots, thread)) = life.running.clone() else {
            return;
        };
        life.status = Status::Running;
        drop(life);
        let (work, state) = (task.work(), job.state.clone());
        let (events, id) = (self.job_events.clone(), job.id().to_owned());
        tokio::spawn(async move {
            let result = jobs::run(work, state, roots, thread).await;
            let _ = events.send(JobEvent::Ended { id, result });
        });
    }

    fn work_again(&self, job: &Arc<Job>) {
        let task = {
            let mut life = job.life();
            life.finalizing = true;
            life.parts.as_ref().map(|p| p.task.clone())
        };
        if let Some(task) = task {
            self.work(job, &task);
        }
    }

    /// Refuses a job on nodes that another changes, and one that changes what another uses.
    fn check_claims(&self, what: &str, parts: &Parts) -> Result<()> {
        let world = self.world();
        let mine = claims(&world, &parts.task);
        let uses = [parts.source.name(), parts.target.name()];
        let in_use = |node: &str, other: &Job| {
            Err(Error::in_use(format!(
                "{what}: node '{node}' is used by job '{}': wait for its end, or cancel it",
                other.id()
            )))
        };
        for other in world.jobs.values() {
            let theirs = match &other.life().parts {
                Some(parts) => claims(&world, &parts.task),
                None => continue,
            };
            let users = [&*other.source, &*other.target];
            let mine = mine.iter().map(String::as_str);
            let mut clash = mine.filter(|n| users.contains(n) || theirs.iter().any(|t| t == n));
            if let Some(node) = clash.next() {
                return in_use(node, other);
            }
            if let Some(node) = uses.iter().find(|n| theirs.iter().any(|t| t == **n)) {
                return in_use(node, other);
            }
        }
        Ok(())
    }

    /// What a job needs before it runs.
    async fn begin(&self, prepared: &PreparedJob) -> Result<()> {
        let PreparedJob { job, parts, .. } = prepared;
        match &parts.task {
            Task::Mirror(m) => {
                self.announce(parts);
                m.start();
            }
            Task::Convert(_) | Task::Stream(..) => {}
            Task::Backup(..) => {
                let (start, drained) = self.hold(&job.source).await;
                prepared.take_moment();
                drop(drained);
                let paused_us = start.elapsed().as_micros() as u64;
                tracing::debug!(job = job.id(), paused_us, "point in time taken");
            }
            Task::Commit(c) => {
                self.open_base(&parts.source, &parts.target).await?;
                if c.active {
                    self.announce(parts);
                    c.mirror.start();
                }
            }
        }
        Ok(())
    }

    /// Tells the target of a mirror what blocks the source's guests write: while writes are blocking it gets them, too.
    fn announce(&self, parts: &Parts) {
        let world = self.world();
        let (_, above) = world.graph.above(parts.source.name());
        let exports = world.exports.values();
        let exports = exports.filter(|e| above.iter().any(|n| n.name() == e.node()));
        let blocks = exports.map(|e| e.server.device().options.logical_block_size);
        if let Some(block) = blocks.min() {
            parts.target.announce_block_size(block.into());
        }
    }

    /// Has the base of a commit written, with at least the size of what is committed.
    async fn open_base(&self, top: &Arc<Node>, base: &Arc<Node>) -> Result<()> {
        let (_, _drained) = self.hold(base.name()).await;
        self.make_writable(base).await?;
        let size = top.size();
        if base.size() >= size {
            return Ok(());
        }
        let thread = self.world().any_thread()?;
        let there = base.clone();
        let resized = thread
            .run_async(move |_| async move { there.resize(size).await })
            .await
            .map_err(|e| Error::failed(e.to_string()))
            .and_then(|r| {
                let what = format_args!("node '{}' cannot be resized to {size} bytes", base.name());
                r.map_err(|e| Error::io(what, &e))
            });
        if let Err(e) = resized {
            self.make_read_only(base).await;
            return Err(e);
        }
        Ok(())
    }

    /// What a commit of a node into one below it is.
    fn commit_parts(
        &self,
        what: &str,
        top: &Arc<Node>,
        base: Option<&str>,
        backing_file: Option<String>,
    ) -> Result<Parts> {
        let world = self.world();
        let base = match base {
            Some(base) => Some(world.graph.node(base)?),
            None => world.graph.backing(top.name())?,
        };
        let base = base.ok_or_else(|| {
            Error::invalid(format!(
                "{what}: node '{}' has no backing file that its data could go to",
                top.name()
            ))
        })?;
        if Arc::ptr_eq(&base, top) {
            return Err(Error::invalid(format!(
                "{what}: option 'base-node' is the node itself: give one of its backing files"
            )));
        }
        let chain = world.graph.chain(top.name(), base.name());
        let chain = chain.map_err(|e| e.context(what))?;
        let sole = world.graph.check_sole(base.name());
        sole.map_err(|e| e.context(what))?;
        if base.size() > top.size() {
            return Err(Error::invalid(format!(
                "{what}: base '{}' has {} bytes, more than node '{}' with {}, whose users would see the rest: resize one of them",
                base.name(),
                base.size(),
                top.name(),
                top.size()
            )));
        }
        let active = world.graph.is_active(top.name());
        let overlays = world.graph.overlays(top.name());
        if let (true, Some(overlay)) = (active, overlays.first()) {
            return Err(Error::in_use(format!(
                "{what}: node '{}' is used by others and is the backing file of node '{}': remove one of them first",
                top.name(),
                overlay.name()
            )));
        }
        if active {
            world.graph.check_moves(top.name())?;
        }
        let shown = world.graph.unfiltered(base.name())?;
        let named = name_of(what, &shown, backing_file, !overlays.is_empty())?;
        let above = MirrorSync::Above(base.clone());
        let mirror = match active {
            true => {
                let granularity = base.limits().zero_alignment.max(65536);
                Mirror::new(top.clone(), base.clone(), above, granularity, false)
            }
            false => Mirror::once(top.clone(), base.clone(), above, false),
        };
        Ok(Parts {
            task: Task::Commit(Commit {
                mirror,
                chain,
                active,
                base: Base {
                    node: Some(base.clone()),
                    named,
                },
            }),
            source: top.clone(),
            target: base,
        })
    }

    /// What streaming into a node is.
    fn stream_parts(
        &self,
        what: &str,
        node: &Arc<Node>,
        base: Option<&str>,
        backing_file: Option<String>,
    ) -> Result<Parts> {
        let world = self.world();
        if node.is_read_only() {
            return Err(Error::invalid(format!(
                "{what}: node '{}' is read-only: stream into the one that is written, or add this without read-only",
                node.name()
            )));
        }
        let backing = world.graph.backing(node.name())?.ok_or_else(|| {
            Error::invalid(format!(
                "{what}: node '{}' has no backing file: there is nothing to stream",
                node.name()
            ))
        })?;
        let base = base.map(|b| world.graph.node(b)).transpose()?;
        if let Some(base) = &base {
            let mut below = Some(backing.clone());
            while let Some(n) = &below
                && !Arc::ptr_eq(n, base)
            {
                below = world.graph.backing(n.name())?;
            }
            if below.is_none() || Arc::ptr_eq(base, &backing) {
                return Err(Error::invalid(format!(
                    "{what}: node '{}' is not below the backing file of node '{}': give one further down, or none",
                    base.name(),
                    node.name()
                )));
            }
        }
        let named = match &base {
            None => None,
            Some(base) => {
                let shown = world.graph.unfiltered(base.name())?;
                name_of(what, &shown, backing_file, true)?
            }
        };
        let stream = Stream::new(node.clone(), backing, base.clone());
        Ok(Parts {
            task: Task::Stream(stream, Base { node: base, named }),
            source: node.clone(),
            target: node.clone(),
        })
    }

    fn check_copy(
        &self,
        what: &str,
        options: &JobOptions,
        source: &Arc<Node>,
        target: &Arc<Node>,
    ) -> Result<()> {
        if source.size() != target.size() {
            return Err(Error::invalid(format!(
                "{what}: node '{}' has {} bytes, and target '{}' has {}: give them the same size",
                source.name(),
                source.size(),
                target.name(),
                target.size()
            )));
        }
        let world = self.world();
        let (_, above_source) = world.graph.above(source.name());
        let (_, above_target) = world.graph.above(target.name());
        let has = |nodes: &[Arc<Node>], n: &Arc<Node>| nodes.iter().any(|m| Arc::ptr_eq(m, n));
        if has(&above_source, target) || has(&above_target, source) {
            return Err(Error::invalid(format!(
                "{what}: nodes '{}' and '{}' stand on each other: give a target with storage of its own",
                source.name(),
                target.name()
            )));
        }
        let compress = matches!(
            options.kind,
            JobKind::Backup { compress: true, .. } | JobKind::Convert { compress: true }
        );
        if compress && target.image().is_none() {
            return Err(Error::not_supported(format!(
                "{what}: target '{}' has driver '{}', which has no compressed clusters: give a qcow2 image, or leave out 'compress'",
                target.name(),
                target.driver_name()
            )));
        }
        Ok(())
    }

    /// Takes the job's nodes for it, or none.
    fn take_nodes(&self, job: &Job, parts: &Parts) -> Result<Vec<Arc<Backend>>> {
        let mut world = self.world();
        let [source, target] = uses(&job.options.kind);
        let mut wanted = vec![(&parts.target, target)];
        if job.source != job.target {
            wanted.push((&parts.source, source));
        }
        let mut roots = Vec::new();
        for (node, wants) in wanted {
            let root = Backend::new_fixed(format!("job '{}'", job.id()), node.clone());
            let taken = world
                .graph
                .attach(node.name(), job.parent(), wants, root.clone());
            if let Err(e) = taken {
                drop(world);
                self.let_go(job);
                return Err(e);
            }
            roots.push(root);
        }
        if let Task::Commit(c) = &parts.task {
            // The top one stays what it is.
            world.graph.claim(&c.chain[1..], job.id());
        }
        Ok(roots)
    }

    /// Its nodes are not the job's any more.
    fn let_go(&self, job: &Job) {
        let mut world = self.world();
        for node in [&job.source, &job.target] {
            world.graph.detach(node, &job.parent());
        }
        world.graph.end_claims(job.id());
    }

    /// What users of the job's nodes may see has changed.
    fn nodes_changed(&mut self, job: &Job) {
        let mut events = Vec::new();
        {
            let world = self.world();
            for node in [&job.source, &job.target] {
                let (_, above) = world.graph.above(node);
                let has = |name: &str| above.iter().any(|n| n.name() == name);
                events.extend(
                    above
                        .iter()
                        .map(|n| Event::NodeChanged(n.name().to_owned())),
                );
                let exports = world.exports.iter().filter(|(_, e)| has(&e.node()));
                events.extend(exports.map(|(id, _)| Event::ExportChanged(id.clone())));
            }
        }
        events.push(Event::JobChanged(job.options.id.clone()));
        self.events.extend(events);
    }

    pub(super) async fn job_event(&mut self, event: JobEvent) {
        match event {
            JobEvent::Changed { id } => {
                let job = self.world().job(&id);
                if let Ok(job) = job {
                    if let (Some(trouble), true) = (job.state.trouble(), job.state.is_resting()) {
                        tracing::warn!(
                            job = id,
                            trouble,
                            "job paused: resume it when that is mended"
                        );
                    }
                    self.events.push(Event::JobChanged(id));
                }
            }
            JobEvent::Ended { id, result } => {
                let Ok(job) = self.world().job(&id) else {
                    return;
                };
                match result {
                    // It was asked for too late for its work, and not for its effect.
                    Ok(()) if job.state.is_cancelled() => self.abort(&job, Stop::Cancelled).await,
                    Ok(()) => self.work_done(&job).await,
                    Err(stop) => self.abort(&job, stop).await,
                }
            }
        }
    }

    /// A job has done its work: it takes effect, or waits for that.
    async fn work_done(&mut self, job: &Arc<Job>) {
        let Some(group) = &job.group else {
            return self.pend(job).await;
        };
        job.life().status = Status::Waiting;
        self.events.push(Event::JobChanged(job.id().to_owned()));
        if group.left.fetch_sub(1, SeqCst) == 1 {
            for member in self.members(group) {
                self.pend(&member).await;
            }
        }
    }

    fn members(&self, group: &Arc<Group>) -> Vec<Arc<Job>> {
        let world = self.world();
        let jobs = world.jobs.values();
        let is_member = |j: &&Arc<Job>| j.group.as_ref().is_some_and(|g| Arc::ptr_eq(g, group));
        jobs.filter(is_member).cloned().collect()
    }

    async fn pend(&mut self, job: &Arc<Job>) {
        if job.options.auto_finalize || job.life().finalizing {
            return self.finalize(job).await;
        }
        job.life().status = Status::Pending;
        self.events.push(Event::JobChanged(job.id().to_owned()));
    }

    /// Lets a job that has done its work take effect.
    async fn finalize(&mut self, job: &Arc<Job>) {
        let Some(parts) = job.life().parts.clone() else {
            return;
        };
        let result = match (&parts.task, job.state.ending()) {
            (Task::Mirror(m), Some(Ending::Pivot)) => self.pivot(job, &parts, m).await,
            (Task::Mirror(m), _) => self.last_part(job, m).await,
            (Task::Commit(c), Some(Ending::Pivot)) if c.active => {
                self.pivot(job, &parts, &c.mirror).await
            }
            (Task::Commit(c), _) if c.active => self.last_part(job, &c.mirror).await,
            (Task::Commit(c), _) => self.stand_on_base(job, c).await,
            (Task::Stream(_, base), _) => self.end_stream(job, &parts.source, base).await,
            (Task::Backup(backup, _), _) => backup.check(),
            (Task::Convert(_), _) => Ok(()),
        };
        match result {
            Ok(()) => {
                self.end(job, true).await;
                self.after(job, parts).await;
                self.conclude(job, None);
            }
            Err(stop) => {
                drop(parts);
                self.abort(job, stop).await;
            }
        }
    }

    /// Has a mirror copy the rest while nobody writes.
    async fn last_part(&self, job: &Job, mirror: &Arc<Mirror>) -> std::result::Result<(), Stop> {
        let (start, _drained) = self.hold(&job.source).await;
        finish(self.thread_for_end()?, mirror.clone()).await?;
        mirror.stop();
        let paused_us = start.elapsed().as_micros() as u64;
        tracing::info!(job = job.id(), paused_us, "target is complete");
        Ok(())
    }

    fn thread_for_end(&self) -> std::result::Result<IoThread, Stop> {
        self.world().any_thread().map_err(|e| Stop::Failed {
            side: Side::Source,
            error: std::io::Error::other(e.message),
        })
    }

    /// Copies the rest while nobody writes, and gives the source's users to the target.
    async fn pivot(
        &mut self,
        job: &Job,
        parts: &Parts,
        mirror: &Arc<Mirror>,
    ) -> std::result::Result<(), Stop> {
        let (from, to) = (parts.source.name(), parts.target.name());
        let refused = |e: Error| Stop::Failed {
            side: Side::Target,
            error: std::io::Error::other(e.message),
        };
        let thread = self.thread_for_end()?;
        {
            let world = self.world();
            check_pivot(&world, job, &parts.task).map_err(refused)?;
        }
        // There may be exports that were not there when it began.
        self.announce(parts);
        let (start, drained) = self.hold(from).await;
        finish(thread, mirror.clone()).await?;
        mirror.stop();
        let above = {
            let mut world = self.world();
            let (_, above) = world.graph.above(from);
            world.graph.detach(from, &job.parent());
            world.graph.detach(to, &job.parent());
            world.graph.replace(from, to);
            above
        };
        for guard in &drained {
            guard.set_node_if(&parts.source, &parts.target);
        }
        drop(drained);
        let paused_us = start.elapsed().as_micros() as u64;
        tracing::info!(
            job = job.id(),
            node = from,
            target = to,
            paused_us,
            "pivoted"
        );
        let above = above
            .iter()
            .map(|n| Event::NodeChanged(n.name().to_owned()));
        self.events.extend(above);
        Ok(())
    }

    /// Makes writes of a node possible that was opened for reading. The caller has drained everything above.
    async fn make_writable(&self, node: &Arc<Node>) -> Result<()> {
        let there = node.clone();
        tokio::task::spawn_blocking(move || there.make_writable())
            .await
            .map_err(|e| Error::failed(format!("opening was interrupted: {e}")))??;
        let thread = self.world().any_thread()?;
        let there = node.clone();
        let activated = thread
            .run_async(move |_| async move { there.activate().await })
            .await
            .map_err(std::io::Error::other)
            .flatten();
        if let Err(e) = activated {
            self.make_read_only(node).await;
            let what = format_args!("node '{}' cannot be made ready for writing", node.name());
            return Err(Error::io(what, &e));
        }
        Ok(())
    }

    /// The reverse; what went wrong is logged.
    async fn make_read_only(&self, node: &Arc<Node>) {
        if let Err(error) = self.settle(node).await {
            tracing::error!(node = node.name(), %error, "the last changes cannot be written");
        }
        let there = node.clone();
        let _ = tokio::task::spawn_blocking(move || there.make_read_only()).await;
    }

    /// Has the overlays of what was committed stand on the base.
    async fn stand_on_base(&mut self, job: &Job, c: &Commit) -> std::result::Result<(), Stop> {
        let failed = |e: Error| Stop::Failed {
            side: Side::Target,
            error: std::io::Error::other(e.message),
        };
        let overlays = self.world().graph.overlays(&job.source);
        let (start, drained) = self.hold(&job.source).await;
        for overlay in &overlays {
            let was_read_only = overlay.is_read_only();
            if was_read_only {
                self.make_writable(overlay).await.map_err(failed)?;
            }
            let set = self.set_backing(overlay, &c.base).await;
            if was_read_only {
                self.make_read_only(overlay).await;
            }
            set.map_err(failed)?;
            let base = c.base.node.as_ref().map(|b| b.name());
            self.world().graph.set_backing(overlay.name(), base);
            self.events
                .push(Event::NodeChanged(overlay.name().to_owned()));
        }
        drop(drained);
        let paused_us = start.elapsed().as_micros() as u64;
        tracing::info!(job = job.id(), paused_us, "overlays stand on the base");
        Ok(())
    }

    /// An image stands on what is left of its backing files.
    async fn end_stream(
        &mut self,
        job: &Job,
        node: &Arc<Node>,
        base: &Base,
    ) -> std::result::Result<(), Stop> {
        let failed = |e: Error| Stop::Failed {
            side: Side::Target,
            error: std::io::Error::other(e.message),
        };
        let flushed = self.flush_mostly(node).await;
        flushed.map_err(|error| Stop::Failed {
            side: Side::Target,
            error,
        })?;
        let (start, drained) = self.hold(node.name()).await;
        self.set_backing(node, base).await.map_err(failed)?;
        let name = base.node.as_ref().map(|b| b.name());
        self.world().graph.set_backing(node.name(), name);
        drop(drained);
        let paused_us = start.elapsed().as_micros() as u64;
        tracing::info!(
            job = job.id(),
            paused_us,
            "backing file is not needed any more"
        );
        Ok(())
    }

    async fn set_backing(&self, node: &Arc<Node>, base: &Base) -> Result<()> {
        let thread = self.world().any_thread()?;
        let (there, base) = (node.clone(), base.clone());
        thread
            .run_async(move |_| async move { there.set_backing(base.node, base.named).await })
            .await
            .map_err(std::io::Error::other)
            .flatten()
            .map_err(|e| {
                let what = format!("node '{}' cannot get another backing file", node.name());
                image_failed(&what, &e)
            })
    }

    /// What is left to do when a job has taken effect, while guests go on.
    async fn after(&mut self, job: &Job, parts: Parts) {
        let (removed, base) = match &parts.task {
            Task::Commit(c) => {
                let pivoted = c.active && job.state.ending() == Some(Ending::Pivot);
                let keep = c.chain.last().map(String::as_str);
                let gone = &c.chain[..c.chain.len() - 1];
                let removed = match c.active && !pivoted {
                    true => Vec::new(),
                    false => self.world().graph.remove_chain(gone, keep),
                };
                (removed, (!pivoted).then(|| parts.target.clone()))
            }
            Task::Stream(stream, base) => {
                let mut world = self.world();
                let mut implicit = Vec::new();
                let mut below = Some(stream.backing().clone());
                while let Some(node) = below.take()
                    && !base.node.as_ref().is_some_and(|b| Arc::ptr_eq(b, &node))
                    && world.graph.is_implicit(node.name())
                {
                    implicit.push(node.name().to_owned());
                    below = world.graph.backing(node.name()).ok().flatten();
                }
                let keep = base.node.as_ref().map(|b| b.name().to_owned());
                let removed = world.graph.remove_chain(&implicit, keep.as_deref());
                (removed, None)
            }
            _ => return,
        };
        if base.is_none() && matches!(parts.task, Task::Commit(_)) {
            let base = parts.target.name().to_owned();
            self.bitmaps_added(&base);
        }
        drop(parts);
        if let Some(base) = base {
            self.make_read_only(&base).await;
            self.events.push(Event::NodeChanged(base.name().to_owned()));
        }
        for node in removed {
            self.removed(&node);
            if let Err(error) = self.close(&node).await {
                tracing::error!(node = node.name(), %error, "the last changes cannot be written");
            }
            tracing::info!(
                node = node.name(),
                "node removed: it is not needed any more"
            );
        }
    }

    /// Ends a job without effect, and the others of its group.
    async fn abort(&mut self, job: &Arc<Job>, stop: Stop) {
        self.abort_one(job, stop).await;
        let Some(group) = &job.group else {
            return;
        };
        for member in self.members(group) {
            let status = member.life().status;
            if matches!(status, Status::Waiting | Status::Pending) {
                member.state.cancel();
                self.abort_one(&member, Stop::Cancelled).await;
            } else if status == Status::Running {
                member.state.cancel();
            }
        }
    }

    async fn abort_one(&mut self, job: &Arc<Job>, stop: Stop) {
        job.life().status = Status::Aborting;
        let error = match stop {
            Stop::Cancelled => Error::new(
                vdisk_api::ErrorKind::Failed,
                format!("job '{}' was cancelled", job.id()),
            ),
            Stop::Failed { side, error } => {
                let (at, node) = match side {
                    Side::Source => ("source", &job.source),
                    Side::Target => ("target", &job.target),
                };
                let what = format!("job '{}': its {at}, node '{node}'", job.id());
                image_failed(&what, &error)
            }
        };
        if let Some(parts) = self.end(job, false).await
            && matches!(parts.task, Task::Commit(_))
        {
            self.make_read_only(&parts.target).await;
        }
        self.conclude(job, Some(error));
    }

    /// Nothing of a job is under way any more: it lets go of its nodes.
    async fn end(&self, job: &Job, success: bool) -> Option<Parts> {
        // Whoever looks at a job that is over must not keep its nodes.
        let parts = {
            let mut life = job.life();
            life.running = None;
            life.parts.take()
        };
        if let Some(parts) = &parts {
            if let Task::Backup(backup, Some(increment)) = &parts.task {
                increment.end(backup, success);
            }
            parts.task.stop();
            // Guests' writes may still be at work on the target.
            drop(self.hold(&job.source).await);
        }
        self.let_go(job);
        parts
    }

    /// A job is over.
    fn conclude(&mut self, job: &Arc<Job>, error: Option<Error>) {
        let id = job.options.id.clone();
        match &error {
            None => tracing::info!(job = id, "job completed"),
            Some(e) if job.state.is_cancelled() => tracing::info!(job = id, "{}", e.message),
            Some(e) => tracing::error!(job = id, error = e.message, "job failed"),
        }
        {
            let mut life = job.life();
            life.status = Status::Concluded;
            life.error = error;
            life.ended = Some(SystemTime::now());
        }
        self.nodes_changed(job);
        self.events.push(Event::JobCompleted(id.clone()));
        if job.options.auto_dismiss {
            self.dismiss(&id);
        }
    }

    fn dismiss(&mut self, id: &str) {
        self.world().jobs.remove(id);
        self.events.push(Event::JobRemoved(id.to_owned()));
    }

    pub(super) async fn job_action(&mut self, id: &str, action: JobAction) -> Result<Reply> {
        let job = self.world().job(id)?;
        let status = job.status();
        let refuse = |why: &str| {
            Err(Error::invalid(format!(
                "job '{id}' is {}: {why}",
                status.name()
            )))
        };
        let state = &job.state;
        let task = job.life().parts.as_ref().map(|p| p.task.clone());
        match (action, status) {
            (JobAction::Dismiss, Status::Concluded) => self.dismiss(id),
            (JobAction::Dismiss, _) => {
                return refuse("only a job that is concluded can be dismissed; cancel it first");
            }
            (_, Status::Concluded | Status::Aborting) => {
                return refuse("it has ended; dismiss it");
            }
            (JobAction::Finalize, Status::Pending) => {
                let behind = task.as_ref().and_then(Task::mirror);
                match behind.is_some_and(|m| m.is_behind()) {
                    // Guests have written since: that is copied before they have to wait for the rest.
                    true => self.work_again(&job),
                    false => self.finalize(&job).await,
                }
            }
            (JobAction::Finalize, _) => {
                return refuse(
                    "only a pending job can be finalized (auto-finalize=false makes it wait)",
                );
            }
            (JobAction::Cancel { .. }, Status::Pending | Status::Waiting) => {
                state.cancel();
                self.abort(&job, Stop::Cancelled).await;
            }
            (_, Status::Waiting) => return refuse("it waits for the others of its group"),
            (_, Status::Pending) => return refuse("it waits for 'finalize', or for 'cancel'"),
            (JobAction::Pause, _) if state.is_paused() => return refuse("it is paused already"),
            (JobAction::Pause, _) => state.set_paused(true),
            (JobAction::Resume, _) if !state.is_paused() => return refuse("it is not paused"),
            (JobAction::Resume, _) => state.set_paused(false),
            (JobAction::Cancel { force: false }, Status::Ready)
                if task.as_ref().is_some_and(|t| t.mirror().is_some()) =>
            {
                state.end(Ending::Copy);
            }
            (JobAction::Cancel { .. }, _) => state.cancel(),
            (JobAction::Complete, Status::Ready) => match &task {
                Some(task) if task.mirror().is_some() => {
                    check_pivot(&self.world(), &job, task)?;
                    state.end(Ending::Pivot);
                }
                _ => state.end(Ending::Copy),
            },
            (JobAction::Complete, _) => {
                return refuse("only a job that is ready can be completed: wait for that");
            }
            (JobAction::SetSpeed(speed), _) => state.set_speed(speed),
            (JobAction::SetCopyMode(mode), _) => {
                let mirror = task.as_ref().and_then(Task::mirror);
                let mirror = mirror.ok_or_else(|| {
                    Error::not_supported(format!(
                        "job '{id}' is a {}: only mirrors have a copy-mode",
                        job.options.kind.name()
                    ))
                })?;
                match mode {
                    CopyMode::WriteBlocking => {
                        mirror.set_blocking();
                        self.nodes_changed(&job);
                    }
                    CopyMode::Background if !mirror.is_blocking() => {}
                    CopyMode::Background => {
                        return refuse("copy-mode can be changed to write-blocking, and not back");
                    }
                }
            }
        }
        self.events.push(Event::JobChanged(id.to_owned()));
        Ok(Reply::Done)
    }

    /// Cancels all jobs; those that do not wait for somebody are still to end.
    pub(super) async fn cancel_jobs(&mut self) {
        let jobs: Vec<Arc<Job>> = self.world().jobs.values().cloned().collect();
        for job in jobs {
            job.state.cancel();
            if matches!(job.status(), Status::Pending | Status::Waiting) {
                self.abort(&job, Stop::Cancelled).await;
            }
        }
    }

    /// Whether jobs have still to end.
    pub(super) fn has_jobs(&self) -> bool {
        self.world().jobs.values().any(|j| !j.is_over())
    }
}

/// Whether the target of a mirror may take the place of its source.
fn check_pivot(world: &World, job: &Job, task: &Task) -> Result<()> {
    for other in world.jobs.values().filter(|o| o.id() != job.id()) {
        let life = other.life();
        let mirror = life.parts.as_ref().and_then(|p| p.task.mirror());
        if mirror.is_some() && other.source == job.source {
            return Err(Error::in_use(format!(
                "job '{}': node '{}' is mirrored by job '{}', too, which would see no writes any more: end that first",
                job.id(),
                job.source,
                other.id()
            )));
        }
    }
    match task {
        Task::Commit(_) => world.graph.check_moves(&job.source),
        _ => world
            .graph
            .check_replace(&job.source, &job.target, &job.parent()),
    }
}

/// What an image's header is to call a node, with its format.
fn name_of(
    what: &str,
    node: &Arc<Node>,
    given: Option<String>,
    needed: bool,
) -> Result<Option<(String, String)>> {
    // What QEMU calls the content of such a node.
    let format = match node.driver_name() {
        "qcow2" => "qcow2",
        "luks" => "luks",
        _ => "raw",
    };
    match given.or_else(|| node.filename()) {
        Some(name) => Ok(Some((name, format.to_owned()))),
        None if !needed => Ok(None),
        None => Err(Error::invalid(format!(
            "{what}: node '{}' has no file name that the image above could name: give 'backing-file'",
            node.name()
        ))),
    }
}

async fn finish(thread: IoThread, mirror: Arc<Mirror>) -> std::result::Result<(), Stop> {
    let result = thread
        .run_async(move |_| async move { mirror.finish().await })
        .await;
    result.unwrap_or_else(|e| {
        Err(Stop::Failed {
            side: Side::Source,
            error: std::io::Error::other(e),
        })
    })
}
