//! Dirty bitmaps, and the incremental backups that go by them.

use std::path::{Path, PathBuf};

use serde_json::Value;
use vdisk_qemu_tests::blk_client::Client;
use vdisk_qemu_tests::qemu_tools::{read_with_qemu, text, tool};
use vdisk_qemu_tests::workload::{Sequence, Writer, assert_same, change};
use vdisk_qemu_tests::{Daemon, wait_for};

const SIZE: u64 = 16 << 20;

fn start() -> (Daemon, PathBuf) {
    let daemon = Daemon::start(&["--io-threads", "2"]);
    let image = daemon.path("disk.qcow2");
    tool(
        "qemu-img",
        &["create", "-q", "-f", "qcow2", text(&image), "16M"],
    );
    let filename = format!("file.filename={}", image.display());
    daemon.ctl(&[
        "node",
        "add",
        "disk",
        "driver=qcow2",
        "file.driver=file",
        "discard=unmap",
        &filename,
    ]);
    daemon.export_node("disk", "disk", &[]);
    (daemon, image)
}

fn bitmap(daemon: &Daemon, name: &str) -> Value {
    let all = daemon.ctl_json(&["bitmap", "list"]);
    let found = all.as_array().unwrap().iter().find(|b| b["Name"] == name);
    found.unwrap_or_else(|| panic!("{name}: {all}")).clone()
}

/// An image over another, for an increment.
fn overlay(daemon: &Daemon, name: &str, below: &Path) -> PathBuf {
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
            text(below),
            text(&image),
        ],
    );
    image
}

/// A full backup and increments over it, made while a client writes, are each one moment.
#[test]
fn increments_are_moments_too() {
    let (daemon, _) = start();
    let sequence = Sequence::new(SIZE);
    std::thread::scope(|s| {
        let writer = Writer::start(s, &sequence, &daemon.socket("disk"));
        sequence.wait_for_more(300);
        daemon.ctl(&["bitmap", "add", "disk", "b", "--granularity", "4096"]);
        let full = daemon.path("full.qcow2");
        daemon.ctl(&["backup", "disk", text(&full)]);
        let mut images = vec![full];
        for i in 0..4 {
            sequence.wait_for_more(100);
            let image = overlay(&daemon, &format!("inc{i}.qcow2"), images.last().unwrap());
            let args = [
                "backup",
                "disk",
                text(&image),
                "--existing",
                "--name",
                "copy",
            ];
            let by = [
                "--sync",
                "incremental",
                "bitmap=b",
                "--target",
                "backing=",
                "--detach",
            ];
            // One that is given up takes nothing out of the bitmap.
            let slow = ["--speed", "1", "auto-dismiss=false"];
            daemon.ctl(&[&args[..], &by, &slow].concat());
            assert!(bitmap(&daemon, "b")["Job"].to_string().contains("backup"));
            for args in [
                &["bitmap", "remove", "disk", "b"][..],
                &["bitmap", "clear", "disk", "b"],
            ] {
                let (_, message) = daemon.ctl_error(args);
                assert!(message.contains("backup-disk"), "{message}");
            }
            sequence.wait_for_more(100);
            daemon.ctl(&["job", "cancel", "backup-disk"]);
            wait_for("the backup's end", || {
                let job = daemon.ctl_json(&["job", "show", "backup-disk"]);
                (job["State"] == "concluded").then_some(())
            });
            daemon.ctl(&["job", "dismiss", "backup-disk"]);
            daemon.ctl(&["node", "remove", "copy"]);
            assert_eq!(bitmap(&daemon, "b")["Job"], "/");
            std::fs::remove_file(&image).unwrap();
            let image = overlay(&daemon, &format!("inc{i}.qcow2"), images.last().unwrap());
            let before = sequence.written();
            daemon.ctl(&[&args[..], &by].concat());
            let after = sequence.written();
            wait_for("the backup's end", || {
                let jobs = daemon.ctl_json(&["job", "list"]);
                jobs.as_array()?.is_empty().then_some(())
            });
            daemon.ctl(&["node", "remove", "copy"]);
            let last = sequence.last_write(&read_with_qemu(&image), text(&image));
            assert!(
                (before..=after + 1).contains(&last),
                "{before} {last} {after}"
            );
            images.push(image);
        }
        let path = daemon.ctl_json(&["export", "show", "disk"])["Path"].clone();
        assert_eq!(path, "fast");
        writer.end();
    });
}

