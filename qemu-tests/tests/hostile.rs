//! Front-ends and guests that break the rules: their own connection or queue suffers, and nothing else.

use std::os::fd::AsFd;
use std::path::Path;

use vdisk_qemu_tests::frontend::{
    AVAIL, BASE, DATA, DESC, Desc, Frontend, INDIRECT, LEN, NEXT, SIZE, WRITE, request, words,
};
use vdisk_qemu_tests::{Daemon, wait_for};

const MIB: u64 = 1 << 20;

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;

/// A daemon with two exports: one to be attacked, one that must not notice.
fn daemon() -> Daemon {
    let daemon = Daemon::start(&[]);
    daemon.export(
        "victim",
        MIB,
        &["discard=unmap"],
        &["--serial", "abc", "--queues", "2"],
    );
    daemon.export("other", MIB, &[], &["--queues", "1"]);
    daemon
}

fn works(socket: &Path) {
    let mut f = Frontend::start(socket);
    f.poke(DATA + 4096, &[7; 512]);
    assert_eq!(f.simple(OUT, 3, 512), 0);
    f.poke(DATA + 4096, &[0; 512]);
    assert_eq!(f.simple(IN, 3, 512), 0);
    assert_eq!(f.peek(DATA + 4096, 512), [7; 512]);
    assert_eq!(f.simple(FLUSH, 0, 0), 0);
}

/// A descriptor: address, length, flags, next.
type Part = (u64, u32, u16, u16);

fn chain(f: &Frontend, list: &[Part]) {
    for (i, &(addr, len, flags, next)) in list.iter().enumerate() {
        f.descriptor(
            DESC,
            i as u16,
            Desc {
                addr,
                len,
                flags,
                next,
            },
        );
    }
}

#[test]
fn malformed_chains_stop_the_queue_and_nothing_else() {
    let mut daemon = daemon();
    let (victim, other) = (daemon.socket("victim"), daemon.socket("other"));
    const AT: u64 = BASE + DATA;
    type Case = (&'static str, &'static [Part], u16);
    let cases: &[Case] = &[
        ("has a loop", &[(AT, 16, NEXT, 1), (AT, 16, NEXT, 0)], 0),
        ("outside guest memory", &[(BASE + LEN - 8, 16, 0, 0)], 0),
        ("outside guest memory", &[(u64::MAX - 3, 16, 0, 0)], 0),
        ("outside guest memory", &[(AT, u32::MAX, 0, 0)], 0),
        ("outside the table", &[(AT, 16, NEXT, 16)], 0),
        ("outside the table", &[], 999),
        (
            "follows a device-writable",
            &[(AT, 16, WRITE | NEXT, 1), (AT, 1, 0, 0)],
            0,
        ),
        ("indirect descriptor table", &[(AT, 17, INDIRECT, 0)], 0),
        ("indirect descriptor table", &[(AT, 0, INDIRECT, 0)], 0),
        (
            "or has a successor",
            &[(AT, 16, INDIRECT | NEXT, 1), (AT, 1, 0, 0)],
            0,
        ),
        (
            "too few for its 16-byte header",
            &[(AT, 15, NEXT, 1), (AT, 1, WRITE, 0)],
            0,
        ),
        ("no writable byte", &[(AT, 16, 0, 0)], 0),
    ];
    for (message, list, head) in cases {
        let mut f = Frontend::start(&victim);
        chain(&f, list);
        f.submit(*head);
        assert!(f.wait_err(), "{message}: no error signal");
        daemon.wait_for_log(message);
        assert_eq!(f.used(), 0);
        works(&other);
        // The queue can be set up anew on the same connection.
        f.send(request::GET_VRING_BASE, 0, &[0; 8], &[]);
        assert!(f.reply().is_some());
    }
    works(&victim);
}

#[test]
fn more_available_than_the_queue_holds() {
    let mut daemon = daemon();
    let f = Frontend::start(&daemon.socket("victim"));
    f.poke(AVAIL + 2, &(SIZE + 1).to_le_bytes());
    f.kick();
    assert!(f.wait_err());
    daemon.wait_for_log("17 entries available on a queue of 16");
    drop(f);
    works(&daemon.socket("victim"));
}

