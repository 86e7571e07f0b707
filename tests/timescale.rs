//! Schema, plan and execution against a real TimescaleDB.

mod common;

use common::postgres::Postgres;
use fleetwright::timescale::system;

#[tokio::test]
async fn system_tables_are_made_once() {
    let postgres = Postgres::shared().await;
    let database = postgres.create_database().await;
    let client = postgres.client(&database).await;
    client.batch_execute("CREATE EXTENSION timescaledb").await.unwrap();
    for _ in 0..2 {
        client.batch_execute(&system::statements("public").join(";\n")).await.unwrap();
    }
    for table in system::TABLES {
        let row = client.query_one("SELECT to_regclass($1) IS NOT NULL", &[&format!("{}.{table}", system::SCHEMA)]).await.unwrap();
        assert!(row.get::<_, bool>(0), "{table}");
    }
}
