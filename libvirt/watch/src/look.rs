//! What there is: libvirt's domains beside what the daemons serve for them.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap};

use vdisk_dbus::{BUS_NAME, Bus, Daemon};
use vdisk_domain::{Served, all_served};
use vdiskctl_domain::libvirt::{Libvirt, Side};
use zbus::Connection;
use zbus::fdo::DBusProxy;

/// A disk that its domain's metadata have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disk {
    pub target: String,
    pub file: String,
    pub format: String,
    /// What serves it at the moment.
    pub served: Option<Served>,
}

/// A domain with disks of ours.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Domain {
    pub name: String,
    pub uuid: String,
    pub active: bool,
    pub persistent: bool,
    pub instance: Option<String>,
    pub disks: Vec<Disk>,
}

/// What a daemon serves for no guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Orphan {
    pub uuid: String,
    /// The bus name of the daemon.
    pub daemon: String,
    pub served: Served,
    /// The domain runs, and does not have the disk (any more).
    pub unplugged: bool,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct View {
    /// By UUID.
    pub domains: BTreeMap<String, Domain>,
    pub orphans: Vec<Orphan>,
}

/// The daemons that run, by bus name. None is started for the asking.
#[derive(Default)]
pub struct Daemons(HashMap<String, Daemon>);

impl Daemons {
    pub async fn find(&mut self, bus: &Bus, connection: &Connection) -> zbus::Result<()> {
        let names = DBusProxy::new(connection).await?.list_names().await?;
        let instance = format!("{BUS_NAME}.instance.");
        let names: Vec<String> = names
            .iter()
            .map(|n| n.to_string())
            .filter(|n| n == BUS_NAME || n.starts_with(&instance))
            .collect();
        self.0.retain(|name, _| names.contains(name));
        for name in names {
            if let Entry::Vacant(new) = self.0.entry(name) {
                let daemon = Daemon::connect(bus, new.key().clone()).await?;
                new.insert(daemon);
            }
        }
        Ok(())
    }

    pub fn get(&self, name: &str) -> Option<&Daemon> {
        self.0.get(name)
    }
}

/// Looks at everything. What one daemon or one domain does not say is left out.
pub async fn look(libvirt: &Libvirt, daemons: &Daemons) -> Result<View, String> {
    let mut served: Vec<(String, String, Served)> = Vec::new();
    for (name, daemon) in &daemons.0 {
        match all_served(daemon).await {
            Ok(all) => {
                let all = all.into_iter().map(|(uuid, s)| (name.clone(), uuid, s));
                served.extend(all);
            }
            Err(error) => tracing::warn!(daemon = name, %error, "cannot be asked"),
        }
    }
    let mut view = View::default();
    let mut sockets: Vec<(String, String)> = Vec::new();
    let mut running: Vec<String> = Vec::new();
    for guest in libvirt.all().map_err(|e| e.to_string())? {
        // One may go, or change, while we look: there is another look then.
        let (Ok(active), Ok(persistent)) = (guest.is_active(), guest.is_persistent()) else {
            continue;
        };
        let side = if active { Side::Live } else { Side::Config };
        let domain = match guest.parsed(side) {
            Ok(domain) => domain,
            Err(error) => {
                tracing::warn!(domain = guest.name, %error, "its XML cannot be read");
                continue;
            }
        };
        if active {
            running.push(domain.uuid.clone());
            let disks = domain.disks.iter().filter_map(|d| d.source.clone());
            sockets.extend(disks.map(|source| (domain.uuid.clone(), source)));
        }
        if domain.metadata.disks.is_empty() {
            continue;
        }
        let disks = domain.metadata.disks.iter().map(|disk| {
            let mut of = served
                .iter()
                .filter(|(_, uuid, s)| *uuid == domain.uuid && s.target == disk.target);
            Disk {
                target: disk.target.clone(),
                file: disk.file().to_owned(),
                format: disk.format().to_owned(),
                served: of.next().map(|(_, _, s)| s.clone()),
            }
        });
        let seen = Domain {
            disks: disks.collect(),
            name: domain.name,
            uuid: domain.uuid.clone(),
            active,
            persistent,
            instance: domain.metadata.instance,
        };
        view.domains.insert(domain.uuid, seen);
    }
    let orphans = served.into_iter().filter_map(|(daemon, uuid, served)| {
        let has = |(u, s): &(String, String)| *u == uuid && *s == served.socket;
        (!sockets.iter().any(has)).then(|| Orphan {
            unplugged: running.contains(&uuid),
            uuid,
            daemon,
            served,
        })
    });
    view.orphans = orphans.collect();
    Ok(view)
}
