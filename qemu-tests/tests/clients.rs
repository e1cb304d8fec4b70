//! Front-ends that are not QEMU, against our socket.

use std::time::Duration;

use vdisk_qemu_tests::blk_client::{Client, Load, Op};
use vdisk_qemu_tests::{Daemon, as_root};

const MIB: u64 = 1 << 20;

#[test]
fn virtio_driver_does_everything() {
    for engine in ["uring", "aio", "threads"] {
        let daemon = Daemon::start(&["--io-engine", engine]);
        let (image, socket) = daemon.export("d0", 16 * MIB, &["discard=unmap"], &[]);
        let mut client = Client::connect(&socket, 2, 4, 65536);
        assert_eq!(client.capacity(), 16 * MIB);
        let data: Vec<u8> = (0..65536u32).map(|i| (i / 3) as u8).collect();
        assert_eq!(client.write(MIB, &data), 0);
        assert_eq!(client.flush(), 0);
        let mut got = vec![0; 65536];
        assert_eq!(client.read(MIB, &mut got), 0);
        assert_eq!(got, data);
        assert_eq!(client.write_zeroes(MIB + 4096, 4096, false), 0);
        assert_eq!(client.discard(MIB + 8192, 8192), 0);
        assert_eq!(client.read(MIB, &mut got), 0);
        assert_eq!(got[..4096], data[..4096]);
        assert!(got[4096..16384].iter().all(|b| *b == 0));
        assert_eq!(got[16384..], data[16384..]);
        // Beyond the end.
        assert_eq!(client.write(16 * MIB, &data[..512]), -libc::EIO);
        assert_eq!(client.read(16 * MIB - 512, &mut got[..1024]), -libc::EIO);
        let on_disk = std::fs::read(&image).unwrap();
        assert_eq!(on_disk[MIB as usize..][..4096], data[..4096]);
    }
}

#[test]
fn sixty_four_queues_work_and_one_more_is_refused() {
    let daemon = Daemon::start(&["--io-threads", "2"]);
    let (_, socket) = daemon.export("d0", 16 * MIB, &[], &["--queues", "64"]);
    let mut client = Client::connect(&socket, 64, 2, 4096);
    let load = Load {
        op: Op::Write,
        block: 4096,
        depth: 2,
        sequential: false,
        span: 16 * MIB,
        duration: Duration::from_millis(200),
    };
    assert!(client.run(&load).requests >= 128);
    let stats = daemon.ctl_json(&["stats"]);
    let queues = stats["exports"]["d0"]["queues"].as_array().unwrap();
    assert!(
        queues.len() == 64 && queues.iter().all(|q| q["requests"].as_u64() >= Some(2)),
        "{queues:?}"
    );
    let socket = daemon.socket("d1");
    let (_, more) = daemon.ctl_error(&[
        "export",
        "add",
        "d1",
        "--node",
        "d0",
        "--socket",
        socket.to_str().unwrap(),
        "--queues",
        "65",
    ]);
    assert!(more.contains("65") && more.contains("64"), "{more}");
}

#[test]
fn many_requests_in_flight_on_two_queues() {
    for node in [
        &["cache.direct=off"][..],
        &["cache.direct=on"],
        &["detect-zeroes=on"],
    ] {
        let daemon = Daemon::start(&["--io-threads", "2"]);
        let (_, socket) = daemon.export("d0", 16 * MIB, node, &[]);
        let mut client = Client::connect(&socket, 2, 32, 4096);
        for op in [Op::Write, Op::Read] {
            let load = Load {
                op,
                block: 4096,
                depth: 32,
                sequential: false,
                span: 16 * MIB,
                duration: Duration::from_millis(300),
            };
            let measured = client.run(&load);
            assert!(measured.requests > 64);
        }
        let stats = daemon.ctl_json(&["stats"]);
        let d0 = &stats["exports"]["d0"];
        assert_eq!(d0["failed"], 0);
        // Only writes that must be looked at take the slow path.
        let slow = d0["slow"].as_u64().unwrap();
        if node[0] == "detect-zeroes=on" {
            assert_eq!(slow, d0["write"]["requests"].as_u64().unwrap());
        } else {
            assert_eq!(slow, 0);
        }
    }
}

