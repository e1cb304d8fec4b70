//! Copying between nodes, with as few bytes moved as possible.

use std::cell::RefCell;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

use futures_util::future::join_all;
use vdisk_io::{IoFile, IoVecs, give_way};

use super::state::{JobState, Side, Stop};
use crate::node::{Node, Source, WriteFlags, ZeroFlags};

/// Bytes copied by one request.
pub(crate) const CHUNK: u64 = 1 << 20;

/// Bytes that are asked about at a time.
pub(crate) const LOOKUP: u64 = 1 << 30;

/// Bytes that are shared in one piece at least.
const SMALLEST_SHARED: u64 = 65536;

/// Bytes that a job writes before the disk is told of them.
const BEHIND: u64 = 32 << 20;

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

/// Whether a job shares blocks of the file system instead of copying them. It ends with the first that cannot be shared.
#[derive(Debug)]
pub struct Sharing {
    goes_on: AtomicBool,
    /// The file systems are the same one, which can do it.
    possible: AtomicBool,
}

impl Sharing {
    pub fn new(wanted: bool) -> Sharing {
        Sharing {
            goes_on: AtomicBool::new(wanted),
            possible: AtomicBool::new(false),
        }
    }

    fn goes_on(&self) -> bool {
        self.goes_on.load(Relaxed)
    }

    pub(crate) fn end(&self) {
        self.goes_on.store(false, Relaxed);
    }

    /// Whether it is of use to try. What is tried takes clusters of the target, which it has for nothing if it fails.
    fn is_possible(&self, file: &IoFile, to: &Node) -> bool {
        if !self.possible.load(Relaxed) {
            match to.shares_with(file) {
                true => self.possible.store(true, Relaxed),
                false => self.end(),
            }
        }
        self.goes_on()
    }
}

/// Has the disk write what a job has copied while it goes on: it would have to do so at the job's end, and guests' flushes would
/// wait behind all of it.
pub(crate) struct WriteBehind {
    target: Arc<Node>,
    /// Since the disk was told.
    bytes: AtomicU64,
    under_way: AtomicBool,
}

impl WriteBehind {
    pub fn new(target: Arc<Node>) -> WriteBehind {
        WriteBehind {
            target,
            bytes: AtomicU64::new(0),
            under_way: AtomicBool::new(false),
        }
    }

    /// Bytes were written. One worker waits for the disk at a time.
    async fn wrote(&self, bytes: u64) {
        let since = self.bytes.fetch_add(bytes, Relaxed) + bytes;
        if since < BEHIND || self.under_way.swap(true, Relaxed) {
            return;
        }
        self.bytes.store(0, Relaxed);
        self.target.write_behind().await;
        self.under_way.store(false, Relaxed);
    }
}

/// How the target is written.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct How<'a> {
    /// In whole compressed clusters.
    pub compress: bool,
    /// Data that is all zeroes is written as zeroes.
    pub detect_zeroes: bool,
    /// Where blocks may be shared.
    pub share: Option<&'a Sharing>,
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
    how: How<'_>,
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
    how: How<'_>,
) -> Result<(), CopyError> {
    let Some(sharing) = how.share else {
        return copy_bytes(from, to, range, scratch, how).await;
    };
    let mut bytes = range.start;
    let mut at = range.start;
    while at < range.end {
        let len = shared_len(from, to, at..range.end, sharing);
        if len == 0 {
            at = after_unit(to, at..range.end);
            continue;
        }
        copy_bytes(from, to, bytes..at, scratch, how).await?;
        bytes = at;
        at += len;
        if share(from, to, bytes..at, sharing, false).await? {
            bytes = at;
        }
    }
    copy_bytes(from, to, bytes..range.end, scratch, how).await
}

/// The smallest piece that is shared: whole clusters of the target, and whole blocks of file systems.
fn unit(to: &Node) -> u64 {
    to.limits().zero_alignment.max(SMALLEST_SHARED)
}

/// Where the piece ends that a range begins with and that is copied by itself.
pub(crate) fn after_unit(to: &Node, range: Range<u64>) -> u64 {
    (range.start + 1).next_multiple_of(unit(to)).min(range.end)
}

/// How much of the beginning of a range of data can be shared, as it seems.
pub(crate) fn shared_len(from: &Node, to: &Node, range: Range<u64>, sharing: &Sharing) -> u64 {
    let unit = unit(to);
    if !sharing.goes_on() || !range.start.is_multiple_of(unit) {
        return 0;
    }
    let mut len = (range.end - range.start) / unit * unit;
    let is_in_one_place = |len| {
        let (node, offset) = (from, range.start);
        let source = Source { node, offset, len };
        source.place(|file, _| sharing.is_possible(file, to)) == Some(true)
    };
    while len > 0 && sharing.goes_on() && !is_in_one_place(len) {
        len = len / 2 / unit * unit;
    }
    match sharing.goes_on() {
        true => len,
        false => 0,
    }
}

/// Shares a range, with `missing` only where the target has nothing of its own. False if it has to be copied.
pub(crate) async fn share(
    from: &Node,
    to: &Node,
    range: Range<u64>,
    sharing: &Sharing,
    missing: bool,
) -> Result<bool, CopyError> {
    let source = Source {
        node: from,
        offset: range.start,
        len: range.end - range.start,
    };
    match to.share(range.start, source, missing).await {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(false),
        Err(e) if e.kind() == io::ErrorKind::Unsupported => {
            sharing.end();
            Ok(false)
        }
        Err(e) => Err(target(e)),
    }
}

async fn copy_bytes(
    from: &Node,
    to: &Node,
    range: Range<u64>,
    scratch: &IoVecs,
    how: How<'_>,
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
/// `next` gives the next piece; `work` does one, with the buffer of the worker. `behind` has what is written on its way to the disk.
pub(crate) async fn each_piece(
    state: &JobState,
    behind: Option<&WriteBehind>,
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
            let len = piece.end - piece.start;
            match one(state, piece, scratch, &work).await {
                Ok(()) => {
                    if let Some(behind) = behind {
                        behind.wrote(len).await;
                    }
                }
                Err(stop) => {
                    stopped.borrow_mut().get_or_insert(stop);
                }
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
