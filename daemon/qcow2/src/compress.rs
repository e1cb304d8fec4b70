//! Compressed clusters (specification, "Compressed Clusters Descriptor").

use zstd::stream::raw::{DParameter, Decoder, InBuffer, Operation, OutBuffer};

/// How an image compresses its clusters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// Raw deflate, without a zlib header.
    Deflate,
    Zstd,
}

const DEFLATE_WINDOW_LOG: u8 = 12;

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

impl Compression {
    /// The compressed data of a cluster, if it is shorter than the cluster.
    pub fn compress(self, data: &[u8]) -> Option<Vec<u8>> {
        let mut out = vec![0; data.len() - 1];
        let n = match self {
            Compression::Deflate => {
                // Readers have a window of 4 KiB (specification, "Compressed Clusters Descriptor").
                let level = flate2::Compression::default();
                let mut c =
                    flate2::Compress::new_with_window_bits(level, false, DEFLATE_WINDOW_LOG);
                match c
                    .compress(data, &mut out, flate2::FlushCompress::Finish)
                    .ok()?
                {
                    flate2::Status::StreamEnd => usize::try_from(c.total_out()).ok()?,
                    _ => return None,
                }
            }
            Compression::Zstd => zstd::bulk::compress_to_buffer(data, &mut out, 0).ok()?,
        };
        out.truncate(n);
        Some(out)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_compressed_can_be_read() {
        let text: Vec<u8> = (0..65536u32).map(|i| (i / 7 % 251) as u8).collect();
        let noise: Vec<u8> = (0..65536u32)
            .map(|i| (i.wrapping_mul(0x9e37_79b9) >> 13) as u8)
            .collect();
        for kind in [Compression::Deflate, Compression::Zstd] {
            let mut small = kind.compress(&text).unwrap();
            assert!(small.len() < 32768);
            small.extend([0xff; 511]);
            let mut out = vec![0; text.len()];
            assert!(kind.decompress(&small, &mut out) && out == text);
            if let Some(small) = kind.compress(&noise) {
                assert!(kind.decompress(&small, &mut out) && out == noise);
            }
            assert!(!kind.decompress(&small[..100], &mut out));
        }
    }
}
