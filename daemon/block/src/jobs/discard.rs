//! Discards what is nothing but zeroes, so that an image is sparse again, while guests write.
//!
//! The disk is gone through in windows. Writes to the window at hand take the slow path, and hold their range until they are
//! done; the job holds a piece from when it reads it until it is given back. What was in flight when the window was opened has
//! ended before anything of it is read.

use std::cell::Cell;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use vdisk_io::{Bits, IoVecs, RangeLock};

use super::Work;
use super::copy::{CHUNK, CopyError, each_piece};
use super::roots::Roots;
use super::state::{JobState, Side, Stop};
use crate::drivers::{LocalFuture, SlowReason};
use crate::node::Node;
use crate::tap::{Held, Hold, Tap, Written};

pub struct Discard {
    node: Arc<Node>,
    /// The window at hand.
    window: Bits,
    pieces: RangeLock,
    /// Bytes that were given back.
    freed: AtomicU64,
}

impl Discard {
    /// Bytes that are worked on at a time: one bit of memory for each of them.
    pub const WINDOW: u64 = 64 << 20;

    pub fn new(node: Arc<Node>) -> Arc<Discard> {
        Arc::new(Discard {
            window: Bits::new(node.size(), Discard::WINDOW),
            node,
            pieces: RangeLock::default(),
            freed: AtomicU64::new(0),
        })
    }

    pub fn start(self: &Arc<Self>) {
        self.node.add_tap(self.clone());
    }

    /// Guests' writes do not concern it any more.
    pub fn stop(self: &Arc<Self>) {
        let tap: Arc<dyn Tap> = self.clone();
        self.node.remove_tap(&tap);
    }

    pub fn freed(&self) -> u64 {
        self.freed.load(Relaxed)
    }

    /// Gives back what is zeroes in a piece, which the caller holds.
    async fn give_back(&self, piece: Range<u64>, scratch: &IoVecs) -> io::Result<()> {
        let unit = self.node.limits().zero_alignment.max(4096);
        let mut at = piece.start;
        while at < piece.end {
            let status = self.node.status(at, piece.end - at, None).await?;
            let end = at + status.len;
            // Whole units: pieces begin and end with one.
            let (from, to) = (at.next_multiple_of(unit), end / unit * unit);
            at = end;
            if !status.own || status.zero || from >= to {
                continue;
            }
            let data = scratch.slice(0, (to - from) as usize);
            self.node.read(from, data.clone()).await?;
            let is_zero = |at: u64| data.slice((at - from) as usize, unit as usize).is_zero();
            let mut run = from..from;
            for at in (from..to).step_by(unit as usize) {
                if is_zero(at) {
                    run.end = at + unit;
                    continue;
                }
                self.free(run).await?;
                run = at + unit..at + unit;
            }
            self.free(run).await?;
        }
        Ok(())
    }

    async fn free(&self, run: Range<u64>) -> io::Result<()> {
        if run.is_empty() {
            return Ok(());
        }
        let len = run.end - run.start;
        self.node.free_zeroes(run.start, len).await?;
        self.freed.fetch_add(len, Relaxed);
        Ok(())
    }

    async fn window(&self, range: Range<u64>, state: &JobState, roots: &Roots) -> Result<(), Stop> {
        // Units may be larger than a chunk.
        let chunk = CHUNK.max(self.node.limits().zero_alignment);
        let at = Cell::new(range.start);
        each_piece(
            state,
            None,
            chunk,
            || {
                let start = at.get();
                at.set((start + chunk).min(range.end));
                (start < range.end).then(|| start..at.get())
            },
            async |piece, scratch| {
                let _counted = roots.enter().await;
                let _held = self.pieces.lock(piece.clone()).await;
                let done = self.give_back(piece, scratch).await;
                done.map_err(|error| CopyError {
                    side: Side::Source,
                    error,
                })
            },
        )
        .await
    }
}

impl Work for Discard {
    fn run<'a>(
        &'a self,
        state: &'a JobState,
        roots: &'a Roots,
    ) -> LocalFuture<'a, Result<(), Stop>> {
        Box::pin(async move {
            let size = self.node.size();
            state.add_total(size);
            let mut start = 0;
            while start < size {
                let range = start..(start + Discard::WINDOW).min(size);
                self.window.set(&range);
                let mut done = roots.quiesce(state).await;
                if done.is_ok() {
                    done = self.window(range.clone(), state, roots).await;
                }
                self.window.clear(&range);
                done?;
                start = range.end;
            }
            loop {
                let busy = state.checkpoint().await?;
                let counted = roots.enter().await;
                let result = self.node.flush().await;
                drop((counted, busy));
                match result {
                    Ok(()) => return Ok(()),
                    Err(e) => state.failed(Side::Source, e).await?,
                }
            }
        })
    }

    fn finish(&self) -> LocalFuture<'_, Result<(), Stop>> {
        Box::pin(async { Ok(()) })
    }
}

impl Tap for Discard {
    #[inline]
    fn fast_write(&self, offset: u64, len: u64) -> Option<SlowReason> {
        let here = self.window.any(&(offset..offset + len));
        here.then_some(SlowReason::Discarded)
    }

    fn slow_reason(&self) -> Option<SlowReason> {
        None
    }

    fn before(&self, offset: u64, len: u64) -> LocalFuture<'_, io::Result<Held<'_>>> {
        Box::pin(async move {
            let range = offset..offset + len;
            if !self.window.any(&range) {
                return Ok(None);
            }
            Ok(Some(Hold {
                _guard: self.pieces.lock(range).await,
                marked: Vec::new(),
            }))
        })
    }

    fn after<'a>(&'a self, _: u64, _: u64, _: Written, _: Held<'a>) -> LocalFuture<'a, ()> {
        Box::pin(async {})
    }
}
