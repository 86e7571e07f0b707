//! The reasons of conditions, Events and metrics: one enum, so that the same fault has the same name everywhere.

use std::fmt;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;

/// How urgent a reason is. It becomes the type of the Event.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Severity {
    /// Expected during normal operation. No action is required.
    Normal,

    /// A person may have to act.
    Warning,
}

/// Declares the enum with everything that is derived from one line for each reason: name, severity and description.
macro_rules! reasons {
    ($($(#[doc = $doc:literal])+ $severity:ident $name:ident,)+) => {
        /// Why a condition has its status, or why an Event was published. A bounded set, because it also labels metrics.
        #[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
        pub enum Reason {
            $($(#[doc = $doc])+ $name,)+
        }

        impl Reason {
            /// Every reason, in the order of its declaration.
            pub const ALL: &[Self] = &[$(Self::$name,)+];

            /// The reason in CamelCase, as conditions, Events and metrics show it.
            #[must_use]
            pub const fn as_str(self) -> &'static str {
                match self {
                    $(Self::$name => stringify!($name),)+
                }
            }

            /// How urgent the reason is.
            #[must_use]
            pub const fn severity(self) -> Severity {
                match self {
                    $(Self::$name => Severity::$severity,)+
                }
            }

            /// Meaning and remedy, in one line.
            #[must_use]
            pub fn description(self) -> &'static str {
                match self {
                    $(Self::$name => concat!($($doc),+).trim_start(),)+
                }
            }
        }
    };
}

reasons! {
    /// The spec is valid. No action is required.
    Normal Accepted,
    /// The operator does not connect to this address. Use another one, or allow it with `allowedAddresses` of the chart.
    Warning AddressNotAllowed,
    /// The API server did not answer in time. The operator retries; check the load of the API server.
    Warning ApiServerTimeout,
    /// The API server rejected an object of the operator. The message has its answer; check quotas, admission policies and RBAC.
    Warning ApplyFailed,
    /// The broker was full and accepts all messages again. No action is required.
    Normal AcceptingMessages,
    /// The broker has not confirmed the current state yet. Wait; if it lasts, check the conditions of the Gateway.
    Normal AwaitingBroker,
    /// The device has no certificate yet. Wait for the issuer; if it lasts, check the conditions of the Gateway.
    Warning AwaitingCertificate,
    /// The issuer has not decided on the certificate request yet. Approve the CertificateRequest, or check the issuer.
    Warning AwaitingIssuer,
    /// The device has not reported the desired state yet. Wait, or check whether the device is connected.
    Normal AwaitingReport,
    /// The replay waits for a worker with the current spec. Wait; if it lasts, check the condition WorkersAvailable.
    Normal AwaitingWorker,
    /// The database refuses a batch of messages, and the worker tries again. Correct what the message says; nothing is lost meanwhile.
    Warning BatchFailing,
    /// The broker runs and accepted a login. No action is required.
    Normal BrokerAvailable,
    /// The broker does not accept logins. Describe its pod, and read the logs of its containers.
    Warning BrokerNotReady,
    /// The operator has logged in at the external broker. No action is required.
    Normal BrokerReached,
    /// No connection to the external broker was possible. Check its address, its network policy and the broker itself.
    Warning BrokerUnreachable,
    /// The broker is being updated to the current configuration. Wait.
    Normal BrokerUpdating,
    /// cert-manager is not installed in the cluster. Install it, or remove the issuerRef of the client authority.
    Warning CertManagerNotFound,
    /// Devices exceed limits of their own (`spec.limits.clients`) and are refused; no other client is affected. Check them, or raise the limit.
    Warning ClientsLimited,
    /// The issuer denied the certificate request. Check its approval policy, then delete the CertificateRequest for another attempt.
    Warning CertificateDenied,
    /// The certificate is expired. Renew it.
    Warning CertificateExpired,
    /// The certificate expires soon. Renew it, or check why the issuer did not.
    Warning CertificateExpiresSoon,
    /// The certificate does not name the host that clients connect to. Issue it for the host names of the Gateway.
    Warning CertificateNameMismatch,
    /// The broker does not present the certificate yet. Wait; if it lasts, read the log of the container `agent`.
    Warning CertificateNotProven,
    /// The certificate is not valid yet. Check the clocks and its notBefore.
    Warning CertificateNotYetValid,
    /// The broker presents the certificate. No action is required.
    Normal CertificateProven,
    /// The issuer rejected the certificate request. Check the issuer, then delete the CertificateRequest for another attempt.
    Warning CertificateRefused,
    /// The issuer returned a certificate that the device cannot use. Check the issuer's configuration.
    Warning CertificateUnusable,
    /// The Secret of the Gateway's client authority is not usable. Check the condition ClientAuthorityValid of the Gateway.
    Warning ClientAuthorityUnusable,
    /// The client authority can sign the certificates of devices. No action is required.
    Normal ClientAuthorityUsable,
    /// The table has columns that the spec does not name. Drop them by hand if they are not needed.
    Normal ColumnsKept,
    /// The certificate signing request has a common name other than the name of the device. Create it with the device's name.
    Warning CommonNameMismatch,
    /// The credentials of the devices of a Gateway exceed what the operator can store. Shorten access rules, or use another Gateway.
    Warning CredentialsFull,
    /// The agent has not reported a login at the broker yet. Wait; if it lasts, read the log of the container `agent`.
    Warning CredentialsNotProven,
    /// The database with the name in the connection URI does not exist. Create it, or correct the URI.
    Warning DatabaseNotFound,
    /// The database rejected a statement. The message has its answer.
    Warning DatabaseRefused,
    /// The database does not answer. Check whether it runs and is reachable; the operator retries.
    Warning DatabaseUnavailable,
    /// More messages were rejected than deadLetters.maxBytesPerHour keeps. Fix the sender, or raise the limit.
    Warning TooManyRefused,
    /// The object is being deleted. Wait.
    Normal Deleting,
    /// The Protobuf descriptor does not describe the message or the fields of the spec. Correct the spec or the descriptor.
    Warning DescriptorMismatch,
    /// The ConfigMap of the Protobuf descriptor or its key does not exist. Create it.
    Warning DescriptorNotFound,
    /// The Protobuf descriptor is too large. Compile it without the files that are not needed.
    Warning DescriptorTooLarge,
    /// The desired state is too large to be sent to a device. Shorten it, or put a reference there.
    Warning DesiredTooLarge,
    /// The device is disabled, and the broker refuses its login. Set spec.enabled to true to enable it.
    Normal Disabled,
    /// The volume of the broker is full. Check which client does not fetch its messages, or expand the volume.
    Warning DiskFull,
    /// The device reports another state than the desired one. Check the device.
    Warning Diverged,
    /// The extension timescaledb is not installed, and the login may not create it. Create it as a superuser.
    Warning ExtensionMissing,
    /// The extension timescaledb is too old. Update it.
    Warning ExtensionTooOld,
    /// The broker still presents a certificate that was replaced. Restart its pod when clients may reconnect.
    Warning FormerCertificatePresented,
    /// The Gateway does not exist. Create it; no change of the Device is necessary.
    Warning GatewayNotFound,
    /// The Gateways could not be assigned to the workers. The operator retries; the message has the answer of the database.
    Warning GatewaysNotAssigned,
    /// An address is not of the form host:port. Correct it.
    Warning InvalidAddress,
    /// The Secret of the authority that issues the Gateway's certificates is not usable. Delete it; the operator issues another one.
    Warning InvalidAuthority,
    /// The access rules of the device are invalid. Correct spec.authorization.
    Warning InvalidAuthorization,
    /// The Secret holds no usable certificate and key. Correct it.
    Warning InvalidCertificate,
    /// The certificate of the client authority cannot sign. Use a certificate of an authority.
    Warning InvalidClientAuthority,
    /// The connection URI is invalid. Correct the Secret.
    Warning InvalidConnectionUri,
    /// A host name of the Gateway is invalid. Correct spec.service.hostNames.
    Warning InvalidHostName,
    /// The password in the Secret is not usable. Correct the Secret.
    Warning InvalidPassword,
    /// A quantity is invalid or too small. Correct the field in the message.
    Warning InvalidQuantity,
    /// The device's last report is not usable. Check what the device sends.
    Warning InvalidReport,
    /// The signature of the certificate signing request is invalid. Create the request again.
    Warning InvalidRequestSignature,
    /// Resources or limits contradict one another. Correct the fields in the message.
    Warning InvalidResources,
    /// A value of the Secret is not usable. Correct the Secret.
    Warning InvalidSecret,
    /// The spec is invalid in a way that the schema cannot express. Correct the field in the message.
    Warning InvalidSpec,
    /// Rows of the table differ only in columns that are no longer in the key. Add `key: true` or the capture again, or write to another table.
    Warning KeyConflict,
    /// The broker or the database refused the login. Correct the Secret, or the user's permissions.
    Warning LoginRefused,
    /// An external broker manages the credentials of the device. No action is required.
    Normal ManagedElsewhere,
    /// The broker reached its share of the memory limit. Check which client does not fetch its messages, or raise the limit.
    Warning MemoryFull,
    /// An object with the required name exists and belongs to something else. Rename or delete it.
    Warning NameConflict,
    /// The Gateway has no client authority, so it cannot authenticate the device by certificate. Set spec.clientAuthority.
    Warning NoClientAuthority,
    /// The selector matches no Gateway of the namespace. Create one, or change the labels.
    Warning NoGatewaySelected,
    /// A table with the name exists and is not a hypertable. Rename it, or choose another name.
    Warning NotAHypertable,
    /// The spec is invalid; a running broker keeps its configuration. Check the condition Accepted.
    Warning NotAccepted,
    /// The broker does not have the desired state yet. Check the conditions of the Gateway.
    Warning NotPublished,
    /// The Pipeline is paused, and the brokers queue the messages. Set spec.paused to false to continue.
    Normal Paused,
    /// The workers store the messages that they have read. Wait.
    Normal Pausing,
    /// The login lacks a permission. Grant the permission in the message.
    Warning PermissionDenied,
    /// The broker accepted the device's credential. No action is required.
    Normal Proven,
    /// The queue of a session is full. Check the workers and the database of its Pipeline, or raise the limit.
    Warning QueueFull,
    /// The broker dropped messages for slow or disconnected clients. Raise limits.queuedBytesPerClient, or check the clients.
    Warning QueueLimitReached,
    /// The workers ingest. No action is required.
    Normal Reading,
    /// The object matches its spec. No action is required.
    Normal Ready,
    /// The device registry of the database is being filled. Wait.
    Warning RegistryNotFilled,
    /// The device registry could not be written. The operator retries; the message has the answer of the database.
    Warning RegistryNotWritten,
    /// The device's last report is too large. Check what the device sends.
    Warning ReportTooLarge,
    /// The replay is complete. No action is required.
    Normal Replayed,
    /// The replay failed and is retried. The message has the cause.
    Warning ReplayFailing,
    /// The replay is in progress. Wait.
    Normal Replaying,
    /// The Secret lacks a key. Add it.
    Warning SecretKeyNotFound,
    /// The Secret does not allow its use as a credential. Add the label in the message to it.
    Warning SecretNotAllowed,
    /// The Secret does not exist. Create it.
    Warning SecretNotFound,
    /// Sessions at external brokers could not be ended. End them there; the message has their client identifiers.
    Warning SessionsNotEnded,
    /// Ended sessions could not be removed from the database. The operator retries.
    Warning SessionsNotForgotten,
    /// The sessions of the Pipeline could not be read from the database. The operator retries.
    Warning SessionsNotRead,
    /// The client authority could not sign the certificate. Check its key.
    Warning SigningFailed,
    /// The broker refused a subscription of the operator. Correct the access rules of its user.
    Warning SubscriptionRefused,
    /// The device reports the desired state. No action is required.
    Normal Synced,
    /// Another transaction holds a lock on the table. The operator retries; end the transaction if it lasts.
    Warning TableBusy,
    /// The table of the deleted Pipeline could not be dropped. Drop it by hand.
    Warning TableNotDropped,
    /// A table with the name exists and was not created by the operator. Rename it, or choose another name.
    Warning TableNotOurs,
    /// The workers wait for the table. Check the condition TableReady.
    Warning TableNotReady,
    /// The table of the deleted Pipeline still has it as its owner. A Pipeline of the same name takes it over.
    Warning TableNotReleased,
    /// The table of a deleted Pipeline was kept for another namespace or cluster. Choose another name, or run the statement in the message.
    Warning TableRetained,
    /// The table matches the spec. No action is required.
    Normal TableReady,
    /// The table belongs to another Pipeline. Choose another name, or delete the other Pipeline.
    Warning TableTaken,
    /// The TLS handshake with the external broker failed. Check its certificate and the authorities in the Secret.
    Warning TlsFailed,
    /// A column has another type in the table than in the spec. Rename the field, or change the column by hand.
    Warning TypeConflict,
    /// The certificate signing request is not readable. Create a PKCS #10 request in PEM.
    Warning UnreadableSigningRequest,
    /// The key of the certificate signing request is of an unsupported kind. Use ECDSA P-256 or P-384, Ed25519, or RSA.
    Warning UnsupportedKey,
    /// The RSA key of the certificate signing request is too small or too large. Use the size in the message.
    Warning WeakKey,
    /// All workers have their sessions and can write. No action is required.
    Normal WorkersAvailable,
    /// Not all workers are ready. Describe the pod in the message.
    Warning WorkersNotReady,
}

impl Reason {
    /// The reason of a condition; `None` if the reason is of another program or another version.
    #[must_use]
    pub fn of(condition: &Condition) -> Option<Self> {
        Self::ALL.iter().copied().find(|reason| reason.as_str() == condition.reason)
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.as_str())
    }
}

impl PartialEq<str> for Reason {
    fn eq(&self, other: &str) -> bool {
        self.as_str() == other
    }
}

impl PartialEq<&str> for Reason {
    fn eq(&self, other: &&str) -> bool {
        self.as_str() == *other
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::dead_letter::DeadLetterReason;

    #[test]
    fn each_reason_is_unique_camel_case_and_documented_with_meaning_and_remedy() {
        let names: BTreeSet<&str> = Reason::ALL.iter().map(|reason| reason.as_str()).collect();
        assert_eq!(names.len(), Reason::ALL.len());
        let mut descriptions = BTreeSet::new();
        for reason in Reason::ALL {
            let (name, description) = (reason.as_str(), reason.description());
            assert!(name.chars().all(|c| c.is_ascii_alphabetic()) && name.starts_with(|c: char| c.is_ascii_uppercase()), "{name}");
            assert!(description.contains(". ") || description.contains("; "), "{name}: meaning and remedy expected");
            assert!(description.ends_with('.') && descriptions.insert(description), "{name}: {description}");
            let needs_no_action = description.ends_with("No action is required.");
            assert!(!(needs_no_action && reason.severity() == Severity::Warning), "{name} warns and requires nothing");
        }
    }

    #[test]
    fn a_label_of_dead_letters_never_means_something_else_in_a_condition() {
        for reason in DeadLetterReason::ALL {
            assert!(Reason::ALL.iter().all(|other| other.as_str() != reason.name()), "{}", reason.name());
        }
    }
}