/// What bitmaps have is what was written, on the fast path and on the slow one.
#[test]
fn bitmaps_have_what_was_written() {
    let (daemon, _) = start();
    let mut client = Client::connect(&daemon.socket("disk"), 1, 1, 1 << 20);
    let mut model = vec![0; SIZE as usize];
    change(&mut client, &mut model, 1, 100);
    let count = |name: &str| bitmap(&daemon, name)["Count"].as_u64().unwrap();
    daemon.ctl(&["bitmap", "add", "disk", "small", "--granularity", "4096"]);
    daemon.ctl(&["bitmap", "add", "disk", "large", "--granularity", "1M"]);
    daemon.ctl(&["bitmap", "add", "disk", "off", "--disabled"]);
    assert_eq!((count("small"), count("large")), (0, 0));
    let data = vec![7; 8192];
    // Allocated before, and not.
    for at in [0, 4096 * 100 + 512, SIZE - 8192] {
        assert_eq!(client.write(at, &data), 0);
    }
    assert_eq!(client.write_zeroes(5 << 20, 4096, true), 0);
    assert_eq!(client.discard(6 << 20, 65536), 0);
    assert_eq!(count("large"), 4 << 20, "{}", count("large"));
    assert_eq!(count("small"), (2 + 3 + 2 + 1 + 16) * 4096);
    assert_eq!(count("off"), 0);
    daemon.ctl(&["bitmap", "disable", "disk", "large"]);
    daemon.ctl(&["bitmap", "enable", "disk", "off"]);
    assert_eq!(client.write(9 << 20, &data), 0);
    assert_eq!((count("large"), count("off")), (4 << 20, 65536));
    daemon.ctl(&["bitmap", "merge", "disk", "off", "large"]);
    assert_eq!(count("off"), (4 << 20) + 65536);
    daemon.ctl(&["bitmap", "clear", "disk", "small"]);
    assert_eq!(count("small"), 0);
    // The disk grows, and what is new is recorded.
    drop(client);
    daemon.ctl(&["node", "resize", "disk", "32M"]);
    let mut client = Client::connect(&daemon.socket("disk"), 1, 1, 1 << 20);
    assert_eq!(client.write(20 << 20, &data), 0);
    assert_eq!(count("small"), 8192);
    for (args, want) in [
        (&["bitmap", "add", "disk", "small"][..], "already"),
        (
            &["bitmap", "add", "disk", "x", "--granularity", "1000"],
            "1000",
        ),
        (&["bitmap", "add", "nobody", "x"], "'nobody'"),
        (&["bitmap", "clear", "disk", "nobody"], "'nobody'"),
        (&["bitmap", "merge", "disk", "small", "nobody"], "'nobody'"),
    ] {
        let (_, message) = daemon.ctl_error(args);
        assert!(message.contains(want), "{args:?}: {message}");
    }
    daemon.ctl(&["bitmap", "remove", "disk", "off"]);
    daemon.ctl(&["export", "remove", "disk"]);
    daemon.ctl(&["node", "remove", "disk"]);
    assert_eq!(daemon.ctl_json(&["bitmap", "list"]), Value::Array(vec![]));
}

/// An image whose file ends within a block of the storage can be used with O_DIRECT.
#[test]
fn images_that_end_within_a_block_work_with_o_direct() {
    let daemon = Daemon::start(&[]);
    let image = daemon.path("disk.qcow2");
    tool(
        "qemu-img",
        &["create", "-q", "-f", "qcow2", text(&image), "16M"],
    );
    let len = std::fs::metadata(&image).unwrap().len();
    assert!(!len.is_multiple_of(512), "{len}");
    let filename = format!("file.filename={}", image.display());
    let args = [
        "node",
        "add",
        "disk",
        "driver=qcow2",
        "file.driver=file",
        &filename,
    ];
    daemon.ctl(&[&args[..], &["file.cache.direct=on"]].concat());
    daemon.export_node("disk", "disk", &[]);
    let mut client = Client::connect(&daemon.socket("disk"), 1, 1, 1 << 20);
    let mut model = vec![0; SIZE as usize];
    change(&mut client, &mut model, 1, 100);
    drop(client);
    daemon.ctl(&["export", "remove", "disk"]);
    daemon.ctl(&["node", "remove", "disk"]);
    assert_same(&read_with_qemu(&image), &model, 0, "the image");
}

