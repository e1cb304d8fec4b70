# For the scripts beside it: domains of a real libvirt under real systemd, whose guests do what the host says.
set -Eeu
failed() {
    set +ex
    echo "failed at line $1"
    virsh list --all
    vdiskctl domain list --all
    vdiskctl tree
    journalctl -u vdiskd -u libvirtd -u vdiskd-libvirt --no-pager | tail -40
    [ ! -e /tmp/vdiskd2.log ] || tail -n 40 /tmp/vdiskd2.log
    tail -n 20 /var/log/libvirt/qemu/*.log
    vdiskctl stats
    for vm in $(virsh list --name); do
        tail -n 5 "/tmp/console-$vm"
        virsh qemu-monitor-command "$vm" --hmp info registers | head -4
        virsh qemu-monitor-command "$vm" --hmp info status
    done
    exit 1
}
trap 'failed $LINENO' ERR
images=/var/lib/libvirt/images

# What guests are told and answer: one JSON object a line over a port.
cat >/usr/bin/guest <<'PYTHON'
#!/usr/bin/python3
import json, socket, sys, time

domain, *words = sys.argv[1:]
request = {"cmd": words[0]}
for word in words[1:]:
    key, value = word.split("=", 1)
    request[key] = int(value) if value.isdigit() else value


def ask(limit):
    s = socket.socket(socket.AF_UNIX)
    s.settimeout(limit)
    for _ in range(200):
        try:
            s.connect(f"/run/guest-{domain}")
            break
        except OSError:
            time.sleep(0.05)
    else:
        sys.exit(f"guest {domain} has no port")
    s.sendall((json.dumps(request) + "\n").encode())
    for line in s.makefile():
        reply = json.loads(line)
        if "ready" not in reply:
            print(json.dumps(reply))
            sys.exit("error" in reply)
    sys.exit(f"guest {domain} went away")


# A port whose host end comes while the guest finds it has been seen to stay silent, once in some hundred boots.
try:
    ask(40)
except TimeoutError:
    print(f"guest {domain} is asked again", file=sys.stderr)
    ask(80)
PYTHON
chmod +x /usr/bin/guest

# QEMU with all CPUs in one thread: with a thread for each, TCG (10.0) now and then loses the end of an interrupt, and the CPU takes no
# other any more (its local APIC has it in service for ever).
cat >/usr/bin/qemu-steady <<'SH'
#!/bin/bash
for arg; do
    shift
    [ "$arg" = tcg ] && arg=tcg,thread=single
    set -- "$@" "$arg"
done
exec /usr/bin/qemu-system-x86_64 "$@"
SH
chmod +x /usr/bin/qemu-steady

# define NAME [XML of devices]: a domain that boots our own PID 1.
define() {
    cat >"/tmp/$1.xml" <<XML
<domain type='qemu'>
  <name>$1</name>
  <memory unit='MiB'>192</memory>
  <vcpu>${cpus:-2}</vcpu>
  <os>
    <type arch='x86_64' machine='q35'>hvm</type>
    <kernel>/boot/vmlinuz</kernel>
    <initrd>/boot/initramfs</initrd>
    <cmdline>console=ttyS0 panic=-1 quiet nohz=off highres=off</cmdline>
  </os>
  <features><acpi/></features>
  <cpu mode='maximum'/>
  <on_reboot>restart</on_reboot>
  <devices>
    <emulator>/usr/bin/qemu-steady</emulator>
    <channel type='unix'>
      <source mode='bind' path='/run/guest-$1'/>
      <target type='virtio' name='org.vdisk.test'/>
    </channel>
    <serial type='file'><source path='/tmp/console-$1'/></serial>
    <memballoon model='none'/>
    <controller type='pci' model='pcie-root'/>
    $(printf "<controller type='pci' model='pcie-root-port'/>%.0s" 1 2 3 4 5 6 7 8)
    ${2:-}
  </devices>
</domain>
XML
    virsh -q define "/tmp/$1.xml"
}
# file FORMAT FILE TARGET [MORE]: the XML of a disk in a file.
file() { echo "<disk type='file' device='disk'><driver name='qemu' type='$1'/><source file='$2'/><target dev='$3' bus='virtio'/>${4:-}</disk>"; }
# refused WHY COMMAND…
refused() {
    local why=$1
    shift
    if "$@" >/tmp/refused 2>&1; then echo "not refused: $*"; false; fi
    grep -q -e "$why" /tmp/refused || { cat /tmp/refused; false; }
}
# Nothing is left of any domain.
nothing_left() {
    [ "$(vdiskctl node list --json | tr -d ' \n')" = '[]' ]
    [ "$(vdiskctl export list --json | tr -d ' \n')" = '[]' ]
    [ -z "$(find /run/vdiskd -name '*.sock')" ]
}
until_gone() { until [ "$(virsh -q domstate "$1")" = 'shut off' ]; do sleep 0.05; done; }

# The load of guest vm goes on, without an error.
goes_on() {
    local before after
    before=$("$@" guest vm load-status)
    until after=$("$@" guest vm load-status) && [ "$before" != "$after" ]; do sleep 0.02; done
    if grep -q '"failed": true' <<<"$after"; then echo "the load failed"; false; fi
}

# The other host, with a vdiskd and a libvirt of its own: what is in /run, /etc/libvirt and /var of libvirt's is its own there; the
# images are not if it is to be `shared`. `on2 COMMAND` runs something there; its libvirt is at $there, the one here at $back.
other_host() {
    mkdir -p /tmp/host2
    cat >/tmp/host2.sh <<'SH'
#!/bin/bash
set -eu
hostname host2
mkdir -p /tmp/host2/run
mount -n -t tmpfs none /tmp/host2/run
for folder in etc/libvirt var/lib/libvirt var/log/libvirt var/cache/libvirt; do
    mkdir -p "/tmp/host2/run/own/$folder"
done
cp -a /etc/libvirt/*.conf /etc/libvirt/hooks /tmp/host2/run/own/etc/libvirt/
install -d -o libvirt-qemu -g libvirt-qemu /tmp/host2/run/own/var/lib/libvirt/qemu
mkdir -p /tmp/host2/run/own/var/lib/libvirt/images
[ "$1" != shared ] || mount -n --bind /var/lib/libvirt/images /tmp/host2/run/own/var/lib/libvirt/images
for folder in etc/libvirt var/lib/libvirt var/log/libvirt var/cache/libvirt; do
    mount -n --rbind "/tmp/host2/run/own/$folder" "/$folder"
done
mount -n --move /tmp/host2/run /run
mkdir -p /run/dbus /run/lock
install -d -m 755 -o vdiskd -g kvm /run/vdiskd
sed -i '/host_uuid/d; /unix_sock_dir/d; /auth_unix/d' /etc/libvirt/libvirtd.conf
printf 'host_uuid = "11111111-2222-3333-4444-555555555555"\nauth_unix_rw = "none"\n' >>/etc/libvirt/libvirtd.conf
dbus-daemon --system --nofork --nopidfile &
until [ -S /run/dbus/system_bus_socket ]; do sleep 0.02; done
cat >/tmp/vdiskd2.sh <<'VDISKD'
umask 0007
RUNTIME_DIRECTORY=/run/vdiskd setpriv --reuid vdiskd --regid kvm --clear-groups /usr/libexec/vdiskd >>/tmp/vdiskd2.log 2>&1 &
until busctl status org.vdisk1 >/dev/null 2>&1; do sleep 0.02; done
VDISKD
bash /tmp/vdiskd2.sh
virtlogd &
libvirtd >/tmp/libvirtd2.log 2>&1 &
until [ -S /run/libvirt/libvirt-sock ]; do sleep 0.02; done
touch /tmp/host2-is-up
wait
SH
    chmod +x /tmp/host2.sh
    unshare --mount --uts --propagation private /tmp/host2.sh "$1" >/tmp/host2.log 2>&1 &
    other=$!
    until [ -e /tmp/host2-is-up ]; do
        kill -0 $other || { cat /tmp/host2.log; false; }
        sleep 0.05
    done
    there='qemu+unix:///system?socket=/proc/'$other'/root/run/libvirt/libvirt-sock'
    back='qemu+unix:///system?socket=/proc/1/root/run/libvirt/libvirt-sock'
}
on2() { nsenter -t "$other" --mount --uts "$@"; }

cp /lab/kernel/vmlinuz /lab/initramfs /boot/
chmod 644 /boot/vmlinuz /boot/initramfs
mkdir -p $images
chmod 711 $images
# However often it is restarted here.
mkdir -p /run/systemd/system/libvirtd.service.d
printf '[Unit]\nStartLimitIntervalSec=0\n' >/run/systemd/system/libvirtd.service.d/limit.conf
systemctl daemon-reload
systemctl start libvirtd virtlogd
