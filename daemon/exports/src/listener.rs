//! The socket file that front-ends and clients connect to.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen, socket_with,
};
use tokio::net::UnixListener;
use vdisk_api::{Error, Result, SocketAddress};

use crate::keeper::{Keeper, listener_name};

/// Front-ends that may wait for the one before them to leave.
const BACKLOG: i32 = 16;

/// A listening socket. Its file, if it made one, goes away with it.
pub struct Listener {
    pub socket: UnixListener,
    file: Option<SocketFile>,
}

struct SocketFile {
    path: PathBuf,
    device: u64,
    inode: u64,
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        // Only if it is still ours: another daemon may have taken the path over.
        if let Ok(meta) = std::fs::symlink_metadata(&self.path)
            && (meta.dev(), meta.ino()) == (self.device, self.inode)
        {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

impl Listener {
    pub fn path(&self) -> Option<&Path> {
        self.file.as_ref().map(|f| f.path.as_path())
    }

    /// Leaves the socket file to another process that has the socket.
    pub fn leave_file(&mut self) {
        if let Some(file) = &mut self.file {
            file.device = u64::MAX;
        }
    }

    /// Goes on with a socket that an earlier process listened on at this address. None if its file is gone, so that nobody can
    /// reach it.
    pub fn take_over(
        export: &str,
        address: &SocketAddress,
        fd: OwnedFd,
    ) -> Result<Option<Listener>> {
        let bound = rustix::net::getsockname(&fd).ok();
        let bound: Option<SocketAddrUnix> = bound.and_then(|a| a.try_into().ok());
        let mut listener = Listener::open(export, &SocketAddress::Fd(Arc::new(fd)), None, None)?;
        let SocketAddress::Unix(path) = address else {
            return Ok(Some(listener));
        };
        let is_at_path = bound.is_some_and(|b| {
            b.path_bytes() == Some(std::os::unix::ffi::OsStrExt::as_bytes(path.as_os_str()))
        });
        let meta = std::fs::symlink_metadata(path).ok();
        let Some(meta) = meta.filter(|m| m.file_type().is_socket() && is_at_path) else {
            return Ok(None);
        };
        listener.file = Some(SocketFile {
            path: path.clone(),
            device: meta.dev(),
            inode: meta.ino(),
        });
        Ok(Some(listener))
    }

    /// Goes on with what an earlier process has left, or opens the address and has the socket kept for the next.
    pub fn take_or_open(
        export: &str,
        address: &SocketAddress,
        mode: Option<u32>,
        group: Option<&str>,
        left: Option<OwnedFd>,
        keeper: Option<&dyn Keeper>,
    ) -> Result<Listener> {
        let taken = left.map(|fd| Listener::take_over(export, address, fd));
        if let Some(listener) = taken.transpose()?.flatten() {
            return Ok(listener);
        }
        if let Some(keeper) = keeper {
            keeper.forget(&listener_name(export));
        }
        let listener = Listener::open(export, address, mode, group)?;
        // The next process gets one that has a name as this one did.
        let is_passed_again = matches!(address, SocketAddress::Named(..));
        if let Some(keeper) = keeper
            && !is_passed_again
            && let Err(error) = keeper.keep(&listener_name(export), listener.socket.as_fd())
        {
            tracing::warn!(export, %error, "the socket cannot be kept for a restart");
        }
        Ok(listener)
    }

    /// Opens the address of an export. Must be called within a tokio runtime.
    pub fn open(
        export: &str,
        address: &SocketAddress,
        mode: Option<u32>,
        group: Option<&str>,
    ) -> Result<Listener> {
        match address {
            SocketAddress::Named(name, None) => Err(Error::not_found(format!(
                "export '{export}': no socket named '{name}' was passed to the daemon: see FileDescriptorName= of its socket units"
            ))),
            SocketAddress::Fd(fd) | SocketAddress::Named(_, Some(fd)) => {
                let error =
                    |e: io::Error| Error::io(format_args!("export '{export}': passed socket"), &e);
                check_listening(export, fd)?;
                let fd = fd.try_clone().map_err(error)?;
                Ok(Listener {
                    socket: to_tokio(fd).map_err(error)?,
                    file: None,
                })
            }
            SocketAddress::Unix(path) => {
                let what = format!("export '{export}': socket '{}'", path.display());
                make_room(&what, path)?;
                let (fd, file) = create(path, mode, group)
                    .map_err(|e| Error::io(format_args!("{what} cannot be made"), &e))?;
                Ok(Listener {
                    socket: to_tokio(fd).map_err(|e| Error::io(&what, &e))?,
                    file: Some(file),
                })
            }
        }
    }
}

fn to_tokio(fd: OwnedFd) -> io::Result<UnixListener> {
    let listener = std::os::unix::net::UnixListener::from(fd);
    listener.set_nonblocking(true)?;
    UnixListener::from_std(listener)
}

fn check_listening(export: &str, fd: &Arc<OwnedFd>) -> Result<()> {
    let is_unix = rustix::net::sockopt::socket_domain(fd) == Ok(AddressFamily::UNIX);
    let listens = rustix::net::sockopt::socket_acceptconn(fd) == Ok(true);
    if is_unix && listens {
        return Ok(());
    }
    Err(Error::invalid(format!(
        "export '{export}': the passed file descriptor is not a listening unix socket: pass one that is"
    )))
}

/// Removes the socket file of a daemon that is gone; refuses to touch anything else.
fn make_room(what: &str, path: &Path) -> Result<()> {
    let meta = match std::fs::symlink_metadata(path) {
        Ok(meta) => meta,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(Error::io(what, &e)),
    };
    if !meta.file_type().is_socket() {
        return Err(Error::exists(format!(
            "{what}: there is a file that is not a socket: remove it or choose another path"
        )));
    }
    let try_connect = || -> io::Result<()> {
        let fd = socket_with(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
            None,
        )?;
        Ok(connect(&fd, &SocketAddrUnix::new(path)?)?)
    };
    match try_connect() {
        Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => {
            tracing::info!(socket = %path.display(), "replacing a socket that nobody listens on");
            std::fs::remove_file(path).map_err(|e| Error::io(what, &e))
        }
        // Somebody listens (or its backlog is full), or we may not even ask.
        Ok(()) => Err(Error::in_use(format!(
            "{what} is in use by another process: stop that one or choose another path"
        ))),
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => Err(Error::in_use(format!(
            "{what} is in use by another process: stop that one or choose another path"
        ))),
        Err(e) => Err(Error::io(what, &e)),
    }
}

fn create(
    path: &Path,
    mode: Option<u32>,
    group: Option<&str>,
) -> io::Result<(OwnedFd, SocketFile)> {
    let group = group.map(find_group).transpose()?;
    let fd = socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )?;
    if let Some(mode) = mode {
        // The file is born with no more than these permissions.
        rustix::fs::fchmod(fd.as_fd(), rustix::fs::Mode::from_raw_mode(mode & 0o700))?;
    }
    bind(&fd, &SocketAddrUnix::new(path)?)?;
    let meta = std::fs::symlink_metadata(path)?;
    let file = SocketFile {
        path: path.to_owned(),
        device: meta.dev(),
        inode: meta.ino(),
    };
    if let Some(gid) = group {
        std::os::unix::fs::chown(path, None, Some(gid))?;
    }
    if let Some(mode) = mode {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))?;
    }
    listen(&fd, BACKLOG)?;
    Ok((fd, file))
}

