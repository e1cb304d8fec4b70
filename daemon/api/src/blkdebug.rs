//! Options of driver `blkdebug` (QAPI `BlockdevOptionsBlkdebug`).

use crate::error::Result;
use crate::fields::{Fields, Value};
use crate::node::{NodeRef, check_name};

/// Which requests fail.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum InjectWhen {
    #[default]
    Any,
    Read,
    Write,
    WriteZeroes,
    Discard,
    Flush,
}

/// Steps inside drivers that can be told to fail or to wait (QAPI `BlkdebugEvent`, as far as drivers have them here).
pub const DEBUG_EVENTS: [&str; 30] = [
    "l1_update",
    "l1_grow_alloc_table",
    "l1_grow_write_table",
    "l1_grow_activate_table",
    "l2_load",
    "l2_update",
    "l2_alloc_cow_read",
    "l2_alloc_write",
    "read_aio",
    "read_backing_aio",
    "read_compressed",
    "write_aio",
    "write_compressed",
    "cow_read",
    "cow_write",
    "reftable_load",
    "reftable_grow",
    "reftable_update",
    "refblock_load",
    "refblock_update",
    "refblock_alloc_write",
    "refblock_alloc_switch_table",
    "cluster_alloc",
    "cluster_alloc_space",
    "cluster_free",
    "flush_to_os",
    "flush_to_disk",
    "pwritev",
    "pwritev_zero",
    "cor_write",
];

/// In which state of its node a rule counts, and at which step inside a driver.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DebugPoint {
    /// One of [`DEBUG_EVENTS`]; none for requests.
    pub event: Option<&'static str>,
    /// 0 for any.
    pub state: u64,
}

/// At this point the node has another state (QAPI `BlkdebugSetStateOptions`). It begins with 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SetState {
    pub point: DebugPoint,
    pub new_state: u64,
}

/// Requests, or steps inside drivers, that fail (QAPI `BlkdebugInjectErrorOptions`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InjectError {
    pub point: DebugPoint,
    pub when: InjectWhen,
    pub errno: i32,
    /// Only those that touch the byte at this offset.
    pub offset: Option<u64>,
    /// Only one of them.
    pub once: bool,
    /// So many of them succeed before. (Not one of QEMU's.)
    pub after: u64,
}

/// A request or step that waits until it is told to go on. (As `break` of qemu-io.)
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SuspendRequest {
    pub point: DebugPoint,
    /// What it is called.
    pub tag: String,
    pub when: InjectWhen,
    /// Only one that touches the byte at this offset.
    pub offset: Option<u64>,
    /// So many of them go on before.
    pub after: u64,
}

/// What fails, waits, and changes what does.
#[derive(Clone, Debug, PartialEq)]
pub struct BlkdebugOptions {
    pub file: NodeRef,
    pub inject_error: Vec<InjectError>,
    pub suspend: Vec<SuspendRequest>,
    pub set_state: Vec<SetState>,
}

impl BlkdebugOptions {
    /// Takes its own options; `file` is what it stands on.
    pub(crate) fn read(f: &mut Fields, file: NodeRef) -> Result<BlkdebugOptions> {
        Ok(BlkdebugOptions {
            inject_error: inject_errors(f)?,
            suspend: suspensions(f)?,
            set_state: set_states(f)?,
            file,
        })
    }
}

const WHENS: [(&str, InjectWhen); 5] = [
    ("read", InjectWhen::Read),
    ("write", InjectWhen::Write),
    ("write-zeroes", InjectWhen::WriteZeroes),
    ("discard", InjectWhen::Discard),
    ("flush", InjectWhen::Flush),
];

