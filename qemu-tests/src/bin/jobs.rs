//! `make bench-jobs`: how long jobs take, beside the newest qemu-storage-daemon on the same images.
//!
//! A qcow2 image of 4 GiB, every other MiB of which has data, is backed up, mirrored, committed into an empty base and
//! streamed into an empty overlay, through the page cache and with O_DIRECT. No guest does anything meanwhile. Times are from
//! the job's start until it has concluded; a mirror and a commit are completed as soon as they are ready. Beside them is what fio
//! takes to write as many bytes to the same disk, and with O_DIRECT to read as many meanwhile.

use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use vdisk_qemu_tests::qemu_tools::{assert_sound, text, tool};
use vdisk_qemu_tests::{Daemon, Qmp, lab, wait_for};

const SIZE: u64 = 4 << 30;
const MIB: u64 = 1 << 20;
const ROUNDS: usize = 3;
const LOOK: Duration = Duration::from_millis(2);

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Backup,
    Mirror,
    Commit,
    Stream,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Kind::Backup => "backup",
            Kind::Mirror => "mirror",
            Kind::Commit => "commit",
            Kind::Stream => "stream",
        }
    }

    fn source(self, images: &Images) -> &Path {
        match self {
            Kind::Commit => &images.top,
            _ => &images.full,
        }
    }
}

/// The image with the data, as it is and as an overlay of a base that is made for each run.
struct Images {
    dir: PathBuf,
    full: PathBuf,
    top: PathBuf,
}

fn create(path: &Path, backing: Option<&Path>) {
    let size = SIZE.to_string();
    let mut args = vec!["create", "-q", "-f", "qcow2"];
    if let Some(backing) = backing {
        args.extend(["-F", "qcow2", "-b", text(backing)]);
    }
    args.extend([text(path), &size]);
    tool("qemu-img", &args);
}

impl Images {
    fn make(dir: &Path) -> Images {
        let raw = dir.join("half.raw");
        let mut file = std::fs::File::create(&raw).expect("the scratch folder is writable");
        file.set_len(SIZE).expect("the scratch folder has room");
        let mut x = 0x9e37_79b9_7f4a_7c15u64;
        for at in (0..SIZE).step_by(2 * MIB as usize) {
            let data: Vec<u8> = (0..MIB / 8)
                .flat_map(|_| {
                    x ^= x << 13;
                    x ^= x >> 7;
                    x ^= x << 17;
                    x.to_le_bytes()
                })
                .collect();
            file.seek(SeekFrom::Start(at)).expect("a file can seek");
            file.write_all(&data).expect("the scratch folder has room");
        }
        let images = Images {
            dir: dir.to_owned(),
            full: dir.join("full.qcow2"),
            top: dir.join("top.qcow2"),
        };
        tool(
            "qemu-img",
            &[
                "convert",
                "-f",
                "raw",
                "-O",
                "qcow2",
                text(&raw),
                text(&images.full),
            ],
        );
        std::fs::remove_file(&raw).expect("it was just made");
        std::fs::copy(&images.full, &images.top).expect("the scratch folder has room");
        let base = images.base();
        create(&base, None);
        tool(
            "qemu-img",
            &[
                "rebase",
                "-u",
                "-F",
                "qcow2",
                "-b",
                text(&base),
                text(&images.top),
            ],
        );
        images
    }

    fn base(&self) -> PathBuf {
        self.dir.join("base.qcow2")
    }

    /// The image that is written, new.
    fn target(&self, kind: Kind) -> PathBuf {
        let (path, backing) = match kind {
            Kind::Commit => (self.base(), None),
            Kind::Stream => (self.dir.join("over.qcow2"), Some(&*self.full)),
            _ => (self.dir.join("copy.qcow2"), None),
        };
        let _ = std::fs::remove_file(&path);
        create(&path, backing);
        path
    }
}

/// One job from its start to its end, in seconds.
trait Server {
    fn run(&mut self, kind: Kind, images: &Images, target: &Path, direct: bool) -> f64;
}

struct Vdiskd(Daemon);

impl Vdiskd {
    fn add(&self, name: &str, file: &Path, direct: bool, more: &[&str]) {
        let filename = format!("file.filename={}", file.display());
        let direct = format!("file.cache.direct={}", if direct { "on" } else { "off" });
        let args = [
            "node",
            "add",
            name,
            "driver=qcow2",
            "file.driver=file",
            &filename,
            &direct,
        ];
        self.0.ctl(&[&args[..], more].concat());
    }
}

