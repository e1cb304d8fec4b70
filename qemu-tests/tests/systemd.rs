//! The service as it is installed, under a real systemd and a real bus (see `in-systemd.sh`).

use vdisk_qemu_tests::{as_root, lab, program};

/// Runs a script of `tests/systemd` in a container; what it printed.
fn run(script: &str) -> String {
    let here = env!("CARGO_MANIFEST_DIR");
    let programs = program("vdiskd");
    let programs = programs.parent().expect("a program is in a folder");
    let lab = format!("VDISK_LAB={}", lab().display());
    let out = as_root(&[
        "env",
        &lab,
        &format!("{here}/in-systemd.sh"),
        programs.to_str().expect("build folders are ASCII"),
        &format!("{here}/tests/systemd/{script}"),
    ]);
    print!("{out}");
    out
}

/// The bus starts it, nobody notices its restarts, an idle one ends, a stuck one is replaced, and it may do little.
#[test]
fn the_service_is_not_noticed() {
    let out = run("restart.sh");
    assert!(out.ends_with("all is well"), "{out}");
}

/// polkit decides, by a real polkitd: who may look, manage, name files, attach; files that are passed open need no right but the caller's.
#[test]
fn polkit_decides() {
    let out = run("access.sh");
    assert!(out.ends_with("all is well"), "{out}");
}

/// A state that cannot be written or restored is named and the rest serves; persistent exports, sockets that systemd listens on,
/// instances, a user's session, metrics, credentials.
#[test]
fn what_was_configured_stays() {
    let out = run("state.sh");
    assert!(out.ends_with("all is well"), "{out}");
}

/// A real guest on the installed service: kills, restarts, reloads, snapshots and commits under its verified load.
#[test]
fn a_guest_does_not_notice_the_service() {
    let out = run("guest.sh");
    assert!(out.ends_with("all is well"), "{out}");
}

/// What the unit takes from the daemon, it does not have.
#[test]
fn every_wall_of_the_unit_holds() {
    let out = run("walls.sh");
    assert!(out.ends_with("all is well"), "{out}");
}
