//! Commands on I/O threads.

use vdisk_api::{Error, IoThreadOptions, IoThreadUpdate, Reply, Result};
use vdisk_io::{IoThread, IoThreadConfig, StartError};

use super::{Control, Event};

impl Control {
    pub(super) fn add_iothread(&mut self, options: IoThreadOptions) -> Result<Reply> {
        let name = options.name;
        let mut world = self.world();
        if world.threads.contains_key(&name) {
            return Err(Error::exists(format!(
                "there is an I/O thread '{name}' already: choose another name, or remove it first"
            )));
        }
        let config = IoThreadConfig {
            name: name.clone(),
            engine: world.defaults.engine,
            cpus: options.cpus,
            poll_max: options.poll_max.unwrap_or(world.defaults.poll_max),
        };
        let thread = IoThread::start(config).map_err(|e| {
            let message = format!("I/O thread '{name}': {e}");
            match e {
                StartError::Affinity { .. } => Error::invalid(message),
                StartError::Engine(_) => Error::not_supported(message),
                StartError::Thread(_) => Error::failed(message),
            }
        })?;
        tracing::info!(iothread = name, engine = %thread.engine(), "I/O thread added");
        world.threads.insert(name.clone(), thread);
        drop(world);
        self.events.push(Event::IoThreadAdded(name));
        Ok(Reply::Done)
    }

    pub(super) fn update_iothread(&mut self, name: &str, update: IoThreadUpdate) -> Result<Reply> {
        let thread = self.world().thread(name)?;
        if let Some(max) = update.poll_max {
            thread.set_poll_max(max);
        }
        self.events.push(Event::IoThreadChanged(name.to_owned()));
        Ok(Reply::Done)
    }

    pub(super) fn remove_iothread(&mut self, name: &str) -> Result<Reply> {
        let mut world = self.world();
        let thread = world.thread(name)?;
        if let Some((export, queue)) = world.queues_on(&thread).first() {
            return Err(Error::in_use(format!(
                "I/O thread '{name}' serves queue {queue} of export '{export}': remove the export first"
            )));
        }
        if let Some(job) = world.jobs.values().find(|j| j.runs_on(&thread)) {
            return Err(Error::in_use(format!(
                "I/O thread '{name}' does the work of job '{}': wait for its end, or cancel it",
                job.id()
            )));
        }
        if world.threads.len() == 1 {
            return Err(Error::in_use(format!(
                "I/O thread '{name}' is the last one: add another first"
            )));
        }
        world.threads.remove(name);
        drop(world);
        thread.stop();
        tracing::info!(iothread = name, "I/O thread removed");
        self.events.push(Event::IoThreadRemoved(name.to_owned()));
        Ok(Reply::Done)
    }
}
