//! A node of the block graph: a driver, with what all drivers have in common.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard};

use arc_swap::ArcSwapOption;
use tokio::sync::Semaphore;
use vdisk_api::{DetectZeroes, Discard, NodeOptions, Result};
use vdisk_io::{Bits, IoFile, IoVecs, RangeLock, Recorder};

use crate::bitmap::Bitmap;
use crate::drivers::{
    self, Direction, Driver, Inactive, Limits, OpenedDriver, Resolved, SlowReason, Told,
};
use crate::jobs::Backup;
use crate::runtime::Runtime;
use crate::status::BlockStatus;
use crate::tap::{Held, Tap, Written};
use crate::threshold::Threshold;

/// Bounce buffers have at most about this many bytes, whatever a guest asks for.
const CHUNK: u64 = 1 << 20;

/// Zeroes are written in pieces of this many bytes where the storage has no better way.
const ZERO_CHUNK: u64 = 1 << 16;

/// Bounce buffers of one node at a time.
const MAX_BOUNCES: usize = 32;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WriteFlags {
    /// Complete only when the data is durable (FUA).
    pub durable: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ZeroFlags {
    /// The range may be freed.
    pub may_unmap: bool,
    pub durable: bool,
}

/// Data of a node that is in one place.
#[derive(Clone, Copy)]
pub struct Source<'a> {
    pub node: &'a Node,
    pub offset: u64,
    pub len: u64,
}

impl<'a> Source<'a> {
    pub(crate) fn part(self, from: u64, len: u64) -> Source<'a> {
        let offset = self.offset + from;
        Source {
            offset,
            len,
            ..self
        }
    }

    /// Calls `then` with the file that has it and the byte offset there. None if it is in several places, or nobody knows.
    pub(crate) fn place<R>(self, then: impl FnOnce(&Arc<IoFile>, u64) -> R) -> Option<R> {
        let (mut then, mut found) = (Some(then), None);
        let mut tell = |resolved: Resolved<'_>| {
            if let Resolved::Direct { file, offset, .. } = resolved {
                found = then.take().map(|then| then(file, offset));
            }
        };
        let node = self.node;
        node.resolve_range(Direction::Read, self.offset, self.len, &mut tell);
        found
    }
}

pub struct Node {
    name: String,
    driver: Box<dyn Driver>,
    limits: Limits,
    read_only: AtomicBool,
    /// What is discarded is freed.
    unmaps: AtomicBool,
    /// A [`DetectZeroes`].
    detect_zeroes: AtomicU8,
    /// Bytes.
    size: AtomicU64,
    /// Some client may write less than a block: all writes are serialised by `writes`.
    small_writes: AtomicBool,
    writes: RangeLock,
    /// Permits to have a bounce buffer, so that guests cannot make us take any amount of memory.
    bounces: Semaphore,
    /// The same for copies of what is written twice; whoever has one may need a bounce buffer, too.
    copies: Semaphore,
    /// There are taps.
    tapped: AtomicBool,
    taps: ArcSwapOption<Taps>,
    bitmaps: Mutex<BTreeMap<String, Arc<Bitmap>>>,
    /// What was written in its place before, and may not be durable yet.
    predecessor: ArcSwapOption<Node>,
    threshold: Mutex<Option<Arc<Threshold>>>,
}

type Taps = Vec<Arc<dyn Tap>>;

/// Cuts a range at multiples of [`CHUNK`]: (offset, length) of each piece.
fn chunks(mut offset: u64, len: u64) -> impl Iterator<Item = (u64, u64)> {
    let end = offset + len;
    std::iter::from_fn(move || {
        let at = offset;
        let n = (CHUNK - at % CHUNK).min(end - at);
        offset += n;
        (n > 0).then_some((at, n))
    })
}

fn out_of_range() -> io::Error {
    io::Error::from_raw_os_error(libc::EINVAL)
}

impl Node {
    /// Opens the node's driver; may block.
    pub(crate) fn open(
        name: &str,
        options: &NodeOptions,
        children: &[Arc<Node>],
        runtime: &Runtime,
    ) -> Result<Arc<Node>> {
        let opened = drivers::open(name, options, children, runtime)?;
        Ok(Node::with(name, options, opened))
    }

    /// One that is not open, of which so much is known.
    pub(crate) fn inactive(name: &str, options: &NodeOptions, known: Inactive) -> Arc<Node> {
        let opened = OpenedDriver {
            size: known.size,
            read_only: options.read_only,
            driver: Box::new(known),
        };
        Node::with(name, options, opened)
    }

    fn with(name: &str, options: &NodeOptions, opened: OpenedDriver) -> Arc<Node> {
        let limits = opened.driver.limits();
        Arc::new(Node {
            name: name.to_owned(),
            limits,
            read_only: AtomicBool::new(opened.read_only),
            unmaps: AtomicBool::new(options.discard == Discard::Unmap),
            detect_zeroes: AtomicU8::new(options.detect_zeroes as u8),
            size: AtomicU64::new(opened.size),
            driver: opened.driver,
            small_writes: AtomicBool::new(false),
            writes: RangeLock::default(),
            bounces: Semaphore::new(MAX_BOUNCES),
            copies: Semaphore::new(MAX_BOUNCES),
            tapped: AtomicBool::new(false),
            taps: ArcSwapOption::empty(),
            bitmaps: Mutex::default(),
            predecessor: ArcSwapOption::empty(),
            threshold: Mutex::default(),
        })
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn driver_name(&self) -> &'static str {
        self.driver.name()
    }

    pub fn filename(&self) -> Option<String> {
        self.driver.filename()
    }

