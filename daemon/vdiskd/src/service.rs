//! What a service manager expects: a sign of life, and an end when there is nothing to do.

use std::time::Duration;

use futures_util::future::join_all;
use sd_notify::NotifyState;
use vdisk_io::IoThread;

use crate::control::Handle;
use crate::dbus::Front;

/// How long calls may take on the way to a daemon that has given up its name.
const LAST_CALLS: Duration = Duration::from_millis(200);

/// Tells the service manager as often as it wants (WatchdogSec) that every I/O thread turns. It ends and restarts a daemon of
/// which it hears nothing.
pub async fn watchdog(control: Handle) {
    let Some(limit) = sd_notify::watchdog_enabled() else {
        return;
    };
    let patience = limit / 3;
    let mut ticks = tokio::time::interval(patience);
    loop {
        ticks.tick().await;
        let threads: Vec<IoThread> = {
            let world = control.world();
            let jobs = world.jobs_thread.iter();
            world.threads.values().chain(jobs).cloned().collect()
        };
        let turns = threads.iter().map(async |thread| {
            // One that has been removed meanwhile does not have to.
            let turned = tokio::time::timeout(patience, thread.run(|_| ())).await;
            if turned.is_err() {
                tracing::error!(
                    iothread = thread.name(),
                    "the I/O thread is stuck: without it the daemon will be ended and started anew"
                );
            }
            turned.is_ok()
        });
        if join_all(turns).await.into_iter().all(|turned| turned) {
            let _ = sd_notify::notify(&[NotifyState::Watchdog]);
        }
    }
}

/// Returns when the daemon has had nothing for `limit`, and nobody has called it: its name is given up then, and it must end. True
/// if there is something after all, which the next one has to do.
pub async fn until_idle(front: &Front, control: &Handle, limit: Duration) -> bool {
    loop {
        tokio::time::sleep(limit.saturating_sub(front.quiet()).max(LAST_CALLS)).await;
        if front.quiet() < limit || !control.world().is_empty() {
            continue;
        }
        // Whoever calls from now on has the bus start another, for which the service manager waits for this one's end.
        let _ = sd_notify::notify(&[NotifyState::Stopping]);
        front.release_name().await;
        tokio::time::sleep(LAST_CALLS).await;
        return !control.world().is_empty();
    }
}
