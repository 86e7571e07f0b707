//! X.509: reads and issues the certificates of brokers and devices. Pure except for the randomness of keys.
//!
//! [`server`]: checks a listener's certificate before a broker gets it; [`authority`]: issues it if the user names none.
//! [`request`]: a device's signing request; [`client`]: signs it; [`trust`]: the authorities that brokers trust if an external one signs.

pub mod authority;
pub mod client;
pub mod request;
pub mod server;
pub mod trust;

use std::fmt::Write;
use std::time::Duration;

use jiff::Timestamp;
use rcgen::{CertificateParams, date_time_ymd};
use sha2::{Digest, Sha256};
use x509_cert::Certificate;
use x509_cert::time::Time;

/// Sets when a certificate that is to be issued is valid. Times before 1970 are taken for 1970.
pub fn set_validity(parameters: &mut CertificateParams, not_before: Timestamp, not_after: Timestamp) {
    parameters.not_before = date_time_ymd(1970, 1, 1) + since_1970(not_before);
    parameters.not_after = date_time_ymd(1970, 1, 1) + since_1970(not_after);
}

fn since_1970(time: Timestamp) -> Duration {
    Duration::from_secs(u64::try_from(time.as_second()).unwrap_or_default())
}

/// SHA-256 of a certificate (DER) in hexadecimal digits: `openssl x509 -fingerprint -sha256`, in lower case without colons.
#[must_use]
pub fn fingerprint(certificate: &[u8]) -> String {
    let digest: [u8; 32] = Sha256::digest(certificate).into();
    hexadecimal(&digest)
}

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut text, byte| {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// When a certificate that was read is valid.
fn validity(certificate: &Certificate) -> (Timestamp, Timestamp) {
    let validity = certificate.tbs_certificate.validity;
    (timestamp(validity.not_before), timestamp(validity.not_after))
}

/// A time of a certificate that was read.
#[must_use]
pub fn timestamp(time: Time) -> Timestamp {
    // X.509 ends with the year 9999, as does Timestamp (a day earlier).
    i64::try_from(time.to_unix_duration().as_secs()).ok().and_then(|second| Timestamp::from_second(second).ok()).unwrap_or(Timestamp::MAX)
}

#[cfg(test)]
mod tests {
    use x509_cert::der::Decode;

    use super::*;

    #[test]
    fn times_are_issued_as_they_are_read() {
        let key = rcgen::KeyPair::generate().unwrap();
        for (from, to) in [("1970-01-01T00:00:00Z", "2026-02-28T23:59:59Z"), ("2049-12-31T23:59:59Z", "9999-12-30T12:00:00Z")] {
            let (from, to): (Timestamp, Timestamp) = (from.parse().unwrap(), to.parse().unwrap());
            let mut parameters = CertificateParams::default();
            set_validity(&mut parameters, from, to);
            let issued = parameters.self_signed(&key).unwrap();
            let validity = Certificate::from_der(issued.der()).unwrap().tbs_certificate.validity;
            assert_eq!((timestamp(validity.not_before), timestamp(validity.not_after)), (from, to));
        }
    }
}
