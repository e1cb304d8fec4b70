//! Options of images in files that are not part of the graph (QAPI `BlockdevCreateOptions`).

use crate::error::{Error, Result};
use crate::fields::{Fields, Map, expand_dotted};

/// The format of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImageFormat {
    Raw,
    Qcow2,
    Luks,
}

/// The hash that protects a passphrase.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KeyHash {
    Sha1,
    #[default]
    Sha256,
    Sha512,
}

/// How a new image is encrypted (QAPI `QCryptoBlockCreateOptionsLUKS`): with AES-XTS.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Encryption {
    /// The secret that will open it, by its id.
    pub key_secret: String,
    /// 128 or 256.
    pub aes_bits: u32,
    pub hash: KeyHash,
    /// How long trying a passphrase is to take, in milliseconds.
    pub iter_time: u64,
}

/// What is made of a new image beyond its header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ImagePreallocation {
    #[default]
    Off,
    Metadata,
    Falloc,
    Full,
}

/// How a qcow2 image is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Qcow2Create {
    /// 2 or 3.
    pub version: u32,
    pub cluster_size: u64,
    pub refcount_bits: u32,
    pub extended_l2: bool,
    pub zstd: bool,
    pub lazy_refcounts: bool,
    /// Name and format of the backing file.
    pub backing: Option<(String, String)>,
    /// Name of the external data file.
    pub data_file: Option<String>,
    /// It is to be the guest's disk as it is.
    pub data_file_raw: bool,
    pub encrypt: Option<Encryption>,
}

/// What a new image holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NewFormat {
    Raw,
    Qcow2(Qcow2Create),
    Luks(Encryption),
}

/// A new image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CreateImage {
    pub filename: String,
    /// Bytes of the guest's disk.
    pub size: u64,
    pub preallocation: ImagePreallocation,
    /// What is there already may be lost.
    pub overwrite: bool,
    pub format: NewFormat,
}

/// An image in a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageFile {
    pub filename: String,
    pub format: ImageFormat,
    /// Somebody else may be writing to it: what is read is not consistent.
    pub force_share: bool,
}

/// What a check repairs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RepairWhat {
    #[default]
    Nothing,
    Leaks,
    All,
}

/// Changes of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AmendImage {
    pub file: ImageFile,
    /// 2 or 3.
    pub version: Option<u32>,
    pub lazy_refcounts: Option<bool>,
    /// Name and format of the backing file; the empty name for none.
    pub backing: Option<(String, Option<String>)>,
    /// Name of the external data file, for one that was renamed.
    pub data_file: Option<String>,
}

const FORMATS: [(&str, ImageFormat); 3] = [
    ("raw", ImageFormat::Raw),
    ("qcow2", ImageFormat::Qcow2),
    ("luks", ImageFormat::Luks),
];
const VERSIONS: [(&str, u32); 4] = [("v2", 2), ("v3", 3), ("0.10", 2), ("1.1", 3)];

fn named(map: Map) -> Result<(Fields, String)> {
    let mut f = Fields::new("image", expand_dotted(map)?);
    let filename = f.required_string("filename")?;
    f.set_what(format!("image '{filename}'"));
    Ok((f, filename))
}

impl Encryption {
    fn read(f: &mut Fields) -> Result<Encryption> {
        f.choice("cipher-mode", &[("xts", ())])?;
        f.choice("ivgen-alg", &[("plain64", ())])?;
        Ok(Encryption {
            key_secret: f.required_string("key-secret")?,
            aes_bits: f
                .choice("cipher-alg", &[("aes-128", 128), ("aes-256", 256)])?
                .unwrap_or(256),
            hash: f
                .choice(
                    "hash-alg",
                    &[
                        ("sha1", KeyHash::Sha1),
                        ("sha256", KeyHash::Sha256),
                        ("sha512", KeyHash::Sha512),
                    ],
                )?
                .unwrap_or_default(),
            iter_time: f.integer("iter-time", 1..=60_000)?.unwrap_or(2000),
        })
    }

    /// The dictionary "encrypt" of a qcow2 image.
    fn within(f: &mut Fields) -> Result<Option<Encryption>> {
        let Some(map) = f.object("encrypt")? else {
            return Ok(None);
        };
        let mut e = Fields::new(format!("{}, encrypt", f.what()), map);
        e.choice("format", &[("luks", ())])?
            .ok_or_else(|| e.error("format", "is missing: luks is supported"))?;
        let read = Encryption::read(&mut e)?;
        e.finish()?;
        Ok(Some(read))
    }
}

