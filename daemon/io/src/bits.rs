//! Bits for the pieces of a disk, set and cleared by any number of threads at once.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use arc_swap::ArcSwap;

/// One bit for each piece of `1 << shift` bytes. A range of bytes stands for all pieces that it touches.
pub struct Bits {
    shift: u32,
    /// Bytes of the disk.
    size: u64,
    words: Box<[AtomicU64]>,
}

impl Bits {
    /// All clear. `granularity` is in bytes, a power of two.
    pub fn new(size: u64, granularity: u64) -> Bits {
        let shift = granularity.trailing_zeros();
        let words = size.div_ceil(granularity).div_ceil(64);
        Bits {
            shift,
            size,
            words: (0..words).map(|_| AtomicU64::new(0)).collect(),
        }
    }

    /// With these words of 64 bits, as far as they go.
    pub fn from_words(size: u64, granularity: u64, words: impl Iterator<Item = u64>) -> Bits {
        let bits = Bits::new(size, granularity);
        for (have, word) in bits.words.iter().zip(words) {
            have.store(word, Ordering::Relaxed);
        }
        // Nothing is said of what is beyond the end.
        let pieces = size.div_ceil(granularity) % 64;
        if let (Some(last), true) = (bits.words.last(), pieces > 0) {
            last.fetch_and(u64::MAX >> (64 - pieces), Ordering::Relaxed);
        }
        bits
    }

    /// The words of 64 bits, the first piece in the lowest bit of the first.
    pub fn words(&self) -> impl Iterator<Item = u64> + '_ {
        self.words.iter().map(|w| w.load(Ordering::Relaxed))
    }

    /// Bytes that a bit stands for.
    pub fn granularity(&self) -> u64 {
        1 << self.shift
    }

    /// Bytes of the disk.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Sets what another has set, whatever its granularity.
    pub fn merge(&self, other: &Bits) {
        let mut at = 0;
        while let Some(run) = other.next_run(&(at..other.size), u64::MAX) {
            self.set(&run);
            at = run.end;
        }
    }

    /// Whole pieces around a range.
    pub fn pieces_around(&self, range: &Range<u64>) -> Range<u64> {
        let mask = self.granularity() - 1;
        range.start & !mask..((range.end + mask) & !mask).min(self.size)
    }

    /// Words of a range, each with the bits in it that belong to the range.
    fn each(&self, range: &Range<u64>, mut f: impl FnMut(&AtomicU64, u64) -> bool) {
        let end = range.end.min(self.size);
        if range.start >= end {
            return;
        }
        let (first, last) = (range.start >> self.shift, (end - 1) >> self.shift);
        for index in first / 64..=last / 64 {
            let from = first.max(index * 64) % 64;
            let to = last.min(index * 64 + 63) % 64;
            let mask = (u64::MAX << from) & (u64::MAX >> (63 - to));
            if let Some(word) = self.words.get(index as usize)
                && !f(word, mask)
            {
                return;
            }
        }
    }

    #[inline]
    pub fn set(&self, range: &Range<u64>) {
        self.each(range, |word, mask| {
            // Mostly it is set already: reading does not take the cache line from others.
            if word.load(Ordering::Relaxed) & mask != mask {
                word.fetch_or(mask, Ordering::Relaxed);
            }
            true
        });
    }

    pub fn clear(&self, range: &Range<u64>) {
        self.each(range, |word, mask| {
            word.fetch_and(!mask, Ordering::Relaxed);
            true
        });
    }

    /// Whether any piece of a range is set.
    #[inline]
    pub fn any(&self, range: &Range<u64>) -> bool {
        let mut found = false;
        self.each(range, |word, mask| {
            found = word.load(Ordering::Relaxed) & mask != 0;
            !found
        });
        found
    }

    fn word(&self, index: u64) -> u64 {
        self.words
            .get(index as usize)
            .map_or(0, |w| w.load(Ordering::Relaxed))
    }

    /// The first run of set pieces that begins within a range, `most` bytes at most (whole pieces), and no further than the
    /// pieces that the range touches; None if there is none.
    pub fn next_run(&self, range: &Range<u64>, most: u64) -> Option<Range<u64>> {
        let pieces = range.end.min(self.size).div_ceil(self.granularity());
        let mut at = range.start.div_ceil(self.granularity());
        loop {
            if at >= pieces {
                return None;
            }
            let word = self.word(at / 64) >> (at % 64);
            if word != 0 {
                at += u64::from(word.trailing_zeros());
                break;
            }
            at = (at / 64 + 1) * 64;
        }
        let most = (most >> self.shift).max(1);
        let mut end = at;
        while end < pieces && end - at < most {
            let clear = !self.word(end / 64) >> (end % 64);
            let run = u64::from(clear.trailing_zeros()).min(64 - end % 64);
            end += run;
            if run == 0 || !end.is_multiple_of(64) {
                break;
            }
        }
        let end = end.min(at + most).min(pieces);
        Some(at << self.shift..(end << self.shift).min(self.size))
    }

    /// What of a range, in whole pieces, is clear.
    pub fn clear_runs(&self, range: &Range<u64>) -> Vec<Range<u64>> {
        let whole = self.pieces_around(range);
        let (mut at, mut clear) = (whole.start, Vec::new());
        while at < whole.end {
            let set = match self.next_run(&(at..whole.end), u64::MAX) {
                Some(run) if run.start < whole.end => run,
                _ => whole.end..whole.end,
            };
            if at < set.start {
                clear.push(at..set.start);
            }
            at = set.end;
        }
        clear
    }

    /// Bytes of all set pieces.
    pub fn count(&self) -> u64 {
        let ones: u64 = self
            .words
            .iter()
            .map(|w| u64::from(w.load(Ordering::Relaxed).count_ones()))
            .sum();
        let bytes = ones << self.shift;
        // The last piece may be cut off by the end of the disk.
        let last = self.size.saturating_sub(1);
        let whole = ((last >> self.shift) + 1) << self.shift;
        match self.size > 0 && self.any(&(last..self.size)) {
            true => bytes - (whole - self.size),
            false => bytes,
        }
    }
}

