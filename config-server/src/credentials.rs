//! The config server's own certificate, which it issues itself.
//!
//! Crash consistency: a certificate and its key are made in a directory of their own, and used when both are durable. What a
//! crash left half-made is not looked at again.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use block::UnixNanos;
use durable::{OpenMode, RealStorage, Storage};
use wire::{Authority, CA_FILE, CERT_FILE, Credentials, Identity, KEY_FILE, new_request};

use crate::config::Config;

/// Says for which names the certificate was made.
const NAMES_FILE: &str = "names";

/// The directory of a certificate that is good, with the names that are configured, for at least a third of its time.
pub(crate) fn issue(
    authority: &Authority,
    identity: &Identity,
    config: &Config,
    valid: Duration,
) -> anyhow::Result<PathBuf> {
    let names = format!("{}\n{}", config.names.join("\n"), authority.certificate_pem());
    let mut existing: Vec<PathBuf> = match std::fs::read_dir(&config.credentials) {
        Ok(entries) => {
            entries.filter_map(|entry| Some(entry.ok()?.path())).filter(|path| path.is_dir()).collect()
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
        Err(error) => {
            return Err(error).with_context(|| format!("look into {}", config.credentials.display()));
        }
    };
    existing.sort();
    let soon = UnixNanos(UnixNanos::now().0.saturating_add((valid / 3).as_nanos() as u64));
    let good = existing.iter().rev().find(|dir| {
        std::fs::read_to_string(dir.join(NAMES_FILE)).is_ok_and(|kept| kept == names)
            && Credentials::load(dir).is_ok_and(|credentials| credentials.expires() > soon)
    });
    if let Some(good) = good {
        return Ok(good.clone());
    }
    let dir = config.credentials.join(format!("{:020}", UnixNanos::now().0));
    let storage = RealStorage;
    storage.create_dir_all(&dir).with_context(|| format!("make directory {}", dir.display()))?;
    let (key, request) = new_request()?;
    let signed = authority.sign(&request, identity, &config.server_names(), valid)?;
    // 1. the key and the certificate, durable; 2. the names, by which the directory is found. Reversed, a crash would leave a
    // directory that is found and cannot be used.
    let files = [
        (KEY_FILE, key.as_str()),
        (CERT_FILE, signed.certificate_pem.as_str()),
        (CA_FILE, authority.certificate_pem()),
        (NAMES_FILE, names.as_str()),
    ];
    for (name, text) in files {
        let path = dir.join(name);
        let write = || {
            let file = storage.open(&path, OpenMode::CreateNew)?;
            file.write_all_at(text.as_bytes(), 0)?;
            file.sync_data()?;
            storage.sync_dir(&dir)
        };
        write().with_context(|| format!("write {}", path.display()))?;
    }
    for old in existing {
        // It is not used any more; if it stays, it is not looked at.
        let _ = std::fs::remove_dir_all(old);
    }
    Ok(dir)
}
