//! Commits and streams of backing chains that clients write to.

use std::path::{Path, PathBuf};

use serde_json::Value;
use vdisk_qemu_tests::blk_client::Client;
use vdisk_qemu_tests::qemu_tools::{assert_sound, read_with_qemu, text, tool};
use vdisk_qemu_tests::workload::{Sequence, Writer, assert_same, change, compare};
use vdisk_qemu_tests::{Daemon, wait_for};

const SIZE: u64 = 16 << 20;

/// A base and overlays over it, made while the writer writes.
struct Chain {
    daemon: Daemon,
    /// The base first.
    images: Vec<PathBuf>,
}

impl Chain {
    fn new(base: &str) -> Chain {
        let daemon = Daemon::start(&["--io-threads", "2"]);
        let image = daemon.path("n0");
        tool(
            "qemu-img",
            &["create", "-q", "-f", base, text(&image), "16M"],
        );
        let driver = format!("driver={base}");
        let filename = format!("file.filename={}", image.display());
        daemon.ctl(&["node", "add", "n0", &driver, "file.driver=file", &filename]);
        daemon.export_node("disk", "n0", &[]);
        Chain {
            daemon,
            images: vec![image],
        }
    }

    /// Puts another overlay on top.
    fn grow(&mut self) {
        let n = self.images.len();
        let (below, name) = (format!("n{}", n - 1), format!("n{n}"));
        let image = self.daemon.path(&name);
        let top = self.daemon.ctl_json(&["export", "show", "disk"])["Node"].to_string();
        assert!(top.contains(&below), "{top}");
        self.daemon
            .ctl(&["snapshot", "overlay", &below, &name, text(&image)]);
        self.images.push(image);
    }

    fn nodes(&self) -> Vec<String> {
        let nodes = self.daemon.ctl_json(&["node", "list"]);
        let names = nodes.as_array().unwrap().iter();
        let names = names.map(|n| n["Name"].as_str().unwrap().to_owned());
        let mut names: Vec<String> = names.filter(|n| !n.starts_with('#')).collect();
        names.sort();
        names
    }

    /// Images below another, as QEMU finds them, the other first.
    fn below(&self, top: &Path) -> Vec<String> {
        let info = ["info", "-U", "--backing-chain", "--output=json", text(top)];
        let info: Value = serde_json::from_str(&tool("qemu-img", &info)).unwrap();
        let names = info.as_array().unwrap().iter();
        let name = |i: &Value| {
            Path::new(i["filename"].as_str().unwrap())
                .file_name()
                .unwrap()
                .to_str()
                .unwrap()
                .to_owned()
        };
        names.map(name).collect()
    }

    fn close(&self) {
        self.daemon.ctl(&["export", "remove", "disk"]);
        loop {
            let nodes = self.daemon.ctl_json(&["node", "list"]);
            let nodes = nodes.as_array().unwrap().clone();
            let free = |n: &&Value| n["Parents"].as_array().unwrap().is_empty();
            let Some(free) = nodes.iter().find(free) else {
                assert!(nodes.is_empty(), "{nodes:?}");
                return;
            };
            self.daemon
                .ctl(&["node", "remove", free["Name"].as_str().unwrap()]);
        }
    }
}

/// The base takes the place of the overlays over it while clients write.
#[test]
fn an_active_overlay_is_committed_under_load() {
    for base in ["qcow2", "raw"] {
        let mut chain = Chain::new(base);
        let sequence = Sequence::new(SIZE);
        std::thread::scope(|s| {
            let writer = Writer::start(s, &sequence, &chain.daemon.socket("disk"));
            for _ in 0..2 {
                sequence.wait_for_more(300);
                chain.grow();
            }
            sequence.wait_for_more(300);
            chain.daemon.ctl(&["commit", "n2", "--base", "n0"]);
            assert_eq!(chain.nodes(), ["n0"]);
            let export = chain.daemon.ctl_json(&["export", "show", "disk"]);
            assert!(export["Node"].to_string().contains("n0"), "{export}");
            assert_eq!(export["Path"], "fast", "{export}");
            sequence.wait_for_more(300);
            writer.end();
        });
        chain.close();
        let disk = match base {
            "raw" => std::fs::read(&chain.images[0]).unwrap(),
            _ => {
                assert_sound(&chain.images[0]);
                read_with_qemu(&chain.images[0])
            }
        };
        assert_eq!(sequence.last_write(&disk, base), sequence.written());
    }
}

