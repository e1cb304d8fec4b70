//! Driver `null-co`: stores nothing, for measurements and tests.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use vdisk_api::{NodeOptions, NullOptions, Result};
use vdisk_io::IoVecs;

use super::{Direction, Driver, LocalFuture, OpenedDriver, Resolved, SlowReason, reactor};
use crate::node::{Node, WriteFlags, ZeroFlags};
use crate::status::BlockStatus;

struct Null {
    read_zeroes: bool,
    latency: Duration,
}

pub(super) fn open(node: &NodeOptions, options: &NullOptions) -> OpenedDriver {
    OpenedDriver {
        driver: Box::new(Null {
            read_zeroes: options.read_zeroes,
            latency: Duration::from_nanos(options.latency_ns),
        }),
        size: options.size,
        read_only: node.read_only,
    }
}

impl Null {
    fn wait(&self) -> LocalFuture<'_, io::Result<()>> {
        Box::pin(async {
            if !self.latency.is_zero() {
                reactor()?.sleep(self.latency).await;
            }
            Ok(())
        })
    }
}

impl Driver for Null {
    fn status<'a>(
        &'a self,
        _: u64,
        len: u64,
        _: Option<&'a Arc<Node>>,
    ) -> LocalFuture<'a, io::Result<BlockStatus>> {
        let zero = self.read_zeroes;
        Box::pin(async move {
            Ok(BlockStatus {
                zero,
                ..BlockStatus::data(len)
            })
        })
    }

    fn name(&self) -> &'static str {
        "null-co"
    }

    #[inline]
    fn resolve(
        &self,
        direction: Direction,
        _offset: u64,
        _len: u64,
        then: &mut dyn FnMut(Resolved<'_>),
    ) {
        then(match direction {
            _ if !self.latency.is_zero() => Resolved::Slow(SlowReason::Latency),
            Direction::Read if self.read_zeroes => Resolved::Zeroes,
            _ => Resolved::Nothing,
        });
    }

    fn make_writable(&self) -> Result<()> {
        Ok(())
    }

    fn slow_reason(&self, _direction: Direction) -> Option<SlowReason> {
        (!self.latency.is_zero()).then_some(SlowReason::Latency)
    }

    fn read(&self, _offset: u64, iov: IoVecs) -> LocalFuture<'_, io::Result<()>> {
        Box::pin(async move {
            if self.read_zeroes {
                iov.zero_in_turns().await;
            }
            self.wait().await
        })
    }

    fn write(&self, _: u64, _: IoVecs, _: WriteFlags) -> LocalFuture<'_, io::Result<()>> {
        self.wait()
    }

    fn flush(&self) -> LocalFuture<'_, io::Result<()>> {
        self.wait()
    }

    fn discard(&self, _: u64, _: u64) -> LocalFuture<'_, io::Result<()>> {
        self.wait()
    }

    fn write_zeroes(&self, _: u64, _: u64, _: ZeroFlags) -> LocalFuture<'_, io::Result<()>> {
        self.wait()
    }

    fn resize(&self, size: u64) -> LocalFuture<'_, io::Result<u64>> {
        Box::pin(async move { Ok(size) })
    }
}
