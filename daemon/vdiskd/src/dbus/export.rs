//! org.vdisk1.Export and the interfaces of its kinds

use std::sync::Arc;

use vdisk_api::Command;
use vdisk_dbus::{iothread_path, node_path};
use vdisk_exports::Server;
use vdisk_exports::nbd::NbdSetup;
use vdisk_exports::virtio_blk::DeviceOptions;
use zbus::OwnedObjectPath;
use zbus::interface;

use super::Failure;
use super::convert::{self, Options};
use super::statistics::{self, Statistics};
use crate::control::{Export, Handle};

fn find(control: &Handle, id: &str) -> zbus::fdo::Result<Arc<Export>> {
    let export = control.world().export(id);
    export.map_err(|e| zbus::fdo::Error::UnknownObject(e.message))
}

pub struct ExportObject {
    pub control: Handle,
    pub id: String,
}

#[interface(name = "org.vdisk1.Export", introspection_docs = false)]
impl ExportObject {
    async fn remove(&self, options: Options) -> Result<(), Failure> {
        convert::no_options(options)?;
        let id = self.id.clone();
        self.control.run(Command::RemoveExport { id }).await?;
        Ok(())
    }

    #[zbus(out_args("statistics"))]
    async fn get_statistics(&self, options: Options) -> Result<Statistics, Failure> {
        convert::no_options(options)?;
        let export = self.control.world().export(&self.id)?;
        Ok(statistics::export(&export.server.statistics()))
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn id(&self) -> String {
        self.id.clone()
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn kind(&self) -> zbus::fdo::Result<String> {
        Ok(find(&self.control, &self.id)?.kind.to_owned())
    }

    #[zbus(property)]
    fn node(&self) -> zbus::fdo::Result<OwnedObjectPath> {
        Ok(node_path(&find(&self.control, &self.id)?.node()))
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn writable(&self) -> zbus::fdo::Result<bool> {
        Ok(find(&self.control, &self.id)?.writable)
    }

    #[zbus(property)]
    fn clients(&self) -> zbus::fdo::Result<u32> {
        Ok(find(&self.control, &self.id)?.server.clients())
    }

    #[zbus(property)]
    fn io_threads(&self) -> zbus::fdo::Result<Vec<OwnedObjectPath>> {
        let export = find(&self.control, &self.id)?;
        let threads = export.server.threads().iter();
        Ok(threads.map(|t| iothread_path(t.name())).collect())
    }

    #[zbus(property)]
    fn persistent(&self) -> zbus::fdo::Result<bool> {
        Ok(find(&self.control, &self.id)?.is_persistent())
    }

    async fn set_persistent(&self, on: bool, options: Options) -> Result<(), Failure> {
        convert::no_options(options)?;
        let export = self.id.clone();
        self.control
            .run(Command::SetPersistent { export, on })
            .await?;
        Ok(())
    }

    #[zbus(property)]
    fn path(&self) -> zbus::fdo::Result<String> {
        let export = find(&self.control, &self.id)?;
        let path = match export.slow_reason() {
            None => "fast",
            Some(_) => "slow",
        };
        Ok(path.to_owned())
    }

    #[zbus(property)]
    fn path_reason(&self) -> zbus::fdo::Result<String> {
        let export = find(&self.control, &self.id)?;
        Ok(export.slow_reason().unwrap_or_default())
    }
}

/// The path that front-ends or clients connect to; empty if a socket was passed.
fn socket(control: &Handle, id: &str) -> zbus::fdo::Result<String> {
    let export = find(control, id)?;
    let socket = export.server.socket();
    Ok(socket.map_or(String::new(), |p| p.display().to_string()))
}

pub struct NbdObject {
    pub control: Handle,
    pub id: String,
}

impl NbdObject {
    fn setup(&self) -> zbus::fdo::Result<NbdSetup> {
        match &find(&self.control, &self.id)?.server {
            Server::Nbd(e) => Ok(e.setup().clone()),
            _ => Err(zbus::fdo::Error::UnknownInterface(self.id.clone())),
        }
    }
}

#[interface(name = "org.vdisk1.Export.Nbd", introspection_docs = false)]
impl NbdObject {
    #[zbus(property(emits_changed_signal = "const"))]
    fn socket(&self) -> zbus::fdo::Result<String> {
        socket(&self.control, &self.id)
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn name(&self) -> zbus::fdo::Result<String> {
        Ok(self.setup()?.name)
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn description(&self) -> zbus::fdo::Result<String> {
        Ok(self.setup()?.description)
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn logical_block_size(&self) -> zbus::fdo::Result<u32> {
        Ok(self.setup()?.logical_block_size)
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn max_connections(&self) -> zbus::fdo::Result<u32> {
        Ok(self.setup()?.max_connections)
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn until_disconnect(&self) -> zbus::fdo::Result<bool> {
        Ok(self.setup()?.until_disconnect)
    }
}

pub struct VhostUserBlkObject {
    pub control: Handle,
    pub id: String,
}

impl VhostUserBlkObject {
    fn device(&self) -> zbus::fdo::Result<DeviceOptions> {
        match &find(&self.control, &self.id)?.server {
            Server::VhostUserBlk(e) => Ok(e.device().options.clone()),
            _ => Err(zbus::fdo::Error::UnknownInterface(self.id.clone())),
        }
    }
}

#[interface(name = "org.vdisk1.Export.VhostUserBlk", introspection_docs = false)]
impl VhostUserBlkObject {
    #[zbus(property(emits_changed_signal = "const"))]
    fn socket(&self) -> zbus::fdo::Result<String> {
        socket(&self.control, &self.id)
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn num_queues(&self) -> zbus::fdo::Result<u16> {
        Ok(find(&self.control, &self.id)?.server.threads().len() as u16)
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn queue_size(&self) -> zbus::fdo::Result<u16> {
        Ok(self.device()?.queue_size)
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn logical_block_size(&self) -> zbus::fdo::Result<u32> {
        Ok(self.device()?.logical_block_size)
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn physical_block_size(&self) -> zbus::fdo::Result<u32> {
        Ok(self.device()?.physical_block_size)
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn serial(&self) -> zbus::fdo::Result<String> {
        Ok(self.device()?.serial)
    }
}
