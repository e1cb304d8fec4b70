//! Check and repair: do the reference counts say what the tables say?

use std::collections::HashMap;
use std::io;

use crate::image::{Image, Progress, silent, words};
use crate::mapping::{COPIED, Entry, Kind, OFFSET_MASK};
use crate::refcount::{MAX_TABLE, read_entry};

/// Findings that are described; the rest is only counted.
const MAX_MESSAGES: usize = 100;

const PAGE: usize = 1024;

/// What is to be repaired.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Repair {
    Nothing,
    /// Clusters that nothing refers to.
    Leaks,
    /// All that can be: reference counts are made anew from the tables.
    All,
}

/// What a check has found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// References that are wrong: data may be lost, or be overwritten by what is written next.
    pub corruptions: u64,
    /// Clusters that take space for nothing.
    pub leaks: u64,
    /// Of these, what has been repaired.
    pub corruptions_fixed: u64,
    pub leaks_fixed: u64,
    /// Clusters of the guest's disk: all, with data, of these compressed, of these not behind the one before.
    pub clusters: u64,
    pub allocated: u64,
    pub compressed: u64,
    pub fragmented: u64,
    /// One after the last byte of the file that is in use.
    pub end: u64,
    /// Descriptions of the first findings.
    pub messages: Vec<String>,
}

impl Report {
    fn corruption(&mut self, message: impl FnOnce() -> String) {
        self.corruptions += 1;
        self.say(message);
    }

    fn say(&mut self, message: impl FnOnce() -> String) {
        if self.messages.len() < MAX_MESSAGES {
            self.messages.push(message());
        }
    }

    /// Nothing is wrong (any more); leaks count.
    pub fn is_clean(&self) -> bool {
        self.corruptions == self.corruptions_fixed && self.leaks == self.leaks_fixed
    }
}

/// How often clusters are referred to.
#[derive(Clone, Default)]
struct Counts {
    pages: HashMap<u64, Box<[u32; PAGE]>>,
    max_pages: usize,
    /// One after the last cluster.
    end: u64,
}

impl Counts {
    fn add(&mut self, cluster: u64) -> io::Result<()> {
        let full = self.pages.len() >= self.max_pages;
        let page = match self.pages.entry(cluster / PAGE as u64) {
            std::collections::hash_map::Entry::Occupied(e) => e.into_mut(),
            std::collections::hash_map::Entry::Vacant(_) if full => {
                return Err(io::Error::new(
                    io::ErrorKind::OutOfMemory,
                    "the references of this image are spread over so much of its file that counting them takes more memory than is allowed",
                ));
            }
            std::collections::hash_map::Entry::Vacant(e) => e.insert(Box::new([0; PAGE])),
        };
        let count = &mut page[cluster as usize % PAGE];
        *count = count.saturating_add(1);
        self.end = self.end.max(cluster + 1);
        Ok(())
    }

    fn get(&self, cluster: u64) -> u64 {
        let page = self.pages.get(&(cluster / PAGE as u64));
        page.map_or(0, |p| p[cluster as usize % PAGE].into())
    }
}

struct Check<'a> {
    image: &'a Image,
    /// Clusters that the file has, the last perhaps in part.
    file_end: u64,
    counts: Counts,
    report: Report,
    /// The refcount table and its blocks cannot be used as they are.
    broken: bool,
    /// Where each valid block of reference counts is.
    blocks: Vec<u64>,
    /// How often clusters are referred to, without the refcount table and its blocks.
    counts_of_data: Option<Counts>,
    /// Tables that may still be read: an image may refer to the same one again and again.
    budget: u64,
    progress: Progress<'a>,
    /// Bytes of the guest's disk of which the tables were looked at.
    done: u64,
}

/// Tables that a check reads at least, and for each cluster of the file, before it gives up.
const MIN_BUDGET: u64 = 1 << 20;
const BUDGET_PER_CLUSTER: u64 = 64;

/// Memory for counting references, in bytes, if nothing else is said.
pub const CHECK_MEMORY: u64 = 1 << 30;

impl Image {
    /// Counts all references and compares. `memory` bounds what is needed for counting, in bytes. No request may be in
    /// flight; the image may be ready to be written, or not.
    pub async fn check(&self, repair: Repair, memory: u64) -> io::Result<Report> {
        self.check_watched(repair, memory, &silent).await
    }

