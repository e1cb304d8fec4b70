//! The test harness: private daemons, real guests, raw vhost-user front-ends.

mod daemon;
mod guest;
mod lab;
mod qmp;

pub mod blk_client;
pub mod frontend;

pub use daemon::{Daemon, Scratch, program, scratch, vdiskctl_binary};
pub use guest::{Guest, GuestOptions};
pub use lab::{lab, lab_path};
pub use qmp::Qmp;

use std::time::{Duration, Instant};

/// Looks again and again until something is there; panics after a minute.
pub fn wait_for<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + Duration::from_secs(60);
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < end, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}
