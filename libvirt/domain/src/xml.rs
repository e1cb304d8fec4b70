//! A domain's XML, as libvirt gives it.

use std::path::{Path, PathBuf};

use roxmltree::{Document, Node};

use crate::disk::{Disk, object_name, socket_path};
use crate::metadata::{Metadata, NAMESPACE};
use crate::serve::target_of;
use crate::{Error, Result, error};

/// What matters of a `<disk>`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskElement {
    pub target: String,
    /// file, block, vhostuser, …
    pub kind: String,
    /// disk, cdrom, …
    pub device: String,
    /// The file or device, or the socket.
    pub source: Option<String>,
}

/// A domain and its disks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Domain {
    pub name: String,
    pub uuid: String,
    pub metadata: Metadata,
    /// Those of libvirt, in their order.
    pub disks: Vec<DiskElement>,
    /// Guest memory can be shared with the daemon.
    pub shares_memory: bool,
    /// The SELinux context that libvirt gives to files of this guest, and of no other; known from when it is started, if at all.
    pub image_label: Option<String>,
}

/// The text of a child element.
fn child_text<'a>(element: Node<'a, '_>, name: &str) -> Option<&'a str> {
    child(element, name).and_then(|n| n.text())
}

pub(crate) fn child<'a, 'i>(element: Node<'a, 'i>, name: &str) -> Option<Node<'a, 'i>> {
    element.children().find(|n| n.has_tag_name(name))
}

pub(crate) fn disks<'a, 'i>(root: Node<'a, 'i>) -> impl Iterator<Item = (String, Node<'a, 'i>)> {
    let devices = child(root, "devices");
    let disks = devices.into_iter().flat_map(|d| d.children());
    disks.filter(|n| n.has_tag_name("disk")).filter_map(|disk| {
        let target = child(disk, "target")?.attribute("dev")?;
        Some((target.to_owned(), disk))
    })
}

/// The element of ours.
pub(crate) fn metadata_element<'a, 'i>(root: Node<'a, 'i>) -> Option<Node<'a, 'i>> {
    let metadata = child(root, "metadata")?;
    let mut children = metadata.children();
    children.find(|n| n.has_tag_name((NAMESPACE, "domain")))
}

/// Whether guest memory is shared with other processes, by `<memoryBacking>` or by every NUMA cell.
pub(crate) fn shares_memory(root: Node<'_, '_>) -> bool {
    let shared = |n: Node<'_, '_>| n.attribute("mode") == Some("shared");
    let backing = child(root, "memoryBacking");
    if backing.and_then(|b| child(b, "access")).is_some_and(shared) {
        return true;
    }
    let numa = child(root, "cpu").and_then(|c| child(c, "numa"));
    let mut cells = numa
        .into_iter()
        .flat_map(|n| n.children())
        .filter(|n| n.has_tag_name("cell"))
        .peekable();
    cells.peek().is_some() && cells.all(|c| c.attribute("memAccess") == Some("shared"))
}

fn image_label(root: Node<'_, '_>) -> Option<String> {
    let selinux = root
        .children()
        .find(|n| n.has_tag_name("seclabel") && n.attribute("model") == Some("selinux"))?;
    child_text(selinux, "imagelabel").map(str::to_owned)
}

/// The element of one disk, as it stands there.
pub fn disk_xml(xml: &str, target: &str) -> Result<Option<String>> {
    let doc = document(xml)?;
    let found = disks(doc.root_element()).find(|(t, _)| t == target);
    Ok(found.map(|(_, node)| xml[node.range()].to_owned()))
}

pub(crate) fn document(xml: &str) -> Result<Document<'_>> {
    Document::parse(xml).map_err(|e| Error(format!("the domain's XML cannot be read: {e}")))
}

/// The XML of a domain that comes from another host, with sockets where this host has them: None if all can be where they were.
pub fn moved_sockets(xml: &str, domain: &Domain) -> Result<Option<String>> {
    let doc = document(xml)?;
    let mut edits = Vec::new();
    for (target, node) in disks(domain_element(&doc)) {
        let source = child(node, "source").and_then(|s| s.attribute_node("path"));
        let ours = domain.served().any(|(disk, _)| disk.target == target);
        if let (Some(path), true) = (source, ours) {
            let folder = Path::new(path.value()).parent();
            if folder.is_some_and(|f| !f.is_dir()) {
                edits.push((path.range_value(), domain.socket_path(&target)));
            }
        }
    }
    if edits.is_empty() {
        return Ok(None);
    }
    let mut out = xml.to_owned();
    for (range, path) in edits.iter().rev() {
        // A path of ours has nothing in it that would have to be escaped.
        out.replace_range(range.clone(), &path.to_string_lossy());
    }
    Ok(Some(out))
}

/// Who a domain is, and which daemon serves its disks: what can be said even if the rest of its metadata is not understood.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    pub name: String,
    pub uuid: String,
    /// There is an element of ours, with this instance.
    pub served_by: Option<Option<String>>,
}

impl Identity {
    pub fn parse(xml: &str) -> Result<Identity> {
        let doc = document(xml)?;
        let root = domain_element(&doc);
        let (Some(name), Some(uuid)) = (child_text(root, "name"), child_text(root, "uuid")) else {
            return error("this is no domain's XML: it has no name or no uuid");
        };
        let ours = metadata_element(root);
        Ok(Identity {
            name: name.to_owned(),
            uuid: uuid.to_owned(),
            served_by: ours.map(|e| e.attribute("instance").map(str::to_owned)),
        })
    }
}

