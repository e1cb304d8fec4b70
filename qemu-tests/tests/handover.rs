//! Images that go from one daemon to another, as those of a guest that moves to another host do: open at one of them at a time.

use std::path::Path;

use vdisk_qemu_tests::frontend::{BASE, DATA, FEATURES, Frontend, LEN, request, words};
use vdisk_qemu_tests::qemu_tools::{assert_sound, text, tool};
use vdisk_qemu_tests::{Daemon, wait_for};

const MIB: u64 = 1 << 20;

/// `VHOST_F_LOG_ALL`: the front-end wants to know which pages of the guest are written, as it does before the guest moves.
const LOG_ALL: u64 = 1 << 26;

const READ: u32 = 0;
const WRITE: u32 = 1;

fn add(daemon: &Daemon, id: &str, image: &Path, more: &[&str]) {
    let filename = format!("file.filename={}", image.display());
    let args = ["node", "add", id, "driver=qcow2", "file.driver=file"];
    daemon.ctl(&[&args[..], &[&filename], more].concat());
}

fn is_active(daemon: &Daemon, node: &str) -> bool {
    let nodes = daemon.ctl_json(&["node", "list"]);
    let found = nodes.as_array().unwrap().iter();
    let mut found = found.filter(|n| n["Name"] == node);
    found.next().expect("there is the node")["Active"] == true
}

fn give_memory(front: &mut Frontend) {
    assert!(front.set_memory(&words(&[1, BASE, LEN, BASE, 0])));
}

fn log_changes(front: &mut Frontend) {
    let features = FEATURES | LOG_ALL;
    front.send(request::SET_FEATURES, 0, &features.to_ne_bytes(), &[]);
}

fn write(front: &mut Frontend, sector: u64, byte: u8) {
    front.poke(DATA + 4096, &[byte; 4096]);
    assert_eq!(front.simple(WRITE, sector, 4096), 0);
}

fn read(front: &mut Frontend, sector: u64) -> Vec<u8> {
    assert_eq!(front.simple(READ, sector, 4096), 0);
    front.peek(DATA + 4096, 4096)
}

/// Has a job begin that does not end by itself.
fn begin_backup(source: &Daemon, guest: &mut Frontend) {
    for mib in 0..8 {
        write(guest, mib * 2048, 1);
    }
    let copy = source.path("copy.qcow2").display().to_string();
    let slow = ["--speed", "1", "--detach", "job-id=slow"];
    source.ctl(&[&["backup", "disk", &copy][..], &slow].concat());
}

/// A source that serves an image over a base, and a destination that waits for it.
fn pair() -> (Daemon, Daemon, std::path::PathBuf) {
    let (source, destination) = (Daemon::start(&[]), Daemon::start(&[]));
    let (base, image) = (source.path("base.qcow2"), source.path("a.qcow2"));
    source.ctl(&["image", "create", text(&base), "16M"]);
    let over = ["16M", "-b", text(&base), "-F", "qcow2"];
    source.ctl(&[&["image", "create", text(&image)][..], &over].concat());
    let below = format!("backing.file.filename={}", base.display());
    let below = ["backing.driver=qcow2", "backing.file.driver=file", &below];
    add(&source, "disk", &image, &below);
    source.export_node("vm", "disk", &[]);
    add(
        &destination,
        "disk",
        &image,
        &[&below[..], &["active=off"]].concat(),
    );
    destination.ctl(&["throttle", "set", "group", "iops-total=100000"]);
    destination.ctl(&[
        "node",
        "add",
        "limited",
        "driver=throttle",
        "throttle-group=group",
        "file=disk",
    ]);
    destination.export_node("vm", "limited", &[]);
    (source, destination, image)
}

