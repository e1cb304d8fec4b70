//! How long a source is worth polling after it last had work.

use std::time::Duration;

/// The ceiling of a new I/O thread.
pub const DEFAULT_POLL_MAX: Duration = Duration::from_micros(32);

/// The window that a first success opens.
const START: Duration = Duration::from_micros(4);

/// The polling window of one source: grows while a longer look would have seen the next request, and
/// closes when requests come too far apart for polling to pay.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct PollWindow {
    window: Duration,
}

impl PollWindow {
    /// The window, bounded by the thread's ceiling.
    pub fn get(&self, max: Duration) -> Duration {
        self.window.min(max)
    }

    /// Learns from a source that had stopped being polled and now has work: `idle` is the time between
    /// its last work and this one.
    pub fn woken_after(&mut self, idle: Duration, max: Duration) {
        self.window = if idle <= max {
            (self.window * 2).clamp(START, max.max(START)).min(max)
        } else {
            let smaller = self.window / 4;
            if smaller < START / 2 {
                Duration::ZERO
            } else {
                smaller
            }
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAX: Duration = Duration::from_micros(32);

    #[test]
    fn grows_to_the_ceiling_while_it_pays() {
        let mut w = PollWindow::default();
        let mut seen = vec![];
        for _ in 0..5 {
            w.woken_after(Duration::from_micros(10), MAX);
            seen.push(w.get(MAX).as_micros());
        }
        assert_eq!(seen, [4, 8, 16, 32, 32]);
    }

    #[test]
    fn goes_to_zero_when_it_does_not_pay() {
        let mut w = PollWindow { window: MAX };
        for _ in 0..3 {
            w.woken_after(Duration::from_millis(1), MAX);
        }
        assert_eq!(w.get(MAX), Duration::ZERO);
    }

    #[test]
    fn ceiling_of_zero_switches_polling_off() {
        let mut w = PollWindow::default();
        w.woken_after(Duration::ZERO, Duration::ZERO);
        assert_eq!(w.get(Duration::ZERO), Duration::ZERO);
        w.woken_after(Duration::ZERO, MAX);
        assert_eq!(w.get(Duration::ZERO), Duration::ZERO);
    }
}
