//! `vdiskctl domain backup` to an NBD server: the disks as they are at one instant, or what has changed since a checkpoint.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use serde_json::{Value as Json, json};
use vdisk_domain::Disk;
use vdiskctl::error::{Error, Result};
use vdiskctl::objects::Objects;
use vdiskctl::options::{NbdUri, Options};
use vdiskctl::output::{number, print_json};
use zbus::Variant;

use crate::Context;
use crate::backup::{at_one_instant, chosen};
use crate::disks::{Running, image_node};
use crate::live::stamp;

/// What is copied, and what is recorded.
pub struct Wanted<'a> {
    /// Targets; all disks that the guest may write to, if there are none.
    pub disks: &'a [String],
    /// Only what has changed since this checkpoint, which is then this backup's.
    pub incremental: Option<&'a str>,
    /// What changes from now on is recorded under this name.
    pub checkpoint: Option<&'a str>,
    pub quiesce: bool,
}

/// The backup of one disk.
struct Part {
    target: String,
    node: String,
    /// The node of the server's disk, and the job.
    copy: String,
    size: u64,
    /// Whether the image can keep a checkpoint.
    can_keep: bool,
}

/// The bitmap of a checkpoint; those of backups in folders have numbers there.
fn bitmap_name(checkpoint: &str) -> Result<String> {
    let good = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    match checkpoint.is_empty() || checkpoint.len() > 64 || !checkpoint.chars().all(good) {
        true => Err(Error::invalid(format!(
            "'{checkpoint}' is no name of a checkpoint: give letters, digits, '-', '_' and '.', 64 at most"
        ))),
        false => Ok(format!("vdisk-checkpoint.{checkpoint}")),
    }
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
        can_keep: properties.get("Driver").and_then(Json::as_str) == Some("qcow2"),
        node,
    })
}

/// Whether a checkpoint of a disk can be built upon, or is there at all.
fn checkpoint_of<'a>(objects: &'a Objects, part: &Part, bitmap: &str) -> Option<&'a Json> {
    let path = vdisk_dbus::bitmap_path(&part.node, bitmap);
    objects.get(path.as_str())?.get("Recording")
}

pub async fn backup(cx: &Context, domain: &str, uri: &NbdUri, wanted: &Wanted<'_>) -> Result<()> {
    let (since, next) = (wanted.incremental, wanted.checkpoint);
    let since_bitmap = since.map(bitmap_name).transpose()?;
    let next_bitmap = next.map(bitmap_name).transpose()?;
    let running = match wanted.quiesce {
        true => Running::find(cx, domain).await?,
        false => Running::find_or_open(cx, domain).await?,
    };
    let objects = running.look().await?;
    let now = stamp();
    let mut parts = Vec::new();
    for disk in chosen(&running, wanted.disks)? {
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
        let target = &part.target;
        if let (Some(name), Some(bitmap)) = (since, &since_bitmap)
            && checkpoint_of(&objects, part, bitmap).and_then(Json::as_bool) != Some(true)
        {
            return Err(Error::named(
                "NotFound",
                format!(
                    "what has changed on disk '{target}' since checkpoint '{name}' is not known: make a full backup with --checkpoint {name}"
                ),
            ));
        }
        if let (Some(name), Some(bitmap)) = (next, &next_bitmap)
            && checkpoint_of(&objects, part, bitmap).is_some()
        {
            return Err(Error::named(
                "Exists",
                format!(
                    "disk '{target}' has a checkpoint '{name}' already: go on from it (--incremental {name}), choose another name, or remove it (vdiskctl bitmap remove {} {bitmap})",
                    part.node
                ),
            ));
        }
    }
    let bitmaps = (since_bitmap.as_deref(), next_bitmap.as_deref());
    let mut begun = false;
    let done = copy(&running, uri, &parts, bitmaps, wanted.quiesce, &mut begun).await;
    for part in &parts {
        if let Ok(node) = running.daemon.node(&part.copy).await {
            let _ = node.remove(Options::new()).await;
        }
        // Nothing is recorded for a backup that came to nothing.
        if let (Err(_), true, Some(bitmap)) = (&done, begun, &next_bitmap) {
            let path = vdisk_dbus::bitmap_path(&part.node, bitmap);
            if let Ok(bitmap) = running.daemon.bitmap(path).await {
                let _ = bitmap.remove(Options::new()).await;
            }
        }
    }
    done?;
    if cx.args.json {
        let report = parts.iter().map(|p| {
            json!({"target": p.target, "export": export_of(uri, p), "incremental": since.is_some()})
        });
        print_json(&Json::Array(report.collect()));
        return Ok(());
    }
    for part in &parts {
        let what = match since {
            Some(name) => format!("what has changed since {name}"),
            None => "all of it".to_owned(),
        };
        let kept = match (next.is_some(), part.can_keep) {
            (true, false) => {
                "; its image cannot keep the checkpoint: it is there until the domain ends"
            }
            _ => "",
        };
        let export = export_of(uri, part);
        anstream::println!(
            "{}  export {export} of {} ({what}{kept})",
            part.target,
            uri.socket
        );
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
async fn copy(
    running: &Running,
    uri: &NbdUri,
    parts: &[Part],
    (since, next): (Option<&str>, Option<&str>),
    quiesce: bool,
    begun: &mut bool,
) -> Result<()> {
    let mut actions = Vec::new();
    for part in parts {
        connect(running, uri, part).await?;
        if let Some(name) = next {
            let add = Options::from([
                ("node", Variant::from(part.node.clone())),
                ("name", Variant::from(name.to_owned())),
                ("persistent", Variant::from(part.can_keep)),
            ]);
            actions.push(("bitmap-add", add));
        }
        let mut backup = Options::from([
            ("node", Variant::from(part.node.clone())),
            ("target", Variant::from(part.copy.clone())),
            ("job-id", Variant::from(part.copy.clone())),
            ("auto-dismiss", Variant::from(false)),
        ]);
        let sync = match since {
            Some(bitmap) => {
                backup.insert("bitmap", Variant::from(bitmap.to_owned()));
                "incremental"
            }
            None => "full",
        };
        backup.insert("sync", Variant::from(sync));
        actions.push(("backup", backup));
    }
    at_one_instant(running, actions, quiesce, begun).await
}
