//! Commits under power cuts: what an overlay has goes into the image below it. Whenever power is lost, the overlay reads as before
//! over what is there, and once the image below has been flushed it has everything itself.

mod memory;

use std::io;
use std::rc::Rc;
use std::sync::Arc;

use futures_util::future::join_all;
use memory::{Memory, Random, after_power_cut, block_on, open};
use vdisk_io::IoVecs;
use vdisk_qcow2::{
    CHECK_MEMORY, Children, CreateOptions, Image, Kind, LocalFuture, Options, Repair, Storage,
};

const SIZE: u64 = 384 << 10;

/// An image behind another.
struct Below(Arc<Image>);

fn refused<T: 'static>() -> LocalFuture<'static, io::Result<T>> {
    Box::pin(async { Err(io::ErrorKind::Unsupported.into()) })
}

impl Storage for Below {
    fn size(&self) -> u64 {
        self.0.size()
    }

    fn read(&self, offset: u64, iov: IoVecs) -> LocalFuture<'_, io::Result<()>> {
        Box::pin(self.0.read(offset, iov))
    }

    fn write(&self, _: u64, _: IoVecs) -> LocalFuture<'_, io::Result<()>> {
        refused()
    }

    fn flush(&self) -> LocalFuture<'_, io::Result<()>> {
        Box::pin(async { Ok(()) })
    }

    fn discard(&self, _: u64, _: u64) -> LocalFuture<'_, io::Result<()>> {
        refused()
    }

    fn reserve(&self, _: u64, _: u64) -> LocalFuture<'_, io::Result<()>> {
        refused()
    }

    fn grows(&self) -> bool {
        false
    }

    fn set_size(&self, _: u64) -> LocalFuture<'_, io::Result<()>> {
        refused()
    }

    fn write_zeroes(&self, _: u64, _: u64, _: bool) -> LocalFuture<'_, io::Result<()>> {
        refused()
    }

    fn quiesce(&self) -> LocalFuture<'_, ()> {
        Box::pin(async {})
    }
}

fn below(image: Rc<Image>) -> Arc<dyn Storage> {
    let image = Rc::into_inner(image).expect("nobody else has it");
    Arc::new(Below(Arc::new(image)))
}

/// A new image with random content: writes, zeroes and discards.
async fn make(random: &mut Random, cluster: u64, backing: Option<Arc<dyn Storage>>) -> Vec<u8> {
    let file = Memory::new(Vec::new(), None, false);
    let create = CreateOptions {
        cluster_size: cluster,
        backing: backing.is_some().then(|| ("base".into(), "qcow2".into())),
        ..CreateOptions::new(SIZE)
    };
    Image::create(Children::new(file.clone()), &create)
        .await
        .unwrap();
    let image = open(&file, backing, Options::default()).unwrap();
    image.activate(None).await.unwrap();
    for _ in 0..60 {
        let at = random.below(SIZE / 512) * 512;
        let len = ((1 + random.below(40)) * 512).min(SIZE - at);
        match random.below(6) {
            0 => image.write_zeroes(at, len, random.below(2) == 0).await,
            1 => image.discard(at, len).await,
            _ => {
                let bytes = random.next().to_le_bytes().repeat(len as usize / 8);
                image.write(at, IoVecs::from_slice(&bytes)).await
            }
        }
        .unwrap();
    }
    image.close().await.unwrap();
    file.data()
}

async fn read(image: &Image) -> Vec<u8> {
    let iov = IoVecs::zeroed(SIZE as usize, 1);
    image.read(0, iov.clone()).await.unwrap();
    iov.to_vec()
}

async fn assert_sound(image: &Image, what: &str) {
    let report = image.check(Repair::Nothing, CHECK_MEMORY).await.unwrap();
    assert_eq!(report.corruptions, 0, "{what}: {:#?}", report.messages);
}

