//! `make bench`: vdiskd beside the newest qemu-storage-daemon, in one run, on the same work.
//!
//! One core for the client, one for the server. The servers take turns for each workload; the figures are
//! medians over the rounds, the ratios vdiskd / qemu-storage-daemon.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use clap::Parser;
use serde_json::{Value, json};
use vdisk_qemu_tests::blk_client::{Client, Load, Measured, Op};
use vdisk_qemu_tests::{Daemon, lab, wait_for};

const SPAN: u64 = 1 << 30;

/// The disk of images that are empty at first: large enough that hardly a cluster is written twice.
const EMPTY_SPAN: u64 = 64 << 30;

/// Compares vdiskd with qemu-storage-daemon over vhost-user-blk.
#[derive(Debug, Parser)]
struct Args {
    /// Seconds for each measurement
    #[arg(long, default_value_t = 1.0)]
    seconds: f64,
    /// Rounds; the figures are medians
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Only workloads whose name contains this
    #[arg(long)]
    only: Option<String>,
    /// Write all figures to this file as JSON
    #[arg(long)]
    json: Option<PathBuf>,
    /// Busy polling ceiling of vdiskd in nanoseconds; qemu-storage-daemon keeps its default
    #[arg(long, default_value_t = 32000)]
    poll_max_ns: u64,
    /// Register guest memory with io_uring in vdiskd
    #[arg(long)]
    fixed_buffers: bool,
    /// Use this I/O engine in vdiskd
    #[arg(long, default_value = "auto")]
    io_engine: String,
    /// Leave qemu-storage-daemon out
    #[arg(long)]
    alone: bool,
}

#[derive(Clone)]
struct Workload {
    storage: &'static str,
    queues: usize,
    load: Load,
    /// Each round has an image of its own, untouched so far.
    fresh: bool,
}

impl Workload {
    fn storage(&self, round: usize) -> String {
        match self.fresh {
            true => format!("{}-{round}", self.storage),
            false => self.storage.to_owned(),
        }
    }

    fn name(&self) -> String {
        let l = &self.load;
        let order = if l.sequential { "seq" } else { "rand" };
        let op = if l.op == Op::Read { "read" } else { "write" };
        let block = if l.block >= 1 << 20 { "1M" } else { "4k" };
        let queues = if self.queues > 1 { " 2 queues" } else { "" };
        format!(
            "{} {order}{op} {block} depth {}{queues}",
            self.storage, l.depth
        )
    }
}

fn workloads(seconds: f64) -> Vec<Workload> {
    let duration = Duration::from_secs_f64(seconds);
    let mut out = Vec::new();
    for storage in ["null", "cached", "direct"] {
        for op in [Op::Read, Op::Write] {
            let mut add = |queues, block, depth, sequential| {
                let load = Load {
                    op,
                    block,
                    depth,
                    sequential,
                    span: SPAN,
                    duration,
                };
                out.push(Workload {
                    storage,
                    queues,
                    load,
                    fresh: false,
                });
            };
            for depth in [1, 32, 128] {
                add(1, 4096, depth, false);
            }
            add(2, 4096, 32, false);
            add(1, 1 << 20, 4, true);
        }
    }
    let mut add = |storage, fresh, op, block, depth, span| {
        let load = Load {
            op,
            block,
            depth,
            sequential: block > 4096,
            span,
            duration,
        };
        out.push(Workload {
            storage,
            queues: 1,
            load,
            fresh,
        });
    };
    for op in [Op::Read, Op::Write] {
        for depth in [32, 128] {
            add("qcow2", false, op, 4096, depth, SPAN);
        }
    }
    for depth in [32, 128] {
        add("chain", false, Op::Read, 4096, depth, SPAN);
    }
    add("empty", true, Op::Write, 4096, 32, EMPTY_SPAN);
    add("empty-seq", true, Op::Write, 1 << 20, 4, EMPTY_SPAN);
    add("overlay", true, Op::Write, 4096, 32, SPAN);
    out
}

