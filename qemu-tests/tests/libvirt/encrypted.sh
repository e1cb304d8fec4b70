#!/bin/bash
# A domain with an encrypted disk: what is made of it (overlays, copies, backups) is encrypted, too, and opens with the same secret.
. /usr/bin/vdisk-script-lib
# One: QEMU 10's TCG has been seen to end itself with two (iotlb_to_section).
cpus=1
printf 'correct horse' >/tmp/key
vdiskctl secret add key --file /tmp/key
encrypted() { qemu-img create -q -f qcow2 --object secret,id=s,file=/tmp/key -o encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10 "$@"; }
encrypted $images/a.qcow2 64M
qemu-img create -q -f raw $images/plain.raw 64M
encrypted -b plain.raw -F raw $images/b.qcow2
agent="<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>"
define vm "$(file qcow2 $images/a.qcow2 vda)$(file qcow2 $images/b.qcow2 vdb)$agent"
refused 'is encrypted: give its secret' vdiskctl domain adopt vm vda
vdiskctl domain adopt vm vda vdb --set secret=key
is_encrypted() {
    for image in "$@"; do
        qemu-img info -U --output=json "$image" | grep -q '"encrypted": true' || { echo "in the clear: $image"; false; }
    done
}
virsh start vm
guest vm wait-disk disk=vdb
guest vm write disk=vda offset=0 len=4194304 generation=1
guest vm write disk=vdb offset=0 len=1048576 generation=1

# Under its guest: two snapshots, and one of them deleted; a backup, and what has changed since.
vdiskctl domain snapshot create vm one
is_encrypted $images/a.one $images/b.one
guest vm write disk=vda offset=1048576 len=1048576 generation=2
mkdir -p /var/lib/backup
vdiskctl domain backup vm /var/lib/backup --disks vda
guest vm write disk=vda offset=2097152 len=1048576 generation=2
# The overlays are there, and open at once, before the guest is frozen.
vdiskctl domain snapshot create vm two --quiesce
guest vm write disk=vda offset=3145728 len=1048576 generation=3
vdiskctl domain backup vm /var/lib/backup --disks vda
is_encrypted $images/a.two /var/lib/backup/*.qcow2
virsh dumpxml vm >/tmp/now
grep "backing file=.$images/a.one" /tmp/now | grep -q "secret=.key"
grep "backing file=.$images/plain.raw" /tmp/now >/tmp/plain
if grep secret /tmp/plain; then false; fi
verify() {
    guest vm verify disk="$1" offset=0 len=1048576 generation=1
    [ "$1" = vda ] || return 0
    guest vm verify disk=vda offset=1048576 len=1048576 generation=2
    guest vm verify disk=vda offset=2097152 len=1048576 generation=2
    guest vm verify disk=vda offset=3145728 len=1048576 generation=3
}
verify vda
verify vdb

# What is encrypted does not go to where it would stand in the clear.
refused 'in the clear' vdiskctl domain blockcopy vm vda $images/copy.raw --format raw
[ ! -e $images/copy.raw ]
refused 'leave out --memspec' vdiskctl domain snapshot create vm memory --memspec /var/tmp/memory

refused 'leave out --compress' vdiskctl domain backup vm /var/lib/backup --disks vda --compress
refused 'in the clear' vdiskctl domain blockcommit vm vdb --base $images/plain.raw
vdiskctl domain snapshot delete vm one
virsh dumpxml vm >/tmp/now
if grep "overlay=.$images/a.one\|backing file=.$images/a.one" /tmp/now; then false; fi
vdiskctl domain blockpull vm vdb
verify vdb
vdiskctl domain blockcopy vm vda $images/moved.qcow2
is_encrypted $images/moved.qcow2
verify vda
virsh destroy vm
nothing_left

# It starts with what it is by now, and goes back to a snapshot.
virsh start vm
verify vda
verify vdb
vdiskctl domain snapshot create vm three
guest vm write disk=vda offset=0 len=4194304 generation=9
virsh destroy vm
refused 'bring it back first' vdiskctl domain release vm vda
vdiskctl domain snapshot revert vm three
virsh start vm
verify vda
virsh destroy vm
for image in $(virsh dumpxml --inactive vm | sed -n "s/.*<vdisk:\(disk\|backing\).* file=.\([^'\"]*\).*/\2/p" | grep -v plain.raw); do is_encrypted "$image"; done

# A backup is restored with the same secret.
newest=$(ls -t /var/lib/backup/*.qcow2 | head -1)
qemu-img convert -q --object secret,id=s,file=/tmp/key --image-opts \
    "driver=qcow2,encrypt.format=luks,encrypt.key-secret=s,file.driver=file,file.filename=$newest,backing.driver=qcow2,backing.encrypt.format=luks,backing.encrypt.key-secret=s,backing.file.driver=file,backing.file.filename=$(ls -tr /var/lib/backup/*.qcow2 | head -1)" \
    -O raw $images/restored.raw
define back "$(file raw $images/restored.raw vda)"
virsh start back
for part in 0:1 1048576:2 2097152:2 3145728:3; do guest back verify disk=vda offset=${part%:*} len=1048576 generation=${part#*:}; done
virsh destroy back
nothing_left
echo "all is well"
