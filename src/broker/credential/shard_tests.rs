use std::cmp::Ordering;

use proptest::prelude::*;

use super::*;
use crate::api::device::{Access, Acl};
use crate::broker::credential::{KeyDigest, Password, hash};

fn entry(username: &str, topics: &[&str]) -> Entry {
    let password = Password::given(username.as_bytes()).unwrap();
    let acls: Vec<Acl> = topics.iter().map(|topic| Acl { topic: (*topic).to_owned(), access: Access::ReadWrite }).collect();
    Entry::new(username, &hash::hash("uid", username, &password, 1), &acls).unwrap()
}

fn usernames() -> impl Strategy<Value = Vec<String>> {
    prop::collection::hash_set("[a-z0-9]([-a-z0-9.]{0,8}[a-z0-9])?", 0..60).prop_map(|set| set.into_iter().collect())
}

fn powers() -> impl Strategy<Value = usize> {
    (0..7_u32).prop_map(|exponent| 1 << exponent)
}

#[test]
fn shards_are_balanced() {
    // Typical names of devices: a prefix and a number.
    for count in [2, 8, 64] {
        let mut sizes = vec![0_usize; count];
        for number in 0..count * 500 {
            sizes[shard_of(&format!("press-{number:05}"), count)] += 1;
        }
        let (least, most) = (sizes.iter().min().unwrap(), sizes.iter().max().unwrap());
        // Five standard deviations of a fair spread (√500 ≈ 22).
        assert!(*least > 390 && *most < 610, "{count} shards: {least} to {most}");
    }
}

#[test]
fn assignment_never_changes_between_versions() {
    // From SHA-256 of another program: `printf press-0001 | sha256sum` starts with 16.
    assert_eq!(["press-0001", "press-0002", "a.b"].map(|username| shard_of(username, 64)), [22, 61, 46]);
}

#[test]
fn the_number_of_shards_depends_on_the_number_of_users() {
    for (users, current, expected) in [
        (0, 0, 1),
        (512, 1, 1),
        (513, 1, 2),
        (1024, 2, 2),
        (1025, 2, 4),
        (15_000, 1, 32),
        (1_000_000, 1, MAX_SHARDS),
        (1_000_000, MAX_SHARDS * 4, MAX_SHARDS),
        (256, 2, 2),
        (255, 2, 1),
        (0, 64, 1),
        (600, 3, 4),
    ] {
        assert_eq!(shard_count(users, users * 125, current), expected, "{users} users, {current} shards");
    }
}

#[test]
fn the_number_of_shards_depends_on_their_size() {
    for (users, bytes, current, expected) in [
        (100, 250_000, 1, 1),
        (100, 250_001, 1, 2),
        (100, 8_400_000, 1, 64),
        (100, 1_000_000_000, 1, MAX_SHARDS),
        (100, 125_000, 2, 2),
        (100, 124_999, 2, 1),
        // Many users, although each is small.
        (1025, 10_000, 2, 4),
    ] {
        assert_eq!(shard_count(users, bytes, current), expected, "{bytes} bytes, {current} shards");
    }
}

/// A user with rules of this size.
fn large(username: &str, topics: usize) -> Entry {
    let acls: Vec<Acl> = (0..topics).map(|number| Acl { topic: format!("{number:0>256}"), access: Access::ReadWrite }).collect();
    Entry::new(username, &hash::hash("uid", username, &Password::given(b"secret").unwrap(), 1), &acls).unwrap()
}

