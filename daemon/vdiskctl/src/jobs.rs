//! `vdiskctl mirror`, `backup`, `convert` and `job …`.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::{Value as Json, json};
use vdisk_api::{file_driver, format_size, parse_size};
use vdisk_dbus::ManagerProxy;
use zbus::Variant;

use crate::args::{Convert, Copy, Discard, Job, JobCommand, Merge, Mirror, Source};
use crate::daemon::Daemon;
use crate::error::{Error, Result};
use crate::objects::{Objects, Properties, name_of, properties};
use crate::options::{NbdUri, Options, absolute, options};
use crate::output::{Rows, names, number, print_json, print_pause, print_properties, text};

/// How often a bar moves, at most and at last: short jobs are not waited for long.
const FIRST_LOOK: Duration = Duration::from_millis(2);
const LOOK: Duration = Duration::from_millis(100);

fn percent(p: &Properties) -> String {
    let progress = p.get("Progress").and_then(Json::as_f64).unwrap_or(0.0);
    format!("{:.0} %", (progress * 100.0).floor())
}

/// The error of a job in words; empty if there is none.
fn trouble(p: &Properties) -> String {
    let error = p.get("Error").and_then(|e| e[1].as_str());
    error.unwrap_or_default().to_owned()
}

fn nodes(p: &Properties) -> String {
    names(p, "Objects").join(" → ")
}

/// One line for `vdiskctl tree`.
pub fn line(p: &Properties) -> String {
    let name = anstyle::AnsiColor::Magenta.on_default().bold();
    let mut line = format!(
        "{name}{}{name:#}  {} {}, {}, {}",
        text(p, "Id"),
        text(p, "Operation"),
        nodes(p),
        text(p, "State"),
        percent(p),
    );
    let trouble = trouble(p);
    if !trouble.is_empty() {
        line += &format!(" ({trouble})");
    }
    line
}

fn rows(objects: &Objects) -> Rows {
    let mut rows = Rows::new(&[
        "id", "job", "nodes", "state", ">done", ">of", ">rate", "error",
    ]);
    for (_, p) in objects.of("job") {
        rows.add(vec![
            text(p, "Id"),
            text(p, "Operation"),
            nodes(p),
            text(p, "State"),
            percent(p),
            format_size(number(p, "ProgressTotal")),
            format!("{}/s", format_size(number(p, "Rate"))),
            trouble(p),
        ]);
    }
    rows
}

fn bar() -> ProgressBar {
    // Nothing is drawn if this is no terminal.
    let bar = ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::stderr());
    let style = ProgressStyle::with_template(
        "{prefix:.bold} {bar:30.cyan/dim} {percent:>3} %  {binary_bytes} of {binary_total_bytes}  {binary_bytes_per_sec}  {msg}",
    );
    if let Ok(style) = style {
        bar.set_style(style.progress_chars("━━─"));
    }
    bar
}

/// What a job that is watched has come to.
#[derive(Clone, Copy, PartialEq, Eq)]
enum End {
    Concluded,
    Ready,
    /// It has paused for an error, or by somebody's wish.
    Resting,
}

/// Shows a job's progress until it has come to an end of `ends`. Ctrl-C cancels it if `owner` says so.
async fn watch(daemon: &Daemon, id: &str, ends: &[End], owner: bool) -> Result<Properties> {
    let proxy = daemon.job(id).await?;
    let bar = bar();
    bar.set_prefix(id.to_owned());
    let mut interrupted = false;
    let mut pause = FIRST_LOOK;
    loop {
        let objects = Objects::load(daemon).await?;
        let Ok(p) = objects.find("job", id) else {
            bar.finish_and_clear();
            return Err(Error::not_found(format!(
                "job '{id}' has ended and is gone; the daemon's log says how"
            )));
        };
        bar.set_length(number(p, "ProgressTotal"));
        bar.set_position(number(p, "ProgressDone"));
        let state = text(p, "State");
        bar.set_message(match state.as_str() {
            "running" => String::new(),
            other => format!("{other} {}", trouble(p)),
        });
        let end = match state.as_str() {
            "concluded" => Some(End::Concluded),
            "ready" => Some(End::Ready),
            "paused" | "standby" => Some(End::Resting),
            _ => None,
        };
        if end.is_some_and(|e| ends.contains(&e)) {
            bar.finish_and_clear();
            return Ok(p.clone());
        }
        tokio::select! {
            () = tokio::time::sleep(pause) => pause = (pause * 2).min(LOOK),
            _ = tokio::signal::ctrl_c(), if owner && !interrupted => {
                interrupted = true;
                let force = Options::from([("force", Variant::from(true))]);
                // It may have ended: then that is seen.
                let _ = proxy.cancel(force).await;
            }
        }
    }
}

