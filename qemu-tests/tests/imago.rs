//! The qcow2 engine beside imago, an implementation that shares nothing with it nor with QEMU.

#[path = "../../daemon/qcow2/tests/memory/mod.rs"]
mod memory;

use std::path::Path;
use std::sync::Arc;

use imago::file::File;
use imago::qcow2::Qcow2;
use imago::{
    FormatAccess, FormatCreateBuilder, FormatDriverBuilder, PermissiveImplicitOpenGate,
    Storage as _, StorageCreateOptions,
};
use memory::{Memory, Random, block_on, open_with};
use vdisk_io::IoVecs;
use vdisk_qcow2::{CHECK_MEMORY, Children, CreateOptions, Image, Options, Repair, Storage};
use vdisk_qemu_tests::qemu_tools::{assert_sound, text, tool};
use vdisk_qemu_tests::scratch;
use vdisk_qemu_tests::workload::assert_same;

const SIZE: u64 = 3 << 20;

/// Something that is done to the disk.
enum Op {
    Write(u64, Vec<u8>),
    Zero(u64, u64),
    Flush,
}

fn ops(seed: u64, n: usize) -> Vec<Op> {
    let mut random = Random::new(seed);
    let mut one = || {
        let longest = [8, 60, 400][random.below(3) as usize];
        let len = 512 * (1 + random.below(longest));
        let at = 512 * random.below((SIZE - len) / 512 + 1);
        match random.below(8) {
            0 => Op::Zero(at, len),
            1 => Op::Flush,
            _ => {
                let byte = random.below(255) as u8 + 1;
                Op::Write(
                    at,
                    (0..len)
                        .map(|i| byte.wrapping_add((i / 512) as u8))
                        .collect(),
                )
            }
        }
    };
    (0..n).map(|_| one()).collect()
}

fn apply(model: &mut [u8], op: &Op) {
    match op {
        Op::Write(at, data) => model[*at as usize..][..data.len()].copy_from_slice(data),
        Op::Zero(at, len) => model[*at as usize..(at + len) as usize].fill(0),
        Op::Flush => {}
    }
}

/// The parts of an image, in files of these names.
struct Files<'a> {
    image: &'a Path,
    data: Option<&'a Path>,
    backing: Option<&'a Path>,
}

impl Files<'_> {
    /// Does all that with imago, and returns what it reads after.
    fn with_imago(&self, ops: &[Op]) -> Vec<u8> {
        let qcow2 = Qcow2::<File>::builder_path(self.image).write(true);
        let qcow2 = qcow2.open(PermissiveImplicitOpenGate::default()).unwrap();
        let disk = FormatAccess::new(qcow2);
        for op in ops {
            match op {
                Op::Write(at, data) => disk.write(&data[..], *at).unwrap(),
                Op::Zero(at, len) => disk.write_zeroes(*at, *len).unwrap(),
                Op::Flush => disk.sync().unwrap(),
            }
        }
        let mut all = vec![0; disk.size() as usize];
        disk.read(&mut all[..], 0).unwrap();
        disk.flush().unwrap();
        all
    }

    /// Does all that with the engine, and returns what it reads after.
    fn with_engine(&self, ops: &[Op]) -> Vec<u8> {
        let load = |path: &Path| Memory::new(std::fs::read(path).unwrap(), None, false);
        let file = load(self.image);
        let data = self.data.map(load);
        let backing = self.backing.map(load);
        let storage = |m: &Option<Arc<Memory>>| m.clone().map(|m| m as Arc<dyn Storage>);
        let image = open_with(&file, storage(&data), storage(&backing), Options::default());
        let image = image.unwrap();
        let all = block_on(async {
            let report = image.check(Repair::Nothing, CHECK_MEMORY).await.unwrap();
            assert_eq!(report.corruptions, 0, "{:#?}", report.messages);
            image.activate(None).await.unwrap();
            for op in ops {
                match op {
                    Op::Write(at, data) => {
                        image.write(*at, IoVecs::from_slice(data)).await.unwrap();
                    }
                    Op::Zero(at, len) => image.write_zeroes(*at, *len, false).await.unwrap(),
                    Op::Flush => image.flush().await.unwrap(),
                }
            }
            let iov = IoVecs::zeroed(image.size() as usize, 1);
            image.read(0, iov.clone()).await.unwrap();
            image.close().await.unwrap();
            iov.to_vec()
        });
        std::fs::write(self.image, file.data()).unwrap();
        if let (Some(path), Some(data)) = (self.data, data) {
            std::fs::write(path, data.data()).unwrap();
        }
        all
    }

    /// The two take turns.
    fn take_turns(&self, what: &str, seed: u64, mut model: Vec<u8>) {
        for turn in 0..6 {
            let ops = ops(seed * 10 + turn, 60);
            ops.iter().for_each(|op| apply(&mut model, op));
            let got = match turn % 2 {
                0 => self.with_imago(&ops),
                _ => self.with_engine(&ops),
            };
            assert_same(&got, &model, 0, &format!("{what}, turn {turn}"));
            assert_sound(self.image);
        }
        assert_same(&self.with_imago(&[]), &model, 0, what);
    }
}

