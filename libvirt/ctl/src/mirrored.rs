//! Disks that move with their guest to a host that has none of this one's storage.
//!
//! Each disk is mirrored into a new image there, over NBD: the other host's vdiskd offers that image on a socket of its own, and a
//! remote shell carries the bytes (`vdiskctl domain receive` at its other end). When the guest stops here, vdiskd copies the rest, and
//! tells the other one that all is there (job option `hand-over`); that one opens the image for the guest when it begins there, and not
//! before. A guest that goes on here after all (it was reset, or the move failed) takes that back with its next write. Whatever breaks,
//! the image there stays locked, and no guest can go on with a copy that lacks something.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command as Process, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vdisk_domain::{Backing, Disk, encryption, replace_metadata};
use vdiskctl::daemon;
use vdiskctl::error::{Error, Result};
use vdiskctl::jobs;
use vdiskctl::objects::{Objects, Properties};
use vdiskctl::options::Options;
use vdiskctl::output::{number, text};
use zbus::Variant;

use crate::args::{Args, Receive};
use crate::disks::Running;
use crate::libvirt::{Libvirt, Side};
use crate::{files, wrong};

/// What is added to the name of a disk for its copy.
const SUFFIX: &str = "-copy";

/// How long the other host may take until it offers an image.
const PATIENCE: Duration = Duration::from_secs(60);

/// How long what is left to do may take when the guest has gone, or stays.
const LAST_STEPS: Duration = Duration::from_secs(15);

/// How often it is looked whether all copies go on.
const LOOK: Duration = Duration::from_millis(200);

/// How commands are run on the other host: a program whose last argument is a shell's command line there.
pub struct Shell(Vec<String>);

impl Shell {
    /// The one that is given, or ssh to the host of libvirt's URI.
    pub fn new(given: Option<&str>, uri: &str) -> Result<Shell> {
        if let Some(given) = given {
            let words: Vec<String> = given.split_whitespace().map(str::to_owned).collect();
            return match words.is_empty() {
                true => Err(Error::invalid("--remote-shell is empty")),
                false => Ok(Shell(words)),
            };
        }
        let host = uri
            .split_once("+ssh://")
            .map(|(_, rest)| rest.split(['/', '?']).next().unwrap_or(rest))
            .filter(|host| !host.is_empty() && !host.starts_with('-'));
        let Some(host) = host else {
            return Err(Error::invalid(format!(
                "'{uri}' does not say how commands are run there: give --remote-shell, such as 'ssh root@host2'"
            )));
        };
        let mut words = vec!["ssh".to_owned()];
        match host.rsplit_once(':') {
            Some((name, port)) if port.chars().all(|c| c.is_ascii_digit()) => {
                words.extend(["-p".to_owned(), port.to_owned(), name.to_owned()]);
            }
            _ => words.push(host.to_owned()),
        }
        Ok(Shell(words))
    }

    fn command(&self, words: &[&str]) -> Process {
        let line: Vec<String> = words.iter().map(|w| quoted(w)).collect();
        let mut process = Process::new(&self.0[0]);
        process.args(&self.0[1..]).arg(line.join(" "));
        process
    }
}

/// A word as a shell reads it.
fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// The copy of one disk.
struct Copy {
    target: String,
    file: String,
    /// Of the job, and of both nodes: the one here that stands for the copy, and the one there.
    name: String,
    remote: Child,
}

/// The copies of all disks of a domain.
pub struct Copies {
    shell: Shell,
    all: Vec<Copy>,
}

impl Copies {
    /// Has the other host make images, and copies the disks into them, until they are alike and stay so.
    pub async fn start(running: &Running, shell: Shell, speed: Option<&str>) -> Result<Copies> {
        let mut copies = Copies {
            shell,
            all: Vec::new(),
        };
        let disks = running.domain.metadata.disks.iter();
        for disk in disks.filter(|d| !d.is_read_only()) {
            if let Err(e) = copies.add(running, disk, speed).await {
                copies.give_up(running).await;
                return Err(Error::failed(format!("disk '{}': {e}", disk.target)));
            }
        }
        // The first ones may have failed while the last ones were copied.
        let objects = running.look().await;
        let is_ready = |copy: &&Copy| {
            let job = objects
                .as_ref()
                .ok()
                .and_then(|o| o.find("job", &copy.name).ok());
            job.is_some_and(|p| text(p, "State") == "ready")
        };
        let failed = copies.all.iter().find(|c| !is_ready(c));
        if let Some(target) = failed.map(|c| c.target.clone()) {
            copies.give_up(running).await;
            return Err(Error::failed(format!(
                "disk '{target}': its copy has failed meanwhile"
            )));
        }
        Ok(copies)
    }

