//! Changes of the graph under guests: overlays and filters that come, and filters that go.
//!
//! Everything that may take long is done while guests go on: what is new is opened and made ready. They wait for the change
//! itself. What will only be read is flushed when they go on again, and no flush of theirs is answered before that (see
//! [`Node::succeed`]): not before, as writes wait for pages that are being written out.

use std::sync::Arc;
use std::time::{Duration, Instant};

use vdisk_api::{BackingRef, DriverOptions, Error, FILTERS, NodeOptions, Reply, Result};
use vdisk_block::{DrainGuard, Node, Opened, Parent, Plan};

use super::{Control, Event};

/// A flush that takes less is not worth another before it.
const SHORT_FLUSH: Duration = Duration::from_millis(2);
const MAX_FLUSHES: usize = 6;

/// An overlay that may take the place of its node.
pub(super) struct PreparedOverlay {
    pub name: String,
    pub node: Arc<Node>,
    pub opened: Opened,
}

/// After this long, what requests wait for that do not end is looked at.
const PATIENCE: Duration = Duration::from_secs(5);

impl PreparedOverlay {
    /// The names that its nodes will have.
    pub fn names(&self) -> impl Iterator<Item = String> {
        self.opened.nodes().map(|n| n.name().to_owned())
    }

    /// The nodes that were there before which it stands on beside the one that it is an overlay of.
    pub fn borrowed(&self) -> Vec<Arc<Node>> {
        let mut known = self.node.with_all_below();
        known.extend(self.opened.nodes().cloned());
        let all = self.opened.nodes().flat_map(|n| n.with_all_below());
        all.filter(|n| known.iter().all(|k| !Arc::ptr_eq(k, n)))
            .collect()
    }
}

impl Control {
    pub(super) async fn add_overlay(&mut self, name: &str, options: NodeOptions) -> Result<Reply> {
        self.reserve_state()?;
        let PreparedOverlay {
            name: overlay,
            node,
            opened,
        } = self.prepare_overlay(name, options).await?;
        let (start, drained) = self.hold(name).await;
        let names = self.overlay_in_place(&node, opened, &drained);
        self.save();
        drop(drained);
        let paused = start.elapsed();
        self.settle_below(&node, &overlay).await;
        let paused_us = paused.as_micros() as u64;
        tracing::info!(node = name, overlay, paused_us, "overlay added");
        Ok(self.moved(name, &overlay, names, paused))
    }

    /// Puts an overlay in the place of its node, which everybody above was drained for.
    pub(super) fn overlay_in_place(
        &self,
        node: &Arc<Node>,
        opened: Opened,
        drained: &[DrainGuard],
    ) -> Vec<String> {
        node.set_read_only();
        if let Some(overlay) = opened.nodes().last() {
            overlay.succeed(node);
        }
        self.put_in_place(node.name(), opened, drained)
    }

    /// Makes durable what was written in the place of an overlay before.
    async fn flush_below(&self, overlay: &str) -> std::io::Result<()> {
        let (overlay, thread) = {
            let world = self.world();
            let overlay = world.graph.node(overlay).map_err(std::io::Error::other)?;
            (overlay, world.any_thread().map_err(std::io::Error::other)?)
        };
        thread
            .run_async(move |_| async move { overlay.flush_predecessor().await })
            .await
            .map_err(std::io::Error::other)
            .flatten()
    }

    /// Flushes and stores what a node has in memory that is only read from now on, below its overlay.
    pub(super) async fn settle_below(&mut self, node: &Arc<Node>, overlay: &str) {
        // The image keeps its bitmaps for whoever writes to it again.
        for bitmap in node.bitmaps().iter().filter(|b| b.is_persistent()) {
            let (node, name) = (node.name().to_owned(), bitmap.name().to_owned());
            self.events.push(Event::BitmapRemoved(node, name));
        }
        if let Err(error) = self.flush_below(overlay).await {
            tracing::error!(
                node = node.name(),
                %error,
                "the last writes to it cannot be made durable: flushes of its overlay fail until they are"
            );
            return;
        }
        if let Err(error) = self.settle(node).await {
            tracing::warn!(node = node.name(), %error, "what it has in memory beyond what was flushed cannot be stored");
        }
    }

    /// Does everything that can fail, or takes long, before an overlay takes its place.
    pub(super) async fn prepare_overlay(
        &self,
        name: &str,
        mut options: NodeOptions,
    ) -> Result<PreparedOverlay> {
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
        let (node, plan) = {
            let mut world = self.world();
            world.graph.check_overlay(name)?;
            let plan = world.graph.plan(options)?;
            (world.graph.node(name)?, plan)
        };
        let opened = self.open_above(&what, &node, plan).await?;
        let nodes: Vec<Arc<Node>> = opened.nodes().flat_map(|n| n.with_all_below()).collect();
        let lasts = self.world().check_lasting(name, &nodes);
        if let Err(e) = lasts {
            self.give_up(opened).await;
            return Err(e);
        }
        Ok(PreparedOverlay {
            name: overlay,
            node,
            opened,
        })
    }

