//! Commands on nodes.

use std::collections::BTreeSet;
use std::sync::Arc;

use vdisk_api::{DetectZeroes, Discard, Error, NodeChange, NodeOptions, Reply, Result};
use vdisk_block::{Node, Opened, Plan};

use super::{Control, Event, NodeEvent, bitmaps};

impl Control {
    pub(super) async fn add_node(&mut self, options: NodeOptions) -> Result<Reply> {
        let plan = self.world().graph.plan(options)?;
        let opened = self.open_ready(plan).await?;
        Ok(Reply::Nodes(self.insert(opened)?))
    }

    /// Opens what was planned, and makes it ready for requests: all of it or nothing.
    pub(super) async fn open_ready(&self, plan: Plan) -> Result<Opened> {
        let opened = self.open(plan).await?;
        match self.activate(&opened).await {
            Ok(()) => Ok(opened),
            Err(error) => {
                opened.close().await;
                Err(error)
            }
        }
    }

    /// Makes what was opened part of the graph; the names, the one that was asked for first.
    pub(super) fn insert(&mut self, opened: Opened) -> Result<Vec<String>> {
        let names = self.world().graph.insert(opened);
        let mut changed = Vec::new();
        for name in &names {
            // It is another one, if there was one that could not be restored.
            self.lost.forget_node(name);
        }
        for name in names.iter().rev() {
            let info = self.world().graph.info(name)?;
            tracing::info!(
                node = name,
                driver = info.node.driver_name(),
                file = info.node.filename(),
                size = info.node.size(),
                read_only = info.node.is_read_only(),
                "node added"
            );
            self.added(name);
            changed.extend(info.children.into_iter().map(|(_, child)| child));
        }
        changed.retain(|child| !names.contains(child));
        self.events
            .extend(changed.into_iter().map(Event::NodeChanged));
        Ok(names)
    }

    /// Opens what was planned: all of it or nothing.
    pub(super) async fn open(&self, plan: Plan) -> Result<Opened> {
        // That may block for as long as the storage likes.
        let opened = tokio::task::spawn_blocking(move || plan.open())
            .await
            .map_err(|e| Error::failed(format!("opening was interrupted: {e}")))?;
        match opened {
            Ok(opened) => Ok(opened),
            Err((error, half)) => {
                half.close().await;
                Err(error)
            }
        }
    }

    /// Lets go of opened nodes that may be ready for requests already.
    pub(super) async fn give_up(&self, opened: Opened) {
        let nodes: Vec<Arc<Node>> = opened.nodes().cloned().collect();
        for node in nodes.iter().rev() {
            if let Err(error) = self.settle(node).await {
                tracing::warn!(node = node.name(), %error, "cannot be closed as it should be");
            }
        }
        opened.close().await;
    }

    /// Makes opened nodes ready for requests, from the bottom up.
    pub(super) async fn activate(&self, opened: &Opened) -> Result<()> {
        let thread = self.world().any_thread()?;
        for node in opened.nodes() {
            let there = node.clone();
            thread
                .run_async(move |_| async move { there.activate().await })
                .await
                .map_err(|e| Error::failed(e.to_string()))?
                .map_err(|e| {
                    let what = format_args!("node '{}' cannot be made ready", node.name());
                    Error::io(what, &e)
                })?;
        }
        Ok(())
    }

    /// Brings what a node keeps in memory to its storage, and lets go of it.
    pub(super) async fn close(&self, node: &Arc<Node>) -> std::io::Result<()> {
        let result = self.settle(node).await;
        node.close().await;
        result
    }

    /// Brings what a node keeps in memory to its storage. Nothing is written to it from now on.
    pub(super) async fn settle(&self, node: &Arc<Node>) -> std::io::Result<()> {
        let thread = self.world().any_thread().map_err(std::io::Error::other)?;
        let there = node.clone();
        thread
            .run_async(move |_| async move { there.deactivate().await })
            .await
            .map_err(std::io::Error::other)
            .flatten()
    }

    pub(super) async fn remove_node(&mut self, name: &str) -> Result<Reply> {
        let (children, removed) = {
            let mut world = self.world();
            let children = world.graph.info(name)?.children;
            (children, world.graph.remove(name)?)
        };
        let mut failed = None;
        for node in removed {
            self.removed(&node);
            if let Err(e) = self.close(&node).await {
                tracing::error!(node = node.name(), error = %e, "the last changes cannot be written");
                failed.get_or_insert(Error::io(
                    format_args!(
                        "node '{}' was removed, but its last changes cannot be written; what was flushed before is safe",
                        node.name()
                    ),
                    &e,
                ));
            }
            tracing::info!(node = node.name(), "node removed");
        }
        for (_, child) in children {
            if self.world().graph.node(&child).is_ok() {
                self.events.push(Event::NodeChanged(child));
            }
        }
        failed.map_or(Ok(Reply::Done), Err)
    }

