//! A domain's XML with disks that vdiskd serves, and back.

use std::ops::Range;

use roxmltree::Node;

use crate::disk::{Disk, Original};
use crate::metadata::{Metadata, escape};
use crate::xml::{child, disks, document, metadata_element, shares_memory};
use crate::{Domain, Result, error};

/// What is done to a domain.
#[derive(Clone, Debug, Default)]
pub struct Adoption {
    /// The disks, or all that can be.
    pub targets: Vec<String>,
    pub instance: Option<String>,
    /// Settings of each.
    pub settings: Vec<(String, String)>,
}

/// Pieces of a text and what takes their places.
#[derive(Default)]
struct Edits(Vec<(Range<usize>, String)>);

impl Edits {
    fn replace(&mut self, range: Range<usize>, with: impl Into<String>) {
        self.0.push((range, with.into()));
    }

    /// Takes an element out, with the line that it stands on.
    fn remove(&mut self, text: &str, element: Range<usize>) {
        let before = text[..element.start].trim_end_matches([' ', '\t']);
        let after = &text[element.end..];
        let own_line = before.ends_with('\n') && after.starts_with('\n');
        let range = match own_line {
            true => before.len()..element.end + 1,
            false => element,
        };
        self.replace(range, "");
    }

    fn apply(mut self, text: &str) -> String {
        self.0.sort_by_key(|(range, _)| range.start);
        let mut out = text.to_owned();
        for (range, with) in self.0.into_iter().rev() {
            out.replace_range(range, &with);
        }
        out
    }
}

fn indent_of(text: &str, at: usize) -> usize {
    let line = text[..at].rfind('\n').map_or(0, |n| n + 1);
    at - line
}

/// What vdiskd cannot do for a disk (yet), or what only libvirt's own disks have.
const NOT_TAKEN: [(&str, &str); 8] = [
    ("shareable", "is shared between domains"),
    ("transient", "forgets what is written"),
    ("wwn", "has a WWN"),
    ("vendor", "has a vendor's name"),
    ("geometry", "has a geometry"),
    ("blockio", "has block sizes of its own"),
    ("mirror", "is being copied"),
    ("auth", "needs to log in"),
];

/// Attributes of `<driver>` that mean the same on a vhost-user disk.
const KEPT: [&str; 6] = [
    "queues",
    "queue_size",
    "packed",
    "event_idx",
    "iommu",
    "ats",
];

/// Attributes of `<driver>` that become settings, or that need not be known.
const TAKEN: [&str; 10] = [
    "name",
    "type",
    "cache",
    "discard",
    "detect_zeroes",
    "io",
    "iothread",
    "ioeventfd",
    "discard_no_unref",
    "metadata_cache",
];

/// The disk that an element describes, as vdiskd serves it.
fn take(domain: &Domain, target: &str, element: Node<'_, '_>, text: &str) -> Result<Disk> {
    let no = |why: String| error(format!("disk '{target}' cannot be adopted: {why}"));
    for (name, why) in NOT_TAKEN {
        if child(element, name).is_some() {
            return no(format!("it {why} (<{name}>)"));
        }
    }
    let bus = child(element, "target").and_then(|t| t.attribute("bus"));
    if bus != Some("virtio") {
        return no(format!(
            "it is on bus '{}', and vhost-user-blk is virtio: change the bus first, and see that the guest boots so",
            bus.unwrap_or("?")
        ));
    }
    let source = child(element, "source");
    let file = source.and_then(|s| s.attribute("file").or_else(|| s.attribute("dev")));
    let Some(file) = file else {
        return no("it has no file and no block device".into());
    };
    let driver = child(element, "driver");
    let attribute = |name| driver.and_then(|d| d.attribute(name));
    if source.is_some_and(|s| child(s, "slices").is_some())
        || child(element, "throttlefilters").is_some()
    {
        return no("it is a part of a file, or has filters of libvirt's".into());
    }
    let mut disk = Disk::new(target, file, attribute("type").unwrap_or("raw"))?;
    for a in driver.iter().flat_map(|d| d.attributes()) {
        if !KEPT.contains(&a.name()) && !TAKEN.contains(&a.name()) {
            return no(format!(
                "its driver has {}='{}', which vdiskd does not do",
                a.name(),
                a.value()
            ));
        }
    }
    for (theirs, ours) in [
        ("cache", "cache"),
        ("discard", "discard"),
        ("detect_zeroes", "detect-zeroes"),
    ] {
        if let Some(value) = attribute(theirs).filter(|v| *v != "default") {
            disk.set(ours, value)?;
        }
    }
    if child(element, "readonly").is_some() {
        disk.set("readonly", "yes")?;
    }
    if let Some(serial) = child(element, "serial").and_then(|s| s.text()) {
        disk.set("serial", serial)?;
    }
    for limit in child(element, "iotune").iter().flat_map(|n| n.children()) {
        match (limit.tag_name().name(), limit.text().unwrap_or_default()) {
            ("", _) => {}
            // libvirt's are each domain's own.
            ("group_name", name) => disk.set("group", &domain.object_name(name))?,
            (name, value) => match value.parse() {
                Ok(n) => disk.set_limit(name, n)?,
                Err(_) => return no(format!("its limit {name} is '{value}'")),
            },
        }
    }
    disk.original = Some(Original {
        xml: text[element.range()].to_owned(),
        owner: None,
    });
    Ok(disk)
}

