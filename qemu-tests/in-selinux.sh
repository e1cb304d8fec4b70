#!/bin/bash
# Runs a script in a guest whose kernel enforces SELinux, with systemd and libvirt of the lab root `libvirt`, Debian's policy, and
# vdiskd installed from a build with its own policy module; nothing that it changes stays. For root.
#
#   in-selinux.sh PROGRAMS SCRIPT     PROGRAMS: the folder with vdiskd and vdiskctl
#
# The script is unconfined_t.
set -eu
programs=$1 script=$2
here=$(cd "$(dirname "$0")/.." && pwd)
lab=${VDISK_LAB:-${XDG_CACHE_HOME:-$HOME/.cache}/vdisk}
dir=$(mktemp -d /var/tmp/vdisk-selinux-XXXXXX)
end() {
    umount -R "$dir/root" 2>/dev/null || umount -l "$dir/root" 2>/dev/null || true
    rm -rf "$dir"
}
trap end EXIT
trap 'cat "$dir/console"; exit 1' INT TERM HUP
root=$dir/root
mkdir "$dir/upper" "$dir/work" "$root"
mount -t overlay overlay -o "lowerdir=$lab/libvirt,upperdir=$dir/upper,workdir=$dir/work" "$root"
make -s -C "$here" install DESTDIR="$root" PROGRAMS="$programs" >/dev/null
for program in "$root"/usr/libexec/vdisk* "$root"/usr/bin/vdiskctl*; do strip "$program"; done
systemd-sysusers --root="$root" vdiskd.conf
install -m 755 "$script" "$root/usr/bin/vdisk-script"
install -m 644 "$(dirname "$script")/lib.sh" "$root/usr/bin/vdisk-script-lib"
install -D -m 644 "$lab/kernel/vmlinuz" "$root/lab/kernel/vmlinuz"
install -m 644 "$lab/initramfs" "$root/lab/initramfs"
cat >"$root/etc/systemd/system/vdisk-script.service" <<'UNIT'
[Unit]
Requires=dbus.socket
After=dbus.socket systemd-tmpfiles-setup.service
SuccessAction=poweroff
FailureAction=poweroff
[Service]
Type=oneshot
TimeoutStartSec=infinity
StandardOutput=tty
StandardError=tty
TTYPath=/dev/ttyS1
SELinuxContext=unconfined_u:unconfined_r:unconfined_t:s0-s0:c0.c1023
ExecStart=/bin/bash -c 'exec /usr/bin/vdisk-script'
UNIT

# What a first boot does, and what nobody reads here.
touch "$root/etc/.updated" "$root/var/.updated"
rm -rf "$root"/usr/share/doc "$root"/usr/share/man "$root"/usr/share/locale "$root"/var/lib/apt/lists "$root"/var/cache/apt

# Our module as a user installs it. What Debian's policy lacks for its own libvirt and for QEMU without KVM is in one of the lab's; what is
# tried here (vdiskd, the hook, the watcher, QEMU) is confined.
mkdir "$root/src" "$root/lab-module"
mount --bind "$here" "$root/src"
cat >"$root/lab-module/lab.te" <<'TE'
policy_module(lab, 1.0)
gen_require(`
	type virtd_t, virtlogd_t, svirt_t;
')
permissive virtd_t;
permissive virtlogd_t;
allow svirt_t self:process { execmem execstack };
TE
chroot "$root" /bin/sh -e >"$dir/policy" 2>&1 <<'SH' || { cat "$dir/policy"; exit 1; }
make -s -C /src install-selinux SELINUX_BUILD=/lab-module/vdiskd
make -s -C /lab-module -f /usr/share/selinux/devel/Makefile lab.pp
semodule -n -i /usr/share/selinux/packages/vdiskd.pp /lab-module/lab.pp
SH
umount "$root/src"
# The lab root itself is labelled.
chroot "$root" setfiles /etc/selinux/default/contexts/files/file_contexts / 2>&1
mke2fs -q -t ext4 -O ^has_journal -E root_owner=0:0 -d "$root" "$dir/disk" 3G
umount "$root"

status=0
timeout 450 qemu-system-x86_64 -machine q35 -cpu max -accel tcg,thread=single -m 2G -nodefaults -display none -no-reboot \
    -kernel "$lab/kernel/vmlinuz" -initrd "$lab/initramfs" \
    -append "console=ttyS0 quiet panic=-1 vdisk.root=/dev/vda security=selinux selinux=1 enforcing=1 audit=1 audit_backlog_limit=8192 sysctl.kernel.printk_ratelimit=0 systemd.unit=vdisk-script.service systemd.show_status=0" \
    -drive "file=$dir/disk,if=virtio,format=raw,cache=unsafe" \
    -serial "file:$dir/console" -serial "file:$dir/log" </dev/null || status=$?
[ -s "$dir/log" ] || cat "$dir/console"
# (A terminal ends lines in its own way.)
tr -d '\r' <"$dir/log"
exit $status
