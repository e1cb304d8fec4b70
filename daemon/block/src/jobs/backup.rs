//! Backups: the target gets what the source had when the backup began, while guests write.
//!
//! `todo` has the pieces that are not copied yet. A guest's write to such a piece copies it first. Whoever copies a piece holds
//! it until its bit is cleared; a write that finds it cleared overwrites what nobody needs any more.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::{Mutex, MutexGuard};

use arc_swap::ArcSwap;
use tokio::sync::Semaphore;
use vdisk_io::{Bits, IoVecs, RangeLock, give_way};

use super::Work;
use super::copy::{
    CHUNK, CopyError, How, LOOKUP, Sharing, WriteBehind, copy, each_piece, is_zero, scratch,
};
use super::roots::Roots;
use super::state::{JobState, Side, Stop};
use crate::drivers::{LocalFuture, SlowReason};
use crate::node::Node;
use crate::status::BlockStatus;
use crate::tap::{Held, Tap, Written};

/// What is copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BackupSync {
    /// Everything.
    Full,
    /// What the source has itself; its backing file has the rest.
    Top,
    /// What is overwritten while the job runs.
    None,
    /// What a bitmap has.
    Bits,
}

/// What happens when a guest overwrites a piece that cannot be copied.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnCopyError {
    /// The write goes on, and the backup fails.
    #[default]
    BreakSnapshot,
    /// The write fails.
    BreakGuestWrite,
}

pub struct Backup {
    /// Another node may take its place below a filter.
    source: ArcSwap<Node>,
    target: Arc<Node>,
    sync: BackupSync,
    compress: bool,
    sharing: Sharing,
    on_copy_error: OnCopyError,
    todo: Bits,
    pieces: RangeLock,
    /// Permits to have a buffer for a guest's write.
    buffers: Semaphore,
    /// Why the target is not what the source was.
    broken: Mutex<Option<CopyError>>,
}

/// Guests' writes that copy at a time.
const MAX_BUFFERS: usize = 16;

fn locked<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(|e| e.into_inner())
}

impl Backup {
    pub fn new(
        source: Arc<Node>,
        target: Arc<Node>,
        sync: BackupSync,
        compress: bool,
        sharing: Sharing,
        on_copy_error: OnCopyError,
    ) -> Arc<Backup> {
        let granularity = target.limits().zero_alignment.max(65536);
        let todo = Bits::new(source.size(), granularity);
        if sync != BackupSync::Bits {
            // Guests do not have to wait for that.
            todo.set(&(0..source.size()));
        }
        Arc::new(Backup {
            todo,
            source: ArcSwap::new(source),
            target,
            sync,
            compress,
            sharing,
            on_copy_error,
            pieces: RangeLock::default(),
            buffers: Semaphore::new(MAX_BUFFERS),
            broken: Mutex::default(),
        })
    }

    fn source(&self) -> Arc<Node> {
        self.source.load_full()
    }

    /// A node with the same data has the place of the source. No request is in flight.
    pub(crate) fn set_source(&self, node: Arc<Node>) {
        self.source.store(node);
    }

    /// Bytes of the disk when it began.
    pub(crate) fn size(&self) -> u64 {
        self.todo.size()
    }

    /// From now on the target gets what the source has at this moment, `bits` of it or all. The source is drained.
    pub fn start(self: &Arc<Self>, bits: Option<&Bits>) {
        if let Some(bits) = bits {
            self.todo.merge(bits);
        }
        self.source().add_tap(self.clone());
    }

    /// Sets in `bits` what is not copied.
    pub fn missing(&self, bits: &Bits) {
        bits.merge(&self.todo);
    }

    /// Guests' writes copy nothing any more.
    pub fn stop(self: &Arc<Self>) {
        self.todo.clear(&(0..self.todo.size()));
        let tap: Arc<dyn Tap> = self.clone();
        self.source().remove_tap(&tap);
    }

    /// The part of a range that the disk had when it began.
    fn within(&self, offset: u64, len: u64) -> Range<u64> {
        let size = self.todo.size();
        offset.min(size)..(offset + len).min(size)
    }

    fn chunk(&self) -> u64 {
        CHUNK.max(self.todo.granularity())
    }

