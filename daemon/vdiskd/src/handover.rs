//! Restarts that guests do not wait for.
//!
//! systemd ends the old process before it begins to set up the walls of the new one, and that takes longer than a guest should wait. So
//! a daemon that is told to end because its unit is restarted has a process without any work, the stand-in, end in its place, and
//! serves on until the new one, with its walls around it, asks for what is served. From the moment at which the stand-in ends, what
//! systemd keeps stays as it is, as the new process has been given it: nothing of front-ends is read, and no command is taken.
//!
//! This needs `KillMode=process`, and systemd 256 or later (`MAINPID=` of a unit that stops). Otherwise the old process ends, and guests
//! wait for the new one.

use std::io::{self, Read, Write};
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream as BlockingStream;
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

use nix::sys::signal::{SigSet, Signal, kill};
use nix::unistd::Pid;
use sd_notify::NotifyState;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::net::UnixStream;
use vdisk_exports::Keeper;
use zbus::{Connection, OwnedObjectPath};

use crate::control::Handle;
use crate::fd_store::FdStore;

/// What the new process finds its way to the old one by.
pub const NAME: &str = "handover.process";

/// How long to serve on for a new process that does not come.
const LIMIT: Duration = Duration::from_secs(30);

/// How long a process lives that is not one that fails, and takes to ask.
const LONG: Duration = Duration::from_secs(1);

/// How long the service manager and front-ends may take to get ready for it.
const PREPARATION: Duration = Duration::from_secs(1);

/// How long the old process may take to answer its requests and to close its images. Nobody else ends it: to the service manager it has
/// ended already.
pub const ENDING: Duration = Duration::from_secs(80);

/// How much longer it is waited for.
const MORE: Duration = Duration::from_secs(5);

/// The program that runs, whatever is installed in its place by now.
const THIS: &str = "/proc/self/exe";

const MANAGER: &str = "org.freedesktop.systemd1";

/// The unit of this process.
pub struct Unit {
    manager: Connection,
    path: OwnedObjectPath,
}

impl Unit {
    /// The unit of this process if the service manager is restarting it.
    pub async fn if_restarted(manager: Connection) -> Option<Unit> {
        let asked = tokio::time::timeout(PREPARATION, Unit::find(manager)).await;
        match asked {
            Ok(Ok(unit)) => unit,
            Ok(Err(error)) => {
                tracing::debug!(%error, "the service manager does not say why the daemon is to end");
                None
            }
            Err(_) => None,
        }
    }

    async fn find(manager: Connection) -> zbus::Result<Option<Unit>> {
        let root = "/org/freedesktop/systemd1";
        let systemd =
            zbus::Proxy::new(&manager, MANAGER, root, "org.freedesktop.systemd1.Manager").await?;
        let path: OwnedObjectPath = systemd.call("GetUnitByPID", &(std::process::id(),)).await?;
        let unit = Unit { manager, path };
        let (id, job): (u32, OwnedObjectPath) = unit.property("Unit", "Job").await?;
        if id == 0 {
            return Ok(None);
        }
        let interface = "org.freedesktop.systemd1.Job";
        let job = zbus::Proxy::new(&unit.manager, MANAGER, job, interface).await?;
        let kind: String = job.get_property("JobType").await?;
        Ok((kind == "restart").then_some(unit))
    }

    async fn property<T>(&self, interface: &str, name: &str) -> zbus::Result<T>
    where
        T: DeserializeOwned + zbus::Type,
    {
        let interface = format!("{MANAGER}.{interface}");
        let unit = zbus::Proxy::new(&self.manager, MANAGER, &self.path, interface).await?;
        unit.get_property(name).await
    }

    /// Returns when the service has had the same process for a while.
    async fn main_process_stays(&self) {
        let mut last = 0;
        loop {
            tokio::time::sleep(LONG).await;
            let asked = self.property::<u32>("Service", "MainPID");
            let now = match tokio::time::timeout(LONG, asked).await {
                Ok(Ok(now)) => now,
                _ => 0,
            };
            if now != 0 && now == last {
                return;
            }
            last = now;
        }
    }

    /// Has the service manager take another process for the service.
    async fn set_main_process(&self, pid: u32) -> io::Result<()> {
        sd_notify::notify(&[NotifyState::MainPid(pid)])?;
        // systemd closes it when it has seen what came before.
        let (here, there) = BlockingStream::pair()?;
        sd_notify::notify_with_fds(&[NotifyState::Custom("BARRIER=1")], &[there.as_fd()])?;
        drop(there);
        here.set_nonblocking(true)?;
        let _ = UnixStream::from_std(here)?.read(&mut [0]).await;
        let now = self.property::<u32>("Service", "MainPID").await;
        match now.map_err(io::Error::other)? {
            now if now == pid => Ok(()),
            _ => Err(io::Error::other(
                "the service manager takes no other process for the service (systemd 256 or later does)",
            )),
        }
    }
}

/// The old process while it serves on.
pub struct Handover {
    unit: Unit,
    successor: UnixStream,
}

