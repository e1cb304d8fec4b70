//! Block jobs (QAPI `DriveMirror`, `BlockdevBackup` and their like).

use crate::error::{Error, Result};
use crate::fields::{Fields, Map, expand_dotted};
use crate::image::{CreateImage, ImageFile, RepairWhat, check_from_map};
use crate::node::check_name;

/// What is copied.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum JobSync {
    #[default]
    Full,
    /// What the node has itself, without its backing file.
    Top,
    /// What is written while the job runs (mirror), or overwritten (backup).
    None,
    /// What a bitmap says.
    Bitmap,
}

/// What a bitmap has when its job has ended (QAPI `BitmapSyncMode`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BitmapMode {
    /// What was written since the job began, if it succeeded; nothing is taken out otherwise.
    #[default]
    OnSuccess,
    /// Nothing is taken out.
    Never,
    /// What was written since, and what was not copied.
    Always,
}

/// The bitmap that a job goes by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JobBitmap {
    pub name: String,
    pub mode: BitmapMode,
}

/// When a mirror's target gets what guests write (QAPI `MirrorCopyMode`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CopyMode {
    /// Later.
    #[default]
    Background,
    /// Before the write is answered.
    WriteBlocking,
}

/// What is done about an error (QAPI `BlockdevOnError`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ErrorPolicy {
    #[default]
    Report,
    Ignore,
    Enospc,
    Stop,
}

/// What happens when a guest overwrites what a backup cannot copy (QAPI `OnCbwError`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CopyErrorPolicy {
    #[default]
    BreakSnapshot,
    BreakGuestWrite,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum JobKind {
    Mirror {
        sync: JobSync,
        /// With [`JobSync::Bitmap`].
        bitmap: Option<JobBitmap>,
        copy_mode: CopyMode,
        /// Bytes of a piece that is copied whole.
        granularity: Option<u64>,
    },
    Backup {
        sync: JobSync,
        /// With [`JobSync::Bitmap`].
        bitmap: Option<JobBitmap>,
        compress: bool,
        on_copy_error: CopyErrorPolicy,
    },
    /// A copy of a node that nobody writes to.
    Convert { compress: bool },
    /// What images have goes into one that they stand on.
    Commit {
        /// The node below; the node's backing file if not given.
        base: Option<String>,
        /// What overlays of the node are to call the base.
        backing_file: Option<String>,
    },
    /// What an image reads from its backing file goes into the image.
    Stream {
        /// The node below that stays its backing file.
        base: Option<String>,
        /// What the image is to call the base.
        backing_file: Option<String>,
    },
    /// Space that has nothing but zeroes is given back.
    Discard,
    /// The image of a node is checked, and repaired if that is said; guests wait meanwhile.
    Check { repair: RepairWhat },
    /// The same with an image that no node uses.
    CheckFile { file: ImageFile, repair: RepairWhat },
    /// A new image.
    Create(Box<CreateImage>),
}

impl JobKind {
    /// It is about a whole image, and no copy: it cannot be paused, and takes effect at once.
    pub fn is_of_image(&self) -> bool {
        matches!(
            self,
            JobKind::Check { .. } | JobKind::CheckFile { .. } | JobKind::Create(_)
        )
    }

    /// The bitmap of its source that it takes bits out of.
    pub fn bitmap(&self) -> Option<&JobBitmap> {
        match self {
            JobKind::Mirror { bitmap, .. } | JobKind::Backup { bitmap, .. } => bitmap.as_ref(),
            _ => None,
        }
    }

    pub fn name(&self) -> &'static str {
        match self {
            JobKind::Mirror { .. } => "mirror",
            JobKind::Backup { .. } => "backup",
            JobKind::Convert { .. } => "convert",
            JobKind::Commit { .. } => "commit",
            JobKind::Stream { .. } => "stream",
            JobKind::Discard => "discard",
            JobKind::Check { repair } | JobKind::CheckFile { repair, .. } => match repair {
                RepairWhat::Nothing => "check",
                RepairWhat::Leaks | RepairWhat::All => "repair",
            },
            JobKind::Create(_) => "create",
        }
    }
}

