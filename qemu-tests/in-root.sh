#!/bin/sh
# Runs a program of a lab root, with the scratch folder and the lab itself visible at their own paths.
#
#   in-root.sh NAME PROGRAM [ARG ...]      NAME as in lab.sh (trixie, sid)
set -eu
lab=${VDISK_LAB:-${XDG_CACHE_HOME:-$HOME/.cache}/vdisk}
scratch=${VDISK_SCRATCH:-/var/tmp}
root=$lab/$1
shift
sudo=$([ "$(id -u)" = 0 ] || echo sudo)
$sudo mkdir -p "$root$scratch" "$root$lab"
exec $sudo unshare --mount --propagation unchanged sh -c '
    set -e
    # Nothing of this is to be seen outside. (Within a chroot / is no mount point, and whoever made the
    # chroot has seen to it.)
    mount --make-rprivate / 2>/dev/null || true
    root=$1 scratch=$2 lab=$3
    shift 3
    mount --bind "$scratch" "$root$scratch"
    mount --bind "$lab" "$root$lab"
    mount --rbind /dev "$root/dev"
    mount -t proc proc "$root/proc"
    exec chroot "$root" "$@"' sh "$root" "$scratch" "$lab" "$@"
