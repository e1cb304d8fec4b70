//! Everything there is, as the ObjectManager tells it.

use std::collections::{BTreeMap, HashMap};

use serde_json::{Map, Value as Json};
use vdisk_dbus::ROOT_PATH;
use zbus::{OwnedVariant, Variant};

use crate::daemon::Daemon;
use crate::error::{Error, Result};

/// The properties of one object, of all its interfaces of ours together.
pub type Properties = Map<String, Json>;

/// All objects by path.
pub struct Objects {
    all: BTreeMap<String, Properties>,
}

/// A D-Bus value as JSON.
pub fn to_json(value: &Variant<'_>) -> Json {
    match value {
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
        Variant::ObjectPath(v) => Json::from(v.as_str()),
        Variant::Variant(v) => to_json(v),
        Variant::Array(items) => items.iter().map(to_json).collect(),
        Variant::Structure(s) => s.fields().iter().map(to_json).collect(),
        Variant::Dict(dict) => {
            let entries = dict.iter().map(|(k, v)| {
                let key = match to_json(k) {
                    Json::String(s) => s,
                    other => other.to_string(),
                };
                (key, to_json(v))
            });
            Json::Object(entries.collect())
        }
        other => Json::from(format!("{other:?}")),
    }
}

/// The last element of an object path, as the name it stands for.
pub fn name_of(path: &str) -> String {
    let element = path.rsplit('/').next().unwrap_or_default();
    vdisk_dbus::unescape(element).unwrap_or_else(|| element.to_owned())
}

impl Objects {
    pub async fn load(daemon: &Daemon) -> Result<Objects> {
        let manager = daemon.objects().await?;
        let managed = manager
            .get_managed_objects()
            .await
            .map_err(zbus::Error::from)?;
        let mut all = BTreeMap::new();
        for (path, interfaces) in managed {
            let mut properties = Properties::new();
            for (interface, values) in interfaces {
                if interface.as_str().starts_with("org.vdisk1.") {
                    for (name, value) in values {
                        properties.insert(name.to_string(), to_json(&value));
                    }
                }
            }
            // What others stand below is there, and is nothing itself.
            if !properties.is_empty() {
                all.insert(path.to_string(), properties);
            }
        }
        Ok(Objects { all })
    }

    /// Objects of one kind (`node`, `export`, `iothread`), sorted by path.
    pub fn of(&self, kind: &str) -> impl Iterator<Item = (&String, &Properties)> {
        let prefix = format!("{ROOT_PATH}/{kind}/");
        self.all
            .iter()
            .filter(move |(path, _)| path.starts_with(&prefix))
    }

    pub fn get(&self, path: &str) -> Option<&Properties> {
        self.all.get(path)
    }

    pub fn find(&self, kind: &str, name: &str) -> Result<&Properties> {
        let path = format!("{ROOT_PATH}/{kind}/{}", vdisk_dbus::escape(name));
        self.get(&path).ok_or_else(|| {
            Error::not_found(format!(
                "there is no {} '{name}': see vdiskctl {kind} list",
                if kind == "iothread" {
                    "I/O thread"
                } else {
                    kind
                }
            ))
        })
    }
}

/// What a method has found.
pub fn properties(found: HashMap<String, OwnedVariant>) -> Properties {
    found.iter().map(|(k, v)| (k.clone(), to_json(v))).collect()
}
