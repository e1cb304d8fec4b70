//! Drivers `file` (regular files) and `host_device` (block devices).

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};

use rustix::fs::SeekFrom;
use vdisk_api::{Error, FileOptions, Locking, NodeOptions, Result};
use vdisk_io::{Fallocate, IoFile, IoVecs, OpKind, block_device_size};

use super::{
    Direction, Driver, Limits, LocalFuture, OpenedDriver, Resolved, SlowReason, locks, reactor,
};
use crate::descriptors::{Descriptors, Open};
use crate::directories::Directories;
use crate::node::{Node, Source, WriteFlags, ZeroFlags};
use crate::permission::{Permissions, Use};
use crate::runtime::{LockPatience, Runtime};
use crate::status::BlockStatus;

/// `STATX_DIO_READ_ALIGN` of linux/stat.h: `stx_dio_read_offset_align` is filled in (Linux 6.14).
const STATX_DIO_READ_ALIGN: u32 = 0x0002_0000;

/// `XFS_SUPER_MAGIC` of linux/magic.h.
const XFS: i64 = 0x5846_5342;

/// File systems whose files can share blocks: XFS, btrfs, bcachefs, OCFS2 (linux/magic.h, and the last two's own headers).
const SHARING: [i64; 4] = [XFS, 0x9123_683e, 0xca45_1a4e, 0x7461_636f];

/// Blocks are shared in multiples of this many bytes: those of the file systems that can do it.
const SHARED_BLOCK: u64 = 4096;

struct File {
    /// As it was opened.
    file: Arc<IoFile>,
    /// Opened for writing later, and used from then on.
    writable: OnceLock<Arc<IoFile>>,
    /// None if it is not locked.
    locking: Option<Locking>,
    filename: String,
    directories: Directories,
    descriptors: Descriptors,
    /// If it was passed open.
    passed: Option<Open>,
    is_device: bool,
    no_flush: bool,
    limits: Limits,
    /// Discards and zero writes must be of whole multiples of this.
    range_alignment: u64,
    no_discard: AtomicBool,
    no_zero_range: AtomicBool,
    no_punch_hole: AtomicBool,
}

fn open_fd(
    descriptors: &Descriptors,
    path: &str,
    write: bool,
    direct: bool,
    again: Option<&Open>,
) -> io::Result<(OwnedFd, Option<Open>)> {
    if Descriptors::is_one(path) {
        let (fd, open) = descriptors.open(path, write, direct, again)?;
        return Ok((fd, Some(open)));
    }
    let mut flags = libc::O_CLOEXEC | libc::O_NOCTTY | libc::O_NONBLOCK;
    if direct {
        flags |= libc::O_DIRECT;
    }
    OpenOptions::new()
        .read(true)
        .write(write)
        .custom_flags(flags)
        .open(path)
        .map(|file| (OwnedFd::from(file), None))
}

