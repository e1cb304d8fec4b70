//! Daemons that are killed or restarted, and go on where they were.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use serde_json::{Value, json};
use vdisk_qemu_tests::blk_client::Client;
use vdisk_qemu_tests::frontend::{Frontend, request};
use vdisk_qemu_tests::qemu_tools::{assert_sound, read_with_qemu, text, tool};
use vdisk_qemu_tests::workload::{assert_same, change, compare};
use vdisk_qemu_tests::{Daemon, Guest, GuestOptions, program, wait_for};

const MIB: u64 = 1 << 20;

fn add_qcow2(daemon: &Daemon, id: &str, image: &Path, more: &[&str]) {
    let filename = format!("file.filename={}", image.display());
    let args = [
        "node",
        "add",
        id,
        "driver=qcow2",
        "file.driver=file",
        &filename,
    ];
    daemon.ctl(&[&args[..], more].concat());
}

/// What a daemon shows of its objects, without what is about one process.
fn everything(daemon: &Daemon) -> Vec<Value> {
    let lists = ["node", "export", "iothread"];
    let mut all: Vec<Value> = lists.map(|l| daemon.ctl_json(&[l, "list"])).to_vec();
    all.push(daemon.ctl_json(&["throttle", "list"]));
    for list in &mut all {
        for object in list.as_array_mut().into_iter().flatten() {
            if let Some(object) = object.as_object_mut() {
                object.remove("Clients");
                object.remove("Statistics");
                object.remove("ReadOnly");
            }
        }
    }
    all
}

/// Everything comes back as it was: children in place, chains, filters, threads, groups; however the daemon ended.
#[test]
fn the_graph_comes_back() {
    let mut daemon = Daemon::start(&["--io-threads", "2"]);
    let base = daemon.path("base.qcow2");
    daemon.ctl(&["image", "create", text(&base), "16M"]);
    add_qcow2(
        &daemon,
        "disk",
        &base,
        &["discard=unmap", "file.cache.direct=on", "l2-cache-size=1M"],
    );
    daemon.ctl(&["iothread", "add", "fast", "cpus=0", "poll-max-ns=1000"]);
    daemon.ctl(&["iothread", "set", "io1", "poll-max-ns=0"]);
    let export = ["--queues", "2", "--iothread", "fast", "serial=abc"];
    daemon.export_node("vm", "disk", &export);
    let over = daemon.path("over.qcow2");
    daemon.ctl(&["snapshot", "overlay", "disk", "over", text(&over)]);
    daemon.ctl(&["throttle", "set", "gold", "iops-total=5000", "bps-read=10M"]);
    daemon.ctl(&["throttle", "insert", "over", "gold"]);
    let raw = daemon.image("raw", 4 * MIB);
    daemon.export_file("other", &raw, &["read-only=on"], &["read-only"]);
    daemon.ctl(&["bitmap", "add", "over", "daily"]);
    let before = everything(&daemon);
    for round in 0..3 {
        match round {
            0 => daemon.kill(),
            _ => assert_eq!(daemon.terminate(), Some(0)),
        }
        daemon.go_on();
        assert_eq!(daemon.ctl_json(&["info"])["Problems"], json!([]));
        let after = everything(&daemon);
        for (after, before) in after.iter().zip(&before) {
            assert_eq!(after, before, "round {round}");
        }
        // Of what it had nobody knows: it has everything.
        let bitmap = &daemon.ctl_json(&["bitmap", "list"])[0];
        assert_eq!(bitmap["Count"], 16 * MIB, "{bitmap}");
    }
    let mut client = Client::connect(&daemon.socket("vm"), 1, 1, 1 << 16);
    assert_eq!(client.write(0, &[7; 4096]), 0);
    drop(client);
    // What was removed stays away.
    daemon.ctl(&["export", "remove", "other"]);
    daemon.kill();
    daemon.go_on();
    assert_eq!(
        daemon
            .ctl_json(&["export", "list"])
            .as_array()
            .unwrap()
            .len(),
        1
    );
    daemon.kill();
    daemon.start_again();
    assert!(
        daemon
            .ctl_json(&["node", "list"])
            .as_array()
            .unwrap()
            .is_empty()
    );
}

