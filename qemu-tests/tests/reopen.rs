//! Nodes that are changed, replaced and watched while clients use them.

use std::process::Stdio;

use vdisk_qemu_tests::blk_client::Client;
use vdisk_qemu_tests::qemu_tools::{assert_sound, read_with_qemu, text, tool};
use vdisk_qemu_tests::workload::{Sequence, Writer, assert_same, change, compare};
use vdisk_qemu_tests::{Daemon, vdiskctl_binary};

const MIB: u64 = 1 << 20;
const SIZE: u64 = 16 * MIB;

fn taken(daemon: &Daemon, name: &str) -> u64 {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata(daemon.path(name)).unwrap().blocks() * 512
}

/// Options change under a client, from the next request on, and a restart keeps them.
#[test]
fn options_change_under_a_client() {
    let mut daemon = Daemon::managed(&[]);
    let (_, socket) = daemon.export("d", SIZE, &[], &[]);
    let mut client = Client::connect(&socket, 1, 1, 1 << 20);
    assert_eq!(client.write(0, &vec![1; 1 << 20]), 0);
    assert_eq!(client.write(MIB, &vec![1; 1 << 20]), 0);
    let full = taken(&daemon, "d.img");
    // Discards are ignored, and zeroes are data.
    assert_eq!(client.discard(0, MIB), 0);
    assert_eq!(client.write(0, &vec![0; 1 << 20]), 0);
    assert_eq!(taken(&daemon, "d.img"), full);
    let path = |d: &Daemon| d.ctl_json(&["export", "show", "d"])["Path"].clone();
    assert_eq!(path(&daemon), "fast");
    daemon.ctl(&["node", "set", "d", "discard=unmap", "detect-zeroes=unmap"]);
    assert_eq!(path(&daemon), "slow");
    assert_eq!(client.write(0, &vec![0; 1 << 20]), 0);
    assert_eq!(taken(&daemon, "d.img"), full - MIB);
    daemon.kill();
    daemon.go_on();
    let node = daemon.ctl_json(&["node", "show", "d"]);
    assert_eq!(
        (&node["DiscardMode"], &node["DetectZeroes"]),
        (&"unmap".into(), &"unmap".into())
    );
    daemon.ctl(&["node", "set", "d", "detect-zeroes=off"]);
    assert_eq!(path(&daemon), "fast");
    assert_eq!(client.discard(MIB, MIB), 0);
    assert_eq!(taken(&daemon, "d.img"), full - 2 * MIB);
    let refused = |args: &[&str], code: i32, why: &str| {
        let (got, error) = daemon.ctl_error(&[&["node", "set", "d"], args].concat());
        assert!(got == code && error.contains(why), "{got} {error}");
    };
    refused(&["read-only=on"], 4, "export 'd'");
    refused(
        &["discard=ignore", "detect-zeroes=unmap"],
        2,
        "discard=unmap",
    );
    refused(&["cache.indirect=on"], 2, "'indirect'");
    refused(
        &["cache.direct=on", "discard=unmap"],
        2,
        "one after the other",
    );
    refused(&["driver=qcow2"], 2, "'driver' cannot be changed");
    refused(&["file=e"], 2, "node 'd': option 'file'");
    refused(&["discard=maybe"], 2, "maybe");
    let node = daemon.ctl_json(&["node", "show", "d"]);
    assert_eq!(
        (&node["DiscardMode"], &node["DetectZeroes"]),
        (&"unmap".into(), &"off".into())
    );
}

