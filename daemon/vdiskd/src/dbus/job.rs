//! org.vdisk1.Job

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use vdisk_api::{Command, CopyMode, JobAction, cancel_from_map, change_from_map};
use vdisk_dbus::node_path;
use zbus::object_server::SignalEmitter;
use zbus::{OwnedObjectPath, interface};

use super::Failure;
use super::convert::{self, Options};
use super::statistics::Statistics;
use crate::control::Handle;
use crate::control::jobs::{Job, Status};

pub struct JobObject {
    pub control: Handle,
    pub job: Arc<Job>,
}

/// Microseconds since the epoch.
fn micros(t: SystemTime) -> u64 {
    t.duration_since(UNIX_EPOCH)
        .map_or(0, |d| d.as_micros() as u64)
}

impl JobObject {
    async fn act(&self, options: Options, action: JobAction) -> Result<(), Failure> {
        convert::no_options(options)?;
        self.act_with(action).await
    }

    async fn act_with(&self, action: JobAction) -> Result<(), Failure> {
        let id = self.job.id().to_owned();
        self.control.run(Command::Job { id, action }).await?;
        Ok(())
    }

    fn is_over(&self) -> bool {
        matches!(self.job.status(), Status::Concluded | Status::Aborting)
    }

    /// Success, and what went wrong.
    pub fn outcome(&self) -> (bool, String) {
        match self.job.error() {
            None => (true, String::new()),
            Some(e) => (false, e.message),
        }
    }
}

#[interface(name = "org.vdisk1.Job", introspection_docs = false)]
impl JobObject {
    async fn pause(&self, options: Options) -> Result<(), Failure> {
        self.act(options, JobAction::Pause).await
    }

    async fn resume(&self, options: Options) -> Result<(), Failure> {
        self.act(options, JobAction::Resume).await
    }

    async fn cancel(&self, options: Options) -> Result<(), Failure> {
        let action = cancel_from_map(self.job.id(), convert::plain_options(options)?)?;
        self.act_with(action).await
    }

    async fn complete(&self, options: Options) -> Result<(), Failure> {
        self.act(options, JobAction::Complete).await
    }

    async fn finalize(&self, options: Options) -> Result<(), Failure> {
        self.act(options, JobAction::Finalize).await
    }

    async fn dismiss(&self, options: Options) -> Result<(), Failure> {
        self.act(options, JobAction::Dismiss).await
    }

    async fn set_speed(&self, speed: u64, options: Options) -> Result<(), Failure> {
        self.act(options, JobAction::SetSpeed(speed)).await
    }

    async fn change(&self, options: Options) -> Result<(), Failure> {
        let action = change_from_map(self.job.id(), convert::plain_options(options)?)?;
        self.act_with(action).await
    }

    #[zbus(signal)]
    pub async fn completed(
        emitter: &SignalEmitter<'_>,
        success: bool,
        message: String,
    ) -> zbus::Result<()>;

    #[zbus(property(emits_changed_signal = "const"))]
    fn id(&self) -> String {
        self.job.id().to_owned()
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn operation(&self) -> String {
        self.job.options.kind.name().to_owned()
    }

    #[zbus(property)]
    fn state(&self) -> String {
        self.job.status().name().to_owned()
    }

    #[zbus(property(emits_changed_signal = "false"))]
    fn progress(&self) -> f64 {
        match self.job.state.progress() {
            (_, 0) => f64::from(u8::from(self.job.state.is_ready())),
            (done, total) => done as f64 / total as f64,
        }
    }

    #[zbus(property(emits_changed_signal = "false"))]
    fn progress_total(&self) -> u64 {
        self.job.state.progress().1
    }

    #[zbus(property(emits_changed_signal = "false"))]
    fn progress_done(&self) -> u64 {
        self.job.state.progress().0
    }

    #[zbus(property(emits_changed_signal = "false"))]
    fn rate(&self) -> u64 {
        let end = self.job.ended().unwrap_or_else(SystemTime::now);
        let time = end.duration_since(self.job.started).unwrap_or_default();
        let (done, _) = self.job.state.progress();
        (done as f64 / time.as_secs_f64().max(0.001)) as u64
    }

    #[zbus(property)]
    fn speed(&self) -> u64 {
        self.job.state.speed()
    }

    #[zbus(property)]
    fn copy_mode(&self) -> String {
        match self.job.copy_mode() {
            None => "",
            Some(CopyMode::Background) => "background",
            Some(CopyMode::WriteBlocking) => "write-blocking",
        }
        .to_owned()
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn start_time(&self) -> u64 {
        micros(self.job.started)
    }

    #[zbus(property(emits_changed_signal = "false"))]
    fn expected_end_time(&self) -> u64 {
        if let Some(ended) = self.job.ended() {
            return micros(ended);
        }
        let (done, total) = self.job.state.progress();
        let now = SystemTime::now();
        let time = now.duration_since(self.job.started).unwrap_or_default();
        if done == 0 || self.job.status() != Status::Running {
            return 0;
        }
        micros(now + time.mul_f64((total - done) as f64 / done as f64))
    }

    #[zbus(property)]
    fn cancelable(&self) -> bool {
        !self.is_over()
    }

    #[zbus(property)]
    fn error(&self) -> (String, String) {
        match self.job.error() {
            None => Default::default(),
            Some(e) => (
                format!("{}{}", vdisk_dbus::ERROR_PREFIX, e.kind.name()),
                e.message,
            ),
        }
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn objects(&self) -> Vec<OwnedObjectPath> {
        let mut nodes = vec![&self.job.source, &self.job.target];
        nodes.dedup();
        nodes.retain(|n| !n.is_empty());
        nodes.into_iter().map(|n| node_path(n)).collect()
    }

    #[zbus(property(emits_changed_signal = "false"))]
    fn result(&self) -> Statistics {
        convert::dictionary(&self.job.found())
    }
}
