//! `vdiskctl image …` and `vdiskctl snapshot …`, held against what QEMU's tools say of the same images.

#[path = "../../daemon/qcow2/tests/memory/mod.rs"]
mod memory;

use std::path::Path;
use std::process::Command;

use memory::{Memory, Random, after_power_cut, block_on, open};
use serde_json::Value;
use vdisk_io::IoVecs;
use vdisk_qcow2::{Children, Compression, CreateOptions, Image, Options};
use vdisk_qemu_tests::Daemon;
use vdisk_qemu_tests::blk_client::Client;
use vdisk_qemu_tests::qemu_tools::{assert_sound, read_with_qemu, text, tool};

const MIB: u64 = 1 << 20;

fn json(args: &[&str]) -> Value {
    serde_json::from_str(&tool("qemu-img", args)).expect("qemu-img prints JSON")
}

fn serve(daemon: &Daemon, id: &str, image: &Path) {
    let filename = format!("file.filename={}", image.display());
    let args = [
        "node",
        "add",
        id,
        "driver=qcow2",
        "discard=unmap",
        "file.driver=file",
        &filename,
    ];
    daemon.ctl(&args);
    daemon.export_node(id, id, &[]);
}

fn stop(daemon: &Daemon, id: &str) {
    daemon.ctl(&["export", "remove", id]);
    daemon.ctl(&["node", "remove", id]);
}

