//! The loop of an I/O thread.

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::future::Future;
use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, OwnedFd};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use crate::buffer::IoVecs;
use crate::engine::{Engine, Event, Wait};
use crate::executor::Executor;
use crate::file::IoFile;
use crate::in_flight::InFlight;
use crate::op::{OpKind, RawOp, SharedRange};
use crate::poll_window::PollWindow;
use crate::stats::ThreadStats;
use crate::thread::{self, Message, Shared};
use crate::timer::{Sleep, Timers};

/// How many memory segments can be registered for fixed reads and writes.
pub(crate) const FIXED_BUFFERS: u16 = 256;

/// The largest buffer that an io_uring takes (1 GiB).
const FIXED_BUFFER_MAX: usize = 1 << 30;

/// How often an operation that the kernel wants repeated (`EINTR`, `EAGAIN`) is repeated.
const MAX_RETRIES: u8 = 64;

/// The watch of the thread's own eventfd.
const WATCH_INBOX: u32 = u32::MAX;

/// Something that brings requests: a virtqueue.
///
/// All methods are called on the source's I/O thread, never while another of them runs.
pub trait Source {
    /// Takes everything that is available; true if there was anything.
    fn poll(&self) -> bool;

    /// An operation submitted with [`Reactor::submit_for_source`] has ended.
    fn complete(&self, token: u32, result: io::Result<()>);

    /// The end of a turn in which the source was polled with success, completed something or was
    /// [touched](Reactor::touch): publish the results and signal the guest once.
    fn finish_batch(&self);

    /// The kick descriptor was signalled while the source was not being polled.
    fn kicked(&self) {}

    /// Switches the other side's notifications on or off. Switching on returns true if work arrived
    /// before the switch took effect (and may have gone unannounced).
    fn set_notifications(&self, on: bool) -> bool;
}

/// Names a source on its thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SourceId {
    index: u32,
    /// Tells a source from an earlier one at the same index.
    generation: u32,
}

struct SourceState {
    source: Rc<dyn Source>,
    id: SourceId,
    kick: RefCell<Option<(u32, OwnedFd)>>,
    window: Cell<PollWindow>,
    last_work: Cell<Instant>,
    /// Worked since it was last looked at for retirement: its window starts then, after the guest was
    /// signalled. (Signalling may take as long as a good part of the window.)
    fresh: Cell<bool>,
    active: Cell<bool>,
    /// Was polled since it became active: what a poll finds from now on, it finds without notice.
    polled: Cell<bool>,
    touched: Cell<bool>,
    removed: Cell<bool>,
}

enum Owner {
    Source {
        id: SourceId,
        token: u32,
    },
    Task(Option<Waker>),
    /// The future was dropped: only the buffers wait for the kernel.
    Nobody,
}

struct Op {
    raw: RawOp,
    owner: Owner,
    retries: u8,
    result: Option<io::Result<()>>,
    /// What is left of the segments after a part was transferred.
    rest: Vec<libc::iovec>,
    /// Holds the buffers of a task's operation and the open file.
    _iov: Option<IoVecs>,
    _file: Option<Arc<IoFile>>,
    /// Where blocks are shared from.
    _from: Option<Box<SharedRange>>,
}

enum OpSlot {
    Free { next: u32 },
    Used(Op),
}

const NO_SLOT: u32 = u32::MAX;

struct Ops {
    slots: Vec<OpSlot>,
    free: u32,
    used: usize,
}

impl Ops {
    fn insert(&mut self, op: Op) -> u32 {
        self.used += 1;
        if self.free == NO_SLOT {
            self.slots.push(OpSlot::Used(op));
            return self.slots.len() as u32 - 1;
        }
        let key = self.free;
        if let OpSlot::Free { next } = self.slots[key as usize] {
            self.free = next;
        }
        self.slots[key as usize] = OpSlot::Used(op);
        key
    }

    fn get(&mut self, key: u32) -> Option<&mut Op> {
        match self.slots.get_mut(key as usize) {
            Some(OpSlot::Used(op)) => Some(op),
            _ => None,
        }
    }

