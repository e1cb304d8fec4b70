//! Driver `copy-on-read`: what is read from the backing file of the image below stays in the image.

use std::io;
use std::sync::Arc;

use vdisk_api::{CopyOnReadOptions, Error, NodeOptions, Result};
use vdisk_io::IoVecs;

use super::filter::{Filter, Gate};
use super::{Direction, LocalFuture, OpenedDriver, SlowReason};
use crate::node::Node;

struct CopyOnRead;

/// Bytes that are kept at a time.
const CHUNK: usize = 1 << 20;

pub(super) fn open(
    name: &str,
    node: &NodeOptions,
    _: &CopyOnReadOptions,
    children: &[Arc<Node>],
) -> Result<OpenedDriver> {
    let what = format!("node '{name}'");
    let file = children
        .first()
        .cloned()
        .ok_or_else(|| Error::failed(format!("{what}: driver copy-on-read has no child")))?;
    if file.image().is_none() {
        return Err(Error::invalid(format!(
            "{what}: its child '{}' has driver '{}', which has no backing file that something could be copied from: give a qcow2 image",
            file.name(),
            file.driver_name()
        )));
    }
    if file.is_read_only() {
        return Err(Error::invalid(format!(
            "{what}: its child '{}' is read-only, and nothing can be copied into it: add that without read-only",
            file.name()
        )));
    }
    Ok(OpenedDriver {
        size: file.size(),
        read_only: node.read_only,
        driver: Box::new(Filter::new(file, CopyOnRead)),
    })
}

/// Keeps what was read from `offset` on where the image has nothing of its own.
async fn keep(file: &Node, offset: u64, data: &IoVecs) -> io::Result<()> {
    let (mut at, end) = (offset, offset + data.len() as u64);
    while at < end {
        let status = file.status(at, end - at, None).await?;
        if !status.own {
            let data = data.slice((at - offset) as usize, status.len as usize);
            let data = (!status.zero).then_some(data);
            file.before_step("cor_write", at, status.len).await?;
            file.populate(at, status.len, data).await?;
        }
        at += status.len;
    }
    Ok(())
}

impl Gate for CopyOnRead {
    fn name(&self) -> &'static str {
        "copy-on-read"
    }

    fn slow_reason(&self, direction: Direction) -> Option<SlowReason> {
        (direction == Direction::Read).then_some(SlowReason::CopiedOnRead)
    }

    fn read<'a>(
        &'a self,
        file: Arc<Node>,
        offset: u64,
        iov: IoVecs,
    ) -> LocalFuture<'a, io::Result<()>> {
        Box::pin(async move {
            for done in (0..iov.len()).step_by(CHUNK) {
                let part = iov.slice(done, CHUNK.min(iov.len() - done));
                let at = offset + done as u64;
                let own = file.status(at, part.len() as u64, None).await?;
                if own.own && own.len == part.len() as u64 {
                    file.read(at, part).await?;
                    continue;
                }
                // Nobody else can change this one before it is kept.
                let copy = IoVecs::zeroed(part.len(), 4096);
                file.read(at, copy.clone()).await?;
                part.copy_from(&copy);
                if let Err(error) = keep(&file, at, &copy).await {
                    tracing::warn!(node = file.name(), %error, "what was read cannot be kept");
                }
            }
            Ok(())
        })
    }
}
