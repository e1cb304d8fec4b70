//! `vdiskctl domain snapshot …`.

use std::path::{Path, PathBuf};

use serde_json::{Value as Json, json};
use vdisk_domain::{Backing, Disk, DiskElement, Metadata, SnapshotDisk, encryption};
use vdiskctl::args::Merge;
use vdiskctl::error::{Error, Result};
use vdiskctl::jobs;
use vdiskctl::objects::{Objects, properties};
use vdiskctl::options::Options;
use vdiskctl::output::{Rows, format_time, number, print_json, print_pause};
use zbus::Variant;

use crate::adopt::in_use_elsewhere;
use crate::args::Snapshot as Command;
use crate::disks::{Image, Running, chain, none_served, stays_encrypted};
use crate::files::{self, Link};
use crate::live::stamp;
use crate::{Context, wrong};

pub async fn run(cx: &Context, command: &Command) -> Result<()> {
    match command {
        Command::Create { .. } => create(cx, command).await,
        Command::List { domain } => list(cx, domain),
        Command::Revert {
            domain,
            name,
            disks_only,
            drop_newer,
        } => revert(cx, domain, name, *disks_only, *drop_newer).await,
        Command::Delete { domain, name } => delete(cx, domain, name).await,
    }
}

fn check_name(name: &str) -> Result<()> {
    let ok = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_');
    match !name.is_empty() && name.len() <= 40 && name.chars().all(ok) {
        true => Ok(()),
        false => Err(Error::invalid(format!(
            "snapshot '{name}': give at most 40 letters, digits, '-', '.' and '_'"
        ))),
    }
}

/// The overlay that a snapshot puts over a file: beside it, with the snapshot's name in place of its ending, as virsh does.
fn overlay_of(file: &str, name: &str) -> PathBuf {
    let file = Path::new(file);
    match file.starts_with("/dev") {
        true => Path::new("/var/lib/libvirt/images")
            .join(file.file_name().unwrap_or_default())
            .with_extension(name),
        false => file.with_extension(name),
    }
}

/// One disk of a new snapshot.
struct Part {
    disk: SnapshotDisk,
    /// The node of its image, and the overlay's.
    node: String,
    over: String,
    size: u64,
    /// What opens the image, and is to open the overlay.
    secret: Option<String>,
}

async fn create(cx: &Context, command: &Command) -> Result<()> {
    let Command::Create {
        domain,
        name,
        disks,
        memspec,
        quiesce,
    } = command
    else {
        return Ok(());
    };
    // What is of the guest needs one.
    let running = match memspec.is_some() || *quiesce {
        true => Running::find(cx, domain).await?,
        false => Running::find_or_open(cx, domain).await?,
    };
    let name = name.clone().unwrap_or_else(|| stamp().to_string());
    check_name(&name)?;
    if running
        .domain
        .metadata
        .snapshots
        .iter()
        .any(|s| s.name == name)
    {
        return Err(Error::named(
            "Exists",
            format!(
                "domain '{}' has a snapshot '{name}' already",
                running.domain.name
            ),
        ));
    }
    let objects = running.look().await?;
    let mut parts = Vec::new();
    for disk in &running.domain.metadata.disks {
        if disk.is_read_only() || (!disks.is_empty() && !disks.contains(&disk.target)) {
            continue;
        }
        if disk.secrets().next().is_some() && memspec.is_some() {
            return Err(Error::named(
                "NotSupported",
                format!(
                    "disk '{}' is encrypted, and the guest's memory has its data in the clear: leave out --memspec",
                    disk.target
                ),
            ));
        }
        let (_, served) = running.disk(&disk.target)?;
        parts.push(part(&objects, disk, &served.id, &name)?);
    }
    if let Some(missing) = disks
        .iter()
        .find(|t| parts.iter().all(|p| p.disk.target != **t))
    {
        return Err(Error::not_found(format!(
            "domain '{}' has no disk '{missing}' that vdiskd serves and that is written to",
            running.domain.name
        )));
    }
    if parts.is_empty() {
        return Err(none_served(&running.domain.name));
    }
    if let Some(file) = memspec {
        check_memory_file(file)?;
        let left = |d: &&DiskElement| {
            let read_only = running.domain.metadata.disk(&d.target);
            let read_only = read_only.is_some_and(|d| d.is_read_only());
            let taken = parts.iter().any(|p| p.disk.target == d.target);
            d.device == "disk" && !read_only && !taken
        };
        if let Some(left) = running.domain.disks.iter().find(left) {
            return Err(Error::failed(format!(
                "disk '{}' would go on while the guest's memory is of another moment: a snapshot with memory has all disks, and vdiskd has to serve them (vdiskctl domain adopt)",
                left.target
            )));
        }
    }
    let snapshot = vdisk_domain::Snapshot {
        name: name.clone(),
        created: stamp(),
        memory: memspec.clone(),
        disks: parts.iter().map(|p| p.disk.clone()).collect(),
    };
    let mut made: Vec<String> = Vec::new();
    let images = make_overlays(&running, &parts, &mut made).await;
    // Before the guest writes to the overlays: an overlay with nothing in it is what is below it, so that it does no harm if nothing
    // comes of it, and a start without it would.
    let noted = images.and_then(|()| running.guest.change(|m| note(m, &snapshot)));
    let taken = match noted {
        Ok(()) => take(cx, &running, &parts, &name, memspec.as_deref(), *quiesce).await,
        Err(e) => Err(e),
    };
    let report = match taken {
        Ok(report) => report,
        Err(e) => {
            give_up(&running, &snapshot, &made).await?;
            return Err(e);
        }
    };
    let targets: Vec<&str> = parts.iter().map(|p| p.disk.target.as_str()).collect();
    let what = format!(
        "snapshot '{name}' has {} at one instant",
        targets.join(", ")
    );
    print_pause(&what, report, cx.args.json);
    Ok(())
}

