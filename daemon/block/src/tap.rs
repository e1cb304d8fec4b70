//! What is told of every write to a node: bitmaps that record them, and jobs that must act before or after.

use std::io;
use std::ops::Range;

use vdisk_io::{IoVecs, RangeGuard};

use crate::drivers::{LocalFuture, SlowReason};

/// What was written.
#[derive(Clone)]
pub(crate) enum Written {
    Data {
        iov: IoVecs,
        /// Nobody else can have changed it since.
        stable: bool,
    },
    Zeroes {
        may_unmap: bool,
    },
    Discarded,
}

/// What a tap holds while a write is under way.
pub(crate) struct Hold<'a> {
    pub _guard: RangeGuard<'a>,
    /// What it has marked for the write, and may unmark.
    pub marked: Vec<Range<u64>>,
}

pub(crate) type Held<'a> = Option<Hold<'a>>;

/// Sees the writes to a node, from when it was added. Writes that were under way then may not be seen: whoever adds it drains
/// the node, or waits for [`vdisk_io::quiesce`] afterwards.
pub(crate) trait Tap: Send + Sync {
    /// A write would go straight to the storage: the reason if it may not. Must not block, allocate or lock.
    fn fast_write(&self, offset: u64, len: u64) -> Option<SlowReason>;

    /// Why writes take the slow path, if they do at the moment.
    fn slow_reason(&self) -> Option<SlowReason>;

    /// It writes the data a second time: the guest must not be able to change it in between.
    fn needs_stable(&self) -> bool {
        false
    }

    /// Before a write on the slow path; an error is that of the write.
    fn before(&self, offset: u64, len: u64) -> LocalFuture<'_, io::Result<Held<'_>>>;

    /// The write has succeeded.
    fn after<'a>(
        &'a self,
        offset: u64,
        len: u64,
        written: Written,
        held: Held<'a>,
    ) -> LocalFuture<'a, ()>;
}
