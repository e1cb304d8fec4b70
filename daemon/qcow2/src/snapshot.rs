//! The snapshot table (specification, "Snapshots").

use std::io;

use crate::check::{CHECK_MEMORY, Repair};
use crate::error::{Error, Result};
use crate::header::MAX_L1;
use crate::image::{Image, words};
use crate::mapping::{Entry, OFFSET_MASK};
use crate::meta::{Reason, Unref};
use crate::storage::buffer_of;
use crate::write::read_only;

/// The longest snapshot table that is read, in bytes.
const MAX_TABLE: u64 = 64 << 20;

/// The most snapshots that an image may have. (QEMU has the same limit.)
pub(crate) const MAX_SNAPSHOTS: u32 = 65536;

/// Extra data of a snapshot that is known: size of the VM state, size of the disk, instruction count.
const KNOWN_EXTRA: usize = 24;
const MAX_EXTRA: usize = 1024;

const FIXED: usize = 40;

/// A snapshot inside an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    pub id: String,
    pub name: String,
    /// Seconds and nanoseconds since 1970.
    pub date: (u32, u32),
    /// Nanoseconds that the guest had run.
    pub vm_clock: u64,
    /// Bytes of the VM's state, which lie beyond the disk.
    pub vm_state_size: u64,
    /// Bytes of the disk; None in snapshots that do not say so: that of the image.
    pub disk_size: Option<u64>,
    /// Instructions that the guest had executed, if it was counting.
    pub icount: Option<u64>,
    pub(crate) l1_offset: u64,
    pub(crate) l1_entries: u32,
    /// Extra data as it is in the image.
    extra: Vec<u8>,
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> Result<[u8; N]> {
    bytes
        .get(at..)
        .and_then(|b| b.first_chunk::<N>())
        .copied()
        .ok_or(Error::Short("the snapshot table"))
}

/// Reads one snapshot, and how many bytes it takes.
fn parse(b: &[u8]) -> Result<(Snapshot, usize)> {
    let u16_at = |at| array(b, at).map(u16::from_be_bytes);
    let u32_at = |at| array(b, at).map(u32::from_be_bytes);
    let u64_at = |at| array(b, at).map(u64::from_be_bytes);
    let (id_len, name_len) = (u16_at(12)? as usize, u16_at(14)? as usize);
    let extra_len = u32_at(36)? as usize;
    if extra_len > MAX_EXTRA {
        return Err(Error::Field {
            what: "the length of a snapshot's extra data",
            value: extra_len as u64,
            allowed: "at most 1024 are allowed",
        });
    }
    let part = |at: usize, len: usize| {
        b.get(at..at + len)
            .ok_or(Error::Short("the snapshot table"))
    };
    let extra = part(FIXED, extra_len)?.to_vec();
    let text = |at, len| Ok(String::from_utf8_lossy(part(at, len)?).into_owned());
    let id_at = FIXED + extra_len;
    let extra_u64 = |at: usize| array(&extra, at).map(u64::from_be_bytes).ok();
    let snapshot = Snapshot {
        id: text(id_at, id_len)?,
        name: text(id_at + id_len, name_len)?,
        date: (u32_at(16)?, u32_at(20)?),
        vm_clock: u64_at(24)?,
        vm_state_size: extra_u64(0).unwrap_or(u32_at(32)?.into()),
        disk_size: extra_u64(8),
        icount: extra_u64(16).filter(|v| *v != u64::MAX),
        l1_offset: u64_at(0)?,
        l1_entries: u32_at(8)?,
        extra,
    };
    let len = (id_at + id_len + name_len).next_multiple_of(8);
    Ok((snapshot, len))
}

impl Snapshot {
    /// A new snapshot of a disk without a VM.
    pub(crate) fn new(id: String, name: String, date: (u32, u32), disk_size: u64) -> Snapshot {
        Snapshot {
            id,
            name,
            date,
            vm_clock: 0,
            vm_state_size: 0,
            disk_size: Some(disk_size),
            icount: None,
            l1_offset: 0,
            l1_entries: 0,
            extra: Vec::new(),
        }
    }

    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        let mut extra = self.extra.clone();
        extra.resize(extra.len().max(KNOWN_EXTRA), 0);
        extra[..8].copy_from_slice(&self.vm_state_size.to_be_bytes());
        if let Some(size) = self.disk_size {
            extra[8..16].copy_from_slice(&size.to_be_bytes());
        }
        extra[16..24].copy_from_slice(&self.icount.unwrap_or(u64::MAX).to_be_bytes());
        out.extend(self.l1_offset.to_be_bytes());
        out.extend(self.l1_entries.to_be_bytes());
        out.extend((self.id.len() as u16).to_be_bytes());
        out.extend((self.name.len() as u16).to_be_bytes());
        out.extend(self.date.0.to_be_bytes());
        out.extend(self.date.1.to_be_bytes());
        out.extend(self.vm_clock.to_be_bytes());
        let short = u32::try_from(self.vm_state_size).unwrap_or(u32::MAX);
        out.extend(short.to_be_bytes());
        out.extend((extra.len() as u32).to_be_bytes());
        out.extend(extra);
        out.extend(self.id.as_bytes());
        out.extend(self.name.as_bytes());
        out.resize(out.len().next_multiple_of(8), 0);
    }
}

