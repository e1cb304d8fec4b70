//! What vdiskd is to serve as one disk of a domain.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use vdisk_api::file_driver;
use zbus::Variant;

use crate::{Result, error};

/// Names of the settings of a disk with the values that they take, as metadata and command line have them; all but file and
/// format can be left out.
pub const SETTINGS: [(&str, &str); 11] = [
    ("file", "the path of the image or block device"),
    ("format", "qcow2, raw or luks"),
    ("readonly", "yes or no"),
    ("serial", "at most 20 bytes"),
    (
        "cache",
        "none, writeback, writethrough, directsync or unsafe",
    ),
    ("discard", "unmap or ignore"),
    ("detect-zeroes", "off, on or unmap"),
    ("queues", "1 to 64"),
    (
        "iothread",
        "the name of an I/O thread of the daemon, which is made if it is not there",
    ),
    (
        "secret",
        "the name of a secret of the daemon, for an encrypted image",
    ),
    ("group", "a throttle group of several disks"),
];

/// libvirt's names of limits, and the daemon's.
const LIMITS: [(&str, &str); 19] = [
    ("total_bytes_sec", "bps-total"),
    ("read_bytes_sec", "bps-read"),
    ("write_bytes_sec", "bps-write"),
    ("total_iops_sec", "iops-total"),
    ("read_iops_sec", "iops-read"),
    ("write_iops_sec", "iops-write"),
    ("total_bytes_sec_max", "bps-total-max"),
    ("read_bytes_sec_max", "bps-read-max"),
    ("write_bytes_sec_max", "bps-write-max"),
    ("total_iops_sec_max", "iops-total-max"),
    ("read_iops_sec_max", "iops-read-max"),
    ("write_iops_sec_max", "iops-write-max"),
    ("total_bytes_sec_max_length", "bps-total-max-length"),
    ("read_bytes_sec_max_length", "bps-read-max-length"),
    ("write_bytes_sec_max_length", "bps-write-max-length"),
    ("total_iops_sec_max_length", "iops-total-max-length"),
    ("read_iops_sec_max_length", "iops-read-max-length"),
    ("write_iops_sec_max_length", "iops-write-max-length"),
    ("size_iops_sec", "iops-size"),
];

/// One of the images that a disk's stands on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backing {
    pub file: String,
    /// As a disk has it.
    pub format: String,
    /// The name of a secret of the daemon, if the image is encrypted.
    pub secret: Option<String>,
}

/// Options of an image that is encrypted, if there is a secret: of its node, and of a new one.
pub fn encryption(format: &str, secret: Option<&str>) -> Vec<(&'static str, Variant<'static>)> {
    let text = |value: &str| Variant::from(value.to_owned());
    match (secret, format) {
        (None, _) => Vec::new(),
        (Some(secret), "qcow2") => vec![
            ("encrypt.format", text("luks")),
            ("encrypt.key-secret", text(secret)),
        ],
        (Some(secret), _) => vec![("key-secret", text(secret))],
    }
}

/// What a disk was before vdiskd served it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Original {
    /// The `<disk>` element.
    pub xml: String,
    /// User and group of the image, by number.
    pub owner: Option<(u32, u32)>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Disk {
    /// As libvirt calls it: vda.
    pub target: String,
    /// Settings by name, see [`SETTINGS`].
    pub(crate) settings: BTreeMap<String, String>,
    /// Limits by libvirt's names.
    pub iotune: BTreeMap<String, u64>,
    /// The images that the file stands on, from the top down. What an image itself says is below it is not followed: a guest may have
    /// written that.
    pub backing: Vec<Backing>,
    pub original: Option<Original>,
}

impl Disk {
    pub fn new(target: &str, file: &str, format: &str) -> Result<Disk> {
        let mut disk = Disk {
            target: target.to_owned(),
            ..Disk::default()
        };
        disk.set("file", file)?;
        disk.set("format", format)?;
        Ok(disk)
    }