/// A file for memory has to be new: libvirt writes over what is there.
fn check_memory_file(file: &str) -> Result<()> {
    let path = Path::new(file);
    if !path.is_absolute() || file.contains(['\'', '"', '<', '>', '&']) {
        return Err(Error::invalid(format!(
            "'{file}': give an absolute path without quotes, '<', '>' and '&'"
        )));
    }
    match path.exists() {
        true => Err(Error::named(
            "Exists",
            format!("'{file}' is there already: memory goes into a new file"),
        )),
        false => Ok(()),
    }
}

/// Has the metadata say that the disks are the overlays of a snapshot.
fn note(metadata: &mut Metadata, snapshot: &vdisk_domain::Snapshot) -> Result<()> {
    let mut mine = snapshot.clone();
    // The other definition may be about another image.
    mine.disks.retain(|part| {
        let disk = metadata.disk(&part.target);
        disk.is_some_and(|d| d.file() == part.file)
    });
    for part in &mine.disks {
        if let Some(disk) = metadata.disk_mut(&part.target) {
            disk.set("file", &part.overlay).map_err(wrong)?;
            disk.set("format", "qcow2").map_err(wrong)?;
            let below = Backing {
                file: part.file.clone(),
                format: part.format.clone(),
                // The overlay has the same.
                secret: disk.get("secret").map(str::to_owned),
            };
            disk.backing.insert(0, below);
        }
    }
    if mine.disks.len() != snapshot.disks.len() {
        mine.memory = None;
    }
    if !mine.disks.is_empty() {
        metadata.snapshots.push(mine);
    }
    Ok(())
}

/// Takes back what was noted of a snapshot that was not made. Overlays that are in use all the same, or of which nobody knows whether
/// they are, stay.
async fn give_up(
    running: &Running,
    snapshot: &vdisk_domain::Snapshot,
    made: &[String],
) -> Result<()> {
    for file in made {
        if files::is_open(&running.daemon, file).await? {
            return Ok(());
        }
    }
    running.guest.change(|metadata| {
        for part in &snapshot.disks {
            let disk = metadata.disk_mut(&part.target);
            if let Some(disk) = disk.filter(|d| d.file() == part.overlay) {
                disk.set("file", &part.file).map_err(wrong)?;
                disk.set("format", &part.format).map_err(wrong)?;
                if !disk.backing.is_empty() {
                    disk.backing.remove(0);
                }
            }
        }
        metadata.snapshots.retain(|s| s.name != snapshot.name);
        Ok(())
    })?;
    for file in made {
        let _ = std::fs::remove_file(file);
    }
    if let Some(memory) = &snapshot.memory {
        let _ = std::fs::remove_file(memory);
    }
    Ok(())
}