impl Server for Vdiskd {
    fn run(&mut self, kind: Kind, images: &Images, target: &Path, direct: bool) -> f64 {
        let start = |args: &[&str]| {
            let more = ["--detach", "job-id=j", "auto-dismiss=false"];
            self.0.ctl(&[args, &more].concat());
        };
        let direct_target = format!("file.cache.direct={}", if direct { "on" } else { "off" });
        match kind {
            Kind::Backup | Kind::Mirror => {
                self.add("disk", &images.full, direct, &[]);
                let copy = ["--existing", "--name", "copy", "--target", &direct_target];
                start(&[&[kind.name(), "disk", text(target)][..], &copy].concat());
            }
            Kind::Commit => {
                self.add("base", target, direct, &["read-only=on"]);
                self.add("disk", &images.top, direct, &["backing=base"]);
                self.0.export_node("e", "disk", &[]);
                start(&["commit", "disk"]);
            }
            Kind::Stream => {
                self.add("base", &images.full, direct, &["read-only=on"]);
                self.add("disk", target, direct, &["backing=base"]);
                start(&["stream", "disk"]);
            }
        }
        let job = wait_for("the job", || {
            let job = self.0.ctl_json(&["job", "show", "j"]);
            if job["State"] == "ready" {
                self.0.try_ctl(&["job", "complete", "j"]);
            }
            (job["State"] == "concluded").then_some(job)
        });
        assert_eq!(job["Error"][1], "", "{job}");
        self.0.ctl(&["job", "dismiss", "j"]);
        if kind == Kind::Commit {
            self.0.ctl(&["export", "remove", "e"]);
        }
        let nodes = self.0.ctl_json(&["node", "list"]);
        let names: Vec<&str> = nodes
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|n| n["Name"].as_str())
            .collect();
        for name in ["disk", "copy", "base"] {
            if names.contains(&name) {
                self.0.ctl(&["node", "remove", name]);
            }
        }
        let at = |key: &str| job[key].as_u64().unwrap_or(0) as f64 / 1e6;
        at("ExpectedEndTime") - at("StartTime")
    }
}

struct Qsd {
    qmp: Qmp,
    child: Child,
}

impl Drop for Qsd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Qsd {
    fn start(dir: &Path) -> Option<Qsd> {
        lab().join("sid/.done").exists().then_some(())?;
        let monitor = dir.join("qsd.qmp");
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/in-root.sh");
        let chardev = format!("socket,id=m,path={},server=on,wait=off", monitor.display());
        let child = Command::new(script)
            .args(["sid", "qemu-storage-daemon", "--chardev", &chardev])
            .args(["--monitor", "chardev=m"])
            .stdin(Stdio::null())
            .spawn()
            .ok()?;
        wait_for("qemu-storage-daemon's monitor", || {
            monitor.exists().then_some(())
        });
        let qmp = Qmp::connect(&monitor);
        Some(Qsd { qmp, child })
    }

    fn add(&mut self, name: &str, file: &Path, direct: bool, backing: Option<&str>) {
        let options = json!({
            "driver": "qcow2", "node-name": name, "backing": backing,
            "cache": {"direct": direct},
            "file": {
                "driver": "file", "node-name": format!("{name}-file"),
                "filename": file, "aio": if direct { "io_uring" } else { "threads" },
                "cache": {"direct": direct},
            },
        });
        self.qmp.run("blockdev-add", options);
    }
}

