//! The disks of a domain as the daemon has them.

use serde_json::Value as Json;
use vdisk_dbus::ManagerProxy;
use vdisk_domain::{Disk, Domain, Metadata, Served, Start, build, let_in, served};
use vdiskctl::daemon::Daemon;
use vdiskctl::error::{Error, Result};
use vdiskctl::objects::{Objects, name_of};
use vdiskctl::options::Options;
use vdiskctl::output::{names, text};

use crate::libvirt::Guest;
use crate::{Context, failed, wrong};

/// An image of a chain: node, file and format.
pub type Image = (String, String, String);

/// A domain whose guest runs on disks of the daemon.
pub struct Running {
    pub guest: Guest,
    pub domain: Domain,
    pub daemon: Daemon,
    pub served: Vec<Served>,
}

impl Running {
    /// As [`Running::find`], and opens the disks of a domain that is shut off, until the command has ended.
    pub async fn find_or_open(cx: &Context, name: &str) -> Result<Running> {
        let guest = cx.libvirt.find(name)?;
        if guest.is_active()? || cx.has_opened() {
            return Running::find_served(cx, guest).await;
        }
        guest.must_be_off()?;
        let domain = guest.now()?;
        if domain.served().next().is_none() {
            return Err(none_served(&domain.name));
        }
        guest.keep_off(true)?;
        // It may have begun to start before.
        guest.must_be_off()?;
        let_in(&domain).map_err(wrong)?;
        let daemon = cx.daemon(&domain).await?;
        cx.opened(&guest, &daemon, &domain.uuid);
        build(&daemon, &domain, Start::Boot).await.map_err(failed)?;
        Running::find_served(cx, guest).await
    }

    /// A domain that runs.
    pub async fn find(cx: &Context, name: &str) -> Result<Running> {
        let guest = cx.libvirt.find(name)?;
        if !guest.is_active()? {
            return Err(Error::failed(format!(
                "domain '{0}' is not running: start it first (virsh start {0})",
                guest.name
            )));
        }
        Running::find_served(cx, guest).await
    }

    async fn find_served(cx: &Context, guest: Guest) -> Result<Running> {
        let domain = guest.now()?;
        if domain.metadata.disks.is_empty() {
            return Err(none_served(&domain.name));
        }
        let daemon = cx.daemon(&domain).await?;
        let served = served(&daemon, &domain.uuid).await.map_err(failed)?;
        Ok(Running {
            guest,
            domain,
            daemon,
            served,
        })
    }

    pub async fn manager(&self) -> Result<ManagerProxy<'_>> {
        Ok(self.daemon.manager().await?)
    }

    /// One disk, and what serves it.
    pub fn disk(&self, target: &str) -> Result<(&Disk, &Served)> {
        let disk = self.domain.metadata.disk(target);
        let served = self.served.iter().find(|s| s.target == target);
        match (disk, served) {
            (Some(disk), Some(served)) => Ok((disk, served)),
            (Some(_), None) => Err(Error::failed(format!(
                "disk '{target}' of domain '{}' is not served (any more): see vdiskctl export list and journalctl -u vdiskd",
                self.domain.name
            ))),
            (None, _) => Err(no_disk(&self.domain, target)),
        }
    }

    /// The node of a disk's image, among everything there is.
    pub async fn image(&self, target: &str) -> Result<(Objects, String)> {
        let (_, served) = self.disk(target)?;
        let objects = self.look().await?;
        let node = image_node(&objects, &served.id)?;
        Ok((objects, node))
    }

    pub async fn look(&self) -> Result<Objects> {
        Objects::load(&self.daemon).await
    }

    /// Has the metadata say what the disk's image is by now, forgets snapshots whose files it does not stand on any more, and closes
    /// those of the images `before` that nobody uses any more.
    ///
    /// `expected` is what it has to be after a job that has succeeded: the guest may have ended meanwhile, and its export with it. An
    /// image that it did not have before has the disk's secret if it is `encrypted`.
    pub async fn settle(
        &self,
        target: &str,
        before: &[Image],
        expected: Option<&[Image]>,
        encrypted: bool,
    ) -> Result<()> {
        let (_, served) = self.disk(target)?;
        let objects = self.look().await;
        let found = match &objects {
            Ok(objects) => chain(objects, &served.id),
            Err(e) => Err(Error::failed(e.to_string())),
        };
        let chain = match (found, expected) {
            (Err(_), Some(expected)) => expected.to_vec(),
            (found, _) => found?,
        };
        let Some((_, file, _)) = chain.first() else {
            return Ok(());
        };
        let files = chain
            .iter()
            .map(|(_, file, format)| (file.clone(), format.clone()));
        let files: Vec<(String, String)> = files.collect();
        let changed = self.guest.change(|metadata| {
            let was = before.first().map(|(_, file, _)| file.as_str());
            // The other definition may be about another image.
            let disk = metadata.disk_mut(target);
            let same = |d: &&mut Disk| Some(d.file()) == was || d.file() == file;
            if let Some(disk) = disk.filter(same) {
                let secret = disk.secrets().next().map(str::to_owned);
                let secret = secret.as_deref().filter(|_| encrypted);
                disk.set_chain(&files, secret).map_err(wrong)?;
            }
            if metadata.disk(target).is_some_and(|d| d.file() == file) {
                forget_gone(metadata, target, &chain);
            }
            Ok(())
        });
        for (node, ..) in before {
            let is_left = chain.iter().all(|(n, ..)| n != node) && !node.starts_with('#');
            let is_there = objects.as_ref().is_ok_and(|o| o.find("node", node).is_ok());
            if is_left
                && is_there
                && let Ok(node) = self.daemon.node(node).await
            {
                // In use by somebody else: it stays.
                let _ = node.remove(Options::new()).await;
            }
        }
        changed
    }
}

