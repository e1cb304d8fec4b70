//! Encrypted images, made by QEMU's tools and by vdiskd, each read and written by the other.

use std::path::{Path, PathBuf};

use vdisk_qemu_tests::Daemon;
use vdisk_qemu_tests::blk_client::Client;
use vdisk_qemu_tests::qemu_tools::{text, tool};
use vdisk_qemu_tests::workload::{assert_same, change, compare};

const MIB: u64 = 1 << 20;
const SIZE: u64 = 8 * MIB;
const PASSPHRASE: &str = "a secret that nobody is told";

/// A daemon that knows the passphrase as secret `key`.
fn daemon() -> Daemon {
    let daemon = Daemon::start(&[]);
    let file = daemon.path("passphrase");
    std::fs::write(&file, PASSPHRASE).unwrap();
    daemon.ctl(&["secret", "add", "key", "--file", text(&file)]);
    daemon
}

/// Arguments that give QEMU's tools the passphrase.
fn object() -> String {
    format!("secret,id=key,data={PASSPHRASE}")
}

/// The image as QEMU's option string.
fn options(format: &str, image: &Path) -> String {
    let key = match format {
        "luks" => "key-secret=key",
        _ => "encrypt.format=luks,encrypt.key-secret=key",
    };
    format!("driver={format},{key},file.filename={}", image.display())
}

fn read_with_qemu(format: &str, image: &Path) -> Vec<u8> {
    let raw = image.with_extension("raw");
    let options = options(format, image);
    let object = object();
    let args = [
        "convert",
        "--object",
        &object,
        "--image-opts",
        &options,
        "-O",
        "raw",
        text(&raw),
    ];
    tool("qemu-img", &args);
    std::fs::read(raw).unwrap()
}

fn write_with_qemu(format: &str, image: &Path, commands: &[&str]) {
    let (options, object) = (options(format, image), object());
    let mut args = vec!["--object", &object, "--image-opts"];
    for c in commands {
        args.extend(["-c", c]);
    }
    args.push(&options);
    tool("qemu-io", &args);
}

fn add(daemon: &Daemon, id: &str, format: &str, image: &Path, more: &[&str]) {
    let filename = format!("file.filename={}", image.display());
    let driver = format!("driver={format}");
    let mut args = vec![
        "node",
        "add",
        id,
        &driver,
        "discard=unmap",
        "file.driver=file",
        &filename,
    ];
    match format {
        "luks" => args.push("key-secret=key"),
        _ => args.extend(["encrypt.format=luks", "encrypt.key-secret=key"]),
    }
    args.extend(more);
    daemon.ctl(&args);
    daemon.export_node(id, id, &[]);
}

/// Small reads go straight to the storage, and are decrypted where they came to.
fn reads_are_fast(daemon: &Daemon, id: &str, client: &mut Client, model: &[u8]) {
    let slow = || daemon.ctl_json(&["stats"])["exports"][id]["slow"].clone();
    let before = slow();
    for sectors in 1..=7 {
        let mut got = vec![0; sectors * 512];
        assert_eq!(client.read(MIB, &mut got), 0);
        assert_same(&got, &model[MIB as usize..][..got.len()], MIB, id);
    }
    assert_eq!(slow(), before, "{id}: reads of data that is in one place");
    for i in 0..200 {
        let at = i * 7919 % (model.len() / 512 - 256) * 512;
        let mut got = vec![0; (1 + i % 256) * 512];
        assert_eq!(client.read(at as u64, &mut got), 0);
        assert_same(&got, &model[at..][..got.len()], at as u64, id);
    }
}

/// Both write to it in turns, and read what the other has written.
fn go_both_ways(daemon: &Daemon, id: &str, format: &str, image: &Path, more: &[&str], seed: u64) {
    let commands = [
        "write -P 5 100k 3M",
        "write -z 200k 100k",
        "write -P 6 5000k 999k",
    ];
    write_with_qemu(format, image, &commands);
    let mut model = read_with_qemu(format, image);
    assert_eq!(model.len() as u64, SIZE);
    add(daemon, id, format, image, more);
    compare(daemon, id, &model);
    let mut client = Client::connect(&daemon.socket(id), 1, 1, 1 << 20);
    change(&mut client, &mut model, seed, 200);
    // Nothing that the guest writes is in the file as it is.
    let mark = b"here is what must not be read by others ";
    let marks = mark.repeat(100)[..3584].to_vec();
    assert_eq!(client.write(MIB, &marks), 0);
    model[MIB as usize..MIB as usize + marks.len()].copy_from_slice(&marks);
    assert_eq!(client.flush(), 0);
    reads_are_fast(daemon, id, &mut client, &model);
    drop(client);
    compare(daemon, id, &model);
    let file = std::fs::read(image).unwrap();
    assert!(!file.windows(mark.len()).any(|w| w == mark), "{id}");
    daemon.ctl(&["export", "remove", id]);
    daemon.ctl(&["node", "remove", id]);
    assert_same(&read_with_qemu(format, image), &model, 0, id);
    if format == "qcow2" {
        let (options, object) = (options(format, image), object());
        tool(
            "qemu-img",
            &["check", "-q", "--object", &object, "--image-opts", &options],
        );
        // The LUKS header is a part of the image that is counted.
        daemon.ctl(&["image", "check", text(image)]);
    }
}