fn part(objects: &Objects, disk: &Disk, export: &str, name: &str) -> Result<Part> {
    let (target, noted) = (disk.target.as_str(), disk.file());
    let images = chain(objects, export)?;
    let Some((node, file, format)) = images.into_iter().next() else {
        return Err(Error::failed(format!("disk '{target}' has no image")));
    };
    if file != noted {
        return Err(Error::failed(format!(
            "disk '{target}' is '{file}' now, and the domain's metadata say '{noted}': correct them first (virsh edit)"
        )));
    }
    let overlay = overlay_of(&file, name);
    if overlay.exists() {
        return Err(Error::named(
            "Exists",
            format!(
                "'{}' is there already: choose another name for the snapshot",
                overlay.display()
            ),
        ));
    }
    let size = number(objects.find("node", &node)?, "Size");
    Ok(Part {
        disk: SnapshotDisk {
            written: false,
            target: target.to_owned(),
            file,
            format,
            overlay: overlay.to_string_lossy().into_owned(),
        },
        node,
        over: format!("{export}-{name}"),
        size,
        secret: disk.get("secret").map(str::to_owned),
    })
}

async fn make_overlays(running: &Running, parts: &[Part], made: &mut Vec<String>) -> Result<()> {
    let manager = running.manager().await?;
    for part in parts {
        let mut options = Options::from([
            ("size", Variant::from(part.size)),
            ("backing-file", Variant::from(part.disk.file.clone())),
            ("backing-fmt", Variant::from(part.disk.format.clone())),
        ]);
        options.extend(encryption("qcow2", part.secret.as_deref()));
        files::make_image(&manager, &part.disk.overlay, "qcow2", options).await?;
        made.push(part.disk.overlay.clone());
    }
    Ok(())
}

/// Puts the overlays over the disks in one instant.
async fn take(
    cx: &Context,
    running: &Running,
    parts: &[Part],
    name: &str,
    memory: Option<&str>,
    quiesce: bool,
) -> Result<vdiskctl::objects::Properties> {
    let manager = running.manager().await?;
    let was_running = running.guest.is_running()?;
    let mut actions = Vec::new();
    for part in parts {
        let disk = running.domain.metadata.disk(&part.disk.target);
        let mut options: Options<'_> = disk
            .map(|d| d.more_node_options())
            .unwrap_or_default()
            .into_iter()
            .collect();
        options.extend([
            ("node", Variant::from(part.node.clone())),
            ("node-name", Variant::from(part.over.clone())),
            ("driver", Variant::from("qcow2")),
            ("file.driver", Variant::from("file")),
            ("file.filename", Variant::from(part.disk.overlay.clone())),
        ]);
        options.extend(encryption("qcow2", part.secret.as_deref()));
        actions.push(("add-overlay", options));
    }
    if quiesce && let Err(e) = running.guest.freeze(true) {
        // It may have heard of it all the same.
        let _ = running.guest.freeze(false);
        return Err(e);
    }
    let stopped = match memory {
        Some(file) => {
            let targets: Vec<String> = running
                .domain
                .disks
                .iter()
                .map(|d| d.target.clone())
                .collect();
            running.guest.save_memory(name, file, &targets)
        }
        None => Ok(()),
    };
    let noted = match (memory, &stopped) {
        (Some(file), Ok(())) => note_snapshot(cx, file, name),
        _ => Ok(()),
    };
    let stopped = stopped.and(noted);
    let stopped = match memory {
        // To the daemon it looks as if the guest went on elsewhere, and it has let go of the images.
        Some(_) => stopped.and(open_images(running).await),
        None => stopped,
    };
    let report = match &stopped {
        Ok(()) => manager.transaction(actions, Options::new()).await,
        Err(_) => Ok(Default::default()),
    };
    let resumed = match memory {
        Some(_) if was_running => running.guest.resume(),
        _ => Ok(()),
    };
    let thawed = match quiesce {
        true => running.guest.freeze(false),
        false => Ok(()),
    };
    stopped?;
    let (_, report) = report?;
    for e in [resumed, thawed].into_iter().filter_map(|r| r.err()) {
        if !cx.args.json {
            anstream::eprintln!("warning: {e}");
        }
    }
    Ok(properties(report))
}

