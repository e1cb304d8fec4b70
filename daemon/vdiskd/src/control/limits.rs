//! What vdiskd.toml allows of what is new (`[limits]`). What was there before stays.

use std::sync::Arc;

use vdisk_api::{Command, Error, ExportOptions, Result, format_size};

use super::Control;

/// Limits of new objects.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Exports at a time.
    pub exports: usize,
    /// Queues of one export.
    pub queues: u16,
    /// With so many bytes of memory for itself the daemon takes no more to do.
    pub memory: Option<MemoryLimit>,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            exports: usize::MAX,
            queues: u16::MAX,
            memory: None,
        }
    }
}

#[derive(Clone, Debug)]
pub struct MemoryLimit {
    most: u64,
    /// /proc/self/status, opened while it can be.
    status: Arc<std::fs::File>,
}

impl MemoryLimit {
    pub fn new(most: u64) -> std::io::Result<MemoryLimit> {
        let status = Arc::new(std::fs::File::open("/proc/self/status")?);
        Ok(MemoryLimit { most, status })
    }

    /// Bytes of memory that are this process's own: what it shares with guests and the page cache are not.
    fn used(&self) -> Option<u64> {
        use std::os::unix::fs::FileExt;
        let mut text = [0; 4096];
        let n = self.status.read_at(&mut text, 0).ok()?;
        let text = str::from_utf8(&text[..n]).ok()?;
        let line = text.lines().find_map(|l| l.strip_prefix("RssAnon:"))?;
        let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
        Some(kib << 10)
    }
}

impl Control {
    /// Refuses what would need more memory when the daemon has what it may have.
    pub(super) fn check_memory(&self, command: &Command) -> Result<()> {
        let needs_more = matches!(
            command,
            Command::AddNode(_)
                | Command::AddOverlay { .. }
                | Command::InsertFilter { .. }
                | Command::AddExport(_)
                | Command::AddIoThread(_)
                | Command::StartJob(_)
                | Command::Transaction(_)
        );
        let limit = match needs_more {
            true => self.world().defaults.limits.memory.clone(),
            false => None,
        };
        if let Some(limit) = limit
            && let Some(used) = limit.used().filter(|used| *used >= limit.most)
        {
            return Err(Error::failed(format!(
                "the daemon has {} of memory for itself, and vdiskd.toml (limits.memory) allows {}: remove nodes, give them smaller caches, or raise it",
                format_size(used),
                format_size(limit.most)
            )));
        }
        Ok(())
    }

    /// Refuses a new export that vdiskd.toml does not allow.
    pub(super) fn check_export(&self, options: &ExportOptions) -> Result<()> {
        let world = self.world();
        let limits = &world.defaults.limits;
        let (id, there) = (&options.id, world.exports.len());
        if there >= limits.exports {
            return Err(Error::failed(format!(
                "export '{id}': there are {there} already, the limit of vdiskd.toml (limits.exports): remove one, or raise it"
            )));
        }
        let (queues, most) = (options.kind.num_queues().unwrap_or(0), limits.queues);
        if queues > most {
            return Err(Error::invalid(format!(
                "export '{id}': option 'num-queues' is {queues}, and vdiskd.toml (limits.queues) allows {most}"
            )));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_of_the_process_is_known() {
        let limit = MemoryLimit::new(0).unwrap();
        let before = limit.used().unwrap();
        assert!(before > 0);
        let more = vec![1u8; 64 << 20];
        assert!(
            limit.used().unwrap() > before + (32 << 20),
            "{}",
            more.len()
        );
    }
}