pub(super) fn open(
    name: &str,
    node: &NodeOptions,
    options: &FileOptions,
    is_device: bool,
    runtime: &Runtime,
) -> Result<OpenedDriver> {
    let path = options.filename.as_str();
    let what = match name.starts_with("image '") {
        // Not part of the graph (see `Standalone`).
        true => name.to_owned(),
        false => format!("node '{name}': '{path}'"),
    };
    let cannot = |e: &io::Error| Error::io(format_args!("{what} cannot be opened"), e);

    let descriptors = &runtime.descriptors;
    let meta = descriptors.metadata(path).map_err(|e| cannot(&e))?;
    let kind = meta.file_type();
    if is_device && !kind.is_block_device() {
        return Err(Error::invalid(format!(
            "{what} is not a block device: use driver 'file' for regular files"
        )));
    }
    if !is_device && !kind.is_file() {
        let (is, remedy) = if kind.is_dir() {
            ("a directory", "give the path of an image in it")
        } else if kind.is_block_device() {
            ("a block device", "use driver 'host_device'")
        } else {
            ("not a regular file", "give the path of an image")
        };
        return Err(Error::invalid(format!("{what} is {is}: {remedy}")));
    }

    let direct = node.cache.direct;
    let mut read_only = node.read_only;
    let fd = match open_fd(descriptors, path, !read_only, direct, None) {
        Err(e)
            if node.auto_read_only
                && !read_only
                && matches!(
                    e.raw_os_error(),
                    Some(libc::EACCES | libc::EPERM | libc::EROFS)
                ) =>
        {
            read_only = true;
            open_fd(descriptors, path, false, direct, None)
        }
        other => other,
    };
    let (fd, passed) = fd.map_err(|e| match e.raw_os_error() {
        Some(libc::EINVAL) if direct => Error::not_supported(format!(
            "{what}: this file system has no O_DIRECT; set cache.direct=off"
        )),
        _ => cannot(&e),
    })?;

    if !Descriptors::is_one(path) {
        runtime.directories.check(&what, path, &fd)?;
    }

    if !node.force_share {
        let patience = runtime.lock_patience;
        locks::lock(&fd, &what, &image_use(read_only), options.locking, patience)?;
    }

    if is_device && !direct {
        // Another host may have written to it since it was read here.
        let _ = rustix::fs::fadvise(&fd, 0, None, rustix::fs::Advice::DontNeed);
    }
    let mut size = if is_device {
        block_device_size(fd.as_fd()).map_err(|e| cannot(&e))?
    } else {
        std::fs::File::from(fd.try_clone().map_err(|e| cannot(&e))?)
            .metadata()
            .map_err(|e| cannot(&e))?
            .len()
    };
    let mut limits = Limits {
        zero_alignment: meta_block_size(&fd),
        ..Limits::NONE
    };
    if direct {
        (limits.request_alignment, limits.memory_alignment) = direct_alignment(&fd, is_device)
            .map_err(|e| {
                Error::io(
                    format_args!("{what}: cannot find its O_DIRECT block size"),
                    &e,
                )
            })?;
        if options.whole_blocks && !is_device {
            size = size.next_multiple_of(limits.request_alignment);
        }
        if !size.is_multiple_of(limits.request_alignment) {
            return Err(Error::invalid(format!(
                "{what} has {size} bytes, which is not a multiple of {}, the block size of its storage: resize it, or set cache.direct=off",
                limits.request_alignment
            )));
        }
    }
    let range_alignment = if is_device {
        rustix::fs::ioctl_blksszget(&fd).map_or(512, u64::from)
    } else {
        1
    };
    Ok(OpenedDriver {
        driver: Box::new(File {
            file: IoFile::new(fd, direct, limits.memory_alignment),
            writable: OnceLock::new(),
            locking: (!node.force_share).then_some(options.locking),
            filename: path.to_owned(),
            directories: runtime.directories.clone(),
            descriptors: runtime.descriptors.clone(),
            passed,
            is_device,
            no_flush: node.cache.no_flush,
            limits,
            range_alignment,
            no_discard: AtomicBool::new(false),
            no_zero_range: AtomicBool::new(false),
            no_punch_hole: AtomicBool::new(false),
        }),
        size,
        read_only,
    })
}

/// What an open image means to other processes: one writer, or any number of readers. (QEMU lets readers
/// of raw images in beside a writer; what they see is not consistent, so here they must ask for it with
/// force-share.)
fn image_use(read_only: bool) -> Use {
    let read = Permissions::CONSISTENT_READ;
    if read_only {
        return Use {
            taken: read,
            shared: read.and(Permissions::WRITE_UNCHANGED),
        };
    }
    Use {
        taken: read.and(Permissions::WRITE).and(Permissions::RESIZE),
        shared: Permissions::WRITE_UNCHANGED,
    }
}

fn meta_block_size(fd: &OwnedFd) -> u64 {
    let size = rustix::fs::fstat(fd).map_or(0, |s| s.st_blksize as u64);
    if size.is_power_of_two() {
        size.clamp(512, 1 << 20)
    } else {
        4096
    }
}

