//! Copies on write that are put off: clusters of which only those parts have data that were written.

mod memory;

use std::future::{Future, poll_fn};
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;

use memory::{Memory, Random, block_on, open};
use vdisk_io::{IoVecs, give_way};
use vdisk_qcow2::{
    CHECK_MEMORY, Children, CreateOptions, Image, Kind, Lookup, Options, Repair, Storage,
};

const CLUSTER: u64 = 65536;
const PART: u64 = 4096;

/// An overlay over a file full of `0xbb`, and both files.
fn overlay(size: u64, options: Options) -> (Rc<Image>, Arc<Memory>, Arc<Memory>) {
    overlay_with(CLUSTER, size, options)
}

fn overlay_with(
    cluster_size: u64,
    size: u64,
    options: Options,
) -> (Rc<Image>, Arc<Memory>, Arc<Memory>) {
    let create = CreateOptions {
        cluster_size,
        ..CreateOptions::new(size)
    };
    overlay_of(create, options)
}

fn overlay_of(create: CreateOptions, options: Options) -> (Rc<Image>, Arc<Memory>, Arc<Memory>) {
    let file = Memory::new(Vec::new(), None, true);
    let size = create.size;
    let create = CreateOptions {
        backing: Some(("base".into(), "raw".into())),
        ..create
    };
    block_on(Image::create(Children::new(file.clone()), &create)).unwrap();
    // It may be shorter.
    let base = Memory::new(vec![0xbb; size.min(64 << 20) as usize], None, false);
    let image = open(&file, Some(base.clone() as Arc<dyn Storage>), options).unwrap();
    block_on(image.activate(None)).unwrap();
    (image, file, base)
}

fn data(byte: u8, len: u64) -> IoVecs {
    IoVecs::from_slice(&vec![byte; len as usize])
}

async fn read(image: &Image, at: u64, len: u64) -> Vec<u8> {
    let iov = IoVecs::zeroed(len as usize, 1);
    image.read(at, iov.clone()).await.unwrap();
    iov.to_vec()
}

fn is_data(image: &Image, at: u64) -> bool {
    match image.lookup(at, 1).unwrap() {
        Lookup::Mapped(m) => matches!(m.kind, Kind::Data(_)),
        Lookup::NeedsTable { .. } => panic!("a table with a partial cluster stays in memory"),
    }
}

async fn clean(image: &Image) {
    let report = image.check(Repair::Nothing, CHECK_MEMORY).await.unwrap();
    assert!(report.corruptions == 0 && report.leaks == 0, "{report:#?}");
}

/// What the image has after the process: read with nothing behind it.
async fn alone(file: &Arc<Memory>, len: u64) -> Vec<u8> {
    let image = open(
        &Memory::new(file.data(), None, false),
        None,
        Options::default(),
    )
    .unwrap();
    clean(&image).await;
    read(&image, 0, len).await
}

#[test]
fn the_rest_of_a_cluster_is_copied_when_it_must_be() {
    let (image, file, _) = overlay(1 << 20, Options::default());
    block_on(async {
        // An unaligned write takes the parts that it touches.
        image.write(PART + 512, data(1, PART)).await.unwrap();
        let has: Vec<bool> = (0..CLUSTER / PART)
            .map(|i| is_data(&image, i * PART))
            .collect();
        assert_eq!(has.iter().filter(|h| **h).count(), 2, "{has:?}");
        assert!(has[1] && has[2]);
        let mut model = vec![0xbb; CLUSTER as usize];
        model[PART as usize + 512..2 * PART as usize + 512].fill(1);
        assert!(read(&image, 0, CLUSTER).await == model);
        // Of what a part has, more can be written in place.
        image.write(PART, data(2, 512)).await.unwrap();
        model[PART as usize..PART as usize + 512].fill(2);
        assert!(read(&image, 0, CLUSTER).await == model);
        image.flush().await.unwrap();
        assert!((0..CLUSTER / PART).all(|i| is_data(&image, i * PART)));
        assert!(read(&image, 0, CLUSTER).await == model);
        assert!(alone(&file, CLUSTER).await == model);
        image.close().await.unwrap();
        clean(&image).await;
    });
}

