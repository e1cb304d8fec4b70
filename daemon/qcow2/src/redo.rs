//! A log of changes that the guest was told are done, but that are not in the image's tables yet.
//!
//! Tables are written at flushes (see [`crate::commit`]). A guest whose machine loses power expects no more. But a guest
//! whose storage daemon is killed and comes back does not even notice, and relies on every write that was answered. So
//! each change of an entry is noted in a file that outlives the daemon, and not the machine: the next one does it again.
//!
//! The file is a ring of records behind a header. A record counts if its number is at least the one in the header, which
//! moves on when a commit has made the changes before it durable.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::image::Image;
use crate::mapping::Entry;
use crate::meta::Reason;

/// The number changes with what records can say: one of version 1 has no partial clusters.
const MAGIC: u64 = u64::from_be_bytes(*b"vdiskrd2");
const MAGIC_1: u64 = u64::from_be_bytes(*b"vdiskrd1");

const HEADER: u64 = 4096;
const WORDS: usize = 7;
const RECORD: u64 = WORDS as u64 * 8;

/// With the entry of a partial cluster: what it lacks is in a backing file.
pub(crate) const NEEDS_BACKING: u64 = 1 << 63;

/// A change of the entry of one cluster of the guest's disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Record {
    number: u64,
    /// Number of the cluster.
    pub cluster: u64,
    pub old: Entry,
    pub new: Entry,
}

impl Record {
    fn words(&self) -> [u64; WORDS] {
        let mut w = [
            self.number,
            self.cluster,
            self.old.word,
            self.old.bitmap,
            self.new.word,
            self.new.bitmap,
            0,
        ];
        w[6] = check(&w[..6]);
        w
    }
}

/// Tells a record from anything that was not written as one.
fn check(words: &[u64]) -> u64 {
    words.iter().fold(MAGIC_1, |c, w| {
        (c ^ w).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29)
    })
}

/// An open log; nobody else has it.
pub(crate) struct Redo {
    file: File,
    path: PathBuf,
    next: u64,
    first: u64,
    /// The number of the record at the start of the ring.
    start: u64,
}

/// Says whether the machine was started anew since.
fn boot() -> u64 {
    let id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let bytes: Vec<u64> = id.bytes().map(u64::from).collect();
    check(&bytes)
}

impl Redo {
    /// Records in the ring: up to 14 MiB of the runtime folder. It begins at its start again whenever it is empty.
    pub const CAPACITY: usize = 1 << 18;

    /// Records that are left for partial clusters, all of which are noted once more before others are forgotten.
    pub const RESERVE: usize = Self::CAPACITY / 4;

