//! Options of I/O threads.

use std::time::Duration;

use crate::error::Result;
use crate::fields::{Fields, Map, Value, expand_dotted};
use crate::node::check_name;

/// Longer polling than this would only burn a CPU.
const MAX_POLL_NS: u64 = 1_000_000_000;

/// A new I/O thread.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IoThreadOptions {
    pub name: String,
    /// CPUs to run on; empty for any.
    pub cpus: Vec<usize>,
    /// Ceiling of busy polling (QEMU's `poll-max-ns`); zero switches it off; the daemon's default if
    /// not given.
    pub poll_max: Option<Duration>,
}

/// A change to an I/O thread that runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IoThreadUpdate {
    pub poll_max: Option<Duration>,
}

fn poll_max(f: &mut Fields) -> Result<Option<Duration>> {
    Ok(f.integer("poll-max-ns", 0..=MAX_POLL_NS)?
        .map(Duration::from_nanos))
}

impl IoThreadOptions {
    pub fn from_map(name: String, map: Map) -> Result<IoThreadOptions> {
        check_name("I/O thread", &name)?;
        let mut f = Fields::new(format!("I/O thread '{name}'"), expand_dotted(map)?);
        let poll_max = poll_max(&mut f)?;
        let cpus = match f.value("cpus") {
            None => Vec::new(),
            Some(v) => cpu_list(&v)
                .ok_or_else(|| f.error("cpus", format_args!("is {v}: give CPU numbers")))?,
        };
        f.finish()?;
        Ok(IoThreadOptions {
            name,
            cpus,
            poll_max,
        })
    }
}

impl IoThreadUpdate {
    pub fn from_map(name: &str, map: Map) -> Result<IoThreadUpdate> {
        let mut f = Fields::new(format!("I/O thread '{name}'"), expand_dotted(map)?);
        let poll_max = poll_max(&mut f)?;
        f.finish()?;
        Ok(IoThreadUpdate { poll_max })
    }
}

/// `[0, 2]`, `2`, `"0,2-4"`.
fn cpu_list(v: &Value) -> Option<Vec<usize>> {
    let number = |v: &Value| v.as_u64().and_then(|n| usize::try_from(n).ok());
    match v {
        Value::Array(list) => list.iter().map(number).collect(),
        Value::Number(_) => Some(vec![number(v)?]),
        Value::String(s) => {
            let mut out = Vec::new();
            for part in s.split(',') {
                let (a, b) = part.split_once('-').unwrap_or((part, part));
                let (a, b): (usize, usize) = (a.trim().parse().ok()?, b.trim().parse().ok()?);
                if a > b || b > 65535 {
                    return None;
                }
                out.extend(a..=b);
            }
            Some(out)
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(v: Value) -> Result<IoThreadOptions> {
        match v {
            Value::Object(m) => IoThreadOptions::from_map("io0".into(), m),
            _ => panic!("not a map"),
        }
    }

    #[test]
    fn options_are_read() {
        let o = read(json!({"cpus": "0,2-3", "poll-max-ns": 0})).unwrap();
        assert_eq!((o.cpus, o.poll_max), (vec![0, 2, 3], Some(Duration::ZERO)));
        assert_eq!(read(json!({"cpus": [1]})).unwrap().cpus, [1]);
        for bad in [
            json!({"cpus": "3-1"}),
            json!({"cpus": "x"}),
            json!({"poll-max-ns": -1}),
        ] {
            assert!(read(bad).unwrap_err().message.contains("io0"));
        }
    }
}
