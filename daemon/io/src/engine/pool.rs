//! Threads that do blocking operations for one I/O thread.

use std::cell::Cell;
use std::collections::{HashMap, VecDeque};
use std::io;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

use super::folios::Folios;
use crate::op::{OpKind, RawOp, SharedRange};
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

/// `FICLONERANGE` of linux/fs.h, `_IOW(0x94, 13, struct file_clone_range)`.
const FICLONERANGE: libc::Ioctl = 0x4020_940d;

/// `struct file_clone_range` of linux/fs.h.
#[repr(C)]
struct FileCloneRange {
    src_fd: i64,
    src_offset: u64,
    src_length: u64,
    dest_offset: u64,
}

struct Job {
    key: u32,
    op: RawOp,
}

// SAFETY: the pointers in the operation stay valid until the reactor has seen its result, on whatever
// thread they are used.
unsafe impl Send for Job {}

enum Work {
    One(Job),
    /// The writes to the file with this number.
    Writes(u32),
}

#[derive(Default)]
struct State {
    work: VecDeque<Work>,
    /// Writes to the page cache, by file, while a worker has or will have them: one at a time, as the kernel
    /// lets one at a time into a file anyway.
    writes: HashMap<u32, VecDeque<Job>>,
    /// What is known of the folios of files that no worker writes to at the moment.
    folios: HashMap<u32, Folios>,
    workers: usize,
    idle: usize,
    closing: bool,
}

struct Inner {
    state: Mutex<State>,
    work: Condvar,
    done: Mutex<Vec<(u32, i32)>>,
    has_done: AtomicBool,
    /// Operations whose end was not told yet.
    pending: AtomicUsize,
    shared: Arc<Shared>,
}

fn locked<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(|e| e.into_inner())
}

pub(crate) struct Pool {
    inner: Arc<Inner>,
    /// Work for which no worker was woken yet: one that is woken for the first of many takes the CPU for it alone.
    unwoken: Cell<usize>,
}

impl Pool {
    pub fn new(shared: &Arc<Shared>) -> Pool {
        Pool {
            inner: Arc::new(Inner {
                state: Mutex::default(),
                work: Condvar::new(),
                done: Mutex::default(),
                has_done: AtomicBool::new(false),
                pending: AtomicUsize::new(0),
                shared: shared.clone(),
            }),
            unwoken: Cell::new(0),
        }
    }

    /// Queues an operation, which is done after [`Pool::wake`].
    pub fn push(&self, key: u32, op: RawOp) {
        self.inner.pending.fetch_add(1, Ordering::Relaxed);
        self.add(Work::One(Job { key, op }), locked(&self.inner.state));
    }

    /// Does a write to the page cache, after those to the same file that were pushed before.
    pub fn push_write(&self, key: u32, op: RawOp) {
        self.inner.pending.fetch_add(1, Ordering::Relaxed);
        let mut state = locked(&self.inner.state);
        let job = Job { key, op };
        if let Some(writes) = state.writes.get_mut(&op.file_id) {
            writes.push_back(job);
            return;
        }
        state.writes.insert(op.file_id, VecDeque::from([job]));
        self.add(Work::Writes(op.file_id), state);
    }

    fn add(&self, work: Work, mut state: MutexGuard<'_, State>) {
        state.work.push_back(work);
        if state.work.len() > state.idle && state.workers < MAX_WORKERS {
            let inner = self.inner.clone();
            let spawned = std::thread::Builder::new()
                .name("vdiskd-worker".into())
                .spawn(move || inner.work());
            match spawned {
                Ok(_) => state.workers += 1,
                Err(e) if state.workers == 0 => {
                    // Nobody would ever take the work: fail it (and other that waits with it).
                    let errno = e.raw_os_error().unwrap_or(libc::EAGAIN);
                    let state = &mut *state;
                    let one = state.work.drain(..).filter_map(|w| match w {
                        Work::One(job) => Some(job),
                        Work::Writes(_) => None,
                    });
                    let writes = state.writes.drain().flat_map(|(_, jobs)| jobs);
                    let failed: Vec<_> = one.chain(writes).map(|j| (j.key, -errno)).collect();
                    self.inner.finish(&failed);
                }
                Err(_) => {}
            }
        }
        self.unwoken.set(self.unwoken.get() + 1);
    }

    /// Has workers begin with what was pushed.
    pub fn wake(&self) {
        for _ in 0..self.unwoken.take() {
            self.inner.work.notify_one();
        }
    }

    /// A file is no longer open; nothing is in flight on it.
    pub fn forget_file(&self, file: u32) {
        locked(&self.inner.state).folios.remove(&file);
    }

