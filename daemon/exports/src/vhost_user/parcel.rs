//! A connection as one file descriptor: a socket with a message in its buffer that has the negotiated state, and all
//! descriptors that belong to it. Whoever looks at it leaves it as it is.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, socketpair,
};
use serde::{Deserialize, Serialize};

use super::state::{Descriptors, State, VringDescriptors};

/// Descriptors in one message (SCM_MAX_FD of Linux).
const MAX_FDS: usize = 253;

/// Bytes of a message: 509 regions and 64 queues take less.
const MAX_BYTES: usize = 192 << 10;

const VERSION: u32 = 1;

/// Where the descriptors of a queue are among those of the message.
#[derive(Default, Serialize, Deserialize)]
struct Vring {
    kick: Option<usize>,
    call: Option<usize>,
    err: Option<usize>,
}

#[derive(Serialize, Deserialize)]
struct Content {
    version: u32,
    state: State,
    connection: usize,
    regions: Vec<usize>,
    vrings: Vec<Vring>,
    inflight: Option<usize>,
    log: Option<usize>,
    backend: Option<usize>,
    #[serde(default)]
    mark: Option<usize>,
}

fn invalid(message: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, message)
}

pub(super) fn pack(
    state: &State,
    fds: &Descriptors,
    connection: BorrowedFd<'_>,
) -> io::Result<OwnedFd> {
    let mut all: Vec<BorrowedFd<'_>> = vec![connection];
    // Regions of one file need it once.
    let mut files: Vec<(u64, u64, usize)> = Vec::new();
    let mut regions = Vec::new();
    for fd in &fds.regions {
        let stat = rustix::fs::fstat(fd)?;
        let id = (stat.st_dev, stat.st_ino);
        let known = files.iter().find(|(dev, ino, _)| (*dev, *ino) == id);
        regions.push(match known {
            Some((_, _, at)) => *at,
            None => {
                all.push(fd.as_fd());
                files.push((id.0, id.1, all.len() - 1));
                all.len() - 1
            }
        });
    }
    let mut vrings = Vec::new();
    for v in &fds.vrings {
        let mut places = [None; 3];
        for (place, fd) in places.iter_mut().zip([&v.kick, &v.call, &v.err]) {
            if let Some(fd) = fd {
                all.push(fd.as_fd());
                *place = Some(all.len() - 1);
            }
        }
        let [kick, call, err] = places;
        vrings.push(Vring { kick, call, err });
    }
    let mut rest = [None; 4];
    let last = [&fds.inflight, &fds.log, &fds.backend, &fds.mark];
    for (place, fd) in rest.iter_mut().zip(last) {
        if let Some(fd) = fd {
            all.push(fd.as_fd());
            *place = Some(all.len() - 1);
        }
    }
    let [inflight, log, backend, mark] = rest;
    let content = Content {
        version: VERSION,
        state: state.clone(),
        connection: 0,
        regions,
        vrings,
        inflight,
        log,
        backend,
        mark,
    };
    let bytes = serde_json::to_vec(&content).map_err(io::Error::other)?;
    if all.len() > MAX_FDS || bytes.len() > MAX_BYTES {
        return Err(io::Error::other(format!(
            "{} descriptors are more than can be kept together",
            all.len()
        )));
    }
    seal(&bytes, &all)
}

/// A socket that has a message with descriptors.
fn seal(bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<OwnedFd> {
    let (ours, parcel) = socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        None,
    )?;
    let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    control.push(SendAncillaryMessage::ScmRights(fds));
    rustix::net::sendmsg(
        ours,
        &[IoSlice::new(bytes)],
        &mut control,
        SendFlags::NOSIGNAL,
    )?;
    Ok(parcel)
}

/// Puts a descriptor in a parcel of its own: systemd's FD store takes an open file only once, and this is always another.
pub fn wrap(fd: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    seal(b"fd", &[fd])
}

/// A copy of what [`wrap`] has put in a parcel.
pub fn unwrap(parcel: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let (_, mut fds) = look(parcel)?;
    let fd = fds.pop().flatten();
    fd.ok_or_else(|| invalid("a descriptor is missing"))
}

