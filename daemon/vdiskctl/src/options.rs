//! Options as they are written on the command line, and as D-Bus has them.

use std::collections::HashMap;
use std::fs::File;
use std::io::ErrorKind;
use std::os::fd::OwnedFd;

use zbus::Variant;

use crate::error::{Error, Result};

pub type Options<'a> = HashMap<&'a str, Variant<'a>>;

/// Splits KEY=VALUE words.
pub fn options(words: &[String]) -> Result<Options<'_>> {
    let mut out = Options::new();
    for word in words {
        let (key, value) = word
            .split_once('=')
            .ok_or_else(|| Error::invalid(format!("'{word}' is not an option: write KEY=VALUE")))?;
        if out.insert(key, Variant::from(value)).is_some() {
            return Err(Error::invalid(format!("option '{key}' is given twice")));
        }
    }
    Ok(out)
}

/// Opens the files that are named, for writing if that is allowed, and has them passed in place of their names.
pub fn pass_files(options: &mut Options<'_>) -> Result<()> {
    let is_filename = |key: &str| key.rsplit('.').next() == Some("filename");
    let mut found = false;
    for (_, value) in options.iter_mut().filter(|(key, _)| is_filename(key)) {
        let Variant::Str(path) = &*value else {
            continue;
        };
        let open = |write| File::options().read(true).write(write).open(path.as_str());
        let may_only_read = |e: &std::io::Error| {
            matches!(
                e.kind(),
                ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem
            )
        };
        let file = match open(true) {
            Err(e) if may_only_read(&e) => open(false),
            other => other,
        };
        let file = file.map_err(|e| Error::failed(format!("'{path}' cannot be opened: {e}")))?;
        *value = Variant::from(zbus::Fd::from(OwnedFd::from(file)));
        found = true;
    }
    match found {
        true => Ok(()),
        false => Err(Error::invalid(
            "--pass: no option is a filename: give filename=PATH or file.filename=PATH",
        )),
    }
}

/// A server of a disk, as an NBD URI names it.
pub struct NbdUri {
    pub export: String,
    pub socket: String,
}

impl NbdUri {
    /// Reads `nbd+unix:///EXPORT?socket=PATH` (the NBD URI specification); None of what is no URI.
    pub fn parse(text: &str) -> Option<Result<NbdUri>> {
        let (scheme, rest) = text.split_once("://")?;
        if !scheme.starts_with("nbd") {
            return None;
        }
        let decode = |text: &str| {
            let text = percent_encoding::percent_decode_str(text).decode_utf8();
            text.ok().map(String::from)
        };
        let read = || {
            let (export, query) = rest.strip_prefix('/')?.split_once('?')?;
            let socket = query.strip_prefix("socket=")?;
            Some(NbdUri {
                export: decode(export)?,
                socket: decode(socket).filter(|s| s.starts_with('/'))?,
            })
        };
        let uri = match scheme {
            "nbd+unix" => read(),
            _ => None,
        };
        Some(uri.ok_or_else(|| {
            Error::invalid(format!(
                "'{text}' cannot be used: give nbd+unix:///EXPORT?socket=PATH, with a whole path"
            ))
        }))
    }
}

/// A path as the daemon, which has another working directory, understands it.
pub fn absolute(path: &str) -> Variant<'static> {
    let path = std::path::absolute(path).ok();
    let path = path.and_then(|p| p.to_str().map(str::to_owned));
    Variant::from(path.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uris_name_servers() {
        let read = |text| NbdUri::parse(text).map(|r| r.map(|u| (u.export, u.socket)).ok());
        let is = |export: &str, socket: &str| Some(Some((export.to_owned(), socket.to_owned())));
        assert_eq!(read("nbd+unix:///?socket=/run/s"), is("", "/run/s"));
        assert_eq!(read("nbd+unix:///a%20b?socket=/s%3F"), is("a b", "/s?"));
        for wrong in ["nbd://host/x", "nbd+unix:///x", "nbd+unix:///x?socket=s"] {
            assert_eq!(read(wrong), Some(None), "{wrong}");
        }
        assert_eq!(read("/images/nbd.qcow2"), None);
        assert_eq!(read("file:///x"), None);
    }
}
