//! Jobs whose storage fails at each of their steps: what was there before is there afterwards, and nothing stays behind.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use serde_json::Value;
use vdisk_qemu_tests::blk_client::Client;
use vdisk_qemu_tests::qemu_tools::{assert_sound, read_with_qemu, text, tool};
use vdisk_qemu_tests::workload::{assert_same, change, compare};
use vdisk_qemu_tests::{Daemon, wait_for};

const SIZE: u64 = 16 << 20;

/// Requests that succeed before one fails.
const STEPS: [u64; 6] = [0, 1, 3, 8, 21, 55];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Backup,
    Mirror,
    Blocking,
    CommitActive,
    CommitBelow,
    Stream,
    StreamBelow,
}

/// A chain of three images, the top one of which a client uses, and an image to copy to.
struct Disk {
    daemon: Daemon,
    images: [PathBuf; 4],
    model: Vec<u8>,
}

/// A node for an image whose file fails as `rule` says.
fn add(daemon: &Daemon, name: &str, image: &Path, rule: &str, more: &[&str]) -> bool {
    let filename = format!("file.file.filename={}", image.display());
    let base = [
        "node",
        "add",
        name,
        "driver=qcow2",
        "file.driver=blkdebug",
        "file.file.driver=file",
    ];
    let rules: Vec<String> = rule
        .split(',')
        .filter(|r| !r.is_empty())
        .map(|r| match rule.contains("tag=") {
            true => format!("file.suspend.{r}"),
            false => format!("file.inject-error.{r}"),
        })
        .collect();
    let rules: Vec<&str> = rules.iter().map(String::as_str).collect();
    let args = [&base[..], &[&filename], more, &rules].concat();
    daemon.try_ctl(&args).status.success()
}

impl Disk {
    /// Where the rule is for: 0 to 2 of the chain, the base first, or 3, the target.
    fn new(at: usize, rule: &str) -> Option<Disk> {
        let daemon = Daemon::start(&["--io-threads", "2"]);
        let images = ["n0", "n1", "n2", "copy"].map(|n| daemon.path(n));
        let create = |image: &Path, below: Option<&Path>| {
            let mut args = vec!["create", "-q", "-f", "qcow2"];
            if let Some(below) = below {
                args.extend(["-F", "qcow2", "-b", text(below)]);
            }
            args.extend([text(image), "16M"]);
            tool("qemu-img", &args);
        };
        create(&images[0], None);
        create(&images[1], Some(&images[0]));
        create(&images[2], Some(&images[1]));
        create(&images[3], None);
        for (n, write) in [
            (0, "write -P 1 0 6M"),
            (1, "write -P 2 4M 4M"),
            (2, "write -P 3 7M 2M"),
        ] {
            tool("qemu-io", &["-c", write, text(&images[n])]);
        }
        let model = read_with_qemu(&images[2]);
        let disk = Disk {
            daemon,
            images,
            model,
        };
        let rule_for = |n| if n == at { rule } else { "" };
        let chain = [
            ("n0", &["read-only=on"][..]),
            ("n1", &["read-only=on", "backing=n0"]),
            ("n2", &["backing=n1"]),
            ("copy", &[]),
        ];
        for (n, (name, more)) in chain.into_iter().enumerate() {
            if !add(&disk.daemon, name, &disk.images[n], rule_for(n), more) {
                return None;
            }
        }
        disk.daemon.export_node("disk", "n2", &[]);
        Some(disk)
    }

