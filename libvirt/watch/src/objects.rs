//! What was seen, on D-Bus.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard};

use tokio::sync::{mpsc, oneshot};
use vdisk_dbus::{ROOT_PATH, domain_path, export_path, node_path};
use zbus::{Connection, ObjectPath, OwnedVariant, Variant, fdo, interface};

use crate::look::{Disk, Domain, Orphan, View};

type Dictionary = HashMap<String, OwnedVariant>;

fn dictionary<'a>(entries: impl IntoIterator<Item = (&'a str, Variant<'a>)>) -> Dictionary {
    let owned = |(key, value): (&str, Variant<'_>)| {
        let value = value.try_into().ok()?;
        Some((key.to_owned(), value))
    };
    entries.into_iter().filter_map(owned).collect()
}

fn path(of: &str) -> Variant<'_> {
    Variant::from(ObjectPath::try_from(of).unwrap_or_default())
}

/// org.vdisk1.Domain
struct DomainObject(Domain);

fn disk(disk: &Disk) -> Dictionary {
    let export = disk.served.as_ref().map(|s| export_path(&s.id));
    let node = disk.served.as_ref().map(|s| node_path(&s.node));
    let mut entries = vec![
        ("target", Variant::from(disk.target.as_str())),
        ("file", Variant::from(disk.file.as_str())),
        ("format", Variant::from(disk.format.as_str())),
        ("served", Variant::from(disk.served.is_some())),
    ];
    if let (Some(served), Some(export), Some(node)) = (&disk.served, &export, &node) {
        entries.extend([
            ("export", path(export.as_str())),
            ("node", path(node.as_str())),
            ("clients", Variant::from(served.clients)),
        ]);
    }
    dictionary(entries)
}

#[interface(name = "org.vdisk1.Domain", introspection_docs = false)]
impl DomainObject {
    #[zbus(property)]
    fn name(&self) -> String {
        self.0.name.clone()
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn uuid(&self) -> String {
        self.0.uuid.clone()
    }

    #[zbus(property)]
    fn active(&self) -> bool {
        self.0.active
    }

    #[zbus(property)]
    fn persistent(&self) -> bool {
        self.0.persistent
    }

    #[zbus(property)]
    fn instance(&self) -> String {
        self.0.instance.clone().unwrap_or_default()
    }

    #[zbus(property)]
    fn disks(&self) -> Vec<Dictionary> {
        self.0.disks.iter().map(disk).collect()
    }
}

/// What somebody has asked for.
pub enum Asked {
    /// A look at everything.
    Refresh(oneshot::Sender<()>),
    /// Orphans to be taken down at once; their exports are what is answered.
    CleanUp(oneshot::Sender<Vec<String>>),
}

/// What is known of all domains together.
#[derive(Default)]
struct Known {
    connected: bool,
    orphans: Vec<Orphan>,
}

/// org.vdisk1.Domains
struct DomainsObject {
    /// Changes while a call waits for an answer, which has the object.
    known: Arc<Mutex<Known>>,
    asked: mpsc::UnboundedSender<Asked>,
}

fn locked(known: &Mutex<Known>) -> MutexGuard<'_, Known> {
    known.lock().unwrap_or_else(|e| e.into_inner())
}

impl DomainsObject {
    async fn ask<T>(&self, how: impl FnOnce(oneshot::Sender<T>) -> Asked) -> fdo::Result<T> {
        let (tx, rx) = oneshot::channel();
        let gone = || fdo::Error::Failed("the watcher ends".into());
        self.asked.send(how(tx)).map_err(|_| gone())?;
        rx.await.map_err(|_| gone())
    }
}

#[interface(name = "org.vdisk1.Domains", introspection_docs = false)]
impl DomainsObject {
    async fn refresh(&self, options: HashMap<String, OwnedVariant>) -> fdo::Result<()> {
        no_options(&options)?;
        self.ask(Asked::Refresh).await
    }

