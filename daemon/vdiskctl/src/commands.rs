//! What each command does.

use std::collections::HashMap;

use clap::CommandFactory;
use futures_util::StreamExt;
use serde_json::Value as Json;
use vdisk_api::{format_size, parse_size};
use vdisk_dbus::ManagerProxy;
use zbus::Variant;

use crate::args::{AddExport, Args, Command, Export, IoThread, Node};
use crate::daemon::{self, Daemon};
use crate::error::{Error, Result};
use crate::objects::{Objects, Properties, properties};
use crate::options::{Options, options, pass_files};
use crate::output::{
    Rows, flag, format_ns, names, number, print_json, print_pause, print_properties, text,
};
use crate::{bitmaps, fleece, images, jobs, secrets, stats, status, throttle, top, tree};

fn print_object(p: &Properties, json: bool) {
    if json {
        print_json(&Json::Object(p.clone()));
    } else {
        print_properties(p);
    }
}

fn print_list(objects: &Objects, kind: &str, json: bool, rows: impl FnOnce(&Objects) -> Rows) {
    if json {
        let all: Vec<Json> = objects
            .of(kind)
            .map(|(_, p)| Json::Object(p.clone()))
            .collect();
        print_json(&Json::Array(all));
    } else {
        rows(objects).print();
    }
}

fn node_rows(objects: &Objects) -> Rows {
    let mut rows = Rows::new(&["name", "driver", ">size", "access", "used by", "file"]);
    for (_, p) in objects.of("node") {
        rows.add(vec![
            text(p, "Name"),
            text(p, "Driver"),
            format_size(number(p, "Size")),
            if flag(p, "ReadOnly") {
                "read-only"
            } else {
                "read-write"
            }
            .into(),
            names(p, "Parents").join(", "),
            text(p, "Filename"),
        ]);
    }
    rows
}

fn export_rows(objects: &Objects) -> Rows {
    let mut rows = Rows::new(&[
        "id", "type", "node", "access", ">queues", ">clients", "path", "socket",
    ]);
    for (_, p) in objects.of("export") {
        rows.add(vec![
            text(p, "Id"),
            text(p, "Kind"),
            names(p, "Node").join(""),
            if flag(p, "Writable") {
                "read-write"
            } else {
                "read-only"
            }
            .into(),
            match p.get("NumQueues") {
                Some(_) => number(p, "NumQueues").to_string(),
                None => "-".to_owned(),
            },
            number(p, "Clients").to_string(),
            text(p, "Path"),
            text(p, "Socket"),
        ]);
    }
    rows
}

fn iothread_rows(objects: &Objects) -> Rows {
    let mut rows = Rows::new(&["name", "engine", "cpus", ">polling", ">queues"]);
    for (_, p) in objects.of("iothread") {
        let list = |key| {
            p.get(key)
                .and_then(Json::as_array)
                .cloned()
                .unwrap_or_default()
        };
        let cpus: Vec<String> = list("Cpus").iter().map(Json::to_string).collect();
        rows.add(vec![
            text(p, "Name"),
            text(p, "Engine"),
            if cpus.is_empty() {
                "any".into()
            } else {
                cpus.join(",")
            },
            match number(p, "PollMax") {
                0 => "off".into(),
                ns => format!("≤ {}", format_ns(ns)),
            },
            list("Queues").len().to_string(),
        ]);
    }
    rows
}

/// Prints to standard output; a reader that went away (a pager, `head`) is no error.
fn write_out(bytes: &[u8]) {
    use std::io::Write;
    let _ = std::io::stdout().write_all(bytes);
}

