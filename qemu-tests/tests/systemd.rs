//! The service as it is installed, under a real systemd and a real bus (see `in-systemd.sh`).

use vdisk_qemu_tests::in_container;

/// The bus starts it, nobody notices its restarts, an idle one ends, a stuck one is replaced, and it may do little.
#[test]
fn the_service_is_not_noticed() {
    in_container("systemd/restart.sh", None);
}

/// Under a systemd that takes another main process of a unit that stops, the old process serves on until the new one asks, whichever of
/// them is killed, broken or stopped.
#[test]
fn a_restart_is_a_handover() {
    in_container("systemd/handover.sh", Some("libvirt"));
}

/// polkit decides, by a real polkitd: who may look, manage, name files, attach; files that are passed open need no right but the caller's.
#[test]
fn polkit_decides() {
    in_container("systemd/access.sh", None);
}

/// A state that cannot be written or restored is named and the rest serves; persistent exports, sockets that systemd listens on,
/// instances, a user's session, metrics, credentials.
#[test]
fn what_was_configured_stays() {
    in_container("systemd/state.sh", None);
}

/// A real guest on the installed service: kills, restarts, reloads, snapshots and commits under its verified load.
#[test]
fn a_guest_does_not_notice_the_service() {
    in_container("systemd/guest.sh", None);
}

/// What the unit takes from the daemon, it does not have.
#[test]
fn every_wall_of_the_unit_holds() {
    in_container("systemd/walls.sh", None);
}
