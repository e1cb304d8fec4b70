//! The graph: which nodes there are, what they stand on, and who uses them for what.

mod activity;
mod stored;

pub use stored::{StoredBitmap, StoredNode};

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use vdisk_api::{
    BackingRef, DriverOptions, Error, FILTERS, Map, NodeOptions, NodeRef, Result, Value,
};

use crate::backend::Backend;
use crate::node::Node;
use crate::permission::{Permissions, Use, image_child_use};
use crate::runtime::Runtime;

/// Something that uses a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Parent {
    Node(String),
    Export(String),
    Job(String),
}

impl std::fmt::Display for Parent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Parent::Node(name) => write!(f, "node '{name}'"),
            Parent::Export(id) => write!(f, "export '{id}'"),
            Parent::Job(id) => write!(f, "job '{id}'"),
        }
    }
}

struct User {
    parent: Parent,
    wants: Use,
    backend: Arc<Backend>,
}

struct Entry {
    node: Arc<Node>,
    /// (role, name), in the driver's order.
    children: Vec<(&'static str, String)>,
    /// Users that are not nodes.
    users: Vec<User>,
    /// Made in place for its parent, and removed with it.
    implicit: bool,
    claimed: Option<Claim>,
    /// It is about to be removed: another has taken its place.
    leaving: bool,
    /// Its options, with what was taken over from its parent.
    options: Map,
    /// What an inactive node will be made of again.
    noted: Option<StoredNode>,
}

/// A job changes what a node has, so that nobody else may use it from now on.
struct Claim {
    job: String,
    /// It must stay as it is, and nobody may even read it by way of what stands on it.
    still: bool,
}

/// A node as it is shown to people.
#[derive(Clone, Debug)]
pub struct NodeInfo {
    pub node: Arc<Node>,
    pub children: Vec<(&'static str, String)>,
    pub parents: Vec<Parent>,
    pub implicit: bool,
}

#[derive(Default)]
pub struct Graph {
    nodes: BTreeMap<String, Entry>,
    next_implicit: u64,
    runtime: Runtime,
}

struct Step {
    name: String,
    options: NodeOptions,
    children: Vec<(&'static str, Child)>,
    implicit: bool,
    opens: Opens,
}

/// What becomes of the storage of a new node.
enum Opens {
    Yes,
    /// It is looked at, and left alone.
    Looks,
    /// Enough is known of it.
    No(Box<StoredNode>),
}

enum Child {
    Existing(Arc<Node>),
    /// An earlier step of the same plan.
    Step(usize),
}

/// What is to be opened for a new node, children first.
pub struct Plan {
    steps: Vec<Step>,
    runtime: Runtime,
}

/// Opened nodes that are not part of the graph yet.
pub struct Opened {
    entries: Vec<(String, Entry)>,
}

impl Plan {
    pub fn is_empty(&self) -> bool {
        self.steps.is_empty()
    }

    /// Opens everything; may block. If one fails, those before it are returned for closing.
    pub fn open(self) -> std::result::Result<Opened, (Error, Opened)> {
        let mut opened = Opened {
            entries: Vec::new(),
        };
        // As they were opened, for what stands on them: some are only looked at.
        let mut nodes: Vec<Arc<Node>> = Vec::new();
        for step in self.steps {
            let children: Vec<Arc<Node>> = step
                .children
                .iter()
                .map(|(_, c)| match c {
                    Child::Existing(node) => node.clone(),
                    Child::Step(i) => nodes[*i].clone(),
                })
                .collect();
            let (found, node) = match step.open(&children, &self.runtime) {
                Ok(found) => found,
                Err(e) => return Err((e, opened)),
            };
            nodes.push(found);
            let roles = step.children.iter().map(|(role, _)| *role);
            let entry = Entry {
                noted: match step.opens {
                    Opens::No(noted) => Some(*noted),
                    Opens::Yes | Opens::Looks => None,
                },
                children: roles
                    .zip(children.iter().map(|c| c.name().to_owned()))
                    .collect(),
                node,
                users: Vec::new(),
                implicit: step.implicit,
                claimed: None,
                leaving: false,
                options: step.options.effective(),
            };
            opened.entries.push((step.name, entry));
        }
        Ok(opened)
    }
}

impl Opened {
    /// The nodes, children first.
    pub fn nodes(&self) -> impl Iterator<Item = &Arc<Node>> {
        self.entries.iter().map(|(_, e)| &e.node)
    }

