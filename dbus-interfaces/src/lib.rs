//! The D-Bus interfaces of vdiskd: their documented XML, proxies for clients, and what names look like
//! in object paths. The XML files are the reference; a test holds the proxies, and a test of the daemon
//! holds what it introspects to, against them.

mod daemon;
mod path;
mod proxies;

pub use daemon::{Bus, Daemon};
pub use path::{
    bitmap_path, domain_path, escape, export_path, iothread_path, job_path, node_path, unescape,
};
pub use proxies::{
    BitmapProxy, ExportProxy, IoThreadProxy, JobProxy, ManagerProxy, NbdProxy, NodeProxy,
    VhostUserBlkProxy,
};

/// The bus name.
pub const BUS_NAME: &str = "org.vdisk1";

/// The bus name of an instance: a daemon of its own beside the usual one.
///
/// # Errors
/// If the name is more than letters, digits, `_` and `-`, or has a digit in front, which no bus name may have.
pub fn bus_name(instance: Option<&str>) -> Result<String, String> {
    let Some(name) = instance else {
        return Ok(BUS_NAME.to_owned());
    };
    let first = |c: char| c.is_ascii_alphabetic() || c == '_';
    let rest = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    match name.starts_with(first) && name.chars().all(rest) && name.len() <= 200 {
        true => Ok(format!("{BUS_NAME}.instance.{name}")),
        false => Err(format!(
            "instance '{name}': give at most 200 letters, digits, '_' and '-', the first of them no digit and no '-'"
        )),
    }
}

/// The object of the daemon itself.
pub const ROOT_PATH: &str = "/org/vdisk1";

/// What every error name starts with.
pub const ERROR_PREFIX: &str = "org.vdisk1.Error.";

/// The XML of each interface of the watcher of libvirt's domains (bus name `org.vdisk1.Domains`).
pub const LIBVIRT_INTERFACES: [(&str, &str); 2] = [
    (
        "org.vdisk1.Domains",
        include_str!("../org.vdisk1.Domains.xml"),
    ),
    (
        "org.vdisk1.Domain",
        include_str!("../org.vdisk1.Domain.xml"),
    ),
];

/// The XML of each interface of the daemon.
pub const INTERFACES: [(&str, &str); 8] = [
    (
        "org.vdisk1.Manager",
        include_str!("../org.vdisk1.Manager.xml"),
    ),
    ("org.vdisk1.Node", include_str!("../org.vdisk1.Node.xml")),
    (
        "org.vdisk1.Export",
        include_str!("../org.vdisk1.Export.xml"),
    ),
    (
        "org.vdisk1.Export.Nbd",
        include_str!("../org.vdisk1.Export.Nbd.xml"),
    ),
    (
        "org.vdisk1.Export.VhostUserBlk",
        include_str!("../org.vdisk1.Export.VhostUserBlk.xml"),
    ),
    (
        "org.vdisk1.IoThread",
        include_str!("../org.vdisk1.IoThread.xml"),
    ),
    (
        "org.vdisk1.Bitmap",
        include_str!("../org.vdisk1.Bitmap.xml"),
    ),
    ("org.vdisk1.Job", include_str!("../org.vdisk1.Job.xml")),
];
