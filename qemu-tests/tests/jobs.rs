//! Jobs on nodes that clients write to: what their targets have, and how they live and end.

use std::path::{Path, PathBuf};

use serde_json::Value;
use vdisk_qemu_tests::blk_client::Client;
use vdisk_qemu_tests::qemu_tools::{assert_sound, read_with_qemu, text, tool};
use vdisk_qemu_tests::workload::{Sequence, Writer, assert_same, change};
use vdisk_qemu_tests::{Daemon, as_root, wait_for};

const MIB: u64 = 1 << 20;
const SIZE: u64 = 16 * MIB;

/// A new image of a driver, and its node and export.
fn add(daemon: &Daemon, id: &str, driver: &str) -> PathBuf {
    let image = daemon.path(&format!("{id}.img"));
    tool(
        "qemu-img",
        &["create", "-q", "-f", driver, text(&image), "16M"],
    );
    let driver = format!("driver={driver}");
    let filename = format!("file.filename={}", image.display());
    daemon.ctl(&["node", "add", id, &driver, "file.driver=file", &filename]);
    daemon.export_node(id, id, &[]);
    image
}

fn read_raw(image: &Path) -> Vec<u8> {
    std::fs::read(image).unwrap()
}

fn read(image: &Path, format: &str) -> Vec<u8> {
    match format {
        "raw" => read_raw(image),
        _ => {
            assert_sound(image);
            read_with_qemu(image)
        }
    }
}

fn job(daemon: &Daemon, id: &str) -> Value {
    daemon.ctl_json(&["job", "show", id])
}

fn wait_for_state(daemon: &Daemon, id: &str, state: &str) -> Value {
    wait_for(&format!("job {id} to be {state}"), || {
        let job = job(daemon, id);
        (job["State"] == state).then_some(job)
    })
}

fn path_of(daemon: &Daemon, export: &str) -> Value {
    daemon.ctl_json(&["export", "show", export])["Path"].clone()
}

/// Whatever guests write meanwhile, a backup has what was there when it began.
#[test]
fn a_backup_is_the_moment_it_began() {
    let daemon = Daemon::start(&["--io-threads", "2"]);
    for (i, (from, to, more)) in [
        ("qcow2", "qcow2", vec![]),
        ("raw", "qcow2", vec!["--compress"]),
        ("qcow2", "raw", vec!["--speed", "40M"]),
        ("raw", "raw", vec!["on-cbw-error=break-guest-write"]),
    ]
    .into_iter()
    .enumerate()
    {
        let id = format!("disk{i}");
        add(&daemon, &id, from);
        let sequence = Sequence::new(SIZE);
        std::thread::scope(|s| {
            let writer = Writer::start(s, &sequence, &daemon.socket(&id));
            for round in 0..3 {
                sequence.wait_for_more(300);
                let image = daemon.path(&format!("{id}-{round}.backup"));
                let job = format!("{id}-{round}");
                let name = format!("job-id=job-{job}");
                let mut args = vec!["backup", &id, text(&image), "--format", to];
                args.extend(["--name", "copy", "--detach", "auto-dismiss=false", &name]);
                args.extend(&more);
                let before = sequence.written();
                daemon.ctl(&args);
                let after = sequence.written();
                wait_for_state(&daemon, &format!("job-{job}"), "concluded");
                daemon.ctl(&["job", "dismiss", &format!("job-{job}")]);
                daemon.ctl(&["node", "remove", "copy"]);
                let last = sequence.last_write(&read(&image, to), text(&image));
                // One more may have been written than was counted.
                assert!(
                    (before..=after + 1).contains(&last),
                    "{before} {last} {after}"
                );
                assert_eq!(path_of(&daemon, &id), "fast");
            }
            writer.end();
        });
    }
}

