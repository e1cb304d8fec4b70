//! `vdiskctl secret …`.

use std::fs::File;
use std::io::{self, IsTerminal, Read, Seek, Write};
use std::os::fd::OwnedFd;

use serde_json::Value as Json;
use vdisk_dbus::ManagerProxy;
use zbus::Variant;

use crate::args::Secret;
use crate::error::{Error, Result};
use crate::options::Options;
use crate::output::print_json;

/// What was read, in memory that only this process and the daemon have.
fn in_memory(bytes: &[u8]) -> io::Result<File> {
    let mut file = File::from(rustix::fs::memfd_create(
        "secret",
        rustix::fs::MemfdFlags::CLOEXEC,
    )?);
    file.write_all(bytes)?;
    file.rewind()?;
    Ok(file)
}

fn source(id: &str, file: Option<&std::path::Path>) -> Result<File> {
    if let Some(path) = file {
        return File::open(path)
            .map_err(|e| Error::failed(format!("secret '{id}': {}: {e}", path.display())));
    }
    let read = || {
        if io::stdin().is_terminal() {
            return in_memory(rpassword::prompt_password(format!("Secret '{id}': "))?.as_bytes());
        }
        let mut bytes = Vec::new();
        io::stdin().lock().read_to_end(&mut bytes)?;
        in_memory(&bytes)
    };
    read().map_err(|e| Error::failed(format!("secret '{id}' cannot be read: {e}")))
}

pub async fn secret(manager: &ManagerProxy<'_>, command: Secret, json: bool) -> Result<()> {
    match command {
        Secret::Add { id, file } => {
            let fd = OwnedFd::from(source(&id, file.as_deref())?);
            let options = Options::from([("fd", Variant::from(zbus::Fd::from(fd)))]);
            manager.add_secret(&id, options).await?;
        }
        Secret::Remove { id } => manager.remove_secret(&id, Options::new()).await?,
        Secret::List => {
            let ids = manager.secrets().await?;
            if json {
                print_json(&Json::from(ids));
            } else {
                for id in ids {
                    anstream::println!("{id}");
                }
            }
        }
    }
    Ok(())
}
