//! org.vdisk1.Node

use vdisk_api::{
    BitmapAction, BitmapOptions, Command, Error, JobOptions, NodeChange, NodeOptions, RepairWhat,
    Reply, SnapshotAction,
};
use vdisk_block::{NodeInfo, Parent};
use vdisk_dbus::{bitmap_path, export_path, job_path, node_path};
use zbus::interface;
use zbus::object_server::SignalEmitter;
use zbus::{OwnedObjectPath, Variant};

use super::Failure;
use super::convert::{self, Options};
use super::statistics::{self, Statistics};
use crate::control::{Handle, images};

pub struct NodeObject {
    pub control: Handle,
    pub name: String,
}

impl NodeObject {
    fn info(&self) -> zbus::fdo::Result<NodeInfo> {
        let info = self.control.world().graph.info(&self.name);
        info.map_err(|e| zbus::fdo::Error::UnknownObject(e.message))
    }

    async fn found(&self, command: Command) -> Result<Statistics, Failure> {
        match self.control.run(command).await? {
            Reply::Found(map) => Ok(convert::dictionary(&map)),
            Reply::Done | Reply::Nodes(_) | Reply::Moved { .. } => Ok(Statistics::new()),
        }
    }

    /// Says how long guests had to wait.
    async fn move_nodes(&self, command: Command) -> Result<Statistics, Failure> {
        let paused = match self.control.run(command).await? {
            Reply::Moved { paused, .. } => paused.as_nanos() as u64,
            _ => 0,
        };
        Ok(Statistics::from([(
            "paused-ns".to_owned(),
            statistics::owned(Variant::from(paused)),
        )]))
    }

    async fn start(&self, kind: &str, options: Options) -> Result<OwnedObjectPath, Failure> {
        let options = JobOptions::from_map(kind, &self.name, convert::plain_options(options)?)?;
        let path = job_path(&options.id);
        self.control.run(Command::StartJob(options)).await?;
        Ok(path)
    }

    async fn snapshot(
        &self,
        action: SnapshotAction,
        snapshot: String,
        options: Options,
    ) -> Result<Statistics, Failure> {
        convert::no_options(options)?;
        let node = self.name.clone();
        self.found(Command::Snapshot {
            node,
            action,
            snapshot,
        })
        .await
    }
}

