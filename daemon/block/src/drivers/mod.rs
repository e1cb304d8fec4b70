//! The drivers: what a node can be made of.

mod blkdebug;
mod copy_before_write;
mod copy_on_read;
mod file;
mod filter;
mod inactive;
mod locks;
mod luks;
mod nbd;
mod null;
pub(crate) mod qcow2;
mod raw;
mod throttle;

use std::fmt;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;

use vdisk_api::{DriverOptions, Error, NodeOptions, Result};
use vdisk_io::{IoFile, IoVecs, Reactor};

use crate::crypt::Decryption;
use crate::jobs::Backup;
use crate::node::{Node, Source, WriteFlags, ZeroFlags};
use crate::runtime::Runtime;
use crate::status::BlockStatus;

pub use inactive::Inactive;

pub type LocalFuture<'a, T> = Pin<Box<dyn Future<Output = T> + 'a>>;

/// What [`Driver::step`] has a step wait for, if it does.
pub type Told<'a> = Option<LocalFuture<'a, io::Result<()>>>;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    Read,
    Write,
}

/// Where the bytes of a request are.
pub enum Resolved<'a> {
    /// At this byte offset of this file, in one piece.
    Direct {
        file: &'a Arc<IoFile>,
        offset: u64,
        /// Flushes are ignored (`cache.no-flush`): a durable write is an ordinary one.
        no_flush: bool,
        /// The place itself is known durably: a durable write needs nothing else.
        settled: bool,
    },
    /// As [`Resolved::Direct`], of a read: what is there is encrypted, and to be decrypted where it was read to.
    Encrypted {
        file: &'a Arc<IoFile>,
        offset: u64,
        decryption: Decryption,
    },
    /// Nowhere: reads give zeroes.
    Zeroes,
    /// Nowhere: the request is done without touching its buffers.
    Nothing,
    /// The slow path must find out.
    Slow(SlowReason),
}

/// Why a request, or every request of a kind, takes the slow path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SlowReason {
    /// It reaches beyond the end, or writes to a read-only node: it will fail.
    Refused,
    /// It, or its memory, is not aligned to the storage's blocks.
    Unaligned,
    /// Guests may write less than a block of the storage.
    SmallBlocks,
    DetectZeroes,
    Latency,
    /// New clusters are needed for it.
    Allocates,
    /// It is compressed.
    Compressed,
    /// It is encrypted.
    Encrypted,
    /// A group limits how many may go.
    Throttled,
    /// The table that says where it is must be read first.
    Metadata,
    /// Its parts are in several places.
    Scattered,
    /// A backup must copy what is there first.
    BackedUp,
    /// A mirror writes it to its target, too.
    Mirrored,
    /// What is read from a backing file is kept.
    CopiedOnRead,
    /// It may be made to fail.
    Debugged,
    /// Somebody is to be told of it.
    Threshold,
    /// It is about what the disk had before.
    Past,
    /// A job looks there for zeroes that it can discard.
    Discarded,
    /// The node is inactive.
    Inactive,
    /// The storage is at the other end of a connection.
    Network,
}

impl fmt::Display for SlowReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            SlowReason::Refused => "the request is refused",
            SlowReason::Unaligned => "the request is not aligned to the storage's blocks",
            SlowReason::SmallBlocks => {
                "the logical block size is smaller than the storage's blocks: writes are serialised"
            }
            SlowReason::DetectZeroes => "detect-zeroes looks at the data of writes",
            SlowReason::Allocates => "the write needs new clusters",
            SlowReason::Compressed => "the data is compressed",
            SlowReason::Encrypted => "the data is encrypted",
            SlowReason::Throttled => "a throttle group limits requests",
            SlowReason::Metadata => "the table of the image must be read first",
            SlowReason::Scattered => "the data is in several places",
            SlowReason::BackedUp => "a backup copies what is there before it is overwritten",
            SlowReason::CopiedOnRead => "copy-on-read keeps what is read from a backing file",
            SlowReason::Discarded => "a job discards what is zeroes there",
            SlowReason::Threshold => "the write reaches beyond the threshold",
            SlowReason::Past => "what was overwritten since is read elsewhere",
            SlowReason::Debugged => "blkdebug may make requests fail",
            SlowReason::Mirrored => "a mirror writes to its target, too",
            SlowReason::Inactive => "the node is inactive",
            SlowReason::Network => "the storage is an NBD server's",
            SlowReason::Latency => "latency-ns delays requests",
        })
    }
}

