use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use proptest::sample::{select, subsequence};

use super::*;
use crate::sink::timescale::observe::{Claim, Extension, ObservedColumn};
use crate::sink::timescale::schema::ColumnType;
use crate::sink::timescale::schema::tests::{compile, spec};

fn wanted(fields: &[(&str, &str)], chunk_interval: &str) -> Desired {
    compile(&spec("{site}/{device}", fields, chunk_interval)).unwrap()
}

/// The effect of a step on a database.
fn execute(step: &SchemaChange, observed: &mut ObservedSchema) {
    match step {
        SchemaChange::CreateExtension => {
            observed.extension = Some(Extension { schema: DEFAULT_SCHEMA.to_owned(), version: "2.19.3".to_owned() });
        }
        SchemaChange::CreateSystem { cluster, .. } => {
            observed.system_version = Some(system::VERSION);
            if let Some(claim) = &mut observed.claim {
                claim.cluster.get_or_insert_with(|| cluster.clone());
            }
        }
        SchemaChange::Claim { owner, .. } => {
            let pipeline = Some(owner.pipeline.clone());
            observed.claim = Some(Claim { cluster: Some(owner.cluster.clone()), namespace: owner.namespace.clone(), pipeline });
        }
        SchemaChange::KeepDeadLetters { retention, .. } => observed.dead_letter_retention = Some(*retention),
        SchemaChange::CreateTable { table, .. } => {
            let columns = table.columns.iter().map(new_column).collect();
            observed.table = Some(ObservedTable { chunk_interval: Some(table.chunk_interval), columns, unique: Vec::new() });
        }
        SchemaChange::CreateKey { columns, .. } => {
            let unique = &mut observed.table.as_mut().unwrap().unique;
            unique.push(UniqueIndex { name: format!("index_of_{}", columns.len()), columns: columns.clone() });
        }
        SchemaChange::DropKey { index } => observed.table.as_mut().unwrap().unique.retain(|found| found.name != *index),
        SchemaChange::AddColumn { column, .. } => observed.table.as_mut().unwrap().columns.push(new_column(column)),
        SchemaChange::Comment { column, comment, .. } => {
            let columns = &mut observed.table.as_mut().unwrap().columns;
            columns.iter_mut().find(|found| found.name == *column).unwrap().comment.clone_from(comment);
        }
        SchemaChange::SetChunkInterval { chunk_interval, .. } => observed.table.as_mut().unwrap().chunk_interval = Some(*chunk_interval),
    }
}

fn new_column(column: &Column) -> ObservedColumn {
    ObservedColumn { name: column.name.clone(), type_: column.type_.as_sql().to_owned(), comment: None }
}

fn carried_out(desired: &Desired, mut observed: ObservedSchema) -> ObservedSchema {
    for step in plan(desired, &observed).unwrap().steps {
        execute(&step, &mut observed);
    }
    observed
}

#[test]
fn an_empty_database_gets_everything_in_order() {
    let desired = wanted(&[("rms", "Float64")], "1d");
    let steps = plan(&desired, &ObservedSchema::default()).unwrap().steps;
    assert!(matches!(
        steps.as_slice(),
        [
            SchemaChange::CreateExtension,
            SchemaChange::CreateSystem { .. },
            SchemaChange::Claim { .. },
            SchemaChange::KeepDeadLetters { retention: 2_592_000_000_000, .. },
            SchemaChange::CreateTable { .. },
            SchemaChange::CreateKey { .. }
        ]
    ));
}

#[test]
fn drift_is_repaired() {
    let desired = wanted(&[("rms", "Float64"), ("on", "Boolean")], "1d");
    let whole = carried_out(&desired, ObservedSchema::default());

    let dropped = ObservedSchema { table: None, ..whole.clone() };
    assert!(matches!(plan(&desired, &dropped).unwrap().steps[0], SchemaChange::CreateTable { .. }));

    let mut without_key = whole.clone();
    without_key.table.as_mut().unwrap().unique.clear();
    assert_eq!(plan(&desired, &without_key).unwrap().steps, [create_key(&["time", "device_id", "site"])]);

    let mut without_column = whole.clone();
    without_column.table.as_mut().unwrap().columns.retain(|column| column.name != "rms");
    assert!(
        matches!(plan(&desired, &without_column).unwrap().steps.as_slice(), [SchemaChange::AddColumn { column, .. }] if column.name == "rms")
    );

    let other_retention = ObservedSchema { dead_letter_retention: Some(1), ..whole.clone() };
    assert!(matches!(plan(&desired, &other_retention).unwrap().steps.as_slice(), [SchemaChange::KeepDeadLetters { .. }]));

    let older = ObservedSchema { system_version: Some(0), ..whole };
    assert!(matches!(plan(&desired, &older).unwrap().steps.as_slice(), [SchemaChange::CreateSystem { .. }]));
}

