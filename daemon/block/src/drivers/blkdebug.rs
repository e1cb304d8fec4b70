//! Driver `blkdebug`: requests, and steps of the driver above, fail as they are told to, or wait until they are told to go on, for
//! tests.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed, Ordering::SeqCst};

use tokio::sync::watch;
use vdisk_api::{
    BlkdebugOptions, DebugPoint, Error, InjectError, InjectWhen, NodeOptions, Result, SetState,
    SuspendRequest,
};

use super::filter::{Filter, Gate, Request};
use super::{Direction, LocalFuture, OpenedDriver, SlowReason, Told};
use crate::node::Node;

struct Blkdebug {
    rules: Vec<Rule>,
    suspensions: Vec<Suspension>,
    set_states: Vec<SetState>,
    state: AtomicU64,
    /// How many wait for requests in flight; one more until the node is in the graph.
    draining: AtomicU64,
}

struct Rule {
    what: InjectError,
    /// Requests, or steps, that it was for, so far.
    seen: AtomicU64,
    /// Its step has come, and all requests fail from now on.
    struck: AtomicBool,
}

struct Suspension {
    what: SuspendRequest,
    /// Requests, or steps, that it was for, so far.
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
        struck: AtomicBool::new(false),
    };
    let suspension = |what: &SuspendRequest| Suspension {
        what: what.clone(),
        seen: AtomicU64::new(0),
        state: watch::Sender::new(Suspense::Ahead),
    };
    let gate = Blkdebug {
        rules: options.inject_error.iter().map(rule).collect(),
        suspensions: options.suspend.iter().map(suspension).collect(),
        set_states: options.set_state.clone(),
        state: AtomicU64::new(1),
        draining: AtomicU64::new(1),
    };
    Ok(OpenedDriver {
        size: file.size(),
        read_only: node.read_only || file.is_read_only(),
        driver: Box::new(Filter::new(file, gate)),
    })
}

/// What rules are about: a request, or a step, with the bytes that it touches (none for a flush).
#[derive(Clone, Copy)]
struct Happening {
    what: What,
    offset: u64,
    len: u64,
}

#[derive(Clone, Copy)]
enum What {
    Request(Request),
    Step(&'static str),
}

impl Happening {
    fn touches(&self, at: Option<u64>) -> bool {
        at.is_none_or(|at| self.offset <= at && at < self.offset.saturating_add(self.len))
    }

    fn is_of(&self, point: DebugPoint, when: InjectWhen) -> bool {
        match self.what {
            What::Step(event) => point.event == Some(event),
            What::Request(request) => {
                let kind = match when {
                    InjectWhen::Any => true,
                    InjectWhen::Read => request == Request::Read,
                    InjectWhen::Write => request == Request::Write,
                    InjectWhen::WriteZeroes => request == Request::WriteZeroes,
                    InjectWhen::Discard => request == Request::Discard,
                    InjectWhen::Flush => request == Request::Flush,
                };
                point.event.is_none() && kind
            }
        }
    }
}

impl Rule {
    /// Whether what happens is to fail.
    fn strikes(&self, happens: Happening) -> bool {
        if !happens.touches(self.what.offset) {
            return false;
        }
        if matches!(happens.what, What::Request(_)) && self.struck.load(Relaxed) {
            return true;
        }
        if !happens.is_of(self.what.point, self.what.when) {
            return false;
        }
        let number = self.seen.fetch_add(1, Relaxed);
        let strikes = match self.what.once {
            true => number == self.what.after,
            false => number >= self.what.after,
        };
        if strikes && !self.what.once && self.what.point.event.is_some() {
            self.struck.store(true, Relaxed);
        }
        strikes
    }
}

impl Suspension {
    fn is_for(&self, happens: Happening) -> bool {
        happens.touches(self.what.offset)
            && happens.is_of(self.what.point, self.what.when)
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

impl Blkdebug {
    /// None if no rule is about it.
    fn meet(&self, happens: Happening) -> Told<'_> {
        let state = self.state.load(Relaxed);
        let counts = |point: DebugPoint| point.state == 0 || point.state == state;
        let mut rules = self.rules.iter().filter(|r| counts(r.what.point));
        let errno = rules.find(|r| r.strikes(happens)).map(|r| r.what.errno);
        let mut suspensions = self.suspensions.iter().filter(|s| counts(s.what.point));
        let suspended = suspensions.find(|s| s.is_for(happens));
        let mut changes = self.set_states.iter().filter(|s| counts(s.point));
        if let Some(change) = changes.find(|s| happens.is_of(s.point, InjectWhen::Any)) {
            self.state.store(change.new_state, Relaxed);
        }
        if errno.is_none() && suspended.is_none() {
            return None;
        }
        Some(Box::pin(async move {
            if let Some(suspension) = suspended
                && self.draining.load(SeqCst) == 0
            {
                suspension.wait(&self.draining).await;
            }
            match errno {
                None => Ok(()),
                Some(errno) => Err(io::Error::from_raw_os_error(errno)),
            }
        }))
    }
}

impl Gate for Blkdebug {
    fn name(&self) -> &'static str {
        "blkdebug"
    }

    fn slow_reason(&self, _: Direction) -> Option<SlowReason> {
        let debugs =
            !self.rules.is_empty() || !self.suspensions.is_empty() || !self.set_states.is_empty();
        debugs.then_some(SlowReason::Debugged)
    }

    fn enter(&self, request: Request, offset: u64, len: u64) -> LocalFuture<'_, io::Result<()>> {
        // The steps that every node has.
        let steps: &[&'static str] = match request {
            Request::Flush => &["flush_to_os", "flush_to_disk"],
            Request::Write => &["pwritev"],
            Request::WriteZeroes => &["pwritev_zero"],
            Request::Read | Request::Discard => &[],
        };
        Box::pin(async move {
            let what = [What::Request(request)].into_iter();
            for what in what.chain(steps.iter().copied().map(What::Step)) {
                if let Some(met) = self.meet(Happening { what, offset, len }) {
                    met.await?;
                }
            }
            Ok(())
        })
    }

    fn step(&self, event: &'static str, offset: u64, len: u64) -> Told<'_> {
        let what = What::Step(event);
        self.meet(Happening { what, offset, len })
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

#[cfg(test)]
mod tests {
    /// Whatever step the engine has can be named in options, and is named once.
    #[test]
    fn each_step_of_the_engine_is_an_event() {
        let steps = vdisk_qcow2::Step::ALL.map(|s| s.name());
        for (i, name) in steps.iter().enumerate() {
            assert!(vdisk_api::DEBUG_EVENTS.contains(name), "{name}");
            assert!(!steps[..i].contains(name), "{name}");
        }
        // The others are those of every node.
        assert_eq!(vdisk_api::DEBUG_EVENTS.len(), steps.len() + 5);
    }
}
