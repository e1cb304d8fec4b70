//! Power cuts: after any of them the image is sound, and what a flush has acknowledged is there.

mod memory;

use std::io;
use std::rc::Rc;
use std::sync::Arc;

use futures_util::future::join_all;
use memory::{Memory, Random, after_power_cut, block_on, open_with};
use vdisk_io::IoVecs;
use vdisk_qcow2::{CHECK_MEMORY, Children, CreateOptions, Image, Options, Repair, Storage};

const SECTOR: u64 = 512;

/// Something that the guest did to a sector, and when. `tag` is what its words have then, 0 for zeroes.
#[derive(Clone, Copy, Debug)]
struct Version {
    tag: u64,
    began: u64,
    ended: u64,
    /// A discard: what was there before may be there still.
    maybe: bool,
}

#[derive(Clone, Copy, Debug)]
enum Op {
    Write(u64, u64),
    /// A cluster that is compressed if that helps.
    Compress(u64),
    Zero(u64, u64, bool),
    Discard(u64, u64),
    Flush,
    Tidy,
}

struct Guest {
    file: Arc<Memory>,
    image: Rc<Image>,
    /// Sectors of the backing file, which have the tag of no write.
    backing: u64,
    sectors: std::cell::RefCell<Vec<Vec<Version>>>,
    /// When flushes that were acknowledged began and ended.
    flushes: std::cell::RefCell<Vec<(u64, u64)>>,
    next_tag: std::cell::Cell<u64>,
    /// What snapshots have, by name.
    snapshots: std::cell::RefCell<Vec<(String, Vec<u8>)>>,
    /// Sizes that the disk had.
    sizes: std::cell::RefCell<Vec<u64>>,
}

/// What happens between the phases of a workload.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Between {
    Nothing,
    Snapshots,
    Resizes,
    /// As `Nothing`; the image has a bitmap that records writes.
    Bitmap,
    /// As `Bitmap`; it gets another one, and the first is removed.
    NewBitmap,
}

/// What of the disk one bit of the bitmap stands for.
const GRANULARITY: u64 = 4096;

/// Adds a persistent bitmap to an image of version 3: header extension, directory, and a table of one entry.
fn add_bitmap(base: Vec<u8>, cluster: u64) -> Vec<u8> {
    let mut b = base;
    b.resize(b.len().next_multiple_of(cluster as usize), 0);
    let (directory, table) = (b.len() as u64, b.len() as u64 + cluster);
    b.resize(b.len() + 2 * cluster as usize, 0);
    let mut put = |at: u64, value: &[u8]| {
        b[at as usize..at as usize + value.len()].copy_from_slice(value);
    };
    // In the place of the names of features.
    put(112, &0x2385_2875u32.to_be_bytes());
    put(116, &24u32.to_be_bytes());
    put(120, &1u32.to_be_bytes());
    put(124, &[0; 4]);
    put(128, &32u64.to_be_bytes());
    put(136, &directory.to_be_bytes());
    put(144, &[0; 8]);
    put(95, &[1]);
    put(directory, &table.to_be_bytes());
    put(directory + 8, &1u32.to_be_bytes());
    put(directory + 12, &2u32.to_be_bytes());
    put(
        directory + 16,
        &[1, GRANULARITY.trailing_zeros() as u8, 0, 1],
    );
    put(directory + 24, b"b");
    let file = Memory::new(b, None, false);
    let image = open_with(&file, None, None, Options::default()).unwrap();
    block_on(image.check(Repair::All, CHECK_MEMORY)).unwrap();
    file.data()
}

/// The bits of the bitmap in a file; None if it says that they are not up to date.
fn stored_bitmap(b: &[u8], cluster: u64) -> Option<Vec<u8>> {
    let number = |at: u64| u64::from_be_bytes(b[at as usize..][..8].try_into().unwrap());
    let directory = number(136);
    if number(directory + 8) & 1 != 0 {
        return None;
    }
    let entry = number(number(directory));
    Some(match entry {
        0 => vec![0; cluster as usize],
        place => b[place as usize..][..cluster as usize].to_vec(),
    })
}

