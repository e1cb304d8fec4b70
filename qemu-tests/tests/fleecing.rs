//! Nodes that show what a disk had at one moment, while clients write to it.

use std::path::Path;

use vdisk_qemu_tests::Daemon;
use vdisk_qemu_tests::blk_client::Client;
use vdisk_qemu_tests::qemu_tools::{assert_sound, read_with_qemu, text, tool};
use vdisk_qemu_tests::workload::{Sequence, Writer, assert_same, change};

const MIB: u64 = 1 << 20;
const SIZE: u64 = 16 * MIB;

fn add(daemon: &Daemon, id: &str, driver: &str, image: &Path) {
    tool(
        "qemu-img",
        &["create", "-q", "-f", driver, text(image), "16M"],
    );
    let driver = format!("driver={driver}");
    let filename = format!("file.filename={}", image.display());
    daemon.ctl(&["node", "add", id, &driver, "file.driver=file", &filename]);
    daemon.export_node(id, id, &[]);
}

fn read_all(client: &mut Client) -> Vec<u8> {
    let mut disk = vec![0; SIZE as usize];
    for (i, part) in disk.chunks_mut(1 << 20).enumerate() {
        assert_eq!(client.read(i as u64 * MIB, part), 0);
    }
    disk
}

/// Read whenever and however often, it is the same moment: through an export, and copied by a job, also when an overlay
/// takes the disk's place meanwhile.
#[test]
fn a_moment_stays_while_guests_write() {
    let daemon = Daemon::start(&["--io-threads", "2"]);
    for driver in ["raw", "qcow2"] {
        let image = daemon.path(&format!("{driver}.img"));
        add(&daemon, driver, driver, &image);
        let sequence = Sequence::new(SIZE);
        std::thread::scope(|s| {
            let writer = Writer::start(s, &sequence, &daemon.socket(driver));
            sequence.wait_for_more(300);
            let scratch = daemon.path(&format!("{driver}.scratch"));
            let (noon, before) = (format!("{driver}-noon"), sequence.written());
            daemon.ctl(&["fleece", "start", driver, &noon, text(&scratch)]);
            let after = sequence.written();
            daemon.export_node(&noon, &noon, &["read-only"]);
            let mut client = Client::connect(&daemon.socket(&noon), 1, 1, 1 << 20);
            let disk = read_all(&mut client);
            let last = sequence.last_write(&disk, driver);
            assert!(
                (before..=after + 1).contains(&last),
                "{before} {last} {after}"
            );
            sequence.wait_for_more(300);
            let over = daemon.path(&format!("{driver}.over"));
            daemon.ctl(&[
                "snapshot",
                "overlay",
                driver,
                &format!("{driver}-over"),
                text(&over),
            ]);
            sequence.wait_for_more(300);
            assert_same(&read_all(&mut client), &disk, 0, driver);
            let copy = daemon.path(&format!("{driver}.copy"));
            daemon.ctl(&["convert", &noon, text(&copy)]);
            assert_sound(&copy);
            assert_same(&read_with_qemu(&copy), &disk, 0, driver);
            // It has what stands on it, and is read-only.
            let filter = format!("{noon}-filter");
            let (code, error) = daemon.ctl_error(&["node", "take-out", &filter]);
            assert_eq!(code, 4, "{error}");
            assert_ne!(client.write(0, &[1; 4096]), 0);
            drop(client);
            daemon.ctl(&["export", "remove", &noon]);
            daemon.ctl(&["fleece", "end", &noon]);
            assert!(!scratch.exists());
            sequence.wait_for_more(100);
            writer.end();
        });
        let export = daemon.ctl_json(&["export", "show", driver]);
        assert_eq!(export["Path"], "fast", "{export}");
        assert_eq!(
            daemon.ctl_json(&["node", "list"]).as_array().unwrap().len(),
            4
        );
        daemon.ctl(&["export", "remove", driver]);
        daemon.ctl(&["node", "remove", &format!("{driver}-over")]);
        daemon.ctl(&["node", "remove", driver]);
    }
}

