//! The block graph: nodes with their drivers, the permissions between them, and the requests that run
//! through them.
//!
//! Requests enter at a [`Backend`], through one [`Client`] for each queue. A client first asks the node
//! to [resolve](Client::resolve) the request, which answers at once where the data is, or that the slow
//! path is needed: the `async` methods of [`Node`], which run on the client's I/O thread.
//!
//! Invariants:
//! * A request is counted at its client from before it is resolved until it is answered. While a
//!   backend is drained ([`Backend::drain`]) no request is counted and none starts, so the graph below
//!   may change.
//! * A resolved mapping is used at once, within the same counted request.
//! * Two writes that touch the same storage block are serialised if either of them is smaller than the
//!   block (see [`vdisk_io::RangeLock`]).

mod backend;
mod bitmap;
mod chain;
mod crypt;
mod descriptors;
mod directories;
mod drivers;
mod graph;
mod image;
pub mod jobs;
mod node;
mod permission;
mod runtime;
mod secrets;
mod status;
mod tap;
mod threshold;
mod throttle;

pub use backend::{Backend, Client, ClientId, Count, DrainGuard, LetGo};
pub use bitmap::Bitmap;
pub use crypt::{Decryption, Encrypted, luks_failed, read_header};
pub use descriptors::{Descriptors, Pending};
pub use directories::Directories;
pub use drivers::qcow2::NodeStorage;
pub use drivers::{Direction, Driver, Inactive, Limits, LocalFuture, Resolved, SlowReason};
pub use graph::{Graph, NodeInfo, Opened, Parent, Plan, ROLES, StoredBitmap, StoredNode};
pub use image::{Standalone, image_failed};
pub use node::{Node, WriteFlags, ZeroFlags};
pub use permission::{Permissions, Use};
pub use runtime::{LockPatience, Runtime};
pub use secrets::Secrets;
pub use status::BlockStatus;
pub use throttle::{ThrottleGroup, ThrottleGroups};
