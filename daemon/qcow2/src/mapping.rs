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
        })
    }
}

const FLAG_COMPRESSED: u64 = 1 << 62;
const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
const FLAG_ZERO: u64 = 1;

/// What the L2 tables of an image look like.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Layout {
    pub cluster_bits: u32,
    pub extended: bool,
}

impl Layout {
    pub fn cluster(self) -> u64 {
        1 << self.cluster_bits
    }

    /// Bits of a guest offset that choose an entry within a table.
    pub fn table_bits(self) -> u32 {
        self.cluster_bits - if self.extended { 4 } else { 3 }
    }

    /// The mapping of `at`, which has this entry, up to the end of its cluster or subcluster.
    #[inline]
    pub fn decode(self, entry: u64, bitmap: u64, at: u64) -> Result<Mapping> {
        let within = at & (self.cluster() - 1);
        let whole = |kind| {
            Ok(Mapping {
                kind,
                len: self.cluster() - within,
            })
        };
        let corrupt = |what, value| Err(Error::Corrupt { what, at, value });
        if entry & FLAG_COMPRESSED != 0 {
            if bitmap != 0 {
                return corrupt("the subcluster bitmap of a compressed cluster", bitmap);
            }
            let size_shift = 62 - (self.cluster_bits - 8);
            let offset = entry & ((1 << size_shift) - 1);
            let sectors = (entry >> size_shift) & ((1 << (self.cluster_bits - 8)) - 1);
            let len = (sectors + 1) * 512 - offset % 512;
            return whole(Kind::Compressed { offset, len });
        }
        let offset = entry & OFFSET_MASK;
        if offset & (self.cluster() - 1) != 0 {
            return corrupt("the L2 entry", entry);
        }
        if !self.extended {
            return whole(match (entry & FLAG_ZERO != 0, offset) {
                (true, _) => Kind::Zero,
                (false, 0) => Kind::Unallocated,
                (false, host) => Kind::Data(host + within),
            });
        }
        let sub = self.cluster() / 32;
        let index = within / sub;
        let (allocated, zero) = (bitmap >> index & 1 != 0, bitmap >> (index + 32) & 1 != 0);
        let kind = match (allocated, zero) {
            (true, true) => return corrupt("the subcluster bitmap", bitmap),
            (false, true) => Kind::Zero,
            (false, false) => Kind::Unallocated,
            (true, false) if offset == 0 => return corrupt("the subcluster bitmap", bitmap),
            (true, false) => Kind::Data(offset + within),
        };
        Ok(Mapping {
            kind,
            len: sub - within % sub,
        })
    }
}