impl Guest {
    fn note(&self, offset: u64, len: u64, version: impl Fn(u64) -> Version) {
        let mut sectors = self.sectors.borrow_mut();
        for s in offset / SECTOR..(offset + len) / SECTOR {
            sectors[s as usize].push(version(s));
        }
    }

    async fn run(&self, op: Op) -> io::Result<()> {
        let began = self.file.tick();
        if let Op::Tidy = op {
            return self.image.tidy().await;
        }
        let _request = self.file.request();
        let n = self.next_tag.get();
        self.next_tag.set(n + 1);
        let tag = |s: u64| s << 32 | n;
        match op {
            Op::Write(at, len) => {
                let data: Vec<u8> = (at / SECTOR..(at + len) / SECTOR)
                    .flat_map(|s| tag(s).to_le_bytes().repeat(64))
                    .collect();
                // Noted before: power may be cut while it runs.
                self.note(at, len, |s| Version {
                    tag: tag(s),
                    began,
                    ended: u64::MAX,
                    maybe: false,
                });
                self.image.write(at, IoVecs::from_slice(&data)).await?;
                self.ended(at, len, began);
            }
            Op::Compress(at) => {
                let cluster = self.image.cluster();
                let at = at & !(cluster - 1);
                let len = cluster.min(self.image.size() - at);
                let data: Vec<u8> = (at / SECTOR..(at + len) / SECTOR)
                    .flat_map(|s| tag(s).to_le_bytes().repeat(64))
                    .collect();
                self.note(at, len, |s| Version {
                    tag: tag(s),
                    began,
                    ended: u64::MAX,
                    maybe: false,
                });
                let iov = IoVecs::from_slice(&data);
                self.image.write_compressed(at, iov).await?;
                self.ended(at, len, began);
            }
            Op::Zero(at, len, _) | Op::Discard(at, len) if len > 0 => {
                let discard = matches!(op, Op::Discard(..));
                self.note(at, len, |_| Version {
                    tag: 0,
                    began,
                    ended: u64::MAX,
                    maybe: discard,
                });
                if discard {
                    self.image.discard(at, len).await?;
                } else {
                    let unmap = matches!(op, Op::Zero(_, _, true));
                    self.image.write_zeroes(at, len, unmap).await?;
                }
                self.ended(at, len, began);
            }
            Op::Flush => {
                self.image.flush().await?;
                self.flushes.borrow_mut().push((began, self.file.tick()));
            }
            _ => {}
        }
        Ok(())
    }

    async fn read_all(&self) -> Vec<u8> {
        let iov = IoVecs::zeroed(self.image.size() as usize, 1);
        self.image.read(0, iov.clone()).await.unwrap();
        iov.to_vec()
    }

    /// What is there now is durable, and nothing else may be.
    fn settled(&self, began: u64, data: &[u8]) {
        let ended = self.file.tick();
        let mut sectors = self.sectors.borrow_mut();
        for (s, bytes) in data.chunks(SECTOR as usize).enumerate() {
            // Sectors that were written in part do not exist: all words are the same.
            let tag = u64::from_le_bytes(bytes[..8].try_into().unwrap());
            sectors[s].push(Version {
                tag,
                began,
                ended,
                maybe: false,
            });
        }
        self.flushes.borrow_mut().push((ended, self.file.tick()));
    }

    async fn snapshot(&self, name: &str) {
        let data = self.read_all().await;
        self.snapshots.borrow_mut().push((name.into(), data));
        self.image.create_snapshot(name, (1, 2)).await.unwrap();
    }

    async fn apply(&self, name: &str) {
        let began = self.file.tick();
        let data = {
            let all = self.snapshots.borrow();
            all.iter().find(|s| s.0 == name).unwrap().1.clone()
        };
        for (s, bytes) in data.chunks(SECTOR as usize).enumerate() {
            let tag = u64::from_le_bytes(bytes[..8].try_into().unwrap());
            self.sectors.borrow_mut()[s].push(Version {
                tag,
                began,
                ended: u64::MAX,
                maybe: false,
            });
        }
        self.image.apply_snapshot(name).await.unwrap();
        assert!(self.read_all().await == data);
        self.settled(began, &data);
    }