/// The target takes the source's place while clients write; it has every write, and the source all up to that.
#[test]
fn a_mirror_takes_the_place_of_its_source() {
    let daemon = Daemon::start(&["--io-threads", "2"]);
    let mut images = vec![(add(&daemon, "disk", "qcow2"), "qcow2")];
    let sequence = Sequence::new(SIZE);
    let mut moments = Vec::new();
    std::thread::scope(|s| {
        let writer = Writer::start(s, &sequence, &daemon.socket("disk"));
        let mut top = "disk".to_owned();
        for (i, (format, more)) in [
            ("raw", vec![]),
            ("qcow2", vec!["--write-blocking"]),
            ("qcow2", vec!["granularity=4096"]),
            ("raw", vec!["--write-blocking", "granularity=1M"]),
        ]
        .into_iter()
        .enumerate()
        {
            sequence.wait_for_more(300);
            let image = daemon.path(&format!("mirror{i}.img"));
            let name = format!("mirror{i}");
            let mut args = vec!["mirror", &top, text(&image), "--format", format];
            args.extend(["--name", &name, "--pivot"]);
            args.extend(more);
            let before = sequence.written();
            daemon.ctl(&args);
            moments.push((before, sequence.written()));
            let export = daemon.ctl_json(&["export", "show", "disk"]);
            assert!(export["Node"].to_string().contains(&name), "{export}");
            assert_eq!(export["Path"], "fast", "{export}");
            daemon.ctl(&["node", "remove", &top]);
            images.push((image, format));
            top = name;
        }
        sequence.wait_for_more(300);
        writer.end();
        daemon.ctl(&["export", "remove", "disk"]);
        daemon.ctl(&["node", "remove", &top]);
    });
    for (i, (image, format)) in images.iter().enumerate() {
        let last = sequence.last_write(&read(image, format), text(image));
        match moments.get(i) {
            Some((before, after)) => {
                assert!((*before..=after + 1).contains(&last), "{last}: {moments:?}");
            }
            None => assert_eq!(last, sequence.written()),
        }
    }
}

/// A mirror that is ended without a pivot leaves a copy of one moment; the source goes on.
#[test]
fn a_mirror_that_is_cancelled_when_ready_is_a_copy_of_that_moment() {
    let daemon = Daemon::start(&[]);
    add(&daemon, "disk", "qcow2");
    let sequence = Sequence::new(SIZE);
    std::thread::scope(|s| {
        let writer = Writer::start(s, &sequence, &daemon.socket("disk"));
        sequence.wait_for_more(300);
        let image = daemon.path("copy.qcow2");
        let options = ["--name", "copy", "--detach", "auto-dismiss=false"];
        daemon.ctl(&[&["mirror", "disk", text(&image)][..], &options].concat());
        wait_for_state(&daemon, "mirror-disk", "ready");
        // Following in the background, and then with each write.
        sequence.wait_for_more(300);
        assert_eq!(path_of(&daemon, "disk"), "fast");
        daemon.ctl(&["job", "set", "mirror-disk", "copy-mode=write-blocking"]);
        assert_eq!(path_of(&daemon, "disk"), "slow");
        sequence.wait_for_more(300);
        let before = sequence.written();
        daemon.ctl(&["job", "cancel", "mirror-disk"]);
        let job = wait_for_state(&daemon, "mirror-disk", "concluded");
        let after = sequence.written();
        assert_eq!(job["Error"][1], "", "{job}");
        daemon.ctl(&["node", "remove", "copy"]);
        let last = sequence.last_write(&read(&image, "qcow2"), "the copy");
        assert!(
            (before..=after + 1).contains(&last),
            "{before} {last} {after}"
        );
        assert_eq!(path_of(&daemon, "disk"), "fast");
        sequence.wait_for_more(300);
        writer.end();
    });
}

/// All kinds of requests, of all sizes, while copies are made, in every mode.
#[test]
fn copies_follow_zeroes_and_discards_too() {
    let daemon = Daemon::start(&["--io-threads", "2"]);
    for (i, driver) in ["raw", "qcow2"].into_iter().enumerate() {
        add(&daemon, driver, driver);
        let mut client = Client::connect(&daemon.socket(driver), 1, 1, 1 << 20);
        let mut model = vec![0; SIZE as usize];
        change(&mut client, &mut model, 7 + i as u64, 100);
        for (n, mode) in ["background", "write-blocking"].into_iter().enumerate() {
            let at_start = model.clone();
            let backup = daemon.path(&format!("{driver}-{mode}.backup"));
            let copy = daemon.path(&format!("{driver}-{mode}.copy"));
            let mode = format!("copy-mode={mode}");
            daemon.ctl(&[
                "backup",
                driver,
                text(&backup),
                "--name",
                "b",
                "--detach",
                "--speed",
                "1M",
            ]);
            daemon.ctl(&[
                "mirror",
                driver,
                text(&copy),
                "--name",
                "m",
                "--detach",
                &mode,
            ]);
            change(&mut client, &mut model, 70 + n as u64, 400);
            daemon.ctl(&["job", "speed", &format!("backup-{driver}"), "0"]);
            wait_for_state(&daemon, &format!("mirror-{driver}"), "ready");
            change(&mut client, &mut model, 80 + n as u64, 200);
            daemon.ctl(&["job", "cancel", &format!("mirror-{driver}")]);
            wait_for("the jobs' ends", || {
                daemon
                    .ctl_json(&["job", "list"])
                    .as_array()?
                    .is_empty()
                    .then_some(())
            });
            daemon.ctl(&["node", "remove", "b"]);
            daemon.ctl(&["node", "remove", "m"]);
            assert_same(&read(&backup, "qcow2"), &at_start, 0, "the backup");
            assert_same(&read(&copy, "qcow2"), &model, 0, "the mirror");
        }
    }
}

