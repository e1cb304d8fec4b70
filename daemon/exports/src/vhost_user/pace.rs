//! How fast a front-end may have things kept: each message that changes something is told to the service manager, for which others have
//! work as well.

use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// So many at once: more than a front-end needs to set up all its queues, …
const BURST: f64 = 512.0;

/// … and so many a second from then on.
const RATE: f64 = 200.0;

/// Of one export, whichever front-end it is.
#[derive(Debug)]
pub struct Pace(Mutex<(f64, Instant)>);

impl Default for Pace {
    fn default() -> Pace {
        Pace(Mutex::new((BURST, Instant::now())))
    }
}

impl Pace {
    fn at(&self, now: Instant) -> MutexGuard<'_, (f64, Instant)> {
        let mut state = self.0.lock().unwrap_or_else(|e| e.into_inner());
        let passed = now.saturating_duration_since(state.1).as_secs_f64();
        state.0 = (state.0 + passed * RATE).min(BURST);
        state.1 = now;
        state
    }

    /// Something was kept.
    pub fn count(&self, now: Instant) {
        self.at(now).0 -= 1.0;
    }

    /// How long the front-end has to wait until its next message is heard.
    pub fn wait(&self, now: Instant) -> Duration {
        Duration::from_secs_f64((-self.at(now).0 / RATE).max(0.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_is_free_and_the_rest_is_not() {
        let pace = Pace::default();
        let start = Instant::now();
        for _ in 0..512 {
            assert_eq!(pace.wait(start), Duration::ZERO);
            pace.count(start);
        }
        for _ in 0..200 {
            pace.count(start);
        }
        assert_eq!(pace.wait(start), Duration::from_secs(1));
        assert_eq!(pace.wait(start + Duration::from_secs(1)), Duration::ZERO);
        pace.count(start + Duration::from_secs(2));
        assert_eq!(pace.wait(start + Duration::from_secs(2)), Duration::ZERO);
    }
}
