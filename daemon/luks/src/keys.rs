//! Key slots: from a passphrase to the key of the disk (specification, "Key management").

use std::time::{Duration, Instant};
use std::{fmt, io};

use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;
use zeroize::Zeroizing;

use crate::af;
use crate::cipher::{Cipher, SECTOR};
use crate::error::{Error, Result};
use crate::hash::Hash;
use crate::header::{HEADER, Header, STRIPES, Slot};

/// Key material is aligned to this many bytes.
const ALIGNMENT: u64 = 4096;

/// The data of a new disk begins at a multiple of this many bytes.
const PAYLOAD_ALIGNMENT: u64 = 1 << 20;

/// Fewer iterations than this are not safe, however slow the machine is. (The specification has the same minimum.)
const MIN_ITERATIONS: u32 = 1000;
const MOST_ITERATIONS: u32 = 10_000_000;

/// Passphrases that anybody has are shorter. In bytes.
const MAX_SECRET: usize = 1 << 20;

/// The key of a disk. It is not shown to anybody, and wiped when it goes.
pub struct Key(Zeroizing<Vec<u8>>);

impl Key {
    /// `bytes` are 32 (AES-128) or 64 (AES-256): one half for the data and one for the tweaks. None for others.
    pub fn new(bytes: &[u8]) -> Option<Key> {
        matches!(bytes.len(), 32 | 64).then(|| Key(Zeroizing::new(bytes.to_vec())))
    }

    pub fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// The key, ready for use.
    ///
    /// # Errors
    /// None in fact: keys have lengths that ciphers take.
    pub fn cipher(&self) -> Result<Cipher> {
        Cipher::new(&self.0).ok_or(Error::WrongKey)
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a key")
    }
}

/// A hash of everything that a key comes from.
pub type Fingerprint = [u8; 32];

/// How a new disk is to be encrypted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FormatOptions {
    /// 128 or 256: bits of AES.
    pub aes_bits: u32,
    pub hash: Hash,
    /// How long it is to take to try a passphrase, on this machine.
    pub iteration_time: Duration,
}

impl Default for FormatOptions {
    fn default() -> FormatOptions {
        FormatOptions {
            aes_bits: 256,
            hash: Hash::Sha256,
            iteration_time: Duration::from_secs(2),
        }
    }
}

impl FormatOptions {
    fn key_bytes(&self) -> usize {
        // One key for the data and one for the tweaks.
        self.aes_bits as usize / 4
    }

    /// Bytes that the key material of one slot takes.
    fn room(&self) -> u64 {
        ((self.key_bytes() * STRIPES as usize) as u64).next_multiple_of(ALIGNMENT)
    }

    /// Bytes before the data of a new disk: header and key material.
    pub fn payload(&self) -> u64 {
        (ALIGNMENT + 8 * self.room()).next_multiple_of(PAYLOAD_ALIGNMENT)
    }
}

fn random<const N: usize>() -> Result<[u8; N]> {
    let mut out = [0; N];
    getrandom::fill(&mut out).map_err(Error::Random)?;
    Ok(out)
}

/// A random UUID (RFC 9562, section 5.4).
fn uuid() -> Result<String> {
    let mut b: [u8; 16] = random()?;
    b[6] = b[6] & 0x0f | 0x40;
    b[8] = b[8] & 0x3f | 0x80;
    let hex: String = b.iter().map(|b| format!("{b:02x}")).collect();
    Ok(format!(
        "{}-{}-{}-{}-{}",
        &hex[..8],
        &hex[8..12],
        &hex[12..16],
        &hex[16..20],
        &hex[20..]
    ))
}

/// How many iterations take about `time` for a key of this length.
fn iterations(hash: Hash, key_bytes: usize, time: Duration) -> u32 {
    const PROBE: u32 = 20_000;
    let mut out = Zeroizing::new(vec![0; key_bytes]);
    let start = Instant::now();
    hash.pbkdf2(b"probe", &[0; 32], PROBE, &mut out);
    let each = start.elapsed().as_secs_f64() / f64::from(PROBE);
    let n = time.as_secs_f64() / each.max(1e-9);
    (n as u32).clamp(MIN_ITERATIONS, MOST_ITERATIONS)
}