/// Block size and memory alignment for O_DIRECT, in bytes.
fn direct_alignment(fd: &OwnedFd, is_device: bool) -> io::Result<(u64, usize)> {
    let wanted = rustix::fs::StatxFlags::from_bits_retain(STATX_DIO_READ_ALIGN)
        | rustix::fs::StatxFlags::DIOALIGN;
    let asked = rustix::fs::statx(fd, "", rustix::fs::AtFlags::EMPTY_PATH, wanted);
    if let Ok(stat) = asked
        && stat.stx_mask & rustix::fs::StatxFlags::DIOALIGN.bits() != 0
        && stat.stx_dio_offset_align.is_power_of_two()
        && stat.stx_dio_mem_align.is_power_of_two()
    {
        // XFS asks for whole blocks of its own once a file shares any with another, which must not make the disk another one:
        // it takes smaller writes as before, and reads say what those are.
        let is_xfs = rustix::fs::fstatfs(fd).is_ok_and(|s| s.f_type == XFS);
        let for_reads = stat.stx_dio_read_offset_align;
        let says = stat.stx_mask & STATX_DIO_READ_ALIGN != 0 && for_reads.is_power_of_two();
        let offsets = match is_xfs && says {
            true => stat.stx_dio_offset_align.min(for_reads),
            false => stat.stx_dio_offset_align,
        };
        return Ok((u64::from(offsets).max(512), stat.stx_dio_mem_align as usize));
    }
    if is_device {
        let size = rustix::fs::ioctl_blksszget(fd)?;
        return Ok((u64::from(size).max(512), size as usize));
    }
    // Kernels before 6.1 do not say: the smallest read that works shows it.
    let len = rustix::fs::fstat(fd)?.st_size as u64;
    for align in [512usize, 1024, 2048, 4096] {
        if len < align as u64 {
            break;
        }
        if vdisk_io::direct_read_works(fd.as_fd(), align)? {
            return Ok((align as u64, align));
        }
    }
    Ok((4096, 4096))
}

/// Data or a hole, by what the file system says; data if it does not say.
fn extent(fd: BorrowedFd<'_>, offset: u64, len: u64) -> BlockStatus {
    let hole = |len| BlockStatus {
        zero: true,
        ..BlockStatus::data(len)
    };
    match rustix::fs::seek(fd, SeekFrom::Data(offset)) {
        Ok(at) if at > offset => hole(len.min(at - offset)),
        Ok(_) => match rustix::fs::seek(fd, SeekFrom::Hole(offset)) {
            Ok(end) if end > offset => BlockStatus::data(len.min(end - offset)),
            _ => BlockStatus::data(len),
        },
        // Nothing but a hole up to the end of the file.
        Err(rustix::io::Errno::NXIO) => hole(len),
        Err(_) => BlockStatus::data(len),
    }
}

fn is_unsupported(e: &io::Error) -> bool {
    matches!(
        e.raw_os_error(),
        Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENOTTY)
    )
}

fn unsupported() -> io::Error {
    io::ErrorKind::Unsupported.into()
}

impl File {
    #[inline]
    fn file(&self) -> &Arc<IoFile> {
        self.writable.get().unwrap_or(&self.file)
    }

    async fn range(&self, kind: OpKind, offset: u64, len: u64) -> io::Result<()> {
        reactor()?
            .submit_range(self.file(), kind, offset, len)
            .await
    }

    /// Does `kind` unless it is known not to work here, and learns whether it does.
    async fn try_range(
        &self,
        known_not: &AtomicBool,
        kind: OpKind,
        offset: u64,
        len: u64,
    ) -> io::Result<()> {
        if known_not.load(Relaxed) {
            return Err(unsupported());
        }
        let result = self.range(kind, offset, len).await;
        if result.as_ref().is_err_and(is_unsupported) {
            known_not.store(true, Relaxed);
            return Err(unsupported());
        }
        result
    }

    async fn sync(&self) -> io::Result<()> {
        if self.no_flush {
            return Ok(());
        }
        if self.file().has_lost_data() {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        let result = self.range(OpKind::Sync, 0, 0).await;
        if let Err(error) = &result {
            self.file().note_lost_data();
            tracing::error!(
                image = self.filename,
                %error,
                "a flush failed: written data may be lost, and every later flush will fail too"
            );
        }
        result
    }
}

impl Driver for File {
    fn name(&self) -> &'static str {
        if self.is_device {
            "host_device"
        } else {
            "file"
        }
    }

