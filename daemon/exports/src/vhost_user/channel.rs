//! A Unix socket that carries messages with file descriptors.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::event::EventfdFlags;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};
use tokio::io::Interest;
use tokio::net::UnixStream;

use super::message::{HEADER_LEN, Header, MAX_FDS, ProtocolError};

pub struct Channel {
    socket: UnixStream,
    /// Whether a message is being read or answered: the next process must not go on in the middle of it.
    in_message: AtomicBool,
    /// An eventfd that says the same.
    mark: OnceLock<OwnedFd>,
}

impl Channel {
    pub fn new(stream: UnixStream) -> Channel {
        Channel {
            socket: stream,
            in_message: AtomicBool::new(false),
            mark: OnceLock::new(),
        }
    }

    /// Has a message marked from when its first byte is read until [`Channel::answered`], and the one that is being read or
    /// answered now. Returns the mark, which outlives the process with whoever has it.
    pub fn mark_messages(&self, given: Option<OwnedFd>) -> io::Result<&OwnedFd> {
        if let Some(mark) = self.mark.get() {
            return Ok(mark);
        }
        let mark = match given {
            Some(mark) => mark,
            None => {
                let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
                rustix::event::eventfd(self.in_message.load(Ordering::Relaxed).into(), flags)?
            }
        };
        Ok(self.mark.get_or_init(|| mark))
    }

    fn set_mark(&self) {
        self.in_message.store(true, Ordering::Relaxed);
        if let Some(mark) = self.mark.get() {
            let _ = rustix::io::write(mark, &1u64.to_ne_bytes());
        }
    }

    /// The last message that was received is done with.
    pub fn answered(&self) {
        self.in_message.store(false, Ordering::Relaxed);
        if let Some(mark) = self.mark.get() {
            let _ = rustix::io::read(mark, &mut [0u8; 8][..]);
        }
    }

    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Whether the other side has gone.
    pub fn is_gone(&self) -> bool {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        let mut fds = [PollFd::new(&self.socket, PollFlags::RDHUP)];
        let ready = poll(&mut fds, Some(&Timespec::default())).is_ok_and(|n| n > 0);
        let gone = PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR;
        ready && fds[0].revents().intersects(gone)
    }

    /// Reads until `buf` is full, with the `first` byte of a message or not. Descriptors that come along are added to `fds`.
    async fn read_full(
        &self,
        buf: &mut [u8],
        fds: &mut Vec<OwnedFd>,
        first: bool,
    ) -> io::Result<usize> {
        let mut at = 0;
        while at < buf.len() {
            self.socket.readable().await?;
            let is_first = first && at == 0;
            if is_first {
                self.set_mark();
            }
            let n = self.socket.try_io(Interest::READABLE, || {
                receive(self.socket.as_fd(), &mut buf[at..], fds)
            });
            match n {
                Ok(0) => break,
                Ok(n) => at += n,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    if is_first {
                        self.answered();
                    }
                }
                Err(e) => return Err(e),
            }
        }
        Ok(at)
    }

    /// The next message; None when the front-end closed the connection between messages.
    pub async fn receive(&self) -> Result<Option<(Header, Vec<u8>, Vec<OwnedFd>)>, ProtocolError> {
        let mut fds = Vec::new();
        let mut header = [0; HEADER_LEN];
        match self.read_full(&mut header, &mut fds, true).await {
            Ok(0) => return Ok(None),
            Ok(HEADER_LEN) => {}
            Ok(_) => return Err(ProtocolError::Truncated),
            // How a front-end that was killed looks.
            Err(e) if e.kind() == io::ErrorKind::ConnectionReset => return Ok(None),
            Err(e) => return Err(e.into()),
        }
        let header = Header::parse(&header)?;
        let mut payload = vec![0; header.len];
        if self.read_full(&mut payload, &mut fds, false).await? < header.len {
            return Err(ProtocolError::Truncated);
        }
        Ok(Some((header, payload, fds)))
    }

    pub async fn send(&self, bytes: &[u8], fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let mut at = 0;
        while at < bytes.len() {
            self.socket.writable().await?;
            // The descriptor goes with the first byte.
            let fd = fd.filter(|_| at == 0);
            let n = self.socket.try_io(Interest::WRITABLE, || {
                transmit(self.socket.as_fd(), &bytes[at..], fd)
            });
            match n {
                Ok(n) => at += n,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }
}

fn receive(socket: BorrowedFd<'_>, buf: &mut [u8], fds: &mut Vec<OwnedFd>) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = rustix::net::recvmsg(
        socket,
        &mut [IoSliceMut::new(buf)],
        &mut control,
        RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT,
    )?;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    if fds.len() > MAX_FDS {
        return Err(io::Error::other("more file descriptors than a message has"));
    }
    Ok(received.bytes)
}

/// Sends what fits, with a descriptor.
pub fn transmit(
    socket: BorrowedFd<'_>,
    bytes: &[u8],
    fd: Option<BorrowedFd<'_>>,
) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds;
    if let Some(fd) = fd {
        fds = [fd];
        control.push(SendAncillaryMessage::ScmRights(&fds));
    }
    let n = rustix::net::sendmsg(
        socket,
        &[IoSlice::new(bytes)],
        &mut control,
        SendFlags::NOSIGNAL | SendFlags::DONTWAIT,
    )?;
    Ok(n)
}
