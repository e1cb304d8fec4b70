//! Dirty bitmaps of nodes.

use std::sync::Arc;

use vdisk_api::{BitmapAction, BitmapOptions, Error, Reply, Result};
use vdisk_block::{Bitmap, Node, image_failed};

use super::{Control, Event};

/// A bitmap by its name.
pub fn find(node: &Node, name: &str) -> Result<Arc<Bitmap>> {
    node.bitmap(name).ok_or_else(|| {
        Error::not_found(format!(
            "node '{}' has no bitmap '{name}': see the list of bitmaps",
            node.name()
        ))
    })
}

/// A bitmap that no job has taken bits out of.
pub(super) fn free(node: &Node, name: &str) -> Result<Arc<Bitmap>> {
    let bitmap = find(node, name)?;
    match bitmap.user() {
        None => Ok(bitmap),
        Some(job) => Err(Error::in_use(format!(
            "bitmap '{name}' of node '{}' is used by job '{job}': wait for its end, or cancel it",
            node.name()
        ))),
    }
}

/// Bytes of memory that the bits of one bitmap, or of one job, may take. (The images have the same limit.)
const MAX_MEMORY: u64 = 256 << 20;

/// Refuses bits that would take too much memory: whoever asks for a granularity must not decide about the daemon's.
pub(super) fn check_memory(what: &str, size: u64, granularity: u64) -> Result<()> {
    let memory = |granularity: u64| size.div_ceil(granularity) / 8;
    if memory(granularity) <= MAX_MEMORY {
        return Ok(());
    }
    let mut enough = granularity;
    while memory(enough) > MAX_MEMORY {
        enough *= 2;
    }
    Err(Error::invalid(format!(
        "{what}: a granularity of {granularity} takes {} bytes of memory for a disk of {size} bytes, more than {MAX_MEMORY}: give at least {enough}",
        memory(granularity)
    )))
}

/// Whether the image of a node can keep a bitmap.
fn check_persistent(node: &Node, options: &BitmapOptions) -> Result<()> {
    let what = format!("bitmap '{}' of node '{}'", options.name, node.name());
    let header = node.image().map(|image| image.header());
    let problem = match header {
        None => "only qcow2 images keep bitmaps: leave out 'persistent'",
        Some(_) if node.is_read_only() => "the node is read-only: leave out 'persistent'",
        Some(h) if h.version < 3 => {
            "images of version 2 keep no bitmaps: make it version 3 with 'vdiskctl image amend'"
        }
        Some(h) if h.unknown_extensions > 0 => {
            "the image's header has extensions of an unknown kind, which would be lost: leave out 'persistent'"
        }
        Some(_) => return Ok(()),
    };
    Err(Error::not_supported(format!("{what}: {problem}")))
}

/// What an action before another one of a transaction does with a bitmap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Earlier {
    Added,
    Removed,
}

/// Whether an action can be done after others: `earlier` says of a name whether they have added or removed a bitmap of it.
pub(super) fn check_with(
    node: &Node,
    action: &BitmapAction,
    earlier: impl Fn(&str) -> Option<Earlier>,
) -> Result<()> {
    let free_by_then = |name: &str| match earlier(name) {
        Some(Earlier::Added) => Ok(()),
        Some(Earlier::Removed) => Err(Error::not_found(format!(
            "bitmap '{name}' of node '{}' is removed by an action before this one: leave one of them out",
            node.name()
        ))),
        None => free(node, name).map(|_| ()),
    };
    match action {
        BitmapAction::Add(options)
            if node.bitmap(&options.name).is_some()
                || earlier(&options.name) == Some(Earlier::Added) =>
        {
            Err(Error::exists(format!(
                "node '{}' has a bitmap '{}' already: choose another name, or remove it first",
                node.name(),
                options.name
            )))
        }
        BitmapAction::Add(options) => {
            let what = format!("bitmap '{}' of node '{}'", options.name, node.name());
            check_memory(&what, node.size(), options.granularity)?;
            match options.persistent {
                true => check_persistent(node, options),
                false => Ok(()),
            }
        }
        BitmapAction::Merge { name, sources } => {
            free_by_then(name)?;
            // What a job has taken out of a source would be missing.
            sources.iter().try_for_each(|s| free_by_then(s))
        }
        other => free_by_then(other.name()),
    }
}

/// Whether a node's image can keep all of these bitmaps together: each by itself was looked at already.
pub(super) fn check_together<'a>(
    node: &Node,
    actions: impl Iterator<Item = &'a BitmapAction>,
) -> Result<()> {
    let Some(image) = node.image() else {
        return Ok(());
    };
    let bytes = |granularity: u64| node.size().div_ceil(granularity).div_ceil(64) * 8;
    let mut room = image.room_for_bitmaps();
    for action in actions {
        match action {
            BitmapAction::Add(o) if o.persistent => {
                let needed = bytes(o.granularity);
                room = room.checked_sub(needed).ok_or_else(|| {
                    Error::invalid(format!(
                        "transaction: bitmap '{}' of node '{}' takes {needed} bytes of memory, and those before it leave {room}: give them larger granularities",
                        o.name,
                        node.name()
                    ))
                })?;
            }
            BitmapAction::Remove { name } => {
                let removed = node.bitmap(name).filter(|b| b.is_persistent());
                room += removed.map_or(0, |b| bytes(b.granularity()));
            }
            _ => {}
        }
    }
    Ok(())
}

/// Does it. Everything above is drained.
pub(super) fn apply(node: &Node, action: &BitmapAction) -> Result<()> {
    match action {
        BitmapAction::Add(o) if o.persistent => {
            let added = node.add_persistent_bitmap(&o.name, o.granularity, !o.disabled);
            let what = format!("bitmap '{}' of node '{}'", o.name, node.name());
            added.map_err(|e| image_failed(&what, &e))?;
        }
        BitmapAction::Add(o) => node.add_bitmap(&o.name, o.granularity, !o.disabled),
        BitmapAction::Remove { name } => node.remove_bitmap(name),
        BitmapAction::Clear { name } => {
            find(node, name)?.take();
        }
        BitmapAction::Enable { name, on } => find(node, name)?.set_recording(*on),
        BitmapAction::Merge { name, sources } => {
            let into = find(node, name)?;
            for source in sources {
                into.merge(&find(node, source)?.bits());
            }
        }
    }
    Ok(())
}

pub(super) fn event(node: &str, action: &BitmapAction) -> Event {
    let (node, name) = (node.to_owned(), action.name().to_owned());
    match action {
        BitmapAction::Add(_) => Event::BitmapAdded(node, name),
        BitmapAction::Remove { .. } => Event::BitmapRemoved(node, name),
        _ => Event::BitmapChanged(node, name),
    }
}

impl Control {
    pub(super) async fn bitmap(&mut self, name: &str, action: BitmapAction) -> Result<Reply> {
        let node = self.world().graph.node(name)?;
        self.world().graph.check_claim(name)?;
        check_with(&node, &action, |_| None)?;
        let (_, drained) = self.hold(name).await;
        apply(&node, &action)?;
        drop(drained);
        tracing::info!(node = name, bitmap = action.name(), ?action, "bitmap");
        self.events.push(event(name, &action));
        Ok(Reply::Done)
    }
}
