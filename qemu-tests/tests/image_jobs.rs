//! Jobs on whole images: discards, checks, repairs, and images that are made.

use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use vdisk_qemu_tests::blk_client::Client;
use vdisk_qemu_tests::qemu_tools::{assert_sound, read_with_qemu, text, tool};
use vdisk_qemu_tests::workload::{Sequence, Writer, assert_same};
use vdisk_qemu_tests::{Daemon, wait_for};

const MIB: u64 = 1 << 20;
const SIZE: u64 = 160 * MIB;

fn add(daemon: &Daemon, id: &str, driver: &str, image: &Path, more: &[&str]) {
    let driver = format!("driver={driver}");
    let filename = format!("file.filename={}", image.display());
    let args = ["node", "add", id, &driver, "file.driver=file", &filename];
    daemon.ctl(&[&args[..], more].concat());
}

/// Bytes that a file takes.
fn taken(file: &Path) -> u64 {
    std::fs::metadata(file).unwrap().blocks() * 512
}

/// An image with data and zeroes by turns, all of it allocated.
fn half_zeroes(daemon: &Daemon, name: &str, format: &str) -> PathBuf {
    let image = daemon.path(name);
    let size = SIZE.to_string();
    tool(
        "qemu-img",
        &["create", "-q", "-f", format, text(&image), &size],
    );
    let mut args = vec!["-f".to_owned(), format.to_owned()];
    // What guests write to while it is looked at.
    args.extend(["-c".into(), "write -q -P 0 0 64M".into()]);
    for at in (64..160).step_by(2) {
        for (pattern, at) in [(7, at), (0, at + 1)] {
            args.extend(["-c".into(), format!("write -q -P {pattern} {at}M 1M")]);
        }
    }
    args.push(text(&image).to_owned());
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    tool("qemu-io", &args);
    image
}

/// What is zeroes takes no space afterwards, and what guests wrote meanwhile is all there.
#[test]
fn zeroes_are_given_back_under_writes() {
    let daemon = Daemon::start(&["--io-threads", "2"]);
    for format in ["raw", "qcow2"] {
        let image = half_zeroes(&daemon, &format!("{format}.img"), format);
        add(&daemon, format, format, &image, &["discard=unmap"]);
        daemon.export_node(format, format, &[]);
        let before = taken(&image);
        let sequence = Sequence::new(64 * MIB);
        let mut found = serde_json::Value::Null;
        std::thread::scope(|s| {
            let writer = Writer::start(s, &sequence, &daemon.socket(format));
            sequence.wait_for_more(10);
            // Again and again through the part that is written.
            for _ in 0..5 {
                let done = daemon.ctl_json(&["discard", format]);
                if found.is_null() {
                    found = done;
                }
                sequence.wait_for_more(50);
            }
            writer.end();
        });
        let freed = found["freed"].as_u64().unwrap();
        assert!(freed >= 60 * MIB, "{format}: {found}");
        let export = daemon.ctl_json(&["export", "show", format]);
        assert_eq!(export["Path"], "fast", "{format}");
        daemon.ctl(&["export", "remove", format]);
        daemon.ctl(&["node", "remove", format]);
        // The writer has taken some at the beginning.
        assert!(taken(&image) + 30 * MIB < before, "{format}");
        let disk = match format {
            "raw" => std::fs::read(&image).unwrap(),
            _ => {
                assert_sound(&image);
                read_with_qemu(&image)
            }
        };
        let last = sequence.last_write(&disk[..64 << 20], format);
        assert_eq!(last, sequence.written(), "{format}");
        for (i, block) in disk.chunks(1 << 20).enumerate().skip(64) {
            let want = if i % 2 == 0 { 7 } else { 0 };
            assert!(block.iter().all(|b| *b == want), "{format}: MiB {i}");
        }
    }
}

/// Zeroes over data of a backing file stay zeroes.
#[test]
fn an_overlay_in_a_file_keeps_its_zeroes() {
    let daemon = Daemon::start(&[]);
    let (base, over) = (daemon.path("base.qcow2"), daemon.path("over.qcow2"));
    tool(
        "qemu-img",
        &["create", "-q", "-f", "qcow2", text(&base), "8M"],
    );
    tool("qemu-io", &["-c", "write -q -P 9 0 8M", text(&base)]);
    let make = [
        "create",
        "-q",
        "-f",
        "qcow2",
        "-F",
        "qcow2",
        "-b",
        text(&base),
        text(&over),
    ];
    tool("qemu-img", &make);
    tool(
        "qemu-io",
        &[
            "-c",
            "write -q -P 0 1M 3M",
            "-c",
            "write -q -P 5 3M 1M",
            text(&over),
        ],
    );
    let want = read_with_qemu(&over);
    let before = taken(&over);
    let out = daemon.ctl(&["discard", text(&over)]);
    assert!(out.contains("2 MiB given back"), "{out}");
    assert!(taken(&over) + MIB < before);
    assert_sound(&over);
    assert_same(&read_with_qemu(&over), &want, 0, "overlay");
    assert!(
        daemon
            .ctl_json(&["node", "list"])
            .as_array()
            .unwrap()
            .is_empty()
    );
    let (code, error) = daemon.ctl_error(&["discard", "/nowhere/over.qcow2"]);
    assert_eq!(code, 3, "{error}");
}

