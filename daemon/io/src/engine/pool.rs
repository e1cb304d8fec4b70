//! Threads that do blocking operations for one I/O thread.

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

use crate::op::{OpKind, RawOp};
use crate::thread::Shared;

/// Enough to keep a disk busy from one I/O thread.
const MAX_WORKERS: usize = 16;
/// Writes to the page cache that are reported together: the guest sees the first of many while the rest runs.
const WRITE_BATCH: usize = 16;
/// A worker without work goes away after this time.
const IDLE: Duration = Duration::from_secs(10);

/// `_IO(0x12, 119)` and `_IO(0x12, 127)` of linux/fs.h: take a pointer to offset and length.
const BLKDISCARD: libc::Ioctl = 0x1277;
const BLKZEROOUT: libc::Ioctl = 0x127f;

struct Job {
    key: u32,
    op: RawOp,
}

// SAFETY: the pointers in the operation stay valid until the reactor has seen its result, on whatever
// thread they are used.
unsafe impl Send for Job {}

#[derive(Default)]
struct State {
    jobs: VecDeque<Job>,
    /// Writes to the page cache. One worker does them all: the kernel lets one at a time into a file anyway.
    writes: VecDeque<Job>,
    has_writer: bool,
    workers: usize,
    idle: usize,
    closing: bool,
}

struct Inner {
    state: Mutex<State>,
    work: Condvar,
    write_work: Condvar,
    done: Mutex<Vec<(u32, i32)>>,
    has_done: AtomicBool,
    shared: Arc<Shared>,
}

fn locked<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(|e| e.into_inner())
}

pub(crate) struct Pool(Arc<Inner>);

impl Pool {
    pub fn new(shared: &Arc<Shared>) -> Pool {
        Pool(Arc::new(Inner {
            state: Mutex::default(),
            work: Condvar::new(),
            write_work: Condvar::new(),
            done: Mutex::default(),
            has_done: AtomicBool::new(false),
            shared: shared.clone(),
        }))
    }

    pub fn push(&self, key: u32, op: RawOp) {
        let mut state = locked(&self.0.state);
        state.jobs.push_back(Job { key, op });
        if state.jobs.len() > state.idle && state.workers < MAX_WORKERS {
            let inner = self.0.clone();
            let spawned = std::thread::Builder::new()
                .name("vdiskd-worker".into())
                .spawn(move || inner.work());
            match spawned {
                Ok(_) => state.workers += 1,
                Err(e) if state.workers == 0 => {
                    // Nobody would ever take the job: fail it (and others that wait with it).
                    for job in state.jobs.drain(..) {
                        let errno = e.raw_os_error().unwrap_or(libc::EAGAIN);
                        self.0.finish(&[(job.key, -errno)]);
                    }
                }
                Err(_) => {}
            }
        }
        drop(state);
        self.0.work.notify_one();
    }

    /// Does a write to the page cache in the one thread for them, in the order of the calls.
    pub fn push_write(&self, key: u32, op: RawOp) {
        let mut state = locked(&self.0.state);
        state.writes.push_back(Job { key, op });
        if !state.has_writer {
            let inner = self.0.clone();
            let spawned = std::thread::Builder::new()
                .name("vdiskd-writer".into())
                .spawn(move || inner.write_back());
            match spawned {
                Ok(_) => state.has_writer = true,
                Err(e) => {
                    state.writes.pop_back();
                    let errno = e.raw_os_error().unwrap_or(libc::EAGAIN);
                    self.0.finish(&[(key, -errno)]);
                }
            }
            return;
        }
        let first = state.writes.len() == 1;
        drop(state);
        if first {
            self.0.write_work.notify_one();
        }
    }