    #[zbus(out_args("exports"))]
    async fn clean_up(&self, options: HashMap<String, OwnedVariant>) -> fdo::Result<Vec<String>> {
        no_options(&options)?;
        self.ask(Asked::CleanUp).await
    }

    #[zbus(property)]
    fn connected(&self) -> bool {
        locked(&self.known).connected
    }

    #[zbus(property)]
    fn orphans(&self) -> Vec<Dictionary> {
        let orphan = |orphan: &Orphan| {
            let export = export_path(&orphan.served.id);
            dictionary([
                ("uuid", Variant::from(orphan.uuid.as_str())),
                ("target", Variant::from(orphan.served.target.as_str())),
                ("daemon", Variant::from(orphan.daemon.as_str())),
                ("export", path(export.as_str())),
                ("clients", Variant::from(orphan.served.clients)),
            ])
        };
        locked(&self.known).orphans.iter().map(orphan).collect()
    }
}

fn no_options(options: &HashMap<String, OwnedVariant>) -> fdo::Result<()> {
    match options.keys().next() {
        None => Ok(()),
        Some(option) => Err(fdo::Error::InvalidArgs(format!(
            "there is no option '{option}': leave it out"
        ))),
    }
}

/// The objects that are on the bus.
pub struct Published {
    connection: Connection,
    known: Arc<Mutex<Known>>,
    domains: BTreeMap<String, Domain>,
}

impl Published {
    /// On a connection that serves nothing yet.
    pub async fn new(
        connection: Connection,
        asked: mpsc::UnboundedSender<Asked>,
    ) -> zbus::Result<Published> {
        let server = connection.object_server();
        server.at(ROOT_PATH, fdo::ObjectManager).await?;
        let known = Arc::new(Mutex::new(Known::default()));
        let domains = DomainsObject {
            known: known.clone(),
            asked,
        };
        server.at(ROOT_PATH, domains).await?;
        Ok(Published {
            connection: connection.clone(),
            known,
            domains: BTreeMap::new(),
        })
    }

    /// Has the objects be what was seen; None if libvirt cannot be asked.
    pub async fn follow(&mut self, view: Option<&View>) -> zbus::Result<()> {
        let server = self.connection.object_server();
        let all = server.interface::<_, DomainsObject>(ROOT_PATH).await?;
        {
            let orphans = view.map(|v| v.orphans.clone()).unwrap_or_default();
            let (was, had) = {
                let mut known = locked(&self.known);
                let before = (known.connected, known.orphans != orphans);
                (known.connected, known.orphans) = (view.is_some(), orphans);
                before
            };
            let there = all.get().await;
            if was != view.is_some() {
                there.connected_changed(all.signal_emitter()).await?;
            }
            if had {
                there.orphans_changed(all.signal_emitter()).await?;
            }
        }
        let none = BTreeMap::new();
        let now = view.map_or(&none, |v| &v.domains);
        let uuids: BTreeSet<&String> = self.domains.keys().chain(now.keys()).collect();
        for uuid in uuids {
            let path = domain_path(uuid);
            match (self.domains.get(uuid), now.get(uuid)) {
                (None, Some(new)) => {
                    server.at(path, DomainObject(new.clone())).await?;
                }
                (Some(_), None) => {
                    server.remove::<DomainObject, _>(path).await?;
                }
                (Some(old), Some(new)) if old != new => {
                    let object = server.interface::<_, DomainObject>(path).await?;
                    let mut there = object.get_mut().await;
                    there.0 = new.clone();
                    let emitter = object.signal_emitter();
                    there.name_changed(emitter).await?;
                    there.active_changed(emitter).await?;
                    there.persistent_changed(emitter).await?;
                    there.instance_changed(emitter).await?;
                    there.disks_changed(emitter).await?;
                }
                _ => {}
            }
        }
        self.domains.clone_from(now);
        Ok(())
    }
}