/// Bits that record what is written, if they are told to.
pub struct Recorder {
    bits: ArcSwap<Bits>,
    recording: AtomicBool,
}

impl Recorder {
    pub fn new(bits: Bits, recording: bool) -> Arc<Recorder> {
        Arc::new(Recorder {
            bits: ArcSwap::from_pointee(bits),
            recording: AtomicBool::new(recording),
        })
    }

    /// A range is about to be written.
    #[inline]
    pub fn record(&self, range: &Range<u64>) {
        if self.is_recording() {
            self.bits.load().set(range);
        }
    }

    pub fn is_recording(&self) -> bool {
        self.recording.load(Ordering::Relaxed)
    }

    pub fn set_recording(&self, on: bool) {
        self.recording.store(on, Ordering::Relaxed);
    }

    /// What it has at the moment.
    pub fn bits(&self) -> Arc<Bits> {
        self.bits.load_full()
    }

    /// Takes all bits out; what is recorded from now on is kept beside them. Exact if nothing is being written.
    pub fn take(&self) -> Arc<Bits> {
        let old = self.bits();
        self.bits
            .swap(Arc::new(Bits::new(old.size(), old.granularity())))
    }

    /// The disk has another size. Nothing is being written.
    pub fn fit(&self, size: u64) {
        let old = self.bits();
        let new = Bits::new(size, old.granularity());
        new.merge(&old);
        self.bits.store(Arc::new(new));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Bits are what a set of pieces would be.
        #[test]
        fn bits_are_a_set_of_pieces(
            size in 1u64..40_000,
            ops in proptest::collection::vec((any::<bool>(), 0u64..40_000, 1u64..20_000), 0..12),
            most in 1u64..30_000,
        ) {
            let bits = Bits::new(size, 64);
            let pieces = size.div_ceil(64) as usize;
            let mut model = vec![false; pieces];
            for (set, start, len) in ops {
                let start = start % size;
                let range = start..start + len;
                let touched = (start / 64) as usize..((start + len).div_ceil(64) as usize).min(pieces);
                for p in touched.clone() {
                    model[p] = set;
                }
                match set {
                    true => bits.set(&range),
                    false => bits.clear(&range),
                }
                prop_assert_eq!(bits.any(&range), set && !touched.is_empty());
            }
            let count: u64 = (0..pieces)
                .filter(|p| model[*p])
                .map(|p| (size - p as u64 * 64).min(64))
                .sum();
            prop_assert_eq!(bits.count(), count);
            let (mut at, mut seen) = (0, vec![false; pieces]);
            while let Some(run) = bits.next_run(&(at..size), most) {
                prop_assert!(run.start >= at && run.start % 64 == 0 && run.end > run.start);
                prop_assert!(run.end - run.start <= most.max(64));
                for p in run.start / 64..run.end.div_ceil(64) {
                    seen[p as usize] = true;
                }
                at = run.end;
            }
            prop_assert_eq!(&seen, &model);
            let (coarse, fine) = (Bits::new(size, 512), Bits::new(size, 64));
            coarse.merge(&bits);
            fine.merge(&bits);
            for (p, set) in model.iter().enumerate() {
                let at = p as u64 * 64;
                prop_assert!(!set || coarse.any(&(at..at + 1)));
                prop_assert_eq!(fine.any(&(at..at + 1)), *set);
            }
            let all = 0..size;
            let clear = bits.clear_runs(&all);
            for (p, set) in model.iter().enumerate() {
                let at = p as u64 * 64;
                prop_assert_eq!(clear.iter().any(|r| r.contains(&at)), !set);
            }
        }
    }
}