/// Has a file with memory say what it belongs to: its domain's disks would be written to where the snapshot has them.
/// Has the daemon open the images of a domain that it has let go of.
async fn open_images(running: &Running) -> Result<()> {
    for served in &running.served {
        let node = running.daemon.node(&served.node).await?;
        node.set_active(true, Options::new()).await?;
    }
    Ok(())
}

fn note_snapshot(cx: &Context, file: &str, name: &str) -> Result<()> {
    let saved = cx.libvirt.saved_xml(file)?;
    let mut metadata = vdisk_domain::Domain::parse(&saved).map_err(wrong)?.metadata;
    metadata.memory_of = Some(name.to_owned());
    let marked = vdisk_domain::replace_metadata(&saved, &metadata).map_err(wrong)?;
    cx.libvirt.set_saved_xml(file, &marked)
}

fn list(cx: &Context, domain: &str) -> Result<()> {
    let guest = cx.libvirt.find(domain)?;
    let metadata = guest.now()?.metadata;
    if cx.args.json {
        let all = metadata.snapshots.iter().map(|s| {
            let disks: Vec<Json> = s
                .disks
                .iter()
                .map(|d| json!({"target": d.target, "file": d.file, "format": d.format, "overlay": d.overlay}))
                .collect();
            json!({"name": s.name, "created": s.created, "memory": s.memory, "disks": disks})
        });
        print_json(&all.collect::<Json>());
        return Ok(());
    }
    let mut rows = Rows::new(&["name", "created", "disks", "memory"]);
    for s in &metadata.snapshots {
        let disks: Vec<&str> = s.disks.iter().map(|d| d.target.as_str()).collect();
        rows.add(vec![
            s.name.clone(),
            format_time(s.created * 1_000_000),
            disks.join(", "),
            s.memory.clone().unwrap_or_else(|| "-".into()),
        ]);
    }
    rows.print();
    Ok(())
}

fn missing(domain: &str, name: &str) -> Error {
    Error::not_found(format!(
        "domain '{domain}' has no snapshot '{name}': see vdiskctl domain snapshot list {domain}"
    ))
}

