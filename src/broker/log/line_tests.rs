//! Lines as Mosquitto 2.1.2 wrote them, with clients that mean no good among them.

use super::*;

/// 2026-11-23T09:37:52Z.
const TIME: i64 = 1_795_426_672;

fn event(message: &str) -> Option<Event<'_>> {
    parse(message).map(|line| line.event)
}

fn disconnected<'a>(client: &'a str, address: &'a str, reason: Reason) -> Event<'a> {
    Event::Disconnected { client, address, reason }
}

#[test]
fn times() {
    let running = Event::BrokerRunning;
    for (line, time) in [
        ("2026-11-23T09:37:52: mosquitto version 2.1.2 running", Some(TIME)),
        ("1795426672: mosquitto version 2.1.2 running", Some(TIME)),
        ("mosquitto version 2.1.2 running", None),
    ] {
        assert_eq!(parse(line), Some(Line { time, event: running }), "{line}");
    }
}

#[test]
fn the_broker_itself() {
    assert_eq!(event("2026-11-23T09:38:28: mosquitto version 2.1.2 starting"), Some(Event::BrokerStarting));
    assert_eq!(event("2026-11-23T09:38:30: mosquitto version 2.1.2 terminating"), Some(Event::BrokerStopping));
}

#[test]
fn clients_that_come() {
    let press = Some(Event::Connected { client: "press-1", address: "127.0.0.1:36840" });
    for line in [
        "2026-11-23T09:37:52: New client connected from 127.0.0.1:36840 as press-1 (p5, c1, k60, u'press-1').",
        "2026-11-23T09:37:52: New client connected from 127.0.0.1:36840 as press-1 (p4, c0, k0).",
        "New client connected from 127.0.0.1:36840 as press-1 (p5, c1, k60, u'Zürich [1], (p5)').",
    ] {
        assert_eq!(event(line), press, "{line}");
    }
    let six = "New client connected from fd00::1:36840 as a b (p5, c1, k60, u'x').";
    assert_eq!(event(six), Some(Event::Connected { client: "a b", address: "fd00::1:36840" }));
}

/// Where identifiers are a client's own choice, as on a broker that runs elsewhere.
#[test]
fn clients_that_pretend_to_be_another_when_they_come() {
    for line in [
        "New client connected from 10.9.9.9:1 as press-1 (p5, c1, k60, u'press-1'). (p5, c1, k60, u'evil').",
        "New client connected from 10.9.9.9:1 as press-1 (p5, c1, k60). (p5, c1, k60).",
        "New client connected from 10.9.9.9:1 as press-1 (p5, c1, k60, u'a', u'b').",
        "New client connected from 10.9.9.9:1 as press-1 (p5, c1, k60, u'press-1",
        "New client connected from 10.9.9.9:1 as press-1 (pX, c1, k60).",
    ] {
        assert_eq!(event(line), None, "{line}");
    }
}

#[test]
fn clients_that_go() {
    for (reason, expected) in [
        ("", Reason::Orderly),
        (": connection closed by client", Reason::ClosedByClient),
        (": exceeded timeout", Reason::KeepAliveTimeout),
        (": session taken over", Reason::SessionTakenOver),
        (": not authorised", Reason::NotAuthorised),
        (": protocol error", Reason::ProtocolError),
        (": malformed packet", Reason::ProtocolError),
        (": Protocol error", Reason::TlsHandshakeFailed),
        (": client identifier not valid", Reason::ClientIdentifierNotValid),
        (": server busy", Reason::BrokerFull),
        (": used disallowed feature (QoS too high, retain not supported, or bad AUTH method)", Reason::Other),
    ] {
        let line = format!("2026-11-23T09:37:52: Client press-1 [127.0.0.1:36840] disconnected{reason}.");
        assert_eq!(event(&line), Some(disconnected("press-1", "127.0.0.1:36840", expected)), "{line}");
    }
    let denied = "2026-11-23T09:38:00: Client connection from 127.0.0.1 denied: max_connections exceeded.";
    assert_eq!(event(denied), Some(Event::Denied { address: "127.0.0.1" }));
}

#[test]
fn clients_that_pretend_to_be_another_when_they_are_refused() {
    let line = "2026-11-23T09:37:53: Client press-1 [127.0.0.1:99] disconnected: x. 'u\" ü [127.0.0.1:36946] disconnected: not authorised.";
    let name = "press-1 [127.0.0.1:99] disconnected: x. 'u\" ü";
    assert_eq!(event(line), Some(disconnected(name, "127.0.0.1:36946", Reason::NotAuthorised)));
    let overlong = format!("2026-11-23T09:37:54: Client press-1 [127.0.0.1:99] disconnected: not authorised.{}", "x".repeat(1000));
    let cut = parse(&overlong[..MAX_LINE_BYTES]).unwrap();
    assert!(matches!(cut, Line { time: Some(_), event: Event::Cut { client } } if client.starts_with("press-1 [")), "{cut:?}");
    // Other lines that begin like this.
    for line in [
        "Client press-1 [127.0.0.1:99] disconnected: not authorised. connected with too large Will payload",
        "Client press-1 [127.0.0.1:99] disconnected negotiated TLSv1.3 cipher TLS_AES_256_GCM_SHA384",
        "Client press-2 negotiated TLSv1.3 cipher TLS_AES_256_GCM_SHA384",
    ] {
        assert_eq!(event(line), None, "{line}");
    }
}

#[test]
fn all_other_lines_say_nothing() {
    for line in [
        "",
        ": ",
        "2026-11-23T09:37:54: New connection from 127.0.0.1:37002 on port 2883.",
        "2026-11-23T09:37:54: OpenSSL Error while trying to get the error[0]: error:0A00009C:SSL routines::http request",
        "2026-11-23T09:37:55: Bad client 127.0.0.1:55646 sending multiple CONNECT messages.",
        "2026-11-23T09:38:28: Warning: File /run/acls has world readable permissions. Future versions will refuse to load this file.",
        "2026-11-23T09:38:28: Config loaded from /etc/fleetwright/mosquitto.conf.",
        "2026-11-23T09:38:30: Reloading config.",
        "New bridge connected from 10.0.0.1:1 as press-1 (p5, c1, k60).",
    ] {
        assert_eq!(parse(line), None, "{line}");
    }
}

proptest::proptest! {
    /// Whatever name a refused client claims, its line tells of the address it came from, or of nothing.
    #[test]
    fn no_name_moves_the_address(name in "[^\u{0}-\u{1f}\u{7f}-\u{9f}]{0,80}") {
        let line = format!("2026-11-23T09:37:53: Client {name} [10.9.9.9:1] disconnected: not authorised.");
        proptest::prop_assert_eq!(event(&line), Some(disconnected(&name, "10.9.9.9:1", Reason::NotAuthorised)));
        let line = format!("New client connected from 10.9.9.9:1 as {name} (p5, c1, k60, u'{name}').");
        match event(&line) {
            Some(Event::Connected { client, address }) => proptest::prop_assert_eq!((client, address), (name.as_str(), "10.9.9.9:1")),
            other => proptest::prop_assert_eq!(other, None),
        }
    }

    /// No line makes it panic.
    #[test]
    fn any_line(line in ".{0,200}") {
        let _ = parse(&line);
    }
}
