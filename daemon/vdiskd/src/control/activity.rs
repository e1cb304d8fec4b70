//! Images that are let go of for another host, and opened when it has let go of them.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::oneshot;
use vdisk_api::{Action, Command, Error, Reply, Result};
use vdisk_block::{DrainGuard, Node, Opened, StoredNode};
use vdisk_exports::Server;

use super::{Control, Event, Export};

/// How long the last copies for another host may take while a front-end waits.
const LAST_COPIES: Duration = Duration::from_secs(9);

/// Node and name of each bitmap.
fn bitmaps_of(nodes: &[Arc<Node>]) -> Vec<(String, String)> {
    let named = |n: &Arc<Node>| {
        let bitmaps = n.bitmaps().into_iter();
        let named = bitmaps.map(|b| (n.name().to_owned(), b.name().to_owned()));
        named.collect::<Vec<_>>()
    };
    nodes.iter().flat_map(named).collect()
}

impl Control {
    /// Refuses what needs the storage of a node that is inactive. (Jobs are refused when they attach to their nodes.)
    pub(super) fn check_active(&self, command: &Command) -> Result<()> {
        let nodes: Vec<&str> = match command {
            Command::ResizeNode { name, .. }
            | Command::CheckNode { name, .. }
            | Command::TakeOut { name } => vec![name],
            Command::SetWriteThreshold { node, .. }
            | Command::ReopenNode { node, .. }
            | Command::AddOverlay { node, .. }
            | Command::InsertFilter { node, .. }
            | Command::Snapshot { node, .. }
            | Command::Bitmap { node, .. } => vec![node],
            Command::ReplaceNode { node, with } => vec![node, with],
            Command::Transaction(transaction) => {
                let actions = transaction.actions.iter();
                let nodes = actions.map(|action| match action {
                    Action::AddOverlay { node, .. } | Action::Bitmap { node, .. } => node.as_str(),
                    Action::Backup(job) => job.node.as_str(),
                });
                nodes.collect()
            }
            // Those that are about no node's storage, or that look for themselves.
            Command::AddNode(_)
            | Command::RemoveNode { .. }
            | Command::FlushNode { .. }
            | Command::SetActive { .. }
            | Command::StartJob(_)
            | Command::Job { .. }
            | Command::AddExport(_)
            | Command::RemoveExport { .. }
            | Command::ForgetLost { .. }
            | Command::SetPersistent { .. }
            | Command::AddIoThread(_)
            | Command::UpdateIoThread { .. }
            | Command::RemoveIoThread { .. } => Vec::new(),
        };
        let world = self.world();
        nodes.iter().try_for_each(|n| world.graph.check_active(n))
    }

    pub(super) async fn set_active(&mut self, name: &str, active: bool) -> Result<Reply> {
        match self.change_activity(name, active, || true).await? {
            true => Ok(Reply::Done),
            false => Err(self.busy(name)),
        }
    }

    /// `is_wanted` is asked before guests would notice. False if a guest uses the images that are to be let go of.
    pub(super) async fn change_activity(
        &mut self,
        name: &str,
        active: bool,
        is_wanted: impl Fn() -> bool,
    ) -> Result<bool> {
        match active {
            true => {
                self.take_back(name).await;
                self.activate_node(name).await.map(|()| true)
            }
            false => self.deactivate_node(name, is_wanted).await,
        }
    }

    /// A guest that is about to move: its images are let go of, or those that were copied for the other host handed over.
    pub(super) async fn let_images_go(
        &mut self,
        node: String,
        done: oneshot::Sender<Result<bool>>,
    ) {
        let told = match self.hand_over(&node) {
            None => {
                let is_wanted = || !done.is_closed();
                let result = self.change_activity(&node, false, is_wanted).await;
                self.publish().await;
                let _ = done.send(result);
                return;
            }
            // The guest waits there for the copy, which is locked: nothing is gained if its front-end waits here.
            Some(Err(error)) => {
                tracing::error!(node, %error, "the guest goes to another host without its disk");
                let _ = done.send(Ok(true));
                return;
            }
            Some(Ok(told)) => told,
        };
        self.publish().await;
        // It takes as long as the last copies do; the source stays open, for a guest that goes on here after all.
        tokio::spawn(async move {
            for (job, told) in told {
                let error = match tokio::time::timeout(LAST_COPIES, told).await {
                    Ok(Ok(Ok(()))) => continue,
                    Ok(Ok(Err(e))) => e.to_string(),
                    Ok(Err(_)) => "it has ended".to_owned(),
                    Err(_) => "it takes too long".to_owned(),
                };
                tracing::error!(
                    node,
                    job,
                    error,
                    "the guest goes to another host without its disk"
                );
                let _ = done.send(Ok(true));
                return;
            }
            tracing::info!(node, "all is copied, and the other host may have it");
            let _ = done.send(Ok(true));
        });
    }