/// A job to start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JobOptions {
    pub id: String,
    pub kind: JobKind,
    /// The node that it is about; empty for an image in a file.
    pub node: String,
    /// The node that is written, where that is not said otherwise.
    pub target: Option<String>,
    /// Bytes per second; 0 for no limit.
    pub speed: u64,
    pub on_source_error: ErrorPolicy,
    pub on_target_error: ErrorPolicy,
    /// Whether it takes effect as soon as it can.
    pub auto_finalize: bool,
    /// Whether it goes away as soon as it has ended.
    pub auto_dismiss: bool,
    /// The I/O thread that it runs on.
    pub iothread: Option<String>,
    /// Whether source and target share blocks where the file system can do that, instead of having copies.
    pub use_copy_range: bool,
    /// A mirror's target is another host's, to which the guest goes: it is told that all is written when the source is let go of, and
    /// nobody can use the target before.
    pub hand_over: bool,
    /// The options as they were given.
    pub given: Map,
}

const SYNCS: [(&str, JobSync); 5] = [
    ("full", JobSync::Full),
    ("top", JobSync::Top),
    ("none", JobSync::None),
    ("incremental", JobSync::Bitmap),
    ("bitmap", JobSync::Bitmap),
];

const BITMAP_MODES: [(&str, BitmapMode); 3] = [
    ("on-success", BitmapMode::OnSuccess),
    ("never", BitmapMode::Never),
    ("always", BitmapMode::Always),
];

const POLICIES: [(&str, ErrorPolicy); 4] = [
    ("report", ErrorPolicy::Report),
    ("ignore", ErrorPolicy::Ignore),
    ("enospc", ErrorPolicy::Enospc),
    ("stop", ErrorPolicy::Stop),
];

const COPY_MODES: [(&str, CopyMode); 2] = [
    ("background", CopyMode::Background),
    ("write-blocking", CopyMode::WriteBlocking),
];

pub(crate) const COPY_ERRORS: [(&str, CopyErrorPolicy); 2] = [
    ("break-snapshot", CopyErrorPolicy::BreakSnapshot),
    ("break-guest-write", CopyErrorPolicy::BreakGuestWrite),
];

/// Granularities of mirrors, as QEMU has them.
const MIN_GRANULARITY: u64 = 512;
const MAX_GRANULARITY: u64 = 64 << 20;

fn granularity(f: &mut Fields) -> Result<Option<u64>> {
    let given = f.size("granularity")?;
    match given {
        Some(n) if !n.is_power_of_two() || !(MIN_GRANULARITY..=MAX_GRANULARITY).contains(&n) => {
            Err(f.error(
                "granularity",
                format_args!("is {n}: give a power of two from 512 to 64M"),
            ))
        }
        given => Ok(given),
    }
}

fn bitmap(f: &mut Fields) -> Result<Option<JobBitmap>> {
    let sync = f.peek("sync").and_then(|v| v.as_str()).unwrap_or("full");
    let by_bitmap = matches!(sync, "incremental" | "bitmap");
    let sync = sync.to_owned();
    let name = f.string("bitmap")?;
    let mode = f.choice("bitmap-mode", &BITMAP_MODES)?;
    match (by_bitmap, name) {
        (true, Some(name))
            if sync == "incremental" && mode.is_some_and(|m| m != BitmapMode::OnSuccess) =>
        {
            Err(f.error(
                "bitmap-mode",
                format_args!(
                    "cannot be changed for bitmap '{name}' with sync=incremental: give sync=bitmap"
                ),
            ))
        }
        (true, Some(name)) => Ok(Some(JobBitmap {
            name,
            mode: mode.unwrap_or_default(),
        })),
        (true, None) => Err(f.error(
            "bitmap",
            format_args!("is missing with sync={sync}: give it"),
        )),
        (false, Some(_)) => Err(f.error(
            "bitmap",
            format_args!("has no meaning with sync={sync}: give sync=incremental or sync=bitmap"),
        )),
        (false, None) => Ok(None),
    }
}

