#!/bin/sh
# Gets what guests and comparisons need, outside the source tree: $VDISK_LAB, or ~/.cache/vdisk.
# Each part is made once and left alone afterwards. No package source of the machine is changed.
#
#   lab.sh kernel      the distribution's kernel and its modules, unpacked
#   lab.sh initramfs   the guest's PID 1 (built before by make) with the modules it loads
#   lab.sh trixie      a Debian 13 folder with QEMU 10 and libblkio, used by chroot
#   lab.sh libvirt     a Debian 13 folder with systemd 257, libvirt 11, QEMU 10 and an SELinux policy, booted in containers and guests
#   lab.sh sid         a Debian unstable folder with the newest qemu-storage-daemon, used by chroot
set -eu
lab=${VDISK_LAB:-${XDG_CACHE_HOME:-$HOME/.cache}/vdisk}
mkdir -p "$lab"
say() { printf '== %s\n' "$*"; }

kernel() {
    [ -e "$lab/kernel/done" ] && return
    rm -rf "$lab/kernel"
    mkdir -p "$lab/kernel/download"
    cd "$lab/kernel/download"
    if command -v apt-get >/dev/null; then
        package=$(apt-cache depends linux-image-cloud-amd64 | sed -n 's/.*Depends: \(linux-image-[0-9].*\)/\1/p' | head -n 1)
        say "guest kernel: $package"
        # Downloading as root into a folder that apt's own user cannot enter only prints a note.
        apt-get -q download "$package"
        dpkg-deb -x "$package"_*.deb ..
    else
        say "guest kernel: kernel-core, kernel-modules-core, kernel-modules"
        dnf -q download --resolve=false kernel-core kernel-modules-core kernel-modules
        for rpm in *.rpm; do rpm2cpio "$rpm" | (cd .. && cpio -idm --quiet); done
    fi
    cd ..
    modules=$(find . -type d -path '*lib/modules/*' -prune | head -n 1)
    mkdir -p root/lib/modules
    mv "$modules" root/lib/modules/
    version=$(ls root/lib/modules)
    image=$(find . -name 'vmlinuz*' -type f | head -n 1)
    cp "$image" vmlinuz
    depmod -b root "$version"
    rm -rf download usr boot lib
    echo "$version" >done
}

# What a guest loads; those built into the kernel are passed over.
guest_modules="virtio_pci virtio_console virtio_blk ext4 sd_mod virtio_scsi crc32c_generic"

initramfs() {
    init=$1
    version=$(cat "$lab/kernel/done")
    dir=$(mktemp -d)
    mkdir -p "$dir/modules" "$dir/bin" "$dir/dev" "$dir/proc" "$dir/sys"
    cp "$init" "$dir/init"
    for module in $guest_modules; do
        modprobe --show-depends -d "$lab/kernel/root" -S "$version" "$module" 2>/dev/null || true
    done | sed -n 's/^insmod \([^ ]*\).*/\1/p' | while read -r file; do
        name=$(basename "$file" | sed 's/\.ko.*/.ko/')
        [ -e "$dir/modules/$name" ] && continue
        case $file in
        *.xz) xz -dc "$file" >"$dir/modules/$name" ;;
        *.zst) zstd -qdc "$file" >"$dir/modules/$name" ;;
        *) cp "$file" "$dir/modules/$name" ;;
        esac
        echo "$name" >>"$dir/modules/order"
    done
    # mke2fs with its libraries, for the test that makes a file system.
    mke2fs=$(PATH=$PATH:/usr/sbin:/sbin command -v mke2fs)
    cp "$mke2fs" "$dir/bin/"
    ldd "$mke2fs" | grep -o '/[^ ]*' | while read -r so; do
        mkdir -p "$dir$(dirname "$so")"
        cp -L "$so" "$dir$so"
    done
    (cd "$dir" && find . | cpio --quiet -o -H newc) | gzip -1 >"$lab/initramfs.new"
    rm -rf "$dir"
    mv "$lab/initramfs.new" "$lab/initramfs"
    say "guest initramfs: $lab/initramfs"
}

root() {
    name=$1
    shift
    # One that was made with other packages is made anew.
    [ "$(cat "$lab/$name/.done" 2>/dev/null)" = "$*" ] && return
    rm -rf "$lab/$name"
    say "lab root: $lab/$name (downloads some 150 MB)"
    mmdebstrap --quiet --variant=apt "$@" "$lab/$name"
    echo "$*" >"$lab/$name/.done"
}

case $1 in
kernel) kernel ;;
initramfs) initramfs "$2" ;;
trixie)
    root trixie --include=qemu-system-x86,qemu-block-extra,qemu-utils trixie
    ;;
libvirt)
    root libvirt --customize-hook='chroot "$1" setfiles -F /etc/selinux/default/contexts/files/file_contexts /' \
        --include=systemd,systemd-sysv,dbus,polkitd,kmod,python3-minimal,qemu-system-x86,qemu-utils \
        --include=libvirt-daemon-system,libvirt-daemon-driver-qemu,libvirt-clients \
        --include=selinux-policy-default,selinux-policy-dev,policycoreutils trixie
    ;;
sid)
    root sid --aptopt='Acquire::Check-Valid-Until "false"' --include=qemu-utils,qemu-system-common,qemu-block-extra sid
    ;;
*) echo "unknown part $1" >&2; exit 2 ;;
esac
