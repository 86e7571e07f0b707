//! The namespace of a test, and the actions of a user in it.

use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use futures::FutureExt;
use k8s_openapi::api::core::v1::{Event, Namespace};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::api::{DeleteParams, DynamicObject, ListParams, Patch, PatchParams, PostParams};
use kube::{Api, Client, ResourceExt};
use serde_json::{Value, json};

use crate::database::Database;
use crate::wait::{seconds, until};
use crate::{cluster, diagnose};

/// Maximum time until a new object is Ready. Most of it is the start of pods on a busy machine.
pub const READY_WITHIN: Duration = seconds(120);

/// Maximum time of a namespace's deletion, including pods and volumes.
pub const GONE_WITHIN: Duration = seconds(90);

/// Maximum time of a test. A test that exceeds it hangs.
const TEST_LIMIT: Duration = seconds(480);

/// Namespace of a test and its connection to the API server.
#[derive(Clone)]
pub struct Fleet {
    /// Client of the API server.
    pub client: Client,

    /// Namespace of the test.
    pub namespace: String,

    /// Database of the test; dropped at its end.
    database: Arc<OnceLock<Database>>,
}

/// As [`run`], but without concurrent tests in this process: for tests that disturb shared components.
///
/// # Panics
/// Panics when the test fails.
pub fn run_alone(name: &str, test: impl AsyncFnOnce(Fleet) -> Result<()>) {
    static TURN: Mutex<()> = Mutex::new(());
    // A failed test poisons the lock. That must not fail the next test.
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    run(name, test);
}

/// Runs a test in a new namespace. When the test fails, its objects and logs are printed. The namespace is deleted in any
/// case, unless `KEEP` is set.
///
/// # Panics
/// Panics when the test fails.
pub fn run(name: &str, test: impl AsyncFnOnce(Fleet) -> Result<()>) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let started = Instant::now();
        let fleet = Fleet::create(name).await.expect("a namespace for the test");
        let outcome = AssertUnwindSafe(tokio::time::timeout(TEST_LIMIT, test(fleet.clone()))).catch_unwind().await;
        let failure = match outcome {
            Ok(Ok(Ok(()))) => None,
            Ok(Ok(Err(error))) => Some(format!("{error:#}")),
            Ok(Err(_)) => Some(format!("the test did not end within {} s", TEST_LIMIT.as_secs())),
            Err(panic) => Some(panic_message(&*panic)),
        };
        if let Some(failure) = &failure {
            eprintln!("---- {name} failed after {:.1} s: {failure}", started.elapsed().as_secs_f64());
            diagnose::print(&fleet).await;
        }
        let removed = if std::env::var_os("KEEP").is_some() { Ok(()) } else { fleet.remove().await };
        println!("{name}: {:.1} s", started.elapsed().as_secs_f64());
        if let Some(failure) = failure {
            panic!("{failure}");
        }
        if let Err(error) = removed {
            panic!("the test's namespace does not go whole: {error:#}");
        }
    });
}

fn panic_message(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
    format!("panicked: {}", text.unwrap_or("without a message"))
}

impl Fleet {
    /// Creates a namespace that enforces the restricted Pod Security Standard.
    async fn create(name: &str) -> Result<Self> {
        let client = cluster::client().await?;
        let namespace = format!("{name}-{:06x}", rand::random_range(0..0x0100_0000));
        let object = json!({
            "metadata": {"name": namespace, "labels": {"pod-security.kubernetes.io/enforce": "restricted", "fleetwright.io/e2e": name}},
        });
        Api::<Namespace>::all(client.clone()).create(&PostParams::default(), &serde_json::from_value(object)?).await?;
        Ok(Self { client, namespace, database: Arc::default() })
    }

    /// Creates a second namespace, which the test removes by [`Self::remove_namespace`].
    pub async fn another(&self, name: &str) -> Result<Self> {
        Self::create(name).await
    }

