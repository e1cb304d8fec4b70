//! Requests in flight, kept in memory that outlives the daemon (vhost-user specification, "Inflight I/O
//! tracking", split virtqueues).
//!
//! The front-end holds the memory and hands it to the next daemon, which submits again what the last one
//! had taken and not answered. Behind the queues, where the specification leaves the layout to the
//! back-end, stands whether the guest had switched its write cache off: a daemon that came back after a
//! crash and did not know would acknowledge writes that are not durable.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering, fence};
use vdisk_api::MAX_QUEUE_SIZE;

use vdisk_virtio::{GuestMemory, GuestRegion};

/// Version of the layout.
const VERSION: u16 = 1;

/// Header of a queue region: features u64, version u16, desc_num u16, last_batch_head u16, used_idx u16.
const HEADER: u64 = 16;
/// `DescStateSplit`: inflight u8, padding, next u16, counter u64.
const DESC: u64 = 16;

const VERSION_AT: usize = 8;
const DESC_NUM_AT: usize = 10;
const LAST_BATCH_HEAD_AT: usize = 12;
const USED_IDX_AT: usize = 14;
const INFLIGHT_AT: usize = 0;
const NEXT_AT: usize = 6;
const COUNTER_AT: usize = 8;

/// The trailer: a magic number, then 0 (never set), 1 (write-through) or 2 (write-back).
const TRAILER: u64 = 64;
const MAGIC: u64 = u64::from_le_bytes(*b"vdisk-wc");

#[derive(Debug, thiserror::Error)]
pub enum InflightError {
    #[error("inflight area: {num_queues} queues of {queue_size} entries are not possible")]
    Shape { num_queues: u16, queue_size: u16 },
    #[error(
        "inflight area: {have} bytes are too few for {num_queues} queues of {queue_size} entries"
    )]
    TooSmall {
        have: u64,
        num_queues: u16,
        queue_size: u16,
    },
    #[error("inflight area: {0}")]
    Map(String),
    #[error(
        "inflight area of {num_queues} queues of {most} entries: queue {queue} with {queue_size} entries has no place in it"
    )]
    Range {
        queue: u16,
        queue_size: u16,
        num_queues: u16,
        most: u16,
    },
    #[error(
        "inflight area of queue {queue}: version {version}, {desc_num} entries; expected version {VERSION}, {queue_size} entries or more"
    )]
    Queue {
        queue: u16,
        version: u16,
        desc_num: u16,
        queue_size: u16,
    },
}

/// Where the parts of the area are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InflightLayout {
    pub num_queues: u16,
    pub queue_size: u16,
}

impl InflightLayout {
    pub fn new(num_queues: u16, queue_size: u16) -> Result<InflightLayout, InflightError> {
        if num_queues == 0 || queue_size == 0 || queue_size > 32768 {
            return Err(InflightError::Shape {
                num_queues,
                queue_size,
            });
        }
        Ok(InflightLayout {
            num_queues,
            queue_size,
        })
    }

    /// Bytes of one queue, a multiple of a cache line.
    fn queue_bytes(self) -> u64 {
        (HEADER + DESC * u64::from(self.queue_size)).next_multiple_of(64)
    }

    fn queues_bytes(self) -> u64 {
        self.queue_bytes() * u64::from(self.num_queues)
    }

    /// Bytes in all.
    pub fn bytes(self) -> u64 {
        self.queues_bytes() + TRAILER
    }
}

/// The whole area, mapped.
pub struct InflightRegion {
    layout: InflightLayout,
    memory: GuestMemory,
    /// Long enough for the trailer: an area made by another back-end may not be.
    has_trailer: bool,
}

impl InflightRegion {
    /// Makes a new area. The descriptor goes to the front-end.
    pub fn create(layout: InflightLayout) -> Result<(InflightRegion, OwnedFd), InflightError> {
        let error = |e: rustix::io::Errno| InflightError::Map(e.to_string());
        let fd = rustix::fs::memfd_create(
            "vdiskd-inflight",
            rustix::fs::MemfdFlags::CLOEXEC | rustix::fs::MemfdFlags::ALLOW_SEALING,
        )
        .map_err(error)?;
        rustix::fs::ftruncate(&fd, layout.bytes()).map_err(error)?;
        let _ = rustix::fs::fcntl_add_seals(
            &fd,
            rustix::fs::SealFlags::SHRINK | rustix::fs::SealFlags::GROW,
        );
        let region = InflightRegion::map(fd.as_fd(), layout, layout.bytes(), 0)?;
        Ok((region, fd))
    }

