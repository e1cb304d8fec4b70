//! `vdiskctl stats`: what exports and I/O threads have done.

use std::collections::HashMap;
use std::time::Duration;

use serde_json::{Map, Value as Json};
use vdisk_api::format_size;
use vdisk_dbus::ManagerProxy;

use crate::error::{Error, Result};
use crate::objects::to_json;
use crate::output::{Rows, format_count, format_ns, number, print_json};

pub async fn fetch(manager: &ManagerProxy<'_>) -> Result<Map<String, Json>> {
    let stats = manager.get_statistics(HashMap::new()).await?;
    Ok(stats.into_iter().map(|(k, v)| (k, to_json(&v))).collect())
}

/// `new - old`, number by number.
pub fn difference(new: &Json, old: &Json) -> Json {
    match (new, old) {
        (Json::Number(a), Json::Number(b)) => {
            let (a, b) = (a.as_u64().unwrap_or(0), b.as_u64().unwrap_or(0));
            Json::from(a.saturating_sub(b))
        }
        (Json::Object(a), Json::Object(b)) => a
            .iter()
            .map(|(k, v)| (k.clone(), difference(v, b.get(k).unwrap_or(&Json::Null))))
            .collect(),
        (Json::Array(a), Json::Array(b)) => a
            .iter()
            .enumerate()
            .map(|(i, v)| difference(v, b.get(i).unwrap_or(&Json::Null)))
            .collect(),
        _ => new.clone(),
    }
}

/// An upper bound of a fraction of the latencies in a histogram of powers of two.
pub fn quantile(latency: &Json, q: f64) -> String {
    let buckets: Vec<u64> = match latency.as_array() {
        Some(list) => list.iter().filter_map(Json::as_u64).collect(),
        None => Vec::new(),
    };
    let total: u64 = buckets.iter().sum();
    let mut seen = 0;
    for (i, n) in buckets.iter().enumerate() {
        seen += n;
        if total > 0 && seen as f64 >= (total as f64 * q).max(1.0) {
            return format!("<{}", format_ns(1 << i));
        }
    }
    "-".into()
}

const KINDS: [&str; 6] = ["read", "write", "flush", "discard", "write-zeroes", "other"];

fn print_tables(stats: &Map<String, Json>, export: Option<&str>, seconds: Option<u64>) {
    let per = seconds.unwrap_or(1);
    let unit = if seconds.is_some() { "/s" } else { "" };
    let (requests, bytes) = (format!(">requests{unit}"), format!(">bytes{unit}"));
    let mut rows = Rows::new(&[
        "export", "kind", &requests, &bytes, ">failed", ">p50", ">p99",
    ]);
    let mut paths = Rows::new(&[
        "export",
        ">fast",
        ">slow",
        ">kicks",
        ">interrupts",
        ">poll hits",
        ">requests/kick",
    ]);
    let empty = Map::new();
    let exports = stats.get("exports").and_then(Json::as_object);
    for (id, s) in exports.unwrap_or(&empty) {
        let Some(s) = s.as_object().filter(|_| export.is_none_or(|e| e == id)) else {
            continue;
        };
        for kind in KINDS {
            let Some(k) = s.get(kind).and_then(Json::as_object) else {
                continue;
            };
            if number(k, "requests") == 0 {
                continue;
            }
            rows.add(vec![
                id.clone(),
                kind.into(),
                format_count(number(k, "requests") / per),
                format_size(number(k, "bytes") / per),
                format_count(number(k, "failed")),
                quantile(&k["latency"], 0.5),
                quantile(&k["latency"], 0.99),
            ]);
        }
        let (all, kicks) = (number(s, "requests"), number(s, "kicks"));
        paths.add(vec![
            id.clone(),
            format_count(number(s, "fast") / per),
            format_count(number(s, "slow") / per),
            format_count(kicks / per),
            format_count(number(s, "interrupts") / per),
            format_count(number(s, "poll-hits") / per),
            match kicks {
                0 => "-".into(),
                n => format!("{:.1}", all as f64 / n as f64),
            },
        ]);
    }
    rows.print();
    anstream::println!();
    paths.print();
    anstream::println!();
    let mut threads = Rows::new(&[
        "iothread",
        ">operations",
        ">syscalls",
        ">working",
        ">polling",
        ">sleeping",
        ">poll hit rate",
    ]);
    let all = stats.get("iothreads").and_then(Json::as_object);
    for (name, s) in all.unwrap_or(&empty) {
        let Some(s) = s.as_object() else { continue };
        let (hits, misses) = (number(s, "poll-hits"), number(s, "poll-misses"));
        threads.add(vec![
            name.clone(),
            format_count(number(s, "operations") / per),
            format_count(number(s, "syscalls") / per),
            format_ns(number(s, "working-ns")),
            format_ns(number(s, "polling-ns")),
            format_ns(number(s, "sleeping-ns")),
            match hits + misses {
                0 => "-".into(),
                n => format!("{}%", hits * 100 / n),
            },
        ]);
    }
    threads.print();
}

fn check(stats: &Map<String, Json>, export: Option<&str>) -> Result<()> {
    match export {
        Some(id) if stats["exports"].get(id).is_none() => Err(Error::not_found(format!(
            "there is no export '{id}': see vdiskctl export list"
        ))),
        _ => Ok(()),
    }
}

pub async fn run(
    manager: &ManagerProxy<'_>,
    export: Option<&str>,
    watch: Option<u64>,
    as_json: bool,
) -> Result<()> {
    let mut last = fetch(manager).await?;
    check(&last, export)?;
    let Some(seconds) = watch else {
        if as_json {
            print_json(&Json::Object(last));
        } else {
            print_tables(&last, export, None);
        }
        return Ok(());
    };
    loop {
        tokio::select! {
            _ = tokio::signal::ctrl_c() => return Ok(()),
            _ = tokio::time::sleep(Duration::from_secs(seconds)) => {}
        }
        let now = fetch(manager).await?;
        let changed = match difference(&Json::Object(now.clone()), &Json::Object(last)) {
            Json::Object(map) => map,
            _ => Map::new(),
        };
        if as_json {
            // One line each time, for whoever reads it line by line.
            anstream::println!("{}", Json::Object(changed));
        } else {
            print_tables(&changed, export, Some(seconds));
            anstream::println!();
        }
        last = now;
    }
}

/// Prints what some exports have done.
pub async fn print_statistics(
    manager: &ManagerProxy<'_>,
    exports: &[String],
    as_json: bool,
) -> Result<()> {
    let mut all = fetch(manager).await?;
    if let Some(there) = all.get_mut("exports").and_then(Json::as_object_mut) {
        there.retain(|id, _| exports.contains(id));
    }
    match as_json {
        true => print_json(&all["exports"]),
        false => print_tables(&all, None, None),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn differences_and_quantiles() {
        let d = difference(
            &json!({"a": 5, "l": [1, 4], "new": 3}),
            &json!({"a": 2, "l": [1, 1]}),
        );
        assert_eq!(d, json!({"a": 3, "l": [0, 3], "new": 3}));
        assert_eq!(quantile(&json!([0, 0, 9, 1]), 0.5), "<4 ns");
        assert_eq!(quantile(&json!([0, 0, 9, 1]), 0.99), "<8 ns");
        assert_eq!(quantile(&json!([]), 0.5), "-");
    }
}