#[test]
fn images_of_the_engine() {
    let dir = scratch();
    for (i, (name, options)) in [
        ("plain", CreateOptions::new(SIZE)),
        (
            "small",
            CreateOptions {
                cluster_size: 1024,
                refcount_bits: 64,
                ..CreateOptions::new(SIZE)
            },
        ),
        (
            "large",
            CreateOptions {
                cluster_size: 1 << 20,
                refcount_bits: 8,
                ..CreateOptions::new(SIZE)
            },
        ),
        (
            "overlay",
            CreateOptions {
                backing: Some((dir.path().join("base").display().to_string(), "raw".into())),
                ..CreateOptions::new(SIZE)
            },
        ),
        (
            "external",
            CreateOptions {
                data_file: Some(dir.path().join("data").display().to_string()),
                ..CreateOptions::new(SIZE)
            },
        ),
    ]
    .into_iter()
    .enumerate()
    {
        let (path, base, data) = (
            dir.path().join(name),
            dir.path().join("base"),
            dir.path().join("data"),
        );
        let below: Vec<u8> = (0..SIZE).map(|i| (i / 512 % 255) as u8).collect();
        std::fs::write(&base, &below).unwrap();
        let file = Memory::new(Vec::new(), None, false);
        let external = options
            .data_file
            .is_some()
            .then(|| file.beside(Vec::new(), None));
        let children = Children {
            data: external.clone().map(|d| d as _),
            ..Children::new(file.clone())
        };
        block_on(Image::create(children, &options)).unwrap();
        std::fs::write(&path, file.data()).unwrap();
        if let Some(external) = &external {
            std::fs::write(&data, external.data()).unwrap();
        }
        let is_overlay = options.backing.is_some();
        let files = Files {
            image: &path,
            data: external.is_some().then_some(data.as_path()),
            backing: is_overlay.then_some(base.as_path()),
        };
        let model = if is_overlay {
            below
        } else {
            vec![0; SIZE as usize]
        };
        files.take_turns(name, i as u64 + 1, model);
    }
}

#[test]
fn images_of_imago() {
    let dir = scratch();
    for (i, (cluster_size, refcount_width)) in [(65536, 16), (512, 1), (2 << 20, 32), (4096, 64)]
        .into_iter()
        .enumerate()
    {
        let path = dir.path().join(i.to_string());
        let file = File::create_open(StorageCreateOptions::new().filename(&path)).unwrap();
        Qcow2::<File>::create_builder(file)
            .size(SIZE)
            .cluster_size(cluster_size)
            .refcount_width(refcount_width)
            .create()
            .unwrap();
        let files = Files {
            image: &path,
            data: None,
            backing: None,
        };
        let what = format!("clusters of {cluster_size}, {refcount_width} bits");
        files.take_turns(&what, i as u64 + 20, vec![0; SIZE as usize]);
    }
}

/// Compressed by QEMU, read by both.
#[test]
fn compressed_images() {
    let dir = scratch();
    let (raw, path) = (dir.path().join("raw"), dir.path().join("compressed"));
    let model: Vec<u8> = (0..SIZE).map(|i| (i / 3000 % 251) as u8).collect();
    std::fs::write(&raw, &model).unwrap();
    let args = [
        "convert",
        "-c",
        "-f",
        "raw",
        "-O",
        "qcow2",
        text(&raw),
        text(&path),
    ];
    tool("qemu-img", &args);
    let files = Files {
        image: &path,
        data: None,
        backing: None,
    };
    files.take_turns("compressed", 40, model);
}
