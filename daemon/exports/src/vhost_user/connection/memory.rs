//! Guest memory, and the log of what is written to it.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use vdisk_io::IoThread;
use vdisk_virtio::{DirtyLog, GuestMemory, GuestRegion};

use super::{Connection, invalid};
use crate::vhost_user::message::{F_LOG_ALL, MAX_MEM_SLOTS, MemoryRegion, ProtocolError};
use crate::vhost_user::state::{LogState, RegionState};
use crate::virtio_blk::Logging;

impl Connection<'_> {
    pub(super) async fn set_mem_table(
        &mut self,
        regions: &[MemoryRegion],
        mut fds: Vec<OwnedFd>,
        single: Option<OwnedFd>,
    ) -> Result<(), ProtocolError> {
        fds.extend(single);
        let mapped = regions
            .iter()
            .zip(&fds)
            .map(|(r, fd)| map_region(r, fd))
            .collect::<Result<Vec<_>, _>>()?;
        let memory = GuestMemory::new(mapped).map_err(invalid)?;
        self.state.regions = regions.iter().map(region_state).collect();
        self.fds.regions = fds;
        self.apply_memory(memory).await
    }

    pub(super) async fn add_region(
        &mut self,
        region: &MemoryRegion,
        fd: Option<OwnedFd>,
    ) -> Result<(), ProtocolError> {
        let Some(fd) = fd else { return Ok(()) };
        if self.state.regions.len() as u64 >= MAX_MEM_SLOTS {
            return Err(invalid(format_args!(
                "more than {MAX_MEM_SLOTS} memory regions"
            )));
        }
        let memory = self
            .memory
            .with(map_region(region, &fd)?)
            .map_err(invalid)?;
        self.state.regions.push(region_state(region));
        self.fds.regions.push(fd);
        self.apply_memory(memory).await
    }

    pub(super) async fn remove_region(
        &mut self,
        region: &MemoryRegion,
    ) -> Result<(), ProtocolError> {
        let memory = self
            .memory
            .without(region.guest_addr, region.size)
            .map_err(invalid)?;
        let same = |r: &RegionState| (r.guest_addr, r.size) == (region.guest_addr, region.size);
        if let Some(at) = self.state.regions.iter().position(same) {
            self.state.regions.remove(at);
            self.fds.regions.remove(at);
        }
        self.apply_memory(memory).await
    }

    pub(super) async fn apply_memory(&mut self, memory: GuestMemory) -> Result<(), ProtocolError> {
        // The registration goes before the memory that it names.
        self.release_fixed().await;
        self.memory = Arc::new(memory);
        self.register_fixed().await;
        let mut result = Ok(());
        for i in 0..self.queues.len() {
            let memory = self.memory.clone();
            if let Some(Err(e)) = self.with_queue(i, move |q| q.set_memory(&memory)).await {
                result = Err(invalid(e));
            }
        }
        result
    }

    pub(super) async fn register_fixed(&mut self) {
        if !self.shared.fixed_buffers || self.memory.regions().is_empty() {
            return;
        }
        let mut threads: Vec<IoThread> = Vec::new();
        for t in &self.shared.threads {
            if !threads.iter().any(|seen| seen.is_same(t)) {
                threads.push(t.clone());
            }
        }
        for thread in threads {
            let memory = self.memory.clone();
            let kept = thread
                .run(move |r| {
                    let ranges: Vec<(*mut u8, usize)> = memory
                        .regions()
                        .iter()
                        .map(|m| (m.host_ptr(), m.len as usize))
                        .collect();
                    // SAFETY: the registration is released (`release_fixed`) before the connection
                    // lets go of this memory table, and the queues hold it while requests run.
                    let fixed = unsafe { r.register_buffers(&ranges) };
                    fixed.map(|f| r.keep(std::rc::Rc::new(f)))
                })
                .await;
            match kept {
                Ok(Some(kept)) => self.fixed.push((thread, kept)),
                _ => tracing::warn!(
                    export = self.shared.id(),
                    iothread = thread.name(),
                    "guest memory cannot be registered (see RLIMIT_MEMLOCK); going on without"
                ),
            }
        }
    }

    pub(super) async fn release_fixed(&mut self) {
        for (thread, kept) in self.fixed.drain(..) {
            let _ = thread.run(move |r| drop(r.take_kept(kept))).await;
        }
    }

    pub(super) async fn set_log(
        &mut self,
        size: u64,
        offset: u64,
        fd: Option<OwnedFd>,
    ) -> Result<(), ProtocolError> {
        let Some(fd) = fd else { return Ok(()) };
        let log = DirtyLog::map(fd.as_fd(), size, offset)
            .map_err(|e| invalid(format_args!("dirty log of {size} bytes at {offset}: {e}")))?;
        self.log = Some(Arc::new(log));
        self.state.log = Some(LogState { size, offset });
        self.fds.log = Some(fd);
        self.apply_logging().await;
        Ok(())
    }

    pub(super) fn logging(&self, i: usize) -> Option<Logging> {
        if self.state.features & F_LOG_ALL == 0 {
            return None;
        }
        self.log.as_ref().map(|log| Logging {
            log: log.clone(),
            used_addr: self.state.vrings[i].log_addr,
        })
    }

    pub(super) async fn apply_logging(&mut self) {
        for i in 0..self.queues.len() {
            let logging = self.logging(i);
            self.with_queue(i, move |q| q.set_logging(logging)).await;
        }
    }
}

fn map_region(r: &MemoryRegion, fd: &OwnedFd) -> Result<GuestRegion, ProtocolError> {
    GuestRegion::map(fd.as_fd(), r.guest_addr, r.size, r.user_addr, r.mmap_offset).map_err(invalid)
}

fn region_state(r: &MemoryRegion) -> RegionState {
    RegionState {
        guest_addr: r.guest_addr,
        size: r.size,
        user_addr: r.user_addr,
        mmap_offset: r.mmap_offset,
    }
}
