//! Drivers `copy-before-write`, a filter that keeps what a disk had at one moment while guests write, and `snapshot-access`,
//! which shows that moment.
//!
//! The moment is when the filter was opened: before anybody writes through it. What a guest overwrites is copied to the target
//! first; the rest is still in the disk.

use std::io;
use std::sync::Arc;

use vdisk_api::{
    CopyBeforeWriteOptions, CopyErrorPolicy, Error, NodeOptions, Result, SnapshotAccessOptions,
};
use vdisk_io::IoVecs;

use super::filter::{Filter, Gate, Request};
use super::{Direction, Driver, LocalFuture, OpenedDriver, Resolved, SlowReason};
use crate::jobs::{Backup, BackupSync, OnCopyError, Sharing};
use crate::node::{Node, WriteFlags, ZeroFlags};
use crate::status::BlockStatus;
use crate::tap::Tap;

/// Pieces that are told from each other, at most: their bits take 256 MiB.
const MAX_PIECES: u64 = 1 << 31;

struct CopyBeforeWrite {
    moment: Arc<Backup>,
}

pub(super) fn open(
    name: &str,
    node: &NodeOptions,
    options: &CopyBeforeWriteOptions,
    children: &[Arc<Node>],
) -> Result<OpenedDriver> {
    let what = format!("node '{name}'");
    let [file, target] = children else {
        return Err(Error::failed(format!(
            "{what}: driver copy-before-write has two children"
        )));
    };
    if target.is_read_only() {
        return Err(Error::invalid(format!(
            "{what}: its target '{}' is read-only, and nothing can be copied to it: add that without read-only",
            target.name()
        )));
    }
    if target.size() != file.size() {
        return Err(Error::invalid(format!(
            "{what}: its target '{}' has {} bytes, but '{}' has {}: give them the same size",
            target.name(),
            target.size(),
            file.name(),
            file.size()
        )));
    }
    let piece = target.limits().zero_alignment.max(65536);
    if file.size().div_ceil(piece) > MAX_PIECES {
        return Err(Error::invalid(format!(
            "{what}: '{}' has {} bytes, too many pieces of {piece} bytes: give a target with larger clusters",
            file.name(),
            file.size()
        )));
    }
    let on_error = match options.on_cbw_error {
        CopyErrorPolicy::BreakSnapshot => OnCopyError::BreakSnapshot,
        CopyErrorPolicy::BreakGuestWrite => OnCopyError::BreakGuestWrite,
    };
    let (source, target) = (file.clone(), target.clone());
    let moment = Backup::new(
        source,
        target,
        BackupSync::None,
        false,
        Sharing::new(false),
        on_error,
    );
    Ok(OpenedDriver {
        size: file.size(),
        read_only: node.read_only || file.is_read_only(),
        driver: Box::new(Filter::new(file.clone(), CopyBeforeWrite { moment })),
    })
}

impl Gate for CopyBeforeWrite {
    fn name(&self) -> &'static str {
        "copy-before-write"
    }

    fn slow_reason(&self, direction: Direction) -> Option<SlowReason> {
        match direction {
            Direction::Read => None,
            Direction::Write => self.moment.slow_reason(),
        }
    }

    #[inline]
    fn slow_here(&self, direction: Direction, offset: u64, len: u64) -> Option<SlowReason> {
        match direction {
            Direction::Read => None,
            Direction::Write => self.moment.fast_write(offset, len),
        }
    }

    fn enter(&self, request: Request, offset: u64, len: u64) -> LocalFuture<'_, io::Result<()>> {
        Box::pin(async move {
            if matches!(request, Request::Read | Request::Flush) {
                return Ok(());
            }
            self.moment.before(offset, len).await.map(|_| ())
        })
    }

    fn moment(&self) -> Option<Arc<Backup>> {
        Some(self.moment.clone())
    }

    fn set_file(&self, file: &Arc<Node>) {
        self.moment.set_source(file.clone());
    }
}

struct SnapshotAccess {
    file: Arc<Node>,
    moment: Arc<Backup>,
}

pub(super) fn open_access(
    name: &str,
    _: &NodeOptions,
    _: &SnapshotAccessOptions,
    children: &[Arc<Node>],
) -> Result<OpenedDriver> {
    let what = format!("node '{name}'");
    let file = children
        .first()
        .cloned()
        .ok_or_else(|| Error::failed(format!("{what}: driver snapshot-access has no child")))?;
    let moment = file.moment().ok_or_else(|| {
        Error::invalid(format!(
            "{what}: its child '{}' has driver '{}', which keeps no moment: give a copy-before-write node",
            file.name(),
            file.driver_name()
        ))
    })?;
    Ok(OpenedDriver {
        size: moment.size(),
        read_only: true,
        driver: Box::new(SnapshotAccess { file, moment }),
    })
}

fn read_only<'a, T: 'a>() -> LocalFuture<'a, io::Result<T>> {
    Box::pin(async { Err(io::Error::from_raw_os_error(libc::EROFS)) })
}

impl Driver for SnapshotAccess {
    fn name(&self) -> &'static str {
        "snapshot-access"
    }

    fn resolve(&self, _: Direction, _: u64, _: u64, then: &mut dyn FnMut(Resolved<'_>)) {
        then(Resolved::Slow(SlowReason::Past));
    }

    fn slow_reason(&self, _: Direction) -> Option<SlowReason> {
        Some(SlowReason::Past)
    }

    fn read(&self, offset: u64, iov: IoVecs) -> LocalFuture<'_, io::Result<()>> {
        Box::pin(self.moment.read_moment(offset, iov))
    }

    fn write(&self, _: u64, _: IoVecs, _: WriteFlags) -> LocalFuture<'_, io::Result<()>> {
        read_only()
    }

    fn flush(&self) -> LocalFuture<'_, io::Result<()>> {
        Box::pin(async { Ok(()) })
    }

    fn discard(&self, _: u64, _: u64) -> LocalFuture<'_, io::Result<()>> {
        read_only()
    }

    fn write_zeroes(&self, _: u64, _: u64, _: ZeroFlags) -> LocalFuture<'_, io::Result<()>> {
        read_only()
    }

    fn status<'a>(
        &'a self,
        offset: u64,
        len: u64,
        _: Option<&'a Arc<Node>>,
    ) -> LocalFuture<'a, io::Result<BlockStatus>> {
        Box::pin(self.moment.status_of_moment(offset, len))
    }

    fn resize(&self, _: u64) -> LocalFuture<'_, io::Result<u64>> {
        read_only()
    }

    fn storage_block_size(&self) -> u64 {
        1
    }

    fn below(&self) -> Vec<Arc<Node>> {
        vec![self.file.clone()]
    }
}
