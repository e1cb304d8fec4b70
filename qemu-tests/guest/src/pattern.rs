//! Contents that say what they are: every block carries its position and generation, and the rest of it
//! follows from them.

/// `len` bytes for this position and generation.
pub fn block(position: u64, generation: u64, len: usize) -> Vec<u8> {
    let mut out = Vec::with_capacity(len);
    out.extend(position.to_le_bytes());
    out.extend(generation.to_le_bytes());
    let mut x = position
        .wrapping_mul(0x9e37_79b9_7f4a_7c15)
        .wrapping_add(generation)
        | 1;
    while out.len() < len {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        out.extend(x.to_le_bytes());
    }
    out.truncate(len);
    out
}

/// What a block says it is: position and generation.
pub fn claims(block: &[u8]) -> (u64, u64) {
    let word = |at: usize| {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&block[at..at + 8]);
        u64::from_le_bytes(bytes)
    };
    (word(0), word(8))
}

/// FNV-1a.
pub fn sum(data: &[u8]) -> u64 {
    data.iter().fold(0xcbf2_9ce4_8422_2325, |h, b| {
        (h ^ u64::from(*b)).wrapping_mul(0x100_0000_01b3)
    })
}
