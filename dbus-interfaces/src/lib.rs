//! The D-Bus interfaces of vdiskd: their documented XML, proxies for clients, and what names look like
//! in object paths. The XML files are the reference; a test holds the proxies, and a test of the daemon
//! holds what it introspects to, against them.

mod path;
mod proxies;

pub use path::{bitmap_path, escape, export_path, iothread_path, job_path, node_path, unescape};
pub use proxies::{
    BitmapProxy, ExportProxy, IoThreadProxy, JobProxy, ManagerProxy, NodeProxy, VhostUserBlkProxy,
};

/// The bus name.
pub const BUS_NAME: &str = "org.vdisk1";

/// The object of the daemon itself.
pub const ROOT_PATH: &str = "/org/vdisk1";

/// What every error name starts with.
pub const ERROR_PREFIX: &str = "org.vdisk1.Error.";

/// The XML of each interface.
pub const INTERFACES: [(&str, &str); 7] = [
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
