//! Copies on write that are put off: clusters of which only those parts have data that were written.
//!
//! A small write to a cluster that the image does not have yet needs the rest of it from the backing file. Here the write
//! goes to its new place at once, and the rest follows when it must: the next writes may bring it, too. Until then
//!
//! * the entry in memory says which parts have data ([`Layout::is_partial`](crate::mapping::Layout::is_partial)), and the rest reads
//!   as it did before;
//! * the file says that the cluster is not allocated, and counts its place: after a power cut that is a leak, and what was
//!   written is gone as everything is that was not flushed;
//! * the log of changes ([`crate::redo`]) has which parts have data, so that nothing is lost if the daemon is killed.
//!
//! Invariants:
//! * Whatever makes writes durable, or changes what is behind the image, makes clusters whole first.
//! * Parts of a partial cluster get data only under the lock of that cluster; those that have data are written in place.
//! * [`Writing::partial`](crate::meta::Writing) has every partial cluster; tables with one stay in memory, and are at most half of
//!   those that there is room for.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use futures_util::future::{join_all, try_join_all};
use vdisk_io::IoVecs;

use crate::image::Image;
use crate::mapping::Entry;
use crate::meta::Reason;
use crate::redo::Redo;
use crate::storage::{Step, before, buffer, read_or_zero};

/// Bytes between two pieces that are read along with them: cheaper than a second read.
const READ_ALONG: u64 = 16 << 10;

/// Clusters that are made whole at a time.
const AT_A_TIME: usize = 16;

/// How many clusters may be partial, whatever the options say: those that writers add at the same time have room in the log, too.
const MOST: usize = Redo::RESERVE / 2;

/// As many tables may have partial clusters, whatever the size of the cache.
const FEWEST_TABLES: usize = 8;

/// How fast an image's partial clusters were made whole lately, in bytes per second. A flush has to wait for all of them: they
/// may not be more than it can copy in a second.
#[derive(Debug)]
pub(crate) struct CopySpeed(AtomicU64);

impl Default for CopySpeed {
    fn default() -> CopySpeed {
        CopySpeed(AtomicU64::new(512 << 20))
    }
}

impl CopySpeed {
    fn note(&self, bytes: u64, took: Duration) {
        let nanos = took.as_nanos().max(1);
        let now = u128::from(bytes) * 1_000_000_000 / nanos;
        let now = u64::try_from(now).unwrap_or(u64::MAX);
        let old = self.0.load(Relaxed);
        // One of several threads that tell it at the same time is enough.
        // It is slow as well because guests' requests have the same CPU: a fast one says more.
        let weight = if now > old { 2 } else { 16 };
        self.0.store(old - old / weight + now / weight, Relaxed);
    }