    /// Opens every snapshot that is there after a power cut, and compares.
    async fn check_snapshots(&self, image: &Image, what: &str) {
        for s in image.snapshots().await.unwrap() {
            image.apply_snapshot(&s.id).await.unwrap();
            let iov = IoVecs::zeroed(image.size() as usize, 1);
            image.read(0, iov.clone()).await.unwrap();
            {
                let all = self.snapshots.borrow();
                let want = &all.iter().find(|w| w.0 == s.name).unwrap().1;
                assert!(iov.to_vec() == *want, "{what}: snapshot {}", s.name);
            }
            sound(image, what).await;
        }
    }

    /// What is cut off is gone, and what is new reads as zeroes.
    async fn resize(&self, size: u64) {
        let began = self.file.tick();
        let before = self.image.size();
        let (from, to) = (before.min(size), before.max(size));
        self.note(from, to - from, |_| Version {
            tag: 0,
            began,
            ended: u64::MAX,
            maybe: false,
        });
        self.sizes.borrow_mut().push(size);
        self.image.resize(size).await.unwrap();
        self.ended(from, to - from, began);
        self.flushes
            .borrow_mut()
            .push((self.file.tick(), self.file.tick()));
    }

    fn ended(&self, offset: u64, len: u64, began: u64) {
        let now = self.file.tick();
        let mut sectors = self.sectors.borrow_mut();
        for s in offset / SECTOR..(offset + len) / SECTOR {
            for v in sectors[s as usize].iter_mut().filter(|v| v.began == began) {
                v.ended = now;
            }
        }
    }

    /// Whether a word may be in a sector after power was cut at `time`.
    fn allows(&self, sector: u64, word: u64, time: u64) -> bool {
        let flushes = self.flushes.borrow();
        let durable = flushes
            .iter()
            .filter(|f| f.1 < time)
            .map(|f| f.0)
            .max()
            .unwrap_or(0);
        let sectors = self.sectors.borrow();
        let initial = Version {
            tag: if sector < self.backing {
                sector << 32
            } else {
                0
            },
            began: 0,
            ended: 0,
            maybe: false,
        };
        let versions = || std::iter::once(&initial).chain(&sectors[sector as usize]);
        versions().any(|v| {
            let superseded = versions().any(|w| !w.maybe && w.began > v.ended && w.ended < durable);
            v.tag == word && v.began < time && !superseded
        })
    }
}

fn ops(random: &mut Random, size: u64, n: usize) -> Vec<Op> {
    (0..n)
        .map(|_| {
            let most = [2, 9, 40][random.below(3) as usize];
            let len = (SECTOR * (1 + random.below(most))).min(size);
            let at = random.below((size - len) / SECTOR + 1) * SECTOR;
            match random.below(16) {
                0..8 => Op::Write(at, len),
                8 => Op::Compress(at),
                9 => Op::Zero(at, len, true),
                10 => Op::Zero(at, len, false),
                11 | 12 => Op::Discard(
                    at / 4096 * 4096,
                    (len.next_multiple_of(4096)).min(size - at / 4096 * 4096),
                ),
                13 => Op::Tidy,
                _ => Op::Flush,
            }
        })
        .collect()
}

async fn sound(image: &Image, what: &str) {
    let report = image.check(Repair::Nothing, CHECK_MEMORY).await.unwrap();
    assert_eq!(report.corruptions, 0, "{what}: {:#?}", report.messages);
}

/// Runs a random workload from several requests at once, and cuts the power at many moments.
fn workload(seed: u64, create: &CreateOptions, options: Options, cuts: usize) {
    run(seed, create, options, cuts, Between::Nothing);
}