    /// Takes a job back that no worker has started.
    pub fn cancel(&self, key: u32) {
        let mut state = locked(&self.0.state);
        let state = &mut *state;
        for jobs in [&mut state.jobs, &mut state.writes] {
            if let Some(at) = jobs.iter().position(|j| j.key == key) {
                jobs.remove(at);
                self.0.finish(&[(key, -libc::ECANCELED)]);
                return;
            }
        }
    }

    pub fn has_done(&self) -> bool {
        self.0.has_done.load(Ordering::Acquire)
    }

    pub fn take_done(&self) -> Vec<(u32, i32)> {
        let mut done = locked(&self.0.done);
        self.0.has_done.store(false, Ordering::Release);
        std::mem::take(&mut *done)
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        locked(&self.0.state).closing = true;
        self.0.work.notify_all();
        self.0.write_work.notify_all();
    }
}

impl Inner {
    fn finish(&self, results: &[(u32, i32)]) {
        locked(&self.done).extend_from_slice(results);
        self.has_done.store(true, Ordering::Release);
        self.shared.notify();
    }

    fn write_back(&self) {
        let mut batch = Vec::with_capacity(WRITE_BATCH);
        let mut results = Vec::with_capacity(WRITE_BATCH);
        let mut state = locked(&self.state);
        loop {
            let n = state.writes.len().min(WRITE_BATCH);
            if n > 0 {
                batch.extend(state.writes.drain(..n));
                drop(state);
                results.extend(batch.drain(..).map(|job| (job.key, result_of(&job.op))));
                self.finish(&results);
                results.clear();
                state = locked(&self.state);
                continue;
            }
            if state.closing {
                break;
            }
            let (s, timeout) = self
                .write_work
                .wait_timeout(state, IDLE)
                .unwrap_or_else(|e| e.into_inner());
            state = s;
            if timeout.timed_out() && state.writes.is_empty() {
                break;
            }
        }
        state.has_writer = false;
    }

    fn work(&self) {
        let mut state = locked(&self.state);
        loop {
            if let Some(job) = state.jobs.pop_front() {
                drop(state);
                self.finish(&[(job.key, result_of(&job.op))]);
                state = locked(&self.state);
                continue;
            }
            if state.closing {
                break;
            }
            state.idle += 1;
            let (s, timeout) = self
                .work
                .wait_timeout(state, IDLE)
                .unwrap_or_else(|e| e.into_inner());
            state = s;
            state.idle -= 1;
            if timeout.timed_out() && state.jobs.is_empty() {
                break;
            }
        }
        state.workers -= 1;
    }
}

fn result_of(op: &RawOp) -> i32 {
    match run(op) {
        Ok(n) => n as i32,
        Err(e) => -e.raw_os_error().unwrap_or(libc::EIO),
    }
}

/// Does the operation on the calling thread.
fn run(op: &RawOp) -> io::Result<usize> {
    let off = op.offset as libc::off_t;
    // SAFETY: the segments are valid until the result is reported (see `Job`); the ioctls read the
    // range; the other calls take no pointers.
    let n = unsafe {
        match op.kind {
            OpKind::Read => libc::preadv(op.fd, op.iov, op.iov_count as i32, off),
            OpKind::Write => libc::pwritev(op.fd, op.iov, op.iov_count as i32, off),
            OpKind::WriteDurable => {
                libc::pwritev2(op.fd, op.iov, op.iov_count as i32, off, libc::RWF_DSYNC)
            }
            OpKind::Sync => libc::fdatasync(op.fd) as isize,
            OpKind::BlockDiscard => {
                let range = [op.offset, op.len];
                libc::ioctl(op.fd, BLKDISCARD, range.as_ptr()) as isize
            }
            OpKind::BlockZeroOut => {
                let range = [op.offset, op.len];
                libc::ioctl(op.fd, BLKZEROOUT, range.as_ptr()) as isize
            }
            OpKind::Fallocate(m) => {
                libc::fallocate(op.fd, m.mode(), off, op.len as libc::off_t) as isize
            }
        }
    };
    if n < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(n as usize)
    }
}
