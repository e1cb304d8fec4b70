//! What vdiskctl(1) runs as `vdiskctl domain`, and what of it the watcher has use for.

mod adopt;
pub mod args;
mod backup;
mod backup_server;
mod devices;
mod disks;
mod files;
pub mod libvirt;
pub mod list;
mod live;
mod migrate;
mod mirrored;
mod snapshots;

use std::cell::RefCell;
use std::io::Write;
use std::process::ExitCode;
use std::time::Duration;

use clap::{CommandFactory, Parser};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Notify;
use vdisk_domain::{Busy, Domain, take_down};
use vdiskctl::daemon::{self, Daemon};
use vdiskctl::error::{Error, Result};

use args::{Args, Command};
use libvirt::{Guest, Libvirt};

/// What every command has at hand.
pub struct Context {
    pub args: Args,
    pub libvirt: Libvirt,
    opened: RefCell<Option<Opened>>,
    has_to_close: Notify,
}

/// How long a command may take to end that was interrupted.
const LAST_STEPS: Duration = Duration::from_secs(5);

/// The disks of a domain that is shut off, which were opened for the command: by which daemon, and the domain's name and UUID.
struct Opened {
    daemon: Daemon,
    domain: String,
    uuid: String,
}

impl Context {
    fn has_opened(&self) -> bool {
        self.opened.borrow().is_some()
    }

    fn opened(&self, guest: &Guest, daemon: &Daemon, uuid: &str) {
        self.opened.replace(Some(Opened {
            daemon: daemon.clone(),
            domain: guest.name.clone(),
            uuid: uuid.to_owned(),
        }));
        self.has_to_close.notify_one();
    }

    /// Closes what was opened for the command.
    async fn close(&self) -> Result<()> {
        let Some(opened) = self.opened.take() else {
            return Ok(());
        };
        let closed = take_down(&opened.daemon, &opened.uuid, Busy::Stays).await;
        closed.map_err(|e| {
            Error::failed(format!(
                "{e}; disks of '{}' may be open still: vdiskctl domain cleanup",
                opened.domain
            ))
        })?;
        self.libvirt.find(&opened.domain)?.keep_off(false)
    }

    /// Returns when the user has had enough, once there is something to close.
    async fn interrupted(&self) {
        self.has_to_close.notified().await;
        let terminated = async {
            match signal(SignalKind::terminate()) {
                Ok(mut signals) => signals.recv().await,
                Err(_) => std::future::pending().await,
            }
        };
        tokio::select! {
            _ = tokio::signal::ctrl_c() => {}
            _ = terminated => {}
        }
    }

    /// The daemon that serves a domain.
    async fn daemon(&self, domain: &Domain) -> Result<Daemon> {
        let mut to = self.args.daemon.clone();
        // The one that serves it, whatever else is said.
        if !domain.metadata.disks.is_empty() {
            to.instance.clone_from(&domain.metadata.instance);
        }
        daemon::connect(&to).await
    }
}

pub fn wrong(e: vdisk_domain::Error) -> Error {
    Error::invalid(e.to_string())
}

pub fn failed(e: vdisk_domain::Failure) -> Error {
    Error::failed(e.to_string())
}

fn print(bytes: &[u8]) {
    let _ = std::io::stdout().write_all(bytes);
}

async fn run(args: Args) -> Result<()> {
    match &args.command {
        Command::Man => {
            let mut page = Vec::new();
            vdiskctl::commands::man_page(Args::command(), "vdiskctl domain", &mut page)
                .map_err(|e| Error::failed(e.to_string()))?;
            print(&page);
            return Ok(());
        }
        Command::Completion { shell } => {
            let mut script = Vec::new();
            let command = &mut Args::command();
            clap_complete::generate(*shell, command, "vdiskctl-domain", &mut script);
            print(&script);
            return Ok(());
        }
        // (No domain has anything to do with it.)
        Command::Receive(command) => return mirrored::receive(&args, command).await,
        _ => {}
    }
    let libvirt = Libvirt::open(&args.connect)?;
    let cx = Context {
        args,
        libvirt,
        opened: RefCell::default(),
        has_to_close: Notify::new(),
    };
    // What one of us reads another one must not have changed when it is written.
    let _lock = match cx.args.command.changes() {
        Some(domain) => Some(cx.libvirt.find(domain)?.lock()?),
        None => None,
    };
    let mut running = std::pin::pin!(command(&cx));
    let done = tokio::select! {
        done = &mut running => done,
        // Jobs are cancelled then, and what else is under way ends by itself.
        () = cx.interrupted() => match tokio::time::timeout(LAST_STEPS, running).await {
            Ok(done) => done,
            Err(_) => Err(Error::failed("interrupted")),
        },
    };
    // What went wrong first is what matters.
    let closed = cx.close().await;
    done.and(closed)
}

async fn command(cx: &Context) -> Result<()> {
    match &cx.args.command {
        Command::List { all } => list::list(cx, *all).await,
        Command::Cleanup { dry_run } => list::cleanup(cx, *dry_run).await,
        Command::Info { domain } => list::info(cx, domain).await,
        Command::Adopt { .. } => adopt::adopt(cx).await,
        Command::Release { .. } => adopt::release(cx).await,
        Command::Attach { .. } => devices::attach(cx).await,
        Command::Detach { .. } => devices::detach(cx).await,
        Command::Snapshot(command) => snapshots::run(cx, command).await,
        Command::BlockCommit { .. } | Command::BlockPull { .. } => live::merge(cx).await,
        Command::BlockCopy { .. } => live::copy(cx).await,
        Command::Backup { .. } => backup::backup(cx).await,
        Command::Migrate(command) => migrate::migrate(cx, command).await,
        Command::Resize { .. } => live::resize(cx).await,
        Command::Throttle { .. } => live::throttle(cx).await,
        Command::Threshold { .. } => live::threshold(cx).await,
        Command::Stats { domain } => list::stats(cx, domain).await,
        Command::Receive(_) | Command::Man | Command::Completion { .. } => Ok(()),
    }
}

/// What `vdiskctl-domain` does with its command line.
pub fn main() -> ExitCode {
    vdiskctl::run(run(Args::parse()))
}