/// The backups of two disks that are written in turn, and a bitmap that begins with them, are of one instant.
#[test]
fn a_transaction_is_one_instant() {
    let daemon = Daemon::start(&["--io-threads", "2"]);
    let disks = ["a", "b"];
    for id in disks {
        let image = daemon.path(&format!("{id}.qcow2"));
        daemon.ctl(&["image", "create", text(&image), "16M"]);
        let filename = format!("file.filename={}", image.display());
        daemon.ctl(&[
            "node",
            "add",
            id,
            "driver=qcow2",
            "file.driver=file",
            &filename,
        ]);
        daemon.export_node(id, id, &[]);
    }
    let add_target = |name: &str| {
        let image = daemon.path(&format!("{name}.qcow2"));
        let _ = std::fs::remove_file(&image);
        daemon.ctl(&["image", "create", text(&image), "16M"]);
        let filename = format!("file.filename={}", image.display());
        daemon.ctl(&[
            "node",
            "add",
            name,
            "driver=qcow2",
            "file.driver=file",
            &filename,
        ]);
        image
    };
    let number = |image: &Path, at: usize| {
        let disk = read_with_qemu(image);
        u64::from_le_bytes(disk[at..at + 8].try_into().unwrap())
    };
    let stop = std::sync::atomic::AtomicBool::new(false);
    let load = std::sync::atomic::Ordering::SeqCst;
    std::thread::scope(|s| {
        s.spawn(|| {
            let mut clients = disks.map(|id| Client::connect(&daemon.socket(id), 1, 1, 1 << 20));
            let mut n = 0u64;
            while !stop.load(load) {
                n += 1;
                let mut data = vec![0; 4096];
                data[..8].copy_from_slice(&n.to_le_bytes());
                for client in &mut clients {
                    assert_eq!(client.write(0, &data), 0);
                }
            }
        });
        for round in 0..5 {
            let images = ["ca", "cb"].map(add_target);
            let bitmap = format!("bitmap-add,node=a,name=m{round}");
            let backup = |id: &str| format!("backup,node={id},target=c{id},auto-dismiss=false");
            let report = daemon.ctl_json(&[
                "transaction",
                &backup("a"),
                &bitmap,
                &backup("b"),
                "--grouped",
            ]);
            assert_eq!(report["jobs"][1], "backup-b", "{report}");
            for id in disks {
                let job = format!("backup-{id}");
                wait_for("the backup's end", || {
                    let job = daemon.ctl_json(&["job", "show", &job]);
                    (job["State"] == "concluded").then(|| assert_eq!(job["Error"][1], "", "{job}"))
                });
                daemon.ctl(&["job", "dismiss", &job]);
                daemon.ctl(&["node", "remove", &format!("c{id}")]);
            }
            let (a, b) = (number(&images[0], 0), number(&images[1], 0));
            // The first disk is written first.
            assert!(a == b || a == b + 1, "{a} {b}");
        }
        // Two overlays at one instant, and an instant that does not come.
        let overlay = |id: &str| {
            let image = daemon.path(&format!("o{id}.qcow2"));
            daemon.ctl(&[
                "image",
                "create",
                text(&image),
                "16M",
                "--backing",
                "x",
                "-F",
                "qcow2",
            ]);
            format!(
                "add-overlay,node={id},driver=qcow2,node-name=o{id},file.driver=file,file.filename={}",
                image.display()
            )
        };
        let (a, b) = (overlay("a"), overlay("b"));
        let bad = format!("{b},read-only=on");
        let before = daemon.ctl(&["tree"]);
        for action in [
            bad.as_str(),
            "bitmap-clear,node=b,name=nobody",
            "backup,node=b,target=b",
            "what,node=b",
        ] {
            daemon.ctl_error(&["transaction", &a, action]);
            assert_eq!(daemon.ctl(&["tree"]), before, "{action}");
        }
        daemon.ctl(&["transaction", &a, &b]);
        stop.store(true, load);
    });
    for id in disks {
        let node = daemon.ctl_json(&["export", "show", id])["Node"].to_string();
        assert!(node.contains(&format!("o{id}")), "{node}");
        daemon.ctl(&["export", "remove", id]);
        daemon.ctl(&["node", "remove", &format!("o{id}")]);
        daemon.ctl(&["node", "remove", id]);
    }
    let below = disks.map(|id| number(&daemon.path(&format!("{id}.qcow2")), 0));
    assert!(
        below[0] == below[1] || below[0] == below[1] + 1,
        "{below:?}"
    );
}

