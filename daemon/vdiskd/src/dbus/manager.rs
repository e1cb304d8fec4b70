//! org.vdisk1.Manager

use std::collections::HashMap;
use std::time::SystemTime;

use vdisk_api::{
    AmendImage, Command, CreateImage, DRIVERS, Error, ExportKind, ExportOptions, ImageFile,
    IoThreadOptions, JobOptions, NodeOptions, Reply, SecretOptions, ThrottleLimits, Transaction,
    check_from_map,
};
use vdisk_dbus::{export_path, iothread_path, job_path, node_path};
use zbus::interface;
use zbus::{OwnedObjectPath, Variant};

use super::Failure;
use super::convert::{self, Options};
use super::statistics::{self, Statistics};
use crate::control::{Handle, images, secrets, throttle};

pub struct ManagerObject(pub Handle);

impl ManagerObject {
    async fn add_passed_node(&self, options: Options) -> Result<OwnedObjectPath, Failure> {
        let (options, _passed) = convert::node_options(options, &self.0)?;
        let options = images::followed(&self.0, options).await?;
        let options = NodeOptions::from_map(options)?;
        let name = options.node_name.clone().unwrap_or_default();
        let reply = self.0.run(Command::AddNode(options)).await?;
        let name = match reply {
            Reply::Nodes(names) => names.into_iter().next().unwrap_or(name),
            Reply::Done | Reply::Found(_) | Reply::Moved { .. } => name,
        };
        Ok(node_path(&name))
    }
}

#[interface(name = "org.vdisk1.Manager", introspection_docs = false)]
impl ManagerObject {
    #[zbus(out_args("node"))]
    async fn add_node(&self, options: Options) -> Result<OwnedObjectPath, Failure> {
        let added = self.add_passed_node(options).await;
        if added.is_err() {
            // What was passed with it has no use any more.
            self.0.save().await;
        }
        added
    }

    #[zbus(out_args("export"))]
    async fn add_export(&self, options: Options) -> Result<OwnedObjectPath, Failure> {
        let (map, socket) = convert::options(options)?;
        let options = ExportOptions::from_map(map, socket)?;
        let path = export_path(&options.id);
        self.0.run(Command::AddExport(options)).await?;
        Ok(path)
    }

    #[zbus(out_args("iothread"))]
    async fn add_io_thread(
        &self,
        name: String,
        options: Options,
    ) -> Result<OwnedObjectPath, Failure> {
        let path = iothread_path(&name);
        let options = IoThreadOptions::from_map(name, convert::plain_options(options)?)?;
        self.0.run(Command::AddIoThread(options)).await?;
        Ok(path)
    }

    #[zbus(out_args("statistics"))]
    async fn get_statistics(&self, options: Options) -> Result<Statistics, Failure> {
        convert::no_options(options)?;
        let world = self.0.world();
        let exports: Statistics = world
            .exports
            .iter()
            .map(|(id, e)| {
                let s = statistics::export(&e.server.statistics());
                (id.clone(), statistics::owned(Variant::from(s)))
            })
            .collect();
        let threads: Statistics = world
            .threads
            .iter()
            .map(|(name, t)| {
                let s = statistics::iothread(&t.statistics());
                (name.clone(), statistics::owned(Variant::from(s)))
            })
            .collect();
        Ok(HashMap::from([
            (
                "exports".to_owned(),
                statistics::owned(Variant::from(exports)),
            ),
            (
                "iothreads".to_owned(),
                statistics::owned(Variant::from(threads)),
            ),
        ]))
    }

    #[zbus(out_args("jobs", "report"))]
    async fn transaction(
        &self,
        actions: Vec<(String, Options)>,
        options: Options,
    ) -> Result<(Vec<OwnedObjectPath>, Statistics), Failure> {
        let actions = actions
            .into_iter()
            .map(|(kind, map)| Ok((kind, convert::plain_options(map)?)));
        let actions = actions.collect::<vdisk_api::Result<_>>()?;
        let options = convert::plain_options(options)?;
        let transaction = Transaction::from_maps(actions, options)?;
        let reply = self.0.run(Command::Transaction(transaction)).await?;
        let (jobs, paused) = match reply {
            Reply::Moved { names, paused } => (names, paused),
            _ => Default::default(),
        };
        let paused = Variant::from(paused.as_nanos() as u64);
        Ok((
            jobs.iter().map(|id| job_path(id)).collect(),
            Statistics::from([("paused-ns".to_owned(), statistics::owned(paused))]),
        ))
    }

    async fn add_secret(&self, id: String, options: Options) -> Result<(), Failure> {
        let options = SecretOptions::new(id, convert::secret_sources(options)?)?;
        Ok(secrets::add(&self.0, options).await?)
    }

