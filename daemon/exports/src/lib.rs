//! How vdiskd offers its nodes to guests, hosts and applications: one folder for each kind of export.

mod keeper;
mod listener;
mod server;
mod statistics;

pub mod nbd;
pub mod vhost_user;
pub mod virtio_blk;

pub use keeper::{Keeper, Left};
pub use server::{ExportEvent, Server};
pub use statistics::{Histogram, KindCounters, QueueCounters, QueueStats, RequestClass};