    /// Maps an area that a front-end sent. It may have room for longer queues than the front-end says: guests can make
    /// theirs longer than their device was made with, so we give more than is asked for. One that is all zeroes is new, or was reset
    /// by its front-end.
    pub fn map(
        fd: BorrowedFd<'_>,
        layout: InflightLayout,
        len: u64,
        offset: u64,
    ) -> Result<InflightRegion, InflightError> {
        if len < layout.queues_bytes() {
            return Err(InflightError::TooSmall {
                have: len,
                num_queues: layout.num_queues,
                queue_size: layout.queue_size,
            });
        }
        let map_error = |e: vdisk_virtio::MemoryError| InflightError::Map(e.to_string());
        if !offset.is_multiple_of(8) {
            return Err(InflightError::Map(format!(
                "offset {offset} is not aligned"
            )));
        }
        let region = GuestRegion::map(fd, 0, len, 0, offset).map_err(map_error)?;
        let mut region = InflightRegion {
            layout,
            has_trailer: false,
            memory: GuestMemory::new(vec![region]).map_err(map_error)?,
        };
        let first = region.queue_at(0);
        let version = first.u16(VERSION_AT).load(Ordering::Relaxed);
        let desc_num = first.u16(DESC_NUM_AT).load(Ordering::Relaxed);
        let noted = match (version, desc_num) {
            (VERSION, desc_num) => desc_num,
            (0, 0) => MAX_QUEUE_SIZE,
            _ => 0,
        };
        if noted > layout.queue_size
            && let Ok(longer) = InflightLayout::new(layout.num_queues, noted)
            && len >= longer.queues_bytes()
        {
            region.layout = longer;
        }
        region.has_trailer = len >= region.layout.bytes();
        for queue in 0..region.layout.num_queues {
            let q = region.queue_at(queue);
            let is_new = q.u16(VERSION_AT).load(Ordering::Relaxed) == 0;
            if is_new && q.u16(DESC_NUM_AT).load(Ordering::Relaxed) == 0 {
                let size = region.layout.queue_size;
                q.u16(DESC_NUM_AT).store(size, Ordering::Relaxed);
                q.u16(VERSION_AT).store(VERSION, Ordering::Release);
            }
        }
        Ok(region)
    }

    /// What it has room for.
    pub fn layout(&self) -> InflightLayout {
        self.layout
    }

    fn base(&self) -> *mut u8 {
        self.memory.regions()[0].host_ptr()
    }

    fn queue_at(&self, queue: u16) -> Cells {
        let at = self.layout.queue_bytes() * u64::from(queue);
        Cells(self.base().wrapping_add(at as usize))
    }

    fn trailer(&self) -> Option<Cells> {
        let at = self.layout.queues_bytes();
        self.has_trailer
            .then(|| Cells(self.base().wrapping_add(at as usize)))
    }

    /// The guest's last choice of cache, if one was noted: true for write-back.
    pub fn write_cache(&self) -> Option<bool> {
        let t = self.trailer()?;
        if t.u64(0).load(Ordering::Relaxed) != MAGIC {
            return None;
        }
        match t.u64(8).load(Ordering::Relaxed) {
            1 => Some(false),
            2 => Some(true),
            _ => None,
        }
    }

    pub fn set_write_cache(&self, on: bool) {
        if let Some(t) = self.trailer() {
            t.u64(8).store(1 + u64::from(on), Ordering::Relaxed);
            t.u64(0).store(MAGIC, Ordering::Release);
        }
    }
}

/// Shared memory seen as atomics; offsets are within what the layout reserved.
#[derive(Clone, Copy)]
struct Cells(*mut u8);

// SAFETY: what it points to is shared memory that is only reached through atomics.
unsafe impl Send for Cells {}

