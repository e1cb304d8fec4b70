//! Persistent dirty bitmaps (specification, "Bitmaps").
//!
//! A bitmap that records writes is loaded when its image is made ready to be written. From then on the file says that it
//! is in use: if the process ends without a word, nobody takes what is in the file for the truth. When the image is closed
//! the bitmap is stored anew, and only then is the mark taken away.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::{Error, Result};
use crate::image::{Image, words};
use crate::mapping::OFFSET_MASK;
use crate::meta::{Reason, Unref};
use crate::storage::buffer_of;

/// The longest directory and the longest table that are read, in bytes. (QEMU has about the same limits.)
const MAX_DIRECTORY: u64 = 64 << 20;
const MAX_TABLE: u64 = 64 << 20;

/// Bitmaps that an image may have. (QEMU has the same limit.)
const MAX_BITMAPS: u32 = 65535;

/// Bytes of bitmaps that one image may have in memory.
const MAX_MEMORY: u64 = 256 << 20;

const FIXED: usize = 24;

// Flags of a bitmap.
const IN_USE: u32 = 1;
const AUTO: u32 = 2;
const EXTRA_DATA_COMPATIBLE: u32 = 4;

/// A table entry without a cluster: all bits are set.
const ALL_ONES: u64 = 1;

/// Where the directory of bitmaps is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BitmapDirectory {
    pub bitmaps: u32,
    /// Bytes.
    pub size: u64,
    pub offset: u64,
}

/// A bitmap, as the directory has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BitmapInfo {
    pub name: String,
    /// Bytes of the disk that one bit stands for.
    pub granularity: u64,
    /// It was not stored by whoever had the image last, and says nothing.
    pub in_use: bool,
    /// It records writes.
    pub auto: bool,
    /// Where its table is, and the number of its entries.
    table: (u64, u32),
    /// Where in the directory it is.
    at: usize,
    flags: u32,
    has_unknown_data: bool,
}

impl BitmapInfo {
    /// Words of 64 bits for a disk of `size` bytes.
    fn words(&self, size: u64) -> u64 {
        size.div_ceil(self.granularity).div_ceil(64)
    }
}

fn too_much(info: &BitmapInfo, memory: u64) -> io::Result<()> {
    if memory <= MAX_MEMORY {
        return Ok(());
    }
    Err(io::Error::new(
        io::ErrorKind::Unsupported,
        format!(
            "bitmap '{}' and those before it take more than 256 MiB of memory: remove it, or make one with a larger granularity",
            info.name.escape_debug()
        ),
    ))
}

/// A bitmap in memory. Some record writes.
pub(crate) struct Active {
    info: BitmapInfo,
    shift: u32,
    /// What its table is to have when it is stored.
    entries: u32,
    bits: Box<[AtomicU64]>,
}

impl Active {
    /// Sets the bits of a range of the disk.
    #[inline]
    fn mark(&self, range: &Range<u64>) {
        let (first, last) = (range.start >> self.shift, (range.end - 1) >> self.shift);
        // Word by word: a guest may zero terabytes with one request.
        for index in first / 64..=last / 64 {
            if let Some(word) = self.bits.get(index as usize) {
                let from = first.max(index * 64) % 64;
                let to = last.min(index * 64 + 63) % 64;
                let mask = u64::MAX << from & u64::MAX >> (63 - to);
                // Mostly it is set already: reading does not take the cache line from others.
                if word.load(Ordering::Relaxed) & mask != mask {
                    word.fetch_or(mask, Ordering::Relaxed);
                }
            }
        }
    }

    /// The bytes of one cluster of the bitmap.
    fn bytes(&self, cluster: usize, index: usize) -> Vec<u8> {
        let per = cluster / 8;
        let words = self.bits.iter().skip(index * per).take(per);
        let mut out: Vec<u8> = words
            .flat_map(|w| w.load(Ordering::Relaxed).to_le_bytes())
            .collect();
        out.resize(cluster, 0);
        out
    }
}