#[test]
fn an_overlay_is_copied_alone_with_sync_top() {
    let daemon = Daemon::start(&[]);
    let base = daemon.path("base.qcow2");
    tool(
        "qemu-img",
        &["create", "-q", "-f", "qcow2", text(&base), "16M"],
    );
    tool("qemu-io", &["-c", "write -P 1 0 4M", text(&base)]);
    let overlay = |name: &str| {
        let image = daemon.path(name);
        tool(
            "qemu-img",
            &[
                "create",
                "-q",
                "-f",
                "qcow2",
                "-F",
                "qcow2",
                "-b",
                text(&base),
                text(&image),
            ],
        );
        image
    };
    let top = overlay("top.qcow2");
    tool(
        "qemu-io",
        &[
            "-c",
            "write -P 2 1M 64k",
            "-c",
            "write -z 2M 64k",
            "-c",
            "write -P 3 9M 1M",
            text(&top),
        ],
    );
    let want = read_with_qemu(&top);
    let filename = format!("file.filename={}", top.display());
    let below = format!("file.filename={}", base.display());
    let qcow2 = ["driver=qcow2", "file.driver=file"];
    daemon.ctl(&[&["node", "add", "base", &below, "read-only=on"][..], &qcow2].concat());
    daemon.ctl(
        &[
            &["node", "add", "disk", &filename, "backing=base"][..],
            &qcow2,
        ]
        .concat(),
    );
    for kind in ["backup", "mirror"] {
        let image = overlay(&format!("{kind}.qcow2"));
        let mut args = vec![kind, "disk", text(&image), "--existing", "--sync", "top"];
        // Whether the copy is opened with its backing file or without.
        let below = match kind {
            "backup" => ["--target", "backing="],
            _ => ["--target", "backing=base"],
        };
        args.extend(below);
        daemon.ctl(&args);
        let map = tool("qemu-img", &["map", "--output=json", text(&image)]);
        let map: Value = serde_json::from_str(&map).unwrap();
        let own: u64 = map
            .as_array()
            .unwrap()
            .iter()
            .filter(|e| e["depth"] == 0 && e["present"] == true)
            .map(|e| e["length"].as_u64().unwrap())
            .sum();
        assert_eq!(own, MIB + 2 * 65536, "{kind}: {map}");
        assert_same(&read(&image, "qcow2"), &want, 0, kind);
    }
}

/// Convert keeps what is there, and takes no space for zeroes.
#[test]
fn conversions_are_what_qemu_reads() {
    let daemon = Daemon::start(&[]);
    let source = daemon.path("source.qcow2");
    tool(
        "qemu-img",
        &["create", "-q", "-f", "qcow2", text(&source), "64M"],
    );
    for write in [
        "write -P 1 0 3M",
        "write -P 0 8M 4M",
        "write -P 5 20M 68k",
        "write -P 9 63M 1M",
    ] {
        tool("qemu-io", &["-c", write, text(&source)]);
    }
    let want = read_with_qemu(&source);
    let size = |p: &Path| {
        use std::os::unix::fs::MetadataExt;
        std::fs::metadata(p).unwrap().blocks() * 512
    };
    let raw = daemon.path("copy.raw");
    daemon.ctl(&["convert", text(&source), text(&raw), "--format", "raw"]);
    assert_same(&read_raw(&raw), &want, 0, "raw");
    assert!(size(&raw) <= 5 * MIB, "{}", size(&raw));
    let packed = daemon.path("packed.qcow2");
    daemon.ctl(&[
        "convert",
        text(&raw),
        text(&packed),
        "-F",
        "raw",
        "--compress",
    ]);
    assert_same(&read(&packed, "qcow2"), &want, 0, "compressed");
    assert!(size(&packed) <= MIB, "{}", size(&packed));
    assert_eq!(daemon.ctl_json(&["node", "list"]), Value::Array(vec![]));
    let (code, message) = daemon.ctl_error(&["convert", text(&source), text(&raw)]);
    assert_eq!(code, 4, "{message}");
    let (code, message) = daemon.ctl_error(&["convert", text(&raw), "/proc/x.qcow2"]);
    assert_ne!(code, 0, "{message}");
}

