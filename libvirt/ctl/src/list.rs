//! `vdiskctl domain list`, `info` and `stats`.

use serde_json::{Value as Json, json};
use vdisk_api::format_size;
use vdisk_domain::{Domain, Served, all_served, served, take_down_disk};
use vdiskctl::daemon::Daemon;
use vdiskctl::error::Result;
use vdiskctl::objects::Objects;
use vdiskctl::output::{Rows, number, print_json};
use vdiskctl::stats::print_statistics;

use crate::disks::{chain, none_served};
use crate::libvirt::{Guest, Libvirt, Side};
use crate::{Context, disks::Running, failed};

/// What serves the disks of a domain; nothing if the daemon is not there.
async fn serving(cx: &Context, domain: &Domain) -> Vec<Served> {
    match cx.daemon(domain).await {
        Ok(daemon) => served(&daemon, &domain.uuid).await.unwrap_or_default(),
        Err(_) => Vec::new(),
    }
}

fn state(guest: &Guest) -> Result<&'static str> {
    Ok(match guest.is_active()? {
        true => "running",
        false => "shut off",
    })
}

fn in_words(running: bool, served: Option<&Served>) -> &'static str {
    match (running, served) {
        (_, Some(s)) if s.clients > 0 => "in use",
        (_, Some(_)) => "served",
        (true, None) => "NOT SERVED",
        (false, None) => "-",
    }
}

pub async fn list(cx: &Context, all: bool) -> Result<()> {
    let mut rows = Rows::new(&["domain", "state", "disk", "format", "vdiskd", "image"]);
    let mut found = Vec::new();
    for guest in cx.libvirt.all()? {
        let Ok(domain) = guest.now() else {
            anstream::eprintln!("domain '{}': its metadata cannot be read", guest.name);
            continue;
        };
        let (state, running) = (state(&guest)?, guest.is_active()?);
        let serving = match domain.metadata.disks.is_empty() {
            true => Vec::new(),
            false => serving(cx, &domain).await,
        };
        for element in &domain.disks {
            let disk = domain.metadata.disk(&element.target);
            if disk.is_none() && !all {
                continue;
            }
            let served = serving.iter().find(|s| s.target == element.target);
            let image = disk.map(|d| d.file().to_owned());
            let image = image.or(element.source.clone()).unwrap_or_default();
            let words = match disk {
                Some(_) => in_words(running, served),
                None => "no",
            };
            found.push(json!({
                "domain": guest.name, "uuid": domain.uuid, "running": running, "target": element.target,
                "served": served.is_some(), "clients": served.map_or(0, |s| s.clients), "image": image,
                "export": served.map(|s| s.id.clone()), "vdiskd": disk.is_some(),
            }));
            rows.add(vec![
                guest.name.clone(),
                state.to_owned(),
                element.target.clone(),
                disk.map_or("-", |d| d.format()).to_owned(),
                words.to_owned(),
                image,
            ]);
        }
    }
    // Whoever cannot reach the daemon sees no orphans.
    for (uuid, orphan) in orphans_of(cx).await.unwrap_or_default() {
        found.push(json!({
            "domain": Json::Null, "uuid": uuid, "running": false, "target": orphan.target, "served": true,
            "clients": orphan.clients, "image": Json::Null, "export": orphan.id, "vdiskd": true, "orphan": true,
        }));
        rows.add(vec![
            uuid,
            "-".into(),
            orphan.target,
            "-".into(),
            "ORPHAN".into(),
            format!("export {}", orphan.id),
        ]);
    }
    match cx.args.json {
        true => print_json(&Json::Array(found)),
        false => rows.print(),
    }
    Ok(())
}

/// What the daemon serves for no guest: those of domains that do not run, and disks that their domains do not have any more.
pub async fn orphans(libvirt: &Libvirt, daemon: &Daemon) -> Result<Vec<(String, Served)>> {
    let mut all = all_served(daemon).await.map_err(failed)?;
    for guest in libvirt.all()? {
        let uuid = guest.uuid()?;
        let live = match guest.is_active() {
            Ok(false) => continue,
            Ok(true) => guest.parsed(Side::Live),
            Err(e) => Err(e),
        };
        let Ok(live) = live else {
            // Of what it has nothing is said.
            all.retain(|(of, _)| *of != uuid);
            continue;
        };
        all.retain(|(of, s)| {
            let mut disks = live.disks.iter();
            *of != uuid || !disks.any(|d| d.source.as_ref() == Some(&s.socket))
        });
    }
    Ok(all)
}

async fn orphans_of(cx: &Context) -> Result<Vec<(String, Served)>> {
    let daemon = vdiskctl::daemon::connect(&cx.args.daemon).await?;
    orphans(&cx.libvirt, &daemon).await
}

/// Takes down what is served for no guest; a domain that starts waits for that. Whether it was done: it may have a guest by now. The caller has the domain's lock, if there is one.
pub async fn take_down_orphan(
    libvirt: &Libvirt,
    guest: Option<&Guest>,
    daemon: &Daemon,
    uuid: &str,
    orphan: &Served,
) -> Result<bool> {
    let keep_off = |on| guest.map_or(Ok(()), |guest| guest.keep_off(on));
    keep_off(true)?;
    // It may have started, or be about to, since it was looked at.
    let done = match orphans(libvirt, daemon).await {
        Ok(now) if now.iter().any(|(of, s)| of == uuid && s == orphan) => {
            let done = take_down_disk(daemon, uuid, &orphan.target).await;
            done.map(|()| true).map_err(failed)
        }
        Ok(_) => Ok(false),
        Err(e) => Err(e),
    };
    keep_off(false)?;
    done
}

