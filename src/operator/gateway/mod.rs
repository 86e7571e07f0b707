//! The reconciler of Gateways: observe -> validate -> build -> apply -> status.

pub mod broker_full;
pub mod build;
pub mod client_authority;
pub mod external;
pub mod internal;
pub mod observe;
pub mod status;
pub mod tls;
pub mod totals;
pub mod validate;
pub mod watch;

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use k8s_controller::events::EventRecorder;
use k8s_controller::{Controller, TraceMetadata};
use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::core::v1::Secret;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, OwnerReference};
use kube::runtime::controller::Action;
use kube::{Client, ResourceExt};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use self::build::{build, link_credentials, secret_names};
use self::client_authority::client_trust;
use self::observe::{Observed, Sources, observe};
use self::status::{Outcome, status};
use self::tls::Issued;
use self::validate::{Valid, validate};
use super::context::{Context, Images, unless_terminating};
use super::device::certificate::Authority;
use super::device::endpoint::Endpoint;
use super::device::key::GatewayKey;
use super::kubernetes::apply::{WriteError, Writer, owner_reference};
use super::kubernetes::events::{publish_change, publish_change_of};
use crate::api::condition::{BROKER_FULL, CERTIFICATE_VALID, CLIENT_AUTHORITY_VALID, MESSAGES_DROPPED, READY};
use crate::api::external::ExternalBroker;
use crate::api::gateway::{Gateway, GatewayStatus, Listener, ListenerAuthentication};
use crate::api::is_reconciliation_paused;
use crate::api::name::{GATEWAY_LABEL, ROLE_LABEL, ROLE_LINK_CREDENTIALS, ROLE_SERVER_AUTHORITY, ROLE_SERVER_CERTIFICATE};
use crate::broker::credential::Password;
use crate::configuration::agent::TLS_AUTHORITIES;

/// Name in metrics, events and managed fields.
const CONTROLLER: &str = "gateway";

/// A Gateway that waits for a Secret is reconciled again after this time, because a Secret of an unusual type is not watched.
const REQUEUE_AFTER: Duration = Duration::from_secs(30);

/// Each Gateway is reconciled again after this time at most. A reconciliation reads some 25 objects or lists, and writes only changes.
const MAX_REQUEUE_AFTER: Duration = Duration::from_hours(1);

/// Changes within this time are reconciled together: the first reconciliation of a Gateway causes a dozen changes.
const DEBOUNCE: Duration = Duration::from_millis(100);

/// Gateways that are reconciled at the same time, each with one call to the API server at a time.
const CONCURRENCY: u16 = 16;

/// The channels by which other controllers request work on Gateways.
pub struct GatewayRequests {
    /// Gateways whose numbers of devices or refused clients changed.
    pub totals: UnboundedReceiver<GatewayKey>,
    /// Gateways to reconcile.
    pub reconcile: UnboundedReceiver<GatewayKey>,
}

/// Reconciles Gateways until dropped.
pub async fn run(context: Context, requests: GatewayRequests) {
    let sources = Sources::new(&context);
    let reconciler = Reconciler {
        writer: context.writer("fleetwright/gateway"),
        recorder: context.recorder("fleetwright.io/gateway"),
        sources: sources.clone(),
        images: context.images.clone(),
        operator_namespace: context.namespace.clone(),
    };
    let observer = context.observer();
    let writer = reconciler.writer.clone();
    let config = kube::runtime::controller::Config::default().debounce(DEBOUNCE).concurrency(CONCURRENCY);
    let (saw, seen) = unbounded_channel();
    let digest = move |gateway: &Gateway| {
        // The receiver lives as long as this: both end with the lease.
        let _ = saw.send(GatewayKey::new(&gateway.namespace().unwrap_or_default(), &gateway.name_any()));
        totals::digest(gateway)
    };
    let watching = super::kubernetes::watch::controller(&context.watched, digest).with_config(config);
    let gateways = watching.store();
    let controller = Controller::namespaced_all(context.client.clone(), reconciler, kube::runtime::watcher::Config::default())
        .with_name(CONTROLLER)
        .with_observer(observer)
        .with_controller(|_| watch::subscribe(watching, &context.watched, requests.reconcile));
    tokio::select! {
        () = controller.run() => {}
        () = totals::keep(&sources, &writer, gateways, requests.totals, seen) => {}
    }
}

struct Reconciler {
    sources: Sources,
    images: Images,
    operator_namespace: String,
    writer: Writer,
    recorder: Arc<EventRecorder>,
}

#[async_trait::async_trait]
impl k8s_controller::Context for Reconciler {
    type Resource = Gateway;
    type Error = WriteError;

