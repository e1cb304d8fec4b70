//! qcow2 images made by QEMU's tools, read through vdiskd and compared with what those tools read.

use std::path::{Path, PathBuf};
use std::process::Command;

use vdisk_qemu_tests::Daemon;
use vdisk_qemu_tests::blk_client::Client;
use vdisk_qemu_tests::qemu_tools::{assert_sound, read_with_qemu, text, tool};
use vdisk_qemu_tests::workload::{assert_same, change, compare};

const MIB: u64 = 1 << 20;
const SIZE: u64 = 24 * MIB;

/// Writes patterns in pieces that begin and end within clusters and subclusters.
fn fill(image: &Path, seed: u64) {
    let mut commands = Vec::new();
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    for i in 0..40u64 {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        let len = (x % 300 + 1) * 512;
        let at = (x >> 20) % ((SIZE - len) / 512) * 512;
        commands.push(match i % 8 {
            6 => format!("write -z {at} {len}"),
            7 => format!("discard {at} {len}"),
            _ => format!("write -P {} {at} {len}", (seed + i) % 255 + 1),
        });
    }
    let mut args = vec!["-d", "unmap", "-f", "qcow2"];
    for c in &commands {
        args.extend(["-c", c.as_str()]);
    }
    args.push(text(image));
    tool("qemu-io", &args);
}

fn add(daemon: &Daemon, id: &str, image: &Path, more: &[&str]) {
    let filename = format!("file.filename={}", image.display());
    let mut args = vec![
        "node",
        "add",
        id,
        "driver=qcow2",
        "read-only=on",
        "file.driver=file",
        &filename,
    ];
    args.extend(more);
    daemon.ctl(&args);
}

fn export(daemon: &Daemon, id: &str) {
    let socket = daemon.socket(id);
    daemon.ctl(&["export", "add", id, "--node", id, "--socket", text(&socket)]);
}

fn create(daemon: &Daemon, name: &str, options: &str) -> PathBuf {
    let image = daemon.path(&format!("{name}.qcow2"));
    let size = SIZE.to_string();
    let mut args = vec!["create", "-q", "-f", "qcow2"];
    if !options.is_empty() {
        args.extend(["-o", options]);
    }
    args.extend([text(&image), &size]);
    tool("qemu-img", &args);
    image
}

#[test]
fn images_of_all_kinds_read_as_qemu_reads_them() {
    let daemon = Daemon::start(&[]);
    for (i, (name, options, cache)) in [
        ("plain", "", "cache.direct=off"),
        ("version2", "compat=0.10", "cache.direct=off"),
        ("tiny", "cluster_size=512", "cache.direct=off"),
        ("huge", "cluster_size=2M", "cache.direct=on"),
        ("metadata", "preallocation=metadata", "cache.direct=off"),
        ("falloc", "preallocation=falloc", "cache.direct=on"),
        (
            "lazy",
            "lazy_refcounts=on,refcount_bits=1",
            "cache.direct=off",
        ),
        (
            "subclusters",
            "extended_l2=on,cluster_size=128k",
            "cache.direct=off",
        ),
        (
            "direct-subclusters",
            "extended_l2=on,cluster_size=16k",
            "cache.direct=on",
        ),
    ]
    .into_iter()
    .enumerate()
    {
        let image = create(&daemon, name, options);
        fill(&image, i as u64 + 1);
        let want = read_with_qemu(&image);
        add(&daemon, name, &image, &[cache]);
        export(&daemon, name);
        compare(&daemon, name, &want);
    }
    // Nearly everything goes straight to the file.
    let stats = daemon.ctl_json(&["stats"]);
    let plain = &stats["exports"]["plain"]["queues"][0];
    let (fast, slow) = (plain["fast"].as_u64(), plain["slow"].as_u64());
    assert!(fast > slow.map(|s| 4 * s), "{plain}");
}

#[test]
fn a_small_table_cache_reads_the_same() {
    let daemon = Daemon::start(&["--io-engine", "threads"]);
    let image = create(&daemon, "d0", "cluster_size=512");
    fill(&image, 77);
    add(&daemon, "d0", &image, &["l2-cache-size=2048"]);
    export(&daemon, "d0");
    compare(&daemon, "d0", &read_with_qemu(&image));
}

