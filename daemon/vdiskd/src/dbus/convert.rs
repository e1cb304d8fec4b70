//! Option maps, from D-Bus types to those of the API.

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};

use vdisk_api::{Error, Map, Result, Secret, SecretSource};
use vdisk_block::Pending;
use zbus::{OwnedVariant, Variant};

use super::statistics::{Statistics, owned};
use crate::control::Handle;

pub type Options = HashMap<String, OwnedVariant>;

/// Translates options. A file descriptor is only taken under the name `socket`.
pub fn options(given: Options) -> Result<(Map, Option<OwnedFd>)> {
    let mut map = Map::new();
    let mut socket = None;
    for (key, value) in given {
        match &*value {
            Variant::Fd(fd) if key == "socket" => {
                let fd = fd
                    .as_fd()
                    .try_clone_to_owned()
                    .map_err(|e| Error::failed(format!("option 'socket': {e}")))?;
                socket = Some(fd);
            }
            other => {
                map.insert(key.clone(), plain(&key, other)?);
            }
        }
    }
    Ok((map, socket))
}

/// Translates options of nodes, whose files may be passed open: under any key that is, or ends with, `filename`. What was passed
/// stays for as long as it is returned, and as a node uses it.
pub fn node_options(given: Options, control: &Handle) -> Result<(Map, Vec<Pending>)> {
    let mut passed = Vec::new();
    let mut named = Options::new();
    for (key, value) in given {
        let value = name_files(&key, &value, control, &mut passed)?;
        named.insert(key, value);
    }
    Ok((plain_options(named)?, passed))
}

/// The value with names for what was passed open.
fn name_files(
    key: &str,
    value: &Variant<'_>,
    control: &Handle,
    passed: &mut Vec<Pending>,
) -> Result<OwnedVariant> {
    let copied = |value: &Variant<'_>| {
        let copy = value.try_to_owned();
        copy.map_err(|e| Error::failed(format!("option '{key}': {e}")))
    };
    match value {
        Variant::Fd(fd) if key.rsplit('.').next() == Some("filename") => {
            let fd = fd.as_fd().try_clone_to_owned();
            let fd = fd.map_err(|e| Error::failed(format!("option '{key}': {e}")))?;
            let pending = control.pass(fd)?;
            let name = owned(Variant::from(pending.name()));
            passed.push(pending);
            Ok(name)
        }
        Variant::Variant(inner) => name_files(key, inner, control, passed),
        Variant::Dict(entries) => {
            let mut named = HashMap::new();
            for (key, entry) in entries.iter() {
                let Variant::Str(key) = key else {
                    return copied(value);
                };
                let entry = name_files(key, entry, control, passed)?;
                named.insert(key.to_string(), entry);
            }
            Ok(owned(Variant::from(named)))
        }
        other => copied(other),
    }
}

/// Translates options where no file descriptor has a meaning.
pub fn plain_options(given: Options) -> Result<Map> {
    let (map, socket) = options(given)?;
    match socket {
        None => Ok(map),
        Some(_) => Err(Error::invalid(
            "option 'socket' has no meaning here: leave it out",
        )),
    }
}

/// Where a secret comes from. Its bytes take no way but this.
pub fn secret_sources(given: Options) -> Result<Vec<SecretSource>> {
    let byte = |v: &Variant<'_>| match v {
        Variant::U8(b) => Some(*b),
        _ => None,
    };
    let mut out = Vec::new();
    for (key, value) in given {
        let source = match (key.as_str(), &*value) {
            ("data", Variant::Str(s)) => {
                Some(SecretSource::Data(Secret::new(s.as_bytes().to_vec())))
            }
            ("data", Variant::Array(items)) => {
                let bytes: Option<Vec<u8>> = items.iter().map(byte).collect();
                bytes.map(|b| SecretSource::Data(Secret::new(b)))
            }
            ("file", Variant::Str(s)) => Some(SecretSource::File(s.to_string())),
            ("fd", Variant::Fd(fd)) => {
                let fd = fd
                    .as_fd()
                    .try_clone_to_owned()
                    .map_err(|e| Error::failed(format!("option 'fd': {e}")))?;
                Some(SecretSource::Fd(fd))
            }
            _ => None,
        };
        out.push(source.ok_or_else(|| {
            Error::invalid(format!(
                "option '{key}' is unknown or has the wrong type: there are 'data' (s or ay), 'file' (s) and 'fd' (h)"
            ))
        })?);
    }
    Ok(out)
}

