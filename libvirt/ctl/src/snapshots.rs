//! `vdiskctl domain snapshot …`.

use std::path::{Path, PathBuf};

use serde_json::{Value as Json, json};
use vdisk_domain::SnapshotDisk;
use vdiskctl::args::Merge;
use vdiskctl::error::{Error, Result};
use vdiskctl::jobs;
use vdiskctl::objects::{Objects, properties};
use vdiskctl::options::Options;
use vdiskctl::output::{Rows, format_time, number, print_json, print_pause};
use zbus::Variant;

use crate::args::Snapshot as Command;
use crate::disks::{Running, chain, none_served};
use crate::files::{self, Chain};
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
        } => revert(cx, domain, name, *disks_only).await,
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
    let running = Running::find(cx, domain).await?;
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
        if disk.get("secret").is_some() {
            return Err(Error::named(
                "NotSupported",
                format!(
                    "disk '{}' is encrypted: an overlay over it would hold what is written in the clear; leave it out (--disks)",
                    disk.target
                ),
            ));
        }
        let (_, served) = running.disk(&disk.target)?;
        parts.push(part(&objects, &disk.target, &served.id, &name)?);
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
    let mut made: Vec<String> = Vec::new();
    let taken = take(
        cx,
        &running,
        &parts,
        &name,
        memspec.as_deref(),
        *quiesce,
        &mut made,
    )
    .await;
    let report = match taken {
        Ok(report) => report,
        Err(e) => {
            for file in made {
                let _ = std::fs::remove_file(file);
            }
            return Err(e);
        }
    };
    let snapshot = vdisk_domain::Snapshot {
        name: name.clone(),
        created: stamp(),
        memory: memspec.clone(),
        disks: parts.iter().map(|p| p.disk.clone()).collect(),
    };
    running.guest.change(|metadata| {
        for part in &snapshot.disks {
            if let Some(disk) = metadata.disk_mut(&part.target) {
                disk.set("file", &part.overlay).map_err(wrong)?;
                disk.set("format", "qcow2").map_err(wrong)?;
                let below = (part.file.clone(), part.format.clone());
                disk.backing.insert(0, below);
            }
        }
        metadata.snapshots.push(snapshot.clone());
        Ok(())
    })?;
    let targets: Vec<&str> = parts.iter().map(|p| p.disk.target.as_str()).collect();
    let what = format!(
        "snapshot '{name}' has {} at one instant",
        targets.join(", ")
    );
    print_pause(&what, report, cx.args.json);
    Ok(())
}

fn part(objects: &Objects, target: &str, export: &str, name: &str) -> Result<Part> {
    let images = chain(objects, export)?;
    let Some((node, file, format)) = images.into_iter().next() else {
        return Err(Error::failed(format!("disk '{target}' has no image")));
    };
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
            target: target.to_owned(),
            file,
            format,
            overlay: overlay.to_string_lossy().into_owned(),
        },
        node,
        over: format!("{export}-{name}"),
        size,
    })
}

/// Makes the overlays, and puts them over the disks in one instant.
async fn take(
    cx: &Context,
    running: &Running,
    parts: &[Part],
    name: &str,
    memory: Option<&str>,
    quiesce: bool,
    made: &mut Vec<String>,
) -> Result<vdiskctl::objects::Properties> {
    let manager = running.manager().await?;
    for part in parts {
        let options = Options::from([
            ("size", Variant::from(part.size)),
            ("backing-file", Variant::from(part.disk.file.clone())),
            ("backing-fmt", Variant::from(part.disk.format.clone())),
        ]);
        files::make_image(&manager, &part.disk.overlay, "qcow2", options).await?;
        made.push(part.disk.overlay.clone());
    }
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
        actions.push(("add-overlay", options));
    }
    if quiesce {
        running.guest.freeze(true)?;
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
    let report = match &stopped {
        Ok(()) => manager.transaction(actions, Options::new()).await,
        Err(_) => Ok(Default::default()),
    };
    let resumed = match memory {
        // If it was stopped.
        Some(_) => running.guest.resume(),
        _ => Ok(()),
    };
    let thawed = match quiesce {
        true => running.guest.freeze(false),
        false => Ok(()),
    };
    stopped?;
    let (_, report) = report?;
    // From here on the overlays are in use, whatever else there is to say.
    made.clear();
    for e in [resumed, thawed].into_iter().filter_map(|r| r.err()) {
        if !cx.args.json {
            anstream::eprintln!("warning: {e}");
        }
    }
    Ok(properties(report))
}

