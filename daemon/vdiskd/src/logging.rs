//! Logs: to the journal if standard error is connected to it, else to standard error.

use std::fmt::{Debug, Write};
use std::os::linux::fs::MetadataExt;

use libsystemd::logging::{Priority, journal_send};
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::layer::Context;
use tracing_subscriber::prelude::*;
use tracing_subscriber::{EnvFilter, Layer};

/// Starts logging. The variable VDISKD_LOG chooses what (`info` if unset; see the syntax of
/// `tracing_subscriber::EnvFilter`).
pub fn start() {
    let filter = EnvFilter::try_from_env("VDISKD_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let registry = tracing_subscriber::registry().with(filter);
    if stderr_is_journal() {
        registry.with(Journal).init();
        return;
    }
    let stderr = tracing_subscriber::fmt::layer()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
        .with_target(false);
    registry.with(stderr).init();
}

/// Writes to the journal: everything for people in the message, and each value in a field of its own (`VDISKD_NODE`, …) for
/// those who look for it (`journalctl VDISKD_NODE=disk0`).
struct Journal;

#[derive(Debug, Default)]
struct Entry {
    message: String,
    values: String,
    fields: Vec<(String, String)>,
}

impl Visit for Entry {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.add(field, value.to_owned());
    }

    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.add(field, format!("{value:?}"));
    }
}

impl Entry {
    fn add(&mut self, field: &Field, value: String) {
        if field.name() == "message" {
            self.message = value;
            return;
        }
        // Writing to a String cannot fail.
        let _ = match value.contains(' ') {
            true => write!(self.values, " {}={value:?}", field.name()),
            false => write!(self.values, " {}={value}", field.name()),
        };
        let name = field
            .name()
            .replace(|c: char| !c.is_ascii_alphanumeric(), "_");
        let name = format!("VDISKD_{}", name.to_ascii_uppercase());
        self.fields.push((name, value));
    }
}

impl<S: Subscriber> Layer<S> for Journal {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let mut entry = Entry::default();
        event.record(&mut entry);
        let priority = match *event.metadata().level() {
            Level::ERROR => Priority::Error,
            Level::WARN => Priority::Warning,
            Level::INFO => Priority::Info,
            Level::DEBUG | Level::TRACE => Priority::Debug,
        };
        let message = entry.message + &entry.values;
        // There is nobody to tell if that cannot be written.
        let _ = journal_send(priority, &message, entry.fields.into_iter());
    }
}

/// systemd sets JOURNAL_STREAM to device and inode of the stream it connected (systemd.exec(5)).
fn stderr_is_journal() -> bool {
    let Ok(expected) = std::env::var("JOURNAL_STREAM") else {
        return false;
    };
    std::fs::metadata("/proc/self/fd/2")
        .is_ok_and(|m| expected == format!("{}:{}", m.st_dev(), m.st_ino()))
}
