//! Backing and data files that images name. Whoever writes an image decides what it names, so a name is followed only into folders that
//! the configuration gives for that, and only to files whose format the image gives, too.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde_json::json;
use vdisk_api::{Error, ErrorKind, Map, Result, Value, expand_dotted, file_driver};
use vdisk_block::Descriptors;
use vdisk_qcow2::{Header, USUAL_HEADER, header_extent};

/// Longer chains are refused; they may be endless.
const MAX_DEPTH: usize = 200;

/// The real folders in which files may be that images name; with none of them no name is followed.
#[derive(Clone, Debug, Default)]
pub struct Follow(pub Vec<PathBuf>);

impl Follow {
    /// The options of a node with those of the files that its images name, where there are none for them. May block.
    pub fn complete(&self, options: Map) -> Result<Map> {
        if self.0.is_empty() {
            return Ok(options);
        }
        let mut options = expand_dotted(options)?;
        self.complete_node(&mut options, 0)?;
        Ok(options)
    }

    fn complete_node(&self, options: &mut Map, depth: usize) -> Result<()> {
        for child in options.values_mut() {
            if let Value::Object(child) = child
                && child.contains_key("driver")
            {
                self.complete_node(child, depth)?;
            }
        }
        let Some(path) = image_of(options) else {
            return Ok(());
        };
        // What is wrong with it is said when it is opened.
        let Ok(header) = header_of(&path) else {
            return Ok(());
        };
        let what = format!("image '{path}'");
        if let (true, Some(name)) = (header.external_data, &header.data_file)
            && !options.contains_key("data-file")
        {
            let file = self.find(&what, &path, name)?;
            options.insert("data-file".into(), file);
        }
        let Some(name) = header.backing_file else {
            return Ok(());
        };
        if options.contains_key("backing") {
            return Ok(());
        }
        if depth >= MAX_DEPTH {
            return Err(Error::invalid(format!(
                "{what}: there are more than {MAX_DEPTH} images below the first, or they name each other: give the 'backing' that is meant"
            )));
        }
        let format = match header.backing_format.as_deref() {
            Some(format @ ("qcow2" | "raw")) => format,
            Some(other) => {
                return Err(Error::not_supported(format!(
                    "{what} names backing file '{}' of format '{}', and only qcow2 and raw are followed: give it as 'backing'",
                    name.escape_debug(),
                    other.escape_debug()
                )));
            }
            None => {
                return Err(Error::invalid(format!(
                    "{what} names backing file '{}' without its format, which is not guessed: set it with 'vdiskctl image amend' (backing-fmt), or give it as 'backing'",
                    name.escape_debug()
                )));
            }
        };
        let file = self.find(&what, &path, &name)?;
        let mut backing = Map::new();
        backing.insert("driver".into(), format.into());
        backing.insert("file".into(), file);
        self.complete_node(&mut backing, depth + 1)?;
        options.insert("backing".into(), Value::Object(backing));
        Ok(())
    }

    /// The options of the file of a name in an image, if it may be followed. (They have the real place: links that are changed later lead
    /// nowhere else.)
    fn find(&self, what: &str, image: &str, name: &str) -> Result<Value> {
        let shown = name.escape_debug();
        let is_url = name
            .split_once('/')
            .map_or(name, |(first, _)| first)
            .contains(':');
        if is_url {
            return Err(Error::invalid(format!(
                "{what} names '{shown}', which is not the path of a file, and such names are not followed: give it as 'backing' or 'data-file' if you trust it"
            )));
        }
        let folder = Path::new(image).parent().unwrap_or(Path::new("/"));
        let real = folder.join(name).canonicalize().map_err(|e| {
            Error::io(
                format_args!("{what} names '{shown}', which cannot be found"),
                &e,
            )
        })?;
        if !self.0.iter().any(|d| real.starts_with(d)) {
            let all: Vec<String> = self.0.iter().map(|d| d.display().to_string()).collect();
            return Err(Error::new(
                ErrorKind::NotAuthorized,
                format!(
                    "{what} names '{shown}', which is '{}', and names inside images are followed into {} only: give it as 'backing' or 'data-file' if you trust it, or add its folder to 'images.follow' in vdiskd.toml",
                    real.display(),
                    all.join(", ")
                ),
            ));
        }
        let real = real.to_str().ok_or_else(|| {
            Error::invalid(format!(
                "{what} names '{shown}', whose place is not UTF-8: give it a name that is"
            ))
        })?;
        Ok(json!({"driver": file_driver(real), "filename": real}))
    }
}

/// The path of the image, if these are the options of a qcow2 node with a file of its own.
fn image_of(options: &Map) -> Option<String> {
    if options.get("driver")? != "qcow2" {
        return None;
    }
    let file = options.get("file")?.as_object()?;
    let path = match file.get("driver")?.as_str()? {
        "file" | "host_device" => file.get("filename")?.as_str()?,
        _ => return None,
    };
    let is_path = path.starts_with('/') && !Descriptors::is_one(path);
    is_path.then(|| path.to_owned())
}

fn header_of(path: &str) -> io::Result<Header> {
    // A pipe would be waited for.
    let flags = rustix::fs::OFlags::NONBLOCK.bits() as i32;
    let file = File::options().read(true).custom_flags(flags).open(path)?;
    let kind = file.metadata()?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let read = |len: usize| {
        let mut bytes = vec![0; len];
        let mut have = 0;
        while have < len {
            match file.read_at(&mut bytes[have..], have as u64)? {
                0 => break,
                n => have += n,
            }
        }
        bytes.truncate(have);
        io::Result::Ok(bytes)
    };
    let mut head = read(USUAL_HEADER)?;
    if header_extent(&head) > head.len() {
        head = read(header_extent(&head))?;
    }
    // It says where tables are, which is not what is asked here.
    Header::parse(&head, u64::MAX).map_err(io::Error::other)
}
