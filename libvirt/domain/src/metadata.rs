//! What stands about vdiskd in a domain's metadata.

use std::fmt::Write;

use roxmltree::Node;

use crate::disk::{Backing, Disk, Original};
use crate::{Result, error};

/// The namespace of the element. Its number changes if older programs would misunderstand it.
pub const NAMESPACE: &str = "https://vdisk1.org/libvirt/domain/1";

/// The usual prefix, and libvirt's key for the element.
pub const PREFIX: &str = "vdisk";

/// What the disks of a domain were at one instant: files that nobody writes to any more, and the overlays over them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    pub name: String,
    /// Seconds since the epoch.
    pub created: u64,
    /// A file with the guest's memory at that instant, for libvirt to restore.
    pub memory: Option<String>,
    pub disks: Vec<SnapshotDisk>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SnapshotDisk {
    pub target: String,
    /// What the disk was then.
    pub file: String,
    pub format: String,
    /// What has been written since.
    pub overlay: String,
    /// What was written since goes into the file, or did in part: it is not what it was any more.
    pub written: bool,
}

impl Snapshot {
    /// Keeps some of its disks only. The guest's memory goes with all of them, or is of no use.
    pub fn retain(&mut self, keep: impl FnMut(&mut SnapshotDisk) -> bool) {
        let before = self.disks.len();
        self.disks.retain_mut(keep);
        if self.disks.len() != before {
            self.memory = None;
        }
    }
}

impl Metadata {
    /// Keeps some disks of snapshots only, and snapshots that have any.
    pub fn retain_snapshots(&mut self, mut keep: impl FnMut(&str, &mut SnapshotDisk) -> bool) {
        for snapshot in &mut self.snapshots {
            let name = snapshot.name.clone();
            snapshot.retain(|disk| keep(&name, disk));
        }
        self.snapshots.retain(|s| !s.disks.is_empty());
    }
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Metadata {
    /// The daemon that serves the disks, if not the usual one.
    pub instance: Option<String>,
    /// This is what a file with a guest's memory has of its domain: what disks it goes with only the snapshot of this name knows.
    pub memory_of: Option<String>,
    pub disks: Vec<Disk>,
    /// The oldest first.
    pub snapshots: Vec<Snapshot>,
    /// The domain's `<memoryBacking>` was changed, and was this before (or not there).
    pub memory_backing: Option<String>,
}

/// Escapes text for an attribute in single quotes, or for an element.
pub(crate) fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '\'' => out.push_str("&apos;"),
            '"' => out.push_str("&quot;"),
            c => out.push(c),
        }
    }
    out
}

/// Names an attribute or an element that is not known: a newer program may have meant something by it.
fn unknown<T>(what: &str, name: &str) -> Result<T> {
    error(format!(
        "the domain's vdisk metadata: {what} has '{name}', which this program does not know: correct it (virsh edit), or use a newer one"
    ))
}

impl Metadata {
    /// Reads it from its element.
    pub fn parse(element: Node<'_, '_>) -> Result<Metadata> {
        let mut metadata = Metadata::default();
        for a in element.attributes() {
            match a.name() {
                "memory-of" => metadata.memory_of = Some(a.value().to_owned()),
                "instance" => metadata.instance = Some(a.value().to_owned()),
                other => return unknown("its element", other),
            }
        }
        for child in element.children().filter(Node::is_element) {
            match child.tag_name().name() {
                "disk" => {
                    let disk = parse_disk(child)?;
                    if metadata.disk(&disk.target).is_some() {
                        return error(format!(
                            "the domain's vdisk metadata has disk '{}' twice",
                            disk.target
                        ));
                    }
                    metadata.disks.push(disk);
                }
                "snapshot" => metadata.snapshots.push(parse_snapshot(child)?),
                "memory-backing" => {
                    metadata.memory_backing = Some(child.text().unwrap_or_default().to_owned());
                }
                other => return unknown("its element", other),
            }
        }
        Ok(metadata)
    }

    pub fn disk(&self, target: &str) -> Option<&Disk> {
        self.disks.iter().find(|d| d.target == target)
    }

    pub fn disk_mut(&mut self, target: &str) -> Option<&mut Disk> {
        self.disks.iter_mut().find(|d| d.target == target)
    }

    /// The element, in lines that are indented by `indent` spaces (the first is not).
    pub fn to_xml(&self, indent: usize) -> String {
        let prefix = format!("{PREFIX}:");
        self.render(&prefix, &format!(" xmlns:{PREFIX}='{NAMESPACE}'"), indent)
    }

    /// The element without its namespace, as libvirt wants it when metadata are set by themselves.
    pub fn to_plain_xml(&self) -> String {
        self.render("", "", 0)
    }