#[test]
fn the_largest_users_of_a_full_shard_are_left_out() {
    let mut entries: Vec<Entry> = (0..110).map(|number| large(&format!("press-{number:03}"), 32)).collect();
    entries.extend((0..500).map(|number| large(&format!("small-{number:03}"), 0)));
    entries.push(large("_ingest_vibration", 32));
    let mut shard = Shard::new(1, entries.clone());
    let excess = shard.take_excess();
    assert!(!excess.is_empty() && excess.iter().all(|username| username.starts_with("press-")), "{excess:?}");
    assert!(shard.entries().len() + excess.len() == entries.len() && shard.entries().contains_key("_ingest_vibration"));
    let bytes: usize = shard.render().values().map(|value| value.0.len()).sum();
    assert!((MAX_SHARD_BYTES - 50_000..=MAX_SHARD_BYTES).contains(&bytes), "{bytes}");
    assert_eq!(shard.take_excess(), Vec::<String>::new());
    // The same users are left out again, so that a plan of the same Devices writes nothing.
    assert_eq!(Shard::new(1, entries).take_excess(), excess);
}

#[test]
fn shards_are_written_so_that_readers_always_see_all_users() {
    assert_eq!(write_order(0, 1), [0]);
    assert_eq!(write_order(1, 1), [0]);
    assert_eq!(write_order(2, 2), [1, 0]);
    assert_eq!(write_order(0, 2), [1, 0]);
    assert_eq!(write_order(1, 4), [1, 2, 3, 0]);
    assert_eq!(write_order(2, 4), [2, 3, 0, 1]);
    assert_eq!(write_order(4, 2), [1, 0]);
    assert_eq!(write_order(4, 1), [0]);
}

#[test]
fn users_may_have_a_password_a_certificate_or_both() {
    let key = KeyDigest::of(b"key");
    let acl = Acl { topic: "plant/#".to_owned(), access: Access::Read };
    let shard = Shard::new(
        1,
        [
            entry("press-1", &[]),
            entry("press-2", &["plant/#"]).with_certificate_key(key),
            Entry::by_certificate("press-3", key, &[acl]).unwrap(),
        ],
    );
    assert_eq!(Shard::parse(&shard.render()).unwrap(), shard);
    let without = Shard::new(1, [entry("press-1", &[])]);
    assert!(!without.render().contains_key(CERTIFICATE_KEYS_KEY));
    assert_ne!(revision(&shard.render()), revision(&without.render()));
}

#[test]
fn data_of_another_writer_is_refused() {
    let good = Shard::new(2, [entry("press-1", &["plant/#"])]).render();
    assert!(Shard::parse(&good).is_ok());
    let with = |key: &str, value: &str| {
        let mut data = good.clone();
        data.insert(key.to_owned(), ByteString(value.as_bytes().to_vec()));
        data
    };
    let passwords = String::from_utf8(good[PASSWORDS_KEY].0.clone()).unwrap();
    for bad in [
        Data::new(),
        with(COUNT_KEY, "3"),
        with(COUNT_KEY, "0"),
        with(COUNT_KEY, "128"),
        with(PASSWORDS_KEY, "press-1"),
        with(PASSWORDS_KEY, "press-1:plain"),
        with(CERTIFICATE_KEYS_KEY, "press-1:plain"),
        with(CERTIFICATE_KEYS_KEY, "press 2:\n"),
        with(PASSWORDS_KEY, &format!("{passwords}{passwords}")),
        with(ACLS_KEY, "topic read #\n"),
        with(ACLS_KEY, "user press-1\ntopic read $SYS/#\n"),
        with(ACLS_KEY, "user press-1\npattern readwrite #\n"),
        with(ACLS_KEY, "user press-2\ntopic read a\n"),
        with(ACLS_KEY, "user press-1\ntopic read a\nuser press-1\ntopic read b\n"),
    ] {
        let error = Shard::parse(&bad).unwrap_err();
        assert!(!error.to_string().contains("$7$"), "{error}");
    }
}

#[test]
fn the_revision_depends_on_the_content() {
    let shard = Shard::new(1, [entry("press-1", &[])]);
    let same = Shard::new(1, [entry("press-1", &[])]);
    assert_eq!(revision(&shard.render()), revision(&same.render()));
    for other in [Shard::new(2, [entry("press-1", &[])]), Shard::new(1, []), Shard::new(1, [entry("press-1", &["a"])])] {
        assert_ne!(revision(&shard.render()), revision(&other.render()));
    }
}

