//! Driver `qcow2`: images in QEMU's format.
//!
//! Where the bytes are, and how that changes, is `vdisk_qcow2`'s knowledge. What lies in one piece in the file or
//! in the backing node, and may be read or written where it is, is resolved; the rest takes the slow path
//! through the engine.

use std::io;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use arc_swap::ArcSwapOption;
use futures_util::future::join_all;
use tokio::sync::Semaphore;
use vdisk_api::{BackingRef, Error, ErrorKind, NodeOptions, Qcow2Options, Result};
use vdisk_io::{Generation, IoFile, IoVecs, Reactor};
use vdisk_luks::SECTOR;
use vdisk_qcow2::{
    Children, Header, Image, Kind, Lookup, Options, Step, Storage, USUAL_HEADER, header_extent,
};

use super::{
    Direction, Driver, Limits, LocalFuture, OpenedDriver, Resolved, SlowReason, Told, reactor,
};
use crate::chain::beyond;
use crate::crypt::{Encrypted, unlock};
use crate::node::{Node, Source, WriteFlags, ZeroFlags};
use crate::runtime::Runtime;
use crate::secrets::Secrets;
use crate::status::BlockStatus;

/// Clusters that were given up are free for something else after this time.
const TIDY_DELAY: Duration = Duration::from_secs(1);

/// After a commit in the background that has failed, until the next one.
const COMMIT_AGAIN: Duration = Duration::from_secs(1);

/// Between copies that were put off and nobody waits for: guests' requests have the time in between.
const COPY_AGAIN: Duration = Duration::from_millis(5);

/// Clusters that are compressed at a time, of all images: as many as there are CPUs, and threads are left for other work.
static COMPRESSING: LazyLock<Semaphore> = LazyLock::new(|| {
    let cpus = std::thread::available_parallelism().map_or(1, |n| n.get());
    Semaphore::new(cpus.min(8))
});

/// A node that an image lies in, or that stands behind it.
pub struct NodeStorage(pub Arc<Node>);

impl Storage for NodeStorage {
    fn size(&self) -> u64 {
        self.0.size()
    }

    fn read(&self, offset: u64, iov: IoVecs) -> LocalFuture<'_, io::Result<()>> {
        Box::pin(self.0.read(offset, iov))
    }

    fn write(&self, offset: u64, iov: IoVecs) -> LocalFuture<'_, io::Result<()>> {
        Box::pin(self.0.write(offset, iov, WriteFlags::default()))
    }

    fn flush(&self) -> LocalFuture<'_, io::Result<()>> {
        Box::pin(self.0.flush())
    }

    fn discard(&self, offset: u64, len: u64) -> LocalFuture<'_, io::Result<()>> {
        Box::pin(self.0.discard(offset, len))
    }

    fn reserve(&self, offset: u64, len: u64) -> LocalFuture<'_, io::Result<()>> {
        Box::pin(self.0.reserve(offset, len))
    }

    fn grows(&self) -> bool {
        self.0.grows()
    }

    fn set_size(&self, size: u64) -> LocalFuture<'_, io::Result<()>> {
        Box::pin(async move {
            let size = size.next_multiple_of(self.0.storage_block_size().max(1));
            self.0.resize(size).await?;
            Ok(())
        })
    }

    fn write_zeroes(
        &self,
        offset: u64,
        len: u64,
        may_unmap: bool,
    ) -> LocalFuture<'_, io::Result<()>> {
        let flags = ZeroFlags {
            may_unmap,
            ..ZeroFlags::default()
        };
        Box::pin(self.0.write_zeroes(offset, len, flags))
    }

    fn quiesce(&self) -> LocalFuture<'_, ()> {
        Box::pin(vdisk_io::quiesce())
    }

    fn step(&self, step: Step, offset: u64, len: u64) -> Told<'_> {
        self.0.step(step.name(), offset, len)
    }
}

