#!/bin/bash
# A restart during which the old process serves on until the new one asks (systemd 256 or later).
. /usr/bin/vdisk-script-lib
vdiskctl info >/dev/null
serve_eight
daemons() { grep -lsx vdiskd /proc/[0-9]*/comm | wc -l; }
# (What is logged gets there later.)
handed_over() { journalctl --sync && journalctl -u vdiskd --no-pager | grep -c 'everything is left to the new process' || true; }

# Guests wait for the moment of the handover only.
happens none
happens restart
happens reload
[ "$(handed_over)" = "$rounds" ]
# Nothing of it is left.
[ "$(daemons)" = 1 ]
begin calls-during
answers_during restart
ended calls-during

# A new program that does not run: guests are served on by the old one, and by the new one when it is mended.
begin broken
old=$(main_pid)
mv /usr/libexec/vdiskd /usr/libexec/vdiskd.good
printf '#!/bin/sh\nsleep 0.3\nexit 1\n' >/usr/libexec/vdiskd
chmod 755 /usr/libexec/vdiskd
if systemctl restart vdiskd; then false; fi
sleep 1
kill -0 "$old"
kill -0 "$client"
# (As a package does: another file with this name.)
mv /usr/libexec/vdiskd.good /usr/libexec/vdiskd.next
cp /usr/libexec/vdiskd.next /usr/libexec/vdiskd.good
mv /usr/libexec/vdiskd.good /usr/libexec/vdiskd
rm /usr/libexec/vdiskd.next
until systemctl is-active -q vdiskd; do sleep 0.1; done
wait_for_front_ends
[ "$(daemons)" = 1 ]
ended broken

# The old process is killed while it serves on: what it had not answered is done again.
begin killed
for _ in $(seq "$rounds"); do
    old=$(main_pid)
    systemctl restart --no-block vdiskd
    until [ "$(main_pid)" != "$old" ]; do :; done
    kill -KILL "$old" || true
    until systemctl is-active -q vdiskd; do sleep 0.05; done
    wait_for_front_ends
    vdiskctl info --json | tr -d '\n ' | grep -q '"Problems":\[\]'
done
ended killed

# The new one is killed before it can ask, and after it has asked.
begin killed-new
for wait in 0 0.05 0.1 0.15 0.2 0.25; do
    old=$(main_pid)
    systemctl restart --no-block vdiskd
    until_not "$old"
    sleep $wait
    systemctl kill --kill-whom=main -s KILL vdiskd || true
    until [ "$(main_pid)" != "$old" ] && systemctl is-active -q vdiskd; do sleep 0.05; done
    wait_for_front_ends
    vdiskctl info --json | tr -d '\n ' | grep -q '"Problems":\[\]'
done
ended killed-new
take_down

# A unit that is stopped while the old process serves on: that one ends as well, in order, and so when it is stopped as such.
vdiskctl node add disk1 driver=qcow2 file.driver=file file.filename=/srv/images/1.qcow2
vdiskctl export add vm1 --node disk1 --socket /run/vdiskd/vm1.sock --writable
vdisk-steady --until /tmp/enough --ready /tmp/ready /run/vdiskd/vm1.sock >/tmp/stopped 2>&1 &
until [ -e /tmp/ready ]; do sleep 0.05; done
before=$(handed_over)
mv /usr/libexec/vdiskd /usr/libexec/vdiskd.good
printf '#!/bin/sh\nexec sleep 100\n' >/usr/libexec/vdiskd
chmod 755 /usr/libexec/vdiskd
old=$(main_pid)
systemctl restart --no-block vdiskd
until_not "$old"
kill -0 "$old"
systemctl stop vdiskd
for _ in $(seq 100); do kill -0 "$old" 2>/dev/null || break; sleep 0.05; done
if kill -0 "$old" 2>/dev/null; then false; fi
journalctl --sync
journalctl -u vdiskd --no-pager | grep -q 'there will be no new process'
mv /usr/libexec/vdiskd.good /usr/libexec/vdiskd
vdiskctl image check /srv/images/1.qcow2 >/dev/null
vdiskctl node add disk1 driver=qcow2 file.driver=file file.filename=/srv/images/1.qcow2
old=$(main_pid)
systemctl stop vdiskd
if kill -0 "$old" 2>/dev/null; then false; fi
[ "$(handed_over)" = $((before + 1)) ]
echo "all is well"
