//! An open image: its header, its L1 table, and as many L2 tables as it may keep.

use crate::error::{Error, Result};
use crate::header::Header;
use crate::l2_cache::L2Cache;
use crate::mapping::{Kind, Layout, Mapping};

/// What an image may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of L2 tables kept in memory.
    pub l2_cache: u64,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits { l2_cache: 32 << 20 }
    }
}

/// Where the bytes of a range are, or what must be known first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lookup {
    /// The first `len` (at least one) bytes of the range are of one kind.
    Mapped(Mapping),
    /// This L2 table must be read: a cluster at byte `offset` of the file, to be given to
    /// [`Image::insert_table`].
    NeedsTable { index: usize, offset: u64 },
}

/// A lookup goes through at most so many entries: a long range of small clusters must not keep a thread.
const MAX_STEPS: usize = 4096;

const L1_OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;

pub struct Image {
    header: Header,
    layout: Layout,
    /// Offsets of the L2 tables; 0 for none.
    l1: Box<[u64]>,
    cache: L2Cache,
}

fn words(bytes: &[u8]) -> impl Iterator<Item = u64> + '_ {
    let (chunks, _) = bytes.as_chunks::<8>();
    chunks.iter().map(|b| u64::from_be_bytes(*b))
}

impl Image {
    /// `l1` holds the bytes of the L1 table, `header.l1_entries` of 8 bytes.
    pub fn new(header: Header, l1: &[u8], limits: Limits) -> Result<Image> {
        let l1: Box<[u64]> = words(l1).take(header.l1_entries as usize).collect();
        if l1.len() < header.l1_entries as usize {
            return Err(Error::Short("the L1 table"));
        }
        let layout = Layout {
            cluster_bits: header.cluster_bits,
            extended: header.extended_l2,
        };
        let capacity = limits.l2_cache / layout.cluster();
        Ok(Image {
            cache: L2Cache::new(l1.len(), usize::try_from(capacity).unwrap_or(usize::MAX)),
            header,
            layout,
            l1,
        })
    }

    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Bytes of a cluster.
    pub fn cluster(&self) -> u64 {
        self.layout.cluster()
    }

    /// Where the bytes from `offset` on are, `len` (at least one) at most. The range lies within the disk.
    #[inline]
    pub fn lookup(&self, offset: u64, len: u64) -> Result<Lookup> {
        let mut found: Option<Mapping> = None;
        let end = offset.saturating_add(len);
        let mut at = offset;
        for _ in 0..MAX_STEPS {
            if at >= end {
                break;
            }
            let next = match self.one(at)? {
                Lookup::Mapped(m) => m,
                // What is known so far is an answer.
                needs => match found {
                    None => return Ok(needs),
                    Some(_) => break,
                },
            };
            found = match found {
                None => Some(next),
                Some(m) => match m.join(next) {
                    Some(both) => Some(both),
                    None => break,
                },
            };
            at = at.saturating_add(next.len);
        }
        let m = found.unwrap_or(Mapping {
            kind: Kind::Unallocated,
            len,
        });
        Ok(Lookup::Mapped(Mapping {
            len: m.len.min(len),
            ..m
        }))
    }

    #[inline]
    fn one(&self, at: u64) -> Result<Lookup> {
        let table_bits = self.layout.table_bits();
        let index = (at >> (self.layout.cluster_bits + table_bits)) as usize;
        let Some(&l1) = self.l1.get(index) else {
            return Err(Error::Short("the L1 table"));
        };
        let table = l1 & L1_OFFSET_MASK;
        if table == 0 {
            let span = 1u64 << (self.layout.cluster_bits + table_bits);
            return Ok(Lookup::Mapped(Mapping {
                kind: Kind::Unallocated,
                len: span - (at & (span - 1)),
            }));
        }
        if table & (self.layout.cluster() - 1) != 0 {
            return Err(Error::Corrupt {
                what: "the L1 entry",
                at,
                value: l1,
            });
        }
        let entry = (at >> self.layout.cluster_bits) as usize & ((1 << table_bits) - 1);
        let found = self.cache.with(index, |words| {
            if self.layout.extended {
                (words[2 * entry], words[2 * entry + 1])
            } else {
                (words[entry], 0)
            }
        });
        match found {
            Some((entry, bitmap)) => Ok(Lookup::Mapped(self.layout.decode(entry, bitmap, at)?)),
            None => Ok(Lookup::NeedsTable {
                index,
                offset: table,
            }),
        }
    }

    /// Takes an L2 table in: the whole cluster that [`Lookup::NeedsTable`] asked for.
    pub fn insert_table(&self, index: usize, bytes: &[u8]) -> Result<()> {
        let table: Box<[u64]> = words(bytes).collect();
        if table.len() as u64 * 8 != self.cluster() {
            return Err(Error::Short("an L2 table"));
        }
        self.cache.insert(index, table);
        Ok(())
    }

