//! What jobs are told.

use std::sync::Arc;

use vdisk_api::{CopyMode, Error, JobAction, Reply, Result};
use vdisk_block::jobs::{Ending, Stop};

use super::end::check_pivot;
use super::{Job, Status, Task};
use crate::control::{Control, Event};

impl Control {
    pub(in crate::control) async fn job_action(
        &mut self,
        id: &str,
        action: JobAction,
    ) -> Result<Reply> {
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
            (JobAction::Pause | JobAction::SetSpeed(_), _) if job.options.kind.is_of_image() => {
                return Err(Error::not_supported(format!(
                    "job '{id}' is a {}, which can neither pause nor go slower: cancel it",
                    job.options.kind.name()
                )));
            }
            (JobAction::Pause, _) if state.is_paused() => return refuse("it is paused already"),
            (JobAction::Pause, _) => state.set_paused(true),
            (JobAction::Resume, _) if !state.is_paused() => return refuse("it is not paused"),
            (JobAction::Resume, _) => state.set_paused(false),
            (JobAction::Cancel { force: false }, Status::Ready)
                if task.as_ref().is_some_and(|t| t.mirror().is_some()) =>
            {
                state.end(Ending::Copy);
            }
            (JobAction::Cancel { .. }, _) => {
                state.cancel();
                // Nothing of it is needed any more.
                job.give_up(&self.world(), true);
            }
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
    pub(in crate::control) async fn cancel_jobs(&mut self) {
        let jobs: Vec<Arc<Job>> = self.world().jobs.values().cloned().collect();
        for job in jobs {
            job.state.cancel();
            if matches!(job.status(), Status::Pending | Status::Waiting) {
                self.abort(&job, Stop::Cancelled).await;
            }
        }
    }

    /// Whether jobs have still to end.
    pub(in crate::control) fn has_jobs(&self) -> bool {
        self.world().jobs.values().any(|j| !j.is_over())
    }
}
