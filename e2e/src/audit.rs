//! Reads the writes of each user from the API server's audit log.

use std::fs::File;
use std::io::{BufRead, BufReader, Seek, SeekFrom};
use std::path::PathBuf;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::cluster::SYSTEM_NAMESPACE;

/// A position in the audit log, from which writes are counted.
pub struct Mark {
    path: PathBuf,
    offset: u64,
}

impl Mark {
    /// The current end of the log.
    ///
    /// # Errors
    /// Fails when `AUDIT_LOG` does not name a readable file.
    pub fn now() -> Result<Self> {
        let path = PathBuf::from(std::env::var_os("AUDIT_LOG").context("AUDIT_LOG is not set: it must name the API server's audit log")?);
        let offset = std::fs::metadata(&path).with_context(|| format!("failed to read {}", path.display()))?.len();
        Ok(Self { path, offset })
    }

    /// Returns the writes after this position to cluster-scoped objects and to objects in `namespace`, made by the operator or by the
    /// namespace's service accounts (the agents). The log has no Leases or Events. Access reviews do not count as writes.
    pub fn writes(&self, namespace: &str) -> Result<Vec<String>> {
        let mut file = File::open(&self.path)?;
        file.seek(SeekFrom::Start(self.offset))?;
        let mut writes = Vec::new();
        for line in BufReader::new(file).lines() {
            let line = line?;
            // The API server may not have finished the last line.
            let Ok(entry) = serde_json::from_str::<Value>(&line) else { continue };
            let text = |pointer: &str| entry.pointer(pointer).and_then(Value::as_str).unwrap_or_default();
            let user = text("/user/username");
            let ours = [SYSTEM_NAMESPACE, namespace].iter().any(|owner| user.starts_with(&format!("system:serviceaccount:{owner}:")));
            let here = [namespace, ""].contains(&text("/objectRef/namespace"));
            let write = ["create", "update", "patch", "delete", "deletecollection"].contains(&text("/verb"));
            let counted = !["leases", "events", "tokenreviews", "subjectaccessreviews", "selfsubjectaccessreviews"]
                .contains(&text("/objectRef/resource"));
            if ours && here && write && counted {
                let object = ["/objectRef/resource", "/objectRef/subresource", "/objectRef/name"].map(text).join("/");
                writes.push(format!("{user} {} {object} at {}", text("/verb"), text("/stageTimestamp")));
            }
        }
        Ok(writes)
    }
}