/// A guest whose connection must never end writes, syncs and verifies while the daemon under it is killed and restarted, with
/// overlays and commits between. VDISK_ROUNDS has it do so more often.
fn guest_notices_nothing(kill: bool, driver: &str) {
    let rounds = std::env::var("VDISK_ROUNDS").ok();
    let rounds: usize = rounds.and_then(|r| r.parse().ok()).unwrap_or(12);
    let mut daemon = Daemon::managed(&["--io-threads", "2"]);
    let image = daemon.path("d0");
    tool(
        "qemu-img",
        &["create", "-q", "-f", driver, text(&image), "64M"],
    );
    let filename = format!("file.filename={}", text(&image));
    let driver = format!("driver={driver}");
    daemon.ctl(&["node", "add", "d0", &driver, "file.driver=file", &filename]);
    daemon.export_node("disk", "d0", &["--queues", "2"]);
    let options = GuestOptions::new().disk(&daemon.socket("disk"), 2);
    let mut guest = Guest::boot(options.without_reconnect());
    let write = |cmd: &str| json!({"cmd": cmd, "disk": "vda", "offset": 0, "len": 8 * MIB, "generation": 1, "threads": 4});
    guest.run(write("write"));
    guest.run(json!({"cmd": "load-start", "disk": "vda", "offset": 8 * MIB, "len": 48 * MIB, "threads": 8}));
    let mut top = "d0".to_owned();
    for round in 0..rounds {
        guest.wait_load(150);
        match kill {
            true => daemon.kill(),
            false => assert_eq!(daemon.terminate(), Some(0)),
        }
        daemon.go_on();
        guest.wait_load(50);
        assert_eq!(daemon.ctl_json(&["info"])["Problems"], json!([]));
        assert_eq!(daemon.ctl_json(&["export", "show", "disk"])["Clients"], 1);
        match round % 4 {
            1 => {
                let over = daemon.path(&format!("over{round}"));
                let name = format!("over{round}");
                daemon.ctl(&["snapshot", "overlay", &top, &name, text(&over)]);
                top = name;
            }
            3 => {
                daemon.ctl(&["commit", &top]);
                top = "d0".into();
            }
            _ => {}
        }
    }
    guest.wait_load(150);
    let result = guest.run(json!({"cmd": "load-stop"}));
    assert!(result["verified"].as_u64() > Some(0), "{result}");
    guest.run(write("verify"));
    guest.assert_no_errors();
    guest.shut_down();
    // The connection has ended, and nothing of it is kept.
    wait_for("the connection to be given up", || {
        let kept = daemon.manager().kept();
        (kept == ["listener.disk"]).then_some(())
    });
    daemon.ctl(&["export", "remove", "disk"]);
    assert!(daemon.manager().kept().is_empty());
}

#[test]
fn a_guest_does_not_notice_kills() {
    guest_notices_nothing(true, "qcow2");
}

#[test]
fn a_guest_does_not_notice_restarts() {
    guest_notices_nothing(false, "raw");
}

/// Front-ends that do not have their requests tracked are not noticed either; those that come while nobody is there wait.
#[test]
fn simple_clients_stay_connected() {
    let mut daemon = Daemon::managed(&[]);
    let image = daemon.path("d.qcow2");
    daemon.ctl(&["image", "create", text(&image), "16M"]);
    add_qcow2(&daemon, "d", &image, &[]);
    daemon.export_node("d", "d", &[]);
    let mut model = vec![0; 16 << 20];
    let mut client = Client::connect(&daemon.socket("d"), 1, 1, 1 << 20);
    for round in 0..6 {
        change(&mut client, &mut model, round, 30);
        match round % 2 {
            0 => daemon.kill(),
            _ => assert_eq!(daemon.terminate(), Some(0)),
        }
        daemon.go_on();
    }
    let mut data = vec![0; 1 << 20];
    for (i, want) in model.chunks(1 << 20).enumerate() {
        assert_eq!(client.read((i << 20) as u64, &mut data), 0);
        assert_same(&data, want, (i << 20) as u64, "client");
    }
    drop(client);
    daemon.kill();
    let socket = daemon.socket("d");
    let waiting = std::thread::spawn(move || {
        let mut client = Client::connect(&socket, 1, 1, 1 << 20);
        client.read(0, &mut [0; 4096])
    });
    daemon.go_on();
    assert_eq!(waiting.join().unwrap(), 0);
    compare(&daemon, "d", &model);
    daemon.ctl(&["export", "remove", "d"]);
    daemon.ctl(&["node", "remove", "d"]);
    assert_sound(&image);
    assert_same(&read_with_qemu(&image), &model, 0, "image");
}

