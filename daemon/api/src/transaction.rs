//! Several actions, of which all are done at one instant, or none.

use crate::bitmap::{BitmapAction, BitmapOptions};
use crate::error::{Error, Result};
use crate::fields::{Fields, Map};
use crate::job::JobOptions;
use crate::node::NodeOptions;

#[derive(Clone, Debug)]
pub enum Action {
    AddOverlay { node: String, overlay: NodeOptions },
    Backup(JobOptions),
    Bitmap { node: String, action: BitmapAction },
}

/// What its jobs have to do with each other (QAPI `ActionCompletionMode`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CompletionMode {
    /// Nothing.
    #[default]
    Individual,
    /// They take effect together, or none does.
    Grouped,
}

#[derive(Clone, Debug)]
pub struct Transaction {
    pub actions: Vec<Action>,
    pub completion: CompletionMode,
}

const COMPLETIONS: [(&str, CompletionMode); 2] = [
    ("individual", CompletionMode::Individual),
    ("grouped", CompletionMode::Grouped),
];

fn text(map: &mut Map, kind: &str, key: &str) -> Result<String> {
    match map.remove(key).map(|v| v.as_str().map(str::to_owned)) {
        Some(Some(s)) if !s.is_empty() => Ok(s),
        _ => Err(Error::invalid(format!(
            "action '{kind}': option '{key}' is missing, or is no name: give it"
        ))),
    }
}

fn action(kind: &str, mut map: Map) -> Result<Action> {
    let node = text(&mut map, kind, "node")?;
    let bitmap = match kind {
        "add-overlay" => {
            let overlay = NodeOptions::from_map(map)?;
            return Ok(Action::AddOverlay { node, overlay });
        }
        "backup" => return Ok(Action::Backup(JobOptions::from_map("backup", &node, map)?)),
        other => other.strip_prefix("bitmap-"),
    };
    let name = text(&mut map, kind, "name")?;
    let what = format!("action '{kind}' on bitmap '{name}' of node '{node}'");
    let action = match bitmap {
        Some("add") => BitmapAction::Add(BitmapOptions::from_map(
            &node,
            &name,
            std::mem::take(&mut map),
        )?),
        Some("remove") => BitmapAction::Remove { name },
        Some("clear") => BitmapAction::Clear { name },
        Some("enable") => BitmapAction::Enable { name, on: true },
        Some("disable") => BitmapAction::Enable { name, on: false },
        Some("merge") => {
            let sources = map.remove("sources");
            let sources = sources.as_ref().and_then(|s| s.as_array()).map(|all| {
                let names = all.iter().filter_map(|v| v.as_str().map(str::to_owned));
                names.collect::<Vec<_>>()
            });
            let sources = sources.ok_or_else(|| {
                Error::invalid(format!(
                    "{what}: option 'sources' is missing: give names of bitmaps"
                ))
            })?;
            BitmapAction::Merge { name, sources }
        }
        _ => {
            return Err(Error::not_supported(format!(
                "there is no action '{kind}': there are add-overlay, backup, bitmap-add, bitmap-remove, bitmap-clear, bitmap-enable, bitmap-disable and bitmap-merge"
            )));
        }
    };
    Fields::new(what, map).finish()?;
    Ok(Action::Bitmap { node, action })
}

impl Transaction {
    /// From kinds with their options, in order; `options` are those of the whole.
    pub fn from_maps(actions: Vec<(String, Map)>, options: Map) -> Result<Transaction> {
        let mut f = Fields::new("transaction", options);
        let completion = f
            .choice("completion-mode", &COMPLETIONS)?
            .unwrap_or_default();
        f.finish()?;
        if actions.is_empty() {
            return Err(Error::invalid(
                "transaction: there is no action in it: give one",
            ));
        }
        let actions = actions.into_iter().map(|(kind, map)| action(&kind, map));
        Ok(Transaction {
            actions: actions.collect::<Result<_>>()?,
            completion,
        })
    }
}
