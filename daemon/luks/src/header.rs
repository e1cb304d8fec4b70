//! The header (specification, "Partition header").

use crate::cipher::SECTOR;
use crate::error::{Error, Result};
use crate::hash::Hash;

const MAGIC: &[u8; 6] = b"LUKS\xba\xbe";

/// Bytes of the header; key material lies behind it.
pub const HEADER: usize = 592;

const SLOTS: usize = 8;
const SLOT_AT: usize = 208;
const SLOT: usize = 48;
const ACTIVE: u32 = 0x00ac_71f3;
const INACTIVE: u32 = 0x0000_dead;

/// The only number of stripes that is in use.
pub(crate) const STRIPES: u32 = 4000;

/// More iterations than this nobody has waited for: a header that asks for them is there to keep us busy.
const MAX_ITERATIONS: u32 = 50_000_000;

/// A disk begins at most so far behind the beginning, in bytes.
const MAX_PAYLOAD: u64 = 1 << 30;

/// A place where the key of the disk may be locked with a passphrase.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slot {
    pub active: bool,
    pub(crate) iterations: u32,
    pub(crate) salt: [u8; 32],
    /// Where the key material is, in bytes.
    pub(crate) material: u64,
}

/// What a header says, checked. Offsets and lengths are bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// Bytes of the key: 32 for AES-128, 64 for AES-256.
    pub key_bytes: usize,
    pub hash: Hash,
    /// Where the data begins (in qcow2 images of no meaning).
    pub payload: u64,
    pub uuid: String,
    pub(crate) digest: [u8; 20],
    pub(crate) digest_salt: [u8; 32],
    pub(crate) digest_iterations: u32,
    pub slots: [Slot; SLOTS],
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> Result<[u8; N]> {
    bytes
        .get(at..)
        .and_then(|b| b.first_chunk())
        .copied()
        .ok_or(Error::Short)
}

fn be32(bytes: &[u8], at: usize) -> Result<u32> {
    Ok(u32::from_be_bytes(array(bytes, at)?))
}

/// A name that ends with a zero byte.
fn text<const N: usize>(bytes: &[u8], at: usize) -> Result<String> {
    let field: [u8; N] = array(bytes, at)?;
    let name = field.split(|b| *b == 0).next().unwrap_or_default();
    Ok(String::from_utf8_lossy(name).into_owned())
}

fn refuse<T>(what: &'static str, value: impl ToString, allowed: &'static str) -> Result<T> {
    Err(Error::Field {
        what,
        value: value.to_string().escape_debug().to_string(),
        allowed,
    })
}

fn iterations(what: &'static str, value: u32) -> Result<u32> {
    if !(1..=MAX_ITERATIONS).contains(&value) {
        return refuse(what, value, "1 to 50000000 are allowed");
    }
    Ok(value)
}

impl Header {
    /// Reads the header from the beginning of `bytes`, of which [`HEADER`] are needed.
    pub fn parse(bytes: &[u8]) -> Result<Header> {
        if bytes.get(..6) != Some(MAGIC) {
            return Err(Error::Magic);
        }
        let version = u16::from_be_bytes(array(bytes, 6)?);
        if version != 1 {
            return Err(Error::Version(version));
        }
        let cipher = text::<32>(bytes, 8)?;
        if cipher != "aes" {
            return refuse("the cipher", cipher, "aes is supported");
        }
        let mode = text::<32>(bytes, 40)?;
        if mode != "xts-plain64" {
            return refuse("the mode of the cipher", mode, "xts-plain64 is supported");
        }
        let hash = Hash::from_name(&text::<32>(bytes, 72)?)?;
        let payload = u64::from(be32(bytes, 104)?) * SECTOR as u64;
        if payload > MAX_PAYLOAD {
            return refuse(
                "the beginning of the data",
                payload,
                "at most 1 GiB is allowed",
            );
        }
        let key_bytes = be32(bytes, 108)? as usize;
        if !matches!(key_bytes, 32 | 64) {
            return refuse(
                "the length of the key",
                key_bytes,
                "32 bytes (AES-128) and 64 (AES-256) are supported",
            );
        }
        let slot = |i: usize| {
            let at = SLOT_AT + i * SLOT;
            let active = match be32(bytes, at)? {
                ACTIVE => true,
                INACTIVE => false,
                other => {
                    return refuse(
                        "the state of a key slot",
                        format!("{other:#x}"),
                        "there are 0xac71f3 (active) and 0xdead (not active)",
                    );
                }
            };
            let stripes = be32(bytes, at + 44)?;
            let n = be32(bytes, at + 4)?;
            if active && stripes != STRIPES {
                return refuse("the number of stripes", stripes, "4000 is supported");
            }
            Ok(Slot {
                active,
                iterations: if active {
                    iterations("the number of iterations of a key slot", n)?
                } else {
                    n
                },
                salt: array(bytes, at + 8)?,
                material: u64::from(be32(bytes, at + 40)?) * SECTOR as u64,
            })
        };
        let mut slots = Vec::with_capacity(SLOTS);
        for i in 0..SLOTS {
            slots.push(slot(i)?);
        }
        Ok(Header {
            key_bytes,
            hash,
            payload,
            uuid: text::<40>(bytes, 168)?,
            digest: array(bytes, 112)?,
            digest_salt: array(bytes, 132)?,
            digest_iterations: iterations(
                "the number of iterations of the digest",
                be32(bytes, 164)?,
            )?,
            slots: slots.try_into().map_err(|_| Error::Short)?,
        })
    }

