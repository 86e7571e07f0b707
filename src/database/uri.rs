//! The connection URI of a database, as its Secret holds it.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use tokio_postgres::Config;
use tokio_postgres::config::Host;

use crate::runtime::tls::{TlsError, Verification, client_configuration};

/// Key of a connection Secret with the certificates of the authorities (PEM) that verify the database, beside the URI; and its file name.
pub const AUTHORITIES_KEY: &str = "ca.crt";

/// The port of a URI that names none (<https://www.postgresql.org/docs/current/libpq-connect.html>).
pub const DEFAULT_PORT: u16 = 5432;

/// How a connection is encrypted and the server verified, with the meanings that libpq gives them
/// (<https://www.postgresql.org/docs/current/libpq-ssl.html>).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum TlsMode {
    /// Never encrypted.
    Disable,
    /// Encrypted if the server supports it; the server is not verified.
    Prefer,
    /// Encrypted; the server is not verified.
    Require,
    /// Encrypted; the server's certificate is checked against the authorities of the URI, or else against the public ones, and its name
    /// against the host.
    VerifyFull,
}

/// Top-level domains under which no public authority issues certificates: special uses (RFC 6761, RFC 6762, RFC 9476), and names that are
/// common in private networks (RFC 6762, appendix G).
const PRIVATE_DOMAINS: [&str; 13] =
    ["alt", "arpa", "corp", "example", "home", "internal", "intranet", "invalid", "lan", "local", "localhost", "private", "test"];

/// The least number of labels of a public host name. A name of two labels is usually `<service>.<namespace>` of the cluster.
const MIN_PUBLIC_LABELS: usize = 3;

/// A connection URI. Neither `Debug` nor any error shows its password.
#[derive(Clone, Eq, PartialEq)]
pub struct ConnectionUri {
    text: String,
    configuration: Config,
    tls: TlsMode,
    /// Whether the URI names `sslmode`.
    is_mode_explicit: bool,
    /// The certificates of the authorities (PEM) that the server is verified with; `None` for the public ones.
    authorities: Option<Vec<u8>>,
}

impl ConnectionUri {
    /// Where and as whom to connect.
    #[must_use]
    pub fn configuration(&self) -> &Config {
        &self.configuration
    }

    /// The URI itself, password included.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.text
    }

    /// How to encrypt: `sslmode` of the URI. Without it `verify-full` if there are authorities or if a host has a public name, else `prefer`.
    #[must_use]
    pub fn tls(&self) -> TlsMode {
        self.tls
    }

    /// The certificates of the authorities (PEM) that the server is verified with; `None` for the public ones.
    #[must_use]
    pub fn authorities(&self) -> Option<&[u8]> {
        self.authorities.as_deref()
    }

    /// The same connection, to a server that these authorities (PEM) verify.
    ///
    /// # Errors
    /// If they are not certificates.
    pub fn verified_by(mut self, authorities: &[u8]) -> Result<Self, TlsError> {
        client_configuration(Verification::Authorities(authorities))?;
        self.authorities = Some(authorities.to_vec());
        if !self.is_mode_explicit {
            self.tls = TlsMode::VerifyFull;
        }
        Ok(self)
    }

    /// Host and port for messages, for instance `timescale:5432`.
    #[must_use]
    pub fn address(&self) -> String {
        let ports = self.configuration.get_ports();
        let hosts = self.configuration.get_hosts().iter().enumerate().map(|(index, host)| {
            let port = ports.get(index).or(ports.first()).copied().unwrap_or(DEFAULT_PORT);
            match host {
                Host::Tcp(name) => format!("{name}:{port}"),
                Host::Unix(path) => path.display().to_string(),
            }
        });
        hosts.collect::<Vec<_>>().join(",")
    }
}

impl fmt::Debug for ConnectionUri {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "ConnectionUri({}, {:?})", self.address(), self.tls)
    }
}

/// What is wrong with a connection URI. Shows no part of it, since a password with unencoded characters could be anywhere.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum ConnectionUriError {
    /// It does not start as one.
    #[error("failed to find a PostgreSQL URI: expected postgresql://user:password@host:5432/database?sslmode=require")]
    FindScheme,

    /// The library does not understand it.
    #[error(
        "failed to parse the URI: expected postgresql://user:password@host:5432/database?sslmode=require with only parameters that \
         PostgreSQL knows; in the password write @ as %40, / as %2F, ? as %3F, # as %23, : as %3A, % as %25"
    )]
    Parse,

    /// The host is missing.
    #[error("failed to find a host in the URI: expected postgresql://user:password@host:5432/database")]
    FindHost,

    /// The user is missing.
    #[error("failed to find a user in the URI: expected postgresql://user:password@host:5432/database")]
    FindUser,

    /// `sslmode` has a value that is not supported.
    #[error("failed to read sslmode in the URI: expected disable, prefer, require or verify-full")]
    ReadSslMode,
}

