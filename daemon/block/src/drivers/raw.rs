//! Driver `raw`: a part (or all) of its child, as it is.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use vdisk_api::{Error, NodeOptions, RawOptions, Result};
use vdisk_io::{IoFile, IoVecs};

use super::{Direction, Driver, Limits, LocalFuture, OpenedDriver, Resolved, SlowReason};
use crate::node::{Node, Source, WriteFlags, ZeroFlags};
use crate::status::BlockStatus;

struct Raw {
    file: Arc<Node>,
    offset: u64,
    /// Set if the options name a size, which then does not follow the child's.
    size: Option<AtomicU64>,
}

pub(super) fn open(
    name: &str,
    node: &NodeOptions,
    options: &RawOptions,
    children: &[Arc<Node>],
) -> Result<OpenedDriver> {
    let file = children
        .first()
        .cloned()
        .ok_or_else(|| Error::failed(format!("node '{name}': driver raw has no child")))?;
    let have = file.size();
    let room = have.checked_sub(options.offset).ok_or_else(|| {
        Error::invalid(format!(
            "node '{name}': option 'offset' is {}, beyond the {have} bytes of node '{}'",
            options.offset,
            file.name()
        ))
    })?;
    if let Some(size) = options.size
        && size > room
    {
        return Err(Error::invalid(format!(
            "node '{name}': option 'size' is {size}, but node '{}' has only {room} bytes from offset {}",
            file.name(),
            options.offset
        )));
    }
    let alignment = file.storage_block_size();
    if !options.offset.is_multiple_of(alignment) {
        return Err(Error::invalid(format!(
            "node '{name}': option 'offset' is {}: give a multiple of {alignment}, the block size of node '{}'",
            options.offset,
            file.name()
        )));
    }
    Ok(OpenedDriver {
        size: options.size.unwrap_or(room),
        read_only: node.read_only || file.is_read_only(),
        driver: Box::new(Raw {
            file,
            offset: options.offset,
            size: options.size.map(AtomicU64::new),
        }),
    })
}

impl Driver for Raw {
    fn name(&self) -> &'static str {
        "raw"
    }

    fn limits(&self) -> Limits {
        // Requests of any alignment go down: only the node that knows the storage may read a block,
        // change a part and write it back, or two of them would do so beside each other.
        Limits {
            request_alignment: 1,
            ..self.file.limits()
        }
    }

    fn storage_block_size(&self) -> u64 {
        self.file.storage_block_size()
    }

    fn resolve(
        &self,
        direction: Direction,
        offset: u64,
        len: u64,
        then: &mut dyn FnMut(Resolved<'_>),
    ) {
        self.file
            .resolve_range(direction, self.offset + offset, len, then);
    }

    fn slow_reason(&self, direction: Direction) -> Option<SlowReason> {
        self.file.slow_reason(direction)
    }

    fn read(&self, offset: u64, iov: IoVecs) -> LocalFuture<'_, io::Result<()>> {
        let at = self.offset + offset;
        Box::pin(async move {
            self.file
                .before_step("read_aio", at, iov.len() as u64)
                .await?;
            self.file.read(at, iov).await
        })
    }

    fn read_blocking(&self, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        self.file.read_blocking(self.offset + offset, len)
    }

    fn write(
        &self,
        offset: u64,
        iov: IoVecs,
        flags: WriteFlags,
    ) -> LocalFuture<'_, io::Result<()>> {
        let at = self.offset + offset;
        Box::pin(async move {
            self.file
                .before_step("write_aio", at, iov.len() as u64)
                .await?;
            self.file.write(at, iov, flags).await
        })
    }

    fn flush(&self) -> LocalFuture<'_, io::Result<()>> {
        Box::pin(self.file.flush())
    }

    fn write_behind(&self) -> LocalFuture<'_, ()> {
        Box::pin(self.file.write_behind())
    }

    fn discard(&self, offset: u64, len: u64) -> LocalFuture<'_, io::Result<()>> {
        Box::pin(self.file.discard(self.offset + offset, len))
    }

    fn write_zeroes(
        &self,
        offset: u64,
        len: u64,
        flags: ZeroFlags,
    ) -> LocalFuture<'_, io::Result<()>> {
        Box::pin(self.file.write_zeroes(self.offset + offset, len, flags))
    }

    fn shares_with(&self, file: &IoFile) -> bool {
        self.file.shares_with(file)
    }

    fn share<'a>(
        &'a self,
        offset: u64,
        source: Source<'a>,
        missing: bool,
    ) -> LocalFuture<'a, io::Result<()>> {
        Box::pin(self.file.share(self.offset + offset, source, missing))
    }

    fn status<'a>(
        &'a self,
        offset: u64,
        len: u64,
        base: Option<&'a Arc<Node>>,
    ) -> LocalFuture<'a, io::Result<BlockStatus>> {
        Box::pin(self.file.status(self.offset + offset, len, base))
    }

    fn reserve(&self, offset: u64, len: u64) -> LocalFuture<'_, io::Result<()>> {
        Box::pin(self.file.reserve(self.offset + offset, len))
    }

    fn grows(&self) -> bool {
        self.size.is_none() && self.file.grows()
    }

    fn resize(&self, size: u64) -> LocalFuture<'_, io::Result<u64>> {
        Box::pin(async move {
            let end = self
                .offset
                .checked_add(size)
                .ok_or_else(|| io::Error::from_raw_os_error(libc::EFBIG))?;
            match &self.size {
                // The rest of the child is not ours: the part can only move its end within it.
                Some(own) => {
                    if end > self.file.size() {
                        return Err(io::Error::from_raw_os_error(libc::ENOSPC));
                    }
                    own.store(size, Ordering::Relaxed);
                    Ok(size)
                }
                None => Ok(self.file.resize(end).await?.saturating_sub(self.offset)),
            }
        })
    }

    fn size_from_children(&self) -> Option<u64> {
        match &self.size {
            Some(_) => None,
            None => Some(self.file.size().saturating_sub(self.offset)),
        }
    }

    fn announce_block_size(&self, block_size: u64) {
        self.file.announce_block_size(block_size);
    }

    fn make_writable(&self) -> Result<()> {
        self.file.make_writable()
    }

    fn make_read_only(&self) {
        self.file.make_read_only();
    }

    fn below(&self) -> Vec<Arc<Node>> {
        vec![self.file.clone()]
    }

    fn filename(&self) -> Option<String> {
        self.file.filename()
    }
}
