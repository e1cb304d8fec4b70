//! The file descriptors that systemd keeps for the service while it restarts (sd_notify(3), FDSTORE).

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};

use sd_notify::NotifyState;
use vdisk_exports::Keeper;

/// systemd's FD store.
pub struct FdStore;

impl FdStore {
    /// None if nobody is there who could keep something.
    pub fn find() -> Option<FdStore> {
        std::env::var_os("NOTIFY_SOCKET").map(|_| FdStore)
    }
}

impl Keeper for FdStore {
    fn keep(&self, name: &str, fd: BorrowedFd<'_>) -> io::Result<()> {
        let state = [
            NotifyState::FdStore,
            NotifyState::FdName(name),
            // What looks closed still has a message in it.
            NotifyState::Custom("FDPOLL=0"),
        ];
        sd_notify::notify_with_fds(&state, &[fd])
    }

    fn forget(&self, name: &str) {
        let state = [NotifyState::FdStoreRemove, NotifyState::FdName(name)];
        if let Err(error) = sd_notify::notify(&state) {
            tracing::warn!(name, %error, "a descriptor cannot be given up");
        }
    }
}

/// What was passed to this process, by name.
pub fn passed() -> Vec<(String, OwnedFd)> {
    let all = match sd_listen_fds::get() {
        Ok(all) => all,
        Err(error) => {
            tracing::error!(%error, "the passed file descriptors cannot be used");
            return Vec::new();
        }
    };
    let named = all.into_iter().map(|(name, fd)| {
        let fd = fd.into_std();
        // Programs that are started must not have them.
        let _ = rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::CLOEXEC);
        (name.unwrap_or_default(), fd)
    });
    named.collect()
}