/// What left the chain under a guest that does nothing is closed: it can be deleted, and its device removed.
#[test]
fn images_that_leave_a_chain_are_closed_under_an_idle_client() {
    let mut chain = Chain::new("qcow2");
    for _ in 0..4 {
        chain.grow();
    }
    let mut client = Client::connect(&chain.daemon.socket("disk"), 1, 1, 4096);
    assert_eq!(client.read(0, &mut [0; 4096]), 0);
    let fds = format!("/proc/{}/fd", chain.daemon.pid());
    let is_closed = |image: &Path| {
        let open = std::fs::read_dir(&fds).unwrap().flatten();
        let mut open = open.filter_map(|fd| std::fs::read_link(fd.path()).ok());
        open.all(|file| file != image).then_some(())
    };
    chain.daemon.ctl(&["commit", "n2", "--base", "n1"]);
    wait_for("n2 to be closed", || is_closed(&chain.images[2]));
    chain.daemon.ctl(&["stream", "n3", "--base", "n0"]);
    chain.daemon.ctl(&["node", "remove", "n1"]);
    wait_for("n1 to be closed", || is_closed(&chain.images[1]));
    chain.daemon.ctl(&["commit", "n4", "--base", "n3"]);
    wait_for("n4 to be closed", || is_closed(&chain.images[4]));
    assert_eq!(client.read(0, &mut [0; 4096]), 0);
    drop(client);
    chain.close();
}

/// A backing file in the middle goes into the one below, and the images above find the base on disk.
#[test]
fn a_backing_file_is_committed_under_load() {
    let mut chain = Chain::new("qcow2");
    let sequence = Sequence::new(SIZE);
    std::thread::scope(|s| {
        let writer = Writer::start(s, &sequence, &chain.daemon.socket("disk"));
        for _ in 0..4 {
            sequence.wait_for_more(300);
            chain.grow();
        }
        let log = |d: &Daemon| d.ctl_json(&["node", "show", "n0"])["ReadOnly"].clone();
        // Under the active layer, and further down: the overlay above is read-only itself.
        chain.daemon.ctl(&["commit", "n3", "--base", "n2"]);
        assert_eq!(chain.nodes(), ["n0", "n1", "n2", "n4"]);
        assert_eq!(chain.below(&chain.images[4]), ["n4", "n2", "n1", "n0"]);
        chain.daemon.ctl(&["commit", "n1"]);
        assert_eq!(chain.nodes(), ["n0", "n2", "n4"]);
        assert_eq!(chain.below(&chain.images[4]), ["n4", "n2", "n0"]);
        assert_eq!(log(&chain.daemon), true);
        sequence.wait_for_more(300);
        // What nobody needs any more.
        for gone in [1, 3] {
            std::fs::remove_file(&chain.images[gone]).unwrap();
        }
        writer.end();
    });
    chain.close();
    for image in [0, 2, 4] {
        assert_sound(&chain.images[image]);
    }
    let disk = read_with_qemu(&chain.images[4]);
    assert_eq!(sequence.last_write(&disk, "n4"), sequence.written());
}

/// A chain of four images is written to while `change` is done to it; what is left of it is sound, needs nothing that is gone, and
/// has everything.
fn streamed_under_load(left: &[usize], change: impl FnOnce(&Chain, &Sequence)) {
    let mut chain = Chain::new("qcow2");
    let sequence = Sequence::new(SIZE);
    std::thread::scope(|s| {
        let writer = Writer::start(s, &sequence, &chain.daemon.socket("disk"));
        for _ in 0..3 {
            sequence.wait_for_more(300);
            chain.grow();
        }
        sequence.wait_for_more(100);
        change(&chain, &sequence);
        sequence.wait_for_more(300);
        writer.end();
    });
    chain.close();
    for (i, image) in chain.images.iter().enumerate() {
        match left.contains(&i) {
            true => assert_sound(image),
            false => std::fs::remove_file(image).unwrap(),
        }
    }
    let disk = read_with_qemu(&chain.images[3]);
    assert_eq!(sequence.last_write(&disk, "n3"), sequence.written());
}

