//! Dirty bitmaps: which pieces of a node were written since some moment.
//!
//! A bitmap records a write before the write is done. What is cleared or taken out while everybody above is drained is
//! therefore an exact cut: it has all writes before, and none after.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard};

use arc_swap::ArcSwap;
use vdisk_io::Bits;

use crate::drivers::{LocalFuture, SlowReason};
use crate::tap::{Held, Tap, Written};

/// See the module.
pub struct Bitmap {
    name: String,
    bits: ArcSwap<Bits>,
    recording: AtomicBool,
    /// The job that has taken bits out, and may put them back.
    user: Mutex<Option<String>>,
}

impl Bitmap {
    /// For a node of `size` bytes; `granularity` is in bytes, a power of two.
    pub(crate) fn new(name: &str, size: u64, granularity: u64, recording: bool) -> Arc<Bitmap> {
        Arc::new(Bitmap {
            name: name.to_owned(),
            bits: ArcSwap::from_pointee(Bits::new(size, granularity)),
            recording: AtomicBool::new(recording),
            user: Mutex::default(),
        })
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// Bytes that one bit stands for.
    pub fn granularity(&self) -> u64 {
        self.bits.load().granularity()
    }

    /// Bytes that are dirty.
    pub fn count(&self) -> u64 {
        self.bits.load().count()
    }

    pub fn is_recording(&self) -> bool {
        self.recording.load(Relaxed)
    }

    pub fn set_recording(&self, on: bool) {
        self.recording.store(on, Relaxed);
    }

    fn user_slot(&self) -> MutexGuard<'_, Option<String>> {
        self.user.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// The job that uses it.
    pub fn user(&self) -> Option<String> {
        self.user_slot().clone()
    }

    pub fn set_user(&self, job: Option<String>) {
        *self.user_slot() = job;
    }

    /// Takes all bits out; what is recorded from now on is kept beside them. Everything above is drained.
    pub fn take(&self) -> Arc<Bits> {
        let size = self.bits.load().size();
        self.bits
            .swap(Arc::new(Bits::new(size, self.granularity())))
    }

    /// Sets what `bits` has set.
    pub fn merge(&self, bits: &Bits) {
        self.bits.load().merge(bits);
    }

    /// What it has at the moment.
    pub fn bits(&self) -> Arc<Bits> {
        self.bits.load_full()
    }

    /// The node has another size. Everything above is drained.
    pub(crate) fn fit(&self, size: u64) {
        let old = self.bits();
        let new = Bits::new(size, old.granularity());
        new.merge(&old);
        self.bits.store(Arc::new(new));
    }
}

impl Tap for Bitmap {
    #[inline]
    fn fast_write(&self, offset: u64, len: u64) -> Option<SlowReason> {
        if self.is_recording() {
            self.bits.load().set(&(offset..offset + len));
        }
        None
    }

    fn slow_reason(&self) -> Option<SlowReason> {
        None
    }

    fn before(&self, offset: u64, len: u64) -> LocalFuture<'_, io::Result<Held<'_>>> {
        self.fast_write(offset, len);
        Box::pin(async { Ok(None) })
    }

    fn after<'a>(&'a self, _: u64, _: u64, _: Written, _: Held<'a>) -> LocalFuture<'a, ()> {
        Box::pin(async {})
    }
}
