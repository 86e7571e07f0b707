//! The files that Mosquitto reads, and the file of known workers. Each write is atomic.

use std::collections::BTreeSet;
use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use k8s_openapi::ByteString;
use thiserror::Error;
use tracing::warn;

use super::state::{BrokerContent, Change, Origin, Subject};
use crate::broker::credential::file::BrokerFiles;
use crate::configuration::agent::{
    ACL_FILE, CERTIFICATE_KEYS_FILE, PASSWORD_FILE, PREVIOUS_PASSWORD_FILE, TLS_CERTIFICATE, TLS_KEY, tls_folder,
};

/// Readable only by the owner; Mosquitto runs as the same user.
const FILE_MODE: u32 = 0o600;
const FOLDER_MODE: u32 = 0o700;

/// File on the broker's volume with the users of workers that may have a session.
const WORKERS_FILE: &str = "fleetwright-workers.json";

/// A file could not be written.
#[derive(Debug, Error)]
#[error("failed to write {}: is its folder a volume that the pod's user may write?", path.display())]
pub struct WriteFile {
    /// Path of the file.
    pub path: PathBuf,
    /// The cause.
    #[source]
    pub source: io::Error,
}

/// Writes everything that Mosquitto reads.
///
/// # Errors
/// If a file cannot be written.
pub fn write_all(folder: &Path, content: &BrokerContent, files: &BrokerFiles) -> Result<(), WriteFile> {
    for (secret, certificate) in &content.certificates {
        let folder = folder.join(tls_folder(secret));
        write(&folder.join(TLS_CERTIFICATE), &certificate.chain)?;
        write(&folder.join(TLS_KEY), &certificate.key)?;
    }
    write(&folder.join(ACL_FILE), files.acls.as_bytes())?;
    write(&folder.join(CERTIFICATE_KEYS_FILE), files.certificate_keys.as_bytes())?;
    write(&folder.join(PREVIOUS_PASSWORD_FILE), files.previous_passwords.as_bytes())?;
    write(&folder.join(PASSWORD_FILE), files.passwords.as_bytes())
}

/// The certificates that an earlier agent wrote: the last good ones.
#[must_use]
pub fn written_certificates<'a>(folder: &Path, secrets: impl Iterator<Item = &'a String>) -> Vec<Change> {
    let read = |secret: &String| {
        let folder = folder.join(tls_folder(secret));
        let value = |key: &str| Some((key.to_owned(), ByteString(fs::read(folder.join(key)).ok()?)));
        let data = [value(TLS_CERTIFICATE)?, value(TLS_KEY)?].into();
        Some(Change { subject: Subject::Tls(secret.clone()), data: Some(data), origin: Origin::Volume })
    };
    secrets.filter_map(read).collect()
}

/// Saves the users of workers.
///
/// # Errors
/// If the file cannot be written.
pub fn remember_workers(folder: &Path, workers: &BTreeSet<&str>) -> Result<(), WriteFile> {
    let path = folder.join(WORKERS_FILE);
    let text = serde_json::to_vec(workers).map_err(|source| WriteFile { path: path.clone(), source: source.into() })?;
    write(&path, &text)
}

/// The saved users of workers; empty if the file does not exist or cannot be read.
#[must_use]
pub fn remembered_workers(folder: &Path) -> BTreeSet<String> {
    let path = folder.join(WORKERS_FILE);
    let text = match fs::read(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return BTreeSet::new(),
        Err(error) => {
            warn!(path = %path.display(), %error, "failed to read the users of workers: sessions of removed workers may remain");
            return BTreeSet::new();
        }
    };
    let warn = |error: &serde_json::Error| {
        warn!(path = %path.display(), %error, "failed to read the users of workers: sessions of removed workers may remain");
    };
    serde_json::from_slice(&text).inspect_err(warn).unwrap_or_default()
}

/// Writes a temporary file beside the file, then renames it.
///
/// # Errors
/// If it cannot be written.
pub fn write(path: &Path, content: &[u8]) -> Result<(), WriteFile> {
    let failed = |source| WriteFile { path: path.to_owned(), source };
    let folder = path.parent().unwrap_or(Path::new("/"));
    DirBuilder::new().recursive(true).mode(FOLDER_MODE).create(folder).map_err(failed)?;
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".new");
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(FILE_MODE).open(&temporary).map_err(failed)?;
    file.write_all(content).map_err(failed)?;
    // Only the volume needs it: the other files are in memory, where this costs nothing.
    file.sync_all().map_err(failed)?;
    fs::rename(&temporary, path).map_err(failed)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn workers_are_remembered() {
        let folder = tempfile::tempdir().unwrap();
        assert!(remembered_workers(folder.path()).is_empty());
        remember_workers(folder.path(), &BTreeSet::from(["_ingest_a_0", "_ingest_b_0"])).unwrap();
        assert_eq!(remembered_workers(folder.path()), BTreeSet::from(["_ingest_a_0".to_owned(), "_ingest_b_0".to_owned()]));
        fs::write(folder.path().join(WORKERS_FILE), "[").unwrap();
        assert!(remembered_workers(folder.path()).is_empty());
    }

    #[test]
    fn files_are_replaced_atomically_and_only_the_owner_can_read_them() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tls/a.b/tls.key");
        write(&path, b"first, and longer").unwrap();
        write(&path, b"second").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"second");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, FILE_MODE);
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
        assert!(write(Path::new("/proc/nothing/here"), b"").is_err());
    }
}
