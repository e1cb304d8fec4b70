//! Images from arbitrary bytes: opened, read, checked, written, repaired. No panic, no endless loop, no memory without
//! bound.
//!
//! Run with `cargo +nightly fuzz run image fuzz/corpus/image fuzz/seeds -- -rss_limit_mb=2048 -timeout=20` in
//! daemon/qcow2.

#![no_main]

#[path = "../../tests/exercise/mod.rs"]
mod exercise;
#[path = "../../tests/memory/mod.rs"]
mod memory;

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    // Images of a few clusters are enough, and fast.
    if data.len() > 256 << 10 {
        return;
    }
    let mut image = data.to_vec();
    if image.len() < 4 {
        return;
    }
    image[..4].copy_from_slice(b"QFI\xfb");
    memory::block_on(exercise::exercise(image, data[0] & 1 == 0));
});
