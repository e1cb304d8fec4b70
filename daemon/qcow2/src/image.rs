//! An open image: where its bytes are, and what is in memory of its tables.
//!
//! Invariants:
//! * An L2 table in memory is never older than the one in the file: a table is read under the lock of its
//!   number, and dropped only when everything that changed in it is stored.
//! * An entry of a table refers to a cluster only when all of that cluster's data is written (not yet
//!   durable); in memory it may be a part of the data (see [`crate::partial`]).
//! * A cluster that nothing refers to any more is given to somebody else only when that is durable, and
//!   when every request has ended that may have found it before.

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use arc_swap::ArcSwapOption;
use tokio::sync::Semaphore;
use vdisk_io::{IoVecs, RangeLock};

use crate::amend::Amend;
use crate::bitmap::Live;
use crate::compress::Compression;
use crate::error::{Error, Result};
use crate::header::{Header, MAX_L1};
use crate::mapping::{Entry, Kind, Layout, Mapping, OFFSET_MASK};
use crate::meta::Meta;
use crate::partial::CopySpeed;
use crate::storage::{Missing, Step, Storage, before, buffer, read_or_zero};
use crate::tables::{Table, Tables};

/// How an image is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Bytes of L2 tables kept in memory.
    pub l2_cache: u64,
    /// Bytes of refcount blocks kept in memory.
    pub refcount_cache: u64,
    /// Space that the guest gives up goes back to the storage.
    pub pass_discard_request: bool,
    /// Space of deleted snapshots goes back to the storage.
    pub pass_discard_snapshot: bool,
    /// Space of tables and of clusters that were copied goes back to the storage.
    pub pass_discard_other: bool,
    /// Clusters that the guest discards or zeroes keep their place in the file (not in version 2).
    pub discard_no_unref: bool,
    /// Another time there may be something behind it: what reads as zeroes must say so.
    pub hides_backing: bool,
    /// Bytes of clusters whose copies on write are put off at a time, at most (see [`crate::partial`]); fewer if they could not
    /// be copied in a second.
    pub partial: u64,
    /// Metadata is written in multiples of this many bytes, a power of two.
    pub block_size: usize,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            l2_cache: 32 << 20,
            refcount_cache: 8 << 20,
            pass_discard_request: true,
            pass_discard_snapshot: true,
            pass_discard_other: false,
            discard_no_unref: false,
            hides_backing: false,
            partial: 2 << 30,
            block_size: 512,
        }
    }
}

/// What an image consists of.
pub struct Children {
    /// Its tables, and its data if nothing else is said.
    pub file: Arc<dyn Storage>,
    /// Where guest data goes if it is not in `file` as it is: the external data file, or a cipher before `file`. An image
    /// that needs one can be looked at without it, and neither read nor written.
    pub data: Option<Arc<dyn Storage>>,
    /// What is read where the image has no data.
    pub backing: Option<Arc<dyn Storage>>,
}

impl Children {
    pub fn new(file: Arc<dyn Storage>) -> Children {
        Children {
            file,
            data: None,
            backing: None,
        }
    }
}

/// Told how many bytes of the guest's disk were dealt with so far. Its error ends what is done.
pub type Progress<'a> = &'a dyn Fn(u64) -> io::Result<()>;

pub(crate) fn silent(_: u64) -> io::Result<()> {
    Ok(())
}

/// Where the bytes of a range are, or what must be known first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lookup {
    /// The first `len` (at least one) bytes of the range are of one kind.
    Mapped(Mapping),
    /// This L2 table must be read.
    NeedsTable { index: usize },
}

/// A lookup goes through at most so many entries: a long range of small clusters must not keep a thread.
const MAX_STEPS: usize = 4096;

/// Clusters of one image that are decompressed at a time: bounds the memory that guests can ask for.
const MAX_DECOMPRESSING: usize = 4;

