//! A vhost-user front-end that says anything, with any descriptors, while its guest writes anything to its memory: no panic, no
//! hang, and nothing of it is left when it has gone.
//!
//! Run with `cargo +nightly fuzz run vhost_user` in daemon/exports.

#![no_main]

use std::io::{IoSlice, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use libfuzzer_sys::fuzz_target;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use tokio::sync::mpsc;
use vdisk_api::{NodeOptions, SocketAddress, VhostUserBlkOptions};
use vdisk_block::{Backend, Graph, Runtime};
use vdisk_exports::vhost_user::VhostUserBlk;
use vdisk_exports::virtio_blk::DeviceOptions;
use vdisk_exports::{ExportEvent, Left};
use vdisk_io::{IoThread, IoThreadConfig};

/// Where the one region of the guest's memory is, for guest and front-end.
const BASE: u64 = 0x10_0000;
const LEN: u64 = 0x4_0000;
const AVAIL: u64 = 0x4000;
const USED: u64 = 0x5000;
const DATA: u64 = 0x8000;
const QUEUES: u16 = 2;
const NEED_REPLY: u8 = 8;

/// An export of a node that reads as zeroes, served by threads of its own.
struct Daemon {
    export: VhostUserBlk,
    _runtime: tokio::runtime::Runtime,
    _folder: tempfile::TempDir,
}

fn daemon() -> &'static Daemon {
    static DAEMON: OnceLock<Daemon> = OnceLock::new();
    DAEMON.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let options = serde_json::json!({
            "driver": "null-co", "node-name": "null", "size": 1 << 20, "read-zeroes": true
        });
        let options = NodeOptions::from_map(options.as_object().unwrap().clone()).unwrap();
        let mut graph = Graph::new(Runtime::default());
        let plan = graph.plan(options).unwrap();
        graph.insert(plan.open().map_err(|(e, _)| e).unwrap());
        let node = graph.node("null").unwrap();
        let thread = IoThread::start(IoThreadConfig::new("io0")).unwrap();
        let device = DeviceOptions {
            id: "fuzz".into(),
            writable: true,
            writethrough: false,
            num_queues: QUEUES,
            queue_size: 256,
            logical_block_size: 512,
            physical_block_size: 512,
            serial: "fuzz".into(),
        };
        let kind = VhostUserBlkOptions {
            addr: SocketAddress::Unix(folder.path().join("socket")),
            socket_mode: None,
            socket_group: None,
            num_queues: QUEUES,
            queue_size: 256,
            logical_block_size: 512,
            physical_block_size: 512,
            serial: "fuzz".into(),
            fixed_buffers: true,
        };
        let (events, mut told) = mpsc::unbounded_channel();
        runtime.spawn(async move {
            while let Some(event) = told.recv().await {
                if let ExportEvent::Activity { active, done, .. } = event {
                    let _ = done.send(Ok(active));
                }
            }
        });
        let _here = runtime.enter();
        let threads = vec![thread; usize::from(QUEUES)];
        let backend = Backend::new("fuzz", node);
        let left = Left::default();
        let export =
            VhostUserBlk::start(device, &kind, backend, threads, events, None, left).unwrap();
        Daemon {
            export,
            _runtime: runtime,
            _folder: folder,
        }
    })
}

fn wait_for(what: &str, mut is_so: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(20);
    while !is_so() {
        assert!(Instant::now() < end, "waited in vain: {what}");
        std::thread::yield_now();
    }
}

struct Frontend {
    stream: UnixStream,
    memory: OwnedFd,
    events: [OwnedFd; 2],
    others: [OwnedFd; 2],
    avail: u16,
}

