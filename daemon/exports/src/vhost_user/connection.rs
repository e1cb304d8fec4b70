//! One front-end, from connect to close: what it asks for, and what it is answered.

mod hand_over;
mod memory;
mod queues;

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tokio::net::UnixStream;
use tokio::sync::watch;
use vdisk_io::{FixedBuffers, IoThread, Kept};
use vdisk_virtio::blk::{CONFIG_SIZE, WRITEBACK_OFFSET};
use vdisk_virtio::{DirtyLog, GuestMemory};

use queues::{check_call, is_set};

use super::channel::{Channel, transmit};
use super::export::{LET_GO_PAUSE, Shared, Signals};
use super::message::{
    self, F_LOG_ALL, F_PROTOCOL_FEATURES, Header, MAX_MEM_SLOTS, ProtocolError, Request, protocol,
};
use super::state::{Descriptors, State};
use crate::virtio_blk::{InflightRegion, Queue};
use vdisk_api::MAX_QUEUE_SIZE;

/// How long a front-end may take to read a reply.
const SEND_TIMEOUT: Duration = Duration::from_secs(5);

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
        // What changes from here on the guest is told of.
        let config = signals.borrow().config;
        let resumed = match left {
            Some((state, fds)) => this.resume(state, fds).await,
            None => Ok(()),
        };
        let result = match resumed {
            Ok(()) => this.serve(signals, config).await,
            Err(e) => Err(e),
        };
        for index in 0..this.queues.len() {
            this.stop_queue(index).await;
        }
        this.release_fixed().await;
        let suspended = result.is_ok() && signals.borrow().suspend;
        match suspended {
            // With where the queues stand now.
            true => this.keep_as_it_is(),
            false => this.forget(),
        }
        result
    }

    /// `config`: the change of the configuration that the front-end knows of.
    async fn serve(
        &mut self,
        signals: &mut watch::Receiver<Signals>,
        mut config: u64,
    ) -> Result<(), ProtocolError> {
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
                let is_held = signals.borrow().hold;
                if is_held {
                    self.shared.set_held();
                }
                tokio::select! {
                    message = &mut next, if !is_held => break message?,
                    () = tokio::time::sleep(LET_GO_PAUSE), if self.shared.owed.load(Ordering::Relaxed) => {
                        self.shared.let_go(&mut self.signals).await;
                    }
                    changed = signals.changed() => {
                        let now = *signals.borrow_and_update();
                        if now.stop || changed.is_err() {
                            return Ok(());
                        }
                        if now.config != config {
                            config = now.config;
                            self.send_config_change();
                        }
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
                check_call(&fd)?;
                let given = clone_fd(&fd)?;
                self.fds.vrings[i].call = fd;
                self.with_queue(i, move |q| q.set_call(given)).await;
            }
            Request::SetVringErr { index, .. } => {
                let i = self.index(code, index)?;
                check_call(&fd)?;
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
            Request::SetConfig { offset, data } => self.set_config(offset, &data).await?,
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

    async fn set_config(&mut self, offset: u32, data: &[u8]) -> Result<(), ProtocolError> {
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
            let was_on = std::mem::replace(&mut self.state.write_cache, on);
            if let Some(inflight) = &self.inflight {
                inflight.set_write_cache(on);
            }
            self.apply_cache();
            tracing::info!(
                export = self.shared.id(),
                write_cache = on,
                "guest set the write cache"
            );
            if was_on && !on {
                // It flushes no more, whatever it was told before.
                self.flush().await?;
            }
        }
        Ok(())
    }

    /// Makes durable what the guest was told is written.
    async fn flush(&self) -> Result<(), ProtocolError> {
        let backend = &self.shared.device.backend;
        let _drained = backend.drain().await;
        let node = backend.node();
        let flushed = self.shared.threads[0]
            .run_async(move |_| async move { node.flush().await })
            .await
            .map_err(std::io::Error::other)
            .flatten();
        flushed.map_err(|error| {
            invalid(format_args!(
                "the write cache is off from now on, but what was written before cannot be flushed: {error}"
            ))
        })
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
}

fn clone_fd(fd: &Option<OwnedFd>) -> std::io::Result<Option<OwnedFd>> {
    fd.as_ref().map(OwnedFd::try_clone).transpose()
}
