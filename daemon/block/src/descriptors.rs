//! Files that callers passed open, whose own rights decided: they have names as QEMU gives them, `/dev/fdset/N`.

use std::collections::BTreeMap;
use std::fs::{File, Metadata};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, Weak};

use rustix::fs::OFlags;

const PREFIX: &str = "/dev/fdset/";

/// All of them. Clones are the same.
#[derive(Clone, Debug, Default)]
pub struct Descriptors(Arc<Mutex<Table>>);

#[derive(Debug, Default)]
struct Table {
    next: u64,
    all: BTreeMap<u64, Passed>,
}

#[derive(Debug)]
struct Passed {
    file: File,
    /// Somebody is about to use it.
    pending: Weak<()>,
}

/// A descriptor that was passed, and stays for as long as this is there, and then for as long as a node uses it.
#[derive(Debug)]
pub struct Pending {
    pub number: u64,
    _token: Arc<()>,
}

impl Pending {
    /// What it is called.
    pub fn name(&self) -> String {
        format!("{PREFIX}{}", self.number)
    }
}

fn number(path: &str) -> Option<u64> {
    path.strip_prefix(PREFIX)?.parse().ok()
}

impl Descriptors {
    fn table(&self) -> MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }

    pub fn add(&self, fd: OwnedFd) -> Pending {
        let mut table = self.table();
        let (number, token) = (table.next, Arc::new(()));
        table.next += 1;
        let passed = Passed {
            file: fd.into(),
            pending: Arc::downgrade(&token),
        };
        table.all.insert(number, passed);
        Pending {
            number,
            _token: token,
        }
    }

    /// Takes over what an earlier process had.
    pub fn restore(&self, number: u64, fd: OwnedFd) {
        let mut table = self.table();
        table.next = table.next.max(number + 1);
        let passed = Passed {
            file: fd.into(),
            pending: Weak::new(),
        };
        table.all.insert(number, passed);
    }

    /// Whether a name is that of a passed descriptor.
    pub fn is_one(path: &str) -> bool {
        number(path).is_some()
    }

    /// The descriptor of this name, with O_DIRECT or without.
    ///
    /// # Errors
    /// If there is none, or it was not opened for what it is needed for.
    pub(crate) fn open(&self, path: &str, write: bool, direct: bool) -> io::Result<OwnedFd> {
        let table = self.table();
        let passed = number(path).and_then(|n| table.all.get(&n));
        let file = &passed
            .ok_or_else(|| {
                let why =
                    "the descriptor was passed to an earlier daemon and is gone: pass it again";
                io::Error::new(io::ErrorKind::NotFound, why)
            })?
            .file;
        let flags = rustix::fs::fcntl_getfl(file)?;
        let refused = |why| Err(io::Error::new(io::ErrorKind::PermissionDenied, why));
        match flags & OFlags::RWMODE {
            OFlags::RDWR => {}
            OFlags::RDONLY if !write => {}
            OFlags::RDONLY => {
                // As for a file that may only be read.
                return Err(io::Error::from_raw_os_error(libc::EACCES));
            }
            _ => return refused("the passed descriptor is open for writing only"),
        }
        if flags.intersects(OFlags::APPEND | OFlags::PATH) {
            return refused(
                "the passed descriptor was opened with O_APPEND or O_PATH: open it without",
            );
        }
        if flags.contains(OFlags::DIRECT) != direct {
            let mut wanted = flags;
            wanted.set(OFlags::DIRECT, direct);
            rustix::fs::fcntl_setfl(file, wanted)?;
        }
        Ok(file.try_clone()?.into())
    }

    /// What is known of a file, passed or not.
    pub(crate) fn metadata(&self, path: &str) -> io::Result<Metadata> {
        match number(path).and_then(|n| Some(self.table().all.get(&n)?.file.try_clone())) {
            Some(file) => file?.metadata(),
            None => std::fs::metadata(path),
        }
    }

    /// Closes those that have no use; their numbers.
    pub fn forget_unused(&self, is_used: impl Fn(&str) -> bool) -> Vec<u64> {
        let mut table = self.table();
        let unused = |(n, p): (&u64, &Passed)| {
            (p.pending.strong_count() == 0 && !is_used(&format!("{PREFIX}{n}"))).then_some(*n)
        };
        let gone: Vec<u64> = table.all.iter().filter_map(unused).collect();
        for number in &gone {
            table.all.remove(number);
        }
        gone
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_live_while_they_are_used() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, "x").unwrap();
        let all = Descriptors::default();
        let pending = all.add(File::open(&path).unwrap().into());
        let name = pending.name();
        assert!(Descriptors::is_one(&name) && !Descriptors::is_one("/dev/fdset/x"));
        assert!(all.open(&name, false, false).is_ok());
        let e = all.open(&name, true, false).unwrap_err();
        assert_eq!(e.kind(), io::ErrorKind::PermissionDenied);
        assert_eq!(all.metadata(&name).unwrap().len(), 1);
        assert!(all.forget_unused(|_| false).is_empty());
        drop(pending);
        assert!(all.forget_unused(|n| n == name).is_empty());
        assert_eq!(all.forget_unused(|_| false), [0]);
        assert!(all.open(&name, false, false).is_err());
        let append = File::options().read(true).append(true).open(&path).unwrap();
        let pending = all.add(append.into());
        assert!(all.open(&pending.name(), true, false).is_err());
        // Numbers of an earlier process are not given again.
        all.restore(7, File::open(&path).unwrap().into());
        assert_eq!(all.add(File::open(&path).unwrap().into()).number, 8);
    }
}
