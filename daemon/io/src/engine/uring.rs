//! The io_uring engine.

use std::io;
use std::os::fd::RawFd;

use io_uring::{EnterFlags, IoUring, cqueue, opcode, squeue, types};

use super::{Event, Wait};
use crate::file::FIXED_FILES;
use crate::op::{OpKind, RawOp};
use crate::reactor::FIXED_BUFFERS;
use crate::stats::ThreadStats;

const SQ_ENTRIES: u32 = 512;
const CQ_ENTRIES: u32 = 4096;

/// `user_data` is a tag in the upper half and a key in the lower.
const TAG_OP: u64 = 0;
const TAG_WATCH: u64 = 1 << 32;
const TAG_IGNORE: u64 = 2 << 32;
const TAG_MASK: u64 = 3 << 32;

pub(crate) struct Uring {
    ring: IoUring,
    has_files: bool,
    has_buffers: bool,
}

impl Uring {
    pub fn new() -> io::Result<Uring> {
        // DEFER_TASKRUN (Linux 6.1) leaves completions to our own calls; TASKRUN_FLAG then shows that
        // some wait, without which a polling loop would never see them.
        let ring = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_coop_taskrun()
            .setup_taskrun_flag()
            .setup_cqsize(CQ_ENTRIES)
            .build(SQ_ENTRIES)
            .or_else(|e| match e.raw_os_error() {
                Some(libc::EINVAL) => IoUring::builder()
                    .setup_coop_taskrun()
                    .setup_taskrun_flag()
                    .setup_cqsize(CQ_ENTRIES)
                    .build(SQ_ENTRIES),
                _ => Err(e),
            })?;
        let params = ring.params();
        if !params.is_feature_ext_arg() || !params.is_feature_nodrop() {
            return Err(io::Error::from_raw_os_error(libc::ENOSYS));
        }
        let mut probe = io_uring::Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        for code in [
            opcode::Read::CODE,
            opcode::Write::CODE,
            opcode::Fallocate::CODE,
            opcode::Fsync::CODE,
            opcode::PollAdd::CODE,
            opcode::AsyncCancel::CODE,
        ] {
            if !probe.is_supported(code) {
                return Err(io::Error::from_raw_os_error(libc::ENOSYS));
            }
        }
        let has_files = ring.submitter().register_files_sparse(FIXED_FILES).is_ok();
        let has_buffers = ring
            .submitter()
            .register_buffers_sparse(u32::from(FIXED_BUFFERS))
            .is_ok();
        Ok(Uring {
            ring,
            has_files,
            has_buffers,
        })
    }

    fn push_entry(&mut self, entry: &squeue::Entry, stats: &ThreadStats) {
        loop {
            // SAFETY: pointers in the entry stay valid until its completion: the reactor keeps the
            // operation (and what it points to) until then.
            if unsafe { self.ring.submission().push(entry) }.is_ok() {
                return;
            }
            self.enter(Wait::No, stats);
        }
    }

    pub fn push(&mut self, key: u32, op: &RawOp, stats: &ThreadStats) {
        self.push_entry(&build(op).user_data(TAG_OP | u64::from(key)), stats);
    }

    pub fn cancel(&mut self, key: u32, stats: &ThreadStats) {
        let entry = opcode::AsyncCancel::new(TAG_OP | u64::from(key)).build();
        self.push_entry(&entry.user_data(TAG_IGNORE), stats);
    }

    pub fn watch(&mut self, watch: u32, fd: RawFd, stats: &ThreadStats) {
        let entry = opcode::PollAdd::new(types::Fd(fd), libc::POLLIN as u32)
            .multi(true)
            .build();
        self.push_entry(&entry.user_data(TAG_WATCH | u64::from(watch)), stats);
    }

    pub fn unwatch(&mut self, watch: u32, stats: &ThreadStats) {
        let entry = opcode::PollRemove::new(TAG_WATCH | u64::from(watch)).build();
        self.push_entry(&entry.user_data(TAG_IGNORE), stats);
        // The descriptor is about to be closed: the poll must be gone by then.
        self.enter(Wait::No, stats);
    }

    pub fn enter(&mut self, wait: Wait, stats: &ThreadStats) {
        let (to_submit, kernel_waits) = {
            let sq = self.ring.submission();
            (sq.len(), sq.taskrun() || sq.cq_overflow())
        };
        let result = match wait {
            Wait::No if to_submit == 0 && !kernel_waits => return,
            Wait::No => {
                let flags = EnterFlags::GETEVENTS;
                // SAFETY: no argument is passed.
                unsafe {
                    self.ring.submitter().enter::<libc::sigset_t>(
                        to_submit as u32,
                        0,
                        flags.bits(),
                        None,
                    )
                }
            }
            Wait::For(timeout) => {
                let submitter = self.ring.submitter();
                match timeout {
                    None => submitter.submit_and_wait(1),
                    Some(t) => {
                        let ts = types::Timespec::from(t);
                        let args = types::SubmitArgs::new().timespec(&ts);
                        submitter.submit_with_args(1, &args)
                    }
                }
            }
        };
        stats.syscalls.add(1);
        if let Err(e) = result {
            match e.raw_os_error() {
                // Nothing to do: time is up, a signal came, or the completion queue must be reaped
                // first, which is what the caller does next.
                Some(libc::ETIME | libc::EINTR | libc::EBUSY | libc::EAGAIN) => {}
                _ => tracing::error!(error = %e, "io_uring_enter failed"),
            }
        }
    }

