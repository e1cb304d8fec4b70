#!/bin/bash
# A domain whose disks are an instance's, with four of them; a domain whose name is no name for an object; a shared throttle group.
. /usr/bin/vdisk-script-lib
# One: QEMU 10's TCG has been seen to end itself with two (iotlb_to_section).
cpus=1
systemctl start vdiskd@tenant
disks=
for n in a b c d; do
    qemu-img create -q -f qcow2 $images/$n.qcow2 32M
    disks="$disks$(file qcow2 $images/$n.qcow2 vd$n '<iotune><total_iops_sec>5000</total_iops_sec><group_name>all</group_name></iotune>')"
done
define 'of a tenant' "$disks"
vdiskctl --instance tenant domain adopt 'of a tenant'
virsh start 'of a tenant'
# Whatever the environment says, the domain's daemon is the one that is meant.
guest 'of a tenant' wait-disk disk=vdd
VDISK_INSTANCE=other vdiskctl domain list | tee /tmp/list
[ "$(grep -c 'in use' /tmp/list)" = 4 ]
vdiskctl export list --json | tr -d ' \n' | grep -qx '\[\]'
[ "$(vdiskctl --instance tenant throttle list --json | grep -c '"members": 4')" = 1 ]
for disk in vda vdb vdc vdd; do guest 'of a tenant' write disk=$disk offset=0 len=1048576 generation=1; done
guest 'of a tenant' load-start disk=vda offset=1048576 len=4194304 threads=2
vdiskctl domain snapshot create 'of a tenant' four
guest 'of a tenant' load-stop | grep -q '"verified": [1-9]'
virsh destroy 'of a tenant'
[ "$(vdiskctl --instance tenant node list --json | tr -d ' \n')" = '[]' ]
# An instance that does not run is not started by the bus, and virsh says what to do.
systemctl stop vdiskd@tenant
refused 'systemctl start vdiskd' virsh start 'of a tenant'
systemctl start vdiskd@tenant
virsh start 'of a tenant'
for disk in vda vdb vdc vdd; do guest 'of a tenant' verify disk=$disk offset=0 len=1048576 generation=1; done
virsh destroy 'of a tenant'
vdiskctl domain release 'of a tenant'
virsh dumpxml --inactive 'of a tenant' | grep -q '<group_name>all</group_name>'
virsh dumpxml --inactive 'of a tenant' | grep -q "file='$images/a.four'"
virsh start 'of a tenant'
for disk in vda vdb vdc vdd; do guest 'of a tenant' verify disk=$disk offset=0 len=1048576 generation=1; done
virsh destroy 'of a tenant'
nothing_left
echo "all is well"