fn run(seed: u64, create: &CreateOptions, options: Options, cuts: usize, between: Between) {
    let mut random = Random::new(seed);
    let size = create.size;
    let backing = create.backing.is_some().then(|| {
        let words = |s: u64| (s << 32).to_le_bytes().repeat(64);
        let data = (0..size / SECTOR * 3 / 4).flat_map(words).collect();
        Memory::new(data, Some(seed), false) as Arc<dyn Storage>
    });
    let empty = Memory::new(Vec::new(), None, false);
    let empty_data = create
        .data_file
        .is_some()
        .then(|| Memory::new(Vec::new(), None, false));
    let children = Children {
        data: empty_data.clone().map(|d| d as _),
        ..Children::new(empty.clone())
    };
    block_on(Image::create(children, create)).unwrap();
    let base = match between {
        Between::Bitmap | Between::NewBitmap => add_bitmap(empty.data(), create.cluster_size),
        _ => empty.data(),
    };
    let base_data = empty_data.map(|d| d.data());
    let file = Memory::new(base.clone(), Some(seed), true);
    let data_file = base_data
        .clone()
        .map(|data| file.beside(data, Some(seed + 1)));
    let as_storage = |d: &Option<Arc<Memory>>| d.clone().map(|d| d as Arc<dyn Storage>);
    let image = open_with(&file, as_storage(&data_file), backing.clone(), options).unwrap();
    let largest = 2 * size;
    let guest = Guest {
        file: file.clone(),
        image,
        backing: backing.as_ref().map_or(0, |b| b.size() / SECTOR),
        sectors: std::cell::RefCell::new(vec![Vec::new(); (largest / SECTOR) as usize]),
        flushes: Default::default(),
        next_tag: std::cell::Cell::new(1),
        snapshots: Default::default(),
        sizes: std::cell::RefCell::new(vec![size]),
    };
    block_on(async {
        guest.image.activate(None).await.unwrap();
        if between == Between::NewBitmap {
            guest.image.add_bitmap("new", GRANULARITY, true).unwrap();
            guest.image.remove_bitmap("b");
        }
        let one_phase = !matches!(between, Between::Snapshots | Between::Resizes);
        let phases = if one_phase { 1 } else { 4 };
        for phase in 0..phases {
            join_all((0..4).map(|_| {
                let n = if phases == 1 { 40 } else { 12 };
                let ops = ops(&mut random, guest.image.size(), n);
                let guest = &guest;
                async move {
                    for op in ops {
                        match guest.run(op).await {
                            Ok(()) => {}
                            Err(e) if e.kind() == io::ErrorKind::Unsupported => {}
                            Err(e) => panic!("{op:?}: {e}"),
                        }
                    }
                }
            }))
            .await;
            match phase {
                _ if one_phase => {}
                _ if between == Between::Resizes => {
                    let size = SECTOR * (1 + random.below(largest / SECTOR));
                    guest.resize(size).await;
                }
                0 => guest.snapshot("first").await,
                1 => guest.snapshot("second").await,
                2 if seed.is_multiple_of(2) => guest.apply("first").await,
                2 => {
                    guest.image.delete_snapshot("first").await.unwrap();
                }
                _ => {
                    guest.apply("second").await;
                    guest.image.delete_snapshot("second").await.unwrap();
                }
            }
        }
        guest.image.close().await.unwrap();
    });
    // Closed as it should be, it has no leaks either.
    let data = data_file
        .as_ref()
        .map(|d| Memory::new(d.data(), None, false));
    let closed = open_with(
        &Memory::new(file.data(), None, false),
        as_storage(&data),
        None,
        Options::default(),
    )
    .unwrap();
    let report = block_on(closed.check(Repair::Nothing, CHECK_MEMORY)).unwrap();
    assert!(
        report.corruptions + report.leaks == 0,
        "seed {seed}: {report:#?}"
    );
    let log = file.log();
    let data_log = data_file.map(|d| d.log()).unwrap_or_default();
    let end = file.tick();
    assert!(log.len() + data_log.len() > 100);
    for cut in 0..=cuts {
        let time = if cut == cuts {
            end
        } else {
            1 + random.below(end)
        };
        let data = after_power_cut(&base, &log, time, &mut random);
        let what = format!("seed {seed}, cut {cut} at {time} of {end}");
        let bitmap = match between {
            Between::Bitmap => stored_bitmap(&data, create.cluster_size),
            _ => None,
        };
        let file = Memory::new(data, None, false);
        let data_file = base_data.as_ref().map(|base| {
            let data = after_power_cut(base, &data_log, time, &mut random);
            Memory::new(data, None, false)
        });
        let image = open_with(
            &file,
            as_storage(&data_file),
            backing.clone(),
            Options::default(),
        )
        .unwrap_or_else(|e| panic!("{what}: {e}"));
        block_on(async {
            // A snapshot that was being made or deleted leaves the image marked, to be repaired by whoever opens it.
            if !image.header().dirty {
                sound(&image, &what).await;
            }
            if between == Between::NewBitmap {
                let all = image.bitmaps().await.unwrap();
                let valid = all.iter().filter(|b| !b.in_use);
                // The new one comes when the old one goes, with everything that was written until the end.
                for b in valid.clone().filter(|b| b.name == "new") {
                    assert!(all.len() == 1 && b.auto, "{what}: {all:?}");
                }
                if cut == cuts {
                    assert_eq!(valid.count(), 1, "{what}: {all:?}");
                }
            }
            image.activate(None).await.unwrap();
            sound(&image, &what).await;
            let size = image.size();
            assert!(guest.sizes.borrow().contains(&size), "{what}: {size} bytes");
            let iov = IoVecs::zeroed(size as usize, 1);
            image.read(0, iov.clone()).await.unwrap();
            if let (true, Some(d)) = (create.data_file_raw, &data_file) {
                let (disk, data) = (iov.to_vec(), d.data());
                let differs = (0..size as usize).find(|i| disk[*i] != data[*i]);
                assert_eq!(
                    differs, None,
                    "{what}: the data file is not the disk of {size} bytes"
                );
            }
            for (i, word) in iov.to_vec().chunks(8).enumerate() {
                let word = u64::from_le_bytes(word.try_into().unwrap());
                let sector = i as u64 / 64;
                if let Some(bitmap) = &bitmap {
                    let bit = (sector * SECTOR / GRANULARITY) as usize;
                    let is_set = bitmap[bit / 8] >> (bit % 8) & 1 != 0;
                    assert!(
                        word == 0 || is_set,
                        "{what}: sector {sector} is not in the bitmap"
                    );
                }
                assert!(
                    guest.allows(sector, word, time),
                    "{what}: sector {sector} has {word:#x}, of {:#?}; flushes {:?}",
                    guest.sectors.borrow()[sector as usize],
                    guest.flushes.borrow(),
                );
            }
            guest.check_snapshots(&image, &what).await;
            // It can be repaired, and be used.
            let report = image.check(Repair::Leaks, CHECK_MEMORY).await.unwrap();
            assert!(report.is_clean(), "{what}: {report:#?}");
            for at in (0..size).step_by(3 * 4096) {
                let iov = IoVecs::from_slice(&[7; 512]);
                image.write(at, iov).await.unwrap();
            }
            image.close().await.unwrap();
            let report = image.check(Repair::Nothing, CHECK_MEMORY).await.unwrap();
            assert!(
                report.is_clean() && report.leaks == 0,
                "{what}: {report:#?}"
            );
        });
    }
}

