//! `make demo`: a guest boots, finds a disk that vdiskd serves over vhost-user-blk, writes and verifies
//! data on it; vdiskctl shows the graph meanwhile.

use serde_json::{Value, json};
use vdisk_qemu_tests::{Daemon, Guest, GuestOptions};

const MIB: u64 = 1 << 20;

fn step(text: &str) {
    println!("\n\x1b[1m== {text}\x1b[0m");
}

fn show(daemon: &Daemon, args: &[&str]) {
    println!("$ vdiskctl {}", args.join(" "));
    print!("{}", daemon.ctl(args));
}

fn guest_does(guest: &mut Guest, what: &str, request: Value) {
    guest.run(request);
    println!("guest: {what}");
}

fn main() {
    step("a daemon on a private D-Bus, with two I/O threads");
    let daemon = Daemon::start(&["--io-threads", "2"]);
    show(&daemon, &["info"]);

    step("an image, opened as a node and exported");
    let image = daemon.image("disk0.img", 256 * MIB);
    let filename = format!("file.filename={}", image.display());
    show(
        &daemon,
        &[
            "node",
            "add",
            "disk0",
            "driver=raw",
            "file.driver=file",
            &filename,
            "discard=unmap",
        ],
    );
    let socket = daemon.socket("vm1");
    let path = socket.display().to_string();
    show(
        &daemon,
        &[
            "export",
            "add",
            "vm1",
            "--node",
            "disk0",
            "--socket",
            &path,
            "--writable",
            "--queues",
            "2",
            "--serial",
            "vdiskd-demo",
        ],
    );

    step("a guest boots (QEMU without KVM, a few seconds)");
    let mut guest = Guest::boot(GuestOptions::new().disk(&socket, 2));
    let disk = &guest.run(json!({"cmd": "disks"}))["vda"];
    println!(
        "guest: found /dev/vda, {} MiB, serial {}, {} queues",
        disk["size"].as_u64().unwrap_or(0) / MIB,
        disk["serial"],
        disk["queues"]
    );
    show(&daemon, &["tree"]);

    step("verified I/O");
    let range = |cmd: &str| json!({"cmd": cmd, "disk": "vda", "offset": 0, "len": 32 * MIB, "generation": 1, "threads": 4});
    guest_does(
        &mut guest,
        "wrote 32 MiB, each block with its number",
        range("write"),
    );
    guest_does(
        &mut guest,
        "flushed",
        json!({"cmd": "flush", "disk": "vda"}),
    );
    guest_does(
        &mut guest,
        "read everything back: all right",
        range("verify"),
    );
    show(&daemon, &["stats", "vm1"]);

    step("online resize");
    show(&daemon, &["node", "resize", "disk0", "+64M"]);
    guest_does(
        &mut guest,
        "sees 320 MiB",
        json!({"cmd": "wait-size", "disk": "vda", "size": 320 * MIB}),
    );
    guest.assert_no_errors();
    guest.shut_down();

    step("done: all of it can be run again with 'make demo'; 'make test' runs the tests");
}
