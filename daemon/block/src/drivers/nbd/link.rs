//! A connection to an NBD server, on the thread of connections: requests go out as they come, replies come in any order.
//!
//! Invariants:
//! * A request that was taken is answered exactly once, whatever becomes of the connection.
//! * What the server has acknowledged and was not flushed may be lost with a connection, if the server ends with it: the first flush
//!   that is sent after that fails, and so do those that were under way.
//! * Nobody waits for ever: a server that does not answer when the driver is closed is left, and one that breaks the connection again and
//!   again is given up.

use std::collections::HashMap;
use std::io;
use std::os::unix::net::UnixStream as StdStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{Notify, mpsc, watch};
use tokio::time::Instant;
use vdisk_nbd::client::{Offered, greet};
use vdisk_nbd::wire::{self, Reader, Request, chunk, command, command_flag};
use vdisk_nbd::{HandshakeError, MAX_PAYLOAD};

/// How long the first words of a server may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// How long requests may take to be answered when the driver is closed.
const LAST_ANSWERS: Duration = Duration::from_secs(10);

/// How long a server has to end the connection after a client has said goodbye.
const GOODBYE: Duration = Duration::from_secs(5);

/// Between two tries to connect again.
const RETRY: Duration = Duration::from_millis(200);

/// Where the server is.
#[derive(Clone, Debug)]
pub struct Server {
    pub path: PathBuf,
    pub export: String,
    /// How long requests wait for the server to come back.
    pub reconnect_delay: Duration,
}

/// What a request was answered.
#[derive(Debug, PartialEq, Eq)]
pub enum Answer {
    Done,
    Data(Vec<u8>),
    /// Length and state (of [`wire::state`]) of each piece, from the beginning.
    Extents(Vec<(u32, u32)>),
}

type Tell = Box<dyn FnOnce(io::Result<Answer>) + Send>;

/// A request, and who waits for it.
pub struct Ask {
    pub kind: u16,
    pub flags: u16,
    pub offset: u64,
    pub len: u32,
    /// Of a write.
    pub data: Arc<Vec<u8>>,
    pub tell: Tell,
}

/// What the connection's task shares with the driver.
pub struct Link {
    asks: Mutex<Option<mpsc::UnboundedSender<Ask>>>,
    shared: Arc<Shared>,
    ended: watch::Receiver<bool>,
}

#[derive(Default)]
struct Shared {
    pending: Mutex<Pending>,
    /// Nothing waits for an answer any more.
    idle: Notify,
    /// Answers so far, and when somebody last asked whether there are any.
    answers: AtomicU64,
    looked_at: AtomicU64,
    /// What was in flight is given up, and the connection with it.
    given_up: Notify,
    /// The server was told whether all is written: that goes with the connection, and there is no other.
    bound: AtomicBool,
    closing: watch::Sender<bool>,
}

#[derive(Default)]
struct Pending {
    next: u64,
    all: HashMap<u64, Waiting>,
    /// Writes that the server has acknowledged without making them durable, and how many of them it has made durable since.
    acknowledged: u64,
    flushed: u64,
    /// The connection broke, and the server had acknowledged something that was not flushed.
    lost: bool,
}

struct Waiting {
    ask: Ask,
    /// Writes acknowledged before it was sent.
    before: u64,
    /// Pieces of a structured reply so far.
    reply: Partial,
}

#[derive(Default)]
struct Partial {
    /// Empty until there is data.
    data: Vec<u8>,
    filled: usize,
    extents: Option<Vec<(u32, u32)>>,
    error: Option<u32>,
}

fn locked<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(|e| e.into_inner())
}

fn broken() -> io::Error {
    io::Error::from_raw_os_error(libc::EIO)
}

fn malformed(what: &str) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        format!("the server's reply is malformed: {what}"),
    )
}

/// Connects to a server, and agrees with it; may block.
pub fn connect(path: &Path, export: &str) -> Result<(StdStream, Offered), HandshakeError> {
    let address = rustix::net::SocketAddrUnix::new(path).map_err(io::Error::from)?;
    let socket = rustix::net::socket_with(
        rustix::net::AddressFamily::UNIX,
        rustix::net::SocketType::STREAM,
        rustix::net::SocketFlags::CLOEXEC | rustix::net::SocketFlags::NONBLOCK,
        None,
    );
    let socket = socket.map_err(io::Error::from)?;
    // A server with a full backlog is as good as none.
    rustix::net::connect(&socket, &address).map_err(io::Error::from)?;
    agree(StdStream::from(socket), export)
}