    /// As [`Image::check`]. `progress` can end it as long as nothing is repaired.
    pub async fn check_watched(
        &self,
        repair: Repair,
        memory: u64,
        progress: Progress<'_>,
    ) -> io::Result<Report> {
        self.settle().await?;
        let max_pages = usize::try_from(memory / (4 * PAGE as u64)).unwrap_or(usize::MAX);
        let mut check = Check::new(self, max_pages, progress);
        check.count_all(repair).await?;
        check.compare().await?;
        check.flags().await?;
        let mut report = check.report;
        let dirty = {
            let h = self.header();
            h.dirty || h.corrupt
        };
        let wrong = report.corruptions > 0 || dirty;
        let was_active = self.meta().writing.is_some();
        match (repair, check.counts_of_data) {
            (Repair::All, Some(counts)) if wrong => {
                self.rebuild(&counts, &mut report).await?;
            }
            (Repair::All | Repair::Leaks, _) if report.leaks > 0 && !check.broken => {
                if !was_active {
                    // Boxed: making an image ready may need a check.
                    Box::pin(self.prepare(0)).await?;
                }
                self.drop_leaks(&check.counts, &check.blocks, &mut report)
                    .await?;
            }
            _ => {}
        }
        if !was_active {
            self.close().await?;
        }
        Ok(report)
    }

    /// Brings everything in memory to the file.
    pub(crate) async fn settle(&self) -> io::Result<()> {
        if self.meta().writing.is_some() {
            self.tidy_still().await?;
            self.flush_all().await?;
        }
        Ok(())
    }

    /// `blocks` says which blocks of reference counts there are.
    async fn drop_leaks(
        &self,
        counts: &Counts,
        blocks: &[u64],
        report: &mut Report,
    ) -> io::Result<()> {
        let per_block = self.with_refs(|w| Ok(w.refs.per_block())).await?;
        let blocks = blocks.iter().enumerate().filter(|(_, at)| **at != 0);
        let clusters = blocks.flat_map(|(i, _)| i as u64 * per_block..(i as u64 + 1) * per_block);
        for c in clusters {
            let want = counts.get(c);
            let fixed = self
                .with_refs(|w| {
                    let have = w.refs.get(c)?;
                    if have > want {
                        w.refs.set(c, want)?;
                        if want == 0 && c < w.alloc.end() {
                            w.alloc.add(c, 1);
                        }
                    }
                    Ok(have > want)
                })
                .await?;
            report.leaks_fixed += u64::from(fixed);
            if c % 4096 == 0 {
                vdisk_io::give_way().await;
                self.commit_if_full().await?;
            }
        }
        self.flush_all().await
    }

    /// Makes new reference counts at the end of the file, and flags and entries that fit.
    async fn rebuild(&self, counts: &Counts, report: &mut Report) -> io::Result<()> {
        let end = counts.end.max(self.file.size().div_ceil(self.cluster()));
        self.start_writing(self.empty_refcounts(), end);
        for c in 0..counts.end {
            if c % PAGE as u64 == 0 {
                if !counts.pages.contains_key(&(c / PAGE as u64)) {
                    continue;
                }
                vdisk_io::give_way().await;
            }
            let want = counts.get(c);
            if want > 0 {
                self.set_count(c, want).await?;
            }
        }
        self.grow_to_end().await?;
        self.meta().header.corrupt = false;
        self.meta().header.dirty = false;
        self.flush_all().await?;
        self.fix_flags(true).await?;
        self.flush_all().await?;
        self.write_header().await?;
        self.with_refs(|w| {
            w.alloc.look_again();
            Ok(())
        })
        .await?;
        // What is still wrong is what cannot be repaired.
        let mut again = Check::new(self, counts.max_pages, &silent);
        again.count_all(Repair::Nothing).await?;
        again.compare().await?;
        again.flags().await?;
        let left = again.report;
        report.leaks_fixed = report.leaks.saturating_sub(left.leaks);
        report.corruptions_fixed = report.corruptions.saturating_sub(left.corruptions);
        report.end = left.end;
        Ok(())
    }