pub async fn cleanup(cx: &Context, dry_run: bool) -> Result<()> {
    let daemon = vdiskctl::daemon::connect(&cx.args.daemon).await?;
    for (uuid, orphan) in orphans(&cx.libvirt, &daemon).await? {
        // A domain that starts has its exports before libvirt says that it runs.
        let _lock = match cx.libvirt.find(&uuid) {
            Ok(guest) => match guest.lock() {
                Ok(lock) => Some(lock),
                Err(e) => {
                    anstream::eprintln!("warning: {e}");
                    continue;
                }
            },
            Err(_) => None,
        };
        // As it is now.
        let now = orphans(&cx.libvirt, &daemon).await?;
        let same = |(u, s): &(String, Served)| *u == uuid && s.target == orphan.target;
        let Some((_, orphan)) = now.into_iter().find(same) else {
            continue;
        };
        if orphan.clients > 0 {
            anstream::eprintln!("{}: a front-end is connected to it: it stays", orphan.id);
            continue;
        }
        if !dry_run {
            let guest = cx.libvirt.find(&uuid).ok();
            let guest = guest.as_ref();
            if !take_down_orphan(&cx.libvirt, guest, &daemon, &uuid, &orphan).await? {
                continue;
            }
        }
        if !cx.args.json {
            anstream::println!("{} (of domain {uuid})", orphan.id);
        }
    }
    Ok(())
}

pub async fn info(cx: &Context, name: &str) -> Result<()> {
    let guest = cx.libvirt.find(name)?;
    let domain = guest.now()?;
    if domain.metadata.disks.is_empty() {
        return Err(none_served(&guest.name));
    }
    let running = guest.is_active()?;
    let daemon = cx.daemon(&domain).await.ok();
    let objects = match &daemon {
        Some(daemon) => Objects::load(daemon).await.ok(),
        None => None,
    };
    let serving = serving(cx, &domain).await;
    let mut all = Vec::new();
    let bold = "\u{1b}[1m";
    if !cx.args.json {
        let by = domain.metadata.instance.as_deref();
        anstream::println!(
            "{bold}{}\u{1b}[0m  {}, {}, disks by {}",
            guest.name,
            domain.uuid,
            state(&guest)?,
            by.map_or("vdiskd".to_owned(), |i| format!("vdiskd@{i}")),
        );
    }
    for disk in &domain.metadata.disks {
        let served = serving.iter().find(|s| s.target == disk.target);
        let images = match (&objects, served) {
            (Some(objects), Some(s)) => chain(objects, &s.id).unwrap_or_default(),
            _ => vec![(
                String::new(),
                disk.file().to_owned(),
                disk.format().to_owned(),
            )],
        };
        let size = |node: &str| {
            let objects = objects.as_ref()?;
            Some(number(objects.find("node", node).ok()?, "Size"))
        };
        let settings: Vec<String> = disk
            .settings()
            .filter(|(name, _)| !matches!(*name, "file" | "format"))
            .map(|(name, value)| format!("{name}={value}"))
            .chain(
                disk.iotune
                    .iter()
                    .map(|(name, value)| format!("{name}={value}")),
            )
            .collect();
        if cx.args.json {
            let chain: Vec<Json> = images
                .iter()
                .map(|(node, file, format)| json!({"node": node, "file": file, "format": format}))
                .collect();
            all.push(json!({
                "target": disk.target, "chain": chain, "export": served.map(|s| s.id.clone()),
                "clients": served.map_or(0, |s| s.clients), "size": images.first().and_then(|i| size(&i.0)),
                "settings": disk.settings().collect::<std::collections::BTreeMap<_, _>>(), "iotune": disk.iotune,
            }));
            continue;
        }
        let first = images.first().and_then(|i| size(&i.0)).map(format_size);
        anstream::println!(
            "  {bold}{}\u{1b}[0m  {}{}",
            disk.target,
            in_words(running, served),
            first.map_or(String::new(), |s| format!(", {s}")),
        );
        if !settings.is_empty() {
            anstream::println!("    {}", settings.join(" "));
        }
        for (depth, (node, file, format)) in images.iter().enumerate() {
            let arrow = if depth == 0 { "" } else { "over " };
            let node = match node.is_empty() {
                true => String::new(),
                false => format!("  (node {node})"),
            };
            anstream::println!("    {:depth$}{arrow}{file}  {format}{node}", "");
        }
    }
    if cx.args.json {
        print_json(
            &json!({"domain": guest.name, "uuid": domain.uuid, "running": running, "disks": all}),
        );
    }
    Ok(())
}

pub async fn stats(cx: &Context, name: &str) -> Result<()> {
    let running = Running::find(cx, name).await?;
    let manager = running.manager().await?;
    let ids: Vec<String> = running.served.iter().map(|s| s.id.clone()).collect();
    print_statistics(&manager, &ids, cx.args.json).await
}
