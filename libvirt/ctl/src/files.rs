//! Image files, and whose they are: the daemon runs as a user of its own, which has to be let in.

use std::fs::OpenOptions;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, chown};
use std::path::{Path, PathBuf};

use vdisk_dbus::ManagerProxy;
use vdiskctl::error::{Error, Result};
use vdiskctl::objects::properties;
use vdiskctl::options::Options;
use vdiskctl::output::text;
use zbus::Variant;

/// Files with their formats, each standing on the next.
pub type Chain = Vec<(String, String)>;

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
    // Whose a device is is forgotten when the machine starts: the hook sees to that.
    if !there.is_file() || (only_read && there.mode() & 0o004 != 0) {
        return Ok(None);
    }
    chown(path, Some(user), None)
        .map_err(|e| failed("cannot be given to vdiskd's user", path, &e))?;
    Ok(Some((there.uid(), there.gid())))
}

/// Gives an image back, if it is the daemon's user's.
pub fn give_back(path: &Path, owner: (u32, u32)) -> Result<()> {
    let there = path
        .metadata()
        .map_err(|e| failed("cannot be looked at", path, &e))?;
    if Some(there.uid()) == user() {
        chown(path, Some(owner.0), Some(owner.1))
            .map_err(|e| failed("cannot be given back", path, &e))?;
    }
    Ok(())
}

/// Makes a file that is not there, for the daemon to make an image in.
pub fn make(path: &Path) -> Result<()> {
    let made = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o660)
        .open(path);
    made.map_err(|e| failed("cannot be made", path, &e))?;
    if let Some(user) = user() {
        chown(path, Some(user), None)
            .map_err(|e| failed("cannot be given to vdiskd's user", path, &e))?;
    }
    Ok(())
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
            0 => Ok(vec![(file.to_owned(), format.to_owned())]),
            // The daemon can look into one more of them.
            _ => chain_of(manager, file, format, known + 1).await,
        }?;
        if all.len() == known {
            return Ok(all);
        }
        for (file, _) in &all[known..] {
            let path = Path::new(file);
            if let Some(owner) = give(path, known > 0)? {
                given.push((path.to_owned(), owner));
            }
        }
        known = all.len();
    }
}

/// The files that an image stands on, itself first, with their formats.
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
    let mut chain = vec![(file.to_owned(), format.to_owned())];
    while let Some((file, format)) = chain.last().cloned() {
        if format != "qcow2" || chain.len() >= most {
            break;
        }
        let options = Options::from([
            ("filename", Variant::from(file.clone())),
            ("force-share", Variant::from(true)),
        ]);
        let info = properties(manager.get_image_info(options).await?);
        let backing = text(&info, "backing-file");
        if backing.is_empty() {
            break;
        }
        let below = match Path::new(&file).parent() {
            Some(folder) => folder.join(&backing),
            None => PathBuf::from(&backing),
        };
        let below = below.to_string_lossy().into_owned();
        if chain.iter().any(|(f, _)| *f == below) || chain.len() > 200 {
            return Err(Error::failed(format!(
                "'{file}': its chain of backing files leads back to '{below}'"
            )));
        }
        let format = text(&info, "backing-fmt");
        let format = match format.is_empty() {
            true => "raw".to_owned(),
            false => format,
        };
        chain.push((below, format));
    }
    Ok(chain)
}