/// The scratch image fails: the moment is lost and says so, or the guest's write fails, as the options have it.
#[test]
fn what_cannot_be_copied_breaks_what_it_is_told_to() {
    let daemon = Daemon::start(&[]);
    for (id, breaks) in [("moment", "break-snapshot"), ("guest", "break-guest-write")] {
        let image = daemon.path(id);
        add(&daemon, id, "raw", &image);
        let mut model = vec![0; SIZE as usize];
        let mut client = Client::connect(&daemon.socket(id), 1, 1, 1 << 20);
        change(&mut client, &mut model, 5, 60);
        let noon = format!("{id}-noon");
        let target = daemon.image(&format!("{id}.scratch"), SIZE);
        let target = format!("target.file.filename={}", target.display());
        let on_error = format!("on-cbw-error={breaks}");
        let mut filter = vec![
            "node",
            "insert",
            id,
            "f",
            "driver=copy-before-write",
            &on_error,
        ];
        filter.extend(["target.driver=blkdebug", "target.file.driver=file", &target]);
        filter.extend([
            "target.inject-error.iotype=write",
            "target.inject-error.after=1",
        ]);
        daemon.ctl(&filter);
        daemon.ctl(&["node", "add", &noon, "driver=snapshot-access", "file=f"]);
        daemon.export_node(&noon, &noon, &["read-only"]);
        let mut past = Client::connect(&daemon.socket(&noon), 1, 1, 1 << 20);
        assert_eq!(client.write(0, &[9; 4096]), 0);
        let mut data = [0; 4096];
        assert_eq!(past.read(0, &mut data), 0);
        assert_same(&data, &model[..4096], 0, id);
        let second = client.write(8 * MIB, &[9; 4096]);
        let read = past.read(0, &mut data);
        match breaks {
            "break-snapshot" => assert!(second == 0 && read != 0, "{second} {read}"),
            _ => assert!(second != 0 && read == 0, "{second} {read}"),
        }
        drop((client, past));
        daemon.ctl(&["export", "remove", &noon]);
        daemon.ctl(&["node", "remove", &noon]);
        daemon.ctl(&["node", "take-out", "f"]);
        daemon.ctl(&["export", "remove", id]);
        daemon.ctl(&["node", "remove", id]);
    }
}

#[test]
fn what_shows_no_moment_is_refused() {
    let daemon = Daemon::start(&[]);
    add(&daemon, "disk", "raw", &daemon.path("disk"));
    let refused = |args: &[&str], code: i32, why: &str| {
        let (got, error) = daemon.ctl_error(args);
        assert!(got == code && error.contains(why), "{got} {error}");
    };
    let access = ["node", "add", "past", "driver=snapshot-access", "file=disk"];
    refused(&access, 2, "keeps no moment");
    let small = daemon.image("small", MIB);
    let small = format!("target.filename={}", small.display());
    let insert = ["node", "insert", "disk", "f", "driver=copy-before-write"];
    refused(
        &[&insert[..], &["target.driver=file", &small]].concat(),
        2,
        "same size",
    );
    refused(&[&insert[..], &["target=disk"]].concat(), 4, "disk");
    refused(&[&insert[..], &["target=nothing"]].concat(), 3, "nothing");
    refused(&insert, 2, "target");
    refused(&["fleece", "end", "disk"], 2, "shows no moment");
    refused(&["fleece", "end", "nothing"], 3, "nothing");
    // A target is written by its filter alone, and keeps its place.
    let target = daemon.image("target", SIZE);
    daemon.ctl(&[
        "node",
        "add",
        "t",
        "driver=file",
        &format!("filename={}", target.display()),
    ]);
    daemon.ctl(&[&insert[..], &["target=t"]].concat());
    let socket = daemon.socket("x");
    let export = [
        "export",
        "add",
        "x",
        "--node",
        "t",
        "--socket",
        text(&socket),
        "--writable",
    ];
    refused(&export, 4, "node 'f'");
    let throttled = ["node", "insert", "t", "g", "driver=copy-on-read"];
    assert_ne!(daemon.ctl_error(&throttled).0, 0);
    daemon.ctl(&["throttle", "set", "slow", "iops-total=100"]);
    refused(&["throttle", "insert", "t", "slow"], 4, "node 'f'");
    refused(&["node", "remove", "t"], 4, "node 'f'");
    daemon.ctl(&["node", "take-out", "f"]);
    daemon.ctl(&["node", "remove", "t"]);
}
