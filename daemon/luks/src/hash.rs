//! The hashes that headers name, and what is made of them.

use sha1::Sha1;
use sha2::{Digest, Sha256, Sha512};

use crate::error::{Error, Result};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hash {
    Sha1,
    Sha256,
    Sha512,
}

impl Hash {
    /// The name as a header has it.
    pub fn name(self) -> &'static str {
        match self {
            Hash::Sha1 => "sha1",
            Hash::Sha256 => "sha256",
            Hash::Sha512 => "sha512",
        }
    }

    pub fn from_name(name: &str) -> Result<Hash> {
        [Hash::Sha1, Hash::Sha256, Hash::Sha512]
            .into_iter()
            .find(|h| h.name() == name)
            .ok_or_else(|| Error::Field {
                what: "the hash",
                value: name.escape_debug().to_string(),
                allowed: "sha1, sha256 and sha512 are supported",
            })
    }

    /// PBKDF2 with HMAC of this hash (RFC 8018, section 5.2).
    pub(crate) fn pbkdf2(self, secret: &[u8], salt: &[u8], iterations: u32, out: &mut [u8]) {
        match self {
            Hash::Sha1 => pbkdf2::pbkdf2_hmac::<Sha1>(secret, salt, iterations, out),
            Hash::Sha256 => pbkdf2::pbkdf2_hmac::<Sha256>(secret, salt, iterations, out),
            Hash::Sha512 => pbkdf2::pbkdf2_hmac::<Sha512>(secret, salt, iterations, out),
        }
    }

    /// Spreads each bit over the block: each piece becomes the hash of its number and itself (specification,
    /// "AFsplitter").
    pub(crate) fn diffuse(self, block: &mut [u8]) {
        match self {
            Hash::Sha1 => diffuse::<Sha1>(block),
            Hash::Sha256 => diffuse::<Sha256>(block),
            Hash::Sha512 => diffuse::<Sha512>(block),
        }
    }
}

fn diffuse<D: Digest>(block: &mut [u8]) {
    for (i, piece) in block.chunks_mut(<D as Digest>::output_size()).enumerate() {
        let digest = D::new()
            .chain_update((i as u32).to_be_bytes())
            .chain_update(&*piece)
            .finalize();
        piece.copy_from_slice(&digest[..piece.len()]);
    }
}
