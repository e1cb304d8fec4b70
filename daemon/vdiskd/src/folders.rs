//! The daemon's own folders.

use std::fs::{File, TryLockError};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::Args;

/// How long a daemon that has been told to end may take to leave the runtime folder.
const PATIENCE: Duration = Duration::from_secs(5);

/// What the folders of a daemon are called.
fn folder_name(instance: Option<&str>) -> String {
    match instance {
        None => "vdiskd".into(),
        Some(name) => format!("vdiskd-{name}"),
    }
}

/// Where what outlives the machine is.
pub fn state_dir(args: &Args) -> PathBuf {
    if let Some(given) = &args.state_dir {
        return given.clone();
    }
    if let Some(dir) = std::env::var_os("STATE_DIRECTORY") {
        return dir.into();
    }
    let home = || Some(PathBuf::from(std::env::var_os("HOME")?).join(".local/state"));
    let base = match std::env::var_os("XDG_STATE_HOME").map(PathBuf::from) {
        Some(base) => base,
        None if args.session => home().unwrap_or_else(|| "/var/lib".into()),
        None => "/var/lib".into(),
    };
    base.join(folder_name(args.instance.as_deref()))
}

/// Finds and makes the runtime folder. None if the user did not name one and none of the usual places will do.
pub fn runtime_dir(args: &Args) -> Result<Option<PathBuf>, String> {
    let given = args.runtime_dir.clone();
    let from_environment = || {
        if let Some(dir) = std::env::var_os("RUNTIME_DIRECTORY") {
            return PathBuf::from(dir);
        }
        let base = std::env::var_os("XDG_RUNTIME_DIR").unwrap_or_else(|| "/run".into());
        PathBuf::from(base).join(folder_name(args.instance.as_deref()))
    };
    let is_given = given.is_some();
    let dir = given.unwrap_or_else(from_environment);
    let made = std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&dir);
    match made {
        Ok(()) => Ok(Some(dir)),
        Err(e) if is_given => Err(format!("runtime folder '{}': {e}", dir.display())),
        Err(error) => {
            tracing::warn!(dir = %dir.display(), %error, "the runtime folder cannot be made");
            Ok(None)
        }
    }
}

/// Makes the runtime folder this daemon's alone, for as long as the file is open.
pub fn lock(dir: &Path) -> Result<File, String> {
    let path = dir.join("lock");
    let what = format!("runtime folder '{}'", dir.display());
    let file = File::options()
        .write(true)
        .create(true)
        .truncate(false)
        .open(&path)
        .map_err(|e| format!("{what}: {e}"))?;
    let start = Instant::now();
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::Error(e)) => return Err(format!("{what}: {e}")),
            Err(TryLockError::WouldBlock) if start.elapsed() > PATIENCE => {
                return Err(format!(
                    "{what} is in use by another vdiskd: stop that one, or give another --runtime-dir"
                ));
            }
            Err(TryLockError::WouldBlock) => std::thread::sleep(Duration::from_millis(5)),
        }
    }
}
