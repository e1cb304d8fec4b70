//! One client, from its first words to its last reply.
//!
//! Invariants:
//! * Whatever a client sends, it has a bounded amount of memory: a request has its share of [`BUDGET`] from before its data is read
//!   until its reply is sent.
//! * A request that was read is answered, unless the client has gone: also when the export ends.

use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{ReadHalf, WriteHalf};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use vdisk_io::{IoThread, Kept};
use vdisk_nbd::server::{ALLOCATION_CONTEXT, Agreed, FINISHED_CONTEXT, greet};
use vdisk_nbd::wire::{self, Chunk, Request, chunk, command, command_flag};
use vdisk_nbd::{HandshakeError, MAX_PAYLOAD};

use super::export::{Progress, Shared};
use super::lane::{self, Done, Lane, Work};

/// Memory for the data of a client's requests, in units of [`UNIT`] bytes: two of the largest.
const BUDGET: usize = 2 * (MAX_PAYLOAD / UNIT) as usize;

/// The least that a request counts for.
const UNIT: u32 = 64 << 10;

/// How long the first words of a client may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// How long a client may take no replies before the connection ends; much less if the export is to end.
const STUCK: Duration = Duration::from_secs(60);
const STUCK_AT_END: Duration = Duration::from_secs(2);

/// Replies up to this many bytes are sent together.
const TOGETHER: usize = 64 << 10;

/// The answer to a request.
struct Reply {
    request: Request,
    result: Result<Done, u32>,
    _memory: OwnedSemaphorePermit,
}

