//! `vdiskctl top`: which exports and I/O threads are busy, now.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use crossterm::event::{Event, EventStream, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use crossterm::{cursor, execute, terminal};
use futures_util::StreamExt;
use serde_json::{Map, Value as Json};
use vdisk_api::format_size;
use vdisk_dbus::ManagerProxy;

use crate::daemon::Daemon;
use crate::error::{Error, Result};
use crate::objects::Objects;
use crate::output::{Rows, format_count, names, number, text};
use crate::stats::{difference, fetch, quantile};

/// What exports are ordered by.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Order {
    Requests,
    Bytes,
    Name,
}

impl Order {
    fn next(self) -> Order {
        match self {
            Order::Requests => Order::Bytes,
            Order::Bytes => Order::Name,
            Order::Name => Order::Requests,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Order::Requests => "requests",
            Order::Bytes => "bytes",
            Order::Name => "name",
        }
    }
}

/// One export over the last interval.
struct Line {
    requests: u64,
    bytes: u64,
    id: String,
    cells: Vec<String>,
}

fn per_second(n: u64, seconds: f64) -> u64 {
    (n as f64 / seconds.max(1e-3)).round() as u64
}

fn lines(objects: &Objects, changed: &Map<String, Json>, seconds: f64) -> Vec<Line> {
    let counters = |id: &str| changed.get("exports")?.get(id)?.as_object();
    let exports = objects.of("export").filter_map(|(_, p)| {
        let id = text(p, "Id");
        let c = counters(&id)?;
        let of = |kind: &str, key| {
            c.get(kind)
                .and_then(|k| k.get(key))
                .and_then(Json::as_u64)
                .unwrap_or(0)
        };
        let (read, write) = (of("read", "bytes"), of("write", "bytes"));
        let requests = number(c, "requests");
        let busiest = match of("read", "requests") >= of("write", "requests") {
            true => &c["read"]["latency"],
            false => &c["write"]["latency"],
        };
        let cells = vec![
            id.clone(),
            names(p, "Node").join(""),
            match number(p, "Clients") {
                0 => "-",
                _ => "yes",
            }
            .into(),
            format_count(per_second(requests, seconds)),
            format!("{}/s", format_size(per_second(read, seconds))),
            format!("{}/s", format_size(per_second(write, seconds))),
            quantile(busiest, 0.5),
            quantile(busiest, 0.99),
            format_count(number(c, "failed")),
            text(p, "Path"),
        ];
        Some(Line {
            requests,
            bytes: read + write,
            id,
            cells,
        })
    });
    exports.collect()
}

/// `[||||....]` for a fraction.
fn bar(part: u64, of: u64) -> String {
    const WIDTH: u64 = 20;
    let filled = (part * WIDTH).checked_div(of).unwrap_or(0).min(WIDTH);
    format!(
        "[{}{}]",
        "|".repeat(filled as usize),
        " ".repeat((WIDTH - filled) as usize)
    )
}

/// What is shown of one interval.
fn screen(
    objects: &Objects,
    changed: &Map<String, Json>,
    seconds: f64,
    order: Order,
) -> Vec<String> {
    let mut exports = lines(objects, changed, seconds);
    match order {
        Order::Requests => exports.sort_by_key(|l| std::cmp::Reverse(l.requests)),
        Order::Bytes => exports.sort_by_key(|l| std::cmp::Reverse(l.bytes)),
        Order::Name => exports.sort_by(|a, b| a.id.cmp(&b.id)),
    }
    let all: u64 = exports.iter().map(|l| l.requests).sum();
    let bytes: u64 = exports.iter().map(|l| l.bytes).sum();
    let mut out = vec![
        format!(
            "{} exports, {} requests/s, {}/s",
            exports.len(),
            format_count(per_second(all, seconds)),
            format_size(per_second(bytes, seconds))
        ),
        String::new(),
    ];
    let mut threads = Rows::new(&[
        "iothread",
        "working",
        ">%",
        ">polling %",
        ">operations/s",
        ">system calls/s",
    ]);
    let empty = Map::new();
    let of_threads = changed
        .get("iothreads")
        .and_then(Json::as_object)
        .unwrap_or(&empty);
    for (name, s) in of_threads
        .iter()
        .filter_map(|(n, s)| Some((n, s.as_object()?)))
    {
        let (working, polling) = (number(s, "working-ns"), number(s, "polling-ns"));
        let total = working + polling + number(s, "sleeping-ns");
        let percent = |part: u64| (part * 100).checked_div(total).unwrap_or(0).to_string();
        threads.add(vec![
            name.clone(),
            bar(working, total),
            percent(working),
            percent(polling),
            format_count(per_second(number(s, "operations"), seconds)),
            format_count(per_second(number(s, "syscalls"), seconds)),
        ]);
    }
    out.extend(threads.lines());
    out.push(String::new());
    let mut rows = Rows::new(&[
        "export",
        "node",
        "guest",
        ">requests/s",
        ">read",
        ">written",
        ">p50",
        ">p99",
        ">failed",
        "path",
    ]);
    for line in exports {
        rows.add(line.cells);
    }
    out.extend(rows.lines());
    out
}

