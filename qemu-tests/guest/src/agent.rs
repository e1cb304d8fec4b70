//! As much of the QEMU guest agent's protocol (docs/interop/qemu-ga) as freezing file systems takes: it counts, as there are none.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

use serde_json::{Value, json};

pub const PORT: &str = "org.qemu.guest_agent.0";

static FREEZES: AtomicU64 = AtomicU64::new(0);
static THAWS: AtomicU64 = AtomicU64::new(0);

/// How often file systems were frozen, and thawed.
pub fn counts() -> Value {
    json!({"freezes": FREEZES.load(SeqCst), "thaws": THAWS.load(SeqCst)})
}

/// Answers the host, on a thread of its own.
pub fn start(device: String) {
    std::thread::spawn(move || {
        if let Err(e) = serve(&device) {
            println!("guest: agent: {e}");
        }
    });
}

fn serve(device: &str) -> std::io::Result<()> {
    let file = fs::OpenOptions::new().read(true).write(true).open(device)?;
    let mut out = file.try_clone()?;
    let mut lines = BufReader::new(file);
    loop {
        let mut line = Vec::new();
        if lines.read_until(b'\n', &mut line)? == 0 {
            std::thread::sleep(std::time::Duration::from_millis(20));
            continue;
        }
        // 0xff: what came before does not count.
        let text = line.rsplit(|b| *b == 0xff).next().unwrap_or_default();
        let Ok(request) = serde_json::from_slice::<Value>(text) else {
            continue;
        };
        let mut prefix = &b""[..];
        let answer = match request["execute"].as_str().unwrap_or_default() {
            name @ ("guest-sync" | "guest-sync-delimited") => {
                if name == "guest-sync-delimited" {
                    prefix = b"\xff";
                }
                json!({"return": request["arguments"]["id"]})
            }
            "guest-fsfreeze-freeze" => {
                FREEZES.fetch_add(1, SeqCst);
                json!({"return": 1})
            }
            "guest-fsfreeze-thaw" => {
                THAWS.fetch_add(1, SeqCst);
                json!({"return": 1})
            }
            other => {
                let desc = format!("no command {other}");
                json!({"error": {"class": "CommandNotFound", "desc": desc}})
            }
        };
        out.write_all(prefix)?;
        out.write_all(format!("{answer}\n").as_bytes())?;
    }
}
