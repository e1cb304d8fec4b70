//! Requests of a virtio-blk driver (section 5.2.6).

use crate::ring::Chain;

/// The unit of every position and length in a request, in bytes.
pub const SECTOR_SIZE: u64 = 512;

/// Length of the string that GET_ID returns, in bytes.
pub const SERIAL_LEN: usize = 20;

const HEADER_LEN: usize = 16;
const SEGMENT_LEN: usize = 16;

const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const T_GET_ID: u32 = 8;
const T_DISCARD: u32 = 11;
const T_WRITE_ZEROES: u32 = 13;

/// Frees the range if it can, in a write zeroes segment.
const SEGMENT_F_UNMAP: u32 = 1;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RequestKind {
    In,
    Out,
    Flush,
    GetId,
    Discard,
    WriteZeroes,
    /// A type that is not known here.
    Other(u32),
}

/// A chain that cannot even be answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    #[error("a virtio-blk request has {0} readable bytes, too few for its 16-byte header")]
    NoHeader(usize),
    #[error("a virtio-blk request has no writable byte for its status")]
    NoStatus,
}

/// A request: its header, and where in the chain its data is. Made once, and filled again for each request.
#[derive(Clone, Copy, Debug)]
pub struct ParsedRequest {
    pub kind: RequestKind,
    /// First sector of a read or a write.
    pub sector: u64,
    /// The data segments, as a range of [`Chain::segments`]: what the device writes for a read, what it
    /// reads for everything else.
    pub first: usize,
    pub count: usize,
    /// Bytes in them.
    pub len: u64,
    /// Where the status goes.
    pub status: *mut u8,
}

impl Default for ParsedRequest {
    fn default() -> ParsedRequest {
        ParsedRequest {
            kind: RequestKind::Flush,
            sector: 0,
            first: 0,
            count: 0,
            len: 0,
            status: std::ptr::null_mut(),
        }
    }
}

impl ParsedRequest {
    /// Parses the chain and trims its first readable and last writable segment so that only data is left
    /// in the range. Header and status may lie in segments of any layout.
    #[inline]
    pub fn parse(chain: &mut Chain) -> Result<ParsedRequest, Malformed> {
        let mut request = ParsedRequest::default();
        request.fill(chain)?;
        Ok(request)
    }

    /// As [`ParsedRequest::parse`], in place: nothing waits for the header, which lies in another CPU's cache, before the next request is
    /// looked at.
    #[inline]
    pub fn fill(&mut self, chain: &mut Chain) -> Result<(), Malformed> {
        let readable = chain.readable;
        let total = chain.segments.len();
        let (header, mut first) = match chain.segments[..readable].first() {
            Some(v) if v.iov_len == HEADER_LEN => {
                // SAFETY: the segment is 16 bytes of mapped guest memory; it may be unaligned.
                let h = unsafe { v.iov_base.cast::<[u8; HEADER_LEN]>().read_unaligned() };
                (h, 1)
            }
            _ => split_header(&mut chain.segments[..readable])?,
        };
        // The status is the last byte of the writable part.
        let (status, mut last) = match chain.segments[readable..].last_mut() {
            None => return Err(Malformed::NoStatus),
            Some(v) => {
                v.iov_len -= 1;
                let at = v.iov_base.cast::<u8>().wrapping_add(v.iov_len);
                (at, if v.iov_len == 0 { total - 1 } else { total })
            }
        };
        self.kind = match u32::from_le_bytes([header[0], header[1], header[2], header[3]]) {
            T_IN => RequestKind::In,
            T_OUT => RequestKind::Out,
            T_FLUSH => RequestKind::Flush,
            T_GET_ID => RequestKind::GetId,
            T_DISCARD => RequestKind::Discard,
            T_WRITE_ZEROES => RequestKind::WriteZeroes,
            other => RequestKind::Other(other),
        };
        match self.kind {
            RequestKind::In | RequestKind::GetId => first = readable,
            _ => last = readable,
        }
        let data = &chain.segments[first..last];
        self.sector = u64::from_le_bytes([
            header[8], header[9], header[10], header[11], header[12], header[13], header[14],
            header[15],
        ]);
        self.first = first;
        self.count = data.len();
        self.len = data.iter().map(|v| v.iov_len as u64).sum();
        self.status = status;
        Ok(())
    }
}

/// Takes the header out of segments of any lengths. Returns it and the first segment that has data.
#[cold]
fn split_header(segments: &mut [libc::iovec]) -> Result<([u8; HEADER_LEN], usize), Malformed> {
    let mut header = [0; HEADER_LEN];
    let mut have = 0;
    for (i, v) in segments.iter_mut().enumerate() {
        let n = v.iov_len.min(HEADER_LEN - have);
        // SAFETY: `n` bytes of a mapped segment go to the free part of `header`.
        unsafe {
            std::ptr::copy_nonoverlapping(v.iov_base.cast::<u8>(), header.as_mut_ptr().add(have), n)
        };
        have += n;
        v.iov_base = v.iov_base.cast::<u8>().wrapping_add(n).cast();
        v.iov_len -= n;
        if have == HEADER_LEN {
            return Ok((header, if v.iov_len == 0 { i + 1 } else { i }));
        }
    }
    Err(Malformed::NoHeader(have))
}

/// One range of a discard or write zeroes request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RangeSegment {
    pub sector: u64,
    pub sectors: u32,
    /// The range may be freed.
    pub unmap: bool,
    /// Flag bits that are not defined.
    pub unknown_flags: u32,
}

