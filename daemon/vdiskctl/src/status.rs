//! `vdiskctl status`: how the daemon is.

use serde_json::{Value as Json, json};
use vdisk_api::format_size;
use vdisk_dbus::ManagerProxy;

use crate::daemon::Daemon;
use crate::error::Result;
use crate::objects::{Objects, name_of};
use crate::output::{format_time, names, number, print_json, text};

fn count(n: usize, one: &str, more: &str) -> String {
    match n {
        0 => format!("no {more}"),
        1 => format!("1 {one}"),
        n => format!("{n} {more}"),
    }
}

/// `2 d 3 h`, `5 min`, `12 s`.
fn duration(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} min", seconds / 60),
        3600..86400 => format!("{} h {} min", seconds / 3600, seconds / 60 % 60),
        _ => format!("{} d {} h", seconds / 86400, seconds / 3600 % 24),
    }
}

pub async fn run(daemon: &Daemon, manager: &ManagerProxy<'_>, json: bool) -> Result<()> {
    let objects = Objects::load(daemon).await?;
    let (version, started) = (manager.version().await?, manager.start_time().await?);
    let (engine, problems) = (manager.io_engine().await?, manager.problems().await?);
    let exports: Vec<_> = objects.of("export").map(|(_, p)| p).collect();
    let connected = exports.iter().filter(|p| number(p, "Clients") > 0).count();
    let slow: Vec<_> = exports
        .iter()
        .filter(|p| text(p, "Path") == "slow")
        .collect();
    let jobs: Vec<_> = objects.of("job").map(|(_, p)| p).collect();
    let nodes = objects.of("node").count();
    let threads: Vec<String> = objects
        .of("iothread")
        .map(|(path, _)| name_of(path))
        .collect();
    if json {
        let jobs: Vec<Json> = jobs
            .iter()
            .map(|p| json!({"Id": p["Id"], "Operation": p["Operation"], "State": p["State"], "Progress": p["Progress"]}))
            .collect();
        print_json(&json!({
            "Version": version, "StartTime": started, "IoEngine": engine, "Problems": problems,
            "Nodes": nodes, "Exports": exports.len(), "Connected": connected, "Slow": slow.len(),
            "IoThreads": threads, "Jobs": jobs,
        }));
        return Ok(());
    }
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let now = now.map_or(0, |d| d.as_micros() as u64);
    let bold = anstyle::Style::new().bold();
    let line = |key: &str, value: String| anstream::println!("{bold}{key:9}{bold:#}  {value}");
    line(
        "vdiskd",
        format!(
            "{version}, since {} ({})",
            format_time(started),
            duration(now.saturating_sub(started) / 1_000_000)
        ),
    );
    let all = count(exports.len(), "export", "exports");
    line(
        "exports",
        match exports.len() {
            0 => all,
            _ => format!(
                "{all}, {connected} with a guest, {} on the slow path",
                slow.len()
            ),
        },
    );
    for export in slow {
        line(
            "",
            format!(
                "{}: slow, {}",
                text(export, "Id"),
                text(export, "PathReason")
            ),
        );
    }
    let sizes: u64 = exports
        .iter()
        .flat_map(|p| names(p, "Node"))
        .filter_map(|n| objects.find("node", &n).ok())
        .map(|p| number(p, "Size"))
        .sum();
    line(
        "nodes",
        format!(
            "{}, {} offered",
            count(nodes, "node", "nodes"),
            format_size(sizes)
        ),
    );
    line("iothreads", format!("{} ({engine})", threads.join(", ")));
    line("jobs", count(jobs.len(), "job", "jobs"));
    for job in jobs {
        let progress = job.get("Progress").and_then(Json::as_f64).unwrap_or(0.0) * 100.0;
        line(
            "",
            format!(
                "{}: {} {}, {progress:.0} %",
                text(job, "Id"),
                text(job, "Operation"),
                text(job, "State")
            ),
        );
    }
    if problems.is_empty() {
        line("problems", "none".into());
    } else {
        let red = anstyle::AnsiColor::Red.on_default().bold();
        for problem in problems {
            anstream::println!("{red}problem{red:#}    {problem}");
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_for_people() {
        assert_eq!(count(0, "job", "jobs"), "no jobs");
        assert_eq!(count(1, "job", "jobs"), "1 job");
        assert_eq!(duration(59), "59 s");
        assert_eq!(duration(7_260), "2 h 1 min");
        assert_eq!(duration(190_000), "2 d 4 h");
    }
}
