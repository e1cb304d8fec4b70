//! AES-XTS on sectors (IEEE 1619), with the number of the sector as tweak (dm-crypt's `plain64`).
//!
//! The blocks of several sectors go through AES together, and their tweaks are made together: processors work on many
//! blocks at a time, and one after the other is several times slower (docs/decisions.md).

use std::cell::RefCell;

use aes::cipher::consts::U16;
use aes::cipher::typenum::Unsigned;
use aes::cipher::{
    Array, Block, BlockCipherDecBackend, BlockCipherDecClosure, BlockCipherDecrypt,
    BlockCipherEncBackend, BlockCipherEncClosure, BlockCipherEncrypt, BlockSizeUser, KeyInit,
    ParBlocks,
};
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

/// The tweaks of the blocks of [`TOGETHER`] sectors.
type Tweaks = [u128; TOGETHER * BLOCKS];

thread_local! {
    /// Clearing an array for each request would take a good part of its time.
    static TWEAKS: RefCell<Tweaks> = const { RefCell::new([0; TOGETHER * BLOCKS]) };
}

/// Makes the tweaks from those of the first blocks: each is the one before times x in GF(2^128) (IEEE 1619, section
/// 5.2). In halves and of all sectors at once, which compilers make vectors of.
#[inline]
fn expand(firsts: &[Block<Aes128>; TOGETHER], tweaks: &mut Tweaks) {
    let all = firsts.map(|f| u128::from_le_bytes(f.0));
    let (mut low, mut high) = (all.map(|t| t as u64), all.map(|t| (t >> 64) as u64));
    for i in 0..BLOCKS {
        for s in 0..TOGETHER {
            tweaks[s * BLOCKS + i] = u128::from(low[s]) | u128::from(high[s]) << 64;
        }
        let reduced = high.map(|h| (h >> 63).wrapping_neg() & 0x87);
        let carry = low.map(|l| l >> 63);
        for s in 0..TOGETHER {
            low[s] = low[s] << 1 ^ reduced[s];
            high[s] = high[s] << 1 | carry[s];
        }
    }
}

#[inline(always)]
fn xor(block: &Block<Aes128>, tweak: u128) -> Block<Aes128> {
    Array((u128::from_le_bytes(block.0) ^ tweak).to_le_bytes())
}

/// Blocks with their tweaks, on the way through AES.
struct Masked<'a> {
    blocks: &'a mut [Block<Aes128>],
    tweaks: &'a [u128],
}

impl BlockSizeUser for Masked<'_> {
    type BlockSize = U16;
}

/// Puts the blocks through `$many` as many at a time as the backend likes, and the rest through `$one`.
macro_rules! through {
    ($self:ident, $backend:ident, $B:ident, $many:ident, $one:ident) => {
        let n = $B::ParBlocksSize::USIZE;
        let mut groups = $self.blocks.chunks_exact_mut(n);
        let mut tweaks = $self.tweaks.chunks_exact(n);
        for (group, tweaks) in groups.by_ref().zip(tweaks.by_ref()) {
            let mut masked = ParBlocks::<$B>::default();
            for i in 0..n {
                masked[i] = xor(&group[i], tweaks[i]);
            }
            $backend.$many((&mut masked).into());
            for i in 0..n {
                group[i] = xor(&masked[i], tweaks[i]);
            }
        }
        for (block, tweak) in groups.into_remainder().iter_mut().zip(tweaks.remainder()) {
            let mut masked = xor(block, *tweak);
            $backend.$one((&mut masked).into());
            *block = xor(&masked, *tweak);
        }
    };
}

impl BlockCipherEncClosure for Masked<'_> {
    #[inline(always)]
    fn call<B: BlockCipherEncBackend<BlockSize = U16>>(self, backend: &B) {
        through!(self, backend, B, encrypt_par_blocks, encrypt_block);
    }
}

impl BlockCipherDecClosure for Masked<'_> {
    #[inline(always)]
    fn call<B: BlockCipherDecBackend<BlockSize = U16>>(self, backend: &B) {
        through!(self, backend, B, decrypt_par_blocks, decrypt_block);
    }
}

impl<A> Xts<A>
where
    A: KeyInit + BlockCipherEncrypt + BlockCipherDecrypt,
    A: BlockSizeUser<BlockSize = U16>,
{
    /// None if the key has the wrong length: it consists of one for the data and one for the tweaks.
    fn new(key: &[u8]) -> Option<Xts<A>> {
        let (data, tweak) = key.split_at_checked(key.len() / 2)?;
        Some(Xts {
            data: A::new_from_slice(data).ok()?,
            tweak: A::new_from_slice(tweak).ok()?,
        })
    }

    fn run(&self, direction: Direction, first: u64, data: &mut [u8], tweaks: &mut Tweaks) {
        let (blocks, _) = Array::slice_as_chunks_mut(data);
        let mut sector = first;
        for blocks in blocks.chunks_mut(TOGETHER * BLOCKS) {
            let mut firsts = [Array([0; BLOCK]); TOGETHER];
            for f in &mut firsts {
                *f = Array(u128::from(sector).to_le_bytes());
                sector = sector.wrapping_add(1);
            }
            self.tweak.encrypt_blocks(&mut firsts);
            expand(&firsts, tweaks);
            let tweaks = &tweaks[..blocks.len()];
            let masked = Masked { blocks, tweaks };
            match direction {
                Direction::Encrypt => self.data.encrypt_with_backend(masked),
                Direction::Decrypt => self.data.decrypt_with_backend(masked),
            }
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
        TWEAKS.with_borrow_mut(|tweaks| match &self.0 {
            Kind::Aes128(xts) => xts.run(direction, sector, data, tweaks),
            Kind::Aes256(xts) => xts.run(direction, sector, data, tweaks),
        });
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
