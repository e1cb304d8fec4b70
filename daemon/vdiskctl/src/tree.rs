//! `vdiskctl tree`: exports on top of their nodes on top of their children.

use serde_json::{Value as Json, json};
use vdisk_api::format_size;

use crate::objects::{Objects, Properties};
use crate::output::{flag, names, number, text};

fn export_line(p: &Properties) -> String {
    let name = anstyle::AnsiColor::Green.on_default().bold();
    let path = text(p, "Path");
    let path_style = if path == "fast" {
        anstyle::AnsiColor::Green.on_default()
    } else {
        anstyle::AnsiColor::Yellow.on_default()
    };
    let clients = match number(p, "Clients") {
        0 => "no client".to_owned(),
        1 => "1 client".to_owned(),
        n => format!("{n} clients"),
    };
    let queues = match p.get("NumQueues").and_then(Json::as_u64) {
        None => String::new(),
        Some(1) => "1 queue, ".to_owned(),
        Some(n) => format!("{n} queues, "),
    };
    let mut line = format!(
        "{name}{}{name:#}  {}, {}, {queues}{clients}, {path_style}{path} path{path_style:#}",
        text(p, "Id"),
        text(p, "Kind"),
        if flag(p, "Writable") {
            "writable"
        } else {
            "read-only"
        },
    );
    let reason = text(p, "PathReason");
    if !reason.is_empty() {
        line += &format!(" ({reason})");
    }
    let socket = text(p, "Socket");
    if !socket.is_empty() {
        line += &format!("  {socket}");
    }
    line
}

fn node_line(p: &Properties) -> String {
    let name = anstyle::AnsiColor::Cyan.on_default().bold();
    let mut line = format!(
        "{name}{}{name:#}  {}, {}",
        text(p, "Name"),
        text(p, "Driver"),
        format_size(number(p, "Size")),
    );
    if flag(p, "ReadOnly") {
        line += ", read-only";
    }
    // An older daemon has no others.
    if p.get("Active").is_some_and(|active| active == false) {
        line += ", inactive";
    }
    let has_children = !names(p, "Children").is_empty();
    let file = text(p, "Filename");
    if !file.is_empty() && !has_children {
        line += &format!("  {file}");
    }
    line
}

/// Prints a node and what it stands on. The graph has no loops.
fn print_node(objects: &Objects, path: &str, label: &str, indent: &str, last: bool) {
    let Some(p) = objects.get(path) else { return };
    let branch = if last { "└─ " } else { "├─ " };
    anstream::println!("{indent}{branch}{label}{}", node_line(p));
    let indent = format!("{indent}{}", if last { "   " } else { "│  " });
    let children = p.get("Children").and_then(Json::as_array);
    let children = children.map_or(&[][..], Vec::as_slice);
    for (i, child) in children.iter().enumerate() {
        if let (Some(role), Some(path)) = (child[0].as_str(), child[1].as_str()) {
            let last = i + 1 == children.len();
            print_node(objects, path, &format!("{role}: "), &indent, last);
        }
    }
}

pub fn print(objects: &Objects) {
    let mut any = false;
    for (_, export) in objects.of("export") {
        any = true;
        anstream::println!("{}", export_line(export));
        if let Some(node) = export.get("Node").and_then(Json::as_str) {
            print_node(objects, node, "", "", true);
        }
    }
    let unused = |p: &Properties| names(p, "Parents").is_empty();
    let idle: Vec<_> = objects.of("node").filter(|(_, p)| unused(p)).collect();
    if !idle.is_empty() {
        any = true;
        anstream::println!("not exported");
        for (i, (path, _)) in idle.iter().enumerate() {
            print_node(objects, path, "", "", i + 1 == idle.len());
        }
    }
    for (path, job) in objects.of("job") {
        any = true;
        anstream::println!("{}", crate::jobs::line(job));
        // The source is above, most of the time.
        if let Some(target) = job.get("Objects").and_then(|o| o[1].as_str())
            && objects.get(target).is_some_and(|p| {
                let parents = p.get("Parents").and_then(Json::as_array);
                parents.is_some_and(|all| all.iter().all(|p| p[1].as_str() == Some(path)))
            })
        {
            print_node(objects, target, "target: ", "", true);
        }
    }
    if !any {
        anstream::println!(
            "nothing is open; start with: vdiskctl node add NAME driver=file filename=PATH"
        );
    }
}

fn node_json(objects: &Objects, path: &str) -> Json {
    let Some(p) = objects.get(path) else {
        return Json::Null;
    };
    let mut out = p.clone();
    let children = p.get("Children").and_then(Json::as_array);
    let children = children.map_or(&[][..], Vec::as_slice).iter().map(
        |c| json!({"role": c[0], "node": node_json(objects, c[1].as_str().unwrap_or_default())}),
    );
    out.insert("Children".into(), children.collect());
    Json::Object(out)
}

pub fn json(objects: &Objects) -> Json {
    let exports = objects.of("export").map(|(_, p)| {
        let mut out = p.clone();
        let node = p.get("Node").and_then(Json::as_str).unwrap_or_default();
        out.insert("Node".into(), node_json(objects, node));
        Json::Object(out)
    });
    let idle = objects
        .of("node")
        .filter(|(_, p)| names(p, "Parents").is_empty())
        .map(|(path, _)| node_json(objects, path));
    let jobs = objects.of("job").map(|(_, p)| Json::Object(p.clone()));
    json!({"jobs": jobs.collect::<Vec<_>>(), "exports": exports.collect::<Vec<_>>(), "unused": idle.collect::<Vec<_>>()})
}
