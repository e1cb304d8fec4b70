//! What is done to a disk while its guest runs: `blockcommit`, `blockpull`, `blockcopy`, `resize`, `throttle`, `threshold`.

use std::path::Path;

use serde_json::json;
use vdisk_api::parse_size;
use vdisk_domain::{Domain, encryption};
use vdiskctl::args::{self, Merge, Mirror, Node};
use vdiskctl::error::{Error, Result};
use vdiskctl::jobs;
use vdiskctl::objects::properties;
use vdiskctl::options::Options;
use vdiskctl::output::{number, print_json, text};
use zbus::Variant;

use crate::adopt::in_use_elsewhere;
use crate::args::Command;
use crate::disks::{Image, Running, chain, stays_encrypted};
use crate::{Context, files, wrong};

pub async fn merge(cx: &Context) -> Result<()> {
    let (commit, domain, target, base, speed) = match &cx.args.command {
        Command::BlockCommit {
            domain,
            target,
            base,
            speed,
        } => (true, domain, target, base, speed),
        Command::BlockPull {
            domain,
            target,
            base,
            speed,
        } => (false, domain, target, base, speed),
        _ => return Ok(()),
    };
    let running = Running::find_or_open(cx, domain).await?;
    let (disk, served) = running.disk(target)?;
    let images = chain(&running.look().await?, &served.id)?;
    if images.len() < 2 {
        return Err(Error::failed(format!(
            "disk '{target}' of domain '{}' stands on no other image: there is nothing to do",
            running.domain.name
        )));
    }
    let base = match base {
        Some(file) => {
            let path = std::path::absolute(file).map_err(|e| Error::invalid(e.to_string()))?;
            let below = images[1..].iter();
            let mut found = below.filter(|(_, f, _)| Path::new(f) == path);
            match found.next() {
                Some((node, ..)) => Some(node.clone()),
                None => {
                    let files: Vec<&str> = images[1..].iter().map(|(_, f, _)| f.as_str()).collect();
                    return Err(Error::not_found(format!(
                        "disk '{target}' does not stand on '{file}': below it are {}",
                        files.join(", ")
                    )));
                }
            }
        }
        None => None,
    };
    let base_at = base
        .as_ref()
        .and_then(|b| images.iter().position(|(n, ..)| n == b));
    match (commit, base_at) {
        (true, at) => {
            let at = at.unwrap_or(1);
            stays_encrypted(disk, &images[..at], &images[at])?;
        }
        (false, at) => stays_encrypted(disk, &images[1..at.unwrap_or(images.len())], &images[0])?,
    }
    if commit {
        let written = &images[1..=base_at.unwrap_or(1)];
        nobody_else(cx, &running.domain, written)?;
        // Snapshots of these files are not what they were, however this ends.
        let is_written = |file: &str| written.iter().any(|(_, f, _)| f == file);
        running.guest.change(|metadata| {
            metadata.retain_snapshots(|_, d| d.target != *target || !is_written(&d.file));
            Ok(())
        })?;
    }
    let merge = Merge {
        node: images[0].0.clone(),
        base,
        speed: speed.clone(),
        detach: false,
        options: Vec::new(),
    };
    let done = jobs::merge(&running.daemon, &merge, commit, cx.args.json).await;
    let expected: Vec<Image> = match (commit, base_at) {
        (true, at) => images[at.unwrap_or(1)..].to_vec(),
        (false, None) => images[..1].to_vec(),
        (false, Some(at)) => [&images[..1], &images[at..]].concat(),
    };
    let expected = done.is_ok().then_some(expected.as_slice());
    running.settle(target, &images, expected, false).await?;
    done
}

/// Refuses to change files that other domains stand on, also those that do not run.
pub fn nobody_else(cx: &Context, domain: &Domain, files: &[Image]) -> Result<()> {
    let others = in_use_elsewhere(cx, Some(&domain.uuid))?;
    match files.iter().find(|(_, file, _)| others.contains(file)) {
        None => Ok(()),
        Some((_, file, _)) => Err(Error::named(
            "InUse",
            format!(
                "'{file}' is below disks of other domains, which would be others then: use blockpull instead"
            ),
        )),
    }
}

pub async fn copy(cx: &Context) -> Result<()> {
    let Command::BlockCopy {
        domain,
        target,
        dest,
        format,
        finish,
        speed,
    } = &cx.args.command
    else {
        return Ok(());
    };
    let running = Running::find_or_open(cx, domain).await?;
    let (format, speed) = (format.as_deref(), speed.as_deref());
    copy_disk(cx, &running, target, dest, format, *finish, speed).await
}