    fn in_a_second(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

/// The partial clusters of an image.
#[derive(Debug)]
pub(crate) struct Partial {
    /// Numbers of clusters of the guest's disk.
    clusters: BTreeSet<u64>,
    /// How many of them each table has, by L1 index.
    tables: BTreeMap<usize, usize>,
    table_bits: u32,
    /// From where on they are made whole while nobody waits for it. None if that is not under way.
    turn: Option<u64>,
}

impl Partial {
    /// None. See [`Layout::table_bits`](crate::mapping::Layout::table_bits).
    pub fn new(table_bits: u32) -> Partial {
        Partial {
            clusters: BTreeSet::new(),
            tables: BTreeMap::new(),
            table_bits,
            turn: None,
        }
    }

    /// Begins to make whole all that there are, one after the other.
    fn begin_turn(&mut self) {
        self.turn.get_or_insert(0);
    }

    /// The next `n` whose turn it is. None are left at the end, whatever has become of them.
    fn take_turn(&mut self, n: usize) -> Vec<u64> {
        let Some(from) = self.turn else {
            return Vec::new();
        };
        let some: Vec<u64> = self.clusters.range(from..).take(n).copied().collect();
        self.turn = some.last().map(|last| last + 1);
        some
    }

    fn table(&self, cluster: u64) -> usize {
        (cluster >> self.table_bits) as usize
    }

    pub fn insert(&mut self, cluster: u64) {
        if self.clusters.insert(cluster) {
            *self.tables.entry(self.table(cluster)).or_default() += 1;
        }
    }

    pub fn remove(&mut self, cluster: u64) {
        if !self.clusters.remove(&cluster) {
            return;
        }
        let table = self.table(cluster);
        if let Some(n) = self.tables.get_mut(&table) {
            *n -= 1;
            if *n == 0 {
                self.tables.remove(&table);
            }
        }
    }

    pub fn is_empty(&self) -> bool {
        self.clusters.is_empty()
    }

    pub fn is_in_table(&self, index: usize) -> bool {
        self.tables.contains_key(&index)
    }

    pub fn iter(&self) -> impl Iterator<Item = u64> {
        self.clusters.iter().copied()
    }
}

impl Image {
    /// How many clusters may be partial at a time.
    fn most_partial(&self) -> usize {
        // So many that the speed is noticed when it grows again.
        let fewest = (2 * AT_A_TIME as u64) << self.layout.cluster_bits;
        let bytes = self.copy_speed.in_a_second().max(fewest);
        let most = (bytes.min(self.options.partial) >> self.layout.cluster_bits).max(1);
        usize::try_from(most).unwrap_or(usize::MAX).min(MOST)
    }

    /// Whether a cluster with this entry may have data in parts of it only.
    pub(crate) fn may_be_partial(&self, entry: Entry) -> bool {
        if self.layout.is_partial(entry) {
            return true;
        }
        self.layout.part() < self.cluster() && entry == Entry::default() && !self.has_partial(1, 1)
    }

    /// Whether there are, with `others`, more partial clusters than one `of`th of what there may be, or more tables with some.
    fn has_partial(&self, others: usize, of: usize) -> bool {
        let meta = self.meta();
        let tables = (meta.capacity / 2).max(FEWEST_TABLES);
        let more = |n: usize, most: usize| n + others > most / of;
        meta.writing.as_ref().is_some_and(|w| {
            more(w.partial.clusters.len(), self.most_partial())
                || more(w.partial.tables.len(), tables)
        })
    }

    /// So many clusters are partial that they should be made whole soon.
    pub(crate) fn has_many_partial(&self) -> bool {
        self.has_partial(0, 2)
    }

    /// Makes all clusters whole that are partial now. One that fails keeps no other from it.
    pub(crate) async fn make_whole(&self) -> io::Result<()> {
        let all: Vec<u64> = match &self.meta().writing {
            Some(w) => w.partial.iter().collect(),
            None => return Ok(()),
        };
        let mut result = Ok(());
        for some in all.chunks(AT_A_TIME) {
            result = result.and(self.make_these_whole(some).await);
            vdisk_io::give_way().await;
        }
        result
    }

    /// Makes a few clusters whole if there are many, or there were when it last was called. Whether others should follow.
    pub(crate) async fn make_some_whole(&self) -> io::Result<bool> {
        let many = self.has_many_partial();
        let some = match &mut self.meta().writing {
            Some(w) => {
                if many {
                    w.partial.begin_turn();
                }
                w.partial.take_turn(AT_A_TIME)
            }
            None => return Ok(false),
        };
        self.make_these_whole(&some).await?;
        Ok(!some.is_empty())
    }

    async fn make_these_whole(&self, some: &[u64]) -> io::Result<()> {
        let begun = Instant::now();
        let done = join_all(some.iter().map(|c| self.make_one_whole(*c))).await;
        done.into_iter().fold(Ok(()), io::Result::and)?;
        if some.len() == AT_A_TIME {
            let bytes = (some.len() as u64) << self.layout.cluster_bits;
            self.copy_speed.note(bytes, begun.elapsed());
        }
        Ok(())
    }

    /// Reads what the cluster at `at` lacks, from the beginning of the first to the end of the last. It is in the backing file
    /// alone.
    async fn read_lacks(&self, at: u64, lacks: &[Range<u64>]) -> io::Result<IoVecs> {
        let start = lacks.first().map_or(0, |lack| lack.start);
        let end = lacks.last().map_or(0, |lack| lack.end);
        let data = buffer((end - start) as usize);
        let Some(backing) = self.backing() else {
            return Ok(data);
        };
        let (data, backing) = (&data, &*backing);
        let read = async |range: Range<u64>| {
            let len = range.end - range.start;
            let have = self.size().saturating_sub(at + range.start).min(len);
            if have == 0 {
                return Ok(());
            }
            before(&*self.file, Step::CowRead, 0, 0).await?;
            let part = data.slice((range.start - start) as usize, have as usize);
            read_or_zero(backing, at + range.start, part).await
        };
        let lacking: u64 = lacks.iter().map(|lack| lack.end - lack.start).sum();
        // What lies between is not needed, and need not be readable.
        if lacks.len() > 1 && end - start - lacking <= READ_ALONG && read(start..end).await.is_ok()
        {
            return Ok(data.clone());
        }
        try_join_all(lacks.iter().cloned().map(read)).await?;
        Ok(data.clone())
    }

    async fn make_one_whole(&self, cluster: u64) -> io::Result<()> {
        let layout = self.layout;
        let at = cluster << layout.cluster_bits;
        let _held = self.clusters.lock(cluster..cluster + 1).await;
        let entry = self.entries(at, 1).await?[0];
        if !layout.is_partial(entry) {
            // It was written, or given up, meanwhile.
            if let Some(w) = &mut self.meta().writing {
                w.partial.remove(cluster);
            }
            return Ok(());
        }
        let lacks = layout.lacks(entry);
        let start = lacks.first().map_or(0, |lack| lack.start);
        let data = &self.read_lacks(at, &lacks).await?;
        // All of them to their end: none may write here when the cluster is not held any more.
        let copies = lacks.into_iter().map(|lack| async move {
            let (len, place) = (lack.end - lack.start, entry.host() + lack.start);
            before(&*self.file, Step::CowWrite, place, len).await?;
            let part = data.slice((lack.start - start) as usize, len as usize);
            self.data.write(place, part).await
        });
        let done = join_all(copies).await;
        done.into_iter().fold(Ok(()), io::Result::and)?;
        self.change_entries(at, 1, Reason::Other, |_, old| {
            layout.with_data(old, old.host(), 0, layout.cluster())
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Storage that takes longer may have fewer copies put off, and gets more when it is faster again.
    #[test]
    fn as_much_is_put_off_as_can_be_copied_in_a_second() {
        let speed = CopySpeed::default();
        let near = |bytes: u64| speed.in_a_second().abs_diff(bytes) < bytes / 10;
        for _ in 0..128 {
            speed.note(1 << 20, Duration::from_millis(50));
        }
        assert!(near(20 << 20), "{speed:?}");
        for _ in 0..8 {
            speed.note(1 << 20, Duration::from_micros(500));
        }
        assert!(near(2000 << 20), "{speed:?}");
        speed.note(1 << 20, Duration::ZERO);
        speed.note(0, Duration::from_secs(1));
    }
}
