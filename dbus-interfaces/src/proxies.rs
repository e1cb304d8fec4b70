//! Proxies; see the XML files for what everything means.

use std::collections::HashMap;

use zbus::proxy;
use zbus::{OwnedObjectPath, OwnedVariant, Variant};

type Options<'a> = HashMap<&'a str, Variant<'a>>;
type Statistics = HashMap<String, OwnedVariant>;

#[proxy(
    interface = "org.vdisk1.Manager",
    default_service = "org.vdisk1",
    default_path = "/org/vdisk1"
)]
pub trait Manager {
    #[zbus(allow_interactive_auth)]
    fn add_node(&self, options: Options<'_>) -> zbus::Result<OwnedObjectPath>;
    #[zbus(allow_interactive_auth)]
    fn add_export(&self, options: Options<'_>) -> zbus::Result<OwnedObjectPath>;
    #[zbus(allow_interactive_auth)]
    fn add_io_thread(&self, name: &str, options: Options<'_>) -> zbus::Result<OwnedObjectPath>;
    #[zbus(allow_interactive_auth)]
    fn get_statistics(&self, options: Options<'_>) -> zbus::Result<Statistics>;
    #[zbus(allow_interactive_auth)]
    fn transaction(
        &self,
        actions: Vec<(&str, Options<'_>)>,
        options: Options<'_>,
    ) -> zbus::Result<(Vec<OwnedObjectPath>, Statistics)>;
    #[zbus(allow_interactive_auth)]
    fn add_secret(&self, id: &str, options: Options<'_>) -> zbus::Result<()>;
    #[zbus(allow_interactive_auth)]
    fn remove_secret(&self, id: &str, options: Options<'_>) -> zbus::Result<()>;
    #[zbus(allow_interactive_auth)]
    fn set_throttle_group(&self, name: &str, limits: Options<'_>) -> zbus::Result<()>;
    #[zbus(allow_interactive_auth)]
    fn remove_throttle_group(&self, name: &str, options: Options<'_>) -> zbus::Result<()>;
    #[zbus(allow_interactive_auth)]
    fn list_throttle_groups(
        &self,
        options: Options<'_>,
    ) -> zbus::Result<HashMap<String, Statistics>>;
    #[zbus(allow_interactive_auth)]
    fn create_image(&self, options: Options<'_>) -> zbus::Result<()>;
    #[zbus(allow_interactive_auth)]
    fn start_image_job(
        &self,
        operation: &str,
        options: Options<'_>,
    ) -> zbus::Result<OwnedObjectPath>;
    #[zbus(allow_interactive_auth)]
    fn measure_image(&self, options: Options<'_>) -> zbus::Result<Statistics>;
    #[zbus(allow_interactive_auth)]
    fn get_image_info(&self, options: Options<'_>) -> zbus::Result<Statistics>;
    #[zbus(allow_interactive_auth)]
    fn check_image(&self, options: Options<'_>) -> zbus::Result<Statistics>;
    #[zbus(allow_interactive_auth)]
    fn map_image(&self, start: u64, options: Options<'_>) -> zbus::Result<Vec<Statistics>>;
    #[zbus(allow_interactive_auth)]
    fn amend_image(&self, options: Options<'_>) -> zbus::Result<()>;
    #[zbus(allow_interactive_auth)]
    fn forget_lost(&self, kind: &str, name: &str, options: Options<'_>) -> zbus::Result<()>;
    #[zbus(property(emits_changed_signal = "false"))]
    fn secrets(&self) -> zbus::Result<Vec<String>>;
    #[zbus(property(emits_changed_signal = "const"))]
    fn start_time(&self) -> zbus::Result<u64>;
    #[zbus(property)]
    fn problems(&self) -> zbus::Result<Vec<String>>;
    #[zbus(property(emits_changed_signal = "const"))]
    fn version(&self) -> zbus::Result<String>;
    #[zbus(property(emits_changed_signal = "const"))]
    fn drivers(&self) -> zbus::Result<Vec<String>>;
    #[zbus(property(emits_changed_signal = "const"))]
    fn export_kinds(&self) -> zbus::Result<Vec<String>>;
    #[zbus(property(emits_changed_signal = "const"))]
    fn io_engine(&self) -> zbus::Result<String>;
}

#[proxy(interface = "org.vdisk1.Node", default_service = "org.vdisk1")]
pub trait Node {
    #[zbus(allow_interactive_auth)]
    fn remove(&self, options: Options<'_>) -> zbus::Result<()>;
    #[zbus(allow_interactive_auth)]
    fn resize(&self, size: u64, options: Options<'_>) -> zbus::Result<()>;
    #[zbus(allow_interactive_auth)]
    fn reopen(&self, options: Options<'_>) -> zbus::Result<()>;
    #[zbus(allow_interactive_auth)]
    fn replace(&self, with: &str, options: Options<'_>) -> zbus::Result<Statistics>;
    #[zbus(allow_interactive_auth)]
    fn set_active(&self, active: bool, options: Options<'_>) -> zbus::Result<()>;
    #[zbus(property)]
    fn active(&self) -> zbus::Result<bool>;
    #[zbus(allow_interactive_auth)]
    fn set_write_threshold(&self, threshold: u64, options: Options<'_>) -> zbus::Result<()>;
    #[zbus(signal)]
    fn write_threshold_exceeded(&self, threshold: u64, amount: u64) -> zbus::Result<()>;
    #[zbus(property)]
    fn write_threshold(&self) -> zbus::Result<u64>;
    #[zbus(property)]
    fn discard_mode(&self) -> zbus::Result<String>;
    #[zbus(property)]
    fn detect_zeroes(&self) -> zbus::Result<String>;
    #[zbus(allow_interactive_auth)]
    fn flush(&self, options: Options<'_>) -> zbus::Result<()>;
    fn go_on(&self, tag: &str, options: Options<'_>) -> zbus::Result<()>;
    #[zbus(allow_interactive_auth)]
    fn check(&self, options: Options<'_>) -> zbus::Result<Statistics>;
    #[zbus(allow_interactive_auth)]
    fn get_image_info(&self, options: Options<'_>) -> zbus::Result<Statistics>;
    #[zbus(allow_interactive_auth)]
    fn add_overlay(&self, options: Options<'_>) -> zbus::Result<(OwnedObjectPath, Statistics)>;
    #[zbus(allow_interactive_auth)]
    fn insert_filter(&self, options: Options<'_>) -> zbus::Result<(OwnedObjectPath, Statistics)>;
    #[zbus(allow_interactive_auth)]
    fn take_out(&self, options: Options<'_>) -> zbus::Result<Statistics>;
    #[zbus(allow_interactive_auth)]
    fn add_bitmap(&self, name: &str, options: Options<'_>) -> zbus::Result<OwnedObjectPath>;
    #[zbus(allow_interactive_auth)]
    fn mirror(&self, options: Options<'_>) -> zbus::Result<OwnedObjectPath>;
    #[zbus(allow_interactive_auth)]
    fn backup(&self, options: Options<'_>) -> zbus::Result<OwnedObjectPath>;
    #[zbus(allow_interactive_auth)]
    fn convert(&self, options: Options<'_>) -> zbus::Result<OwnedObjectPath>;
    #[zbus(allow_interactive_auth)]
    fn commit(&self, options: Options<'_>) -> zbus::Result<OwnedObjectPath>;
    #[zbus(allow_interactive_auth)]
    fn stream(&self, options: Options<'_>) -> zbus::Result<OwnedObjectPath>;
    #[zbus(allow_interactive_auth)]
    fn discard(&self, options: Options<'_>) -> zbus::Result<OwnedObjectPath>;
    #[zbus(allow_interactive_auth)]
    fn start_check(&self, options: Options<'_>) -> zbus::Result<OwnedObjectPath>;
    #[zbus(allow_interactive_auth)]
    fn create_snapshot(&self, name: &str, options: Options<'_>) -> zbus::Result<Statistics>;
    #[zbus(allow_interactive_auth)]
    fn apply_snapshot(&self, name: &str, options: Options<'_>) -> zbus::Result<Statistics>;
    #[zbus(allow_interactive_auth)]
    fn delete_snapshot(&self, name: &str, options: Options<'_>) -> zbus::Result<Statistics>;
    #[zbus(property(emits_changed_signal = "const"))]
    fn name(&self) -> zbus::Result<String>;
    #[zbus(property(emits_changed_signal = "const"))]
    fn driver(&self) -> zbus::Result<String>;
    #[zbus(property(emits_changed_signal = "const"))]
    fn filename(&self) -> zbus::Result<String>;
    #[zbus(property)]
    fn size(&self) -> zbus::Result<u64>;
    #[zbus(property)]
    fn read_only(&self) -> zbus::Result<bool>;
    #[zbus(property(emits_changed_signal = "const"))]
    fn implicit(&self) -> zbus::Result<bool>;
    #[zbus(property)]
    fn children(&self) -> zbus::Result<Vec<(String, OwnedObjectPath)>>;
    #[zbus(property)]
    fn parents(&self) -> zbus::Result<Vec<(String, OwnedObjectPath)>>;
}

#[proxy(interface = "org.vdisk1.Export", default_service = "org.vdisk1")]
pub trait Export {
    #[zbus(allow_interactive_auth)]
    fn remove(&self, options: Options<'_>) -> zbus::Result<()>;
    #[zbus(allow_interactive_auth)]
    fn get_statistics(&self, options: Options<'_>) -> zbus::Result<Statistics>;
    #[zbus(property(emits_changed_signal = "const"))]
    fn id(&self) -> zbus::Result<String>;
    #[zbus(property(emits_changed_signal = "const"))]
    fn kind(&self) -> zbus::Result<String>;
    #[zbus(property)]
    fn node(&self) -> zbus::Result<OwnedObjectPath>;
    #[zbus(property(emits_changed_signal = "const"))]
    fn writable(&self) -> zbus::Result<bool>;
    #[zbus(property)]
    fn clients(&self) -> zbus::Result<u32>;
    #[zbus(property)]
    fn persistent(&self) -> zbus::Result<bool>;
    #[zbus(allow_interactive_auth)]
    fn set_persistent(&self, on: bool, options: Options<'_>) -> zbus::Result<()>;
    #[zbus(property)]
    fn io_threads(&self) -> zbus::Result<Vec<OwnedObjectPath>>;
    #[zbus(property, name = "Path")]
    fn request_path(&self) -> zbus::Result<String>;
    #[zbus(property)]
    fn path_reason(&self) -> zbus::Result<String>;
}

#[proxy(interface = "org.vdisk1.Export.Nbd", default_service = "org.vdisk1")]
pub trait Nbd {
    #[zbus(property(emits_changed_signal = "const"))]
    fn socket(&self) -> zbus::Result<String>;
    #[zbus(property(emits_changed_signal = "const"))]
    fn name(&self) -> zbus::Result<String>;
    #[zbus(property(emits_changed_signal = "const"))]
    fn description(&self) -> zbus::Result<String>;
    #[zbus(property(emits_changed_signal = "const"))]
    fn logical_block_size(&self) -> zbus::Result<u32>;
    #[zbus(property(emits_changed_signal = "const"))]
    fn max_connections(&self) -> zbus::Result<u32>;
    #[zbus(property(emits_changed_signal = "const"))]
    fn until_disconnect(&self) -> zbus::Result<bool>;
}

#[proxy(
    interface = "org.vdisk1.Export.VhostUserBlk",
    default_service = "org.vdisk1"
)]
pub trait VhostUserBlk {
    #[zbus(property(emits_changed_signal = "const"))]
    fn socket(&self) -> zbus::Result<String>;
    #[zbus(property(emits_changed_signal = "const"))]
    fn num_queues(&self) -> zbus::Result<u16>;
    #[zbus(property(emits_changed_signal = "const"))]
    fn queue_size(&self) -> zbus::Result<u16>;
    #[zbus(property(emits_changed_signal = "const"))]
    fn logical_block_size(&self) -> zbus::Result<u32>;
    #[zbus(property(emits_changed_signal = "const"))]
    fn physical_block_size(&self) -> zbus::Result<u32>;
    #[zbus(property(emits_changed_signal = "const"))]
    fn serial(&self) -> zbus::Result<String>;
}

#[proxy(interface = "org.vdisk1.IoThread", default_service = "org.vdisk1")]
pub trait IoThread {
    #[zbus(allow_interactive_auth)]
    fn remove(&self, options: Options<'_>) -> zbus::Result<()>;
    #[zbus(allow_interactive_auth)]
    fn update(&self, options: Options<'_>) -> zbus::Result<()>;
    #[zbus(allow_interactive_auth)]
    fn get_statistics(&self, options: Options<'_>) -> zbus::Result<Statistics>;
    #[zbus(property(emits_changed_signal = "const"))]
    fn name(&self) -> zbus::Result<String>;
    #[zbus(property(emits_changed_signal = "const"))]
    fn engine(&self) -> zbus::Result<String>;
    #[zbus(property(emits_changed_signal = "const"))]
    fn cpus(&self) -> zbus::Result<Vec<u32>>;
    #[zbus(property)]
    fn poll_max(&self) -> zbus::Result<u64>;
    #[zbus(property)]
    fn queues(&self) -> zbus::Result<Vec<(OwnedObjectPath, u16)>>;
}

#[proxy(interface = "org.vdisk1.Job", default_service = "org.vdisk1")]
pub trait Job {
    #[zbus(allow_interactive_auth)]
    fn pause(&self, options: Options<'_>) -> zbus::Result<()>;
    #[zbus(allow_interactive_auth)]
    fn resume(&self, options: Options<'_>) -> zbus::Result<()>;
    #[zbus(allow_interactive_auth)]
    fn cancel(&self, options: Options<'_>) -> zbus::Result<()>;
    #[zbus(allow_interactive_auth)]
    fn complete(&self, options: Options<'_>) -> zbus::Result<()>;
    #[zbus(allow_interactive_auth)]
    fn finalize(&self, options: Options<'_>) -> zbus::Result<()>;
    #[zbus(allow_interactive_auth)]
    fn dismiss(&self, options: Options<'_>) -> zbus::Result<()>;
    #[zbus(allow_interactive_auth)]
    fn set_speed(&self, speed: u64, options: Options<'_>) -> zbus::Result<()>;
    #[zbus(allow_interactive_auth)]
    fn change(&self, options: Options<'_>) -> zbus::Result<()>;
    #[zbus(signal)]
    fn completed(&self, success: bool, message: String) -> zbus::Result<()>;
    #[zbus(property(emits_changed_signal = "const"))]
    fn id(&self) -> zbus::Result<String>;
    #[zbus(property(emits_changed_signal = "const"))]
    fn operation(&self) -> zbus::Result<String>;
    #[zbus(property)]
    fn state(&self) -> zbus::Result<String>;
    #[zbus(property(emits_changed_signal = "false"))]
    fn progress(&self) -> zbus::Result<f64>;
    #[zbus(property(emits_changed_signal = "false"))]
    fn progress_total(&self) -> zbus::Result<u64>;
    #[zbus(property(emits_changed_signal = "false"))]
    fn progress_done(&self) -> zbus::Result<u64>;
    #[zbus(property(emits_changed_signal = "false"))]
    fn rate(&self) -> zbus::Result<u64>;
    #[zbus(property)]
    fn speed(&self) -> zbus::Result<u64>;
    #[zbus(property)]
    fn copy_mode(&self) -> zbus::Result<String>;
    #[zbus(property(emits_changed_signal = "const"))]
    fn start_time(&self) -> zbus::Result<u64>;
    #[zbus(property(emits_changed_signal = "false"))]
    fn expected_end_time(&self) -> zbus::Result<u64>;
    #[zbus(property)]
    fn cancelable(&self) -> zbus::Result<bool>;
    #[zbus(property)]
    fn error(&self) -> zbus::Result<(String, String)>;
    #[zbus(property(emits_changed_signal = "false"))]
    fn result(&self) -> zbus::Result<Statistics>;
    #[zbus(property(emits_changed_signal = "const"))]
    fn objects(&self) -> zbus::Result<Vec<OwnedObjectPath>>;
}

#[proxy(interface = "org.vdisk1.Bitmap", default_service = "org.vdisk1")]
pub trait Bitmap {
    #[zbus(allow_interactive_auth)]
    fn remove(&self, options: Options<'_>) -> zbus::Result<()>;
    #[zbus(allow_interactive_auth)]
    fn clear(&self, options: Options<'_>) -> zbus::Result<()>;
    #[zbus(allow_interactive_auth)]
    fn enable(&self, options: Options<'_>) -> zbus::Result<()>;
    #[zbus(allow_interactive_auth)]
    fn disable(&self, options: Options<'_>) -> zbus::Result<()>;
    #[zbus(allow_interactive_auth)]
    fn merge(&self, sources: Vec<String>, options: Options<'_>) -> zbus::Result<()>;
    #[zbus(property(emits_changed_signal = "const"))]
    fn name(&self) -> zbus::Result<String>;
    #[zbus(property(emits_changed_signal = "const"))]
    fn node(&self) -> zbus::Result<OwnedObjectPath>;
    #[zbus(property(emits_changed_signal = "const"))]
    fn granularity(&self) -> zbus::Result<u64>;
    #[zbus(property(emits_changed_signal = "const"))]
    fn persistent(&self) -> zbus::Result<bool>;
    #[zbus(property)]
    fn recording(&self) -> zbus::Result<bool>;
    #[zbus(property(emits_changed_signal = "false"))]
    fn count(&self) -> zbus::Result<u64>;
    #[zbus(property(emits_changed_signal = "false"))]
    fn job(&self) -> zbus::Result<OwnedObjectPath>;
}