/// Jobs begin again where that is the same, and say so where it is not.
#[test]
fn jobs_begin_again_or_say_why_not() {
    let mut daemon = Daemon::managed(&[]);
    let (base, over) = (daemon.path("base.qcow2"), daemon.path("over.qcow2"));
    daemon.ctl(&["image", "create", text(&base), "16M"]);
    tool("qemu-io", &["-c", "write -q -P 4 0 16M", text(&base)]);
    add_qcow2(&daemon, "base", &base, &[]);
    daemon.export_node("d", "base", &[]);
    daemon.ctl(&["snapshot", "overlay", "base", "over", text(&over)]);
    let mut model = vec![4; 16 << 20];
    let mut client = Client::connect(&daemon.socket("d"), 1, 1, 1 << 20);
    change(&mut client, &mut model, 3, 60);
    daemon.ctl(&["stream", "over", "--detach", "--speed", "1M", "job-id=slow"]);
    let (other, copy) = (daemon.image("other", 16 * MIB), daemon.path("copy.qcow2"));
    daemon.export_file("other", &other, &[], &[]);
    let mut writer = Client::connect(&daemon.socket("other"), 1, 1, 1 << 20);
    for i in 0..16 {
        assert_eq!(writer.write(i * MIB, &vec![1; 1 << 20]), 0);
    }
    drop(writer);
    daemon.ctl(&[
        "backup",
        "other",
        text(&copy),
        "--name",
        "copy",
        "--detach",
        "--speed",
        "1M",
        "job-id=copy",
        "auto-dismiss=false",
    ]);
    daemon.kill();
    daemon.go_on();
    let problems = daemon.ctl_json(&["info"])["Problems"].to_string();
    assert!(
        problems.contains("job 'copy'") && problems.contains("cannot go on"),
        "{problems}"
    );
    let job = daemon.ctl_json(&["job", "show", "copy"]);
    assert_eq!(job["State"], "concluded", "{job}");
    daemon.ctl(&["job", "dismiss", "copy"]);
    assert_eq!(
        daemon.ctl_json(&["job", "show", "slow"])["Operation"],
        "stream"
    );
    daemon.ctl(&["job", "speed", "slow", "0"]);
    wait_for("the stream's end", || {
        let jobs = daemon.ctl_json(&["job", "list"]);
        jobs.as_array().unwrap().is_empty().then_some(())
    });
    let children = daemon.ctl_json(&["node", "show", "over"])["Children"].to_string();
    assert!(!children.contains("backing"), "{children}");
    let mut data = vec![0; 1 << 20];
    for (i, want) in model.chunks(1 << 20).enumerate() {
        assert_eq!(client.read((i << 20) as u64, &mut data), 0);
        assert_same(&data, want, (i << 20) as u64, "client");
    }
}

/// Each thing that is wrong is a problem of its own, and the rest serves.
#[test]
fn what_cannot_be_restored_is_named() {
    let mut daemon = Daemon::start(&[]);
    for id in ["a", "b"] {
        let image = daemon.image(id, MIB);
        daemon.export_file(id, &image, &[], &[]);
    }
    daemon.kill();
    std::fs::remove_file(daemon.path("a")).unwrap();
    daemon.go_on();
    let problems = daemon.ctl_json(&["info"])["Problems"].clone();
    let problems: Vec<&str> = problems
        .as_array()
        .unwrap()
        .iter()
        .map(|p| p.as_str().unwrap())
        .collect();
    assert_eq!(problems.len(), 2, "{problems:?}");
    assert!(
        problems[0].contains("node 'a'") && problems[0].contains("cannot be opened"),
        "{problems:?}"
    );
    assert!(problems[1].contains("export 'a'"), "{problems:?}");
    let mut client = Client::connect(&daemon.socket("b"), 1, 1, 4096);
    assert_eq!(client.write(0, &[1; 4096]), 0);
    drop(client);
    // A damaged state is put aside.
    daemon.kill();
    let state = daemon.path("run/state.json");
    let mode = std::fs::metadata(&state).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    for (text, why) in [
        ("{\"version\": 1, \"nodes\"", "damaged"),
        ("{\"version\": 99}", "version 99"),
    ] {
        std::fs::write(&state, text).unwrap();
        daemon.go_on();
        let problems = daemon.ctl_json(&["info"])["Problems"].to_string();
        assert!(
            problems.contains(why) && problems.contains("state.bad"),
            "{problems}"
        );
        assert_eq!(
            std::fs::read_to_string(daemon.path("run/state.bad")).unwrap(),
            text
        );
        assert!(
            daemon
                .ctl_json(&["node", "list"])
                .as_array()
                .unwrap()
                .is_empty()
        );
        daemon.kill();
    }
}

/// A moment that was kept does not become another one.
#[test]
fn a_moment_ends_with_its_daemon() {
    let mut daemon = Daemon::managed(&[]);
    let image = daemon.path("d.qcow2");
    daemon.ctl(&["image", "create", text(&image), "16M"]);
    add_qcow2(&daemon, "d", &image, &[]);
    daemon.export_node("d", "d", &[]);
    let mut client = Client::connect(&daemon.socket("d"), 1, 1, 1 << 20);
    assert_eq!(client.write(0, &[1; 4096]), 0);
    let scratch = daemon.path("scratch");
    daemon.ctl(&["fleece", "start", "d", "noon", text(&scratch)]);
    daemon.export_node("noon", "noon", &["read-only"]);
    let past = Client::connect(&daemon.socket("noon"), 1, 1, 1 << 20);
    assert_eq!(client.write(0, &[2; 4096]), 0);
    daemon.kill();
    daemon.go_on();
    let problems = daemon.ctl_json(&["info"])["Problems"].to_string();
    assert!(
        problems.contains("node 'noon'") && problems.contains("export 'noon'"),
        "{problems}"
    );
    let export = daemon.ctl_json(&["export", "show", "d"]);
    assert!(export["Node"].to_string().contains("/d"), "{export}");
    assert_eq!(export["Path"], "fast");
    let mut data = [0; 4096];
    assert_eq!(client.read(0, &mut data), 0);
    assert_eq!(data, [2; 4096]);
    // Nothing is left of it, and its client is alone.
    let kept = daemon.manager().kept();
    assert!(!kept.iter().any(|name| name.ends_with("noon")), "{kept:?}");
    let names = daemon.ctl_json(&["node", "list"]).to_string();
    assert!(!names.contains("scratch"), "{names}");
    drop((client, past));
    // What was lost is not tried for ever if it is made again.
    daemon.ctl(&["fleece", "start", "d", "noon", text(&daemon.path("more"))]);
    daemon.ctl(&["fleece", "end", "noon"]);
}