#[test]
fn new_images_are_what_qemu_makes_of_the_same_options() {
    let daemon = Daemon::start(&[]);
    for (i, options) in [
        &[][..],
        &["version=v2"],
        &["cluster-size=512"],
        &["cluster-size=2M", "preallocation=metadata"],
        &["preallocation=falloc"],
        &["preallocation=full", "cluster-size=4k"],
        &[
            "extended-l2=on",
            "cluster-size=128k",
            "preallocation=metadata",
        ],
        &["refcount-bits=1", "lazy-refcounts=on"],
        &["refcount-bits=64", "compression-type=zstd"],
        &["backing-file=base.img", "backing-fmt=raw"],
    ]
    .into_iter()
    .enumerate()
    {
        let ours = daemon.path(&format!("ours{i}.qcow2"));
        let mut args = vec!["image", "create", text(&ours), "20M"];
        args.extend(options);
        daemon.ctl(&args);
        if !options.iter().any(|o| o.starts_with("backing")) {
            assert_sound(&ours);
        }
        let theirs = daemon.path(&format!("theirs{i}.qcow2"));
        let mut given: Vec<String> = options.iter().map(|o| o.replace('-', "_")).collect();
        for o in &mut given {
            *o = o.replace("version=v2", "compat=0.10");
        }
        let mut args = vec!["create", "-q", "-u", "-f", "qcow2"];
        for o in &given {
            args.extend(["-o", o]);
        }
        args.extend([text(&theirs), "20M"]);
        tool("qemu-img", &args);
        let info = |path: &Path| {
            let mut v = json(&["info", "--output=json", "-f", "qcow2", text(path)]);
            let v = v.as_object_mut().unwrap();
            v.retain(|k, _| !matches!(k.as_str(), "filename" | "actual-size" | "children"));
            Value::Object(v.clone())
        };
        assert_eq!(info(&ours), info(&theirs), "{options:?}");
        if !options.iter().any(|o| o.starts_with("backing")) {
            let map = json(&["map", "--output=json", "-f", "qcow2", text(&ours)]);
            let allocated = map[0]["present"].as_bool() == Some(true);
            let preallocated = options.iter().any(|o| o.starts_with("preallocation"));
            assert_eq!(allocated, preallocated, "{options:?}: {map}");
            // And it measures what it takes.
            let mut args = vec!["image", "measure", "20M"];
            args.extend(options);
            let measured = daemon.ctl_json(&args);
            let mut args = vec!["measure", "--output=json", "-O", "qcow2", "--size", "20M"];
            for o in given.iter().filter(|o| !o.starts_with("lazy")) {
                args.extend(["-o", o]);
            }
            let theirs = json(&args);
            assert_eq!(measured["required"], theirs["required"], "{options:?}");
        }
        // What is there is not lost by accident.
        let (code, e) = daemon.ctl_error(&["image", "create", text(&ours), "1M"]);
        assert!(code == 4 && e.contains("overwrite"), "{e}");
    }
    // A copy of an image takes what QEMU says, and what the copy takes.
    let base = daemon.path("base.qcow2");
    tool(
        "qemu-img",
        &["create", "-q", "-f", "qcow2", text(&base), "20M"],
    );
    let overlay = daemon.path("overlay.qcow2");
    tool("qemu-io", &["-c", "write -q 5000 9M", text(&base)]);
    let backing = ["-F", "qcow2", "-b", text(&base), text(&overlay)];
    tool(
        "qemu-img",
        &[&["create", "-q", "-f", "qcow2"][..], &backing].concat(),
    );
    for write in ["write -q 12M 3M", "write -q -z 2M 1M", "write -q 19M 1M"] {
        tool("qemu-io", &["-c", write, text(&overlay)]);
    }
    let below = format!("backing.file.filename={}", base.display());
    let source = [
        "--source",
        "backing.driver=qcow2",
        "--source",
        "backing.file.driver=file",
        "--source",
        &below,
    ];
    for cluster in ["65536", "4096", "2097152"] {
        let size = format!("cluster-size={cluster}");
        let measure = ["image", "measure", text(&overlay), &size];
        let measured = daemon.ctl_json(&[&measure[..], &source].concat());
        let size = format!("cluster_size={cluster}");
        let theirs = json(&[
            "measure",
            "--output=json",
            "-O",
            "qcow2",
            "-o",
            &size,
            text(&overlay),
        ]);
        assert_eq!(measured["required"], theirs["required"], "{cluster}");
    }
    assert!(
        daemon
            .ctl_json(&["node", "list"])
            .as_array()
            .unwrap()
            .is_empty()
    );
    daemon.ctl(&["node", "add", "null", "driver=null-co", "size=1M"]);
    let (_, e) = daemon.ctl_error(&["image", "measure", "null", "cluster-size=0"]);
    assert!(e.contains("cluster"), "{e}");
    daemon.ctl(&["node", "remove", "null"]);
    let (_, e) = daemon.ctl_error(&["image", "measure", "nobody"]);
    assert!(e.contains("there is no node 'nobody'"), "{e}");
    let ours = daemon.path("ours0.qcow2");
    daemon.ctl(&["image", "create", text(&ours), "1M", "--overwrite"]);
    assert_eq!(
        daemon.ctl_json(&["image", "info", text(&ours)])["virtual-size"],
        MIB
    );
    let raw = daemon.path("raw.img");
    daemon.ctl(&[
        "image",
        "create",
        "-f",
        "raw",
        text(&raw),
        "3M",
        "preallocation=full",
    ]);
    assert_eq!(std::fs::read(&raw).unwrap(), vec![0; 3 << 20]);
    for (options, message) in [
        (&["cluster-size=3000"][..], "power of two"),
        (&["cluster-size=512", "extended-l2=on"], "16 KiB"),
        (&["version=v2", "refcount-bits=8"], "version 3"),
        (&["bogus=1"], "bogus"),
    ] {
        let path = daemon.path("refused.qcow2");
        let mut args = vec!["image", "create", text(&path), "1M"];
        args.extend(options);
        let (_, e) = daemon.ctl_error(&args);
        assert!(e.contains(message), "{e}");
        assert!(!path.exists());
    }
}