/// Brings a disk elsewhere, and its guest as well unless the copy is only to be made.
pub async fn copy_disk(
    cx: &Context,
    running: &Running,
    target: &str,
    dest: &str,
    format: Option<&str>,
    finish: bool,
    speed: Option<&str>,
) -> Result<()> {
    let (disk, served) = running.disk(target)?;
    let secret = disk.secrets().next();
    let manager = running.manager().await?;
    let (objects, node) = running.image(target).await?;
    let before = chain(&objects, &served.id)?;
    let dest = std::path::absolute(dest).map_err(|e| Error::invalid(e.to_string()))?;
    let dest = dest.to_string_lossy().into_owned();
    let size = number(objects.find("node", &node)?, "Size");
    let is_device = std::fs::metadata(&dest).is_ok_and(|m| !m.is_file());
    let usual = if is_device { "raw" } else { "qcow2" };
    let format = format.unwrap_or(usual);
    if format == "raw" || is_device {
        // (A device keeps what it is.)
        let into = (String::new(), dest.clone(), format.to_owned());
        stays_encrypted(disk, &before, &into)?;
    }
    match is_device {
        // What is on a device is overwritten, as it has no other use.
        true => files::give(Path::new(&dest), false).map(drop)?,
        false => {
            let mut options = Options::from([("size", Variant::from(size))]);
            options.extend(encryption(format, secret));
            files::make_image(&manager, &dest, format, options).await?;
        }
    }
    let copy = args::Copy {
        filename: dest.clone(),
        format: format.to_owned(),
        existing: true,
        name: Some(format!("{}-{}", served.id, stamp())),
        sync: None,
        compress: false,
        speed: speed.map(str::to_owned),
        detach: false,
        target: node_words([disk.more_node_options(), encryption(format, secret)].concat()),
        options: Vec::new(),
    };
    let mirror = Mirror {
        node,
        copy,
        pivot: !finish,
        write_blocking: false,
    };
    let done = jobs::mirror(&running.daemon, &manager, &mirror, cx.args.json).await;
    // Whatever was said about the job, what the guest is on now counts.
    let after = [(String::new(), dest.clone(), format.to_owned())];
    let expected = (done.is_ok() && !finish).then_some(after.as_slice());
    running
        .settle(target, &before, expected, secret.is_some())
        .await?;
    if done.is_err() && !is_device && !files::is_open(&running.daemon, &dest).await? {
        let _ = std::fs::remove_file(&dest);
    }
    done
}

/// Something that makes names of nodes different.
pub fn stamp() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |d| d.as_secs())
}

fn node_words(options: Vec<(&'static str, Variant<'static>)>) -> Vec<String> {
    let word = |(key, value): (&str, Variant<'static>)| match value {
        Variant::Bool(b) => format!("{key}={}", if b { "on" } else { "off" }),
        Variant::Str(s) => format!("{key}={}", s.as_str()),
        other => format!("{key}={other:?}"),
    };
    options.into_iter().map(word).collect()
}

pub async fn resize(cx: &Context) -> Result<()> {
    let Command::Resize {
        domain,
        target,
        size,
    } = &cx.args.command
    else {
        return Ok(());
    };
    let running = Running::find_or_open(cx, domain).await?;
    let (_, name) = running.image(target).await?;
    // It is not made smaller: that would cut off file systems that the guest uses.
    let command = Node::Resize {
        name,
        size: size.clone(),
        shrink: false,
    };
    let manager = running.manager().await?;
    vdiskctl::commands::node(&running.daemon, &manager, command, cx.args.json).await
}

pub async fn throttle(cx: &Context) -> Result<()> {
    let Command::Throttle {
        domain,
        target,
        limits,
    } = &cx.args.command
    else {
        return Ok(());
    };
    let guest = cx.libvirt.find(domain)?;
    let now = guest.now()?;
    let mut disk = match now.metadata.disk(target) {
        Some(disk) => disk.clone(),
        None => return Err(crate::disks::no_disk(&now, target)),
    };
    for (name, value) in crate::adopt::settings(limits)? {
        let number = parse_size(&value).ok_or_else(|| {
            Error::invalid(format!(
                "{name} is '{value}': give a number, such as 500 or 50M"
            ))
        })?;
        disk.set_limit(&name, number).map_err(wrong)?;
    }
    if guest.is_active()? {
        let running = Running::find(cx, domain).await?;
        let (_, served) = running.disk(target)?;
        let group = disk.get("group").unwrap_or(&served.id);
        let manager = running.manager().await?;
        let all = disk.limits().into_iter().collect();
        manager.set_throttle_group(group, all).await?;
        let objects = running.look().await?;
        let top = text(objects.find("node", &served.node)?, "Driver");
        if top != "throttle" {
            let filter = Options::from([
                ("driver", Variant::from("throttle")),
                (
                    "node-name",
                    Variant::from(format!("{}-throttle", served.id)),
                ),
                ("throttle-group", Variant::from(group.to_owned())),
            ]);
            let node = running.daemon.node(&served.node).await?;
            let (_, report) = node.insert_filter(filter).await?;
            let paused = number(&properties(report), "paused-ns") as f64 / 1e6;
            if !cx.args.json {
                anstream::println!("the guest waited for {paused:.1} ms");
            }
        }
    }
    guest.change(|metadata| {
        if let Some(there) = metadata.disk_mut(target) {
            there.iotune.clone_from(&disk.iotune);
        }
        Ok(())
    })?;
    if cx.args.json {
        print_json(&json!({"domain": guest.name, "target": target, "iotune": disk.iotune}));
    }
    Ok(())
}

pub async fn threshold(cx: &Context) -> Result<()> {
    let Command::Threshold {
        domain,
        target,
        offset,
        wait,
    } = &cx.args.command
    else {
        return Ok(());
    };
    let running = Running::find(cx, domain).await?;
    let (objects, node) = running.image(target).await?;
    // The file below an image is what grows.
    let node = crate::disks::child(&objects, &node, "file").unwrap_or(node);
    let command = Node::Threshold {
        name: node,
        offset: offset.clone(),
        wait: *wait,
    };
    let manager = running.manager().await?;
    vdiskctl::commands::node(&running.daemon, &manager, command, cx.args.json).await
}
