#!/bin/bash
# What was configured stays, as far as it can; what does not is named.
set -Eeu
failed() {
    set +ex
    echo "failed at line $1"
    vdiskctl status
    journalctl --no-pager | tail -60
    exit 1
}
trap 'failed $LINENO' ERR
refused() {
    why=$1
    shift
    if "$@" >/tmp/refused 2>&1; then echo "not refused: $*"; false; fi
    grep -q "$why" /tmp/refused || { cat /tmp/refused; false; }
}
problems() { vdiskctl info --json | tr -d '\n' | sed 's/.*"Problems": *\[\([^]]*\)\].*/\1/'; }
await() { for _ in $(seq 200); do "$@" >/dev/null 2>&1 && return; sleep 0.05; done; "$@"; }
disk() {
    vdiskctl image create "/srv/images/$1.qcow2" 64M
    vdiskctl node add "$1" driver=qcow2 file.driver=file "file.filename=/srv/images/$1.qcow2"
}
mkdir -p /srv/images
chown vdiskd /srv/images
for name in a b c; do disk $name; done

# systemd listens, and starts the daemon for the first guest.
vdiskctl export add vm-b --node b --socket /run/vdiskd/vm-b.sock --writable --persistent
for socket in vdiskd-export@vm-a.socket vdiskd-metrics.socket; do refused 'failed' systemctl start $socket; done
systemctl stop vdiskd
systemctl start vdiskd-export@vm-a.socket vdiskd-metrics.socket
[ "$(stat -c %a:%U:%G /run/vdiskd-export/vm-a.sock)" = 660:vdiskd:kvm ]
vdiskctl node add a driver=qcow2 file.driver=file file.filename=/srv/images/a.qcow2
refused "no socket named 'vm-x'" vdiskctl export add vm-a --node a --socket fd:vm-x --writable
vdiskctl export add vm-a --node a --socket fd:vm-a --writable --persistent
refused "export 'vm-a' has the socket" vdiskctl export add vm-a2 --node a --socket fd:vm-a
# The machine is turned off: nothing but what is persistent comes back, and comes for the first who connects.
systemctl stop vdiskd
[ ! -e /run/vdiskd/state.json ]
for when in first-guest reload restart kill; do
    before=$(systemctl show -P MainPID vdiskd)
    case $when in
    first-guest)
        ! systemctl is-active -q vdiskd
        sockets=/run/vdiskd-export/vm-a.sock
        ;;
    kill) systemctl kill --kill-whom=main -s KILL vdiskd ;;
    *) systemctl $when vdiskd ;;
    esac
    rm -f /tmp/enough /tmp/ready
    # shellcheck disable=SC2086
    vdisk-steady --until /tmp/enough --ready /tmp/ready $sockets >/tmp/steady 2>&1 &
    client=$!
    sockets='/run/vdiskd-export/vm-a.sock /run/vdiskd/vm-b.sock'
    until [ -e /tmp/ready ]; do sleep 0.05; kill -0 $client; done
    touch /tmp/enough
    wait $client || { cat /tmp/steady; false; }
    [ "$(vdiskctl export list --json | grep -c '"Persistent": true')" = 2 ]
    [ -z "$(problems)" ]
    curl -sS http://127.0.0.1:9977/metrics >/tmp/metrics
    grep -q '^vdiskd_export_requests_total{export="vm-a",operation="write"} [1-9]' /tmp/metrics
    grep -q '^# EOF' /tmp/metrics
done
vdiskctl top -d 1 -n 1
vdiskctl status

# A missing image, a damaged state, each named; the rest serves.
vdiskctl node add c driver=qcow2 file.driver=file file.filename=/srv/images/c.qcow2
vdiskctl export add vm-c --node c --socket /run/vdiskd/vm-c.sock
mv /srv/images/c.qcow2 /srv/images/away
systemctl restart vdiskd
problems | grep -q c.qcow2
vdiskctl status | grep -q c.qcow2
[ "$(vdiskctl export list --json | grep -c '"Id"')" = 2 ]
mv /srv/images/away /srv/images/c.qcow2
systemctl restart vdiskd
[ -z "$(problems)" ]
[ "$(vdiskctl export list --json | grep -c '"Id"')" = 3 ]
echo '{"version": 1, "daem' >/run/vdiskd/state.json
systemctl kill --kill-whom=main -s KILL vdiskd
await vdiskctl info
problems | grep -q 'state.bad'
# What is persistent is still known.
[ "$(vdiskctl export list --json | grep -c '"Id"')" = 2 ]
rm /run/vdiskd/state.bad