/// A server under test.
trait Server {
    fn name(&self) -> &'static str;
    fn pid(&self) -> u32;
    fn socket(&self, storage: &str) -> PathBuf;
}

struct Vdiskd(Daemon);

impl Server for Vdiskd {
    fn name(&self) -> &'static str {
        "vdiskd"
    }
    fn pid(&self) -> u32 {
        self.0.pid()
    }
    fn socket(&self, storage: &str) -> PathBuf {
        self.0.socket(storage)
    }
}

struct Qsd {
    child: Child,
    dir: PathBuf,
    version: String,
}

impl Server for Qsd {
    fn name(&self) -> &'static str {
        "qsd"
    }
    fn pid(&self) -> u32 {
        self.child.id()
    }
    fn socket(&self, storage: &str) -> PathBuf {
        self.dir.join(format!("{storage}.qsd"))
    }
}

impl Drop for Qsd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn pin(pid: u32, cpu: &str) {
    let all = ["-a", "-c", "-p", cpu, &pid.to_string()].map(str::to_owned);
    let _ = Command::new("taskset")
        .args(all)
        .stdout(Stdio::null())
        .status();
}

fn image(dir: &Path, name: &str) -> PathBuf {
    let path = dir.join(name);
    // Written, not sparse: reads go to the storage.
    let block: Vec<u8> = (0..1u32 << 20).map(|i| (i % 251) as u8).collect();
    let mut file = std::fs::File::create(&path).expect("the scratch folder is writable");
    for _ in 0..SPAN >> 20 {
        std::io::Write::write_all(&mut file, &block).expect("there is room for the images");
    }
    file.sync_all().expect("the disk works");
    path
}

fn qemu_img(args: &[&str]) {
    let done = Command::new("qemu-img").args(args).status();
    assert!(
        done.is_ok_and(|s| s.success()),
        "qemu-img is installed: run 'make setup'"
    );
}

fn text(path: &Path) -> &str {
    path.to_str().expect("scratch paths are ASCII")
}

/// Overlays over overlays: the names of the images, the lowest first.
const CHAIN: usize = 5;

/// An image for the benchmark: a node of driver qcow2.
struct Image {
    name: String,
    file: PathBuf,
    /// A raw file that is below.
    backing: Option<PathBuf>,
    /// The image that the one below is, by name.
    below: Option<String>,
    exported: bool,
}

/// All qcow2 images that a server gets.
fn qcow2_images(dir: &Path, prefix: &str, rounds: usize) -> Vec<Image> {
    let path = |name: &str| dir.join(format!("{prefix}{name}.qcow2"));
    let mut out = Vec::new();
    let mut add = |name: &str, file, backing, below, exported| {
        out.push(Image {
            name: name.to_owned(),
            file,
            backing,
            below,
            exported,
        });
    };
    add(
        "qcow2",
        qcow2_image(dir, &format!("{prefix}qcow2.qcow2")),
        None,
        None,
        true,
    );
    let bottom = qcow2_image(dir, &format!("{prefix}bottom.qcow2"));
    add("bottom", bottom.clone(), None, None, false);
    let (mut below, mut below_file) = ("bottom".to_owned(), bottom);
    for i in 1..=CHAIN {
        let name = if i == CHAIN {
            "chain".to_owned()
        } else {
            format!("chain{i}")
        };
        let file = path(&name);
        qemu_img(&[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-F",
            "qcow2",
            "-b",
            text(&below_file),
            text(&file),
        ]);
        add(&name, file.clone(), None, Some(below), i == CHAIN);
        (below, below_file) = (name, file);
    }
    let base = image(dir, &format!("{prefix}base"));
    for round in 0..rounds {
        for name in ["empty", "empty-seq"] {
            let name = format!("{name}-{round}");
            let file = path(&name);
            qemu_img(&[
                "create",
                "-q",
                "-f",
                "qcow2",
                text(&file),
                &EMPTY_SPAN.to_string(),
            ]);
            add(&name, file, None, None, true);
        }
        let name = format!("overlay-{round}");
        let file = path(&name);
        qemu_img(&[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-F",
            "raw",
            "-b",
            text(&base),
            text(&file),
        ]);
        add(&name, file, Some(base.clone()), None, true);
    }
    out
}