fn check_success(p: &Properties) -> Result<()> {
    let error = trouble(p);
    if error.is_empty() {
        return Ok(());
    }
    let name = p.get("Error").and_then(|e| e[0].as_str());
    Err(Error::named(name.unwrap_or_default(), error))
}

/// Options of a job that is watched to its end, or goes on by itself.
pub fn watched<'a>(mut options: Options<'a>, operation: &str, detach: bool) -> Options<'a> {
    let id = format!("{operation}-{}", std::process::id());
    options.entry("job-id").or_insert_with(|| Variant::from(id));
    options
        .entry("auto-dismiss")
        .or_insert_with(|| Variant::from(detach));
    options
}

/// Shows a job's progress to its end, forgets it, and returns what it has found.
pub async fn result_of(daemon: &Daemon, path: &str) -> Result<Properties> {
    let id = name_of(path);
    let p = watch(daemon, &id, &[End::Concluded], true).await?;
    let proxy = daemon.job(&id);
    proxy.await?.dismiss(Options::new()).await?;
    check_success(&p)?;
    Ok(match p.get("Result") {
        Some(Json::Object(found)) => found.clone(),
        _ => Properties::new(),
    })
}

/// Discards the zeroes of a node, or of an image that nobody uses.
pub async fn discard(
    daemon: &Daemon,
    manager: &ManagerProxy<'_>,
    discard: &Discard,
    json: bool,
) -> Result<()> {
    let is_file = discard.source.contains('/');
    if is_file && discard.detach {
        return Err(Error::invalid(
            "--detach: an image is closed when the job has ended, which is waited for; leave it out",
        ));
    }
    let node = match is_file {
        false => discard.source.clone(),
        true => {
            let name = format!("discard-{}", std::process::id());
            let options = Options::from([
                ("node-name", Variant::from(name.clone())),
                ("driver", Variant::from(discard.format.as_str())),
                ("discard", Variant::from("unmap")),
                ("file.driver", Variant::from("file")),
                ("file.filename", absolute(&discard.source)),
            ]);
            let options = match discard.format.as_str() {
                // It may be an overlay, whose own data is all that matters here.
                "qcow2" => options
                    .into_iter()
                    .chain([("backing", Variant::from(""))])
                    .collect(),
                _ => options,
            };
            manager.add_node(options).await?;
            name
        }
    };
    let result = discard_node(daemon, discard, &node, json).await;
    if is_file {
        let opened = Target { node, made: None };
        opened.remove(daemon, true).await;
    }
    result
}

async fn discard_node(daemon: &Daemon, discard: &Discard, node: &str, json: bool) -> Result<()> {
    Objects::load(daemon).await?.find("node", node)?;
    let proxy = daemon.node(node);
    let mut options = watched(options(&discard.options)?, "discard", discard.detach);
    set_speed(&mut options, discard.speed.as_deref())?;
    let path = proxy.await?.discard(options).await?;
    if discard.detach {
        return goes_on(&name_of(path.as_str()), json);
    }
    let found = result_of(daemon, path.as_str()).await?;
    match json {
        true => print_json(&Json::Object(found)),
        false => anstream::println!("{} given back", format_size(number(&found, "freed"))),
    }
    Ok(())
}

pub fn goes_on(id: &str, json: bool) -> Result<()> {
    match json {
        true => print_json(&json!({"job": id})),
        false => anstream::println!("job '{id}' goes on: vdiskctl job watch {id}"),
    }
    Ok(())
}

