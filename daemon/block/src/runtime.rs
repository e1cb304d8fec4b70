//! What nodes may use of the machine beside their images.

use std::path::PathBuf;

/// See the module.
#[derive(Clone, Debug, Default)]
pub struct Runtime {
    /// A folder that outlives the process, and not the machine.
    pub dir: Option<PathBuf>,
}
