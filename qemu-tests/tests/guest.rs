//! Real guests on real disks.

use serde_json::{Value, json};
use vdisk_qemu_tests::qemu_tools::{text, tool};
use vdisk_qemu_tests::{Daemon, Guest, GuestOptions};

const MIB: u64 = 1 << 20;

fn write(disk: &str, offset: u64, len: u64, generation: u64) -> Value {
    json!({"cmd": "write", "disk": disk, "offset": offset, "len": len,
           "generation": generation, "threads": 4})
}

fn verify(disk: &str, offset: u64, len: u64, generation: u64) -> Value {
    json!({"cmd": "verify", "disk": disk, "offset": offset, "len": len, "generation": generation})
}

fn flush(disk: &str) -> Value {
    json!({"cmd": "flush", "disk": disk})
}

/// What the pattern of the guest looks like from the host: the first 16 bytes of a block.
fn claims(image: &std::path::Path, at: u64) -> (u64, u64) {
    use std::os::unix::fs::FileExt;
    let mut bytes = [0; 16];
    let file = std::fs::File::open(image).unwrap();
    file.read_exact_at(&mut bytes, at).unwrap();
    let (a, b) = bytes.split_at(8);
    (
        u64::from_le_bytes(a.try_into().unwrap()),
        u64::from_le_bytes(b.try_into().unwrap()),
    )
}

/// Bytes of storage that a file occupies.
fn allocated(image: &std::path::Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata(image).unwrap().blocks() * 512
}

fn boot_and_verify(engine: &str, direct: bool) {
    let daemon = Daemon::start(&["--io-engine", engine]);
    let cache = if direct {
        "cache.direct=on"
    } else {
        "cache.direct=off"
    };
    let (image, socket) = daemon.export("d0", 64 * MIB, &[cache], &[]);
    let mut guest = Guest::boot(GuestOptions::new().disk(&socket, 1));
    guest.run(write("vda", 0, 8 * MIB, 3));
    guest.run(flush("vda"));
    guest.run(verify("vda", 0, 8 * MIB, 3));
    assert_eq!(claims(&image, 4096), (4096, 3));
    guest.assert_no_errors();
    guest.shut_down();
}

#[test]
fn boot_and_verify_on_uring() {
    boot_and_verify("uring", false);
}

#[test]
fn boot_and_verify_on_uring_with_o_direct() {
    boot_and_verify("uring", true);
}

#[test]
fn boot_and_verify_on_aio_with_o_direct() {
    boot_and_verify("aio", true);
}

#[test]
fn boot_and_verify_on_threads() {
    boot_and_verify("threads", false);
}

#[test]
fn four_queues_on_two_iothreads() {
    let daemon = Daemon::start(&["--io-threads", "2"]);
    let (_, socket) = daemon.export("d0", 64 * MIB, &[], &["--queues", "4", "--pin", "3=io0"]);
    let queues = &daemon.ctl_json(&["export", "show", "d0"])["IoThreads"];
    let io = |n| json!(format!("/org/vdisk1/iothread/io{n}"));
    assert_eq!(*queues, json!([io(0), io(1), io(0), io(0)]));
    let mut guest = Guest::boot(GuestOptions::new().cpus(4).disk(&socket, 4));
    assert_eq!(guest.run(json!({"cmd": "disks"}))["vda"]["queues"], 4);
    guest.run(write("vda", 0, 16 * MIB, 1));
    guest.run(verify("vda", 0, 16 * MIB, 1));
    let stats = daemon.ctl_json(&["stats"]);
    let per_queue = stats["exports"]["d0"]["queues"].as_array().unwrap().clone();
    let busy = per_queue.iter().filter(|q| q["requests"] != 0).count();
    assert!(busy >= 2, "{per_queue:?}");
    for thread in ["io0", "io1"] {
        assert_ne!(stats["iothreads"][thread]["operations"], 0);
    }
    guest.assert_no_errors();
    guest.shut_down();
}

