//! The daemon that the command line means.

use vdisk_dbus::Bus;
pub use vdisk_dbus::Daemon;

use crate::args::Connection;
use crate::error::{Error, Result};

/// Connects to it.
pub async fn connect(to: &Connection) -> Result<Daemon> {
    let name = vdisk_dbus::bus_name(to.instance.as_deref()).map_err(Error::invalid)?;
    let bus = match &to.bus_address {
        Some(address) => {
            let parsed = address.parse::<zbus::Address>();
            parsed.map_err(|e| Error::invalid(format!("bus address '{address}': {e}")))?;
            Bus::Address(address.clone())
        }
        None if to.session => Bus::Session,
        None => Bus::System,
    };
    Ok(Daemon::connect(&bus, name).await?)
}