    /// Sets one of [`SETTINGS`].
    ///
    /// # Errors
    /// Names a setting that is none, or a value that it cannot have.
    pub fn set(&mut self, name: &str, value: &str) -> Result<()> {
        let target = &self.target;
        let Some((_, values)) = SETTINGS.iter().find(|(n, _)| *n == name) else {
            let names: Vec<&str> = SETTINGS.iter().map(|(n, _)| *n).collect();
            return error(format!(
                "disk '{target}': there is no setting '{name}': there are {}",
                names.join(", ")
            ));
        };
        let ok = match name {
            "file" => Path::new(value).is_absolute(),
            "format" => matches!(value, "qcow2" | "raw" | "luks"),
            "readonly" => matches!(value, "yes" | "no"),
            "serial" => (1..=20).contains(&value.len()),
            "cache" => matches!(
                value,
                "none" | "writeback" | "writethrough" | "directsync" | "unsafe" | "default"
            ),
            "discard" => matches!(value, "unmap" | "ignore"),
            "detect-zeroes" => matches!(value, "off" | "on" | "unmap"),
            "queues" => value.parse().is_ok_and(|n: u16| (1..=64).contains(&n)),
            _ => !value.is_empty(),
        };
        if !ok {
            return error(format!(
                "disk '{target}': {name} is '{value}': give {values}"
            ));
        }
        self.settings.insert(name.to_owned(), value.to_owned());
        Ok(())
    }

    pub fn get(&self, name: &str) -> Option<&str> {
        self.settings.get(name).map(String::as_str)
    }

    pub fn settings(&self) -> impl Iterator<Item = (&str, &str)> {
        self.settings.iter().map(|(n, v)| (n.as_str(), v.as_str()))
    }

    /// # Errors
    /// Names a limit that libvirt does not have.
    pub fn set_limit(&mut self, name: &str, value: u64) -> Result<()> {
        if LIMITS.iter().all(|(n, _)| *n != name) {
            return error(format!(
                "disk '{}': iotune has no '{name}': there are total_, read_ and write_bytes_sec and _iops_sec, with _max and _max_length, and size_iops_sec",
                self.target
            ));
        }
        match value {
            0 => self.iotune.remove(name),
            value => self.iotune.insert(name.to_owned(), value),
        };
        Ok(())
    }

    pub fn file(&self) -> &str {
        self.get("file").unwrap_or_default()
    }

    pub fn format(&self) -> &str {
        self.get("format").unwrap_or_default()
    }

    /// Whether a file is one of its images.
    pub fn has(&self, file: &str) -> bool {
        self.file() == file || self.below(file).is_some()
    }

    /// The secret of one of its images.
    pub fn secret_of(&self, file: &str) -> Option<&str> {
        if self.file() == file {
            return self.get("secret");
        }
        self.below(file)?.secret.as_deref()
    }

    /// The secrets of its images that are encrypted, from the top down.
    pub fn secrets(&self) -> impl Iterator<Item = &str> {
        let below = self.backing.iter().filter_map(|b| b.secret.as_deref());
        self.get("secret").into_iter().chain(below)
    }

    fn below(&self, file: &str) -> Option<&Backing> {
        self.backing.iter().find(|b| b.file == file)
    }

    /// Has it be other images: files with their formats, each standing on the next. Those that it had have the secrets that they had;
    /// `new` is that of others.
    ///
    /// # Errors
    /// If a file or a format is none.
    pub fn set_chain(&mut self, chain: &[(String, String)], new: Option<&str>) -> Result<()> {
        let secret = |file: &str| match self.has(file) {
            true => self.secret_of(file).map(str::to_owned),
            false => new.map(str::to_owned),
        };
        let backing = |(file, format): &(String, String)| Backing {
            file: file.clone(),
            format: format.clone(),
            secret: secret(file),
        };
        let images = chain.iter().map(backing).collect();
        self.set_images(images)
    }

