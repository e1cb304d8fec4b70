//! Requests from a client, and a model of what the disk has then.

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::thread::{Scope, ScopedJoinHandle};

use crate::Daemon;
use crate::blk_client::Client;

/// Bytes of a write of a [`Sequence`].
const BLOCK: u64 = 4096;

/// Numbered writes, each of which carries its number, to places all over a disk: any moment of the disk can be told by what it
/// has, and has all writes up to that moment.
pub struct Sequence {
    blocks: u64,
    written: AtomicU64,
    stop: AtomicBool,
}

impl Sequence {
    /// For a disk of `size` bytes.
    pub fn new(size: u64) -> Sequence {
        Sequence {
            blocks: size / BLOCK,
            written: AtomicU64::new(0),
            stop: AtomicBool::new(false),
        }
    }

    /// Where write number `n` (from 1 on) goes.
    fn place(&self, n: u64) -> u64 {
        (n * 2_654_435_761) % self.blocks
    }

    /// Writes that were answered.
    pub fn written(&self) -> u64 {
        self.written.load(SeqCst)
    }

    /// Waits until so many more have been answered.
    pub fn wait_for_more(&self, n: u64) {
        let before = self.written();
        crate::wait_for("writes", || (self.written() > before + n).then_some(()));
    }

    /// The number of the last write that a disk has; it has all of those before and none after.
    pub fn last_write(&self, disk: &[u8], what: &str) -> u64 {
        let number = |b: u64| {
            let at = (b * BLOCK) as usize;
            u64::from_le_bytes(disk[at..at + 8].try_into().unwrap())
        };
        let last = (0..self.blocks).map(number).max().unwrap();
        let mut want = vec![0; self.blocks as usize];
        for n in 1..=last {
            want[self.place(n) as usize] = n;
        }
        for b in 0..self.blocks {
            assert_eq!(
                number(b),
                want[b as usize],
                "{what}: block {b} of the first {last} writes"
            );
        }
        last
    }
}

/// Writes a [`Sequence`] until dropped.
pub struct Writer<'scope, 'env> {
    sequence: &'env Sequence,
    thread: Option<ScopedJoinHandle<'scope, ()>>,
}

impl<'scope, 'env> Writer<'scope, 'env> {
    /// Goes on where the sequence stands, with a flush now and then.
    pub fn start(
        scope: &'scope Scope<'scope, 'env>,
        sequence: &'env Sequence,
        socket: &Path,
    ) -> Writer<'scope, 'env> {
        let socket = socket.to_owned();
        sequence.stop.store(false, SeqCst);
        let thread = scope.spawn(move || {
            let mut client = Client::connect(&socket, 1, 1, 1 << 20);
            let mut data = vec![0; BLOCK as usize];
            while !sequence.stop.load(SeqCst) {
                let n = sequence.written() + 1;
                data[..8].copy_from_slice(&n.to_le_bytes());
                assert_eq!(client.write(sequence.place(n) * BLOCK, &data), 0);
                sequence.written.store(n, SeqCst);
                if n.is_multiple_of(64) {
                    assert_eq!(client.flush(), 0);
                }
            }
        });
        Writer {
            sequence,
            thread: Some(thread),
        }
    }

    /// Ends it; panics if it had an error.
    pub fn end(mut self) {
        self.sequence.stop.store(true, SeqCst);
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

impl Drop for Writer<'_, '_> {
    fn drop(&mut self) {
        self.sequence.stop.store(true, SeqCst);
    }
}

/// Panics with the first byte that differs; `at` is where the pieces begin on the disk.
pub fn assert_same(got: &[u8], want: &[u8], at: u64, what: &str) {
    if let Some(i) = got.iter().zip(want).position(|(a, b)| a != b) {
        panic!(
            "{what}: byte {} is {:#x}, not {:#x}",
            at + i as u64,
            got[i],
            want[i]
        );
    }
}

/// Reads the whole export, in large pieces and again in small ones at odd places.
pub fn compare(daemon: &Daemon, id: &str, want: &[u8]) {
    let mut client = Client::connect(&daemon.socket(id), 1, 1, 1 << 20);
    assert_eq!(client.capacity(), want.len() as u64);
    let mut buf = vec![0; 1 << 20];
    for at in (0..want.len()).step_by(1 << 20) {
        let n = buf.len().min(want.len() - at);
        assert_eq!(client.read(at as u64, &mut buf[..n]), 0, "{id} at {at}");
        assert_same(&buf[..n], &want[at..at + n], at as u64, id);
    }
    for i in 0..2000usize {
        let n = 512 * (i % 13 + 1);
        let at = (i * 7919 * 512) % (want.len() - n) / 512 * 512;
        assert_eq!(client.read(at as u64, &mut buf[..n]), 0, "{id} at {at}");
        assert_same(&buf[..n], &want[at..at + n], at as u64, id);
    }
}

/// Random writes, zeroes and discards from a client, and the same to `model`.
pub fn change(client: &mut Client, model: &mut [u8], seed: u64, n: usize) {
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let size = model.len() as u64;
    for i in 0..n {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        let longest = [8, 100, 1000][(x >> 8) as usize % 3];
        let len = ((x % longest + 1) * 512).min(size);
        let at = (x >> 20) % ((size - len) / 512 + 1) * 512;
        let range = at as usize..(at + len) as usize;
        match x >> 60 {
            0 => {
                assert_eq!(client.write_zeroes(at, len, x & 1 == 0), 0);
                model[range].fill(0);
            }
            1 => {
                // What is discarded may read as anything it was, or zeroes: it is written again.
                assert_eq!(client.discard(at, len), 0);
                let data = vec![i as u8 | 1; len as usize];
                assert_eq!(client.write(at, &data), 0);
                model[range].copy_from_slice(&data);
            }
            2 => assert_eq!(client.flush(), 0),
            _ => {
                let data: Vec<u8> = (0..len).map(|b| (b / 512 + x) as u8).collect();
                assert_eq!(client.write(at, &data), 0, "{at} {len}");
                model[range].copy_from_slice(&data);
            }
        }
    }
}
