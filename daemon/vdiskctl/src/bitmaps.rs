//! `vdiskctl bitmap …`.

use serde_json::Value as Json;
use vdisk_api::{format_size, parse_size};
use vdisk_dbus::bitmap_path;
use zbus::Variant;

use crate::args::{Bitmap, BitmapCommand};
use crate::daemon::Daemon;
use crate::error::{Error, Result};
use crate::objects::Objects;
use crate::options::Options;
use crate::output::{Rows, flag, names, number, print_json, text};

fn rows(objects: &Objects) -> Rows {
    let mut rows = Rows::new(&["node", "name", "state", ">dirty", ">granularity", "job"]);
    for (_, p) in objects.of("bitmap") {
        rows.add(vec![
            names(p, "Node").join(""),
            text(p, "Name"),
            match flag(p, "Recording") {
                true => "recording",
                false => "disabled",
            }
            .to_owned()
                + match flag(p, "Persistent") {
                    true => ", persistent",
                    false => "",
                },
            format_size(number(p, "Count")),
            format_size(number(p, "Granularity")),
            match text(p, "Job").as_str() {
                "/" => String::new(),
                _ => names(p, "Job").join(""),
            },
        ]);
    }
    rows
}

pub async fn bitmap(daemon: &Daemon, command: BitmapCommand, json: bool) -> Result<()> {
    let objects = Objects::load(daemon).await?;
    let (BitmapCommand::Add { bitmap, .. }
    | BitmapCommand::Merge { bitmap, .. }
    | BitmapCommand::Remove(bitmap)
    | BitmapCommand::Clear(bitmap)
    | BitmapCommand::Enable(bitmap)
    | BitmapCommand::Disable(bitmap)) = &command
    else {
        match json {
            true => {
                let all = objects.of("bitmap").map(|(_, p)| Json::Object(p.clone()));
                print_json(&all.collect::<Json>());
            }
            false => rows(&objects).print(),
        }
        return Ok(());
    };
    let Bitmap { node, name } = bitmap;
    objects.find("node", node)?;
    let path = bitmap_path(node, name);
    if let BitmapCommand::Add {
        granularity,
        disabled,
        persistent,
        ..
    } = &command
    {
        let mut options = Options::from([
            ("disabled", Variant::from(*disabled)),
            ("persistent", Variant::from(*persistent)),
        ]);
        if let Some(size) = granularity {
            let bytes = parse_size(size);
            let bytes = bytes.ok_or_else(|| {
                Error::invalid(format!(
                    "--granularity '{size}' is not a size: give a power of two, such as 64k"
                ))
            })?;
            options.insert("granularity", Variant::from(bytes));
        }
        let proxy = daemon.node(node);
        proxy.await?.add_bitmap(name, options).await?;
        return Ok(());
    }
    if objects.get(path.as_str()).is_none() {
        return Err(Error::not_found(format!(
            "node '{node}' has no bitmap '{name}': see vdiskctl bitmap list"
        )));
    }
    let proxy = daemon.bitmap(path).await?;
    let none = Options::new();
    match command {
        BitmapCommand::Remove(_) => proxy.remove(none).await?,
        BitmapCommand::Clear(_) => proxy.clear(none).await?,
        BitmapCommand::Enable(_) => proxy.enable(none).await?,
        BitmapCommand::Disable(_) => proxy.disable(none).await?,
        BitmapCommand::Merge { sources, .. } => proxy.merge(sources, none).await?,
        BitmapCommand::Add { .. } | BitmapCommand::List => {}
    }
    Ok(())
}
