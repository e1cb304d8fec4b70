//! Throttle groups: limits that several nodes have together.
//!
//! Each limit is a leaky bucket: requests fill it with what they cost, and it empties at the rate of the limit. A request may go
//! when the bucket has room. Without bursts a bucket holds what a tenth of a second leaks; with bursts, what may be used up
//! in one, and a second bucket holds the rate of the burst itself.
//!
//! Members have the same share, however many of their requests wait: of those that wait, a request of the member goes next that has
//! used the least of the group's time, and one that comes from a member which is behind those that wait goes at once (a member with one
//! request at a time would always come too late for its turn otherwise). The buckets then hold more than they have room for, and all
//! wait until that has leaked.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use tokio::runtime::Handle;
use tokio::sync::{Notify, oneshot};
use vdisk_api::{Error, Limit, Result, ThrottleLimits};

use crate::drivers::Direction;

/// Seconds of the average rate that may be used at once where there are no bursts, and of the burst rate within a burst.
const SLACK: f64 = 0.1;

/// Seconds of the group's time by which a member can be behind the others: what it did not use before is given up.
const CREDIT: f64 = 0.05;

#[derive(Clone, Copy, Default)]
struct Bucket {
    limit: Limit,
    /// Units.
    level: f64,
    burst: f64,
}

impl Bucket {
    fn leak(&mut self, seconds: f64) {
        self.level = (self.level - self.limit.average as f64 * seconds).max(0.0);
        self.burst = (self.burst - self.limit.max as f64 * seconds).max(0.0);
    }

    /// Returns how many seconds of its rate that is.
    fn fill(&mut self, units: f64) -> f64 {
        if self.limit.average == 0 {
            return 0.0;
        }
        self.level += units;
        self.burst += units;
        units / self.limit.average as f64
    }

    /// Seconds until the next request may go.
    fn wait(&self) -> f64 {
        let Limit {
            average,
            max,
            length,
        } = self.limit;
        if average == 0 {
            return 0.0;
        }
        let (average, max) = (average as f64, max as f64);
        let room = if max > 0.0 {
            max * length as f64
        } else {
            average * SLACK
        };
        let mut wait = (self.level - room) / average;
        if max > 0.0 && length > 1 {
            wait = wait.max((self.burst - max * SLACK) / max);
        }
        wait.max(0.0)
    }
}

struct Waiter {
    bytes: u64,
    go: oneshot::Sender<()>,
}

#[derive(Default)]
struct Member {
    id: u64,
    /// Seconds of the group's time for reads and for writes, from a beginning that means nothing.
    used: [f64; 2],
    /// Reads and writes that wait.
    waiting: [VecDeque<Waiter>; 2],
    /// Its requests must not wait: somebody waits for all of them.
    drains: u32,
}

struct State {
    limits: ThrottleLimits,
    /// Bytes and requests: of reads and writes together, of reads, of writes.
    buckets: [[Bucket; 3]; 2],
    leaked: Instant,
    members: Vec<Member>,
    next_id: u64,
    /// Somebody lets waiting requests go.
    pumping: bool,
}

/// See the module.
pub struct ThrottleGroup {
    name: String,
    state: Mutex<State>,
    /// Something changed that the waiting was computed from.
    changed: Notify,
    runtime: Handle,
}

fn index(direction: Direction) -> usize {
    match direction {
        Direction::Read => 0,
        Direction::Write => 1,
    }
}

impl State {
    fn new(limits: ThrottleLimits) -> State {
        let mut state = State {
            limits,
            buckets: Default::default(),
            leaked: Instant::now(),
            members: Vec::new(),
            next_id: 0,
            pumping: false,
        };
        state.set(limits);
        state
    }

    fn set(&mut self, limits: ThrottleLimits) {
        self.limits = limits;
        for (kind, new) in [limits.bps, limits.iops].iter().enumerate() {
            for (bucket, limit) in self.buckets[kind].iter_mut().zip(new) {
                // What a bucket held under another limit says nothing about this one.
                if bucket.limit != *limit {
                    *bucket = Bucket {
                        limit: *limit,
                        ..Bucket::default()
                    };
                }
            }
        }
    }