#[test]
fn maps_checks_and_repairs_agree_with_qemu() {
    let daemon = Daemon::start(&[]);
    let image = daemon.path("d.qcow2");
    tool(
        "qemu-img",
        &["create", "-q", "-f", "qcow2", text(&image), "64M"],
    );
    for c in [
        "write -P 1 1M 3M",
        "write -z 8M 1M",
        "write -P 2 20M 512",
        "discard 2M 1M",
    ] {
        tool(
            "qemu-io",
            &["-d", "unmap", "-f", "qcow2", "-c", c, text(&image)],
        );
    }
    let theirs = json(&["map", "--output=json", "-f", "qcow2", text(&image)]);
    let ours = daemon.ctl_json(&["image", "map", text(&image)]);
    let data = |v: &Value, is: &dyn Fn(&Value) -> bool| -> Vec<(u64, u64, u64)> {
        let all = v.as_array().unwrap().iter().filter(|e| is(e));
        all.map(|e| {
            let n = |k: &str| e[k].as_u64().unwrap();
            (n("start"), n("length"), n("offset"))
        })
        .collect()
    };
    assert_eq!(
        data(&ours, &|e| e["kind"] == "data"),
        data(&theirs, &|e| e["data"] == true)
    );
    let clean = daemon.ctl_json(&["image", "check", text(&image)]);
    let theirs = json(&["check", "--output=json", "-f", "qcow2", text(&image)]);
    for key in ["total-clusters", "allocated-clusters", "image-end-offset"] {
        assert_eq!(clean[key], theirs[key], "{key}");
    }

    // The refcount block, whose place is in the refcount table, loses what it had.
    let bytes = std::fs::read(&image).unwrap();
    let word = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap()) as usize;
    let block = word(word(48));
    let damage = |at: usize, value: &[u8]| {
        let mut b = bytes.clone();
        b[at..at + value.len()].copy_from_slice(value);
        std::fs::write(&image, b).unwrap();
    };
    damage(block + 2 * 10, &[0, 7]);
    let (code, e) = daemon.ctl_error(&["image", "check", text(&image)]);
    assert!(code == 1 && e.contains("repair"), "{e}");
    daemon.ctl(&["image", "repair", "--leaks", text(&image)]);
    assert_sound(&image);
    damage(block, &[0; 4096]);
    let (code, e) = daemon.ctl_error(&["image", "check", text(&image)]);
    assert!(code == 1 && e.contains("errors"), "{e}");
    daemon.ctl(&["image", "repair", text(&image)]);
    assert_sound(&image);
    let pattern = "read -P 1 1M 1M";
    let out = tool("qemu-io", &["-f", "qcow2", "-c", pattern, text(&image)]);
    assert!(!out.contains("failed"), "{out}");

    // In use: the file is locked, the node can be checked and repaired.
    serve(&daemon, "d", &image);
    let (code, e) = daemon.ctl_error(&["image", "repair", text(&image)]);
    assert!(code == 4, "{e}");
    let mut client = Client::connect(&daemon.socket("d"), 1, 1, 1 << 20);
    assert_eq!(client.write(30 * MIB, &[5; 4096]), 0);
    daemon.ctl(&["node", "check", "d", "--repair", "all"]);
    let mut got = [0; 4096];
    assert_eq!(client.read(30 * MIB, &mut got), 0);
    assert_eq!(got, [5; 4096]);
    assert_eq!(client.write(31 * MIB, &[6; 4096]), 0);
    drop(client);
    stop(&daemon, "d");
    assert_sound(&image);
}