impl FromStr for ConnectionUri {
    type Err = ConnectionUriError;

    fn from_str(text: &str) -> Result<Self, ConnectionUriError> {
        let text = text.trim();
        let rest = ["postgresql://", "postgres://"].iter().find_map(|scheme| text.strip_prefix(scheme));
        if !has_plain_authority(rest.ok_or(ConnectionUriError::FindScheme)?) {
            return Err(ConnectionUriError::Parse);
        }
        let (base, parameters) = text.split_once('?').unwrap_or((text, ""));
        let (modes, others): (Vec<&str>, Vec<&str>) =
            parameters.split('&').filter(|parameter| !parameter.is_empty()).partition(|parameter| parameter.starts_with("sslmode="));
        let mode = match modes.last().map(|parameter| &parameter["sslmode=".len()..]) {
            None => None,
            Some("disable") => Some(TlsMode::Disable),
            Some("prefer") => Some(TlsMode::Prefer),
            Some("require") => Some(TlsMode::Require),
            Some("verify-full") => Some(TlsMode::VerifyFull),
            Some(_) => return Err(ConnectionUriError::ReadSslMode),
        };
        // The transport encrypts, and the library knows no `sslmode`: see `connect`.
        let configuration: Config = format!("{base}?{}", others.join("&")).parse().map_err(|_| ConnectionUriError::Parse)?;
        let has_public_name = configuration.get_hosts().iter().any(|host| matches!(host, Host::Tcp(name) if is_public_name(name)));
        let default = if has_public_name { TlsMode::VerifyFull } else { TlsMode::Prefer };
        if configuration.get_hosts().is_empty() {
            return Err(ConnectionUriError::FindHost);
        }
        if configuration.get_user().is_none_or(str::is_empty) {
            return Err(ConnectionUriError::FindUser);
        }
        Ok(Self { text: text.to_owned(), configuration, tls: mode.unwrap_or(default), is_mode_explicit: mode.is_some(), authorities: None })
    }
}

/// Whether a public authority can have issued a certificate for this host name: not an address, not a name of a Service of a cluster
/// (`<service>.<namespace>.svc`, with or without a domain), not a private domain.
fn is_public_name(host: &str) -> bool {
    let name = host.trim_end_matches('.').to_ascii_lowercase();
    let labels: Vec<&str> = name.split('.').collect();
    let is_address = name.contains(':') || name.parse::<IpAddr>().is_ok();
    let of_cluster = labels.iter().skip(2).any(|label| *label == "svc");
    let is_private = labels.last().is_none_or(|domain| PRIVATE_DOMAINS.contains(domain));
    labels.len() >= MIN_PUBLIC_LABELS && !is_address && !of_cluster && !is_private
}