impl Frontend {
    fn connect() -> Frontend {
        let stream = UnixStream::connect(daemon().export.socket().unwrap()).unwrap();
        stream.set_nonblocking(true).unwrap();
        let memory = rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&memory, LEN).unwrap();
        let event = || rustix::event::eventfd(0, rustix::event::EventfdFlags::NONBLOCK).unwrap();
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        Frontend {
            stream,
            memory,
            events: [event(), event()],
            others: [reader, writer],
            avail: 0,
        }
    }

    fn fd(&self, which: u8) -> BorrowedFd<'_> {
        match which % 5 {
            0 => self.memory.as_fd(),
            1 => self.events[0].as_fd(),
            2 => self.events[1].as_fd(),
            n => self.others[usize::from(n - 3)].as_fd(),
        }
    }

    /// Sends bytes; a front-end that is not heard any more goes on regardless.
    fn send_raw(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(16))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            control.push(SendAncillaryMessage::ScmRights(fds));
        }
        let _ = rustix::net::sendmsg(
            &self.stream,
            &[IoSlice::new(bytes)],
            &mut control,
            SendFlags::NOSIGNAL | SendFlags::DONTWAIT,
        );
    }

    fn send(&self, code: u32, flags: u8, payload: &[u8], fds: &[BorrowedFd<'_>]) {
        let mut bytes = code.to_ne_bytes().to_vec();
        bytes.extend((1 | u32::from(flags)).to_ne_bytes());
        bytes.extend((payload.len() as u32).to_ne_bytes());
        bytes.extend(payload);
        self.send_raw(&bytes, fds);
    }

    /// Reads what was answered, whatever it is.
    fn read(&mut self) {
        let mut into = [0; 4096];
        while self.stream.read(&mut into).is_ok_and(|n| n > 0) {}
    }

    fn poke(&self, at: u64, bytes: &[u8]) {
        let at = at % LEN;
        let n = bytes.len().min((LEN - at) as usize);
        let _ = rustix::io::pwrite(&self.memory, &bytes[..n], at);
    }

    fn memory_table(&self) {
        let table = words(&[1, BASE, LEN, BASE, 0]);
        self.send(5, NEED_REPLY, &table, &[self.memory.as_fd()]);
    }

    /// All that a queue needs, in order.
    fn start_queue(&self, index: u32, size: u32, base: u32) {
        let pair = |b: u32| [index.to_ne_bytes(), b.to_ne_bytes()].concat();
        self.send(8, NEED_REPLY, &pair(size), &[]);
        self.send(10, NEED_REPLY, &pair(base), &[]);
        let mut addresses = pair(0);
        addresses.extend(words(&[BASE, BASE + USED, BASE + AVAIL, BASE]));
        self.send(9, NEED_REPLY, &addresses, &[]);
        for (code, event) in [(13, 0), (12, 1)] {
            let fd = self.events[event].as_fd();
            self.send(code, NEED_REPLY, &words(&[index.into()]), &[fd]);
        }
        self.send(18, NEED_REPLY, &pair(1), &[]);
    }

    /// A chain of up to three descriptors, as good as the input is.
    fn submit(&mut self, head: u16, kind: u8, flags: u8, len: u32) {
        let mut header = u32::from(kind).to_le_bytes().to_vec();
        header.extend([0; 12]);
        self.poke(DATA, &header);
        let descriptors = [(DATA, 16, 1u16), (DATA + 512, len, 1 | u16::from(flags)), (DATA + 64, 1, 2)];
        for (i, (at, len, flags)) in descriptors.into_iter().enumerate() {
            let index = (head + i as u16) % 16;
            let mut bytes = (BASE + at).to_le_bytes().to_vec();
            bytes.extend(len.to_le_bytes());
            bytes.extend(flags.to_le_bytes());
            bytes.extend(((index + 1) % 16).to_le_bytes());
            self.poke(16 * u64::from(index), &bytes);
        }
        self.poke(AVAIL + 4 + 2 * u64::from(self.avail % 16), &(head % 16).to_le_bytes());
        self.avail = self.avail.wrapping_add(1);
        self.poke(AVAIL + 2, &self.avail.to_le_bytes());
        self.kick();
    }

    fn kick(&self) {
        let _ = rustix::io::write(&self.events[1], &1u64.to_ne_bytes());
    }
}

fn words(list: &[u64]) -> Vec<u8> {
    list.iter().flat_map(|w| w.to_ne_bytes()).collect()
}

/// Takes bytes of the input, zeroes when it has ended.
struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn byte(&mut self) -> u8 {
        let first = self.0.split_off_first();
        first.copied().unwrap_or(0)
    }

    fn word(&mut self) -> u16 {
        u16::from_le_bytes([self.byte(), self.byte()])
    }

    fn bytes(&mut self, n: usize) -> &'a [u8] {
        let n = n.min(self.0.len());
        self.0.split_off(..n).unwrap_or_default()
    }
}

fuzz_target!(|data: &[u8]| {
    let daemon = daemon();
    let mut input = Input(data);
    let mut front = Frontend::connect();
    wait_for("a front-end is accepted", || daemon.export.clients() == 1);
    if input.byte() & 1 == 0 {
        // Far enough for most of what follows to mean something.
        front.send(3, 0, &[], &[]);
        front.send(2, 0, &words(&[1 << 32 | 1 << 30 | 1 << 29 | 1 << 28]), &[]);
        front.send(16, 0, &words(&[1 | 1 << 3 | 1 << 9 | 1 << 12 | 1 << 15]), &[]);
        front.memory_table();
        front.start_queue(0, 16, 0);
    }
    while !input.0.is_empty() {
        match input.byte() % 9 {
            0 => {
                let (code, flags, fds) = (input.byte(), input.byte(), input.byte());
                let fds: Vec<u8> = (0..fds % 10).map(|i| fds / 10 + i).collect();
                let len = input.byte();
                let payload = input.bytes(len.into());
                let fds: Vec<_> = fds.into_iter().map(|which| front.fd(which)).collect();
                front.send(u32::from(code % 48), flags, payload, &fds);
            }
            1 => {
                // A number for a queue, as most messages have.
                let (code, index, value) = (input.byte(), input.byte(), input.word());
                let numbers = [u32::from(index % 3), u32::from(value)];
                let payload = numbers.map(u32::to_ne_bytes).concat();
                front.send(u32::from(code % 48), NEED_REPLY, &payload, &[]);
            }
            2 => front.memory_table(),
            3 => {
                let (index, size, base) = (input.byte(), input.byte(), input.byte());
                front.start_queue(u32::from(index % 3), 1 << (size % 9), base.into());
            }
            4 => {
                let (at, len) = (input.word(), input.byte());
                let bytes = input.bytes(len.into());
                front.poke(u64::from(at) << (len % 3), bytes);
            }
            5 => {
                let (head, kind, flags, len) =
                    (input.byte(), input.byte(), input.byte(), input.word());
                front.submit(head.into(), kind % 16, flags & 7, u32::from(len) << (kind % 5));
            }
            6 => {
                // Regions that come and go, in whole pages.
                let (remove, page, pages) = (input.byte() & 1, input.byte(), input.byte());
                let at = u64::from(page) * 4096;
                let payload = words(&[0, BASE + at, u64::from(pages) * 4096, BASE + at, at]);
                let memory = [front.memory.as_fd()];
                let fds = if remove == 1 { &[][..] } else { &memory[..] };
                front.send(37 + u32::from(remove), NEED_REPLY, &payload, fds);
            }
            7 => {
                let len = input.byte();
                front.send_raw(input.bytes(len.into()), &[]);
            }
            _ => {
                front.kick();
                front.read();
            }
        }
    }
    front.read();
    drop(front);
    wait_for("a front-end's end", || daemon.export.clients() == 0);
    assert_eq!(daemon.export.running_queues(), 0);
});
