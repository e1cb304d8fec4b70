//! `make bench-live`: what guests notice of changes under them, beside the newest qemu-storage-daemon where that can do the same.
//!
//! One core for the client, one for the server. A client reads or writes 4 KiB at depth 32 while the graph below it changes; the
//! figure is the longest time that a request took, beside that of an equal run without changes.

use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::Duration;

use serde_json::json;
use vdisk_qemu_tests::blk_client::{Client, Load, Measured, Op};
use vdisk_qemu_tests::qemu_tools::{text, tool};
use vdisk_qemu_tests::{Daemon, Qmp, lab, wait_for};

const SIZE: u64 = 512 << 20;
const ROUNDS: usize = 5;

fn pin(pid: u32, cpu: &str) {
    let args = ["-a", "-c", "-p", cpu, &pid.to_string()].map(str::to_owned);
    let _ = Command::new("taskset")
        .args(args)
        .stdout(Stdio::null())
        .status();
}

fn load(op: Op, seconds: f64) -> Load {
    Load {
        op,
        block: 4096,
        depth: 32,
        sequential: false,
        span: SIZE,
        duration: Duration::from_secs_f64(seconds),
    }
}

/// An image, all of it allocated and in the page cache.
fn image(dir: &Path, name: &str) -> PathBuf {
    let path = dir.join(name);
    tool(
        "qemu-img",
        &[
            "create",
            "-q",
            "-f",
            "qcow2",
            text(&path),
            &SIZE.to_string(),
        ],
    );
    let write = format!("write -q -P 1 0 {SIZE}");
    tool(
        "qemu-io",
        &["-f", "qcow2", "-c", &write, "-c", "flush", text(&path)],
    );
    path
}

/// Runs a load while `change` runs beside it after a moment.
fn under_load(socket: &Path, load: &Load, change: impl FnOnce() + Send) -> Measured {
    let mut client = Client::connect(socket, 1, load.depth, load.block);
    let warm = Load {
        duration: Duration::from_millis(100),
        ..load.clone()
    };
    client.run(&warm);
    std::thread::scope(|s| {
        let quarter = load.duration / 4;
        s.spawn(move || {
            // In the middle of the run, whenever exactly.
            std::thread::sleep(quarter);
            change();
        });
        client.run(load)
    })
}

fn longest_ms(m: &Measured) -> f64 {
    f64::from(m.latency(1.0)) / 1e6
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}

/// Starts the newest qemu-storage-daemon with one image and a monitor, the export on an I/O thread or not.
fn start_qsd(dir: &Path, iothread: bool) -> Option<(Child, PathBuf, Qmp)> {
    lab().join("sid/.done").exists().then_some(())?;
    let file = image(dir, "qsd.qcow2");
    let (socket, monitor) = (dir.join("qsd.sock"), dir.join("qsd.qmp"));
    for old in [&socket, &monitor] {
        let _ = std::fs::remove_file(old);
    }
    let thread = if iothread { ",iothread=io0" } else { "" };
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/in-root.sh");
    let child = Command::new(script)
        .args(["sid", "qemu-storage-daemon", "--object", "iothread,id=io0"])
        .args(["--chardev", &format!("socket,id=m,path={},server=on,wait=off", monitor.display())])
        .args(["--monitor", "chardev=m"])
        .args(["--blockdev", &format!("qcow2,node-name=disk0,file.driver=file,file.filename={},file.aio=io_uring", file.display())])
        .args(["--export", &format!("vhost-user-blk,id=e,node-name=disk0,addr.type=unix,addr.path={}{thread},writable=on", socket.display())])
        .stdin(Stdio::null())
        .spawn()
        .ok()?;
    wait_for("qemu-storage-daemon's socket", || {
        socket.exists().then_some(())
    });
    pin(child.id(), "1");
    let qmp = Qmp::connect(&monitor);
    Some((child, socket, qmp))
}

/// The longest request during a snapshot, and in an equal run without one.
fn snapshots(name: &str, socket: &Path, op: Op, mut snapshot: impl FnMut() + Send) {
    let (mut with, mut without) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let load = load(op, 1.0);
        without.push(longest_ms(&under_load(socket, &load, || {})));
        with.push(longest_ms(&under_load(socket, &load, &mut snapshot)));
    }
    println!(
        "{name:<34} longest request {:>7.2} ms, {:>7.2} ms in runs without",
        median(with),
        median(without)
    );
}

/// Random writes while a backup runs at a limited speed, and in equal runs without one.
fn backups(name: &str, socket: &Path, mut begin: impl FnMut(), mut end: impl FnMut()) {
    let (mut with, mut without) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let load = load(Op::Write, 1.0);
        without.push(under_load(socket, &load, || {}).iops());
        begin();
        with.push(under_load(socket, &load, || {}).iops());
        end();
    }
    let (with, without) = (median(with), median(without));
    println!("{name:<34} {with:>9.0} IOPS of random writes, {without:>9.0} in runs without");
}

