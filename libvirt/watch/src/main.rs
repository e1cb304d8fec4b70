//! vdiskd-libvirt: watches libvirt's domains whose disks vdiskd serves. It shows them on D-Bus (`org.vdisk1.Domains`), and takes down
//! what is served for no guest: what virsh has unplugged, and what was left by a guest whose end no hook was told of.
//!
//! vdiskd does without it: it is the hook that builds and takes down. What it does is made from a look at everything, and never from
//! what an event says, so that nothing is lost with an event.

mod events;
mod look;
mod objects;

use std::collections::HashMap;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Parser;
use futures_util::StreamExt;
use sd_notify::NotifyState;
use tokio::sync::mpsc::{self, UnboundedReceiver};
use vdisk_dbus::{Bus, ROOT_PATH};
use vdiskctl_domain::libvirt::Libvirt;
use vdiskctl_domain::list::{orphans, take_down_orphan};
use zbus::connection::Builder;
use zbus::{Connection, MatchRule, MessageStream};

use events::Heard;
use look::{Daemons, Orphan, View, look};
use objects::{Asked, Published};

/// The bus name.
const NAME: &str = "org.vdisk1.Domains";

/// Events come in swarms.
const SETTLE: Duration = Duration::from_millis(100);

/// How long to wait before libvirt is asked again that was not there.
const RECONNECT: Duration = Duration::from_secs(1);

/// How long something is served for a domain that runs without it: whoever plugs a disk in makes its export first.
const UNPLUGGED: Duration = Duration::from_secs(5);

/// And for a domain that does not run: a start has all exports before libvirt says that it runs.
const NOT_RUNNING: Duration = Duration::from_secs(60);

/// Watches libvirt's domains whose disks vdiskd serves, and shows them on D-Bus
#[derive(Parser)]
#[command(version)]
struct Args {
    /// libvirt's daemon
    #[arg(short, long, value_name = "URI", default_value = "qemu:///system")]
    connect: String,

    /// The bus where vdiskd is, if not the system's
    #[arg(long, value_name = "ADDRESS", env = "VDISK_BUS_ADDRESS")]
    bus_address: Option<String>,
}

/// libvirt tells of some changes before it has made them: after that it is looked at once more.
const CONFIRM: Duration = Duration::from_secs(1);

/// What could not be taken down is tried again after that.
const AGAIN: Duration = Duration::from_secs(1);

const NEVER: Duration = Duration::from_secs(24 * 3600);

struct Watch {
    args: Args,
    bus: Bus,
    connection: Connection,
    daemons: Daemons,
    published: Published,
    heard: UnboundedReceiver<Heard>,
    asked: UnboundedReceiver<Asked>,
    signals: MessageStream,
    /// When to look once more.
    confirm: Option<Instant>,
    /// By daemon and export.
    orphans: HashMap<(String, String), Age>,
}

/// How long something has been an orphan.
struct Age {
    since: Instant,
    /// When it is taken down; never while a front-end is connected.
    due: Option<Instant>,
}

fn key(orphan: &Orphan) -> (String, String) {
    (orphan.daemon.clone(), orphan.served.id.clone())
}

impl Watch {
    async fn start(args: Args) -> Result<Watch, String> {
        let (tell, heard) = mpsc::unbounded_channel();
        let (ask, asked) = mpsc::unbounded_channel();
        events::start(tell)?;
        let bus = match &args.bus_address {
            Some(address) => Bus::Address(address.clone()),
            None => Bus::System,
        };
        let there = async {
            let builder = match &args.bus_address {
                Some(address) => Builder::address(address.parse::<zbus::Address>()?),
                None => Builder::system(),
            };
            let connection = builder.build().await?;
            let rule = MatchRule::builder()
                .msg_type(zbus::message::Type::Signal)
                .path_namespace(ROOT_PATH)
                .build()?;
            let signals = MessageStream::for_match_rule(rule, &connection, None).await?;
            let published = Published::new(connection.clone(), ask).await?;
            zbus::Result::Ok((connection, signals, published))
        };
        let (connection, signals, published) = there
            .await
            .map_err(|e| format!("the bus cannot be reached: {e}"))?;
        Ok(Watch {
            args,
            bus,
            connection,
            daemons: Daemons::default(),
            published,
            heard,
            asked,
            signals,
            confirm: None,
            orphans: HashMap::new(),
        })
    }