/// Brings what an overlay has into the image below, several pieces at a time and in any order.
async fn commit(random: &mut Random, overlay: &Image, base: &Image) {
    let mut pieces = Vec::new();
    for (at, found) in overlay.map(0..SIZE, usize::MAX).await.unwrap() {
        for from in (at..at + found.len).step_by(8192) {
            let len = (at + found.len - from).min(8192);
            match found.kind {
                Kind::Data(_) => pieces.push((from, len, false)),
                Kind::Zero => pieces.push((from, len, true)),
                _ => {}
            }
        }
    }
    for i in (1..pieces.len()).rev() {
        pieces.swap(i, random.below(i as u64 + 1) as usize);
    }
    let workers = pieces.chunks(pieces.len().div_ceil(4));
    join_all(workers.map(async |pieces| {
        for &(at, len, zero) in pieces {
            if zero {
                base.write_zeroes(at, len, true).await.unwrap();
                continue;
            }
            let iov = IoVecs::zeroed(len as usize, 1);
            overlay.read(at, iov.clone()).await.unwrap();
            base.write(at, iov).await.unwrap();
        }
    }))
    .await;
}

fn run(seed: u64, base_cluster: u64, overlay_cluster: u64, cuts: usize) {
    let mut random = Random::new(seed);
    let (base, overlay, view) = block_on(async {
        let base = make(&mut random, base_cluster, None).await;
        let open_base = || {
            let file = Memory::new(base.clone(), None, false);
            below(open(&file, None, Options::default()).unwrap())
        };
        let overlay = make(&mut random, overlay_cluster, Some(open_base())).await;
        let file = Memory::new(overlay.clone(), None, false);
        let top = open(&file, Some(open_base()), Options::default()).unwrap();
        (base.clone(), overlay, read(&top).await)
    });
    let file = Memory::new(base.clone(), Some(seed), true);
    let done = block_on(async {
        let image = open(&file, None, Options::default()).unwrap();
        image.activate(None).await.unwrap();
        let top = Memory::new(overlay.clone(), Some(seed), false);
        let unused: Arc<dyn Storage> = Memory::new(vec![0; SIZE as usize], None, false);
        let top = open(&top, Some(unused), Options::default()).unwrap();
        commit(&mut random, &top, &image).await;
        image.flush().await.unwrap();
        let done = file.tick();
        image.close().await.unwrap();
        done
    });
    let (log, end) = (file.log(), file.tick());
    for cut in 0..=cuts {
        let time = match cut {
            _ if cut == cuts => end,
            0 => done,
            _ => 1 + random.below(end),
        };
        let what = format!("seed {seed}, cut {cut} at {time} of {end}, flushed at {done}");
        let after = after_power_cut(&base, &log, time, &mut random);
        block_on(async {
            let file = Memory::new(after, None, false);
            let image = open(&file, None, Options::default()).unwrap();
            assert_sound(&image, &what).await;
            image.activate(None).await.unwrap();
            let has = read(&image).await;
            image.close().await.unwrap();
            assert_sound(&image, &what).await;
            if time >= done {
                assert!(has == view, "{what}: the image below lacks something");
            }
            let top = Memory::new(overlay.clone(), None, false);
            let image = open(&file, None, Options::default()).unwrap();
            let top = open(&top, Some(below(image)), Options::default()).unwrap();
            let differs = read(&top).await.iter().zip(&view).position(|(a, b)| a != b);
            assert_eq!(differs, None, "{what}: the overlay reads something else");
        });
    }
}

#[test]
fn commits_survive_power_cuts() {
    let more = std::env::var("VDISK_CUTS").ok();
    let cuts = more.and_then(|v| v.parse().ok()).unwrap_or(60);
    let clusters = [
        (4096, 4096),
        (4096, 16384),
        (16384, 4096),
        (512, 2048),
        (2048, 512),
        (65536, 4096),
    ];
    for (seed, (base, overlay)) in (1..).zip(clusters.into_iter().cycle()).take(12) {
        run(seed, base, overlay, cuts);
    }
}
