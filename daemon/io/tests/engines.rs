//! What an I/O thread promises, on each engine.

use std::cell::{Cell, RefCell};
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use vdisk_io::{
    EngineChoice, EngineKind, Fallocate, IoFile, IoThread, IoThreadConfig, IoVecs, OpKind, Reactor,
    Source, SourceId,
};

fn on_each_engine(test: impl Fn(&IoThread)) {
    for (choice, kind) in [
        (EngineChoice::Uring, EngineKind::Uring),
        (EngineChoice::Aio, EngineKind::Aio),
        (EngineChoice::Threads, EngineKind::Threads),
    ] {
        let mut config = IoThreadConfig::new(format!("test-{kind}"));
        config.engine = choice;
        let thread = IoThread::start(config).expect("every engine works on the test machine");
        assert_eq!(thread.engine(), kind);
        test(&thread);
        thread.stop();
    }
}

fn block_on<T>(f: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap()
        .block_on(f)
}

fn scratch(direct: bool) -> (tempfile::NamedTempFile, Arc<IoFile>) {
    // Not /tmp, which may be a tmpfs without O_DIRECT.
    let file = tempfile::NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let mut options = std::fs::OpenOptions::new();
    options.read(true).write(true);
    if direct {
        options.custom_flags(libc::O_DIRECT);
    }
    let fd = OwnedFd::from(options.open(file.path()).unwrap());
    (file, IoFile::new(fd, direct, if direct { 512 } else { 1 }))
}

#[test]
fn what_is_written_is_read_back() {
    on_each_engine(|thread| {
        for direct in [false, true] {
            let (_tmp, file) = scratch(direct);
            let result = block_on(thread.run_async(move |r| async move {
                let data: Vec<u8> = (0..65536u32).map(|i| (i / 7) as u8).collect();
                let out = IoVecs::zeroed(data.len(), 4096);
                out.copy_from_slice(0, &data);
                r.submit(&file, OpKind::Write, out.clone(), 8192).await?;
                r.submit_range(&file, OpKind::Sync, 0, 0).await?;
                r.submit(&file, OpKind::WriteDurable, out.slice(4096, 4096), 4096)
                    .await?;
                r.submit_range(&file, OpKind::Fallocate(Fallocate::PunchHole), 8192, 4096)
                    .await?;
                let back = IoVecs::zeroed(data.len() + 4096, 4096);
                r.submit(&file, OpKind::Read, back.clone(), 4096).await?;
                let mut got = vec![0; back.len()];
                back.copy_to_slice(0, &mut got);
                assert_eq!(got[..4096], data[4096..8192]);
                assert_eq!(got[4096..8192], [0; 4096]);
                assert_eq!(got[8192..], data[4096..]);
                std::io::Result::Ok(())
            }));
            result.unwrap().unwrap();
        }
    });
}

#[test]
fn reads_past_the_end_are_zero_filled() {
    on_each_engine(|thread| {
        for direct in [false, true] {
            let (mut tmp, file) = scratch(direct);
            tmp.write_all(&[7; 5000]).unwrap();
            let got = block_on(thread.run_async(move |r| async move {
                let buf = IoVecs::zeroed(8192, 4096);
                buf.copy_from_slice(0, &[0xff; 8192]);
                r.submit(&file, OpKind::Read, buf.clone(), 0).await.unwrap();
                let mut got = vec![0; 8192];
                buf.copy_to_slice(0, &mut got);
                got
            }))
            .unwrap();
            assert!(got[..5000].iter().all(|b| *b == 7));
            assert!(got[5000..].iter().all(|b| *b == 0));
        }
    });
}

#[test]
fn more_segments_than_the_kernel_takes_at_once() {
    on_each_engine(|thread| {
        let (tmp, file) = scratch(false);
        block_on(thread.run_async(move |r| async move {
            let whole = Rc::new(vdisk_io::AlignedBuf::new(2500 * 8, 8));
            let vecs = (0..2500)
                .map(|i| {
                    let base = whole.as_mut_ptr().wrapping_add(i * 8);
                    // SAFETY: inside `whole`.
                    unsafe { std::ptr::write_bytes(base, i as u8, 8) };
                    libc::iovec {
                        iov_base: base.cast(),
                        iov_len: 8,
                    }
                })
                .collect();
            // SAFETY: `whole` is kept by the list.
            let iov = unsafe { IoVecs::new(vecs, whole) };
            r.submit(&file, OpKind::Write, iov, 0).await.unwrap();
        }))
        .unwrap();
        let got = std::fs::read(tmp.path()).unwrap();
        assert_eq!(got.len(), 20000);
        assert!(got.chunks(8).enumerate().all(|(i, c)| c == [i as u8; 8]));
    });
}

#[test]
fn errors_are_reported() {
    on_each_engine(|thread| {
        let (read_end, _write_end) = std::io::pipe().unwrap();
        let file = IoFile::new(OwnedFd::from(read_end), false, 1);
        let error = block_on(thread.run_async(move |r| async move {
            let result = r
                .submit(&file, OpKind::Write, IoVecs::zeroed(16, 1), 0)
                .await;
            result.unwrap_err().raw_os_error()
        }))
        .unwrap();
        assert!(
            matches!(error, Some(libc::EBADF | libc::ESPIPE)),
            "{error:?}"
        );
    });
}

