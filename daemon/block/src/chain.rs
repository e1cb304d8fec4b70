//! A backing chain as a client remembers it from one drain to the next.

use std::sync::Arc;

use crate::drivers::{Direction, Resolved, SlowReason};
use crate::node::Node;

/// A node, and the nodes that it stands on one after the other. Requests go down it without asking each node for the one below, which
/// costs as much as to look the request up there.
///
/// Invariant: a node gets another backing node only while everything above is drained, and after a drain the chain is made
/// anew (see [`crate::backend::DrainGuard`]).
pub(crate) struct BackingChain {
    nodes: Vec<Arc<Node>>,
}

impl BackingChain {
    pub fn of(top: Arc<Node>) -> BackingChain {
        let mut nodes = vec![top];
        while let Some(below) = nodes.last().and_then(|n| n.backing()) {
            nodes.push(below);
        }
        BackingChain { nodes }
    }

    pub fn top(&self) -> &Arc<Node> {
        &self.nodes[0]
    }

    /// A request at `offset` is about to be resolved; see [`crate::Driver::anticipate`].
    #[inline]
    pub fn anticipate(&self, offset: u64) {
        for node in &self.nodes {
            if node.anticipate(offset) {
                break;
            }
        }
    }

    /// Tells `then` where the bytes of a request with these memory segments are; None if nobody knows.
    #[inline]
    pub fn resolve<R>(
        &self,
        direction: Direction,
        offset: u64,
        len: u64,
        segments: &[libc::iovec],
        then: impl FnOnce(Resolved<'_>) -> R,
    ) -> Option<R> {
        let (mut then, mut found) = (Some(then), None);
        let mut tell = |resolved: Resolved<'_>| {
            // Asked of the file itself: what is between, and what it stands on, may change.
            let resolved = match resolved {
                Resolved::Direct { file, .. } | Resolved::Encrypted { file, .. }
                    if !file.takes(segments) =>
                {
                    Resolved::Slow(SlowReason::Unaligned)
                }
                other => other,
            };
            found = then.take().map(|then| then(resolved));
        };
        for (depth, node) in self.nodes.iter().enumerate() {
            if depth > 0
                && let Some(end) = beyond(node, offset, len)
            {
                tell(end);
                return found;
            }
            if node.resolve_here(direction, offset, len, &mut tell) {
                return found;
            }
        }
        tell(Resolved::Zeroes);
        found
    }
}

/// Where the bytes of a read of an overlay are of which `backing` has not all: it may be shorter, and zeroes follow it.
#[inline]
pub(crate) fn beyond(backing: &Node, offset: u64, len: u64) -> Option<Resolved<'static>> {
    match backing.size() {
        size if offset + len <= size => None,
        size if offset < size => Some(Resolved::Slow(SlowReason::Scattered)),
        _ => Some(Resolved::Zeroes),
    }
}