/// Says what became of a job that was watched to its end, and forgets it.
async fn conclude(daemon: &Daemon, p: &Properties, done: &str, json: bool) -> Result<()> {
    let id = text(p, "Id");
    let proxy = daemon.job(&id).await?;
    proxy.dismiss(Options::new()).await?;
    check_success(p)?;
    if json {
        print_json(&Json::Object(p.clone()));
    } else {
        let start = number(p, "StartTime");
        let time = number(p, "ExpectedEndTime").saturating_sub(start) as f64 / 1e6;
        anstream::println!(
            "{done}: {} in {time:.1} s ({}/s)",
            format_size(number(p, "ProgressDone")),
            format_size(number(p, "Rate")),
        );
    }
    Ok(())
}

/// A node for the image that a job writes.
struct Target {
    node: String,
    /// The image was made for the job.
    made: Option<String>,
}

impl Target {
    /// Makes the image, if it is not there, and adds a node for it.
    async fn add(
        manager: &ManagerProxy<'_>,
        copy: &Copy,
        size: u64,
        node: String,
    ) -> Result<Target> {
        if let Some(uri) = NbdUri::parse(&copy.filename) {
            return Target::connect(manager, copy, uri?, node).await;
        }
        let mut made = None;
        if !copy.existing {
            let options = Options::from([
                ("filename", absolute(&copy.filename)),
                ("size", Variant::from(size)),
                ("driver", Variant::from(copy.format.as_str())),
            ]);
            manager.create_image(options).await?;
            made = Some(copy.filename.clone());
        }
        let mut options = options(&copy.target)?;
        for (key, value) in [
            ("driver", copy.format.as_str()),
            ("file.driver", file_driver(&copy.filename)),
            ("discard", "unmap"),
        ] {
            options.entry(key).or_insert_with(|| Variant::from(value));
        }
        options.insert("node-name", Variant::from(node.clone()));
        options.insert("file.filename", absolute(&copy.filename));
        match manager.add_node(options).await {
            Ok(_) => Ok(Target { node, made }),
            Err(e) => {
                // A node of that name is somebody else's.
                if let Some(file) = made {
                    let _ = std::fs::remove_file(file);
                }
                Err(e.into())
            }
        }
    }

    /// Adds a node for the disk of a server, which is there.
    async fn connect(
        manager: &ManagerProxy<'_>,
        copy: &Copy,
        server: NbdUri,
        node: String,
    ) -> Result<Target> {
        let mut options = options(&copy.target)?;
        for (key, value) in [
            ("driver", "nbd"),
            ("server.type", "unix"),
            ("server.path", &server.socket),
            ("export", &server.export),
            ("discard", "unmap"),
            ("node-name", &node),
        ] {
            options.insert(key, Variant::from(value.to_owned()));
        }
        manager.add_node(options).await?;
        Ok(Target { node, made: None })
    }

    /// Closes the node, and deletes an image that was made for nothing.
    async fn remove(self, daemon: &Daemon, keep: bool) {
        let proxy = daemon.node(&self.node);
        if let Ok(node) = proxy.await {
            let _ = node.remove(Options::new()).await;
        }
        if let (Some(file), false) = (self.made, keep) {
            let _ = std::fs::remove_file(file);
        }
    }
}

/// Adds "speed", if there is one.
pub fn set_speed(options: &mut Options<'_>, speed: Option<&str>) -> Result<()> {
    if let Some(speed) = speed {
        options.insert("speed", Variant::from(bytes_per_second(speed)?));
    }
    Ok(())
}

fn bytes_per_second(speed: &str) -> Result<u64> {
    parse_size(speed).ok_or_else(|| {
        Error::invalid(format!(
            "'{speed}' is not a speed: give bytes per second, or a number with k, M or G; 0 for no limit"
        ))
    })
}

/// Options of the job itself.
fn job_options<'a>(copy: &'a Copy, target: &'a str) -> Result<Options<'a>> {
    let mut all = options(&copy.options)?;
    all.insert("target", Variant::from(target));
    all.entry("auto-dismiss")
        .or_insert_with(|| Variant::from(copy.detach));
    set_speed(&mut all, copy.speed.as_deref())?;
    if let Some(sync) = &copy.sync {
        all.insert("sync", Variant::from(sync.as_str()));
    }
    if copy.compress {
        all.insert("compress", Variant::from(true));
    }
    Ok(all)
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Backup,
    Mirror,
    Convert,
}