impl Cells {
    fn u8(&self, at: usize) -> &AtomicU8 {
        // SAFETY: `at` lies in the mapped area, which lives as long as whoever made this.
        unsafe { AtomicU8::from_ptr(self.0.add(at)) }
    }

    fn u16(&self, at: usize) -> &AtomicU16 {
        // SAFETY: as above; areas and fields are aligned.
        unsafe { AtomicU16::from_ptr(self.0.add(at).cast()) }
    }

    fn u64(&self, at: usize) -> &AtomicU64 {
        // SAFETY: as above.
        unsafe { AtomicU64::from_ptr(self.0.add(at).cast()) }
    }
}

/// The part of one queue.
pub struct InflightQueue {
    cells: Cells,
    queue_size: u16,
    counter: u64,
    /// Heads whose used entries are written and not published yet.
    batch: Vec<u16>,
    _region: Arc<InflightRegion>,
}

impl InflightQueue {
    pub fn new(
        region: &Arc<InflightRegion>,
        queue: u16,
        queue_size: u16,
    ) -> Result<InflightQueue, InflightError> {
        let layout = region.layout;
        let mismatch = |version, desc_num| InflightError::Queue {
            queue,
            version,
            desc_num,
            queue_size,
        };
        if queue >= layout.num_queues || queue_size > layout.queue_size {
            return Err(InflightError::Range {
                queue,
                queue_size,
                num_queues: layout.num_queues,
                most: layout.queue_size,
            });
        }
        let cells = region.queue_at(queue);
        let version = cells.u16(VERSION_AT).load(Ordering::Relaxed);
        let desc_num = cells.u16(DESC_NUM_AT).load(Ordering::Relaxed);
        if version != VERSION || desc_num < queue_size {
            return Err(mismatch(version, desc_num));
        }
        Ok(InflightQueue {
            cells,
            queue_size,
            counter: 0,
            batch: Vec::new(),
            _region: region.clone(),
        })
    }

    fn desc(&self, head: u16) -> Cells {
        let at = HEADER + DESC * u64::from(head);
        Cells(self.cells.0.wrapping_add(at as usize))
    }

    /// Finds what the last back-end left unanswered, oldest first, given the used index in the ring.
    pub fn recover(&mut self, used_idx: u16) -> Vec<u16> {
        // If it ended between publishing a batch and noting that, the batch is still marked.
        let noted = self.cells.u16(USED_IDX_AT);
        let behind = used_idx.wrapping_sub(noted.load(Ordering::Acquire));
        let mut head = self.cells.u16(LAST_BATCH_HEAD_AT).load(Ordering::Relaxed);
        for _ in 0..behind.min(self.queue_size) {
            if head >= self.queue_size {
                break;
            }
            let desc = self.desc(head);
            desc.u8(INFLIGHT_AT).store(0, Ordering::Relaxed);
            head = desc.u16(NEXT_AT).load(Ordering::Relaxed);
        }
        noted.store(used_idx, Ordering::Release);
        let mut left: Vec<(u64, u16)> = (0..self.queue_size)
            .filter(|head| self.desc(*head).u8(INFLIGHT_AT).load(Ordering::Relaxed) == 1)
            .map(|head| {
                (
                    self.desc(head).u64(COUNTER_AT).load(Ordering::Relaxed),
                    head,
                )
            })
            .collect();
        left.sort_unstable();
        self.counter = left
            .last()
            .map_or(0, |(counter, _)| counter.wrapping_add(1));
        left.into_iter().map(|(_, head)| head).collect()
    }

    /// A request was taken.
    #[inline]
    pub fn take(&mut self, head: u16) {
        let desc = self.desc(head);
        desc.u64(COUNTER_AT).store(self.counter, Ordering::Relaxed);
        self.counter = self.counter.wrapping_add(1);
        desc.u8(INFLIGHT_AT).store(1, Ordering::Release);
    }

    /// A used entry for the request is written; it is published with the batch.
    #[inline]
    pub fn answer(&mut self, head: u16) {
        let last = self.cells.u16(LAST_BATCH_HEAD_AT);
        self.desc(head)
            .u16(NEXT_AT)
            .store(last.load(Ordering::Relaxed), Ordering::Relaxed);
        last.store(head, Ordering::Release);
        self.batch.push(head);
    }

