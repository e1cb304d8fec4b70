//! Everything that can be done with an image that may be anything.

use vdisk_io::IoVecs;
use vdisk_qcow2::{Options, Repair};

use crate::memory::{Memory, open_with};

fn external_data(bytes: &[u8]) -> bool {
    bytes.get(79).is_some_and(|b| b & 4 != 0)
}

/// Does with an image whatever can be done.
pub async fn exercise(bytes: Vec<u8>, backing: bool) {
    let file = Memory::new(bytes, None, false);
    let below = backing.then(|| Memory::new(vec![3; 100_000], None, false) as _);
    let options = Options {
        l2_cache: 8192,
        refcount_cache: 8192,
        ..Options::default()
    };
    // Used if the header asks for it.
    let external =
        external_data(&file.data()).then(|| Memory::new(vec![5; 50_000], None, false) as _);
    let Ok(image) = open_with(&file, external, below, options) else {
        return;
    };
    let size = image.size().min(1 << 20);
    let iov = IoVecs::zeroed(size as usize, 1);
    let _ = image.read(0, iov).await;
    let _ = image.check(Repair::Nothing, 1 << 20).await;
    let _ = image.snapshots().await;
    if image.activate(None).await.is_err() {
        let _ = image.check(Repair::All, 1 << 20).await;
        return;
    }
    for at in (0..size).step_by(20 << 10) {
        let n = (size - at).min(5000) as usize;
        let _ = image.write(at, IoVecs::zeroed(n, 1)).await;
    }
    let _ = image.discard(0, size / 2).await;
    let _ = image.write_zeroes(size / 3, size / 3, false).await;
    let _ = image.tidy().await;
    let _ = image.resize(size + (64 << 10)).await;
    let _ = image.check(Repair::All, 1 << 20).await;
    let _ = image.write(0, IoVecs::zeroed(512, 1)).await;
    let _ = image.close().await;
}
