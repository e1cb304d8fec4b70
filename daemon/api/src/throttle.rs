//! Limits of throttle groups (QAPI `ThrottleLimits`).

use crate::error::{Error, Result};
use crate::fields::{Fields, Map, Value};
use crate::node::check_name;

/// A limit with its bursts; in units (bytes or requests) per second.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limit {
    /// In the long run. 0 for no limit.
    pub average: u64,
    /// While a burst lasts. 0 for no bursts.
    pub max: u64,
    /// Seconds that a burst may last.
    pub length: u64,
}

/// What the members of a group may do together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ThrottleLimits {
    /// Of reads and writes together, of reads, and of writes.
    pub bps: [Limit; 3],
    pub iops: [Limit; 3],
    /// A request counts as one for each so many bytes, and for the rest. 0 counts requests whatever their size.
    pub iops_size: u64,
}

/// Options by kind of limit: average, max and length.
const BPS: [[&str; 3]; 3] = [
    ["bps-total", "bps-total-max", "bps-total-max-length"],
    ["bps-read", "bps-read-max", "bps-read-max-length"],
    ["bps-write", "bps-write-max", "bps-write-max-length"],
];
const IOPS: [[&str; 3]; 3] = [
    ["iops-total", "iops-total-max", "iops-total-max-length"],
    ["iops-read", "iops-read-max", "iops-read-max-length"],
    ["iops-write", "iops-write-max", "iops-write-max-length"],
];

/// Levels of buckets are products of these. (QEMU has about the same limit.)
const MAX: u64 = 1_000_000_000_000_000;
const MAX_LENGTH: u64 = 86_400;

fn read(f: &mut Fields, names: [[&'static str; 3]; 3]) -> Result<[Limit; 3]> {
    let mut out = [Limit::default(); 3];
    for (limit, [average, max, length]) in out.iter_mut().zip(names) {
        let mut size = |key: &'static str| -> Result<u64> {
            let value = f.size(key)?.unwrap_or(0);
            match value <= MAX {
                true => Ok(value),
                false => Err(f.error(key, format_args!("is {value}: at most {MAX} is allowed"))),
            }
        };
        limit.average = size(average)?;
        limit.max = size(max)?;
        limit.length = f.integer(length, 1..=MAX_LENGTH)?.unwrap_or(1);
        if limit.max > 0 && limit.max < limit.average {
            return Err(f.error(
                max,
                format_args!("is less than '{average}': give at least that"),
            ));
        }
        if limit.max > 0 && limit.average == 0 {
            return Err(f.error(max, format_args!("has no meaning without '{average}'")));
        }
        if limit.length > 1 && limit.max == 0 {
            return Err(f.error(length, format_args!("has no meaning without '{max}'")));
        }
    }
    let [total, read, write] = out;
    if total.average > 0 && read.average + write.average > 0 {
        let [[total, ..], [read, ..], [write, ..]] = names;
        return Err(f.error(
            total,
            format_args!("cannot be given together with '{read}' or '{write}'"),
        ));
    }
    Ok(out)
}

impl ThrottleLimits {
    pub fn from_map(name: &str, map: Map) -> Result<ThrottleLimits> {
        check_name("throttle group", name)?;
        let mut f = Fields::new(format!("throttle group '{name}'"), map);
        let limits = ThrottleLimits {
            bps: read(&mut f, BPS)?,
            iops: read(&mut f, IOPS)?,
            iops_size: f.size("iops-size")?.unwrap_or(0),
        };
        f.finish()?;
        if limits.iops_size > 0 && limits.iops.iter().all(|l| l.average == 0) {
            return Err(Error::invalid(format!(
                "throttle group '{name}': option 'iops-size' has no meaning without a limit of iops"
            )));
        }
        Ok(limits)
    }

    /// The limits that are set, by the names of the options.
    pub fn to_map(&self) -> Map {
        let mut out = Map::new();
        for (limits, names) in [(self.bps, BPS), (self.iops, IOPS)] {
            for (limit, [average, max, length]) in limits.iter().zip(names) {
                if limit.average > 0 {
                    out.insert(average.into(), Value::from(limit.average));
                }
                if limit.max > 0 {
                    out.insert(max.into(), Value::from(limit.max));
                    out.insert(length.into(), Value::from(limit.length));
                }
            }
        }
        if self.iops_size > 0 {
            out.insert("iops-size".into(), Value::from(self.iops_size));
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(v: Value) -> Result<ThrottleLimits> {
        match v {
            Value::Object(m) => ThrottleLimits::from_map("g", m),
            _ => panic!("not a map"),
        }
    }

    #[test]
    fn limits_survive_being_told() {
        let given = json!({
            "bps-read": 1_048_576, "bps-write": 1000, "iops-total": 100, "iops-total-max": 200,
            "iops-total-max-length": 10, "iops-size": 4096,
        });
        let limits = read(given.clone()).unwrap();
        assert_eq!(Value::Object(limits.to_map()), given);
        assert_eq!(
            read(json!({"bps-total": "1M"})).unwrap().bps[0].average,
            1 << 20
        );
    }

    #[test]
    fn what_makes_no_sense_is_refused_by_name() {
        for (options, parts) in [
            (
                json!({"bps-total": 1, "bps-read": 1}),
                ["bps-total", "bps-read"],
            ),
            (
                json!({"iops-total": 10, "iops-total-max": 5}),
                ["iops-total-max", "less than"],
            ),
            (
                json!({"iops-read-max": 5}),
                ["iops-read-max", "without 'iops-read'"],
            ),
            (
                json!({"iops-read": 5, "iops-read-max-length": 5}),
                ["iops-read-max-length", "without"],
            ),
            (
                json!({"bps-total": 1, "iops-size": 5}),
                ["'g'", "iops-size"],
            ),
            (json!({"bps": 1}), ["'bps'", "bps-total"]),
            (json!({"bps-total": "many"}), ["bps-total", "many"]),
        ] {
            let e = read(options.clone()).unwrap_err();
            for part in parts {
                assert!(e.message.contains(part), "{options} gave: {e}");
            }
        }
    }
}
