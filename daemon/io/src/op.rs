//! What an engine can be asked to do.

use std::sync::Arc;

use crate::file::IoFile;

/// A range operation of fallocate(2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fallocate {
    /// Frees the blocks; reads give zeroes (`FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE`).
    PunchHole,
    /// Keeps or allocates the blocks; reads give zeroes (`FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE`).
    ZeroRange,
    /// Allocates the blocks; reads give what they gave (`FALLOC_FL_KEEP_SIZE`).
    Reserve,
}

impl Fallocate {
    pub(crate) fn mode(self) -> i32 {
        match self {
            Fallocate::PunchHole => libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
            Fallocate::ZeroRange => libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE,
            Fallocate::Reserve => libc::FALLOC_FL_KEEP_SIZE,
        }
    }
}

/// The kind of an operation on a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OpKind {
    /// Reads into the buffers; beyond the end of the file they are filled with zeroes.
    Read,
    /// Writes the buffers.
    Write,
    /// Writes the buffers and completes only when the data is durable (`RWF_DSYNC`).
    WriteDurable,
    /// fdatasync(2).
    Sync,
    /// Begins to write what the page cache has of the range to the disk; makes nothing durable (sync_file_range(2),
    /// `SYNC_FILE_RANGE_WRITE`). May take as long as the disk.
    WriteBehind,
    Fallocate(Fallocate),
    /// `BLKDISCARD` on a block device: frees the range, whose content is then undefined.
    BlockDiscard,
    /// `BLKZEROOUT` on a block device.
    BlockZeroOut,
    /// Has the range share the blocks of one of another file: see [`crate::Reactor::submit_share`].
    Share,
}

/// Where the blocks are that a range is to share.
pub(crate) struct SharedRange {
    pub file: Arc<IoFile>,
    /// Byte offset in that file.
    pub offset: u64,
}

impl OpKind {
    /// Not something that a ring does (or does in a thread of the kernel's that others wait for): goes to a thread pool with every engine.
    pub(crate) fn is_ioctl(self) -> bool {
        matches!(
            self,
            OpKind::BlockDiscard | OpKind::BlockZeroOut | OpKind::Share | OpKind::WriteBehind
        )
    }

    /// Moves bytes through buffers.
    pub(crate) fn is_transfer(self) -> bool {
        matches!(self, OpKind::Read | OpKind::Write | OpKind::WriteDurable)
    }
}

/// An operation as engines see it: everything by value or by pointer that outlives it.
#[derive(Clone, Copy)]
pub(crate) struct RawOp {
    pub kind: OpKind,
    pub fd: i32,
    /// See [`crate::IoFile::id`].
    pub file_id: u32,
    /// Slot in the ring's registered file table.
    pub fixed_file: Option<u32>,
    /// Index of the registered buffer that holds the (single) segment.
    pub fixed_buffer: Option<u16>,
    /// O_DIRECT is set on the file.
    pub direct: bool,
    /// See [`crate::IoFile::write_blocks`].
    pub write_blocks: bool,
    pub iov: *const libc::iovec,
    /// Number of segments; of [`OpKind::Share`] 0, and `iov` points to a [`SharedRange`].
    pub iov_count: u32,
    /// Byte offset in the file.
    pub offset: u64,
    /// Bytes still to transfer, or the length of the range.
    pub len: u64,
}
