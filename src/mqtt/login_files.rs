//! A login from the files of a mounted Secret.

use std::io;
use std::path::{Path, PathBuf};

use super::login::{ClientTls, Login};
use crate::runtime::tls::TlsError;

/// The file with the user name.
pub const USERNAME_FILE: &str = "username";

/// The file with the password.
pub const PASSWORD_FILE: &str = "password";

/// The file with the certificates (PEM) of the trusted authorities.
pub const AUTHORITIES_FILE: &str = "ca.crt";

/// A login whose user name, password and authorities are files. They are read at each connect, because they may change.
#[derive(Clone, Debug)]
pub struct LoginFiles {
    /// The folder of the files.
    pub folder: PathBuf,
    /// Host name or IP address of the broker.
    pub host: String,
    /// TCP port of the broker.
    pub port: u16,
    /// Client identifier.
    pub client_id: String,
    /// Whether the connection uses TLS.
    pub tls: bool,
    /// Whether [`AUTHORITIES_FILE`] exists. Otherwise the public authorities are trusted.
    pub authorities: bool,
}

/// Why a login could not be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadLoginError {
    /// A file could not be read.
    #[error("failed to read {}: expected a file of the Secret for the login at the broker", .file.display())]
    ReadFile {
        /// The file.
        file: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },

    /// The user name is not text.
    #[error("failed to read {}: expected a user name in UTF-8", .file.display())]
    ReadUsername {
        /// The file.
        file: PathBuf,
    },

    /// The authorities are not certificates.
    #[error("failed to set up TLS for the broker")]
    SetUpTls(#[from] TlsError),
}

/// The TLS settings of a client that verifies the broker with the file [`AUTHORITIES_FILE`] in this folder.
///
/// # Errors
/// If the file cannot be read, or has no certificates.
pub fn verified_by_file(folder: &Path) -> Result<ClientTls, ReadLoginError> {
    Ok(ClientTls::verified_by(Some(read(&folder.join(AUTHORITIES_FILE))?))?)
}

impl LoginFiles {
    /// Reads the login.
    ///
    /// # Errors
    /// If a file cannot be read or is invalid.
    pub fn read(&self) -> Result<Login, ReadLoginError> {
        let username_file = self.folder.join(USERNAME_FILE);
        let username = String::from_utf8(read(&username_file)?).map_err(|_| ReadLoginError::ReadUsername { file: username_file })?;
        let tls = match (self.tls, self.authorities) {
            (false, _) => None,
            (true, true) => Some(verified_by_file(&self.folder)?),
            (true, false) => Some(ClientTls::verified_by(None)?),
        };
        Ok(Login {
            host: self.host.clone(),
            port: self.port,
            client_id: self.client_id.clone(),
            username,
            password: read(&self.folder.join(PASSWORD_FILE))?.into(),
            tls,
            addresses: None,
        })
    }
}

/// The content of a file, without the line break that an editor may append.
fn read(file: &Path) -> Result<Vec<u8>, ReadLoginError> {
    let mut content = std::fs::read(file).map_err(|source| ReadLoginError::ReadFile { file: file.to_owned(), source })?;
    while content.last().is_some_and(|byte| matches!(byte, b'\r' | b'\n')) {
        content.pop();
    }
    Ok(content)
}
