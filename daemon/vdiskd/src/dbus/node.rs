//! org.vdisk1.Node

use vdisk_api::{Command, Error};
use vdisk_block::{NodeInfo, Parent};
use vdisk_dbus::{export_path, node_path};
use zbus::interface;
use zbus::{OwnedObjectPath, Variant};

use super::Failure;
use super::convert::{self, Options};
use crate::control::Handle;

pub struct NodeObject {
    pub control: Handle,
    pub name: String,
}

impl NodeObject {
    fn info(&self) -> zbus::fdo::Result<NodeInfo> {
        let info = self.control.world().graph.info(&self.name);
        info.map_err(|e| zbus::fdo::Error::UnknownObject(e.message))
    }
}

#[interface(name = "org.vdisk1.Node", introspection_docs = false)]
impl NodeObject {
    async fn remove(&self, options: Options) -> Result<(), Failure> {
        convert::no_options(options)?;
        let name = self.name.clone();
        self.control.run(Command::RemoveNode { name }).await?;
        Ok(())
    }

    async fn resize(&self, size: u64, options: Options) -> Result<(), Failure> {
        let mut options = options;
        let shrink = match options.remove("shrink").as_deref() {
            None => false,
            Some(Variant::Bool(b)) => *b,
            Some(_) => {
                let e = Error::invalid("option 'shrink' is not a boolean: give true or false");
                return Err(e.into());
            }
        };
        convert::no_options(options)?;
        let name = self.name.clone();
        let command = Command::ResizeNode { name, size, shrink };
        self.control.run(command).await?;
        Ok(())
    }

    async fn flush(&self, options: Options) -> Result<(), Failure> {
        convert::no_options(options)?;
        let name = self.name.clone();
        self.control.run(Command::FlushNode { name }).await?;
        Ok(())
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn name(&self) -> String {
        self.name.clone()
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn driver(&self) -> zbus::fdo::Result<String> {
        Ok(self.info()?.node.driver_name().to_owned())
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn filename(&self) -> zbus::fdo::Result<String> {
        Ok(self.info()?.node.filename().unwrap_or_default())
    }

    #[zbus(property)]
    fn size(&self) -> zbus::fdo::Result<u64> {
        Ok(self.info()?.node.size())
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn read_only(&self) -> zbus::fdo::Result<bool> {
        Ok(self.info()?.node.is_read_only())
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn implicit(&self) -> zbus::fdo::Result<bool> {
        Ok(self.info()?.implicit)
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn children(&self) -> zbus::fdo::Result<Vec<(String, OwnedObjectPath)>> {
        let children = self.info()?.children.into_iter();
        Ok(children
            .map(|(role, name)| (role.to_owned(), node_path(&name)))
            .collect())
    }

    #[zbus(property)]
    fn parents(&self) -> zbus::fdo::Result<Vec<(String, OwnedObjectPath)>> {
        let parents = self.info()?.parents.into_iter();
        Ok(parents
            .map(|p| match p {
                Parent::Node(name) => ("node".to_owned(), node_path(&name)),
                Parent::Export(id) => ("export".to_owned(), export_path(&id)),
            })
            .collect())
    }
}