    /// Copies what is left of a range of whole pieces, which the caller holds.
    /// Guests that wait for it share nothing: that would have to bring to the disk what they have just written.
    async fn copy_held(
        &self,
        range: Range<u64>,
        scratch: &IoVecs,
        share: bool,
    ) -> Result<(), CopyError> {
        let how = How {
            compress: self.compress,
            detect_zeroes: false,
            share: (share && !self.compress).then_some(&self.sharing),
        };
        let mut at = range.start;
        while let Some(run) = self.todo.next_run(&(at..range.end), scratch.len() as u64) {
            let run = run.start..run.end.min(range.end);
            if run.is_empty() {
                break;
            }
            match self.compress {
                false => {
                    copy(&self.source(), &self.target, run.clone(), scratch, how).await?;
                }
                true => {
                    // Each cluster by itself: it is data, or zeroes.
                    let step = self.todo.granularity();
                    for start in run.clone().step_by(step as usize) {
                        let one = start..(start + step).min(run.end);
                        copy(&self.source(), &self.target, one, scratch, how).await?;
                    }
                }
            }
            self.todo.clear(&run);
            at = run.end;
        }
        Ok(())
    }

    /// Leaves out what is not to be copied, and what is zeroes on both sides.
    async fn find(&self, state: &JobState, roots: &Roots) -> Result<(), Stop> {
        let size = self.todo.size();
        let mut at = 0;
        while let Some(run) = self.todo.next_run(&(at..size), LOOKUP) {
            at = at.max(run.start);
            let busy = state.checkpoint().await?;
            let counted = roots.enter().await;
            let looked = self.look(at..run.end).await;
            drop((counted, busy));
            match looked {
                Ok((len, skip)) => {
                    let end = at + len;
                    let whole = self.todo.granularity();
                    // Pieces of which any part is to be copied are copied.
                    let from = at.next_multiple_of(whole);
                    let to = if end == size {
                        end
                    } else {
                        end / whole * whole
                    };
                    if skip && from < to {
                        let _held = self.pieces.lock(from..to).await;
                        self.todo.clear(&(from..to));
                    }
                    at = end;
                }
                Err(e) => state.failed(e.side, e.error).await?,
            }
            give_way().await;
        }
        state.add_total(self.todo.count());
        Ok(())
    }

    /// Looks at the beginning of a range: how much of it is of one kind, and whether that needs no copy.
    async fn look(&self, range: Range<u64>) -> Result<(u64, bool), CopyError> {
        let (at, len) = (range.start, range.end - range.start);
        let status = self.source().status(at, len, None).await;
        let status = status.map_err(|error| CopyError {
            side: Side::Source,
            error,
        })?;
        let other = self.sync == BackupSync::Top && !status.own;
        let skip = other || status.zero && is_zero(&self.target, at, status.len).await?;
        Ok((status.len, skip))
    }

    /// The next range of a disk that is in one place, and whether that is still the source; the caller holds it.
    fn place(&self, range: Range<u64>) -> (Range<u64>, bool) {
        let pieces = self.todo.pieces_around(&range);
        match self.todo.next_run(&pieces, pieces.end - pieces.start) {
            Some(run) if run.start <= range.start => (range.start..run.end.min(range.end), true),
            Some(run) => (range.start..run.start.min(range.end), false),
            None => (range, false),
        }
    }

    fn check_moment(&self) -> io::Result<()> {
        match &*locked(&self.broken) {
            None => Ok(()),
            Some(_) => Err(io::Error::other(
                "what was overwritten could not be copied, and is lost",
            )),
        }
    }

    /// Reads what the disk had when it began.
    pub(crate) async fn read_moment(&self, offset: u64, iov: IoVecs) -> io::Result<()> {
        let end = offset + iov.len() as u64;
        let mut at = offset;
        while at < end {
            let range = at..end.min((at / CHUNK + 1) * CHUNK);
            let _held = self.pieces.lock(self.todo.pieces_around(&range)).await;
            self.check_moment()?;
            while at < range.end {
                let (part, in_source) = self.place(at..range.end);
                let data = iov.slice((at - offset) as usize, (part.end - at) as usize);
                match in_source {
                    true => self.source().read(at, data).await?,
                    false => self.target.read(at, data).await?,
                }
                at = part.end;
            }
            // It may have been lost under the read.
            self.check_moment()?;
        }
        Ok(())
    }

