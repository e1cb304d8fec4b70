//! Names in object paths, escaped as systemd does: everything but letters and digits (and a digit in
//! front) becomes `_` and two hexadecimal digits.

use std::fmt::Write;

use zbus::OwnedObjectPath;

/// Escapes a name for use as one element of an object path.
pub fn escape(name: &str) -> String {
    if name.is_empty() {
        return "_".into();
    }
    let mut out = String::with_capacity(name.len());
    for (i, b) in name.bytes().enumerate() {
        if b.is_ascii_alphabetic() || (i > 0 && b.is_ascii_digit()) {
            out.push(char::from(b));
        } else {
            // Writing to a String cannot fail.
            let _ = write!(out, "_{b:02x}");
        }
    }
    out
}

/// Reverses [`escape`]; None if `element` was not made by it.
pub fn unescape(element: &str) -> Option<String> {
    if element == "_" {
        return Some(String::new());
    }
    let mut out = Vec::new();
    let mut bytes = element.bytes();
    while let Some(b) = bytes.next() {
        if b != b'_' {
            out.push(b);
            continue;
        }
        let digits = [bytes.next()?, bytes.next()?];
        let text = std::str::from_utf8(&digits).ok()?;
        out.push(u8::from_str_radix(text, 16).ok()?);
    }
    String::from_utf8(out).ok()
}

fn object(kind: &str, name: &str) -> OwnedObjectPath {
    OwnedObjectPath::try_from(format!("/org/vdisk1/{kind}/{}", escape(name)))
        .expect("an escaped name is a valid path element")
}

/// Of a domain of libvirt, by its UUID.
pub fn domain_path(uuid: &str) -> OwnedObjectPath {
    object("domain", uuid)
}

pub fn node_path(name: &str) -> OwnedObjectPath {
    object("node", name)
}

pub fn export_path(id: &str) -> OwnedObjectPath {
    object("export", id)
}

pub fn iothread_path(name: &str) -> OwnedObjectPath {
    object("iothread", name)
}

/// Of a bitmap of a node.
pub fn bitmap_path(node: &str, name: &str) -> OwnedObjectPath {
    OwnedObjectPath::try_from(format!(
        "/org/vdisk1/bitmap/{}/{}",
        escape(node),
        escape(name)
    ))
    .expect("an escaped name is a valid path element")
}

pub fn job_path(id: &str) -> OwnedObjectPath {
    object("job", id)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_go_into_paths_and_back() {
        for name in ["disk0", "0", "a.b-c_d", "#block12", "", "ü"] {
            let e = escape(name);
            assert!(e.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_'));
            assert_eq!(unescape(&e).as_deref(), Some(name), "{e}");
        }
        assert_eq!(node_path("a-b").as_str(), "/org/vdisk1/node/a_2db");
        assert_eq!(unescape("_4"), None);
        assert_eq!(unescape("_zz"), None);
    }
}
