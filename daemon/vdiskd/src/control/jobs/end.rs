//! What becomes of jobs whose work has ended: they take effect, or have none.

use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::time::SystemTime;

use vdisk_api::{Error, Result};
use vdisk_block::jobs::{Ending, Mirror, Side, Stop, Work};
use vdisk_block::{Node, image_failed};
use vdisk_io::IoThread;

use super::{Base, Commit, Group, HandOver, Job, JobEvent, Parts, Status, Task};
use crate::control::{Control, Event, World};

/// Whether the target of a mirror may take the place of its source.
pub(super) fn check_pivot(world: &World, job: &Job, task: &Task) -> Result<()> {
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
        _ => {
            let target = world.graph.node(&job.target)?;
            world.check_lasting(&job.source, &target.with_all_below())?;
            world
                .graph
                .check_replace(&job.source, &job.target, &job.parent())
        }
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

impl Control {
    pub(in crate::control) async fn job_event(&mut self, event: JobEvent) {
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
            JobEvent::ImageEnded { id, result } => self.image_job_ended(&id, result),
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
                // One that failed has ended the others.
                if member.life().status == Status::Waiting {
                    self.pend(&member).await;
                }
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
    pub(super) async fn finalize(&mut self, job: &Arc<Job>) {
        let Some(parts) = job.life().parts.clone() else {
            return;
        };
        let result = match (&parts.task, job.state.ending()) {
            (Task::Mirror(m, _), Some(Ending::Pivot)) => self.pivot(job, &parts, m).await,
            (Task::Mirror(m, _), _) => self.last_part(job, m).await,
            (Task::Commit(c), Some(Ending::Pivot)) if c.active => {
                self.pivot(job, &parts, &c.mirror).await
            }
            (Task::Commit(c), _) if c.active => self.last_part(job, &c.mirror).await,
            (Task::Commit(c), _) => self.stand_on_base(job, c).await,
            (Task::Stream(s), _) => self.end_stream(job, &parts.source, &s.base).await,
            (Task::Backup(backup, _), _) => backup.check(),
            (Task::Discard(discard), _) => {
                job.life()
                    .found
                    .insert("freed".into(), discard.freed().into());
                Ok(())
            }
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
        self.reserve_state().map_err(refused)?;
        let (start, drained) = self.hold(from).await;
        finish(thread, mirror.clone()).await?;
        mirror.stop();
        let above = {
            let mut world = self.world();
            let (_, above) = world.graph.above(from);
            world.graph.detach(from, &job.parent());
            world.graph.detach(to, &job.parent());
            world.graph.replace(from, to);
            if let Task::Commit(c) = &parts.task {
                world.graph.leave(&c.chain[..c.chain.len() - 1]);
            }
            above
        };
        job.life().effective = true;
        for guard in &drained {
            guard.set_node_if(&parts.source, &parts.target);
        }
        self.save();
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

    /// Has the overlays of what was committed stand on the base.
    async fn stand_on_base(&mut self, job: &Job, c: &Commit) -> std::result::Result<(), Stop> {
        let failed = |e: Error| Stop::Failed {
            side: Side::Target,
            error: std::io::Error::other(e.message),
        };
        let overlays = self.world().graph.overlays(&job.source);
        for overlay in &overlays {
            let flushed = self.flush_mostly(overlay).await;
            flushed.map_err(|error| Stop::Failed {
                side: Side::Target,
                error,
            })?;
        }
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
        self.world().graph.leave(&c.chain[..c.chain.len() - 1]);
        job.life().effective = true;
        self.save();
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
        job.life().effective = true;
        self.save();
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
        let (removed, written) = match &parts.task {
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
            Task::Stream(s) => {
                let mut world = self.world();
                let mut implicit = Vec::new();
                let mut below = Some(s.stream.backing().clone());
                let base = &s.base.node;
                while let Some(node) = below.take()
                    && !base.as_ref().is_some_and(|b| Arc::ptr_eq(b, &node))
                    && world.graph.is_implicit(node.name())
                {
                    implicit.push(node.name().to_owned());
                    below = world.graph.backing(node.name()).ok().flatten();
                }
                let keep = base.as_ref().map(|b| b.name().to_owned());
                let removed = world.graph.remove_chain(&implicit, keep.as_deref());
                (removed, s.was_read_only.then(|| parts.target.clone()))
            }
            _ => return,
        };
        if written.is_none() && matches!(parts.task, Task::Commit(_)) {
            let base = parts.target.name().to_owned();
            self.bitmaps_added(&base);
        }
        drop(parts);
        if let Some(node) = written {
            self.make_read_only(&node).await;
            self.events.push(Event::NodeChanged(node.name().to_owned()));
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
    pub(super) async fn abort(&mut self, job: &Arc<Job>, stop: Stop) {
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
        if let Some(parts) = self.end(job, false).await {
            match &parts.task {
                Task::Commit(_) => self.make_read_only(&parts.target).await,
                Task::Stream(s) if s.was_read_only => self.make_read_only(&parts.target).await,
                _ => {}
            }
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
            match &parts.task {
                Task::Backup(backup, Some(increment)) => {
                    increment.end(|bits| backup.missing(bits), success);
                }
                Task::Mirror(mirror, Some(increment)) => {
                    increment.end(|bits| mirror.missing(bits), success);
                }
                _ => {}
            }
            parts.task.stop();
            // Guests' writes may still be at work on the target.
            drop(self.hold(&job.source).await);
        }
        self.let_go(job);
        parts
    }

    /// Has the other host be told that it may have what mirrors of a node have copied for it, as the node is to be let go of: what is
    /// to be waited for. None if there are no such mirrors.
    ///
    /// # Errors
    /// If one of them is not ready: a guest must not go on with what it has.
    pub(in crate::control) fn hand_over(&mut self, node: &str) -> Option<Result<Vec<HandOver>>> {
        let jobs = self.copies_of(node);
        let mut told = Vec::new();
        for job in &jobs {
            let life = job.life();
            let mirror = life.parts.as_ref().and_then(|p| p.task.mirror()).cloned();
            let is_ready = job.state.is_ready() && life.status == Status::Running;
            drop(life);
            let Some(mirror) = mirror.filter(|_| is_ready) else {
                return Some(Err(Error::failed(format!(
                    "the copy of node '{}' for another host is not finished: job '{}'",
                    job.source,
                    job.id()
                ))));
            };
            told.push((job.id().to_owned(), mirror.hand_over(&job.state)));
            self.nodes_changed(job);
        }
        (!told.is_empty()).then_some(Ok(told))
    }

    /// Jobs that copy a node, or what it stands on, for another host.
    fn copies_of(&self, node: &str) -> Vec<Arc<Job>> {
        let world = self.world();
        let Ok(node) = world.graph.node(node) else {
            return Vec::new();
        };
        let nodes = node.with_all_below();
        let is_ours =
            |job: &&Arc<Job>| job.options.hand_over && nodes.iter().any(|n| n.name() == job.source);
        world.jobs.values().filter(is_ours).cloned().collect()
    }

    /// A guest goes on here after all: the other host must not use what it was told that it may, and the guest waits until it has heard
    /// that, or is not to be reached.
    pub(in crate::control) async fn take_back(&self, node: &str) {
        for job in self.copies_of(node) {
            let target = job.life().parts.as_ref().map(|p| p.target.clone());
            let Some(target) = target else {
                continue;
            };
            match self.say_finished(&target, false).await {
                Ok(()) => tracing::info!(
                    job = job.id(),
                    "the guest goes on here, and so does the copy"
                ),
                Err(error) => {
                    tracing::error!(job = job.id(), %error, "the other host cannot be told that the guest goes on here: the copy is given up");
                    job.state.cancel();
                }
            }
        }
    }

    /// A job is over.
    pub(super) fn conclude(&mut self, job: &Arc<Job>, error: Option<Error>) {
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

    pub(super) fn dismiss(&mut self, id: &str) {
        self.world().jobs.remove(id);
        self.events.push(Event::JobRemoved(id.to_owned()));
    }
}
