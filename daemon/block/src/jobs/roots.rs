//! The ways of a job into the graph: its requests are counted, and wait while somebody drains.

use std::rc::Rc;
use std::sync::Arc;

use tokio::sync::Notify;
use vdisk_io::{Generation, IoThread, Reactor};

use crate::backend::{Backend, Client};

/// The job's backends, on the thread that it runs on.
pub struct Roots {
    clients: Vec<Client>,
    resumed: Arc<Notify>,
}

/// A request of the job is counted until this is dropped.
pub(crate) struct Counted<'a> {
    roots: &'a Roots,
    generations: Vec<Generation>,
}

impl Roots {
    /// On the calling I/O thread, which must be `thread`.
    pub(crate) fn attach(
        backends: &[Arc<Backend>],
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
            generations: self.clients.iter().map(Client::begin).collect(),
        }
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        for (client, generation) in self.roots.clients.iter().zip(&self.generations) {
            client.end(*generation);
        }
    }
}
