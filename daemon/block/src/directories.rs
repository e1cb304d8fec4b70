//! Where images may be.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arc_swap::ArcSwapOption;
use vdisk_api::{Error, ErrorKind, Result};

/// The folders in which images, backing files and devices may be opened and made; everywhere if none is named. What counts is where
/// a file is, not how it is called: links and `..` do not lead out. Clones are the same.
#[derive(Clone, Debug, Default)]
pub struct Directories(Arc<ArcSwapOption<Vec<PathBuf>>>);

impl Directories {
    /// Where folders really are; each must be there.
    pub fn resolve(directories: &[PathBuf]) -> io::Result<Vec<PathBuf>> {
        let real = directories.iter().map(|d| {
            d.canonicalize()
                .map_err(|e| io::Error::new(e.kind(), format!("'{}': {e}", d.display())))
        });
        real.collect()
    }

    /// From now on only these, as [`Directories::resolve`] returns them, and what is in them. What is open stays open.
    pub fn restrict(&self, directories: Vec<PathBuf>) {
        self.0.store(Some(Arc::new(directories)));
    }

    fn refuse(&self, what: &str, place: &Path, all: &[PathBuf]) -> Error {
        let all: Vec<String> = all.iter().map(|d| d.display().to_string()).collect();
        Error::new(
            ErrorKind::NotAuthorized,
            format!(
                "{what} is '{}', and images may be in {} only: move it there, or add its folder to 'directories' in vdiskd.toml",
                place.display(),
                all.join(", ")
            ),
        )
    }

    /// Refuses an open file that is elsewhere. Devices have their names in folders of /dev that are full of links (of logical
    /// volumes, by-id, …): for them it is enough that the name `path` is in a folder below /dev.
    pub fn check(&self, what: &str, path: &str, file: impl AsFd) -> Result<()> {
        let Some(all) = self.0.load_full() else {
            return Ok(());
        };
        let fd = file.as_fd().as_raw_fd();
        let place = std::fs::read_link(format!("/proc/self/fd/{fd}"))
            .map_err(|e| Error::io(format_args!("{what}: where it is cannot be found out"), &e))?;
        let folder = Path::new(path).parent().and_then(|p| p.canonicalize().ok());
        let name = folder.filter(|f| f.starts_with("/dev") && place.starts_with("/dev"));
        let is_in = |place: &Path| all.iter().any(|d| place.starts_with(d));
        match is_in(&place) || name.as_deref().is_some_and(is_in) {
            true => Ok(()),
            false => Err(self.refuse(what, &place, &all)),
        }
    }

    /// Refuses a file that is to be made elsewhere.
    pub fn check_new(&self, what: &str, path: &Path) -> Result<()> {
        let Some(all) = self.0.load_full() else {
            return Ok(());
        };
        let folder = path.parent().unwrap_or(Path::new("/"));
        let place = folder
            .canonicalize()
            .map_err(|e| Error::io(format_args!("{what} cannot be made"), &e))?;
        match all.iter().any(|d| place.starts_with(d)) {
            true => Ok(()),
            false => Err(self.refuse(what, &place, &all)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;

    #[test]
    fn links_and_dots_do_not_lead_out() {
        let dir = tempfile::tempdir().unwrap();
        let (inside, outside) = (dir.path().join("in"), dir.path().join("inside"));
        std::fs::create_dir_all(inside.join("deep")).unwrap();
        std::fs::create_dir(&outside).unwrap();
        for file in [inside.join("deep/a"), outside.join("b")] {
            std::fs::write(file, "").unwrap();
        }
        std::os::unix::fs::symlink(outside.join("b"), inside.join("link")).unwrap();
        let only = Directories::default();
        only.restrict(Directories::resolve(std::slice::from_ref(&inside)).unwrap());
        let check = |path: &str| {
            let path = dir.path().join(path);
            only.check("image", path.to_str().unwrap(), File::open(&path).unwrap())
        };
        assert!(check("in/deep/a").is_ok());
        for path in ["inside/b", "in/link", "in/../inside/b"] {
            let e = check(path).unwrap_err();
            assert_eq!(e.kind, ErrorKind::NotAuthorized);
            assert!(e.message.contains("inside/b"), "{e}");
        }
        assert!(only.check_new("image", &inside.join("deep/new")).is_ok());
        for path in ["inside/new", "in/../inside/new", "new"] {
            assert!(only.check_new("image", &dir.path().join(path)).is_err());
        }
        assert!(
            Directories::default()
                .check_new("image", Path::new("/new"))
                .is_ok()
        );
        assert!(Directories::resolve(&["/nowhere".into()]).is_err());
        // A device by a name in a folder that is allowed, wherever below /dev it is; nothing else.
        let shm = tempfile::tempdir_in("/dev/shm").unwrap();
        let link = shm.path().join("lv0");
        std::os::unix::fs::symlink("/dev/null", &link).unwrap();
        let hosts = shm.path().join("hosts");
        std::os::unix::fs::symlink("/etc/hosts", &hosts).unwrap();
        only.restrict(vec![shm.path().canonicalize().unwrap()]);
        let check =
            |path: &Path| only.check("image", path.to_str().unwrap(), File::open(path).unwrap());
        assert!(check(&link).is_ok());
        assert!(check(&hosts).is_err() && check(Path::new("/dev/zero")).is_err());
    }
}
