//! The Pipeline in a YAML file, with the ConfigMap that it names: pure.

use k8s_openapi::api::core::v1::ConfigMap;
use kube::ResourceExt;
use serde_json::Value;

use super::strict;
use crate::api::condition::Cause;
use crate::api::{GROUP, Pipeline};

/// The content of a file for a Pipeline.
#[derive(Debug)]
pub struct Manifest {
    /// The Pipeline.
    pub pipeline: Pipeline,
    /// The ConfigMap of its `decode.protobuf`, if the file has it.
    pub descriptor: Option<ConfigMap>,
}

/// Why a file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// It is not YAML.
    #[error("failed to understand the YAML")]
    ReadYaml(#[from] serde_saphyr::Error),

    /// It has no Pipeline, or none with that name.
    #[error("failed to find the Pipeline{}: expected an object of kind Pipeline and of {GROUP}; found {found}", of(name.as_ref()))]
    FindPipeline {
        /// The requested name.
        name: Option<String>,
        /// The Pipelines of the file.
        found: String,
    },

    /// It has several Pipelines.
    #[error("failed to choose between the Pipelines {found}: name one with --pipeline")]
    ChoosePipeline {
        /// Their names.
        found: String,
    },
}

fn of(name: Option<&String>) -> String {
    name.map(|name| format!(" {name}")).unwrap_or_default()
}

/// The Pipeline of a file; the inner `Err` if the API server would refuse it.
pub fn find(yaml: &str, name: Option<&str>) -> Result<Result<Manifest, Cause>, ManifestError> {
    let mut objects = Vec::new();
    for document in serde_saphyr::from_multiple::<Value>(yaml)? {
        flatten(document, &mut objects);
    }
    let (mut pipelines, others): (Vec<_>, Vec<_>) = objects.into_iter().partition(is_pipeline);
    let names = pipelines.iter().map(|object| text(object, "/metadata/name")).collect::<Vec<_>>().join(", ");
    if let Some(name) = name {
        pipelines.retain(|object| text(object, "/metadata/name") == name);
    }
    let object = match (pipelines.pop(), pipelines.is_empty()) {
        (Some(object), true) => object,
        (Some(_), false) => return Err(ManifestError::ChoosePipeline { found: names }),
        (None, _) => {
            let found = if names.is_empty() { "none".to_owned() } else { names };
            return Err(ManifestError::FindPipeline { name: name.map(str::to_owned), found });
        }
    };
    Ok(strict::read(object).map(|pipeline| Manifest { descriptor: descriptor(&pipeline, others), pipeline }))
}

/// The objects of a document: itself, or those of a list.
fn flatten(mut document: Value, into: &mut Vec<Value>) {
    if text(&document, "/kind") == "List"
        && let Some(Value::Array(items)) = document.get_mut("items").map(Value::take)
    {
        for item in items {
            flatten(item, into);
        }
    } else {
        into.push(document);
    }
}

fn is_pipeline(object: &Value) -> bool {
    text(object, "/kind") == "Pipeline" && text(object, "/apiVersion").split('/').next() == Some(GROUP)
}

fn text<'a>(object: &'a Value, pointer: &str) -> &'a str {
    object.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
}

fn descriptor(pipeline: &Pipeline, others: Vec<Value>) -> Option<ConfigMap> {
    let wanted = &pipeline.spec.decode.protobuf.as_ref()?.config_map_ref.name;
    let namespace = pipeline.namespace().unwrap_or_default();
    let is_wanted = |object: &Value| {
        let found = text(object, "/metadata/namespace");
        // An object without a namespace has that of the others.
        text(object, "/kind") == "ConfigMap"
            && text(object, "/metadata/name") == wanted
            && (found == namespace || found.is_empty() || namespace.is_empty())
    };
    others.into_iter().find(is_wanted).and_then(|object| serde_json::from_value(object).ok())
}
