//! `make bench`: vdiskd beside the newest qemu-storage-daemon, in one run, on the same work.
//!
//! One core for the client, one for the server. The servers take turns for each workload; the figures are
//! medians over the rounds, the ratios vdiskd / qemu-storage-daemon.

use std::collections::{BTreeMap, BTreeSet};
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

/// What overlays stand on: so large that most writes of a measurement are the first ones to their clusters.
const BASE_SPAN: u64 = 4 << 30;

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

/// Workloads in groups: those of one group take turns, so that they can be compared with each other, too.
fn workloads(seconds: f64) -> Vec<Vec<Workload>> {
    let duration = Duration::from_secs_f64(seconds);
    let group = |storages: &[&'static str], op, block, depth: usize| -> Vec<Workload> {
        let one = |storage: &&'static str| {
            let fresh = matches!(*storage, "sparse" | "empty" | "empty-seq" | "overlay");
            let span = match *storage {
                "overlay" => BASE_SPAN,
                _ if fresh => EMPTY_SPAN,
                _ => SPAN,
            };
            Workload {
                storage,
                queues: 1,
                fresh,
                load: Load {
                    op,
                    block,
                    depth,
                    sequential: block > 4096,
                    span,
                    duration,
                },
            }
        };
        storages.iter().map(one).collect()
    };
    const MIB: usize = 1 << 20;
    let mut out = Vec::new();
    for storage in ["null", "cached", "direct"] {
        for op in [Op::Read, Op::Write] {
            for depth in [1, 32, 128] {
                out.push(group(&[storage], op, 4096, depth));
            }
            let mut two = group(&[storage], op, 4096, 32);
            two[0].queues = 2;
            out.push(two);
            out.push(group(&[storage], op, MIB, 4));
        }
    }
    for depth in [32, 128] {
        out.push(group(&["cached", "qcow2", "chain"], Op::Read, 4096, depth));
        out.push(group(&["cached", "qcow2"], Op::Write, 4096, depth));
    }
    for (op, depth) in [(Op::Read, 1), (Op::Read, 32), (Op::Write, 32)] {
        let encrypted = ["cached", "luks", "qcow2-luks"];
        out.push(group(&encrypted, op, 4096, depth));
    }
    out.push(group(&["empty"], Op::Write, 4096, 32));
    out.push(group(&["sparse", "empty-seq"], Op::Write, MIB, 4));
    out.push(group(&["overlay"], Op::Write, 4096, 32));
    out
}

