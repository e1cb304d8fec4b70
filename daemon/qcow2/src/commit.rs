//! Making changes durable, in an order in which a power cut at any moment leaves a sound image.
//!
//! What a table refers to must be durable before the table is. A commit takes what has changed in memory at one
//! moment, and writes it in steps with a flush of the storage between them:
//!
//! 1. refcount blocks that are new, and the refcount table if it moved;
//! 2. the header, if the refcount table moved;
//! 3. entries of the refcount table, reference counts, and L2 tables that are new. (The flush after this step
//!    makes the guest's data durable, too, that the next step refers to.)
//! 4. entries of L2 tables and of the L1 table.
//!
//! Only after that are references dropped that the change has made superfluous: until then a cluster can
//! have too many references (a leak), never too few.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};

use futures_util::future::join_all;

use crate::error::Error;
use crate::header::{AUTOCLEAR_REDO, Header};
use crate::image::Image;
use crate::mapping::{Entry, OFFSET_MASK};
use crate::meta::{DirtyL2, Reason, Unref, Writing};
use crate::refcount::{DirtyBlock, DirtyTable};
use crate::storage::{Step, before, buffer_of};
use crate::write::read_only;

/// An L2 table that is to be written.
struct DirtyL2Table {
    index: usize,
    dirty: DirtyL2,
    /// Byte offset in the file of what follows.
    offset: u64,
    data: Vec<u8>,
}

struct Batch {
    /// The changes up to this one are in here, but for partial clusters.
    changes: u64,
    /// Whether there are any.
    partial: bool,
    table: Option<DirtyTable>,
    blocks: Vec<DirtyBlock>,
    l2: Vec<DirtyL2Table>,
    l1: Option<(std::ops::Range<usize>, u64, Vec<u8>)>,
    unrefs: Vec<Unref>,
    /// Changes noted up to this one are in here.
    redo: u64,
    /// What comes before entries that refer to it is durable: a new table may be referred to by the file.
    referred: AtomicBool,
}

/// A batch whose end is told however the writing of it ends: a task may be dropped with its I/O thread.
struct Taken<'a> {
    image: &'a Image,
    batch: Option<Batch>,
}

impl Taken<'_> {
    fn end(mut self, ok: bool) {
        if let Some(batch) = self.batch.take() {
            self.image.finish(batch, ok);
        }
    }
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        if let Some(batch) = self.batch.take() {
            self.image.finish(batch, false);
        }
    }
}

impl Image {
    /// Whether tables have changed that are not durable yet.
    #[inline]
    pub fn is_dirty(&self) -> bool {
        self.changes.load(Ordering::Acquire) != self.committed.load(Ordering::Acquire)
    }

    pub(crate) fn note_change(&self) {
        self.changes.fetch_add(1, Ordering::Release);
    }

    /// Makes everything durable that was written before, for whoever has written it. Fails once, too, after the storage has failed
    /// a flush that nobody had asked for: what it has lost it tells only once.
    pub async fn flush(&self) -> io::Result<()> {
        let result = self.flush_all().await;
        match self.untold.swap(false, Ordering::AcqRel) {
            true => result.and(Err(io::Error::other(
                "what was written before could not be made durable",
            ))),
            false => result,
        }
    }

    /// As [`Image::flush`], for changes of the image's own: leaves what writers are to be told.
    pub(crate) async fn flush_all(&self) -> io::Result<()> {
        // What cannot be made whole keeps nothing else from being durable.
        let whole = self.make_whole().await;
        self.store().await.and(whole)
    }

    /// Makes everything durable but partial clusters, of which the log has everything that was answered.
    pub(crate) async fn store(&self) -> io::Result<()> {
        if self.layout.external {
            self.data.flush().await?;
        }
        // Whatever is being written now is written when this returns.
        let turn = self.committing.lock().await;
        let is_dirty = self.is_dirty() || self.has_dirty_refs() || self.header_is_unsure();
        if !is_dirty || self.meta().writing.is_none() {
            drop(turn);
            return self.file.flush().await;
        }
        self.commit().await
    }

