//! The verification of a real PostgreSQL server with a certificate of a private authority, by operator and worker.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a helper of a test fails by panicking")]

mod common;

use std::sync::Arc;
use std::time::Duration;

use common::postgres::Postgres;
use common::worker::Chain;
use fleetwright::certificate::authority::{Authority, Data};
use fleetwright::database::connect::{ConnectError, connect, connect_as_operator, drive};
use fleetwright::database::uri::{AUTHORITIES_KEY, ConnectionUri};
use fleetwright::runtime::address::AddressPolicy;
use fleetwright::runtime::error::chain;
use jiff::Timestamp;
use serde_json::json;

/// The number of connections without TLS to a database, except that of the test.
const PLAIN: &str = "SELECT count(*) FROM pg_stat_activity JOIN pg_stat_ssl USING (pid)
                     WHERE datname = current_database() AND pid <> pg_backend_pid() AND NOT ssl";

fn authority() -> Authority {
    Authority::create("fleet", "database", Timestamp::now()).unwrap()
}

fn text(data: &Data, key: &str) -> String {
    String::from_utf8(data[key].0.clone()).unwrap()
}

/// A server with a certificate for `localhost` alone.
async fn server(authority: &Authority) -> Postgres {
    let postgres = Postgres::start().await;
    let data = authority.certify(&["localhost".to_owned()], None, Timestamp::now()).unwrap();
    postgres.write("server.crt", &text(&data, "tls.crt"));
    postgres.write("server.key", &text(&data, "tls.key"));
    let client = postgres.client("postgres").await;
    for setting in ["ssl = on", "ssl_cert_file = 'server.crt'", "ssl_key_file = 'server.key'"] {
        client.batch_execute(&format!("ALTER SYSTEM SET {setting}")).await.unwrap();
    }
    client.batch_execute("SELECT pg_reload_conf()").await.unwrap();
    let encrypted: ConnectionUri = format!("{}?sslmode=require", uri(&postgres, "localhost", "postgres")).parse().unwrap();
    while connect(&encrypted, "test").await.is_err() {
        // The server reloads its settings after it has answered.
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    postgres
}

/// A URI under this host name, without `sslmode`.
fn uri(postgres: &Postgres, host: &str, database: &str) -> String {
    format!("postgresql://postgres@{host}:{}/{database}", postgres.port())
}

/// Connects as the operator does, and as a worker does. Both must have the same result: whether the connection is encrypted, or the error.
async fn connects(uri: &str, authority: Option<&Authority>) -> Result<bool, ConnectError> {
    let mut uri: ConnectionUri = uri.parse().unwrap();
    if let Some(authority) = authority {
        uri = uri.verified_by(authority.trusted().as_bytes()).unwrap();
    }
    let policy = AddressPolicy::new(&["127.0.0.0/8".parse().unwrap()], &[]);
    let (operator, worker) = (connect_as_operator(&uri, "operator", &policy).await, connect(&uri, "worker").await);
    assert_eq!(operator.is_ok(), worker.is_ok(), "{:?} {:?}", operator.as_ref().err(), worker.as_ref().err());
    let (client, connection) = operator?;
    drive(connection);
    let row = client.query_one("SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()", &[]).await.unwrap();
    Ok(row.get(0))
}

#[tokio::test(flavor = "multi_thread")]
async fn the_authorities_of_the_secret_verify_the_server_and_its_name() {
    let (right, wrong) = (authority(), authority());
    let postgres = server(&right).await;
    let [name, address] = ["localhost", "127.0.0.1"].map(|host| uri(&postgres, host, "postgres"));
    assert!(connects(&name, Some(&right)).await.unwrap());
    for (uri, authority, refusal) in [
        (name.clone(), Some(&wrong), "invalid peer certificate"),
        (address.clone(), Some(&right), "not valid for name"),
        (format!("{name}?sslmode=verify-full"), Some(&wrong), "invalid peer certificate"),
        (format!("{name}?sslmode=verify-full"), None, "invalid peer certificate"),
    ] {
        let error = connects(&uri, authority).await.unwrap_err();
        assert!(matches!(error, ConnectError::Verify { .. }), "{error:?}");
        let message = chain(&error);
        assert!(message.contains(refusal) && message.contains("ca.crt"), "{message}");
    }
    // An explicit mode decides.
    assert!(connects(&format!("{address}?sslmode=require"), Some(&wrong)).await.unwrap());
    assert!(!connects(&format!("{address}?sslmode=disable"), Some(&right)).await.unwrap());
    // Without authorities and without a public name the connection is encrypted if the server can.
    assert!(connects(&address, None).await.unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_without_tls_is_refused_if_the_secret_has_authorities() {
    let postgres = Postgres::start().await;
    let uri = uri(&postgres, "localhost", "postgres");
    assert!(!connects(&uri, None).await.unwrap(), "not encrypted");
    let error = connects(&uri, Some(&authority())).await.unwrap_err();
    assert!(chain(&error).contains("the server does not offer TLS"), "{}", chain(&error));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_verifies_its_database_with_the_mounted_authorities() {
    let (right, wrong) = (authority(), authority());
    let postgres = Arc::new(server(&right).await);
    let decode = json!({"fields": [{"name": "rms", "type": "Float64"}]});
    let mut chain = Chain::start("devices/{device}/telemetry", &decode, Arc::clone(&postgres)).await;
    assert!(chain.worker.stop());
    chain.connect_to(uri(&postgres, "localhost", &chain.database));
    chain.worker.write(AUTHORITIES_KEY, &right.trusted());
    chain.start_worker(None);
    chain.worker.wait_ready();
    chain.publish("devices/press-1/telemetry", r#"{"rms": 1}"#);
    chain.wait_for("SELECT count(*) FROM vibration", 1).await;
    chain.wait_for(PLAIN, 0).await;

    assert!(chain.worker.stop());
    chain.worker.write(AUTHORITIES_KEY, &wrong.trusted());
    chain.start_worker(None);
    chain.worker.wait_not_ready("failed to verify the server at localhost");
}
