//! TimescaleDB as the chart deploys it: a shared server with one database for each test, or a server for one test.

use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::{Namespace, Secret};
use kube::api::{DynamicObject, Patch, PatchParams};
use kube::{Api, Client};
use serde_json::json;
use tokio::process::Command;
use tokio::sync::OnceCell;
use tokio_postgres::types::ToSql;
use tokio_postgres::{NoTls, Row};

use crate::Fleet;
use crate::cluster::{self, output, root};
use crate::manifest::{CONNECTION_SECRET, secret};
use crate::wait::{seconds, until};

/// Namespace of the shared server. It is removed with the cluster, not at the end of a test run.
const SHARED_NAMESPACE: &str = "fleetwright-e2e";

/// Database that the chart creates on its server.
const CHART_DATABASE: &str = "fleetwright";

/// Maximum time until a new server answers: a pod and an `initdb`.
const STARTS_WITHIN: Duration = seconds(120);

/// Maximum time for an answer of a server.
const ANSWERS_WITHIN: Duration = seconds(15);

/// Key of an advisory lock (arbitrary). Concurrent `CREATE DATABASE` statements conflict, because they lock the template database.
const CREATE_LOCK: &str = "SELECT pg_advisory_lock(1)";

/// Name and connection URI of a database.
#[derive(Clone)]
pub struct Database {
    name: String,
    uri: String,
}

impl Database {
    /// Creates a database with this name on the shared server.
    pub(crate) async fn create(client: &Client, name: &str) -> Result<Self> {
        static SHARED: OnceCell<()> = OnceCell::const_new();
        SHARED.get_or_try_init(|| deploy(client, SHARED_NAMESPACE)).await?;
        let server = Self::of(client, SHARED_NAMESPACE).await?;
        let session = server.connect().await?;
        session.batch_execute(CREATE_LOCK).await?;
        session.batch_execute(&format!("CREATE DATABASE \"{name}\"")).await.context("failed to create the test's database")?;
        Ok(Self { uri: server.uri_of_database(name), name: name.to_owned() })
    }

    /// Drops the database that [`Database::create`] created.
    pub(crate) async fn drop(&self) -> Result<()> {
        let server = Self { uri: self.uri_of_database(CHART_DATABASE), name: CHART_DATABASE.to_owned() };
        server.execute(&format!("DROP DATABASE \"{}\" WITH (FORCE)", self.name)).await
    }

    /// Starts a server in the namespace of the test, for tests that break it. Its Secret is [`CONNECTION_SECRET`], as the chart writes it.
    pub async fn own(fleet: &Fleet) -> Result<Self> {
        deploy(&fleet.client, &fleet.namespace).await?;
        Self::of(&fleet.client, &fleet.namespace).await
    }

    /// The database that the chart created on the server of a namespace.
    async fn of(client: &Client, namespace: &str) -> Result<Self> {
        let secret = Api::<Secret>::namespaced(client.clone(), namespace).get(CONNECTION_SECRET).await?;
        let uri = secret.data.unwrap_or_default().remove("uri").context("the chart's Secret has no key uri")?;
        Ok(Self { name: CHART_DATABASE.to_owned(), uri: String::from_utf8(uri.0)? })
    }

    /// The Secret with the connection URI of this database, for Pipelines.
    #[must_use]
    pub fn secret(&self) -> serde_json::Value {
        secret(CONNECTION_SECRET, &json!({"uri": self.uri}))
    }

    /// URI of another database on the same server; it need not exist.
    #[must_use]
    pub fn uri_of_database(&self, name: &str) -> String {
        let (before, after) = self.uri.rsplit_once('?').unwrap_or((&self.uri, ""));
        let (server, _) = before.rsplit_once('/').unwrap_or((before, ""));
        format!("{server}/{name}?{after}")
    }

    /// Opens a new connection.
    pub async fn connect(&self) -> Result<tokio_postgres::Client> {
        let mut config: tokio_postgres::Config = self.uri.parse()?;
        config.connect_timeout(seconds(5));
        let (client, connection) = answer("a login", config.connect(NoTls)).await?;
        // The connection ends with the client. The client's next call reports a failure.
        tokio::spawn(connection);
        Ok(client)
    }

    /// Returns the rows of a query.
    pub async fn rows(&self, sql: &str, parameters: &[&(dyn ToSql + Sync)]) -> Result<Vec<Row>> {
        let session = self.connect().await?;
        answer(sql, session.query(sql, parameters)).await
    }

    /// Returns the first column of a query's only row, for example a count.
    pub async fn number(&self, sql: &str) -> Result<i64> {
        let session = self.connect().await?;
        Ok(answer(sql, session.query_one(sql, &[])).await?.get(0))
    }