    fn leak(&mut self) {
        let now = Instant::now();
        let seconds = now.duration_since(self.leaked).as_secs_f64();
        self.leaked = now;
        for bucket in self.buckets.as_flattened_mut() {
            bucket.leak(seconds);
        }
    }

    fn wait(&self, direction: usize) -> f64 {
        let of = |kind: &[Bucket; 3]| kind[0].wait().max(kind[1 + direction].wait());
        self.buckets.iter().map(of).fold(0.0, f64::max)
    }

    /// A request of a member goes.
    fn fill(&mut self, id: u64, direction: usize, bytes: u64) {
        let requests = match self.limits.iops_size {
            0 => 1.0,
            size => (bytes as f64 / size as f64).max(1.0),
        };
        // What limits both directions was used for both.
        let (mut both, mut own) = (0.0f64, 0.0f64);
        for (kind, units) in self.buckets.iter_mut().zip([bytes as f64, requests]) {
            both = both.max(kind[0].fill(units));
            own = own.max(kind[1 + direction].fill(units));
        }
        if let Some(member) = self.member(id) {
            member.used[direction] += both.max(own);
            member.used[1 - direction] += both;
        }
    }

    /// Whether a request that comes goes at once.
    fn admits(&mut self, id: u64, direction: usize) -> bool {
        let used = self.members.iter().map(|m| m.used[direction]);
        let most = used.fold(0.0, f64::max);
        let Some(member) = self.member(id) else {
            return true;
        };
        member.used[direction] = member.used[direction].max(most - CREDIT);
        if member.drains > 0 {
            return true;
        }
        if !self.any_waits(direction) && self.wait(direction) <= 0.0 {
            return true;
        }
        // What all can be behind is all that can be too much.
        let debt = CREDIT * self.members.len() as f64;
        self.wait(direction) <= debt && self.is_behind(id, direction)
    }

    /// Whether a member without a request that waits has used less than all whose requests do.
    fn is_behind(&self, id: u64, direction: usize) -> bool {
        let (mut others, mut used) = (f64::INFINITY, f64::INFINITY);
        for member in &self.members {
            if member.id == id {
                if !member.waiting[direction].is_empty() {
                    return false;
                }
                used = member.used[direction];
            } else if !member.waiting[direction].is_empty() {
                others = others.min(member.used[direction]);
            }
        }
        others.is_finite() && used < others
    }

    fn any_waits(&self, direction: usize) -> bool {
        self.members
            .iter()
            .any(|m| !m.waiting[direction].is_empty())
    }

    /// The next request that waits, of the member that has used the least.
    fn next(&mut self, direction: usize) -> Option<(u64, Waiter)> {
        let waiting = self.members.iter_mut();
        let waiting = waiting.filter(|m| !m.waiting[direction].is_empty());
        let member = waiting.min_by(|a, b| a.used[direction].total_cmp(&b.used[direction]))?;
        Some((member.id, member.waiting[direction].pop_front()?))
    }

    /// Lets go what may go. Returns how long the next one has to wait; None if there is none.
    fn grant(&mut self) -> Option<Duration> {
        let mut next: Option<f64> = None;
        let mut any = true;
        while any {
            any = false;
            next = None;
            for direction in [0, 1] {
                if !self.any_waits(direction) {
                    continue;
                }
                let wait = self.wait(direction);
                if wait > 0.0 {
                    next = Some(next.map_or(wait, |n| n.min(wait)));
                    continue;
                }
                any = true;
                if let Some((id, waiter)) = self.next(direction)
                    && waiter.go.send(()).is_ok()
                {
                    self.fill(id, direction, waiter.bytes);
                }
            }
        }
        // Whoever changes the limits has this looked at again.
        next.map(|seconds| Duration::from_secs_f64(seconds.min(3600.0)))
    }

    fn member(&mut self, id: u64) -> Option<&mut Member> {
        self.members.iter_mut().find(|m| m.id == id)
    }
}

