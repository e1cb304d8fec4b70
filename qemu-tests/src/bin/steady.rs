//! Clients that write, flush, read again and compare without a break, and tell how long they had to wait at most.
//!
//! Each disk is one of at least 8 MiB; the connection must never end.

use std::path::{Path, PathBuf};
use std::sync::Barrier;
use std::time::{Duration, Instant};

use clap::Parser;
use serde_json::json;
use vdisk_qemu_tests::blk_client::Client;
use vdisk_qemu_tests::{Guest, GuestOptions};

#[derive(Parser)]
struct Args {
    /// Sockets of vhost-user-blk exports
    #[arg(required = true)]
    sockets: Vec<PathBuf>,
    /// End when this file is there
    #[arg(long)]
    until: PathBuf,
    /// Make this file when all run
    #[arg(long)]
    ready: PathBuf,
    /// So many of them are busy, and the others do 64 requests ten times a second
    #[arg(long, default_value_t = usize::MAX)]
    busy: usize,
    /// Boot a guest that has all of them as its disks, of at least 64 MiB, and does the same
    #[arg(long)]
    guest: bool,
}

const MIB: u64 = 1 << 20;

/// What was verified.
fn serve_guest(args: &Args) -> u64 {
    let mut options = GuestOptions::new();
    for socket in &args.sockets {
        options = options.disk(socket, 2);
    }
    let mut guest = Guest::boot(options.without_reconnect());
    let disks: Vec<String> = ('a'..)
        .take(args.sockets.len())
        .map(|c| format!("vd{c}"))
        .collect();
    let fixed = |cmd: &str, disk: &String| json!({"cmd": cmd, "disk": disk, "offset": 0, "len": 8 * MIB, "generation": 1, "threads": 4});
    for disk in &disks {
        guest.run(fixed("write", disk));
    }
    // One load at a time, with 32 requests in flight.
    guest.run(json!({"cmd": "load-start", "disk": disks[0], "offset": 8 * MIB, "len": 48 * MIB, "threads": 32}));
    std::fs::write(&args.ready, "").expect("the folder is writable");
    while !args.until.exists() {
        guest.wait_load(100);
    }
    let result = guest.run(json!({"cmd": "load-stop"}));
    for disk in &disks {
        guest.run(fixed("verify", disk));
    }
    guest.assert_no_errors();
    guest.shut_down();
    result["verified"].as_u64().unwrap_or(0)
}

const BLOCK: u64 = 4096;
const BLOCKS: u64 = 2048;

/// Requests done, and the longest wait for one.
fn serve(
    socket: &Path,
    until: &Path,
    run: &Barrier,
    busy: bool,
) -> Result<(u64, Duration), String> {
    let mut client = Client::connect(socket, 1, 1, BLOCK as usize);
    if client.write_zeroes(0, BLOCK * BLOCKS, false) != 0 {
        return Err("cannot be zeroed".into());
    }
    run.wait();
    let mut generations = vec![0u64; BLOCKS as usize];
    let (mut requests, mut longest) = (0u64, Duration::ZERO);
    let mut data = [0u8; BLOCK as usize];
    let mut x = 0x9e37_79b9_7f4a_7c15u64;
    while !until.exists() {
        if !busy {
            std::thread::sleep(Duration::from_millis(100));
        }
        for _ in 0..64 {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            let block = x % BLOCKS;
            let generation = &mut generations[block as usize];
            let start = Instant::now();
            let result = match x >> 61 {
                0 => client.flush(),
                1..4 => {
                    let result = client.read(block * BLOCK, &mut data);
                    let want = if *generation == 0 {
                        0
                    } else {
                        *generation ^ block
                    };
                    if result == 0 && !data.chunks(8).all(|w| w == want.to_le_bytes()) {
                        return Err(format!("block {block} is not of generation {generation}"));
                    }
                    result
                }
                _ => {
                    *generation += 1;
                    let word = (*generation ^ block).to_le_bytes();
                    data.chunks_mut(8).for_each(|w| w.copy_from_slice(&word));
                    client.write(block * BLOCK, &data)
                }
            };
            longest = longest.max(start.elapsed());
            requests += 1;
            if result != 0 {
                return Err(format!("request {requests} failed: {result}"));
            }
        }
    }
    Ok((requests, longest))
}

fn main() {
    let args = Args::parse();
    if args.guest {
        println!("{} blocks verified", serve_guest(&args));
        return;
    }
    // The others would wait for a thread that panics for ever.
    std::panic::set_hook(Box::new(|info| {
        eprintln!("{info}");
        std::process::exit(1);
    }));
    let run = Barrier::new(args.sockets.len() + 1);
    let results: Vec<_> = std::thread::scope(|s| {
        let threads: Vec<_> = args
            .sockets
            .iter()
            .enumerate()
            .map(|(i, socket)| {
                let (args, run) = (&args, &run);
                s.spawn(move || {
                    serve(socket, &args.until, run, i < args.busy)
                        .unwrap_or_else(|error| panic!("{}: {error}", socket.display()))
                })
            })
            .collect();
        run.wait();
        std::fs::write(&args.ready, "").expect("the file can be made");
        let done = threads
            .into_iter()
            .map(|t| t.join().expect("no client panics"));
        done.collect()
    });
    let (mut requests, mut longest) = (0, Duration::ZERO);
    for (n, wait) in results {
        requests += n;
        longest = longest.max(wait);
    }
    println!(
        "{requests} requests, longest wait {:.1} ms",
        longest.as_secs_f64() * 1e3
    );
}
