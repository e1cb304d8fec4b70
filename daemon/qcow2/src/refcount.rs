//! Reference counts of the clusters of the file (specification, "Host cluster management").
//!
//! Blocks are kept in memory up to a limit, and changed there; what has changed is written by
//! [`crate::commit`].

use std::collections::{HashMap, VecDeque};
use std::ops::Range;

use crate::error::{Error, Result};
use crate::mapping::OFFSET_MASK;

/// The largest refcount table, in bytes. (QEMU has the same limit.)
pub(crate) const MAX_TABLE: u64 = 8 << 20;

/// What must be there before an operation on reference counts can be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Need {
    /// The block of this number, at this offset, must be read.
    Block { index: u64, offset: u64 },
}

/// Why an operation could not be done at once.
#[derive(Debug)]
pub(crate) enum Stop {
    Need(Need),
    Error(Error),
}

impl From<Error> for Stop {
    fn from(e: Error) -> Stop {
        Stop::Error(e)
    }
}

pub(crate) type Attempt<T> = std::result::Result<T, Stop>;

/// Reads an entry of 2^`order` bits.
pub(crate) fn read_entry(data: &[u8], order: u32, index: usize) -> u64 {
    match order {
        0..3 => {
            let per_byte = 8 >> order;
            let shift = (index % per_byte) << order;
            u64::from(data[index / per_byte]) >> shift & ((1 << (1 << order)) - 1)
        }
        _ => {
            let n = 1 << (order - 3);
            data[index * n..(index + 1) * n]
                .iter()
                .fold(0, |v, b| v << 8 | u64::from(*b))
        }
    }
}

/// Writes an entry of 2^`order` bits and returns the bytes that may have changed.
pub(crate) fn write_entry(data: &mut [u8], order: u32, index: usize, value: u64) -> Range<usize> {
    if order < 3 {
        let per_byte = 8 >> order;
        let shift = (index % per_byte) << order;
        let mask = ((1u32 << (1 << order)) - 1) << shift;
        let byte = &mut data[index / per_byte];
        *byte = (u32::from(*byte) & !mask | (value as u32) << shift) as u8;
        return index / per_byte..index / per_byte + 1;
    }
    let n = 1 << (order - 3);
    data[index * n..(index + 1) * n].copy_from_slice(&value.to_be_bytes()[8 - n..]);
    index * n..(index + 1) * n
}

fn widen(range: &mut Option<Range<usize>>, more: Range<usize>) {
    *range = Some(match range.take() {
        Some(r) => r.start.min(more.start)..r.end.max(more.end),
        None => more,
    });
}

struct Block {
    data: Vec<u8>,
    /// Bytes that are not stored yet.
    dirty: Option<Range<usize>>,
    /// Nothing of it was ever stored.
    new: bool,
    /// Is being written: must stay.
    writing: bool,
    used: bool,
}

/// A block that is to be written.
pub(crate) struct DirtyBlock {
    pub index: u64,
    pub new: bool,
    /// Byte offset in the file of what follows.
    pub offset: u64,
    pub data: Vec<u8>,
    range: Range<usize>,
}

/// A change of the refcount table that is to be written.
pub(crate) struct DirtyTable {
    /// The table is at a new place: all of it is here, and the header must be told.
    pub moved: Option<Moved>,
    pub offset: u64,
    pub data: Vec<u8>,
    range: Range<usize>,
}

/// Where the refcount table was before it grew: first cluster and number of clusters.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Moved {
    pub first: u64,
    pub clusters: u64,
}

pub(crate) struct Refcounts {
    order: u32,
    cluster_bits: u32,
    table: Vec<u64>,
    table_offset: u64,
    table_dirty: Option<Range<usize>>,
    moved: Option<Moved>,
    blocks: HashMap<u64, Block>,
    queue: VecDeque<u64>,
    capacity: usize,
    dirty_blocks: usize,
}

impl Refcounts {
    /// `table` holds the bytes of the refcount table.
    pub fn new(order: u32, cluster_bits: u32, offset: u64, table: &[u8], capacity: usize) -> Self {
        let (words, _) = table.as_chunks::<8>();
        Refcounts {
            order,
            cluster_bits,
            table: words.iter().map(|w| u64::from_be_bytes(*w)).collect(),
            table_offset: offset,
            table_dirty: None,
            moved: None,
            blocks: HashMap::new(),
            queue: VecDeque::new(),
            capacity: capacity.max(2),
            dirty_blocks: 0,
        }
    }

    fn cluster(&self) -> usize {
        1 << self.cluster_bits
    }

    /// Clusters that one block counts the references of, as a power of two.
    fn block_bits(&self) -> u32 {
        self.cluster_bits + 3 - self.order
    }

