//! vdiskd: a storage daemon for virtual machines.

mod config;
mod control;
mod dbus;
mod fd_store;
mod folders;
mod handover;
mod logging;
mod metrics;
mod sandbox;
mod service;

use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::{CommandFactory, Parser};
use futures_util::FutureExt;
use tokio::signal::unix::{SignalKind, signal};
use vdisk_block::{Directories, Runtime};
use vdisk_exports::Keeper;
use vdisk_io::{DEFAULT_POLL_MAX, EngineChoice};

use config::Config;
use control::{Defaults, Follow, Limits, MemoryLimit, Sockets};
use dbus::{Bus, Trusted};
use fd_store::{FdStore, Passed};
use folders::{lock, runtime_dir, state_dir};
use handover::{Handover, Successor, Unit};
use sandbox::{Folders, Sandbox};
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

    /// Be an instance of this name, beside other daemons on the bus: as org.vdisk1.instance.NAME, with folders of its own
    #[arg(long, value_name = "NAME")]
    instance: Option<String>,

    /// Read this file instead of /etc/vdiskd/vdiskd.toml (and those in FILE.d), see vdiskd.toml(5). What is given here counts more
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,

    /// Say what is wrong with the configuration, and end
    #[arg(long)]
    check_config: bool,

    /// What I/O threads run on: uring, aio (Linux AIO for O_DIRECT, threads for the rest), threads, or
    /// auto for the best that the kernel allows (the default)
    #[arg(long, value_name = "ENGINE")]
    io_engine: Option<EngineChoice>,

    /// I/O threads to start with, named io0, io1, … (default: 1)
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=64))]
    io_threads: Option<u8>,

    /// Ceiling of busy polling of a queue in nanoseconds; 0 switches polling off (default: 32000)
    #[arg(long, value_name = "NS", value_parser = clap::value_parser!(u64).range(0..=1_000_000_000))]
    poll_max_ns: Option<u64>,

    /// Folder for what must outlive the daemon, but not the machine: logs of writes that were answered and not flushed
    /// (default: $RUNTIME_DIRECTORY, or vdiskd in $XDG_RUNTIME_DIR or /run)
    #[arg(long, value_name = "DIR")]
    runtime_dir: Option<PathBuf>,

    /// Folder for what must outlive the machine: persistent exports (default: $STATE_DIRECTORY, or vdiskd in $XDG_STATE_HOME
    /// or /var/lib, with --session in ~/.local/state; made when it is needed)
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,

    /// End after so many seconds with nothing to serve and without a call; 0 for never. The bus starts it again. (Default: 60 under a service manager, 0 otherwise)
    #[arg(long, value_name = "SECONDS")]
    idle_exit: Option<u32>,

    /// Begin with nothing but persistent exports: forget what an earlier daemon has left
    #[arg(long)]
    fresh: bool,

    /// Give up what is not needed: system calls, other programs, and files outside of images.directories if that is
    /// configured (see vdiskd.toml(5))
    #[arg(long, value_name = "ON|OFF", default_value = "on", value_parser = clap::builder::BoolishValueParser::new())]
    sandbox: bool,

    /// Be the process that ends in a daemon's place when its unit is restarted (see handover.rs)
    #[arg(long, hide = true, exclusive = true, value_name = "PARENT", num_args = 0..=1, default_missing_value = "0")]
    stand_in: Option<u32>,

    /// Print the man page and exit
    #[arg(long, hide = true, exclusive = true)]
    man: bool,
}

fn main() -> ExitCode {
    let args = Args::parse();
    if args.man {
        return print_man_page();
    }
    if let Some(parent) = args.stand_in {
        return handover::stand_in((parent != 0).then_some(parent));
    }
    if let Err(error) = vdisk_dbus::bus_name(args.instance.as_deref()) {
        eprintln!("error: {error}");
        return ExitCode::from(2);
    }
    let config = match Config::load(args.config.as_deref(), args.instance.as_deref()) {
        Ok(config) => config,
        Err(error) if args.check_config => {
            eprintln!("error: {error}");
            return ExitCode::FAILURE;
        }
        Err(error) => {
            logging::start();
            tracing::error!(error, "the configuration cannot be used");
            before_another_try();
            return ExitCode::FAILURE;
        }
    };
    if args.check_config {
        if let Err(error) = check(&config) {
            eprintln!("error: {error}");
            return ExitCode::FAILURE;
        }
        println!("the configuration is well");
        return ExitCode::SUCCESS;
    }
    logging::start();
    match start(args, config) {
        Ok(End::Done | End::HandedOver(_)) => ExitCode::SUCCESS,
        Ok(End::Again) => ExitCode::from(AGAIN),
        Err(error) => {
            tracing::error!(error, "cannot start");
            before_another_try();
            ExitCode::FAILURE
        }
    }
}

