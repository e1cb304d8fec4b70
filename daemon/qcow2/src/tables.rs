//! The L1 table and the L2 tables that are in memory: looked up without a lock by any number of threads.
//!
//! Invariant: tables are changed, taken in and dropped under the lock of [`crate::meta::Meta`] only.

use std::cell::{Cell, RefCell};
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

/// Tables that a thread keeps of those that it looked at.
const KEPT: usize = 32;

/// The largest table that is kept, in words: whatever images there are, a thread keeps 2 MiB of them.
const MAX_KEPT: usize = 8192;

/// Of the tables that are not kept, every so many'th is kept from then on: where more are in use than that, to exchange them would cost more
/// than it saves.
const KEEP_EVERY: u32 = 8;

/// What a thread has looked at: to borrow a table from the image for each lookup costs as much as the rest of the lookup.
///
/// Invariant: a table is used from here only while its image has it. Its words are not freed as long as it is kept, so nothing else can lie
/// where they are, and an image that names this place has this table.
#[derive(Default)]
struct Kept {
    tables: [RefCell<Option<Arc<Table>>>; KEPT],
    others: Cell<u32>,
}

thread_local! {
    static OWN: Kept = Kept::default();
}

impl Kept {
    fn place(&self, words: *const AtomicU64) -> &RefCell<Option<Arc<Table>>> {
        &self.tables[(words as usize >> 16) % KEPT]
    }

    /// Runs `f` with the table of these words. `Err` if it is not kept.
    #[inline]
    fn with<R, F: FnOnce(&Table) -> R>(&self, words: *const AtomicU64, f: F) -> Result<R, F> {
        match &*self.place(words).borrow() {
            Some(table) if table.words.as_ptr() == words => Ok(f(table)),
            _ => Err(f),
        }
    }

    fn keep(&self, table: &Arc<Table>) {
        let others = self.others.get().wrapping_add(1);
        self.others.set(others);
        if others.is_multiple_of(KEEP_EVERY) && table.words.len() <= MAX_KEPT {
            self.place(table.words.as_ptr())
                .replace(Some(table.clone()));
        }
    }
}

#[derive(Default)]
struct Slot {
    l1: AtomicU64,
    table: ArcSwapOption<Table>,
    /// Where the words of the table are: to fetch them into the CPU's cache, and to find the table among those that the thread has kept;
    /// never followed. Null without a table.
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
        let slot = self.slot(index)?;
        let look = |table: &Table| {
            if !table.used.load(Ordering::Relaxed) {
                table.used.store(true, Ordering::Relaxed);
            }
            f(table)
        };
        let words = slot.words.load(Ordering::Acquire).cast_const();
        OWN.with(|own| match own.with(words, look) {
            Ok(found) => Some(found),
            Err(look) => {
                let table = slot.table.load();
                let table = table.as_ref()?;
                own.keep(table);
                Some(look(table))
            }
        })
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
                slot.words.store(words.cast_mut(), Ordering::Release);
                slot.table.swap(table).is_some()
            }
            None => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// However often a thread has looked at a table: what counts is the one that the image has.
    #[test]
    fn a_kept_table_is_used_while_the_image_has_it() {
        let layout = Layout {
            cluster_bits: 16,
            extended: false,
            external: false,
        };
        let table = |n: u64| Table::new(layout, (0..8192).map(|i| i << 32 | n << 16));
        let tables = Tables::new(4);
        tables.set_l1(1, 1 << 16);
        let look = |index| tables.with(index, |t| t.entry(layout, 7).host());
        let look_often = |index| {
            for _ in 0..2 * KEEP_EVERY {
                look(index);
            }
            look(index)
        };
        let is_kept = |table: &Arc<Table>| {
            let words = table.words.as_ptr();
            OWN.with(|own| own.with(words, |_| ()).is_ok())
        };
        assert_eq!(look_often(1), None);
        for n in 1..5 {
            let new = table(n);
            tables.put(1, Some(new.clone()));
            assert_eq!(look_often(1), Some(7 << 32 | n << 16));
            assert!(is_kept(&new));
            // What is changed in it is seen.
            new.set(layout, 7, layout.zero(0));
            assert_eq!(look(1), Some(0));
            if n % 2 == 0 {
                tables.put(1, None);
                assert_eq!(look_often(1), None);
            }
        }
        // What takes much memory is not kept.
        let large = Table::new(layout, (0..2 * MAX_KEPT as u64).map(|i| i << 32));
        tables.put(1, Some(large.clone()));
        assert_eq!(look_often(1), Some(7 << 32));
        assert!(!is_kept(&large));
    }
}
