//! What writes stand on: clusters of the file are taken, tables come to be, and entries change.

use std::io;
use std::sync::atomic::Ordering;

use crate::allocator::Run;
use crate::error::Error;
use crate::image::Image;
use crate::mapping::{COPIED, Entry, OFFSET_MASK};
use crate::meta::{Reason, Unref, Writing};
use crate::refcount::{Attempt, Need, Stop};
use crate::storage::{Step, before};
use crate::tables::Table;
use crate::write::read_only;

impl Image {
    // Clusters of the file.

    /// Does something with the reference counts; reads what it needs.
    pub(crate) async fn with_refs<R>(
        &self,
        mut f: impl FnMut(&mut Writing) -> Attempt<R>,
    ) -> io::Result<R> {
        loop {
            let need = {
                let mut meta = self.meta();
                let w = meta.writing.as_mut().ok_or_else(read_only)?;
                match f(w) {
                    Ok(r) => {
                        w.refs.evict();
                        return Ok(r);
                    }
                    Err(Stop::Error(e)) => return Err(e.into()),
                    Err(Stop::Need(need)) => need,
                }
            };
            let Need::Block { index, offset } = need;
            let _held = self.block_loads.lock(index..index + 1).await;
            let missing = |w: &mut Writing| match w.refs.get(index * w.refs.per_block()) {
                Err(Stop::Need(_)) => true,
                Ok(_) | Err(Stop::Error(_)) => false,
            };
            if !self.meta().writing.as_mut().is_some_and(missing) {
                continue;
            }
            let cluster = self.cluster();
            before(&*self.file, Step::RefblockLoad, offset, cluster).await?;
            let data = self
                .read_metadata(offset, cluster, "a refcount block")
                .await?;
            if let Some(w) = &mut self.meta().writing {
                w.refs.insert(index, data);
            }
        }
    }

    /// Takes `want` clusters in one piece, or fewer, and makes sure that the file has them.
    pub(crate) async fn allocate(&self, want: u64) -> io::Result<Run> {
        before(&*self.file, Step::ClusterAlloc, 0, 0).await?;
        let run = self.with_refs(|w| w.alloc.take(&mut w.refs, want)).await?;
        if self.overlaps_tables(run) {
            return Err(Error::Overlap.into());
        }
        let end = (run.first + run.clusters) << self.layout.cluster_bits;
        if let Err(e) = self.grow_file(end).await {
            self.give_back(run);
            return Err(e);
        }
        Ok(run)
    }

    /// An image whose reference counts are wrong must not lose its tables, too.
    fn overlaps_tables(&self, run: Run) -> bool {
        let meta = self.meta();
        let h = &meta.header;
        let bits = self.layout.cluster_bits;
        let overlaps = |offset: u64, bytes: u64| {
            let first = offset >> bits;
            let end = (offset + bytes).div_ceil(self.cluster());
            first < run.first + run.clusters && run.first < end
        };
        overlaps(0, self.cluster())
            || overlaps(h.l1_offset, u64::from(h.l1_entries) * 8)
            || meta
                .writing
                .as_ref()
                .is_some_and(|w| w.refs.is_table(run.first, run.clusters))
    }

    /// Clusters that were taken and are not needed after all.
    pub(crate) fn give_back(&self, run: Run) {
        if let Some(w) = &mut self.meta().writing {
            w.add_unused(Unref {
                first: run.first,
                clusters: run.clusters,
                reason: Reason::Other,
            });
        }
    }

    /// Makes sure that the file has at least `size` bytes. It grows in larger steps than it is asked to: not every
    /// write is to change its size.
    pub(crate) async fn grow_file(&self, size: u64) -> io::Result<()> {
        if size <= self.file.size() {
            return Ok(());
        }
        let _turn = self.growing.lock().await;
        if size <= self.file.size() {
            return Ok(());
        }
        let step = (size / 8).clamp(1 << 20, 1 << 30).next_power_of_two();
        if !self.file.grows() {
            return Err(io::ErrorKind::StorageFull.into());
        }
        let (old, new) = (self.file.size(), size.next_multiple_of(step));
        before(&*self.file, Step::ClusterAllocSpace, old, new - old).await?;
        self.file.set_size(new).await
    }

