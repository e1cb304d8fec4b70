//! org.vdisk1.Bitmap

use std::sync::Arc;

use vdisk_api::{BitmapAction, Command};
use vdisk_block::Bitmap;
use vdisk_dbus::{job_path, node_path};
use zbus::{OwnedObjectPath, interface};

use super::Failure;
use super::convert::{self, Options};
use crate::control::{Handle, bitmaps};

pub struct BitmapObject {
    pub control: Handle,
    pub node: String,
    pub name: String,
}

impl BitmapObject {
    fn bitmap(&self) -> zbus::fdo::Result<Arc<Bitmap>> {
        let node = self.control.world().graph.node(&self.node);
        let found = node.and_then(|n| bitmaps::find(&n, &self.name));
        found.map_err(|e| zbus::fdo::Error::UnknownObject(e.message))
    }

    async fn act(&self, options: Options, action: BitmapAction) -> Result<(), Failure> {
        convert::no_options(options)?;
        let node = self.node.clone();
        self.control.run(Command::Bitmap { node, action }).await?;
        Ok(())
    }
}

#[interface(name = "org.vdisk1.Bitmap", introspection_docs = false)]
impl BitmapObject {
    async fn remove(&self, options: Options) -> Result<(), Failure> {
        let name = self.name.clone();
        self.act(options, BitmapAction::Remove { name }).await
    }

    async fn clear(&self, options: Options) -> Result<(), Failure> {
        let name = self.name.clone();
        self.act(options, BitmapAction::Clear { name }).await
    }

    async fn enable(&self, options: Options) -> Result<(), Failure> {
        let name = self.name.clone();
        self.act(options, BitmapAction::Enable { name, on: true })
            .await
    }

    async fn disable(&self, options: Options) -> Result<(), Failure> {
        let name = self.name.clone();
        self.act(options, BitmapAction::Enable { name, on: false })
            .await
    }

    async fn merge(&self, sources: Vec<String>, options: Options) -> Result<(), Failure> {
        let name = self.name.clone();
        self.act(options, BitmapAction::Merge { name, sources })
            .await
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn name(&self) -> String {
        self.name.clone()
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn node(&self) -> OwnedObjectPath {
        node_path(&self.node)
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn granularity(&self) -> zbus::fdo::Result<u64> {
        Ok(self.bitmap()?.granularity())
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn persistent(&self) -> zbus::fdo::Result<bool> {
        Ok(self.bitmap()?.is_persistent())
    }

    #[zbus(property)]
    fn recording(&self) -> zbus::fdo::Result<bool> {
        Ok(self.bitmap()?.is_recording())
    }

    #[zbus(property(emits_changed_signal = "false"))]
    fn count(&self) -> zbus::fdo::Result<u64> {
        Ok(self.bitmap()?.count())
    }

    #[zbus(property(emits_changed_signal = "false"))]
    fn job(&self) -> zbus::fdo::Result<OwnedObjectPath> {
        let job = self.bitmap()?.user();
        Ok(job.map_or_else(OwnedObjectPath::default, |job| job_path(&job)))
    }
}
