//! Logs: to the journal if standard error is connected to it, else to standard error.

use std::os::linux::fs::MetadataExt;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::prelude::*;

/// Starts logging. The variable VDISKD_LOG chooses what (`info` if unset; see the syntax of
/// `tracing_subscriber::EnvFilter`).
pub fn start() {
    let filter = EnvFilter::try_from_env("VDISKD_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let registry = tracing_subscriber::registry().with(filter);
    if stderr_is_journal()
        && let Ok(journal) = tracing_journald::layer()
    {
        registry.with(journal).init();
        return;
    }
    let stderr = tracing_subscriber::fmt::layer()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
        .with_target(false);
    registry.with(stderr).init();
}

/// systemd sets JOURNAL_STREAM to device and inode of the stream it connected (systemd.exec(5)).
fn stderr_is_journal() -> bool {
    let Ok(expected) = std::env::var("JOURNAL_STREAM") else {
        return false;
    };
    std::fs::metadata("/proc/self/fd/2")
        .is_ok_and(|m| expected == format!("{}:{}", m.st_dev(), m.st_ino()))
}