#[test]
fn compressed_images_read_as_qemu_reads_them() {
    let daemon = Daemon::start(&[]);
    let source = create(&daemon, "source", "");
    fill(&source, 5);
    let want = read_with_qemu(&source);
    for (name, options) in [
        ("deflate", "compression_type=zlib"),
        ("zstd", "compression_type=zstd,cluster_size=2M"),
        ("small", "compression_type=zlib,cluster_size=4k"),
    ] {
        let image = daemon.path(&format!("{name}.qcow2"));
        let convert = ["convert", "-c", "-f", "qcow2", "-O", "qcow2", "-o", options];
        let mut args = convert.to_vec();
        args.extend([text(&source), text(&image)]);
        tool("qemu-img", &args);
        add(&daemon, name, &image, &["cache.direct=off"]);
        export(&daemon, name);
        compare(&daemon, name, &want);
    }
}

#[test]
fn backing_chains_are_followed_only_when_named() {
    let daemon = Daemon::start(&[]);
    let base = daemon.path("base.qcow2");
    // Shorter than what stands on it.
    tool(
        "qemu-img",
        &["create", "-q", "-f", "qcow2", text(&base), "23M"],
    );
    let write = ["-f", "qcow2", "-c", "write -P 9 0 23M", text(&base)];
    tool("qemu-io", &write);
    let mut below = base.clone();
    let mut images = vec![base];
    for i in 0..3 {
        let image = daemon.path(&format!("overlay{i}.qcow2"));
        let size = SIZE.to_string();
        let create = ["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b"];
        let mut args = create.to_vec();
        args.extend([text(&below), text(&image), &size]);
        tool("qemu-img", &args);
        fill(&image, 20 + i);
        images.push(image.clone());
        below = image;
    }
    let want = read_with_qemu(&below);

    // Named by the image alone: refused, with the way to allow it.
    let filename = format!("file.filename={}", below.display());
    let options = [
        "driver=qcow2",
        "read-only=on",
        "file.driver=file",
        &filename,
    ];
    let refused = |more: &[&str]| {
        let mut args = vec!["node", "add", "top"];
        args.extend(options);
        args.extend(more);
        daemon.ctl_error(&args).1
    };
    let e = refused(&[]);
    assert!(
        e.contains("overlay1.qcow2") && e.contains("'backing'"),
        "{e}"
    );
    assert_eq!(
        daemon.ctl_json(&["node", "list"]).as_array().map(Vec::len),
        Some(0)
    );

    add(&daemon, "n0", &images[0], &[]);
    for (i, image) in images.iter().enumerate().skip(1) {
        let backing = format!("backing=n{}", i - 1);
        add(&daemon, &format!("n{i}"), image, &[&backing]);
    }
    export(&daemon, "n3");
    compare(&daemon, "n3", &want);
    let (_, e) = daemon.ctl_error(&["node", "remove", "n1"]);
    assert!(e.contains("n2"), "{e}");

    // Without the backing file the rest reads as zeroes.
    add(&daemon, "alone", &images[1], &["backing="]);
    let (code, e) = daemon.ctl_error(&["node", "resize", "alone", "+1M"]);
    assert!(code != 0 && e.contains("read-only"), "{e}");
}

fn add_writable(daemon: &Daemon, id: &str, image: &Path, more: &[&str]) {
    let filename = format!("file.filename={}", image.display());
    let mut args = vec![
        "node",
        "add",
        id,
        "driver=qcow2",
        "discard=unmap",
        &filename,
    ];
    args.push("file.driver=file");
    args.extend(more);
    daemon.ctl(&args);
    daemon.export_node(id, id, &[]);
}

#[test]
fn what_is_written_is_what_qemu_reads() {
    let daemon = Daemon::start(&[]);
    for (i, (name, options, more)) in [
        ("w-plain", "", &["cache.direct=off"][..]),
        ("w-version2", "compat=0.10", &["cache.direct=off"]),
        (
            "w-tiny",
            "cluster_size=512",
            &["cache.direct=on", "l2-cache-size=8192"],
        ),
        ("w-huge", "cluster_size=2M", &["cache.direct=on"]),
        (
            "w-metadata",
            "preallocation=metadata",
            &["cache.direct=off"],
        ),
        ("w-falloc", "preallocation=falloc", &["cache.direct=on"]),
        (
            "w-lazy",
            "lazy_refcounts=on,refcount_bits=1",
            &["cache.direct=off"],
        ),
        (
            "w-subclusters",
            "extended_l2=on,cluster_size=128k",
            &["cache.direct=off"],
        ),
        (
            "w-wide",
            "refcount_bits=64,cluster_size=4k",
            &["cache.direct=off", "pass-discard-other=on"],
        ),
    ]
    .into_iter()
    .enumerate()
    {
        let image = create(&daemon, name, options);
        fill(&image, i as u64 + 40);
        let mut model = read_with_qemu(&image);
        add_writable(&daemon, name, &image, more);
        let mut client = Client::connect(&daemon.socket(name), 1, 1, 1 << 20);
        change(&mut client, &mut model, i as u64 + 1, 300);
        drop(client);
        compare(&daemon, name, &model);
        daemon.ctl(&["export", "remove", name]);
        daemon.ctl(&["node", "remove", name]);
        assert_sound(&image);
        assert_same(&read_with_qemu(&image), &model, 0, name);
        // And QEMU goes on with it.
        fill(&image, i as u64 + 90);
        assert_sound(&image);
    }
}

