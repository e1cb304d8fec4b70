//! libvirt's domains whose disks vdiskd serves.
//!
//! libvirt only knows the socket of such a disk (`<disk type='vhostuser'>`); what is behind it stands in the domain's
//! metadata, in an element of [`NAMESPACE`] (docs/libvirt-domain.rng). Nothing here talks to libvirt: the hook must not, and the
//! rest is the business of vdiskctl-domain(1).

mod access;
mod adopt;
mod disk;
mod metadata;
mod serve;
mod xml;

pub use access::{
    OFFLINE, announce, being_changed, label, let_in, lock_path, make_folder, take_announcement,
};
pub use adopt::{Adoption, adopt, attach_xml, release, replace_metadata, with_shared_memory};
pub use disk::{Backing, Disk, Original, SETTINGS, encryption};
pub use metadata::{Metadata, NAMESPACE, PREFIX, Snapshot, SnapshotDisk};
pub use serve::{
    Busy, Failure, Served, Start, all_served, build, build_disk, served, take_down, take_down_disk,
};
pub use xml::{DiskElement, Domain, Identity, disk_xml, moved_sockets};

/// What is wrong with a domain's XML or with what is to be done to it, in words that name the domain and the remedy.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Error(pub String);

pub type Result<T> = std::result::Result<T, Error>;

fn error<T>(message: impl Into<String>) -> Result<T> {
    Err(Error(message.into()))
}