    /// Gives up what was opened.
    pub async fn close(self) {
        for (_, entry) in self.entries.into_iter().rev() {
            entry.node.close().await;
        }
    }
}

/// The file of an image may end within a block: the image knows its size.
fn whole_blocks(file: &NodeRef) -> NodeRef {
    let mut file = file.clone();
    if let NodeRef::Options(options) = &mut file
        && let DriverOptions::File(f) = &mut options.driver
    {
        f.whole_blocks = true;
    }
    file
}

/// What a user does to nodes below its own: a job sees the writes to its node, and not those that come in further down.
fn below_of(user: &Parent, wants: Use) -> Use {
    match user {
        Parent::Job(_) => Use {
            shared: wants.shared.without(Permissions::WRITE),
            ..wants
        },
        Parent::Node(_) | Parent::Export(_) => wants,
    }
}

/// What children are to their nodes.
pub const ROLES: [&str; 4] = ["file", "data-file", "backing", "target"];

/// What is done to the node that a filter copies to.
const TARGET: Use = Use {
    taken: Permissions::CONSISTENT_READ.and(Permissions::WRITE),
    shared: Permissions::CONSISTENT_READ.and(Permissions::WRITE_UNCHANGED),
};

impl Graph {
    pub fn new(runtime: Runtime) -> Graph {
        Graph {
            runtime,
            ..Graph::default()
        }
    }

    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.nodes.keys().map(String::as_str)
    }

    fn entry(&self, name: &str) -> Result<&Entry> {
        self.nodes.get(name).ok_or_else(|| {
            Error::not_found(format!("there is no node '{name}': see the list of nodes"))
        })
    }

    pub fn node(&self, name: &str) -> Result<Arc<Node>> {
        Ok(self.entry(name)?.node.clone())
    }

    pub fn info(&self, name: &str) -> Result<NodeInfo> {
        let entry = self.entry(name)?;
        Ok(NodeInfo {
            node: entry.node.clone(),
            children: entry.children.clone(),
            parents: self.parents(name),
            implicit: entry.implicit,
        })
    }

    fn parents(&self, name: &str) -> Vec<Parent> {
        let nodes = self.parent_nodes(name).map(|n| Parent::Node(n.to_owned()));
        let users = self
            .nodes
            .get(name)
            .into_iter()
            .flat_map(|e| e.users.iter().map(|u| u.parent.clone()));
        nodes.chain(users).collect()
    }

    fn parent_nodes<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a str> {
        self.nodes
            .iter()
            .filter(move |(_, e)| e.children.iter().any(|(_, c)| c == name))
            .map(|(n, _)| n.as_str())
    }

    /// Plans a new node: names are checked and children found.
    pub fn plan(&mut self, options: NodeOptions) -> Result<Plan> {
        let mut plan = Plan {
            steps: Vec::new(),
            runtime: self.runtime.clone(),
        };
        self.plan_node(options, false, &mut plan)?;
        Ok(plan)
    }