    async fn remove_secret(&self, id: String, options: Options) -> Result<(), Failure> {
        convert::no_options(options)?;
        Ok(secrets::remove(&self.0, &id)?)
    }

    async fn set_throttle_group(&self, name: String, limits: Options) -> Result<(), Failure> {
        let limits = ThrottleLimits::from_map(&name, convert::plain_options(limits)?)?;
        Ok(throttle::set(&self.0, &name, limits).await?)
    }

    async fn remove_throttle_group(&self, name: String, options: Options) -> Result<(), Failure> {
        convert::no_options(options)?;
        Ok(throttle::remove(&self.0, &name).await?)
    }

    #[zbus(out_args("groups"))]
    async fn list_throttle_groups(
        &self,
        options: Options,
    ) -> Result<HashMap<String, Statistics>, Failure> {
        convert::no_options(options)?;
        let all = throttle::all(&self.0).list();
        let limits = |g: &vdisk_block::ThrottleGroup| {
            let mut map = g.limits().to_map();
            map.insert("members".into(), g.members().into());
            convert::dictionary(&map)
        };
        Ok(all
            .iter()
            .map(|g| (g.name().to_owned(), limits(g)))
            .collect())
    }

    async fn create_image(&self, options: Options) -> Result<(), Failure> {
        let options = CreateImage::from_map(convert::plain_options(options)?)?;
        Ok(images::create(&self.0, options).await?)
    }

    #[zbus(out_args("job"))]
    async fn start_image_job(
        &self,
        operation: String,
        options: Options,
    ) -> Result<OwnedObjectPath, Failure> {
        let options = convert::plain_options(options)?;
        let options = JobOptions::from_image_map(&operation, options)?;
        let path = job_path(&options.id);
        self.0.run(Command::StartJob(options)).await?;
        Ok(path)
    }

    #[zbus(out_args("sizes"))]
    async fn measure_image(&self, options: Options) -> Result<Statistics, Failure> {
        let options = convert::plain_options(options)?;
        Ok(convert::dictionary(
            &images::measure(&self.0, options).await?,
        ))
    }

    #[zbus(out_args("info"))]
    async fn get_image_info(&self, options: Options) -> Result<Statistics, Failure> {
        let file = ImageFile::from_map(convert::plain_options(options)?)?;
        Ok(convert::dictionary(&images::info(&self.0, file).await?))
    }

    #[zbus(out_args("report"))]
    async fn check_image(&self, options: Options) -> Result<Statistics, Failure> {
        let (file, repair) = check_from_map(convert::plain_options(options)?)?;
        let report = images::check(&self.0, file, repair).await?;
        Ok(convert::dictionary(&report))
    }

    #[zbus(out_args("extents"))]
    async fn map_image(&self, start: u64, options: Options) -> Result<Vec<Statistics>, Failure> {
        let file = ImageFile::from_map(convert::plain_options(options)?)?;
        let extents = images::extents(&self.0, file, start).await?;
        Ok(extents.iter().map(convert::dictionary).collect())
    }

    async fn amend_image(&self, options: Options) -> Result<(), Failure> {
        let options = AmendImage::from_map(convert::plain_options(options)?)?;
        Ok(images::amend(&self.0, options).await?)
    }

    async fn forget_lost(
        &self,
        kind: String,
        name: String,
        options: Options,
    ) -> Result<(), Failure> {
        convert::no_options(options)?;
        let is_export = match kind.as_str() {
            "export" => true,
            "node" => false,
            _ => {
                let e = format!("kind '{kind}': there are 'export' and 'node'");
                return Err(Error::invalid(e).into());
            }
        };
        self.0.run(Command::ForgetLost { is_export, name }).await?;
        Ok(())
    }

    #[zbus(property(emits_changed_signal = "false"))]
    fn secrets(&self) -> Vec<String> {
        secrets::all(&self.0).ids()
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn start_time(&self) -> u64 {
        let since = self
            .0
            .world()
            .started
            .duration_since(SystemTime::UNIX_EPOCH);
        since.map_or(0, |d| d.as_micros() as u64)
    }

    #[zbus(property)]
    fn problems(&self) -> Vec<String> {
        self.0.world().all_problems()
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn version(&self) -> String {
        env!("CARGO_PKG_VERSION").to_owned()
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn drivers(&self) -> Vec<String> {
        DRIVERS.map(str::to_owned).to_vec()
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn export_kinds(&self) -> Vec<String> {
        ExportKind::NAMES.map(str::to_owned).to_vec()
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn io_engine(&self) -> String {
        self.0.world().engine.to_string()
    }
}
