//! What changes about an image while it is open, and is not looked at on the fast path.

use std::collections::{BTreeMap, HashSet, VecDeque};
use std::ops::Range;

use crate::allocator::Allocator;
use crate::header::Header;
use crate::image::Image;
use crate::partial::Partial;
use crate::redo::Redo;
use crate::refcount::Refcounts;

/// Why clusters lose a reference: decides whether their space goes back to the storage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reason {
    /// The guest discarded or zeroed them.
    Request,
    /// A snapshot was deleted.
    Snapshot,
    /// They were copied, or held tables.
    Other,
}

/// Clusters that lose one reference each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Unref {
    pub first: u64,
    pub clusters: u64,
    pub reason: Reason,
}

/// What of an L2 table is not stored yet.
#[derive(Clone, Debug, Default)]
pub(crate) struct DirtyL2 {
    /// Words.
    pub range: Range<usize>,
    /// The L1 table in the file does not refer to it yet.
    pub new: bool,
}

/// For images that may be written.
pub(crate) struct Writing {
    pub refs: Refcounts,
    pub alloc: Allocator,
    /// What the next daemon does again if this one is killed.
    pub redo: Option<Redo>,
    /// Where the next compressed cluster may be put: a range of bytes within one cluster of the file.
    pub packing: Option<Range<u64>>,
    /// Clusters of the guest's disk that have data in parts of them only.
    pub partial: Partial,
    /// L2 tables that have changed, by L1 index.
    pub l2: BTreeMap<usize, DirtyL2>,
    /// L1 entries that have changed.
    pub l1: Option<Range<usize>>,
    /// References that go away with changes that are not stored yet.
    pub unrefs: Vec<Unref>,
    /// As `unrefs`, after the changes were stored: the clusters wait for requests that may still use them.
    pub unused: VecDeque<(u64, Unref)>,
    /// Numbers what becomes unused.
    pub next_unused: u64,
}

pub(crate) struct Meta {
    pub header: Header,
    /// The L2 tables in memory, the next to go first.
    pub order: VecDeque<usize>,
    /// How many there may be.
    pub capacity: usize,
    /// L2 tables that are being written: must stay.
    pub in_commit: HashSet<usize>,
    /// How often the header has changed, and which of these changes the file has for certain.
    pub header_changes: u64,
    pub header_stored: u64,
    pub writing: Option<Writing>,
}

impl Writing {
    /// Clusters lose a reference, and everything that has changed with it is durable.
    pub fn add_unused(&mut self, u: Unref) {
        self.unused.push_back((self.next_unused, u));
        self.next_unused += 1;
    }
}

/// Tables that are looked at to find one that may go: others wait meanwhile.
const MAX_LOOKS: usize = 256;

impl Meta {
    /// Whether a table must stay in memory: the file does not have all that it says.
    fn is_needed(&self, index: usize) -> bool {
        self.in_commit.contains(&index)
            || self
                .writing
                .as_ref()
                .is_some_and(|w| w.l2.contains_key(&index) || w.partial.is_in_table(index))
    }

    /// Makes room after a table was taken in.
    pub fn evict(&mut self, image: &Image, newest: usize) {
        self.order.push_back(newest);
        // If none of so many may go, others do with the next one.
        let mut looks = (2 * self.order.len()).min(MAX_LOOKS);
        while self.order.len() > self.capacity && looks > 0 {
            looks -= 1;
            let Some(oldest) = self.order.pop_front() else {
                break;
            };
            let needed = self.is_needed(oldest);
            let used = image.tables().take_used(oldest);
            if used || needed || oldest == newest {
                self.order.push_back(oldest);
            } else {
                image.tables().put(oldest, None);
            }
        }
    }

    /// Notes that words of a table have changed.
    pub fn l2_changed(&mut self, index: usize, words: Range<usize>, new: bool) {
        let Some(w) = &mut self.writing else {
            return;
        };
        match w.l2.get_mut(&index) {
            Some(d) => {
                d.range = d.range.start.min(words.start)..d.range.end.max(words.end);
                d.new |= new;
            }
            None => {
                w.l2.insert(index, DirtyL2 { range: words, new });
            }
        }
    }

    pub fn l1_changed(&mut self, index: usize) {
        if let Some(w) = &mut self.writing {
            w.l1 = Some(match w.l1.take() {
                Some(r) => r.start.min(index)..r.end.max(index + 1),
                None => index..index + 1,
            });
        }
    }

    /// So much has changed that requests must wait until it is written.
    pub fn is_full(&self) -> bool {
        self.changed_more_than(4, 6)
    }

    /// So much has changed that it should be written soon.
    pub fn is_filling(&self) -> bool {
        self.changed_more_than(3, 4)
    }

    /// More than so many eighths of the tables that there is room for have changed, or so many eighths of the log are in use.
    fn changed_more_than(&self, tables: usize, log: usize) -> bool {
        const MAX_UNREFS: usize = 8192;
        self.writing.as_ref().is_some_and(|w| {
            let more = |n: usize, of: usize| {
                n > (of.saturating_mul(tables) / 8).max(usize::from(tables < 4))
            };
            more(w.l2.len(), self.capacity)
                || more(w.refs.dirty_blocks(), w.refs.capacity())
                || more(w.unrefs.len(), MAX_UNREFS)
                || w.redo
                    .as_ref()
                    .is_some_and(|r| r.len() > Redo::CAPACITY / 8 * log)
        })
    }
}
