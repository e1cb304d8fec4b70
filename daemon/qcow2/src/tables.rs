//! The L1 table and the L2 tables that are in memory: looked up without a lock by any number of threads.
//!
//! Invariant: tables are changed, taken in and dropped under the lock of [`crate::meta::Meta`] only.

use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use arc_swap::ArcSwapOption;

use crate::mapping::{Entry, Layout};

const CHUNK: usize = 512;

/// The words of one L2 table, in the host's byte order.
pub(crate) struct Table {
    words: Box<[AtomicU64]>,
    /// For each entry what a partial cluster has, once there was one. In images without subclusters.
    parts: OnceLock<Box<[AtomicU32]>>,
    /// Was looked at since the cache last wanted to drop it.
    used: AtomicBool,
}

impl Table {
    /// From the words of the file.
    pub fn new(layout: Layout, words: impl Iterator<Item = u64>) -> Arc<Table> {
        let word = |(i, w)| match layout.extended && i % 2 == 1 {
            true => w,
            false => layout.word_of_file(w),
        };
        Arc::new(Table {
            words: words.enumerate().map(word).map(AtomicU64::new).collect(),
            parts: OnceLock::new(),
            used: AtomicBool::new(true),
        })
    }

    /// The entry of a cluster. An entry of two words is read as it was at one time.
    #[inline]
    pub fn entry(&self, layout: Layout, index: usize) -> Entry {
        if !layout.extended {
            let word = self.words[index].load(Ordering::Acquire);
            let entry = Entry { word, bitmap: 0 };
            return match layout.is_partial(entry) {
                true => self.partial(layout, index),
                false => entry,
            };
        }
        let (word, bitmap) = (&self.words[2 * index], &self.words[2 * index + 1]);
        loop {
            let before = bitmap.load(Ordering::Acquire);
            let entry = Entry {
                word: word.load(Ordering::Acquire),
                bitmap: before,
            };
            if bitmap.load(Ordering::Acquire) == before {
                return entry;
            }
        }
    }

    /// The entry of a cluster that is, or was a moment ago, partial. As long as it keeps its place its parts with data only get more,
    /// and its place is given to nobody else while a request may have seen it.
    #[cold]
    fn partial(&self, layout: Layout, index: usize) -> Entry {
        loop {
            let word = self.words[index].load(Ordering::Acquire);
            let entry = Entry { word, bitmap: 0 };
            if !layout.is_partial(entry) {
                return entry;
            }
            let bitmap = match self.parts.get() {
                Some(parts) => parts[index].load(Ordering::Acquire).into(),
                None => 0,
            };
            if self.words[index].load(Ordering::Acquire) == word {
                return Entry { word, bitmap };
            }
        }
    }

    /// Changes the entry of a cluster. In between, a reader sees neither a place without data nor data
    /// without a place.
    pub fn set(&self, layout: Layout, index: usize, entry: Entry) {
        if !layout.extended {
            if layout.is_partial(entry) {
                let none = || self.words.iter().map(|_| AtomicU32::new(0)).collect();
                self.parts.get_or_init(none)[index].store(entry.bitmap as u32, Ordering::Release);
            }
            self.words[index].store(entry.word, Ordering::Release);
            return;
        }
        let (word, bitmap) = (&self.words[2 * index], &self.words[2 * index + 1]);
        if entry.host() == 0 {
            bitmap.store(entry.bitmap, Ordering::Release);
            word.store(entry.word, Ordering::Release);
        } else {
            word.store(entry.word, Ordering::Release);
            bitmap.store(entry.bitmap, Ordering::Release);
        }
    }

    /// The bytes of a range of words, as they are stored.
    pub fn bytes(&self, layout: Layout, words: std::ops::Range<usize>) -> Vec<u8> {
        self.words[words]
            .iter()
            .map(|w| layout.word_for_file(w.load(Ordering::Acquire)))
            .flat_map(u64::to_be_bytes)
            .collect()
    }