#[test]
fn a_dropped_operation_keeps_its_buffers_until_it_ends() {
    on_each_engine(|thread| {
        let (tmp, file) = scratch(false);
        tmp.as_file().set_len(1 << 20).unwrap();
        block_on(async {
            thread
                .run_async(move |r| async move {
                    for _ in 0..64 {
                        drop(r.submit(&file, OpKind::Read, IoVecs::zeroed(65536, 4096), 0));
                    }
                })
                .await
                .unwrap();
            // All of them are given back in the end.
            loop {
                if thread.run(|r| r.load().1).await.unwrap() == 0 {
                    break;
                }
            }
        });
    });
}

#[test]
fn timers_fire_in_order() {
    on_each_engine(|thread| {
        let order = block_on(thread.run_async(|r| async move {
            let order = Rc::new(RefCell::new(Vec::new()));
            let start = Instant::now();
            for ms in [20u64, 5, 10] {
                let (r2, order) = (r.clone(), order.clone());
                r.spawn(async move {
                    r2.sleep(Duration::from_millis(ms)).await;
                    order.borrow_mut().push(ms);
                });
            }
            r.sleep_until(start + Duration::from_millis(40)).await;
            assert!(start.elapsed() >= Duration::from_millis(40));
            order.take()
        }))
        .unwrap();
        assert_eq!(order, [5, 10, 20]);
    });
}

#[test]
fn wakes_come_from_other_threads() {
    on_each_engine(|thread| {
        let (tx, rx) = tokio::sync::oneshot::channel();
        let got = block_on(async {
            let wait = thread.run_async(|_| async move { rx.await.unwrap() });
            let send = async {
                std::thread::spawn(move || tx.send(42).unwrap());
            };
            tokio::join!(wait, send).0
        });
        assert_eq!(got.unwrap(), 42);
    });
}

/// Takes one request for each kick, in the manner of a virtqueue.
struct Requests {
    available: Arc<AtomicU32>,
    taken: Cell<u32>,
    id: Cell<Option<SourceId>>,
    file: Arc<IoFile>,
    reactor: Rc<Reactor>,
    iov: RefCell<Vec<libc::iovec>>,
    _buf: vdisk_io::AlignedBuf,
    batches: Arc<AtomicU32>,
    completed: Arc<AtomicU32>,
}

impl Source for Requests {
    fn poll(&self) -> bool {
        let mut any = false;
        while self.taken.get() < self.available.load(Ordering::SeqCst) {
            self.taken.set(self.taken.get() + 1);
            any = true;
            let Some(id) = self.id.get() else { continue };
            // SAFETY: the segment and its buffer live as long as the source, which outlives its
            // operations in this test.
            unsafe {
                self.reactor.submit_for_source(
                    id,
                    self.taken.get(),
                    &self.file,
                    OpKind::Read,
                    self.iov.borrow_mut().as_mut_ptr(),
                    1,
                    0,
                    512,
                );
            }
        }
        any
    }

    fn complete(&self, _token: u32, result: std::io::Result<()>) {
        result.unwrap();
        self.completed.fetch_add(1, Ordering::SeqCst);
    }

    fn finish_batch(&self) {
        self.batches.fetch_add(1, Ordering::SeqCst);
    }

    fn set_notifications(&self, on: bool) -> bool {
        on && self.taken.get() < self.available.load(Ordering::SeqCst)
    }
}

#[test]
fn sources_are_kicked_polled_and_left_to_sleep() {
    on_each_engine(|thread| {
        let (tmp, file) = scratch(false);
        tmp.as_file().set_len(4096).unwrap();
        let kick = rustix::event::eventfd(0, rustix::event::EventfdFlags::NONBLOCK).unwrap();
        let kick_there = kick.try_clone().unwrap();
        let [available, batches, completed] = [(); 3].map(|()| Arc::new(AtomicU32::new(0)));
        let (a, b, c) = (available.clone(), batches.clone(), completed.clone());
        block_on(async {
            let id = thread
                .run(move |r| {
                    let buf = vdisk_io::AlignedBuf::new(512, 512);
                    let source = Rc::new(Requests {
                        available: a,
                        taken: Cell::new(0),
                        id: Cell::new(None),
                        file,
                        reactor: r.clone(),
                        iov: RefCell::new(vec![libc::iovec {
                            iov_base: buf.as_mut_ptr().cast(),
                            iov_len: 512,
                        }]),
                        _buf: buf,
                        batches: b,
                        completed: c,
                    });
                    let id = r.add_source(source.clone(), Some(kick_there));
                    source.id.set(Some(id));
                    id
                })
                .await
                .unwrap();
            for n in 1..=100 {
                available.store(n, Ordering::SeqCst);
                rustix::io::write(&kick, &1u64.to_ne_bytes()).unwrap();
                while completed.load(Ordering::SeqCst) < n {
                    std::thread::yield_now();
                }
            }
            thread.run(|_| ()).await.unwrap();
            assert!(batches.load(Ordering::SeqCst) >= 100);
            // Left alone, the thread goes to sleep for good: it makes no further turn.
            let mut turns = thread.statistics().turns;
            loop {
                std::thread::sleep(Duration::from_millis(20));
                let now = thread.statistics().turns;
                if now == turns {
                    break;
                }
                turns = now;
            }
            thread.run(move |r| r.remove_source(id)).await.unwrap();
        });
    });
}

#[test]
fn an_engine_that_is_not_there_is_refused_by_name() {
    assert!(
        "io_uring"
            .parse::<EngineChoice>()
            .unwrap_err()
            .contains("uring, aio or threads")
    );
}

#[test]
fn a_cpu_that_is_not_there_is_refused_by_number() {
    let mut config = IoThreadConfig::new("test-pin");
    config.cpus = vec![999];
    let error = IoThread::start(config).unwrap_err().to_string();
    assert!(error.contains("999"), "{error}");
}
