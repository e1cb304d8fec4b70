//! One front-end, from connect to close.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tokio::net::UnixStream;
use tokio::sync::watch;
use vdisk_io::{FixedBuffers, IoThread, Kept};
use vdisk_virtio::blk::{CONFIG_SIZE, WRITEBACK_OFFSET};
use vdisk_virtio::{DirtyLog, GuestMemory, GuestRegion, RingAddresses};

use super::channel::{Channel, transmit};
use super::export::{LET_GO_PAUSE, Shared, Signals};
use super::message::{
    self, F_LOG_ALL, F_PROTOCOL_FEATURES, Header, InflightDesc, MAX_MEM_SLOTS, MemoryRegion,
    ProtocolError, Request, VRING_F_LOG, VringAddr, protocol,
};
use super::parcel;
use super::state::{Descriptors, InflightState, LogState, RegionState, State};
use crate::keeper::connection_name;
use crate::virtio_blk::{
    InflightLayout, InflightQueue, InflightRegion, Logging, Queue, QueueSetup,
};
use vdisk_api::{Error, ErrorKind, MAX_QUEUE_SIZE};

/// How long a front-end may take to read a reply.
const SEND_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a guest that has come from another host may wait for that to let go of the image before its front-end has to connect
/// again (which it does for as long as it takes).
const HAND_OVER: Duration = Duration::from_secs(10);
const HAND_OVER_PAUSE: Duration = Duration::from_millis(100);

/// A queue that runs on its I/O thread.
struct Running {
    thread: IoThread,
    queue: Kept<Queue>,
}

pub(super) struct Connection<'a> {
    shared: &'a Shared,
    channel: &'a Channel,
    state: State,
    fds: Descriptors,
    memory: Arc<GuestMemory>,
    log: Option<Arc<DirtyLog>>,
    inflight: Option<Arc<InflightRegion>>,
    queues: Vec<Option<Running>>,
    fixed: Vec<(IoThread, Kept<FixedBuffers>)>,
    /// The keeper has it.
    kept: bool,
    signals: watch::Receiver<Signals>,
}

enum Reply {
    /// Only an acknowledgement, if one is asked for.
    None,
    Payload(Vec<u8>, Option<OwnedFd>),
}

impl Reply {
    fn u64(value: u64) -> Reply {
        Reply::Payload(value.to_ne_bytes().to_vec(), None)
    }
}

fn invalid(message: impl std::fmt::Display) -> ProtocolError {
    ProtocolError::Invalid(message.to_string())
}

