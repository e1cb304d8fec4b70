//! Storage in memory that remembers what was written and flushed, so that power can be cut at any moment.
//!
//! A write may reach the medium from when it begins; it certainly has if a flush that began after the write's
//! end has ended. In between any part of it may be there, torn at multiples of
//! 16 bytes.

#![allow(dead_code)]

use std::collections::BTreeSet;
use std::io;
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};

use vdisk_io::{IoVecs, give_way};
use vdisk_qcow2::{Children, Header, Image, LocalFuture, MAX_HEADER, Options, Result, Storage};

/// The medium is full then.
const MAX_SIZE: u64 = 64 << 20;

/// Numbers that look random, the same for the same seed.
#[derive(Clone)]
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Random {
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16
    }

    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
}

#[derive(Clone)]
pub enum Change {
    Write(u64, Vec<u8>),
    Discard(u64, u64),
    Size(u64),
}

/// Something that was done to the storage, with the times at which it began and ended.
#[derive(Clone)]
pub struct Event {
    pub change: Option<Change>,
    pub began: u64,
    /// When others saw it: those that overlap it and were seen later lie over it.
    pub seen: Option<u64>,
    pub ended: Option<u64>,
}

#[derive(Default)]
struct State {
    data: Vec<u8>,
    /// Changes and flushes (those without a change).
    log: Vec<Event>,
    random: Option<Random>,
    in_flight: BTreeSet<u64>,
    /// Writes from this one on fail.
    fail_at: Option<u64>,
    writes: u64,
    /// Flushes fail.
    flushes_fail: bool,
    /// It keeps its size, as a device does.
    fixed: bool,
    /// What has this byte cannot be read.
    bad: Option<u64>,
    /// Writes and discards that begin here do not end.
    held: Option<u64>,
}

#[derive(Default)]
pub struct Memory {
    state: Mutex<State>,
    clock: Arc<AtomicU64>,
    record: bool,
}

impl Memory {
    /// With a seed, answers come late and in any order.
    pub fn new(data: Vec<u8>, seed: Option<u64>, record: bool) -> Arc<Memory> {
        Arc::new(Memory {
            state: Mutex::new(State {
                data,
                random: seed.map(Random::new),
                ..State::default()
            }),
            clock: Arc::new(AtomicU64::new(1)),
            record,
        })
    }

    /// As [`Memory::new`], with the clock of this one: both lose power at one moment.
    pub fn beside(&self, data: Vec<u8>, seed: Option<u64>) -> Arc<Memory> {
        let mut other = Arc::into_inner(Memory::new(data, seed, self.record)).unwrap();
        other.clock = self.clock.clone();
        Arc::new(other)
    }

    pub fn tick(&self) -> u64 {
        self.clock.fetch_add(1, SeqCst)
    }

    pub fn data(&self) -> Vec<u8> {
        self.state.lock().unwrap().data.clone()
    }

    pub fn log(&self) -> Vec<Event> {
        self.state.lock().unwrap().log.clone()
    }

    /// Lets every write fail after this many more.
    pub fn fail_after(&self, writes: Option<u64>) {
        let mut s = self.state.lock().unwrap();
        s.fail_at = writes.map(|n| s.writes + n);
    }

    /// Lets flushes fail, or not.
    pub fn fail_flushes(&self, fail: bool) {
        self.state.lock().unwrap().flushes_fail = fail;
    }

    /// Makes it a device of this size, in bytes.
    pub fn fix_size(&self, size: usize) {
        let mut s = self.state.lock().unwrap();
        s.data.resize(size, 0);
        s.fixed = true;
    }

    /// Lets reads of this byte fail, until it is called with None.
    pub fn fail_reads(&self, of: Option<u64>) {
        self.state.lock().unwrap().bad = of;
    }

    /// Keeps writes and discards from this offset on from ending, until it is called with None.
    pub fn hold(&self, offset: Option<u64>) {
        self.state.lock().unwrap().held = offset;
    }