fn create_with_qemu(daemon: &Daemon, id: &str, format: &str, more: &str) -> PathBuf {
    let image = daemon.path(&format!("{id}.{format}"));
    let object = object();
    let options = match format {
        "luks" => format!("key-secret=key,iter-time=10{}", more),
        _ => format!("encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10{more}"),
    };
    let size = SIZE.to_string();
    let args = [
        "create",
        "-q",
        "-f",
        format,
        "--object",
        &object,
        "-o",
        &options,
        text(&image),
        &size,
    ];
    tool("qemu-img", &args);
    image
}

#[test]
fn images_made_by_qemu() {
    let daemon = daemon();
    for (i, (id, format, options, more)) in [
        ("luks", "luks", "", &["cache.direct=on"][..]),
        ("luks128", "luks", ",cipher-alg=aes-128,hash-alg=sha1", &[]),
        ("luks512", "luks", ",hash-alg=sha512", &[]),
        ("qcow2", "qcow2", "", &[]),
        ("direct", "qcow2", ",cluster_size=4k", &["cache.direct=on"]),
        (
            "subclusters",
            "qcow2",
            ",extended_l2=on,encrypt.cipher-alg=aes-128",
            &[],
        ),
        (
            "metadata",
            "qcow2",
            ",preallocation=metadata",
            &["discard-no-unref=on"],
        ),
    ]
    .into_iter()
    .enumerate()
    {
        let image = create_with_qemu(&daemon, id, format, options);
        go_both_ways(&daemon, id, format, &image, more, i as u64 + 1);
    }
    assert!(!daemon.log().contains(PASSPHRASE));
}

#[test]
fn images_made_by_vdiskd() {
    let daemon = daemon();
    let size = SIZE.to_string();
    for (i, (id, format, options)) in [
        ("luks", "luks", &["key-secret=key", "iter-time=10"][..]),
        (
            "full",
            "luks",
            &[
                "key-secret=key",
                "iter-time=10",
                "hash-alg=sha1",
                "cipher-alg=aes-128",
                "preallocation=full",
            ],
        ),
        ("qcow2", "qcow2", &[]),
        (
            "tiny",
            "qcow2",
            &["cluster-size=512", "encrypt.hash-alg=sha512"],
        ),
        (
            "metadata",
            "qcow2",
            &["preallocation=metadata", "extended-l2=on"],
        ),
    ]
    .into_iter()
    .enumerate()
    {
        let image = daemon.path(&format!("{id}.{format}"));
        let mut args = vec!["image", "create", "-f", format, text(&image), &size];
        args.extend(options);
        if format == "qcow2" {
            args.extend([
                "encrypt.format=luks",
                "encrypt.key-secret=key",
                "encrypt.iter-time=10",
            ]);
        }
        daemon.ctl(&args);
        if options.iter().any(|o| o.starts_with("preallocation")) {
            let zeroes = vec![0; SIZE as usize];
            assert_same(&read_with_qemu(format, &image), &zeroes, 0, id);
        }
        let info = daemon.ctl_json(&["image", "info", "-f", format, text(&image)]);
        assert_eq!(info["virtual-size"], SIZE, "{info}");
        let len = std::fs::metadata(&image).unwrap().len();
        go_both_ways(&daemon, id, format, &image, &[], i as u64 + 30);
        let mut args = vec!["image", "measure", "-f", format, &size];
        args.extend(options);
        if format == "qcow2" {
            args.extend(["encrypt.format=luks", "encrypt.key-secret=key"]);
        }
        let measured = daemon.ctl_json(&args)["required"].as_u64().unwrap();
        assert!(
            len <= measured && measured < len + 2 * MIB,
            "{id}: {len}, {measured}"
        );
    }
}

