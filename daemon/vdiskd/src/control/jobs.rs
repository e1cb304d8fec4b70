//! Jobs: how they begin, what they are told, and what becomes of their nodes when they end.
//!
//! The life cycle is QEMU's: created, running (paused), ready (standby), waiting, pending, aborting, concluded, null. Work runs
//! on an I/O thread beside the control plane; its end is a message like a command, so that whatever it changes in the graph
//! comes in turn with everything else.

use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, SystemTime};

use vdisk_api::{
    CopyErrorPolicy, CopyMode, Error, ErrorPolicy, JobAction, JobKind, JobOptions, JobSync, Reply,
    Result,
};
use vdisk_block::jobs::{
    self, Backup, BackupSync, Ending, JobState, Mirror, MirrorSync, OnCopyError, OnError, Side,
    Stop, Work,
};
use vdisk_block::{Backend, Node, Parent, Permissions, Use, image_failed};
use vdisk_io::{IoThread, IoThreadConfig};

use super::{Control, Event, World};

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
            Status::Pending => "pending",
            Status::Aborting => "aborting",
            Status::Concluded => "concluded",
        }
    }
}

#[derive(Clone)]
enum Task {
    Mirror(Arc<Mirror>),
    Backup(Arc<Backup>),
    Convert(Arc<Mirror>),
}

impl Task {
    fn work(&self) -> Arc<dyn Work> {
        match self {
            Task::Mirror(m) | Task::Convert(m) => m.clone(),
            Task::Backup(b) => b.clone(),
        }
    }

