//! Split virtqueues, guest memory and virtio-blk requests (Virtual I/O Device specification 1.3,
//! sections 2.7 and 5.2), for every export that speaks virtio.
//!
//! A guest is hostile: what it shares changes while we look at it. Every descriptor is therefore read
//! once, checked, and only the copy is used; every address is translated and bounded before use.

mod dirty_log;
mod memory;
mod ring;
mod sigbus;

pub mod blk;

pub use dirty_log::DirtyLog;
pub use memory::{GuestMemory, GuestRegion, MemoryError};
pub use ring::{Chain, RingAddresses, RingError, SplitRing, USED_EVENT_SUPPRESS};
