//! Driver `blkdebug`: requests fail as they are told to, or wait until they are told to go on, for tests.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed, Ordering::SeqCst};

use tokio::sync::watch;
use vdisk_api::{
    BlkdebugOptions, Error, InjectError, InjectWhen, NodeOptions, Result, SuspendRequest,
};

use super::filter::{Filter, Gate, Request};
use super::{Direction, LocalFuture, OpenedDriver, SlowReason};
use crate::node::Node;

struct Blkdebug {
    rules: Vec<Rule>,
    suspensions: Vec<Suspension>,
    /// How many wait for requests in flight; one more until the node is in the graph.
    draining: AtomicU64,
}

struct Rule {
    what: InjectError,
    /// Requests that it was for, so far.
    seen: AtomicU64,
}

struct Suspension {
    what: SuspendRequest,
    /// Requests that it was for, so far.
    seen: AtomicU64,
    state: watch::Sender<Suspense>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Suspense {
    /// Its request has not come yet.
    Ahead,
    Waiting,
    Over,
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
    let suspension = |what: &SuspendRequest| Suspension {
        what: what.clone(),
        seen: AtomicU64::new(0),
        state: watch::Sender::new(Suspense::Ahead),
    };
    let gate = Blkdebug {
        rules: options.inject_error.iter().map(rule).collect(),
        suspensions: options.suspend.iter().map(suspension).collect(),
        draining: AtomicU64::new(1),
    };
    Ok(OpenedDriver {
        size: file.size(),
        read_only: node.read_only || file.is_read_only(),
        driver: Box::new(Filter::new(file, gate)),
    })
}

/// Whether a request is of a kind, and touches the byte at `at`.
fn is_for(when: InjectWhen, at: Option<u64>, request: Request, offset: u64, len: u64) -> bool {
    let kind = match when {
        InjectWhen::Any => true,
        InjectWhen::Read => request == Request::Read,
        InjectWhen::Write => request == Request::Write,
        InjectWhen::WriteZeroes => request == Request::WriteZeroes,
        InjectWhen::Discard => request == Request::Discard,
        InjectWhen::Flush => request == Request::Flush,
    };
    let here = at.is_none_or(|at| {
        request != Request::Flush && offset <= at && at < offset.saturating_add(len)
    });
    kind && here
}

impl Rule {
    fn is_for(&self, request: Request, offset: u64, len: u64) -> bool {
        is_for(self.what.when, self.what.offset, request, offset, len)
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

impl Suspension {
    fn is_for(&self, request: Request, offset: u64, len: u64) -> bool {
        is_for(self.what.when, self.what.offset, request, offset, len)
            && self.seen.fetch_add(1, Relaxed) == self.what.after
    }

    /// Nobody waits while somebody waits for requests in flight, who counts first and lets go then.
    async fn wait(&self, draining: &AtomicU64) {
        let waits = self.state.send_if_modified(|state| {
            let waits = *state == Suspense::Ahead;
            if waits {
                *state = Suspense::Waiting;
            }
            waits
        });
        if draining.load(SeqCst) > 0 {
            self.go_on();
        }
        if waits {
            let mut state = self.state.subscribe();
            // It cannot fail: the sender is here.
            let _ = state.wait_for(|state| *state == Suspense::Over).await;
        }
    }

    /// Has its request go on, if it waits.
    fn go_on(&self) -> bool {
        self.state.send_if_modified(|state| {
            let waits = *state == Suspense::Waiting;
            if waits {
                *state = Suspense::Over;
            }
            waits
        })
    }
}

impl Gate for Blkdebug {
    fn name(&self) -> &'static str {
        "blkdebug"
    }

    fn slow_reason(&self, _: Direction) -> Option<SlowReason> {
        let debugs = !self.rules.is_empty() || !self.suspensions.is_empty();
        debugs.then_some(SlowReason::Debugged)
    }

    fn enter(&self, request: Request, offset: u64, len: u64) -> LocalFuture<'_, io::Result<()>> {
        let mut rules = self.rules.iter();
        let struck = rules.find(|r| r.is_for(request, offset, len) && r.strikes());
        let errno = struck.map(|r| r.what.errno);
        let mut suspensions = self.suspensions.iter();
        let suspended = suspensions.find(|s| s.is_for(request, offset, len));
        Box::pin(async move {
            if let Some(suspension) = suspended
                && self.draining.load(SeqCst) == 0
            {
                suspension.wait(&self.draining).await;
            }
            match errno {
                None => Ok(()),
                Some(errno) => Err(io::Error::from_raw_os_error(errno)),
            }
        })
    }

    /// Whoever changes the graph does not wait for requests that are suspended.
    fn drain(&self, on: bool) {
        match on {
            true => self.draining.fetch_add(1, SeqCst),
            false => self.draining.fetch_sub(1, SeqCst),
        };
        for suspension in self.suspensions.iter().filter(|_| on) {
            suspension.go_on();
        }
    }

    fn enter_graph(&self) {
        self.draining.fetch_sub(1, SeqCst);
    }

    fn suspended(&self) -> Vec<String> {
        let all = self.suspensions.iter();
        all.filter(|s| *s.state.borrow() == Suspense::Waiting)
            .map(|s| s.what.tag.clone())
            .collect()
    }

    fn go_on(&self, tag: &str) -> bool {
        let mut all = self.suspensions.iter().filter(|s| s.what.tag == tag);
        all.any(|s| s.go_on())
    }
}