/// The same as a qcow2 image, all of it allocated.
fn qcow2_image(dir: &Path, name: &str) -> PathBuf {
    let raw = image(dir, "raw");
    let path = dir.join(name);
    qemu_img(&[
        "convert",
        "-f",
        "raw",
        "-O",
        "qcow2",
        text(&raw),
        text(&path),
    ]);
    let _ = std::fs::remove_file(raw);
    path
}

fn start_vdiskd(args: &Args) -> Vdiskd {
    let poll = args.poll_max_ns.to_string();
    let daemon = Daemon::start(&["--poll-max-ns", &poll, "--io-engine", &args.io_engine]);
    let dir = daemon.path("");
    let fixed = if args.fixed_buffers {
        "fixed-buffers=on"
    } else {
        "fixed-buffers=off"
    };
    daemon.ctl(&["node", "add", "null", "driver=null-co", "size=1G"]);
    daemon.export_node("null", "null", &[fixed]);
    daemon.export_file("cached", &image(&dir, "cached"), &[], &[fixed]);
    daemon.export_file(
        "direct",
        &image(&dir, "direct"),
        &["cache.direct=on"],
        &[fixed],
    );
    for image in qcow2_images(&dir, "", args.rounds) {
        let filename = format!("file.filename={}", image.file.display());
        let mut options = vec![
            "driver=qcow2".to_owned(),
            "file.driver=file".into(),
            filename,
        ];
        if !image.exported || image.name == "chain" {
            options.push("read-only=on".into());
        }
        if let Some(below) = &image.below {
            options.push(format!("backing={below}"));
        }
        if let Some(file) = &image.backing {
            options.push("backing.driver=raw".into());
            options.push("backing.file.driver=file".into());
            options.push(format!("backing.file.filename={}", file.display()));
        }
        let mut words = vec!["node", "add", &image.name];
        words.extend(options.iter().map(String::as_str));
        daemon.ctl(&words);
        if image.exported {
            let mut more = vec![fixed];
            if image.name == "chain" {
                more.push("read-only");
            }
            daemon.export_node(&image.name, &image.name, &more);
        }
    }
    pin(daemon.pid(), "1");
    Vdiskd(daemon)
}

