//! Password hashes as Mosquitto reads them: `$7$<iterations>$<salt>$<hash>`, PBKDF2 with HMAC-SHA-512 (RFC 8018), salt and
//! the 64 bytes of the hash in base64 (`mosquitto_passwd -H sha512-pbkdf2` writes the same).

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use sha2::{Digest, Sha256, Sha512};

use super::Password;

/// Iterations for a generated password.
///
/// Iterations slow down guessing. A generated password has 256 random bits, which nobody can guess. On every reload Mosquitto
/// hashes again for every connected client: with 15,000 clients one iteration blocks the broker for 60 ms, 101 iterations for 660 ms.
pub const GENERATED_ITERATIONS: u32 = 1;

/// Iterations for a password that a person chose: Mosquitto's own default.
pub const GIVEN_ITERATIONS: u32 = 101;

/// Bytes of a salt, as in Mosquitto 2.0.
const SALT_BYTES: usize = 12;

/// Bytes of a hash: the output of SHA-512.
const HASH_BYTES: usize = 64;

/// Separates these salts from any other use of the same digest.
const SALT_DOMAIN: &[u8] = b"fleetwright.io/password-salt/v1";

/// The hash of a password for a user of the broker; `uid` is the uid of the user's object (Device, Pipeline).
///
/// The salt derives from `uid` and `username`, so that the result depends only on the arguments and a restart of the
/// operator rewrites nothing. The salt is unique: an API server never reuses a uid, and one object has no two users with the
/// same name. It need not be secret. A random salt would only hide that an object has a former password again.
#[must_use]
pub fn hash(uid: &str, username: &str, password: &Password, iterations: u32) -> String {
    encode(password.expose().as_bytes(), &salt(uid, username), iterations)
}

fn salt(uid: &str, username: &str) -> [u8; SALT_BYTES] {
    let mut hasher = Sha256::new();
    for part in [SALT_DOMAIN, uid.as_bytes(), username.as_bytes()] {
        hasher.update((part.len() as u64).to_be_bytes());
        hasher.update(part);
    }
    let digest: [u8; 32] = hasher.finalize().into();
    std::array::from_fn(|index| digest[index])
}

fn encode(password: &[u8], salt: &[u8], iterations: u32) -> String {
    let hash = pbkdf2::pbkdf2_hmac_array::<Sha512, HASH_BYTES>(password, salt, iterations);
    format!("$7${iterations}${}${}", BASE64.encode(salt), BASE64.encode(hash))
}

/// Whether the text has the form of a hash that Mosquitto accepts, and so cannot break a line of its password file.
#[must_use]
pub fn is_well_formed(text: &str) -> bool {
    let mut parts = text.split('$');
    let well_formed = parts.next() == Some("")
        && parts.next() == Some("7")
        && parts.next().and_then(|iterations| iterations.parse::<u32>().ok()).is_some_and(|iterations| iterations > 0)
        && parts.next().and_then(|salt| BASE64.decode(salt).ok()).is_some_and(|salt| !salt.is_empty())
        && parts.next().and_then(|hash| BASE64.decode(hash).ok()).is_some_and(|hash| hash.len() == HASH_BYTES);
    well_formed && parts.next().is_none()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Lines from `mosquitto_passwd` 2.1.2, with their passwords.
    const WRITTEN_BY_MOSQUITTO: &[(&str, &str)] = &[
        (
            "pw",
            "$7$1$AVsPayrQ1yEMVvgOZkvgR4U1Mu9R8Dnbny11cY3nvdxIn11E+V0WkRb2IF9cfW452taF8D3ohJPhb79wD+ZBCg==$4cdV0Vt0Celgv8Ndsbk/EBWK2r/j0bj9qhFjlQJYH8kvniCx3DYoBY54HZ2OaSnMhO1YNKaGq8AFN3awwt5H2w==",
        ),
        (
            "pw",
            "$7$101$OnPwryvXD7LzF5s2GNbhhy6kTtqKpcPQb5En5Y7zGKbD/UgDyf3k5ug7STyeq7chP6NkWQgtiOZhPQvKgux+oA==$pN+69LGM9MLbB4iwhARfLnoOfoc5ipvjrnDjrdj55x4zcXPM7PuNoJ/eF4YOLwN+nF9VOHLAkAF+49uvrRjOEw==",
        ),
        (
            "a:b ü$7$ c",
            "$7$3$pJOnEPVDL9QkbpaDShdHSa0bBxjm0yDn6tOp1+WoDPMBz3NCBtidBIYO1omWS55/yKqvTdckZ+bu5FfnBKATTg==$nq6iavss3Pgfv9SG9xI9LwNVM8bQk9gITWNBQkBFBVAUYBwh5Pr5vIaUo7RqmTkGj3kRWIzJ4F3Skrq0olrOZw==",
        ),
    ];

    #[test]
    fn equals_what_mosquitto_passwd_writes() {
        for (password, line) in WRITTEN_BY_MOSQUITTO {
            let parts: Vec<&str> = line.split('$').collect();
            let (iterations, salt) = (parts[2].parse().unwrap(), BASE64.decode(parts[3]).unwrap());
            assert_eq!(encode(password.as_bytes(), &salt, iterations), *line);
            assert!(is_well_formed(line), "{line}");
        }
    }

    #[test]
    fn depends_on_each_argument_and_on_nothing_else() {
        let password = |text: &str| Password::given(text.as_bytes()).unwrap();
        let reference = hash("uid", "press-1", &password("secret"), 2);
        assert_eq!(hash("uid", "press-1", &password("secret"), 2), reference);
        for other in [
            hash("uie", "press-1", &password("secret"), 2),
            hash("uid", "press-2", &password("secret"), 2),
            hash("uid", "press-1", &password("secres"), 2),
            hash("uid", "press-1", &password("secret"), 3),
            // Without the lengths in the digest these two would share a salt.
            hash("uidp", "ress-1", &password("secret"), 2),
        ] {
            assert_ne!(other, reference);
        }
        assert!(is_well_formed(&reference));
    }

    #[test]
    fn malformed_hashes() {
        let good = hash("uid", "press-1", &Password::generate(), 1);
        for bad in
            ["", "*", "$7$", "$6$1$AAAA$AAAA", &good.replace("$7$1$", "$7$0$"), &format!("{good}$"), &format!("{good}\n"), &good[1..]]
        {
            assert!(!is_well_formed(bad), "{bad:?}");
        }
    }
}
