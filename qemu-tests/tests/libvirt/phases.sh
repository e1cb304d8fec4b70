#!/bin/bash
# Every phase of a domain's life: what vdiskd serves is there before the guest, and gone after it, whatever happens between.
. /usr/bin/vdisk-script-lib
qemu-img create -q -f qcow2 $images/a.qcow2 64M
qemu-img create -q -f raw $images/b.raw 32M
chmod 600 $images/*
disks="$(file qcow2 $images/a.qcow2 vda '<serial>FIRST</serial>')$(file raw $images/b.raw vdb '<readonly/>')"
define vm "$disks"

# Adopted and released it is what it was.
virsh dumpxml --inactive vm >/tmp/before
sha256sum $images/* >/tmp/sums
stat -c '%u:%g %a' $images/* >/tmp/owners
vdiskctl domain adopt vm --dry-run >/tmp/diff
grep -q "^+.*type='vhostuser'" /tmp/diff
virsh dumpxml --inactive vm | cmp - /tmp/before
vdiskctl domain adopt vm
refused 'no disk that could be adopted' vdiskctl domain adopt vm
virsh dumpxml --inactive vm >/tmp/adopted
grep -q 'serial="FIRST"' /tmp/adopted
vdiskctl domain release vm
virsh dumpxml --inactive vm | diff - /tmp/before
sha256sum -c --quiet /tmp/sums
stat -c '%u:%g %a' $images/* | diff - /tmp/owners
vdiskctl domain adopt vm
virsh dumpxml --inactive vm | diff - /tmp/adopted

# Start: the guest sees its disks.
systemctl stop vdiskd
virsh start vm
guest vm wait-disk disk=vdb
guest vm disks | tee /tmp/disks
grep -q FIRST /tmp/disks
guest vm write disk=vda offset=0 len=4194304 generation=1
vdiskctl domain list | tee /tmp/list
[ "$(grep -c 'in use' /tmp/list)" = 2 ]
refused 'is running' vdiskctl domain release vm
# Nobody writes to the other.
vdiskctl domain backup vm /var/lib/backup | tee /tmp/backup
[ "$(cut -d' ' -f1 /tmp/backup)" = vda ]
# A reboot of the guest, a restart of either daemon, and a death of ours.
# It does not say that it has.
timeout 2 guest vm reboot || true
guest vm verify disk=vda offset=0 len=4194304 generation=1
systemctl restart libvirtd
[ "$(virsh -q domstate vm)" = running ]
systemctl restart vdiskd
guest vm verify disk=vda offset=0 len=4194304 generation=1
systemctl kill --kill-whom=main -s KILL vdiskd
guest vm write disk=vda offset=0 len=4194304 generation=2
# Saved and restored.
virsh save vm /var/tmp/saved
nothing_left
virsh restore /var/tmp/saved
guest vm verify disk=vda offset=0 len=4194304 generation=2
virsh managedsave vm
nothing_left
refused 'saved state' vdiskctl domain release vm
virsh start vm
guest vm verify disk=vda offset=0 len=4194304 generation=2
# QEMU dies, with and without libvirt there.
kill -KILL "$(cat /run/libvirt/qemu/vm.pid)"
until_gone vm
nothing_left
virsh start vm
systemctl stop libvirtd libvirtd.socket libvirtd-ro.socket libvirtd-admin.socket
kill -KILL "$(cat /run/libvirt/qemu/vm.pid)"
systemctl start libvirtd
until_gone vm
nothing_left
virsh start vm
guest vm verify disk=vda offset=0 len=4194304 generation=2
virsh destroy vm
nothing_left

# What cannot start says why, and leaves nothing.
mv $images/a.qcow2 $images/gone
refused 'a.qcow2.*No such file' virsh start vm
nothing_left
mv $images/gone $images/a.qcow2
chown root $images/a.qcow2
refused 'Permission denied' virsh start vm
chown vdiskd $images/a.qcow2
nothing_left
# A failure of QEMU's, after ours is there.
virsh dumpxml --inactive vm | sed "s|/boot/initramfs|/boot/nothing|" >/tmp/broken.xml
virsh -q define /tmp/broken.xml
refused 'nothing' virsh start vm
nothing_left
virsh -q define /tmp/adopted
# No shared memory, unknown metadata, a daemon that cannot start.
sed "/<memoryBacking>/,/<.memoryBacking>/d" /tmp/adopted >/tmp/broken.xml
refused 'does not share its memory' /etc/libvirt/hooks/qemu.d/vdiskd vm prepare begin - </tmp/broken.xml
sed 's/ serial="FIRST"/ searial="FIRST"/' /tmp/adopted >/tmp/broken.xml
virsh -q define /tmp/broken.xml
refused 'searial' virsh start vm
virsh -q define /tmp/adopted
systemctl stop vdiskd
systemctl mask --runtime vdiskd
refused 'vdiskd' virsh start vm
systemctl unmask --runtime vdiskd
# Started by the bus, and already running: how long the hook takes.
for how in activated running; do
    [ $how = running ] || systemctl stop vdiskd
    xml=$(virsh dumpxml --inactive vm)
    begin=$(date +%s%N)
    /etc/libvirt/hooks/qemu.d/vdiskd vm prepare begin - <<<"$xml"
    end=$(date +%s%N)
    echo "hook with vdiskd $how: $(((end - begin) / 1000000)) ms"
    begin=$(date +%s%N)
    /etc/libvirt/hooks/qemu.d/vdiskd vm start begin - <<<"$xml"
    end=$(date +%s%N)
    echo "and just before QEMU: $(((end - begin) / 1000000)) ms"
    # Once more is well, and so is an end without a beginning.
    /etc/libvirt/hooks/qemu.d/vdiskd vm prepare begin - <<<"$xml"
    /etc/libvirt/hooks/qemu.d/vdiskd vm reconnect begin - <<<"$xml"
    /etc/libvirt/hooks/qemu.d/vdiskd vm release end - <<<"$xml"
    /etc/libvirt/hooks/qemu.d/vdiskd vm release end - <<<"$xml"
    nothing_left
done

# Sixteen disks.
more=
for n in $(seq 16); do
    letter=$(printf "\\x$(printf %x $((96 + n)))")
    qemu-img create -q -f qcow2 $images/n$n.qcow2 16M
    more="$more$(file qcow2 $images/n$n.qcow2 vd$letter)"
done
define many "$more"
vdiskctl domain adopt many
virsh start many
guest many wait-disk disk=vdp
[ "$(vdiskctl domain list --json | grep -c '"clients": 1')" = 16 ]
virsh destroy many
nothing_left
vdiskctl domain release vm
virsh start vm
guest vm verify disk=vda offset=0 len=4194304 generation=2
virsh destroy vm
echo "all is well"