/// Jobs of a group end together: when one is given up, none of them has effect.
#[test]
fn a_group_of_jobs_ends_as_one() {
    let (daemon, _) = start();
    for name in ["c1", "c2"] {
        daemon.ctl(&["node", "add", name, "driver=null-co", "size=16M"]);
    }
    daemon.ctl(&["node", "add", "other", "driver=null-co", "size=16M"]);
    daemon.ctl(&["bitmap", "add", "disk", "b"]);
    let mut client = Client::connect(&daemon.socket("disk"), 1, 1, 1 << 20);
    assert_eq!(client.write(0, &[7; 4096]), 0);
    let first = "backup,node=disk,target=c1,job-id=j1,sync=incremental,bitmap=b,auto-dismiss=false";
    let second = "backup,node=other,target=c2,job-id=j2,speed=1,auto-dismiss=false";
    daemon.ctl(&["transaction", first, second, "--grouped"]);
    let state = |id: &str, want: &str| {
        wait_for(&format!("job {id} to be {want}"), || {
            let job = daemon.ctl_json(&["job", "show", id]);
            (job["State"] == want).then_some(job)
        })
    };
    state("j1", "waiting");
    assert_eq!(bitmap(&daemon, "b")["Count"], 0);
    let (_, message) = daemon.ctl_error(&["job", "pause", "j1"]);
    assert!(message.contains("group"), "{message}");
    daemon.ctl(&["job", "cancel", "j2"]);
    for id in ["j1", "j2"] {
        let job = state(id, "concluded");
        assert!(job["Error"][1].to_string().contains("cancelled"), "{job}");
        daemon.ctl(&["job", "dismiss", id]);
    }
    // Nothing was lost for the next one.
    assert_eq!(bitmap(&daemon, "b")["Count"], 65536);
}

