//! Split virtqueues (Virtual I/O Device specification 1.3, section 2.7), device side.

use std::sync::atomic::{AtomicU16, Ordering, fence};

use vdisk_io::prefetch;

use crate::memory::GuestMemory;

const DESC_F_NEXT: u16 = 1;
const DESC_F_WRITE: u16 = 2;
const DESC_F_INDIRECT: u16 = 4;
const AVAIL_F_NO_INTERRUPT: u16 = 1;
const USED_F_NO_NOTIFY: u16 = 1;

const DESC_SIZE: u64 = 16;

/// Most descriptors in an indirect table. No more segments are ever offered (`seg_max`), and a longer list
/// would only cost memory and time.
const MAX_INDIRECT: u64 = 1026;

/// Largest queue size of a split ring.
const MAX_SIZE: u16 = 32768;

/// Written to `avail_event` while notifications are off: half the index space away from any index the
/// driver is about to use.
pub const USED_EVENT_SUPPRESS: u16 = 0x8000;

#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RingError {
    #[error("queue size {0} is not a power of two between 1 and 32768")]
    Size(u16),
    #[error("the {part} at front-end address {addr:#x} is not in shared memory or not aligned")]
    Address { part: &'static str, addr: u64 },
    #[error("the driver made {0} entries available on a queue of {1}")]
    TooManyAvailable(u16, u16),
    #[error("the driver has more requests in flight than a queue of {0} has descriptors")]
    TooManyInFlight(u16),
    #[error("descriptor index {0} is outside the table")]
    Index(u32),
    #[error("descriptor chain starting at {0} is longer than its table: it has a loop")]
    Loop(u16),
    #[error("descriptor address {addr:#x}+{len:#x} is outside guest memory")]
    Memory { addr: u64, len: u32 },
    #[error("a device-readable descriptor follows a device-writable one")]
    Order,
    #[error("an indirect descriptor table of {0} bytes is not valid")]
    IndirectLen(u32),
    #[error("an indirect descriptor lies within an indirect table, or has a successor")]
    IndirectNested,
    #[error("an indirect descriptor was used, which was not negotiated")]
    IndirectNotNegotiated,
    #[error("guest memory was taken away")]
    Gone,
}

/// Where a front-end says the parts of a ring are, in its own address space.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RingAddresses {
    pub desc: u64,
    pub avail: u64,
    pub used: u64,
}

#[derive(Clone, Copy)]
#[repr(C)]
struct Desc {
    addr: u64,
    len: u32,
    flags: u16,
    next: u16,
}

/// The buffers of one request: first what the device reads, then what it writes. Made once per queue and
/// filled again for each request.
#[derive(Default)]
pub struct Chain {
    /// The first descriptor, which names the chain in the used ring.
    pub head: u16,
    pub segments: Vec<libc::iovec>,
    /// How many of the segments the device reads; it writes the rest.
    pub readable: usize,
}

/// The device side of a split virtqueue in guest memory.
///
/// The pointers refer to the [`GuestMemory`] that was given to [`SplitRing::new`] or
/// [`SplitRing::relocate`]; the owner of the ring keeps that alive and passes it to [`SplitRing::pop`].
pub struct SplitRing {
    desc: *const Desc,
    avail: *mut u16,
    used: *mut u16,
    size: u16,
    event_idx: bool,
    indirect: bool,
    next_avail: u16,
    /// The guest's available index when it was last read: what lies before it is taken without another look, which would
    /// take the line from a guest that is writing it.
    seen_avail: u16,
    next_used: u16,
    /// The used index that the guest has seen.
    published: u16,
    /// The used index at the last signal.
    signalled: u16,
    /// The published index when the guest's wish was last asked for.
    asked: u16,
    hint: usize,
    addresses: RingAddresses,
}

struct Pointers {
    desc: *const Desc,
    avail: *mut u16,
    used: *mut u16,
}

fn locate(memory: &GuestMemory, at: &RingAddresses, size: u16) -> Result<Pointers, RingError> {
    let n = u64::from(size);
    let find = |part, addr: u64, len, align: u64| {
        memory
            .translate_user(addr, len)
            .filter(|p| (*p as u64).is_multiple_of(align))
            .ok_or(RingError::Address { part, addr })
    };
    Ok(Pointers {
        desc: find("descriptor table", at.desc, DESC_SIZE * n, 8)?
            .cast_const()
            .cast(),
        // flags, idx, ring, used_event
        avail: find("available ring", at.avail, 4 + 2 * n + 2, 2)?.cast(),
        // flags, idx, ring, avail_event
        used: find("used ring", at.used, 4 + 8 * n + 2, 4)?.cast(),
    })
}

