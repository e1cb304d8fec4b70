//! Image files, and whose they are: the daemon runs as a user of its own, which has to be let in.

use std::fs::{Metadata, OpenOptions};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt, fchown};
use std::path::{Path, PathBuf};

use serde_json::Value as Json;
use vdisk_dbus::ManagerProxy;
use vdisk_domain::{Backing, Disk};
use vdiskctl::daemon::Daemon;
use vdiskctl::error::{Error, Result};
use vdiskctl::objects::{Objects, properties};
use vdiskctl::options::Options;
use vdiskctl::output::text;
use zbus::Variant;

use crate::wrong;

/// One image of a chain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    pub file: String,
    pub format: String,
    pub encrypted: bool,
}

impl Link {
    pub fn new(file: &str, format: &str) -> Link {
        Link {
            file: file.to_owned(),
            format: format.to_owned(),
            encrypted: format == "luks",
        }
    }

    /// As a disk has it; `secret` is its secret if it has one.
    pub fn with_secret(&self, secret: Option<&str>) -> Backing {
        Backing {
            file: self.file.clone(),
            format: self.format.clone(),
            secret: secret.filter(|_| self.encrypted).map(str::to_owned),
        }
    }
}

/// Images, each standing on the next.
pub type Chain = Vec<Link>;

/// Has a disk be a chain. The disk's secret is that of all its images that are encrypted.
///
/// # Errors
/// If there is no secret for one that is, or nothing for it to open.
pub fn adopt_chain(disk: &mut Disk, chain: &Chain) -> Result<()> {
    let secret = disk.get("secret").map(str::to_owned);
    let encrypted = chain.iter().find(|l| l.encrypted);
    match (&secret, encrypted) {
        (None, Some(link)) => {
            return Err(Error::invalid(format!(
                "disk '{}': '{}' is encrypted: give its secret to vdiskd (vdiskctl secret add NAME), and name it: secret=NAME",
                disk.target, link.file
            )));
        }
        (Some(secret), None) => {
            return Err(Error::invalid(format!(
                "disk '{}': '{}' is not encrypted: leave out secret={secret} for this disk",
                disk.target,
                disk.file()
            )));
        }
        _ => {}
    }
    let images = chain.iter().map(|l| l.with_secret(secret.as_deref()));
    disk.set_images(images.collect()).map_err(wrong)
}

/// The user that the daemon runs as.
const USER: &str = "vdiskd";

fn user() -> Option<u32> {
    let user = nix::unistd::User::from_name(USER).ok().flatten();
    user.map(|u| u.uid.as_raw())
}

fn failed(what: &str, path: &Path, e: &std::io::Error) -> Error {
    let message = format!("'{}' {what}: {e}", path.display());
    match e.kind() {
        std::io::ErrorKind::PermissionDenied => {
            Error::named("NotAuthorized", format!("{message}; run this as root"))
        }
        _ => Error::failed(message),
    }
}

/// Gives an image to the daemon's user; whose it was, if that has changed. `only_read`: it is enough that everybody may read it.
pub fn give(path: &Path, only_read: bool) -> Result<Option<(u32, u32)>> {
    let there = path
        .metadata()
        .map_err(|e| failed("cannot be looked at", path, &e))?;
    let Some(user) = user().filter(|u| *u != there.uid()) else {
        return Ok(None);
    };
    if there.file_type().is_block_device() {
        // Whose a device is is forgotten when the machine starts: the hook sees to that, and nothing is given back.
        change_owner(path, &there, Some(user), None)?;
        return Ok(None);
    }
    if !there.is_file() || (only_read && there.mode() & 0o004 != 0) {
        return Ok(None);
    }
    change_owner(path, &there, Some(user), None)?;
    Ok(Some((there.uid(), there.gid())))
}

/// Gives away exactly the file that was looked at: the folder may be somebody's who puts another in its place meanwhile.
fn change_owner(path: &Path, seen: &Metadata, user: Option<u32>, group: Option<u32>) -> Result<()> {
    let no = |e: std::io::Error| failed("cannot be given to another user", path, &e);
    let flags = rustix::fs::OFlags::NONBLOCK | rustix::fs::OFlags::NOCTTY;
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(flags.bits() as i32)
        .open(path)
        .map_err(no)?;
    let opened = file.metadata().map_err(no)?;
    if (opened.dev(), opened.ino()) != (seen.dev(), seen.ino()) {
        return Err(Error::failed(format!(
            "'{}' is not the file that it was a moment ago",
            path.display()
        )));
    }
    fchown(&file, user, group).map_err(no)
}