/// Refuses to write what is encrypted to where it would stand in the clear.
pub fn stays_encrypted(disk: &Disk, from: &[Image], into: &Image) -> Result<()> {
    // Of what the metadata do not know it may be so.
    let may_be = |(_, file, _): &&Image| match disk.has(file) {
        true => disk.secret_of(file).is_some(),
        false => disk.secrets().next().is_some(),
    };
    match (from.iter().find(may_be), disk.secret_of(&into.1)) {
        (Some((_, from, _)), None) => Err(Error::named(
            "NotSupported",
            format!(
                "disk '{}': '{from}' is encrypted, and '{}' would hold its data in the clear: vdiskctl domain blockcopy makes a copy that is encrypted",
                disk.target, into.1
            ),
        )),
        _ => Ok(()),
    }
}

pub fn none_served(domain: &str) -> Error {
    Error::failed(format!(
        "domain '{domain}' has no disks that vdiskd serves: vdiskctl domain adopt {domain}, or attach one"
    ))
}

pub fn no_disk(domain: &Domain, target: &str) -> Error {
    let there: Vec<&str> = domain
        .metadata
        .disks
        .iter()
        .map(|d| d.target.as_str())
        .collect();
    Error::not_found(format!(
        "domain '{}' has no disk '{target}' that vdiskd serves: there are {}",
        domain.name,
        match there.is_empty() {
            true => "none".to_owned(),
            false => there.join(", "),
        }
    ))
}

fn forget_gone(metadata: &mut Metadata, target: &str, chain: &[Image]) {
    metadata.retain_snapshots(|_, d| {
        if d.target != target {
            return true;
        }
        let place = chain.iter().position(|(_, file, _)| *file == d.file);
        match place {
            Some(n) if n > 0 => {
                // It may be another one's overlay by now.
                d.overlay.clone_from(&chain[n - 1].1);
                true
            }
            _ => false,
        }
    });
}

/// The child of a node in a role.
pub fn child(objects: &Objects, node: &str, role: &str) -> Option<String> {
    let properties = objects.find("node", node).ok()?;
    let children = properties.get("Children")?.as_array()?;
    children.iter().filter_map(Json::as_array).find_map(|pair| {
        let path = pair.get(1)?.as_str()?;
        (pair.first()?.as_str()? == role).then(|| name_of(path))
    })
}

/// The node of an export's image: what is below its filters.
pub fn image_node(objects: &Objects, export: &str) -> Result<String> {
    let export = objects.find("export", export)?;
    let mut node = names(export, "Node").concat();
    loop {
        let driver = text(objects.find("node", &node)?, "Driver");
        let is_filter = matches!(
            driver.as_str(),
            "throttle" | "copy-on-read" | "copy-before-write" | "blkdebug"
        );
        match child(objects, &node, "file").filter(|_| is_filter) {
            Some(below) => node = below,
            None => return Ok(node),
        }
    }
}

/// The images that an export stands on, the top one first: node, file and format.
pub fn chain(objects: &Objects, export: &str) -> Result<Vec<Image>> {
    let mut chain = Vec::new();
    let mut next = Some(image_node(objects, export)?);
    while let Some(node) = next {
        let p = objects.find("node", &node)?;
        let format = match text(p, "Driver").as_str() {
            driver @ ("qcow2" | "luks") => driver.to_owned(),
            _ => "raw".to_owned(),
        };
        next = child(objects, &node, "backing");
        chain.push((node, text(p, "Filename"), format));
    }
    Ok(chain)
}

#[cfg(test)]
mod tests {
    use super::*;
    use vdisk_domain::{Snapshot, SnapshotDisk};

    #[test]
    fn snapshots_follow_their_chain() {
        let disk = |file: &str, overlay: &str| SnapshotDisk {
            target: "vda".into(),
            file: file.into(),
            format: "qcow2".into(),
            overlay: overlay.into(),
            written: false,
        };
        let snapshot = |name: &str, d| Snapshot {
            name: name.into(),
            disks: vec![d],
            ..Snapshot::default()
        };
        let mut metadata = Metadata {
            snapshots: vec![
                snapshot("a", disk("/0", "/1")),
                snapshot("b", disk("/1", "/2")),
                snapshot("c", disk("/2", "/3")),
            ],
            ..Metadata::default()
        };
        // Somebody has put /1 into /0, and not as a snapshot that is deleted.
        let chain: Vec<_> = ["/3", "/2", "/0"]
            .map(|f| (String::new(), f.to_owned(), "qcow2".to_owned()))
            .into();
        forget_gone(&mut metadata, "vda", &chain);
        let left: Vec<_> = metadata.snapshots.iter().map(|s| s.name.as_str()).collect();
        assert_eq!(left, ["a", "c"]);
        assert_eq!(metadata.snapshots[0].disks[0].overlay, "/2");
        forget_gone(&mut metadata, "vdb", &[]);
        assert_eq!(metadata.snapshots.len(), 2);
    }
}