    /// Writes what has changed if there is much of it.
    pub(crate) async fn commit_if_full(&self) -> io::Result<()> {
        // What could not be noted must be durable before it is answered.
        let unnoted = || {
            let unnoted = self.unnoted.load(Ordering::Acquire);
            unnoted > self.committed.load(Ordering::Acquire)
        };
        let must = || unnoted() || self.meta().is_full();
        if !must() {
            return Ok(());
        }
        let turn = self.committing.lock().await;
        if must() {
            self.commit().await?;
        }
        drop(turn);
        match unnoted() {
            // The log takes nothing, and of partial clusters a commit makes nothing durable.
            true => self.flush_all().await,
            false => Ok(()),
        }
    }

    /// So much has changed that [`Image::commit_early`] should be called, by somebody whom no guest waits for.
    pub fn is_filling(&self) -> bool {
        self.meta().is_filling() || self.has_many_partial()
    }

    /// Writes what has changed before there is so much that requests must wait for it, and makes a few clusters whole. Whether
    /// there are more, which should follow a little later: guests' own requests come first.
    pub async fn commit_early(&self) -> io::Result<bool> {
        // First, as the other may take long: requests must wait when there is no room for changes.
        let turn = self.committing.lock().await;
        if self.meta().is_filling() {
            self.commit().await?;
        }
        drop(turn);
        self.make_some_whole().await
    }

    fn has_dirty_refs(&self) -> bool {
        let meta = self.meta();
        meta.writing.as_ref().is_some_and(|w| w.refs.is_dirty())
    }

    /// Of whoever holds `committing`.
    async fn commit(&self) -> io::Result<()> {
        let batch = self.take_batch()?;
        let taken = Taken {
            image: self,
            batch: Some(batch),
        };
        let result = match &taken.batch {
            Some(batch) => self.write_batch(batch).await,
            None => Ok(()),
        };
        taken.end(result.is_ok());
        result
    }

    /// Flushes the file, for tables: a failure is told by the next [`Image::flush`] as well.
    async fn sync(&self) -> io::Result<()> {
        let result = self.file.flush().await;
        self.told(result)
    }

    fn told(&self, result: io::Result<()>) -> io::Result<()> {
        if result.is_err() {
            self.untold.store(true, Ordering::Release);
        }
        result
    }

    fn take_batch(&self) -> io::Result<Batch> {
        let mut meta = self.meta();
        let meta = &mut *meta;
        let w = meta.writing.as_mut().ok_or_else(read_only)?;
        let changes = self.changes.load(Ordering::Acquire);
        let partial = !w.partial.is_empty();
        let block = self.options.block_size;
        let mut l2 = Vec::new();
        for (index, dirty) in std::mem::take(&mut w.l2) {
            meta.in_commit.insert(index);
            let each = block / 8;
            let range = dirty.range.start / each * each..dirty.range.end.next_multiple_of(each);
            let table = self.tables.l1(index) & OFFSET_MASK;
            // A table that has changed stays in memory until it was written.
            if let Some(data) = self
                .tables
                .with(index, |t| t.bytes(self.layout, range.clone()))
            {
                l2.push(DirtyL2Table {
                    index,
                    dirty,
                    offset: table + range.start as u64 * 8,
                    data,
                });
            }
        }
        let l1 = w.l1.take().map(|range| {
            // Whole blocks, as far as the table reaches.
            let each = block / 8;
            let end = range
                .end
                .next_multiple_of(each)
                .min(meta.header.l1_entries as usize);
            let start = range.start / each * each;
            let data = (start..end).flat_map(|i| self.tables.l1(i).to_be_bytes());
            let offset = meta.header.l1_offset + start as u64 * 8;
            (range, offset, data.collect())
        });
        let redo = w.redo.as_ref().map_or(0, |r| r.next());
        Ok(Batch {
            changes,
            partial,
            table: w.refs.take_table(),
            blocks: w.refs.take_blocks(block),
            l2,
            l1,
            unrefs: std::mem::take(&mut w.unrefs),
            redo,
            referred: AtomicBool::new(false),
        })
    }

