//! Survives guest memory that disappears.
//!
//! The memory that a front-end shares is a file which it may truncate; touching a page beyond the new
//! end raises SIGBUS. The handler puts an anonymous zero page there, notes that the mapping is broken
//! and lets the access go on; the queue that uses the mapping sees the note and stops. Faults anywhere
//! else end the process as before.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, Once};

const SLOTS: usize = 4096;

struct Slot {
    /// 0 while the slot is free.
    start: AtomicUsize,
    len: AtomicUsize,
    /// Bytes of a page of the mapping, which may be a huge one.
    page: AtomicUsize,
    broken: AtomicBool,
}

static TABLE: [Slot; SLOTS] = [const {
    Slot {
        start: AtomicUsize::new(0),
        len: AtomicUsize::new(0),
        page: AtomicUsize::new(0),
        broken: AtomicBool::new(false),
    }
}; SLOTS];
static WRITERS: Mutex<()> = Mutex::new(());
static INSTALL: Once = Once::new();

/// Watches one mapping until dropped.
pub(crate) struct Guard(usize);

impl Guard {
    /// Watches `len` bytes at `start`, in pages of `page` bytes; None if too many mappings are watched.
    pub fn new(start: usize, len: usize, page: usize) -> Option<Guard> {
        INSTALL.call_once(install);
        let _lock = WRITERS.lock().unwrap_or_else(|e| e.into_inner());
        let index = TABLE
            .iter()
            .position(|s| s.start.load(Ordering::Relaxed) == 0)?;
        let slot = &TABLE[index];
        slot.broken.store(false, Ordering::Relaxed);
        slot.len.store(len, Ordering::Relaxed);
        slot.page.store(page, Ordering::Relaxed);
        slot.start.store(start, Ordering::Release);
        Some(Guard(index))
    }

    pub fn is_broken(&self) -> bool {
        TABLE[self.0].broken.load(Ordering::Relaxed)
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        let _lock = WRITERS.lock().unwrap_or_else(|e| e.into_inner());
        TABLE[self.0].start.store(0, Ordering::Release);
    }
}

fn install() {
    // SAFETY: the handler only uses atomics, mmap and sigaction, all async-signal-safe.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handle as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_NODEFER;
        libc::sigaction(libc::SIGBUS, &action, std::ptr::null_mut());
    }
}

extern "C" fn handle(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid siginfo for SIGBUS; mmap and sigaction get valid arguments.
    unsafe {
        let address = (*info).si_addr() as usize;
        for slot in &TABLE {
            let start = slot.start.load(Ordering::Acquire);
            let len = slot.len.load(Ordering::Relaxed);
            if start == 0 || address < start || address - start >= len {
                continue;
            }
            slot.broken.store(true, Ordering::Relaxed);
            let page = slot.page.load(Ordering::Relaxed);
            let mapped = libc::mmap(
                (address & !(page - 1)) as *mut libc::c_void,
                page,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED,
                -1,
                0,
            );
            if mapped != libc::MAP_FAILED {
                return;
            }
        }
        // Not ours: the default action happens when the access is tried again.
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = libc::SIG_DFL;
        libc::sigaction(libc::SIGBUS, &action, std::ptr::null_mut());
    }
}
