#!/bin/bash
# What virsh refuses on vhost-user disks, vdiskctl domain does, while the guest runs a load that verifies what it reads.
. /usr/bin/vdisk-script-lib
qemu-img create -q -f qcow2 $images/a.qcow2 64M
qemu-img create -q -f raw $images/b.raw 64M
agent="<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>"
define vm "$(file qcow2 $images/a.qcow2 vda)$(file raw $images/b.raw vdb)$agent"
vdiskctl domain adopt vm --set discard=unmap
virsh start vm
guest vm wait-disk disk=vdb
guest vm write disk=vdb offset=0 len=1048576 generation=1
guest vm load-start disk=vda offset=0 len=33554432 threads=4
top() { vdiskctl domain info vm --json | python3 -c 'import json,sys; print([d["chain"][0]["file"] for d in json.load(sys.stdin)["disks"] if d["target"]==sys.argv[1]][0])' "$1"; }
goes_on() {
    local before after
    before=$(guest vm load-status)
    until after=$(guest vm load-status) && [ "$before" != "$after" ]; do sleep 0.02; done
    if grep -q '"failed": true' <<<"$after"; then echo "the load failed"; false; fi
}

# Snapshots of all disks at one instant, and what they are over is told to libvirt's metadata, of both definitions.
vdiskctl domain snapshot create vm one | tee /tmp/paused
goes_on
[ "$(top vda)" = $images/a.one ]
virsh dumpxml --inactive vm | grep -q 'file="/var/lib/libvirt/images/a.one"'
virsh dumpxml vm | grep -q 'file="/var/lib/libvirt/images/b.one"'
refused "snapshot 'one' already" vdiskctl domain snapshot create vm one
vdiskctl domain snapshot create vm two --disks vda --quiesce
[ "$(guest vm agent)" = '{"freezes": 1, "thaws": 1}' ]
vdiskctl domain snapshot list vm
guest vm write disk=vdb offset=0 len=1048576 generation=2
vdiskctl domain snapshot delete vm one
# What two was is in the lowest file now.
[ "$(vdiskctl domain snapshot list vm --json | python3 -c 'import json,sys; print([(s["name"], d["file"], d["overlay"]) for s in json.load(sys.stdin) for d in s["disks"]])')" = \
    "[('two', '$images/a.qcow2', '$images/a.two')]" ]
goes_on
[ ! -e $images/a.one ]
[ "$(top vda)" = $images/a.two ]
[ "$(top vdb)" = $images/b.raw ]
vdiskctl domain blockcommit vm vda
goes_on
[ "$(top vda)" = $images/a.qcow2 ]
[ "$(vdiskctl domain snapshot list vm --json | tr -d ' \n')" = '[]' ]
vdiskctl domain snapshot create vm three --disks vda
vdiskctl domain blockpull vm vda
goes_on
refused 'stands on no other image' vdiskctl domain blockcommit vm vda
vdiskctl domain blockcopy vm vda $images/copy.qcow2
goes_on
[ "$(top vda)" = $images/copy.qcow2 ]
vdiskctl domain blockcopy vm vdb $images/copy.raw --format raw --finish
[ "$(top vdb)" = $images/b.raw ]
cmp $images/b.raw $images/copy.raw
vdiskctl domain resize vm vda +16M
guest vm wait-size disk=vda size=$((80 << 20))
refused 'shrink' vdiskctl domain resize vm vda 1M
vdiskctl domain throttle vm vda total_iops_sec=2000
goes_on
vdiskctl throttle list | grep -q vm-vda
vdiskctl domain throttle vm vda total_iops_sec=0
vdiskctl domain stats vm
vdiskctl domain threshold vm vda 60M
vdiskctl node list --json | grep -q '"WriteThreshold": 62914560'