struct Qcow2 {
    image: Arc<Image>,
    file: Arc<Node>,
    /// Where guest data is: `file`, or the external data file.
    data: Arc<Node>,
    backing: ArcSwapOption<Node>,
    encrypted: Option<Arc<Encrypted>>,
    read_only: AtomicBool,
    name: String,
    /// Where changes are noted for the next daemon.
    runtime: Runtime,
    /// Something waits to give unused clusters back.
    tidying: Arc<AtomicBool>,
    /// Tables are being written that nobody has asked for.
    committing: Arc<AtomicBool>,
}

fn storage(node: Arc<Node>) -> Arc<dyn Storage> {
    Arc::new(NodeStorage(node))
}

/// What kind of error an image that cannot be used is.
pub fn image_error(what: &str, e: vdisk_qcow2::Error) -> Error {
    use vdisk_qcow2::Error as E;
    match e {
        E::Feature(_) | E::Encrypted(_) => {
            Error::not_supported(format!("{what}: the image cannot be opened: {e}"))
        }
        e => Error::new(
            ErrorKind::Corrupt,
            format!(
                "{what}: the image cannot be opened: {e}; look at it with 'vdiskctl image check', or set another driver"
            ),
        ),
    }
}

/// Reads the header and the L1 table; may block. With the image comes what decrypts its data, if that is encrypted.
pub fn open_image(
    what: &str,
    file: &Arc<Node>,
    data: Option<&Arc<Node>>,
    backing: Option<&Arc<Node>>,
    key: Option<(&Secrets, &str)>,
    mut options: Options,
) -> Result<(Image, Option<Arc<Encrypted>>)> {
    let cannot = |e: io::Error| Error::io(format_args!("{what}: its header cannot be read"), &e);
    let mut head = file.read_blocking(0, USUAL_HEADER).map_err(cannot)?;
    if header_extent(&head) > head.len() {
        head = file
            .read_blocking(0, header_extent(&head))
            .map_err(cannot)?;
    }
    let header = Header::parse(&head, file.size()).map_err(|e| image_error(what, e))?;
    let l1 = file
        .read_blocking(header.l1_offset, header.l1_entries as usize * 8)
        .map_err(cannot)?;
    options.block_size = file.storage_block_size().max(512) as usize;
    // Clusters may be smaller than blocks.
    file.announce_block_size(1 << header.cluster_bits);
    let storage = |n: &Arc<Node>| storage(n.clone());
    let encrypted = match (header.luks, key) {
        (Some(place), Some((secrets, secret))) => {
            let place = (place.offset, place.len);
            let (_, cipher) = unlock(what, file, place, secrets, secret)?;
            Some(Arc::new(Encrypted {
                below: data.unwrap_or(file).clone(),
                base: 0,
                cipher: cipher.into(),
            }))
        }
        _ => None,
    };
    let data = match &encrypted {
        Some(encrypted) => Some(encrypted.clone() as Arc<dyn Storage>),
        None => data.map(storage),
    };
    let children = Children {
        file: storage(file),
        data,
        backing: backing.map(storage),
    };
    let image = Image::new(header, &l1, children, options).map_err(|e| image_error(what, e))?;
    Ok((image, encrypted))
}

