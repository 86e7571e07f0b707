//! The only place that writes to the API server.
//!
//! Owned objects go by server-side apply, and only where the live object differs from the wanted one; a status goes by
//! merge patch, and only where it changed. So a steady fleet causes no writes, and neither does a restart.

use std::fmt::Debug;
use std::time::Duration;

use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams, Preconditions};
use kube::core::Status;
use kube::{Api, Client, Resource, ResourceExt};
use prometheus::{IntCounterVec, Opts, Registry};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use thiserror::Error;

use super::diff::{covers, merge_patch};
use crate::api::reason::Reason;
use crate::api::{GROUP, name};

/// Annotation with the revision of the content that was applied last. It tells a removed field, which a comparison of the
/// wanted with the live object cannot see.
const APPLIED_ANNOTATION: &str = "fleetwright.io/applied-revision";

/// The longest a call to the API server may take. kube's client retries by itself for far longer.
const TIMEOUT: Duration = Duration::from_secs(15);

/// Why a write did not happen.
#[derive(Debug, Error)]
pub enum WriteError {
    /// The API server refused, or could not be reached.
    #[error("failed to {verb} {kind} {name}")]
    Call {
        /// What was tried.
        verb: &'static str,
        /// Kind of the object.
        kind: String,
        /// Name of the object.
        name: String,
        /// Why it failed.
        #[source]
        source: Box<kube::Error>,
    },

    /// The API server did not answer in time.
    #[error("failed to {verb} {kind} {name}: no answer from the API server in {} s", TIMEOUT.as_secs())]
    Timeout {
        /// What was tried.
        verb: &'static str,
        /// Kind of the object.
        kind: String,
        /// Name of the object.
        name: String,
    },

    /// An object of that name is there already, and it is not ours.
    #[error("{kind} {name} exists and does not belong to this object: delete or rename it, or choose another name here")]
    NameConflict {
        /// Kind of the object.
        kind: String,
        /// Name of the object.
        name: String,
    },

    /// The object could not be turned into JSON.
    #[error("failed to encode {kind} {name}")]
    Encode {
        /// Kind of the object.
        kind: String,
        /// Name of the object.
        name: String,
        /// Why it failed.
        #[source]
        source: serde_json::Error,
    },
}

impl WriteError {
    /// A reason for conditions, events and metrics.
    #[must_use]
    pub fn reason(&self) -> Reason {
        match self {
            Self::NameConflict { .. } => Reason::NameConflict,
            Self::Timeout { .. } => Reason::ApiServerTimeout,
            Self::Call { .. } | Self::Encode { .. } => Reason::ApplyFailed,
        }
    }

    /// What the API server answered, if it did.
    #[must_use]
    pub fn status(&self) -> Option<&Status> {
        match self {
            Self::Call { source, .. } => match source.as_ref() {
                kube::Error::Api(status) => Some(status),
                _ => None,
            },
            _ => None,
        }
    }

    /// Whether the object is already there.
    #[must_use]
    pub fn is_already_exists(&self) -> bool {
        self.status().is_some_and(Status::is_already_exists)
    }

    /// Whether the namespace is on its way out, and takes in nothing new: all that is in it goes in a moment.
    #[must_use]
    pub fn is_namespace_terminating(&self) -> bool {
        self.status().is_some_and(is_namespace_terminating)
    }

    /// Whether the object is not there (any longer).
    #[must_use]
    pub fn is_not_found(&self) -> bool {
        self.status().is_some_and(Status::is_not_found)
    }
}

/// Whether the API server says that the namespace takes in nothing new.
#[must_use]
pub fn is_namespace_terminating(status: &Status) -> bool {
    let causes = status.details.iter().flat_map(|details| &details.causes);
    status.code == 403 && causes.into_iter().any(|cause| cause.reason == "NamespaceTerminating")
}

/// A kind of the API that lives in a namespace and can be read and written.
pub trait Kind: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + Debug + DeserializeOwned + Serialize {}
impl<K> Kind for K where K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + Debug + DeserializeOwned + Serialize {}

/// Whether a write was needed.
#[derive(Debug)]
pub enum Applied<K> {
    /// The live object was as wanted already.
    Unchanged(K),
    /// The object was created or changed.
    Changed(K),
}

impl<K> Applied<K> {
    /// The live object.
    pub fn into_inner(self) -> K {
        match self {
            Self::Unchanged(object) | Self::Changed(object) => object,
        }
    }
}

/// Writes to the API server in the name of one reconciler.
#[derive(Clone)]
pub struct Writer {
    client: Client,
    field_manager: &'static str,
    writes: IntCounterVec,
}

impl Writer {
    /// A writer with a field manager, such as `fleetwright/gateway`, that names this one place of use. Counts each write in
    /// `fleetwright_api_writes_total{manager, kind, verb}`.
    #[must_use]
    pub fn new(client: Client, field_manager: &'static str, metrics: &WriteMetrics) -> Self {
        Self { client, field_manager, writes: metrics.0.clone() }
    }

