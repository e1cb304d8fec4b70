//! Persistent dirty bitmaps (specification, "Bitmaps"): where they are in the file.

use std::io;

use crate::error::Error;
use crate::image::{Image, words};
use crate::mapping::OFFSET_MASK;

/// The longest directory and the longest table that are read, in bytes. (QEMU has about the same limits.)
const MAX_DIRECTORY: u64 = 64 << 20;
const MAX_TABLE: u64 = 64 << 20;

/// Where the directory of bitmaps is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BitmapDirectory {
    pub bitmaps: u32,
    /// Bytes.
    pub size: u64,
    pub offset: u64,
}

/// Something that takes clusters: what it is, where, and how many bytes.
pub(crate) type Place = (&'static str, u64, u64);

impl Image {
    /// Everything that the bitmaps take in the file; None if there are none.
    pub(crate) async fn bitmap_places(&self) -> io::Result<Option<Vec<Place>>> {
        let Some(dir) = self.header().bitmaps else {
            return Ok(None);
        };
        let short = || Error::Short("the directory of bitmaps");
        if dir.size > MAX_DIRECTORY {
            return Err(Error::Field {
                what: "the size of the directory of bitmaps",
                value: dir.size,
                allowed: "at most 64 MiB are allowed",
            }
            .into());
        }
        let mut places = vec![("the directory of bitmaps", dir.offset, dir.size)];
        let bytes = self
            .read_metadata(dir.offset, dir.size, "the directory of bitmaps")
            .await?;
        let mut at = 0usize;
        for _ in 0..dir.bitmaps {
            let entry = bytes.get(at..at + 24).ok_or_else(short)?;
            let table = u64::from_be_bytes(*entry.first_chunk().ok_or_else(short)?);
            let number = |i: usize, n: usize| {
                entry[i..i + n]
                    .iter()
                    .fold(0u64, |v, b| v << 8 | u64::from(*b))
            };
            let (len, name, extra) = (number(8, 4) * 8, number(18, 2), number(20, 4));
            if len > MAX_TABLE {
                return Err(Error::Field {
                    what: "the number of entries of a bitmap table",
                    value: len / 8,
                    allowed: "at most 8388608 are allowed",
                }
                .into());
            }
            places.push(("a bitmap table", table, len));
            let entries = self.read_metadata(table, len, "a bitmap table").await?;
            for word in words(&entries).filter(|w| w & OFFSET_MASK != 0) {
                places.push(("a bitmap", word & OFFSET_MASK, self.cluster()));
            }
            at += (24 + name as usize + extra as usize).next_multiple_of(8);
        }
        Ok(Some(places))
    }
}
