//! The reference of the resources as a document, from the same definitions that the API server serves.

use std::fmt::Write;

use crate::reason::Reason;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::{
    CustomResourceDefinition, JSONSchemaProps, JSONSchemaPropsOrArray, JSONSchemaPropsOrBool,
};

/// The reference of these definitions, as Markdown.
#[must_use]
pub fn reference(definitions: &[CustomResourceDefinition]) -> String {
    let mut text = String::from(
        "# Reference of the resources\n\nGenerated from the CustomResourceDefinitions by `make crds`; `kubectl explain` shows the same text.\n",
    );
    for definition in definitions {
        let names = &definition.spec.names;
        let short = names.short_names.clone().unwrap_or_default().join(", ");
        for version in &definition.spec.versions {
            append(&mut text, &format!("\n## {}\n\n`{}/{}`, short name `{short}`.", names.kind, definition.spec.group, version.name));
            let Some(schema) = version.schema.as_ref().and_then(|schema| schema.open_api_v3_schema.as_ref()) else { continue };
            append(&mut text, &format!(" {}\n", one_line(schema)));
            rules(&mut text, schema);
            for part in ["spec", "status"] {
                if let Some(schema) = schema.properties.as_ref().and_then(|properties| properties.get(part)) {
                    append(&mut text, "\n| field | type | what it is |\n|---|---|---|\n");
                    fields(&mut text, part, schema);
                }
            }
        }
    }
    reasons(&mut text);
    text
}

/// The reasons of conditions and Events.
fn reasons(text: &mut String) {
    append(text, "\n## Reasons\n\nThe reasons of conditions and Events. A warning may need action.\n\n");
    append(text, "| reason | severity | meaning and remedy |\n|---|---|---|\n");
    for reason in Reason::ALL {
        append(text, &format!("| `{reason}` | {:?} | {} |\n", reason.severity(), reason.description()));
    }
}

/// Appends; writing to a text cannot fail.
fn append(text: &mut String, part: &str) {
    let _ = text.write_str(part);
}

fn fields(text: &mut String, path: &str, schema: &JSONSchemaProps) {
    let required = schema.required.clone().unwrap_or_default();
    for (name, field) in schema.properties.iter().flatten() {
        let path = format!("{path}.{name}");
        let mut description = one_line(field);
        if required.contains(name) {
            description = format!("**Required.** {description}");
        }
        if let Some(default) = &field.default {
            let _ = write!(description, " Default: `{}`.", default.0);
        }
        if let Some(values) = &field.enum_ {
            let values: Vec<String> = values.iter().map(|value| format!("`{}`", value.0.as_str().unwrap_or_default())).collect();
            let _ = write!(description, " One of {}.", values.join(", "));
        }
        for rule in field.x_kubernetes_validations.iter().flatten() {
            let _ = write!(description, " Rule: {}.", rule.message.as_deref().unwrap_or(&rule.rule));
        }
        append(text, &format!("| `{path}` | {} | {} |\n", type_name(field), description.trim().replace('|', "\\|")));
        // The parts of what Kubernetes itself defines are in its own reference.
        if name == "conditions" || name == "gatewaySelector" {
            continue;
        }
        fields(text, &path, field);
        if let Some(JSONSchemaPropsOrArray::Schema(items)) = &field.items {
            fields(text, &format!("{path}[]"), items);
        }
    }
}

fn rules(text: &mut String, schema: &JSONSchemaProps) {
    for rule in schema.x_kubernetes_validations.iter().flatten() {
        append(text, &format!("\n- {}", rule.message.as_deref().unwrap_or(&rule.rule)));
    }
    if schema.x_kubernetes_validations.is_some() {
        append(text, "\n");
    }
}

fn type_name(schema: &JSONSchemaProps) -> String {
    if schema.x_kubernetes_int_or_string == Some(true) {
        return "quantity".to_owned();
    }
    match (schema.type_.as_deref(), &schema.items, &schema.additional_properties) {
        (Some("array"), Some(JSONSchemaPropsOrArray::Schema(items)), _) => format!("list of {}", type_name(items)),
        (Some("object"), _, Some(JSONSchemaPropsOrBool::Schema(values))) => format!("map of {}", type_name(values)),
        (Some(type_), ..) => type_.to_owned(),
        (None, ..) => "any".to_owned(),
    }
}

fn one_line(schema: &JSONSchemaProps) -> String {
    schema.description.clone().unwrap_or_default().split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::crd::definitions;

    #[test]
    fn the_committed_reference_equals_the_types() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/reference.md");
        let committed = std::fs::read_to_string(path).unwrap_or_default();
        assert!(committed == reference(&definitions()), "docs/reference.md is not what the types say: run `make crds`");
    }

    #[test]
    fn every_field_says_what_it_is() {
        fn walk(path: &str, schema: &JSONSchemaProps, bare: &mut Vec<String>) {
            for (name, field) in schema.properties.iter().flatten() {
                let path = format!("{path}.{name}");
                if field.description.as_deref().unwrap_or_default().is_empty() {
                    bare.push(path.clone());
                }
                walk(&path, field, bare);
                if let Some(JSONSchemaPropsOrArray::Schema(items)) = &field.items {
                    walk(&path, items, bare);
                }
            }
        }
        let mut bare = Vec::new();
        for definition in definitions() {
            let schema = definition.spec.versions[0].schema.clone().unwrap().open_api_v3_schema.unwrap();
            for part in ["spec", "status"] {
                walk(&format!("{}.{part}", definition.spec.names.kind), &schema.properties.as_ref().unwrap()[part], &mut bare);
            }
        }
        assert!(bare.is_empty(), "fields without a description: {bare:?}");
    }
}
