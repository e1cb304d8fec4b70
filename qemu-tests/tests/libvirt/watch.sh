#!/bin/bash
# What libvirt tells nobody by a hook: the watcher sees it, shows it, and takes down what is served for no guest.
. /usr/bin/vdisk-script-lib
# One: QEMU 10's TCG has been seen to end itself with two (iotlb_to_section).
cpus=1
# seen PROGRAM: a line of Python about d, the domains by name, and o, the orphans, which is to become true.
cat >/usr/bin/seen <<'PYTHON'
#!/usr/bin/python3
import json, subprocess, sys, time


def call(path, interface, method):
    out = subprocess.run(["busctl", "--json=short", "call", "org.vdisk1.Domains", path, interface, method], check=True, capture_output=True)
    return json.loads(out.stdout)["data"][0]


def plain(value):
    if isinstance(value, dict):
        return plain(value["data"]) if set(value) == {"type", "data"} else {k: plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, list) else value


def look():
    d = {}
    for interfaces in call("/org/vdisk1", "org.freedesktop.DBus.ObjectManager", "GetManagedObjects").values():
        if "org.vdisk1.Domain" in interfaces:
            p = plain(interfaces["org.vdisk1.Domain"])
            d[p["Name"]] = p
    top = ["get-property", "org.vdisk1.Domains", "/org/vdisk1", "org.vdisk1.Domains", "Orphans", "Connected"]
    out = subprocess.run(["busctl", "--json=short", *top], check=True, capture_output=True)
    return d, *(plain(json.loads(line)) for line in out.stdout.splitlines())


for _ in range(200):
    try:
        d, o, connected = look()
        if eval(sys.argv[1]):
            sys.exit()
    # What is not there yet, or is just being started again.
    except (KeyError, IndexError, subprocess.CalledProcessError):
        pass
    time.sleep(0.05)
print("not seen:", sys.argv[1], json.dumps(d), o, connected)
sys.exit(1)
PYTHON
chmod +x /usr/bin/seen

systemctl enable vdiskd-libvirt
qemu-img create -q -f qcow2 $images/a.qcow2 64M
qemu-img create -q -f qcow2 $images/b.qcow2 64M
define vm "$(file qcow2 $images/a.qcow2 vda)"
define plain
# The bus starts it; it starts no vdiskd.
systemctl stop vdiskd
seen 'connected and not d and not o'
! systemctl is-active -q vdiskd
vdiskctl domain adopt vm
seen 'd["vm"]["Active"] == False and d["vm"]["Disks"][0]["file"] == "/var/lib/libvirt/images/a.qcow2" and not d["vm"]["Disks"][0]["served"]'
virsh start vm
seen 'd["vm"]["Active"] and d["vm"]["Disks"][0]["clients"] == 1 and d["vm"]["Disks"][0]["export"] == "/org/vdisk1/export/vm_2dvda"'
for interface in Domains Domain; do
    path=/org/vdisk1
    [ $interface = Domains ] || path=$(busctl tree --list org.vdisk1.Domains | grep /domain/)
    busctl introspect --xml-interface org.vdisk1.Domains "$path" >/tmp/said
    python3 - /tmp/said /usr/share/dbus-1/interfaces/org.vdisk1.$interface.xml org.vdisk1.$interface <<'PYTHON'
import re, sys
def members(file):
    text = re.search(f'<interface name="{sys.argv[3]}">(.*?)</interface>', open(file).read(), re.S)[1]
    tags = re.findall(r"<(method|property|signal|arg) ([^>]*)>", text)
    attributes = [(kind, dict(re.findall(r'(\w+)="([^"]*)"', rest))) for kind, rest in tags]
    return [(kind, a.get("name"), a.get("type"), a.get("direction")) for kind, a in attributes]
assert sorted(members(sys.argv[1]), key=str) == sorted(members(sys.argv[2]), key=str) != [], (members(sys.argv[1]), members(sys.argv[2]))
PYTHON
done

# Plugged in by us; unplugged by virsh, of which the daemon hears nothing.
guest vm wait-disk disk=vda
vdiskctl domain attach vm $images/b.qcow2 vdb --live
seen 'd["vm"]["Disks"][1]["target"] == "vdb" and d["vm"]["Disks"][1]["clients"] == 1'
guest vm wait-disk disk=vdb
virsh detach-disk vm vdb
seen 'len(o) == 1 and o[0]["target"] == "vdb" and o[0]["export"] == "/org/vdisk1/export/vm_2dvdb"'
seen 'not o'
refused "no export 'vm-vdb'" vdiskctl export remove vm-vdb
guest vm write disk=vda offset=0 len=1048576 generation=1

# libvirt's daemon, ours and the bus's other users come and go.
systemctl restart libvirtd
seen 'connected and d["vm"]["Active"]'
systemctl kill --kill-whom=main -s KILL libvirtd
systemctl start libvirtd
seen 'connected and d["vm"]["Active"]'
systemctl restart vdiskd
seen 'd["vm"]["Disks"][0]["served"]'
systemctl kill --kill-whom=main -s KILL vdiskd
seen 'd["vm"]["Disks"][0]["clients"] == 1'
guest vm verify disk=vda offset=0 len=1048576 generation=1

# An end that no hook tells of, and what stays is taken down at once by who asks.
mv /etc/libvirt/hooks/qemu.d/vdiskd /tmp/hook
virsh destroy vm
seen 'not d["vm"]["Active"] and len(o) == 1 and o[0]["clients"] == 0'
busctl call org.vdisk1.Domains /org/vdisk1 org.vdisk1.Domains CleanUp 'a{sv}' 0 | grep -q 'as 1 "vm-vda"'
seen 'not o'
nothing_left
mv /tmp/hook /etc/libvirt/hooks/qemu.d/vdiskd
virsh start vm
seen 'd["vm"]["Disks"][0]["clients"] == 1'
virsh destroy vm
seen 'not d["vm"]["Active"] and not o'

# Renamed and gone.
virsh domrename vm other
seen 'list(d) == ["other"]'
virsh undefine other
seen 'not d'
# Not everybody may ask, and an option that there is not is named.
refused 'Access denied' setpriv --reuid nobody --clear-groups busctl get-property org.vdisk1.Domains /org/vdisk1 org.vdisk1.Domains Orphans
refused "option 'now'" busctl call org.vdisk1.Domains /org/vdisk1 org.vdisk1.Domains CleanUp 'a{sv}' 1 now b true
systemd-analyze security vdiskd-libvirt --no-pager | tail -1
systemd-analyze security vdiskd-libvirt --no-pager --threshold=20 >/dev/null
journalctl -u vdiskd-libvirt --no-pager | tail -30
echo "all is well"
