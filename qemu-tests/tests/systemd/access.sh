#!/bin/bash
# Who may do what: polkit decides, and is asked for real.
set -Eeu
trap 'set +ex; echo "failed at line $LINENO"; cat /tmp/refused; journalctl -u vdiskd -u polkit --no-pager | tail -40; exit 1' ERR
touch /tmp/refused
for user in anna bert carla dora; do useradd "$user"; done
mkdir -p /etc/polkit-1/rules.d
cat >/etc/polkit-1/rules.d/10-test.rules <<'RULES'
polkit.addRule(function(action, subject) {
    if (action.id.indexOf("org.vdisk1.") != 0)
        return polkit.Result.NOT_HANDLED;
    if (subject.user == "anna" && action.id == "org.vdisk1.manage")
        return polkit.Result.YES;
    if (subject.user == "bert" && (action.id == "org.vdisk1.manage" || action.id == "org.vdisk1.open-any-path"))
        return polkit.Result.YES;
    if (subject.user == "bert" && action.id == "org.vdisk1.attach" && action.lookup("member") == "AddExport")
        return polkit.Result.YES;
    if (subject.user == "carla" && action.id == "org.vdisk1.look")
        return polkit.Result.NO;
    return polkit.Result.NOT_HANDLED;
});
RULES
systemctl start polkit
as() {
    user=$1
    shift
    setpriv --reuid="$user" --regid="$user" --init-groups "$@"
}
refused() {
    why=$1
    shift
    if "$@" >/tmp/refused 2>&1; then echo "not refused: $*"; false; fi
    grep -q "$why" /tmp/refused || { cat /tmp/refused; false; }
}
mkdir -p /srv/images
chown vdiskd /srv/images
chmod 755 /srv/images
vdiskctl image create /srv/images/a.qcow2 64M

# Everybody may look, unless polkit says otherwise.
as dora vdiskctl tree
as dora vdiskctl stats >/dev/null
as dora busctl get-property org.vdisk1 /org/vdisk1 org.vdisk1.Manager Version
as dora busctl introspect org.vdisk1 /org/vdisk1 >/dev/null
for args in 'node list' 'stats' 'info' 'tree'; do
    # shellcheck disable=SC2086
    refused 'org.vdisk1.look' as carla vdiskctl $args
done
refused 'org.vdisk1.look' as carla busctl get-property org.vdisk1 /org/vdisk1 org.vdisk1.Manager Version
refused 'org.vdisk1.look\|Access denied' as carla busctl call org.vdisk1 /org/vdisk1 org.freedesktop.DBus.Properties GetAll s org.vdisk1.Manager
refused 'org.vdisk1.look\|Access denied' as carla busctl call org.vdisk1 /org/vdisk1 org.freedesktop.DBus.ObjectManager GetManagedObjects

# Whoever may only look changes nothing.
refused 'org.vdisk1.manage' as dora vdiskctl iothread add mine
refused 'org.vdisk1.manage' as dora vdiskctl throttle set gold iops-total=5
refused 'org.vdisk1.manage' as dora busctl call org.vdisk1 /org/vdisk1/iothread/io0 org.vdisk1.IoThread Update 'a{sv}' 1 poll-max-ns t 0
[ "$(vdiskctl iothread list --json | grep -c '"Name"')" = 1 ]

# Whoever may manage names no files, however it is tried.
as anna vdiskctl iothread add annas
as anna vdiskctl node add nothing driver=null-co size=1M
refused 'org.vdisk1.open-any-path' as anna vdiskctl node add a driver=qcow2 file.driver=file file.filename=/srv/images/a.qcow2
refused 'org.vdisk1.open-any-path' as anna vdiskctl node add a driver=file filename=etc
refused 'org.vdisk1.open-any-path' as anna vdiskctl image create /srv/images/b.qcow2 1M
refused 'org.vdisk1.open-any-path' as anna vdiskctl image info /srv/images/a.qcow2
refused 'org.vdisk1.open-any-path' as anna busctl call org.vdisk1 /org/vdisk1 org.vdisk1.Manager AddSecret 'sa{sv}' s 1 file s /etc/hostname
refused 'org.vdisk1.open-any-path' as anna busctl call org.vdisk1 /org/vdisk1 org.vdisk1.Manager AddNode 'a{sv}' 3 driver s raw \
    node-name s x file 'a{sv}' 2 driver s file filename s x