fn start_qsd(dir: &Path, rounds: usize) -> Option<Qsd> {
    let root = lab().join("sid");
    let newest = root.join(".done").exists();
    let (program, prefix): (&str, Vec<String>) = if newest {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/in-root.sh");
        let words = ["sid", "qemu-storage-daemon"].map(str::to_owned);
        (script, words.to_vec())
    } else {
        ("qemu-storage-daemon", Vec::new())
    };
    let run = |args: &[String]| {
        let mut c = Command::new(program);
        c.args(&prefix).args(args);
        c
    };
    let version = run(&["--version".into()]).output().ok()?;
    let version = String::from_utf8_lossy(&version.stdout);
    let version = version.split_whitespace().nth(2)?.to_owned();
    let mut args: Vec<String> = vec!["--object".into(), "iothread,id=io0".into()];
    let file = |name: &str, cache: &str| {
        let path = image(dir, &format!("qsd-{name}"));
        format!(
            "file,node-name={name},filename={}{cache},aio=io_uring",
            path.display()
        )
    };
    for blockdev in [
        "null-co,node-name=null,size=1073741824".to_owned(),
        file("cached", ""),
        file("direct", ",cache.direct=on"),
    ] {
        args.push("--blockdev".into());
        args.push(blockdev);
    }
    let mut exports = ["null", "cached", "direct"].map(str::to_owned).to_vec();
    for image in qcow2_images(dir, "qsd-", rounds) {
        let mut blockdev = format!(
            "qcow2,node-name={},discard=unmap,file.driver=file,file.filename={},file.aio=io_uring",
            image.name,
            image.file.display()
        );
        if !image.exported || image.name == "chain" {
            blockdev += ",read-only=on";
        }
        if let Some(below) = &image.below {
            blockdev += &format!(",backing={below}");
        }
        if let Some(file) = &image.backing {
            blockdev += &format!(
                ",backing.driver=raw,backing.file.driver=file,backing.file.filename={},backing.file.aio=io_uring",
                file.display()
            );
        }
        args.push("--blockdev".into());
        args.push(blockdev);
        if image.exported {
            exports.push(image.name);
        }
    }
    for name in &exports {
        let socket = dir.join(format!("{name}.qsd"));
        args.push("--export".into());
        args.push(format!(
            "vhost-user-blk,id={name},node-name={name},addr.type=unix,addr.path={},iothread=io0,writable={},num-queues=2",
            socket.display(),
            if name == "chain" { "off" } else { "on" },
        ));
    }
    let child = run(&args).stdin(Stdio::null()).spawn().ok()?;
    let qsd = Qsd {
        child,
        dir: dir.to_owned(),
        version,
    };
    wait_for("qemu-storage-daemon's sockets", || {
        qsd.socket(exports.last()?).exists().then_some(())
    });
    pin(qsd.pid(), "1");
    Some(qsd)
}

/// Nanoseconds that all threads of a process have run.
fn cpu_ns(pid: u32) -> u64 {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task"));
    tasks
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|t| std::fs::read_to_string(t.path().join("schedstat")).ok())
        .filter_map(|s| s.split_whitespace().next()?.parse::<u64>().ok())
        .sum()
}

#[derive(Clone, Default)]
struct Figures {
    iops: Vec<f64>,
    p50: Vec<f64>,
    p99: Vec<f64>,
    /// Microseconds.
    cpu: Vec<f64>,
}

fn median(values: &[f64]) -> f64 {
    let mut v = values.to_vec();
    v.sort_by(f64::total_cmp);
    v.get(v.len() / 2).copied().unwrap_or(0.0)
}

impl Figures {
    fn add(&mut self, m: &Measured, cpu_ns: u64) {
        self.iops.push(m.iops());
        self.p50.push(f64::from(m.latency(0.5)) / 1e3);
        self.p99.push(f64::from(m.latency(0.99)) / 1e3);
        self.cpu
            .push(cpu_ns as f64 / 1e3 / m.requests.max(1) as f64);
    }

    fn json(&self) -> Value {
        json!({
            "iops": median(&self.iops), "p50-us": median(&self.p50),
            "p99-us": median(&self.p99), "cpu-us": median(&self.cpu),
        })
    }
}

fn measure(server: &dyn Server, w: &Workload, round: usize) -> (Measured, u64) {
    let mut client = Client::connect(
        &server.socket(&w.storage(round)),
        w.queues,
        w.load.depth,
        w.load.block,
    );
    // Warm up: polling windows, registered files, page cache.
    let warm = Load {
        duration: Duration::from_millis(100),
        ..w.load.clone()
    };
    client.run(&warm);
    let before = cpu_ns(server.pid());
    let m = client.run(&w.load);
    (m, cpu_ns(server.pid()) - before)
}

