//! How jobs begin: what they need is checked and taken, and their work is started.

use std::sync::{Arc, Mutex};
use std::time::SystemTime;

use vdisk_api::{
    CopyErrorPolicy, CopyMode, Error, ErrorPolicy, JobBitmap, JobKind, JobOptions, JobSync, Map,
    Reply, Result,
};
use vdisk_block::jobs::{
    self, Backup, BackupSync, Discard, JobState, Mirror, MirrorSync, OnCopyError, OnError,
    Reaching, Sharing, Stream,
};
use vdisk_block::{Backend, Descriptors, Node, Permissions, Use};

use super::{
    Base, Commit, Group, Increment, Job, JobEvent, Life, Parts, PreparedJob, Status, Streaming,
    Task,
};
use crate::control::world::locked;
use crate::control::{Control, Event, World, bitmaps};

/// How long another host may take to answer.
const PATIENCE: std::time::Duration = std::time::Duration::from_secs(5);

/// Nodes that no other job may use meanwhile.
fn claims(world: &World, task: &Task) -> Vec<String> {
    match task {
        Task::Mirror(..) | Task::Backup(..) | Task::Convert(_) | Task::Discard(_) => Vec::new(),
        Task::Commit(c) => c.chain.clone(),
        Task::Stream(Streaming { stream, .. }) => {
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

/// The backends whose requests may change what a node has: those above it, and those above the sources of jobs that it is a target of, whose
/// guests copy for the job what they write.
fn reaching(world: &World, name: &str) -> Vec<Arc<Backend>> {
    let (mut backends, mut nodes) = world.graph.above(name);
    let mut seen = 0;
    while seen < nodes.len() {
        let node = nodes[seen].clone();
        seen += 1;
        for job in world.jobs.values().filter(|j| j.target == node.name()) {
            let (more, above) = world.graph.above(&job.source);
            backends.extend(more);
            let new = |n: &Arc<Node>| !nodes.iter().any(|m| Arc::ptr_eq(m, n));
            let new: Vec<Arc<Node>> = above.into_iter().filter(new).collect();
            nodes.extend(new);
        }
    }
    backends
}

fn policy(p: ErrorPolicy) -> OnError {
    match p {
        ErrorPolicy::Report => OnError::Report,
        ErrorPolicy::Ignore => OnError::Ignore,
        ErrorPolicy::Enospc => OnError::Enospc,
        ErrorPolicy::Stop => OnError::Stop,
    }
}

/// The bitmap that a job is to go by, if no other does.
fn increment(source: &Arc<Node>, bitmap: Option<&JobBitmap>) -> Result<Option<Increment>> {
    let of = |b: &JobBitmap| {
        Ok(Increment {
            bitmap: bitmaps::free(source, &b.name)?,
            mode: b.mode,
            bits: Arc::default(),
        })
    };
    bitmap.map(of).transpose()
}

/// The task of a job that copies one node to another.
fn copy_task(o: &JobOptions, source: &Arc<Node>, target: &Arc<Node>) -> Result<Task> {
    // Whatever its granularity is, it is not finer than this.
    let finest = target.limits().zero_alignment.max(65536);
    if !matches!(o.kind, JobKind::Mirror { .. }) {
        bitmaps::check_memory("its bits", source.size(), finest)?;
    }
    let (source, target) = (source.clone(), target.clone());
    // What guests have just written would have to be on the disk to be shared.
    let only_new = matches!(
        o.kind,
        JobKind::Mirror {
            sync: JobSync::None,
            ..
        }
    );
    let sharing = Sharing::new(o.use_copy_range && !only_new);
    Ok(match o.kind {
        JobKind::Mirror {
            sync,
            ref bitmap,
            copy_mode,
            granularity,
        } => {
            let increment = increment(&source, bitmap.as_ref())?;
            let sync = match sync {
                JobSync::Full => MirrorSync::Full,
                JobSync::Top => MirrorSync::Top,
                JobSync::None => MirrorSync::None,
                JobSync::Bitmap => MirrorSync::Bits,
            };
            let cluster = target.limits().zero_alignment.max(65536);
            // Two pieces must not share a block of the storage.
            let block = target
                .limits()
                .request_alignment
                .max(target.storage_block_size());
            let granularity = granularity.unwrap_or(cluster).max(block);
            bitmaps::check_memory("its bits", source.size(), granularity)?;
            let blocking = copy_mode == CopyMode::WriteBlocking;
            let mirror = Mirror::new(source, target, sync, granularity, blocking, sharing);
            Task::Mirror(mirror, increment)
        }
        JobKind::Backup {
            sync,
            ref bitmap,
            compress,
            on_copy_error,
        } => {
            let increment = increment(&source, bitmap.as_ref())?;
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
            let backup = Backup::new(source, target, sync, compress, sharing, on_error);
            Task::Backup(backup, increment)
        }
        JobKind::Convert { compress } => {
            let full = MirrorSync::Full;
            Task::Convert(Mirror::once(source, target, full, compress, sharing))
        }
        _ => return Err(Error::failed("it copies nothing")),
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
        JobKind::Commit { .. } | JobKind::Stream { .. } | JobKind::Discard => Use {
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
    // What was passed open has no name for others.
    let own = node.filename().filter(|name| !Descriptors::is_one(name));
    match given.or(own) {
        Some(name) => Ok(Some((name, format.to_owned()))),
        None if !needed => Ok(None),
        None => Err(Error::invalid(format!(
            "{what}: node '{}' has no file name that the image above could name: give 'backing-file'",
            node.name()
        ))),
    }
}

impl Control {
    pub(in crate::control) async fn start_job(&mut self, options: JobOptions) -> Result<Reply> {
        if options.kind.is_of_image() {
            return self.start_image_job(options).await;
        }
        let prepared = self.prepare_job(options, None)?;
        if let Err(e) = self.begin(&prepared).await {
            self.forget(prepared);
            return Err(e);
        }
        self.launch(prepared);
        Ok(Reply::Done)
    }

    /// A job that was prepared does not begin.
    pub(in crate::control) fn forget(&self, prepared: PreparedJob) {
        self.let_go(&prepared.job);
    }

    /// Checks a job and takes its nodes.
    pub(in crate::control) fn prepare_job(
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
        let sharing = Sharing::new(options.use_copy_range);
        let parts = match &options.kind {
            JobKind::Commit { base, backing_file } => self.commit_parts(
                &what,
                &source,
                base.as_deref(),
                backing_file.clone(),
                sharing,
            )?,
            JobKind::Stream { base, backing_file } => self.stream_parts(
                &what,
                &source,
                base.as_deref(),
                backing_file.clone(),
                sharing,
            )?,
            JobKind::Discard => {
                if source.is_read_only() {
                    return Err(Error::invalid(format!(
                        "{what}: node '{}' is read-only, and nothing of it can be discarded: add it without read-only",
                        source.name()
                    )));
                }
                bitmaps::check_memory(&what, source.size(), Discard::WINDOW)?;
                Parts {
                    task: Task::Discard(Discard::new(source.clone())),
                    target: source.clone(),
                    source,
                }
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
                effective: false,
                running: None,
                parts: Some(parts.clone()),
                error: None,
                ended: None,
                found: Map::new(),
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
    pub(in crate::control) fn launch(&mut self, prepared: PreparedJob) {
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
        let (world, source) = (self.world.clone(), job.source.clone());
        let reaching: Reaching = Arc::new(move || reaching(&locked(&world), &source));
        tokio::spawn(async move {
            let result = jobs::run(work, state, roots, reaching, thread).await;
            let _ = events.send(JobEvent::Ended { id, result });
        });
    }

    pub(super) fn work_again(&self, job: &Arc<Job>) {
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

    /// Says to whoever has a node's storage whether all is written, and waits for the answer for so long as others can wait for this.
    pub(super) async fn say_finished(&self, node: &Arc<Node>, on: bool) -> std::io::Result<()> {
        let thread = self.world().any_thread().map_err(std::io::Error::other)?;
        let there = node.clone();
        let done = thread.run_async(move |_| async move { there.set_finished(on).await });
        match tokio::time::timeout(PATIENCE, done).await {
            Ok(done) => done.map_err(std::io::Error::other).flatten(),
            Err(_) => Err(std::io::ErrorKind::TimedOut.into()),
        }
    }

    /// Nobody is to use what a job has only begun to write.
    async fn set_unfinished(&self, job: &str, target: &Arc<Node>) -> Result<()> {
        self.say_finished(target, false)
            .await
            .map_err(|e| match e.kind() {
                std::io::ErrorKind::Unsupported => Error::not_supported(format!(
                    "job '{job}': hand-over needs a target that can be told whether all is written, and node '{}' cannot: give one with driver nbd, of an export of vdiskd's",
                    target.name()
                )),
                _ => Error::io(format_args!("job '{job}': node '{}'", target.name()), &e),
            })
    }

    /// What a job needs before it runs.
    async fn begin(&self, prepared: &PreparedJob) -> Result<()> {
        let PreparedJob { job, parts, .. } = prepared;
        match &parts.task {
            Task::Mirror(m, None) => {
                if job.options.hand_over {
                    self.set_unfinished(job.id(), &parts.target).await?;
                }
                self.announce(parts);
                m.start();
            }
            Task::Mirror(m, Some(increment)) => {
                self.announce(parts);
                // No write is in the bitmap only, and none in neither.
                let (_, _drained) = self.hold(&job.source).await;
                m.start();
                m.add(&increment.begin(job.id()));
            }
            Task::Convert(_) => {}
            Task::Stream(s) if s.was_read_only => {
                let (_, _drained) = self.hold(&job.source).await;
                self.make_writable(&parts.source).await?;
            }
            Task::Stream(_) => {}
            Task::Discard(d) => d.start(),
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
    pub(super) fn announce(&self, parts: &Parts) {
        let world = self.world();
        let (_, above) = world.graph.above(parts.source.name());
        let exports = world.exports.values();
        let exports = exports.filter(|e| above.iter().any(|n| n.name() == e.node()));
        let blocks = exports.map(|e| e.server.logical_block_size());
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
        sharing: Sharing,
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
        let finest = base.limits().zero_alignment.max(65536);
        bitmaps::check_memory(what, top.size(), finest)?;
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
                Mirror::new(
                    top.clone(),
                    base.clone(),
                    above,
                    granularity,
                    false,
                    sharing,
                )
            }
            false => Mirror::once(top.clone(), base.clone(), above, false, sharing),
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
        sharing: Sharing,
    ) -> Result<Parts> {
        let world = self.world();
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
        let stream = Stream::new(node.clone(), backing, base.clone(), sharing);
        Ok(Parts {
            task: Task::Stream(Streaming {
                stream,
                base: Base { node: base, named },
                was_read_only: node.is_read_only(),
            }),
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
        let header = target.image().map(|i| i.header());
        let why = match &header {
            Some(h) if h.luks.is_some() => Some("is encrypted"),
            Some(h) if h.external_data => Some("has an external data file"),
            _ => None,
        };
        if let Some(why) = why.filter(|_| compress) {
            return Err(Error::not_supported(format!(
                "{what}: target '{}' {why}, and such images have no compressed clusters: give another, or leave out 'compress'",
                target.name()
            )));
        }
        if compress && header.is_none() {
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
            // A top that guests use stays what it is; one that only overlays stand on goes, and what somebody wrote to it meanwhile would
            // go with it.
            let gone = usize::from(c.active);
            world.graph.claim(&c.chain[gone..], job.id());
        }
        Ok(roots)
    }

    /// Its nodes are not the job's any more.
    pub(super) fn let_go(&self, job: &Job) {
        let mut world = self.world();
        for node in [&job.source, &job.target] {
            world.graph.detach(node, &job.parent());
        }
        world.graph.end_claims(job.id());
    }

    /// What users of the job's nodes may see has changed.
    pub(super) fn nodes_changed(&mut self, job: &Job) {
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
}
