//! The reconciler of Pipelines: observe -> validate -> build -> apply -> status, and the release of the table at the end.

pub mod broker_files;
pub mod build;
pub mod cleanup;
pub mod connection;
pub mod database;
pub mod dead_letter_status;
pub mod drift;
pub mod external;
pub mod observe;
pub mod registry;
pub mod retention;
pub mod sessions;
pub mod status;
pub mod validate;
pub mod watch;

use std::sync::Arc;
use std::time::Duration;

use k8s_controller::events::{Event, EventRecorder};
use k8s_controller::{Controller, TraceMetadata};
use k8s_openapi::api::apps::v1::StatefulSet;
use kube::runtime::controller::{Action, Config};
use kube::runtime::events::EventType;
use kube::{Client, ResourceExt};
use tokio::sync::mpsc;
use tokio::time::timeout;
use tracing::warn;

use self::build::{credentials, readers, replicas, workers};
use self::connection::RegistryState;
use self::database::Databases;
use self::dead_letter_status::DeadLetterView;
use self::drift::Drift;
use self::observe::{Observed, observe};
use self::registry::Devices;
use self::retention::Retention;
use self::status::{Outcome, Sources, TableOutcome, WorkersOutcome, status};
use self::validate::{TableView, Valid, validate};
use super::context::{Context, Images, unless_terminating};
use super::kubernetes::apply::{WriteError, Writer, owner_reference};
use super::kubernetes::events::{self, publish_change, publish_change_of};
use super::twin_sync::external::SharedExternals;
use crate::api::condition::{Cause, DEAD_LETTERS_DISCARDED, REPLAYED};
use crate::api::name::PIPELINE_LABEL;
use crate::api::pipeline::DeletionPolicy;
use crate::api::reason::Reason;
use crate::api::{Pipeline, is_reconciliation_paused};
use crate::broker::credential::password::Password;
use crate::runtime::error::chain;
use crate::sink::timescale::execute::{self, ExecuteError};
use crate::sink::timescale::plan::{SchemaChange, SchemaPlan};
use crate::state::assignment::spread;

/// Name in metrics, events and managed fields.
const CONTROLLER: &str = "pipeline";

/// Maximum of concurrent reconciliations. A reconciliation takes seconds if its database is unavailable or a table is locked.
const CONCURRENCY: u16 = 32;

/// Time for which the status of a Pipeline stays unchanged while a registry is filled for the first time. 100,000 new devices take two
/// seconds. A Pipeline that was ready before a restart of the operator stays ready during this time.
const MAX_REGISTRY_FILL: Duration = Duration::from_secs(10);

/// A Pipeline that waits for the first filling is reconciled again after this time.
const REGISTRY_REQUEUE_AFTER: Duration = Duration::from_millis(250);

/// Timeout for the deletion of the dead letters of a deleted Pipeline.
const LAST_SWEEP_TIMEOUT: Duration = Duration::from_secs(20);

/// A Pipeline that waits for its database is reconciled again after this time at most.
const REQUEUE_AFTER: Duration = Duration::from_secs(3);

/// Each Pipeline is reconciled again after this time at most. A reconciliation reads some 15 objects or lists, and writes only changes.
const MAX_REQUEUE_AFTER: Duration = Duration::from_hours(1);

/// Reconciles Pipelines until dropped. Starts once all Devices have been listed, because a registry is not filled before.
pub async fn run(context: Context, devices: Devices, retention: Retention) {
    devices.listed.cancelled().await;
    let (noticed, drifted) = mpsc::unbounded_channel();
    let drift = Drift::new(noticed);
    let databases = Databases::new(context.cluster.clone(), devices, context.addresses.clone());
    let reconciler = Reconciler {
        writer: context.writer("fleetwright/pipeline"),
        recorder: context.recorder("fleetwright.io/pipeline"),
        databases: databases.clone(),
        drift: drift.clone(),
        retention: retention.clone(),
        images: context.images.clone(),
        externals: context.externals.clone(),
    };
    let controller = Controller::namespaced_all(context.client.clone(), reconciler, kube::runtime::watcher::Config::default())
        .with_name(CONTROLLER)
        .with_observer(context.observer())
        .with_controller(|_| {
            let controller =
                super::kubernetes::watch::controller(&context.watched, |_| None).with_config(Config::default().concurrency(CONCURRENCY));
            watch::subscribe(controller, &context.watched, drifted, context.externals.clone())
        });
    tokio::select! {
        () = controller.run() => {}
        () = drift.run() => {}
        () = retention.run(&databases) => {}
    }
}

struct Reconciler {
    images: Images,
    externals: SharedExternals,
    writer: Writer,
    recorder: Arc<EventRecorder>,
    databases: Databases,
    drift: Drift,
    retention: Retention,
}

