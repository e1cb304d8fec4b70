//! Transactions: everything that can fail is done first, for all actions; then all are done at one instant, for which the
//! users of all their nodes wait together.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Instant;

use vdisk_api::{Action, BitmapAction, CompletionMode, Error, Reply, Result, Transaction};
use vdisk_block::{DrainGuard, Node};

use super::Control;
use super::bitmaps::{self, Earlier};
use super::jobs::PreparedJob;
use super::moves::PreparedOverlay;

#[derive(Default)]
struct Prepared {
    overlays: Vec<PreparedOverlay>,
    jobs: Vec<PreparedJob>,
    bitmaps: Vec<(Arc<Node>, BitmapAction)>,
    nodes: BTreeSet<String>,
}

impl Prepared {
    /// Refuses a job that takes bits out of a bitmap that another action is about: whatever their order is meant to be, one of them would
    /// find nothing, or lose what the job leaves in it.
    fn check_bitmap(&self, node: &str, bitmap: &str) -> Result<()> {
        self.check_bitmap_of_job(node, bitmap)?;
        let mut actions = self.bitmaps.iter();
        match actions.any(|(n, a)| n.name() == node && a.name() == bitmap) {
            true => Err(used_twice(node, bitmap)),
            false => Ok(()),
        }
    }

    fn of_node(&self, node: &Arc<Node>) -> impl DoubleEndedIterator<Item = &BitmapAction> {
        let all = self.bitmaps.iter();
        all.filter(move |(n, _)| Arc::ptr_eq(n, node))
            .map(|(_, action)| action)
    }

    /// What the actions so far do with a bitmap.
    fn earlier(&self, node: &Arc<Node>, name: &str) -> Option<Earlier> {
        self.of_node(node).rev().find_map(|action| match action {
            BitmapAction::Add(o) if o.name == name => Some(Earlier::Added),
            BitmapAction::Remove { name: n } if n == name => Some(Earlier::Removed),
            _ => None,
        })
    }

    /// Refuses two new writers of one node: each is alone when it is looked at by itself.
    fn check_borrowed(&self) -> Result<()> {
        let mut taken: Vec<(Arc<Node>, &str)> = Vec::new();
        for job in &self.jobs {
            let below = job.target().with_all_below();
            taken.extend(below.into_iter().map(|n| (n, job.target().name())));
        }
        for overlay in &self.overlays {
            let borrowed = overlay.borrowed();
            for node in &borrowed {
                if let Some((_, other)) = taken.iter().find(|(n, _)| Arc::ptr_eq(n, node)) {
                    return Err(Error::in_use(format!(
                        "transaction: overlay '{}' would be written to node '{}', and so would '{other}': give each storage of its own",
                        overlay.name,
                        node.name()
                    )));
                }
            }
            taken.extend(borrowed.into_iter().map(|n| (n, overlay.name.as_str())));
        }
        Ok(())
    }

    fn check_bitmap_of_job(&self, node: &str, bitmap: &str) -> Result<()> {
        let mut jobs = self.jobs.iter();
        match jobs.any(|j| j.node() == node && j.bitmap() == Some(bitmap)) {
            true => Err(used_twice(node, bitmap)),
            false => Ok(()),
        }
    }
}

fn used_twice(node: &str, bitmap: &str) -> Error {
    Error::in_use(format!(
        "transaction: a backup goes by bitmap '{bitmap}' of node '{node}', and another action is about it, too: leave one of them out"
    ))
}