/// What fails once is not forgotten: it is there when its image is back, or has another's place by then.
#[test]
fn what_is_missing_once_comes_back() {
    let mut daemon = Daemon::managed(&[]);
    let (image, away) = (daemon.path("d.qcow2"), daemon.path("away"));
    daemon.ctl(&["image", "create", text(&image), "16M"]);
    add_qcow2(&daemon, "d", &image, &[]);
    daemon.export_node("d", "d", &[]);
    daemon.kill();
    std::fs::rename(&image, &away).unwrap();
    for _ in 0..2 {
        daemon.go_on();
        let problems = daemon.ctl_json(&["info"])["Problems"]
            .as_array()
            .unwrap()
            .len();
        assert!(problems >= 2);
        assert_eq!(
            daemon.ctl_json(&["node", "list"]).as_array().unwrap().len(),
            0
        );
        assert_eq!(daemon.manager().kept(), [""; 0]);
        daemon.kill();
    }
    std::fs::rename(&away, &image).unwrap();
    daemon.go_on();
    assert_eq!(daemon.ctl_json(&["info"])["Problems"], json!([]));
    let mut client = Client::connect(&daemon.socket("d"), 1, 1, 1 << 20);
    assert_eq!(client.write(0, &[1; 4096]), 0);
}

/// Two daemons never share a runtime folder.
#[test]
fn a_second_daemon_is_refused() {
    let daemon = Daemon::start(&[]);
    let image = daemon.image("d", MIB);
    daemon.export_file("d", &image, &[], &[]);
    let state = std::fs::read(daemon.path("run/state.json")).unwrap();
    let second = std::process::Command::new(vdisk_qemu_tests::program("vdiskd"))
        .args(["--bus-address", daemon.bus_address(), "--runtime-dir"])
        .arg(daemon.path("run"))
        .output()
        .unwrap();
    assert!(!second.status.success());
    let log = String::from_utf8_lossy(&second.stderr).into_owned();
    assert!(log.contains("in use by another vdiskd"), "{log}");
    assert_eq!(std::fs::read(daemon.path("run/state.json")).unwrap(), state);
}

/// A commit whose effect guests have seen is not done again, whenever the daemon ends.
#[test]
fn a_commit_is_not_done_twice() {
    let mut daemon = Daemon::managed(&["--io-threads", "2"]);
    let base = daemon.path("base.qcow2");
    daemon.ctl(&["image", "create", text(&base), "16M"]);
    add_qcow2(&daemon, "d0", &base, &[]);
    daemon.export_node("d", "d0", &[]);
    let mut model = vec![0; 16 << 20];
    let mut client = Client::connect(&daemon.socket("d"), 1, 1, 1 << 20);
    for round in 1..8u64 {
        let over = daemon.path(&format!("over{round}"));
        daemon.ctl(&["snapshot", "overlay", "d0", "over", text(&over)]);
        change(&mut client, &mut model, round, 20);
        daemon.ctl(&["commit", "over", "--detach"]);
        // Somewhere on the way, which is another place each time.
        change(&mut client, &mut model, 100 + round, 3 * round as usize);
        daemon.kill();
        daemon.go_on();
        assert_eq!(
            daemon.ctl_json(&["info"])["Problems"],
            json!([]),
            "round {round}"
        );
        wait_for("the commit's end", || {
            for job in daemon.ctl_json(&["job", "list"]).as_array().unwrap() {
                if job["State"] == "ready" {
                    daemon.try_ctl(&["job", "complete", job["Id"].as_str().unwrap()]);
                }
            }
            let export = daemon.ctl_json(&["export", "show", "d"]);
            match export["Node"].to_string().contains("d0") {
                true => Some(()),
                false => {
                    let idle = daemon
                        .ctl_json(&["job", "list"])
                        .as_array()
                        .unwrap()
                        .is_empty();
                    if idle {
                        // It may be over by now.
                        daemon.try_ctl(&["commit", "over", "--detach"]);
                    }
                    None
                }
            }
        });
        let mut data = vec![0; 1 << 20];
        for (i, want) in model.chunks(1 << 20).enumerate() {
            assert_eq!(client.read((i << 20) as u64, &mut data), 0);
            assert_same(&data, want, (i << 20) as u64, "client");
        }
        wait_for("the overlay to go", || {
            let nodes = daemon.ctl_json(&["node", "list"]).to_string();
            (!nodes.contains("over")).then_some(())
        });
    }
    drop(client);
    daemon.ctl(&["export", "remove", "d"]);
    daemon.ctl(&["node", "remove", "d0"]);
    assert_sound(&base);
    assert_same(&read_with_qemu(&base), &model, 0, "base");
}

