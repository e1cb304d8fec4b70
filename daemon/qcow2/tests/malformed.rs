//! Images that are not what they seem: nothing may panic, hang or take memory without bound.

mod exercise;
mod memory;

use memory::{Memory, Random, block_on, open, open_with};
use proptest::prelude::*;
use vdisk_io::IoVecs;
use vdisk_qcow2::{
    Children, Compression, CreateOptions, Error, Header, Image, Kind, Lookup, Mapping, Options,
};

/// An image of 512-byte clusters: header, L1 table, L2 table, data.
fn tiny() -> Vec<u8> {
    let mut b = vec![0u8; 8 * 512];
    b[..4].copy_from_slice(b"QFI\xfb");
    let mut put32 = |at: usize, v: u32| b[at..at + 4].copy_from_slice(&v.to_be_bytes());
    put32(4, 3);
    put32(20, 9);
    put32(36, 4);
    put32(56, 1);
    put32(96, 4);
    put32(100, 104);
    let mut put64 = |at: usize, v: u64| b[at..at + 8].copy_from_slice(&v.to_be_bytes());
    put64(24, 64 << 10);
    put64(40, 512);
    put64(48, 2560);
    put64(512, 1024 | 1 << 63);
    put64(1024, 1536 | 1 << 63);
    put64(1032, 2048 | 1 << 63);
    put64(1040, 1);
    put64(1048, 3072);
    b
}

fn map(bytes: Vec<u8>) -> Result<Vec<Mapping>, Box<dyn std::error::Error>> {
    let file = Memory::new(bytes, None, false);
    let image = open(&file, None, Options::default())?;
    let mut out = Vec::new();
    let (mut at, end) = (100, 4196);
    while at < end {
        match image.lookup(at, end - at)? {
            Lookup::Mapped(m) => {
                at += m.len;
                out.push(m);
            }
            Lookup::NeedsTable { .. } => {
                block_on(image.read(at, IoVecs::zeroed(1, 1)))?;
            }
        }
    }
    Ok(out)
}

#[test]
fn neighbours_are_one_mapping() {
    let m = |kind, len, writable| Mapping {
        kind,
        len,
        writable,
    };
    assert_eq!(
        map(tiny()).unwrap(),
        [
            m(Kind::Data(1636), 924, true),
            m(Kind::Zero, 512, false),
            m(Kind::Data(3072), 512, false),
            m(Kind::Unallocated, 4096 - 924 - 1024, false),
        ]
    );
}

#[test]
fn wrong_headers_are_named() {
    let check = |at: usize, bytes: &[u8], message: &str| {
        let mut b = tiny();
        b[at..at + bytes.len()].copy_from_slice(bytes);
        let e = map(b).unwrap_err().to_string();
        assert!(e.contains(message), "{e}");
    };
    check(0, b"QFI\0", "magic");
    check(4, &[0, 0, 0, 9], "version 9");
    check(20, &[0, 0, 0, 8], "cluster bits is 8");
    check(20, &[0, 0, 0, 22], "cluster bits is 22");
    check(24, &[0xff; 8], "too few");
    check(32, &[0, 0, 0, 1], "legacy AES");
    check(32, &[0, 0, 0, 2], "LUKS");
    check(36, &[0xff; 4], "at most 4194304");
    check(40, &[0, 0, 0, 0, 0, 0, 0, 1], "outside the file");
    check(40, &[0x7f; 8], "outside the file");
    check(79, &[4], "external data file");
    check(72, &[0x80], "bit 63");
    check(79, &[8], "compression type");
    check(96, &[0, 0, 0, 7], "refcount order is 7");
    check(100, &[0, 0, 0, 3], "length of the header is 3");
    check(
        8,
        &[0, 0, 0, 0, 0xff, 0, 0, 0, 0, 0, 0, 9],
        "name of the backing file",
    );
    check(512, &[0, 0xff, 0, 0, 0, 0, 0, 0], "L2 table");
    let short = Header::parse(&tiny()[..60], 60);
    assert!(matches!(short, Err(Error::Short(_))));
}