/// What is in a parcel, which stays as it is.
fn look(parcel: BorrowedFd<'_>) -> io::Result<(Vec<u8>, Vec<Option<OwnedFd>>)> {
    let mut bytes = vec![0; MAX_BYTES];
    let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = rustix::net::recvmsg(
        parcel,
        &mut [IoSliceMut::new(&mut bytes)],
        &mut control,
        RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT | RecvFlags::PEEK,
    )?;
    let mut all: Vec<Option<OwnedFd>> = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            all.extend(rights.map(Some));
        }
    }
    bytes.truncate(received.bytes);
    Ok((bytes, all))
}

/// What is in a parcel: the state, its descriptors, and the connection itself.
pub(super) fn unpack(parcel: BorrowedFd<'_>) -> io::Result<(State, Descriptors, OwnedFd)> {
    let (bytes, mut all) = look(parcel)?;
    let content: Content = serde_json::from_slice(&bytes)
        .map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))?;
    if content.version != VERSION {
        return Err(invalid("it was made by another version of the daemon"));
    }
    // Regions share files.
    let mut regions = Vec::new();
    for at in &content.regions {
        let fd = all.get(*at).and_then(Option::as_ref);
        regions.push(
            fd.ok_or_else(|| invalid("a memory region is missing"))?
                .try_clone()?,
        );
    }
    let mut take = |at: Option<usize>| match at {
        None => Ok(None),
        Some(at) => match all.get_mut(at).and_then(Option::take) {
            Some(fd) => Ok(Some(fd)),
            None => Err(invalid("a descriptor is missing")),
        },
    };
    let mut vrings = Vec::new();
    for v in &content.vrings {
        vrings.push(VringDescriptors {
            kick: take(v.kick)?,
            call: take(v.call)?,
            err: take(v.err)?,
        });
    }
    let fds = Descriptors {
        regions,
        vrings,
        inflight: take(content.inflight)?,
        log: take(content.log)?,
        backend: take(content.backend)?,
        mark: take(content.mark)?,
    };
    let connection = take(Some(content.connection))?;
    let connection = connection.ok_or_else(|| invalid("the connection is missing"))?;
    Ok((content.state, fds, connection))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vhost_user::state::RegionState;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    #[test]
    fn a_parcel_can_be_looked_at_again_and_again() {
        let (mut here, there) = UnixStream::pair().unwrap();
        let memory = tempfile::tempfile().unwrap();
        let mut state = State::new(2, true);
        let mut fds = Descriptors::new(2);
        for i in 0..2 {
            state.regions.push(RegionState {
                guest_addr: i << 32,
                size: 4096,
                user_addr: 0,
                mmap_offset: 0,
            });
            fds.regions.push(memory.try_clone().unwrap().into());
        }
        let (event, other) = UnixStream::pair().unwrap();
        fds.vrings[1].call = Some(event.into());
        let parcel = pack(&state, &fds, there.as_fd()).unwrap();
        drop((there, fds));
        for round in 0..3u8 {
            let (found, fds, connection) = unpack(parcel.as_fd()).unwrap();
            assert_eq!(found, state);
            assert_eq!(fds.regions.len(), 2);
            assert!(fds.vrings[0].kick.is_none() && fds.vrings[1].kick.is_none());
            let mut call =
                UnixStream::from(fds.vrings[1].call.as_ref().unwrap().try_clone().unwrap());
            call.write_all(&[round]).unwrap();
            let mut byte = [9];
            (&other).read_exact(&mut byte).unwrap();
            assert_eq!(byte, [round]);
            UnixStream::from(connection)
                .write_all(&[round + 1])
                .unwrap();
            here.read_exact(&mut byte).unwrap();
            assert_eq!(byte, [round + 1]);
        }
    }

    #[test]
    fn anything_else_is_refused() {
        let (a, b) = UnixStream::pair().unwrap();
        assert!(unpack(b.as_fd()).is_err());
        (&a).write_all(b"{\"version\": 7}").unwrap();
        assert!(unpack(b.as_fd()).is_err());
    }
}