/// Something that takes clusters: what it is, where, and how many bytes.
pub(crate) type Place = (&'static str, u64, u64);

fn number(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |v, b| v << 8 | u64::from(*b))
}

fn parse(bytes: &[u8], count: u32) -> Result<Vec<BitmapInfo>> {
    let short = || Error::Short("the directory of bitmaps");
    let field = |what, value, allowed| {
        Err(Error::Field {
            what,
            value,
            allowed,
        })
    };
    if count > MAX_BITMAPS {
        return field(
            "the number of bitmaps",
            count.into(),
            "at most 65535 are allowed",
        );
    }
    let mut out = Vec::new();
    let mut at = 0usize;
    let mut all_entries = 0;
    for _ in 0..count {
        let entry = bytes.get(at..at + FIXED).ok_or_else(short)?;
        let (flags, kind, bits) = (number(&entry[12..16]) as u32, entry[16], entry[17]);
        let (name_len, extra) = (
            number(&entry[18..20]) as usize,
            number(&entry[20..24]) as usize,
        );
        let entries = number(&entry[8..12]) as u32;
        if kind != 1 {
            return field(
                "the type of a bitmap",
                kind.into(),
                "1 (dirty tracking) exists",
            );
        }
        if !(9..=31).contains(&bits) {
            return field(
                "the granularity of a bitmap",
                bits.into(),
                "9 to 31 bits are allowed",
            );
        }
        // Of all together: many may name the same table.
        all_entries += u64::from(entries);
        if all_entries * 8 > MAX_TABLE {
            return field(
                "the number of entries of the bitmap tables",
                all_entries,
                "at most 8388608 are allowed",
            );
        }
        let name_at = at + FIXED + extra;
        let name = bytes.get(name_at..name_at + name_len).ok_or_else(short)?;
        out.push(BitmapInfo {
            name: String::from_utf8_lossy(name).into_owned(),
            granularity: 1 << bits,
            in_use: flags & IN_USE != 0,
            auto: flags & AUTO != 0,
            table: (number(&entry[..8]), entries),
            at,
            flags,
            has_unknown_data: extra > 0 && flags & EXTRA_DATA_COMPATIBLE == 0,
        });
        at = (name_at + name_len).next_multiple_of(8);
    }
    Ok(out)
}

impl Image {
    /// The bitmaps of the image, as the file has them.
    pub async fn bitmaps(&self) -> io::Result<Vec<BitmapInfo>> {
        let Some(dir) = self.header().bitmaps else {
            return Ok(Vec::new());
        };
        if dir.size > MAX_DIRECTORY {
            return Err(Error::Field {
                what: "the size of the directory of bitmaps",
                value: dir.size,
                allowed: "at most 64 MiB are allowed",
            }
            .into());
        }
        let bytes = self
            .read_metadata(dir.offset, dir.size, "the directory of bitmaps")
            .await?;
        Ok(parse(&bytes, dir.bitmaps)?)
    }

    async fn bitmap_table(&self, b: &BitmapInfo) -> io::Result<Vec<u64>> {
        let (offset, entries) = b.table;
        let bytes = self
            .read_metadata(offset, u64::from(entries) * 8, "a bitmap table")
            .await?;
        Ok(words(&bytes).collect())
    }

    /// Everything that the bitmaps take in the file; None if there are none.
    pub(crate) async fn bitmap_places(&self) -> io::Result<Option<Vec<Place>>> {
        let Some(dir) = self.header().bitmaps else {
            return Ok(None);
        };
        let mut places = vec![("the directory of bitmaps", dir.offset, dir.size)];
        for b in self.bitmaps().await? {
            places.push(("a bitmap table", b.table.0, u64::from(b.table.1) * 8));
            for word in self.bitmap_table(&b).await? {
                if word & OFFSET_MASK != 0 {
                    places.push(("a bitmap", word & OFFSET_MASK, self.cluster()));
                }
            }
        }
        Ok(Some(places))
    }

