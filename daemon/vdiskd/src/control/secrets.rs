//! Secrets, which open encrypted images.

use std::fs::File;
use std::io::{self, Read};
use std::path::PathBuf;

use vdisk_api::{Error, MAX_SECRET, Result, Secret, SecretOptions, SecretSource};
use vdisk_block::Secrets;

use super::{Handle, state};

/// Reads all that there is.
fn read(from: File) -> io::Result<Secret> {
    let mut bytes = Vec::new();
    from.take(MAX_SECRET as u64 + 1).read_to_end(&mut bytes)?;
    Ok(Secret::new(bytes))
}

/// Reads a secret and keeps it. (Not a command of the control plane: a pipe may give nothing for long.)
pub async fn add(control: &Handle, options: SecretOptions) -> Result<()> {
    let SecretOptions { id, source } = options;
    let what = format!("secret '{id}'");
    let secret = tokio::task::spawn_blocking(move || match source {
        SecretSource::Data(secret) => Ok(secret),
        SecretSource::Fd(fd) => read(File::from(fd)),
        SecretSource::File(path) => File::open(path).and_then(read),
    })
    .await
    .map_err(io::Error::other)
    .flatten()
    .map_err(|e| Error::io(format_args!("{what} cannot be read"), &e))?;
    match secret.bytes().len() {
        1..=MAX_SECRET => {}
        0 => {
            return Err(Error::invalid(format!(
                "{what} is empty: give at least one byte"
            )));
        }
        _ => return Err(Error::invalid(format!("{what} has more than 1 MiB"))),
    }
    control.must_not_be_held()?;
    all(control).add(&id, secret)?;
    if let Some(keeper) = control.keeper()
        && let Ok(secret) = all(control).get(&id)
        && let Err(error) = state::keep_secret(&**keeper, &id, &secret)
    {
        tracing::warn!(secret = id, %error, "the secret cannot be kept for a restart");
    }
    if let Some(keeper) = control.keeper() {
        state::keep_keys(&**keeper, &all(control), &id);
    }
    tracing::info!(secret = id, "secret added");
    Ok(())
}

/// Forgets a secret. What it has opened stays open.
pub fn remove(control: &Handle, id: &str) -> Result<()> {
    control.must_not_be_held()?;
    all(control).remove(id)?;
    if let Some(keeper) = control.keeper() {
        keeper.forget(&state::secret_name(id));
        keeper.forget(&state::keys_name(id));
    }
    tracing::info!(secret = id, "secret removed");
    Ok(())
}

/// All secrets.
pub fn all(control: &Handle) -> Secrets {
    control.world().defaults.runtime.secrets.clone()
}

/// Adds what systemd passes as credentials named `secret.ID` (systemd.exec(5), LoadCredential).
pub fn take_credentials(secrets: &Secrets) {
    let folder = std::env::var_os("CREDENTIALS_DIRECTORY").map(PathBuf::from);
    let Some(folder) = folder else {
        return;
    };
    let files = std::fs::read_dir(&folder).inspect_err(|error| {
        tracing::error!(folder = %folder.display(), %error, "credentials cannot be read");
    });
    for file in files.into_iter().flatten().flatten() {
        let name = file.file_name();
        let Some(id) = name.to_str().and_then(|n| n.strip_prefix("secret.")) else {
            continue;
        };
        let secret = File::open(file.path()).and_then(read);
        let added = secret
            .map_err(|e| {
                Error::io(
                    format_args!("secret '{id}': its credential cannot be read"),
                    &e,
                )
            })
            .and_then(|secret| secrets.add(id, secret));
        match added {
            Ok(()) => tracing::info!(secret = id, "secret added from a credential"),
            Err(error) => tracing::error!(secret = id, error = error.message, "not added"),
        }
    }
}
