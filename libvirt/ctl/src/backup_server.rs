//! `vdiskctl domain backup` to an NBD server: the disks as they are at one instant.
//!
//! All of them each time: what has changed since the last one could only be known by a bitmap, and nothing here says what that bitmap is
//! relative to, as the record in a folder does.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use serde_json::{Value as Json, json};
use vdisk_domain::Disk;
use vdiskctl::error::{Error, Result};
use vdiskctl::objects::{Objects, name_of};
use vdiskctl::options::{NbdUri, Options};
use vdiskctl::output::{number, print_json};
use zbus::Variant;

use crate::Context;
use crate::backup::{at_one_instant, chosen};
use crate::disks::{Running, image_node};
use crate::live::stamp;

/// The backup of one disk.
struct Part {
    target: String,
    node: String,
    /// The node of the server's disk, and the job.
    copy: String,
    size: u64,
}

fn plan(objects: &Objects, running: &Running, disk: &Disk, now: u64) -> Result<Part> {
    let target = &disk.target;
    if disk.secrets().next().is_some() {
        return Err(Error::named(
            "NotSupported",
            format!(
                "disk '{target}' is encrypted, and the server would get its data in the clear: back it up to a folder, or leave it out (--disks)"
            ),
        ));
    }
    let (_, served) = running.disk(target)?;
    let node = image_node(objects, &served.id)?;
    let properties = objects.find("node", &node)?;
    Ok(Part {
        target: target.clone(),
        copy: format!("{}-backup-{now}", served.id),
        size: number(properties, "Size"),
        node,
    })
}

/// Sees to it that nobody copies a disk already: a vdiskctl that was killed leaves its job, whose older data would go over ours. What is
/// left of one whose job has ended is taken away.
async fn clear(running: &Running, objects: &Objects, target: &str) -> Result<()> {
    let (_, served) = running.disk(target)?;
    let prefix = format!("{}-backup-", served.id);
    // As `plan` names them: others are somebody's own.
    let is_ours = |name: &str| {
        let stamp = name.strip_prefix(&prefix);
        stamp.is_some_and(|s| s.parse::<u64>().is_ok())
    };
    for (path, job) in objects.of("job") {
        let name = &name_of(path);
        if !is_ours(name) {
            continue;
        }
        if job.get("State").and_then(Json::as_str) != Some("concluded") {
            return Err(Error::named(
                "Busy",
                format!(
                    "disk '{target}' is being backed up by job '{name}': wait for its end, or cancel it (vdiskctl job cancel {name})"
                ),
            ));
        }
        running
            .daemon
            .job(name)
            .await?
            .dismiss(Options::new())
            .await?;
    }
    for (path, _) in objects.of("node") {
        let name = &name_of(path);
        if is_ours(name) {
            running
                .daemon
                .node(name)
                .await?
                .remove(Options::new())
                .await?;
        }
    }
    Ok(())
}

pub async fn backup(
    cx: &Context,
    domain: &str,
    uri: &NbdUri,
    disks: &[String],
    quiesce: bool,
) -> Result<()> {
    let running = match quiesce {
        true => Running::find(cx, domain).await?,
        false => Running::find_or_open(cx, domain).await?,
    };
    let objects = running.look().await?;
    let now = stamp();
    let mut parts = Vec::new();
    for disk in chosen(&running, disks)? {
        parts.push(plan(&objects, &running, disk, now)?);
    }
    if parts.len() > 1 && !uri.export.is_empty() {
        return Err(Error::invalid(format!(
            "'{}' is one export, and domain '{domain}' has {} disks to copy: leave it out of the URI, and they go to exports that are called as they are (vda, …); or name one (--disks)",
            uri.export,
            parts.len()
        )));
    }
    for part in &parts {
        clear(&running, &objects, &part.target).await?;
    }
    let done = copy(&running, uri, &parts, quiesce).await;
    for part in &parts {
        if let Ok(node) = running.daemon.node(&part.copy).await {
            let _ = node.remove(Options::new()).await;
        }
    }
    done?;
    if cx.args.json {
        let report = parts.iter().map(
            |p| json!({"target": p.target, "socket": uri.socket, "export": export_of(uri, p)}),
        );
        print_json(&Json::Array(report.collect()));
        return Ok(());
    }
    for part in &parts {
        let export = export_of(uri, part);
        anstream::println!("{}  export '{export}' of {}", part.target, uri.socket);
    }
    Ok(())
}

fn export_of(uri: &NbdUri, part: &Part) -> String {
    match uri.export.is_empty() {
        true => part.target.clone(),
        false => uri.export.clone(),
    }
}

/// The server's disk, on a connection of our own: the daemon's user may not reach its socket.
async fn connect(running: &Running, uri: &NbdUri, part: &Part) -> Result<()> {
    let export = export_of(uri, part);
    let named = |e: &dyn std::fmt::Display| {
        Error::failed(format!("export '{export}' of '{}': {e}", uri.socket))
    };
    let stream = UnixStream::connect(&uri.socket).map_err(|e| named(&e))?;
    let node = Options::from([
        ("node-name", Variant::from(part.copy.clone())),
        ("driver", Variant::from("nbd")),
        (
            "filename",
            Variant::from(zbus::Fd::from(OwnedFd::from(stream))),
        ),
        ("export", Variant::from(export.clone())),
        ("discard", Variant::from("unmap")),
    ]);
    let manager = running.manager().await?;
    let added = manager.add_node(node).await;
    added.map_err(|e| named(&Error::from(e)))?;
    let objects = running.look().await?;
    let size = number(objects.find("node", &part.copy)?, "Size");
    if size != part.size {
        return Err(named(&format!(
            "it has {size} bytes, and disk '{}' has {}: it has to be of the same size",
            part.target, part.size
        )));
    }
    Ok(())
}

/// Copies all disks as they are at one instant.
async fn copy(running: &Running, uri: &NbdUri, parts: &[Part], quiesce: bool) -> Result<()> {
    let mut actions = Vec::new();
    for part in parts {
        connect(running, uri, part).await?;
        let backup = Options::from([
            ("node", Variant::from(part.node.clone())),
            ("target", Variant::from(part.copy.clone())),
            ("job-id", Variant::from(part.copy.clone())),
            ("auto-dismiss", Variant::from(false)),
            ("sync", Variant::from("full")),
        ]);
        actions.push(("backup", backup));
    }
    at_one_instant(running, actions, quiesce, &mut false).await
}