/// The element of a disk that vdiskd serves at a socket, in lines indented by `indent` (the first is not). `more` is what else it
/// has: the address, the boot order.
fn element(disk: &Disk, socket: &str, driver: &str, more: &[&str], indent: usize) -> String {
    let pad = " ".repeat(indent);
    let target = escape(&disk.target);
    let socket = escape(socket);
    let mut out = format!(
        "<disk type='vhostuser' device='disk'>
{pad}  <driver name='qemu' type='raw'{driver}/>
{pad}  <source type='unix' path='{socket}'>
{pad}    <reconnect enabled='yes' timeout='1'/>
{pad}  </source>
{pad}  <target dev='{target}' bus='virtio'/>
"
    );
    for line in more {
        out.push_str(&format!("{pad}  {line}\n"));
    }
    out.push_str(&format!("{pad}</disk>"));
    out
}

/// The device to attach for a disk of a domain.
pub fn attach_xml(domain: &Domain, disk: &Disk) -> String {
    let socket = domain.socket_path(&disk.target);
    let queues = disk.get("queues").map(|q| format!(" queues='{q}'"));
    element(
        disk,
        &socket.to_string_lossy(),
        &queues.unwrap_or_default(),
        &[],
        0,
    )
}

/// Has guest memory shared; what `<memoryBacking>` was before.
fn share_memory(root: Node<'_, '_>, text: &str, edits: &mut Edits) -> Option<String> {
    if shares_memory(root) {
        return None;
    }
    let Some(backing) = child(root, "memoryBacking") else {
        let after = ["currentMemory", "memory", "maxMemory", "uuid", "name"];
        let after = after.iter().find_map(|n| child(root, n))?.range();
        let pad = " ".repeat(indent_of(text, after.start));
        edits.replace(
            after.end..after.end,
            format!(
                "\n{pad}<memoryBacking>\n{pad}  <source type='memfd'/>\n{pad}  <access mode='shared'/>\n{pad}</memoryBacking>"
            ),
        );
        return Some(String::new());
    };
    let before = text[backing.range()].to_owned();
    let pad = " ".repeat(indent_of(text, backing.range().start));
    let mut inside: Vec<String> = Vec::new();
    for part in backing.children().filter(Node::is_element) {
        if !part.has_tag_name("access") {
            inside.push(text[part.range()].to_owned());
        }
    }
    let has_pages = child(backing, "source").is_some() || child(backing, "hugepages").is_some();
    if !has_pages {
        inside.push("<source type='memfd'/>".into());
    }
    inside.push("<access mode='shared'/>".into());
    let lines: String = inside.iter().map(|l| format!("{pad}  {l}\n")).collect();
    edits.replace(
        backing.range(),
        format!("<memoryBacking>\n{lines}{pad}</memoryBacking>"),
    );
    Some(before)
}

