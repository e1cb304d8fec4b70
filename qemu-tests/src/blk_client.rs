//! A vhost-user-blk client on the host, on the crate virtio-driver: an implementation of the protocol and of
//! virtqueues that has nothing in common with ours.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use virtio_driver::{
    EventFd, QueueNotifier, VhostUser, VirtioBlkQueue, VirtioBlkTransport, VirtioFeatureFlags,
};

/// What a run does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    Read,
    Write,
}

/// One measurement.
#[derive(Clone, Debug)]
pub struct Load {
    pub op: Op,
    /// Bytes of a request.
    pub block: usize,
    /// Requests in flight on each queue.
    pub depth: usize,
    /// In order from the start instead of at random.
    pub sequential: bool,
    /// Bytes of the disk that are used.
    pub span: u64,
    pub duration: Duration,
}

#[derive(Clone, Debug, Default)]
pub struct Measured {
    pub requests: u64,
    pub seconds: f64,
    /// Sorted, in nanoseconds.
    pub latencies: Vec<u32>,
}

impl Measured {
    pub fn iops(&self) -> f64 {
        self.requests as f64 / self.seconds
    }

    pub fn latency(&self, q: f64) -> u32 {
        let at = (self.latencies.len() as f64 * q) as usize;
        self.latencies
            .get(at.min(self.latencies.len().saturating_sub(1)))
            .copied()
            .unwrap_or(0)
    }
}

/// Memory shared with the back-end.
struct SharedMemory {
    base: *mut u8,
    len: usize,
    fd: OwnedFd,
}

impl SharedMemory {
    fn new(len: usize) -> SharedMemory {
        let fd = rustix::fs::memfd_create("bench", rustix::fs::MemfdFlags::CLOEXEC)
            .expect("memfd_create works");
        rustix::fs::ftruncate(&fd, len as u64).expect("there is memory");
        let (prot, flags) = (
            rustix::mm::ProtFlags::READ | rustix::mm::ProtFlags::WRITE,
            rustix::mm::MapFlags::SHARED | rustix::mm::MapFlags::POPULATE,
        );
        // SAFETY: a new mapping at an address of the kernel's choice.
        let base = unsafe { rustix::mm::mmap(std::ptr::null_mut(), len, prot, flags, &fd, 0) };
        SharedMemory {
            base: base.expect("there is address space").cast(),
            len,
            fd,
        }
    }
}

impl Drop for SharedMemory {
    fn drop(&mut self) {
        // SAFETY: mapped in `new`, unmapped once.
        unsafe {
            let _ = rustix::mm::munmap(self.base.cast(), self.len);
        }
    }
}

pub struct Client {
    // In this order: the queues go before the transport that holds their memory.
    queues: Vec<VirtioBlkQueue<'static, usize>>,
    notifiers: Vec<Box<dyn QueueNotifier>>,
    completions: Vec<Arc<EventFd>>,
    transport: Box<VirtioBlkTransport>,
    memory: SharedMemory,
    chunk: usize,
}

impl Client {
    /// Connects with `queues` queues; `chunk` bytes of memory for each of `depth` requests on each.
    pub fn connect(socket: &Path, queues: usize, depth: usize, chunk: usize) -> Client {
        let features = VirtioFeatureFlags::VERSION_1 | VirtioFeatureFlags::RING_EVENT_IDX;
        // FLUSH, MQ, DISCARD, WRITE_ZEROES of virtio-blk.
        let features = features.bits() | 1 << 9 | 1 << 12 | 1 << 13 | 1 << 14;
        let path = socket.to_str().expect("socket paths are ASCII");
        let vhost = VhostUser::new(path, features).expect("the export accepts a front-end");
        let mut transport: Box<VirtioBlkTransport> = Box::new(vhost);
        let size = (depth * 4).next_power_of_two().clamp(16, 1024) as u16;
        let mut queues = VirtioBlkQueue::setup_queues(&mut *transport, queues, size)
            .expect("the export has the queues");
        for q in &mut queues {
            q.set_used_notif_enabled(true);
        }
        let memory = SharedMemory::new(queues.len() * depth * chunk);
        transport
            .map_mem_region(memory.base as usize, memory.len, memory.fd.as_raw_fd(), 0)
            .expect("the export takes memory");
        let numbers = 0..queues.len();
        Client {
            notifiers: numbers
                .clone()
                .map(|i| transport.get_submission_notifier(i))
                .collect(),
            completions: numbers.map(|i| transport.get_completion_fd(i)).collect(),
            queues,
            transport,
            memory,
            chunk,
        }
    }

