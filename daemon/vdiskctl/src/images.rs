//! `vdiskctl image …` and `vdiskctl snapshot …`.

use std::collections::HashMap;

use serde_json::{Map, Value as Json};
use vdisk_api::{format_size, parse_size};
use vdisk_dbus::ManagerProxy;
use zbus::Variant;

use crate::args::{Image, ImageFile, SnapshotCommand};
use crate::daemon::Daemon;
use crate::error::{Error, Result};
use crate::jobs;
use crate::objects::{Objects, Properties, name_of, properties};
use crate::options::{Options, absolute, options};
use crate::output::{Rows, flag, number, print_json, print_pause, text};

fn size(word: &str) -> Result<u64> {
    parse_size(word).ok_or_else(|| {
        Error::invalid(format!(
            "'{word}' is not a size: give bytes or a number with k, M, G or T"
        ))
    })
}

/// Options of an image, in which the name of a data file is a path: QEMU looks for a relative one where it was started,
/// which is not where the image is.
fn image_options(words: &[String]) -> Result<Options<'_>> {
    let mut out = options(words)?;
    if let Some(Variant::Str(name)) = out.get("data-file") {
        let path = absolute(name);
        out.insert("data-file", path);
    }
    Ok(out)
}

fn file_options(file: &ImageFile) -> Options<'_> {
    HashMap::from([
        ("filename", absolute(&file.filename)),
        ("driver", Variant::from(file.format.as_str())),
        ("force-share", Variant::from(file.force_share)),
    ])
}

pub async fn image(
    daemon: &Daemon,
    manager: &ManagerProxy<'_>,
    command: Image,
    json: bool,
) -> Result<()> {
    let start = async |operation: &str, options, detach| {
        let options = jobs::watched(options, operation, detach);
        manager.start_image_job(operation, options).await
    };
    match command {
        Image::Create {
            filename,
            size: word,
            format,
            backing,
            backing_format,
            overwrite,
            detach,
            options: words,
        } => {
            let mut options = image_options(&words)?;
            options.insert("filename", absolute(&filename));
            options.insert("driver", Variant::from(format.as_str()));
            options.insert("size", Variant::from(size(&word)?));
            if let (Some(file), Some(format)) = (&backing, &backing_format) {
                options.insert("backing-file", Variant::from(file.as_str()));
                options.insert("backing-fmt", Variant::from(format.as_str()));
            }
            if overwrite {
                options.insert("overwrite", Variant::from(true));
            }
            let path = start("create", options, detach).await?;
            if detach {
                return jobs::goes_on(&name_of(path.as_str()), json);
            }
            jobs::result_of(daemon, path.as_str()).await?;
        }
        Image::Info(file) => {
            let info = properties(manager.get_image_info(file_options(&file)).await?);
            print_info(&info, json);
        }
        Image::Check(file) => {
            let path = start("check", file_options(&file), false).await?;
            let report = jobs::result_of(daemon, path.as_str()).await?;
            return print_report(&report, json);
        }
        Image::Repair { file, leaks } => {
            let mut options = file_options(&file);
            options.insert("repair", Variant::from(if leaks { "leaks" } else { "all" }));
            let path = start("repair", options, false).await?;
            let report = jobs::result_of(daemon, path.as_str()).await?;
            return print_report(&report, json);
        }
        Image::Measure {
            source,
            from,
            format,
            options: words,
        } => {
            let mut options = image_options(&words)?;
            options.insert("driver", Variant::from(format.as_str()));
            // Names of nodes begin with a letter.
            let found = if source.starts_with(|c: char| c.is_ascii_digit()) {
                options.insert("size", Variant::from(size(&source)?));
                manager.measure_image(options).await
            } else {
                let opened = jobs::Opened::add(manager, &source, &from, "measure").await?;
                options.insert("node", Variant::from(opened.node().to_owned()));
                let found = manager.measure_image(options).await;
                opened.remove(daemon).await;
                found
            };
            let found = properties(found?);
            if json {
                print_json(&Json::Object(found));
            } else {
                for (what, key) in [("when new", "required"), ("when full", "fully-allocated")] {
                    let n = number(&found, key);
                    anstream::println!("{what:<10} {} ({n} bytes)", format_size(n));
                }
            }
        }
        Image::Map(file) => print_map(manager, &file, json).await?,
        Image::Amend {
            filename,
            options: words,
        } => {
            let mut options = image_options(&words)?;
            options.insert("filename", absolute(&filename));
            manager.amend_image(options).await?;
        }
    }
    Ok(())
}

