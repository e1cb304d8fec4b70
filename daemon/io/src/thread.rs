//! The handle by which other threads reach an I/O thread.

use std::cell::RefCell;
use std::future::Future;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::sync::oneshot;

use crate::engine::{Engine, EngineChoice, EngineError, EngineKind};
use crate::poll_window::DEFAULT_POLL_MAX;
use crate::reactor::Reactor;
use crate::stats::{ThreadStats, ThreadStatsSnapshot};

type Call = Box<dyn FnOnce(&Rc<Reactor>) + Send>;

pub(crate) enum Message {
    Call(Call),
    Wake(u32),
}

#[derive(Default)]
struct Inbox {
    messages: Vec<Message>,
    /// The thread has ended.
    closed: bool,
}

/// What an I/O thread shares with the others: its inbox and its counters.
pub(crate) struct Shared {
    inbox: Mutex<Inbox>,
    /// Something is in the inbox (or in the results of a thread pool).
    pending: AtomicBool,
    /// The thread is about to sleep, or sleeps: it must be woken through the eventfd.
    sleeping: AtomicBool,
    event: OwnedFd,
    pub stats: ThreadStats,
    poll_max_ns: AtomicU64,
}

thread_local! {
    static CURRENT: RefCell<Option<Rc<Reactor>>> = const { RefCell::new(None) };
}

pub(crate) fn current() -> Option<Rc<Reactor>> {
    CURRENT.with_borrow(|c| c.clone())
}

static THREADS: Mutex<Vec<Weak<Inner>>> = Mutex::new(Vec::new());

fn locked<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(|e| e.into_inner())
}

/// All I/O threads of the process.
pub(crate) fn all() -> Vec<IoThread> {
    locked(&THREADS)
        .iter()
        .filter_map(Weak::upgrade)
        .map(IoThread)
        .collect()
}

impl Shared {
    fn new() -> std::io::Result<Shared> {
        Ok(Shared {
            inbox: Mutex::default(),
            pending: AtomicBool::new(false),
            sleeping: AtomicBool::new(false),
            event: rustix::event::eventfd(
                0,
                rustix::event::EventfdFlags::CLOEXEC | rustix::event::EventfdFlags::NONBLOCK,
            )?,
            stats: ThreadStats::default(),
            poll_max_ns: AtomicU64::new(DEFAULT_POLL_MAX.as_nanos() as u64),
        })
    }

    pub fn event(&self) -> &OwnedFd {
        &self.event
    }

    pub fn poll_max(&self) -> Duration {
        Duration::from_nanos(self.poll_max_ns.load(Ordering::Relaxed))
    }

    /// Makes the thread look at its inbox and its engine.
    pub fn notify(&self) {
        self.pending.store(true, Ordering::SeqCst);
        if self.sleeping.swap(false, Ordering::SeqCst) {
            let _ = rustix::io::write(&self.event, &1u64.to_ne_bytes());
        }
    }

    fn post(&self, message: Message) {
        {
            let mut inbox = locked(&self.inbox);
            if inbox.closed {
                // What it would run is dropped when the lock is given back: that may post, too.
                drop(inbox);
                return drop(message);
            }
            inbox.messages.push(message);
        }
        self.notify();
    }

    pub fn wake_task(self: &Arc<Self>, index: u32) {
        let here = CURRENT.with_borrow(|c| match c {
            Some(r) if r.is_shared(self) => {
                r.push_ready(index);
                true
            }
            _ => false,
        });
        if !here {
            self.post(Message::Wake(index));
        }
    }

    pub fn has_pending(&self) -> bool {
        self.pending.load(Ordering::Relaxed)
    }

    pub fn take_inbox(&self) -> Vec<Message> {
        // Cleared before the look: what is posted after it sets the flag again.
        self.pending.store(false, Ordering::SeqCst);
        std::mem::take(&mut locked(&self.inbox).messages)
    }

    /// Nothing is taken any more, and what has not been run never will be: its senders get to know.
    fn close_inbox(&self) {
        let left = {
            let mut inbox = locked(&self.inbox);
            inbox.closed = true;
            std::mem::take(&mut inbox.messages)
        };
        drop(left);
    }

    /// Announces that the thread will sleep; false if there is something to do after all.
    pub fn prepare_sleep(&self) -> bool {
        self.sleeping.store(true, Ordering::SeqCst);
        if self.pending.load(Ordering::SeqCst) {
            self.sleeping.store(false, Ordering::SeqCst);
            return false;
        }
        true
    }

    pub fn woke(&self) {
        self.sleeping.store(false, Ordering::SeqCst);
    }
}

/// How to start an I/O thread.
#[derive(Clone, Debug)]
pub struct IoThreadConfig {
    /// Shown in `ps -L` (cut to 15 bytes) and in logs.
    pub name: String,
    pub engine: EngineChoice,
    /// CPUs to run on; empty for no restriction.
    pub cpus: Vec<usize>,
    /// Ceiling of busy polling; zero switches it off.
    pub poll_max: Duration,
}

