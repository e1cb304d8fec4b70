//! A virtio-blk queue on its I/O thread: takes requests, sends them down the fast or the slow path, and
//! answers them.
//!
//! Invariants:
//! * A request that was taken is answered exactly once: its slot is either in `free` or in flight.
//! * Its memory stays mapped until then: the slot holds the memory table that it was read under.
//! * It is marked in the inflight area before it is submitted, and unmarked after its answer was
//!   published.

use std::cell::{Cell, RefCell};
use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::Notify;
use vdisk_block::{Client, Count, Decryption, Direction, Resolved, WriteFlags, ZeroFlags};
use vdisk_io::{IoFile, IoThread, IoVecs, Kept, OpKind, Reactor, Source, SourceId};
use vdisk_virtio::blk::{
    Malformed, ParsedRequest, RangeSegment, RequestKind, SECTOR_SIZE, Status, feature,
    read_segments,
};
use vdisk_virtio::{Chain, DirtyLog, GuestMemory, RingAddresses, RingError, SplitRing};

use super::device::Device;
use super::inflight::InflightQueue;
use crate::statistics::{QueueStats, RequestClass};

/// Requests taken in one turn, before other queues of the thread have theirs.
const MAX_BATCH: usize = 64;

/// As `MAX_BATCH`, for requests that the page cache answers as they are submitted: the guest gets to see the
/// first of them while the others run.
const MAX_BUFFERED: u32 = 8;

/// Bytes of data after which no more requests are taken in a turn.
const MAX_BYTES: u64 = 8 << 20;

/// The longest read or write, in bytes. A guest may describe much more, the same memory again and again, and would
/// keep the I/O thread from its neighbours. (QEMU has about the same limit.)
const MAX_TRANSFER: u64 = 1 << 31;

/// Reads of zeroes up to this many bytes are done at once, longer ones by the slow path, in turns.
const MAX_ZEROES: u64 = 1 << 20;

/// After this many requests that were answered without the storage, the guest is shown them, in the middle
/// of a batch.
const PUBLISH_EVERY: u32 = 4;

/// Requests that are taken together, before the first of them is submitted: what they and their lookups need of memory is
/// fetched into the cache for all of them at once.
const BATCH: usize = 8;

/// The dirty page log, while a migration runs.
#[derive(Clone)]
pub struct Logging {
    pub log: Arc<DirtyLog>,
    /// Guest-physical address under which changes of the used ring are logged, if they are.
    pub used_addr: Option<u64>,
}

/// What a queue starts with.
pub struct QueueSetup {
    pub index: u16,
    pub device: Arc<Device>,
    pub stats: Arc<QueueStats>,
    pub memory: Arc<GuestMemory>,
    pub addresses: RingAddresses,
    pub size: u16,
    /// The available index to go on from; with an inflight area it is found out from there.
    pub next_avail: u16,
    pub features: u64,
    pub kick: Option<OwnedFd>,
    pub call: Option<OwnedFd>,
    pub err: Option<OwnedFd>,
    pub inflight: Option<InflightQueue>,
    pub logging: Option<Logging>,
}