    /// What starts the job.
    fn starter(&self, kind: Kind, more: &[&str]) -> std::process::Command {
        let address = format!("--address={}", self.daemon.bus_address());
        let copy = ["target", "s", "copy", "copy-mode", "s", "write-blocking"];
        let (method, node, options): (_, _, &[&str]) = match kind {
            Kind::Backup => ("Backup", "n2", &copy[..3]),
            Kind::Mirror => ("Mirror", "n2", &copy[..3]),
            Kind::Blocking => ("Mirror", "n2", &copy),
            Kind::CommitActive => ("Commit", "n2", &["base-node", "s", "n0"]),
            Kind::CommitBelow => ("Commit", "n1", &[]),
            Kind::Stream => ("Stream", "n2", &[]),
            Kind::StreamBelow => ("Stream", "n1", &[]),
        };
        let count = (2 + (options.len() + more.len()) / 3).to_string();
        let path = format!("/org/vdisk1/node/{node}");
        let fixed = ["job-id", "s", "j", "auto-dismiss", "b", "false"];
        let mut command = std::process::Command::new("busctl");
        command
            .args([
                &address,
                "call",
                "org.vdisk1",
                &path,
                "org.vdisk1.Node",
                method,
                "a{sv}",
            ])
            .arg(count)
            .args([&fixed[..], options, more].concat());
        command
    }

    /// Starts the job, and has it end as it does; its error.
    fn run(&mut self, kind: Kind, more: &[&str], writes: bool) -> String {
        let out = self.starter(kind, more).output().unwrap();
        if !out.status.success() {
            return String::from_utf8_lossy(&out.stderr).into_owned();
        }
        if writes {
            let mut client = Client::connect(&self.daemon.socket("disk"), 1, 1, 1 << 20);
            change(&mut client, &mut self.model, 1, 60);
        }
        self.end()
    }

    /// Has the job end as it does; its error.
    fn end(&self) -> String {
        let job = wait_for("the job's end", || {
            let job = self.daemon.ctl_json(&["job", "show", "j"]);
            match job["State"].as_str()? {
                "ready" => {
                    self.daemon.try_ctl(&["job", "complete", "j"]);
                    None
                }
                "paused" | "standby" => {
                    self.daemon.try_ctl(&["job", "resume", "j"]);
                    None
                }
                "concluded" => Some(job),
                _ => None,
            }
        });
        self.daemon.ctl(&["job", "dismiss", "j"]);
        job["Error"][1].as_str().unwrap_or_default().to_owned()
    }

    /// Everything is as it should be, with the guest's data in `left`, and can be closed.
    fn check(&self, what: &str) {
        let mut client = Client::connect(&self.daemon.socket("disk"), 1, 1, 1 << 20);
        let mut buf = vec![0; 1 << 20];
        // What the job did not meet fails a request of the guest's.
        for at in (0..3 * SIZE).step_by(1 << 16) {
            client.read(at % SIZE, &mut buf[..1 << 16]);
        }
        for at in (0..SIZE).step_by(1 << 20) {
            assert_eq!(client.read(at, &mut buf), 0, "{what}: {at}");
            assert_same(&buf, &self.model[at as usize..][..1 << 20], at, what);
        }
        drop(client);
        self.daemon.ctl(&["export", "remove", "disk"]);
        loop {
            let nodes = self.daemon.ctl_json(&["node", "list"]);
            let nodes = nodes.as_array().unwrap().clone();
            let free = |n: &&Value| n["Parents"].as_array().unwrap().is_empty();
            let Some(free) = nodes.iter().find(free) else {
                assert!(nodes.is_empty(), "{what}: {nodes:?}");
                break;
            };
            // What fails once may be the last write of a target.
            self.daemon
                .try_ctl(&["node", "remove", free["Name"].as_str().unwrap()]);
        }
    }
}

/// The image that has the guest's data in the end.
fn left(kind: Kind, failed: bool) -> usize {
    match kind {
        Kind::Mirror | Kind::Blocking if !failed => 3,
        Kind::CommitActive if !failed => 0,
        _ => 2,
    }
}

fn try_all(kind: Kind, at: usize, rule: &str, writes: bool) {
    try_some(kind, at, rule, writes, &STEPS);
}

/// As above, of a step of the engine: those that come later are like the first ones.
fn try_event(kind: Kind, at: usize, event: &str, writes: bool) {
    try_some(kind, at, &format!("event={event}"), writes, &STEPS[..3]);
}

