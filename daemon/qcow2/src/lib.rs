//! The qcow2 image format (QEMU, docs/interop/qcow2): reading and writing, safe against power cuts.
//!
//! An [`Image`] lies in a [`Storage`]. [`Image::lookup`] says at once where the bytes of a range are, without
//! a lock or an allocation, if the tables for that are in memory: a driver sends such requests straight to the
//! file. Everything else is done by the `async` methods, from any number of I/O threads at once.
//!
//! Images are hostile. Every offset, length and count is checked before it is used; memory is bounded by
//! [`Options`] and by the maximum sizes of the format, not by what an image says.

mod activate;
mod allocator;
mod amend;
mod bitmap;
mod check;
mod commit;
mod compress;
mod create;
mod entries;
mod error;
mod header;
mod image;
mod mapping;
mod measure;
mod meta;
mod partial;
mod redo;
mod refcount;
mod resize;
mod snapshot;
mod storage;
mod tables;
mod write;

pub use amend::Amend;
pub use bitmap::{BitmapDirectory, BitmapInfo};
pub use check::{CHECK_MEMORY, Repair, Report};
pub use compress::Compression;
pub use create::{CreateOptions, Preallocation};
pub use error::{Error, Result};
pub use header::{Header, LuksPlace, MAX_HEADER, USUAL_HEADER, header_extent};
pub use image::{Children, Image, Lookup, Options, Progress};
pub use mapping::{Kind, Mapping};
pub use measure::Measure;
pub use snapshot::Snapshot;
pub use storage::{LocalFuture, Step, Storage};
pub use write::Put;
