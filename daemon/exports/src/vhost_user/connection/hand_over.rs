//! What of a connection outlives the process, and what goes to another host.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use vdisk_api::{Error, ErrorKind};
use vdisk_virtio::{DirtyLog, GuestMemory, GuestRegion};

use super::{Connection, invalid, is_set};
use crate::keeper::connection_name;
use crate::vhost_user::export::LET_GO_PAUSE;
use crate::vhost_user::message::{F_LOG_ALL, ProtocolError};
use crate::vhost_user::parcel;
use crate::vhost_user::state::{Descriptors, State};
use crate::virtio_blk::{InflightLayout, InflightRegion};

/// How long a guest that has come from another host may wait for that to let go of the image before its front-end has to connect
/// again (which it does for as long as it takes).
const HAND_OVER: Duration = Duration::from_secs(10);
const HAND_OVER_PAUSE: Duration = Duration::from_millis(100);

impl Connection<'_> {
    /// Goes on where an earlier process ended.
    pub(super) async fn resume(
        &mut self,
        state: State,
        fds: Descriptors,
    ) -> Result<(), ProtocolError> {
        let complete = state.vrings.len() == self.queues.len()
            && fds.vrings.len() == self.queues.len()
            && fds.regions.len() == state.regions.len();
        if !complete {
            return Err(invalid("what was kept of it does not fit the export"));
        }
        // The last daemon may have ended before it had let go of the image.
        let stopped = fds.vrings.iter().all(|v| v.kick.is_none());
        let moves = stopped && state.features & F_LOG_ALL != 0;
        let owed = moves && self.shared.device.backend.node().is_active();
        self.shared.owed.store(owed, Ordering::Relaxed);
        if let Some(mark) = &fds.mark {
            if is_set(mark)? {
                return Err(invalid(
                    "the last daemon ended while it answered a message: the front-end has to connect again",
                ));
            }
            self.channel.mark_messages(Some(mark.try_clone()?))?;
        }
        let regions = state.regions.iter().zip(&fds.regions);
        let regions = regions.map(|(r, fd)| {
            GuestRegion::map(fd.as_fd(), r.guest_addr, r.size, r.user_addr, r.mmap_offset)
        });
        let regions = regions.collect::<Result<Vec<_>, _>>().map_err(invalid)?;
        let memory = GuestMemory::new(regions).map_err(invalid)?;
        if let (Some(l), Some(fd)) = (&state.log, &fds.log) {
            let log = DirtyLog::map(fd.as_fd(), l.size, l.offset).map_err(invalid)?;
            self.log = Some(Arc::new(log));
        }
        if let (Some(i), Some(fd)) = (&state.inflight, &fds.inflight) {
            let layout = InflightLayout::new(i.num_queues, i.queue_size).map_err(invalid)?;
            let region = InflightRegion::map(fd.as_fd(), layout, i.mmap_size, i.mmap_offset);
            self.inflight = Some(Arc::new(region.map_err(invalid)?));
        }
        self.state = state;
        self.fds = fds;
        self.apply_cache();
        self.apply_memory(memory).await?;
        for i in 0..self.queues.len() {
            self.start_queue(i).await?;
        }
        tracing::info!(export = self.shared.id(), "front-end taken over");
        Ok(())
    }

    /// Leaves the connection, as it is now, to a process that may follow, once a queue has run: before that little is lost with it.
    pub(super) fn keep(&mut self) {
        if self.kept || self.queues.iter().any(Option::is_some) {
            self.keep_as_it_is();
        }
    }

    /// The same, wherever the front-end is: one that sets its device up may not be one that connects again.
    pub(super) fn keep_as_it_is(&mut self) {
        let Some(keeper) = &self.shared.keeper else {
            return;
        };
        if self.fds.mark.is_none() {
            let mark = self.channel.mark_messages(None);
            match mark.and_then(|m| m.try_clone()) {
                Ok(mark) => self.fds.mark = Some(mark),
                Err(error) => {
                    tracing::warn!(export = self.shared.id(), %error, "messages cannot be marked")
                }
            }
        }
        self.shared.pace.count(Instant::now());
        let (old, new) = self.shared.next_generation();
        let kept = parcel::pack(&self.state, &self.fds, self.channel.as_fd()).and_then(|parcel| {
            keeper.keep(&connection_name(self.shared.id(), new), parcel.as_fd())
        });
        match kept {
            Ok(()) => self.kept = true,
            Err(error) => tracing::warn!(
                export = self.shared.id(),
                %error,
                "the connection cannot be kept for a restart: the front-end will have to connect again"
            ),
        }
        keeper.forget(&connection_name(self.shared.id(), old));
    }

    pub(super) fn forget(&mut self) {
        if let (Some(keeper), true) = (&self.shared.keeper, self.kept) {
            let generation = self.shared.generation();
            keeper.forget(&connection_name(self.shared.id(), generation));
        }
        self.kept = false;
    }

    /// Lets go of the image before the front-end hears that its last queue has stopped. Where no lock keeps the other host from
    /// opening it too soon, it does not hear that before.
    pub(super) async fn let_go(&mut self) {
        let node = self.shared.device.backend.node();
        let is_locked = node.is_locked_for_other_hosts();
        loop {
            let done = self.shared.let_go(&mut self.signals).await;
            // Of a front-end that has gone the export sees to that, whoever comes next.
            if done || is_locked || self.signals.borrow().stop || self.channel.is_gone() {
                return;
            }
            let _ = tokio::time::timeout(LET_GO_PAUSE, self.signals.wait_for(|s| s.stop)).await;
        }
    }

    /// Has the image opened, as soon as whoever has it lets go of it.
    pub(super) async fn open_image(&mut self) -> Result<(), ProtocolError> {
        self.shared.owed.store(false, Ordering::Relaxed);
        let since = Instant::now();
        while !self.shared.has_image() {
            let opened = tokio::select! {
                opened = self.shared.set_active(true) => opened,
                _ = self.signals.wait_for(|s| s.stop) => Err(Error::failed("the export ends")),
            };
            if self.channel.is_gone() {
                // Whoever has the guest now has the image as well.
                self.shared.owed.store(opened.is_ok(), Ordering::Relaxed);
                return Err(ProtocolError::Gone);
            }
            match opened {
                Ok(_) => tracing::info!(
                    export = self.shared.id(),
                    "the guest goes on here, and the image is open"
                ),
                Err(error) if error.kind == ErrorKind::InUse && since.elapsed() < HAND_OVER => {
                    tracing::warn!(export = self.shared.id(), %error, "the guest has to wait");
                    tokio::time::sleep(HAND_OVER_PAUSE).await;
                }
                Err(error) => return Err(ProtocolError::NotReady(error)),
            }
        }
        Ok(())
    }
}
