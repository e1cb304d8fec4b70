//! `vdiskctl domain backup`: full at first, and then what has changed since, each file standing on the one before it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Value as Json, json};
use vdisk_api::format_size;
use vdisk_domain::{Disk, encryption};
use vdiskctl::error::{Error, Result};
use vdiskctl::jobs;
use vdiskctl::objects::Objects;
use vdiskctl::options::{NbdUri, Options};
use vdiskctl::output::{number, print_json};
use zbus::Variant;

use crate::args::Command;
use crate::backup_server;
use crate::disks::{Running, image_node, no_disk, none_served};
use crate::live::stamp;
use crate::{Context, files};

/// How the names of bitmaps begin that record what has changed since a backup, in the image if it is qcow2.
const BITMAP: &str = "vdisk-backup";

/// The file in the folder that says what is there.
const RECORD: &str = "vdisk-backup.json";

/// The backup of one disk that is being made.
struct Part {
    target: String,
    node: String,
    /// The node of the new file.
    copy: String,
    file: PathBuf,
    /// The file of the last backup, which this one stands on.
    over: Option<String>,
    /// Why it has everything though there was a backup before.
    why_full: Option<&'static str>,
    bitmap: String,
    can_keep: bool,
    size: u64,
    /// What is to open the backup, of a disk that is encrypted.
    secret: Option<String>,
}

/// What a folder has.
#[derive(Default, Serialize, Deserialize)]
struct Record {
    /// The domain's UUID.
    domain: String,
    /// A backup has begun, and nobody has said how it ended: what the bitmaps have may be relative to files that are not here.
    #[serde(default)]
    unfinished: bool,
    disks: BTreeMap<String, Series>,
}

/// The backups of one disk.
#[derive(Default, Serialize, Deserialize)]
struct Series {
    /// What has changed since the last of the files. Each full backup begins another: one of that name has nothing else.
    bitmap: String,
    /// The oldest first.
    files: Vec<String>,
}

fn load(folder: &Path, uuid: &str) -> Result<Record> {
    let path = folder.join(RECORD);
    let text = match std::fs::read_to_string(&path) {
        Ok(text) => text,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            return Ok(Record {
                domain: uuid.to_owned(),
                ..Record::default()
            });
        }
        Err(e) => return Err(Error::failed(format!("'{}': {e}", path.display()))),
    };
    let record: Record = serde_json::from_str(&text).map_err(|e| {
        Error::failed(format!(
            "'{}' is damaged ({e}): move the folder away, and begin a new one",
            path.display()
        ))
    })?;
    if record.domain != uuid {
        return Err(Error::named(
            "Exists",
            format!(
                "'{}' has backups of another domain: give each domain a folder of its own",
                folder.display()
            ),
        ));
    }
    Ok(record)
}

fn store(folder: &Path, record: &Record) -> Result<()> {
    let no = |e: std::io::Error| Error::failed(format!("'{}': {e}", folder.join(RECORD).display()));
    let new = folder.join(format!("{RECORD}.new"));
    let text = serde_json::to_string_pretty(record).map_err(|e| Error::failed(e.to_string()))?;
    std::fs::write(&new, text).map_err(no)?;
    let file = std::fs::File::open(&new).map_err(no)?;
    file.sync_all().map_err(no)?;
    std::fs::rename(&new, folder.join(RECORD)).map_err(no)?;
    let folder = std::fs::File::open(folder).map_err(no)?;
    folder.sync_all().map_err(no)
}

fn file_name(folder: &Path, target: &str, now: u64) -> PathBuf {
    folder.join(format!("{target}.{now}.qcow2"))
}

fn plan(
    objects: &Objects,
    running: &Running,
    target: &str,
    folder: &Path,
    record: &Record,
    full: bool,
    now: u64,
) -> Result<Part> {
    let (disk, served) = running.disk(target)?;
    let node = image_node(objects, &served.id)?;
    let series = record.disks.get(target);
    let bitmap = series.map_or("", |s| s.bitmap.as_str());
    let path = vdisk_dbus::bitmap_path(&node, bitmap);
    let found = objects.get(path.as_str());
    let last = series.and_then(|s| s.files.last());
    let valid = found.is_some_and(|b| b.get("Recording").and_then(Json::as_bool) == Some(true));
    let there = last.is_some_and(|name| folder.join(name).exists());
    let why_full = match (last.is_some(), full, valid, there) {
        (false, ..) => None,
        (_, true, ..) => Some("as asked for"),
        _ if record.unfinished => Some("the last one was interrupted"),
        (_, _, false, _) => Some("what has changed since the last one is not known"),
        (.., false) => Some("the last one is not in the folder any more"),
        _ => None,
    };
    let over = last.filter(|_| why_full.is_none()).cloned();
    let bitmap = match over.is_some() {
        true => bitmap.to_owned(),
        false => format!("{BITMAP}.{now}"),
    };
    let file = file_name(folder, target, now);
    let properties = objects.find("node", &node)?;
    Ok(Part {
        target: target.to_owned(),
        copy: format!("{}-backup-{now}", served.id),
        file,
        over,
        why_full,
        bitmap,
        can_keep: properties.get("Driver").and_then(Json::as_str) == Some("qcow2"),
        size: number(properties, "Size"),
        secret: disk.secrets().next().map(str::to_owned),
        node,
    })
}

