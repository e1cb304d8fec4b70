//! A vdiskd of the test's own, on a bus of its own.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Mutex};

use serde_json::Value;

use crate::Manager;

/// A folder on a real file system (not a tmpfs), removed in the end.
pub type Scratch = tempfile::TempDir;

pub fn scratch() -> Scratch {
    let base = std::env::var_os("VDISK_SCRATCH").unwrap_or_else(|| "/var/tmp".into());
    tempfile::Builder::new()
        .prefix("vdisk-test-")
        .tempdir_in(base)
        .expect("the scratch folder can be made")
}

/// A program of this workspace, beside the test or binary that asks.
pub fn program(name: &str) -> PathBuf {
    let me = std::env::current_exe().expect("the path of a running program is known");
    let mut dir = me.parent().expect("a program is in a folder").to_owned();
    if dir.ends_with("deps") {
        dir.pop();
    }
    let path = dir.join(name);
    assert!(
        path.exists(),
        "{} is missing: run 'make build' (tests run by 'make test')",
        path.display()
    );
    path
}

pub fn vdiskctl_binary() -> PathBuf {
    program("vdiskctl")
}

const BUS_CONFIG: &str = r#"<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <type>session</type>
  <listen>unix:path=@PATH@</listen>
  <auth>EXTERNAL</auth>
  <policy context="default">
    <allow send_destination="*" eavesdrop="true"/>
    <allow eavesdrop="true"/>
    <allow own="*"/>
  </policy>
</busconfig>
"#;

pub struct Daemon {
    dir: Scratch,
    bus: Child,
    address: String,
    args: Vec<String>,
    child: Option<Child>,
    log: Arc<Mutex<Vec<String>>>,
    manager: Option<Manager>,
    log_level: &'static str,
}

impl Daemon {
    /// Starts a bus and a daemon with these arguments beside the bus address.
    pub fn start(args: &[&str]) -> Daemon {
        Daemon::start_with(args, false)
    }

    /// As [`Daemon::start`], for measurements: it only logs what is of interest.
    pub fn quiet(args: &[&str]) -> Daemon {
        let mut daemon = Daemon::start_with(args, false);
        daemon.log_level = "info";
        daemon
    }

    /// As [`Daemon::start`], with a service manager that keeps its descriptors.
    pub fn managed(args: &[&str]) -> Daemon {
        Daemon::start_with(args, true)
    }

    fn start_with(args: &[&str], managed: bool) -> Daemon {
        let dir = scratch();
        let socket = dir.path().join("bus");
        let config = dir.path().join("bus.conf");
        let text = BUS_CONFIG.replace("@PATH@", &socket.display().to_string());
        std::fs::write(&config, text).expect("the scratch folder is writable");
        let mut bus = Command::new("dbus-daemon")
            .arg(format!("--config-file={}", config.display()))
            .args(["--nofork", "--print-address=1"])
            .stdout(Stdio::piped())
            .spawn()
            .expect("dbus-daemon is installed: run 'make setup'");
        let mut address = String::new();
        let stdout = bus.stdout.take().expect("it is piped");
        BufReader::new(stdout)
            .read_line(&mut address)
            .expect("dbus-daemon prints its address");
        let mut daemon = Daemon {
            manager: managed.then(|| Manager::new(dir.path())),
            dir,
            bus,
            address: address.trim().to_owned(),
            args: args.iter().map(|a| (*a).to_owned()).collect(),
            child: None,
            log: Arc::default(),
            log_level: "debug,zbus=warn",
        };
        daemon.start_again();
        daemon
    }

    /// Starts the daemon after it ended, with nothing of what it had.
    pub fn start_again(&mut self) {
        self.run(&["--fresh"]);
    }

    /// Starts the daemon after it ended. It goes on with what it had.
    pub fn go_on(&mut self) {
        self.run(&[]);
    }

    pub fn manager(&self) -> &Manager {
        self.manager.as_ref().expect("the test asked for one")
    }