pub(super) fn open(
    name: &str,
    node: &NodeOptions,
    options: &Qcow2Options,
    children: &[Arc<Node>],
    runtime: &Runtime,
) -> Result<OpenedDriver> {
    let what = format!("node '{name}'");
    // In the order of the roles: file, data-file, backing.
    let mut roles = children.iter().cloned();
    let file = roles
        .next()
        .ok_or_else(|| Error::failed(format!("{what}: driver qcow2 has no child")))?;
    let data_file = options.data_file.as_ref().and_then(|_| roles.next());
    let backing = roles.next();
    let read_only = node.read_only || (node.auto_read_only && file.is_read_only());
    for child in [Some(&file), data_file.as_ref()].into_iter().flatten() {
        if !read_only && child.is_read_only() {
            return Err(Error::invalid(format!(
                "{what} is to be written, but its child '{}' is read-only: set read-only=on here, or add that without it",
                child.name()
            )));
        }
    }
    let is_active = matches!(options.backing, BackingRef::Active(_));
    for child in children {
        let is_below = backing.as_ref().is_some_and(|b| Arc::ptr_eq(b, child));
        if is_active && is_below {
            continue;
        }
        if !child.is_read_only() && (read_only || is_below) {
            return Err(Error::invalid(format!(
                "{what}: its child '{}' can be written, which would change the image under it: add that with read-only=on",
                child.name()
            )));
        }
    }
    let defaults = Options::default();
    let image_options = Options {
        l2_cache: options.l2_cache_size.unwrap_or(defaults.l2_cache),
        refcount_cache: options
            .refcount_cache_size
            .unwrap_or(defaults.refcount_cache),
        pass_discard_request: options
            .pass_discard_request
            .unwrap_or(node.discard == vdisk_api::Discard::Unmap),
        pass_discard_snapshot: options.pass_discard_snapshot.unwrap_or(true),
        pass_discard_other: options.pass_discard_other.unwrap_or(false),
        discard_no_unref: options.discard_no_unref,
        // What is behind it is left out here, and may be there another time.
        hides_backing: options.backing == BackingRef::None,
        ..defaults
    };
    let key = options.key_secret.as_deref();
    let (image, encrypted) = open_image(
        &what,
        &file,
        data_file.as_ref(),
        backing.as_ref(),
        key.map(|id| (&runtime.secrets, id)),
        image_options,
    )?;
    let header = image.header();
    match (header.luks, key) {
        (Some(_), None) => {
            return Err(Error::invalid(format!(
                "{what}: the image is encrypted: give 'encrypt.format' (luks) and 'encrypt.key-secret', the secret that opens it"
            )));
        }
        (None, Some(_)) => {
            return Err(Error::invalid(format!(
                "{what}: the image is not encrypted: leave out the option 'encrypt'"
            )));
        }
        _ => {}
    }
    match (header.external_data, &data_file) {
        (true, None) => {
            return Err(Error::invalid(format!(
                "{what}: the image has its data in another file{}, and names inside images are not followed: give it as 'data-file' if you trust it, or allow its folder with 'images.follow' in vdiskd.toml",
                match &header.data_file {
                    Some(named) => format!(", '{}'", named.escape_debug()),
                    None => String::new(),
                }
            )));
        }
        (false, Some(_)) => {
            return Err(Error::invalid(format!(
                "{what}: the image has its data in itself: leave out the option 'data-file'"
            )));
        }
        _ => {}
    }
    if options.discard_no_unref && header.version < 3 {
        return Err(Error::not_supported(format!(
            "{what}: the image has version 2, where a discarded cluster cannot keep its place: leave out 'discard-no-unref', or make it version 3 with 'vdiskctl image amend'"
        )));
    }
    match (&header.backing_file, &options.backing) {
        (Some(named), BackingRef::Unset) => {
            return Err(Error::invalid(format!(
                "{what}: the image names a backing file, '{}', and names inside images are not followed: give it as 'backing' if you trust it, allow its folder with 'images.follow' in vdiskd.toml, or set backing to the empty string to read zeroes in its place",
                named.escape_debug()
            )));
        }
        (None, BackingRef::Node(_) | BackingRef::Active(_)) => {
            tracing::info!(
                node = name,
                "the image names no backing file, but is given one"
            );
        }
        _ => {}
    }
    if header.corrupt && !read_only {
        return Err(Error::new(
            ErrorKind::Corrupt,
            format!(
                "{what}: the image is marked as corrupt and cannot be written: repair it with 'vdiskctl image repair', or set read-only=on"
            ),
        ));
    }
    if header.corrupt {
        tracing::warn!(
            node = name,
            "the image is marked as corrupt; repair it with 'vdiskctl image repair'"
        );
    }
    Ok(OpenedDriver {
        size: image.size(),
        read_only,
        driver: Box::new(Qcow2 {
            image: Arc::new(image),
            backing: backing.into(),
            read_only: AtomicBool::new(read_only),
            name: name.to_owned(),
            runtime: runtime.clone(),
            tidying: Arc::default(),
            committing: Arc::default(),
            encrypted,
            data: data_file.unwrap_or_else(|| file.clone()),
            file,
        }),
    })
}

