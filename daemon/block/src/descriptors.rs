//! Files that callers passed open, whose own rights decided: they have names as QEMU gives them, `/dev/fdset/N`.

use std::collections::BTreeMap;
use std::fs::{File, Metadata};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
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
    /// Device and inode.
    identity: (u64, u64),
    /// Somebody is about to use it.
    pending: Weak<()>,
    /// A node has it open.
    open: Weak<()>,
    /// And writes.
    writes: bool,
}

impl Passed {
    fn new(fd: OwnedFd, pending: Weak<()>) -> Passed {
        let file = File::from(fd);
        let meta = file.metadata();
        Passed {
            identity: meta.map_or((0, 0), |m| match m.rdev() {
                0 => (m.dev(), m.ino()),
                device => (device, 0),
            }),
            file,
            pending,
            open: Weak::new(),
            writes: false,
        }
    }
}

/// A node has a passed descriptor open, for as long as this is there: nothing else may, as locks and O_DIRECT would be shared.
#[derive(Clone, Debug)]
pub(crate) struct Open(#[allow(dead_code, reason = "it is only held")] Arc<()>);

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
    let digits = path.strip_prefix(PREFIX)?;
    let number = digits.parse::<u64>().ok()?;
    (digits == number.to_string()).then_some(number)
}

fn gone() -> io::Error {
    let why = "the descriptor was passed to an earlier daemon and is gone: pass it again";
    io::Error::new(io::ErrorKind::NotFound, why)
}

impl Descriptors {
    fn table(&self) -> MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }

    pub fn add(&self, fd: OwnedFd) -> Pending {
        let mut table = self.table();
        let (number, token) = (table.next, Arc::new(()));
        table.next += 1;
        let passed = Passed::new(fd, Arc::downgrade(&token));
        table.all.insert(number, passed);
        Pending {
            number,
            _token: token,
        }
    }

    /// Takes over what an earlier process had.
    pub fn restore(&self, number: u64, fd: OwnedFd) {
        let mut table = self.table();
        table.next = table.next.max(number.saturating_add(1));
        table.all.insert(number, Passed::new(fd, Weak::new()));
    }

    /// Does not give the number in this name, if it is one, to anything else: a node that cannot be restored has it.
    pub fn reserve(&self, path: &str) {
        if let Some(number) = number(path) {
            let mut table = self.table();
            table.next = table.next.max(number.saturating_add(1));
        }
    }

    /// Whether a name is that of a passed descriptor.
    pub fn is_one(path: &str) -> bool {
        number(path).is_some()
    }

    /// The descriptor of this name, with O_DIRECT or without. `again`: for the node that has it open already.
    ///
    /// # Errors
    /// If there is none, it was not opened for what it is needed for, or a node has it, or another of the same file.
    pub(crate) fn open(
        &self,
        path: &str,
        write: bool,
        direct: bool,
        again: Option<&Open>,
    ) -> io::Result<(OwnedFd, Open)> {
        let mut table = self.table();
        let number = number(path).unwrap_or(u64::MAX);
        let identity = table.all.get(&number).ok_or_else(gone)?.identity;
        let is_taken = |(n, p): &(&u64, &Passed)| {
            let is_open = p.identity == identity && p.open.strong_count() > 0;
            match **n == number {
                true => is_open && again.is_none(),
                // Two that only read do not disturb each other.
                false => is_open && (write || p.writes),
            }
        };
        if let Some((other, _)) = table.all.iter().find(is_taken) {
            return Err(io::Error::new(
                io::ErrorKind::ResourceBusy,
                format!(
                    "a node has this file open already, as {PREFIX}{other}: use that node, or remove it first"
                ),
            ));
        }
        let passed = table.all.get_mut(&number).ok_or_else(gone)?;
        let file = &passed.file;
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
        let copy = file.try_clone()?.into();
        let open = again.cloned().unwrap_or_else(|| Open(Arc::new(())));
        passed.open = Arc::downgrade(&open.0);
        passed.writes |= write;
        Ok((copy, open))
    }

    /// What is known of a file, passed or not.
    pub fn metadata(&self, path: &str) -> io::Result<Metadata> {
        let Some(number) = number(path) else {
            return std::fs::metadata(path);
        };
        let file = self.table().all.get(&number).map(|p| p.file.try_clone());
        file.ok_or_else(gone)??.metadata()
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
        let e = all.open(&name, true, false, None).unwrap_err();
        assert_eq!(e.kind(), io::ErrorKind::PermissionDenied);
        // One node at a time, and beside one that writes no other of the file.
        let (_, open) = all.open(&name, false, false, None).unwrap();
        assert!(all.open(&name, false, false, Some(&open)).is_ok());
        let both = File::options().read(true).write(true).open(&path);
        let other = all.add(both.unwrap().into());
        for (name, write) in [(&name, false), (&other.name(), true)] {
            let e = all.open(name, write, false, None).unwrap_err();
            assert_eq!(e.kind(), io::ErrorKind::ResourceBusy);
        }
        let (_, reader) = all.open(&other.name(), false, false, None).unwrap();
        let e = all
            .open(&other.name(), true, false, Some(&reader))
            .unwrap_err();
        assert_eq!(e.kind(), io::ErrorKind::ResourceBusy);
        drop(reader);
        drop(open);
        assert!(all.open(&name, false, false, None).is_ok());
        drop(other);
        assert_eq!(all.forget_unused(|n| n == name), [1]);
        assert!(!Descriptors::is_one("/dev/fdset/00") && !Descriptors::is_one("/dev/fdset/+0"));
        assert_eq!(all.metadata(&name).unwrap().len(), 1);
        assert!(all.forget_unused(|_| false).is_empty());
        drop(pending);
        assert!(all.forget_unused(|n| n == name).is_empty());
        assert_eq!(all.forget_unused(|_| false), [0]);
        assert!(all.open(&name, false, false, None).is_err());
        let append = File::options().read(true).append(true).open(&path).unwrap();
        let pending = all.add(append.into());
        assert!(all.open(&pending.name(), true, false, None).is_err());
        // Numbers of an earlier process are not given again.
        all.reserve("/dev/fdset/6");
        assert_eq!(all.add(File::open(&path).unwrap().into()).number, 7);
        all.restore(9, File::open(&path).unwrap().into());
        assert_eq!(all.add(File::open(&path).unwrap().into()).number, 10);
    }
}