    fn remove(&mut self, key: u32) {
        self.used -= 1;
        self.slots[key as usize] = OpSlot::Free { next: self.free };
        self.free = key;
    }
}

struct FileEntry {
    file: Arc<IoFile>,
    fixed: Option<u32>,
}

struct FixedRange {
    start: usize,
    len: usize,
    slot: u16,
}

/// The loop of one I/O thread and everything on it.
pub struct Reactor {
    shared: Arc<Shared>,
    engine: RefCell<Engine>,
    executor: Executor,
    timers: Rc<Timers>,
    ops: RefCell<Ops>,
    files: RefCell<Vec<Option<FileEntry>>>,
    fixed: RefCell<Vec<FixedRange>>,
    sources: RefCell<Vec<Option<Rc<SourceState>>>>,
    /// The sources that are polled in each turn.
    active: RefCell<Vec<Rc<SourceState>>>,
    touched: RefCell<Vec<Rc<SourceState>>>,
    watches: RefCell<HashMap<u32, Rc<SourceState>>>,
    next_id: Cell<u32>,
    now: Cell<Instant>,
    stopping: Cell<bool>,
    events: RefCell<Vec<Event>>,
    kept: RefCell<HashMap<u64, Rc<dyn Any>>>,
    next_kept: Cell<u64>,
    in_flight: InFlight,
}

/// Names a value that was left with a reactor; may be sent anywhere.
pub struct Kept<T> {
    key: u64,
    _type: PhantomData<fn() -> T>,
}

impl<T> Clone for Kept<T> {
    fn clone(&self) -> Kept<T> {
        *self
    }
}

impl<T> Copy for Kept<T> {}

impl Reactor {
    pub(crate) fn new(shared: Arc<Shared>, engine: Engine) -> Rc<Reactor> {
        Rc::new(Reactor {
            executor: Executor::new(shared.clone()),
            engine: RefCell::new(engine),
            timers: Rc::default(),
            ops: RefCell::new(Ops {
                slots: Vec::new(),
                free: NO_SLOT,
                used: 0,
            }),
            files: RefCell::default(),
            fixed: RefCell::default(),
            sources: RefCell::default(),
            active: RefCell::default(),
            touched: RefCell::default(),
            watches: RefCell::default(),
            next_id: Cell::new(0),
            now: Cell::new(Instant::now()),
            stopping: Cell::new(false),
            events: RefCell::default(),
            kept: RefCell::default(),
            next_kept: Cell::new(0),
            in_flight: InFlight::default(),
            shared,
        })
    }

    /// The reactor of the calling thread, if it is an I/O thread.
    pub fn current() -> Option<Rc<Reactor>> {
        thread::current()
    }

    pub(crate) fn is_shared(&self, shared: &Arc<Shared>) -> bool {
        Arc::ptr_eq(&self.shared, shared)
    }

    pub(crate) fn push_ready(&self, task: u32) {
        self.executor.push_ready(task);
    }

    pub(crate) fn stop(&self) {
        self.stopping.set(true);
    }

    /// The time at the start of this turn of the loop: cheap, and at most a turn old.
    pub fn now(&self) -> Instant {
        self.now.get()
    }

    pub fn stats(&self) -> &ThreadStats {
        &self.shared.stats
    }

    /// The requests that this thread serves at the moment.
    #[inline]
    pub fn in_flight(&self) -> &InFlight {
        &self.in_flight
    }

    /// Runs a future on this thread.
    pub fn spawn(&self, future: impl Future<Output = ()> + 'static) {
        self.executor.spawn(Box::pin(future));
    }

    pub fn sleep_until(&self, at: Instant) -> Sleep {
        Sleep::new(self.timers.clone(), at)
    }

    pub fn sleep(&self, duration: Duration) -> Sleep {
        self.sleep_until(Instant::now() + duration)
    }

    // Values that belong to the thread.

