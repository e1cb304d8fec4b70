//! Live snapshots: overlays that take the place of nodes while clients write.

use std::path::{Path, PathBuf};

use vdisk_qemu_tests::Daemon;
use vdisk_qemu_tests::blk_client::Client;
use vdisk_qemu_tests::qemu_tools::{assert_sound, read_with_qemu, text, tool};
use vdisk_qemu_tests::workload::{Sequence, Writer, assert_same, change, compare};

const MIB: u64 = 1 << 20;
const SIZE: u64 = 16 * MIB;

fn add(daemon: &Daemon, id: &str, driver: &str, image: &Path) {
    let driver = format!("driver={driver}");
    let filename = format!("file.filename={}", image.display());
    daemon.ctl(&["node", "add", id, &driver, "file.driver=file", &filename]);
    daemon.export_node(id, id, &[]);
}

/// Every overlay is a cut through time: what was answered before is below, and nothing that came after.
#[test]
fn each_snapshot_is_one_moment() {
    let daemon = Daemon::start(&["--io-threads", "2"]);
    let base = daemon.path("base.qcow2");
    daemon.ctl(&["image", "create", text(&base), "16M"]);
    add(&daemon, "disk", "qcow2", &base);
    let mut images: Vec<PathBuf> = vec![base];
    let mut moments = Vec::new();
    let sequence = Sequence::new(SIZE);
    std::thread::scope(|s| {
        let writer = Writer::start(s, &sequence, &daemon.socket("disk"));
        let mut top = "disk".to_owned();
        for i in 1..=5 {
            sequence.wait_for_more(200);
            let (name, image) = (format!("over{i}"), daemon.path(&format!("over{i}.qcow2")));
            let before = sequence.written();
            let report = daemon.ctl_json(&["snapshot", "overlay", &top, &name, text(&image)]);
            moments.push((before, sequence.written()));
            assert!(report["paused-ns"].as_u64() > Some(0), "{report}");
            let export = daemon.ctl_json(&["export", "show", "disk"]);
            assert!(export["Node"].to_string().contains(&name), "{export}");
            assert_eq!(export["Path"], "fast");
            let below = daemon.ctl_json(&["node", "show", &top]);
            assert_eq!(below["ReadOnly"], true, "{below}");
            images.push(image);
            top = name;
        }
        sequence.wait_for_more(200);
        writer.end();
    });
    daemon.ctl(&["export", "remove", "disk"]);
    for i in (1..=5).rev() {
        daemon.ctl(&["node", "remove", &format!("over{i}")]);
    }
    daemon.ctl(&["node", "remove", "disk"]);
    let written = sequence.written();
    for (i, image) in images.iter().enumerate() {
        assert_sound(image);
        let last = sequence.last_write(&read_with_qemu(image), text(image));
        match moments.get(i) {
            // One more may have been written than was counted.
            Some((before, after)) => {
                assert!((*before..=after + 1).contains(&last), "{last}: {moments:?}")
            }
            None => assert_eq!(last, written),
        }
    }
}

/// Writes that were answered and not flushed are there when the daemon was killed, even if the image is only read then.
#[test]
fn a_killed_daemons_writes_are_in_a_backing_file() {
    let mut daemon = Daemon::start(&[]);
    let base = daemon.path("base.qcow2");
    daemon.ctl(&["image", "create", text(&base), "16M"]);
    add(&daemon, "disk", "qcow2", &base);
    let mut model = vec![0; SIZE as usize];
    let mut client = Client::connect(&daemon.socket("disk"), 1, 1, 1 << 20);
    change(&mut client, &mut model, 1, 40);
    daemon.kill();
    drop(client);
    daemon.start_again();
    let over = daemon.path("over.qcow2");
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
            text(&over),
        ],
    );
    let over = format!("file.filename={}", text(&over));
    let below = format!("backing.file.filename={}", text(&base));
    let mut args = vec![
        "node",
        "add",
        "top",
        "driver=qcow2",
        "file.driver=file",
        &over,
    ];
    args.extend(["backing.driver=qcow2", "backing.read-only=on"]);
    args.extend([
        "backing.file.driver=file",
        "backing.file.read-only=on",
        &below,
    ]);
    daemon.ctl(&args);
    daemon.export_node("top", "top", &[]);
    compare(&daemon, "top", &model);
    daemon.ctl(&["export", "remove", "top"]);
    daemon.ctl(&["node", "remove", "top"]);
    assert_sound(&base);
    assert_same(&read_with_qemu(&base), &model, 0, "base");
}

