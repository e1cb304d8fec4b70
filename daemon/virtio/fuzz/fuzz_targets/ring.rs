//! Rings and virtio-blk requests from arbitrary guest memory: no panic, no endless loop, no access outside
//! the regions.
//!
//! Run with `cargo +nightly fuzz run ring` in daemon/virtio.

#![no_main]

use std::os::fd::AsFd;
use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;
use vdisk_virtio::blk::{ParsedRequest, RequestKind, read_segments};
use vdisk_virtio::{Chain, GuestMemory, GuestRegion, RingAddresses, SplitRing};

const REGION: u64 = 0x2000;

/// Three regions: two that touch, and one behind a gap.
fn memory() -> &'static GuestMemory {
    static MEMORY: OnceLock<GuestMemory> = OnceLock::new();
    MEMORY.get_or_init(|| {
        let regions = [0u64, REGION, 0x10000].map(|guest| {
            let fd = rustix::fs::memfd_create("fuzz", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
            rustix::fs::ftruncate(&fd, REGION).unwrap();
            GuestRegion::map(fd.as_fd(), guest, REGION, guest, 0).unwrap()
        });
        GuestMemory::new(regions.to_vec()).unwrap()
    })
}

fn inside(v: &libc::iovec) -> bool {
    let (start, end) = (v.iov_base as usize, v.iov_base as usize + v.iov_len);
    memory().regions().iter().any(|r| {
        let base = r.host_ptr() as usize;
        start >= base && end <= base + r.len as usize
    })
}

fuzz_target!(|data: &[u8]| {
    let Some((setup, contents)) = data.split_at_checked(12) else {
        return;
    };
    let memory = memory();
    let mut rest = contents;
    for r in memory.regions() {
        let n = rest.len().min(REGION as usize);
        // SAFETY: a region of REGION bytes that nobody else uses.
        unsafe {
            std::ptr::write_bytes(r.host_ptr(), 0, REGION as usize);
            std::ptr::copy_nonoverlapping(rest.as_ptr(), r.host_ptr(), n);
        }
        rest = &rest[n..];
    }
    let word = |i: usize| u64::from(u16::from_le_bytes([setup[i], setup[i + 1]]));
    let addresses = RingAddresses {
        desc: word(0) << 3,
        avail: word(2) << 1,
        used: word(4) << 2,
    };
    let size = 1u16 << (setup[6] % 9);
    let (event_idx, indirect) = (setup[7] & 1 != 0, setup[7] & 2 != 0);
    let Ok(mut ring) = SplitRing::new(memory, addresses, size, word(8) as u16, event_idx, indirect)
    else {
        return;
    };
    let mut chain = Chain::default();
    for _ in 0..=size {
        match ring.pop(memory, &mut chain) {
            Ok(true) => {}
            Ok(false) | Err(_) => break,
        }
        assert!(chain.readable <= chain.segments.len());
        assert!(chain.segments.iter().all(inside));
        let before: usize = chain.segments.iter().map(|v| v.iov_len).sum();
        if let Ok(request) = ParsedRequest::parse(&mut chain) {
            let data = &chain.segments[request.first..request.first + request.count];
            assert!(data.iter().all(inside));
            assert_eq!(data.iter().map(|v| v.iov_len as u64).sum::<u64>(), request.len);
            assert!(request.len < before as u64);
            let status = libc::iovec {
                iov_base: request.status.cast(),
                iov_len: 1,
            };
            assert!(inside(&status));
            if request.kind == RequestKind::Discard {
                if let Some(ranges) = read_segments(data, 32) {
                    assert!(ranges.len() <= 32 && !ranges.is_empty());
                }
            }
            // SAFETY: checked above to lie in guest memory.
            unsafe { request.status.write_volatile(0) };
        }
        ring.push_used(chain.head, 1);
        if setup[10] & 1 != 0 {
            ring.publish();
            ring.needs_signal();
        }
    }
    ring.publish();
    ring.needs_signal();
    ring.set_notifications(true);
    let _ = ring.relocate(memory);
});