impl SplitRing {
    /// A ring of `size` descriptors that goes on at available index `next_avail`, and at the used index
    /// that stands in guest memory.
    pub fn new(
        memory: &GuestMemory,
        addresses: RingAddresses,
        size: u16,
        next_avail: u16,
        event_idx: bool,
        indirect: bool,
    ) -> Result<SplitRing, RingError> {
        if !size.is_power_of_two() || size > MAX_SIZE {
            return Err(RingError::Size(size));
        }
        let p = locate(memory, &addresses, size)?;
        let mut ring = SplitRing {
            desc: p.desc,
            avail: p.avail,
            used: p.used,
            size,
            event_idx,
            indirect,
            next_avail,
            seen_avail: next_avail,
            next_used: 0,
            published: 0,
            signalled: 0,
            asked: 0,
            hint: 0,
            addresses,
        };
        let used = ring.used_idx().load(Ordering::Acquire);
        ring.next_used = used;
        ring.published = used;
        // What was published before, by us or another, may not have been signalled.
        ring.signalled = used.wrapping_sub(1);
        ring.asked = used;
        Ok(ring)
    }

    /// Moves the ring to where the same addresses are in another memory table.
    pub fn relocate(&mut self, memory: &GuestMemory) -> Result<(), RingError> {
        let p = locate(memory, &self.addresses, self.size)?;
        (self.desc, self.avail, self.used) = (p.desc, p.avail, p.used);
        self.hint = 0;
        Ok(())
    }

    pub fn size(&self) -> u16 {
        self.size
    }

    /// The available index that the next `pop` takes.
    pub fn next_avail(&self) -> u16 {
        self.next_avail
    }

    pub fn set_next_avail(&mut self, index: u16) {
        self.next_avail = index;
        self.seen_avail = index;
    }

    /// The used index that the guest has been shown.
    pub fn published(&self) -> u16 {
        self.published
    }

    pub fn set_features(&mut self, event_idx: bool, indirect: bool) {
        self.event_idx = event_idx;
        self.indirect = indirect;
    }

    fn avail_idx(&self) -> &AtomicU16 {
        // SAFETY: in bounds (see `locate`) and aligned; shared with the guest, hence atomic.
        unsafe { AtomicU16::from_ptr(self.avail.add(1)) }
    }

    fn used_idx(&self) -> &AtomicU16 {
        // SAFETY: as for `avail_idx`.
        unsafe { AtomicU16::from_ptr(self.used.add(1)) }
    }

    fn avail_flags(&self) -> &AtomicU16 {
        // SAFETY: as for `avail_idx`.
        unsafe { AtomicU16::from_ptr(self.avail) }
    }

    fn used_flags(&self) -> &AtomicU16 {
        // SAFETY: as for `avail_idx`.
        unsafe { AtomicU16::from_ptr(self.used) }
    }

    fn used_event(&self) -> &AtomicU16 {
        // SAFETY: the field behind the available ring, within what `locate` checked.
        unsafe { AtomicU16::from_ptr(self.avail.add(2 + usize::from(self.size))) }
    }

    fn avail_event(&self) -> &AtomicU16 {
        // SAFETY: the field behind the used ring, within what `locate` checked.
        unsafe { AtomicU16::from_ptr(self.used.add(2 + 4 * usize::from(self.size))) }
    }

    /// Looks how many chains wait to be taken.
    #[inline]
    pub fn available(&mut self) -> Result<u16, RingError> {
        let idx = self.avail_idx().load(Ordering::Acquire);
        let n = idx.wrapping_sub(self.next_avail);
        if n > self.size {
            return Err(RingError::TooManyAvailable(n, self.size));
        }
        self.seen_avail = idx;
        Ok(n)
    }

    /// Takes the next available chain into `chain`; false if there is none. After an error the ring must
    /// not be used any more.
    #[inline]
    pub fn pop(&mut self, memory: &GuestMemory, chain: &mut Chain) -> Result<bool, RingError> {
        if self.next_avail == self.seen_avail && self.available()? == 0 {
            return Ok(false);
        }
        let slot = usize::from(self.next_avail & (self.size - 1));
        // SAFETY: `slot` is less than the queue size.
        let head = unsafe { AtomicU16::from_ptr(self.avail.add(2 + slot)) }.load(Ordering::Relaxed);
        self.read_chain(memory, head, chain)?;
        self.next_avail = self.next_avail.wrapping_add(1);
        Ok(true)
    }

