//! PID 1 of the test guests. Mounts what a kernel needs, loads the modules packed with it, and then does
//! what the host says, one JSON object a line over the virtio-serial port `org.vdisk.test`. With `vdisk.root=DEVICE` on the kernel's
//! command line it goes on with the system on that device instead.

mod agent;
mod disk;
mod load;
mod pattern;
mod sys;

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::process::Command;

use serde_json::{Value, json};

use disk::Disk;
use load::Load;

type Result<T> = std::result::Result<T, String>;

fn main() {
    sys::mount("proc", "/proc", "proc");
    sys::mount("sysfs", "/sys", "sysfs");
    sys::mount("devtmpfs", "/dev", "devtmpfs");
    for module in fs::read_to_string("/modules/order")
        .unwrap_or_default()
        .lines()
    {
        if let Err(e) = sys::load_module(&format!("/modules/{module}")) {
            println!("guest: module {module}: {e}");
        }
    }
    let cmdline = fs::read_to_string("/proc/cmdline").unwrap_or_default();
    if let Some(device) = cmdline
        .split_whitespace()
        .find_map(|word| word.strip_prefix("vdisk.root="))
    {
        sys::switch_root(device);
    }
    let Some(port) = sys::wait_for(|| find_port("org.vdisk.test")) else {
        println!("guest: no port to the host");
        sys::power_off();
    };
    if let Some(device) = find_port(agent::PORT) {
        agent::start(device);
    }
    if let Err(e) = serve(&port) {
        println!("guest: {e}");
    }
    sys::power_off();
}

fn find_port(wanted: &str) -> Option<String> {
    for entry in fs::read_dir("/sys/class/virtio-ports").ok()?.flatten() {
        let name = fs::read_to_string(entry.path().join("name")).unwrap_or_default();
        if name.trim() == wanted {
            let device = format!("/dev/{}", entry.file_name().to_string_lossy());
            return fs::metadata(&device).is_ok().then_some(device);
        }
    }
    None
}

fn serve(port: &str) -> std::io::Result<()> {
    let file = fs::OpenOptions::new().read(true).write(true).open(port)?;
    let mut out = file.try_clone()?;
    let mut say = move |v: Value| out.write_all(format!("{v}\n").as_bytes());
    say(json!({"ready": true}))?;
    let mut load = None;
    let mut lines = BufReader::new(file);
    loop {
        let mut line = String::new();
        if lines.read_line(&mut line)? == 0 {
            // The host closed its end; it may come back.
            std::thread::sleep(std::time::Duration::from_millis(20));
            continue;
        }
        let reply = match serde_json::from_str::<Value>(&line) {
            Ok(request) => run(&request, &mut load).unwrap_or_else(|e| json!({"error": e})),
            Err(e) => json!({"error": format!("{e} in {line:?}")}),
        };
        say(reply)?;
    }
}

fn text<'a>(r: &'a Value, key: &str) -> Result<&'a str> {
    r[key].as_str().ok_or_else(|| format!("no {key}"))
}

fn number(r: &Value, key: &str) -> Result<u64> {
    r[key].as_u64().ok_or_else(|| format!("no {key}"))
}

fn run(r: &Value, load: &mut Option<Load>) -> Result<Value> {
    let disk = || Disk::open(text(r, "disk")?);
    let range = || Ok::<_, String>((number(r, "offset")?, number(r, "len")?));
    match text(r, "cmd")? {
        "disks" => Ok(disk::list()),
        "wait-disk" => {
            let (name, present) = (text(r, "disk")?, r["present"].as_bool().unwrap_or(true));
            let path = format!("/sys/block/{name}");
            let seen = || (fs::metadata(&path).is_ok() == present).then_some(());
            sys::wait_for(seen).ok_or(format!("waited in vain for {name}"))?;
            Ok(disk::list())
        }
        "wait-size" => {
            let (name, size) = (text(r, "disk")?, number(r, "size")?);
            sys::wait_for(|| (disk::size(name) == Some(size)).then_some(()))
                .ok_or_else(|| format!("size of {name} is {:?}", disk::size(name)))?;
            Ok(json!({"size": size}))
        }
        "write" => {
            let (offset, len) = range()?;
            let threads = r["threads"].as_u64().unwrap_or(1);
            disk()?.write_pattern(offset, len, number(r, "generation")?, threads)?;
            Ok(json!({}))
        }
        "verify" => {
            let (offset, len) = range()?;
            disk()?.verify_pattern(offset, len, number(r, "generation")?)?;
            Ok(json!({}))
        }
        "is-zero" => {
            let (offset, len) = range()?;
            Ok(json!({"zero": disk()?.is_zero(offset, len)?}))
        }
        "flush" => disk()?.flush().map(|()| json!({})),
        "discard" => {
            let (offset, len) = range()?;
            disk()?.discard(offset, len).map(|()| json!({}))
        }
        "zero" => {
            let (offset, len) = range()?;
            let unmap = r["unmap"].as_bool().unwrap_or(false);
            disk()?.zero(offset, len, unmap).map(|()| json!({}))
        }
        "set-cache" => {
            let path = format!("/sys/block/{}/cache_type", text(r, "disk")?);
            fs::write(&path, text(r, "type")?).map_err(|e| format!("{path}: {e}"))?;
            Ok(json!({}))
        }
        "fs-write" => {
            let device = format!("/dev/{}", text(r, "disk")?);
            command("/bin/mke2fs", &["-q", "-F", "-t", "ext4", &device])?;
            fs::create_dir_all("/mnt").map_err(|e| e.to_string())?;
            sys::mount(&device, "/mnt", "ext4");
            let data = pattern::block(7, 7, number(r, "len")? as usize);
            let mut file = fs::File::create("/mnt/file").map_err(|e| e.to_string())?;
            file.write_all(&data).map_err(|e| e.to_string())?;
            file.sync_all().map_err(|e| e.to_string())?;
            drop(file);
            sys::unmount("/mnt")?;
            Ok(json!({"sum": pattern::sum(&data)}))
        }
        "load-start" => {
            let (offset, len) = range()?;
            let threads = number(r, "threads")?;
            *load = Some(Load::start(text(r, "disk")?, offset, len, threads)?);
            Ok(json!({}))
        }
        "load-status" => Ok(load.as_ref().ok_or("no load")?.status()),
        "load-stop" => load.take().ok_or("no load")?.stop(),
        "agent" => Ok(agent::counts()),
        "kernel-errors" => Ok(sys::kernel_errors()),
        "reboot" => sys::reboot(),
        "exit" => sys::exit(number(r, "code").unwrap_or(0) as u8),
        other => Err(format!("unknown command {other}")),
    }
}

fn command(program: &str, args: &[&str]) -> Result<()> {
    let out = Command::new(program)
        .args(args)
        .output()
        .map_err(|e| format!("{program}: {e}"))?;
    if out.status.success() {
        return Ok(());
    }
    Err(format!(
        "{program}: {}",
        String::from_utf8_lossy(&out.stderr)
    ))
}