    /// Leaves a value with this thread, for calls from other threads to find.
    pub fn keep<T: 'static>(&self, value: Rc<T>) -> Kept<T> {
        let key = self.next_kept.get();
        self.next_kept.set(key + 1);
        self.kept.borrow_mut().insert(key, value);
        Kept {
            key,
            _type: PhantomData,
        }
    }

    /// The value, unless it was taken.
    pub fn kept<T: 'static>(&self, kept: Kept<T>) -> Option<Rc<T>> {
        self.kept.borrow().get(&kept.key)?.clone().downcast().ok()
    }

    /// Takes the value back.
    pub fn take_kept<T: 'static>(&self, kept: Kept<T>) -> Option<Rc<T>> {
        self.kept.borrow_mut().remove(&kept.key)?.downcast().ok()
    }

    // Sources.

    /// Adds a source; it is polled once soon, and then whenever its kick descriptor is signalled.
    pub fn add_source(&self, source: Rc<dyn Source>, kick: Option<OwnedFd>) -> SourceId {
        let index = {
            let mut sources = self.sources.borrow_mut();
            let free = sources.iter().position(Option::is_none);
            free.unwrap_or_else(|| {
                sources.push(None);
                sources.len() - 1
            })
        };
        let id = SourceId {
            index: index as u32,
            generation: self.next_id(),
        };
        let state = Rc::new(SourceState {
            source,
            id,
            kick: RefCell::new(None),
            window: Cell::default(),
            last_work: Cell::new(self.now.get()),
            fresh: Cell::new(false),
            active: Cell::new(false),
            polled: Cell::new(false),
            touched: Cell::new(false),
            removed: Cell::new(false),
        });
        self.sources.borrow_mut()[index] = Some(state.clone());
        if let Some(fd) = kick {
            self.watch_kick(&state, fd);
        }
        self.activate(&state);
        id
    }

    /// Removes a source. Operations of it that are still in flight end unreported.
    pub fn remove_source(&self, id: SourceId) {
        let Some(state) = self.source(id) else {
            return;
        };
        self.sources.borrow_mut()[id.index as usize] = None;
        state.removed.set(true);
        self.active.borrow_mut().retain(|s| s.id != id);
        self.touched.borrow_mut().retain(|s| s.id != id);
        self.unwatch_kick(&state);
    }

    /// Exchanges the kick descriptor of a source.
    pub fn set_kick(&self, id: SourceId, kick: Option<OwnedFd>) {
        if let Some(state) = self.source(id) {
            self.unwatch_kick(&state);
            if let Some(fd) = kick {
                self.watch_kick(&state, fd);
            }
            self.activate(&state);
        }
    }

    /// Has the source polled in the next turn.
    pub fn schedule(&self, id: SourceId) {
        if let Some(state) = self.source(id) {
            self.activate(&state);
        }
    }

    /// Calls [`Source::finish_batch`] at the end of this turn.
    pub fn touch(&self, id: SourceId) {
        if let Some(state) = self.source(id) {
            self.mark_touched(&state);
        }
    }

    fn source(&self, id: SourceId) -> Option<Rc<SourceState>> {
        match self.sources.borrow().get(id.index as usize) {
            Some(Some(state)) if state.id == id => Some(state.clone()),
            _ => None,
        }
    }

    fn next_id(&self) -> u32 {
        let id = self.next_id.get();
        // Watches of the last 2^32 sources cannot still be reported.
        self.next_id.set((id + 1) % WATCH_INBOX);
        id
    }

    fn watch_kick(&self, state: &Rc<SourceState>, fd: OwnedFd) {
        let watch = self.next_id();
        self.engine
            .borrow_mut()
            .watch(watch, fd.as_raw_fd(), &self.shared.stats);
        self.watches.borrow_mut().insert(watch, state.clone());
        *state.kick.borrow_mut() = Some((watch, fd));
    }

    fn unwatch_kick(&self, state: &SourceState) {
        if let Some((watch, fd)) = state.kick.borrow_mut().take() {
            self.watches.borrow_mut().remove(&watch);
            self.engine
                .borrow_mut()
                .unwatch(watch, fd.as_raw_fd(), &self.shared.stats);
        }
    }

    fn mark_touched(&self, state: &Rc<SourceState>) {
        if !state.touched.replace(true) {
            self.touched.borrow_mut().push(state.clone());
        }
    }

    fn activate(&self, state: &Rc<SourceState>) {
        if !state.removed.get() && !state.active.replace(true) {
            state.polled.set(false);
            state.source.set_notifications(false);
            self.active.borrow_mut().push(state.clone());
        }
    }

    // Operations.

    /// Starts an operation for a source; [`Source::complete`] reports its end.
    ///
    /// # Safety
    /// `iov` must point to `iov_count` segments (at least one for reads and writes), which, like the
    /// memory they describe, stay valid and unchanged until the end is reported.
    #[expect(clippy::too_many_arguments)]
    pub unsafe fn submit_for_source(
        &self,
        id: SourceId,
        token: u32,
        file: &Arc<IoFile>,
        kind: OpKind,
        iov: *const libc::iovec,
        iov_count: u32,
        offset: u64,
        len: u64,
    ) {
        let raw = RawOp {
            kind,
            fd: file.raw(),
            file_id: file.id(),
            fixed_file: self.fixed_file(file),
            // SAFETY: the caller vouches for the segments.
            fixed_buffer: unsafe { self.fixed_buffer(iov, iov_count) },
            direct: file.is_direct(),
            write_blocks: file.write_blocks(),
            iov,
            iov_count,
            offset,
            len,
        };
        self.start(Op {
            raw,
            owner: Owner::Source { id, token },
            retries: 0,
            result: None,
            rest: Vec::new(),
            _iov: None,
            _file: None,
            _from: None,
        });
    }

    /// Starts a read or a write of the whole of `iov`; resolves when all of it is transferred.
    /// Dropping the future asks the kernel to give up; the buffers live until it has.
    pub fn submit(
        self: &Rc<Self>,
        file: &Arc<IoFile>,
        kind: OpKind,
        iov: IoVecs,
        offset: u64,
    ) -> Completion {
        let count = iov.segments().len() as u32;
        let len = iov.len() as u64;
        if len == 0 {
            return Completion {
                reactor: self.clone(),
                key: None,
            };
        }
        let ptr = iov.segments().as_ptr();
        let raw = RawOp {
            kind,
            fd: file.raw(),
            file_id: file.id(),
            fixed_file: self.fixed_file(file),
            // SAFETY: `iov` holds the segments.
            fixed_buffer: unsafe { self.fixed_buffer(ptr, count) },
            direct: file.is_direct(),
            write_blocks: file.write_blocks(),
            iov: ptr,
            iov_count: count,
            offset,
            len,
        };
        self.start_task(raw, file, Some(iov), None)
    }

    /// Starts an operation without buffers, such as [`OpKind::Sync`] or [`OpKind::Fallocate`].
    pub fn submit_range(
        self: &Rc<Self>,
        file: &Arc<IoFile>,
        kind: OpKind,
        offset: u64,
        len: u64,
    ) -> Completion {
        debug_assert!(!kind.is_transfer());
        self.start_range(file, kind, offset, len, None)
    }

    /// Has `len` bytes at `offset` of `file` share the blocks of `from` at `from_offset`, as far as the file system can do that
    /// (`FICLONERANGE`): whole blocks of two files of one file system. What is written to either later is its own. Fails with
    /// `EOPNOTSUPP`, `EXDEV` or `EINVAL` if it cannot.
    pub fn submit_share(
        self: &Rc<Self>,
        file: &Arc<IoFile>,
        offset: u64,
        from: &Arc<IoFile>,
        from_offset: u64,
        len: u64,
    ) -> Completion {
        let from = Box::new(SharedRange {
            file: from.clone(),
            offset: from_offset,
        });
        self.start_range(file, OpKind::Share, offset, len, Some(from))
    }

    fn start_range(
        self: &Rc<Self>,
        file: &Arc<IoFile>,
        kind: OpKind,
        offset: u64,
        len: u64,
        from: Option<Box<SharedRange>>,
    ) -> Completion {
        let iov = from.as_deref().map_or(std::ptr::null(), std::ptr::from_ref);
        let raw = RawOp {
            kind,
            fd: file.raw(),
            file_id: file.id(),
            fixed_file: self.fixed_file(file),
            fixed_buffer: None,
            direct: file.is_direct(),
            write_blocks: file.write_blocks(),
            iov: iov.cast(),
            iov_count: 0,
            offset,
            len,
        };
        self.start_task(raw, file, None, from)
    }

    fn start_task(
        self: &Rc<Self>,
        raw: RawOp,
        file: &Arc<IoFile>,
        iov: Option<IoVecs>,
        from: Option<Box<SharedRange>>,
    ) -> Completion {
        let key = self.start(Op {
            raw,
            owner: Owner::Task(None),
            retries: 0,
            result: None,
            rest: Vec::new(),
            _iov: iov,
            _file: Some(file.clone()),
            _from: from,
        });
        Completion {
            reactor: self.clone(),
            key: Some(key),
        }
    }

    fn start(&self, op: Op) -> u32 {
        let raw = split_segments(op.raw);
        let key = self.ops.borrow_mut().insert(op);
        self.shared.stats.operations.add(1);
        self.engine.borrow_mut().push(key, &raw, &self.shared.stats);
        key
    }

    fn fixed_file(&self, file: &Arc<IoFile>) -> Option<u32> {
        let id = file.id();
        if let Some(Some(entry)) = self.files.borrow().get(id as usize)
            && Arc::ptr_eq(&entry.file, file)
        {
            return entry.fixed;
        }
        let fixed = self
            .engine
            .borrow_mut()
            .register_file(id, file.raw())
            .then_some(id);
        let mut files = self.files.borrow_mut();
        if files.len() <= id as usize {
            files.resize_with(id as usize + 1, || None);
        }
        files[id as usize] = Some(FileEntry {
            file: file.clone(),
            fixed,
        });
        fixed
    }

    pub(crate) fn forget_file(&self, id: u32) {
        let entry = self
            .files
            .borrow_mut()
            .get_mut(id as usize)
            .and_then(Option::take);
        self.engine.borrow().forget_file(id);
        if let Some(FileEntry { fixed: Some(_), .. }) = entry {
            self.engine.borrow_mut().register_file(id, -1);
        }
    }

    /// # Safety
    /// `iov` points to `count` segments.
    unsafe fn fixed_buffer(&self, iov: *const libc::iovec, count: u32) -> Option<u16> {
        let fixed = self.fixed.borrow();
        if count != 1 || fixed.is_empty() {
            return None;
        }
        // SAFETY: there is one segment.
        let v = unsafe { *iov };
        let at = v.iov_base as usize;
        fixed
            .iter()
            .find(|f| at >= f.start && at - f.start <= f.len && v.iov_len <= f.len - (at - f.start))
            .map(|f| f.slot)
    }

    /// Registers memory (a guest's) with the ring, so that transfers need not look its pages up.
    /// The pages stay pinned until the result is dropped. None if the engine cannot or the kernel
    /// will not (`RLIMIT_MEMLOCK`): transfers then work without.
    ///
    /// # Safety
    /// The memory must stay mapped for as long as the result lives.
    pub unsafe fn register_buffers(
        self: &Rc<Self>,
        ranges: &[(*mut u8, usize)],
    ) -> Option<FixedBuffers> {
        let mut registered = FixedBuffers {
            reactor: self.clone(),
            slots: Vec::new(),
        };
        for &(base, len) in ranges {
            let mut at = 0;
            while at < len {
                let n = (len - at).min(FIXED_BUFFER_MAX);
                let start = base.wrapping_add(at);
                let slot = {
                    let fixed = self.fixed.borrow();
                    (0..FIXED_BUFFERS).find(|s| fixed.iter().all(|f| f.slot != *s))?
                };
                let vec = libc::iovec {
                    iov_base: start.cast(),
                    iov_len: n,
                };
                // SAFETY: the caller keeps the memory mapped; dropping `registered` undoes this.
                if !unsafe { self.engine.borrow_mut().register_buffer(slot, vec) } {
                    return None;
                }
                self.fixed.borrow_mut().push(FixedRange {
                    start: start as usize,
                    len: n,
                    slot,
                });
                registered.slots.push(slot);
                at += n;
            }
        }
        Some(registered)
    }

    fn done(&self, key: u32, result: i32) {
        let mut ops = self.ops.borrow_mut();
        let Some(op) = ops.get(key) else {
            return;
        };
        let outcome = match step(op, result) {
            Step::Again(mut raw) => {
                // The registration may be another by now.
                raw.fixed_buffer = None;
                drop(ops);
                self.engine.borrow_mut().push(key, &raw, &self.shared.stats);
                return;
            }
            Step::End(outcome) => outcome,
        };
        if outcome.is_err() && op.raw.kind == OpKind::WriteDurable {
            let files = self.files.borrow();
            if let Some(Some(entry)) = files.get(op.raw.file_id as usize) {
                entry.file.note_lost_data();
            }
        }
        match &mut op.owner {
            Owner::Source { id, token } => {
                let (id, token) = (*id, *token);
                ops.remove(key);
                drop(ops);
                if let Some(state) = self.source(id) {
                    state.source.complete(token, outcome);
                    state.last_work.set(self.now.get());
                    self.mark_touched(&state);
                    if !state.window.get().get(self.shared.poll_max()).is_zero() {
                        self.activate(&state);
                    }
                }
            }
            Owner::Task(waker) => {
                let waker = waker.take();
                op.result = Some(outcome);
                drop(ops);
                if let Some(waker) = waker {
                    waker.wake();
                }
            }
            Owner::Nobody => ops.remove(key),
        }
    }

    // The loop.

    pub(crate) fn run(&self) {
        self.engine.borrow_mut().watch(
            WATCH_INBOX,
            self.shared.event().as_raw_fd(),
            &self.shared.stats,
        );
        let stats = &self.shared.stats;
        loop {
            stats.turns.add(1);
            let mut worked = self.shared.has_pending() && self.run_inbox();
            worked |= self.executor.run_ready();
            worked |= self.poll_sources();
            self.engine.borrow_mut().enter(Wait::No, stats);
            worked |= self.reap();
            self.finish_batches();
            let before = self.now.get();
            self.now.set(Instant::now());
            let spent = (self.now.get() - before).as_nanos() as u64;
            worked |= self.timers.fire(self.now.get());
            if worked {
                stats.working_ns.add(spent);
                continue;
            }
            stats.polling_ns.add(spent);
            if self.engine.borrow().has_helpers_at_work() {
                std::thread::yield_now();
            }
            self.retire_idle_sources();
            if self.active.borrow().is_empty() && !self.executor.has_ready() {
                if self.stopping.get() && self.ops.borrow().used == 0 {
                    break;
                }
                self.sleep_in_kernel();
            }
        }
        // Whoever waits for one of them gets to know that it will not end.
        self.executor.clear();
    }

    fn run_inbox(&self) -> bool {
        let messages = self.shared.take_inbox();
        let any = !messages.is_empty();
        if any {
            // Calls see this thread as current; the Rc in thread-local storage is ours.
            let this = thread::current();
            for message in messages {
                match (message, &this) {
                    (Message::Call(f), Some(this)) => f(this),
                    (Message::Call(_), None) => {}
                    (Message::Wake(task), _) => self.executor.push_ready(task),
                }
            }
        }
        any
    }

    fn poll_sources(&self) -> bool {
        let mut any = false;
        let mut at = 0;
        loop {
            // Not borrowed while polling: a source may remove itself or schedule another.
            let Some(state) = self.active.borrow().get(at).cloned() else {
                break;
            };
            let polled = state.polled.replace(true);
            if state.source.poll() {
                any = true;
                state.last_work.set(self.now.get());
                if polled {
                    self.shared.stats.poll_hits.add(1);
                    let mut window = state.window.get();
                    window.hit(self.shared.poll_max());
                    state.window.set(window);
                }
                self.mark_touched(&state);
            }
            at += 1;
        }
        any
    }

    fn finish_batches(&self) {
        loop {
            let Some(state) = self.touched.borrow_mut().pop() else {
                break;
            };
            state.touched.set(false);
            state.fresh.set(true);
            state.source.finish_batch();
        }
    }

    /// Stops polling the sources whose windows have passed without work.
    fn retire_idle_sources(&self) {
        let now = self.now.get();
        let max = self.shared.poll_max();
        let mut at = 0;
        loop {
            let Some(state) = self.active.borrow().get(at).cloned() else {
                break;
            };
            if state.fresh.replace(false) {
                state.last_work.set(now);
            }
            if now.saturating_duration_since(state.last_work.get()) < state.window.get().get(max) {
                at += 1;
                continue;
            }
            if state.source.set_notifications(true) {
                // Work arrived meanwhile: it is polled in the next turn.
                state.source.set_notifications(false);
                at += 1;
                continue;
            }
            let mut window = state.window.get();
            if !window.get(max).is_zero() {
                self.shared.stats.poll_misses.add(1);
            }
            window.missed();
            state.window.set(window);
            state.active.set(false);
            self.active.borrow_mut().retain(|s| s.id != state.id);
        }
    }

    fn sleep_in_kernel(&self) {
        if !self.shared.prepare_sleep() {
            return;
        }
        let before = Instant::now();
        let timeout = self
            .timers
            .next_deadline()
            .map(|at| at.saturating_duration_since(before));
        self.engine
            .borrow_mut()
            .enter(Wait::For(timeout), &self.shared.stats);
        self.shared.woke();
        let now = Instant::now();
        self.now.set(now);
        self.shared
            .stats
            .sleeping_ns
            .add((now - before).as_nanos() as u64);
        self.reap();
        self.finish_batches();
    }

    fn reap(&self) -> bool {
        let mut events = self.events.take();
        self.engine.borrow_mut().reap(&mut events);
        let any = !events.is_empty();
        for event in events.drain(..) {
            match event {
                Event::Done { key, result } => self.done(key, result),
                Event::Ready { watch } => self.ready(watch, false),
                Event::ReadyOnce { watch } => self.ready(watch, true),
            }
        }
        self.events.replace(events);
        any
    }

    fn ready(&self, watch: u32, again: bool) {
        if watch == WATCH_INBOX {
            if again {
                self.engine.borrow_mut().watch(
                    WATCH_INBOX,
                    self.shared.event().as_raw_fd(),
                    &self.shared.stats,
                );
            }
            return;
        }
        let state = self.watches.borrow().get(&watch).cloned();
        let Some(state) = state else {
            return;
        };
        self.shared.stats.events.add(1);
        state.source.kicked();
        if again && let Some((_, fd)) = &*state.kick.borrow() {
            self.engine
                .borrow_mut()
                .watch(watch, fd.as_raw_fd(), &self.shared.stats);
        }
        if !state.active.get() {
            let now = self.now.get();
            let mut window = state.window.get();
            let idle = now.saturating_duration_since(state.last_work.get());
            window.notified(idle, self.shared.poll_max());
            state.window.set(window);
            self.activate(&state);
        }
    }

    /// How many tasks and operations there are: zero on an idle thread.
    pub fn load(&self) -> (usize, usize) {
        (self.executor.len(), self.ops.borrow().used)
    }
}