/// A front-end whose message the daemon was in the middle of is told to connect again: it would wait for ever for its answer.
#[test]
fn nobody_waits_for_an_answer_of_a_killed_daemon() {
    let mut daemon = Daemon::managed(&[]);
    let (_, socket) = daemon.export("d", MIB, &[], &[]);
    for half in [false, true] {
        let mut front = Frontend::start(&socket);
        assert_eq!(front.simple(0, 0, 512), 0);
        if half {
            // GET_FEATURES (request, flags, size), and the beginning of another. It is read with what comes before, on the thread
            // that answers calls.
            let whole = [1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0];
            front.send_raw(&[&whole[..], &whole[..8]].concat(), &[]);
            assert!(front.reply().is_some());
        }
        // Whoever answers this has done with the messages before.
        daemon.ctl(&["info"]);
        daemon.kill();
        daemon.go_on();
        match half {
            true => assert!(front.is_closed()),
            false => assert_eq!(front.simple(0, 0, 512), 0),
        }
    }
}

/// A front-end that sets its device up while the daemon is restarted goes on with the next one: not every one connects again.
#[test]
fn a_device_is_set_up_across_restarts() {
    let mut daemon = Daemon::managed(&[]);
    let (_, socket) = daemon.export("d", MIB, &[], &[]);
    let mut front = Frontend::silent(&socket);
    let restart = |daemon: &mut Daemon| {
        wait_for("the front-end", || {
            let clients = &daemon.ctl_json(&["export", "show", "d"])["Clients"];
            (*clients == 1).then_some(())
        });
        assert_eq!(daemon.terminate(), Some(0));
        daemon.go_on();
    };
    restart(&mut daemon);
    front.negotiate();
    let config = front.get_config();
    restart(&mut daemon);
    assert_eq!(front.get_config(), config);
    front.start_device();
    restart(&mut daemon);
    assert_eq!(front.simple(0, 0, 512), 0);
}

/// A queue that its front-end has stopped stays stopped, also one that had nothing to do.
#[test]
fn a_stopped_queue_stays_stopped() {
    let mut daemon = Daemon::managed(&[]);
    let (_, socket) = daemon.export("d", MIB, &[], &[]);
    let mut front = Frontend::start(&socket);
    // Without disabling it first.
    front.send(request::GET_VRING_BASE, 0, &[0; 8], &[]);
    assert!(front.reply().is_some());
    // Whoever answers this has done with the message.
    daemon.ctl(&["info"]);
    daemon.kill();
    daemon.go_on();
    front.start_queue();
    assert_eq!(front.simple(0, 0, 512), 0);
}

/// A machine that starts anew has nothing in its runtime folder.
fn start_of_the_machine(daemon: &mut Daemon) {
    daemon.kill();
    std::fs::remove_dir_all(daemon.path("run")).unwrap();
    daemon.go_on();
}

fn ids(daemon: &Daemon, kind: &str, key: &str) -> Vec<String> {
    let list = daemon.ctl_json(&[kind, "list"]);
    let all = list.as_array().unwrap().iter();
    all.map(|o| o[key].as_str().unwrap().to_owned()).collect()
}

/// A filter that keeps a moment is not restored; what else is called by its name has nothing to do with it.
#[test]
fn a_moment_that_ends_takes_along_nobody_else() {
    let mut daemon = Daemon::managed(&[]);
    for name in ["disk", "past", "a", "z"] {
        daemon.ctl(&["node", "add", name, "driver=null-co", "size=1M"]);
    }
    let cbw = ["node", "add", "gold", "driver=copy-before-write"];
    daemon.ctl(&[&cbw[..], &["file=disk", "target=past"]].concat());
    daemon.export_node("moment", "gold", &[]);
    daemon.ctl(&["throttle", "set", "gold", "iops-total=5000"]);
    // Whatever their order in the state.
    for name in ["a", "z"] {
        let limit = format!("{name}-limit");
        daemon.ctl(&["throttle", "insert", name, "gold", "--name", &limit]);
        daemon.export_node(name, &limit, &[]);
    }
    daemon.kill();
    daemon.go_on();
    let mut exports = ids(&daemon, "export", "Id");
    exports.sort();
    assert_eq!(exports, ["a", "moment", "z"]);
    let node = |export: &str| daemon.ctl_json(&["export", "show", export])["Node"].clone();
    assert_eq!(node("moment"), json!("/org/vdisk1/node/disk"));
}