impl Image {
    /// The snapshots inside the image, as the file has them, and the bytes that their table takes.
    pub(crate) async fn snapshot_table(&self) -> io::Result<(Vec<Snapshot>, u64)> {
        let header = self.header();
        let (n, offset) = (header.snapshots, header.snapshots_offset);
        if n == 0 {
            return Ok((Vec::new(), 0));
        }
        if n > MAX_SNAPSHOTS {
            return Err(Error::Field {
                what: "the number of snapshots",
                value: n.into(),
                allowed: "at most 65536 are allowed",
            }
            .into());
        }
        if !offset.is_multiple_of(self.cluster()) {
            return Err(Error::Field {
                what: "the offset of the snapshot table",
                value: offset,
                allowed: "a multiple of the size of a cluster is allowed",
            }
            .into());
        }
        let most = FIXED + MAX_EXTRA + 2 * usize::from(u16::MAX);
        let len = self
            .file
            .size()
            .saturating_sub(offset)
            .min(MAX_TABLE)
            .min(u64::from(n) * most as u64);
        // Most tables are short: a piece is read first.
        let mut have = len.min(64 << 10);
        loop {
            let bytes = self
                .read_metadata(offset, have, "the snapshot table")
                .await?;
            let (mut out, mut at) = (Vec::new(), 0);
            let result = loop {
                if out.len() == n as usize {
                    break Ok(());
                }
                match parse(&bytes[at.min(bytes.len())..]) {
                    Ok((s, len)) => {
                        out.push(s);
                        at += len;
                    }
                    Err(e) => break Err(e),
                }
            };
            match result {
                Ok(()) => return Ok((out, at as u64)),
                Err(Error::Short(_)) if have < len => have = len,
                Err(e) => return Err(e.into()),
            }
        }
    }

    /// The snapshots inside the image.
    pub async fn snapshots(&self) -> io::Result<Vec<Snapshot>> {
        Ok(self.snapshot_table().await?.0)
    }
}

// What follows changes an image of which no request may be in flight. Reference counts, flags and tables cannot change
// all at once: the header says "dirty" meanwhile, and whoever opens the image after a power cut makes the counts anew.
// (Version 2 has no such bit: there may be leaks and wrong flags then, which a check repairs.) The guest's disk
// changes with one write of the header.