    fn plan_node(&mut self, options: NodeOptions, child: bool, plan: &mut Plan) -> Result<usize> {
        let name = match &options.node_name {
            Some(name) => name.clone(),
            None => {
                self.next_implicit += 1;
                format!("#block{}", self.next_implicit)
            }
        };
        if self.nodes.contains_key(&name) || plan.steps.iter().any(|s| s.name == name) {
            return Err(Error::exists(format!(
                "there is a node '{name}' already: choose another node-name, or remove it first"
            )));
        }
        let mut children = Vec::new();
        let file = match &options.driver {
            DriverOptions::Raw(o) => Some(&o.file),
            DriverOptions::Luks(o) => Some(&o.file),
            DriverOptions::Throttle(o) => Some(&o.file),
            DriverOptions::CopyOnRead(o) => Some(&o.file),
            DriverOptions::CopyBeforeWrite(o) => Some(&o.file),
            DriverOptions::SnapshotAccess(o) => Some(&o.file),
            DriverOptions::Blkdebug(o) => Some(&o.file),
            DriverOptions::Qcow2(_)
            | DriverOptions::File(_)
            | DriverOptions::HostDevice(_)
            | DriverOptions::Nbd(_)
            | DriverOptions::NullCo(_) => None,
        };
        if let Some(file) = file {
            children.push(("file", self.plan_child(&name, file, plan)?));
        }
        if let DriverOptions::CopyBeforeWrite(o) = &options.driver {
            let target = self.plan_child(&name, &o.target, plan)?;
            if let Child::Existing(node) = &target {
                let user = Parent::Node(name.clone());
                self.check(node.name(), &user, &TARGET, (node.name(), &TARGET))?;
            }
            children.push(("target", target));
        }
        if let DriverOptions::Qcow2(qcow2) = &options.driver {
            let file = whole_blocks(&qcow2.file);
            children.push(("file", self.plan_child(&name, &file, plan)?));
            if let Some(data_file) = &qcow2.data_file {
                children.push(("data-file", self.plan_child(&name, data_file, plan)?));
            }
            let before = children.len();
            match &qcow2.backing {
                BackingRef::Unset | BackingRef::None => {}
                BackingRef::Node(backing) => {
                    children.push(("backing", self.plan_child(&name, backing, plan)?));
                }
                BackingRef::Active(active) => {
                    let active = NodeRef::Name(active.clone());
                    children.push(("backing", self.plan_child(&name, &active, plan)?));
                }
            }
            // The users of an active node will be those of the new one.
            let is_active = matches!(qcow2.backing, BackingRef::Active(_));
            let checked = if is_active { before } else { children.len() };
            for (role, child) in &children[..checked] {
                if let Child::Existing(node) = child {
                    let wants = image_child_use(role, !options.read_only);
                    let user = Parent::Node(name.clone());
                    self.check(node.name(), &user, &wants, (node.name(), &wants))?;
                }
            }
        }
        // Children of the new node may not have taken its name either.
        if plan.steps.iter().any(|s| s.name == name) {
            return Err(Error::exists(format!(
                "node '{name}' and one of its children have the same name: choose another"
            )));
        }
        let opens = match options.active && children.iter().all(|(_, c)| c.is_active(plan)) {
            true => Opens::Yes,
            false => Opens::Looks,
        };
        plan.steps.push(Step {
            name,
            options,
            children,
            implicit: child,
            opens,
        });
        Ok(plan.steps.len() - 1)
    }

    fn plan_child(&mut self, parent: &str, child: &NodeRef, plan: &mut Plan) -> Result<Child> {
        match child {
            NodeRef::Options(options) => Ok(Child::Step(self.plan_node(
                (**options).clone(),
                true,
                plan,
            )?)),
            NodeRef::Name(name) => match self.nodes.get(name) {
                Some(e) => {
                    self.check_claim(name)?;
                    Ok(Child::Existing(e.node.clone()))
                }
                None => Err(Error::not_found(format!(
                    "node '{parent}': its child '{name}' does not exist: add it first, or give its options in place"
                ))),
            },
        }
    }

    /// Makes opened nodes part of the graph. Returns their names, the one that was asked for first.
    ///
    /// The graph must not have changed since the plan was made.
    pub fn insert(&mut self, opened: Opened) -> Vec<String> {
        let mut names: Vec<String> = Vec::new();
        for (name, entry) in opened.entries {
            names.push(name.clone());
            entry.node.enter();
            self.nodes.insert(name, entry);
        }
        self.note_inactive(&names);
        names.reverse();
        names
    }

    /// A node has another value of an option from now on.
    pub fn set_option(&mut self, name: &str, option: &str, value: Value) {
        if let Some(entry) = self.nodes.get_mut(name) {
            entry.options.insert(option.to_owned(), value);
        }
    }

    /// Refuses to make a node read-only that somebody writes to.
    pub fn check_unwritten(&self, name: &str) -> Result<()> {
        let write = Permissions::WRITE.and(Permissions::WRITE_UNCHANGED);
        let writes = |u: &&User| !u.wants.taken.both(write).is_empty();
        if let Some(user) = self.entry(name)?.users.iter().find(writes) {
            return Err(Error::in_use(format!(
                "node '{name}' is written by {}: remove that first, or make it read-only",
                user.parent
            )));
        }
        for parent in self.parent_nodes(name) {
            let taken = self.use_of_child(parent, name, None).taken;
            if !taken.both(write).is_empty() {
                return Err(Error::in_use(format!(
                    "node '{name}' is written by node '{parent}': make that read-only first"
                )));
            }
        }
        Ok(())
    }

    /// Whether a node is removed with its parent.
    pub fn set_implicit(&mut self, name: &str, implicit: bool) {
        if let Some(entry) = self.nodes.get_mut(name) {
            entry.implicit = implicit;
        }
    }

    /// A name that was made up is not made up again.
    pub fn take_name(&mut self, name: &str) {
        let number = name.strip_prefix("#block").and_then(|n| n.parse().ok());
        self.next_implicit = self.next_implicit.max(number.unwrap_or(0));
    }