/// Has a file with memory say what it belongs to: its domain's disks would be written to where the snapshot has them.
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
async fn revert(cx: &Context, domain: &str, name: &str, disks_only: bool) -> Result<()> {
    let guest = cx.libvirt.find(domain)?;
    guest.must_be_off()?;
    let there = guest.now()?;
    let snapshots = &there.metadata.snapshots;
    let place = snapshots.iter().position(|s| s.name == name);
    let Some(place) = place else {
        return Err(missing(&guest.name, name));
    };
    let newer: Vec<&str> = snapshots[place + 1..]
        .iter()
        .map(|s| s.name.as_str())
        .collect();
    if !newer.is_empty() {
        return Err(Error::named(
            "InUse",
            format!(
                "domain '{0}' has newer snapshots, which would be lost: {1}; delete them first (vdiskctl domain snapshot delete {0} NAME, while it runs)",
                guest.name,
                newer.join(", ")
            ),
        ));
    }
    let daemon = cx.daemon(&there).await?;
    let manager = daemon.manager().await?;
    let snapshot = snapshots[place].clone();
    let mut new: Vec<(String, String, Chain)> = Vec::new();
    for disk in &snapshot.disks {
        let fresh = overlay_of(&disk.file, &format!("{name}-{}", stamp()));
        let fresh = fresh.to_string_lossy().into_owned();
        let made = async {
            let chain = files::chain(&manager, &disk.file, &disk.format).await?;
            let format = disk.format.clone();
            let info = Options::from([
                ("filename", Variant::from(disk.file.clone())),
                ("driver", Variant::from(format.clone())),
            ]);
            let info = properties(manager.get_image_info(info).await?);
            let options = Options::from([
                ("size", Variant::from(number(&info, "virtual-size"))),
                ("backing-file", Variant::from(disk.file.clone())),
                ("backing-fmt", Variant::from(format)),
            ]);
            files::make_image(&manager, &fresh, "qcow2", options).await?;
            Ok(chain)
        };
        let made: Result<Chain> = made.await;
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
    let mut dropped: Vec<String> = Vec::new();
    guest.change(|metadata| {
        for (target, file, chain) in &new {
            if let Some(disk) = metadata.disk_mut(target) {
                dropped.push(disk.file().to_owned());
                disk.backing.clone_from(chain);
                disk.set("file", file).map_err(wrong)?;
                disk.set("format", "qcow2").map_err(wrong)?;
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
    for file in &dropped {
        let still = snapshot.disks.iter().any(|d| d.file == *file);
        if !still {
            let _ = std::fs::remove_file(file);
        }
    }
    if !cx.args.json {
        anstream::println!(
            "the disks of '{}' are what they were at '{name}'",
            guest.name
        );
    }
    if let Some(memory) = snapshot.memory.as_deref().filter(|_| !disks_only) {
        let now = guest.now()?.metadata;
        let saved = cx.libvirt.saved_xml(memory)?;
        let xml = vdisk_domain::replace_metadata(&saved, &now).map_err(wrong)?;
        cx.libvirt.restore(memory, &xml)?;
        if !cx.args.json {
            anstream::println!("'{}' goes on from that moment", guest.name);
        }
    }
    Ok(())
}

async fn delete(cx: &Context, domain: &str, name: &str) -> Result<()> {
    let running = Running::find(cx, domain).await?;
    let snapshots = &running.domain.metadata.snapshots;
    let Some(snapshot) = snapshots.iter().find(|s| s.name == name).cloned() else {
        return Err(missing(&running.domain.name, name));
    };
    for disk in &snapshot.disks {
        let (_, served) = running.disk(&disk.target)?;
        let images = chain(&running.look().await?, &served.id)?;
        let over = images.iter().find(|(_, file, _)| *file == disk.overlay);
        let Some((node, file, _)) = over else {
            return Err(Error::failed(format!(
                "disk '{}' does not stand on '{}' any more: vdiskctl domain info {}",
                disk.target, disk.overlay, running.domain.name
            )));
        };
        let merge = Merge {
            node: node.clone(),
            base: None,
            speed: None,
            detach: false,
            options: Vec::new(),
        };
        jobs::merge(&running.daemon, &merge, true, cx.args.json).await?;
        running.settle(&disk.target, &images).await?;
        let _ = std::fs::remove_file(file);
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