/// Throttle filters that come and go, and the rates that they allow.
fn throttles(daemon: &Daemon, dir: &Path, socket: &Path) {
    daemon.ctl(&["throttle", "set", "g", "iops-total=1000000000"]);
    for op in [Op::Read, Op::Write] {
        let (mut insert, mut out, mut without) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            let load = load(op, 1.0);
            without.push(longest_ms(&under_load(socket, &load, || {})));
            let m = under_load(socket, &load, || {
                daemon.ctl(&["throttle", "insert", "disk0", "g", "--name", "t"]);
            });
            insert.push(longest_ms(&m));
            let m = under_load(socket, &load, || {
                daemon.ctl(&["throttle", "take-out", "t"]);
            });
            out.push(longest_ms(&m));
        }
        println!(
            "throttle insert, take out ({op:?})     longest request {:>7.2} ms, {:>7.2} ms; {:>7.2} ms in runs without",
            median(insert),
            median(out),
            median(without)
        );
    }
    // The fast path before and after. Not across the writes: they leave smaller folios in the page cache, which are read more slowly.
    let rate = || under_load(socket, &load(Op::Read, 1.0), || {}).iops();
    let (mut before, mut after) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        before.push(rate());
        daemon.ctl(&["throttle", "insert", "disk0", "g", "--name", "t"]);
        rate();
        daemon.ctl(&["throttle", "take-out", "t"]);
        after.push(rate());
    }
    println!(
        "fast path after the last filter    {:.3} of the IOPS before",
        median(after) / median(before)
    );

    // Rates.
    for limit in [500.0, 5000.0, 50_000.0] {
        daemon.ctl(&["throttle", "set", "g", &format!("iops-total={limit}")]);
        daemon.ctl(&["throttle", "insert", "disk0", "g", "--name", "t"]);
        let m = under_load(socket, &load(Op::Read, 10.0), || {});
        println!(
            "throttled to {limit:>6} IOPS           {:>8.1} over 10 s ({:+.2} %)",
            m.iops(),
            100.0 * (m.iops() / limit - 1.0)
        );
        daemon.ctl(&["throttle", "take-out", "t"]);
    }
    for name in ["m0", "m1"] {
        let file = image(dir, name);
        let filename = format!("file.file.filename={}", file.display());
        let options = [
            "driver=throttle",
            "throttle-group=g",
            "file.driver=qcow2",
            "file.file.driver=file",
            &filename,
        ];
        daemon.ctl(&[&["node", "add", name][..], &options].concat());
        daemon.export_node(name, name, &[]);
    }
    daemon.ctl(&["throttle", "set", "g", "iops-total=5000"]);
    let member = |name: &str, depth| {
        let load = Load {
            depth,
            ..load(Op::Read, 10.0)
        };
        under_load(&daemon.socket(name), &load, || {}).iops()
    };
    for other in [32, 4] {
        let (a, b) = std::thread::scope(|s| {
            let other = s.spawn(|| member("m1", other));
            (member("m0", 32), other.join().expect("the client works"))
        });
        println!(
            "two members, depth 32 and {other:<2}       {a:>8.1} and {b:.1} IOPS of 5000: {:.2} % apart",
            100.0 * (a - b).abs() / a.max(b)
        );
    }
}

/// What a backup may read per second.
const BACKUP_SPEED: u64 = 64 << 20;

