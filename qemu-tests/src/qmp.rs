//! QEMU's monitor.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

pub struct Qmp {
    out: UnixStream,
    lines: BufReader<UnixStream>,
    events: Vec<Value>,
}

impl Qmp {
    pub fn connect(path: &Path) -> Qmp {
        let out = crate::wait_for("QEMU's monitor", || UnixStream::connect(path).ok());
        out.set_read_timeout(Some(Duration::from_secs(60)))
            .expect("a timeout is not zero");
        let lines = BufReader::new(out.try_clone().expect("descriptors are left"));
        let mut qmp = Qmp {
            out,
            lines,
            events: Vec::new(),
        };
        qmp.read();
        qmp.run("qmp_capabilities", json!({}));
        qmp
    }

    fn read(&mut self) -> Value {
        let mut line = String::new();
        let n = self.lines.read_line(&mut line);
        assert!(matches!(n, Ok(1..)), "QEMU's monitor is gone: {n:?}");
        serde_json::from_str(&line).expect("QMP is JSON")
    }

    /// Runs a command; panics if it fails.
    pub fn run(&mut self, command: &str, arguments: Value) -> Value {
        let message = json!({"execute": command, "arguments": arguments});
        self.out
            .write_all(format!("{message}\n").as_bytes())
            .expect("QEMU listens");
        loop {
            let reply = self.read();
            if reply.get("event").is_some() {
                self.events.push(reply);
                continue;
            }
            assert!(reply.get("error").is_none(), "{command}: {reply}");
            return reply["return"].clone();
        }
    }

    /// Has the monitor for people say something.
    pub fn info(&mut self, what: &str) -> String {
        let line = json!({"command-line": format!("info {what}")});
        let said = self.run("human-monitor-command", line);
        said.as_str().unwrap_or_default().replace('\r', "")
    }

    /// Waits for an event, or takes one that came.
    pub fn wait_event(&mut self, name: &str) -> Value {
        loop {
            if let Some(at) = self.events.iter().position(|e| e["event"] == name) {
                return self.events.remove(at);
            }
            let next = self.read();
            self.events.push(next);
        }
    }
}