fn try_some(kind: Kind, at: usize, rule: &str, writes: bool, steps: &[u64]) {
    let (mut failures, mut successes) = (0, 0);
    for after in steps {
        let what = format!("{kind:?}, {rule} of {at} after {after}");
        let rule = format!("{rule},once=on,after={after}");
        let Some(mut disk) = Disk::new(at, &rule) else {
            continue;
        };
        let error = disk.run(kind, &[], writes);
        let failed = !error.is_empty();
        if failed {
            failures += 1;
            assert!(
                error.contains("error 5") || error.contains("Input/output"),
                "{what}: {error}"
            );
        } else {
            successes += 1;
        }
        disk.check(&what);
        let image = &disk.images[left(kind, failed)];
        assert_sound(image);
        assert_same(&read_with_qemu(image), &disk.model, 0, &what);
    }
    assert!(failures > 0, "{kind:?} {rule}: nothing failed");
    println!("{kind:?}, {rule} of image {at}: {failures} failures, {successes} successes");
}

/// The image that a job writes fails.
fn target_fails(kind: Kind, at: usize) {
    for rule in ["iotype=write", "iotype=flush"] {
        // A backing file is flushed before it can fail a guest.
        try_all(kind, at, rule, at == 3);
    }
}

#[test]
fn the_target_of_a_backup_fails() {
    target_fails(Kind::Backup, 3);
}

#[test]
fn the_target_of_a_mirror_fails() {
    target_fails(Kind::Mirror, 3);
}

#[test]
fn the_target_of_a_write_blocking_mirror_fails() {
    target_fails(Kind::Blocking, 3);
}

#[test]
fn the_base_of_an_active_commit_fails() {
    target_fails(Kind::CommitActive, 0);
}

#[test]
fn the_base_of_a_commit_fails() {
    target_fails(Kind::CommitBelow, 0);
}

#[test]
fn a_backing_file_that_is_streamed_into_fails() {
    target_fails(Kind::StreamBelow, 1);
}

/// The images that a job reads fail.
fn sources_fail(kinds: &[(Kind, usize)]) {
    for (kind, at) in kinds {
        try_all(*kind, *at, "iotype=read", false);
    }
}

#[test]
fn the_source_of_a_copy_fails() {
    sources_fail(&[(Kind::Backup, 0), (Kind::Mirror, 1), (Kind::Blocking, 1)]);
}

#[test]
fn the_source_within_a_chain_fails() {
    sources_fail(&[
        (Kind::CommitActive, 1),
        (Kind::CommitBelow, 1),
        (Kind::Stream, 0),
        (Kind::Stream, 1),
    ]);
}

/// A job that stops for an error goes on where it was, and is complete in the end.
#[test]
fn jobs_that_go_on_after_an_error_are_complete() {
    for (kind, at) in [
        (Kind::Backup, 3),
        (Kind::Mirror, 3),
        (Kind::Blocking, 3),
        (Kind::CommitActive, 0),
        (Kind::CommitBelow, 0),
    ] {
        for policy in ["stop", "ignore"] {
            for after in [0, 3, 21] {
                let what = format!("{kind:?}, {policy} after {after}");
                let rule = format!("iotype=write,once=on,after={after}");
                let Some(mut disk) = Disk::new(at, &rule) else {
                    continue;
                };
                let more = [
                    "on-target-error",
                    "s",
                    policy,
                    "on-source-error",
                    "s",
                    policy,
                ];
                let before = disk.model.clone();
                let error = disk.run(kind, &more, false);
                // What is done to the graph when it begins and ends is not tried again.
                let graph = error.contains("made ready") || error.contains("cannot be");
                assert!(error.is_empty() || graph, "{what}: {error}");
                disk.check(&what);
                if kind == Kind::Backup {
                    assert_same(&read_with_qemu(&disk.images[3]), &before, 0, &what);
                }
                let image = &disk.images[left(kind, !error.is_empty())];
                assert_sound(image);
                assert_same(&read_with_qemu(image), &disk.model, 0, &what);
            }
        }
    }
}

