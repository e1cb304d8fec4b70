//! Encrypted data on a node: for driver `luks`, and for qcow2 images with encryption.

use std::cell::RefCell;
use std::io;
use std::sync::Arc;

use vdisk_api::{Error, ErrorKind, Result};
use vdisk_io::{IoVecs, give_way};
use vdisk_luks::{Cipher, HEADER, Header, SECTOR};
use vdisk_qcow2::Storage;

use crate::drivers::{Direction, LocalFuture, Resolved, SlowReason};
use crate::node::{Node, WriteFlags};
use crate::secrets::Secrets;

/// Data is copied out of and into buffers in pieces of this many bytes.
const PIECE: usize = 4096;

/// Others on the I/O thread have their turns after this many bytes.
const TURN: usize = 64 << 10;

/// Reads of at most so many bytes are decrypted as they end.
const AT_ONCE: u64 = 16 << 10;

/// Writes are encrypted in pieces of this many bytes, which bounds memory.
const CHUNK: usize = 1 << 20;

/// Reads the LUKS header at byte `at` of a node; may block.
pub fn read_header(what: &str, file: &Node, at: u64) -> Result<Header> {
    let bytes = file
        .read_blocking(at, HEADER)
        .map_err(|e| Error::io(format_args!("{what}: its LUKS header cannot be read"), &e))?;
    Header::parse(&bytes).map_err(|e| luks_failed(what, &e))
}

/// Opens what the LUKS header at byte `at` of a node describes, of at most `len` bytes with its key material; may block,
/// for seconds the first time.
pub fn unlock(
    what: &str,
    file: &Node,
    (at, len): (u64, u64),
    secrets: &Secrets,
    id: &str,
) -> Result<(Header, Cipher)> {
    let header = read_header(what, file, at)?;
    let secret = secrets.get(id).map_err(|e| e.context(what))?;
    let read = |offset: u64, n: usize| match offset.checked_add(n as u64) {
        Some(end) if end <= len => file.read_blocking(at + offset, n),
        _ => Ok(Vec::new()),
    };
    let failed = |e: vdisk_luks::Error| luks_failed(what, &e);
    let fingerprint = header.fingerprint(secret.bytes(), read);
    if let Some(key) = fingerprint.and_then(|print| secrets.key(id, &print)) {
        return Ok((header, key.cipher().map_err(failed)?));
    }
    let key = header.unlock(secret.bytes(), read).map_err(failed)?;
    let cipher = key.cipher().map_err(failed)?;
    tracing::info!(secret = id, "passphrase tried, {what} opens");
    if let Some(print) = fingerprint {
        secrets.remember(id, &secret, print, key);
    }
    Ok((header, cipher))
}

/// What is wrong with an encrypted disk, as an error that names it.
pub fn luks_failed(what: &str, e: &vdisk_luks::Error) -> Error {
    use vdisk_luks::Error as E;
    let kind = match e {
        E::WrongKey => ErrorKind::NotAuthorized,
        E::Version(_) | E::Field { .. } => ErrorKind::NotSupported,
        E::Magic | E::Short => ErrorKind::Corrupt,
        E::Read(_) => ErrorKind::Io,
        E::Random(_) => ErrorKind::Failed,
    };
    let remedy = match e {
        E::WrongKey => ": give its passphrase as a secret, with no newline at the end",
        _ => "",
    };
    Error::new(kind, format!("{what} cannot be opened: {e}{remedy}"))
}

/// A part of a node that is encrypted. Offsets and lengths are multiples of [`SECTOR`].
pub struct Encrypted {
    pub below: Arc<Node>,
    /// Byte of the node where sector 0 is.
    pub base: u64,
    pub cipher: Arc<Cipher>,
}

/// What is left to do to encrypted data that was read.
pub struct Decryption {
    cipher: Arc<Cipher>,
    /// That the data begins with.
    sector: u64,
}

impl Decryption {
    /// Decrypts whole sectors where they are. A guest may change its memory meanwhile: it gets what it makes of it.
    pub fn run(&self, iov: &IoVecs) {
        for at in (0..iov.len()).step_by(PIECE) {
            self.piece(iov, at);
        }
    }

    fn piece(&self, iov: &IoVecs, at: usize) {
        with_piece(PIECE.min(iov.len() - at), |piece| {
            iov.copy_to_slice(at, piece);
            let sector = self.sector + (at / SECTOR) as u64;
            self.cipher.decrypt(sector, piece);
            iov.copy_from_slice(at, piece);
        });
    }
}

fn whole_sectors(offset: u64, len: usize) -> io::Result<()> {
    if (offset | len as u64).is_multiple_of(SECTOR as u64) {
        return Ok(());
    }
    Err(io::Error::new(
        io::ErrorKind::InvalidInput,
        "encrypted data is read and written in whole sectors",
    ))
}