#[test]
fn bad_requests_get_an_error_status() {
    let daemon = daemon();
    let mut f = Frontend::start(&daemon.socket("victim"));
    assert_eq!(f.simple(IN, 0, 512), 0);
    for (kind, sector, len, status) in [
        (IN, 2048, 512, 1),
        (IN, 2047, 1024, 1),
        (IN, u64::MAX, 512, 1),
        (IN, u64::MAX / 512, 512, 1),
        (OUT, 0, 100, 1),
        (IN, 0, 0, 1),
        (DISCARD, 0, 15, 1),
        (77, 0, 512, 2),
    ] {
        assert_eq!(f.simple(kind, sector, len), status, "{kind} {sector} {len}");
    }
    // Discard ranges: beyond the end, then with flags that do not exist.
    let range = |sector: u64, sectors: u32, flags: u32| {
        let mut b = sector.to_le_bytes().to_vec();
        b.extend(sectors.to_le_bytes());
        b.extend(flags.to_le_bytes());
        b
    };
    for (bytes, status) in [
        (range(0, 8, 0), 0),
        (range(2047, 8, 0), 1),
        (range(u64::MAX, 8, 0), 1),
        (range(0, 8, 1), 2),
        (range(0, 8, 2), 2),
    ] {
        f.poke(DATA + 4096, &bytes);
        assert_eq!(f.simple(DISCARD, 0, 16), status, "{bytes:?}");
    }
    assert_eq!(f.simple(IN, 0, 512), 0);
}

#[test]
fn the_serial_is_returned() {
    let daemon = daemon();
    let mut f = Frontend::start(&daemon.socket("victim"));
    f.header(DATA, GET_ID, 0);
    chain(
        &f,
        &[
            (BASE + DATA, 16, NEXT, 1),
            (BASE + DATA + 4096, 20, WRITE | NEXT, 2),
            (BASE + DATA + 64, 1, WRITE, 0),
        ],
    );
    f.submit(0);
    assert!(f.wait_call());
    let mut expected = [0; 20];
    expected[..3].copy_from_slice(b"abc");
    assert_eq!(f.peek(DATA + 4096, 20), expected);
}