proptest! {
    #[test]
    fn every_user_is_in_exactly_one_shard(names in usernames(), count in powers()) {
        let shards = Shard::divide(count, names.iter().map(|name| entry(name, &[])));
        prop_assert_eq!(shards.len(), count);
        prop_assert_eq!(shards.iter().map(|shard| shard.entries().len()).sum::<usize>(), names.len());
        for name in &names {
            prop_assert!(shards[shard_of(name, count)].entries().contains_key(name));
        }
    }

    #[test]
    fn render_and_parse_are_inverse(names in usernames(), count in powers(), topics in prop::collection::vec("[a-zäß °%:]{1,4}(/[a-z+]){0,3}(/#)?", 0..4)) {
        let topics: Vec<&str> = topics.iter().map(|topic| topic.trim()).filter(|topic| !topic.is_empty()).collect();
        let valid: Vec<&str> = topics.into_iter().filter(|topic| acl::is_line(&format!("topic read {topic}"))).collect();
        let shard = Shard::new(count, names.iter().enumerate().map(|(index, name)| entry(name, if index % 2 == 0 { &valid } else { &[] })));
        let data = shard.render();
        let parsed = Shard::parse(&data).unwrap();
        prop_assert_eq!(parsed.render(), data);
        prop_assert_eq!(parsed, shard);
    }

    #[test]
    fn doubling_moves_users_only_to_new_shards(name in "[a-z0-9-]{1,20}", count in powers()) {
        let doubled = (count * 2).min(MAX_SHARDS);
        let (before, after) = (shard_of(&name, count), shard_of(&name, doubled));
        prop_assert!(after == before || after == before + count);
    }

    #[test]
    fn the_count_never_oscillates(users in 0..100_000_usize, current in 0..100_usize, change in -50_i32..50) {
        let bytes = |users: usize| users * 100;
        let count = shard_count(users, bytes(users), current);
        prop_assert!(count.is_power_of_two() && count <= MAX_SHARDS);
        prop_assert_eq!(shard_count(users, bytes(users), count), count);
        // After a change of the number, a few devices more or less never revert it.
        let (before, near) = (current.clamp(1, MAX_SHARDS).next_power_of_two(), users.saturating_add_signed(change as isize));
        match count.cmp(&before) {
            Ordering::Greater => prop_assert!(shard_count(near, bytes(near), count) >= count),
            Ordering::Less => prop_assert!(shard_count(near, bytes(near), count) <= count),
            Ordering::Equal => {}
        }
    }

    /// A reader that receives the writes of each shard with any delay sees all users, or detects that shards are missing.
    #[test]
    fn a_reader_sees_all_users_or_waits_while_the_number_of_shards_changes(
        names in usernames(), current in powers(), wanted in powers(), received in prop::collection::vec(any::<bool>(), MAX_SHARDS)
    ) {
        let divide = |count: usize| Shard::divide(count, names.iter().map(|name| entry(name, &[])));
        let (old, new) = (divide(current), divide(wanted));
        let deleted = wanted..current;
        let mut shards: BTreeMap<usize, Shard> = old.iter().cloned().enumerate().collect();
        let complete = |shards: &BTreeMap<usize, Shard>| assemble(shards).map(|users| users.len());
        for number in write_order(current, wanted) {
            shards.insert(number, new[number].clone());
            // A reader without delay always sees all users.
            prop_assert_eq!(complete(&shards), Ok(names.len()));
            // A reader that has not received some of the writes.
            let mut behind = shards.clone();
            for (number, _) in received.iter().enumerate().filter(|(_, received)| !**received) {
                match old.get(number) {
                    Some(shard) => behind.insert(number, shard.clone()),
                    None => behind.remove(&number),
                };
            }
            if let Ok(users) = complete(&behind) {
                prop_assert_eq!(users, names.len());
            }
        }
        for number in deleted {
            shards.remove(&number);
            prop_assert_eq!(complete(&shards), Ok(names.len()));
        }
    }
}