/// Puts metadata in the place of what there is.
fn put_metadata(root: Node<'_, '_>, text: &str, metadata: &Metadata, edits: &mut Edits) {
    let is_empty = metadata.disks.is_empty() && metadata.memory_backing.is_none();
    match (metadata_element(root), child(root, "metadata")) {
        (Some(ours), Some(all)) if is_empty => {
            let others = all.children().filter(|n| n.is_element() && *n != ours);
            match others.count() {
                0 => edits.remove(text, all.range()),
                _ => edits.remove(text, ours.range()),
            }
        }
        (Some(ours), _) => {
            let indent = indent_of(text, ours.range().start);
            edits.replace(ours.range(), metadata.to_xml(indent));
        }
        (None, _) if is_empty => {}
        (None, Some(all)) if all.children().any(|n| n.is_element()) => {
            let end = all.range().end - "</metadata>".len();
            let indent = indent_of(text, all.range().start);
            let pad = " ".repeat(indent);
            let at = text[..end].trim_end_matches([' ', '\t']).len();
            edits.replace(
                at..end,
                format!("{pad}  {}\n{pad}", metadata.to_xml(indent + 2)),
            );
        }
        (None, all) => {
            let place = all.or_else(|| child(root, "uuid")).map(|n| n.range());
            let place = place.unwrap_or_default();
            let indent = indent_of(text, place.start);
            let pad = " ".repeat(indent);
            let element = format!(
                "<metadata>\n{pad}  {}\n{pad}</metadata>",
                metadata.to_xml(indent + 2)
            );
            match all {
                Some(_) => edits.replace(place, element),
                None => edits.replace(place.end..place.end, format!("\n{pad}{element}")),
            }
        }
    }
}

/// Turns file and block disks of a domain into disks that vdiskd serves; the new XML, and the disks.
///
/// # Errors
/// Names the disk and what stands against it; with no targets given, disks that cannot be adopted stay as they are, and it is an
/// error if there is none that can.
pub fn adopt(xml: &str, how: &Adoption) -> Result<(String, Vec<Disk>)> {
    let domain = Domain::parse(xml)?;
    let doc = document(xml)?;
    let root = doc.root_element();
    let mut edits = Edits::default();
    let mut metadata = domain.metadata.clone();
    if !metadata.disks.is_empty() && how.instance.is_some() && how.instance != metadata.instance {
        return error(format!(
            "domain '{}' has disks of {} already: all of a domain are one daemon's",
            domain.name,
            metadata.instance.as_deref().unwrap_or("the usual daemon")
        ));
    }
    metadata.instance = how.instance.clone().or(metadata.instance);
    let mut adopted = Vec::new();
    let mut left = Vec::new();
    for (target, node) in disks(root) {
        let named = how.targets.contains(&target);
        let kind = node.attribute("type").unwrap_or("file");
        let is_disk = node.attribute("device").unwrap_or("disk") == "disk";
        let possible = matches!(kind, "file" | "block") && is_disk;
        if !how.targets.is_empty() && !named {
            continue;
        }
        if !possible {
            if named {
                return error(format!(
                    "disk '{target}' cannot be adopted: it is a {} of type '{kind}', and disks in files and block devices can be",
                    node.attribute("device").unwrap_or("disk")
                ));
            }
            continue;
        }
        let taken = take(&domain, &target, node, xml).and_then(|mut disk| {
            for (name, value) in &how.settings {
                disk.set(name, value)?;
            }
            Ok(disk)
        });
        let disk = match taken {
            Ok(disk) => disk,
            Err(e) if named => return Err(e),
            Err(e) => {
                left.push(e.to_string());
                continue;
            }
        };
        let encrypted = child(node, "encryption").is_some()
            || child(node, "source").is_some_and(|s| child(s, "encryption").is_some());
        if encrypted && disk.get("secret").is_none() {
            return error(format!(
                "disk '{target}' is encrypted: give its secret to vdiskd (vdiskctl secret add NAME), and name it: secret=NAME"
            ));
        }
        let driver = child(node, "driver");
        let kept: String = KEPT
            .iter()
            .filter_map(|name| Some((name, driver?.attribute(*name)?)))
            .map(|(name, value)| format!(" {name}='{}'", escape(value)))
            .collect();
        let more: Vec<&str> = node
            .children()
            .filter(|n| {
                ["boot", "alias", "address"]
                    .iter()
                    .any(|t| n.has_tag_name(*t))
            })
            .map(|n| &xml[n.range()])
            .collect();
        let indent = indent_of(xml, node.range().start);
        let mut at = domain.clone();
        at.metadata.instance = metadata.instance.clone();
        let socket = at.socket_path(&target);
        edits.replace(
            node.range(),
            element(&disk, &socket.to_string_lossy(), &kept, &more, indent),
        );
        adopted.push(disk);
    }
    if let Some(missing) = how.targets.iter().find(|t| domain.element(t).is_none()) {
        return error(format!("domain '{}' has no disk '{missing}'", domain.name));
    }
    if adopted.is_empty() {
        return error(match left.is_empty() {
            true => format!("domain '{}' has no disk that could be adopted", domain.name),
            false => left.join("; "),
        });
    }
    let is_adopted = |t: &str| adopted.iter().any(|d| d.target == t);
    // Something may be left of disks that were taken away.
    metadata.disks.retain(|d| !is_adopted(&d.target));
    metadata.retain_snapshots(|_, d| !is_adopted(&d.target));
    metadata.disks.extend(adopted.iter().cloned());
    if let Some(before) = share_memory(root, xml, &mut edits) {
        metadata.memory_backing = Some(before);
    }
    put_metadata(root, xml, &metadata, &mut edits);
    Ok((edits.apply(xml), adopted))
}

