//! Serialises requests to overlapping ranges, across I/O threads.
//!
//! A write that covers a storage block only in part reads the block, changes the part and writes the
//! whole back. Between its read and its write no other write may touch the block, or its data would be
//! overwritten with what was read before. The same goes for the clusters of an image.

use std::future::Future;
use std::ops::Range;
use std::pin::Pin;
use std::sync::{Mutex, MutexGuard};
use std::task::{Context, Poll, Waker};

#[derive(Default)]
struct State {
    held: Vec<Range<u64>>,
    /// In the order in which they came.
    waiting: Vec<Waiter>,
    next: u64,
}

struct Waiter {
    number: u64,
    range: Range<u64>,
    waker: Waker,
}

/// Ranges of bytes, or of whatever the user counts, of which each is held by one at a time. Who asks first holds it first:
/// whoever wants much is not overtaken by those who want little.
#[derive(Default)]
pub struct RangeLock(Mutex<State>);

/// Holds a range until dropped.
pub struct RangeGuard<'a> {
    lock: &'a RangeLock,
    range: Range<u64>,
}

fn overlap(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.start < b.end && b.start < a.end
}

impl State {
    fn wake_all(&self) -> Vec<Waker> {
        self.waiting.iter().map(|w| w.waker.clone()).collect()
    }
}

/// Waits for a range.
struct Lock<'a> {
    lock: &'a RangeLock,
    range: Range<u64>,
    /// Its place in the line, once it waits.
    number: Option<u64>,
}

impl Future for Lock<'_> {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let mut state = self.lock.state();
        let before = self.number.unwrap_or(u64::MAX);
        let taken = state.held.iter().any(|h| overlap(h, &self.range));
        let mut earlier = state.waiting.iter().filter(|w| w.number < before);
        if !taken && !earlier.any(|w| overlap(&w.range, &self.range)) {
            state.waiting.retain(|w| Some(w.number) != self.number);
            state.held.push(self.range.clone());
            drop(state);
            self.number = None;
            return Poll::Ready(());
        }
        let waker = cx.waker().clone();
        match self.number {
            Some(number) => {
                let mine = state.waiting.iter_mut().find(|w| w.number == number);
                if let Some(mine) = mine {
                    mine.waker = waker;
                }
            }
            None => {
                let number = state.next;
                state.next += 1;
                let range = self.range.clone();
                state.waiting.push(Waiter {
                    number,
                    range,
                    waker,
                });
                drop(state);
                self.number = Some(number);
            }
        }
        Poll::Pending
    }
}

impl Drop for Lock<'_> {
    fn drop(&mut self) {
        // It was given up, and may have stood in somebody's way.
        if let Some(number) = self.number {
            let mut state = self.lock.state();
            state.waiting.retain(|w| w.number != number);
            let wake = state.wake_all();
            drop(state);
            wake.into_iter().for_each(Waker::wake);
        }
    }
}

impl RangeLock {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Waits until nobody holds a part of `range`, or asked for one before, then holds it.
    pub async fn lock(&self, range: Range<u64>) -> RangeGuard<'_> {
        Lock {
            lock: self,
            range: range.clone(),
            number: None,
        }
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
        let wake = state.wake_all();
        drop(state);
        wake.into_iter().for_each(Waker::wake);
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

    #[test]
    fn who_wants_much_is_not_overtaken() {
        let lock = RangeLock::default();
        let mut cx = Context::from_waker(Waker::noop());
        let mut small = pin!(lock.lock(0..1));
        let Poll::Ready(small) = small.as_mut().poll(&mut cx) else {
            panic!()
        };
        let mut large = Box::pin(lock.lock(0..10));
        assert!(large.as_mut().poll(&mut cx).is_pending());
        let mut later = pin!(lock.lock(5..6));
        assert!(later.as_mut().poll(&mut cx).is_pending());
        let mut beside = pin!(lock.lock(10..11));
        assert!(beside.as_mut().poll(&mut cx).is_ready());
        drop(small);
        assert!(later.as_mut().poll(&mut cx).is_pending());
        assert!(large.as_mut().poll(&mut cx).is_ready());
        let mut last = pin!(lock.lock(0..10));
        assert!(last.as_mut().poll(&mut cx).is_pending());
        // Who gives up stands in nobody's way.
        drop(large);
        assert!(later.as_mut().poll(&mut cx).is_ready());
    }
}