    async fn apply(&self, _: Client, gateway: &Gateway, _: &mut TraceMetadata) -> Result<Option<Action>, WriteError> {
        // Kubernetes deletes the owned objects by their owner references, and nothing exists outside the cluster.
        if gateway.metadata.deletion_timestamp.is_some() {
            return Ok(Some(Action::await_change()));
        }
        if let Some(broker) = &gateway.spec.external {
            return unless_terminating(self.reconcile_external(gateway, broker).await);
        }
        if is_reconciliation_paused(gateway) {
            let observed = observe(&self.sources, gateway).await?;
            self.update_devices(gateway, endpoint(&observed, None), client_trust(&observed, Timestamp::now()).authority);
            return Ok(Some(Action::await_change()));
        }
        unless_terminating(self.reconcile(gateway).await)
    }
}

impl Reconciler {
    /// Reconciles a Gateway whose broker the operator runs:
    ///
    /// 1. Observe: read its Secrets and ConfigMaps, and the totals of its devices.
    /// 2. Validate the spec. An invalid spec sets `Accepted=False` and waits for a change.
    /// 3. Build the desired objects.
    /// 4. Apply them, prerequisites of the pod first, and prune owned objects that are no longer desired.
    /// 5. Write the status if it changed, with an Event for each changed condition.
    async fn reconcile(&self, gateway: &Gateway) -> Result<Option<Action>, WriteError> {
        let observed = observe(&self.sources, gateway).await?;
        let now = Timestamp::now();
        let valid = match validate(&observed, now) {
            Ok(valid) => valid,
            Err(cause) => {
                self.write_status(&observed, &Outcome::Rejected(&cause)).await?;
                return Ok(Some(Action::await_change()));
            }
        };
        match Box::pin(self.apply_all(&observed, &valid)).await {
            Ok(stateful_set) => self.write_status(&observed, &Outcome::Applied(&valid, &stateful_set)).await?,
            Err(error) if error.is_namespace_terminating() => return Err(error),
            Err(error) => {
                self.write_status(&observed, &Outcome::NotApplied(&valid, &error)).await?;
                return Err(error);
            }
        }
        Ok(Some(Action::requeue(requeue_after(&valid, now))))
    }

    /// Reconciles a Gateway with an external broker:
    ///
    /// 1. Observe: read the Secrets, pass the login to the twin synchronisation, and read its last result.
    /// 2. Write the status if it changed. The twin synchronisation requests another reconciliation when its result changes.
    async fn reconcile_external(&self, gateway: &Gateway, broker: &ExternalBroker) -> Result<Option<Action>, WriteError> {
        let observed = external::observe(&self.sources, gateway, broker).await?;
        if is_reconciliation_paused(gateway) {
            return Ok(Some(Action::await_change()));
        }
        self.keep_status(gateway, &external::status(&observed)).await?;
        Ok(Some(Action::requeue(if observed.login.is_ok() { MAX_REQUEUE_AFTER } else { REQUEUE_AFTER })))
    }

    /// Applies the objects that the pod needs before the pod. Returns the live StatefulSet.
    async fn apply_all(&self, observed: &Observed, valid: &Valid) -> Result<StatefulSet, WriteError> {
        let owner = owner_reference(&observed.gateway);
        let desired = build(valid, &self.images, &self.operator_namespace);
        for secret in &desired.issued {
            self.writer.apply(&owner, secret).await?;
        }
        self.update_devices(&observed.gateway, endpoint(observed, valid.tls.issued.as_ref()), valid.clients.authority.clone());
        let password = observed.link_password.clone().unwrap_or_else(Password::generate);
        self.writer.apply(&owner, &link_credentials(valid, &password)).await?;
        self.writer.apply(&owner, &desired.configuration).await?;
        self.writer.apply(&owner, &desired.report).await?;
        self.writer.apply(&owner, &desired.service_account).await?;
        self.writer.apply(&owner, &desired.role).await?;
        self.writer.apply(&owner, &desired.role_binding).await?;
        self.writer.apply(&owner, &desired.network_policy).await?;
        self.writer.apply(&owner, &desired.internal_service).await?;
        self.writer.apply(&owner, &desired.agent_service).await?;
        self.writer.apply(&owner, &desired.service).await?;
        self.writer.apply(&owner, &desired.disruption_budget).await?;
        let stateful_set = self.writer.apply(&owner, &desired.stateful_set).await?.into_inner();
        self.prune(&owner, valid).await?;
        Ok(stateful_set)
    }

