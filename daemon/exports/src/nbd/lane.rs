//! A client's requests on their I/O thread.

use std::cell::Cell;
use std::io;
use std::rc::{Rc, Weak};
use std::sync::Arc;

use tokio::sync::Notify;
use vdisk_block::{Backend, Client, Node, WriteFlags, ZeroFlags};
use vdisk_io::{AlignedBuf, IoThread, IoVecs, Kept, Reactor, give_way};
use vdisk_nbd::wire::{command, command_flag, state};

use crate::statistics::{QueueStats, RequestClass};

/// Most pieces in an answer to a question for the status.
const MAX_EXTENTS: usize = 2048;

/// Most looks at a node for one answer: it may have many pieces that are alike.
const MAX_LOOKS: usize = 4 * MAX_EXTENTS;

/// Memory of data is aligned to this many bytes: what storage wants for O_DIRECT.
const ALIGNMENT: usize = 4096;

/// A request that is known to be within the disk.
pub struct Work {
    pub kind: u16,
    /// Of [`command_flag`].
    pub flags: u16,
    pub offset: u64,
    pub len: u32,
    /// Of a write.
    pub data: Option<AlignedBuf>,
}

/// What a request was answered.
pub enum Done {
    Nothing,
    Data(AlignedBuf),
    /// Length and state of each piece, from the beginning.
    Extents(Vec<(u32, u32)>),
}

/// Memory for the data of a request.
pub fn buffer(len: u32) -> AlignedBuf {
    AlignedBuf::new(len as usize, ALIGNMENT)
}

pub struct Lane {
    client: Client,
    /// Every write is durable.
    writethrough: bool,
    stats: Arc<QueueStats>,
    reactor: Rc<Reactor>,
    /// The client has gone: what waits is not carried out any more.
    closed: Cell<bool>,
    /// A drain is over.
    resumed: Notify,
    idle: Notify,
    /// What the end of a drain finds it by.
    kept: Kept<Weak<Lane>>,
}

impl Drop for Lane {
    fn drop(&mut self) {
        self.reactor.take_kept(self.kept);
    }
}

impl Lane {
    /// Opens one on the calling I/O thread, which is `thread`.
    pub fn open(
        thread: &IoThread,
        reactor: &Rc<Reactor>,
        backend: &Arc<Backend>,
        writethrough: bool,
        stats: Arc<QueueStats>,
    ) -> Rc<Lane> {
        Rc::new_cyclic(|this: &Weak<Lane>| {
            let kept = reactor.keep(Rc::new(this.clone()));
            Lane {
                client: backend.attach(thread, reactor, move |r| {
                    if let Some(lane) = r.kept(kept).and_then(|w| w.upgrade()) {
                        lane.resumed.notify_waiters();
                    }
                }),
                writethrough,
                stats,
                reactor: reactor.clone(),
                closed: Cell::new(false),
                resumed: Notify::new(),
                idle: Notify::new(),
                kept,
            }
        })
    }

    /// Carries a request out.
    pub async fn run(&self, work: Work) -> io::Result<Done> {
        let started = std::time::Instant::now();
        loop {
            let resumed = self.resumed.notified();
            if !self.client.is_drained() {
                break;
            }
            resumed.await;
        }
        if self.closed.get() {
            return Err(io::Error::from_raw_os_error(libc::ESHUTDOWN));
        }
        let count = self.client.begin();
        let node = self.client.with_node(Arc::clone);
        let class = class(work.kind);
        let bytes = match class {
            RequestClass::Other => 0,
            _ => work.len.into(),
        };
        let result = self.carry_out(&node, work).await;
        self.client.end(count);
        if self.client.in_flight() == 0 {
            self.idle.notify_waiters();
        }
        self.stats.slow.add(1);
        self.stats
            .record(class, bytes, result.is_ok(), started.elapsed());
        result
    }

    async fn carry_out(&self, node: &Arc<Node>, work: Work) -> io::Result<Done> {
        let (offset, len) = (work.offset, u64::from(work.len));
        let durable = self.writethrough || work.flags & command_flag::FUA != 0;
        match (work.kind, work.data) {
            (command::READ, _) => {
                let iov = IoVecs::from_buf(buffer(work.len), work.len as usize);
                node.read(offset, iov.clone()).await?;
                return Ok(Done::Data(iov.into_buf()));
            }
            (command::WRITE, Some(data)) => {
                let iov = IoVecs::from_buf(data, work.len as usize);
                node.write(offset, iov, WriteFlags { durable }).await?;
            }
            (command::WRITE_ZEROES, _) => {
                let may_unmap = work.flags & command_flag::NO_HOLE == 0;
                let flags = ZeroFlags { may_unmap, durable };
                node.write_zeroes(offset, len, flags).await?;
            }
            (command::TRIM, _) => {
                node.discard(offset, len).await?;
                if durable {
                    node.flush().await?;
                }
            }
            (command::FLUSH, _) => node.flush().await?,
            (command::BLOCK_STATUS, _) => {
                let most = match work.flags & command_flag::REQ_ONE {
                    0 => MAX_EXTENTS,
                    _ => 1,
                };
                return extents(node, offset, len, most).await.map(Done::Extents);
            }
            _ => return Err(io::Error::from_raw_os_error(libc::EINVAL)),
        }
        Ok(Done::Nothing)
    }

    /// Waits for the requests in flight; none follows.
    pub async fn close(&self) {
        self.closed.set(true);
        self.settle().await;
    }

    /// Waits for the requests in flight, of which a throttle group holds none back meanwhile.
    pub async fn settle(&self) {
        let _let_go = self.client.let_go();
        loop {
            let idle = self.idle.notified();
            if self.client.in_flight() == 0 {
                return;
            }
            idle.await;
        }
    }
}

fn class(kind: u16) -> RequestClass {
    match kind {
        command::READ => RequestClass::Read,
        command::WRITE => RequestClass::Write,
        command::FLUSH => RequestClass::Flush,
        command::TRIM => RequestClass::Discard,
        command::WRITE_ZEROES => RequestClass::WriteZeroes,
        _ => RequestClass::Other,
    }
}

async fn extents(
    node: &Arc<Node>,
    offset: u64,
    len: u64,
    most: usize,
) -> io::Result<Vec<(u32, u32)>> {
    let mut out: Vec<(u32, u32)> = Vec::new();
    let (mut at, mut looks) = (0, 0);
    while at < len && looks < MAX_LOOKS {
        if looks > 0 {
            give_way().await;
        }
        looks += 1;
        let status = node.status(offset + at, len - at, None).await?;
        let state = match status.zero {
            true => state::HOLE | state::ZERO,
            false => 0,
        };
        let n = status.len.min(len - at) as u32;
        let full = out.len() == most;
        match out.last_mut() {
            Some((last, of)) if *of == state => *last += n,
            _ if full => break,
            _ => out.push((n, state)),
        }
        at += u64::from(n);
    }
    Ok(out)
}