    /// Sets the COPIED flags as the reference counts say, and drops entries that lead nowhere if `drop_bad`.
    pub(crate) async fn fix_flags(&self, drop_bad: bool) -> io::Result<()> {
        let header = self.header();
        let layout = self.layout;
        for index in 0..header.l1_entries as usize {
            let l1 = self.tables.l1(index);
            let offset = l1 & OFFSET_MASK;
            if offset == 0 {
                continue;
            }
            if !self.is_place(offset, self.cluster()) {
                if !drop_bad {
                    continue;
                }
                // Nothing that it says can be read: what it stood for is lost already.
                self.tables.set_l1(index, 0);
                self.meta().l1_changed(index);
                continue;
            }
            let own = self.count_of(offset).await? == 1;
            let new = offset | if own { COPIED } else { 0 };
            if new != l1 {
                self.tables.set_l1(index, new);
                self.meta().l1_changed(index);
            }
            let at = index as u64 * layout.span();
            let n = 1usize << layout.table_bits();
            let entries = self.entries(at, n).await?;
            let mut changed = Vec::new();
            for (i, &old) in entries.iter().enumerate() {
                let new = match layout.references(old) {
                    None if layout.external => old,
                    None => old.with_copied(false),
                    Some((first, clusters)) => {
                        let place = (first << layout.cluster_bits, clusters * self.cluster());
                        if old.is_compressed() {
                            old.with_copied(false)
                        } else if !old.host().is_multiple_of(self.cluster())
                            || !self.is_place(place.0, place.1)
                        {
                            if drop_bad { layout.zero(0) } else { old }
                        } else {
                            old.with_copied(self.count_of(place.0).await? == 1)
                        }
                    }
                };
                let new = match new.is_compressed() || self.version >= 3 {
                    false if new == layout.zero(0) => Entry::default(),
                    _ => new,
                };
                if new != old {
                    changed.push((i, new));
                }
            }
            if changed.is_empty() {
                continue;
            }
            {
                let mut meta = self.meta();
                self.tables.with(index, |t| {
                    for (i, new) in &changed {
                        t.set(layout, *i, *new);
                    }
                });
                meta.l2_changed(index, layout.words(0, n), false);
            }
            self.note_change();
            self.commit_if_full().await?;
        }
        self.note_change();
        Ok(())
    }

    async fn count_of(&self, offset: u64) -> io::Result<u64> {
        let cluster = offset >> self.layout.cluster_bits;
        self.with_refs(|w| w.refs.get(cluster)).await
    }

    /// Whether a range lies within the file, the last cluster perhaps in part.
    pub(crate) fn is_place(&self, offset: u64, len: u64) -> bool {
        let end = self.file.size().next_multiple_of(self.cluster());
        offset.checked_add(len).is_some_and(|e| e <= end)
    }
}