/// As above, at the steps of the engine itself, wherever they are in the file.
#[test]
fn the_engine_of_a_target_fails() {
    for event in [
        "cluster_alloc",
        "cluster_alloc_space",
        "l2_alloc_write",
        "refblock_update",
        "l1_update",
    ] {
        try_event(Kind::Backup, 3, event, false);
    }
    try_event(Kind::Backup, 3, "write_aio", true);
    for event in ["l2_update", "refblock_load"] {
        try_event(Kind::CommitBelow, 0, event, false);
    }
}

#[test]
fn the_engine_of_a_source_fails() {
    try_event(Kind::Stream, 0, "l2_load", false);
    try_event(Kind::Backup, 1, "read_aio", false);
}

/// A step waits, and lets nothing pass that stands on it; the state of a node changes what fails.
#[test]
fn steps_wait_and_states_change() {
    let daemon = Daemon::start(&[]);
    let image = daemon.path("image");
    tool(
        "qemu-img",
        &["create", "-q", "-f", "qcow2", text(&image), "16M"],
    );
    let node = |more: &[&str]| {
        let filename = format!("file.file.filename={}", image.display());
        let add = [
            "node",
            "add",
            "image",
            "driver=qcow2",
            "file.driver=blkdebug",
        ];
        let file = ["file.node-name=debug", "file.file.driver=file", &filename];
        daemon.try_ctl(&[&add[..], &file, more].concat())
    };
    for (option, why) in [
        (
            "file.inject-error.event=vmstate_load",
            "a step that no driver has",
        ),
        ("file.set-state.new_state=2", "event' is missing"),
        ("file.suspend.event=l2_load", "tag' is missing"),
    ] {
        let refused = node(&[option]);
        assert!(!refused.status.success(), "{option}");
        let error = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(error.contains(why), "{option}: {error}");
    }
    let both = [
        "file.inject-error.event=l2_load",
        "file.inject-error.iotype=read",
    ];
    assert!(!node(&both).status.success());
    let rules = [
        "file.suspend.tag=here",
        "file.suspend.event=l2_alloc_write",
        "file.set-state.event=l2_alloc_write",
        "file.set-state.new_state=2",
        "file.inject-error.event=write_aio",
        "file.inject-error.state=2",
        "file.inject-error.errno=28",
        "file.inject-error.once=on",
    ];
    assert!(node(&rules).status.success());
    daemon.export_node("disk", "image", &[]);
    let mut client = Client::connect(&daemon.socket("disk"), 1, 1, 1 << 20);
    let data = vec![7; 4096];
    assert_eq!(client.write(0, &data), 0);
    let suspended = || daemon.ctl_json(&["node", "show", "debug"])["Suspended"].clone();
    assert_eq!(suspended(), serde_json::json!([]));
    let flushed = AtomicBool::new(false);
    std::thread::scope(|s| {
        s.spawn(|| {
            wait_for("the step", || {
                (suspended() == serde_json::json!(["here"])).then_some(())
            });
            assert!(!flushed.load(Relaxed));
            daemon.ctl(&["node", "go-on", "debug", "here"]);
        });
        assert_eq!(client.flush(), 0);
        flushed.store(true, Relaxed);
    });
    // The table was written, and the next write to the data fails; once.
    assert_eq!(client.write(1 << 20, &data), -5);
    assert_eq!(client.write(1 << 20, &data), 0);
    drop(client);
    daemon.ctl(&["export", "remove", "disk"]);
    daemon.ctl(&["node", "remove", "image"]);
    assert_sound(&image);
}

