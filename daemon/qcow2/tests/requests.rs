//! Requests beside each other, and with storage that fails.

mod memory;

use std::future::poll_fn;
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use memory::{Memory, Random, block_on, open};
use vdisk_io::{IoVecs, give_way};
use vdisk_qcow2::{
    CHECK_MEMORY, Children, CreateOptions, Image, Kind, Lookup, Options, Preallocation, Repair,
    Storage,
};

fn created(options: &CreateOptions) -> Arc<Memory> {
    let file = Memory::new(Vec::new(), None, false);
    block_on(Image::create(Children::new(file.clone()), options)).unwrap();
    file
}

fn data(byte: u8, len: usize) -> IoVecs {
    IoVecs::from_slice(&vec![byte; len])
}

async fn read(image: &Image, at: u64, len: usize) -> Vec<u8> {
    let iov = IoVecs::zeroed(len, 1);
    image.read(at, iov.clone()).await.unwrap();
    iov.to_vec()
}

fn place(image: &Image, at: u64) -> Option<u64> {
    match image.lookup(at, 1) {
        Ok(Lookup::Mapped(m)) => match m.kind {
            Kind::Data(host) => Some(host),
            _ => None,
        },
        _ => None,
    }
}

async fn clean(image: &Image) {
    let report = image.check(Repair::Nothing, CHECK_MEMORY).await.unwrap();
    assert!(report.corruptions == 0 && report.leaks == 0, "{report:#?}");
}

/// A write that found its place before a discard must not end up in what is there after it.
#[test]
fn a_write_in_flight_keeps_its_cluster() {
    let file = created(&CreateOptions {
        cluster_size: 4096,
        ..CreateOptions::new(1 << 20)
    });
    let image = open(&file, None, Options::default()).unwrap();
    block_on(async {
        image.activate(None).await.unwrap();
        image.write(0, data(1, 4096)).await.unwrap();
        image.flush().await.unwrap();
        let host = place(&image, 0).unwrap();
        file.hold(Some(host));
        let request = file.request();
        let mut late = pin!(image.write(0, data(2, 4096)));
        poll_fn(|cx| {
            assert!(late.as_mut().poll(cx).is_pending());
            Poll::Ready(())
        })
        .await;
        image.discard(0, 4096).await.unwrap();
        let mut tidy = pin!(image.tidy());
        for _ in 0..100 {
            poll_fn(|cx| {
                assert!(tidy.as_mut().poll(cx).is_pending());
                Poll::Ready(())
            })
            .await;
            give_way().await;
        }
        // Nobody else gets the cluster meanwhile.
        image.write(8192, data(3, 4096)).await.unwrap();
        assert_ne!(place(&image, 8192), Some(host));
        file.hold(None);
        late.await.unwrap();
        drop(request);
        tidy.await.unwrap();
        image.write(16384, data(4, 4096)).await.unwrap();
        assert_eq!(place(&image, 16384), Some(host));
        assert_eq!(read(&image, 0, 4096).await, [0; 4096]);
        assert_eq!(read(&image, 8192, 4096).await, [3; 4096]);
        assert_eq!(read(&image, 16384, 4096).await, [4; 4096]);
        image.close().await.unwrap();
        clean(&image).await;
    });
}

