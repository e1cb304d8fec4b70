//! `vdiskctl domain attach` and `detach`.

use std::path::PathBuf;
use std::time::Duration;

use vdisk_domain::{
    Disk, Domain, Metadata, Start, attach_xml, build_disk, take_down_disk, with_shared_memory,
};
use vdiskctl::error::{Error, Result};

use crate::adopt::settings;
use crate::args::{Command, When};
use crate::disks::no_disk;
use crate::libvirt::{Guest, Side};
use crate::{Context, failed, files, wrong};

/// Which definitions are changed.
fn sides(guest: &Guest, when: &When) -> Result<Vec<Side>> {
    let there = guest.sides()?;
    let wanted: Vec<Side> = there
        .iter()
        .copied()
        .filter(|side| match side {
            Side::Live => !when.config,
            Side::Config => !when.live,
        })
        .collect();
    match wanted.is_empty() {
        false => Ok(wanted),
        true if when.live => Err(Error::failed(format!(
            "domain '{}' is not running: leave --live out",
            guest.name
        ))),
        true => Err(Error::failed(format!(
            "domain '{}' is not persistent: leave --config out",
            guest.name
        ))),
    }
}

pub async fn attach(cx: &Context) -> Result<()> {
    let Command::Attach {
        domain,
        file,
        target,
        settings: words,
        when,
    } = &cx.args.command
    else {
        return Ok(());
    };
    let guest = cx.libvirt.find(domain)?;
    let sides = sides(&guest, when)?;
    let path = std::path::absolute(file).map_err(|e| Error::invalid(e.to_string()))?;
    let path = path.to_string_lossy().into_owned();
    let settings = settings(words)?;
    let format = settings.iter().find(|(name, _)| name == "format");
    let format = format.map_or("qcow2", |(_, value)| value);
    let mut disk = Disk::new(target, &path, format).map_err(wrong)?;
    for (name, value) in &settings {
        disk.set(name, value).map_err(wrong)?;
    }
    for side in &sides {
        let there = guest.parsed(*side)?;
        if there.element(target).is_some() {
            return Err(Error::named(
                "Exists",
                format!("domain '{}' has a disk '{target}' already", guest.name),
            ));
        }
        if *side == Side::Live && !there.shares_memory {
            return Err(Error::failed(format!(
                "domain '{}' does not share its memory, which disks of vdiskd need, and that cannot be changed while it runs: attach with --config, and start it anew",
                guest.name
            )));
        }
    }
    let mut given = Vec::new();
    let attached = attach_all(cx, &guest, &sides, &mut disk, &mut given).await;
    if let Err(e) = attached {
        for (path, owner) in given {
            let _ = files::give_back(&path, owner);
        }
        return Err(e);
    }
    if !cx.args.json {
        let until = match sides.as_slice() {
            [Side::Live] => ", until it ends",
            [Side::Config] => " from its next start on",
            _ => "",
        };
        anstream::println!("'{}' has {path} as {target}{until}", guest.name);
    }
    Ok(())
}

async fn attach_all(
    cx: &Context,
    guest: &Guest,
    sides: &[Side],
    disk: &mut Disk,
    given: &mut Vec<(PathBuf, (u32, u32))>,
) -> Result<()> {
    let daemon = cx.daemon(&guest.parsed(sides[0])?).await?;
    let manager = daemon.manager().await?;
    let chain = files::give_chain(&manager, disk.file(), disk.format(), given).await?;
    files::adopt_chain(disk, &chain)?;
    let mut done = Vec::new();
    for side in sides {
        if let Err(e) = attach_to(cx, guest, *side, disk).await {
            for side in done {
                let limit = Duration::from_secs(5);
                let _ = detach_from(cx, guest, side, &disk.target, limit).await;
            }
            return Err(e);
        }
        done.push(*side);
    }
    Ok(())
}

/// First what serves the disk, then the device; undone in reverse.
async fn attach_to(cx: &Context, guest: &Guest, side: Side, disk: &Disk) -> Result<()> {
    if side == Side::Config {
        let xml = guest.xml(side)?;
        if let Some(shared) = with_shared_memory(&xml).map_err(wrong)? {
            cx.libvirt.define(&guest.name, &shared)?;
        }
    }
    let mut domain = guest.parsed(side)?;
    if domain.metadata.disks.is_empty() {
        domain.metadata.instance = cx.args.daemon.instance.clone();
    }
    let before = domain.metadata.clone();
    let socket = domain.socket_path(&disk.target);
    // Something may be left of one that virsh has taken away.
    forget(&mut domain.metadata, &disk.target);
    domain.metadata.disks.push(disk.clone());
    let serve = side == Side::Live;
    if serve {
        let daemon = cx.daemon(&domain).await?;
        build_disk(&daemon, &domain, disk, &socket, Start::Boot)
            .await
            .map_err(failed)?;
    }
    let device = async {
        guest.set_metadata(side, &domain.metadata)?;
        let attached = guest.attach(side, &attach_xml(&domain, disk));
        if attached.is_err() {
            let _ = guest.set_metadata(side, &before);
        }
        attached
    };
    let attached = device.await;
    if attached.is_err() && serve {
        let daemon = cx.daemon(&domain).await?;
        let _ = take_down_disk(&daemon, &domain.uuid, &disk.target).await;
    }
    attached
}

pub async fn detach(cx: &Context) -> Result<()> {
    let Command::Detach {
        domain,
        target,
        when,
        timeout,
    } = &cx.args.command
    else {
        return Ok(());
    };
    let guest = cx.libvirt.find(domain)?;
    let sides = sides(&guest, when)?;
    let mut found = false;
    for side in sides {
        let there = guest.parsed(side)?;
        if there.metadata.disk(target).is_none() {
            continue;
        }
        found = true;
        let limit = Duration::from_secs(*timeout);
        detach_from(cx, &guest, side, target, limit).await?;
    }
    if !found {
        return Err(no_disk(&guest.now()?, target));
    }
    if !cx.args.json {
        anstream::println!("'{}' does not have {target} any more", guest.name);
    }
    Ok(())
}

async fn detach_from(
    cx: &Context,
    guest: &Guest,
    side: Side,
    target: &str,
    limit: Duration,
) -> Result<()> {
    let domain: Domain = guest.parsed(side)?;
    let xml = guest.xml(side)?;
    if let Some(element) = vdisk_domain::disk_xml(&xml, target).map_err(wrong)? {
        guest.detach(side, &element)?;
    }
    if side == Side::Live {
        if !guest.gone(target, limit).await? {
            return Err(Error::named(
                "Busy",
                format!(
                    "the guest '{}' has not let go of {target} within {} s: it is asked, and may be busy with it; nothing was taken away",
                    guest.name,
                    limit.as_secs()
                ),
            ));
        }
        let daemon = cx.daemon(&domain).await?;
        take_down_disk(&daemon, &domain.uuid, target)
            .await
            .map_err(failed)?;
    }
    // As it is by now.
    let mut metadata = guest.parsed(side)?.metadata;
    forget(&mut metadata, target);
    guest.set_metadata(side, &metadata)
}

fn forget(metadata: &mut Metadata, target: &str) {
    metadata.disks.retain(|d| d.target != target);
    metadata.retain_snapshots(|_, d| d.target != target);
}