    /// Refuses to open a node in another way that passes that on to an image below it, which somebody else may use.
    pub fn check_reopens(&self, name: &str) -> Result<()> {
        let entry = self.entry(name)?;
        if entry.node.is_filter() {
            let below = entry.children.first().map_or("", |(_, child)| child);
            return Err(Error::not_supported(format!(
                "node '{name}' is a filter, and as its child is: change node '{below}'"
            )));
        }
        for (role, child) in &entry.children {
            if *role != "backing" && self.is_image(child) {
                return Err(Error::not_supported(format!(
                    "node '{name}' stands on the image of node '{child}', which would change with it: add both anew"
                )));
            }
        }
        self.check_sole(name)
    }

    /// Takes a node, and the children that were made for it, out of the graph. They are to be deactivated and closed
    /// in this order.
    pub fn remove(&mut self, name: &str) -> Result<Vec<Arc<Node>>> {
        let entry = self.entry(name)?;
        if let Some(parent) = self.parents(name).first() {
            return Err(Error::in_use(format!(
                "node '{name}' is used by {parent}: remove that first"
            )));
        }
        if entry.implicit {
            // Cannot be reached while its parent exists; kept for a clear message if it ever is.
            return Err(Error::in_use(format!(
                "node '{name}' belongs to another node and is removed with it"
            )));
        }
        let mut removed = Vec::new();
        self.remove_entry(name, &mut removed);
        Ok(removed)
    }

    fn remove_entry(&mut self, name: &str, removed: &mut Vec<Arc<Node>>) {
        let Some(entry) = self.nodes.remove(name) else {
            return;
        };
        entry.node.leave();
        removed.push(entry.node);
        for (_, child) in entry.children {
            let orphan = self.nodes.get(&child).is_some_and(|e| e.implicit)
                && self.parents(&child).is_empty();
            if orphan {
                self.remove_entry(&child, removed);
            }
        }
    }

    // Permissions.

    /// What a node does to its children on behalf of its own users: filters pass everything on.
    fn wants_of_node(&self, name: &str, extra: Option<(&str, &Use)>) -> Use {
        let idle = Use {
            taken: Permissions::NONE,
            shared: Permissions::ALL,
        };
        let Some(entry) = self.nodes.get(name) else {
            return idle;
        };
        let mut all = idle;
        for user in &entry.users {
            all = all.merge(below_of(&user.parent, user.wants));
        }
        for parent in self.parent_nodes(name) {
            all = all.merge(self.use_of_child(parent, name, extra));
        }
        if let Some((node, wants)) = extra
            && node == name
        {
            all = all.merge(*wants);
        }
        all
    }

    /// What a node does to one of its children.
    fn use_of_child(&self, parent: &str, child: &str, extra: Option<(&str, &Use)>) -> Use {
        let entry = self.nodes.get(parent);
        let role = entry.and_then(|e| e.children.iter().find(|(_, c)| c == child));
        match (entry, role) {
            (Some(e), Some((role, _))) if e.node.driver_name() == "qcow2" => {
                image_child_use(role, !e.node.is_read_only())
            }
            (_, Some(("target", _))) => TARGET,
            // What it keeps of a moment is lost if somebody else writes.
            (Some(e), _) if e.node.driver_name() == "copy-before-write" => {
                let wants = self.wants_of_node(parent, extra);
                Use {
                    shared: wants
                        .shared
                        .without(Permissions::WRITE)
                        .without(Permissions::RESIZE),
                    ..wants
                }
            }
            // Whatever is written below, it shows what was there before.
            (Some(e), _) if e.node.driver_name() == "snapshot-access" => Use {
                taken: Permissions::CONSISTENT_READ,
                shared: Permissions::ALL,
            },
            _ => self.wants_of_node(parent, extra),
        }
    }

    /// Refuses to resize a node if one of its users does not allow it.
    pub fn check_resize(&self, name: &str) -> Result<()> {
        for parent in self.parent_nodes(name) {
            let wants = self.use_of_child(parent, name, None);
            if !wants.shared.contains(Permissions::RESIZE) && self.is_image(parent) {
                return Err(Error::in_use(format!(
                    "node '{name}' belongs to the image of node '{parent}', which decides about its size: resize that"
                )));
            }
            if !wants.shared.contains(Permissions::RESIZE) {
                return Err(Error::in_use(format!(
                    "node '{name}' cannot be resized while node '{parent}' keeps what it had at one moment: end that first"
                )));
            }
            self.check_resize(parent)?;
        }
        Ok(())
    }