/// Has the guest's memory shared, which vhost-user needs; `None` if it is already.
pub fn with_shared_memory(xml: &str) -> Result<Option<String>> {
    let mut metadata = Domain::parse(xml)?.metadata;
    let doc = document(xml)?;
    let mut edits = Edits::default();
    let Some(before) = share_memory(doc.root_element(), xml, &mut edits) else {
        return Ok(None);
    };
    metadata.memory_backing = Some(before);
    put_metadata(doc.root_element(), xml, &metadata, &mut edits);
    Ok(Some(edits.apply(xml)))
}

/// The XML with other metadata of ours.
pub fn replace_metadata(xml: &str, metadata: &Metadata) -> Result<String> {
    let doc = document(xml)?;
    let mut edits = Edits::default();
    put_metadata(doc.root_element(), xml, metadata, &mut edits);
    Ok(edits.apply(xml))
}

/// The original element of a disk, with the image that it has now.
fn restored(disk: &Disk, original: &Original) -> Result<String> {
    let doc = document(&original.xml)?;
    let root = doc.root_element();
    let mut edits = Edits::default();
    let source = child(root, "source");
    let name = source.and_then(|s| s.attribute_node("file").or_else(|| s.attribute_node("dev")));
    if let Some(name) = name.filter(|n| n.value() != disk.file()) {
        if disk.backing.iter().any(|b| b.secret.is_some()) {
            return error(format!(
                "disk '{}' was '{}' and is '{}' now, and libvirt would not find the secrets of all its images: bring it back first (vdiskctl domain snapshot delete or blockcommit)",
                disk.target,
                name.value(),
                disk.file()
            ));
        }
        if name.name() == "dev" || disk.format() == "luks" {
            return error(format!(
                "disk '{}' was '{}' and is '{}' now, which is another kind of thing: bring it back first (vdiskctl domain blockcommit or blockcopy)",
                disk.target,
                name.value(),
                disk.file()
            ));
        }
        edits.replace(name.range_value(), escape(disk.file()));
        let driver = child(root, "driver");
        match (driver, driver.and_then(|d| d.attribute_node("type"))) {
            (_, Some(format)) => edits.replace(format.range_value(), disk.format()),
            (Some(driver), None) => {
                let at = driver.range().start + "<driver".len();
                edits.replace(at..at, format!(" type='{}'", disk.format()));
            }
            (None, None) => {
                let at = child(root, "source").map_or(0, |s| s.range().start);
                let driver = format!("<driver name='qemu' type='{}'/>", disk.format());
                edits.replace(at..at, driver);
            }
        }
        // It says what the other one stood on.
        if let Some(backing) = child(root, "backingStore") {
            edits.remove(&original.xml, backing.range());
        }
    }
    Ok(edits.apply(&original.xml))
}