#[async_trait::async_trait]
impl k8s_controller::Context for Reconciler {
    type Resource = Pipeline;
    type Error = WriteError;

    const FINALIZER_NAME: Option<&'static str> = Some("fleetwright.io/pipeline");

    async fn apply(&self, client: Client, pipeline: &Pipeline, _: &mut TraceMetadata) -> Result<Option<Action>, WriteError> {
        if is_reconciliation_paused(pipeline) {
            return Ok(Some(Action::await_change()));
        }
        unless_terminating(self.reconcile(&client, pipeline).await)
    }

    async fn cleanup(&self, client: Client, pipeline: &Pipeline, _: &mut TraceMetadata) -> Result<Option<Action>, WriteError> {
        let owner = self.databases.owner(pipeline);
        self.drift.forget(&owner);
        self.write_status(pipeline, &Outcome::Deleting).await?;
        self.end_workers(&client, pipeline).await?;
        if let Err(cause) = cleanup::release_table(&client, &self.databases, pipeline).await {
            self.warn_of_remains(pipeline, &cause).await;
        } else if pipeline.spec.deletion_policy == DeletionPolicy::Delete
            && let Some(database) = self.databases.last(&owner)
        {
            // If no other Pipeline uses this database, the remaining rows are deleted once a Pipeline uses it again.
            let _ = timeout(LAST_SWEEP_TIMEOUT, self.retention.sweep(database.uri())).await;
        }
        self.databases.release(&owner);
        Ok(None)
    }
}

impl Reconciler {
    /// Deletes the workers of a deleted Pipeline, and then their sessions with external brokers: running workers would start these
    /// sessions again.
    async fn end_workers(&self, client: &Client, pipeline: &Pipeline) -> Result<(), WriteError> {
        let ended = match cleanup::sessions(client, &self.databases, &self.externals, pipeline).await {
            Ok(Some((database, unread))) => {
                cleanup::end_workers(client, &self.writer, pipeline).await?;
                sessions::end(&database, pipeline, unread).await
            }
            Ok(None) => Ok(()),
            Err(cause) => Err(cause),
        };
        if let Err(cause) = ended {
            let gateways = self.externals.logins(&pipeline.namespace().unwrap_or_default());
            self.warn(pipeline, Reason::SessionsNotEnded, sessions::left_behind(pipeline, gateways.keys(), &cause)).await;
        }
        let selector = format!("{PIPELINE_LABEL}={}", pipeline.name_any());
        self.writer.prune::<StatefulSet>(&owner_reference(pipeline), &pipeline.namespace().unwrap_or_default(), &selector, &[]).await
    }

    /// Ends the sessions with Gateways that are no longer selected, once no worker reads them.
    async fn end_unread(&self, pipeline: &Pipeline, valid: &Valid, workers: &WorkersOutcome) {
        let Some(database) = self.databases.last(&self.databases.owner(pipeline)).filter(|_| workers.is_settled()) else { return };
        let ended = match sessions::unread(&database, &self.externals, pipeline, &valid.gateways).await {
            Ok(unread) => sessions::end(&database, pipeline, unread).await,
            Err(cause) => Err(cause),
        };
        if let Err(cause) = ended {
            let (namespace, pipeline) = (pipeline.namespace(), pipeline.name_any());
            warn!(namespace, pipeline, reason = %cause.reason, "sessions that no worker reads are not ended yet: {}", cause.message);
        }
    }

    /// Reconciles a Pipeline:
    ///
    /// 1. Observe: read the Gateways, Secrets and ConfigMaps, the table and the dead letters.
    /// 2. Validate the spec and plan the changes of the table. An invalid spec sets `Accepted=False` and waits for a change.
    /// 3. Apply the credentials of the workers, because the brokers need a moment to load them.
    /// 4. Change the table, and wait for the device registry by requeueing.
    /// 5. Build and apply the workers, and end sessions that are no longer read. The names of all owned objects are constant: there is
    ///    nothing to prune.
    /// 6. Write the status if it changed, with an Event for each changed condition.
    async fn reconcile(&self, client: &Client, pipeline: &Pipeline) -> Result<Option<Action>, WriteError> {
        let observed = observe(client, &self.databases, pipeline).await?;
        let outcome = match validate(pipeline, &observed) {
            Ok(valid) => Box::pin(self.execute_spec(pipeline, &observed, valid)).await?,
            Err(cause) => {
                self.drift.forget(&self.databases.owner(pipeline));
                Outcome::Refused(cause)
            }
        };
        if self.is_first_filling(pipeline, &outcome) {
            return Ok(Some(Action::requeue(REGISTRY_REQUEUE_AFTER)));
        }
        self.write_status(pipeline, &outcome).await?;
        Ok(Some(requeue_after(&outcome)))
    }