#[test]
fn external_data_files_go_both_ways() {
    let daemon = Daemon::start(&[]);
    for (i, (name, options, ours)) in [
        ("x-plain", "", false),
        ("x-raw", "data_file_raw=on", false),
        ("x-sub", "extended_l2=on,cluster_size=128k", false),
        ("x-ours", "data-file-raw=off", true),
        ("x-ours-raw", "data-file-raw=on", true),
    ]
    .into_iter()
    .enumerate()
    {
        let raw = name.ends_with("raw");
        let data = daemon.path(&format!("{name}.data"));
        let size = SIZE.to_string();
        let image = if ours {
            let image = daemon.path(&format!("{name}.qcow2"));
            let named = format!("data-file={}", data.display());
            daemon.ctl(&["image", "create", text(&image), &size, &named, options]);
            let info = daemon.ctl_json(&["image", "info", text(&image)]);
            assert_eq!(info["data-file"], text(&data));
            assert_eq!(info["data-file-raw"], raw);
            image
        } else {
            let more = format!("data_file={},{options}", data.display());
            create(&daemon, name, more.trim_end_matches(','))
        };
        fill(&image, i as u64 + 200);
        let mut model = read_with_qemu(&image);
        let filename = format!("data-file.filename={}", data.display());
        let more = ["data-file.driver=file", &filename];
        add_writable(&daemon, name, &image, &more);
        let mut client = Client::connect(&daemon.socket(name), 1, 1, 1 << 20);
        change(&mut client, &mut model, i as u64 + 20, 300);
        drop(client);
        compare(&daemon, name, &model);
        // Its size changes with the disk's.
        daemon.ctl(&["node", "resize", name, "+1M"]);
        model.resize(model.len() + (1 << 20), 0);
        let (_, e) = daemon.ctl_error(&["snapshot", "create", name, "s"]);
        assert!(e.contains("external data file"), "{e}");
        daemon.ctl(&["export", "remove", name]);
        daemon.ctl(&["node", "remove", name]);
        assert_sound(&image);
        assert_same(&read_with_qemu(&image), &model, 0, name);
        assert_eq!(std::fs::metadata(&data).unwrap().len(), SIZE + MIB);
        if raw {
            assert_same(&std::fs::read(&data).unwrap(), &model, 0, name);
        }
        // And QEMU goes on with it.
        fill(&image, i as u64 + 300);
        assert_sound(&image);
    }
    // A renamed data file.
    let image = daemon.path("x-ours.qcow2");
    let renamed = daemon.path("renamed.data");
    std::fs::rename(daemon.path("x-ours.data"), &renamed).unwrap();
    let name = format!("data-file={}", renamed.display());
    daemon.ctl(&["image", "amend", text(&image), &name]);
    assert_eq!(read_with_qemu(&image).len() as u64, SIZE + MIB);
}

/// Clusters that the guest gives up keep their places, and the storage gets their space.
#[test]
fn discarded_clusters_keep_their_places() {
    let daemon = Daemon::start(&[]);
    let image = create(&daemon, "kept", "");
    let write = ["-f", "qcow2", "-c", "write -P 7 0 16M", text(&image)];
    tool("qemu-io", &write);
    add_writable(&daemon, "kept", &image, &["discard-no-unref=on"]);
    let allocated = || {
        use std::os::unix::fs::MetadataExt;
        std::fs::metadata(&image).unwrap().blocks() * 512
    };
    let mut client = Client::connect(&daemon.socket("kept"), 1, 1, 1 << 20);
    assert!(allocated() > 15 * MIB);
    assert_eq!(client.discard(0, 8 * MIB), 0);
    assert_eq!(client.write_zeroes(8 * MIB, 4 * MIB, true), 0);
    assert!(allocated() < 5 * MIB, "{}", allocated());
    let before = std::fs::metadata(&image).unwrap().len();
    for at in (0..12).rev() {
        assert_eq!(client.write(at * MIB, &vec![9; MIB as usize]), 0);
    }
    drop(client);
    daemon.ctl(&["export", "remove", "kept"]);
    daemon.ctl(&["node", "remove", "kept"]);
    // Nothing was put elsewhere, and what was one piece still is.
    assert!(std::fs::metadata(&image).unwrap().len() <= before);
    let map = daemon.ctl_json(&["image", "map", text(&image)]);
    assert_eq!(map[0]["length"], 16 * MIB, "{map}");
    assert_sound(&image);
}

