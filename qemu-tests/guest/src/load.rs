//! Verified load in the background: threads that write, read back and flush blocks of their own, and know
//! what each must contain.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

use serde_json::{Value, json};

use crate::disk::{Aligned, BLOCK, Disk};

/// Writes between two flushes.
const FLUSH_EVERY: u64 = 16;

#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    writes: AtomicU64,
    flushes: AtomicU64,
}

pub struct Load {
    shared: Arc<Shared>,
    disk: String,
    threads: Vec<JoinHandle<Result<Blocks, String>>>,
}

/// The generation of each block from `start` on.
struct Blocks {
    start: u64,
    generations: Vec<u64>,
}

impl Load {
    pub fn start(disk: &str, offset: u64, len: u64, threads: u64) -> Result<Load, String> {
        let shared = Arc::new(Shared::default());
        let each = len / threads / BLOCK as u64;
        let spawn = |t: u64| {
            let device = Disk::open(disk)?;
            let shared = shared.clone();
            let blocks = Blocks {
                start: offset + t * each * BLOCK as u64,
                generations: vec![0; each as usize],
            };
            Ok(std::thread::spawn(move || work(&device, &shared, blocks)))
        };
        let threads = (0..threads).map(spawn).collect::<Result<_, String>>()?;
        Ok(Load {
            shared,
            disk: disk.to_owned(),
            threads,
        })
    }

    pub fn status(&self) -> Value {
        json!({
            "writes": self.shared.writes.load(Ordering::Relaxed),
            "flushes": self.shared.flushes.load(Ordering::Relaxed),
            "failed": self.threads.iter().any(JoinHandle::is_finished),
        })
    }

    /// Stops, and reads every block that was ever written.
    pub fn stop(self) -> Result<Value, String> {
        self.shared.stop.store(true, Ordering::Relaxed);
        let disk = Disk::open(&self.disk)?;
        let mut buf = Aligned::new(BLOCK);
        let mut verified = 0;
        for thread in self.threads {
            let blocks = thread.join().map_err(|_| "panic".to_owned())??;
            for (i, &generation) in blocks.generations.iter().enumerate() {
                if generation > 0 {
                    let at = blocks.start + (i * BLOCK) as u64;
                    disk.verify_block(&mut buf, at, generation)?;
                    verified += 1;
                }
            }
        }
        Ok(json!({
            "writes": self.shared.writes.load(Ordering::Relaxed),
            "flushes": self.shared.flushes.load(Ordering::Relaxed),
            "verified": verified,
        }))
    }
}

fn work(disk: &Disk, shared: &Shared, mut blocks: Blocks) -> Result<Blocks, String> {
    let mut buf = Aligned::new(BLOCK);
    let mut x = blocks.start | 1;
    let mut random = move || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        x
    };
    let mut n = 0;
    while !shared.stop.load(Ordering::Relaxed) {
        let i = (random() % blocks.generations.len() as u64) as usize;
        let at = blocks.start + (i * BLOCK) as u64;
        let generation = blocks.generations[i] + 1;
        disk.write_block(&mut buf, at, generation)
            .map_err(|e| format!("write at {at}: {e}"))?;
        blocks.generations[i] = generation;
        shared.writes.fetch_add(1, Ordering::Relaxed);
        n += 1;
        if n % FLUSH_EVERY == 0 {
            disk.flush()?;
            shared.flushes.fetch_add(1, Ordering::Relaxed);
        }
        let i = (random() % blocks.generations.len() as u64) as usize;
        if blocks.generations[i] > 0 {
            let at = blocks.start + (i * BLOCK) as u64;
            disk.verify_block(&mut buf, at, blocks.generations[i])?;
        }
    }
    disk.flush()?;
    Ok(blocks)
}