impl Control {
    pub(super) async fn transaction(&mut self, transaction: Transaction) -> Result<Reply> {
        let mut prepared = Prepared::default();
        let made = self.prepare_all(transaction, &mut prepared).await;
        if let Err(e) = made {
            self.undo(prepared).await;
            return Err(e);
        }
        if let Err(e) = self.reserve_state() {
            self.undo(prepared).await;
            return Err(e);
        }
        let start = Instant::now();
        let mut drained: Vec<DrainGuard> = Vec::new();
        for node in &prepared.nodes {
            drained.extend(self.hold(node).await.1);
        }
        // Nothing fails from here on.
        for (node, action) in &prepared.bitmaps {
            if let Err(error) = bitmaps::apply(node, action) {
                tracing::error!(node = node.name(), %error, "bitmap");
            }
        }
        for job in &prepared.jobs {
            job.take_moment();
        }
        let mut moved = Vec::new();
        for overlay in prepared.overlays {
            let names = self.overlay_in_place(&overlay.node, overlay.opened, &drained);
            moved.push((overlay.node, overlay.name, names));
        }
        self.save();
        drop(drained);
        let paused = start.elapsed();
        let mut names = Vec::new();
        for (node, overlay, new) in moved {
            self.settle_below(&node, &overlay).await;
            tracing::info!(node = node.name(), overlay, "overlay added");
            self.moved(node.name(), &overlay, new, paused);
        }
        for (node, action) in prepared.bitmaps {
            tracing::info!(
                node = node.name(),
                bitmap = action.name(),
                ?action,
                "bitmap"
            );
            self.events.push(bitmaps::event(node.name(), &action));
        }
        for job in prepared.jobs {
            names.push(job.id().to_owned());
            self.launch(job);
        }
        let paused_us = paused.as_micros() as u64;
        tracing::info!(paused_us, "transaction done");
        Ok(Reply::Moved { names, paused })
    }

    async fn prepare_all(
        &mut self,
        transaction: Transaction,
        prepared: &mut Prepared,
    ) -> Result<()> {
        let backups = transaction.actions.iter();
        let backups = backups.filter(|a| matches!(a, Action::Backup(_))).count();
        let group = match transaction.completion {
            CompletionMode::Grouped => Some(super::jobs::Group::new(backups)),
            CompletionMode::Individual => None,
        };
        for action in transaction.actions {
            match action {
                Action::AddOverlay { node, overlay } => {
                    let again = prepared.nodes.contains(&node);
                    if again {
                        return Err(Error::invalid(format!(
                            "transaction: node '{node}' gets an overlay, and another action is about it, too: leave one of them out"
                        )));
                    }
                    let overlay = self.prepare_overlay(&node, overlay).await?;
                    let names: Vec<String> = overlay.names().collect();
                    let twice = {
                        let mut earlier = prepared.overlays.iter().flat_map(|o| o.names());
                        earlier.find(|n| names.contains(n))
                    };
                    prepared.overlays.push(overlay);
                    prepared.nodes.insert(node);
                    if let Some(name) = twice {
                        return Err(Error::exists(format!(
                            "transaction: two of its overlays have a node '{name}': choose another node-name"
                        )));
                    }
                }
                Action::Backup(options) => {
                    prepared.nodes.insert(options.node.clone());
                    if prepared.jobs.iter().any(|j| j.id() == options.id) {
                        return Err(Error::exists(format!(
                            "transaction: two of its jobs are called '{}': choose another job-id",
                            options.id
                        )));
                    }
                    if let Some(bitmap) = options.kind.bitmap() {
                        prepared.check_bitmap(&options.node, &bitmap.name)?;
                    }
                    let job = self.prepare_job(options, group.clone())?;
                    prepared.jobs.push(job);
                }
                Action::Bitmap { node, action } => {
                    let found = self.world().graph.node(&node)?;
                    prepared.check_bitmap_of_job(&node, action.name())?;
                    if let BitmapAction::Merge { sources, .. } = &action {
                        for source in sources {
                            prepared.check_bitmap_of_job(&node, source)?;
                        }
                    }
                    let earlier = |name: &str| prepared.earlier(&found, name);
                    bitmaps::check_with(&found, &action, earlier)?;
                    prepared.nodes.insert(node);
                    prepared.bitmaps.push((found, action));
                }
            }
        }
        prepared.check_borrowed()?;
        for (node, _) in &prepared.bitmaps {
            let of_node = prepared.of_node(node);
            bitmaps::check_together(node, of_node)?;
        }
        let jobs = prepared.jobs.iter();
        let overlays: Vec<&str> = prepared.overlays.iter().map(|o| o.node.name()).collect();
        for job in jobs {
            if overlays.contains(&job.node()) {
                return Err(Error::invalid(format!(
                    "transaction: node '{}' gets an overlay and a backup: back up the overlay afterwards, or leave one of them out",
                    job.node()
                )));
            }
        }
        Ok(())
    }

    /// Lets go of everything that was prepared.
    async fn undo(&mut self, prepared: Prepared) {
        for job in prepared.jobs {
            self.forget(job);
        }
        for overlay in prepared.overlays {
            self.give_up(overlay.opened).await;
        }
    }
}