#[test]
fn external_data_files_are_encrypted() {
    let daemon = daemon();
    for (i, (id, ours)) in [("x-qemu", false), ("x-ours", true)]
        .into_iter()
        .enumerate()
    {
        let data = daemon.path(&format!("{id}.data"));
        let named = format!("data-file={}", data.display());
        let image = match ours {
            true => {
                let image = daemon.path(&format!("{id}.qcow2"));
                let start = ["image", "create", text(&image), &SIZE.to_string(), &named];
                let more = [
                    "preallocation=metadata",
                    "encrypt.format=luks",
                    "encrypt.key-secret=key",
                    "encrypt.iter-time=10",
                ];
                daemon.ctl(&[&start[..], &more].concat());
                let zeroes = vec![0; SIZE as usize];
                assert_same(&read_with_qemu("qcow2", &image), &zeroes, 0, id);
                image
            }
            false => {
                let more = format!(",data_file={}", data.display());
                create_with_qemu(&daemon, id, "qcow2", &more)
            }
        };
        let filename = format!("data-file.filename={}", data.display());
        let more = ["data-file.driver=file", &filename];
        go_both_ways(&daemon, id, "qcow2", &image, &more, i as u64 + 50);
        let mark = b"here is what must not be read by others ";
        let file = std::fs::read(&data).unwrap();
        assert!(!file.windows(mark.len()).any(|w| w == mark), "{id}");
        // What is new of it reads as zeroes.
        let mut model = read_with_qemu("qcow2", &image);
        add(&daemon, id, "qcow2", &image, &more);
        daemon.ctl(&["node", "resize", id, "+1M"]);
        model.resize(model.len() + MIB as usize, 0);
        let mut client = Client::connect(&daemon.socket(id), 1, 1, 1 << 20);
        assert_eq!(client.write(SIZE + 512, &[7; 512]), 0);
        model[SIZE as usize + 512..][..512].fill(7);
        drop(client);
        compare(&daemon, id, &model);
        daemon.ctl(&["export", "remove", id]);
        daemon.ctl(&["node", "remove", id]);
        assert_same(&read_with_qemu("qcow2", &image), &model, 0, id);
    }
    let image = daemon.path("raw.qcow2");
    let (code, e) = daemon.ctl_error(&[
        "image",
        "create",
        text(&image),
        "1M",
        "data-file=raw.data",
        "data-file-raw=on",
        "encrypt.format=luks",
        "encrypt.key-secret=key",
    ]);
    assert!(code == 2 && e.contains("'data-file-raw'"), "{code}: {e}");
    assert!(!image.exists() && !daemon.path("raw.data").exists());
}

#[test]
fn copies_for_encrypted_targets_are_not_compressed() {
    let daemon = daemon();
    let image = create_with_qemu(&daemon, "target", "qcow2", "");
    add(&daemon, "target", "qcow2", &image, &[]);
    daemon.ctl(&["export", "remove", "target"]);
    let disk = daemon.image("disk.img", SIZE);
    let filename = format!("file.filename={}", disk.display());
    let disk = [
        "node",
        "add",
        "disk",
        "driver=raw",
        "file.driver=file",
        &filename,
    ];
    daemon.ctl(&disk);
    let copy = "backup,node=disk,target=target,sync=full,compress=on,job-id=copy";
    let (_, e) = daemon.ctl_error(&["transaction", copy]);
    assert!(
        e.contains("'target' is encrypted") && e.contains("leave out 'compress'"),
        "{e}"
    );
}

#[test]
fn snapshots_and_resizes_of_encrypted_images() {
    let daemon = daemon();
    let image = create_with_qemu(&daemon, "snap", "qcow2", "");
    add(&daemon, "snap", "qcow2", &image, &[]);
    let mut client = Client::connect(&daemon.socket("snap"), 1, 1, 1 << 20);
    let mut model = vec![0; SIZE as usize];
    change(&mut client, &mut model, 3, 100);
    let before = model.clone();
    daemon.ctl(&["snapshot", "create", "snap", "s1"]);
    change(&mut client, &mut model, 4, 100);
    drop(client);
    compare(&daemon, "snap", &model);
    daemon.ctl(&["snapshot", "apply", "snap", "s1"]);
    compare(&daemon, "snap", &before);
    daemon.ctl(&["node", "resize", "snap", "+1M"]);
    model = before;
    model.resize(model.len() + MIB as usize, 0);
    compare(&daemon, "snap", &model);
    daemon.ctl(&["export", "remove", "snap"]);
    daemon.ctl(&["node", "remove", "snap"]);
    assert_same(&read_with_qemu("qcow2", &image), &model, 0, "snap");
}

