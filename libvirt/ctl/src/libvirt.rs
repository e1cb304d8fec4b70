//! libvirt's side.

use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::time::{Duration, Instant};

use vdisk_domain::{Domain, Metadata, NAMESPACE, OFFLINE, PREFIX, lock_path, make_folder};
use vdiskctl::error::{Error, Result};
use virt::connect::Connect;
use virt::domain::{Domain as VirDomain, MigrateParameters};
use virt::domain_snapshot::DomainSnapshot;
use virt::sys;

use crate::args::Migrate;

/// Which of a domain's two definitions is meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// That of the guest that runs.
    Live,
    /// That of the next start.
    Config,
}

impl Side {
    fn flag(self) -> u32 {
        match self {
            Side::Live => sys::VIR_DOMAIN_AFFECT_LIVE,
            Side::Config => sys::VIR_DOMAIN_AFFECT_CONFIG,
        }
    }
}

fn failed(what: impl std::fmt::Display) -> impl FnOnce(virt::error::Error) -> Error {
    move |e| Error::failed(format!("{what}: {}", e.message()))
}

pub struct Libvirt {
    connection: Connect,
}

impl Libvirt {
    pub fn open(uri: &str) -> Result<Libvirt> {
        virt::error::clear_error_callback();
        let connection = Connect::open(Some(uri)).map_err(|e| {
            Error::named(
                "Unreachable",
                format!("libvirt ({uri}) cannot be reached: {}", e.message()),
            )
        })?;
        Ok(Libvirt { connection })
    }

    /// For what is not done here.
    pub fn connection(&self) -> &Connect {
        &self.connection
    }

    pub fn all(&self) -> Result<Vec<Guest>> {
        let all = self.connection.list_all_domains(0);
        let all = all.map_err(failed("domains cannot be listed"))?;
        // One may be undefined in this moment.
        Ok(all
            .into_iter()
            .filter_map(|domain| {
                let name = domain.get_name().ok()?;
                Some(Guest { domain, name })
            })
            .collect())
    }

    pub fn find(&self, name: &str) -> Result<Guest> {
        let by_name = VirDomain::lookup_by_name(&self.connection, name);
        let found = by_name.or_else(|e| match name.parse() {
            Ok(uuid) => VirDomain::lookup_by_uuid(&self.connection, uuid),
            Err(_) => Err(e),
        });
        let domain = found.map_err(|_| {
            Error::not_found(format!("there is no domain '{name}': see virsh list --all"))
        })?;
        let name = domain.get_name().map_err(failed("domain"))?;
        Ok(Guest { domain, name })
    }

    /// The domain's XML in a file with the memory of a guest.
    pub fn saved_xml(&self, file: &str) -> Result<String> {
        let flags = sys::VIR_DOMAIN_SAVE_IMAGE_XML_SECURE;
        VirDomain::save_image_get_xml_desc(&self.connection, file, flags)
            .map_err(failed(format_args!("'{file}' cannot be read")))
    }

    pub fn set_saved_xml(&self, file: &str, xml: &str) -> Result<()> {
        VirDomain::save_image_define_xml(&self.connection, file, xml, 0)
            .map(drop)
            .map_err(failed(format_args!("'{file}' cannot be changed")))
    }

    /// Starts a domain with memory from a file, and with this XML instead of that in it.
    pub fn restore(&self, file: &str, xml: &str) -> Result<()> {
        // It was stopped for the snapshot.
        let flags = sys::VIR_DOMAIN_SAVE_RUNNING;
        VirDomain::domain_restore_flags(&self.connection, file, Some(xml), flags)
            .map_err(failed(format_args!("'{file}' cannot be restored")))
    }

    /// Puts a definition in the place of what the domain of its name was.
    pub fn define(&self, name: &str, xml: &str) -> Result<()> {
        let defined = VirDomain::define_xml(&self.connection, xml);
        defined
            .map(drop)
            .map_err(failed(format_args!("domain '{name}' cannot be defined")))
    }
}

/// One domain.
pub struct Guest {
    domain: VirDomain,
    pub name: String,
}

impl Guest {
    fn failed(&self, what: &str) -> impl FnOnce(virt::error::Error) -> Error {
        failed(format!("domain '{}' {what}", self.name))
    }