    /// Decompresses the cluster that `at` lies in.
    pub fn decompress(&self, at: u64, data: &[u8]) -> Result<Vec<u8>> {
        let mut out = vec![0; self.cluster() as usize];
        if self.header.compression.decompress(data, &mut out) {
            Ok(out)
        } else {
            Err(Error::Compressed(at & !(self.cluster() - 1)))
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// An image of 512-byte clusters: header, L1 table, L2 table, data.
    fn image() -> Vec<u8> {
        let mut b = vec![0u8; 8 * 512];
        b[..4].copy_from_slice(b"QFI\xfb");
        let mut put32 = |at: usize, v: u32| b[at..at + 4].copy_from_slice(&v.to_be_bytes());
        put32(4, 3);
        put32(20, 9);
        put32(36, 4);
        put32(96, 4);
        put32(100, 104);
        let mut put64 = |at: usize, v: u64| b[at..at + 8].copy_from_slice(&v.to_be_bytes());
        put64(24, 64 << 10);
        put64(40, 512);
        put64(512, 1024 | 1 << 63);
        put64(1024, 1536 | 1 << 63);
        put64(1032, 2048 | 1 << 63);
        put64(1040, 1);
        put64(1048, 3072);
        b
    }

    /// Does what a driver does, on an image in memory.
    fn read(bytes: &[u8], offset: u64, len: u64) -> Result<Vec<Mapping>> {
        let header = Header::parse(bytes, bytes.len() as u64)?;
        let l1 =
            header.l1_offset as usize..header.l1_offset as usize + header.l1_entries as usize * 8;
        let image = Image::new(header, &bytes[l1], Limits::default())?;
        let (mut at, end) = (offset, (offset + len).min(image.header().size));
        let mut out = Vec::new();
        while at < end {
            match image.lookup(at, end - at)? {
                Lookup::Mapped(m) => {
                    assert!(m.len > 0 && m.len <= end - at);
                    if let Kind::Compressed { offset, len } = m.kind {
                        let from = (offset as usize).min(bytes.len());
                        let to = from.saturating_add(len as usize).min(bytes.len());
                        let _ = image.decompress(at, &bytes[from..to]);
                    }
                    at += m.len;
                    out.push(m);
                }
                Lookup::NeedsTable { index, offset } => {
                    let table = usize::try_from(offset)
                        .ok()
                        .and_then(|o| bytes.get(o..)?.get(..image.cluster() as usize))
                        .ok_or(Error::Short("an L2 table"))?;
                    image.insert_table(index, table)?;
                }
            }
        }
        Ok(out)
    }

    #[test]
    fn neighbours_are_one_mapping() {
        let map = |kind, len| Mapping { kind, len };
        assert_eq!(
            read(&image(), 100, 4096).unwrap(),
            [
                map(Kind::Data(1636), 924),
                map(Kind::Zero, 512),
                map(Kind::Data(3072), 512),
                map(Kind::Unallocated, 4096 - 924 - 1024),
            ]
        );
    }

    #[test]
    fn wrong_headers_are_named() {
        let check = |at: usize, bytes: &[u8], message: &str| {
            let mut b = image();
            b[at..at + bytes.len()].copy_from_slice(bytes);
            let e = read(&b, 0, 512).unwrap_err().to_string();
            assert!(e.contains(message), "{e}");
        };
        check(0, b"QFI\0", "magic");
        check(4, &[0, 0, 0, 9], "version 9");
        check(20, &[0, 0, 0, 8], "cluster bits is 8");
        check(20, &[0, 0, 0, 22], "cluster bits is 22");
        check(24, &[0xff; 8], "too few");
        check(32, &[0, 0, 0, 1], "legacy AES");
        check(32, &[0, 0, 0, 2], "LUKS");
        check(36, &[0xff; 4], "at most 4194304");
        check(40, &[0, 0, 0, 0, 0, 0, 0, 1], "outside the file");
        check(40, &[0x7f; 8], "outside the file");
        check(79, &[4], "external data file");
        check(72, &[0x80], "bit 63");
        check(79, &[8], "compression type");
        check(96, &[0, 0, 0, 7], "refcount order is 7");
        check(100, &[0, 0, 0, 3], "length of the header is 3");
        check(
            8,
            &[0, 0, 0, 0, 0xff, 0, 0, 0, 0, 0, 0, 9],
            "name of the backing file",
        );
        check(512, &[0, 0xff, 0, 0, 0, 0, 0, 0], "L2 table");
        assert!(matches!(read(&image()[..60], 0, 1), Err(Error::Short(_))));
    }

    #[test]
    fn the_cache_is_bounded() {
        let mut b = image();
        // All L1 entries with the same table.
        for i in 0..4 {
            b[512 + 8 * i..520 + 8 * i].copy_from_slice(&1024u64.to_be_bytes());
        }
        let header = Header::parse(&b, b.len() as u64).unwrap();
        let image = Image::new(header, &b[512..], Limits { l2_cache: 1024 }).unwrap();
        for index in 0..2 {
            for l1 in 0..2 {
                image.insert_table(l1 + 2 * index, &b[1024..1536]).unwrap();
            }
            assert_eq!(image.cache.len(), 2);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4096))]
        #[test]
        fn no_image_breaks_the_reader(
            changes in prop::collection::vec((0usize..2048, any::<u8>()), 0..12),
            words in prop::collection::vec((0usize..192, any::<u64>()), 0..4),
        ) {
            let mut b = image();
            for (at, value) in words {
                b[512 + 8 * at..520 + 8 * at].copy_from_slice(&value.to_be_bytes());
            }
            for (at, value) in changes {
                // The head, and the tables, more often than the rest.
                let at = if at > 1024 { at } else { at % 112 };
                b[at] = value;
            }
            if let Ok(map) = read(&b, 0, 64 << 10) {
                let total: u64 = map.iter().map(|m| m.len).sum();
                prop_assert!(total <= 64 << 10);
            }
        }
    }
}