#[test]
fn amended_images_are_what_qemu_reads() {
    let daemon = Daemon::start(&[]);
    let image = daemon.path("d.qcow2");
    daemon.ctl(&["image", "create", text(&image), "4M", "version=v2"]);
    let info = || json(&["info", "--output=json", "-f", "qcow2", text(&image)]);
    daemon.ctl(&[
        "image",
        "amend",
        text(&image),
        "version=v3",
        "lazy-refcounts=on",
    ]);
    let v = info();
    let data = &v["format-specific"]["data"];
    assert!(
        data["compat"] == "1.1" && data["lazy-refcounts"] == true,
        "{v}"
    );
    daemon.ctl(&[
        "image",
        "amend",
        text(&image),
        "backing-file=/b",
        "backing-fmt=raw",
    ]);
    let v = json(&["info", "-U", "--output=json", "-f", "qcow2", text(&image)]);
    assert!(v["backing-filename"] == "/b" && v["backing-filename-format"] == "raw");
    daemon.ctl(&[
        "image",
        "amend",
        text(&image),
        "backing-file=",
        "version=v2",
    ]);
    assert_eq!(info()["format-specific"]["data"]["compat"], "0.10");
    assert_sound(&image);
    daemon.ctl(&["image", "amend", text(&image), "version=v3"]);
    tool(
        "qemu-io",
        &["-f", "qcow2", "-c", "write -z 0 1M", text(&image)],
    );
    let (code, e) = daemon.ctl_error(&["image", "amend", text(&image), "version=v2"]);
    assert!(code == 1 && e.contains("zero clusters"), "{e}");
}

#[test]
fn snapshots_go_both_ways() {
    let daemon = Daemon::start(&[]);
    for (name, options) in [
        ("plain", "cluster_size=64k"),
        ("tiny", "cluster_size=512"),
        ("v2", "compat=0.10"),
        ("sub", "extended_l2=on"),
    ] {
        let image = daemon.path(&format!("{name}.qcow2"));
        tool(
            "qemu-img",
            &[
                "create",
                "-q",
                "-f",
                "qcow2",
                "-o",
                options,
                text(&image),
                "16M",
            ],
        );
        tool(
            "qemu-io",
            &["-f", "qcow2", "-c", "write -P 1 0 8M", text(&image)],
        );
        tool("qemu-img", &["snapshot", "-c", "theirs", text(&image)]);
        tool(
            "qemu-io",
            &["-f", "qcow2", "-c", "write -P 2 1M 2M", text(&image)],
        );

        serve(&daemon, name, &image);
        let mut client = Client::connect(&daemon.socket(name), 1, 1, 1 << 20);
        assert_eq!(client.write(4 * MIB, &[3; 1 << 20]), 0);
        daemon.ctl(&["snapshot", "create", name, "ours"]);
        assert_eq!(client.write(4 * MIB + 512, &[4; 512]), 0);
        assert_eq!(client.discard(0, MIB), 0);
        let list = daemon.ctl_json(&["snapshot", "list", name]);
        assert_eq!(
            (&list[0]["name"], &list[1]["name"]),
            (&"theirs".into(), &"ours".into())
        );
        let (code, e) = daemon.ctl_error(&["snapshot", "create", name, "ours"]);
        assert!(code == 4 && e.contains("'ours'"), "{e}");
        let mut read = |at: u64| {
            let mut b = [0; 512];
            assert_eq!(client.read(at, &mut b), 0);
            b[0]
        };
        assert_eq!((read(4 * MIB), read(4 * MIB + 512), read(MIB)), (3, 4, 2));
        daemon.ctl(&["snapshot", "apply", name, "theirs"]);
        assert_eq!((read(4 * MIB), read(4 * MIB + 512), read(MIB)), (1, 1, 1));
        daemon.ctl(&["snapshot", "apply", name, "ours"]);
        assert_eq!((read(4 * MIB), read(4 * MIB + 512), read(MIB)), (3, 3, 2));
        daemon.ctl(&["snapshot", "delete", name, "theirs"]);
        let (code, _) = daemon.ctl_error(&["snapshot", "apply", name, "theirs"]);
        assert_eq!(code, 3);
        assert_eq!(client.write(12 * MIB, &[9; 4096]), 0);
        drop(client);
        stop(&daemon, name);
        assert_sound(&image);
        let list = tool("qemu-img", &["snapshot", "-l", text(&image)]);
        assert!(list.contains("ours") && !list.contains("theirs"), "{list}");
        tool("qemu-img", &["snapshot", "-a", "ours", text(&image)]);
        let reads = [
            "-c",
            "read -P 3 4M 1M",
            "-c",
            "read -P 2 1M 2M",
            "-c",
            "read -P 0 12M 4k",
        ];
        let mut args = vec!["-f", "qcow2"];
        args.extend(reads);
        args.push(text(&image));
        let out = tool("qemu-io", &args);
        assert!(!out.contains("failed"), "{name}: {out}");
        tool("qemu-img", &["snapshot", "-d", "ours", text(&image)]);
        assert_sound(&image);
    }
}