enum Step {
    Again(RawOp),
    End(io::Result<()>),
}

/// Engines take at most IOV_MAX segments at a time.
fn split_segments(mut raw: RawOp) -> RawOp {
    raw.iov_count = raw.iov_count.min(libc::UIO_MAXIOV as u32);
    raw
}

/// What to do after a part of an operation ended with `result`.
fn step(op: &mut Op, result: i32) -> Step {
    if result == -libc::EINTR || result == -libc::EAGAIN {
        op.retries += 1;
        if op.retries <= MAX_RETRIES && !matches!(op.owner, Owner::Nobody) {
            return Step::Again(split_segments(op.raw));
        }
    }
    if result < 0 {
        return Step::End(Err(io::Error::from_raw_os_error(-result)));
    }
    let raw = &mut op.raw;
    if !raw.kind.is_transfer() {
        return Step::End(Ok(()));
    }
    let is_read = raw.kind == OpKind::Read;
    let n = (result as u64).min(raw.len);
    raw.len -= n;
    if raw.len == 0 {
        return Step::End(Ok(()));
    }
    if n == 0 && !is_read {
        return Step::End(Err(io::Error::from_raw_os_error(libc::ENOSPC)));
    }
    raw.offset += n;
    // SAFETY: the segments belong to this operation until it ends (or to its `rest`, which `remaining`
    // copies before it is replaced).
    op.rest = remaining(unsafe { segments(raw) }, n as usize);
    raw.iov = op.rest.as_ptr();
    raw.iov_count = op.rest.len() as u32;
    // Nothing more, or (with O_DIRECT, which reads whole blocks) less than a block: the end of the file.
    if is_read && (n == 0 || (raw.direct && !n.is_multiple_of(512))) {
        for v in &op.rest {
            // SAFETY: a segment of this operation, which has not ended yet.
            unsafe { std::ptr::write_bytes(v.iov_base.cast::<u8>(), 0, v.iov_len) };
        }
        return Step::End(Ok(()));
    }
    Step::Again(split_segments(*raw))
}

