//! The file descriptors that systemd keeps for the service while it restarts (sd_notify(3), FDSTORE), and that the daemon hands
//! to itself when it becomes another program.

use std::convert::Infallible;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard};

use command_fds::{CommandFdExt, FdMapping};
use sd_notify::NotifyState;
use vdisk_exports::Keeper;

use crate::{handover, sandbox};

/// What the names of kept descriptors begin with, before a dot.
const KINDS: [&str; 6] = ["listener", "connection", "secret", "keys", "fd", "handover"];

/// The first descriptor that is passed (SD_LISTEN_FDS_START).
const FIRST: i32 = 3;

/// Descriptors by name.
pub type Named = Vec<(String, OwnedFd)>;

/// systemd's FD store, with copies of what is in it, and of the sockets that it passes to each process.
pub struct FdStore {
    kept: Mutex<Named>,
    sockets: Mutex<Named>,
    /// The next process has been given what is kept.
    frozen: AtomicBool,
}

impl FdStore {
    /// Whether somebody is there who could keep something.
    pub fn is_there() -> bool {
        std::env::var_os("NOTIFY_SOCKET").is_some()
    }

    /// None if nobody is there who could keep something. `kept` is in the store already.
    pub fn find(passed: &Passed) -> io::Result<Option<FdStore>> {
        if !FdStore::is_there() {
            return Ok(None);
        }
        let copy = |(name, fd): &(String, OwnedFd)| Ok((name.clone(), fd.try_clone()?));
        let copies = |all: &Named| all.iter().map(copy).collect::<io::Result<Named>>();
        Ok(Some(FdStore {
            kept: Mutex::new(copies(&passed.kept)?),
            sockets: Mutex::new(copies(&passed.sockets)?),
            frozen: AtomicBool::new(false),
        }))
    }

    fn copies(&self) -> MutexGuard<'_, Vec<(String, OwnedFd)>> {
        self.kept.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Gives this to the next process as well, and has what is kept stay as it is from now on.
    pub fn freeze_with(&self, name: &str, fd: BorrowedFd<'_>) -> io::Result<()> {
        store(name, fd)?;
        self.frozen.store(true, Ordering::Relaxed);
        Ok(())
    }

    pub fn thaw(&self) {
        self.frozen.store(false, Ordering::Relaxed);
    }

    /// Becomes the program that is installed now, with everything that is kept.
    pub fn exec(&self) -> io::Result<Infallible> {
        let program = std::env::args_os().next().unwrap_or_default();
        let mut command = Command::new(program);
        command.args(std::env::args_os().skip(1));
        let mut copies = std::mem::take(&mut *self.copies());
        copies.append(&mut self.sockets.lock().unwrap_or_else(|e| e.into_inner()));
        let names: Vec<&str> = copies.iter().map(|(name, _)| name.as_str()).collect();
        command
            .envs(sandbox::entered())
            .env("LISTEN_PID", std::process::id().to_string())
            .env("LISTEN_FDS", copies.len().to_string())
            .env("LISTEN_FDNAMES", names.join(":"));
        let mappings = (FIRST..)
            .zip(copies)
            .map(|(child_fd, (_, parent_fd))| FdMapping {
                parent_fd,
                child_fd,
            });
        command
            .fd_mappings(mappings.collect())
            .map_err(io::Error::other)?;
        Err(command.exec())
    }
}

fn store(name: &str, fd: BorrowedFd<'_>) -> io::Result<()> {
    let state = [
        NotifyState::FdStore,
        NotifyState::FdName(name),
        // What looks closed still has a message in it.
        NotifyState::Custom("FDPOLL=0"),
    ];
    sd_notify::notify_with_fds(&state, &[fd])
}

impl Keeper for FdStore {
    fn keep(&self, name: &str, fd: BorrowedFd<'_>) -> io::Result<()> {
        if self.frozen.load(Ordering::Relaxed) {
            return Ok(());
        }
        store(name, fd)?;
        let copy = fd.try_clone_to_owned()?;
        self.copies().push((name.to_owned(), copy));
        Ok(())
    }

    fn forget(&self, name: &str) {
        if self.frozen.load(Ordering::Relaxed) {
            return;
        }
        let state = [NotifyState::FdStoreRemove, NotifyState::FdName(name)];
        if let Err(error) = sd_notify::notify(&state) {
            tracing::warn!(name, %error, "a descriptor cannot be given up");
        }
        self.copies().retain(|(n, _)| n != name);
    }
}

/// What was passed to this process.
#[derive(Default)]
pub struct Passed {
    /// What an earlier process has had kept.
    pub kept: Named,
    /// The ways to processes that serve on until this one asks (see [`handover`]).
    pub before: Vec<OwnedFd>,
    /// Listening sockets of socket units (systemd.socket(5)).
    pub sockets: Named,
}

/// What was passed to this process, by name.
pub fn passed() -> Passed {
    let all = match sd_listen_fds::get() {
        Ok(all) => all,
        Err(error) => {
            tracing::error!(%error, "the passed file descriptors cannot be used");
            return Passed::default();
        }
    };
    let named = all.into_iter().map(|(name, fd)| {
        let fd = fd.into_std();
        // Programs that are started must not have them.
        let _ = rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::CLOEXEC);
        (name.unwrap_or_default(), fd)
    });
    let (mut kept, sockets): (Named, Named) = named.partition(|(name, _)| {
        let kind = name.split_once('.').map(|(kind, _)| kind);
        kind.is_some_and(|kind| KINDS.contains(&kind))
    });
    let before = kept.extract_if(.., |(name, _)| name == handover::NAME);
    let before = before.map(|(_, fd)| fd).collect();
    Passed {
        kept,
        before,
        sockets,
    }
}
