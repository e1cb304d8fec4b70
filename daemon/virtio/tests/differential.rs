//! The ring against the crate virtio-queue: the same guest memory, the same chains.

use std::os::fd::{AsFd, FromRawFd, IntoRawFd};

use proptest::prelude::*;
use vdisk_virtio::{Chain, GuestMemory, GuestRegion, RingAddresses, SplitRing};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

const REGION: u64 = 0x4000;
const GAP_REGION: u64 = 0x10000;
const DESC: u64 = 0;
const AVAIL: u64 = 0x1000;
const USED: u64 = 0x1800;
const INDIRECT: u64 = 0x2000;
const SIZE: u16 = 16;

/// One set of files, mapped by both implementations.
struct Both {
    ours: GuestMemory,
    theirs: GuestMemoryMmap<()>,
}

fn both() -> Both {
    let mut ours = Vec::new();
    let mut theirs = Vec::new();
    for guest in [0, GAP_REGION] {
        let fd = rustix::fs::memfd_create("ring", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&fd, REGION).unwrap();
        ours.push(GuestRegion::map(fd.as_fd(), guest, REGION, guest, 0).unwrap());
        // SAFETY: the descriptor was just taken from its owner.
        let file = unsafe { std::fs::File::from_raw_fd(fd.into_raw_fd()) };
        let offset = Some(FileOffset::new(file, 0));
        theirs.push((GuestAddress(guest), REGION as usize, offset));
    }
    Both {
        ours: GuestMemory::new(ours).unwrap(),
        theirs: GuestMemoryMmap::from_ranges_with_files(theirs).unwrap(),
    }
}

/// A descriptor, mostly of the kind that a driver makes.
fn descriptor() -> impl Strategy<Value = (u64, u32, u16, u16)> {
    let addr = prop_oneof![
        8 => 0..REGION,
        4 => GAP_REGION..GAP_REGION + REGION,
        1 => Just(INDIRECT),
        1 => any::<u64>(),
    ];
    let len = prop_oneof![4 => 1..600u32, 2 => (1..5u32).prop_map(|n| n * 16), 1 => any::<u32>()];
    let flags = prop_oneof![
        6 => Just(1u16), 4 => Just(3), 3 => Just(2), 3 => Just(0), 2 => Just(4), 1 => any::<u16>(),
    ];
    let next = prop_oneof![10 => 0..SIZE, 1 => any::<u16>()];
    (addr, len, flags, next)
}

type Parts = Vec<(u64, u64, bool)>;

/// What a chain means, joined where one descriptor's bytes go on in the next region.
fn ours(both: &Both, ring: &mut SplitRing, chain: &mut Chain) -> Option<(u16, Parts)> {
    if !ring.pop(&both.ours, chain).ok()? {
        return None;
    }
    let parts = chain.segments.iter().enumerate().map(|(i, v)| {
        let addr = both.ours.guest_addr_of(v.iov_base.cast()).unwrap();
        (addr, v.iov_len as u64, i >= chain.readable)
    });
    Some((chain.head, parts.collect()))
}

