//! Tables, lists and numbers for people.

use comfy_table::{Cell, CellAlignment, Table, presets};
use serde_json::Value as Json;
use vdisk_api::format_size;

use crate::objects::{Properties, name_of};

/// A table with a header line and no borders; columns whose header starts with `>` are right-aligned.
pub struct Rows(Table, Vec<CellAlignment>);

impl Rows {
    pub fn new(header: &[&str]) -> Rows {
        let mut table = Table::new();
        table.load_style(presets::NOTHING);
        let aligned: Vec<CellAlignment> = header
            .iter()
            .map(|h| match h.starts_with('>') {
                true => CellAlignment::Right,
                false => CellAlignment::Left,
            })
            .collect();
        let cells = header
            .iter()
            .zip(&aligned)
            .map(|(h, a)| Cell::new(h.trim_start_matches('>').to_uppercase()).set_alignment(*a));
        table.set_header(cells.collect::<Vec<_>>());
        Rows(table, aligned)
    }

    pub fn add(&mut self, cells: Vec<String>) {
        let cells = cells
            .into_iter()
            .zip(&self.1)
            .map(|(c, a)| Cell::new(c).set_alignment(*a));
        self.0.add_row(cells.collect::<Vec<_>>());
    }

    pub fn lines(&self) -> impl Iterator<Item = String> {
        self.0.lines()
    }

    pub fn print(&self) {
        for line in self.lines() {
            anstream::println!("{}", line.trim_end());
        }
    }
}

pub fn text(p: &Properties, key: &str) -> String {
    match p.get(key) {
        Some(Json::String(s)) => s.clone(),
        Some(other) => other.to_string(),
        None => String::new(),
    }
}

pub fn number(p: &Properties, key: &str) -> u64 {
    p.get(key).and_then(Json::as_u64).unwrap_or(0)
}

pub fn flag(p: &Properties, key: &str) -> bool {
    p.get(key).and_then(Json::as_bool).unwrap_or(false)
}

/// Names of the objects in a property of type `o`, `ao` or `a(so)`.
pub fn names(p: &Properties, key: &str) -> Vec<String> {
    fn path(v: &Json) -> Option<&str> {
        match v {
            Json::String(s) => Some(s),
            Json::Array(pair) => pair.iter().find_map(|v| match v {
                Json::String(s) if s.starts_with('/') => Some(s.as_str()),
                _ => None,
            }),
            _ => None,
        }
    }
    match p.get(key) {
        Some(Json::Array(items)) => items.iter().filter_map(path).map(name_of).collect(),
        Some(one) => path(one).map(name_of).into_iter().collect(),
        None => Vec::new(),
    }
}

/// `key: value` lines with readable values.
pub fn print_properties(p: &Properties) {
    let width = p.keys().map(String::len).max().unwrap_or(0);
    let bold = anstyle::Style::new().bold();
    for key in p.keys() {
        let value = match (key.as_str(), &p[key]) {
            ("Size", Json::Number(n)) => {
                let n = n.as_u64().unwrap_or(0);
                format!("{} ({n} bytes)", format_size(n))
            }
            ("ProgressDone" | "ProgressTotal", Json::Number(n)) => {
                format_size(n.as_u64().unwrap_or(0))
            }
            ("Rate" | "Speed", Json::Number(n)) => match n.as_u64().unwrap_or(0) {
                0 => "-".to_owned(),
                n => format!("{}/s", format_size(n)),
            },
            ("StartTime" | "ExpectedEndTime", Json::Number(n)) => {
                format_time(n.as_u64().unwrap_or(0))
            }
            ("Progress", _) => format!("{:.1} %", p[key].as_f64().unwrap_or(0.0) * 100.0),
            ("Error", Json::Array(error)) => error
                .last()
                .map_or("", |e| e.as_str().unwrap_or(""))
                .to_owned(),
            ("PollMax", Json::Number(n)) => format_ns(n.as_u64().unwrap_or(0)),
            ("Children" | "Parents" | "Objects" | "IoThreads" | "Node" | "Queues", _) => {
                let mut list = names(p, key);
                if key == "IoThreads" {
                    list.sort();
                    list.dedup();
                }
                list.join(", ")
            }
            (_, Json::Bool(b)) => if *b { "yes" } else { "no" }.to_owned(),
            (_, Json::Array(items)) => {
                let items: Vec<String> = items.iter().map(Json::to_string).collect();
                items.join(", ")
            }
            _ => text(p, key),
        };
        let value = if value.is_empty() { "-" } else { &value };
        anstream::println!("{bold}{key:width$}{bold:#}  {value}");
    }
}

pub fn print_json(value: &impl std::fmt::Display) {
    anstream::println!("{value:#}");
}

/// Microseconds since the epoch as local time.
pub fn format_time(micros: u64) -> String {
    let at = jiff::Timestamp::from_microsecond(micros as i64);
    match (micros, at) {
        (1.., Ok(at)) => {
            let local = at.to_zoned(jiff::tz::TimeZone::system());
            local.strftime("%Y-%m-%d %H:%M:%S").to_string()
        }
        _ => "-".to_owned(),
    }
}

/// `850 ns`, `12.5 µs`, `3.1 ms`, `2 s`.
pub fn format_ns(ns: u64) -> String {
    let (value, unit) = match ns {
        0..1_000 => return format!("{ns} ns"),
        1_000..1_000_000 => (ns as f64 / 1e3, "µs"),
        1_000_000..1_000_000_000 => (ns as f64 / 1e6, "ms"),
        _ => (ns as f64 / 1e9, "s"),
    };
    let text = format!("{value:.1}");
    format!("{} {unit}", text.trim_end_matches(".0"))
}

/// `1234` as `1,234`.
pub fn format_count(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::new();
    for (i, c) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(c);
    }
    out
}

/// Says what was done while guests had to wait, and how long they had to.
pub fn print_pause(what: &str, report: Properties, json: bool) {
    if json {
        print_json(&Json::Object(report));
    } else {
        let paused = number(&report, "paused-ns") as f64 / 1e6;
        anstream::println!("{what}; guests waited for {paused:.1} ms");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_for_people() {
        assert_eq!(format_ns(850), "850 ns");
        assert_eq!(format_ns(32_000), "32 µs");
        assert_eq!(format_ns(12_540), "12.5 µs");
        assert_eq!(format_ns(2_000_000_000), "2 s");
        assert_eq!(format_count(0), "0");
        assert_eq!(format_count(1_234_567), "1,234,567");
    }
}
