//! Exports over NBD, with the clients of others; nodes of NBD servers, those of others too.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use vdisk_qemu_tests::blk_client::Client;
use vdisk_qemu_tests::qemu_tools::{assert_sound, text, tool};
use vdisk_qemu_tests::workload::{Sequence, Writer, assert_same, change, compare};
use vdisk_qemu_tests::{Daemon, wait_for};

const MIB: u64 = 1 << 20;
const SIZE: u64 = 16 * MIB;

/// Exports a node over NBD, for reading and writing unless the options say otherwise.
fn serve(daemon: &Daemon, id: &str, node: &str, options: &[&str]) -> String {
    let socket = daemon.path(&format!("{id}.nbd"));
    let socket = text(&socket).to_owned();
    let add = [
        "export", "add", id, "--type", "nbd", "--node", node, "--socket", &socket,
    ];
    daemon.ctl(&[&add, options].concat());
    socket
}

fn uri(socket: &str) -> String {
    format!("nbd+unix:///?socket={socket}")
}

/// Adds a node of a server, and exports it to a virtqueue.
fn connect(daemon: &Daemon, id: &str, socket: &str, options: &[&str]) {
    let server = format!("server.path={socket}");
    let add = ["node", "add", id, "driver=nbd", "server.type=unix", &server];
    daemon.ctl(&[&add, options].concat());
    daemon.export_node(id, id, &[]);
}

/// Adds a node of a new raw image.
fn file(daemon: &Daemon, id: &str, size: u64, options: &[&str]) {
    let image = daemon.image(&format!("{id}.img"), size);
    let file = format!("filename={}", text(&image));
    daemon.ctl(&[&["node", "add", id, "driver=file", &file], options].concat());
}

/// qemu-nbd, until dropped.
struct QemuNbd(Child);

impl QemuNbd {
    fn start(image: &Path, format: &str, socket: &str, more: &[&str]) -> QemuNbd {
        let child = Command::new("qemu-nbd")
            .args([
                "-k",
                socket,
                "-f",
                format,
                "-t",
                "-e",
                "8",
                "--discard=unmap",
            ])
            .args(more)
            .arg(image)
            .stdin(Stdio::null())
            .spawn()
            .expect("qemu-nbd is installed: run 'make setup'");
        wait_for("qemu-nbd", || UnixStream::connect(socket).ok());
        QemuNbd(child)
    }
}

impl Drop for QemuNbd {
    fn drop(&mut self) {
        let pid = i32::try_from(self.0.id()).unwrap();
        // SAFETY: a signal to a child that was not waited for.
        unsafe { libc::kill(pid, libc::SIGTERM) };
        let _ = self.0.wait();
    }
}

#[test]
fn clients_of_others_read_and_write() {
    let daemon = Daemon::start(&[]);
    for (id, format, cache) in [
        ("raw", "raw", "cache.direct=off"),
        ("direct", "raw", "cache.direct=on"),
        ("qcow2", "qcow2", "cache.direct=off"),
    ] {
        let image = daemon.path(&format!("{id}.img"));
        tool(
            "qemu-img",
            &["create", "-q", "-f", format, text(&image), "16M"],
        );
        let file = format!("file.filename={}", text(&image));
        let driver = format!("driver={format}");
        daemon.ctl(&[
            "node",
            "add",
            id,
            &driver,
            "file.driver=file",
            &file,
            cache,
            "discard=unmap",
        ]);
        let uri = uri(&serve(&daemon, id, id, &["--writable"]));
        let mut model = vec![0u8; SIZE as usize];
        model[MIB as usize..4 * MIB as usize].fill(7);
        model[2 * MIB as usize..3 * MIB as usize].fill(0);
        model[69632..71680].fill(8);
        let commands = [
            "write -P 7 1M 3M",
            "write -P 8 68k 2k",
            "write -z -u 2M 1M",
            "flush",
        ];
        for c in commands {
            tool("qemu-io", &["-f", "raw", "-c", c, &uri]);
        }
        let copy = daemon.path("copy");
        tool("nbdcopy", &[&uri, text(&copy)]);
        assert_same(&std::fs::read(&copy).unwrap(), &model, 0, id);
        // Holes are told of.
        let map = tool("nbdinfo", &["--map", "--json", &uri]);
        let map: serde_json::Value = serde_json::from_str(&map).unwrap();
        let hole = |at: u64| {
            let all = map.as_array().unwrap().iter();
            let mut here = all.filter(|e| {
                let from = e["offset"].as_u64().unwrap();
                (from..from + e["length"].as_u64().unwrap()).contains(&at)
            });
            here.next().unwrap()["type"] == 3
        };
        assert!(hole(8 * MIB) && !hole(MIB), "{id}: {map}");
        // Something else on it, by many requests on several connections.
        let other: Vec<u8> = (0..SIZE).map(|i| (i / 512 * 31 + i) as u8).collect();
        std::fs::write(&copy, &other).unwrap();
        tool(
            "nbdcopy",
            &["--connections=4", "--requests=64", text(&copy), &uri],
        );
        tool(
            "qemu-img",
            &["compare", "-q", "-f", "raw", "-F", "raw", text(&copy), &uri],
        );
        let shown = daemon.ctl_json(&["export", "show", id]);
        assert_eq!((&shown["Clients"], &shown["Name"]), (&0.into(), &id.into()));
        daemon.ctl(&["export", "remove", id]);
        daemon.ctl(&["node", "remove", id]);
        if format == "qcow2" {
            assert_sound(&image);
        }
        tool(
            "qemu-img",
            &[
                "compare",
                "-q",
                "-f",
                "raw",
                "-F",
                format,
                text(&copy),
                text(&image),
            ],
        );
    }
}

