//! What nodes may use of the machine beside their images.

use std::path::PathBuf;
use std::time::Duration;

use tokio::runtime::Handle;

use crate::descriptors::Descriptors;
use crate::directories::Directories;
use crate::secrets::Secrets;
use crate::throttle::ThrottleGroups;

/// See the module.
#[derive(Clone, Debug, Default)]
pub struct Runtime {
    /// A folder that outlives the process, and not the machine.
    pub dir: Option<PathBuf>,
    pub secrets: Secrets,
    pub throttle_groups: ThrottleGroups,
    /// Where images may be.
    pub directories: Directories,
    /// Files that were passed open.
    pub descriptors: Descriptors,
    pub lock_patience: LockPatience,
    /// Where threads are for what takes long to compute; without it the thread that asks does it.
    pub workers: Option<Handle>,
}

/// How long to wait for a lock. The kernel gives the files of a killed process back a little after the process is gone, when the
/// last of its requests has ended; until then the lock keeps the next daemon from writing beside them.
#[derive(Clone, Copy, Debug)]
pub struct LockPatience(pub Duration);

impl Default for LockPatience {
    fn default() -> LockPatience {
        LockPatience(Duration::from_secs(1))
    }
}
