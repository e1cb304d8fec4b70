//! The snapshot table (specification, "Snapshots").

use std::io;

use crate::error::{Error, Result};
use crate::image::Image;

/// The longest snapshot table that is read, in bytes.
const MAX_TABLE: u64 = 64 << 20;

/// The most snapshots that an image may have. (QEMU has the same limit.)
pub(crate) const MAX_SNAPSHOTS: u32 = 65536;

/// Extra data of a snapshot that is known: size of the VM state, size of the disk, instruction count.
const KNOWN_EXTRA: usize = 24;
const MAX_EXTRA: usize = 1024;

const FIXED: usize = 40;

/// A snapshot inside an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    pub id: String,
    pub name: String,
    /// Seconds and nanoseconds since 1970.
    pub date: (u32, u32),
    /// Nanoseconds that the guest had run.
    pub vm_clock: u64,
    /// Bytes of the VM's state, which lie beyond the disk.
    pub vm_state_size: u64,
    /// Bytes of the disk; None in snapshots that do not say so: that of the image.
    pub disk_size: Option<u64>,
    /// Instructions that the guest had executed, if it was counting.
    pub icount: Option<u64>,
    pub(crate) l1_offset: u64,
    pub(crate) l1_entries: u32,
    /// Extra data as it is in the image.
    extra: Vec<u8>,
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> Result<[u8; N]> {
    bytes
        .get(at..)
        .and_then(|b| b.first_chunk::<N>())
        .copied()
        .ok_or(Error::Short("the snapshot table"))
}

/// Reads one snapshot, and how many bytes it takes.
fn parse(b: &[u8]) -> Result<(Snapshot, usize)> {
    let u16_at = |at| array(b, at).map(u16::from_be_bytes);
    let u32_at = |at| array(b, at).map(u32::from_be_bytes);
    let u64_at = |at| array(b, at).map(u64::from_be_bytes);
    let (id_len, name_len) = (u16_at(12)? as usize, u16_at(14)? as usize);
    let extra_len = u32_at(36)? as usize;
    if extra_len > MAX_EXTRA {
        return Err(Error::Field {
            what: "the length of a snapshot's extra data",
            value: extra_len as u64,
            allowed: "at most 1024 are allowed",
        });
    }
    let part = |at: usize, len: usize| {
        b.get(at..at + len)
            .ok_or(Error::Short("the snapshot table"))
    };
    let extra = part(FIXED, extra_len)?.to_vec();
    let text = |at, len| Ok(String::from_utf8_lossy(part(at, len)?).into_owned());
    let id_at = FIXED + extra_len;
    let extra_u64 = |at: usize| array(&extra, at).map(u64::from_be_bytes).ok();
    let snapshot = Snapshot {
        id: text(id_at, id_len)?,
        name: text(id_at + id_len, name_len)?,
        date: (u32_at(16)?, u32_at(20)?),
        vm_clock: u64_at(24)?,
        vm_state_size: extra_u64(0).unwrap_or(u32_at(32)?.into()),
        disk_size: extra_u64(8),
        icount: extra_u64(16).filter(|v| *v != u64::MAX),
        l1_offset: u64_at(0)?,
        l1_entries: u32_at(8)?,
        extra,
    };
    let len = (id_at + id_len + name_len).next_multiple_of(8);
    Ok((snapshot, len))
}

impl Snapshot {
    /// A new snapshot of a disk without a VM.
    pub(crate) fn new(id: String, name: String, date: (u32, u32), disk_size: u64) -> Snapshot {
        Snapshot {
            id,
            name,
            date,
            vm_clock: 0,
            vm_state_size: 0,
            disk_size: Some(disk_size),
            icount: None,
            l1_offset: 0,
            l1_entries: 0,
            extra: Vec::new(),
        }
    }

    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        let mut extra = self.extra.clone();
        extra.resize(extra.len().max(KNOWN_EXTRA), 0);
        extra[..8].copy_from_slice(&self.vm_state_size.to_be_bytes());
        if let Some(size) = self.disk_size {
            extra[8..16].copy_from_slice(&size.to_be_bytes());
        }
        extra[16..24].copy_from_slice(&self.icount.unwrap_or(u64::MAX).to_be_bytes());
        out.extend(self.l1_offset.to_be_bytes());
        out.extend(self.l1_entries.to_be_bytes());
        out.extend((self.id.len() as u16).to_be_bytes());
        out.extend((self.name.len() as u16).to_be_bytes());
        out.extend(self.date.0.to_be_bytes());
        out.extend(self.date.1.to_be_bytes());
        out.extend(self.vm_clock.to_be_bytes());
        let short = u32::try_from(self.vm_state_size).unwrap_or(u32::MAX);
        out.extend(short.to_be_bytes());
        out.extend((extra.len() as u32).to_be_bytes());
        out.extend(extra);
        out.extend(self.id.as_bytes());
        out.extend(self.name.as_bytes());
        out.resize(out.len().next_multiple_of(8), 0);
    }
}

impl Image {
    /// The snapshots inside the image, as the file has them, and the bytes that their table takes.
    pub(crate) async fn snapshot_table(&self) -> io::Result<(Vec<Snapshot>, u64)> {
        let header = self.header();
        let (n, offset) = (header.snapshots, header.snapshots_offset);
        if n == 0 {
            return Ok((Vec::new(), 0));
        }
        if n > MAX_SNAPSHOTS {
            return Err(Error::Field {
                what: "the number of snapshots",
                value: n.into(),
                allowed: "at most 65536 are allowed",
            }
            .into());
        }
        if !offset.is_multiple_of(self.cluster()) {
            return Err(Error::Field {
                what: "the offset of the snapshot table",
                value: offset,
                allowed: "a multiple of the size of a cluster is allowed",
            }
            .into());
        }
        let most = FIXED + MAX_EXTRA + 2 * usize::from(u16::MAX);
        let len = self
            .file
            .size()
            .saturating_sub(offset)
            .min(MAX_TABLE)
            .min(u64::from(n) * most as u64);
        // Most tables are short: a piece is read first.
        let mut have = len.min(64 << 10);
        loop {
            let bytes = self
                .read_metadata(offset, have, "the snapshot table")
                .await?;
            let (mut out, mut at) = (Vec::new(), 0);
            let result = loop {
                if out.len() == n as usize {
                    break Ok(());
                }
                match parse(&bytes[at.min(bytes.len())..]) {
                    Ok((s, len)) => {
                        out.push(s);
                        at += len;
                    }
                    Err(e) => break Err(e),
                }
            };
            match result {
                Ok(()) => return Ok((out, at as u64)),
                Err(Error::Short(_)) if have < len => have = len,
                Err(e) => return Err(e.into()),
            }
        }
    }

    /// The snapshots inside the image.
    pub async fn snapshots(&self) -> io::Result<Vec<Snapshot>> {
        Ok(self.snapshot_table().await?.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn snapshots_survive_being_written() {
        let mut s = Snapshot::new("1".into(), "before the upgrade".into(), (7, 8), 1 << 30);
        s.vm_state_size = 1 << 40;
        s.icount = Some(5);
        s.l1_offset = 0x30000;
        s.l1_entries = 2;
        let mut bytes = Vec::new();
        s.encode(&mut bytes);
        s.encode(&mut bytes);
        let (first, len) = parse(&bytes).unwrap();
        s.extra = first.extra.clone();
        assert_eq!((&first, 2 * len), (&s, bytes.len()));
        for cut in 0..len - 8 {
            assert!(parse(&bytes[..cut]).is_err());
        }
    }
}