#[test]
fn who_may_only_read_cannot_write() {
    let daemon = Daemon::start(&[]);
    daemon.export("d", SIZE, &[], &[]);
    let socket = serve(&daemon, "e", "d", &["name=disk", "description=a disk"]);
    let info = tool(
        "nbdinfo",
        &["--json", &format!("nbd+unix:///disk?socket={socket}")],
    );
    let info: serde_json::Value = serde_json::from_str(&info).unwrap();
    let export = &info["exports"][0];
    assert_eq!(export["is_read_only"], true);
    assert_eq!(export["export-size"], SIZE);
    let list = tool("nbdinfo", &["--list", &uri(&socket)]);
    assert!(
        list.contains("export=\"disk\"") && list.contains("a disk"),
        "{list}"
    );
    // Neither is there another one.
    let server = format!("server.path={socket}");
    let node = ["node", "add", "n", "driver=nbd", &server];
    let (_, e) = daemon.ctl_error(&[&node[..], &["export=other"]].concat());
    assert!(e.contains("no such export") && e.contains("'n'"), "{e}");
    let (_, e) = daemon.ctl_error(&[&node[..], &["export=disk"]].concat());
    assert!(
        e.contains("read-only") && e.contains("auto-read-only"),
        "{e}"
    );
    daemon.ctl(&[&node[..], &["export=disk", "auto-read-only=on"]].concat());
    assert_eq!(daemon.ctl_json(&["node", "show", "n"])["ReadOnly"], true);
    // A copy that cannot have its name leaves what has it, and no image.
    let image = daemon.path("copy.qcow2");
    for copy in [text(&image), &uri(&socket)] {
        let (_, e) = daemon.ctl_error(&["backup", "d", copy, "--name", "n"]);
        assert!(e.contains("'n'"), "{e}");
        assert_eq!(daemon.ctl_json(&["node", "show", "n"])["Driver"], "nbd");
    }
    assert!(!image.exists());
    let (_, e) = daemon.ctl_error(&["node", "add", "m", "driver=nbd", "server.path=/no/such"]);
    assert!(e.contains("'m'") && e.contains("/no/such"), "{e}");
    for (option, why) in [
        ("server.type=inet", "unix sockets only"),
        ("frobnicate=1", "frobnicate"),
        ("filename=/dev/fdset/0", "beside"),
    ] {
        let (_, e) = daemon.ctl_error(&["node", "add", "m", "driver=nbd", option, &server]);
        assert!(e.contains(why), "{option}: {e}");
    }
}