#[test]
fn what_cannot_be_opened_is_refused_by_name() {
    let daemon = daemon();
    let luks = create_with_qemu(&daemon, "luks", "luks", "");
    let qcow2 = create_with_qemu(&daemon, "qcow2", "qcow2", "");
    let plain = daemon.image("plain.img", MIB);
    let refused = |driver: &str, image: &Path, more: &[&str], code: i32, messages: &[&str]| {
        let filename = format!("file.filename={}", image.display());
        let driver = format!("driver={driver}");
        let mut args = vec!["node", "add", "bad", &driver, "file.driver=file", &filename];
        args.extend(more);
        let (got, e) = daemon.ctl_error(&args);
        for message in messages {
            assert!(e.contains(message), "{e}");
        }
        assert_eq!(got, code, "{e}");
        let nodes = daemon.ctl_json(&["node", "list"]);
        assert_eq!(nodes.as_array().map(Vec::len), Some(0), "{nodes}");
    };
    let wrong = daemon.path("wrong");
    std::fs::write(&wrong, format!("{PASSPHRASE}\n")).unwrap();
    daemon.ctl(&["secret", "add", "wrong", "--file", text(&wrong)]);
    refused(
        "luks",
        &luks,
        &["key-secret=wrong"],
        5,
        &["'bad'", "does not open", "newline"],
    );
    refused(
        "luks",
        &luks,
        &["key-secret=nobody"],
        3,
        &["'bad'", "no secret 'nobody'"],
    );
    refused("luks", &luks, &[], 2, &["'bad'", "key-secret"]);
    refused(
        "luks",
        &plain,
        &["key-secret=key"],
        1,
        &["'bad'", "no LUKS header"],
    );
    refused(
        "qcow2",
        &qcow2,
        &[],
        2,
        &["'bad'", "encrypted", "encrypt.key-secret"],
    );
    let encrypt = ["encrypt.format=luks", "encrypt.key-secret=wrong"];
    refused("qcow2", &qcow2, &encrypt, 5, &["'bad'", "does not open"]);
    let aes = ["encrypt.format=aes", "encrypt.key-secret=key"];
    refused("qcow2", &qcow2, &aes, 2, &["'bad'", "aes", "luks"]);
    for (name, at, bytes, message) in [
        ("cipher", 8, &b"twofish\0"[..], "twofish"),
        ("mode", 40, b"cbc-plain64\0", "cbc-plain64"),
        ("version", 6, &[0, 2], "version 2"),
        ("iterations", 164, &[0xff; 4], "iterations"),
        ("material", 208 + 40, &[0xff; 4], "ends within"),
        ("payload", 104, &[0, 0x1f, 0, 0], "begins at"),
        ("overlap", 104, &[0, 0, 0, 0], "within the header"),
    ] {
        let mut file = std::fs::read(&luks).unwrap();
        file[at..at + bytes.len()].copy_from_slice(bytes);
        let image = daemon.path(name);
        std::fs::write(&image, file).unwrap();
        let code = if matches!(name, "material" | "payload" | "overlap") {
            1
        } else {
            2
        };
        refused(
            "luks",
            &image,
            &["key-secret=key"],
            code,
            &["'bad'", message],
        );
    }
}

#[test]
fn secrets_come_from_files_descriptors_and_messages() {
    let daemon = daemon();
    let image = create_with_qemu(&daemon, "disk", "luks", "");
    // D-Bus, as text and as bytes.
    let call = |args: &[&str]| {
        let address = format!("--address={}", daemon.bus_address());
        let mut all = vec![address.as_str(), "call", "org.vdisk1", "/org/vdisk1"];
        all.extend(["org.vdisk1.Manager", "AddSecret", "sa{sv}"]);
        all.extend(args);
        tool("busctl", &all)
    };
    call(&["text", "1", "data", "s", PASSPHRASE]);
    let path = daemon.path("passphrase");
    call(&["file", "1", "file", "s", text(&path)]);
    let bytes: Vec<String> = PASSPHRASE.bytes().map(|b| b.to_string()).collect();
    let count = bytes.len().to_string();
    let mut args = vec!["bytes", "1", "data", "ay", &count];
    args.extend(bytes.iter().map(String::as_str));
    call(&args);
    let ids = daemon.ctl_json(&["secret", "list"]);
    assert_eq!(ids, serde_json::json!(["bytes", "file", "key", "text"]));
    let filename = format!("file.filename={}", image.display());
    for id in ["bytes", "file", "key", "text"] {
        let key = format!("key-secret={id}");
        daemon.ctl(&[
            "node",
            "add",
            "disk",
            "driver=luks",
            "file.driver=file",
            &filename,
            &key,
        ]);
        daemon.ctl(&["secret", "remove", id]);
        daemon.ctl(&["node", "flush", "disk"]);
        daemon.ctl(&["node", "remove", "disk"]);
    }
    for (args, message) in [
        (&["secret", "remove", "key"][..], "'key'"),
        (&["secret", "add", "1x", "--file", "/dev/null"], "1x"),
        (&["secret", "add", "empty", "--file", "/dev/null"], "empty"),
        (&["secret", "add", "long", "--file", "/dev/zero"], "1 MiB"),
        (
            &["secret", "add", "none", "--file", "/nonexistent"],
            "/nonexistent",
        ),
    ] {
        let (_, e) = daemon.ctl_error(args);
        assert!(e.contains(message), "{e}");
    }
    assert!(!daemon.log().contains(PASSPHRASE));
}
