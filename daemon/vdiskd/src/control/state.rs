//! What the next daemon needs to go on: everything that was configured, in one file in the runtime folder, which is replaced
//! after each command, and before guests go on after a change under them.
//!
//! An object that cannot be restored is a problem of its own (see [`World::problems`](super::World)); the rest comes up.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use serde::{Deserialize, Serialize};
use vdisk_api::{
    DriverOptions, Error, ExportOptions, IoThreadOptions, JobKind, JobOptions, JobSync, Map,
    NodeOptions, Result, Secret, ThrottleLimits,
};
use vdisk_block::{Opened, Plan, ROLES, StoredNode};
use vdisk_exports::{Keeper, Left};

use super::Control;

const VERSION: u32 = 1;

#[derive(Serialize, Deserialize)]
struct StoredThread {
    name: String,
    cpus: Vec<usize>,
    poll_max_ns: u64,
}

#[derive(Clone, Serialize, Deserialize)]
struct StoredExport {
    id: String,
    options: Map,
}

#[derive(Serialize, Deserialize)]
struct StoredJob {
    id: String,
    operation: String,
    node: String,
    options: Map,
}

/// What could not be restored: it is tried again by the next daemon, unless its name is given to something else.
#[derive(Default)]
pub(super) struct Lost {
    nodes: Vec<StoredNode>,
    exports: Vec<StoredExport>,
}

impl Lost {
    fn count(&self) -> usize {
        self.nodes.len() + self.exports.len()
    }

    /// Gives up a node, and what stands on it. False if there is none of this name.
    pub fn forget_node(&mut self, name: &str) -> bool {
        let before = self.nodes.len();
        self.nodes.retain(|n| n.name != name);
        let stands_on_it = |n: &StoredNode| children(n).any(|c| c == name);
        let above: Vec<String> = self
            .nodes
            .iter()
            .filter(|n| stands_on_it(n))
            .map(|n| n.name.clone())
            .collect();
        let found = self.nodes.len() < before;
        if found || !above.is_empty() {
            self.exports
                .retain(|e| e.options.get("node-name").and_then(|n| n.as_str()) != Some(name));
        }
        for name in above {
            self.forget_node(&name);
        }
        found
    }

    /// Gives up an export. False if there is none of this name.
    pub fn forget_export(&mut self, id: &str) -> bool {
        let before = self.exports.len();
        self.exports.retain(|e| e.id != id);
        self.exports.len() < before
    }
}

/// Names of a stored node's children.
fn children(node: &StoredNode) -> impl Iterator<Item = &str> {
    let options = ROLES.iter().filter_map(|role| node.options.get(*role));
    options.filter_map(|child| child.as_str())
}

#[derive(Serialize, Deserialize)]
struct State {
    version: u32,
    /// The daemon that wrote it.
    daemon: String,
    iothreads: Vec<StoredThread>,
    throttle_groups: BTreeMap<String, Map>,
    /// Children first.
    nodes: Vec<StoredNode>,
    exports: Vec<StoredExport>,
    jobs: Vec<StoredJob>,
}

/// The file of the state, and what it has.
#[derive(Default)]
pub(super) struct StateFile {
    path: Option<PathBuf>,
    content: Vec<u8>,
}

impl StateFile {
    pub fn in_folder(dir: Option<&Path>) -> StateFile {
        StateFile {
            path: dir.map(|d| d.join("state.json")),
            content: Vec::new(),
        }
    }

    /// Takes the space that the state needs when it has grown a little, so that writing it does not fail under guests that wait.
    pub fn reserve(&self) -> Result<()> {
        const MORE: u64 = 64 << 10;
        let Some(path) = &self.path else {
            return Ok(());
        };
        let new = path.with_extension("new");
        let reserved = open_new(&new).and_then(|file| {
            let len = self.content.len() as u64 + MORE;
            Ok(rustix::fs::fallocate(
                &file,
                rustix::fs::FallocateFlags::empty(),
                0,
                len,
            )?)
        });
        reserved.map_err(|e| {
            Error::io(
                format_args!(
                    "the state '{}' cannot be written, and nothing is changed that the next daemon must know",
                    path.display()
                ),
                &e,
            )
        })
    }

    /// Nothing is written any more.
    pub fn close(&mut self) {
        self.path = None;
    }