    /// Keeps other commands of ours away from the domain for as long as the file is open.
    pub fn lock(&self) -> Result<std::fs::File> {
        let uuid = self.domain.get_uuid_string();
        let uuid = uuid.map_err(self.failed("has no UUID"))?;
        let path = lock_path(&uuid);
        let no = |e: std::io::Error| Error::failed(format!("'{}': {e}", path.display()));
        make_folder().map_err(no)?;
        let file = std::fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(no)?;
        file.try_lock().map_err(|_| {
            Error::named(
                "Busy",
                format!(
                    "domain '{}' is being changed by another vdiskctl: wait for it",
                    self.name
                ),
            )
        })?;
        // Others must not be able to hold it.
        file.set_permissions(std::fs::Permissions::from_mode(0o600))
            .map_err(no)?;
        // What one has left there who has died.
        file.set_len(0).map_err(no)?;
        Ok(file)
    }

    /// Has libvirt's hook refuse to start the domain as long as the lock is held, which the caller has.
    pub fn keep_off(&self, on: bool) -> Result<()> {
        let uuid = self.domain.get_uuid_string();
        let path = lock_path(&uuid.map_err(self.failed("has no UUID"))?);
        let content = if on { OFFLINE } else { "" };
        std::fs::write(&path, content)
            .map_err(|e| Error::failed(format!("'{}': {e}", path.display())))
    }

    pub fn uuid(&self) -> Result<String> {
        self.domain
            .get_uuid_string()
            .map_err(self.failed("has no UUID"))
    }

    pub fn is_active(&self) -> Result<bool> {
        self.domain
            .is_active()
            .map_err(self.failed("does not say whether it runs"))
    }

    /// Whether its CPUs run: it may be there, and stopped.
    pub fn is_running(&self) -> Result<bool> {
        let state = self.domain.get_state();
        let (state, _) = state.map_err(self.failed("does not say what state it is in"))?;
        Ok(state == sys::VIR_DOMAIN_RUNNING)
    }

    pub fn is_persistent(&self) -> Result<bool> {
        self.domain
            .is_persistent()
            .map_err(self.failed("does not say whether it is persistent"))
    }

    pub fn xml(&self, side: Side) -> Result<String> {
        let flags = match side {
            Side::Live => sys::VIR_DOMAIN_XML_SECURE,
            Side::Config => sys::VIR_DOMAIN_XML_SECURE | sys::VIR_DOMAIN_XML_INACTIVE,
        };
        self.domain
            .get_xml_desc(flags)
            .map_err(self.failed("has no XML"))
    }

    pub fn parsed(&self, side: Side) -> Result<Domain> {
        Domain::parse(&self.xml(side)?).map_err(|e| Error::failed(e.to_string()))
    }

    /// The definition that counts: of the guest, if it runs.
    pub fn now(&self) -> Result<Domain> {
        self.parsed(match self.is_active()? {
            true => Side::Live,
            false => Side::Config,
        })
    }

    /// Nothing may run, and nothing may have been put aside with disks as they are.
    pub fn must_be_off(&self) -> Result<()> {
        if self.is_active()? {
            return Err(Error::named(
                "InUse",
                format!(
                    "domain '{0}' is running: shut it down first (virsh shutdown {0})",
                    self.name
                ),
            ));
        }
        let saved = self.domain.has_managed_save(0);
        if saved.map_err(self.failed("does not say whether it is saved"))? {
            return Err(Error::named(
                "InUse",
                format!(
                    "domain '{0}' has a saved state, which knows its disks as they are: start it and shut it down, or drop the state (virsh managedsave-remove {0})",
                    self.name
                ),
            ));
        }
        Ok(())
    }

    pub fn snapshots(&self) -> Result<u32> {
        DomainSnapshot::num(&self.domain, 0)
            .map_err(self.failed("does not say whether it has snapshots"))
    }

    /// Both definitions, or the one that there is.
    pub fn sides(&self) -> Result<Vec<Side>> {
        // What the next start has is the one that must not be wrong.
        let mut sides = Vec::new();
        if self.is_persistent()? {
            sides.push(Side::Config);
        }
        if self.is_active()? {
            sides.push(Side::Live);
        }
        Ok(sides)
    }

    pub fn set_metadata(&self, side: Side, metadata: &Metadata) -> Result<()> {
        let is_empty = metadata.disks.is_empty() && metadata.memory_backing.is_none();
        let xml = (!is_empty).then(|| metadata.to_plain_xml());
        self.domain
            .set_metadata(
                sys::VIR_DOMAIN_METADATA_ELEMENT as i32,
                xml.as_deref(),
                Some(PREFIX),
                Some(NAMESPACE),
                side.flag(),
            )
            .map(drop)
            .map_err(self.failed("does not take its metadata"))
    }

