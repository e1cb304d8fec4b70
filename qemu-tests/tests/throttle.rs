//! Throttle groups, and filters that come and go under clients.

use std::time::{Duration, Instant};

use vdisk_qemu_tests::Daemon;
use vdisk_qemu_tests::blk_client::Client;
use vdisk_qemu_tests::qemu_tools::text;
use vdisk_qemu_tests::workload::{change, compare};

const MIB: u64 = 1 << 20;

/// How long so many reads take, one after the other.
fn time_reads(client: &mut Client, n: u64) -> Duration {
    let start = Instant::now();
    let mut buf = [0; 512];
    for i in 0..n {
        assert_eq!(client.read(i * 512, &mut buf), 0);
    }
    start.elapsed()
}

fn connect(daemon: &Daemon, id: &str) -> Client {
    Client::connect(&daemon.socket(id), 1, 1, 1 << 20)
}

#[test]
fn filters_come_and_go_under_clients() {
    let daemon = Daemon::start(&["--io-threads", "2"]);
    let image = daemon.path("disk.qcow2");
    daemon.ctl(&["image", "create", text(&image), "16M"]);
    let filename = format!("file.filename={}", image.display());
    daemon.ctl(&[
        "node",
        "add",
        "disk",
        "driver=qcow2",
        "file.driver=file",
        &filename,
        "discard=unmap",
    ]);
    daemon.export_node("d", "disk", &[]);
    let mut client = connect(&daemon, "d");
    let mut model = vec![0; 16 << 20];
    change(&mut client, &mut model, 1, 50);
    let path = || {
        let export = daemon.ctl_json(&["export", "show", "d"]);
        format!(
            "{} {} {}",
            export["Path"], export["PathReason"], export["Node"]
        )
    };
    assert!(path().starts_with("\"fast\""), "{}", path());

    daemon.ctl(&["throttle", "set", "slow", "iops-read=50", "bps-write=1G"]);
    let report = daemon.ctl_json(&["throttle", "insert", "disk", "slow"]);
    assert!(report["paused-ns"].as_u64() > Some(0), "{report}");
    let now = path();
    assert!(
        now.starts_with("\"slow\"") && now.contains("throttle"),
        "{now}"
    );
    // Five may go at once, the others take their time.
    assert!(time_reads(&mut client, 55) > Duration::from_millis(900));
    change(&mut client, &mut model, 2, 50);

    // A snapshot goes between the filter and what is below.
    let over = daemon.path("over.qcow2");
    daemon.ctl(&[
        "snapshot",
        "overlay",
        "disk",
        "over",
        text(&over),
        "discard=unmap",
    ]);
    let filter = daemon.ctl_json(&["node", "show", "disk-throttle"]);
    assert!(filter["Children"].to_string().contains("over"), "{filter}");
    change(&mut client, &mut model, 3, 50);
    assert!(time_reads(&mut client, 55) > Duration::from_millis(900));

    // Other limits count at once, and the fast path comes back with the end of it.
    daemon.ctl(&["throttle", "set", "slow", "iops-total=1000000"]);
    change(&mut client, &mut model, 4, 50);
    daemon.ctl(&["throttle", "take-out", "disk-throttle"]);
    let now = path();
    assert!(now.starts_with("\"fast\"") && now.contains("over"), "{now}");
    daemon.ctl(&["throttle", "remove", "slow"]);
    change(&mut client, &mut model, 5, 50);
    drop(client);
    compare(&daemon, "d", &model);
    daemon.ctl(&["export", "remove", "d"]);
    daemon.ctl(&["node", "remove", "over"]);
    daemon.ctl(&["node", "remove", "disk"]);
}