/// The domain itself: what libvirt gives at a reconnect, or keeps with a snapshot, has it inside.
fn domain_element<'a, 'i>(doc: &'a Document<'i>) -> Node<'a, 'i> {
    let root = doc.root_element();
    match root.has_tag_name("domain") {
        true => root,
        false => child(root, "domain").unwrap_or(root),
    }
}

impl Domain {
    pub fn parse(xml: &str) -> Result<Domain> {
        let doc = document(xml)?;
        let root = domain_element(&doc);
        let (Some(name), Some(uuid)) = (child_text(root, "name"), child_text(root, "uuid")) else {
            return error("this is no domain's XML: it has no name or no uuid");
        };
        let metadata = metadata_element(root).map(Metadata::parse).transpose();
        let metadata = metadata.map_err(|Error(e)| Error(format!("domain '{name}': {e}")))?;
        let disks = disks(root).map(|(target, n)| {
            let source = child(n, "source");
            let source = source.and_then(|s| {
                let attributes = ["file", "dev", "path"];
                attributes.iter().find_map(|a| s.attribute(*a))
            });
            DiskElement {
                target,
                kind: n.attribute("type").unwrap_or("file").to_owned(),
                device: n.attribute("device").unwrap_or("disk").to_owned(),
                source: source.map(str::to_owned),
            }
        });
        Ok(Domain {
            name: name.to_owned(),
            uuid: uuid.to_owned(),
            metadata: metadata.unwrap_or_default(),
            disks: disks.collect(),
            shares_memory: shares_memory(root),
            image_label: image_label(root),
        })
    }

    /// The disks that the daemon serves, with their sockets: those that metadata and devices both have.
    pub fn served(&self) -> impl Iterator<Item = (&Disk, &Path)> {
        self.metadata.disks.iter().filter_map(|disk| {
            let element = self.element(&disk.target)?;
            let socket = element.source.as_deref()?;
            (element.kind == "vhostuser").then(|| (disk, Path::new(socket)))
        })
    }

    /// A disk whose socket is one of ours, and of which the metadata say nothing.
    pub fn unknown(&self) -> Option<&DiskElement> {
        self.disks.iter().find(|e| {
            let socket = e.source.as_deref().filter(|_| e.kind == "vhostuser");
            socket.is_some_and(|s| target_of(s, &self.uuid).is_some())
                && self.metadata.disk(&e.target).is_none()
        })
    }

    pub fn element(&self, target: &str) -> Option<&DiskElement> {
        self.disks.iter().find(|d| d.target == target)
    }

    /// What a disk is called in the daemon.
    pub fn object_name(&self, target: &str) -> String {
        object_name(&self.name, &self.uuid, target)
    }

    /// Where the socket of a disk belongs.
    pub fn socket_path(&self, target: &str) -> PathBuf {
        socket_path(&self.uuid, self.metadata.instance.as_deref(), target)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_label_of_a_guest() {
        let label = |seclabels: &str| {
            let xml = format!("<domain><name>vm</name><uuid>u</uuid>{seclabels}</domain>");
            Domain::parse(&xml).unwrap().image_label
        };
        let dac = "<seclabel type='dynamic' model='dac'><label>+0:+0</label><imagelabel>+0:+0</imagelabel></seclabel>";
        let selinux = "<seclabel type='dynamic' model='selinux' relabel='yes'><label>system_u:system_r:svirt_t:s0:c1,c2</label><imagelabel>system_u:object_r:svirt_image_t:s0:c1,c2</imagelabel></seclabel>";
        let expected = Some("system_u:object_r:svirt_image_t:s0:c1,c2".to_owned());
        assert_eq!(label(&format!("{dac}{selinux}")), expected);
        // Not started, or not confined.
        assert_eq!(label("<seclabel type='dynamic' model='selinux'/>"), None);
        assert_eq!(label("<seclabel type='none' model='selinux'/>"), None);
        assert_eq!(label(dac), None);
    }

    #[test]
    fn sockets_are_where_this_host_has_them() {
        let uuid = "c7a5fdbd-edaf-9455-926a-d65c16db1809";
        let disk = |folder: &str, target: &str| {
            format!(
                "<disk type='vhostuser' device='disk'><driver name='qemu' type='raw'/><source type='unix' path='{folder}/{uuid}-{target}.sock'/><target dev='{target}' bus='virtio'/></disk>"
            )
        };
        let domain = |disks: &str| {
            format!(
                "<domain><name>vm</name><uuid>{uuid}</uuid><metadata><vdisk:domain xmlns:vdisk='{NAMESPACE}'><vdisk:disk target='vda' file='/a' format='raw'/><vdisk:disk target='vdb' file='/b' format='raw'/></vdisk:domain></metadata><devices>{disks}</devices></domain>"
            )
        };
        let here = |xml: &str| moved_sockets(xml, &Domain::parse(xml).unwrap()).unwrap();
        // All are where they can be.
        let xml = domain(&disk("/run", "vda"));
        assert_eq!(here(&xml), None);
        // Ours move, and nobody else's (vdc).
        let there = ["vda", "vdb", "vdc"].map(|t| disk("/no/such", t)).concat();
        let moved = here(&domain(&there)).unwrap();
        let wanted = [
            disk("/run/vdiskd", "vda"),
            disk("/run/vdiskd", "vdb"),
            disk("/no/such", "vdc"),
        ];
        assert_eq!(moved, domain(&wanted.concat()));
    }
}
