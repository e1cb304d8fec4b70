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
    workers: usize,
    idle: usize,
    closing: bool,
}

struct Inner {
    state: Mutex<State>,
    work: Condvar,
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
                        self.0
                            .finish(job.key, -e.raw_os_error().unwrap_or(libc::EAGAIN));
                    }
                }
                Err(_) => {}
            }
        }
        drop(state);
        self.0.work.notify_one();
    }

    /// Takes a job back that no worker has started.
    pub fn cancel(&self, key: u32) {
        let mut state = locked(&self.0.state);
        if let Some(at) = state.jobs.iter().position(|j| j.key == key) {
            state.jobs.remove(at);
            drop(state);
            self.0.finish(key, -libc::ECANCELED);
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
    }
}

impl Inner {
    fn finish(&self, key: u32, result: i32) {
        locked(&self.done).push((key, result));
        self.has_done.store(true, Ordering::Release);
        self.shared.notify();
    }

    fn work(&self) {
        let mut state = locked(&self.state);
        loop {
            if let Some(job) = state.jobs.pop_front() {
                drop(state);
                let result = match run(&job.op) {
                    Ok(n) => n as i32,
                    Err(e) => -e.raw_os_error().unwrap_or(libc::EIO),
                };
                self.finish(job.key, result);
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
