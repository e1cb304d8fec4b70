//! `/etc/vdiskd/vdiskd.toml` and the files beside it in `vdiskd.toml.d`: what the command line does not say.

use std::path::{Path, PathBuf};

use serde::Deserialize;

/// Where it is unless another file is named.
pub const PATH: &str = "/etc/vdiskd/vdiskd.toml";

/// The folder of those of instances, which have the last word there.
const INSTANCES: &str = "/etc/vdiskd/instances";

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Config {
    #[serde(default)]
    pub io: Io,
    #[serde(default)]
    pub service: Service,
    #[serde(default)]
    pub images: Images,
    #[serde(default)]
    pub sockets: Sockets,
    #[serde(default)]
    pub limits: Limits,
    #[serde(default)]
    pub access: Access,
    #[serde(default)]
    pub metrics: Metrics,
}

/// `[io]`
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Io {
    /// uring, aio, threads or auto.
    pub engine: Option<String>,
    /// I/O threads to start with, 1 to 64.
    pub threads: Option<u8>,
    /// Ceiling of busy polling in nanoseconds.
    pub poll_max_ns: Option<u64>,
}

/// `[service]`
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Service {
    /// Seconds without anything to do after which the daemon ends; 0 for never.
    pub idle_exit: Option<u32>,
}

/// `[images]`
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Images {
    /// Folders in which images may be; everywhere if not given.
    pub directories: Option<Vec<PathBuf>>,
    /// Folders into which names of backing and data files inside images are followed; nowhere if not given.
    pub follow: Option<Vec<PathBuf>>,
}

/// `[sockets]`
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Sockets {
    /// Where sockets are whose path is not absolute.
    pub directory: Option<PathBuf>,
    /// Permissions of sockets, octal digits in a string.
    pub mode: Option<String>,
    pub group: Option<String>,
}

/// `[metrics]`
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Metrics {
    /// A unix socket for OpenMetrics over HTTP.
    pub socket: Option<PathBuf>,
}

/// `[access]`
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Access {
    /// Who may do everything, without polkit.
    #[serde(default)]
    pub users: Vec<String>,
    #[serde(default)]
    pub groups: Vec<String>,
}

/// `[limits]`
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Limits {
    /// Exports at a time.
    pub exports: Option<usize>,
    /// Queues of one export.
    pub queues: Option<u16>,
    /// Memory of the daemon itself: a size like those of images.
    pub memory: Option<String>,
}

/// Puts what `over` says in the place of what is there, table by table.
fn merge(under: &mut toml::Table, over: toml::Table) {
    for (key, value) in over {
        match (under.get_mut(&key), value) {
            (Some(toml::Value::Table(under)), toml::Value::Table(over)) => merge(under, over),
            (_, value) => {
                under.insert(key, value);
            }
        }
    }
}

fn read(path: &Path) -> Result<Option<toml::Table>, String> {
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(format!("'{}': {e}", path.display())),
    };
    let named = |e: String| format!("'{}': {}", path.display(), e.trim_end());
    // By itself, too: a mistake is shown with its line.
    let config: Config = toml::from_str(&text).map_err(|e| named(e.to_string()))?;
    config.check().map_err(named)?;
    text.parse()
        .map(Some)
        .map_err(|e: toml::de::Error| named(e.to_string()))
}

impl Config {
    /// Reads the file and those beside it, in the order of their names, and that of the instance. The usual file need not be there.
    pub fn load(given: Option<&Path>, instance: Option<&str>) -> Result<Config, String> {
        let path = given.unwrap_or(Path::new(PATH));
        let mut all = toml::Table::new();
        match read(path)? {
            Some(table) => all = table,
            None if given.is_some() => return Err(format!("'{}' is not there", path.display())),
            None => {}
        }
        let mut beside: Vec<PathBuf> = std::fs::read_dir(path.with_extension("toml.d"))
            .map(|dir| dir.flatten().map(|e| e.path()).collect())
            .unwrap_or_default();
        beside.retain(|p| p.extension().is_some_and(|e| e == "toml"));
        beside.sort();
        if let (None, Some(name)) = (given, instance) {
            beside.push(Path::new(INSTANCES).join(format!("{name}.toml")));
        }
        for path in beside {
            if let Some(table) = read(&path)? {
                merge(&mut all, table);
            }
        }
        all.try_into().map_err(|e| e.to_string())
    }

