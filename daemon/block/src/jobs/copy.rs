//! Copying between nodes, with as few bytes moved as possible.

use std::cell::RefCell;
use std::io;
use std::ops::Range;

use futures_util::future::join_all;
use vdisk_io::{IoVecs, give_way};

use super::state::{JobState, Side, Stop};
use crate::node::{Node, WriteFlags, ZeroFlags};

/// Bytes copied by one request.
pub(crate) const CHUNK: u64 = 1 << 20;

/// Bytes that are asked about at a time.
pub(crate) const LOOKUP: u64 = 1 << 30;

/// Requests of one job at a time.
const WORKERS: usize = 8;

pub(crate) struct CopyError {
    pub side: Side,
    pub error: io::Error,
}

fn source(error: io::Error) -> CopyError {
    CopyError {
        side: Side::Source,
        error,
    }
}

fn target(error: io::Error) -> CopyError {
    CopyError {
        side: Side::Target,
        error,
    }
}

/// How the target is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct How {
    /// In whole compressed clusters.
    pub compress: bool,
    /// Data that is all zeroes is written as zeroes.
    pub detect_zeroes: bool,
}

/// A buffer for [`copy`].
pub(crate) fn scratch(len: u64) -> IoVecs {
    IoVecs::zeroed(len as usize, 4096)
}

/// Copies a range, which is at most as long as `scratch`; with `How::compress` it is one of whole clusters of the target.
pub(crate) async fn copy(
    from: &Node,
    to: &Node,
    range: Range<u64>,
    scratch: &IoVecs,
    how: How,
) -> Result<(), CopyError> {
    let mut at = range.start;
    // What is data up to here is copied in one piece.
    let mut data = range.start..range.start;
    while at < range.end {
        let status = from
            .status(at, range.end - at, None)
            .await
            .map_err(source)?;
        let end = at + status.len;
        if !status.zero {
            if data.is_empty() {
                data.start = at;
            }
            data.end = end;
        } else if how.compress {
            // Clusters are written whole: zeroes count only if they are all of it.
            let whole = at == range.start && end == range.end;
            if whole {
                zero(to, at..end).await?;
            } else {
                if data.is_empty() {
                    data.start = at;
                }
                data.end = end;
            }
        } else {
            copy_data(from, to, data.clone(), scratch, how).await?;
            data = end..end;
            zero(to, at..end).await?;
        }
        at = end;
    }
    copy_data(from, to, data, scratch, how).await
}

/// Whether a range of the target is known to read as zeroes.
pub(crate) async fn is_zero(to: &Node, at: u64, len: u64) -> Result<bool, CopyError> {
    to.is_zero(at, len).await.map_err(target)
}

async fn zero(to: &Node, range: Range<u64>) -> Result<(), CopyError> {
    let (at, len) = (range.start, range.end - range.start);
    if len == 0 || is_zero(to, at, len).await? {
        return Ok(());
    }
    let flags = ZeroFlags {
        may_unmap: true,
        ..ZeroFlags::default()
    };
    to.write_zeroes(at, len, flags).await.map_err(target)
}

async fn copy_data(
    from: &Node,
    to: &Node,
    range: Range<u64>,
    scratch: &IoVecs,
    how: How,
) -> Result<(), CopyError> {
    if range.is_empty() {
        return Ok(());
    }
    let iov = scratch.slice(0, (range.end - range.start) as usize);
    from.read(range.start, iov.clone()).await.map_err(source)?;
    if how.detect_zeroes && iov.is_zero() {
        return zero(to, range).await;
    }
    match how.compress {
        true => to.write_compressed(range.start, iov).await,
        false => to.write(range.start, iov, WriteFlags::default()).await,
    }
    .map_err(target)
}

/// Has several workers do pieces until there are none left, or one fails. What was begun is brought to its end.
///
/// `next` gives the next piece; `work` does one, with the buffer of the worker.
pub(crate) async fn each_piece(
    state: &JobState,
    chunk: u64,
    next: impl FnMut() -> Option<Range<u64>>,
    work: impl AsyncFn(Range<u64>, &IoVecs) -> Result<(), CopyError>,
) -> Result<(), Stop> {
    let next = RefCell::new(next);
    let stopped = RefCell::new(None);
    let worker = async || {
        let mut scratch_of_mine = None;
        while stopped.borrow().is_none() {
            let Some(piece) = (*next.borrow_mut())() else {
                return;
            };
            let scratch = scratch_of_mine.get_or_insert_with(|| scratch(chunk));
            if let Err(stop) = one(state, piece, scratch, &work).await {
                stopped.borrow_mut().get_or_insert(stop);
            }
        }
    };
    join_all((0..WORKERS).map(|_| worker())).await;
    match stopped.into_inner() {
        None => Ok(()),
        Some(stop) => Err(stop),
    }
}

/// Does a piece, however often the error policies want it tried.
async fn one(
    state: &JobState,
    piece: Range<u64>,
    scratch: &IoVecs,
    work: &impl AsyncFn(Range<u64>, &IoVecs) -> Result<(), CopyError>,
) -> Result<(), Stop> {
    loop {
        state.pace(piece.end - piece.start).await;
        let busy = state.checkpoint().await?;
        let result = work(piece.clone(), scratch).await;
        drop(busy);
        // Holes take no time, and there may be very many of them.
        give_way().await;
        match result {
            Ok(()) => {
                state.add_done(piece.end - piece.start);
                return Ok(());
            }
            Err(e) => state.failed(e.side, e.error).await?,
        }
    }
}