/// A server under test.
trait Server {
    fn name(&self) -> &'static str;
    fn pid(&self) -> u32;
    fn socket(&self, storage: &str) -> PathBuf;
    /// Its images, as a folder and the beginning of their names.
    fn images(&self) -> (PathBuf, &'static str);
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
    fn images(&self) -> (PathBuf, &'static str) {
        (self.0.path(""), "")
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
    fn images(&self) -> (PathBuf, &'static str) {
        (self.dir.clone(), "qsd-")
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
    written(dir, name, SPAN)
}

fn written(dir: &Path, name: &str, size: u64) -> PathBuf {
    let path = dir.join(name);
    // Written, not sparse: reads go to the storage.
    let block: Vec<u8> = (0..1u32 << 20).map(|i| (i % 251) as u8).collect();
    let mut file = std::fs::File::create(&path).expect("the scratch folder is writable");
    for _ in 0..size >> 20 {
        std::io::Write::write_all(&mut file, &block).expect("there is room for the images");
    }
    drop(file);
    warm(&path);
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

/// An image for the benchmark: a node that stands on a file.
struct Image {
    name: String,
    driver: &'static str,
    encrypted: bool,
    file: PathBuf,
    /// A raw file that is below.
    backing: Option<PathBuf>,
    /// The image that the one below is, by name.
    below: Option<String>,
    exported: bool,
}

/// Brings a file into the page cache, in the same way whoever has written it: the kernel keeps what was written in large
/// pieces in large folios, which makes reads cheaper and small writes dearer.
fn warm(path: &Path) {
    let file = std::fs::File::open(path).expect("the image was just made");
    file.sync_all().expect("the disk works");
    let _ = rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed);
    read(vec![file]);
}

/// Reads files to their ends, a piece of each in turn.
fn read(mut files: Vec<std::fs::File>) {
    let mut block = vec![0; 1 << 20];
    while !files.is_empty() {
        files.retain_mut(|f| std::io::Read::read(f, &mut block).is_ok_and(|n| n > 0));
    }
}

/// The images of a storage that the page cache is to have.
fn cached_images(server: &dyn Server, storage: &str) -> Vec<std::fs::File> {
    let (dir, prefix) = server.images();
    let stems: &[&str] = match storage {
        "chain" => &["bottom", "chain1", "chain2", "chain3", "chain4", "chain"],
        "overlay" => &["base"],
        "cached" | "qcow2" | "luks" | "qcow2-luks" => &[storage],
        _ => &[],
    };
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let images = entries.filter_map(|entry| {
        let name = entry.file_name().to_string_lossy().into_owned();
        let stem = name
            .strip_prefix(prefix)
            .or((name == "base").then_some("base"))
            .map(|n| n.trim_end_matches(".img"));
        let file = match stem.is_some_and(|s| stems.contains(&s)) {
            true => std::fs::File::open(entry.path()).ok()?,
            false => return None,
        };
        file.metadata().is_ok_and(|m| m.is_file()).then_some(file)
    });
    images.collect()
}

/// Has the images of a group leave the page cache and come back, a piece of each in turn. Which memory a file gets is chance, and some
/// of it is faster: this way all have the same share, and another one in each round. For reads alone: the first small writes to what was
/// read so are dearer than those that follow.
fn mix(servers: &[&dyn Server], group: &[Workload]) {
    let images = servers.iter().flat_map(|s| {
        let of = |w: &Workload| cached_images(*s, w.storage);
        group.iter().flat_map(of).collect::<Vec<_>>()
    });
    let images: Vec<_> = images.collect();
    for file in &images {
        file.sync_all().expect("the disk works");
    }
    for file in &images {
        let _ = rustix::fs::fadvise(file, 0, None, rustix::fs::Advice::DontNeed);
    }
    read(images);
}

/// What opens the encrypted images.
const PASSPHRASE: &str = "passphrase";

/// The images that a server needs for these storages, each after those that it stands on.
fn images(dir: &Path, prefix: &str, rounds: usize, storages: &BTreeSet<&str>) -> Vec<Image> {
    let path = |name: &str| dir.join(format!("{prefix}{name}.img"));
    let new = |name: &str, driver, file| Image {
        name: name.to_owned(),
        driver,
        encrypted: false,
        file,
        backing: None,
        below: None,
        exported: true,
    };
    let mut out = Vec::new();
    if storages.contains("qcow2") {
        out.push(new("qcow2", "qcow2", qcow2_image(dir, &path("qcow2"))));
    }
    for (name, driver) in [("luks", "luks"), ("qcow2-luks", "qcow2")] {
        if storages.contains(name) {
            let mut image = new(name, driver, path(name));
            encrypted_image(dir, driver, &image.file);
            image.encrypted = true;
            out.push(image);
        }
    }
    if storages.contains("chain") {
        let mut bottom = new("bottom", "qcow2", qcow2_image(dir, &path("bottom")));
        bottom.exported = false;
        out.push(bottom);
        for i in 1..=CHAIN {
            let is_top = i == CHAIN;
            let name = if is_top {
                "chain".into()
            } else {
                format!("chain{i}")
            };
            let mut image = new(&name, "qcow2", path(&name));
            if let Some(below) = out.last() {
                overlay(&image.file, "qcow2", &below.file);
                image.below = Some(below.name.clone());
            }
            image.exported = is_top;
            out.push(image);
        }
    }
    // Nobody writes to it: it is one for all.
    let base = storages.contains("overlay").then(|| dir.join("base"));
    if let Some(base) = base.as_ref().filter(|b| !b.exists()) {
        written(dir, text(base), BASE_SPAN);
    }
    for round in 0..rounds {
        let size = EMPTY_SPAN.to_string();
        for (storage, driver) in [
            ("sparse", "raw"),
            ("empty", "qcow2"),
            ("empty-seq", "qcow2"),
        ] {
            if storages.contains(storage) {
                let name = format!("{storage}-{round}");
                let image = new(&name, driver, path(&name));
                qemu_img(&["create", "-q", "-f", driver, text(&image.file), &size]);
                out.push(image);
            }
        }
        if let Some(base) = &base {
            let name = format!("overlay-{round}");
            let mut image = new(&name, "qcow2", path(&name));
            overlay(&image.file, "raw", base);
            image.backing = Some(base.clone());
            out.push(image);
        }
    }
    out
}

fn overlay(file: &Path, format: &str, below: &Path) {
    let args = ["create", "-q", "-f", "qcow2", "-F", format, "-b"];
    qemu_img(&[&args[..], &[text(below), text(file)]].concat());
}

fn encrypted_image(dir: &Path, driver: &str, file: &Path) {
    let raw = image(dir, "raw");
    let object = format!("secret,id=key,data={PASSPHRASE}");
    let options = match driver {
        "luks" => "key-secret=key,iter-time=100",
        _ => "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=100",
    };
    let args = [
        "convert", "--object", &object, "-f", "raw", "-O", driver, "-o", options,
    ];
    qemu_img(&[&args[..], &[text(&raw), text(file)]].concat());
    let _ = std::fs::remove_file(raw);
    warm(file);
}

/// A qcow2 image, all of it allocated.
fn qcow2_image(dir: &Path, path: &Path) -> PathBuf {
    let raw = image(dir, "raw");
    qemu_img(&[
        "convert",
        "-f",
        "raw",
        "-O",
        "qcow2",
        text(&raw),
        text(path),
    ]);
    let _ = std::fs::remove_file(raw);
    warm(path);
    path.to_owned()
}

fn start_vdiskd(args: &Args, storages: &BTreeSet<&str>) -> Vdiskd {
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
    for (name, cache) in [
        ("cached", "cache.direct=off"),
        ("direct", "cache.direct=on"),
    ] {
        if storages.contains(name) {
            daemon.export_file(name, &image(&dir, name), &[cache], &[fixed]);
        }
    }
    let passphrase = dir.join("passphrase");
    std::fs::write(&passphrase, PASSPHRASE).expect("the scratch folder is writable");
    daemon.ctl(&["secret", "add", "key", "--file", text(&passphrase)]);
    for image in images(&dir, "", args.rounds, storages) {
        let filename = format!("file.filename={}", image.file.display());
        let mut options = vec![
            format!("driver={}", image.driver),
            "file.driver=file".into(),
            filename,
        ];
        match (image.encrypted, image.driver) {
            (true, "luks") => options.push("key-secret=key".into()),
            (true, _) => {
                options.push("encrypt.format=luks".into());
                options.push("encrypt.key-secret=key".into());
            }
            _ => {}
        }
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

fn start_qsd(dir: &Path, rounds: usize, storages: &BTreeSet<&str>) -> Option<Qsd> {
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
    let secret = format!("secret,id=key,data={PASSPHRASE}");
    let objects = ["--object", "iothread,id=io0", "--object", &secret];
    let mut args = objects.map(str::to_owned).to_vec();
    let file = |name: &str, cache: &str| {
        let path = image(dir, &format!("qsd-{name}"));
        format!(
            "file,node-name={name},filename={}{cache},aio=io_uring",
            path.display()
        )
    };
    args.push("--blockdev".into());
    args.push("null-co,node-name=null,size=1073741824".into());
    let mut exports = vec!["null".to_owned()];
    for (name, cache) in [("cached", ""), ("direct", ",cache.direct=on")] {
        if storages.contains(name) {
            args.push("--blockdev".into());
            args.push(file(name, cache));
            exports.push(name.into());
        }
    }
    for image in images(dir, "qsd-", rounds, storages) {
        let mut blockdev = format!(
            "{},node-name={},discard=unmap,file.driver=file,file.filename={},file.aio=io_uring",
            image.driver,
            image.name,
            image.file.display()
        );
        match (image.encrypted, image.driver) {
            (true, "luks") => blockdev += ",key-secret=key",
            (true, _) => blockdev += ",encrypt.format=luks,encrypt.key-secret=key",
            _ => {}
        }
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

/// How a storage compares with the first of its group, in the same daemon: medians of the ratios of each round, and the CPU
/// time that it adds to a request, beside what it adds in the other server.
fn beside(
    first: &BTreeMap<&str, Figures>,
    first_name: &str,
    this: &BTreeMap<&str, Figures>,
    name: &str,
) -> String {
    let pairs = |server: &str, f: fn(&Figures) -> &Vec<f64>, op: fn(f64, f64) -> f64| {
        let (a, b) = (this.get(server)?, first.get(server)?);
        let all: Vec<f64> = f(a).iter().zip(f(b)).map(|(a, b)| op(*a, *b)).collect();
        Some(median(&all))
    };
    let iops = pairs("vdiskd", |f| &f.iops, |a, b| a / b).unwrap_or(0.0);
    let cpu = pairs("vdiskd", |f| &f.cpu, |a, b| a / b).unwrap_or(0.0);
    let added = |server| pairs(server, |f| &f.cpu, |a, b| a - b);
    let ours = added("vdiskd").unwrap_or(0.0);
    let mut line = format!(
        "    {name} of {first_name}: {iops:.2} of its IOPS, {cpu:.2} of its CPU per request; {ours:+.2} µs"
    );
    if let Some(theirs) = added("qsd") {
        line += &format!(" (qsd {theirs:+.2} µs, ratio {:.2})", ours / theirs);
    }
    line
}

/// What an image that was written anew has in the page cache. The next one gets its memory: some machines take free memory back
/// to their host, and what it costs to get it again is no daemon's. What one daemon has written is not left for the disk to
/// write while the other is measured.
struct Written(std::fs::File);

impl Written {
    fn new(server: &dyn Server, storage: &str) -> Option<Written> {
        let (dir, prefix) = server.images();
        let file = std::fs::File::open(dir.join(format!("{prefix}{storage}.img"))).ok()?;
        file.sync_all().expect("the disk works");
        Some(Written(file))
    }

    fn give_back(self) {
        let _ = rustix::fs::fadvise(&self.0, 0, None, rustix::fs::Advice::DontNeed);
    }
}

fn measure(
    server: &dyn Server,
    w: &Workload,
    round: usize,
    written: &mut Option<Written>,
) -> (Measured, u64) {
    // Some machines give cold pages back to their host.
    read(cached_images(server, w.storage));
    if w.load.op == Op::Write {
        // What others have written is not to be taken to the disk meanwhile.
        rustix::fs::sync();
    }
    if let Some(written) = written.take() {
        written.give_back();
    }
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
    let cpu = cpu_ns(server.pid()) - before;
    if w.fresh {
        *written = Written::new(server, &w.storage(round));
    }
    (m, cpu)
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
    let mut groups = workloads(args.seconds);
    if let Some(only) = &args.only {
        // Whole groups: what the others are compared with comes along.
        groups.retain(|g| g.iter().any(|w| w.name().contains(only.as_str())));
    }
    let storages: BTreeSet<&str> = groups.iter().flatten().map(|w| w.storage).collect();
    let vdiskd = start_vdiskd(&args, &storages);
    let dir = vdiskd.0.path("");
    let qsd = if args.alone {
        None
    } else {
        start_qsd(&dir, args.rounds, &storages)
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
    for group in groups {
        let mut figures: Vec<BTreeMap<&str, Figures>> = vec![BTreeMap::new(); group.len()];
        let mut written = None;
        for round in 0..args.rounds {
            // What one leaves behind is not always the other's.
            servers.reverse();
            if group.iter().all(|w| w.load.op == Op::Read) {
                mix(&servers, &group);
            }
            let mut order: Vec<usize> = (0..group.len()).collect();
            if round % 2 == 1 {
                order.reverse();
            }
            for i in order {
                for server in &servers {
                    let (m, cpu) = measure(*server, &group[i], round, &mut written);
                    let figures = figures[i].entry(server.name()).or_default();
                    figures.add(&m, cpu);
                }
            }
        }
        for (w, f) in group.iter().zip(&figures) {
            let name = w.name();
            let ours = f["vdiskd"].clone();
            let theirs = f.get("qsd").cloned().unwrap_or_default();
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
        for (w, f) in group.iter().zip(&figures).skip(1) {
            println!("{}", beside(&figures[0], group[0].storage, f, w.storage));
        }
    }
    for depth in [1, 32, 128] {
        if !storages.contains("direct") {
            break;
        }
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
