//! What of a wanted object is not in the live one: pure comparisons of JSON.

use serde_json::{Map, Value};

use crate::api::resources::ResourceQuantity;

/// Maps whose keys are the user's data: an extra key in the live object is a difference too. Elsewhere an extra key is a
/// default of the API server or another manager's field.
const EXACT_MAPS: [&str; 3] = ["data", "binaryData", "stringData"];

/// Whether `live` holds all that `wanted` says. Lists must have the same length, for each of ours is wholly ours; maps may
/// hold more, except for data.
#[must_use]
pub fn covers(wanted: &Value, live: &Value) -> bool {
    match (wanted, live) {
        (Value::Object(wanted), Value::Object(live)) => wanted.iter().all(|(key, value)| match live.get(key) {
            Some(found) => covers(value, found) && (!EXACT_MAPS.contains(&key.as_str()) || same_keys(value, found)),
            None => is_empty(value),
        }),
        (Value::Array(wanted), Value::Array(live)) => {
            wanted.len() == live.len() && wanted.iter().zip(live).all(|(wanted, live)| covers(wanted, live))
        }
        (wanted, live) => wanted == live || same_quantity(wanted, live),
    }
}

/// The API server rewrites quantities into their canonical form: `1024Mi` comes back as `1Gi`.
fn same_quantity(wanted: &Value, live: &Value) -> bool {
    let units = |value: &Value| value.as_str().filter(|text| text.starts_with(|c: char| c.is_ascii_digit())).and_then(milliunits);
    units(wanted).is_some_and(|wanted| units(live) == Some(wanted))
}

/// A quantity in thousandths, exact for the sizes that occur.
fn milliunits(text: &str) -> Option<i64> {
    match text.strip_suffix('m') {
        Some(number) => number.parse().ok(),
        None => ResourceQuantity::from(text).to_units()?.checked_mul(1000),
    }
}

fn same_keys(left: &Value, right: &Value) -> bool {
    match (left, right) {
        (Value::Object(left), Value::Object(right)) => left.len() == right.len(),
        _ => true,
    }
}

/// The API server leaves out what is empty.
fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Object(map) => map.values().all(is_empty),
        Value::Array(list) => list.is_empty(),
        _ => false,
    }
}

/// The JSON merge patch (RFC 7386) that turns `previous` into `wanted`, or `None` where they are equal.
#[must_use]
pub fn merge_patch(previous: &Value, wanted: &Value) -> Option<Value> {
    if previous == wanted {
        return None;
    }
    let (Value::Object(before), Value::Object(after)) = (previous, wanted) else {
        return Some(wanted.clone());
    };
    let mut patch = Map::new();
    for (key, value) in after {
        match before.get(key) {
            Some(found) => patch.extend(merge_patch(found, value).map(|value| (key.clone(), value))),
            None => {
                patch.insert(key.clone(), value.clone());
            }
        }
    }
    for key in before.keys().filter(|key| !after.contains_key(*key)) {
        patch.insert(key.clone(), Value::Null);
    }
    Some(Value::Object(patch))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    #[test]
    fn what_a_live_object_covers() {
        let wanted = json!({"metadata": {"labels": {"a": "1"}}, "data": {"k": "v"}, "spec": {"ports": [{"port": 1}]}});
        let cases = [
            ("equal", wanted.clone(), true),
            (
                "more labels",
                json!({"metadata": {"labels": {"a": "1", "b": "2"}}, "data": {"k": "v"}, "spec": {"ports": [{"port": 1}]}}),
                true,
            ),
            (
                "a default inside a list",
                json!({"metadata": {"labels": {"a": "1"}}, "data": {"k": "v"}, "spec": {"ports": [{"port": 1, "protocol": "TCP"}]}}),
                true,
            ),
            ("edited data", json!({"metadata": {"labels": {"a": "1"}}, "data": {"k": "x"}, "spec": {"ports": [{"port": 1}]}}), false),
            (
                "added data",
                json!({"metadata": {"labels": {"a": "1"}}, "data": {"k": "v", "l": "w"}, "spec": {"ports": [{"port": 1}]}}),
                false,
            ),
            ("a label gone", json!({"metadata": {}, "data": {"k": "v"}, "spec": {"ports": [{"port": 1}]}}), false),
            (
                "one more port",
                json!({"metadata": {"labels": {"a": "1"}}, "data": {"k": "v"}, "spec": {"ports": [{"port": 1}, {"port": 2}]}}),
                false,
            ),
        ];
        for (name, live, expected) in cases {
            assert_eq!(covers(&wanted, &live), expected, "{name}");
        }
    }

    #[test]
    fn empty_parts_need_not_be_there() {
        assert!(covers(&json!({"a": {}, "b": [], "c": null}), &json!({})));
        assert!(!covers(&json!({"a": {"b": 0}}), &json!({})));
    }

    #[test]
    fn quantities_are_compared_by_value() {
        for (wanted, live, expected) in
            [("1024Mi", "1Gi", true), ("1000m", "1", true), ("1Gi", "2Gi", false), ("0.5", "500m", false), ("plain", "plain text", false)]
        {
            assert_eq!(covers(&json!({"limits": {"x": wanted}}), &json!({"limits": {"x": live}})), expected, "{wanted} {live}");
        }
    }

    fn any_object() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![any::<bool>().prop_map(Value::from), any::<i32>().prop_map(Value::from), "[a-c]{0,3}".prop_map(Value::from)];
        let tree = leaf.prop_recursive(3, 24, 4, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::btree_map("[a-d]", inner, 0..4).prop_map(|map| Value::Object(map.into_iter().collect())),
            ]
        });
        prop::collection::btree_map("[a-d]", tree, 0..5).prop_map(|map| Value::Object(map.into_iter().collect()))
    }

    /// RFC 7386, section 2.
    fn apply(target: &mut Value, patch: &Value) {
        let Value::Object(patch) = patch else {
            *target = patch.clone();
            return;
        };
        if !target.is_object() {
            *target = json!({});
        }
        for (key, value) in patch {
            if value.is_null() {
                target.as_object_mut().unwrap().remove(key);
            } else {
                apply(target.as_object_mut().unwrap().entry(key.clone()).or_insert(Value::Null), value);
            }
        }
    }

    proptest! {
        #[test]
        fn a_merge_patch_leads_to_what_was_wanted(previous in any_object(), wanted in any_object()) {
            let mut result = previous.clone();
            if let Some(patch) = merge_patch(&previous, &wanted) {
                apply(&mut result, &patch);
            }
            prop_assert_eq!(result, wanted);
        }

        #[test]
        fn an_object_covers_itself(object in any_object()) {
            prop_assert!(covers(&object, &object));
        }
    }
}
