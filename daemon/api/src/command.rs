//! The commands of the control plane: each is carried out wholly or not at all.

use std::time::Duration;

use crate::bitmap::BitmapAction;
use crate::export::ExportOptions;
use crate::fields::Map;
use crate::image::RepairWhat;
use crate::iothread::{IoThreadOptions, IoThreadUpdate};
use crate::job::{JobAction, JobOptions};
use crate::node::{NodeChange, NodeOptions};
use crate::transaction::Transaction;

#[derive(Debug)]
pub enum Command {
    AddNode(NodeOptions),
    RemoveNode {
        name: String,
    },
    /// `size` is in bytes; making a node smaller needs `shrink`.
    ResizeNode {
        name: String,
        size: u64,
        shrink: bool,
    },
    FlushNode {
        name: String,
    },
    /// Has it told once when a write reaches beyond an offset in bytes; 0 for never.
    SetWriteThreshold {
        node: String,
        threshold: u64,
    },
    /// Has whatever uses a node use another from now on, which has the same data.
    ReplaceNode {
        node: String,
        with: String,
    },
    /// Changes options of a node.
    ReopenNode {
        node: String,
        change: NodeChange,
    },
    /// Opens the images of a node and of those below it, or lets go of those that nobody else uses.
    SetActive {
        node: String,
        active: bool,
    },
    /// Checks the image of a node, which may be in use meanwhile.
    CheckNode {
        name: String,
        repair: RepairWhat,
    },
    /// Puts a new overlay in the place of a node that guests use: it becomes the overlay's backing file.
    AddOverlay {
        node: String,
        overlay: NodeOptions,
    },
    /// Puts a new filter over a node that may be in use.
    InsertFilter {
        node: String,
        filter: NodeOptions,
    },
    /// Takes a filter out from above its child, and closes it.
    TakeOut {
        name: String,
    },
    /// Does something with a snapshot inside the image of a node.
    Snapshot {
        node: String,
        action: SnapshotAction,
        snapshot: String,
    },
    Bitmap {
        node: String,
        action: BitmapAction,
    },
    Transaction(Transaction),
    StartJob(JobOptions),
    Job {
        id: String,
        action: JobAction,
    },
    AddExport(ExportOptions),
    RemoveExport {
        id: String,
    },
    /// Gives up an export or a node that could not be restored.
    ForgetLost {
        is_export: bool,
        name: String,
    },
    /// Whether an export outlives the machine, with all that it stands on.
    SetPersistent {
        export: String,
        on: bool,
    },
    AddIoThread(IoThreadOptions),
    UpdateIoThread {
        name: String,
        update: IoThreadUpdate,
    },
    RemoveIoThread {
        name: String,
    },
}

/// What a command that succeeded made or changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    Done,
    /// A node was added, with the children that were given in place: all their names, itself first.
    Nodes(Vec<String>),
    /// Nodes changed their places: the names of those that are new, as in `Nodes` (of a transaction: the ids of its jobs), and
    /// how long guests had to wait.
    Moved {
        names: Vec<String>,
        paused: Duration,
    },
    /// What was found out.
    Found(Map),
}

/// What is done with a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SnapshotAction {
    Create,
    Apply,
    Delete,
}