    /// Fetches what the next `n` chains will be read from into the cache: their descriptors and what the
    /// first of them points to. Nothing that is read here is used for anything else; the lines come from
    /// another CPU's cache, and fetching several at once hides most of the wait.
    #[inline]
    pub fn prefetch(&mut self, memory: &GuestMemory, n: u16) {
        let heads = |ring: &SplitRing, i: u16| {
            let slot = usize::from(ring.next_avail.wrapping_add(i) & (ring.size - 1));
            // SAFETY: `slot` is less than the queue size.
            let head =
                unsafe { AtomicU16::from_ptr(ring.avail.add(2 + slot)) }.load(Ordering::Relaxed);
            (head < ring.size).then(|| ring.desc.wrapping_add(usize::from(head)))
        };
        for i in 0..n {
            if let Some(desc) = heads(self, i) {
                prefetch(desc);
            }
        }
        for i in 0..n {
            if let Some(desc) = heads(self, i) {
                // SAFETY: in the table; the guest may change it, hence volatile.
                let addr = unsafe { desc.read_volatile() }.addr;
                memory.translate(addr, 1, &mut self.hint, |at, _| prefetch(at.cast_const()));
            }
        }
    }

    /// Reads the chain that starts at `head`, which need not be available (any more): what was in flight
    /// when another back-end ended is taken up again by its head.
    pub fn read_chain(
        &mut self,
        memory: &GuestMemory,
        head: u16,
        chain: &mut Chain,
    ) -> Result<(), RingError> {
        chain.head = head;
        chain.segments.clear();
        chain.readable = 0;
        let mut writable = false;
        let mut index = head;
        // At most as many descriptors as the table has: more is a loop.
        for _ in 0..self.size {
            if index >= self.size {
                return Err(RingError::Index(index.into()));
            }
            // SAFETY: `index` lies in the table; the guest may change it, hence read once, volatile.
            let desc = unsafe { self.desc.add(usize::from(index)).read_volatile() };
            if desc.flags & DESC_F_INDIRECT != 0 {
                if !self.indirect {
                    return Err(RingError::IndirectNotNegotiated);
                }
                if desc.flags & DESC_F_NEXT != 0 {
                    return Err(RingError::IndirectNested);
                }
                return self.read_indirect(memory, &desc, chain, writable);
            }
            add(memory, &desc, chain, &mut writable, &mut self.hint)?;
            if desc.flags & DESC_F_NEXT == 0 {
                return Ok(());
            }
            index = desc.next;
        }
        Err(RingError::Loop(head))
    }

    fn read_indirect(
        &mut self,
        memory: &GuestMemory,
        table: &Desc,
        chain: &mut Chain,
        mut writable: bool,
    ) -> Result<(), RingError> {
        let bytes = u64::from(table.len);
        let count = bytes / DESC_SIZE;
        if bytes % DESC_SIZE != 0 || count == 0 || count > MAX_INDIRECT {
            return Err(RingError::IndirectLen(table.len));
        }
        let mut index = 0;
        for _ in 0..count {
            if index >= count {
                return Err(RingError::Index(index as u32));
            }
            let desc = read_desc(memory, table.addr, index * DESC_SIZE, &mut self.hint).ok_or(
                RingError::Memory {
                    addr: table.addr,
                    len: table.len,
                },
            )?;
            if desc.flags & DESC_F_INDIRECT != 0 {
                return Err(RingError::IndirectNested);
            }
            add(memory, &desc, chain, &mut writable, &mut self.hint)?;
            if desc.flags & DESC_F_NEXT == 0 {
                return Ok(());
            }
            index = u64::from(desc.next);
        }
        Err(RingError::Loop(chain.head))
    }

