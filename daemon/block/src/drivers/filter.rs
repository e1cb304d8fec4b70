//! What all filters have in common: they show their child as it is, and do something about requests on the way.

use std::io;
use std::pin::Pin;
use std::sync::Arc;

use arc_swap::ArcSwap;
use vdisk_api::Result;
use vdisk_io::IoVecs;

use super::{Direction, Driver, Limits, LocalFuture, Resolved, SlowReason, Told};
use crate::jobs::Backup;
use crate::node::{Node, WriteFlags, ZeroFlags};
use crate::status::BlockStatus;

/// A kind of request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Request {
    Read,
    Write,
    WriteZeroes,
    Discard,
    Flush,
}

impl Request {
    pub fn direction(self) -> Direction {
        match self {
            Request::Read => Direction::Read,
            _ => Direction::Write,
        }
    }
}

/// What a filter does about requests.
pub(super) trait Gate: Send + Sync {
    /// The QAPI name of the driver.
    fn name(&self) -> &'static str;

    /// Why requests of a direction take the slow path; None if the filter has nothing to do with them.
    fn slow_reason(&self, direction: Direction) -> Option<SlowReason>;

    /// The same for one request.
    #[inline]
    fn slow_here(&self, direction: Direction, _offset: u64, _len: u64) -> Option<SlowReason> {
        self.slow_reason(direction)
    }

    /// Before a request goes on; an error is its answer.
    fn enter(&self, _: Request, _offset: u64, _len: u64) -> LocalFuture<'_, io::Result<()>> {
        Box::pin(async { Ok(()) })
    }

    /// Reads from the child.
    fn read<'a>(
        &'a self,
        file: Arc<Node>,
        offset: u64,
        iov: IoVecs,
    ) -> LocalFuture<'a, io::Result<()>> {
        Box::pin(async move { file.read(offset, iov).await })
    }

    /// See [`Driver::moment`].
    fn moment(&self) -> Option<Arc<Backup>> {
        None
    }

    /// The filter has another child. No request is in flight.
    fn set_file(&self, _file: &Arc<Node>) {}

    /// See [`Driver::drain`].
    fn drain(&self, _on: bool) {}

    /// See [`Driver::enter`].
    fn enter_graph(&self) {}

    /// See [`Driver::step`].
    fn step(&self, _event: &'static str, _offset: u64, _len: u64) -> Told<'_> {
        None
    }

    /// See [`Driver::suspended`].
    fn suspended(&self) -> Vec<String> {
        Vec::new()
    }

    /// See [`Driver::go_on`].
    fn go_on(&self, _tag: &str) -> bool {
        false
    }

    /// See [`Driver::close`].
    fn close(&self) {}
}

/// A filter node's driver.
pub(super) struct Filter<G> {
    file: ArcSwap<Node>,
    gate: G,
}

impl<G: Gate> Filter<G> {
    pub fn new(file: Arc<Node>, gate: G) -> Filter<G> {
        Filter {
            file: ArcSwap::new(file),
            gate,
        }
    }

    fn file(&self) -> Arc<Node> {
        self.file.load_full()
    }
}

