//! What outlives the process: file descriptors in somebody else's care.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};

/// Keeps file descriptors for the next process, under names of printable ASCII without ':'. (systemd's FD store, sd_notify(3).)
pub trait Keeper: Send + Sync {
    /// Keeps a descriptor, beside those that have the name already.
    fn keep(&self, name: &str, fd: BorrowedFd<'_>) -> io::Result<()>;

    /// Gives up all that have this name.
    fn forget(&self, name: &str);
}

/// What an earlier process has left of an export.
#[derive(Debug, Default)]
pub struct Left {
    /// The socket that front-ends connect to.
    pub listener: Option<OwnedFd>,
    /// A front-end's connection, with everything that belongs to it, and its generation.
    pub connection: Option<(u64, OwnedFd)>,
    /// All names, of what is of no use any more as well.
    names: Vec<String>,
}

/// The name of an export's listening socket.
pub fn listener_name(export: &str) -> String {
    format!("listener.{export}")
}

/// The name of the front-end's connection to an export. A new generation is there before the one before it goes.
pub fn connection_name(export: &str, generation: u64) -> String {
    format!("connection.{generation}.{export}")
}

impl Left {
    /// Takes over what is of this export, by its name. Returns what is not.
    pub fn take(&mut self, export: &str, name: &str, fd: OwnedFd) -> Option<OwnedFd> {
        if name == listener_name(export) {
            self.names.push(name.to_owned());
            self.listener = Some(fd);
            return None;
        }
        let generation = name
            .strip_prefix("connection.")
            .and_then(|rest| rest.split_once('.'))
            .filter(|(_, of)| *of == export)
            .and_then(|(generation, _)| generation.parse::<u64>().ok());
        let Some(generation) = generation else {
            return Some(fd);
        };
        self.names.push(name.to_owned());
        if self
            .connection
            .as_ref()
            .is_none_or(|(g, _)| *g < generation)
        {
            self.connection = Some((generation, fd));
        }
        None
    }

    /// All names under which something of the export is kept.
    pub fn names(&self) -> Vec<String> {
        self.names.clone()
    }

    /// Has the keeper give up what a later generation has replaced.
    pub(crate) fn forget_superseded(&self, export: &str, keeper: &dyn Keeper) {
        let newest = self
            .connection
            .as_ref()
            .map(|(g, _)| connection_name(export, *g));
        let old = self
            .names
            .iter()
            .filter(|name| **name != listener_name(export) && newest.as_ref() != Some(name));
        old.for_each(|name| keeper.forget(name));
    }
}