/// The disks that are meant: all that the guest may write to, as nothing changes on the others, if none is named.
pub fn chosen<'a>(running: &'a Running, targets: &[String]) -> Result<Vec<&'a Disk>> {
    let all = &running.domain.metadata.disks;
    if let Some(missing) = targets.iter().find(|t| all.iter().all(|d| d.target != **t)) {
        return Err(no_disk(&running.domain, missing));
    }
    let meant = |d: &&Disk| match targets.is_empty() {
        true => !d.is_read_only(),
        false => targets.contains(&d.target),
    };
    let disks: Vec<&Disk> = all.iter().filter(meant).collect();
    match disks.is_empty() {
        true => Err(none_served(&running.domain.name)),
        false => Ok(disks),
    }
}

pub async fn backup(cx: &Context) -> Result<()> {
    let Command::Backup {
        domain,
        to,
        disks,
        full,
        compress,
        quiesce,
    } = &cx.args.command
    else {
        return Ok(());
    };
    if let Some(uri) = NbdUri::parse(to) {
        if *full || *compress {
            return Err(Error::invalid(
                "--full and --compress are for backups in folders: a server's disk gets all of it each time, and is stored as its server does",
            ));
        }
        return backup_server::backup(cx, domain, &uri?, disks, *quiesce).await;
    }
    let running = match quiesce {
        true => Running::find(cx, domain).await?,
        false => Running::find_or_open(cx, domain).await?,
    };
    let folder = std::path::absolute(to).map_err(|e| Error::invalid(e.to_string()))?;
    std::fs::create_dir_all(&folder)
        .map_err(|e| Error::failed(format!("'{}' cannot be made: {e}", folder.display())))?;
    let mut record = load(&folder, &running.domain.uuid)?;
    let objects = running.look().await?;
    let taken = |n: u64| {
        let mut all = running.domain.metadata.disks.iter();
        all.any(|d| file_name(&folder, &d.target, n).exists())
    };
    let now = (stamp()..).find(|n| !taken(*n)).unwrap_or_default();
    let mut parts = Vec::new();
    for disk in chosen(&running, disks)? {
        let target = &disk.target;
        if *compress && disk.secrets().next().is_some() {
            return Err(Error::named(
                "NotSupported",
                format!(
                    "disk '{target}' is encrypted, and its backup as well: what is encrypted is not compressed; leave out --compress"
                ),
            ));
        }
        parts.push(plan(
            &objects, &running, target, &folder, &record, *full, now,
        )?);
    }
    let was_unfinished = std::mem::replace(&mut record.unfinished, true);
    store(&folder, &record)?;
    let mut made = Vec::new();
    let mut begun = false;
    let done = copy(&running, &parts, *compress, *quiesce, &mut made, &mut begun).await;
    // The files are closed; those of a backup that failed are nothing.
    for part in &parts {
        if let Ok(node) = running.daemon.node(&part.copy).await {
            let _ = node.remove(Options::new()).await;
        }
        if done.is_err() && made.contains(&part.file) {
            let _ = std::fs::remove_file(&part.file);
        }
        // The series before this one has ended, or this one has come to nothing.
        let before = record.disks.get(&part.target);
        let before = before.map(|s| s.bitmap.clone());
        let is_new = before.as_ref() != Some(&part.bitmap);
        let ended = match done.is_ok() {
            true => before,
            false => Some(part.bitmap.clone()),
        };
        if let Some(bitmap) = ended.filter(|_| is_new) {
            let path = vdisk_dbus::bitmap_path(&part.node, &bitmap);
            if let Ok(bitmap) = running.daemon.bitmap(path).await {
                let _ = bitmap.remove(Options::new()).await;
            }
        }
    }
    if let Err(e) = done {
        if !begun {
            // What the bitmaps had they have still.
            record.unfinished = was_unfinished;
            store(&folder, &record)?;
        }
        return Err(e);
    }
    // What the others' bitmaps have nobody knows still.
    let is_new = |target: &String| parts.iter().any(|p| p.target == *target);
    record.unfinished = was_unfinished && !record.disks.keys().all(is_new);
    let mut report = Vec::new();
    for part in &parts {
        let name = part.file.file_name().unwrap_or_default();
        let series = record.disks.entry(part.target.clone()).or_default();
        series.bitmap.clone_from(&part.bitmap);
        series.files.push(name.to_string_lossy().into_owned());
        let bytes = part.file.metadata().map_or(0, |m| m.len());
        report.push(json!({
            "target": part.target, "file": part.file.display().to_string(), "bytes": bytes,
            "incremental": part.over.is_some(),
        }));
        if !cx.args.json {
            let what = match (&part.over, part.why_full) {
                (Some(over), _) => format!("what has changed since {over}"),
                (None, None) => "all of it".to_owned(),
                (None, Some(why)) => format!("all of it: {why}"),
            };
            anstream::println!(
                "{}  {}, {} ({what})",
                part.target,
                part.file.display(),
                format_size(bytes)
            );
        }
    }
    store(&folder, &record)?;
    if cx.args.json {
        print_json(&Json::Array(report));
    }
    Ok(())
}