    /// Tells of a new node, and of what belongs to it.
    pub(super) fn added(&mut self, name: &str) {
        self.events.push(Event::NodeAdded(name.to_owned()));
        self.bitmaps_added(name);
    }

    /// Tells of the bitmaps of a node.
    pub(super) fn bitmaps_added(&mut self, name: &str) {
        let node = self.world().graph.node(name);
        for bitmap in node.iter().flat_map(|n| n.bitmaps()) {
            let event = Event::BitmapAdded(name.to_owned(), bitmap.name().to_owned());
            self.events.push(event);
        }
    }

    /// Tells that a node, and what belongs to it, goes: before it is closed.
    pub(super) fn removed(&mut self, node: &Node) {
        for bitmap in node.bitmaps() {
            let (node, name) = (node.name().to_owned(), bitmap.name().to_owned());
            self.events.push(Event::BitmapRemoved(node, name));
        }
        self.events.push(Event::NodeRemoved(node.name().to_owned()));
    }

    pub(super) async fn resize_node(
        &mut self,
        name: &str,
        size: u64,
        shrink: bool,
    ) -> Result<Reply> {
        let (node, (backends, above), block) = {
            let world = self.world();
            let node = world.graph.node(name)?;
            let above = world.graph.resized_with(name);
            // Guests see sizes in their logical blocks.
            let block = world
                .exports
                .values()
                .filter(|e| above.1.iter().any(|n| n.name() == e.node()))
                .map(|e| u64::from(e.server.logical_block_size()))
                .max();
            (node, above, block.unwrap_or(1))
        };
        let block = block.max(node.storage_block_size());
        let before = node.size();
        if node.is_read_only() {
            return Err(Error::invalid(format!(
                "node '{name}' is read-only and cannot be resized: add it without read-only"
            )));
        }
        {
            let world = self.world();
            for node in &above {
                world.graph.check_no_job(node.name())?;
                for bitmap in node.bitmaps() {
                    let what = format!("bitmap '{}' of node '{}'", bitmap.name(), node.name());
                    bitmaps::check_memory(&what, size, bitmap.granularity())?;
                }
            }
            world.graph.check_resize(name)?;
        }
        if size < before && !shrink {
            return Err(Error::invalid(format!(
                "node '{name}' has {before} bytes; resizing it to {size} would cut off data: set 'shrink' if that is meant"
            )));
        }
        if !size.is_multiple_of(block) {
            return Err(Error::invalid(format!(
                "node '{name}' cannot be resized to {size} bytes, which is not a multiple of its block size {block}: give {}",
                size.next_multiple_of(block)
            )));
        }
        // Nothing above may have requests in flight that were checked against the old size.
        let mut drained = Vec::new();
        for backend in &backends {
            drained.push(backend.drain().await);
        }
        let thread = self.world().any_thread()?;
        let there = node.clone();
        let resized = thread
            .run_async(move |_| async move { there.resize(size).await })
            .await
            .map_err(|e| Error::failed(e.to_string()))?
            .map_err(|e| {
                Error::io(
                    format_args!("node '{name}' cannot be resized to {size} bytes"),
                    &e,
                )
            })?;
        // Nodes above follow, from the bottom up.
        for parent in above.iter().filter(|n| n.name() != name) {
            parent.follow_child();
        }
        drop(drained);
        tracing::info!(node = name, from = before, to = resized, "node resized");
        for node in &above {
            self.events.push(Event::NodeChanged(node.name().to_owned()));
        }
        let world = self.world();
        for export in world.exports.values() {
            if above.iter().any(|n| n.name() == export.node()) {
                export.server.config_changed();
            }
        }
        Ok(Reply::Done)
    }

    pub(super) fn set_write_threshold(&mut self, name: &str, threshold: u64) -> Result<Reply> {
        let node = self.world().graph.node(name)?;
        self.tell_of_writes_beyond(&node, threshold);
        self.events.push(Event::NodeChanged(name.to_owned()));
        Ok(Reply::Done)
    }

    pub(super) fn tell_of_writes_beyond(&self, node: &Arc<Node>, threshold: u64) {
        let (events, name) = (self.node_events.clone(), node.name().to_owned());
        node.set_write_threshold(threshold, move |amount| {
            let node = name.clone();
            let _ = events.send(NodeEvent {
                node,
                threshold,
                amount,
            });
        });
    }

