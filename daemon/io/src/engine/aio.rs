//! Linux AIO: reads and writes on O_DIRECT files without a thread for each.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicU32, Ordering, fence};

use super::Event;
use crate::op::{OpKind, RawOp};
use crate::stats::ThreadStats;

const EVENTS: u32 = 1024;

const IOCB_CMD_PREADV: u16 = 7;
const IOCB_CMD_PWRITEV: u16 = 8;
const IOCB_FLAG_RESFD: u32 = 1;

/// `struct iocb` of linux/aio_abi.h on a little-endian machine.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Iocb {
    data: u64,
    key: u32,
    rw_flags: i32,
    opcode: u16,
    reqprio: i16,
    fildes: u32,
    buf: u64,
    nbytes: u64,
    offset: i64,
    reserved2: u64,
    flags: u32,
    resfd: u32,
}

/// `struct io_event` of linux/aio_abi.h.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct IoEvent {
    data: u64,
    obj: u64,
    res: i64,
    res2: i64,
}

/// The head of the completion ring that the kernel maps at the context's address; userspace may look
/// at it to learn, without a system call, whether there is anything to reap.
#[repr(C)]
struct AioRing {
    id: u32,
    nr: u32,
    head: AtomicU32,
    tail: AtomicU32,
    magic: u32,
}

const AIO_RING_MAGIC: u32 = 0xa10a_10a1;

pub(crate) struct Aio {
    context: libc::c_ulong,
    event: OwnedFd,
    queued: Vec<Iocb>,
    in_flight: u32,
    failed: Vec<(u32, i32)>,
}

impl Aio {
    pub fn new() -> io::Result<Aio> {
        let event = rustix::event::eventfd(
            0,
            rustix::event::EventfdFlags::CLOEXEC | rustix::event::EventfdFlags::NONBLOCK,
        )?;
        let mut context: libc::c_ulong = 0;
        // SAFETY: io_setup writes the context's address to `context`, which must be 0 before.
        let rc = unsafe { libc::syscall(libc::SYS_io_setup, EVENTS, &mut context) };
        if rc < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Aio {
            context,
            event,
            queued: Vec::new(),
            in_flight: 0,
            failed: Vec::new(),
        })
    }

    pub fn event_fd(&self) -> RawFd {
        self.event.as_raw_fd()
    }

    /// Takes the operation if AIO serves its kind.
    pub fn push(&mut self, key: u32, op: &RawOp) -> bool {
        if !op.direct || self.in_flight + self.queued.len() as u32 >= EVENTS {
            return false;
        }
        let (opcode, rw_flags) = match op.kind {
            OpKind::Read => (IOCB_CMD_PREADV, 0),
            OpKind::Write => (IOCB_CMD_PWRITEV, 0),
            OpKind::WriteDurable => (IOCB_CMD_PWRITEV, libc::RWF_DSYNC),
            _ => return false,
        };
        self.queued.push(Iocb {
            data: u64::from(key),
            rw_flags,
            opcode,
            fildes: op.fd as u32,
            buf: op.iov as u64,
            nbytes: u64::from(op.iov_count),
            offset: op.offset as i64,
            flags: IOCB_FLAG_RESFD,
            resfd: self.event.as_raw_fd() as u32,
            ..Iocb::default()
        });
        true
    }

    /// Submits what is queued.
    pub fn submit(&mut self, stats: &ThreadStats) {
        let mut at = 0;
        while at < self.queued.len() {
            let ptrs: Vec<*const Iocb> = self.queued[at..].iter().map(|c| c as *const _).collect();
            // SAFETY: the control blocks are read before the call returns; the segments they point
            // to stay valid until their events are reaped.
            let n = unsafe {
                libc::syscall(
                    libc::SYS_io_submit,
                    self.context,
                    ptrs.len() as libc::c_long,
                    ptrs.as_ptr(),
                )
            };
            stats.syscalls.add(1);
            if n > 0 {
                at += n as usize;
                self.in_flight += n as u32;
                continue;
            }
            let errno = io::Error::last_os_error()
                .raw_os_error()
                .unwrap_or(libc::EIO);
            if errno == libc::EINTR {
                continue;
            }
            // The first of them is at fault (or, on EAGAIN, the system's limit is reached: its
            // owner tries again).
            self.failed.push((self.queued[at].data as u32, -errno));
            at += 1;
        }
        self.queued.clear();
    }

    pub fn has_done(&self) -> bool {
        if !self.failed.is_empty() {
            return true;
        }
        let ring = self.context as *const AioRing;
        // SAFETY: the context's address is its completion ring, mapped until io_destroy.
        let ring = unsafe { &*ring };
        if ring.magic != AIO_RING_MAGIC {
            return self.in_flight > 0;
        }
        ring.head.load(Ordering::Relaxed) != ring.tail.load(Ordering::Acquire)
    }

    pub fn reap(&mut self, out: &mut Vec<Event>) {
        for (key, result) in self.failed.drain(..) {
            out.push(Event::Done { key, result });
        }
        while self.in_flight > 0 && self.has_done() {
            let mut events = [IoEvent::default(); 64];
            let no_wait = libc::timespec {
                tv_sec: 0,
                tv_nsec: 0,
            };
            // SAFETY: the kernel writes at most 64 events; the time is read only.
            let n = unsafe {
                libc::syscall(
                    libc::SYS_io_getevents,
                    self.context,
                    0 as libc::c_long,
                    events.len() as libc::c_long,
                    events.as_mut_ptr(),
                    &no_wait,
                )
            };
            if n <= 0 {
                break;
            }
            fence(Ordering::Acquire);
            for e in &events[..n as usize] {
                self.in_flight -= 1;
                out.push(Event::Done {
                    key: e.data as u32,
                    result: e.res as i32,
                });
            }
        }
    }
}

impl Drop for Aio {
    fn drop(&mut self) {
        // SAFETY: the context came from io_setup; io_destroy waits for what is in flight.
        unsafe { libc::syscall(libc::SYS_io_destroy, self.context) };
    }
}