/// An image, used by any number of threads at once.
pub struct Image {
    pub(crate) layout: Layout,
    pub(crate) version: u32,
    pub(crate) compression: Compression,
    pub(crate) options: Options,
    pub(crate) file: Arc<dyn Storage>,
    /// Where guest data is: mostly `file`.
    pub(crate) data: Arc<dyn Storage>,
    /// What was never written to in the file reads as zeroes as guest data, too.
    pub(crate) fresh_is_zero: bool,
    /// Guest data is encrypted.
    pub(crate) encrypted: bool,
    /// The external data file is to be the guest's disk as it is.
    pub(crate) raw_data: bool,
    backing: ArcSwapOption<Arc<dyn Storage>>,
    has_backing: AtomicBool,
    pub(crate) tables: Tables,
    size: AtomicU64,
    meta: Mutex<Meta>,
    /// Clusters of the guest's disk whose entries somebody is about to change.
    pub(crate) clusters: RangeLock,
    /// L1 indices of which the table is being read or made.
    pub(crate) table_loads: RangeLock,
    /// Refcount blocks that are being read.
    pub(crate) block_loads: RangeLock,
    pub(crate) growing: tokio::sync::Mutex<()>,
    pub(crate) committing: tokio::sync::Mutex<()>,
    /// Held by whoever writes the header.
    pub(crate) header_turn: tokio::sync::Mutex<()>,
    /// Held by whoever frees unused clusters.
    pub(crate) tidying: tokio::sync::Mutex<()>,
    /// Counts changes of the tables.
    pub(crate) changes: AtomicU64,
    /// The change up to which everything is durable.
    pub(crate) committed: AtomicU64,
    /// The last change that could not be noted for the next process.
    pub(crate) unnoted: AtomicU64,
    /// The storage has failed a flush that tables were written with: the next flush says so.
    pub(crate) untold: AtomicBool,
    pub(crate) copy_speed: CopySpeed,
    /// Bitmaps that record writes.
    pub(crate) active_bitmaps: ArcSwapOption<Live>,
    decompressing: Semaphore,
    /// The cluster that was decompressed last: its descriptor and its data.
    decompressed: Mutex<Option<(u64, Arc<Vec<u8>>)>>,
}

pub(crate) fn words(bytes: &[u8]) -> impl Iterator<Item = u64> + '_ {
    let (chunks, _) = bytes.as_chunks::<8>();
    chunks.iter().map(|b| u64::from_be_bytes(*b))
}

pub(crate) fn locked<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(|e| e.into_inner())
}

impl Image {
    /// `l1` holds the bytes of the L1 table, `header.l1_entries` of 8 bytes. The image can be read; for writing see
    /// [`Image::activate`].
    pub fn new(header: Header, l1: &[u8], children: Children, options: Options) -> Result<Image> {
        let Children {
            file,
            data,
            backing,
        } = children;
        let fresh_is_zero = data.is_none();
        let data = match data {
            Some(data) => data,
            None if header.external_data => Arc::new(Missing("its external data file")),
            None if header.luks.is_some() => Arc::new(Missing("the key of its encryption")),
            None => file.clone(),
        };
        if l1.len() / 8 < header.l1_entries as usize {
            return Err(Error::Short("the L1 table"));
        }
        let layout = Layout {
            cluster_bits: header.cluster_bits,
            extended: header.extended_l2,
            external: header.external_data,
        };
        let tables = Tables::new((MAX_L1 / 8) as usize);
        for (i, entry) in words(l1).take(header.l1_entries as usize).enumerate() {
            tables.set_l1(i, entry);
        }
        let capacity = usize::try_from(options.l2_cache / layout.cluster()).unwrap_or(usize::MAX);
        Ok(Image {
            layout,
            version: header.version,
            compression: header.compression,
            options: Options {
                block_size: options.block_size.min(layout.cluster() as usize),
                ..options
            },
            file,
            data,
            fresh_is_zero,
            encrypted: header.luks.is_some(),
            raw_data: header.is_raw_data(),
            has_backing: AtomicBool::new(
                backing.is_some() || header.backing_file.is_some() || options.hides_backing,
            ),
            backing: ArcSwapOption::new(backing.map(Arc::new)),
            tables,
            size: AtomicU64::new(header.size),
            meta: Mutex::new(Meta {
                header,
                order: Default::default(),
                capacity: capacity.max(1),
                in_commit: Default::default(),
                header_changes: 0,
                header_stored: 0,
                writing: None,
            }),
            clusters: RangeLock::default(),
            table_loads: RangeLock::default(),
            block_loads: RangeLock::default(),
            growing: Default::default(),
            committing: Default::default(),
            header_turn: Default::default(),
            tidying: Default::default(),
            changes: AtomicU64::new(0),
            committed: AtomicU64::new(0),
            unnoted: AtomicU64::new(0),
            untold: AtomicBool::new(false),
            copy_speed: CopySpeed::default(),
            active_bitmaps: ArcSwapOption::empty(),
            decompressing: Semaphore::new(MAX_DECOMPRESSING),
            decompressed: Mutex::default(),
        })
    }