    /// Notes once more what the file does not have after a commit: clusters that are partial. False if they cannot be noted; what was
    /// noted of them before must count then.
    pub(crate) fn note_partial(&self, w: &mut Writing) -> bool {
        let Some(redo) = &mut w.redo else {
            return true;
        };
        let mut changes = Vec::new();
        for cluster in w.partial.iter() {
            let (index, i) = self.layout.position(cluster << self.layout.cluster_bits);
            let entry = self.tables.with(index, |t| t.entry(self.layout, i));
            if let Some(entry) = entry.filter(|e| self.layout.is_partial(*e)) {
                changes.push((cluster, Entry::default(), self.for_log(entry)));
            }
        }
        redo.note_all(&changes)
    }

    async fn put_all<'a>(
        &self,
        writes: impl Iterator<Item = (Step, u64, &'a Vec<u8>)>,
    ) -> io::Result<bool> {
        let writes: Vec<_> = writes
            .map(|(step, offset, data)| async move {
                before(&*self.file, step, offset, data.len() as u64).await?;
                self.file.write(offset, buffer_of(data)).await
            })
            .collect();
        let any = !writes.is_empty();
        // All of them to their end: one that still ran could overwrite what the next commit writes.
        let done = join_all(writes).await;
        done.into_iter().fold(Ok(()), io::Result::and)?;
        Ok(any)
    }

    async fn write_batch(&self, batch: &Batch) -> io::Result<()> {
        let new_blocks = batch.blocks.iter().filter(|b| b.new);
        let new_blocks = new_blocks.map(|b| (Step::RefblockAllocWrite, b.offset, &b.data));
        if self.put_all(new_blocks).await? {
            self.sync().await?;
        }
        let moved = batch.table.as_ref().filter(|t| t.moved.is_some());
        if let Some(table) = moved {
            // The header may refer to this place already, if a commit has failed after it.
            self.put_all([(Step::ReftableGrow, table.offset, &table.data)].into_iter())
                .await?;
            self.sync().await?;
            before(&*self.file, Step::RefblockAllocSwitchTable, 0, 0).await?;
            // It may have moved again meanwhile, which the next commit writes.
            let clusters = (table.data.len() as u64).div_ceil(self.cluster());
            let clusters = u32::try_from(clusters).map_err(|_| Error::TooLarge)?;
            self.change_header(|h| {
                h.refcount_table_offset = table.offset;
                h.refcount_table_clusters = clusters;
            });
        }
        // What it says must be there before the tables are written that it refers to.
        if self.header_is_unsure() {
            let put = self.put_header().await;
            self.told(put)?;
        }
        let table = batch.table.iter().filter(|t| t.moved.is_none());
        let blocks = batch.blocks.iter().filter(|b| !b.new);
        let new_l2 = batch.l2.iter().filter(|t| t.dirty.new);
        let early = table
            .map(|t| (Step::ReftableUpdate, t.offset, &t.data))
            .chain(blocks.map(|b| (Step::RefblockUpdate, b.offset, &b.data)))
            .chain(new_l2.map(|t| (Step::L2AllocWrite, t.offset, &t.data)));
        self.put_all(early).await?;
        if self.layout.external
            && let Err(e) = self.data.flush().await
        {
            self.untold.store(true, Ordering::Release);
            return Err(e);
        }
        self.sync().await?;
        batch.referred.store(true, Ordering::Relaxed);
        let old_l2 = batch.l2.iter().filter(|t| !t.dirty.new);
        let old_l2 = old_l2.map(|t| (Step::L2Update, t.offset, &t.data));
        let l1 = batch.l1.iter();
        let last = old_l2.chain(l1.map(|(_, offset, data)| (Step::L1Update, *offset, data)));
        if self.put_all(last).await? {
            self.sync().await?;
        }
        Ok(())
    }

