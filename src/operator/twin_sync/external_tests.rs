use super::*;
use crate::runtime::address::Forbidden;

fn login(password: &'static str) -> Login {
    Login {
        host: "mqtt.example.org".to_owned(),
        port: 8883,
        client_id: "fwo0".to_owned(),
        username: "sesame user".to_owned(),
        password: password.into(),
        tls: None,
        addresses: None,
    }
}

#[test]
fn each_login_failure_has_a_reason_and_hides_the_password() {
    let connection = |source| SyncError::Session(SessionError::Connection { address: String::new(), source: Box::new(source) });
    let io = |kind: std::io::ErrorKind| std::io::Error::from(kind);
    let refused = ConnectionError::ConnectionRefused;
    let (host, address) = ("mqtt.example.org:8883".to_owned(), std::net::Ipv4Addr::LOCALHOST.into());
    let forbidden = AddressError::Forbid { host, address, forbidden: Forbidden::Loopback };
    for (error, reason) in [
        (connection(refused(ConnectReturnCode::NotAuthorized)), "LoginRefused"),
        (connection(refused(ConnectReturnCode::ClientIdentifierNotValid)), "LoginRefused"),
        (connection(ConnectionError::Io(io(std::io::ErrorKind::ConnectionRefused))), "BrokerUnreachable"),
        (connection(ConnectionError::Tls(TlsError::Io(io(std::io::ErrorKind::ConnectionRefused)))), "BrokerUnreachable"),
        (connection(ConnectionError::Tls(TlsError::Io(std::io::Error::other("certificate has expired")))), "TlsFailed"),
        (SyncError::Session(SessionError::Timeout { address: String::new() }), "BrokerUnreachable"),
        (SyncError::Session(forbidden.into()), "AddressNotAllowed"),
    ] {
        let cause = cause(&login("sesame"), &error);
        assert_eq!(cause.reason.as_str(), reason, "{}", cause.message);
        assert!(cause.message.contains("mqtt.example.org:8883") && !cause.message.contains("sesame"), "{}", cause.message);
    }
}

#[test]
fn a_result_counts_only_for_the_present_login() {
    let (externals, gateway) = (SharedExternals::default(), GatewayKey::new("n", "g"));
    externals.set(&gateway, "login", Some(login("first")));
    let first = externals.of(&gateway).unwrap().login.unwrap();
    assert!(
        externals.record_outcome(&gateway, &first, Ok(())) && !externals.record_outcome(&gateway, &first, Ok(())),
        "the second time it is unchanged"
    );
    externals.set(&gateway, "login", Some(login("first")));
    assert_eq!(externals.of(&gateway).unwrap().outcome, Some(Ok(())), "the same login is as proven as before");

    externals.set(&gateway, "login", Some(login("second")));
    assert_eq!(externals.of(&gateway).unwrap().outcome, None);
    assert!(!externals.record_outcome(&gateway, &first, Ok(())), "too late");
    let second = externals.of(&gateway).unwrap().login.unwrap();
    let refused = Cause::new(Reason::LoginRefused, "");
    assert!(externals.record_outcome(&gateway, &second, Err(refused.clone())));
    assert_eq!(externals.of(&gateway).unwrap().outcome, Some(Err(refused)));
}

#[test]
fn the_last_login_of_a_deleted_gateway_is_kept() {
    let (externals, gateway) = (SharedExternals::default(), GatewayKey::new("n", "g"));
    let passwords = |namespace: &str| -> Vec<_> { externals.logins(namespace).values().map(|login| login.password.clone()).collect() };
    externals.set(&gateway, "login", Some(login("first")));
    externals.set(&GatewayKey::new("n", "waiting"), "other", None);
    externals.remove(&gateway);
    assert!(externals.of(&gateway).is_none());
    assert!(externals.log_in_with("n", "other") && !externals.log_in_with("n", "login") && !externals.log_in_with("m", "other"));
    assert_eq!((passwords("n"), passwords("other")), (vec!["first".into()], vec![]));
    externals.set(&gateway, "login", Some(login("second")));
    assert_eq!(passwords("n"), ["second"]);
}
