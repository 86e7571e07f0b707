//! Which certificates of devices are revoked before their time: as the operator keeps it, and as a broker reads it.

use std::collections::BTreeMap;
use std::fmt::Write;

use jiff::Timestamp;
use rcgen::{CertificateRevocationListParams, KeyIdMethod, RevokedCertParams, SerialNumber, date_time_ymd};
use thiserror::Error;

use super::client::{ClientAuthority, Serial};
use super::since_1970;

/// The most revocations that are kept at a time: each takes some 110 bytes of a Secret (50 of them in the list that the broker
/// reads), which may have 1 MiB.
pub const MOST_REVOCATIONS: usize = 8000;

/// One certificate that is revoked.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Revocation {
    /// The Device it was issued to.
    pub device: String,
    /// Its own end: from then on it need not be remembered.
    pub not_after: Timestamp,
    /// When it was revoked.
    pub revoked_at: Timestamp,
}

/// All that are revoked, by serial number.
pub type Revocations = BTreeMap<Serial, Revocation>;

/// A text that the operator did not write.
#[derive(Clone, Debug, Eq, Error, PartialEq)]
#[error("line {line} of the revocations is not what the operator writes: expected serial number, device, and two times in seconds")]
pub struct ParseRevocations {
    /// Number of the line, from 1.
    pub line: usize,
}

/// As text: a line each, sorted.
#[must_use]
pub fn render(revocations: &Revocations) -> String {
    let mut text = String::new();
    for (serial, revocation) in revocations {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{serial} {} {} {}", revocation.device, revocation.not_after.as_second(), revocation.revoked_at.as_second());
    }
    text
}

/// From the text that [`render`] wrote.
///
/// # Errors
/// When it is anything else.
pub fn parse(text: &str) -> Result<Revocations, ParseRevocations> {
    let parse = |line: &str| {
        let mut words = line.split(' ');
        let serial = words.next()?.parse().ok()?;
        let device = words.next().filter(|device| !device.is_empty())?.to_owned();
        let mut time = || Timestamp::from_second(words.next()?.parse().ok()?).ok();
        let revocation = Revocation { device, not_after: time()?, revoked_at: time()? };
        words.next().is_none().then_some((serial, revocation))
    };
    text.lines().enumerate().map(|(index, line)| parse(line).ok_or(ParseRevocations { line: index + 1 })).collect()
}

impl ClientAuthority {
    /// The list as a broker reads it (a CRL, RFC 5280 section 5), as PEM. `number` grows with each list.
    ///
    /// It names as its next update the authority's own end: a broker refuses everybody once that time is over, and must not do so
    /// because the operator is away. How fresh a list is does not depend on it, for every change is handed to the broker.
    ///
    /// # Errors
    /// When the key refuses to sign.
    pub fn revocation_list(&self, number: u64, revoked: &[(Serial, Timestamp)], this_update: Timestamp) -> Result<String, rcgen::Error> {
        let revoked = revoked.iter().map(|(serial, at)| RevokedCertParams {
            serial_number: serial.number(),
            revocation_time: date_time_ymd(1970, 1, 1) + since_1970(*at),
            reason_code: None,
            invalidity_date: None,
        });
        let list = CertificateRevocationListParams {
            this_update: date_time_ymd(1970, 1, 1) + since_1970(this_update),
            next_update: date_time_ymd(1970, 1, 1) + since_1970(self.not_after()),
            crl_number: SerialNumber::from(number),
            issuing_distribution_point: None,
            revoked_certs: revoked.collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        list.signed_by(&self.issuer)?.pem()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_rendered_is_parsed() {
        let time = |second| Timestamp::from_second(second).unwrap();
        let revocation =
            |device: &str| Revocation { device: device.to_owned(), not_after: time(2_000_000_000), revoked_at: time(1_800_000_000) };
        let revocations: Revocations = [
            (Serial::generate(), revocation("press-1")),
            (Serial::generate(), revocation("press-1")),
            (Serial::generate(), revocation("a.b")),
        ]
        .into();
        assert_eq!(parse(&render(&revocations)), Ok(revocations));
        assert_eq!(parse(""), Ok(Revocations::new()));
    }

    #[test]
    fn what_another_wrote_is_refused() {
        let good = "000000000000000a press-1 2000000000 1800000000";
        assert_eq!(parse(good).unwrap().len(), 1);
        for bad in ["", "x press-1 1 1", "0a press-1 1", "0a press-1 1 1 1", "0a  1 1", "0a press-1 1 x"] {
            assert_eq!(parse(&format!("{good}\n{bad}\n{good}")), Err(ParseRevocations { line: 2 }), "{bad:?}");
        }
    }
}
