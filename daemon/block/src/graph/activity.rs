//! Nodes that are not open: their images may be in use on another host, to which a guest is about to move or from which it comes.
//!
//! A node that is inactive keeps its name, its options, its users and its place. All above it are inactive as well, unless they
//! came active before: whatever stands on it is opened with it.

use std::sync::Arc;
use std::time::Duration;

use vdisk_api::{DriverOptions, Error, Map, NodeOptions, Result, Value};

use super::{Child, Entry, Graph, Opened, Opens, Parent, Plan, ROLES, Step, StoredNode};
use crate::drivers::Inactive;
use crate::node::Node;
use crate::runtime::{LockPatience, Runtime};

impl Child {
    pub(super) fn is_active(&self, plan: &Plan) -> bool {
        match self {
            Child::Existing(node) => node.is_active(),
            Child::Step(i) => matches!(plan.steps[*i].opens, Opens::Yes),
        }
    }
}

impl Step {
    /// Opens the node, or looks at it: as others that are looked at stand on it, and as it becomes part of the graph.
    pub(super) fn open(
        &self,
        children: &[Arc<Node>],
        runtime: &Runtime,
    ) -> Result<(Arc<Node>, Arc<Node>)> {
        match &self.opens {
            Opens::Yes => {
                let node = Node::open(&self.name, &self.options, children, runtime)?;
                Ok((node.clone(), node))
            }
            Opens::Looks => {
                // Somebody may write to it.
                let options = NodeOptions {
                    read_only: true,
                    force_share: true,
                    ..self.options.clone()
                };
                let seen = Node::open(&self.name, &options, children, runtime)?;
                let node = Node::inactive(&self.name, &self.options, Inactive::of(&seen));
                Ok((seen, node))
            }
            Opens::No(noted) => {
                let known = noted.inactive.clone().ok_or_else(|| {
                    Error::failed(format!("nothing is known of node '{}'", self.name))
                })?;
                let node = Node::inactive(&self.name, &self.options, known);
                Ok((node.clone(), node))
            }
        }
    }
}

/// A daemon that knows no inactive nodes must not open it.
pub(super) fn mark(noted: &mut StoredNode) {
    noted.options.insert("active".into(), false.into());
}

fn options(noted: &StoredNode) -> Result<NodeOptions> {
    let mut options = NodeOptions::restored(&noted.name, noted.options.clone())?;
    options.active = true;
    if let DriverOptions::File(file) = &mut options.driver {
        file.whole_blocks = noted.whole_blocks;
    }
    Ok(options)
}

/// Options that say which disk it is, and who may use it how.
const FIXED: [&str; 9] = [
    "driver",
    "node-name",
    "active",
    "read-only",
    "auto-read-only",
    "force-share",
    "filename",
    "offset",
    "size",
];

/// Gives a node, and its children, other options.
fn change_options(all: &mut [StoredNode], name: &str, change: &Map) -> Result<()> {
    let at = all.iter().position(|s| s.name == name).ok_or_else(|| {
        Error::in_use(format!(
            "node '{name}' cannot be closed and opened again: others stand on it as well"
        ))
    })?;
    for (key, value) in change {
        if FIXED.contains(&key.as_str()) {
            return Err(Error::not_supported(format!(
                "node '{name}': option '{key}' cannot be changed with others, as the disk would be another one: add another node, and put it in this one's place (Replace)"
            )));
        }
        if ROLES.contains(&key.as_str()) {
            let child = all[at].options.get(key).and_then(Value::as_str);
            match (child.map(str::to_owned), value) {
                (Some(child), Value::Object(inner)) => change_options(all, &child, inner)?,
                _ => {
                    return Err(Error::not_supported(format!(
                        "node '{name}': option '{key}' can be given options of a node that it has, not another one: put that in its place (Replace)"
                    )));
                }
            }
            continue;
        }
        merge(&mut all[at].options, key, value);
        if key == "cache" {
            inherit(all, at, value)?;
        }
    }
    Ok(())
}

/// Nodes that were made for a node are cached as it is.
fn inherit(all: &mut [StoredNode], at: usize, cache: &Value) -> Result<()> {
    let roles = ["file", "data-file"].iter();
    let children = roles.filter_map(|role| all[at].options.get(*role)?.as_str());
    let children: Vec<String> = children.map(str::to_owned).collect();
    for child in children {
        if all.iter().any(|s| s.name == child && s.implicit) {
            let change = Map::from_iter([("cache".to_owned(), cache.clone())]);
            change_options(all, &child, &change)?;
        }
    }
    Ok(())
}

fn merge(options: &mut Map, key: &str, value: &Value) {
    match (options.get_mut(key), value) {
        (Some(Value::Object(have)), Value::Object(more)) => {
            for (key, value) in more {
                merge(have, key, value);
            }
        }
        _ => {
            options.insert(key.to_owned(), value.clone());
        }
    }
}