    fn finish(&self, batch: Batch, ok: bool) {
        let mut meta = self.meta();
        let meta = &mut *meta;
        for t in &batch.l2 {
            meta.in_commit.remove(&t.index);
            if !ok {
                let new = t.dirty.new && !batch.referred.load(Ordering::Relaxed);
                meta.l2_changed(t.index, t.dirty.range.clone(), new);
            }
        }
        if let (Some((range, ..)), false) = (&batch.l1, ok) {
            meta.l1_changed(range.start);
            meta.l1_changed(range.end - 1);
        }
        let Some(w) = &mut meta.writing else {
            return;
        };
        let moved = batch.table.as_ref().and_then(|t| t.moved);
        if let Some(table) = batch.table {
            w.refs.table_written(table, ok);
        }
        for block in batch.blocks {
            w.refs.block_written(block, ok);
        }
        if !ok {
            w.unrefs.extend(batch.unrefs);
            return;
        }
        let noted = self.note_partial(w);
        if noted {
            if let Some(redo) = &mut w.redo {
                redo.forget(batch.redo);
            }
            if self.unnoted.load(Ordering::Acquire) <= batch.changes {
                self.unnoted.store(0, Ordering::Release);
            }
        }
        for u in batch.unrefs {
            w.add_unused(u);
        }
        if let Some(m) = moved {
            w.add_unused(Unref {
                first: m.first,
                clusters: m.clusters,
                reason: Reason::Other,
            });
        }
        // Of what a partial cluster has nothing is durable.
        let upto = batch.changes.saturating_sub(batch.partial.into());
        self.committed.store(upto, Ordering::Release);
    }

    /// Makes the fields of the header durable. If that fails, the next commit does it before anything else.
    pub(crate) async fn write_header(&self) -> io::Result<()> {
        self.meta().header_changes += 1;
        self.put_header().await
    }

    /// Changes fields of the header that tables depend on, for [`Image::write_header`].
    pub(crate) fn change_header(&self, change: impl FnOnce(&mut Header)) {
        let mut meta = self.meta();
        change(&mut meta.header);
        meta.header_changes += 1;
    }

    /// Whether the file may not have the header as it is in memory.
    fn header_is_unsure(&self) -> bool {
        let meta = self.meta();
        meta.header_changes != meta.header_stored
    }

    async fn put_header(&self) -> io::Result<()> {
        let _turn = self.header_turn.lock().await;
        let mut bytes = [0; Header::PATCHED];
        let old = self
            .read_metadata(0, Header::PATCHED as u64, "the header")
            .await?;
        bytes.copy_from_slice(&old);
        let changes = {
            let meta = self.meta();
            meta.header.patch(&mut bytes);
            meta.header_changes
        };
        self.file.write(0, buffer_of(&bytes)).await?;
        self.file.flush().await?;
        self.meta().header_stored = changes;
        Ok(())
    }

    // Giving clusters back.

    /// Whether [`Image::tidy`] has something to do.
    pub fn is_untidy(&self) -> bool {
        let meta = self.meta();
        meta.writing
            .as_ref()
            .is_some_and(|w| !w.unrefs.is_empty() || !w.unused.is_empty())
    }

    /// Makes changes durable that give up clusters, and makes the clusters free once no request uses them any more.
    /// Not to be called from within a request, which would wait for itself.
    pub async fn tidy(&self) -> io::Result<()> {
        if self.meta().writing.is_none() {
            return Ok(());
        }
        self.store().await?;
        let upto = match &self.meta().writing {
            Some(w) if !w.unused.is_empty() => w.next_unused,
            _ => return Ok(()),
        };
        // Nothing is held: a request that never ends must not keep anybody else.
        self.file.quiesce().await;
        let _turn = self.tidying.lock().await;
        self.free_unused(upto).await
    }

    /// As [`Image::tidy`], when no request is in flight.
    pub(crate) async fn tidy_still(&self) -> io::Result<()> {
        let _turn = self.tidying.lock().await;
        self.flush_all().await?;
        self.free_unused(u64::MAX).await
    }