/// What a job is told when it cannot do it, and what the graph is told while a job needs it.
#[test]
fn jobs_live_as_qemu_has_them_live() {
    let daemon = Daemon::start(&[]);
    add(&daemon, "disk", "qcow2");
    // Something to copy: zeroes take no time.
    let mut client = Client::connect(&daemon.socket("disk"), 1, 1, 1 << 20);
    for at in (0..4 << 20).step_by(1 << 20) {
        assert_eq!(client.write(at, &vec![1; 1 << 20]), 0);
    }
    drop(client);
    let image = daemon.path("copy.qcow2");
    let start = |more: &[&str]| {
        let _ = std::fs::remove_file(&image);
        let args = [
            "backup",
            "disk",
            text(&image),
            "--name",
            "copy",
            "--detach",
            "auto-dismiss=false",
        ];
        daemon.ctl(&[&args[..], more].concat())
    };
    start(&["--speed", "1"]);
    let running = job(&daemon, "backup-disk");
    assert_eq!(running["State"], "running", "{running}");
    assert_eq!(running["Speed"], 1);
    assert_eq!(running["Cancelable"], true);
    for (args, want) in [
        (&["job", "resume", "backup-disk"][..], "not paused"),
        (&["job", "complete", "backup-disk"], "ready"),
        (&["job", "finalize", "backup-disk"], "pending"),
        (&["job", "dismiss", "backup-disk"], "concluded"),
        (
            &["job", "set", "backup-disk", "copy-mode=write-blocking"],
            "only mirrors",
        ),
        (&["job", "show", "nobody"], "'nobody'"),
        (&["node", "remove", "copy"], "job 'backup-disk'"),
        (&["node", "resize", "disk", "32M"], "job 'backup-disk'"),
        (&["snapshot", "apply", "disk", "x"], "job 'backup-disk'"),
        (
            &["snapshot", "overlay", "disk", "o", "/nowhere/o.qcow2"],
            "/nowhere/o.qcow2",
        ),
        (
            &[
                "export",
                "add",
                "e2",
                "--node",
                "copy",
                "--socket",
                "/run/x.sock",
            ],
            "job 'backup-disk'",
        ),
    ] {
        let (_, message) = daemon.ctl_error(args);
        assert!(message.contains(want), "{args:?}: {message}");
    }
    daemon.ctl(&["job", "pause", "backup-disk"]);
    wait_for_state(&daemon, "backup-disk", "paused");
    let (_, message) = daemon.ctl_error(&["job", "pause", "backup-disk"]);
    assert!(message.contains("paused already"), "{message}");
    daemon.ctl(&["job", "cancel", "backup-disk"]);
    let job_now = wait_for_state(&daemon, "backup-disk", "concluded");
    assert!(
        job_now["Error"][1].to_string().contains("cancelled"),
        "{job_now}"
    );
    assert_eq!(job_now["Cancelable"], false);
    daemon.ctl(&["job", "dismiss", "backup-disk"]);
    daemon.ctl(&["node", "remove", "copy"]);
    // One that waits to take effect.
    start(&["auto-finalize=false"]);
    let waiting = wait_for_state(&daemon, "backup-disk", "pending");
    assert_eq!(
        waiting["ProgressDone"], waiting["ProgressTotal"],
        "{waiting}"
    );
    daemon.ctl(&["job", "finalize", "backup-disk"]);
    let done = wait_for_state(&daemon, "backup-disk", "concluded");
    assert_eq!(done["Error"][1], "", "{done}");
    let (_, message) = daemon.ctl_error(&["job", "cancel", "backup-disk"]);
    assert!(message.contains("has ended"), "{message}");
    daemon.ctl(&["job", "dismiss", "backup-disk"]);
    assert_eq!(daemon.ctl_json(&["job", "list"]), Value::Array(vec![]));
    assert_eq!(path_of(&daemon, "disk"), "fast");
}

