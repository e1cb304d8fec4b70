//! The messages of the vhost-user protocol (vhost-user specification, "Message specification"), as a
//! back-end sees them. All numbers are in native byte order.

use vdisk_virtio::RingAddresses;

/// Bytes of a header: request, flags, payload size, each a u32.
pub const HEADER_LEN: usize = 12;

/// No message that a front-end may send has a longer payload: the largest is a memory table.
pub const MAX_PAYLOAD: usize = 4096;

/// Most descriptors that come with one message.
pub const MAX_FDS: usize = 8;

/// Memory slots offered (the kernel's vhost has 509 at most; QEMU asks for as many as it needs).
pub const MAX_MEM_SLOTS: u64 = 509;

const VERSION: u32 = 1;
const FLAG_VERSION_MASK: u32 = 3;
const FLAG_REPLY: u32 = 4;
const FLAG_NEED_REPLY: u32 = 8;

const CONFIG_MAX: usize = 256;

/// Protocol features, as bits.
pub mod protocol {
    pub const MQ: u64 = 1 << 0;
    pub const LOG_SHMFD: u64 = 1 << 1;
    pub const REPLY_ACK: u64 = 1 << 3;
    pub const BACKEND_REQ: u64 = 1 << 5;
    pub const CONFIG: u64 = 1 << 9;
    pub const INFLIGHT_SHMFD: u64 = 1 << 12;
    pub const RESET_DEVICE: u64 = 1 << 13;
    pub const CONFIGURE_MEM_SLOTS: u64 = 1 << 15;

    /// What this back-end offers.
    pub const OFFERED: u64 = MQ
        | LOG_SHMFD
        | REPLY_ACK
        | BACKEND_REQ
        | CONFIG
        | INFLIGHT_SHMFD
        | RESET_DEVICE
        | CONFIGURE_MEM_SLOTS;
}

/// `VHOST_F_LOG_ALL` and `VHOST_USER_F_PROTOCOL_FEATURES` among the virtio features.
pub const F_LOG_ALL: u64 = 1 << 26;
pub const F_PROTOCOL_FEATURES: u64 = 1 << 30;

/// `VHOST_VRING_F_LOG` in the flags of a ring's addresses.
pub const VRING_F_LOG: u32 = 1;

/// No file descriptor comes with a SET_VRING_KICK, CALL or ERR.
const NO_FD: u64 = 1 << 8;

#[derive(Debug, thiserror::Error)]
pub enum ProtocolError {
    #[error("the front-end closed the connection in the middle of a message")]
    Truncated,
    #[error("message flags {0:#x} are not of protocol version 1")]
    Version(u32),
    #[error("request {request} has a payload of {len} bytes, which is not possible")]
    Size { request: u32, len: usize },
    #[error("request {0} is not known")]
    Unknown(u32),
    #[error("request {request} came with {have} file descriptors; expected {want}")]
    Fds {
        request: u32,
        have: usize,
        want: usize,
    },
    #[error("request {request} names queue {queue}; there are {count}")]
    Queue {
        request: u32,
        queue: u32,
        count: u16,
    },
    #[error("{0}")]
    Invalid(String),
    #[error("the front-end does not read its replies")]
    Stuck,
    #[error("the front-end left while its guest waited")]
    Gone,
    /// Nothing that it did: it may connect again, and try once more.
    #[error("{0}")]
    NotReady(vdisk_api::Error),
    #[error("the connection failed: {0}")]
    Io(#[from] std::io::Error),
}

/// One region of a memory table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryRegion {
    pub guest_addr: u64,
    pub size: u64,
    pub user_addr: u64,
    pub mmap_offset: u64,
}

/// The addresses of a ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VringAddr {
    pub index: u32,
    pub flags: u32,
    pub addresses: RingAddresses,
    pub log: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InflightDesc {
    pub mmap_size: u64,
    pub mmap_offset: u64,
    pub num_queues: u16,
    pub queue_size: u16,
}

/// A request of a front-end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    GetFeatures,
    SetFeatures(u64),
    SetOwner,
    ResetOwner,
    SetMemTable(Vec<MemoryRegion>),
    SetLogBase { size: u64, offset: u64 },
    SetLogFd,
    SetVringNum { index: u32, num: u32 },
    SetVringAddr(VringAddr),
    SetVringBase { index: u32, base: u32 },
    GetVringBase { index: u32 },
    SetVringKick { index: u32, has_fd: bool },
    SetVringCall { index: u32, has_fd: bool },
    SetVringErr { index: u32, has_fd: bool },
    GetProtocolFeatures,
    SetProtocolFeatures(u64),
    GetQueueNum,
    SetVringEnable { index: u32, enable: bool },
    SetBackendReqFd,
    GetConfig { offset: u32, size: u32, flags: u32 },
    SetConfig { offset: u32, data: Vec<u8> },
    GetInflightFd(InflightDesc),
    SetInflightFd(InflightDesc),
    ResetDevice,
    GetMaxMemSlots,
    AddMemReg(MemoryRegion),
    RemMemReg(MemoryRegion),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    pub request: u32,
    pub flags: u32,
    pub len: usize,
}

