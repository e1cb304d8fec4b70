//! What an earlier daemon has left is taken up.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use vdisk_api::{
    Error, ExportOptions, IoThreadOptions, JobKind, JobOptions, JobSync, Map, QueuePlacement,
    Result, Secret, ThrottleLimits,
};
use vdisk_block::{Node, Opened, Plan, ROLES, StoredNode};
use vdisk_exports::Left;
use vdisk_exports::vhost_user::unwrap;

use super::{Control, State, StoredJob, StoredThread, children};

fn read_secret(fd: OwnedFd) -> io::Result<Secret> {
    use std::os::unix::fs::FileExt;
    let file = std::fs::File::from(fd);
    let mut bytes = vec![0; file.metadata()?.len() as usize];
    file.read_exact_at(&mut bytes, 0)?;
    Ok(Secret::new(bytes))
}

/// Whether a job that was interrupted does the same when it is started once more.
fn can_start_again(kind: &JobKind) -> bool {
    match kind {
        JobKind::Commit { .. } | JobKind::Stream { .. } | JobKind::Discard => true,
        // What was written meanwhile is in the source.
        JobKind::Mirror { sync, .. } => matches!(sync, JobSync::Full | JobSync::Top),
        _ => false,
    }
}

impl Control {
    /// Takes up what an earlier daemon has left: its state, and descriptors by name. A `fresh` one only takes up what is
    /// persistent, as the first one after a start of the machine does.
    pub(in crate::control) async fn restore(
        &mut self,
        mut left: Vec<(String, OwnedFd)>,
        fresh: bool,
    ) {
        let mut state = None;
        if let Err(e) = self.persistent.look() {
            self.problem(e);
        }
        if !fresh {
            match self.state.read() {
                Ok(found) => state = found,
                Err(e) => self.problem(e),
            }
        }
        let usual = state.as_ref().map(|s| s.usual_threads);
        if state.is_none() {
            match self.persistent.read() {
                Ok(found) => state = found,
                Err(e) => self.problem(e),
            }
        }
        let mut mine = Vec::new();
        if let Some(state) = state {
            if !fresh {
                mine = std::mem::take(&mut left);
            }
            let named = state.iothreads.iter().map(|t| t.name.clone()).collect();
            self.restore_threads(&state);
            self.remove_usual_threads(usual.unwrap_or(0), &named);
            self.restore_state(state, &mut mine).await;
        }
        self.events.clear();
        left.append(&mut mine);
        self.forget_all(left);
        let secrets = self.world().defaults.runtime.secrets.clone();
        if let Some(keeper) = &self.keeper {
            for id in secrets.ids().iter().filter(|id| !secrets.keeps_keys(id)) {
                super::keep_keys(&**keeper, &secrets, id);
            }
        }
    }

    fn restore_threads(&mut self, state: &State) {
        for thread in &state.iothreads {
            if let Err(e) = self.restore_thread(thread) {
                self.problem(e);
            }
        }
    }

    /// Threads that are there from the start and that the user had removed go, if there are others.
    fn remove_usual_threads(&mut self, usual: usize, named: &BTreeSet<String>) {
        let mut world = self.world();
        for name in (0..usual).map(|i| format!("io{i}")) {
            if world.threads.len() > 1
                && !named.contains(&name)
                && let Some(thread) = world.threads.remove(&name)
            {
                thread.stop();
            }
        }
    }

    fn problem(&mut self, error: Error) {
        tracing::error!(error = error.message, "not restored");
        self.world().problems.push(error.message);
    }

