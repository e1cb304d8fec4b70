//! Live snapshots: a new overlay takes the place of a node that guests use.
//!
//! Everything that may take long is done while guests go on: the overlay is opened and made ready, and the node is flushed.
//! They wait for what was written meanwhile, and for the change itself. What the node has in memory beyond that is stored
//! when they go on: it is only read from then on.

use std::time::Instant;

use vdisk_api::{BackingRef, DriverOptions, Error, NodeOptions, Reply, Result};
use vdisk_block::Opened;

use super::{Control, Event};

impl Control {
    pub(super) async fn add_overlay(
        &mut self,
        name: &str,
        mut options: NodeOptions,
    ) -> Result<Reply> {
        let overlay = options.node_name.clone().unwrap_or_default();
        let what = format!("overlay '{overlay}' of node '{name}'");
        match &mut options.driver {
            DriverOptions::Qcow2(q) if q.backing == BackingRef::Unset => {
                q.backing = BackingRef::Active(name.to_owned());
            }
            DriverOptions::Qcow2(_) => {
                return Err(Error::invalid(format!(
                    "{what}: option 'backing' is given, but the node is its backing file: leave it out"
                )));
            }
            other => {
                return Err(Error::not_supported(format!(
                    "{what} has driver '{}': only qcow2 images can be overlays",
                    other.name()
                )));
            }
        }
        if options.read_only {
            return Err(Error::invalid(format!(
                "{what} is read-only, and nobody could write to the disk: leave out the option 'read-only'"
            )));
        }
        let plan = {
            let mut world = self.world();
            world.graph.check_overlay(name)?;
            world.graph.plan(options)?
        };
        let opened = self.open(plan).await?;
        if let Err(error) = self.prepare_overlay(&what, name, &opened).await {
            self.give_up(opened).await;
            return Err(error);
        }
        let (names, paused) = self.take_place(&what, name, opened).await?;
        let node = self.world().graph.node(name)?;
        if let Err(error) = self.settle(&node).await {
            tracing::warn!(node = name, %error, "what it has in memory beyond what was flushed cannot be stored");
        }
        let paused_us = paused.as_micros() as u64;
        tracing::info!(node = name, overlay, paused_us, "overlay added");
        self.events.push(Event::NodeChanged(name.to_owned()));
        let added = names.iter().rev().cloned().map(Event::NodeAdded);
        self.events.extend(added);
        let exports: Vec<String> = {
            let world = self.world();
            let all = world.exports.iter();
            let moved = all.filter(|(_, e)| e.node() == overlay);
            moved.map(|(id, _)| id.clone()).collect()
        };
        let changed = exports.into_iter().map(Event::ExportChanged);
        self.events.extend(changed);
        Ok(Reply::Overlay { names, paused })
    }

    /// Makes the overlay ready to take over, and brings as much of the node to the storage as can be while it is written to.
    async fn prepare_overlay(&self, what: &str, name: &str, opened: &Opened) -> Result<()> {
        self.activate(opened).await?;
        let node = self.world().graph.node(name)?;
        let overlay = opened.nodes().last();
        let size = overlay.map_or(0, |o| o.size());
        if size != node.size() {
            return Err(Error::invalid(format!(
                "{what} has {size} bytes, but the node has {}: give them the same size",
                node.size()
            )));
        }
        let block = {
            let world = self.world();
            let exports = world.exports.values().filter(|e| e.node() == name);
            let blocks = exports.map(|e| e.server.device().options.logical_block_size);
            blocks.min()
        };
        if let (Some(overlay), Some(block)) = (overlay, block) {
            overlay.announce_block_size(block.into());
        }
        self.flush(&node)
            .await
            .map_err(|e| Error::io(format_args!("{what}: the node cannot be flushed"), &e))
    }

    /// The moment of the snapshot: guests wait from the beginning of this to its end.
    async fn take_place(
        &self,
        what: &str,
        name: &str,
        opened: Opened,
    ) -> Result<(Vec<String>, std::time::Duration)> {
        let (node, (backends, _)) = {
            let world = self.world();
            (world.graph.node(name)?, world.graph.above(name))
        };
        let start = Instant::now();
        let mut drained = Vec::new();
        for backend in &backends {
            drained.push(backend.drain().await);
        }
        if let Err(e) = self.flush(&node).await {
            drop(drained);
            self.give_up(opened).await;
            return Err(Error::io(
                format_args!("{what}: the node cannot be flushed, and stays as it is"),
                &e,
            ));
        }
        node.set_read_only();
        let overlay = opened.nodes().last().cloned();
        let names = self.world().graph.insert_overlay(opened, name);
        for (guard, overlay) in drained.iter().zip(overlay.iter().cycle()) {
            guard.set_node(overlay.clone());
        }
        drop(drained);
        Ok((names, start.elapsed()))
    }
}