/// Bitmaps that the image keeps: they go on where they were when the node comes back, and QEMU knows them.
#[test]
fn persistent_bitmaps_are_kept_by_the_image() {
    let (mut daemon, image) = start();
    let open = |daemon: &Daemon| {
        let filename = format!("file.filename={}", image.display());
        daemon.ctl(&[
            "node",
            "add",
            "disk",
            "driver=qcow2",
            "file.driver=file",
            &filename,
        ]);
        daemon.export_node("disk", "disk", &[]);
    };
    let close = |daemon: &Daemon| {
        daemon.ctl(&["export", "remove", "disk"]);
        daemon.ctl(&["node", "remove", "disk"]);
        tool("qemu-img", &["check", "-q", text(&image)]);
    };
    let known = || {
        let info = tool("qemu-img", &["info", "--output=json", text(&image)]);
        let info: Value = serde_json::from_str(&info).unwrap();
        let all = info["format-specific"]["data"]["bitmaps"].clone();
        let all = all.as_array().cloned().unwrap_or_default();
        let mut all: Vec<(String, String)> = all
            .iter()
            .map(|b| {
                (
                    b["name"].as_str().unwrap().to_owned(),
                    b["flags"].to_string(),
                )
            })
            .collect();
        all.sort();
        all
    };
    let write = |daemon: &Daemon, at: u64| {
        let mut client = Client::connect(&daemon.socket("disk"), 1, 1, 1 << 20);
        assert_eq!(client.write(at, &[7; 4096]), 0);
        assert_eq!(client.flush(), 0);
    };
    tool("qemu-img", &["--version"]);
    for name in ["keep", "off", "gone"] {
        daemon.ctl(&[
            "bitmap",
            "add",
            "disk",
            name,
            "--persistent",
            "--granularity",
            "4096",
        ]);
    }
    daemon.ctl(&["bitmap", "add", "disk", "memory"]);
    daemon.ctl(&["bitmap", "disable", "disk", "off"]);
    write(&daemon, 0);
    let count = |daemon: &Daemon, name: &str| bitmap(daemon, name)["Count"].as_u64().unwrap();
    assert_eq!((count(&daemon, "keep"), count(&daemon, "off")), (4096, 0));
    close(&daemon);
    assert_eq!(daemon.ctl_json(&["bitmap", "list"]), Value::Array(vec![]));
    let names = |all: &[(String, String)]| all.iter().map(|b| b.0.clone()).collect::<Vec<_>>();
    assert_eq!(names(&known()), ["gone", "keep", "off"]);
    // One that QEMU makes is there, too.
    tool(
        "qemu-img",
        &["bitmap", "--add", "-g", "65536", text(&image), "theirs"],
    );
    open(&daemon);
    assert_eq!(bitmap(&daemon, "keep")["Persistent"], true);
    assert_eq!(bitmap(&daemon, "off")["Recording"], false);
    write(&daemon, 1 << 20);
    daemon.ctl(&["bitmap", "enable", "disk", "off"]);
    daemon.ctl(&["bitmap", "remove", "disk", "gone"]);
    write(&daemon, 2 << 20);
    assert_eq!(count(&daemon, "keep"), 3 * 4096);
    assert_eq!(count(&daemon, "off"), 4096);
    assert_eq!(count(&daemon, "theirs"), 2 * 65536);
    daemon.ctl(&["node", "resize", "disk", "24M"]);
    write(&daemon, 20 << 20);
    close(&daemon);
    let all = known();
    assert_eq!(names(&all), ["keep", "off", "theirs"]);
    assert!(all.iter().all(|b| b.1.contains("auto")), "{all:?}");
    open(&daemon);
    assert_eq!(count(&daemon, "keep"), 4 * 4096);
    assert_eq!(count(&daemon, "off"), 2 * 4096);
    // An overlay comes: the image below keeps them, and they are gone from the graph.
    let over = daemon.path("over.qcow2");
    daemon.ctl(&["snapshot", "overlay", "disk", "over", text(&over)]);
    assert_eq!(daemon.ctl_json(&["bitmap", "list"]), Value::Array(vec![]));
    write(&daemon, 3 << 20);
    // They record what is put back.
    daemon.ctl(&["commit", "over"]);
    assert!(count(&daemon, "keep") >= 5 * 4096);
    // A daemon that is killed leaves them as saying nothing, and one of that name may come again.
    daemon.kill();
    daemon.start_again();
    // The kernel gives the files of a killed process back a little later.
    wait_for("the locks to be gone", || {
        let info = ["info", text(&image)];
        let out = std::process::Command::new("qemu-img").args(info).output();
        out.unwrap().status.success().then_some(())
    });
    assert!(
        known().iter().all(|b| b.1.contains("in-use")),
        "{:?}",
        known()
    );
    open(&daemon);
    assert_eq!(daemon.ctl_json(&["bitmap", "list"]), Value::Array(vec![]));
    daemon.ctl(&["bitmap", "add", "disk", "keep", "--persistent"]);
    close(&daemon);
    let all = known();
    assert_eq!(names(&all), ["keep", "off", "theirs"]);
    assert!(!all[0].1.contains("in-use"), "{all:?}");
    // What cannot keep them is told.
    let raw = daemon.image("raw.img", 1 << 20);
    let filename = format!("filename={}", raw.display());
    daemon.ctl(&["node", "add", "raw", "driver=file", &filename]);
    let (code, message) = daemon.ctl_error(&["bitmap", "add", "raw", "b", "--persistent"]);
    assert!(code == 2 && message.contains("qcow2"), "{code} {message}");
}

