//! What an L2 entry says (specification, "Cluster mapping").

use crate::error::{Error, Result};

/// What a range of the guest's disk is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Data at this byte offset of the file.
    Data(u64),
    /// Reads as zeroes.
    Zero,
    /// Reads as the backing file, or as zeroes where there is none.
    Unallocated,
    /// A part of a compressed cluster: `len` bytes at `offset` in the file, the last of which may belong
    /// to something else, or lie beyond the end of the file.
    Compressed { offset: u64, len: u64 },
}

/// A range that is all of one kind, and contiguous in the file if it is data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapping {
    pub kind: Kind,
    /// Bytes of the guest's disk.
    pub len: u64,
    /// It is data that belongs to nobody else (the COPIED flag): it may be written where it is.
    pub writable: bool,
}

impl Mapping {
    /// The two together, if `next` goes on where this ends.
    pub(crate) fn join(self, next: Mapping) -> Option<Mapping> {
        let goes_on = match (self.kind, next.kind) {
            (Kind::Data(a), Kind::Data(b)) => a.checked_add(self.len) == Some(b),
            (Kind::Zero, Kind::Zero) | (Kind::Unallocated, Kind::Unallocated) => true,
            _ => false,
        };
        goes_on.then_some(Mapping {
            kind: self.kind,
            len: self.len + next.len,
            writable: self.writable && next.writable,
        })
    }
}

/// The table or cluster has a reference count of exactly one.
pub(crate) const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
pub(crate) const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
const ZERO: u64 = 1;

/// Only some parts of the cluster have data, those that the bitmap says (see [`crate::partial`]). In memory only: the format
/// reserves the bit. With [`COMPRESSED`] it is a part of something else, and images with subclusters have no need of it.
const PARTIAL: u64 = 1 << 61;

/// All subclusters have data.
const ALL_DATA: u64 = 0xffff_ffff;
/// All subclusters read as zeroes.
const ALL_ZERO: u64 = ALL_DATA << 32;

/// An L2 entry.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Entry {
    pub word: u64,
    /// For each of 32 subclusters: data (low half), zeroes (high half). In images without subclusters: for each part whether it has
    /// data if the cluster is partial, otherwise 0.
    pub bitmap: u64,
}

impl Entry {
    pub fn is_compressed(self) -> bool {
        self.word & COMPRESSED != 0
    }

    /// Where the data of the cluster is, or may be put; 0 if nowhere. Not for compressed clusters.
    pub fn host(self) -> u64 {
        self.word & OFFSET_MASK
    }

    pub fn is_copied(self) -> bool {
        self.word & COPIED != 0
    }

    pub fn with_copied(self, copied: bool) -> Entry {
        let word = self.word & !COPIED | if copied { COPIED } else { 0 };
        Entry { word, ..self }
    }
}

/// What the L2 tables of an image look like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Layout {
    pub cluster_bits: u32,
    pub extended: bool,
    /// Guest data is in another file, each cluster at the offset that it has on the disk (specification, "Header",
    /// external data file).
    pub external: bool,
}

impl Layout {
    #[inline]
    pub fn cluster(self) -> u64 {
        1 << self.cluster_bits
    }

    /// What can be data, zero or unallocated by itself: a cluster or a subcluster, in bytes.
    pub fn unit(self) -> u64 {
        self.cluster() / if self.extended { 32 } else { 1 }
    }

    /// Bytes of what may have data by itself in a cluster that is not whole yet; those of a cluster if there is no such thing.
    pub fn part(self) -> u64 {
        const SMALLEST: u64 = 4096;
        match self.extended || self.external {
            true => self.cluster(),
            false => (self.cluster() / 32).max(SMALLEST).min(self.cluster()),
        }
    }

    #[inline]
    pub fn is_partial(self, entry: Entry) -> bool {
        !self.extended && entry.word & (COMPRESSED | PARTIAL) == PARTIAL
    }

    /// The first word of an entry as it is in the file, without what it can mean in memory only.
    pub fn word_of_file(self, word: u64) -> u64 {
        match self.extended || word & COMPRESSED != 0 {
            true => word,
            false => word & !PARTIAL,
        }
    }

    /// What the file says of a cluster as long as it is partial: nothing.
    pub fn word_for_file(self, word: u64) -> u64 {
        match self.is_partial(Entry { word, bitmap: 0 }) {
            true => 0,
            false => word,
        }
    }

