//! The header (specification, sections "Header" and "Header extensions").

use crate::compress::Compression;
use crate::error::{Error, Result};

const MAGIC: u32 = 0x5146_49fb;

/// The header with its extensions and the name of the backing file lie in the first cluster, which has at
/// most so many bytes: no more need be read.
pub const MAX_HEADER: usize = 2 << 20;

/// The largest L1 table, in bytes. (QEMU has the same limit.)
const MAX_L1: u64 = 32 << 20;

const MIN_LENGTH_V2: usize = 72;
const MIN_LENGTH_V3: usize = 104;

const EXT_END: u32 = 0;
const EXT_BACKING_FORMAT: u32 = 0xe279_2aca;
const EXT_FEATURE_NAMES: u32 = 0x6803_f857;

const INCOMPAT_DIRTY: u32 = 0;
const INCOMPAT_CORRUPT: u32 = 1;
const INCOMPAT_DATA_FILE: u32 = 2;
const INCOMPAT_COMPRESSION: u32 = 3;
const INCOMPAT_EXTENDED_L2: u32 = 4;

/// Names of the incompatible features that the specification defines, for images without a table of names.
const INCOMPAT_NAMES: [&str; 5] = [
    "dirty bit",
    "corrupt bit",
    "external data file",
    "compression type",
    "extended L2 entries",
];

/// What a header says, checked. Offsets and lengths are bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    pub version: u32,
    /// A cluster has 2^`cluster_bits` bytes, 9 to 21.
    pub cluster_bits: u32,
    /// The guest's disk.
    pub size: u64,
    pub l1_entries: u32,
    pub l1_offset: u64,
    /// A reference count has 2^`refcount_order` bits.
    pub refcount_order: u32,
    /// L2 entries have 16 bytes, with a bitmap for 32 subclusters.
    pub extended_l2: bool,
    pub compression: Compression,
    /// Reference counts may be wrong (lazy refcounts, not closed).
    pub dirty: bool,
    /// Somebody found the tables to be corrupt.
    pub corrupt: bool,
    pub snapshots: u32,
    /// The name of the backing file, as it stands in the image: untrusted, and never opened by itself.
    pub backing_file: Option<String>,
    pub backing_format: Option<String>,
}

fn be32(bytes: &[u8], at: usize) -> Option<u32> {
    let b = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_be_bytes([b[0], b[1], b[2], b[3]]))
}

fn be64(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from(be32(bytes, at)?) << 32 | u64::from(be32(bytes, at.checked_add(4)?)?))
}

fn field<T>(what: &'static str, value: u64, allowed: &'static str) -> Result<T> {
    Err(Error::Field {
        what,
        value,
        allowed,
    })
}

/// What the header extensions say.
#[derive(Default)]
struct Extensions {
    backing_format: Option<String>,
    /// Names of incompatible features by bit.
    names: Vec<(u8, String)>,
}

