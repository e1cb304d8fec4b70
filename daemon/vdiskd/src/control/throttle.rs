//! Throttle groups.

use vdisk_api::{Error, Result, ThrottleLimits};
use vdisk_block::ThrottleGroups;

use super::Handle;

/// All groups.
pub fn all(control: &Handle) -> ThrottleGroups {
    control.world().defaults.runtime.throttle_groups.clone()
}

/// Makes a group, or changes its limits; the requests of its members feel it at once.
pub async fn set(control: &Handle, name: &str, limits: ThrottleLimits) -> Result<()> {
    let runtime = tokio::runtime::Handle::try_current()
        .map_err(|e| Error::failed(format!("throttle group '{name}': {e}")))?;
    let is_new = all(control).set(name, limits, &runtime);
    tracing::info!(group = name, is_new, "throttle group set");
    control.save().await;
    Ok(())
}

pub async fn remove(control: &Handle, name: &str) -> Result<()> {
    all(control).remove(name)?;
    tracing::info!(group = name, "throttle group removed");
    control.save().await;
    Ok(())
}