/// A write that needs more of a part than it has must not bring back what another has written in place meanwhile.
#[test]
fn writes_beside_a_part_with_data_stay() {
    for extended_l2 in [false, true] {
        let create = CreateOptions {
            extended_l2,
            ..CreateOptions::new(1 << 20)
        };
        let (image, file, _) = overlay_of(create, Options::default());
        // The second of two parts (or subclusters) has data, and the first has none.
        let part = if extended_l2 { 2048 } else { PART };
        block_on(async {
            image.write(part, data(1, part)).await.unwrap();
            let Lookup::Mapped(m) = image.lookup(part, 1).unwrap() else {
                panic!("its table is in memory");
            };
            let Kind::Data(host) = m.kind else {
                panic!("it was written");
            };
            file.hold(Some(host - part));
            let mut wide = pin!(image.write(part / 2, data(2, part / 2 + 512)));
            poll_fn(|cx| {
                assert!(wide.as_mut().poll(cx).is_pending());
                Poll::Ready(())
            })
            .await;
            image.write(part + 1024, data(3, 512)).await.unwrap();
            file.hold(None);
            wide.await.unwrap();
            let mut want = vec![0xbb; 2 * part as usize];
            want[part as usize..].fill(1);
            want[part as usize / 2..part as usize + 512].fill(2);
            want[part as usize + 1024..part as usize + 1536].fill(3);
            assert!(read(&image, 0, 2 * part).await == want, "{extended_l2}");
            image.flush().await.unwrap();
            assert!(read(&image, 0, 2 * part).await == want, "{extended_l2}");
            image.close().await.unwrap();
        });
    }
}

#[test]
fn what_is_written_is_not_copied() {
    let (image, _, base) = overlay(1 << 20, Options::default());
    block_on(async {
        // Nothing of the base is needed for it, neither when it is written nor later.
        base.fail_reads(Some(CLUSTER / 2));
        for i in [3, 0, 15, 7, 1, 2, 4, 5, 6, 8, 9, 10, 11, 12, 13, 14] {
            let at = i * PART;
            image.write(at, data(i as u8, PART)).await.unwrap();
        }
        image.flush().await.unwrap();
        for i in 0..16 {
            assert!(read(&image, i * PART, PART).await == vec![i as u8; PART as usize]);
        }
        image.close().await.unwrap();
        clean(&image).await;
    });
}

#[test]
fn a_bad_sector_of_the_base_is_told_and_keeps_nothing_else_from_being_durable() {
    let (image, file, base) = overlay(1 << 20, Options::default());
    block_on(async {
        base.fail_reads(Some(2 * CLUSTER - 1));
        for c in 0..4 {
            image.write(c * CLUSTER, data(7, PART)).await.unwrap();
        }
        let error = image.flush().await.unwrap_err();
        assert!(error.to_string().contains("bad sector"), "{error}");
        assert!(image.is_dirty());
        let saved = alone_but_leaks(&file, 1 << 20).await;
        for c in [0, 2, 3] {
            let at = (c * CLUSTER) as usize;
            assert_eq!(saved[at], 7);
            assert_eq!(saved[at + CLUSTER as usize - 1], 0xbb);
        }
        assert_eq!(saved[CLUSTER as usize], 0);
        // It is told again as long as it is so.
        image.flush().await.unwrap_err();
        // What was written over it is not needed.
        image
            .write(CLUSTER + PART, data(8, CLUSTER - PART))
            .await
            .unwrap();
        image.flush().await.unwrap();
        assert!(!image.is_dirty());
        image.close().await.unwrap();
        clean(&image).await;
        assert_eq!(alone(&file, 1 << 20).await[CLUSTER as usize], 7);
    });
}