    pub(crate) fn encode(&self) -> [u8; HEADER] {
        let mut out = [0; HEADER];
        let mut put = |at: usize, value: &[u8]| out[at..at + value.len()].copy_from_slice(value);
        let sectors = |bytes: u64| ((bytes / SECTOR as u64) as u32).to_be_bytes();
        put(0, MAGIC);
        put(6, &1u16.to_be_bytes());
        put(8, b"aes");
        put(40, b"xts-plain64");
        put(72, self.hash.name().as_bytes());
        put(104, &sectors(self.payload));
        put(108, &(self.key_bytes as u32).to_be_bytes());
        put(112, &self.digest);
        put(132, &self.digest_salt);
        put(164, &self.digest_iterations.to_be_bytes());
        put(168, &self.uuid.as_bytes()[..self.uuid.len().min(39)]);
        for (i, slot) in self.slots.iter().enumerate() {
            let at = SLOT_AT + i * SLOT;
            let state = if slot.active { ACTIVE } else { INACTIVE };
            put(at, &state.to_be_bytes());
            put(at + 4, &slot.iterations.to_be_bytes());
            put(at + 8, &slot.salt);
            put(at + 40, &sectors(slot.material));
            put(at + 44, &STRIPES.to_be_bytes());
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sample() -> Header {
        let slot = |i: u64| Slot {
            active: i < 2,
            iterations: 1000,
            salt: [i as u8; 32],
            material: 4096 * (i + 1),
        };
        Header {
            key_bytes: 64,
            hash: Hash::Sha256,
            payload: 2 << 20,
            uuid: "0a0b0c0d-1111-2222-3333-444455556666".into(),
            digest: [1; 20],
            digest_salt: [2; 32],
            digest_iterations: 1000,
            slots: std::array::from_fn(|i| slot(i as u64)),
        }
    }

    #[test]
    fn headers_survive_being_written() {
        let bytes = sample().encode();
        assert_eq!(Header::parse(&bytes).unwrap(), sample());
        for cut in 0..HEADER {
            assert!(Header::parse(&bytes[..cut]).is_err());
        }
    }

    #[test]
    fn what_is_not_supported_is_named() {
        for (at, value, message) in [
            (0, &b"QFI"[..], "magic"),
            (6, &[0, 2], "version 2"),
            (8, b"serpent", "serpent"),
            (40, b"cbc-essiv:sha256", "cbc-essiv"),
            (72, b"whirlpool", "whirlpool"),
            (108, &[0, 0, 0, 48], "48"),
            (164, &[0xff; 4], "iterations"),
            (SLOT_AT, &[9; 4], "0x9090909"),
            (SLOT_AT + 4, &[0; 4], "iterations"),
            (SLOT_AT + 44, &[0xff; 4], "stripes"),
        ] {
            let mut bytes = sample().encode();
            bytes[at..at + value.len()].copy_from_slice(value);
            let e = Header::parse(&bytes).unwrap_err().to_string();
            assert!(e.contains(message), "{e}");
        }
    }

    proptest! {
        #[test]
        fn nothing_breaks_the_parser(changes in prop::collection::vec((0..HEADER, any::<u8>()), 0..20)) {
            let mut bytes = sample().encode();
            for (at, value) in changes {
                bytes[at] = value;
            }
            if let Ok(header) = Header::parse(&bytes) {
                let none = |_, len: usize| Ok(vec![0; len]);
                if header.slots.iter().all(|s| s.iterations <= 2000) && header.digest_iterations <= 2000 {
                    prop_assert!(header.unlock(b"x", none).is_err());
                }
            }
        }
    }
}