/// A node that nobody writes to becomes read-only, so that QEMU can read its image, and can be written again.
#[test]
fn nodes_become_read_only_and_back() {
    let daemon = Daemon::start(&[]);
    let image = daemon.path("d.qcow2");
    daemon.ctl(&["image", "create", text(&image), "16M"]);
    let filename = format!("file.filename={}", text(&image));
    daemon.ctl(&[
        "node",
        "add",
        "d",
        "driver=qcow2",
        "file.driver=file",
        &filename,
    ]);
    daemon.export_node("d", "d", &[]);
    let mut model = vec![0; SIZE as usize];
    let mut client = Client::connect(&daemon.socket("d"), 1, 1, 1 << 20);
    change(&mut client, &mut model, 1, 40);
    drop(client);
    daemon.ctl(&["export", "remove", "d"]);
    daemon.ctl(&["node", "set", "d", "read-only=on"]);
    assert_sound(&image);
    assert_same(&read_with_qemu(&image), &model, 0, "image");
    let socket = daemon.socket("d");
    let export = [
        "export",
        "add",
        "d",
        "--node",
        "d",
        "--socket",
        text(&socket),
        "--writable",
    ];
    assert_eq!(daemon.ctl_error(&export).0, 2);
    daemon.ctl(&["node", "set", "d", "read-only=off"]);
    daemon.ctl(&export);
    let mut client = Client::connect(&socket, 1, 1, 1 << 20);
    change(&mut client, &mut model, 2, 40);
    drop(client);
    compare(&daemon, "d", &model);
}

/// A copy takes its original's place under a client that writes, after a mirror has made it one.
#[test]
fn a_node_takes_anothers_place() {
    let daemon = Daemon::start(&["--io-threads", "2"]);
    let (image, socket) = daemon.export("d", SIZE, &[], &[]);
    let mut model = vec![0; SIZE as usize];
    let mut client = Client::connect(&socket, 1, 1, 1 << 20);
    change(&mut client, &mut model, 1, 60);
    let copy = daemon.path("copy.qcow2");
    daemon.ctl(&["image", "create", text(&copy), "16M"]);
    drop(client);
    // QEMU is kept out of what is written here.
    let still = daemon.path("still.img");
    std::fs::copy(&image, &still).unwrap();
    let convert = [
        "convert",
        "-n",
        "-f",
        "raw",
        "-O",
        "qcow2",
        text(&still),
        text(&copy),
    ];
    tool("qemu-img", &convert);
    let filename = format!("file.filename={}", text(&copy));
    daemon.ctl(&[
        "node",
        "add",
        "copy",
        "driver=qcow2",
        "file.driver=file",
        &filename,
    ]);
    let mut client = Client::connect(&socket, 1, 1, 1 << 20);
    let report = daemon.ctl_json(&["node", "replace", "d", "copy"]);
    assert!(report["paused-ns"].as_u64() > Some(0), "{report}");
    change(&mut client, &mut model, 2, 60);
    drop(client);
    compare(&daemon, "d", &model);
    daemon.ctl(&["node", "remove", "d"]);
    let small = daemon.image("small", MIB);
    let small = format!("filename={}", small.display());
    daemon.ctl(&["node", "add", "small", "driver=file", &small]);
    let refused = |with: &str, code: i32, why: &str| {
        let (got, error) = daemon.ctl_error(&["node", "replace", "copy", with]);
        assert!(got == code && error.contains(why), "{got} {error}");
    };
    refused("small", 2, "same size");
    refused("copy", 2, "same");
    refused("nothing", 3, "nothing");
    let same = daemon.image("same", SIZE);
    let same = format!("filename={}", same.display());
    daemon.ctl(&["node", "add", "same", "driver=file", "read-only=on", &same]);
    refused("same", 2, "read-only");
    daemon.ctl(&["export", "remove", "d"]);
    daemon.ctl(&["node", "remove", "copy"]);
    assert_sound(&copy);
    assert_same(&read_with_qemu(&copy), &model, 0, "copy");
}