#[test]
fn a_file_system_is_whole_when_seen_from_the_host() {
    let daemon = Daemon::start(&[]);
    let (image, socket) = daemon.export("d0", 128 * MIB, &["discard=unmap"], &[]);
    let mut guest = Guest::boot(GuestOptions::new().disk(&socket, 1));
    guest.run(json!({"cmd": "fs-write", "disk": "vda", "len": 3 * MIB}));
    guest.assert_no_errors();
    guest.shut_down();
    daemon.ctl(&["export", "remove", "d0"]);
    daemon.ctl(&["node", "remove", "d0"]);
    let host = |program: &str, args: &[&str]| {
        let out = std::process::Command::new(program).args(args).output();
        let out = out.expect("e2fsprogs is installed: run 'make setup'");
        assert!(out.status.success(), "{program}: {out:?}");
        out.stdout
    };
    let image = image.to_str().unwrap();
    host("/sbin/e2fsck", &["-f", "-n", image]);
    let got = host("/sbin/debugfs", &["-R", "cat /file", image]);
    assert_eq!(got.len() as u64, 3 * MIB);
    assert_eq!(got[..16], [7, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn discards_and_zero_writes_reach_the_host() {
    let daemon = Daemon::start(&[]);
    let (image, socket) = daemon.export("d0", 64 * MIB, &["discard=unmap"], &[]);
    let mut guest = Guest::boot(GuestOptions::new().disk(&socket, 1));
    guest.run(write("vda", 0, 16 * MIB, 1));
    guest.run(flush("vda"));
    let full = allocated(&image);
    assert!(full >= 16 * MIB);
    guest.run(json!({"cmd": "discard", "disk": "vda", "offset": 0, "len": 4 * MIB}));
    let discarded = allocated(&image);
    assert!(discarded <= full - 4 * MIB, "{discarded} of {full}");
    // Zeroes that may not be unmapped keep their blocks.
    guest.run(json!({"cmd": "zero", "disk": "vda", "offset": 4 * MIB, "len": 4 * MIB}));
    assert!(allocated(&image) >= discarded);
    let zero = json!({"cmd": "is-zero", "disk": "vda", "offset": 0, "len": 8 * MIB});
    assert_eq!(guest.run(zero)["zero"], true);
    guest.run(verify("vda", 8 * MIB, 8 * MIB, 1));
    // Zeroes that may be unmapped give them back.
    let unmap =
        json!({"cmd": "zero", "disk": "vda", "offset": 8 * MIB, "len": 4 * MIB, "unmap": true});
    guest.run(unmap);
    assert!(allocated(&image) <= discarded - 4 * MIB);
    guest.run(verify("vda", 12 * MIB, 4 * MIB, 1));
    let stats = daemon.ctl_json(&["stats"]);
    let d0 = &stats["exports"]["d0"];
    assert!(d0["discard"]["requests"].as_u64() > Some(0), "{d0}");
    assert!(d0["write-zeroes"]["requests"].as_u64() > Some(0), "{d0}");
    guest.assert_no_errors();
    guest.shut_down();
}

#[test]
fn the_guest_sees_serial_sizes_and_block_sizes() {
    let daemon = Daemon::start(&[]);
    let options = [
        "--serial",
        "disk-of-the-test",
        "logical-block-size=4096",
        "queue-size=64",
    ];
    let (_, a) = daemon.export("a", 48 * MIB, &[], &options);
    let (_, b) = daemon.export("b", 32 * MIB, &[], &["physical-block-size=4096"]);
    let mut guest = Guest::boot(GuestOptions::new().disk(&a, 1).disk(&b, 1));
    let disks = guest.run(json!({"cmd": "disks"}));
    assert_eq!(disks["vda"]["serial"], "disk-of-the-test");
    assert_eq!(disks["vda"]["size"], 48 * MIB);
    assert_eq!(
        (&disks["vda"]["logical"], &disks["vda"]["physical"]),
        (&json!(4096), &json!(4096))
    );
    assert_eq!(disks["vda"]["segments"], 62);
    assert_eq!(disks["vda"]["cache"], "write back");
    assert_eq!(
        (&disks["vdb"]["logical"], &disks["vdb"]["physical"]),
        (&json!(512), &json!(4096))
    );
    assert_eq!(disks["vdb"]["segments"], 126);
    guest.run(write("vda", 0, 4 * MIB, 1));
    guest.run(verify("vda", 0, 4 * MIB, 1));
    guest.assert_no_errors();
    guest.shut_down();
}

#[test]
fn a_read_only_export_cannot_be_written() {
    let daemon = Daemon::start(&[]);
    let image = daemon.image("d0.img", 16 * MIB);
    std::fs::write(&image, vec![0x5a; 16 << 20]).unwrap();
    daemon.export_file("d0", &image, &["read-only=on"], &["read-only"]);
    let socket = daemon.socket("d0");
    let mut guest = Guest::boot(GuestOptions::new().disk(&socket, 1));
    assert_eq!(guest.run(json!({"cmd": "disks"}))["vda"]["ro"], true);
    let zero = json!({"cmd": "is-zero", "disk": "vda", "offset": 0, "len": MIB});
    assert_eq!(guest.run(zero)["zero"], false);
    assert!(guest.try_run(write("vda", 0, MIB, 1)).is_err());
    guest.shut_down();
    assert!(std::fs::read(&image).unwrap().iter().all(|b| *b == 0x5a));
}

#[test]
fn the_guest_notices_a_resize() {
    let daemon = Daemon::start(&[]);
    let (image, socket) = daemon.export("d0", 16 * MIB, &[], &[]);
    let mut guest = Guest::boot(GuestOptions::new().disk(&socket, 1));
    guest.run(write("vda", 0, 16 * MIB, 1));
    daemon.ctl(&["node", "resize", "d0", "+16M"]);
    guest.run(json!({"cmd": "wait-size", "disk": "vda", "size": 32 * MIB}));
    guest.run(write("vda", 16 * MIB, 16 * MIB, 2));
    guest.run(verify("vda", 0, 16 * MIB, 1));
    guest.run(verify("vda", 16 * MIB, 16 * MIB, 2));
    assert_eq!(std::fs::metadata(&image).unwrap().len(), 32 * MIB);
    guest.assert_no_errors();
    guest.shut_down();
}

#[test]
fn disks_are_plugged_and_unplugged() {
    let daemon = Daemon::start(&[]);
    let (_, socket) = daemon.export("d0", 16 * MIB, &[], &[]);
    let mut guest = Guest::boot(GuestOptions::new());
    for round in 1..=3 {
        let address = json!({"type": "unix", "data": {"path": socket}});
        guest.qmp.run(
            "chardev-add",
            json!({"id": "hot", "backend": {"type": "socket",
                   "data": {"addr": address, "server": false, "reconnect": 1}}}),
        );
        guest.qmp.run(
            "device_add",
            json!({"driver": "vhost-user-blk-pci", "id": "hot-disk", "chardev": "hot",
                   "bus": "slot0", "num-queues": 1}),
        );
        guest.run(json!({"cmd": "wait-disk", "disk": "vda", "present": true}));
        if round > 1 {
            guest.run(verify("vda", 0, 4 * MIB, round - 1));
        }
        guest.run(write("vda", 0, 4 * MIB, round));
        guest.qmp.run("device_del", json!({"id": "hot-disk"}));
        guest.run(json!({"cmd": "wait-disk", "disk": "vda", "present": false}));
        loop {
            let event = guest.qmp.wait_event("DEVICE_DELETED");
            if event["data"]["device"] == "hot-disk" {
                break;
            }
        }
        guest.qmp.run("chardev-remove", json!({"id": "hot"}));
    }
    guest.assert_no_errors();
    guest.shut_down();
}

#[test]
fn data_outlives_a_guest_reboot() {
    let daemon = Daemon::start(&[]);
    let (_, socket) = daemon.export("d0", 16 * MIB, &[], &[]);
    let mut guest = Guest::boot(GuestOptions::new().disk(&socket, 1).reboots());
    guest.run(write("vda", 0, 8 * MIB, 1));
    guest.run(flush("vda"));
    guest.send(json!({"cmd": "reboot"}));
    guest.wait_ready();
    guest.run(verify("vda", 0, 8 * MIB, 1));
    guest.assert_no_errors();
    guest.shut_down();
}

#[test]
fn a_killed_qemu_is_followed_by_another_on_the_same_socket() {
    let daemon = Daemon::start(&[]);
    let (_, socket) = daemon.export("d0", 16 * MIB, &[], &[]);
    let mut guest = Guest::boot(GuestOptions::new().disk(&socket, 1));
    guest.run(write("vda", 0, 8 * MIB, 1));
    guest.run(flush("vda"));
    guest.run(json!({"cmd": "load-start", "disk": "vda", "offset": 8 * MIB, "len": 8 * MIB, "threads": 4}));
    guest.wait_load(50);
    guest.kill();
    let mut guest = Guest::boot(GuestOptions::new().disk(&socket, 1));
    guest.run(verify("vda", 0, 8 * MIB, 1));
    guest.run(write("vda", 8 * MIB, 8 * MIB, 2));
    guest.assert_no_errors();
    guest.shut_down();
}

#[test]
fn two_guests_on_two_exports() {
    let daemon = Daemon::start(&[]);
    let (image_a, a) = daemon.export("a", 16 * MIB, &[], &[]);
    let (image_b, b) = daemon.export("b", 16 * MIB, &[], &[]);
    let mut first = Guest::boot(GuestOptions::new().disk(&a, 1));
    let mut second = Guest::boot(GuestOptions::new().disk(&b, 1));
    first.send(write("vda", 0, 8 * MIB, 1));
    second.run(write("vda", 0, 8 * MIB, 2));
    first.run(verify("vda", 0, 8 * MIB, 1));
    second.run(verify("vda", 0, 8 * MIB, 2));
    assert_eq!(claims(&image_a, MIB), (MIB, 1));
    assert_eq!(claims(&image_b, MIB), (MIB, 2));
    first.shut_down();
    second.run(verify("vda", 0, 8 * MIB, 2));
    second.shut_down();
}

#[test]
fn live_migration_with_a_busy_disk() {
    let daemon = Daemon::start(&[]);
    let (_, source) = daemon.export("d0", 64 * MIB, &[], &["share-rw=on"]);
    daemon.export_node("d1", "d0", &["share-rw=on"]);
    let target = daemon.socket("d1");
    let incoming = daemon.path("migration");
    let incoming = format!("unix:{}", incoming.display());
    let mut to = Guest::start(
        GuestOptions::new()
            .disk(&target, 2)
            .args(&["-incoming", &incoming]),
    );
    let mut from = Guest::boot(GuestOptions::new().disk(&source, 2));
    from.run(write("vda", 0, 8 * MIB, 1));
    from.run(json!({"cmd": "load-start", "disk": "vda", "offset": 8 * MIB, "len": 8 * MIB, "threads": 4}));
    from.wait_load(200);
    from.qmp.run(
        "migrate-set-capabilities",
        json!({"capabilities": [{"capability": "events", "state": true}]}),
    );
    from.qmp.run("migrate", json!({"uri": incoming}));
    to.qmp.wait_event("RESUME");
    to.wait_load(200);
    let result = to.run(json!({"cmd": "load-stop"}));
    assert!(result["verified"].as_u64() > Some(0), "{result}");
    to.run(verify("vda", 0, 8 * MIB, 1));
    to.assert_no_errors();
    let stats = daemon.ctl_json(&["stats"]);
    assert_ne!(stats["exports"]["d1"]["requests"], 0);
    to.shut_down();
}

/// The guest must see no error, and everything acknowledged must be there.
fn kill_and_restart(engine: &str, cache: &str) {
    let mut daemon = Daemon::start(&["--io-engine", engine]);
    let (image, socket) = daemon.export("d0", 64 * MIB, &[cache], &["--queues", "2"]);
    let mut guest = Guest::boot(GuestOptions::new().disk(&socket, 2));
    guest.run(write("vda", 0, 8 * MIB, 1));
    guest.run(json!({"cmd": "load-start", "disk": "vda", "offset": 8 * MIB, "len": 16 * MIB, "threads": 8}));
    for _ in 0..5 {
        guest.wait_load(300);
        daemon.kill();
        daemon.start_again();
        daemon.export_file("d0", &image, &[cache], &["--queues", "2"]);
    }
    guest.wait_load(300);
    let result = guest.run(json!({"cmd": "load-stop"}));
    assert!(result["verified"].as_u64() > Some(0), "{result}");
    guest.run(verify("vda", 0, 8 * MIB, 1));
    guest.assert_no_errors();
    guest.shut_down();
}

/// As above, of an image whose clusters are allocated meanwhile: what the guest was answered, flushed or not, is there.
#[test]
fn killed_under_load_with_a_qcow2_image() {
    killed_with_qcow2(None);
}

/// As above, of an overlay, whose copies on write are put off: what the guest has not written is as in the base.
#[test]
fn killed_under_load_with_an_overlay() {
    killed_with_qcow2(Some(0xbb));
}

/// With a byte that the image's backing file is full of, or without one.
fn killed_with_qcow2(base: Option<u8>) {
    let mut daemon = Daemon::start(&[]);
    let image = daemon.path("d0.qcow2");
    let path = image.to_str().expect("scratch paths are ASCII");
    let mut options = vec!["driver=qcow2".to_owned(), "file.driver=file".into()];
    options.push(format!("file.filename={path}"));
    if let Some(byte) = base {
        let below = daemon.path("base.raw");
        std::fs::write(&below, vec![byte; 64 << 20]).expect("the scratch folder is writable");
        let named = format!("backing-file={}", below.display());
        let create = ["image", "create", path, "64M", &named, "backing-fmt=raw"];
        daemon.ctl(&create);
        options.push("backing.driver=file".into());
        options.push("backing.read-only=on".into());
        options.push(format!("backing.filename={}", below.display()));
    } else {
        daemon.ctl(&["image", "create", path, "64M", "cluster-size=4k"]);
    }
    let options: Vec<&str> = options.iter().map(String::as_str).collect();
    let serve = |daemon: &Daemon| {
        daemon.ctl(&[&["node", "add", "d0"], &options[..]].concat());
        daemon.export_node("d0", "d0", &["--queues", "2"]);
    };
    serve(&daemon);
    let mut guest = Guest::boot(GuestOptions::new().disk(&daemon.socket("d0"), 2));
    guest.run(write("vda", 0, 8 * MIB, 1));
    guest.run(json!({"cmd": "load-start", "disk": "vda", "offset": 8 * MIB, "len": 48 * MIB, "threads": 8}));
    for _ in 0..5 {
        guest.wait_load(300);
        daemon.kill();
        daemon.start_again();
        serve(&daemon);
    }
    guest.wait_load(300);
    let result = guest.run(json!({"cmd": "load-stop"}));
    assert!(result["verified"].as_u64() > Some(0), "{result}");
    guest.run(verify("vda", 0, 8 * MIB, 1));
    guest.assert_no_errors();
    guest.shut_down();
    daemon.ctl(&["export", "remove", "d0"]);
    daemon.ctl(&["node", "check", "d0", "--repair", "leaks"]);
    daemon.ctl(&["node", "remove", "d0"]);
    daemon.ctl(&["image", "check", path]);
    if let Some(byte) = base {
        let raw = daemon.path("raw");
        tool("qemu-img", &["convert", "-O", "raw", path, text(&raw)]);
        let disk = std::fs::read(raw).expect("qemu-img has made it");
        let (mut old, mut new) = (0, 0);
        for (i, block) in disk.chunks(4096).enumerate() {
            let is_old = block.iter().all(|b| *b == byte);
            old += u32::from(is_old);
            new += u32::from(!is_old);
            // The guest's blocks say which they are.
            let is_whole = is_old || block.iter().filter(|b| **b == byte).count() < 1024;
            assert!(is_whole && block.iter().any(|b| *b != 0), "block {i}");
        }
        assert!(old > 2048 && new > 2048, "{old} old, {new} new blocks");
    }
}

/// Overlays come while a guest writes, syncs and verifies; one of the daemons on the way is killed.
#[test]
fn live_snapshots_under_load() {
    let mut daemon = Daemon::start(&["--io-threads", "2"]);
    let path = |daemon: &Daemon, i: u32| daemon.path(&format!("d{i}.qcow2")).display().to_string();
    let image = path(&daemon, 0);
    daemon.ctl(&["image", "create", &image, "64M"]);
    let filename = format!("file.filename={image}");
    daemon.ctl(&[
        "node",
        "add",
        "d0",
        "driver=qcow2",
        "file.driver=file",
        &filename,
    ]);
    daemon.export_node("disk", "d0", &["--queues", "2"]);
    let mut guest = Guest::boot(GuestOptions::new().disk(&daemon.socket("disk"), 2));
    guest.run(write("vda", 0, 8 * MIB, 1));
    guest.run(json!({"cmd": "load-start", "disk": "vda", "offset": 8 * MIB, "len": 48 * MIB, "threads": 8}));
    for i in 1..=4 {
        guest.wait_load(200);
        let (below, name) = (format!("d{}", i - 1), format!("d{i}"));
        daemon.ctl(&["snapshot", "overlay", &below, &name, &path(&daemon, i)]);
        guest.wait_load(200);
    }
    daemon.kill();
    daemon.start_again();
    daemon.ctl(&[
        "node",
        "add",
        "d0",
        "driver=qcow2",
        "read-only=on",
        "file.driver=file",
        &filename,
    ]);
    for i in 1..=4 {
        let filename = format!("file.filename={}", path(&daemon, i));
        let (backing, name) = (format!("backing=d{}", i - 1), format!("d{i}"));
        let mut args = vec![
            "node",
            "add",
            &name,
            "driver=qcow2",
            "file.driver=file",
            &filename,
            &backing,
        ];
        if i < 4 {
            args.push("read-only=on");
        }
        daemon.ctl(&args);
    }
    daemon.export_node("disk", "d4", &["--queues", "2"]);
    guest.wait_load(200);
    let result = guest.run(json!({"cmd": "load-stop"}));
    assert!(result["verified"].as_u64() > Some(0), "{result}");
    guest.run(verify("vda", 0, 8 * MIB, 1));
    guest.assert_no_errors();
    guest.shut_down();
    daemon.ctl(&["export", "remove", "disk"]);
    for i in (0..=4).rev() {
        daemon.ctl(&["node", "remove", &format!("d{i}")]);
        daemon.ctl(&["image", "check", &path(&daemon, i)]);
    }
}

/// The chain of images under a disk while jobs of all kinds change it.
struct Changing<'a> {
    daemon: &'a Daemon,
    /// Names of nodes, which are those of their images; the one that the guest uses last.
    chain: Vec<String>,
    made: u32,
}

impl Changing<'_> {
    fn top(&self) -> &str {
        self.chain.last().expect("a disk has an image")
    }

    fn path(&self, name: &str) -> String {
        let file = format!("{name}.qcow2");
        self.daemon.path(&file).display().to_string()
    }

    fn new_name(&mut self) -> String {
        self.made += 1;
        format!("n{}", self.made)
    }

    /// Does something to the disk; `dice` says what.
    fn step(&mut self, dice: u64) -> String {
        let top = self.top().to_owned();
        let depth = self.chain.len();
        let ctl = |args: &[&str]| self.daemon.ctl(args);
        match dice % 7 {
            0 if depth > 1 => {
                ctl(&["commit", &top]);
                self.chain.pop();
                format!("commit {top}")
            }
            1 if depth > 2 => {
                let middle = self.chain[depth - 2].clone();
                ctl(&["commit", &middle]);
                self.chain.remove(depth - 2);
                format!("commit {middle}")
            }
            2 if depth > 1 => {
                ctl(&["stream", &top]);
                for below in self.chain.drain(..depth - 1).rev() {
                    self.daemon.ctl(&["node", "remove", &below]);
                }
                format!("stream {top}")
            }
            3 => {
                let name = self.new_name();
                let path = self.path(&name);
                let mut args = vec!["mirror", &top, &path, "--name", &name, "--pivot"];
                if dice & 8 != 0 {
                    args.push("--write-blocking");
                }
                self.daemon.ctl(&args);
                for old in self.chain.drain(..).rev() {
                    self.daemon.ctl(&["node", "remove", &old]);
                }
                self.chain.push(name);
                format!("mirror {top}")
            }
            4 => {
                let copy = self.daemon.path("backup.qcow2").display().to_string();
                let _ = std::fs::remove_file(&copy);
                let mut args = vec!["backup", &top, &copy];
                if dice & 8 != 0 {
                    args.push("--compress");
                }
                ctl(&args);
                ctl(&["image", "check", &copy]);
                format!("backup {top}")
            }
            5 => {
                ctl(&["throttle", "set", "g", "iops-total=2000"]);
                ctl(&["throttle", "insert", &top, "g"]);
                let copy = self.daemon.path("backup.qcow2").display().to_string();
                let _ = std::fs::remove_file(&copy);
                ctl(&["backup", &top, &copy]);
                ctl(&["throttle", "take-out", &format!("{top}-throttle")]);
                format!("backup {top} under a throttle")
            }
            _ if depth < 5 => {
                let name = self.new_name();
                let path = self.path(&name);
                let more = ["discard=unmap"];
                self.daemon
                    .ctl(&[&["snapshot", "overlay", &top, &name, &path][..], &more].concat());
                self.chain.push(name);
                format!("overlay over {top}")
            }
            _ => String::new(),
        }
    }
}

/// A guest writes, syncs and verifies while everything that can be done to a disk is done to it, in an order by chance.
/// `VDISK_STEPS` is how many things are done, `VDISK_SEED` an order to try again.
#[test]
fn work_of_all_kinds_under_load() {
    let number = |name: &str| std::env::var(name).ok().and_then(|v| v.parse::<u64>().ok());
    let steps = number("VDISK_STEPS").unwrap_or(16);
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let seed = number("VDISK_SEED").unwrap_or(now.unwrap().as_nanos() as u64 | 1);
    println!("VDISK_SEED={seed} VDISK_STEPS={steps}");
    let daemon = Daemon::start(&["--io-threads", "2"]);
    let mut changing = Changing {
        daemon: &daemon,
        chain: vec!["n0".into()],
        made: 0,
    };
    let image = changing.path("n0");
    daemon.ctl(&["image", "create", &image, "64M"]);
    let filename = format!("file.filename={image}");
    let options = [
        "driver=qcow2",
        "discard=unmap",
        "file.driver=file",
        &filename,
    ];
    daemon.ctl(&[&["node", "add", "n0"][..], &options].concat());
    daemon.export_node("disk", "n0", &["--queues", "2"]);
    let mut guest = Guest::boot(GuestOptions::new().disk(&daemon.socket("disk"), 2));
    guest.run(write("vda", 0, 8 * MIB, 1));
    guest.run(json!({"cmd": "load-start", "disk": "vda", "offset": 8 * MIB, "len": 48 * MIB, "threads": 8}));
    let mut x = seed;
    for step in 0..steps {
        guest.wait_load(50);
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        // The first few are one of each kind, from the overlays that they need.
        let dice = match step {
            0..3 => 6,
            3..9 => [1, 0, 2, 3, 4, 5][step as usize - 3] | ((x & 8) * 7),
            _ => x >> 8,
        };
        println!("{step}: {}", changing.step(dice));
        let export = daemon.ctl_json(&["export", "show", "disk"]);
        assert_eq!(export["Path"], "fast", "{export}");
    }
    guest.wait_load(200);
    let result = guest.run(json!({"cmd": "load-stop"}));
    assert!(result["verified"].as_u64() > Some(0), "{result}");
    guest.run(verify("vda", 0, 8 * MIB, 1));
    guest.assert_no_errors();
    guest.shut_down();
    daemon.ctl(&["export", "remove", "disk"]);
    for name in changing.chain.iter().rev() {
        daemon.ctl(&["node", "remove", name]);
        daemon.ctl(&["image", "check", &changing.path(name)]);
    }
    assert_eq!(daemon.ctl_json(&["node", "list"]), json!([]));
}

#[test]
fn killed_under_load_on_uring() {
    kill_and_restart("uring", "cache.direct=off");
}

#[test]
fn killed_under_load_on_aio_with_o_direct() {
    kill_and_restart("aio", "cache.direct=on");
}

#[test]
fn write_through_is_kept_when_the_daemon_is_killed() {
    let mut daemon = Daemon::start(&[]);
    let (image, socket) = daemon.export("d0", 16 * MIB, &[], &[]);
    let mut guest = Guest::boot(GuestOptions::new().disk(&socket, 1));
    guest.run(json!({"cmd": "set-cache", "disk": "vda", "type": "write through"}));
    daemon.wait_for_log("write_cache=false");
    let disks = guest.run(json!({"cmd": "disks"}));
    assert_eq!(disks["vda"]["cache"], "write through");
    guest.run(write("vda", 0, MIB, 1));
    daemon.kill();
    daemon.start_again();
    daemon.export_file("d0", &image, &[], &[]);
    // A guest that believes in write-through sends no flush: the new daemon must know.
    daemon.wait_for_log("write cache is off");
    guest.run(write("vda", 0, MIB, 2));
    guest.run(verify("vda", 0, MIB, 2));
    guest.assert_no_errors();
    guest.shut_down();
}

/// The slow path inside QEMU: a SCSI disk on QEMU's block layer, which is itself a client of our export
/// through libblkio.
#[test]
fn a_scsi_disk_by_way_of_qemus_block_layer_and_libblkio() {
    let daemon = Daemon::start(&[]);
    let (image, socket) = daemon.export("d0", 32 * MIB, &["discard=unmap"], &[]);
    let blockdev = format!(
        "driver=virtio-blk-vhost-user,node-name=b,path={},cache.direct=on",
        socket.display()
    );
    let mut guest = Guest::boot(GuestOptions::new().root("trixie").args(&[
        "-blockdev",
        &blockdev,
        "-device",
        "virtio-scsi-pci",
        "-device",
        "scsi-hd,drive=b",
    ]));
    guest.run(json!({"cmd": "wait-disk", "disk": "sda", "present": true}));
    guest.run(write("sda", 0, 16 * MIB, 4));
    guest.run(flush("sda"));
    guest.run(verify("sda", 0, 16 * MIB, 4));
    assert_eq!(claims(&image, MIB), (MIB, 4));
    guest.assert_no_errors();
    guest.shut_down();
}