    async fn add(&mut self, running: &Running, disk: &Disk, speed: Option<&str>) -> Result<()> {
        let (_, served) = running.disk(&disk.target)?;
        let (objects, node) = running.image(&disk.target).await?;
        let size = number(objects.find("node", &node)?, "Size").to_string();
        let name = format!("{}{SUFFIX}", served.id);
        let (file, format) = (disk.file(), disk.format());
        let mut words = vec![
            "vdiskctl", "domain", "receive", &name, file, "--format", format,
        ];
        words.extend(["--size", &size]);
        let secret = disk.secret_of(file);
        if let Some(secret) = secret {
            words.extend(["--secret", secret]);
        }
        let instance = running.domain.metadata.instance.as_deref();
        if let Some(instance) = instance {
            words.extend(["--instance", instance]);
        }
        let (here, there) = UnixStream::pair().map_err(|e| Error::failed(e.to_string()))?;
        let there = OwnedFd::from(there);
        let again = there
            .try_clone()
            .map_err(|e| Error::failed(e.to_string()))?;
        let remote = self
            .shell
            .command(&words)
            .stdin(there)
            .stdout(again)
            .spawn();
        let mut remote =
            remote.map_err(|e| Error::failed(format!("'{}': {e}", self.shell.0[0])))?;
        let speaks = speaks(&here, &mut remote);
        self.all.push(Copy {
            target: disk.target.clone(),
            file: file.to_owned(),
            name: name.clone(),
            remote,
        });
        if !speaks? {
            return Err(Error::failed(
                "the other host does not offer an image for it: what was said above says why",
            ));
        }
        let manager = running.manager().await?;
        manager
            .add_node(Options::from([
                ("node-name", Variant::from(name.clone())),
                ("driver", Variant::from("nbd")),
                ("discard", Variant::from("unmap")),
                (
                    "filename",
                    Variant::from(zbus::Fd::from(OwnedFd::from(here))),
                ),
            ]))
            .await?;
        let mut options = Options::from([
            ("target", Variant::from(name.clone())),
            ("job-id", Variant::from(name.clone())),
            ("hand-over", Variant::from(true)),
        ]);
        jobs::set_speed(&mut options, speed)?;
        let id = jobs::mirror_until_ready(&running.daemon, &node, options).await?;
        // What the guest writes from now on is there before the guest is told that it is written: little is left for the end.
        let job = running.daemon.job(&id).await?;
        let blocking = Options::from([("copy-mode", Variant::from("write-blocking"))]);
        Ok(job.change(blocking).await?)
    }

    /// The definition of the domain as the other host is to have it: disks without what they stand on here.
    pub fn definition(&self, running: &Running, side: Side) -> Result<String> {
        let mut metadata = running.guest.parsed(side)?.metadata;
        for copy in &self.all {
            if let Some(disk) = metadata.disk_mut(&copy.target) {
                let top = Backing {
                    file: copy.file.clone(),
                    format: disk.format().to_owned(),
                    secret: disk.secret_of(&copy.file).map(str::to_owned),
                };
                disk.set_images(vec![top]).map_err(wrong)?;
            }
        }
        replace_metadata(&running.guest.xml(side)?, &metadata).map_err(wrong)
    }

    /// Moves the guest with `run`, and has that aborted if a copy fails meanwhile.
    pub fn guard<R>(
        &self,
        args: &Args,
        running: &Running,
        run: impl FnOnce() -> Result<R>,
    ) -> Result<R> {
        let over = AtomicBool::new(false);
        let jobs = self.all.iter().map(|c| {
            let export = c.name.strip_suffix(SUFFIX).unwrap_or(&c.name);
            (c.name.as_str(), export)
        });
        let jobs: Vec<(&str, &str)> = jobs.collect();
        let mut to = args.daemon.clone();
        to.instance.clone_from(&running.domain.metadata.instance);
        let name = running.guest.name.as_str();
        std::thread::scope(|scope| {
            let watcher = scope.spawn(|| watch(&to, &jobs, &over));
            let aborter = scope.spawn(|| {
                if watcher.join().ok().flatten().is_none() {
                    return;
                }
                // It may not have begun yet.
                while !over.load(Relaxed) {
                    let guest = Libvirt::open(&args.connect).and_then(|l| l.find(name));
                    if guest.is_ok_and(|g| g.abort(&args.connect).is_ok()) {
                        return;
                    }
                    std::thread::sleep(LOOK);
                }
            });
            let result = run();
            over.store(true, Relaxed);
            // Too late, or there is nothing to abort: what became of the copies is looked at by the caller.
            let _ = aborter.join();
            result
        })
    }