/// A group's number, by number or by name in /etc/group.
fn find_group(name: &str) -> io::Result<u32> {
    if let Ok(gid) = name.parse() {
        return Ok(gid);
    }
    nix::unistd::Group::from_name(name)
        .map_err(io::Error::from)?
        .map(|g| g.gid.as_raw())
        .ok_or_else(|| {
            io::Error::new(
                io::ErrorKind::NotFound,
                format!("there is no group '{name}'"),
            )
        })
}

#[cfg(test)]
mod tests {
    use super::*;
    use vdisk_api::ErrorKind;

    fn open(path: &Path, mode: Option<u32>) -> Result<Listener> {
        Listener::open("e", &SocketAddress::Unix(path.to_owned()), mode, None)
    }

    #[tokio::test]
    async fn socket_files_come_and_go() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = open(&path, Some(0o620)).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, 0o620);
        // A live one is refused.
        let e = open(&path, None).err().unwrap();
        assert_eq!(e.kind, ErrorKind::InUse);
        assert!(
            e.message.contains("'e'") && e.message.contains("another process"),
            "{e}"
        );
        drop(listener);
        assert!(!path.exists());
        // A stale one is replaced.
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        drop(open(&path, None).unwrap());
        // Something else is left alone.
        std::fs::write(&path, "x").unwrap();
        assert_eq!(open(&path, None).err().unwrap().kind, ErrorKind::Exists);
        assert!(path.exists());
        let e = open(&dir.path().join("no/such"), None).err().unwrap();
        assert_eq!(e.kind, ErrorKind::NotFound);
    }

    #[tokio::test]
    async fn passed_descriptors_must_listen() {
        let dir = tempfile::tempdir().unwrap();
        let file = std::fs::File::create(dir.path().join("f")).unwrap();
        let address = SocketAddress::Fd(Arc::new(file.into()));
        assert!(Listener::open("e", &address, None, None).is_err());
        let l = std::os::unix::net::UnixListener::bind(dir.path().join("s")).unwrap();
        let address = SocketAddress::Fd(Arc::new(l.into()));
        assert!(
            Listener::open("e", &address, None, None)
                .unwrap()
                .path()
                .is_none()
        );
    }
}
