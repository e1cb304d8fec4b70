//! Writes that change where things are: copy on write, zeroes and discards. What they stand on is in `entries`.
//!
//! Whoever changes entries holds their clusters (`Image::clusters`), and nothing else while it waits for
//! the storage: requests to other clusters go on beside it.

use std::io;
use std::ops::Range;

use vdisk_io::IoVecs;

use crate::allocator::Run;
use crate::error::Error;
use crate::image::{Image, Lookup};
use crate::mapping::{Entry, Kind, Mapping, OFFSET_MASK};
use crate::meta::Reason;
use crate::storage::{LocalFuture, Step, before, buffer};

/// Bytes that are allocated and written in one piece, at most.
const MAX_PIECE: u64 = 4 << 20;

/// What becomes of clusters that read as zeroes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// They keep their place in the file.
    Keep,
    /// They give it up.
    GiveUp,
}

/// Has a range of the data file share blocks with what is to be written: its byte offset there, the byte offset in what is
/// written, and the length.
pub type Put<'a> = dyn Fn(u64, u64, u64) -> LocalFuture<'a, io::Result<()>> + 'a;

/// What a range is written with.
#[derive(Clone)]
enum Data<'a> {
    Bytes(IoVecs),
    /// What `put` brings to its place.
    Shared {
        at: u64,
        len: u64,
        put: &'a Put<'a>,
    },
}

impl Data<'_> {
    fn len(&self) -> u64 {
        match self {
            Data::Bytes(iov) => iov.len() as u64,
            Data::Shared { len, .. } => *len,
        }
    }

    fn slice(&self, from: u64, n: u64) -> Self {
        match self {
            Data::Bytes(iov) => Data::Bytes(iov.slice(from as usize, n as usize)),
            Data::Shared { at, put, .. } => Data::Shared {
                at: at + from,
                len: n,
                put: *put,
            },
        }
    }
}

pub(crate) fn read_only() -> io::Error {
    io::Error::from_raw_os_error(30)
}

impl Image {
    // Writing.

    /// Writes a range within the disk.
    pub async fn write(&self, offset: u64, iov: IoVecs) -> io::Result<()> {
        self.mark_dirty(offset, iov.len() as u64);
        self.write_all(offset, Data::Bytes(iov), false).await?;
        self.commit_if_full().await
    }

