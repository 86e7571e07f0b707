//! Whom to log in as, and how.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use rustls::ClientConfig;

use super::connection::ConnectionError;
use crate::configuration::ingest::{AUTHORITIES_FILE, ExternalAccess, PASSWORD_FILE, USERNAME_FILE};
use crate::runtime::tls::{Verification, client_configuration};

/// How long a broker of ours keeps the session of a worker that is away: thirty days, a month of a paused Pipeline. The Gateway's
/// limits bound the queue meanwhile.
const SESSION_EXPIRY_SECONDS: u32 = 30 * 86_400;

/// How long an external broker keeps it, whose limits we do not know: a week, which is also the longest that some allow
/// (<https://docs.aws.amazon.com/general/latest/gr/iot-core.html>).
const EXTERNAL_SESSION_EXPIRY_SECONDS: u32 = 7 * 86_400;

/// Whom to log in as.
#[derive(Clone)]
pub struct Login {
    /// Client identifier.
    pub client_id: String,
    /// User name.
    pub username: String,
    /// Password.
    pub password: Bytes,
    /// How long the broker keeps the session without a connection, in seconds.
    pub session_expiry_seconds: u32,
    /// Encryption; none for a plain listener.
    pub tls: Option<Arc<ClientConfig>>,
}

impl fmt::Debug for Login {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Login").field("client_id", &self.client_id).field("username", &self.username).finish_non_exhaustive()
    }
}

/// Where the login of a session comes from.
#[derive(Clone, Debug)]
pub enum Access {
    /// The worker's own, at the brokers of ours.
    Own(Login),
    /// From files, which are read at each connection, so that they may change.
    Files {
        /// Folder of the files.
        folder: PathBuf,
        /// How to log in.
        external: ExternalAccess,
    },
}

impl Login {
    /// The workers' own login at a broker of ours, where the client identifier is the user name.
    #[must_use]
    pub fn own(username: String, password: Bytes) -> Self {
        Self { client_id: username.clone(), username, password, session_expiry_seconds: SESSION_EXPIRY_SECONDS, tls: None }
    }
}

impl Access {
    /// The login as it is by now.
    ///
    /// # Errors
    /// When a file cannot be read, or says nothing that could be used.
    pub fn login(&self) -> Result<Login, ConnectionError> {
        let (folder, external) = match self {
            Self::Own(login) => return Ok(login.clone()),
            Self::Files { folder, external } => (folder, external),
        };
        let username = String::from_utf8(read(&folder.join(USERNAME_FILE))?)
            .map_err(|_| ConnectionError::ReadUsername { file: folder.join(USERNAME_FILE) })?;
        Ok(Login {
            client_id: external.client_id.clone(),
            username,
            password: read(&folder.join(PASSWORD_FILE))?.into(),
            session_expiry_seconds: EXTERNAL_SESSION_EXPIRY_SECONDS,
            tls: encryption(folder, external)?,
        })
    }
}

fn encryption(folder: &Path, external: &ExternalAccess) -> Result<Option<Arc<ClientConfig>>, ConnectionError> {
    let authorities = external.authorities.then(|| read(&folder.join(AUTHORITIES_FILE))).transpose()?;
    let verification = authorities.as_deref().map_or(Verification::Public, Verification::Authorities);
    Ok(external.tls.then(|| client_configuration(verification).map(Arc::new)).transpose()?)
}

/// The content of a file, without the line break that an editor may have left at its end.
fn read(file: &Path) -> Result<Vec<u8>, ConnectionError> {
    let mut content = std::fs::read(file).map_err(|source| ConnectionError::ReadLogin { file: file.to_owned(), source })?;
    while content.last().is_some_and(|byte| matches!(byte, b'\r' | b'\n')) {
        content.pop();
    }
    Ok(content)
}