impl Header {
    /// One after the last byte of the header and of the key material that is in use: data may begin there.
    pub fn end_of_keys(&self) -> u64 {
        let active = self.slots.iter().filter(|s| s.active);
        let ends = active.map(|s| s.material + self.material_len() as u64);
        ends.max().unwrap_or(0).max(HEADER as u64)
    }

    fn material_len(&self) -> usize {
        self.key_bytes * STRIPES as usize
    }

    /// A hash of this header, of the key material in use and of `secret`: where it is the same, the key is. `read` as for
    /// [`Header::unlock`]; None if not all of the material can be read.
    pub fn fingerprint(
        &self,
        secret: &[u8],
        mut read: impl FnMut(u64, usize) -> io::Result<Vec<u8>>,
    ) -> Option<Fingerprint> {
        let mut hash = Sha256::new();
        hash.update((secret.len() as u64).to_le_bytes());
        hash.update(secret);
        hash.update(self.encode());
        for slot in self.slots.iter().filter(|s| s.active) {
            let material = read(slot.material, self.material_len()).ok()?;
            if material.len() != self.material_len() {
                return None;
            }
            hash.update(&material);
        }
        Some(hash.finalize().into())
    }

    /// Finds the slot that `secret` opens. `read` gives `len` bytes at an offset (in bytes) from the beginning of the
    /// header. Takes as long as the header asks for, seconds mostly.
    pub fn unlock(
        &self,
        secret: &[u8],
        mut read: impl FnMut(u64, usize) -> io::Result<Vec<u8>>,
    ) -> Result<Key> {
        if secret.len() > MAX_SECRET {
            return Err(Error::WrongKey);
        }
        let mut failed = None;
        for slot in self.slots.iter().filter(|s| s.active) {
            // One that is damaged does not stand in the way of the others.
            let material = match read(slot.material, self.material_len()) {
                Ok(bytes) if bytes.len() == self.material_len() => Zeroizing::new(bytes),
                Ok(_) => {
                    failed = Some(Error::Short);
                    continue;
                }
                Err(e) => {
                    failed = Some(Error::Read(e));
                    continue;
                }
            };
            if let Some(key) = self.open_slot(slot, secret, material)? {
                return Ok(key);
            }
        }
        Err(failed.unwrap_or(Error::WrongKey))
    }

    fn slot_cipher(&self, slot: &Slot, secret: &[u8]) -> Result<Cipher> {
        let mut key = Zeroizing::new(vec![0; self.key_bytes]);
        self.hash
            .pbkdf2(secret, &slot.salt, slot.iterations, &mut key);
        Cipher::new(&key).ok_or(Error::WrongKey)
    }

    fn open_slot(
        &self,
        slot: &Slot,
        secret: &[u8],
        mut material: Zeroizing<Vec<u8>>,
    ) -> Result<Option<Key>> {
        self.slot_cipher(slot, secret)?.decrypt(0, &mut material);
        let key = af::merge(&material, self.key_bytes, self.hash);
        let is_key = self.digest_of(&key).ct_eq(&self.digest);
        Ok(if is_key.into() { Key::new(&key) } else { None })
    }

    fn digest_of(&self, key: &[u8]) -> [u8; 20] {
        let mut digest = [0; 20];
        let (salt, n) = (&self.digest_salt, self.digest_iterations);
        self.hash.pbkdf2(key, salt, n, &mut digest);
        digest
    }