    /// The parts of a partial cluster that lack data, as ranges of bytes within it.
    pub fn lacks(self, entry: Entry) -> Vec<std::ops::Range<u64>> {
        let part = self.part();
        let mut out: Vec<std::ops::Range<u64>> = Vec::new();
        for at in (0..self.cluster()).step_by(part as usize) {
            if entry.bitmap >> (at / part) & 1 != 0 {
                continue;
            }
            match out.last_mut() {
                Some(last) if last.end == at => last.end += part,
                _ => out.push(at..at + part),
            }
        }
        out
    }

    /// Bits of a guest offset that choose an entry within a table.
    #[inline]
    pub fn table_bits(self) -> u32 {
        self.cluster_bits - if self.extended { 4 } else { 3 }
    }

    /// Bytes of the guest's disk that one table is for.
    pub fn span(self) -> u64 {
        1 << (self.cluster_bits + self.table_bits())
    }

    /// The number of the L2 table, and of the entry in it.
    #[inline]
    pub fn position(self, at: u64) -> (usize, usize) {
        let index = (at >> (self.cluster_bits + self.table_bits())) as usize;
        let entry = (at >> self.cluster_bits) as usize & ((1 << self.table_bits()) - 1);
        (index, entry)
    }

    /// Words of `n` entries from `first` on.
    pub fn words(self, first: usize, n: usize) -> std::ops::Range<usize> {
        let each = if self.extended { 2 } else { 1 };
        first * each..(first + n) * each
    }

    /// The cluster has a place for its data that nobody else has: data may be written there.
    pub fn is_own(self, entry: Entry) -> bool {
        entry.is_copied() && !entry.is_compressed() && (entry.host() != 0 || self.external)
    }

    /// The entry of a cluster that has data in the subclusters of which `from..to` (bytes within the cluster) is a
    /// part, and is for the rest what `old` was.
    pub fn with_data(self, old: Entry, host: u64, from: u64, to: u64) -> Entry {
        let word = host | COPIED;
        let bits = |unit: u64| {
            let (first, last) = (from / unit, to.div_ceil(unit));
            ((1u64 << last) - 1) & !((1u64 << first) - 1)
        };
        if self.extended {
            let data = bits(self.unit());
            let bitmap = (old.bitmap | data) & !(data << 32);
            return Entry { word, bitmap };
        }
        let part = self.part();
        let bitmap = old.bitmap | bits(part);
        if bitmap == (1 << (self.cluster() / part)) - 1 {
            return Entry { word, bitmap: 0 };
        }
        Entry {
            word: word | PARTIAL,
            bitmap,
        }
    }

    /// The entry of a cluster that reads as zeroes, with (`host` not 0) or without a place of its own in the file.
    pub fn zero(self, host: u64) -> Entry {
        // In an external data file each cluster has its place anyway.
        let host = if self.external { 0 } else { host };
        let copied = if host == 0 { 0 } else { COPIED };
        if self.extended {
            Entry {
                word: host | copied,
                bitmap: ALL_ZERO,
            }
        } else {
            Entry {
                word: host | copied | ZERO,
                bitmap: 0,
            }
        }
    }

    /// The entry of a compressed cluster of `len` bytes at `offset`. None if that cannot be expressed.
    pub fn compressed(self, offset: u64, len: u64) -> Option<Entry> {
        let size_shift = 62 - (self.cluster_bits - 8);
        let sectors = (offset + len).div_ceil(512) - offset / 512 - 1;
        let fits = offset >> size_shift == 0 && sectors >> (self.cluster_bits - 8) == 0;
        fits.then_some(Entry {
            word: COMPRESSED | sectors << size_shift | offset,
            bitmap: 0,
        })
    }

    /// Where the bytes of a compressed cluster are: offset, and length up to the end of the last sector.
    pub fn compressed_place(self, word: u64) -> (u64, u64) {
        let size_shift = 62 - (self.cluster_bits - 8);
        let offset = word & ((1 << size_shift) - 1);
        let sectors = (word >> size_shift) & ((1 << (self.cluster_bits - 8)) - 1);
        (offset, (sectors + 1) * 512 - offset % 512)
    }

    /// Clusters of the file that an entry refers to: the first, and how many. Those of an external data file are not
    /// counted.
    pub fn references(self, entry: Entry) -> Option<(u64, u64)> {
        if self.external {
            return None;
        }
        if entry.is_compressed() {
            let (offset, len) = self.compressed_place(entry.word);
            let first = offset >> self.cluster_bits;
            return Some((first, ((offset + len - 1) >> self.cluster_bits) - first + 1));
        }
        let host = entry.host();
        (host != 0).then_some((host >> self.cluster_bits, 1))
    }