/// Agrees with the server at the other end of a connection; may block.
pub fn agree(mut stream: StdStream, export: &str) -> Result<(StdStream, Offered), HandshakeError> {
    stream.set_nonblocking(false)?;
    let mut first = FirstWords {
        stream: &mut stream,
        until: std::time::Instant::now() + PATIENCE,
    };
    let offered = greet(&mut first, export).map_err(|e| match e {
        HandshakeError::Io(e) if e.kind() == io::ErrorKind::WouldBlock => {
            let why = format!("its first words take more than {} s", PATIENCE.as_secs());
            HandshakeError::Io(io::Error::new(io::ErrorKind::TimedOut, why))
        }
        e => e,
    })?;
    stream.set_nonblocking(true)?;
    Ok((stream, offered))
}

/// A stream for so long, in all.
struct FirstWords<'a> {
    stream: &'a mut StdStream,
    until: std::time::Instant,
}

impl FirstWords<'_> {
    fn left(&self) -> io::Result<Option<Duration>> {
        let left = self
            .until
            .saturating_duration_since(std::time::Instant::now());
        match left.is_zero() {
            true => Err(io::ErrorKind::WouldBlock.into()),
            false => Ok(Some(left)),
        }
    }
}

impl io::Read for FirstWords<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.stream.set_read_timeout(self.left()?)?;
        self.stream.read(buf)
    }
}

impl io::Write for FirstWords<'_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.stream.set_write_timeout(self.left()?)?;
        self.stream.write(buf)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Link {
    /// Goes on with a connection on which all is agreed. Without a `server` it is the only one.
    pub fn start(
        node: &str,
        stream: StdStream,
        offered: Offered,
        server: Option<Server>,
    ) -> io::Result<Link> {
        let (tx, rx) = mpsc::unbounded_channel();
        let shared = Arc::<Shared>::default();
        let (ended, watch) = watch::channel(false);
        let task = Task {
            node: node.to_owned(),
            shared: shared.clone(),
            server,
            offered,
            asks: rx,
        };
        vdisk_nbd::network::handle()?.spawn(async move {
            task.run(stream).await;
            ended.send_replace(true);
        });
        Ok(Link {
            asks: Mutex::new(Some(tx)),
            shared,
            ended: watch,
        })
    }

    /// Sends a request; it is told of the answer on the thread of connections.
    pub fn ask(&self, ask: Ask) {
        let unsent = match &*locked(&self.asks) {
            Some(asks) => asks.send(ask).err().map(|e| e.0),
            None => Some(ask),
        };
        if let Some(ask) = unsent {
            (ask.tell)(Err(broken()));
        }
    }

    /// What waits for an answer fails, and the connection ends: it may be that the server answers nothing any more. If not `wholly`, only if
    /// no answer has come since this was last asked. The next request goes over another connection, if there may be one. False if nothing waits.
    pub fn give_up(&self, wholly: bool) -> bool {
        let shared = &self.shared;
        let answers = shared.answers.load(Relaxed);
        let is_silent = shared.looked_at.swap(answers, Relaxed) == answers;
        if shared.is_idle() || !wholly && !is_silent {
            return false;
        }
        // Before anybody is told: who flushes then must see it.
        shared.note_lost();
        let gone = shared.take_unless(|_| false);
        if gone.is_empty() {
            return false;
        }
        for ask in gone {
            (ask.tell)(Err(broken()));
        }
        shared.given_up.notify_waiters();
        true
    }

    /// Says goodbye when all is answered, and waits until the server has let go of everything, too.
    pub async fn close(&self) {
        locked(&self.asks).take();
        self.shared.closing.send_replace(true);
        let mut ended = self.ended.clone();
        let _ = ended.wait_for(|ended| *ended).await;
    }
}

struct Task {
    node: String,
    shared: Arc<Shared>,
    server: Option<Server>,
    offered: Offered,
    asks: mpsc::UnboundedReceiver<Ask>,
}

impl Task {
    async fn run(mut self, stream: StdStream) {
        let mut stream = UnixStream::from_std(stream).ok();
        // When requests began to wait for the server, which has answered nothing since.
        let mut since = None;
        while let Some(open) = stream.take() {
            let answers = self.shared.answers.load(Relaxed);
            let error = match self.converse(open).await {
                Ok(()) => break,
                Err(e) => e,
            };
            tracing::error!(node = self.node, %error, "the connection to the NBD server broke");
            self.lose();
            if self.shared.answers.load(Relaxed) != answers {
                since = None;
            } else {
                tokio::time::sleep(RETRY).await;
            }
            if self.shared.bound.load(Relaxed) {
                break;
            }
            let since = *since.get_or_insert_with(Instant::now);
            stream = self.come_back(since).await;
        }
        self.fail_all();
        // Nobody will come back.
        while let Some(ask) = self.asks.recv().await {
            (ask.tell)(Err(broken()));
        }
    }

