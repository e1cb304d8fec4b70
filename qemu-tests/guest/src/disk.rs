//! A disk, with O_DIRECT: what the test says goes to the device and nowhere else.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::fs::{self, File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};

use serde_json::{Value, json};

use crate::pattern;

pub const BLOCK: usize = 4096;

/// Bytes in one request of the pattern commands.
const CHUNK: u64 = 64 * 1024;

/// A page-aligned buffer.
pub struct Aligned(*mut u8, Layout);

impl Aligned {
    pub fn new(len: usize) -> Aligned {
        let layout = Layout::from_size_align(len.max(1), BLOCK).unwrap_or(Layout::new::<u8>());
        // SAFETY: the size is not zero.
        Aligned(unsafe { alloc_zeroed(layout) }, layout)
    }

    pub fn as_mut(&mut self) -> &mut [u8] {
        // SAFETY: allocated with this size, zeroed.
        unsafe { std::slice::from_raw_parts_mut(self.0, self.1.size()) }
    }
}

impl Drop for Aligned {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout.
        unsafe { dealloc(self.0, self.1) }
    }
}

fn attribute(disk: &str, name: &str) -> String {
    let text = fs::read_to_string(format!("/sys/block/{disk}/{name}"));
    text.unwrap_or_default().trim().to_owned()
}

fn numeric(disk: &str, name: &str) -> u64 {
    attribute(disk, name).parse().unwrap_or(0)
}

/// Bytes.
pub fn size(disk: &str) -> Option<u64> {
    attribute(disk, "size").parse::<u64>().ok().map(|n| n * 512)
}

pub fn list() -> Value {
    let mut out = serde_json::Map::new();
    for entry in fs::read_dir("/sys/block").into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let queues = fs::read_dir(entry.path().join("mq")).map_or(0, Iterator::count);
        out.insert(
            name.clone(),
            json!({
                "size": size(&name),
                "ro": numeric(&name, "ro") == 1,
                "serial": attribute(&name, "serial"),
                "cache": attribute(&name, "cache_type"),
                "logical": numeric(&name, "queue/logical_block_size"),
                "physical": numeric(&name, "queue/physical_block_size"),
                "discard-max": numeric(&name, "queue/discard_max_bytes"),
                "segments": numeric(&name, "queue/max_segments"),
                "queues": queues,
            }),
        );
    }
    Value::Object(out)
}

pub struct Disk {
    pub file: File,
}

impl Disk {
    pub fn open(name: &str) -> Result<Disk, String> {
        let path = format!("/dev/{name}");
        let open = |write| {
            OpenOptions::new()
                .read(true)
                .write(write)
                .custom_flags(libc::O_DIRECT)
                .open(&path)
        };
        let file = open(true)
            .or_else(|_| open(false))
            .map_err(|e| format!("{path}: {e}"))?;
        Ok(Disk { file })
    }

    pub fn write_block(&self, buf: &mut Aligned, at: u64, generation: u64) -> std::io::Result<()> {
        let buf = buf.as_mut();
        for (i, part) in buf.chunks_mut(BLOCK).enumerate() {
            let position = at + (i * BLOCK) as u64;
            part.copy_from_slice(&pattern::block(position, generation, BLOCK));
        }
        self.file.write_all_at(buf, at)
    }

    pub fn verify_block(&self, buf: &mut Aligned, at: u64, generation: u64) -> Result<(), String> {
        let buf = buf.as_mut();
        self.file
            .read_exact_at(buf, at)
            .map_err(|e| format!("read at {at}: {e}"))?;
        for (i, part) in buf.chunks(BLOCK).enumerate() {
            let position = at + (i * BLOCK) as u64;
            if part != pattern::block(position, generation, BLOCK) {
                return Err(format!(
                    "block at {position} should be of generation {generation}; it claims (position, generation) = {:?}",
                    pattern::claims(part)
                ));
            }
        }
        Ok(())
    }

    pub fn write_pattern(
        &self,
        offset: u64,
        len: u64,
        generation: u64,
        threads: u64,
    ) -> Result<(), String> {
        std::thread::scope(|scope| {
            let workers: Vec<_> = (0..threads)
                .map(|t| {
                    scope.spawn(move || -> Result<(), String> {
                        let mut buf = Aligned::new(CHUNK.min(len) as usize);
                        let mut at = t * CHUNK;
                        while at < len {
                            self.write_block(&mut buf, offset + at, generation)
                                .map_err(|e| format!("write at {}: {e}", offset + at))?;
                            at += threads * CHUNK;
                        }
                        Ok(())
                    })
                })
                .collect();
            for w in workers {
                w.join().map_err(|_| "panic".to_owned())??;
            }
            Ok(())
        })
    }

    pub fn verify_pattern(&self, offset: u64, len: u64, generation: u64) -> Result<(), String> {
        let mut buf = Aligned::new(CHUNK.min(len) as usize);
        let mut at = 0;
        while at < len {
            self.verify_block(&mut buf, offset + at, generation)?;
            at += CHUNK;
        }
        Ok(())
    }

    pub fn is_zero(&self, offset: u64, len: u64) -> Result<bool, String> {
        let mut buf = Aligned::new(len as usize);
        let buf = buf.as_mut();
        self.file
            .read_exact_at(buf, offset)
            .map_err(|e| e.to_string())?;
        Ok(buf.iter().all(|b| *b == 0))
    }

    pub fn flush(&self) -> Result<(), String> {
        self.file.sync_all().map_err(|e| e.to_string())
    }

    pub fn discard(&self, offset: u64, len: u64) -> Result<(), String> {
        // BLKDISCARD
        self.ioctl(0x1277, offset, len)
    }

    /// Without `unmap` the blocks stay allocated.
    pub fn zero(&self, offset: u64, len: u64, unmap: bool) -> Result<(), String> {
        if !unmap {
            // BLKZEROOUT
            return self.ioctl(0x127f, offset, len);
        }
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        // SAFETY: no pointers.
        let rc = unsafe { libc::fallocate(self.file.as_raw_fd(), mode, offset as i64, len as i64) };
        match rc {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error().to_string()),
        }
    }

    fn ioctl(&self, code: libc::Ioctl, offset: u64, len: u64) -> Result<(), String> {
        let range = [offset, len];
        // SAFETY: these ioctls read two u64.
        match unsafe { libc::ioctl(self.file.as_raw_fd(), code, range.as_ptr()) } {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error().to_string()),
        }
    }
}