/// Random changes through a virtqueue reach the images of others' servers, and of ours.
#[test]
fn nodes_of_servers() {
    let daemon = Daemon::start(&[]);
    let there = Daemon::start(&[]);
    for (id, format, more) in [("r", "raw", &[][..]), ("q", "qcow2", &["--cache=none"][..])] {
        let image = daemon.path(&format!("{id}.img"));
        tool(
            "qemu-img",
            &["create", "-q", "-f", format, text(&image), "16M"],
        );
        let socket = daemon.path(&format!("{id}.qemu"));
        let server = QemuNbd::start(&image, format, text(&socket), more);
        connect(&daemon, id, text(&socket), &["discard=unmap"]);
        let mut model = vec![0; SIZE as usize];
        change(
            &mut Client::connect(&daemon.socket(id), 1, 1, 1 << 20),
            &mut model,
            7,
            300,
        );
        compare(&daemon, id, &model);
        daemon.ctl(&["export", "remove", id]);
        daemon.ctl(&["node", "remove", id]);
        drop(server);
        let raw = daemon.path("raw");
        tool(
            "qemu-img",
            &["convert", "-O", "raw", text(&image), text(&raw)],
        );
        assert_same(&std::fs::read(&raw).unwrap(), &model, 0, id);
    }
    // An image of ours on a disk of ours.
    file(&there, "d", 64 * MIB, &["discard=unmap"]);
    let socket = serve(&there, "e", "d", &["--writable"]);
    let server = format!("file.server.path={socket}");
    let image = daemon.path("q2.img");
    tool(
        "qemu-img",
        &["create", "-q", "-f", "qcow2", text(&image), "16M"],
    );
    tool(
        "qemu-img",
        &[
            "convert",
            "-n",
            "-f",
            "raw",
            "-O",
            "raw",
            text(&image),
            &uri(&socket),
        ],
    );
    daemon.ctl(&[
        "node",
        "add",
        "i",
        "driver=qcow2",
        "file.driver=nbd",
        &server,
        "discard=unmap",
    ]);
    daemon.export_node("i", "i", &[]);
    let mut model = vec![0; SIZE as usize];
    change(
        &mut Client::connect(&daemon.socket("i"), 1, 1, 1 << 20),
        &mut model,
        8,
        300,
    );
    compare(&daemon, "i", &model);
    assert_eq!(daemon.ctl_json(&["export", "show", "i"])["Path"], "slow");
}

/// Copies end at another daemon, while a client writes, and the graph there changes.
#[test]
fn jobs_go_over_nbd() {
    let daemon = Daemon::start(&[]);
    let there = Daemon::start(&[]);
    let (_, socket) = daemon.export("d", SIZE, &[], &[]);
    let mut servers = Vec::new();
    for id in ["b", "m"] {
        file(&there, id, SIZE, &[]);
        let nbd = serve(&there, id, id, &["--writable"]);
        servers.push(uri(&nbd));
    }
    let sequence = Sequence::new(SIZE);
    std::thread::scope(|scope| {
        let writer = Writer::start(scope, &sequence, &socket);
        sequence.wait_for_more(200);
        daemon.ctl(&["backup", "d", &servers[0]]);
        daemon.ctl(&["mirror", "d", &servers[1], "--pivot"]);
        // The client is on the other daemon's storage now, and that changes below it.
        for i in 0..5 {
            sequence.wait_for_more(100);
            let overlay = there.path(&format!("o{i}.qcow2"));
            let node = if i == 0 {
                "m".to_owned()
            } else {
                format!("o{}", i - 1)
            };
            let name = format!("o{i}");
            there.ctl(&["snapshot", "overlay", &node, &name, text(&overlay)]);
        }
        sequence.wait_for_more(100);
        writer.end();
    });
    let mut client = Client::connect(&socket, 1, 1, 1 << 20);
    assert_eq!(client.flush(), 0);
    let mut disk = vec![0; SIZE as usize];
    for (i, piece) in disk.chunks_mut(1 << 20).enumerate() {
        assert_eq!(client.read(i as u64 * MIB, piece), 0);
    }
    assert_eq!(sequence.last_write(&disk, "the mirror"), sequence.written());
    let backup = std::fs::read(there.path("b.img")).unwrap();
    assert!(sequence.last_write(&backup, "the backup") >= 200);
}

