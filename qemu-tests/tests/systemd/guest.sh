#!/bin/bash
# A guest, whose QEMU runs without root, does not notice what happens to the service, and neither does a job that runs meanwhile.
set -Eeu
trap 'set +ex; echo "failed at line $LINENO"; cat /tmp/guest; vdiskctl status; journalctl -u vdiskd --no-pager | tail -60; exit 1' ERR
rounds=${ROUNDS:-6}
mkdir -p /srv/images
chown vdiskd /srv/images
vdiskctl image create /srv/images/a.qcow2 64M
vdiskctl image create /srv/images/b.raw 64M --format raw
vdiskctl node add a driver=qcow2 file.driver=file file.filename=/srv/images/a.qcow2 discard=unmap
vdiskctl node add b driver=file filename=/srv/images/b.raw cache.direct=on
for disk in a b; do vdiskctl export add $disk --node $disk --socket /run/vdiskd/$disk.sock --writable --queues 2; done
setpriv --reuid=nobody --regid=kvm --clear-groups vdisk-steady --guest --until /tmp/enough --ready /var/tmp/ready \
    /run/vdiskd/a.sock /run/vdiskd/b.sock >/tmp/guest 2>&1 &
guest=$!
until [ -e /var/tmp/ready ]; do sleep 0.1; kill -0 $guest; done
top=a
restarts=0
jobs=0
for round in $(seq "$rounds"); do
    if [ -e /usr/libexec/vdiskd.other ]; then
        mv /usr/libexec/vdiskd /usr/libexec/vdiskd.next
        mv /usr/libexec/vdiskd.other /usr/libexec/vdiskd
        mv /usr/libexec/vdiskd.next /usr/libexec/vdiskd.other
    fi
    before=$(systemctl show -P MainPID vdiskd)
    case $((round % 3)) in
    1)
        systemctl kill --kill-whom=main -s KILL vdiskd
        until now=$(systemctl show -P MainPID vdiskd) && [ "$now" != 0 ] && [ "$now" != "$before" ]; do sleep 0.02; done
        ;;
    0) systemctl restart vdiskd ;;
    2) systemctl reload vdiskd ;;
    esac
    until vdiskctl export show a --json | grep -q '"Clients": 1'; do sleep 0.02; kill -0 $guest; done
    vdiskctl info --json | tr -d '\n ' | grep -q '"Problems":\[\]'
    restarts=$((restarts + 1))
    case $((round % 4)) in
    1)
        vdiskctl snapshot overlay "$top" "over$round" "/srv/images/over$round.qcow2"
        top=over$round
        ;;
    3)
        # It runs when the next thing happens.
        vdiskctl commit "$top" --detach --speed 1M job-id=commit
        ;;
    0)
        vdiskctl job show commit --json | grep -q '"State": "running"'
        vdiskctl job speed commit 0
        vdiskctl job watch commit
        vdiskctl job complete commit
        until ! vdiskctl job show commit >/dev/null 2>&1; do sleep 0.02; done
        if vdiskctl node show "$top" >/dev/null 2>&1; then false; fi
        rm "/srv/images/$top.qcow2"
        top=a
        jobs=$((jobs + 1))
        ;;
    esac
    # The guest turns between any two of them.
    sleep 0.3
done
touch /tmp/enough
wait $guest || { cat /tmp/guest; false; }
if vdiskctl job show commit >/dev/null 2>&1; then vdiskctl job cancel commit; fi
[ $top = a ] || vdiskctl commit $top
echo "$restarts, with $jobs commits over them: $(cat /tmp/guest)"
for disk in a b; do
    vdiskctl export remove $disk
    vdiskctl node remove $disk
done
qemu-img check /srv/images/a.qcow2
echo "all is well"
