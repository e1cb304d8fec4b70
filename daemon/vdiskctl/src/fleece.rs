//! `vdiskctl fleece …`: a node that shows what another had at one moment.

use std::collections::HashMap;

use serde_json::Value as Json;
use vdisk_dbus::{ManagerProxy, NodeProxy};
use zbus::Variant;

use crate::args::Fleece;
use crate::daemon::Daemon;
use crate::error::{Error, Result};
use crate::objects::{Objects, name_of, properties};
use crate::options::{Options, absolute, options};
use crate::output::{number, print_pause, text};

async fn node<'a>(daemon: &'a Daemon, name: &str) -> Result<NodeProxy<'a>> {
    let proxy = daemon.node(name);
    Ok(proxy.await?)
}

/// The name of the filter that keeps the moment.
fn filter_name(name: &str) -> String {
    format!("{name}-filter")
}

pub async fn fleece(
    daemon: &Daemon,
    manager: &ManagerProxy<'_>,
    command: Fleece,
    json: bool,
) -> Result<()> {
    match command {
        Fleece::Start {
            node: source,
            name,
            filename,
            break_guest_write,
            options: words,
        } => {
            let objects = Objects::load(daemon).await?;
            let size = number(objects.find("node", &source)?, "Size");
            if objects.find("node", &name).is_ok() {
                return Err(Error::failed(format!(
                    "there is a node '{name}' already: choose another name"
                )));
            }
            let image = HashMap::from([
                ("filename", absolute(&filename)),
                ("size", Variant::from(size)),
            ]);
            manager.create_image(image).await?;
            let mut filter = options(&words)?;
            for (key, value) in [("target.driver", "qcow2"), ("target.file.driver", "file")] {
                filter.entry(key).or_insert_with(|| Variant::from(value));
            }
            let filter_name = filter_name(&name);
            filter.insert("driver", Variant::from("copy-before-write"));
            filter.insert("node-name", Variant::from(filter_name.as_str()));
            filter.insert("target.file.filename", absolute(&filename));
            filter.insert("target.discard", Variant::from("unmap"));
            if break_guest_write {
                filter.insert("on-cbw-error", Variant::from("break-guest-write"));
            }
            let report = match node(daemon, &source).await?.insert_filter(filter).await {
                Ok((_, report)) => properties(report),
                Err(e) => {
                    let _ = std::fs::remove_file(&filename);
                    return Err(e.into());
                }
            };
            let access = HashMap::from([
                ("driver", Variant::from("snapshot-access")),
                ("node-name", Variant::from(name.as_str())),
                ("file", Variant::from(filter_name.as_str())),
            ]);
            if let Err(e) = manager.add_node(access).await {
                let filter = node(daemon, &filter_name).await?;
                let _ = filter.take_out(Options::new()).await;
                let _ = std::fs::remove_file(&filename);
                return Err(e.into());
            }
            print_pause(
                &format!("'{name}' shows what '{source}' has at this moment"),
                report,
                json,
            );
        }
        Fleece::End { name } => {
            let objects = Objects::load(daemon).await?;
            let shown = objects.find("node", &name)?;
            let filter = child(shown.get("Children"), "file");
            let filter = filter
                .filter(|_| text(shown, "Driver") == "snapshot-access")
                .ok_or_else(|| {
                    Error::invalid(format!(
                        "node '{name}' has driver '{}' and shows no moment: give one that 'fleece start' made",
                        text(shown, "Driver")
                    ))
                })?;
            let scratch = child(objects.find("node", &filter)?.get("Children"), "target");
            let scratch = match scratch {
                Some(target) => text(objects.find("node", &target)?, "Filename"),
                None => String::new(),
            };
            node(daemon, &name).await?.remove(Options::new()).await?;
            let filter = node(daemon, &filter).await?;
            let report = properties(filter.take_out(Options::new()).await?);
            if !scratch.is_empty() {
                let _ = std::fs::remove_file(&scratch);
            }
            print_pause(&format!("'{name}' is gone"), report, json);
        }
    }
    Ok(())
}

/// The name of a node's child.
fn child(children: Option<&Json>, role: &str) -> Option<String> {
    let children = children?.as_array()?;
    let child = children.iter().find(|c| c[0] == role)?;
    Some(name_of(child[1].as_str()?))
}