impl IoThreadConfig {
    pub fn new(name: impl Into<String>) -> IoThreadConfig {
        IoThreadConfig {
            name: name.into(),
            engine: EngineChoice::Auto,
            cpus: Vec::new(),
            poll_max: DEFAULT_POLL_MAX,
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("cannot start a thread: {0}")]
    Thread(std::io::Error),
    #[error(transparent)]
    Engine(#[from] EngineError),
    #[error("CPU {cpu} cannot be used: {error}")]
    Affinity { cpu: usize, error: std::io::Error },
}

/// The I/O thread has stopped.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("the I/O thread has stopped")]
pub struct IoThreadError;

struct Inner {
    name: String,
    shared: Arc<Shared>,
    engine: EngineKind,
    cpus: Vec<usize>,
    join: Mutex<Option<JoinHandle<()>>>,
}

/// An I/O thread. Clones are the same thread; it runs until [`IoThread::stop`].
#[derive(Clone)]
pub struct IoThread(Arc<Inner>);

impl std::fmt::Debug for IoThread {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("IoThread").field(&self.0.name).finish()
    }
}

fn pin(cpus: &[usize]) -> Result<(), StartError> {
    let Some(&first) = cpus.first() else {
        return Ok(());
    };
    let mut set = rustix::thread::CpuSet::new();
    for &cpu in cpus {
        if cpu >= rustix::thread::CpuSet::MAX_CPU {
            return Err(StartError::Affinity {
                cpu,
                error: std::io::Error::from_raw_os_error(libc::EINVAL),
            });
        }
        set.set(cpu);
    }
    rustix::thread::sched_setaffinity(None, &set).map_err(|e| StartError::Affinity {
        cpu: first,
        error: e.into(),
    })
}

impl IoThread {
    /// Starts a thread; returns when its engine is up.
    pub fn start(config: IoThreadConfig) -> Result<IoThread, StartError> {
        let shared = Arc::new(Shared::new().map_err(StartError::Thread)?);
        shared
            .poll_max_ns
            .store(config.poll_max.as_nanos() as u64, Ordering::Relaxed);
        let (tx, rx) = std::sync::mpsc::channel();
        let thread_shared = shared.clone();
        let IoThreadConfig {
            name, engine, cpus, ..
        } = config;
        let thread_cpus = cpus.clone();
        let mut thread_name = name.clone();
        while thread_name.len() > 15 {
            thread_name.pop();
        }
        let join = std::thread::Builder::new()
            .name(thread_name)
            .spawn(move || {
                // The ring belongs to the thread that makes it (SINGLE_ISSUER).
                let engine =
                    pin(&thread_cpus).and_then(|()| Ok(Engine::new(engine, &thread_shared)?));
                let engine = match engine {
                    Ok(e) => e,
                    Err(e) => {
                        let _ = tx.send(Err(e));
                        return;
                    }
                };
                let _ = tx.send(Ok(engine.kind()));
                let reactor = Reactor::new(thread_shared, engine);
                CURRENT.set(Some(reactor.clone()));
                reactor.run();
                CURRENT.set(None);
            })
            .map_err(StartError::Thread)?;
        let engine = match rx.recv() {
            Ok(Ok(kind)) => kind,
            Ok(Err(e)) => return Err(e),
            Err(_) => {
                return Err(StartError::Thread(std::io::Error::other(
                    "it ended before it began",
                )));
            }
        };
        let inner = Arc::new(Inner {
            name,
            shared,
            engine,
            cpus,
            join: Mutex::new(Some(join)),
        });
        let mut threads = locked(&THREADS);
        threads.retain(|t| t.strong_count() > 0);
        threads.push(Arc::downgrade(&inner));
        Ok(IoThread(inner))
    }

    pub fn name(&self) -> &str {
        &self.0.name
    }

    pub fn engine(&self) -> EngineKind {
        self.0.engine
    }

    pub fn cpus(&self) -> &[usize] {
        &self.0.cpus
    }

    pub fn poll_max(&self) -> Duration {
        self.0.shared.poll_max()
    }

    /// Changes the ceiling of busy polling; zero switches it off.
    pub fn set_poll_max(&self, max: Duration) {
        self.0
            .shared
            .poll_max_ns
            .store(max.as_nanos() as u64, Ordering::Relaxed);
    }

    pub fn statistics(&self) -> ThreadStatsSnapshot {
        self.0.shared.stats.snapshot()
    }

    /// Whether the two handles are of one thread.
    pub fn is_same(&self, other: &IoThread) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// Runs `f` on the thread without waiting for it. After `stop` it is dropped.
    pub fn post(&self, f: impl FnOnce(&Rc<Reactor>) + Send + 'static) {
        self.0.shared.post(Message::Call(Box::new(f)));
    }

    /// Runs `f` on the thread and waits for its result.
    pub async fn run<R: Send + 'static>(
        &self,
        f: impl FnOnce(&Rc<Reactor>) -> R + Send + 'static,
    ) -> Result<R, IoThreadError> {
        let (tx, rx) = oneshot::channel();
        self.post(move |r| {
            let _ = tx.send(f(r));
        });
        rx.await.map_err(|_| IoThreadError)
    }

    /// Runs a future on the thread and waits for its output. If the caller stops waiting, the future
    /// still runs to its end.
    pub async fn run_async<F, Fut>(&self, f: F) -> Result<Fut::Output, IoThreadError>
    where
        F: FnOnce(Rc<Reactor>) -> Fut + Send + 'static,
        Fut: Future + 'static,
        Fut::Output: Send + 'static,
    {
        let (tx, rx) = oneshot::channel();
        self.post(move |r| {
            let future = f(r.clone());
            r.spawn(async move {
                let _ = tx.send(future.await);
            });
        });
        rx.await.map_err(|_| IoThreadError)
    }

    /// Ends the thread once every operation in flight has ended, and waits for it.
    pub fn stop(&self) {
        self.post(|r| r.stop());
        if let Some(join) = locked(&self.0.join).take() {
            let _ = join.join();
        }
        self.0.shared.close_inbox();
    }
}