impl<G: Gate> Driver for Filter<G> {
    fn name(&self) -> &'static str {
        self.gate.name()
    }

    fn limits(&self) -> Limits {
        // The child knows what it needs, and may become another.
        Limits {
            zero_alignment: self.file().limits().zero_alignment,
            ..Limits::NONE
        }
    }

    fn storage_block_size(&self) -> u64 {
        self.file().storage_block_size()
    }

    #[inline]
    fn resolve(
        &self,
        direction: Direction,
        offset: u64,
        len: u64,
        then: &mut dyn FnMut(Resolved<'_>),
    ) {
        match self.gate.slow_here(direction, offset, len) {
            Some(reason) => then(Resolved::Slow(reason)),
            None => self.file.load().resolve_range(direction, offset, len, then),
        }
    }

    fn slow_reason(&self, direction: Direction) -> Option<SlowReason> {
        let mine = self.gate.slow_reason(direction);
        mine.or_else(|| self.file().slow_reason(direction))
    }

    fn read(&self, offset: u64, iov: IoVecs) -> LocalFuture<'_, io::Result<()>> {
        Box::pin(async move {
            let len = iov.len() as u64;
            self.gate.enter(Request::Read, offset, len).await?;
            self.gate.read(self.file(), offset, iov).await
        })
    }

    fn read_blocking(&self, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        self.file().read_blocking(offset, len)
    }

    fn write(
        &self,
        offset: u64,
        iov: IoVecs,
        flags: WriteFlags,
    ) -> LocalFuture<'_, io::Result<()>> {
        Box::pin(async move {
            let len = iov.len() as u64;
            self.gate.enter(Request::Write, offset, len).await?;
            self.file().write(offset, iov, flags).await
        })
    }

    fn write_compressed(&self, offset: u64, iov: IoVecs) -> LocalFuture<'_, io::Result<()>> {
        Box::pin(async move {
            let len = iov.len() as u64;
            self.gate.enter(Request::Write, offset, len).await?;
            self.file().write_compressed(offset, iov).await
        })
    }

    fn flush(&self) -> LocalFuture<'_, io::Result<()>> {
        Box::pin(async move {
            self.gate.enter(Request::Flush, 0, 0).await?;
            self.file().flush().await
        })
    }

    fn write_behind(&self) -> LocalFuture<'_, ()> {
        Box::pin(async move { self.file().write_behind().await })
    }

    fn discard(&self, offset: u64, len: u64) -> LocalFuture<'_, io::Result<()>> {
        Box::pin(async move {
            self.gate.enter(Request::Discard, offset, len).await?;
            self.file().discard(offset, len).await
        })
    }

    fn write_zeroes(
        &self,
        offset: u64,
        len: u64,
        flags: ZeroFlags,
    ) -> LocalFuture<'_, io::Result<()>> {
        Box::pin(async move {
            self.gate.enter(Request::WriteZeroes, offset, len).await?;
            self.file().write_zeroes(offset, len, flags).await
        })
    }

    fn status<'a>(
        &'a self,
        offset: u64,
        len: u64,
        base: Option<&'a Arc<Node>>,
    ) -> LocalFuture<'a, io::Result<BlockStatus>> {
        Box::pin(async move { self.file().status(offset, len, base).await })
    }

    fn reserve(&self, offset: u64, len: u64) -> LocalFuture<'_, io::Result<()>> {
        Box::pin(async move { self.file().reserve(offset, len).await })
    }

    fn grows(&self) -> bool {
        self.file().grows()
    }

    fn resize(&self, size: u64) -> LocalFuture<'_, io::Result<u64>> {
        Box::pin(async move {
            if self.gate.moment().is_some() {
                return Err(io::ErrorKind::Unsupported.into());
            }
            self.file().resize(size).await
        })
    }

    fn size_from_children(&self) -> Option<u64> {
        Some(self.file().size())
    }

    fn announce_block_size(&self, block_size: u64) {
        self.file().announce_block_size(block_size);
    }

    fn make_writable(&self) -> Result<()> {
        self.file().make_writable()
    }

    fn make_read_only(&self) {
        self.file().make_read_only();
    }

    fn filename(&self) -> Option<String> {
        self.file().filename()
    }

    fn close(&self) -> Pin<Box<dyn Future<Output = ()> + Send + '_>> {
        self.gate.close();
        Box::pin(async {})
    }

    fn drain(&self, on: bool) {
        self.gate.drain(on);
    }

    fn enter(&self) {
        self.gate.enter_graph();
    }

    fn step(&self, event: &'static str, offset: u64, len: u64) -> Told<'_> {
        self.gate.step(event, offset, len)
    }

    fn suspended(&self) -> Vec<String> {
        self.gate.suspended()
    }

    fn go_on(&self, tag: &str) -> bool {
        self.gate.go_on(tag)
    }

    fn below(&self) -> Vec<Arc<Node>> {
        vec![self.file()]
    }

    fn set_file(&self, node: Arc<Node>) -> bool {
        self.gate.set_file(&node);
        self.file.store(node);
        true
    }

    fn moment(&self) -> Option<Arc<Backup>> {
        self.gate.moment()
    }

    fn is_filter(&self) -> bool {
        true
    }
}
