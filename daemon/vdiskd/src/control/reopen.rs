//! Nodes that are closed and opened again with other options, while whoever uses them waits.

use std::sync::Arc;

use vdisk_api::{Error, Map, Reply, Result};
use vdisk_block::{DrainGuard, Node};

use super::{Control, Event};

impl Control {
    /// Gives a node and its children other options: all of them, or it stays as it was. What stands on it is opened again as
    /// well, and what it stands on as far as nobody else uses it.
    pub(super) async fn open_again(&mut self, name: &str, change: Map) -> Result<Reply> {
        let (top, names, look) = {
            let world = self.world();
            world.graph.check_claim(name)?;
            let top = world.graph.top_above(name)?;
            // Another host may have its image.
            world.graph.check_active(&top)?;
            let names = world.graph.check_deactivation(&top)?;
            let notes = world.graph.stored_with(&names, name, &change)?;
            let look = world.graph.plan_look(&notes)?;
            (top, names, look)
        };
        self.reserve_state()?;
        // What cannot be opened so is found out before anything is closed.
        let looked = self.open(look).await?;
        self.give_up(looked).await;
        let node = self.world().graph.node(&top)?;
        let cannot = |e: &std::io::Error| {
            let what =
                format_args!("node '{name}' stays as it is: its last changes cannot be stored");
            Error::io(what, e)
        };
        self.flush_mostly(&node).await.map_err(|e| cannot(&e))?;
        let (_, drained) = self.hold(&top).await;
        self.flush(&node).await.map_err(|e| cannot(&e))?;
        let nodes = names.iter().map(|n| self.world().graph.node(n));
        let nodes: Vec<Arc<Node>> = nodes.collect::<Result<_>>()?;
        let (notes, planned) = {
            let world = self.world();
            let notes = world.graph.stored_with(&names, name, &change)?;
            (notes, world.graph.plan_deactivation(&names)?)
        };
        let settled = self.settle_all(&nodes).await;
        settled.map_err(|(_, e)| cannot(&e))?;
        self.put_away(planned, &drained);
        for node in &nodes {
            node.close().await;
        }
        let before = self.world().graph.note(notes);
        let mut opened = self.open_noted(&top, &nodes, &drained).await;
        if let Err(error) = &mut opened {
            self.world().graph.note(before);
            if let Err(again) = self.open_noted(&top, &nodes, &drained).await {
                tracing::error!(node = name, error = %again, "it cannot be opened again as it was, and is inactive");
                *error = Error::new(
                    error.kind,
                    format!(
                        "{}; and node '{top}' cannot be opened again as it was ({again}): it is inactive until it is made active (SetActive)",
                        error.message
                    ),
                );
            }
        }
        self.save();
        drop(drained);
        for name in &names {
            self.events.push(Event::NodeChanged(name.clone()));
        }
        let now = self.world().graph.node(&top)?;
        self.exports_changed(&top, now.size() != node.size());
        opened?;
        tracing::info!(node = name, ?change, "node opened again with other options");
        Ok(Reply::Done)
    }

    /// Opens nodes that were put away, by what is noted of them; `before` are those that were closed for it.
    async fn open_noted(
        &mut self,
        top: &str,
        before: &[Arc<Node>],
        drained: &[DrainGuard],
    ) -> Result<()> {
        let plan = self.world().graph.plan_opening_again(top)?;
        let opened = self.open_ready(plan).await?;
        let blocks = self.block_sizes(top);
        if let Some(new) = opened.nodes().last()
            && let Some((export, block)) =
                blocks.iter().find(|(_, b)| !new.size().is_multiple_of(*b))
        {
            let error = Error::invalid(format!(
                "node '{top}' would have {} bytes, which is not a multiple of the block size {block} of export '{export}'",
                new.size()
            ));
            self.give_up(opened).await;
            return Err(error);
        }
        for (_, new, noted) in self.put_in(opened, drained) {
            if noted.write_threshold > 0 {
                self.tell_of_writes_beyond(&new, noted.write_threshold);
            }
            let old = before.iter().find(|n| n.name() == new.name());
            for bitmap in &noted.bitmaps {
                new.add_bitmap(&bitmap.name, bitmap.granularity, bitmap.recording);
                let had = old.and_then(|old| old.bitmap(&bitmap.name));
                if let (Some(had), Some(bitmap)) = (had, new.bitmap(&bitmap.name)) {
                    bitmap.bits().merge(&had.bits());
                }
            }
            if new.name() == top
                && let Some(block) = blocks.iter().map(|(_, b)| *b).min()
            {
                new.announce_block_size(block);
            }
        }
        Ok(())
    }
}
