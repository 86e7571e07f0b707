//! Carries out what the fleet decides: the calls of one Device's step, and of one Gateway's shards.

use futures::{StreamExt, TryStreamExt, stream};
use k8s_controller::events::EventRecorder;
use k8s_openapi::api::core::v1::Secret;
use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt;
use kube::core::PartialObjectMeta;
use serde_json::{Value, json};

use super::endpoint::Endpoint;
use super::fleet::{SharedFleet, Step};
use super::gateway::ShardPlan;
use super::issue::issue;
use super::key::{DeviceKey, GatewayKey};
use super::record::PasswordState;
use super::rotation::Lifetime;
use super::secret::{self, Role};
use crate::api::condition::{Cause, READY};
use crate::api::device::{DeviceCertificate, ReportedStatus};
use crate::api::reason::Reason;
use crate::api::{Device, DeviceStatus, name};
use crate::broker::credential::password::Password;
use crate::broker::credential::shard::OPTIONAL_KEYS;
use crate::operator::kubernetes::apply::{WriteError, Writer, prepare, read};
use crate::operator::kubernetes::diff::merge_patch;
use crate::operator::kubernetes::events::publish_change;

/// Shards of a Gateway that are written at the same time: with 100,000 Devices there may be 32 of them, of 64 KiB each.
const SHARDS_AT_ONCE: usize = 4;

/// What a step came to.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Done {
    /// It is done; the fleet knows what follows.
    Done,
    /// The Device waits for its broker.
    Waiting,
}

/// Carries out the next step of a Device.
pub async fn step(writer: &Writer, recorder: &EventRecorder, fleet: &SharedFleet, key: &DeviceKey, step: Step) -> Result<Done, WriteError> {
    match step {
        Step::Rest => Ok(Done::Done),
        Step::AwaitBroker => Ok(Done::Waiting),
        Step::CreateSecret { uid, endpoint } => {
            let token = fleet.lock().requested_rotation(key);
            let (password, lifetime) = create_secret(writer, key, &uid, &endpoint, token.as_deref()).await?;
            fleet.lock().generated_observed(key, &uid, password, lifetime, Timestamp::now().as_second());
            Ok(Done::Done)
        }
        Step::WriteEndpoint { uid, endpoint } => {
            if let Some(found) = own_secret(writer, fleet, key, &uid).await? {
                let name = name::device_credentials(&key.name);
                let secret = writer.merge::<Secret>(&key.gateway.namespace, &name, &endpoint.change(&found)).await?;
                secret_written(fleet, key, &uid, &secret);
            }
            Ok(Done::Done)
        }
        Step::RotatePassword { uid, token, overlap } => {
            rotate(writer, fleet, key, &uid, token.as_deref(), overlap).await?;
            Ok(Done::Done)
        }
        Step::IssueCertificate { uid, signer, spread } => {
            issue(writer, recorder, fleet, (key, &uid), &signer, spread).await.map(|()| Done::Done)
        }
        Step::ReadSecret { secret, key: data_key } => {
            let found = read::<Secret>(writer.client(), &key.gateway.namespace, &secret).await?;
            let mut fleet = fleet.lock();
            if let Some((uid, known)) = fleet.password(key) {
                let password = secret::read_given(key, &uid, found.as_ref(), (&secret, &data_key), known.as_deref());
                fleet.password_observed(key, &uid, password);
            }
            Ok(Done::Done)
        }
        Step::WriteStatus(status) => write_status(writer, recorder, fleet, key, &status).await.map(|()| Done::Done),
    }
}

/// Creates the Secret with a generated password, or takes the one that is there.
async fn create_secret(
    writer: &Writer,
    key: &DeviceKey,
    uid: &str,
    endpoint: &Endpoint,
    token: Option<&str>,
) -> Result<(PasswordState, Lifetime), WriteError> {
    let wanted = secret::generated(key, uid, endpoint, &Password::generate(), token);
    let known = |secret: &Secret| (secret::read_generated(key, uid, secret), Lifetime::of(secret));
    match writer.create(&wanted).await {
        Ok(created) => Ok(known(&created)),
        Err(error) if error.is_already_exists() => {
            let name = name::device_credentials(&key.name);
            let found = read::<Secret>(writer.client(), &key.gateway.namespace, &name).await?;
            match found.as_ref().map(|secret| (secret, secret::role(secret))) {
                Some((secret, Role::Generated(_, owner))) if *owner == *uid => Ok(known(secret)),
                // A Secret of a Device of that name that is gone: the garbage collector deletes it in a moment.
                Some((secret, Role::Generated(..))) if !secret.owner_references().is_empty() => Err(error),
                Some(_) => {
                    let message = format!("a Secret {name} exists and does not belong to this Device: delete or rename it");
                    Ok((PasswordState::Missing(Box::new(Cause::new(Reason::NameConflict, message)), None), Lifetime::default()))
                }
                None => Err(error),
            }
        }
        Err(error) => Err(error),
    }
}

/// The certificate as it is to be merged into the status.
fn certificate_patch(certificate: Option<&DeviceCertificate>) -> Value {
    let Some(certificate) = certificate else { return Value::Null };
    let mut patch = json!(certificate);
    // A revision that no longer holds must not stay.
    patch["revision"] = json!(certificate.revision);
    patch
}