fn create_key(columns: &[&str]) -> SchemaChange {
    SchemaChange::CreateKey { table: "vibration".to_owned(), columns: columns.iter().map(ToString::to_string).collect() }
}

/// The index of a user stays.
#[test]
fn another_key_replaces_the_index_of_the_earlier_key() {
    let desired = wanted(&[("rms", "Float64")], "1d");
    let mut observed = carried_out(&desired, ObservedSchema::default());
    let index =
        |name: &str, columns: &[&str]| UniqueIndex { name: name.to_owned(), columns: columns.iter().map(ToString::to_string).collect() };
    observed.table.as_mut().unwrap().unique = vec![index("earlier", &["time", "device_id"]), index("user", &["time", "site"])];
    let steps = plan(&desired, &observed).unwrap().steps;
    assert_eq!(steps, [create_key(&["time", "device_id", "site"]), SchemaChange::DropKey { index: "earlier".to_owned() }]);
}

#[test]
fn a_newer_version_of_the_system_tables_is_left_alone() {
    let desired = wanted(&[("rms", "Float64")], "1d");
    let whole = carried_out(&desired, ObservedSchema::default());
    let newer = ObservedSchema { system_version: Some(system::VERSION + 1), ..whole };
    assert_eq!(plan(&desired, &newer).unwrap().steps, []);
}

#[test]
fn a_kept_table_is_handed_over_by_the_statement_in_the_message() {
    let desired = wanted(&[("rms", "Float64")], "1d");
    let claim = Claim { cluster: Some("there".to_owned()), namespace: "elsewhere".to_owned(), pipeline: None };
    let observed = ObservedSchema { claim: Some(claim), ..carried_out(&desired, ObservedSchema::default()) };
    let message = plan(&desired, &observed).unwrap_err().to_string();
    let statement =
        "UPDATE fleetwright.pipeline_table SET cluster = 'here', namespace = 'plant' WHERE table_name = 'vibration' AND pipeline IS NULL";
    assert!(message.contains(statement) && message.contains("of the cluster there"), "{message}");
}

#[test]
fn a_removed_field_keeps_its_column() {
    let whole = carried_out(&wanted(&[("rms", "Float64"), ("on", "Boolean")], "1d"), ObservedSchema::default());
    let plan = plan(&wanted(&[("on", "Boolean")], "1d"), &whole).unwrap();
    assert_eq!(plan, SchemaPlan { steps: vec![], kept: vec!["rms".to_owned()] });
}

#[test]
fn what_is_refused() {
    let desired = wanted(&[("rms", "Float64")], "1d");
    let whole = carried_out(&desired, ObservedSchema::default());
    let claimed = |cluster: Option<&str>, namespace: &str, pipeline: Option<&str>| {
        let (cluster, pipeline) = (cluster.map(str::to_owned), pipeline.map(str::to_owned));
        ObservedSchema { claim: Some(Claim { cluster, namespace: namespace.to_owned(), pipeline }), ..whole.clone() }
    };
    let other = |namespace: &str, pipeline: Option<&str>| claimed(Some("here"), namespace, pipeline);
    let with_version = |version: &str| {
        let extension = Extension { schema: "public".to_owned(), version: version.to_owned() };
        ObservedSchema { extension: Some(extension), ..whole.clone() }
    };
    let plain = ObservedTable { chunk_interval: None, ..whole.table.clone().unwrap() };
    for (observed, reason) in [
        (ObservedSchema { claim: None, ..whole.clone() }, Some("TableNotOurs")),
        (other("plant", Some("other")), Some("TableTaken")),
        (other("elsewhere", Some("vibration")), Some("TableTaken")),
        (other("elsewhere", None), Some("TableRetained")),
        (other("plant", None), None),
        (claimed(Some("there"), "plant", Some("vibration")), Some("TableTaken")),
        (claimed(Some("there"), "plant", None), Some("TableRetained")),
        (claimed(None, "plant", Some("vibration")), None),
        (claimed(None, "plant", None), None),
        (claimed(None, "elsewhere", None), Some("TableRetained")),
        (ObservedSchema { table: Some(plain), ..whole.clone() }, Some("NotAHypertable")),
        (with_version("2.12.9"), Some("ExtensionTooOld")),
        (with_version("1.99"), Some("ExtensionTooOld")),
        (with_version("2.13.0-dev"), None),
        (with_version("3"), None),
    ] {
        assert_eq!(plan(&desired, &observed).err().map(|refusal| refusal.reason().as_str()), reason, "{observed:?}");
    }
    let refusal = plan(&wanted(&[("rms", "Text")], "1d"), &whole).unwrap_err();
    assert!(matches!(&refusal, PlanError::KeepTypes { differences, .. } if differences.contains("rms")) && refusal.is_of_the_spec());
}