fn cuts() -> usize {
    let more = std::env::var("VDISK_CUTS")
        .ok()
        .and_then(|v| v.parse().ok());
    more.unwrap_or(60)
}

fn small() -> CreateOptions {
    CreateOptions {
        cluster_size: 4096,
        ..CreateOptions::new(384 << 10)
    }
}

/// These seeds, and four times (or VDISK_ROUNDS times) as many others.
fn seeds(first: std::ops::Range<u64>) -> impl Iterator<Item = u64> {
    let more = std::env::var("VDISK_ROUNDS")
        .ok()
        .and_then(|v| v.parse().ok());
    (0..=more.unwrap_or(4))
        .flat_map(move |round| first.clone().map(move |seed| seed + 1001 * round))
}

#[test]
fn plain_images() {
    for seed in seeds(1..9) {
        workload(seed, &small(), Options::default(), cuts());
    }
}

#[test]
fn tiny_clusters_and_caches() {
    for seed in seeds(10..16) {
        let create = CreateOptions {
            cluster_size: 512,
            refcount_bits: [1, 8, 64][seed as usize % 3],
            ..CreateOptions::new(192 << 10)
        };
        let options = Options {
            l2_cache: 4 * 512,
            refcount_cache: 4 * 512,
            pass_discard_other: true,
            ..Options::default()
        };
        workload(seed, &create, options, cuts());
    }
}

