//! The errors of the control plane under their D-Bus names.

use vdisk_api::{Error, ErrorKind};
use zbus::DBusError;

#[derive(Debug, DBusError)]
#[zbus(prefix = "org.vdisk1.Error")]
pub enum Failure {
    #[zbus(error)]
    ZBus(zbus::Error),
    NotFound(String),
    Exists(String),
    InUse(String),
    InvalidArgument(String),
    NotSupported(String),
    NotAuthorized(String),
    Busy(String),
    Io(String),
    Corrupt(String),
    NoSpace(String),
    Failed(String),
}

impl From<Error> for Failure {
    fn from(e: Error) -> Failure {
        let make = match e.kind {
            ErrorKind::NotFound => Failure::NotFound,
            ErrorKind::Exists => Failure::Exists,
            ErrorKind::InUse => Failure::InUse,
            ErrorKind::InvalidArgument => Failure::InvalidArgument,
            ErrorKind::NotSupported => Failure::NotSupported,
            ErrorKind::NotAuthorized => Failure::NotAuthorized,
            ErrorKind::Busy => Failure::Busy,
            ErrorKind::Io => Failure::Io,
            ErrorKind::Corrupt => Failure::Corrupt,
            ErrorKind::NoSpace => Failure::NoSpace,
            ErrorKind::Failed => Failure::Failed,
        };
        make(e.message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use zbus::DBusError;

    #[test]
    fn every_kind_has_its_own_name() {
        for kind in ErrorKind::ALL {
            let failure = Failure::from(Error::new(kind, "why"));
            assert_eq!(
                failure.name().as_str(),
                format!("{}{}", vdisk_dbus::ERROR_PREFIX, kind.name())
            );
            assert_eq!(failure.description(), Some("why"));
        }
    }
}
