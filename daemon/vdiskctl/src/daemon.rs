//! The daemon at the other end of the bus.

use vdisk_dbus::{
    BitmapProxy, ExportProxy, IoThreadProxy, JobProxy, ManagerProxy, NodeProxy, ROOT_PATH,
    export_path, iothread_path, job_path, node_path,
};
use zbus::connection::Builder;
use zbus::fdo::ObjectManagerProxy;
use zbus::{Connection, OwnedObjectPath};

use crate::args::Args;
use crate::error::{Error, Result};

/// A connection to a bus, and the name of the daemon there.
pub struct Daemon {
    connection: Connection,
    name: String,
}

impl Daemon {
    pub async fn connect(args: &Args) -> Result<Daemon> {
        let name = vdisk_dbus::bus_name(args.instance.as_deref()).map_err(Error::invalid)?;
        let builder = match &args.bus_address {
            Some(address) => {
                let parsed: zbus::Address = address
                    .parse()
                    .map_err(|e| Error::invalid(format!("bus address '{address}': {e}")))?;
                Builder::address(parsed)
            }
            None if args.session => Builder::session(),
            None => Builder::system(),
        };
        Ok(Daemon {
            connection: builder.build().await?,
            name,
        })
    }

    pub async fn manager(&self) -> zbus::Result<ManagerProxy<'_>> {
        let proxy = ManagerProxy::builder(&self.connection);
        proxy.destination(self.name.as_str()).build().await
    }

    pub async fn objects(&self) -> zbus::Result<ObjectManagerProxy<'_>> {
        let name = self.name.as_str();
        ObjectManagerProxy::new(&self.connection, name, ROOT_PATH).await
    }

    pub async fn node(&self, name: &str) -> zbus::Result<NodeProxy<'_>> {
        let proxy = NodeProxy::builder(&self.connection).path(node_path(name));
        proxy.destination(self.name.as_str()).build().await
    }

    pub async fn export(&self, id: &str) -> zbus::Result<ExportProxy<'_>> {
        let proxy = ExportProxy::builder(&self.connection).path(export_path(id));
        proxy.destination(self.name.as_str()).build().await
    }

    pub async fn iothread(&self, name: &str) -> zbus::Result<IoThreadProxy<'_>> {
        let proxy = IoThreadProxy::builder(&self.connection).path(iothread_path(name));
        proxy.destination(self.name.as_str()).build().await
    }

    pub async fn job(&self, id: &str) -> zbus::Result<JobProxy<'_>> {
        let proxy = JobProxy::builder(&self.connection).path(job_path(id));
        proxy.destination(self.name.as_str()).build().await
    }

    pub async fn bitmap(&self, path: OwnedObjectPath) -> zbus::Result<BitmapProxy<'_>> {
        let proxy = BitmapProxy::builder(&self.connection).path(path);
        proxy.destination(self.name.as_str()).build().await
    }
}