pub async fn run(args: Args) -> Result<()> {
    match &args.command {
        Command::Completion { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(*shell, &mut Args::command(), "vdiskctl", &mut script);
            write_out(&script);
            return Ok(());
        }
        Command::Man => {
            let mut page = Vec::new();
            man_page(Args::command(), "vdiskctl", &mut page)
                .map_err(|e| Error::failed(e.to_string()))?;
            write_out(&page);
            return Ok(());
        }
        _ => {}
    }
    if let Command::Domain { args: words } = &args.command {
        return Err(run_domain(&args, words));
    }
    let daemon = daemon::connect(&args.connection).await?;
    let manager = daemon.manager().await?;
    let json = args.json;
    match args.command {
        Command::Node(command) => node(&daemon, &manager, command, json).await,
        Command::Image(command) => images::image(&daemon, &manager, command, json).await,
        Command::Secret(command) => secrets::secret(&manager, command, json).await,
        Command::Throttle(command) => throttle::throttle(&daemon, &manager, command, json).await,
        Command::Snapshot(command) => images::snapshot(&daemon, &manager, command, json).await,
        Command::Backup { node, copy } => jobs::backup(&daemon, &manager, &node, &copy, json).await,
        Command::Fleece(command) => fleece::fleece(&daemon, &manager, command, json).await,
        Command::Mirror(mirror) => jobs::mirror(&daemon, &manager, &mirror, json).await,
        Command::Commit(merge) => jobs::merge(&daemon, &merge, true, json).await,
        Command::Stream(merge) => jobs::merge(&daemon, &merge, false, json).await,
        Command::Convert(convert) => jobs::convert(&daemon, &manager, &convert, json).await,
        Command::Discard(discard) => jobs::discard(&daemon, &manager, &discard, json).await,
        Command::Transaction { actions, grouped } => {
            jobs::transaction(&manager, &actions, grouped, json).await
        }
        Command::Bitmap(command) => bitmaps::bitmap(&daemon, command, json).await,
        Command::Job(command) => jobs::job(&daemon, command, json).await,
        Command::Export(command) => export(&daemon, &manager, command, json).await,
        Command::IoThread(command) => iothread(&daemon, &manager, command, json).await,
        Command::Tree => {
            let objects = Objects::load(&daemon).await?;
            if json {
                print_json(&tree::json(&objects));
            } else {
                tree::print(&objects);
            }
            Ok(())
        }
        Command::Stats(s) => stats::run(&manager, s.export.as_deref(), s.watch, json).await,
        Command::Status => status::run(&daemon, &manager, json).await,
        Command::Top { delay, iterations } => top::run(&daemon, &manager, delay, iterations).await,
        Command::Info => info(&manager, json).await,
        Command::Completion { .. } | Command::Man | Command::Domain { .. } => Ok(()),
    }
}

/// Becomes vdiskctl-domain, which is a program of its own: not everybody has libvirt. Returns only what is in the way.
fn run_domain(args: &Args, words: &[std::ffi::OsString]) -> Error {
    use std::os::unix::process::CommandExt;
    let to = &args.connection;
    let beside = std::env::current_exe().ok();
    let beside = beside.map(|me| me.with_file_name("vdiskctl-domain"));
    let program = beside.filter(|p| p.exists());
    let mut command = std::process::Command::new(program.unwrap_or("vdiskctl-domain".into()));
    if to.session {
        command.arg("--session");
    }
    if let Some(address) = &to.bus_address {
        command.arg("--bus-address").arg(address);
    }
    if let Some(instance) = &to.instance {
        command.arg("--instance").arg(instance);
    }
    if args.json {
        command.arg("--json");
    }
    let e = command.args(words).exec();
    match e.kind() {
        std::io::ErrorKind::NotFound => Error::failed(
            "vdiskctl-domain is not installed: it is in the package vdiskd-libvirt, which needs libvirt's client library",
        ),
        _ => Error::failed(format!("vdiskctl-domain cannot be run: {e}")),
    }
}

