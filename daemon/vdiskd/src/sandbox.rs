//! What the daemon takes from itself before there are guests: system calls that it does not need (seccomp(2)), programs other than its
//! own, and, if vdiskd.toml says where images may be, files elsewhere (landlock(7)). It stands behind what its unit forbids, and where
//! there is no unit.
//!
//! It makes a daemon that was taken over by its guest less useful; it does not hold everything that a unit does. What the loader can read it
//! can also run, and a ring can make sockets without socket(2): the unit has PrivateNetwork=, NoNewPrivileges= and no capability for that.
//!
//! Both last as long as the process does, also when it becomes the program that is installed by then. That one must have the same:
//! [`Sandbox::needs_new_process`] says so if not.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use landlock::{
    ABI, Access, AccessFs, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetStatus, Scope,
};
use seccompiler::{
    SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
};

/// Says which rules the process is under already.
const ENTERED: &str = "VDISKD_SANDBOX";

static NAME: OnceLock<String> = OnceLock::new();

/// What the program that this process becomes must find in its environment.
pub fn entered() -> Option<(&'static str, &'static str)> {
    Some((ENTERED, NAME.get()?))
}

/// To be counted up with each change of the rules: a program with others must not go on under them.
const VERSION: u32 = 2;

/// System calls that are allowed with any arguments.
#[rustfmt::skip]
const ALLOWED: &[i64] = &[
    // Images, logs, state.
    libc::SYS_openat, libc::SYS_close, libc::SYS_close_range, libc::SYS_read, libc::SYS_write, libc::SYS_readv, libc::SYS_writev,
    libc::SYS_pread64, libc::SYS_pwrite64, libc::SYS_preadv, libc::SYS_pwritev, libc::SYS_preadv2, libc::SYS_pwritev2,
    libc::SYS_lseek, libc::SYS_fsync, libc::SYS_fdatasync, libc::SYS_sync_file_range, libc::SYS_fallocate, libc::SYS_ftruncate,
    libc::SYS_truncate, libc::SYS_fadvise64, libc::SYS_flock, libc::SYS_fcntl, libc::SYS_ioctl, libc::SYS_fstat,
    libc::SYS_newfstatat, libc::SYS_statx, libc::SYS_statfs, libc::SYS_fstatfs, libc::SYS_getdents64, libc::SYS_faccessat,
    libc::SYS_faccessat2, libc::SYS_readlinkat, libc::SYS_mkdirat, libc::SYS_unlinkat, libc::SYS_renameat, libc::SYS_renameat2,
    libc::SYS_fchmod, libc::SYS_fchmodat, libc::SYS_fchown, libc::SYS_fchownat, libc::SYS_umask, libc::SYS_getcwd,
    libc::SYS_copy_file_range, libc::SYS_memfd_create,
    // Engines, sockets, waiting.
    libc::SYS_io_uring_setup, libc::SYS_io_uring_enter, libc::SYS_io_uring_register,
    libc::SYS_io_setup, libc::SYS_io_submit, libc::SYS_io_getevents, libc::SYS_io_destroy, libc::SYS_io_cancel,
    libc::SYS_socketpair, libc::SYS_bind, libc::SYS_listen, libc::SYS_accept4, libc::SYS_accept, libc::SYS_connect, libc::SYS_shutdown,
    libc::SYS_sendmsg, libc::SYS_recvmsg, libc::SYS_sendto, libc::SYS_recvfrom, libc::SYS_sendmmsg, libc::SYS_recvmmsg,
    libc::SYS_getsockname, libc::SYS_getpeername, libc::SYS_getsockopt, libc::SYS_setsockopt,
    libc::SYS_epoll_create1, libc::SYS_epoll_ctl, libc::SYS_epoll_pwait, libc::SYS_epoll_pwait2, libc::SYS_ppoll, libc::SYS_eventfd2,
    libc::SYS_timerfd_create, libc::SYS_timerfd_settime, libc::SYS_timerfd_gettime, libc::SYS_pipe2, libc::SYS_dup, libc::SYS_dup3,
    libc::SYS_signalfd4,
    // Memory, threads, signals, time.
    libc::SYS_mmap, libc::SYS_munmap, libc::SYS_mprotect, libc::SYS_mremap, libc::SYS_madvise, libc::SYS_mincore, libc::SYS_brk, libc::SYS_mlock,
    libc::SYS_munlock, libc::SYS_membarrier, libc::SYS_futex, libc::SYS_set_robust_list, libc::SYS_get_robust_list, libc::SYS_rseq,
    libc::SYS_set_tid_address, libc::SYS_exit, libc::SYS_exit_group, libc::SYS_gettid, libc::SYS_getpid,
    libc::SYS_getppid, libc::SYS_getuid, libc::SYS_geteuid, libc::SYS_getgid, libc::SYS_getegid, libc::SYS_getgroups,
    libc::SYS_sched_yield, libc::SYS_sched_getaffinity, libc::SYS_sched_setaffinity, libc::SYS_getcpu, libc::SYS_prctl,
    libc::SYS_prlimit64, libc::SYS_getrusage, libc::SYS_sysinfo, libc::SYS_uname, libc::SYS_getrandom,
    libc::SYS_rt_sigaction, libc::SYS_rt_sigprocmask, libc::SYS_rt_sigreturn, libc::SYS_rt_sigtimedwait, libc::SYS_sigaltstack,
    libc::SYS_restart_syscall, libc::SYS_nanosleep, libc::SYS_clock_nanosleep, libc::SYS_clock_gettime, libc::SYS_clock_getres,
    libc::SYS_gettimeofday,
    // The program that is installed by then.
    libc::SYS_execve,
];

