//! Guest memory: regions of a front-end's address space, mapped here.

use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::Arc;

use crate::sigbus::Guard;

#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    #[error("memory region at guest address {guest:#x} has no bytes")]
    Empty { guest: u64 },
    #[error("memory region at guest address {guest:#x} of {len:#x} bytes wraps around")]
    Wraps { guest: u64, len: u64 },
    #[error(
        "memory region at guest address {guest:#x} needs {need:#x} bytes of its file, which has {have:#x}"
    )]
    FileTooSmall { guest: u64, need: u64, have: u64 },
    #[error("memory regions at guest addresses {a:#x} and {b:#x} overlap")]
    Overlap { a: u64, b: u64 },
    #[error("cannot map the memory region at guest address {guest:#x}: {error}")]
    Map { guest: u64, error: std::io::Error },
    #[error("too many memory regions are mapped")]
    TooMany,
    #[error("there is no memory region at guest address {guest:#x} of {len:#x} bytes")]
    NoSuchRegion { guest: u64, len: u64 },
}

struct Mapping {
    base: NonNull<u8>,
    len: usize,
    guard: Guard,
}

// SAFETY: a mapping is plain shared memory, reached through raw pointers from any thread.
unsafe impl Send for Mapping {}
// SAFETY: as above; nothing in it is changed after it was made.
unsafe impl Sync for Mapping {}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: this range was mapped by `GuestRegion::map` and is unmapped once.
        unsafe {
            let _ = rustix::mm::munmap(self.base.as_ptr().cast(), self.len);
        }
    }
}

/// One region of guest memory. Clones share the mapping.
#[derive(Clone)]
pub struct GuestRegion {
    /// First guest-physical address.
    pub guest_addr: u64,
    /// Bytes.
    pub len: u64,
    /// First address in the front-end's own address space, which rings are given in.
    pub user_addr: u64,
    /// Where the region starts in its file, in bytes.
    pub file_offset: u64,
    host: *mut u8,
    mapping: Arc<Mapping>,
}

// SAFETY: `host` points into `mapping`, which is Send and Sync.
unsafe impl Send for GuestRegion {}
// SAFETY: as above.
unsafe impl Sync for GuestRegion {}

impl GuestRegion {
    /// Maps `len` bytes at `file_offset` of `fd`.
    pub fn map(
        fd: BorrowedFd<'_>,
        guest_addr: u64,
        len: u64,
        user_addr: u64,
        file_offset: u64,
    ) -> Result<GuestRegion, MemoryError> {
        let guest = guest_addr;
        if len == 0 {
            return Err(MemoryError::Empty { guest });
        }
        let ends = [guest_addr, user_addr, file_offset].map(|at| at.checked_add(len));
        let map_len = file_offset
            .checked_add(len)
            .and_then(|n| usize::try_from(n).ok())
            .filter(|n| *n <= isize::MAX as usize);
        let (Some(map_len), true) = (map_len, ends.iter().all(Option::is_some)) else {
            return Err(MemoryError::Wraps { guest, len });
        };
        let map_error = |error: rustix::io::Errno| MemoryError::Map {
            guest,
            error: error.into(),
        };
        let stat = rustix::fs::fstat(fd).map_err(map_error)?;
        let file_len = stat.st_size as u64;
        // Character devices and the like have no size to check.
        let is_regular = rustix::fs::FileType::from_raw_mode(stat.st_mode).is_file();
        if is_regular && file_len < map_len as u64 {
            return Err(MemoryError::FileTooSmall {
                guest,
                need: map_len as u64,
                have: file_len,
            });
        }
        // The kernel maps, and unmaps, whole (huge) pages.
        let page = page_size(fd);
        let map_len = map_len
            .checked_next_multiple_of(page)
            .ok_or(MemoryError::Wraps { guest, len })?;
        // From the start of the file: the offset need not be a multiple of its (huge) page size.
        // SAFETY: a new mapping at an address of the kernel's choice.
        let base = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                map_len,
                rustix::mm::ProtFlags::READ | rustix::mm::ProtFlags::WRITE,
                rustix::mm::MapFlags::SHARED | rustix::mm::MapFlags::NORESERVE,
                fd,
                0,
            )
        }
        .map_err(map_error)?;
        // Guest memory does not belong into a core dump or a child.
        // SAFETY: advice on the mapping just made.
        unsafe {
            let _ = rustix::mm::madvise(base, map_len, rustix::mm::Advice::LinuxDontDump);
        }
        let Some(base) = NonNull::new(base.cast::<u8>()) else {
            return Err(MemoryError::TooMany);
        };
        let Some(guard) = Guard::new(base.as_ptr() as usize, map_len, page) else {
            // SAFETY: mapped above and used by nobody.
            unsafe {
                let _ = rustix::mm::munmap(base.as_ptr().cast(), map_len);
            }
            return Err(MemoryError::TooMany);
        };
        Ok(GuestRegion {
            guest_addr,
            len,
            user_addr,
            file_offset,
            host: base.as_ptr().wrapping_add(file_offset as usize),
            mapping: Arc::new(Mapping {
                base,
                len: map_len,
                guard,
            }),
        })
    }

    /// Where the region starts in this process.
    pub fn host_ptr(&self) -> *mut u8 {
        self.host
    }

    fn guest_end(&self) -> u64 {
        self.guest_addr + self.len
    }
}

