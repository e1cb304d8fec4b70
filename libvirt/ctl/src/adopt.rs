//! `vdiskctl domain adopt` and `release`.

use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde_json::json;
use similar::TextDiff;
use vdisk_domain::{Adoption, Domain};
use vdiskctl::error::{Error, Result};
use vdiskctl::output::print_json;

use crate::args::Command;
use crate::libvirt::{Guest, Side};
use crate::{Context, files, wrong};

/// Where definitions are kept as they were before.
const BACKUPS: &str = "/var/lib/vdisk-domains";

/// KEY=VALUE words.
pub fn settings(words: &[String]) -> Result<Vec<(String, String)>> {
    let split = |word: &String| match word.split_once('=') {
        Some((key, value)) => Ok((key.to_owned(), value.to_owned())),
        None => Err(Error::invalid(format!(
            "'{word}' is not a setting: write KEY=VALUE"
        ))),
    };
    words.iter().map(split).collect()
}

fn print_diff(name: &str, before: &str, after: &str, json: bool) {
    if json {
        print_json(&json!({"domain": name, "before": before, "after": after}));
        return;
    }
    let diff = TextDiff::from_lines(before, after);
    let mut unified = diff.unified_diff();
    anstream::print!("{}", unified.header(name, &format!("{name} (new)")));
}

/// Keeps a definition; the file.
fn keep(guest: &Guest, xml: &str) -> Result<PathBuf> {
    let no = |e: std::io::Error| {
        Error::failed(format!(
            "the definition of domain '{}' cannot be kept in {BACKUPS}: {e}",
            guest.name
        ))
    };
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(BACKUPS)
        .map_err(no)?;
    for n in 1.. {
        let path = Path::new(BACKUPS).join(format!("{}.{n}.xml", guest.name.replace('/', "_")));
        let made = std::fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path);
        match made {
            Ok(mut file) => {
                file.write_all(xml.as_bytes()).map_err(no)?;
                file.sync_all().map_err(no)?;
                return Ok(path);
            }
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {}
            Err(e) => return Err(no(e)),
        }
    }
    unreachable!("there is a number that is free")
}

fn changeable(cx: &Context, name: &str) -> Result<Guest> {
    let guest = cx.libvirt.find(name)?;
    guest.must_be_off()?;
    if guest.snapshots()? > 0 {
        return Err(Error::named(
            "InUse",
            format!(
                "domain '{0}' has snapshots of libvirt's, which know its disks as they are: delete them first (virsh snapshot-list {0})",
                guest.name
            ),
        ));
    }
    Ok(guest)
}

pub async fn adopt(cx: &Context) -> Result<()> {
    let Command::Adopt {
        domain,
        disks,
        dry_run,
        settings: words,
    } = &cx.args.command
    else {
        return Ok(());
    };
    let guest = changeable(cx, domain)?;
    let before = guest.xml(Side::Config)?;
    let how = Adoption {
        targets: disks.clone(),
        instance: cx.args.daemon.instance.clone(),
        settings: settings(words)?,
    };
    let (after, adopted) = vdisk_domain::adopt(&before, &how).map_err(wrong)?;
    if *dry_run {
        print_diff(&guest.name, &before, &after, cx.args.json);
        return Ok(());
    }
    let new = Domain::parse(&after).map_err(wrong)?;
    let daemon = cx.daemon(&new).await?;
    let manager = daemon.manager().await?;
    let mut given = Vec::new();
    let done = async {
        let mut metadata = new.metadata.clone();
        for disk in &adopted {
            let chain = files::give_chain(&manager, disk.file(), disk.format(), &mut given).await?;
            if let Some(disk) = metadata.disk_mut(&disk.target) {
                files::adopt_chain(disk, &chain)?;
            }
            let owner = given
                .iter()
                .find(|(path, _)| path == Path::new(disk.file()));
            let original = metadata
                .disk_mut(&disk.target)
                .and_then(|d| d.original.as_mut());
            if let (Some(original), Some((_, owner))) = (original, owner) {
                original.owner = Some(*owner);
            }
        }
        let after = vdisk_domain::replace_metadata(&after, &metadata).map_err(wrong)?;
        let kept = keep(&guest, &before)?;
        cx.libvirt.define(&guest.name, &after)?;
        Ok(kept)
    };
    let kept: Result<PathBuf> = done.await;
    let kept = match kept {
        Ok(kept) => kept,
        Err(e) => {
            for (path, owner) in given {
                let _ = files::give_back(&path, owner);
            }
            return Err(e);
        }
    };
    let names: Vec<&str> = adopted.iter().map(|d| d.target.as_str()).collect();
    match cx.args.json {
        true => print_json(
            &json!({"domain": guest.name, "adopted": names, "backup": kept.display().to_string()}),
        ),
        false => anstream::println!(
            "vdiskd serves {} of '{}' from its next start on; its definition as it was is in {}",
            names.join(", "),
            guest.name,
            kept.display()
        ),
    }
    Ok(())
}

/// All files that domains have, but for one of them by its UUID.
pub fn in_use_elsewhere(cx: &Context, but: Option<&str>) -> Result<Vec<String>> {
    let mut files = Vec::new();
    for guest in cx.libvirt.all()? {
        for side in guest.sides()? {
            let domain = guest.parsed(side)?;
            if Some(domain.uuid.as_str()) == but {
                continue;
            }
            let theirs = domain.disks.iter().filter(|d| d.kind != "vhostuser");
            files.extend(theirs.filter_map(|d| d.source.clone()));
            for disk in &domain.metadata.disks {
                files.push(disk.file().to_owned());
                files.extend(disk.backing.iter().map(|b| b.file.clone()));
            }
        }
    }
    Ok(files)
}

pub async fn release(cx: &Context) -> Result<()> {
    let Command::Release {
        domain,
        disks,
        dry_run,
    } = &cx.args.command
    else {
        return Ok(());
    };
    let guest = changeable(cx, domain)?;
    let before = guest.xml(Side::Config)?;
    let (after, released) = vdisk_domain::release(&before, disks).map_err(wrong)?;
    if *dry_run {
        print_diff(&guest.name, &before, &after, cx.args.json);
        return Ok(());
    }
    let daemon = cx.daemon(&Domain::parse(&before).map_err(wrong)?).await?;
    let manager = daemon.manager().await?;
    cx.libvirt.define(&guest.name, &after)?;
    let uuid = Domain::parse(&before).map_err(wrong)?.uuid;
    let others = in_use_elsewhere(cx, Some(&uuid))?;
    for disk in &released {
        let Some(owner) = disk.original.as_ref().and_then(|o| o.owner) else {
            continue;
        };
        let chain = files::chain(&manager, disk.file(), disk.format()).await;
        let chain = chain.unwrap_or_else(|_| vec![files::Link::new(disk.file(), disk.format())]);
        for file in chain.into_iter().map(|link| link.file) {
            // Others may stand on it.
            if !others.contains(&file) {
                files::give_back(Path::new(&file), owner)?;
            }
        }
    }
    let names: Vec<&str> = released.iter().map(|d| d.target.as_str()).collect();
    match cx.args.json {
        true => print_json(&json!({"domain": guest.name, "released": names})),
        false => anstream::println!("{} of '{}' is QEMU's again", names.join(", "), guest.name),
    }
    Ok(())
}
