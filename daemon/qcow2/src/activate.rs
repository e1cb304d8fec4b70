//! Making an image ready to be written.

use std::io;

use crate::allocator::Allocator;
use crate::check::{CHECK_MEMORY, Repair};
use crate::error::Error;
use crate::header::AUTOCLEAR_RAW_DATA;
use crate::image::Image;
use crate::meta::Writing;
use crate::refcount::{MAX_TABLE, Refcounts};

impl Image {
    /// Makes the image ready to be written: reads its refcount table, and does to its header what the
    /// specification asks of a writer.
    pub async fn activate(&self) -> io::Result<()> {
        let header = self.header();
        if header.dirty {
            tracing::info!("the image was not closed, and its reference counts are made anew");
            let report = self.check(Repair::All, CHECK_MEMORY).await?;
            let left = report.corruptions - report.corruptions_fixed;
            if left > 0 {
                return Err(Error::NotRepaired(left).into());
            }
        }
        let header = self.header();
        let bits = self.layout.cluster_bits;
        let bytes = u64::from(header.refcount_table_clusters) << bits;
        if bytes == 0 || bytes > MAX_TABLE.max(self.cluster()) {
            return Err(Error::Field {
                what: "the number of clusters of the refcount table",
                value: header.refcount_table_clusters.into(),
                allowed: "it has 1 cluster to 8 MiB",
            }
            .into());
        }
        if !header.refcount_table_offset.is_multiple_of(self.cluster()) {
            return Err(Error::Field {
                what: "the offset of the refcount table",
                value: header.refcount_table_offset,
                allowed: "a multiple of the size of a cluster is allowed",
            }
            .into());
        }
        let table = self
            .read_metadata(header.refcount_table_offset, bytes, "the refcount table")
            .await?;
        let refs = Refcounts::new(
            header.refcount_order,
            bits,
            header.refcount_table_offset,
            &table,
            self.refcount_capacity(),
        );
        let end = self.file.size().div_ceil(self.cluster());
        self.start_writing(refs, end);
        self.with_refs(|w| {
            w.alloc.look_again();
            Ok(())
        })
        .await?;
        self.meta().header.autoclear &= AUTOCLEAR_RAW_DATA;
        if self.header() != header {
            self.write_header().await?;
            self.file.flush().await?;
        }
        Ok(())
    }

    fn refcount_capacity(&self) -> usize {
        let blocks = self.options.refcount_cache >> self.layout.cluster_bits;
        usize::try_from(blocks).unwrap_or(usize::MAX)
    }

    /// Reference counts of which there are none yet. They find their place when the first is set.
    pub(crate) fn empty_refcounts(&self) -> Refcounts {
        Refcounts::new(
            self.header().refcount_order,
            self.layout.cluster_bits,
            0,
            &[],
            self.refcount_capacity(),
        )
    }

    /// Starts writing with these reference counts. What is allocated lies behind cluster `end`.
    pub(crate) fn start_writing(&self, refs: Refcounts, end: u64) {
        let grows = self.file.grows();
        self.meta().writing = Some(Writing {
            refs,
            alloc: Allocator::new(self.layout.cluster_bits, end, grows),
            packing: None,
            l2: Default::default(),
            l1: None,
            unrefs: Vec::new(),
            unused: Vec::new(),
        });
    }

    /// Sets a reference count, of a cluster that may have no block yet.
    pub(crate) async fn set_count(&self, cluster: u64, count: u64) -> io::Result<()> {
        self.with_refs(|w| {
            w.alloc.ensure_block(&mut w.refs, cluster)?;
            w.refs.set(cluster, count)
        })
        .await
    }

    /// Gives the file what the tables that were put at its end need.
    pub(crate) async fn grow_to_end(&self) -> io::Result<()> {
        let end = self.with_refs(|w| Ok(w.alloc.end())).await?;
        self.grow_file(end << self.layout.cluster_bits).await
    }
}