/// Where changes of the image in this file are noted: by what the file is, not by its name.
fn redo_path(name: &str, file: &Node, runtime: &Runtime) -> Option<PathBuf> {
    use std::os::unix::fs::MetadataExt;
    let Some(dir) = &runtime.dir else {
        tracing::warn!(
            node = name,
            "there is no runtime folder (--runtime-dir): writes that were not flushed are lost if the daemon is killed"
        );
        return None;
    };
    let meta = runtime.descriptors.metadata(&file.filename()?).ok()?;
    let (dev, inode) = match meta.rdev() {
        0 => (meta.dev(), meta.ino()),
        device => (device, 0),
    };
    Some(dir.join(format!("qcow2-{dev:x}-{inode:x}.redo")))
}

/// A request of our own, as long as it lives.
struct Counted(Rc<Reactor>, Generation);

impl Counted {
    fn new(reactor: &Rc<Reactor>) -> Counted {
        Counted(reactor.clone(), reactor.in_flight().begin())
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.in_flight().end(self.1, 1);
    }
}

/// Says that what was done in the background has ended, however it did.
struct Busy(Arc<AtomicBool>);

impl Busy {
    /// None if it is being done already.
    fn begin(busy: &Arc<AtomicBool>) -> Option<(Busy, Rc<Reactor>)> {
        if busy.swap(true, Ordering::AcqRel) {
            return None;
        }
        let guard = Busy(busy.clone());
        Some((guard, reactor().ok()?))
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}

impl Qcow2 {
    /// Has unused clusters given back a little later: that waits for all requests, this one included.
    fn tidy_later(&self) {
        if !self.image.is_untidy() {
            return;
        }
        let Some((guard, reactor)) = Busy::begin(&self.tidying) else {
            return;
        };
        // A node that is removed meanwhile closes its file.
        let (image, file) = (Arc::downgrade(&self.image), self.file.filename());
        let sleep = reactor.sleep(TIDY_DELAY);
        reactor.spawn(async move {
            let _guard = guard;
            sleep.await;
            if let Some(image) = image.upgrade()
                && let Err(error) = image.tidy().await
            {
                tracing::warn!(image = file, %error, "clusters cannot be given back");
            }
        });
    }

    /// Has changed tables written while requests go on, before there are so many that requests must wait.
    fn commit_soon(&self) {
        if !self.image.is_filling() {
            return;
        }
        let Some((guard, reactor)) = Busy::begin(&self.committing) else {
            return;
        };
        let (image, file) = (Arc::downgrade(&self.image), self.file.filename());
        // Whoever waits for all that is written waits for this.
        let counted = Counted::new(&reactor);
        let this = reactor.clone();
        reactor.spawn(async move {
            let _guard = guard;
            let mut counted = Some(counted);
            // An image that is closed meanwhile goes, and its file with it.
            while let Some(open) = image.upgrade() {
                let more = open.commit_early().await;
                drop((open, counted.take()));
                match more {
                    Ok(true) => this.sleep(COPY_AGAIN).await,
                    Ok(false) => break,
                    Err(error) => {
                        tracing::warn!(image = file, %error, "tables cannot be written, which is tried again");
                        this.sleep(COMMIT_AGAIN).await;
                        break;
                    }
                }
                counted = Some(Counted::new(&this));
            }
        });
    }