/// Puts the terminal back however it ends.
struct Terminal;

impl Terminal {
    fn enter() -> std::io::Result<Terminal> {
        terminal::enable_raw_mode()?;
        let terminal = Terminal;
        execute!(
            std::io::stdout(),
            terminal::EnterAlternateScreen,
            cursor::Hide
        )?;
        Ok(terminal)
    }

    fn draw(&self, lines: &[String]) -> std::io::Result<()> {
        let (width, height) = terminal::size()?;
        let mut out = std::io::stdout().lock();
        execute!(
            out,
            cursor::MoveTo(0, 0),
            terminal::Clear(terminal::ClearType::All)
        )?;
        for line in lines.iter().take(height.into()) {
            let line: String = line.chars().take(width.into()).collect();
            write!(out, "{line}\r\n")?;
        }
        out.flush()
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = execute!(
            std::io::stdout(),
            terminal::LeaveAlternateScreen,
            cursor::Show
        );
        let _ = terminal::disable_raw_mode();
    }
}

enum Key {
    Quit,
    Order,
    Other,
}

fn key(event: Option<std::io::Result<Event>>) -> Key {
    match event {
        Some(Ok(Event::Key(KeyEvent {
            code,
            modifiers,
            kind: KeyEventKind::Press,
            ..
        }))) => match code {
            KeyCode::Char('c') if modifiers.contains(KeyModifiers::CONTROL) => Key::Quit,
            KeyCode::Char('q') | KeyCode::Esc => Key::Quit,
            KeyCode::Char('s') => Key::Order,
            _ => Key::Other,
        },
        Some(Ok(_)) => Key::Other,
        // There is nobody to press one.
        Some(Err(_)) | None => Key::Quit,
    }
}

/// Shows it again and again on a terminal; once, or as often as `times` says, elsewhere.
pub async fn run(
    daemon: &Daemon,
    manager: &ManagerProxy<'_>,
    interval: u64,
    times: Option<u64>,
) -> Result<()> {
    let failed = |e: std::io::Error| Error::failed(format!("the terminal: {e}"));
    let is_shown =
        std::io::stdout().is_terminal() && std::io::stdin().is_terminal() && times.is_none();
    let terminal = is_shown.then(Terminal::enter).transpose().map_err(failed)?;
    let mut keys = is_shown.then(EventStream::new);
    let (mut order, mut left) = (Order::Requests, times.unwrap_or(1));
    let (mut last, mut at) = (fetch(manager).await?, Instant::now());
    loop {
        let wait = tokio::time::sleep(Duration::from_secs(interval.max(1)));
        tokio::pin!(wait);
        loop {
            let pressed = async {
                match &mut keys {
                    Some(keys) => key(keys.next().await),
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = &mut wait => break,
                pressed = pressed => match pressed {
                    Key::Quit => return Ok(()),
                    Key::Order => { order = order.next(); break }
                    Key::Other => {}
                },
            }
        }
        let objects = Objects::load(daemon).await?;
        let (now, seconds) = (fetch(manager).await?, at.elapsed().as_secs_f64());
        let changed = difference(&Json::Object(now.clone()), &Json::Object(last));
        let changed = changed.as_object().cloned().unwrap_or_default();
        (last, at) = (now, Instant::now());
        let mut lines = screen(&objects, &changed, seconds, order);
        match &terminal {
            Some(terminal) => {
                lines[0] += &format!("   (by {}; s: other order, q: quit)", order.name());
                terminal.draw(&lines).map_err(failed)?;
            }
            None => {
                for line in lines {
                    anstream::println!("{}", line.trim_end());
                }
                left -= 1;
                if left == 0 {
                    return Ok(());
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_and_rates() {
        assert_eq!(bar(0, 0), format!("[{}]", " ".repeat(20)));
        assert_eq!(
            bar(50, 100),
            format!("[{}{}]", "|".repeat(10), " ".repeat(10))
        );
        assert_eq!(bar(300, 100), format!("[{}]", "|".repeat(20)));
        assert_eq!(per_second(10, 2.0), 5);
    }
}