    fn limits(&self) -> Limits {
        self.limits
    }

    #[inline]
    fn resolve(
        &self,
        _direction: Direction,
        offset: u64,
        _len: u64,
        then: &mut dyn FnMut(Resolved<'_>),
    ) {
        then(Resolved::Direct {
            file: self.file(),
            offset,
            no_flush: self.no_flush,
            settled: true,
        });
    }

    fn make_writable(&self) -> Result<()> {
        let what = format!("'{}'", self.filename);
        let Some(locking) = self.locking else {
            return Err(Error::invalid(format!(
                "{what} was added with force-share and may be written by others: add it without that"
            )));
        };
        let file = match self.writable.get() {
            Some(file) => file.clone(),
            None => {
                let direct = self.file.is_direct();
                let fd = open_fd(
                    &self.descriptors,
                    &self.filename,
                    true,
                    direct,
                    self.passed.as_ref(),
                );
                let cannot = format_args!("{what} cannot be opened for writing");
                let (fd, _) = fd.map_err(|e| Error::io(cannot, &e))?;
                if !Descriptors::is_one(&self.filename) {
                    self.directories.check(&what, &self.filename, &fd)?;
                }
                IoFile::new(fd, direct, self.limits.memory_alignment)
            }
        };
        // A reader does not share what a writer needs, not even its own.
        locks::unlock(self.file());
        let patience = LockPatience::default();
        if let Err(e) = locks::lock(&file, &what, &image_use(false), locking, patience) {
            let reader = image_use(true);
            if let Err(error) = locks::lock(self.file(), &what, &reader, locking, patience) {
                tracing::error!(image = self.filename, %error, "cannot be locked again");
            }
            return Err(e);
        }
        let _ = self.writable.set(file);
        Ok(())
    }

    fn make_read_only(&self) {
        let Some(locking) = self.locking else {
            return;
        };
        locks::unlock(self.file());
        let what = format!("'{}'", self.filename);
        let patience = LockPatience::default();
        if let Err(error) = locks::lock(self.file(), &what, &image_use(true), locking, patience) {
            tracing::error!(image = self.filename, %error, "cannot be locked again");
        }
    }

    /// Locks of a device are of one host, however many have it.
    fn is_locked_for_other_hosts(&self) -> bool {
        !self.is_device && self.locking != Some(Locking::Off)
    }

    fn slow_reason(&self, _direction: Direction) -> Option<SlowReason> {
        None
    }

    fn read(&self, offset: u64, iov: IoVecs) -> LocalFuture<'_, io::Result<()>> {
        Box::pin(async move {
            reactor()?
                .submit(self.file(), OpKind::Read, iov, offset)
                .await
        })
    }

    fn read_blocking(&self, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        self.file.read_blocking(offset, len)
    }