/// What the storage demands, in bytes; alignments are powers of two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Offset and length of every request must be multiples of this.
    pub request_alignment: u64,
    /// Buffers must start and end at multiples of this in memory.
    pub memory_alignment: usize,
    /// Zero writes and discards of whole multiples of this are efficient.
    pub zero_alignment: u64,
}

impl Limits {
    pub const NONE: Limits = Limits {
        request_alignment: 1,
        memory_alignment: 1,
        zero_alignment: 1,
    };
}

/// One kind of node. Requests reach a driver through [`Node`], within bounds and aligned to its limits.
pub trait Driver: Send + Sync {
    /// The QAPI name.
    fn name(&self) -> &'static str;

    fn limits(&self) -> Limits {
        Limits::NONE
    }

    /// A request at `offset`, which may lie anywhere, is about to be resolved: has the memory fetched into the CPU's cache that
    /// this will look at. False if nothing is known about `offset` here, and the backing node is to anticipate it. Nothing else follows from it.
    fn anticipate(&self, _offset: u64) -> bool {
        true
    }

    /// Where reads go of which this driver has nothing. Another one comes only while everything above is drained.
    fn backing(&self) -> Option<Arc<Node>> {
        None
    }

    /// As [`Driver::resolve`], which asks the backing node itself; this one does not tell anything then, and returns false.
    fn resolve_here(
        &self,
        direction: Direction,
        offset: u64,
        len: u64,
        then: &mut dyn FnMut(Resolved<'_>),
    ) -> bool {
        self.resolve(direction, offset, len, then);
        true
    }

    /// Tells `then` where `len` bytes at `offset` are, once. Must not block, allocate or lock.
    fn resolve(
        &self,
        direction: Direction,
        offset: u64,
        len: u64,
        then: &mut dyn FnMut(Resolved<'_>),
    );

    /// Why this driver and what is below it send requests of this direction down the slow path.
    fn slow_reason(&self, direction: Direction) -> Option<SlowReason>;

    fn read(&self, offset: u64, iov: IoVecs) -> LocalFuture<'_, io::Result<()>>;

    fn write(&self, offset: u64, iov: IoVecs, flags: WriteFlags)
    -> LocalFuture<'_, io::Result<()>>;

    /// Reads `len` bytes at `offset`, fewer at the end, without a reactor: for opening what stands on this
    /// driver. May block.
    fn read_blocking(&self, _offset: u64, _len: usize) -> io::Result<Vec<u8>> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Makes every write that has completed durable.
    fn flush(&self) -> LocalFuture<'_, io::Result<()>>;

    /// Begins to move to the disk what was written to memory, so that the next flush is short. Makes nothing durable; ends when the disk
    /// has taken it up. Errors are for the flush to tell.
    fn write_behind(&self) -> LocalFuture<'_, ()> {
        Box::pin(async {})
    }

    /// Frees the range if possible; `Unsupported` if not at all.
    fn discard(&self, offset: u64, len: u64) -> LocalFuture<'_, io::Result<()>>;

    /// Writes zeroes without moving data; `Unsupported` if that cannot be done.
    fn write_zeroes(
        &self,
        offset: u64,
        len: u64,
        flags: ZeroFlags,
    ) -> LocalFuture<'_, io::Result<()>>;

    /// Writes whole clusters compressed; `Unsupported` if that cannot be done.
    fn write_compressed(&self, _offset: u64, _iov: IoVecs) -> LocalFuture<'_, io::Result<()>> {
        Box::pin(async { Err(io::ErrorKind::Unsupported.into()) })
    }

