//! libvirt's hook (hooks/qemu.d/vdiskd): has vdiskd serve the disks of a domain from before it starts until it has ended.
//!
//! libvirt runs it as `vdiskd DOMAIN PHASE SUBPHASE REASON` with the domain's XML on standard input, and waits for it: it never
//! calls libvirt back, and ends in time. What it says on standard error when it fails is what the user of virsh sees.

use std::io::{Read, Write};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use vdisk_dbus::{Bus, Daemon, bus_name};
use vdisk_domain::{
    Busy, Domain, Identity, Start, announce, being_changed, build, build_disk, label, let_in,
    moved_sockets, served, take_announcement, take_down,
};

/// How long all of it may take. A daemon that has to be started first takes some tenths of a second.
const LIMIT: Duration = Duration::from_secs(15);

/// How much longer for each image that is encrypted: trying a passphrase takes two seconds, if the image does not say otherwise.
const UNLOCKING: Duration = Duration::from_secs(4);

/// How long the domain waits for a vdiskctl (or the watcher) that works on its disks.
const KEPT_OFF: Duration = Duration::from_secs(2);

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// The domain is about to start.
    Prepare,
    /// QEMU is about to be run: what libvirt confines it to is known by now.
    Start,
    /// It has ended, or could not start.
    Release,
    /// libvirt's daemon was restarted while the domain ran.
    Reconnect,
    /// The domain is about to come from another host.
    Incoming,
}

fn phase(name: &str, sub: &str) -> Option<Phase> {
    match (name, sub) {
        ("prepare", "begin") => Some(Phase::Prepare),
        ("start", "begin") => Some(Phase::Start),
        ("release", "end") => Some(Phase::Release),
        ("reconnect", "begin") => Some(Phase::Reconnect),
        ("migrate", "begin") => Some(Phase::Incoming),
        _ => None,
    }
}

async fn connect(instance: Option<&str>) -> Result<Daemon, String> {
    let daemon = Daemon::connect(&Bus::System, bus_name(instance)?).await;
    daemon.map_err(|e| format!("the system bus cannot be reached: {e}"))
}

async fn serve(phase: Phase, domain: &Domain) -> Result<(), String> {
    let daemon = connect(domain.metadata.instance.as_deref()).await?;
    let done = match phase {
        Phase::Reconnect => restore(&daemon, domain).await,
        Phase::Incoming => build(&daemon, domain, Start::Incoming).await,
        _ => {
            let arrives = take_announcement(&domain.uuid);
            let start = if arrives {
                Start::Arriving
            } else {
                Start::Boot
            };
            build(&daemon, domain, start).await
        }
    };
    done.map_err(|e| e.to_string())
}

/// Whatever its metadata say by then, and however little of them is understood.
async fn release(identity: &Identity, busy: Busy) -> Result<(), String> {
    let Some(instance) = &identity.served_by else {
        return Ok(());
    };
    let daemon = connect(instance.as_deref()).await?;
    let done = take_down(&daemon, &identity.uuid, busy).await;
    done.map_err(|e| e.to_string())
}

/// Serves again what is not served any more. A front-end that waits for its socket goes on then.
async fn restore(daemon: &Daemon, domain: &Domain) -> Result<(), vdisk_domain::Failure> {
    let there = served(daemon, &domain.uuid).await?;
    for (disk, socket) in domain.served() {
        if there.iter().all(|s| s.target != disk.target) {
            build_disk(daemon, domain, disk, socket, Start::Boot).await?;
        }
    }
    // Those that have lost their label, too.
    label(domain).map_err(|e| vdisk_domain::Failure(e.to_string()))
}

