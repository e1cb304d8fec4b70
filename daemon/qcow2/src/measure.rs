//! How large an image file would be.

use crate::create::{CreateOptions, Preallocation};
use crate::error::Result;

/// Bytes of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Measure {
    /// With as much data as was asked for.
    pub required: u64,
    /// With all clusters allocated.
    pub fully_allocated: u64,
}

impl CreateOptions {
    /// How large the file of such an image is with `data` bytes of the disk allocated.
    pub fn measure(&self, data: u64) -> Result<Measure> {
        let header = self.header()?;
        let cluster = self.cluster_size;
        let l1 = (u64::from(header.l1_entries) * 8).div_ceil(cluster);
        let l2 = u64::from(header.l1_entries);
        // The data of the disk does not count if it is elsewhere.
        let (all, data) = match self.data_file {
            Some(_) => (0, 0),
            None => (self.size.div_ceil(cluster), data),
        };
        let luks = self
            .luks
            .as_ref()
            .map_or(0, |l| l.len() as u64)
            .div_ceil(cluster);
        let bytes = |clusters: u64, tables: u64| {
            let mut total = 1 + l1 + luks + tables + clusters;
            let per_block = (cluster * 8) >> header.refcount_order;
            // Blocks and their table are counted themselves.
            let mut refcounts = 0;
            loop {
                let blocks = (total + refcounts).div_ceil(per_block);
                let table = (blocks * 8).div_ceil(cluster);
                if blocks + table <= refcounts {
                    break;
                }
                refcounts = blocks + table;
            }
            total += refcounts;
            total * cluster
        };
        let fully_allocated = bytes(all, l2);
        let spared = match self.preallocation {
            Preallocation::Off => all - data.div_ceil(cluster).min(all),
            // What is encrypted has to be written.
            Preallocation::Metadata if self.luks.is_none() => all - data.div_ceil(cluster).min(all),
            _ => 0,
        };
        Ok(Measure {
            required: fully_allocated - spared * cluster,
            fully_allocated,
        })
    }
}