    /// Counts a request of the guest until the guard is dropped.
    pub fn request(self: &Arc<Self>) -> Request {
        let id = self.tick();
        self.state.lock().unwrap().in_flight.insert(id);
        Request(self.clone(), id)
    }

    async fn wait(&self) {
        let turns = {
            let mut s = self.state.lock().unwrap();
            s.random.as_mut().map_or(0, |r| r.below(4))
        };
        for _ in 0..turns {
            give_way().await;
        }
    }

    fn begin(&self, change: Option<Change>) -> usize {
        let began = self.tick();
        let mut s = self.state.lock().unwrap();
        if self.record {
            s.log.push(Event {
                change,
                began,
                seen: None,
                ended: None,
            });
        }
        s.log.len().wrapping_sub(1)
    }

    fn end(&self, index: usize) {
        let ended = self.tick();
        if self.record {
            self.state.lock().unwrap().log[index].ended = Some(ended);
        }
    }

    async fn change(&self, change: Change) -> io::Result<()> {
        {
            let mut s = self.state.lock().unwrap();
            s.writes += 1;
            if s.fail_at.is_some_and(|at| s.writes > at) {
                return Err(io::Error::other("the storage fails"));
            }
        }
        let index = self.begin(Some(change.clone()));
        self.wait().await;
        while matches!(&change, Change::Write(at, _) | Change::Discard(at, _) if self.state.lock().unwrap().held == Some(*at))
        {
            give_way().await;
        }
        {
            let now = self.tick();
            let mut s = self.state.lock().unwrap();
            apply(&mut s.data, &change);
            if let Some(event) = s.log.get_mut(index) {
                event.seen = Some(now);
            }
        }
        self.wait().await;
        self.end(index);
        Ok(())
    }
}

pub struct Request(Arc<Memory>, u64);

impl Drop for Request {
    fn drop(&mut self) {
        self.0.state.lock().unwrap().in_flight.remove(&self.1);
    }
}

pub fn apply(data: &mut Vec<u8>, change: &Change) {
    match change {
        Change::Write(at, bytes) => {
            let at = *at as usize;
            if data.len() < at + bytes.len() {
                data.resize(at + bytes.len(), 0);
            }
            data[at..at + bytes.len()].copy_from_slice(bytes);
        }
        Change::Discard(at, len) => {
            let end = ((at + len) as usize).min(data.len());
            let at = (*at as usize).min(end);
            data[at..end].fill(0);
        }
        Change::Size(size) => data.resize(*size as usize, 0),
    }
}

/// What the medium may have when power is cut at `time`.
pub fn after_power_cut(base: &[u8], log: &[Event], time: u64, random: &mut Random) -> Vec<u8> {
    // Changes that had ended when this flush began are there.
    let flushed = log
        .iter()
        .filter(|e| e.change.is_none() && e.ended.is_some_and(|t| t < time))
        .map(|e| e.began)
        .max()
        .unwrap_or(0);
    let mut data = base.to_vec();
    let kind = random.below(4);
    let mut begun: Vec<&Event> = log.iter().filter(|e| e.began < time).collect();
    begun.sort_by_key(|e| e.seen.unwrap_or(u64::MAX));
    for e in begun {
        let Some(change) = &e.change else {
            continue;
        };
        if e.ended.is_some_and(|t| t < flushed) {
            apply(&mut data, change);
            continue;
        }
        // All, none, a part, or torn.
        match (kind, random.below(3)) {
            (0, _) => apply(&mut data, change),
            (1, _) => {}
            (_, 0) => apply(&mut data, change),
            (_, 1) => {}
            _ => match change {
                Change::Write(at, bytes) => {
                    for (i, part) in bytes.chunks(16).enumerate() {
                        if random.below(2) == 0 {
                            let at = at + 16 * i as u64;
                            apply(&mut data, &Change::Write(at, part.to_vec()));
                        }
                    }
                }
                other => apply(&mut data, other),
            },
        }
    }
    data
}