/// New overlays over what the snapshot has, in place of those that were written since.
async fn revert(
    cx: &Context,
    domain: &str,
    name: &str,
    disks_only: bool,
    drop_newer: bool,
) -> Result<()> {
    let guest = cx.libvirt.find(domain)?;
    guest.must_be_off()?;
    let there = guest.now()?;
    let snapshots = &there.metadata.snapshots;
    let place = snapshots.iter().position(|s| s.name == name);
    let Some(place) = place else {
        return Err(missing(&guest.name, name));
    };
    let dropped = &snapshots[place + 1..];
    let newer: Vec<&str> = dropped.iter().map(|s| s.name.as_str()).collect();
    if !newer.is_empty() && !drop_newer {
        return Err(Error::named(
            "InUse",
            format!(
                "domain '{0}' has newer snapshots, which would be lost: {1}; give --drop-newer if that is meant, or delete those that are in the way (vdiskctl domain snapshot delete {0} NAME)",
                guest.name,
                newer.join(", ")
            ),
        ));
    }
    let snapshot = snapshots[place].clone();
    let has = |target: &str| snapshot.disks.iter().any(|d| d.target == target);
    let mut others = dropped
        .iter()
        .flat_map(|s| s.disks.iter().map(move |d| (s, d)));
    if let Some((newer, disk)) = others.find(|(_, d)| !has(&d.target)) {
        return Err(Error::failed(format!(
            "snapshot '{}' has disk '{}', which '{name}' does not have and which would stay as it is: delete that one first (vdiskctl domain snapshot delete {} {})",
            newer.name, disk.target, guest.name, newer.name
        )));
    }
    if snapshot.disks.iter().any(|d| d.written) {
        return Err(Error::failed(format!(
            "the deletion of snapshot '{name}' was begun, and its disks are not what they were: finish that (vdiskctl domain snapshot delete {} {name})",
            guest.name
        )));
    }
    let memory = snapshot.memory.as_deref().filter(|_| !disks_only);
    let saved = memory.map(|file| cx.libvirt.saved_xml(file)).transpose()?;
    let daemon = cx.daemon(&there).await?;
    let manager = daemon.manager().await?;
    let mut new: Vec<(String, String, Vec<Backing>)> = Vec::new();
    for disk in &snapshot.disks {
        let now = there.metadata.disk(&disk.target);
        let fresh = overlay_of(&disk.file, &format!("{name}-{}", stamp()));
        let fresh = fresh.to_string_lossy().into_owned();
        let made = async {
            let chain = files::chain(&manager, &disk.file, &disk.format).await?;
            let with_secret = |link: &Link| {
                let known = now.and_then(|d| d.secret_of(&link.file).or(d.get("secret")));
                match known {
                    None if link.encrypted => Err(Error::failed(format!(
                        "disk '{}': '{}' is encrypted, and the domain's metadata name no secret for it: add it there (virsh edit)",
                        disk.target, link.file
                    ))),
                    known => Ok(link.with_secret(known)),
                }
            };
            let chain = chain.iter().map(with_secret).collect::<Result<Vec<_>>>()?;
            let secret = chain.first().and_then(|b| b.secret.clone());
            let format = disk.format.clone();
            let info = Options::from([
                ("filename", Variant::from(disk.file.clone())),
                ("driver", Variant::from(format.clone())),
            ]);
            let info = properties(manager.get_image_info(info).await?);
            let mut options = Options::from([
                ("size", Variant::from(number(&info, "virtual-size"))),
                ("backing-file", Variant::from(disk.file.clone())),
                ("backing-fmt", Variant::from(format)),
            ]);
            options.extend(encryption("qcow2", secret.as_deref()));
            files::make_image(&manager, &fresh, "qcow2", options).await?;
            let overlay = Backing {
                file: fresh.clone(),
                format: "qcow2".to_owned(),
                secret,
            };
            Ok([vec![overlay], chain].concat())
        };
        let made: Result<Vec<Backing>> = made.await;
        match made {
            Ok(chain) => new.push((disk.target.clone(), fresh, chain)),
            Err(e) => {
                for (_, file, _) in new {
                    let _ = std::fs::remove_file(file);
                }
                return Err(e);
            }
        }
    }
    // Only what was written since: somebody may have put something else there.
    let since = &snapshots[place..];
    // What was frozen by a newer one others may stand on, as on any image that nobody writes to.
    let frozen = |file: &String| {
        dropped
            .iter()
            .flat_map(|s| &s.disks)
            .any(|d| d.file == *file)
    };
    let (kept, overlays): (Vec<String>, Vec<String>) = since
        .iter()
        .flat_map(|s| &s.disks)
        .map(|d| d.overlay.clone())
        .partition(frozen);
    for disk in &snapshot.disks {
        let now = there.metadata.disk(&disk.target).map(|d| d.file());
        let mut of_disk = since.iter().flat_map(|s| &s.disks);
        let newest = of_disk.rfind(|d| d.target == disk.target);
        if now.is_some_and(|file| newest.is_none_or(|n| n.overlay != file)) {
            for (_, file, _) in new {
                let _ = std::fs::remove_file(file);
            }
            return Err(Error::failed(format!(
                "disk '{}' is '{}' now, and not what was written since the snapshot ('{}'): nothing was changed",
                disk.target,
                now.unwrap_or_default(),
                newest.map_or("", |n| n.overlay.as_str())
            )));
        }
    }
    guest.keep_off(true)?;
    if let Err(e) = guest.must_be_off() {
        for (_, file, _) in new {
            let _ = std::fs::remove_file(file);
        }
        return Err(e);
    }
    guest.change(|metadata| {
        metadata
            .snapshots
            .retain(|s| !newer.contains(&s.name.as_str()));
        for (target, file, chain) in &new {
            if let Some(disk) = metadata.disk_mut(target) {
                disk.set_images(chain.clone()).map_err(wrong)?;
            }
            for d in metadata.snapshots.iter_mut().flat_map(|s| &mut s.disks) {
                let is_this = snapshot.disks.iter().any(|s| s.file == d.file);
                if d.target == *target && is_this {
                    d.overlay.clone_from(file);
                }
            }
        }
        Ok(())
    })?;
    let others = in_use_elsewhere(cx, Some(&there.uuid))?;
    let memories = dropped.iter().filter_map(|s| s.memory.clone());
    for file in overlays.into_iter().chain(memories) {
        if !others.contains(&file) && !files::is_open(&daemon, &file).await? {
            let _ = std::fs::remove_file(file);
        }
    }
    if !cx.args.json {
        anstream::println!(
            "the disks of '{}' are what they were at '{name}'",
            guest.name
        );
        for file in &kept {
            anstream::println!(
                "'{file}' is of no use here any more: remove it if nothing else stands on it"
            );
        }
    }
    guest.keep_off(false)?;
    if let (Some(memory), Some(saved)) = (memory, saved) {
        let now = guest.now()?.metadata;
        let xml = vdisk_domain::replace_metadata(&saved, &now).map_err(wrong)?;
        cx.libvirt.restore(memory, &xml)?;
        if !cx.args.json {
            anstream::println!("'{}' goes on from that moment", guest.name);
        }
    }
    Ok(())
}