impl Graph {
    /// Plans a node that an earlier daemon, or an earlier state of this one, has noted.
    pub fn plan_stored(&mut self, noted: &StoredNode) -> Result<Plan> {
        let mut plan = self.plan(options(noted)?)?;
        if let (Some(step), true) = (plan.steps.last_mut(), noted.inactive.is_some()) {
            step.opens = Opens::No(Box::new(noted.clone()));
        }
        Ok(plan)
    }

    /// Notes of nodes that are inactive what they will be made of.
    pub(super) fn note_inactive(&mut self, names: &[String]) {
        let is_new = |name: &String| {
            let entry = self.nodes.get(name);
            entry.is_some_and(|e| !e.node.is_active() && e.noted.is_none())
        };
        if !names.iter().any(is_new) {
            return;
        }
        for mut noted in self.stored() {
            mark(&mut noted);
            if let Some(entry) = self.nodes.get_mut(&noted.name)
                && noted.inactive.is_some()
            {
                entry.noted = Some(noted);
            }
        }
    }

    /// Refuses what needs the storage of a node.
    pub fn check_active(&self, name: &str) -> Result<()> {
        match self.nodes.get(name) {
            Some(entry) if !entry.node.is_active() => Err(Error::in_use(format!(
                "node '{name}' is inactive, and its image may be in use on another host: make it active first (SetActive), if it is not"
            ))),
            _ => Ok(()),
        }
    }

    /// The node at the top of what stands on a node.
    ///
    /// # Errors
    /// If there are several.
    pub fn top_above(&self, name: &str) -> Result<String> {
        self.entry(name)?;
        let mut top = name;
        loop {
            let mut parents = self.parent_nodes(top);
            let Some(parent) = parents.next() else {
                return Ok(top.to_owned());
            };
            if let Some(other) = parents.next() {
                return Err(Error::in_use(format!(
                    "node '{name}' cannot be closed and opened again: nodes '{parent}' and '{other}' stand on node '{top}'"
                )));
            }
            top = parent;
        }
    }

    /// What the nodes `names` are made of, with other options for one of them and its children.
    ///
    /// # Errors
    /// If an option is not known, or is of a node that is not among them.
    pub fn stored_with(
        &self,
        names: &[String],
        name: &str,
        change: &Map,
    ) -> Result<Vec<StoredNode>> {
        let mut all = self.stored();
        all.retain(|s| names.contains(&s.name));
        change_options(&mut all, name, change)?;
        for noted in &mut all {
            options(noted).map_err(|e| e.context(format_args!("node '{}'", noted.name)))?;
            noted.inactive = Some(Inactive::of(&self.entry(&noted.name)?.node));
            mark(noted);
        }
        Ok(all)
    }

    /// Plans to look at nodes that are open, as if they were made of `notes` (children first): whether they could be.
    pub fn plan_look(&self, notes: &[StoredNode]) -> Result<Plan> {
        let mut plan = Plan {
            steps: Vec::new(),
            runtime: self.runtime.clone(),
        };
        for noted in notes {
            let entry = self.entry(&noted.name)?;
            let child = |(role, child): &(&'static str, String)| {
                let step = plan.steps.iter().position(|s: &Step| s.name == *child);
                Ok(match step {
                    Some(at) => (*role, Child::Step(at)),
                    None => (*role, Child::Existing(self.entry(child)?.node.clone())),
                })
            };
            let children = entry.children.iter().map(child).collect::<Result<_>>()?;
            plan.steps.push(Step {
                name: noted.name.clone(),
                options: options(noted)?,
                children,
                implicit: entry.implicit,
                opens: Opens::Looks,
            });
        }
        Ok(plan)
    }

    /// As [`Graph::plan_activation`], of what was open a moment ago: it waits for locks that others have for a moment.
    pub fn plan_opening_again(&self, name: &str) -> Result<Plan> {
        let mut plan = self.plan_activation(name)?;
        plan.runtime.lock_patience = LockPatience::default();
        Ok(plan)
    }

    /// Notes of nodes that are inactive that they are made of something else; what was noted.
    pub fn note(&mut self, notes: Vec<StoredNode>) -> Vec<StoredNode> {
        let mut old = Vec::new();
        for new in notes {
            if let Some(entry) = self.nodes.get_mut(&new.name) {
                old.extend(entry.noted.replace(new));
            }
        }
        old
    }

    /// Plans to open a node that is inactive, and all such nodes below it.
    pub fn plan_activation(&self, name: &str) -> Result<Plan> {
        self.entry(name)?;
        // What stands on it would not know its new storage.
        let inactive = |p: &&str| self.nodes.get(*p).is_some_and(|e| !e.node.is_active());
        if let Some(above) = self.parent_nodes(name).find(inactive) {
            return Err(Error::in_use(format!(
                "node '{name}' is below node '{above}', which is inactive as well: make that one active"
            )));
        }
        let mut plan = Plan {
            steps: Vec::new(),
            runtime: self.runtime.clone(),
        };
        // Whoever asks does so again, and others wait meanwhile.
        plan.runtime.lock_patience = LockPatience(Duration::ZERO);
        self.plan_active(name, &mut plan)?;
        Ok(plan)
    }

