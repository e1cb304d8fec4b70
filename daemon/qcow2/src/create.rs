//! New images.

use std::io;
use std::sync::Arc;

use crate::compress::Compression;
use crate::error::{Error, Result};
use crate::header::{Header, MAX_L1};
use crate::image::{Image, Options};
use crate::mapping::Entry;
use crate::meta::Reason;
use crate::storage::{Storage, buffer, buffer_of};

/// What is made of a new image beyond its header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Preallocation {
    #[default]
    Off,
    /// All tables: every cluster has its place in the file, without taking space.
    Metadata,
    /// As `Metadata`, and the space is reserved.
    Falloc,
    /// As `Metadata`, and zeroes are written.
    Full,
}

/// How a new image is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CreateOptions {
    /// Bytes of the guest's disk, a multiple of 512.
    pub size: u64,
    /// 2 or 3.
    pub version: u32,
    /// Bytes, a power of two from 512 to 2 MiB.
    pub cluster_size: u64,
    /// Bits of a reference count, a power of two from 1 to 64.
    pub refcount_bits: u32,
    pub extended_l2: bool,
    pub compression: Compression,
    pub lazy_refcounts: bool,
    /// Name and format of the backing file, as they are to stand in the image.
    pub backing: Option<(String, String)>,
    pub preallocation: Preallocation,
}

impl CreateOptions {
    pub fn new(size: u64) -> CreateOptions {
        CreateOptions {
            size,
            version: 3,
            cluster_size: 65536,
            refcount_bits: 16,
            extended_l2: false,
            compression: Compression::Deflate,
            lazy_refcounts: false,
            backing: None,
            preallocation: Preallocation::Off,
        }
    }

    /// The header of the image, without places for tables.
    pub(crate) fn header(&self) -> Result<Header> {
        let field = |what, value: u64, allowed| {
            Err(Error::Field {
                what,
                value,
                allowed,
            })
        };
        if !self.size.is_multiple_of(512) {
            return field(
                "the size of the disk",
                self.size,
                "a multiple of 512 is allowed",
            );
        }
        if !matches!(self.version, 2 | 3) {
            return Err(Error::Version(self.version));
        }
        if !self.cluster_size.is_power_of_two() || !(512..=2 << 20).contains(&self.cluster_size) {
            return field(
                "the size of a cluster",
                self.cluster_size,
                "a power of two from 512 bytes to 2 MiB is allowed",
            );
        }
        if !self.refcount_bits.is_power_of_two() || self.refcount_bits > 64 {
            return field(
                "the number of refcount bits",
                self.refcount_bits.into(),
                "1, 2, 4, 8, 16, 32 and 64 are allowed",
            );
        }
        if self.version < 3 {
            let needs = [
                (self.refcount_bits != 16, "refcounts of other than 16 bits"),
                (self.extended_l2, "extended L2 entries"),
                (self.compression == Compression::Zstd, "zstd compression"),
                (self.lazy_refcounts, "lazy refcounts"),
            ];
            if let Some((_, what)) = needs.iter().find(|(set, _)| *set) {
                return Err(Error::NeedsVersion3(what));
            }
        }
        if self.extended_l2 && self.cluster_size < 1 << 14 {
            return field(
                "the size of a cluster",
                self.cluster_size,
                "images with extended L2 entries have clusters of at least 16 KiB",
            );
        }
        if let Some((name, _)) = &self.backing
            && (name.is_empty() || name.len() > 1023)
        {
            return field(
                "the length of the backing file's name",
                name.len() as u64,
                "1 to 1023 are allowed",
            );
        }
        let mut header = Header {
            version: self.version,
            cluster_bits: self.cluster_size.trailing_zeros(),
            size: self.size,
            l1_entries: 0,
            l1_offset: 0,
            refcount_table_offset: 0,
            refcount_table_clusters: 0,
            refcount_order: self.refcount_bits.trailing_zeros(),
            extended_l2: self.extended_l2,
            compression: self.compression,
            dirty: false,
            corrupt: false,
            snapshots: 0,
            snapshots_offset: 0,
            compatible: u64::from(self.lazy_refcounts),
            autoclear: 0,
            backing_file: self.backing.as_ref().map(|b| b.0.clone()),
            backing_format: self.backing.as_ref().map(|b| b.1.clone()),
            bitmaps: None,
            unknown_extensions: 0,
        };
        let entries = header.l1_entries_for(self.size);
        if entries * 8 > MAX_L1 {
            return field(
                "the size of the disk",
                self.size,
                "it is too large for clusters of this size: choose larger ones",
            );
        }
        header.l1_entries = entries as u32;
        header.l1_offset = self.cluster_size;
        Ok(header)
    }
}