impl JobOptions {
    /// Options of a job of kind `kind` (see [`JobKind::name`]) on a node.
    pub fn from_map(kind: &str, node: &str, map: Map) -> Result<JobOptions> {
        let given = expand_dotted(map)?;
        let mut f = Fields::new(format!("{kind} of node '{node}'"), given.clone());
        let id = match f.string("job-id")? {
            Some(id) => id,
            None => format!("{kind}-{}", node.trim_start_matches('#')),
        };
        check_name(&format!("{}: job-id", f.what()), &id)?;
        f.set_what(format!("job '{id}'"));
        let target = match kind {
            "commit" | "stream" | "discard" | "check" | "repair" => None,
            _ => Some(f.required_string("target")?),
        };
        if target.as_deref() == Some(node) {
            return Err(f.error("target", "is the node itself: give another"));
        }
        let kind = match kind {
            "mirror" => JobKind::Mirror {
                bitmap: bitmap(&mut f)?,
                sync: f.choice("sync", &SYNCS)?.unwrap_or_default(),
                copy_mode: f.choice("copy-mode", &COPY_MODES)?.unwrap_or_default(),
                granularity: granularity(&mut f)?,
            },
            "backup" => JobKind::Backup {
                bitmap: bitmap(&mut f)?,
                sync: f.choice("sync", &SYNCS)?.unwrap_or_default(),
                compress: f.boolean("compress")?.unwrap_or(false),
                on_copy_error: f.choice("on-cbw-error", &COPY_ERRORS)?.unwrap_or_default(),
            },
            "convert" => JobKind::Convert {
                compress: f.boolean("compress")?.unwrap_or(false),
            },
            "commit" => JobKind::Commit {
                base: f.string("base-node")?,
                backing_file: f.string("backing-file")?,
            },
            "stream" => JobKind::Stream {
                base: f.string("base-node")?,
                backing_file: f.string("backing-file")?,
            },
            "discard" => JobKind::Discard,
            "check" | "repair" => JobKind::Check {
                repair: RepairWhat::read(&mut f)?,
            },
            other => {
                return Err(Error::not_supported(format!("there is no job '{other}'")));
            }
        };
        if kind.is_of_image() {
            let auto_dismiss = f.boolean("auto-dismiss")?.unwrap_or(true);
            f.finish()?;
            return Ok(JobOptions {
                given,
                ..JobOptions::of_image(id, kind, node.to_owned(), auto_dismiss)
            });
        }
        // What is merged goes away. A copy that shares blocks is no copy if one of them goes bad, and takes away space that was
        // reserved for either.
        let usually = matches!(kind, JobKind::Commit { .. } | JobKind::Stream { .. });
        let copy_range = match kind {
            JobKind::Discard => None,
            _ => f.boolean("use-copy-range")?,
        };
        let compresses = matches!(
            kind,
            JobKind::Convert { compress: true } | JobKind::Backup { compress: true, .. }
        );
        if compresses && copy_range == Some(true) {
            return Err(f.error(
                "use-copy-range",
                "does not fit 'compress': leave out one of them",
            ));
        }
        let hand_over = match kind {
            JobKind::Mirror { .. } => f.boolean("hand-over")?.unwrap_or(false),
            _ => false,
        };
        let options = JobOptions {
            hand_over,
            use_copy_range: copy_range.unwrap_or(usually),
            id,
            kind,
            node: node.to_owned(),
            target,
            speed: f.size("speed")?.unwrap_or(0),
            on_source_error: f.choice("on-source-error", &POLICIES)?.unwrap_or_default(),
            on_target_error: f.choice("on-target-error", &POLICIES)?.unwrap_or_default(),
            auto_finalize: f.boolean("auto-finalize")?.unwrap_or(true),
            auto_dismiss: f.boolean("auto-dismiss")?.unwrap_or(true),
            iothread: f.string("iothread")?,
            given,
        };
        f.finish()?;
        Ok(options)
    }
}

/// Jobs on images in files.
const IMAGE_JOBS: [&str; 3] = ["create", "check", "repair"];

impl JobOptions {
    fn of_image(id: String, kind: JobKind, node: String, auto_dismiss: bool) -> JobOptions {
        JobOptions {
            id,
            kind,
            node,
            target: None,
            speed: 0,
            on_source_error: ErrorPolicy::default(),
            on_target_error: ErrorPolicy::default(),
            auto_finalize: true,
            auto_dismiss,
            iothread: None,
            use_copy_range: false,
            hand_over: false,
            given: Map::new(),
        }
    }

