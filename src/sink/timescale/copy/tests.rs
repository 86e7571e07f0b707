use proptest::prelude::*;

use super::*;

fn key(time: i64, device: i32) -> Key {
    Key { time: Time(time), device }
}

fn plain<'a>(values: &'a [Value<'a>]) -> Columns<'a> {
    Columns { values, ..Columns::default() }
}

/// Parses the data of a COPY: time, device, and the rest of each row.
fn parse(data: &[u8]) -> Vec<(i64, i32, Vec<u8>)> {
    let mut rest = data.strip_prefix(HEADER).unwrap();
    let mut rows = Vec::new();
    while rest != TRAILER {
        let columns = usize::from(u16::from_be_bytes(rest[..2].try_into().unwrap()));
        let mut position = 2;
        for _ in 0..columns {
            let length = i32::from_be_bytes(rest[position..position + 4].try_into().unwrap());
            position += 4 + usize::try_from(length).unwrap_or(0);
        }
        rows.push((
            i64::from_be_bytes(rest[6..14].try_into().unwrap()) + timestamptz::EPOCH.0,
            i32::from_be_bytes(rest[18..22].try_into().unwrap()),
            rest[22..position].to_vec(),
        ));
        rest = &rest[position..];
    }
    rows
}

fn data(rows: &Rows) -> Vec<u8> {
    rows.copy_data(0..rows.len()).flat_map(|piece| piece.to_vec()).collect()
}

#[test]
fn emptied_rows_contain_nothing() {
    let mut used = Rows::default();
    used.push(0, key(1, 2), plain(&[Value::Int64(1)]));
    let mut rows = used.emptied();
    assert!(rows.is_empty());
    rows.push(0, key(3, 4), plain(&[Value::Null]));
    assert_eq!(parse(&data(&rows)), [(3, 4, b"\xff\xff\xff\xff".to_vec())]);
}

#[test]
fn every_type_is_encoded() {
    let mut rows = Rows::default();
    let values = [
        Value::Null,
        Value::Float64(1.5),
        Value::Int64(-1),
        Value::Boolean(true),
        Value::Text("é".into()),
        Value::Timestamp(timestamptz::EPOCH.after(3)),
        Value::Json("[1]".into()),
    ];
    let columns = Columns { captures: &["berlin"], key: &values[..2], values: &values[2..] };
    rows.push(0, Key { time: timestamptz::EPOCH.after(1), device: 2 }, columns);
    let expected: &[&[u8]] = &[
        b"PGCOPY\n\xff\r\n\0\0\0\0\0\0\0\0\0",
        b"\0\x0a",
        b"\0\0\0\x08\0\0\0\0\0\0\0\x01",
        b"\0\0\0\x04\0\0\0\x02",
        b"\0\0\0\x06berlin",
        b"\xff\xff\xff\xff",
        b"\0\0\0\x08\x3f\xf8\0\0\0\0\0\0",
        b"\0\0\0\x08\xff\xff\xff\xff\xff\xff\xff\xff",
        b"\0\0\0\x01\x01",
        b"\0\0\0\x02\xc3\xa9",
        b"\0\0\0\x08\0\0\0\0\0\0\0\x03",
        b"\0\0\0\x04\x01[1]",
        b"\xff\xff",
    ];
    assert_eq!(data(&rows), expected.concat());
}

#[test]
fn the_first_row_of_a_key_is_kept() {
    let mut rows = Rows::default();
    for (message, time, value) in [(0, 2, 1.0), (1, 1, 1.0), (2, 2, 1.0), (3, 2, 2.0), (4, 1, 1.0)] {
        rows.push(message, key(time, 7), plain(&[Value::Float64(value)]));
    }
    let arranged = rows.arrange(OnConflict::DeadLetter);
    assert_eq!(arranged, Arranged { repeated: 2, ..Arranged::default() });
    assert_eq!(rows.contested(0..2).collect::<Vec<_>>(), [1]);
    assert_eq!((rows.message(0), rows.message(1), rows.len()), (Some(1), Some(0), 2));
    assert_eq!((rows.key(1), rows.key(2)), (Some(key(2, 7)), None));
}

#[test]
fn a_part_has_the_rows_of_its_messages() {
    let mut rows = Rows::default();
    for (message, time) in [(0, 3), (1, 2), (2, 4), (1, 1)] {
        rows.push(message, key(time, 7), Columns { captures: &["tag"], ..plain(&[Value::Int64(time)]) });
    }
    rows.arrange(OnConflict::DeadLetter);
    let part = rows.part(1..3);
    let mut expected = Rows::default();
    for (message, time) in [(0, 1), (0, 2), (1, 4)] {
        expected.push(message, key(time, 7), Columns { captures: &["tag"], ..plain(&[Value::Int64(time)]) });
    }
    assert_eq!(data(&part), data(&expected));
    assert_eq!((0..3).map(|row| part.message(row)).collect::<Vec<_>>(), [Some(0), Some(0), Some(1)]);
    assert!(rows.part(3..9).is_empty());
}

#[test]
fn truncated_rows_leave_no_bytes() {
    let mut rows = Rows::default();
    rows.push(0, key(1, 1), plain(&[Value::Int64(1)]));
    let before = data(&rows);
    rows.push(1, key(2, 1), plain(&[Value::Text("x".repeat(100).into())]));
    rows.truncate(1);
    assert_eq!(data(&rows), before);
    rows.truncate(0);
    assert_eq!((rows.size(), rows.is_empty()), (0, true));
}

/// Rows with these messages and values of the fields `a` and `b`, and the same key.
fn of_one_key(readings: &[(u32, Option<i64>, Option<i64>)]) -> Rows {
    let mut rows = Rows::default();
    let value = |value: Option<i64>| value.map_or(Value::Null, Value::Int64);
    for (message, a, b) in readings {
        rows.push(*message, key(1, 7), plain(&[value(*a), value(*b)]));
    }
    rows
}

#[test]
fn rows_of_one_key_are_merged() {
    use OnConflict::{DeadLetter, Keep, Replace};
    for (on_conflict, readings, expected, merged, repeated, resolved, is_contested) in [
        (DeadLetter, &[(0, Some(1), None), (1, None, Some(2))][..], (Some(1), Some(2)), 1, 0, 0, false),
        (DeadLetter, &[(0, Some(1), Some(2)), (1, None, Some(2)), (2, None, None)], (Some(1), Some(2)), 0, 2, 0, false),
        (DeadLetter, &[(0, Some(1), None), (1, Some(9), Some(2)), (2, None, Some(3))], (Some(1), Some(3)), 1, 0, 0, true),
        (Keep, &[(0, Some(1), None), (1, Some(9), Some(2)), (2, None, Some(3))], (Some(1), Some(2)), 1, 1, 2, false),
        (Replace, &[(0, Some(1), None), (1, Some(9), Some(2)), (2, None, Some(3))], (Some(9), Some(3)), 2, 0, 2, false),
    ] {
        let mut rows = of_one_key(readings);
        let arranged = rows.arrange(on_conflict);
        let counts = (arranged.merged, arranged.repeated, arranged.resolved, rows.contested(0..1).next().is_some());
        assert_eq!(counts, (merged, repeated, resolved, is_contested), "{on_conflict:?} {readings:?}");
        assert_eq!(data(&rows), data(&of_one_key(&[(0, expected.0, expected.1)])), "{on_conflict:?} {readings:?}");
    }
}

/// A batch that the database refuses is divided by message, and a merged row that contradicts a stored one is merged by message.
#[test]
fn merged_rows_can_be_divided_by_message() {
    let mut rows = of_one_key(&[(0, Some(1), None), (1, None, Some(2)), (2, Some(1), None), (3, Some(9), None)]);
    rows.arrange(OnConflict::DeadLetter);
    assert_eq!(rows.len(), 1);
    assert_eq!(rows.origins(0).iter().map(|row| row.message(0)).collect::<Vec<_>>(), [Some(0), Some(1), Some(2), Some(3)]);
    assert_eq!(data(&rows.origins(0)[1]), data(&of_one_key(&[(1, None, Some(2))])));
    assert_eq!(data(&rows.part(1..4)), data(&of_one_key(&[(0, None, Some(2)), (1, Some(1), None), (2, Some(9), None)])));
    assert_eq!(rows.count_by_message(&BTreeMap::from([(1, "refused"), (3, "refused")])), BTreeMap::from([(1, 1), (3, 1)]));
}

#[test]
fn captures_and_fields_of_the_key_distinguish_rows() {
    let mut rows = Rows::default();
    for (message, capture, axis) in [(0, "b", "x"), (1, "a", "y"), (2, "a", "x"), (3, "b", "x")] {
        let (captures, key_fields) = ([capture], [Value::Text(axis.into())]);
        rows.push(message, key(1, 7), Columns { captures: &captures, key: &key_fields, values: &[Value::Int64(1)] });
    }
    assert_eq!(rows.arrange(OnConflict::DeadLetter), Arranged { repeated: 1, ..Arranged::default() });
    assert_eq!((0..3).map(|row| rows.message(row)).collect::<Vec<_>>(), [Some(2), Some(1), Some(0)]);
}

#[test]
fn numbered_rows_end_with_their_position() {
    let mut rows = Rows::default();
    for time in [1, 2] {
        rows.push(0, key(time, 7), plain(&[Value::Null]));
    }
    let numbered: Vec<u8> = rows.numbered_copy_data(1..2).flat_map(|piece| piece.to_vec()).collect();
    assert_eq!(parse(&numbered), [(2, 7, b"\xff\xff\xff\xff\0\0\0\x04\0\0\0\x01".to_vec())]);
}

proptest! {
    /// Whatever comes in goes out once, sorted, whole, in pieces of any number.
    #[test]
    fn nothing_is_lost_doubled_or_reordered(
        arrivals in prop::collection::vec((0_i64..20, 0_i32..3, 0_i64..3, 0_usize..20_000), 0..40),
    ) {
        let mut rows = Rows::default();
        let mut first = std::collections::BTreeMap::new();
        let (mut repeated, mut conflicts) = (0, 0);
        for (message, (time, device, value, padding)) in arrivals.iter().enumerate() {
            let padding = "x".repeat(*padding);
            let values = [Value::Int64(*value), Value::Text(padding.as_str().into())];
            rows.push(u32::try_from(message).unwrap(), key(*time, *device), plain(&values));
            match first.entry((*time, *device)) {
                std::collections::btree_map::Entry::Vacant(entry) => drop(entry.insert((*value, padding))),
                std::collections::btree_map::Entry::Occupied(entry) if *entry.get() == (*value, padding) => repeated += 1,
                std::collections::btree_map::Entry::Occupied(_) => conflicts += 1,
            }
        }
        let arranged = rows.arrange(OnConflict::DeadLetter);
        prop_assert_eq!((arranged.repeated, rows.contested.is_empty()), (repeated, conflicts == 0));
        let parsed = parse(&data(&rows));
        let expected: Vec<_> = first.into_iter().map(|((time, device), (value, padding))| {
            let mut rest = Vec::new();
            for column in [&value.to_be_bytes()[..], padding.as_bytes()] {
                rest.extend_from_slice(&u32::try_from(column.len()).unwrap().to_be_bytes());
                rest.extend_from_slice(column);
            }
            (time, device, rest)
        }).collect();
        prop_assert_eq!(parsed, expected);
    }
}