/// Whatever a client says, the others are served, and the daemon goes on.
#[test]
fn a_bad_client_ends_its_own_connection() {
    let mut daemon = Daemon::start(&[]);
    file(&daemon, "d", SIZE, &[]);
    let socket = serve(&daemon, "e", "d", &["--writable"]);
    let hello = |stream: &mut UnixStream| {
        let mut head = [0; 18];
        stream.read_exact(&mut head).unwrap();
        assert_eq!(&head[..16], b"NBDMAGICIHAVEOPT");
    };
    // One that knows nothing but names: simple replies.
    let begin = || {
        let mut stream = UnixStream::connect(&socket).unwrap();
        hello(&mut stream);
        stream.write_all(&3u32.to_be_bytes()).unwrap();
        stream.write_all(b"IHAVEOPT\0\0\0\x01\0\0\0\0").unwrap();
        let mut export = [0; 10];
        stream.read_exact(&mut export).unwrap();
        assert_eq!(export[..8], SIZE.to_be_bytes());
        stream
    };
    let request = |kind: u16, flags: u16, offset: u64, len: u32| {
        let mut out = 0x2560_9513u32.to_be_bytes().to_vec();
        out.extend(flags.to_be_bytes());
        out.extend(kind.to_be_bytes());
        out.extend(77u64.to_be_bytes());
        out.extend(offset.to_be_bytes());
        out.extend(len.to_be_bytes());
        out
    };
    let mut good = begin();
    let ends = |mut stream: UnixStream| {
        let mut rest = Vec::new();
        // A reset is an end, too.
        let _ = stream.read_to_end(&mut rest);
    };
    let mut garbage = UnixStream::connect(&socket).unwrap();
    hello(&mut garbage);
    garbage.write_all(&[0xff; 100]).unwrap();
    ends(garbage);
    let mut flood = UnixStream::connect(&socket).unwrap();
    hello(&mut flood);
    flood
        .write_all(b"\0\0\0\x03IHAVEOPT\0\0\0\x07\xff\xff\xff\xff")
        .unwrap();
    ends(flood);
    let mut no_request = begin();
    no_request.write_all(&[0; 28]).unwrap();
    ends(no_request);
    let mut long = begin();
    long.write_all(&request(1, 0, 0, u32::MAX)).unwrap();
    ends(long);
    let mut half = begin();
    half.write_all(&request(1, 0, 0, 4096)).unwrap();
    half.write_all(&[0xee; 1000]).unwrap();
    drop(half);
    // Each of these is an answer, and the connection stays.
    let mut answer = |message: &[u8]| {
        good.write_all(message).unwrap();
        let mut reply = [0; 16];
        good.read_exact(&mut reply).unwrap();
        assert_eq!(reply[8..], 77u64.to_be_bytes());
        u32::from_be_bytes(reply[4..8].try_into().unwrap())
    };
    let mut beyond = request(1, 0, SIZE - 512, 1024);
    beyond.extend([0; 1024]);
    for (message, error) in [
        (request(0, 0, SIZE, 512), 22),
        (request(0, 0, u64::MAX, 512), 22),
        (request(0, 0, 0, u32::MAX), 75),
        (beyond, 28),
        (request(4, 0, SIZE, 512), 28),
        (request(6, 0x8000, 0, 512), 22),
        (request(7, 0, 0, 512), 22),
        (request(9, 0, 0, 512), 22),
        (request(3, 0, 0, 512), 22),
        (request(3, 0, 0, 0), 0),
        (request(6, 1, 0, 1 << 20), 0),
        (request(4, 0, 0, 0), 0),
    ] {
        assert_eq!(answer(&message), error, "{message:?}");
    }
    // One that takes no replies has so much memory and no more, and goes with the export.
    let mut deaf = begin();
    deaf.set_nonblocking(true).unwrap();
    let reads = request(0, 0, 0, 1 << 20);
    while deaf.write(&reads).is_ok() {}
    assert!(
        daemon.resident_kib() < 300 << 10,
        "{} KiB",
        daemon.resident_kib()
    );
    assert_eq!(answer(&request(3, 0, 0, 0)), 0);
    assert_eq!(daemon.ctl_json(&["export", "show", "e"])["Clients"], 2);
    daemon.ctl(&["export", "remove", "e"]);
    assert!(!Path::new(&socket).exists());
    let disk = std::fs::read(daemon.path("d.img")).unwrap();
    assert!(disk.iter().all(|b| *b == 0), "half a write was carried out");
    assert_eq!(daemon.terminate(), Some(0));
}