    /// Writes a range where the driver has no data of its own, and passes on to its backing file; the rest stays. `None` is for
    /// zeroes.
    fn populate(
        &self,
        _offset: u64,
        _len: u64,
        _data: Option<IoVecs>,
    ) -> LocalFuture<'_, io::Result<()>> {
        Box::pin(async { Err(io::ErrorKind::Unsupported.into()) })
    }

    /// Whether ranges may share blocks with this file, as far as that can be told without trying.
    fn shares_with(&self, _file: &IoFile) -> bool {
        false
    }

    /// Has a range share blocks with `source`, which has it in one place: see [`Node::share`]. With `missing` only where
    /// [`Driver::populate`] would write.
    fn share<'a>(
        &'a self,
        _offset: u64,
        _source: Source<'a>,
        _missing: bool,
    ) -> LocalFuture<'a, io::Result<()>> {
        Box::pin(async { Err(io::ErrorKind::Unsupported.into()) })
    }

    /// What is known of the bytes at `offset`, of `len` (at least one) at most. See
    /// [`Node::status`].
    fn status<'a>(
        &'a self,
        _offset: u64,
        len: u64,
        _base: Option<&'a Arc<Node>>,
    ) -> LocalFuture<'a, io::Result<BlockStatus>> {
        Box::pin(async move { Ok(BlockStatus::data(len)) })
    }

    /// Takes space for the range.
    fn reserve(&self, _offset: u64, _len: u64) -> LocalFuture<'_, io::Result<()>> {
        Box::pin(async { Err(io::ErrorKind::Unsupported.into()) })
    }

    /// Whether it can become larger, and then reads as zeroes.
    fn grows(&self) -> bool {
        false
    }

    /// Changes the size to `size` bytes and returns what it is now.
    fn resize(&self, size: u64) -> LocalFuture<'_, io::Result<u64>>;

    /// The size in bytes as it follows from the children; None for drivers with a size of their own.
    fn size_from_children(&self) -> Option<u64> {
        None
    }

    /// Block size of the storage at the bottom, in bytes: what offsets of windows and sizes must be
    /// multiples of.
    fn storage_block_size(&self) -> u64 {
        self.limits().request_alignment
    }

    /// Clients may write blocks of this many bytes from now on.
    fn announce_block_size(&self, _block_size: u64) {}

    /// Somebody waits for all requests in flight, or does so no more: the driver lets go those that it holds back.
    /// Each driver for itself.
    fn drain(&self, _on: bool) {}

    /// Requests that wait for somebody else's answer fail, all of them (`wholly`) or if none was answered since this was last asked: what is
    /// written by them is not needed any more, and whoever waits for them has waited long. True if some did. Each driver for itself.
    fn give_up(&self, _wholly: bool) -> bool {
        false
    }

    /// Says to whoever has the storage whether all is written that is to be: `Unsupported` if they cannot be told.
    fn set_finished(&self, _on: bool) -> LocalFuture<'_, io::Result<()>> {
        Box::pin(async { Err(io::ErrorKind::Unsupported.into()) })
    }

    /// The node is part of the graph now.
    fn enter(&self) {}

    /// Comes before a step of what stands on this driver that concerns a range of it (of no bytes if none): an error is what the
    /// step ends with. None if nothing is to be done. `event` is one of [`vdisk_api::DEBUG_EVENTS`].
    fn step(&self, _event: &'static str, _offset: u64, _len: u64) -> Told<'_> {
        None
    }

    /// The tags of requests that wait until they are told to go on.
    fn suspended(&self) -> Vec<String> {
        Vec::new()
    }

    /// Has a suspended request go on. False if there is none with this tag.
    fn go_on(&self, _tag: &str) -> bool {
        false
    }

    /// The nodes that it stands on at the moment.
    fn below(&self) -> Vec<Arc<Node>> {
        Vec::new()
    }

    /// What the disk had at one moment, which the driver keeps.
    fn moment(&self) -> Option<Arc<Backup>> {
        None
    }

    /// Its storage is open.
    fn is_active(&self) -> bool {
        true
    }

    /// Others than this daemon, on other hosts too, are kept from opening its storage.
    fn is_locked_for_other_hosts(&self) -> bool {
        true
    }

    /// It shows its child as it is.
    fn is_filter(&self) -> bool {
        false
    }

    /// Gives a filter another child. False if the driver cannot have one. No request is in flight.
    fn set_file(&self, _node: Arc<Node>) -> bool {
        false
    }

    /// Gives an image another backing node, or none, under a name (and format) in its header. No request is in flight.
    fn set_backing(
        &self,
        _node: Option<Arc<Node>>,
        _named: Option<(String, String)>,
    ) -> LocalFuture<'_, io::Result<()>> {
        Box::pin(async { Err(io::ErrorKind::Unsupported.into()) })
    }

    /// Opens for writing what was opened for reading, all the way down, and locks it so. It is to be activated then. May
    /// block; no request is in flight.
    fn make_writable(&self) -> Result<()> {
        Err(Error::not_supported(format!(
            "driver {} cannot be opened for writing while it is in use",
            self.name()
        )))
    }

    /// Nothing is written any more: locks as for reading, all the way down. May block; it was deactivated.
    fn make_read_only(&self) {}

    /// The qcow2 image that the driver serves.
    fn image(&self) -> Option<Arc<vdisk_qcow2::Image>> {
        None
    }

    /// The path or address of what is behind the driver.
    fn filename(&self) -> Option<String> {
        None
    }

    /// Makes ready for requests, after everything below is. On an I/O thread.
    fn activate(&self) -> LocalFuture<'_, io::Result<()>> {
        Box::pin(async { Ok(()) })
    }

    /// Brings everything that is kept in memory to the storage, before anything below does. On an I/O thread; no
    /// request is in flight, and none follows.
    fn deactivate(&self) -> LocalFuture<'_, io::Result<()>> {
        Box::pin(async { Ok(()) })
    }

    /// Lets go of everything, on no particular thread. No request is in flight.
    fn close(&self) -> Pin<Box<dyn Future<Output = ()> + Send + '_>> {
        Box::pin(async {})
    }
}

