//! How fast the service itself is: calls over D-Bus, exports that are added, starts with much to restore.
//!
//! What guests notice of restarts is measured under systemd, by `in-systemd.sh` with `tests/systemd/restart.sh`.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use vdisk_dbus::{ManagerProxy, ROOT_PATH};
use vdisk_qemu_tests::{Daemon, Scratch, scratch};
use zbus::proxy::CacheProperties;
use zbus::{Connection, Variant};

const CALLS: usize = 20_000;
const IN_FLIGHT: usize = 64;
const EXPORTS: usize = 100;

async fn connect(bus: &str) -> zbus::Result<Connection> {
    let address: zbus::Address = bus.parse()?;
    zbus::connection::Builder::address(address).build().await
}

async fn get(connection: &Connection) -> zbus::Result<()> {
    let arguments = ("org.vdisk1.Manager", "IoEngine");
    let interface = Some("org.freedesktop.DBus.Properties");
    let name = Some("org.vdisk1");
    connection
        .call_method(name, ROOT_PATH, interface, "Get", &arguments)
        .await?;
    Ok(())
}

async fn calls(connection: &Connection, in_flight: usize) -> zbus::Result<f64> {
    let start = Instant::now();
    let mut running = FuturesUnordered::new();
    let mut left = CALLS;
    while left > 0 || !running.is_empty() {
        while left > 0 && running.len() < in_flight {
            running.push(get(connection));
            left -= 1;
        }
        if let Some(done) = running.next().await {
            done?;
        }
    }
    Ok(CALLS as f64 / start.elapsed().as_secs_f64())
}

/// Adds a node and an export for each; the times of the exports.
async fn add(connection: &Connection, dir: &Scratch) -> zbus::Result<Vec<Duration>> {
    let manager = ManagerProxy::builder(connection)
        .cache_properties(CacheProperties::No)
        .build()
        .await?;
    let mut times = Vec::new();
    for i in 0..EXPORTS {
        let (name, image) = (format!("disk{i}"), dir.path().join(format!("{i}.img")));
        let file = std::fs::File::create(&image).and_then(|f| f.set_len(64 << 20));
        file.expect("the scratch folder is writable");
        let image = image.display().to_string();
        let node = HashMap::from([
            ("node-name", Variant::from(name.as_str())),
            ("driver", Variant::from("raw")),
            ("file.driver", Variant::from("file")),
            ("file.filename", Variant::from(image.as_str())),
        ]);
        manager.add_node(node).await?;
        let socket = dir.path().join(format!("{i}.sock")).display().to_string();
        let export = HashMap::from([
            ("id", Variant::from(name.as_str())),
            ("type", Variant::from("vhost-user-blk")),
            ("node-name", Variant::from(name.as_str())),
            ("addr.path", Variant::from(socket.as_str())),
            ("writable", Variant::from(true)),
            ("num-queues", Variant::from(4u16)),
        ]);
        let start = Instant::now();
        manager.add_export(export).await?;
        times.push(start.elapsed());
    }
    Ok(times)
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

fn main() {
    let dir = scratch();
    let mut daemon = Daemon::quiet(&[]);
    let start = |daemon: &mut Daemon, what: &str| {
        let mut times: Vec<Duration> = (0..5)
            .map(|_| {
                daemon.kill();
                let start = Instant::now();
                daemon.go_on();
                start.elapsed()
            })
            .collect();
        times.sort();
        println!(
            "start to ready, {what}: median of 5 {:.1} ms, longest {:.1}",
            milliseconds(times[2]),
            milliseconds(times[4])
        );
    };
    start(&mut daemon, "nothing to restore");
    let bus = daemon.bus_address().to_owned();
    let measured = zbus::block_on(async {
        let connection = connect(&bus).await?;
        for in_flight in [1, IN_FLIGHT] {
            let rate = calls(&connection, in_flight).await?;
            println!("Properties.Get, {in_flight} in flight: {rate:.0} calls/s");
        }
        add(&connection, &dir).await
    });
    let mut times: Vec<Duration> = measured.expect("the daemon answers");
    times.sort();
    println!(
        "AddExport, up to {EXPORTS} there: median {:.2} ms, longest {:.2} ms",
        milliseconds(times[EXPORTS / 2]),
        milliseconds(times[EXPORTS - 1])
    );
    start(&mut daemon, "200 nodes and 100 exports");
}
