//! `vdiskctl throttle …`.

use std::collections::BTreeMap;

use serde_json::Value as Json;
use vdisk_api::format_size;
use vdisk_dbus::ManagerProxy;
use zbus::Variant;

use crate::args::Throttle;
use crate::daemon::Daemon;
use crate::error::Result;
use crate::objects::{Objects, Properties, properties};
use crate::options::{Options, options};
use crate::output::{Rows, number, print_json, print_pause};

/// One limit in words: 100 (burst of 200 for 5 s).
fn limit(group: &Properties, name: &str) -> Option<String> {
    let average = number(group, name);
    let bytes = name.starts_with("bps");
    let rate = |n: u64| match bytes {
        true => format!("{}/s", format_size(n)),
        false => format!("{n}/s"),
    };
    let max = number(group, &format!("{name}-max"));
    let length = number(group, &format!("{name}-max-length"));
    let burst = match max {
        0 => String::new(),
        max => format!(" (bursts of {} for {length} s)", rate(max)),
    };
    (average > 0).then(|| format!("{name} {}{burst}", rate(average)))
}

fn limits(group: &Properties) -> String {
    let names = [
        "bps-total",
        "bps-read",
        "bps-write",
        "iops-total",
        "iops-read",
        "iops-write",
    ];
    let mut all: Vec<String> = names.iter().filter_map(|n| limit(group, n)).collect();
    match number(group, "iops-size") {
        0 => {}
        size => all.push(format!("counted by {}", format_size(size))),
    }
    match all.is_empty() {
        true => "none".into(),
        false => all.join(", "),
    }
}

pub async fn throttle(
    daemon: &Daemon,
    manager: &ManagerProxy<'_>,
    command: Throttle,
    json: bool,
) -> Result<()> {
    match command {
        Throttle::Set {
            group,
            limits: words,
        } => manager.set_throttle_group(&group, options(&words)?).await?,
        Throttle::Remove { group } => {
            manager
                .remove_throttle_group(&group, Options::new())
                .await?
        }
        Throttle::List => {
            let groups = manager.list_throttle_groups(Options::new()).await?;
            let groups: BTreeMap<String, Properties> = groups
                .into_iter()
                .map(|(n, g)| (n, properties(g)))
                .collect();
            if json {
                let all = groups.into_iter().map(|(n, g)| (n, Json::Object(g)));
                print_json(&Json::Object(all.collect()));
                return Ok(());
            }
            let mut rows = Rows::new(&["group", ">nodes", "limits"]);
            for (name, group) in &groups {
                let members = number(group, "members").to_string();
                rows.add(vec![name.clone(), members, limits(group)]);
            }
            rows.print();
        }
        Throttle::Insert { node, group, name } => {
            Objects::load(daemon).await?.find("node", &node)?;
            let name = name.unwrap_or_else(|| format!("{node}-throttle"));
            let options = Options::from([
                ("driver", Variant::from("throttle")),
                ("node-name", Variant::from(name.as_str())),
                ("throttle-group", Variant::from(group.as_str())),
            ]);
            let proxy = daemon.node(&node);
            let (_, report) = proxy.await?.insert_filter(options).await?;
            let what = format!("'{name}' limits '{node}' now");
            print_pause(&what, properties(report), json);
        }
        Throttle::TakeOut { filter } => {
            Objects::load(daemon).await?.find("node", &filter)?;
            let proxy = daemon.node(&filter);
            let report = proxy.await?.take_out(Options::new()).await?;
            print_pause(&format!("'{filter}' is gone"), properties(report), json);
        }
    }
    Ok(())
}
