//! Open files, known to every I/O thread by a small number.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use crate::buffer::segments_aligned;
use crate::thread;

/// How many files the registered file table of an io_uring holds; files beyond it are used by number.
pub(crate) const FIXED_FILES: u32 = 1024;

/// An open file or block device.
///
/// I/O threads register the file with their ring at first use and keep it open until [`IoFile::close`]:
/// that (not the drop of the last reference elsewhere) is what gives it back.
#[derive(Debug)]
pub struct IoFile {
    fd: OwnedFd,
    id: u32,
    direct: bool,
    memory_alignment: usize,
    write_blocks: bool,
    lost_data: AtomicBool,
}

/// Regular files everywhere but where buffered writes are known to support `RWF_NOWAIT`.
fn is_on_file_system_that_blocks(fd: &OwnedFd) -> bool {
    const XFS: i64 = 0x5846_5342;
    const BTRFS: i64 = 0x9123_683e;
    let regular = rustix::fs::fstat(fd).is_ok_and(|s| {
        rustix::fs::FileType::from_raw_mode(s.st_mode) == rustix::fs::FileType::RegularFile
    });
    regular && rustix::fs::fstatfs(fd).is_ok_and(|s| !matches!(s.f_type, XFS | BTRFS))
}

static IDS: Mutex<Ids> = Mutex::new(Ids {
    free: Vec::new(),
    next: 0,
});

struct Ids {
    free: Vec<u32>,
    next: u32,
}

impl IoFile {
    /// Takes over `fd`; `direct` says whether it was opened with O_DIRECT. Buffers must start and end at multiples of
    /// `memory_alignment` (a power of two).
    pub fn new(fd: OwnedFd, direct: bool, memory_alignment: usize) -> Arc<IoFile> {
        let mut ids = IDS.lock().unwrap_or_else(|e| e.into_inner());
        let id = ids.free.pop().unwrap_or_else(|| {
            ids.next += 1;
            ids.next - 1
        });
        let write_blocks = !direct && is_on_file_system_that_blocks(&fd);
        Arc::new(IoFile {
            write_blocks,
            fd,
            id,
            direct,
            memory_alignment,
            lost_data: AtomicBool::new(false),
        })
    }

    /// A number that no other open file has; small numbers are used again.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// Writes to the page cache cannot be made without waiting (`RWF_NOWAIT`) on this file system: a ring would
    /// hand each to a kernel thread, one by one.
    pub(crate) fn write_blocks(&self) -> bool {
        self.write_blocks
    }

    pub fn is_direct(&self) -> bool {
        self.direct
    }

    /// Whether the storage takes these buffers as they are.
    pub fn takes(&self, segments: &[libc::iovec]) -> bool {
        self.memory_alignment == 1 || segments_aligned(segments, self.memory_alignment)
    }

    /// Reads `len` bytes at `offset`, fewer at the end of the file, with any alignment. Blocks; not for I/O
    /// threads.
    pub fn read_blocking(&self, offset: u64, len: usize) -> std::io::Result<Vec<u8>> {
        const BLOCK: u64 = 4096;
        let start = offset - offset % BLOCK;
        let skip = (offset - start) as usize;
        let buf = crate::IoVecs::zeroed(
            (skip + len).next_multiple_of(BLOCK as usize),
            BLOCK as usize,
        );
        let room = buf.segments()[0];
        let mut have = 0;
        while have < skip + len {
            // SAFETY: the buffer has `iov_len` bytes, of which `have` are filled.
            let n = unsafe {
                libc::pread(
                    self.fd.as_raw_fd(),
                    room.iov_base.cast::<u8>().add(have).cast(),
                    room.iov_len - have,
                    (start + have as u64) as i64,
                )
            };
            match n {
                0 => break,
                n if n > 0 => have += n as usize,
                _ => {
                    let error = std::io::Error::last_os_error();
                    if error.kind() != std::io::ErrorKind::Interrupted {
                        return Err(error);
                    }
                }
            }
            // With O_DIRECT a part of a block is the end of the file.
            if self.direct && !have.is_multiple_of(512) {
                break;
            }
        }
        let mut out = vec![0; len.min(have.saturating_sub(skip))];
        buf.copy_to_slice(skip, &mut out);
        Ok(out)
    }

    /// The kernel has reported that it could not write data back. It drops such data and reports it once:
    /// a flush that succeeds later says nothing about it.
    pub fn note_lost_data(&self) {
        self.lost_data.store(true, Ordering::Relaxed);
    }

    /// Whether [`IoFile::note_lost_data`] was ever called.
    pub fn has_lost_data(&self) -> bool {
        self.lost_data.load(Ordering::Relaxed)
    }

    pub(crate) fn raw(&self) -> RawFd {
        self.fd.as_raw_fd()
    }

    /// Makes every I/O thread let go of the file. To be called when no request on it is in flight.
    pub async fn close(self: Arc<Self>) {
        let id = self.id;
        for thread in thread::all() {
            let _ = thread.run(move |r| r.forget_file(id)).await;
        }
    }
}

impl Drop for IoFile {
    fn drop(&mut self) {
        IDS.lock()
            .unwrap_or_else(|e| e.into_inner())
            .free
            .push(self.id);
    }
}

impl AsFd for IoFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// `BLKGETSIZE64` of linux/fs.h: writes a 64-bit number of bytes.
const BLKGETSIZE64: libc::Ioctl = 0x8008_1272_u32 as libc::Ioctl;

/// The size of a block device in bytes.
pub fn block_device_size(fd: BorrowedFd<'_>) -> std::io::Result<u64> {
    let mut size = 0u64;
    // SAFETY: the ioctl writes one u64.
    let rc = unsafe { libc::ioctl(fd.as_raw_fd(), BLKGETSIZE64, &raw mut size) };
    if rc < 0 {
        return Err(std::io::Error::last_os_error());
    }
    Ok(size)
}

/// Whether `len` bytes can be read from the start of a file opened with O_DIRECT: its block size is the
/// smallest `len` that works.
pub fn direct_read_works(fd: BorrowedFd<'_>, len: usize) -> std::io::Result<bool> {
    let buf = crate::AlignedBuf::new(len, len.max(4096));
    // SAFETY: the buffer has at least `len` bytes.
    let n = unsafe { libc::pread(fd.as_raw_fd(), buf.as_mut_ptr().cast(), len, 0) };
    if n >= 0 {
        return Ok(true);
    }
    match std::io::Error::last_os_error() {
        e if e.raw_os_error() == Some(libc::EINVAL) => Ok(false),
        e => Err(e),
    }
}