/// A job that runs out of space waits, and goes on when there is some.
#[test]
fn a_job_waits_for_space_if_it_is_told_to() {
    let daemon = Daemon::start(&[]);
    add(&daemon, "disk", "raw");
    let mut client = Client::connect(&daemon.socket("disk"), 1, 1, 1 << 20);
    let mut model = vec![0; SIZE as usize];
    change(&mut client, &mut model, 3, 100);
    model.iter_mut().for_each(|b| *b |= 1);
    for at in (0..SIZE).step_by(1 << 20) {
        assert_eq!(client.write(at, &model[at as usize..][..1 << 20]), 0);
    }
    let small = daemon.path("small");
    std::fs::create_dir(&small).unwrap();
    as_root(&[
        "mount",
        "-t",
        "tmpfs",
        "-o",
        "size=8M",
        "tmpfs",
        text(&small),
    ]);
    struct Mounted(PathBuf);
    impl Drop for Mounted {
        fn drop(&mut self) {
            as_root(&["umount", "-l", text(&self.0)]);
        }
    }
    let _mounted = Mounted(small.clone());
    as_root(&["chmod", "777", text(&small)]);
    let image = small.join("copy.qcow2");
    // By default it fails, and nothing of it is left.
    let (_, message) = daemon.ctl_error(&["backup", "disk", text(&image)]);
    assert!(message.contains("No space left"), "{message}");
    assert!(!image.exists());
    daemon.ctl(&[
        "backup",
        "disk",
        text(&image),
        "--name",
        "copy",
        "--detach",
        "on-target-error=enospc",
        "auto-dismiss=false",
    ]);
    let paused = wait_for_state(&daemon, "backup-disk", "paused");
    assert!(
        paused["Error"][1].to_string().contains("No space left"),
        "{paused}"
    );
    // Guests overwrite what is not copied yet: that breaks the backup unless it can be copied.
    as_root(&["mount", "-o", "remount,size=64M", text(&small)]);
    let at_start = model.clone();
    change(&mut client, &mut model, 4, 50);
    daemon.ctl(&["job", "resume", "backup-disk"]);
    let done = wait_for_state(&daemon, "backup-disk", "concluded");
    assert_eq!(done["Error"][1], "", "{done}");
    daemon.ctl(&["node", "remove", "copy"]);
    assert_same(&read(&image, "qcow2"), &at_start, 0, "the backup");
}

/// A guest that overwrites what a full target cannot take keeps its disk, and the backup fails.
#[test]
fn a_broken_backup_does_not_break_the_guest() {
    let daemon = Daemon::start(&[]);
    add(&daemon, "disk", "raw");
    let small = daemon.path("small");
    std::fs::create_dir(&small).unwrap();
    as_root(&[
        "mount",
        "-t",
        "tmpfs",
        "-o",
        "size=4M,mode=777",
        "tmpfs",
        text(&small),
    ]);
    let mut client = Client::connect(&daemon.socket("disk"), 1, 1, 1 << 20);
    let data = vec![5; 1 << 20];
    for at in (0..SIZE).step_by(1 << 20) {
        assert_eq!(client.write(at, &data), 0);
    }
    let image = small.join("copy.qcow2");
    let start = [
        "backup",
        "disk",
        text(&image),
        "--name",
        "copy",
        "--detach",
        "--speed",
        "1",
        "auto-dismiss=false",
    ];
    daemon.ctl(&start);
    let data = vec![6; 1 << 20];
    for at in (0..SIZE).step_by(1 << 20) {
        assert_eq!(client.write(at, &data), 0);
    }
    daemon.ctl(&["job", "speed", "backup-disk", "0"]);
    let failed = wait_for_state(&daemon, "backup-disk", "concluded");
    assert!(
        failed["Error"][1].to_string().contains("No space left"),
        "{failed}"
    );
    daemon.ctl(&["job", "dismiss", "backup-disk"]);
    // Its target is full.
    daemon.try_ctl(&["node", "remove", "copy"]);
    std::fs::remove_file(&image).unwrap();
    daemon.ctl(&[&start[..], &["on-cbw-error=break-guest-write"]].concat());
    let results: Vec<i32> = (0..SIZE)
        .step_by(1 << 20)
        .map(|at| client.write(at, &data))
        .collect();
    assert!(results.iter().any(|r| *r != 0), "{results:?}");
    daemon.ctl(&["job", "cancel", "backup-disk"]);
    wait_for_state(&daemon, "backup-disk", "concluded");
    daemon.try_ctl(&["node", "remove", "copy"]);
    as_root(&["umount", "-l", text(&small)]);
}

/// The daemon goes with a job under way; the source has everything that was answered.
#[test]
fn a_daemon_that_stops_ends_its_jobs() {
    let mut daemon = Daemon::start(&[]);
    let source = add(&daemon, "disk", "qcow2");
    let mut client = Client::connect(&daemon.socket("disk"), 1, 1, 1 << 20);
    let mut model = vec![0; SIZE as usize];
    change(&mut client, &mut model, 5, 100);
    for kind in ["backup", "mirror"] {
        let image = daemon.path(&format!("{kind}.qcow2"));
        daemon.ctl(&[kind, "disk", text(&image), "--detach", "--speed", "1M"]);
    }
    change(&mut client, &mut model, 6, 100);
    assert_eq!(daemon.terminate(), Some(0));
    drop(client);
    assert_same(&read(&source, "qcow2"), &model, 0, "the source");
    for kind in ["backup", "mirror"] {
        assert_sound(&daemon.path(&format!("{kind}.qcow2")));
    }
}