impl ThrottleGroup {
    /// `runtime` lets waiting requests go.
    pub fn new(name: &str, limits: ThrottleLimits, runtime: Handle) -> Arc<ThrottleGroup> {
        Arc::new(ThrottleGroup {
            name: name.to_owned(),
            state: Mutex::new(State::new(limits)),
            changed: Notify::new(),
            runtime,
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn limits(&self) -> ThrottleLimits {
        self.state().limits
    }

    /// Changes the limits; what waits is looked at anew.
    pub fn set_limits(&self, limits: ThrottleLimits) {
        let mut state = self.state();
        state.leak();
        state.set(limits);
        self.changed.notify_one();
    }

    pub fn members(&self) -> usize {
        self.state().members.len()
    }

    pub(crate) fn join(self: &Arc<Self>) -> Membership {
        let mut state = self.state();
        let id = state.next_id;
        state.next_id += 1;
        state.members.push(Member {
            id,
            ..Member::default()
        });
        Membership {
            group: self.clone(),
            id,
        }
    }

    async fn pump(self: Arc<Self>) {
        loop {
            let changed = self.changed.notified();
            let wait = {
                let mut state = self.state();
                state.leak();
                let wait = state.grant();
                state.pumping = wait.is_some();
                wait
            };
            let Some(wait) = wait else {
                return;
            };
            tokio::select! {
                _ = tokio::time::sleep(wait) => {}
                _ = changed => {}
            }
        }
    }
}

/// A node's place in a group.
pub(crate) struct Membership {
    group: Arc<ThrottleGroup>,
    id: u64,
}

impl Membership {
    /// Waits until a request of so many bytes may go.
    pub async fn enter(&self, direction: Direction, bytes: u64) {
        let direction = index(direction);
        let waits = {
            let mut state = self.group.state();
            state.leak();
            if state.admits(self.id, direction) {
                state.fill(self.id, direction, bytes);
                None
            } else {
                let (go, waits) = oneshot::channel();
                let is_first = !state.any_waits(direction);
                if let Some(member) = state.member(self.id) {
                    member.waiting[direction].push_back(Waiter { bytes, go });
                }
                if !state.pumping {
                    state.pumping = true;
                    self.group.runtime.spawn(self.group.clone().pump());
                } else if is_first {
                    // It may sleep until a request of the other direction may go.
                    self.group.changed.notify_one();
                }
                Some(waits)
            }
        };
        if let Some(waits) = waits {
            // A member that goes lets its requests go.
            let _ = waits.await;
        }
    }

    /// Somebody waits for all requests in flight, or does so no more: meanwhile none waits here.
    pub fn drain(&self, on: bool) {
        let mut state = self.group.state();
        let mut gone = Vec::new();
        if let Some(member) = state.member(self.id) {
            if !on {
                member.drains = member.drains.saturating_sub(1);
                return;
            }
            member.drains += 1;
            for (direction, waiting) in member.waiting.iter_mut().enumerate() {
                gone.extend(waiting.drain(..).map(|w| (direction, w)));
            }
        }
        for (direction, waiter) in gone {
            if waiter.go.send(()).is_ok() {
                state.fill(self.id, direction, waiter.bytes);
            }
        }
    }
}

impl Membership {
    /// Ends it: what waits goes, and what comes is not held back.
    pub fn leave(&self) {
        let mut state = self.group.state();
        state.members.retain(|m| m.id != self.id);
    }
}

impl Drop for Membership {
    fn drop(&mut self) {
        self.leave();
    }
}

/// All groups, by name. Clones are the same.
#[derive(Clone, Default)]
pub struct ThrottleGroups(Arc<Mutex<BTreeMap<String, Arc<ThrottleGroup>>>>);

impl std::fmt::Debug for ThrottleGroups {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.all().keys()).finish()
    }
}

impl ThrottleGroups {
    fn all(&self) -> MutexGuard<'_, BTreeMap<String, Arc<ThrottleGroup>>> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }

    pub fn list(&self) -> Vec<Arc<ThrottleGroup>> {
        self.all().values().cloned().collect()
    }

    /// Makes a group, or gives it other limits. True if it is new.
    pub fn set(&self, name: &str, limits: ThrottleLimits, runtime: &Handle) -> bool {
        let mut all = self.all();
        match all.get(name) {
            Some(group) => {
                group.set_limits(limits);
                false
            }
            None => {
                let group = ThrottleGroup::new(name, limits, runtime.clone());
                all.insert(name.to_owned(), group);
                true
            }
        }
    }

    pub fn get(&self, name: &str) -> Result<Arc<ThrottleGroup>> {
        self.all().get(name).cloned().ok_or_else(|| {
            Error::not_found(format!(
                "there is no throttle group '{name}': make it with 'vdiskctl throttle set', or see the list of groups"
            ))
        })
    }

