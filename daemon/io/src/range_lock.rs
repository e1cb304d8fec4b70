//! Serialises requests to overlapping ranges, across I/O threads.
//!
//! A write that covers a storage block only in part reads the block, changes the part and writes the
//! whole back. Between its read and its write no other write may touch the block, or its data would be
//! overwritten with what was read before. The same goes for the clusters of an image.

use std::future::poll_fn;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard};
use std::task::{Poll, Waker};

#[derive(Default)]
struct State {
    held: Vec<Range<u64>>,
    waiting: Vec<Waker>,
}

/// Ranges of bytes, or of whatever the user counts, of which each is held by one at a time.
#[derive(Default)]
pub struct RangeLock(Mutex<State>);

/// Holds a range until dropped.
pub struct RangeGuard<'a> {
    lock: &'a RangeLock,
    range: Range<u64>,
}

impl RangeLock {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Waits until nobody holds a part of `range`, then holds it.
    pub async fn lock(&self, range: Range<u64>) -> RangeGuard<'_> {
        poll_fn(|cx| {
            let mut state = self.state();
            let taken = state
                .held
                .iter()
                .any(|h| h.start < range.end && range.start < h.end);
            if taken {
                state.waiting.push(cx.waker().clone());
                return Poll::Pending;
            }
            state.held.push(range.clone());
            Poll::Ready(())
        })
        .await;
        RangeGuard { lock: self, range }
    }
}

impl Drop for RangeGuard<'_> {
    fn drop(&mut self) {
        let mut state = self.lock.state();
        if let Some(at) = state.held.iter().position(|h| *h == self.range) {
            state.held.swap_remove(at);
        }
        let waiting = std::mem::take(&mut state.waiting);
        drop(state);
        for waker in waiting {
            waker.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::pin::pin;
    use std::task::Context;

    #[test]
    fn overlapping_ranges_wait_and_others_do_not() {
        let lock = RangeLock::default();
        let mut cx = Context::from_waker(Waker::noop());
        let mut a = pin!(lock.lock(0..10));
        let mut b = pin!(lock.lock(10..20));
        let mut c = pin!(lock.lock(9..11));
        let Poll::Ready(a) = a.as_mut().poll(&mut cx) else {
            panic!()
        };
        let Poll::Ready(b) = b.as_mut().poll(&mut cx) else {
            panic!()
        };
        assert!(c.as_mut().poll(&mut cx).is_pending());
        drop(a);
        assert!(c.as_mut().poll(&mut cx).is_pending());
        drop(b);
        assert!(c.as_mut().poll(&mut cx).is_ready());
    }
}