    /// Changes the metadata of both definitions.
    pub fn change(&self, mut change: impl FnMut(&mut Metadata) -> Result<()>) -> Result<()> {
        for side in self.sides()? {
            let mut metadata = self.parsed(side)?.metadata;
            let before = metadata.clone();
            change(&mut metadata)?;
            if metadata != before {
                self.set_metadata(side, &metadata)?;
            }
        }
        Ok(())
    }

    pub fn attach(&self, side: Side, xml: &str) -> Result<()> {
        self.domain
            .attach_device_flags(xml, side.flag())
            .map(drop)
            .map_err(self.failed("does not take the disk"))
    }

    pub fn detach(&self, side: Side, xml: &str) -> Result<()> {
        self.domain
            .detach_device_flags(xml, side.flag())
            .map(drop)
            .map_err(self.failed("does not give the disk back"))
    }

    /// Waits until the guest has let go of a disk; whether it has.
    pub async fn gone(&self, target: &str, limit: Duration) -> Result<bool> {
        let since = Instant::now();
        // libvirt's event for this has no safe wrapper, and the guest decides when it is.
        while self.parsed(Side::Live)?.element(target).is_some() {
            if since.elapsed() > limit {
                return Ok(false);
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        Ok(true)
    }

    /// Has libvirt write the guest's memory to a file and stop the guest, as a snapshot whose disks are somebody else's.
    pub fn save_memory(&self, name: &str, file: &str, targets: &[String]) -> Result<()> {
        let disks: String = targets
            .iter()
            .map(|t| format!("<disk name='{t}' snapshot='manual'/>"))
            .collect();
        let xml = format!(
            "<domainsnapshot><name>{name}</name><memory snapshot='external' file='{file}'/><disks>{disks}</disks></domainsnapshot>"
        );
        // Ours is the record of it: one of libvirt's would not know what becomes of the disks.
        let flags = sys::VIR_DOMAIN_SNAPSHOT_CREATE_NO_METADATA;
        DomainSnapshot::create_xml(&self.domain, &xml, flags)
            .map(drop)
            .map_err(self.failed("cannot be saved"))
    }

    /// Brings the guest to another host.
    /// Moves the guest. `definitions` is what it is there, now and at its next start, if that is not what it is here.
    pub fn migrate(
        &self,
        to: &Libvirt,
        how: &Migrate,
        definitions: Option<(String, String)>,
    ) -> Result<()> {
        let mut flags = sys::VIR_MIGRATE_LIVE;
        for (on, flag) in [
            (how.persistent, sys::VIR_MIGRATE_PERSIST_DEST),
            (how.undefinesource, sys::VIR_MIGRATE_UNDEFINE_SOURCE),
            (how.p2p, sys::VIR_MIGRATE_PEER2PEER),
        ] {
            if on {
                flags |= flag;
            }
        }
        let (dest_xml, persist_xml) = definitions.unzip();
        let parameters = MigrateParameters {
            uri: how.migrateuri.clone(),
            dest_xml,
            persist_xml: persist_xml.filter(|_| how.persistent),
            ..MigrateParameters::default()
        };
        let moved = match how.p2p {
            true => self
                .domain
                .migrate_to_uri3(Some(&how.desturi), parameters, flags)
                .map(drop),
            false => self
                .domain
                .migrate3(&to.connection, parameters, flags)
                .map(drop),
        };
        moved.map_err(self.failed(&format!("cannot be moved to {}", how.desturi)))
    }

    /// Has libvirt give up what it does with the domain at the moment.
    pub fn abort(&self, uri: &str) -> Result<()> {
        // (Crate virt does not have this call.)
        let done = std::process::Command::new("virsh")
            .args(["-q", "-c", uri, "domjobabort", &self.name])
            .status();
        match done.is_ok_and(|s| s.success()) {
            true => Ok(()),
            false => Err(Error::failed(format!(
                "the move of domain '{}' cannot be aborted",
                self.name
            ))),
        }
    }

    pub fn resume(&self) -> Result<()> {
        self.domain
            .resume()
            .map(drop)
            .map_err(self.failed("cannot go on"))
    }

    /// Has the guest agent freeze file systems, or thaw them.
    pub fn freeze(&self, freeze: bool) -> Result<()> {
        let what = match freeze {
            true => "guest-fsfreeze-freeze",
            false => "guest-fsfreeze-thaw",
        };
        let command = format!("{{\"execute\":\"{what}\"}}");
        self.domain
            .qemu_agent_command(&command, 30, 0)
            .map(drop)
            .map_err(self.failed("has no guest agent that would freeze its file systems"))
    }
}