    /// What the header says at the moment.
    pub fn header(&self) -> Header {
        self.meta().header.clone()
    }

    pub(crate) fn meta(&self) -> MutexGuard<'_, Meta> {
        locked(&self.meta)
    }

    pub(crate) fn tables(&self) -> &Tables {
        &self.tables
    }

    /// What is unallocated may read as something else than zeroes, now or when the image is opened another time.
    pub fn has_backing(&self) -> bool {
        self.has_backing.load(Ordering::Relaxed)
    }

    /// What is behind the image.
    pub(crate) fn backing(&self) -> Option<Arc<dyn Storage>> {
        self.backing.load().as_deref().cloned()
    }

    /// Gives the image another backing file, with a name and a format in the header, or none. What the image does not have
    /// itself reads from that from now on. Everything is durable then. The image is ready to be written, and no request is in
    /// flight.
    pub async fn set_backing(
        &self,
        backing: Option<Arc<dyn Storage>>,
        named: Option<(String, String)>,
    ) -> io::Result<()> {
        let change = Amend {
            backing: Some(named),
            ..Amend::default()
        };
        // Which makes clusters whole first: what they lack comes from what is behind the image now.
        self.amend(&change).await?;
        let has = backing.is_some() || self.header().backing_file.is_some();
        self.has_backing.store(has, Ordering::Relaxed);
        self.backing.store(backing.map(Arc::new));
        Ok(())
    }

    /// Bytes of the guest's disk.
    pub fn size(&self) -> u64 {
        self.size.load(Ordering::Relaxed)
    }

    pub(crate) fn set_size(&self, size: u64) {
        self.size.store(size, Ordering::Relaxed);
    }

    /// Bytes of a cluster.
    pub fn cluster(&self) -> u64 {
        self.layout.cluster()
    }

    /// Where the bytes from `offset` on are, `len` (at least one) at most. The range lies within the disk.
    #[inline]
    pub fn lookup(&self, offset: u64, len: u64) -> Result<Lookup> {
        match self.one(offset)? {
            Lookup::Mapped(m) if m.len < len => self.lookup_more(offset, m, len),
            Lookup::Mapped(m) => Ok(Lookup::Mapped(Mapping { len, ..m })),
            needs => Ok(needs),
        }
    }

    /// What follows what was found, as far as it is of the same kind.
    fn lookup_more(&self, offset: u64, mut found: Mapping, len: u64) -> Result<Lookup> {
        for _ in 1..MAX_STEPS {
            let at = offset.saturating_add(found.len);
            if found.len >= len || at == u64::MAX {
                break;
            }
            // What is known so far is an answer.
            let Lookup::Mapped(next) = self.one(at)? else {
                break;
            };
            match found.join(next) {
                Some(both) => found = both,
                None => break,
            }
        }
        found.len = found.len.min(len);
        Ok(Lookup::Mapped(found))
    }

    /// A lookup at `offset` will follow: has the entry fetched into the CPU's cache. False if there is
    /// no table in memory that has it.
    #[inline]
    pub fn anticipate(&self, offset: u64) -> bool {
        let (index, entry) = self.layout.position(offset);
        self.tables.prefetch(self.layout, index, entry)
    }

    #[inline]
    fn one(&self, at: u64) -> Result<Lookup> {
        let (index, entry) = self.layout.position(at);
        let table = self.tables.l1(index) & OFFSET_MASK;
        if table == 0 {
            let span = self.layout.span();
            return Ok(Lookup::Mapped(Mapping {
                kind: Kind::Unallocated,
                len: span - (at & (span - 1)),
                writable: false,
            }));
        }
        match self.tables.with(index, |t| t.entry(self.layout, entry)) {
            Some(entry) => Ok(Lookup::Mapped(self.layout.decode(entry, at)?)),
            None => Ok(Lookup::NeedsTable { index }),
        }
    }

    /// Makes sure that an L2 table was in memory at one moment.
    pub(crate) async fn load_table(&self, index: usize) -> io::Result<()> {
        let _held = self.table_loads.lock(index as u64..index as u64 + 1).await;
        self.load_table_held(index).await
    }

    /// As [`Image::load_table`], for whoever holds the number of the table.
    pub(crate) async fn load_table_held(&self, index: usize) -> io::Result<()> {
        let l1 = self.tables.l1(index);
        if l1 & OFFSET_MASK == 0 || self.tables.has(index) {
            return Ok(());
        }
        let table = self.read_table(index, l1).await?;
        self.insert_table(index, table);
        Ok(())
    }

    async fn read_table(&self, index: usize, l1: u64) -> io::Result<Arc<Table>> {
        let offset = l1 & OFFSET_MASK;
        if offset & (self.cluster() - 1) != 0 {
            return Err(Error::Corrupt {
                what: "the L1 entry",
                at: index as u64 * self.layout.span(),
                value: l1,
            }
            .into());
        }
        let cluster = self.cluster();
        before(&*self.file, Step::L2Load, offset, cluster).await?;
        let bytes = self.read_metadata(offset, cluster, "an L2 table").await?;
        Ok(Table::new(self.layout, words(&bytes)))
    }

    /// Takes a table in; another that was not used lately goes if there are too many.
    pub(crate) fn insert_table(&self, index: usize, table: Arc<Table>) {
        let mut meta = self.meta();
        if !self.tables.put(index, Some(table)) {
            meta.evict(self, index);
        }
    }

    pub(crate) async fn read_metadata(
        &self,
        offset: u64,
        len: u64,
        what: &'static str,
    ) -> io::Result<Vec<u8>> {
        if offset
            .checked_add(len)
            .is_none_or(|end| end > self.file.size())
        {
            return Err(Error::Short(what).into());
        }
        let iov = buffer(len as usize);
        self.file.read(offset, iov.clone()).await?;
        Ok(iov.to_vec())
    }

    /// The entries of `n` clusters (at least one) from the one that `at` lies in, within one L2 table.
    pub(crate) async fn entries(&self, at: u64, n: usize) -> io::Result<Vec<Entry>> {
        let (index, first) = self.layout.position(at);
        loop {
            if self.tables.l1(index) & OFFSET_MASK == 0 {
                return Ok(vec![Entry::default(); n]);
            }
            let all = |t: &Table| {
                (first..first + n)
                    .map(|i| t.entry(self.layout, i))
                    .collect()
            };
            if let Some(entries) = self.tables.with(index, all) {
                return Ok(entries);
            }
            self.load_table(index).await?;
        }
    }

    // Reading.

    /// The whole cluster around `at`, whose compressed data is here.
    pub(crate) async fn decompress(
        &self,
        at: u64,
        offset: u64,
        len: u64,
    ) -> io::Result<Arc<Vec<u8>>> {
        let last = || {
            let last = locked(&self.decompressed);
            last.as_ref()
                .and_then(|(place, data)| (*place == offset).then(|| data.clone()))
        };
        if let Some(data) = last() {
            return Ok(data);
        }
        let _permit = self.decompressing.acquire().await;
        // Somebody else may have done it meanwhile.
        if let Some(data) = last() {
            return Ok(data);
        }
        let raw = IoVecs::zeroed(len as usize, 512);
        before(&*self.file, Step::ReadCompressed, offset, len).await?;
        read_or_zero(&*self.file, offset, raw.clone()).await?;
        let mut data = vec![0; self.cluster() as usize];
        if !self.compression.decompress(&raw.to_vec(), &mut data) {
            return Err(Error::Compressed(at & !(self.cluster() - 1)).into());
        }
        let data = Arc::new(data);
        *locked(&self.decompressed) = Some((offset, data.clone()));
        Ok(data)
    }

    /// What was decompressed may lie where something else is now.
    pub(crate) fn forget_decompressed(&self) {
        *locked(&self.decompressed) = None;
    }

    /// Reads a range within the disk.
    pub async fn read(&self, offset: u64, iov: IoVecs) -> io::Result<()> {
        let mut done = 0;
        while done < iov.len() {
            let at = offset + done as u64;
            let m = match self.lookup(at, (iov.len() - done) as u64)? {
                Lookup::Mapped(m) => m,
                Lookup::NeedsTable { index } => {
                    self.load_table(index).await?;
                    continue;
                }
            };
            let len = m.len as usize;
            let part = iov.slice(done, len);
            match (m.kind, self.backing()) {
                (Kind::Data(host), _) => {
                    before(&*self.file, Step::ReadAio, host, m.len).await?;
                    read_or_zero(&*self.data, host, part).await?;
                }
                (Kind::Unallocated, Some(backing)) => {
                    before(&*self.file, Step::ReadBackingAio, at, m.len).await?;
                    read_or_zero(&*backing, at, part).await?;
                }
                (Kind::Zero | Kind::Unallocated, _) => part.zero_in_turns().await,
                (Kind::Compressed { offset, len: raw }, _) => {
                    let data = self.decompress(at, offset, raw).await?;
                    let within = (at & (self.cluster() - 1)) as usize;
                    part.copy_from_slice(0, &data[within..within + len]);
                }
            }
            done += len;
        }
        Ok(())
    }

    /// Where a range of the disk is, in pieces that are each of one kind; neighbours of one kind are one piece.
    pub async fn map(&self, range: Range<u64>, most: usize) -> io::Result<Vec<(u64, Mapping)>> {
        let mut out: Vec<(u64, Mapping)> = Vec::new();
        let mut at = range.start;
        while at < range.end {
            let m = match self.lookup(at, range.end - at)? {
                Lookup::Mapped(m) => m,
                Lookup::NeedsTable { index } => {
                    self.load_table(index).await?;
                    continue;
                }
            };
            let both = out.last().and_then(|(_, last)| last.join(m));
            if let (Some(both), Some((_, last))) = (both, out.last_mut()) {
                *last = both;
            } else if out.len() == most {
                break;
            } else {
                out.push((at, m));
            }
            at += m.len;
        }
        Ok(out)
    }

    /// Whether a range reads as zeroes for certain, by what the tables say.
    pub(crate) async fn reads_zero(&self, range: Range<u64>) -> io::Result<bool> {
        let mut at = range.start;
        while at < range.end {
            match self.lookup(at, range.end - at)? {
                Lookup::NeedsTable { index } => self.load_table(index).await?,
                Lookup::Mapped(m) => {
                    let zero = match (m.kind, self.backing()) {
                        (Kind::Zero, _) | (Kind::Unallocated, None) => true,
                        (Kind::Unallocated, Some(b)) => at >= b.size(),
                        _ => false,
                    };
                    if !zero {
                        return Ok(false);
                    }
                    at += m.len;
                }
            }
        }
        Ok(true)
    }
}
