//! Mirrors: the target is brought to what the source is, while guests write, and may take its place.
//!
//! `dirty` has the pieces in which the target may differ. A guest's write sets its bits before it is done. To copy a piece,
//! the job clears its bits, waits until every write has ended that may have set them earlier, and reads the source after
//! that: whoever writes from then on sets the bit again.
//!
//! While writes are blocking, a write holds the pieces that it touches from before it begins until the target has it, too, as
//! a copy does. Pieces that were clean before are clean again then. Nothing is cleared by writes before all those have ended
//! that took the fast path.

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use futures_util::future::join;
use tokio::sync::oneshot;
use vdisk_io::{Bits, IoVecs, RangeLock, give_way};

use super::Work;
use super::copy::{
    CHUNK, CopyError, How, LOOKUP, Sharing, WriteBehind, copy, each_piece, is_zero, scratch,
};
use super::roots::Roots;
use super::state::{JobState, Side, Stop};
use crate::drivers::{LocalFuture, SlowReason};
use crate::node::{Node, WriteFlags, ZeroFlags};
use crate::tap::{Held, Hold, Tap, Written};

/// Bytes whose bits are cleared at a time: the wait for writes is once for all of them.
const BATCH: u64 = 64 << 20;

/// How long a mirror with nothing to do waits before it looks again.
const LOOK: Duration = Duration::from_millis(50);

/// Less than this is copied while guests wait.
const LAST: u64 = 4 << 20;

/// Rounds that are tried to get below that.
const MAX_ROUNDS: u32 = 20;

/// What is copied.
#[derive(Clone, Debug)]
pub enum MirrorSync {
    /// Everything.
    Full,
    /// What the source has itself; its backing file has the rest.
    Top,
    /// What is written from now on.
    None,
    /// What bits say, and what is written from now on: see [`Mirror::add`].
    Bits,
    /// What the source and what it stands on have above this node.
    Above(Arc<Node>),
}

pub struct Mirror {
    source: Arc<Node>,
    target: Arc<Node>,
    behind: WriteBehind,
    sync: MirrorSync,
    dirty: Bits,
    pieces: RangeLock,
    /// Writes go to the target, too.
    blocking: AtomicBool,
    /// No write is under way that began on the fast path.
    all_slow: AtomicBool,
    /// What is to be copied has been found: it is run once more to catch up.
    found: AtomicBool,
    /// It serves guests and may become the source: ends when it is told to. A copy ends when all is copied.
    stays: bool,
    compress: bool,
    sharing: Sharing,
    /// Who is to be told that the target's owner knows that all is written.
    to_hand_over: Mutex<Option<oneshot::Sender<io::Result<()>>>>,
}

impl Mirror {
    /// `granularity` is in bytes, a power of two.
    pub fn new(
        source: Arc<Node>,
        target: Arc<Node>,
        sync: MirrorSync,
        granularity: u64,
        blocking: bool,
        sharing: Sharing,
    ) -> Arc<Mirror> {
        Arc::new(Mirror {
            dirty: Bits::new(source.size(), granularity),
            behind: WriteBehind::new(target.clone()),
            source,
            target,
            sync,
            pieces: RangeLock::default(),
            blocking: AtomicBool::new(blocking),
            all_slow: AtomicBool::new(false),
            found: AtomicBool::new(false),
            stays: true,
            compress: false,
            sharing,
            to_hand_over: Mutex::default(),
        })
    }

    /// A copy of a node that nobody writes to.
    pub fn once(
        source: Arc<Node>,
        target: Arc<Node>,
        sync: MirrorSync,
        compress: bool,
        sharing: Sharing,
    ) -> Arc<Mirror> {
        let granularity = target.limits().zero_alignment.max(65536);
        Arc::new(Mirror {
            dirty: Bits::new(source.size(), granularity),
            behind: WriteBehind::new(target.clone()),
            source,
            target,
            sync,
            pieces: RangeLock::default(),
            blocking: AtomicBool::new(false),
            all_slow: AtomicBool::new(false),
            found: AtomicBool::new(false),
            stays: false,
            compress,
            sharing,
            to_hand_over: Mutex::default(),
        })
    }