    /// The batch was published: the ring's used index is now `used_idx`.
    #[inline]
    pub fn published(&mut self, used_idx: u16) {
        fence(Ordering::Release);
        for head in self.batch.drain(..) {
            let at = HEADER + DESC * u64::from(head);
            let desc = Cells(self.cells.0.wrapping_add(at as usize));
            desc.u8(INFLIGHT_AT).store(0, Ordering::Relaxed);
        }
        self.cells
            .u16(USED_IDX_AT)
            .store(used_idx, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn queue() -> (Arc<InflightRegion>, InflightQueue) {
        let layout = InflightLayout::new(2, 8).unwrap();
        let (region, _fd) = InflightRegion::create(layout).unwrap();
        let region = Arc::new(region);
        let queue = InflightQueue::new(&region, 1, 8).unwrap();
        (region, queue)
    }

    fn again(region: &Arc<InflightRegion>, used: u16) -> Vec<u16> {
        InflightQueue::new(region, 1, 8).unwrap().recover(used)
    }

    #[test]
    fn what_was_taken_comes_back_in_order() {
        let (region, mut q) = queue();
        for head in [5, 2, 7, 0] {
            q.take(head);
        }
        q.answer(7);
        q.published(1);
        assert_eq!(again(&region, 1), [5, 2, 0]);
        // And once more: looking changes nothing.
        assert_eq!(again(&region, 1), [5, 2, 0]);
    }

    #[test]
    fn a_batch_that_was_published_but_not_noted_is_not_repeated() {
        let (region, mut q) = queue();
        for head in [1, 2, 3] {
            q.take(head);
        }
        q.answer(3);
        q.answer(1);
        // Ended before the ring's index changed: all must be repeated.
        assert_eq!(again(&region, 0), [1, 2, 3]);
        // Ended after it: the two of the batch are answered.
        assert_eq!(again(&region, 2), [2]);
    }

    #[test]
    fn hostile_contents_do_no_harm() {
        let (region, mut q) = queue();
        q.take(3);
        let cells = region.queue_at(1);
        cells
            .u16(LAST_BATCH_HEAD_AT)
            .store(0xffff, Ordering::Relaxed);
        assert_eq!(again(&region, 0x8000), [3]);
        cells.u16(DESC_NUM_AT).store(4, Ordering::Relaxed);
        assert!(InflightQueue::new(&region, 1, 8).is_err());
        assert!(InflightQueue::new(&region, 2, 8).is_err());
        assert!(InflightLayout::new(0, 8).is_err());
    }

    #[test]
    fn an_area_with_room_for_more_is_known_again() {
        let layout = InflightLayout::new(2, MAX_QUEUE_SIZE).unwrap();
        let (region, fd) = InflightRegion::create(layout).unwrap();
        let mut q = InflightQueue::new(&Arc::new(region), 1, 256).unwrap();
        q.take(200);
        // As a front-end gives it back that asked for less.
        let asked = InflightLayout::new(2, 128).unwrap();
        let map = || InflightRegion::map(fd.as_fd(), asked, layout.bytes(), 0).unwrap();
        let region = map();
        assert_eq!(region.layout(), layout);
        let mut q = InflightQueue::new(&Arc::new(region), 1, 256).unwrap();
        assert_eq!(q.recover(0), [200]);
        // Its front-end has reset it: nothing is in flight.
        rustix::fs::ftruncate(&fd, layout.bytes()).unwrap();
        rustix::io::pwrite(&fd, &vec![0; layout.bytes() as usize], 0).unwrap();
        let mut q = InflightQueue::new(&Arc::new(map()), 1, 256).unwrap();
        assert_eq!(q.recover(0), [0u16; 0]);
        // Too long for what is there.
        let (small, _fd) = InflightRegion::create(asked).unwrap();
        assert!(InflightQueue::new(&Arc::new(small), 1, 256).is_err());
    }

    #[test]
    fn the_write_cache_is_remembered() {
        let (region, _q) = queue();
        assert_eq!(region.write_cache(), None);
        region.set_write_cache(false);
        assert_eq!(region.write_cache(), Some(false));
        region.set_write_cache(true);
        assert_eq!(region.write_cache(), Some(true));
    }
}
