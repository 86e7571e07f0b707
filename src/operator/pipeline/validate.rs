//! Validates the observed state and plans the changes: pure.

use std::collections::{BTreeMap, BTreeSet};

use kube::core::SelectorExt;

use super::external;
use super::observe::{DatabaseView, Observed, owner};
use crate::api::Pipeline;
use crate::api::condition::Cause;
use crate::api::external::ExternalBroker;
use crate::configuration::pipeline::compile;
use crate::sink::timescale::plan::{SchemaPlan, plan};
use crate::sink::timescale::schema::Desired;

/// A valid spec, and the parts of it that are possible now.
#[derive(Debug)]
pub struct Valid {
    /// The desired table.
    pub desired: Desired,
    /// MQTT topic filter of the messages.
    pub filter: String,
    /// MQTT topic filter of the messages that the workers publish, if any.
    pub commands: Option<String>,
    /// Names of the selected Gateways, sorted.
    pub gateways: Vec<String>,
    /// The selected Gateways with an external broker.
    pub externals: BTreeMap<String, ExternalBroker>,
    /// Those of them whose login the workers may use.
    pub usable_logins: BTreeSet<String>,
    /// The sessions in which workers read the Gateways, by name.
    pub sessions: Vec<String>,
    /// The plan for the table.
    pub table: TableView,
    /// The FileDescriptorSet for the workers, if they need one; or the cause why they wait.
    pub descriptor: Result<Option<Vec<u8>>, Cause>,
}

/// The plan for the table.
#[derive(Debug)]
pub enum TableView {
    /// The state of the table is unknown.
    Unknown(Cause),
    /// The table must not be changed. `stalled`: it waits for a change of this Pipeline.
    Refused {
        /// The cause.
        cause: Cause,
        /// Whether only a change of the Pipeline can resolve the cause.
        stalled: bool,
    },
    /// The steps to run; without steps, the table matches the spec.
    Planned(SchemaPlan),
}

/// Checks a spec against the observed state.
///
/// # Errors
/// The cause why the spec is invalid, independent of other objects.
pub fn validate(pipeline: &Pipeline, observed: &Observed) -> Result<Valid, Cause> {
    let descriptor = observed.descriptor.as_ref().map(Option::as_deref).map_err(Clone::clone);
    let compiled = compile(owner(&observed.cluster, pipeline), &pipeline.spec, descriptor)?;
    let (desired, topic) = (compiled.desired, compiled.topic);
    let descriptor = compiled.decoder.and_then(|_| observed.descriptor.clone());
    let gateways = observed.gateways.iter().filter(|(_, labels)| compiled.selector.matches(labels)).map(|(name, _)| name.clone());
    let gateways: Vec<String> = gateways.collect();
    let externals = observed.externals.iter().filter(|(name, _)| gateways.contains(name));
    let externals = externals.map(|(name, broker)| (name.clone(), broker.clone())).collect();
    let sessions = external::session_names(pipeline, &gateways, &externals);
    let table = match &observed.database {
        DatabaseView::Unseen(cause) => TableView::Unknown(cause.clone()),
        DatabaseView::Refused(cause) => TableView::Refused { cause: cause.clone(), stalled: false },
        DatabaseView::Seen(found) => match plan(&desired, found) {
            Ok(plan) => TableView::Planned(plan),
            Err(refusal) => {
                let cause = Cause::new(refusal.reason(), refusal.to_string());
                TableView::Refused { cause, stalled: refusal.is_of_the_spec() }
            }
        },
    };
    Ok(Valid {
        descriptor,
        desired,
        filter: topic.filter().to_owned(),
        commands: topic.commands().map(str::to_owned),
        gateways,
        externals,
        usable_logins: observed.usable_logins.clone(),
        sessions,
        table,
    })
}

