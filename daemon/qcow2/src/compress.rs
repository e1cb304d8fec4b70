//! Compressed clusters (specification, "Compressed Clusters Descriptor").

use zstd::stream::raw::{DParameter, Decoder, InBuffer, Operation, OutBuffer};

/// How an image compresses its clusters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// Raw deflate, without a zlib header.
    Deflate,
    Zstd,
}

/// A cluster has at most 2^21 bytes: frames that ask for a larger window are refused.
const ZSTD_WINDOW_LOG: u32 = 21;

impl Compression {
    /// Fills `out`, a whole cluster, from `data`, which may have anything behind the compressed cluster.
    /// False if it does not hold a whole cluster.
    pub fn decompress(self, data: &[u8], out: &mut [u8]) -> bool {
        match self {
            Compression::Deflate => libdeflater::Decompressor::new()
                .deflate_decompress(data, out)
                .is_ok_and(|n| n == out.len()),
            Compression::Zstd => unzstd(data, out).is_some(),
        }
    }
}

fn unzstd(data: &[u8], out: &mut [u8]) -> Option<()> {
    let mut decoder = Decoder::new().ok()?;
    decoder
        .set_parameter(DParameter::WindowLogMax(ZSTD_WINDOW_LOG))
        .ok()?;
    let len = out.len();
    let mut input = InBuffer::around(data);
    let mut output = OutBuffer::around(out);
    while output.pos() < len {
        let before = (input.pos(), output.pos());
        decoder.run(&mut input, &mut output).ok()?;
        if (input.pos(), output.pos()) == before {
            return None;
        }
    }
    Some(())
}
