//! A vhost-user front-end that says whatever a test wants, right or wrong: message by message, descriptor
//! by descriptor. It shares no code with the daemon.

use std::io::{IoSlice, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};

/// Request numbers of the vhost-user specification.
pub mod request {
    pub const GET_FEATURES: u32 = 1;
    pub const SET_FEATURES: u32 = 2;
    pub const SET_OWNER: u32 = 3;
    pub const SET_MEM_TABLE: u32 = 5;
    pub const SET_VRING_NUM: u32 = 8;
    pub const SET_VRING_ADDR: u32 = 9;
    pub const SET_VRING_BASE: u32 = 10;
    pub const GET_VRING_BASE: u32 = 11;
    pub const SET_VRING_KICK: u32 = 12;
    pub const SET_VRING_CALL: u32 = 13;
    pub const SET_VRING_ERR: u32 = 14;
    pub const SET_PROTOCOL_FEATURES: u32 = 16;
    pub const SET_VRING_ENABLE: u32 = 18;
    pub const GET_CONFIG: u32 = 24;
    pub const SET_CONFIG: u32 = 25;
    pub const ADD_MEM_REG: u32 = 37;
    pub const REM_MEM_REG: u32 = 38;
}

/// Guest-physical and front-end address of the one memory region.
pub const BASE: u64 = 0x10_0000;
/// Its length.
pub const LEN: u64 = 0x80_0000;

/// Where the parts of the queue are in the region.
pub const DESC: u64 = 0;
pub const AVAIL: u64 = 0x4000;
pub const USED: u64 = 0x5000;
/// Where requests may put things.
pub const DATA: u64 = 0x1_0000;

/// Entries of the queue.
pub const SIZE: u16 = 16;

const NEED_REPLY: u32 = 8;

/// `VIRTIO_F_VERSION_1`, the protocol features bit, and indirect descriptors.
pub const FEATURES: u64 = 1 << 32 | 1 << 30 | 1 << 28;
/// MQ, REPLY_ACK, CONFIG, CONFIGURE_MEM_SLOTS.
const PROTOCOL: u64 = 1 | 1 << 3 | 1 << 9 | 1 << 15;

fn eventfd() -> OwnedFd {
    rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).expect("descriptors are left")
}

/// One descriptor of a chain.
#[derive(Clone, Copy, Debug)]
pub struct Desc {
    pub addr: u64,
    pub len: u32,
    pub flags: u16,
    pub next: u16,
}

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

pub struct Frontend {
    stream: UnixStream,
    pub memory: OwnedFd,
    kick: OwnedFd,
    call: OwnedFd,
    err: OwnedFd,
    avail: u16,
}

impl Frontend {
    /// Connects and negotiates, without memory or queues.
    pub fn connect(socket: &Path) -> Frontend {
        let mut f = Frontend::silent(socket);
        f.negotiate();
        f
    }