fn main() {
    pin(std::process::id(), "0");
    let daemon = Daemon::start(&["--io-threads", "1"]);
    pin(daemon.pid(), "1");
    let dir = daemon.path("");
    let disk = image(&dir, "disk0.qcow2");
    let filename = format!("file.filename={}", disk.display());
    daemon.ctl(&[
        "node",
        "add",
        "disk0",
        "driver=qcow2",
        "file.driver=file",
        &filename,
    ]);
    daemon.export_node("d", "disk0", &[]);
    let socket = daemon.socket("d");

    // With an argument, only the rest.
    if std::env::args().nth(1).is_none() {
        throttles(&daemon, &dir, &socket);
    }

    // Backups, snapshots, commits.
    let copy = dir.join("copy.qcow2");
    let speed = BACKUP_SPEED.to_string();
    backups(
        "full backup, vdiskd",
        &socket,
        || {
            let start = ["backup", "disk0", text(&copy), "--name", "copy"];
            let how = [
                "--detach",
                "--speed",
                &speed,
                "job-id=b",
                "auto-dismiss=false",
            ];
            daemon.ctl(&[&start[..], &how].concat());
        },
        || {
            // Guests' writes may have copied all of it.
            daemon.try_ctl(&["job", "cancel", "b"]);
            wait_for("the backup's end", || {
                let job = daemon.ctl_json(&["job", "show", "b"]);
                (job["State"] == "concluded").then_some(())
            });
            daemon.ctl(&["job", "dismiss", "b"]);
            daemon.ctl(&["node", "remove", "copy"]);
            let _ = std::fs::remove_file(&copy);
        },
    );
    let n = AtomicUsize::new(0);
    // Nanoseconds for which requests waited at the door.
    let drained = Mutex::new(Vec::new());
    let overlay = || {
        let below = format!("disk{}", n.fetch_add(1, SeqCst));
        let n = n.load(SeqCst);
        let (name, file) = (format!("disk{n}"), dir.join(format!("over{n}.qcow2")));
        let _ = std::fs::remove_file(&file);
        let report = daemon.ctl_json(&["snapshot", "overlay", &below, &name, text(&file)]);
        let paused = report["paused-ns"].as_f64().unwrap_or(f64::NAN);
        drained.lock().expect("lock").push(paused / 1e6);
    };
    for op in [Op::Read, Op::Write] {
        snapshots(
            &format!("live snapshot, vdiskd ({op:?})"),
            &socket,
            op,
            overlay,
        );
        let drained = std::mem::take(&mut *drained.lock().expect("lock"));
        println!("{:<34} drained for {:>11.2} ms", "", median(drained));
    }
    for op in [Op::Read, Op::Write] {
        let name = format!("overlay and commit, vdiskd ({op:?})");
        snapshots(&name, &socket, op, || {
            overlay();
            daemon.ctl(&["commit", &format!("disk{}", n.fetch_sub(1, SeqCst))]);
        });
    }
    let Some((mut child, socket, mut qmp)) = start_qsd(&dir, true) else {
        println!("qemu-storage-daemon is not here: run 'make lab'");
        return;
    };
    let size = SIZE.to_string();
    let create = |file: &Path| {
        let _ = std::fs::remove_file(file);
        tool(
            "qemu-img",
            &["create", "-q", "-f", "qcow2", text(file), &size],
        );
    };
    let qmp = &mut qmp;
    let mut n = 0;
    let overlay = |qmp: &mut Qmp, n: &mut usize| {
        let below = format!("disk{n}");
        *n += 1;
        let (name, file) = (format!("disk{n}"), dir.join(format!("qsd-over{n}.qcow2")));
        create(&file);
        qmp.run(
            "blockdev-add",
            json!({
                "driver": "qcow2", "node-name": name, "backing": null,
                "file": {"driver": "file", "filename": text(&file), "aio": "io_uring"},
            }),
        );
        qmp.run("blockdev-snapshot", json!({"node": below, "overlay": name}));
    };
    for op in [Op::Read, Op::Write] {
        let name = format!("live snapshot, qsd ({op:?})");
        snapshots(&name, &socket, op, || overlay(qmp, &mut n));
    }
    for op in [Op::Read, Op::Write] {
        let name = format!("overlay and commit, qsd ({op:?})");
        snapshots(&name, &socket, op, || {
            overlay(qmp, &mut n);
            let (top, base) = (format!("disk{n}"), format!("disk{}", n - 1));
            qmp.run(
                "block-commit",
                json!({"job-id": "c", "device": top, "base-node": base}),
            );
            qmp.wait_event("BLOCK_JOB_READY");
            qmp.run("job-complete", json!({"id": "c"}));
            qmp.wait_event("BLOCK_JOB_COMPLETED");
            wait_for("the commit's end", || {
                let jobs = qmp.run("query-jobs", json!({}));
                jobs.as_array()?.is_empty().then_some(())
            });
            qmp.run("blockdev-del", json!({"node-name": top}));
            n -= 1;
        });
    }
    let _ = child.kill();
    let _ = child.wait();
    // With its export on an I/O thread it ends with a failed assertion when a backup starts (11.1.3).
    let Some((mut child, socket, mut qmp)) = start_qsd(&dir, false) else {
        return;
    };
    let copy = dir.join("qsd-copy.qcow2");
    let qmp = RefCell::new(&mut qmp);
    backups(
        "full backup, qsd",
        &socket,
        || {
            create(&copy);
            let file = json!({"driver": "file", "filename": text(&copy), "aio": "io_uring"});
            let node = json!({"driver": "qcow2", "node-name": "copy", "file": file});
            let job = json!({"job-id": "b", "device": "disk0", "target": "copy", "sync": "full", "speed": BACKUP_SPEED, "auto-dismiss": false});
            let mut qmp = qmp.borrow_mut();
            qmp.run("blockdev-add", node);
            qmp.run("blockdev-backup", job);
        },
        || {
            let mut qmp = qmp.borrow_mut();
            let mut state = || qmp.run("query-jobs", json!({}))[0]["status"].clone();
            if state() == "running" {
                qmp.run("job-cancel", json!({"id": "b"}));
            }
            wait_for("the backup's end", || {
                let jobs = qmp.run("query-jobs", json!({}));
                (jobs[0]["status"] == "concluded").then_some(())
            });
            qmp.run("job-dismiss", json!({"id": "b"}));
            qmp.run("blockdev-del", json!({"node-name": "copy"}));
        },
    );
    let _ = child.kill();
    let _ = child.wait();
}