/// The ranges of a discard or write zeroes request; None if its data is not a whole number of them or
/// there are more than `max`.
pub fn read_segments(data: &[libc::iovec], max: usize) -> Option<Vec<RangeSegment>> {
    let len: usize = data.iter().map(|v| v.iov_len).sum();
    if len == 0 || !len.is_multiple_of(SEGMENT_LEN) || len / SEGMENT_LEN > max {
        return None;
    }
    let mut bytes = vec![0u8; len];
    let mut at = 0;
    for v in data {
        // SAFETY: each segment is mapped; their lengths add up to that of `bytes`.
        unsafe {
            std::ptr::copy_nonoverlapping(
                v.iov_base.cast::<u8>(),
                bytes.as_mut_ptr().add(at),
                v.iov_len,
            )
        };
        at += v.iov_len;
    }
    let (entries, _) = bytes.as_chunks::<SEGMENT_LEN>();
    let parse = |e: &[u8; SEGMENT_LEN]| {
        let word = |i: usize| u32::from_le_bytes([e[i], e[i + 1], e[i + 2], e[i + 3]]);
        let flags = word(12);
        RangeSegment {
            sector: u64::from(word(0)) | u64::from(word(4)) << 32,
            sectors: word(8),
            unmap: flags & SEGMENT_F_UNMAP != 0,
            unknown_flags: flags & !SEGMENT_F_UNMAP,
        }
    };
    Some(entries.iter().map(parse).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Built {
        _mem: Vec<Vec<u8>>,
        chain: Chain,
    }

    fn build(readable: &[Vec<u8>], writable: &[usize]) -> Built {
        let mut mem: Vec<Vec<u8>> = readable.to_vec();
        mem.extend(writable.iter().map(|n| vec![0xee; *n]));
        let segments = mem
            .iter_mut()
            .map(|v| libc::iovec {
                iov_base: v.as_mut_ptr().cast(),
                iov_len: v.len(),
            })
            .collect();
        Built {
            chain: Chain {
                head: 0,
                segments,
                readable: readable.len(),
            },
            _mem: mem,
        }
    }

    fn header(kind: u32, sector: u64) -> Vec<u8> {
        let mut h = kind.to_le_bytes().to_vec();
        h.extend([0; 4]);
        h.extend(sector.to_le_bytes());
        h
    }

    #[test]
    fn usual_layout() {
        let mut b = build(&[header(0, 77)], &[4096, 512, 1]);
        let r = ParsedRequest::parse(&mut b.chain).unwrap();
        assert_eq!((r.kind, r.sector, r.len), (RequestKind::In, 77, 4608));
        assert_eq!((r.first, r.count), (1, 2));
        let mut b = build(&[header(1, 5), vec![9; 512]], &[1]);
        let r = ParsedRequest::parse(&mut b.chain).unwrap();
        assert_eq!(
            (r.kind, r.len, r.first, r.count),
            (RequestKind::Out, 512, 1, 1)
        );
    }

    #[test]
    fn any_layout() {
        // Header in three parts with data behind it; status at the end of the data.
        let h = header(0, 3);
        let mut b = build(&[h[..1].into(), h[1..9].into(), h[9..].into()], &[512 + 1]);
        let r = ParsedRequest::parse(&mut b.chain).unwrap();
        assert_eq!((r.kind, r.sector, r.len), (RequestKind::In, 3, 512));
        let mut one = header(1, 3);
        one.extend([1; 1024]);
        let mut b = build(&[one], &[1]);
        let r = ParsedRequest::parse(&mut b.chain).unwrap();
        assert_eq!(
            (r.kind, r.len, r.first, r.count),
            (RequestKind::Out, 1024, 0, 1)
        );
    }

    #[test]
    fn what_cannot_be_answered_is_malformed() {
        let mut b = build(&[vec![0; 15]], &[1]);
        assert_eq!(
            ParsedRequest::parse(&mut b.chain).unwrap_err(),
            Malformed::NoHeader(15)
        );
        let mut b = build(&[header(0, 0)], &[]);
        assert_eq!(
            ParsedRequest::parse(&mut b.chain).unwrap_err(),
            Malformed::NoStatus
        );
        let mut b = build(&[], &[]);
        assert!(ParsedRequest::parse(&mut b.chain).is_err());
    }

    #[test]
    fn ranges() {
        let seg = |s: u64, n: u32, f: u32| {
            let mut v = s.to_le_bytes().to_vec();
            v.extend(n.to_le_bytes());
            v.extend(f.to_le_bytes());
            v
        };
        let mut data = seg(8, 16, 1);
        data.extend(seg(1 << 40, 1, 6));
        let (a, c) = data.split_at(5);
        let b = build(&[a.to_vec(), c.to_vec()], &[]);
        let got = read_segments(&b.chain.segments, 2).unwrap();
        assert_eq!(
            got[0],
            RangeSegment {
                sector: 8,
                sectors: 16,
                unmap: true,
                unknown_flags: 0
            }
        );
        assert_eq!(
            got[1],
            RangeSegment {
                sector: 1 << 40,
                sectors: 1,
                unmap: false,
                unknown_flags: 6
            }
        );
        assert_eq!(read_segments(&b.chain.segments, 1), None);
        assert_eq!(
            read_segments(&build(&[a.to_vec()], &[]).chain.segments, 9),
            None
        );
        assert_eq!(read_segments(&[], 9), None);
    }
}
