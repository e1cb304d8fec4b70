//! Streams: an image gets what it reads from its backing file, down to a base, while guests write.
//!
//! What is below does not change. A piece is read from there first, and written only where the image still has nothing of its
//! own: a guest's write that comes in between stays.

use std::cell::Cell;
use std::ops::Range;
use std::sync::Arc;

use vdisk_io::IoVecs;

use super::Work;
use super::copy::{
    CHUNK, CopyError, Sharing, WriteBehind, after_unit, each_piece, share, shared_len,
};
use super::roots::Roots;
use super::state::{JobState, Side, Stop};
use crate::drivers::LocalFuture;
use crate::node::Node;

pub struct Stream {
    node: Arc<Node>,
    backing: Arc<Node>,
    /// What remains below.
    base: Option<Arc<Node>>,
    sharing: Sharing,
}

impl Stream {
    /// `backing` is what the node's image has behind it, and stands on `base`.
    pub fn new(
        node: Arc<Node>,
        backing: Arc<Node>,
        base: Option<Arc<Node>>,
        sharing: Sharing,
    ) -> Arc<Stream> {
        Arc::new(Stream {
            node,
            backing,
            base,
            sharing,
        })
    }

    pub fn node(&self) -> &Arc<Node> {
        &self.node
    }

    /// What the image had behind it.
    pub fn backing(&self) -> &Arc<Node> {
        &self.backing
    }

    async fn fill(&self, piece: Range<u64>, scratch: &IoVecs) -> Result<(), CopyError> {
        let source = |error| CopyError {
            side: Side::Source,
            error,
        };
        let target = |error| CopyError {
            side: Side::Target,
            error,
        };
        let mut at = piece.start;
        while at < piece.end {
            let own = self.node.status(at, piece.end - at, None).await;
            let own = own.map_err(target)?;
            let end = at + own.len;
            if !own.own {
                self.fill_missing(at..end, scratch, source, target).await?;
            }
            at = end;
        }
        Ok(())
    }

    /// A range where the image had nothing a moment ago.
    async fn fill_missing(
        &self,
        range: Range<u64>,
        scratch: &IoVecs,
        source: impl Fn(std::io::Error) -> CopyError,
        target: impl Fn(std::io::Error) -> CopyError,
    ) -> Result<(), CopyError> {
        let mut at = range.start;
        // Beyond its end the backing file has zeroes, as the image has without one.
        let reach = match &self.base {
            None => range.end.min(self.backing.size()),
            Some(_) => range.end,
        };
        while at < reach {
            let (zero, above, len) = if at < self.backing.size() {
                let len = (reach - at).min(self.backing.size() - at);
                let status = self.backing.status(at, len, self.base.as_ref()).await;
                let status = status.map_err(&source)?;
                (status.zero, status.own, status.len)
            } else {
                (true, true, reach - at)
            };
            match (&self.base, zero) {
                (Some(_), _) if !above => {}
                (None, true) => {}
                (Some(_), true) => {
                    let done = self.node.populate(at, len, None).await;
                    done.map_err(&target)?;
                }
                (_, false) => {
                    let (range, source, target) = (at..at + len, &source, &target);
                    self.fill_data(range, scratch, source, target).await?;
                }
            }
            at += len;
        }
        Ok(())
    }

    /// A range that has data below.
    async fn fill_data(
        &self,
        range: Range<u64>,
        scratch: &IoVecs,
        source: impl Fn(std::io::Error) -> CopyError,
        target: impl Fn(std::io::Error) -> CopyError,
    ) -> Result<(), CopyError> {
        let (from, to) = (&self.backing, &self.node);
        let mut at = range.start;
        while at < range.end {
            let shared = shared_len(from, to, at..range.end, &self.sharing);
            if shared > 0 {
                let part = at..at + shared;
                if share(from, to, part, &self.sharing, true).await? {
                    at += shared;
                    continue;
                }
            }
            // Up to where something can be shared again.
            let mut end = after_unit(to, at..range.end);
            while end < range.end && shared_len(from, to, end..range.end, &self.sharing) == 0 {
                end = after_unit(to, end..range.end);
            }
            let iov = scratch.slice(0, (end - at) as usize);
            from.read(at, iov.clone()).await.map_err(&source)?;
            let done = to.populate(at, end - at, Some(iov)).await;
            done.map_err(&target)?;
            at = end;
        }
        Ok(())
    }
}

impl Work for Stream {
    fn run<'a>(
        &'a self,
        state: &'a JobState,
        roots: &'a Roots,
    ) -> LocalFuture<'a, Result<(), Stop>> {
        Box::pin(async move {
            let size = self.node.size();
            state.add_total(size);
            let at = Cell::new(0);
            let behind = WriteBehind::new(self.node.clone());
            each_piece(
                state,
                Some(&behind),
                CHUNK,
                || {
                    let start = at.get();
                    at.set((start + CHUNK).min(size));
                    (start < size).then(|| start..at.get())
                },
                async |piece, scratch| {
                    let _counted = roots.enter().await;
                    self.fill(piece, scratch).await
                },
            )
            .await
        })
    }

    fn finish(&self) -> LocalFuture<'_, Result<(), Stop>> {
        Box::pin(async { Ok(()) })
    }
}
