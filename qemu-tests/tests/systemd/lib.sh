# For the scripts beside it: eight clients of the installed service that must not notice what happens to it.
set -Eeu
failed() {
    set +ex
    echo "failed at line $1"
    ls -la /run/vdiskd
    vdiskctl export list
    journalctl -u vdiskd --no-pager | tail -60
    exit 1
}
trap 'failed $LINENO' ERR
rounds=${ROUNDS:-8} busy=${BUSY:-8}

main_pid() { systemctl show -P MainPID vdiskd; }
# Waits until another process serves than the one before.
until_not() { until now=$(main_pid) && [ "$now" != 0 ] && [ "$now" != "$1" ]; do sleep 0.02; done; }

# Eight disks, each with an export.
serve_eight() {
    mkdir -p /srv/images
    chown vdiskd /srv/images
    sockets=
    for i in 1 2 3 4 5 6 7 8; do
        vdiskctl image create "/srv/images/$i.qcow2" 64M
        vdiskctl node add "disk$i" driver=qcow2 file.driver=file "file.filename=/srv/images/$i.qcow2" discard=unmap
        vdiskctl export add "vm$i" --node "disk$i" --socket "/run/vdiskd/vm$i.sock" --writable
        sockets="$sockets /run/vdiskd/vm$i.sock"
    done
}

wait_for_front_ends() {
    for _ in $(seq 200); do
        [ "$(vdiskctl export list --json | grep -c '"Clients": 1')" = 8 ] && return
        sleep 0.02
    done
    false
}

# Clients on all eight exports, until 'ended' NAME.
begin() {
    # shellcheck disable=SC2086
    vdisk-steady --busy "$busy" --until "/tmp/enough-$1" --ready "/tmp/ready-$1" $sockets >"/tmp/$1" 2>&1 &
    client=$!
    until [ -e "/tmp/ready-$1" ]; do sleep 0.05; kill -0 $client; done
}
ended() {
    touch "/tmp/enough-$1"
    wait "$client" || { cat "/tmp/$1"; false; }
    echo "$1, $busy of 8 clients busy: $(cat "/tmp/$1")"
}

# Has this happen under clients again and again: none, kill, restart, reload. What they wait for when nothing happens is the machine.
happens() {
    begin "$1"
    for _ in $(seq "$rounds"); do
        before=$(main_pid)
        case $1 in
        none) sleep 0.3 ;;
        kill)
            systemctl kill --kill-whom=main -s KILL vdiskd
            until_not "$before"
            ;;
        restart) systemctl restart vdiskd ;;
        reload)
            systemctl reload vdiskd
            [ "$(main_pid)" = "$before" ]
            ;;
        esac
        wait_for_front_ends
        vdiskctl info --json | tr -d '\n ' | grep -q '"Problems":\[\]'
    done
    ended "$1"
}

# Calls without a break while the service is reloaded or restarted are answered, by the old process or by the new one.
answers_during() {
    rm -f /tmp/enough-calls
    (
        while [ ! -e /tmp/enough-calls ]; do
            vdiskctl throttle set called iops-total=100 && vdiskctl throttle remove called || exit
            echo called
        done
        echo "all were answered"
    ) >/tmp/calls 2>&1 &
    caller=$!
    until grep -q called /tmp/calls; do sleep 0.02; done
    for _ in $(seq "$rounds"); do systemctl "$1" vdiskd; done
    touch /tmp/enough-calls
    wait $caller || { tail -3 /tmp/calls; false; }
    grep -qx "all were answered" /tmp/calls
}

# Nothing is left, nothing is broken.
take_down() {
    for i in 1 2 3 4 5 6 7 8; do
        vdiskctl export remove "vm$i"
        vdiskctl node remove "disk$i"
        vdiskctl image check "/srv/images/$i.qcow2" >/dev/null
    done
    for _ in $(seq 100); do [ "$(systemctl show -P NFileDescriptorStore vdiskd)" = 0 ] && break; sleep 0.02; done
    [ "$(systemctl show -P NFileDescriptorStore vdiskd)" = 0 ]
}