impl Header {
    pub fn parse(bytes: &[u8; HEADER_LEN]) -> Result<Header, ProtocolError> {
        let word =
            |i: usize| u32::from_ne_bytes([bytes[i], bytes[i + 1], bytes[i + 2], bytes[i + 3]]);
        let h = Header {
            request: word(0),
            flags: word(4),
            len: word(8) as usize,
        };
        if h.flags & FLAG_VERSION_MASK != VERSION || h.flags & FLAG_REPLY != 0 {
            return Err(ProtocolError::Version(h.flags));
        }
        if h.len > MAX_PAYLOAD {
            return Err(ProtocolError::Size {
                request: h.request,
                len: h.len,
            });
        }
        Ok(h)
    }

    pub fn needs_reply(&self) -> bool {
        self.flags & FLAG_NEED_REPLY != 0
    }
}

/// The bytes of a message to the front-end.
pub fn encode(request: u32, is_reply: bool, payload: &[u8]) -> Vec<u8> {
    let flags = VERSION | if is_reply { FLAG_REPLY } else { 0 };
    let mut out = Vec::with_capacity(HEADER_LEN + payload.len());
    for word in [request, flags, payload.len() as u32] {
        out.extend(word.to_ne_bytes());
    }
    out.extend(payload);
    out
}

/// `VHOST_USER_BACKEND_CONFIG_CHANGE_MSG`, on the back-end's own channel.
pub fn config_change() -> Vec<u8> {
    encode(2, false, &[])
}

/// Reads a payload from its start.
struct Payload<'a> {
    request: u32,
    whole: usize,
    rest: &'a [u8],
}

impl Payload<'_> {
    fn error(&self) -> ProtocolError {
        ProtocolError::Size {
            request: self.request,
            len: self.whole,
        }
    }

    fn take<const N: usize>(&mut self) -> Result<[u8; N], ProtocolError> {
        let (head, rest) = self.rest.split_first_chunk().ok_or_else(|| self.error())?;
        self.rest = rest;
        Ok(*head)
    }

    fn u16(&mut self) -> Result<u16, ProtocolError> {
        self.take().map(u16::from_ne_bytes)
    }

    fn u32(&mut self) -> Result<u32, ProtocolError> {
        self.take().map(u32::from_ne_bytes)
    }

    fn u64(&mut self) -> Result<u64, ProtocolError> {
        self.take().map(u64::from_ne_bytes)
    }

    fn region(&mut self) -> Result<MemoryRegion, ProtocolError> {
        Ok(MemoryRegion {
            guest_addr: self.u64()?,
            size: self.u64()?,
            user_addr: self.u64()?,
            mmap_offset: self.u64()?,
        })
    }

    fn inflight(&mut self) -> Result<InflightDesc, ProtocolError> {
        Ok(InflightDesc {
            mmap_size: self.u64()?,
            mmap_offset: self.u64()?,
            num_queues: self.u16()?,
            queue_size: self.u16()?,
        })
    }
}