    fn is_image(&self, name: &str) -> bool {
        let entry = self.nodes.get(name);
        entry.is_some_and(|e| e.node.driver_name() == "qcow2")
    }

    /// Nobody but their present users may use nodes from now on: a job changes what they have.
    pub fn claim(&mut self, names: &[String], job: &str) {
        for name in names {
            if let Some(entry) = self.nodes.get_mut(name) {
                let job = job.to_owned();
                entry.claimed = Some(Claim { job, still: false });
            }
        }
    }

    /// Claims the node of an image whose tables a job looks at, or changes: everybody who could reach it by now was drained, and nobody may
    /// come by other ways.
    pub fn claim_still(&mut self, name: &str, job: &str) {
        if let Some(entry) = self.nodes.get_mut(name) {
            let job = job.to_owned();
            entry.claimed = Some(Claim { job, still: true });
        }
    }

    /// Ends all claims of a job.
    pub fn end_claims(&mut self, job: &str) {
        let claimed = self.nodes.values_mut();
        for entry in claimed.filter(|e| e.claimed.as_ref().is_some_and(|c| c.job == job)) {
            entry.claimed = None;
        }
    }

    /// Nodes are about to be removed, and of no use to the next daemon.
    pub fn leave(&mut self, names: &[String]) {
        for name in names {
            if let Some(entry) = self.nodes.get_mut(name) {
                entry.leaving = true;
            }
        }
    }

    /// Takes nodes that were made for others, and that nobody uses, out of the graph. They are to be closed in this order.
    pub fn remove_orphans(&mut self) -> Vec<Arc<Node>> {
        let names: Vec<String> = self.nodes.keys().cloned().collect();
        let mut removed = Vec::new();
        for name in names {
            let is_orphan = self.is_implicit(&name) && self.parents(&name).is_empty();
            if is_orphan {
                self.remove_entry(&name, &mut removed);
            }
        }
        removed
    }

    /// Whether a job is the only one who uses a node.
    pub fn is_for_job_only(&self, name: &str) -> bool {
        matches!(self.parents(name)[..], [Parent::Job(_)])
    }

    /// Refuses to open a file beside the graph that a node has open and does not share.
    pub fn check_not_open(&self, path: &str, write: bool) -> Result<()> {
        let mut nodes = self.nodes.iter();
        let has = |e: &Entry| e.children.is_empty() && e.node.filename().as_deref() == Some(path);
        let Some((name, _)) = nodes.find(|(_, e)| has(e) && (write || !e.node.is_read_only()))
        else {
            return Ok(());
        };
        let node = match self.is_implicit(name) {
            true => self.parent_nodes(name).next().unwrap_or(name),
            false => name,
        };
        Err(Error::in_use(format!(
            "image '{path}' is open as node '{node}': have the node do this (see 'vdiskctl node --help'), or remove it first"
        )))
    }

    /// Refuses what must not be done while a job changes a node, or what the node is a filter of.
    pub fn check_claim(&self, name: &str) -> Result<()> {
        let mut todo = vec![(name, true)];
        while let Some((name, same)) = todo.pop() {
            let Some(entry) = self.nodes.get(name) else {
                continue;
            };
            if let Some(claim) = entry.claimed.as_ref().filter(|c| same || c.still) {
                return Err(Error::in_use(format!(
                    "node '{name}' is changed by job '{}': wait for its end, or cancel it",
                    claim.job
                )));
            }
            let is_filter = same && entry.node.is_filter();
            let children = entry.children.iter().enumerate();
            todo.extend(children.map(|(i, (_, child))| (child.as_str(), is_filter && i == 0)));
        }
        Ok(())
    }

    /// Checks that nobody else stands on the files of an image that is to be opened for writing.
    pub fn check_sole(&self, name: &str) -> Result<()> {
        for (role, child) in &self.entry(name)?.children {
            let me = Parent::Node(name.to_owned());
            if *role == "backing" {
                continue;
            }
            if let Some(other) = self.parents(child).iter().find(|p| **p != me) {
                return Err(Error::in_use(format!(
                    "node '{child}' is used by {other}, too, for which it would change: remove that first"
                )));
            }
            self.check_sole(child)?;
        }
        Ok(())
    }

    /// The image or file that a node shows as it is: filters are passed.
    pub fn unfiltered(&self, name: &str) -> Result<Arc<Node>> {
        let mut entry = self.entry(name)?;
        while entry.node.is_filter()
            && let Some((_, child)) = entry.children.first()
        {
            entry = self.entry(child)?;
        }
        Ok(entry.node.clone())
    }

