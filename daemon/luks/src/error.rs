//! What can be wrong with an encrypted disk.

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("it has no LUKS header: it does not begin with the magic number 'LUKS\\xba\\xbe'")]
    Magic,
    #[error("its LUKS header says version {0}: only version 1 is supported")]
    Version(u16),
    #[error("it ends within its LUKS header")]
    Short,
    #[error("{what} of its LUKS header is '{value}': {allowed}")]
    Field {
        what: &'static str,
        value: String,
        allowed: &'static str,
    },
    #[error("the secret does not open any of its key slots")]
    WrongKey,
    #[error("its key material cannot be read: {0}")]
    Read(#[from] std::io::Error),
    #[error("the system gives no random numbers: {0}")]
    Random(getrandom::Error),
}

pub type Result<T> = std::result::Result<T, Error>;