/// Turns disks that vdiskd serves into what they were before; the new XML, and the disks. All of them if no targets are given.
pub fn release(xml: &str, targets: &[String]) -> Result<(String, Vec<Disk>)> {
    let domain = Domain::parse(xml)?;
    let doc = document(xml)?;
    let root = doc.root_element();
    let mut edits = Edits::default();
    let mut metadata = domain.metadata.clone();
    if let Some(missing) = targets.iter().find(|t| metadata.disk(t).is_none()) {
        return error(format!(
            "domain '{}' has no disk '{missing}' that vdiskd serves",
            domain.name
        ));
    }
    let (released, kept): (Vec<Disk>, Vec<Disk>) = metadata
        .disks
        .iter()
        .cloned()
        .partition(|d| targets.is_empty() || targets.contains(&d.target));
    if released.is_empty() {
        return error(format!(
            "domain '{}' has no disk that vdiskd serves",
            domain.name
        ));
    }
    // What is older than a disk that is released is not known to anybody any more.
    metadata.retain_snapshots(|_, d| released.iter().all(|r| r.target != d.target));
    for disk in &released {
        let Some(original) = &disk.original else {
            return error(format!(
                "disk '{}' was never another one: detach it (vdiskctl domain detach {} {0} --config)",
                disk.target, domain.name
            ));
        };
        let found = disks(root).find(|(target, _)| *target == disk.target);
        if let Some((_, node)) = found {
            edits.replace(node.range(), restored(disk, original)?);
        }
    }
    metadata.disks = kept;
    if metadata.disks.is_empty() {
        if let (Some(before), Some(backing)) =
            (metadata.memory_backing.take(), child(root, "memoryBacking"))
        {
            match before.is_empty() {
                true => edits.remove(xml, backing.range()),
                false => edits.replace(backing.range(), before),
            }
        }
        metadata.instance = None;
    }
    put_metadata(root, xml, &metadata, &mut edits);
    Ok((edits.apply(xml), released))
}

#[cfg(test)]
mod tests {
    use super::*;

    const XML: &str = "<domain type='qemu'>
  <name>vm</name>
  <uuid>c7a5fdbd-edaf-9455-926a-d65c16db1809</uuid>
  <memory unit='KiB'>524288</memory>
  <currentMemory unit='KiB'>524288</currentMemory>
  <devices>
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2' cache='none' discard='unmap' queues='2'/>
      <source file='/srv/a &amp; b.qcow2'/>
      <target dev='vda' bus='virtio'/>
      <iotune>
        <total_iops_sec>500</total_iops_sec>
      </iotune>
      <serial>ABC</serial>
      <boot order='1'/>
      <address type='pci' domain='0x0000' bus='0x04' slot='0x00' function='0x0'/>
    </disk>
    <disk type='file' device='cdrom'>
      <target dev='sda' bus='sata'/>
      <readonly/>
    </disk>
    <disk type='block' device='disk'>
      <driver name='qemu' type='raw'/>
      <source dev='/dev/vg0/data'/>
      <target dev='vdb' bus='virtio'/>
      <readonly/>
    </disk>
  </devices>
</domain>
";

    fn backings() -> [String; 5] {
        let with = |text: &str| {
            XML.replace(
                "  <devices>",
                &format!("  <memoryBacking>\n{text}  </memoryBacking>\n  <devices>"),
            )
        };
        [
            XML.to_owned(),
            with("    <hugepages/>\n"),
            with("    <source type='memfd'/>\n    <access mode='private'/>\n"),
            with("    <access mode='shared'/>\n"),
            XML.replace(
                "  <memory ",
                "  <metadata>\n    <x:y xmlns:x='urn:x' z='1'/>\n  </metadata>\n  <memory ",
            ),
        ]
    }