    fn plan_active(&self, name: &str, plan: &mut Plan) -> Result<Child> {
        let entry = self.entry(name)?;
        let Some(noted) = &entry.noted else {
            return Ok(Child::Existing(entry.node.clone()));
        };
        if let Some(at) = plan.steps.iter().position(|s| s.name == name) {
            return Ok(Child::Step(at));
        }
        let mut children = Vec::new();
        for (role, child) in &entry.children {
            children.push((*role, self.plan_active(child, plan)?));
        }
        plan.steps.push(Step {
            name: name.to_owned(),
            options: options(noted)?,
            children,
            implicit: entry.implicit,
            opens: Opens::Yes,
        });
        Ok(Child::Step(plan.steps.len() - 1))
    }

    /// Gives nodes that were inactive what was opened for them. Everything above was drained. Returns for each what it was, what it
    /// is, and what was noted of it.
    pub fn activate(&mut self, opened: Opened) -> Vec<(Arc<Node>, Arc<Node>, StoredNode)> {
        let mut changed = Vec::new();
        for (name, new) in opened.entries {
            let Some(entry) = self.nodes.get_mut(&name) else {
                continue;
            };
            new.node.enter();
            let old = std::mem::replace(&mut entry.node, new.node.clone());
            entry.options = new.options;
            if let Some(noted) = entry.noted.take() {
                changed.push((old, new.node, noted));
            }
        }
        changed
    }

    /// The nodes that can be let go of with a node: it, and those below it that nobody else uses; parents first.
    ///
    /// # Errors
    /// If something else needs one of them, or what is written to stays open.
    pub fn check_deactivation(&self, name: &str) -> Result<Vec<String>> {
        self.entry(name)?;
        if let Some(parent) = self.parent_nodes(name).next() {
            return Err(Error::in_use(format!(
                "node '{name}' is below node '{parent}': let go of that, and of all below it"
            )));
        }
        let mut going: Vec<String> = vec![name.to_owned()];
        let mut next = 0;
        while let Some(at) = going.get(next).cloned() {
            next += 1;
            for (_, child) in &self.entry(&at)?.children {
                let below = self.entry(child)?;
                let is_ours = below.users.is_empty()
                    && self
                        .parent_nodes(child)
                        .all(|p| going.iter().any(|g| g == p));
                match is_ours {
                    _ if going.contains(child) => {}
                    true => going.push(child.clone()),
                    false if !below.node.is_active() => {}
                    false if below.node.is_read_only() => {}
                    false => {
                        return Err(Error::in_use(format!(
                            "node '{name}' cannot be let go of: node '{child}' below it is in use by {}, and not read-only",
                            self.other_user(child, &going)
                        )));
                    }
                }
            }
        }
        going.retain(|at| self.nodes.get(at).is_some_and(|e| e.node.is_active()));
        for at in &going {
            self.check_claim(at)?;
            self.check_no_job(at)?;
            let driver = self.entry(at)?.node.driver_name();
            if matches!(driver, "copy-before-write" | "snapshot-access") {
                return Err(Error::in_use(format!(
                    "node '{at}' keeps what a disk had at one moment, which would be lost: remove it first"
                )));
            }
        }
        Ok(going)
    }

    fn other_user(&self, name: &str, going: &[String]) -> String {
        let others = self.parents(name).into_iter();
        let mut others = others.filter(|p| !matches!(p, Parent::Node(n) if going.contains(n)));
        others.next().map_or("others".into(), |p| p.to_string())
    }

    /// Puts nodes that were closed into the graph as inactive ones. Everything above was drained. Returns for each what it was, and
    /// what it is.
    ///
    /// # Errors
    /// If the options of one of them are not understood any more; nothing is changed then.
    pub fn plan_deactivation(&self, names: &[String]) -> Result<Vec<(StoredNode, Arc<Node>)>> {
        let stored = self
            .stored()
            .into_iter()
            .filter(|s| names.contains(&s.name));
        let stored = stored.map(|mut noted| {
            let entry: &Entry = self.entry(&noted.name)?;
            let known = Inactive::of(&entry.node);
            noted.inactive = Some(known.clone());
            mark(&mut noted);
            let node = Node::inactive(&noted.name, &options(&noted)?, known);
            Ok((noted, node))
        });
        stored.collect()
    }

    /// The second half of [`Graph::plan_deactivation`].
    pub fn deactivate(
        &mut self,
        planned: Vec<(StoredNode, Arc<Node>)>,
    ) -> Vec<(Arc<Node>, Arc<Node>)> {
        let mut changed = Vec::new();
        for (noted, node) in planned {
            if let Some(entry) = self.nodes.get_mut(&noted.name) {
                let old = std::mem::replace(&mut entry.node, node.clone());
                entry.noted = Some(noted);
                changed.push((old, node));
            }
        }
        changed
    }
}
