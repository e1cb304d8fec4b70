//! Driver `nbd`: a disk of an NBD server, over a unix socket.

mod link;

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::mpsc;
use std::time::Duration;

use tokio::sync::{Semaphore, oneshot};
use vdisk_api::{Error, NbdOptions, NbdServer, NodeOptions, Result};
use vdisk_io::IoVecs;
use vdisk_nbd::client::Offered;
use vdisk_nbd::wire::{command, command_flag, state, transmission};

use super::{Direction, Driver, Limits, LocalFuture, OpenedDriver, Resolved, SlowReason};
use crate::descriptors::Open;
use crate::node::{Node, WriteFlags, ZeroFlags};
use crate::runtime::Runtime;
use crate::status::BlockStatus;
use link::{Answer, Ask, Link, Server};

/// Requests in flight at most; servers have their own limits.
const MAX_IN_FLIGHT: usize = 64;

/// The most data in one request, in bytes: several of them are in flight at once, and the memory for them is bounded.
const MAX_TRANSFER: u32 = 4 << 20;

/// How much a server is asked to discard or to write zeroes to at once, in bytes.
const MAX_RANGE: u64 = 1 << 30;

/// How long opening may wait for an answer.
const PATIENCE: Duration = Duration::from_secs(30);

struct Nbd {
    link: Link,
    offered: Offered,
    filename: String,
    no_flush: bool,
    in_flight: Semaphore,
    /// If the connection was passed.
    _passed: Option<Open>,
}

pub(super) fn open(
    name: &str,
    node: &NodeOptions,
    options: &NbdOptions,
    runtime: &Runtime,
) -> Result<OpenedDriver> {
    let export = &options.export;
    let (connected, passed, filename) = match &options.server {
        NbdServer::Unix(path) => (
            link::connect(path, export),
            None,
            format!("nbd+unix:///{export}?socket={}", path.display()),
        ),
        NbdServer::Passed(file) => {
            let opened = runtime.descriptors.open(file, true, false, None);
            let (fd, open) = opened.map_err(|e| {
                Error::io(format_args!("node '{name}': '{file}' cannot be opened"), &e)
            })?;
            (link::agree(fd.into(), export), Some(open), file.clone())
        }
    };
    let (stream, offered) = connected.map_err(|e| {
        let what = format!("node '{name}': NBD server '{filename}'");
        match e {
            vdisk_nbd::HandshakeError::Io(e) => Error::io(what, &e),
            e => Error::failed(format!("{what}: {e}")),
        }
    })?;
    let is_read_only = offered.flags & transmission::READ_ONLY != 0;
    if is_read_only && !node.read_only && !node.auto_read_only {
        return Err(Error::failed(format!(
            "node '{name}': NBD server '{filename}' offers it read-only: set read-only or auto-read-only"
        )));
    }
    let server = match &options.server {
        NbdServer::Unix(path) => Some(Server {
            path: path.clone(),
            export: export.clone(),
            reconnect_delay: options.reconnect_delay,
        }),
        NbdServer::Passed(_) => None,
    };
    let link = Link::start(name, stream, offered, server)
        .map_err(|e| Error::io(format_args!("node '{name}'"), &e))?;
    Ok(OpenedDriver {
        size: offered.size,
        read_only: node.read_only || is_read_only,
        driver: Box::new(Nbd {
            link,
            offered,
            filename,
            no_flush: node.cache.no_flush,
            in_flight: Semaphore::new(MAX_IN_FLIGHT),
            _passed: passed,
        }),
    })
}

impl Nbd {
    fn can(&self, flag: u16) -> bool {
        self.offered.flags & flag != 0
    }

    async fn ask(
        &self,
        kind: u16,
        flags: u16,
        offset: u64,
        len: u32,
        data: Vec<u8>,
    ) -> io::Result<Answer> {
        let _permit = self.in_flight.acquire().await;
        let (tx, rx) = oneshot::channel();
        self.link.ask(Ask {
            kind,
            flags,
            offset,
            len,
            data: Arc::new(data),
            tell: Box::new(|answer| {
                let _ = tx.send(answer);
            }),
        });
        rx.await
            .unwrap_or_else(|_| Err(io::Error::other("the connection has ended")))
    }

