//! Driver `luks`: a disk encrypted with LUKS version 1, on a child that holds its header and its data.

use std::io;
use std::sync::Arc;

use vdisk_api::{Error, LuksOptions, NodeOptions, Result};
use vdisk_io::IoVecs;
use vdisk_luks::SECTOR;
use vdisk_qcow2::Storage;

use super::{Direction, Driver, Limits, LocalFuture, OpenedDriver, Resolved, SlowReason};
use crate::crypt::{Encrypted, unlock};
use crate::node::{Node, WriteFlags, ZeroFlags};
use crate::runtime::Runtime;

struct Luks(Encrypted);

pub(super) fn open(
    name: &str,
    node: &NodeOptions,
    options: &LuksOptions,
    children: &[Arc<Node>],
    runtime: &Runtime,
) -> Result<OpenedDriver> {
    let what = format!("node '{name}'");
    let file = children
        .first()
        .cloned()
        .ok_or_else(|| Error::failed(format!("{what}: driver luks has no child")))?;
    let place = (0, file.size());
    let (header, cipher) = unlock(&what, &file, place, &runtime.secrets, &options.key_secret)?;
    if header.payload < header.end_of_keys() {
        return Err(Error::new(
            vdisk_api::ErrorKind::Corrupt,
            format!(
                "{what}: its LUKS header says that the data begins at {}, within the header or its keys, which the first write would destroy (detached headers are not supported)",
                header.payload
            ),
        ));
    }
    let size = file.size().checked_sub(header.payload).ok_or_else(|| {
        Error::new(
            vdisk_api::ErrorKind::Corrupt,
            format!(
                "{what}: its LUKS header says that the data begins at {}, beyond the {} bytes of node '{}'",
                header.payload,
                file.size(),
                file.name()
            ),
        )
    })?;
    file.announce_block_size(SECTOR as u64);
    Ok(OpenedDriver {
        size: size / SECTOR as u64 * SECTOR as u64,
        read_only: node.read_only || file.is_read_only(),
        driver: Box::new(Luks(Encrypted {
            below: file,
            base: header.payload,
            cipher: cipher.into(),
        })),
    })
}

impl Driver for Luks {
    fn name(&self) -> &'static str {
        "luks"
    }

    fn limits(&self) -> Limits {
        let below = self.0.below.limits();
        Limits {
            request_alignment: SECTOR as u64,
            memory_alignment: below.memory_alignment,
            zero_alignment: 1,
        }
    }

    fn storage_block_size(&self) -> u64 {
        self.0.below.storage_block_size()
    }

    fn resolve(
        &self,
        direction: Direction,
        offset: u64,
        len: u64,
        then: &mut dyn FnMut(Resolved<'_>),
    ) {
        match direction {
            Direction::Read => self.0.resolve_read(offset, len, then),
            Direction::Write => then(Resolved::Slow(SlowReason::Encrypted)),
        }
    }

    fn slow_reason(&self, direction: Direction) -> Option<SlowReason> {
        match direction {
            Direction::Read => self.0.below.slow_reason(direction),
            Direction::Write => Some(SlowReason::Encrypted),
        }
    }

    fn read(&self, offset: u64, iov: IoVecs) -> LocalFuture<'_, io::Result<()>> {
        Box::pin(self.0.read_at(offset, iov))
    }

    fn write(
        &self,
        offset: u64,
        iov: IoVecs,
        flags: WriteFlags,
    ) -> LocalFuture<'_, io::Result<()>> {
        Box::pin(self.0.write_at(offset, iov, flags))
    }

    fn flush(&self) -> LocalFuture<'_, io::Result<()>> {
        Box::pin(self.0.below.flush())
    }

    fn write_behind(&self) -> LocalFuture<'_, ()> {
        Box::pin(self.0.below.write_behind())
    }

    fn discard(&self, offset: u64, len: u64) -> LocalFuture<'_, io::Result<()>> {
        Box::pin(async move { self.0.discard(offset, len).await })
    }

    fn write_zeroes(&self, _: u64, _: u64, _: ZeroFlags) -> LocalFuture<'_, io::Result<()>> {
        // They are data like any other.
        Box::pin(async { Err(io::ErrorKind::Unsupported.into()) })
    }

    fn reserve(&self, offset: u64, len: u64) -> LocalFuture<'_, io::Result<()>> {
        Box::pin(async move { self.0.reserve(offset, len).await })
    }

    fn resize(&self, size: u64) -> LocalFuture<'_, io::Result<u64>> {
        Box::pin(async move {
            let end = self
                .0
                .base
                .checked_add(size)
                .ok_or_else(|| io::Error::from_raw_os_error(libc::EFBIG))?;
            let end = self.0.below.resize(end).await?;
            Ok(end.saturating_sub(self.0.base))
        })
    }

    fn size_from_children(&self) -> Option<u64> {
        let size = self.0.below.size().saturating_sub(self.0.base);
        Some(size / SECTOR as u64 * SECTOR as u64)
    }

    fn announce_block_size(&self, block_size: u64) {
        self.0
            .below
            .announce_block_size(block_size.max(SECTOR as u64));
    }

    fn make_writable(&self) -> Result<()> {
        self.0.below.make_writable()
    }

    fn make_read_only(&self) {
        self.0.below.make_read_only();
    }

    fn below(&self) -> Vec<Arc<Node>> {
        vec![self.0.below.clone()]
    }

    fn filename(&self) -> Option<String> {
        self.0.below.filename()
    }
}
