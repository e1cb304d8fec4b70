//! The header (specification, sections "Header" and "Header extensions").

use crate::bitmap::BitmapDirectory;
use crate::compress::Compression;
use crate::error::{Error, Result};

const MAGIC: u32 = 0x5146_49fb;

/// The header with its extensions and the name of the backing file lie in the first cluster, which has at
/// most so many bytes: no more need be read.
pub const MAX_HEADER: usize = 2 << 20;

/// Where most headers end: the usual size of a cluster.
pub const USUAL_HEADER: usize = 64 << 10;

/// The largest L1 table, in bytes. (QEMU has the same limit.)
pub(crate) const MAX_L1: u64 = 32 << 20;

const MIN_LENGTH_V2: usize = 72;
const MIN_LENGTH_V3: usize = 104;

/// The length of the headers that are made here.
const LENGTH_V3: usize = 112;

/// Bits and names of all features, by kind: incompatible (0), compatible (1), autoclear (2).
const FEATURE_NAMES: [(u8, u8, &str); 8] = [
    (0, 0, "dirty bit"),
    (0, 1, "corrupt bit"),
    (0, 2, "external data file"),
    (0, 3, "compression type"),
    (0, 4, "extended L2 entries"),
    (1, 0, "lazy refcounts"),
    (2, 0, "bitmaps"),
    (2, 1, "raw external data"),
];

const EXT_END: u32 = 0;
const EXT_BACKING_FORMAT: u32 = 0xe279_2aca;
const EXT_FEATURE_NAMES: u32 = 0x6803_f857;
const EXT_BITMAPS: u32 = 0x2385_2875;
const EXT_ENCRYPTION: u32 = 0x0537_be77;
const EXT_DATA_FILE: u32 = 0x4441_5441;

// Offsets of the fields that change while an image is open.
const AT_SIZE: usize = 24;
const AT_L1_ENTRIES: usize = 36;
const AT_L1_OFFSET: usize = 40;
const AT_REFCOUNT_TABLE: usize = 48;
const AT_SNAPSHOTS: usize = 60;
const AT_INCOMPATIBLE: usize = 72;
const AT_AUTOCLEAR: usize = 88;

const INCOMPAT_DIRTY: u32 = 0;
const INCOMPAT_CORRUPT: u32 = 1;
const INCOMPAT_DATA_FILE: u32 = 2;
const INCOMPAT_COMPRESSION: u32 = 3;
const INCOMPAT_EXTENDED_L2: u32 = 4;

/// Changes that are not in the tables yet may be noted elsewhere (see [`crate::redo`]). Not of the specification, where
/// it is reserved: whoever else writes to the image clears the bit, as it must with those that it does not know, and what
/// is noted counts no more.
pub(crate) const AUTOCLEAR_REDO: u64 = 1 << 63;

/// The bitmaps extension is valid.
pub(crate) const AUTOCLEAR_BITMAPS: u64 = 1;
/// The data of an external data file is the guest's disk as it is.
pub(crate) const AUTOCLEAR_RAW_DATA: u64 = 2;

/// Where in the file of an encrypted image the LUKS header is, with its key material; bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LuksPlace {
    pub offset: u64,
    pub len: u64,
}

/// The longest LUKS header that an image may have, in bytes.
const MAX_LUKS: u64 = 64 << 20;

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
    pub refcount_table_offset: u64,
    /// Clusters of the refcount table.
    pub refcount_table_clusters: u32,
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
    pub snapshots_offset: u64,
    /// Bits of compatible features: those that are not known do not matter.
    pub compatible: u64,
    /// Bits of features whose data a writer that does not know them makes invalid.
    pub autoclear: u64,
    /// The name of the backing file, as it stands in the image: untrusted, and never opened by itself.
    pub backing_file: Option<String>,
    pub backing_format: Option<String>,
    pub bitmaps: Option<BitmapDirectory>,
    /// Guest data is in another file.
    pub external_data: bool,
    /// The name of that file, as it stands in the image: untrusted, and never opened by itself.
    pub data_file: Option<String>,
    /// Guest data is encrypted, by what a LUKS header says.
    pub luks: Option<LuksPlace>,
    /// Header extensions of kinds that are not known here.
    pub unknown_extensions: u32,
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
    bitmaps: Option<BitmapDirectory>,
    data_file: Option<String>,
    luks: Option<LuksPlace>,
    unknown: u32,
}

