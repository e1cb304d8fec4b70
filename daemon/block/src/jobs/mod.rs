//! Block jobs: long work on nodes that guests may use meanwhile.
//!
//! What a job does is [`Work`]; it runs on an I/O thread, and its requests are counted at backends of its own, so that they
//! wait while the graph changes. [`JobState`] is what whoever controls the job shares with it. When it begins, what becomes
//! of its nodes when it ends, and its life cycle are the control plane's.

mod backup;
mod copy;
mod discard;
mod mirror;
mod roots;
mod state;
mod stream;

use std::sync::Arc;

use vdisk_io::IoThread;

use crate::backend::Backend;
use crate::drivers::LocalFuture;

pub use backup::{Backup, BackupSync, OnCopyError};
pub use copy::Sharing;
pub use discard::Discard;
pub use mirror::{Mirror, MirrorSync};
pub use state::{Ending, JobState, OnError, Side, Stop};
pub use stream::Stream;

pub use roots::{Reaching, Roots};

/// What a job does.
pub trait Work: Send + Sync {
    /// Everything but the last part.
    fn run<'a>(
        &'a self,
        state: &'a JobState,
        roots: &'a Roots,
    ) -> LocalFuture<'a, Result<(), Stop>>;

    /// What is to be done while nobody writes to the source, before the job's nodes change their places.
    fn finish(&self) -> LocalFuture<'_, Result<(), Stop>>;
}

/// Runs a job's work on a thread; its requests are counted at `backends`, and those of others come by way of `reaching`. Resolves when it has ended.
pub async fn run(
    work: Arc<dyn Work>,
    state: Arc<JobState>,
    backends: Vec<Arc<Backend>>,
    reaching: Reaching,
    thread: IoThread,
) -> Result<(), Stop> {
    let there = thread.clone();
    let result = thread
        .run_async(move |reactor| {
            let roots = Roots::attach(&backends, reaching, &there, &reactor);
            async move { work.run(&state, &roots).await }
        })
        .await;
    result.unwrap_or_else(|e| {
        Err(Stop::Failed {
            side: Side::Source,
            error: std::io::Error::other(e),
        })
    })
}