/// A base that cannot be read where the guest has written does not matter.
#[test]
fn what_was_overwritten_need_not_be_readable() {
    let daemon = Daemon::start(&[]);
    let (base, image) = (daemon.path("base"), daemon.path("image"));
    std::fs::write(&base, vec![5; 16 << 20]).unwrap();
    let create = ["create", "-q", "-f", "qcow2", "-F", "raw", "-b"];
    tool(
        "qemu-img",
        &[&create[..], &[text(&base), text(&image)]].concat(),
    );
    let at = (1 << 20) + 8192;
    let below = format!("file.filename={}", base.display());
    let sector = format!("inject-error.sector={}", at / 512);
    let add_base = ["node", "add", "base", "driver=blkdebug", "read-only=on"];
    let fails = ["file.driver=file", "inject-error.iotype=read", &sector];
    daemon.ctl(&[&add_base[..], &fails, &[&below]].concat());
    assert!(add(&daemon, "image", &image, "", &["backing=base"]));
    daemon.export_node("disk", "image", &[]);
    let mut client = Client::connect(&daemon.socket("disk"), 1, 1, 1 << 20);
    assert_eq!(client.read(at, &mut vec![0; 4096]), -5);
    assert_eq!(client.write(at, &[7; 4096]), 0);
    assert_eq!(client.flush(), 0);
    drop(client);
    daemon.ctl(&["export", "remove", "disk"]);
    daemon.ctl(&["node", "remove", "image"]);
    let mut expected = vec![5; 16 << 20];
    expected[at as usize..][..4096].fill(7);
    assert_same(&read_with_qemu(&image), &expected, 0, "image");
}

/// A copy on write that was put off fails, which the flush says that stands on it; the next one has it done.
#[test]
fn copies_that_were_put_off_fail() {
    for event in ["cow_read", "cow_write"] {
        let daemon = Daemon::start(&[]);
        let (base, image) = (daemon.path("base"), daemon.path("image"));
        std::fs::write(&base, vec![5; 16 << 20]).unwrap();
        let create = ["create", "-q", "-f", "qcow2", "-F", "raw", "-b"];
        tool(
            "qemu-img",
            &[&create[..], &[text(&base), text(&image)]].concat(),
        );
        let below = format!("filename={}", base.display());
        daemon.ctl(&["node", "add", "base", "driver=file", "read-only=on", &below]);
        let rule = format!("event={event},once=on");
        assert!(add(&daemon, "image", &image, &rule, &["backing=base"]));
        daemon.export_node("disk", "image", &[]);
        let mut client = Client::connect(&daemon.socket("disk"), 1, 1, 1 << 20);
        assert_eq!(client.write(1 << 20, &[7; 4096]), 0);
        assert_eq!(client.flush(), -5, "{event}");
        assert_eq!(client.flush(), 0, "{event}");
        drop(client);
        daemon.ctl(&["export", "remove", "disk"]);
        daemon.ctl(&["node", "remove", "image"]);
        assert_sound(&image);
        let mut expected = vec![5; 16 << 20];
        expected[1 << 20..][..4096].fill(7);
        assert_same(&read_with_qemu(&image), &expected, 0, event);
    }
}

/// What happens to a job while one of its requests is under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Then {
    Cancel,
    Kill,
}

/// Sets a flag when it is dropped.
struct Ended<'a>(&'a AtomicBool);

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
    }
}