    async fn restore_state(&mut self, state: State, left: &mut Vec<(String, OwnedFd)>) {
        for (name, limits) in state.throttle_groups {
            let groups = self.world().defaults.runtime.throttle_groups.clone();
            match ThrottleLimits::from_map(&name, limits) {
                Ok(limits) => {
                    groups.set(&name, limits, &tokio::runtime::Handle::current());
                }
                Err(e) => self.problem(e),
            }
        }
        let descriptors = self.world().defaults.runtime.descriptors.clone();
        // On connections to servers somebody was in the middle of something: they end.
        let connections: Vec<String> = {
            let nodes = state
                .nodes
                .iter()
                .filter(|n| n.options.get("driver").and_then(|d| d.as_str()) == Some("nbd"));
            let files = nodes.filter_map(|n| n.options.get("filename")?.as_str());
            let numbers = files.filter_map(|f| f.strip_prefix("/dev/fdset/"));
            numbers.map(|n| format!("fd.{n}")).collect()
        };
        for (name, _) in left.extract_if(.., |(name, _)| connections.contains(name)) {
            if let Some(keeper) = &self.keeper {
                keeper.forget(&name);
            }
        }
        for (name, fd) in left.extract_if(.., |(name, _)| name.starts_with("fd.")) {
            let number = name.strip_prefix("fd.").and_then(|n| n.parse().ok());
            match (number, unwrap(fd.as_fd())) {
                (Some(number), Ok(fd)) => descriptors.restore(number, fd),
                (_, Err(e)) => self.problem(Error::io(format_args!("passed file '{name}'"), &e)),
                _ => {}
            }
        }
        for node in &state.nodes {
            let name = node.options.get("filename").and_then(|f| f.as_str());
            descriptors.reserve(name.unwrap_or_default());
        }
        let secrets = self.world().defaults.runtime.secrets.clone();
        for (name, fd) in left.extract_if(.., |(name, _)| name.starts_with("secret.")) {
            let id = name.strip_prefix("secret.").unwrap_or(&name);
            let what = format!("secret '{id}'");
            if secrets.get(id).is_ok() {
                continue;
            }
            let secret = read_secret(fd)
                .map_err(|e| Error::io(&what, &e))
                .and_then(|secret| secrets.add(id, secret));
            if let Err(e) = secret {
                self.problem(e);
            }
        }
        // Those of credentials as well, which are the daemon's own each time.
        for (name, fd) in left.extract_if(.., |(name, _)| name.starts_with("keys.")) {
            let id = name.strip_prefix("keys.").unwrap_or(&name);
            match secrets.get(id) {
                Ok(_) => {
                    let taken = secrets.keep_keys(id, std::fs::File::from(fd));
                    if let Err(e) = taken {
                        self.problem(Error::io(format_args!("keys of secret '{id}'"), &e));
                    }
                }
                // Keys without the secret that they came of are nobody's any more.
                Err(_) => {
                    let _ = std::fs::File::from(fd).set_len(0);
                    if let Some(keeper) = &self.keeper {
                        keeper.forget(&name);
                    }
                }
            }
        }
        let nodes = state.nodes.len();
        let instead = self.restore_nodes(state.nodes).await;
        let exports = state.exports.len();
        for export in state.exports {
            let mut mine = Left::default();
            let rest = std::mem::take(left).into_iter().filter_map(|(name, fd)| {
                let fd = mine.take(&export.id, &name, fd)?;
                Some((name, fd))
            });
            *left = rest.collect();
            let names = mine.names();
            let mut options = export.options.clone();
            if let Some(name) = options.get_mut("node-name")
                && let Some(other) = name.as_str().and_then(|n| instead.get(n))
            {
                *name = other.clone().into();
            }
            if let Err(e) = self.restore_export(options, &export.threads, mine) {
                // Its front-end is to see that nobody is there.
                for name in names {
                    if let Some(keeper) = &self.keeper {
                        keeper.forget(&name);
                    }
                }
                self.lost.exports.push(export);
                self.problem(e);
            } else if export.persistent
                && let Ok(there) = self.world().export(&export.id)
            {
                there.set_persistent(true);
            }
        }
        let orphans = self.world().graph.remove_orphans();
        for node in orphans {
            if let Err(error) = self.close(&node).await {
                tracing::error!(node = node.name(), %error, "cannot be closed as it should be");
            }
        }
        for job in state.jobs {
            let what = format!("job '{}'", job.id);
            if let Err(e) = self.restore_job(job).await {
                self.problem(e.context(what));
            }
        }
        let problems = self.world().problems.len();
        tracing::info!(
            nodes,
            exports,
            problems,
            from = state.daemon,
            "state restored"
        );
    }

    fn restore_thread(&mut self, thread: &StoredThread) -> Result<()> {
        let poll_max = Duration::from_nanos(thread.poll_max_ns);
        let there = self.world().threads.get(&thread.name).cloned();
        if let Some(there) = &there
            && there.cpus() == thread.cpus
        {
            there.set_poll_max(poll_max);
            return Ok(());
        }
        // One that is there from the start, and that was added again with other CPUs: it stays if they cannot be had.
        self.world().threads.remove(&thread.name);
        let options = IoThreadOptions {
            name: thread.name.clone(),
            cpus: thread.cpus.clone(),
            poll_max: Some(poll_max),
        };
        match (self.add_iothread(options), there) {
            (Ok(_), Some(there)) => there.stop(),
            (Err(e), there) => {
                let before = there.map(|t| (thread.name.clone(), t));
                self.world().threads.extend(before);
                return Err(e);
            }
            _ => {}
        }
        Ok(())
    }