    /// Refuses what must not be done while jobs write to a node, or to one above. (Guests that copy for a job what they overwrite are
    /// not held back by a drain of the job's target.)
    pub fn check_not_written(&self, name: &str) -> Result<()> {
        self.entry(name)?;
        let write = Permissions::WRITE.and(Permissions::WRITE_UNCHANGED);
        let writes =
            |u: &&User| matches!(u.parent, Parent::Job(_)) && !u.wants.taken.both(write).is_empty();
        let (_, above) = self.above(name);
        for node in above {
            let mut users = self.entry(node.name())?.users.iter();
            if let Some(job) = users.find(writes) {
                return Err(Error::in_use(format!(
                    "node '{}' is written by {}: wait for its end, or cancel it",
                    node.name(),
                    job.parent
                )));
            }
        }
        Ok(())
    }

    /// Checks that `user` may use `name` as it wants to, all the way down.
    fn check(&self, name: &str, user: &Parent, wants: &Use, extra: (&str, &Use)) -> Result<()> {
        let entry = self.entry(name)?;
        let refuse = |other: &dyn std::fmt::Display, what: Permissions| {
            Err(Error::in_use(format!(
                "{user} needs '{}' on node '{name}' and shares '{}', which {other} does not allow (conflict: {what}): remove one of them, or let both share",
                wants.taken, wants.shared
            )))
        };
        for other in &entry.users {
            if let Some(what) = other.wants.conflict(wants) {
                return refuse(&other.parent, what);
            }
        }
        for parent in self.parent_nodes(name) {
            if *user == Parent::Node(parent.to_owned()) {
                continue;
            }
            if let Some(what) = self.use_of_child(parent, name, None).conflict(wants) {
                return refuse(&Parent::Node(parent.to_owned()), what);
            }
        }
        for (_, child) in &entry.children {
            let below = self.use_of_child(name, child, Some(extra));
            self.check(child, &Parent::Node(name.to_owned()), &below, extra)?;
        }
        Ok(())
    }

    /// Adds a user to a node, if everybody else's permissions allow it.
    pub fn attach(
        &mut self,
        name: &str,
        parent: Parent,
        wants: Use,
        backend: Arc<Backend>,
    ) -> Result<()> {
        let entry = self.entry(name)?;
        if wants.taken.contains(Permissions::WRITE) && entry.node.is_read_only() {
            return Err(Error::invalid(format!(
                "{parent} wants to write, but node '{name}' is read-only: set writable=false, or add the node without read-only"
            )));
        }
        self.check_claim(name)?;
        if matches!(parent, Parent::Job(_)) {
            self.check_active(name)?;
        }
        self.check(name, &parent, &wants, (name, &below_of(&parent, wants)))?;
        if let Some(entry) = self.nodes.get_mut(name) {
            entry.users.push(User {
                parent,
                wants,
                backend,
            });
        }
        Ok(())
    }

    pub fn detach(&mut self, name: &str, parent: &Parent) {
        if let Some(entry) = self.nodes.get_mut(name) {
            entry.users.retain(|u| u.parent != *parent);
        }
    }

    /// Whether another node may take the place of a node: all its users can be moved.
    pub fn check_moves(&self, name: &str) -> Result<()> {
        self.entry(name)?;
        for parent in self.parent_nodes(name) {
            let entry = &self.nodes[parent];
            let mut children = entry.children.iter();
            let shown = children.any(|(role, child)| *role == "file" && child == name);
            if !entry.node.is_filter() || !shown {
                return Err(Error::in_use(format!(
                    "node '{name}' is below node '{parent}', which cannot get another child while it is in use"
                )));
            }
            if !entry.node.is_active() {
                return Err(Error::in_use(format!(
                    "node '{name}' is below node '{parent}', which is inactive and would be opened over the old one: activate or remove that first"
                )));
            }
        }
        Ok(())
    }

    /// Whether an overlay may take the place of a node.
    pub fn check_overlay(&self, name: &str) -> Result<()> {
        self.check_no_job(name)?;
        if self.entry(name)?.node.is_read_only() {
            return Err(Error::invalid(format!(
                "node '{name}' is read-only: nothing is written to it that an overlay could take"
            )));
        }
        self.check_moves(name)
    }