impl NodeObject {
    async fn add_passed_overlay(
        &self,
        options: Options,
    ) -> Result<(OwnedObjectPath, Statistics), Failure> {
        let (options, _passed) = convert::node_options(options, &self.control)?;
        let overlay = NodeOptions::from_map(options)?;
        let name = overlay.node_name.clone().unwrap_or_default();
        let node = self.name.clone();
        let report = self
            .move_nodes(Command::AddOverlay { node, overlay })
            .await?;
        Ok((node_path(&name), report))
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

    async fn go_on(&self, tag: &str, options: Options) -> Result<(), Failure> {
        convert::no_options(options)?;
        // Not a command: those wait for requests that wait for this.
        let node = self.control.world().graph.node(&self.name)?;
        match node.go_on(tag) {
            true => Ok(()),
            false => Err(Failure::NotFound(format!(
                "node '{}' has no request suspended under tag '{tag}': see its property Suspended",
                self.name
            ))),
        }
    }

    #[zbus(out_args("report"))]
    async fn check(&self, options: Options) -> Result<Statistics, Failure> {
        let repair = RepairWhat::from_map(convert::plain_options(options)?)?;
        let name = self.name.clone();
        self.found(Command::CheckNode { name, repair }).await
    }

    #[zbus(out_args("info"))]
    async fn get_image_info(&self, options: Options) -> Result<Statistics, Failure> {
        convert::no_options(options)?;
        let info = images::node_info(&self.control, &self.name).await?;
        Ok(convert::dictionary(&info))
    }

    #[zbus(out_args("overlay", "report"))]
    async fn add_overlay(
        &self,
        options: Options,
    ) -> Result<(OwnedObjectPath, Statistics), Failure> {
        let added = self.add_passed_overlay(options).await;
        if added.is_err() {
            // What was passed with it has no use any more.
            self.control.save().await;
        }
        added
    }

    #[zbus(out_args("filter", "report"))]
    async fn insert_filter(
        &self,
        options: Options,
    ) -> Result<(OwnedObjectPath, Statistics), Failure> {
        let mut map = convert::plain_options(options)?;
        if map.contains_key("file") {
            let e = Error::invalid(format!(
                "option 'file' is given, but it is node '{}': leave it out",
                self.name
            ));
            return Err(e.into());
        }
        map.insert("file".into(), self.name.clone().into());
        let filter = NodeOptions::from_map(map)?;
        let name = filter.node_name.clone().unwrap_or_default();
        let node = self.name.clone();
        let report = self
            .move_nodes(Command::InsertFilter { node, filter })
            .await?;
        Ok((node_path(&name), report))
    }

    #[zbus(out_args("report"))]
    async fn replace(&self, with: String, options: Options) -> Result<Statistics, Failure> {
        convert::no_options(options)?;
        let node = self.name.clone();
        self.move_nodes(Command::ReplaceNode { node, with }).await
    }

    async fn reopen(&self, options: Options) -> Result<(), Failure> {
        let change = NodeChange::from_map(&self.name, convert::plain_options(options)?)?;
        let node = self.name.clone();
        self.control
            .run(Command::ReopenNode { node, change })
            .await?;
        Ok(())
    }

    async fn set_active(&self, active: bool, options: Options) -> Result<(), Failure> {
        convert::no_options(options)?;
        let node = self.name.clone();
        self.control
            .run(Command::SetActive { node, active })
            .await?;
        Ok(())
    }

    async fn set_write_threshold(&self, threshold: u64, options: Options) -> Result<(), Failure> {
        convert::no_options(options)?;
        let node = self.name.clone();
        let command = Command::SetWriteThreshold { node, threshold };
        self.control.run(command).await?;
        Ok(())
    }

    #[zbus(signal)]
    pub async fn write_threshold_exceeded(
        emitter: &SignalEmitter<'_>,
        threshold: u64,
        amount: u64,
    ) -> zbus::Result<()>;

    #[zbus(property)]
    fn write_threshold(&self) -> u64 {
        let node = self.control.world().graph.node(&self.name);
        node.map_or(0, |n| n.write_threshold())
    }

    #[zbus(property(emits_changed_signal = "false"))]
    fn suspended(&self) -> Vec<String> {
        let node = self.control.world().graph.node(&self.name);
        node.map_or_else(|_| Vec::new(), |n| n.suspended())
    }

    #[zbus(property)]
    fn active(&self) -> bool {
        let node = self.control.world().graph.node(&self.name);
        node.is_ok_and(|n| n.is_active())
    }

    #[zbus(property)]
    fn discard_mode(&self) -> String {
        let node = self.control.world().graph.node(&self.name);
        let unmaps = node.is_ok_and(|n| n.discards());
        if unmaps { "unmap" } else { "ignore" }.to_owned()
    }

    #[zbus(property)]
    fn detect_zeroes(&self) -> String {
        let node = self.control.world().graph.node(&self.name);
        node.map_or("off", |n| n.detect_zeroes().name()).to_owned()
    }

    #[zbus(out_args("report"))]
    async fn take_out(&self, options: Options) -> Result<Statistics, Failure> {
        convert::no_options(options)?;
        let name = self.name.clone();
        self.move_nodes(Command::TakeOut { name }).await
    }

    #[zbus(out_args("bitmap"))]
    async fn add_bitmap(&self, name: String, options: Options) -> Result<OwnedObjectPath, Failure> {
        let map = convert::plain_options(options)?;
        let options = BitmapOptions::from_map(&self.name, &name, map)?;
        let path = bitmap_path(&self.name, &name);
        let node = self.name.clone();
        let action = BitmapAction::Add(options);
        self.control.run(Command::Bitmap { node, action }).await?;
        Ok(path)
    }

    #[zbus(out_args("job"))]
    async fn mirror(&self, options: Options) -> Result<OwnedObjectPath, Failure> {
        self.start("mirror", options).await
    }

    #[zbus(out_args("job"))]
    async fn backup(&self, options: Options) -> Result<OwnedObjectPath, Failure> {
        self.start("backup", options).await
    }

    #[zbus(out_args("job"))]
    async fn convert(&self, options: Options) -> Result<OwnedObjectPath, Failure> {
        self.start("convert", options).await
    }

    #[zbus(out_args("job"))]
    async fn commit(&self, options: Options) -> Result<OwnedObjectPath, Failure> {
        self.start("commit", options).await
    }

    #[zbus(out_args("job"))]
    async fn stream(&self, options: Options) -> Result<OwnedObjectPath, Failure> {
        self.start("stream", options).await
    }

    #[zbus(out_args("job"))]
    async fn discard(&self, options: Options) -> Result<OwnedObjectPath, Failure> {
        self.start("discard", options).await
    }

    #[zbus(out_args("job"))]
    async fn start_check(&self, options: Options) -> Result<OwnedObjectPath, Failure> {
        self.start("check", options).await
    }

    #[zbus(out_args("snapshot"))]
    async fn create_snapshot(&self, name: String, options: Options) -> Result<Statistics, Failure> {
        self.snapshot(SnapshotAction::Create, name, options).await
    }

    #[zbus(out_args("snapshot"))]
    async fn apply_snapshot(&self, name: String, options: Options) -> Result<Statistics, Failure> {
        self.snapshot(SnapshotAction::Apply, name, options).await
    }

    #[zbus(out_args("snapshot"))]
    async fn delete_snapshot(&self, name: String, options: Options) -> Result<Statistics, Failure> {
        self.snapshot(SnapshotAction::Delete, name, options).await
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

    #[zbus(property)]
    fn read_only(&self) -> zbus::fdo::Result<bool> {
        Ok(self.info()?.node.is_read_only())
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn implicit(&self) -> zbus::fdo::Result<bool> {
        Ok(self.info()?.implicit)
    }

    #[zbus(property)]
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
                Parent::Job(id) => ("job".to_owned(), job_path(&id)),
            })
            .collect())
    }
}
