//! The executor of an I/O thread: futures that never leave their thread, in a slab.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Wake, Waker};

use crate::thread::Shared;

type LocalTask = Pin<Box<dyn Future<Output = ()>>>;

struct Slot {
    /// None while the task runs and after it ended.
    future: Option<LocalTask>,
    wake: Arc<WakeSlot>,
    waker: Waker,
    occupied: bool,
}

/// Wakes the task in one slot, from any thread. A slot is used again by later tasks: a waker that
/// outlives its task wakes the next one for nothing, which every future must bear.
struct WakeSlot {
    index: u32,
    queued: AtomicBool,
    shared: Arc<Shared>,
}

impl Wake for WakeSlot {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if !self.queued.swap(true, Ordering::AcqRel) {
            self.shared.wake_task(self.index);
        }
    }
}

pub(crate) struct Executor {
    slots: RefCell<Vec<Slot>>,
    free: RefCell<Vec<u32>>,
    ready: RefCell<VecDeque<u32>>,
    shared: Arc<Shared>,
}

impl Executor {
    pub fn new(shared: Arc<Shared>) -> Executor {
        Executor {
            slots: RefCell::default(),
            free: RefCell::default(),
            ready: RefCell::default(),
            shared,
        }
    }

    pub fn spawn(&self, future: LocalTask) {
        let mut slots = self.slots.borrow_mut();
        let index = self.free.borrow_mut().pop().unwrap_or_else(|| {
            let index = slots.len() as u32;
            let wake = Arc::new(WakeSlot {
                index,
                queued: AtomicBool::new(false),
                shared: self.shared.clone(),
            });
            slots.push(Slot {
                future: None,
                waker: Waker::from(wake.clone()),
                wake,
                occupied: false,
            });
            index
        });
        let slot = &mut slots[index as usize];
        slot.future = Some(future);
        slot.occupied = true;
        if !slot.wake.queued.swap(true, Ordering::AcqRel) {
            self.ready.borrow_mut().push_back(index);
        }
    }

    /// Puts a task on the ready list; its slot's `queued` is already set.
    pub fn push_ready(&self, index: u32) {
        self.ready.borrow_mut().push_back(index);
    }

    pub fn has_ready(&self) -> bool {
        !self.ready.borrow().is_empty()
    }

    /// Runs every task that is ready now, once; true if there was one. Tasks that become ready
    /// meanwhile run in the next turn, so that I/O is never starved.
    pub fn run_ready(&self) -> bool {
        let n = self.ready.borrow().len();
        for _ in 0..n {
            let Some(index) = self.ready.borrow_mut().pop_front() else {
                break;
            };
            self.run_one(index);
        }
        n > 0
    }

    fn run_one(&self, index: u32) {
        let (mut future, waker) = {
            let mut slots = self.slots.borrow_mut();
            let slot = &mut slots[index as usize];
            slot.wake.queued.store(false, Ordering::Release);
            let Some(future) = slot.future.take() else {
                return;
            };
            (future, slot.waker.clone())
        };
        let done = future
            .as_mut()
            .poll(&mut Context::from_waker(&waker))
            .is_ready();
        let mut slots = self.slots.borrow_mut();
        let slot = &mut slots[index as usize];
        if done {
            slot.occupied = false;
            self.free.borrow_mut().push(index);
            drop(slots);
            drop(future);
        } else {
            slot.future = Some(future);
        }
    }

    /// Drops all tasks, with those that are spawned by that.
    pub fn clear(&self) {
        loop {
            let futures: Vec<LocalTask> = {
                let mut slots = self.slots.borrow_mut();
                slots.iter_mut().filter_map(|s| s.future.take()).collect()
            };
            if futures.is_empty() {
                return;
            }
            drop(futures);
        }
    }

    /// How many tasks there are.
    pub fn len(&self) -> usize {
        self.slots.borrow().iter().filter(|s| s.occupied).count()
    }
}