async fn delete(cx: &Context, domain: &str, name: &str) -> Result<()> {
    let running = Running::find_or_open(cx, domain).await?;
    let snapshots = &running.domain.metadata.snapshots;
    let Some(snapshot) = snapshots.iter().find(|s| s.name == name).cloned() else {
        return Err(missing(&running.domain.name, name));
    };
    for disk in &snapshot.disks {
        let (noted, served) = running.disk(&disk.target)?;
        let images = chain(&running.look().await?, &served.id)?;
        let over = images.iter().position(|(_, file, _)| *file == disk.overlay);
        let Some(over) = over.filter(|at| at + 1 < images.len()) else {
            return Err(Error::failed(format!(
                "disk '{}' does not stand on '{}' any more: vdiskctl domain info {}",
                disk.target, disk.overlay, running.domain.name
            )));
        };
        let (node, file, _) = &images[over];
        stays_encrypted(noted, &images[over..=over], &images[over + 1])?;
        crate::live::nobody_else(cx, &running.domain, &images[over..=over + 1])?;
        // From here on the snapshot is not what it was, however this ends.
        running.guest.change(|metadata| {
            let mine = metadata.snapshots.iter_mut().filter(|s| s.name == name);
            for d in mine.flat_map(|s| &mut s.disks) {
                d.written |= d.target == disk.target;
            }
            Ok(())
        })?;
        let merge = Merge {
            node: node.clone(),
            base: None,
            speed: None,
            detach: false,
            options: Vec::new(),
        };
        let done = jobs::merge(&running.daemon, &merge, true, cx.args.json).await;
        if done.is_ok() {
            // What the next snapshot was is in the lower file now.
            running.guest.change(|metadata| {
                metadata.retain_snapshots(|s, d| {
                    if d.target == disk.target && d.file == disk.overlay {
                        d.file.clone_from(&disk.file);
                        d.format.clone_from(&disk.format);
                    }
                    s != name || d.target != disk.target
                });
                Ok(())
            })?;
        }
        let expected: Vec<Image> = [&images[..over], &images[over + 1..]].concat();
        let expected = done.is_ok().then_some(expected.as_slice());
        running
            .settle(&disk.target, &images, expected, false)
            .await?;
        done?;
        if !files::is_open(&running.daemon, file).await? {
            let _ = std::fs::remove_file(file);
        }
    }
    if let Some(memory) = &snapshot.memory {
        let _ = std::fs::remove_file(memory);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overlays_are_named_as_virsh_does() {
        assert_eq!(overlay_of("/srv/a.qcow2", "s1"), Path::new("/srv/a.s1"));
        assert_eq!(overlay_of("/srv/a", "s1"), Path::new("/srv/a.s1"));
        assert_eq!(overlay_of("/srv/a.s1", "s2"), Path::new("/srv/a.s2"));
        let device = overlay_of("/dev/vg0/vm1", "s1");
        assert_eq!(device, Path::new("/var/lib/libvirt/images/vm1.s1"));
        assert!(check_name("a/b").is_err() && check_name("").is_err());
    }
}
