//! Executes the actions that the index determines: the calls for one Device, and for the shards of one Gateway.

use futures::{StreamExt, stream};
use k8s_controller::events::EventRecorder;
use k8s_openapi::api::core::v1::Secret;
use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt;
use kube::core::PartialObjectMeta;
use serde_json::{Value, json};

use super::certificate_request::CertificateRequest;
use super::endpoint::Endpoint;
use super::gateway::ShardPlan;
use super::index::SharedDeviceIndex;
use super::index::action::DeviceAction;
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

/// Upper limit of concurrent writes for one Gateway. With 100,000 Devices there may be 32 shards of 64 KiB each.
const MAX_CONCURRENT_SHARDS: usize = 4;

/// The result of an action.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum ActionOutcome {
    /// The action is complete, and the index is updated.
    Done,
    /// The Device waits for its broker.
    Waiting,
}

/// Executes the next action of a Device.
pub async fn action(
    writer: &Writer,
    recorder: &EventRecorder,
    index: &SharedDeviceIndex,
    key: &DeviceKey,
    step: DeviceAction,
) -> Result<ActionOutcome, WriteError> {
    match step {
        DeviceAction::None => Ok(ActionOutcome::Done),
        DeviceAction::AwaitBroker => Ok(ActionOutcome::Waiting),
        DeviceAction::CreateSecret { uid, endpoint } => {
            let token = index.lock().requested_rotation(key);
            let (password, lifetime) = create_secret(writer, key, &uid, &endpoint, token.as_deref()).await?;
            index.lock().generated_observed(key, &uid, password, lifetime, Timestamp::now().as_second());
            Ok(ActionOutcome::Done)
        }
        DeviceAction::WriteEndpoint { uid, endpoint } => {
            if let Some(found) = own_secret(writer, index, key, &uid).await? {
                let name = name::device_credentials(&key.name);
                let secret = writer.merge::<Secret>(&key.gateway.namespace, &name, &endpoint.change(&found)).await?;
                secret_written(index, key, &uid, &secret);
            }
            Ok(ActionOutcome::Done)
        }
        DeviceAction::RotatePassword { uid, token, overlap } => {
            rotate(writer, index, key, &uid, token.as_deref(), overlap).await?;
            Ok(ActionOutcome::Done)
        }
        DeviceAction::IssueCertificate { uid, signer, spread } => {
            issue(writer, recorder, index, (key, &uid), &signer, spread).await.map(|()| ActionOutcome::Done)
        }
        DeviceAction::ReadSecret { secret, key: data_key } => {
            let found = read::<Secret>(writer.client(), &key.gateway.namespace, &secret).await?;
            let mut index = index.lock();
            if let Some((uid, known)) = index.password(key) {
                let password = secret::read_given(key, &uid, found.as_ref(), (&secret, &data_key), known.as_deref());
                index.password_observed(key, &uid, password);
            }
            Ok(ActionOutcome::Done)
        }
        DeviceAction::DeleteCertificateRequest { uid } => {
            delete_certificate_request(writer, key, &uid).await?;
            index.lock().certificate_request_observed(key, &uid, false);
            Ok(ActionOutcome::Done)
        }
        DeviceAction::DeleteSecret { uid } => {
            delete_generated_secret(writer, key, &uid).await?;
            index.lock().generated_secret_deleted(key, &uid);
            Ok(ActionOutcome::Done)
        }
        DeviceAction::WriteStatus(status) => write_status(writer, recorder, index, key, &status).await.map(|()| ActionOutcome::Done),
    }
}

/// Creates the Secret with a generated password, or uses the existing one.
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
                // The Secret of a deleted Device with that name. The garbage collector deletes it.
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

/// Deletes the CertificateRequest of the Device with this uid. One of another owner stays.
async fn delete_certificate_request(writer: &Writer, key: &DeviceKey, uid: &str) -> Result<(), WriteError> {
    let (namespace, name) = (&key.gateway.namespace, name::certificate_request(&key.name));
    let found = read::<CertificateRequest>(writer.client(), namespace, &name).await?;
    match found.filter(|request| request.owner_references().iter().any(|owner| owner.uid == *uid)) {
        Some(_) => writer.delete::<CertificateRequest>(namespace, &name).await,
        None => Ok(()),
    }
}

/// Deletes the Secret with the generated password of the Device with this uid. One of another owner stays.
async fn delete_generated_secret(writer: &Writer, key: &DeviceKey, uid: &str) -> Result<(), WriteError> {
    let (namespace, name) = (&key.gateway.namespace, name::device_credentials(&key.name));
    let found = read::<Secret>(writer.client(), namespace, &name).await?;
    match found.filter(|secret| matches!(secret::role(secret), Role::Generated(_, owner) if *owner == *uid)) {
        Some(_) => writer.delete::<Secret>(namespace, &name).await,
        None => Ok(()),
    }
}

