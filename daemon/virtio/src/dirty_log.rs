//! The dirty page log of live migration (vhost-user specification, "Migration"): one bit for each
//! 4 KiB page of guest-physical memory, set by the back-end for each page that it wrote.

use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, Ordering};

use crate::sigbus::Guard;

const PAGE_SHIFT: u32 = 12;

pub struct DirtyLog {
    base: NonNull<AtomicU8>,
    len: usize,
    map_base: NonNull<u8>,
    map_len: usize,
    _guard: Guard,
}

// SAFETY: the log is an array of atomics in shared memory.
unsafe impl Send for DirtyLog {}
// SAFETY: as above.
unsafe impl Sync for DirtyLog {}

impl DirtyLog {
    /// Maps `len` bytes at `offset` of `fd`.
    pub fn map(fd: BorrowedFd<'_>, len: u64, offset: u64) -> std::io::Result<DirtyLog> {
        let invalid = || std::io::Error::from(std::io::ErrorKind::InvalidInput);
        let end = offset.checked_add(len).ok_or_else(invalid)?;
        let map_len = usize::try_from(end).map_err(|_| invalid())?;
        let stat = rustix::fs::fstat(fd)?;
        if len == 0
            || (rustix::fs::FileType::from_raw_mode(stat.st_mode).is_file()
                && (stat.st_size as u64) < end)
        {
            return Err(invalid());
        }
        // SAFETY: a new mapping at an address of the kernel's choice.
        let map = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                map_len,
                rustix::mm::ProtFlags::READ | rustix::mm::ProtFlags::WRITE,
                rustix::mm::MapFlags::SHARED,
                fd,
                0,
            )?
        };
        let map_base = NonNull::new(map.cast::<u8>()).ok_or_else(invalid)?;
        let guard =
            Guard::new(map as usize, map_len, rustix::param::page_size()).ok_or_else(invalid);
        let base = NonNull::new(map.cast::<u8>().wrapping_add(offset as usize).cast());
        match (guard, base) {
            (Ok(guard), Some(base)) => Ok(DirtyLog {
                base,
                len: len as usize,
                map_base,
                map_len,
                _guard: guard,
            }),
            _ => {
                // SAFETY: mapped above and used by nobody.
                unsafe {
                    let _ = rustix::mm::munmap(map, map_len);
                }
                Err(invalid())
            }
        }
    }

    /// Marks `len` bytes at guest-physical `addr` as written; what lies beyond the log is not logged.
    pub fn mark(&self, addr: u64, len: u64) {
        if len == 0 {
            return;
        }
        let last = addr.saturating_add(len - 1) >> PAGE_SHIFT;
        for page in (addr >> PAGE_SHIFT)..=last {
            let byte = page / 8;
            if byte >= self.len as u64 {
                return;
            }
            // SAFETY: `byte` lies within the mapped log.
            let cell = unsafe { self.base.add(byte as usize).as_ref() };
            cell.fetch_or(1 << (page % 8), Ordering::Relaxed);
        }
    }
}

impl Drop for DirtyLog {
    fn drop(&mut self) {
        // SAFETY: mapped in `map`, unmapped once.
        unsafe {
            let _ = rustix::mm::munmap(self.map_base.as_ptr().cast(), self.map_len);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn every_touched_page_is_marked_and_no_other() {
        let fd = rustix::fs::memfd_create("log", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&fd, 4096 + 2).unwrap();
        let log = DirtyLog::map(fd.as_fd(), 2, 4096).unwrap();
        log.mark(4095, 2);
        log.mark(9 << 12, 1);
        log.mark(3 << 12, 0);
        log.mark(u64::MAX, 1);
        log.mark(15 << 12, u64::MAX);
        let mut bytes = [0; 2];
        rustix::io::pread(&fd, &mut bytes, 4096).unwrap();
        assert_eq!(bytes, [0b11, 0b1000_0010]);
        assert!(DirtyLog::map(fd.as_fd(), 3, 4096).is_err());
    }
}