#[cfg(target_arch = "x86_64")]
#[rustfmt::skip]
const ALLOWED_OLD: &[i64] = &[
    libc::SYS_open, libc::SYS_stat, libc::SYS_lstat, libc::SYS_access, libc::SYS_readlink, libc::SYS_mkdir, libc::SYS_rmdir,
    libc::SYS_unlink, libc::SYS_rename, libc::SYS_chmod, libc::SYS_chown, libc::SYS_poll, libc::SYS_epoll_wait, libc::SYS_epoll_create,
    libc::SYS_eventfd, libc::SYS_pipe, libc::SYS_dup2, libc::SYS_time, libc::SYS_arch_prctl, libc::SYS_getrlimit, libc::SYS_setrlimit,
    libc::SYS_getdents,
];
#[cfg(not(target_arch = "x86_64"))]
const ALLOWED_OLD: &[i64] = &[];

/// What is to be forbidden.
pub struct Sandbox {
    /// Folders in which files may be changed, and others be read; None for all.
    files: Option<Folders>,
}

/// What of the file system is left.
pub struct Folders {
    pub change: Vec<PathBuf>,
    /// Images that are in use although they are elsewhere.
    pub images: Vec<PathBuf>,
    /// May be read as well: where the configuration and credentials are.
    pub read: Vec<PathBuf>,
    /// Sockets are in folders that are left, all of them.
    pub sockets: bool,
}

/// Where a program finds what it needs to start.
const READ: [&str; 8] = [
    "/usr",
    "/lib",
    "/lib64",
    "/bin",
    "/etc",
    "/proc",
    "/sys",
    "/run/systemd",
];

impl Sandbox {
    pub fn new(files: Option<Folders>) -> Sandbox {
        Sandbox { files }
    }

    /// What the rules are known by.
    fn name(&self) -> String {
        match &self.files {
            None => format!("{VERSION}"),
            Some(files) => format!("{VERSION} {:?} {}", files.change, files.sockets),
        }
    }

    /// Whether this process is under other rules, which nothing takes back: a new one has to begin for these.
    pub fn needs_new_process(&self) -> bool {
        let entered = NAME.get().cloned().or_else(|| std::env::var(ENTERED).ok());
        entered.is_some_and(|entered| entered != self.name())
    }

    /// Takes it from this thread, and from those that it starts. Must be called before there are others, and not if the process is
    /// under other rules.
    ///
    /// # Errors
    /// If that cannot be done.
    pub fn enter(&self) -> Result<(), String> {
        let name = self.name();
        if std::env::var(ENTERED).is_ok_and(|entered| entered == name) {
            let _ = NAME.set(name);
            return Ok(());
        }
        let files = self
            .restrict_files()
            .map_err(|e| format!("landlock: {e}"))?;
        // The last one forbids others.
        for program in [without_clone3(), filter()] {
            let program = program.map_err(|e| format!("seccomp: {e}"))?;
            seccompiler::apply_filter(&program).map_err(|e| format!("seccomp: {e}"))?;
        }
        let _ = NAME.set(name);
        tracing::debug!(%files, "what is not needed is forbidden from now on");
        Ok(())
    }

