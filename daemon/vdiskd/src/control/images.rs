//! Images: in files that are not part of the graph, and those that nodes serve.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value as Json, json};
use vdisk_api::{
    AmendImage, CreateImage, Encryption, Error, ErrorKind, ImageFile, ImageFormat,
    ImagePreallocation, KeyHash, Map, NewFormat, Qcow2Create, RepairWhat, Reply, Result,
    SnapshotAction, measure_from_map,
};
use vdisk_block::jobs::JobState;
use vdisk_block::{
    DrainGuard, Encrypted, Node, NodeStorage, Runtime, Standalone, WriteFlags, image_failed,
    luks_failed, read_header,
};
use vdisk_io::{IoThread, IoVecs};
use vdisk_luks::{Cipher, Fingerprint, FormatOptions, Hash, Header, SECTOR};
use vdisk_qcow2::{
    Amend, CHECK_MEMORY, Children, Compression, CreateOptions, Image, Kind, Preallocation,
    Progress, Repair, Report, Snapshot, Storage,
};

use super::jobs::progress_of;
use super::{Control, Event, Handle};

/// Pieces of a map that are told at once.
const MAX_MAP: usize = 100_000;

/// Bytes that are filled with zeroes at a time.
const FILL: u64 = 4 << 20;

fn map(v: Json) -> Map {
    match v {
        Json::Object(m) => m,
        _ => Map::new(),
    }
}

async fn blocking<T: Send + 'static>(f: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(f)
        .await
        .map_err(|e| Error::failed(format!("opening was interrupted: {e}")))?
}

async fn on_thread<F, Fut, T>(thread: &IoThread, what: &str, f: F) -> Result<T>
where
    F: FnOnce() -> Fut + Send + 'static,
    Fut: Future<Output = io::Result<T>> + 'static,
    T: Send + 'static,
{
    thread
        .run_async(move |_| f())
        .await
        .map_err(|e| Error::failed(format!("{what}: {e}")))?
        .map_err(|e| image_failed(what, &e))
}

fn qcow2_options(options: &CreateImage, q: &Qcow2Create, luks: Option<Vec<u8>>) -> CreateOptions {
    CreateOptions {
        version: q.version,
        cluster_size: q.cluster_size,
        refcount_bits: q.refcount_bits,
        extended_l2: q.extended_l2,
        compression: match q.zstd {
            true => Compression::Zstd,
            false => Compression::Deflate,
        },
        lazy_refcounts: q.lazy_refcounts,
        backing: q.backing.clone(),
        preallocation: match options.preallocation {
            ImagePreallocation::Off => Preallocation::Off,
            ImagePreallocation::Metadata => Preallocation::Metadata,
            ImagePreallocation::Falloc => Preallocation::Falloc,
            ImagePreallocation::Full => Preallocation::Full,
        },
        data_file: q.data_file.clone(),
        data_file_raw: q.data_file_raw,
        luks,
        ..CreateOptions::new(options.size)
    }
}

fn luks_options(e: &Encryption) -> FormatOptions {
    FormatOptions {
        aes_bits: e.aes_bits,
        hash: match e.hash {
            KeyHash::Sha1 => Hash::Sha1,
            KeyHash::Sha256 => Hash::Sha256,
            KeyHash::Sha512 => Hash::Sha512,
        },
        iteration_time: Duration::from_millis(e.iter_time),
    }
}

/// A file that becomes an image, or a part of one.
struct NewFile {
    file: Standalone,
    path: String,
    /// It was not there before.
    is_new: bool,
}

