//! The CustomResourceDefinitions of the three kinds.

use std::io::Write;
use std::path::Path;

use anyhow::Context;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::{CustomResourceDefinition, JSON};
use kube::CustomResourceExt;
use serde_json::json;

use super::{Device, Gateway, Pipeline, manual};

/// The CustomResourceDefinitions, as they are committed in `crds/` and installed by the chart.
#[must_use]
pub fn definitions() -> Vec<CustomResourceDefinition> {
    [Gateway::crd(), Device::crd(), Pipeline::crd()].into_iter().map(with_status_default).collect()
}

/// Adds `status: {default: {}}`, so that a new object has a status with `observedGeneration: -1` and does not count as
/// healthy before its first reconciliation. A default inside an object that is absent has no effect.
fn with_status_default(mut definition: CustomResourceDefinition) -> CustomResourceDefinition {
    for version in &mut definition.spec.versions {
        let schema = version.schema.as_mut().and_then(|schema| schema.open_api_v3_schema.as_mut());
        if let Some(status) = schema.and_then(|schema| schema.properties.as_mut()).and_then(|properties| properties.get_mut("status")) {
            status.default = Some(JSON(json!({})));
            status.nullable = None;
        }
    }
    definition
}

/// Writes `<plural>.yaml` for each definition into the folder, or all to standard output; and their reference, where wanted.
///
/// # Errors
/// When a file cannot be written.
pub fn write(folder: Option<&Path>, reference: Option<&Path>) -> anyhow::Result<()> {
    if let Some(path) = reference {
        std::fs::write(path, manual::reference(&definitions())).with_context(|| format!("failed to write {}", path.display()))?;
    }
    for definition in definitions() {
        let text = serde_saphyr::to_string(&definition)?;
        match folder {
            Some(folder) => {
                let path = folder.join(format!("{}.yaml", definition.spec.names.plural));
                std::fs::write(&path, text).with_context(|| format!("failed to write {}", path.display()))?;
            }
            None => write!(std::io::stdout(), "---\n{text}")?,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn committed_definitions_equal_the_types() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../crds");
        for definition in definitions() {
            let path = folder.join(format!("{}.yaml", definition.spec.names.plural));
            let committed = std::fs::read_to_string(&path).unwrap_or_default();
            assert!(
                committed == serde_saphyr::to_string(&definition).unwrap(),
                "{} is not what the types say: run `make crds`",
                path.display()
            );
        }
    }
}
