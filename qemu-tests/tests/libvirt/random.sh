#!/bin/bash
# Operations in any order, on two domains: whatever becomes of each, at the end nothing is left, and the disks have what was written.
. /usr/bin/vdisk-script-lib
seed=${SEED:-$(date +%s)}
rounds=${ROUNDS:-50}
echo "SEED=$seed"
RANDOM=$seed
for vm in one two; do
    qemu-img create -q -f qcow2 $images/$vm.qcow2 32M
    qemu-img create -q -f qcow2 $images/$vm-more.qcow2 16M
    define $vm "$(file qcow2 $images/$vm.qcow2 vda)"
    vdiskctl domain adopt $vm
done
state() { virsh -q domstate "$1"; }
run() { "$@" >>/tmp/ops 2>&1; }
written_one=0 written_two=0
for round in $(seq "$rounds"); do
    vm=$([ $((RANDOM % 2)) = 0 ] && echo one || echo two)
    op=$((RANDOM % 16))
    # Most of it needs one that runs.
    [ "$(state $vm)" = running ] || [ $((RANDOM % 3)) = 0 ] || op=0
    echo "== $round: $op on $vm, $(state $vm)" | tee -a /tmp/ops
    # Many are refused in the state that the domain is in: then nothing has happened.
    case $op in
    0 | 1 | 2) run virsh start $vm || true ;;
    3) run virsh destroy $vm || true ;;
    4) run virsh managedsave $vm || true ;;
    5) if [ "$(state $vm)" = running ]; then kill -KILL "$(cat /run/libvirt/qemu/$vm.pid)" && until_gone $vm; fi ;;
    6) run systemctl restart libvirtd ;;
    7) run systemctl restart vdiskd ;;
    8) systemctl kill --kill-whom=main -s KILL vdiskd || true ;;
    9) run vdiskctl domain attach $vm $images/$vm-more.qcow2 vdb || true ;;
    10) run vdiskctl domain detach $vm vdb --timeout 3 || true ;;
    11) run vdiskctl domain snapshot create $vm s$round || true ;;
    12) run vdiskctl domain blockcommit $vm vda || true ;;
    13) run vdiskctl domain blockpull $vm vda || true ;;
    14) run virsh reboot $vm || true ;;
    15)
        if [ "$(state $vm)" = running ]; then
            guest $vm write disk=vda offset=1048576 len=262144 generation=$round
            guest $vm flush disk=vda
            eval written_$vm=$round
        fi
        ;;
    esac
done
for vm in one two; do
    run virsh destroy $vm || true
    run virsh managedsave-remove $vm || true
done
nothing_left
for vm in one two; do
    virsh start $vm
    written=written_$vm
    [ "${!written}" = 0 ] || guest $vm verify disk=vda offset=1048576 len=262144 generation="${!written}"
    virsh destroy $vm
    vdiskctl domain info $vm
    for image in $(vdiskctl domain info $vm --json | python3 -c 'import json,sys; [print(d["chain"][0]["file"]) for d in json.load(sys.stdin)["disks"]]'); do
        qemu-img check -q "$image"
    done
done
nothing_left
echo "all is well"