    /// Clusters that one block counts the references of.
    pub fn per_block(&self) -> u64 {
        1 << self.block_bits()
    }

    /// The largest count.
    pub fn max(&self) -> u64 {
        u64::MAX >> (64 - (1u32 << self.order))
    }

    pub fn table_place(&self) -> (u64, u64) {
        let bytes = self.table.len() as u64 * 8;
        (self.table_offset, bytes.div_ceil(self.cluster() as u64))
    }

    /// Offset of the block that counts this cluster; 0 if there is none.
    fn block_offset(&self, index: u64) -> Result<u64> {
        let entry = usize::try_from(index)
            .ok()
            .and_then(|i| self.table.get(i))
            .copied()
            .unwrap_or(0);
        let offset = entry & OFFSET_MASK;
        if offset & (self.cluster() as u64 - 1) != 0 {
            return Err(Error::RefcountTable {
                index,
                value: entry,
            });
        }
        Ok(offset)
    }

    fn block(&mut self, index: u64) -> Attempt<Option<&mut Block>> {
        // Looked up twice for the borrow checker.
        if self.blocks.contains_key(&index) {
            return Ok(self.blocks.get_mut(&index));
        }
        match self.block_offset(index)? {
            0 => Ok(None),
            offset => Err(Stop::Need(Need::Block { index, offset })),
        }
    }

    pub fn get(&mut self, cluster: u64) -> Attempt<u64> {
        let order = self.order;
        let (index, within) = (
            cluster >> self.block_bits(),
            cluster & (self.per_block() - 1),
        );
        Ok(match self.block(index)? {
            None => 0,
            Some(b) => {
                b.used = true;
                read_entry(&b.data, order, within as usize)
            }
        })
    }

    /// The first cluster of `range`, which lies in one block, that has no references, and how many follow it
    /// (`want` at most).
    pub fn find_free(&mut self, range: Range<u64>, want: u64) -> Attempt<Option<(u64, u64)>> {
        let order = self.order;
        let base = range.start & !(self.per_block() - 1);
        let Some(block) = self.block(range.start >> self.block_bits())? else {
            return Ok(Some((range.start, want.min(range.end - range.start))));
        };
        block.used = true;
        let free = |c: &u64| read_entry(&block.data, order, (c - base) as usize) == 0;
        let Some(first) = range.clone().find(free) else {
            return Ok(None);
        };
        let n = (first..range.end)
            .take(want as usize)
            .take_while(free)
            .count();
        Ok(Some((first, n as u64)))
    }

    /// Whether there is a block for this cluster.
    pub fn has_block(&self, cluster: u64) -> Result<bool> {
        Ok(self.block_offset(cluster >> self.block_bits())? != 0)
    }

    /// Whether the table has room for the block of this cluster.
    pub fn has_room(&self, cluster: u64) -> bool {
        cluster >> self.block_bits() < self.table.len() as u64
    }

    /// Sets the count of a cluster, which must have a block.
    pub fn set(&mut self, cluster: u64, value: u64) -> Attempt<()> {
        if value > self.max() {
            return Err(Stop::Error(Error::RefcountOverflow {
                bits: 1 << self.order,
            }));
        }
        let order = self.order;
        let (index, within) = (
            cluster >> self.block_bits(),
            cluster & (self.per_block() - 1),
        );
        let Some(b) = self.block(index)? else {
            return Err(Stop::Error(Error::RefcountTable { index, value: 0 }));
        };
        let changed = write_entry(&mut b.data, order, within as usize, value);
        b.used = true;
        let was_clean = b.dirty.is_none();
        widen(&mut b.dirty, changed);
        self.dirty_blocks += usize::from(was_clean);
        Ok(())
    }

    /// Makes the block that counts `cluster`, at the place of `at`, without any references so far.
    pub fn add_block(&mut self, cluster: u64, at: u64) {
        let index = cluster >> self.block_bits();
        let entry = index as usize;
        self.table[entry] = at << self.cluster_bits;
        widen(&mut self.table_dirty, entry..entry + 1);
        let block = Block {
            data: vec![0; self.cluster()],
            dirty: Some(0..self.cluster()),
            new: true,
            writing: false,
            used: true,
        };
        self.dirty_blocks += 1;
        self.blocks.insert(index, block);
        self.queue.push_back(index);
    }

    /// Entries that the table must have for a block of `cluster`, with room to grow; None if that is too many.
    pub fn grown(&self, cluster: u64) -> Option<u64> {
        let needed = (cluster >> self.block_bits()) + 1;
        let per_cluster = self.cluster() as u64 / 8;
        let max = MAX_TABLE / 8;
        let roomy = (needed + needed / 2).next_multiple_of(per_cluster);
        (needed <= max).then_some(roomy.min(max.max(per_cluster)))
    }