/// What would go wrong unseen is refused.
#[test]
fn jobs_that_would_miss_writes_are_refused() {
    let daemon = Daemon::start(&[]);
    add(&daemon, "disk", "qcow2");
    daemon.ctl(&["throttle", "set", "g", "iops-total=100000"]);
    daemon.ctl(&[
        "node",
        "add",
        "filter",
        "driver=throttle",
        "throttle-group=g",
        "file=disk",
    ]);
    for name in ["c1", "c2", "c3"] {
        daemon.ctl(&["node", "add", name, "driver=null-co", "size=16M"]);
    }
    let busctl = |method: &str, node: &str, target: &str| {
        let path = format!("/org/vdisk1/node/{node}");
        let address = format!("--address={}", daemon.bus_address());
        std::process::Command::new("busctl")
            .args([
                &address,
                "call",
                "org.vdisk1",
                &path,
                "org.vdisk1.Node",
                method,
            ])
            .args(["a{sv}", "2", "target", "s", target, "job-id", "s", target])
            .output()
            .unwrap()
    };
    // A writer below the node that is copied.
    let out = busctl("Backup", "filter", "c1");
    let message = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(message.contains("export 'disk'"), "{message}");
    // Two mirrors: the second would see no writes after the first has pivoted.
    for target in ["c1", "c2"] {
        assert!(busctl("Mirror", "disk", target).status.success());
    }
    for id in ["c1", "c2"] {
        wait_for_state(&daemon, id, "ready");
    }
    daemon.ctl(&["node", "remove", "filter"]);
    let (_, message) = daemon.ctl_error(&["job", "complete", "c1"]);
    assert!(message.contains("job 'c2'"), "{message}");
    // What is written by a job cannot be snapshot.
    let (_, message) = daemon.ctl_error(&["snapshot", "create", "c1", "s"]);
    assert!(message.contains("job 'c1'"), "{message}");
    daemon.ctl(&["job", "cancel", "c2", "--force"]);
    wait_for("the mirror's end", || {
        let jobs = daemon.ctl_json(&["job", "list"]);
        (jobs.as_array()?.len() == 1).then_some(())
    });
    daemon.ctl(&["job", "complete", "c1"]);
    wait_for("the pivot", || {
        let jobs = daemon.ctl_json(&["job", "list"]);
        jobs.as_array()?.is_empty().then_some(())
    });
    daemon.ctl(&["node", "remove", "disk"]);
}

/// What is written between the end of a mirror's work and its finalization is in the target, too.
#[test]
fn a_pending_mirror_catches_up() {
    let daemon = Daemon::start(&[]);
    add(&daemon, "disk", "raw");
    let mut client = Client::connect(&daemon.socket("disk"), 1, 1, 1 << 20);
    let mut model = vec![0; SIZE as usize];
    change(&mut client, &mut model, 1, 50);
    let image = daemon.path("copy.qcow2");
    let options = [
        "--name",
        "copy",
        "--detach",
        "auto-dismiss=false",
        "auto-finalize=false",
    ];
    daemon.ctl(&[&["mirror", "disk", text(&image)][..], &options].concat());
    wait_for_state(&daemon, "mirror-disk", "ready");
    daemon.ctl(&["job", "complete", "mirror-disk"]);
    wait_for_state(&daemon, "mirror-disk", "pending");
    for at in (0..SIZE).step_by(1 << 20) {
        let data = vec![(at >> 20) as u8 + 1; 1 << 20];
        assert_eq!(client.write(at, &data), 0);
        model[at as usize..][..1 << 20].copy_from_slice(&data);
    }
    daemon.ctl(&["job", "finalize", "mirror-disk"]);
    let done = wait_for_state(&daemon, "mirror-disk", "concluded");
    assert_eq!(done["Error"][1], "", "{done}");
    change(&mut client, &mut model, 2, 50);
    drop(client);
    daemon.ctl(&["export", "remove", "disk"]);
    daemon.ctl(&["node", "remove", "copy"]);
    assert_same(&read(&image, "qcow2"), &model, 0, "the mirror");
}

