//! Whom a broker turned away: a bounded list of names that anyone can choose.

use std::cmp::Reverse;

use serde::{Deserialize, Serialize};

use super::line::Reason;

/// Clients that are remembered. One that comes again and again stays among them through a flood of names that come once.
const MAX_CLIENTS: usize = 100;

/// Clients that are told of.
const MAX_REPORTED: usize = 10;

/// A client that has not come for this long (seconds) is forgotten.
const FORGET_AFTER_SECONDS: i64 = 3600;

/// The most characters of a client's name that are kept.
const MAX_NAME_CHARS: usize = 64;

/// A client that was refused, as often as it tried.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct RefusedClient {
    /// The name that it claimed, cleaned ([`clean`]); empty where it gave none.
    pub client: String,
    /// Address, without port, from which it tried last.
    pub address: String,
    /// Why it was refused.
    pub reason: Reason,
    /// How often.
    pub count: u64,
    /// When it tried last (seconds since 1970).
    pub last: i64,
}

/// All that were refused since the broker's pod was made.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub struct RefusedClients {
    /// How often anyone was refused.
    pub count: u64,
    clients: Vec<RefusedClient>,
}

impl RefusedClients {
    /// Takes over a refusal. `client` as it stands in the log, `address` with or without a port.
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

    /// Those that tried within the last hour: the most persistent first, and of those that tried as often the latest.
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

/// Whether the broker, not the client, chose the name: its address, or `auto-` with a UUID, another one with each try.
fn is_generated(client: &str, address: &str) -> bool {
    let uuid = |text: &str| text.len() == 36 && text.bytes().all(|byte| byte.is_ascii_hexdigit() || byte == b'-');
    client == address || client.strip_prefix("auto-").is_some_and(uuid)
}

/// At most 64 characters, each a letter, a digit, a sign of ASCII or a space: what else a client sends (controls, marks that
/// turn the direction of writing) becomes U+FFFD.
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
