//! Changing the size of the guest's disk.

use std::io;
use std::ops::Range;

use crate::create::Preallocation;
use crate::error::Error;
use crate::header::MAX_L1;
use crate::image::{Image, silent};
use crate::meta::{Reason, Unref};
use crate::storage::{Step, before, buffer_of};
use crate::write::read_only;

impl Image {
    /// Changes the size of the disk, in bytes, a multiple of 512. What is new reads as zeroes; what is cut off is
    /// lost. No request may be in flight. Durable when it returns.
    pub async fn resize(&self, size: u64) -> io::Result<()> {
        let header = self.header();
        let before = self.size();
        if self.meta().writing.is_none() {
            return Err(read_only());
        }
        if !size.is_multiple_of(512) {
            return Err(Error::Field {
                what: "the size of the disk",
                value: size,
                allowed: "a multiple of 512 is allowed",
            }
            .into());
        }
        if size < before && header.snapshots > 0 && self.version < 3 {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "images of version 2 with snapshots cannot be made smaller: their snapshots do not say how large they are",
            ));
        }
        let entries = header.l1_entries_for(size);
        if entries * 8 > MAX_L1 {
            return Err(Error::TooLarge.into());
        }
        self.prepare_bitmaps(size).await?;
        if size < before {
            // Nothing of what is cut off may come back when the disk grows again.
            let whole = size.next_multiple_of(self.cluster());
            if whole > size {
                self.zero_new(size, whole.min(before)).await?;
            }
            // In a raw data file they keep their places: as long as the disk has them it has their data.
            if whole < before && !self.raw_data {
                self.cut_off(whole..before.next_multiple_of(self.cluster()))
                    .await?;
            }
            self.flush_all().await?;
        } else {
            if entries > u64::from(header.l1_entries) {
                self.grow_l1(entries).await?;
            }
            let old_data = self.data.size();
            self.grow_data(size).await?;
            // The rest of the last cluster was never seen, and may be anything; the backing file may be
            // longer than the disk was.
            let backing = self.backing().map_or(0, |b| b.size());
            let last = before.next_multiple_of(self.cluster());
            let end = if self.has_backing() {
                last.max(backing)
            } else {
                last
            };
            // The data file may have been longer than the disk.
            let end = if self.raw_data {
                end.max(old_data)
            } else {
                end
            };
            let end = end.min(size);
            self.set_size(size);
            let prepared = self.prepare_new(before..size, end).await;
            self.set_size(before);
            prepared?;
            self.flush_all().await?;
        }
        self.change_header(|h| h.size = size);
        if let Err(e) = self.write_header().await {
            self.change_header(|h| h.size = before);
            let _ = self.write_header().await;
            return Err(e);
        }
        self.set_size(size);
        self.fit_bitmaps(size);
        if self.layout.external && size < before && self.data.grows() {
            // The disk has its new size already; what the data file has beyond it does no harm.
            if let Err(error) = self.data.set_size(size).await {
                tracing::warn!(%error, size, "the external data file cannot be made smaller");
            }
        }
        Ok(())
    }

    /// Makes sure that an external data file has a place for every byte of a disk of `size` bytes.
    pub(crate) async fn grow_data(&self, size: u64) -> io::Result<()> {
        if !self.layout.external || self.data.size() >= size {
            return Ok(());
        }
        if !self.data.grows() {
            return Err(io::Error::new(
                io::ErrorKind::StorageFull,
                format!(
                    "the external data file has {} bytes, and cannot grow to the {size} of the disk",
                    self.data.size()
                ),
            ));
        }
        self.data.set_size(size).await
    }

    /// Makes what is new of the disk read as zeroes; up to `end` it may not do so by itself.
    async fn prepare_new(&self, new: Range<u64>, end: u64) -> io::Result<()> {
        if end > new.start {
            self.zero_new(new.start, end).await?;
        }
        if self.raw_data {
            // A write there must be in the disk if it is in the data file, power cut or not.
            self.preallocate(new, Preallocation::Metadata, false, &silent)
                .await?;
        }
        Ok(())
    }

    async fn zero_new(&self, from: u64, to: u64) -> io::Result<()> {
        match self.write_zeroes(from, to - from, true).await {
            Err(e) if e.kind() == io::ErrorKind::Unsupported => {
                // Version 2 has no zero clusters.
                const PIECE: u64 = 1 << 20;
                let mut at = from;
                while at < to {
                    let n = PIECE.min(to - at);
                    self.write(at, crate::storage::buffer(n as usize)).await?;
                    at += n;
                }
                Ok(())
            }
            other => other,
        }
    }

    /// Moves the L1 table to a place with room for `entries`.
    async fn grow_l1(&self, entries: u64) -> io::Result<()> {
        self.flush_all().await?;
        let bits = self.layout.cluster_bits;
        let clusters = (entries * 8).div_ceil(self.cluster());
        before(&*self.file, Step::L1GrowAllocTable, 0, 0).await?;
        let run = self
            .with_refs(|w| w.alloc.take_exactly(&mut w.refs, clusters))
            .await?;
        self.grow_to_end().await?;
        let table: Vec<u8> = (0..entries as usize)
            .flat_map(|i| self.tables.l1(i).to_be_bytes())
            .collect();
        let (place, data) = (run.first << bits, buffer_of(&table));
        before(&*self.file, Step::L1GrowWriteTable, place, entries * 8).await?;
        self.file.write(place, data).await?;
        // The counts, and the new table.
        self.flush_all().await?;
        let old = self.header();
        before(&*self.file, Step::L1GrowActivateTable, 0, 0).await?;
        // The place first, then the length: with one of them the header is right in between, too.
        self.change_header(|h| h.l1_offset = place);
        self.write_header().await?;
        self.change_header(|h| h.l1_entries = entries as u32);
        self.write_header().await?;
        if let Some(w) = &mut self.meta().writing {
            let old_clusters = (u64::from(old.l1_entries) * 8).div_ceil(self.cluster());
            w.add_unused(Unref {
                first: old.l1_offset >> bits,
                clusters: old_clusters,
                reason: Reason::Other,
            });
        }
        Ok(())
    }
}