    pub fn remove(&self, name: &str) -> Result<()> {
        let members = self.get(name)?.members();
        if members > 0 {
            return Err(Error::in_use(format!(
                "throttle group '{name}' limits {members} nodes: remove those first"
            )));
        }
        self.all().remove(name);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(average: u64, max: u64, length: u64) -> ThrottleLimits {
        let limit = Limit {
            average,
            max,
            length,
        };
        ThrottleLimits {
            iops: [limit, Limit::default(), Limit::default()],
            ..ThrottleLimits::default()
        }
    }

    /// The requests that go within so many seconds, of a time that the test makes.
    fn passes(state: &mut State, seconds: f64) -> u64 {
        let (mut t, mut n) = (0.0, 0);
        while t < seconds {
            while state.wait(0) <= 0.0 {
                state.fill(0, 0, 4096);
                n += 1;
            }
            for b in state.buckets.as_flattened_mut() {
                b.leak(0.001);
            }
            t += 0.001;
        }
        n
    }

    #[test]
    fn the_average_is_kept() {
        let mut s = State::new(limits(1000, 0, 1));
        let n = passes(&mut s, 10.0);
        assert!((10_000..=10_200).contains(&n), "{n}");
    }

    #[test]
    fn bursts_are_as_fast_and_as_long_as_allowed() {
        let mut s = State::new(limits(100, 1000, 5));
        let burst = passes(&mut s, 5.0);
        assert!((4_900..=5_200).contains(&burst), "{burst}");
        passes(&mut s, 2.0);
        let after = passes(&mut s, 10.0);
        assert!((950..=1_050).contains(&after), "{after}");
    }

    #[test]
    fn large_requests_count_by_their_size() {
        let mut l = limits(1000, 0, 1);
        l.iops_size = 1024;
        let n = passes(&mut State::new(l), 10.0);
        assert!((2_500..=2_560).contains(&n), "{n}");
    }

    #[test]
    fn what_was_used_under_another_limit_does_not_count() {
        let mut s = State::new(limits(1000, 0, 1));
        passes(&mut s, 100.0);
        s.set(limits(1000, 2000, 5));
        assert!(s.wait(0) <= 0.0);
        passes(&mut s, 100.0);
        s.set(limits(1, 0, 1));
        assert!(s.wait(0) <= 0.0);
    }

    /// A read is not held up by a write that has to wait for long.
    #[test]
    fn directions_do_not_wait_for_each_other() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()
            .unwrap();
        let second = |average| Limit {
            average,
            max: 0,
            length: 1,
        };
        let l = ThrottleLimits {
            bps: [Limit::default(), Limit::default(), second(1)],
            iops: [Limit::default(), second(100), Limit::default()],
            iops_size: 0,
        };
        let group = ThrottleGroup::new("g", l, runtime.handle().clone());
        let member = Arc::new(group.join());
        runtime.block_on(async {
            member.enter(Direction::Write, 1 << 20).await;
            let other = member.clone();
            let write = tokio::spawn(async move { other.enter(Direction::Write, 1).await });
            while !group.state().pumping {
                tokio::task::yield_now().await;
            }
            for _ in 0..30 {
                member.enter(Direction::Read, 512).await;
            }
            assert!(!write.is_finished());
            member.leave();
            write.await.unwrap();
        });
    }