    fn write(
        &self,
        offset: u64,
        iov: IoVecs,
        flags: WriteFlags,
    ) -> LocalFuture<'_, io::Result<()>> {
        Box::pin(async move {
            let kind = if flags.durable && !self.no_flush {
                OpKind::WriteDurable
            } else {
                OpKind::Write
            };
            reactor()?.submit(self.file(), kind, iov, offset).await
        })
    }

    fn write_behind(&self) -> LocalFuture<'_, ()> {
        Box::pin(async move {
            if !self.file().is_direct() && !self.no_flush {
                // 0: up to the end.
                let _ = self.range(OpKind::WriteBehind, 0, 0).await;
            }
        })
    }

    fn flush(&self) -> LocalFuture<'_, io::Result<()>> {
        Box::pin(self.sync())
    }

    fn discard(&self, offset: u64, len: u64) -> LocalFuture<'_, io::Result<()>> {
        Box::pin(async move {
            let hole = OpKind::Fallocate(Fallocate::PunchHole);
            if !self.is_device {
                return self.try_range(&self.no_punch_hole, hole, offset, len).await;
            }
            let start = offset.next_multiple_of(self.range_alignment);
            let end = (offset + len) / self.range_alignment * self.range_alignment;
            if start >= end {
                return Ok(());
            }
            self.try_range(&self.no_discard, OpKind::BlockDiscard, start, end - start)
                .await
        })
    }

    fn write_zeroes(
        &self,
        offset: u64,
        len: u64,
        flags: ZeroFlags,
    ) -> LocalFuture<'_, io::Result<()>> {
        Box::pin(async move {
            if !(offset | len).is_multiple_of(self.range_alignment) {
                return Err(unsupported());
            }
            let zero = if self.is_device {
                OpKind::BlockZeroOut
            } else {
                OpKind::Fallocate(Fallocate::ZeroRange)
            };
            let punch = OpKind::Fallocate(Fallocate::PunchHole);
            let mut result = Err(unsupported());
            // On a block device a hole is a zero write that may unmap; it keeps reading as zeroes.
            if flags.may_unmap {
                result = self
                    .try_range(&self.no_punch_hole, punch, offset, len)
                    .await;
            }
            if result
                .as_ref()
                .is_err_and(|e| e.kind() == io::ErrorKind::Unsupported)
            {
                result = self.try_range(&self.no_zero_range, zero, offset, len).await;
            }
            result?;
            if flags.durable {
                self.sync().await
            } else {
                Ok(())
            }
        })
    }

    fn shares_with(&self, file: &IoFile) -> bool {
        let device = |file: &IoFile| rustix::fs::fstat(file).ok().map(|s| s.st_dev);
        let own = self.file();
        let can = rustix::fs::fstatfs(own.as_ref()).is_ok_and(|s| SHARING.contains(&s.f_type));
        !self.is_device && can && device(own).is_some() && device(own) == device(file)
    }

    fn share<'a>(
        &'a self,
        offset: u64,
        source: Source<'a>,
        missing: bool,
    ) -> LocalFuture<'a, io::Result<()>> {
        Box::pin(async move {
            let unaligned = (offset | source.offset | source.len) & (SHARED_BLOCK - 1) != 0;
            if self.is_device || missing || unaligned {
                return Err(unsupported());
            }
            // It may have moved since it was found to be in one place. Nothing is awaited between this look and its use.
            let shared = source.place(|from, from_offset| {
                let reactor = reactor()?;
                io::Result::Ok(reactor.submit_share(
                    self.file(),
                    offset,
                    from,
                    from_offset,
                    source.len,
                ))
            });
            let shared = shared.ok_or(io::ErrorKind::WouldBlock)??;
            // Whatever it is, a copy may do without; if not, it has the error of its own.
            shared.await.map_err(|error| {
                tracing::debug!(image = self.filename, %error, "no blocks are shared");
                unsupported()
            })
        })
    }

    fn status<'a>(
        &'a self,
        offset: u64,
        len: u64,
        _: Option<&'a Arc<Node>>,
    ) -> LocalFuture<'a, io::Result<BlockStatus>> {
        Box::pin(async move {
            if self.is_device {
                return Ok(BlockStatus::data(len));
            }
            Ok(extent(self.file.as_fd(), offset, len))
        })
    }

    fn reserve(&self, offset: u64, len: u64) -> LocalFuture<'_, io::Result<()>> {
        Box::pin(async move {
            if self.is_device {
                return Ok(());
            }
            let reserve = OpKind::Fallocate(Fallocate::Reserve);
            self.range(reserve, offset, len).await
        })
    }

    fn grows(&self) -> bool {
        !self.is_device
    }

    fn resize(&self, size: u64) -> LocalFuture<'_, io::Result<u64>> {
        Box::pin(async move {
            if self.is_device {
                // Somebody else resized the device; all we can do is look.
                let now = block_device_size(self.file.as_fd())?;
                return if size <= now {
                    Ok(now)
                } else {
                    Err(unsupported())
                };
            }
            rustix::fs::ftruncate(self.file().as_ref(), size)?;
            Ok(size)
        })
    }

    fn filename(&self) -> Option<String> {
        Some(self.filename.clone())
    }

    fn close(&self) -> Pin<Box<dyn Future<Output = ()> + Send + '_>> {
        Box::pin(async {
            locks::unlock(self.file());
            self.file.clone().close().await;
            if let Some(file) = self.writable.get() {
                file.clone().close().await;
            }
        })
    }
}