    /// Sends requests and takes replies. Ends when the driver is closed, or with the connection.
    async fn converse(&mut self, stream: UnixStream) -> io::Result<()> {
        let (mut from, mut to) = stream.into_split();
        let mut replies = std::pin::pin!(take_replies(&mut from, &self.shared, &self.offered));
        let asks = &mut self.asks;
        let shared = &self.shared;
        // Those that were in flight when the connection before this one broke go first.
        let again = shared.resend().into_iter();
        let requests = async {
            for message in again {
                send(&mut to, message).await?;
            }
            while let Some(ask) = asks.recv().await {
                shared.bind(&ask);
                if let Some(message) = shared.enter(ask) {
                    send(&mut to, message).await?;
                }
            }
            loop {
                let idle = shared.idle.notified();
                if shared.is_idle() {
                    break;
                }
                idle.await;
            }
            let goodbye = Request {
                kind: command::DISCONNECT,
                flags: 0,
                cookie: 0,
                offset: 0,
                len: 0,
            };
            to.write_all(&goodbye.to_bytes()).await
        };
        let given_up = shared.given_up.notified();
        let mut closing = shared.closing.subscribe();
        let too_late = async {
            let _ = closing.wait_for(|closing| *closing).await;
            tokio::time::sleep(LAST_ANSWERS).await;
        };
        tokio::select! {
            error = &mut replies => return error.map(|never| match never {}),
            sent = requests => sent?,
            () = given_up => {
                let why = "what was in flight is not waited for any more";
                return Err(io::Error::new(io::ErrorKind::TimedOut, why));
            }
            // What is not answered by then is told so by whoever is next.
            () = too_late => return Ok(()),
        }
        // The server ends the connection when it has let go of what it serves.
        let _ = tokio::time::timeout(GOODBYE, replies).await;
        Ok(())
    }

    /// Notes what may be lost with the connection, and whose requests cannot be sent again.
    fn lose(&self) {
        let goes_on = self
            .server
            .as_ref()
            .is_some_and(|s| !s.reconnect_delay.is_zero());
        // Before anybody is told: who flushes then must see it.
        self.shared.note_lost();
        let gone = self
            .shared
            .take_unless(|ask| goes_on && ask.kind != command::FLUSH);
        for ask in gone {
            (ask.tell)(Err(broken()));
        }
    }

    fn fail_all(&self) {
        for ask in self.shared.take_unless(|_| false) {
            (ask.tell)(Err(broken()));
        }
    }

    /// Connects again. None if there is nothing to connect to, or the driver is closed.
    async fn come_back(&mut self, since: Instant) -> Option<UnixStream> {
        let server = self.server.clone()?;
        let until = since + server.reconnect_delay;
        if Instant::now() >= until {
            self.fail_all();
        }
        loop {
            let (path, export) = (server.path.clone(), server.export.clone());
            let connected = tokio::task::spawn_blocking(move || connect(&path, &export)).await;
            match connected {
                Ok(Ok((stream, offered))) if offered == self.offered => {
                    tracing::info!(node = self.node, "connected to the NBD server again");
                    return UnixStream::from_std(stream).ok();
                }
                Ok(Ok((_, offered))) => {
                    tracing::error!(
                        node = self.node,
                        size = offered.size,
                        "the NBD server offers something else now (size, blocks, or what it can do): it is not used"
                    );
                }
                _ => {}
            }
            let next = Instant::now() + RETRY;
            loop {
                let patient = Instant::now() < until;
                if !patient {
                    self.fail_all();
                }
                let ask = match tokio::time::timeout_at(next, self.asks.recv()).await {
                    Ok(Some(ask)) => ask,
                    Ok(None) => {
                        self.fail_all();
                        return None;
                    }
                    Err(_) => break,
                };
                if patient && ask.kind != command::FLUSH {
                    // It is sent with the others when there is a connection, and given up with them.
                    self.shared.enter(ask);
                } else {
                    // What was written before may be gone.
                    (ask.tell)(Err(broken()));
                }
            }
        }
    }
}

impl Shared {
    /// A request is about to be sent over a connection.
    fn bind(&self, ask: &Ask) {
        if ask.kind == command::FINISHED {
            self.bound.store(true, Relaxed);
        }
    }