    /// Lengths of the pieces that a transfer is cut into.
    fn max_transfer(&self) -> usize {
        self.offered.max_payload.min(MAX_TRANSFER) as usize
    }

    /// FUA if it is wanted and can be had.
    fn fua(&self, durable: bool) -> u16 {
        match durable && !self.no_flush && self.can(transmission::SEND_FUA) {
            true => command_flag::FUA,
            false => 0,
        }
    }

    /// Makes durable what was just written, if the server could not do it with the write.
    async fn settle(&self, durable: bool) -> io::Result<()> {
        match durable && !self.can(transmission::SEND_FUA) {
            true => self.flush().await,
            false => Ok(()),
        }
    }

    /// The same request for one piece of a range after the other.
    async fn in_pieces(&self, kind: u16, flags: u16, offset: u64, len: u64) -> io::Result<()> {
        let mut at = 0;
        while at < len {
            let n = (len - at).min(MAX_RANGE);
            self.ask(kind, flags, offset + at, n as u32, Vec::new())
                .await?;
            at += n;
        }
        Ok(())
    }
}

impl Driver for Nbd {
    fn name(&self) -> &'static str {
        "nbd"
    }

    fn limits(&self) -> Limits {
        Limits {
            request_alignment: self.offered.min_block.into(),
            memory_alignment: 1,
            zero_alignment: self.offered.preferred_block.into(),
        }
    }

    fn resolve(&self, _: Direction, _offset: u64, _len: u64, then: &mut dyn FnMut(Resolved<'_>)) {
        then(Resolved::Slow(SlowReason::Network));
    }

    fn slow_reason(&self, _: Direction) -> Option<SlowReason> {
        Some(SlowReason::Network)
    }

    fn read(&self, offset: u64, iov: IoVecs) -> LocalFuture<'_, io::Result<()>> {
        Box::pin(async move {
            let most = self.max_transfer();
            for at in (0..iov.len()).step_by(most) {
                let n = most.min(iov.len() - at);
                let asked = self.ask(command::READ, 0, offset + at as u64, n as u32, Vec::new());
                match asked.await? {
                    Answer::Data(data) => iov.copy_from_slice(at, &data),
                    _ => return Err(io::Error::other("a read was answered without data")),
                }
            }
            Ok(())
        })
    }

    fn write(
        &self,
        offset: u64,
        iov: IoVecs,
        flags: WriteFlags,
    ) -> LocalFuture<'_, io::Result<()>> {
        Box::pin(async move {
            let (most, fua) = (self.max_transfer(), self.fua(flags.durable));
            for at in (0..iov.len()).step_by(most) {
                let n = most.min(iov.len() - at);
                let data = iov.slice(at, n).to_vec();
                self.ask(command::WRITE, fua, offset + at as u64, n as u32, data)
                    .await?;
            }
            self.settle(flags.durable).await
        })
    }

    fn read_blocking(&self, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        let align = u64::from(self.offered.min_block);
        let start = offset & !(align - 1);
        let end = (offset + len as u64).next_multiple_of(align);
        let mut out = Vec::new();
        let mut at = start;
        while at < end {
            let n = (end - at).min(self.max_transfer() as u64);
            let (tx, rx) = mpsc::channel();
            self.link.ask(Ask {
                kind: command::READ,
                flags: 0,
                offset: at,
                len: n as u32,
                data: Arc::default(),
                tell: Box::new(move |answer| {
                    let _ = tx.send(answer);
                }),
            });
            match rx.recv_timeout(PATIENCE) {
                Ok(answer) => match answer? {
                    Answer::Data(data) => out.extend(data),
                    _ => return Err(io::Error::other("a read was answered without data")),
                },
                Err(_) => return Err(io::ErrorKind::TimedOut.into()),
            }
            at += n;
        }
        out.drain(..(offset - start) as usize);
        out.truncate(len);
        Ok(out)
    }

    fn flush(&self) -> LocalFuture<'_, io::Result<()>> {
        Box::pin(async move {
            // A server without it has nothing to flush.
            if self.no_flush || !self.can(transmission::SEND_FLUSH) {
                return Ok(());
            }
            self.ask(command::FLUSH, 0, 0, 0, Vec::new())
                .await
                .map(drop)
        })
    }

    fn discard(&self, offset: u64, len: u64) -> LocalFuture<'_, io::Result<()>> {
        Box::pin(async move {
            match self.can(transmission::SEND_TRIM) {
                true => self.in_pieces(command::TRIM, 0, offset, len).await,
                false => Err(io::ErrorKind::Unsupported.into()),
            }
        })
    }

    fn write_zeroes(
        &self,
        offset: u64,
        len: u64,
        flags: ZeroFlags,
    ) -> LocalFuture<'_, io::Result<()>> {
        Box::pin(async move {
            if !self.can(transmission::SEND_WRITE_ZEROES) {
                return Err(io::ErrorKind::Unsupported.into());
            }
            let keeps = match flags.may_unmap {
                true => 0,
                false => command_flag::NO_HOLE,
            };
            let sent = self.fua(flags.durable) | keeps;
            self.in_pieces(command::WRITE_ZEROES, sent, offset, len)
                .await?;
            self.settle(flags.durable).await
        })
    }

    fn status<'a>(
        &'a self,
        offset: u64,
        len: u64,
        _: Option<&'a Arc<Node>>,
    ) -> LocalFuture<'a, io::Result<BlockStatus>> {
        Box::pin(async move {
            if self.offered.allocation.is_none() {
                return Ok(BlockStatus::data(len));
            }
            let align = u64::from(self.offered.min_block);
            let (start, end) = (
                offset & !(align - 1),
                (offset + len).next_multiple_of(align),
            );
            let asked = (end - start).min(MAX_RANGE);
            let answer = self
                .ask(command::BLOCK_STATUS, 0, start, asked as u32, Vec::new())
                .await?;
            let Answer::Extents(extents) = answer else {
                return Err(io::Error::other("a status was answered without one"));
            };
            let is_zero = |state: u32| state & state::ZERO != 0;
            let zero = extents.first().is_some_and(|(_, state)| is_zero(*state));
            let alike = extents.iter().take_while(|(_, s)| is_zero(*s) == zero);
            let known: u64 = alike.map(|(len, _)| u64::from(*len)).sum();
            Ok(BlockStatus {
                len: (start + known).saturating_sub(offset).clamp(1, len),
                zero,
                own: true,
            })
        })
    }

    fn resize(&self, _: u64) -> LocalFuture<'_, io::Result<u64>> {
        Box::pin(async { Err(io::ErrorKind::Unsupported.into()) })
    }

    fn set_finished(&self, on: bool) -> LocalFuture<'_, io::Result<()>> {
        Box::pin(async move {
            if self.offered.finished.is_none() {
                return Err(io::ErrorKind::Unsupported.into());
            }
            self.ask(command::FINISHED, 0, on.into(), 0, Vec::new())
                .await
                .map(drop)
        })
    }

    fn filename(&self) -> Option<String> {
        Some(self.filename.clone())
    }

    fn give_up(&self, wholly: bool) -> bool {
        self.link.give_up(wholly)
    }

    fn make_writable(&self) -> Result<()> {
        match self.can(transmission::READ_ONLY) {
            false => Ok(()),
            true => Err(Error::failed(format!(
                "NBD server '{}' offers it read-only",
                self.filename
            ))),
        }
    }

    fn close(&self) -> Pin<Box<dyn Future<Output = ()> + Send + '_>> {
        Box::pin(self.link.close())
    }
}