fn column_type() -> impl Strategy<Value = ColumnType> {
    select(vec![
        ColumnType::BigInteger,
        ColumnType::DoublePrecision,
        ColumnType::Boolean,
        ColumnType::Text,
        ColumnType::TimestampWithTimeZone,
        ColumnType::Json,
    ])
}

/// An index of the first `count` columns of a key.
fn unique(count: usize) -> UniqueIndex {
    let columns = ["time", "device_id", "site"].into_iter().take(count).map(str::to_owned).collect();
    UniqueIndex { name: format!("key_{count}"), columns }
}

/// Any state a database could be in, whether or not Fleetwright brought it there.
fn any_observed() -> impl Strategy<Value = ObservedSchema> {
    let extension =
        select(vec!["2.19.3", "2.13", "2.1"]).prop_map(|version| Extension { schema: "ts".to_owned(), version: version.to_owned() });
    let cluster = option::of(select(vec!["here", "there"]));
    let claim =
        (cluster, select(vec!["plant", "x"]), option::of(select(vec!["vibration", "y"]))).prop_map(|(cluster, namespace, pipeline)| {
            Claim { cluster: cluster.map(str::to_owned), namespace: namespace.to_owned(), pipeline: pipeline.map(str::to_owned) }
        });
    let names = subsequence(vec!["time", "device_id", "site", "rms", "on", "count", "z"], 0..=7);
    let table = (option::of(1_i64..3), names, vec((column_type(), option::of("[a-z]")), 7), subsequence(vec![2, 3, 1], 0..=3)).prop_map(
        |(chunk_interval, names, details, keys)| {
            let columns = names.into_iter().zip(details).map(|(name, (type_, comment))| ObservedColumn {
                name: name.to_owned(),
                comment,
                type_: match name {
                    "time" => ColumnType::TimestampWithTimeZone,
                    "device_id" => ColumnType::Integer,
                    "site" => ColumnType::Text,
                    _ => type_,
                }
                .as_sql()
                .to_owned(),
            });
            ObservedTable {
                chunk_interval: chunk_interval.map(|days| days * 86_400_000_000),
                columns: columns.collect(),
                unique: keys.into_iter().map(unique).collect(),
            }
        },
    );
    (option::of(extension), option::of(0..3), option::of(claim), option::of(1_i64..3), option::of(table)).prop_map(
        |(extension, system_version, claim, dead_letter_retention, table)| ObservedSchema {
            extension,
            system_version,
            claim,
            dead_letter_retention,
            table,
        },
    )
}

fn any_desired() -> impl Strategy<Value = Desired> {
    (subsequence(vec!["rms", "on", "count"], 1..=3), vec((column_type(), option::of("[a-z]")), 3), 1_i64..3).prop_map(
        |(names, details, days)| {
            let mut desired = wanted(&[("placeholder", "Text")], "1d");
            desired.table.columns.pop();
            desired.table.chunk_interval = days * 86_400_000_000;
            desired.table.columns.extend(names.into_iter().zip(details).map(|(name, (type_, comment))| Column {
                name: name.to_owned(),
                type_,
                not_null: false,
                comment,
            }));
            desired
        },
    )
}

proptest! {
    #[test]
    fn the_plan_of_an_applied_plan_is_empty(desired in any_desired(), observed in any_observed()) {
        if let Ok(first) = plan(&desired, &observed) {
            let mut after = observed.clone();
            for step in &first.steps {
                execute(step, &mut after);
            }
            let second = plan(&desired, &after).unwrap();
            prop_assert_eq!(second.steps, vec![]);
            prop_assert_eq!(second.kept, first.kept);
        }
    }

    #[test]
    fn no_plan_takes_anything_away(desired in any_desired(), observed in any_observed()) {
        let steps = plan(&desired, &observed).map(|plan| plan.steps).unwrap_or_default();
        for statement in steps.iter().flat_map(SchemaChange::statements) {
            let upper = statement.to_uppercase();
            // The keys of the system tables are replaced by keys with the cluster.
            let upper = upper.replace("DROP CONSTRAINT IF EXISTS", "").replace("DROP INDEX \"PUBLIC\".\"KEY_2\"", "");
            prop_assert!(!upper.contains("DROP") && !upper.contains("DELETE") && !upper.contains("TRUNCATE") && !upper.contains(" TYPE "));
        }
    }
}