/// Why a ring cannot be used any more.
#[derive(Debug, thiserror::Error)]
enum Broken {
    #[error(transparent)]
    Ring(#[from] RingError),
    #[error(transparent)]
    Request(#[from] Malformed),
}

struct Slot {
    chain: Chain,
    request: ParsedRequest,
    class: RequestClass,
    status: *mut u8,
    /// Bytes of data.
    len: u64,
    /// Bytes that the device writes if all goes well, the status included.
    written: u32,
    started: Instant,
    count: Count,
    memory: Rc<GuestMemory>,
    /// What is left to do to the data that is being read, and its segments in `chain`.
    decryption: Option<(Decryption, Range<usize>)>,
}

struct Inner {
    ring: SplitRing,
    memory: Rc<GuestMemory>,
    slots: Vec<Slot>,
    free: Vec<u32>,
    call: Option<OwnedFd>,
    err: Option<OwnedFd>,
    inflight: Option<InflightQueue>,
    logging: Option<Logging>,
    /// Heads that an earlier daemon had taken, newest first.
    resubmit: Vec<u16>,
}

pub struct Queue {
    index: u16,
    device: Arc<Device>,
    stats: Arc<QueueStats>,
    reactor: Rc<Reactor>,
    id: Cell<Option<SourceId>>,
    client: Client,
    inner: RefCell<Inner>,
    /// No new requests are taken: the queue is being stopped, or its ring is malformed.
    closed: Cell<bool>,
    broken: Cell<bool>,
    /// Requests of this turn that the page cache answers.
    buffered: Cell<u32>,
    /// Requests of this turn that were answered without the storage.
    immediate: Cell<u32>,
    /// Slow requests answered in this batch.
    unshown: Cell<u32>,
    /// Requests that the storage failed since the queue was started.
    failed: Cell<u64>,
    idle: Notify,
    this: Weak<Queue>,
    /// What the end of a drain finds the queue by.
    kept: Kept<Weak<Queue>>,
    block_mask: u64,
}

impl Drop for Queue {
    fn drop(&mut self) {
        self.reactor.take_kept(self.kept);
    }
}

impl Queue {
    /// Starts a queue on the calling I/O thread, which is `thread`.
    pub fn start(
        thread: &IoThread,
        reactor: &Rc<Reactor>,
        setup: QueueSetup,
    ) -> Result<Rc<Queue>, RingError> {
        let s = setup;
        let mut ring = SplitRing::new(
            &s.memory,
            s.addresses,
            s.size,
            s.next_avail,
            s.features & feature::EVENT_IDX != 0,
            s.features & feature::INDIRECT_DESC != 0,
        )?;
        let mut inflight = s.inflight;
        let mut resubmit = Vec::new();
        if let Some(area) = &mut inflight {
            resubmit = area.recover(ring.published());
            // Every chain that was taken is either answered or still marked.
            ring.set_next_avail(ring.published().wrapping_add(resubmit.len() as u16));
            if !resubmit.is_empty() {
                tracing::info!(
                    export = s.device.options.id,
                    queue = s.index,
                    requests = resubmit.len(),
                    "submitting again what was in flight"
                );
            }
            resubmit.reverse();
        }
        let queue = Rc::new_cyclic(|this: &Weak<Queue>| {
            let kept = reactor.keep(Rc::new(this.clone()));
            Queue {
                index: s.index,
                stats: s.stats,
                client: s.device.backend.attach(thread, reactor, move |r| {
                    if let Some(queue) = r.kept(kept).and_then(|w| w.upgrade()) {
                        queue.wake();
                    }
                }),
                block_mask: u64::from(s.device.options.logical_block_size) - 1,
                device: s.device,
                reactor: reactor.clone(),
                id: Cell::new(None),
                inner: RefCell::new(Inner {
                    ring,
                    memory: Rc::new(GuestMemory::clone(&s.memory)),
                    slots: Vec::new(),
                    free: Vec::new(),
                    call: s.call,
                    err: s.err,
                    inflight,
                    logging: s.logging,
                    resubmit,
                }),
                closed: Cell::new(false),
                broken: Cell::new(false),
                failed: Cell::new(0),
                buffered: Cell::new(0),
                immediate: Cell::new(0),
                unshown: Cell::new(0),
                idle: Notify::new(),
                this: this.clone(),
                kept,
            }
        });
        let id = reactor.add_source(queue.clone(), s.kick);
        queue.id.set(Some(id));
        // The guest may wait for an answer that an earlier daemon gave and was killed before it announced it:
        // what comes now would not be announced either, as it lies behind what the guest asks to be told of.
        if let Some(call) = &queue.inner.borrow().call {
            signal(call);
        }
        Ok(queue)
    }

    fn wake(&self) {
        if let Some(id) = self.id.get() {
            self.reactor.schedule(id);
        }
    }

    /// Takes no more requests, waits for those in flight, and returns the available index at which the
    /// next owner of the ring goes on.
    pub async fn stop(&self) -> u16 {
        // What an earlier daemon had taken counts as taken: it must be answered before the ring goes on.
        while !self.closed.get() && !self.inner.borrow().resubmit.is_empty() {
            self.poll();
            self.reactor.sleep(Duration::from_millis(1)).await;
        }
        self.closed.set(true);
        let _let_go = self.client.let_go();
        loop {
            let idle = self.idle.notified();
            if self.client.in_flight() == 0 {
                break;
            }
            idle.await;
        }
        if let Some(id) = self.id.take() {
            self.finish_batch();
            self.reactor.remove_source(id);
        }
        self.inner.borrow().ring.next_avail()
    }

    pub fn is_broken(&self) -> bool {
        self.broken.get()
    }

    pub fn set_call(&self, call: Option<OwnedFd>) {
        let mut inner = self.inner.borrow_mut();
        inner.call = call;
        // The new owner of the interrupt may have missed one.
        if let Some(fd) = &inner.call {
            signal(fd);
        }
    }

    pub fn set_err(&self, err: Option<OwnedFd>) {
        self.inner.borrow_mut().err = err;
    }

    pub fn set_kick(&self, kick: Option<OwnedFd>) {
        if let Some(id) = self.id.get() {
            self.reactor.set_kick(id, kick);
        }
    }

    pub fn set_logging(&self, logging: Option<Logging>) {
        self.inner.borrow_mut().logging = logging;
    }

    pub fn set_features(&self, features: u64) {
        self.inner.borrow_mut().ring.set_features(
            features & feature::EVENT_IDX != 0,
            features & feature::INDIRECT_DESC != 0,
        );
    }

    /// Exchanges the memory table. Requests in flight keep the one they were read under.
    pub fn set_memory(&self, memory: &GuestMemory) -> Result<(), RingError> {
        let mut inner = self.inner.borrow_mut();
        let inner = &mut *inner;
        let result = inner.ring.relocate(memory);
        match &result {
            Ok(()) => {
                inner.memory = Rc::new(memory.clone());
                // Slots that are not in use must not keep the old table mapped.
                for &token in &inner.free {
                    inner.slots[token as usize].memory = inner.memory.clone();
                }
            }
            Err(error) => self.fail(inner, error),
        }
        result
    }

    /// The ring cannot be used any more.
    fn fail(&self, inner: &mut Inner, error: &dyn std::fmt::Display) {
        if self.broken.replace(true) {
            return;
        }
        self.closed.set(true);
        tracing::error!(
            export = self.device.options.id,
            queue = self.index,
            %error,
            "the guest's queue is malformed and was stopped; reset the device or reconnect"
        );
        if let Some(err) = &inner.err {
            signal(err);
        }
    }

    /// Takes the next request; `None` if there is none.
    fn take(&self, inner: &mut Inner) -> Result<Option<u32>, Broken> {
        let token = match inner.free.pop() {
            Some(token) => token,
            // Each has a descriptor of its own, which the guest may use again when it was answered.
            None if inner.slots.len() >= usize::from(inner.ring.size()) => {
                return Err(RingError::TooManyInFlight(inner.ring.size()).into());
            }
            None => {
                inner.slots.push(Slot {
                    chain: Chain::default(),
                    request: ParsedRequest::default(),
                    class: RequestClass::Other,
                    status: std::ptr::null_mut(),
                    len: 0,
                    written: 0,
                    started: self.reactor.now(),
                    count: Count::default(),
                    memory: inner.memory.clone(),
                    decryption: None,
                });
                inner.slots.len() as u32 - 1
            }
        };
        let slot = &mut inner.slots[token as usize];
        let taken = match inner.resubmit.pop() {
            Some(head) => inner
                .ring
                .read_chain(&inner.memory, head, &mut slot.chain)
                .map(|()| true),
            None => inner.ring.pop(&inner.memory, &mut slot.chain),
        };
        match taken {
            Ok(true) => {}
            other => {
                inner.free.push(token);
                return other.map(|_| None).map_err(Broken::from);
            }
        }
        if !Rc::ptr_eq(&slot.memory, &inner.memory) {
            slot.memory = inner.memory.clone();
        }
        slot.started = self.reactor.now();
        // A chain without room for an answer: the guest does not get it back, and the queue stops.
        if let Err(error) = slot.request.fill(&mut slot.chain) {
            inner.free.push(token);
            return Err(error.into());
        }
        if let Some(inflight) = &mut inner.inflight {
            inflight.take(slot.chain.head);
        }
        slot.count = self.client.begin();
        Ok(Some(token))
    }

    /// Has the memory fetched that resolving these requests will look at, for all of them at once.
    fn anticipate(&self, inner: &Inner, tokens: &[u32]) {
        let requests = tokens.iter().map(|t| &inner.slots[*t as usize].request);
        self.client
            .anticipate(requests.map(|r| r.sector.wrapping_mul(SECTOR_SIZE)));
    }

    fn submit(&self, inner: &mut Inner, token: u32) {
        let slot = &mut inner.slots[token as usize];
        let request = slot.request;
        slot.status = request.status;
        slot.len = request.len;
        slot.written = 1;
        slot.class = match request.kind {
            RequestKind::In => RequestClass::Read,
            RequestKind::Out => RequestClass::Write,
            RequestKind::Flush => RequestClass::Flush,
            RequestKind::Discard => RequestClass::Discard,
            RequestKind::WriteZeroes => RequestClass::WriteZeroes,
            RequestKind::GetId | RequestKind::Other(_) => RequestClass::Other,
        };
        match request.kind {
            RequestKind::In => self.transfer(inner, token, &request, Direction::Read),
            RequestKind::Out => self.transfer(inner, token, &request, Direction::Write),
            RequestKind::Flush => {
                self.slow(token, |node| async move { node.flush().await });
            }
            RequestKind::Discard | RequestKind::WriteZeroes => {
                self.ranges(inner, token, &request);
            }
            RequestKind::GetId => self.get_id(inner, token, &request),
            RequestKind::Other(_) => self.answer(inner, token, Status::Unsupported),
        }
    }

    fn transfer(
        &self,
        inner: &mut Inner,
        token: u32,
        request: &ParsedRequest,
        direction: Direction,
    ) {
        let slot = &mut inner.slots[token as usize];
        let offset = request.sector.checked_mul(SECTOR_SIZE);
        let offset = match offset {
            Some(at)
                if (at | request.len) & self.block_mask == 0
                    && (1..=MAX_TRANSFER).contains(&request.len) =>
            {
                at
            }
            _ => return self.answer(inner, token, Status::IoErr),
        };
        if direction == Direction::Read {
            slot.written = u32::try_from(request.len + 1).unwrap_or(u32::MAX);
        } else if !self.device.options.writable {
            return self.answer(inner, token, Status::IoErr);
        }
        let durable = direction == Direction::Write && !self.device.is_writeback();
        let data = request.first..request.first + request.count;
        let segments = &slot.chain.segments[data.clone()];
        let mut decryption = None;
        let submit = |file: &Arc<IoFile>, kind, offset| {
            if !file.is_direct() {
                self.buffered.set(self.buffered.get() + 1);
            }
            let Some(id) = self.id.get() else {
                return Some(Some(Status::IoErr));
            };
            // SAFETY: the segments belong to the slot, which is not used again before the
            // operation is reported; the memory is held by the slot, too.
            unsafe {
                self.reactor.submit_for_source(
                    id,
                    token,
                    file,
                    kind,
                    segments.as_ptr(),
                    segments.len() as u32,
                    offset,
                    request.len,
                );
            }
            Some(None)
        };
        let resolved = self
            .client
            .resolve(direction, offset, request.len, segments, |r| match r {
                // The write would be durable, but not where it is.
                Resolved::Direct { settled: false, .. } if durable => None,
                Resolved::Direct {
                    file,
                    offset,
                    no_flush,
                    ..
                } => {
                    let kind = match direction {
                        Direction::Read => OpKind::Read,
                        Direction::Write if durable && !no_flush => OpKind::WriteDurable,
                        Direction::Write => OpKind::Write,
                    };
                    submit(file, kind, offset)
                }
                Resolved::Encrypted {
                    file,
                    offset,
                    decryption: after,
                } => {
                    decryption = Some(after);
                    submit(file, OpKind::Read, offset)
                }
                Resolved::Zeroes if request.len > MAX_ZEROES => None,
                Resolved::Zeroes => {
                    for v in segments.iter() {
                        // SAFETY: a segment of mapped guest memory.
                        unsafe { std::ptr::write_bytes(v.iov_base.cast::<u8>(), 0, v.iov_len) };
                    }
                    Some(Some(Status::Ok))
                }
                Resolved::Nothing => Some(Some(Status::Ok)),
                Resolved::Slow(_) => None,
            });
        let fast = resolved.flatten();
        if fast == Some(None) {
            slot.decryption = decryption.map(|d| (d, data.clone()));
        }
        match fast {
            Some(done) => {
                self.stats.fast.add(1);
                if let Some(status) = done {
                    self.immediate.set(self.immediate.get() + 1);
                    self.answer(inner, token, status);
                }
            }
            None => {
                let slot = &inner.slots[token as usize];
                let segments = slot.chain.segments[data].to_vec();
                // SAFETY: the memory table keeps the segments mapped.
                let iov = unsafe { IoVecs::new(segments, slot.memory.clone()) };
                match direction {
                    Direction::Read => {
                        self.slow(
                            token,
                            move |node| async move { node.read(offset, iov).await },
                        );
                    }
                    Direction::Write => {
                        let flags = WriteFlags { durable };
                        self.slow(token, move |node| async move {
                            node.write(offset, iov, flags).await
                        });
                    }
                }
            }
        }
    }

    /// Discard and write zeroes: several ranges in one request.
    fn ranges(&self, inner: &mut Inner, token: u32, request: &ParsedRequest) {
        if !self.device.options.writable {
            return self.answer(inner, token, Status::IoErr);
        }
        let slot = &inner.slots[token as usize];
        let data = &slot.chain.segments[request.first..request.first + request.count];
        let Some(segments) = read_segments(data, self.device.max_ranges()) else {
            return self.answer(inner, token, Status::IoErr);
        };
        let discard = request.kind == RequestKind::Discard;
        // A discard has no flags at all; a zero write may have the one for unmapping.
        if segments
            .iter()
            .any(|s| s.unknown_flags != 0 || (discard && s.unmap))
        {
            return self.answer(inner, token, Status::Unsupported);
        }
        let max = self.device.max_range_sectors();
        let mask = self.block_mask;
        let bytes = |s: &RangeSegment| {
            let offset = s.sector.checked_mul(SECTOR_SIZE)?;
            let len = u64::from(s.sectors) * SECTOR_SIZE;
            (s.sectors <= max && (offset | len) & mask == 0).then_some((offset, len, s.unmap))
        };
        let Some(ranges) = segments.iter().map(bytes).collect::<Option<Vec<_>>>() else {
            return self.answer(inner, token, Status::IoErr);
        };
        inner.slots[token as usize].len = ranges.iter().map(|r| r.1).sum();
        let durable = !self.device.is_writeback();
        self.slow(token, move |node| async move {
            for (offset, len, may_unmap) in ranges {
                if discard {
                    node.discard(offset, len).await?;
                } else {
                    let flags = ZeroFlags { may_unmap, durable };
                    node.write_zeroes(offset, len, flags).await?;
                }
            }
            if discard && durable {
                node.flush().await?;
            }
            Ok(())
        });
    }

    fn get_id(&self, inner: &mut Inner, token: u32, request: &ParsedRequest) {
        let slot = &mut inner.slots[token as usize];
        let segments = slot.chain.segments[request.first..request.first + request.count].to_vec();
        let serial = self.device.serial();
        let n = serial.len().min(request.len as usize);
        // SAFETY: the memory table keeps the segments mapped.
        let iov = unsafe { IoVecs::new(segments, slot.memory.clone()) };
        iov.copy_from_slice(0, &serial[..n]);
        slot.written = n as u32 + 1;
        self.answer(inner, token, Status::Ok);
    }

    /// Sends a request down the slow path.
    fn slow<F, Fut>(&self, token: u32, f: F)
    where
        F: FnOnce(Arc<vdisk_block::Node>) -> Fut,
        Fut: Future<Output = io::Result<()>> + 'static,
    {
        self.stats.slow.add(1);
        let Some(this) = self.this.upgrade() else {
            return;
        };
        let future = f(self.client.with_node(Arc::clone));
        self.reactor.spawn(async move {
            let result = future.await;
            this.complete(token, result);
            // Slow requests may take their time: what is done is not to wait for all that are ready.
            this.show_some(&mut this.inner.borrow_mut());
            match this.id.get() {
                Some(id) => this.reactor.touch(id),
                None => this.finish_batch(),
            }
        });
    }

    /// Shows the guest every few answers of those that come one by one.
    fn show_some(&self, inner: &mut Inner) {
        let done = self.unshown.get() + 1;
        self.unshown.set(done);
        if done.is_multiple_of(PUBLISH_EVERY) {
            // A guest that sleeps is woken for the first answers; one that is awake sees the rest.
            self.publish(inner, done == PUBLISH_EVERY);
        }
    }

    /// Shows the guest what was answered, and interrupts it if it wants that.
    fn publish(&self, inner: &mut Inner, interrupt: bool) {
        if inner.ring.has_unpublished() {
            inner.ring.publish();
            if let Some(inflight) = &mut inner.inflight {
                inflight.published(inner.ring.published());
            }
            if let Some(Logging {
                log,
                used_addr: Some(used),
            }) = &inner.logging
            {
                log.mark(*used, 4);
            }
        }
        if interrupt
            && inner.ring.has_unsignalled()
            && inner.ring.needs_signal()
            && let Some(call) = &inner.call
        {
            self.stats.interrupts.add(1);
            self.reactor.stats().syscalls.add(1);
            signal(call);
        }
    }

    /// Answers a request: status, used ring, statistics. Published at the end of the batch.
    #[inline]
    fn answer(&self, inner: &mut Inner, token: u32, status: Status) {
        let slot = &inner.slots[token as usize];
        // SAFETY: the status byte lies in guest memory that the slot keeps mapped.
        unsafe { slot.status.write_volatile(status as u8) };
        let ok = status == Status::Ok;
        let written = if ok { slot.written } else { 1 };
        let head = slot.chain.head;
        self.stats.record(
            slot.class,
            slot.len,
            ok,
            self.reactor.now().saturating_duration_since(slot.started),
        );
        let entry = inner.ring.push_used(head, written);
        if let Some(inflight) = &mut inner.inflight {
            inflight.answer(head);
        }
        if let Some(logging) = &inner.logging {
            log_answer(logging, &inner.slots[token as usize], entry);
        }
        let slot = &mut inner.slots[token as usize];
        let count = slot.count;
        // A slot that is not in use must not keep an old table mapped.
        if !Rc::ptr_eq(&slot.memory, &inner.memory) {
            slot.memory = inner.memory.clone();
        }
        inner.free.push(token);
        self.client.end(count);
    }
}

/// Marks everything that answering a request wrote.
#[cold]
fn log_answer(logging: &Logging, slot: &Slot, used_entry: u64) {
    let memory = &slot.memory;
    let mark = |ptr: *const u8, len: usize| {
        if let Some(addr) = memory.guest_addr_of(ptr) {
            logging.log.mark(addr, len as u64);
        }
    };
    // All that the request would have written: one that failed may have written a part. A guest can describe terabytes in a request
    // that is refused, and marks of those would keep the I/O thread from its neighbours.
    let mut left = slot.written as usize - 1;
    for v in &slot.chain.segments[slot.chain.readable..] {
        mark(v.iov_base.cast(), v.iov_len.min(left));
        left = left.saturating_sub(v.iov_len);
        if left == 0 {
            break;
        }
    }
    mark(slot.status, 1);
    if let Some(used) = logging.used_addr {
        logging.log.mark(used.saturating_add(used_entry), 8);
    }
}

fn signal(fd: &OwnedFd) {
    // A full counter (EAGAIN) is a signal, too.
    let _ = rustix::io::write(fd, &1u64.to_ne_bytes());
}

impl Source for Queue {
    fn poll(&self) -> bool {
        if self.closed.get() || self.client.is_drained() {
            return false;
        }
        let mut inner = self.inner.borrow_mut();
        let mut any = false;
        self.immediate.set(0);
        self.buffered.set(0);
        let mut shown = 0;
        let (mut left, mut bytes) = (MAX_BATCH, 0u64);
        while left > 0 && self.buffered.get() < MAX_BUFFERED && bytes < MAX_BYTES {
            let mut tokens = [0; BATCH];
            let most = BATCH.min((MAX_BUFFERED - self.buffered.get()) as usize);
            let (mut n, mut broken) = (0, None);
            let most = match inner.ring.available() {
                Ok(ahead) => {
                    let ahead = ahead.min(most as u16);
                    if ahead > 1 {
                        let inner = &mut *inner;
                        inner.ring.prefetch(&inner.memory, ahead);
                    }
                    most.min(usize::from(ahead) + inner.resubmit.len())
                }
                Err(error) => {
                    broken = Some(error.into());
                    0
                }
            };
            while n < most && bytes < MAX_BYTES {
                match self.take(&mut inner) {
                    Ok(Some(token)) => {
                        tokens[n] = token;
                        let request = &inner.slots[token as usize].request;
                        bytes = bytes.saturating_add(request.len);
                    }
                    Ok(None) => break,
                    Err(error) => {
                        broken = Some(error);
                        break;
                    }
                }
                n += 1;
            }
            if n > 1 {
                self.anticipate(&inner, &tokens[..n]);
            }
            for &token in &tokens[..n] {
                self.submit(&mut inner, token);
                if self.immediate.get() - shown >= PUBLISH_EVERY {
                    // A guest that sleeps is woken for the first answers; one that is awake sees the rest.
                    self.publish(&mut inner, shown == 0);
                    shown = self.immediate.get();
                }
            }
            any |= n > 0;
            if let Some(error) = broken {
                self.fail(&mut inner, &error);
                break;
            }
            if n == 0 {
                break;
            }
            left = left.saturating_sub(n);
        }
        if self.immediate.get() > shown {
            self.publish(&mut inner, true);
        }
        if any && inner.memory.is_broken() {
            self.fail(&mut inner, &RingError::Gone);
        }
        if any {
            self.stats.poll_hits.add(1);
        }
        any
    }

    fn complete(&self, token: u32, result: io::Result<()>) {
        let mut inner = self.inner.borrow_mut();
        let mut decrypted = false;
        let slot = &mut inner.slots[token as usize];
        if let Some((decryption, data)) = slot.decryption.take()
            && result.is_ok()
        {
            let segments = slot.chain.segments[data].to_vec();
            // SAFETY: the memory table keeps the segments mapped.
            decryption.run(&unsafe { IoVecs::new(segments, slot.memory.clone()) });
            // The guest is to see the first of many while the rest is decrypted.
            decrypted = true;
        }
        let status = match result {
            Ok(()) => Status::Ok,
            Err(error) if error.kind() == io::ErrorKind::Unsupported => Status::Unsupported,
            Err(error) => {
                let failed = self.failed.get() + 1;
                self.failed.set(failed);
                // A guest can make requests fail at will: it must not fill the log with them.
                if failed.is_power_of_two() {
                    let slot = &inner.slots[token as usize];
                    tracing::warn!(
                        export = self.device.options.id,
                        queue = self.index,
                        request = slot.class.name(),
                        bytes = slot.len,
                        %error,
                        failed,
                        "requests fail"
                    );
                }
                Status::IoErr
            }
        };
        self.answer(&mut inner, token, status);
        if decrypted {
            self.show_some(&mut inner);
        }
    }

    fn finish_batch(&self) {
        self.unshown.set(0);
        self.publish(&mut self.inner.borrow_mut(), true);
        if self.closed.get() && self.client.in_flight() == 0 {
            self.idle.notify_waiters();
        }
    }

    fn kicked(&self) {
        self.stats.kicks.add(1);
    }

    fn set_notifications(&self, on: bool) -> bool {
        let mut inner = self.inner.borrow_mut();
        let pending = inner.ring.set_notifications(on) || !inner.resubmit.is_empty();
        on && pending && !self.closed.get() && !self.client.is_drained()
    }
}
