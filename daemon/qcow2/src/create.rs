//! New images.

use std::io;
use std::ops::Range;

use crate::allocator::Run;
use crate::compress::Compression;
use crate::error::{Error, Result};
use crate::header::{AUTOCLEAR_RAW_DATA, Header, LuksPlace, MAX_L1};
use crate::image::{Children, Image, Options, Progress, silent};
use crate::mapping::Entry;
use crate::meta::Reason;
use crate::storage::{buffer, buffer_of};

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
    /// The name of the external data file, as it is to stand in the image.
    pub data_file: Option<String>,
    /// The external data file is to be the guest's disk as it is: all clusters get their place there.
    pub data_file_raw: bool,
    /// The LUKS header of an encrypted image with its key material; data goes through the cipher that it describes.
    pub luks: Option<Vec<u8>>,
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
            data_file: None,
            data_file_raw: false,
            luks: None,
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
                (self.data_file.is_some(), "external data files"),
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
        if let Some(name) = &self.data_file
            && (name.is_empty() || name.len() > 1023)
        {
            return field(
                "the length of the data file's name",
                name.len() as u64,
                "1 to 1023 are allowed",
            );
        }
        if self.data_file_raw && (self.data_file.is_none() || self.backing.is_some()) {
            return Err(Error::RawData);
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
            autoclear: if self.data_file_raw {
                AUTOCLEAR_RAW_DATA
            } else {
                0
            },
            backing_file: self.backing.as_ref().map(|b| b.0.clone()),
            backing_format: self.backing.as_ref().map(|b| b.1.clone()),
            bitmaps: None,
            external_data: self.data_file.is_some(),
            data_file: self.data_file.clone(),
            luks: self.luks.as_ref().map(|luks| LuksPlace {
                offset: 0,
                len: luks.len() as u64,
            }),
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
    /// Makes a new image in `children.file`, over what was there, and leaves it durable and closed. An external data
    /// file loses what it had, too.
    pub async fn create(children: Children, options: &CreateOptions) -> io::Result<()> {
        Image::create_watched(children, options, &silent).await
    }

    /// As [`Image::create`]. There is no image if `progress` ends it.
    pub async fn create_watched(
        children: Children,
        options: &CreateOptions,
        progress: Progress<'_>,
    ) -> io::Result<()> {
        let header = options.header()?;
        // Whether it fits is to be known before anything is lost.
        header.encode()?;
        let file = children.file.clone();
        let data = children.data.clone();
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
        let image = Image::new(header, &l1, children, Options::default())?;
        let mut data_grows = image.fresh_is_zero && grows;
        if let Some(data) = data.filter(|_| options.data_file.is_some()) {
            if data.grows() {
                data.set_size(0).await?;
            }
            image.grow_data(options.size).await?;
            // What is new must not be decrypted.
            data_grows = data.grows() && !image.encrypted;
            if !data_grows && options.data_file_raw {
                data.write_zeroes(0, options.size, true).await?;
            }
        }
        image.start_writing(image.empty_refcounts(), size / cluster);
        for c in 0..size / cluster {
            image.set_count(c, 1).await?;
        }
        image.grow_to_end().await?;
        if let Some(luks) = &options.luks {
            let first = image.write_table(luks.clone()).await?;
            if let Some(place) = &mut image.meta().header.luks {
                place.offset = first << image.layout.cluster_bits;
            }
        }
        image.flush_all().await?;
        let preallocation = match options.preallocation {
            Preallocation::Off if options.data_file_raw => Preallocation::Metadata,
            other => other,
        };
        if preallocation != Preallocation::Off {
            let is_dirty = !data_grows && !options.data_file_raw;
            image
                .preallocate(0..options.size, preallocation, is_dirty, progress)
                .await?;
        }
        image.close().await?;
        let whole = image.header().encode()?;
        file.write(0, buffer_of(&whole)).await?;
        file.flush().await
    }

    /// Gives every cluster of a range that has none a place. If `dirty`, there may be something there.
    pub(crate) async fn preallocate(
        &self,
        range: Range<u64>,
        how: Preallocation,
        dirty: bool,
        progress: Progress<'_>,
    ) -> io::Result<()> {
        let cluster = self.cluster();
        let layout = self.layout;
        let mut at = range.start.next_multiple_of(cluster);
        while at < range.end {
            let table_end = (at / layout.span() + 1).saturating_mul(layout.span());
            let end = range.end.min(table_end).min(at + (64 << 20).max(cluster));
            self.own_table(layout.position(at).0).await?;
            let want = (end - at).div_ceil(cluster);
            let run = if layout.external {
                Run {
                    first: at >> layout.cluster_bits,
                    clusters: want,
                    zero: !self.encrypted,
                }
            } else {
                self.allocate(want).await?
            };
            let (host, mut len) = (run.first << layout.cluster_bits, run.clusters * cluster);
            if layout.external {
                len = len.min(range.end - at);
            }
            if how == Preallocation::Falloc {
                self.data.reserve(host, len).await?;
            }
            if how == Preallocation::Full || dirty || !run.zero {
                const PIECE: u64 = 1 << 20;
                let zeroes = buffer(PIECE.min(len) as usize);
                for done in (0..len).step_by(PIECE as usize) {
                    let n = PIECE.min(len - done) as usize;
                    self.data.write(host + done, zeroes.slice(0, n)).await?;
                    progress(at + done)?;
                }
            }
            self.change_entries(at, run.clusters as usize, Reason::Other, |i, _| {
                layout.with_data(Entry::default(), host + i as u64 * cluster, 0, cluster)
            })
            .await?;
            at += len;
            progress(at.min(range.end))?;
            self.commit_if_full().await?;
        }
        Ok(())
    }
}