    /// What is known of the disk as it was when it began.
    pub(crate) async fn status_of_moment(&self, offset: u64, len: u64) -> io::Result<BlockStatus> {
        let range = offset..offset + len.min(LOOKUP);
        let _held = self.pieces.lock(self.todo.pieces_around(&range)).await;
        self.check_moment()?;
        let (part, in_source) = self.place(range);
        let len = part.end - part.start;
        let status = match in_source {
            true => self.source().status(offset, len, None).await?,
            false => self.target.status(offset, len, None).await?,
        };
        self.check_moment()?;
        Ok(BlockStatus {
            own: true,
            ..status
        })
    }

    /// An error if the target is not what the source was.
    pub fn check(&self) -> Result<(), Stop> {
        match locked(&self.broken).take() {
            None => Ok(()),
            Some(e) => Err(Stop::Failed {
                side: e.side,
                error: e.error,
            }),
        }
    }
}

impl Work for Backup {
    fn run<'a>(
        &'a self,
        state: &'a JobState,
        roots: &'a Roots,
    ) -> LocalFuture<'a, Result<(), Stop>> {
        Box::pin(async move {
            if self.sync == BackupSync::None {
                while state.ending().is_none() {
                    drop(state.checkpoint().await?);
                    self.check()?;
                    state.set_ready();
                    state.idle(std::time::Duration::from_millis(200)).await;
                }
            } else {
                self.find(state, roots).await?;
                let chunk = self.chunk();
                let mut from = 0;
                let behind = WriteBehind::new(self.target.clone());
                each_piece(
                    state,
                    Some(&behind),
                    chunk,
                    || {
                        if locked(&self.broken).is_some() {
                            return None;
                        }
                        let run = self.todo.next_run(&(from..self.todo.size()), chunk)?;
                        let end = run.end.min((run.start / chunk + 1) * chunk);
                        from = end;
                        Some(run.start..end)
                    },
                    async |piece, scratch| {
                        let _counted = roots.enter().await;
                        let _held = self.pieces.lock(piece.clone()).await;
                        self.copy_held(piece, scratch, true).await
                    },
                )
                .await?;
            }
            self.check()?;
            loop {
                let busy = state.checkpoint().await?;
                let counted = roots.enter().await;
                let result = self.target.flush().await;
                drop((counted, busy));
                match result {
                    Ok(()) => {
                        state.all_done();
                        return self.check();
                    }
                    Err(e) => state.flush_failed(e).await?,
                }
            }
        })
    }

    fn finish(&self) -> LocalFuture<'_, Result<(), Stop>> {
        Box::pin(async { Ok(()) })
    }
}

impl Tap for Backup {
    #[inline]
    fn fast_write(&self, offset: u64, len: u64) -> Option<SlowReason> {
        let range = self.within(offset, len);
        self.todo.any(&range).then_some(SlowReason::BackedUp)
    }

    fn slow_reason(&self) -> Option<SlowReason> {
        Some(SlowReason::BackedUp)
    }

    fn before(&self, offset: u64, len: u64) -> LocalFuture<'_, io::Result<Held<'_>>> {
        Box::pin(async move {
            let range = self.within(offset, len);
            if !self.todo.any(&range) || locked(&self.broken).is_some() {
                return Ok(None);
            }
            // Piece by piece: a guest may zero terabytes with one request.
            let whole = self.todo.pieces_around(&range);
            let mut at = whole.start;
            while let Some(run) = self.todo.next_run(&(at..whole.end), self.chunk()) {
                at = run.end;
                let _held = self.pieces.lock(run.clone()).await;
                if !self.todo.any(&run) {
                    continue;
                }
                let _permit = self.buffers.acquire().await;
                let buffer = scratch(run.end - run.start);
                if let Err(e) = self.copy_held(run, &buffer, false).await {
                    match self.on_copy_error {
                        OnCopyError::BreakGuestWrite => return Err(e.error),
                        OnCopyError::BreakSnapshot => {
                            locked(&self.broken).get_or_insert(e);
                            return Ok(None);
                        }
                    }
                }
            }
            Ok(None)
        })
    }

    fn after<'a>(&'a self, _: u64, _: u64, _: Written, _: Held<'a>) -> LocalFuture<'a, ()> {
        Box::pin(async {})
    }
}
