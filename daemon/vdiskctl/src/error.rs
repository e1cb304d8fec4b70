//! Errors as one readable line, and their exit codes.

use std::fmt;

use vdisk_dbus::ERROR_PREFIX;

#[derive(Debug)]
pub struct Error {
    /// The name behind `org.vdisk1.Error.`, or a made-up one.
    name: String,
    message: String,
}

pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    pub fn failed(message: impl Into<String>) -> Error {
        Error {
            name: "Failed".into(),
            message: message.into(),
        }
    }

    pub fn invalid(message: impl Into<String>) -> Error {
        Error {
            name: "InvalidArgument".into(),
            message: message.into(),
        }
    }

    pub fn not_found(message: impl Into<String>) -> Error {
        Error {
            name: "NotFound".into(),
            message: message.into(),
        }
    }

    /// An error of the daemon, by its full name.
    pub fn named(name: &str, message: String) -> Error {
        Error {
            name: name.strip_prefix(ERROR_PREFIX).unwrap_or(name).to_owned(),
            message,
        }
    }

    /// 1: it failed; 2: the command line or an option is wrong; 3: no such object; 4: it exists or is in
    /// use; 5: not allowed; 6: the daemon cannot be reached.
    pub fn exit_code(&self) -> u8 {
        match self.name.as_str() {
            "InvalidArgument" | "NotSupported" => 2,
            "NotFound" => 3,
            "Exists" | "InUse" | "Busy" => 4,
            "NotAuthorized" => 5,
            "Unreachable" => 6,
            _ => 1,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl From<zbus::Error> for Error {
    fn from(e: zbus::Error) -> Error {
        match &e {
            zbus::Error::MethodError(name, message, _) => {
                let message = message.clone().unwrap_or_else(|| name.to_string());
                if let Some(short) = name.as_str().strip_prefix(ERROR_PREFIX) {
                    return Error {
                        name: short.to_owned(),
                        message,
                    };
                }
                standard(name.as_str(), message)
            }
            zbus::Error::FDO(fdo) => {
                use zbus::DBusError;
                let message = fdo.description().unwrap_or_default().to_owned();
                standard(fdo.name().as_str(), message)
            }
            _ => Error {
                name: "Unreachable".into(),
                message: format!("cannot talk to the bus: {e}"),
            },
        }
    }
}

/// Errors of the bus itself, in words for people.
fn standard(name: &str, message: String) -> Error {
    let short = name.rsplit('.').next().unwrap_or(name);
    let (kind, message) = match short {
        "ServiceUnknown" | "NameHasNoOwner" => (
            "Unreachable",
            "vdiskd is not running on this bus: start it (systemctl start vdiskd, or vdiskd@NAME for an instance), or name its bus with --bus-address".to_owned(),
        ),
        "AccessDenied" => (
            "NotAuthorized",
            format!("not allowed: {message}; run this as root"),
        ),
        "UnknownObject" | "UnknownInterface" => ("NotFound", message),
        "NoReply" | "Disconnected" => (
            "Unreachable",
            format!("vdiskd went away before it answered: {message}"),
        ),
        _ => ("Failed", format!("{short}: {message}")),
    };
    Error {
        name: kind.to_owned(),
        message,
    }
}
