//! The test harness: private daemons, real guests, raw vhost-user front-ends.

mod daemon;
mod guest;
mod lab;
mod manager;
pub mod qemu_tools;
mod qmp;
pub mod workload;

pub mod blk_client;
pub mod frontend;

pub use daemon::{Daemon, Scratch, program, scratch, vdiskctl_binary};
pub use guest::{Guest, GuestOptions};
pub use lab::{lab, lab_path};
pub use manager::Manager;
pub use qmp::Qmp;

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

/// Runs a program as root, by sudo if need be; returns what it printed.
pub fn as_root(args: &[&str]) -> String {
    let sudo = (!rustix::process::getuid().is_root()).then_some("sudo");
    let words: Vec<&str> = sudo.into_iter().chain(args.iter().copied()).collect();
    let out = std::process::Command::new(words[0])
        .args(&words[1..])
        .output()
        .expect("the program is installed: run 'make setup'");
    if !out.status.success() {
        println!("{}", String::from_utf8_lossy(&out.stdout));
        panic!("{args:?}: {}", String::from_utf8_lossy(&out.stderr));
    }
    String::from_utf8_lossy(&out.stdout).trim().to_owned()
}

/// Runs a script of `tests` in a container that has a systemd and the installed service (see `in-systemd.sh`), on this machine's
/// files or on those of a lab root; panics unless it says at its end that all is well.
pub fn in_container(script: &str, root: Option<&str>) {
    let lower = root.map_or("/".into(), |root| lab_path(root).display().to_string());
    // Less than nextest waits (`.config/nextest.toml`), which would not show what was said.
    run_script(
        "in-systemd.sh",
        &[&format!("LOWER={lower}"), "LIMIT=300"],
        script,
    );
}

/// Runs a script of `tests` in a guest that enforces SELinux (see `in-selinux.sh`); panics unless it says at its end that all is well.
pub fn under_selinux(script: &str) {
    run_script("in-selinux.sh", &[], script);
}

fn run_script(runner: &str, settings: &[&str], script: &str) {
    let here = env!("CARGO_MANIFEST_DIR");
    let programs = program("vdiskd");
    let programs = programs.parent().expect("a program is in a folder");
    let lab = format!("VDISK_LAB={}", lab().display());
    let command = [
        &format!("{here}/{runner}"),
        programs.to_str().expect("build folders are ASCII"),
        &format!("{here}/tests/{script}"),
    ];
    let out = as_root(&[&["env", lab.as_str()], settings, &command].concat());
    print!("{out}");
    assert!(out.ends_with("all is well"), "{script}");
}

/// Looks again and again until something is there; panics after a minute.
pub fn wait_for<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + Duration::from_secs(60);
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < end, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Adds an export on a listening socket that is passed over D-Bus.
pub fn pass_listener(bus: &str, id: &str, node: &str, listener: OwnedFd) {
    zbus::block_on(async {
        let address: zbus::Address = bus.parse().expect("the bus printed it");
        let connection = zbus::connection::Builder::address(address)
            .build()
            .await
            .expect("the bus is there");
        let manager = vdisk_dbus::ManagerProxy::new(&connection)
            .await
            .expect("the daemon is there");
        let options = HashMap::from([
            ("type", zbus::Variant::from("vhost-user-blk")),
            ("id", zbus::Variant::from(id)),
            ("node-name", zbus::Variant::from(node)),
            ("socket", zbus::Variant::from(zbus::Fd::from(listener))),
        ]);
        manager
            .add_export(options)
            .await
            .expect("the socket is accepted");
    });
}
