//! Where requests enter the graph, and how they are held back while it changes.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use tokio::sync::Notify;
use vdisk_io::{Generation, InFlight, IoThread, Kept, Reactor};

use crate::chain::BackingChain;
use crate::drivers::{Direction, Resolved};
use crate::node::Node;

/// The root of an export (or a job): its node and the clients that send requests to it.
pub struct Backend {
    name: String,
    node: Mutex<Arc<Node>>,
    /// It goes where its node's users go.
    moves: bool,
    /// Changes with each drain, during which the graph below may change: what a client remembered under another value is stale.
    generation: AtomicU64,
    /// How many drains hold all clients back.
    drains: AtomicU32,
    clients: Mutex<Vec<Arc<Shared>>>,
    next_id: AtomicU32,
}

/// Names a client of a backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClientId(u32);

/// What a client shares with those who drain it.
struct Shared {
    id: ClientId,
    thread: IoThread,
    /// Requests counted. Written by the client's thread only.
    in_flight: AtomicU32,
    /// Told when the last request ended during a drain.
    idle: Notify,
    /// On its thread.
    seen: Kept<Seen>,
    resume: Resume,
}

/// What a client has on its thread.
struct Seen {
    /// What it remembers of the graph from one drain to the next.
    chain: RefCell<BackingChain>,
    generation: Cell<u64>,
    /// Its own requests, among those of the thread.
    in_flight: InFlight,
}

/// What a counted request is given back with: in which generation of the thread's requests it counts, and in which of the client's.
#[derive(Clone, Copy, Debug, Default)]
pub struct Count {
    thread: Generation,
    client: Generation,
}

impl Seen {
    fn of(backend: &Backend) -> Seen {
        Seen {
            generation: Cell::new(backend.generation.load(Ordering::Acquire)),
            chain: RefCell::new(BackingChain::of(backend.node())),
            in_flight: InFlight::default(),
        }
    }

    /// Looks at the graph anew if it may have changed.
    #[inline]
    fn follow(&self, backend: &Backend) {
        let generation = backend.generation.load(Ordering::Acquire);
        if generation != self.generation.get() {
            self.generation.set(generation);
            *self.chain.borrow_mut() = BackingChain::of(backend.node());
        }
    }
}

type Resume = Box<dyn Fn(&Rc<Reactor>) + Send + Sync>;

fn locked<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(|e| e.into_inner())
}

impl Backend {
    pub fn new(name: impl Into<String>, node: Arc<Node>) -> Arc<Backend> {
        Backend::make(name.into(), node, true)
    }

    /// One that stays at its node when another takes the node's place.
    pub fn new_fixed(name: impl Into<String>, node: Arc<Node>) -> Arc<Backend> {
        Backend::make(name.into(), node, false)
    }

    fn make(name: String, node: Arc<Node>, moves: bool) -> Arc<Backend> {
        Arc::new(Backend {
            name,
            node: Mutex::new(node),
            moves,
            generation: AtomicU64::new(0),
            drains: AtomicU32::new(0),
            clients: Mutex::default(),
            next_id: AtomicU32::new(0),
        })
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn node(&self) -> Arc<Node> {
        locked(&self.node).clone()
    }

    /// Adds a client on the calling I/O thread, which must be `thread`. `resume` is called there when a
    /// drain is over.
    pub fn attach(
        self: &Arc<Self>,
        thread: &IoThread,
        reactor: &Rc<Reactor>,
        resume: impl Fn(&Rc<Reactor>) + Send + Sync + 'static,
    ) -> Client {
        let id = ClientId(self.next_id.fetch_add(1, Ordering::Relaxed));
        let seen = Rc::new(Seen::of(self));
        let shared = Arc::new(Shared {
            id,
            thread: thread.clone(),
            in_flight: AtomicU32::new(0),
            idle: Notify::new(),
            seen: reactor.keep(seen.clone()),
            resume: Box::new(resume),
        });
        locked(&self.clients).push(shared.clone());
        // A drain that ended before knew nothing of this client.
        seen.follow(self);
        Client {
            seen,
            backend: self.clone(),
            reactor: reactor.clone(),
            counts: Default::default(),
            shared,
        }
    }

    /// Holds new requests back and waits for those in flight. They go on when the guard is dropped.
    pub async fn drain(self: &Arc<Self>) -> DrainGuard {
        self.drains.fetch_add(1, Ordering::SeqCst);
        let guard = DrainGuard {
            backend: self.clone(),
            _let_go: LetGo::new(self.node()),
        };
        // A client that comes from now on sees the flag at once.
        let clients = locked(&self.clients).clone();
        for c in &clients {
            // After a round trip the thread has seen the flag: what it counted before is in
            // `in_flight`, and it counts no more.
            let _ = c.thread.run(|_| ()).await;
            loop {
                let idle = c.idle.notified();
                if c.in_flight.load(Ordering::SeqCst) == 0 {
                    break;
                }
                idle.await;
            }
        }
        guard
    }

    /// Waits until every request of its clients has ended that was counted when this was called; those that come meanwhile are not held
    /// back. What the caller did before is seen by them.
    pub async fn quiesce(&self) {
        let clients = locked(&self.clients).clone();
        for c in &clients {
            let seen = c.seen;
            let there = c.thread.run_async(move |r| async move {
                if let Some(seen) = r.kept(seen) {
                    seen.in_flight.quiesce().await;
                }
            });
            // A thread that has stopped has nothing in flight.
            let _ = there.await;
        }
    }
}

/// Keeps a backend drained until dropped.
pub struct DrainGuard {
    backend: Arc<Backend>,
    _let_go: LetGo,
}

/// As long as this lives, a node and those below it hold no request back: somebody waits for all of them.
pub struct LetGo(Vec<Arc<Node>>);

impl LetGo {
    fn new(node: Arc<Node>) -> LetGo {
        // The same ones in the end, whatever stands on what by then.
        let nodes = node.with_all_below();
        nodes.iter().for_each(|n| n.drain(true));
        LetGo(nodes)
    }
}

impl Drop for LetGo {
    fn drop(&mut self) {
        self.0.iter().for_each(|n| n.drain(false));
    }
}

impl DrainGuard {
    /// Gives the backend another node, if it has this one; those that stand on it have changed otherwise.
    pub fn set_node_if(&self, old: &Arc<Node>, new: &Arc<Node>) {
        let mut node = locked(&self.backend.node);
        if self.backend.moves && Arc::ptr_eq(&node, old) {
            *node = new.clone();
        }
    }
}

impl Drop for DrainGuard {
    fn drop(&mut self) {
        // Clients look at the graph anew before their next request.
        self.backend.generation.fetch_add(1, Ordering::Release);
        if self.backend.drains.fetch_sub(1, Ordering::SeqCst) != 1 {
            return;
        }
        for client in locked(&self.backend.clients).iter() {
            let (resumed, backend) = (client.clone(), self.backend.clone());
            client.thread.post(move |r| {
                // One that has no requests must not keep nodes that have left the graph open.
                if let Some(seen) = r.kept(resumed.seen) {
                    seen.follow(&backend);
                }
                (resumed.resume)(r);
            });
        }
    }
}

/// One I/O thread's way into a backend; lives on that thread.
pub struct Client {
    backend: Arc<Backend>,
    shared: Arc<Shared>,
    reactor: Rc<Reactor>,
    /// Requests counted in each generation of the thread.
    counts: [Cell<u64>; 2],
    seen: Rc<Seen>,
}

impl Client {
    pub fn id(&self) -> ClientId {
        self.shared.id
    }

