#!/bin/bash
# The daemon is killed and restarted under clients that must not notice.
. /usr/bin/vdisk-script-lib
systemctl is-active -q vdiskd && { echo "it runs before anybody has called it"; false; }

# The first call starts it.
busctl get-property org.vdisk1 /org/vdisk1 org.vdisk1.Manager Version
systemctl is-active vdiskd
[ "$(ps -o user= -C vdiskd)" = vdiskd ]
grep -q 'CapEff:.0000000000000000' "/proc/$(systemctl show -P MainPID vdiskd)/status"
systemctl show -P NotifyAccess -P FileDescriptorStoreMax vdiskd

serve_eight
for how in none kill restart reload; do happens $how; done
answers_during reload
take_down

# What was stopped begins with nothing.
vdiskctl throttle set gold iops-total=100
systemctl stop vdiskd
[ ! -e /run/vdiskd/state.json ]
vdiskctl throttle list --json >/tmp/groups
if grep gold /tmp/groups; then false; fi

# With nothing to do it ends, and the next call starts it; not so when there is something.
mkdir -p /run/systemd/system/vdiskd.service.d
cat >/run/systemd/system/vdiskd.service.d/test.conf <<UNIT
[Service]
ExecStart=
ExecStart=/usr/libexec/vdiskd --idle-exit 1
WatchdogSec=2s
UNIT
systemctl daemon-reload
systemctl restart vdiskd
vdiskctl iothread add fast
sleep 3
systemctl is-active vdiskd
vdiskctl iothread remove fast
for _ in $(seq 100); do [ "$(systemctl show -P ActiveState vdiskd)" = inactive ] && break; sleep 0.1; done
[ "$(systemctl show -P ActiveState vdiskd)" = inactive ]
vdiskctl info
systemctl is-active vdiskd

# A daemon that does not turn any more is ended and comes back, and its client waits for it.
image=/srv/images/1.qcow2
vdiskctl node add disk1 driver=qcow2 file.driver=file file.filename=$image
vdiskctl export add vm1 --node disk1 --socket /run/vdiskd/vm1.sock --writable
vdisk-steady --until /tmp/enough --ready /tmp/ready /run/vdiskd/vm1.sock >/tmp/stuck 2>&1 &
client=$!
until [ -e /tmp/ready ]; do sleep 0.05; kill -0 $client; done
before=$(main_pid)
kill -STOP "$before"
until_not "$before"
systemctl show -P NRestarts vdiskd
sleep 1
touch /tmp/enough
wait $client || { cat /tmp/stuck; false; }
echo "watchdog: $(cat /tmp/stuck)"

# What the unit forbids, it cannot do.
vdiskctl node list >/dev/null
pid=$(systemctl show -P MainPID vdiskd)
for line in 'CapBnd:.0000000000000000' 'CapPrm:.0000000000000000' 'NoNewPrivs:.1' 'Seccomp:.2'; do
    grep -q "$line" "/proc/$pid/status"
done
refused() {
    why=$1
    shift
    if "$@" >/tmp/refused 2>&1; then echo "not refused: $*"; false; fi
    grep -q "$why" /tmp/refused || { cat /tmp/refused; false; }
}
truncate -s 1M /root/secret.img /usr/secret.img
chmod 666 /root/secret.img /usr/secret.img
refused 'cannot be opened' vdiskctl node add x driver=file filename=/root/secret.img
refused 'Read-only file system' vdiskctl node add x driver=file filename=/usr/secret.img
refused 'cannot be made' vdiskctl image create /etc/x.qcow2 1M
# Somebody else may look, and not touch.
setpriv --reuid=65534 --regid=65534 --clear-groups vdiskctl export list >/dev/null
refused 'org.vdisk1.manage' setpriv --reuid=65534 --regid=65534 --clear-groups vdiskctl iothread add mine

# What is configured counts from a reload on.
mkdir -p /etc/vdiskd /srv/elsewhere
chown vdiskd /srv/elsewhere
echo '[images' >/etc/vdiskd/vdiskd.toml
refused 'vdiskd.toml' /usr/libexec/vdiskd --check-config
cat >/etc/vdiskd/vdiskd.toml <<TOML
[images]
directories = ["/srv/images"]
[sockets]
directory = "/run/vdiskd"
mode = "0660"
group = "kvm"
[limits]
exports = 2
queues = 4
TOML
/usr/libexec/vdiskd --check-config
before=$(main_pid)
systemctl reload vdiskd
# A process that has given up other folders is a new one.
until_not "$before"
vdiskctl info --json | tr -d '\n ' | grep -q '"Problems":\[\]'
refused 'images may be in /srv/images only' vdiskctl image create /srv/elsewhere/x.qcow2 1M
ln -s /srv/images/../elsewhere /srv/images/way-out
refused 'images may be in /srv/images only' vdiskctl image create /srv/images/way-out/x.qcow2 1M
vdiskctl image create /srv/images/x.qcow2 1M
vdiskctl node add x driver=qcow2 file.driver=file file.filename=/srv/images/x.qcow2
refused 'limits.queues' vdiskctl export add x --node x --socket /run/vdiskd/x.sock --queues 5
busctl call org.vdisk1 /org/vdisk1 org.vdisk1.Manager AddExport 'a{sv}' 5 id s x type s vhost-user-blk node-name s x \
    num-queues u 4 addr 'a{sv}' 1 path s x.sock
[ "$(stat -c %a:%G /run/vdiskd/x.sock)" = 660:kvm ]
# A mistake is found before anything ends.
before=$(main_pid)
echo 'mistake' >/etc/vdiskd/vdiskd.toml
systemctl reload vdiskd
sleep 1
[ "$(main_pid)" = "$before" ]
vdiskctl export show x >/dev/null
refused 'limits.exports' vdiskctl export add y --node x --socket /run/vdiskd/y.sock --queues 1
# With the memory that it may have a daemon takes no more to do, and what there is stays.
printf '[limits]\nmemory = "1M"\n' >/etc/vdiskd/vdiskd.toml
systemctl reload vdiskd
for _ in $(seq 100); do vdiskctl node add more driver=null-co size=1M 2>/tmp/refused || break; vdiskctl node remove more; sleep 0.05; done
grep -q 'limits.memory' /tmp/refused
vdiskctl export show x >/dev/null

systemd-analyze security --no-pager vdiskd | tail -1
systemd-analyze security --no-pager --threshold=20 vdiskd >/dev/null
echo "all is well"
