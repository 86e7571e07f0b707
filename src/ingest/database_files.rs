//! The connection to the database, from the files of a mounted Secret.

use std::io::{self, ErrorKind};
use std::path::Path;

use anyhow::Context;

use crate::database::uri::{AUTHORITIES_KEY, ConnectionUri};

/// The connection with the URI in this file. The authorities that verify the server are in the file `ca.crt` of the same folder, if it
/// exists. `-` is standard input.
///
/// # Errors
/// If a file cannot be read or parsed.
pub fn read_connection(file: &Path) -> anyhow::Result<ConnectionUri> {
    if file == Path::new("-") {
        let text = io::read_to_string(io::stdin()).context("failed to read the connection URI from standard input")?;
        return text.parse().context("failed to parse the connection URI from standard input");
    }
    let text = std::fs::read_to_string(file).with_context(|| format!("failed to read {}", file.display()))?;
    let uri: ConnectionUri = text.parse().with_context(|| format!("failed to parse {}", file.display()))?;
    let authorities = file.with_file_name(AUTHORITIES_KEY);
    match std::fs::read(&authorities) {
        Ok(pem) => uri.verified_by(&pem).with_context(|| format!("failed to parse {}", authorities.display())),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(uri),
        Err(error) => Err(error).with_context(|| format!("failed to read {}", authorities.display())),
    }
}