# But passes what she may open herself.
install -o anna -m 600 /dev/null /home/annas.img 2>/dev/null || { mkdir -p /home; install -o anna -m 600 /dev/null /home/annas.img; }
truncate -s 64M /home/annas.img
as anna vdiskctl node add annas driver=file filename=/home/annas.img --pass
vdiskctl node show annas | grep /dev/fdset
refused 'cannot be opened' as dora vdiskctl node add doras driver=file filename=/home/annas.img --pass
# A guest sees it when somebody may attach it.
refused 'org.vdisk1.attach' as anna vdiskctl export add annas --node annas --socket /run/vdiskd/annas.sock --writable
as bert vdiskctl export add annas --node annas --socket /run/vdiskd/annas.sock --writable
refused 'org.vdisk1.manage' as dora busctl call org.vdisk1 /org/vdisk1/export/annas org.vdisk1.Export SetPersistent 'ba{sv}' true 0
refused 'passed open' vdiskctl export set annas persistent=on
# What is named otherwise is named all the same, and a socket elsewhere is a file, too.
refused 'org.vdisk1.open-any-path' as anna busctl call org.vdisk1 /org/vdisk1 org.vdisk1.Manager AddNode 'a{sv}' 3 driver s host_device \
    node-name s x filename o /dev/sda
refused 'org.vdisk1.open-any-path' as anna vdiskctl node add x driver=file filename=/dev/fdset/0
cat >/etc/polkit-1/rules.d/20-test.rules <<'RULES'
polkit.addRule(function(action, subject) {
    if (subject.user == "carla" && (action.id == "org.vdisk1.attach" || action.id == "org.vdisk1.look"))
        return polkit.Result.YES;
});
RULES
mv /etc/polkit-1/rules.d/20-test.rules /etc/polkit-1/rules.d/05-test.rules
sleep 1
refused 'org.vdisk1.open-any-path' as carla vdiskctl export add c --node nothing --socket /run/elsewhere.sock
as carla vdiskctl export add c --node nothing --socket /run/vdiskd/c.sock
vdiskctl export remove c
# The same file cannot be two nodes.
refused 'open already' as anna vdiskctl node add twice driver=file filename=/home/annas.img --pass
refused 'org.vdisk1.manage' as dora vdiskctl export remove annas
vdisk-steady --until /tmp/enough --ready /tmp/ready /run/vdiskd/annas.sock >/tmp/steady 2>&1 &
client=$!
until [ -e /tmp/ready ]; do sleep 0.05; kill -0 $client; done
# The passed file goes with the daemon, whose user could never open it.
for how in kill restart reload; do
    before=$(systemctl show -P MainPID vdiskd)
    case $how in
    kill)
        systemctl kill --kill-whom=main -s KILL vdiskd
        until now=$(systemctl show -P MainPID vdiskd) && [ "$now" != 0 ] && [ "$now" != "$before" ]; do sleep 0.02; done
        ;;
    *) systemctl $how vdiskd ;;
    esac
    vdiskctl info --json | tr -d '\n ' | grep -q '"Problems":\[\]'
    vdiskctl node show annas >/dev/null
done
touch /tmp/enough
wait $client || { cat /tmp/steady; false; }
vdiskctl export remove annas
vdiskctl node remove annas
for _ in $(seq 100); do [ "$(systemctl show -P NFileDescriptorStore vdiskd)" = 0 ] && break; sleep 0.02; done
[ "$(systemctl show -P NFileDescriptorStore vdiskd)" = 0 ]
as bert vdiskctl node add a driver=qcow2 file.driver=file file.filename=/srv/images/a.qcow2

# A bus that was away has it ask again.
before=$(systemctl show -P MainPID vdiskd)
systemctl restart dbus
systemctl restart polkit
for _ in $(seq 100); do as bert vdiskctl throttle set gold iops-total=5 >/tmp/refused 2>&1 && break; sleep 0.1; done
refused 'org.vdisk1.manage' as dora vdiskctl throttle set gold iops-total=6
vdiskctl throttle list | grep gold
[ "$(systemctl show -P MainPID vdiskd)" = "$before" ]
vdiskctl throttle remove gold

# Some need no polkit, and others are refused without one.
mkdir -p /etc/vdiskd
printf '[access]\nusers = ["dora"]\n' >/etc/vdiskd/vdiskd.toml
systemctl reload vdiskd
systemctl stop polkit
systemctl mask --runtime polkit
as dora vdiskctl node remove a
refused 'polkit cannot be asked' as bert vdiskctl iothread remove annas
vdiskctl iothread remove annas
printf '[access]\nusers = ["nobody-at-all"]\n' >/etc/vdiskd/vdiskd.toml
refused "no user 'nobody-at-all'" /usr/libexec/vdiskd --check-config
echo "all is well"