    pub fn reap(&mut self, out: &mut Vec<Event>) {
        for cqe in self.ring.completion() {
            let key = cqe.user_data() as u32;
            match cqe.user_data() & TAG_MASK {
                TAG_OP => out.push(Event::Done {
                    key,
                    result: cqe.result(),
                }),
                TAG_WATCH if cqe.result() == -libc::ECANCELED => {}
                TAG_WATCH if cqueue::more(cqe.flags()) => out.push(Event::Ready { watch: key }),
                TAG_WATCH => out.push(Event::ReadyOnce { watch: key }),
                _ => {}
            }
        }
    }

    pub fn register_file(&mut self, slot: u32, fd: RawFd) -> bool {
        self.has_files
            && slot < FIXED_FILES
            && self
                .ring
                .submitter()
                .register_files_update(slot, &[fd])
                .is_ok()
    }

    /// # Safety
    /// As for [`super::Engine::register_buffer`].
    pub unsafe fn register_buffer(&mut self, slot: u16, vec: libc::iovec) -> bool {
        self.has_buffers
            // SAFETY: the caller keeps the memory mapped while it is registered.
            && unsafe {
                self.ring
                    .submitter()
                    .register_buffers_update(u32::from(slot), &[vec], None)
            }
            .is_ok()
    }
}

/// Longer reads and writes, in bytes, are done by the kernel's worker threads from the beginning: what the page cache has is copied as it
/// is submitted, and the thread's other queues would wait.
const MAX_INLINE: u64 = 8 << 20;

fn build(op: &RawOp) -> squeue::Entry {
    let (fd, flags) = match op.fixed_file {
        Some(slot) => (types::Fd(slot as i32), squeue::Flags::FIXED_FILE),
        None => (types::Fd(op.fd), squeue::Flags::empty()),
    };
    let transfers = matches!(op.kind, OpKind::Read | OpKind::Write | OpKind::WriteDurable);
    let flags = match transfers && op.len > MAX_INLINE {
        true => flags | squeue::Flags::ASYNC,
        false => flags,
    };
    build_for(fd, op).flags(flags)
}

fn build_for(fd: types::Fd, op: &RawOp) -> squeue::Entry {
    let rw_flags = if op.kind == OpKind::WriteDurable {
        libc::RWF_DSYNC
    } else {
        0
    };
    // SAFETY: `iov` points to `iov_count` (at least one) segments for reads and writes.
    let first = || unsafe { *op.iov };
    match (op.kind, op.fixed_buffer, op.iov_count) {
        (OpKind::Read, Some(buf), 1) => {
            let v = first();
            opcode::ReadFixed::new(fd, v.iov_base.cast(), v.iov_len as u32, buf)
                .offset(op.offset)
                .build()
        }
        (OpKind::Read, None, 1) => {
            let v = first();
            opcode::Read::new(fd, v.iov_base.cast(), v.iov_len as u32)
                .offset(op.offset)
                .build()
        }
        (OpKind::Read, _, n) => opcode::Readv::new(fd, op.iov, n).offset(op.offset).build(),
        (OpKind::Write | OpKind::WriteDurable, Some(buf), 1) => {
            let v = first();
            opcode::WriteFixed::new(fd, v.iov_base.cast(), v.iov_len as u32, buf)
                .offset(op.offset)
                .rw_flags(rw_flags)
                .build()
        }
        (OpKind::Write | OpKind::WriteDurable, None, 1) => {
            let v = first();
            opcode::Write::new(fd, v.iov_base.cast(), v.iov_len as u32)
                .offset(op.offset)
                .rw_flags(rw_flags)
                .build()
        }
        (OpKind::Write | OpKind::WriteDurable, _, n) => opcode::Writev::new(fd, op.iov, n)
            .offset(op.offset)
            .rw_flags(rw_flags)
            .build(),
        (OpKind::Sync, ..) => opcode::Fsync::new(fd)
            .flags(types::FsyncFlags::DATASYNC)
            .build(),
        (OpKind::Fallocate(mode), ..) => opcode::Fallocate::new(fd, op.len)
            .offset(op.offset)
            .mode(mode.mode())
            .build(),
        (OpKind::BlockDiscard | OpKind::BlockZeroOut | OpKind::Share | OpKind::WriteBehind, ..) => {
            unreachable!("the engine gives ioctls to its thread pool")
        }
    }
}