    /// Ends exports for copies from another host that are finished, as their images are needed: the guest is here.
    async fn take_copies(&mut self, name: &str) {
        let exports: Vec<String> = {
            let world = self.world();
            let Ok(node) = world.graph.node(name) else {
                return;
            };
            let files_of = |node: &Arc<Node>| -> Vec<String> {
                let nodes = node.with_all_below();
                nodes.iter().filter_map(|n| n.filename()).collect()
            };
            let wanted = files_of(&node);
            let has = |e: &Export| {
                let finished = matches!(&e.server, Server::Nbd(nbd) if nbd.is_finished());
                finished
                    && files_of(&e.backend.node())
                        .iter()
                        .any(|f| wanted.contains(f))
            };
            let exports = world.exports.iter().filter(|(_, e)| has(e));
            exports.map(|(id, _)| id.clone()).collect()
        };
        for id in exports {
            self.finish_export(&id).await;
            // Whoever waits for that need not wait until the image is open.
            self.publish().await;
        }
    }

    async fn activate_node(&mut self, name: &str) -> Result<()> {
        if self.world().graph.plan_activation(name)?.is_empty() {
            return Ok(());
        }
        self.take_copies(name).await;
        let plan = self.world().graph.plan_activation(name)?;
        self.reserve_state()?;
        let opened = self.open_ready(plan).await?;
        let blocks = self.block_sizes(name);
        let new = opened.nodes().last().cloned();
        let old = self.world().graph.node(name)?;
        if let Some(new) = &new
            && let Some((export, block)) =
                blocks.iter().find(|(_, b)| !new.size().is_multiple_of(*b))
        {
            let error = Error::invalid(format!(
                "node '{name}' has {} bytes by now, which is not a multiple of the block size {block} of export '{export}': resize the image",
                new.size()
            ));
            self.give_up(opened).await;
            return Err(error);
        }
        let (_, drained) = self.hold(name).await;
        let changed = self.put_in(opened, &drained);
        for (_, new, noted) in &changed {
            self.take_up(new, noted);
        }
        if let (Some(new), Some(block)) = (&new, blocks.iter().map(|(_, b)| *b).min()) {
            new.announce_block_size(block);
        }
        self.save();
        drop(drained);
        for (_, new, _) in &changed {
            tracing::info!(node = new.name(), file = new.filename(), "node opened");
            self.events.push(Event::NodeChanged(new.name().to_owned()));
            self.bitmaps_added(new.name());
        }
        let grown = new.is_some_and(|new| new.size() != old.size());
        self.exports_changed(name, grown);
        Ok(())
    }

    async fn deactivate_node(&mut self, name: &str, is_wanted: impl Fn() -> bool) -> Result<bool> {
        let names = self.world().graph.check_deactivation(name)?;
        if names.is_empty() {
            return Ok(true);
        }
        if let Some(user) = self.user(name) {
            return self.is_let_go_with(name, &user);
        }
        self.reserve_state()?;
        let planned = self.world().graph.plan_deactivation(&names)?;
        let node = self.world().graph.node(name)?;
        let cannot = |node: &Arc<Node>, e: &std::io::Error| {
            let name = node.name();
            let what = format_args!("node '{name}' stays open: its last changes cannot be stored");
            Error::io(what, e)
        };
        self.flush_mostly(&node)
            .await
            .map_err(|e| cannot(&node, &e))?;
        let (_, drained) = self.hold(name).await;
        if !is_wanted() {
            return Err(Error::failed("nobody waits for it any more"));
        }
        if let Some(user) = self.user(name) {
            return self.is_let_go_with(name, &user);
        }
        self.flush(&node).await.map_err(|e| cannot(&node, &e))?;
        let nodes = names.iter().map(|n| self.world().graph.node(n));
        let nodes: Vec<Arc<Node>> = nodes.collect::<Result<_>>()?;
        let bitmaps = bitmaps_of(&nodes);
        let settled = self.settle_all(&nodes).await;
        settled.map_err(|(node, e)| cannot(node, &e))?;
        // A queue may have started meanwhile; between this look and the last line that needs it nobody else has a turn.
        if let Some(user) = self.user(name) {
            self.ready_again(&nodes).await;
            return self.is_let_go_with(name, &user);
        }
        let changed = self.put_away(planned, &drained);
        // Before another host can open it: the next daemon must not.
        self.save();
        for node in &nodes {
            node.close().await;
        }
        drop(drained);
        let removed = bitmaps.into_iter();
        let removed = removed.map(|(node, bitmap)| Event::BitmapRemoved(node, bitmap));
        self.events.extend(removed);
        for (_, new) in &changed {
            tracing::info!(node = new.name(), file = new.filename(), "node let go of");
            self.events.push(Event::NodeChanged(new.name().to_owned()));
        }
        self.exports_changed(name, false);
        Ok(true)
    }

