//! Disks encrypted with LUKS version 1 (cryptsetup, "LUKS1 On-Disk Format Specification", version 1.2.3) and AES-XTS.
//!
//! A [`Header`] says how the disk is encrypted, and has up to eight key slots: in each of them the key of the disk is
//! locked with one passphrase. [`Header::unlock`] gives the [`Key`], whose [`Cipher`] works on sectors of 512 bytes.
//!
//! Headers are hostile: whatever one says is checked before it is used, and bounds what is read and computed.

mod af;
mod cipher;
mod error;
mod hash;
mod header;
mod keys;

pub use cipher::{Cipher, SECTOR};
pub use error::{Error, Result};
pub use hash::Hash;
pub use header::{HEADER, Header, Slot};
pub use keys::{Fingerprint, FormatOptions, Key};