impl Storage for Memory {
    fn size(&self) -> u64 {
        self.state.lock().unwrap().data.len() as u64
    }

    fn read(&self, offset: u64, iov: IoVecs) -> LocalFuture<'_, io::Result<()>> {
        Box::pin(async move {
            self.wait().await;
            let s = self.state.lock().unwrap();
            let at = offset as usize;
            if s.bad
                .is_some_and(|b| (offset..offset + iov.len() as u64).contains(&b))
            {
                return Err(io::Error::other("a bad sector"));
            }
            let bytes = s
                .data
                .get(at..at + iov.len())
                .ok_or_else(|| io::Error::other("a read beyond the end"))?;
            iov.copy_from_slice(0, bytes);
            Ok(())
        })
    }

    fn write(&self, offset: u64, iov: IoVecs) -> LocalFuture<'_, io::Result<()>> {
        Box::pin(async move {
            if offset + iov.len() as u64 > self.size() {
                return Err(io::Error::other("a write beyond the end"));
            }
            self.change(Change::Write(offset, iov.to_vec())).await
        })
    }

    fn flush(&self) -> LocalFuture<'_, io::Result<()>> {
        Box::pin(async move {
            let index = self.begin(None);
            self.wait().await;
            if self.state.lock().unwrap().flushes_fail {
                return Err(io::Error::other("the storage has lost data"));
            }
            self.end(index);
            Ok(())
        })
    }

    fn discard(&self, offset: u64, len: u64) -> LocalFuture<'_, io::Result<()>> {
        Box::pin(self.change(Change::Discard(offset, len)))
    }

    fn reserve(&self, _: u64, _: u64) -> LocalFuture<'_, io::Result<()>> {
        Box::pin(async { Ok(()) })
    }

    fn grows(&self) -> bool {
        !self.state.lock().unwrap().fixed
    }

    fn set_size(&self, size: u64) -> LocalFuture<'_, io::Result<()>> {
        Box::pin(async move {
            if size > MAX_SIZE || !self.grows() {
                return Err(io::ErrorKind::StorageFull.into());
            }
            self.change(Change::Size(size)).await
        })
    }

    fn write_zeroes(&self, offset: u64, len: u64, _: bool) -> LocalFuture<'_, io::Result<()>> {
        Box::pin(async move {
            if offset + len > self.size() {
                return Err(io::Error::other("zeroes beyond the end"));
            }
            self.change(Change::Write(offset, vec![0; len as usize]))
                .await
        })
    }

    fn quiesce(&self) -> LocalFuture<'_, ()> {
        Box::pin(async move {
            let now = self.tick();
            while self
                .state
                .lock()
                .unwrap()
                .in_flight
                .range(..now)
                .next()
                .is_some()
            {
                give_way().await;
            }
        })
    }
}

pub fn block_on<T>(f: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap()
        .block_on(f)
}

/// Opens an image for reading.
pub fn open(
    file: &Arc<Memory>,
    backing: Option<Arc<dyn Storage>>,
    options: Options,
) -> Result<Rc<Image>> {
    open_with(file, None, backing, options)
}

/// As [`open`], with an external data file.
pub fn open_with(
    file: &Arc<Memory>,
    data_file: Option<Arc<dyn Storage>>,
    backing: Option<Arc<dyn Storage>>,
    options: Options,
) -> Result<Rc<Image>> {
    let data = file.data();
    let header = Header::parse(&data[..data.len().min(MAX_HEADER)], data.len() as u64)?;
    let at = header.l1_offset as usize;
    // An empty table may be said to be anywhere.
    let l1 = data
        .get(at..at + header.l1_entries as usize * 8)
        .unwrap_or_default()
        .to_vec();
    Ok(Rc::new(Image::new(
        header,
        &l1,
        Children {
            file: file.clone(),
            data: data_file,
            backing,
        },
        options,
    )?))
}
