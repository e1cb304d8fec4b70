#!/bin/bash
# A guest moves to another host and back while it verifies what it reads; each image is open on one host at a time.
. /usr/bin/vdisk-script-lib
# One: QEMU 10's TCG has been seen to end itself with two (iotlb_to_section).
cpus=1

other_host shared
on2 virsh list --all

qemu-img create -q -f qcow2 $images/base.qcow2 64M
qemu-img create -q -f qcow2 -b base.qcow2 -F qcow2 $images/a.qcow2
qemu-img create -q -f raw $images/b.raw 64M
define vm "$(file qcow2 $images/a.qcow2 vda)$(file raw $images/b.raw vdb '<iotune><total_iops_sec>5000</total_iops_sec></iotune>')"
vdiskctl domain adopt vm
virsh start vm
guest vm wait-disk disk=vdb
guest vm write disk=vdb offset=0 len=1048576 generation=1
guest vm load-start disk=vda offset=0 len=33554432 threads=4
to() { vdiskctl domain migrate vm "$there" unix:///tmp/there.sock --persistent "$@"; }
# Nobody there who could serve it; a job; a user who thinks better of it: the guest stays.
kill "$(on2 busctl status org.vdisk1 | sed -n s/^PID=//p)"
refused 'vdiskd is not running' to
on2 bash /tmp/vdiskd2.sh
mkdir $images/new
chmod 777 $images/new
vdiskctl mirror vm-vdb $images/new/copy.raw --format raw --speed 65536 --detach job-id=slow
refused "works on disk 'vdb'" to
vdiskctl job cancel slow
until vdiskctl node remove vm-vdb-mirror; do sleep 0.05; done
rm $images/new/copy.raw
virsh migrate-setspeed vm 1
to >/tmp/aborted 2>&1 &
moving=$!
until virsh domjobinfo vm | grep -q 'Memory remaining'; do sleep 0.05; done
virsh domjobabort vm
! wait $moving
goes_on
virsh migrate-setspeed vm 1000
[ -z "$(on2 vdiskctl node list --json | tr -d ' \n[]')" ]

# There, with everything that belongs to the disks; here they cannot be opened meanwhile.
to
goes_on on2
nothing_left
refused 'is locked' virsh start vm
nothing_left
on2 guest vm verify disk=vdb offset=0 len=1048576 generation=1
on2 vdiskctl domain list | tee /tmp/list
[ "$(grep -c 'in use' /tmp/list)" = 2 ]
on2 vdiskctl throttle list | grep -q vm-vdb
on2 vdiskctl domain snapshot create vm away
goes_on on2

# And back, to the unprivileged daemon with the hardened unit, on the way to storage of another name.
on2 vdiskctl domain migrate vm "$back" unix:///tmp/back.sock --persistent --undefinesource --copy-storage $images/new
goes_on
[ -z "$(on2 vdiskctl node list --json | tr -d ' \n[]')" ]
[ -z "$(on2 virsh -q list --all)" ]
virsh dumpxml --inactive vm | grep -q "file=\"$images/new/b.qcow2\""
guest vm verify disk=vdb offset=0 len=1048576 generation=1
guest vm load-stop | grep -q '"verified": [1-9]'
systemctl restart vdiskd
guest vm verify disk=vdb offset=0 len=1048576 generation=1
virsh destroy vm
nothing_left
qemu-img check -q $images/new/a.qcow2
echo "all is well"