    /// Restores nodes, children first, as many at once as do not need each other. Returns for nodes that cannot be what they
    /// were which others have their places.
    async fn restore_nodes(&mut self, nodes: Vec<StoredNode>) -> BTreeMap<String, String> {
        let mut instead: BTreeMap<String, String> = BTreeMap::new();
        let mut left = Vec::new();
        for node in &nodes {
            // Nobody else gets a name that was made up for one that may be lost.
            self.world().graph.take_name(&node.name);
        }
        for mut node in nodes {
            for role in ROLES {
                if let Some(child) = node.options.get_mut(role)
                    && let Some(other) = child.as_str().and_then(|name| instead.get(name))
                {
                    *child = other.clone().into();
                }
            }
            let driver = node.options.get("driver").and_then(|d| d.as_str());
            match driver {
                Some("copy-before-write") => {
                    let file = node.options.get("file").and_then(|f| f.as_str());
                    instead.insert(node.name.clone(), file.unwrap_or_default().to_owned());
                }
                Some("snapshot-access") => {}
                _ => {
                    left.push(node);
                    continue;
                }
            }
            self.problem(Error::failed(format!(
                "node '{}': what it kept of one moment ended with the daemon that kept it: start that again",
                node.name
            )));
        }
        while !left.is_empty() {
            let names: BTreeSet<String> = left.iter().map(|n| n.name.clone()).collect();
            // Two that stand on the same are checked against each other.
            let mut used: BTreeSet<String> = BTreeSet::new();
            let waits = |node: &StoredNode| {
                let waits = children(node).any(|c| names.contains(c) || used.contains(c));
                if !waits {
                    used.extend(children(node).map(str::to_owned));
                }
                waits
            };
            let (later, mut now): (Vec<_>, Vec<_>) = left.into_iter().partition(waits);
            left = later;
            if now.is_empty() {
                // They stand on each other: no daemon has written that.
                now = std::mem::take(&mut left);
            }
            let plan = |node| self.world().graph.plan_stored(node);
            let plans: Vec<Result<Plan>> = now.iter().map(plan).collect();
            let opened = plans.into_iter().map(async |plan| match plan {
                Ok(plan) => self.open_ready(plan).await,
                Err(e) => Err(e),
            });
            let opened = join_all(opened).await;
            for (node, opened) in now.into_iter().zip(opened) {
                let restored = opened.and_then(|opened| self.restore_node(&node, opened));
                if let Err(e) = restored {
                    self.problem(e.context(format_args!("node '{}'", node.name)));
                    self.lost.nodes.push(node);
                }
            }
        }
        instead
    }

    fn restore_node(&mut self, stored: &StoredNode, opened: Opened) -> Result<()> {
        self.insert(opened)?;
        let mut world = self.world();
        let node = world.graph.node(&stored.name)?;
        if let Some(backing) = world.graph.backing(&stored.name)? {
            // The daemon may have ended before it was flushed.
            node.succeed(&backing);
        }
        world.graph.set_implicit(&stored.name, stored.implicit);
        drop(world);
        if node.is_active() {
            self.take_up(&node, stored);
        }
        Ok(())
    }

    /// Gives a node what was noted of it that is not in its options.
    pub(in crate::control) fn take_up(&self, node: &Arc<Node>, stored: &StoredNode) {
        if stored.write_threshold > 0 {
            self.tell_of_writes_beyond(node, stored.write_threshold);
        }
        for bitmap in &stored.bitmaps {
            tracing::warn!(
                node = stored.name,
                bitmap = bitmap.name,
                "what the bitmap had is lost: it has everything now, so that nothing is left out"
            );
            node.add_bitmap(&bitmap.name, bitmap.granularity, bitmap.recording);
            if let Some(bitmap) = node.bitmap(&bitmap.name) {
                bitmap.bits().set(&(0..node.size()));
            }
        }
    }

    /// `threads` has its I/O threads of before: where nothing else is asked for, it stays with them.
    fn restore_export(&mut self, options: Map, threads: &[String], mut left: Left) -> Result<()> {
        let listener = match options.contains_key("addr") {
            true => None,
            false => left.listener.take(),
        };
        let mut options = ExportOptions::from_map(options, listener)?;
        let are_there = {
            let world = self.world();
            threads.iter().all(|name| world.threads.contains_key(name))
        };
        if options.placement == QueuePlacement::default() && are_there {
            options.placement.round_robin = threads.to_vec();
        }
        self.add_export_with(options, left).map(|_| ())
    }

    async fn restore_job(&mut self, job: StoredJob) -> Result<()> {
        if job.node.is_empty() {
            return Err(Error::failed(
                "the daemon was restarted, and the image is not whole: start the job again",
            ));
        }
        let options = JobOptions::from_map(&job.operation, &job.node, job.options)?;
        if !can_start_again(&options.kind) {
            let error = Error::failed(format!(
                "the daemon was restarted, and a {} cannot go on: start it again",
                job.operation
            ));
            self.bury_job(options, error.clone());
            return Err(error);
        }
        tracing::info!(job = job.id, "the job begins again");
        self.start_job(options).await.map(|_| ())
    }
}