/// A backing file in the middle, which is opened for reading, gets what is below it, and is read-only again afterwards.
#[test]
fn a_backing_file_is_streamed_into_under_load() {
    streamed_under_load(&[2, 3], |chain, _| {
        chain.daemon.ctl(&["stream", "n2"]);
        assert_eq!(chain.below(&chain.images[3]), ["n3", "n2"]);
        let node = chain.daemon.ctl_json(&["node", "show", "n2"]);
        assert_eq!(node["ReadOnly"], true);
        let export = chain.daemon.ctl_json(&["export", "show", "disk"]);
        assert_eq!(export["Path"], "fast", "{export}");
        chain.daemon.ctl(&["node", "remove", "n1"]);
        chain.daemon.ctl(&["node", "remove", "n0"]);
    });
}

/// The active layer gets what is below it, down to a base or all of it.
#[test]
fn backing_files_are_streamed_under_load() {
    streamed_under_load(&[3], |chain, sequence| {
        chain.daemon.ctl(&["stream", "n3", "--base", "n0"]);
        assert_eq!(chain.below(&chain.images[3]), ["n3", "n0"]);
        let children = chain.daemon.ctl_json(&["node", "show", "n3"])["Children"].to_string();
        assert!(
            children.contains("n0") && !children.contains("n2"),
            "{children}"
        );
        // They were given names, and are their owners' to remove.
        chain.daemon.ctl(&["node", "remove", "n2"]);
        chain.daemon.ctl(&["node", "remove", "n1"]);
        sequence.wait_for_more(100);
        chain.daemon.ctl(&["stream", "n3"]);
        assert_eq!(chain.below(&chain.images[3]), ["n3"]);
    });
}

/// All kinds of requests and all kinds of images; QEMU reads what is left, and QSD's commit would have left the same.
#[test]
fn chains_of_all_kinds_read_the_same_before_and_after() {
    let daemon = Daemon::start(&["--io-threads", "2"]);
    for (i, options) in [
        "cluster_size=4k",
        "extended_l2=on,cluster_size=64k",
        "compat=0.10",
        "cluster_size=1M,compression_type=zstd",
    ]
    .into_iter()
    .enumerate()
    {
        let image = |n: usize| daemon.path(&format!("k{i}-{n}"));
        tool(
            "qemu-img",
            &[
                "create",
                "-q",
                "-f",
                "qcow2",
                "-o",
                options,
                text(&image(0)),
                "16M",
            ],
        );
        tool(
            "qemu-io",
            &[
                "-c",
                "write -P 1 0 5M",
                "-c",
                "write -P 2 8M 4M",
                text(&image(0)),
            ],
        );
        for n in 1..3 {
            let below = image(n - 1);
            let create = [
                "create",
                "-q",
                "-f",
                "qcow2",
                "-F",
                "qcow2",
                "-o",
                options,
                "-b",
                text(&below),
            ];
            tool("qemu-img", &[&create[..], &[text(&image(n))]].concat());
            let zero = format!("write -z {}M 1M", n + 1);
            let data = format!("write -P {} {}M 3M", n + 2, 2 * n + 7);
            let odd = format!("write -P {} {}k 3k", n + 4, 100 * n + 1);
            tool(
                "qemu-io",
                &["-c", &zero, "-c", &data, "-c", &odd, text(&image(n))],
            );
        }
        let mut model = read_with_qemu(&image(2));
        let id = format!("k{i}");
        let below = |n: usize| format!("file.filename={}", image(n).display());
        let add = |name: &str, n: usize, more: &[&str]| {
            let args = [
                "node",
                "add",
                name,
                "driver=qcow2",
                "file.driver=file",
                &below(n),
            ];
            daemon.ctl(&[&args[..], more].concat());
        };
        let names: Vec<String> = (0..3).map(|n| format!("{id}-{n}")).collect();
        add(&names[0], 0, &["read-only=on"]);
        add(
            &names[1],
            1,
            &["read-only=on", &format!("backing={}", names[0])],
        );
        add(
            &names[2],
            2,
            &["discard=unmap", &format!("backing={}", names[1])],
        );
        daemon.export_node(&id, &names[2], &[]);
        let mut client = Client::connect(&daemon.socket(&id), 1, 1, 1 << 20);
        // Slow enough for writes in between.
        let stream = [
            "stream", &names[2], "--base", &names[0], "--detach", "--speed", "20M",
        ];
        daemon.ctl(&stream);
        change(&mut client, &mut model, i as u64 + 1, 200);
        wait_for("the stream's end", || {
            daemon
                .ctl_json(&["job", "list"])
                .as_array()?
                .is_empty()
                .then_some(())
        });
        change(&mut client, &mut model, i as u64 + 20, 50);
        drop(client);
        compare(&daemon, &id, &model);
        daemon.ctl(&["node", "remove", &names[1]]);
        let mut client = Client::connect(&daemon.socket(&id), 1, 1, 1 << 20);
        daemon.ctl(&[
            "commit",
            &names[2],
            "--detach",
            "--speed",
            "20M",
            "auto-dismiss=false",
        ]);
        change(&mut client, &mut model, i as u64 + 40, 200);
        let job = format!("commit-{}", names[2]);
        wait_for("the commit to be ready", || {
            let job = daemon.ctl_json(&["job", "show", &job]);
            (job["State"] == "ready").then_some(())
        });
        change(&mut client, &mut model, i as u64 + 60, 50);
        daemon.ctl(&["job", "complete", &job]);
        wait_for("the commit's end", || {
            let job = daemon.ctl_json(&["job", "show", &job]);
            (job["State"] == "concluded").then(|| assert_eq!(job["Error"][1], "", "{job}"))
        });
        daemon.ctl(&["job", "dismiss", &job]);
        change(&mut client, &mut model, i as u64 + 80, 50);
        drop(client);
        compare(&daemon, &id, &model);
        daemon.ctl(&["export", "remove", &id]);
        daemon.ctl(&["node", "remove", &names[0]]);
        assert_sound(&image(0));
        assert_same(&read_with_qemu(&image(0)), &model, 0, options);
    }
}

