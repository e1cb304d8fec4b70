//! AES-XTS on sectors (IEEE 1619), with the number of the sector as tweak (dm-crypt's `plain64`).
//!
//! The blocks of several sectors go through AES together: the instructions of processors work on many blocks at a time,
//! and crates that take one after the other are several times slower (docs/decisions.md).

use aes::cipher::{Array, Block, BlockCipherDecrypt, BlockCipherEncrypt, KeyInit};
use aes::{Aes128, Aes256};

/// Bytes of a sector: data is encrypted in multiples of them.
pub const SECTOR: usize = 512;

const BLOCK: usize = 16;
const BLOCKS: usize = SECTOR / BLOCK;

/// Sectors that are worked on together.
const TOGETHER: usize = 8;

/// The key of a disk, ready for use.
pub struct Cipher(Kind);

enum Kind {
    Aes128(Box<Xts<Aes128>>),
    Aes256(Box<Xts<Aes256>>),
}

struct Xts<A> {
    data: A,
    tweak: A,
}

#[derive(Clone, Copy)]
enum Direction {
    Encrypt,
    Decrypt,
}

/// Multiplies by x in GF(2^128) (IEEE 1619, section 5.2).
#[inline]
fn double(tweak: u128) -> u128 {
    (tweak << 1) ^ ((tweak >> 127) * 0x87)
}

#[inline]
fn xor(blocks: &mut [Block<Aes128>], tweaks: &[u128]) {
    for (block, tweak) in blocks.iter_mut().zip(tweaks) {
        *block = Array((u128::from_le_bytes(block.0) ^ tweak).to_le_bytes());
    }
}

impl<A> Xts<A>
where
    A: KeyInit + BlockCipherEncrypt + BlockCipherDecrypt,
    A: aes::cipher::BlockSizeUser<BlockSize = aes::cipher::consts::U16>,
{
    /// None if the key has the wrong length: it consists of one for the data and one for the tweaks.
    fn new(key: &[u8]) -> Option<Xts<A>> {
        let (data, tweak) = key.split_at_checked(key.len() / 2)?;
        Some(Xts {
            data: A::new_from_slice(data).ok()?,
            tweak: A::new_from_slice(tweak).ok()?,
        })
    }

    fn run(&self, direction: Direction, first: u64, data: &mut [u8]) {
        let (blocks, _) = Array::slice_as_chunks_mut(data);
        let mut tweaks = [0u128; TOGETHER * BLOCKS];
        let mut sector = first;
        for part in blocks.chunks_mut(TOGETHER * BLOCKS) {
            let mut firsts = [Array([0; BLOCK]); TOGETHER];
            for f in &mut firsts {
                *f = Array(u128::from(sector).to_le_bytes());
                sector = sector.wrapping_add(1);
            }
            self.tweak.encrypt_blocks(&mut firsts);
            // Of all sectors at once: each one's tweaks depend on those before.
            let mut now = firsts.map(|f| u128::from_le_bytes(f.0));
            for i in 0..BLOCKS {
                for (s, tweak) in now.iter_mut().enumerate() {
                    tweaks[s * BLOCKS + i] = *tweak;
                    *tweak = double(*tweak);
                }
            }
            xor(part, &tweaks);
            match direction {
                Direction::Encrypt => self.data.encrypt_blocks(part),
                Direction::Decrypt => self.data.decrypt_blocks(part),
            }
            xor(part, &tweaks);
        }
    }
}

impl Cipher {
    /// `key` has 32 (AES-128) or 64 bytes (AES-256); None for others.
    pub(crate) fn new(key: &[u8]) -> Option<Cipher> {
        Some(Cipher(match key.len() {
            32 => Kind::Aes128(Box::new(Xts::new(key)?)),
            64 => Kind::Aes256(Box::new(Xts::new(key)?)),
            _ => return None,
        }))
    }

    fn run(&self, direction: Direction, sector: u64, data: &mut [u8]) {
        match &self.0 {
            Kind::Aes128(xts) => xts.run(direction, sector, data),
            Kind::Aes256(xts) => xts.run(direction, sector, data),
        }
    }

    /// Encrypts whole sectors, the first of which has this number. What is left beyond a multiple of [`SECTOR`] bytes
    /// must not be relied on.
    pub fn encrypt(&self, sector: u64, data: &mut [u8]) {
        debug_assert!(data.len().is_multiple_of(SECTOR));
        self.run(Direction::Encrypt, sector, data);
    }

    /// As [`Cipher::encrypt`], the other way.
    pub fn decrypt(&self, sector: u64, data: &mut [u8]) {
        debug_assert!(data.len().is_multiple_of(SECTOR));
        self.run(Direction::Decrypt, sector, data);
    }
}

impl std::fmt::Debug for Cipher {
    /// Says nothing about the key.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match &self.0 {
            Kind::Aes128(_) => "aes-128-xts",
            Kind::Aes256(_) => "aes-256-xts",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use xts_mode::{Xts128, get_tweak_default};

    fn oracle(key: &[u8], sector: u64, data: &mut [u8]) {
        let (a, b) = key.split_at(key.len() / 2);
        if key.len() == 64 {
            let xts = Xts128::new(
                Aes256::new_from_slice(a).unwrap(),
                Aes256::new_from_slice(b).unwrap(),
            );
            xts.encrypt_area(data, SECTOR, sector.into(), get_tweak_default);
        } else {
            let xts = Xts128::new(
                Aes128::new_from_slice(a).unwrap(),
                Aes128::new_from_slice(b).unwrap(),
            );
            xts.encrypt_area(data, SECTOR, sector.into(), get_tweak_default);
        }
    }

    proptest! {
        #[test]
        fn another_implementation_says_the_same(
            key in prop::collection::vec(any::<u8>(), 64),
            short: bool,
            sector: u32,
            sectors in 1usize..20,
            byte: u8,
        ) {
            let key = &key[..if short { 32 } else { 64 }];
            let plain: Vec<u8> = (0..sectors * SECTOR).map(|i| (i as u8).wrapping_mul(byte)).collect();
            let (mut ours, mut theirs) = (plain.clone(), plain.clone());
            let cipher = Cipher::new(key).unwrap();
            cipher.encrypt(sector.into(), &mut ours);
            oracle(key, sector.into(), &mut theirs);
            prop_assert!(ours == theirs);
            cipher.decrypt(sector.into(), &mut ours);
            prop_assert!(ours == plain);
        }
    }

    #[test]
    fn keys_of_other_lengths_are_refused() {
        for len in [0, 16, 33, 48, 128] {
            assert!(Cipher::new(&vec![1; len]).is_none());
        }
    }
}
