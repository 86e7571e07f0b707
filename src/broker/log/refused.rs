//! The clients that a broker refused: a bounded list, because any client can choose any name.

use std::cmp::Reverse;

use serde::{Deserialize, Serialize};

use super::line::Reason;

/// Maximum number of stored clients. A client that retries stays in the list during a flood of names that occur once.
const MAX_CLIENTS: usize = 100;

/// Maximum number of reported clients.
const MAX_REPORTED: usize = 10;

/// A client without an attempt for this long (seconds) is removed.
const FORGET_AFTER_SECONDS: i64 = 3600;

/// Maximum number of stored characters of a client's name.
const MAX_NAME_CHARS: usize = 64;

/// A refused client, with the number of its attempts.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct RefusedClient {
    /// The claimed name, cleaned ([`clean`]); empty if the client sent none.
    pub client: String,
    /// Address of the last attempt, without port.
    pub address: String,
    /// Why it was refused.
    pub reason: Reason,
    /// Number of attempts.
    pub count: u64,
    /// Time of the last attempt (seconds since 1970).
    pub last: i64,
}

/// All refusals since the broker's pod was created.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub struct RefusedClients {
    /// Number of refusals of all clients.
    pub count: u64,
    clients: Vec<RefusedClient>,
}

impl RefusedClients {
    /// Adds a refusal. `client` as in the log, `address` with or without a port.
    pub fn observe(&mut self, client: &str, address: &str, reason: Reason, time: i64) {
        self.count += 1;
        let address = clean(without_port(address));
        let client = if is_generated(client, &address) { String::new() } else { clean(client) };
        let same = |known: &&mut RefusedClient| {
            known.reason == reason && known.client == client && (!client.is_empty() || known.address == address)
        };
        if let Some(known) = self.clients.iter_mut().find(same) {
            known.count += 1;
            known.last = time;
            known.address = address;
            return;
        }
        self.clients.retain(|known| known.last + FORGET_AFTER_SECONDS > time);
        if self.clients.len() >= MAX_CLIENTS
            && let Some(least) = (0..self.clients.len()).min_by_key(|index| (self.clients[*index].count, self.clients[*index].last))
        {
            self.clients.swap_remove(least);
        }
        self.clients.push(RefusedClient { client, address, reason, count: 1, last: time });
    }

    /// The clients with an attempt within the last hour: by number of attempts, then the latest first.
    #[must_use]
    pub fn recent(&self, now: i64) -> Vec<RefusedClient> {
        let mut recent: Vec<RefusedClient> = self.clients.iter().filter(|known| known.last + FORGET_AFTER_SECONDS > now).cloned().collect();
        recent.sort_by(|a, b| {
            (Reverse(a.count), Reverse(a.last), &a.client, &a.address).cmp(&(Reverse(b.count), Reverse(b.last), &b.client, &b.address))
        });
        recent.truncate(MAX_REPORTED);
        recent
    }
}

/// `127.0.0.1:36840` -> `127.0.0.1`, `::1:36840` -> `::1`; Mosquitto writes the address of IPv6 without brackets.
fn without_port(address: &str) -> &str {
    match address.rsplit_once(':') {
        Some((host, port))
            if !host.is_empty() && port.len() <= 5 && port.bytes().all(|byte| byte.is_ascii_digit()) && !host.ends_with(':') =>
        {
            host
        }
        _ => address,
    }
}

/// Whether the broker chose the name, not the client: the address, or `auto-` with a UUID that changes with each attempt.
fn is_generated(client: &str, address: &str) -> bool {
    let uuid = |text: &str| text.len() == 36 && text.bytes().all(|byte| byte.is_ascii_hexdigit() || byte == b'-');
    client == address || client.strip_prefix("auto-").is_some_and(uuid)
}

/// At most 64 characters, each alphanumeric, ASCII punctuation or a space. Other characters (controls, marks that change the
/// direction of text) become U+FFFD.
#[must_use]
pub fn clean(text: &str) -> String {
    let allowed = |c: char| c.is_alphanumeric() || c.is_ascii_graphic() || c == ' ';
    text.chars().take(MAX_NAME_CHARS).map(|c| if allowed(c) { c } else { char::REPLACEMENT_CHARACTER }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_bounded_and_clean() {
        assert_eq!(clean("press-1"), "press-1");
        assert_eq!(clean("a\u{202e}b\u{2028}c\nd\u{1b}"), "a\u{fffd}b\u{fffd}c\u{fffd}d\u{fffd}");
        assert_eq!(clean(&"ü".repeat(5000)).chars().count(), MAX_NAME_CHARS);
    }

    #[test]
    fn addresses_lose_their_port() {
        for (address, host) in [("10.0.0.1:36840", "10.0.0.1"), ("10.0.0.1", "10.0.0.1"), ("fd00::1:36840", "fd00::1"), ("", "")] {
            assert_eq!(without_port(address), host);
        }
    }

    #[test]
    fn the_persistent_outlast_a_flood() {
        let mut refused = RefusedClients::default();
        for second in 0..5_000 {
            refused.observe(&format!("flood-{second}"), "10.0.0.9:1", Reason::NotAuthorised, second);
            if second % 20 == 0 {
                refused.observe("press-1", &format!("10.0.0.1:{second}"), Reason::NotAuthorised, second);
            }
        }
        let recent = refused.recent(5_000);
        assert_eq!((recent.len(), refused.count), (MAX_REPORTED, 5_250));
        assert_eq!(
            recent[0],
            RefusedClient {
                client: "press-1".to_owned(),
                address: "10.0.0.1".to_owned(),
                reason: Reason::NotAuthorised,
                count: 250,
                last: 4_980
            }
        );
        assert!(refused.clients.len() <= MAX_CLIENTS);
        assert!(refused.recent(5_000 + FORGET_AFTER_SECONDS).is_empty());
    }

    #[test]
    fn who_gives_no_name_is_known_by_address() {
        let mut refused = RefusedClients::default();
        refused.observe("10.0.0.1", "10.0.0.1:5", Reason::ProtocolError, 1);
        refused.observe("auto-B8432D2E-362F-6B6C-6E6B-A8713370FC0B", "10.0.0.1:6", Reason::ProtocolError, 2);
        refused.observe("10.0.0.2", "10.0.0.2:5", Reason::ProtocolError, 3);
        let recent: Vec<(String, String, u64)> =
            refused.recent(4).into_iter().map(|known| (known.client, known.address, known.count)).collect();
        assert_eq!(recent, [(String::new(), "10.0.0.1".to_owned(), 2), (String::new(), "10.0.0.2".to_owned(), 1)]);
    }
}
