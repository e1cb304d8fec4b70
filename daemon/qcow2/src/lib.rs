//! The qcow2 image format (QEMU, docs/interop/qcow2): what a header says, and where the bytes of a range are.
//!
//! Nothing here does I/O: whoever has the file reads what [`Image`] asks for, and the same code serves a
//! fast path that must not wait, a slow path that may, tests in memory and fuzzers.
//!
//! Images are hostile. Every offset, length and count is checked before it is used; memory is bounded by
//! [`Limits`] and by the maximum sizes of the format, not by what an image says.

mod compress;
mod error;
mod header;
mod image;
mod l2_cache;
mod mapping;

pub use compress::Compression;
pub use error::{Error, Result};
pub use header::{Header, MAX_HEADER};
pub use image::{Image, Limits, Lookup};
pub use mapping::{Kind, Mapping};
