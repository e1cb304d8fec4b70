//! What a job's work and those who control it share.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering::SeqCst};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use tokio::sync::Notify;
use vdisk_io::Reactor;

/// The other end of a copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    Source,
    Target,
}

/// What to do about an error of the source or the target (QAPI `BlockdevOnError`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnError {
    /// The job fails.
    #[default]
    Report,
    /// It is tried again a little later, as often as it takes.
    Ignore,
    /// The job pauses if there is no space, and fails otherwise.
    Enospc,
    /// The job pauses; it is tried again when it is resumed.
    Stop,
}

/// Why work ended before it was done.
#[derive(Debug)]
pub enum Stop {
    Cancelled,
    Failed { side: Side, error: io::Error },
}

/// How a job that is ready is to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// The target takes the place of the source.
    Pivot,
    /// The target is left with what the source has at this moment.
    Copy,
}

/// An error that is ignored is tried again after this time.
const RETRY: Duration = Duration::from_millis(100);

/// Says that the state may look different now.
type Changed = Box<dyn Fn() + Send + Sync>;

/// See the module. Bytes are those of the disk.
pub struct JobState {
    paused: AtomicBool,
    cancelled: AtomicBool,
    /// 0, or 1 and the [`Ending`].
    ending: AtomicU8,
    ready: AtomicBool,
    /// Pieces of work under way.
    busy: AtomicU32,
    /// Bytes per second; 0 for no limit.
    speed: AtomicU64,
    /// When the next byte may go.
    pace: Mutex<Option<Instant>>,
    done: AtomicU64,
    total: AtomicU64,
    /// Why it has paused by itself.
    trouble: Mutex<Option<String>>,
    on_error: [OnError; 2],
    wake: Notify,
    changed: Changed,
}

fn locked<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(|e| e.into_inner())
}

fn is_no_space(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOSPC | libc::EDQUOT))
        || error.kind() == io::ErrorKind::StorageFull
}

/// A piece of work is under way until this is dropped.
pub(crate) struct Busy<'a>(&'a JobState);

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        if self.0.busy.fetch_sub(1, SeqCst) == 1 && self.0.paused.load(SeqCst) {
            (self.0.changed)();
        }
    }
}

impl JobState {
    /// `on_error` is for the source and for the target; `changed` is called, on any thread, when [`JobState::is_resting`],
    /// [`JobState::is_ready`] or [`JobState::trouble`] may have changed.
    pub fn new(speed: u64, on_error: [OnError; 2], changed: Changed) -> JobState {
        JobState {
            paused: AtomicBool::new(false),
            cancelled: AtomicBool::new(false),
            ending: AtomicU8::new(0),
            ready: AtomicBool::new(false),
            busy: AtomicU32::new(0),
            speed: AtomicU64::new(speed),
            pace: Mutex::default(),
            done: AtomicU64::new(0),
            total: AtomicU64::new(0),
            trouble: Mutex::default(),
            on_error,
            wake: Notify::new(),
            changed,
        }
    }

    // For those who control it.

    pub fn set_paused(&self, paused: bool) {
        self.paused.store(paused, SeqCst);
        if !paused {
            *locked(&self.trouble) = None;
        }
        self.wake.notify_waiters();
        (self.changed)();
    }

    /// Somebody, or an error, wants it to pause.
    pub fn is_paused(&self) -> bool {
        self.paused.load(SeqCst)
    }

    /// It has paused: nothing of it is under way.
    pub fn is_resting(&self) -> bool {
        self.is_paused() && self.busy.load(SeqCst) == 0
    }

    pub fn is_ready(&self) -> bool {
        self.ready.load(SeqCst)
    }

    /// The error for which it has paused by itself.
    pub fn trouble(&self) -> Option<String> {
        locked(&self.trouble).clone()
    }

    pub fn cancel(&self) {
        self.cancelled.store(true, SeqCst);
        self.wake.notify_waiters();
    }

    pub fn is_cancelled(&self) -> bool {
        self.cancelled.load(SeqCst)
    }

    /// Has a job that is ready end.
    pub fn end(&self, ending: Ending) {
        let value = match ending {
            Ending::Pivot => 1,
            Ending::Copy => 2,
        };
        self.ending.store(value, SeqCst);
        self.wake.notify_waiters();
    }

    /// Has a job that waits for a while look at what is asked of it.
    pub fn look_up(&self) {
        self.wake.notify_waiters();
    }

    pub fn ending(&self) -> Option<Ending> {
        match self.ending.load(SeqCst) {
            1 => Some(Ending::Pivot),
            2 => Some(Ending::Copy),
            _ => None,
        }
    }

    /// Bytes per second; 0 for no limit.
    pub fn speed(&self) -> u64 {
        self.speed.load(SeqCst)
    }