    /// Loads the bitmaps that record writes, and marks them as in use in the file.
    pub(crate) async fn load_bitmaps(&self) -> io::Result<()> {
        self.load_bitmaps_if(|b| b.auto).await
    }

    /// Takes those into memory that are not there yet, and `wanted`.
    async fn load_bitmaps_if(&self, wanted: impl Fn(&BitmapInfo) -> bool) -> io::Result<()> {
        let cluster = self.cluster() as usize;
        let mut active: Vec<Arc<Active>> = match &*self.active_bitmaps.load() {
            Some(all) => all.to_vec(),
            None => Vec::new(),
        };
        let have = active.len();
        let mut memory: u64 = active.iter().map(|b| b.bits.len() as u64 * 8).sum();
        for info in self.bitmaps().await? {
            // What nobody stored says nothing, now and later.
            if info.in_use || !wanted(&info) {
                continue;
            }
            if info.has_unknown_data {
                return Err(io::Error::new(
                    io::ErrorKind::Unsupported,
                    format!(
                        "bitmap '{}' has data of an unknown kind",
                        info.name.escape_debug()
                    ),
                ));
            }
            let words_needed = info.words(self.size());
            memory += words_needed * 8;
            too_much(&info, memory)?;
            let table = self.bitmap_table(&info).await?;
            if table.len() as u64 != (words_needed * 8).div_ceil(cluster as u64) {
                return Err(Error::Field {
                    what: "the number of entries of a bitmap table",
                    value: table.len() as u64,
                    allowed: "it does not fit the size of the disk",
                }
                .into());
            }
            let per = cluster / 8;
            let mut all = Vec::with_capacity(words_needed as usize);
            for entry in &table {
                let want = (words_needed as usize - all.len()).min(per);
                let offset = entry & OFFSET_MASK;
                if offset == 0 {
                    let fill = if entry & ALL_ONES != 0 { u64::MAX } else { 0 };
                    all.extend(std::iter::repeat_n(fill, want));
                    continue;
                }
                let bytes = self
                    .read_metadata(offset, cluster as u64, "a bitmap")
                    .await?;
                let (chunks, _) = bytes.as_chunks::<8>();
                all.extend(chunks.iter().take(want).map(|c| u64::from_le_bytes(*c)));
            }
            active.push(Arc::new(Active {
                shift: info.granularity.trailing_zeros(),
                entries: info.table.1,
                bits: all.into_iter().map(AtomicU64::new).collect(),
                info,
            }));
        }
        if active.len() == have {
            return Ok(());
        }
        for b in &active[have..] {
            self.write_bitmap_flags(&b.info, b.info.flags | IN_USE)
                .await?;
        }
        self.file.flush().await?;
        self.active_bitmaps.store(Some(Arc::new(active)));
        Ok(())
    }

    /// Before the size of the disk changes: the file says of all bitmaps that they are in use, until they are stored as
    /// they are then.
    pub(crate) async fn prepare_bitmaps(&self, size: u64) -> io::Result<()> {
        self.load_bitmaps_if(|_| true).await?;
        let mut memory = 0;
        for b in self.active_bitmaps.load().iter().flat_map(|all| all.iter()) {
            memory += b.info.words(size) * 8;
            too_much(&b.info, memory)?;
        }
        Ok(())
    }

    /// Makes the bitmaps fit a disk of `size` bytes: what is new is clean. No request is in flight.
    pub(crate) fn fit_bitmaps(&self, size: u64) {
        let Some(old) = self.active_bitmaps.load_full() else {
            return;
        };
        let fit = |b: &Arc<Active>| {
            let words = b.info.words(size);
            let bits = (0..words as usize)
                .map(|i| b.bits.get(i).map_or(0, |w| w.load(Ordering::Relaxed)))
                .map(AtomicU64::new)
                .collect::<Box<[_]>>();
            // Nothing of what is cut off may come back.
            let last = size.div_ceil(b.info.granularity) % 64;
            if let (Some(word), true) = (bits.last(), last > 0) {
                word.fetch_and(u64::MAX >> (64 - last), Ordering::Relaxed);
            }
            Arc::new(Active {
                info: b.info.clone(),
                shift: b.shift,
                entries: (words * 8).div_ceil(self.cluster()) as u32,
                bits,
            })
        };
        let new = old.iter().map(fit).collect();
        self.active_bitmaps.store(Some(Arc::new(new)));
    }