    /// Deletes the Secrets of the Gateway that are no longer desired, such as the issued key once every listener names a Secret. All other
    /// objects of a Gateway have constant names, so none of them can become superfluous.
    async fn prune(&self, owner: &OwnerReference, valid: &Valid) -> Result<(), WriteError> {
        // Credentials of Devices may have the label of the Gateway too: only the roles of its own Secrets are listed.
        let roles = format!("{ROLE_LABEL} in ({ROLE_LINK_CREDENTIALS},{ROLE_SERVER_AUTHORITY},{ROLE_SERVER_CERTIFICATE})");
        let selector = format!("{GATEWAY_LABEL}={},{roles}", valid.name);
        self.writer.prune::<Secret>(owner, &valid.namespace, &selector, &secret_names(valid)).await
    }

    fn update_devices(&self, gateway: &Gateway, endpoint: Option<Endpoint>, authority: Authority) {
        let key = GatewayKey::new(&gateway.namespace().unwrap_or_default(), &gateway.name_any());
        let uid = gateway.uid().unwrap_or_default();
        {
            let mut fleet = self.sources.fleet.lock();
            if let Some(endpoint) = endpoint {
                fleet.endpoint_observed(&key, &uid, endpoint);
            }
            fleet.authority_observed(&key, &uid, authority);
        }
        self.sources.fleet.wake();
    }

    async fn write_status(&self, observed: &Observed, outcome: &Outcome<'_>) -> Result<(), WriteError> {
        self.keep_status(&observed.gateway, &status(observed, outcome)).await
    }

    async fn keep_status(&self, gateway: &Gateway, wanted: &GatewayStatus) -> Result<(), WriteError> {
        let previous = gateway.status.as_ref();
        let written =
            self.writer.write_status::<Gateway, _>(&gateway.namespace().unwrap_or_default(), &gateway.name_any(), previous, wanted).await?;
        if written {
            let before = previous.map_or(&[][..], |status| status.conditions.as_slice());
            publish_change(&self.recorder, gateway, before, &wanted.conditions).await;
            for type_ in [CERTIFICATE_VALID, CLIENT_AUTHORITY_VALID, BROKER_FULL, MESSAGES_DROPPED] {
                if !says_the_same(&wanted.conditions, type_) {
                    publish_change_of(type_, &self.recorder, gateway, before, &wanted.conditions).await;
                }
            }
        }
        Ok(())
    }
}

/// The address for devices with a password: the first listener with TLS, else the first listener, preferring listeners that require only
/// a password. The host is the first declared host name, else the name of the Service. `issued` is the certificate that the operator
/// issues for the listener, if any.
fn endpoint(observed: &Observed, issued: Option<&Issued>) -> Option<Endpoint> {
    let gateway = &observed.gateway;
    let rank = |listener: &&Listener| match (listener.authentication(), listener.tls.is_some()) {
        (ListenerAuthentication::Password, true) => 0,
        (ListenerAuthentication::Password, false) => 1,
        (ListenerAuthentication::CertificateAndPassword, _) => 2,
        (ListenerAuthentication::Certificate, _) => 3,
    };
    let listener = gateway.spec.listeners.iter().min_by_key(rank)?;
    let named = listener.tls_secret(&gateway.name_any()).and_then(|secret| observed.tls.get(&secret)).and_then(Option::as_ref);
    let issued = issued.filter(|_| listener.tls.as_ref().is_some_and(|tls| tls.secret_name.is_none())).map(|issued| &issued.certificate);
    let data = issued.or_else(|| named.and_then(|secret| secret.data.as_ref()));
    let authorities = data.and_then(|data| data.get(TLS_AUTHORITIES)).map(|pem| pem.0.as_slice());
    let host = tls::client_names(gateway).into_iter().next()?;
    Some(Endpoint::new(&host, listener.port, listener.tls.is_some(), authorities))
}

/// Whether the Event of `Ready` already has the cause of this condition.
fn says_the_same(conditions: &[Condition], type_: &str) -> bool {
    let said = |type_: &str| conditions.iter().find(|c| c.type_ == type_).map(|c| (c.reason.as_str(), c.message.as_str()));
    said(READY) == said(type_)
}

/// Time until the next reconciliation without a change: short while a Secret is missing, and until a certificate is about to expire.
fn requeue_after(valid: &Valid, now: Timestamp) -> Duration {
    let until = |time: Timestamp| Duration::try_from(time.duration_since(now)).ok();
    let turns =
        valid.tls.usable.values().flat_map(tls::transition_times).chain(valid.clients.transition_times.iter().copied()).filter_map(until);
    let awaiting = valid.awaiting.is_some().then_some(REQUEUE_AFTER);
    turns.chain(awaiting).map(|wait| wait.max(Duration::from_secs(1))).min().unwrap_or(MAX_REQUEUE_AFTER).min(MAX_REQUEUE_AFTER)
}