/// A node is checked and repaired as a job while its guests wait, and nobody else does.
#[test]
fn checks_and_repairs_are_jobs() {
    let daemon = Daemon::start(&[]);
    let image = daemon.path("a.qcow2");
    daemon.ctl(&["image", "create", text(&image), "64M"]);
    tool("qemu-io", &["-c", "write -q -P 3 0 4M", text(&image)]);
    // A reference count that is too high: a leak.
    let file = std::fs::File::options()
        .read(true)
        .write(true)
        .open(&image)
        .unwrap();
    let mut place = [0; 8];
    file.read_exact_at(&mut place, 48).unwrap();
    let table = u64::from_be_bytes(place);
    file.read_exact_at(&mut place, table).unwrap();
    let block = u64::from_be_bytes(place);
    file.write_all_at(&7u16.to_be_bytes(), block + 2 * 200)
        .unwrap();

    let (code, error) = daemon.ctl_error(&["image", "check", text(&image)]);
    assert_eq!(code, 1);
    assert!(
        error.contains("1 clusters take space for nothing"),
        "{error}"
    );
    add(&daemon, "a", "qcow2", &image, &[]);
    daemon.export_node("a", "a", &[]);
    let mut client = Client::connect(&daemon.socket("a"), 1, 1, 1 << 16);
    let (_, error) = daemon.ctl_error(&["image", "check", text(&image)]);
    assert!(error.contains("is open as node 'a'"), "{error}");
    let (_, error) = daemon.ctl_error(&["node", "check", "a"]);
    assert!(
        error.contains("1 clusters take space for nothing"),
        "{error}"
    );
    let report = daemon.ctl_json(&["node", "check", "a", "--repair", "all"]);
    assert_eq!(
        (&report["leaks"], &report["leaks-fixed"]),
        (&1.into(), &1.into()),
        "{report}"
    );
    let mut data = [0; 4096];
    assert_eq!(client.read(MIB, &mut data), 0);
    assert_eq!(data, [3; 4096]);
    assert_eq!(client.write(5 * MIB, &data), 0);
    assert_eq!(client.flush(), 0);
    daemon.ctl(&["node", "check", "a"]);
    assert!(
        daemon
            .ctl_json(&["job", "list"])
            .as_array()
            .unwrap()
            .is_empty()
    );
    let (code, error) = daemon.ctl_error(&["node", "check", "nothing"]);
    assert_eq!(code, 3, "{error}");
    drop(client);
    daemon.ctl(&["export", "remove", "a"]);
    daemon.ctl(&["node", "remove", "a"]);
    assert_sound(&image);
    let report = daemon.ctl_json(&["image", "repair", text(&image)]);
    assert_eq!(report["leaks"], 0);
}

/// An image that takes long is made in the background; what was cancelled is gone.
#[test]
fn images_are_made_by_jobs() {
    let daemon = Daemon::start(&[]);
    // As much as takes a while, and fits.
    let room = rustix::fs::statvfs(daemon.path("")).unwrap();
    let size = (20u64 << 30).min(room.f_bavail * room.f_frsize / 2 / MIB * MIB);
    for format in ["qcow2", "raw"] {
        let image = daemon.path(&format!("big.{format}"));
        let full = "preallocation=full";
        let make = [
            "image",
            "create",
            "--detach",
            "-f",
            format,
            text(&image),
            &size.to_string(),
            full,
        ];
        daemon.ctl(&[&make[..], &["job-id=make", "auto-dismiss=false"]].concat());
        let looked = wait_for("the job to be on its way", || {
            let job = daemon.ctl_json(&["job", "show", "make"]);
            (job["ProgressDone"].as_u64() > Some(0)).then_some(job)
        });
        assert_eq!(looked["State"], "running", "{looked}");
        assert_eq!(looked["Operation"], "create");
        assert_eq!(looked["ProgressTotal"], size);
        let (code, error) = daemon.ctl_error(&["job", "pause", "make"]);
        assert_eq!(code, 2, "{error}");
        let (code, error) = daemon.ctl_error(&["image", "create", text(&image), "1M"]);
        assert_eq!(code, 4, "{error}");
        daemon.ctl(&["job", "cancel", "make"]);
        let job = wait_for("the job's end", || {
            let job = daemon.ctl_json(&["job", "show", "make"]);
            (job["State"] == "concluded").then_some(job)
        });
        assert!(
            job["Error"][1].as_str().unwrap().contains("cancelled"),
            "{job}"
        );
        assert!(!image.exists(), "{format}");
        daemon.ctl(&["job", "dismiss", "make"]);
    }
    // What is not made is said with the name of the error.
    let (code, error) = daemon.ctl_error(&["image", "create", "/nowhere/a.qcow2", "1M"]);
    assert_eq!(code, 3, "{error}");
    let (code, _) = daemon.ctl_error(&["image", "create", text(&daemon.path("b")), "1M", "x=y"]);
    assert_eq!(code, 2);
}