#[test]
fn overlays_are_written_and_what_is_below_is_not() {
    let daemon = Daemon::start(&[]);
    for (name, options, base_format) in [
        ("o3", "", "qcow2"),
        ("o2", "compat=0.10", "raw"),
        ("osub", "extended_l2=on,cluster_size=64k", "qcow2"),
    ] {
        let base = daemon.path(&format!("{name}.base"));
        tool(
            "qemu-img",
            &["create", "-q", "-f", base_format, text(&base), "20M"],
        );
        let write = ["-f", base_format, "-c", "write -P 9 1M 18M", text(&base)];
        tool("qemu-io", &write);
        let before = std::fs::read(&base).unwrap();
        let image = daemon.path(&format!("{name}.qcow2"));
        let size = SIZE.to_string();
        let mut args = vec!["create", "-q", "-f", "qcow2", "-F", base_format];
        args.extend(["-b", text(&base)]);
        if !options.is_empty() {
            args.extend(["-o", options]);
        }
        args.extend([text(&image), &size]);
        tool("qemu-img", &args);
        let mut model = read_with_qemu(&image);
        let driver = format!("backing.driver={base_format}");
        let filename = format!("backing.file.filename={}", base.display());
        let backing = [driver.as_str(), "backing.file.driver=file", &filename];
        add_writable(&daemon, name, &image, &backing);
        let mut client = Client::connect(&daemon.socket(name), 1, 1, 1 << 20);
        change(&mut client, &mut model, 7, 300);
        drop(client);
        compare(&daemon, name, &model);
        daemon.ctl(&["node", "resize", name, "+1M"]);
        model.resize(model.len() + (1 << 20), 0);
        compare(&daemon, name, &model);
        daemon.ctl(&["export", "remove", name]);
        daemon.ctl(&["node", "remove", name]);
        assert_sound(&image);
        assert_same(&read_with_qemu(&image), &model, 0, name);
        assert!(std::fs::read(&base).unwrap() == before);
    }
}

/// A daemon that is killed while queues on several threads write.
#[test]
fn what_was_flushed_survives_kill() {
    for (round, engine) in ["uring", "threads", "aio"].into_iter().enumerate() {
        let mut daemon = Daemon::start(&["--io-engine", engine, "--io-threads", "2"]);
        let image = create(&daemon, "d0", "cluster_size=4k");
        add_writable(&daemon, "d0", &image, &[]);
        let mut client = Client::connect(&daemon.socket("d0"), 1, 1, 1 << 20);
        let mut model = vec![0; SIZE as usize];
        change(&mut client, &mut model, round as u64 + 11, 400);
        assert_eq!(client.flush(), 0);
        drop(client);
        // More, of which nothing is flushed, elsewhere.
        let mut client = Client::connect(&daemon.socket("d0"), 2, 64, 4096);
        client.start_writes(SIZE / 2);
        daemon.kill();
        drop(client);
        // The kernel lets go of the image when the last request in flight has ended.
        let out = vdisk_qemu_tests::wait_for("the image's lock", || {
            let check = ["check", "-f", "qcow2", "--output=json", text(&image)];
            let out = Command::new("qemu-img").args(check).output().ok()?;
            (!out.stdout.is_empty()).then_some(out)
        });
        let report = String::from_utf8_lossy(&out.stdout).into_owned();
        // 3: leaks and nothing else.
        assert!(matches!(out.status.code(), Some(0 | 3)), "{report}");
        let got = read_with_qemu(&image);
        let half = (SIZE / 2) as usize;
        assert_same(&got[half..], &model[half..], SIZE / 2, engine);
    }
}

