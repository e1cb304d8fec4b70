//! What systemd does for a service that restarts: it keeps file descriptors, and hands them to the next process
//! (sd_notify(3) FDSTORE, sd_listen_fds(3)).

use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex};

use command_fds::{CommandFdExt, FdMapping};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};

type Store = Arc<Mutex<Vec<(String, OwnedFd)>>>;

pub struct Manager {
    socket: PathBuf,
    store: Store,
    heard: Arc<AtomicUsize>,
}

/// Acts on one message.
fn act(store: &Store, text: &str, fds: Vec<OwnedFd>) {
    let value = |key: &str| text.lines().find_map(|l| l.strip_prefix(key));
    let name = value("FDNAME=").unwrap_or("stored").to_owned();
    let mut store = store.lock().expect("no test panics with the store");
    if value("FDSTOREREMOVE=") == Some("1") {
        store.retain(|(n, _)| *n != name);
    } else if value("FDSTORE=") == Some("1") {
        assert_eq!(value("FDPOLL="), Some("0"), "systemd would drop it");
        assert!(!name.contains(':') && name.len() < 256, "{name}");
        store.extend(fds.into_iter().map(|fd| (name.clone(), fd)));
    }
}

impl Manager {
    pub fn new(dir: &Path) -> Manager {
        let path = dir.join("notify");
        let socket = UnixDatagram::bind(&path).expect("the scratch folder is writable");
        let store = Store::default();
        let there = store.clone();
        let heard = Arc::new(AtomicUsize::new(0));
        let count = heard.clone();
        std::thread::spawn(move || {
            loop {
                let mut bytes = [0; 4096];
                let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
                let mut control = RecvAncillaryBuffer::new(&mut space);
                let received = rustix::net::recvmsg(
                    socket.as_fd(),
                    &mut [IoSliceMut::new(&mut bytes)],
                    &mut control,
                    RecvFlags::CMSG_CLOEXEC,
                );
                let Ok(received) = received else { return };
                let mut fds = Vec::new();
                for message in control.drain() {
                    if let RecvAncillaryMessage::ScmRights(rights) = message {
                        fds.extend(rights);
                    }
                }
                count.fetch_add(1, Relaxed);
                let text = String::from_utf8_lossy(&bytes[..received.bytes]).into_owned();
                act(&there, &text, fds);
            }
        });
        Manager {
            socket: path,
            store,
            heard,
        }
    }

    /// Messages so far.
    pub fn heard(&self) -> usize {
        self.heard.load(Relaxed)
    }

    /// Loses what has this name.
    pub fn lose(&self, name: &str) {
        let mut store = self.store.lock().expect("no test panics with the store");
        store.retain(|(n, _)| n != name);
    }

    /// Names of what is kept.
    pub fn kept(&self) -> Vec<String> {
        let store = self.store.lock().expect("no test panics with the store");
        store.iter().map(|(name, _)| name.clone()).collect()
    }

    /// A command that runs a program with what is kept.
    pub fn command(&self, program: &Path) -> Command {
        let store = self.store.lock().expect("no test panics with the store");
        let mut command = Command::new("sh");
        // The process that is named is the one that it becomes.
        command.args(["-c", "LISTEN_PID=$$ exec \"$0\" \"$@\""]);
        command.arg(program);
        let names: Vec<&str> = store.iter().map(|(name, _)| name.as_str()).collect();
        command.env("NOTIFY_SOCKET", &self.socket);
        command.env("LISTEN_FDS", store.len().to_string());
        command.env("LISTEN_FDNAMES", names.join(":"));
        let mappings = store.iter().enumerate().map(|(i, (_, fd))| FdMapping {
            parent_fd: fd.try_clone().expect("descriptors are left"),
            child_fd: 3 + i as i32,
        });
        command
            .fd_mappings(mappings.collect())
            .expect("each number is used once");
        command
    }
}