    /// Frees what became unused before number `upto`.
    async fn free_unused(&self, upto: u64) -> io::Result<()> {
        self.forget_decompressed();
        // Those that cannot be freed now are tried again, and keep no others.
        let (mut kept, mut failed) = (Vec::new(), None);
        loop {
            let (number, next) = {
                let mut meta = self.meta();
                let first = meta.writing.as_mut().and_then(|w| w.unused.front_mut());
                match first {
                    Some((number, u)) if *number < upto => (*number, *u),
                    _ => break,
                }
            };
            if next.clusters > 0 {
                let one = Unref {
                    clusters: 1,
                    ..next
                };
                if let Err(error) = self.unref(one).await {
                    kept.push((number, one));
                    failed.get_or_insert(error);
                }
            }
            if let Some(w) = &mut self.meta().writing
                && let Some((_, u)) = w.unused.front_mut()
            {
                u.first += 1;
                u.clusters = u.clusters.saturating_sub(1);
                if u.clusters == 0 {
                    w.unused.pop_front();
                }
            }
        }
        if let Some(w) = &mut self.meta().writing {
            kept.into_iter().rev().for_each(|u| w.unused.push_front(u));
        }
        failed.map_or(Ok(()), Err)
    }

    /// Drops references to clusters that nobody uses. The space of those that have none left goes back to the storage
    /// first: as long as they have a reference nobody takes them.
    pub(crate) async fn unref(&self, u: Unref) -> io::Result<()> {
        let pass = match u.reason {
            Reason::Request => self.options.pass_discard_request,
            Reason::Snapshot => self.options.pass_discard_snapshot,
            Reason::Other => self.options.pass_discard_other,
        };
        let bits = self.layout.cluster_bits;
        for c in u.first..u.first + u.clusters {
            before(&*self.file, Step::ClusterFree, c << bits, self.cluster()).await?;
            let count = self
                .with_refs(|w| {
                    let count = w.refs.get(c)?;
                    if count <= 1 {
                        // Nothing more is packed into what is discarded in a moment.
                        w.packing.take_if(|p| p.start >> bits == c);
                    }
                    Ok(count)
                })
                .await?;
            if count == 0 {
                let offset = c << bits;
                tracing::warn!(
                    offset,
                    "a cluster lost a reference that was not counted: check the image"
                );
                continue;
            }
            if count == 1 && pass {
                // Only space is lost if that fails.
                if let Err(error) = self.file.discard(c << bits, self.cluster()).await {
                    tracing::debug!(%error, "space cannot be given back");
                }
            }
            self.with_refs(|w| {
                let count = w.refs.get(c)?;
                w.refs.set(c, count.saturating_sub(1))?;
                if count <= 1 {
                    w.alloc.add(c, 1);
                }
                Ok(())
            })
            .await?;
        }
        Ok(())
    }

    /// Makes everything durable, gives back what is unused, and cuts off what the file has too much. No request is
    /// in flight, and none follows.
    pub async fn close(&self) -> io::Result<()> {
        if self.meta().writing.is_none() {
            return Ok(());
        }
        self.tidy_still().await?;
        let done = match self.store_bitmaps().await {
            Ok(()) => self.close_stored().await,
            failed => failed,
        };
        if done.is_err() {
            // It may be written to again: what the bitmaps say must not be taken for all of it then.
            if self.load_bitmaps().await.is_err() {
                self.disown_bitmaps().await;
            }
        }
        done
    }

    async fn close_stored(&self) -> io::Result<()> {
        self.flush_all().await?;
        let end = match &mut self.meta().writing {
            Some(w) => {
                w.alloc.trim();
                w.alloc.end() << self.layout.cluster_bits
            }
            None => return Ok(()),
        };
        if end < self.file.size() && self.file.grows() {
            self.file.set_size(end).await?;
        }
        let has_log = self.header().autoclear & AUTOCLEAR_REDO != 0;
        if has_log || self.header_is_unsure() {
            self.change_header(|h| h.autoclear &= !AUTOCLEAR_REDO);
            if let Err(e) = self.put_header().await {
                if has_log {
                    // The log must count again before anything is noted in it.
                    self.change_header(|h| h.autoclear |= AUTOCLEAR_REDO);
                    let _ = self.put_header().await;
                }
                return Err(e);
            }
        }
        let writing = self.meta().writing.take();
        if let Some(redo) = writing.and_then(|w| w.redo) {
            redo.remove();
        }
        Ok(())
    }
}
