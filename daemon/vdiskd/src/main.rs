//! vdiskd: a storage daemon for virtual machines.

mod control;
mod dbus;
mod fd_store;
mod logging;
mod service;

use std::fs::{File, TryLockError};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::{CommandFactory, Parser};
use tokio::signal::unix::{SignalKind, signal};
use vdisk_block::Runtime;
use vdisk_exports::Keeper;
use vdisk_io::{DEFAULT_POLL_MAX, EngineChoice};

use control::Defaults;
use dbus::Bus;
use fd_store::FdStore;
use sd_notify::NotifyState;

/// Serves disk images to virtual machines.
///
/// vdiskd needs no configuration: nodes, exports and I/O threads are made over D-Bus, most easily with
/// vdiskctl(1).
#[derive(Debug, Parser)]
#[command(name = "vdiskd", version)]
struct Args {
    /// Serve on the system bus (the default)
    #[arg(long, conflicts_with_all = ["session", "bus_address"])]
    system: bool,

    /// Serve on the session bus of the calling user
    #[arg(long, conflicts_with = "bus_address")]
    session: bool,

    /// Serve on the bus at this D-Bus address
    #[arg(long, value_name = "ADDRESS")]
    bus_address: Option<String>,

    /// What I/O threads run on: uring, aio (Linux AIO for O_DIRECT, threads for the rest), threads, or
    /// auto for the best that the kernel allows
    #[arg(long, value_name = "ENGINE", default_value = "auto")]
    io_engine: EngineChoice,

    /// I/O threads to start with, named io0, io1, …
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=64))]
    io_threads: u8,

    /// Ceiling of busy polling of a queue in nanoseconds; 0 switches polling off
    #[arg(long, value_name = "NS", default_value_t = DEFAULT_POLL_MAX.as_nanos() as u64,
          value_parser = clap::value_parser!(u64).range(0..=1_000_000_000))]
    poll_max_ns: u64,

    /// Folder for what must outlive the daemon, but not the machine: logs of writes that were answered and not flushed
    /// (default: $RUNTIME_DIRECTORY, or vdiskd in $XDG_RUNTIME_DIR or /run)
    #[arg(long, value_name = "DIR")]
    runtime_dir: Option<PathBuf>,

    /// End after so many seconds with nothing to serve and without a call; 0 for never. (The bus starts it again.)
    #[arg(long, value_name = "SECONDS", default_value_t = 0)]
    idle_exit: u32,

    /// Begin with nothing: forget what an earlier daemon has left
    #[arg(long)]
    fresh: bool,

    /// Print the man page and exit
    #[arg(long, hide = true, exclusive = true)]
    man: bool,
}

fn main() -> ExitCode {
    let args = Args::parse();
    if args.man {
        return print_man_page();
    }
    logging::start();
    let runtime = match tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(16)
        .thread_name("vdiskd-blocking")
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => {
            tracing::error!(%error, "cannot start");
            return ExitCode::FAILURE;
        }
    };
    match runtime.block_on(run(args)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(error, "cannot start");
            ExitCode::FAILURE
        }
    }
}