    /// As [`Image::write`], or with `missing` as [`Image::populate`], with data that `put` brings to its place. `Unsupported`
    /// if the data file is not to have it as it is, `WouldBlock` if the rest of a cluster would have to be copied; the range may have
    /// been written in part then.
    pub async fn share<'a>(
        &self,
        offset: u64,
        len: u64,
        missing: bool,
        put: &'a Put<'a>,
    ) -> io::Result<()> {
        if self.encrypted {
            return Err(io::ErrorKind::Unsupported.into());
        }
        if !missing {
            self.mark_dirty(offset, len);
        }
        let data = Data::Shared { at: 0, len, put };
        self.write_all(offset, data, missing).await?;
        self.commit_if_full().await
    }

    async fn write_all(&self, offset: u64, data: Data<'_>, missing: bool) -> io::Result<()> {
        let mut done = 0;
        while done < data.len() {
            let rest = data.slice(done, data.len() - done);
            done += self.write_part(offset + done, rest, missing).await?;
        }
        Ok(())
    }

    /// Brings data to its place in the data file.
    async fn put(&self, host: u64, data: Data<'_>) -> io::Result<()> {
        before(&*self.file, Step::WriteAio, host, data.len()).await?;
        match data {
            Data::Bytes(iov) => self.data.write(host, iov).await,
            Data::Shared { at, len, put } => put(host, at, len).await,
        }
    }

    /// Writes a range (zeroes without `data`) where the image has neither data nor zeroes of its own: of what its backing file
    /// has, so that it is not needed any more. What is written meanwhile stays.
    pub async fn populate(&self, offset: u64, len: u64, data: Option<IoVecs>) -> io::Result<()> {
        match data {
            Some(iov) => self.write_all(offset, Data::Bytes(iov), true).await?,
            None => {
                let mut done = 0;
                while done < len {
                    done += self.zero_unallocated(offset + done, len - done).await?;
                }
            }
        }
        self.commit_if_full().await
    }

    /// Has the beginning of a range read as zeroes where the image has nothing of its own, and returns how much of it.
    async fn zero_unallocated(&self, at: u64, len: u64) -> io::Result<u64> {
        let layout = self.layout;
        let cluster = layout.cluster();
        let first = at >> layout.cluster_bits;
        let whole = at.is_multiple_of(cluster) && len >= cluster && self.version >= 3;
        if !whole {
            let part = len.min(cluster - (at & (cluster - 1)));
            let zeroes = Data::Bytes(buffer(part as usize));
            return self.write_part(at, zeroes, true).await;
        }
        let _held = self.clusters.lock(first..first + 1).await;
        self.own_table(layout.position(at).0).await?;
        let entry = self.entries(at, 1).await?;
        if entry[0] == Entry::default() {
            self.change_entries(at, 1, Reason::Other, |_, _| layout.zero(0))
                .await?;
            return Ok(cluster);
        }
        drop(_held);
        // It has something of its own in it.
        let zeroes = Data::Bytes(buffer(cluster as usize));
        self.write_part(at, zeroes, true).await
    }

    /// Where, and how much of a range can be written in place.
    fn in_place(&self, at: u64, len: u64) -> io::Result<Option<(u64, u64)>> {
        Ok(match self.lookup(at, len)? {
            Lookup::Mapped(Mapping {
                kind: Kind::Data(host),
                len,
                writable: true,
            }) => Some((host, len)),
            _ => None,
        })
    }

    /// Writes the beginning of a range, and returns how much of it; with `missing` only what the image has nothing for.
    async fn write_part(&self, at: u64, data: Data<'_>, missing: bool) -> io::Result<u64> {
        let len = data.len();
        if let Some((host, n)) = self.in_place(at, len)? {
            if !missing {
                self.put(host, data.slice(0, n)).await?;
            }
            return Ok(n);
        }
        let layout = self.layout;
        let cluster = layout.cluster();
        let start = at & !(cluster - 1);
        let end = (at + len)
            .min((at / layout.span() + 1).saturating_mul(layout.span()))
            .min(start + MAX_PIECE.max(cluster));
        let count = (end - start).div_ceil(cluster);
        let first = start >> layout.cluster_bits;
        let _held = self.clusters.lock(first..first + count).await;
        self.own_table(layout.position(at).0).await?;
        // Somebody may have been here before.
        let mut entries = self.entries(at, count as usize).await?;
        let mut end = end;
        if missing {
            let Lookup::Mapped(m) = self.lookup(at, end - at)? else {
                return Ok(0);
            };
            if m.kind != Kind::Unallocated {
                return Ok(m.len);
            }
            end = at + m.len;
            entries.truncate((end - start).div_ceil(cluster) as usize);
        }
        if let Some((host, n)) = self.in_place(at, end - at)? {
            self.put(host, data.slice(0, n)).await?;
            return Ok(n);
        }
        if layout.is_own(entries[0]) {
            // It has a place, and no data here yet: up to where it has some, which others may write in place at any moment.
            let Lookup::Mapped(m) = self.lookup(at, end - at)? else {
                return Ok(0);
            };
            let end = match (at == start, end.min(start + cluster)) {
                // Whoever writes there at the same time may be the first or the last.
                (true, end) if end == start + cluster => end,
                (_, end) => end.min(at + m.len),
            };
            let part = data.slice(0, end - at);
            let run = Run {
                first: entries[0].host() >> layout.cluster_bits,
                clusters: 1,
                zero: false,
            };
            self.fill(&entries[..1], run, at..end, part).await?;
            return Ok(end - at);
        }
        let n = entries.iter().take_while(|e| !layout.is_own(**e)).count();
        entries.truncate(n);
        let run = if layout.external {
            Run {
                first,
                clusters: n as u64,
                zero: false,
            }
        } else {
            let run = self.allocate(n as u64).await?;
            Run {
                zero: run.zero && self.fresh_is_zero,
                ..run
            }
        };
        entries.truncate(run.clusters as usize);
        let end = end.min(start + run.clusters * cluster);
        let part = data.slice(0, end - at);
        if let Err(e) = self.fill(&entries, run, at..end, part).await {
            if !layout.external {
                self.give_back(run);
            }
            return Err(e);
        }
        Ok(end - at)
    }

    /// Writes `data` to a range of clusters that are held and have these entries, at a new place or at a place that
    /// has no data for it yet, and makes the entries refer to it.
    async fn fill(
        &self,
        old: &[Entry],
        run: Run,
        range: Range<u64>,
        data: Data<'_>,
    ) -> io::Result<()> {
        let layout = self.layout;
        let cluster = layout.cluster();
        let start = range.start & !(cluster - 1);
        let end = start + old.len() as u64 * cluster;
        let moves = |e: Entry| !layout.is_own(e) && layout.has_data(e);
        let unit = layout.unit();
        // What becomes data with it: the subclusters that are touched, or all of a cluster whose data moves.
        let mut whole = if moves(old[0]) {
            start
        } else {
            range.start & !(unit - 1)
        };
        let mut whole_end = if moves(old[old.len() - 1]) {
            end
        } else {
            range.end.next_multiple_of(unit).min(end)
        };
        // The parts that are touched, if the rest would have to be copied and may follow later.
        let may_wait =
            |e: Entry| matches!(data, Data::Bytes(_)) && !moves(e) && self.may_be_partial(e);
        if whole < range.start
            && may_wait(old[0])
            && !(run.zero && self.reads_zero(whole..range.start).await?)
        {
            whole = range.start & !(layout.part() - 1);
        }
        if range.end < whole_end
            && may_wait(old[old.len() - 1])
            && !(run.zero && self.reads_zero(range.end..whole_end).await?)
        {
            whole_end = range.end.next_multiple_of(layout.part()).min(end);
        }
        let whole_end = match layout.external {
            // The data file ends where the disk does.
            true => whole_end.min(self.size().max(range.end)),
            false => whole_end,
        };
        let head =
            whole < range.start && !(run.zero && self.reads_zero(whole..range.start).await?);
        let tail =
            range.end < whole_end && !(run.zero && self.reads_zero(range.end..whole_end).await?);
        let from = if head { whole } else { range.start };
        let data = match data {
            data if !head && !tail => data,
            Data::Bytes(iov) => {
                let mut parts = vec![iov];
                before(&*self.file, Step::CowRead, 0, 0).await?;
                if head {
                    let head = buffer((range.start - whole) as usize);
                    self.read_old(whole, &head).await?;
                    parts.insert(0, head);
                }
                if tail {
                    let tail = buffer((whole_end - range.end) as usize);
                    self.read_old(range.end, &tail).await?;
                    parts.push(tail);
                }
                let place = (run.first << layout.cluster_bits) + (from - start);
                before(&*self.file, Step::CowWrite, place, whole_end - from).await?;
                Data::Bytes(IoVecs::concat(parts))
            }
            // The rest would have to be copied.
            Data::Shared { .. } => return Err(io::ErrorKind::WouldBlock.into()),
        };
        let host = run.first << layout.cluster_bits;
        self.put(host + (from - start), data).await?;
        self.change_entries(start, old.len(), Reason::Other, |i, old| {
            let base = start + i as u64 * cluster;
            let from = whole.saturating_sub(base).min(cluster);
            let to = (whole_end - base).min(cluster);
            layout.with_data(
                if moves(old) { Entry::default() } else { old },
                host + i as u64 * cluster,
                from,
                to,
            )
        })
        .await
    }

    /// Reads what is there before a write. The last cluster may reach beyond the end of the disk.
    pub(crate) async fn read_old(&self, at: u64, iov: &IoVecs) -> io::Result<()> {
        let have = self.size().saturating_sub(at).min(iov.len() as u64) as usize;
        match have {
            0 => Ok(()),
            _ => self.read(at, iov.slice(0, have)).await,
        }
    }

    /// What compresses a cluster, or what of it lies within the disk, if that makes it smaller. It takes long, and may be done by
    /// any thread.
    pub fn compressor(&self, iov: &IoVecs) -> impl FnOnce() -> Option<Vec<u8>> + Send + 'static {
        let mut data = iov.to_vec();
        data.resize(self.cluster() as usize, 0);
        let compression = self.compression;
        move || compression.compress(&data)
    }

    /// Writes a whole cluster (the last one as far as the disk reaches), compressed if that makes it smaller: for
    /// jobs, which write each cluster once.
    pub async fn write_compressed(&self, at: u64, iov: IoVecs) -> io::Result<()> {
        let small = self.compressor(&iov)();
        self.write_packed(at, iov, small).await
    }

    /// As [`Image::write_compressed`], with what [`Image::compressor`] has made of the cluster.
    pub async fn write_packed(
        &self,
        at: u64,
        iov: IoVecs,
        small: Option<Vec<u8>>,
    ) -> io::Result<()> {
        let layout = self.layout;
        let cluster = layout.cluster();
        let whole = cluster.min(self.size().saturating_sub(at));
        if !at.is_multiple_of(cluster) || iov.len() as u64 != whole {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "compressed data is written in whole clusters",
            ));
        }
        if self.layout.external || self.encrypted {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "images with an external data file or with encryption have no compressed clusters",
            ));
        }
        self.mark_dirty(at, iov.len() as u64);
        let shares = self.with_refs(|w| Ok(w.refs.max() > 1)).await?;
        let Some(small) = small.filter(|_| shares) else {
            return self.write(at, iov).await;
        };
        let first = at >> layout.cluster_bits;
        {
            let _held = self.clusters.lock(first..first + 1).await;
            self.own_table(layout.position(at).0).await?;
            let (place, room) = self.pack(small.len() as u64).await?;
            let entry = layout.compressed(place, small.len() as u64);
            let padded = buffer(room as usize);
            padded.copy_from_slice(0, &small);
            let told = before(&*self.file, Step::WriteCompressed, place, room).await;
            let written = match entry {
                Some(_) if told.is_err() => told,
                Some(_) => self.file.write(place, padded).await,
                None => Err(Error::TooLarge.into()),
            };
            if let Err(e) = written {
                self.give_back(Run {
                    first: place >> layout.cluster_bits,
                    clusters: 1,
                    zero: false,
                });
                return Err(e);
            }
            self.change_entries(at, 1, Reason::Other, |_, _| entry.unwrap_or_default())
                .await?;
        }
        self.commit_if_full().await
    }

    /// A place for `len` bytes of compressed data, in a cluster that other such data may share, and the bytes that it
    /// has there: whole blocks, so that nobody writes to a block that somebody else writes to.
    async fn pack(&self, len: u64) -> io::Result<(u64, u64)> {
        let bits = self.layout.cluster_bits;
        let room = len.next_multiple_of(self.options.block_size as u64);
        let shared = self
            .with_refs(|w| {
                let Some(free) = w.packing.clone().filter(|p| p.end - p.start >= room) else {
                    return Ok(None);
                };
                let cluster = free.start >> bits;
                let count = w.refs.get(cluster)?;
                if count == 0 || count >= w.refs.max() {
                    return Ok(None);
                }
                w.refs.set(cluster, count + 1)?;
                w.packing = Some(free.start + room..free.end);
                Ok(Some(free.start))
            })
            .await?;
        if let Some(place) = shared {
            return Ok((place, room));
        }
        let run = self.allocate(1).await?;
        let start = run.first << bits;
        if let Some(w) = &mut self.meta().writing {
            w.packing = Some(start + room..start + self.cluster());
        }
        Ok((start, room))
    }

    // Zeroes and discards.

    /// Makes a range read as zeroes. `Unsupported` where the format cannot say so: version 2 with a backing
    /// file.
    pub async fn write_zeroes(&self, offset: u64, len: u64, may_unmap: bool) -> io::Result<()> {
        self.mark_dirty(offset, len);
        let end = offset + len;
        if self.raw_data {
            self.data.write_zeroes(offset, len, may_unmap).await?;
        }
        let whole = self.whole_clusters(offset..end);
        let (first, last) = (whole.start, whole.end);
        if whole.is_empty() {
            self.zero_part(offset..end).await?;
        } else {
            let place = if may_unmap {
                Place::GiveUp
            } else {
                Place::Keep
            };
            self.zero_part(offset..first).await?;
            self.zero_clusters(whole, place).await?;
            self.zero_part(last.min(end)..end).await?;
        }
        self.commit_if_full().await
    }

    /// Gives up the clusters that lie wholly within a range; they read as zeroes, or still as what they were.
    pub async fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.mark_dirty(offset, len);
        if self.raw_data {
            // The tables have to say what the data file says.
            return match self.options.pass_discard_request {
                true => self.data.discard(offset, len).await,
                false => Ok(()),
            };
        }
        let whole = self.whole_clusters(offset..offset + len);
        if !whole.is_empty() {
            self.zero_clusters(whole, Place::GiveUp).await?;
        }
        self.commit_if_full().await
    }

    /// The clusters that lie wholly within a range; the last one of the disk is whole if the disk ends in it.
    fn whole_clusters(&self, range: Range<u64>) -> Range<u64> {
        let cluster = self.cluster();
        let end = match range.end == self.size() {
            true => range.end.next_multiple_of(cluster),
            false => range.end,
        };
        range.start.next_multiple_of(cluster)..end & !(cluster - 1)
    }

    /// Zeroes in a part of a cluster.
    async fn zero_part(&self, range: Range<u64>) -> io::Result<()> {
        if range.is_empty() || self.reads_zero(range.clone()).await? {
            return Ok(());
        }
        let zeroes = Data::Bytes(buffer((range.end - range.start) as usize));
        self.write_all(range.start, zeroes, false).await
    }

    /// Drops clusters that the disk will not have any more. As long as it has them they read as zeroes, not as the backing
    /// file (which version 2 cannot say).
    pub(crate) async fn cut_off(&self, range: Range<u64>) -> io::Result<()> {
        let none = match self.has_backing() && self.version >= 3 {
            true => self.layout.zero(0),
            false => Entry::default(),
        };
        let new = |old| match old == Entry::default() {
            true => old,
            false => none,
        };
        self.change_clusters(range, false, new).await
    }

    async fn zero_clusters(&self, range: Range<u64>, place: Place) -> io::Result<()> {
        let layout = self.layout;
        if self.version < 3 && self.has_backing() {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let raw = self.raw_data;
        let keeps = (place == Place::Keep || self.options.discard_no_unref) && self.version >= 3;
        let discards = place == Place::GiveUp
            && self.options.pass_discard_request
            && (layout.external && !raw || keeps);
        self.change_clusters(range, discards, |old| {
            // Zeroes were written there.
            if raw && layout.has_data(old) {
                return old;
            }
            let keep = keeps && layout.is_own(old);
            match (keep, self.has_backing()) {
                (true, _) => layout.zero(old.host()),
                (false, false) => Entry::default(),
                (false, true) => layout.zero(0),
            }
        })
        .await
    }

    /// Gives whole clusters new entries without data. If `discards`, data that keeps its place is discarded there.
    async fn change_clusters(
        &self,
        range: Range<u64>,
        discards: bool,
        new: impl Fn(Entry) -> Entry,
    ) -> io::Result<()> {
        let layout = self.layout;
        let mut at = range.start;
        while at < range.end {
            let next = (at / layout.span() + 1)
                .saturating_mul(layout.span())
                .min(range.end);
            self.change_within_table(at..next, discards, &new).await?;
            at = next;
            vdisk_io::give_way().await;
            if self.meta().is_full() {
                self.commit_if_full().await?;
            }
        }
        Ok(())
    }

    async fn change_within_table(
        &self,
        range: Range<u64>,
        discards: bool,
        new: impl Fn(Entry) -> Entry,
    ) -> io::Result<()> {
        let layout = self.layout;
        let index = layout.position(range.start).0;
        let (first, last) = (
            range.start >> layout.cluster_bits,
            range.end >> layout.cluster_bits,
        );
        let _held = self.clusters.lock(first..last).await;
        let is_empty = self.tables.l1(index) & OFFSET_MASK == 0;
        if is_empty && new(Entry::default()) == Entry::default() {
            return Ok(());
        }
        let n = (last - first) as usize;
        let entries = self.entries(range.start, n).await?;
        if entries.iter().all(|e| *e == new(*e)) {
            return Ok(());
        }
        self.own_table(index).await?;
        self.change_entries(range.start, n, Reason::Request, |_, old| new(old))
            .await?;
        if discards {
            // The clusters are held: nobody has written there again.
            self.discard_data(&entries).await;
        }
        Ok(())
    }

    /// Discards the data of clusters that had these entries, and still have their places.
    async fn discard_data(&self, entries: &[Entry]) {
        let layout = self.layout;
        let cluster = layout.cluster();
        let has = |e: &Entry| layout.is_own(*e) && layout.has_data(*e);
        let mut at = 0;
        while at < entries.len() {
            let first = entries[at].host();
            let goes_on =
                |(i, e): &(usize, &Entry)| has(e) && e.host() == first + *i as u64 * cluster;
            let n = entries[at..].iter().enumerate().take_while(goes_on).count();
            if n > 0 {
                let len = (n as u64 * cluster).min(self.data.size().saturating_sub(first));
                // Only space is lost if that fails.
                if let Err(error) = self.data.discard(first, len).await {
                    tracing::debug!(%error, "space cannot be given back");
                }
            }
            at += n.max(1);
        }
    }
}