    /// Opens or makes the log at `path`, and returns what an earlier daemon has left there.
    pub fn open(path: &Path) -> io::Result<(Redo, Vec<Record>)> {
        let mut options = File::options();
        let file = options
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)?;
        file.try_lock().map_err(io::Error::from)?;
        let mut bytes = Vec::new();
        io::Read::read_to_end(&mut &file, &mut bytes)?;
        let words: Vec<u64> = {
            let (chunks, _) = bytes.as_chunks::<8>();
            chunks.iter().map(|b| u64::from_le_bytes(*b)).collect()
        };
        let mut records = Vec::new();
        let (mut first, mut start) = (1, 0);
        if let [magic, same_boot, from, ..] = words[..]
            && (magic == MAGIC || magic == MAGIC_1)
            && same_boot == boot()
        {
            first = from;
            let ring = words.get(HEADER as usize / 8..).unwrap_or_default();
            for (i, w) in ring.chunks_exact(WORDS).enumerate() {
                let record = Record {
                    number: w[0],
                    cluster: w[1],
                    old: Entry {
                        word: w[2],
                        bitmap: w[3],
                    },
                    new: Entry {
                        word: w[4],
                        bitmap: w[5],
                    },
                };
                if w[6] == check(&w[..6]) && record.number >= first {
                    // The next ones follow these.
                    start = record.number.saturating_sub(i as u64);
                    records.push(record);
                }
            }
            records.sort_by_key(|r| r.number);
        } else {
            // What others have left must not count beside what is noted from now on.
            file.set_len(0)?;
        }
        let redo = Redo {
            next: records.last().map_or(first, |r| r.number + 1),
            file,
            path: path.to_owned(),
            start,
            first,
        };
        redo.write_header()?;
        Ok((redo, records))
    }

    fn write_header(&self) -> io::Result<()> {
        let words = [MAGIC, boot(), self.first].map(u64::to_le_bytes);
        self.file.write_all_at(words.as_flattened(), 0)
    }

    /// Notes a change before anybody is told of it. False if it cannot be: then it must be durable first.
    #[must_use]
    pub fn note(&mut self, cluster: u64, old: Entry, new: Entry) -> bool {
        self.len() < Self::CAPACITY - Self::RESERVE && self.note_all(&[(cluster, old, new)])
    }

    /// As [`Redo::note`], all of them or none that counts.
    #[must_use]
    pub fn note_all(&mut self, changes: &[(u64, Entry, Entry)]) -> bool {
        if self.len() + changes.len() > Self::CAPACITY {
            return false;
        }
        let before = self.next;
        let mut rest = changes;
        while !rest.is_empty() {
            let slot = ((self.next - self.start) % Self::CAPACITY as u64) as usize;
            let (some, others) = rest.split_at(rest.len().min(Self::CAPACITY - slot));
            let records = some.iter().zip(self.next..);
            let words = records.flat_map(|(&(cluster, old, new), number)| {
                let record = Record {
                    number,
                    cluster,
                    old,
                    new,
                };
                record.words()
            });
            let bytes: Vec<u8> = words.flat_map(u64::to_le_bytes).collect();
            let at = HEADER + slot as u64 * RECORD;
            if self.file.write_all_at(&bytes, at).is_err() {
                // Some of them may be there: their places are not used again as long as they count.
                self.next = before + changes.len() as u64;
                return false;
            }
            self.next += some.len() as u64;
            rest = others;
        }
        true
    }

    /// How many changes are noted that are not durable yet.
    pub fn len(&self) -> usize {
        (self.next - self.first) as usize
    }

    /// The number that the next record gets.
    pub fn next(&self) -> u64 {
        self.next
    }

    /// Everything before `number` is durable.
    pub fn forget(&mut self, number: u64) {
        self.first = number;
        // If that fails, changes are done once more: that does no harm.
        let told = self.file.write_all_at(&number.to_le_bytes(), 16).is_ok();
        if told && self.len() == 0 {
            self.start = number;
        }
    }

    /// Nothing is left to be done.
    pub fn remove(self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

impl Image {
    /// What is noted of an entry.
    pub(crate) fn for_log(&self, entry: Entry) -> Entry {
        let needs = match self.layout.is_partial(entry) && self.backing().is_some() {
            true => NEEDS_BACKING,
            false => 0,
        };
        Entry {
            bitmap: entry.bitmap | needs,
            ..entry
        }
    }

    /// Whether these changes need a backing file, and the image was opened without one.
    pub(crate) fn lacks_backing(&self, records: &[Record]) -> bool {
        let needs = |e: Entry| self.layout.is_partial(e) && e.bitmap & NEEDS_BACKING != 0;
        self.backing().is_none() && records.iter().any(|r| needs(r.new))
    }

    /// Does again what an earlier daemon has answered, and could not bring into the tables. Nothing is done if the image
    /// is not as that daemon left it: then the result is why. Otherwise it is the number of entries that have changed.
    pub(crate) async fn redo(&self, records: &[Record]) -> io::Result<Result<usize, String>> {
        let bits = self.layout.cluster_bits;
        let plain = |e: Entry| {
            if e.is_compressed() || self.layout.external {
                e
            } else {
                e.with_copied(false)
            }
        };
        let mut last = std::collections::BTreeMap::<u64, (Vec<Entry>, Entry)>::new();
        for r in records {
            let mut r = *r;
            if self.layout.is_partial(r.new) {
                r.new.bitmap &= !NEEDS_BACKING;
            }
            let (chain, new) = last.entry(r.cluster).or_default();
            chain.extend([plain(r.old), plain(r.new)]);
            if self.layout.is_partial(r.old) || self.layout.is_partial(r.new) {
                // What the file says of it.
                chain.push(Entry::default());
            }
            *new = r.new;
        }
        let mut changes = Vec::new();
        for (cluster, (chain, new)) in last {
            let at = cluster << bits;
            let other = || {
                Ok(Err(format!(
                    "the image has changed since: guest offset {at:#x}"
                )))
            };
            // Of a disk that was growing: nobody was told of it.
            if at >= self.size() {
                continue;
            }
            let now = self.entries(at, 1).await?[0];
            if !chain.contains(&plain(now)) {
                return other();
            }
            let host = new.host();
            let external = self.layout.external;
            if new.is_compressed()
                || !external && host != 0 && !self.is_place(host, self.cluster())
                || external && self.layout.decode(new, at).is_err()
                || self.layout.is_partial(new)
                    && new.bitmap >> (self.cluster() / self.layout.part()) != 0
            {
                return other();
            }
            if plain(now) != plain(new) {
                changes.push((at, now.host(), new));
            }
        }
        // All places are taken before anything is allocated.
        let moved = changes.iter().filter(|(_, before, new)| {
            new.host() != 0 && new.host() != *before && !self.layout.external
        });
        let places: BTreeSet<u64> = moved.map(|(_, _, new)| new.host() >> bits).collect();
        for &place in &places {
            let count = self.with_refs(|w| w.refs.get(place)).await?;
            if count == 0 {
                self.with_refs(|w| {
                    w.alloc.ensure_block_beside(&mut w.refs, place, &places)?;
                    w.refs.set(place, 1)
                })
                .await?;
            }
        }
        for (at, _, new) in &changes {
            self.own_table(self.layout.position(*at).0).await?;
            let new = match self.layout.external {
                true => *new,
                false => new.with_copied(new.host() != 0),
            };
            self.change_entries(*at, 1, Reason::Other, |_, _| new)
                .await?;
        }
        // What counts all that may lie behind it.
        self.grow_to_end().await?;
        self.store().await?;
        Ok(Ok(changes.len()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn changes(from: u64, n: u64) -> Vec<(u64, Entry, Entry)> {
        let entry = |word| Entry { word, bitmap: 0 };
        (from..from + n).map(|c| (c, entry(0), entry(c))).collect()
    }

    fn clusters(records: &[Record]) -> Vec<u64> {
        records.iter().map(|r| r.cluster).collect()
    }

    /// After the machine was started anew, what was noted before says nothing, now and later.
    #[test]
    fn what_was_noted_before_the_machine_started_does_not_come_back() {
        let path = std::env::temp_dir().join(format!("vdisk-boot-{}", std::process::id()));
        let (mut log, _) = Redo::open(&path).unwrap();
        assert!(log.note_all(&changes(0, 9)));
        let other = (boot() ^ 1).to_le_bytes();
        log.file.write_all_at(&other, 8).unwrap();
        drop(log);
        let (mut log, records) = Redo::open(&path).unwrap();
        assert!(records.is_empty());
        assert!(log.note_all(&changes(20, 2)));
        drop(log);
        let (log, records) = Redo::open(&path).unwrap();
        assert_eq!(clusters(&records), [20, 21]);
        log.remove();
    }

    #[test]
    fn what_counts_is_found_by_the_next_process_and_not_written_over() {
        let dir = std::env::temp_dir().join(format!("vdisk-log-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let path = dir.join("log");
        let n = Redo::CAPACITY as u64;
        let (mut log, _) = Redo::open(&path).unwrap();
        // Empty: the ring begins at its start again.
        assert!(log.note_all(&changes(0, 5)));
        log.forget(log.next());
        assert!(log.note_all(&changes(0, n - 4)));
        log.forget(log.next() - 3);
        // Beyond the end of the ring.
        assert!(log.note_all(&changes(n - 4, 10)));
        assert_eq!(log.len(), 13);
        assert!(!log.note_all(&changes(0, n - 12)));
        drop(log);
        let (mut log, records) = Redo::open(&path).unwrap();
        let last: Vec<u64> = (n - 7..n + 6).collect();
        assert_eq!(clusters(&records), last);
        // It goes on behind them.
        assert!(log.note_all(&changes(n + 6, n - 13)));
        assert!(!log.note(0, Entry::default(), Entry::default()));
        drop(log);
        let (_, records) = Redo::open(&path).unwrap();
        let all: Vec<u64> = (n - 7..2 * n - 7).collect();
        assert_eq!(clusters(&records), all);
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