fn print_man_page() -> ExitCode {
    let page = clap_mangen::Man::new(Args::command()).section("8");
    match page.render(&mut std::io::stdout()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

/// Finds and makes the runtime folder. None if the user did not name one and none of the usual places will do.
fn runtime_dir(given: Option<PathBuf>) -> Result<Option<PathBuf>, String> {
    let from_environment = || {
        if let Some(dir) = std::env::var_os("RUNTIME_DIRECTORY") {
            return PathBuf::from(dir);
        }
        let base = std::env::var_os("XDG_RUNTIME_DIR").unwrap_or_else(|| "/run".into());
        PathBuf::from(base).join("vdiskd")
    };
    let is_given = given.is_some();
    let dir = given.unwrap_or_else(from_environment);
    let made = std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&dir);
    match made {
        Ok(()) => Ok(Some(dir)),
        Err(e) if is_given => Err(format!("runtime folder '{}': {e}", dir.display())),
        Err(error) => {
            tracing::warn!(dir = %dir.display(), %error, "the runtime folder cannot be made");
            Ok(None)
        }
    }
}

/// How long a daemon that has been told to end may take to leave the runtime folder.
const PATIENCE: Duration = Duration::from_secs(5);

/// Makes the runtime folder this daemon's alone, for as long as the file is open.
async fn lock(dir: &Path) -> Result<File, String> {
    let path = dir.join("lock");
    let what = format!("runtime folder '{}'", dir.display());
    let file = File::options()
        .write(true)
        .create(true)
        .truncate(false)
        .open(&path)
        .map_err(|e| format!("{what}: {e}"))?;
    let start = Instant::now();
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::Error(e)) => return Err(format!("{what}: {e}")),
            Err(TryLockError::WouldBlock) if start.elapsed() > PATIENCE => {
                return Err(format!(
                    "{what} is in use by another vdiskd: stop that one, or give another --runtime-dir"
                ));
            }
            Err(TryLockError::WouldBlock) => tokio::time::sleep(Duration::from_millis(5)).await,
        }
    }
}

async fn run(args: Args) -> Result<(), String> {
    let bus = match args.bus_address {
        Some(address) => Bus::Address(address),
        None if args.session => Bus::Session,
        None => Bus::System,
    };
    // From here on a signal ends the daemon in order.
    let mut terminate = signal(SignalKind::terminate()).map_err(|e| e.to_string())?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(|e| e.to_string())?;
    let mut hangup = signal(SignalKind::hangup()).map_err(|e| e.to_string())?;
    let runtime_dir = runtime_dir(args.runtime_dir)?;
    let _lock = match &runtime_dir {
        Some(dir) => Some(lock(dir).await?),
        None => None,
    };
    let left = fd_store::passed();
    let store = FdStore::find(&left).map_err(|e| format!("passed file descriptors: {e}"))?;
    let store = store.map(Arc::new);
    let keeper = store.clone().map(|store| store as Arc<dyn Keeper>);
    let defaults = Defaults {
        engine: args.io_engine,
        poll_max: Duration::from_nanos(args.poll_max_ns),
        io_threads: args.io_threads.into(),
        runtime: Runtime {
            dir: runtime_dir,
            ..Runtime::default()
        },
    };
    let control = control::start(defaults, keeper, left, args.fresh)
        .await
        .map_err(|e| e.message)?;
    let engine = control.world().engine;
    let front = dbus::start(bus.clone(), control.clone())
        .await
        .map_err(|e| format!("D-Bus ({bus:?}): {e}"))?;
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        %engine,
        "ready"
    );
    let _ = sd_notify::notify(&[NotifyState::Ready, NotifyState::Status("serving")]);
    tokio::spawn(service::watchdog(control.clone()));
    let idle = async {
        match args.idle_exit {
            0 => std::future::pending().await,
            seconds => {
                let limit = Duration::from_secs(seconds.into());
                service::until_idle(&front, &control, limit).await;
            }
        }
    };
    let mut again = false;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
        _ = hangup.recv(), if store.is_some() => again = true,
        () = idle => tracing::info!("there is nothing to do"),
    }
    match again {
        true => {
            tracing::info!("becoming the program that is installed now");
            let now = NotifyState::monotonic_usec_now().map_err(|e| e.to_string())?;
            let _ = sd_notify::notify(&[NotifyState::Reloading, now]);
        }
        false => {
            tracing::info!("stopping");
            let _ = sd_notify::notify(&[NotifyState::Stopping]);
        }
    }
    control.shutdown().await;
    match (again, store) {
        (true, Some(store)) => match store.exec() {
            Ok(never) => match never {},
            Err(e) => Err(format!("the new program: {e}")),
        },
        _ => {
            tracing::info!("stopped");
            Ok(())
        }
    }
}