/// Persistent exports outlive the machine, with all that they stand on and as it was last; nothing else does.
#[test]
fn persistent_exports_outlive_the_machine() {
    let mut daemon = Daemon::start(&[]);
    let base = daemon.path("base.qcow2");
    daemon.ctl(&["image", "create", text(&base), "16M"]);
    add_qcow2(&daemon, "disk", &base, &["discard=unmap"]);
    daemon.ctl(&["iothread", "add", "fast", "poll-max-ns=1000"]);
    daemon.ctl(&["iothread", "add", "idle"]);
    daemon.ctl(&["throttle", "set", "gold", "iops-total=5000"]);
    daemon.ctl(&["throttle", "set", "silver", "iops-total=7"]);
    daemon.export_node("vm", "disk", &["--iothread", "fast", "--persistent"]);
    let raw = daemon.image("raw", MIB);
    daemon.export_file("passing", &raw, &[], &[]);
    let file = daemon.path("state/persistent.json");
    assert_eq!(
        std::fs::metadata(&file).unwrap().permissions().mode() & 0o777,
        0o600
    );

    // What changes under it is known to it before guests go on.
    let over = daemon.path("over.qcow2");
    daemon.ctl(&["snapshot", "overlay", "disk", "over", text(&over)]);
    daemon.ctl(&["throttle", "insert", "over", "gold", "--name", "limit"]);
    let mut client = Client::connect(&daemon.socket("vm"), 1, 1, 1 << 16);
    assert_eq!(client.write(0, &[7; 4096]), 0);
    assert_eq!(client.flush(), 0);
    drop(client);
    start_of_the_machine(&mut daemon);
    assert_eq!(daemon.ctl_json(&["info"])["Problems"], json!([]));
    assert_eq!(ids(&daemon, "export", "Id"), ["vm"]);
    let nodes: Vec<String> = ids(&daemon, "node", "Name");
    let mut named: Vec<&String> = nodes.iter().filter(|n| !n.starts_with('#')).collect();
    named.sort();
    assert_eq!(named, ["disk", "limit", "over"]);
    let mut threads = ids(&daemon, "iothread", "Name");
    threads.sort();
    assert_eq!(threads, ["fast", "io0"]);
    let groups = daemon.ctl_json(&["throttle", "list"]);
    assert!(groups.to_string().contains("gold") && !groups.to_string().contains("silver"));
    let mut client = Client::connect(&daemon.socket("vm"), 1, 1, 1 << 16);
    let mut read = [0; 4096];
    assert_eq!((client.read(0, &mut read), read), (0, [7; 4096]));
    drop(client);

    // It is still there for a daemon that forgets everything else, and when its image is away for a while.
    daemon.kill();
    daemon.start_again();
    assert_eq!(ids(&daemon, "export", "Id"), ["vm"]);
    let away = daemon.path("away");
    std::fs::rename(&over, &away).unwrap();
    start_of_the_machine(&mut daemon);
    let problems = daemon.ctl_json(&["info"])["Problems"].to_string();
    assert!(problems.contains("over.qcow2"), "{problems}");
    assert!(ids(&daemon, "export", "Id").is_empty());
    std::fs::rename(&away, &over).unwrap();
    start_of_the_machine(&mut daemon);
    assert_eq!(ids(&daemon, "export", "Id"), ["vm"]);

    // A damaged file is put aside and named.
    let whole = std::fs::read(&file).unwrap();
    std::fs::write(&file, &whole[..whole.len() / 2]).unwrap();
    start_of_the_machine(&mut daemon);
    let problems = daemon.ctl_json(&["info"])["Problems"].to_string();
    assert!(problems.contains("persistent.bad"), "{problems}");
    daemon.kill();
    std::fs::rename(daemon.path("state/persistent.bad"), &file).unwrap();
    std::fs::write(&file, &whole).unwrap();
    start_of_the_machine(&mut daemon);

    daemon.ctl(&["export", "set", "vm", "persistent=off"]);
    assert!(!file.exists());
    daemon.ctl(&["export", "set", "vm", "persistent=on"]);
    assert!(file.exists());
    daemon.ctl(&["export", "remove", "vm"]);
    assert!(!file.exists());
    start_of_the_machine(&mut daemon);
    assert!(ids(&daemon, "node", "Name").is_empty());
}