    /// One with a single request at a time has its half beside one whose requests always wait, and both together have no more than the
    /// limit.
    #[test]
    fn members_have_the_same_share_at_any_depth() {
        for rate in [200, 5_000] {
            let mut s = State::new(limits(rate, 0, 1));
            for id in [0, 1] {
                s.members.push(Member {
                    id,
                    ..Member::default()
                });
            }
            let mut gone = [0u64; 2];
            let mut waits: Vec<(usize, oneshot::Receiver<()>)> = Vec::new();
            let come = |s: &mut State, gone: &mut [u64; 2], waits: &mut Vec<_>, id: usize| {
                if s.admits(id as u64, 1) {
                    s.fill(id as u64, 1, 4096);
                    gone[id] += 1;
                    return;
                }
                let (go, waiting) = oneshot::channel();
                s.members[id].waiting[1].push_back(Waiter { bytes: 4096, go });
                waits.push((id, waiting));
            };
            for _ in 0..10_000 {
                for b in s.buckets.as_flattened_mut() {
                    b.leak(0.001);
                }
                s.grant();
                // What has gone is answered five times in a millisecond.
                for _ in 0..5 {
                    waits.retain_mut(|(id, waiting)| {
                        let goes = waiting.try_recv().is_ok();
                        gone[*id] += u64::from(goes);
                        !goes
                    });
                    for (id, depth) in [(0, 1), (1, 32)] {
                        let waiting = waits.iter().filter(|w| w.0 == id).count();
                        for _ in waiting..depth {
                            come(&mut s, &mut gone, &mut waits, id);
                        }
                    }
                }
            }
            let (all, limit) = ((gone[0] + gone[1]) as f64, rate as f64 * (10.0 + SLACK));
            assert!((all / limit - 1.0).abs() < 0.01, "{gone:?}");
            assert!((gone[0] as f64 / all - 0.5).abs() < 0.02, "{gone:?}");
        }
    }

    /// Who writes as much as the limit of writes allows has its part of reads all the same, and others do not read more than theirs.
    #[test]
    fn what_was_used_for_writes_does_not_count_for_reads() {
        let each = Limit {
            average: 1000,
            max: 0,
            length: 1,
        };
        let l = ThrottleLimits {
            iops: [Limit::default(), each, each],
            ..ThrottleLimits::default()
        };
        let mut s = State::new(l);
        for id in 0..3 {
            s.members.push(Member {
                id,
                ..Member::default()
            });
        }
        let mut reads = [0u64; 3];
        // The first one's reads, of which there are always more.
        let mut waiting: VecDeque<oneshot::Receiver<()>> = VecDeque::new();
        for _ in 0..10_000 {
            for b in s.buckets.as_flattened_mut() {
                b.leak(0.001);
            }
            while s.wait(1) <= 0.0 {
                s.fill(0, 1, 4096);
            }
            while waiting.len() < 8 {
                let (go, waits) = oneshot::channel();
                s.members[0].waiting[0].push_back(Waiter { bytes: 4096, go });
                waiting.push_back(waits);
            }
            // Those of the others come one after the other, and are not kept if they have to wait.
            for id in [1, 2] {
                for _ in 0..5 {
                    if s.admits(id, 0) {
                        s.fill(id, 0, 4096);
                        reads[id as usize] += 1;
                    }
                }
            }
            s.grant();
            while waiting.front_mut().is_some_and(|w| w.try_recv().is_ok()) {
                waiting.pop_front();
                reads[0] += 1;
            }
        }
        let all: u64 = reads.iter().sum();
        assert!((9_900..=10_300).contains(&all), "{reads:?}");
        assert!(reads.iter().all(|n| *n > 2_500), "{reads:?}");
    }

    #[test]
    fn members_take_turns_however_many_of_their_requests_wait() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()
            .unwrap();
        let group = ThrottleGroup::new("g", limits(100, 0, 1), runtime.handle().clone());
        let (many, few) = (group.join(), group.join());
        let mut state = group.state();
        let mut queued = Vec::new();
        for (member, n) in [(&many, 100), (&few, 10)] {
            for _ in 0..n {
                let (go, waits) = oneshot::channel();
                let m = state.member(member.id).unwrap();
                m.waiting[0].push_back(Waiter { bytes: 512, go });
                queued.push((member.id, waits));
            }
        }
        // A tenth of a second, and what follows: the next twenty are ten of each.
        state.grant();
        let went = |queued: &mut Vec<(u64, oneshot::Receiver<()>)>, id: u64| {
            let all = queued.iter_mut().filter(|q| q.0 == id);
            all.map(|q| usize::from(q.1.try_recv().is_ok()))
                .sum::<usize>()
        };
        let (a, b) = (went(&mut queued, many.id), went(&mut queued, few.id));
        assert!(a.abs_diff(b) <= 1 && a + b >= 10, "{a} {b}");
        drop(state);
        // Somebody waits for the requests of one: they go.
        few.drain(true);
        assert_eq!(went(&mut queued, few.id) + b, 10);
        few.drain(false);
        drop(many);
        assert_eq!(group.members(), 1);
    }
}
