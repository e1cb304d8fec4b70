//! Domains of a real libvirt 11 on the installed service, under a real systemd (see `in-systemd.sh` and `libvirt/lib.sh`).

use vdisk_qemu_tests::in_container;

/// Adopted and released byte for byte; start, reboot, save, kills of QEMU, libvirt and vdiskd, failures in each phase: what a domain
/// needs is there before it, and nothing is left after it.
#[test]
fn every_phase_of_a_domain() {
    in_container("libvirt/phases.sh", Some("libvirt"));
}

/// Four disks of an instance, at one instant; names and throttle groups that are not the daemon's.
#[test]
fn a_domain_of_an_instance() {
    in_container("libvirt/instance.sh", Some("libvirt"));
}

/// Fifty operations in any order, on two domains: nothing is left of any, and the disks have what was written.
#[test]
fn operations_in_any_order() {
    in_container("libvirt/random.sh", Some("libvirt"));
}

/// Snapshots (with memory, too), commit, pull, copy, resize, limits and hotplug under a verified load; two domains on one base.
#[test]
fn what_virsh_refuses() {
    in_container("libvirt/live.sh", Some("libvirt"));
}

/// A guest moves to another libvirt with another daemon and back, under a verified load: each image is open on one host at a time.
#[test]
fn a_guest_moves_to_another_host() {
    in_container("libvirt/migrate.sh", Some("libvirt"));
}

/// The same with its disks, to a host that has none of the storage here; whatever breaks on the way, the guest stays where it was.
#[test]
fn a_guest_moves_with_its_disks() {
    in_container("libvirt/mirrored.sh", Some("libvirt"));
}

/// What no hook is told of: disks that virsh unplugs, guests whose end libvirt did not see, names that change.
#[test]
fn what_libvirt_tells_by_events_only() {
    in_container("libvirt/watch.sh", Some("libvirt"));
}

/// Snapshots, commits, pulls, copies, backups and a new size without a guest; a disk on a block device.
#[test]
fn disks_of_a_domain_that_is_shut_off() {
    in_container("libvirt/offline.sh", Some("libvirt"));
}

/// What is made of an encrypted disk is encrypted, opens with the same secret, and has what the disk had.
#[test]
fn encrypted_disks_stay_encrypted() {
    in_container("libvirt/encrypted.sh", Some("libvirt"));
}
