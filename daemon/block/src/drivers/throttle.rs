//! Driver `throttle`: requests wait until their group has room for them.

use std::io;
use std::pin::Pin;
use std::sync::{Arc, RwLock};

use vdisk_api::{Error, NodeOptions, Result, ThrottleOptions};
use vdisk_io::IoVecs;

use super::{Direction, Driver, Limits, LocalFuture, OpenedDriver, Resolved, SlowReason};
use crate::node::{Node, WriteFlags, ZeroFlags};
use crate::runtime::Runtime;
use crate::status::BlockStatus;
use crate::throttle::Membership;

struct Throttle {
    file: RwLock<Arc<Node>>,
    group: Membership,
}

pub(super) fn open(
    name: &str,
    node: &NodeOptions,
    options: &ThrottleOptions,
    children: &[Arc<Node>],
    runtime: &Runtime,
) -> Result<OpenedDriver> {
    let file = children
        .first()
        .cloned()
        .ok_or_else(|| Error::failed(format!("node '{name}': driver throttle has no child")))?;
    let group = runtime
        .throttle_groups
        .get(&options.throttle_group)
        .map_err(|e| e.context(format_args!("node '{name}'")))?;
    Ok(OpenedDriver {
        size: file.size(),
        read_only: node.read_only || file.is_read_only(),
        driver: Box::new(Throttle {
            file: RwLock::new(file),
            group: group.join(),
        }),
    })
}

impl Throttle {
    fn file(&self) -> Arc<Node> {
        self.file.read().unwrap_or_else(|e| e.into_inner()).clone()
    }
}

impl Driver for Throttle {
    fn name(&self) -> &'static str {
        "throttle"
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

    fn resolve(&self, _: Direction, _: u64, _: u64, then: &mut dyn FnMut(Resolved<'_>)) {
        then(Resolved::Slow(SlowReason::Throttled));
    }

    fn slow_reason(&self, _: Direction) -> Option<SlowReason> {
        Some(SlowReason::Throttled)
    }

    fn read(&self, offset: u64, iov: IoVecs) -> LocalFuture<'_, io::Result<()>> {
        Box::pin(async move {
            self.group.enter(Direction::Read, iov.len() as u64).await;
            self.file().read(offset, iov).await
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
            self.group.enter(Direction::Write, iov.len() as u64).await;
            self.file().write(offset, iov, flags).await
        })
    }

    fn flush(&self) -> LocalFuture<'_, io::Result<()>> {
        Box::pin(async move { self.file().flush().await })
    }

    fn discard(&self, offset: u64, len: u64) -> LocalFuture<'_, io::Result<()>> {
        Box::pin(async move {
            self.group.enter(Direction::Write, len).await;
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
            self.group.enter(Direction::Write, len).await;
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

    fn write_compressed(&self, offset: u64, iov: IoVecs) -> LocalFuture<'_, io::Result<()>> {
        Box::pin(async move {
            self.group.enter(Direction::Write, iov.len() as u64).await;
            self.file().write_compressed(offset, iov).await
        })
    }

    fn reserve(&self, offset: u64, len: u64) -> LocalFuture<'_, io::Result<()>> {
        Box::pin(async move { self.file().reserve(offset, len).await })
    }

    fn grows(&self) -> bool {
        self.file().grows()
    }

    fn resize(&self, size: u64) -> LocalFuture<'_, io::Result<u64>> {
        Box::pin(async move { self.file().resize(size).await })
    }

    fn size_from_children(&self) -> Option<u64> {
        Some(self.file().size())
    }

    fn announce_block_size(&self, block_size: u64) {
        self.file().announce_block_size(block_size);
    }

    fn filename(&self) -> Option<String> {
        self.file().filename()
    }

    fn close(&self) -> Pin<Box<dyn Future<Output = ()> + Send + '_>> {
        // Clients may keep the node until their next request.
        self.group.leave();
        Box::pin(async {})
    }

    fn drain(&self, on: bool) {
        self.group.drain(on);
    }

    fn below(&self) -> Vec<Arc<Node>> {
        vec![self.file()]
    }

    fn set_file(&self, node: Arc<Node>) -> bool {
        *self.file.write().unwrap_or_else(|e| e.into_inner()) = node;
        true
    }
}