/// # Safety
/// The segments must still be valid.
unsafe fn segments(raw: &RawOp) -> &[libc::iovec] {
    // SAFETY: `iov` points to `iov_count` segments.
    unsafe { std::slice::from_raw_parts(raw.iov, raw.iov_count as usize) }
}

/// The segments without their first `n` bytes.
fn remaining(segments: &[libc::iovec], mut n: usize) -> Vec<libc::iovec> {
    let mut rest = Vec::with_capacity(segments.len());
    for v in segments {
        let skip = n.min(v.iov_len);
        n -= skip;
        if skip < v.iov_len {
            rest.push(libc::iovec {
                iov_base: v.iov_base.cast::<u8>().wrapping_add(skip).cast(),
                iov_len: v.iov_len - skip,
            });
        }
    }
    rest
}

/// The end of an operation; see [`Reactor::submit`].
pub struct Completion {
    reactor: Rc<Reactor>,
    /// None for an operation that had nothing to do.
    key: Option<u32>,
}

impl Future for Completion {
    type Output = io::Result<()>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let Some(key) = self.key else {
            return Poll::Ready(Ok(()));
        };
        let reactor = self.reactor.clone();
        let mut ops = reactor.ops.borrow_mut();
        let Some(op) = ops.get(key) else {
            return Poll::Ready(Ok(()));
        };
        match op.result.take() {
            Some(result) => {
                ops.remove(key);
                self.key = None;
                Poll::Ready(result)
            }
            None => {
                op.owner = Owner::Task(Some(cx.waker().clone()));
                Poll::Pending
            }
        }
    }
}

impl Drop for Completion {
    fn drop(&mut self) {
        let Some(key) = self.key else { return };
        let mut ops = self.reactor.ops.borrow_mut();
        let Some(op) = ops.get(key) else { return };
        if op.result.is_some() {
            ops.remove(key);
            return;
        }
        op.owner = Owner::Nobody;
        drop(ops);
        self.reactor
            .engine
            .borrow_mut()
            .cancel(key, &self.reactor.shared.stats);
    }
}

/// Memory registered with a ring; see [`Reactor::register_buffers`].
pub struct FixedBuffers {
    reactor: Rc<Reactor>,
    slots: Vec<u16>,
}

impl Drop for FixedBuffers {
    fn drop(&mut self) {
        let nothing = libc::iovec {
            iov_base: std::ptr::null_mut(),
            iov_len: 0,
        };
        for &slot in &self.slots {
            self.reactor.fixed.borrow_mut().retain(|f| f.slot != slot);
            // SAFETY: an empty registration refers to no memory.
            unsafe {
                self.reactor
                    .engine
                    .borrow_mut()
                    .register_buffer(slot, nothing)
            };
        }
    }
}