fn print_info(info: &Properties, json: bool) {
    if json {
        print_json(&Json::Object(info.clone()));
        return;
    }
    let bytes = |key| {
        format!(
            "{} ({} bytes)",
            format_size(number(info, key)),
            number(info, key)
        )
    };
    let line = |what: &str, value: String| {
        if !value.is_empty() {
            anstream::println!("{what:<16} {value}");
        }
    };
    line("file", text(info, "filename"));
    line(
        "format",
        format!("{} {}", text(info, "format"), text(info, "version")),
    );
    line("disk", bytes("virtual-size"));
    line("takes", bytes("actual-size"));
    if let Some(Json::Object(e)) = info.get("encrypt") {
        line(
            "encryption",
            format!(
                "{}-{}-{}, {}",
                text(e, "cipher-alg"),
                text(e, "cipher-mode"),
                text(e, "ivgen-alg"),
                text(e, "hash-alg")
            ),
        );
        line(
            "key slots",
            format!("{} of 8 in use", number(e, "active-slots")),
        );
        line("uuid", text(e, "uuid"));
    }
    if text(info, "format") != "qcow2" {
        return;
    }
    line("clusters", format_size(number(info, "cluster-size")));
    line(
        "refcounts",
        format!("{} bits", number(info, "refcount-bits")),
    );
    line("compression", text(info, "compression-type"));
    let features: Vec<&str> = [
        ("extended-l2", "subclusters"),
        ("lazy-refcounts", "lazy refcounts"),
        ("encrypted", "encrypted (LUKS)"),
        (
            "dirty",
            "not closed: will be repaired when it is opened for writing",
        ),
        ("corrupt", "CORRUPT: repair it"),
    ]
    .iter()
    .filter(|(key, _)| flag(info, key))
    .map(|(_, word)| *word)
    .collect();
    line("features", features.join(", "));
    let data_file = text(info, "data-file");
    if !data_file.is_empty() {
        let raw = if flag(info, "data-file-raw") {
            " (raw)"
        } else {
            ""
        };
        line("data file", format!("{data_file}{raw}"));
    }
    let backing = text(info, "backing-file");
    if !backing.is_empty() {
        line(
            "backing file",
            format!("{backing} ({})", text(info, "backing-fmt")),
        );
    }
    if let Some(Json::Array(bitmaps)) = info.get("bitmaps")
        && !bitmaps.is_empty()
    {
        anstream::println!();
        let mut rows = Rows::new(&["bitmap", ">granularity", "state"]);
        for b in bitmaps.iter().filter_map(Json::as_object) {
            let state = match (flag(b, "in-use"), flag(b, "recording")) {
                (true, _) => "in use, or not stored",
                (_, true) => "records writes",
                _ => "disabled",
            };
            rows.add(vec![
                text(b, "name"),
                format_size(number(b, "granularity")),
                state.into(),
            ]);
        }
        rows.print();
    }
    if let Some(Json::Array(snapshots)) = info.get("snapshots")
        && !snapshots.is_empty()
    {
        anstream::println!();
        snapshot_rows(snapshots).print();
    }
}

fn date(seconds: u64) -> String {
    let at = i64::try_from(seconds).ok();
    at.and_then(|s| jiff::Timestamp::from_second(s).ok())
        .map_or_else(String::new, |t| t.to_string())
}

fn snapshot_rows(snapshots: &[Json]) -> Rows {
    let mut rows = Rows::new(&["id", "name", "made", ">disk", ">vm state"]);
    for s in snapshots.iter().filter_map(Json::as_object) {
        rows.add(vec![
            text(s, "id"),
            text(s, "name"),
            date(number(s, "date-sec")),
            format_size(number(s, "disk-size")),
            format_size(number(s, "vm-state-size")),
        ]);
    }
    rows
}

/// Prints what a check has found; what is still wrong is an error.
pub fn print_report(report: &Map<String, Json>, json: bool) -> Result<()> {
    let n = |key| number(report, key);
    let left = n("corruptions").saturating_sub(n("corruptions-fixed"));
    let leaks = n("leaks").saturating_sub(n("leaks-fixed"));
    if json {
        print_json(&Json::Object(report.clone()));
    } else {
        if let Some(Json::Array(messages)) = report.get("messages") {
            for m in messages.iter().filter_map(Json::as_str) {
                anstream::println!("{m}");
            }
        }
        let fixed = n("corruptions-fixed") + n("leaks-fixed");
        if fixed > 0 {
            anstream::println!(
                "{fixed} of {} findings repaired",
                n("corruptions") + n("leaks")
            );
        } else if left + leaks == 0 {
            anstream::println!("No errors were found.");
        }
        let all = n("total-clusters").max(1);
        anstream::println!(
            "{} of {} clusters have data ({:.1} %), {:.1} % of them out of order, {} compressed; the image ends at {}",
            n("allocated-clusters"),
            n("total-clusters"),
            100.0 * n("allocated-clusters") as f64 / all as f64,
            100.0 * n("fragmented-clusters") as f64 / n("allocated-clusters").max(1) as f64,
            n("compressed-clusters"),
            format_size(n("image-end-offset")),
        );
    }
    match (left, leaks) {
        (0, 0) => Ok(()),
        (0, leaks) => Err(Error::failed(format!(
            "{leaks} clusters take space for nothing: 'repair' gives them back"
        ))),
        (left, _) => Err(Error::failed(format!(
            "{left} errors: 'repair' makes the reference counts anew; copy the image first if its data matters"
        ))),
    }
}

