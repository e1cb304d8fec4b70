//! A guest under QEMU's TCG with our own PID 1.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use serde_json::{Value, json};

use crate::{Qmp, Scratch, lab_path, scratch, wait_for};

/// What a guest is made of.
#[derive(Clone, Debug, Default)]
pub struct GuestOptions {
    /// vhost-user-blk disks: socket, queues, further device properties.
    disks: Vec<(PathBuf, u16, String)>,
    cpus: u8,
    args: Vec<String>,
    reboots: bool,
    /// A connection that ends stays ended.
    stays: bool,
    /// Runs the QEMU of this lab root.
    root: Option<&'static str>,
}

impl GuestOptions {
    pub fn new() -> GuestOptions {
        GuestOptions {
            cpus: 2,
            ..GuestOptions::default()
        }
    }

    /// Adds a vhost-user-blk disk that comes back when the daemon does.
    pub fn disk(mut self, socket: &Path, queues: u16) -> GuestOptions {
        self.disks.push((socket.to_owned(), queues, String::new()));
        self
    }

    pub fn cpus(mut self, cpus: u8) -> GuestOptions {
        self.cpus = cpus;
        self
    }

    pub fn args(mut self, args: &[&str]) -> GuestOptions {
        self.args.extend(args.iter().map(|a| (*a).to_owned()));
        self
    }

    /// Loses a disk for ever if its connection ends.
    pub fn without_reconnect(mut self) -> GuestOptions {
        self.stays = true;
        self
    }

    /// Lets the guest reboot instead of ending QEMU.
    pub fn reboots(mut self) -> GuestOptions {
        self.reboots = true;
        self
    }

    /// Uses the QEMU of a lab root (`trixie`), by chroot.
    pub fn root(mut self, root: &'static str) -> GuestOptions {
        self.root = Some(root);
        self
    }
}

pub struct Guest {
    dir: Scratch,
    qemu: Child,
    pub qmp: Qmp,
    out: UnixStream,
    lines: BufReader<UnixStream>,
}

impl Guest {
    /// Boots a guest and waits until its PID 1 listens.
    pub fn boot(options: GuestOptions) -> Guest {
        // Only what is known to be QEMU's own doing, before the guest runs, is tried again.
        for _ in 0..2 {
            let mut guest = Guest::start(options.clone());
            match guest.comes_up() {
                Ok(()) => return guest,
                Err(why) => eprintln!("{why}: once more"),
            }
        }
        let mut guest = Guest::start(options);
        guest.wait_ready();
        guest
    }