    /// Sees all writes from when this returns, or (if the node was drained) from now on.
    pub fn start(self: &Arc<Self>) {
        if self.stays {
            self.source.add_tap(self.clone());
        }
    }

    /// Copies what these bits say, too. The source is drained.
    pub fn add(&self, bits: &Bits) {
        self.dirty.merge(bits);
    }

    /// Sets in `bits` what the target lacks.
    pub fn missing(&self, bits: &Bits) {
        bits.merge(&self.dirty);
    }

    /// Sees none any more.
    pub fn stop(self: &Arc<Self>) {
        let tap: Arc<dyn Tap> = self.clone();
        self.source.remove_tap(&tap);
    }

    /// Has writes go to the target, too, from now on.
    pub fn set_blocking(&self) {
        self.blocking.store(true, SeqCst);
    }

    pub fn is_blocking(&self) -> bool {
        self.blocking.load(SeqCst)
    }

    /// Has the target's owner be told that all is written, as soon as that is so: nobody writes to the source any more. The answer is
    /// an error if the target cannot be told, and does not come if the job ends before. Writes are blocking from now on: one that comes
    /// after all is not answered before the target's owner has it, and knows so that this was not all.
    pub fn hand_over(&self, state: &JobState) -> oneshot::Receiver<io::Result<()>> {
        self.set_blocking();
        let (tell, told) = oneshot::channel();
        *self.to_hand_over() = Some(tell);
        state.look_up();
        told
    }

    fn to_hand_over(&self) -> MutexGuard<'_, Option<oneshot::Sender<io::Result<()>>>> {
        self.to_hand_over.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Carries out what [`Mirror::hand_over`] asks for, if it can be.
    async fn try_hand_over(&self, roots: &Roots) -> Result<(), Stop> {
        let tell = match self.dirty.count() {
            0 => self.to_hand_over().take(),
            _ => None,
        };
        if let Some(tell) = tell.filter(|t| !t.is_closed()) {
            // Whatever the job does about errors: what a flush lost is not copied again.
            let _counted = roots.enter().await;
            let flushed = self.target.flush().await;
            let told = match flushed {
                Ok(()) => self.target.set_finished(true).await,
                Err(e) => Err(e),
            };
            if let Err(error) = &told {
                let side = Side::Target;
                let error = io::Error::new(error.kind(), error.to_string());
                let _ = tell.send(told);
                return Err(Stop::Failed { side, error });
            }
            let _ = tell.send(told);
        }
        Ok(())
    }

    /// There is more to copy than guests should wait for.
    pub fn is_behind(&self) -> bool {
        self.dirty.count() > LAST
    }

    /// Sets the bits of what is to be copied.
    async fn find(&self, state: &JobState, roots: &Roots) -> Result<(), Stop> {
        let size = self.source.size();
        match self.sync {
            MirrorSync::None => return Ok(()),
            MirrorSync::Bits => {
                state.add_total(self.dirty.count());
                return Ok(());
            }
            _ => {}
        }
        let mut at = 0;
        while at < size {
            let busy = state.checkpoint().await?;
            let counted = roots.enter().await;
            let looked = self.look(at..size.min(at + LOOKUP)).await;
            drop((counted, busy));
            match looked {
                Ok((len, wanted)) => {
                    // Bits are only set here: guests set some, too.
                    if wanted {
                        self.dirty.set(&(at..at + len));
                    }
                    at += len;
                }
                Err(e) => state.failed(e.side, e.error).await?,
            }
            give_way().await;
        }
        state.add_total(self.dirty.count());
        Ok(())
    }

    /// Looks at the beginning of a range: how much of it is of one kind, and whether that is to be copied.
    async fn look(&self, range: Range<u64>) -> Result<(u64, bool), CopyError> {
        let base = match &self.sync {
            MirrorSync::Above(base) => Some(base),
            _ => None,
        };
        let (at, len) = (range.start, range.end - range.start);
        let status = self.source.status(at, len, base).await;
        let status = status.map_err(|error| CopyError {
            side: Side::Source,
            error,
        })?;
        let wanted = status.own || matches!(self.sync, MirrorSync::Full);
        let skip = !wanted || status.zero && is_zero(&self.target, at, status.len).await?;
        Ok((status.len, !skip))
    }