    fn bitmap_at(&self, b: &BitmapInfo) -> u64 {
        self.header().bitmaps.map_or(0, |d| d.offset) + b.at as u64
    }

    async fn write_bitmap_flags(&self, b: &BitmapInfo, flags: u32) -> io::Result<()> {
        let at = self.bitmap_at(b) + 12;
        self.file.write(at, buffer_of(&flags.to_be_bytes())).await
    }

    /// Records that a range of the disk is about to be written.
    #[inline]
    pub fn mark_dirty(&self, offset: u64, len: u64) {
        if let (Some(all), true) = (&*self.active_bitmaps.load(), len > 0) {
            for b in all.iter().filter(|b| b.info.auto) {
                b.mark(&(offset..offset + len));
            }
        }
    }

    /// Stores the bitmaps that were in use. No request is in flight, and none follows.
    pub(crate) async fn store_bitmaps(&self) -> io::Result<()> {
        let Some(all) = self.active_bitmaps.load_full() else {
            return Ok(());
        };
        let bits = self.layout.cluster_bits;
        let cluster = self.cluster() as usize;
        let mut old = Vec::new();
        let mut new = Vec::new();
        for b in all.iter() {
            let (offset, entries) = b.info.table;
            let before = self.bitmap_table(&b.info).await?;
            old.extend(before.iter().map(|w| w & OFFSET_MASK).filter(|w| *w != 0));
            old.extend(
                (0..(u64::from(entries) * 8).div_ceil(cluster as u64))
                    .map(|i| offset + i * cluster as u64),
            );
            let mut table = Vec::new();
            for index in 0..b.entries as usize {
                let bytes = b.bytes(cluster, index);
                if bytes.iter().all(|b| *b == 0) {
                    table.push(0);
                    continue;
                }
                let run = self.allocate(1).await?;
                self.file
                    .write(run.first << bits, buffer_of(&bytes))
                    .await?;
                table.push(run.first << bits);
            }
            let bytes = table.iter().flat_map(|w: &u64| w.to_be_bytes()).collect();
            new.push(self.write_table(bytes).await? << bits);
        }
        // The counts of the new places, and what is there, before anything refers to it; the places before it is said
        // that they are right.
        self.flush().await?;
        for (b, table) in all.iter().zip(&new) {
            let mut place = table.to_be_bytes().to_vec();
            place.extend(b.entries.to_be_bytes());
            let at = self.bitmap_at(&b.info);
            self.file.write(at, buffer_of(&place)).await?;
        }
        self.file.flush().await?;
        for b in all.iter() {
            self.write_bitmap_flags(&b.info, b.info.flags & !IN_USE)
                .await?;
        }
        self.file.flush().await?;
        self.active_bitmaps.store(None);
        for offset in old {
            self.unref(Unref {
                first: offset >> bits,
                clusters: 1,
                reason: Reason::Other,
            })
            .await?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn marks_are_the_bits_of_the_range(start in 0u64..5000, len in 1u64..5000) {
            let info = BitmapInfo {
                name: String::new(),
                granularity: 8,
                in_use: false,
                auto: true,
                table: (0, 0),
                at: 0,
                flags: 0,
                has_unknown_data: false,
            };
            let b = Active {
                info,
                shift: 3,
                entries: 1,
                bits: (0..16).map(|_| AtomicU64::new(0)).collect(),
            };
            b.mark(&(start..start + len));
            for bit in 0..1024u64 {
                let set = b.bits[bit as usize / 64].load(Ordering::Relaxed) >> (bit % 64) & 1 != 0;
                prop_assert_eq!(set, bit * 8 < start + len && start < (bit + 1) * 8);
            }
        }
    }
}
