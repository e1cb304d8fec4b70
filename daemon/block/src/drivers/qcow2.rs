//! Driver `qcow2`: images in QEMU's format, for reading.
//!
//! Where the bytes are is `vdisk_qcow2`'s knowledge; here are the requests: what lies in one piece in the
//! file or in the backing node is resolved, the rest is put together by the slow path.
//!
//! Invariant: the image does not change while it is open. Both children must be read-only, so tables that
//! were read once stay right, and a resolved mapping needs no protection.

use std::io;
use std::sync::{Arc, Mutex};

use tokio::sync::Semaphore;
use vdisk_api::{BackingRef, Error, ErrorKind, NodeOptions, Qcow2Options, Result};
use vdisk_io::IoVecs;
use vdisk_qcow2::{Header, Image, Kind, Limits as ImageLimits, Lookup, MAX_HEADER};

use super::{
    Direction, Driver, Limits, LocalFuture, OpenedDriver, Resolved, SlowReason, zero_in_turns,
};
use crate::node::{Node, WriteFlags, ZeroFlags};

/// Clusters of one image that are decompressed at a time: bounds the memory that guests can ask for.
const MAX_DECOMPRESSING: usize = 4;

struct Qcow2 {
    image: Image,
    file: Arc<Node>,
    backing: Option<Arc<Node>>,
    decompressing: Semaphore,
    /// The cluster that was decompressed last: its guest offset and its data.
    decompressed: Mutex<Option<(u64, Arc<Vec<u8>>)>>,
}

pub(super) fn open(
    name: &str,
    node: &NodeOptions,
    options: &Qcow2Options,
    children: &[Arc<Node>],
) -> Result<OpenedDriver> {
    let what = format!("node '{name}'");
    let file = children
        .first()
        .cloned()
        .ok_or_else(|| Error::failed(format!("{what}: driver qcow2 has no child")))?;
    let backing = children.get(1).cloned();
    if !node.read_only && !node.auto_read_only {
        return Err(Error::not_supported(format!(
            "{what}: qcow2 images cannot be written, only read: set read-only=on"
        )));
    }
    for child in children {
        if !child.is_read_only() {
            return Err(Error::invalid(format!(
                "{what}: its child '{}' can be written, which would change the image under it: add that with read-only=on",
                child.name()
            )));
        }
    }
    let cannot = |e: io::Error| Error::io(format_args!("{what}: its header cannot be read"), &e);
    let bad = |e: vdisk_qcow2::Error| match e {
        vdisk_qcow2::Error::Feature(_) | vdisk_qcow2::Error::Encrypted(_) => {
            Error::not_supported(format!("{what}: the image cannot be opened: {e}"))
        }
        e => Error::new(
            ErrorKind::Corrupt,
            format!(
                "{what}: the image cannot be opened: {e}; look at it with 'qemu-img check', or set another driver"
            ),
        ),
    };
    let head = file
        .read_blocking(0, file.size().min(MAX_HEADER as u64) as usize)
        .map_err(cannot)?;
    let header = Header::parse(&head, file.size()).map_err(bad)?;
    match (&header.backing_file, &options.backing) {
        (Some(named), BackingRef::Unset) => {
            return Err(Error::invalid(format!(
                "{what}: the image names a backing file, '{}', and names inside images are not followed: give it as 'backing' if you trust it, or set backing to the empty string to read zeroes in its place",
                named.escape_debug()
            )));
        }
        (None, BackingRef::Node(_)) => {
            tracing::info!(
                node = name,
                "the image names no backing file, but is given one"
            );
        }
        _ => {}
    }
    if header.corrupt {
        tracing::warn!(
            node = name,
            "the image is marked as corrupt; repair it with 'qemu-img check -r all'"
        );
    }
    let l1 = file
        .read_blocking(header.l1_offset, header.l1_entries as usize * 8)
        .map_err(cannot)?;
    let limits = ImageLimits {
        l2_cache: options
            .l2_cache_size
            .unwrap_or(ImageLimits::default().l2_cache),
    };
    let image = Image::new(header, &l1, limits).map_err(bad)?;
    Ok(OpenedDriver {
        size: image.header().size,
        read_only: true,
        driver: Box::new(Qcow2 {
            image,
            file,
            backing,
            decompressing: Semaphore::new(MAX_DECOMPRESSING),
            decompressed: Mutex::default(),
        }),
    })
}

fn corrupt(e: vdisk_qcow2::Error) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, e)
}

fn read_only<T>() -> LocalFuture<'static, io::Result<T>> {
    Box::pin(async { Err(io::Error::from_raw_os_error(libc::EROFS)) })
}

/// Reads what the node has of the range; beyond its end there are zeroes.
async fn read_or_zero(node: &Node, offset: u64, iov: IoVecs) -> io::Result<()> {
    let len = iov.len();
    let have = node.size().saturating_sub(offset).min(len as u64) as usize;
    zero_in_turns(&iov.slice(have, len - have)).await;
    if have == 0 {
        return Ok(());
    }
    node.read(offset, iov.slice(0, have)).await
}