    /// Copies a piece, or says again that it is dirty.
    async fn copy_piece(&self, piece: Range<u64>, scratch: &IoVecs) -> Result<(), CopyError> {
        let _held = self.pieces.lock(piece.clone()).await;
        let how = How {
            compress: self.compress,
            // Whoever converts an image wants it small.
            detect_zeroes: !self.stays && matches!(self.sync, MirrorSync::Full),
            share: (!self.compress).then_some(&self.sharing),
        };
        let result = copy(&self.source, &self.target, piece.clone(), scratch, how).await;
        if result.is_err() {
            self.dirty.set(&piece);
        }
        result
    }

    fn chunk(&self) -> u64 {
        CHUNK.max(self.dirty.granularity())
    }

    /// Takes dirty pieces from `from` on, of [`BATCH`] bytes at most, and clears their bits; `from` is None when the end was
    /// reached. Writes that may have set the bits have ended when this returns.
    async fn take(
        &self,
        from: &mut Option<u64>,
        state: &JobState,
        roots: &Roots,
    ) -> Result<Vec<Range<u64>>, Stop> {
        let (mut taken, mut bytes) = (Vec::new(), 0);
        while let Some(at) = *from
            && bytes < BATCH
        {
            let Some(run) = self.dirty.next_run(&(at..self.dirty.size()), self.chunk()) else {
                *from = None;
                break;
            };
            // Pieces end where chunks do: large requests stay aligned.
            let end = run.end.min((run.start / self.chunk() + 1) * self.chunk());
            let run = run.start..end;
            self.dirty.clear(&run);
            *from = Some(run.end);
            bytes += run.end - run.start;
            taken.push(run);
        }
        if self.stays
            && !taken.is_empty()
            && let Err(stop) = roots.quiesce(state).await
        {
            taken.iter().for_each(|p| self.dirty.set(p));
            return Err(stop);
        }
        Ok(taken)
    }

    /// Copies what is dirty, once.
    async fn pass(&self, state: &JobState, roots: &Roots) -> Result<(), Stop> {
        let mut from = Some(0);
        let mut pieces = self.take(&mut from, state, roots).await?;
        while !pieces.is_empty() {
            let mut all = pieces.iter().cloned();
            let copied = each_piece(
                state,
                Some(&self.behind),
                self.chunk(),
                || all.next(),
                async |piece, scratch| {
                    let _counted = roots.enter().await;
                    self.copy_piece(piece, scratch).await
                },
            );
            // The next ones are taken meanwhile.
            let (copied, next) = join(copied, self.take(&mut from, state, roots)).await;
            pieces = match (copied, next) {
                (Ok(()), next) => next?,
                (Err(stop), next) => {
                    // Whatever was not copied is as dirty as before.
                    let next = next.unwrap_or_default();
                    let taken = pieces.iter().chain(&next);
                    taken.for_each(|p| self.dirty.set(p));
                    return Err(stop);
                }
            };
        }
        Ok(())
    }

    async fn flush(&self, state: &JobState, roots: &Roots) -> Result<(), Stop> {
        loop {
            let busy = state.checkpoint().await?;
            let counted = roots.enter().await;
            let result = self.target.flush().await;
            drop((counted, busy));
            match result {
                Ok(()) => return Ok(()),
                Err(e) => state.flush_failed(e).await?,
            }
        }
    }