    fn read(&self) -> Result<Option<State>> {
        let Some(path) = &self.path else {
            return Ok(None);
        };
        let what = format!("state '{}'", path.display());
        let text = match std::fs::read(path) {
            Ok(text) => text,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(Error::io(format_args!("{what} cannot be read"), &e)),
        };
        let refused = |why: String| {
            // It may be of use to somebody.
            let aside = path.with_extension("bad");
            let _ = std::fs::rename(path, &aside);
            Error::failed(format!(
                "{what} {why}: it is kept as '{}', and nothing of it is restored",
                aside.display()
            ))
        };
        #[derive(Deserialize)]
        struct Version {
            version: u32,
        }
        let version: Version =
            serde_json::from_slice(&text).map_err(|e| refused(format!("is damaged ({e})")))?;
        if version.version != VERSION {
            return Err(refused(format!(
                "has version {}, and this daemon knows {VERSION}",
                version.version
            )));
        }
        let state = serde_json::from_slice(&text);
        state.map_err(|e| refused(format!("is damaged ({e})")))
    }

    /// Replaces the file, if that says something new.
    fn write(&mut self, content: Vec<u8>) -> io::Result<()> {
        let Some(path) = self.path.as_ref().filter(|_| content != self.content) else {
            return Ok(());
        };
        let new = path.with_extension("new");
        let mut file = open_new(&new)?;
        file.write_all(&content)?;
        file.set_len(content.len() as u64)?;
        std::fs::rename(&new, path)?;
        self.content = content;
        Ok(())
    }
}

/// The file that takes the state's place, with the space that was taken for it.
fn open_new(path: &Path) -> io::Result<std::fs::File> {
    std::fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
}

/// Gives a secret to a keeper.
pub(super) fn keep_secret(keeper: &dyn Keeper, id: &str, secret: &Secret) -> io::Result<()> {
    let fd = rustix::fs::memfd_create("vdiskd-secret", rustix::fs::MemfdFlags::CLOEXEC)?;
    let mut file = std::fs::File::from(fd);
    file.write_all(secret.bytes())?;
    keeper.forget(&secret_name(id));
    keeper.keep(&secret_name(id), std::os::fd::AsFd::as_fd(&file))
}

