#!/bin/bash
# Disks of a domain that is shut off: snapshots, commits, pulls, copies, backups and a new size, without a guest; a disk on a device.
# Needs a block device: $DEVICE.
. /usr/bin/vdisk-script-lib
# One: QEMU 10's TCG has been seen to end itself with two (iotlb_to_section).
cpus=1
qemu-img create -q -f qcow2 $images/base.qcow2 64M
qemu-img create -q -f qcow2 -b base.qcow2 -F qcow2 $images/a.qcow2
define vm "$(file qcow2 $images/a.qcow2 vda)<disk type='block' device='disk'><driver name='qemu' type='raw'/><source dev='$DEVICE'/><target dev='vdb' bus='virtio'/></disk>"
vdiskctl domain adopt vm
chown root:root "$DEVICE"
virsh start vm
guest vm wait-disk disk=vdb
guest vm write disk=vda offset=0 len=1048576 generation=1
guest vm write disk=vdb offset=0 len=1048576 generation=1
virsh destroy vm
nothing_left
top() { vdiskctl domain info vm --json | python3 -c 'import json,sys; print([d["chain"][0]["file"] for d in json.load(sys.stdin)["disks"] if d["target"]==sys.argv[1]][0])' "$1"; }

# A snapshot, which a start takes up; nothing stays open.
refused 'not running' vdiskctl domain snapshot create vm one --memspec /var/tmp/memory
refused 'not running' vdiskctl domain stats vm
vdiskctl domain snapshot create vm one
nothing_left
[ "$(top vda)" = $images/a.one ]
virsh start vm
guest vm verify disk=vda offset=0 len=1048576 generation=1
guest vm write disk=vda offset=0 len=1048576 generation=2
guest vm write disk=vdb offset=0 len=1048576 generation=2
vdiskctl domain snapshot create vm two
guest vm write disk=vda offset=0 len=1048576 generation=3
virsh destroy vm
vdiskctl domain snapshot create vm three
nothing_left

# Back to an older one, with those since lost by name only.
refused 'newer snapshots' vdiskctl domain snapshot revert vm two
vdiskctl domain snapshot revert vm two --drop-newer
[ ! -e $images/a.three ]
[ "$(vdiskctl domain snapshot list vm --json | python3 -c 'import json,sys; print([s["name"] for s in json.load(sys.stdin)])')" = "['one', 'two']" ]
virsh start vm
guest vm verify disk=vda offset=0 len=1048576 generation=2
guest vm verify disk=vdb offset=0 len=1048576 generation=2
guest vm write disk=vda offset=8388608 len=4194304 generation=4
virsh destroy vm

# Merged without a guest, both ways, while it cannot start.
vdiskctl domain blockcommit vm vda --speed 65536 >/tmp/commit 2>&1 &
job=$!
until vdiskctl job list --json | grep -q commit; do kill -0 $job && sleep 0.02; done
refused 'being changed by a vdiskctl' virsh start vm
refused 'being changed by another' vdiskctl domain resize vm vda +1M
kill $job
wait $job || true
vdiskctl job list
# Whoever has died keeps nobody off, and leaves nothing behind for long.
virsh start vm
guest vm verify disk=vda offset=0 len=1048576 generation=2
virsh destroy vm
nothing_left
vdiskctl domain snapshot delete vm one
nothing_left
vdiskctl domain blockpull vm vda
[ "$(vdiskctl domain info vm --json | python3 -c 'import json,sys; print(len(json.load(sys.stdin)["disks"][0]["chain"]))')" = 1 ]
vdiskctl domain resize vm vda +16M
nothing_left
mkdir -p /var/lib/backup
vdiskctl domain backup vm /var/lib/backup --disks vda | tee /tmp/backup
vdiskctl domain backup vm /var/lib/backup --disks vda | tee -a /tmp/backup
grep -q 'what has changed since' /tmp/backup
vdiskctl domain blockcopy vm vda $images/copy.raw --format raw --finish
file=$(awk '$1 == "vda" { print $2 }' /tmp/backup | tail -1 | tr -d ,)
qemu-img compare -q -f qcow2 -F raw "$file" $images/copy.raw
vdiskctl domain blockcopy vm vda $images/moved.qcow2
[ "$(top vda)" = $images/moved.qcow2 ]
# To the device, and from it.
vdiskctl domain blockcommit vm vdb
[ "$(top vdb)" = "$DEVICE" ]
vdiskctl domain blockcopy vm vdb $images/from-device.qcow2
vdiskctl domain blockcopy vm vdb "$DEVICE"
[ "$(top vdb)" = "$DEVICE" ]
nothing_left
virsh start vm
guest vm wait-size disk=vda size=$((80 << 20))
guest vm verify disk=vda offset=0 len=1048576 generation=2
guest vm verify disk=vdb offset=0 len=1048576 generation=2
virsh destroy vm
nothing_left
qemu-img check -q $images/moved.qcow2
echo "all is well"