/// QEMU's own tools as clients of libblkio, against our socket.
#[test]
fn libblkio_reads_and_writes() {
    let daemon = Daemon::start(&[]);
    let (image, socket) = daemon.export("d0", 16 * MIB, &["discard=unmap"], &[]);
    let options = format!(
        "driver=virtio-blk-vhost-user,path={},cache.direct=on",
        socket.display()
    );
    let run = |args: &[&str]| {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/in-root.sh");
        let out = std::process::Command::new(script)
            .arg("trixie")
            .args(args)
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&out.stdout).into_owned();
        let errors = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(out.status.success(), "{args:?}: {text}{errors}");
        text
    };
    let io = run(&[
        "qemu-io",
        "--image-opts",
        &options,
        "-c",
        "write -P 0x5a 1M 1M",
        "-c",
        "flush",
        "-c",
        "read -P 0x5a 1M 1M",
        "-c",
        "write -z 1M 64k",
        "-c",
        "read -P 0 1M 64k",
        "-c",
        "discard 1536k 64k",
    ]);
    assert!(!io.contains("fail"), "{io}");
    let data = std::fs::read(&image).unwrap();
    assert_eq!(data[(2 * MIB - 1) as usize], 0x5a);
    run(&[
        "qemu-img",
        "bench",
        "--image-opts",
        "-c",
        "2000",
        "-d",
        "32",
        "-s",
        "4k",
        "-w",
        &options,
    ]);
    assert!(
        daemon.ctl_json(&["stats"])["exports"]["d0"]["write"]["requests"].as_u64() >= Some(2000)
    );
}

/// A loop device, taken away in the end.
struct LoopDevice(String);

impl LoopDevice {
    fn new(image: &std::path::Path, block: u32) -> LoopDevice {
        let (block, image) = (block.to_string(), image.to_str().unwrap());
        let path = as_root(&["losetup", "-f", "--show", "-b", &block, image]);
        as_root(&["chmod", "0666", &path]);
        LoopDevice(path)
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        as_root(&["losetup", "-d", &self.0]);
    }
}

/// A block device with blocks of 4096 bytes, and a guest that writes 512.
#[test]
fn host_devices_with_large_blocks_take_small_writes() {
    for engine in ["uring", "aio", "threads"] {
        let daemon = Daemon::start(&["--io-engine", engine]);
        let image = daemon.image("backing", 16 * MIB);
        let device = LoopDevice::new(&image, 4096);
        let filename = format!("filename={}", device.0);
        daemon.ctl(&[
            "node",
            "add",
            "d",
            "driver=host_device",
            &filename,
            "cache.direct=on",
            "discard=unmap",
        ]);
        daemon.export_node("d", "d", &[]);
        let mut client = Client::connect(&daemon.socket("d"), 1, 4, 65536);
        assert_eq!(client.capacity(), 16 * MIB);
        // Reads are fast; writes may be parts of blocks and are serialised.
        let export = daemon.ctl_json(&["export", "show", "d"]);
        assert_eq!(export["Path"], "slow");
        assert!(
            export["PathReason"]
                .as_str()
                .unwrap()
                .contains("block size"),
            "{export}"
        );
        let data: Vec<u8> = (0..20480u32).map(|i| (i / 5) as u8).collect();
        assert_eq!(client.write(MIB, &data), 0);
        assert_eq!(client.write(MIB + 512, &[1; 512]), 0);
        assert_eq!(client.write(MIB + 7 * 512, &[2; 1024]), 0);
        assert_eq!(client.write_zeroes(MIB + 3 * 512, 512, false), 0);
        assert_eq!(client.write_zeroes(MIB + 8192, 4096, false), 0);
        assert_eq!(client.discard(MIB + 12288 - 512, 4096 + 512), 0);
        let mut expected = data.clone();
        expected[512..1024].fill(1);
        expected[3584..4608].fill(2);
        expected[1536..2048].fill(0);
        expected[8192..12288].fill(0);
        let mut got = vec![0; 20480];
        assert_eq!(client.read(MIB, &mut got), 0);
        // What was discarded may be anything.
        expected[12288..16384].copy_from_slice(&got[12288..16384]);
        assert!(got == expected, "{engine}");
        assert_eq!(client.flush(), 0);
        drop(client);
        daemon.ctl(&["export", "remove", "d"]);
        // With blocks of the device's size the fast path is back.
        daemon.ctl(&["node", "remove", "d"]);
        daemon.ctl(&[
            "node",
            "add",
            "d",
            "driver=host_device",
            &filename,
            "cache.direct=on",
        ]);
        daemon.export_node("d", "d", &["logical-block-size=4096"]);
        assert_eq!(daemon.ctl_json(&["export", "show", "d"])["Path"], "fast");
        daemon.ctl(&["export", "remove", "d"]);
        daemon.ctl(&["node", "remove", "d"]);
    }
}
