//! Persistent dirty bitmaps (specification, "Bitmaps").
//!
//! A bitmap that records writes is loaded when its image is made ready to be written. From then on the file says that it
//! is in use: if the process ends without a word, nobody takes what is in the file for the truth. When the image is closed
//! the bitmap is stored anew, and only then is the mark taken away.

use std::io;
use std::sync::Arc;

use vdisk_io::{Bits, Recorder};

use crate::error::{Error, Result};
use crate::header::AUTOCLEAR_BITMAPS;
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

/// A bitmap in memory.
pub(crate) struct Active {
    info: BitmapInfo,
    recorder: Arc<Recorder>,
}

/// The bitmaps in memory.
#[derive(Default)]
pub(crate) struct Live {
    all: Vec<Arc<Active>>,
    /// Some are there that the directory does not have, or the other way round.
    changed: bool,
    /// Those of the directory that are not wanted any more.
    removed: Vec<String>,
}

/// The bytes of one cluster of a bitmap.
fn cluster_bytes(bits: &Bits, cluster: usize, index: usize) -> Vec<u8> {
    let per = cluster / 8;
    let words = bits.words().skip(index * per).take(per);
    let mut out: Vec<u8> = words.flat_map(u64::to_le_bytes).collect();
    out.resize(cluster, 0);
    out
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

    /// Loads the bitmaps that record writes, and the others if there is room for them, and marks them as in use in the file.
    pub(crate) async fn load_bitmaps(&self) -> io::Result<()> {
        self.load_bitmaps_if(false).await
    }

    fn live(&self) -> Arc<Live> {
        self.active_bitmaps.load_full().unwrap_or_default()
    }

    /// Bytes of memory that further bitmaps may take.
    pub fn room_for_bitmaps(&self) -> u64 {
        MAX_MEMORY.saturating_sub(Image::memory(&self.live()))
    }

    fn memory(live: &Live) -> u64 {
        live.all
            .iter()
            .map(|b| b.info.words(b.recorder.bits().size()) * 8)
            .sum()
    }

    /// Takes those into memory that are not there yet, `all` of them or those that record and what fits beside them.
    async fn load_bitmaps_if(&self, all: bool) -> io::Result<()> {
        let live = self.live();
        let mut active = live.all.clone();
        let have = active.len();
        let mut memory = Image::memory(&live);
        let mut wanted = self.bitmaps().await?;
        // Those that must be there first.
        wanted.sort_by_key(|b| !b.auto);
        for info in wanted {
            let is_here = active.iter().any(|b| b.info.name == info.name);
            // What nobody stored says nothing, now and later.
            if info.in_use || is_here || live.removed.contains(&info.name) {
                continue;
            }
            let must = all || info.auto;
            if info.has_unknown_data {
                if !must {
                    continue;
                }
                return Err(io::Error::new(
                    io::ErrorKind::Unsupported,
                    format!(
                        "bitmap '{}' has data of an unknown kind",
                        info.name.escape_debug()
                    ),
                ));
            }
            let more = memory + info.words(self.size()) * 8;
            if !must && more > MAX_MEMORY {
                continue;
            }
            memory = more;
            too_much(&info, memory)?;
            let bits = self.read_bits(&info).await?;
            active.push(Arc::new(Active {
                recorder: Recorder::new(bits, info.auto),
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
        self.active_bitmaps.store(Some(Arc::new(Live {
            all: active,
            changed: live.changed,
            removed: live.removed.clone(),
        })));
        Ok(())
    }

    async fn read_bits(&self, info: &BitmapInfo) -> io::Result<Bits> {
        let cluster = self.cluster() as usize;
        let words_needed = info.words(self.size());
        let table = self.bitmap_table(info).await?;
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
        Ok(Bits::from_words(
            self.size(),
            info.granularity,
            all.into_iter(),
        ))
    }

    /// The bitmaps in memory, by name.
    pub fn live_bitmaps(&self) -> Vec<(String, Arc<Recorder>)> {
        let live = self.live();
        let all = live.all.iter();
        all.map(|b| (b.info.name.clone(), b.recorder.clone()))
            .collect()
    }

    /// Adds a bitmap, which is stored when the image is closed. `granularity` is in bytes, a power of two.
    pub fn add_bitmap(&self, name: &str, granularity: u64, recording: bool) -> io::Result<()> {
        let unsupported = |why: &str| Err(io::Error::new(io::ErrorKind::Unsupported, why));
        let header = self.header();
        if self.version < 3 {
            return unsupported(
                "images of version 2 have no bitmaps: make it version 3 with 'vdiskctl image amend'",
            );
        }
        if header.unknown_extensions > 0 {
            return unsupported(
                "the header has extensions of an unknown kind, which would be lost",
            );
        }
        if self.meta().writing.is_none() {
            return Err(crate::write::read_only());
        }
        let live = self.live();
        let info = BitmapInfo {
            name: name.to_owned(),
            granularity,
            in_use: false,
            auto: recording,
            table: (0, 0),
            at: 0,
            flags: 0,
            has_unknown_data: false,
        };
        too_much(&info, Image::memory(&live) + info.words(self.size()) * 8)?;
        let mut all = live.all.clone();
        all.push(Arc::new(Active {
            recorder: Recorder::new(Bits::new(self.size(), granularity), recording),
            info,
        }));
        // One of that name that nobody stored says nothing.
        let mut removed = live.removed.clone();
        removed.push(name.to_owned());
        self.active_bitmaps.store(Some(Arc::new(Live {
            all,
            changed: true,
            removed,
        })));
        Ok(())
    }

    /// Removes a bitmap that is in memory; the file follows when the image is closed.
    pub fn remove_bitmap(&self, name: &str) {
        let live = self.live();
        let mut removed = live.removed.clone();
        removed.push(name.to_owned());
        let all = live.all.iter().filter(|b| b.info.name != name);
        self.active_bitmaps.store(Some(Arc::new(Live {
            all: all.cloned().collect(),
            changed: true,
            removed,
        })));
    }

    /// Before the size of the disk changes: the file says of all bitmaps that they are in use, until they are stored as
    /// they are then.
    pub(crate) async fn prepare_bitmaps(&self, size: u64) -> io::Result<()> {
        self.load_bitmaps_if(true).await?;
        let mut memory = 0;
        for b in &self.live().all {
            memory += b.info.words(size) * 8;
            too_much(&b.info, memory)?;
        }
        Ok(())
    }

    /// Makes the bitmaps fit a disk of `size` bytes: what is new is clean. No request is in flight.
    pub(crate) fn fit_bitmaps(&self, size: u64) {
        for b in &self.live().all {
            b.recorder.fit(size);
        }
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
        if let (Some(live), true) = (&*self.active_bitmaps.load(), len > 0) {
            for b in &live.all {
                b.recorder.record(&(offset..offset + len));
            }
        }
    }

    /// Writes the bits of a bitmap to new places; the place of its table, and its entries.
    async fn write_bits(&self, bits: &Bits) -> io::Result<(u64, u32)> {
        let cluster = self.cluster() as usize;
        let words = bits.size().div_ceil(bits.granularity()).div_ceil(64);
        let entries = (words * 8).div_ceil(cluster as u64) as u32;
        let mut table = Vec::new();
        for index in 0..entries as usize {
            let bytes = cluster_bytes(bits, cluster, index);
            if bytes.iter().all(|b| *b == 0) {
                table.push(0);
                continue;
            }
            let run = self.allocate(1).await?;
            let offset = run.first << self.layout.cluster_bits;
            self.file.write(offset, buffer_of(&bytes)).await?;
            table.push(offset);
        }
        let bytes = table.iter().flat_map(|w: &u64| w.to_be_bytes()).collect();
        let table = self.write_table(bytes).await? << self.layout.cluster_bits;
        Ok((table, entries))
    }

    /// The clusters that a bitmap of the directory has.
    async fn clusters_of(&self, info: &BitmapInfo) -> io::Result<Vec<u64>> {
        let (offset, entries) = info.table;
        let cluster = self.cluster();
        let words = self.bitmap_table(info).await?;
        let mut all: Vec<u64> = words
            .iter()
            .map(|w| w & OFFSET_MASK)
            .filter(|w| *w != 0)
            .collect();
        let table = (0..(u64::from(entries) * 8).div_ceil(cluster)).map(|i| offset + i * cluster);
        all.extend(table);
        Ok(all)
    }

    /// Stores the bitmaps that were in use. No request is in flight, and none follows.
    pub(crate) async fn store_bitmaps(&self) -> io::Result<()> {
        let Some(live) = self.active_bitmaps.load_full() else {
            return Ok(());
        };
        let mut old = Vec::new();
        let mut new = Vec::new();
        for b in &live.all {
            if b.info.table.1 > 0 {
                old.extend(self.clusters_of(&b.info).await?);
            }
            new.push(self.write_bits(&b.recorder.bits()).await?);
        }
        match live.changed {
            true => {
                let stored = self.store_directory(&live, &new, &mut old).await;
                if stored.is_err() {
                    // They go on in memory.
                    self.disown_bitmaps().await;
                }
                stored?;
            }
            false => {
                let stored = self.store_in_place(&live.all, &new).await;
                if stored.is_err() {
                    // They go on in memory, and the file may say already that it has them.
                    let mut marked = Ok(());
                    for b in &live.all {
                        let flags = Image::flags_of(b) | IN_USE;
                        marked = marked.and(self.write_bitmap_flags(&b.info, flags).await);
                    }
                    if marked.and(self.file.flush().await).is_err() {
                        self.disown_bitmaps().await;
                    }
                }
                stored?;
            }
        }
        self.active_bitmaps.store(None);
        for offset in old {
            let one = Unref {
                first: offset >> self.layout.cluster_bits,
                clusters: 1,
                reason: Reason::Other,
            };
            // What is stored is stored.
            if let Err(error) = self.unref(one).await {
                tracing::warn!(offset, %error, "the former place of a bitmap cannot be given back");
            }
        }
        Ok(())
    }

    /// Says in the header that the file's bitmaps are not right; if that fails, the next flush says so before it is done.
    pub(crate) async fn disown_bitmaps(&self) {
        self.change_header(|h| h.autoclear &= !AUTOCLEAR_BITMAPS);
        let _ = self.write_header().await;
    }

    fn flags_of(b: &Active) -> u32 {
        let flags = b.info.flags & !(IN_USE | AUTO);
        match b.recorder.is_recording() {
            true => flags | AUTO,
            false => flags,
        }
    }

    /// The directory stays where it is.
    async fn store_in_place(&self, all: &[Arc<Active>], new: &[(u64, u32)]) -> io::Result<()> {
        // The counts of the new places, and what is there, before anything refers to it; the places before it is said
        // that they are right.
        self.flush_all().await?;
        for (b, (table, entries)) in all.iter().zip(new) {
            let mut place = table.to_be_bytes().to_vec();
            place.extend(entries.to_be_bytes());
            let at = self.bitmap_at(&b.info);
            self.file.write(at, buffer_of(&place)).await?;
        }
        self.file.flush().await?;
        for b in all {
            self.write_bitmap_flags(&b.info, Image::flags_of(b)).await?;
        }
        self.file.flush().await
    }

    /// Writes a new directory, with those of the old one that are not in memory.
    async fn store_directory(
        &self,
        live: &Live,
        new: &[(u64, u32)],
        old: &mut Vec<u64>,
    ) -> io::Result<()> {
        let header = self.header();
        let mut bytes = Vec::new();
        let mut count = 0;
        if let Some(dir) = header.bitmaps {
            let before = self
                .read_metadata(dir.offset, dir.size, "the directory of bitmaps")
                .await?;
            let all = self.bitmaps().await?;
            for (i, info) in all.iter().enumerate() {
                if live.removed.contains(&info.name) {
                    old.extend(self.clusters_of(info).await?);
                } else if !live.all.iter().any(|b| b.info.name == info.name) {
                    let end = all.get(i + 1).map_or(before.len(), |next| next.at);
                    bytes.extend(&before[info.at..end]);
                    count += 1;
                }
            }
            let clusters = dir.size.div_ceil(self.cluster());
            old.extend((0..clusters).map(|i| dir.offset + i * self.cluster()));
        }
        for (b, (table, entries)) in live.all.iter().zip(new) {
            bytes.extend(table.to_be_bytes());
            bytes.extend(entries.to_be_bytes());
            // Data of an unknown kind was not loaded.
            let flags = Image::flags_of(b) & AUTO;
            bytes.extend(flags.to_be_bytes());
            bytes.extend([1, b.info.granularity.trailing_zeros() as u8]);
            bytes.extend((b.info.name.len() as u16).to_be_bytes());
            bytes.extend(0u32.to_be_bytes());
            bytes.extend(b.info.name.as_bytes());
            bytes.resize(bytes.len().next_multiple_of(8), 0);
            count += 1;
        }
        let size = bytes.len() as u64;
        let directory = match count {
            0 => None,
            _ => Some(BitmapDirectory {
                bitmaps: count,
                size,
                offset: self.write_table(bytes).await? << self.layout.cluster_bits,
            }),
        };
        self.flush_all().await?;
        // While the header is written anew nobody takes its bitmaps for the truth.
        let set_header = |valid: bool| {
            let mut meta = self.meta();
            meta.header.autoclear &= !AUTOCLEAR_BITMAPS;
            if valid && directory.is_some() {
                meta.header.autoclear |= AUTOCLEAR_BITMAPS;
            }
        };
        set_header(false);
        self.write_header().await?;
        self.meta().header.bitmaps = directory;
        let bytes = self.header().encode()?;
        self.file.write(0, buffer_of(&bytes)).await?;
        self.file.flush().await?;
        set_header(true);
        self.write_header().await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clusters_of_bits_are_little_endian_words() {
        let bits = Bits::new(1 << 20, 512);
        bits.set(&(0..512));
        bits.set(&(9 * 512..10 * 512));
        let bytes = cluster_bytes(&bits, 64, 0);
        assert_eq!(bytes[..3], [1, 2, 0]);
        bits.set(&(512 * 512..513 * 512));
        assert_eq!(cluster_bytes(&bits, 64, 1)[0], 1);
        assert_eq!(cluster_bytes(&bits, 512, 0).len(), 512);
    }
}