    /// Has it be other images, each standing on the next.
    ///
    /// # Errors
    /// If a file or a format is none.
    pub fn set_images(&mut self, images: Vec<Backing>) -> Result<()> {
        let mut images = images.into_iter();
        let Some(top) = images.next() else {
            return Ok(());
        };
        self.backing = images.collect();
        self.set("file", &top.file)?;
        self.set("format", &top.format)?;
        match top.secret {
            Some(secret) => self.set("secret", &secret),
            None => {
                self.settings.remove("secret");
                Ok(())
            }
        }
    }

    pub fn is_read_only(&self) -> bool {
        self.get("readonly") == Some("yes")
    }

    /// What has to be there.
    pub(crate) fn check(self) -> Result<Disk> {
        for name in ["file", "format"] {
            if self.get(name).is_none() {
                return error(format!("disk '{}': {name} is missing", self.target));
            }
        }
        Ok(self)
    }

    /// Options of the image's node.
    pub fn node_options(&self, name: &str) -> Vec<(String, Variant<'static>)> {
        let text = |value: &str| Variant::from(value.to_owned());
        let mut options = vec![
            ("node-name".to_owned(), text(name)),
            ("driver".to_owned(), text(self.format())),
            ("file.driver".to_owned(), text(file_driver(self.file()))),
            ("file.filename".to_owned(), text(self.file())),
            ("read-only".to_owned(), Variant::from(self.is_read_only())),
        ];
        let more = self.more_node_options().into_iter();
        options.extend(more.map(|(key, value)| (key.to_owned(), value)));
        let direct = matches!(self.get("cache"), Some("none" | "directsync"));
        let mut at = String::new();
        for (n, below) in self.backing.iter().enumerate() {
            let (file, format) = (&below.file, &below.format);
            at.push_str("backing.");
            options.extend([
                (
                    format!("{at}node-name"),
                    text(&format!("{name}.b{}", n + 1)),
                ),
                (format!("{at}driver"), text(format)),
                (format!("{at}file.driver"), text(file_driver(file))),
                (format!("{at}file.filename"), text(file)),
            ]);
            if direct {
                options.push((format!("{at}file.cache.direct"), true.into()));
            }
            let key = encryption(format, below.secret.as_deref());
            options.extend(key.into_iter().map(|(key, v)| (format!("{at}{key}"), v)));
        }
        let key = encryption(self.format(), self.get("secret")).into_iter();
        options.extend(key.map(|(key, value)| (key.to_owned(), value)));
        options
    }

    /// Those that an overlay of the node gets, too.
    pub fn more_node_options(&self) -> Vec<(&'static str, Variant<'static>)> {
        let mut options = Vec::new();
        match self.get("cache") {
            Some("none" | "directsync") => options.push(("file.cache.direct", true.into())),
            Some("unsafe") => options.push(("file.cache.no-flush", true.into())),
            _ => {}
        }
        for (setting, option) in [("discard", "discard"), ("detect-zeroes", "detect-zeroes")] {
            if let Some(value) = self.get(setting) {
                options.push((option, Variant::from(value.to_owned())));
            }
        }
        options
    }

    /// Options of the export, but for its id, its node and its socket.
    pub(crate) fn export_options(&self) -> Vec<(&'static str, Variant<'static>)> {
        let mut options = vec![("writable", Variant::from(!self.is_read_only()))];
        if matches!(self.get("cache"), Some("writethrough" | "directsync")) {
            options.push(("writethrough", true.into()));
        }
        if let Some(serial) = self.get("serial") {
            options.push(("serial", serial.to_owned().into()));
        }
        if let Some(queues) = self.get("queues").and_then(|q| q.parse::<u16>().ok()) {
            options.push(("num-queues", queues.into()));
        }
        if let Some(thread) = self.get("iothread") {
            options.push(("iothread", thread.to_owned().into()));
        }
        options
    }

    /// Limits as the daemon's throttle groups have them.
    pub fn limits(&self) -> Vec<(&'static str, Variant<'static>)> {
        let limit = |(theirs, ours): &(&str, &'static str)| {
            let value = self.iotune.get(*theirs)?;
            Some((*ours, Variant::from(*value)))
        };
        LIMITS.iter().filter_map(limit).collect()
    }
}