/// What is known of how a connection ended.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{0}")]
    Handshake(#[from] HandshakeError),
    #[error("{0}")]
    Io(#[from] std::io::Error),
    #[error("the client sends what is no request")]
    NoRequest,
    #[error("the client sends {0} bytes at once: at most {MAX_PAYLOAD} were offered")]
    TooLong(u32),
    #[error("the client says nothing")]
    Silent,
    #[error("the client takes no replies")]
    Stuck,
    #[error("the I/O thread has stopped")]
    Stopped,
}

/// Serves a client. True if it has used the export, and has said goodbye.
pub async fn serve(
    shared: &Arc<Shared>,
    stream: &mut UnixStream,
    thread: usize,
    mut stop: watch::Receiver<bool>,
) -> Result<bool, Error> {
    let offer = shared.offer();
    let agreed = tokio::select! {
        agreed = tokio::time::timeout(PATIENCE, greet(stream, &offer)) => agreed,
        _ = stop.wait_for(|stop| *stop) => return Ok(false),
    };
    let Some(agreed) = agreed.map_err(|_| Error::Silent)?? else {
        return Ok(false);
    };
    let io_thread = &shared.threads[thread];
    let (backend, stats) = (shared.backend.clone(), shared.stats[thread].clone());
    let (own, writethrough) = (io_thread.clone(), shared.setup.writethrough);
    let lane = io_thread
        .run(move |r| r.keep(Lane::open(&own, r, &backend, writethrough, stats)))
        .await
        .map_err(|_| Error::Stopped)?;
    let result = converse(shared, stream, agreed, io_thread, lane, &mut stop).await;
    if !matches!(result, Ok(true)) {
        // Who goes without a word may have had more to write.
        shared.set_progress(Some(Progress::Finished), Progress::Unfinished);
    }
    let closed = io_thread.run_async(move |r| async move {
        if let Some(lane) = r.take_kept(lane) {
            lane.close().await;
        }
    });
    closed.await.map_err(|_| Error::Stopped)?;
    result
}

async fn converse(
    shared: &Arc<Shared>,
    stream: &mut UnixStream,
    agreed: Agreed,
    thread: &IoThread,
    lane: Kept<Lane>,
    stop: &mut watch::Receiver<bool>,
) -> Result<bool, Error> {
    let (from, mut to) = stream.split();
    let (tx, mut rx) = mpsc::unbounded_channel();
    let mut ending = stop.clone();
    let over = stop.clone();
    let requests = async {
        // The sender goes with it: the replies end when the last request is answered.
        let tx = tx;
        tokio::select! {
            read = take_requests(shared, from, agreed, thread, lane, &tx) => read,
            _ = stop.wait_for(|stop| *stop) => Ok(false),
        }
    };
    let replies = async {
        let mut together = Vec::new();
        while let Some(reply) = rx.recv().await {
            let mut held = vec![reply];
            while let Ok(more) = rx.try_recv() {
                held.push(more);
                if held.len() == 64 {
                    break;
                }
            }
            let send = send(&mut to, &held, agreed, &mut together);
            let patience = async {
                tokio::select! {
                    () = tokio::time::sleep(STUCK) => {}
                    () = async {
                        let _ = ending.wait_for(|stop| *stop).await;
                        tokio::time::sleep(STUCK_AT_END).await;
                    } => {}
                }
            };
            tokio::select! {
                sent = send => sent?,
                () = patience => return Err(Error::Stuck),
            }
        }
        Ok(())
    };
    let (mut requests, mut replies) = (std::pin::pin!(requests), std::pin::pin!(replies));
    tokio::select! {
        // Nothing can be told any more.
        failed = &mut replies => failed.map(|()| false),
        read = &mut requests => {
            // Whoever ends the export does not wait for what a throttle group holds back. A client that goes by itself does: it
            // must not get others past their limit, nor as long as it takes no replies.
            let settled = async {
                if !*over.borrow() {
                    return Ok(());
                }
                let settled = thread.run_async(move |r| async move {
                    let lane: Option<Rc<Lane>> = r.kept(lane);
                    if let Some(lane) = lane {
                        lane.settle().await;
                    }
                });
                settled.await.map_err(|_| Error::Stopped)
            };
            let (answered, settled) = tokio::join!(replies, settled);
            answered.and(settled)?;
            read
        }
    }
}

async fn take_requests(
    shared: &Arc<Shared>,
    from: ReadHalf<'_>,
    agreed: Agreed,
    thread: &IoThread,
    lane: Kept<Lane>,
    replies: &mpsc::UnboundedSender<Reply>,
) -> Result<bool, Error> {
    let mut from = BufReader::with_capacity(TOGETHER, from);
    let memory = Arc::new(Semaphore::new(BUDGET));
    loop {
        let mut header = [0; Request::SIZE];
        // Between requests a client may go without a word.
        match from.read_exact(&mut header[..1]).await {
            Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => return Ok(false),
            other => other?,
        };
        from.read_exact(&mut header[1..]).await?;
        let request = Request::parse(&header).ok_or(Error::NoRequest)?;
        if request.kind == command::DISCONNECT {
            return Ok(true);
        }
        let has_data = matches!(request.kind, command::READ | command::WRITE);
        if request.kind == command::WRITE && request.len > MAX_PAYLOAD {
            return Err(Error::TooLong(request.len));
        }
        let bytes = if has_data {
            request.len.min(MAX_PAYLOAD)
        } else {
            0
        };
        let units = bytes.div_ceil(UNIT).max(1);
        let permit = memory.clone().acquire_many_owned(units).await;
        let permit = permit.map_err(|_| Error::Stopped)?;
        let mut work = Work {
            kind: request.kind,
            flags: request.flags,
            offset: request.offset,
            len: request.len,
            data: None,
        };
        if request.kind == command::WRITE {
            let mut data = lane::buffer(request.len);
            from.read_exact(&mut data.as_mut_slice()[..request.len as usize])
                .await?;
            work.data = Some(data);
        }
        let reply = move |result| Reply {
            request,
            result,
            _memory: permit,
        };
        if let Err(error) = check(shared, &request, agreed) {
            let _ = replies.send(reply(Err(error)));
            continue;
        }
        if request.kind == command::FINISHED {
            let progress = match request.offset {
                0 => Progress::Unfinished,
                _ => Progress::Finished,
            };
            shared.set_progress(None, progress);
            let _ = replies.send(reply(Ok(Done::Nothing)));
            continue;
        }
        if is_write(request.kind) {
            shared.set_progress(Some(Progress::Finished), Progress::Unfinished);
        }
        let replies = replies.clone();
        let finish = move |result| {
            let _ = replies.send(reply(result));
        };
        thread.post(move |r| {
            let found: Option<Rc<Lane>> = r.kept(lane);
            let Some(lane) = found else {
                return finish(Err(wire::error_to_wire(None)));
            };
            r.spawn(async move {
                let result = lane.run(work).await;
                finish(result.map_err(|e| wire::error_to_wire(Some(errno(&e)))));
            });
        });
    }
}

fn errno(error: &std::io::Error) -> i32 {
    match error.raw_os_error() {
        Some(errno) => errno,
        None if error.kind() == std::io::ErrorKind::Unsupported => libc::ENOTSUP,
        None => libc::EIO,
    }
}

fn is_write(kind: u16) -> bool {
    matches!(kind, command::WRITE | command::TRIM | command::WRITE_ZEROES)
}

/// Refuses what cannot be done, with an error of the protocol.
fn check(shared: &Shared, request: &Request, agreed: Agreed) -> Result<(), u32> {
    let invalid = Err(libc::EINVAL as u32);
    let writes = is_write(request.kind);
    let known = match request.kind {
        command::READ if agreed.structured => command_flag::DF | command_flag::FUA,
        command::READ => command_flag::FUA,
        command::FINISHED if agreed.finished => 0,
        command::WRITE | command::TRIM | command::FLUSH => command_flag::FUA,
        command::WRITE_ZEROES => command_flag::FUA | command_flag::NO_HOLE,
        command::BLOCK_STATUS if agreed.allocation => command_flag::REQ_ONE | command_flag::FUA,
        _ => return invalid,
    };
    if request.flags & !known != 0 {
        return invalid;
    }
    if request.kind == command::FINISHED {
        return match (request.offset, request.len) {
            (0 | 1, 0) => Ok(()),
            _ => invalid,
        };
    }
    if request.kind == command::FLUSH {
        return match (request.offset, request.len) {
            (0, 0) => Ok(()),
            _ => invalid,
        };
    }
    if writes && !shared.setup.writable {
        return Err(libc::EPERM as u32);
    }
    if request.kind == command::READ && request.len > MAX_PAYLOAD {
        return Err(libc::EOVERFLOW as u32);
    }
    let block = u64::from(shared.setup.logical_block_size);
    let (offset, len) = (request.offset, u64::from(request.len));
    let end = offset.checked_add(len);
    if end.is_none_or(|end| end > shared.backend.node().size()) {
        return Err(if writes { libc::ENOSPC } else { libc::EINVAL } as u32);
    }
    let aligned = offset.is_multiple_of(block) && len.is_multiple_of(block);
    match aligned && (len > 0 || request.kind != command::BLOCK_STATUS) {
        true => Ok(()),
        false => invalid,
    }
}

/// Sends replies, small ones together.
async fn send(
    to: &mut WriteHalf<'_>,
    replies: &[Reply],
    agreed: Agreed,
    together: &mut Vec<u8>,
) -> Result<(), Error> {
    together.clear();
    for reply in replies {
        let data = encode(reply, agreed, together);
        if together.len() + data.len() <= TOGETHER {
            together.extend(data);
            continue;
        }
        to.write_all(together).await?;
        together.clear();
        to.write_all(data).await?;
    }
    to.write_all(together).await?;
    Ok(())
}

/// Adds what precedes the data of a reply, and returns the data.
fn encode<'a>(reply: &'a Reply, agreed: Agreed, out: &mut Vec<u8>) -> &'a [u8] {
    let cookie = reply.request.cookie;
    let len = reply.request.len;
    let data = match &reply.result {
        Ok(Done::Data(data)) => &data.as_slice()[..len as usize],
        _ => &[],
    };
    if !agreed.structured {
        let error = reply.result.as_ref().err().copied().unwrap_or(0);
        out.extend(wire::simple_reply(error, cookie));
        return data;
    }
    let mut add = |flags: u16, kind: u16, len: usize| {
        let head = Chunk {
            flags,
            kind,
            cookie,
            len: len as u32,
        };
        out.extend(head.to_bytes());
    };
    match &reply.result {
        // An empty piece may not be sent.
        Ok(Done::Data(_)) if len > 0 => {
            add(chunk::DONE, chunk::OFFSET_DATA, 8 + data.len());
            out.extend(reply.request.offset.to_be_bytes());
        }
        Ok(Done::Data(_) | Done::Nothing) => add(chunk::DONE, chunk::NONE, 0),
        Ok(Done::Extents(extents)) => {
            // Each context that was asked for has its chunk; of whether all is written nobody has asked here.
            let flags = if agreed.finished { 0 } else { chunk::DONE };
            add(flags, chunk::BLOCK_STATUS, 4 + 8 * extents.len());
            out.extend(ALLOCATION_CONTEXT.to_be_bytes());
            for (len, state) in extents {
                out.extend(len.to_be_bytes());
                out.extend(state.to_be_bytes());
            }
            if agreed.finished {
                let known: u32 = extents.iter().map(|(len, _)| len).sum();
                let head = Chunk {
                    flags: chunk::DONE,
                    kind: chunk::BLOCK_STATUS,
                    cookie,
                    len: 12,
                };
                out.extend(head.to_bytes());
                for word in [FINISHED_CONTEXT, known, 0] {
                    out.extend(word.to_be_bytes());
                }
            }
        }
        Err(error) => {
            add(chunk::DONE, chunk::ERROR, 6);
            out.extend(error.to_be_bytes());
            out.extend(0u16.to_be_bytes());
        }
    }
    data
}