/// What fio reaches on the same file with io_uring: the limit of the storage.
fn fio(path: &Path, depth: usize, seconds: f64) -> Option<f64> {
    let out = Command::new("taskset")
        .args(["-c", "1", "fio", "--name=limit", "--ioengine=io_uring"])
        .args(["--rw=randread", "--bs=4k", "--direct=1", "--time_based"])
        .args(["--output-format=json", "--size=1G"])
        .arg(format!("--filename={}", path.display()))
        .arg(format!("--iodepth={depth}"))
        .arg(format!("--runtime={}", seconds.ceil()))
        .output()
        .ok()?;
    let v: Value = serde_json::from_slice(&out.stdout).ok()?;
    v["jobs"][0]["read"]["iops"].as_f64()
}

fn main() {
    let args = Args::parse();
    if cfg!(debug_assertions) {
        eprintln!("this is a debug build: its figures say nothing; run 'make bench'");
    }
    pin(std::process::id(), "0");
    let vdiskd = start_vdiskd(&args);
    let dir = vdiskd.0.path("");
    let qsd = if args.alone {
        None
    } else {
        start_qsd(&dir, args.rounds)
    };
    let mut servers: Vec<&dyn Server> = vec![&vdiskd];
    match &qsd {
        Some(q) => {
            println!(
                "vdiskd {} against qemu-storage-daemon {}",
                env!("CARGO_PKG_VERSION"),
                q.version
            );
            servers.push(q);
        }
        None if args.alone => {}
        None => println!("qemu-storage-daemon cannot be run: vdiskd alone (run 'make lab')"),
    }
    println!(
        "resident memory of the idle daemon: {} KiB",
        vdiskd.0.resident_kib()
    );
    println!(
        "{:<34} {:>10} {:>10} {:>6}  {:>8} {:>8}  {:>8} {:>8}  {:>7} {:>7} {:>6}",
        "workload",
        "iops",
        "qsd",
        "ratio",
        "p50 µs",
        "qsd",
        "p99 µs",
        "qsd",
        "cpu µs",
        "qsd",
        "ratio"
    );
    let mut results = Vec::new();
    for w in workloads(args.seconds) {
        let name = w.name();
        if args
            .only
            .as_ref()
            .is_some_and(|o| !name.contains(o.as_str()))
        {
            continue;
        }
        let mut figures: BTreeMap<&str, Figures> = BTreeMap::new();
        for round in 0..args.rounds {
            for server in &servers {
                let (m, cpu) = measure(*server, &w, round);
                figures.entry(server.name()).or_default().add(&m, cpu);
            }
        }
        let ours = figures["vdiskd"].clone();
        let theirs = figures.get("qsd").cloned().unwrap_or_default();
        let ratio = |f: fn(&Figures) -> &Vec<f64>| median(f(&ours)) / median(f(&theirs));
        println!(
            "{name:<34} {:>10.0} {:>10.0} {:>6.2}  {:>8.1} {:>8.1}  {:>8.1} {:>8.1}  {:>7.2} {:>7.2} {:>6.2}",
            median(&ours.iops),
            median(&theirs.iops),
            ratio(|f| &f.iops),
            median(&ours.p50),
            median(&theirs.p50),
            median(&ours.p99),
            median(&theirs.p99),
            median(&ours.cpu),
            median(&theirs.cpu),
            ratio(|f| &f.cpu),
        );
        results.push(json!({"workload": name, "vdiskd": ours.json(), "qsd": theirs.json()}));
    }
    for depth in [1, 32, 128] {
        let Some(iops) = fio(&dir.join("direct"), depth, args.seconds) else {
            println!("fio is not installed: no limit of the storage to show");
            break;
        };
        let name = format!("limit: fio randread 4k depth {depth}");
        println!("{name:<34} {iops:>10.0}");
        results.push(json!({"workload": name, "fio": {"iops": iops}}));
    }
    if let Some(path) = &args.json {
        let version = qsd.as_ref().map(|q| q.version.clone());
        let all =
            json!({"qsd-version": version, "poll-max-ns": args.poll_max_ns, "results": results});
        std::fs::write(path, format!("{all:#}\n")).expect("the JSON file can be written");
    }
}