/// What cannot be kept is not promised, and what cannot be written any more is named.
#[test]
fn a_state_that_cannot_be_written_is_named() {
    let daemon = Daemon::start(&[]);
    let raw = daemon.image("raw", MIB);
    // Where the folder would be is a file.
    std::fs::write(daemon.path("state"), "").unwrap();
    daemon.export_file("vm", &raw, &[], &[]);
    let (_, e) = daemon.ctl_error(&["export", "set", "vm", "persistent=on"]);
    assert!(e.contains("persistent.json") && e.contains("'vm'"), "{e}");
    assert_eq!(
        daemon.ctl_json(&["export", "show", "vm"])["Persistent"],
        false
    );
    assert_eq!(daemon.ctl_json(&["info"])["Problems"], json!([]));
    let new = daemon.socket("new");
    let args = [
        "export",
        "add",
        "new",
        "--node",
        "vm",
        "--socket",
        text(&new),
        "--persistent",
    ];
    daemon.ctl_error(&args);
    assert_eq!(ids(&daemon, "export", "Id"), ["vm"]);
    std::fs::remove_file(daemon.path("state")).unwrap();
    daemon.ctl(&["export", "set", "vm", "persistent=on"]);

    // From a folder that is gone nothing is restored: as long as that is so, it is a problem.
    let (run, away) = (daemon.path("run"), daemon.path("away"));
    std::fs::rename(&run, &away).unwrap();
    daemon.ctl(&["iothread", "add", "fast"]);
    let problems = daemon.ctl_json(&["info"])["Problems"].to_string();
    assert!(
        problems.contains("state.json") && problems.contains("cannot be written"),
        "{problems}"
    );
    std::fs::rename(&away, &run).unwrap();
    daemon.ctl(&["iothread", "add", "faster"]);
    assert_eq!(daemon.ctl_json(&["info"])["Problems"], json!([]));
}

/// I/O threads that a daemon begins with are as the user has left them.
#[test]
fn removed_and_moved_threads_stay_so() {
    let mut daemon = Daemon::start(&["--io-threads", "3"]);
    daemon.ctl(&["iothread", "remove", "io1"]);
    daemon.ctl(&["iothread", "remove", "io2"]);
    daemon.ctl(&["iothread", "add", "io2", "cpus=1"]);
    let before = everything(&daemon);
    daemon.kill();
    daemon.go_on();
    assert_eq!(everything(&daemon), before);
    assert_eq!(ids(&daemon, "iothread", "Name"), ["io0", "io2"]);
}

/// Daemons of different names share a bus, and nothing else.
#[test]
fn instances_are_apart() {
    let daemon = Daemon::start(&[]);
    let mut other = std::process::Command::new(program("vdiskd"))
        .args([
            "--bus-address",
            daemon.bus_address(),
            "--instance",
            "tenant-1",
        ])
        .arg("--state-dir")
        .arg(daemon.path("other-state"))
        .env("RUNTIME_DIRECTORY", daemon.path("other-run"))
        .spawn()
        .unwrap();
    wait_for("the other daemon", || {
        let out = daemon.try_ctl(&["--instance", "tenant-1", "info"]);
        out.status.success().then_some(())
    });
    daemon.ctl(&["--instance", "tenant-1", "iothread", "add", "theirs"]);
    daemon.ctl(&["iothread", "add", "mine"]);
    assert_eq!(ids(&daemon, "iothread", "Name"), ["io0", "mine"]);
    let theirs = daemon.ctl(&["--instance", "tenant-1", "iothread", "list"]);
    assert!(
        theirs.contains("theirs") && !theirs.contains("mine"),
        "{theirs}"
    );
    let (code, e) = daemon.ctl_error(&["--instance", "1x", "info"]);
    assert!(code == 2 && e.contains("'1x'"), "{e}");
    let (code, _) = daemon.ctl_error(&["--instance", "nobody", "info"]);
    assert_eq!(code, 6);
    other.kill().unwrap();
    other.wait().unwrap();
    // What is persistent is one daemon's: another that has the same folder by mistake changes nothing of it.
    daemon.ctl(&["node", "add", "n", "driver=null-co", "size=1M"]);
    daemon.export_node("mine", "n", &["read-only", "--persistent"]);
    let file = daemon.path("state/persistent.json");
    let before = std::fs::read(&file).unwrap();
    for _ in 0..2 {
        let mut other = std::process::Command::new(program("vdiskd"))
            .args(["--bus-address", daemon.bus_address(), "--instance", "wrong"])
            .arg("--state-dir")
            .arg(daemon.path("state"))
            .env("RUNTIME_DIRECTORY", daemon.path("wrong-run"))
            .spawn()
            .unwrap();
        wait_for("the other daemon", || {
            let out = daemon.try_ctl(&["--instance", "wrong", "iothread", "add", "x"]);
            out.status.success().then_some(())
        });
        let status = daemon.ctl(&["--instance", "wrong", "status"]);
        assert!(status.contains("another vdiskd"), "{status}");
        daemon.ctl(&["--instance", "wrong", "iothread", "remove", "x"]);
        other.kill().unwrap();
        other.wait().unwrap();
        assert_eq!(std::fs::read(&file).unwrap(), before);
    }
}