/// Has the service manager start a new process at once (RestartForceExitStatus= of the unit; EX_TEMPFAIL of sysexits.h).
const AGAIN: u8 = 75;

/// How the daemon ended.
enum End {
    Done,
    /// A new process is to go on.
    Again,
    /// A new process waits for this one.
    HandedOver(Successor),
}

/// Takes what must be this daemon's alone before there are threads, and serves.
fn start(args: Args, config: Config) -> Result<End, String> {
    let mut passed = fd_store::passed();
    let runtime_dir = runtime_dir(&args)?;
    // What is wrong with it is found out while the process before this one still serves.
    check(&config)?;
    limits(&config.limits)?;
    engine(&args, &config)?;
    for before in std::mem::take(&mut passed.before) {
        handover::take_over(before)?;
    }
    let lock = runtime_dir.as_deref().map(lock).transpose()?;
    if args.sandbox
        && args
            .bus_address
            .as_deref()
            .is_some_and(|a| !a.starts_with("unix:"))
    {
        return Err("a bus that is not on a unix socket needs --sandbox off".into());
    }
    if args.sandbox {
        let sandbox = sandbox(&args, &config, runtime_dir.as_deref())?;
        if sandbox.needs_new_process() {
            tracing::info!(
                "this program has other rules than the one before it: a new process begins"
            );
            return Ok(End::Again);
        }
        sandbox.enter()?;
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(16)
        .thread_name("vdiskd-blocking")
        .build()
        .map_err(|e| e.to_string())?;
    let end = runtime.block_on(run(args, config, passed, runtime_dir))?;
    if let End::HandedOver(successor) = &end {
        // With it go the connections to the bus, and sockets that are no export's.
        runtime.shutdown_timeout(LAST_TASKS);
        drop(lock);
        successor.go_on();
    }
    Ok(end)
}

/// Under a service manager it is started anew at once, and again and again until what is wrong is mended: not too often.
fn before_another_try() {
    if FdStore::is_there() {
        std::thread::sleep(Duration::from_secs(1));
    }
}

fn print_man_page() -> ExitCode {
    let page = clap_mangen::Man::new(Args::command()).section("8");
    match page.render(&mut std::io::stdout()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

/// Seconds with nothing to do after which a service ends.
const IDLE_EXIT: u32 = 60;

/// How long the service manager may take to see that what it runs for a reload has ended.
const LAST_RELOAD: Duration = Duration::from_millis(100);

/// How long calls of the system that nothing waits for any more may take at the end.
const LAST_TASKS: Duration = Duration::from_millis(10);

/// What new objects get: from the command line, or else from the configuration.
fn defaults(
    args: &Args,
    config: &Config,
    runtime_dir: Option<PathBuf>,
    sockets: fd_store::Named,
) -> Result<Defaults, String> {
    let poll_max = args.poll_max_ns.or(config.io.poll_max_ns);
    Ok(Defaults {
        engine: engine(args, config)?,
        poll_max: poll_max.map_or(DEFAULT_POLL_MAX, Duration::from_nanos),
        io_threads: args.io_threads.or(config.io.threads).unwrap_or(1).into(),
        runtime: Runtime {
            dir: runtime_dir,
            workers: Some(tokio::runtime::Handle::current()),
            ..Runtime::default()
        },
        sockets: Sockets {
            directory: config.sockets.directory.clone(),
            mode: config.sockets.mode.as_deref().and_then(config::octal),
            group: config.sockets.group.clone(),
            passed: sockets
                .into_iter()
                .map(|(name, fd)| (name, Arc::new(fd)))
                .collect(),
        },
        state_dir: Some(state_dir(args)),
        limits: limits(&config.limits)?,
        follow: follow(config)?,
    })
}

fn engine(args: &Args, config: &Config) -> Result<EngineChoice, String> {
    match (args.io_engine, &config.io.engine) {
        (Some(engine), _) => Ok(engine),
        (None, Some(name)) => name.parse(),
        (None, None) => Ok(EngineChoice::Auto),
    }
}

fn limits(config: &config::Limits) -> Result<Limits, String> {
    let memory = config.memory.as_deref().and_then(vdisk_api::parse_size);
    let memory = memory.map(MemoryLimit::new).transpose();
    let most = Limits::default();
    Ok(Limits {
        exports: config.exports.unwrap_or(most.exports),
        queues: config.queues.unwrap_or(most.queues),
        memory: memory.map_err(|e| format!("limits.memory: /proc/self/status: {e}"))?,
    })
}

/// What the daemon is to take from itself.
fn sandbox(args: &Args, config: &Config, runtime_dir: Option<&Path>) -> Result<Sandbox, String> {
    let Some(mut change) = allowed(config)? else {
        return Ok(Sandbox::new(None));
    };
    let state_dir = state_dir(args);
    let metrics = config.metrics.socket.as_deref().and_then(Path::parent);
    let sockets = config.sockets.directory.as_deref();
    let own = [runtime_dir, Some(&state_dir), sockets, metrics];
    for folder in own.into_iter().flatten() {
        // It must be there to be named.
        let made = std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(folder);
        if let Err(error) = made {
            tracing::warn!(folder = %folder.display(), %error, "it is not there and cannot be made: it stays out of reach");
        }
        change.push(folder.to_owned());
    }
    let configuration = args
        .config
        .as_deref()
        .and_then(Path::parent)
        .map(Path::to_owned);
    let credentials = std::env::var_os("CREDENTIALS_DIRECTORY").map(PathBuf::from);
    Ok(Sandbox::new(Some(Folders {
        change,
        images: control::files_in_use(runtime_dir, &state_dir),
        read: configuration.into_iter().chain(credentials).collect(),
        sockets: config.sockets.directory.is_some(),
    })))
}

/// What is only found out when the configuration is used.
fn check(config: &Config) -> Result<(), String> {
    allowed(config)?;
    follow(config)?;
    trusted(config)?;
    Ok(())
}

/// The folders in which images may be, if not everywhere.
fn allowed(config: &Config) -> Result<Option<Vec<PathBuf>>, String> {
    let named = config.images.directories.as_deref();
    let resolved = named.map(Directories::resolve).transpose();
    resolved.map_err(|e| format!("images.directories: {e}"))
}

/// The folders into which names inside images are followed.
fn follow(config: &Config) -> Result<Follow, String> {
    let named = config.images.follow.as_deref().unwrap_or_default();
    let resolved = Directories::resolve(named);
    resolved
        .map(Follow)
        .map_err(|e| format!("images.follow: {e}"))
}

/// Who needs no polkit, by number.
fn trusted(config: &Config) -> Result<Trusted, String> {
    let user = |name: &String| match nix::unistd::User::from_name(name) {
        Ok(Some(user)) => Ok(user.uid.as_raw()),
        Ok(None) => Err(format!("access.users: there is no user '{name}'")),
        Err(e) => Err(format!("access.users: user '{name}': {e}")),
    };
    let group = |name: &String| match nix::unistd::Group::from_name(name) {
        Ok(Some(group)) => Ok(group.gid.as_raw()),
        Ok(None) => Err(format!("access.groups: there is no group '{name}'")),
        Err(e) => Err(format!("access.groups: group '{name}': {e}")),
    };
    Ok(Trusted {
        users: config
            .access
            .users
            .iter()
            .map(user)
            .collect::<Result<_, _>>()?,
        groups: config
            .access
            .groups
            .iter()
            .map(group)
            .collect::<Result<_, _>>()?,
    })
}

async fn run(
    args: Args,
    config: Config,
    passed: Passed,
    runtime_dir: Option<PathBuf>,
) -> Result<End, String> {
    let bus = match &args.bus_address {
        Some(address) => Bus::Address(address.clone()),
        None if args.session => Bus::Session,
        None => Bus::System,
    };
    // From here on a signal ends the daemon in order.
    let mut terminate = signal(SignalKind::terminate()).map_err(|e| e.to_string())?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(|e| e.to_string())?;
    let mut hangup = signal(SignalKind::hangup()).map_err(|e| e.to_string())?;
    let name = vdisk_dbus::bus_name(args.instance.as_deref())?;
    // Whether the bus has the service manager start one for those who call (see systemd/org.vdisk1.service).
    let is_activatable = args.instance.is_none() && args.bus_address.is_none();
    let store = FdStore::find(&passed).map_err(|e| format!("passed file descriptors: {e}"))?;
    let store = store.map(Arc::new);
    if let Some(store) = &store {
        // What was before has ended.
        store.forget(handover::NAME);
    }
    let keeper = store.clone().map(|store| store as Arc<dyn Keeper>);
    let mut sockets = passed.sockets;
    let metrics_socket = sockets
        .extract_if(.., |(name, _)| name == metrics::SOCKET_NAME)
        .map(|(_, fd)| fd)
        .last();
    for (name, _) in &mut sockets {
        // As vdiskd-export@NAME.socket calls them, so that no name can be mistaken for another.
        if let Some(export) = name.strip_prefix("export-") {
            *name = export.to_owned();
        }
    }
    let defaults = defaults(&args, &config, runtime_dir.clone(), sockets)?;
    let directories = defaults.runtime.directories.clone();
    let folders = allowed(&config)?;
    let trusted = trusted(&config)?;
    let control = control::start(defaults, keeper, passed.kept, args.fresh)
        .await
        .map_err(|e| e.message)?;
    // What was open stays open, and limits are for what is new.
    if let Some(all) = folders {
        directories.restrict(all);
    }
    let engine = control.world().engine;
    let front = dbus::start(bus.clone(), name, control.clone(), trusted)
        .await
        .map_err(|e| format!("D-Bus ({bus:?}): {e}"))?;
    metrics::start(&control, metrics_socket, config.metrics.socket.as_deref());
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        %engine,
        "ready"
    );
    let _ = sd_notify::notify(&[NotifyState::Ready, NotifyState::Status("serving")]);
    let watchdog = tokio::spawn(service::watchdog(control.clone()));
    let usual = if store.is_some() { IDLE_EXIT } else { 0 };
    let idle_exit = args.idle_exit.or(config.service.idle_exit);
    let idle = async {
        match idle_exit.unwrap_or(usual) {
            0 => std::future::pending().await,
            seconds => {
                let limit = Duration::from_secs(seconds.into());
                service::until_idle(&front, &control, limit).await
            }
        }
    };
    tokio::pin!(idle);
    let (mut again, mut called) = (false, false);
    let mut terminated = false;
    loop {
        tokio::select! {
            _ = terminate.recv() => terminated = true,
            _ = interrupt.recv() => terminated = true,
            _ = hangup.recv(), if store.is_some() => {
                // The next one could not start with what is wrong.
                let config = Config::load(args.config.as_deref(), args.instance.as_deref());
                let sandbox = config.and_then(|config| {
                    check(&config)?;
                    sandbox(&args, &config, runtime_dir.as_deref())
                });
                match sandbox {
                    Err(error) => {
                        tracing::error!(error, "the configuration cannot be used: all stays as it is");
                        let _ = sd_notify::notify(&[NotifyState::Ready]);
                        continue;
                    }
                    Ok(sandbox) if args.sandbox && sandbox.needs_new_process() => {
                        tracing::info!("files elsewhere are to be in reach: a new process begins");
                        // Until the service manager has seen that its reload was heard.
                        tokio::time::sleep(LAST_RELOAD).await;
                        called = true;
                    }
                    Ok(_) => again = true,
                }
            }
            still_called = &mut idle => {
                tracing::info!("there is nothing to do");
                called = still_called;
            }
        }
        break;
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
    let restarted = match (terminated, &store) {
        // Nobody would notice.
        _ if control
            .world()
            .exports
            .values()
            .all(|e| e.server.clients() == 0) =>
        {
            None
        }
        (true, Some(_)) if args.bus_address.is_none() => {
            Unit::if_restarted(front.connection()).await
        }
        _ => None,
    };
    if (!terminated || restarted.is_some()) && is_activatable {
        // The bus keeps what others call meanwhile for the one that comes. Not so for one that is stopped: that would start it.
        front.release_name().await;
    }
    tokio::select! {
        _ = terminate.recv() => terminated = true,
        _ = interrupt.recv() => terminated = true,
        () = front.answer() => {}
    }
    let mut successor = match (restarted, &store) {
        (Some(unit), Some(store)) => Handover::begin(unit, &control, store).await,
        _ => None,
    };
    if let Some(successor) = &mut successor {
        // The service manager hears the new process only.
        watchdog.abort();
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
            () = successor.asked() => {}
        }
        handover::limit_end();
        if !is_activatable {
            front.release_name().await;
        }
    }
    // It may have been given something to do by a call in the last moment.
    called |= !terminated && !control.world().is_empty();
    control.shutdown().await;
    for signal in [&mut terminate, &mut interrupt] {
        terminated |= signal.recv().now_or_never().flatten().is_some();
    }
    if terminated {
        (again, called) = (false, false);
    }
    if let Some(successor) = successor {
        tracing::info!("everything is left to the new process");
        return Ok(End::HandedOver(successor.end()));
    }
    match (again, store) {
        (true, Some(store)) => match store.exec() {
            Ok(never) => match never {},
            Err(error) => {
                tracing::error!(%error, "this process cannot become the new program: another begins");
                Ok(End::Again)
            }
        },
        _ if called => Ok(End::Again),
        _ => {
            tracing::info!("stopped");
            Ok(End::Done)
        }
    }
}