/// Whoever waits for all requests in flight does not wait for those that a group holds back.
#[test]
fn what_is_held_back_goes_when_the_graph_changes() {
    let daemon = Daemon::start(&[]);
    let image = daemon.image("disk.img", MIB);
    daemon.export_file("disk", &image, &[], &[]);
    daemon.ctl(&["throttle", "set", "g", "iops-total=1"]);
    daemon.ctl(&["throttle", "insert", "disk", "g", "--name", "filter"]);
    for action in [
        &["throttle", "take-out", "filter"][..],
        &["throttle", "set", "g", "iops-total=1000000"],
        &["export", "remove", "disk"],
    ] {
        let mut client = Client::connect(&daemon.socket("disk"), 1, 32, 4096);
        client.start_writes(MIB);
        let start = Instant::now();
        daemon.ctl(action);
        // One after the other they would take half a minute.
        assert!(start.elapsed() < Duration::from_secs(20), "{action:?}");
        if action[1] == "take-out" {
            daemon.ctl(&["throttle", "insert", "disk", "g", "--name", "filter"]);
        }
        if action[1] == "set" {
            drop(client);
            let mut client = connect(&daemon, "disk");
            assert!(time_reads(&mut client, 20) < Duration::from_secs(15));
            daemon.ctl(&["throttle", "set", "g", "iops-total=1"]);
        }
    }
}

#[test]
fn members_of_a_group_share_its_limits() {
    let daemon = Daemon::start(&["--io-threads", "2"]);
    daemon.ctl(&["throttle", "set", "g", "iops-total=60"]);
    for id in ["a", "b"] {
        let file = daemon.image(id, MIB);
        let filename = format!("file.filename={}", file.display());
        daemon.ctl(&[
            "node",
            "add",
            id,
            "driver=throttle",
            "throttle-group=g",
            "file.driver=file",
            &filename,
        ]);
        daemon.export_node(id, id, &[]);
    }
    let groups = daemon.ctl_json(&["throttle", "list"]);
    assert_eq!(groups["g"]["members"], 2);
    assert_eq!(groups["g"]["iops-total"], 60);
    let start = Instant::now();
    std::thread::scope(|s| {
        for id in ["a", "b"] {
            s.spawn(|| time_reads(&mut connect(&daemon, id), 60));
        }
    });
    // 120 requests at 60 in a second, six of them at once.
    assert!(
        start.elapsed() > Duration::from_millis(1800),
        "{:?}",
        start.elapsed()
    );
}

#[test]
fn what_is_refused_changes_nothing() {
    let daemon = Daemon::start(&[]);
    let image = daemon.image("disk.img", MIB);
    daemon.export_file("disk", &image, &[], &[]);
    daemon.ctl(&["throttle", "set", "g", "iops-total=100"]);
    daemon.ctl(&["throttle", "insert", "disk", "g"]);
    let other = daemon.path("other.qcow2");
    daemon.ctl(&["image", "create", text(&other), "1M"]);
    let filename = format!("filename={}", other.display());
    daemon.ctl(&["node", "add", "low", "driver=file", &filename]);
    daemon.ctl(&["node", "add", "high", "driver=qcow2", "file=low"]);
    let nodes = || daemon.ctl_json(&["node", "list"]);
    let before = nodes();
    for (args, messages) in [
        (
            &["set", "g", "iops-total=1", "iops-read=1"][..],
            &["'g'", "iops-total", "iops-read"][..],
        ),
        (&["set", "1g", "iops-total=1"], &["1g"]),
        (&["remove", "g"], &["'g'", "1 nodes"]),
        (&["remove", "nobody"], &["'nobody'"]),
        (&["insert", "disk", "nobody"], &["'disk-throttle'"]),
        (&["insert", "nothing", "g"], &["nothing"]),
        (&["insert", "low", "g"], &["'low'", "'high'"]),
        (&["take-out", "disk"], &["'disk'", "filter"]),
        (&["take-out", "high"], &["'high'", "qcow2"]),
    ] {
        let (_, e) = daemon.ctl_error(&[&["throttle"], args].concat());
        for message in messages {
            assert!(e.contains(message), "{args:?}: {e}");
        }
        assert_eq!(nodes(), before, "{args:?}");
    }
    let (_, e) = daemon.ctl_error(&[
        "node",
        "add",
        "t",
        "driver=throttle",
        "throttle-group=nobody",
        "file=high",
    ]);
    assert!(e.contains("'t'") && e.contains("'nobody'"), "{e}");
    let limits = daemon.ctl_json(&["throttle", "list"]);
    assert_eq!(limits["g"]["iops-total"], 100, "{limits}");
    assert_eq!(connect(&daemon, "disk").write(0, &[1; 512]), 0);
}
