//! What SELinux confines, in a guest whose kernel enforces it (see `in-selinux.sh` and `../../selinux`).

use vdisk_qemu_tests::under_selinux;

/// QEMU reaches the sockets of its own disks and no other's, from the start, when disks are attached and after restarts; and nothing
/// that vdiskd, the hook and the watcher do for that is denied them.
#[test]
fn guests_have_their_own_sockets_only() {
    under_selinux("libvirt/selinux.sh");
}
