//! What is known of the bytes of a node without reading them.

/// See the module.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockStatus {
    /// Bytes that this is said of, at least one.
    pub len: u64,
    /// They read as zeroes, and will do so however the image is opened another time.
    pub zero: bool,
    /// They come from the node itself, or from what lies above the node that was asked about.
    pub own: bool,
}

impl BlockStatus {
    pub const fn data(len: u64) -> BlockStatus {
        BlockStatus {
            len,
            zero: false,
            own: true,
        }
    }
}
