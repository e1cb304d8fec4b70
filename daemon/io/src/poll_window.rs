//! How long a source is worth polling after it last had work.

use std::time::Duration;

/// The ceiling of a new I/O thread.
pub const DEFAULT_POLL_MAX: Duration = Duration::from_micros(32);

/// A source whose work comes further apart than this many ceilings is idle: polling is not even tried.
const IDLE_FACTOR: u32 = 16;

/// After a poll in vain, at most this many notifications pass before the next try.
const MAX_SKIP: u32 = 1023;

/// The polling window of one source.
///
/// Polling changes what it measures: a front-end that is answered at once does not go to sleep and comes
/// back much sooner than one that must be woken. So the window cannot be learnt from the distance of
/// notifications alone; it is tried. A try that finds work keeps the source polled; a try in vain closes
/// the window, and makes the next one come later, up to once in a thousand notifications.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct PollWindow {
    window: Duration,
    /// Notifications to let pass without polling.
    skip: u32,
    /// What `skip` was set to after the last try in vain.
    penalty: u32,
    /// This try has found work.
    paid: bool,
}

impl PollWindow {
    /// The window, bounded by the thread's ceiling.
    pub fn get(&self, max: Duration) -> Duration {
        self.window.min(max)
    }

    /// The source, which was not polled, was notified of work; `idle` is the time since it last had some.
    pub fn notified(&mut self, idle: Duration, max: Duration) {
        if idle > max * IDLE_FACTOR {
            self.window = Duration::ZERO;
        } else if self.skip > 0 {
            self.skip -= 1;
            self.window = Duration::ZERO;
        } else {
            self.window = max;
            self.paid = false;
        }
    }

    /// Polling found work.
    pub fn hit(&mut self, max: Duration) {
        self.penalty = 0;
        self.paid = true;
        self.window = max;
    }

    /// The window passed without work.
    pub fn missed(&mut self) {
        if !self.window.is_zero() && !self.paid {
            self.penalty = (self.penalty * 2 + 1).min(MAX_SKIP);
            self.skip = self.penalty;
        }
        self.window = Duration::ZERO;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAX: Duration = Duration::from_micros(32);
    const NEAR: Duration = Duration::from_micros(70);

    #[test]
    fn a_window_that_pays_stays_open() {
        let mut w = PollWindow::default();
        for _ in 0..3 {
            w.notified(NEAR, MAX);
            assert_eq!(w.get(MAX), MAX);
            w.hit(MAX);
            assert_eq!(w.get(MAX), MAX);
            w.missed();
            assert_eq!(w.get(MAX), Duration::ZERO);
        }
    }

    #[test]
    fn tries_in_vain_become_rare() {
        let mut w = PollWindow::default();
        let mut tries = 0;
        for _ in 0..10_000 {
            w.notified(NEAR, MAX);
            if !w.get(MAX).is_zero() {
                tries += 1;
                w.missed();
            }
        }
        assert!(tries < 30, "{tries}");
        // One success makes up for all of them.
        while w.get(MAX).is_zero() {
            w.notified(NEAR, MAX);
        }
        w.hit(MAX);
        w.missed();
        w.notified(NEAR, MAX);
        assert_eq!(w.get(MAX), MAX);
    }

    #[test]
    fn an_idle_source_is_not_polled() {
        let mut w = PollWindow::default();
        w.notified(Duration::from_millis(10), MAX);
        assert_eq!(w.get(MAX), Duration::ZERO);
    }

    #[test]
    fn a_ceiling_of_zero_switches_polling_off() {
        let mut w = PollWindow::default();
        w.notified(Duration::ZERO, Duration::ZERO);
        assert_eq!(w.get(Duration::ZERO), Duration::ZERO);
        w.notified(Duration::ZERO, MAX);
        assert_eq!(w.get(Duration::ZERO), Duration::ZERO);
    }
}
