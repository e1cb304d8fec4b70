//! Write thresholds (QAPI `block-set-write-threshold`): who manages thin storage is told before it is full.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use crate::drivers::{LocalFuture, SlowReason};
use crate::tap::{Held, Tap, Written};

/// Told by how many bytes a write reaches beyond the threshold.
type Tell = Box<dyn Fn(u64) + Send + Sync>;

/// Tells once, of the first write that reaches beyond an offset.
pub(crate) struct Threshold {
    limit: u64,
    told: AtomicBool,
    tell: Tell,
}

impl Threshold {
    pub fn new(limit: u64, tell: Tell) -> Threshold {
        Threshold {
            limit,
            told: AtomicBool::new(false),
            tell,
        }
    }

    /// The offset in bytes, as long as it has not been reached.
    pub fn limit(&self) -> Option<u64> {
        (!self.told.load(Relaxed)).then_some(self.limit)
    }

    fn is_beyond(&self, offset: u64, len: u64) -> bool {
        offset + len > self.limit && !self.told.load(Relaxed)
    }
}

impl Tap for Threshold {
    #[inline]
    fn fast_write(&self, offset: u64, len: u64) -> Option<SlowReason> {
        self.is_beyond(offset, len).then_some(SlowReason::Threshold)
    }

    fn slow_reason(&self) -> Option<SlowReason> {
        None
    }

    fn before(&self, offset: u64, len: u64) -> LocalFuture<'_, io::Result<Held<'_>>> {
        if self.is_beyond(offset, len) && !self.told.swap(true, Relaxed) {
            (self.tell)(offset + len - self.limit);
        }
        Box::pin(async { Ok(None) })
    }

    fn after<'a>(&'a self, _: u64, _: u64, _: Written, _: Held<'a>) -> LocalFuture<'a, ()> {
        Box::pin(async {})
    }
}
