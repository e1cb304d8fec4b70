//! What an image is stored in.

use std::future::Future;
use std::io;
use std::pin::Pin;

use vdisk_io::IoVecs;

pub type LocalFuture<'a, T> = Pin<Box<dyn Future<Output = T> + 'a>>;

/// A step of the engine, for a storage that has some of them fail or wait: for tests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    L1Update,
    L1GrowAllocTable,
    L1GrowWriteTable,
    L1GrowActivateTable,
    L2Load,
    L2Update,
    L2AllocCowRead,
    L2AllocWrite,
    ReadAio,
    ReadBackingAio,
    ReadCompressed,
    WriteAio,
    WriteCompressed,
    CowRead,
    CowWrite,
    ReftableLoad,
    ReftableGrow,
    ReftableUpdate,
    RefblockLoad,
    RefblockUpdate,
    RefblockAllocWrite,
    RefblockAllocSwitchTable,
    ClusterAlloc,
    ClusterAllocSpace,
    ClusterFree,
}

impl Step {
    pub const ALL: [Step; 25] = [
        Step::L1Update,
        Step::L1GrowAllocTable,
        Step::L1GrowWriteTable,
        Step::L1GrowActivateTable,
        Step::L2Load,
        Step::L2Update,
        Step::L2AllocCowRead,
        Step::L2AllocWrite,
        Step::ReadAio,
        Step::ReadBackingAio,
        Step::ReadCompressed,
        Step::WriteAio,
        Step::WriteCompressed,
        Step::CowRead,
        Step::CowWrite,
        Step::ReftableLoad,
        Step::ReftableGrow,
        Step::ReftableUpdate,
        Step::RefblockLoad,
        Step::RefblockUpdate,
        Step::RefblockAllocWrite,
        Step::RefblockAllocSwitchTable,
        Step::ClusterAlloc,
        Step::ClusterAllocSpace,
        Step::ClusterFree,
    ];

    /// As QAPI's `BlkdebugEvent` calls it.
    pub fn name(self) -> &'static str {
        match self {
            Step::L1Update => "l1_update",
            Step::L1GrowAllocTable => "l1_grow_alloc_table",
            Step::L1GrowWriteTable => "l1_grow_write_table",
            Step::L1GrowActivateTable => "l1_grow_activate_table",
            Step::L2Load => "l2_load",
            Step::L2Update => "l2_update",
            Step::L2AllocCowRead => "l2_alloc_cow_read",
            Step::L2AllocWrite => "l2_alloc_write",
            Step::ReadAio => "read_aio",
            Step::ReadBackingAio => "read_backing_aio",
            Step::ReadCompressed => "read_compressed",
            Step::WriteAio => "write_aio",
            Step::WriteCompressed => "write_compressed",
            Step::CowRead => "cow_read",
            Step::CowWrite => "cow_write",
            Step::ReftableLoad => "reftable_load",
            Step::ReftableGrow => "reftable_grow",
            Step::ReftableUpdate => "reftable_update",
            Step::RefblockLoad => "refblock_load",
            Step::RefblockUpdate => "refblock_update",
            Step::RefblockAllocWrite => "refblock_alloc_write",
            Step::RefblockAllocSwitchTable => "refblock_alloc_switch_table",
            Step::ClusterAlloc => "cluster_alloc",
            Step::ClusterAllocSpace => "cluster_alloc_space",
            Step::ClusterFree => "cluster_free",
        }
    }
}

/// A file or device that an image lies in, or that stands behind it. Offsets and lengths are bytes, of any
/// alignment.
///
/// What a write puts there may be lost, in any part and any order, until a flush that began after the write
/// had ended has ended: all of the crash safety of the engine stands on this, and on nothing more. (Pieces of
/// 16 bytes at multiples of 16, the largest entry of a table, are written wholly or not at all; no more is asked of
/// a sector.)
pub trait Storage: Send + Sync {
    /// Bytes. Reads and writes stay within.
    fn size(&self) -> u64;

    fn read(&self, offset: u64, iov: IoVecs) -> LocalFuture<'_, io::Result<()>>;

    fn write(&self, offset: u64, iov: IoVecs) -> LocalFuture<'_, io::Result<()>>;