    /// Connects, and says nothing.
    pub fn silent(socket: &Path) -> Frontend {
        let stream = UnixStream::connect(socket).expect("the export listens");
        stream
            .set_read_timeout(Some(Duration::from_secs(30)))
            .expect("a timeout is not zero");
        let memory = rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC)
            .expect("memfd_create works");
        rustix::fs::ftruncate(&memory, LEN).expect("there is memory");
        Frontend {
            stream,
            memory,
            kick: eventfd(),
            call: eventfd(),
            err: eventfd(),
            avail: 0,
        }
    }

    pub fn negotiate(&mut self) {
        self.send(request::SET_OWNER, 0, &[], &[]);
        self.send(request::SET_FEATURES, 0, &FEATURES.to_ne_bytes(), &[]);
        self.send(
            request::SET_PROTOCOL_FEATURES,
            0,
            &PROTOCOL.to_ne_bytes(),
            &[],
        );
    }

    /// Connects and starts queue 0.
    pub fn start(socket: &Path) -> Frontend {
        let mut f = Frontend::connect(socket);
        f.start_device();
        f
    }

    /// Gives its memory, and starts queue 0.
    pub fn start_device(&mut self) {
        let table = words(&[1, BASE, LEN, BASE, 0]);
        assert!(self.set_memory(&table));
        self.start_queue();
    }

    pub fn set_memory(&mut self, table: &[u8]) -> bool {
        let memory = self.memory.try_clone().expect("descriptors are left");
        self.ack(request::SET_MEM_TABLE, table, &[memory.as_fd()])
    }

    /// Starts queue 0, which interrupts: a guest may wait for what an earlier back-end answered and did not announce.
    pub fn start_queue(&mut self) {
        let pair = |a: u32, b: u32| [a.to_ne_bytes(), b.to_ne_bytes()].concat();
        assert!(self.ack(request::SET_VRING_NUM, &pair(0, SIZE.into()), &[]));
        assert!(self.ack(request::SET_VRING_BASE, &pair(0, self.avail.into()), &[]));
        let mut addr = pair(0, 0);
        addr.extend(words(&[BASE + DESC, BASE + USED, BASE + AVAIL, 0]));
        assert!(self.ack(request::SET_VRING_ADDR, &addr, &[]));
        for (code, fd) in [
            (request::SET_VRING_CALL, self.call.try_clone()),
            (request::SET_VRING_ERR, self.err.try_clone()),
            (request::SET_VRING_KICK, self.kick.try_clone()),
        ] {
            let fd = fd.expect("descriptors are left");
            assert!(self.ack(code, &words(&[0]), &[fd.as_fd()]));
        }
        assert!(self.ack(request::SET_VRING_ENABLE, &pair(0, 1), &[]));
        assert!(self.wait_call(), "a queue that starts interrupts its guest");
    }

    /// Stops queue 0 and returns the available index at which it would go on.
    pub fn stop_queue(&mut self) -> u16 {
        let disable = [0u32, 0].map(u32::to_ne_bytes).concat();
        assert!(self.ack(request::SET_VRING_ENABLE, &disable, &[]));
        self.send(request::GET_VRING_BASE, 0, &[0; 8], &[]);
        let state = self.reply().expect("the queue's state is told");
        u32::from_ne_bytes([state[4], state[5], state[6], state[7]]) as u16
    }

    /// Resets queue 0 as a front-end does for a driver that uses VIRTIO_F_RING_RESET: stops it, forgets its
    /// indices, and starts it with a ring of zeroes.
    pub fn reset_queue(&mut self) {
        self.stop_queue();
        self.poke(AVAIL, &[0; 64]);
        self.poke(USED, &[0; 256]);
        self.avail = 0;
        self.start_queue();
    }

    /// Sends a message.
    pub fn send(&mut self, code: u32, flags: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) {
        let mut bytes = Vec::new();
        for word in [code, 1 | flags, payload.len() as u32] {
            bytes.extend(word.to_ne_bytes());
        }
        bytes.extend(payload);
        self.send_raw(&bytes, fds);
    }

    /// Sends bytes as they are.
    pub fn send_raw(&mut self, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            control.push(SendAncillaryMessage::ScmRights(fds));
        }
        let iov = [IoSlice::new(bytes)];
        // An error is a closed connection, which tests look for by reading.
        let _ = rustix::net::sendmsg(&self.stream, &iov, &mut control, SendFlags::NOSIGNAL);
    }

    /// Reads a reply: its payload, or None if the back-end closed the connection.
    pub fn reply(&mut self) -> Option<Vec<u8>> {
        let mut header = [0; 12];
        self.stream.read_exact(&mut header).ok()?;
        let len = u32::from_ne_bytes([header[8], header[9], header[10], header[11]]);
        let mut payload = vec![0; len as usize];
        self.stream.read_exact(&mut payload).ok()?;
        Some(payload)
    }

    /// Sends a message and reads whether it was accepted.
    pub fn ack(&mut self, code: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) -> bool {
        self.send(code, NEED_REPLY, payload, fds);
        self.reply()
            .is_some_and(|r| r.first_chunk().map(|b| u64::from_ne_bytes(*b)) == Some(0))
    }

    /// Whether the back-end has closed the connection (waits for it, or for the time-out).
    pub fn is_closed(&mut self) -> bool {
        match self.stream.read(&mut [0; 1]) {
            Ok(n) => n == 0,
            // Nothing for half a minute: it is there, and silent.
            Err(e) => e.kind() != std::io::ErrorKind::WouldBlock,
        }
    }

    pub fn get_config(&mut self) -> Vec<u8> {
        let mut payload = Vec::new();
        for word in [0u32, 60, 0] {
            payload.extend(word.to_ne_bytes());
        }
        payload.resize(12 + 60, 0);
        self.send(request::GET_CONFIG, 0, &payload, &[]);
        self.reply().expect("there is a configuration")[12..].to_vec()
    }

    pub fn poke(&self, at: u64, bytes: &[u8]) {
        rustix::io::pwrite(&self.memory, bytes, at).expect("it is in the region");
    }

    pub fn peek(&self, at: u64, len: usize) -> Vec<u8> {
        let mut out = vec![0; len];
        rustix::io::pread(&self.memory, &mut out, at).expect("it is in the region");
        out
    }

    pub fn descriptor(&self, table: u64, index: u16, d: Desc) {
        let mut bytes = d.addr.to_le_bytes().to_vec();
        bytes.extend(d.len.to_le_bytes());
        bytes.extend(d.flags.to_le_bytes());
        bytes.extend(d.next.to_le_bytes());
        self.poke(table + 16 * u64::from(index), &bytes);
    }

    /// Writes a request header at a data offset.
    pub fn header(&self, at: u64, kind: u32, sector: u64) {
        let mut bytes = kind.to_le_bytes().to_vec();
        bytes.extend([0; 4]);
        bytes.extend(sector.to_le_bytes());
        self.poke(at, &bytes);
    }

    /// Makes a chain available and kicks.
    pub fn submit(&mut self, head: u16) {
        let slot = u64::from(self.avail % SIZE);
        self.poke(AVAIL + 4 + 2 * slot, &head.to_le_bytes());
        self.avail = self.avail.wrapping_add(1);
        self.poke(AVAIL + 2, &self.avail.to_le_bytes());
        self.kick();
    }

    pub fn kick(&self) {
        rustix::io::write(&self.kick, &1u64.to_ne_bytes()).expect("the kick works");
    }

    pub fn used(&self) -> u16 {
        let b = self.peek(USED + 2, 2);
        u16::from_le_bytes([b[0], b[1]])
    }

    fn wait_fd(fd: &OwnedFd) -> bool {
        let mut poll = [rustix::event::PollFd::new(fd, rustix::event::PollFlags::IN)];
        let limit = rustix::event::Timespec {
            tv_sec: 30,
            tv_nsec: 0,
        };
        let seen = rustix::event::poll(&mut poll, Some(&limit)).is_ok_and(|n| n > 0);
        if seen {
            let _ = rustix::io::read(fd, &mut [0; 8]);
        }
        seen
    }

    /// Waits for an interrupt.
    pub fn wait_call(&self) -> bool {
        Frontend::wait_fd(&self.call)
    }

    /// Waits for the signal that the queue was stopped.
    pub fn wait_err(&self) -> bool {
        Frontend::wait_fd(&self.err)
    }

    /// A request of the usual layout with `len` bytes of data; returns its status.
    pub fn simple(&mut self, kind: u32, sector: u64, len: u32) -> u8 {
        let read = kind == 0;
        self.header(DATA, kind, sector);
        self.poke(DATA + 64, &[0xaa]);
        let desc = |addr: u64, len, flags, next| Desc {
            addr: BASE + addr,
            len,
            flags,
            next,
        };
        self.descriptor(DESC, 0, desc(DATA, 16, NEXT, 1));
        let flags = NEXT | if read { WRITE } else { 0 };
        self.descriptor(DESC, 1, desc(DATA + 4096, len, flags, 2));
        self.descriptor(DESC, 2, desc(DATA + 64, 1, WRITE, 0));
        let before = self.used();
        self.submit(0);
        crate::wait_for("the request's end", || {
            (self.used() != before).then_some(())
        });
        self.peek(DATA + 64, 1)[0]
    }
}

/// Numbers as they stand in messages.
pub fn words(list: &[u64]) -> Vec<u8> {
    list.iter().flat_map(|w| w.to_ne_bytes()).collect()
}