    pub(super) async fn insert_filter(
        &mut self,
        name: &str,
        options: NodeOptions,
    ) -> Result<Reply> {
        let filter = options.node_name.clone().unwrap_or_default();
        let what = format!("filter '{filter}' over node '{name}'");
        if !FILTERS.contains(&options.driver.name()) {
            return Err(Error::not_supported(format!(
                "{what} has driver '{}', which is no filter: there are {}",
                options.driver.name(),
                FILTERS.join(", ")
            )));
        }
        let (node, plan) = {
            let mut world = self.world();
            world.graph.check_moves(name)?;
            let plan = world.graph.plan(options)?;
            (world.graph.node(name)?, plan)
        };
        self.reserve_state()?;
        let opened = self.open_above(&what, &node, plan).await?;
        let (start, drained) = self.hold(name).await;
        let names = self.put_in_place(name, opened, &drained);
        self.save();
        drop(drained);
        let paused = start.elapsed();
        let paused_us = paused.as_micros() as u64;
        tracing::info!(node = name, filter, paused_us, "filter inserted");
        Ok(self.moved(name, &filter, names, paused))
    }

    pub(super) async fn take_out(&mut self, name: &str) -> Result<Reply> {
        // Whatever is wrong is to be known before anybody has to wait.
        {
            let world = self.world();
            world.graph.check_claim(name)?;
            // It would see no request any more.
            world.graph.check_no_job(name)?;
        }
        self.reserve_state()?;
        let (start, drained) = self.hold(name).await;
        let (removed, below) = self.world().graph.take_out(name)?;
        let Some(filter) = removed.first() else {
            return Err(Error::failed(format!("node '{name}' is gone")));
        };
        for guard in &drained {
            guard.set_node_if(filter, &below);
        }
        self.save();
        drop(drained);
        let paused = start.elapsed();
        for node in &removed {
            self.removed(node);
            if let Err(error) = self.close(node).await {
                tracing::error!(node = node.name(), %error, "the last changes cannot be written");
            }
        }
        let paused_us = paused.as_micros() as u64;
        tracing::info!(
            node = below.name(),
            filter = name,
            paused_us,
            "filter taken out"
        );
        let below = below.name().to_owned();
        Ok(self.moved(&below, &below, Vec::new(), paused))
    }

    /// Has whatever uses a node use another, which has the same data as far as its owner knows.
    pub(super) async fn replace_node(&mut self, name: &str, with: &str) -> Result<Reply> {
        let what = format!("node '{with}' in the place of node '{name}'");
        let (node, new) = {
            let world = self.world();
            let (node, new) = (world.graph.node(name)?, world.graph.node(with)?);
            let related = world.graph.related(name);
            if Arc::ptr_eq(&node, &new) || related.contains(with) {
                return Err(Error::invalid(format!(
                    "{what}: they are the same, or have something below them in common: give one with storage of its own"
                )));
            }
            let nobody = Parent::Job(String::new());
            world.graph.check_claim(name)?;
            // A mirror would follow a node that nobody writes to any more.
            world.graph.check_no_job(name)?;
            world.graph.check_claim(with)?;
            world.graph.check_replace(name, with, &nobody)?;
            let (_, above) = world.graph.above(name);
            let mut exports = world.exports.values();
            let writer = exports.find(|e| e.writable && above.iter().any(|n| n.name() == e.node()));
            if let (Some(writer), true) = (writer, new.is_read_only()) {
                return Err(Error::invalid(format!(
                    "{what}: it is read-only, and export '{}' writes: add it without read-only",
                    writer.backend.name()
                )));
            }
            world.check_lasting(name, &new.with_all_below())?;
            (node, new)
        };
        self.check_fit(&what, &node, &new)?;
        self.reserve_state()?;
        self.flush_mostly(&node)
            .await
            .map_err(|e| Error::io(format_args!("node '{name}' cannot be flushed"), &e))?;
        let (start, drained) = self.hold(name).await;
        self.world().graph.replace(name, with);
        for guard in &drained {
            guard.set_node_if(&node, &new);
        }
        self.save();
        drop(drained);
        let paused = start.elapsed();
        let paused_us = paused.as_micros() as u64;
        tracing::info!(node = name, with, paused_us, "node replaced");
        self.events.push(Event::NodeChanged(name.to_owned()));
        Ok(self.moved(with, with, Vec::new(), paused))
    }