/// Whoever waits is told of the first write beyond a threshold, also of an image's file that grows below it.
#[test]
fn thresholds_are_told_once() {
    let mut daemon = Daemon::managed(&["--io-threads", "2"]);
    let image = daemon.path("d.qcow2");
    daemon.ctl(&["image", "create", text(&image), "16M"]);
    let filename = format!("filename={}", text(&image));
    daemon.ctl(&["node", "add", "file", "driver=file", &filename]);
    daemon.ctl(&["node", "add", "d", "driver=qcow2", "file=file"]);
    daemon.export_node("d", "d", &[]);
    let address = daemon.bus_address().to_owned();
    let wait = |node: &str, offset: &str| {
        std::process::Command::new(vdiskctl_binary())
            .args([
                "--bus-address",
                &address,
                "--json",
                "node",
                "threshold",
                node,
                offset,
                "--wait",
            ])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap()
    };
    let threshold = |daemon: &Daemon, node: &str| {
        daemon.ctl_json(&["node", "show", node])["WriteThreshold"]
            .as_u64()
            .unwrap()
    };
    let told = wait("file", "6M");
    vdisk_qemu_tests::wait_for("the threshold", || {
        (threshold(&daemon, "file") == 6 * MIB).then_some(())
    });
    // Allocated one after the other, whatever the order on the disk.
    let sequence = Sequence::new(SIZE);
    std::thread::scope(|s| {
        let writer = Writer::start(s, &sequence, &daemon.socket("d"));
        let out = told.wait_with_output().unwrap();
        let said: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
        assert_eq!(said["threshold"], 6 * MIB, "{said}");
        assert!(said["amount"].as_u64() > Some(0), "{said}");
        assert!(std::fs::metadata(&image).unwrap().len() > 6 * MIB);
        writer.end();
    });
    assert_eq!(threshold(&daemon, "file"), 0);
    // On the disk itself, and over a restart; requests elsewhere stay fast.
    daemon.ctl(&["node", "threshold", "d", "8M"]);
    daemon.kill();
    daemon.go_on();
    assert_eq!(threshold(&daemon, "d"), 8 * MIB);
    assert_eq!(daemon.ctl_json(&["export", "show", "d"])["Path"], "fast");
    let mut client = Client::connect(&daemon.socket("d"), 1, 1, 1 << 20);
    assert_eq!(client.write(8 * MIB - 4096, &[1; 4096]), 0);
    assert_eq!(threshold(&daemon, "d"), 8 * MIB);
    assert_eq!(client.write(8 * MIB - 4096, &[1; 8192]), 0);
    vdisk_qemu_tests::wait_for("the threshold to go", || {
        (threshold(&daemon, "d") == 0).then_some(())
    });
    daemon.ctl(&["node", "threshold", "d", "9M"]);
    daemon.ctl(&["node", "threshold", "d", "0"]);
    assert_eq!(threshold(&daemon, "d"), 0);
}

/// Whether the daemon has a file open with O_DIRECT.
fn is_direct(daemon: &Daemon, image: &std::path::Path) -> bool {
    const O_DIRECT: u32 = 0o40000;
    let proc = std::path::PathBuf::from(format!("/proc/{}", daemon.pid()));
    let fds = std::fs::read_dir(proc.join("fd")).unwrap();
    let mut flags = fds.filter_map(|fd| {
        let fd = fd.ok()?;
        (std::fs::read_link(fd.path()).ok()? == image).then_some(())?;
        let info = std::fs::read_to_string(proc.join("fdinfo").join(fd.file_name())).ok()?;
        let flags = info.lines().find_map(|l| l.strip_prefix("flags:"))?;
        u32::from_str_radix(flags.trim(), 8).ok()
    });
    flags.next().expect("it is open") & O_DIRECT != 0
}