/// The request number `after` to an image of the job is suspended, and then the job is cancelled, or the daemon is killed. False
/// if the job has no such request.
fn suspended(kind: Kind, at: usize, iotype: &str, after: u64, then: Then) -> bool {
    let what = format!("{kind:?}, {then:?} at {iotype} {after} of {at}");
    let rule = format!("tag=here,iotype={iotype},after={after}");
    let mut disk = Disk::new(at, &rule).expect("what is suspended can be added");
    let nodes = disk.daemon.ctl_json(&["node", "list"]);
    let mut files = nodes.as_array().unwrap().iter();
    let file = files.find(|n| n["Driver"] == "blkdebug" && n["Filename"] == text(&disk.images[at]));
    let file = file.expect("each has one")["Name"]
        .as_str()
        .unwrap()
        .to_owned();
    let waits = |disk: &Disk| {
        let node = disk.daemon.ctl_json(&["node", "show", &file]);
        node["Suspended"] == serde_json::json!(["here"])
    };
    let mut starter = disk.starter(kind, &[]);
    let mut starter = starter
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut started = None;
    let is_suspended = wait_for("a request, or the end", || {
        if waits(&disk) {
            return Some(true);
        }
        started = starter.try_wait().unwrap();
        if !started?.success() {
            return Some(false);
        }
        let job = disk.daemon.ctl_json(&["job", "show", "j"]);
        matches!(job["State"].as_str()?, "ready" | "concluded").then_some(false)
    });
    if is_suspended && then == Then::Kill {
        disk.daemon.kill();
        starter.wait().unwrap();
        for image in &disk.images[..3] {
            wait_for("the locks to be gone", || {
                let check = ["check", "-q", "-r", "leaks", text(image)];
                let out = std::process::Command::new("qemu-img").args(check).output();
                out.unwrap().status.success().then_some(())
            });
        }
        assert_same(&read_with_qemu(&disk.images[2]), &disk.model, 0, &what);
        return true;
    }
    let go_on = |disk: &Disk| disk.daemon.try_ctl(&["node", "go-on", &file, "here"]);
    if is_suspended && started.is_none() {
        // It is one of those that the start waits for.
        go_on(&disk);
        started = Some(starter.wait().unwrap());
    }
    let runs = started.is_some_and(|status| status.success());
    if is_suspended && runs {
        // It may have to wait for the request itself.
        std::thread::scope(|s| {
            let cancelled = s.spawn(|| disk.daemon.try_ctl(&["job", "cancel", "j", "--force"]));
            std::thread::sleep(std::time::Duration::from_millis(20));
            go_on(&disk);
            cancelled.join().unwrap();
        });
    }
    // What the job has not met so far may be met when it is completed, or when the images are closed.
    let ended = AtomicBool::new(false);
    let error = std::thread::scope(|s| {
        s.spawn(|| {
            while !ended.load(Relaxed) {
                go_on(&disk);
                std::thread::sleep(std::time::Duration::from_millis(50));
            }
        });
        let _ended = Ended(&ended);
        let error = if runs {
            disk.end()
        } else {
            "not started".into()
        };
        disk.check(&what);
        error
    });
    let image = &disk.images[left(kind, !error.is_empty())];
    assert_sound(image);
    assert_same(&read_with_qemu(image), &disk.model, 0, &what);
    is_suspended
}

/// At every request of a small job it is cancelled, or the daemon is killed: the chain is as it was.
fn every_request(kind: Kind, at: usize, iotypes: &[&str]) {
    for iotype in iotypes {
        for then in [Then::Cancel, Then::Kill] {
            // The first ones may not be the job's: an image that is opened for writing is marked.
            let (mut after, mut hits, mut misses) = (0, 0, 0);
            while misses < 3 {
                match suspended(kind, at, iotype, after, then) {
                    true => (hits, misses) = (hits + 1, 0),
                    false => misses += 1,
                }
                // Those that are alike are not all tried.
                after += 1 + after / 2;
            }
            assert!(hits > 2, "{kind:?}, {then:?} at {iotype} of {at}: {hits}");
            println!("{kind:?}, {then:?} at {iotype} of {at}: {hits}");
        }
    }
}

#[test]
fn backups_end_at_every_request() {
    every_request(Kind::Backup, 3, &["write"]);
    every_request(Kind::Backup, 0, &["read"]);
}

#[test]
fn mirrors_end_at_every_request() {
    every_request(Kind::Mirror, 3, &["write"]);
}

#[test]
fn active_commits_end_at_every_request() {
    every_request(Kind::CommitActive, 0, &["write"]);
}

