//! Reading options out of a map, so that every mistake is named.

use crate::error::{Error, Result};
use crate::size::parse_size;

pub type Value = serde_json::Value;
pub type Map = serde_json::Map<String, Value>;

/// Turns dotted keys into nested maps: `{"file.filename": x}` into `{"file": {"filename": x}}`.
pub fn expand_dotted(map: Map) -> Result<Map> {
    let mut out = Map::new();
    for (key, value) in map {
        insert_dotted(&mut out, &key, &key, value)?;
    }
    Ok(out)
}

fn insert_dotted(map: &mut Map, whole: &str, key: &str, value: Value) -> Result<()> {
    let value = match value {
        Value::Object(inner) => Value::Object(expand_dotted(inner)?),
        other => other,
    };
    if let Some((head, rest)) = key.split_once('.') {
        let inner = map.entry(head).or_insert_with(|| Value::Object(Map::new()));
        return match inner {
            Value::Object(inner) => insert_dotted(inner, whole, rest, value),
            _ => Err(Error::invalid(format!(
                "option '{whole}' contradicts option '{head}', which is given as a plain value: give one of them"
            ))),
        };
    }
    match (map.get_mut(key), value) {
        (None, value) => {
            map.insert(key.to_owned(), value);
            Ok(())
        }
        (Some(Value::Object(old)), Value::Object(new)) => {
            for (k, v) in new {
                insert_dotted(old, whole, &k, v)?;
            }
            Ok(())
        }
        _ => Err(Error::invalid(format!(
            "option '{whole}' is given twice: give it once"
        ))),
    }
}

/// The options of one object while they are being read. Each is taken by name; what is left in the end
/// is unknown and refused.
pub(crate) struct Fields {
    /// What the options belong to, for messages: `node 'disk0'`.
    what: String,
    map: Map,
    known: Vec<&'static str>,
}

fn type_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "a dictionary",
    }
}

impl Fields {
    pub fn new(what: impl Into<String>, map: Map) -> Fields {
        Fields {
            what: what.into(),
            map,
            known: Vec::new(),
        }
    }

    pub fn what(&self) -> &str {
        &self.what
    }

    pub fn set_what(&mut self, what: impl Into<String>) {
        self.what = what.into();
    }

    fn take(&mut self, key: &'static str) -> Option<Value> {
        self.known.push(key);
        self.map.remove(key)
    }

    pub fn error(&self, key: &str, problem: impl std::fmt::Display) -> Error {
        Error::invalid(format!("{}: option '{key}' {problem}", self.what))
    }

    fn wrong_type(&self, key: &str, value: &Value, wanted: &str) -> Error {
        self.error(
            key,
            format_args!("is {} ({value}): give {wanted}", type_of(value)),
        )
    }

    /// Looks at an option without taking it.
    pub fn peek(&self, key: &str) -> Option<&Value> {
        self.map.get(key)
    }

    pub fn value(&mut self, key: &'static str) -> Option<Value> {
        self.take(key)
    }

    pub fn string(&mut self, key: &'static str) -> Result<Option<String>> {
        match self.take(key) {
            None => Ok(None),
            Some(Value::String(s)) => Ok(Some(s)),
            Some(v) => Err(self.wrong_type(key, &v, "a string")),
        }
    }

    pub fn required_string(&mut self, key: &'static str) -> Result<String> {
        match self.string(key)? {
            Some(s) if !s.is_empty() => Ok(s),
            Some(_) => Err(self.error(key, "is empty: give a value")),
            None => Err(self.error(key, "is missing: give it")),
        }
    }

    /// A boolean, or `on`/`off` as on QEMU's command line.
    pub fn boolean(&mut self, key: &'static str) -> Result<Option<bool>> {
        match self.take(key) {
            None => Ok(None),
            Some(Value::Bool(b)) => Ok(Some(b)),
            Some(Value::String(s)) if matches!(s.as_str(), "on" | "true" | "yes") => Ok(Some(true)),
            Some(Value::String(s)) if matches!(s.as_str(), "off" | "false" | "no") => {
                Ok(Some(false))
            }
            Some(v) => Err(self.wrong_type(key, &v, "true or false (or 'on' or 'off')")),
        }
    }

