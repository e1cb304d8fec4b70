//! org.vdisk1.IoThread

use vdisk_api::{Command, IoThreadUpdate};
use vdisk_dbus::export_path;
use vdisk_io::IoThread;
use zbus::OwnedObjectPath;
use zbus::interface;

use super::Failure;
use super::convert::{self, Options};
use super::statistics::{self, Statistics};
use crate::control::Handle;

pub struct IoThreadObject {
    pub control: Handle,
    pub name: String,
}

impl IoThreadObject {
    fn thread(&self) -> zbus::fdo::Result<IoThread> {
        let thread = self.control.world().thread(&self.name);
        thread.map_err(|e| zbus::fdo::Error::UnknownObject(e.message))
    }
}

#[interface(name = "org.vdisk1.IoThread", introspection_docs = false)]
impl IoThreadObject {
    async fn remove(&self, options: Options) -> Result<(), Failure> {
        convert::no_options(options)?;
        let name = self.name.clone();
        self.control.run(Command::RemoveIoThread { name }).await?;
        Ok(())
    }

    async fn update(&self, options: Options) -> Result<(), Failure> {
        let update = IoThreadUpdate::from_map(&self.name, convert::plain_options(options)?)?;
        let name = self.name.clone();
        let command = Command::UpdateIoThread { name, update };
        self.control.run(command).await?;
        Ok(())
    }

    #[zbus(out_args("statistics"))]
    async fn get_statistics(&self, options: Options) -> Result<Statistics, Failure> {
        convert::no_options(options)?;
        let thread = self.control.world().thread(&self.name)?;
        Ok(statistics::iothread(&thread.statistics()))
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn name(&self) -> String {
        self.name.clone()
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn engine(&self) -> zbus::fdo::Result<String> {
        Ok(self.thread()?.engine().to_string())
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn cpus(&self) -> zbus::fdo::Result<Vec<u32>> {
        Ok(self.thread()?.cpus().iter().map(|c| *c as u32).collect())
    }

    #[zbus(property)]
    fn poll_max(&self) -> zbus::fdo::Result<u64> {
        Ok(self.thread()?.poll_max().as_nanos() as u64)
    }

    #[zbus(property)]
    fn queues(&self) -> zbus::fdo::Result<Vec<(OwnedObjectPath, u16)>> {
        let thread = self.thread()?;
        let queues = self.control.world().queues_on(&thread);
        Ok(queues
            .into_iter()
            .map(|(id, queue)| (export_path(&id), queue))
            .collect())
    }
}