/// The same through virtio-queue, with the rules that it leaves to its users.
fn theirs(both: &Both, queue: &mut Queue) -> Option<(u16, Parts)> {
    let chain = queue.pop_descriptor_chain(&both.theirs)?;
    let head = chain.head_index();
    let mut parts = Parts::new();
    let mut writable = false;
    let mut complete = false;
    let mut count = 0;
    for d in chain {
        count += 1;
        if d.is_write_only() {
            writable = true;
        } else if writable {
            return None;
        }
        let (addr, len) = (d.addr(), u64::from(d.len()));
        if len > 0 {
            let end = addr.0.checked_add(len)?;
            let inside = |start: u64| addr.0 >= start && end <= start + REGION;
            if !inside(0) && !inside(GAP_REGION) {
                return None;
            }
            parts.push((addr.0, len, writable));
        }
        complete = !d.has_next();
        if count > 4096 {
            return None;
        }
    }
    complete.then_some((head, parts))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn chains_are_read_alike(
        table in proptest::collection::vec(descriptor(), SIZE as usize),
        indirect in proptest::collection::vec(descriptor(), 8),
        heads in proptest::collection::vec(0..SIZE, 1..SIZE as usize),
    ) {
        let both = both();
        let m = &both.theirs;
        for (base, list) in [(DESC, &table), (INDIRECT, &indirect)] {
            for (i, (addr, len, flags, next)) in list.iter().enumerate() {
                let at = base + 16 * i as u64;
                m.write_obj(*addr, GuestAddress(at)).unwrap();
                m.write_obj(*len, GuestAddress(at + 8)).unwrap();
                m.write_obj(*flags, GuestAddress(at + 12)).unwrap();
                m.write_obj(*next, GuestAddress(at + 14)).unwrap();
            }
        }
        for (i, head) in heads.iter().enumerate() {
            m.write_obj(*head, GuestAddress(AVAIL + 4 + 2 * i as u64)).unwrap();
        }
        m.write_obj(heads.len() as u16, GuestAddress(AVAIL + 2)).unwrap();

        let addresses = RingAddresses { desc: DESC, avail: AVAIL, used: USED };
        let mut ring = SplitRing::new(&both.ours, addresses, SIZE, 0, true, true).unwrap();
        let mut queue = Queue::new(SIZE).unwrap();
        queue.set_desc_table_address(Some(DESC as u32), Some(0));
        queue.set_avail_ring_address(Some(AVAIL as u32), Some(0));
        queue.set_used_ring_address(Some(USED as u32), Some(0));
        queue.set_event_idx(true);
        queue.set_ready(true);

        let mut chain = Chain::default();
        for _ in &heads {
            let (a, b) = (ours(&both, &mut ring, &mut chain), theirs(&both, &mut queue));
            match (a, b) {
                // An error stops our queue for good: nothing after it is to be compared.
                (None, _) => break,
                (Some(a), Some(b)) => prop_assert_eq!(a, b),
                (Some(a), None) => prop_assert!(false, "only we accept {:?}", a),
            }
            let used = ring.push_used(chain.head, 7);
            prop_assert_eq!(used, 4 + 8 * u64::from(ring.published() % SIZE));
            ring.publish();
            let index: u16 = m.read_obj(GuestAddress(USED + 2)).unwrap();
            prop_assert_eq!(index, ring.published());
        }
    }

    /// Well-formed chains are all accepted.
    #[test]
    fn what_a_driver_makes_is_taken(
        lens in proptest::collection::vec(1..512u32, 1..SIZE as usize),
        writable_from in 0..SIZE as usize,
        indirect: bool,
    ) {
        let both = both();
        let m = &both.theirs;
        let base = if indirect { INDIRECT } else { DESC };
        for (i, len) in lens.iter().enumerate() {
            let at = base + 16 * i as u64;
            let last = i + 1 == lens.len();
            let flags = u16::from(!last) | if i >= writable_from { 2 } else { 0 };
            m.write_obj(GAP_REGION + 512 * i as u64, GuestAddress(at)).unwrap();
            m.write_obj(*len, GuestAddress(at + 8)).unwrap();
            m.write_obj(flags, GuestAddress(at + 12)).unwrap();
            m.write_obj(i as u16 + 1, GuestAddress(at + 14)).unwrap();
        }
        if indirect {
            m.write_obj(INDIRECT, GuestAddress(DESC)).unwrap();
            m.write_obj(16 * lens.len() as u32, GuestAddress(DESC + 8)).unwrap();
            m.write_obj(4u16, GuestAddress(DESC + 12)).unwrap();
        }
        m.write_obj(1u16, GuestAddress(AVAIL + 2)).unwrap();
        let addresses = RingAddresses { desc: DESC, avail: AVAIL, used: USED };
        let mut ring = SplitRing::new(&both.ours, addresses, SIZE, 0, false, true).unwrap();
        let mut chain = Chain::default();
        prop_assert!(ring.pop(&both.ours, &mut chain).unwrap());
        prop_assert_eq!(chain.segments.len(), lens.len());
        prop_assert_eq!(chain.readable, writable_from.min(lens.len()));
        prop_assert!(!ring.pop(&both.ours, &mut chain).unwrap());
    }
}