    /// A number of bytes, or a string with a unit: `10G`.
    pub fn size(&mut self, key: &'static str) -> Result<Option<u64>> {
        match self.take(key) {
            None => Ok(None),
            Some(Value::String(s)) => match parse_size(&s) {
                Some(n) => Ok(Some(n)),
                None => Err(self.error(
                    key,
                    format_args!("is '{s}': give bytes, or a number with k, M, G or T"),
                )),
            },
            Some(v) => match v.as_u64() {
                Some(n) => Ok(Some(n)),
                None => Err(self.wrong_type(key, &v, "a size of zero or more bytes")),
            },
        }
    }

    /// A whole number within a range; a string of digits is one, too.
    pub fn integer(
        &mut self,
        key: &'static str,
        range: std::ops::RangeInclusive<u64>,
    ) -> Result<Option<u64>> {
        let Some(v) = self.take(key) else {
            return Ok(None);
        };
        let n = match &v {
            Value::String(s) => s.parse().ok(),
            v => v.as_u64(),
        };
        match n {
            Some(n) if range.contains(&n) => Ok(Some(n)),
            Some(n) => Err(self.error(
                key,
                format_args!("is {n}: give {} to {}", range.start(), range.end()),
            )),
            None => Err(self.wrong_type(
                key,
                &v,
                &format!("a whole number from {} to {}", range.start(), range.end()),
            )),
        }
    }

    /// One of some words.
    pub fn choice<T: Copy>(&mut self, key: &'static str, words: &[(&str, T)]) -> Result<Option<T>> {
        let Some(given) = self.string(key)? else {
            return Ok(None);
        };
        match words.iter().find(|(word, _)| *word == given) {
            Some((_, value)) => Ok(Some(*value)),
            None => {
                let names: Vec<&str> = words.iter().map(|(word, _)| *word).collect();
                Err(self.error(
                    key,
                    format_args!("is '{given}': give one of {}", names.join(", ")),
                ))
            }
        }
    }

    pub fn object(&mut self, key: &'static str) -> Result<Option<Map>> {
        match self.take(key) {
            None => Ok(None),
            Some(Value::Object(m)) => Ok(Some(m)),
            Some(v) => Err(self.wrong_type(key, &v, "a dictionary")),
        }
    }

    /// Ends the reading: an option that nobody took is unknown.
    pub fn finish(self) -> Result<()> {
        match self.map.keys().next() {
            None => Ok(()),
            Some(key) => Err(Error::invalid(format!(
                "{}: unknown option '{key}': it takes {}",
                self.what,
                self.known.join(", ")
            ))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn map(v: Value) -> Map {
        match v {
            Value::Object(m) => m,
            _ => panic!("not a map"),
        }
    }

    #[test]
    fn dotted_keys_become_nested() {
        let m = map(json!({"a.b.c": 1, "a.b.d": 2, "e": {"f.g": 3}}));
        assert_eq!(
            Value::Object(expand_dotted(m).unwrap()),
            json!({"a": {"b": {"c": 1, "d": 2}}, "e": {"f": {"g": 3}}})
        );
        for bad in [json!({"a": 1, "a.b": 2}), json!({"a.b": 1, "a": {"b": 2}})] {
            let e = expand_dotted(map(bad)).unwrap_err();
            assert!(e.message.contains("'a"), "{e}");
        }
    }

    #[test]
    fn mistakes_are_named() {
        let mut f = Fields::new("node 'x'", map(json!({"n": -1, "s": 3, "left": 0})));
        let e = f.integer("n", 0..=9).unwrap_err();
        assert!(
            e.message.contains("node 'x'") && e.message.contains("-1"),
            "{e}"
        );
        assert!(f.string("s").unwrap_err().message.contains("'s'"));
        let e = f.finish().unwrap_err();
        assert!(
            e.message.contains("'left'") && e.message.contains("n, s"),
            "{e}"
        );
    }
}
