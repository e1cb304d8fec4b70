//! Requests from a client, and a model of what the disk has then.

use crate::Daemon;
use crate::blk_client::Client;

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
