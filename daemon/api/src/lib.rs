//! What vdiskd can be told: commands, their options and their errors.
//!
//! Options have QAPI's names (`BlockdevOptions`, `BlockExportOptions` of QEMU's QMP reference). They
//! arrive as a map, nested or with dotted keys (`cache.direct`), and unknown names, wrong types and
//! values out of range are refused by name. D-Bus (and any later front) only translates to these types.

mod bitmap;
mod blkdebug;
mod command;
mod error;
mod export;
mod fields;
mod image;
mod iothread;
mod job;
mod node;
mod secret;
mod size;
mod throttle;
mod transaction;

pub use bitmap::{BitmapAction, BitmapOptions};
pub use blkdebug::{
    BlkdebugOptions, DEBUG_EVENTS, DebugPoint, InjectError, InjectWhen, SetState, SuspendRequest,
};
pub use command::{Command, Reply, SnapshotAction};
pub use error::{Error, ErrorKind, Result};
pub use export::{
    ExportKind, ExportOptions, MAX_QUEUE_SIZE, MAX_QUEUES, NbdExportOptions, QueuePlacement,
    SocketAddress, VhostUserBlkOptions,
};
pub use fields::{Map, Value, expand_dotted};
pub use image::{
    AmendImage, CreateImage, Encryption, ImageFile, ImageFormat, ImagePreallocation, KeyHash,
    NewFormat, Qcow2Create, RepairWhat, check_from_map, measure_from_map,
};
pub use iothread::{IoThreadOptions, IoThreadUpdate};
pub use job::{
    BitmapMode, CopyErrorPolicy, CopyMode, ErrorPolicy, JobAction, JobBitmap, JobKind, JobOptions,
    JobSync, cancel_from_map, change_from_map,
};
pub use node::{
    BackingRef, CacheOptions, CopyBeforeWriteOptions, CopyOnReadOptions, DRIVERS, DetectZeroes,
    Discard, DriverOptions, FILTERS, FileOptions, Locking, LuksOptions, NbdOptions, NbdServer,
    NodeChange, NodeOptions, NodeRef, NullOptions, Qcow2Options, RawOptions, SnapshotAccessOptions,
    ThrottleOptions, file_driver,
};
pub use secret::{MAX_SECRET, Secret, SecretOptions, SecretSource};
pub use size::{format_size, parse_size};
pub use throttle::{Limit, ThrottleLimits};
pub use transaction::{Action, CompletionMode, Transaction};