impl NewFile {
    /// Opens or makes it. What is there already is left alone unless `overwrite` is set.
    fn open(path: String, overwrite: bool, runtime: &Runtime) -> Result<NewFile> {
        let what = format!("image '{path}'");
        runtime.directories.check_new(&what, Path::new(&path))?;
        let mut open = std::fs::OpenOptions::new();
        let is_new = match open.write(true).create_new(true).open(&path) {
            Ok(_) => true,
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                if !overwrite {
                    return Err(Error::exists(format!(
                        "{what} exists already, and would be lost: choose another name, or set 'overwrite'"
                    )));
                }
                false
            }
            Err(e) => return Err(Error::io(format_args!("{what} cannot be made"), &e)),
        };
        match Standalone::open(&path, true, false, runtime) {
            Ok(file) => Ok(NewFile { file, path, is_new }),
            Err(e) => {
                if is_new {
                    let _ = std::fs::remove_file(&path);
                }
                Err(e)
            }
        }
    }

    async fn close(self, keep: bool) {
        self.file.close().await;
        if !keep && self.is_new {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// Empties a file and gives it a size.
async fn set_new_size(storage: &dyn Storage, size: u64) -> io::Result<()> {
    if storage.grows() {
        storage.set_size(0).await?;
        return storage.set_size(size).await;
    }
    match storage.size() < size {
        true => Err(io::ErrorKind::StorageFull.into()),
        false => Ok(()),
    }
}

/// Writes zeroes, piece by piece: every block has its place and is written from then on.
async fn fill(storage: &dyn Storage, size: u64, progress: Progress<'_>) -> io::Result<()> {
    let zeroes = IoVecs::zeroed(FILL as usize, 4096);
    for at in (0..size).step_by(FILL as usize) {
        progress(at)?;
        let n = FILL.min(size - at) as usize;
        storage.write(at, zeroes.slice(0, n)).await?;
    }
    Ok(())
}

async fn make_raw(
    file: Arc<Node>,
    options: &CreateImage,
    progress: Progress<'_>,
) -> io::Result<()> {
    let size = options.size;
    set_new_size(&NodeStorage(file.clone()), size).await?;
    match options.preallocation {
        ImagePreallocation::Off | ImagePreallocation::Metadata => {}
        ImagePreallocation::Falloc => file.reserve(0, size).await?,
        ImagePreallocation::Full => {
            file.reserve(0, size).await?;
            fill(&NodeStorage(file.clone()), size, progress).await?;
        }
    }
    file.flush().await
}

async fn make_luks(
    file: Arc<Node>,
    options: &CreateImage,
    header: &[u8],
    cipher: Cipher,
    progress: Progress<'_>,
) -> io::Result<()> {
    let base = header.len() as u64;
    let total = base
        .checked_add(options.size)
        .ok_or_else(|| io::Error::from(io::ErrorKind::StorageFull))?;
    set_new_size(&NodeStorage(file.clone()), total).await?;
    if options.preallocation != ImagePreallocation::Off {
        file.reserve(0, total).await?;
    }
    if options.preallocation == ImagePreallocation::Full {
        let data = Encrypted {
            below: file.clone(),
            base,
            cipher: cipher.into(),
        };
        fill(&data, options.size, progress).await?;
    }
    let header = IoVecs::from_slice(header);
    file.write(0, header, WriteFlags::default()).await?;
    file.flush().await
}

/// That of a header with its key material, as it has just been made.
fn fingerprint(made: &[u8], secret: &[u8]) -> Option<Fingerprint> {
    let header = Header::parse(made).ok()?;
    header.fingerprint(secret, |at, len| {
        let part = made.get(at as usize..).unwrap_or_default();
        Ok(part[..len.min(part.len())].to_vec())
    })
}

/// The parts of a new image, open.
struct NewImage {
    file: NewFile,
    data: Option<NewFile>,
    /// Header and key of what is encrypted.
    luks: Option<(Vec<u8>, Cipher)>,
}

impl NewImage {
    /// May block, for seconds if it is encrypted.
    fn open(options: &CreateImage, runtime: &Runtime) -> Result<NewImage> {
        let what = format!("image '{}'", options.filename);
        let (encrypt, data_file) = match &options.format {
            NewFormat::Raw => (None, None),
            NewFormat::Luks(e) => (Some(e), None),
            NewFormat::Qcow2(q) => (q.encrypt.as_ref(), q.data_file.as_ref()),
        };
        if encrypt.is_some() && !options.size.is_multiple_of(SECTOR as u64) {
            return Err(Error::invalid(format!(
                "{what}: option 'size' is {}: encrypted disks have a multiple of 512 bytes",
                options.size
            )));
        }
        let luks = match encrypt {
            None => None,
            Some(e) => {
                let secret = runtime
                    .secrets
                    .get(&e.key_secret)
                    .map_err(|e| e.context(&what))?;
                let failed = |e: vdisk_luks::Error| luks_failed(&what, &e);
                let made = Header::format(&luks_options(e), secret.bytes());
                let (header, key) = made.map_err(failed)?;
                let cipher = key.cipher().map_err(failed)?;
                // Whoever makes it is about to open it.
                if let Some(print) = fingerprint(&header, secret.bytes()) {
                    runtime.secrets.remember(&e.key_secret, &secret, print, key);
                }
                Some((header, cipher))
            }
        };
        let file = NewFile::open(options.filename.clone(), options.overwrite, runtime)?;
        // Beside the image, as whoever opens it will look for it.
        let data = data_file.map(|name| {
            let dir = Path::new(&options.filename)
                .parent()
                .unwrap_or(Path::new("/"));
            let path = dir.join(name).to_string_lossy().into_owned();
            NewFile::open(path, options.overwrite, runtime)
        });
        match data.transpose() {
            Ok(data) => Ok(NewImage { file, data, luks }),
            Err(e) => {
                if file.is_new {
                    let _ = std::fs::remove_file(&file.path);
                }
                Err(e)
            }
        }
    }
}

/// Makes an image. A file that is there already is left alone unless the options say otherwise.
pub async fn create(control: &Handle, options: CreateImage) -> Result<()> {
    let (thread, runtime) = {
        let world = control.world();
        (world.any_thread()?, world.defaults.runtime.clone())
    };
    create_on(thread, runtime, options, |_| Ok(())).await
}

/// The same, on an I/O thread.
pub(super) async fn create_on(
    thread: IoThread,
    runtime: Runtime,
    options: CreateImage,
    progress: impl Fn(u64) -> io::Result<()> + Send + 'static,
) -> Result<()> {
    let what = format!("image '{}'", options.filename);
    let wanted = options.clone();
    let new = blocking(move || NewImage::open(&wanted, &runtime)).await?;
    let node = new.file.file.node().clone();
    let data = new.data.as_ref().map(|d| d.file.node().clone());
    let luks = new.luks;
    let wanted = options.clone();
    let made = on_thread(&thread, &what, move || async move {
        match (&wanted.format, luks) {
            (NewFormat::Qcow2(q), luks) => {
                let (header, cipher) = luks.unzip();
                let below = data.as_ref().unwrap_or(&node).clone();
                let encrypted = cipher.map(|cipher| {
                    Arc::new(Encrypted {
                        below,
                        base: 0,
                        cipher: cipher.into(),
                    }) as Arc<dyn Storage>
                });
                let data = data.map(|d| Arc::new(NodeStorage(d)) as Arc<dyn Storage>);
                let children = Children {
                    data: encrypted.or(data),
                    ..Children::new(Arc::new(NodeStorage(node)))
                };
                let options = qcow2_options(&wanted, q, header);
                Image::create_watched(children, &options, &progress).await
            }
            (_, Some((header, cipher))) => {
                make_luks(node, &wanted, &header, cipher, &progress).await
            }
            (_, None) => make_raw(node, &wanted, &progress).await,
        }
    })
    .await;
    new.file.close(made.is_ok()).await;
    if let Some(data) = new.data {
        data.close(made.is_ok()).await;
    }
    if made.is_ok() {
        tracing::info!(image = options.filename, size = options.size, "image made");
    }
    made
}

/// The options of a node with those of the files that its images name, as far as the configuration lets names be followed.
pub async fn followed(control: &Handle, options: Map) -> Result<Map> {
    let follow = control.world().defaults.follow.clone();
    blocking(move || follow.complete(options)).await
}

/// What a new image would take: an empty one, or one with the data of a node.
pub async fn measure(control: &Handle, mut options: Map) -> Result<Map> {
    let Some(name) = options.remove("node") else {
        return measure_with(&measure_from_map(options)?, 0);
    };
    let Json::String(name) = name else {
        return Err(Error::invalid("option 'node' is not the name of a node"));
    };
    if options.contains_key("size") {
        return Err(Error::invalid(format!(
            "option 'size' is given, and node '{name}' has one: leave one of them out"
        )));
    }
    let (node, thread) = {
        let world = control.world();
        (world.graph.node(&name)?, world.any_thread()?)
    };
    options.insert("size".into(), node.size().into());
    let options = measure_from_map(options)?;
    // Options that are not possible are refused before anything is counted by them.
    let empty = measure_with(&options, 0)?;
    let NewFormat::Qcow2(Qcow2Create { cluster_size, .. }) = options.format else {
        return Ok(empty);
    };
    let what = format!("node '{name}'");
    let data = on_thread(&thread, &what, move || data_in_clusters(node, cluster_size)).await?;
    measure_with(&options, data)
}

/// Bytes of the clusters that have anything but zeroes in them, as far as that is known without reading them.
async fn data_in_clusters(node: Arc<Node>, cluster: u64) -> io::Result<u64> {
    let (mut at, mut counted, mut clusters) = (0, 0, 0);
    while at < node.size() {
        let status = node.status(at, node.size() - at, None).await?;
        let end = at + status.len;
        if !status.zero {
            let last = end.div_ceil(cluster);
            clusters += last - counted.max(at / cluster);
            counted = last;
        }
        at = end;
        vdisk_io::give_way().await;
    }
    Ok(clusters * cluster)
}

fn measure_with(options: &CreateImage, data: u64) -> Result<Map> {
    let (required, fully) = match &options.format {
        NewFormat::Qcow2(q) => {
            let luks = q.encrypt.as_ref();
            let luks = luks.map(|e| vec![0; luks_options(e).payload() as usize]);
            let m = qcow2_options(options, q, luks)
                .measure(data)
                .map_err(|e| Error::invalid(format!("new image: {e}")))?;
            (m.required, m.fully_allocated)
        }
        NewFormat::Raw => (options.size, options.size),
        NewFormat::Luks(e) => {
            let size = options.size.saturating_add(luks_options(e).payload());
            (size, size)
        }
    };
    Ok(map(json!({"required": required, "fully-allocated": fully})))
}

fn snapshot(s: &Snapshot) -> Json {
    json!({
        "id": s.id, "name": s.name, "date-sec": s.date.0, "date-nsec": s.date.1,
        "vm-state-size": s.vm_state_size, "vm-clock-ns": s.vm_clock,
        "disk-size": s.disk_size.unwrap_or(0),
    })
}

async fn describe(image: &Image, size: u64) -> io::Result<Map> {
    let h = image.header();
    let bitmaps: Vec<Json> = image
        .bitmaps()
        .await?
        .iter()
        .map(|b| {
            json!({
                "name": b.name, "granularity": b.granularity,
                "in-use": b.in_use, "recording": b.auto,
            })
        })
        .collect();
    let snapshots: Vec<Json> = image.snapshots().await?.iter().map(snapshot).collect();
    Ok(map(json!({
        "format": "qcow2",
        "virtual-size": image.size(),
        "file-size": size,
        "version": if h.version == 2 { "v2" } else { "v3" },
        "cluster-size": image.cluster(),
        "refcount-bits": 1u32 << h.refcount_order,
        "compression-type": match h.compression {
            Compression::Deflate => "zlib",
            Compression::Zstd => "zstd",
        },
        "extended-l2": h.extended_l2,
        "lazy-refcounts": h.compatible & 1 != 0,
        "dirty": h.dirty,
        "corrupt": h.corrupt,
        "encrypted": h.luks.is_some(),
        "data-file-raw": h.is_raw_data(),
        "data-file": h.data_file.unwrap_or_default(),
        "backing-file": h.backing_file.unwrap_or_default(),
        "backing-fmt": h.backing_format.unwrap_or_default(),
        "bitmaps": bitmaps,
        "snapshots": snapshots,
    })))
}

/// Looks at an image that may be in use.
async fn look<F, Fut, T>(control: &Handle, file: &ImageFile, write: bool, f: F) -> Result<T>
where
    F: FnOnce(Image) -> Fut + Send + 'static,
    Fut: Future<Output = io::Result<T>> + 'static,
    T: Send + 'static,
{
    let (thread, runtime) = {
        let world = control.world();
        if !file.force_share {
            world.graph.check_not_open(&file.filename, write)?;
        }
        (world.any_thread()?, world.defaults.runtime.clone())
    };
    look_on(thread, runtime, file, write, f).await
}

async fn look_on<F, Fut, T>(
    thread: IoThread,
    runtime: Runtime,
    file: &ImageFile,
    write: bool,
    f: F,
) -> Result<T>
where
    F: FnOnce(Image) -> Fut + Send + 'static,
    Fut: Future<Output = io::Result<T>> + 'static,
    T: Send + 'static,
{
    let what = format!("image '{}'", file.filename);
    let wanted = file.clone();
    let (opened, image) =
        blocking(move || Standalone::open_image(&wanted, write, &runtime)).await?;
    let result = on_thread(&thread, &what, move || f(image)).await;
    opened.close().await;
    result
}

fn luks_info(h: &Header) -> Json {
    json!({
        "format": "luks",
        "uuid": h.uuid,
        "cipher-alg": if h.key_bytes == 32 { "aes-128" } else { "aes-256" },
        "cipher-mode": "xts",
        "ivgen-alg": "plain64",
        "hash-alg": h.hash.name(),
        "active-slots": h.slots.iter().filter(|s| s.active).count(),
    })
}

fn allocated(filename: &str) -> u64 {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata(filename).map_or(0, |m| m.blocks() * 512)
}

pub async fn info(control: &Handle, file: ImageFile) -> Result<Map> {
    let runtime = control.world().defaults.runtime.clone();
    let mut found = match file.format {
        ImageFormat::Raw => {
            let path = file.clone();
            let opened = blocking(move || {
                Standalone::open(&path.filename, false, path.force_share, &runtime)
            })
            .await?;
            let size = opened.node().size();
            opened.close().await;
            map(json!({"format": "raw", "virtual-size": size, "file-size": size}))
        }
        ImageFormat::Luks => {
            let path = file.clone();
            let (header, size) = blocking(move || {
                let what = format!("image '{}'", path.filename);
                let opened = Standalone::open(&path.filename, false, path.force_share, &runtime)?;
                let header = read_header(&what, opened.node(), 0)?;
                Ok((header, opened.node().size()))
            })
            .await?;
            map(json!({
                "format": "luks",
                "virtual-size": size.saturating_sub(header.payload),
                "file-size": size,
                "encrypt": luks_info(&header),
            }))
        }
        ImageFormat::Qcow2 => {
            let size = std::fs::metadata(&file.filename).map_or(0, |m| m.len());
            look(control, &file, false, move |image| async move {
                describe(&image, size).await
            })
            .await?
        }
    };
    found.insert("filename".into(), file.filename.clone().into());
    found.insert("actual-size".into(), allocated(&file.filename).into());
    Ok(found)
}

fn repair_of(what: RepairWhat) -> Repair {
    match what {
        RepairWhat::Nothing => Repair::Nothing,
        RepairWhat::Leaks => Repair::Leaks,
        RepairWhat::All => Repair::All,
    }
}

fn report(r: &Report) -> Map {
    map(json!({
        "corruptions": r.corruptions, "leaks": r.leaks,
        "corruptions-fixed": r.corruptions_fixed, "leaks-fixed": r.leaks_fixed,
        "total-clusters": r.clusters, "allocated-clusters": r.allocated,
        "compressed-clusters": r.compressed, "fragmented-clusters": r.fragmented,
        "image-end-offset": r.end, "messages": r.messages,
    }))
}

pub async fn check(control: &Handle, file: ImageFile, what: RepairWhat) -> Result<Map> {
    let write = what != RepairWhat::Nothing;
    let found = look(control, &file, write, move |image| async move {
        image.check(repair_of(what), CHECK_MEMORY).await
    })
    .await?;
    Ok(report(&found))
}

/// The same, as the work of a job on an I/O thread.
pub(super) async fn check_on(
    thread: IoThread,
    runtime: Runtime,
    file: ImageFile,
    what: RepairWhat,
    state: Arc<JobState>,
) -> Result<Map> {
    let write = what != RepairWhat::Nothing;
    let found = look_on(thread, runtime, &file, write, move |image| async move {
        state.expect(image.size());
        let progress = progress_of(&state);
        let watched = image.check_watched(repair_of(what), CHECK_MEMORY, &progress);
        watched.await
    })
    .await?;
    Ok(report(&found))
}

/// Refuses a check of a node that cannot be checked, or not be repaired.
pub(super) fn check_can_check(node: &Node, repair: RepairWhat) -> Result<()> {
    let name = node.name();
    if node.image().is_none() {
        return Err(Error::not_supported(format!(
            "node '{name}' has driver '{}': only qcow2 images can do this",
            node.driver_name()
        )));
    }
    if repair != RepairWhat::Nothing && node.is_read_only() {
        return Err(Error::invalid(format!(
            "node '{name}' is read-only and cannot be repaired: add it without read-only"
        )));
    }
    Ok(())
}

/// Where the data of an image is: this image only, without what is below. Pieces from `from` on.
pub async fn extents(control: &Handle, file: ImageFile, from: u64) -> Result<Vec<Map>> {
    if file.format != ImageFormat::Qcow2 {
        return Err(Error::not_supported(format!(
            "image '{}': only qcow2 images have a map",
            file.filename
        )));
    }
    look(control, &file, false, move |image| async move {
        let pieces = image
            .map(from.min(image.size())..image.size(), MAX_MAP)
            .await?;
        let piece = |(start, m): &(u64, vdisk_qcow2::Mapping)| {
            let (kind, offset) = match m.kind {
                Kind::Data(host) => ("data", Some(host)),
                Kind::Zero => ("zero", None),
                Kind::Unallocated => ("unallocated", None),
                Kind::Compressed { offset, .. } => ("compressed", Some(offset)),
            };
            let mut out = map(json!({"start": start, "length": m.len, "kind": kind}));
            if let Some(offset) = offset {
                out.insert("offset".into(), offset.into());
            }
            out
        };
        Ok(pieces.iter().map(piece).collect())
    })
    .await
}

pub async fn amend(control: &Handle, options: AmendImage) -> Result<()> {
    let change = Amend {
        version: options.version,
        lazy_refcounts: options.lazy_refcounts,
        backing: options.backing.map(|(name, format)| match name.as_str() {
            "" => None,
            _ => Some((name, format.unwrap_or_default())),
        }),
        data_file: options.data_file,
    };
    look(control, &options.file, true, move |image| async move {
        image.activate(None).await?;
        let result = image.amend(&change).await;
        image.close().await?;
        result
    })
    .await
}

/// An image that a node serves, with everything above drained.
pub(super) struct Still {
    image: Arc<Image>,
    _drained: Vec<DrainGuard>,
    what: String,
}

impl Still {
    /// Checks it as the work of a job.
    pub async fn check(
        self,
        thread: IoThread,
        repair: RepairWhat,
        state: Arc<JobState>,
    ) -> Result<Map> {
        let image = self.image.clone();
        let found = on_thread(&thread, &self.what, move || async move {
            let progress = progress_of(&state);
            let watched = image.check_watched(repair_of(repair), CHECK_MEMORY, &progress);
            watched.await
        })
        .await?;
        Ok(report(&found))
    }
}

impl Control {
    pub(super) async fn still(&self, name: &str) -> Result<Still> {
        let (node, (backends, _)) = {
            let world = self.world();
            (world.graph.node(name)?, world.graph.above(name))
        };
        let what = format!("node '{name}'");
        let image = node.image().ok_or_else(|| {
            Error::not_supported(format!(
                "{what} has driver '{}': only qcow2 images can do this",
                node.driver_name()
            ))
        })?;
        if let Err(error) = self.flush_mostly(&node).await {
            tracing::warn!(node = name, %error, "what was written cannot be made durable");
        }
        let mut drained = Vec::new();
        for backend in &backends {
            drained.push(backend.drain().await);
        }
        Ok(Still {
            image,
            _drained: drained,
            what,
        })
    }

    /// Guests wait while their image is checked.
    pub(super) async fn check_node(&mut self, name: &str, repair: RepairWhat) -> Result<Reply> {
        check_can_check(&*self.world().graph.node(name)?, repair)?;
        self.world().graph.check_claim(name)?;
        self.world().graph.check_not_written(name)?;
        if repair != RepairWhat::Nothing {
            self.world().graph.check_no_job(name)?;
        }
        let thread = self.world().any_thread()?;
        let still = self.still(name).await?;
        let image = still.image.clone();
        let found = on_thread(&thread, &still.what, move || async move {
            image.check(repair_of(repair), CHECK_MEMORY).await
        })
        .await?;
        drop(still);
        Ok(Reply::Found(report(&found)))
    }

    pub(super) async fn snapshot(
        &mut self,
        name: &str,
        action: SnapshotAction,
        which: String,
    ) -> Result<Reply> {
        let node = self.world().graph.node(name)?;
        if node.is_read_only() {
            return Err(Error::invalid(format!(
                "node '{name}' is read-only and its snapshots cannot be changed: add it without read-only"
            )));
        }
        self.world().graph.check_claim(name)?;
        self.world().graph.check_not_written(name)?;
        if action == SnapshotAction::Apply {
            self.world().graph.check_no_job(name)?;
            let (_, above) = self.world().graph.above(name);
            if above.len() > 1 {
                return Err(Error::in_use(format!(
                    "node '{name}' is below other nodes, whose content would change: remove them first"
                )));
            }
        }
        let thread = self.world().any_thread()?;
        let still = self.still(name).await?;
        let image = still.image.clone();
        let now = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .unwrap_or_default();
        let date = (now.as_secs() as u32, now.subsec_nanos());
        let wanted = which.clone();
        let before = node.size();
        let done = on_thread(&thread, &still.what, move || async move {
            match action {
                SnapshotAction::Create => image.create_snapshot(&wanted, date).await,
                SnapshotAction::Apply => image.apply_snapshot(&wanted).await,
                SnapshotAction::Delete => image.delete_snapshot(&wanted).await,
            }
        })
        .await;
        node.follow_image();
        if action == SnapshotAction::Apply {
            // Anything may be different, also if it was only done in part.
            node.bitmaps().iter().for_each(|b| b.set_all());
        }
        drop(still);
        if node.size() != before {
            self.events.push(Event::NodeChanged(name.to_owned()));
            let world = self.world();
            for export in world.exports.values().filter(|e| e.node() == name) {
                export.server.config_changed();
            }
        }
        let done = done?;
        tracing::info!(node = name, snapshot = done.name, ?action, "snapshot");
        Ok(Reply::Found(map(snapshot(&done))))
    }
}

/// What the image of a node is.
pub async fn node_info(control: &Handle, name: &str) -> Result<Map> {
    let (node, thread) = {
        let world = control.world();
        (world.graph.node(name)?, world.any_thread()?)
    };
    let what = format!("node '{name}'");
    let Some(image) = node.image() else {
        return Err(Error::new(
            ErrorKind::NotSupported,
            format!(
                "{what} has driver '{}', which has no image format",
                node.driver_name()
            ),
        ));
    };
    let filename = node.filename().unwrap_or_default();
    let descriptors = control.world().defaults.runtime.descriptors.clone();
    let meta = descriptors.metadata(&filename).ok();
    let size = meta.as_ref().map_or(0, |m| m.len());
    let mut found = on_thread(&thread, &what, move || async move {
        describe(&image, size).await
    })
    .await?;
    let allocated = meta.map_or(0, |m| std::os::unix::fs::MetadataExt::blocks(&m) * 512);
    found.insert("actual-size".into(), allocated.into());
    found.insert("filename".into(), filename.into());
    Ok(found)
}