    pub fn limits(&self) -> Limits {
        self.limits
    }

    /// Bytes.
    pub fn size(&self) -> u64 {
        self.size.load(Relaxed)
    }

    pub fn is_read_only(&self) -> bool {
        self.read_only.load(Relaxed)
    }

    /// Nothing is written to it from now on. The caller has drained everything above.
    pub fn set_read_only(&self) {
        self.read_only.store(true, Relaxed);
    }

    pub fn discards(&self) -> bool {
        self.unmaps.load(Relaxed)
    }

    pub fn set_discard(&self, discard: Discard) {
        self.unmaps.store(discard == Discard::Unmap, Relaxed);
    }

    pub fn detect_zeroes(&self) -> DetectZeroes {
        match self.detect_zeroes.load(Relaxed) {
            n if n == DetectZeroes::On as u8 => DetectZeroes::On,
            n if n == DetectZeroes::Unmap as u8 => DetectZeroes::Unmap,
            _ => DetectZeroes::Off,
        }
    }

    pub fn set_detect_zeroes(&self, detect: DetectZeroes) {
        self.detect_zeroes.store(detect as u8, Relaxed);
    }

    /// A client may write blocks of `block_size` bytes.
    pub fn announce_block_size(&self, block_size: u64) {
        if block_size < self.limits.request_alignment {
            self.small_writes.store(true, Relaxed);
        }
        self.driver.announce_block_size(block_size);
    }

    /// Block size of the storage at the bottom, in bytes.
    pub fn storage_block_size(&self) -> u64 {
        self.driver.storage_block_size()
    }

    /// Why requests of this direction take the slow path, if all of them do.
    pub fn slow_reason(&self, direction: Direction) -> Option<SlowReason> {
        if direction == Direction::Write {
            if self.detect_zeroes.load(Relaxed) != DetectZeroes::Off as u8 {
                return Some(SlowReason::DetectZeroes);
            }
            if self.small_writes.load(Relaxed) {
                return Some(SlowReason::SmallBlocks);
            }
            if let Some(taps) = self.taps()
                && let Some(reason) = taps.iter().find_map(|t| t.slow_reason())
            {
                return Some(reason);
            }
        }
        self.driver.slow_reason(direction)
    }

    // Taps.

    fn taps(&self) -> Option<Arc<Taps>> {
        match self.tapped.load(Ordering::Acquire) {
            true => self.taps.load_full(),
            false => None,
        }
    }

    /// Has `tap` see writes. Those under way may not be seen.
    pub(crate) fn add_tap(&self, tap: Arc<dyn Tap>) {
        let mut taps = self
            .taps
            .load_full()
            .as_deref()
            .cloned()
            .unwrap_or_default();
        taps.push(tap);
        self.taps.store(Some(Arc::new(taps)));
        self.tapped.store(true, Ordering::Release);
    }

    /// Ends that. Writes under way may still be seen.
    pub(crate) fn remove_tap(&self, tap: &Arc<dyn Tap>) {
        let mut taps = self
            .taps
            .load_full()
            .as_deref()
            .cloned()
            .unwrap_or_default();
        taps.retain(|t| !Arc::ptr_eq(t, tap));
        self.tapped.store(!taps.is_empty(), Ordering::Release);
        self.taps.store((!taps.is_empty()).then(|| Arc::new(taps)));
    }

    /// Has `tell` called once, on any thread, with the number of bytes by which a write reaches beyond the offset `limit`, in
    /// place of what was set before. 0 ends that.
    pub fn set_write_threshold(&self, limit: u64, tell: impl Fn(u64) + Send + Sync + 'static) {
        let mut threshold = self.threshold.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(old) = threshold.take() {
            let old: Arc<dyn Tap> = old;
            self.remove_tap(&old);
        }
        if limit > 0 {
            let new = Arc::new(Threshold::new(limit, Box::new(tell)));
            self.add_tap(new.clone());
            *threshold = Some(new);
        }
    }

    /// The offset that no write has reached beyond; 0 if there is none to tell of.
    pub fn write_threshold(&self) -> u64 {
        let threshold = self.threshold.lock().unwrap_or_else(|e| e.into_inner());
        threshold.as_ref().and_then(|t| t.limit()).unwrap_or(0)
    }

