//! The virtio-blk device behind every virtio export: what it offers, and its queues.

mod device;
mod inflight;
mod queue;

pub use device::{Device, DeviceOptions};
pub use inflight::{InflightError, InflightLayout, InflightQueue, InflightRegion};
pub use queue::{Logging, Queue, QueueSetup};
