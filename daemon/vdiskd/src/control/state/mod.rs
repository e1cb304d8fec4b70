//! What the next daemon needs to go on: everything that was configured, in one file in the runtime folder, which is replaced
//! after each command, and before guests go on after a change under them. What of it is to outlive the machine as well (persistent
//! exports, with all that they stand on) is in another, in the state folder, which is on stable storage when it is replaced.
//!
//! An object that cannot be restored is a problem of its own (see [`World::problems`](super::World)); the rest comes up.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{File, TryLockError};
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use vdisk_api::{Error, Map, Result, Secret};
use vdisk_block::{Descriptors, ROLES, Secrets, StoredNode};
use vdisk_exports::Keeper;

use super::{Control, Event};
use crate::fd_store::FdStore;
use crate::handover;

mod restore;

const VERSION: u32 = 1;

#[derive(Clone, Serialize, Deserialize)]
struct StoredThread {
    name: String,
    cpus: Vec<usize>,
    poll_max_ns: u64,
}

#[derive(Clone, Serialize, Deserialize)]
struct StoredExport {
    id: String,
    options: Map,
    /// It outlives the machine.
    #[serde(default)]
    persistent: bool,
    /// The I/O threads that serve it, in the order of its queues.
    #[serde(default)]
    threads: Vec<String>,
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
    /// I/O threads that there were without anybody's asking: io0, io1, …
    #[serde(default)]
    usual_threads: usize,
}

impl State {
    /// What is to outlive the machine: persistent exports, with what they stand on.
    fn persistent(&self) -> State {
        let is_persistent = |e: &&StoredExport| e.persistent;
        let exports: Vec<StoredExport> =
            self.exports.iter().filter(is_persistent).cloned().collect();
        let mut needed: BTreeSet<String> = exports
            .iter()
            .filter_map(|e| Some(e.options.get("node-name")?.as_str()?.to_owned()))
            .collect();
        let mut nodes: Vec<StoredNode> = Vec::new();
        // Children come first: from the end, each node's parents were seen before it.
        for node in self.nodes.iter().rev() {
            if needed.contains(&node.name) {
                needed.extend(children(node).map(str::to_owned));
                nodes.push(node.clone());
            }
        }
        nodes.reverse();
        let text = |n: &StoredNode, key| Some(n.options.get(key)?.as_str()?.to_owned());
        let groups: BTreeSet<String> = nodes
            .iter()
            .filter_map(|n| text(n, "throttle-group"))
            .collect();
        let threads: BTreeSet<&String> = exports.iter().flat_map(|e| &e.threads).collect();
        State {
            version: VERSION,
            daemon: self.daemon.clone(),
            iothreads: self
                .iothreads
                .iter()
                .filter(|t| threads.contains(&t.name))
                .cloned()
                .collect(),
            throttle_groups: self
                .throttle_groups
                .iter()
                .filter(|(name, _)| groups.contains(*name))
                .map(|(name, limits)| (name.clone(), limits.clone()))
                .collect(),
            nodes,
            exports,
            jobs: Vec::new(),
            usual_threads: 0,
        }
    }
}

/// A file that has a state, and what it has.
#[derive(Default)]
pub(super) struct StateFile {
    path: Option<PathBuf>,
    content: Vec<u8>,
    /// It is on stable storage when it is replaced, and there is none of nothing.
    outlives_machine: bool,
    /// The folder is this daemon's. (The runtime folder is since before.)
    lock: Option<File>,
    /// What is in the file was found out: it may be replaced.
    is_known: bool,
}

impl StateFile {
    /// All that there is, in the runtime folder.
    pub fn in_runtime_folder(dir: Option<&Path>) -> StateFile {
        StateFile {
            path: dir.map(|d| d.join("state.json")),
            ..StateFile::default()
        }
    }

    /// What is persistent, in the state folder.
    pub fn in_state_folder(dir: Option<&Path>) -> StateFile {
        let path = dir.map(|d| d.join("persistent.json"));
        StateFile {
            content: Vec::new(),
            path,
            outlives_machine: true,
            lock: None,
            is_known: false,
        }
    }