    /// Changes options of a node, all of them or none.
    pub(super) async fn reopen_node(&mut self, name: &str, change: NodeChange) -> Result<Reply> {
        if !change.others.is_empty() {
            return self.open_again(name, change.others).await;
        }
        let node = {
            let world = self.world();
            world.graph.check_claim(name)?;
            world.graph.node(name)?
        };
        let discard = change.discard.unwrap_or(match node.discards() {
            true => Discard::Unmap,
            false => Discard::Ignore,
        });
        let detect_zeroes = change.detect_zeroes.unwrap_or(node.detect_zeroes());
        if detect_zeroes == DetectZeroes::Unmap && discard != Discard::Unmap {
            return Err(Error::invalid(format!(
                "node '{name}': detect-zeroes is 'unmap', which frees blocks: set discard=unmap as well"
            )));
        }
        self.reserve_state()?;
        let to_read_only = change.read_only.filter(|r| *r != node.is_read_only());
        if to_read_only.is_some() {
            self.world().graph.check_reopens(name)?;
        }
        let bitmaps = |node: &Node| -> BTreeSet<String> {
            node.bitmaps().iter().map(|b| b.name().to_owned()).collect()
        };
        let bitmaps_before = bitmaps(&node);
        match to_read_only {
            Some(true) => {
                self.world().graph.check_unwritten(name)?;
                self.flush_mostly(&node)
                    .await
                    .map_err(|e| Error::io(format_args!("node '{name}' cannot be flushed"), &e))?;
            }
            Some(false) => {
                let world = self.world();
                if let Some(overlay) = world.graph.overlays(name).first() {
                    return Err(Error::in_use(format!(
                        "node '{name}' is the backing file of node '{}', which would change with it: remove that first",
                        overlay.name()
                    )));
                }
            }
            None => {}
        }
        let (_, drained) = self.hold(name).await;
        match to_read_only {
            Some(true) => {
                self.settle(&node).await.map_err(|e| {
                    let what = format_args!(
                        "node '{name}' stays writable: its last changes cannot be stored"
                    );
                    Error::io(what, &e)
                })?;
                self.make_read_only(&node).await;
            }
            Some(false) => self.make_writable(&node).await?,
            None => {}
        }
        node.set_discard(discard);
        node.set_detect_zeroes(detect_zeroes);
        {
            let mut world = self.world();
            world
                .graph
                .set_option(name, "discard", discard.name().into());
            let detect = detect_zeroes.name().into();
            world.graph.set_option(name, "detect-zeroes", detect);
        }
        let bitmaps_after = bitmaps(&node);
        for bitmap in bitmaps_before.symmetric_difference(&bitmaps_after) {
            let (node, bitmap) = (name.to_owned(), bitmap.clone());
            self.events.push(match bitmaps_after.contains(&bitmap) {
                true => Event::BitmapAdded(node, bitmap),
                false => Event::BitmapRemoved(node, bitmap),
            });
        }
        self.save();
        drop(drained);
        tracing::info!(node = name, ?change, "node reopened");
        let (_, above) = self.world().graph.above(name);
        for node in above {
            self.events.push(Event::NodeChanged(node.name().to_owned()));
        }
        let related = self.world().graph.related(name);
        let exports: Vec<String> = {
            let world = self.world();
            let all = world.exports.iter();
            let touched = all.filter(|(_, e)| related.contains(&e.node()));
            touched.map(|(id, _)| id.clone()).collect()
        };
        let exports = exports.into_iter().map(Event::ExportChanged);
        self.events.extend(exports);
        Ok(Reply::Done)
    }

    /// Makes writes of a node possible that was opened for reading. The caller has drained everything above.
    pub(super) async fn make_writable(&self, node: &Arc<Node>) -> Result<()> {
        let there = node.clone();
        tokio::task::spawn_blocking(move || there.make_writable())
            .await
            .map_err(|e| Error::failed(format!("opening was interrupted: {e}")))??;
        let thread = self.world().any_thread()?;
        let there = node.clone();
        let activated = thread
            .run_async(move |_| async move { there.activate().await })
            .await
            .map_err(std::io::Error::other)
            .flatten();
        if let Err(e) = activated {
            self.make_read_only(node).await;
            let what = format_args!("node '{}' cannot be made ready for writing", node.name());
            return Err(Error::io(what, &e));
        }
        Ok(())
    }

    /// The reverse; what went wrong is logged.
    pub(super) async fn make_read_only(&self, node: &Arc<Node>) {
        if let Err(error) = self.settle(node).await {
            tracing::error!(node = node.name(), %error, "the last changes cannot be written");
        }
        let there = node.clone();
        let _ = tokio::task::spawn_blocking(move || there.make_read_only()).await;
    }

    pub(super) async fn flush_node(&mut self, name: &str) -> Result<Reply> {
        let node = self.world().graph.node(name)?;
        self.world().graph.check_claim(name)?;
        self.flush(&node)
            .await
            .map_err(|e| Error::io(format_args!("node '{name}' cannot be flushed"), &e))?;
        Ok(Reply::Done)
    }

    pub(super) async fn flush(&self, node: &Arc<Node>) -> std::io::Result<()> {
        let thread = self.world().any_thread().map_err(std::io::Error::other)?;
        let node = node.clone();
        thread
            .run_async(move |_| async move { node.flush().await })
            .await
            .map_err(std::io::Error::other)?
    }
}
