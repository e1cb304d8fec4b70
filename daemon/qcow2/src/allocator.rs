//! Which clusters of the file are free.

use std::collections::{BTreeMap, BTreeSet};

use crate::error::Error;
use crate::refcount::{Attempt, Refcounts, Stop};

/// Clusters that were just taken, with a reference count of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    pub first: u64,
    pub clusters: u64,
    /// They lie beyond what the file had when it was opened, and read as zeroes until they are written.
    pub zero: bool,
}

/// More free runs than this are not remembered, but searched for again.
const MAX_RUNS: usize = 4096;

/// How many clusters beyond the end of the file may be in use already.
const MAX_SKIPPED: u64 = 65536;

/// How many runs are looked at for one that is long enough.
const MAX_LOOKS: usize = 16;

/// Offsets in L2 tables have 56 bits.
const MAX_OFFSET: u64 = 1 << 56;

pub(crate) struct Allocator {
    cluster_bits: u32,
    /// Free runs below `end`: first cluster and length.
    free: BTreeMap<u64, u64>,
    /// Clusters below are in use, or in `free`.
    scanned: u64,
    /// Clusters from here on are free.
    end: u64,
    /// Clusters from here on have never been written to.
    fresh: u64,
    /// There is no place for clusters from here on.
    limit: u64,
    /// Clusters at the end that were in use although there was nothing.
    skipped: u64,
}

impl Allocator {
    /// Gives out what lies behind cluster `end`, the end of what is in use. `limit` is the number of clusters that there are, if the file
    /// cannot grow. If it can, what lies behind the end reads as zeroes.
    pub fn new(cluster_bits: u32, end: u64, limit: Option<u64>) -> Allocator {
        Allocator {
            cluster_bits,
            free: BTreeMap::new(),
            scanned: end,
            end,
            fresh: if limit.is_none() { end } else { u64::MAX },
            limit: limit.unwrap_or(u64::MAX),
            skipped: 0,
        }
    }

    /// One after the last cluster that may be in use.
    pub fn end(&self) -> u64 {
        self.end
    }

    /// Takes `want` clusters (at least one) in one piece, or fewer.
    pub fn take(&mut self, refs: &mut Refcounts, want: u64) -> Attempt<Run> {
        loop {
            if let Some(run) = self.take_known(refs, want)? {
                return Ok(run);
            }
            if self.scanned < self.end {
                self.scan(refs, want)?;
            } else if let Some(run) = self.take_end(refs, want)? {
                return Ok(run);
            }
        }
    }

    /// Takes exactly `want` clusters in one piece, at the end of the file.
    pub fn take_exactly(&mut self, refs: &mut Refcounts, want: u64) -> Attempt<Run> {
        let first = self.prepare_end(refs, want)?;
        for c in first..first + want {
            refs.set(c, 1)?;
        }
        self.end = first + want;
        Ok(self.at_end(first, want))
    }

    fn at_end(&self, first: u64, clusters: u64) -> Run {
        Run {
            first,
            clusters,
            zero: first >= self.fresh,
        }
    }

    fn take_known(&mut self, refs: &mut Refcounts, want: u64) -> Attempt<Option<Run>> {
        let long_enough = self.free.iter().take(MAX_LOOKS).find(|(_, n)| **n >= want);
        let longest = || {
            let some = self.free.iter().take(MAX_LOOKS);
            some.max_by_key(|(_, n)| **n)
        };
        let Some((&first, &len)) = long_enough.or_else(longest) else {
            return Ok(None);
        };
        let n = len.min(want);
        // Somebody may have taken a part of it since it was found.
        for c in first..first + n {
            if refs.get(c)? != 0 {
                self.free.remove(&first);
                self.insert(first, c - first);
                self.insert(c + 1, first + len - c - 1);
                return self.take_known(refs, want);
            }
        }
        for c in first..first + n {
            refs.set(c, 1)?;
        }
        self.free.remove(&first);
        self.insert(first + n, len - n);
        Ok(Some(Run {
            first,
            clusters: n,
            zero: false,
        }))
    }

    /// Looks for free clusters, in one block of the reference counts.
    fn scan(&mut self, refs: &mut Refcounts, want: u64) -> Attempt<()> {
        let block_end = (self.scanned / refs.per_block() + 1) * refs.per_block();
        let until = block_end.min(self.end);
        if !refs.has_room(self.scanned) || !refs.has_block(self.scanned)? {
            // Nothing here is in use. The block that will be needed takes the first place.
            let at = self.scanned;
            if at == 0 {
                // That is the header's place: the refcount table is not what it was.
                return Err(Stop::Error(Error::Overlap));
            }
            self.need_room(refs, at)?;
            refs.add_block(at, at);
            refs.set(at, 1)?;
            self.scanned = until;
            self.add(at + 1, until - at - 1);
            return Ok(());
        }
        match refs.find_free(self.scanned..until, want)? {
            Some((first, n)) => {
                self.add(first, n);
                self.scanned = first + n;
            }
            None => self.scanned = until,
        }
        Ok(())
    }

    fn take_end(&mut self, refs: &mut Refcounts, want: u64) -> Attempt<Option<Run>> {
        let first = self.prepare_end(refs, 1)?;
        let block_end = (first / refs.per_block() + 1) * refs.per_block();
        let (mut n, want) = (0, want.min(block_end - first));
        while n < want && refs.get(first + n)? == 0 {
            n += 1;
        }
        for c in first..first + n {
            refs.set(c, 1)?;
        }
        // Clusters beyond the end of the file that have references are leaks of a power cut, or damage: they are
        // left alone.
        self.skipped += u64::from(n == 0);
        if self.skipped > MAX_SKIPPED {
            return Err(Stop::Error(Error::BeyondEnd));
        }
        self.end = first + n.max(1);
        self.scanned = self.end;
        Ok((n > 0).then(|| self.at_end(first, n)))
    }

