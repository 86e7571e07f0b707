//! TimescaleDB, as the chart deploys it: one that the tests share, with a database for each, or one of a test's own.

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

/// Namespace of the shared server. It stays when a test run ends, for the cluster goes as a whole.
const SHARED_NAMESPACE: &str = "fleetwright-e2e";

/// The database that the chart makes on its server.
const CHART_DATABASE: &str = "fleetwright";

/// How long a server may take from its manifest to its first answer: a pod and an `initdb`.
const STARTS_WITHIN: Duration = seconds(120);

/// How long a server may take to answer.
const ANSWERS_WITHIN: Duration = seconds(15);

/// Two databases made at once would both lock the template; 1 is the key of the lock that puts them in a row.
const CREATE_LOCK: &str = "SELECT pg_advisory_lock(1)";

/// A database: its name, and how to reach it.
#[derive(Clone)]
pub struct Database {
    name: String,
    uri: String,
}

impl Database {
    /// A database of the shared server, by this name.
    pub(crate) async fn create(client: &Client, name: &str) -> Result<Self> {
        static SHARED: OnceCell<()> = OnceCell::const_new();
        SHARED.get_or_try_init(|| deploy(client, SHARED_NAMESPACE)).await?;
        let server = Self::of(client, SHARED_NAMESPACE).await?;
        let session = server.connect().await?;
        session.batch_execute(CREATE_LOCK).await?;
        session.batch_execute(&format!("CREATE DATABASE \"{name}\"")).await.context("failed to make the test's database")?;
        Ok(Self { uri: server.uri_of_database(name), name: name.to_owned() })
    }

    /// Drops what [`Database::create`] made.
    pub(crate) async fn drop(&self) -> Result<()> {
        let server = Self { uri: self.uri_of_database(CHART_DATABASE), name: CHART_DATABASE.to_owned() };
        server.execute(&format!("DROP DATABASE \"{}\" WITH (FORCE)", self.name)).await
    }

    /// A server in the test's own namespace, to be broken. Its Secret is [`CONNECTION_SECRET`], as the chart writes it.
    pub async fn own(fleet: &Fleet) -> Result<Self> {
        deploy(&fleet.client, &fleet.namespace).await?;
        Self::of(&fleet.client, &fleet.namespace).await
    }

    /// The chart's own database on the server of a namespace.
    async fn of(client: &Client, namespace: &str) -> Result<Self> {
        let secret = Api::<Secret>::namespaced(client.clone(), namespace).get(CONNECTION_SECRET).await?;
        let uri = secret.data.unwrap_or_default().remove("uri").context("the chart's Secret has no key uri")?;
        Ok(Self { name: CHART_DATABASE.to_owned(), uri: String::from_utf8(uri.0)? })
    }

    /// The Secret that leads Pipelines to this database.
    #[must_use]
    pub fn secret(&self) -> serde_json::Value {
        secret(CONNECTION_SECRET, &json!({"uri": self.uri}))
    }

    /// The URI of another database of the same server, which need not exist.
    #[must_use]
    pub fn uri_of_database(&self, name: &str) -> String {
        let (before, after) = self.uri.rsplit_once('?').unwrap_or((&self.uri, ""));
        let (server, _) = before.rsplit_once('/').unwrap_or((before, ""));
        format!("{server}/{name}?{after}")
    }

    /// A connection of its own.
    pub async fn connect(&self) -> Result<tokio_postgres::Client> {
        let mut config: tokio_postgres::Config = self.uri.parse()?;
        config.connect_timeout(seconds(5));
        let (client, connection) = answer("a login", config.connect(NoTls)).await?;
        // It ends with the client; a failure shows in the client's next call.
        tokio::spawn(connection);
        Ok(client)
    }

    /// The rows of a query.
    pub async fn rows(&self, sql: &str, parameters: &[&(dyn ToSql + Sync)]) -> Result<Vec<Row>> {
        let session = self.connect().await?;
        answer(sql, session.query(sql, parameters)).await
    }

    /// The first column of the one row of a query: a count, mostly.
    pub async fn number(&self, sql: &str) -> Result<i64> {
        let session = self.connect().await?;
        Ok(answer(sql, session.query_one(sql, &[])).await?.get(0))
    }

    /// Runs statements.
    pub async fn execute(&self, sql: &str) -> Result<()> {
        let session = self.connect().await?;
        answer(sql, session.batch_execute(sql)).await
    }

    /// Whether a table of the schema `public` is there.
    pub async fn has_table(&self, name: &str) -> Result<bool> {
        let sql = format!("SELECT count(*) FROM pg_tables WHERE schemaname = 'public' AND tablename = '{name}'");
        Ok(self.number(&sql).await? == 1)
    }

    /// Waits until a query gives this number, and says what it gave when it does not.
    pub async fn reaches(&self, within: Duration, sql: &str, expected: i64) -> Result<()> {
        until(within, format!("{sql} gives {expected}"), async || {
            let found = self.number(sql).await?;
            ensure!(found == expected, "it gives {found}");
            Ok(())
        })
        .await
    }
}

/// Renders the chart's database into a namespace, and waits until it answers. One that is there already stays as it is.
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
    // The chart's user owns its database and no more; tests make databases of their own.
    let mut command = Command::new("kubectl");
    command.args(["exec", "--namespace", namespace, "statefulset/timescaledb", "--"]);
    command.args(["psql", "-h", "/var/run/postgresql", "-U", "postgres", "-X", "-q", "-c", "ALTER ROLE fleetwright CREATEDB"]);
    output(&mut command).await.map(drop)
}

/// The objects of the chart's template, for a namespace.
async fn rendered(namespace: &str) -> Result<Vec<DynamicObject>> {
    let mut helm = Command::new("helm");
    helm.args(["template", "fleetwright"]).arg(root().join("charts/fleetwright")).args(["--namespace", namespace]);
    helm.args(["--show-only", "templates/timescaledb.yaml", "--set", "timescaledb.enabled=true"]);
    // Small, since many stand on one machine.
    helm.args(["--set", "timescaledb.sharedBuffers=128MB", "--set", "timescaledb.storage.size=1Gi"]);
    if let Ok(image) = std::env::var("TIMESCALEDB_IMAGE") {
        helm.args(["--set", &format!("timescaledb.image={image}")]);
    }
    let yaml = output(&mut helm).await?;
    // kubectl turns it into JSON, so that nothing here need read YAML.
    let mut kubectl = Command::new("kubectl");
    kubectl.args(["create", "--dry-run=client", "--validate=false", "-o", "json", "-f", "-"]);
    let mut child = kubectl.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().context("failed to start kubectl")?;
    let mut input = child.stdin.take().context("no standard input")?;
    tokio::io::AsyncWriteExt::write_all(&mut input, yaml.as_bytes()).await?;
    drop(input);
    let printed = child.wait_with_output().await?;
    ensure!(printed.status.success(), "kubectl does not read what the chart renders");
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

/// What a server answers. One whose pod is gone answers nothing, not even that it is gone.
async fn answer<T>(sql: &str, call: impl Future<Output = Result<T, tokio_postgres::Error>>) -> Result<T> {
    let answered = tokio::time::timeout(ANSWERS_WITHIN, call).await;
    answered.map_err(anyhow::Error::from).and_then(|answer| Ok(answer?)).with_context(|| format!("failed to run {sql}"))
}