impl<'a> Check<'a> {
    fn new(image: &'a Image, max_pages: usize, progress: Progress<'a>) -> Check<'a> {
        let file_end = image.file.size().div_ceil(image.cluster());
        Check {
            image,
            file_end,
            counts: Counts {
                max_pages,
                ..Counts::default()
            },
            report: Report::default(),
            broken: false,
            blocks: Vec::new(),
            counts_of_data: None,
            budget: MIN_BUDGET + BUDGET_PER_CLUSTER * file_end,
            progress,
            done: 0,
        }
    }

    async fn read_table(
        &mut self,
        offset: u64,
        len: u64,
        what: &'static str,
    ) -> io::Result<Vec<u64>> {
        if self.budget == 0 {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "the tables of this image refer to the same tables too often to be checked",
            ));
        }
        self.budget -= 1;
        let bytes = self.image.read_metadata(offset, len, what).await?;
        Ok(words(&bytes).collect())
    }

    fn cluster(&self) -> u64 {
        self.image.cluster()
    }

    /// Counts a reference to each cluster of a range. False if it is not in the file.
    fn add(&mut self, what: &str, offset: u64, len: u64) -> io::Result<bool> {
        let bits = self.image.layout.cluster_bits;
        let first = offset >> bits;
        let end = offset
            .checked_add(len)
            .map(|e| e.div_ceil(self.cluster()))
            .filter(|e| *e <= self.file_end);
        let Some(end) = end else {
            self.report
                .corruption(|| format!("{what} at {offset:#x} lies beyond the end of the file"));
            return Ok(false);
        };
        for c in first..end {
            self.counts.add(c)?;
        }
        Ok(true)
    }

    /// As `add`, for what has to begin with a cluster.
    fn add_aligned(&mut self, what: &str, offset: u64, len: u64) -> io::Result<bool> {
        if !offset.is_multiple_of(self.cluster()) {
            self.report.corruption(|| {
                format!("{what} is at {offset:#x}, which is not the beginning of a cluster")
            });
            return Ok(false);
        }
        self.add(what, offset, len)
    }

    async fn count_all(&mut self, repair: Repair) -> io::Result<()> {
        let header = self.image.header();
        self.add("the header", 0, self.cluster())?;
        let l1 = header.l1_offset;
        let entries: Vec<u64> = (0..header.l1_entries as usize)
            .map(|i| self.image.tables.l1(i))
            .collect();
        self.report.clusters = header.size.div_ceil(self.cluster());
        self.count_l1("the L1 table", l1, &entries, true).await?;
        if let Some(place) = header.luks {
            self.add_aligned("the LUKS header", place.offset, place.len)?;
        }
        self.count_snapshots().await?;
        self.count_bitmaps().await?;
        self.report.end = self.counts.end * self.cluster();
        if repair == Repair::All {
            self.counts_of_data = Some(self.counts.clone());
        }
        self.count_refcounts().await
    }

    async fn count_snapshots(&mut self) -> io::Result<()> {
        let (snapshots, len) = match self.image.snapshot_table().await {
            Ok(t) => t,
            Err(e) => {
                self.report
                    .corruption(|| format!("the snapshot table: {e}"));
                return Ok(());
            }
        };
        let offset = self.image.header().snapshots_offset;
        self.add("the snapshot table", offset, len)?;
        for s in snapshots {
            let what = format!("the L1 table of snapshot '{}'", s.id.escape_debug());
            let bytes = u64::from(s.l1_entries) * 8;
            if bytes > crate::header::MAX_L1 || !self.image.is_place(s.l1_offset, bytes) {
                self.report
                    .corruption(|| format!("{what} lies beyond the end of the file"));
                continue;
            }
            let l1 = self.read_table(s.l1_offset, bytes, "a snapshot").await?;
            self.count_l1(&what, s.l1_offset, &l1, false).await?;
        }
        Ok(())
    }

    async fn count_bitmaps(&mut self) -> io::Result<()> {
        let places = match self.image.bitmap_places().await {
            Ok(places) => places.unwrap_or_default(),
            Err(e) => {
                self.report.corruption(|| format!("the bitmaps: {e}"));
                return Ok(());
            }
        };
        for (what, offset, len) in places {
            self.add_aligned(what, offset, len)?;
        }
        Ok(())
    }

    async fn count_l1(
        &mut self,
        what: &str,
        offset: u64,
        l1: &[u64],
        active: bool,
    ) -> io::Result<()> {
        if !l1.is_empty() {
            self.add_aligned(what, offset, l1.len() as u64 * 8)?;
        }
        let layout = self.image.layout;
        let cluster = self.cluster();
        let mut expected_host = None;
        for (index, entry) in l1.iter().enumerate() {
            let at = index as u64 * layout.span();
            if active {
                self.done = at;
            }
            (self.progress)(self.done)?;
            let table = entry & OFFSET_MASK;
            if table == 0 || !self.add_aligned("an L2 table", table, cluster)? {
                continue;
            }
            if table + cluster > self.image.file.size() {
                self.report
                    .corruption(|| format!("the L2 table at {table:#x} ends beyond the file"));
                continue;
            }
            let all = self.read_table(table, cluster, "an L2 table").await?;
            for i in 0..1usize << layout.table_bits() {
                let range = layout.words(i, 1);
                let entry = Entry {
                    word: layout.word_of_file(all[range.start]),
                    bitmap: if layout.extended {
                        all[range.start + 1]
                    } else {
                        0
                    },
                };
                if entry == Entry::default() {
                    continue;
                }
                let at = at + i as u64 * cluster;
                if let Some(host) = self.count_entry(entry, at)?
                    && active
                {
                    self.report.allocated += 1;
                    self.report.compressed += u64::from(entry.is_compressed());
                    let next = expected_host.replace(host + cluster);
                    self.report.fragmented += u64::from(next.is_some_and(|n| n != host));
                }
            }
        }
        Ok(())
    }

    /// Counts what an entry refers to, and returns the place of its data.
    fn count_entry(&mut self, entry: Entry, at: u64) -> io::Result<Option<u64>> {
        let layout = self.image.layout;
        if layout.extended && !entry.is_compressed() {
            let both = entry.bitmap & entry.bitmap >> 32 & 0xffff_ffff;
            if both != 0 {
                self.report.corruption(|| {
                    format!("guest offset {at:#x}: subclusters are both data and zero")
                });
            }
        }
        match layout.decode(entry, at) {
            Err(e) => {
                self.report.corruption(|| e.to_string());
                Ok(None)
            }
            Ok(m) => {
                let what = || format!("the data of guest offset {at:#x}");
                if let Kind::Compressed { offset, len } = m.kind {
                    // The last sector need not be there wholly.
                    let have = self.image.file.size().saturating_sub(offset).min(len);
                    let ok = self.add(&what(), offset, have.max(1))?;
                    if entry.word & COPIED != 0 {
                        self.report.corruption(|| {
                            format!("{} is compressed and has the flag COPIED", what())
                        });
                    }
                    return Ok(ok.then_some(offset & !(self.cluster() - 1)));
                }
                let host = entry.host();
                if layout.external {
                    return Ok(layout.has_data(entry).then_some(host));
                }
                if host == 0 || !self.add_aligned(&what(), host, self.cluster())? {
                    return Ok(None);
                }
                Ok(layout.has_data(entry).then_some(host))
            }
        }
    }

    async fn count_refcounts(&mut self) -> io::Result<()> {
        let header = self.image.header();
        let (offset, cluster) = (header.refcount_table_offset, self.cluster());
        let bytes = u64::from(header.refcount_table_clusters) * cluster;
        let before = self.report.corruptions;
        if bytes > MAX_TABLE.max(cluster) || bytes == 0 {
            self.report.corruption(|| {
                format!("the refcount table has {bytes} bytes, which is not possible")
            });
        } else if self.image.is_place(offset, bytes)
            && offset + bytes <= self.image.file.size()
            && self.add_aligned("the refcount table", offset, bytes)?
        {
            let table = self
                .image
                .read_metadata(offset, bytes, "the refcount table")
                .await?;
            for (i, entry) in words(&table).enumerate() {
                let at = entry & OFFSET_MASK;
                let ok = at != 0
                    && at.is_multiple_of(cluster)
                    && at + cluster <= self.image.file.size()
                    && self.add("a refcount block", at, cluster)?;
                if entry != 0 && !ok {
                    self.report
                        .corruption(|| format!("entry {i} of the refcount table is {entry:#x}"));
                }
                self.blocks.push(if ok { at } else { 0 });
            }
            // Whatever else is where they are will be overwritten with counts.
            let bits = self.image.layout.cluster_bits;
            for at in self.blocks.iter_mut().filter(|at| **at != 0) {
                if self.counts.get(*at >> bits) > 1 {
                    self.report
                        .corruption(|| format!("the refcount block at {at:#x} is used twice"));
                    *at = 0;
                }
            }
        } else {
            self.report
                .corruption(|| format!("the refcount table at {offset:#x} is not in the file"));
        }
        self.broken = self.report.corruptions > before;
        Ok(())
    }

    async fn compare(&mut self) -> io::Result<()> {
        let header = self.image.header();
        let order = header.refcount_order;
        let bits = self.image.layout.cluster_bits;
        let per_block = 1u64 << (bits + 3 - order);
        let blocks = std::mem::take(&mut self.blocks);
        let count = (blocks.len() as u64).max(self.counts.end.div_ceil(per_block));
        for index in 0..count {
            let at = blocks.get(index as usize).copied().unwrap_or(0);
            let first = index * per_block;
            if at == 0 && first >= self.counts.end {
                continue;
            }
            let block = match at {
                0 => None,
                at => Some(
                    self.image
                        .read_metadata(at, self.cluster(), "a refcount block")
                        .await?,
                ),
            };
            for i in 0..per_block {
                let have = block
                    .as_ref()
                    .map_or(0, |b| read_entry(b, order, i as usize));
                let want = self.counts.get(first + i);
                let offset = (first + i) << bits;
                if have < want {
                    self.report.corruption(|| {
                        format!("the cluster at {offset:#x} has {have} references, and should have {want}")
                    });
                } else if have > want {
                    self.report.leaks += 1;
                    self.report.say(|| {
                        format!("leak: the cluster at {offset:#x} has {have} references, and needs {want}")
                    });
                }
            }
            (self.progress)(self.done)?;
            vdisk_io::give_way().await;
        }
        self.blocks = blocks;
        Ok(())
    }

    /// Compares the COPIED flags of the active tables with the counts.
    async fn flags(&mut self) -> io::Result<()> {
        let layout = self.image.layout;
        let header = self.image.header();
        for index in 0..header.l1_entries as usize {
            let l1 = self.image.tables.l1(index);
            let table = l1 & OFFSET_MASK;
            if table == 0 || !self.image.is_place(table, self.cluster()) {
                continue;
            }
            vdisk_io::give_way().await;
            self.flag("the L2 table", table, l1);
            if !table.is_multiple_of(self.cluster())
                || table + self.cluster() > self.image.file.size()
            {
                continue;
            }
            let at = index as u64 * layout.span();
            let entries = self.image.entries(at, 1 << layout.table_bits()).await?;
            for e in entries {
                if !e.is_compressed() && e.host() != 0 && !layout.external {
                    self.flag("the cluster", e.host(), e.word);
                }
            }
        }
        Ok(())
    }

    fn flag(&mut self, what: &str, offset: u64, word: u64) {
        let count = self.counts.get(offset >> self.image.layout.cluster_bits);
        let copied = word & COPIED != 0;
        if copied != (count == 1) {
            self.report.corruption(|| {
                format!(
                    "{what} at {offset:#x} has {count} references {} the flag COPIED",
                    if copied { "and" } else { "but not" }
                )
            });
        }
    }
}