/// What cannot be done is refused, and what is given up leaves the chain as it was.
#[test]
fn what_is_refused_or_cancelled_leaves_the_chain_as_it_was() {
    let mut chain = Chain::new("qcow2");
    let daemon = &chain.daemon;
    let mut client = Client::connect(&daemon.socket("disk"), 1, 1, 1 << 20);
    let mut model = vec![0; SIZE as usize];
    change(&mut client, &mut model, 1, 100);
    chain.grow();
    change(&mut client, &mut model, 2, 100);
    chain.grow();
    change(&mut client, &mut model, 3, 100);
    let daemon = &chain.daemon;
    for (args, want) in [
        (&["commit", "n0"][..], "no backing file"),
        (&["commit", "n2", "--base", "n2"], "the node itself"),
        (&["commit", "n1", "--base", "n2"], "not below"),
        (&["stream", "n0"], "no backing file"),
        (&["stream", "n2", "--base", "n1"], "n1"),
        (&["stream", "n2", "--base", "nobody"], "'nobody'"),
    ] {
        let (_, message) = daemon.ctl_error(args);
        assert!(message.contains(want), "{args:?}: {message}");
    }
    for (kind, node) in [
        ("commit", "n2"),
        ("commit", "n1"),
        ("stream", "n2"),
        ("stream", "n1"),
    ] {
        let start = [kind, node, "--detach", "--speed", "1", "auto-dismiss=false"];
        daemon.ctl(&start);
        let id = format!("{kind}-{node}");
        change(&mut client, &mut model, 4, 50);
        let other = ["stream", node, "--detach", "job-id=other"];
        let (_, message) = daemon.ctl_error(&other);
        assert!(message.contains(&id), "{message}");
        daemon.ctl(&["job", "cancel", &id]);
        wait_for("the job's end", || {
            let job = daemon.ctl_json(&["job", "show", &id]);
            (job["State"] == "concluded").then_some(())
        });
        daemon.ctl(&["job", "dismiss", &id]);
        assert_eq!(chain.nodes(), ["n0", "n1", "n2"]);
        assert_eq!(chain.below(&chain.images[2]), ["n2", "n1", "n0"]);
        for below in ["n0", "n1"] {
            assert_eq!(daemon.ctl_json(&["node", "show", below])["ReadOnly"], true);
        }
    }
    drop(client);
    chain.close();
    for image in &chain.images {
        assert_sound(image);
    }
    assert_same(&read_with_qemu(&chain.images[2]), &model, 0, "the chain");
}

