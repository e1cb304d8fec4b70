//! What nodes may use of the machine beside their images.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use crate::descriptors::Descriptors;
use crate::directories::Directories;
use vdisk_api::{Error, Result, Secret};

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

/// The secrets that nodes may name. Clones are the same.
#[derive(Clone, Debug, Default)]
pub struct Secrets(Arc<Mutex<BTreeMap<String, Arc<Secret>>>>);

impl Secrets {
    fn all(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Secret>>> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }

    pub fn add(&self, id: &str, secret: Secret) -> Result<()> {
        let mut all = self.all();
        if all.contains_key(id) {
            return Err(Error::exists(format!(
                "there is a secret '{id}' already: choose another id, or remove it first"
            )));
        }
        all.insert(id.to_owned(), Arc::new(secret));
        Ok(())
    }

    pub fn remove(&self, id: &str) -> Result<()> {
        self.get(id)?;
        self.all().remove(id);
        Ok(())
    }

    pub fn get(&self, id: &str) -> Result<Arc<Secret>> {
        self.all().get(id).cloned().ok_or_else(|| {
            Error::not_found(format!(
                "there is no secret '{id}': add it with 'vdiskctl secret add', or see the list of secrets"
            ))
        })
    }

    pub fn ids(&self) -> Vec<String> {
        self.all().keys().cloned().collect()
    }
}