# Backups: all at first, then what has changed; each is what the disk was, which a copy of the same moment shows.
guest vm load-stop | grep -q '"verified": [1-9]'
mkdir -p /var/lib/backup
for n in 1 2 3 4; do
    guest vm write disk=vda offset=$((n * 4194304)) len=1048576 generation=1$n
    guest vm write disk=vdb offset=$((8388608 + n * 65536)) len=65536 generation=1$n
    vdiskctl domain backup vm /var/lib/backup --quiesce | tee /tmp/backup
    [ "$(grep -c 'what has changed since' /tmp/backup || true)" = $((n == 1 ? 0 : 2)) ]
    for disk in vda vdb; do
        vdiskctl domain blockcopy vm $disk $images/now.raw --format raw --finish
        file=$(awk -v d=$disk '$1 == d { print $2 }' /tmp/backup | tr -d ,)
        qemu-img compare -q -f qcow2 -F raw "$file" $images/now.raw
        rm $images/now.raw
    done
    # Over a snapshot that comes and goes, too.
    [ $n != 2 ] || { vdiskctl domain snapshot create vm between && guest vm write disk=vda offset=0 len=65536 generation=99 && vdiskctl domain snapshot delete vm between; }
done
# To a server, twice over the same; a vdiskctl that is killed leaves a job that has to end first.
qemu-img create -q -f qcow2 $images/served.qcow2 $((80 << 20))
qemu-nbd -f qcow2 -x vda -k /run/nbd.sock -t -e 4 --fork --pid-file=/run/nbd.pid $images/served.qcow2
to='nbd+unix:///?socket=/run/nbd.sock'
refused "export 'vdb' of '/run/nbd.sock'" vdiskctl domain backup vm "$to"
refused 'same size' vdiskctl domain backup vm "nbd+unix:///vda?socket=/run/nbd.sock" --disks vdb
refused 'is one export' vdiskctl domain backup vm "nbd+unix:///vda?socket=/run/nbd.sock"
for n in 1 2; do
    guest vm write disk=vda offset=$((n * 4194304)) len=65536 generation=3$n
    vdiskctl domain backup vm "$to" --disks vda --quiesce
    vdiskctl domain blockcopy vm vda $images/now.raw --format raw --finish
    qemu-img compare -q -f raw -F raw "nbd+unix:///vda?socket=/run/nbd.sock" $images/now.raw
    rm $images/now.raw
done
# As a vdiskctl leaves it that was killed.
node=$(vdiskctl export show vm-vda --json | sed -n 's/.*"Node": "\([^"]*\)".*/\1/p' | sed 's,.*/,,;s/_2d/-/g')
mkdir -p /var/lib/killed
chown vdiskd /var/lib/killed
vdiskctl backup "$node" /var/lib/killed/vda.qcow2 --name vm-vda-backup-1 --detach --speed 64k job-id=vm-vda-backup-1 auto-dismiss=false
refused "is being backed up by job 'vm-vda-backup-1'" vdiskctl domain backup vm "$to" --disks vda
vdiskctl job cancel vm-vda-backup-1
until vdiskctl domain backup vm "$to" --disks vda; do sleep 0.1; done
kill "$(cat /run/nbd.pid)"
[ "$(vdiskctl node list --json | grep -c -- -backup- || true)" = 0 ]
guest vm load-start disk=vda offset=0 len=33554432 threads=4
vdiskctl domain backup vm /var/lib/backup --full --compress | grep 'as asked for'
qemu-img check -q "$(find /var/lib/backup -name 'vda.*' | sort | tail -1)"
# One that fails changes nothing: the next one has what it should have had. One that was interrupted is not built upon.
mount -t tmpfs -o size=64k none /mnt
refused 'backed up\|space\|made' vdiskctl domain backup vm /mnt
umount /mnt
vdiskctl domain backup vm /var/lib/backup | grep -c 'what has changed since' | grep -q 2
sed -i 's/"unfinished": false/"unfinished": true/' /var/lib/backup/vdisk-backup.json
vdiskctl domain backup vm /var/lib/backup | grep -c 'was interrupted' | grep -q 2
goes_on