    /// Whether the workers wait only for the first filling of a registry, which has just started.
    fn is_first_filling(&self, pipeline: &Pipeline, outcome: &Outcome) -> bool {
        let Outcome::Accepted { workers: WorkersOutcome::Awaiting(cause), .. } = outcome else { return false };
        let database = self.databases.last(&self.databases.owner(pipeline));
        cause.reason == Reason::RegistryNotFilled && database.is_some_and(|database| database.age() < MAX_REGISTRY_FILL)
    }

    /// Steps 3 to 5 of [`Self::reconcile`].
    async fn execute_spec(&self, pipeline: &Pipeline, observed: &Observed, valid: Valid) -> Result<Outcome, WriteError> {
        let sources = Sources { gateways: valid.gateways.len(), sessions: valid.sessions.len() };
        let password = observed.password.clone().unwrap_or_else(Password::generate);
        let applied = self.writer.apply(&owner_reference(pipeline), &credentials(pipeline, &valid, &password)).await;
        let table = self.bring_table(pipeline, &valid).await;
        let token = pipeline.spec.replay.as_ref().map(|replay| replay.token.as_str());
        let dead_letters = DeadLetterView::of(pipeline.status.as_ref()).after(token, observed.dead_letters.as_ref());
        let workers = match (applied, self.awaiting(pipeline, &valid, &table, &dead_letters)) {
            (Err(error), _) => Err(error),
            (Ok(_), Some(cause)) => Ok(WorkersOutcome::Awaiting(cause)),
            (Ok(_), None) => self.apply_workers(pipeline, observed, &valid, &password).await,
        };
        let workers = match workers {
            Err(error @ WriteError::NameConflict { .. }) => WorkersOutcome::Awaiting(Cause::new(error.reason(), chain(&error))),
            workers => workers?,
        };
        self.end_unread(pipeline, &valid, &workers).await;
        Ok(Outcome::Accepted { table, workers, sources, dead_letters })
    }

    async fn bring_table(&self, pipeline: &Pipeline, valid: &Valid) -> TableOutcome {
        let plan = match &valid.table {
            TableView::Unknown(cause) => return TableOutcome::Unknown(cause.clone()),
            TableView::Refused { cause, stalled } => return TableOutcome::Failed { cause: cause.clone(), stalled: *stalled },
            TableView::Planned(plan) if plan.steps.is_empty() => Ok(plan.clone()),
            TableView::Planned(_) => self.change_table(pipeline, valid).await,
        };
        plan.map_or_else(|failure| failure, |plan| TableOutcome::Ready { kept: plan.kept })
    }

    async fn change_table(&self, pipeline: &Pipeline, valid: &Valid) -> Result<SchemaPlan, TableOutcome> {
        let database = self.databases.last(&self.databases.owner(pipeline));
        let closed = || Cause::new(Reason::DatabaseUnavailable, "the connection to the database was closed");
        let database = database.ok_or_else(|| TableOutcome::Unknown(closed()))?;
        let mut session = database.session().await.map_err(TableOutcome::Unknown)?;
        match execute::apply(session.client().map_err(TableOutcome::Unknown)?, &valid.desired).await {
            Ok(plan) => {
                let created = plan.steps.iter().any(|step| matches!(step, SchemaChange::CreateSystem { .. }));
                database.system_seen(&mut session, created);
                if plan.steps.iter().any(|step| matches!(step, SchemaChange::KeepDeadLetters { .. })) {
                    self.retention.changed();
                }
                Ok(plan)
            }
            Err(error) => {
                let stalled = matches!(&error, ExecuteError::Refuse(refusal) if refusal.is_of_the_spec());
                if matches!(error, ExecuteError::AwaitAnswer { .. }) {
                    session.discard();
                }
                Err(TableOutcome::Failed { cause: observe::cause(&error), stalled })
            }
        }
    }

    /// The cause why the workers have to wait. Workers would refuse a reading of a Device that is not in the registry yet.
    fn awaiting(&self, pipeline: &Pipeline, valid: &Valid, table: &TableOutcome, dead_letters: &DeadLetterView) -> Option<Cause> {
        let owner = self.databases.owner(pipeline);
        let ready = matches!(table, TableOutcome::Ready { .. });
        let database = self.databases.last(&owner).filter(|_| ready);
        let registry = match &database {
            Some(database) => database.registry(),
            None => RegistryState::Waiting,
        };
        match database.filter(|_| registry == RegistryState::Filled) {
            Some(database) => self.drift.watch(database, valid.desired.clone(), dead_letters.clone()),
            None => self.drift.forget(&owner),
        }
        if replicas(pipeline, valid) == 0 {
            return None;
        }
        match registry {
            _ if valid.descriptor.is_err() => valid.descriptor.as_ref().err().cloned(),
            _ if !ready => Some(Cause::new(Reason::TableNotReady, "the workers do not change until the table is ready")),
            RegistryState::Filled => None,
            RegistryState::Failed(cause) => Some(cause),
            RegistryState::Waiting => Some(Cause::new(Reason::RegistryNotFilled, "the device registry of the database is being filled")),
        }
    }