#[test]
fn what_cannot_be_opened_is_refused_by_name() {
    let daemon = Daemon::start(&[]);
    let refused = |image: &Path, more: &[&str], messages: &[&str]| {
        let filename = format!("file.filename={}", image.display());
        let mut args = vec![
            "node",
            "add",
            "bad",
            "driver=qcow2",
            "file.driver=file",
            &filename,
        ];
        args.extend(more);
        let (_, e) = daemon.ctl_error(&args);
        for message in messages {
            assert!(e.contains(message), "{e}");
        }
    };
    let plain = create(&daemon, "plain", "");
    let raw = daemon.image("raw", MIB);
    refused(&raw, &["read-only=on"], &["not a qcow2 image"]);
    let data = daemon.path("data");
    let external = create(
        &daemon,
        "external",
        &format!("data_file={}", data.display()),
    );
    refused(
        &external,
        &["read-only=on"],
        &["data in another file", "/data'", "'data-file'"],
    );
    let here = format!("data-file.filename={}", data.display());
    let data_file = ["data-file.driver=file", &here];
    refused(&plain, &data_file, &["in itself", "'data-file'"]);
    let old = create(&daemon, "old", "compat=0.10");
    refused(&old, &["discard-no-unref=on"], &["version 2"]);
    daemon.ctl(&[
        "node",
        "add",
        "writable",
        "driver=file",
        &format!("filename={}", plain.display()),
    ]);
    daemon.ctl(&["node", "add", "image", "driver=qcow2", "file=writable"]);
    // One image, one owner.
    let second = ["node", "add", "bad", "driver=qcow2", "file=writable"];
    let (_, e) = daemon.ctl_error(&second);
    assert!(e.contains("'writable'") && e.contains("'image'"), "{e}");
    let (_, e) = daemon.ctl_error(&["node", "resize", "writable", "+1M"]);
    assert!(e.contains("'image'"), "{e}");
    daemon.ctl(&["node", "remove", "image"]);
    let args = [
        "node",
        "add",
        "bad",
        "driver=qcow2",
        "read-only=on",
        "file=writable",
    ];
    let (_, e) = daemon.ctl_error(&args);
    assert!(e.contains("'writable' can be written"), "{e}");
    // Cut off in the middle of its tables: reads fail, the daemon stays.
    let cut = create(&daemon, "cut", "");
    fill(&cut, 3);
    let file = std::fs::OpenOptions::new().write(true).open(&cut).unwrap();
    file.set_len(4 * 65536).unwrap();
    add(&daemon, "cut", &cut, &[]);
    export(&daemon, "cut");
    let mut client = Client::connect(&daemon.socket("cut"), 1, 1, 1 << 20);
    let mut buf = vec![0; 1 << 20];
    assert_eq!(client.read(0, &mut buf), -libc::EIO);
    drop(client);
    assert!(daemon.ctl(&["tree"]).contains("cut"));
}

/// The last cluster of a file may be there in part; all of it can be written, and read again.
#[test]
fn a_last_cluster_that_ends_early_is_written() {
    let daemon = Daemon::start(&[]);
    let images = [
        ("subclusters", "extended_l2=on,cluster_size=128k", false),
        ("plain", "", true),
        ("short", "", false),
    ];
    for (name, options, preallocated) in images {
        let image = create(&daemon, name, options);
        let len = if preallocated { "64k" } else { "4k" };
        let write = format!("write -q -P 1 0 {len}");
        tool("qemu-io", &["-f", "qcow2", "-c", &write, text(&image)]);
        if name != "subclusters" {
            let file = std::fs::File::options().write(true).open(&image).unwrap();
            let size = file.metadata().unwrap().len();
            file.set_len(size / 65536 * 65536 - 61440).unwrap();
        }
        let filename = format!("file.filename={}", image.display());
        let add = ["node", "add", name, "driver=qcow2", "file.driver=file"];
        daemon.ctl(&[&add[..], &[&filename]].concat());
        daemon.export_node(name, name, &[]);
        let mut client = Client::connect(&daemon.socket(name), 1, 1, 1 << 20);
        assert_eq!(client.write(32768, &[2; 4096]), 0, "{name}");
        let mut data = vec![0; 1 << 17];
        assert_eq!(client.read(0, &mut data), 0, "{name}");
        assert_eq!(data[..4096], [1; 4096], "{name}");
        assert_eq!(data[32768..36864], [2; 4096], "{name}");
        daemon.ctl(&["export", "remove", name]);
        daemon.ctl(&["node", "remove", name]);
        let disk = read_with_qemu(&image);
        assert!(disk.starts_with(&data), "{name}");
    }
}