/// As [`alone`], after a power cut.
async fn alone_but_leaks(file: &Arc<Memory>, len: u64) -> Vec<u8> {
    let copy = Memory::new(file.data(), None, false);
    let image = open(&copy, None, Options::default()).unwrap();
    let report = image.check(Repair::Nothing, CHECK_MEMORY).await.unwrap();
    assert_eq!(report.corruptions, 0, "{report:#?}");
    read(&image, 0, len).await
}

#[test]
fn what_is_behind_the_image_may_change() {
    for how in 0..3 {
        let (image, file, base) = overlay(1 << 20, Options::default());
        block_on(async {
            for c in 0..16 {
                image
                    .write(c * CLUSTER + PART, data(7, PART))
                    .await
                    .unwrap();
            }
            match how {
                0 => image.set_backing(None, None).await.unwrap(),
                1 => {
                    image.resize(1 << 19).await.unwrap();
                    image.resize(1 << 20).await.unwrap();
                }
                _ => image.close().await.unwrap(),
            }
            base.write(0, data(0xcc, 1 << 20)).await.unwrap();
            let end = if how == 1 { 8 } else { 16 };
            for c in 0..end {
                let got = read(&image, c * CLUSTER, CLUSTER).await;
                let mut want = vec![0xbb; CLUSTER as usize];
                want[PART as usize..2 * PART as usize].fill(7);
                assert!(got == want, "{how}, cluster {c}");
            }
            assert_eq!(alone_but_leaks(&file, 1 << 19).await[0], 0xbb);
        });
    }
}

#[test]
fn tables_with_partial_clusters_stay_in_memory() {
    // Each table is for 8 MiB, and there is room for one.
    let options = Options {
        l2_cache: 8192,
        ..Options::default()
    };
    let size = 32 << 20;
    let (image, _, base) = overlay_with(8192, size, options);
    let mut random = Random::new(3);
    let mut model = vec![0xbb; size as usize];
    block_on(async {
        // One that is stored as far as it can be, and cannot be made whole.
        base.fail_reads(Some(2 * PART - 1));
        image.write(0, data(5, PART)).await.unwrap();
        image.flush().await.unwrap_err();
        for table in 1..4 {
            image.write(table << 23, data(5, 8192)).await.unwrap();
            image.flush().await.unwrap_err();
        }
        assert!(is_data(&image, 0) && !is_data(&image, PART));
        base.fail_reads(None);
        for table in 0..4 {
            let written = if table == 0 { PART } else { 8192 } as usize;
            model[table << 23..][..written].fill(5);
        }
        for i in 0..300u64 {
            let at = random.below(size / PART) * PART;
            image.write(at, data(i as u8, PART)).await.unwrap();
            model[at as usize..(at + PART) as usize].fill(i as u8);
            if i % 40 == 0 {
                image.commit_early().await.unwrap();
            }
            let at = random.below(size / PART) * PART;
            let got = read(&image, at, PART).await;
            assert!(got == model[at as usize..(at + PART) as usize], "{i}");
        }
        assert!(read(&image, 0, size).await == model);
        image.close().await.unwrap();
        clean(&image).await;
        assert!(read(&image, 0, size).await == model);
    });
}

