//! The engines behind an I/O thread: io_uring, or threads (with Linux AIO for O_DIRECT) without it.

mod aio;
mod fallback;
mod folios;
mod pool;
mod uring;

use std::fmt;
use std::os::fd::RawFd;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use crate::op::{OpKind, RawOp};
use crate::stats::ThreadStats;
use crate::thread::Shared;

use fallback::Fallback;
use pool::Pool;
use uring::Uring;

/// What the user asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EngineChoice {
    /// io_uring where the kernel allows it, otherwise AIO.
    #[default]
    Auto,
    Uring,
    /// Linux AIO for O_DIRECT files, a thread pool for everything else.
    Aio,
    /// A thread pool for everything.
    Threads,
}

impl FromStr for EngineChoice {
    type Err = String;

    fn from_str(s: &str) -> Result<EngineChoice, String> {
        match s {
            "auto" => Ok(EngineChoice::Auto),
            "uring" => Ok(EngineChoice::Uring),
            "aio" => Ok(EngineChoice::Aio),
            "threads" => Ok(EngineChoice::Threads),
            _ => Err(format!(
                "unknown I/O engine '{s}': use auto, uring, aio or threads"
            )),
        }
    }
}

/// What an I/O thread runs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EngineKind {
    Uring,
    Aio,
    Threads,
}

impl fmt::Display for EngineKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            EngineKind::Uring => "uring",
            EngineKind::Aio => "aio",
            EngineKind::Threads => "threads",
        })
    }
}

#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    #[error(
        "io_uring is not available: {0} (sysctl kernel.io_uring_disabled or a seccomp filter may forbid it); use --io-engine=auto, aio or threads"
    )]
    Uring(std::io::Error),
    #[error(
        "Linux AIO is not available: {0} (see sysctl fs.aio-max-nr); use --io-engine=auto or threads"
    )]
    Aio(std::io::Error),
    #[error("cannot set up event notification: {0}")]
    Events(std::io::Error),
}

/// How long to stay in the kernel.
#[derive(Clone, Copy)]
pub(crate) enum Wait {
    No,
    For(Option<Duration>),
}

/// Something an engine reports.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Event {
    /// The operation with this key ended: bytes transferred, or a negative errno.
    Done { key: u32, result: i32 },
    /// A watched descriptor became readable.
    Ready { watch: u32 },
    /// As `Ready`, and the watch must be armed again.
    ReadyOnce { watch: u32 },
}

enum Backend {
    Uring(Uring),
    Fallback(Fallback),
}

pub(crate) struct Engine {
    backend: Backend,
    /// Does what the backend cannot; without threads until it is used.
    pool: Pool,
}

impl Engine {
    pub fn new(choice: EngineChoice, shared: &Arc<Shared>) -> Result<Engine, EngineError> {
        let uring = || Uring::new().map(Backend::Uring).map_err(EngineError::Uring);
        let fallback = |aio| Fallback::new(aio).map(Backend::Fallback);
        let backend = match choice {
            EngineChoice::Uring => uring(),
            EngineChoice::Aio => fallback(true),
            EngineChoice::Threads => fallback(false),
            EngineChoice::Auto => uring()
                .or_else(|error| {
                    tracing::warn!(%error, "falling back to Linux AIO and a thread pool");
                    fallback(true)
                })
                .or_else(|_| fallback(false)),
        }?;
        Ok(Engine {
            backend,
            pool: Pool::new(shared),
        })
    }

    pub fn kind(&self) -> EngineKind {
        match &self.backend {
            Backend::Uring(_) => EngineKind::Uring,
            Backend::Fallback(f) if f.has_aio() => EngineKind::Aio,
            Backend::Fallback(_) => EngineKind::Threads,
        }
    }

    /// Queues an operation; it starts with the next `enter` at the latest.
    pub fn push(&mut self, key: u32, op: &RawOp, stats: &ThreadStats) {
        let taken = match &mut self.backend {
            Backend::Uring(_) if op.kind == OpKind::Write && op.write_blocks => {
                self.pool.push_write(key, *op);
                return;
            }
            Backend::Uring(_) if op.kind.is_ioctl() => false,
            Backend::Uring(u) => {
                u.push(key, op, stats);
                true
            }
            Backend::Fallback(f) => f.push(key, op),
        };
        if !taken {
            self.pool.push(key, *op);
        }
    }

    /// Asks for an operation to be given up; it still reports its end.
    pub fn cancel(&mut self, key: u32, stats: &ThreadStats) {
        match &mut self.backend {
            Backend::Uring(u) => u.cancel(key, stats),
            Backend::Fallback(_) => {}
        }
        self.pool.cancel(key);
    }

    /// Starts everything queued and waits for events if told to.
    pub fn enter(&mut self, wait: Wait, stats: &ThreadStats) {
        self.pool.wake();
        match &mut self.backend {
            Backend::Uring(u) => u.enter(wait, stats),
            Backend::Fallback(f) => f.enter(wait, self.pool.has_done(), stats),
        }
    }

    /// Moves everything that happened into `out`.
    pub fn reap(&mut self, out: &mut Vec<Event>) {
        match &mut self.backend {
            Backend::Uring(u) => u.reap(out),
            Backend::Fallback(f) => f.reap(out),
        }
        if self.pool.has_done() {
            let done = self.pool.take_done().into_iter();
            out.extend(done.map(|(key, result)| Event::Done { key, result }));
        }
    }

    /// Reports `fd` whenever it becomes readable (edge triggered: the descriptor need not be read).
    pub fn watch(&mut self, watch: u32, fd: RawFd, stats: &ThreadStats) {
        match &mut self.backend {
            Backend::Uring(u) => u.watch(watch, fd, stats),
            Backend::Fallback(f) => f.watch(watch, fd),
        }
    }

    pub fn unwatch(&mut self, watch: u32, fd: RawFd, stats: &ThreadStats) {
        match &mut self.backend {
            Backend::Uring(u) => u.unwatch(watch, stats),
            Backend::Fallback(f) => f.unwatch(fd),
        }
    }

    /// Threads beside this one work for it: whoever polls lets them run if they share its CPU.
    pub fn has_helpers_at_work(&self) -> bool {
        self.pool.is_busy()
    }

    /// A file is no longer open; nothing is in flight on it.
    pub fn forget_file(&self, file: u32) {
        self.pool.forget_file(file);
    }

    /// Puts `fd` (or nothing, if negative) into the registered file table; false if there is none.
    pub fn register_file(&mut self, slot: u32, fd: RawFd) -> bool {
        match &mut self.backend {
            Backend::Uring(u) => u.register_file(slot, fd),
            Backend::Fallback(_) => false,
        }
    }

    /// Registers memory for fixed reads and writes; false where that does not exist or is refused.
    ///
    /// # Safety
    /// The memory must stay mapped until the slot is registered anew (or the engine dropped).
    pub unsafe fn register_buffer(&mut self, slot: u16, vec: libc::iovec) -> bool {
        match &mut self.backend {
            // SAFETY: passed on to the caller.
            Backend::Uring(u) => unsafe { u.register_buffer(slot, vec) },
            Backend::Fallback(_) => false,
        }
    }
}