#[test]
fn images_are_open_at_one_daemon_at_a_time() {
    let (source, destination, image) = pair();
    let mut here = Frontend::start(&source.socket("vm"));
    write(&mut here, 8, 1);
    // There everything is in place, and nothing is open.
    for node in ["disk", "limited"] {
        assert!(!is_active(&destination, node), "{node}");
    }
    assert!(destination.ctl(&["tree"]).contains("inactive"));
    let mut there = Frontend::connect(&destination.socket("vm"));
    let config = there.get_config();
    assert_eq!(config[..8], (16 * MIB / 512).to_le_bytes());
    give_memory(&mut there);
    let over = destination.path("over.qcow2").display().to_string();
    let copy = destination.path("copy.qcow2").display().to_string();
    for refused in [
        &["node", "resize", "disk", "32M"][..],
        &["node", "set", "disk", "discard=unmap"],
        &["snapshot", "overlay", "disk", "over", &over],
        &["bitmap", "add", "disk", "daily"],
        &["backup", "disk", &copy],
        &["throttle", "insert", "disk", "group"],
    ] {
        let (code, message) = destination.ctl_error(refused);
        assert_eq!(code, 4, "{refused:?}: {message}");
        assert!(message.contains("inactive"), "{refused:?}: {message}");
    }
    let (code, message) = destination.ctl_error(&["node", "activate", "limited"]);
    assert!(code == 4 && message.contains("is locked"), "{message}");
    assert!(!is_active(&destination, "disk"));
    // Nor half of what a guest stands on, or what another guest uses.
    let (code, message) = destination.ctl_error(&["node", "activate", "disk"]);
    assert!(
        code == 4 && message.contains("make that one active"),
        "{message}"
    );
    let (code, message) = source.ctl_error(&["node", "deactivate", "disk"]);
    assert!(
        code == 4 && message.contains("guest of export 'vm'"),
        "{message}"
    );
    write(&mut here, 8, 1);
    // A guest that is only stopped keeps its image.
    here.stop_queue();
    assert!(is_active(&source, "disk"));
    here.start_queue();
    // One that moves does not, when its front-end has heard that it has stopped.
    log_changes(&mut here);
    write(&mut here, 16, 2);
    here.stop_queue();
    assert!(!is_active(&source, "disk"));
    assert_sound(&image);
    there.start_queue();
    for node in ["disk", "limited"] {
        assert!(is_active(&destination, node), "{node}");
    }
    assert_eq!(read(&mut there, 8), [1; 4096]);
    assert_eq!(read(&mut there, 16), [2; 4096]);
    write(&mut there, 24, 3);
    let (code, message) = source.ctl_error(&["node", "activate", "disk"]);
    assert!(code == 4 && message.contains("is locked"), "{message}");
    // And back: the front-end there was never told that its disk is another now.
    log_changes(&mut there);
    there.stop_queue();
    here.start_queue();
    assert!(is_active(&source, "disk") && !is_active(&destination, "disk"));
    assert_eq!(read(&mut here, 24), [3; 4096]);
    write(&mut here, 24, 4);
    drop((here, there));
    // What is not open can be removed.
    destination.ctl(&["export", "remove", "vm"]);
    destination.ctl(&["node", "remove", "limited"]);
    destination.ctl(&["node", "remove", "disk"]);
    source.ctl(&["export", "remove", "vm"]);
    source.ctl(&["node", "remove", "disk"]);
    assert_sound(&image);
}

/// A guest that comes while the image is still open elsewhere waits for it, and its front-end hears of no error.
#[test]
fn a_guest_waits_until_its_image_is_let_go_of() {
    let (source, destination, _) = pair();
    let mut there = Frontend::connect(&destination.socket("vm"));
    let starts = std::thread::spawn(move || {
        give_memory(&mut there);
        there.start_queue();
        assert_eq!(read(&mut there, 8), [0; 4096]);
    });
    let mut log = String::new();
    wait_for("a guest that waits", || {
        log = destination.log();
        log.contains("the guest has to wait").then_some(())
    });
    source.ctl(&["node", "deactivate", "disk"]);
    starts.join().expect("the guest goes on");
    assert!(is_active(&destination, "disk"));
}