/// Compressed clusters, and what power cuts leave, as QEMU's tools see them.
#[test]
fn what_the_engine_leaves_is_sound_to_qemu() {
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    for (seed, compression, cluster_size) in [
        (1, Compression::Deflate, 65536),
        (2, Compression::Zstd, 4096),
        (3, Compression::Deflate, 2048),
    ] {
        let options = CreateOptions {
            compression,
            cluster_size,
            ..CreateOptions::new(2 << 20)
        };
        let empty = Memory::new(Vec::new(), None, false);
        block_on(Image::create(Children::new(empty.clone()), &options)).unwrap();
        let base = empty.data();
        let file = Memory::new(base.clone(), Some(seed), true);
        let image = open(&file, None, Options::default()).unwrap();
        let mut random = Random::new(seed);
        let mut model = vec![0u8; 2 << 20];
        block_on(async {
            image.activate(None).await.unwrap();
            for i in 0..120u64 {
                let cluster = random.below((2 << 20) / cluster_size) * cluster_size;
                let range = cluster as usize..(cluster + cluster_size) as usize;
                match random.below(5) {
                    0 => {
                        let at = range.start + 512 * random.below(cluster_size / 512) as usize;
                        let iov = IoVecs::from_slice(&[i as u8; 512]);
                        image.write(at as u64, iov).await.unwrap();
                        model[at..at + 512].fill(i as u8);
                    }
                    1 => {
                        image
                            .write_zeroes(cluster, cluster_size, true)
                            .await
                            .unwrap();
                        model[range].fill(0);
                    }
                    2 => image.flush().await.unwrap(),
                    _ => {
                        let data: Vec<u8> =
                            (0..cluster_size).map(|b| (b / 300 * i) as u8).collect();
                        let iov = IoVecs::from_slice(&data);
                        image.write_compressed(cluster, iov).await.unwrap();
                        model[range].copy_from_slice(&data);
                    }
                }
                if i % 40 == 39 {
                    image.tidy().await.unwrap();
                }
            }
            image.close().await.unwrap();
        });
        let path = dir.path().join("image.qcow2");
        std::fs::write(&path, file.data()).unwrap();
        assert_sound(&path);
        assert!(read_with_qemu(&path) == model, "seed {seed}");
        // Power cuts: leaks (exit code 3), and nothing else.
        let (log, end) = (file.log(), file.tick());
        for _ in 0..40 {
            let time = 1 + random.below(end);
            std::fs::write(&path, after_power_cut(&base, &log, time, &mut random)).unwrap();
            let check = ["check", "-f", "qcow2", text(&path)];
            let out = Command::new("qemu-img").args(check).output().unwrap();
            assert!(
                matches!(out.status.code(), Some(0 | 3)),
                "seed {seed} at {time}: {out:?}"
            );
        }
    }
}