impl Connection<'_> {
    /// Serves a front-end until it leaves, breaks the protocol, or the export stops. When this returns
    /// nothing of it is left: all requests are answered and its memory is unmapped.
    ///
    /// `left` is what an earlier process had negotiated on the connection. An export that is suspended leaves it to the next.
    pub async fn run(
        shared: &Shared,
        stream: UnixStream,
        left: Option<(State, Descriptors)>,
        signals: &mut watch::Receiver<Signals>,
    ) -> Result<(), ProtocolError> {
        let channel = Channel::new(stream);
        let num_queues = shared.threads.len() as u16;
        let mut this = Connection {
            shared,
            channel: &channel,
            state: State::new(num_queues, !shared.device.options.writethrough),
            fds: Descriptors::new(num_queues),
            memory: Arc::default(),
            log: None,
            inflight: None,
            queues: (0..num_queues).map(|_| None).collect(),
            fixed: Vec::new(),
            kept: left.is_some(),
            signals: signals.clone(),
        };
        this.apply_cache();
        let resumed = match left {
            Some((state, fds)) => this.resume(state, fds).await,
            None => Ok(()),
        };
        let result = match resumed {
            Ok(()) => this.serve(signals).await,
            Err(e) => Err(e),
        };
        for index in 0..this.queues.len() {
            this.stop_queue(index).await;
        }
        this.release_fixed().await;
        let suspended = result.is_ok() && signals.borrow().suspend;
        match suspended && this.kept {
            // With where the queues stand now.
            true => this.keep(),
            false => this.forget(),
        }
        result
    }

    /// Goes on where an earlier process ended.
    async fn resume(&mut self, state: State, fds: Descriptors) -> Result<(), ProtocolError> {
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
            self.channel.mark_messages(Some(mark.try_clone()?), false)?;
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
            // The guest may wait for an answer that was given, and not announced.
            let call = clone_fd(&self.fds.vrings[i].call)?;
            self.with_queue(i, move |q| q.set_call(call)).await;
        }
        tracing::info!(export = self.shared.id(), "front-end taken over");
        Ok(())
    }

    /// Leaves the connection, as it is now, to a process that may follow.
    fn keep(&mut self) {
        let Some(keeper) = &self.shared.keeper else {
            return;
        };
        // Before that nothing is lost with it.
        if !self.kept && self.queues.iter().all(Option::is_none) {
            return;
        }
        if self.fds.mark.is_none() {
            // A message is what has made this necessary.
            let mark = self.channel.mark_messages(None, true);
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

    fn forget(&mut self) {
        if let (Some(keeper), true) = (&self.shared.keeper, self.kept) {
            let generation = self.shared.generation();
            keeper.forget(&connection_name(self.shared.id(), generation));
        }
        self.kept = false;
    }

    async fn serve(&mut self, signals: &mut watch::Receiver<Signals>) -> Result<(), ProtocolError> {
        let channel = self.channel;
        // What was said before we listened.
        if signals.borrow().stop {
            return Ok(());
        }
        loop {
            let wait = self.shared.pace.wait(Instant::now());
            // Kept across signals: a message that is half read must not be lost.
            let mut next = std::pin::pin!(async {
                if !wait.is_zero() {
                    tokio::time::sleep(wait).await;
                }
                channel.receive().await
            });
            let message = loop {
                tokio::select! {
                    message = &mut next => break message?,
                    () = tokio::time::sleep(LET_GO_PAUSE), if self.shared.owed.load(Ordering::Relaxed) => {
                        self.shared.let_go(&mut self.signals).await;
                    }
                    changed = signals.changed() => {
                        let now = *signals.borrow_and_update();
                        if now.stop || changed.is_err() {
                            return Ok(());
                        }
                        self.send_config_change();
                    }
                }
            };
            let Some((header, payload, fds)) = message else {
                return Ok(());
            };
            self.answer(&header, &payload, fds).await?;
            self.channel.answered();
        }
    }

    async fn answer(
        &mut self,
        header: &Header,
        payload: &[u8],
        fds: Vec<OwnedFd>,
    ) -> Result<(), ProtocolError> {
        let acks = header.needs_reply() && self.state.protocol_features & protocol::REPLY_ACK != 0;
        let result = match Request::parse(header.request, payload) {
            Ok(request) => {
                let only_asks = request.only_asks();
                let result = self
                    .handle(request, payload.len(), fds, header.request)
                    .await;
                if !only_asks {
                    self.keep();
                }
                result
            }
            Err(e) => Err(e),
        };
        let (payload, fd) = match result {
            Ok(Reply::Payload(payload, fd)) => (payload, fd),
            Ok(Reply::None) if acks => (0u64.to_ne_bytes().to_vec(), None),
            Ok(Reply::None) => return Ok(()),
            Err(ProtocolError::Invalid(error)) if acks => {
                tracing::error!(
                    export = self.shared.id(),
                    error,
                    "a front-end's request failed"
                );
                (1u64.to_ne_bytes().to_vec(), None)
            }
            Err(e) => return Err(e),
        };
        let bytes = message::encode(header.request, true, &payload);
        // A front-end that does not read must not be waited for: it would hold up the export's end.
        let send = self.channel.send(&bytes, fd.as_ref().map(|fd| fd.as_fd()));
        match tokio::time::timeout(SEND_TIMEOUT, send).await {
            Ok(sent) => Ok(sent?),
            Err(_) => Err(ProtocolError::Stuck),
        }
    }

    async fn handle(
        &mut self,
        request: Request,
        payload_len: usize,
        mut fds: Vec<OwnedFd>,
        code: u32,
    ) -> Result<Reply, ProtocolError> {
        if let Some(want) = request.fds()
            && fds.len() != want
        {
            return Err(ProtocolError::Fds {
                request: code,
                have: fds.len(),
                want,
            });
        }
        let fd = if fds.len() == 1 { fds.pop() } else { None };
        match request {
            Request::GetFeatures => return Ok(Reply::u64(self.offered_features())),
            Request::SetFeatures(features) => self.set_features(features).await?,
            Request::SetOwner | Request::SetLogFd => {}
            Request::ResetOwner | Request::ResetDevice => self.reset().await,
            Request::SetMemTable(regions) => self.set_mem_table(&regions, fds, fd).await?,
            Request::AddMemReg(region) => self.add_region(&region, fd).await?,
            Request::RemMemReg(region) => self.remove_region(&region).await?,
            Request::GetMaxMemSlots => return Ok(Reply::u64(MAX_MEM_SLOTS)),
            Request::SetLogBase { size, offset } => {
                self.set_log(size, offset, fd).await?;
                return Ok(Reply::u64(0));
            }
            Request::SetVringNum { index, num } => {
                let i = self.index(code, index)?;
                self.must_be_stopped(i, "SET_VRING_NUM")?;
                let ok = num.is_power_of_two() && num <= u32::from(MAX_QUEUE_SIZE);
                if !ok {
                    return Err(invalid(format_args!(
                        "queue {index} has {num} entries: at most {MAX_QUEUE_SIZE}, a power of two, are possible"
                    )));
                }
                self.state.vrings[i].size = num as u16;
            }
            Request::SetVringAddr(addr) => self.set_addresses(code, &addr).await?,
            Request::SetVringBase { index, base } => {
                let i = self.index(code, index)?;
                self.must_be_stopped(i, "SET_VRING_BASE")?;
                self.state.vrings[i].next_avail = base as u16;
            }
            Request::GetVringBase { index } => {
                let i = self.index(code, index)?;
                self.stop_queue(i).await;
                // It may have been disabled before.
                let was_set_up = self.fds.vrings[i].kick.take().is_some();
                self.fds.vrings[i].call = None;
                let is_last = was_set_up && self.fds.vrings.iter().all(|v| v.kick.is_none());
                if is_last && self.state.features & F_LOG_ALL != 0 {
                    // The next process lets go of it if this one does not come to it.
                    self.keep();
                    self.let_go().await;
                }
                let mut reply = index.to_ne_bytes().to_vec();
                reply.extend(u32::from(self.state.vrings[i].next_avail).to_ne_bytes());
                return Ok(Reply::Payload(reply, None));
            }
            Request::SetVringKick { index, .. } => self.set_kick(code, index, fd).await?,
            Request::SetVringCall { index, .. } => {
                let i = self.index(code, index)?;
                check_eventfd(&fd)?;
                let given = clone_fd(&fd)?;
                self.fds.vrings[i].call = fd;
                self.with_queue(i, move |q| q.set_call(given)).await;
            }
            Request::SetVringErr { index, .. } => {
                let i = self.index(code, index)?;
                check_eventfd(&fd)?;
                let given = clone_fd(&fd)?;
                self.fds.vrings[i].err = fd;
                self.with_queue(i, move |q| q.set_err(given)).await;
            }
            Request::GetProtocolFeatures => return Ok(Reply::u64(protocol::OFFERED)),
            Request::SetProtocolFeatures(features) => {
                let unknown = features & !protocol::OFFERED;
                if unknown != 0 {
                    return Err(invalid(format_args!(
                        "protocol features {unknown:#x} were not offered"
                    )));
                }
                self.state.protocol_features = features;
            }
            Request::GetQueueNum => return Ok(Reply::u64(self.queues.len() as u64)),
            Request::SetVringEnable { index, enable } => {
                let i = self.index(code, index)?;
                self.state.vrings[i].enabled = enable;
                if enable {
                    self.start_queue(i).await?;
                } else {
                    self.stop_queue(i).await;
                }
            }
            Request::SetBackendReqFd => self.fds.backend = fd,
            Request::GetConfig {
                offset,
                size,
                flags,
            } => return self.get_config(offset, size, flags),
            Request::SetConfig { offset, data } => self.set_config(offset, &data)?,
            Request::GetInflightFd(desc) => return self.get_inflight(&desc, payload_len),
            Request::SetInflightFd(desc) => self.set_inflight(&desc, fd)?,
        }
        Ok(Reply::None)
    }

    fn index(&self, request: u32, index: u32) -> Result<usize, ProtocolError> {
        if (index as usize) < self.queues.len() {
            return Ok(index as usize);
        }
        Err(ProtocolError::Queue {
            request,
            queue: index,
            count: self.queues.len() as u16,
        })
    }

    fn must_be_stopped(&self, i: usize, request: &str) -> Result<(), ProtocolError> {
        if self.queues[i].is_some() {
            return Err(invalid(format_args!("{request} while queue {i} runs")));
        }
        Ok(())
    }

    // Features and configuration.

    fn offered_features(&self) -> u64 {
        self.shared.device.features() | F_LOG_ALL | F_PROTOCOL_FEATURES
    }

    async fn set_features(&mut self, features: u64) -> Result<(), ProtocolError> {
        let unknown = features & !self.offered_features();
        if unknown != 0 {
            return Err(invalid(format_args!(
                "features {unknown:#x} were not offered"
            )));
        }
        let changed = self.state.features ^ features;
        self.state.features = features;
        self.apply_cache();
        if changed & F_LOG_ALL != 0 {
            self.apply_logging().await;
        }
        if changed & !F_LOG_ALL != 0 {
            for i in 0..self.queues.len() {
                self.with_queue(i, move |q| q.set_features(features)).await;
            }
        }
        Ok(())
    }

    fn apply_cache(&self) {
        self.shared
            .device
            .set_cache(self.state.write_cache, self.state.features);
    }

    fn get_config(&self, offset: u32, size: u32, flags: u32) -> Result<Reply, ProtocolError> {
        let (at, len) = (offset as usize, size as usize);
        let mut space = [0u8; 256];
        space[..CONFIG_SIZE].copy_from_slice(&self.shared.device.config().to_bytes());
        let part = at
            .checked_add(len)
            .and_then(|end| space.get(at..end))
            .ok_or_else(|| invalid(format_args!("GET_CONFIG of {len} bytes at {at}")))?;
        let mut reply = Vec::with_capacity(12 + len);
        for word in [offset, size, flags] {
            reply.extend(word.to_ne_bytes());
        }
        reply.extend(part);
        Ok(Reply::Payload(reply, None))
    }

    fn set_config(&mut self, offset: u32, data: &[u8]) -> Result<(), ProtocolError> {
        // Only one byte is writable; a longer write must leave the others as they are.
        let config = self.shared.device.config().to_bytes();
        let mut cache = None;
        for (i, &byte) in data.iter().enumerate() {
            let at = offset as usize + i;
            if at == WRITEBACK_OFFSET && byte <= 1 {
                cache = Some(byte == 1);
            } else if config.get(at) != Some(&byte) {
                return Err(invalid(format_args!(
                    "SET_CONFIG of byte {at} to {byte}: only 'writeback' can be written, with 0 or 1"
                )));
            }
        }
        if let Some(on) = cache {
            self.state.write_cache = on;
            if let Some(inflight) = &self.inflight {
                inflight.set_write_cache(on);
            }
            self.apply_cache();
            tracing::info!(
                export = self.shared.id(),
                write_cache = on,
                "guest set the write cache"
            );
        }
        Ok(())
    }

    /// Tells the front-end to read the configuration again, if it wants to be told.
    fn send_config_change(&self) {
        let wanted = protocol::BACKEND_REQ | protocol::CONFIG;
        if self.state.protocol_features & wanted != wanted {
            return;
        }
        if let Some(fd) = &self.fds.backend {
            // Small enough for any socket buffer; a front-end that does not read is not waited for.
            if let Err(error) = transmit(fd.as_fd(), &message::config_change(), None) {
                tracing::warn!(export = self.shared.id(), %error, "cannot announce a configuration change");
            }
        }
    }

    async fn reset(&mut self) {
        for i in 0..self.queues.len() {
            self.stop_queue(i).await;
            self.state.vrings[i].enabled = false;
            self.fds.vrings[i] = Default::default();
        }
        self.state.features = 0;
        self.state.write_cache = !self.shared.device.options.writethrough;
        if let Some(inflight) = &self.inflight {
            inflight.set_write_cache(self.state.write_cache);
        }
        self.apply_cache();
    }

    // Memory.

    async fn set_mem_table(
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

    async fn add_region(
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

    async fn remove_region(&mut self, region: &MemoryRegion) -> Result<(), ProtocolError> {
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

    async fn apply_memory(&mut self, memory: GuestMemory) -> Result<(), ProtocolError> {
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

    async fn register_fixed(&mut self) {
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

    async fn release_fixed(&mut self) {
        for (thread, kept) in self.fixed.drain(..) {
            let _ = thread.run(move |r| drop(r.take_kept(kept))).await;
        }
    }

    // Migration.

    async fn set_log(
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

    /// Lets go of the image before the front-end hears that its last queue has stopped. Where no lock keeps the other host from
    /// opening it too soon, it does not hear that before.
    async fn let_go(&mut self) {
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
    async fn open_image(&mut self) -> Result<(), ProtocolError> {
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

    fn logging(&self, i: usize) -> Option<Logging> {
        if self.state.features & F_LOG_ALL == 0 {
            return None;
        }
        self.log.as_ref().map(|log| Logging {
            log: log.clone(),
            used_addr: self.state.vrings[i].log_addr,
        })
    }

    async fn apply_logging(&mut self) {
        for i in 0..self.queues.len() {
            let logging = self.logging(i);
            self.with_queue(i, move |q| q.set_logging(logging)).await;
        }
    }

    // In-flight requests.

    fn get_inflight(
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

    fn set_inflight(
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

    // Queues.

    async fn set_addresses(&mut self, code: u32, addr: &VringAddr) -> Result<(), ProtocolError> {
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

    async fn set_kick(
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
    fn note_inflight(&mut self) -> Result<(), ProtocolError> {
        if self.shared.keeper.is_none() || self.inflight.is_some() {
            return Ok(());
        }
        self.make_inflight()
    }

    /// Makes an area that the front-end does not know.
    fn make_inflight(&mut self) -> Result<(), ProtocolError> {
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
    async fn start_queue(&mut self, i: usize) -> Result<(), ProtocolError> {
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

    async fn start_queue_now(&mut self, i: usize) -> Result<(), ProtocolError> {
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
    async fn stop_queue(&mut self, i: usize) {
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
    async fn with_queue<R: Send + 'static>(
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
fn check_eventfd(fd: &Option<OwnedFd>) -> Result<(), ProtocolError> {
    let Some(fd) = fd else { return Ok(()) };
    let link = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))?;
    if link.as_os_str() != "anon_inode:[eventfd]" {
        return Err(invalid(format_args!(
            "a call or err descriptor is '{}', not an eventfd",
            link.display()
        )));
    }
    let flags = rustix::fs::fcntl_getfl(fd).map_err(std::io::Error::from)?;
    rustix::fs::fcntl_setfl(fd, flags | rustix::fs::OFlags::NONBLOCK)
        .map_err(std::io::Error::from)?;
    Ok(())
}

/// Whether an eventfd has been written to.
fn is_set(event: &OwnedFd) -> std::io::Result<bool> {
    let mut fds = [rustix::event::PollFd::new(
        event,
        rustix::event::PollFlags::IN,
    )];
    let now = rustix::event::Timespec::default();
    Ok(rustix::event::poll(&mut fds, Some(&now))? > 0)
}

fn clone_fd(fd: &Option<OwnedFd>) -> std::io::Result<Option<OwnedFd>> {
    fd.as_ref().map(OwnedFd::try_clone).transpose()
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