/// A server that is gone fails what nobody can know of, and is used again when it is back.
#[test]
fn a_server_comes_back() {
    let daemon = Daemon::start(&[]);
    let mut there = Daemon::managed(&[]);
    for id in ["p", "i"] {
        file(&there, id, SIZE, &[]);
        let nbd = serve(&there, &format!("{id}e"), id, &["--writable"]);
        let delay = if id == "p" {
            "reconnect-delay=60"
        } else {
            "reconnect-delay=0"
        };
        connect(&daemon, id, &nbd, &[delay]);
    }
    let mut patient = Client::connect(&daemon.socket("p"), 1, 1, 1 << 20);
    let mut impatient = Client::connect(&daemon.socket("i"), 1, 1, 1 << 20);
    let data = vec![5; 4096];
    for client in [&mut patient, &mut impatient] {
        assert_eq!(client.write(0, &data), 0);
        assert_eq!(client.flush(), 0);
    }
    // Nothing to lose.
    there.kill();
    there.go_on();
    assert_eq!(patient.write(4096, &data), 0);
    assert_eq!(patient.flush(), 0);
    let write = |client: &mut Client| client.write(8192, &data);
    wait_for("the connection", || {
        (write(&mut impatient) == 0).then_some(())
    });
    assert_eq!(impatient.flush(), 0);
    // What was acknowledged, and not flushed, may be lost with the server: somebody is told.
    assert_eq!(patient.write(12288, &data), 0);
    there.kill();
    assert_ne!(impatient.write(0, &data), 0);
    there.go_on();
    assert_eq!(patient.write(16384, &data), 0);
    assert_ne!(patient.flush(), 0, "what was lost is not told of");
    assert_eq!(patient.flush(), 0);
    // In order, too: those who are connected are connected again.
    assert_eq!(there.terminate(), Some(0));
    there.go_on();
    let mut read = vec![0; 4096];
    assert_eq!(patient.read(16384, &mut read), 0);
    assert_eq!(read, data);
    // One that never comes back does not keep anybody.
    assert_eq!(there.terminate(), Some(0));
    daemon.ctl(&["export", "remove", "i"]);
    daemon.ctl(&["node", "remove", "i"]);
}

/// An export that is there for one client goes with it, and the image is free then.
#[test]
fn an_export_ends_with_its_client() {
    let daemon = Daemon::start(&[]);
    file(&daemon, "d", SIZE, &[]);
    let image = daemon.path("d.img");
    let socket = serve(&daemon, "e", "d", &["--writable", "until-disconnect=on"]);
    // Who only looks does not count.
    tool("nbdinfo", &["--list", "--json", &uri(&socket)]);
    assert_eq!(
        daemon.ctl_json(&["export", "show", "e"])["UntilDisconnect"],
        true
    );
    // Nor does who goes without a word: it may come back.
    let mut killed = Daemon::start(&[]);
    connect(&killed, "n", &socket, &[]);
    killed.kill();
    let clients = || daemon.ctl_json(&["export", "show", "e"])["Clients"].clone();
    wait_for("the end of the client", || (clients() == 0).then_some(()));
    let mut client = Daemon::start(&[]);
    connect(&client, "n", &socket, &[]);
    let mut disk = Client::connect(&client.socket("n"), 1, 1, 1 << 20);
    assert_eq!(disk.write(0, &[9; 4096]), 0);
    drop(disk);
    client.ctl(&["export", "remove", "n"]);
    client.ctl(&["node", "remove", "n"]);
    // At this moment: nobody waits for it.
    tool(
        "qemu-io",
        &[
            "-f",
            "raw",
            "-c",
            "read -P 9 0 4k",
            "-c",
            "write 4k 4k",
            text(&image),
        ],
    );
    assert!(daemon.try_ctl(&["node", "show", "d"]).status.code() != Some(0));
    assert_eq!(client.terminate(), Some(0));
}