    /// Brings what an earlier daemon has noted into an image that is opened for reading.
    async fn redo(&self, redo: &Path) -> io::Result<()> {
        self.make_writable()
            .map_err(|e| io::Error::other(e.message))?;
        let mut done = self.image.activate(Some(redo)).await;
        if done.is_ok() {
            done = self.image.close().await;
        }
        self.make_read_only();
        done
    }

    /// Compresses a cluster. None if it does not become smaller.
    async fn compress(&self, iov: &IoVecs) -> Option<Vec<u8>> {
        let Some(workers) = &self.runtime.workers else {
            return self.image.compressor(iov)();
        };
        let _turn = COMPRESSING.acquire().await;
        let work = self.image.compressor(iov);
        workers.spawn_blocking(work).await.unwrap_or_default()
    }

    async fn write_clusters(&self, offset: u64, iov: IoVecs) -> io::Result<()> {
        let cluster = self.image.cluster() as usize;
        let starts = (0..iov.len()).step_by(cluster);
        let parts: Vec<IoVecs> = starts
            .map(|at| iov.slice(at, cluster.min(iov.len() - at)))
            .collect();
        let small = join_all(parts.iter().map(|p| self.compress(p))).await;
        let mut at = offset;
        for (part, small) in parts.into_iter().zip(small) {
            let len = part.len() as u64;
            self.image.write_packed(at, part, small).await?;
            at += len;
        }
        Ok(())
    }

    async fn changed(&self, result: io::Result<()>, durable: bool) -> io::Result<()> {
        result?;
        if durable {
            self.image.flush().await?;
        }
        self.commit_soon();
        self.tidy_later();
        Ok(())
    }
}

impl Driver for Qcow2 {
    fn name(&self) -> &'static str {
        "qcow2"
    }

    fn limits(&self) -> Limits {
        let backing = self.backing.load();
        let backing = backing.as_ref().map_or(Limits::NONE, |b| b.limits());
        let data = self.data.limits();
        Limits {
            request_alignment: if self.encrypted.is_some() {
                SECTOR as u64
            } else {
                1
            },
            memory_alignment: data.memory_alignment.max(backing.memory_alignment),
            zero_alignment: self.image.cluster(),
        }
    }

    fn storage_block_size(&self) -> u64 {
        1
    }

    fn announce_block_size(&self, block_size: u64) {
        self.data.announce_block_size(block_size);
    }

    #[inline]
    fn anticipate(&self, offset: u64) -> bool {
        self.image.anticipate(offset)
    }

    fn backing(&self) -> Option<Arc<Node>> {
        self.backing.load_full()
    }