impl Qcow2Create {
    fn read(f: &mut Fields) -> Result<Qcow2Create> {
        let backing = f.string("backing-file")?;
        let format = f.string("backing-fmt")?;
        let backing = match (backing, format) {
            (None, None) => None,
            (Some(file), Some(format)) => Some((file, format)),
            (Some(_), None) => {
                return Err(f.error(
                    "backing-fmt",
                    "is missing: give the format of the backing file",
                ));
            }
            (None, Some(_)) => {
                return Err(f.error(
                    "backing-file",
                    "is missing: give the name of the backing file",
                ));
            }
        };
        let (data_file, encrypt) = (f.string("data-file")?, Encryption::within(f)?);
        let data_file_raw = f.boolean("data-file-raw")?.unwrap_or(false);
        if data_file_raw && encrypt.is_some() {
            return Err(f.error(
                "data-file-raw",
                "is given together with 'encrypt': what is encrypted is not the guest's disk as it is, leave out one of them",
            ));
        }
        Ok(Qcow2Create {
            version: f.choice("version", &VERSIONS)?.unwrap_or(3),
            cluster_size: f.size("cluster-size")?.unwrap_or(65536),
            refcount_bits: f.integer("refcount-bits", 1..=64)?.unwrap_or(16) as u32,
            extended_l2: f.boolean("extended-l2")?.unwrap_or(false),
            zstd: f
                .choice("compression-type", &[("zlib", false), ("zstd", true)])?
                .unwrap_or(false),
            lazy_refcounts: f.boolean("lazy-refcounts")?.unwrap_or(false),
            backing,
            data_file,
            data_file_raw,
            encrypt,
        })
    }
}

impl CreateImage {
    pub fn from_map(map: Map) -> Result<CreateImage> {
        let (mut f, filename) = named(map)?;
        let format = f.choice("driver", &FORMATS)?.unwrap_or(ImageFormat::Qcow2);
        let size = f
            .size("size")?
            .ok_or_else(|| f.error("size", "is missing: give the size of the disk"))?;
        let preallocation = f
            .choice(
                "preallocation",
                &[
                    ("off", ImagePreallocation::Off),
                    ("metadata", ImagePreallocation::Metadata),
                    ("falloc", ImagePreallocation::Falloc),
                    ("full", ImagePreallocation::Full),
                ],
            )?
            .unwrap_or_default();
        let format = match format {
            ImageFormat::Raw => NewFormat::Raw,
            ImageFormat::Qcow2 => NewFormat::Qcow2(Qcow2Create::read(&mut f)?),
            ImageFormat::Luks => NewFormat::Luks(Encryption::read(&mut f)?),
        };
        if !matches!(format, NewFormat::Qcow2(_)) && preallocation == ImagePreallocation::Metadata {
            return Err(f.error(
                "preallocation",
                "is 'metadata', which only qcow2 images have",
            ));
        }
        let overwrite = f.boolean("overwrite")?.unwrap_or(false);
        f.finish()?;
        Ok(CreateImage {
            filename,
            size,
            preallocation,
            overwrite,
            format,
        })
    }
}

impl ImageFile {
    fn read(f: &mut Fields, filename: String) -> Result<ImageFile> {
        Ok(ImageFile {
            filename,
            format: f.choice("driver", &FORMATS)?.unwrap_or(ImageFormat::Qcow2),
            force_share: f.boolean("force-share")?.unwrap_or(false),
        })
    }

    pub fn from_map(map: Map) -> Result<ImageFile> {
        let (mut f, filename) = named(map)?;
        let file = ImageFile::read(&mut f, filename)?;
        f.finish()?;
        Ok(file)
    }
}

impl RepairWhat {
    pub(crate) fn read(f: &mut Fields) -> Result<RepairWhat> {
        let words = [
            ("none", RepairWhat::Nothing),
            ("leaks", RepairWhat::Leaks),
            ("all", RepairWhat::All),
        ];
        Ok(f.choice("repair", &words)?.unwrap_or_default())
    }

    pub fn from_map(map: Map) -> Result<RepairWhat> {
        let mut f = Fields::new("check", map);
        let repair = RepairWhat::read(&mut f)?;
        f.finish()?;
        Ok(repair)
    }
}

