//! The anti-forensic splitter: a key is spread over so much of the medium that destroying any part of it destroys the key
//! (specification, "Anti-forensic information splitter").

use zeroize::Zeroizing;

use crate::error::{Error, Result};
use crate::hash::Hash;

fn xor(a: &mut [u8], b: &[u8]) {
    for (a, b) in a.iter_mut().zip(b) {
        *a ^= b;
    }
}

/// Spreads a key over `stripes` (at least one) pieces of its length.
pub fn split(key: &[u8], stripes: usize, hash: Hash) -> Result<Zeroizing<Vec<u8>>> {
    let mut out = Zeroizing::new(vec![0; key.len() * stripes]);
    let mut state = Zeroizing::new(vec![0; key.len()]);
    let (random, last) = out.split_at_mut(key.len() * (stripes - 1));
    getrandom::fill(random).map_err(Error::Random)?;
    for stripe in random.chunks(key.len()) {
        xor(&mut state, stripe);
        hash.diffuse(&mut state);
    }
    last.copy_from_slice(key);
    xor(last, &state);
    Ok(out)
}

/// The key of `len` bytes (at least one) that was spread.
pub fn merge(material: &[u8], len: usize, hash: Hash) -> Zeroizing<Vec<u8>> {
    let mut state = Zeroizing::new(vec![0; len]);
    let mut stripes = material.chunks(len).peekable();
    while let Some(stripe) = stripes.next() {
        xor(&mut state, stripe);
        if stripes.peek().is_some() {
            hash.diffuse(&mut state);
        }
    }
    state
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_split_can_be_merged() {
        for hash in [Hash::Sha1, Hash::Sha256, Hash::Sha512] {
            let key: Vec<u8> = (0..64).collect();
            let spread = split(&key, 40, hash).unwrap();
            assert_eq!(*merge(&spread, 64, hash), key);
            let mut damaged = spread.to_vec();
            damaged[5] ^= 1;
            assert_ne!(*merge(&damaged, 64, hash), key);
        }
    }
}