    /// Bytes.
    pub fn capacity(&self) -> u64 {
        let config = self
            .transport
            .get_config()
            .expect("there is a config space");
        u64::from(config.capacity) * 512
    }

    fn buffer(&self, slot: usize) -> *mut u8 {
        self.memory.base.wrapping_add(slot * self.chunk)
    }

    /// Does one thing on queue 0 and waits for it; the result is 0 or a negative errno.
    fn one(&mut self, f: impl FnOnce(&mut VirtioBlkQueue<'static, usize>)) -> i32 {
        f(&mut self.queues[0]);
        self.notifiers[0].notify().expect("the kick works");
        loop {
            if let Some(c) = self.queues[0].completions().next() {
                return c.ret;
            }
            wait(&self.completions[0]);
        }
    }

    pub fn write(&mut self, offset: u64, data: &[u8]) -> i32 {
        assert!(data.len() <= self.chunk, "more than a chunk");
        let buf = self.buffer(0);
        // SAFETY: slot 0 has `chunk` bytes.
        unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), buf, data.len()) };
        let len = data.len();
        // SAFETY: the buffer is used by nobody else until the request ends.
        self.one(|q| unsafe { q.write_raw(offset, buf, len, 0) }.expect("there is room"))
    }

    pub fn read(&mut self, offset: u64, data: &mut [u8]) -> i32 {
        assert!(data.len() <= self.chunk, "more than a chunk");
        let buf = self.buffer(0);
        let len = data.len();
        // SAFETY: the buffer is used by nobody else until the request ends.
        let result =
            self.one(|q| unsafe { q.read_raw(offset, buf, len, 0) }.expect("there is room"));
        // SAFETY: slot 0 has `chunk` bytes.
        unsafe { std::ptr::copy_nonoverlapping(buf, data.as_mut_ptr(), len) };
        result
    }

    pub fn flush(&mut self) -> i32 {
        self.one(|q| q.flush(0).expect("there is room"))
    }

    pub fn discard(&mut self, offset: u64, len: u64) -> i32 {
        self.one(|q| q.discard(offset, len, 0).expect("there is room"))
    }

    pub fn write_zeroes(&mut self, offset: u64, len: u64, unmap: bool) -> i32 {
        self.one(|q| {
            q.write_zeroes(offset, len, unmap, 0)
                .expect("there is room")
        })
    }

    /// Submits one write of a chunk for each slot of each queue, somewhere below `span`, and waits for none.
    pub fn start_writes(&mut self, span: u64) {
        let mut next = Positions::new(span / self.chunk as u64, false);
        let depth = self.memory.len / self.chunk / self.queues.len();
        for i in 0..self.queues.len() {
            for slot in i * depth..(i + 1) * depth {
                let (buf, len) = (self.buffer(slot), self.chunk);
                let at = next.get() * len as u64;
                // SAFETY: each slot has a buffer of its own, which is not touched again.
                let result = unsafe { self.queues[i].write_raw(at, buf, len, slot) };
                result.expect("there is room");
            }
            self.notifiers[i].notify().expect("the kick works");
        }
    }

    /// Runs a load on all queues from one thread that sleeps in poll(2) when there is nothing to do.
    pub fn run(&mut self, load: &Load) -> Measured {
        let mut out = Measured::default();
        let blocks = load.span / load.block as u64;
        let mut next = Positions::new(blocks, load.sequential);
        let slots = self.queues.len() * load.depth;
        let mut started = vec![Instant::now(); slots];
        let buffers: Vec<*mut u8> = (0..slots).map(|s| self.buffer(s)).collect();
        let begin = Instant::now();
        let end = begin + load.duration;
        let submit = |q: &mut VirtioBlkQueue<'static, usize>, slot: usize, at: u64| {
            let offset = at * load.block as u64;
            // SAFETY: each slot has a buffer of its own and one request at a time.
            let result = unsafe {
                match load.op {
                    Op::Read => q.read_raw(offset, buffers[slot], load.block, slot),
                    Op::Write => q.write_raw(offset, buffers[slot], load.block, slot),
                }
            };
            result.expect("there is room");
        };
        for (i, q) in self.queues.iter_mut().enumerate() {
            for slot in i * load.depth..(i + 1) * load.depth {
                submit(q, slot, next.get());
            }
            self.notifiers[i].notify().expect("the kick works");
        }
        let mut in_flight = slots;
        let mut done = Vec::new();
        while in_flight > 0 {
            let mut any = false;
            for (i, q) in self.queues.iter_mut().enumerate() {
                done.clear();
                done.extend(q.completions().map(|c| {
                    assert_eq!(c.ret, 0, "a request failed");
                    c.context
                }));
                if done.is_empty() {
                    continue;
                }
                any = true;
                let now = Instant::now();
                for &slot in &done {
                    out.requests += 1;
                    out.latencies.push((now - started[slot]).as_nanos() as u32);
                    if now < end {
                        started[slot] = now;
                        submit(q, slot, next.get());
                    } else {
                        in_flight -= 1;
                    }
                }
                if now < end && q.avail_notif_needed() {
                    self.notifiers[i].notify().expect("the kick works");
                }
            }
            if !any && in_flight > 0 {
                wait_any(&self.completions);
            }
        }
        out.seconds = begin.elapsed().as_secs_f64();
        out.latencies.sort_unstable();
        out
    }
}