/// The process ends without a word: what was answered is done by the next one.
#[test]
fn what_was_answered_outlives_the_process() {
    let dir = std::env::temp_dir().join(format!("vdisk-redo-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    for (seed, cluster_size, extended_l2, overlay) in [
        (1, 512, false, false),
        (2, 65536, false, false),
        (3, 16384, true, false),
        (4, 65536, false, true),
        (5, 16384, true, true),
        (6, 32768, false, true),
    ] {
        let base = overlay.then(|| Memory::new(vec![0xbb; 900_000], None, false));
        let base = base.map(|b| b as Arc<dyn Storage>);
        let log = dir.join(format!("{seed}"));
        let file = created(&CreateOptions {
            cluster_size,
            extended_l2,
            backing: overlay.then(|| ("base".into(), "raw".into())),
            ..CreateOptions::new(1 << 20)
        });
        let mut random = Random::new(seed);
        let mut model = vec![0u8; 1 << 20];
        if overlay {
            model[..900_000].fill(0xbb);
        }
        for round in 0..6u8 {
            let image = open(&file, base.clone(), Options::default()).unwrap();
            block_on(async {
                image.activate(Some(&log)).await.unwrap();
                assert!(
                    read(&image, 0, 1 << 20).await == model,
                    "seed {seed}, round {round}"
                );
                // The first one ends before anything was written.
                for i in 0..if round == 0 { 0 } else { 30u8 } {
                    let at = random.below(2040) * 512;
                    let len = 512 * (1 + random.below(8)) as usize;
                    let range = at as usize..at as usize + len;
                    let byte = round * 30 + i + 1;
                    match random.below(6) {
                        0 => {
                            image.write_zeroes(at, len as u64, true).await.unwrap();
                            model[range].fill(0);
                        }
                        1 => image.flush().await.unwrap(),
                        2 => image.tidy().await.unwrap(),
                        _ => {
                            image.write(at, data(byte, len)).await.unwrap();
                            model[range].fill(byte);
                        }
                    }
                }
            });
            // Killed.
            drop(image);
        }
        let image = open(&file, base.clone(), Options::default()).unwrap();
        block_on(async {
            image.activate(Some(&log)).await.unwrap();
            assert!(read(&image, 0, 1 << 20).await == model);
            let report = image.check(Repair::Leaks, CHECK_MEMORY).await.unwrap();
            assert_eq!(report.corruptions, 0, "{report:#?}");
            image.close().await.unwrap();
            assert!(!log.exists());
            clean(&image).await;
            // Noted for an image that somebody else has changed since: left out.
            image.activate(Some(&log)).await.unwrap();
            image.write_zeroes(0, 1 << 20, true).await.unwrap();
            image.flush().await.unwrap();
            image.write(0, data(1, 512)).await.unwrap();
            let old = file.data();
            image.flush().await.unwrap();
            image.write_zeroes(0, 1 << 20, true).await.unwrap();
            drop(image);
            let other = Memory::new(old, None, false);
            let image = open(&other, None, Options::default()).unwrap();
            image.activate(Some(&log)).await.unwrap();
            let report = image.check(Repair::Nothing, CHECK_MEMORY).await.unwrap();
            assert_eq!(report.corruptions, 0, "{report:#?}");
            drop(image);
            // Or opened by somebody who does not know of it, who clears the bit in the header.
            let mut bytes = other.data();
            assert_eq!(bytes[88], 0x80);
            bytes[88] = 0;
            let other = Memory::new(bytes, None, false);
            let image = open(&other, None, Options::default()).unwrap();
            let before = read(&image, 0, 1 << 20).await;
            image.activate(Some(&log)).await.unwrap();
            assert!(read(&image, 0, 1 << 20).await == before);
        });
    }
    std::fs::remove_dir_all(&dir).unwrap();
    // Without the folder it works as well.
    let file = created(&CreateOptions::new(1 << 20));
    let image = open(&file, None, Options::default()).unwrap();
    block_on(async {
        image.activate(Some(&dir.join("gone"))).await.unwrap();
        image.write(0, data(1, 512)).await.unwrap();
        image.close().await.unwrap();
        clean(&image).await;
    });
}

#[test]
fn neighbours_are_allocated_in_one_piece() {
    let file = created(&CreateOptions::new(64 << 20));
    let image = open(&file, None, Options::default()).unwrap();
    block_on(async {
        image.activate(None).await.unwrap();
        image.write(0, data(1, 1 << 20)).await.unwrap();
        image.write(1 << 20, data(1, 1 << 20)).await.unwrap();
        let Ok(Lookup::Mapped(m)) = image.lookup(0, 2 << 20) else {
            panic!();
        };
        assert_eq!(m.len, 2 << 20);
        // A small write takes no more than its own bytes to a cluster that is new.
        let before = file.log().len();
        assert_eq!(before, 0);
    });
}

#[test]
fn new_clusters_are_not_filled_with_zeroes() {
    let base = created(&CreateOptions::new(64 << 20)).data();
    let file = Memory::new(base, None, true);
    let image = open(&file, None, Options::default()).unwrap();
    block_on(async {
        image.activate(None).await.unwrap();
        image.write(4096, data(1, 4096)).await.unwrap();
        let host = place(&image, 4096).unwrap();
        let writes: Vec<(u64, usize)> = file
            .log()
            .iter()
            .filter_map(|e| match &e.change {
                Some(memory::Change::Write(at, bytes)) => Some((*at, bytes.len())),
                _ => None,
            })
            .collect();
        assert_eq!(writes, [(host, 4096)]);
    });
}

#[test]
fn what_fails_can_be_tried_again() {
    for n in 0..40 {
        let file = created(&CreateOptions {
            cluster_size: 512,
            ..CreateOptions::new(256 << 10)
        });
        let image = open(&file, None, Options::default()).unwrap();
        block_on(async {
            image.activate(None).await.unwrap();
            let mut random = Random::new(n + 1);
            let mut model = vec![0; 256 << 10];
            let mut unknown = vec![false; 256 << 10];
            file.fail_after(Some(n));
            for i in 0..60u8 {
                if i == 30 {
                    file.fail_after(None);
                }
                let at = random.below(500) * 512;
                let len = 512 * (1 + random.below(8)) as usize;
                let range = at as usize..at as usize + len;
                let ok = match random.below(4) {
                    0 => image.write_zeroes(at, len as u64, true).await.map(|()| 0),
                    1 => {
                        let _ = image.flush().await;
                        continue;
                    }
                    _ => image.write(at, data(i + 1, len)).await.map(|()| i + 1),
                };
                match ok {
                    Ok(byte) => {
                        model[range.clone()].fill(byte);
                        unknown[range].fill(false);
                    }
                    Err(_) => unknown[range].fill(true),
                }
            }
            image.flush().await.unwrap();
            let got = read(&image, 0, model.len()).await;
            for i in 0..model.len() {
                assert!(unknown[i] || got[i] == model[i], "run {n}, byte {i}");
            }
            image.close().await.unwrap();
            clean(&image).await;
            let again = open(&file, None, Options::default()).unwrap();
            assert!(read(&again, 0, model.len()).await == got);
        });
    }
}

/// An image of 32 tables, and options by which there is room for eight.
fn with_eight_tables() -> (Arc<Memory>, Options) {
    let file = created(&CreateOptions {
        cluster_size: 512,
        ..CreateOptions::new(1 << 20)
    });
    let options = Options {
        l2_cache: 8 * 512,
        ..Options::default()
    };
    (file, options)
}

/// After a change of the whole image in which a write has failed, whichever it was, the file has what was flushed since.
#[test]
fn what_fails_loses_nothing_that_is_flushed_afterwards() {
    let empty = created(&CreateOptions {
        cluster_size: 512,
        ..CreateOptions::new(1 << 20)
    });
    for what in ["resize", "create", "apply", "delete"] {
        let mut failed = 0;
        for writes in 0.. {
            let file = Memory::new(empty.data(), None, false);
            let image = open(&file, None, Options::default()).unwrap();
            let done = block_on(async {
                image.activate(None).await.unwrap();
                image.write(0, data(1, 4096)).await.unwrap();
                image.create_snapshot("a", (1, 2)).await.unwrap();
                image.write(4096, data(1, 4096)).await.unwrap();
                image.flush().await.unwrap();
                file.fail_after(Some(writes));
                let done = match what {
                    "resize" => image.resize(16 << 20).await,
                    "create" => image.create_snapshot("b", (1, 2)).await.map(drop),
                    "apply" => image.apply_snapshot("a").await.map(drop),
                    _ => image.delete_snapshot("a").await.map(drop),
                };
                file.fail_after(None);
                // The L1 table has something new with it.
                image.write(1 << 19, data(2, 4096)).await.unwrap();
                image.flush().await.unwrap();
                done.is_ok()
            });
            // The machine is switched off.
            drop(image);
            let image = open(&file, None, Options::default()).unwrap();
            block_on(async {
                image.activate(None).await.unwrap();
                let grown = done && what == "resize";
                assert_eq!(image.size(), if grown { 16 << 20 } else { 1 << 20 });
                assert!(read(&image, 0, 4096).await == [1; 4096], "{what} {writes}");
                let got = read(&image, 1 << 19, 4096).await;
                assert!(got == [2; 4096], "{what} {writes}");
                image.close().await.unwrap();
                let report = image.check(Repair::Leaks, CHECK_MEMORY).await.unwrap();
                assert_eq!(report.corruptions, 0, "{what} {writes}: {report:#?}");
            });
            match done {
                true => break,
                false => failed += 1,
            }
        }
        assert!(failed > 4, "{what} {failed}");
    }
}

/// A bitmap that could not be stored goes on in memory: the file does not say that it is right.
#[test]
fn bitmaps_that_are_not_stored_do_not_count() {
    let mut failed = 0;
    for writes in 0.. {
        let file = created(&CreateOptions {
            cluster_size: 512,
            ..CreateOptions::new(1 << 20)
        });
        let image = open(&file, None, Options::default()).unwrap();
        let done = block_on(async {
            image.activate(None).await.unwrap();
            image.add_bitmap("b", 65536, true).unwrap();
            file.fail_after(Some(writes));
            let done = image.close().await;
            file.fail_after(None);
            if done.is_err() {
                image.write(1 << 19, data(2, 4096)).await.unwrap();
                image.flush().await.unwrap();
            }
            done.is_ok()
        });
        // The machine is switched off.
        drop(image);
        let image = open(&file, None, Options::default()).unwrap();
        let stored = block_on(image.bitmaps()).unwrap();
        // Bit 0: the directory of bitmaps is right.
        let counts = image.header().autoclear & 1 != 0;
        let right = counts && stored.iter().any(|b| !b.in_use);
        assert_eq!(right, done, "{writes}: {counts} {stored:?}");
        match done {
            true => break,
            false => failed += 1,
        }
    }
    assert!(failed > 4, "{failed}");
}

/// What a killed process has noted is done by the first one that can, in a file and on a device.
#[test]
fn a_log_that_cannot_be_done_is_done_later() {
    let dir = std::env::temp_dir().join(format!("vdisk-later-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    let log = dir.join("log");
    for device in [false, true] {
        let mut failed = 0;
        for writes in 0.. {
            let file = created(&CreateOptions {
                cluster_size: 512,
                ..CreateOptions::new(1 << 20)
            });
            if device {
                // The last cluster is not there wholly.
                file.fix_size((1 << 20) + 100);
            }
            let image = open(&file, None, Options::default()).unwrap();
            block_on(async {
                image.activate(Some(&log)).await.unwrap();
                // Reference counts of this need several blocks that the file does not have yet.
                image.write(0, data(1, 300 << 10)).await.unwrap();
            });
            // Killed.
            drop(image);
            file.fail_after(Some(writes));
            let image = open(&file, None, Options::default()).unwrap();
            let done = block_on(image.activate(Some(&log)));
            drop(image);
            file.fail_after(None);
            let image = open(&file, None, Options::default()).unwrap();
            block_on(async {
                image.activate(Some(&log)).await.unwrap();
                assert!(
                    read(&image, 0, 300 << 10).await == vec![1; 300 << 10],
                    "{writes}"
                );
                image.flush().await.unwrap();
            });
            // The machine is switched off: the log says nothing then.
            drop(image);
            std::fs::remove_file(&log).unwrap();
            let image = open(&file, None, Options::default()).unwrap();
            block_on(async {
                image.activate(None).await.unwrap();
                assert!(
                    read(&image, 0, 300 << 10).await == vec![1; 300 << 10],
                    "{writes}"
                );
                image.close().await.unwrap();
                let report = image.check(Repair::Leaks, CHECK_MEMORY).await.unwrap();
                assert_eq!(report.corruptions, 0, "{writes}: {report:#?}");
            });
            match done {
                Ok(()) => break,
                Err(_) => failed += 1,
            }
        }
        assert!(failed > 3, "{failed}");
    }
    std::fs::remove_dir_all(&dir).unwrap();
}

/// A device that ends where a block of reference counts would have to begin.
#[test]
fn a_device_that_is_full_goes_on_being_written() {
    let file = created(&CreateOptions {
        cluster_size: 512,
        ..CreateOptions::new(1 << 20)
    });
    // A block counts 128 KiB.
    file.fix_size((256 << 10) + 100);
    let image = open(&file, None, Options::default()).unwrap();
    block_on(async {
        image.activate(None).await.unwrap();
        let mut written = 0;
        let error = loop {
            match image.write(written, data(1, 4096)).await {
                Ok(()) => written += 4096,
                Err(e) => break e,
            }
        };
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
        assert!(written > 200 << 10, "{written}");
        image.flush().await.unwrap();
        image.discard(0, 64 << 10).await.unwrap();
        image.tidy().await.unwrap();
        image.write(0, data(2, 32 << 10)).await.unwrap();
        image.flush().await.unwrap();
        assert!(read(&image, 0, 32 << 10).await == vec![2; 32 << 10]);
        image.close().await.unwrap();
        clean(&image).await;
    });
}

/// Whatever of a growing disk was there when the process was killed: what guests had written before is.
#[test]
fn what_was_answered_outlives_a_resize_that_was_not_finished() {
    let dir = std::env::temp_dir().join(format!("vdisk-resize-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    let log = dir.join("log");
    let base = Memory::new(vec![0xbb; 4 << 20], None, false) as Arc<dyn Storage>;
    let empty = created(&CreateOptions {
        backing: Some(("base".into(), "raw".into())),
        ..CreateOptions::new(1 << 20)
    });
    let (mut unfinished, mut noted) = (0, 0);
    for polls in 0..120 {
        let file = Memory::new(empty.data(), Some(polls + 1), false);
        let image = open(&file, Some(base.clone()), Options::default()).unwrap();
        block_on(async {
            image.activate(Some(&log)).await.unwrap();
            image.write(65536, data(7, 65536)).await.unwrap();
        });
        let mut resize = Box::pin(image.resize(2 << 20));
        let mut context = Context::from_waker(Waker::noop());
        let ready = (0..polls).any(|_| resize.as_mut().poll(&mut context).is_ready());
        drop(resize);
        unfinished += u32::from(!ready);
        noted += u32::from(image.is_dirty() && !ready && polls > 0);
        // Killed.
        drop(image);
        let image = open(&file, Some(base.clone()), Options::default()).unwrap();
        block_on(async {
            image.activate(Some(&log)).await.unwrap();
            assert!(read(&image, 65536, 65536).await == [7; 65536], "{polls}");
            let size = image.size();
            image.resize(4 << 20).await.unwrap();
            let new = read(&image, size, (4 << 20) - size as usize).await;
            assert!(new.iter().all(|b| *b == 0), "{polls}");
            image.close().await.unwrap();
            let report = image.check(Repair::Leaks, CHECK_MEMORY).await.unwrap();
            assert_eq!(report.corruptions, 0, "{report:#?}");
        });
    }
    assert!(noted > 0 && unfinished > noted, "{noted} of {unfinished}");
    std::fs::remove_dir_all(&dir).unwrap();
}

#[test]
fn an_early_commit_that_fails_is_told_by_the_next_flush() {
    let (file, options) = with_eight_tables();
    let image = open(&file, None, options).unwrap();
    block_on(async {
        image.activate(None).await.unwrap();
        // Each in another table: four of the eight that there is room for.
        for table in 0..4 {
            assert!(!image.is_filling(), "{table} tables have changed");
            image.write(table * (32 << 10), data(7, 512)).await.unwrap();
        }
        assert!(image.is_filling());
        // Tables that could not be written are written the next time: nothing is lost.
        file.fail_after(Some(0));
        image.commit_early().await.unwrap_err();
        file.fail_after(None);
        image.flush().await.unwrap();
        for table in 4..8 {
            image.write(table * (32 << 10), data(7, 512)).await.unwrap();
        }
        // What the storage has lost it says once, and nobody has asked.
        file.fail_flushes(true);
        image.commit_early().await.unwrap_err();
        file.fail_flushes(false);
        let error = image.flush().await.unwrap_err();
        assert!(error.to_string().contains("could not be made durable"));
        image.flush().await.unwrap();
        // And one that works leaves nothing to do.
        for table in 8..12 {
            image.write(table * (32 << 10), data(7, 512)).await.unwrap();
        }
        image.commit_early().await.unwrap();
        assert!(!image.is_filling() && !image.is_dirty());
        image.flush().await.unwrap();
        image.close().await.unwrap();
        clean(&image).await;
    });
}

/// A write of a commit that has failed must not come to its place after that of the next one.
#[test]
fn a_commit_that_fails_waits_for_all_that_it_writes() {
    let (file, options) = with_eight_tables();
    let image = open(&file, None, options).unwrap();
    block_on(async {
        image.activate(None).await.unwrap();
        let write = async |at: u64| {
            for table in 0..2 {
                let at = table * (32 << 10) + at;
                image.write(at, data(7, 512)).await.unwrap();
            }
        };
        write(0).await;
        image.flush().await.unwrap();
        write(512).await;
        // The first of both tables is slow, and the other one fails, after the reference counts.
        let bytes = file.data();
        let word = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap());
        let table = word(word(40) as usize) & !(1 << 63);
        file.hold(Some(table));
        file.fail_after(Some(2));
        let mut flush = pin!(image.flush());
        for _ in 0..20 {
            let mut context = Context::from_waker(Waker::noop());
            assert!(flush.as_mut().poll(&mut context).is_pending());
        }
        file.hold(None);
        flush.await.unwrap_err();
        file.fail_after(None);
        image.close().await.unwrap();
        clean(&image).await;
    });
}

#[test]
fn a_commit_that_is_dropped_half_way_loses_nothing() {
    let (empty, options) = with_eight_tables();
    for polls in 0..40 {
        // (With a seed its operations take some turns.)
        let file = Memory::new(empty.data(), Some(polls + 1), false);
        let image = open(&file, None, options).unwrap();
        block_on(async {
            image.activate(None).await.unwrap();
            for table in 0..4 {
                let at = table * (32 << 10) + polls * 512;
                image.write(at, data(7, 512)).await.unwrap();
            }
            // Its task goes with its I/O thread.
            let mut commit = Box::pin(image.commit_early());
            for _ in 0..polls {
                let mut context = Context::from_waker(Waker::noop());
                if commit.as_mut().poll(&mut context).is_ready() {
                    break;
                }
            }
            drop(commit);
            image.close().await.unwrap();
            clean(&image).await;
        });
        let again = open(&file, None, options).unwrap();
        let got = block_on(read(&again, polls * 512, 512));
        assert!(got == [7; 512], "after {polls} polls");
    }
}

#[test]
fn sizes_change_both_ways() {
    for (version, cluster_size) in [(3, 512), (3, 65536), (2, 4096)] {
        let backing = Memory::new(vec![9; 3 << 20], None, false);
        let file = created(&CreateOptions {
            version,
            cluster_size,
            backing: Some(("base".into(), "raw".into())),
            ..CreateOptions::new(1 << 20)
        });
        let image = open(&file, Some(backing), Options::default()).unwrap();
        block_on(async {
            image.activate(None).await.unwrap();
            image.write(0, data(1, 1 << 20)).await.unwrap();
            image.resize((512 << 10) + 512).await.unwrap();
            image.tidy().await.unwrap();
            clean(&image).await;
            image.resize(4 << 20).await.unwrap();
            let mut want = vec![1; (512 << 10) + 512];
            want.resize(4 << 20, 0);
            assert!(read(&image, 0, 4 << 20).await == want);
            image
                .write(4 * (1 << 20) - 512, data(2, 512))
                .await
                .unwrap();
            image.close().await.unwrap();
            clean(&image).await;
            assert_eq!(image.header().size, 4 << 20);
        });
    }
}

#[test]
fn preallocation_reads_as_zeroes_and_is_written_in_place() {
    for preallocation in [Preallocation::Metadata, Preallocation::Full] {
        for extended_l2 in [false, true] {
            let file = created(&CreateOptions {
                preallocation,
                extended_l2,
                ..CreateOptions::new((20 << 20) + 512)
            });
            let image = open(&file, None, Options::default()).unwrap();
            block_on(async {
                let size = image.size() as usize;
                assert!(read(&image, 0, size).await.iter().all(|b| *b == 0));
                let host = place(&image, 1 << 20);
                image.activate(None).await.unwrap();
                image.write(1 << 20, data(5, 512)).await.unwrap();
                assert!(host.is_some() && host == place(&image, 1 << 20));
                image.close().await.unwrap();
                clean(&image).await;
            });
        }
    }
}

#[test]
fn damage_is_found_and_repaired() {
    let options = CreateOptions {
        cluster_size: 4096,
        ..CreateOptions::new(8 << 20)
    };
    let sound = {
        let file = created(&options);
        let image = open(&file, None, Options::default()).unwrap();
        block_on(async {
            image.activate(None).await.unwrap();
            for at in (0..8 << 20).step_by(64 << 10) {
                image.write(at, data(7, 8192)).await.unwrap();
            }
            image.close().await.unwrap();
        });
        file.data()
    };
    let header = open(
        &Memory::new(sound.clone(), None, false),
        None,
        Options::default(),
    )
    .unwrap()
    .header();
    let l1 = header.l1_offset as usize;
    let table = header.refcount_table_offset as usize;
    let word = |at: usize| u64::from_be_bytes(sound[at..at + 8].try_into().unwrap());
    let block = word(table) as usize;
    let l2 = (word(l1) & 0x00ff_ffff_ffff_fe00) as usize;
    for (what, at, value) in [
        ("a count too low", block + 2 * 20, &[0, 0][..]),
        ("a count too high", block + 2 * 20, &[0, 9]),
        ("all counts lost", block, &[0; 4096]),
        ("no block", table, &[0; 8]),
        ("a block over the header", table, &[0, 0, 0, 0, 0, 0, 2, 0]),
        ("no COPIED flag", l1, &[0]),
        ("COPIED without a place", l2 + 15 * 8, &[0x80]),
        ("a cluster out of the file", l2 + 16 * 8, &[0x80, 0x7f]),
        ("an unaligned cluster", l2 + 6, &[2]),
        ("no refcount table", 48, &[0; 12]),
        ("marked dirty", 79, &[1]),
        ("marked corrupt", 79, &[2]),
    ] {
        let mut bytes = sound.clone();
        bytes[at..at + value.len()].copy_from_slice(value);
        let file = Memory::new(bytes, None, false);
        let image = open(&file, None, Options::default()).unwrap();
        block_on(async {
            let found = image.check(Repair::Nothing, CHECK_MEMORY).await.unwrap();
            let header = image.header();
            let wrong = found.corruptions + found.leaks > 0 || header.dirty || header.corrupt;
            assert!(wrong || what.starts_with("COPIED"), "{what}: {found:#?}");
            let fixed = image.check(Repair::All, CHECK_MEMORY).await.unwrap();
            assert!(fixed.is_clean(), "{what}: {fixed:#?}");
            clean(&image).await;
            assert!(read(&image, 128 << 10, 8192).await == [7; 8192], "{what}");
            let header = image.header();
            assert!(!header.dirty && !header.corrupt);
        });
    }
}

#[test]
fn the_end_of_the_storage_is_an_error_and_nothing_else() {
    let file = created(&CreateOptions::new(1 << 30));
    let image = open(&file, None, Options::default()).unwrap();
    block_on(async {
        image.activate(None).await.unwrap();
        let mut written = 0;
        let error = loop {
            match image.write(written, data(1, 1 << 20)).await {
                Ok(()) => written += 1 << 20,
                Err(e) => break e,
            }
        };
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
        assert!(written > 30 << 20);
        image.flush().await.unwrap();
        assert!(read(&image, 0, 30 << 20).await.iter().all(|b| *b == 1));
        image.discard(0, 8 << 20).await.unwrap();
        image.tidy().await.unwrap();
        image.write(100 << 20, data(2, 4 << 20)).await.unwrap();
        image.close().await.unwrap();
        clean(&image).await;
    });
}

/// What a guest writes while the image gets what its backing file has stays, and the rest is the backing file's.
#[test]
fn writes_beside_populate_stay() {
    const SIZE: usize = 1 << 18;
    for seed in 0..60 {
        let mut random = Random::new(seed);
        let options = CreateOptions {
            cluster_size: [4096, 16384, 65536][seed as usize % 3],
            extended_l2: seed % 3 > 0 && seed % 2 == 0,
            backing: Some(("base".into(), "raw".into())),
            ..CreateOptions::new(SIZE as u64)
        };
        let empty = Memory::new(Vec::new(), None, false);
        let below: Vec<u8> = (0..SIZE).map(|i| (i / 512) as u8 | 1).collect();
        let base = Memory::new(below.clone(), Some(seed), false);
        block_on(Image::create(Children::new(empty.clone()), &options)).unwrap();
        let file = Memory::new(empty.data(), Some(seed + 1), false);
        let image = open(&file, Some(base), Options::default()).unwrap();
        let mut model = below.clone();
        block_on(async {
            image.activate(None).await.unwrap();
            for round in 0..4 {
                let mut all: Vec<std::pin::Pin<Box<dyn Future<Output = ()> + '_>>> = Vec::new();
                let at = random.below(SIZE as u64 / 2) as usize / 512 * 512;
                let zero = random.below(4) == 0;
                // Twice the same, as two workers of a job would not, and one that is shorter.
                for len in [SIZE - at, SIZE / 4] {
                    let piece = IoVecs::from_slice(&below[at..at + len]);
                    let image = &image;
                    all.push(Box::pin(async move {
                        let data = (!zero).then_some(piece);
                        image.populate(at as u64, len as u64, data).await.unwrap();
                    }));
                }
                let mut taken: Vec<std::ops::Range<usize>> = Vec::new();
                for i in 0..12 {
                    let len = (random.below(40) as usize + 1) * 512;
                    let at = random.below((SIZE - len) as u64) as usize / 512 * 512;
                    let range = at..at + len;
                    if taken
                        .iter()
                        .any(|t| t.start < range.end && range.start < t.end)
                    {
                        continue;
                    }
                    let byte = 100 + i * 2 + round;
                    model[range.clone()].fill(byte);
                    taken.push(range);
                    let image = &image;
                    all.push(Box::pin(async move {
                        image.write(at as u64, data(byte, len)).await.unwrap();
                    }));
                }
                let mut left: Vec<_> = all.into_iter().map(Some).collect();
                poll_fn(|cx| {
                    for slot in &mut left {
                        if let Some(f) = slot
                            && f.as_mut().poll(cx).is_ready()
                        {
                            *slot = None;
                        }
                    }
                    match left.iter().all(Option::is_none) {
                        true => Poll::Ready(()),
                        false => Poll::Pending,
                    }
                })
                .await;
                let got = read(&image, 0, SIZE).await;
                for (i, (got, want)) in got.iter().zip(&model).enumerate() {
                    // Zeroes were put where nothing had been written, by this round or one before.
                    let hidden = *want == below[i] && *got == 0;
                    assert!(
                        got == want || hidden,
                        "seed {seed}, round {round}, byte {i}: {got} {want}"
                    );
                }
                model = got;
            }
            clean(&image).await;
        });
    }
}

fn discarding() -> Options {
    Options {
        pass_discard_request: true,
        pass_discard_other: true,
        ..Options::default()
    }
}

/// While the space of a cluster goes back to the storage, no other compressed data is put into it.
#[test]
fn what_is_being_discarded_takes_no_compressed_data() {
    const CLUSTER: usize = 65536;
    let file = created(&CreateOptions::new(1 << 20));
    let image = open(&file, None, discarding()).unwrap();
    block_on(async {
        image.activate(None).await.unwrap();
        image.write_compressed(0, data(1, CLUSTER)).await.unwrap();
        let Ok(Lookup::Mapped(m)) = image.lookup(0, 1) else {
            panic!("it is not there");
        };
        let Kind::Compressed { offset, .. } = m.kind else {
            panic!("{:?}", m.kind);
        };
        // Gone from the image, and its cluster has room.
        image.write(0, data(2, CLUSTER)).await.unwrap();
        file.hold(Some(offset / CLUSTER as u64 * CLUSTER as u64));
        let second = async {
            for _ in 0..20 {
                give_way().await;
            }
            let other = image.write_compressed(CLUSTER as u64, data(3, CLUSTER));
            other.await.unwrap();
            file.hold(None);
        };
        let (tidied, ()) = futures_util::future::join(image.tidy(), second).await;
        tidied.unwrap();
        assert_eq!(read(&image, CLUSTER as u64, CLUSTER).await, [3; CLUSTER]);
        image.close().await.unwrap();
        clean(&image).await;
    });
}

/// A block of reference counts that cannot be read keeps what it counts from being freed, and nothing else.
#[test]
fn what_cannot_be_freed_keeps_no_others() {
    const CLUSTER: u64 = 512;
    const PER_BLOCK: u64 = 256;
    let file = created(&CreateOptions {
        cluster_size: CLUSTER,
        ..CreateOptions::new(1 << 20)
    });
    let len = 3 * PER_BLOCK * CLUSTER;
    block_on(async {
        let image = open(&file, None, Options::default()).unwrap();
        image.activate(None).await.unwrap();
        image.write(0, data(1, len as usize)).await.unwrap();
        image.close().await.unwrap();
    });
    let bytes = file.data();
    let word =
        |at: u64| u64::from_be_bytes(bytes[at as usize..at as usize + 8].try_into().unwrap());
    let block = word(word(48) + 8);
    let file = Memory::new(bytes.clone(), None, true);
    let image = open(&file, None, discarding()).unwrap();
    let freed = |range: std::ops::Range<u64>| {
        let log = file.log();
        log.iter().any(
            |e| matches!(e.change, Some(memory::Change::Discard(at, _)) if range.contains(&at)),
        )
    };
    let counted = |n: u64| n * PER_BLOCK * CLUSTER..(n + 1) * PER_BLOCK * CLUSTER;
    block_on(async {
        image.activate(None).await.unwrap();
        image.discard(0, len).await.unwrap();
        file.fail_reads(Some(block));
        image.tidy().await.unwrap_err();
        assert!(freed(counted(0)) && !freed(counted(1)) && freed(counted(2)));
        file.fail_reads(None);
        image.tidy().await.unwrap();
        assert!(freed(counted(1)));
        image.close().await.unwrap();
        clean(&image).await;
    });
}
