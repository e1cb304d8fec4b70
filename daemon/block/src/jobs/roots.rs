//! The ways of a job into the graph: its requests are counted, and wait while somebody drains.

use std::rc::Rc;
use std::sync::Arc;

use tokio::sync::Notify;
use vdisk_io::{IoThread, Reactor};

use super::state::{JobState, Stop};
use crate::backend::{Backend, Client, Count};

/// The backends whose requests reach the job's source, at the moment at which it is called.
pub type Reaching = Arc<dyn Fn() -> Vec<Arc<Backend>> + Send + Sync>;

/// The job's backends, on the thread that it runs on.
pub struct Roots {
    clients: Vec<Client>,
    reaching: Reaching,
    resumed: Arc<Notify>,
}

/// A request of the job is counted until this is dropped.
pub(crate) struct Counted<'a> {
    roots: &'a Roots,
    counts: Vec<Count>,
}

impl Roots {
    /// On the calling I/O thread, which must be `thread`.
    pub(crate) fn attach(
        backends: &[Arc<Backend>],
        reaching: Reaching,
        thread: &IoThread,
        reactor: &Rc<Reactor>,
    ) -> Roots {
        let resumed = Arc::new(Notify::new());
        let attach = |b: &Arc<Backend>| {
            let resumed = resumed.clone();
            b.attach(thread, reactor, move |_| resumed.notify_waiters())
        };
        Roots {
            clients: backends.iter().map(attach).collect(),
            reaching,
            resumed,
        }
    }

    /// Counts a request at all of them, as soon as none is drained.
    pub(crate) async fn enter(&self) -> Counted<'_> {
        loop {
            let resumed = self.resumed.notified();
            if !self.clients.iter().any(Client::is_drained) {
                break;
            }
            resumed.await;
        }
        Counted {
            roots: self,
            counts: self.clients.iter().map(Client::begin).collect(),
        }
    }

    /// Waits until every request has ended that may reach the job's source and was in flight when this was called, or until the job is
    /// cancelled. What has other storage than the source is not waited for: it may be slow, or hang.
    pub(crate) async fn quiesce(&self, state: &JobState) -> Result<(), Stop> {
        // One that comes after this look finds what was done before it.
        let backends = (self.reaching)();
        let all = async {
            for backend in &backends {
                backend.quiesce().await;
            }
        };
        state.unless_cancelled(all).await
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        for (client, count) in self.roots.clients.iter().zip(&self.counts) {
            client.end(*count);
        }
    }
}