    /// Executes statements.
    pub async fn execute(&self, sql: &str) -> Result<()> {
        let session = self.connect().await?;
        answer(sql, session.batch_execute(sql)).await
    }

    /// Whether the schema `public` has this table.
    pub async fn has_table(&self, name: &str) -> Result<bool> {
        let sql = format!("SELECT count(*) FROM pg_tables WHERE schemaname = 'public' AND tablename = '{name}'");
        Ok(self.number(&sql).await? == 1)
    }

    /// Waits until a query returns this number. A failure reports the last result.
    pub async fn reaches(&self, within: Duration, sql: &str, expected: i64) -> Result<()> {
        until(within, format!("{sql} gives {expected}"), async || {
            let found = self.number(sql).await?;
            ensure!(found == expected, "the query returned {found}");
            Ok(())
        })
        .await
    }
}

/// Applies the chart's database to a namespace and waits until it answers. An existing database is not changed.
async fn deploy(client: &Client, namespace: &str) -> Result<()> {
    let parameters = PatchParams::apply("e2e").force();
    if Api::<Secret>::namespaced(client.clone(), namespace).get_opt(CONNECTION_SECRET).await?.is_none() {
        let object = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}});
        Api::<Namespace>::all(client.clone()).patch(namespace, &parameters, &Patch::Apply(object)).await?;
        for object in rendered(namespace).await? {
            let kind = object.types.as_ref().context("the chart renders an object without a kind")?.kind.clone();
            let name = object.metadata.name.clone().unwrap_or_default();
            cluster::api(client, namespace, &kind).patch(&name, &parameters, &Patch::Apply(&object)).await?;
        }
    }
    let database = Database::of(client, namespace).await?;
    until(STARTS_WITHIN, format!("the database in {namespace} answers"), async || database.number("SELECT count(*) FROM pg_class").await)
        .await?;
    // The chart's user may not create databases, but the tests do.
    let mut command = Command::new("kubectl");
    command.args(["exec", "--namespace", namespace, "statefulset/timescaledb", "--"]);
    command.args(["psql", "-h", "/var/run/postgresql", "-U", "postgres", "-X", "-q", "-c", "ALTER ROLE fleetwright CREATEDB"]);
    output(&mut command).await.map(drop)
}

/// The objects of the chart's template for a namespace.
async fn rendered(namespace: &str) -> Result<Vec<DynamicObject>> {
    let mut helm = Command::new("helm");
    helm.args(["template", "fleetwright"]).arg(root().join("charts/fleetwright")).args(["--namespace", namespace]);
    helm.args(["--show-only", "templates/timescaledb.yaml", "--set", "timescaledb.enabled=true"]);
    // Small resource requests, because many databases run on one machine.
    helm.args(["--set", "timescaledb.sharedBuffers=128MB", "--set", "timescaledb.storage.size=1Gi"]);
    if let Ok(image) = std::env::var("TIMESCALEDB_IMAGE") {
        helm.args(["--set", &format!("timescaledb.image={image}")]);
    }
    let yaml = output(&mut helm).await?;
    // kubectl converts the YAML to JSON, so that this crate needs no YAML parser.
    let mut kubectl = Command::new("kubectl");
    kubectl.args(["create", "--dry-run=client", "--validate=false", "-o", "json", "-f", "-"]);
    let mut child = kubectl.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().context("failed to start kubectl")?;
    let mut input = child.stdin.take().context("no standard input")?;
    tokio::io::AsyncWriteExt::write_all(&mut input, yaml.as_bytes()).await?;
    drop(input);
    let printed = child.wait_with_output().await?;
    ensure!(printed.status.success(), "kubectl failed to parse the rendered chart");
    let stream = serde_json::Deserializer::from_slice(&printed.stdout).into_iter::<serde_json::Value>();
    let mut objects = Vec::new();
    for value in stream {
        let value = value?;
        match value.get("items").and_then(|items| items.as_array()) {
            Some(items) => objects.extend(items.iter().cloned()),
            None => objects.push(value),
        }
    }
    objects.into_iter().map(|object| Ok(serde_json::from_value(object)?)).collect()
}

/// Waits for an answer of the server. A server whose pod was deleted does not even close the connection, so the wait is limited.
async fn answer<T>(sql: &str, call: impl Future<Output = Result<T, tokio_postgres::Error>>) -> Result<T> {
    let answered = tokio::time::timeout(ANSWERS_WITHIN, call).await;
    answered.map_err(anyhow::Error::from).and_then(|answer| Ok(answer?)).with_context(|| format!("failed to run {sql}"))
}