    fn all_bitmaps(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Bitmap>>> {
        self.bitmaps.lock().unwrap_or_else(|e| e.into_inner())
    }

    pub fn bitmap(&self, name: &str) -> Option<Arc<Bitmap>> {
        self.all_bitmaps().get(name).cloned()
    }

    pub fn bitmaps(&self) -> Vec<Arc<Bitmap>> {
        self.all_bitmaps().values().cloned().collect()
    }

    /// Adds a bitmap under a new name. Exact if everything above is drained.
    pub fn add_bitmap(&self, name: &str, granularity: u64, recording: bool) {
        let recorder = Recorder::new(Bits::new(self.size(), granularity), recording);
        let bitmap = Bitmap::new(name, recorder, false);
        self.add_tap(bitmap.clone());
        self.all_bitmaps().insert(name.to_owned(), bitmap);
    }

    /// As [`Node::add_bitmap`], in the node's image, which keeps it.
    pub fn add_persistent_bitmap(
        &self,
        name: &str,
        granularity: u64,
        recording: bool,
    ) -> io::Result<()> {
        let image = self.image().ok_or(io::ErrorKind::Unsupported)?;
        image.add_bitmap(name, granularity, recording)?;
        self.find_bitmaps();
        Ok(())
    }

    pub fn remove_bitmap(&self, name: &str) {
        let removed = self.all_bitmaps().remove(name);
        let Some(bitmap) = removed else {
            return;
        };
        match (bitmap.is_persistent(), self.image()) {
            (true, Some(image)) => image.remove_bitmap(name),
            _ => {
                let tap: Arc<dyn Tap> = bitmap;
                self.remove_tap(&tap);
            }
        }
    }

    /// Takes over the bitmaps of the image: those that it has in memory.
    fn find_bitmaps(&self) {
        let Some(image) = self.image() else {
            return;
        };
        let mut all = self.all_bitmaps();
        let live = image.live_bitmaps();
        all.retain(|name, b| !b.is_persistent() || live.iter().any(|(n, _)| n == name));
        for (name, recorder) in live {
            // It may have been loaded anew.
            if all.get(&name).is_none_or(|b| !b.is_of(&recorder)) {
                let bitmap = Bitmap::new(&name, recorder, true);
                all.insert(name, bitmap);
            }
        }
    }

    fn set_size(&self, size: u64) {
        self.size.store(size, Relaxed);
        for bitmap in self.bitmaps() {
            bitmap.fit(size);
        }
    }

    async fn before<'a>(
        taps: &'a Option<Arc<Taps>>,
        offset: u64,
        len: u64,
    ) -> io::Result<Vec<Held<'a>>> {
        let mut held = Vec::new();
        for tap in taps.iter().flat_map(|t| t.iter()) {
            held.push(tap.before(offset, len).await?);
        }
        Ok(held)
    }

    async fn after<'a>(
        taps: &'a Option<Arc<Taps>>,
        offset: u64,
        len: u64,
        written: Written,
        held: Vec<Held<'a>>,
    ) {
        let taps = taps.iter().flat_map(|t| t.iter());
        for (tap, held) in taps.zip(held) {
            tap.after(offset, len, written.clone(), held).await;
        }
    }

    // The fast path.

    /// Where reads go that find nothing here.
    pub(crate) fn backing(&self) -> Option<Arc<Node>> {
        self.driver.backing()
    }

    /// See [`Driver::anticipate`].
    #[inline]
    pub(crate) fn anticipate(&self, offset: u64) -> bool {
        self.driver.anticipate(offset)
    }

    /// As [`Node::resolve_range`]; false if the backing node is to be asked.
    #[inline]
    pub(crate) fn resolve_here(
        &self,
        direction: Direction,
        offset: u64,
        len: u64,
        then: &mut dyn FnMut(Resolved<'_>),
    ) -> bool {
        match self.why_slow(direction, offset, len) {
            Some(reason) => then(Resolved::Slow(reason)),
            None => return self.driver.resolve_here(direction, offset, len, then),
        }
        true
    }

    #[inline]
    pub(crate) fn resolve_range(
        &self,
        direction: Direction,
        offset: u64,
        len: u64,
        then: &mut dyn FnMut(Resolved<'_>),
    ) {
        match self.why_slow(direction, offset, len) {
            Some(reason) => then(Resolved::Slow(reason)),
            None => self.driver.resolve(direction, offset, len, then),
        }
    }

    /// Why the node itself, whatever its driver says, sends a request down the slow path.
    #[inline]
    fn why_slow(&self, direction: Direction, offset: u64, len: u64) -> Option<SlowReason> {
        if self.check(direction, offset, len).is_err() {
            return Some(SlowReason::Refused);
        }
        if (offset | len) & (self.limits.request_alignment - 1) != 0 {
            return Some(SlowReason::Unaligned);
        }
        if direction == Direction::Write {
            if self.detect_zeroes.load(Relaxed) != DetectZeroes::Off as u8 {
                return Some(SlowReason::DetectZeroes);
            }
            if self.small_writes.load(Relaxed) {
                return Some(SlowReason::SmallBlocks);
            }
            if self.tapped.load(Relaxed) {
                let taps = self.taps.load();
                let mut taps = taps.iter().flat_map(|t| t.iter());
                return taps.find_map(|tap| tap.fast_write(offset, len));
            }
        }
        None
    }

    #[inline]
    fn check(&self, direction: Direction, offset: u64, len: u64) -> io::Result<()> {
        if direction == Direction::Write && self.is_read_only() {
            return Err(io::Error::from_raw_os_error(libc::EROFS));
        }
        match offset.checked_add(len) {
            Some(end) if end <= self.size() => Ok(()),
            _ => Err(out_of_range()),
        }
    }

    // The slow path.

    /// The smallest range of whole blocks around a range.
    fn blocks_around(&self, offset: u64, len: u64) -> Range<u64> {
        let align = self.limits.request_alignment;
        let start = offset & !(align - 1);
        // Cannot overflow: the range ends within the size, which is a multiple of the alignment.
        start..(offset + len).next_multiple_of(align)
    }

    fn bounce(&self, len: u64) -> IoVecs {
        let align = self
            .limits
            .memory_alignment
            .max(self.limits.request_alignment as usize);
        IoVecs::zeroed(len as usize, align.max(512))
    }

    pub async fn read(&self, offset: u64, iov: IoVecs) -> io::Result<()> {
        let len = iov.len() as u64;
        self.check(Direction::Read, offset, len)?;
        if len == 0 {
            return Ok(());
        }
        let blocks = self.blocks_around(offset, len);
        if blocks == (offset..offset + len) && iov.is_aligned(self.limits.memory_alignment) {
            return self.driver.read(offset, iov).await;
        }
        for (at, n) in chunks(offset, len) {
            let blocks = self.blocks_around(at, n);
            let _permit = self.bounces.acquire().await;
            let bounce = self.bounce(blocks.end - blocks.start);
            self.driver.read(blocks.start, bounce.clone()).await?;
            iov.slice((at - offset) as usize, n as usize)
                .copy_from(&bounce.slice((at - blocks.start) as usize, n as usize));
        }
        Ok(())
    }

    /// Reads what there is of the range without a reactor, for opening what stands on this node.
    pub(crate) fn read_blocking(&self, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        let len = (self.size().saturating_sub(offset)).min(len as u64);
        self.driver.read_blocking(offset, len as usize)
    }

    pub async fn write(&self, offset: u64, iov: IoVecs, flags: WriteFlags) -> io::Result<()> {
        let len = iov.len() as u64;
        self.check(Direction::Write, offset, len)?;
        if len == 0 {
            return Ok(());
        }
        let detect = self.detect_zeroes();
        if detect != DetectZeroes::Off && iov.is_zero_in_turns().await {
            let zero = ZeroFlags {
                may_unmap: detect == DetectZeroes::Unmap,
                durable: flags.durable,
            };
            return self.write_zeroes(offset, len, zero).await;
        }
        let taps = self.taps();
        if taps.is_none() {
            return self.write_data(offset, iov, flags).await;
        }
        let stable = taps.iter().flat_map(|t| t.iter()).any(|t| t.needs_stable());
        if !stable {
            return self.write_tapped(&taps, offset, iov, flags, false).await;
        }
        for (at, n) in chunks(offset, len) {
            let _permit = self.copies.acquire().await;
            let copy = self.bounce(n);
            copy.copy_from(&iov.slice((at - offset) as usize, n as usize));
            self.write_tapped(&taps, at, copy, flags, true).await?;
        }
        Ok(())
    }

    async fn write_tapped(
        &self,
        taps: &Option<Arc<Taps>>,
        offset: u64,
        iov: IoVecs,
        flags: WriteFlags,
        stable: bool,
    ) -> io::Result<()> {
        let len = iov.len() as u64;
        let held = Node::before(taps, offset, len).await?;
        self.write_data(offset, iov.clone(), flags).await?;
        let written = Written::Data { iov, stable };
        Node::after(taps, offset, len, written, held).await;
        Ok(())
    }

    async fn write_data(&self, offset: u64, iov: IoVecs, flags: WriteFlags) -> io::Result<()> {
        let len = iov.len() as u64;
        let blocks = self.blocks_around(offset, len);
        let _serial = self.serialise(&blocks).await;
        if blocks == (offset..offset + len) && iov.is_aligned(self.limits.memory_alignment) {
            return self.driver.write(offset, iov, flags).await;
        }
        for (at, n) in chunks(offset, len) {
            let part = iov.slice((at - offset) as usize, n as usize);
            self.write_bounced(at, part, flags).await?;
        }
        Ok(())
    }

    /// Holds the blocks of a write if another client may write a part of one.
    async fn serialise(&self, blocks: &Range<u64>) -> Option<impl Drop + '_> {
        if self.small_writes.load(Relaxed) {
            Some(self.writes.lock(blocks.clone()).await)
        } else {
            None
        }
    }

    /// Writes through a bounce buffer to blocks that the caller holds. The first and the last may be
    /// covered in part: the rest of them is read first.
    async fn write_bounced(&self, offset: u64, iov: IoVecs, flags: WriteFlags) -> io::Result<()> {
        let end = offset + iov.len() as u64;
        let blocks = self.blocks_around(offset, iov.len() as u64);
        let align = self.limits.request_alignment;
        let _permit = self.bounces.acquire().await;
        let bounce = self.bounce(blocks.end - blocks.start);
        if blocks.start < offset {
            let head = bounce.slice(0, align as usize);
            self.driver.read(blocks.start, head).await?;
        }
        let last = blocks.end - align;
        if end < blocks.end && (blocks.start == offset || last > blocks.start) {
            let tail = bounce.slice((last - blocks.start) as usize, align as usize);
            self.driver.read(last, tail).await?;
        }
        bounce
            .slice((offset - blocks.start) as usize, iov.len())
            .copy_from(&iov);
        self.driver.write(blocks.start, bounce, flags).await
    }

    pub async fn flush(&self) -> io::Result<()> {
        self.flush_predecessor().await?;
        self.driver.flush().await
    }

    /// Begins to move to the disk what was written: see [`Driver::write_behind`].
    pub async fn write_behind(&self) {
        self.driver.write_behind().await;
    }

    /// Makes durable what was written in this node's place before: see [`Node::succeed`].
    pub async fn flush_predecessor(&self) -> io::Result<()> {
        if let Some(old) = self.predecessor.load_full() {
            // It may have one itself.
            Box::pin(old.flush()).await?;
            self.predecessor
                .compare_and_swap(&old, Option::<Arc<Node>>::None);
        }
        Ok(())
    }

    /// This node takes the place of another, to which nothing is written any more: its next flush makes durable what was
    /// written there, too.
    pub fn succeed(&self, old: &Arc<Node>) {
        self.predecessor.store(Some(old.clone()));
    }

    /// Frees what can be freed of the range; a node that ignores discards does nothing.
    pub async fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.check(Direction::Write, offset, len)?;
        if !self.discards() {
            return Ok(());
        }
        let align = self.limits.request_alignment;
        let start = offset.next_multiple_of(align);
        let end = (offset + len) & !(align - 1);
        if start >= end {
            return Ok(());
        }
        let taps = self.taps();
        let held = Node::before(&taps, start, end - start).await?;
        let serial = self.serialise(&(start..end)).await;
        match self.driver.discard(start, end - start).await {
            Err(e) if e.kind() == io::ErrorKind::Unsupported => return Ok(()),
            other => other?,
        }
        drop(serial);
        Node::after(&taps, start, end - start, Written::Discarded, held).await;
        Ok(())
    }

    pub async fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> io::Result<()> {
        self.check(Direction::Write, offset, len)?;
        if len == 0 {
            return Ok(());
        }
        let flags = ZeroFlags {
            may_unmap: flags.may_unmap && self.discards(),
            ..flags
        };
        let taps = self.taps();
        let held = Node::before(&taps, offset, len).await?;
        self.write_zero_range(offset, len, flags).await?;
        let may_unmap = flags.may_unmap;
        Node::after(&taps, offset, len, Written::Zeroes { may_unmap }, held).await;
        Ok(())
    }

    /// Gives back the space of a range of zeroes, of whole units of [`Limits::zero_alignment`], to which the caller lets nobody
    /// write meanwhile. Nobody is told: what the node has does not change.
    pub(crate) async fn free_zeroes(&self, offset: u64, len: u64) -> io::Result<()> {
        self.check(Direction::Write, offset, len)?;
        let flags = ZeroFlags {
            may_unmap: true,
            ..ZeroFlags::default()
        };
        self.driver.write_zeroes(offset, len, flags).await
    }

    async fn write_zero_range(&self, offset: u64, len: u64, flags: ZeroFlags) -> io::Result<()> {
        let blocks = self.blocks_around(offset, len);
        let _serial = self.serialise(&blocks).await;
        let align = self.limits.request_alignment;
        let start = offset.next_multiple_of(align);
        let end = (offset + len) & !(align - 1);
        if start >= end {
            return self.write_zero_data(offset, len, flags.durable).await;
        }
        self.write_zero_data(offset, start - offset, flags.durable)
            .await?;
        match self.driver.write_zeroes(start, end - start, flags).await {
            Err(e) if e.kind() == io::ErrorKind::Unsupported => {
                self.write_zero_data(start, end - start, flags.durable)
                    .await?
            }
            other => other?,
        }
        self.write_zero_data(end, offset + len - end, flags.durable)
            .await
    }

    /// Writes zeroes as data, in blocks that the caller holds.
    async fn write_zero_data(&self, mut offset: u64, len: u64, durable: bool) -> io::Result<()> {
        let end = offset + len;
        let zeroes = self.bounce(len.min(ZERO_CHUNK));
        while offset < end {
            let n = (end - offset).min(ZERO_CHUNK);
            let part = zeroes.slice(0, n as usize);
            let blocks = self.blocks_around(offset, n);
            let flags = WriteFlags { durable };
            if blocks == (offset..offset + n) {
                self.driver.write(offset, part, flags).await?;
            } else {
                self.write_bounced(offset, part, flags).await?;
            }
            offset += n;
        }
        Ok(())
    }

    /// Writes whole clusters of an image (the last as far as the disk reaches) compressed.
    pub(crate) async fn write_compressed(&self, offset: u64, iov: IoVecs) -> io::Result<()> {
        let len = iov.len() as u64;
        self.check(Direction::Write, offset, len)?;
        let taps = self.taps();
        let held = Node::before(&taps, offset, len).await?;
        self.driver.write_compressed(offset, iov.clone()).await?;
        // It is in memory of a job's, which nobody else writes to.
        let written = Written::Data { iov, stable: true };
        Node::after(&taps, offset, len, written, held).await;
        Ok(())
    }

    /// Writes a range where the node has no data of its own: see [`Driver::populate`].
    pub(crate) async fn populate(
        &self,
        offset: u64,
        len: u64,
        data: Option<IoVecs>,
    ) -> io::Result<()> {
        self.check(Direction::Write, offset, len)?;
        self.driver.populate(offset, len, data).await
    }

    /// Whether [`Node::share`] may do something with data in this file.
    pub(crate) fn shares_with(&self, file: &IoFile) -> bool {
        self.driver.shares_with(file)
    }

    /// Has a range read as `source` without copying: both share the blocks of one file system, and what is written to either
    /// later is its own. `Unsupported` if that cannot be done here, `WouldBlock` if not at this moment; some of it may have
    /// been done then. With `missing` only where the node has no data of its own, as [`Node::populate`].
    pub(crate) async fn share(
        &self,
        offset: u64,
        source: Source<'_>,
        missing: bool,
    ) -> io::Result<()> {
        self.check(Direction::Write, offset, source.len)?;
        let blocks = self.blocks_around(offset, source.len);
        let looks_at_data = self.detect_zeroes() != DetectZeroes::Off || self.taps().is_some();
        if looks_at_data || blocks != (offset..offset + source.len) {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let _serial = self.serialise(&blocks).await;
        self.driver.share(offset, source, missing).await
    }

    /// What is known of the bytes at `offset`, of `len` (at least one) at most. What comes from `base` or from below it is
    /// not the node's own; without a base, what comes from a backing file is not.
    pub async fn status(
        &self,
        offset: u64,
        len: u64,
        base: Option<&Arc<Node>>,
    ) -> io::Result<BlockStatus> {
        self.check(Direction::Read, offset, len)?;
        let status = self.driver.status(offset, len, base).await?;
        Ok(BlockStatus {
            len: status.len.clamp(1, len),
            ..status
        })
    }

    /// Whether a range is known to read as zeroes.
    pub(crate) async fn is_zero(&self, offset: u64, len: u64) -> io::Result<bool> {
        let (mut at, end) = (offset, offset + len);
        while at < end {
            let status = self.status(at, end - at, None).await?;
            if !status.zero {
                return Ok(false);
            }
            at += status.len;
        }
        Ok(true)
    }

    /// Takes space for the range, so that writes to it cannot fail for want of it.
    pub async fn reserve(&self, offset: u64, len: u64) -> io::Result<()> {
        self.check(Direction::Write, offset, len)?;
        self.driver.reserve(offset, len).await
    }

    /// Whether it can become larger, and then reads as zeroes.
    pub fn grows(&self) -> bool {
        self.driver.grows()
    }

    /// Changes the size to `size` bytes. The caller has drained everything above.
    pub async fn resize(&self, size: u64) -> io::Result<u64> {
        if self.is_read_only() {
            return Err(io::Error::from_raw_os_error(libc::EROFS));
        }
        if !size.is_multiple_of(self.limits.request_alignment) {
            return Err(out_of_range());
        }
        let now = self.driver.resize(size).await?;
        self.set_size(now);
        tracing::debug!(node = self.name, size = now, "resized");
        Ok(now)
    }

    /// A child was resized: takes over the size that follows. The caller has drained everything above.
    pub fn follow_child(&self) {
        if let Some(size) = self.driver.size_from_children() {
            self.set_size(size);
        }
    }

    /// Somebody waits for all requests in flight, or does so no more: nothing is held back meanwhile.
    pub(crate) fn drain(&self, on: bool) {
        self.driver.drain(on);
    }

    /// Has requests fail that wait for a server's answer, here or below; see [`crate::Driver::give_up`].
    pub fn give_up(self: &Arc<Self>, wholly: bool) -> bool {
        let all = self.with_all_below();
        let given_up = all.iter().filter(|n| n.driver.give_up(wholly));
        given_up.count() > 0
    }

    /// Says to whoever has the storage whether all is written that is to be: nobody is to use it before. What is written afterwards
    /// takes that back.
    pub async fn set_finished(&self, on: bool) -> io::Result<()> {
        self.driver.set_finished(on).await
    }

    /// The node is part of the graph now: what it suspends can be told to go on.
    pub(crate) fn enter(&self) {
        self.driver.enter();
    }

    /// The node was taken out of the graph: nothing is held back from now on, as nobody could let it go.
    pub fn leave(&self) {
        self.drain(true);
    }

    /// See [`Driver::step`].
    pub(crate) fn step(&self, event: &'static str, offset: u64, len: u64) -> Told<'_> {
        self.driver.step(event, offset, len)
    }

    /// The same, waited for.
    pub(crate) async fn before_step(
        &self,
        event: &'static str,
        offset: u64,
        len: u64,
    ) -> io::Result<()> {
        match self.driver.step(event, offset, len) {
            Some(told) => told.await,
            None => Ok(()),
        }
    }

    /// The tags of requests that wait until they are told to go on (driver `blkdebug`).
    pub fn suspended(&self) -> Vec<String> {
        self.driver.suspended()
    }

    /// Has a suspended request go on. False if there is none with this tag.
    pub fn go_on(&self, tag: &str) -> bool {
        self.driver.go_on(tag)
    }

    /// The node and everything below it.
    pub fn with_all_below(self: &Arc<Self>) -> Vec<Arc<Node>> {
        let (mut all, mut todo): (Vec<Arc<Node>>, _) = (Vec::new(), vec![self.clone()]);
        while let Some(node) = todo.pop() {
            if !all.iter().any(|n| Arc::ptr_eq(n, &node)) {
                todo.extend(node.driver.below());
                all.push(node);
            }
        }
        all
    }

    /// Gives a filter another child. False if this is none. The caller has drained everything above.
    pub fn set_file(&self, node: Arc<Node>) -> bool {
        self.driver.set_file(node)
    }

    /// Gives an image another backing node, or none, with its name and format in the header. The caller has drained
    /// everything above.
    pub async fn set_backing(
        &self,
        node: Option<Arc<Node>>,
        named: Option<(String, String)>,
    ) -> io::Result<()> {
        self.driver.set_backing(node, named).await
    }

    /// Opens the node for writing; it is to be activated then. May block; the caller has drained everything above.
    pub fn make_writable(&self) -> Result<()> {
        if !self.is_read_only() {
            return Ok(());
        }
        let made = self.driver.make_writable();
        made.map_err(|e| e.context(format_args!("node '{}'", self.name)))?;
        self.read_only.store(false, Relaxed);
        Ok(())
    }

    /// The reverse. It was deactivated.
    pub fn make_read_only(&self) {
        self.set_read_only();
        self.driver.make_read_only();
    }

    /// What the node has kept of one moment.
    pub(crate) fn moment(&self) -> Option<Arc<Backup>> {
        self.driver.moment()
    }

    /// Its storage is open. If not, requests fail, and only a front-end that starts (or a command) opens it.
    pub fn is_active(&self) -> bool {
        self.driver.is_active()
    }

    /// Other hosts are kept from opening any of the images while they are open here.
    pub fn is_locked_for_other_hosts(self: &Arc<Self>) -> bool {
        let all = self.with_all_below();
        all.iter().all(|n| n.driver.is_locked_for_other_hosts())
    }

    /// It shows its child as it is.
    pub fn is_filter(&self) -> bool {
        self.driver.is_filter()
    }

    /// The qcow2 image that the node serves. What changes its size is followed by [`Node::follow_image`].
    pub fn image(&self) -> Option<Arc<vdisk_qcow2::Image>> {
        self.driver.image()
    }

    /// The image may have another size. The caller has drained everything above.
    pub fn follow_image(&self) {
        if let Some(image) = self.driver.image() {
            self.set_size(image.size());
        }
    }

    /// The size is that of the child: they change together.
    pub(crate) fn has_size_of_child(&self) -> bool {
        self.driver.size_from_children().is_some()
    }

    /// Makes ready for requests. On an I/O thread, after everything below.
    pub async fn activate(&self) -> io::Result<()> {
        self.driver.activate().await?;
        self.find_bitmaps();
        Ok(())
    }

    /// Brings what is kept in memory to the storage. On an I/O thread, before anything below; no request is in
    /// flight, and none may come any more.
    pub async fn deactivate(&self) -> io::Result<()> {
        let result = self.driver.deactivate().await;
        self.find_bitmaps();
        result
    }

    /// Lets go of the storage. No request is in flight, and none may come any more.
    pub async fn close(&self) {
        self.driver.close().await;
    }
}

impl std::fmt::Debug for Node {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Node")
            .field("name", &self.name)
            .field("driver", &self.driver_name())
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU32;

    use proptest::prelude::*;
    use vdisk_io::{IoThread, IoThreadConfig, Reactor};

    use super::*;
    use crate::chain::BackingChain;
    use crate::drivers::LocalFuture;

    /// Storage in memory with blocks of 4096 bytes, which answers only after other tasks had their turn.
    struct Blocks {
        data: Mutex<Vec<u8>>,
        zeroes: bool,
        writes: AtomicU32,
        flushes: AtomicU32,
        cannot_flush: AtomicBool,
        file: Option<Arc<IoFile>>,
    }

    const BLOCK: u64 = 4096;

    async fn give_way() {
        if let Some(r) = Reactor::current() {
            r.sleep(std::time::Duration::from_micros(50)).await;
        }
    }

    fn aligned(offset: u64, len: usize) -> std::ops::Range<usize> {
        assert!(offset.is_multiple_of(BLOCK) && (len as u64).is_multiple_of(BLOCK));
        offset as usize..offset as usize + len
    }

    impl Driver for Arc<Blocks> {
        fn name(&self) -> &'static str {
            "blocks"
        }

        fn limits(&self) -> Limits {
            Limits {
                request_alignment: BLOCK,
                memory_alignment: 512,
                zero_alignment: BLOCK,
            }
        }

        fn resolve(&self, _: Direction, offset: u64, _: u64, then: &mut dyn FnMut(Resolved<'_>)) {
            then(match &self.file {
                Some(file) => Resolved::Direct {
                    file,
                    offset,
                    no_flush: false,
                    settled: true,
                },
                None => Resolved::Nothing,
            });
        }

        fn slow_reason(&self, _: Direction) -> Option<SlowReason> {
            None
        }

        fn read(&self, offset: u64, iov: IoVecs) -> LocalFuture<'_, io::Result<()>> {
            Box::pin(async move {
                assert!(iov.is_aligned(512));
                let copy = self.data.lock().unwrap()[aligned(offset, iov.len())].to_vec();
                give_way().await;
                iov.copy_from_slice(0, &copy);
                Ok(())
            })
        }

        fn write(
            &self,
            offset: u64,
            iov: IoVecs,
            _: WriteFlags,
        ) -> LocalFuture<'_, io::Result<()>> {
            Box::pin(async move {
                assert!(iov.is_aligned(512));
                give_way().await;
                self.writes.fetch_add(1, Relaxed);
                iov.copy_to_slice(
                    0,
                    &mut self.data.lock().unwrap()[aligned(offset, iov.len())],
                );
                Ok(())
            })
        }

        fn flush(&self) -> LocalFuture<'_, io::Result<()>> {
            self.flushes.fetch_add(1, Relaxed);
            Box::pin(async {
                match self.cannot_flush.load(Relaxed) {
                    true => Err(io::Error::from_raw_os_error(libc::EIO)),
                    false => Ok(()),
                }
            })
        }

        fn discard(&self, _: u64, _: u64) -> LocalFuture<'_, io::Result<()>> {
            Box::pin(async { Err(io::ErrorKind::Unsupported.into()) })
        }

        fn write_zeroes(
            &self,
            offset: u64,
            len: u64,
            _: ZeroFlags,
        ) -> LocalFuture<'_, io::Result<()>> {
            Box::pin(async move {
                if !self.zeroes {
                    return Err(io::ErrorKind::Unsupported.into());
                }
                give_way().await;
                self.data.lock().unwrap()[aligned(offset, len as usize)].fill(0);
                Ok(())
            })
        }

        fn resize(&self, size: u64) -> LocalFuture<'_, io::Result<u64>> {
            Box::pin(async move { Ok(size) })
        }
    }

    fn node(size: usize, zeroes: bool) -> (Arc<Node>, Arc<Blocks>) {
        node_on(size, zeroes, None)
    }

    /// With a file, that is where its data is.
    fn node_on(size: usize, zeroes: bool, file: Option<Arc<IoFile>>) -> (Arc<Node>, Arc<Blocks>) {
        let blocks = Arc::new(Blocks {
            data: Mutex::new(vec![0xee; size]),
            zeroes,
            writes: AtomicU32::new(0),
            flushes: AtomicU32::new(0),
            cannot_flush: AtomicBool::new(false),
            file,
        });
        let node = Node {
            name: "n".into(),
            limits: blocks.limits(),
            driver: Box::new(blocks.clone()),
            read_only: AtomicBool::new(false),
            unmaps: AtomicBool::new(true),
            detect_zeroes: AtomicU8::new(DetectZeroes::Off as u8),
            size: AtomicU64::new(size as u64),
            small_writes: AtomicBool::new(false),
            writes: RangeLock::default(),
            bounces: Semaphore::new(2),
            copies: Semaphore::new(2),
            tapped: AtomicBool::new(false),
            taps: ArcSwapOption::empty(),
            bitmaps: Mutex::default(),
            predecessor: ArcSwapOption::empty(),
            threshold: Mutex::default(),
        };
        node.announce_block_size(512);
        (Arc::new(node), blocks)
    }

    fn block_on<T>(f: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap()
            .block_on(f)
    }

    #[test]
    fn parts_of_one_block_written_at_once_are_all_kept() {
        let threads =
            [0, 1].map(|i| IoThread::start(IoThreadConfig::new(format!("t{i}"))).unwrap());
        let (node, blocks) = node(4 * BLOCK as usize, true);
        let (tx, rx) = std::sync::mpsc::channel();
        for sector in 0..32u64 {
            let (node, tx) = (node.clone(), tx.clone());
            threads[sector as usize % 2].post(move |r| {
                r.spawn(async move {
                    let iov = IoVecs::from_slice(&[sector as u8 + 100; 512]);
                    let result = node.write(sector * 512, iov, WriteFlags::default()).await;
                    tx.send(result.is_ok()).unwrap();
                });
            });
        }
        assert!((0..32).all(|_| rx.recv().unwrap()));
        let data = blocks.data.lock().unwrap();
        for (i, sector) in data.chunks(512).enumerate() {
            assert!(
                sector.iter().all(|b| usize::from(*b) == i + 100),
                "sector {i}"
            );
        }
        for t in threads {
            t.stop();
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// Any mix of requests reads and leaves what a plain array would.
        #[test]
        fn requests_of_any_alignment_do_what_they_say(
            ops in proptest::collection::vec((0..4u8, 0..64u64, 1..40u64, any::<u8>()), 1..20),
            zeroes: bool,
        ) {
            let size = 64 * 512;
            let (node, blocks) = node(size, zeroes);
            let mut model = vec![0xee; size];
            let thread = IoThread::start(IoThreadConfig::new("t")).unwrap();
            for (op, sector, sectors, byte) in ops {
                let start = sector * 512;
                let len = (sectors * 512).min(size as u64 - start);
                let range = start as usize..(start + len) as usize;
                let there = node.clone();
                let got = block_on(thread.run_async(move |_| async move {
                    let iov = IoVecs::zeroed(len as usize, 1);
                    match op {
                        0 => there.read(start, iov.clone()).await?,
                        1 => {
                            iov.copy_from_slice(0, &vec![byte; len as usize]);
                            there.write(start, iov.clone(), WriteFlags::default()).await?;
                        }
                        2 => there.write_zeroes(start, len, ZeroFlags::default()).await?,
                        _ => there.discard(start, len).await?,
                    }
                    let mut got = vec![0; len as usize];
                    iov.copy_to_slice(0, &mut got);
                    std::io::Result::Ok(got)
                })).unwrap().unwrap();
                match op {
                    0 => prop_assert_eq!(&got[..], &model[range]),
                    1 => model[range].fill(byte),
                    2 => model[range].fill(0),
                    _ => {}
                }
                prop_assert_eq!(&*blocks.data.lock().unwrap(), &model);
            }
            thread.stop();
        }
    }

    #[test]
    fn a_flush_makes_durable_what_was_written_in_its_place_before() {
        let (oldest, at_bottom) = node(BLOCK as usize, true);
        let (old, between) = node(BLOCK as usize, true);
        let (new, on_top) = node(BLOCK as usize, true);
        let flushes = || [&at_bottom, &between, &on_top].map(|b| b.flushes.load(Relaxed));
        old.succeed(&oldest);
        new.succeed(&old);
        at_bottom.cannot_flush.store(true, Relaxed);
        assert!(block_on(new.flush()).is_err());
        assert!(block_on(new.flush()).is_err());
        assert_eq!(flushes(), [2, 0, 0]);
        at_bottom.cannot_flush.store(false, Relaxed);
        assert!(block_on(new.flush()).is_ok());
        assert_eq!(flushes(), [3, 1, 1]);
        assert!(block_on(new.flush()).is_ok());
        assert_eq!(flushes(), [3, 1, 2]);
    }

    #[test]
    fn memory_that_the_file_does_not_take_is_left_to_the_slow_path() {
        let scratch = tempfile::tempfile().unwrap();
        let file = IoFile::new(scratch.into(), true, 512);
        let (node, _) = node_on(4096, true, Some(file));
        let buf = vdisk_io::AlignedBuf::new(8192, 4096);
        let at = |skip: usize| libc::iovec {
            iov_base: buf.as_mut_ptr().wrapping_add(skip).cast(),
            iov_len: 4096,
        };
        let is_fast = |skip| {
            BackingChain::of(node.clone()).resolve(Direction::Read, 0, 4096, &[at(skip)], |r| {
                matches!(r, Resolved::Direct { .. })
            })
        };
        assert_eq!([0, 512].map(is_fast), [Some(true); 2]);
        assert_eq!([1, 4, 256].map(is_fast), [Some(false); 3]);
    }

    #[test]
    fn what_is_out_of_bounds_or_read_only_is_refused() {
        let (node, _) = node(4096, true);
        assert!(node.check(Direction::Read, 4096, 0).is_ok());
        for (offset, len) in [(4096, 1), (0, 4097), (u64::MAX, 1), (u64::MAX, u64::MAX)] {
            assert!(node.check(Direction::Read, offset, len).is_err());
        }
        let refused =
            BackingChain::of(node.clone()).resolve(Direction::Write, 4096, 512, &[], |r| {
                matches!(r, Resolved::Slow(SlowReason::Refused))
            });
        assert_eq!(refused, Some(true));
        assert_eq!(
            node.slow_reason(Direction::Write),
            Some(SlowReason::SmallBlocks)
        );
        assert_eq!(node.slow_reason(Direction::Read), None);
    }
}
