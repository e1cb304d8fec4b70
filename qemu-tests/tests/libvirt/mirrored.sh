#!/bin/bash
# A guest moves, with its disks, to a host that has none of the storage of this one, and back, while it verifies what it reads.
. /usr/bin/vdisk-script-lib
other_host apart

qemu-img create -q -f qcow2 $images/base.qcow2 64M
qemu-io -c 'write -P 3 40M 1M' $images/base.qcow2
qemu-img create -q -f qcow2 -b base.qcow2 -F qcow2 $images/a.qcow2
qemu-img create -q -f raw $images/b.raw 64M
define vm "$(file qcow2 $images/a.qcow2 vda)$(file raw $images/b.raw vdb '<iotune><total_iops_sec>5000</total_iops_sec></iotune>')"
vdiskctl domain adopt vm
virsh start vm
guest vm wait-disk disk=vdb
guest vm write disk=vdb offset=0 len=1048576 generation=1
guest vm load-start disk=vda offset=0 len=33554432 threads=4
to() { vdiskctl domain migrate vm "$there" unix:///tmp/there.sock --persistent --copy-storage-all --remote-shell "$(type -P nsenter) -t $other --mount --uts sh -c" "$@"; }
# Ends the other end of vda's copy.
breaks() {
    local cmd
    for cmd in /proc/[0-9]*/cmdline; do
        if [ "$(readlink "${cmd%/cmdline}/exe")" = /usr/bin/vdiskctl-domain ] && grep -q receive "$cmd"; then
            kill -9 "$(basename "${cmd%/cmdline}")"
        fi
    done 2>/dev/null
}
# Nothing of a try is left: here the disks are as they were, there is nothing.
stays() {
    goes_on
    [ "$(vdiskctl job list --json | tr -d ' \n')" = '[]' ]
    [ -z "$(vdiskctl node list --json | grep copy || true)" ]
    [ "$(on2 vdiskctl node list --json | tr -d ' \n')" = '[]' ]
    [ "$(on2 vdiskctl export list --json | tr -d ' \n')" = '[]' ]
    [ -z "$(on2 find $images -name '*.qcow2' -o -name '*.raw')" ]
}

# A host that cannot be reached; an image that is there already; a connection that breaks; a user who thinks better of it.
refused 'remote-shell' vdiskctl domain migrate vm "$there" --copy-storage-all
refused 'does not offer' vdiskctl domain migrate vm "$there" --copy-storage-all --remote-shell 'sh -c exit'
stays
on2 touch $images/b.raw
refused "disk 'vdb'" to
vdiskctl export add other --type nbd --node vm-vdb --socket /run/vdiskd/other.sock
refused "export 'other'" to
vdiskctl export remove other
on2 rm $images/b.raw
stays
to --speed 1M >/tmp/broken 2>&1 &
moving=$!
until on2 vdiskctl export show vm-vda-copy --json 2>/dev/null | grep -q '"Clients": 1'; do sleep 0.02; done
goes_on
breaks
! wait $moving
grep -q "disk 'vda'" /tmp/broken
stays
virsh migrate-setspeed vm 1
to >/tmp/aborted 2>&1 &
moving=$!
until virsh domjobinfo vm | grep -q 'Memory remaining'; do sleep 0.05; done
goes_on
virsh domjobabort vm
! wait $moving
grep -q 'goes on here' /tmp/aborted
stays
# A connection that breaks when all is copied has the move given up.
to >/tmp/broken 2>&1 &
moving=$!
until virsh domjobinfo vm | grep -q 'Memory remaining'; do sleep 0.05; done
breaks
! wait $moving
grep -q 'goes on here' /tmp/broken
stays
guest vm load-stop | grep -q '"verified": [1-9]'
# A guest that is reset on the way stops its disks as one does that moves; it writes on, and what it writes goes along.
to &
moving=$!
until virsh domjobinfo vm | grep -q 'Memory remaining'; do sleep 0.05; done
timeout 2 guest vm reboot || true
guest vm write disk=vdb offset=2097152 len=1048576 generation=2
guest vm load-start disk=vda offset=0 len=33554432 threads=4
virsh migrate-setspeed vm 1000
# There: each disk is one image.
wait $moving
goes_on on2
on2 guest vm verify disk=vdb offset=2097152 len=1048576 generation=2
nothing_left
[ -z "$(on2 vdiskctl node list --json | grep copy || true)" ]
on2 guest vm verify disk=vdb offset=0 len=1048576 generation=1
on2 vdiskctl throttle list | grep -q vm-vdb
[ -z "$(on2 vdiskctl tree | grep base.qcow2 || true)" ]
on2 virsh dumpxml --inactive vm | grep -q "file=\"$images/a.qcow2\""
[ -z "$(on2 virsh dumpxml --inactive vm | grep base.qcow2 || true)" ]
on2 vdiskctl domain snapshot create vm away
refused snapshots on2 vdiskctl domain migrate vm "$back" --copy-storage-all --remote-shell 'sh -c'
on2 vdiskctl domain snapshot delete vm away
# What is here is as the guest has left it, and nobody's.
qemu-img check -q $images/a.qcow2
mkdir /tmp/old
mv $images/*.qcow2 $images/*.raw /tmp/old/
virsh undefine vm

# And back, to the unprivileged daemon with the hardened unit.
on2 vdiskctl domain migrate vm "$back" unix:///tmp/back.sock --persistent --undefinesource --copy-storage-all --remote-shell 'nsenter -t 1 --mount --uts sh -c'
goes_on
[ "$(on2 vdiskctl node list --json | tr -d ' \n')" = '[]' ]
guest vm verify disk=vdb offset=0 len=1048576 generation=1
guest vm load-stop | grep -q '"verified": [1-9]'
systemctl restart vdiskd
guest vm verify disk=vdb offset=0 len=1048576 generation=1
virsh destroy vm
nothing_left
qemu-img check -q $images/a.qcow2
qemu-io -r -c 'read -P 3 40M 1M' $images/a.qcow2
echo "all is well"