/// Copies all disks as they are at one instant, from which on their changes are recorded.
async fn copy(
    running: &Running,
    parts: &[Part],
    compress: bool,
    quiesce: bool,
    made: &mut Vec<PathBuf>,
    begun: &mut bool,
) -> Result<()> {
    let manager = running.manager().await?;
    let mut actions = Vec::new();
    for part in parts {
        let file = part.file.to_string_lossy().into_owned();
        let mut image = Options::from([("size", Variant::from(part.size))]);
        if let Some(over) = &part.over {
            // Beside it: the folder can be moved.
            image.insert("backing-file", Variant::from(over.clone()));
            image.insert("backing-fmt", Variant::from("qcow2"));
        }
        let secret = part.secret.as_deref();
        image.extend(encryption("qcow2", secret));
        files::make_image(&manager, &file, "qcow2", image).await?;
        made.push(part.file.clone());
        let mut node = Options::from([
            ("node-name", Variant::from(part.copy.clone())),
            ("driver", Variant::from("qcow2")),
            ("file.driver", Variant::from("file")),
            ("file.filename", Variant::from(file)),
            // What has not changed is not read from here.
            ("backing", Variant::from("")),
        ]);
        node.extend(encryption("qcow2", secret));
        manager.add_node(node).await?;
        let mut backup = Options::from([
            ("node", Variant::from(part.node.clone())),
            ("target", Variant::from(part.copy.clone())),
            ("job-id", Variant::from(part.copy.clone())),
            ("auto-dismiss", Variant::from(false)),
            ("compress", Variant::from(compress)),
        ]);
        let bitmap = Options::from([
            ("node", Variant::from(part.node.clone())),
            ("name", Variant::from(part.bitmap.clone())),
        ]);
        if part.over.is_some() {
            backup.insert("sync", Variant::from("incremental"));
            backup.insert("bitmap", Variant::from(part.bitmap.clone()));
        } else {
            backup.insert("sync", Variant::from("full"));
            let mut add = bitmap;
            add.insert("persistent", Variant::from(part.can_keep));
            actions.push(("bitmap-add", add));
        }
        actions.push(("backup", backup));
    }
    at_one_instant(running, actions, quiesce, begun).await
}

/// Does all of it in the same moment, for which the guest's file systems may be frozen, and waits for the jobs. Once it is `begun` it
/// may have happened, whatever is said.
pub async fn at_one_instant(
    running: &Running,
    actions: Vec<(&str, Options<'_>)>,
    quiesce: bool,
    begun: &mut bool,
) -> Result<()> {
    let manager = running.manager().await?;
    if quiesce && let Err(e) = running.guest.freeze(true) {
        // It may have heard of it all the same.
        let _ = running.guest.freeze(false);
        return Err(e);
    }
    let grouped = Options::from([("completion-mode", Variant::from("grouped"))]);
    *begun = true;
    let started = manager.transaction(actions, grouped).await;
    let thawed = match quiesce {
        true => running.guest.freeze(false),
        false => Ok(()),
    };
    let (jobs, _) = started?;
    let mut failed = None;
    for job in jobs {
        if let Err(e) = jobs::result_of(&running.daemon, job.as_str()).await {
            failed = failed.or(Some(e));
        }
    }
    if let Err(e) = thawed {
        anstream::eprintln!("warning: {e}");
    }
    match failed {
        None => Ok(()),
        Some(e) => Err(e),
    }
}