#[test]
fn there_are_only_so_many_of_them() {
    let options = Options {
        partial: 8 * CLUSTER,
        ..Options::default()
    };
    let (image, _, _) = overlay(4 << 20, options);
    block_on(async {
        let write = |c: u64| image.write(c * CLUSTER, data(7, PART));
        for c in 0..4 {
            write(c).await.unwrap();
        }
        assert!(!image.is_filling());
        write(4).await.unwrap();
        assert!(image.is_filling());
        for c in 5..12 {
            write(c).await.unwrap();
        }
        // The last ones were copied at once.
        let whole = |c: u64| is_data(&image, (c + 1) * CLUSTER - 1);
        let which: Vec<u64> = (0..12).filter(|c| whole(*c)).collect();
        assert_eq!(which, [8, 9, 10, 11]);
        while image.commit_early().await.unwrap() {}
        assert!(!image.is_filling() && (0..12).all(whole));
        // They may be given up, or replaced.
        for c in 20..24 {
            write(c).await.unwrap();
        }
        image.discard(20 * CLUSTER, CLUSTER).await.unwrap();
        image
            .write_zeroes(21 * CLUSTER, CLUSTER, true)
            .await
            .unwrap();
        image
            .write_zeroes(22 * CLUSTER + PART, PART, false)
            .await
            .unwrap();
        image.write(23 * CLUSTER, data(9, CLUSTER)).await.unwrap();
        assert!(!whole(22) && whole(23));
        image.flush().await.unwrap();
        assert_eq!(read(&image, 22 * CLUSTER - 1, 2).await, [0, 7]);
        assert_eq!(read(&image, 22 * CLUSTER + PART - 1, 2).await, [7, 0]);
        assert_eq!(
            read(&image, 22 * CLUSTER + 2 * PART - 1, 2).await,
            [0, 0xbb]
        );
        assert_eq!(read(&image, 24 * CLUSTER - 1, 2).await, [9, 0xbb]);
        image.close().await.unwrap();
        clean(&image).await;
    });
}

/// A few at a time are made whole while nobody waits, each once, and one that fails keeps no other from it.
#[test]
fn clusters_are_made_whole_a_few_at_a_time() {
    let options = Options {
        partial: 64 * CLUSTER,
        ..Options::default()
    };
    let (image, _, base) = overlay(8 << 20, options);
    block_on(async {
        for c in 0..64 {
            image.write(c * CLUSTER, data(7, PART)).await.unwrap();
        }
        let whole = || (0..64).filter(|c| is_data(&image, (c + 1) * CLUSTER - 1));
        assert_eq!(whole().count(), 0);
        base.fail_reads(Some(3 * CLUSTER - 1));
        let (mut steps, mut failed) = (0, 0);
        loop {
            let before = whole().count();
            match image.commit_early().await {
                Ok(true) => {}
                Ok(false) => break,
                Err(_) => failed += 1,
            }
            assert!(whole().count() <= before + 16);
            steps += 1;
        }
        assert_eq!((steps, failed), (4, 1));
        assert_eq!(whole().count(), 63);
        base.fail_reads(None);
        image.close().await.unwrap();
        clean(&image).await;
    });
}

/// A commit makes nothing durable of a cluster that is partial still: the process after this one finds it in the log.
#[test]
fn what_is_partial_outlives_the_process_and_a_commit() {
    let log = std::env::temp_dir().join(format!("vdisk-partial-{}", std::process::id()));
    let (image, file, base) = overlay(1 << 20, Options::default());
    block_on(async {
        image.close().await.unwrap();
        image.activate(Some(&log)).await.unwrap();
        base.fail_reads(Some(2 * CLUSTER - 1));
        for c in 0..4 {
            image
                .write(c * CLUSTER + PART, data(7, PART))
                .await
                .unwrap();
        }
        image.flush().await.unwrap_err();
        // More of it, after the commit.
        image.write(CLUSTER, data(8, PART)).await.unwrap();
    });
    // Killed.
    drop(image);
    base.fail_reads(None);
    // Zeroes must not be taken for what is behind it.
    let image = open(&file, None, Options::default()).unwrap();
    let error = block_on(image.activate(Some(&log))).unwrap_err();
    assert!(error.to_string().contains("backing file"), "{error}");
    drop(image);
    let behind = Some(base.clone() as Arc<dyn Storage>);
    // Killed once more, when it still could not be read.
    base.fail_reads(Some(2 * CLUSTER - 1));
    let image = open(&file, behind.clone(), Options::default()).unwrap();
    block_on(image.activate(Some(&log))).unwrap();
    drop(image);
    base.fail_reads(None);
    let image = open(&file, behind, Options::default()).unwrap();
    block_on(async {
        image.activate(Some(&log)).await.unwrap();
        let mut want = vec![0xbb; CLUSTER as usize];
        want[PART as usize..2 * PART as usize].fill(7);
        assert!(read(&image, 0, CLUSTER).await == want);
        want[..PART as usize].fill(8);
        assert!(read(&image, CLUSTER, CLUSTER).await == want);
        image.close().await.unwrap();
        clean(&image).await;
    });
}