    /// The request as it is sent. None if it has failed at once.
    fn enter(&self, ask: Ask) -> Option<Message> {
        let mut pending = locked(&self.pending);
        if ask.kind == command::FLUSH && std::mem::take(&mut pending.lost) {
            drop(pending);
            (ask.tell)(Err(broken()));
            return None;
        }
        let cookie = pending.next;
        pending.next += 1;
        let message = message(&ask, cookie);
        let waiting = Waiting {
            ask,
            before: pending.acknowledged,
            reply: Partial::default(),
        };
        pending.all.insert(cookie, waiting);
        Some(message)
    }

    /// Those that wait, to be sent again.
    fn resend(&self) -> Vec<Message> {
        let mut pending = locked(&self.pending);
        let all = pending.all.iter_mut();
        let again = all.map(|(cookie, waiting)| {
            self.bind(&waiting.ask);
            waiting.reply = Partial::default();
            message(&waiting.ask, *cookie)
        });
        again.collect()
    }

    fn take_unless(&self, stays: impl Fn(&Ask) -> bool) -> Vec<Ask> {
        let mut pending = locked(&self.pending);
        let gone = pending.all.extract_if(|_, w| !stays(&w.ask));
        gone.map(|(_, w)| w.ask).collect()
    }

    /// The connection broke: notes it if something is acknowledged and not durable.
    fn note_lost(&self) {
        let mut pending = locked(&self.pending);
        pending.lost |= pending.flushed < pending.acknowledged;
        pending.flushed = pending.acknowledged;
    }

    fn is_idle(&self) -> bool {
        locked(&self.pending).all.is_empty()
    }

    fn answer(&self, cookie: u64, result: io::Result<Answer>) -> io::Result<()> {
        let mut pending = locked(&self.pending);
        let waiting = pending.all.remove(&cookie);
        let Waiting { ask, before, .. } = waiting.ok_or_else(|| malformed("nobody has asked"))?;
        self.answers.fetch_add(1, Relaxed);
        match ask.kind {
            _ if result.is_err() => {}
            command::WRITE | command::WRITE_ZEROES if ask.flags & command_flag::FUA == 0 => {
                pending.acknowledged += 1;
            }
            command::FLUSH => pending.flushed = pending.flushed.max(before),
            _ => {}
        }
        if pending.all.is_empty() {
            self.idle.notify_waiters();
        }
        drop(pending);
        (ask.tell)(result);
        Ok(())
    }
}

type Message = (Request, Arc<Vec<u8>>);

fn message(ask: &Ask, cookie: u64) -> Message {
    let request = Request {
        flags: ask.flags,
        kind: ask.kind,
        cookie,
        offset: ask.offset,
        len: ask.len,
    };
    (request, ask.data.clone())
}

async fn send(to: &mut OwnedWriteHalf, (request, data): Message) -> io::Result<()> {
    to.write_all(&request.to_bytes()).await?;
    to.write_all(&data).await
}

/// Never.
enum Never {}

async fn take_replies(
    from: &mut OwnedReadHalf,
    shared: &Shared,
    offered: &Offered,
) -> io::Result<Never> {
    let mut from = tokio::io::BufReader::with_capacity(64 << 10, from);
    loop {
        let magic = from.read_u32().await?;
        match magic {
            wire::SIMPLE_REPLY_MAGIC => {
                let (error, cookie) = (from.read_u32().await?, from.read_u64().await?);
                let (kind, len) = shared.asked(cookie)?;
                if kind == command::BLOCK_STATUS && error == 0
                    || kind == command::READ && offered.structured && error == 0
                {
                    return Err(malformed("it should be structured"));
                }
                let answer = match (error, kind) {
                    (0, command::READ) => {
                        let mut data = vec![0; len as usize];
                        from.read_exact(&mut data).await?;
                        Ok(Answer::Data(data))
                    }
                    (0, _) => Ok(Answer::Done),
                    (error, _) => Err(wire::error_from_wire(error)),
                };
                shared.answer(cookie, answer)?;
            }
            wire::CHUNK_MAGIC if offered.structured => {
                let (flags, kind) = (from.read_u16().await?, from.read_u16().await?);
                let (cookie, len) = (from.read_u64().await?, from.read_u32().await?);
                if len > MAX_PAYLOAD + 64 {
                    return Err(malformed("it is too long"));
                }
                let (asked, wanted) = shared.asked(cookie)?;
                if kind == chunk::OFFSET_DATA && asked == command::READ && len > 8 {
                    let offset = from.read_u64().await?;
                    let (mut data, at) = shared.room(cookie, offset, len - 8)?;
                    from.read_exact(&mut data[at..at + len as usize - 8])
                        .await?;
                    shared.filled(cookie, data, len as usize - 8);
                } else {
                    let mut payload = vec![0; len as usize];
                    from.read_exact(&mut payload).await?;
                    shared.take_chunk(cookie, kind, asked, wanted, &payload, offered)?;
                }
                if flags & chunk::DONE != 0 {
                    shared.finish(cookie)?;
                }
            }
            _ => return Err(malformed("it begins otherwise")),
        }
    }
}