    /// Moves the users of one node to another; `new` nodes keep what they stand on. Everything above was drained.
    fn move_users(&mut self, from: &str, to: &str, new: &[String]) {
        let Some(target) = self.nodes.get(to).map(|e| e.node.clone()) else {
            return;
        };
        for (name, entry) in &mut self.nodes {
            for (role, child) in &mut entry.children {
                if *role == "file"
                    && !new.contains(name)
                    && child == from
                    && entry.node.set_file(target.clone())
                {
                    child.clear();
                    child.push_str(to);
                }
            }
        }
        let users: Vec<User> = match self.nodes.get_mut(from) {
            // Jobs stay.
            Some(entry) => entry
                .users
                .extract_if(.., |u| !matches!(u.parent, Parent::Job(_)))
                .collect(),
            None => Vec::new(),
        };
        if let Some(entry) = self.nodes.get_mut(to) {
            entry.users.extend(users);
        }
    }

    /// Whether a node with as many bytes may take the place of another that it is a copy of, for all users but `job`.
    pub fn check_replace(&self, name: &str, with: &str, job: &Parent) -> Result<()> {
        self.check_moves(name)?;
        if let Some(other) = self.parents(with).iter().find(|p| *p != job) {
            return Err(Error::in_use(format!(
                "node '{with}' cannot take the place of node '{name}' while it is used by {other}: remove that first"
            )));
        }
        Ok(())
    }

    /// From a node down its backing files to `base`, both included. None of them but the first may be used by anybody
    /// else.
    pub fn chain(&self, top: &str, base: &str) -> Result<Vec<String>> {
        let mut chain = vec![top.to_owned()];
        let mut at = self.entry(top)?;
        while chain.last().is_some_and(|last| last != base) {
            let below = at.children.iter().find(|(role, _)| *role == "backing");
            let Some((_, below)) = below else {
                return Err(Error::invalid(format!(
                    "node '{base}' is not below node '{top}': give one of its backing files"
                )));
            };
            let above = Parent::Node(at.node.name().to_owned());
            if let Some(other) = self.parents(below).iter().find(|p| **p != above) {
                return Err(Error::in_use(format!(
                    "node '{below}' is used by {other}, too, for which it would change: remove that first"
                )));
            }
            chain.push(below.clone());
            at = self.entry(below)?;
        }
        Ok(chain)
    }

    /// What is behind an image.
    pub fn backing(&self, name: &str) -> Result<Option<Arc<Node>>> {
        let children = &self.entry(name)?.children;
        let backing = children.iter().find(|(role, _)| *role == "backing");
        backing.map(|(_, below)| self.node(below)).transpose()
    }

    /// Images that have a node behind them.
    pub fn overlays(&self, name: &str) -> Vec<Arc<Node>> {
        let is_overlay = |e: &&Entry| {
            let mut children = e.children.iter();
            children.any(|(role, child)| *role == "backing" && child == name)
        };
        let overlays = self.nodes.values().filter(is_overlay);
        overlays.map(|e| e.node.clone()).collect()
    }

    /// An image has another node behind it, or none.
    pub fn set_backing(&mut self, name: &str, backing: Option<&str>) {
        if let Some(entry) = self.nodes.get_mut(name) {
            entry.children.retain(|(role, _)| *role != "backing");
            if let Some(backing) = backing {
                entry.children.push(("backing", backing.to_owned()));
            }
        }
    }

    /// Takes nodes out of the graph that nobody uses but each other, the top one first, with what was made for them, but not
    /// `keep`. They are to be closed in this order.
    pub fn remove_chain(&mut self, names: &[String], keep: Option<&str>) -> Vec<Arc<Node>> {
        if let Some(entry) = keep.and_then(|k| self.nodes.get_mut(k)) {
            entry.implicit = false;
        }
        let mut removed = Vec::new();
        for name in names {
            if self.nodes.contains_key(name) && self.parents(name).is_empty() {
                self.remove_entry(name, &mut removed);
            }
        }
        removed
    }

    /// Whether a node was made in place for its parent.
    pub fn is_implicit(&self, name: &str) -> bool {
        self.nodes.get(name).is_some_and(|e| e.implicit)
    }

    /// Whether something else than images stands on a node.
    pub fn is_active(&self, name: &str) -> bool {
        let overlays = self.overlays(name);
        self.parents(name).iter().any(|p| match p {
            Parent::Node(parent) => !overlays.iter().any(|o| o.name() == parent),
            Parent::Export(_) | Parent::Job(_) => true,
        })
    }

    /// Gives all users of a node, jobs excepted, to another. Everything above was drained.
    pub fn replace(&mut self, name: &str, with: &str) {
        self.move_users(name, with, &[]);
        if let Some(entry) = self.nodes.get_mut(name) {
            // What it was made for uses another now.
            entry.implicit = false;
        }
    }