/// One page for the command and all its subcommands.
pub fn man_page(mut root: clap::Command, name: &str, out: &mut Vec<u8>) -> std::io::Result<()> {
    root.build();
    let man = clap_mangen::Man::new(root.clone()).section("1");
    man.render_title(out)?;
    man.render_name_section(out)?;
    man.render_synopsis_section(out)?;
    man.render_description_section(out)?;
    man.render_options_section(out)?;
    fn commands(command: &clap::Command, prefix: &str, out: &mut Vec<u8>) -> std::io::Result<()> {
        use std::io::Write;
        for sub in command.get_subcommands() {
            if sub.is_hide_set() || sub.get_name() == "help" {
                continue;
            }
            let name = format!("{prefix} {}", sub.get_name());
            if sub.has_subcommands() {
                commands(sub, &name, out)?;
                continue;
            }
            let title = name.replace('-', "\\-").to_uppercase();
            writeln!(out, ".SH \"{title}\"")?;
            let man = clap_mangen::Man::new(sub.clone());
            let mut part = Vec::new();
            man.render_description_section(&mut part)?;
            man.render_options_section(&mut part)?;
            let text = String::from_utf8_lossy(&part)
                .replace(".SH DESCRIPTION\n", "")
                .replace(".SH OPTIONS\n", "");
            out.extend(text.as_bytes());
        }
        Ok(())
    }
    commands(&root, name, out)
}

async fn set_active(daemon: &Daemon, name: &str, active: bool) -> Result<()> {
    Objects::load(daemon).await?.find("node", name)?;
    let node = daemon.node(name).await?;
    Ok(node.set_active(active, Options::new()).await?)
}

pub async fn node(
    daemon: &Daemon,
    manager: &ManagerProxy<'_>,
    command: Node,
    json: bool,
) -> Result<()> {
    match command {
        Node::Add {
            name,
            pass,
            options: words,
        } => {
            let mut options = options(&words)?;
            if pass {
                pass_files(&mut options)?;
            }
            options.insert("node-name", Variant::from(name.as_str()));
            manager.add_node(options).await?;
        }
        Node::Remove { name } => {
            let objects = Objects::load(daemon).await?;
            match objects.find("node", &name) {
                Ok(_) => daemon.node(&name).await?.remove(HashMap::new()).await?,
                // One that could not be restored has no object.
                Err(e) => manager
                    .forget_lost("node", &name, HashMap::new())
                    .await
                    .map_err(|_| e)?,
            }
        }
        Node::Resize { name, size, shrink } => {
            let objects = Objects::load(daemon).await?;
            let before = number(objects.find("node", &name)?, "Size");
            let bad = || {
                Error::invalid(format!(
                    "'{size}' is not a size: give bytes or a number with k, M, G or T, with + in front to add"
                ))
            };
            let new = match size.strip_prefix('+') {
                Some(more) => parse_size(more).and_then(|m| before.checked_add(m)),
                None => parse_size(&size),
            };
            let mut options = Options::new();
            if shrink {
                options.insert("shrink", Variant::from(true));
            }
            let node = daemon.node(&name).await?;
            node.resize(new.ok_or_else(bad)?, options).await?;
        }
        Node::Insert {
            node,
            name,
            options: words,
        } => {
            Objects::load(daemon).await?.find("node", &node)?;
            let mut options = options(&words)?;
            options.insert("node-name", Variant::from(name.as_str()));
            let (_, report) = daemon.node(&node).await?.insert_filter(options).await?;
            print_pause(
                &format!("'{name}' is over '{node}' now"),
                properties(report),
                json,
            );
        }
        Node::Set {
            name,
            options: words,
        } => {
            Objects::load(daemon).await?.find("node", &name)?;
            daemon.node(&name).await?.reopen(options(&words)?).await?;
        }
        Node::Activate { name } => set_active(daemon, &name, true).await?,
        Node::Deactivate { name } => set_active(daemon, &name, false).await?,
        Node::Replace { name, with } => {
            let objects = Objects::load(daemon).await?;
            objects.find("node", &name)?;
            objects.find("node", &with)?;
            let proxy = daemon.node(&name).await?;
            let report = proxy.replace(&with, Options::new()).await?;
            print_pause(
                &format!("'{with}' has the place of '{name}' now"),
                properties(report),
                json,
            );
        }
        Node::Threshold { name, offset, wait } => {
            Objects::load(daemon).await?.find("node", &name)?;
            let bytes = parse_size(&offset).ok_or_else(|| {
                Error::invalid(format!(
                    "'{offset}' is not an offset: give bytes or a number with k, M, G or T; 0 for none"
                ))
            })?;
            let proxy = daemon.node(&name).await?;
            let mut reached = proxy.receive_write_threshold_exceeded().await?;
            proxy.set_write_threshold(bytes, Options::new()).await?;
            if wait && bytes > 0 {
                let signal = reached.next().await;
                let args = signal.as_ref().map(|s| s.args()).transpose()?;
                let amount = args.map_or(0, |a| *a.amount());
                match json {
                    true => print_json(&serde_json::json!({"threshold": bytes, "amount": amount})),
                    false => anstream::println!("a write reached {amount} bytes beyond {offset}"),
                }
            }
        }
        Node::TakeOut { name } => {
            Objects::load(daemon).await?.find("node", &name)?;
            let report = daemon.node(&name).await?.take_out(Options::new()).await?;
            print_pause(&format!("'{name}' is gone"), properties(report), json);
        }
        Node::Flush { name } => {
            Objects::load(daemon).await?.find("node", &name)?;
            daemon.node(&name).await?.flush(HashMap::new()).await?;
        }
        Node::GoOn { name, tag } => {
            Objects::load(daemon).await?.find("node", &name)?;
            daemon
                .node(&name)
                .await?
                .go_on(&tag, Options::new())
                .await?;
        }
        Node::Check { name, repair } => {
            Objects::load(daemon).await?.find("node", &name)?;
            let mut options = Options::new();
            if let Some(what) = &repair {
                options.insert("repair", Variant::from(what.as_str()));
            }
            let options = jobs::watched(options, "check", false);
            let path = daemon.node(&name).await?.start_check(options).await?;
            let report = jobs::result_of(daemon, path.as_str()).await?;
            return images::print_report(&report, json);
        }
        Node::List => print_list(&Objects::load(daemon).await?, "node", json, node_rows),
        Node::Show { name } => {
            print_object(Objects::load(daemon).await?.find("node", &name)?, json);
        }
    }
    Ok(())
}