fn run(phase: Phase, reason: &str) -> Result<(), String> {
    let mut xml = String::new();
    std::io::stdin()
        .read_to_string(&mut xml)
        .map_err(|e| format!("the domain's XML cannot be read: {e}"))?;
    if phase == Phase::Release {
        let identity = Identity::parse(&xml).map_err(|e| e.to_string())?;
        take_announcement(&identity.uuid);
        if is_kept_off(&identity.uuid) {
            // There was no guest: its start was refused for that.
            return Ok(());
        }
        // A start may have failed because there is a guest already.
        let busy = match reason {
            "failed" => Busy::Stays,
            _ => Busy::Ends,
        };
        return in_time(LIMIT, release(&identity, busy));
    }
    let mut domain = Domain::parse(&xml).map_err(|e| e.to_string())?;
    if phase == Phase::Start {
        return label(&domain).map_err(|e| e.to_string());
    }
    if phase == Phase::Incoming
        && let Some(here) = moved_sockets(&xml, &domain).map_err(|e| e.to_string())?
    {
        domain = Domain::parse(&here).map_err(|e| e.to_string())?;
        xml = here;
    }
    let name = &domain.name;
    if let (Some(disk), Phase::Prepare | Phase::Incoming) = (domain.unknown(), phase) {
        return Err(format!(
            "disk '{}' of domain '{name}' has a socket of vdiskd's, and the domain's metadata do not say what is to be served there: detach it, or write it down (docs/libvirt.md)",
            disk.target
        ));
    }
    if domain.served().next().is_none() {
        return Ok(());
    }
    if let (Some(snapshot), Phase::Prepare) = (&domain.metadata.memory_of, phase) {
        return Err(format!(
            "this is the memory of snapshot '{snapshot}' of domain '{name}', which belongs to what its disks were then: vdiskctl domain snapshot revert {name} {snapshot}"
        ));
    }
    if phase != Phase::Reconnect && is_kept_off(&domain.uuid) {
        return Err(format!(
            "the disks of domain '{name}' are being changed by a vdiskctl: wait for its end"
        ));
    }
    if !domain.shares_memory {
        return Err(format!(
            "domain '{name}' does not share its memory, which disks of vdiskd need: put <memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking> into it (virsh edit)"
        ));
    }
    if phase != Phase::Reconnect {
        let_in(&domain).map_err(|e| e.to_string())?;
    }
    let secrets = domain
        .served()
        .map(|(disk, _)| disk.secrets().count())
        .sum::<usize>();
    let limit = LIMIT + UNLOCKING * secrets as u32;
    in_time(limit, serve(phase, &domain))?;
    if phase == Phase::Incoming {
        announce(&domain.uuid).map_err(|e| e.to_string())?;
        // What libvirt goes on with.
        std::io::stdout()
            .write_all(xml.as_bytes())
            .map_err(|e| format!("the domain's XML cannot be given back: {e}"))?;
    }
    Ok(())
}

/// Whether a vdiskctl works on the disks of a domain, and not only for a moment.
fn is_kept_off(uuid: &str) -> bool {
    let since = Instant::now();
    while being_changed(uuid) {
        if since.elapsed() > KEPT_OFF {
            return true;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    false
}

fn in_time(limit: Duration, work: impl Future<Output = Result<(), String>>) -> Result<(), String> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|e| e.to_string())?;
    runtime.block_on(async {
        match tokio::time::timeout(limit, work).await {
            Ok(done) => done,
            Err(_) => Err(format!(
                "vdiskd has not answered within {} s: see journalctl -u vdiskd",
                limit.as_secs()
            )),
        }
    })
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().collect();
    let word = |n: usize| args.get(n).map_or("", String::as_str);
    if args.len() < 4 {
        eprintln!(
            "This is a hook of libvirt: it is run by libvirt's daemon as /etc/libvirt/hooks/qemu.d/vdiskd DOMAIN PHASE SUBPHASE REASON, with the domain's XML on standard input"
        );
        return ExitCode::from(2);
    }
    let Some(phase) = phase(word(2), word(3)) else {
        return ExitCode::SUCCESS;
    };
    match run(phase, word(4)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("vdiskd: {error}");
            // A failure here would end a domain that runs.
            match phase == Phase::Reconnect {
                true => ExitCode::SUCCESS,
                false => ExitCode::FAILURE,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phases_that_matter() {
        assert_eq!(phase("prepare", "begin"), Some(Phase::Prepare));
        assert_eq!(phase("start", "begin"), Some(Phase::Start));
        assert_eq!(phase("release", "end"), Some(Phase::Release));
        for other in [
            ("started", "begin"),
            ("stopped", "end"),
            ("restore", "begin"),
            ("attach", "begin"),
            ("prepare", "end"),
        ] {
            assert_eq!(phase(other.0, other.1), None);
        }
    }
}