# No space, no right to write: what changes is refused or named, what serves serves on.
systemctl stop vdiskd
mkdir -p /run/systemd/system/vdiskd.service.d /srv/small
mount -t tmpfs -o size=256k,mode=755,uid="$(id -u vdiskd)" none /srv/small
cat >/run/systemd/system/vdiskd.service.d/test.conf <<UNIT
[Service]
ExecStart=
ExecStart=/usr/libexec/vdiskd --runtime-dir /srv/small --state-dir /srv/small/state
UNIT
systemctl daemon-reload
vdiskctl image create /srv/images/r.raw 64M --format raw
vdiskctl node add a driver=file filename=/srv/images/r.raw
vdiskctl export add vm-a --node a --socket /run/vdiskd/vm-a.sock --writable
rm -f /tmp/enough /tmp/ready
vdisk-steady --until /tmp/enough --ready /tmp/ready /run/vdiskd/vm-a.sock >/tmp/steady 2>&1 &
client=$!
until [ -e /tmp/ready ]; do sleep 0.05; kill -0 $client; done
! dd if=/dev/zero of=/srv/small/full bs=1k 2>/dev/null
vdiskctl image create /srv/images/over.qcow2 64M -b /srv/images/r.raw -F raw
refused 'No space left' vdiskctl snapshot overlay a over /srv/images/over.qcow2 --existing
refused 'persistent.json' vdiskctl export set vm-a persistent=on
vdiskctl node add more driver=null-co size=1G
problems | grep -q 'No space left'
rm /srv/small/full
vdiskctl iothread add more
[ -z "$(problems)" ]
chown root /srv/small
chmod 555 /srv/small
refused 'cannot be written' vdiskctl snapshot overlay a over /srv/images/over.qcow2 --existing
vdiskctl iothread remove more
problems | grep -q 'Permission denied'
chown vdiskd /srv/small
systemctl kill --kill-whom=main -s KILL vdiskd
await vdiskctl info
touch /tmp/enough
wait $client || { cat /tmp/steady; false; }
vdiskctl export show vm-a >/dev/null
rm -r /run/systemd/system/vdiskd.service.d
systemctl daemon-reload
systemctl stop vdiskd

# An instance has a process, a name, a state and a configuration of its own.
mkdir -p /etc/vdiskd/instances /srv/tenant
chown vdiskd /srv/tenant
printf '[images]\ndirectories = ["/srv/tenant"]\n' >/etc/vdiskd/instances/tenant1.toml
systemctl start vdiskd@tenant1
vdiskctl --instance tenant1 image create /srv/tenant/t.qcow2 64M
refused 'images may be in /srv/tenant only' vdiskctl --instance tenant1 node add a driver=file filename=/srv/images/a.qcow2
vdiskctl --instance tenant1 node add t driver=qcow2 file.driver=file file.filename=/srv/tenant/t.qcow2
vdiskctl --instance tenant1 export add t --node t --socket /run/vdiskd-tenant1/t.sock --writable --persistent
vdiskctl node list --json >/tmp/nodes
! grep -q '"Name": "t"' /tmp/nodes
setpriv --reuid=65534 --regid=65534 --clear-groups vdiskctl --instance tenant1 status
refused 'org.vdisk1.manage' setpriv --reuid=65534 --regid=65534 --clear-groups vdiskctl --instance tenant1 iothread add mine
systemctl stop vdiskd
rm -f /tmp/enough /tmp/ready
vdisk-steady --until /tmp/enough --ready /tmp/ready /run/vdiskd-tenant1/t.sock >/tmp/steady 2>&1 &
client=$!
until [ -e /tmp/ready ]; do sleep 0.05; kill -0 $client; done
before=$(systemctl show -P MainPID vdiskd@tenant1)
# (The next reload comes when this one is over: the program that begins reads the configuration again.)
started() { vdiskctl --instance tenant1 status --json | grep StartTime; }
was=$(started)
systemctl reload vdiskd@tenant1
until now=$(started) && [ "$now" != "$was" ]; do sleep 0.05; done
[ "$(systemctl show -P MainPID vdiskd@tenant1)" = "$before" ]
# Other folders need a process that was never kept from them; its guest does not notice.
printf '[images]\ndirectories = ["/srv/tenant", "/srv/images"]\n' >/etc/vdiskd/instances/tenant1.toml
systemctl reload vdiskd@tenant1
await vdiskctl --instance tenant1 node add a driver=file filename=/srv/images/a.qcow2
[ "$(systemctl show -P MainPID vdiskd@tenant1)" != "$before" ]
touch /tmp/enough
wait $client || { cat /tmp/steady; false; }
systemctl stop vdiskd@tenant1
[ -e /var/lib/vdiskd-tenant1/persistent.json ]

