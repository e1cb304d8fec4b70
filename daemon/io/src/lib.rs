//! I/O threads: the data plane of vdiskd.
//!
//! Each [`IoThread`] is one OS thread with one engine (an io_uring, or a fallback where io_uring is not
//! allowed), a `!Send` executor, timers, an inbox for work from other threads, and adaptive busy
//! polling for each [`Source`] (a virtqueue, typically) that lives on it.
//!
//! Two ways lead to storage:
//! * the fast path: a [`Source`] submits with [`Reactor::submit_for_source`], without a future and
//!   without an allocation, and is told the result through [`Source::complete`];
//! * the slow path: a future on the executor awaits [`Reactor::submit`], which owns its buffers until
//!   the kernel is done with them, even if the future is dropped meanwhile.
//!
//! Short reads and writes, reads beyond the end of a file and `EINTR`/`EAGAIN` are handled here, once:
//! whoever submits sees a whole transfer or an error.

mod bits;
mod buffer;
mod engine;
mod executor;
mod file;
mod give_way;
mod in_flight;
mod op;
mod poll_window;
mod prefetch;
mod range_lock;
mod reactor;
mod stats;
mod thread;
mod timer;

pub use bits::{Bits, Recorder};
pub use buffer::{AlignedBuf, IoVecs};
pub use engine::{EngineChoice, EngineError, EngineKind};
pub use file::{IoFile, block_device_size, direct_read_works};
pub use give_way::give_way;
pub use in_flight::{Generation, InFlight, quiesce};
pub use op::{Fallocate, OpKind};
pub use poll_window::DEFAULT_POLL_MAX;
pub use prefetch::prefetch;
pub use range_lock::{RangeGuard, RangeLock};
pub use reactor::{FixedBuffers, Kept, Reactor, Source, SourceId};
pub use stats::{Counter, ThreadStats, ThreadStatsSnapshot};
pub use thread::{IoThread, IoThreadConfig, IoThreadError, StartError};
pub use timer::Sleep;
