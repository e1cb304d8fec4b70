#!/bin/bash
# Each line of the unit that takes something from the daemon holds: a program that is run with exactly these lines tries what they forbid.
# Needs a block device (DEVICE).
set -Eeu
trap 'set +ex; echo "failed at line $LINENO"; journalctl -u vdiskd-probe --no-pager | tail -30; exit 1' ERR
mkdir -p /srv/images /usr/lib/modules
chown vdiskd /srv/images
touch /usr/open /etc/open /tmp/outside
mkdir -p /home/open
chmod 777 /usr/open /etc/open /home/open
# One that holds images, and one (loop-control) that does not.
read -r major minor <<<"$(stat -c '%Hr %Lr' "$DEVICE")"
mknod -m 666 /dev/probe-block b "$major" "$minor"
mknod -m 666 /dev/probe-other c 10 237
printf 'int main(void) { int r = 20; __asm__ volatile("int $0x80" : "+a"(r)); return 0; }\n' | cc -x c -o /usr/bin/vdisk-probe-32 -
cat >/usr/bin/vdisk-probe <<'PYTHON'
import ctypes, errno, os, signal, socket, subprocess, sys

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p


def call(name, *args):
    """The error of a call of the C library, or 0."""
    ctypes.set_errno(0)
    failed = getattr(libc, name)(*args)
    return ctypes.get_errno() if failed in (-1, ctypes.c_void_p(-1).value) else 0


def error(function, *args):
    try:
        function(*args)
        return 0
    except OSError as e:
        return e.errno


def keyring_is_private():
    """A key of the user is not in the keyring of the session (keyrings(7))."""
    keyctl, add_key = {"x86_64": (250, 248), "aarch64": (219, 217)}[os.uname().machine]
    user_keyring, session_keyring, search = -4, -3, 10
    added = call("syscall", add_key, b"user", b"vdisk-probe", b"x", 1, user_keyring)
    return added == 0 and call("syscall", keyctl, search, session_keyring, b"user", b"vdisk-probe", 0) == errno.ENOKEY


def is_read_only(path):
    return bool(os.statvfs(path).f_flag & os.ST_RDONLY)


def own_file():
    path = "/srv/images/probe"
    os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o777))
    return path


status = dict(line.split(":\t", 1) for line in open("/proc/self/status").read().splitlines() if ":\t" in line)
interfaces = [line.split(":")[0].strip() for line in open("/proc/self/net/dev").read().splitlines()[2:]]
# The line, and whether it holds.
held = {
    "User=vdiskd": os.getuid() != 0 and os.getgid() != 0,
    "CapabilityBoundingSet=": int(status["CapBnd"], 16) == 0,
    "AmbientCapabilities=": int(status["CapAmb"], 16) == 0,
    "NoNewPrivileges=yes": status["NoNewPrivs"] == "1",
    "ProtectSystem=strict": error(open, "/usr/open", "w") == error(open, "/etc/open", "w") == errno.EROFS,
    "ReadWritePaths=-/srv -/var/lib -/mnt -/media": error(own_file) == 0 and not is_read_only("/mnt"),
    "ProtectHome=yes": error(os.listdir, "/home") == errno.EACCES,
    "PrivateTmp=yes": not os.path.exists("/tmp/outside"),
    "PrivateNetwork=yes": interfaces == ["lo"],
    "ProtectClock=yes": call("clock_settime", 0, ctypes.byref((ctypes.c_long * 2)(0, 0))) == errno.EPERM,
    "ProtectHostname=yes": call("sethostname", b"x", 1) == errno.EPERM,
    "ProtectKernelLogs=yes": call("klogctl", 3, ctypes.create_string_buffer(16), 16) == errno.EPERM,
    "ProtectKernelModules=yes": error(os.listdir, "/usr/lib/modules") == errno.EACCES,
    "ProtectKernelTunables=yes": is_read_only("/proc/sys"),
    "ProtectControlGroups=yes": is_read_only("/sys/fs/cgroup"),
    "ProtectProc=invisible": not os.path.exists("/proc/1/status"),
    "DevicePolicy=closed": error(open, "/dev/probe-other") == errno.EPERM and error(open, "/dev/null", "w") == 0,
    "DeviceAllow=block-* rw": error(open, "/dev/probe-block", "r+b", 0) == 0,
    "KeyringMode=private": keyring_is_private(),
    "RestrictAddressFamilies=AF_UNIX": error(socket.socket, socket.AF_INET) == errno.EAFNOSUPPORT
    and error(socket.socket, socket.AF_UNIX) == 0,
    "RestrictNamespaces=yes": call("unshare", 0x10000000) == errno.EPERM,
    "RestrictRealtime=yes": error(os.sched_setscheduler, 0, os.SCHED_FIFO, os.sched_param(1)) == errno.EPERM,
    "RestrictSUIDSGID=yes": error(os.chmod, own_file(), 0o4755) == errno.EPERM,
    "LockPersonality=yes": call("personality", 0x0040000) == errno.EPERM,
    "MemoryDenyWriteExecute=yes": call("mmap", None, 4096, 7, 0x22, -1, 0) == errno.EPERM,
    "SystemCallArchitectures=native": subprocess.run(["/usr/bin/vdisk-probe-32"]).returncode == -signal.SIGSYS,
    "SystemCallFilter=~@privileged @resources": call("mount", b"none", b"/mnt", b"tmpfs", 0, None) == errno.EPERM
    and call("chroot", b"/") == errno.EPERM
    and call("setpriority", 0, 0, 5) == errno.EPERM,
    "SystemCallFilter=@system-service": call("ptrace", 0, 0, None, None) == errno.EPERM
    and call("swapoff", b"x") == errno.EPERM,
    "UMask=0007": os.stat(own_file()).st_mode & 0o777 == 0o770,
    "RuntimeDirectoryMode=0755": os.stat("/run/vdiskd").st_mode & 0o777 == 0o755,
    "StateDirectoryMode=0700": os.stat("/var/lib/vdiskd").st_mode & 0o777 == 0o700,
}
with open("/dev/shm/vdisk-probe", "w"):
    pass
for line, holds in held.items():
    print(("held: " if holds else "BROKEN: ") + line)
sys.exit(not all(held.values()))
PYTHON
# The very lines of the unit, but for how it is started and what it is called.
sed -e '/^\(Type\|BusName\|ExecReload\|Restart\|RestartSec\|RestartForceExitStatus\|SuccessExitStatus\|WatchdogSec\)=/d' \
    -e 's|^ExecStart=.*|Type=oneshot\nExecStart=/usr/bin/python3 /usr/bin/vdisk-probe|' \
    /usr/lib/systemd/system/vdiskd.service >/run/systemd/system/vdiskd-probe.service
systemctl daemon-reload
systemctl start vdiskd-probe
# RemoveIPC=yes: only after systemctl has heard of the end.
for _ in $(seq 200); do [ -e /dev/shm/vdisk-probe ] || break; sleep 0.02; done
[ ! -e /dev/shm/vdisk-probe ]
journalctl --sync
# No line of the unit is left untried.
journalctl -u vdiskd-probe -o cat --no-pager | sed -n 's/^held: //p' >/tmp/held
sed -n '/^# It opens images and devices/,/^\[Install\]/p' /usr/lib/systemd/system/vdiskd.service | grep = |
    grep -v -e '^RemoveIPC=' -e '^SystemCallErrorNumber=' -e '^SystemCallFilter=@chown' |
    while read -r line; do grep -qxF "$line" /tmp/held || { echo "not tried: $line"; exit 1; }; done
sort /tmp/held
echo "all is well"