/// For methods that have no options yet.
pub fn no_options(given: Options) -> Result<()> {
    match given.keys().next() {
        None => Ok(()),
        Some(key) => Err(Error::invalid(format!(
            "unknown option '{key}': this method takes none"
        ))),
    }
}

fn plain(key: &str, value: &Variant<'_>) -> Result<serde_json::Value> {
    use serde_json::Value as Json;
    Ok(match value {
        Variant::Bool(v) => Json::from(*v),
        Variant::U8(v) => Json::from(*v),
        Variant::U16(v) => Json::from(*v),
        Variant::U32(v) => Json::from(*v),
        Variant::U64(v) => Json::from(*v),
        Variant::I16(v) => Json::from(*v),
        Variant::I32(v) => Json::from(*v),
        Variant::I64(v) => Json::from(*v),
        Variant::F64(v) => Json::from(*v),
        Variant::Str(v) => Json::from(v.as_str()),
        Variant::Variant(v) => plain(key, v)?,
        Variant::Array(items) => {
            let items: Result<Vec<Json>> = items.iter().map(|v| plain(key, v)).collect();
            Json::from(items?)
        }
        Variant::Dict(dict) => {
            let mut map = Map::new();
            for (k, v) in dict.iter() {
                let Variant::Str(k) = k else {
                    return Err(Error::invalid(format!(
                        "option '{key}' has keys that are not strings"
                    )));
                };
                map.insert(k.to_string(), plain(k, v)?);
            }
            Json::Object(map)
        }
        other => {
            return Err(Error::invalid(format!(
                "option '{key}' has the D-Bus type '{}', which no option takes",
                other.value_signature()
            )));
        }
    })
}

/// JSON as D-Bus values. Numbers are 64-bit; a list of maps is `aa{sv}`, a list of anything else `as`.
fn value(json: &serde_json::Value) -> OwnedVariant {
    use serde_json::Value as Json;
    match json {
        Json::Null => owned(Variant::from("")),
        Json::Bool(v) => owned(Variant::from(*v)),
        Json::Number(n) => match n.as_u64() {
            Some(v) => owned(Variant::from(v)),
            None => owned(Variant::from(n.as_f64().unwrap_or(0.0))),
        },
        Json::String(v) => owned(Variant::from(v.as_str())),
        Json::Array(items) => {
            let maps: Vec<Statistics> = items
                .iter()
                .filter_map(Json::as_object)
                .map(dictionary)
                .collect();
            if maps.len() == items.len() && !items.is_empty() {
                return owned(Variant::from(maps));
            }
            let words = items.iter().map(|v| match v {
                Json::String(s) => s.clone(),
                other => other.to_string(),
            });
            owned(Variant::from(words.collect::<Vec<String>>()))
        }
        Json::Object(map) => owned(Variant::from(dictionary(map))),
    }
}

/// A JSON object as `a{sv}`.
pub fn dictionary(map: &Map) -> Statistics {
    map.iter().map(|(k, v)| (k.clone(), value(v))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn given(pairs: Vec<(&str, Variant<'_>)>) -> Options {
        pairs
            .into_iter()
            .map(|(k, v)| (k.to_owned(), v.try_to_owned().unwrap()))
            .collect()
    }

    #[test]
    fn all_plain_types_are_taken() {
        let inner = HashMap::from([("direct", Variant::from(true))]);
        let map = plain_options(given(vec![
            ("s", "x".into()),
            ("u", 7u64.into()),
            ("i", (-7i32).into()),
            ("cache", Variant::from(inner)),
            ("list", vec!["a", "b"].into()),
        ]))
        .unwrap();
        assert_eq!(
            serde_json::Value::Object(map),
            json!({"s": "x", "u": 7, "i": -7, "cache": {"direct": true}, "list": ["a", "b"]})
        );
    }

    #[test]
    fn odd_types_are_refused_by_name() {
        let e = plain_options(given(vec![("odd", Variant::from((1u8, 2u8)))])).unwrap_err();
        assert!(e.message.contains("'odd'"), "{e}");
        let e = no_options(given(vec![("x", 1u8.into())])).unwrap_err();
        assert!(e.message.contains("'x'"), "{e}");
    }
}