    fn render(&self, p: &str, namespace: &str, indent: usize) -> String {
        let pad = " ".repeat(indent);
        let mut out = format!("<{p}domain{namespace}");
        if let Some(instance) = &self.instance {
            let _ = write!(out, " instance='{}'", escape(instance));
        }
        if let Some(snapshot) = &self.memory_of {
            let _ = write!(out, " memory-of='{}'", escape(snapshot));
        }
        out.push_str(">\n");
        for disk in &self.disks {
            let _ = write!(out, "{pad}  <{p}disk target='{}'", escape(&disk.target));
            for (name, value) in disk.settings() {
                let _ = write!(out, " {name}='{}'", escape(value));
            }
            if disk.iotune.is_empty() && disk.original.is_none() && disk.backing.is_empty() {
                out.push_str("/>\n");
                continue;
            }
            out.push_str(">\n");
            if !disk.iotune.is_empty() {
                let _ = write!(out, "{pad}    <{p}iotune");
                for (name, value) in &disk.iotune {
                    let _ = write!(out, " {name}='{value}'");
                }
                out.push_str("/>\n");
            }
            for below in &disk.backing {
                let (file, format) = (escape(&below.file), escape(&below.format));
                let _ = write!(out, "{pad}    <{p}backing file='{file}' format='{format}'");
                if let Some(secret) = &below.secret {
                    let _ = write!(out, " secret='{}'", escape(secret));
                }
                out.push_str("/>\n");
            }
            if let Some(original) = &disk.original {
                let _ = write!(out, "{pad}    <{p}original");
                if let Some((user, group)) = original.owner {
                    let _ = write!(out, " owner='{user}:{group}'");
                }
                let _ = writeln!(out, ">{}</{p}original>", escape(&original.xml));
            }
            let _ = writeln!(out, "{pad}  </{p}disk>");
        }
        for snapshot in &self.snapshots {
            let (name, created) = (escape(&snapshot.name), snapshot.created);
            let _ = write!(out, "{pad}  <{p}snapshot name='{name}' created='{created}'");
            if let Some(memory) = &snapshot.memory {
                let _ = write!(out, " memory='{}'", escape(memory));
            }
            out.push_str(">\n");
            for d in &snapshot.disks {
                let written = if d.written { " written='yes'" } else { "" };
                let _ = writeln!(
                    out,
                    "{pad}    <{p}disk target='{}' file='{}' format='{}' overlay='{}'{written}/>",
                    escape(&d.target),
                    escape(&d.file),
                    escape(&d.format),
                    escape(&d.overlay)
                );
            }
            let _ = writeln!(out, "{pad}  </{p}snapshot>");
        }
        if let Some(before) = &self.memory_backing {
            let _ = writeln!(
                out,
                "{pad}  <{p}memory-backing>{}</{p}memory-backing>",
                escape(before)
            );
        }
        let _ = write!(out, "{pad}</{p}domain>");
        out
    }
}

fn parse_snapshot(element: Node<'_, '_>) -> Result<Snapshot> {
    let mut snapshot = Snapshot::default();
    for a in element.attributes() {
        match a.name() {
            "name" => snapshot.name = a.value().to_owned(),
            "memory" => snapshot.memory = Some(a.value().to_owned()),
            "created" => snapshot.created = a.value().parse().unwrap_or_default(),
            other => return unknown("a snapshot", other),
        }
    }
    for child in element.children().filter(Node::is_element) {
        let mut disk = SnapshotDisk::default();
        for a in child.attributes() {
            if a.name() == "written" {
                disk.written = a.value() == "yes";
                continue;
            }
            let place = match a.name() {
                "target" => &mut disk.target,
                "file" => &mut disk.file,
                "format" => &mut disk.format,
                "overlay" => &mut disk.overlay,
                other => return unknown("a disk of a snapshot", other),
            };
            a.value().clone_into(place);
        }
        snapshot.disks.push(disk);
    }
    Ok(snapshot)
}

fn parse_backing(target: &str, element: Node<'_, '_>) -> Result<Backing> {
    let what = format!("a backing of disk '{target}'");
    // By the rules of disks.
    let mut image = Disk::default();
    target.clone_into(&mut image.target);
    for a in element.attributes() {
        match a.name() {
            name @ ("file" | "format" | "secret") => image.set(name, a.value())?,
            other => return unknown(&what, other),
        }
    }
    let image = image.check()?;
    Ok(Backing {
        file: image.file().to_owned(),
        format: image.format().to_owned(),
        secret: image.get("secret").map(str::to_owned),
    })
}

fn parse_disk(element: Node<'_, '_>) -> Result<Disk> {
    let Some(target) = element.attribute("target") else {
        return error("the domain's vdisk metadata: a disk has no target");
    };
    let mut disk = Disk {
        target: target.to_owned(),
        ..Disk::default()
    };
    for a in element.attributes().filter(|a| a.name() != "target") {
        disk.set(a.name(), a.value())?;
    }
    for child in element.children().filter(Node::is_element) {
        match child.tag_name().name() {
            "iotune" => {
                for a in child.attributes() {
                    let Ok(value) = a.value().parse() else {
                        return error(format!(
                            "disk '{target}': iotune {} is '{}': give a number",
                            a.name(),
                            a.value()
                        ));
                    };
                    disk.set_limit(a.name(), value)?;
                }
            }
            "backing" => disk.backing.push(parse_backing(target, child)?),
            "original" => {
                let mut original = Original {
                    xml: child.text().unwrap_or_default().to_owned(),
                    owner: None,
                };
                if let Some(owner) = child.attribute("owner") {
                    let ids = owner.split_once(':');
                    let ids = ids.and_then(|(u, g)| Some((u.parse().ok()?, g.parse().ok()?)));
                    if ids.is_none() {
                        return error(format!(
                            "disk '{target}': owner is '{owner}': give USER:GROUP by number"
                        ));
                    }
                    original.owner = ids;
                }
                disk.original = Some(original);
            }
            other => return unknown(&format!("disk '{target}'"), other),
        }
    }
    disk.check()
}
