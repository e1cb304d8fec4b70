//! Driver `blkdebug`: requests fail as they are told to, for tests.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use vdisk_api::{BlkdebugOptions, Error, InjectError, InjectWhen, NodeOptions, Result};

use super::filter::{Filter, Gate, Request};
use super::{Direction, LocalFuture, OpenedDriver, SlowReason};
use crate::node::Node;

struct Blkdebug {
    rules: Vec<Rule>,
}

struct Rule {
    what: InjectError,
    /// Requests that it was for, so far.
    seen: AtomicU64,
}

pub(super) fn open(
    name: &str,
    node: &NodeOptions,
    options: &BlkdebugOptions,
    children: &[Arc<Node>],
) -> Result<OpenedDriver> {
    let file = children
        .first()
        .cloned()
        .ok_or_else(|| Error::failed(format!("node '{name}': driver blkdebug has no child")))?;
    let rule = |what: &InjectError| Rule {
        what: *what,
        seen: AtomicU64::new(0),
    };
    let gate = Blkdebug {
        rules: options.inject_error.iter().map(rule).collect(),
    };
    Ok(OpenedDriver {
        size: file.size(),
        read_only: node.read_only || file.is_read_only(),
        driver: Box::new(Filter::new(file, gate)),
    })
}

impl Rule {
    fn is_for(&self, request: Request, offset: u64, len: u64) -> bool {
        let kind = match self.what.when {
            InjectWhen::Any => true,
            InjectWhen::Read => request == Request::Read,
            InjectWhen::Write => request == Request::Write,
            InjectWhen::WriteZeroes => request == Request::WriteZeroes,
            InjectWhen::Discard => request == Request::Discard,
            InjectWhen::Flush => request == Request::Flush,
        };
        let here = self.what.offset.is_none_or(|at| {
            request != Request::Flush && offset <= at && at < offset.saturating_add(len)
        });
        kind && here
    }

    /// Whether a request that the rule is for fails.
    fn strikes(&self) -> bool {
        let number = self.seen.fetch_add(1, Relaxed);
        match self.what.once {
            true => number == self.what.after,
            false => number >= self.what.after,
        }
    }
}

impl Gate for Blkdebug {
    fn name(&self) -> &'static str {
        "blkdebug"
    }

    fn slow_reason(&self, _: Direction) -> Option<SlowReason> {
        (!self.rules.is_empty()).then_some(SlowReason::Debugged)
    }

    fn enter(&self, request: Request, offset: u64, len: u64) -> LocalFuture<'_, io::Result<()>> {
        let mut rules = self.rules.iter();
        let struck = rules.find(|r| r.is_for(request, offset, len) && r.strikes());
        let errno = struck.map(|r| r.what.errno);
        Box::pin(async move {
            match errno {
                None => Ok(()),
                Some(errno) => Err(io::Error::from_raw_os_error(errno)),
            }
        })
    }
}
