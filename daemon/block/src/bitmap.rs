//! Dirty bitmaps: which pieces of a node were written since some moment.
//!
//! A bitmap records a write before the write is done. What is cleared or taken out while everybody above is drained is
//! therefore an exact cut: it has all writes before, and none after.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

use vdisk_io::{Bits, Recorder};

use crate::drivers::{LocalFuture, SlowReason};
use crate::tap::{Held, Tap, Written};

/// See the module.
pub struct Bitmap {
    name: String,
    recorder: Arc<Recorder>,
    /// The image of the node keeps it, and records writes itself.
    persistent: bool,
    /// The job that has taken bits out, and may put them back.
    user: Mutex<Option<String>>,
}

impl Bitmap {
    pub(crate) fn is_of(&self, recorder: &Arc<Recorder>) -> bool {
        Arc::ptr_eq(&self.recorder, recorder)
    }

    pub(crate) fn new(name: &str, recorder: Arc<Recorder>, persistent: bool) -> Arc<Bitmap> {
        Arc::new(Bitmap {
            name: name.to_owned(),
            recorder,
            persistent,
            user: Mutex::default(),
        })
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// It outlives the node, in the image.
    pub fn is_persistent(&self) -> bool {
        self.persistent
    }

    /// Bytes that one bit stands for.
    pub fn granularity(&self) -> u64 {
        self.recorder.bits().granularity()
    }

    /// Bytes that are dirty.
    pub fn count(&self) -> u64 {
        self.recorder.bits().count()
    }

    pub fn is_recording(&self) -> bool {
        self.recorder.is_recording()
    }

    pub fn set_recording(&self, on: bool) {
        self.recorder.set_recording(on);
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
        self.recorder.take()
    }

    /// Sets what `bits` has set.
    pub fn merge(&self, bits: &Bits) {
        self.recorder.bits().merge(bits);
    }

    /// All of the node has changed at once: records that as a write of it. Everything above is drained.
    pub fn set_all(&self) {
        let size = self.recorder.bits().size();
        self.recorder.record(&(0..size));
    }

    /// What it has at the moment.
    pub fn bits(&self) -> Arc<Bits> {
        self.recorder.bits()
    }

    /// The node has another size. Everything above is drained.
    pub(crate) fn fit(&self, size: u64) {
        // The image does so itself.
        if !self.persistent {
            self.recorder.fit(size);
        }
    }
}

impl Tap for Bitmap {
    #[inline]
    fn fast_write(&self, offset: u64, len: u64) -> Option<SlowReason> {
        self.recorder.record(&(offset..offset + len));
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