    /// As long as writes go on, what the target lacks is copied; ends when it is asked for, with little left.
    async fn follow(&self, state: &JobState, roots: &Roots) -> Result<(), Stop> {
        let mut rounds = 0;
        let mut counted = self.dirty.count();
        loop {
            drop(state.checkpoint().await?);
            if self.is_blocking() && !self.all_slow.load(SeqCst) {
                roots.quiesce(state).await?;
                self.all_slow.store(true, SeqCst);
            }
            let left = self.dirty.count();
            state.add_total(left.saturating_sub(counted));
            if left > 0 {
                self.pass(state, roots).await?;
                // What guests write from now on is in memory, and would have to be on the disk to be shared.
                self.sharing.end();
            }
            counted = self.dirty.count();
            let ending = state.ending().is_some();
            if counted > LAST && !state.is_ready() {
                continue;
            }
            state.set_ready();
            self.try_hand_over(roots).await?;
            if ending {
                rounds += 1;
                if counted <= LAST || rounds >= MAX_ROUNDS {
                    // What is in the target's memory is not to be stored while guests wait.
                    return self.flush(state, roots).await;
                }
            } else if left < LAST && self.to_hand_over().is_none() {
                state.idle(LOOK).await;
            }
        }
    }
}

impl Work for Mirror {
    fn run<'a>(
        &'a self,
        state: &'a JobState,
        roots: &'a Roots,
    ) -> LocalFuture<'a, Result<(), Stop>> {
        Box::pin(async move {
            if self.stays {
                // Those that the tap did not see have ended after this: what they wrote is found.
                roots.quiesce(state).await?;
            }
            if !self.found.swap(true, SeqCst) {
                self.find(state, roots).await?;
            }
            if self.stays {
                return self.follow(state, roots).await;
            }
            self.pass(state, roots).await?;
            self.flush(state, roots).await
        })
    }

    /// Copies the rest. Nobody writes to the source meanwhile.
    fn finish(&self) -> LocalFuture<'_, Result<(), Stop>> {
        Box::pin(async move {
            let failed = |side, error| Stop::Failed { side, error };
            let buffer = scratch(self.chunk());
            while let Some(run) = self.dirty.next_run(&(0..self.dirty.size()), self.chunk()) {
                self.dirty.clear(&run);
                self.copy_piece(run, &buffer)
                    .await
                    .map_err(|e| failed(e.side, e.error))?;
            }
            let flushed = self.target.flush().await;
            flushed.map_err(|e| failed(Side::Target, e))
        })
    }
}

impl Tap for Mirror {
    #[inline]
    fn fast_write(&self, offset: u64, len: u64) -> Option<SlowReason> {
        if self.is_blocking() {
            return Some(SlowReason::Mirrored);
        }
        self.dirty.set(&(offset..offset + len));
        None
    }

    fn slow_reason(&self) -> Option<SlowReason> {
        self.is_blocking().then_some(SlowReason::Mirrored)
    }

    fn needs_stable(&self) -> bool {
        self.is_blocking()
    }

    fn before(&self, offset: u64, len: u64) -> LocalFuture<'_, io::Result<Held<'_>>> {
        Box::pin(async move {
            let range = offset..offset + len;
            if !self.is_blocking() {
                self.dirty.set(&range);
                return Ok(None);
            }
            let guard = self.pieces.lock(self.dirty.pieces_around(&range)).await;
            let marked = match self.all_slow.load(SeqCst) {
                true => self.dirty.clear_runs(&range),
                false => Vec::new(),
            };
            self.dirty.set(&range);
            Ok(Some(Hold {
                _guard: guard,
                marked,
            }))
        })
    }

    fn after<'a>(
        &'a self,
        offset: u64,
        len: u64,
        written: Written,
        held: Held<'a>,
    ) -> LocalFuture<'a, ()> {
        Box::pin(async move {
            // It began before writes were blocking.
            let Some(held) = held else {
                return;
            };
            let result = match written {
                Written::Data { iov, stable: true } => {
                    self.target.write(offset, iov, WriteFlags::default()).await
                }
                // The guest may have changed it since.
                Written::Data { .. } => Err(io::ErrorKind::Unsupported.into()),
                Written::Zeroes { may_unmap } => {
                    let flags = ZeroFlags {
                        may_unmap,
                        ..ZeroFlags::default()
                    };
                    self.target.write_zeroes(offset, len, flags).await
                }
                // What a discarded range reads as is for the source to say.
                Written::Discarded => Err(io::ErrorKind::Unsupported.into()),
            };
            // Otherwise the job will copy it, and meet the error again if it stays.
            if result.is_ok() {
                held.marked.iter().for_each(|piece| self.dirty.clear(piece));
            }
        })
    }
}
