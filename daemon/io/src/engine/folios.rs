//! Keeps small writes to the page cache cheap where the kernel looks through a whole folio for each.
//!
//! ext4 keeps a file in folios of up to megabytes (Linux 6.16 and later: whatever readahead or large writes made), and each
//! write into one walks over the buffers of all its blocks (`ext4_block_write_begin`): 45 µs for 4 KiB, where a folio of
//! one page takes 4. There is no call that splits a folio, but `madvise(MADV_COLD)` on a part of a mapped one does, as long as
//! it is clean; its pages stay in the cache.

use std::collections::HashMap;
use std::os::fd::RawFd;
use std::time::{Duration, Instant};

/// Larger writes gain nothing worth the trouble.
const SMALL: u64 = 32 << 10;
/// A write of one that takes longer went into a large folio, most likely.
const SLOW: Duration = Duration::from_micros(15);
/// Folios of a file are looked at once for each piece of this size (what readahead makes, usually).
const REGION: u64 = 128 << 10;
/// After this many slow writes one region is looked at again: a folio that is dirty is split only once it is written back.
const RETRY: u32 = 4;
/// After this many looks in vain one in so many writes has one.
const IN_VAIN: u32 = 32;
/// Regions of one word are counted by bits, words by chunks: the span of a chunk is 512 MiB.
const CHUNK_WORDS: usize = 64;
/// More are forgotten: 2 TiB that are written all over, in 2 MiB.
const MAX_CHUNKS: usize = 4096;
const PAGE: u64 = 4096;

/// What is known of the folios of one file.
#[derive(Default)]
pub(super) struct Folios {
    /// A small write was slow: before that nothing is looked at.
    in_use: bool,
    /// Splitting is not possible here.
    refused: bool,
    slow: u32,
    /// Looks since there was a page at one.
    in_vain: u32,
    /// Small writes so far.
    passed: u32,
    /// Bits of regions that were looked at.
    seen: HashMap<u64, Box<[u64; CHUNK_WORDS]>>,
}

impl Folios {
    /// Does the write, of `len` bytes at `offset` of the file.
    pub fn write<T>(&mut self, fd: RawFd, offset: u64, len: u64, write: impl FnOnce() -> T) -> T {
        if self.refused || len > SMALL {
            return write();
        }
        if self.is_worth_a_look() && self.mark(offset) {
            self.look(fd, offset);
        }
        let start = Instant::now();
        let result = write();
        if start.elapsed() > SLOW {
            self.was_slow(offset);
        }
        result
    }

    /// Where nothing was found often, as new parts of a file are written, only some places are looked at.
    fn is_worth_a_look(&mut self) -> bool {
        self.passed = self.passed.wrapping_add(1);
        self.in_use && (self.in_vain < IN_VAIN || self.passed.is_multiple_of(IN_VAIN))
    }

    fn look(&mut self, fd: RawFd, offset: u64) {
        match split(fd, offset - offset % PAGE) {
            Found::Page => self.in_vain = 0,
            Found::Nothing => self.in_vain = (self.in_vain + 1).min(IN_VAIN),
            Found::Refused => self.refused = true,
        }
    }

    fn was_slow(&mut self, offset: u64) {
        self.in_use = true;
        self.slow = self.slow.wrapping_add(1);
        if self.slow.is_multiple_of(RETRY) {
            let (chunk, word, bit) = place(offset);
            if let Some(words) = self.seen.get_mut(&chunk) {
                words[word] &= !bit;
            }
        }
    }

    /// Notes that a region was looked at; whether it was not before.
    fn mark(&mut self, offset: u64) -> bool {
        let (chunk, word, bit) = place(offset);
        if self.seen.len() >= MAX_CHUNKS {
            self.seen.clear();
        }
        let words = self
            .seen
            .entry(chunk)
            .or_insert_with(|| Box::new([0; CHUNK_WORDS]));
        let is_new = words[word] & bit == 0;
        words[word] |= bit;
        is_new
    }
}