pub(super) fn secret_name(id: &str) -> String {
    format!("secret.{id}")
}

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
    /// Writes down what there is.
    pub(super) fn save(&mut self) {
        let state = {
            let world = self.world();
            let threads = world.threads.values().map(|t| StoredThread {
                name: t.name().to_owned(),
                cpus: t.cpus().to_vec(),
                poll_max_ns: t.poll_max().as_nanos() as u64,
            });
            let groups = world.defaults.runtime.throttle_groups.list();
            let groups = groups
                .iter()
                .map(|g| (g.name().to_owned(), g.limits().to_map()));
            let exports = world.exports.iter().map(|(id, e)| {
                let mut options = e.given.clone();
                options.insert("node-name".into(), e.node().into());
                StoredExport {
                    id: id.clone(),
                    options,
                }
            });
            let lost = &self.lost;
            let mut nodes = world.graph.stored();
            nodes.extend(lost.nodes.iter().cloned());
            let lost_exports = lost.exports.iter().cloned();
            let jobs = world.jobs.values().filter(|j| j.is_to_go_on());
            let jobs = jobs.map(|j| StoredJob {
                id: j.id().to_owned(),
                operation: j.options.kind.name().to_owned(),
                node: j.options.node.clone(),
                options: j.options.given.clone(),
            });
            State {
                version: VERSION,
                daemon: env!("CARGO_PKG_VERSION").to_owned(),
                iothreads: threads.collect(),
                throttle_groups: groups.collect(),
                nodes,
                exports: exports.chain(lost_exports).collect(),
                jobs: jobs.collect(),
            }
        };
        self.world().lost = self.lost.count();
        let written = serde_json::to_vec_pretty(&state)
            .map_err(io::Error::from)
            .and_then(|content| self.state.write(content));
        if let Err(error) = written {
            tracing::error!(%error, "the state cannot be written: what was configured since is lost if the daemon restarts");
        }
    }

    /// Takes up what an earlier daemon has left: its state, and descriptors by name.
    pub(super) async fn restore(&mut self, mut left: Vec<(String, OwnedFd)>) {
        let state = match self.state.read() {
            Ok(state) => state,
            Err(e) => {
                self.problem(e);
                None
            }
        };
        if let Some(state) = state {
            self.restore_state(state, &mut left).await;
        }
        self.events.clear();
        self.forget_all(left);
    }

    /// Gives up what is left, and writes down what there is.
    pub(super) fn forget_all(&mut self, left: Vec<(String, OwnedFd)>) {
        if let Some(keeper) = &self.keeper {
            for (name, _) in left {
                tracing::warn!(name, "a descriptor that was kept is of no use any more");
                keeper.forget(&name);
            }
        }
        self.save();
    }

    fn problem(&mut self, error: Error) {
        tracing::error!(error = error.message, "not restored");
        self.world().problems.push(error.message);
    }

    async fn restore_state(&mut self, state: State, left: &mut Vec<(String, OwnedFd)>) {
        for thread in state.iothreads {
            if let Err(e) = self.restore_thread(thread) {
                self.problem(e);
            }
        }
        for (name, limits) in state.throttle_groups {
            let groups = self.world().defaults.runtime.throttle_groups.clone();
            match ThrottleLimits::from_map(&name, limits) {
                Ok(limits) => {
                    groups.set(&name, limits, &tokio::runtime::Handle::current());
                }
                Err(e) => self.problem(e),
            }
        }
        let secrets = self.world().defaults.runtime.secrets.clone();
        for (name, fd) in left.extract_if(.., |(name, _)| name.starts_with("secret.")) {
            let id = name.strip_prefix("secret.").unwrap_or(&name);
            let what = format!("secret '{id}'");
            let secret = read_secret(fd)
                .map_err(|e| Error::io(&what, &e))
                .and_then(|secret| secrets.add(id, secret));
            if let Err(e) = secret {
                self.problem(e);
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
            if let Err(e) = self.restore_export(options, mine) {
                // Its front-end is to see that nobody is there.
                for name in names {
                    if let Some(keeper) = &self.keeper {
                        keeper.forget(&name);
                    }
                }
                self.lost.exports.push(export);
                self.problem(e);
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

    fn restore_thread(&mut self, thread: StoredThread) -> Result<()> {
        let poll_max = Duration::from_nanos(thread.poll_max_ns);
        let there = self.world().threads.get(&thread.name).cloned();
        if let Some(there) = there
            && there.cpus() == thread.cpus
        {
            there.set_poll_max(poll_max);
            return Ok(());
        }
        let options = IoThreadOptions {
            name: thread.name,
            cpus: thread.cpus,
            poll_max: Some(poll_max),
        };
        self.add_iothread(options).map(|_| ())
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
            for option in node.options.values_mut() {
                if let Some(other) = option.as_str().and_then(|name| instead.get(name)) {
                    *option = other.clone().into();
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
            let plans: Vec<Result<Plan>> = now.iter().map(|node| self.plan_stored(node)).collect();
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

    fn plan_stored(&self, stored: &StoredNode) -> Result<Plan> {
        let mut options = NodeOptions::restored(&stored.name, stored.options.clone())?;
        if let DriverOptions::File(file) = &mut options.driver {
            file.whole_blocks = stored.whole_blocks;
        }
        self.world().graph.plan(options)
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
        if stored.write_threshold > 0 {
            self.tell_of_writes_beyond(&node, stored.write_threshold);
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
        Ok(())
    }

    fn restore_export(&mut self, options: Map, mut left: Left) -> Result<()> {
        let listener = match options.contains_key("addr") {
            true => None,
            false => left.listener.take(),
        };
        let options = ExportOptions::from_map(options, listener)?;
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

/// A keeper that is shared.
pub type SharedKeeper = Option<Arc<dyn Keeper>>;

#[cfg(test)]
mod tests {
    use super::*;

    /// As the first daemon that had a state wrote it: each one after it must be able to go on from there.
    const FIRST: &str = r##"{"version": 1, "daemon": "0.1.0",
        "iothreads": [{"name": "io0", "cpus": [], "poll_max_ns": 32000}],
        "throttle_groups": {"gold": {"iops-total": 5}},
        "nodes": [{"name": "#block1", "implicit": true, "whole_blocks": true, "bitmaps": [],
                   "options": {"driver": "file", "filename": "/a", "read-only": false}},
                  {"name": "a", "implicit": false, "whole_blocks": false,
                   "bitmaps": [{"name": "b", "granularity": 65536, "recording": true}],
                   "options": {"driver": "qcow2", "file": "#block1"}}],
        "exports": [{"id": "e", "options": {"node-name": "a"}}],
        "jobs": [{"id": "j", "operation": "stream", "node": "a", "options": {}}]}"##;

    #[test]
    fn the_first_states_can_still_be_read() {
        let state: State = serde_json::from_str(FIRST).unwrap();
        assert_eq!((state.nodes.len(), state.exports.len()), (2, 1));
    }

    #[test]
    fn what_is_lost_goes_with_what_it_stands_on() {
        let state: State = serde_json::from_str(FIRST).unwrap();
        let lost = || Lost {
            nodes: state.nodes.clone(),
            exports: state.exports.clone(),
        };
        let mut all = lost();
        assert!(!all.forget_node("x") && all.count() == 3);
        assert!(all.forget_node("#block1") && all.count() == 0);
        let mut above = lost();
        assert!(above.forget_node("a") && above.count() == 1);
        assert!(lost().forget_export("e") && !lost().forget_export("a"));
    }
}
