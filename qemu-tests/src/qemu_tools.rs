//! QEMU's tools, for tests that compare with them.

use std::path::Path;
use std::process::Command;

pub fn text(path: &Path) -> &str {
    path.to_str().expect("test paths are ASCII")
}

/// Runs a program, which must succeed, and returns what it prints.
pub fn tool(program: &str, args: &[&str]) -> String {
    let out = Command::new(program).args(args).output();
    let out = out.unwrap_or_else(|e| panic!("{program}: {e}: run 'make setup'"));
    assert!(out.status.success(), "{program} {args:?}: {out:?}");
    String::from_utf8_lossy(&out.stdout).into_owned()
}

/// `qemu-img check` finds nothing, leaks included.
pub fn assert_sound(image: &Path) {
    tool("qemu-img", &["check", "-q", "-f", "qcow2", text(image)]);
}

/// What qemu-img makes of a qcow2 image.
pub fn read_with_qemu(image: &Path) -> Vec<u8> {
    let raw = image.with_extension("raw");
    let convert = [
        "convert",
        "-f",
        "qcow2",
        "-O",
        "raw",
        text(image),
        text(&raw),
    ];
    tool("qemu-img", &convert);
    std::fs::read(raw).expect("qemu-img has written it")
}
