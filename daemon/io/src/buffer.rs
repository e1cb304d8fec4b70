//! Buffers that stay valid while the kernel works on them.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::any::Any;
use std::ptr::NonNull;
use std::rc::Rc;

use crate::give_way::give_way;

/// Bytes that are gone through before others on the I/O thread have their turn.
const PIECE: usize = 1 << 20;

/// Zeroed heap memory with a chosen alignment, for O_DIRECT and bounce buffers.
pub struct AlignedBuf {
    ptr: NonNull<u8>,
    layout: Layout,
}

impl AlignedBuf {
    /// Allocates `len` zero bytes (at least one) aligned to `align`, a power of two.
    ///
    /// # Panics
    /// When `align` is not a power of two or `len` overflows `isize` when rounded up to it; both are
    /// computed by callers from checked block sizes and request lengths.
    pub fn new(len: usize, align: usize) -> AlignedBuf {
        let layout = Layout::from_size_align(len.max(1), align.max(1))
            .expect("block sizes are powers of two and request lengths fit isize");
        // SAFETY: the layout has a non-zero size.
        let ptr = unsafe { alloc_zeroed(layout) };
        let ptr = NonNull::new(ptr).unwrap_or_else(|| handle_alloc_error(layout));
        AlignedBuf { ptr, layout }
    }

    pub fn as_mut_ptr(&self) -> *mut u8 {
        self.ptr.as_ptr()
    }

    pub fn len(&self) -> usize {
        self.layout.size()
    }

    pub fn is_empty(&self) -> bool {
        false
    }

    pub fn as_slice(&self) -> &[u8] {
        // SAFETY: `ptr` is valid for `len` initialised bytes, and whoever has the buffer has nobody else write to it: a list of
        // segments takes it away.
        unsafe { std::slice::from_raw_parts(self.ptr.as_ptr(), self.len()) }
    }

    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as in `as_slice`.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.as_ptr(), self.len()) }
    }
}

// SAFETY: the memory is the buffer's alone, and any thread may free it.
unsafe impl Send for AlignedBuf {}
// SAFETY: what is shared only gives slices that cannot be written to, and pointers.
unsafe impl Sync for AlignedBuf {}

impl Drop for AlignedBuf {
    fn drop(&mut self) {
        // SAFETY: `ptr` came from `alloc_zeroed` with this layout and is freed once.
        unsafe { dealloc(self.ptr.as_ptr(), self.layout) }
    }
}

/// A scatter-gather list together with whatever keeps its memory alive.
///
/// The memory may be shared with a guest that writes to it at any time, so it is never borrowed as a
/// Rust slice: it is copied to and from, byte for byte, through raw pointers.
#[derive(Clone)]
pub struct IoVecs {
    vecs: Vec<libc::iovec>,
    len: usize,
    keep: Rc<dyn Any>,
}

impl IoVecs {
    /// Wraps a list of memory segments.
    ///
    /// # Safety
    /// Every segment must be mapped readable and writable for as long as `keep` is alive.
    pub unsafe fn new(vecs: Vec<libc::iovec>, keep: Rc<dyn Any>) -> IoVecs {
        let len = vecs.iter().map(|v| v.iov_len).sum();
        IoVecs { vecs, len, keep }
    }

    /// A new zeroed buffer of `len` bytes aligned to `align`.
    pub fn zeroed(len: usize, align: usize) -> IoVecs {
        IoVecs::from_buf(AlignedBuf::new(len, align), len)
    }

    /// The first `len` bytes of a buffer, or all of it if it has no more.
    pub fn from_buf(buf: AlignedBuf, len: usize) -> IoVecs {
        let len = len.min(buf.len());
        let vecs = vec![libc::iovec {
            iov_base: buf.as_mut_ptr().cast(),
            iov_len: len,
        }];
        IoVecs {
            vecs,
            len,
            keep: Rc::new(buf),
        }
    }

    /// The buffer that the list was made of, if it is one and nobody else has it; a copy if not.
    pub fn into_buf(self) -> AlignedBuf {
        let copy = |iov: &IoVecs| {
            let mut buf = AlignedBuf::new(iov.len, 1);
            iov.copy_to_slice(0, buf.as_mut_slice());
            buf
        };
        let whole = |iov: &IoVecs, buf: &AlignedBuf| {
            iov.vecs.len() == 1 && iov.vecs[0].iov_base.cast() == buf.as_mut_ptr()
        };
        match self.keep.clone().downcast::<AlignedBuf>() {
            Ok(buf) if whole(&self, &buf) => {
                let IoVecs { vecs, len, keep } = self;
                drop(keep);
                match Rc::try_unwrap(buf) {
                    Ok(buf) => buf,
                    Err(keep) => copy(&IoVecs { vecs, len, keep }),
                }
            }
            _ => copy(&self),
        }
    }

