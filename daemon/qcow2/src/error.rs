//! What can be wrong with an image.

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error("it is not a qcow2 image: it does not begin with the magic number 'QFI\\xfb'")]
    Magic,
    #[error("its header says version {0}: versions 2 and 3 exist")]
    Version(u32),
    #[error("it ends within {0}")]
    Short(&'static str),
    #[error("{what} is {value}: {allowed}")]
    Field {
        what: &'static str,
        value: u64,
        allowed: &'static str,
    },
    #[error("it uses the incompatible feature '{0}', which is not supported")]
    Feature(String),
    #[error("it is encrypted with {0}, which is not supported")]
    Encrypted(&'static str),
    #[error("{what} at guest offset {at:#x} is corrupt: {value:#x}")]
    Corrupt {
        what: &'static str,
        /// Byte offset in the guest's disk.
        at: u64,
        value: u64,
    },
    #[error("the compressed cluster at guest offset {0:#x} cannot be decompressed")]
    Compressed(u64),
    #[error("entry {index} of the refcount table is corrupt: {value:#x}")]
    RefcountTable { index: u64, value: u64 },
    #[error("a cluster would have more references than fit into {bits} bits")]
    RefcountOverflow { bits: u32 },
    #[error("version 2 of the format has no {0}: use version 3 (compat 1.1)")]
    NeedsVersion3(&'static str),
    #[error("a raw external data file goes with an external data file, and without a backing file")]
    RawData,
    #[error("it was not closed, and {0} of its references cannot be repaired")]
    NotRepaired(u64),
    #[error("clusters beyond the end of the file have references: it is corrupt")]
    BeyondEnd,
    #[error(
        "the daemon was killed while it wrote to this image, and what it wrote stands on a backing file: open the image with it first"
    )]
    NeedsBacking,
    #[error("the image would be larger than the format allows")]
    TooLarge,
    #[error("there is no room left in what it is stored in")]
    Full,
    #[error("new data would be put over the image's own tables: it is corrupt")]
    Overlap,
}

pub type Result<T> = std::result::Result<T, Error>;

impl From<Error> for std::io::Error {
    fn from(e: Error) -> std::io::Error {
        let kind = match e {
            Error::TooLarge | Error::Full => std::io::ErrorKind::StorageFull,
            _ => std::io::ErrorKind::InvalidData,
        };
        std::io::Error::new(kind, e)
    }
}
