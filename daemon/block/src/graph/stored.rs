//! What the graph is made of, for the next daemon.

use serde::{Deserialize, Serialize};
use vdisk_api::{Map, Value};

use super::{Graph, Parent, ROLES, User};
use crate::drivers::Inactive;

/// A bitmap that is in no image.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct StoredBitmap {
    pub name: String,
    pub granularity: u64,
    pub recording: bool,
}

/// What a node is made of, for the next daemon.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct StoredNode {
    pub name: String,
    pub implicit: bool,
    /// Children are named.
    pub options: Map,
    /// See [`vdisk_api::FileOptions`].
    pub whole_blocks: bool,
    pub bitmaps: Vec<StoredBitmap>,
    /// 0 for none.
    #[serde(default)]
    pub write_threshold: u64,
    /// It is not open, and so much is known of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub inactive: Option<Inactive>,
}

impl Graph {
    /// What all nodes are made of at the moment, children first.
    pub fn stored(&self) -> Vec<StoredNode> {
        let mut top_down = self.top_down();
        let mut read_only: Vec<String> = Vec::new();
        let mut gone: Vec<String> = Vec::new();
        for node in &top_down {
            let name = node.name();
            let Some(entry) = self.nodes.get(name) else {
                continue;
            };
            let parents: Vec<(&str, &str)> = self
                .nodes
                .iter()
                .filter(|(parent, _)| !gone.contains(parent))
                .flat_map(|(parent, e)| e.children.iter().map(move |c| (parent.as_str(), c)))
                .filter(|(_, (_, child))| child == name)
                .map(|(parent, (role, _))| (parent, *role))
                .collect();
            let is_job = |u: &User| matches!(u.parent, Parent::Job(_));
            let unused = entry.users.iter().all(is_job);
            if entry.leaving || entry.implicit && parents.is_empty() && unused {
                gone.push(name.to_owned());
                continue;
            }
            // A job that writes to a backing file has it opened for that again. What was written before an overlay came is
            // only read, the file as well.
            let only_read = unused
                && !parents.is_empty()
                && parents.iter().all(|(parent, role)| match *role {
                    "backing" => true,
                    "target" => false,
                    _ => read_only.iter().any(|r| r == parent),
                });
            if node.is_read_only() || only_read {
                read_only.push(name.to_owned());
            }
        }
        top_down.retain(|n| !gone.iter().any(|g| g == n.name()));
        let stored = top_down.iter().rev().filter_map(|node| {
            let name = node.name();
            let entry = self.nodes.get(name)?;
            if let Some(noted) = &entry.noted {
                return Some(noted.clone());
            }
            let mut options = entry.options.clone();
            let backing = options.remove("backing");
            for role in ROLES {
                options.remove(role);
            }
            // Nothing at all, on purpose.
            if backing.is_some_and(|b| b.is_null() || b.as_str() == Some("")) {
                options.insert("backing".into(), Value::Null);
            }
            // It may have been resized.
            if node.driver_name() == "null-co" || options.contains_key("size") {
                options.insert("size".into(), node.size().into());
            }
            for (role, child) in &entry.children {
                options.insert((*role).to_owned(), child.clone().into());
            }
            let read_only = read_only.iter().any(|r| r == name);
            options.insert("read-only".into(), read_only.into());
            let is_image_file = self.parent_nodes(name).any(|p| self.is_image(p));
            let bitmaps = node.bitmaps().into_iter().filter(|b| !b.is_persistent());
            Some(StoredNode {
                name: name.to_owned(),
                implicit: entry.implicit,
                options,
                whole_blocks: entry.implicit && is_image_file,
                inactive: (!node.is_active()).then(|| Inactive::of(node)),
                write_threshold: node.write_threshold(),
                bitmaps: bitmaps
                    .map(|b| StoredBitmap {
                        name: b.name().to_owned(),
                        granularity: b.granularity(),
                        recording: b.is_recording(),
                    })
                    .collect(),
            })
        });
        stored.collect()
    }
}