/// Commits may fail until the log is full: what cannot be made whole is kept all the same, and writes go on when they work again.
#[test]
fn a_full_log_keeps_what_is_partial() {
    let log = std::env::temp_dir().join(format!("vdisk-full-{}", std::process::id()));
    let (image, file, base) = overlay_with(8192, 3 << 30, Options::default());
    block_on(async {
        image.close().await.unwrap();
        image.activate(Some(&log)).await.unwrap();
        base.fail_reads(Some(8191));
        image.write(0, data(7, PART)).await.unwrap();
        // As long as no commit ends, everything stays in the log.
        file.fail_flushes(true);
        let mut refused = 0;
        for at in (8 << 20..3 << 30).step_by(8 << 20) {
            let zeroed = image.write_zeroes(at, 8 << 20, true).await;
            refused += u32::from(zeroed.is_err());
        }
        assert!(refused > 100, "{refused}");
        file.fail_flushes(false);
        for c in 1..100 {
            image.write(c * 8192, data(8, 8192)).await.unwrap();
        }
    });
    drop(image);
    base.fail_reads(None);
    let image = open(&file, Some(base as Arc<dyn Storage>), Options::default()).unwrap();
    block_on(async {
        image.activate(Some(&log)).await.unwrap();
        let mut want = vec![8; 100 * 8192];
        want[..PART as usize].fill(7);
        want[PART as usize..8192].fill(0xbb);
        assert!(read(&image, 0, 100 * 8192).await == want);
        assert!(read(&image, 2 << 30, 8192).await == vec![0; 8192]);
        image.close().await.unwrap();
        clean(&image).await;
    });
}

/// More of a cluster is written while a commit makes other things durable: the process after this one finds all of it.
#[test]
fn what_changes_during_a_commit_outlives_the_process() {
    let log = std::env::temp_dir().join(format!("vdisk-during-{}", std::process::id()));
    for turns in 0..40 {
        let file = Memory::new(Vec::new(), Some(turns), true);
        let base = Memory::new(vec![0xbb; 1 << 20], None, false);
        let create = CreateOptions {
            backing: Some(("base".into(), "raw".into())),
            ..CreateOptions::new(1 << 20)
        };
        block_on(Image::create(Children::new(file.clone()), &create)).unwrap();
        let open_again = || {
            let behind = Some(base.clone() as Arc<dyn Storage>);
            let image = open(&file, behind, Options::default()).unwrap();
            block_on(image.activate(Some(&log))).unwrap();
            image
        };
        let image = open_again();
        base.fail_reads(Some(CLUSTER - 1));
        block_on(async {
            image.write(0, data(7, PART)).await.unwrap();
            let later = async {
                for _ in 0..turns {
                    give_way().await;
                }
                image.write(2 * PART, data(8, PART)).await.unwrap();
            };
            let (flushed, ()) = futures_util::future::join(image.flush(), later).await;
            flushed.unwrap_err();
        });
        // Killed.
        drop(image);
        base.fail_reads(None);
        let image = open_again();
        block_on(async {
            let mut want = vec![0xbb; CLUSTER as usize];
            want[..PART as usize].fill(7);
            want[2 * PART as usize..3 * PART as usize].fill(8);
            assert!(read(&image, 0, CLUSTER).await == want, "{turns}");
            image.close().await.unwrap();
            clean(&image).await;
        });
    }
}