/// A front-end that changes something again and again is slowed down before it keeps the service manager busy; others are not.
#[test]
fn a_flood_of_messages_is_held_back() {
    let daemon = Daemon::managed(&[]);
    daemon.export("flood", MIB, &[], &[]);
    daemon.export("other", MIB, &[], &[]);
    let start = std::time::Instant::now();
    let before = daemon.manager().heard();
    let mut hostile = Frontend::start(&daemon.socket("flood"));
    let flood = std::thread::spawn(move || {
        // SET_VRING_ENABLE, without waiting for answers.
        for _ in 0..5000 {
            hostile.send(18, 0, &[0, 0, 0, 0, 1, 0, 0, 0], &[]);
        }
        hostile
    });
    for _ in 0..20 {
        let mut client = Client::connect(&daemon.socket("other"), 1, 1, 1 << 16);
        assert_eq!(client.write(0, &[7; 4096]), 0);
    }
    wait_for("the flood to be held back", || {
        (daemon.manager().heard() - before > 700).then_some(())
    });
    // Two messages each time: one comes, one goes. 20 others came and went.
    let heard = daemon.manager().heard() - before;
    let most = 2.0 * (512.0 + 200.0 * start.elapsed().as_secs_f64()) + 20.0 * 40.0;
    assert!((heard as f64) < most, "{heard} messages, at most {most}");
    daemon.ctl(&["export", "remove", "flood"]);
    drop(flood.join());
}

/// A file that was passed open goes from daemon to daemon. One that is lost is not replaced by what somebody else passes.
#[test]
fn a_passed_file_is_nobody_elses() {
    let mut daemon = Daemon::managed(&[]);
    let pass = |daemon: &Daemon, name: &str| {
        let file = daemon.image(&format!("{name}.img"), MIB);
        let filename = format!("filename={}", text(&file));
        daemon.ctl(&["node", "add", name, "driver=file", &filename, "--pass"]);
        std::fs::remove_file(&file).unwrap();
        daemon.export_node(name, name, &[]);
    };
    pass(&daemon, "a");
    let mut client = Client::connect(&daemon.socket("a"), 1, 1, 1 << 16);
    assert_eq!(client.write(0, &[7; 4096]), 0);
    // A front-end that came this moment may have to come again.
    wait_for("the connection to be kept", || {
        let kept = daemon.manager().kept();
        kept.iter()
            .any(|n| n.starts_with("connection."))
            .then_some(())
    });
    daemon.ctl(&["info"]);
    daemon.kill();
    daemon.go_on();
    let mut read = [0; 4096];
    assert_eq!((client.read(0, &mut read), read), (0, [7; 4096]));
    drop(client);
    let (_, e) = daemon.ctl_error(&["export", "set", "a", "persistent=on"]);
    assert!(e.contains("passed open"), "{e}");
    // Nor does one that is persistent get below it later.
    let named = format!("filename={}", text(&daemon.image("named.img", MIB)));
    daemon.ctl(&["node", "add", "named", "driver=file", &named]);
    daemon.export_node("named", "named", &["--persistent"]);
    daemon.ctl(&["export", "remove", "a"]);
    let (_, e) = daemon.ctl_error(&["node", "replace", "named", "a"]);
    assert!(
        e.contains("'named' is persistent") && e.contains("passed open"),
        "{e}"
    );
    daemon.ctl(&["export", "remove", "named"]);
    daemon.ctl(&["node", "remove", "named"]);
    daemon.export_node("a", "a", &[]);

    daemon.kill();
    daemon.manager().lose("fd.0");
    daemon.go_on();
    let problems = daemon.ctl_json(&["info"])["Problems"].to_string();
    assert!(problems.contains("pass it again"), "{problems}");
    pass(&daemon, "b");
    assert_eq!(
        daemon.ctl_json(&["node", "show", "b"])["Filename"],
        "/dev/fdset/1"
    );
    daemon.kill();
    daemon.go_on();
    assert_eq!(ids(&daemon, "export", "Id"), ["b"]);
    // What is lost can be given up.
    daemon.ctl(&["export", "remove", "a"]);
    daemon.ctl(&["node", "remove", "a"]);
    assert_eq!(daemon.ctl_json(&["info"])["Problems"], json!([]));
    let (code, _) = daemon.ctl_error(&["export", "remove", "a"]);
    assert_eq!(code, 3);
    daemon.ctl(&["export", "remove", "b"]);
    daemon.ctl(&["node", "remove", "b"]);
    wait_for("everything to be given up", || {
        daemon.manager().kept().is_empty().then_some(())
    });
}

/// Exports become persistent while others come and go: nobody waits for anybody for ever.
#[test]
fn many_change_exports_at_once() {
    let daemon = Daemon::start(&[]);
    daemon.ctl(&["node", "add", "n", "driver=null-co", "size=1M"]);
    std::thread::scope(|s| {
        for thread in 0..4 {
            let daemon = &daemon;
            s.spawn(move || {
                for round in 0..6 {
                    let id = format!("e{thread}-{round}");
                    daemon.export_node(&id, "n", &["read-only", "--queues", "1", "--persistent"]);
                    if round % 2 == 0 {
                        daemon.ctl(&["export", "remove", &id]);
                    }
                }
            });
        }
    });
    assert_eq!(ids(&daemon, "export", "Id").len(), 12);
}