impl Server for Qsd {
    fn run(&mut self, kind: Kind, images: &Images, target: &Path, direct: bool) -> f64 {
        let mut nodes = vec!["disk"];
        match kind {
            Kind::Backup | Kind::Mirror => {
                self.add("disk", &images.full, direct, None);
                self.add("copy", target, direct, None);
                nodes.push("copy");
            }
            Kind::Commit | Kind::Stream => {
                let (below, top) = match kind {
                    Kind::Commit => (target, &*images.top),
                    _ => (&*images.full, target),
                };
                self.add("base", below, direct, None);
                self.add("disk", top, direct, Some("base"));
                nodes.push("base");
            }
        }
        let start = Instant::now();
        let mut job = json!({"job-id": "j", "device": "disk", "auto-dismiss": false});
        let command = match kind {
            Kind::Backup | Kind::Mirror => {
                job["target"] = "copy".into();
                job["sync"] = "full".into();
                if kind == Kind::Backup {
                    "blockdev-backup"
                } else {
                    "blockdev-mirror"
                }
            }
            Kind::Commit => "block-commit",
            Kind::Stream => "block-stream",
        };
        self.qmp.run(command, job);
        let time = loop {
            let jobs = self.qmp.run("query-jobs", json!({}));
            let status = jobs[0]["status"].clone();
            if status == "ready" {
                self.qmp.run("job-complete", json!({"id": "j"}));
            }
            if status == "concluded" {
                assert_eq!(jobs[0]["error"], Value::Null, "{jobs}");
                break start.elapsed();
            }
            std::thread::sleep(LOOK);
        };
        self.qmp.run("job-dismiss", json!({"id": "j"}));
        for node in nodes {
            self.qmp.run("blockdev-del", json!({"node-name": node}));
        }
        time.as_secs_f64()
    }
}

/// What the disk takes for the bytes of a job, in seconds.
fn limit(images: &Images, direct: bool) -> Option<f64> {
    let file = images.dir.join("limit");
    let size = format!("--size={}", SIZE / 2);
    let (write, read) = (
        format!("--filename={}", file.display()),
        format!("--filename={}", images.full.display()),
    );
    let mut fio = Command::new("fio");
    fio.args([
        "--ioengine=io_uring",
        "--direct=1",
        "--bs=1M",
        "--iodepth=8",
        &size,
        "--output-format=json",
    ]);
    fio.args(["--name=write", "--rw=write", "--end_fsync=1", &write]);
    if direct {
        fio.args(["--name=read", "--rw=read", &read]);
    }
    let out = fio.output().ok().filter(|out| out.status.success())?;
    let _ = std::fs::remove_file(&file);
    let said: Value = serde_json::from_slice(&out.stdout).ok()?;
    let jobs = said["jobs"].as_array()?;
    // Milliseconds; a sync at the end counts.
    let time = jobs.iter().filter_map(|j| j["job_runtime"].as_f64());
    time.reduce(f64::max).map(|ms| ms / 1e3)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}

fn main() {
    let only = std::env::args().nth(1);
    let daemon = Daemon::start(&[]);
    let dir = daemon.path("");
    let images = Images::make(&dir);
    let mut vdiskd = Vdiskd(daemon);
    let mut qsd = Qsd::start(&dir);
    if qsd.is_none() {
        println!("qemu-storage-daemon cannot be run: vdiskd alone (run 'make lab')");
    }
    println!(
        "{:<22} {:>10} {:>10} {:>6} {:>10}",
        "seconds", "vdiskd", "qsd", "ratio", "disk (fio)"
    );
    for direct in [false, true] {
        for kind in [Kind::Backup, Kind::Mirror, Kind::Commit, Kind::Stream] {
            let cache = if direct { "O_DIRECT" } else { "cached" };
            let name = format!("{} {cache}", kind.name());
            if only.as_ref().is_some_and(|o| !name.contains(o.as_str())) {
                continue;
            }
            let (mut ours, mut theirs, mut limits) = (Vec::new(), Vec::new(), Vec::new());
            for round in 0..ROUNDS {
                let one = |server: &mut dyn Server, times: &mut Vec<f64>| {
                    let target = images.target(kind);
                    // What was made before is not to be written back meanwhile.
                    tool("sync", &[]);
                    if !direct {
                        let source = kind.source(&images);
                        tool("cp", &[text(source), "/dev/null"]);
                    }
                    times.push(server.run(kind, &images, &target, direct));
                    if round == 0 {
                        assert_sound(&target);
                        let like = text(kind.source(&images));
                        tool("qemu-img", &["compare", like, text(&target)]);
                    }
                };
                one(&mut vdiskd, &mut ours);
                if let Some(qsd) = &mut qsd {
                    one(qsd, &mut theirs);
                }
                tool("sync", &[]);
                limits.extend(limit(&images, direct));
            }
            let limit = match limits.is_empty() {
                true => "no fio".to_owned(),
                false => format!("{:.2}", median(limits)),
            };
            let (ours, theirs) = (median(ours), median(theirs));
            println!(
                "{name:<22} {ours:>10.2} {theirs:>10.2} {:>6.2} {limit:>10}",
                ours / theirs
            );
        }
    }
}