    /// The parts one after the other, sharing their memory.
    pub fn concat(parts: Vec<IoVecs>) -> IoVecs {
        IoVecs {
            vecs: parts.iter().flat_map(|p| p.vecs.iter().copied()).collect(),
            len: parts.iter().map(IoVecs::len).sum(),
            keep: Rc::new(parts),
        }
    }

    /// A copy of all bytes.
    pub fn to_vec(&self) -> Vec<u8> {
        let mut out = vec![0; self.len];
        self.copy_to_slice(0, &mut out);
        out
    }

    /// A new buffer that holds a copy of `data`.
    pub fn from_slice(data: &[u8]) -> IoVecs {
        let v = IoVecs::zeroed(data.len(), 1);
        v.copy_from_slice(0, data);
        v
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub fn segments(&self) -> &[libc::iovec] {
        &self.vecs
    }

    /// The part of `len` bytes at `offset`, sharing the memory.
    ///
    /// # Panics
    /// When the part reaches beyond the end.
    pub fn slice(&self, offset: usize, len: usize) -> IoVecs {
        assert!(
            offset.checked_add(len).is_some_and(|e| e <= self.len),
            "slice {offset}+{len} of {} bytes",
            self.len
        );
        let mut out = Vec::new();
        self.walk(offset, len, |base, n| {
            out.push(libc::iovec {
                iov_base: base.cast(),
                iov_len: n,
            })
        });
        IoVecs {
            vecs: out,
            len,
            keep: self.keep.clone(),
        }
    }

    fn walk(&self, mut skip: usize, mut len: usize, mut f: impl FnMut(*mut u8, usize)) {
        for v in &self.vecs {
            if len == 0 {
                break;
            }
            if skip >= v.iov_len {
                skip -= v.iov_len;
                continue;
            }
            let n = (v.iov_len - skip).min(len);
            f(v.iov_base.cast::<u8>().wrapping_add(skip), n);
            skip = 0;
            len -= n;
        }
    }

    /// Copies all of `data` to `offset`; what does not fit is a bug in the caller and is cut off.
    pub fn copy_from_slice(&self, offset: usize, data: &[u8]) {
        let mut src = data.as_ptr();
        self.walk(offset, data.len(), |dst, n| {
            // SAFETY: `dst` is a segment that `keep` keeps mapped; `src` runs through `data`, whose
            // length bounds the walk. The regions cannot overlap: `data` is ordinary Rust memory.
            unsafe {
                std::ptr::copy_nonoverlapping(src, dst, n);
                src = src.add(n);
            }
        });
    }

    /// Fills `data` from `offset`.
    pub fn copy_to_slice(&self, offset: usize, data: &mut [u8]) {
        let mut dst = data.as_mut_ptr();
        self.walk(offset, data.len(), |src, n| {
            // SAFETY: as in `copy_from_slice`, the other way round.
            unsafe {
                std::ptr::copy_nonoverlapping(src, dst, n);
                dst = dst.add(n);
            }
        });
    }

    /// Copies all bytes of `src` (of the same length or shorter) to the start of `self`.
    pub fn copy_from(&self, src: &IoVecs) {
        let mut at = 0;
        for v in &src.vecs {
            let mut from = v.iov_base.cast::<u8>().cast_const();
            self.walk(at, v.iov_len, |dst, n| {
                // SAFETY: both segments are kept mapped by their owners; `copy` allows overlap, which
                // a guest may arrange.
                unsafe {
                    std::ptr::copy(from, dst, n);
                    from = from.add(n);
                }
            });
            at += v.iov_len;
        }
    }

    /// Writes zeroes to `len` bytes at `offset`.
    pub fn zero(&self, offset: usize, len: usize) {
        self.walk(offset, len, |dst, n| {
            // SAFETY: `dst` is a segment of at least `n` bytes that `keep` keeps mapped.
            unsafe { std::ptr::write_bytes(dst, 0, n) }
        });
    }

    /// Writes zeroes to all of it, piece by piece: others on the I/O thread have their turns in between.
    pub async fn zero_in_turns(&self) {
        for at in (0..self.len).step_by(PIECE) {
            self.zero(at, PIECE.min(self.len - at));
            if at + PIECE < self.len {
                give_way().await;
            }
        }
    }

    /// Whether every byte is zero at the time of the look.
    pub fn is_zero(&self) -> bool {
        self.vecs.iter().all(|v| {
            let base = v.iov_base.cast::<u8>();
            let mut at = 0;
            let mut chunk = [0u8; 512];
            while at < v.iov_len {
                let n = (v.iov_len - at).min(chunk.len());
                // SAFETY: the segment has `iov_len` bytes that `keep` keeps mapped; the bytes are
                // copied out first since a guest may change them under the comparison.
                unsafe { std::ptr::copy_nonoverlapping(base.add(at), chunk.as_mut_ptr(), n) };
                if chunk[..n].iter().any(|b| *b != 0) {
                    return false;
                }
                at += n;
            }
            true
        })
    }

    /// As [`IoVecs::is_zero`], a piece at a time, as others have work to do on this thread.
    pub async fn is_zero_in_turns(&self) -> bool {
        if self.len <= PIECE {
            return self.is_zero();
        }
        for at in (0..self.len).step_by(PIECE) {
            let piece = PIECE.min(self.len - at);
            if !self.slice(at, piece).is_zero() {
                return false;
            }
            if at + piece < self.len {
                give_way().await;
            }
        }
        true
    }

    /// Whether every segment starts and ends on a multiple of `align` (a power of two) in memory.
    pub fn is_aligned(&self, align: usize) -> bool {
        segments_aligned(&self.vecs, align)
    }
}

/// Whether every segment of `vecs` starts and ends on a multiple of `align` (a power of two).
pub(crate) fn segments_aligned(vecs: &[libc::iovec], align: usize) -> bool {
    let mask = align - 1;
    vecs.iter()
        .all(|v| ((v.iov_base as usize) | v.iov_len) & mask == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_come_back() {
        let mut buf = AlignedBuf::new(8, 64);
        buf.as_mut_slice().copy_from_slice(b"abcdefgh");
        let at = buf.as_mut_ptr();
        let iov = IoVecs::from_buf(buf, 6);
        assert_eq!(iov.to_vec(), b"abcdef");
        let other = iov.clone();
        let copy = iov.into_buf();
        assert_eq!(copy.as_slice(), b"abcdef");
        assert_ne!(copy.as_mut_ptr(), at);
        assert_eq!(other.slice(1, 2).into_buf().as_slice(), b"bc");
        assert_eq!(other.into_buf().as_mut_ptr(), at);
    }

    fn two_parts() -> IoVecs {
        let buf = Rc::new(AlignedBuf::new(64, 8));
        let base = buf.as_mut_ptr();
        let part = |at: usize, len| libc::iovec {
            iov_base: base.wrapping_add(at).cast(),
            iov_len: len,
        };
        // SAFETY: both parts lie in `buf`.
        unsafe { IoVecs::new(vec![part(0, 10), part(32, 10)], buf) }
    }

    #[test]
    fn copies_cross_segments() {
        let v = two_parts();
        assert_eq!(v.len(), 20);
        v.copy_from_slice(5, b"0123456789");
        let mut out = [0; 10];
        v.copy_to_slice(5, &mut out);
        assert_eq!(&out, b"0123456789");
        let tail = v.slice(8, 4);
        let mut out = [0; 4];
        tail.copy_to_slice(0, &mut out);
        assert_eq!(&out, b"3456");
        assert!(!v.is_zero());
        v.zero(5, 10);
        assert!(v.is_zero());
    }

    #[test]
    fn copy_between_lists() {
        let a = two_parts();
        a.copy_from_slice(0, b"abcdefghijklmnopqrst");
        let b = two_parts();
        b.copy_from(&a);
        let mut out = [0; 20];
        b.copy_to_slice(0, &mut out);
        assert_eq!(&out, b"abcdefghijklmnopqrst");
    }

    #[test]
    fn concatenated_parts_share_their_memory() {
        let (a, b) = (IoVecs::from_slice(b"abc"), two_parts());
        let both = IoVecs::concat(vec![a, b.slice(5, 10)]);
        both.copy_from_slice(2, b"0123456789");
        assert_eq!(both.to_vec(), b"ab0123456789\0");
        assert_eq!(b.slice(5, 10).to_vec(), b"123456789\0");
    }

    #[test]
    fn alignment_is_of_base_and_length() {
        assert!(IoVecs::zeroed(512, 512).is_aligned(512));
        assert!(!two_parts().is_aligned(4));
    }
}