/// A server that answers nothing any more costs the backup that goes there, not the guest whose writes are copied there first, and not those
/// who wait for the guest.
#[test]
fn a_silent_server_keeps_nobody() {
    let daemon = Daemon::start(&[]);
    let there = Daemon::start(&[]);
    let (_, socket) = daemon.export("d", SIZE, &[], &[]);
    let mut client = Client::connect(&socket, 1, 1, 1 << 20);
    for at in [0, 4 * MIB, 8 * MIB] {
        assert_eq!(client.write(at, &vec![1; 1 << 20]), 0);
    }
    drop(client);
    let send = |signal| {
        let pid = rustix::process::Pid::from_raw(there.pid() as i32).unwrap();
        rustix::process::kill_process(pid, signal).unwrap();
    };
    let job = || daemon.ctl_json(&["job", "show", "backup-d"]);
    for (id, action) in [("b", "job cancel backup-d"), ("c", "bitmap add d map")] {
        file(&there, id, SIZE, &[]);
        let server = uri(&serve(&there, id, id, &["--writable"]));
        let options = ["--detach", "--speed", "1", "auto-dismiss=false"];
        let name = ["--name", id];
        daemon.ctl(&[&["backup", "d", &server][..], &options, &name].concat());
        send(rustix::process::Signal::STOP);
        std::thread::scope(|s| {
            let write = s.spawn(|| {
                let mut client = Client::connect(&socket, 1, 1, 1 << 20);
                client.write(8 * MIB, &[2; 4096])
            });
            wait_for("the write", || {
                let stats = daemon.ctl_json(&["stats"]);
                let slow = stats["exports"]["d"]["queues"][0]["slow"].as_u64()?;
                (slow > 0).then_some(())
            });
            let words: Vec<&str> = action.split(' ').collect();
            daemon.ctl(&words);
            assert_eq!(write.join().unwrap(), 0, "{action}");
        });
        if job()["State"] != "concluded" {
            daemon.ctl(&["job", "speed", "backup-d", "0"]);
        }
        wait_for("the job's end", || {
            (job()["State"] == "concluded").then_some(())
        });
        assert_ne!(job()["Error"][1], "", "{action}");
        send(rustix::process::Signal::CONT);
        daemon.ctl(&["job", "dismiss", "backup-d"]);
        daemon.ctl(&["node", "remove", id]);
    }
}

/// Nor does a server that is gone keep those whose copies wait for it to come back.
#[test]
fn a_server_that_is_gone_keeps_nobody() {
    let daemon = Daemon::start(&[]);
    let there = Daemon::start(&[]);
    let (_, socket) = daemon.export("d", SIZE, &[], &[]);
    file(&there, "b", SIZE, &[]);
    let server = format!("server.path={}", serve(&there, "b", "b", &["--writable"]));
    let add = ["node", "add", "b", "driver=nbd", "server.type=unix"];
    daemon.ctl(&[&add[..], &[&server, "reconnect-delay=3600"]].concat());
    daemon.ctl(&["transaction", "backup,node=d,target=b,sync=none,job-id=j"]);
    there.ctl(&["export", "remove", "b"]);
    std::thread::scope(|s| {
        let write = s.spawn(|| {
            let mut client = Client::connect(&socket, 1, 1, 1 << 20);
            client.write(0, &[2; 4096])
        });
        wait_for("the write", || {
            let stats = daemon.ctl_json(&["stats"]);
            let slow = stats["exports"]["d"]["queues"][0]["slow"].as_u64()?;
            (slow > 0).then_some(())
        });
        daemon.ctl(&["bitmap", "add", "d", "map"]);
        assert_eq!(write.join().unwrap(), 0);
    });
}

/// Whoever removes an export does not wait for what a throttle group holds back of its clients' requests.
#[test]
fn what_is_held_back_goes_when_the_export_does() {
    let daemon = Daemon::start(&[]);
    file(&daemon, "disk", MIB, &[]);
    daemon.ctl(&["throttle", "set", "g", "iops-total=1"]);
    daemon.ctl(&["throttle", "insert", "disk", "g", "--name", "filter"]);
    let socket = serve(&daemon, "n", "filter", &["--writable"]);
    let there = Daemon::start(&[]);
    connect(&there, "far", &socket, &[]);
    let mut client = Client::connect(&there.socket("far"), 1, 128, 4096);
    client.start_writes(MIB);
    wait_for("the requests", || {
        let stats = there.ctl_json(&["stats"]);
        let slow = stats["exports"]["far"]["queues"][0]["slow"].as_u64()?;
        (slow == 128).then_some(())
    });
    let start = std::time::Instant::now();
    daemon.ctl(&["export", "remove", "n"]);
    // One after the other they would take two minutes.
    assert!(start.elapsed() < std::time::Duration::from_secs(60));
}