    /// Whether there is a place for all clusters before this one.
    fn fits(&self, end: u64) -> Attempt<()> {
        if end >= MAX_OFFSET >> self.cluster_bits {
            return Err(Stop::Error(Error::TooLarge));
        }
        if end > self.limit {
            return Err(Stop::Error(Error::Full));
        }
        Ok(())
    }

    /// Makes sure that there are blocks for `want` clusters at the end, and returns the first of them.
    fn prepare_end(&mut self, refs: &mut Refcounts, want: u64) -> Attempt<u64> {
        loop {
            self.fits(self.end + want)?;
            let (mut at, last) = (self.end, self.end + want);
            while at < last && refs.has_room(at) && refs.has_block(at)? {
                refs.get(at)?;
                at = (at / refs.per_block() + 1) * refs.per_block();
            }
            if at >= last {
                return Ok(self.end);
            }
            self.need_room(refs, at)?;
            if refs.has_block(at)? {
                continue;
            }
            // It counts itself, or is counted by one before it, which is in memory.
            self.fits(last + 1)?;
            let place = self.end;
            refs.add_block(at, place);
            refs.set(place, 1)?;
            if self.scanned == self.end {
                self.scanned += 1;
            }
            self.end = place + 1;
        }
    }

    /// Makes sure that the refcount table has an entry for the block of `cluster`.
    fn need_room(&mut self, refs: &mut Refcounts, cluster: u64) -> Attempt<()> {
        if refs.has_room(cluster) {
            return Ok(());
        }
        // The table must have room for the blocks that count itself, too.
        let (mut target, mut entries, mut clusters, mut last) = (cluster.max(self.end), 0, 0, 0);
        while last == 0 || target < last {
            target = target.max(last);
            entries = refs.grown(target).ok_or(Error::TooLarge)?;
            clusters = (entries * 8).div_ceil(1 << self.cluster_bits);
            last = self.end + clusters + clusters / refs.per_block() + 2;
        }
        // Everything that could stop us half-way comes first: blocks that are there already and will count the
        // new table, and the end of what offsets can express.
        self.fits(last)?;
        refs_loaded(refs, self.end..last)?;
        refs.widen_table(entries);
        let run = self.take_exactly(refs, clusters)?;
        refs.place_table(run.first);
        Ok(())
    }

    /// Finds all free clusters anew.
    pub fn look_again(&mut self) {
        self.free.clear();
        self.scanned = 0;
    }

    /// Makes sure that there is a block that counts `cluster`, at the end of the file if it is new.
    pub fn ensure_block(&mut self, refs: &mut Refcounts, cluster: u64) -> Attempt<()> {
        self.need_room(refs, cluster)?;
        if refs.has_block(cluster)? {
            return Ok(());
        }
        let place = self.prepare_end(refs, 1)?;
        // It may have been made for itself.
        if !refs.has_block(cluster)? {
            refs.add_block(cluster, place);
            refs.set(place, 1)?;
            self.end = place + 1;
            self.scanned = self.end;
        }
        Ok(())
    }

    /// As [`Allocator::ensure_block`], when other clusters are in use that nothing counts yet: where the end is fixed a new block
    /// lies among those that it counts, of which these are all that are in use.
    pub fn ensure_block_beside(
        &mut self,
        refs: &mut Refcounts,
        cluster: u64,
        in_use: &BTreeSet<u64>,
    ) -> Attempt<()> {
        if self.limit == u64::MAX || !refs.has_room(cluster) || refs.has_block(cluster)? {
            return self.ensure_block(refs, cluster);
        }
        let first = cluster / refs.per_block() * refs.per_block();
        let until = (first + refs.per_block()).min(self.limit);
        let place = (first..until).find(|c| *c > 0 && !in_use.contains(c));
        let place = place.ok_or(Stop::Error(Error::Full))?;
        refs.add_block(cluster, place);
        refs.set(place, 1)
    }

    fn insert(&mut self, first: u64, len: u64) {
        if len > 0 {
            self.free.insert(first, len);
        }
    }

    /// These clusters have no references any more.
    pub fn add(&mut self, first: u64, len: u64) {
        if len == 0 {
            return;
        }
        if self.free.len() >= MAX_RUNS {
            self.scanned = self.scanned.min(first);
            return;
        }
        let (mut start, mut end) = (first, first + len);
        if let Some((&at, &n)) = self.free.range(..=start).next_back()
            && at + n >= start
        {
            start = at;
            end = end.max(at + n);
        }
        while let Some((&at, &n)) = self.free.range(start..=end).next() {
            end = end.max(at + n);
            self.free.remove(&at);
        }
        self.free.insert(start, end - start);
    }

    /// Forgets free clusters at the end: the file may be cut off there.
    pub fn trim(&mut self) {
        while let Some((&at, &n)) = self.free.range(..).next_back()
            && at + n == self.end
        {
            self.free.remove(&at);
            self.end = at;
            self.scanned = self.scanned.min(at);
        }
    }
}

/// Makes sure that the blocks there are for these clusters are in memory.
fn refs_loaded(refs: &mut Refcounts, clusters: std::ops::Range<u64>) -> Attempt<()> {
    let mut at = clusters.start;
    while at < clusters.end && refs.has_room(at) {
        refs.get(at)?;
        at = (at / refs.per_block() + 1) * refs.per_block();
    }
    Ok(())
}