    /// Takes a job back that no worker has started.
    pub fn cancel(&self, key: u32) {
        let mut state = locked(&self.inner.state);
        let is_it = |w: &Work| matches!(w, Work::One(j) if j.key == key);
        let mut found = false;
        if let Some(at) = state.work.iter().position(is_it) {
            state.work.remove(at);
            found = true;
        }
        for jobs in state.writes.values_mut() {
            let before = jobs.len();
            jobs.retain(|j| j.key != key);
            found |= jobs.len() != before;
        }
        drop(state);
        if found {
            self.inner.finish(&[(key, -libc::ECANCELED)]);
        }
    }

    /// Threads of the pool have something to do, or do it.
    pub fn is_busy(&self) -> bool {
        self.inner.pending.load(Ordering::Relaxed) > 0
    }

    pub fn has_done(&self) -> bool {
        self.inner.has_done.load(Ordering::Acquire)
    }

    pub fn take_done(&self) -> Vec<(u32, i32)> {
        let mut done = locked(&self.inner.done);
        self.inner.has_done.store(false, Ordering::Release);
        std::mem::take(&mut *done)
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        locked(&self.inner.state).closing = true;
        self.inner.work.notify_all();
    }
}

impl Inner {
    fn finish(&self, results: &[(u32, i32)]) {
        self.pending.fetch_sub(results.len(), Ordering::Relaxed);
        locked(&self.done).extend_from_slice(results);
        self.has_done.store(true, Ordering::Release);
        self.shared.notify();
    }

    /// Does the writes to a file until there are no more.
    fn write_all(&self, file: u32) {
        let mut state = locked(&self.state);
        let mut folios = state.folios.remove(&file).unwrap_or_default();
        loop {
            let writes = state.writes.entry(file).or_default();
            let jobs: Vec<Job> = writes.drain(..writes.len().min(WRITE_BATCH)).collect();
            drop(state);
            let mut write = |job: &Job| {
                let op = &job.op;
                let result = folios.write(op.fd, op.offset, op.len, || result_of(op));
                (job.key, result)
            };
            let results: Vec<_> = jobs.iter().map(&mut write).collect();
            state = locked(&self.state);
            if state.writes.get(&file).is_none_or(VecDeque::is_empty) {
                // Before the last result is told: the file may be closed then.
                state.writes.remove(&file);
                state.folios.insert(file, folios);
                drop(state);
                return self.finish(&results);
            }
            drop(state);
            self.finish(&results);
            state = locked(&self.state);
        }
    }

    fn work(&self) {
        let mut state = locked(&self.state);
        loop {
            if let Some(work) = state.work.pop_front() {
                drop(state);
                match work {
                    Work::One(job) => self.finish(&[(job.key, result_of(&job.op))]),
                    Work::Writes(file) => self.write_all(file),
                }
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
            if timeout.timed_out() && state.work.is_empty() {
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
    // SAFETY: the segments, or the shared range, are valid until the result is reported (see `Job`); the ioctls read
    // what they are given here; the other calls take no pointers.
    let n = unsafe {
        match op.kind {
            OpKind::Read => libc::preadv(op.fd, op.iov, op.iov_count as i32, off),
            OpKind::Write => libc::pwritev(op.fd, op.iov, op.iov_count as i32, off),
            OpKind::WriteDurable => {
                libc::pwritev2(op.fd, op.iov, op.iov_count as i32, off, libc::RWF_DSYNC)
            }
            OpKind::Sync => libc::fdatasync(op.fd) as isize,
            OpKind::WriteBehind => {
                let len = op.len as libc::off64_t;
                libc::sync_file_range(op.fd, off, len, libc::SYNC_FILE_RANGE_WRITE) as isize
            }
            OpKind::BlockDiscard => {
                let range = [op.offset, op.len];
                libc::ioctl(op.fd, BLKDISCARD, range.as_ptr()) as isize
            }
            OpKind::BlockZeroOut => {
                let range = [op.offset, op.len];
                libc::ioctl(op.fd, BLKZEROOUT, range.as_ptr()) as isize
            }
            OpKind::Share => {
                let Some(from) = op.iov.cast::<SharedRange>().as_ref() else {
                    return Err(io::ErrorKind::InvalidInput.into());
                };
                let range = FileCloneRange {
                    src_fd: from.file.raw().into(),
                    src_offset: from.offset,
                    src_length: op.len,
                    dest_offset: op.offset,
                };
                libc::ioctl(op.fd, FICLONERANGE, &raw const range) as isize
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
