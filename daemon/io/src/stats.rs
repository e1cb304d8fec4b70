//! Counters of an I/O thread: written by that thread alone, read by anybody.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// A counter with one writer: adding is a plain load and store, not an atomic read-modify-write.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    pub fn add(&self, n: u64) {
        self.0.store(self.0.load(Relaxed).wrapping_add(n), Relaxed);
    }

    pub fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

macro_rules! stats {
    ($($(#[$doc:meta])* $name:ident),* $(,)?) => {
        /// Live counters of an I/O thread.
        #[derive(Debug, Default)]
        pub struct ThreadStats { $($(#[$doc])* pub $name: Counter,)* }

        /// The counters at one moment.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct ThreadStatsSnapshot { $($(#[$doc])* pub $name: u64,)* }

        impl ThreadStats {
            pub fn snapshot(&self) -> ThreadStatsSnapshot {
                ThreadStatsSnapshot { $($name: self.$name.get(),)* }
            }
        }
    };
}

stats! {
    /// Operations handed to the engine.
    operations,
    /// System calls made by the loop and its engine.
    syscalls,
    /// Turns of the loop.
    turns,
    /// Nanoseconds spent polling without finding work.
    polling_ns,
    /// Nanoseconds spent asleep in the kernel.
    sleeping_ns,
    /// Nanoseconds spent on work.
    working_ns,
    /// Times that a source found work while it was being polled.
    poll_hits,
    /// Times that polling of a source was given up.
    poll_misses,
    /// Kicks and other events seen on watched file descriptors.
    events,
}