/// Nobody makes the daemon take gigabytes of memory by asking for fine bits of a large disk.
#[test]
fn bits_that_take_too_much_memory_are_refused() {
    let daemon = Daemon::start(&[]);
    for name in ["a", "b"] {
        daemon.ctl(&["node", "add", name, "driver=null-co", "size=16T"]);
    }
    let (code, message) = daemon.ctl_error(&["bitmap", "add", "a", "fine", "--granularity", "512"]);
    assert!(code == 2 && message.contains("8192"), "{code} {message}");
    daemon.ctl(&["bitmap", "add", "a", "coarse", "--granularity", "8192"]);
    let address = format!("--address={}", daemon.bus_address());
    let call = [
        "call",
        "org.vdisk1",
        "/org/vdisk1/node/a",
        "org.vdisk1.Node",
        "Mirror",
    ];
    let options = ["a{sv}", "2", "target", "s", "b", "granularity", "t", "512"];
    let out = std::process::Command::new("busctl")
        .arg(&address)
        .args([&call[..], &options].concat())
        .output()
        .unwrap();
    let message = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(
        message.contains("mirror-a") && message.contains("8192"),
        "{message}"
    );
    // A disk that no job could keep account of.
    for name in ["huge", "copy"] {
        daemon.ctl(&[
            "node",
            "add",
            name,
            "driver=null-co",
            "size=4611686018427387904",
        ]);
    }
    for method in ["Backup", "Convert", "Mirror"] {
        let out = std::process::Command::new("busctl")
            .args([&address, "call", "org.vdisk1", "/org/vdisk1/node/huge"])
            .args([
                "org.vdisk1.Node",
                method,
                "a{sv}",
                "1",
                "target",
                "s",
                "copy",
            ])
            .output()
            .unwrap();
        let message = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(message.contains("memory"), "{method}: {message}");
    }
}

/// Two actions of a transaction that would take the same name, or the same bits, are refused, and nothing is done.
#[test]
fn actions_that_clash_are_refused() {
    let (daemon, _) = start();
    daemon.ctl(&["node", "add", "other", "driver=null-co", "size=16M"]);
    for name in ["c1", "c2"] {
        daemon.ctl(&["node", "add", name, "driver=null-co", "size=16M"]);
    }
    for name in ["a", "b"] {
        daemon.ctl(&["bitmap", "add", "disk", name]);
    }
    let mut client = Client::connect(&daemon.socket("disk"), 1, 1, 1 << 20);
    assert_eq!(client.write(0, &[7; 4096]), 0);
    let (second, _) = {
        let image = daemon.path("second.qcow2");
        daemon.ctl(&["image", "create", text(&image), "16M"]);
        let filename = format!("file.filename={}", image.display());
        let add = ["node", "add", "second", "driver=qcow2", "file.driver=file"];
        (daemon.ctl(&[&add[..], &[&filename]].concat()), image)
    };
    drop(second);
    let overlay = |node: &str| {
        let image = daemon.path(&format!("o-{node}.qcow2"));
        let create = ["image", "create", text(&image), "16M", "--backing", "x"];
        daemon.ctl(&[&create[..], &["-F", "qcow2"]].concat());
        format!(
            "add-overlay,node={node},driver=qcow2,node-name=o,file.driver=file,file.filename={}",
            image.display()
        )
    };
    let full = "backup,node=disk,target=c1";
    let by_bits = |target: &str, id: &str| {
        format!("backup,node=disk,target={target},job-id={id},sync=incremental,bitmap=b")
    };
    let (first, second) = (by_bits("c1", "j1"), by_bits("c2", "j2"));
    let shared = daemon.path("shared.qcow2");
    daemon.ctl(&[
        "image",
        "create",
        text(&shared),
        "16M",
        "--backing",
        "x",
        "-F",
        "qcow2",
    ]);
    let filename = format!("filename={}", shared.display());
    daemon.ctl(&["node", "add", "shared", "driver=file", &filename]);
    let onto = |node: &str, name: &str| {
        format!("add-overlay,node={node},driver=qcow2,node-name={name},file=shared")
    };
    let before = daemon.ctl(&["tree"]);
    for (actions, why) in [
        (
            [&onto("disk", "o1")[..], &onto("second", "o2")],
            "overlay 'o2' would be written to node 'shared', and so would 'o1'",
        ),
        (
            [&overlay("disk")[..], &overlay("second")],
            "two of its overlays have a node 'o'",
        ),
        (
            [full, "backup,node=disk,target=c2"],
            "two of its jobs are called 'backup-disk'",
        ),
        ([&first, &second], "bitmap 'b'"),
        ([&first, "bitmap-clear,node=disk,name=b"], "bitmap 'b'"),
        (["bitmap-remove,node=disk,name=b", &first], "bitmap 'b'"),
        (
            [
                "bitmap-remove,node=disk,name=b",
                "bitmap-clear,node=disk,name=b",
            ],
            "removed by an action before",
        ),
        (
            [
                "bitmap-remove,node=disk,name=b",
                "bitmap-merge,node=disk,name=a,sources=b",
            ],
            "removed by an action before",
        ),
        (
            [&first, "bitmap-merge,node=disk,name=a,sources=b"],
            "bitmap 'b'",
        ),
    ] {
        let (_, message) = daemon.ctl_error(&[&["transaction"][..], &actions].concat());
        assert!(message.contains(why), "{actions:?}: {message}");
        assert_eq!(daemon.ctl(&["tree"]), before, "{actions:?}");
    }
    assert_eq!(bitmap(&daemon, "b")["Count"], 65536);
    // In whatever order they are added.
    let added = ["bitmap-add,node=disk,name=x", "bitmap-add,node=disk,name=y"];
    let merge = "bitmap-merge,node=disk,name=y,sources=x+b";
    daemon.ctl(&[&["transaction"], &added[..], &[merge]].concat());
    assert_eq!(bitmap(&daemon, "y")["Count"], 65536);
    // A job has the bits of its bitmap: who merged it now would not get them.
    for at in [1, 4, 8] {
        assert_eq!(client.write(at << 20, &vec![7; 1 << 20]), 0);
    }
    let slow = format!("{first},speed=1");
    daemon.ctl(&["transaction", &slow]);
    let (_, message) = daemon.ctl_error(&["bitmap", "merge", "disk", "a", "b"]);
    assert!(message.contains("used by job 'j1'"), "{message}");
}