/// Persistent bitmaps that QEMU has made record what is written here, and QEMU reads them.
#[test]
fn bitmaps_record_writes_and_are_stored() {
    let mut daemon = Daemon::start(&[]);
    let image = daemon.path("d.qcow2");
    tool(
        "qemu-img",
        &["create", "-q", "-f", "qcow2", text(&image), "64M"],
    );
    tool(
        "qemu-io",
        &["-f", "qcow2", "-c", "write -P 1 0 16M", text(&image)],
    );
    let add = |name: &str, more: &[&str]| {
        let mut args = vec!["bitmap", "--add"];
        args.extend(more);
        args.extend([text(&image), name]);
        tool("qemu-img", &args);
    };
    add("fine", &["-g", "64k"]);
    add("coarse", &["-g", "1M"]);
    add("off", &["-g", "64k", "--disable"]);
    serve(&daemon, "d", &image);
    let mut client = Client::connect(&daemon.socket("d"), 1, 1, 1 << 20);
    // On the fast path, on the slow one, and without data.
    assert_eq!(client.write(3 * MIB, &[2; 512]), 0);
    assert_eq!(client.write(40 * MIB + 512, &[3; 4096]), 0);
    assert_eq!(client.write_zeroes(50 * MIB, 128 << 10, true), 0);
    assert_eq!(client.discard(60 * MIB, 64 << 10), 0);
    drop(client);
    // They change with the size of the disk, those that record nothing, too: a longer table, and a shorter one.
    const GIB: u64 = 1 << 30;
    daemon.ctl(&["node", "resize", "d", "40G"]);
    let mut client = Client::connect(&daemon.socket("d"), 1, 1, 1 << 20);
    assert_eq!(client.write(38 * GIB, &[4; 512]), 0);
    assert_eq!(client.write(40 * GIB - 512, &[4; 512]), 0);
    drop(client);
    daemon.ctl(&["node", "resize", "d", "39G", "--shrink"]);
    daemon.ctl(&["node", "resize", "d", "40G"]);
    stop(&daemon, "d");
    assert_sound(&image);

    // QEMU exports a bitmap as a map in which what is dirty has no data.
    let dirty = |name: &str| {
        let socket = image.with_extension(name);
        let nbd = Command::new("qemu-nbd")
            .args([
                "-r",
                "-f",
                "qcow2",
                "-B",
                name,
                "-k",
                text(&socket),
                text(&image),
            ])
            .spawn();
        let mut nbd = nbd.unwrap_or_else(|e| panic!("qemu-nbd: {e}: run 'make setup'"));
        vdisk_qemu_tests::wait_for("qemu-nbd's socket", || socket.exists().then_some(()));
        let options = format!(
            "driver=nbd,server.type=unix,server.path={},x-dirty-bitmap=qemu:dirty-bitmap:{name}",
            socket.display()
        );
        let map = json(&["map", "--output=json", "--image-opts", &options]);
        let _ = nbd.wait();
        let all = map.as_array().unwrap().iter();
        let all = all.filter(|e| e["data"] == false);
        all.map(|e| (e["start"].as_u64().unwrap(), e["length"].as_u64().unwrap()))
            .collect::<Vec<_>>()
    };
    let k64 = 64 << 10;
    assert_eq!(
        dirty("fine"),
        [
            (3 * MIB, k64),
            (40 * MIB, k64),
            (50 * MIB, 2 * k64),
            (60 * MIB, k64),
            (38 * GIB, k64),
        ]
    );
    let coarse = [3, 40, 50, 60, 38 * 1024].map(|m| (m * MIB, MIB));
    assert_eq!(dirty("coarse"), coarse);
    assert_eq!(dirty("off"), []);

    // A daemon that is killed has not stored them: they say so.
    serve(&daemon, "d", &image);
    let info = daemon.ctl_json(&["image", "info", "-U", text(&image)]);
    assert_eq!(info["bitmaps"][0]["in-use"], true, "{info}");
    daemon.kill();
    let in_use = vdisk_qemu_tests::wait_for("the image's lock", || {
        let info = ["info", "--output=json", "-f", "qcow2", text(&image)];
        let out = Command::new("qemu-img").args(info).output().ok()?;
        let v: Value = serde_json::from_slice(&out.stdout).ok()?;
        Some(v["format-specific"]["data"]["bitmaps"].clone())
    });
    let flags = |i: usize| in_use[i]["flags"].to_string();
    assert!(
        flags(0).contains("in-use") && flags(1).contains("in-use"),
        "{in_use}"
    );
    // Those that record nothing could be made to: they are in memory, too.
    assert!(flags(2).contains("in-use"), "{in_use}");
    // They stay so, and the image is served on.
    daemon.start_again();
    serve(&daemon, "d", &image);
    stop(&daemon, "d");
    assert_sound(&image);
    let info = daemon.ctl_json(&["image", "info", text(&image)]);
    assert_eq!(info["bitmaps"][0]["in-use"], true, "{info}");
}