    /// Until the bus is gone.
    async fn run(mut self) -> Result<(), String> {
        let lost = |e: zbus::Error| format!("the bus is gone: {e}");
        let mut named = false;
        loop {
            let mut libvirt = self.connect();
            if let Some(there) = &libvirt
                && self.see(there).await.is_none()
            {
                libvirt = None;
            }
            if libvirt.is_none() {
                self.published.follow(None).await.map_err(lost)?;
            }
            if !named {
                // Whoever sees the name sees the objects.
                self.connection.request_name(NAME).await.map_err(lost)?;
                let _ = sd_notify::notify(&[NotifyState::Ready]);
                named = true;
            }
            match libvirt {
                Some(there) => self.watch(&there).await?,
                None => self.wait().await?,
            }
        }
    }

    fn connect(&mut self) -> Option<Libvirt> {
        let connected = Libvirt::open(&self.args.connect).map_err(|e| e.to_string());
        let registered = connected.and_then(|there| {
            events::register(there.connection())?;
            Ok(there)
        });
        match registered {
            Ok(there) => {
                tracing::info!(uri = self.args.connect, "connected to libvirt");
                // What an earlier connection was told.
                while self.heard.try_recv().is_ok() {}
                Some(there)
            }
            Err(error) => {
                tracing::debug!(error, "libvirt is not there");
                None
            }
        }
    }

    /// While libvirt is not there.
    async fn wait(&mut self) -> Result<(), String> {
        tokio::select! {
            () = tokio::time::sleep(RECONNECT) => {}
            Some(asked) = self.asked.recv() => answer(asked, Vec::new()),
        }
        Ok(())
    }

    /// Until libvirt is gone.
    async fn watch(&mut self, libvirt: &Libvirt) -> Result<(), String> {
        let me = self.connection.unique_name().map(|n| n.to_string());
        loop {
            let due = self.next_due();
            let mut heard_of = true;
            let asked = tokio::select! {
                heard = self.heard.recv() => match heard {
                    Some(Heard::Change) => None,
                    Some(Heard::Closed) | None => {
                        tracing::warn!("the connection to libvirt is gone");
                        return Ok(());
                    }
                },
                signal = self.signals.next() => match signal {
                    None => return Err("the bus is gone".into()),
                    Some(Ok(message)) => {
                        let header = message.header();
                        if header.sender().map(|s| s.to_string()) == me {
                            continue;
                        }
                        None
                    }
                    Some(Err(_)) => None,
                },
                Some(asked) = self.asked.recv() => Some(asked),
                () = tokio::time::sleep(due) => {
                    heard_of = false;
                    None
                }
            };
            if asked.is_none() {
                tokio::time::sleep(SETTLE).await;
                let mut closed = false;
                while let Ok(heard) = self.heard.try_recv() {
                    closed |= heard == Heard::Closed;
                }
                if closed {
                    return Ok(());
                }
            }
            self.confirm = heard_of.then(|| Instant::now() + CONFIRM);
            let Some(view) = self.see(libvirt).await else {
                return Ok(());
            };
            let at_once = matches!(asked, Some(Asked::CleanUp(_)));
            let taken_down = self.clean(libvirt, &view, at_once).await;
            if !taken_down.is_empty() && self.see(libvirt).await.is_none() {
                return Ok(());
            }
            if let Some(asked) = asked {
                answer(asked, taken_down);
            }
        }
    }