#[test]
fn broken_messages_end_the_connection_and_nothing_else() {
    let mut daemon = daemon();
    let (victim, other) = (daemon.socket("victim"), daemon.socket("other"));
    type Attack = (&'static str, fn(&mut Frontend));
    let cases: [Attack; 7] = [
        ("not of protocol version 1", |f| {
            f.send_raw(&[0xff; 12], &[])
        }),
        ("is not known", |f| f.send(200, 0, &[], &[])),
        ("payload of 3 bytes", |f| {
            f.send(request::SET_FEATURES, 0, &[1, 2, 3], &[])
        }),
        ("which is not possible", |f| {
            let mut bytes = words(&[]);
            for w in [2u32, 1, u32::MAX] {
                bytes.extend(w.to_ne_bytes());
            }
            f.send_raw(&bytes, &[]);
        }),
        ("names queue 9", |f| {
            f.send(request::SET_VRING_NUM, 0, &[9, 0, 0, 0, 8, 0, 0, 0], &[]);
        }),
        ("file descriptors", |f| {
            f.send(request::SET_VRING_KICK, 0, &words(&[0]), &[])
        }),
        ("were not offered", |f| {
            f.send(request::SET_FEATURES, 0, &words(&[1 << 60]), &[])
        }),
    ];
    for (message, attack) in cases {
        let mut f = Frontend::connect(&victim);
        attack(&mut f);
        assert!(f.is_closed(), "{message}: still connected");
        daemon.wait_for_log(message);
        works(&other);
    }
    // In the middle of a message.
    let mut f = Frontend::connect(&victim);
    f.send_raw(&[1, 0, 0], &[]);
    drop(f);
    daemon.wait_for_log("in the middle of a message");
    works(&victim);
}

#[test]
fn bad_memory_tables_are_refused_and_the_old_one_stays() {
    let daemon = daemon();
    let mut f = Frontend::start(&daemon.socket("victim"));
    assert_eq!(f.simple(IN, 0, 512), 0);
    for table in [
        // Longer than its file, wrapping around, empty.
        words(&[1, BASE, LEN * 2, BASE, 0]),
        words(&[1, u64::MAX - 4096, LEN, BASE, 0]),
        words(&[1, BASE, LEN, BASE, u64::MAX]),
        words(&[1, BASE, 0, BASE, 0]),
    ] {
        assert!(!f.set_memory(&table));
        assert_eq!(f.simple(IN, 0, 512), 0);
    }
    // Overlapping the region that is there; then removing one that is not.
    let region = words(&[0, BASE, LEN, BASE, 0]);
    let memory = f.memory.try_clone().unwrap();
    assert!(!f.ack(request::ADD_MEM_REG, &region, &[memory.as_fd()]));
    assert!(!f.ack(request::REM_MEM_REG, &words(&[0, 1, LEN, 1, 0]), &[]));
    assert_eq!(f.simple(IN, 0, 512), 0);
}

#[test]
fn memory_regions_come_and_go_while_requests_run() {
    let daemon = daemon();
    let mut f = Frontend::start(&daemon.socket("victim"));
    let more = 0x4000_0000;
    let region = words(&[0, more, LEN, more, 0]);
    for _ in 0..20 {
        let memory = f.memory.try_clone().unwrap();
        assert!(f.ack(request::ADD_MEM_REG, &region, &[memory.as_fd()]));
        assert_eq!(f.simple(IN, 0, 512), 0);
        // A request whose data lies in the new region.
        f.header(DATA, IN, 0);
        chain(
            &f,
            &[
                (BASE + DATA, 16, NEXT, 1),
                (more + DATA + 4096, 512, WRITE | NEXT, 2),
                (more + DATA + 64, 1, WRITE, 0),
            ],
        );
        let before = f.used();
        f.submit(0);
        wait_for("the request", || (f.used() != before).then_some(()));
        assert!(f.ack(request::REM_MEM_REG, &region, &[]));
        assert_eq!(f.simple(IN, 0, 512), 0);
    }
}

#[test]
fn a_removed_ring_stops_its_queue() {
    let mut daemon = daemon();
    let mut f = Frontend::start(&daemon.socket("victim"));
    assert!(!f.ack(request::REM_MEM_REG, &words(&[0, BASE, LEN, BASE, 0]), &[]));
    assert!(f.wait_err());
    daemon.wait_for_log("not in shared memory");
    works(&daemon.socket("other"));
}

#[test]
fn memory_that_is_truncated_does_not_kill_the_daemon() {
    let mut daemon = daemon();
    let mut f = Frontend::start(&daemon.socket("victim"));
    assert_eq!(f.simple(IN, 0, 512), 0);
    // The rings stay, the request's data goes.
    chain(
        &f,
        &[
            (BASE + DATA, 16, NEXT, 1),
            (BASE + DATA + 4096, 512, WRITE | NEXT, 2),
            (BASE + DATA + 64, 1, WRITE, 0),
        ],
    );
    rustix::fs::ftruncate(&f.memory, DATA).unwrap();
    f.submit(0);
    assert!(f.wait_err());
    daemon.wait_for_log("guest memory was taken away");
    works(&daemon.socket("other"));
    drop(f);
    works(&daemon.socket("victim"));
}

#[test]
fn a_front_end_that_leaves_mid_request_leaves_nothing_behind() {
    let daemon = Daemon::start(&[]);
    daemon.ctl(&[
        "node",
        "add",
        "slow",
        "driver=null-co",
        "size=1M",
        "latency-ns=50000000",
    ]);
    daemon.export_node("slow", "slow", &[]);
    for _ in 0..5 {
        let mut f = Frontend::start(&daemon.socket("slow"));
        f.header(DATA, IN, 0);
        chain(
            &f,
            &[
                (BASE + DATA, 16, NEXT, 1),
                (BASE + DATA + 4096, 512, WRITE | NEXT, 2),
                (BASE + DATA + 64, 1, WRITE, 0),
            ],
        );
        f.submit(0);
        drop(f);
    }
    let mut f = Frontend::start(&daemon.socket("slow"));
    assert_eq!(f.simple(IN, 0, 512), 0);
    let export = daemon.ctl_json(&["export", "show", "slow"]);
    assert_eq!(export["Path"], "slow");
    assert!(
        export["PathReason"]
            .as_str()
            .unwrap()
            .contains("latency-ns")
    );
}

#[test]
fn the_configuration_can_be_read_and_only_its_cache_written() {
    let daemon = daemon();
    let mut f = Frontend::start(&daemon.socket("victim"));
    let config = f.get_config();
    assert_eq!(config[..8], (MIB / 512).to_le_bytes());
    assert_eq!(config[32], 1);
    let set = |at: u32, value: u8| {
        let mut p = Vec::new();
        for w in [at, 1, 0] {
            p.extend(w.to_ne_bytes());
        }
        p.push(value);
        p
    };
    assert!(!f.ack(request::SET_CONFIG, &set(0, 1), &[]));
    assert!(!f.ack(request::SET_CONFIG, &set(32, 7), &[]));
    assert!(!f.ack(request::SET_CONFIG, &set(u32::MAX, 1), &[]));
    assert!(f.ack(request::SET_CONFIG, &set(32, 0), &[]));
    assert_eq!(f.get_config()[32], 0);
}

/// A guest that switches its write cache off sends no flushes any more, for what it wrote before neither.
#[test]
fn a_cache_that_is_switched_off_is_flushed() {
    let mut daemon = Daemon::start(&[]);
    let image = daemon.image("image", MIB);
    let filename = format!("file.filename={}", image.display());
    daemon.ctl(&[
        "node",
        "add",
        "disk",
        "driver=blkdebug",
        "file.driver=file",
        &filename,
        "inject-error.event=flush_to_disk",
        "inject-error.once=on",
    ]);
    daemon.export_node("disk", "disk", &[]);
    let mut f = Frontend::start(&daemon.socket("disk"));
    assert_eq!(f.simple(OUT, 3, 512), 0);
    let mut set: Vec<u8> = [32u32, 1, 0].iter().flat_map(|w| w.to_ne_bytes()).collect();
    set.push(0);
    assert!(!f.ack(request::SET_CONFIG, &set, &[]));
    daemon.wait_for_log("what was written before cannot be flushed");
    // On the safe side all the same.
    assert_eq!(f.get_config()[32], 0);
}

#[test]
fn a_front_end_that_does_not_read_is_disconnected() {
    let mut daemon = daemon();
    let mut f = Frontend::connect(&daemon.socket("victim"));
    let sender = std::thread::spawn(move || {
        // More replies than the socket holds; the last of these sends fail.
        for _ in 0..20_000 {
            f.send(request::GET_FEATURES, 0, &[], &[]);
        }
        f
    });
    daemon.wait_for_log("does not read its replies");
    drop(sender.join());
    works(&daemon.socket("victim"));
    assert_eq!(daemon.terminate(), Some(0));
}

#[test]
fn interrupts_go_to_eventfds_only() {
    let mut daemon = daemon();
    let mut f = Frontend::connect(&daemon.socket("victim"));
    let (_reader, writer) = std::io::pipe().unwrap();
    assert!(!f.ack(request::SET_VRING_CALL, &words(&[0]), &[writer.as_fd()]));
    daemon.wait_for_log("not an eventfd");
    drop(f);
    works(&daemon.socket("victim"));
}

#[test]
fn a_queue_is_stopped_resumed_and_reset() {
    let daemon = daemon();
    let mut f = Frontend::start(&daemon.socket("victim"));
    for n in 1..=3 {
        assert_eq!(f.simple(OUT, n, 512), 0);
    }
    assert_eq!(f.stop_queue(), 3);
    f.start_queue();
    assert_eq!(f.simple(IN, 1, 512), 0);
    assert_eq!(f.used(), 4);
    f.reset_queue();
    assert_eq!(f.simple(IN, 2, 512), 0);
    assert_eq!((f.used(), f.stop_queue()), (1, 1));
}

/// A guest that waits for what another back-end answered, and was killed before it announced it, is interrupted.
#[test]
fn a_queue_that_starts_interrupts_its_guest() {
    let daemon = daemon();
    let mut f = Frontend::start(&daemon.socket("victim"));
    assert_eq!(f.simple(OUT, 1, 512), 0);
    assert!(f.wait_call());
    f.stop_queue();
    // Asserts that it is interrupted.
    f.start_queue();
}

#[test]
fn a_huge_read_is_refused_and_a_large_one_of_zeroes_is_not() {
    let daemon = Daemon::start(&[]);
    let socket = daemon.socket("zero");
    daemon.ctl(&[
        "node",
        "add",
        "zero",
        "driver=null-co",
        "size=1T",
        "read-zeroes=on",
    ]);
    daemon.export_node("zero", "zero", &[]);
    let mut f = Frontend::start(&socket);
    // The same half of the guest's memory, 4 MiB, again and again: 512 times are 2 GiB, the most that is allowed.
    let half = (LEN / 2) as u32;
    let at = BASE + LEN / 2;
    let table = |f: &Frontend, count: u16| {
        let list = DATA + 0x1000;
        f.descriptor(
            list,
            0,
            Desc {
                addr: BASE + DATA,
                len: 16,
                flags: NEXT,
                next: 1,
            },
        );
        for i in 1..=count {
            f.descriptor(
                list,
                i,
                Desc {
                    addr: at,
                    len: half,
                    flags: NEXT | WRITE,
                    next: i + 1,
                },
            );
        }
        let status = Desc {
            addr: BASE + DATA + 64,
            len: 1,
            flags: WRITE,
            next: 0,
        };
        f.descriptor(list, count + 1, status);
        let entry = Desc {
            addr: BASE + list,
            len: 16 * (u32::from(count) + 2),
            flags: INDIRECT,
            next: 0,
        };
        f.descriptor(DESC, 0, entry);
    };
    f.header(DATA, IN, 0);
    for (count, status) in [(8, 0), (513, 1), (8, 0)] {
        f.poke(DATA + 64, &[0xaa]);
        f.poke(LEN / 2, &[0xff; 64]);
        table(&f, count);
        let before = f.used();
        f.submit(0);
        wait_for("the request's end", || (f.used() != before).then_some(()));
        assert_eq!(f.peek(DATA + 64, 1), [status], "{count} segments");
        let want = if status == 0 { [0; 64] } else { [0xff; 64] };
        assert_eq!(f.peek(LEN / 2, 64), want);
    }
}

#[test]
fn more_in_flight_than_the_queue_holds() {
    let mut daemon = daemon();
    daemon.ctl(&[
        "node",
        "add",
        "slow",
        "driver=null-co",
        "size=1M",
        "latency-ns=2000000000",
    ]);
    daemon.export_node("slow", "slow", &[]);
    let mut f = Frontend::start(&daemon.socket("slow"));
    f.header(DATA, IN, 0);
    chain(
        &f,
        &[
            (BASE + DATA, 16, NEXT, 1),
            (BASE + DATA + 4096, 512, WRITE | NEXT, 2),
            (BASE + DATA + 64, 1, WRITE, 0),
        ],
    );
    // The same descriptors again and again, answered or not.
    for _ in 0..SIZE {
        f.submit(0);
    }
    wait_for("all of them to be taken", || {
        let stats = daemon.ctl_json(&["stats"]);
        (stats["exports"]["slow"]["slow"].as_u64() == Some(SIZE.into())).then_some(())
    });
    f.submit(0);
    assert!(f.wait_err());
    daemon.wait_for_log("more requests in flight than a queue of 16");
    works(&daemon.socket("other"));
    drop(f);
}