    fn run(&mut self, more: &[&str]) {
        let program = program("vdiskd");
        let mut command = match &self.manager {
            Some(manager) => manager.command(&program),
            None => Command::new(program),
        };
        let mut child = command
            .args(more)
            .args(["--bus-address", &self.address])
            .arg("--runtime-dir")
            .arg(self.dir.path().join("run"))
            .arg("--state-dir")
            .arg(self.dir.path().join("state"))
            .args(&self.args)
            .env("VDISKD_LOG", self.log_level)
            .stderr(Stdio::piped())
            .spawn()
            .expect("vdiskd starts");
        let stderr = child.stderr.take().expect("it is piped");
        let log = self.log.clone();
        log.lock().expect("no test panics with the log").clear();
        std::thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                log.lock().expect("no test panics with the log").push(line);
            }
        });
        self.child = Some(child);
        self.wait_for_log("ready");
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn bus_address(&self) -> &str {
        &self.address
    }

    pub fn pid(&self) -> u32 {
        self.child.as_ref().map_or(0, Child::id)
    }

    pub fn log(&self) -> String {
        self.log
            .lock()
            .expect("no test panics with the log")
            .join("\n")
    }

    /// Waits for a line of the log; the daemon's end is a failure.
    pub fn wait_for_log(&mut self, text: &str) {
        let log = self.log.clone();
        let child = &mut self.child;
        crate::wait_for(&format!("'{text}' in the log"), || {
            let seen = log.lock().expect("no test panics with the log");
            if seen.iter().any(|l| l.contains(text)) {
                return Some(());
            }
            let ended = child.as_mut().and_then(|c| c.try_wait().ok().flatten());
            assert!(ended.is_none(), "vdiskd ended: {}", seen.join("\n"));
            None
        });
    }

    /// A file of this size, sparse.
    pub fn image(&self, name: &str, size: u64) -> PathBuf {
        let path = self.path(name);
        let file = std::fs::File::create(&path).expect("the scratch folder is writable");
        file.set_len(size).expect("files may be sparse");
        path
    }

    pub fn try_ctl(&self, args: &[&str]) -> Output {
        Command::new(vdiskctl_binary())
            .args(["--bus-address", &self.address])
            .args(args)
            .output()
            .expect("vdiskctl starts")
    }

    /// Runs vdiskctl and returns what it printed; panics if it fails.
    pub fn ctl(&self, args: &[&str]) -> String {
        let out = self.try_ctl(args);
        assert!(
            out.status.success(),
            "vdiskctl {args:?}: {}\n{}",
            String::from_utf8_lossy(&out.stderr),
            self.log()
        );
        String::from_utf8_lossy(&out.stdout).into_owned()
    }

    /// Runs vdiskctl, which must fail; returns the exit code and the message.
    pub fn ctl_error(&self, args: &[&str]) -> (i32, String) {
        let out = self.try_ctl(args);
        assert!(!out.status.success(), "vdiskctl {args:?} worked");
        let message = String::from_utf8_lossy(&out.stderr).into_owned();
        (out.status.code().unwrap_or(-1), message)
    }

    pub fn ctl_json(&self, args: &[&str]) -> Value {
        let mut all = vec!["--json"];
        all.extend(args);
        serde_json::from_str(&self.ctl(&all)).expect("--json prints JSON")
    }

    /// Adds a node on a new sparse file and a writable export of it; returns image and socket.
    pub fn export(
        &self,
        id: &str,
        size: u64,
        node: &[&str],
        export: &[&str],
    ) -> (PathBuf, PathBuf) {
        let image = self.image(&format!("{id}.img"), size);
        self.export_file(id, &image, node, export);
        (image, self.socket(id))
    }

    pub fn socket(&self, id: &str) -> PathBuf {
        self.path(&format!("{id}.sock"))
    }

    /// As [`Daemon::export`], on a file that is there.
    pub fn export_file(&self, id: &str, image: &Path, node: &[&str], export: &[&str]) {
        let file = format!("filename={}", image.display());
        let mut args = vec!["node", "add", id, "driver=file", &file];
        args.extend(node);
        self.ctl(&args);
        self.export_node(id, id, export);
    }

    pub fn export_node(&self, id: &str, node: &str, export: &[&str]) {
        let socket = self.socket(id);
        let socket = socket.to_str().expect("scratch paths are ASCII");
        let mut args = vec!["export", "add", id, "--node", node, "--socket", socket];
        if !export.contains(&"read-only") {
            args.push("--writable");
        }
        args.extend(export.iter().filter(|a| **a != "read-only"));
        self.ctl(&args);
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// SIGTERM; returns the exit code.
    pub fn terminate(&mut self) -> Option<i32> {
        let mut child = self.child.take()?;
        let pid = rustix::process::Pid::from_child(&child);
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        let status = crate::wait_for("vdiskd to end", || child.try_wait().ok().flatten());
        status.code()
    }

    /// User and system time that the daemon has used, in clock ticks.
    pub fn cpu_ticks(&self) -> u64 {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid()));
        let stat = stat.unwrap_or_default();
        let fields: Vec<&str> = stat
            .rsplit(')')
            .next()
            .unwrap_or_default()
            .split_whitespace()
            .collect();
        let tick = |i: usize| {
            fields
                .get(i)
                .and_then(|f| f.parse::<u64>().ok())
                .unwrap_or(0)
        };
        tick(11) + tick(12)
    }

    /// Resident memory in KiB.
    pub fn resident_kib(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid()));
        let status = status.unwrap_or_default();
        let line = status.lines().find(|l| l.starts_with("VmRSS:"));
        let number = line.and_then(|l| l.split_whitespace().nth(1)?.parse().ok());
        number.unwrap_or(0)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.kill();
        let _ = self.bus.kill();
        let _ = self.bus.wait();
        if std::thread::panicking() {
            eprintln!("--- vdiskd's log ---\n{}", self.log());
        }
    }
}