    /// The client, for reads.
    #[must_use]
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// Makes the live object as wanted, by server-side apply, where it is not.
    ///
    /// # Errors
    /// [`WriteError::NameConflict`] where an object of that name does not carry `owner`.
    pub async fn apply<K: Kind>(&self, owner: &OwnerReference, desired: &K) -> Result<Applied<K>, WriteError> {
        let namespace = desired.namespace().unwrap_or_default();
        let api = Api::<K>::namespaced(self.client.clone(), &namespace);
        let name = desired.name_any();
        let wanted = prepare(owner, desired)?;
        if let Some(live) = call::<K, _>("get", &name, api.get_opt(&name)).await? {
            if !live.owner_references().iter().any(|reference| reference.uid == owner.uid) {
                return Err(WriteError::NameConflict { kind: kind::<K>(), name });
            }
            if covers(&wanted, &encode(&live)?) {
                return Ok(Applied::Unchanged(live));
            }
        }
        let parameters = PatchParams::apply(self.field_manager).force();
        self.count::<K>("apply");
        Ok(Applied::Changed(call::<K, _>("apply", &name, api.patch(&name, &parameters, &Patch::Apply(&wanted))).await?))
    }

    /// Creates an object that is not there yet, without a look first: one call where the caller knows.
    ///
    /// # Errors
    /// [`WriteError::is_already_exists`] where it is there.
    pub async fn create<K: Kind>(&self, desired: &K) -> Result<K, WriteError> {
        let api = Api::<K>::namespaced(self.client.clone(), &desired.namespace().unwrap_or_default());
        let parameters = PostParams { field_manager: Some(self.field_manager.to_owned()), ..PostParams::default() };
        self.count::<K>("create");
        call::<K, _>("create", &desired.name_any(), api.create(&parameters, desired)).await
    }

    /// Merges `patch` into an object that is ours. A `metadata.resourceVersion` in it must be the present one.
    ///
    /// # Errors
    /// When the API server refuses or is away, or the object is another by now.
    pub async fn merge<K: Kind>(&self, namespace: &str, name: &str, patch: &Value) -> Result<K, WriteError> {
        let api = Api::<K>::namespaced(self.client.clone(), namespace);
        let parameters = PatchParams { field_manager: Some(self.field_manager.to_owned()), ..PatchParams::default() };
        self.count::<K>("patch");
        call::<K, _>("change", name, api.patch(name, &parameters, &Patch::Merge(patch))).await
    }

    /// Deletes an object. That it is gone already is no error.
    ///
    /// # Errors
    /// When the API server refuses or is away.
    pub async fn delete<K: Kind>(&self, namespace: &str, name: &str) -> Result<(), WriteError> {
        self.delete_with::<K>(namespace, name, &DeleteParams::background()).await
    }