    /// Guests' writes do not concern it any more.
    fn stop(&self) {
        match self {
            Task::Mirror(m) | Task::Convert(m) => m.stop(),
            Task::Backup(b) => b.stop(),
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
    parts: Option<Parts>,
    error: Option<Error>,
    ended: Option<SystemTime>,
}

pub struct Job {
    pub options: JobOptions,
    pub state: Arc<JobState>,
    pub started: SystemTime,
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
        match &self.life().parts.as_ref()?.task {
            Task::Mirror(m) if m.is_blocking() => Some(CopyMode::WriteBlocking),
            Task::Mirror(_) => Some(CopyMode::Background),
            _ => None,
        }
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

fn task(o: &JobOptions, source: &Arc<Node>, target: &Arc<Node>) -> Task {
    let (source, target) = (source.clone(), target.clone());
    match o.kind {
        JobKind::Mirror {
            sync,
            copy_mode,
            granularity,
        } => {
            let sync = match sync {
                JobSync::Full => MirrorSync::Full,
                JobSync::Top => MirrorSync::Top,
                JobSync::None => MirrorSync::None,
            };
            let cluster = target.limits().zero_alignment.max(65536);
            let granularity = granularity.unwrap_or(cluster);
            let blocking = copy_mode == CopyMode::WriteBlocking;
            Task::Mirror(Mirror::new(source, target, sync, granularity, blocking))
        }
        JobKind::Backup {
            sync,
            compress,
            on_copy_error,
        } => {
            let sync = match sync {
                JobSync::Full => BackupSync::Full,
                JobSync::Top => BackupSync::Top,
                JobSync::None => BackupSync::None,
            };
            let on_error = match on_copy_error {
                CopyErrorPolicy::BreakSnapshot => OnCopyError::BreakSnapshot,
                CopyErrorPolicy::BreakGuestWrite => OnCopyError::BreakGuestWrite,
            };
            Task::Backup(Backup::new(source, target, sync, compress, on_error))
        }
        JobKind::Convert { compress } => Task::Convert(Mirror::once(source, target, compress)),
    }
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
    let target = Use {
        taken: Permissions::WRITE,
        shared: Permissions::WRITE_UNCHANGED,
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
        let id = options.id.clone();
        let what = format!("job '{id}'");
        let (source, target, thread) = {
            let mut world = self.world();
            if world.jobs.contains_key(&id) {
                return Err(Error::exists(format!(
                    "there is a job '{id}' already: choose another job-id, or dismiss it first"
                )));
            }
            let source = world.graph.node(&options.node)?;
            let target = world.graph.node(&options.target);
            let target = target.map_err(|e| e.context(&what))?;
            let thread = match &options.iothread {
                Some(name) => world.thread(name).map_err(|e| e.context(&what))?,
                None => world.jobs_thread()?,
            };
            (source, target, thread)
        };
        self.check_job(&what, &options, &source, &target)?;
        let changed = {
            let (events, id) = (self.job_events.clone(), id.clone());
            move || {
                let _ = events.send(JobEvent::Changed { id: id.clone() });
            }
        };
        let policies = [options.on_source_error, options.on_target_error].map(policy);
        let parts = Parts {
            task: task(&options, &source, &target),
            source: source.clone(),
            target: target.clone(),
        };
        let job = Arc::new(Job {
            state: Arc::new(JobState::new(options.speed, policies, Box::new(changed))),
            started: SystemTime::now(),
            life: Mutex::new(Life {
                status: Status::Created,
                parts: Some(parts.clone()),
                error: None,
                ended: None,
            }),
            options,
        });
        let roots = [&source, &target].map(|n| Backend::new_fixed(what.clone(), n.clone()));
        self.take_nodes(&job, &roots)?;
        match &parts.task {
            Task::Mirror(m) => m.start(),
            Task::Convert(_) => {}
            Task::Backup(b) => {
                let (start, drained) = self.hold(source.name()).await;
                b.start();
                drop(drained);
                let paused_us = start.elapsed().as_micros() as u64;
                tracing::debug!(job = id, paused_us, "point in time taken");
            }
        }
        job.life().status = Status::Running;
        let (work, state) = (parts.task.work(), job.state.clone());
        let (events, of) = (self.job_events.clone(), id.clone());
        tokio::spawn(async move {
            let result = jobs::run(work, state, roots.to_vec(), thread).await;
            let _ = events.send(JobEvent::Ended { id: of, result });
        });
        tracing::info!(
            job = id,
            operation = job.options.kind.name(),
            node = source.name(),
            target = target.name(),
            "job started"
        );
        self.world().jobs.insert(id.clone(), job.clone());
        self.events.push(Event::JobAdded(id));
        self.nodes_changed(&job);
        Ok(Reply::Done)
    }

    fn check_job(
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

    /// Takes both nodes for the job, or none.
    fn take_nodes(&self, job: &Job, roots: &[Arc<Backend>; 2]) -> Result<()> {
        let mut world = self.world();
        let [source, target] = uses(&job.options.kind);
        let (from, to) = (&*job.options.node, &*job.options.target);
        world
            .graph
            .attach(from, job.parent(), source, roots[0].clone())?;
        let taken = world
            .graph
            .attach(to, job.parent(), target, roots[1].clone());
        if taken.is_err() {
            world.graph.detach(from, &job.parent());
        }
        taken
    }

    /// What users of the job's nodes may see has changed.
    fn nodes_changed(&mut self, job: &Job) {
        let mut events = Vec::new();
        {
            let world = self.world();
            for node in [&job.options.node, &job.options.target] {
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
                    Ok(()) if job.options.auto_finalize => self.finalize(&job).await,
                    Ok(()) => {
                        job.life().status = Status::Pending;
                        self.events.push(Event::JobChanged(id));
                    }
                    Err(stop) => self.abort(&job, stop),
                }
            }
        }
    }

    /// Lets a job that has done its work take effect.
    async fn finalize(&mut self, job: &Arc<Job>) {
        let Some(parts) = job.life().parts.clone() else {
            return;
        };
        let result = match (&parts.task, job.state.ending()) {
            (Task::Mirror(m), Some(Ending::Pivot)) => self.pivot(job, &parts, m).await,
            (Task::Mirror(m), _) => self.last_part(job, m).await,
            (Task::Backup(_) | Task::Convert(_), _) => Ok(()),
        };
        drop(parts);
        match result {
            Ok(()) => self.conclude(job, None),
            Err(stop) => self.abort(job, stop),
        }
    }

    /// Has a mirror copy the rest while nobody writes.
    async fn last_part(&self, job: &Job, mirror: &Arc<Mirror>) -> std::result::Result<(), Stop> {
        let (start, _drained) = self.hold(&job.options.node).await;
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
            world
                .graph
                .check_replace(from, to, &job.parent())
                .map_err(refused)?;
            let (_, above) = world.graph.above(from);
            let exports = world.exports.values();
            let exports = exports.filter(|e| above.iter().any(|n| n.name() == e.node()));
            let blocks = exports.map(|e| e.server.device().options.logical_block_size);
            if let Some(block) = blocks.min() {
                parts.target.announce_block_size(block.into());
            }
        }
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

    fn abort(&mut self, job: &Arc<Job>, stop: Stop) {
        job.life().status = Status::Aborting;
        let error = match stop {
            Stop::Cancelled => Error::new(
                vdisk_api::ErrorKind::Failed,
                format!("job '{}' was cancelled", job.id()),
            ),
            Stop::Failed { side, error } => {
                let (at, node) = match side {
                    Side::Source => ("source", &job.options.node),
                    Side::Target => ("target", &job.options.target),
                };
                let what = format!("job '{}': its {at}, node '{node}'", job.id());
                image_failed(&what, &error)
            }
        };
        self.conclude(job, Some(error));
    }

    /// A job is over: it lets go of its nodes.
    fn conclude(&mut self, job: &Arc<Job>, error: Option<Error>) {
        let id = job.options.id.clone();
        // Whoever looks at a job that is over must not keep its nodes.
        let parts = job.life().parts.take();
        if let Some(parts) = parts {
            parts.task.stop();
        }
        {
            let mut world = self.world();
            for node in [&job.options.node, &job.options.target] {
                world.graph.detach(node, &job.parent());
            }
        }
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
            (JobAction::Finalize, Status::Pending) => self.finalize(&job).await,
            (JobAction::Finalize, _) => {
                return refuse(
                    "only a pending job can be finalized (auto-finalize=false makes it wait)",
                );
            }
            (JobAction::Cancel { .. }, Status::Pending) => {
                state.cancel();
                self.abort(&job, Stop::Cancelled);
            }
            (_, Status::Pending) => return refuse("it waits for 'finalize', or for 'cancel'"),
            (JobAction::Pause, _) if state.is_paused() => return refuse("it is paused already"),
            (JobAction::Pause, _) => state.set_paused(true),
            (JobAction::Resume, _) if !state.is_paused() => return refuse("it is not paused"),
            (JobAction::Resume, _) => state.set_paused(false),
            (JobAction::Cancel { force: false }, Status::Ready)
                if matches!(task, Some(Task::Mirror(_))) =>
            {
                state.end(Ending::Copy);
            }
            (JobAction::Cancel { .. }, _) => state.cancel(),
            (JobAction::Complete, Status::Ready) => match &task {
                Some(Task::Mirror(_)) => {
                    let (from, to) = (&job.options.node, &job.options.target);
                    self.world().graph.check_replace(from, to, &job.parent())?;
                    state.end(Ending::Pivot);
                }
                _ => state.end(Ending::Copy),
            },
            (JobAction::Complete, _) => {
                return refuse("only a job that is ready can be completed: wait for that");
            }
            (JobAction::SetSpeed(speed), _) => state.set_speed(speed),
            (JobAction::SetCopyMode(mode), _) => match (&task, mode) {
                (Some(Task::Mirror(m)), CopyMode::WriteBlocking) => {
                    m.set_blocking();
                    self.nodes_changed(&job);
                }
                (Some(Task::Mirror(m)), CopyMode::Background) if !m.is_blocking() => {}
                (Some(Task::Mirror(_)), CopyMode::Background) => {
                    return refuse("copy-mode can be changed to write-blocking, and not back");
                }
                _ => {
                    return Err(Error::not_supported(format!(
                        "job '{id}' is a {}: only mirrors have a copy-mode",
                        job.options.kind.name()
                    )));
                }
            },
        }
        self.events.push(Event::JobChanged(id.to_owned()));
        Ok(Reply::Done)
    }

    /// Cancels all jobs; those that do not wait for somebody are still to end.
    pub(super) fn cancel_jobs(&mut self) {
        let jobs: Vec<Arc<Job>> = self.world().jobs.values().cloned().collect();
        for job in jobs {
            job.state.cancel();
            if job.status() == Status::Pending {
                self.abort(&job, Stop::Cancelled);
            }
        }
    }

    /// Whether jobs have still to end.
    pub(super) fn has_jobs(&self) -> bool {
        self.world().jobs.values().any(|j| !j.is_over())
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
