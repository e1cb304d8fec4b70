//! Image locks as QEMU takes them, so that neither opens what the other writes.
//!
//! For each permission (bit `i`) that a process takes it holds a shared OFD lock on byte 100 + i, and
//! for each that it does not share one on byte 200 + i. A conflict is somebody else's lock on the
//! opposite byte. (QEMU, block/file-posix.c: `RAW_LOCK_PERM_BASE`, `RAW_LOCK_SHARED_BASE`.)

use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use vdisk_api::{Error, Locking, Result};

use crate::permission::{Permissions, Use};
use crate::runtime::LockPatience;

const PERM_BASE: i64 = 100;
const SHARED_BASE: i64 = 200;
const BITS: i64 = 4;

const PAUSE: Duration = Duration::from_millis(5);

fn flock(kind: i32, byte: i64, len: i64) -> libc::flock {
    libc::flock {
        l_type: kind as i16,
        l_whence: libc::SEEK_SET as i16,
        l_start: byte,
        l_len: len,
        l_pid: 0,
    }
}

fn set(fd: BorrowedFd<'_>, kind: i32, byte: i64, len: i64) -> std::result::Result<(), Errno> {
    fcntl(fd, FcntlArg::F_OFD_SETLK(&flock(kind, byte, len))).map(|_| ())
}

/// Whether somebody else holds any lock on the byte.
fn is_locked(fd: BorrowedFd<'_>, byte: i64) -> std::result::Result<bool, Errno> {
    let mut lock = flock(libc::F_WRLCK, byte, 1);
    fcntl(fd, FcntlArg::F_OFD_GETLK(&mut lock))?;
    Ok(i32::from(lock.l_type) != libc::F_UNLCK)
}

/// Which permission stands in the way: (it, whether the other takes it).
fn take(fd: BorrowedFd<'_>, u: &Use) -> std::result::Result<Option<(Permissions, bool)>, Errno> {
    let unshared = Permissions::ALL.without(u.shared);
    let bits = || (0..BITS).map(|i| (i, 1u8 << i));
    for (i, bit) in bits() {
        if u.taken.bits() & bit != 0 {
            set(fd, libc::F_RDLCK, PERM_BASE + i, 1)?;
        }
        if unshared.bits() & bit != 0 {
            set(fd, libc::F_RDLCK, SHARED_BASE + i, 1)?;
        }
    }
    let named = |i: i64| {
        [
            Permissions::CONSISTENT_READ,
            Permissions::WRITE,
            Permissions::WRITE_UNCHANGED,
            Permissions::RESIZE,
        ][i as usize]
    };
    for (i, bit) in bits() {
        if unshared.bits() & bit != 0 && is_locked(fd, PERM_BASE + i)? {
            return Ok(Some((named(i), true)));
        }
        if u.taken.bits() & bit != 0 && is_locked(fd, SHARED_BASE + i)? {
            return Ok(Some((named(i), false)));
        }
    }
    Ok(None)
}

/// Locks an image that was just opened. The locks go with the open file.
pub(super) fn lock(
    fd: &impl AsFd,
    what: &str,
    u: &Use,
    locking: Locking,
    patience: LockPatience,
) -> Result<()> {
    if locking == Locking::Off {
        return Ok(());
    }
    let fd = fd.as_fd();
    let end = Instant::now() + patience.0;
    let taken = loop {
        match take(fd, u) {
            Ok(Some(_)) | Err(Errno::EAGAIN | Errno::EACCES) if Instant::now() < end => {
                unlock(&fd);
                std::thread::sleep(PAUSE);
            }
            other => break other,
        }
    };
    match taken {
        Ok(None) => Ok(()),
        Ok(Some((permission, true))) => Err(Error::in_use(format!(
            "{what} is locked: another process holds its '{permission}' permission; stop that process, or open read-only with force-share if an inconsistent view will do"
        ))),
        Ok(Some((permission, false))) => Err(Error::in_use(format!(
            "{what} is locked: another process does not share its '{permission}' permission; stop that process"
        ))),
        Err(Errno::EAGAIN | Errno::EACCES) => Err(Error::in_use(format!(
            "{what} is locked by another process; stop that process"
        ))),
        Err(e) if locking == Locking::Auto => {
            tracing::warn!(image = what, error = %e, "this file system has no locks; other processes can open the image");
            Ok(())
        }
        Err(e) => Err(Error::not_supported(format!(
            "{what} cannot be locked: {e}; use locking=auto or off"
        ))),
    }
}

/// Gives all locks back, whoever else still has the file open.
pub(super) fn unlock(fd: &impl AsFd) {
    let _ = set(fd.as_fd(), libc::F_UNLCK, PERM_BASE, 200);
}
