//! Where `make setup` puts what guests need.

use std::path::PathBuf;

/// The folder itself.
pub fn lab() -> PathBuf {
    if let Some(lab) = std::env::var_os("VDISK_LAB") {
        return lab.into();
    }
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let home = || PathBuf::from(std::env::var_os("HOME").unwrap_or_default()).join(".cache");
    cache.unwrap_or_else(home).join("vdisk")
}

/// Something in it; panics with the remedy if it is missing.
pub fn lab_path(name: &str) -> PathBuf {
    let path = lab().join(name);
    assert!(
        path.exists(),
        "{} is missing: run 'make setup'",
        path.display()
    );
    path
}
