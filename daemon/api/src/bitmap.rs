//! Dirty bitmaps (QAPI `BlockDirtyBitmapAdd` and its like).

use crate::error::Result;
use crate::fields::{Fields, Map};
use crate::node::check_name;

/// A bitmap to be added to a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BitmapOptions {
    pub name: String,
    /// Bytes that one bit stands for.
    pub granularity: u64,
    /// It does not record writes until it is enabled.
    pub disabled: bool,
    /// The image keeps it.
    pub persistent: bool,
}

const MIN_GRANULARITY: u64 = 512;
const MAX_GRANULARITY: u64 = 1 << 31;
const DEFAULT_GRANULARITY: u64 = 65536;

impl BitmapOptions {
    pub fn from_map(node: &str, name: &str, map: Map) -> Result<BitmapOptions> {
        let what = format!("bitmap '{name}' of node '{node}'");
        check_name(&format!("node '{node}': bitmap"), name)?;
        let mut f = Fields::new(what, map);
        let granularity = f.size("granularity")?.unwrap_or(DEFAULT_GRANULARITY);
        if !granularity.is_power_of_two()
            || !(MIN_GRANULARITY..=MAX_GRANULARITY).contains(&granularity)
        {
            return Err(f.error(
                "granularity",
                format_args!("is {granularity}: give a power of two from 512 to 2G"),
            ));
        }
        let persistent = f.boolean("persistent")?.unwrap_or(false);
        let disabled = f.boolean("disabled")?.unwrap_or(false);
        f.finish()?;
        Ok(BitmapOptions {
            name: name.to_owned(),
            granularity,
            disabled,
            persistent,
        })
    }
}

/// What is done with a bitmap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BitmapAction {
    Add(BitmapOptions),
    Remove {
        name: String,
    },
    Clear {
        name: String,
    },
    /// To record writes, or not to.
    Enable {
        name: String,
        on: bool,
    },
    /// Sets what others of the same node have set.
    Merge {
        name: String,
        sources: Vec<String>,
    },
}

impl BitmapAction {
    /// The bitmap's name.
    pub fn name(&self) -> &str {
        match self {
            BitmapAction::Add(options) => &options.name,
            BitmapAction::Remove { name }
            | BitmapAction::Clear { name }
            | BitmapAction::Enable { name, .. }
            | BitmapAction::Merge { name, .. } => name,
        }
    }
}