/// The socket of a domain's disk, in the runtime folder of the daemon.
pub(crate) fn socket_path(uuid: &str, instance: Option<&str>, target: &str) -> PathBuf {
    let folder = match instance {
        Some(instance) => format!("/run/vdiskd-{instance}"),
        None => "/run/vdiskd".to_owned(),
    };
    Path::new(&folder).join(format!("{uuid}-{target}.sock"))
}

/// What a domain's disk is called in the daemon.
pub fn object_name(domain: &str, uuid: &str, target: &str) -> String {
    let ok = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_');
    let is_plain = domain.starts_with(|c: char| c.is_ascii_alphabetic())
        && domain.len() <= 80
        && domain.chars().all(ok);
    if is_plain {
        return format!("{domain}-{target}");
    }
    let plain: String = domain
        .chars()
        .take(60)
        .map(|c| if ok(c) { c } else { '_' })
        .collect();
    let short = uuid.get(..8).unwrap_or(uuid);
    format!("d{plain}-{short}-{target}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_checked_by_name() {
        let mut disk = Disk::new("vda", "/a.qcow2", "qcow2").unwrap();
        for (name, value) in [
            ("queues", "0"),
            ("queues", "65"),
            ("cache", "some"),
            ("serial", "123456789012345678901"),
            ("file", "a.qcow2"),
            ("format", "vmdk"),
            ("readonly", "true"),
            ("speed", "1"),
        ] {
            let e = disk.set(name, value).unwrap_err().to_string();
            assert!(e.contains("vda") && e.contains(name), "{e}");
        }
        assert!(disk.set_limit("iops", 1).is_err());
        disk.set_limit("read_iops_sec", 5).unwrap();
        assert_eq!(disk.limits(), [("iops-read", Variant::from(5u64))]);
        disk.set_limit("read_iops_sec", 0).unwrap();
        assert!(disk.limits().is_empty());
    }

    #[test]
    fn images_keep_their_secrets() {
        let image = |file: &str| (file.to_owned(), "qcow2".to_owned());
        let mut disk = Disk::new("vda", "/1", "qcow2").unwrap();
        disk.set("secret", "s").unwrap();
        disk.set_chain(&["/2", "/1", "/0"].map(image), Some("t"))
            .unwrap();
        let secrets =
            |d: &Disk| ["/2", "/1", "/0", "/x"].map(|f| d.secret_of(f).map(str::to_owned));
        let (s, t) = (Some("s".to_owned()), Some("t".to_owned()));
        assert_eq!(secrets(&disk), [t.clone(), s.clone(), t.clone(), None]);
        let options = disk.node_options("n");
        let of = |key: &str| {
            options
                .iter()
                .find(|(k, _)| k == key)
                .map(|(_, v)| v.clone())
        };
        assert_eq!(of("encrypt.key-secret"), Some("t".into()));
        assert_eq!(of("backing.encrypt.key-secret"), Some("s".into()));
        // What was below is the disk, and has its own.
        disk.set_chain(&[image("/1")], None).unwrap();
        assert_eq!((disk.get("secret"), disk.backing.len()), (Some("s"), 0));
        disk.set_chain(&[image("/plain"), image("/1")], None)
            .unwrap();
        assert_eq!(
            (disk.get("secret"), disk.secret_of("/1")),
            (None, Some("s"))
        );
    }

    #[test]
    fn names_are_names_of_the_daemon() {
        assert_eq!(object_name("debian-12.1", "0f", "vda"), "debian-12.1-vda");
        let uuid = "c7a5fdbd-edaf-9455-926a-d65c16db1809";
        assert_eq!(object_name("a b/ü", uuid, "vda"), "da_b__-c7a5fdbd-vda");
        assert_eq!(object_name("12", uuid, "vda"), "d12-c7a5fdbd-vda");
        assert!(object_name(&"x".repeat(255), uuid, "vda").len() < 127);
    }
}