impl Qcow2 {
    async fn load_table(&self, index: usize, offset: u64) -> io::Result<()> {
        let cluster = self.image.cluster();
        if offset
            .checked_add(cluster)
            .is_none_or(|end| end > self.file.size())
        {
            return Err(corrupt(vdisk_qcow2::Error::Short("an L2 table")));
        }
        let table = IoVecs::zeroed(cluster as usize, 4096);
        self.file.read(offset, table.clone()).await?;
        let mut bytes = vec![0; cluster as usize];
        table.copy_to_slice(0, &mut bytes);
        self.image.insert_table(index, &bytes).map_err(corrupt)
    }

    /// The whole cluster around `at`, whose compressed data is here.
    async fn decompress(&self, at: u64, offset: u64, len: u64) -> io::Result<Arc<Vec<u8>>> {
        let start = at & !(self.image.cluster() - 1);
        let last = || {
            let last = self.decompressed.lock().unwrap_or_else(|e| e.into_inner());
            last.as_ref()
                .and_then(|(cluster, data)| (*cluster == start).then(|| data.clone()))
        };
        if let Some(data) = last() {
            return Ok(data);
        }
        let _permit = self.decompressing.acquire().await;
        // Somebody else may have done it meanwhile.
        if let Some(data) = last() {
            return Ok(data);
        }
        let raw = IoVecs::zeroed(len as usize, 512);
        read_or_zero(&self.file, offset, raw.clone()).await?;
        let mut bytes = vec![0; len as usize];
        raw.copy_to_slice(0, &mut bytes);
        let data = Arc::new(self.image.decompress(at, &bytes).map_err(corrupt)?);
        let mut last = self.decompressed.lock().unwrap_or_else(|e| e.into_inner());
        *last = Some((start, data.clone()));
        Ok(data)
    }

    async fn read_all(&self, offset: u64, iov: IoVecs) -> io::Result<()> {
        let mut done = 0;
        while done < iov.len() {
            let at = offset + done as u64;
            let m = match self
                .image
                .lookup(at, (iov.len() - done) as u64)
                .map_err(corrupt)?
            {
                Lookup::Mapped(m) => m,
                Lookup::NeedsTable { index, offset } => {
                    self.load_table(index, offset).await?;
                    continue;
                }
            };
            let len = m.len as usize;
            let part = iov.slice(done, len);
            match (m.kind, &self.backing) {
                (Kind::Data(host), _) => read_or_zero(&self.file, host, part).await?,
                (Kind::Unallocated, Some(backing)) => read_or_zero(backing, at, part).await?,
                (Kind::Zero | Kind::Unallocated, _) => zero_in_turns(&part).await,
                (Kind::Compressed { offset, len: raw }, _) => {
                    let data = self.decompress(at, offset, raw).await?;
                    let within = (at & (self.image.cluster() - 1)) as usize;
                    part.copy_from_slice(0, &data[within..within + len]);
                }
            }
            done += len;
        }
        Ok(())
    }
}

impl Driver for Qcow2 {
    fn name(&self) -> &'static str {
        "qcow2"
    }

    fn limits(&self) -> Limits {
        let backing = self.backing.as_ref().map_or(Limits::NONE, |b| b.limits());
        let file = self.file.limits();
        Limits {
            request_alignment: 1,
            memory_alignment: file.memory_alignment.max(backing.memory_alignment),
            zero_alignment: self.image.cluster(),
        }
    }

    fn storage_block_size(&self) -> u64 {
        1
    }

    #[inline]
    fn resolve(&self, direction: Direction, offset: u64, len: u64) -> Resolved<'_> {
        let m = match self.image.lookup(offset, len) {
            Ok(Lookup::Mapped(m)) if m.len == len => m,
            Ok(Lookup::Mapped(_)) => return Resolved::Slow(SlowReason::Scattered),
            Ok(Lookup::NeedsTable { .. }) => return Resolved::Slow(SlowReason::Metadata),
            Err(_) => return Resolved::Slow(SlowReason::Refused),
        };
        match (m.kind, &self.backing) {
            (Kind::Data(host), _) => self.file.resolve_range(direction, host, len),
            (Kind::Compressed { .. }, _) => Resolved::Slow(SlowReason::Compressed),
            (Kind::Unallocated, Some(b)) if offset < b.size() => match offset + len <= b.size() {
                true => b.resolve_range(direction, offset, len),
                false => Resolved::Slow(SlowReason::Scattered),
            },
            (Kind::Zero | Kind::Unallocated, _) => Resolved::Zeroes,
        }
    }

    fn slow_reason(&self, direction: Direction) -> Option<SlowReason> {
        self.file.slow_reason(direction)
    }

    fn read(&self, offset: u64, iov: IoVecs) -> LocalFuture<'_, io::Result<()>> {
        Box::pin(self.read_all(offset, iov))
    }

    fn write(&self, _: u64, _: IoVecs, _: WriteFlags) -> LocalFuture<'_, io::Result<()>> {
        read_only()
    }

    fn flush(&self) -> LocalFuture<'_, io::Result<()>> {
        // Nothing was written.
        Box::pin(async { Ok(()) })
    }

    fn discard(&self, _: u64, _: u64) -> LocalFuture<'_, io::Result<()>> {
        read_only()
    }

    fn write_zeroes(&self, _: u64, _: u64, _: ZeroFlags) -> LocalFuture<'_, io::Result<()>> {
        read_only()
    }

    fn resize(&self, _: u64) -> LocalFuture<'_, io::Result<u64>> {
        read_only()
    }

    fn filename(&self) -> Option<String> {
        self.file.filename()
    }
}