    async fn apply_workers(
        &self,
        pipeline: &Pipeline,
        observed: &Observed,
        valid: &Valid,
        password: &Password,
    ) -> Result<WorkersOutcome, WriteError> {
        if replicas(pipeline, valid) > 0
            && let Err(cause) = self.spread_gateways(pipeline, valid).await
        {
            return Ok(WorkersOutcome::Awaiting(cause));
        }
        let desired = workers(pipeline, valid, password, observed.uri.as_ref().ok(), &self.images);
        let owner = owner_reference(pipeline);
        self.writer.apply(&owner, &desired.configuration).await?;
        self.writer.apply(&owner, &desired.network_policy).await?;
        self.writer.apply(&owner, &desired.service).await?;
        let live = Box::new(self.writer.apply(&owner, &desired.workers).await?.into_inner());
        Ok(WorkersOutcome::Applied { live, wanted: replicas(pipeline, valid), paused: pipeline.spec.paused })
    }

    /// Writes which worker reads which Gateway, before the number of workers changes.
    async fn spread_gateways(&self, pipeline: &Pipeline, valid: &Valid) -> Result<(), Cause> {
        let owner = self.databases.owner(pipeline);
        let closed = || Cause::new(Reason::DatabaseUnavailable, "the connection to the database was closed");
        let database = self.databases.last(&owner).ok_or_else(closed)?;
        let refused = |error| Cause::new(Reason::GatewaysNotAssigned, format!("failed to assign Gateways to workers: {}", chain(&error)));
        let workers = readers(pipeline, valid);
        database.ask(async |client| spread(client, &owner, &valid.sessions, workers).await, refused).await.map(drop)
    }

    async fn write_status(&self, pipeline: &Pipeline, outcome: &Outcome) -> Result<(), WriteError> {
        let wanted = status(pipeline, outcome);
        let previous = pipeline.status.as_ref();
        let namespace = pipeline.namespace().unwrap_or_default();
        if self.writer.write_status::<Pipeline, _>(&namespace, &pipeline.name_any(), previous, &wanted).await? {
            let before = previous.map_or(&[][..], |status| status.conditions.as_slice());
            publish_change(&self.recorder, pipeline, before, &wanted.conditions).await;
            for of_letters in [DEAD_LETTERS_DISCARDED, REPLAYED] {
                publish_change_of(of_letters, &self.recorder, pipeline, before, &wanted.conditions).await;
            }
        }
        Ok(())
    }

    async fn warn_of_remains(&self, pipeline: &Pipeline, cause: &Cause) {
        let table = &pipeline.spec.sink.timescale.table;
        let (reason, what) = match pipeline.spec.deletion_policy {
            DeletionPolicy::Retain => (
                Reason::TableNotReleased,
                format!("public.{table} still has this Pipeline as its owner: a Pipeline of the same name takes it over"),
            ),
            DeletionPolicy::Delete => (Reason::TableNotDropped, format!("public.{table} still exists: drop it by hand")),
        };
        self.warn(pipeline, reason, format!("{what} ({})", cause.message)).await;
    }

    async fn warn(&self, pipeline: &Pipeline, reason: Reason, note: String) {
        warn!(namespace = pipeline.namespace(), pipeline = pipeline.name_any(), %reason, "{note}");
        let reason = reason.to_string();
        let event = Event { type_: EventType::Warning, reason, action: "Cleanup".to_owned(), note: Some(note), related: None };
        events::publish(&self.recorder, pipeline, &event).await;
    }
}

/// Time until the next reconciliation without a change.
fn requeue_after(outcome: &Outcome) -> Action {
    let settled = match outcome {
        Outcome::Accepted { table, workers, .. } => {
            matches!(table, TableOutcome::Ready { .. }) && matches!(workers, WorkersOutcome::Applied { .. })
        }
        Outcome::Refused(_) | Outcome::Deleting => true,
    };
    let wait = if settled { MAX_REQUEUE_AFTER } else { REQUEUE_AFTER };
    // Jitter, so that the Pipelines of a database do not query it at the same time.
    Action::requeue(wait.mul_f64(rand::random_range(0.75..1.0)))
}
