//! Timers of an I/O thread.

use std::cell::{Cell, RefCell};
use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::Instant;

#[derive(Default)]
pub(crate) struct Timers {
    heap: RefCell<BinaryHeap<Reverse<(Instant, u64)>>>,
    wakers: RefCell<HashMap<u64, Waker>>,
    next: Cell<u64>,
}

impl Timers {
    /// When the next timer is due.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.heap.borrow().peek().map(|Reverse((at, _))| *at)
    }

    /// Wakes everything that is due at `now`; true if anything was.
    pub fn fire(&self, now: Instant) -> bool {
        let mut any = false;
        while self.next_deadline().is_some_and(|at| at <= now) {
            if let Some(Reverse((_, id))) = self.heap.borrow_mut().pop()
                && let Some(waker) = self.wakers.borrow_mut().remove(&id)
            {
                waker.wake();
                any = true;
            }
        }
        any
    }
}

/// A future that ends at a moment; made by [`crate::Reactor::sleep_until`].
pub struct Sleep {
    timers: Rc<Timers>,
    at: Instant,
    id: Option<u64>,
}

impl Sleep {
    pub(crate) fn new(timers: Rc<Timers>, at: Instant) -> Sleep {
        Sleep {
            timers,
            at,
            id: None,
        }
    }
}

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if Instant::now() >= self.at {
            return Poll::Ready(());
        }
        let timers = self.timers.clone();
        let id = *self.id.get_or_insert_with(|| {
            let id = timers.next.get();
            timers.next.set(id + 1);
            id
        });
        if timers
            .wakers
            .borrow_mut()
            .insert(id, cx.waker().clone())
            .is_none()
        {
            timers.heap.borrow_mut().push(Reverse((self.at, id)));
        }
        Poll::Pending
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        if let Some(id) = self.id {
            self.timers.wakers.borrow_mut().remove(&id);
        }
    }
}