# A disk comes and goes, also one that was there from the start.
qemu-img create -q -f qcow2 $images/c.qcow2 16M
vdiskctl domain attach vm $images/c.qcow2 vdc serial=THIRD
guest vm wait-disk disk=vdc | grep -q THIRD
guest vm write disk=vdc offset=0 len=1048576 generation=1
refused "has a disk 'vdc' already" vdiskctl domain attach vm $images/c.qcow2 vdc
refused 'No such file' vdiskctl domain attach vm $images/nothing vdd
virsh dumpxml --inactive vm | grep -q c.qcow2
vdiskctl domain detach vm vdc
if virsh dumpxml vm | grep c.qcow2; then false; fi
if virsh dumpxml --inactive vm | grep c.qcow2; then false; fi
if vdiskctl node list | grep c.qcow2; then false; fi
# One that virsh takes away is an orphan until somebody cleans up, and comes back as if it had not been there.
vdiskctl domain attach vm $images/c.qcow2 vdc
guest vm wait-disk disk=vdc
virsh detach-disk vm vdc --persistent
until ! virsh dumpxml vm | grep -q vdc.sock; do sleep 0.1; done
vdiskctl domain list | grep -q 'ORPHAN.*vm-vdc'
vdiskctl domain cleanup | grep -q vm-vdc
if vdiskctl node list | grep c.qcow2; then false; fi
vdiskctl domain attach vm $images/c.qcow2 vdc
vdiskctl domain detach vm vdc
vdiskctl domain attach vm $images/c.qcow2 vdd --config
if virsh dumpxml vm | grep c.qcow2; then false; fi
virsh dumpxml --inactive vm | grep -q c.qcow2

# Both daemons fall and come back under the load, a snapshot later everything is where it was.
systemctl kill --kill-whom=main -s KILL vdiskd
systemctl restart libvirtd
vdiskctl domain snapshot create vm four
goes_on
guest vm load-stop | tee /tmp/load
grep -q '"verified": [1-9]' /tmp/load
guest vm verify disk=vdb offset=0 len=1048576 generation=2
virsh destroy vm
nothing_left
for image in $images/*.qcow2 $images/*.four; do qemu-img check -q "$image"; done

# The guest's memory with its disks: back to that moment.
virsh start vm
guest vm write disk=vdb offset=0 len=1048576 generation=3
touch /tmp/there
refused 'is there already' vdiskctl domain snapshot create vm with-memory --memspec /tmp/there
refused 'all disks' vdiskctl domain snapshot create vm with-memory --disks vda --memspec /tmp/not-there
vdiskctl domain snapshot create vm with-memory --memspec $images/vm.memory
guest vm write disk=vdb offset=0 len=1048576 generation=4
guest vm load-start disk=vda offset=0 len=4194304 threads=1
virsh destroy vm
# Its disks are others by now.
refused 'memory of snapshot' virsh restore $images/vm.memory
nothing_left
vdiskctl domain snapshot revert vm with-memory
guest vm verify disk=vdb offset=0 len=1048576 generation=3
# The guest is what it was then: it has not begun its load.
refused 'no load' guest vm load-stop
guest vm write disk=vdb offset=0 len=1048576 generation=5
virsh destroy vm
vdiskctl domain snapshot revert vm with-memory --disks-only
virsh start vm
guest vm wait-disk disk=vdc
guest vm verify disk=vdb offset=0 len=1048576 generation=3
vdiskctl domain snapshot delete vm with-memory
[ ! -e $images/vm.memory ]
guest vm verify disk=vdb offset=0 len=1048576 generation=3
virsh destroy vm
nothing_left

# Two domains on one base and one I/O thread; the base goes while both run, which QEMU alone cannot do.
qemu-img create -q -f raw $images/base.raw 32M
printf 'base' | dd of=$images/base.raw bs=1M seek=5 conv=notrunc status=none
for vm in left right; do
    qemu-img create -q -f qcow2 -b $images/base.raw -F raw $images/$vm.qcow2
    define $vm "$(file qcow2 $images/$vm.qcow2 vda)"
    vdiskctl domain adopt $vm --set iothread=shared
    virsh start $vm
    guest $vm wait-disk disk=vda
    guest $vm load-start disk=vda offset=8388608 len=8388608 threads=2
done
[ "$(vdiskctl iothread show shared --json | grep -c export)" -ge 2 ]
for vm in left right; do vdiskctl domain blockpull $vm vda; done
if vdiskctl node list | grep base.raw; then false; fi
rm $images/base.raw
for vm in left right; do
    guest $vm load-stop | grep -q '"verified": [1-9]'
    virsh destroy $vm
    qemu-img check -q $images/$vm.qcow2
    [ "$(qemu-io -r -f qcow2 -c 'read -v 5M 4' $images/$vm.qcow2 | grep -c 'base')" = 1 ]
done
nothing_left
echo "all is well"
