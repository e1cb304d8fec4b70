//! In the place of a driver while a node is inactive: nothing is open, and all that is known of it was noted before.

use std::io;

use serde::{Deserialize, Serialize};
use vdisk_api::DRIVERS;
use vdisk_io::IoVecs;

use super::{Direction, Driver, Limits, LocalFuture, Resolved, SlowReason};
use crate::node::{Node, WriteFlags, ZeroFlags};

/// What is known of a node that is inactive.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Inactive {
    driver: String,
    filename: Option<String>,
    /// Bytes.
    pub size: u64,
    request_alignment: u64,
    memory_alignment: usize,
    zero_alignment: u64,
    storage_block_size: u64,
    is_filter: bool,
}

impl Inactive {
    pub fn of(node: &Node) -> Inactive {
        let limits = node.limits();
        Inactive {
            driver: node.driver_name().to_owned(),
            filename: node.filename(),
            size: node.size(),
            request_alignment: limits.request_alignment,
            memory_alignment: limits.memory_alignment,
            zero_alignment: limits.zero_alignment,
            storage_block_size: node.storage_block_size(),
            is_filter: node.is_filter(),
        }
    }
}

fn refused() -> io::Error {
    io::Error::new(
        io::ErrorKind::ResourceBusy,
        "the node is inactive: its image may be in use on another host",
    )
}

fn refuse<T>() -> LocalFuture<'static, io::Result<T>> {
    Box::pin(async { Err(refused()) })
}

impl Driver for Inactive {
    fn name(&self) -> &'static str {
        let known = DRIVERS.iter().find(|d| **d == self.driver);
        known.copied().unwrap_or("unknown")
    }

    fn limits(&self) -> Limits {
        Limits {
            request_alignment: self.request_alignment,
            memory_alignment: self.memory_alignment,
            zero_alignment: self.zero_alignment,
        }
    }

    fn is_active(&self) -> bool {
        false
    }

    fn resolve(&self, _: Direction, _: u64, _: u64, then: &mut dyn FnMut(Resolved<'_>)) {
        then(Resolved::Slow(SlowReason::Inactive));
    }

    fn slow_reason(&self, _: Direction) -> Option<SlowReason> {
        Some(SlowReason::Inactive)
    }

    fn read(&self, _: u64, _: IoVecs) -> LocalFuture<'_, io::Result<()>> {
        refuse()
    }

    fn write(&self, _: u64, _: IoVecs, _: WriteFlags) -> LocalFuture<'_, io::Result<()>> {
        refuse()
    }

    fn read_blocking(&self, _: u64, _: usize) -> io::Result<Vec<u8>> {
        Err(refused())
    }

    /// All that was written is durable since it became inactive.
    fn flush(&self) -> LocalFuture<'_, io::Result<()>> {
        Box::pin(async { Ok(()) })
    }

    fn discard(&self, _: u64, _: u64) -> LocalFuture<'_, io::Result<()>> {
        refuse()
    }

    fn write_zeroes(&self, _: u64, _: u64, _: ZeroFlags) -> LocalFuture<'_, io::Result<()>> {
        refuse()
    }

    fn resize(&self, _: u64) -> LocalFuture<'_, io::Result<u64>> {
        refuse()
    }

    fn storage_block_size(&self) -> u64 {
        self.storage_block_size
    }

    fn is_filter(&self) -> bool {
        self.is_filter
    }

    fn filename(&self) -> Option<String> {
        self.filename.clone()
    }
}