    /// Deletes the namespace, waits until it is gone, and drops the test's database.
    async fn remove(&self) -> Result<()> {
        let removed = self.remove_namespace().await;
        if let Some(database) = self.database.get() {
            database.drop().await?;
        }
        removed
    }

    /// Deletes the namespace and waits until it is gone. A missing namespace is not an error.
    pub async fn remove_namespace(&self) -> Result<()> {
        let api = Api::<Namespace>::all(self.client.clone());
        if api.get_opt(&self.namespace).await?.is_some_and(|namespace| namespace.metadata.deletion_timestamp.is_none()) {
            api.delete(&self.namespace, &DeleteParams::default()).await?;
        }
        until(GONE_WITHIN, format!("namespace {} is gone", self.namespace), async || {
            let Some(namespace) = api.get_opt(&self.namespace).await? else { return Ok(()) };
            let conditions = namespace.status.and_then(|status| status.conditions).unwrap_or_default();
            bail!("still there: {:?}", conditions.into_iter().filter_map(|c| c.message).collect::<Vec<_>>())
        })
        .await
    }

    /// The objects of a kind in the namespace of the test.
    #[must_use]
    pub fn api(&self, kind: &str) -> Api<DynamicObject> {
        cluster::api(&self.client, &self.namespace, kind)
    }

    /// Applies an object like `kubectl apply --server-side`.
    pub async fn apply(&self, object: Value) -> Result<DynamicObject> {
        let (kind, name) = (text(&object, "/kind")?, text(&object, "/metadata/name")?);
        let parameters = PatchParams::apply("e2e").force();
        self.api(&kind).patch(&name, &parameters, &Patch::Apply(object)).await.with_context(|| format!("failed to apply {kind} {name}"))
    }

    /// Applies several objects concurrently.
    pub async fn apply_all(&self, objects: impl IntoIterator<Item = Value>) -> Result<()> {
        futures::future::try_join_all(objects.into_iter().map(|object| self.apply(object))).await.map(drop)
    }

    /// Changes an object with a merge patch.
    pub async fn change(&self, kind: &str, name: &str, change: Value) -> Result<DynamicObject> {
        let patched = self.api(kind).patch(name, &PatchParams::default(), &Patch::Merge(change)).await;
        patched.with_context(|| format!("failed to change {kind} {name}"))
    }

    /// Requests the deletion of an object.
    pub async fn delete(&self, kind: &str, name: &str) -> Result<()> {
        self.api(kind).delete(name, &DeleteParams::default()).await.with_context(|| format!("failed to delete {kind} {name}")).map(drop)
    }

    /// Waits until the object is gone.
    pub async fn gone(&self, kind: &str, name: &str, within: Duration) -> Result<()> {
        until(within, format!("{kind} {name} is gone"), async || {
            let object = self.api(kind).get_opt(name).await?;
            ensure!(object.is_none(), "still there: {}", object.map(|o| summary(&o)).unwrap_or_default());
            Ok(())
        })
        .await
    }

    /// Waits until `Ready` is True for the current generation of the object.
    pub async fn ready(&self, kind: &str, name: &str) -> Result<DynamicObject> {
        until(READY_WITHIN, format!("{kind} {name} is Ready"), async || {
            let object = self.api(kind).get(name).await?;
            ensure!(is_ready(&object), "its state is {}", summary(&object));
            Ok(object)
        })
        .await
    }

    /// Waits until all of these objects, given as `Kind/name`, are Ready.
    pub async fn all_ready(&self, objects: &[&str]) -> Result<()> {
        for object in objects {
            let (kind, name) = object.split_once('/').context("expected Kind/name")?;
            self.ready(kind, name).await?;
        }
        Ok(())
    }

    /// Waits until a condition has this status for the object's current generation and, unless `reason` is empty, this reason.
    pub async fn condition(&self, kind: &str, name: &str, type_: &str, status: &str, reason: &str) -> Result<Condition> {
        until(READY_WITHIN, format!("{kind} {name} has {type_}={status} {reason}"), async || {
            let object = self.api(kind).get(name).await?;
            let found = conditions(&object).into_iter().find(|condition| {
                condition.type_ == type_
                    && condition.status == status
                    && (reason.is_empty() || condition.reason == reason)
                    && condition.observed_generation == object.metadata.generation
            });
            found.with_context(|| format!("its state is {}", summary(&object)))
        })
        .await
    }