    #[test]
    fn what_is_adopted_is_released_as_it_was() {
        for before in backings() {
            let (after, disks) = adopt(&before, &Adoption::default()).unwrap();
            assert_eq!(disks.len(), 2);
            let domain = Domain::parse(&after).unwrap();
            assert!(domain.shares_memory, "{after}");
            let served: Vec<_> = domain.served().collect();
            assert_eq!(served.len(), 2, "{after}");
            let plain = domain.metadata.to_plain_xml();
            assert!(
                !plain.contains("vdisk:") && !plain.contains("xmlns"),
                "{plain}"
            );
            let (vda, socket) = served[0];
            assert_eq!(vda.file(), "/srv/a & b.qcow2");
            assert_eq!(vda.get("cache"), Some("none"));
            assert_eq!(vda.get("serial"), Some("ABC"));
            assert_eq!(vda.iotune["total_iops_sec"], 500);
            let name = "c7a5fdbd-edaf-9455-926a-d65c16db1809-vda.sock";
            assert_eq!(socket, std::path::Path::new("/run/vdiskd").join(name));
            assert!(served[1].0.is_read_only());
            for kept in ["queues='2'", "<boot order='1'/>", "bus='0x04'"] {
                assert!(after.contains(kept), "{kept}: {after}");
            }
            assert_eq!(release(&after, &[]).unwrap().0, before);
        }
    }

    #[test]
    fn one_disk_at_a_time() {
        let one = Adoption {
            targets: vec!["vdb".into()],
            ..Adoption::default()
        };
        let (half, _) = adopt(XML, &one).unwrap();
        let (all, _) = adopt(&half, &Adoption::default()).unwrap();
        assert_eq!(Domain::parse(&all).unwrap().served().count(), 2);
        let (back, _) = release(&all, &["vda".into()]).unwrap();
        assert_eq!(back, half);
        assert_eq!(release(&back, &["vdb".into()]).unwrap().0, XML);
        assert!(release(&back, &["vda".into()]).is_err());
    }

    #[test]
    fn a_snapshot_stays_when_a_disk_is_released() {
        let (after, _) = adopt(XML, &Adoption::default()).unwrap();
        let after = after.replace("file='/srv/a &amp; b.qcow2'", "file='/srv/over.qcow2'");
        let (back, _) = release(&after, &[]).unwrap();
        assert_eq!(back, XML.replace("a &amp; b", "over"));
    }

    #[test]
    fn what_cannot_be_is_named() {
        let adopt_one = |xml: &str, target: &str| {
            let how = Adoption {
                targets: vec![target.into()],
                ..Adoption::default()
            };
            adopt(xml, &how).unwrap_err().to_string()
        };
        for (from, to, why) in [
            ("<serial>ABC</serial>", "<shareable/>", "<shareable>"),
            (
                "dev='vda' bus='virtio'",
                "dev='vda' bus='sata'",
                "bus 'sata'",
            ),
            ("type='qcow2'", "type='vmdk'", "vmdk"),
            ("discard='unmap'", "copy_on_read='on'", "copy_on_read"),
            (
                "<serial>ABC</serial>",
                "<encryption format='luks'/>",
                "secret",
            ),
        ] {
            let e = adopt_one(&XML.replace(from, to), "vda");
            assert!(e.contains("'vda'") && e.contains(why), "{e}");
        }
        assert!(adopt_one(XML, "sda").contains("cdrom"));
        assert!(adopt_one(XML, "vdx").contains("no disk 'vdx'"));
    }

    #[test]
    fn metadata_that_is_not_known_is_refused() {
        let (after, _) = adopt(XML, &Adoption::default()).unwrap();
        for (from, to) in [
            ("cache='none'", "coche='none'"),
            ("<vdisk:iotune ", "<vdisk:tune "),
            ("total_iops_sec='500'", "total='500'"),
            ("target='vdb'", "target='vda'"),
        ] {
            let changed = after.replace(from, to);
            assert_ne!(changed, after, "{from}");
            let e = Domain::parse(&changed).unwrap_err().to_string();
            assert!(e.contains("'vm'"), "{e}");
        }
    }
}