impl Image {
    /// Makes a new image in `file`, over what was there, and leaves it durable and closed.
    pub async fn create(file: Arc<dyn Storage>, options: &CreateOptions) -> io::Result<()> {
        let header = options.header()?;
        let head = header.encode()?;
        let cluster = options.cluster_size;
        let l1_bytes = (u64::from(header.l1_entries) * 8).next_multiple_of(cluster);
        // Empty first: what is new in the file reads as zeroes.
        let grows = file.grows();
        let size = cluster + l1_bytes;
        if grows {
            file.set_size(0).await?;
            file.set_size(size).await?;
        } else if file.size() < size {
            return Err(io::ErrorKind::StorageFull.into());
        } else {
            const PIECE: u64 = 1 << 20;
            let zeroes = buffer(PIECE.min(l1_bytes) as usize);
            for at in (0..l1_bytes).step_by(PIECE as usize) {
                let n = PIECE.min(l1_bytes - at) as usize;
                file.write(cluster + at, zeroes.slice(0, n)).await?;
            }
            // Nothing that was there is to be taken for an image.
            file.write(0, buffer(cluster as usize)).await?;
        }
        let l1 = vec![0; header.l1_entries as usize * 8];
        // Nobody must take the image for one before it is whole.
        let image = Image::new(header, &l1, file.clone(), None, Options::default())?;
        image.start_writing(image.empty_refcounts(), size / cluster);
        for c in 0..size / cluster {
            image.set_count(c, 1).await?;
        }
        image.grow_to_end().await?;
        image.flush().await?;
        if options.preallocation != Preallocation::Off {
            image.preallocate(options.preallocation, !grows).await?;
        }
        image.close().await?;
        let mut whole = head;
        let mut fields = [0; Header::PATCHED];
        fields.copy_from_slice(&whole[..Header::PATCHED]);
        image.header().patch(&mut fields);
        whole[..Header::PATCHED].copy_from_slice(&fields);
        file.write(0, buffer_of(&whole)).await?;
        file.flush().await
    }

    /// Gives every cluster of an empty image a place in the file.
    async fn preallocate(&self, how: Preallocation, dirty: bool) -> io::Result<()> {
        let cluster = self.cluster();
        let layout = self.layout;
        let mut at = 0;
        while at < self.size() {
            let table_end = (at / layout.span() + 1).saturating_mul(layout.span());
            let end = self.size().min(table_end).min(at + (64 << 20).max(cluster));
            self.own_table(layout.position(at).0).await?;
            let run = self.allocate((end - at).div_ceil(cluster)).await?;
            let (host, len) = (run.first << layout.cluster_bits, run.clusters * cluster);
            if how == Preallocation::Falloc {
                self.file.reserve(host, len).await?;
            }
            if how == Preallocation::Full || dirty || !run.zero {
                const PIECE: u64 = 1 << 20;
                let zeroes = buffer(PIECE.min(len) as usize);
                for done in (0..len).step_by(PIECE as usize) {
                    let n = PIECE.min(len - done) as usize;
                    self.file.write(host + done, zeroes.slice(0, n)).await?;
                }
            }
            self.change_entries(at, run.clusters as usize, Reason::Other, |i, _| {
                layout.with_data(Entry::default(), host + i as u64 * cluster, 0, cluster)
            })
            .await?;
            at += len;
            self.commit_if_full().await?;
        }
        Ok(())
    }
}