    /// Makes every write that has ended durable.
    fn flush(&self) -> LocalFuture<'_, io::Result<()>>;

    /// The range is not needed any more. May do nothing.
    fn discard(&self, offset: u64, len: u64) -> LocalFuture<'_, io::Result<()>>;

    /// Takes space for the range, so that writes to it cannot fail for want of it. What it reads as stays.
    fn reserve(&self, offset: u64, len: u64) -> LocalFuture<'_, io::Result<()>>;

    /// Whether it can grow.
    fn grows(&self) -> bool;

    /// Grows or shrinks; what is new reads as zeroes. `Unsupported` if the size is fixed.
    fn set_size(&self, size: u64) -> LocalFuture<'_, io::Result<()>>;

    /// Makes the range read as zeroes, with space taken or not.
    fn write_zeroes(
        &self,
        offset: u64,
        len: u64,
        may_unmap: bool,
    ) -> LocalFuture<'_, io::Result<()>>;

    /// Waits until every request that was in flight when this was called has ended: see
    /// [`vdisk_io::quiesce`].
    fn quiesce(&self) -> LocalFuture<'_, ()>;

    /// Comes before a step that concerns a range of the file (of no bytes if none): an error is what the step ends with. None if
    /// nothing is to be done.
    fn step(&self, _: Step, _offset: u64, _len: u64) -> Option<LocalFuture<'_, io::Result<()>>> {
        None
    }
}

/// Comes before a step, which is not to be done after an error.
pub(crate) async fn before(
    file: &dyn Storage,
    step: Step,
    offset: u64,
    len: u64,
) -> io::Result<()> {
    match file.step(step, offset, len) {
        Some(told) => told.await,
        None => Ok(()),
    }
}

/// Stands where guest data would be, of an image that is only to be looked at.
pub(crate) struct Missing(pub &'static str);

impl Missing {
    fn refuse<T: 'static>(&self) -> LocalFuture<'_, io::Result<T>> {
        let message = format!("the image was opened without {}", self.0);
        Box::pin(async { Err(io::Error::new(io::ErrorKind::Unsupported, message)) })
    }
}

impl Storage for Missing {
    fn size(&self) -> u64 {
        u64::MAX
    }

    fn read(&self, _: u64, _: IoVecs) -> LocalFuture<'_, io::Result<()>> {
        self.refuse()
    }

    fn write(&self, _: u64, _: IoVecs) -> LocalFuture<'_, io::Result<()>> {
        self.refuse()
    }

    fn flush(&self) -> LocalFuture<'_, io::Result<()>> {
        Box::pin(async { Ok(()) })
    }

    fn discard(&self, _: u64, _: u64) -> LocalFuture<'_, io::Result<()>> {
        self.refuse()
    }

    fn reserve(&self, _: u64, _: u64) -> LocalFuture<'_, io::Result<()>> {
        self.refuse()
    }

    fn grows(&self) -> bool {
        false
    }

    fn set_size(&self, _: u64) -> LocalFuture<'_, io::Result<()>> {
        self.refuse()
    }

    fn write_zeroes(&self, _: u64, _: u64, _: bool) -> LocalFuture<'_, io::Result<()>> {
        self.refuse()
    }

    fn quiesce(&self) -> LocalFuture<'_, ()> {
        Box::pin(async {})
    }
}

/// A buffer of `len` bytes for metadata, aligned for O_DIRECT.
pub(crate) fn buffer(len: usize) -> IoVecs {
    IoVecs::zeroed(len, 4096)
}

pub(crate) fn buffer_of(data: &[u8]) -> IoVecs {
    let iov = buffer(data.len());
    iov.copy_from_slice(0, data);
    iov
}

/// Reads what there is; beyond the end there are zeroes.
pub(crate) async fn read_or_zero(
    storage: &dyn Storage,
    offset: u64,
    iov: IoVecs,
) -> io::Result<()> {
    let have = storage.size().saturating_sub(offset).min(iov.len() as u64) as usize;
    iov.slice(have, iov.len() - have).zero_in_turns().await;
    if have == 0 {
        return Ok(());
    }
    storage.read(offset, iov.slice(0, have)).await
}