#[test]
fn what_is_inactive_is_so_after_a_restart() {
    let (mut source, destination, _) = pair();
    drop(destination);
    source.ctl(&["bitmap", "add", "disk", "daily"]);
    source.ctl(&["node", "threshold", "disk", "8M"]);
    source.ctl(&["node", "deactivate", "disk"]);
    source.ctl(&["node", "deactivate", "disk"]);
    for round in 0..2 {
        match round {
            0 => source.kill(),
            _ => assert_eq!(source.terminate(), Some(0)),
        }
        source.go_on();
        assert!(!is_active(&source, "disk"), "round {round}");
    }
    let (code, message) = source.ctl_error(&["node", "deactivate", "#block1"]);
    assert!(
        code == 4 && message.contains("below node 'disk'"),
        "{message}"
    );
    let mut here = Frontend::start(&source.socket("vm"));
    assert!(is_active(&source, "disk"));
    write(&mut here, 8, 1);
    // Of what it had nobody knows: it has everything.
    let bitmap = &source.ctl_json(&["bitmap", "list"])[0];
    assert_eq!(bitmap["Count"], 16 * MIB, "{bitmap}");
    let nodes = source.ctl_json(&["node", "list"]);
    let mut nodes = nodes.as_array().unwrap().iter();
    let disk = nodes.find(|n| n["Name"] == "disk").unwrap();
    assert_eq!(disk["WriteThreshold"], 8 * MIB);
}

/// A job has the image open: it is let go of when the job has ended, while the guest waits elsewhere.
#[test]
fn an_image_that_a_job_needs_is_let_go_of_later() {
    let (source, destination, _) = pair();
    let mut here = Frontend::start(&source.socket("vm"));
    begin_backup(&source, &mut here);
    let (code, message) = source.ctl_error(&["node", "deactivate", "disk"]);
    assert!(code == 4 && message.contains("job 'slow'"), "{message}");
    log_changes(&mut here);
    here.stop_queue();
    assert!(is_active(&source, "disk"));
    source.ctl(&["job", "cancel", "slow", "--force"]);
    wait_for("the image to be let go of", || {
        (!is_active(&source, "disk")).then_some(())
    });
    destination.ctl(&["node", "activate", "limited"]);
}

/// A daemon that ends meanwhile leaves no image to the next that another host may have by then.
#[test]
fn a_daemon_that_ends_lets_go_of_what_it_owes() {
    let (mut source, destination, _) = pair();
    let mut here = Frontend::start(&source.socket("vm"));
    begin_backup(&source, &mut here);
    log_changes(&mut here);
    here.stop_queue();
    assert!(is_active(&source, "disk"));
    drop(here);
    assert_eq!(source.terminate(), Some(0));
    destination.ctl(&["node", "activate", "limited"]);
    source.go_on();
    assert!(!is_active(&source, "disk"));
    // The guest has come back after all.
    destination.ctl(&["node", "deactivate", "limited"]);
    let mut here = Frontend::start(&source.socket("vm"));
    assert_eq!(read(&mut here, 2048), [1; 4096]);
}

/// A source whose disk is mirrored to a destination with storage of its own, where a guest may come.
fn copied_pair() -> (Daemon, Daemon) {
    let (source, destination) = (Daemon::managed(&[]), Daemon::start(&[]));
    let (here, there) = (
        source.image("d.img", 16 * MIB),
        destination.image("c.img", 16 * MIB),
    );
    let file = |image: &Path| format!("filename={}", image.display());
    source.ctl(&["node", "add", "disk", "driver=file", &file(&here)]);
    source.export_node("vm", "disk", &[]);
    destination.ctl(&["node", "add", "copy", "driver=file", &file(&there)]);
    let nbd = destination.path("copy.nbd").display().to_string();
    destination.ctl(&[
        "export",
        "add",
        "copy",
        "--type",
        "nbd",
        "--node",
        "copy",
        "--socket",
        &nbd,
        "--writable",
        "until-disconnect=on",
    ]);
    destination.ctl(&[
        "node",
        "add",
        "disk",
        "driver=file",
        &file(&there),
        "active=off",
    ]);
    destination.export_node("vm", "disk", &[]);
    let server = format!("server.path={nbd}");
    source.ctl(&["node", "add", "copy", "driver=nbd", &server]);
    mirror(&source);
    (source, destination)
}

