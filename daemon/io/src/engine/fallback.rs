//! The engine without io_uring: epoll for events and, if wanted, Linux AIO for reads and writes on
//! O_DIRECT files. Everything else is left to the thread pool.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd, RawFd};
use std::time::Duration;

use rustix::event::epoll;

use super::aio::Aio;
use super::{EngineError, Event, Wait};
use crate::op::RawOp;
use crate::stats::ThreadStats;

/// The key under which AIO's own eventfd is watched; other watches have smaller keys.
const AIO_KEY: u64 = u64::MAX;

pub(crate) struct Fallback {
    epoll: OwnedFd,
    aio: Option<Aio>,
    ready: Vec<u32>,
    turns: u32,
}

/// While the thread is busy or polling, epoll is asked once in so many turns.
const LOOK_EVERY: u32 = 32;

impl Fallback {
    pub fn new(with_aio: bool) -> Result<Fallback, EngineError> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)
            .map_err(|e| EngineError::Events(e.into()))?;
        let mut this = Fallback {
            epoll,
            aio: None,
            ready: Vec::new(),
            turns: 0,
        };
        if with_aio {
            let aio = Aio::new().map_err(EngineError::Aio)?;
            this.add(aio.event_fd(), AIO_KEY)
                .map_err(EngineError::Events)?;
            this.aio = Some(aio);
        }
        Ok(this)
    }

    pub fn has_aio(&self) -> bool {
        self.aio.is_some()
    }

    fn add(&self, fd: RawFd, key: u64) -> io::Result<()> {
        // SAFETY: whoever watches a descriptor keeps it open until it is unwatched.
        let fd = unsafe { BorrowedFd::borrow_raw(fd) };
        epoll::add(
            &self.epoll,
            fd,
            epoll::EventData::new_u64(key),
            epoll::EventFlags::IN | epoll::EventFlags::ET,
        )?;
        Ok(())
    }

    /// Takes the operation if AIO serves it.
    pub fn push(&mut self, key: u32, op: &RawOp) -> bool {
        self.aio.as_mut().is_some_and(|aio| aio.push(key, op))
    }

    pub fn watch(&mut self, watch: u32, fd: RawFd) {
        if let Err(e) = self.add(fd, u64::from(watch)) {
            tracing::error!(fd, error = %e, "cannot watch a file descriptor");
        }
    }

    pub fn unwatch(&mut self, fd: RawFd) {
        // SAFETY: as in `add`.
        let fd = unsafe { BorrowedFd::borrow_raw(fd) };
        let _ = epoll::delete(&self.epoll, fd);
    }

    /// `results` says that the thread pool has some, so that there is no need to wait.
    pub fn enter(&mut self, wait: Wait, results: bool, stats: &ThreadStats) {
        if let Some(aio) = &mut self.aio {
            aio.submit(stats);
        }
        let timeout = match wait {
            // While polling, results are seen without a call; watched descriptors need a look.
            Wait::No => {
                self.turns = (self.turns + 1) % LOOK_EVERY;
                if self.turns != 0 {
                    return;
                }
                Some(Duration::ZERO)
            }
            Wait::For(_) if results || self.aio.as_ref().is_some_and(Aio::has_done) => {
                Some(Duration::ZERO)
            }
            Wait::For(timeout) => timeout,
        };
        let timeout = timeout.and_then(|t| rustix::event::Timespec::try_from(t).ok());
        let mut events = [const { std::mem::MaybeUninit::uninit() }; 64];
        stats.syscalls.add(1);
        match epoll::wait(&self.epoll, &mut events[..], timeout.as_ref()) {
            Ok((events, _)) => {
                for e in events.iter() {
                    let key = e.data.u64();
                    if key != AIO_KEY {
                        self.ready.push(key as u32);
                    }
                }
            }
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => tracing::error!(error = %e, "epoll_wait failed"),
        }
    }

    pub fn reap(&mut self, out: &mut Vec<Event>) {
        out.extend(self.ready.drain(..).map(|watch| Event::Ready { watch }));
        if let Some(aio) = &mut self.aio
            && aio.has_done()
        {
            aio.reap(out);
        }
    }
}