    /// The guest has gone: takes away what there is of the copies here, and says which one is not whole, if one is not.
    pub async fn finish(self, running: &Running) -> Result<()> {
        let mut unfinished = Ok(());
        for mut copy in self.all {
            copy.end_here(running).await;
            // It ends when the other host has the image for itself.
            let ended = copy.wait(LAST_STEPS).await;
            if !ended.is_some_and(|s| s.success()) {
                let _ = copy.remote.kill();
                let _ = copy.remote.wait();
                unfinished = Err(Error::failed(format!(
                    "the copy of disk '{0}' is not whole, and the guest waits for it on the other host: destroy it there, have 'vdiskctl domain receive {1} {2} --abort' remove the image there, and start the domain here, where the disk is as the guest left it",
                    copy.target, copy.name, copy.file
                )));
            }
        }
        unfinished
    }

    /// The guest stays: nothing of the copies is left, here or there.
    pub async fn give_up(self, running: &Running) {
        for mut copy in self.all {
            // First, so that nothing waits for the other host.
            let _ = copy.remote.kill();
            let _ = copy.remote.wait();
            copy.end_here(running).await;
            let mut words = vec!["vdiskctl", "domain", "receive", &copy.name, &copy.file];
            words.push("--abort");
            if let Some(instance) = running.domain.metadata.instance.as_deref() {
                words.extend(["--instance", instance]);
            }
            let gone = self.shell.command(&words).stdin(Stdio::null()).status();
            if !gone.is_ok_and(|s| s.success()) {
                anstream::eprintln!(
                    "'{}' was not removed on the other host: see whether it is needed there",
                    copy.file
                );
            }
        }
    }
}

impl Copy {
    /// Ends the job, and closes the node.
    async fn end_here(&self, running: &Running) {
        if let Ok(job) = running.daemon.job(&self.name).await {
            let force = Options::from([("force", Variant::from(true))]);
            let _ = job.cancel(force).await;
            let over = jobs::until_over(&running.daemon, &self.name);
            let _ = tokio::time::timeout(LAST_STEPS, over).await;
            // (libvirt's hook may have forgotten it.)
            let _ = job.dismiss(Options::new()).await;
        }
        if let Ok(node) = running.daemon.node(&self.name).await {
            let _ = node.remove(Options::new()).await;
        }
    }

    /// How the other end has ended; None if it has not.
    async fn wait(&mut self, limit: Duration) -> Option<ExitStatus> {
        let until = Instant::now() + limit;
        loop {
            match self.remote.try_wait() {
                Ok(None) if Instant::now() < until => {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                other => return other.ok().flatten(),
            }
        }
    }
}

/// Waits for the first words of the other side. False if there are none.
fn speaks(stream: &UnixStream, remote: &mut Child) -> Result<bool> {
    let failed = |e: rustix::io::Errno| Error::failed(e.to_string());
    let until = Instant::now() + PATIENCE;
    while Instant::now() < until {
        let mut fds = [PollFd::new(stream, PollFlags::IN)];
        let step = Timespec {
            tv_sec: 0,
            tv_nsec: 100_000_000,
        };
        match poll(&mut fds, Some(&step)) {
            Err(rustix::io::Errno::INTR) => continue,
            other => other.map_err(failed)?,
        };
        let seen = fds[0].revents();
        if seen.contains(PollFlags::IN) {
            let mut byte = [0; 1];
            let flags = rustix::net::RecvFlags::PEEK;
            let n = rustix::net::recv(stream.as_fd(), &mut byte, flags).map_err(failed)?;
            return Ok(n.0 > 0);
        }
        if seen.contains(PollFlags::HUP) || matches!(remote.try_wait(), Ok(Some(_))) {
            return Ok(false);
        }
    }
    Ok(false)
}

/// The error of a job in words; empty if there is none.
fn error_of(job: &Properties) -> String {
    let said = job.get("Error").and_then(|e| e[1].as_str());
    said.unwrap_or_default().to_owned()
}

/// Returns the first job (with the export of its disk) that has ended in another way than it should, or None when all is over.
fn watch(
    to: &vdiskctl::args::Connection,
    jobs: &[(&str, &str)],
    over: &AtomicBool,
) -> Option<String> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .ok()?;
    runtime.block_on(async {
        let Ok(daemon) = daemon::connect(to).await else {
            return Some(String::new());
        };
        while !over.load(Relaxed) {
            tokio::time::sleep(LOOK).await;
            let Ok(objects) = Objects::load(&daemon).await else {
                continue;
            };
            let fails = |(id, export): &&(&str, &str)| match objects.find("job", id) {
                Ok(p) => !error_of(p).is_empty() || text(p, "State") == "concluded",
                // The hook has forgotten it with all that there was of the disk; or the daemon was restarted.
                Err(_) => objects.find("export", export).is_ok(),
            };
            if let Some((id, _)) = jobs.iter().find(fails) {
                return Some((*id).to_owned());
            }
        }
        None
    })
}

