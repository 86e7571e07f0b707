//! Compute resources and quantities, with schemas that accept the same values as Kubernetes.

use std::borrow::Cow;
use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::ResourceRequirements;
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize};

/// A Kubernetes quantity such as `64Mi`, `500m` or `2`.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(transparent)]
pub struct ResourceQuantity(pub String);

impl ResourceQuantity {
    /// The quantity as the type of the Kubernetes API.
    #[must_use]
    pub fn to_quantity(&self) -> Quantity {
        Quantity(self.0.clone())
    }

    /// The quantity in whole units (for memory: bytes), or `None` if it does not parse or exceeds the range.
    ///
    /// The schema's pattern admits only quantities that parse, so `None` means that the number is too large.
    #[must_use]
    pub fn to_units(&self) -> Option<i64> {
        let digits = self.0.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(self.0.len());
        let (number, suffix) = self.0.split_at(digits);
        let scale: f64 = match suffix {
            "" => 1.0,
            "m" => 1e-3,
            "k" => 1e3,
            "M" => 1e6,
            "G" => 1e9,
            "T" => 1e12,
            "Ki" => 1024.0,
            "Mi" => 1024.0 * 1024.0,
            "Gi" => 1024.0 * 1024.0 * 1024.0,
            "Ti" => 1024.0 * 1024.0 * 1024.0 * 1024.0,
            _ => return None,
        };
        let units = number.parse::<f64>().ok()? * scale;
        #[allow(clippy::cast_possible_truncation, reason = "bounded to what an i64 holds exactly enough on the line above")]
        (units.is_finite() && units < 9e18).then_some(units.floor() as i64)
    }
}

impl From<&str> for ResourceQuantity {
    fn from(text: &str) -> Self {
        Self(text.to_owned())
    }
}

impl<'de> Deserialize<'de> for ResourceQuantity {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum IntOrString {
            Int(i64),
            String(String),
        }
        Ok(match IntOrString::deserialize(deserializer)? {
            IntOrString::Int(number) => Self(number.to_string()),
            IntOrString::String(text) => Self(text),
        })
    }
}

impl JsonSchema for ResourceQuantity {
    fn schema_name() -> Cow<'static, str> {
        "ResourceQuantity".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "pattern": "^[0-9]+(\\.[0-9]+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$",
            "x-kubernetes-int-or-string": true
        })
    }
}

/// Compute resources of a container.
#[derive(Clone, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ComputeResources {
    /// Maximum resources of the container, for instance `{memory: 128Mi}`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub limits: BTreeMap<String, ResourceQuantity>,

    /// Resources that the scheduler reserves for the container, for instance `{cpu: 100m, memory: 64Mi}`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub requests: BTreeMap<String, ResourceQuantity>,
}

impl ComputeResources {
    /// The type of the Kubernetes API.
    #[must_use]
    pub fn to_requirements(&self) -> ResourceRequirements {
        let quantities = |map: &BTreeMap<String, ResourceQuantity>| {
            (!map.is_empty()).then(|| map.iter().map(|(name, quantity)| (name.clone(), quantity.to_quantity())).collect())
        };
        ResourceRequirements { limits: quantities(&self.limits), requests: quantities(&self.requests), claims: None }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_in_units() {
        for (text, units) in
            [("64Mi", Some(67_108_864)), ("2", Some(2)), ("1.5Gi", Some(1_610_612_736)), ("500m", Some(0)), ("2k", Some(2000)), ("x", None)]
        {
            assert_eq!(ResourceQuantity::from(text).to_units(), units, "{text}");
        }
    }

    #[test]
    fn quantities_may_be_numbers() {
        let resources: ComputeResources = serde_json::from_str(r#"{"limits": {"cpu": 2, "memory": "1Gi"}}"#).unwrap();
        assert_eq!(resources.limits["cpu"], ResourceQuantity::from("2"));
    }
}