/// Whether credentials, if any, end at the one `@`, and only characters of host names and ports follow. Otherwise a password with
/// an unencoded character would be cut, and its second half would pass for a host.
fn has_plain_authority(rest: &str) -> bool {
    let authority = rest.split(['/', '?']).next().unwrap_or_default();
    let hosts = authority.rsplit('@').next().unwrap_or_default();
    rest.matches('@').count() == authority.matches('@').count()
        && authority.matches('@').count() <= 1
        && hosts.chars().all(|character| character.is_ascii_alphanumeric() || "-._:,[]%".contains(character))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn uris_that_are_understood() {
        for (text, address, tls) in [
            ("postgresql://u:p@db", "db:5432", TlsMode::Prefer),
            ("postgres://u@db:5433/fleet?sslmode=disable", "db:5433", TlsMode::Disable),
            ("postgresql://u:p%40%2F@db.ns.svc/fleet?sslmode=require&application_name=x\n", "db.ns.svc:5432", TlsMode::Require),
            ("postgresql://u:p@a:1,b:2/fleet?target_session_attrs=read-write&sslmode=verify-full", "a:1,b:2", TlsMode::VerifyFull),
        ] {
            let uri: ConnectionUri = text.parse().unwrap();
            assert_eq!((uri.address().as_str(), uri.tls()), (address, tls), "{text}");
        }
        for (host, tls) in [
            ("fleet.abc123.eu-west-1.rds.example.com", TlsMode::VerifyFull),
            ("db.example.com.", TlsMode::VerifyFull),
            ("timescale,db.example.com", TlsMode::VerifyFull),
            // `svc` as a part of another name.
            ("db.svc.example.com", TlsMode::VerifyFull),
            ("timescale", TlsMode::Prefer),
            ("timescale.fleet", TlsMode::Prefer),
            ("timescale-rw.fleet.svc", TlsMode::Prefer),
            ("timescale-rw.fleet.svc.cluster.local", TlsMode::Prefer),
            ("timescale-rw.fleet.svc.plant.example.com", TlsMode::Prefer),
            ("timescale-0.timescale.fleet.svc", TlsMode::Prefer),
            ("db.plant.lan", TlsMode::Prefer),
            ("ip-10-0-0-1.eu-west-1.compute.internal", TlsMode::Prefer),
            ("192.0.2.1", TlsMode::Prefer),
            ("[2001:db8::1]", TlsMode::Prefer),
        ] {
            let uri: ConnectionUri = format!("postgresql://u:p@{host}/fleet").parse().unwrap();
            assert_eq!(uri.tls(), tls, "{host}");
            let explicit: ConnectionUri = format!("postgresql://u:p@{host}/fleet?sslmode=require").parse().unwrap();
            assert_eq!(explicit.tls(), TlsMode::Require, "{host}");
        }
        let uri: ConnectionUri = "postgresql://u:p%40%2F@db/fleet".parse().unwrap();
        assert_eq!(uri.configuration().get_password(), Some(b"p@/".as_slice()));
        assert_eq!(uri.configuration().get_dbname(), Some("fleet"));
    }

    #[test]
    fn authorities_verify_the_server_unless_sslmode_says_otherwise() {
        let pem = rcgen::CertificateParams::default().self_signed(&rcgen::KeyPair::generate().unwrap()).unwrap().pem();
        for (parameters, tls) in [("", TlsMode::VerifyFull), ("?sslmode=disable", TlsMode::Disable), ("?sslmode=require", TlsMode::Require)]
        {
            let plain: ConnectionUri = format!("postgresql://u:p@db/fleet{parameters}").parse().unwrap();
            let uri = plain.clone().verified_by(pem.as_bytes()).unwrap();
            assert_eq!((uri.tls(), uri.authorities()), (tls, Some(pem.as_bytes())), "{parameters}");
            assert_ne!(uri, plain, "a connection with other authorities is another one");
            for broken in ["", "PEM", "-----BEGIN CERTIFICATE-----\nAA==\n-----END CERTIFICATE-----\n"] {
                assert!(plain.clone().verified_by(broken.as_bytes()).is_err(), "{broken}");
            }
        }
    }

    #[test]
    fn uris_that_are_refused() {
        for (text, error) in [
            ("", ConnectionUriError::FindScheme),
            ("host=db user=u", ConnectionUriError::FindScheme),
            ("mysql://u:p@db", ConnectionUriError::FindScheme),
            ("postgresql://u:p@db:notaport/x", ConnectionUriError::Parse),
            ("postgresql://u:pa?ss@db/x", ConnectionUriError::Parse),
            ("postgresql://u:pa/ss@db/x", ConnectionUriError::Parse),
            ("postgresql://u:pa@ss@db/x", ConnectionUriError::Parse),
            ("postgresql://u:p@db/x?sslmode=verify-ca", ConnectionUriError::ReadSslMode),
            ("postgresql://u:p@/x", ConnectionUriError::FindHost),
            ("postgresql://db/x", ConnectionUriError::FindUser),
        ] {
            assert_eq!(text.parse::<ConnectionUri>(), Err(error), "{text}");
        }
    }

    proptest! {
        #[test]
        fn no_text_panics_and_no_password_shows(text in ".{0,80}", first in "[A-Z]{8}", between in "[?@/:#%&]{0,3}", second in "[A-Z]{8}") {
            let password = format!("{first}{between}{second}");
            for uri in [text, format!("postgresql://u:{password}@db/x"), format!("postgresql://u:p@db/x?sslmode={password}")] {
                let shown = match uri.parse::<ConnectionUri>() {
                    Ok(parsed) => format!("{parsed:?}"),
                    Err(error) => format!("{error:?} {error}"),
                };
                prop_assert!(!shown.contains(&first) && !shown.contains(&second));
            }
        }
    }
}
