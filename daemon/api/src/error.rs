//! The errors that a user can see.

use std::fmt;

pub type Result<T> = std::result::Result<T, Error>;

/// The name of an error: `org.vdisk1.Error.NAME` on D-Bus.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// A named object or file does not exist.
    NotFound,
    /// An object of that name exists already.
    Exists,
    /// The object is used by something that does not allow this.
    InUse,
    /// An option or argument is unknown, of the wrong type or out of range.
    InvalidArgument,
    /// This is not implemented, or the storage cannot do it.
    NotSupported,
    /// The caller, or the daemon, may not do this.
    NotAuthorized,
    /// Another operation on the object is running.
    Busy,
    /// The storage reported an error.
    Io,
    /// An image is damaged.
    Corrupt,
    /// The storage is full.
    NoSpace,
    /// Anything else.
    Failed,
}

impl ErrorKind {
    pub const ALL: [ErrorKind; 11] = [
        ErrorKind::NotFound,
        ErrorKind::Exists,
        ErrorKind::InUse,
        ErrorKind::InvalidArgument,
        ErrorKind::NotSupported,
        ErrorKind::NotAuthorized,
        ErrorKind::Busy,
        ErrorKind::Io,
        ErrorKind::Corrupt,
        ErrorKind::NoSpace,
        ErrorKind::Failed,
    ];

    pub fn name(self) -> &'static str {
        match self {
            ErrorKind::NotFound => "NotFound",
            ErrorKind::Exists => "Exists",
            ErrorKind::InUse => "InUse",
            ErrorKind::InvalidArgument => "InvalidArgument",
            ErrorKind::NotSupported => "NotSupported",
            ErrorKind::NotAuthorized => "NotAuthorized",
            ErrorKind::Busy => "Busy",
            ErrorKind::Io => "Io",
            ErrorKind::Corrupt => "Corrupt",
            ErrorKind::NoSpace => "NoSpace",
            ErrorKind::Failed => "Failed",
        }
    }
}

/// An error with a message that says what happened, to what, and what to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    pub kind: ErrorKind,
    pub message: String,
}

impl Error {
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Error {
        Error {
            kind,
            message: message.into(),
        }
    }

    pub fn not_found(message: impl Into<String>) -> Error {
        Error::new(ErrorKind::NotFound, message)
    }

    pub fn invalid(message: impl Into<String>) -> Error {
        Error::new(ErrorKind::InvalidArgument, message)
    }

    pub fn in_use(message: impl Into<String>) -> Error {
        Error::new(ErrorKind::InUse, message)
    }

    pub fn exists(message: impl Into<String>) -> Error {
        Error::new(ErrorKind::Exists, message)
    }

    pub fn not_supported(message: impl Into<String>) -> Error {
        Error::new(ErrorKind::NotSupported, message)
    }

    pub fn failed(message: impl Into<String>) -> Error {
        Error::new(ErrorKind::Failed, message)
    }

    /// An operating system error, with `what` was being done to what.
    pub fn io(what: impl fmt::Display, error: &std::io::Error) -> Error {
        use std::io::ErrorKind as Io;
        let (kind, remedy) = match error.kind() {
            Io::NotFound => (
                ErrorKind::NotFound,
                "; check the path, as the daemon sees it",
            ),
            Io::PermissionDenied => (
                ErrorKind::NotAuthorized,
                "; give the daemon's user access, or set read-only if that is meant",
            ),
            Io::ReadOnlyFilesystem => (
                ErrorKind::NotAuthorized,
                "; set read-only or auto-read-only",
            ),
            Io::StorageFull | Io::QuotaExceeded | Io::FileTooLarge => {
                (ErrorKind::NoSpace, "; make room or use a smaller size")
            }
            Io::AlreadyExists => (ErrorKind::Exists, ""),
            Io::AddrInUse => (ErrorKind::InUse, ""),
            Io::Unsupported => (ErrorKind::NotSupported, ""),
            _ => (ErrorKind::Io, ""),
        };
        Error::new(kind, format!("{what}: {error}{remedy}"))
    }

    /// The error with its message set in a wider context.
    pub fn context(self, what: impl fmt::Display) -> Error {
        Error::new(self.kind, format!("{what}: {}", self.message))
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {}