#[test]
fn merges_end_at_every_request() {
    every_request(Kind::CommitBelow, 0, &["write"]);
    every_request(Kind::Stream, 0, &["read"]);
}

/// The daemon is killed while a job runs: the images are what the job's documentation says.
#[test]
fn killed_with_a_job_under_way() {
    for kind in [
        Kind::Backup,
        Kind::Mirror,
        Kind::Blocking,
        Kind::CommitActive,
        Kind::CommitBelow,
        Kind::Stream,
        Kind::StreamBelow,
    ] {
        let mut disk = Disk::new(3, "").unwrap();
        let (method, node) = match kind {
            Kind::Backup => ("backup", "n2"),
            Kind::Mirror | Kind::Blocking => ("mirror", "n2"),
            Kind::CommitActive => ("commit", "n2"),
            Kind::CommitBelow => ("commit", "n1"),
            Kind::Stream => ("stream", "n2"),
            Kind::StreamBelow => ("stream", "n1"),
        };
        let copy = disk.daemon.path("killed.qcow2");
        let mut args = vec![method, node];
        if matches!(kind, Kind::Backup | Kind::Mirror | Kind::Blocking) {
            args.push(text(&copy));
        }
        if kind == Kind::Blocking {
            args.push("--write-blocking");
        }
        args.extend(["--detach", "job-id=j", "--speed", "4M"]);
        disk.daemon.ctl(&args);
        wait_for("some of the work", || {
            let job = disk.daemon.ctl_json(&["job", "show", "j"]);
            (job["ProgressDone"].as_u64()? >= 1 << 20).then_some(())
        });
        let mut client = Client::connect(&disk.daemon.socket("disk"), 1, 1, 1 << 20);
        change(&mut client, &mut disk.model, 3, 60);
        assert_eq!(client.flush(), 0);
        disk.daemon.kill();
        drop(client);
        // The chain is the same, and so is what the guest was told.
        for image in &disk.images[..3] {
            // The kernel gives the files of a killed process back a little later.
            wait_for("the locks to be gone", || {
                let check = ["check", "-q", "-r", "leaks", text(image)];
                let out = std::process::Command::new("qemu-img").args(check).output();
                out.unwrap().status.success().then_some(())
            });
        }
        assert_same(
            &read_with_qemu(&disk.images[2]),
            &disk.model,
            0,
            &format!("{kind:?}"),
        );
    }
}

/// What a guest reads from a backing file is in the image afterwards, and nothing that it wrote is lost.
#[test]
fn copy_on_read_keeps_what_is_read() {
    let mut disk = Disk::new(3, "").unwrap();
    let daemon = &disk.daemon;
    daemon.ctl(&["node", "insert", "n2", "cor", "driver=copy-on-read"]);
    let export = daemon.ctl_json(&["export", "show", "disk"]);
    assert_eq!(export["Path"], "slow", "{export}");
    let mut client = Client::connect(&daemon.socket("disk"), 1, 1, 1 << 20);
    let mut buf = vec![0; 1 << 20];
    for at in (0..SIZE).step_by(1 << 20) {
        assert_eq!(client.read(at, &mut buf), 0);
        assert_same(&buf, &disk.model[at as usize..][..1 << 20], at, "read");
        if at.is_multiple_of(3 << 20) {
            change(&mut client, &mut disk.model, at, 20);
        }
    }
    drop(client);
    compare(daemon, "disk", &disk.model);
    daemon.ctl(&["node", "take-out", "cor"]);
    let export = daemon.ctl_json(&["export", "show", "disk"]);
    assert_eq!(export["Path"], "fast", "{export}");
    disk.check("copy-on-read");
    assert_sound(&disk.images[2]);
    // Nothing of the images below is needed any more.
    tool(
        "qemu-img",
        &["rebase", "-u", "-b", "", text(&disk.images[2])],
    );
    assert_same(&read_with_qemu(&disk.images[2]), &disk.model, 0, "alone");
}