    fn resolve(
        &self,
        direction: Direction,
        offset: u64,
        len: u64,
        then: &mut dyn FnMut(Resolved<'_>),
    ) {
        if self.resolve_here(direction, offset, len, then) {
            return;
        }
        match &*self.backing.load() {
            Some(b) => match beyond(b, offset, len) {
                Some(end) => then(end),
                None => b.resolve_range(direction, offset, len, then),
            },
            None => then(Resolved::Zeroes),
        }
    }

    #[inline]
    fn resolve_here(
        &self,
        direction: Direction,
        offset: u64,
        len: u64,
        then: &mut dyn FnMut(Resolved<'_>),
    ) -> bool {
        let mut slow = |reason| {
            then(Resolved::Slow(reason));
            true
        };
        let m = match self.image.lookup(offset, len) {
            Ok(Lookup::Mapped(m)) if m.len == len => m,
            Ok(Lookup::Mapped(_)) => return slow(SlowReason::Scattered),
            Ok(Lookup::NeedsTable { .. }) => return slow(SlowReason::Metadata),
            Err(_) => return slow(SlowReason::Refused),
        };
        match (direction, m.kind) {
            (Direction::Read, Kind::Unallocated) => return false,
            (Direction::Write, Kind::Data(_)) if !m.writable => {
                return slow(SlowReason::Allocates);
            }
            (Direction::Write, Kind::Data(_)) if self.encrypted.is_some() => {
                return slow(SlowReason::Encrypted);
            }
            (Direction::Write, Kind::Data(host)) => {
                self.image.mark_dirty(offset, len);
                self.data.resolve_range(direction, host, len, &mut |mut r| {
                    if let Resolved::Direct { settled, .. } = &mut r {
                        *settled &= !self.image.is_dirty();
                    }
                    then(r);
                });
            }
            (Direction::Write, _) => return slow(SlowReason::Allocates),
            (Direction::Read, Kind::Data(host)) => match &self.encrypted {
                Some(encrypted) => encrypted.resolve_read(host, len, then),
                None => self.data.resolve_range(direction, host, len, then),
            },
            (Direction::Read, Kind::Compressed { .. }) => return slow(SlowReason::Compressed),
            (Direction::Read, Kind::Zero) => then(Resolved::Zeroes),
        }
        true
    }

    fn slow_reason(&self, direction: Direction) -> Option<SlowReason> {
        match (&self.encrypted, direction) {
            (Some(_), Direction::Write) => Some(SlowReason::Encrypted),
            _ => self.data.slow_reason(direction),
        }
    }

    fn read(&self, offset: u64, iov: IoVecs) -> LocalFuture<'_, io::Result<()>> {
        Box::pin(self.image.read(offset, iov))
    }

    fn write(
        &self,
        offset: u64,
        iov: IoVecs,
        flags: WriteFlags,
    ) -> LocalFuture<'_, io::Result<()>> {
        Box::pin(async move {
            let result = self.image.write(offset, iov).await;
            self.changed(result, flags.durable).await
        })
    }