fn mirror(source: &Daemon) {
    let bus = format!("--address={}", source.bus_address());
    tool(
        "busctl",
        &[
            &bus,
            "call",
            "org.vdisk1",
            "/org/vdisk1/node/disk",
            "org.vdisk1.Node",
            "Mirror",
            "a{sv}",
            "4",
            "target",
            "s",
            "copy",
            "hand-over",
            "b",
            "true",
            "job-id",
            "s",
            "m",
            "auto-dismiss",
            "b",
            "false",
        ],
    );
    let state = || source.ctl_json(&["job", "show", "m"])["State"].clone();
    wait_for("the mirror", || (state() == "ready").then_some(()));
}

/// A filter that waits to be opened would be opened over the node that it names: no other takes its place meanwhile.
#[test]
fn what_is_below_an_inactive_filter_stays() {
    let daemon = Daemon::start(&[]);
    for name in ["disk", "other"] {
        daemon.ctl(&["node", "add", name, "driver=null-co", "size=1M"]);
    }
    daemon.ctl(&["throttle", "set", "group", "iops-total=5000"]);
    let add = [
        "node",
        "add",
        "limit",
        "driver=throttle",
        "throttle-group=group",
    ];
    daemon.ctl(&[&add[..], &["file=disk", "active=off"]].concat());
    let replace = ["node", "replace", "disk", "other"];
    let (_, e) = daemon.ctl_error(&replace);
    assert!(e.contains("'limit', which is inactive"), "{e}");
    daemon.ctl(&["node", "activate", "limit"]);
    daemon.ctl(&replace);
}

fn is_locked(destination: &Daemon) {
    let (code, message) = destination.ctl_error(&["node", "activate", "disk"]);
    assert!(code == 4 && message.contains("is locked"), "{message}");
}

/// A disk that moves with its guest is used there when all is there that the guest has written: not before it has stopped, and not
/// when it goes on here after all, as guests do that are reset.
#[test]
fn a_copy_is_used_when_all_is_there() {
    let (source, destination) = copied_pair();
    let mut here = Frontend::start(&source.socket("vm"));
    write(&mut here, 8, 1);
    let mut there = Frontend::connect(&destination.socket("vm"));
    give_memory(&mut there);
    is_locked(&destination);
    log_changes(&mut here);
    for round in 2..5 {
        write(&mut here, 8 * u64::from(round), round);
        here.stop_queue();
        assert!(is_active(&source, "disk"));
        // Before it writes.
        here.start_queue();
        is_locked(&destination);
        write(&mut here, 8 * u64::from(round) + 256, round);
        is_locked(&destination);
    }
    here.stop_queue();
    there.start_queue();
    assert!(is_active(&destination, "disk"));
    assert_ne!(
        destination
            .try_ctl(&["export", "show", "copy"])
            .status
            .code(),
        Some(0)
    );
    assert_eq!(read(&mut there, 8), [1; 4096]);
    for round in 2..5 {
        assert_eq!(read(&mut there, 8 * u64::from(round)), [round; 4096]);
        assert_eq!(read(&mut there, 8 * u64::from(round) + 256), [round; 4096]);
    }
    write(&mut there, 8, 9);
}

/// A copy that is not finished is nobody's: not of a job that failed, not of a daemon that ends, not when its guest has gone.
#[test]
fn an_unfinished_copy_stays_locked() {
    let (mut source, destination) = copied_pair();
    let mut here = Frontend::start(&source.socket("vm"));
    write(&mut here, 8, 1);
    log_changes(&mut here);
    source.ctl(&["job", "cancel", "m", "--force"]);
    let gone = || {
        source
            .try_ctl(&["node", "remove", "copy"])
            .status
            .success()
            .then_some(())
    };
    wait_for("the job's end", gone);
    let clients = || destination.ctl_json(&["export", "show", "copy"])["Clients"].clone();
    wait_for("the end of the client", || (clients() == 0).then_some(()));
    is_locked(&destination);
    // Nor is the source let go of without it.
    here.stop_queue();
    assert!(is_active(&source, "disk"));
    is_locked(&destination);
    here.start_queue();
    source.ctl(&["job", "dismiss", "m"]);
    let nbd = format!("server.path={}", destination.path("copy.nbd").display());
    source.ctl(&["node", "add", "copy", "driver=nbd", &nbd]);
    mirror(&source);
    assert_eq!(source.terminate(), Some(0));
    wait_for("the end of the client", || (clients() == 0).then_some(()));
    is_locked(&destination);
}
