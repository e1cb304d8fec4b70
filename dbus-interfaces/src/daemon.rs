//! The daemon at the other end of a bus.

use zbus::connection::Builder;
use zbus::fdo::ObjectManagerProxy;
use zbus::{Connection, OwnedObjectPath};

use crate::ROOT_PATH;
use crate::path::{export_path, iothread_path, job_path, node_path};
use crate::proxies::{BitmapProxy, ExportProxy, IoThreadProxy, JobProxy, ManagerProxy, NodeProxy};

/// A bus on which a daemon may be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Bus {
    System,
    Session,
    /// At this D-Bus address.
    Address(String),
}

/// A connection to a bus, and the name of the daemon there.
#[derive(Clone, Debug)]
pub struct Daemon {
    connection: Connection,
    name: String,
}

impl Daemon {
    /// Connects to the bus. `name` is that of the daemon on it, see [`crate::bus_name`].
    ///
    /// # Errors
    /// If the bus cannot be reached, or its address is none. Whether a daemon is there is not asked.
    pub async fn connect(bus: &Bus, name: String) -> zbus::Result<Daemon> {
        let builder = match bus {
            Bus::Address(address) => Builder::address(address.parse::<zbus::Address>()?),
            Bus::Session => Builder::session(),
            Bus::System => Builder::system(),
        };
        let connection = builder.build().await?;
        Ok(Daemon { connection, name })
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