impl Handover {
    /// Has the service manager go on with the restart. `None` if it cannot, or if that would not be noticed: the daemon ends
    /// then as always.
    pub async fn begin(unit: Unit, control: &Handle, store: &FdStore) -> Option<Handover> {
        let begun = tokio::time::timeout(PREPARATION, Handover::try_begin(unit, control, store));
        match begun
            .await
            .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))
        {
            Ok(Ok(handover)) => {
                tracing::info!("guests are served on until the new process is there");
                Some(handover)
            }
            Ok(Err(error)) | Err(error) => {
                store.thaw();
                store.forget(NAME);
                tracing::info!(reason = %error, "guests wait for the new process");
                // The service manager may have taken the stand-in for this process all the same.
                limit_end();
                None
            }
        }
    }

    async fn try_begin(unit: Unit, control: &Handle, store: &FdStore) -> io::Result<Handover> {
        if !control.hold().await {
            return Err(io::Error::other("a guest moves to another host"));
        }
        let (ours, theirs) = BlockingStream::pair()?;
        store.freeze_with(NAME, theirs.as_fd())?;
        drop(theirs);
        ours.set_nonblocking(true)?;
        let stand_in = StandIn::start().await?;
        let ours = UnixStream::from_std(ours)?;
        // A new process that begins after all must not take this one for gone.
        let ours = ManuallyDrop::new(ours);
        unit.set_main_process(stand_in.pid).await?;
        // It ends here, and is the service's end.
        drop(stand_in);
        Ok(Handover {
            unit,
            successor: ManuallyDrop::into_inner(ours),
        })
    }

    /// Returns when the new process wants to have what is served, when there will be none (the unit is stopped), and when none
    /// comes.
    pub async fn asked(&mut self) {
        let mut byte = [0];
        tokio::select! {
            read = self.successor.read(&mut byte) => match read {
                Ok(1) => {}
                _ => tracing::info!("there will be no new process"),
            },
            () = self.unit.main_process_stays() => {
                tracing::info!("the new process does not ask: it is of a version that does not know how to");
            }
            () = tokio::time::sleep(LIMIT) => {
                tracing::warn!("no new process has asked for what is served");
            }
        }
    }

    /// What is served is closed.
    pub fn end(self) -> Successor {
        Successor(self.successor.into_std().ok())
    }
}

/// From now on this process has a limited time: what it has not answered by then is done by the new one, as after a kill.
pub fn limit_end() {
    let limited = std::thread::Builder::new().name("vdiskd-end".into());
    // (Not a task: one that waits for a stuck thread holds up all of them.)
    let limited = limited.spawn(|| {
        std::thread::sleep(ENDING);
        tracing::error!("the end takes too long: what is in flight is left to the new process");
        // (Without a core: it would have guests' memory and keys, and take its time.)
        let _ = kill(Pid::this(), Signal::SIGKILL);
    });
    if let Err(error) = limited {
        tracing::error!(%error, "the end has no limit");
    }
}

/// The new process, which waits until this one has let go of everything.
pub struct Successor(Option<BlockingStream>);

impl Successor {
    /// Tells it so. (It hears the end of this process as well, somewhat later.)
    pub fn go_on(&self) {
        if let Some(mut stream) = self.0.as_ref() {
            let _ = stream.write_all(&[1]);
        }
    }
}

/// The new process: has the old one let go of what it serves. Blocks until it has.
///
/// # Errors
/// If it does not.
pub fn take_over(from: OwnedFd) -> Result<(), String> {
    // One that is stopped meanwhile has the old one end first: what is stopped does not serve.
    let signals = SigSet::from(Signal::SIGTERM);
    let blocked = signals.thread_block();
    let taken = ask(from);
    if blocked.is_ok() {
        let _ = signals.thread_unblock();
    }
    taken
}

fn ask(from: OwnedFd) -> Result<(), String> {
    let mut old = BlockingStream::from(from);
    // One that has ended in the meantime does not hear it.
    let _ = old.write_all(&[1]);
    let limited = old.set_read_timeout(Some(ENDING + MORE));
    match limited.and_then(|()| old.read(&mut [0])) {
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => Err(format!(
            "the process before this one does not end: it has been waited for {} seconds",
            (ENDING + MORE).as_secs()
        )),
        _ => Ok(()),
    }
}

/// A process that ends when this goes away, and whose parent is the service manager.
struct StandIn {
    pid: u32,
    _until: UnixStream,
}

impl StandIn {
    async fn start() -> io::Result<StandIn> {
        let (here, there) = BlockingStream::pair()?;
        // Nobody waits for it: this process ends soon.
        Command::new(THIS)
            .arg("--stand-in")
            .stdin(OwnedFd::from(there.try_clone()?))
            .stdout(OwnedFd::from(there))
            .stderr(Stdio::null())
            .spawn()?;
        here.set_nonblocking(true)?;
        let mut lines = BufReader::new(UnixStream::from_std(here)?);
        let mut line = String::new();
        lines.read_line(&mut line).await?;
        let pid = line.trim().parse();
        let pid = pid.map_err(|_| io::Error::other("there is no stand-in"))?;
        Ok(StandIn {
            pid,
            _until: lines.into_inner(),
        })
    }
}

/// What the stand-in does (`--stand-in`): says which process it is when `parent` has ended, so that the service manager is its parent,
/// and ends when its input does. With no parent to wait for, it starts one that does.
pub fn stand_in(parent: Option<u32>) -> ExitCode {
    let done = match parent {
        None => {
            let me = std::process::id().to_string();
            Command::new(THIS)
                .args(["--stand-in", &me])
                .spawn()
                .map(drop)
        }
        Some(parent) => outlive(parent),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

fn outlive(parent: u32) -> io::Result<()> {
    while std::os::unix::process::parent_id() == parent {
        std::thread::sleep(Duration::from_micros(200));
    }
    println!("{}", std::process::id());
    io::stdin().read_to_end(&mut Vec::new()).map(drop)
}
