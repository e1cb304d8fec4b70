//! Secrets: what opens encrypted images.

use std::fmt;
use std::os::fd::OwnedFd;

use zeroize::Zeroizing;

use crate::error::{Error, Result};
use crate::node::check_name;

/// The longest secret, in bytes.
pub const MAX_SECRET: usize = 1 << 20;

/// A passphrase or a key. It is not shown to anybody, and wiped when it goes.
pub struct Secret(Zeroizing<Vec<u8>>);

impl Secret {
    pub fn new(bytes: Vec<u8>) -> Secret {
        Secret(Zeroizing::new(bytes))
    }

    pub fn bytes(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a secret")
    }
}

/// Where a secret comes from. All of what is there belongs to it, a newline at the end, too.
#[derive(Debug)]
pub enum SecretSource {
    Data(Secret),
    /// A path that the daemon can read.
    File(String),
    /// Read up to its end.
    Fd(OwnedFd),
}

/// A new secret.
#[derive(Debug)]
pub struct SecretOptions {
    pub id: String,
    pub source: SecretSource,
}

impl SecretOptions {
    /// Exactly one source must be given.
    pub fn new(id: String, sources: Vec<SecretSource>) -> Result<SecretOptions> {
        check_name("secret", &id)?;
        let mut sources = sources.into_iter();
        match (sources.next(), sources.next()) {
            (Some(source), None) => Ok(SecretOptions { id, source }),
            _ => Err(Error::invalid(format!(
                "secret '{id}': give one of 'data', 'file' and 'fd'"
            ))),
        }
    }
}