impl Shared {
    /// Kind and length of a request.
    fn asked(&self, cookie: u64) -> io::Result<(u16, u32)> {
        let pending = locked(&self.pending);
        let waiting = pending.all.get(&cookie);
        let ask = &waiting.ok_or_else(|| malformed("nobody has asked"))?.ask;
        Ok((ask.kind, ask.len))
    }

    /// The buffer of a read, and where in it the piece at this offset of the disk goes.
    fn room(&self, cookie: u64, offset: u64, len: u32) -> io::Result<(Vec<u8>, usize)> {
        let mut pending = locked(&self.pending);
        let waiting = pending.all.get_mut(&cookie);
        let Waiting { ask, reply, .. } = waiting.ok_or_else(|| malformed("nobody has asked"))?;
        let at = offset.checked_sub(ask.offset);
        let at = at.filter(|at| {
            at.checked_add(len.into())
                .is_some_and(|end| end <= ask.len.into())
                && reply.filled + len as usize <= ask.len as usize
        });
        let at = at.ok_or_else(|| malformed("it has data that nobody has asked for"))?;
        let mut data = std::mem::take(&mut reply.data);
        data.resize(ask.len as usize, 0);
        Ok((data, at as usize))
    }

    fn filled(&self, cookie: u64, data: Vec<u8>, len: usize) {
        if let Some(waiting) = locked(&self.pending).all.get_mut(&cookie) {
            waiting.reply.data = data;
            waiting.reply.filled += len;
        }
    }

    fn take_chunk(
        &self,
        cookie: u64,
        kind: u16,
        asked: u16,
        wanted: u32,
        payload: &[u8],
        offered: &Offered,
    ) -> io::Result<()> {
        let mut r = Reader(payload);
        let short = || malformed("it is too short");
        match kind {
            chunk::NONE => {}
            chunk::OFFSET_HOLE if asked == command::READ => {
                let (offset, len) = (r.u64().ok_or_else(short)?, r.u32().ok_or_else(short)?);
                // The buffer has zeroes where nothing was put.
                let (data, _) = self.room(cookie, offset, len)?;
                self.filled(cookie, data, len as usize);
            }
            chunk::BLOCK_STATUS if asked == command::BLOCK_STATUS => {
                match r.u32() {
                    id if id == offered.allocation => {}
                    id if id.is_some() && id == offered.finished => return Ok(()),
                    _ => return Err(malformed("it is of another context")),
                }
                let (mut extents, mut sum) = (Vec::new(), 0u64);
                while let (Some(len), Some(state)) = (r.u32(), r.u32()) {
                    // The last one may tell of more than was asked for.
                    let rest = u64::from(wanted).saturating_sub(sum).min(len.into());
                    sum += rest;
                    if rest > 0 {
                        extents.push((rest as u32, state));
                    }
                }
                if let Some(waiting) = locked(&self.pending).all.get_mut(&cookie) {
                    waiting.reply.extents = Some(extents);
                }
            }
            kind if kind & chunk::ERROR_BIT != 0 => {
                let error = r.u32().ok_or_else(short)?;
                if let Some(waiting) = locked(&self.pending).all.get_mut(&cookie) {
                    waiting.reply.error.get_or_insert(error);
                }
            }
            _ => return Err(malformed("it has a chunk that does not belong there")),
        }
        Ok(())
    }

    /// The last chunk of a reply has come.
    fn finish(&self, cookie: u64) -> io::Result<()> {
        let answer = {
            let mut pending = locked(&self.pending);
            let waiting = pending.all.get_mut(&cookie);
            let Waiting { ask, reply, .. } =
                waiting.ok_or_else(|| malformed("nobody has asked"))?;
            let reply = std::mem::take(reply);
            match (reply.error, ask.kind) {
                (Some(error), _) => Err(wire::error_from_wire(error)),
                (None, command::READ) if reply.filled != ask.len as usize => {
                    return Err(malformed("data is missing"));
                }
                (None, command::READ) => Ok(Answer::Data(reply.data)),
                (None, command::BLOCK_STATUS) => match reply.extents {
                    Some(extents) if !extents.is_empty() => Ok(Answer::Extents(extents)),
                    _ => return Err(malformed("the status is missing")),
                },
                (None, _) => Ok(Answer::Done),
            }
        };
        self.answer(cookie, answer)
    }
}