    /// Waits for the guest's PID 1.
    ///
    /// # Errors
    /// If QEMU has aborted, or has lost an interrupt.
    fn comes_up(&mut self) -> Result<(), &'static str> {
        match self.lines.fill_buf().map(<[u8]>::is_empty) {
            // The end of QEMU.
            Ok(true) => {
                let aborted = self.qemu.wait().is_ok_and(|s| {
                    s.signal() == Some(libc::SIGABRT) || s.code() == Some(128 + libc::SIGABRT)
                });
                let console = self.console();
                assert!(aborted, "the guest did not boot; console:\n{console}");
                return Err("QEMU aborted before the guest was up");
            }
            Err(_) if self.has_lost_interrupt() => {
                return Err("QEMU lost the end of an interrupt");
            }
            _ => self.wait_ready(),
        }
        Ok(())
    }

    /// Whether a CPU sleeps in an interrupt that never ends: no kernel does that, and QEMU's TCG (10.0, with a thread for each CPU)
    /// makes it so about once in 300 boots on a busy machine.
    fn has_lost_interrupt(&mut self) -> bool {
        let registers = self.qmp.info("registers -a");
        let halted = registers
            .lines()
            .filter(|l| l.contains(" HLT="))
            .map(|l| l.contains(" HLT=1"));
        halted.enumerate().any(|(cpu, halted)| {
            let apic = self.qmp.info(&format!("lapic {cpu}"));
            let in_service = apic.lines().find_map(|l| l.strip_prefix("ISR"));
            halted && in_service.is_some_and(|l| !l.contains("(none)"))
        })
    }

    /// Starts QEMU without waiting for the guest (which may be waiting for a migration).
    pub fn start(options: GuestOptions) -> Guest {
        let dir = scratch();
        let at = |name: &str| dir.path().join(name).display().to_string();
        let mut command = match &options.root {
            None => Command::new("qemu-system-x86_64"),
            Some(root) => {
                lab_path(root);
                let mut c = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/in-root.sh"));
                c.args([root, "qemu-system-x86_64"]);
                c
            }
        };
        // One thread for all CPUs: see `has_lost_interrupt`. (With a thread for each it also aborts now and then, while firmware moves
        // devices around: "iotlb_to_section: Assertion failed".)
        command.args(["-accel", "tcg,thread=single", "-M", "q35", "-cpu", "max"]);
        command.args(["-smp", &options.cpus.to_string(), "-m", "256"]);
        command.args(["-object", "memory-backend-memfd,id=mem,size=256M,share=on"]);
        command.args(["-numa", "node,memdev=mem"]);
        command.args(["-nodefaults", "-display", "none"]);
        command.args(["-serial", &format!("file:{}", at("console"))]);
        command.args(["-kernel", &lab_path("kernel/vmlinuz").display().to_string()]);
        command.args(["-initrd", &lab_path("initramfs").display().to_string()]);
        // With one-shot timers, an emulated CPU whose interrupt is lost on a busy machine sleeps for ever.
        let append = "console=ttyS0 panic=-1 quiet nohz=off highres=off";
        command.args(["-append", append]);
        command.args(["-device", "isa-debug-exit,iobase=0x501,iosize=1"]);
        command.args(["-qmp", &format!("unix:{},server=on,wait=off", at("qmp"))]);
        command.args(["-device", "virtio-serial-pci"]);
        let port = format!("socket,id=port,path={},server=on,wait=off", at("port"));
        command.args(["-chardev", &port]);
        command.args(["-device", "virtserialport,chardev=port,name=org.vdisk.test"]);
        command.args(["-device", "pcie-root-port,id=slot0,chassis=1"]);
        if !options.reboots {
            command.arg("-no-reboot");
        }
        for (i, (socket, queues, more)) in options.disks.iter().enumerate() {
            let reconnect = if options.stays { "" } else { ",reconnect=1" };
            let chardev = format!("socket,id=disk{i},path={}{reconnect}", socket.display());
            command.args(["-chardev", &chardev]);
            let device = format!("vhost-user-blk-pci,chardev=disk{i},num-queues={queues}{more}");
            command.args(["-device", &device]);
        }
        let qemu = command
            .args(&options.args)
            .stdin(Stdio::null())
            .spawn()
            .expect("qemu-system-x86_64 is installed: run 'make setup'");
        let qmp = Qmp::connect(&dir.path().join("qmp"));
        let path = dir.path().join("port");
        let out = wait_for("the guest's port", || UnixStream::connect(&path).ok());
        // Twice this is less than what a test may take: its end is to show the console.
        out.set_read_timeout(Some(Duration::from_secs(80)))
            .expect("a timeout is not zero");
        let lines = BufReader::new(out.try_clone().expect("descriptors are left"));
        Guest {
            dir,
            qemu,
            qmp,
            out,
            lines,
        }
    }

    fn read(&mut self) -> Value {
        let mut line = String::new();
        match self.lines.read_line(&mut line) {
            Ok(1..) => serde_json::from_str(&line).expect("the guest speaks JSON"),
            other => panic!("the guest is silent ({other:?})\n{}", self.what_it_does()),
        }
    }

    /// What the guest's CPUs and virtqueues do, for whoever reads why a test failed.
    fn what_it_does(&mut self) -> String {
        let mut said = format!("console:\n{}\n", self.console());
        if !matches!(self.qemu.try_wait(), Ok(None)) {
            return said + "QEMU has ended";
        }
        let mut tell = |qmp: &mut Qmp, what: &str| {
            said += &format!("-- {what}\n{}\n", qmp.info(what));
        };
        for what in [
            "status",
            "registers -a",
            "lapic 0",
            "lapic 1",
            "chardev",
            "virtio",
        ] {
            tell(&mut self.qmp, what);
        }
        let devices = self.qmp.run("x-query-virtio", json!({}));
        for device in devices.as_array().into_iter().flatten() {
            let path = device["path"].as_str().unwrap_or_default();
            tell(&mut self.qmp, &format!("virtio-status {path}"));
            for queue in 0..4 {
                tell(
                    &mut self.qmp,
                    &format!("virtio-queue-status {path} {queue}"),
                );
            }
        }
        said
    }

    /// Waits for the guest's PID 1 to come up (again).
    pub fn wait_ready(&mut self) {
        while self.read()["ready"] != true {}
    }

    pub fn console(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("console")).unwrap_or_default()
    }

    pub fn send(&mut self, request: Value) {
        self.out
            .write_all(format!("{request}\n").as_bytes())
            .expect("QEMU listens");
    }

    /// Has the guest do something that may fail.
    pub fn try_run(&mut self, request: Value) -> Result<Value, String> {
        self.send(request);
        let reply = self.read();
        match reply.get("error") {
            None => Ok(reply),
            Some(e) => Err(e.as_str().unwrap_or_default().to_owned()),
        }
    }

    /// Has the guest do something; panics if it fails.
    pub fn run(&mut self, request: Value) -> Value {
        let what = request.to_string();
        self.try_run(request)
            .unwrap_or_else(|e| panic!("{what}: {e}\nconsole:\n{}", self.console()))
    }

    /// Panics if the guest's kernel has logged I/O errors.
    pub fn assert_no_errors(&mut self) {
        let errors = self.run(json!({"cmd": "kernel-errors"}));
        assert_eq!(errors["lines"], json!([]), "the guest's kernel complained");
    }

    /// Waits until the load in the background has done that many more writes.
    pub fn wait_load(&mut self, more: u64) {
        let status = |g: &mut Guest| {
            let s = g.run(json!({"cmd": "load-status"}));
            assert_eq!(s["failed"], false, "the load failed");
            s["writes"].as_u64().unwrap_or(0)
        };
        let target = status(self) + more;
        wait_for("the guest's load", || {
            (status(self) >= target).then_some(())
        });
    }

    /// Ends the guest in order, and QEMU with it.
    pub fn shut_down(mut self) {
        self.send(json!({"cmd": "exit", "code": 5}));
        let status = self.wait_end();
        assert_eq!(status.code(), Some(5 * 2 + 1), "{}", self.console());
    }

    fn wait_end(&mut self) -> ExitStatus {
        wait_for("QEMU to end", || self.qemu.try_wait().ok().flatten())
    }

    /// SIGKILL for QEMU.
    pub fn kill(mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}