    // Tables.

    /// Makes sure that there is an L2 table of this number that may be changed.
    pub(crate) async fn own_table(&self, index: usize) -> io::Result<()> {
        let is_own = |l1: u64| l1 & COPIED != 0 && l1 & OFFSET_MASK != 0;
        if is_own(self.tables.l1(index)) {
            return Ok(());
        }
        let _held = self.table_loads.lock(index as u64..index as u64 + 1).await;
        let old = self.tables.l1(index);
        if is_own(old) {
            return Ok(());
        }
        let run = self.allocate(1).await?;
        let table = if old & OFFSET_MASK == 0 {
            Table::new(
                self.layout,
                std::iter::repeat_n(0, self.cluster() as usize / 8),
            )
        } else {
            loop {
                let place = old & OFFSET_MASK;
                // It may have been dropped meanwhile.
                let loaded = async {
                    before(&*self.file, Step::L2AllocCowRead, place, self.cluster()).await?;
                    self.load_table_held(index).await
                };
                if let Err(e) = loaded.await {
                    self.give_back(run);
                    return Err(e);
                }
                if let Some(copy) = self.tables.with(index, Table::duplicate) {
                    break copy;
                }
            }
        };
        let mut meta = self.meta();
        self.tables
            .set_l1(index, run.first << self.layout.cluster_bits | COPIED);
        if !self.tables.put(index, Some(table)) {
            meta.evict(self, index);
        }
        meta.l2_changed(index, 0..self.cluster() as usize / 8, true);
        meta.l1_changed(index);
        if let (Some(w), true) = (&mut meta.writing, old & OFFSET_MASK != 0) {
            w.unrefs.push(Unref {
                first: (old & OFFSET_MASK) >> self.layout.cluster_bits,
                clusters: 1,
                reason: Reason::Other,
            });
        }
        self.note_change();
        Ok(())
    }

    /// Changes the entries of `n` clusters from the one that `at` lies in, which the caller holds. `f` gets the
    /// number from 0 on and the old entry. Clusters that an old entry had and the new one has not lose a reference.
    pub(crate) async fn change_entries(
        &self,
        at: u64,
        n: usize,
        reason: Reason,
        f: impl Fn(usize, Entry) -> Entry,
    ) -> io::Result<()> {
        let (index, first) = self.layout.position(at);
        let layout = self.layout;
        loop {
            {
                let mut meta = self.meta();
                let number = (at >> layout.cluster_bits) - first as u64;
                let mut redo = meta.writing.as_mut().and_then(|w| w.redo.as_mut());
                let (mut partial, mut whole) = (Vec::new(), Vec::new());
                let changed = self.tables.with(index, |table| {
                    let mut unrefs = Vec::new();
                    for i in 0..n {
                        let old = table.entry(layout, first + i);
                        let new = f(i, old);
                        if new == old {
                            continue;
                        }
                        let cluster = number + (first + i) as u64;
                        if let Some(redo) = &mut redo
                            && !redo.note(cluster, old, self.for_log(new))
                        {
                            let this = self.changes.load(Ordering::Acquire) + 1;
                            self.unnoted.store(this, Ordering::Release);
                        }
                        table.set(layout, first + i, new);
                        match (layout.is_partial(old), layout.is_partial(new)) {
                            (_, true) => partial.push(cluster),
                            (true, false) => whole.push(cluster),
                            _ => {}
                        }
                        let had = layout.references(old);
                        // Compressed data in the same cluster has a reference of its own.
                        let stays = had == layout.references(new) && !old.is_compressed();
                        if let Some((first, clusters)) = had
                            && !stays
                        {
                            unrefs.push(Unref {
                                first,
                                clusters,
                                reason,
                            });
                        }
                    }
                    unrefs
                });
                if let Some(unrefs) = changed {
                    meta.l2_changed(index, layout.words(first, n), false);
                    if let Some(w) = &mut meta.writing {
                        w.unrefs.extend(unrefs);
                        partial.into_iter().for_each(|c| w.partial.insert(c));
                        whole.into_iter().for_each(|c| w.partial.remove(c));
                    }
                    self.note_change();
                    return Ok(());
                }
            }
            self.load_table(index).await?;
        }
    }
}