    /// A copy.
    pub fn duplicate(&self) -> Arc<Table> {
        let words = self.words.iter().map(|w| w.load(Ordering::Acquire).into());
        let parts = self.parts.get().map(|parts| {
            let parts = parts.iter().map(|p| p.load(Ordering::Acquire).into());
            OnceLock::from(parts.collect::<Box<[_]>>())
        });
        Arc::new(Table {
            words: words.collect(),
            parts: parts.unwrap_or_default(),
            used: AtomicBool::new(true),
        })
    }
}

#[derive(Default)]
struct Slot {
    l1: AtomicU64,
    table: ArcSwapOption<Table>,
    /// Where the words of the table are, or were: for fetching them into the CPU's cache, never followed.
    words: AtomicPtr<AtomicU64>,
}

/// By L1 index. Memory is taken for those parts of the L1 table only in which there is something.
pub(crate) struct Tables {
    chunks: Box<[OnceLock<Box<[Slot]>>]>,
}

impl Tables {
    /// For L1 tables of up to `max` entries.
    pub fn new(max: usize) -> Tables {
        Tables {
            chunks: (0..max.div_ceil(CHUNK)).map(|_| OnceLock::new()).collect(),
        }
    }

    #[inline]
    fn slot(&self, index: usize) -> Option<&Slot> {
        self.chunks.get(index / CHUNK)?.get()?.get(index % CHUNK)
    }

    /// The L1 entry; 0 if there is none.
    #[inline]
    pub fn l1(&self, index: usize) -> u64 {
        self.slot(index).map_or(0, |s| s.l1.load(Ordering::Acquire))
    }

    /// `index` is below the maximum that the tables were made for.
    pub fn set_l1(&self, index: usize, entry: u64) {
        if entry == 0 && self.slot(index).is_none() {
            return;
        }
        let chunk = self.chunks[index / CHUNK]
            .get_or_init(|| (0..CHUNK).map(|_| Slot::default()).collect());
        chunk[index % CHUNK].l1.store(entry, Ordering::Release);
    }

    /// Runs `f` with the table, if it is here.
    #[inline]
    pub fn with<R>(&self, index: usize, f: impl FnOnce(&Table) -> R) -> Option<R> {
        let table = self.slot(index)?.table.load();
        let table = table.as_deref()?;
        if !table.used.load(Ordering::Relaxed) {
            table.used.store(true, Ordering::Relaxed);
        }
        Some(f(table))
    }

    /// Has an entry fetched into the CPU's cache, for a lookup that will follow. False if there is no such table.
    #[inline]
    pub fn prefetch(&self, layout: Layout, index: usize, entry: usize) -> bool {
        let Some(slot) = self.slot(index) else {
            return false;
        };
        let words = slot.words.load(Ordering::Relaxed).cast_const();
        if words.is_null() {
            return false;
        }
        vdisk_io::prefetch(words.wrapping_add(entry << u32::from(layout.extended)));
        true
    }

    /// Whether the table was looked at since this was last asked.
    pub fn take_used(&self, index: usize) -> bool {
        let Some(slot) = self.slot(index) else {
            return false;
        };
        let table = slot.table.load();
        table
            .as_deref()
            .is_some_and(|t| t.used.swap(false, Ordering::Relaxed))
    }

    pub fn has(&self, index: usize) -> bool {
        self.slot(index).is_some_and(|s| s.table.load().is_some())
    }

    /// Takes a table in, or drops it. True if one was there before.
    pub fn put(&self, index: usize, table: Option<Arc<Table>>) -> bool {
        match self.slot(index) {
            Some(slot) => {
                let words = table
                    .as_ref()
                    .map_or(std::ptr::null(), |t| t.words.as_ptr());
                slot.words.store(words.cast_mut(), Ordering::Relaxed);
                slot.table.swap(table).is_some()
            }
            None => false,
        }
    }
}