/// Gives an image back, if it is the daemon's user's.
pub fn give_back(path: &Path, owner: (u32, u32)) -> Result<()> {
    let there = path
        .metadata()
        .map_err(|e| failed("cannot be looked at", path, &e))?;
    match Some(there.uid()) == user() {
        true => change_owner(path, &there, Some(owner.0), Some(owner.1)),
        false => Ok(()),
    }
}

/// Makes a file that is not there, for the daemon to make an image in.
pub fn make(path: &Path) -> Result<()> {
    let made = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o660)
        .open(path);
    let file = made.map_err(|e| failed("cannot be made", path, &e))?;
    if let Some(user) = user() {
        fchown(&file, Some(user), None)
            .map_err(|e| failed("cannot be given to vdiskd's user", path, &e))?;
    }
    Ok(())
}

/// Whether the daemon has a file open.
///
/// # Errors
/// If it does not say: then it may be.
pub async fn is_open(daemon: &Daemon, file: &str) -> Result<bool> {
    let objects = Objects::load(daemon).await?;
    Ok(objects.of("node").any(|(_, p)| text(p, "Filename") == file))
}

/// Makes an image in a new file; nothing stays of what failed.
pub async fn make_image(
    manager: &ManagerProxy<'_>,
    path: &str,
    format: &str,
    more: Options<'_>,
) -> Result<()> {
    make(Path::new(path))?;
    let mut options = more;
    options.insert("filename", Variant::from(path.to_owned()));
    options.insert("driver", Variant::from(format.to_owned()));
    options.insert("overwrite", Variant::from(true));
    let made = manager.create_image(options).await;
    if made.is_err() {
        let _ = std::fs::remove_file(path);
    }
    Ok(made?)
}

/// Gives an image, and what it stands on, to the daemon's user; what was whose is added to `given`. The chain, itself first.
pub async fn give_chain(
    manager: &ManagerProxy<'_>,
    file: &str,
    format: &str,
    given: &mut Vec<(PathBuf, (u32, u32))>,
) -> Result<Chain> {
    let mut known = 0;
    loop {
        let all = match known {
            0 => Ok(vec![Link::new(file, format)]),
            // The daemon can look into one more of them.
            _ => chain_of(manager, file, format, known + 1).await,
        }?;
        if all.len() == known {
            return Ok(all);
        }
        for link in &all[known..] {
            let path = Path::new(&link.file);
            // What an image names is somebody's word: files beside it at most.
            if known > 0 && !is_beside(path, Path::new(&all[0].file)) {
                continue;
            }
            if let Some(owner) = give(path, known > 0)? {
                given.push((path.to_owned(), owner));
            }
        }
        known = all.len();
    }
}

/// Whether two files are in one folder, wherever links lead.
fn is_beside(one: &Path, other: &Path) -> bool {
    let folder = |p: &Path| p.canonicalize().ok()?.parent().map(Path::to_owned);
    let (one, other) = (folder(one), folder(other));
    one.is_some() && one == other
}

/// The images that an image stands on, itself first.
pub async fn chain(manager: &ManagerProxy<'_>, file: &str, format: &str) -> Result<Chain> {
    chain_of(manager, file, format, usize::MAX).await
}

/// At most `most` of them.
async fn chain_of(
    manager: &ManagerProxy<'_>,
    file: &str,
    format: &str,
    most: usize,
) -> Result<Chain> {
    let mut chain = vec![Link::new(file, format)];
    while let Some(Link { file, format, .. }) = chain.last().cloned() {
        if format != "qcow2" || chain.len() >= most {
            break;
        }
        let options = Options::from([
            ("filename", Variant::from(file.clone())),
            ("force-share", Variant::from(true)),
        ]);
        let info = properties(manager.get_image_info(options).await?);
        if let Some(this) = chain.last_mut() {
            this.encrypted = info.get("encrypted").and_then(Json::as_bool) == Some(true);
        }
        let backing = text(&info, "backing-file");
        if backing.is_empty() {
            break;
        }
        let below = match Path::new(&file).parent() {
            Some(folder) => folder.join(&backing),
            None => PathBuf::from(&backing),
        };
        let below = below.to_string_lossy().into_owned();
        if chain.iter().any(|l| l.file == below) || chain.len() > 200 {
            return Err(Error::failed(format!(
                "'{file}': its chain of backing files leads back to '{below}'"
            )));
        }
        let format = text(&info, "backing-fmt");
        if format.is_empty() {
            return Err(Error::failed(format!(
                "'{file}' names '{backing}' as its backing file without saying what format that has: qemu-img rebase -u -b '{backing}' -F FORMAT '{file}'"
            )));
        }
        chain.push(Link::new(&below, &format));
    }
    Ok(chain)
}