#[cfg(test)]
pub(super) mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::api::reason::Reason;
    use crate::broker::credential::password::Password;
    use crate::sink::timescale::observe;

    /// A Pipeline of this spec, merged into a plain one.
    pub fn pipeline(changes: Value) -> Pipeline {
        let mut object = json!({
            "apiVersion": "fleetwright.io/v1alpha1",
            "kind": "Pipeline",
            "metadata": {"name": "vibration", "namespace": "plant", "uid": "u", "generation": 2},
            "spec": {
                "source": {"topic": "devices/{device}/telemetry"},
                "decode": {"fields": [{"name": "rms", "type": "Float64"}]},
                "sink": {"timescale": {"connectionSecret": {"name": "timescale"}, "table": "vibration"}},
            },
        });
        merge(&mut object["spec"], changes);
        serde_json::from_value(object).unwrap()
    }

    fn merge(into: &mut Value, changes: Value) {
        match (into, changes) {
            (Value::Object(into), Value::Object(changes)) => {
                for (key, value) in changes {
                    merge(into.entry(key).or_insert(Value::Null), value);
                }
            }
            (into, changes) => *into = changes,
        }
    }

    /// Two Gateways, an empty database.
    pub fn observed() -> Observed {
        let labels = |site: &str| BTreeMap::from([("site".to_owned(), site.to_owned())]);
        Observed {
            cluster: "here".to_owned(),
            gateways: [("plant-1".to_owned(), labels("north")), ("plant-2".to_owned(), labels("south"))].into(),
            externals: BTreeMap::new(),
            usable_logins: BTreeSet::new(),
            uri: Ok("postgresql://u:p@db:5433/fleet".parse().unwrap()),
            database: DatabaseView::Seen(observe::ObservedSchema::default()),
            descriptor: Ok(None),
            dead_letters: None,
            password: Some(Password::given(b"secret-of-the-workers").unwrap()),
        }
    }

    #[test]
    fn gateways_are_selected_by_labels() {
        for (selector, expected) in [
            (json!({}), vec!["plant-1", "plant-2"]),
            (json!({"matchLabels": {"site": "north"}}), vec!["plant-1"]),
            (json!({"matchLabels": {"site": "west"}}), vec![]),
            (json!({"matchExpressions": [{"key": "site", "operator": "In", "values": ["south", "west"]}]}), vec!["plant-2"]),
            (json!({"matchExpressions": [{"key": "site", "operator": "NotIn", "values": ["south"]}]}), vec!["plant-1"]),
            (json!({"matchExpressions": [{"key": "line", "operator": "NotIn", "values": ["3"]}]}), vec!["plant-1", "plant-2"]),
            (json!({"matchExpressions": [{"key": "line", "operator": "Exists"}]}), vec![]),
            (json!({"matchExpressions": [{"key": "line", "operator": "DoesNotExist"}]}), vec!["plant-1", "plant-2"]),
        ] {
            let valid = validate(&pipeline(json!({"source": {"gatewaySelector": selector}})), &observed()).unwrap();
            assert_eq!(valid.gateways, expected, "{selector}");
        }
    }

    #[test]
    fn the_filter_has_a_plus_for_each_capture() {
        let valid = validate(&pipeline(json!({"source": {"topic": "{site}/+/devices/{device}/x"}})), &observed()).unwrap();
        assert_eq!(valid.filter, "+/+/devices/+/x");
    }

    #[test]
    fn invalid_specs_are_refused() {
        for changes in [
            json!({"source": {"topic": "devices/telemetry"}}),
            json!({"source": {"topic": "{rms}/{device}"}}),
            json!({"source": {"topic": "{a}/{a}/{device}"}}),
            json!({"decode": {"fields": [{"name": "a", "type": "Text"}, {"name": "a", "type": "Int64"}]}}),
            json!({"decode": {"fields": [{"name": "a", "type": "Int64", "default": "none"}]}}),
            json!({"decode": {"format": "SparkplugB", "fields": [{"name": "a", "type": "Int64"}]}}),
            json!({"source": {"gatewaySelector": {"matchExpressions": [{"key": "a", "operator": "Like", "values": []}]}}}),
        ] {
            assert_eq!(validate(&pipeline(changes.clone()), &observed()).unwrap_err().reason, Reason::InvalidSpec, "{changes}");
        }
    }

    #[test]
    fn workers_wait_for_a_matching_descriptor() {
        let changes = json!({"decode": {"format": "Protobuf", "protobuf": {"configMapRef": {"name": "schema"}, "message": "a.B"}}});
        for (descriptor, reason) in
            [(Err(Cause::new(Reason::DescriptorNotFound, "")), Reason::DescriptorNotFound), (Ok(Some(vec![])), Reason::DescriptorMismatch)]
        {
            let valid = validate(&pipeline(changes.clone()), &Observed { descriptor, ..observed() }).unwrap();
            assert_eq!(valid.descriptor.unwrap_err().reason, reason);
        }
    }

    #[test]
    fn the_plan_for_the_table_depends_on_the_observed_database() {
        let unseen = Observed { database: DatabaseView::Unseen(Cause::new(Reason::SecretNotFound, "")), ..observed() };
        assert!(
            matches!(validate(&pipeline(json!({})), &unseen).unwrap().table, TableView::Unknown(cause) if cause.reason == Reason::SecretNotFound)
        );
        let foreign = observe::ObservedSchema { table: Some(observe::ObservedTable::default()), ..Default::default() };
        let foreign = Observed { database: DatabaseView::Seen(foreign), ..observed() };
        let table = validate(&pipeline(json!({})), &foreign).unwrap().table;
        assert!(matches!(table, TableView::Refused { cause, stalled: false } if cause.reason == Reason::TableNotOurs));
        assert!(matches!(validate(&pipeline(json!({})), &observed()).unwrap().table, TableView::Planned(plan) if !plan.steps.is_empty()));
    }
}