/// Makes the image that is copied to, with its node `name`, and starts a job; its id. Nothing stays of what cannot be started.
async fn start(
    daemon: &Daemon,
    manager: &ManagerProxy<'_>,
    kind: Kind,
    node: &str,
    copy: &Copy,
    name: String,
    more: Options<'_>,
) -> Result<(String, Target)> {
    let objects = Objects::load(daemon).await?;
    let size = number(objects.find("node", node)?, "Size");
    let target = Target::add(manager, copy, size, name).await?;
    let started = async {
        let name = target.node.clone();
        let mut options = job_options(copy, &name)?;
        for (key, value) in more {
            options.entry(key).or_insert(value);
        }
        let proxy = daemon.node(node);
        let proxy = proxy.await?;
        let path = match kind {
            Kind::Backup => proxy.backup(options).await?,
            Kind::Mirror => proxy.mirror(options).await?,
            Kind::Convert => proxy.convert(options).await?,
        };
        Ok(name_of(path.as_str()))
    };
    match started.await {
        Ok(id) => Ok((id, target)),
        Err(e) => {
            target.remove(daemon, false).await;
            Err(e)
        }
    }
}

/// The name of the copy's node.
fn copy_name(copy: &Copy, node: &str, suffix: &str) -> String {
    let name = copy.name.clone();
    name.unwrap_or_else(|| format!("{}-{suffix}", node.trim_start_matches('#')))
}

pub async fn backup(
    daemon: &Daemon,
    manager: &ManagerProxy<'_>,
    node: &str,
    copy: &Copy,
    json: bool,
) -> Result<()> {
    let name = copy_name(copy, node, "backup");
    let none = Options::new();
    let (id, target) = start(daemon, manager, Kind::Backup, node, copy, name, none).await?;
    if copy.detach {
        return started_in_background(&id, &target.node, json);
    }
    let p = watch(daemon, &id, &[End::Concluded], true).await?;
    let failed = !trouble(&p).is_empty();
    let result = conclude(daemon, &p, "backed up", json).await;
    target.remove(daemon, !failed).await;
    result
}

fn started_in_background(id: &str, target: &str, json: bool) -> Result<()> {
    match json {
        true => print_json(&json!({"job": id, "target": target})),
        false => anstream::println!(
            "job '{id}' goes on: vdiskctl job watch {id}; remove node '{target}' when it has ended"
        ),
    }
    Ok(())
}

pub async fn mirror(
    daemon: &Daemon,
    manager: &ManagerProxy<'_>,
    mirror: &Mirror,
    json: bool,
) -> Result<()> {
    let (node, copy) = (&mirror.node, &mirror.copy);
    let name = copy_name(copy, node, "mirror");
    let mut more = Options::new();
    if mirror.write_blocking {
        more.insert("copy-mode", Variant::from("write-blocking"));
    }
    let (id, target) = start(daemon, manager, Kind::Mirror, node, copy, name, more).await?;
    let name = target.node.clone();
    if copy.detach {
        return started_in_background(&id, &name, json);
    }
    let mut p = watch(daemon, &id, &[End::Concluded, End::Ready], true).await?;
    let job = daemon.job(&id).await?;
    if text(&p, "State") == "ready" {
        match mirror.pivot {
            true => job.complete(Options::new()).await?,
            false => job.cancel(Options::new()).await?,
        }
        p = watch(daemon, &id, &[End::Concluded], true).await?;
    }
    let failed = !trouble(&p).is_empty();
    let done = match mirror.pivot {
        true => format!("'{name}' has the place of '{node}' now"),
        false => "mirrored".to_owned(),
    };
    let result = conclude(daemon, &p, &done, json).await;
    if failed || !mirror.pivot {
        target.remove(daemon, !failed).await;
    }
    result
}