/// The daemon stops in order whatever jobs wait for.
#[test]
fn jobs_that_wait_do_not_keep_the_daemon() {
    let mut daemon = Daemon::start(&[]);
    add(&daemon, "disk", "qcow2");
    // Something to copy: zeroes take no time.
    let mut client = Client::connect(&daemon.socket("disk"), 1, 1, 1 << 20);
    for at in (0..4 << 20).step_by(1 << 20) {
        assert_eq!(client.write(at, &vec![1; 1 << 20]), 0);
    }
    drop(client);
    for (id, more) in [("p", "auto-finalize=false"), ("q", "--speed=1")] {
        let image = daemon.path(&format!("{id}.qcow2"));
        let (name, job) = (format!("copy-{id}"), format!("job-id={id}"));
        daemon.ctl(&[
            "backup",
            "disk",
            text(&image),
            "--name",
            &name,
            "--detach",
            &job,
            more,
        ]);
    }
    wait_for_state(&daemon, "p", "pending");
    daemon.ctl(&["job", "pause", "q"]);
    assert_eq!(daemon.terminate(), Some(0));
}

/// Who cancels while the last bytes are made durable gets what was asked for.
#[test]
fn a_cancel_in_the_last_moment_counts() {
    let daemon = Daemon::start(&[]);
    daemon.ctl(&[
        "node",
        "add",
        "disk",
        "driver=null-co",
        "size=4M",
        "read-zeroes=off",
    ]);
    let latency = "latency-ns=1000000000";
    daemon.ctl(&["node", "add", "slow", "driver=null-co", "size=4M", latency]);
    let address = format!("--address={}", daemon.bus_address());
    let start = [
        "call",
        "org.vdisk1",
        "/org/vdisk1/node/disk",
        "org.vdisk1.Node",
        "Backup",
    ];
    let options = ["a{sv}", "3", "target", "s", "slow", "job-id", "s", "j"];
    let out = std::process::Command::new("busctl")
        .arg(&address)
        .args([&start[..], &options, &["auto-dismiss", "b", "false"]].concat())
        .output()
        .unwrap();
    assert!(out.status.success(), "{out:?}");
    wait_for("all to be copied", || {
        let job = job(&daemon, "j");
        (job["ProgressDone"] == 4 << 20).then_some(())
    });
    daemon.ctl(&["job", "cancel", "j"]);
    let job = wait_for_state(&daemon, "j", "concluded");
    assert!(job["Error"][1].to_string().contains("cancelled"), "{job}");
}

/// A copy that a bitmap is the difference to is brought up to date, under writes, and takes its source's place.
#[test]
fn a_mirror_goes_by_a_bitmap() {
    let daemon = Daemon::start(&["--io-threads", "2"]);
    let source = add(&daemon, "disk", "raw");
    let sequence = Sequence::new(SIZE);
    let copy = daemon.path("copy.img");
    let existing = ["--format", "raw", "--existing", "--name", "copy"];
    std::thread::scope(|s| {
        let writer = Writer::start(s, &sequence, &daemon.socket("disk"));
        sequence.wait_for_more(300);
        daemon.ctl(&["bitmap", "add", "disk", "b"]);
        daemon.ctl(&[
            "mirror",
            "disk",
            text(&copy),
            "--format",
            "raw",
            "--name",
            "copy",
        ]);
        // The copy has what was there some time after the bitmap began.
        sequence.wait_for_more(50);
        let mut args = vec![
            "mirror",
            "disk",
            text(&copy),
            "--sync",
            "incremental",
            "bitmap=b",
        ];
        args.extend(existing);
        // One that is cancelled on the way leaves the bitmap as it was, and more.
        let detached = ["--detach", "--speed", "1k", "job-id=slow"];
        daemon.ctl(&[&args[..], &detached].concat());
        sequence.wait_for_more(50);
        let (_, error) = daemon.ctl_error(&["bitmap", "remove", "disk", "b"]);
        assert!(error.contains("slow"), "{error}");
        daemon.ctl(&["job", "cancel", "slow", "--force"]);
        wait_for("the job's end", || {
            let jobs = daemon.ctl_json(&["job", "list"]);
            jobs.as_array().unwrap().is_empty().then_some(())
        });
        daemon.ctl(&["node", "remove", "copy"]);
        args.push("--pivot");
        daemon.ctl(&args);
        let export = daemon.ctl_json(&["export", "show", "disk"]);
        assert!(export["Node"].to_string().contains("copy"), "{export}");
        sequence.wait_for_more(200);
        writer.end();
    });
    daemon.ctl(&["export", "remove", "disk"]);
    daemon.ctl(&["node", "remove", "copy"]);
    let last = sequence.last_write(&read_raw(&copy), "copy");
    assert_eq!(last, sequence.written());
    assert_ne!(read_raw(&source), read_raw(&copy));
}

