//! L2 tables in memory: looked up without a lock by any number of threads, bounded, and filled by whoever
//! has read one.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex};

use arc_swap::ArcSwapOption;

/// The words of one L2 table, in the host's byte order.
pub(crate) struct Table {
    pub words: Box<[u64]>,
    /// Was looked at since the cache last wanted to drop it.
    used: AtomicBool,
}

pub(crate) struct L2Cache {
    /// By L1 index.
    tables: Box<[ArcSwapOption<Table>]>,
    /// The L1 indices of the tables that are here, the next to go first.
    order: Mutex<VecDeque<u32>>,
    /// How many tables there may be.
    capacity: usize,
}

impl L2Cache {
    pub fn new(l1_entries: usize, capacity: usize) -> L2Cache {
        L2Cache {
            tables: (0..l1_entries).map(|_| ArcSwapOption::empty()).collect(),
            order: Mutex::default(),
            capacity: capacity.max(1),
        }
    }

    /// Runs `f` with the table, if it is here.
    #[inline]
    pub fn with<R>(&self, index: usize, f: impl FnOnce(&[u64]) -> R) -> Option<R> {
        let table = self.tables.get(index)?.load();
        let table = table.as_deref()?;
        if !table.used.load(Relaxed) {
            table.used.store(true, Relaxed);
        }
        Some(f(&table.words))
    }

    /// Takes a table in; another that was not used lately goes if there are too many.
    pub fn insert(&self, index: usize, words: Box<[u64]>) {
        let Some(slot) = self.tables.get(index) else {
            return;
        };
        let mut order = self.order.lock().unwrap_or_else(|e| e.into_inner());
        let table = Table {
            words,
            used: AtomicBool::new(true),
        };
        if slot.swap(Some(Arc::new(table))).is_some() {
            return;
        }
        order.push_back(index as u32);
        while order.len() > self.capacity {
            let Some(oldest) = order.pop_front() else {
                break;
            };
            let slot = &self.tables[oldest as usize];
            let spare = oldest as usize == index
                || slot
                    .load()
                    .as_ref()
                    .is_some_and(|t| t.used.swap(false, Relaxed));
            if spare {
                order.push_back(oldest);
            } else {
                slot.store(None);
            }
        }
    }

    #[cfg(test)]
    pub fn len(&self) -> usize {
        self.tables.iter().filter(|t| t.load().is_some()).count()
    }
}