async fn export(
    daemon: &Daemon,
    manager: &ManagerProxy<'_>,
    command: Export,
    json: bool,
) -> Result<()> {
    match command {
        Export::Add(add) => {
            add_export(manager, &add).await?;
            if add.persistent
                && let Err(e) = set_export(daemon, &add.id, true).await
            {
                // All of it or nothing.
                let export = daemon.export(&add.id).await?;
                export.remove(HashMap::new()).await?;
                return Err(e);
            }
        }
        Export::Set { id, options: words } => {
            Objects::load(daemon).await?.find("export", &id)?;
            for (key, value) in options(&words)? {
                if key != "persistent" {
                    return Err(Error::invalid(format!(
                        "option '{key}' cannot be changed: there is 'persistent'"
                    )));
                }
                let on = match &value {
                    Variant::Str(s) if ["on", "yes", "true"].contains(&s.as_str()) => true,
                    Variant::Str(s) if ["off", "no", "false"].contains(&s.as_str()) => false,
                    _ => {
                        return Err(Error::invalid(
                            "option 'persistent': give on or off".to_owned(),
                        ));
                    }
                };
                set_export(daemon, &id, on).await?;
            }
        }
        Export::Remove { id } => {
            let objects = Objects::load(daemon).await?;
            match objects.find("export", &id) {
                Ok(_) => {
                    let export = daemon.export(&id).await?;
                    export.remove(HashMap::new()).await?;
                }
                // One that could not be restored has no object.
                Err(e) => manager
                    .forget_lost("export", &id, HashMap::new())
                    .await
                    .map_err(|_| e)?,
            }
        }
        Export::List => print_list(&Objects::load(daemon).await?, "export", json, export_rows),
        Export::Show { id } => {
            print_object(Objects::load(daemon).await?.find("export", &id)?, json);
        }
    }
    Ok(())
}