    /// What the types do not say.
    fn check(&self) -> Result<(), String> {
        if let Some(engine) = &self.io.engine {
            engine
                .parse::<vdisk_io::EngineChoice>()
                .map_err(|e| format!("io.engine: {e}"))?;
        }
        if let Some(n) = self.io.threads.filter(|n| !(1..=64).contains(n)) {
            return Err(format!("io.threads is {n}: give 1 to 64"));
        }
        if let Some(ns) = self.io.poll_max_ns.filter(|ns| *ns > 1_000_000_000) {
            return Err(format!("io.poll-max-ns is {ns}: give at most 1000000000"));
        }
        if let Some(mode) = &self.sockets.mode
            && octal(mode).is_none()
        {
            return Err(format!(
                "sockets.mode is '{mode}': give octal digits from 0 to 0777"
            ));
        }
        if let Some(size) = &self.limits.memory
            && vdisk_api::parse_size(size).is_none()
        {
            return Err(format!(
                "limits.memory is '{size}': give a size, like '512M' or '2G'"
            ));
        }
        let directories = self.images.directories.iter().flatten();
        let mut named = directories
            .chain(self.images.follow.iter().flatten())
            .chain(&self.sockets.directory)
            .chain(&self.metrics.socket);
        if let Some(path) = named.find(|p| !p.is_absolute()) {
            return Err(format!(
                "'{}' is not an absolute path: give one that begins with '/'",
                path.display()
            ));
        }
        Ok(())
    }
}

/// Permissions from octal digits.
pub fn octal(mode: &str) -> Option<u32> {
    u32::from_str_radix(mode, 8).ok().filter(|m| *m <= 0o777)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(files: &[(&str, &str)]) -> Result<Config, String> {
        let dir = tempfile::tempdir().unwrap();
        let main = dir.path().join("vdiskd.toml");
        std::fs::create_dir(dir.path().join("vdiskd.toml.d")).unwrap();
        for (name, text) in files {
            std::fs::write(dir.path().join(name), text).unwrap();
        }
        Config::load(Some(&main), None)
    }

    #[test]
    fn later_files_have_the_last_word() {
        let config = load(&[
            (
                "vdiskd.toml",
                "[io]\nthreads = 2\nengine = 'aio'\n[limits]\nexports = 5",
            ),
            ("vdiskd.toml.d/20.toml", "[io]\nthreads = 4"),
            (
                "vdiskd.toml.d/10.toml",
                "[io]\nthreads = 3\n[sockets]\nmode = '0600'",
            ),
            ("vdiskd.toml.d/30.bak", "nonsense"),
        ])
        .unwrap();
        assert_eq!(config.io.threads, Some(4));
        assert_eq!(config.io.engine.as_deref(), Some("aio"));
        assert_eq!(config.limits.exports, Some(5));
        assert_eq!(config.sockets.mode.as_deref(), Some("0600"));
    }

    #[test]
    fn mistakes_are_named_with_their_file() {
        for (text, why) in [
            ("[io]\nthread = 2", "unknown field `thread`"),
            ("[io]\nthreads = 0", "1 to 64"),
            ("[io]\nthreads = 'two'", "invalid type"),
            ("[io]\nengine = 'epoll'", "unknown I/O engine"),
            ("[sockets]\nmode = '999'", "octal"),
            ("[images]\ndirectories = ['srv']", "absolute"),
            ("[limits]\nmemory = 'much'", "give a size"),
            ("[what]", "unknown field `what`"),
            ("[io", "10.toml"),
        ] {
            let e = load(&[("vdiskd.toml", ""), ("vdiskd.toml.d/10.toml", text)]).unwrap_err();
            assert!(e.contains(why) && e.contains("10.toml"), "{text}: {e}");
        }
        assert!(Config::load(Some(Path::new("/nowhere/vdiskd.toml")), None).is_err());
    }
}