    /// Refuses what jobs on a node could not follow.
    pub fn check_no_job(&self, name: &str) -> Result<()> {
        let is_job = |p: &&Parent| matches!(p, Parent::Job(_));
        match self.parents(name).iter().find(is_job) {
            None => Ok(()),
            Some(job) => Err(Error::in_use(format!(
                "node '{name}' is used by {job}: wait for its end, or cancel it"
            ))),
        }
    }

    /// Makes opened nodes part of the graph, the first of which takes the place of the node below, which everything above
    /// was drained for. Returns the names as [`Graph::insert`].
    pub fn insert_above(&mut self, opened: Opened, below: &str) -> Vec<String> {
        let names = self.insert(opened);
        if let Some(name) = names.first() {
            self.move_users(below, name, &names);
        }
        names
    }

    /// Takes a filter out, and moves its users to its child. Returns the filter, with other children that were made for it, to
    /// be closed in this order, and the child. Everything above was drained.
    pub fn take_out(&mut self, name: &str) -> Result<(Vec<Arc<Node>>, Arc<Node>)> {
        let entry = self.entry(name)?;
        let child = match entry.children.first() {
            Some((_, child)) if entry.node.is_filter() => child.clone(),
            _ => {
                return Err(Error::not_supported(format!(
                    "node '{name}' has driver '{}': only filters ({}) can be taken out",
                    entry.node.driver_name(),
                    FILTERS.join(", ")
                )));
            }
        };
        self.check_moves(name)?;
        self.move_users(name, &child, &[]);
        let below = self.nodes.get_mut(&child).map(|e| {
            // It was made for the filter, and stays without it.
            e.implicit = false;
            e.node.clone()
        });
        let below = below.ok_or_else(|| Error::failed(format!("node '{child}' is gone")))?;
        let mut removed = Vec::new();
        self.remove_entry(name, &mut removed);
        Ok((removed, below))
    }

    /// The backends whose requests can reach a node, and the nodes between, it included.
    pub fn above(&self, name: &str) -> (Vec<Arc<Backend>>, Vec<Arc<Node>>) {
        let (mut backends, mut nodes) = (Vec::new(), Vec::new());
        let mut todo = vec![name.to_owned()];
        while let Some(name) = todo.pop() {
            let Some(entry) = self.nodes.get(&name) else {
                continue;
            };
            if nodes.iter().any(|n| Arc::ptr_eq(n, &entry.node)) {
                continue;
            }
            nodes.push(entry.node.clone());
            backends.extend(entry.users.iter().map(|u| u.backend.clone()));
            todo.extend(self.parent_nodes(&name).map(str::to_owned));
        }
        (backends, nodes)
    }

    /// Names of nodes that have something below them in common with a node, itself included.
    pub fn related(&self, name: &str) -> BTreeSet<String> {
        let below = self.nodes.get(name).map(|e| e.node.with_all_below());
        let below = below.into_iter().flatten();
        let above = below.flat_map(|n| self.above(n.name()).1);
        above.map(|n| n.name().to_owned()).collect()
    }

    /// As [`Graph::above`], for everything that a resize of the node may change: the storage at the
    /// bottom of it changes with it.
    pub fn resized_with(&self, name: &str) -> (Vec<Arc<Backend>>, Vec<Arc<Node>>) {
        let mut bottom = name;
        while let Some(entry) = self.nodes.get(bottom)
            && entry.node.has_size_of_child()
            && let Some((_, child)) = entry.children.first()
        {
            bottom = child;
        }
        self.above(bottom)
    }

    /// All nodes, in groups whose nodes do not stand on each other, each before those that its nodes stand on.
    pub fn levels(&self) -> Vec<Vec<Arc<Node>>> {
        let mut out = Vec::new();
        let mut left: BTreeSet<&str> = self.names().collect();
        while !left.is_empty() {
            let has_parents = |name: &&str| self.parent_nodes(name).any(|p| left.contains(p));
            let (below, free): (BTreeSet<&str>, BTreeSet<&str>) =
                left.iter().partition(|n| has_parents(n));
            if free.is_empty() {
                break;
            }
            out.push(free.iter().map(|n| self.nodes[*n].node.clone()).collect());
            left = below;
        }
        out
    }

    /// All nodes, parents before their children.
    pub fn top_down(&self) -> Vec<Arc<Node>> {
        self.levels().concat()
    }
}