/// Calls `f` with `len` bytes of this thread, which hold anything.
fn with_piece(len: usize, f: impl FnOnce(&mut [u8])) {
    thread_local! {
        static BUFFER: RefCell<Box<[u8; PIECE]>> = RefCell::new(Box::new([0; PIECE]));
    }
    BUFFER.with_borrow_mut(|b| f(&mut b[..len]));
}

impl Encrypted {
    pub async fn read_at(&self, offset: u64, iov: IoVecs) -> io::Result<()> {
        whole_sectors(offset, iov.len())?;
        self.below.read(self.base + offset, iov.clone()).await?;
        let decryption = self.decryption(offset);
        for at in (0..iov.len()).step_by(PIECE) {
            if at > 0 && at % TURN == 0 {
                give_way().await;
            }
            decryption.piece(&iov, at);
        }
        Ok(())
    }

    fn decryption(&self, offset: u64) -> Decryption {
        Decryption {
            cipher: self.cipher.clone(),
            sector: offset / SECTOR as u64,
        }
    }

    /// Tells where the data of a read is. What takes long to decrypt is left to [`Encrypted::read_at`], which gives way.
    pub(crate) fn resolve_read(&self, offset: u64, len: u64, then: &mut dyn FnMut(Resolved<'_>)) {
        let slow = Resolved::Slow(SlowReason::Encrypted);
        if !(offset | len).is_multiple_of(SECTOR as u64) || len > AT_ONCE {
            return then(slow);
        }
        let mut tell = |below: Resolved<'_>| {
            then(match below {
                Resolved::Direct {
                    file, offset: at, ..
                } => Resolved::Encrypted {
                    file,
                    offset: at,
                    decryption: self.decryption(offset),
                },
                Resolved::Slow(reason) => Resolved::Slow(reason),
                // Zeroes are to be decrypted, too, and what is encrypted twice takes two steps.
                _ => Resolved::Slow(SlowReason::Encrypted),
            });
        };
        let place = self.base + offset;
        self.below
            .resolve_range(Direction::Read, place, len, &mut tell);
    }

    pub async fn write_at(&self, offset: u64, iov: IoVecs, flags: WriteFlags) -> io::Result<()> {
        whole_sectors(offset, iov.len())?;
        let alignment = self.below.limits().memory_alignment.max(SECTOR);
        for start in (0..iov.len()).step_by(CHUNK) {
            let len = CHUNK.min(iov.len() - start);
            let out = IoVecs::zeroed(len, alignment);
            for at in (0..len).step_by(PIECE) {
                if at > 0 && at % TURN == 0 {
                    give_way().await;
                }
                with_piece(PIECE.min(len - at), |piece| {
                    iov.copy_to_slice(start + at, piece);
                    let sector = (offset + (start + at) as u64) / SECTOR as u64;
                    self.cipher.encrypt(sector, piece);
                    out.copy_from_slice(at, piece);
                });
            }
            let place = self.base + offset + start as u64;
            self.below.write(place, out, flags).await?;
        }
        Ok(())
    }
}

impl Storage for Encrypted {
    fn size(&self) -> u64 {
        self.below.size().saturating_sub(self.base)
    }

    fn read(&self, offset: u64, iov: IoVecs) -> LocalFuture<'_, io::Result<()>> {
        Box::pin(self.read_at(offset, iov))
    }

    fn write(&self, offset: u64, iov: IoVecs) -> LocalFuture<'_, io::Result<()>> {
        Box::pin(self.write_at(offset, iov, WriteFlags::default()))
    }

    fn flush(&self) -> LocalFuture<'_, io::Result<()>> {
        Box::pin(self.below.flush())
    }

    fn discard(&self, offset: u64, len: u64) -> LocalFuture<'_, io::Result<()>> {
        Box::pin(self.below.discard(self.base + offset, len))
    }

    fn reserve(&self, offset: u64, len: u64) -> LocalFuture<'_, io::Result<()>> {
        Box::pin(self.below.reserve(self.base + offset, len))
    }

    fn grows(&self) -> bool {
        self.below.grows()
    }

    /// What is new does not read as zeroes, but as zeroes that were decrypted.
    fn set_size(&self, size: u64) -> LocalFuture<'_, io::Result<()>> {
        Box::pin(async move {
            let block = self.below.storage_block_size().max(1);
            let size = (self.base + size).next_multiple_of(block);
            self.below.resize(size).await?;
            Ok(())
        })
    }

    fn write_zeroes(&self, offset: u64, len: u64, _: bool) -> LocalFuture<'_, io::Result<()>> {
        Box::pin(async move {
            let zeroes = IoVecs::zeroed(len.min(TURN as u64) as usize, 1);
            let mut at = 0;
            while at < len {
                let n = (len - at).min(TURN as u64);
                let part = zeroes.slice(0, n as usize);
                self.write_at(offset + at, part, WriteFlags::default())
                    .await?;
                at += n;
            }
            Ok(())
        })
    }

    fn quiesce(&self) -> LocalFuture<'_, ()> {
        Box::pin(vdisk_io::quiesce())
    }
}