    fn restrict_files(&self) -> Result<&'static str, landlock::RulesetError> {
        let execute = AccessFs::Execute;
        let abi = ABI::V6;
        let mut handled = match &self.files {
            None => execute.into(),
            Some(_) => AccessFs::from_all(abi),
        };
        if self.files.as_ref().is_some_and(|f| !f.sockets) {
            handled &= !(AccessFs::MakeSock | AccessFs::RemoveFile);
        }
        let mut rules = Ruleset::default()
            .set_compatibility(CompatLevel::BestEffort)
            .handle_access(handled)?
            .scope(Scope::Signal)?
            .create()?;
        let mut allow = |path: &Path, access: landlock::BitFlags<AccessFs>| {
            // What is not there needs no rule.
            let Ok(fd) = PathFd::new(path) else {
                return Ok(());
            };
            let access = match path.is_dir() {
                true => access,
                false => access & AccessFs::from_file(abi),
            };
            (&mut rules)
                .add_rule(PathBeneath::new(fd, access & handled))
                .map(|_| ())
        };
        for program in programs() {
            allow(&program, AccessFs::from_read(abi))?;
        }
        if let Some(files) = &self.files {
            let read = AccessFs::from_read(abi) & !execute;
            let more = files.read.iter().map(PathBuf::as_path);
            for folder in READ.into_iter().map(Path::new).chain(more) {
                allow(folder, read)?;
            }
            let change = AccessFs::from_all(abi) & !execute;
            for folder in &files.change {
                allow(folder, change)?;
            }
            for file in &files.images {
                allow(file, change)?;
            }
            for device in ["null", "urandom", "random", "zero"] {
                allow(&Path::new("/dev").join(device), change)?;
            }
            // Devices come and go.
            if files.change.iter().any(|folder| folder.starts_with("/dev")) {
                let use_it = AccessFs::ReadFile | AccessFs::ReadDir | AccessFs::WriteFile;
                allow(Path::new("/dev"), use_it | AccessFs::IoctlDev)?;
            }
        }
        let status = rules.restrict_self()?;
        Ok(match status.ruleset {
            RulesetStatus::FullyEnforced => "restricted",
            RulesetStatus::PartiallyEnforced => "restricted as far as this kernel can",
            RulesetStatus::NotEnforced => "this kernel has no landlock",
        })
    }
}

/// What may be executed: programs beside this one (it may have been replaced when it is started again), and the loader.
fn programs() -> Vec<PathBuf> {
    let beside = std::env::current_exe().ok();
    let beside = beside.and_then(|p| Some(p.parent()?.to_owned()));
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let loader = maps
        .lines()
        .filter_map(|line| Some(&line[line.find('/')?..]))
        .find(|path| {
            path.rsplit('/')
                .next()
                .is_some_and(|n| n.starts_with("ld-"))
        });
    beside
        .into_iter()
        .chain(loader.map(PathBuf::from))
        .collect()
}

fn filter() -> Result<seccompiler::BpfProgram, seccompiler::BackendError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    for number in ALLOWED.iter().chain(ALLOWED_OLD) {
        rules.insert(*number, Vec::new());
    }
    let only = |index, operator, value: u64| {
        let condition = SeccompCondition::new(index, SeccompCmpArgLen::Dword, operator, value)?;
        SeccompRule::new(vec![condition]).map(|rule| vec![rule])
    };
    // Threads, and no namespaces.
    let spaces = libc::CLONE_NEWUSER
        | libc::CLONE_NEWNS
        | libc::CLONE_NEWPID
        | libc::CLONE_NEWNET
        | libc::CLONE_NEWIPC
        | libc::CLONE_NEWUTS
        | libc::CLONE_NEWCGROUP;
    let no_spaces = SeccompCmpOp::MaskedEq(spaces as u32 as u64);
    rules.insert(libc::SYS_clone, only(0, no_spaces, 0)?);
    // Its flags cannot be seen from here: see without_clone3.
    rules.insert(libc::SYS_clone3, Vec::new());
    // The bus, the journal, front-ends.
    let unix = libc::AF_UNIX as u64;
    rules.insert(libc::SYS_socket, only(0, SeccompCmpOp::Eq, unix)?);
    // To end itself; not others.
    let me = u64::from(std::process::id());
    rules.insert(libc::SYS_tgkill, only(0, SeccompCmpOp::Eq, me)?);
    rules.insert(libc::SYS_kill, only(0, SeccompCmpOp::Eq, me)?);
    let refuse = SeccompAction::Errno(libc::EPERM as u32);
    let arch = std::env::consts::ARCH.try_into()?;
    SeccompFilter::new(rules, refuse, SeccompAction::Allow, arch)?.try_into()
}