/// How many bytes from the beginning of an image have to be read for its header, as these first ones of them say: those of its
/// first cluster, at most [`MAX_HEADER`]. What is no image has no more.
pub fn header_extent(first: &[u8]) -> usize {
    match (be32(first, 0), be32(first, 20)) {
        (Some(MAGIC), Some(bits)) if (9..=21).contains(&bits) => 1 << bits,
        _ => first.len().min(MAX_HEADER),
    }
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
            INCOMPAT_DATA_FILE,
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
        let luks = match u32_at(32)? {
            0 => None,
            1 => {
                return Err(Error::Encrypted(
                    "legacy AES (crypt method 1), which is insecure",
                ));
            }
            2 => {
                let place = extensions
                    .luks
                    .ok_or(Error::Short("the extension for LUKS encryption"))?;
                let end = place.offset.checked_add(place.len);
                if !place.offset.is_multiple_of(cluster)
                    || place.len > MAX_LUKS
                    || end.is_none_or(|end| end > file_size)
                {
                    return field(
                        "the offset of the LUKS header",
                        place.offset,
                        "a multiple of the size of a cluster, with at most 64 MiB behind it within the file, is allowed",
                    );
                }
                Some(place)
            }
            other => return field("the crypt method", other.into(), "0 to 2 exist"),
        };
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
        let autoclear = if version == 3 {
            u64_at(AT_AUTOCLEAR)?
        } else {
            0
        };
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
            snapshots: u32_at(AT_SNAPSHOTS)?,
            snapshots_offset: u64_at(64)?,
            refcount_table_offset: u64_at(AT_REFCOUNT_TABLE)?,
            refcount_table_clusters: u32_at(56)?,
            compatible: if version == 3 { u64_at(80)? } else { 0 },
            autoclear,
            backing_file: backing_file(first, u64_at(8)?, u32_at(16)?)?,
            backing_format: extensions.backing_format,
            external_data: has(INCOMPAT_DATA_FILE),
            data_file: extensions.data_file.filter(|_| has(INCOMPAT_DATA_FILE)),
            luks,
            // Without its autoclear bit the extension is out of date.
            unknown_extensions: extensions.unknown,
            bitmaps: extensions
                .bitmaps
                .filter(|_| autoclear & AUTOCLEAR_BITMAPS != 0),
        })
    }
}

impl Header {
    /// Bytes at the beginning of an image that [`Header::patch`] needs.
    pub const PATCHED: usize = 512;

    /// Brings the fields that may change while an image is open into the beginning of the file.
    pub fn patch(&self, bytes: &mut [u8; Header::PATCHED]) {
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        put(AT_SIZE, &self.size.to_be_bytes());
        put(AT_L1_ENTRIES, &self.l1_entries.to_be_bytes());
        put(AT_L1_OFFSET, &self.l1_offset.to_be_bytes());
        put(AT_REFCOUNT_TABLE, &self.refcount_table_offset.to_be_bytes());
        put(
            AT_REFCOUNT_TABLE + 8,
            &self.refcount_table_clusters.to_be_bytes(),
        );
        put(AT_SNAPSHOTS, &self.snapshots.to_be_bytes());
        put(AT_SNAPSHOTS + 4, &self.snapshots_offset.to_be_bytes());
        if self.version == 3 {
            let state =
                u8::from(self.dirty) << INCOMPAT_DIRTY | u8::from(self.corrupt) << INCOMPAT_CORRUPT;
            let last = AT_INCOMPATIBLE + 7;
            put(AT_AUTOCLEAR, &self.autoclear.to_be_bytes());
            bytes[last] = bytes[last] & !3 | state;
        }
    }

