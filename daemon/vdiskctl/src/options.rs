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

/// A path as the daemon, which has another working directory, understands it.
pub fn absolute(path: &str) -> Variant<'static> {
    let path = std::path::absolute(path).ok();
    let path = path.and_then(|p| p.to_str().map(str::to_owned));
    Variant::from(path.unwrap_or_default())
}
