//! What a virtio-blk device offers, and the state that its queues share.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use vdisk_block::Backend;
use vdisk_virtio::blk::{BlkConfig, SECTOR_SIZE, SERIAL_LEN, feature};

/// Most segments in one discard or write zeroes request.
const MAX_RANGES: u32 = 32;

/// Longest range of a discard or write zeroes segment: what fits `num_sectors`, cut to whole 4 KiB.
const MAX_RANGE_SECTORS: u32 = (u32::MAX / SECTOR_SIZE as u32) & !7;

/// What a user chose for a device.
#[derive(Clone, Debug)]
pub struct DeviceOptions {
    pub id: String,
    pub writable: bool,
    pub writethrough: bool,
    pub num_queues: u16,
    pub queue_size: u16,
    /// Bytes.
    pub logical_block_size: u32,
    pub physical_block_size: u32,
    pub serial: String,
}

pub struct Device {
    pub options: DeviceOptions,
    pub backend: Arc<Backend>,
    /// The driver's choice in the configuration space, if it may choose.
    wce: AtomicBool,
    /// Whether writes may be held in a volatile cache, as negotiated.
    writeback: AtomicBool,
}

impl Device {
    pub fn new(options: DeviceOptions, backend: Arc<Backend>) -> Device {
        let wce = !options.writethrough;
        Device {
            options,
            backend,
            wce: AtomicBool::new(wce),
            writeback: AtomicBool::new(false),
        }
    }

    /// Offered virtio features (device independent ones of the ring included).
    pub fn features(&self) -> u64 {
        let o = &self.options;
        let mut f = feature::SEG_MAX
            | feature::BLK_SIZE
            | feature::TOPOLOGY
            | feature::MQ
            | feature::INDIRECT_DESC
            | feature::EVENT_IDX
            | feature::VERSION_1
            | feature::RING_RESET;
        if o.writable {
            f |= feature::DISCARD | feature::WRITE_ZEROES;
        } else {
            f |= feature::RO;
        }
        // A driver that sees no FLUSH takes the device for write-through.
        if !o.writethrough {
            f |= feature::FLUSH | feature::CONFIG_WCE;
        }
        f
    }

    pub fn config(&self) -> BlkConfig {
        let o = &self.options;
        let node = self.backend.node();
        let block_sectors = o.logical_block_size / SECTOR_SIZE as u32;
        BlkConfig {
            capacity_sectors: node.size() / SECTOR_SIZE,
            seg_max: u32::from(o.queue_size) - 2,
            blk_size: o.logical_block_size,
            physical_block_exp: (o.physical_block_size / o.logical_block_size).trailing_zeros()
                as u8,
            min_io_blocks: (o.physical_block_size / o.logical_block_size) as u16,
            opt_io_blocks: 0,
            writeback: self.wce(),
            num_queues: o.num_queues,
            max_discard_sectors: MAX_RANGE_SECTORS,
            max_discard_seg: MAX_RANGES,
            discard_sector_alignment: (node.limits().zero_alignment / SECTOR_SIZE)
                .clamp(block_sectors.into(), 1 << 16) as u32,
            max_write_zeroes_sectors: MAX_RANGE_SECTORS,
            max_write_zeroes_seg: MAX_RANGES,
            write_zeroes_may_unmap: node.discards(),
        }
    }

    pub fn max_ranges(&self) -> usize {
        MAX_RANGES as usize
    }

    pub fn max_range_sectors(&self) -> u32 {
        MAX_RANGE_SECTORS
    }

    /// The answer to GET_ID: the serial, filled up with zero bytes.
    pub fn serial(&self) -> [u8; SERIAL_LEN] {
        let mut out = [0; SERIAL_LEN];
        let bytes = self.options.serial.as_bytes();
        let n = bytes.len().min(SERIAL_LEN);
        out[..n].copy_from_slice(&bytes[..n]);
        out
    }

    pub fn wce(&self) -> bool {
        self.wce.load(Ordering::Relaxed)
    }

    /// The driver wrote `writeback` in the configuration space, or negotiated `features` (specification
    /// 5.2.5.2): without CONFIG_WCE the cache follows FLUSH, and a driver that knows neither gets
    /// write-through.
    pub fn set_cache(&self, wce: bool, features: u64) {
        let wce = wce && !self.options.writethrough;
        self.wce.store(wce, Ordering::Relaxed);
        let writeback = if features & feature::CONFIG_WCE != 0 {
            wce
        } else {
            features & feature::FLUSH != 0
        };
        self.writeback
            .store(writeback && !self.options.writethrough, Ordering::SeqCst);
    }

    /// Whether a write may complete before it is durable.
    #[inline]
    pub fn is_writeback(&self) -> bool {
        self.writeback.load(Ordering::Relaxed)
    }
}
