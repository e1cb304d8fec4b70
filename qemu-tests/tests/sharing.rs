//! Copies on a file system whose files can share blocks (XFS on a loop device): little is moved, and nobody sees the difference.

use std::path::{Path, PathBuf};

use vdisk_qemu_tests::blk_client::Client;
use vdisk_qemu_tests::qemu_tools::{assert_sound, read_with_qemu, text, tool};
use vdisk_qemu_tests::workload::{Sequence, Writer, assert_same};
use vdisk_qemu_tests::{Daemon, Scratch, as_root, scratch, wait_for};

const MIB: u64 = 1 << 20;
const SIZE: u64 = 32 * MIB;

/// A file system of a test's own.
struct Xfs {
    dir: Scratch,
}

impl Xfs {
    fn mount() -> Xfs {
        let dir = scratch();
        let (image, folder) = (dir.path().join("image"), dir.path().join("xfs"));
        std::fs::create_dir(&folder).unwrap();
        std::fs::File::create(&image)
            .and_then(|f| f.set_len(1200 * MIB))
            .unwrap();
        as_root(&["mkfs.xfs", "-q", "-m", "reflink=1", text(&image)]);
        as_root(&["mount", "-o", "loop", text(&image), text(&folder)]);
        let me = rustix::process::getuid().as_raw().to_string();
        as_root(&["chown", &me, text(&folder)]);
        Xfs { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join("xfs").join(name)
    }
}

impl Drop for Xfs {
    fn drop(&mut self) {
        as_root(&["umount", "-l", text(&self.dir.path().join("xfs"))]);
    }
}

/// A new image with something in every cluster of its first half, at places that are not in order.
fn fill(image: &Path, format: &str, pattern: u8) {
    tool(
        "qemu-img",
        &["create", "-q", "-f", format, text(image), "32M"],
    );
    let mut args = vec!["-f", format, text(image)];
    let writes: Vec<String> = (0..16)
        .map(|i| format!("write -P {} {}M 1M", pattern + i, 15 - i))
        .collect();
    for write in &writes {
        args.extend(["-c", write]);
    }
    tool("qemu-io", &args);
}

fn read(image: &Path, format: &str) -> Vec<u8> {
    match format {
        "raw" => std::fs::read(image).unwrap(),
        _ => {
            assert_sound(image);
            read_with_qemu(image)
        }
    }
}

/// Bytes of a file that it shares with others.
fn shared(image: &Path) -> u64 {
    let extents = as_root(&["filefrag", "-s", "-v", "-b1024", text(image)]);
    let shared = extents.lines().filter(|l| l.contains("shared"));
    shared
        .map(|l| {
            let length = l.split(':').nth(3).expect("a length in KiB");
            length.trim().parse::<u64>().expect("a number") * 1024
        })
        .sum()
}

fn add(daemon: &Daemon, id: &str, format: &str, image: &Path, more: &[&str]) {
    let driver = format!("driver={format}");
    let filename = format!("file.filename={}", image.display());
    let mut args = vec!["node", "add", id, &driver, "file.driver=file", &filename];
    args.extend(more);
    daemon.ctl(&args);
}

/// Removes the nodes that are still there.
fn clear(daemon: &Daemon) {
    for name in ["disk", "top", "copy", "base"] {
        let nodes = daemon.ctl_json(&["node", "list"]);
        let mut nodes = nodes.as_array().unwrap().iter();
        if nodes.any(|n| n["Name"] == name) {
            daemon.ctl(&["node", "remove", name]);
        }
    }
    let nodes = daemon.ctl_json(&["node", "list"]);
    assert!(nodes.as_array().unwrap().is_empty(), "{nodes}");
}

/// Copies of all kinds have what they should, share what can be shared, and are independent of each other.
#[test]
fn copies_share_blocks_until_one_of_them_is_written() {
    let xfs = Xfs::mount();
    let daemon = Daemon::start(&[]);
    let cases = [
        ("backup", "qcow2", "qcow2", "off", "--speed=1G", true),
        ("backup", "qcow2", "raw", "on", "", true),
        ("backup", "raw", "qcow2", "on", "--sync=top", true),
        ("backup", "raw", "raw", "off", "", true),
        (
            "backup",
            "qcow2",
            "qcow2",
            "off",
            "use-copy-range=off",
            false,
        ),
        ("mirror", "qcow2", "qcow2", "on", "--pivot", true),
        ("mirror", "raw", "qcow2", "off", "--pivot", true),
        ("mirror", "qcow2", "raw", "off", "--pivot", true),
    ];
    for (n, (command, from, to, direct, more, shares)) in cases.into_iter().enumerate() {
        let cache = format!("file.cache.direct={direct}");
        let (source, copy) = (xfs.path(&format!("{n}.a")), xfs.path(&format!("{n}.b")));
        fill(&source, from, 1);
        add(&daemon, "disk", from, &source, &[&cache]);
        let target = format!("--target={cache}");
        let mut args = vec![command, "disk", text(&copy), "--format", to];
        args.extend(["--name", "copy", &target]);
        args.extend((!more.is_empty()).then_some(more));
        args.extend(shares.then_some("use-copy-range=on"));
        daemon.ctl(&args);
        clear(&daemon);
        let what = format!("{command} {from} {to} {more} direct={direct}");
        match shares {
            true => assert!(shared(&copy) >= 16 * MIB, "{what}: {}", shared(&copy)),
            false => assert_eq!(shared(&copy), 0, "{what}"),
        }
        let want = read(&source, from);
        assert_same(&read(&copy, to), &want, 0, &what);
        // What is written to one of them is not seen in the other.
        tool(
            "qemu-io",
            &["-f", to, "-c", "write -P 99 0 8M", text(&copy)],
        );
        assert_same(&read(&source, from), &want, 0, &what);
        tool(
            "qemu-io",
            &["-f", from, "-c", "write -P 98 4M 8M", text(&source)],
        );
        let got = read(&copy, to);
        assert!(got[..8 << 20].iter().all(|b| *b == 99), "{what}");
        assert_same(&got[8 << 20..], &want[8 << 20..], 8 * MIB, &what);
        std::fs::remove_file(&source).unwrap();
        std::fs::remove_file(&copy).unwrap();
    }
}

/// A file that shares blocks is the same disk when it is opened again, whatever the file system would like better.
#[test]
fn what_shares_blocks_is_opened_as_before() {
    let xfs = Xfs::mount();
    let mut daemon = Daemon::managed(&[]);
    // No multiple of the file system's blocks.
    let image = xfs.path("disk.raw");
    std::fs::write(&image, vec![1; MIB as usize + 512]).unwrap();
    add(&daemon, "disk", "raw", &image, &["file.cache.direct=on"]);
    daemon.export_node("disk", "disk", &[]);
    let path = |daemon: &Daemon| daemon.ctl_json(&["export", "show", "disk"])["Path"].clone();
    assert_eq!(path(&daemon), "fast");
    let copy = xfs.path("copy.raw");
    let args = [
        "backup",
        "disk",
        text(&copy),
        "-f",
        "raw",
        "use-copy-range=on",
    ];
    daemon.ctl(&args);
    assert!(shared(&image) > 0);
    daemon.kill();
    daemon.go_on();
    assert_eq!(path(&daemon), "fast");
    let mut client = Client::connect(&daemon.socket("disk"), 1, 1, 1 << 20);
    let mut data = [0; 512];
    for at in [512, 4096, MIB] {
        assert_eq!(client.write(at, &[7; 512]), 0);
        assert_eq!(client.read(at, &mut data), 0);
        assert_eq!(data, [7; 512]);
    }
    assert!(std::fs::read(&copy).unwrap().iter().all(|b| *b == 1));
}

/// Chains are merged by sharing, in both directions, and images are converted so if that is asked for.
#[test]
fn chains_and_conversions_share_blocks() {
    let xfs = Xfs::mount();
    let daemon = Daemon::start(&[]);
    for (i, (base_format, direction)) in [
        ("raw", "stream"),
        ("qcow2", "stream"),
        ("raw", "commit"),
        ("qcow2", "commit"),
    ]
    .into_iter()
    .enumerate()
    {
        let (base, top) = (
            xfs.path(&format!("base{i}")),
            xfs.path(&format!("top{i}.qcow2")),
        );
        fill(&base, base_format, 1);
        let args = ["create", "-q", "-f", "qcow2", "-F", base_format, "-b"];
        tool(
            "qemu-img",
            &[&args[..], &[text(&base), text(&top)]].concat(),
        );
        // A part of a cluster, whole ones, and zeroes over data.
        let writes = ["write -P 70 1M 4k", "write -P 71 3M 2M", "write -z 7M 1M"];
        for write in writes {
            tool("qemu-io", &["-c", write, text(&top)]);
        }
        let want = read_with_qemu(&top);
        add(&daemon, "base", base_format, &base, &["read-only=on"]);
        add(&daemon, "top", "qcow2", &top, &["backing=base"]);
        daemon.ctl(&[direction, "top"]);
        let (merged, format) = match direction {
            "stream" => (&top, "qcow2"),
            _ => (&base, base_format),
        };
        clear(&daemon);
        let least = match direction {
            "stream" => 12 * MIB,
            _ => 2 * MIB,
        };
        assert!(shared(merged) >= least, "{direction}: {}", shared(merged));
        assert_same(&read(merged, format), &want, 0, direction);
    }

    let source = xfs.path("source.raw");
    fill(&source, "raw", 1);
    let want = read(&source, "raw");
    for (name, option, least) in [("a", "use-copy-range=on", 16 * MIB), ("b", "", 0)] {
        let copy = xfs.path(name);
        let mut args = vec!["convert", text(&source), text(&copy), "-F", "raw"];
        args.extend((!option.is_empty()).then_some(option));
        daemon.ctl(&args);
        assert_eq!(shared(&copy) >= 16 * MIB, least > 0, "{option}");
        assert_same(&read(&copy, "qcow2"), &want, 0, option);
    }
    let copy = xfs.path("packed");
    let mut args = vec!["convert", text(&source), text(&copy), "-F", "raw"];
    args.extend(["--compress", "use-copy-range=on"]);
    let (code, message) = daemon.ctl_error(&args);
    assert_eq!(code, 2, "{message}");
    assert!(message.contains("'use-copy-range'"), "{message}");
}

/// While guests write, a copy that shares blocks is one moment, as any other is.
#[test]
fn a_copy_that_shares_blocks_is_one_moment() {
    let xfs = Xfs::mount();
    let daemon = Daemon::start(&["--io-threads", "2"]);
    let mut shares = false;
    for (i, (format, to)) in [("qcow2", "raw"), ("raw", "qcow2"), ("qcow2", "qcow2")]
        .into_iter()
        .enumerate()
    {
        let id = format!("disk{i}");
        let image = xfs.path(&id);
        tool(
            "qemu-img",
            &["create", "-q", "-f", format, text(&image), "32M"],
        );
        let direct = ["file.cache.direct=on", "file.cache.direct=off"][i % 2];
        add(&daemon, &id, format, &image, &[direct]);
        daemon.export_node(&id, &id, &[]);
        let sequence = Sequence::new(SIZE);
        let mut moments = Vec::new();
        std::thread::scope(|s| {
            let writer = Writer::start(s, &sequence, &daemon.socket(&id));
            for round in 0..3 {
                sequence.wait_for_more(500);
                let copy = xfs.path(&format!("{id}-{round}"));
                let before = sequence.written();
                let mut args = vec!["backup", &id, text(&copy), "--format", to];
                args.extend(["--name", "copy", "--detach", "auto-dismiss=false"]);
                args.extend(["job-id=job", "use-copy-range=on"]);
                daemon.ctl(&args);
                let after = sequence.written();
                wait_for("the backup to end", || {
                    let job = daemon.ctl_json(&["job", "show", "job"]);
                    (job["State"] == "concluded").then_some(())
                });
                daemon.ctl(&["job", "dismiss", "job"]);
                daemon.ctl(&["node", "remove", "copy"]);
                shares |= shared(&copy) > 0;
                moments.push((copy, before, after + 1));
            }
            let copy = xfs.path(&format!("{id}-mirror"));
            sequence.wait_for_more(100);
            let before = sequence.written();
            let mut args = vec!["mirror", &id, text(&copy), "--format", to];
            args.extend(["--name", "mirror", "--pivot", "use-copy-range=on"]);
            daemon.ctl(&args);
            daemon.ctl(&["node", "remove", &id]);
            moments.push((image.clone(), before, sequence.written() + 1));
            sequence.wait_for_more(100);
            writer.end();
            moments.push((copy, sequence.written(), sequence.written()));
        });
        daemon.ctl(&["export", "remove", &id]);
        daemon.ctl(&["node", "remove", "mirror"]);
        for (at, (copy, first, most)) in moments.iter().enumerate() {
            let format = if at == 3 { format } else { to };
            let last = sequence.last_write(&read(copy, format), text(copy));
            assert!((*first..=*most).contains(&last), "{first} {last} {most}");
        }
    }
    assert!(shares, "no backup shared anything");
}