    /// Makes a new key, locks it with `secret` in the first slot, and returns everything before the payload: the header and
    /// the key material.
    pub fn format(options: &FormatOptions, secret: &[u8]) -> Result<(Vec<u8>, Key)> {
        if secret.is_empty() || secret.len() > MAX_SECRET {
            return Err(Error::Field {
                what: "the secret",
                value: format!("{} bytes", secret.len()),
                allowed: "1 byte to 1 MiB is allowed",
            });
        }
        let key_bytes = options.key_bytes();
        let mut bytes = Zeroizing::new(vec![0; key_bytes]);
        getrandom::fill(&mut bytes).map_err(Error::Random)?;
        let key = Key::new(&bytes).ok_or_else(|| Error::Field {
            what: "the number of bits of AES",
            value: options.aes_bits.to_string(),
            allowed: "128 and 256 are supported",
        })?;
        let n = iterations(options.hash, key_bytes, options.iteration_time);
        let room = options.room();
        let mut header = Header {
            key_bytes,
            hash: options.hash,
            payload: options.payload(),
            uuid: uuid()?,
            digest: [0; 20],
            digest_salt: random()?,
            // Whoever can try digests has the key already: an eighth, as others do.
            digest_iterations: (n / 8).max(MIN_ITERATIONS),
            slots: std::array::from_fn(|i| Slot {
                active: false,
                iterations: 0,
                salt: [0; 32],
                material: ALIGNMENT + i as u64 * room,
            }),
        };
        header.digest = header.digest_of(&bytes);
        let slot = &mut header.slots[0];
        (slot.active, slot.iterations, slot.salt) = (true, n, random()?);
        let slot = header.slots[0].clone();
        let mut material = af::split(&bytes, STRIPES as usize, options.hash)?;
        header.slot_cipher(&slot, secret)?.encrypt(0, &mut material);
        let mut out = vec![0; header.payload as usize];
        out[..HEADER].copy_from_slice(&header.encode());
        let at = slot.material as usize;
        out[at..at + material.len()].copy_from_slice(&material);
        Ok((out, key))
    }
}

const _: () = assert!((32 * STRIPES as usize).is_multiple_of(SECTOR));

#[cfg(test)]
mod tests {
    use super::*;

    fn reader(bytes: &[u8]) -> impl FnMut(u64, usize) -> io::Result<Vec<u8>> {
        |at, len| {
            let part = bytes.get(at as usize..).unwrap_or_default();
            Ok(part[..len.min(part.len())].to_vec())
        }
    }

    #[test]
    fn the_secret_opens_what_it_has_locked_and_no_other() {
        for (aes_bits, hash) in [(128, Hash::Sha1), (256, Hash::Sha256), (256, Hash::Sha512)] {
            let options = FormatOptions {
                aes_bits,
                hash,
                iteration_time: Duration::from_millis(1),
            };
            let (bytes, key) = Header::format(&options, b"open sesame").unwrap();
            let cipher = key.cipher().unwrap();
            let header = Header::parse(&bytes).unwrap();
            assert_eq!(header.payload, bytes.len() as u64);
            let same = header.unlock(b"open sesame", reader(&bytes)).unwrap();
            let mut data = [7; SECTOR];
            cipher.encrypt(3, &mut data);
            same.cipher().unwrap().decrypt(3, &mut data);
            assert_eq!(data, [7; SECTOR]);
            let print = |secret: &[u8], bytes: &[u8]| {
                let header = Header::parse(bytes).unwrap();
                header.fingerprint(secret, reader(bytes))
            };
            let usual = print(b"open sesame", &bytes);
            assert!(usual.is_some());
            assert_eq!(usual, print(b"open sesame", &bytes));
            assert_ne!(usual, print(b"open simsim", &bytes));
            let mut other = bytes.clone();
            // A byte of the key material, and one of the digest's salt.
            for at in [ALIGNMENT as usize + 7, 132] {
                other[at] ^= 1;
                assert_ne!(usual, print(b"open sesame", &other), "{at}");
                other[at] ^= 1;
            }
            assert_eq!(print(b"open sesame", &bytes[..5000]), None);
            let e = header.unlock(b"open simsim", reader(&bytes)).unwrap_err();
            assert!(matches!(e, Error::WrongKey), "{e}");
            let e = header.unlock(b"open sesame", reader(&bytes[..5000]));
            assert!(matches!(e, Err(Error::Short)));
        }
    }
}