/// The reactor that a driver's future runs on.
pub(crate) fn reactor() -> io::Result<Rc<Reactor>> {
    Reactor::current().ok_or_else(|| io::Error::other("block requests run on I/O threads only"))
}

/// A driver just opened, its size in bytes, and whether it turned out read-only.
pub(crate) struct OpenedDriver {
    pub driver: Box<dyn Driver>,
    pub size: u64,
    pub read_only: bool,
}

/// Opens a driver; may block. `children` are in the order of the driver's roles.
pub(crate) fn open(
    name: &str,
    options: &NodeOptions,
    children: &[Arc<Node>],
    runtime: &Runtime,
) -> Result<OpenedDriver> {
    match &options.driver {
        DriverOptions::File(o) => file::open(name, options, o, false, runtime),
        DriverOptions::HostDevice(o) => file::open(name, options, o, true, runtime),
        DriverOptions::Raw(o) => raw::open(name, options, o, children),
        DriverOptions::Qcow2(o) => qcow2::open(name, options, o, children, runtime),
        DriverOptions::Luks(o) => luks::open(name, options, o, children, runtime),
        DriverOptions::Throttle(o) => throttle::open(name, options, o, children, runtime),
        DriverOptions::CopyOnRead(o) => copy_on_read::open(name, options, o, children),
        DriverOptions::CopyBeforeWrite(o) => copy_before_write::open(name, options, o, children),
        DriverOptions::SnapshotAccess(o) => {
            copy_before_write::open_access(name, options, o, children)
        }
        DriverOptions::Blkdebug(o) => blkdebug::open(name, options, o, children),
        DriverOptions::Nbd(o) => nbd::open(name, options, o, runtime),
        DriverOptions::NullCo(o) => Ok(null::open(options, o)),
    }
}
