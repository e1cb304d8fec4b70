//! Images in files that are not part of the graph: made, looked at, checked.

use std::sync::Arc;

use vdisk_api::{DriverOptions, Error, FileOptions, ImageFile, Locking, NodeOptions, Result};
use vdisk_qcow2::{Image, Options, Storage};

use crate::drivers::qcow2::{NodeStorage, open_image};
use crate::node::Node;
use crate::runtime::Runtime;

/// An open file or block device outside the graph.
pub struct Standalone {
    node: Arc<Node>,
}

impl Standalone {
    /// Opens a file or block device, and locks it as a node would; may block.
    pub fn open(
        filename: &str,
        write: bool,
        force_share: bool,
        runtime: &Runtime,
    ) -> Result<Standalone> {
        let file = FileOptions {
            filename: filename.to_owned(),
            locking: Locking::Auto,
            whole_blocks: false,
        };
        use std::os::unix::fs::FileTypeExt;
        let is_device = std::fs::metadata(filename).is_ok_and(|m| m.file_type().is_block_device());
        let options = NodeOptions {
            active: true,
            node_name: None,
            read_only: !write,
            auto_read_only: false,
            force_share,
            discard: vdisk_api::Discard::Unmap,
            detect_zeroes: Default::default(),
            cache: Default::default(),
            driver: if is_device {
                DriverOptions::HostDevice(file)
            } else {
                DriverOptions::File(file)
            },
            given: Default::default(),
        };
        Ok(Standalone {
            node: Node::open(&format!("image '{filename}'"), &options, &[], runtime)?,
        })
    }

    /// Opens the file of an image; may block.
    pub fn open_image(
        file: &ImageFile,
        write: bool,
        runtime: &Runtime,
    ) -> Result<(Standalone, Image)> {
        let opened = Standalone::open(&file.filename, write, file.force_share, runtime)?;
        let what = format!("image '{}'", file.filename);
        let (image, _) = open_image(&what, &opened.node, None, None, None, Options::default())?;
        Ok((opened, image))
    }

    pub fn node(&self) -> &Arc<Node> {
        &self.node
    }

    pub fn storage(&self) -> Arc<dyn Storage> {
        Arc::new(NodeStorage(self.node.clone()))
    }

    pub async fn close(self) {
        self.node.close().await;
    }
}

/// What happened to an image, as an error that names it.
pub fn image_failed(what: &str, e: &std::io::Error) -> Error {
    use vdisk_api::ErrorKind as Kind;
    let kind = match e.kind() {
        std::io::ErrorKind::InvalidData => Kind::Corrupt,
        std::io::ErrorKind::InvalidInput => Kind::InvalidArgument,
        std::io::ErrorKind::AlreadyExists => Kind::Exists,
        std::io::ErrorKind::NotFound => Kind::NotFound,
        std::io::ErrorKind::Unsupported => Kind::NotSupported,
        _ => return Error::io(format_args!("{what}"), e),
    };
    Error::new(kind, format!("{what}: {e}"))
}