/// Starts a mirror, and shows its progress until it is ready; its id. Nothing stays of one that fails.
pub async fn mirror_until_ready(
    daemon: &Daemon,
    node: &str,
    mut options: Options<'_>,
) -> Result<String> {
    options.insert("auto-dismiss", Variant::from(false));
    let path = daemon.node(node).await?.mirror(options).await?;
    let id = name_of(path.as_str());
    let p = watch(daemon, &id, &[End::Concluded, End::Ready], true).await?;
    if text(&p, "State") == "ready" {
        return Ok(id);
    }
    daemon.job(&id).await?.dismiss(Options::new()).await?;
    check_success(&p)?;
    Err(Error::failed(format!("job '{id}' has ended too early")))
}

/// Waits until a job is over.
pub async fn until_over(daemon: &Daemon, id: &str) -> Result<()> {
    watch(daemon, id, &[End::Concluded], false).await.map(drop)
}

/// Commits an overlay, or streams into it.
pub async fn merge(daemon: &Daemon, merge: &Merge, commit: bool, json: bool) -> Result<()> {
    let node = &merge.node;
    Objects::load(daemon).await?.find("node", node)?;
    let proxy = daemon.node(node);
    let proxy = proxy.await?;
    let mut options = options(&merge.options)?;
    if let Some(base) = &merge.base {
        options.insert("base-node", Variant::from(base.as_str()));
    }
    options
        .entry("auto-dismiss")
        .or_insert_with(|| Variant::from(merge.detach));
    set_speed(&mut options, merge.speed.as_deref())?;
    let path = match commit {
        true => proxy.commit(options).await?,
        false => proxy.stream(options).await?,
    };
    let id = name_of(path.as_str());
    if merge.detach {
        return goes_on(&id, json);
    }
    let mut p = watch(daemon, &id, &[End::Concluded, End::Ready], true).await?;
    if text(&p, "State") == "ready" {
        let job = daemon.job(&id);
        job.await?.complete(Options::new()).await?;
        p = watch(daemon, &id, &[End::Concluded], true).await?;
    }
    let done = match commit {
        true => "committed",
        false => "streamed",
    };
    conclude(daemon, &p, done, json).await
}

/// Copies an image file, or a node that nobody writes to.
pub async fn convert(
    daemon: &Daemon,
    manager: &ManagerProxy<'_>,
    convert: &Convert,
    json: bool,
) -> Result<()> {
    let copy = &convert.copy;
    if copy.detach {
        return Err(Error::invalid(
            "--detach: convert closes its nodes when it has ended, and waits for that; leave it out",
        ));
    }
    let source = Opened::add(manager, &convert.source, &convert.from, "convert").await?;
    let result = convert_node(daemon, manager, source.node(), copy, json).await;
    source.remove(daemon).await;
    result
}

/// What is to be looked at: a node, or a file that is opened for this.
pub enum Opened {
    Node(String),
    File(String),
}

impl Opened {
    pub async fn add(
        manager: &ManagerProxy<'_>,
        source: &str,
        from: &Source,
        purpose: &str,
    ) -> Result<Opened> {
        if !source.contains('/') {
            return Ok(Opened::Node(source.to_owned()));
        }
        let name = format!("{purpose}-source-{}", std::process::id());
        let mut options = options(&from.options)?;
        for (key, value) in [("driver", from.from.as_str()), ("file.driver", "file")] {
            options.entry(key).or_insert_with(|| Variant::from(value));
        }
        options.insert("node-name", Variant::from(name.as_str()));
        options.insert("read-only", Variant::from(true));
        options.insert("file.filename", absolute(source));
        manager.add_node(options).await?;
        Ok(Opened::File(name))
    }

    pub fn node(&self) -> &str {
        match self {
            Opened::Node(name) | Opened::File(name) => name,
        }
    }

    pub async fn remove(self, daemon: &Daemon) {
        if let Opened::File(node) = self {
            let opened = Target { node, made: None };
            opened.remove(daemon, true).await;
        }
    }
}