    /// Brings to the storage what nodes have in memory, parents first: all of them, or it names the one that cannot.
    pub(super) async fn settle_all<'a>(
        &self,
        nodes: &'a [Arc<Node>],
    ) -> std::result::Result<(), (&'a Arc<Node>, std::io::Error)> {
        for (at, node) in nodes.iter().enumerate() {
            if let Err(e) = self.settle(node).await {
                // It is as it was, and those above are settled.
                self.ready_again(&nodes[..at]).await;
                return Err((node, e));
            }
        }
        Ok(())
    }

    /// Puts nodes that are not open in the place of those that were settled.
    pub(super) fn put_away(
        &self,
        planned: Vec<(StoredNode, Arc<Node>)>,
        drained: &[DrainGuard],
    ) -> Vec<(Arc<Node>, Arc<Node>)> {
        let changed = self.world().graph.deactivate(planned);
        for (old, new) in &changed {
            for guard in drained {
                guard.set_node_if(old, new);
            }
        }
        changed
    }

    /// Puts nodes that were opened in the place of those that were not open.
    pub(super) fn put_in(
        &self,
        opened: Opened,
        drained: &[DrainGuard],
    ) -> Vec<(Arc<Node>, Arc<Node>, StoredNode)> {
        let changed = self.world().graph.activate(opened);
        for (old, new, _) in &changed {
            for guard in drained {
                guard.set_node_if(old, new);
            }
        }
        changed
    }

    /// The export whose guest uses a node.
    fn user(&self, name: &str) -> Option<String> {
        let world = self.world();
        let (_, above) = world.graph.above(name);
        let mut exports = world.exports.iter();
        let busy = exports
            .find(|(_, e)| e.server.running() > 0 && above.iter().any(|n| n.name() == e.node()));
        busy.map(|(id, _)| id.clone())
    }

    /// False if an export uses a node whose guest lets go of it in its turn. Clients of NBD do not.
    fn is_let_go_with(&self, name: &str, user: &str) -> Result<bool> {
        let export = self.world().export(user)?;
        match export.server {
            Server::VhostUserBlk(_) => Ok(false),
            Server::Nbd(_) => Err(self.busy(name)),
        }
    }

    fn busy(&self, name: &str) -> Error {
        let user = self.user(name).unwrap_or_default();
        let who = match self.world().export(&user).map(|e| e.kind) {
            Ok("nbd") => "a client",
            _ => "the guest",
        };
        Error::in_use(format!(
            "node '{name}' cannot be let go of: {who} of export '{user}' uses it: stop that first"
        ))
    }

    /// Lets go of what guests that go on elsewhere have left open, before this daemon ends: the next must not open it.
    pub(super) async fn let_go_of_owed(&mut self) {
        let owed: Vec<String> = {
            let world = self.world();
            let owed = world.exports.values().filter(|e| e.server.owes());
            owed.map(|e| e.node()).collect()
        };
        for node in owed {
            if let Err(error) = self.change_activity(&node, false, || true).await {
                tracing::error!(node, %error, "it cannot be let go of, and its guest may be on another host: the next daemon opens it");
            }
        }
    }

    /// Makes nodes ready for requests again that were settled.
    async fn ready_again(&self, nodes: &[Arc<Node>]) {
        let Ok(thread) = self.world().any_thread() else {
            return;
        };
        for node in nodes.iter().rev() {
            let there = node.clone();
            let done = thread.run_async(move |_| async move { there.activate().await });
            if let Err(error) = done.await.map_err(std::io::Error::other).flatten() {
                tracing::error!(node = node.name(), %error, "cannot be made ready again");
            }
        }
    }

    /// The logical blocks of the exports that a node is below.
    pub(super) fn block_sizes(&self, name: &str) -> Vec<(String, u64)> {
        let world = self.world();
        let (_, above) = world.graph.above(name);
        let exports = world.exports.iter();
        let exports = exports.filter(|(_, e)| above.iter().any(|n| n.name() == e.node()));
        exports
            .map(|(id, e)| (id.clone(), e.server.logical_block_size().into()))
            .collect()
    }

    pub(super) fn exports_changed(&mut self, name: &str, resized: bool) {
        for (id, _) in self.block_sizes(name) {
            if resized && let Ok(export) = self.world().export(&id) {
                export.server.config_changed();
            }
            self.events.push(Event::ExportChanged(id));
        }
    }
}