    /// Flushes a node that is written to until a flush has little to do: the last one, for which guests wait, has even less.
    pub(super) async fn flush_mostly(&self, node: &Arc<Node>) -> std::io::Result<()> {
        for _ in 0..MAX_FLUSHES {
            let start = Instant::now();
            self.flush(node).await?;
            if start.elapsed() < SHORT_FLUSH {
                break;
            }
        }
        Ok(())
    }

    /// Opens what is to take the place of a node, and makes it ready.
    async fn open_above(&self, what: &str, node: &Arc<Node>, plan: Plan) -> Result<Opened> {
        let opened = self.open(plan).await?;
        match self.prepare(what, node, &opened).await {
            Ok(()) => Ok(opened),
            Err(error) => {
                self.give_up(opened).await;
                Err(error)
            }
        }
    }

    /// Makes opened nodes ready to take the place of a node.
    async fn prepare(&self, what: &str, node: &Arc<Node>, opened: &Opened) -> Result<()> {
        self.activate(opened).await?;
        let Some(new) = opened.nodes().last() else {
            return Err(Error::failed(format!("{what} was not opened")));
        };
        self.check_fit(what, node, new)
    }

    /// Refuses a node that cannot take another's place, and tells it what clients will write.
    fn check_fit(&self, what: &str, node: &Arc<Node>, new: &Arc<Node>) -> Result<()> {
        if new.size() != node.size() {
            return Err(Error::invalid(format!(
                "{what} has {} bytes, but the node has {}: give them the same size",
                new.size(),
                node.size()
            )));
        }
        let world = self.world();
        let (_, above) = world.graph.above(node.name());
        let exports = world.exports.values();
        let exports = exports.filter(|e| above.iter().any(|n| n.name() == e.node()));
        let blocks = exports.map(|e| e.server.logical_block_size());
        if let Some(block) = blocks.min() {
            new.announce_block_size(block.into());
        }
        Ok(())
    }

    /// Has everybody wait whose requests reach a node.
    pub(super) async fn hold(&self, name: &str) -> (Instant, Vec<DrainGuard>) {
        let (backends, _) = self.world().graph.above(name);
        let start = Instant::now();
        let mut drained = Vec::new();
        for backend in &backends {
            let mut drain = std::pin::pin!(backend.drain());
            let guard = loop {
                match tokio::time::timeout(PATIENCE, &mut drain).await {
                    Ok(guard) => break guard,
                    Err(_) => self.give_up_copies(name),
                }
            };
            drained.push(guard);
        }
        (start, drained)
    }

    /// Guests whose requests reach a node are waited for, and may themselves wait until a job's target has what they overwrite: a server that
    /// answers nothing any more fails the job, not the guests.
    fn give_up_copies(&self, name: &str) {
        let world = self.world();
        let (_, above) = world.graph.above(name);
        for job in world.jobs.values() {
            if above.iter().any(|n| n.name() == job.source) && job.give_up(&world, false) {
                tracing::warn!(
                    job = job.id(),
                    target = job.target,
                    "its target answers nothing, and guests are waited for: what was to be written there is given up"
                );
            }
        }
    }

    /// Puts what was opened in the place of a node, which everybody above was drained for.
    pub(super) fn put_in_place(
        &self,
        name: &str,
        opened: Opened,
        drained: &[DrainGuard],
    ) -> Vec<String> {
        let new = opened.nodes().last().cloned();
        let mut world = self.world();
        let old = world.graph.node(name);
        let names = world.graph.insert_above(opened, name);
        if let (Ok(old), Some(new)) = (old, new) {
            for guard in drained {
                guard.set_node_if(&old, &new);
            }
        }
        names
    }

    /// Tells of the change.
    pub(super) fn moved(
        &mut self,
        name: &str,
        top: &str,
        names: Vec<String>,
        paused: Duration,
    ) -> Reply {
        for name in names.iter().rev() {
            self.added(name);
        }
        let (nodes, exports): (Vec<String>, Vec<String>) = {
            let world = self.world();
            let (_, above) = world.graph.above(name);
            let has = |node: &str| above.iter().any(|n| n.name() == node);
            let exports = world.exports.iter().filter(|(_, e)| has(&e.node()));
            (
                above.iter().map(|n| n.name().to_owned()).collect(),
                exports.map(|(id, _)| id.clone()).collect(),
            )
        };
        debug_assert!(nodes.iter().any(|n| n == top));
        self.events
            .extend(nodes.into_iter().map(Event::NodeChanged));
        let exports = exports.into_iter().map(Event::ExportChanged);
        self.events.extend(exports);
        Reply::Moved { names, paused }
    }
}
