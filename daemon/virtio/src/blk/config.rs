//! The configuration space of a virtio-blk device (section 5.2.4).

/// Bytes of `struct virtio_blk_config` up to and including the write zeroes fields.
pub const CONFIG_SIZE: usize = 60;

/// Offset of the one field that a driver may write.
pub const WRITEBACK_OFFSET: usize = 32;

/// What the configuration space says. Sizes named `sectors` are in 512-byte sectors, whatever the
/// block size.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlkConfig {
    pub capacity_sectors: u64,
    /// Most data segments in a request.
    pub seg_max: u32,
    /// Logical block size in bytes.
    pub blk_size: u32,
    /// Logical blocks in a physical block, as a power of two.
    pub physical_block_exp: u8,
    /// Suggested I/O sizes in logical blocks; 0 for none.
    pub min_io_blocks: u16,
    pub opt_io_blocks: u32,
    /// The volatile cache is on.
    pub writeback: bool,
    pub num_queues: u16,
    pub max_discard_sectors: u32,
    pub max_discard_seg: u32,
    pub discard_sector_alignment: u32,
    pub max_write_zeroes_sectors: u32,
    pub max_write_zeroes_seg: u32,
    pub write_zeroes_may_unmap: bool,
}

impl BlkConfig {
    /// The little-endian layout.
    pub fn to_bytes(&self) -> [u8; CONFIG_SIZE] {
        let mut b = [0; CONFIG_SIZE];
        let mut put = |at: usize, bytes: &[u8]| b[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &self.capacity_sectors.to_le_bytes());
        // 8: size_max, 16: geometry: not offered
        put(12, &self.seg_max.to_le_bytes());
        put(20, &self.blk_size.to_le_bytes());
        put(24, &[self.physical_block_exp, 0]);
        put(26, &self.min_io_blocks.to_le_bytes());
        put(28, &self.opt_io_blocks.to_le_bytes());
        put(WRITEBACK_OFFSET, &[u8::from(self.writeback)]);
        put(34, &self.num_queues.to_le_bytes());
        put(36, &self.max_discard_sectors.to_le_bytes());
        put(40, &self.max_discard_seg.to_le_bytes());
        put(44, &self.discard_sector_alignment.to_le_bytes());
        put(48, &self.max_write_zeroes_sectors.to_le_bytes());
        put(52, &self.max_write_zeroes_seg.to_le_bytes());
        put(56, &[u8::from(self.write_zeroes_may_unmap)]);
        b
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use virtio_bindings::virtio_blk::virtio_blk_config;

    #[test]
    fn layout_is_that_of_the_kernel_header() {
        let c = BlkConfig {
            capacity_sectors: 0x0102030405060708,
            seg_max: 126,
            blk_size: 4096,
            physical_block_exp: 3,
            min_io_blocks: 8,
            opt_io_blocks: 2048,
            writeback: true,
            num_queues: 64,
            max_discard_sectors: 11,
            max_discard_seg: 12,
            discard_sector_alignment: 13,
            max_write_zeroes_sectors: 14,
            max_write_zeroes_seg: 15,
            write_zeroes_may_unmap: true,
        };
        let bytes = c.to_bytes();
        let k = virtio_blk_config {
            capacity: c.capacity_sectors,
            seg_max: 126,
            blk_size: 4096,
            physical_block_exp: 3,
            min_io_size: 8,
            opt_io_size: 2048,
            wce: 1,
            num_queues: 64,
            max_discard_sectors: 11,
            max_discard_seg: 12,
            discard_sector_alignment: 13,
            max_write_zeroes_sectors: 14,
            max_write_zeroes_seg: 15,
            write_zeroes_may_unmap: 1,
            ..Default::default()
        };
        assert!(size_of::<virtio_blk_config>() >= CONFIG_SIZE);
        // SAFETY: plain data of at least CONFIG_SIZE bytes.
        let kernel =
            unsafe { std::slice::from_raw_parts((&raw const k).cast::<u8>(), CONFIG_SIZE) };
        assert_eq!(bytes, kernel);
    }
}