    /// Deletes an object in a way of its own.
    ///
    /// # Errors
    /// When the API server refuses or is away.
    pub async fn delete_with<K: Kind>(&self, namespace: &str, name: &str, parameters: &DeleteParams) -> Result<(), WriteError> {
        let api = Api::<K>::namespaced(self.client.clone(), namespace);
        self.count::<K>("delete");
        match call::<K, _>("delete", name, api.delete(name, parameters)).await {
            Ok(_) => Ok(()),
            Err(error) if error.is_not_found() => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Deletes the objects of this kind that match the label selector, have `owner` as an owner and are not named in `keep`. Reads
    /// their metadata only, for some are Secrets.
    ///
    /// # Errors
    /// When the API server refuses or is away.
    pub async fn prune<K: Kind>(&self, owner: &OwnerReference, namespace: &str, selector: &str, keep: &[String]) -> Result<(), WriteError> {
        let api = Api::<K>::namespaced(self.client.clone(), namespace);
        let found = call::<K, _>("list", selector, api.list_metadata(&ListParams::default().labels(selector))).await?;
        for object in found {
            let ours = object.owner_references().iter().any(|reference| reference.uid == owner.uid);
            if ours && !keep.contains(&object.name_any()) {
                // Not an object that has replaced it since.
                let preconditions = Preconditions { uid: object.uid(), resource_version: None };
                let parameters = DeleteParams { preconditions: Some(preconditions), ..DeleteParams::background() };
                self.delete_with::<K>(namespace, &object.name_any(), &parameters).await?;
            }
        }
        Ok(())
    }

    /// Writes the status of an object where it differs from the previous one. Returns whether it did.
    ///
    /// # Errors
    /// When the API server refuses or is away. That the object is gone is no error.
    pub async fn write_status<K: Kind, S: Serialize>(
        &self,
        namespace: &str,
        name: &str,
        previous: Option<&S>,
        wanted: &S,
    ) -> Result<bool, WriteError> {
        let encode = |status: &S| {
            serde_json::to_value(status).map_err(|source| WriteError::Encode { kind: kind::<K>(), name: name.to_owned(), source })
        };
        let previous = previous.map(encode).transpose()?.unwrap_or_else(|| json!({}));
        let Some(patch) = merge_patch(&previous, &encode(wanted)?) else {
            return Ok(false);
        };
        self.patch_status::<K>(namespace, name, &patch).await.map(|_| true)
    }

    /// Merges `patch` into the status of an object. Returns the object since, or `None` where it is gone.
    ///
    /// # Errors
    /// When the API server refuses or is away.
    pub async fn patch_status<K: Kind>(&self, namespace: &str, name: &str, patch: &Value) -> Result<Option<K>, WriteError> {
        let api = Api::<K>::namespaced(self.client.clone(), namespace);
        let parameters = PatchParams { field_manager: Some(self.field_manager.to_owned()), ..PatchParams::default() };
        self.count::<K>("status");
        let body = Patch::Merge(json!({ "status": patch }));
        match call::<K, _>("write the status of", name, api.patch_status(name, &parameters, &body)).await {
            Ok(object) => Ok(Some(object)),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn count<K: Kind>(&self, verb: &str) {
        self.writes.with_label_values(&[self.field_manager, &K::kind(&()), verb]).inc();
    }
}

/// The counter of all writes, shared by the [`Writer`]s of a process.
#[derive(Clone)]
pub struct WriteMetrics(IntCounterVec);

impl WriteMetrics {
    /// Registers the counter.
    ///
    /// # Errors
    /// When it is registered already.
    pub fn register(registry: &Registry) -> Result<Self, prometheus::Error> {
        let options = Opts::new("fleetwright_api_writes_total", "Writes to the API server, leases and events aside.");
        let counter = IntCounterVec::new(options, &["manager", "kind", "verb"])?;
        registry.register(Box::new(counter.clone()))?;
        Ok(Self(counter))
    }
}

/// An owner reference that makes `object` the controller of what carries it.
pub fn owner_reference<K: Resource<DynamicType = ()>>(object: &K) -> OwnerReference {
    OwnerReference {
        api_version: K::api_version(&()).into_owned(),
        kind: K::kind(&()).into_owned(),
        name: object.meta().name.clone().unwrap_or_default(),
        uid: object.meta().uid.clone().unwrap_or_default(),
        controller: Some(true),
        // Foreground deletion of the owner must not wait for permission to look at each child.
        block_owner_deletion: None,
    }
}

/// The names of these objects, for [`Writer::prune`].
#[must_use]
pub fn names<K: Kind, const N: usize>(objects: [&K; N]) -> Vec<String> {
    objects.iter().map(|object| object.name_any()).collect()
}

/// Reads an object; `None` if it does not exist.
///
/// # Errors
/// When the API server refuses or is away.
pub async fn read<K: Kind>(client: &Client, namespace: &str, name: &str) -> Result<Option<K>, WriteError> {
    call::<K, _>("get", name, Api::<K>::namespaced(client.clone(), namespace).get_opt(name)).await
}

/// Reads all objects of a kind in a namespace that match the label selector (empty: all).
///
/// # Errors
/// When the API server refuses or is away.
pub async fn read_all<K: Kind>(client: &Client, namespace: &str, selector: &str) -> Result<Vec<K>, WriteError> {
    let api = Api::<K>::namespaced(client.clone(), namespace);
    Ok(call::<K, _>("list", namespace, api.list(&ListParams::default().labels(selector))).await?.items)
}

/// The standard labels of an owned object (<https://kubernetes.io/docs/concepts/overview/working-with-objects/common-labels/>).
#[must_use]
pub fn standard_labels(component: &str, instance: &str) -> std::collections::BTreeMap<String, String> {
    [
        ("app.kubernetes.io/name", "fleetwright"),
        ("app.kubernetes.io/managed-by", GROUP),
        ("app.kubernetes.io/component", component),
        ("app.kubernetes.io/instance", instance),
    ]
    .into_iter()
    .map(|(key, value)| (key.to_owned(), value.to_owned()))
    .collect()
}

/// The wanted object as JSON, with its type, owner and revision.
///
/// # Errors
/// When it cannot be turned into JSON.
pub fn prepare<K: Kind>(owner: &OwnerReference, desired: &K) -> Result<Value, WriteError> {
    let mut object = desired.clone();
    object.meta_mut().owner_references = Some(vec![owner.clone()]);
    let mut value = encode(&object)?;
    value["apiVersion"] = json!(K::api_version(&()));
    value["kind"] = json!(K::kind(&()));
    let revision = name::revision([value.to_string().as_bytes()]);
    value["metadata"]["annotations"][APPLIED_ANNOTATION] = json!(revision);
    Ok(value)
}

fn kind<K: Kind>() -> String {
    K::kind(&()).into_owned()
}

fn encode<K: Kind>(object: &K) -> Result<Value, WriteError> {
    serde_json::to_value(object).map_err(|source| WriteError::Encode { kind: kind::<K>(), name: object.name_any(), source })
}

async fn call<K: Kind, T>(verb: &'static str, name: &str, future: impl Future<Output = kube::Result<T>>) -> Result<T, WriteError> {
    match tokio::time::timeout(TIMEOUT, future).await {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(source)) => Err(WriteError::Call { verb, kind: kind::<K>(), name: name.to_owned(), source: Box::new(source) }),
        Err(_) => Err(WriteError::Timeout { verb, kind: kind::<K>(), name: name.to_owned() }),
    }
}