impl Request {
    /// Parses a payload. How many descriptors a request needs is in [`Request::fds`].
    pub fn parse(request: u32, payload: &[u8]) -> Result<Request, ProtocolError> {
        let mut p = Payload {
            request,
            whole: payload.len(),
            rest: payload,
        };
        let parsed = match request {
            1 => Request::GetFeatures,
            2 => Request::SetFeatures(p.u64()?),
            3 => Request::SetOwner,
            4 => Request::ResetOwner,
            5 => {
                let count = p.u32()? as usize;
                p.u32()?;
                if count > MAX_FDS {
                    return Err(p.error());
                }
                Request::SetMemTable((0..count).map(|_| p.region()).collect::<Result<_, _>>()?)
            }
            6 => Request::SetLogBase {
                size: p.u64()?,
                offset: p.u64()?,
            },
            7 => Request::SetLogFd,
            8 => Request::SetVringNum {
                index: p.u32()?,
                num: p.u32()?,
            },
            9 => {
                let (index, flags) = (p.u32()?, p.u32()?);
                let (desc, used, avail) = (p.u64()?, p.u64()?, p.u64()?);
                Request::SetVringAddr(VringAddr {
                    index,
                    flags,
                    addresses: RingAddresses { desc, avail, used },
                    log: p.u64()?,
                })
            }
            10 => Request::SetVringBase {
                index: p.u32()?,
                base: p.u32()?,
            },
            11 => {
                let index = p.u32()?;
                p.u32()?;
                Request::GetVringBase { index }
            }
            12..=14 => {
                let v = p.u64()?;
                let (index, has_fd) = ((v & 0xff) as u32, v & NO_FD == 0);
                match request {
                    12 => Request::SetVringKick { index, has_fd },
                    13 => Request::SetVringCall { index, has_fd },
                    _ => Request::SetVringErr { index, has_fd },
                }
            }
            15 => Request::GetProtocolFeatures,
            16 => Request::SetProtocolFeatures(p.u64()?),
            17 => Request::GetQueueNum,
            18 => {
                let (index, enable) = (p.u32()?, p.u32()?);
                if enable > 1 {
                    return Err(ProtocolError::Invalid(format!(
                        "SET_VRING_ENABLE of queue {index} with {enable}, neither 0 nor 1"
                    )));
                }
                Request::SetVringEnable {
                    index,
                    enable: enable == 1,
                }
            }
            21 => Request::SetBackendReqFd,
            24 | 25 => {
                let (offset, size, flags) = (p.u32()?, p.u32()?, p.u32()?);
                let data = std::mem::take(&mut p.rest);
                if data.len() != size as usize || data.len() > CONFIG_MAX {
                    return Err(p.error());
                }
                if request == 24 {
                    Request::GetConfig {
                        offset,
                        size,
                        flags,
                    }
                } else {
                    Request::SetConfig {
                        offset,
                        data: data.to_vec(),
                    }
                }
            }
            31 => Request::GetInflightFd(p.inflight()?),
            32 => Request::SetInflightFd(p.inflight()?),
            34 => Request::ResetDevice,
            36 => Request::GetMaxMemSlots,
            37 | 38 => {
                p.u64()?;
                let region = p.region()?;
                if request == 37 {
                    Request::AddMemReg(region)
                } else {
                    Request::RemMemReg(region)
                }
            }
            _ => return Err(ProtocolError::Unknown(request)),
        };
        // Alignment of the last structure may have added bytes; anything longer is a mistake.
        if p.rest.len() >= 8 {
            return Err(p.error());
        }
        Ok(parsed)
    }

    /// It changes nothing of what was negotiated.
    pub fn only_asks(&self) -> bool {
        matches!(
            self,
            Request::GetFeatures
                | Request::GetProtocolFeatures
                | Request::GetQueueNum
                | Request::GetMaxMemSlots
                | Request::GetConfig { .. }
                | Request::SetOwner
        )
    }

    /// How many descriptors come with it; None where any number is accepted (and unused).
    pub fn fds(&self) -> Option<usize> {
        match self {
            Request::SetMemTable(regions) => Some(regions.len()),
            Request::SetLogBase { .. }
            | Request::SetLogFd
            | Request::SetBackendReqFd
            | Request::SetInflightFd(_)
            | Request::AddMemReg(_) => Some(1),
            Request::SetVringKick { has_fd, .. }
            | Request::SetVringCall { has_fd, .. }
            | Request::SetVringErr { has_fd, .. } => Some(usize::from(*has_fd)),
            // QEMU sends the region's descriptor along.
            Request::RemMemReg(_) => None,
            _ => Some(0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_checked() {
        let bytes = |words: [u32; 3]| -> [u8; 12] {
            let v: Vec<u8> = words.iter().flat_map(|w| w.to_ne_bytes()).collect();
            v.try_into().unwrap()
        };
        let h = Header::parse(&bytes([5, 1 | 8, 100])).unwrap();
        assert!(h.needs_reply() && h.request == 5 && h.len == 100);
        assert!(Header::parse(&bytes([5, 0, 0])).is_err());
        assert!(Header::parse(&bytes([5, 1 | 4, 0])).is_err());
        assert!(Header::parse(&bytes([5, 1, 4097])).is_err());
    }

    #[test]
    fn payloads_are_checked() {
        let words = |w: &[u64]| -> Vec<u8> { w.iter().flat_map(|w| w.to_ne_bytes()).collect() };
        assert_eq!(
            Request::parse(2, &words(&[7])).unwrap(),
            Request::SetFeatures(7)
        );
        assert!(Request::parse(2, &words(&[])).is_err());
        assert!(Request::parse(2, &words(&[1, 2])).is_err());
        assert!(Request::parse(99, &[]).is_err());
        // A memory table of more regions than its bytes hold.
        assert!(Request::parse(5, &words(&[8, 1, 2, 3, 4])).is_err());
        assert!(Request::parse(5, &words(&[u64::MAX])).is_err());
        assert_eq!(
            Request::parse(12, &words(&[0x103])).unwrap(),
            Request::SetVringKick {
                index: 3,
                has_fd: false
            }
        );
    }
}
