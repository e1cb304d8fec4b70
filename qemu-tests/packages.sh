#!/bin/sh
# Installs the distribution's packages that building and testing need. $1: sudo, or nothing for root.
set -eu
sudo=$1
missing() {
    for program in cc make curl qemu-system-x86_64 qemu-img qemu-io dbus-daemon busctl cpio modprobe depmod \
        mke2fs debugfs xz mmdebstrap fio unshare losetup python3; do
        PATH=$PATH:/usr/sbin:/sbin command -v "$program" >/dev/null || echo "$program"
    done
    /usr/bin/python3 -c 'import dbus' 2>/dev/null || echo python3-dbus
}
lacking=$(missing | tr '\n' ' ')
[ -n "$lacking" ] || exit 0
echo "== packages (missing: $lacking)"
if command -v apt-get >/dev/null; then
    $sudo apt-get -q update
    $sudo env DEBIAN_FRONTEND=noninteractive apt-get -q install -y --no-install-recommends \
        build-essential ca-certificates curl cpio dbus e2fsprogs fio kmod mmdebstrap python3 python3-dbus \
        qemu-system-x86 qemu-utils systemd util-linux xz-utils
elif command -v dnf >/dev/null; then
    $sudo dnf -q install -y --setopt=install_weak_deps=False \
        gcc glibc-static make curl cpio dbus-daemon e2fsprogs fio kmod mmdebstrap python3 python3-dbus \
        qemu-system-x86-core qemu-device-display-virtio-gpu qemu-img systemd util-linux xz zstd
else
    echo "neither apt-get nor dnf is here: install these by hand: $lacking" >&2
    exit 1
fi
lacking=$(missing | tr '\n' ' ')
[ -z "$lacking" ] || { echo "still missing: $lacking" >&2; exit 1; }
