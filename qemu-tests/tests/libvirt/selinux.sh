#!/bin/bash
# Guests that SELinux confines to what is theirs: the sockets of their own disks, and no other's.
. /usr/bin/vdisk-script-lib
trap 'dmesg | grep "avc:.*:vdiskd_"; failed $LINENO' ERR
echo "libvirt is up after $(cut -d' ' -f1 /proc/uptime) s"
[ "$(getenforce)" = Enforcing ]
context() { tr -d '\0' <"/proc/$1/attr/current"; }
label() { stat -c %C "$1"; }
# boot NAME DISK: a domain whose firmware reads its disk.
boot() {
    virsh -q define /dev/stdin <<XML
<domain type='qemu'>
  <name>$1</name>
  <memory unit='MiB'>128</memory>
  <vcpu>1</vcpu>
  <memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>
  <os><type arch='x86_64' machine='pc'>hvm</type><boot dev='hd'/></os>
  <features><acpi/></features>
  <devices><emulator>/usr/bin/qemu-system-x86_64</emulator><memballoon model='none'/>$2</devices>
</domain>
XML
}
# Secrets come through the bus, and as the unit's credentials.
echo -n 'open sesame' >/etc/vdiskd-key
mkdir -p /run/systemd/system/vdiskd.service.d
printf '[Service]\nLoadCredential=secret.given:/etc/vdiskd-key\n' >/run/systemd/system/vdiskd.service.d/key.conf
systemctl daemon-reload
echo -n 'open sesame' | vdiskctl secret add piped
vdiskctl secret list --json | tr -d ' \n' | grep -q given.*piped
truncate -s 16M $images/one.img $images/more.img /srv/elsewhere.img
chown vdiskd /srv/elsewhere.img
restorecon -F $images/*
boot one "$(file raw $images/one.img vda)"
vdiskctl domain adopt one
virsh start one
[ "$(context "$(pidof vdiskd)")" = system_u:system_r:vdiskd_t:s0 ]
qemu=$(context "$(pidof qemu-system-x86_64)")
[[ $qemu = system_u:system_r:svirt_t:s0:c* ]]
mine=system_u:object_r:svirt_image_t:${qemu#*svirt_t:}
socket=$(echo /run/vdiskd/*-vda.sock)
[ "$(label "$socket")" = "$mine" ]
# It reads, so that its memory is the daemon's to use.
until vdiskctl stats --json | tr -d ' \n' | grep -q '"fast":[1-9]'; do sleep 0.2; done

# Another guest does not get at it, whatever its definition says.
boot two "<disk type='vhostuser' device='disk'><driver name='qemu' type='raw'/><source type='unix' path='$socket'/><target dev='vda' bus='virtio'/></disk>"
refused "Failed to connect to '$socket': Permission denied" virsh start two
# Nor at one that no guest has been given, and vdiskd not at what is no image.
vdiskctl export add nobody --node one-vda --socket /run/vdiskd/nobody.sock
boot three "<disk type='vhostuser' device='disk'><driver name='qemu' type='raw'/><source type='unix' path='/run/vdiskd/nobody.sock'/><target dev='vda' bus='virtio'/></disk>"
refused "Failed to connect to '/run/vdiskd/nobody.sock': Permission denied" virsh start three
vdiskctl export remove nobody
refused 'ermission denied' vdiskctl node add elsewhere driver=file filename=/srv/elsewhere.img

# What is attached while it runs is labelled, and labels are there after whatever happens to the daemon.
vdiskctl domain attach one $images/more.img vdb format=raw
in_use() {
    until [ "$(vdiskctl domain list | grep -c 'in use')" = 2 ]; do sleep 0.1; done
    for socket in /run/vdiskd/*.sock; do [ "$(label "$socket")" = "$mine" ]; done
}
in_use
pid=$(pidof vdiskd)
systemctl reload vdiskd
until vdiskctl node list >/dev/null && [ "$(journalctl -u vdiskd | grep -c 'ready version')" = 2 ]; do sleep 0.1; done
[ "$(pidof vdiskd)" = "$pid" ]
in_use
systemctl restart vdiskd
in_use
# What lost its label gets it, and what was not kept is built again, by the hook when libvirt's daemon comes back.
restorecon -RF /run/vdiskd
in_use
systemctl stop vdiskd
systemctl restart libvirtd
virsh list
in_use

systemctl start vdiskd-libvirt
[ "$(context "$(pidof vdiskd-libvirt)")" = system_u:system_r:vdiskd_libvirt_t:s0 ]
busctl tree org.vdisk1.Domains | grep -q /org/vdisk1/domain/
vdiskctl domain snapshot create one first
vdiskctl domain backup one /var/lib/libvirt/images/backup
vdiskctl domain snapshot delete one first
virsh destroy one
nothing_left
# Nothing else was denied to us, or to QEMU of what is ours. (Where the hook serves a guest that runs, QEMU may come before the label, and
# comes again.)
dmesg | grep 'avc:.*denied.*:vdiskd_' >/tmp/denied
grep -q nobody.sock /tmp/denied
grep -q elsewhere.img /tmp/denied
if grep -v -e nobody.sock -e elsewhere.img -e '-vd[ab].sock.*:svirt_t:' /tmp/denied; then false; fi
echo "done after $(cut -d' ' -f1 /proc/uptime) s"
echo "all is well"