/// What a job stands on is not taken from under it.
#[test]
fn what_a_job_needs_stays() {
    let daemon = Daemon::start(&[]);
    add(&daemon, "disk", "qcow2");
    let copy = daemon.path("copy");
    {
        let mut client = Client::connect(&daemon.socket("disk"), 1, 1, 1 << 20);
        for at in [0, 4 * MIB, 8 * MIB] {
            assert_eq!(client.write(at, &vec![1; 1 << 20]), 0);
        }
    }
    let refused = |args: &[&str], why: &str| {
        let (_, message) = daemon.ctl_error(args);
        assert!(message.contains(why), "{args:?}: {message}");
    };
    let over = |id: &str| {
        wait_for("the job's end", || {
            let jobs = daemon.ctl_json(&["job", "list"]);
            let mut jobs = jobs.as_array()?.iter();
            jobs.all(|j| j["Id"] != id).then_some(())
        });
    };
    // Its thread.
    daemon.ctl(&["iothread", "add", "x"]);
    daemon.ctl(&["mirror", "disk", text(&copy), "--detach", "iothread=x"]);
    wait_for_state(&daemon, "mirror-disk", "ready");
    refused(&["iothread", "remove", "x"], "job 'mirror-disk'");
    daemon.ctl(&["job", "cancel", "mirror-disk", "--force"]);
    over("mirror-disk");
    daemon.ctl(&["iothread", "remove", "x"]);
    // The filter that it works on.
    daemon.ctl(&["throttle", "set", "g", "iops-total=100000"]);
    let filter = ["filter", "driver=throttle", "throttle-group=g"];
    daemon.ctl(&[&["node", "insert", "disk"][..], &filter].concat());
    let copy = daemon.path("another");
    let slow = ["--detach", "--speed", "1"];
    daemon.ctl(&[&["backup", "filter", text(&copy)][..], &slow].concat());
    refused(&["node", "take-out", "filter"], "job 'backup-filter'");
    daemon.ctl(&["job", "cancel", "backup-filter"]);
    over("backup-filter");
    daemon.ctl(&["node", "take-out", "filter"]);
    // An image that goes when it was committed, and that a guest begins to use.
    daemon.ctl(&["export", "remove", "disk"]);
    let top = daemon.path("top");
    daemon.ctl(&["snapshot", "overlay", "disk", "top", text(&top)]);
    let mut client = {
        daemon.export_node("e", "top", &[]);
        Client::connect(&daemon.socket("e"), 1, 1, 1 << 20)
    };
    assert_eq!(client.write(0, &vec![1; 1 << 20]), 0);
    assert_eq!(client.write(4 << 20, &vec![1; 1 << 20]), 0);
    drop(client);
    daemon.ctl(&["export", "remove", "e"]);
    daemon.ctl(&["commit", "top", "--detach", "--speed", "1"]);
    let socket = daemon.socket("e");
    refused(
        &[
            "export",
            "add",
            "e",
            "--node",
            "top",
            "--socket",
            text(&socket),
            "--writable",
        ],
        "job 'commit-top'",
    );
    daemon.ctl(&["job", "cancel", "commit-top"]);
    over("commit-top");
    daemon.export_node("e", "top", &[]);
}

/// A disk whose storage hangs does not keep the jobs of another.
#[test]
fn jobs_do_not_wait_for_other_disks() {
    let daemon = Daemon::start(&[]);
    add(&daemon, "disk", "qcow2");
    let image = daemon.image("hangs", MIB);
    let filename = format!("file.filename={}", image.display());
    daemon.ctl(&[
        "node",
        "add",
        "hangs",
        "driver=blkdebug",
        "file.driver=file",
        &filename,
        "suspend.event=pwritev",
        "suspend.tag=here",
    ]);
    daemon.export_node("hangs", "hangs", &[]);
    let mut client = Client::connect(&daemon.socket("disk"), 1, 1, 1 << 20);
    assert_eq!(client.write(0, &vec![1; 1 << 20]), 0);
    std::thread::scope(|s| {
        let other = s.spawn(|| {
            let mut client = Client::connect(&daemon.socket("hangs"), 1, 1, 1 << 20);
            client.write(0, &[1; 4096])
        });
        wait_for("the request", || {
            let node = daemon.ctl_json(&["node", "show", "hangs"]);
            (node["Suspended"] == serde_json::json!(["here"])).then_some(())
        });
        let copy = daemon.path("copy");
        daemon.ctl(&["mirror", "disk", text(&copy), "--name", "copy", "--pivot"]);
        assert_eq!(client.write(0, &vec![2; 1 << 20]), 0);
        daemon.ctl(&["node", "go-on", "hangs", "here"]);
        assert_eq!(other.join().unwrap(), 0);
    });
}