/// Has the C library use clone(2), whose flags can be looked at.
fn without_clone3() -> Result<seccompiler::BpfProgram, seccompiler::BackendError> {
    let rules = BTreeMap::from([(libc::SYS_clone3, Vec::new())]);
    let refuse = SeccompAction::Errno(libc::ENOSYS as u32);
    let arch = std::env::consts::ARCH.try_into()?;
    SeccompFilter::new(rules, SeccompAction::Allow, refuse, arch)?.try_into()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// In a thread of its own, which alone is under the rules.
    fn inside<T: Send + 'static>(
        files: Option<Folders>,
        act: impl FnOnce() -> T + Send + 'static,
    ) -> T {
        let thread = std::thread::spawn(move || {
            Sandbox::new(files).restrict_files().unwrap();
            for program in [without_clone3(), filter()] {
                seccompiler::apply_filter(&program.unwrap()).unwrap();
            }
            act()
        });
        thread.join().unwrap()
    }

    #[test]
    fn system_calls_that_are_not_needed_are_refused() {
        use rustix::io::Errno;
        use rustix::net::{AddressFamily, SocketType, socket};
        use rustix::process::{Pid, PidfdFlags};
        let me = rustix::process::getpid();
        let refused = inside(None, move || {
            [
                socket(AddressFamily::INET, SocketType::STREAM, None).err(),
                socket(AddressFamily::NETLINK, SocketType::RAW, None).err(),
                rustix::process::test_kill_process(Pid::INIT).err(),
                rustix::process::pidfd_open(me, PidfdFlags::empty()).err(),
                rustix::process::chroot("/").err(),
                rustix::process::setsid().err(),
                rustix::system::sethostname(b"x").err(),
                rustix::thread::set_thread_uid(rustix::process::getuid()).err(),
            ]
        });
        assert_eq!(refused, [Some(Errno::PERM); 8]);
        inside(None, move || {
            rustix::process::test_kill_process(me).unwrap();
            std::thread::spawn(|| ()).join().unwrap();
            std::os::unix::net::UnixDatagram::unbound().unwrap();
            std::fs::read("/proc/self/status").unwrap();
        });
    }

    #[test]
    fn other_programs_are_not_started() {
        let e = inside(None, || {
            use std::os::unix::process::CommandExt;
            std::process::Command::new("/bin/sh")
                .arg("-c")
                .arg(":")
                .exec()
        });
        assert_eq!(e.raw_os_error(), Some(libc::EACCES), "{e}");
    }

    #[test]
    fn files_elsewhere_are_out_of_reach() {
        let dir = tempfile::tempdir().unwrap();
        let (mine, other) = (dir.path().join("mine"), dir.path().join("other"));
        for folder in [&mine, &other] {
            std::fs::create_dir(folder).unwrap();
            std::fs::write(folder.join("a"), "a").unwrap();
            std::fs::write(folder.join("b"), "b").unwrap();
        }
        let folders = Folders {
            change: vec![mine.clone()],
            images: vec![other.join("b")],
            read: Vec::new(),
            sockets: true,
        };
        inside(Some(folders), move || {
            std::fs::write(mine.join("new"), "x").unwrap();
            std::fs::rename(mine.join("new"), mine.join("newer")).unwrap();
            std::fs::read("/etc/hostname")
                .or_else(|_| std::fs::read("/etc/passwd"))
                .unwrap();
            // In use before.
            std::fs::write(other.join("b"), "x").unwrap();
            let denied = std::io::ErrorKind::PermissionDenied;
            for result in [
                std::fs::read(other.join("a")).map(|_| ()),
                std::fs::write(other.join("new"), "x"),
                std::fs::write("/etc/vdiskd-test", "x"),
                std::fs::remove_file(other.join("a")),
                std::fs::rename(mine.join("a"), other.join("c")),
                std::os::unix::net::UnixListener::bind(other.join("s")).map(|_| ()),
            ] {
                assert_eq!(result.unwrap_err().kind(), denied);
            }
        });
    }
}
