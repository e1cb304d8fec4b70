//! `vdiskctl domain migrate`.

use std::path::Path;
use std::time::Instant;

use serde_json::json;
use vdisk_domain::Disk;
use vdiskctl::error::{Error, Result};
use vdiskctl::objects::{Objects, name_of};
use vdiskctl::output::{names, print_json, text};

use crate::Context;
use crate::args::Migrate;
use crate::disks::Running;
use crate::libvirt::{Libvirt, Side};
use crate::live::copy_disk;
use crate::mirrored::{Copies, Shell};

/// Where the copy of a disk goes: under the name of its file, with what the copy is at its end.
fn copy_of(disk: &Disk, folder: &Path) -> Result<String> {
    let name = Path::new(disk.file()).file_stem().unwrap_or_default();
    let copy = folder.join(name).with_extension("qcow2");
    if copy.exists() {
        return Err(Error::named(
            "Exists",
            format!(
                "'{}' is there already: give another folder, or remove it",
                copy.display()
            ),
        ));
    }
    Ok(copy.to_string_lossy().into_owned())
}

/// A node, and all that it stands on.
fn with_all_below(objects: &Objects, node: &str) -> Vec<String> {
    let mut nodes = vec![node.to_owned()];
    let mut next = 0;
    while let Some(at) = nodes.get(next) {
        let children = objects.find("node", at).map(|p| names(p, "Children"));
        for child in children.unwrap_or_default() {
            if !nodes.contains(&child) {
                nodes.push(child);
            }
        }
        next += 1;
    }
    nodes
}

/// What would keep the images from being let go of at the end, when it is too late to stay.
async fn must_be_free(running: &Running) -> Result<()> {
    let objects = running.look().await?;
    for served in &running.served {
        let nodes = with_all_below(&objects, &served.node);
        for (_, export) in objects.of("export") {
            let (id, of) = (text(export, "Id"), names(export, "Node").join(""));
            if id != served.id && nodes.contains(&of) {
                return Err(Error::named(
                    "InUse",
                    format!(
                        "export '{id}' offers disk '{}' of domain '{}', too: remove it (vdiskctl export remove {id})",
                        served.target, running.domain.name
                    ),
                ));
            }
        }
        for (path, job) in objects.of("job") {
            let name = name_of(path);
            if names(job, "Objects").iter().any(|n| nodes.contains(n)) {
                return Err(Error::named(
                    "InUse",
                    format!(
                        "job '{name}' works on disk '{}' of domain '{}': wait for its end, or cancel it (vdiskctl job cancel {name})",
                        served.target, running.domain.name
                    ),
                ));
            }
        }
    }
    Ok(())
}

pub async fn migrate(cx: &Context, command: &Migrate) -> Result<()> {
    let running = Running::find(cx, &command.domain).await?;
    let name = running.domain.name.clone();
    must_be_free(&running).await?;
    // Whoever is not there cannot have the guest.
    let destination = Libvirt::open(&command.desturi)?;
    let mut copied = Vec::new();
    if let Some(folder) = &command.copy_storage {
        let folder = std::path::absolute(folder).map_err(|e| Error::invalid(e.to_string()))?;
        for disk in &running.domain.metadata.disks {
            if !disk.is_read_only() {
                let copy = copy_of(disk, &folder)?;
                if copied.iter().any(|(_, c)| *c == copy) {
                    return Err(Error::invalid(format!(
                        "two disks of domain '{name}' would be copied to '{copy}': bring one elsewhere first (vdiskctl domain blockcopy)"
                    )));
                }
                copied.push((disk.target.clone(), copy));
            }
        }
        for (target, copy) in &copied {
            let running = Running::find(cx, &command.domain).await?;
            let speed = command.speed.as_deref();
            let done = copy_disk(cx, &running, target, copy, Some("qcow2"), false, speed).await;
            done.map_err(|e| {
                Error::failed(format!(
                    "{e}; the guest goes on here, with the disks before '{target}' where they were copied to"
                ))
            })?;
        }
    }
    if command.copy_storage_all {
        return with_storage(cx, command, running, &destination).await;
    }
    let since = Instant::now();
    let moved = running.guest.migrate(&destination, command, None);
    if let (Err(e), false) = (&moved, copied.is_empty()) {
        return Err(Error::failed(format!(
            "{e}; the guest goes on here, with its disks where they were copied to"
        )));
    }
    moved?;
    done(cx, command, &name, since);
    Ok(())
}

fn done(cx: &Context, command: &Migrate, name: &str, since: Instant) {
    let seconds = since.elapsed().as_secs_f64();
    match cx.args.json {
        true => print_json(&json!({"domain": name, "to": command.desturi, "seconds": seconds})),
        false => anstream::println!(
            "domain '{name}' runs at {} ({seconds:.1} s)",
            command.desturi
        ),
    }
}

/// To a host that has none of the storage here.
async fn with_storage(
    cx: &Context,
    command: &Migrate,
    running: Running,
    destination: &Libvirt,
) -> Result<()> {
    let name = running.domain.name.clone();
    if !running.domain.metadata.snapshots.is_empty() {
        return Err(Error::failed(format!(
            "domain '{name}' has snapshots, whose images would stay here: delete them first (vdiskctl domain snapshot delete)"
        )));
    }
    let shell = Shell::new(command.remote_shell.as_deref(), &command.desturi)?;
    let copies = Copies::start(&running, shell, command.speed.as_deref()).await?;
    let since = Instant::now();
    let moved = async {
        let live = copies.definition(&running, Side::Live)?;
        let config = match running.guest.is_persistent()? {
            true => copies.definition(&running, Side::Config)?,
            false => live.clone(),
        };
        let run = || {
            running
                .guest
                .migrate(destination, command, Some((live, config)))
        };
        copies.guard(&cx.args, &running, run)
    };
    match moved.await {
        Ok(()) => {
            copies.finish(&running).await?;
            done(cx, command, &name, since);
            Ok(())
        }
        Err(e) => {
            copies.give_up(&running).await;
            Err(Error::failed(format!("{e}; the guest goes on here")))
        }
    }
}