/// Names inside images are followed into the folders that the configuration gives for that, and nowhere else.
#[test]
fn names_inside_images_are_followed_where_that_is_allowed() {
    let dir = vdisk_qemu_tests::scratch();
    let at = |name: &str| dir.path().join(name);
    let (images, elsewhere) = (at("images"), at("elsewhere"));
    for folder in [&images, &elsewhere] {
        std::fs::create_dir(folder).unwrap();
        std::fs::write(folder.join("base.img"), vec![7; MIB as usize]).unwrap();
    }
    let config = at("vdiskd.toml");
    let allowed = format!("[images]\nfollow = [\"{}\"]\n", images.display());
    std::fs::write(&config, allowed).unwrap();
    let overlay = |folder: &Path, name: &str, backing: &str, format: &str| {
        let image = folder.join(name);
        let create = ["create", "-q", "-u", "-f", "qcow2", "-F", format, "-b"];
        tool(
            "qemu-img",
            &[&create[..], &[backing, text(&image), "1M"]].concat(),
        );
        image
    };
    overlay(&images, "middle.qcow2", "base.img", "raw");
    let top = overlay(&elsewhere, "top.qcow2", "../images/middle.qcow2", "qcow2");
    tool("qemu-io", &["-c", "write -q -P 9 64k 64k", text(&top)]);
    let want = read_with_qemu(&top);
    let mut daemon = Daemon::start(&["--config", text(&config)]);
    let add = |daemon: &Daemon, name: &str, image: &Path| {
        let filename = format!("file.filename={}", image.display());
        let words = ["node", "add", name, "driver=qcow2", "file.driver=file"];
        daemon.try_ctl(&[&words[..], &[&filename]].concat())
    };
    assert!(add(&daemon, "top", &top).status.success());
    daemon.export_node("top", "top", &[]);
    for _ in 0..2 {
        let mut client = Client::connect(&daemon.socket("top"), 1, 1, 1 << 20);
        let mut disk = vec![0; MIB as usize];
        assert_eq!(client.read(0, &mut disk), 0);
        assert!(disk == want);
        drop(client);
        // What was found is found again, whatever the image names by then.
        daemon.kill();
        daemon.go_on();
    }
    std::os::unix::fs::symlink(elsewhere.join("base.img"), images.join("link.img")).unwrap();
    // As QEMU made them once, without the extension that has the format.
    let unformatted = overlay(&images, "u", "base.img", "raw");
    let mut bytes = std::fs::read(&unformatted).unwrap();
    let mut words = bytes.chunks_mut(8);
    let extension = words.find(|w| w.starts_with(&[0xe2, 0x79, 0x2a, 0xca]));
    extension.unwrap()[..4].copy_from_slice(b"none");
    std::fs::write(&unformatted, bytes).unwrap();
    let json = r#"json:{"driver":"null-co"}"#;
    for (image, why) in [
        (
            overlay(&elsewhere, "a", "base.img", "raw"),
            "are followed into",
        ),
        (
            overlay(&images, "b", "link.img", "raw"),
            "are followed into",
        ),
        (
            overlay(&images, "c", "../elsewhere/base.img", "raw"),
            "are followed into",
        ),
        (overlay(&images, "d", json, "raw"), "not the path of a file"),
        (
            overlay(&images, "e", "nbd://host/base", "raw"),
            "not the path of a file",
        ),
        (overlay(&images, "f", "f", "qcow2"), "name each other"),
        (overlay(&images, "g", "nothing", "raw"), "cannot be found"),
        (overlay(&images, "h", "base.img", "vmdk"), "'vmdk'"),
        (unformatted, "without its format"),
    ] {
        let out = add(&daemon, "refused", &image);
        let message = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(!out.status.success() && message.contains(why), "{message}");
    }
}