#[test]
fn overlays_over_all_kinds_of_nodes() {
    let daemon = Daemon::start(&[]);
    for (i, driver) in ["raw", "qcow2"].into_iter().enumerate() {
        let base = daemon.path(&format!("{driver}.base"));
        tool(
            "qemu-img",
            &["create", "-q", "-f", driver, text(&base), "16M"],
        );
        add(&daemon, driver, driver, &base);
        let mut client = Client::connect(&daemon.socket(driver), 1, 1, 1 << 20);
        let mut model = vec![0; SIZE as usize];
        change(&mut client, &mut model, i as u64 + 1, 100);
        let before = model.clone();
        let image = daemon.path(&format!("{driver}.over"));
        let name = format!("{driver}-over");
        daemon.ctl(&[
            "snapshot",
            "overlay",
            driver,
            &name,
            text(&image),
            "discard=unmap",
        ]);
        // The same connection goes on.
        change(&mut client, &mut model, i as u64 + 5, 100);
        drop(client);
        compare(&daemon, driver, &model);
        daemon.ctl(&["node", "resize", &name, "+1M"]);
        model.resize(model.len() + MIB as usize, 0);
        daemon.ctl(&["export", "remove", driver]);
        daemon.ctl(&["node", "remove", &name]);
        // What is below can be used by others, and is what it was.
        daemon.ctl(&["node", "remove", driver]);
        assert_same(&read_with_qemu(&image), &model, 0, driver);
        let raw = daemon.path("raw");
        tool(
            "qemu-img",
            &[
                "convert",
                "-f",
                driver,
                "-O",
                "raw",
                text(&base),
                text(&raw),
            ],
        );
        assert_same(&std::fs::read(raw).unwrap(), &before, 0, driver);
    }
}

#[test]
fn what_is_refused_changes_nothing() {
    let daemon = Daemon::start(&[]);
    let base = daemon.path("base.qcow2");
    daemon.ctl(&["image", "create", text(&base), "16M"]);
    add(&daemon, "disk", "qcow2", &base);
    let small = daemon.path("small.qcow2");
    daemon.ctl(&["image", "create", text(&small), "8M"]);
    let other = daemon.path("other.img");
    std::fs::write(&other, vec![0; SIZE as usize]).unwrap();
    daemon.ctl(&[
        "node",
        "add",
        "ro",
        "driver=file",
        "read-only=on",
        &format!("filename={}", other.display()),
    ]);
    let new = daemon.path("new.qcow2");
    let nodes = || daemon.ctl_json(&["node", "list"]);
    let before = nodes();
    for (args, messages) in [
        (
            &["disk", "over", text(&small), "--existing"][..],
            &["'over'", "'disk'", "8388608"][..],
        ),
        (
            &["disk", "over", text(&base), "--existing"],
            &["base.qcow2"],
        ),
        (&["disk", "disk", text(&new)], &["'disk'", "already"]),
        (
            &["disk", "over", text(&new), "backing=ro"],
            &["'backing'", "leave it out"],
        ),
        (
            &["disk", "over", text(&new), "read-only=on"],
            &["read-only"],
        ),
        (&["disk", "over", text(&new), "driver=raw"], &["qcow2"]),
        (&["ro", "over", text(&new)], &["'ro'", "read-only"]),
        (&["nothing", "over", text(&new)], &["nothing"]),
        (&["disk", "over", "/nonexistent/x"], &["/nonexistent/x"]),
    ] {
        let (_, e) = daemon.ctl_error(&[&["snapshot", "overlay"], args].concat());
        for message in messages {
            assert!(e.contains(message), "{args:?}: {e}");
        }
        assert_eq!(nodes(), before, "{args:?}");
        assert!(!new.exists(), "{args:?}");
    }
    // A node that another one stands on.
    daemon.ctl(&[
        "node",
        "add",
        "low",
        "driver=file",
        &format!("filename={}", other.display()),
        "locking=off",
    ]);
    daemon.ctl(&["node", "add", "high", "driver=raw", "file=low"]);
    let (_, e) = daemon.ctl_error(&["snapshot", "overlay", "low", "over", text(&new)]);
    assert!(e.contains("'low'") && e.contains("'high'"), "{e}");
    // And the disk goes on as if nothing had been.
    let mut client = Client::connect(&daemon.socket("disk"), 1, 1, 1 << 20);
    assert_eq!(client.write(0, &[1; 512]), 0);
    assert_eq!(client.flush(), 0);
}
