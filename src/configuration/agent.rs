//! The configuration of a broker's agent, and its report to the operator.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Key of the broker's ConfigMap, and file name under which it is mounted.
pub const FILE: &str = "agent.json";

/// Key of the report in the agent's ConfigMap.
pub const REPORT_KEY: &str = "report.json";

/// What an agent does.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct AgentConfiguration {
    /// Namespace of the Gateway.
    pub namespace: String,

    /// Name of the Gateway.
    pub gateway: String,

    /// Secrets with the certificates of the TLS listeners, each once.
    pub tls_secrets: Vec<String>,
}

/// What an agent has proven of its broker. Written only when it changes.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct AgentReport {
    /// For each shard, by number, the revision (see `credential::shard`) that the broker has proven to hold.
    #[serde(default)]
    pub shards: BTreeMap<usize, String>,

    /// Whether the broker ever dropped messages because of a limit, since it started.
    #[serde(default)]
    pub messages_dropped: bool,
}