/// The merge patch of the certificate. A revision that is no longer valid is removed.
fn certificate_patch(certificate: Option<&DeviceCertificate>) -> Value {
    let Some(certificate) = certificate else { return Value::Null };
    let mut patch = json!(certificate);
    // Explicitly null without a revision.
    patch["revision"] = json!(certificate.revision);
    patch
}

/// Replaces the generated password, unless the Secret shows that this was done.
async fn rotate(
    writer: &Writer,
    index: &SharedDeviceIndex,
    key: &DeviceKey,
    uid: &str,
    token: Option<&str>,
    overlap: i64,
) -> Result<(), WriteError> {
    let Some(found) = own_secret(writer, index, key, uid).await? else { return Ok(()) };
    let secret = match secret::read_generated(key, uid, &found).hash() {
        Some(present) => {
            let patch = secret::rotated(&found, present, &Password::generate(), token, Timestamp::now(), overlap);
            writer.merge::<Secret>(&key.gateway.namespace, &name::device_credentials(&key.name), &patch).await?
        }
        None => found,
    };
    secret_written(index, key, uid, &secret);
    Ok(())
}

/// The Secret with the generated password of the Device with this uid. If there is none, the index creates it again.
async fn own_secret(writer: &Writer, index: &SharedDeviceIndex, key: &DeviceKey, uid: &str) -> Result<Option<Secret>, WriteError> {
    let found = read::<Secret>(writer.client(), &key.gateway.namespace, &name::device_credentials(&key.name)).await?;
    let own = found.filter(|secret| matches!(secret::role(secret), Role::Generated(_, owner) if *owner == *uid));
    if own.is_none() {
        index.lock().password_observed(key, uid, PasswordState::Unknown);
    }
    Ok(own)
}

fn secret_written(index: &SharedDeviceIndex, key: &DeviceKey, uid: &str, secret: &Secret) {
    let password = secret::read_generated(key, uid, secret);
    index.lock().generated_observed(key, uid, password, Lifetime::of(secret), Timestamp::now().as_second());
}

async fn write_status(
    writer: &Writer,
    recorder: &EventRecorder,
    index: &SharedDeviceIndex,
    key: &DeviceKey,
    status: &DeviceStatus,
) -> Result<(), WriteError> {
    let before = index.lock().written_report(key);
    let patch = json!({
        "observedGeneration": status.observed_generation,
        "username": status.username,
        // All fields are present: a revision that is no longer valid is removed.
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
        let mut index = index.lock();
        index.report_written(key, status.reported.as_ref());
        index.status_written(key, &device);
    }
    // The status of a Device reports readiness. An Event for each Device would be a third write.
    if status.conditions.iter().any(|condition| condition.type_ == READY && condition.status != "True") {
        publish_change(recorder, &device, &[], &status.conditions).await;
    }
    Ok(())
}

/// The merge patch of the report. Members that the device no longer reports are removed.
fn report_patch(before: Option<&ReportedStatus>, wanted: Option<&ReportedStatus>) -> Value {
    match (before, wanted) {
        (_, None) => Value::Null,
        (None, Some(wanted)) => json!(wanted),
        (Some(before), Some(wanted)) => merge_patch(&json!(before), &json!(wanted)).unwrap_or_else(|| json!({})),
    }
}

/// Writes the shards of a Gateway, in the order of the plan where the order matters. Otherwise a failed write of one does not keep the others
/// from being written.
pub async fn write_shards(writer: &Writer, gateway: &GatewayKey, plan: &ShardPlan) -> Result<(), WriteError> {
    let at_once = if plan.unordered { MAX_CONCURRENT_SHARDS } else { 1 };
    let calls: Vec<_> = plan.writes.iter().map(|secret| write_shard(writer, plan, secret)).collect();
    let mut results = stream::iter(calls).buffered(at_once);
    let mut outcome = Ok(());
    while let Some(written) = results.next().await {
        outcome = outcome.and(written);
        if outcome.is_err() && !plan.unordered {
            break;
        }
    }
    outcome?;
    for name in &plan.deletes {
        writer.delete::<Secret>(&gateway.namespace, name).await?;
    }
    Ok(())
}

/// Writes a shard with one call if it exists: the watch knows its content, so it is not read first, and the response contains only
/// the metadata.
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

/// The merge patch of a shard. Optional keys that no user of the shard needs are removed.
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
    fn unused_optional_keys_of_a_shard_are_removed() {
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