/// Replaces the generated password, unless the Secret says that this was done already.
async fn rotate(
    writer: &Writer,
    fleet: &SharedFleet,
    key: &DeviceKey,
    uid: &str,
    token: Option<&str>,
    overlap: i64,
) -> Result<(), WriteError> {
    let Some(found) = own_secret(writer, fleet, key, uid).await? else { return Ok(()) };
    let secret = match secret::read_generated(key, uid, &found).hash() {
        Some(present) => {
            let patch = secret::rotated(&found, present, &Password::generate(), token, Timestamp::now(), overlap);
            writer.merge::<Secret>(&key.gateway.namespace, &name::device_credentials(&key.name), &patch).await?
        }
        None => found,
    };
    secret_written(fleet, key, uid, &secret);
    Ok(())
}

/// The Secret with the generated password of this very Device. Where it is not there, or another's, the fleet looks again.
async fn own_secret(writer: &Writer, fleet: &SharedFleet, key: &DeviceKey, uid: &str) -> Result<Option<Secret>, WriteError> {
    let found = read::<Secret>(writer.client(), &key.gateway.namespace, &name::device_credentials(&key.name)).await?;
    let own = found.filter(|secret| matches!(secret::role(secret), Role::Generated(_, owner) if *owner == *uid));
    if own.is_none() {
        fleet.lock().password_observed(key, uid, PasswordState::Unknown);
    }
    Ok(own)
}

fn secret_written(fleet: &SharedFleet, key: &DeviceKey, uid: &str, secret: &Secret) {
    let password = secret::read_generated(key, uid, secret);
    fleet.lock().generated_observed(key, uid, password, Lifetime::of(secret), Timestamp::now().as_second());
}

async fn write_status(
    writer: &Writer,
    recorder: &EventRecorder,
    fleet: &SharedFleet,
    key: &DeviceKey,
    status: &DeviceStatus,
) -> Result<(), WriteError> {
    let before = fleet.lock().written_report(key);
    let patch = json!({
        "observedGeneration": status.observed_generation,
        "username": status.username,
        // Merged as a whole: a revision that no longer holds must not stay.
        "credentialsSecret": status.credentials_secret.as_ref().map(|secret| json!({"name": secret.name, "revision": secret.revision})),
        "certificate": certificate_patch(status.certificate.as_ref()),
        "desired": status.desired,
        "reported": report_patch(before.as_ref(), status.reported.as_ref()),
        "conditions": status.conditions,
    });
    let Some(device) = writer.patch_status::<Device>(&key.gateway.namespace, &key.name, &patch).await? else {
        return Ok(());
    };
    {
        let mut fleet = fleet.lock();
        fleet.report_written(key, status.reported.as_ref());
        fleet.status_written(key, &device);
    }
    // A Device that becomes ready says so in its status; an event a Device would be a third write.
    if status.conditions.iter().any(|condition| condition.type_ == READY && condition.status != "True") {
        publish_change(recorder, &device, &[], &status.conditions).await;
    }
    Ok(())
}

/// What of a report is to be merged into the status: what the device no longer reports must not stay.
fn report_patch(before: Option<&ReportedStatus>, wanted: Option<&ReportedStatus>) -> Value {
    match (before, wanted) {
        (_, None) => Value::Null,
        (None, Some(wanted)) => json!(wanted),
        (Some(before), Some(wanted)) => merge_patch(&json!(before), &json!(wanted)).unwrap_or_else(|| json!({})),
    }
}

/// Writes the shards of a Gateway, in the order of the plan where that matters.
pub async fn write_shards(writer: &Writer, gateway: &GatewayKey, plan: &ShardPlan) -> Result<(), WriteError> {
    let at_once = if plan.unordered { SHARDS_AT_ONCE } else { 1 };
    let calls: Vec<_> = plan.writes.iter().map(|secret| write_shard(writer, plan, secret)).collect();
    stream::iter(calls).buffered(at_once).try_collect::<()>().await?;
    for name in &plan.deletes {
        writer.delete::<Secret>(&gateway.namespace, name).await?;
    }
    Ok(())
}

/// One call for a shard that is there: the watch tells what stands in it, and so much is not to be read before each write. For the same reason
/// of the answer only the metadata comes.
async fn write_shard(writer: &Writer, plan: &ShardPlan, secret: &Secret) -> Result<(), WriteError> {
    let (namespace, name) = (secret.namespace().unwrap_or_default(), secret.name_any());
    if plan.present.contains(&name) {
        match writer.merge::<PartialObjectMeta<Secret>>(&namespace, &name, &shard_patch(prepare(&plan.owner, secret)?)).await {
            Err(error) if error.is_not_found() => {}
            written => return written.map(drop),
        }
    }
    writer.apply(&plan.owner, secret).await.map(drop)
}

/// A shard as it is to be merged: what no user of it has any more must not stay.
fn shard_patch(mut wanted: Value) -> Value {
    for key in OPTIONAL_KEYS {
        if wanted["data"].get(key).is_none() {
            wanted["data"][key] = Value::Null;
        }
    }
    wanted
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_no_user_of_a_shard_has_any_more_is_removed() {
        let before = json!({"passwords": "YQ==", "acls": "", "shards": "MQ==", "previous-passwords": "Yg==", "certificate-keys": "Yw=="});
        for data in [
            json!({"passwords": "YQ==", "acls": "", "shards": "MQ=="}),
            json!({"passwords": "YQ==", "acls": "", "shards": "Mg==", "certificate-keys": "ZA=="}),
            before.clone(),
        ] {
            let mut live = before.clone();
            for (key, value) in shard_patch(json!({"data": data}))["data"].as_object().unwrap() {
                match value {
                    Value::Null => drop(live.as_object_mut().unwrap().remove(key)),
                    value => live[key] = value.clone(),
                }
            }
            assert_eq!(live, data);
        }
    }
}