    /// Options of a job on an image in a file: those of the operation ([`CreateImage::from_map`], [`check_from_map`]), and
    /// "job-id" and "auto-dismiss".
    pub fn from_image_map(operation: &str, mut map: Map) -> Result<JobOptions> {
        let mut own = Map::new();
        for key in ["job-id", "auto-dismiss"] {
            own.extend(map.remove_entry(key));
        }
        let filename = map.get("filename").and_then(|f| f.as_str());
        let base = filename.unwrap_or_default().rsplit('/').next();
        let base: String = base
            .unwrap_or_default()
            .chars()
            .filter(|c| c.is_ascii_alphanumeric() || "-._".contains(*c))
            .take(40)
            .collect();
        let mut f = Fields::new(format!("job '{operation}'"), own);
        let id = f.string("job-id")?;
        let id = id.unwrap_or_else(|| format!("{operation}-{base}"));
        check_name(&format!("{}: job-id", f.what()), &id)?;
        let auto_dismiss = f.boolean("auto-dismiss")?.unwrap_or(true);
        f.finish()?;
        let kind = match operation {
            "create" => JobKind::Create(Box::new(CreateImage::from_map(map)?)),
            "check" | "repair" => {
                if operation == "repair" {
                    map.entry("repair").or_insert_with(|| "all".into());
                }
                let (file, repair) = check_from_map(map)?;
                if (operation == "check") != (repair == RepairWhat::Nothing) {
                    return Err(Error::invalid(format!(
                        "job '{id}': option 'repair' does not fit a {operation}: start a 'check' without it, or a 'repair'"
                    )));
                }
                JobKind::CheckFile { file, repair }
            }
            other => {
                return Err(Error::not_supported(format!(
                    "there is no job '{other}' for images in files: use one of {}",
                    IMAGE_JOBS.join(", ")
                )));
            }
        };
        Ok(JobOptions::of_image(id, kind, String::new(), auto_dismiss))
    }
}

/// What a job is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum JobAction {
    Pause,
    Resume,
    /// To end without effect. A mirror that is ready ends with a complete target, unless it is forced.
    Cancel {
        force: bool,
    },
    /// A mirror that is ready lets its target take the place of the source.
    Complete,
    /// To take effect.
    Finalize,
    /// To go away after it has ended.
    Dismiss,
    /// Bytes per second; 0 for no limit.
    SetSpeed(u64),
    SetCopyMode(CopyMode),
}

/// Options of `Cancel`: whether it is forced.
pub fn cancel_from_map(id: &str, map: Map) -> Result<JobAction> {
    let mut f = Fields::new(format!("job '{id}': cancel"), map);
    let force = f.boolean("force")?.unwrap_or(false);
    f.finish()?;
    Ok(JobAction::Cancel { force })
}

/// What can be changed while a job runs.
pub fn change_from_map(id: &str, map: Map) -> Result<JobAction> {
    let mut f = Fields::new(format!("job '{id}': change"), map);
    let mode = f.choice("copy-mode", &COPY_MODES)?;
    let mode = mode.ok_or_else(|| f.error("copy-mode", "is missing: give it"))?;
    f.finish()?;
    Ok(JobAction::SetCopyMode(mode))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(kind: &str, v: serde_json::Value) -> Result<JobOptions> {
        match v {
            serde_json::Value::Object(m) => JobOptions::from_map(kind, "disk", m),
            _ => panic!("not a map"),
        }
    }

    #[test]
    fn options_have_qapi_names_and_mistakes_are_named() {
        let o = read(
            "mirror",
            json!({"target": "t", "copy-mode": "write-blocking", "speed": "10M"}),
        );
        let o = o.unwrap();
        assert_eq!((o.id.as_str(), o.speed), ("mirror-disk", 10 << 20));
        assert!(matches!(
            o.kind,
            JobKind::Mirror {
                copy_mode: CopyMode::WriteBlocking,
                ..
            }
        ));
        for (kind, options, want) in [
            ("mirror", json!({}), "'target'"),
            ("mirror", json!({"target": "disk"}), "itself"),
            (
                "mirror",
                json!({"target": "t", "granularity": 1000}),
                "1000",
            ),
            (
                "mirror",
                json!({"target": "t", "compress": true}),
                "'compress'",
            ),
            ("backup", json!({"target": "t", "sync": "all"}), "'all'"),
            (
                "backup",
                json!({"target": "t", "sync": "incremental"}),
                "'bitmap'",
            ),
            ("backup", json!({"target": "t", "bitmap": "b"}), "sync=full"),
            (
                "backup",
                json!({"target": "t", "on-target-error": "x"}),
                "enospc",
            ),
            ("backup", json!({"target": "t", "job-id": "a/b"}), "a/b"),
        ] {
            let e = read(kind, options).unwrap_err();
            assert!(e.message.contains(want), "{e}");
        }
    }
}