    /// The first cluster of an image with this header: the header, its extensions and the name of the backing file.
    pub(crate) fn encode(&self) -> Result<Vec<u8>> {
        let mut out = vec![0; Header::PATCHED];
        out[..4].copy_from_slice(&MAGIC.to_be_bytes());
        let mut put = |at: usize, value: &[u8]| out[at..at + value.len()].copy_from_slice(value);
        put(4, &self.version.to_be_bytes());
        put(20, &self.cluster_bits.to_be_bytes());
        let mut length = MIN_LENGTH_V2;
        let mut extensions = Vec::new();
        let mut extension = |kind: u32, data: &[u8]| {
            extensions.extend(kind.to_be_bytes());
            extensions.extend((data.len() as u32).to_be_bytes());
            extensions.extend(data);
            extensions.resize(extensions.len().next_multiple_of(8), 0);
        };
        if let Some(format) = &self.backing_format {
            extension(EXT_BACKING_FORMAT, format.as_bytes());
        }
        if let Some(name) = &self.data_file {
            extension(EXT_DATA_FILE, name.as_bytes());
        }
        if let Some(place) = self.luks {
            let mut data = place.offset.to_be_bytes().to_vec();
            data.extend(place.len.to_be_bytes());
            extension(EXT_ENCRYPTION, &data);
            put(32, &2u32.to_be_bytes());
        }
        if let Some(dir) = self.bitmaps {
            let mut data = dir.bitmaps.to_be_bytes().to_vec();
            data.extend([0; 4]);
            data.extend(dir.size.to_be_bytes());
            data.extend(dir.offset.to_be_bytes());
            extension(EXT_BITMAPS, &data);
        }
        if self.version == 3 {
            length = LENGTH_V3;
            let zstd = self.compression == Compression::Zstd;
            let incompatible = u64::from(zstd) << INCOMPAT_COMPRESSION
                | u64::from(self.external_data) << INCOMPAT_DATA_FILE
                | u64::from(self.extended_l2) << INCOMPAT_EXTENDED_L2;
            put(AT_INCOMPATIBLE, &incompatible.to_be_bytes());
            put(80, &self.compatible.to_be_bytes());
            put(96, &self.refcount_order.to_be_bytes());
            put(100, &(LENGTH_V3 as u32).to_be_bytes());
            put(104, &[u8::from(zstd)]);
            // Small clusters have no room for them beside the name of a backing file.
            let room = (1usize << self.cluster_bits) - LENGTH_V3;
            let named = [&self.backing_file, &self.data_file];
            let others: usize = named
                .iter()
                .filter_map(|n| n.as_ref())
                .map(|n| n.len() + 64)
                .sum();
            let others = others + 64;
            let mut names = Vec::new();
            for (kind, bit, name) in FEATURE_NAMES {
                let mut entry = vec![kind, bit];
                entry.extend(name.as_bytes());
                entry.resize(48, 0);
                names.extend(entry);
            }
            if names.len() + 16 + others <= room {
                extension(EXT_FEATURE_NAMES, &names);
            }
        }
        extension(EXT_END, &[]);
        if let Some(name) = &self.backing_file {
            let at = length + extensions.len();
            put(8, &(at as u64).to_be_bytes());
            put(16, &(name.len() as u32).to_be_bytes());
            extensions.extend(name.as_bytes());
        }
        let mut fields = [0; Header::PATCHED];
        fields.copy_from_slice(&out);
        self.patch(&mut fields);
        let mut out = fields[..length].to_vec();
        out.extend(extensions);
        if out.len() > 1 << self.cluster_bits {
            return field(
                "the length of the header with the name of the backing file",
                out.len() as u64,
                "it must fit into a cluster: choose larger clusters or a shorter name",
            );
        }
        out.resize(1 << self.cluster_bits, 0);
        Ok(out)
    }

    /// The external data file is the guest's disk as it is, and is to stay so.
    pub fn is_raw_data(&self) -> bool {
        self.external_data && self.autoclear & AUTOCLEAR_RAW_DATA != 0
    }

    /// Whether a process that had the image was killed, and may have left changes for the next writer to do again.
    pub fn has_unfinished_changes(&self) -> bool {
        self.autoclear & AUTOCLEAR_REDO != 0
    }

    /// Entries of an L1 table for a disk of `size` bytes.
    pub fn l1_entries_for(&self, size: u64) -> u64 {
        let cluster = 1u64 << self.cluster_bits;
        let per_table = cluster / if self.extended_l2 { 16 } else { 8 };
        size.div_ceil(cluster).div_ceil(per_table)
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
            EXT_DATA_FILE => {
                out.data_file = Some(String::from_utf8_lossy(data).into_owned());
            }
            EXT_ENCRYPTION => {
                out.luks = match (be64(data, 0), be64(data, 8)) {
                    (Some(offset), Some(len)) => Some(LuksPlace { offset, len }),
                    _ => return Err(Error::Short("the extension for LUKS encryption")),
                };
            }
            EXT_BITMAPS => {
                out.bitmaps = match (be32(data, 0), be64(data, 8), be64(data, 16)) {
                    (Some(bitmaps), Some(size), Some(offset)) => Some(BitmapDirectory {
                        bitmaps,
                        size,
                        offset,
                    }),
                    _ => return Err(Error::Short("the extension for bitmaps")),
                };
            }
            // Unknown extensions are to be ignored (specification, "Header extensions").
            _ => out.unknown += 1,
        }
        at += 8 + (len as usize).next_multiple_of(8);
    }
    Ok(out)
}

fn feature_name(bit: u32, names: &[(u8, String)]) -> String {
    let own = names.iter().find(|(b, _)| u32::from(*b) == bit);
    match own {
        Some((_, name)) if !name.is_empty() => name.clone(),
        _ => format!("bit {bit}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_is_read_than_the_first_cluster() {
        let mut first = [0; 512];
        assert_eq!(header_extent(&first), 512);
        first[..4].copy_from_slice(&MAGIC.to_be_bytes());
        for (bits, extent) in [(9, 512), (16, 64 << 10), (21, MAX_HEADER), (22, 512)] {
            first[20..24].copy_from_slice(&u32::to_be_bytes(bits));
            assert_eq!(header_extent(&first), extent);
        }
        assert_eq!(header_extent(&first[..3]), 3);
    }
}