/// Bytes of a page of a mapping of this file.
fn page_size(fd: BorrowedFd<'_>) -> usize {
    const HUGETLBFS_MAGIC: u64 = 0x958458f6;
    match rustix::fs::fstatfs(fd) {
        Ok(s) if s.f_type as u64 == HUGETLBFS_MAGIC => s.f_bsize as usize,
        _ => rustix::param::page_size(),
    }
}

impl std::fmt::Debug for GuestRegion {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:#x}+{:#x}", self.guest_addr, self.len)
    }
}

/// All regions of a guest, sorted by address. Immutable: a change makes a new value, and what is in
/// flight keeps the old one.
#[derive(Clone, Debug, Default)]
pub struct GuestMemory {
    regions: Vec<GuestRegion>,
}

impl GuestMemory {
    pub fn new(mut regions: Vec<GuestRegion>) -> Result<GuestMemory, MemoryError> {
        regions.sort_by_key(|r| r.guest_addr);
        for pair in regions.windows(2) {
            if pair[0].guest_end() > pair[1].guest_addr {
                return Err(MemoryError::Overlap {
                    a: pair[0].guest_addr,
                    b: pair[1].guest_addr,
                });
            }
        }
        Ok(GuestMemory { regions })
    }

    pub fn regions(&self) -> &[GuestRegion] {
        &self.regions
    }

    /// The memory with one more region.
    pub fn with(&self, region: GuestRegion) -> Result<GuestMemory, MemoryError> {
        let mut regions = self.regions.clone();
        regions.push(region);
        GuestMemory::new(regions)
    }

    /// The memory without the region of exactly this address and length.
    pub fn without(&self, guest: u64, len: u64) -> Result<GuestMemory, MemoryError> {
        let mut regions = self.regions.clone();
        let before = regions.len();
        regions.retain(|r| (r.guest_addr, r.len) != (guest, len));
        if regions.len() == before {
            return Err(MemoryError::NoSuchRegion { guest, len });
        }
        Ok(GuestMemory { regions })
    }

    /// Whether a front-end took memory away that it had shared (see the module `sigbus`).
    pub fn is_broken(&self) -> bool {
        self.regions.iter().any(|r| r.mapping.guard.is_broken())
    }

    /// Translates `len` (at least one) bytes at guest-physical `addr`: calls `f` for each piece that is
    /// contiguous here. False, possibly after some pieces, if any byte is outside the regions. `hint`
    /// is the index of the region that served last.
    #[inline]
    pub fn translate(
        &self,
        mut addr: u64,
        mut len: u64,
        hint: &mut usize,
        mut f: impl FnMut(*mut u8, usize),
    ) -> bool {
        loop {
            let region = match self.regions.get(*hint) {
                Some(r) if addr >= r.guest_addr && addr - r.guest_addr < r.len => r,
                _ => {
                    let at = self.regions.partition_point(|r| r.guest_addr <= addr);
                    let Some(index) = at.checked_sub(1) else {
                        return false;
                    };
                    let r = &self.regions[index];
                    if addr - r.guest_addr >= r.len {
                        return false;
                    }
                    *hint = index;
                    r
                }
            };
            let offset = addr - region.guest_addr;
            let here = len.min(region.len - offset);
            f(region.host.wrapping_add(offset as usize), here as usize);
            len -= here;
            if len == 0 {
                return true;
            }
            // Cannot overflow: the region ends at `addr + here`, which was checked when it was mapped.
            addr += here;
        }
    }