async fn set_export(daemon: &Daemon, id: &str, persistent: bool) -> Result<()> {
    let export = daemon.export(id).await?;
    Ok(export.set_persistent(persistent, Options::new()).await?)
}

async fn add_export(manager: &ManagerProxy<'_>, add: &AddExport) -> Result<()> {
    let mut options = options(&add.options)?;
    let mut set = |key, value: Variant<'static>| match options.insert(key, value) {
        None => Ok(()),
        Some(_) => Err(Error::invalid(format!("option '{key}' is given twice"))),
    };
    set("id", Variant::from(add.id.clone()))?;
    set("type", Variant::from(add.kind.clone()))?;
    set("node-name", Variant::from(add.node.clone()))?;
    if let Some(name) = add.socket.as_deref().and_then(|s| s.strip_prefix("fd:")) {
        set("addr.type", Variant::from("fd"))?;
        set("addr.str", Variant::from(name.to_owned()))?;
    } else if let Some(path) = &add.socket {
        // The daemon's working directory is not ours.
        let path = std::path::absolute(path).map_err(|e| Error::invalid(e.to_string()))?;
        set("addr.type", Variant::from("unix"))?;
        set("addr.path", Variant::from(path.display().to_string()))?;
    }
    if add.writable {
        set("writable", Variant::from(true))?;
    }
    if let Some(n) = add.queues {
        set("num-queues", Variant::from(n))?;
    }
    if let Some(serial) = &add.serial {
        set("serial", Variant::from(serial.clone()))?;
    }
    if !add.iothread.is_empty() {
        set("iothread", Variant::from(add.iothread.clone()))?;
    }
    if !add.pin.is_empty() {
        let mapping = add.pin.iter().map(|pin| {
            let (queue, name) = pin.split_once('=').ok_or_else(|| {
                Error::invalid(format!("--pin '{pin}': write QUEUE=NAME, such as 0=io1"))
            })?;
            let queue: u16 = queue.parse().map_err(|_| {
                Error::invalid(format!("--pin '{pin}': '{queue}' is not a queue number"))
            })?;
            Ok(HashMap::from([
                ("iothread", Variant::from(name.to_owned())),
                ("vqs", Variant::from(vec![queue])),
            ]))
        });
        let mapping: Vec<HashMap<&str, Variant<'static>>> = mapping.collect::<Result<_>>()?;
        set("iothread-vq-mapping", Variant::from(mapping))?;
    }
    manager.add_export(options).await?;
    Ok(())
}

async fn iothread(
    daemon: &Daemon,
    manager: &ManagerProxy<'_>,
    command: IoThread,
    json: bool,
) -> Result<()> {
    match command {
        IoThread::Add {
            name,
            options: words,
        } => {
            manager.add_io_thread(&name, options(&words)?).await?;
        }
        IoThread::Set {
            name,
            options: words,
        } => {
            Objects::load(daemon).await?.find("iothread", &name)?;
            let thread = daemon.iothread(&name).await?;
            thread.update(options(&words)?).await?;
        }
        IoThread::Remove { name } => {
            Objects::load(daemon).await?.find("iothread", &name)?;
            daemon.iothread(&name).await?.remove(HashMap::new()).await?;
        }
        IoThread::List => print_list(
            &Objects::load(daemon).await?,
            "iothread",
            json,
            iothread_rows,
        ),
        IoThread::Show { name } => {
            let objects = Objects::load(daemon).await?;
            print_object(objects.find("iothread", &name)?, json);
        }
    }
    Ok(())
}

async fn info(manager: &ManagerProxy<'_>, json: bool) -> Result<()> {
    let mut p = Properties::new();
    p.insert("Version".into(), manager.version().await?.into());
    p.insert("IoEngine".into(), manager.io_engine().await?.into());
    p.insert("Drivers".into(), manager.drivers().await?.into());
    p.insert("ExportKinds".into(), manager.export_kinds().await?.into());
    p.insert("Problems".into(), manager.problems().await?.into());
    print_object(&p, json);
    Ok(())
}