    fn flush(&self) -> LocalFuture<'_, io::Result<()>> {
        Box::pin(async move {
            if self.read_only.load(Ordering::Relaxed) {
                // An earlier daemon may have written to it.
                self.data.flush().await?;
                return self.file.flush().await;
            }
            self.image.flush().await?;
            self.tidy_later();
            Ok(())
        })
    }

    fn write_behind(&self) -> LocalFuture<'_, ()> {
        Box::pin(async move {
            self.file.write_behind().await;
            if !Arc::ptr_eq(&self.file, &self.data) {
                self.data.write_behind().await;
            }
        })
    }

    fn discard(&self, offset: u64, len: u64) -> LocalFuture<'_, io::Result<()>> {
        Box::pin(async move {
            let result = self.image.discard(offset, len).await;
            self.changed(result, false).await
        })
    }

    fn write_zeroes(
        &self,
        offset: u64,
        len: u64,
        flags: ZeroFlags,
    ) -> LocalFuture<'_, io::Result<()>> {
        Box::pin(async move {
            let result = self.image.write_zeroes(offset, len, flags.may_unmap).await;
            self.changed(result, flags.durable).await
        })
    }

    fn write_compressed(&self, offset: u64, iov: IoVecs) -> LocalFuture<'_, io::Result<()>> {
        Box::pin(async move {
            let result = self.write_clusters(offset, iov).await;
            self.changed(result, false).await
        })
    }

    fn status<'a>(
        &'a self,
        offset: u64,
        len: u64,
        base: Option<&'a Arc<Node>>,
    ) -> LocalFuture<'a, io::Result<BlockStatus>> {
        Box::pin(async move {
            let found = self.image.map(offset..offset + len, 1).await?;
            let Some((_, m)) = found.first() else {
                return Ok(BlockStatus::data(1));
            };
            let own = BlockStatus::data(m.len);
            let backing = self.backing.load_full();
            Ok(match (m.kind, &backing) {
                (Kind::Data(_) | Kind::Compressed { .. }, _) => own,
                (Kind::Zero, _) => BlockStatus { zero: true, ..own },
                (Kind::Unallocated, Some(b)) if offset < b.size() => {
                    let len = m.len.min(b.size() - offset);
                    let below = b.status(offset, len, base).await?;
                    let is_base = base.is_some_and(|base| Arc::ptr_eq(base, b));
                    BlockStatus {
                        own: below.own && base.is_some() && !is_base,
                        ..below
                    }
                }
                (Kind::Unallocated, below) => BlockStatus {
                    // If it is opened another time with the backing file that it names, it has other data.
                    zero: below.is_some() || !self.image.has_backing(),
                    // Beyond the end of a backing file that is above the base.
                    own: match (below, base) {
                        (Some(below), Some(base)) => !Arc::ptr_eq(below, base),
                        _ => false,
                    },
                    ..own
                },
            })
        })
    }

    fn resize(&self, size: u64) -> LocalFuture<'_, io::Result<u64>> {
        Box::pin(async move {
            self.image.resize(size).await?;
            self.tidy_later();
            Ok(size)
        })
    }

    fn shares_with(&self, file: &IoFile) -> bool {
        self.encrypted.is_none() && self.data.shares_with(file)
    }

    fn share<'a>(
        &'a self,
        offset: u64,
        source: Source<'a>,
        missing: bool,
    ) -> LocalFuture<'a, io::Result<()>> {
        Box::pin(async move {
            let put = |host, from, len| -> LocalFuture<'_, io::Result<()>> {
                let part = source.part(from, len);
                Box::pin(self.data.share(host, part, false))
            };
            let result = self.image.share(offset, source.len, missing, &put).await;
            self.changed(result, false).await
        })
    }

    fn populate(
        &self,
        offset: u64,
        len: u64,
        data: Option<IoVecs>,
    ) -> LocalFuture<'_, io::Result<()>> {
        Box::pin(async move {
            let result = self.image.populate(offset, len, data).await;
            self.changed(result, false).await
        })
    }

    fn set_backing(
        &self,
        node: Option<Arc<Node>>,
        named: Option<(String, String)>,
    ) -> LocalFuture<'_, io::Result<()>> {
        Box::pin(async move {
            let storage = node.clone().map(storage);
            self.image.set_backing(storage, named).await?;
            self.backing.store(node);
            Ok(())
        })
    }

    fn make_writable(&self) -> Result<()> {
        if self.image.header().corrupt {
            return Err(Error::new(
                ErrorKind::Corrupt,
                "the image is marked as corrupt and cannot be written: repair it with 'vdiskctl image repair'",
            ));
        }
        self.file.make_writable()?;
        if let Err(e) = self.data.make_writable() {
            self.file.make_read_only();
            return Err(e);
        }
        self.read_only.store(false, Ordering::Relaxed);
        Ok(())
    }

    fn make_read_only(&self) {
        self.read_only.store(true, Ordering::Relaxed);
        self.data.make_read_only();
        if !Arc::ptr_eq(&self.data, &self.file) {
            self.file.make_read_only();
        }
    }

    fn below(&self) -> Vec<Arc<Node>> {
        let mut below = vec![self.file.clone(), self.data.clone()];
        below.extend(self.backing.load_full());
        below
    }

    fn image(&self) -> Option<Arc<Image>> {
        Some(self.image.clone())
    }

    fn filename(&self) -> Option<String> {
        self.file.filename()
    }

    fn activate(&self) -> LocalFuture<'_, io::Result<()>> {
        Box::pin(async move {
            let unfinished = self.image.header().has_unfinished_changes();
            if self.read_only.load(Ordering::Relaxed) && !unfinished {
                return Ok(());
            }
            let redo = redo_path(&self.name, &self.file, &self.runtime);
            if !self.read_only.load(Ordering::Relaxed) {
                return self.image.activate(redo.as_deref()).await;
            }
            match redo.filter(|r| r.exists()) {
                None => Ok(()),
                Some(redo) => self.redo(&redo).await.map_err(|e| {
                    io::Error::other(format!(
                        "the daemon was killed while it wrote to this image, and what was not flushed cannot be put into it now: {e}"
                    ))
                }),
            }
        })
    }

    fn deactivate(&self) -> LocalFuture<'_, io::Result<()>> {
        Box::pin(self.image.close())
    }
}
