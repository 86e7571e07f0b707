//! Reads a Pipeline as strictly as the API server (`fieldValidation=Strict`, the default of kubectl): an unknown field is an error,
//! because it is most likely misspelled.

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::{JSONSchemaProps, JSONSchemaPropsOrArray, JSONSchemaPropsOrBool};
use kube::CustomResourceExt;
use serde_json::Value;

use crate::api::Pipeline;
use crate::api::condition::Cause;
use crate::api::reason::Reason;

/// Reads a Pipeline from an object.
pub fn read(object: Value) -> Result<Pipeline, Cause> {
    let invalid = |message: String| Cause::new(Reason::InvalidSpec, message);
    let definition = Pipeline::crd();
    let version = definition.spec.versions.first();
    let schema = version.and_then(|version| version.schema.as_ref()?.open_api_v3_schema.as_ref()?.properties.as_ref()?.get("spec"));
    if let (Some(spec), Some(schema)) = (object.get("spec"), schema) {
        find_unknown_field(spec, schema, "spec").map_err(invalid)?;
    }
    serde_json::from_value(object).map_err(|error| invalid(format!("failed to understand the Pipeline: {error}")))
}

/// Fails at the first unknown field.
fn find_unknown_field(value: &Value, schema: &JSONSchemaProps, path: &str) -> Result<(), String> {
    match (value, &schema.properties, &schema.additional_properties, &schema.items) {
        (Value::Object(object), Some(known), _, _) => object.iter().try_for_each(|(key, below)| match known.get(key) {
            Some(schema) => find_unknown_field(below, schema, &format!("{path}.{key}")),
            None => {
                let known: Vec<_> = known.keys().map(String::as_str).collect();
                Err(format!("failed to understand the field {path}.{key}: expected one of {}", known.join(", ")))
            }
        }),
        (Value::Object(object), None, Some(JSONSchemaPropsOrBool::Schema(schema)), _) => {
            object.iter().try_for_each(|(key, below)| find_unknown_field(below, schema, &format!("{path}.{key}")))
        }
        (Value::Array(items), _, _, Some(JSONSchemaPropsOrArray::Schema(schema))) => {
            items.iter().enumerate().try_for_each(|(index, below)| find_unknown_field(below, schema, &format!("{path}[{index}]")))
        }
        _ => Ok(()),
    }
}