    /// Looks at everything, and shows it. None if libvirt cannot be asked.
    async fn see(&mut self, libvirt: &Libvirt) -> Option<View> {
        if let Err(error) = self.daemons.find(&self.bus, &self.connection).await {
            tracing::warn!(%error, "daemons cannot be found");
        }
        let view = match look(libvirt, &self.daemons).await {
            Ok(view) => view,
            Err(error) => {
                tracing::warn!(error, "libvirt cannot be asked");
                return None;
            }
        };
        if let Err(error) = self.published.follow(Some(&view)).await {
            tracing::warn!(%error, "cannot publish on D-Bus");
        }
        let now = Instant::now();
        let before = std::mem::take(&mut self.orphans);
        for orphan in &view.orphans {
            let age = before.get(&key(orphan));
            if age.is_none() {
                tracing::info!(
                    export = orphan.served.id,
                    domain = orphan.uuid,
                    "served for no guest"
                );
            }
            // As long as somebody is connected it has a use.
            let is_free = orphan.served.clients == 0;
            let since = age.filter(|_| is_free).map_or(now, |a| a.since);
            let limit = match orphan.unplugged {
                true => UNPLUGGED,
                false => NOT_RUNNING,
            };
            let due = is_free.then(|| since + limit);
            self.orphans.insert(key(orphan), Age { since, due });
        }
        Some(view)
    }

    /// How long until something is to be taken down, or tried again.
    fn next_due(&self) -> Duration {
        let now = Instant::now();
        let next = self.orphans.values().filter_map(|age| age.due).min();
        let next = next.map(|due| due.saturating_duration_since(now).max(AGAIN));
        let confirm = self.confirm.map(|at| at.saturating_duration_since(now));
        confirm.into_iter().chain(next).min().unwrap_or(NEVER)
    }

    /// Takes down what has been an orphan for long enough, or all of them; returns their exports.
    async fn clean(&self, libvirt: &Libvirt, view: &View, at_once: bool) -> Vec<String> {
        let mut done = Vec::new();
        for orphan in &view.orphans {
            let due = self.orphans.get(&key(orphan)).and_then(|age| age.due);
            let is_due = due.is_some_and(|due| at_once || due <= Instant::now());
            let daemon = self.daemons.get(&orphan.daemon);
            let (Some(daemon), true) = (daemon, is_due) else {
                continue;
            };
            // Whoever changes the domain knows what the export is for.
            let guest = libvirt.find(&orphan.uuid).ok();
            let Ok(_lock) = guest.as_ref().map(|g| g.lock()).transpose() else {
                continue;
            };
            // As it is now.
            let still = orphans(libvirt, daemon).await.is_ok_and(|now| {
                now.iter().any(|(uuid, s)| {
                    *uuid == orphan.uuid && s.id == orphan.served.id && s.clients == 0
                })
            });
            if !still {
                continue;
            }
            let (guest, uuid) = (guest.as_ref(), &orphan.uuid);
            match take_down_orphan(libvirt, guest, daemon, uuid, &orphan.served).await {
                Ok(false) => {}
                Ok(true) => {
                    tracing::info!(
                        export = orphan.served.id,
                        domain = orphan.uuid,
                        "taken down: it was served for no guest"
                    );
                    done.push(orphan.served.id.clone());
                }
                Err(error) => {
                    tracing::warn!(export = orphan.served.id, %error, "cannot be taken down");
                }
            }
        }
        done
    }
}

fn answer(asked: Asked, taken_down: Vec<String>) {
    match asked {
        Asked::Refresh(done) => drop(done.send(())),
        Asked::CleanUp(done) => drop(done.send(taken_down)),
    }
}

fn main() -> ExitCode {
    let args = Args::parse();
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .without_time()
        .with_target(false)
        .init();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let result = match runtime {
        Ok(runtime) => runtime.block_on(async { Watch::start(args).await?.run().await }),
        Err(e) => Err(e.to_string()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error}");
            ExitCode::FAILURE
        }
    }
}