/// What runs on the other host: offers a new image, and has standard input and output be a client's connection to it.
pub async fn receive(args: &Args, command: &Receive) -> Result<()> {
    let daemon = daemon::connect(&args.daemon).await?;
    let manager = daemon.manager().await?;
    let name = &command.name;
    if command.abort {
        // What is not offered any more may be a guest's by now, or was never made.
        let objects = Objects::load(&daemon).await?;
        if objects.find("export", name).is_err() {
            return match Path::new(&command.file).exists() {
                true => Err(Error::failed(format!(
                    "'{}' is nobody's copy (any more): it stays",
                    command.file
                ))),
                false => Ok(()),
            };
        }
        daemon.export(name).await?.remove(Options::new()).await?;
        daemon.node(name).await?.remove(Options::new()).await?;
        return std::fs::remove_file(&command.file)
            .map_err(|e| Error::failed(format!("'{}': {e}", command.file)));
    }
    let (format, secret) = (command.format.as_str(), command.secret.as_deref());
    let mut options = Options::from([("size", Variant::from(command.size))]);
    options.extend(encryption(format, secret));
    files::make_image(&manager, &command.file, format, options).await?;
    let offered = offer(args, &manager, command).await;
    let Ok(socket) = offered else {
        if let Ok(node) = daemon.node(name).await {
            let _ = node.remove(Options::new()).await;
        }
        let _ = std::fs::remove_file(&command.file);
        return offered.map(drop);
    };
    let from = socket
        .try_clone()
        .map_err(|e| Error::failed(e.to_string()))?;
    std::thread::spawn(move || {
        let _ = carry(std::io::stdin().lock(), &socket);
        let _ = socket.shutdown(Shutdown::Write);
    });
    carry(from, std::io::stdout().lock()).map_err(|e| Error::failed(e.to_string()))?;
    // It goes with the client's connection, or a moment later, if all is there.
    let until = Instant::now() + Duration::from_secs(10);
    let is_there = |objects: Result<Objects>| {
        objects.is_err() || objects.is_ok_and(|o| o.find("export", name).is_ok())
    };
    while is_there(Objects::load(&daemon).await) {
        if Instant::now() > until {
            return Err(Error::failed(format!(
                "the other host's copy into '{}' is not finished",
                command.file
            )));
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok(())
}

fn carry(mut from: impl Read, mut to: impl Write) -> std::io::Result<()> {
    let mut buffer = vec![0; 256 << 10];
    loop {
        let n = from.read(&mut buffer)?;
        if n == 0 {
            return Ok(());
        }
        to.write_all(&buffer[..n])?;
        to.flush()?;
    }
}

async fn offer(
    args: &Args,
    manager: &vdisk_dbus::ManagerProxy<'_>,
    command: &Receive,
) -> Result<UnixStream> {
    let (name, format) = (command.name.as_str(), command.format.as_str());
    let mut node = Options::from([
        ("node-name", Variant::from(name)),
        ("driver", Variant::from(format)),
        ("discard", Variant::from("unmap")),
        ("file.driver", Variant::from("file")),
        ("file.filename", Variant::from(command.file.as_str())),
    ]);
    node.extend(encryption(format, command.secret.as_deref()));
    manager.add_node(node).await?;
    let folder = match &args.daemon.instance {
        Some(instance) => format!("/run/vdiskd-{instance}"),
        None => "/run/vdiskd".to_owned(),
    };
    let socket = Path::new(&folder).join(format!("{name}.sock"));
    let added = manager.add_export(Options::from([
        ("id", Variant::from(name)),
        ("type", Variant::from("nbd")),
        ("node-name", Variant::from(name)),
        ("writable", Variant::from(true)),
        ("until-disconnect", Variant::from(true)),
        ("max-connections", Variant::from(1u32)),
        ("addr.type", Variant::from("unix")),
        (
            "addr.path",
            Variant::from(socket.to_string_lossy().into_owned()),
        ),
    ]));
    added.await?;
    UnixStream::connect(&socket).map_err(|e| Error::failed(format!("'{}': {e}", socket.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shells_are_found() {
        let words = |given, uri| Shell::new(given, uri).map(|s| s.0.join(" ")).ok();
        let ssh = |uri| words(None, uri);
        assert_eq!(ssh("qemu+ssh://h2/system"), Some("ssh h2".into()));
        assert_eq!(
            ssh("qemu+ssh://root@h2:22/system?x=y"),
            Some("ssh -p 22 root@h2".into())
        );
        assert_eq!(ssh("qemu:///system"), None);
        assert_eq!(ssh("qemu+ssh://-oProxyCommand=x/system"), None);
        assert_eq!(words(Some("a b"), "qemu:///system"), Some("a b".into()));
        assert_eq!(quoted("it's"), r"'it'\''s'");
    }
}