async fn print_map(manager: &ManagerProxy<'_>, file: &ImageFile, json: bool) -> Result<()> {
    let mut all: Vec<Properties> = Vec::new();
    let mut at = 0;
    loop {
        let more = manager.map_image(at, file_options(file)).await?;
        let before = all.len();
        all.extend(more.into_iter().map(properties));
        let Some(last) = all.last().filter(|_| all.len() > before) else {
            break;
        };
        at = number(last, "start") + number(last, "length");
    }
    if json {
        print_json(&Json::Array(all.into_iter().map(Json::Object).collect()));
        return Ok(());
    }
    let mut rows = Rows::new(&[">start", ">length", "kind", ">offset in file"]);
    for e in &all {
        let offset = match e.get("offset") {
            Some(_) => format!("{:#x}", number(e, "offset")),
            None => String::new(),
        };
        rows.add(vec![
            format!("{:#x}", number(e, "start")),
            format_size(number(e, "length")),
            text(e, "kind"),
            offset,
        ]);
    }
    rows.print();
    Ok(())
}

/// Makes the image of an overlay over this node.
async fn make_overlay(manager: &ManagerProxy<'_>, below: &Properties, file: &str) -> Result<()> {
    // What QEMU calls the content of such a node.
    let format = match text(below, "Driver").as_str() {
        "qcow2" => "qcow2",
        "luks" => "luks",
        _ => "raw",
    };
    let mut options = HashMap::from([
        ("filename", absolute(file)),
        ("size", Variant::from(number(below, "Size"))),
    ]);
    let backing = text(below, "Filename");
    if !backing.is_empty() {
        options.insert("backing-file", Variant::from(backing));
        options.insert("backing-fmt", Variant::from(format));
    }
    Ok(manager.create_image(options).await?)
}

/// Puts an overlay over a node that may be in use.
async fn overlay(
    daemon: &Daemon,
    manager: &ManagerProxy<'_>,
    command: &SnapshotCommand,
    json: bool,
) -> Result<()> {
    let SnapshotCommand::Overlay {
        node,
        name,
        filename,
        existing,
        options: words,
    } = command
    else {
        return Ok(());
    };
    let objects = Objects::load(daemon).await?;
    let below = objects.find("node", node)?;
    if objects.find("node", name).is_ok() {
        return Err(Error::failed(format!(
            "there is a node '{name}' already: choose another name"
        )));
    }
    if !existing {
        make_overlay(manager, below, filename).await?;
    }
    let mut options = options(words)?;
    for (key, value) in [("driver", "qcow2"), ("file.driver", "file")] {
        options.entry(key).or_insert_with(|| Variant::from(value));
    }
    options.insert("node-name", Variant::from(name.as_str()));
    options.insert("file.filename", absolute(filename));
    let proxy = daemon.node(node);
    let added = proxy.await?.add_overlay(options).await;
    let report = match added {
        Ok((_, report)) => properties(report),
        Err(e) => {
            if !existing {
                let _ = std::fs::remove_file(filename);
            }
            return Err(e.into());
        }
    };
    print_pause(&format!("'{name}' is over '{node}' now"), report, json);
    Ok(())
}

pub async fn snapshot(
    daemon: &Daemon,
    manager: &ManagerProxy<'_>,
    command: SnapshotCommand,
    json: bool,
) -> Result<()> {
    let (SnapshotCommand::Create { node, .. }
    | SnapshotCommand::Overlay { node, .. }
    | SnapshotCommand::List { node }
    | SnapshotCommand::Apply { node, .. }
    | SnapshotCommand::Delete { node, .. }) = &command;
    Objects::load(daemon).await?.find("node", node)?;
    let proxy = daemon.node(node);
    let proxy = proxy.await?;
    let none = HashMap::new;
    match &command {
        SnapshotCommand::Overlay { .. } => {
            overlay(daemon, manager, &command, json).await?;
        }
        SnapshotCommand::Create { name, .. } => {
            proxy.create_snapshot(name, none()).await?;
        }
        SnapshotCommand::Apply { snapshot, .. } => {
            proxy.apply_snapshot(snapshot, none()).await?;
        }
        SnapshotCommand::Delete { snapshot, .. } => {
            proxy.delete_snapshot(snapshot, none()).await?;
        }
        SnapshotCommand::List { .. } => {
            let info = properties(proxy.get_image_info(none()).await?);
            let all = match info.get("snapshots") {
                Some(Json::Array(all)) => all.clone(),
                _ => Vec::new(),
            };
            if json {
                print_json(&Json::Array(all));
            } else {
                snapshot_rows(&all).print();
            }
        }
    }
    Ok(())
}