    /// Puts a finished chain into the used ring; the guest sees it after [`SplitRing::publish`].
    /// `written` is how many bytes the device wrote. Returns the byte offset of the entry in the used
    /// ring, for the dirty log.
    #[inline]
    pub fn push_used(&mut self, head: u16, written: u32) -> u64 {
        let slot = usize::from(self.next_used & (self.size - 1));
        // SAFETY: `slot` is less than the queue size; entries of 8 bytes follow the 4-byte header.
        unsafe {
            let entry = self.used.add(2 + 4 * slot).cast::<u32>();
            entry.write_volatile(u32::from(head));
            entry.add(1).write_volatile(written);
        }
        self.next_used = self.next_used.wrapping_add(1);
        4 + 8 * slot as u64
    }

    /// Whether anything was pushed since the last publish.
    #[inline]
    pub fn has_unpublished(&self) -> bool {
        self.next_used != self.published
    }

    /// Shows the guest everything that was pushed.
    #[inline]
    pub fn publish(&mut self) {
        self.used_idx().store(self.next_used, Ordering::Release);
        self.published = self.next_used;
    }

    /// Whether anything was published since [`SplitRing::needs_signal`] was last asked.
    #[inline]
    pub fn has_unsignalled(&self) -> bool {
        self.asked != self.published
    }

    /// Whether the guest wants to be interrupted for what was published since the last time that this
    /// returned true (section 2.7.7.2).
    #[inline]
    pub fn needs_signal(&mut self) -> bool {
        // The published index must be visible before the guest's wish is read.
        fence(Ordering::SeqCst);
        self.asked = self.published;
        if !self.event_idx {
            let wanted = self.avail_flags().load(Ordering::Relaxed) & AVAIL_F_NO_INTERRUPT == 0;
            let any = self.signalled != self.published;
            self.signalled = self.published;
            return wanted && any;
        }
        let event = self.used_event().load(Ordering::Relaxed);
        let new = self.published;
        let passed = new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(self.signalled);
        if passed {
            self.signalled = new;
        }
        passed
    }

    /// Asks the guest to notify us of new chains, or not to (a hint that it may ignore). Asking returns
    /// true if some came before the request took effect.
    #[inline]
    pub fn set_notifications(&mut self, on: bool) -> bool {
        if self.event_idx {
            let event = if on {
                self.next_avail
            } else {
                self.next_avail.wrapping_sub(USED_EVENT_SUPPRESS)
            };
            self.avail_event().store(event, Ordering::Relaxed);
        } else {
            let flags = if on { 0 } else { USED_F_NO_NOTIFY };
            self.used_flags().store(flags, Ordering::Relaxed);
        }
        if !on {
            return false;
        }
        // The wish must be visible before we look for what came without notice.
        fence(Ordering::SeqCst);
        self.avail_idx().load(Ordering::Acquire) != self.next_avail
    }
}

#[inline]
fn add(
    memory: &GuestMemory,
    desc: &Desc,
    chain: &mut Chain,
    writable: &mut bool,
    hint: &mut usize,
) -> Result<(), RingError> {
    if desc.flags & DESC_F_WRITE != 0 {
        *writable = true;
    } else if *writable {
        return Err(RingError::Order);
    }
    if desc.len == 0 {
        return Ok(());
    }
    let segments = &mut chain.segments;
    let found = memory.translate(desc.addr, desc.len.into(), hint, |base, len| {
        segments.push(libc::iovec {
            iov_base: base.cast(),
            iov_len: len,
        })
    });
    if !found {
        return Err(RingError::Memory {
            addr: desc.addr,
            len: desc.len,
        });
    }
    if !*writable {
        chain.readable = segments.len();
    }
    Ok(())
}

/// Reads one descriptor of an indirect table, which may lie across regions and unaligned.
fn read_desc(memory: &GuestMemory, table: u64, offset: u64, hint: &mut usize) -> Option<Desc> {
    let mut bytes = [0u8; DESC_SIZE as usize];
    let mut at = 0;
    let found = memory.translate(table.checked_add(offset)?, DESC_SIZE, hint, |base, len| {
        // SAFETY: `translate` gives pieces of mapped memory that together have the asked length.
        unsafe { std::ptr::copy_nonoverlapping(base, bytes.as_mut_ptr().add(at), len) };
        at += len;
    });
    let word = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
    found.then(|| Desc {
        addr: u64::from_le_bytes([
            bytes[0], bytes[1], bytes[2], bytes[3], bytes[4], bytes[5], bytes[6], bytes[7],
        ]),
        len: u32::from_le_bytes([bytes[8], bytes[9], bytes[10], bytes[11]]),
        flags: word(12),
        next: word(14),
    })
}