#[test]
fn overlays_in_both_versions() {
    for seed in seeds(20..26) {
        let create = CreateOptions {
            version: 2 + seed as u32 % 2,
            backing: Some(("base".into(), "raw".into())),
            ..small()
        };
        workload(seed, &create, Options::default(), cuts());
    }
}

/// Clusters that are larger than what is written: their copies on write are put off.
#[test]
fn copies_that_are_put_off() {
    for seed in seeds(110..116) {
        let between = [Between::Nothing, Between::Snapshots, Between::Resizes][seed as usize % 3];
        let create = CreateOptions {
            cluster_size: [16384, 65536][seed as usize % 2],
            // (Version 2 cannot say that a snapshot is being made.)
            version: if between == Between::Nothing && seed % 2 == 0 {
                2
            } else {
                3
            },
            backing: Some(("base".into(), "raw".into())),
            ..CreateOptions::new(512 << 10)
        };
        run(seed, &create, Options::default(), cuts() / 2, between);
    }
}

#[test]
fn subclusters() {
    for seed in seeds(30..34) {
        let create = CreateOptions {
            cluster_size: 16384,
            extended_l2: true,
            backing: (seed % 2 == 0).then(|| ("base".into(), "raw".into())),
            ..small()
        };
        workload(seed, &create, Options::default(), cuts());
    }
}

#[test]
fn snapshots() {
    for seed in seeds(50..58) {
        let create = CreateOptions {
            cluster_size: [512, 4096, 16384][seed as usize % 3],
            extended_l2: seed % 3 == 1 && seed > 53,
            backing: (seed % 4 == 0).then(|| ("base".into(), "raw".into())),
            ..small()
        };
        let create = CreateOptions {
            cluster_size: if create.extended_l2 {
                16384
            } else {
                create.cluster_size
            },
            ..create
        };
        run(
            seed,
            &create,
            Options::default(),
            cuts(),
            Between::Snapshots,
        );
    }
}

#[test]
fn sizes_that_change() {
    for seed in seeds(60..68) {
        let create = CreateOptions {
            cluster_size: [512, 4096, 16384][seed as usize % 3],
            extended_l2: seed % 3 == 2 && seed > 63,
            backing: (seed % 4 == 0).then(|| ("base".into(), "raw".into())),
            ..small()
        };
        run(seed, &create, Options::default(), cuts(), Between::Resizes);
    }
}

#[test]
fn bitmaps() {
    for seed in seeds(90..96) {
        run(seed, &small(), Options::default(), cuts(), Between::Bitmap);
    }
}

#[test]
fn bitmaps_that_come_and_go() {
    for seed in seeds(100..104) {
        run(
            seed,
            &small(),
            Options::default(),
            cuts(),
            Between::NewBitmap,
        );
    }
}

#[test]
fn external_data_files() {
    for seed in seeds(70..78) {
        let raw = seed % 2 == 0;
        let extended_l2 = seed % 3 == 0;
        let create = CreateOptions {
            cluster_size: if extended_l2 { 16384 } else { 2048 },
            extended_l2,
            data_file: Some("data".into()),
            data_file_raw: raw,
            backing: (!raw && seed > 73).then(|| ("base".into(), "raw".into())),
            ..small()
        };
        let between = [Between::Nothing, Between::Resizes][seed as usize / 2 % 2];
        run(seed, &create, Options::default(), cuts(), between);
    }
}

#[test]
fn places_that_stay() {
    for seed in seeds(80..86) {
        let options = Options {
            discard_no_unref: true,
            ..Options::default()
        };
        let create = CreateOptions {
            backing: (seed % 2 == 0).then(|| ("base".into(), "raw".into())),
            ..small()
        };
        let between = [Between::Nothing, Between::Snapshots][seed as usize / 2 % 2];
        run(seed, &create, options, cuts(), between);
    }
}

#[test]
fn preallocated_images() {
    for seed in seeds(40..44) {
        let create = CreateOptions {
            preallocation: vdisk_qcow2::Preallocation::Metadata,
            ..small()
        };
        workload(seed, &create, Options::default(), cuts());
    }
}