/// Images of several kinds, with data, zeroes and holes in them.
fn samples() -> Vec<Vec<u8>> {
    let base = |cluster_size| CreateOptions {
        cluster_size,
        ..CreateOptions::new(256 << 10)
    };
    [
        base(512),
        base(4096),
        CreateOptions {
            version: 2,
            ..base(4096)
        },
        CreateOptions {
            extended_l2: true,
            ..base(16384)
        },
        CreateOptions {
            refcount_bits: 1,
            compression: Compression::Zstd,
            ..base(1024)
        },
        CreateOptions {
            refcount_bits: 64,
            backing: Some(("base".into(), "raw".into())),
            ..base(2048)
        },
        CreateOptions {
            data_file: Some("data".into()),
            ..base(1024)
        },
        CreateOptions {
            data_file: Some("data".into()),
            data_file_raw: true,
            extended_l2: true,
            ..base(16384)
        },
    ]
    .iter()
    .enumerate()
    .map(|(i, options)| {
        let file = Memory::new(Vec::new(), None, false);
        block_on(async {
            let external = Memory::new(Vec::new(), None, false);
            let children = || Children {
                data: options.data_file.is_some().then(|| external.clone() as _),
                ..Children::new(file.clone())
            };
            Image::create(children(), options).await.unwrap();
            let image = open_with(&file, children().data, None, Options::default()).unwrap();
            image.activate(None).await.unwrap();
            let mut random = Random::new(i as u64 + 1);
            for _ in 0..30 {
                let at = random.below(400) * 512;
                let iov = IoVecs::from_slice(&vec![1; 512 * (1 + random.below(16)) as usize]);
                image.write(at, iov).await.unwrap();
            }
            let _ = image.write_zeroes(64 << 10, 32 << 10, false).await;
            image.close().await.unwrap();
        });
        file.data()
    })
    .collect()
}

fn extreme() -> impl Strategy<Value = u64> {
    prop_oneof![
        Just(0),
        Just(1),
        Just(u64::MAX),
        Just(1 << 63),
        Just(1 << 62),
        Just(0x00ff_ffff_ffff_fe00),
        (0u32..64).prop_map(|b| 1 << b),
        (0u64..64).prop_map(|c| (c * 512) | 1 << 63),
        (0u64..64).prop_map(|c| (c * 4096) | 1 << 63),
        (0u64..400).prop_map(|c| c * 512),
        any::<u64>(),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(cases()))]

    /// Some words of header and tables have other values.
    #[test]
    fn no_image_breaks_the_engine(
        kind in 0usize..8,
        head in prop::collection::vec((0usize..14, extreme()), 0..3),
        bytes in prop::collection::vec((0usize..160, any::<u8>()), 0..3),
        words in prop::collection::vec((any::<prop::sample::Index>(), extreme()), 0..8),
    ) {
        thread_local! {
            static SAMPLES: Vec<Vec<u8>> = samples();
        }
        let mut b = SAMPLES.with(|s| s[kind].clone());
        // Words that are not zero are those of tables, mostly.
        let used: Vec<usize> = (13..b.len() / 8)
            .filter(|i| b[8 * i..8 * i + 8] != [0; 8] && b[8 * i..8 * i + 8] != [1; 8])
            .collect();
        for (at, value) in words {
            let i = used[at.index(used.len())];
            b[8 * i..8 * i + 8].copy_from_slice(&value.to_be_bytes());
        }
        for (i, value) in head {
            b[8 * i..8 * i + 8].copy_from_slice(&value.to_be_bytes());
        }
        for (i, value) in bytes {
            b[i] = value;
        }
        b[..4].copy_from_slice(b"QFI\xfb");
        block_on(exercise::exercise(b, kind == 5));
    }
}

fn cases() -> u32 {
    let more = std::env::var("VDISK_CASES")
        .ok()
        .and_then(|v| v.parse().ok());
    more.unwrap_or(2000)
}