/// Any option can change: the images are closed and opened again under a client that only waits, or stay as they are.
#[test]
fn images_are_opened_again_under_a_client() {
    let mut daemon = Daemon::managed(&["--io-threads", "2"]);
    let (base, image) = (daemon.path("base.qcow2"), daemon.path("top.qcow2"));
    tool(
        "qemu-img",
        &["create", "-q", "-f", "qcow2", text(&base), "16M"],
    );
    let args = ["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b"];
    tool(
        "qemu-img",
        &[&args[..], &[text(&base), text(&image)]].concat(),
    );
    let filename = format!("file.filename={}", text(&base));
    let below = [
        "node",
        "add",
        "base",
        "driver=qcow2",
        "read-only=on",
        "file.driver=file",
        &filename,
    ];
    daemon.ctl(&below);
    let filename = format!("file.filename={}", text(&image));
    daemon.ctl(&[
        "node",
        "add",
        "d",
        "driver=qcow2",
        "backing=base",
        "file.driver=file",
        &filename,
    ]);
    daemon.ctl(&["throttle", "set", "group", "iops-total=100000"]);
    daemon.export_node("d", "d", &[]);
    daemon.ctl(&["bitmap", "add", "d", "dirty", "--granularity", "64K"]);
    let dirty = |daemon: &Daemon| daemon.ctl_json(&["bitmap", "list"])[0]["Count"].as_u64();
    let refused = |daemon: &Daemon, args: &[&str], why: &str| {
        let (_, error) = daemon.ctl_error(&[&["node", "set", "d"], args].concat());
        assert!(error.contains(why), "{args:?}: {error}");
    };
    let sequence = Sequence::new(SIZE);
    std::thread::scope(|s| {
        let writer = Writer::start(s, &sequence, &daemon.socket("d"));
        for round in 0..6 {
            sequence.wait_for_more(200);
            let direct = round % 2 == 0;
            let word = ["cache.direct=off", "cache.direct=on"][usize::from(direct)];
            let before = dirty(&daemon);
            daemon.ctl(&["node", "set", "d", word, "l2-cache-size=64K"]);
            assert!(before > Some(0) && dirty(&daemon) >= before);
            assert_eq!(is_direct(&daemon, &image), direct);
            // What it stands on was not made for it.
            assert!(!is_direct(&daemon, &base));
            assert_eq!(daemon.ctl_json(&["export", "show", "d"])["Path"], "fast");
            // It cannot be opened so, and is opened as it was.
            refused(&daemon, &["file.read-only=on"], "read-only");
            assert_eq!(is_direct(&daemon, &image), direct);
            sequence.wait_for_more(10);
        }
        daemon.ctl(&["node", "set", "d", "backing.cache.direct=on"]);
        assert!(is_direct(&daemon, &base));
        assert!(!is_direct(&daemon, &image));
        refused(&daemon, &["backing=x"], "Replace");
        refused(&daemon, &["l2-cache-size=x"], "l2-cache-size");
        refused(&daemon, &["file.filename=/nowhere"], "another one");
        refused(&daemon, &["file.driver=null-co"], "'driver'");
        refused(
            &daemon,
            &["encrypt.format=luks", "encrypt.key-secret=x"],
            "not encrypted",
        );
        refused(&daemon, &["data-file=x"], "Replace");
        sequence.wait_for_more(10);
        let copy = daemon.path("copy");
        daemon.ctl(&["mirror", "d", text(&copy), "--detach", "job-id=job"]);
        refused(&daemon, &["cache.direct=on"], "'job'");
        daemon.ctl(&["job", "cancel", "job"]);
        vdisk_qemu_tests::wait_for("the job to be gone", || {
            let jobs = daemon.ctl_json(&["job", "list"]);
            jobs.as_array().unwrap().is_empty().then_some(())
        });
        writer.end();
    });
    daemon.ctl(&["node", "set", "d", "cache.direct=on"]);
    daemon.kill();
    daemon.go_on();
    assert!(is_direct(&daemon, &image) && is_direct(&daemon, &base));
    daemon.ctl(&["export", "remove", "d"]);
    daemon.ctl(&["node", "remove", "d"]);
    assert_sound(&image);
    assert_eq!(
        sequence.last_write(&read_with_qemu(&image), "d"),
        sequence.written()
    );
}
