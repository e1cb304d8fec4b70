//! Counters of a queue: written by its I/O thread alone, read by anybody.

use std::time::Duration;

use vdisk_io::Counter;

/// What requests are counted as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RequestClass {
    Read,
    Write,
    Flush,
    Discard,
    WriteZeroes,
    /// Everything else: the identification string, types that are not known.
    Other,
}

impl RequestClass {
    pub const ALL: [RequestClass; 6] = [
        RequestClass::Read,
        RequestClass::Write,
        RequestClass::Flush,
        RequestClass::Discard,
        RequestClass::WriteZeroes,
        RequestClass::Other,
    ];

    pub fn name(self) -> &'static str {
        match self {
            RequestClass::Read => "read",
            RequestClass::Write => "write",
            RequestClass::Flush => "flush",
            RequestClass::Discard => "discard",
            RequestClass::WriteZeroes => "write-zeroes",
            RequestClass::Other => "other",
        }
    }
}

/// Bucket `i` counts latencies from 2^(i-1) up to, not including, 2^i nanoseconds; the last one counts
/// everything longer, too.
pub const LATENCY_BUCKETS: usize = 40;

/// Latencies in powers of two of nanoseconds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Histogram(pub [u64; LATENCY_BUCKETS]);

impl Default for Histogram {
    fn default() -> Histogram {
        Histogram([0; LATENCY_BUCKETS])
    }
}

impl Histogram {
    fn bucket(latency: Duration) -> usize {
        let ns = latency.as_nanos().min(u128::from(u64::MAX)) as u64;
        ((u64::BITS - ns.leading_zeros()) as usize).min(LATENCY_BUCKETS - 1)
    }

    /// An upper bound of the given fraction of all latencies, in nanoseconds.
    pub fn quantile(&self, q: f64) -> Option<u64> {
        let total: u64 = self.0.iter().sum();
        if total == 0 {
            return None;
        }
        let wanted = (total as f64 * q).ceil().max(1.0) as u64;
        let mut seen = 0;
        for (i, n) in self.0.iter().enumerate() {
            seen += n;
            if seen >= wanted {
                return Some((1u64 << i) - 1);
            }
        }
        None
    }

    fn add(&mut self, other: &Histogram) {
        for (a, b) in self.0.iter_mut().zip(other.0) {
            *a += b;
        }
    }
}

#[derive(Debug)]
struct KindStats {
    requests: Counter,
    bytes: Counter,
    failed: Counter,
    latency_ns: Counter,
    latency: [Counter; LATENCY_BUCKETS],
}

impl Default for KindStats {
    fn default() -> KindStats {
        KindStats {
            requests: Counter::default(),
            bytes: Counter::default(),
            failed: Counter::default(),
            latency_ns: Counter::default(),
            latency: std::array::from_fn(|_| Counter::default()),
        }
    }
}

/// Live counters of one queue.
#[derive(Debug, Default)]
pub struct QueueStats {
    kinds: [KindStats; 6],
    /// Requests that were resolved to the storage at once.
    pub fast: Counter,
    /// Requests that needed the slow path.
    pub slow: Counter,
    /// Notifications from the guest.
    pub kicks: Counter,
    /// Notifications to the guest.
    pub interrupts: Counter,
    /// Polls that found requests without a notification.
    pub poll_hits: Counter,
}

impl QueueStats {
    /// Counts a request that was answered.
    #[inline]
    pub fn record(&self, class: RequestClass, bytes: u64, ok: bool, latency: Duration) {
        let kind = &self.kinds[class as usize];
        kind.requests.add(1);
        if ok {
            kind.bytes.add(bytes);
        } else {
            kind.failed.add(1);
        }
        kind.latency_ns.add(latency.as_nanos() as u64);
        kind.latency[Histogram::bucket(latency)].add(1);
    }

    pub fn counters(&self) -> QueueCounters {
        let mut out = QueueCounters {
            fast: self.fast.get(),
            slow: self.slow.get(),
            kicks: self.kicks.get(),
            interrupts: self.interrupts.get(),
            poll_hits: self.poll_hits.get(),
            ..QueueCounters::default()
        };
        for (out, kind) in out.kinds.iter_mut().zip(&self.kinds) {
            out.requests = kind.requests.get();
            out.bytes = kind.bytes.get();
            out.failed = kind.failed.get();
            out.latency_ns = kind.latency_ns.get();
            for (out, bucket) in out.latency.0.iter_mut().zip(&kind.latency) {
                *out = bucket.get();
            }
        }
        out
    }
}

/// What was counted for one class of requests.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KindCounters {
    pub requests: u64,
    pub bytes: u64,
    pub failed: u64,
    /// The sum of all latencies.
    pub latency_ns: u64,
    pub latency: Histogram,
}

/// What was counted on one queue, or on several together.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct QueueCounters {
    pub kinds: [KindCounters; 6],
    pub fast: u64,
    pub slow: u64,
    pub kicks: u64,
    pub interrupts: u64,
    pub poll_hits: u64,
}

impl QueueCounters {
    pub fn kind(&self, class: RequestClass) -> &KindCounters {
        &self.kinds[class as usize]
    }

    pub fn requests(&self) -> u64 {
        self.kinds.iter().map(|k| k.requests).sum()
    }

    pub fn add(&mut self, other: &QueueCounters) {
        for (a, b) in self.kinds.iter_mut().zip(&other.kinds) {
            a.requests += b.requests;
            a.bytes += b.bytes;
            a.failed += b.failed;
            a.latency_ns += b.latency_ns;
            a.latency.add(&b.latency);
        }
        self.fast += other.fast;
        self.slow += other.slow;
        self.kicks += other.kicks;
        self.interrupts += other.interrupts;
        self.poll_hits += other.poll_hits;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn latencies_fall_into_powers_of_two() {
        let stats = QueueStats::default();
        for ns in [0, 1, 1000, 1_000_000_000_000_000] {
            stats.record(RequestClass::Read, 512, true, Duration::from_nanos(ns));
        }
        stats.record(RequestClass::Read, 512, false, Duration::ZERO);
        let c = stats.counters();
        let read = c.kind(RequestClass::Read);
        assert_eq!((read.requests, read.bytes, read.failed), (5, 2048, 1));
        let h = &read.latency;
        assert_eq!(
            (h.0[0], h.0[1], h.0[10], h.0[LATENCY_BUCKETS - 1]),
            (2, 1, 1, 1)
        );
        assert_eq!(h.quantile(0.5), Some(1));
        assert_eq!(h.quantile(0.8), Some(1023));
        assert_eq!(Histogram::default().quantile(0.5), None);
    }
}
