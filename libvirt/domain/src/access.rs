//! Who may have a domain's disks: vdiskctl and libvirt's hook, one after the other, and the daemon's user.

use std::fs::{File, TryLockError};
use std::io::Read;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, chown};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::{Domain, Error, Result};

/// What stands here is a moment's business between programs of root's, who alone makes files there (vdiskd.tmpfiles).
const FOLDER: &str = "/run/vdisk-domains";

/// Makes the folder if it is not there, as in a system that has not been booted since vdiskd was installed.
///
/// # Errors
/// If it cannot be made.
pub fn make_folder() -> std::io::Result<()> {
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(FOLDER)
}

/// The file that whoever changes a domain has locked.
pub fn lock_path(uuid: &str) -> PathBuf {
    Path::new(FOLDER).join(format!("{uuid}.lock"))
}

/// What the file has while the domain must not start: its disks are worked on.
pub const OFFLINE: &str = "offline\n";

/// Whether the disks of a domain that is shut off are worked on at the moment.
pub fn being_changed(uuid: &str) -> bool {
    let path = lock_path(uuid);
    let mut file = match File::open(&path) {
        Ok(file) => file,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return false,
        // It may be so, and what is being written would be lost.
        Err(e) => {
            eprintln!("vdiskd: '{}': {e}", path.display());
            return true;
        }
    };
    // Whoever has died has it locked no more.
    let locked = matches!(file.try_lock_shared(), Err(TryLockError::WouldBlock));
    let mut content = String::new();
    locked && file.read_to_string(&mut content).is_ok() && content == OFFLINE
}

/// What the migrate hook leaves for the prepare hook, which libvirt runs right after it.
fn arrival_path(uuid: &str) -> PathBuf {
    Path::new(FOLDER).join(format!("{uuid}.arriving"))
}

/// How long that is believed.
const ARRIVAL: Duration = Duration::from_secs(120);

/// Notes that the guest of a domain is about to come from another host.
///
/// # Errors
/// If that cannot be written.
pub fn announce(uuid: &str) -> Result<()> {
    let path = arrival_path(uuid);
    make_folder()
        .and_then(|()| std::fs::write(&path, ""))
        .map_err(|e| Error(format!("'{}': {e}", path.display())))
}

/// Whether that was noted, which is forgotten then.
pub fn take_announcement(uuid: &str) -> bool {
    let path = arrival_path(uuid);
    let written = std::fs::metadata(&path).and_then(|m| m.modified());
    let _ = std::fs::remove_file(&path);
    written.is_ok_and(|at| at.elapsed().is_ok_and(|age| age < ARRIVAL))
}

/// Lets the daemon's user in to block devices: whose they are is forgotten whenever they come up.
///
/// # Errors
/// If one of them cannot be given to it.
pub fn let_in(domain: &Domain) -> Result<()> {
    let Ok(Some(user)) = nix::unistd::User::from_name("vdiskd") else {
        return Ok(());
    };
    for (disk, _) in domain.served() {
        let files = disk.backing.iter().map(|b| b.file.as_str());
        for file in files.chain([disk.file()]) {
            let Ok(there) = std::fs::metadata(file) else {
                continue;
            };
            if there.file_type().is_block_device() && there.uid() != user.uid.as_raw() {
                chown(file, Some(user.uid.as_raw()), None).map_err(|e| {
                    Error(format!("'{file}' cannot be given to vdiskd's user: {e}"))
                })?;
            }
        }
    }
    Ok(())
}

/// Gives the sockets of a domain's disks to its guest, if guests are confined by SELinux: QEMU is let in by those that have the
/// label of its own images, and by no other. libvirt, which labels everything else of a guest, leaves these out.
///
/// # Errors
/// If one of them cannot be labelled.
pub fn label(domain: &Domain) -> Result<()> {
    domain
        .served()
        .try_for_each(|(_, socket)| label_socket(domain, socket))
}

pub(crate) fn label_socket(domain: &Domain, socket: &Path) -> Result<()> {
    let Some(label) = &domain.image_label else {
        return Ok(());
    };
    // As the kernel keeps it: with a zero at the end.
    let value = [label.as_bytes(), b"\0"].concat();
    let done = rustix::fs::lsetxattr(
        socket,
        c"security.selinux",
        &value,
        rustix::fs::XattrFlags::empty(),
    );
    done.map_err(|e| {
        use rustix::io::Errno;
        let remedy = match e {
            Errno::ACCESS | Errno::INVAL => {
                "; is the policy module vdiskd loaded (semodule -l), and are its files labelled (docs/libvirt.md)?"
            }
            Errno::NOENT => "; has vdiskd ended meanwhile (journalctl -u vdiskd)?",
            _ => "",
        };
        Error(format!(
            "'{}' cannot be labelled {label} for domain '{}': {e}{remedy}",
            socket.display(),
            domain.name
        ))
    })
}