impl Header {
    /// Reads the header from the beginning of an image of `file_size` bytes. `bytes` is the first cluster, or
    /// what there is of the first [`MAX_HEADER`] bytes.
    pub fn parse(bytes: &[u8], file_size: u64) -> Result<Header> {
        let short = Error::Short("the header");
        let u32_at = |at| be32(bytes, at).ok_or(Error::Short("the header"));
        let u64_at = |at| be64(bytes, at).ok_or(Error::Short("the header"));
        if be32(bytes, 0) != Some(MAGIC) {
            return Err(Error::Magic);
        }
        let version = u32_at(4)?;
        if !matches!(version, 2 | 3) {
            return Err(Error::Version(version));
        }
        if bytes.len() < MIN_LENGTH_V2 {
            return Err(short);
        }
        let cluster_bits = u32_at(20)?;
        if !(9..=21).contains(&cluster_bits) {
            return field(
                "the number of cluster bits",
                cluster_bits.into(),
                "9 to 21 are allowed",
            );
        }
        let cluster = 1u64 << cluster_bits;
        let (mut incompatible, mut refcount_order, mut length) = (0, 4, MIN_LENGTH_V2);
        if version == 3 {
            incompatible = u64_at(72)?;
            refcount_order = u32_at(96)?;
            length = u32_at(100)? as usize;
            if length < MIN_LENGTH_V3 || !length.is_multiple_of(8) || length as u64 > cluster {
                return field(
                    "the length of the header",
                    length as u64,
                    "a multiple of 8 from 104 to the size of a cluster is allowed",
                );
            }
            if length > bytes.len() {
                return Err(short);
            }
        }
        if refcount_order > 6 {
            return field(
                "the refcount order",
                refcount_order.into(),
                "0 to 6 are allowed",
            );
        }
        let first = &bytes[..bytes.len().min(cluster as usize)];
        let extensions = extensions(first, length)?;
        let supported = [
            INCOMPAT_DIRTY,
            INCOMPAT_CORRUPT,
            INCOMPAT_COMPRESSION,
            INCOMPAT_EXTENDED_L2,
        ];
        let unknown = supported
            .iter()
            .fold(incompatible, |f, bit| f & !(1 << bit));
        if unknown != 0 {
            return Err(Error::Feature(feature_name(
                unknown.trailing_zeros(),
                &extensions.names,
            )));
        }
        let has = |bit: u32| incompatible & 1 << bit != 0;
        match u32_at(32)? {
            0 => {}
            1 => {
                return Err(Error::Encrypted(
                    "legacy AES (crypt method 1), which is insecure",
                ));
            }
            2 => return Err(Error::Encrypted("LUKS (crypt method 2)")),
            other => return field("the crypt method", other.into(), "0 to 2 exist"),
        }
        let kind = if version == 3 && length > MIN_LENGTH_V3 {
            bytes.get(104).copied().unwrap_or(0)
        } else {
            0
        };
        let compression = match (kind, has(INCOMPAT_COMPRESSION)) {
            (0, false) => Compression::Deflate,
            (1, true) => Compression::Zstd,
            (kind, _) => {
                return field(
                    "the compression type",
                    kind.into(),
                    "0 (deflate) without and 1 (zstd) with its feature bit exist",
                );
            }
        };
        let extended_l2 = has(INCOMPAT_EXTENDED_L2);
        if extended_l2 && cluster_bits < 14 {
            return field(
                "the number of cluster bits",
                cluster_bits.into(),
                "images with extended L2 entries have at least 14",
            );
        }
        let size = u64_at(24)?;
        let l1_entries = u32_at(36)?;
        let l1_offset = u64_at(40)?;
        let l1_bytes = u64::from(l1_entries) * 8;
        if l1_bytes > MAX_L1 {
            return field(
                "the number of L1 entries",
                l1_entries.into(),
                "at most 4194304 are allowed",
            );
        }
        let per_table = cluster / if extended_l2 { 16 } else { 8 };
        if size.div_ceil(cluster).div_ceil(per_table) > u64::from(l1_entries) {
            return field(
                "the number of L1 entries",
                l1_entries.into(),
                "too few for the size of the disk",
            );
        }
        let l1_end = l1_offset.checked_add(l1_bytes);
        if !l1_offset.is_multiple_of(cluster)
            || l1_entries > 0 && l1_end.is_none_or(|end| end > file_size)
        {
            return field(
                "the offset of the L1 table",
                l1_offset,
                "it lies outside the file",
            );
        }
        if !size.is_multiple_of(512) {
            return field("the size of the disk", size, "a multiple of 512 is allowed");
        }
        Ok(Header {
            version,
            cluster_bits,
            size,
            l1_entries,
            l1_offset,
            refcount_order,
            extended_l2,
            compression,
            dirty: has(INCOMPAT_DIRTY),
            corrupt: has(INCOMPAT_CORRUPT),
            snapshots: u32_at(60)?,
            backing_file: backing_file(first, u64_at(8)?, u32_at(16)?)?,
            backing_format: extensions.backing_format,
        })
    }
}

fn backing_file(first: &[u8], offset: u64, len: u32) -> Result<Option<String>> {
    if offset == 0 {
        return Ok(None);
    }
    if len == 0 || len > 1023 {
        return field(
            "the length of the backing file's name",
            len.into(),
            "1 to 1023 are allowed",
        );
    }
    let name = usize::try_from(offset)
        .ok()
        .and_then(|at| first.get(at..at.checked_add(len as usize)?))
        .ok_or(Error::Short("the name of the backing file"))?;
    Ok(Some(String::from_utf8_lossy(name).into_owned()))
}

fn extensions(first: &[u8], mut at: usize) -> Result<Extensions> {
    let mut out = Extensions::default();
    // An image without room for an end marker has no extensions.
    while let (Some(kind), Some(len)) = (be32(first, at), be32(first, at + 4)) {
        if kind == EXT_END {
            break;
        }
        let data = first
            .get(at + 8..)
            .and_then(|rest| rest.get(..len as usize))
            .ok_or(Error::Short("a header extension"))?;
        match kind {
            EXT_BACKING_FORMAT => {
                out.backing_format = Some(String::from_utf8_lossy(data).into_owned());
            }
            EXT_FEATURE_NAMES => {
                for entry in data.chunks_exact(48).filter(|e| e[0] == 0) {
                    let name = entry[2..].split(|b| *b == 0).next().unwrap_or(&[]);
                    out.names
                        .push((entry[1], String::from_utf8_lossy(name).into_owned()));
                }
            }
            // Unknown extensions are to be ignored (specification, "Header extensions").
            _ => {}
        }
        at += 8 + (len as usize).next_multiple_of(8);
    }
    Ok(out)
}

fn feature_name(bit: u32, names: &[(u8, String)]) -> String {
    if bit == INCOMPAT_DATA_FILE {
        return INCOMPAT_NAMES[bit as usize].to_owned();
    }
    let own = names.iter().find(|(b, _)| u32::from(*b) == bit);
    match own {
        Some((_, name)) if !name.is_empty() => name.clone(),
        _ => format!("bit {bit}"),
    }
}
