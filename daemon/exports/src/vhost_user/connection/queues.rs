//! Virtqueues, and the area in which their requests in flight stand.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use vdisk_api::MAX_QUEUE_SIZE;
use vdisk_virtio::RingAddresses;

use super::{Connection, Reply, Running, clone_fd, invalid};
use crate::vhost_user::message::{
    F_PROTOCOL_FEATURES, InflightDesc, ProtocolError, VRING_F_LOG, VringAddr,
};
use crate::vhost_user::state::InflightState;
use crate::virtio_blk::{InflightLayout, InflightQueue, InflightRegion, Queue, QueueSetup};

impl Connection<'_> {
    pub(super) fn get_inflight(
        &mut self,
        desc: &InflightDesc,
        payload_len: usize,
    ) -> Result<Reply, ProtocolError> {
        // Guests (firmware above all) can make their queues longer than the front-end thinks.
        let size = desc.queue_size.max(MAX_QUEUE_SIZE);
        let layout = InflightLayout::new(desc.num_queues, size).map_err(invalid)?;
        if usize::from(desc.num_queues) > self.queues.len() || desc.queue_size > MAX_QUEUE_SIZE {
            return Err(invalid(format_args!(
                "inflight area for {} queues of {} entries: there are {} queues of at most {MAX_QUEUE_SIZE}",
                desc.num_queues,
                desc.queue_size,
                self.queues.len()
            )));
        }
        let (region, fd) = InflightRegion::create(layout).map_err(invalid)?;
        region.set_write_cache(self.state.write_cache);
        let state = InflightState {
            mmap_size: layout.bytes(),
            mmap_offset: 0,
            num_queues: desc.num_queues,
            queue_size: size,
        };
        let mut reply = Vec::new();
        reply.extend(state.mmap_size.to_ne_bytes());
        reply.extend(state.mmap_offset.to_ne_bytes());
        reply.extend(state.num_queues.to_ne_bytes());
        reply.extend(state.queue_size.to_ne_bytes());
        // Front-ends differ in how they pad the structure, and expect their own size back.
        reply.resize(payload_len.max(reply.len()), 0);
        self.inflight = Some(Arc::new(region));
        self.state.inflight = Some(state);
        let for_frontend = fd.try_clone()?;
        self.fds.inflight = Some(fd);
        Ok(Reply::Payload(reply, Some(for_frontend)))
    }

    pub(super) fn set_inflight(
        &mut self,
        desc: &InflightDesc,
        fd: Option<OwnedFd>,
    ) -> Result<(), ProtocolError> {
        let Some(fd) = fd else { return Ok(()) };
        let layout = InflightLayout::new(desc.num_queues, desc.queue_size).map_err(invalid)?;
        let region = InflightRegion::map(fd.as_fd(), layout, desc.mmap_size, desc.mmap_offset)
            .map_err(invalid)?;
        if let Some(on) = region.write_cache() {
            self.state.write_cache = on;
            self.apply_cache();
            if !on {
                tracing::info!(
                    export = self.shared.id(),
                    "the write cache is off, as the last daemon noted"
                );
            }
        }
        self.state.inflight = Some(InflightState {
            mmap_size: desc.mmap_size,
            mmap_offset: desc.mmap_offset,
            num_queues: desc.num_queues,
            queue_size: region.layout().queue_size,
        });
        self.inflight = Some(Arc::new(region));
        self.fds.inflight = Some(fd);
        Ok(())
    }

    pub(super) async fn set_addresses(
        &mut self,
        code: u32,
        addr: &VringAddr,
    ) -> Result<(), ProtocolError> {
        let i = self.index(code, addr.index)?;
        let RingAddresses { desc, avail, used } = addr.addresses;
        let v = &mut self.state.vrings[i];
        let moved = v.has_addresses && (v.desc, v.avail, v.used) != (desc, avail, used);
        if moved && self.queues[i].is_some() {
            return Err(invalid(format_args!(
                "SET_VRING_ADDR moves queue {i} while it runs"
            )));
        }
        (v.desc, v.avail, v.used) = (desc, avail, used);
        v.has_addresses = true;
        v.log_addr = (addr.flags & VRING_F_LOG != 0).then_some(addr.log);
        let logging = self.logging(i);
        self.with_queue(i, move |q| q.set_logging(logging)).await;
        Ok(())
    }

    pub(super) async fn set_kick(
        &mut self,
        code: u32,
        index: u32,
        fd: Option<OwnedFd>,
    ) -> Result<(), ProtocolError> {
        let i = self.index(code, index)?;
        let Some(fd) = fd else {
            return Err(invalid(format_args!(
                "queue {index} has no kick descriptor: polling without one is not supported"
            )));
        };
        check_eventfd(&fd)?;
        if self.queues[i].is_some() {
            let given = fd.try_clone()?;
            self.with_queue(i, move |q| q.set_kick(Some(given))).await;
        }
        self.fds.vrings[i].kick = Some(fd);
        // Without protocol features there is no enable message: rings are enabled from the start.
        if self.state.features & F_PROTOCOL_FEATURES == 0 {
            self.state.vrings[i].enabled = true;
        }
        self.start_queue(i).await
    }

    /// Notes what is in flight for a process that may follow, if the front-end does not have that done.
    pub(super) fn note_inflight(&mut self) -> Result<(), ProtocolError> {
        if self.shared.keeper.is_none() || self.inflight.is_some() {
            return Ok(());
        }
        self.make_inflight()
    }

    /// Makes an area that the front-end does not know.
    pub(super) fn make_inflight(&mut self) -> Result<(), ProtocolError> {
        let (num_queues, queue_size) = (self.queues.len() as u16, MAX_QUEUE_SIZE);
        let layout = InflightLayout::new(num_queues, queue_size).map_err(invalid)?;
        let (region, fd) = InflightRegion::create(layout).map_err(invalid)?;
        region.set_write_cache(self.state.write_cache);
        self.state.inflight = Some(InflightState {
            mmap_size: layout.bytes(),
            mmap_offset: 0,
            num_queues,
            queue_size,
        });
        self.inflight = Some(Arc::new(region));
        self.fds.inflight = Some(fd);
        Ok(())
    }

    /// Starts a queue once everything it needs is there.
    pub(super) async fn start_queue(&mut self, i: usize) -> Result<(), ProtocolError> {
        let v = &self.state.vrings[i];
        if self.queues[i].is_some() || !v.enabled || self.fds.vrings[i].kick.is_none() {
            return Ok(());
        }
        if !v.has_addresses || v.size == 0 {
            return Err(invalid(format_args!(
                "queue {i} is started without its addresses and size"
            )));
        }
        // Nobody lets go of the image from before it is looked whether it is open.
        self.shared.running.fetch_add(1, Ordering::Relaxed);
        let started = self.start_queue_now(i).await;
        if started.is_err() {
            self.shared.running.fetch_sub(1, Ordering::Relaxed);
        }
        started
    }

    pub(super) async fn start_queue_now(&mut self, i: usize) -> Result<(), ProtocolError> {
        self.open_image().await?;
        self.note_inflight()?;
        let v = &self.state.vrings[i];
        let too_long = |r: &Arc<InflightRegion>| v.size > r.layout().queue_size;
        if self.inflight.as_ref().is_some_and(too_long) && self.queues.iter().all(Option::is_none) {
            tracing::warn!(
                export = self.shared.id(),
                queue = i,
                entries = v.size,
                "the front-end's inflight area has no room for so long a queue: what is in flight is noted elsewhere, and is lost if the front-end has to connect again"
            );
            self.make_inflight()?;
        }
        let v = &self.state.vrings[i];
        let inflight = match &self.inflight {
            Some(region) => {
                let queue = InflightQueue::new(region, i as u16, v.size);
                Some(queue.map_err(invalid)?)
            }
            None => None,
        };
        let d = &self.fds.vrings[i];
        let setup = QueueSetup {
            index: i as u16,
            device: self.shared.device.clone(),
            stats: self.shared.stats[i].clone(),
            memory: self.memory.clone(),
            addresses: RingAddresses {
                desc: v.desc,
                avail: v.avail,
                used: v.used,
            },
            size: v.size,
            next_avail: v.next_avail,
            features: self.state.features,
            kick: clone_fd(&d.kick)?,
            call: clone_fd(&d.call)?,
            err: clone_fd(&d.err)?,
            inflight,
            logging: self.logging(i),
        };
        let thread = self.shared.threads[i].clone();
        let there = thread.clone();
        let started = thread
            .run(move |r| Queue::start(&there, r, setup).map(|q| r.keep(q)))
            .await;
        match started {
            Ok(Ok(queue)) => {
                tracing::debug!(
                    export = self.shared.id(),
                    queue = i,
                    iothread = thread.name(),
                    "queue started"
                );
                self.queues[i] = Some(Running { thread, queue });
                Ok(())
            }
            Ok(Err(e)) => Err(invalid(format_args!("queue {i}: {e}"))),
            Err(e) => Err(invalid(format_args!("queue {i}: {e}"))),
        }
    }

    /// Stops a queue when its requests are answered, and notes where it stood.
    pub(super) async fn stop_queue(&mut self, i: usize) {
        let Some(running) = self.queues[i].take() else {
            return;
        };
        let queue = running.queue;
        let stopped = running
            .thread
            .run_async(move |r| async move {
                match r.take_kept(queue) {
                    Some(q) => Some(q.stop().await),
                    None => None,
                }
            })
            .await;
        self.shared.running.fetch_sub(1, Ordering::Relaxed);
        if let Ok(Some(next_avail)) = stopped {
            self.state.vrings[i].next_avail = next_avail;
        }
        tracing::debug!(export = self.shared.id(), queue = i, "queue stopped");
    }

    /// Runs `f` with a queue on its I/O thread, if it runs.
    pub(super) async fn with_queue<R: Send + 'static>(
        &self,
        i: usize,
        f: impl FnOnce(&Queue) -> R + Send + 'static,
    ) -> Option<R> {
        let running = self.queues[i].as_ref()?;
        let queue = running.queue;
        running
            .thread
            .run(move |r| r.kept(queue).map(|q| f(&q)))
            .await
            .ok()
            .flatten()
    }
}

/// Interrupts are written on the I/O thread: only to an eventfd, and without waiting.
pub(super) fn check_call(fd: &Option<OwnedFd>) -> Result<(), ProtocolError> {
    let Some(fd) = fd else { return Ok(()) };
    check_eventfd(fd)?;
    let flags = rustix::fs::fcntl_getfl(fd).map_err(std::io::Error::from)?;
    rustix::fs::fcntl_setfl(fd, flags | rustix::fs::OFlags::NONBLOCK)
        .map_err(std::io::Error::from)?;
    Ok(())
}

fn check_eventfd(fd: &OwnedFd) -> Result<(), ProtocolError> {
    let link = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))?;
    if link.as_os_str() != "anon_inode:[eventfd]" {
        return Err(invalid(format_args!(
            "a kick, call or err descriptor is '{}', not an eventfd",
            link.display()
        )));
    }
    Ok(())
}

/// Whether an eventfd has been written to.
pub(super) fn is_set(event: &OwnedFd) -> std::io::Result<bool> {
    let mut fds = [rustix::event::PollFd::new(
        event,
        rustix::event::PollFlags::IN,
    )];
    let now = rustix::event::Timespec::default();
    Ok(rustix::event::poll(&mut fds, Some(&now))? > 0)
}
