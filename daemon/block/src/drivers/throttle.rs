//! Driver `throttle`: requests wait until their group has room for them.

use std::io;
use std::sync::Arc;

use vdisk_api::{Error, NodeOptions, Result, ThrottleOptions};

use super::filter::{Filter, Gate, Request};
use super::{Direction, LocalFuture, OpenedDriver, SlowReason};
use crate::node::Node;
use crate::runtime::Runtime;
use crate::throttle::Membership;

struct Throttle(Membership);

pub(super) fn open(
    name: &str,
    node: &NodeOptions,
    options: &ThrottleOptions,
    children: &[Arc<Node>],
    runtime: &Runtime,
) -> Result<OpenedDriver> {
    let file = children
        .first()
        .cloned()
        .ok_or_else(|| Error::failed(format!("node '{name}': driver throttle has no child")))?;
    let group = runtime
        .throttle_groups
        .get(&options.throttle_group)
        .map_err(|e| e.context(format_args!("node '{name}'")))?;
    Ok(OpenedDriver {
        size: file.size(),
        read_only: node.read_only || file.is_read_only(),
        driver: Box::new(Filter::new(file, Throttle(group.join()))),
    })
}

impl Gate for Throttle {
    fn name(&self) -> &'static str {
        "throttle"
    }

    fn slow_reason(&self, _: Direction) -> Option<SlowReason> {
        Some(SlowReason::Throttled)
    }

    fn enter(&self, request: Request, _: u64, len: u64) -> LocalFuture<'_, io::Result<()>> {
        Box::pin(async move {
            if request != Request::Flush {
                self.0.enter(request.direction(), len).await;
            }
            Ok(())
        })
    }

    fn drain(&self, on: bool) {
        self.0.drain(on);
    }

    fn close(&self) {
        // Clients may keep the node until their next request.
        self.0.leave();
    }
}