    /// Takes the space that the state needs when it has grown a little, so that writing it does not fail under guests that wait.
    pub fn reserve(&self) -> Result<()> {
        const MORE: u64 = 64 << 10;
        let Some(path) = &self.path else {
            return Ok(());
        };
        if self.outlives_machine && self.content.is_empty() {
            return Ok(());
        }
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

    /// Makes the folder this daemon's alone, which must be there.
    fn lock(&mut self) -> io::Result<()> {
        let Some(path) = self.path.as_ref() else {
            return Ok(());
        };
        if !self.outlives_machine || self.lock.is_some() {
            return Ok(());
        }
        let file = open_new(&path.with_file_name("lock"))?;
        file.try_lock().map_err(|e| match e {
            TryLockError::Error(e) => e,
            TryLockError::WouldBlock => io::Error::new(
                io::ErrorKind::ResourceBusy,
                "another vdiskd has this folder: give another --state-dir",
            ),
        })?;
        self.lock = Some(file);
        Ok(())
    }

    /// Finds out what the file has that is there, before anything is written. Nothing, if the folder is another daemon's.
    ///
    /// # Errors
    /// If it is.
    pub fn look(&mut self) -> Result<()> {
        let Some(path) = self.path.clone() else {
            return Ok(());
        };
        let start = Instant::now();
        let locked = loop {
            match self.lock() {
                // One that its unit was stopped under while it served on, or that is being killed.
                Err(e)
                    if e.kind() == io::ErrorKind::ResourceBusy
                        && FdStore::is_there()
                        && start.elapsed() < handover::ENDING =>
                {
                    std::thread::sleep(Duration::from_millis(5));
                }
                other => break other,
            }
        };
        match locked {
            Err(e) if e.kind() == io::ErrorKind::ResourceBusy => {
                return Err(Error::io(format_args!("state '{}'", path.display()), &e));
            }
            // What cannot be written may be there to be read, and is not tried in vain: a write locks again.
            _ => {}
        }
        self.content = std::fs::read(&path).unwrap_or_default();
        self.is_known = true;
        Ok(())
    }

    fn read(&mut self) -> Result<Option<State>> {
        if self.outlives_machine && !self.is_known {
            return Ok(None);
        }
        let (Some(path), content) = (&self.path, &mut self.content) else {
            return Ok(None);
        };
        let what = format!("state '{}'", path.display());
        let text = match std::fs::read(path) {
            Ok(text) => text,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(Error::io(format_args!("{what} cannot be read"), &e)),
        };
        let mut refused = |why: String| {
            // It may be of use to somebody.
            content.clear();
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
        let Some(path) = self.path.clone().filter(|_| content != self.content) else {
            return Ok(());
        };
        if self.outlives_machine && !self.is_known {
            return Err(io::Error::new(
                io::ErrorKind::ResourceBusy,
                "another vdiskd had this folder when this one started: give another --state-dir, or restart this one",
            ));
        }
        let path = path.as_path();
        let new = path.with_extension("new");
        let folder = path.parent().unwrap_or(Path::new("/"));
        if content.is_empty() {
            self.lock()?;
            let _ = std::fs::remove_file(&new);
            match std::fs::remove_file(path) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
                _ => {}
            }
        } else {
            if self.outlives_machine {
                std::fs::DirBuilder::new()
                    .recursive(true)
                    .mode(0o700)
                    .create(folder)?;
                self.lock()?;
            }
            let mut file = open_new(&new)?;
            file.write_all(&content)?;
            file.set_len(content.len() as u64)?;
            if self.outlives_machine {
                file.sync_all()?;
            }
            std::fs::rename(&new, path)?;
        }
        if self.outlives_machine {
            std::fs::File::open(folder)?.sync_all()?;
        }
        self.content = content;
        Ok(())
    }

    /// Replaces the file by what `state` has; why not, if that cannot be.
    fn put(&mut self, state: &State) -> Option<String> {
        let content = match self.outlives_machine && state.exports.is_empty() {
            true => Ok(Vec::new()),
            false => serde_json::to_vec_pretty(state).map_err(io::Error::from),
        };
        let error = content.and_then(|content| self.write(content)).err()?;
        let path = self.path.clone().unwrap_or_default();
        Some(format!(
            "state '{}' cannot be written ({error}): what was configured since is lost if the {} restarts; see to its file system",
            path.display(),
            if self.outlives_machine {
                "machine"
            } else {
                "daemon"
            },
        ))
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

/// The files of nodes that the next daemon is going to open, as far as that can be told.
pub fn files_in_use(runtime_dir: Option<&Path>, state_dir: &Path) -> Vec<PathBuf> {
    let files = [
        StateFile::in_runtime_folder(runtime_dir),
        StateFile::in_state_folder(Some(state_dir)),
    ];
    let text = |file: &StateFile| std::fs::read(file.path.as_ref()?).ok();
    let states = files.iter().filter_map(text);
    let states = states.filter_map(|text| serde_json::from_slice::<State>(&text).ok());
    let nodes = states.flat_map(|state| state.nodes);
    nodes
        .filter_map(|n| Some(PathBuf::from(n.options.get("filename")?.as_str()?)))
        .collect()
}

/// Gives a secret to a keeper.
pub(super) fn keep_secret(keeper: &dyn Keeper, id: &str, secret: &Secret) -> io::Result<()> {
    let fd = rustix::fs::memfd_create("vdiskd-secret", rustix::fs::MemfdFlags::CLOEXEC)?;
    let mut file = std::fs::File::from(fd);
    file.write_all(secret.bytes())?;
    keeper.forget(&secret_name(id));
    keeper.keep(&secret_name(id), std::os::fd::AsFd::as_fd(&file))
}

/// Gives a keeper a file for the keys that a secret opens images with: guests that wait for a restart do not wait for passphrases.
pub(super) fn keep_keys(keeper: &dyn Keeper, secrets: &Secrets, id: &str) {
    let kept = rustix::fs::memfd_create("vdiskd-keys", rustix::fs::MemfdFlags::CLOEXEC)
        .map_err(io::Error::from)
        .and_then(|fd| {
            keeper.forget(&keys_name(id));
            keeper.keep(&keys_name(id), std::os::fd::AsFd::as_fd(&fd))?;
            secrets.keep_keys(id, std::fs::File::from(fd))
        });
    if let Err(error) = kept {
        tracing::warn!(secret = id, %error, "its keys are found out anew after a restart");
    }
}

/// What the descriptor of a passed file is kept as.
pub(super) fn descriptor_name(number: u64) -> String {
    format!("fd.{number}")
}

pub(super) fn keys_name(id: &str) -> String {
    format!("keys.{id}")
}

pub(super) fn secret_name(id: &str) -> String {
    format!("secret.{id}")
}

impl Control {
    /// Refuses an export that could not come back when the machine starts.
    pub(super) fn check_persistent(&self, id: &str) -> Result<()> {
        let mut state = self.state();
        state.exports.retain(|e| e.id == id);
        let state = state.persistent();
        if state
            .exports
            .iter()
            .any(|e| !e.options.contains_key("addr"))
        {
            return Err(Error::not_supported(format!(
                "export '{id}' has a socket that a caller passed, which ends with the daemon: give it a path, or one that systemd listens on (fd:NAME)"
            )));
        }
        let passed = |n: &&StoredNode| {
            let name = n.options.get("filename").and_then(|f| f.as_str());
            Descriptors::is_one(name.unwrap_or_default())
        };
        match state.nodes.iter().find(passed) {
            None => Ok(()),
            Some(node) => Err(Error::not_supported(format!(
                "export '{id}' stands on node '{}', whose file a caller passed open, which ends with the daemon: open it by its name",
                node.name
            ))),
        }
    }

    /// What there is.
    fn state(&self) -> State {
        {
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
                let mut threads: Vec<String> = Vec::new();
                for thread in e.server.threads() {
                    if threads.iter().all(|t| t != thread.name()) {
                        threads.push(thread.name().to_owned());
                    }
                }
                StoredExport {
                    id: id.clone(),
                    options,
                    persistent: e.is_persistent(),
                    threads,
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
                usual_threads: world.defaults.io_threads,
            }
        }
    }

    /// Writes down what there is.
    pub(super) fn save(&mut self) {
        let state = self.state();
        self.forget_descriptors(&state);
        let trouble: Vec<String> = [
            self.state.put(&state),
            self.persistent.put(&state.persistent()),
        ]
        .into_iter()
        .flatten()
        .collect();
        let mut world = self.world();
        world.lost = self.lost.count();
        if world.state_trouble == trouble {
            return;
        }
        world.state_trouble = trouble.clone();
        drop(world);
        match trouble.is_empty() {
            true => tracing::info!("the state can be written again"),
            false => trouble.iter().for_each(|error| tracing::error!("{error}")),
        }
        self.events.push(Event::ProblemsChanged);
    }

    /// Lets go of passed files that no node has any more.
    fn forget_descriptors(&self, state: &State) {
        let descriptors = self.world().defaults.runtime.descriptors.clone();
        let is_used = |name: &str| {
            let mut files = state.nodes.iter().map(|n| n.options.get("filename"));
            files.any(|f| f.and_then(|f| f.as_str()) == Some(name))
        };
        for number in descriptors.forget_unused(is_used) {
            if let Some(keeper) = &self.keeper {
                keeper.forget(&descriptor_name(number));
            }
        }
    }

    /// Why what is persistent cannot be written, if so.
    pub(super) fn persistent_trouble(&mut self) -> Option<String> {
        let path = self.persistent.path.as_ref()?.display().to_string();
        let world = self.world();
        world
            .state_trouble
            .iter()
            .find(|t| t.contains(&path))
            .cloned()
    }

    /// Takes the space that the state will need, see [`StateFile::reserve`].
    pub(super) fn reserve_state(&self) -> Result<()> {
        self.state.reserve()?;
        self.persistent.reserve()
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
    fn a_folder_that_was_anothers_is_not_written_when_that_one_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("persistent.json");
        std::fs::write(&path, "theirs").unwrap();
        let mut state: State = serde_json::from_str(FIRST).unwrap();
        state.exports[0].persistent = true;
        let mut first = StateFile::in_state_folder(Some(dir.path()));
        first.look().unwrap();
        let mut second = StateFile::in_state_folder(Some(dir.path()));
        assert!(second.look().is_err());
        drop(first);
        assert!(second.put(&state.persistent()).is_some());
        assert_eq!(std::fs::read(&path).unwrap(), b"theirs");
        // The next one finds out what is there, and may.
        let mut third = StateFile::in_state_folder(Some(dir.path()));
        third.look().unwrap();
        assert!(third.put(&state.persistent()).is_none());
        assert_ne!(std::fs::read(&path).unwrap(), b"theirs");
    }

    #[test]
    fn what_is_persistent_takes_along_what_it_stands_on() {
        let mut state: State = serde_json::from_str(FIRST).unwrap();
        assert!(state.persistent().exports.is_empty());
        let node = |name: &str, options: serde_json::Value| StoredNode {
            inactive: None,
            name: name.into(),
            implicit: false,
            whole_blocks: false,
            bitmaps: Vec::new(),
            write_threshold: 0,
            options: options.as_object().unwrap().clone(),
        };
        state
            .nodes
            .push(node("other", serde_json::json!({"driver": "null-co"})));
        state.nodes.push(node(
            "limited",
            serde_json::json!({"driver": "throttle", "file": "a", "throttle-group": "gold"}),
        ));
        state.throttle_groups.insert("silver".into(), Map::new());
        state.exports[0].persistent = true;
        state.exports[0].threads.push("io0".into());
        state.exports[0]
            .options
            .insert("node-name".into(), "limited".into());
        let kept = state.persistent();
        let names: Vec<&str> = kept.nodes.iter().map(|n| n.name.as_str()).collect();
        assert_eq!(names, ["#block1", "a", "limited"]);
        assert_eq!(kept.throttle_groups.keys().collect::<Vec<_>>(), ["gold"]);
        assert_eq!((kept.iothreads.len(), kept.jobs.len()), (1, 0));
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
