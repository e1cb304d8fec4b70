//! Options as they are written on the command line, and as D-Bus has them.

use std::collections::HashMap;

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

/// A path as the daemon, which has another working directory, understands it.
pub fn absolute(path: &str) -> Variant<'static> {
    let path = std::path::absolute(path).ok();
    let path = path.and_then(|p| p.to_str().map(str::to_owned));
    Variant::from(path.unwrap_or_default())
}