/// A check of an image in a file.
pub fn check_from_map(map: Map) -> Result<(ImageFile, RepairWhat)> {
    let (mut f, filename) = named(map)?;
    let file = ImageFile::read(&mut f, filename)?;
    let repair = RepairWhat::read(&mut f)?;
    if file.format != ImageFormat::Qcow2 {
        return Err(Error::not_supported(format!(
            "{}: only qcow2 images have something that could be checked",
            f.what()
        )));
    }
    f.finish()?;
    Ok((file, repair))
}

impl AmendImage {
    pub fn from_map(map: Map) -> Result<AmendImage> {
        let (mut f, filename) = named(map)?;
        let file = ImageFile::read(&mut f, filename)?;
        let version = f.choice("version", &VERSIONS)?;
        let lazy_refcounts = f.boolean("lazy-refcounts")?;
        let backing_file = f.string("backing-file")?;
        let format = f.string("backing-fmt")?;
        let data_file = f.string("data-file")?;
        if file.format != ImageFormat::Qcow2 {
            return Err(Error::not_supported(format!(
                "{}: only qcow2 images have something that could be amended",
                f.what()
            )));
        }
        let backing = match (backing_file, format) {
            (Some(name), None) if !name.is_empty() => {
                return Err(f.error(
                    "backing-fmt",
                    "is missing: give the format of the backing file",
                ));
            }
            (Some(name), format) => Some((name, format)),
            (None, Some(_)) => {
                return Err(f.error(
                    "backing-file",
                    "is missing: give the name of the backing file",
                ));
            }
            (None, None) => None,
        };
        f.finish()?;
        Ok(AmendImage {
            file,
            version,
            lazy_refcounts,
            backing,
            data_file,
        })
    }
}

/// What an image of a size would take; the options are those of a new one without its name.
pub fn measure_from_map(mut map: Map) -> Result<CreateImage> {
    map.insert("filename".into(), "new".into());
    CreateImage::from_map(map)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn map(v: Value) -> Map {
        match v {
            Value::Object(m) => m,
            _ => panic!("not a map"),
        }
    }

    #[test]
    fn qapi_options_are_read() {
        let c = CreateImage::from_map(map(json!({
            "driver": "qcow2", "filename": "/x", "size": "1G", "cluster-size": "2M", "version": "v2",
            "compression-type": "zstd", "backing-file": "/b", "backing-fmt": "raw",
        })))
        .unwrap();
        let NewFormat::Qcow2(q) = c.format else {
            panic!()
        };
        assert_eq!((c.size, q.cluster_size, q.version), (1 << 30, 2 << 20, 2));
        assert!(q.zstd && q.backing == Some(("/b".into(), "raw".into())));
    }

    #[test]
    fn mistakes_name_the_image_and_the_value() {
        for (options, parts) in [
            (json!({"size": 1}), vec!["filename"]),
            (json!({"filename": "/x"}), vec!["'/x'", "size"]),
            (
                json!({"filename": "/x", "size": 1, "driver": "vmdk"}),
                vec!["vmdk", "qcow2"],
            ),
            (
                json!({"filename": "/x", "size": 1, "backing-file": "/b"}),
                vec!["backing-fmt"],
            ),
            (
                json!({"filename": "/x", "size": 1, "bogus": 1}),
                vec!["bogus"],
            ),
            (
                json!({"filename": "/x", "size": 1, "driver": "raw", "preallocation": "metadata"}),
                vec!["metadata"],
            ),
            (
                json!({"filename": "/x", "size": 1, "driver": "luks"}),
                vec!["key-secret"],
            ),
            (
                json!({"filename": "/x", "size": 1, "data-file": "d", "data-file-raw": true, "encrypt.format": "luks", "encrypt.key-secret": "s"}),
                vec!["data-file-raw", "encrypt"],
            ),
            (
                json!({"filename": "/x", "size": 1, "encrypt.format": "aes"}),
                vec!["format", "aes", "luks"],
            ),
            (
                json!({"filename": "/x", "size": 1, "encrypt.format": "luks", "encrypt.key-secret": "s", "encrypt.ivgen-alg": "essiv"}),
                vec!["ivgen-alg", "essiv"],
            ),
        ] {
            let e = CreateImage::from_map(map(options.clone())).unwrap_err();
            for part in parts {
                assert!(e.message.contains(part), "{options} gave: {e}");
            }
        }
    }
}