    /// The address here of `len` bytes at a front-end's own address, if one region holds them all.
    pub fn translate_user(&self, addr: u64, len: u64) -> Option<*mut u8> {
        self.regions.iter().find_map(|r| {
            let offset = addr.checked_sub(r.user_addr)?;
            let room = r.len.checked_sub(offset)?;
            (len <= room).then(|| r.host.wrapping_add(offset as usize))
        })
    }

    /// The guest-physical address of something here.
    pub fn guest_addr_of(&self, ptr: *const u8) -> Option<u64> {
        self.regions.iter().find_map(|r| {
            let offset = (ptr as usize).checked_sub(r.host as usize)? as u64;
            (offset < r.len).then(|| r.guest_addr + offset)
        })
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::os::fd::AsFd;

    pub fn region(guest: u64, len: u64) -> GuestRegion {
        let fd = rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&fd, len).unwrap();
        GuestRegion::map(fd.as_fd(), guest, len, guest + 0x7000_0000, 0).unwrap()
    }

    fn pieces(m: &GuestMemory, addr: u64, len: u64) -> Option<Vec<usize>> {
        let mut out = vec![];
        m.translate(addr, len, &mut 0, |_, n| out.push(n))
            .then_some(out)
    }

    #[test]
    fn addresses_are_bounded_by_their_regions() {
        let m = GuestMemory::new(vec![region(0x4000, 0x1000), region(0x1000, 0x1000)]).unwrap();
        assert_eq!(pieces(&m, 0x1000, 0x1000), Some(vec![0x1000]));
        assert_eq!(pieces(&m, 0x1fff, 2), None);
        assert_eq!(pieces(&m, 0xfff, 1), None);
        assert_eq!(pieces(&m, 0x4fff, 1), Some(vec![1]));
        assert_eq!(pieces(&m, u64::MAX, 1), None);
        assert_eq!(pieces(&m, u64::MAX, u64::MAX), None);
        assert!(m.translate_user(0x7000_1000, 0x1000).is_some());
        assert!(m.translate_user(0x7000_1000, 0x1001).is_none());
    }

    #[test]
    fn adjacent_regions_make_two_pieces() {
        let m = GuestMemory::new(vec![region(0x1000, 0x1000), region(0x2000, 0x1000)]).unwrap();
        assert_eq!(pieces(&m, 0x1800, 0x1000), Some(vec![0x800, 0x800]));
    }

    #[test]
    fn overlaps_and_bad_sizes_are_refused() {
        let e = GuestMemory::new(vec![region(0x1000, 0x2000), region(0x2000, 0x1000)]);
        assert!(matches!(e, Err(MemoryError::Overlap { .. })));
        let fd = rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let map = |guest, len, off| GuestRegion::map(fd.as_fd(), guest, len, 0, off);
        assert!(matches!(map(0, 0, 0), Err(MemoryError::Empty { .. })));
        assert!(matches!(
            map(0, 4096, 0),
            Err(MemoryError::FileTooSmall { .. })
        ));
        assert!(matches!(
            map(u64::MAX - 10, 4096, 0),
            Err(MemoryError::Wraps { .. })
        ));
        assert!(matches!(
            map(0, u64::MAX, 1),
            Err(MemoryError::Wraps { .. })
        ));
    }

    #[test]
    fn memory_taken_away_is_noticed_and_survived() {
        let fd = rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&fd, 8192).unwrap();
        let r = GuestRegion::map(fd.as_fd(), 0, 8192, 0, 0).unwrap();
        let m = GuestMemory::new(vec![r]).unwrap();
        let at = m.translate_user(4096, 1).unwrap();
        // SAFETY: inside the region.
        unsafe { at.write_volatile(1) };
        assert!(!m.is_broken());
        rustix::fs::ftruncate(&fd, 4096).unwrap();
        // SAFETY: inside the region; the page is gone, which is what is tested.
        assert_eq!(unsafe { at.read_volatile() }, 0);
        assert!(m.is_broken());
    }
}