    /// Whether requests must wait. Asked once before a batch of them is taken.
    #[inline]
    pub fn is_drained(&self) -> bool {
        self.backend.drains.load(Ordering::Acquire) != 0
    }

    /// Counts a request. Only while [`Client::is_drained`] is false. What is returned belongs to the request
    /// until its [`Client::end`].
    #[inline]
    pub fn begin(&self) -> Count {
        let n = &self.shared.in_flight;
        n.store(n.load(Ordering::Relaxed) + 1, Ordering::Release);
        let thread = self.reactor.in_flight().begin();
        let count = &self.counts[thread.index()];
        count.set(count.get() + 1);
        let client = self.seen.in_flight.begin();
        Count { thread, client }
    }

    /// A counted request was answered.
    #[inline]
    pub fn end(&self, count: Count) {
        let Count { thread, client } = count;
        let count = &self.counts[thread.index()];
        count.set(count.get() - 1);
        self.reactor.in_flight().end(thread, 1);
        self.seen.in_flight.end(client, 1);
        let counter = &self.shared.in_flight;
        let n = counter.load(Ordering::Relaxed) - 1;
        counter.store(n, Ordering::Release);
        if n == 0 && self.is_drained() {
            self.shared.idle.notify_waiters();
        }
    }

    /// Has the nodes let requests go that they hold back (throttling): somebody waits for those of this client.
    pub fn let_go(&self) -> LetGo {
        LetGo::new(self.backend.node())
    }

    /// Requests counted and not answered.
    pub fn in_flight(&self) -> u32 {
        self.shared.in_flight.load(Ordering::Relaxed)
    }

    /// Runs `f` with the node that requests go to at this moment.
    #[inline]
    pub fn with_node<R>(&self, f: impl FnOnce(&Arc<Node>) -> R) -> R {
        self.with_chain(|chain| f(chain.top()))
    }

    /// Requests at these offsets, which may lie anywhere, are about to be resolved: has the memory fetched into the CPU's cache that this
    /// will look at, for all of them at once.
    #[inline]
    pub fn anticipate(&self, offsets: impl Iterator<Item = u64>) {
        self.with_chain(|chain| offsets.for_each(|at| chain.anticipate(at)));
    }

    /// Tells `then` where the bytes of a counted request with these memory segments are; None if nobody knows. It must be used at once.
    #[inline]
    pub fn resolve<R>(
        &self,
        direction: Direction,
        offset: u64,
        len: u64,
        segments: &[libc::iovec],
        then: impl FnOnce(Resolved<'_>) -> R,
    ) -> Option<R> {
        self.with_chain(|chain| chain.resolve(direction, offset, len, segments, then))
    }

    #[inline]
    fn with_chain<R>(&self, f: impl FnOnce(&BackingChain) -> R) -> R {
        self.seen.follow(&self.backend);
        f(&self.seen.chain.borrow())
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        locked(&self.backend.clients).retain(|c| c.id != self.shared.id);
        self.reactor.take_kept(self.shared.seen);
        // Whoever waits for requests of this client need not any more.
        for generation in Generation::ALL {
            let n = self.counts[generation.index()].get();
            self.reactor.in_flight().end(generation, n);
        }
        self.seen.in_flight.end_all();
        self.shared.in_flight.store(0, Ordering::SeqCst);
        self.shared.idle.notify_waiters();
    }
}