/// Where the next request goes.
struct Positions {
    blocks: u64,
    sequential: bool,
    state: u64,
}

impl Positions {
    fn new(blocks: u64, sequential: bool) -> Positions {
        Positions {
            blocks,
            sequential,
            state: if sequential { 0 } else { 0x9e37_79b9_7f4a_7c15 },
        }
    }

    fn get(&mut self) -> u64 {
        if self.sequential {
            self.state += 1;
            return (self.state - 1) % self.blocks;
        }
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        self.state % self.blocks
    }
}

fn borrowed(fd: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor lives as long as the reference.
    unsafe { BorrowedFd::borrow_raw(fd.as_raw_fd()) }
}

/// Sleeps until the descriptor is readable, then reads it. (It is not read blindly: back-ends may make it
/// non-blocking.)
fn wait(fd: &EventFd) {
    let fd = borrowed(fd);
    let mut poll = [rustix::event::PollFd::new(
        &fd,
        rustix::event::PollFlags::IN,
    )];
    let _ = rustix::event::poll(&mut poll, None);
    let _ = rustix::io::read(fd.as_fd(), &mut [0; 8]);
}

fn wait_any(fds: &[Arc<EventFd>]) {
    let fds: Vec<BorrowedFd<'_>> = fds.iter().map(|fd| borrowed(fd)).collect();
    let mut polls: Vec<_> = fds
        .iter()
        .map(|fd| rustix::event::PollFd::new(fd, rustix::event::PollFlags::IN))
        .collect();
    let _ = rustix::event::poll(&mut polls, None);
    for (fd, poll) in fds.iter().zip(&polls) {
        if poll.revents().contains(rustix::event::PollFlags::IN) {
            let _ = rustix::io::read(fd, &mut [0; 8]);
        }
    }
}