/// What is written compressed is written, to whoever records it.
#[test]
fn compressed_writes_are_recorded() {
    let (daemon, _) = start();
    let mut client = Client::connect(&daemon.socket("disk"), 1, 1, 1 << 20);
    assert_eq!(client.write(0, &vec![7; 1 << 20]), 0);
    let image = daemon.path("copy.qcow2");
    daemon.ctl(&["image", "create", text(&image), "16M"]);
    let filename = format!("file.filename={}", image.display());
    let add = ["node", "add", "copy", "driver=qcow2", "file.driver=file"];
    daemon.ctl(&[&add[..], &[&filename]].concat());
    daemon.ctl(&["bitmap", "add", "copy", "b"]);
    daemon.ctl(&[
        "transaction",
        "backup,node=disk,target=copy,job-id=j,compress=true",
    ]);
    wait_for("the backup", || {
        let jobs = daemon.ctl_json(&["job", "list"]);
        jobs.as_array().unwrap().is_empty().then_some(())
    });
    assert_eq!(bitmap(&daemon, "b")["Count"], 1 << 20);
}

/// Whatever a disk goes back to, an increment has all that is different.
#[test]
fn a_snapshot_that_is_applied_is_a_change() {
    let (daemon, _) = start();
    let mut client = Client::connect(&daemon.socket("disk"), 1, 1, 1 << 20);
    assert_eq!(client.write(0, &[1; 4096]), 0);
    daemon.ctl(&["snapshot", "create", "disk", "s"]);
    assert_eq!(client.write(0, &[2; 4096]), 0);
    daemon.ctl(&["bitmap", "add", "disk", "b"]);
    daemon.ctl(&["bitmap", "add", "disk", "off", "--disabled"]);
    daemon.ctl(&["snapshot", "apply", "disk", "s"]);
    assert_eq!(bitmap(&daemon, "b")["Count"], SIZE);
    assert_eq!(bitmap(&daemon, "off")["Count"], 0);
}
