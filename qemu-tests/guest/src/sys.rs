//! What PID 1 asks of the kernel.

use std::ffi::CString;
use std::fs;
use std::io::Read;
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// The port of QEMU's isa-debug-exit device.
const EXIT_PORT: u16 = 0x501;

fn c(s: &str) -> CString {
    CString::new(s).unwrap_or_default()
}

pub fn mount(source: &str, target: &str, kind: &str) {
    let _ = fs::create_dir_all(target);
    // SAFETY: three C strings and no data.
    let rc = unsafe {
        libc::mount(
            c(source).as_ptr(),
            c(target).as_ptr(),
            c(kind).as_ptr(),
            0,
            std::ptr::null(),
        )
    };
    if rc != 0 {
        println!("guest: mount {target}: {}", std::io::Error::last_os_error());
    }
}

/// Goes on as `/sbin/init` of the ext4 file system on a device.
pub fn switch_root(device: &str) -> ! {
    if wait_for(|| fs::metadata(device).ok()).is_none() {
        println!("guest: no device {device}");
        power_off();
    }
    mount(device, "/root", "ext4");
    // What this one has mounted stays behind; the other mounts its own.
    let moved = std::env::set_current_dir("/root")
        // SAFETY: C strings and no data.
        .map(|()| unsafe {
            libc::mount(
                c(".").as_ptr(),
                c("/").as_ptr(),
                std::ptr::null(),
                libc::MS_MOVE,
                std::ptr::null(),
            )
        })
        .and_then(|_| std::os::unix::fs::chroot("."))
        .and_then(|()| std::env::set_current_dir("/"));
    let error = match moved {
        Ok(()) => std::process::Command::new("/sbin/init").exec(),
        Err(e) => e,
    };
    println!("guest: {device} is no system: {error}");
    power_off()
}

pub fn unmount(target: &str) -> Result<(), String> {
    // SAFETY: a C string.
    match unsafe { libc::umount(c(target).as_ptr()) } {
        0 => Ok(()),
        _ => Err(format!("umount: {}", std::io::Error::last_os_error())),
    }
}

pub fn load_module(path: &str) -> std::io::Result<()> {
    let file = fs::File::open(path)?;
    // SAFETY: a descriptor and an empty C string.
    let rc = unsafe { libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), c"".as_ptr(), 0) };
    if rc != 0 {
        return Err(std::io::Error::last_os_error());
    }
    Ok(())
}

/// Looks again and again, for a minute at most.
pub fn wait_for<T>(look: impl Fn() -> Option<T>) -> Option<T> {
    let end = Instant::now() + Duration::from_secs(60);
    loop {
        if let Some(found) = look() {
            return Some(found);
        }
        if Instant::now() > end {
            return None;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Lines of the kernel's log that tell of I/O errors.
pub fn kernel_errors() -> Value {
    let mut lines = Vec::new();
    if let Ok(mut log) = fs::File::open("/dev/kmsg") {
        // SAFETY: makes reads fail at the end instead of waiting.
        unsafe { libc::fcntl(log.as_raw_fd(), libc::F_SETFL, libc::O_NONBLOCK) };
        let mut buf = [0; 8192];
        while let Ok(n) = log.read(&mut buf) {
            let line = String::from_utf8_lossy(&buf[..n]).into_owned();
            if line.contains("I/O error") || line.contains("BUG:") || line.contains("blocked for") {
                lines.push(line);
            }
        }
    }
    json!({ "lines": lines })
}

fn reboot_with(how: libc::c_int) -> ! {
    // SAFETY: no pointers.
    unsafe {
        libc::sync();
        libc::reboot(how);
    }
    loop {
        std::thread::sleep(Duration::from_secs(1));
    }
}

pub fn reboot() -> ! {
    reboot_with(libc::RB_AUTOBOOT)
}

pub fn power_off() -> ! {
    reboot_with(libc::RB_POWER_OFF)
}

/// Ends QEMU with exit status `code * 2 + 1`.
pub fn exit(code: u8) -> ! {
    // SAFETY: no pointers; it makes the port below accessible to this thread.
    if unsafe { libc::iopl(3) } == 0 {
        // SAFETY: one byte to the port of QEMU's isa-debug-exit device.
        unsafe {
            std::arch::asm!("out dx, al", in("dx") EXIT_PORT, in("al") code, options(nomem, nostack));
        }
    }
    power_off()
}
