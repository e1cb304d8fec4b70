//! Making an image ready to be written.

use std::io;
use std::path::Path;

use crate::allocator::Allocator;
use crate::check::{CHECK_MEMORY, Repair};
use crate::error::Error;
use crate::header::{AUTOCLEAR_BITMAPS, AUTOCLEAR_RAW_DATA, AUTOCLEAR_REDO};
use crate::image::Image;
use crate::meta::Writing;
use crate::partial::Partial;
use crate::redo::Redo;
use crate::refcount::{MAX_TABLE, Refcounts};
use crate::storage::{Step, before};

impl Image {
    /// Makes the image ready to be written: reads its refcount table, and does to its header what the
    /// specification asks of a writer.
    ///
    /// `redo` is where changes are noted that were answered and are not durable, in a folder that outlives the process and
    /// not the machine: what an earlier process has left there is done first. Without it such changes are lost when the
    /// process is killed. (Version 2 cannot say whether somebody else has written since, and has no such log.)
    pub async fn activate(&self, redo: Option<&Path>) -> io::Result<()> {
        let counts = self.header().autoclear & AUTOCLEAR_REDO != 0;
        let Some(path) = redo.filter(|_| self.version >= 3) else {
            return self.prepare(0).await;
        };
        let opened = Redo::open(path);
        if let Ok((_, records)) = &opened
            && counts
            && self.lacks_backing(records)
        {
            // Nothing is changed: the log counts as long as the header says so.
            return Err(Error::NeedsBacking.into());
        }
        // It counts until all of it is done.
        let keep = if opened.is_ok() { AUTOCLEAR_REDO } else { 0 };
        self.prepare(keep).await?;
        let (log, mut records) = match opened {
            Ok(opened) => opened,
            Err(error) => {
                // The image is as safe as ever against power cuts.
                tracing::warn!(
                    log = %path.display(),
                    %error,
                    "cannot be opened: writes that were not flushed are lost if the daemon is killed"
                );
                return Ok(());
            }
        };
        if !counts {
            records.clear();
        }
        if !records.is_empty() {
            match self.redo(&records).await {
                Ok(Ok(n)) => tracing::info!(
                    log = %path.display(),
                    clusters = n,
                    "what was written before the daemon was killed is in the image"
                ),
                Ok(Err(why)) => tracing::warn!(
                    log = %path.display(),
                    why,
                    "what an earlier daemon noted cannot be done, and is left out"
                ),
                Err(error) => {
                    // The log counts until it is done: by whoever opens the image next.
                    self.meta().writing = None;
                    return Err(io::Error::new(
                        error.kind(),
                        format!(
                            "what was written before the daemon was killed cannot be brought into the image: {error}; it stays in {}: try again, or remove that to do without it",
                            path.display()
                        ),
                    ));
                }
            }
        }
        let next = log.next();
        let mut noted = true;
        if let Some(w) = &mut self.meta().writing {
            w.redo = Some(log);
            // What is partial is for the process after this one, too.
            noted = self.note_partial(w);
            if let (Some(log), true) = (&mut w.redo, noted) {
                log.forget(next);
            }
        }
        if !noted && let Err(error) = self.flush_all().await {
            tracing::warn!(%error, "what was written before the daemon was killed is not durable yet");
        }
        self.change_header(|h| h.autoclear |= AUTOCLEAR_REDO);
        self.write_header().await
    }

    /// Makes the image ready to be written to, which clears the autoclear bits that are not known here, or are not of `keep`.
    pub(crate) async fn prepare(&self, keep: u64) -> io::Result<()> {
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
        let place = header.refcount_table_offset;
        before(&*self.file, Step::ReftableLoad, place, bytes).await?;
        let table = self
            .read_metadata(place, bytes, "the refcount table")
            .await?;
        let refs = Refcounts::new(
            header.refcount_order,
            bits,
            header.refcount_table_offset,
            &table,
            self.refcount_capacity(),
        );
        self.grow_data(header.size).await?;
        let end = self.file.size().div_ceil(self.cluster());
        if self.file.grows() {
            // QEMU's last cluster may be there in part, and what is missing of it is written like the rest.
            let whole = end << bits;
            if whole > self.file.size() {
                self.file.set_size(whole).await?;
            }
        }
        self.start_writing(refs, end);
        self.with_refs(|w| {
            w.alloc.look_again();
            Ok(())
        })
        .await?;
        self.meta().header.autoclear &= AUTOCLEAR_RAW_DATA | AUTOCLEAR_BITMAPS | keep;
        if self.header() != header {
            self.write_header().await?;
        }
        self.load_bitmaps().await
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
        let bits = self.layout.cluster_bits;
        let limit = (!self.file.grows()).then(|| self.file.size() >> bits);
        // A part of a cluster at the end of a device is no place.
        let end = limit.map_or(end, |limit| end.min(limit));
        let mut meta = self.meta();
        let (redo, partial) = match meta.writing.take() {
            Some(w) => (w.redo, w.partial),
            None => (None, Partial::new(self.layout.table_bits())),
        };
        meta.writing = Some(Writing {
            refs,
            alloc: Allocator::new(bits, end, limit),
            redo,
            partial,
            packing: None,
            l2: Default::default(),
            l1: None,
            unrefs: Vec::new(),
            unused: Default::default(),
            next_unused: 0,
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
