//! Counters as D-Bus maps.

use std::collections::HashMap;

use vdisk_exports::{QueueCounters, RequestClass};
use vdisk_io::ThreadStatsSnapshot;
use zbus::{OwnedVariant, Variant};

pub type Statistics = HashMap<String, OwnedVariant>;

pub fn owned(value: Variant<'_>) -> OwnedVariant {
    value
        .try_into()
        .expect("only file descriptors can fail to be cloned, and there are none")
}

fn numbers<'a>(pairs: impl IntoIterator<Item = (&'a str, u64)>) -> Statistics {
    pairs
        .into_iter()
        .map(|(k, v)| (k.to_owned(), OwnedVariant::from(v)))
        .collect()
}

fn queue(c: &QueueCounters) -> Statistics {
    let failed = c.kinds.iter().map(|k| k.failed).sum();
    let mut out = numbers([
        ("requests", c.requests()),
        ("failed", failed),
        ("fast", c.fast),
        ("slow", c.slow),
        ("kicks", c.kicks),
        ("interrupts", c.interrupts),
        ("poll-hits", c.poll_hits),
        ("merged", 0),
    ]);
    for class in RequestClass::ALL {
        let k = c.kind(class);
        let mut kind = numbers([
            ("requests", k.requests),
            ("bytes", k.bytes),
            ("failed", k.failed),
        ]);
        let latency = owned(Variant::from(k.latency.0.to_vec()));
        kind.insert("latency".to_owned(), latency);
        out.insert(class.name().to_owned(), owned(Variant::from(kind)));
    }
    out
}

/// The counters of an export: the sum, and each queue under "queues".
pub fn export(queues: &[QueueCounters]) -> Statistics {
    let mut sum = QueueCounters::default();
    for q in queues {
        sum.add(q);
    }
    let mut out = queue(&sum);
    let each: Vec<Statistics> = queues.iter().map(queue).collect();
    out.insert("queues".to_owned(), owned(Variant::from(each)));
    out
}

pub fn iothread(s: &ThreadStatsSnapshot) -> Statistics {
    numbers([
        ("operations", s.operations),
        ("syscalls", s.syscalls),
        ("turns", s.turns),
        ("polling-ns", s.polling_ns),
        ("sleeping-ns", s.sleeping_ns),
        ("working-ns", s.working_ns),
        ("poll-hits", s.poll_hits),
        ("poll-misses", s.poll_misses),
        ("events", s.events),
    ])
}