/// Chunk, word and bit of the region at a byte offset.
fn place(offset: u64) -> (u64, usize, u64) {
    let region = offset / REGION;
    let word = region / u64::from(u64::BITS);
    (
        word / CHUNK_WORDS as u64,
        (word % CHUNK_WORDS as u64) as usize,
        1 << (region % u64::from(u64::BITS)),
    )
}

/// What there was at the place of a write.
enum Found {
    Nothing,
    /// A page, whose folio was split if it was clean.
    Page,
    /// This system, or this file, does not do it.
    Refused,
}

/// Splits the folio with the page at `offset` if it is in the page cache and clean.
fn split(fd: RawFd, offset: u64) -> Found {
    // SAFETY: a new mapping, that nobody knows of. It is never accessed by address: file systems may fail, and files
    // become shorter, and MADV_POPULATE_READ reports that instead of sending a signal.
    unsafe {
        let at = libc::mmap(
            std::ptr::null_mut(),
            PAGE as usize,
            libc::PROT_READ,
            libc::MAP_SHARED,
            fd,
            offset as i64,
        );
        if at == libc::MAP_FAILED {
            return Found::Refused;
        }
        let mut resident = 0u8;
        let known = libc::mincore(at, PAGE as usize, &raw mut resident) == 0;
        let found = if !known {
            Found::Refused
        } else if resident & 1 == 0 {
            // A write of a whole page makes a folio of its own.
            Found::Nothing
        } else if libc::madvise(at, PAGE as usize, libc::MADV_POPULATE_READ) != 0 {
            // The kernel does not know it, or the page has gone meanwhile.
            match *libc::__errno_location() {
                libc::EINVAL => Found::Refused,
                _ => Found::Nothing,
            }
        } else {
            libc::madvise(at, PAGE as usize, libc::MADV_COLD);
            Found::Page
        };
        libc::munmap(at, PAGE as usize);
        found
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::FileExt;

    use super::*;

    const SIZE: u64 = 4 << 20;

    fn patterned() -> File {
        let file = tempfile::tempfile().expect("the folder for temporary files is writable");
        let all: Vec<u8> = (0..SIZE).map(|i| (i / PAGE) as u8).collect();
        file.write_all_at(&all, 0).expect("there is room");
        file
    }

    /// Folios that are looked at from the first write on.
    fn folios() -> Folios {
        Folios {
            in_use: true,
            ..Folios::default()
        }
    }

    #[test]
    fn data_is_what_was_written_whatever_is_split() {
        let (file, mut folios) = (patterned(), folios());
        file.sync_all().expect("the disk works");
        let fd = file.as_raw_fd();
        for page in (0..SIZE / PAGE).step_by(7) {
            let (data, at) = ([0xee; 512], page * PAGE + 1024);
            let n = folios.write(fd, at, 512, || file.write_at(&data, at));
            assert_eq!(n.expect("it can be written"), 512);
        }
        assert!(!folios.refused, "no error from a file in the page cache");
        let mut all = vec![0; SIZE as usize];
        file.read_exact_at(&mut all, 0).expect("all of it is there");
        for (i, byte) in all.iter().enumerate() {
            let (page, within) = (i as u64 / PAGE, i as u64 % PAGE);
            let written = page.is_multiple_of(7) && (1024..1536).contains(&within);
            assert_eq!(*byte, if written { 0xee } else { page as u8 }, "byte {i}");
        }
    }

    #[test]
    fn a_file_that_has_become_shorter_is_no_error() {
        let (file, mut folios) = (patterned(), folios());
        file.set_len(PAGE).expect("it can be made shorter");
        for at in [0, PAGE, SIZE - PAGE] {
            folios.write(file.as_raw_fd(), at, 1, || ());
        }
        assert!(!folios.refused);
    }

    #[test]
    fn a_region_is_looked_at_again_after_some_slow_writes() {
        let mut folios = Folios::default();
        assert!(folios.mark(5 * REGION));
        for _ in 1..RETRY {
            folios.was_slow(5 * REGION);
            assert!(!folios.mark(5 * REGION));
        }
        folios.was_slow(5 * REGION);
        assert!(folios.in_use && folios.mark(5 * REGION));
        // Far apart: chunks of their own.
        assert!(folios.mark(1 << 44) && folios.mark((1 << 44) + REGION));
    }
}