async fn convert_node(
    daemon: &Daemon,
    manager: &ManagerProxy<'_>,
    source: &str,
    copy: &Copy,
    json: bool,
) -> Result<()> {
    let me = std::process::id();
    let name = copy.name.clone();
    let name = name.unwrap_or_else(|| format!("convert-target-{me}"));
    let more = Options::from([("job-id", Variant::from(format!("convert-{me}")))]);
    let (id, target) = start(daemon, manager, Kind::Convert, source, copy, name, more).await?;
    let p = watch(daemon, &id, &[End::Concluded], true).await?;
    let result = conclude(daemon, &p, "converted", json).await;
    target.remove(daemon, result.is_ok()).await;
    result
}

pub async fn transaction(
    manager: &ManagerProxy<'_>,
    actions: &[String],
    grouped: bool,
    json: bool,
) -> Result<()> {
    let words: Vec<Vec<String>> = actions
        .iter()
        .map(|action| action.split(',').map(str::to_owned).collect())
        .collect();
    let mut all = Vec::new();
    for words in &words {
        let (kind, words) = words
            .split_first()
            .ok_or_else(|| Error::invalid("an action is empty: write KIND,KEY=VALUE,…"))?;
        let mut map = options(words)?;
        if let Some(Variant::Str(names)) = map.get("sources") {
            let names: Vec<String> = names.split('+').map(str::to_owned).collect();
            map.insert("sources", Variant::from(names));
        }
        all.push((kind.as_str(), map));
    }
    let mut options = Options::new();
    if grouped {
        options.insert("completion-mode", Variant::from("grouped"));
    }
    let (jobs, report) = manager.transaction(all, options).await?;
    let jobs: Vec<String> = jobs.iter().map(|path| name_of(path.as_str())).collect();
    let mut report = properties(report);
    report.insert("jobs".into(), jobs.clone().into());
    let what = match jobs.is_empty() {
        true => "done".to_owned(),
        false => format!("done, jobs: {}", jobs.join(", ")),
    };
    print_pause(&what, report, json);
    Ok(())
}

pub async fn job(daemon: &Daemon, command: JobCommand, json: bool) -> Result<()> {
    let objects = Objects::load(daemon).await?;
    let id = match &command {
        JobCommand::List => {
            match json {
                true => {
                    let all = objects.of("job").map(|(_, p)| Json::Object(p.clone()));
                    print_json(&all.collect::<Json>());
                }
                false => rows(&objects).print(),
            }
            return Ok(());
        }
        JobCommand::Show(job)
        | JobCommand::Watch(job)
        | JobCommand::Pause(job)
        | JobCommand::Resume(job)
        | JobCommand::Complete(job)
        | JobCommand::Finalize(job)
        | JobCommand::Dismiss(job) => job,
        JobCommand::Cancel { job, .. } | JobCommand::Speed { job, .. } => job,
        JobCommand::Set { job, .. } => job,
    };
    let Job { id } = id;
    let found = objects.find("job", id)?;
    let proxy = daemon.job(id).await?;
    match &command {
        JobCommand::List => {}
        JobCommand::Show(_) if json => print_json(&Json::Object(found.clone())),
        JobCommand::Show(_) => print_properties(found),
        JobCommand::Watch(_) => {
            let ends = [End::Concluded, End::Ready, End::Resting];
            let p = watch(daemon, id, &ends, false).await?;
            match json {
                true => print_json(&Json::Object(p)),
                false => anstream::println!("{}", line(&p)),
            }
        }
        JobCommand::Pause(_) => proxy.pause(Options::new()).await?,
        JobCommand::Resume(_) => proxy.resume(Options::new()).await?,
        JobCommand::Complete(_) => proxy.complete(Options::new()).await?,
        JobCommand::Finalize(_) => proxy.finalize(Options::new()).await?,
        JobCommand::Dismiss(_) => proxy.dismiss(Options::new()).await?,
        JobCommand::Cancel { force, .. } => {
            let options = Options::from([("force", Variant::from(*force))]);
            proxy.cancel(options).await?;
        }
        JobCommand::Speed { speed, .. } => {
            let bytes = bytes_per_second(speed)?;
            proxy.set_speed(bytes, Options::new()).await?;
        }
        JobCommand::Set { options: words, .. } => proxy.change(options(words)?).await?,
    }
    Ok(())
}