    /// The mapping of `at`, which has this entry, up to the end of its cluster or subcluster.
    #[inline]
    pub fn decode(self, entry: Entry, at: u64) -> Result<Mapping> {
        let Entry { word, bitmap } = entry;
        let within = at & (self.cluster() - 1);
        let whole = |kind| {
            Ok(Mapping {
                kind,
                len: self.cluster() - within,
                writable: word & COPIED != 0,
            })
        };
        let corrupt = |what, value| Err(Error::Corrupt { what, at, value });
        if entry.is_compressed() && self.external {
            return corrupt("the compressed cluster of an external data file", word);
        }
        if entry.is_compressed() {
            if bitmap != 0 {
                return corrupt("the subcluster bitmap of a compressed cluster", bitmap);
            }
            let (offset, len) = self.compressed_place(word);
            return Ok(Mapping {
                kind: Kind::Compressed { offset, len },
                len: self.cluster() - within,
                writable: false,
            });
        }
        let offset = entry.host();
        if offset & (self.cluster() - 1) != 0 {
            return corrupt("the L2 entry", word);
        }
        let has_place = offset != 0 || self.is_own(entry);
        if self.external && has_place && word & ZERO == 0 && offset != at - within {
            return corrupt("the place in the external data file", word);
        }
        let partial = self.is_partial(entry);
        if !self.extended && !partial {
            return whole(match (word & ZERO != 0, has_place) {
                (true, _) => Kind::Zero,
                (false, false) => Kind::Unallocated,
                (false, true) => Kind::Data(offset + within),
            });
        }
        let sub = if partial { self.part() } else { self.unit() };
        let index = within / sub;
        let (allocated, zero) = (bitmap >> index & 1 != 0, bitmap >> (index + 32) & 1 != 0);
        let kind = match (allocated, zero) {
            (true, true) => return corrupt("the subcluster bitmap", bitmap),
            (false, true) => Kind::Zero,
            (false, false) => Kind::Unallocated,
            (true, false) if !has_place => return corrupt("the subcluster bitmap", bitmap),
            (true, false) => Kind::Data(offset + within),
        };
        Ok(Mapping {
            kind,
            len: sub - within % sub,
            writable: word & COPIED != 0,
        })
    }

    /// Whether the cluster has data in the file, compressed or not, that a copy of it must take along.
    pub fn has_data(self, entry: Entry) -> bool {
        if entry.is_compressed() {
            return true;
        }
        if self.extended {
            entry.bitmap & ALL_DATA != 0
        } else {
            (entry.host() != 0 || self.is_own(entry)) && entry.word & ZERO == 0
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn compressed_descriptors_cover_their_bytes(bits in 9u32..=21, offset in 0u64..1 << 40, len in 1u64..1 << 21) {
            let layout = Layout { cluster_bits: bits, extended: false, external: false };
            let len = len.min(layout.cluster());
            if let Some(entry) = layout.compressed(offset, len) {
                let (at, n) = layout.compressed_place(entry.word);
                prop_assert_eq!(at, offset);
                prop_assert!(n >= len && n < len + 512);
                prop_assert_eq!((at + n) % 512, 0);
            }
        }
    }

    #[test]
    fn a_cluster_is_whole_when_its_last_part_has_data() {
        let layout = Layout {
            cluster_bits: 16,
            extended: false,
            external: false,
        };
        let one = layout.with_data(Entry::default(), 0x10000, 4096, 8192);
        assert!(layout.is_partial(one) && layout.is_own(one));
        assert_eq!(layout.lacks(one), [0..4096, 8192..65536]);
        assert_eq!(layout.word_for_file(one.word), 0);
        let kind = |at| layout.decode(one, at).map(|m| (m.kind, m.len));
        assert_eq!(kind(0).unwrap(), (Kind::Unallocated, 4096));
        assert_eq!(kind(5000).unwrap(), (Kind::Data(0x10000 + 5000), 3192));
        let most = layout.with_data(one, 0x10000, 8192, 65536);
        assert!(matches!(layout.lacks(most).as_slice(), [one] if *one == (0..4096)));
        let whole = layout.with_data(most, 0x10000, 0, 4096);
        let at_once = layout.with_data(Entry::default(), 0x10000, 0, 65536);
        assert!(whole == at_once && !layout.is_partial(whole));
    }

    #[test]
    fn data_in_a_subcluster_leaves_the_others() {
        let layout = Layout {
            cluster_bits: 16,
            extended: true,
            external: false,
        };
        let old = layout.zero(0);
        let new = layout.with_data(old, 0x10000, 2048, 4097);
        assert_eq!(new.bitmap, 0xffff_fff9_0000_0006);
        assert!(layout.is_own(new) && layout.has_data(new) && !layout.has_data(old));
        let whole = layout.with_data(Entry::default(), 0x10000, 0, 65536);
        assert_eq!(whole.bitmap, ALL_DATA);
    }
}