# Encrypted images open with what systemd has as a credential.
echo -n 'open sesame' >/etc/vdiskd/key
mkdir -p /run/systemd/system/vdiskd.service.d
printf '[Service]\nLoadCredential=secret.key0:/etc/vdiskd/key\n' >/run/systemd/system/vdiskd.service.d/test.conf
systemctl daemon-reload
vdiskctl image create /srv/images/e.qcow2 64M encrypt.format=luks encrypt.key-secret=key0 encrypt.iter-time=10
vdiskctl node add e driver=qcow2 file.driver=file file.filename=/srv/images/e.qcow2 encrypt.format=luks encrypt.key-secret=key0
vdiskctl export add e --node e --socket /run/vdiskd/e.sock --persistent
# (What is logged gets there later.)
tried() { journalctl --sync && journalctl -u vdiskd --no-pager | grep -c 'passphrase tried' || true; }
# Whoever made it knows its key.
[ "$(tried)" = 0 ]
systemctl stop vdiskd
systemctl start vdiskd
vdiskctl export show e >/dev/null
[ "$(tried)" = 1 ]
# Guests that wait for the daemon do not wait for passphrases.
vdiskctl secret add key1 --file /etc/vdiskd/key
vdiskctl image create /srv/images/f.raw 64M --format luks key-secret=key1 iter-time=10
vdiskctl node add f driver=luks file.driver=file file.filename=/srv/images/f.raw key-secret=key1
vdiskctl export add f --node f --socket /run/vdiskd/f.sock
for how in restart reload kill restart; do
    case $how in
    kill) systemctl kill --kill-whom=main -s KILL vdiskd ;;
    *) systemctl $how vdiskd ;;
    esac
    await vdiskctl export show e
    vdiskctl export show f >/dev/null
    [ -z "$(problems)" ]
done
[ "$(tried)" = 1 ]
# Not with another secret, nor when the old one is gone.
vdiskctl export remove f
vdiskctl node remove f
vdiskctl secret remove key1
echo -n 'open simsim' >/tmp/other
vdiskctl secret add key1 --file /tmp/other
refused 'passphrase' vdiskctl node add f driver=luks file.driver=file file.filename=/srv/images/f.raw key-secret=key1

# In a user's session.
useradd -m anna
mkdir -p /run/anna
chown anna /run/anna
user() { setpriv --reuid=anna --regid=anna --init-groups env -i HOME=/home/anna XDG_RUNTIME_DIR=/run/anna PATH="$PATH" \
    DBUS_SESSION_BUS_ADDRESS=unix:path=/run/anna/bus "$@"; }
mkdir -p /home/anna
chown anna /home/anna
systemd-run -q --unit=anna-session -p User=anna -p Delegate=yes -p PAMName= -E XDG_RUNTIME_DIR=/run/anna -E HOME=/home/anna \
    /lib/systemd/systemd --user
await user busctl --user status
user vdiskctl --session image create /home/anna/a.qcow2 64M
[ "$(user systemctl --user is-active vdiskd)" = active ]
user vdiskctl --session node add a driver=qcow2 file.driver=file file.filename=/home/anna/a.qcow2
user vdiskctl --session export add a --node a --socket /run/anna/a.sock --writable --persistent
rm -f /tmp/enough /tmp/ready
vdisk-steady --until /tmp/enough --ready /tmp/ready /run/anna/a.sock >/tmp/steady 2>&1 &
client=$!
until [ -e /tmp/ready ]; do sleep 0.05; kill -0 $client; done
user systemctl --user restart vdiskd
user systemctl --user reload vdiskd
user systemctl --user kill --kill-whom=main -s KILL vdiskd
await user vdiskctl --session export show a
touch /tmp/enough
wait $client || { cat /tmp/steady; false; }
echo "all is well"