/// One dictionary, or a list of them.
fn dictionaries(f: &mut Fields, key: &'static str) -> Result<Vec<Fields>> {
    let maps = match f.value(key) {
        None => Vec::new(),
        Some(Value::Object(map)) => vec![map],
        Some(Value::Array(items)) => {
            let maps = items.into_iter().map(|item| match item {
                Value::Object(map) => Ok(map),
                other => Err(f.error(key, format_args!("has {other} in it: give dictionaries"))),
            });
            maps.collect::<Result<_>>()?
        }
        Some(other) => {
            return Err(f.error(
                key,
                format_args!("is {other}: give a dictionary, or a list of them"),
            ));
        }
    };
    let what = format!("{}, {key}", f.what());
    let fields = maps.into_iter().map(|map| Fields::new(what.clone(), map));
    Ok(fields.collect())
}

fn sector(r: &mut Fields) -> Result<Option<u64>> {
    let sector = r.integer("sector", 0..=u64::MAX >> 10)?;
    Ok(sector.map(|s| s * 512))
}

fn debug_point(r: &mut Fields) -> Result<DebugPoint> {
    let event = match r.string("event")?.as_deref() {
        None | Some("none") => None,
        Some(given) => {
            let known = DEBUG_EVENTS.into_iter().find(|e| *e == given);
            Some(known.ok_or_else(|| {
                let all = DEBUG_EVENTS.join(", ");
                r.error(
                    "event",
                    format_args!("is '{given}', a step that no driver has: give one of {all}, or none for requests"),
                )
            })?)
        }
    };
    let state = r.integer("state", 0..=u64::MAX >> 1)?.unwrap_or(0);
    Ok(DebugPoint { event, state })
}

fn io_type(r: &mut Fields, point: DebugPoint) -> Result<InjectWhen> {
    let given = r.choice("iotype", &WHENS)?;
    match (given, point.event) {
        (Some(_), Some(event)) => Err(r.error(
            "iotype",
            format_args!("is given beside event '{event}', which is a step of one kind: leave one of them out"),
        )),
        (given, _) => Ok(given.unwrap_or_default()),
    }
}

fn set_states(f: &mut Fields) -> Result<Vec<SetState>> {
    let rule = |mut r: Fields| {
        let point = debug_point(&mut r)?;
        if point.event.is_none() {
            return Err(r.error(
                "event",
                "is missing: give the step at which the state changes",
            ));
        }
        let new_state = r.integer("new_state", 1..=u64::MAX >> 1)?;
        let new_state = new_state.ok_or_else(|| r.error("new_state", "is missing"))?;
        r.finish()?;
        Ok(SetState { point, new_state })
    };
    let rules = dictionaries(f, "set-state")?.into_iter();
    rules.map(rule).collect()
}

fn suspensions(f: &mut Fields) -> Result<Vec<SuspendRequest>> {
    let rule = |mut r: Fields| {
        let point = debug_point(&mut r)?;
        let rule = SuspendRequest {
            tag: r.required_string("tag")?,
            when: io_type(&mut r, point)?,
            point,
            offset: sector(&mut r)?,
            after: r.integer("after", 0..=u64::MAX >> 1)?.unwrap_or(0),
        };
        check_name(&format!("{}: tag", r.what()), &rule.tag)?;
        r.finish()?;
        Ok(rule)
    };
    let rules = dictionaries(f, "suspend")?.into_iter();
    rules.map(rule).collect()
}

fn inject_errors(f: &mut Fields) -> Result<Vec<InjectError>> {
    let rule = |mut r: Fields| {
        let point = debug_point(&mut r)?;
        let rule = InjectError {
            when: io_type(&mut r, point)?,
            point,
            errno: r.integer("errno", 1..=4095)?.unwrap_or(5) as i32,
            offset: sector(&mut r)?,
            once: r.boolean("once")?.unwrap_or(false),
            after: r.integer("after", 0..=u64::MAX >> 1)?.unwrap_or(0),
        };
        r.finish()?;
        Ok(rule)
    };
    let rules = dictionaries(f, "inject-error")?.into_iter();
    rules.map(rule).collect()
}