impl Image {
    /// Makes a snapshot of the disk. `date` is in seconds and nanoseconds since 1970.
    pub async fn create_snapshot(&self, name: &str, date: (u32, u32)) -> io::Result<Snapshot> {
        let bits = self.layout.cluster_bits;
        let (mut all, _) = self.begin().await?;
        let invalid = |message: String| io::Error::new(io::ErrorKind::InvalidInput, message);
        if name.is_empty() || name.len() > usize::from(u16::MAX) {
            return Err(invalid("a snapshot's name has 1 to 65535 bytes".into()));
        }
        if all.iter().any(|s| s.name == name || s.id == name) {
            return Err(io::Error::new(
                io::ErrorKind::AlreadyExists,
                format!(
                    "there is a snapshot '{name}' already: choose another name, or delete it first"
                ),
            ));
        }
        if all.len() >= MAX_SNAPSHOTS as usize {
            return Err(invalid("there are 65536 snapshots, and no more fit".into()));
        }
        if self.with_refs(|w| Ok(w.refs.max())).await? < 2 {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "the image has reference counts of one bit, which leaves no room for snapshots",
            ));
        }
        let largest = all.iter().filter_map(|s| s.id.parse::<u64>().ok()).max();
        let id = largest.unwrap_or(0).saturating_add(1).to_string();
        let mut snapshot = Snapshot::new(id, name.to_owned(), date, self.size());
        self.set_dirty(true).await?;
        let entries = self.header().l1_entries as usize;
        let l1: Vec<u64> = (0..entries)
            .map(|i| self.tables.l1(i) & OFFSET_MASK)
            .collect();
        if let Err(e) = self.count_tree(&l1, true).await {
            return Err(self.take_back(e).await);
        }
        let first = self.write_l1(&l1).await?;
        snapshot.l1_offset = first << bits;
        snapshot.l1_entries = entries as u32;
        all.push(snapshot.clone());
        self.fix_flags(false).await?;
        self.flush_all().await?;
        self.write_snapshots(&all, all.len()).await?;
        self.set_dirty(false).await?;
        Ok(snapshot)
    }

    /// Makes the disk what it was when the snapshot was made. `which` is an id or a name.
    pub async fn apply_snapshot(&self, which: &str) -> io::Result<Snapshot> {
        let (all, at) = self.begin_with(which).await?;
        let snapshot = all[at].clone();
        let size = snapshot.disk_size.unwrap_or(self.size());
        // Anything may be different.
        self.mark_dirty(0, self.size());
        if size > self.size() {
            self.resize(size).await?;
            self.mark_dirty(0, size);
        }
        let mut new = self.snapshot_l1(&snapshot).await?;
        let old_header = self.header();
        self.set_dirty(true).await?;
        if let Err(e) = self.count_tree(&new, true).await {
            return Err(self.take_back(e).await);
        }
        new.resize(new.len().max(old_header.l1_entries as usize), 0);
        let first = self.write_l1(&new).await?;
        self.flush_all().await?;
        let old: Vec<u64> = (0..old_header.l1_entries as usize)
            .map(|i| self.tables.l1(i) & OFFSET_MASK)
            .collect();
        {
            let mut meta = self.meta();
            meta.header.l1_offset = first << self.layout.cluster_bits;
            meta.header.l1_entries = new.len() as u32;
            meta.header_changes += 1;
            meta.order.clear();
            for (i, entry) in new.iter().enumerate() {
                self.tables.put(i, None);
                self.tables.set_l1(i, *entry);
            }
        }
        self.write_header().await?;
        self.forget_decompressed();
        self.count_tree(&old, false).await?;
        let old_bytes = u64::from(old_header.l1_entries) * 8;
        self.unref_bytes(old_header.l1_offset, old_bytes).await?;
        self.fix_flags(false).await?;
        self.flush_all().await?;
        self.set_dirty(false).await?;
        if size < self.size() {
            self.resize(size).await?;
        }
        Ok(snapshot)
    }

    /// Deletes a snapshot, and gives back what it alone had. `which` is an id or a name.
    pub async fn delete_snapshot(&self, which: &str) -> io::Result<Snapshot> {
        let (mut all, at) = self.begin_with(which).await?;
        let l1 = self.snapshot_l1(&all[at]).await?;
        self.set_dirty(true).await?;
        // It goes to the end first: then the table is right with it and without it.
        let snapshot = all.remove(at);
        let left = all.len();
        all.push(snapshot.clone());
        self.write_snapshots(&all, left).await?;
        self.count_tree(&l1, false).await?;
        self.unref_bytes(snapshot.l1_offset, u64::from(snapshot.l1_entries) * 8)
            .await?;
        self.fix_flags(false).await?;
        self.flush_all().await?;
        self.set_dirty(false).await?;
        Ok(snapshot)
    }

    async fn begin(&self) -> io::Result<(Vec<Snapshot>, u64)> {
        if self.meta().writing.is_none() {
            return Err(read_only());
        }
        if self.layout.external {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "an image with an external data file has no snapshots inside: its data has one place only",
            ));
        }
        self.settle().await?;
        self.snapshot_table().await
    }

    async fn begin_with(&self, which: &str) -> io::Result<(Vec<Snapshot>, usize)> {
        let (all, _) = self.begin().await?;
        let by_id = all.iter().position(|s| s.id == which);
        let at = by_id.or_else(|| all.iter().position(|s| s.name == which));
        match at {
            Some(at) => Ok((all, at)),
            None => Err(io::Error::new(
                io::ErrorKind::NotFound,
                format!(
                    "there is no snapshot '{}': see the list of snapshots",
                    which.escape_debug()
                ),
            )),
        }
    }

    async fn set_dirty(&self, dirty: bool) -> io::Result<()> {
        self.meta().header.dirty = dirty && self.version >= 3;
        self.write_header().await
    }

    /// Counts were raised in part: they are made anew.
    async fn take_back(&self, error: io::Error) -> io::Error {
        match self.check(Repair::All, CHECK_MEMORY).await {
            Ok(_) => error,
            Err(again) => again,
        }
    }

    async fn snapshot_l1(&self, snapshot: &Snapshot) -> io::Result<Vec<u64>> {
        let bytes = u64::from(snapshot.l1_entries) * 8;
        if bytes > MAX_L1 || !snapshot.l1_offset.is_multiple_of(self.cluster()) {
            return Err(Error::Field {
                what: "the place of a snapshot's L1 table",
                value: snapshot.l1_offset,
                allowed: "it is corrupt",
            }
            .into());
        }
        let bytes = self
            .read_metadata(snapshot.l1_offset, bytes, "a snapshot's L1 table")
            .await?;
        Ok(words(&bytes).map(|w| w & OFFSET_MASK).collect())
    }

    /// Writes an L1 table to a new place, and returns its first cluster.
    async fn write_l1(&self, l1: &[u64]) -> io::Result<u64> {
        let bytes: Vec<u8> = l1.iter().flat_map(|w| w.to_be_bytes()).collect();
        self.write_table(bytes).await
    }

    pub(crate) async fn write_table(&self, mut bytes: Vec<u8>) -> io::Result<u64> {
        let clusters = (bytes.len() as u64).div_ceil(self.cluster()).max(1);
        bytes.resize((clusters * self.cluster()) as usize, 0);
        let run = self
            .with_refs(|w| w.alloc.take_exactly(&mut w.refs, clusters))
            .await?;
        self.grow_to_end().await?;
        let offset = run.first << self.layout.cluster_bits;
        self.file.write(offset, buffer_of(&bytes)).await?;
        Ok(run.first)
    }

    /// Writes a new snapshot table, of which the first `n` count, and makes it the one of the image.
    async fn write_snapshots(&self, all: &[Snapshot], n: usize) -> io::Result<()> {
        let old = self.header();
        let (_, old_len) = self.snapshot_table().await?;
        let mut bytes = Vec::new();
        let mut used = 0;
        for (i, s) in all.iter().enumerate() {
            s.encode(&mut bytes);
            if i < n {
                used = bytes.len() as u64;
            }
        }
        let len = bytes.len() as u64;
        let first = self.write_table(bytes).await?;
        self.flush_all().await?;
        // The place first, then the number: the new table begins with what the old one had, or ends with what
        // goes.
        self.meta().header.snapshots_offset = first << self.layout.cluster_bits;
        self.write_header().await?;
        self.meta().header.snapshots = n as u32;
        self.write_header().await?;
        if n == 0 {
            self.meta().header.snapshots_offset = 0;
            self.write_header().await?;
        }
        // What the table has for those that went.
        let used = used.next_multiple_of(self.cluster());
        let offset = first << self.layout.cluster_bits;
        self.unref_bytes(offset + used, len.saturating_sub(used))
            .await?;
        self.unref_bytes(old.snapshots_offset, old_len).await
    }

    async fn unref_bytes(&self, offset: u64, len: u64) -> io::Result<()> {
        self.unref(Unref {
            first: offset >> self.layout.cluster_bits,
            clusters: len.div_ceil(self.cluster()),
            reason: Reason::Snapshot,
        })
        .await
    }

    /// Adds or drops a reference to everything that an L1 table leads to.
    async fn count_tree(&self, l1: &[u64], add: bool) -> io::Result<()> {
        let layout = self.layout;
        for (index, &table) in l1.iter().enumerate().filter(|(_, t)| **t != 0) {
            if !table.is_multiple_of(self.cluster()) {
                return Err(Error::Corrupt {
                    what: "the L1 entry",
                    at: index as u64 * layout.span(),
                    value: table,
                }
                .into());
            }
            let bytes = self
                .read_metadata(table, self.cluster(), "an L2 table")
                .await?;
            let all: Vec<u64> = words(&bytes).collect();
            let mut places = vec![(table >> layout.cluster_bits, 1)];
            for i in 0..1usize << layout.table_bits() {
                let entry = Entry {
                    word: all[layout.words(i, 1).start],
                    bitmap: 0,
                };
                places.extend(layout.references(entry));
            }
            for (first, clusters) in places {
                if !self.is_place(
                    first << layout.cluster_bits,
                    clusters << layout.cluster_bits,
                ) && !add
                {
                    continue;
                }
                if !add {
                    let reason = Reason::Snapshot;
                    self.unref(Unref {
                        first,
                        clusters,
                        reason,
                    })
                    .await?;
                    continue;
                }
                for c in first..first + clusters {
                    self.with_refs(|w| {
                        let count = w.refs.get(c)?;
                        w.refs.set(c, count.saturating_add(1))
                    })
                    .await?;
                }
            }
            vdisk_io::give_way().await;
            if add {
                self.commit_if_full().await?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn snapshots_survive_being_written() {
        let mut s = Snapshot::new("1".into(), "before the upgrade".into(), (7, 8), 1 << 30);
        s.vm_state_size = 1 << 40;
        s.icount = Some(5);
        s.l1_offset = 0x30000;
        s.l1_entries = 2;
        let mut bytes = Vec::new();
        s.encode(&mut bytes);
        s.encode(&mut bytes);
        let (first, len) = parse(&bytes).unwrap();
        s.extra = first.extra.clone();
        assert_eq!((&first, 2 * len), (&s, bytes.len()));
        for cut in 0..len - 8 {
            assert!(parse(&bytes[..cut]).is_err());
        }
    }
}