    /// Gives the table room for `entries`. [`Refcounts::place_table`] must follow.
    pub fn widen_table(&mut self, entries: u64) {
        let (offset, clusters) = self.table_place();
        self.moved.get_or_insert(Moved {
            first: offset >> self.cluster_bits,
            clusters,
        });
        self.table.resize(entries as usize, 0);
    }

    /// The place of a table that grew.
    pub fn place_table(&mut self, first: u64) {
        self.table_offset = first << self.cluster_bits;
        self.table_dirty = Some(0..self.table.len());
    }

    /// Takes a block in that was read.
    pub fn insert(&mut self, index: u64, data: Vec<u8>) {
        if self.blocks.contains_key(&index) {
            return;
        }
        let block = Block {
            data,
            dirty: None,
            new: false,
            writing: false,
            used: true,
        };
        self.blocks.insert(index, block);
        self.queue.push_back(index);
    }

    /// Lets blocks go if there are too many. Not while something is tried that may need several of them.
    pub fn evict(&mut self) {
        // Those that cannot go are looked at once.
        let mut looks = 2 * self.queue.len();
        while self.blocks.len() > self.capacity && looks > 0 {
            looks -= 1;
            let Some(oldest) = self.queue.pop_front() else {
                break;
            };
            let Some(block) = self.blocks.get_mut(&oldest) else {
                continue;
            };
            let used = std::mem::replace(&mut block.used, false);
            if used || block.dirty.is_some() || block.writing {
                self.queue.push_back(oldest);
            } else {
                self.blocks.remove(&oldest);
            }
        }
    }

    pub fn is_dirty(&self) -> bool {
        self.dirty_blocks > 0 || self.table_dirty.is_some()
    }

    /// How many blocks have changed.
    pub fn dirty_blocks(&self) -> usize {
        self.dirty_blocks
    }

    /// How many blocks there may be in memory, unless more have changed.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Whether some of these clusters hold the table.
    pub fn is_table(&self, first: u64, clusters: u64) -> bool {
        let (offset, n) = self.table_place();
        let at = offset >> self.cluster_bits;
        at < first + clusters && first < at + n
    }

    // What has changed.

    pub fn take_table(&mut self) -> Option<DirtyTable> {
        let range = self.table_dirty.take()?;
        let words = self.table[range.clone()].iter();
        Some(DirtyTable {
            moved: self.moved.take(),
            offset: self.table_offset + range.start as u64 * 8,
            data: words.flat_map(|w| w.to_be_bytes()).collect(),
            range,
        })
    }

    /// Takes the ranges of all blocks that have changed, rounded to multiples of `align` bytes.
    pub fn take_blocks(&mut self, align: usize) -> Vec<DirtyBlock> {
        let mut out = Vec::new();
        let cluster = self.cluster();
        for (&index, block) in &mut self.blocks {
            let Some(range) = block.dirty.take() else {
                continue;
            };
            block.writing = true;
            let range = range.start / align * align..range.end.next_multiple_of(align).min(cluster);
            out.push(DirtyBlock {
                index,
                new: std::mem::take(&mut block.new),
                offset: (self.table[index as usize] & OFFSET_MASK) + range.start as u64,
                data: block.data[range.clone()].to_vec(),
                range,
            });
        }
        self.dirty_blocks = 0;
        out
    }

    pub fn table_written(&mut self, table: DirtyTable, ok: bool) {
        if !ok {
            widen(&mut self.table_dirty, table.range);
            if table.moved.is_some() {
                self.moved = table.moved;
                self.table_dirty = Some(0..self.table.len());
            }
        }
    }

    pub fn block_written(&mut self, written: DirtyBlock, ok: bool) {
        let Some(block) = self.blocks.get_mut(&written.index) else {
            return;
        };
        block.writing = false;
        if !ok {
            self.dirty_blocks += usize::from(block.dirty.is_none());
            widen(&mut block.dirty, written.range);
            block.new |= written.new;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn entries_of_all_widths_are_independent(
            order in 0u32..=6,
            sets in prop::collection::vec((0usize..64, any::<u64>()), 1..100),
        ) {
            let mut data = vec![0; 64 * 8];
            let mut model = [0; 64];
            let max = u64::MAX >> (64 - (1u32 << order));
            for (at, value) in sets {
                let range = write_entry(&mut data, order, at, value & max);
                prop_assert!(!range.is_empty() && range.end <= data.len());
                model[at] = value & max;
                for (i, want) in model.iter().enumerate() {
                    prop_assert_eq!(read_entry(&data, order, i), *want);
                }
            }
        }
    }
}
