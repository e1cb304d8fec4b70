#!/bin/sh
# Runs a script under a systemd and a bus of its own, in a container that has this machine's files (or those of a lab root), with
# vdiskd installed from a build; nothing that it changes stays. For root.
#
#   in-systemd.sh PROGRAMS SCRIPT     PROGRAMS: the folder with vdiskd, vdiskctl and vdisk-steady
#
# ROUNDS has the script do what it repeats more often; BUSY is how many clients have no break; OTHER is another build of vdiskd that takes turns with this one; LOWER is a
# folder whose files the container has instead; LIMIT is for how long the script may run (seconds, 0: for ever): one that hangs says where.
set -eu
programs=$1 script=$2
here=$(cd "$(dirname "$0")/.." && pwd)
dir=$(mktemp -d /var/tmp/vdisk-systemd-XXXXXX)
mounts() {
    mount -t tmpfs none "$dir"
    mkdir "$dir/upper" "$dir/work" "$dir/root"
    mount -t overlay overlay -o "lowerdir=${LOWER:-/},upperdir=$dir/upper,workdir=$dir/work" "$dir/root"
}
end() {
    [ -z "${loop:-}" ] || losetup -d "$loop" || true
    umount -R "$dir" 2>/dev/null || umount -l "$dir" 2>/dev/null || true
    rmdir "$dir" 2>/dev/null || true
}
trap end EXIT
trap 'cat "$root/result/log"; exit 1' INT TERM HUP
mounts
root=$dir/root
# Services of the machine have no business here.
find "$root/etc/systemd/system" -mindepth 1 -maxdepth 1 -exec rm -rf {} +
make -s -C "$here" install DESTDIR="$root" PROGRAMS="$programs" >/dev/null
systemd-sysusers --root="$root" vdiskd.conf
install -m 755 "$programs/vdisk-steady" "$root/usr/bin/"
install -m 755 "$script" "$root/usr/bin/vdisk-script"
lib=$(dirname "$script")/lib.sh
[ ! -e "$lib" ] || install -m 644 "$lib" "$root/usr/bin/vdisk-script-lib"
cat >"$root/etc/systemd/system/vdisk-script.service" <<UNIT
[Unit]
Requires=dbus.socket
After=dbus.socket systemd-tmpfiles-setup.service
SuccessAction=exit
FailureAction=exit
[Service]
Type=oneshot
EnvironmentFile=/etc/vdisk-script.env
TimeoutStartSec=${LIMIT:-0}
ExecStart=/bin/sh -c 'exec 7>/result/trace; BASH_XTRACEFD=7 exec bash -x /usr/bin/vdisk-script >/result/log 2>&1'
ExecStopPost=/bin/sh -c 'exec >>/result/log 2>&1; [ \$SERVICE_RESULT != timeout ] || { systemctl --no-pager list-jobs; journalctl --no-pager | tail -n 80; }'
UNIT
mkdir "$root/result" "$root/lab"
printf 'ROUNDS=%s\nBUSY=%s\nVDISK_LAB=/lab\n' "${ROUNDS:-}" "${BUSY:-}" >"$root/etc/vdisk-script.env"
[ -z "${OTHER:-}" ] || install -m 755 "$OTHER" "$root/usr/libexec/vdiskd.other"
# What the script says that it needs.
bind=
if grep -q '^# Needs a block device' "$script"; then
    truncate -s 64M "$dir/device"
    loop=$(losetup -f --show "$dir/device")
    bind=--bind=$loop
    printf 'DEVICE=%s\n' "$loop" >>"$root/etc/vdisk-script.env"
fi
lab=${VDISK_LAB:-${XDG_CACHE_HOME:-$HOME/.cache}/vdisk}
status=0
# One tree of control groups, as machines have it; and what a service manager needs for DevicePolicy= and KeyringMode=.
export SYSTEMD_NSPAWN_UNIFIED_HIERARCHY=1
systemd-nspawn -q --system-call-filter='bpf @keyring' -D "$root" --register=no --keep-unit --link-journal=no --bind="$dir:/scratch" --bind-ro="$lab:/lab" $bind --tmpfs=/var/tmp:mode=1777 \
    --setenv=RUST_BACKTRACE=1 -b systemd.unit=vdisk-script.service systemd.show_status=0 </dev/null >"$dir/console" 2>&1 || status=$?
cat "$root/result/log" || cat "$dir/console"
# (What is said on stderr is shown last.)
[ $status = 0 ] || { grep -h '^failed at' "$root/result/log"; tail -n 20 "$root/result/trace"; } >&2
exit $status
