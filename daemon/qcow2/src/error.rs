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
}

pub type Result<T> = std::result::Result<T, Error>;
