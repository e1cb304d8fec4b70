//! Jobs on whole images: made, checked, repaired. Their work is not [`vdisk_block::jobs::Work`]: it is done at once or not at
//! all, and shows how far it is.

use std::future::Future;
use std::io;
use std::sync::{Arc, Mutex};
use std::time::SystemTime;

use vdisk_api::{Error, JobKind, JobOptions, Map, RepairWhat, Reply, Result};
use vdisk_block::jobs::{JobState, OnError};
use vdisk_block::{Backend, Permissions, Use};

use super::{Job, JobEvent, Life, Status};
use crate::control::{Control, Event, images};

/// What a job on an image is told of its progress with; an error once the job is cancelled.
pub(in crate::control) fn progress_of(
    state: &Arc<JobState>,
) -> impl Fn(u64) -> io::Result<()> + Send + Sync + 'static {
    let state = state.clone();
    move |done| {
        state.reach(done);
        match state.is_cancelled() {
            true => Err(io::ErrorKind::Interrupted.into()),
            false => Ok(()),
        }
    }
}

impl Control {
    pub(super) async fn start_image_job(&mut self, options: JobOptions) -> Result<Reply> {
        let id = options.id.clone();
        let what = format!("job '{id}'");
        if self.world().jobs.contains_key(&id) {
            return Err(Error::exists(format!(
                "there is a job '{id}' already: choose another job-id, or dismiss that one"
            )));
        }
        let node = options.node.clone();
        let changed = {
            let (events, id) = (self.job_events.clone(), id.clone());
            move || {
                let _ = events.send(JobEvent::Changed { id: id.clone() });
            }
        };
        let state = JobState::new(0, [OnError::Report; 2], Box::new(changed));
        let job = Arc::new(Job {
            state: Arc::new(state),
            started: SystemTime::now(),
            source: node.clone(),
            target: node.clone(),
            group: None,
            life: Mutex::new(Life {
                status: Status::Running,
                finalizing: false,
                effective: false,
                running: None,
                parts: None,
                error: None,
                ended: None,
                found: Map::new(),
            }),
            options,
        });
        let thread = self.world().jobs_thread()?;
        let runtime = self.world().defaults.runtime.clone();
        match job.options.kind.clone() {
            JobKind::Create(create) => {
                job.state.expect(create.size);
                let progress = progress_of(&job.state);
                let made = images::create_on(thread, runtime, *create, progress);
                self.run_image_job(&job, async { made.await.map(|()| Map::new()) });
            }
            JobKind::CheckFile { file, repair } => {
                if !file.force_share {
                    let write = repair != RepairWhat::Nothing;
                    let world = self.world();
                    world.graph.check_not_open(&file.filename, write)?;
                }
                let found = images::check_on(thread, runtime, file, repair, job.state.clone());
                self.run_image_job(&job, found);
            }
            JobKind::Check { repair } => {
                let checked = self.start_node_check(&job, &what, repair).await;
                if let Err(e) = checked {
                    self.let_go(&job);
                    return Err(e);
                }
            }
            _ => return Err(Error::failed(format!("{what} is not about an image"))),
        }
        tracing::info!(
            job = id,
            operation = job.options.kind.name(),
            node,
            "job started"
        );
        self.world().jobs.insert(id.clone(), job.clone());
        self.events.push(Event::JobAdded(id));
        self.nodes_changed(&job);
        Ok(Reply::Done)
    }

    /// Shows a job that an earlier daemon did not bring to its end.
    pub(in crate::control) fn bury_job(&mut self, options: JobOptions, error: Error) {
        if options.auto_dismiss {
            return;
        }
        let target = options
            .target
            .clone()
            .unwrap_or_else(|| options.node.clone());
        let state = JobState::new(0, [OnError::Report; 2], Box::new(|| {}));
        let job = Job {
            state: Arc::new(state),
            started: SystemTime::now(),
            source: options.node.clone(),
            target,
            group: None,
            life: Mutex::new(Life {
                status: Status::Concluded,
                finalizing: false,
                effective: false,
                running: None,
                parts: None,
                error: Some(error),
                ended: Some(SystemTime::now()),
                found: Map::new(),
            }),
            options,
        };
        let id = job.id().to_owned();
        self.world().jobs.insert(id.clone(), Arc::new(job));
        self.events.push(Event::JobAdded(id));
    }

    async fn start_node_check(
        &mut self,
        job: &Arc<Job>,
        what: &str,
        repair: RepairWhat,
    ) -> Result<()> {
        let name = &job.options.node;
        let thread = self.world().jobs_thread()?;
        {
            let mut world = self.world();
            let node = world.graph.node(name).map_err(|e| e.context(what))?;
            images::check_can_check(&node, repair).map_err(|e| e.context(what))?;
            // Whatever else would change the image meanwhile would have to wait.
            world
                .graph
                .check_no_job(name)
                .and_then(|()| world.graph.check_not_written(name))
                .map_err(|e| e.context(what))?;
            let wants = Use {
                taken: Permissions::CONSISTENT_READ,
                shared: Permissions::ALL,
            };
            let root = Backend::new_fixed(what.to_owned(), node.clone());
            world.graph.attach(name, job.parent(), wants, root)?;
            world.graph.claim_still(name, job.id());
            job.state.expect(node.size());
        }
        let still = self.still(name).await?;
        let checked = still.check(thread, repair, job.state.clone());
        self.run_image_job(job, checked);
        Ok(())
    }

    fn run_image_job(
        &self,
        job: &Arc<Job>,
        work: impl Future<Output = Result<Map>> + Send + 'static,
    ) {
        let (events, id) = (self.job_events.clone(), job.id().to_owned());
        tokio::spawn(async move {
            let result = work.await;
            let _ = events.send(JobEvent::ImageEnded { id, result });
        });
    }

    pub(super) fn image_job_ended(&mut self, id: &str, result: Result<Map>) {
        let Ok(job) = self.world().job(id) else {
            return;
        };
        self.let_go(&job);
        match result {
            Ok(found) => {
                let (_, total) = job.state.progress();
                job.state.reach(total);
                job.life().found = found;
                self.conclude(&job, None);
            }
            Err(_) if job.state.is_cancelled() => {
                let error = Error::failed(format!("job '{id}' was cancelled"));
                self.conclude(&job, Some(error));
            }
            Err(e) => self.conclude(&job, Some(e)),
        }
    }
}
