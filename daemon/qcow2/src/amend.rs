//! Changes of what an image is: its version, lazy refcounts, its backing file.

use std::io;

use crate::error::Error;
use crate::image::Image;
use crate::mapping::{Entry, OFFSET_MASK};
use crate::storage::buffer_of;
use crate::write::read_only;

/// What is to change.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Amend {
    /// 2 or 3.
    pub version: Option<u32>,
    pub lazy_refcounts: Option<bool>,
    /// Name and format; Some(None) for none. The data is not touched: this is for a backing file that was renamed,
    /// or is not needed any more.
    pub backing: Option<Option<(String, String)>>,
    /// The name of the external data file, for one that was renamed.
    pub data_file: Option<String>,
}

impl Image {
    /// Changes an image that is ready to be written, and of which no request is in flight.
    pub async fn amend(&self, change: &Amend) -> io::Result<()> {
        if self.meta().writing.is_none() {
            return Err(read_only());
        }
        self.settle().await?;
        let old = self.header();
        let mut new = old.clone();
        if let Some(version) = change.version {
            new.version = version;
        }
        if let Some(lazy) = change.lazy_refcounts {
            new.compatible = new.compatible & !1 | u64::from(lazy);
        }
        if let Some(backing) = &change.backing {
            new.backing_file = backing.as_ref().map(|b| b.0.clone());
            new.backing_format = backing.as_ref().map(|b| b.1.clone());
        }
        if let Some(name) = &change.data_file {
            if !old.external_data {
                return Err(io::Error::new(
                    io::ErrorKind::Unsupported,
                    "the image has its data in itself: it cannot get an external data file",
                ));
            }
            new.data_file = Some(name.clone());
        }
        if !matches!(new.version, 2 | 3) {
            return Err(Error::Version(new.version).into());
        }
        if new.version == 2 {
            if change.version == Some(2) && change.lazy_refcounts.is_none() {
                new.compatible = 0;
            }
            self.can_be_version_2(&new).await?;
        }
        // Only what is known here can be written anew.
        let unknown = old.unknown_extensions;
        if unknown > 0 {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                format!(
                    "the header has {unknown} extensions of an unknown kind, which would be lost"
                ),
            ));
        }
        let bytes = new.encode()?;
        self.file.write(0, buffer_of(&bytes)).await?;
        self.file.flush().await?;
        self.meta().header = new;
        Ok(())
    }

    async fn can_be_version_2(&self, new: &crate::header::Header) -> io::Result<()> {
        let has = |what| Err(Error::NeedsVersion3(what).into());
        if new.refcount_order != 4 {
            return has("refcounts of other than 16 bits");
        }
        if new.extended_l2 {
            return has("extended L2 entries");
        }
        if new.compression != crate::Compression::Deflate {
            return has("zstd compression");
        }
        if new.external_data {
            return has("external data files");
        }
        if new.bitmaps.is_some() {
            return has("persistent bitmaps, which the image has");
        }
        if new.compatible & 1 != 0 {
            return has("lazy refcounts");
        }
        let n = 1usize << self.layout.table_bits();
        for index in 0..new.l1_entries as usize {
            if self.tables.l1(index) & OFFSET_MASK == 0 {
                continue;
            }
            let entries = self.entries(index as u64 * self.layout.span(), n).await?;
            let is_zero = |e: &Entry| !e.is_compressed() && e.word & 1 != 0;
            if entries.iter().any(is_zero) {
                return has("zero clusters, which the image has");
            }
        }
        Ok(())
    }
}