    /// Waits for an Event of type `Normal` or `Warning` for an object, and returns its message.
    pub async fn event(&self, kind: &str, name: &str, type_: &str, reason: &str) -> Result<String> {
        let selector = format!("involvedObject.kind={kind},involvedObject.name={name},type={type_},reason={reason}");
        until(READY_WITHIN, format!("{kind} {name} has a {type_} Event {reason}"), async || {
            let events =
                Api::<Event>::namespaced(self.client.clone(), &self.namespace).list(&ListParams::default().fields(&selector)).await?;
            let event = events.items.into_iter().next().context("there is no such Event")?;
            Ok(event.message.unwrap_or_default())
        })
        .await
    }

    /// The value of a key of a Secret.
    pub async fn secret(&self, name: &str, key: &str) -> Result<String> {
        let secret: k8s_openapi::api::core::v1::Secret = Api::namespaced(self.client.clone(), &self.namespace).get(name).await?;
        let value = secret.data.unwrap_or_default().remove(key).with_context(|| format!("the Secret {name} has no key {key}"))?;
        Ok(String::from_utf8(value.0)?)
    }

    /// The generated password of a device.
    pub async fn password(&self, device: &str) -> Result<String> {
        self.secret(&format!("{device}-credentials"), "password").await
    }

    /// The host name of a Gateway for its devices, from its status.
    pub async fn address(&self, gateway: &str) -> Result<String> {
        let object = self.api("Gateway").get(gateway).await?;
        let address = object.data.pointer("/status/address").and_then(Value::as_str);
        Ok(address.context("the Gateway's status has no address")?.to_owned())
    }

    /// Creates a database for this test, and the Secret with its connection URI.
    pub async fn database(&self) -> Result<Database> {
        let database = self.database_without_secret().await?;
        self.apply(database.secret()).await?;
        Ok(database)
    }

    /// Creates a database for this test on the shared server.
    pub async fn database_without_secret(&self) -> Result<Database> {
        let database = Database::create(&self.client, &self.namespace).await?;
        self.database.set(database.clone()).ok().context("the test has a database already")?;
        Ok(database)
    }
}

fn text(object: &Value, pointer: &str) -> Result<String> {
    Ok(object.pointer(pointer).and_then(Value::as_str).with_context(|| format!("the object has no {pointer}"))?.to_owned())
}

/// The conditions of an object.
#[must_use]
pub fn conditions(object: &DynamicObject) -> Vec<Condition> {
    let list = object.data.pointer("/status/conditions").cloned().unwrap_or_default();
    serde_json::from_value(list).unwrap_or_default()
}

/// Whether `Ready` is True for the current generation of the object.
#[must_use]
pub fn is_ready(object: &DynamicObject) -> bool {
    let generation = object.metadata.generation;
    let observed = object.data.pointer("/status/observedGeneration").and_then(Value::as_i64);
    let holds = |c: &Condition| c.type_ == "Ready" && c.status == "True" && c.observed_generation == generation;
    observed == generation && conditions(object).iter().any(holds)
}

/// An object's generation and conditions, in one line.
#[must_use]
pub fn summary(object: &DynamicObject) -> String {
    let list: Vec<String> = conditions(object).iter().map(|c| format!("{}={} {}: {}", c.type_, c.status, c.reason, c.message)).collect();
    let observed = object.data.pointer("/status/observedGeneration").cloned().unwrap_or_default();
    format!("generation {:?}, observed {observed}, [{}]{}", object.metadata.generation, list.join("; "), deleting(object))
}

fn deleting(object: &DynamicObject) -> String {
    if object.metadata.deletion_timestamp.is_none() {
        return String::new();
    }
    format!(", being deleted, finalizers {:?}", object.finalizers())
}