    pub fn set_speed(&self, speed: u64) {
        self.speed.store(speed, SeqCst);
        *locked(&self.pace) = None;
        self.wake.notify_waiters();
    }

    /// Bytes done, and bytes altogether as far as is known.
    pub fn progress(&self) -> (u64, u64) {
        let done = self.done.load(SeqCst);
        (done, self.total.load(SeqCst).max(done))
    }

    /// How much is to be done by work that is not [`Work`](super::Work).
    pub fn expect(&self, total: u64) {
        self.total.store(total, SeqCst);
    }

    /// How much of it is done.
    pub fn reach(&self, done: u64) {
        self.done.store(done, SeqCst);
    }

    // For the work.

    pub(crate) fn add_total(&self, bytes: u64) {
        self.total.fetch_add(bytes, SeqCst);
    }

    pub(crate) fn add_done(&self, bytes: u64) {
        self.done.fetch_add(bytes, SeqCst);
    }

    /// All is done, by whomever.
    pub(crate) fn all_done(&self) {
        let total = self.total.load(SeqCst);
        self.done.fetch_max(total, SeqCst);
    }

    pub(crate) fn set_ready(&self) {
        if !self.ready.swap(true, SeqCst) {
            (self.changed)();
        }
    }

    /// Waits while the job is paused.
    pub(crate) async fn checkpoint(&self) -> Result<Busy<'_>, Stop> {
        loop {
            let wake = self.wake.notified();
            if self.is_cancelled() {
                return Err(Stop::Cancelled);
            }
            self.busy.fetch_add(1, SeqCst);
            let busy = Busy(self);
            if !self.is_paused() {
                return Ok(busy);
            }
            drop(busy);
            wake.await;
        }
    }

    /// Does something that may take as long as others like.
    pub(crate) async fn unless_cancelled<T>(
        &self,
        work: impl Future<Output = T>,
    ) -> Result<T, Stop> {
        let mut work = std::pin::pin!(work);
        loop {
            let wake = self.wake.notified();
            if self.is_cancelled() {
                return Err(Stop::Cancelled);
            }
            tokio::select! {
                done = &mut work => return Ok(done),
                () = wake => {}
            }
        }
    }

    /// Waits until something is asked of the job, or for a time.
    pub(crate) async fn idle(&self, time: Duration) {
        if self.ending().is_none() {
            self.rest(time).await;
        }
    }

    /// As [`JobState::idle`], also when it is to end.
    async fn rest(&self, time: Duration) {
        let wake = self.wake.notified();
        if self.is_cancelled() {
            return;
        }
        let Some(reactor) = Reactor::current() else {
            return;
        };
        tokio::select! {
            () = reactor.sleep(time) => {}
            () = wake => {}
        }
    }

    /// Waits until so many bytes more may go.
    pub(crate) async fn pace(&self, bytes: u64) {
        let Some(reactor) = Reactor::current() else {
            return;
        };
        loop {
            let wake = self.wake.notified();
            let speed = self.speed();
            if speed == 0 || self.is_cancelled() {
                return;
            }
            let now = Instant::now();
            let at = {
                let mut pace = locked(&self.pace);
                let at = pace.unwrap_or(now).max(now);
                if at == now {
                    *pace = Some(at + Duration::from_secs_f64(bytes as f64 / speed as f64));
                }
                at
            };
            if at == now {
                return;
            }
            tokio::select! {
                () = reactor.sleep_until(at) => {}
                () = wake => {}
            }
        }
    }

    /// As [`JobState::failed`], for a flush of the target. What it lost is not copied again, and a flush that is tried once more says
    /// nothing of it: the job fails whatever its policy is, unless there was no space, which loses nothing.
    pub(crate) async fn flush_failed(&self, error: io::Error) -> Result<(), Stop> {
        let side = Side::Target;
        match is_no_space(&error) {
            true => self.failed(side, error).await,
            false => Err(Stop::Failed { side, error }),
        }
    }

    /// What to do about an error: an error again, or to try once more when this returns.
    pub(crate) async fn failed(&self, side: Side, error: io::Error) -> Result<(), Stop> {
        let no_space = is_no_space(&error);
        let policy = self.on_error[match side {
            Side::Source => 0,
            Side::Target => 1,
        }];
        match policy {
            OnError::Enospc if !no_space => return Err(Stop::Failed { side, error }),
            OnError::Report => return Err(Stop::Failed { side, error }),
            OnError::Ignore => self.rest(RETRY).await,
            OnError::Enospc | OnError::Stop => {
                let at = match side {
                    Side::Source => "source",
                    Side::Target => "target",
                };
                *locked(&self.trouble) = Some(format!("the {at} failed: {error}"));
                self.paused.store(true, SeqCst);
                (self.changed)();
            }
        }
        Ok(())
    }
}