/// Where an image in the middle is shorter than the others the disk has zeroes, whatever is below.
#[test]
fn what_a_short_image_hides_stays_hidden() {
    let daemon = Daemon::start(&[]);
    let image = |kind: &str, n: usize| daemon.path(&format!("{kind}{n}"));
    for kind in ["commit", "stream"] {
        let write = |n: usize, what: &str| {
            tool("qemu-io", &["-c", what, text(&image(kind, n))]);
        };
        // The stream's short image is not right below the one that is written.
        for (n, size) in [(0, "16M"), (1, "6M"), (2, "12M"), (3, "16M")] {
            let (path, below) = (image(kind, n), image(kind, n.max(1) - 1));
            let mut args = vec!["create", "-q", "-f", "qcow2"];
            if n > 0 {
                args.extend(["-F", "qcow2", "-b", text(&below)]);
            }
            args.extend([text(&path), size]);
            tool("qemu-img", &args);
        }
        write(0, "write -P 1 0 16M");
        write(1, "write -P 2 1M 1M");
        write(2, "write -P 3 3M 1M");
        write(3, "write -P 4 5M 1M");
        let model = read_with_qemu(&image(kind, 3));
        assert!(model[7 << 20..].iter().all(|b| *b == 0));
        for n in 0..4 {
            let (name, filename) = (
                format!("{kind}{n}"),
                format!("file.filename={}", image(kind, n).display()),
            );
            let backing = format!("backing={kind}{}", n.max(1) - 1);
            let mut args = vec![
                "node",
                "add",
                &name,
                "driver=qcow2",
                "file.driver=file",
                &filename,
            ];
            if n > 0 {
                args.push(&backing);
            }
            if n < 3 {
                args.push("read-only=on");
            }
            daemon.ctl(&args);
        }
        let (top, base) = (format!("{kind}3"), format!("{kind}0"));
        daemon.ctl(&[kind, &top, "--base", &base]);
        for n in (0..4).rev() {
            daemon.try_ctl(&["node", "remove", &format!("{kind}{n}")]);
        }
        assert_eq!(daemon.ctl_json(&["node", "list"]), Value::Array(vec![]));
        let left = match kind {
            "commit" => image(kind, 0),
            _ => image(kind, 3),
        };
        assert_sound(&left);
        assert_same(&read_with_qemu(&left), &model, 0, kind);
    }
}

/// Nobody begins to use what a commit changes, and a commit does not begin to change what somebody uses.
#[test]
fn a_commit_has_its_chain_for_itself() {
    let mut chain = Chain::new("qcow2");
    chain.grow();
    chain.grow();
    let daemon = &chain.daemon;
    let mut client = Client::connect(&daemon.socket("disk"), 1, 1, 1 << 20);
    assert_eq!(client.write(0, &vec![1; 1 << 20]), 0);
    assert_eq!(client.write(4 << 20, &vec![1; 1 << 20]), 0);
    let other = daemon.path("other");
    daemon.ctl(&[
        "image",
        "create",
        text(&other),
        "16M",
        "--backing",
        text(&chain.images[1]),
        "-F",
        "qcow2",
    ]);
    let filename = format!("file.filename={}", other.display());
    let add = [
        "node",
        "add",
        "other",
        "driver=qcow2",
        "file.driver=file",
        &filename,
        "backing=n1",
    ];
    let export = [
        "export",
        "add",
        "e2",
        "--node",
        "n0",
        "--socket",
        "/run/x.sock",
    ];
    daemon.ctl(&[
        "commit",
        "n2",
        "--base",
        "n0",
        "--detach",
        "--speed",
        "1",
        "auto-dismiss=false",
    ]);
    for args in [&add[..], &export] {
        let (_, message) = daemon.ctl_error(args);
        assert!(message.contains("commit-n2"), "{message}");
    }
    daemon.ctl(&["job", "cancel", "commit-n2"]);
    wait_for("the commit's end", || {
        let job = daemon.ctl_json(&["job", "show", "commit-n2"]);
        (job["State"] == "concluded").then_some(())
    });
    daemon.ctl(&["job", "dismiss", "commit-n2"]);
    daemon.ctl(&add);
    let (_, message) = daemon.ctl_error(&["commit", "n2", "--base", "n0"]);
    assert!(message.contains("'other'"), "{message}");
    daemon.ctl(&["node", "remove", "other"]);
    drop(client);
    chain.close();
}
