//! When has everything ended that was in flight?
//!
//! A request looks up where its data is and then uses the place without holding anything. Whoever takes
//! that place away (frees a cluster, say) first makes new requests unable to find it, and then waits for
//! [`quiesce`]: after that nobody uses it any more. It costs a request two additions to a counter of its own
//! thread.
//!
//! Each thread counts its requests in two generations. To quiesce, a thread lets new requests count in the
//! other one, and waits until the old one is empty. It does so in a turn of its own loop: what the caller
//! did before is visible to every request that begins afterwards.

use std::cell::Cell;

use tokio::sync::{Mutex, Notify};

use crate::thread;

/// In which generation a request counts; to be given back when it ends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Generation(u8);

impl Generation {
    pub const ALL: [Generation; 2] = [Generation(0), Generation(1)];

    /// 0 or 1.
    #[inline]
    pub fn index(self) -> usize {
        usize::from(self.0)
    }
}

/// The requests in flight on one I/O thread, or of one of those who send them there.
#[derive(Default)]
pub struct InFlight {
    generation: Cell<u8>,
    counts: [Cell<u64>; 2],
    /// Told when a generation has become empty.
    empty: Notify,
    turn: Mutex<()>,
}

impl InFlight {
    /// Counts a request that is about to look where its data is.
    #[inline]
    pub fn begin(&self) -> Generation {
        let g = self.generation.get();
        let count = &self.counts[usize::from(g)];
        count.set(count.get() + 1);
        Generation(g)
    }

    /// `n` requests of a generation have ended.
    #[inline]
    pub fn end(&self, generation: Generation, n: u64) {
        let count = &self.counts[generation.index()];
        count.set(count.get() - n);
        if count.get() == 0 && generation.0 != self.generation.get() {
            self.empty.notify_waiters();
        }
    }

    async fn emptied(&self, generation: u8) {
        loop {
            let empty = self.empty.notified();
            if self.counts[usize::from(generation)].get() == 0 {
                return;
            }
            empty.await;
        }
    }

    /// All that are in flight have ended: whoever had them is gone.
    pub fn end_all(&self) {
        self.counts.iter().for_each(|n| n.set(0));
        self.empty.notify_waiters();
    }

    /// Waits until every request has ended that was in flight when this was called. On the thread that they are on.
    pub async fn quiesce(&self) {
        let _turn = self.turn.lock().await;
        let old = self.generation.get();
        // Empty since the last time: nothing counts in it meanwhile.
        self.emptied(1 - old).await;
        self.generation.set(1 - old);
        self.emptied(old).await;
    }
}

/// Waits until every request has ended that was in flight, on any I/O thread, when this was called.
pub async fn quiesce() {
    for thread in thread::all() {
        // A thread that has stopped has nothing in flight.
        let _ = thread
            .run_async(|r| async move { r.in_flight().quiesce().await })
            .await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::pin::pin;
    use std::task::{Context, Waker};

    #[test]
    fn waits_for_the_old_and_not_for_the_new() {
        let f = InFlight::default();
        let mut cx = Context::from_waker(Waker::noop());
        let (a, b) = (f.begin(), f.begin());
        let mut first = pin!(f.quiesce());
        assert!(first.as_mut().poll(&mut cx).is_pending());
        let c = f.begin();
        assert_ne!(a, c);
        let mut second = pin!(f.quiesce());
        assert!(second.as_mut().poll(&mut cx).is_pending());
        f.end(a, 1);
        assert!(first.as_mut().poll(&mut cx).is_pending());
        f.end(b, 1);
        assert!(first.as_mut().poll(&mut cx).is_ready());
        assert!(second.as_mut().poll(&mut cx).is_pending());
        let _d = f.begin();
        f.end(c, 1);
        assert!(second.as_mut().poll(&mut cx).is_ready());
    }
}
