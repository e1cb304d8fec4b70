#!/bin/sh
# Installs the distribution's packages that building and testing need. $1: sudo, or nothing for root.
set -eu
sudo=$1
missing() {
    for program in cc make curl qemu-system-x86_64 qemu-img qemu-io qemu-nbd nbdinfo nbdcopy dbus-daemon busctl cpio modprobe depmod \
        mke2fs debugfs mkfs.xfs filefrag xz mmdebstrap fio unshare losetup python3 systemd-nspawn systemd-sysusers systemd-analyze pkaction; do
        PATH=$PATH:/usr/sbin:/sbin command -v "$program" >/dev/null || echo "$program"
    done
    /usr/bin/python3 -c 'import dbus' 2>/dev/null || echo python3-dbus
    pkg-config --exists libvirt libvirt-qemu 2>/dev/null || echo libvirt-dev
}
lacking=$(missing | tr '\n' ' ')
[ -n "$lacking" ] || exit 0
echo "== packages (missing: $lacking)"
if command -v apt-get >/dev/null; then
    packages="build-essential ca-certificates curl cpio dbus e2fsprogs fio kmod libvirt-dev mmdebstrap pkg-config python3 python3-dbus
        libnbd-bin polkitd qemu-system-x86 qemu-utils systemd systemd-container util-linux xfsprogs xz-utils"
    install() {
        # shellcheck disable=SC2086
        $sudo env DEBIAN_FRONTEND=noninteractive apt-get -q "$@" install -y --no-install-recommends $packages
    }
    $sudo apt-get -q update
    # A machine that has a part of QEMU from backports, which are not among its sources (any more), cannot take
    # the rest from the release: then backports are looked at for this one call, in a folder of our own.
    install || {
        release=$(. /etc/os-release && echo "$VERSION_CODENAME")
        echo "== packages: once more, QEMU from $release-backports"
        apt=$(mktemp -d)
        chmod 755 "$apt"
        trap 'rm -rf "$apt"' EXIT
        mkdir -p "$apt/parts" "$apt/lists/partial"
        for file in /etc/apt/sources.list /etc/apt/sources.list.d/*.list /etc/apt/sources.list.d/*.sources; do
            [ -e "$file" ] && sed -e "/^Suites:.* $release\( \|\$\)/ s/\$/ $release-backports/" \
                -e "s/^\(deb .* \)$release \(.*\)/&\n\1$release-backports \2/" "$file" >"$apt/parts/${file##*/}"
        done
        [ ! -e "$apt/parts/sources.list" ] || mv "$apt/parts/sources.list" "$apt/parts/main.list"
        printf 'Package: src:qemu src:seabios\nPin: release n=%s-backports\nPin-Priority: 990\n' "$release" >"$apt/pin"
        set -- -o Dir::Etc::SourceList=/dev/null -o Dir::Etc::SourceParts="$apt/parts" \
            -o Dir::State::Lists="$apt/lists" -o Dir::Etc::Preferences="$apt/pin"
        $sudo apt-get -q "$@" update
        install "$@"
        rm -rf "$apt"
    }
elif command -v dnf >/dev/null; then
    $sudo dnf -q install -y --setopt=install_weak_deps=False \
        gcc glibc-static make curl cpio dbus-daemon e2fsprogs fio kmod libnbd libvirt-devel mmdebstrap pkgconf-pkg-config polkit python3 python3-dbus \
        qemu-system-x86-core qemu-device-display-virtio-gpu qemu-img systemd systemd-container util-linux xfsprogs xz zstd
else
    echo "neither apt-get nor dnf is here: install these by hand: $lacking" >&2
    exit 1
fi
lacking=$(missing | tr '\n' ' ')
[ -z "$lacking" ] || { echo "still missing: $lacking" >&2; exit 1; }
