use std::collections::{HashMap, HashSet};

use proptest::prelude::*;

use super::*;

const INTERVAL: Duration = Duration::from_secs(5);

fn seconds(seconds: f64) -> Duration {
    Duration::from_secs_f64(seconds)
}

fn limited(per_second: f64, burst_seconds: f64) -> Limits {
    Limits { rate: Some(Rate { per_second, burst_seconds }), ..Limits::default() }
}

/// Takes all items that may leave the queue, and finishes each.
fn drain<V>(queue: &mut RateLimitedQueue<&'static str, V>, now: Instant) -> Vec<(&'static str, V)> {
    let mut taken = Vec::new();
    while let Some((key, value)) = queue.pop(now) {
        queue.done(&key, now);
        taken.push((key, value));
    }
    taken
}

fn keys(queue: &mut RateLimitedQueue<&'static str>, now: Instant) -> Vec<&'static str> {
    drain(queue, now).into_iter().map(|(key, ())| key).collect()
}

#[test]
fn a_key_is_queued_once_and_never_in_progress_twice() {
    let now = Instant::now();
    let mut queue = RateLimitedQueue::new(Limits::default(), now);
    queue.insert("a", 1, now, now);
    queue.insert("a", 2, now, now);
    assert_eq!(queue.pop(now), Some(("a", 2)));
    queue.insert("a", 3, now, now);
    assert_eq!((queue.pop(now), queue.ready(), queue.in_progress()), (None, 0, 1));
    queue.done(&"a", now);
    assert_eq!(queue.pop(now), Some(("a", 3)), "it was queued while it was in progress");
    queue.done(&"a", now);
    assert_eq!(queue.pop(now), None);
}

#[test]
fn groups_share_the_queue_whatever_their_backlog() {
    let now = Instant::now();
    let mut queue = RateLimitedQueue::shared_by_groups(Limits::default(), now, |key: &(u64, u32)| key.0);
    let pop = |queue: &mut RateLimitedQueue<(u64, u32)>| {
        let (key, ()) = queue.pop(now).unwrap();
        queue.done(&key, now);
        key
    };
    for number in 0..1_000 {
        queue.insert((1, number), (), now, now);
    }
    let first: Vec<_> = (0..10).map(|_| pop(&mut queue)).collect();
    assert_eq!(first, (0..10).map(|number| (1, number)).collect::<Vec<_>>(), "one group alone: oldest first");
    for number in 0..3 {
        queue.insert((2, number), (), now, now);
    }
    let next: Vec<_> = (0..6).map(|_| pop(&mut queue)).collect();
    assert_eq!(next, [(1, 10), (2, 0), (1, 11), (2, 1), (1, 12), (2, 2)]);
    queue.insert((3, 0), (), now, now);
    assert!((0..2).any(|_| pop(&mut queue) == (3, 0)), "a single new item waits for one item of the backlog");
    assert_eq!((0..986).map(|_| pop(&mut queue)).last(), Some((1, 999)));
    assert!(queue.pop(now).is_none() && queue.tags.is_empty());
}

#[test]
fn retry_delays_grow_until_a_success() {
    let now = Instant::now();
    let mut queue = RateLimitedQueue::new(Limits::default(), now);
    let mut at = now;
    let mut last = Duration::ZERO;
    queue.insert("a", (), now, now);
    for number in 1..=20 {
        assert!(queue.pop(at).is_some());
        assert_eq!(queue.failed(&"a", (), at, 1.0), number);
        let delay = queue.next_due().unwrap() - at;
        assert!(delay >= last && delay <= MAX_RETRY_DELAY);
        (last, at) = (delay, at + delay);
    }
    assert_eq!(last, MAX_RETRY_DELAY);
    assert_eq!(keys(&mut queue, at), ["a"]);
    queue.insert("a", (), at, at);
    queue.pop(at);
    queue.failed(&"a", (), at, 1.0);
    assert_eq!(queue.next_due(), Some(at + INITIAL_RETRY_DELAY));
}

#[test]
fn insert_keeps_the_earlier_time_and_postpone_replaces_it() {
    let now = Instant::now();
    let at = |second: u32| now + seconds(second.into());
    let mut queue = RateLimitedQueue::new(Limits::default(), now);
    for (second, expected) in [(5, 5), (9, 5), (2, 2)] {
        queue.insert("a", (), at(second), now);
        assert_eq!(queue.next_due(), Some(at(expected)));
    }
    queue.postpone("a", (), at(7), now);
    assert_eq!(queue.next_due(), Some(at(7)));
    assert_eq!(keys(&mut queue, at(7)), ["a"]);
    assert_eq!(queue.next_due(), None);
}

#[test]
fn postponing_ends_at_the_maximum_delay() {
    let start = Instant::now();
    let mut queue = RateLimitedQueue::new(Limits { max_delay: Some(Duration::from_mins(10)), ..Limits::default() }, start);
    for second in 0..590 {
        let now = start + seconds(second.into());
        queue.postpone("a", (), now + seconds(30.0), now);
        assert!(keys(&mut queue, now).is_empty());
    }
    assert_eq!((queue.ready(), queue.delayed()), (0, 1));
    assert_eq!(keys(&mut queue, start + Duration::from_mins(10)), ["a"]);
    queue.postpone("b", (), start + seconds(30.0), start);
    queue.remove(&"b");
    assert_eq!(queue.next_due(), None);
}

#[test]
fn the_first_value_leaves_at_once_and_the_latest_after_the_interval() {
    let start = Instant::now();
    let mut queue = RateLimitedQueue::new(Limits { min_interval: INTERVAL, ..limited(100.0, 1.0) }, start);
    queue.insert("a", 1, start, start);
    assert_eq!(drain(&mut queue, start), [("a", 1)]);
    for value in 2..10 {
        queue.insert("a", value, start + seconds(1.0), start + seconds(1.0));
    }
    assert!(queue.contains(&"a"));
    assert_eq!(queue.next_due(), Some(start + INTERVAL));
    assert!(drain(&mut queue, start + seconds(4.0)).is_empty());
    assert_eq!(drain(&mut queue, start + INTERVAL), [("a", 9)]);
    queue.advance(start + INTERVAL * 2);
    assert!(queue.last.is_empty() && queue.last_order.is_empty(), "expired times are forgotten");
}

#[test]
fn the_rate_limits_all_keys_together_in_order_of_arrival() {
    let start = Instant::now();
    let mut queue = RateLimitedQueue::new(limited(2.0, 1.0), start);
    for key in ["a", "b", "c", "d", "e"] {
        queue.insert(key, (), start, start);
    }
    assert_eq!(keys(&mut queue, start), ["a", "b"]);
    assert_eq!(queue.next_due(), Some(start + seconds(0.5)));
    assert_eq!(keys(&mut queue, start + seconds(0.5)), ["c"]);
    assert_eq!(keys(&mut queue, start + seconds(60.0)), ["d", "e"], "no more than the burst accumulates");
}

#[test]
fn the_newest_and_the_oldest_item_alternate() {
    let start = Instant::now();
    let mut queue = RateLimitedQueue::new(Limits { order: Order::Alternate, ..limited(2.0, 2.0) }, start);
    for (number, key) in ["a", "b", "c", "d", "e", "f", "g"].into_iter().enumerate() {
        let now = start + Duration::from_millis(number as u64);
        queue.insert(key, (), now, now);
    }
    let now = start + Duration::from_millis(10);
    assert_eq!(keys(&mut queue, now), ["g", "a", "f", "b"], "the burst");
    assert_eq!((queue.ready(), queue.oldest(now)), (3, Duration::from_millis(8)));
    assert!(keys(&mut queue, now + seconds(0.4)).is_empty());
    let due = queue.next_due().unwrap();
    assert_eq!(keys(&mut queue, due), ["e"]);
    assert_eq!(keys(&mut queue, now + seconds(60.0)), ["c", "d"]);
}

#[test]
fn a_skipped_item_does_not_count_for_the_limits() {
    let start = Instant::now();
    let mut queue = RateLimitedQueue::new(Limits { min_interval: INTERVAL, ..limited(1.0, 1.0) }, start);
    for key in ["a", "b"] {
        queue.insert(key, 0, start, start);
        assert_eq!(queue.pop(start), Some((key, 0)));
        queue.skip(&key, start);
    }
    queue.insert("a", 1, start, start);
    assert_eq!(drain(&mut queue, start), [("a", 1)]);
    queue.insert("b", 1, start, start);
    assert_eq!(drain(&mut queue, start), []);
}

/// An operation on the queue, and its delay in milliseconds.
#[derive(Clone, Copy, Debug)]
enum Event {
    Insert { delay: u64 },
    Postpone { delay: u64 },
    Remove,
    Pop,
    Done,
    Failed,
}

fn events() -> impl Strategy<Value = Vec<(u64, u8, Event)>> {
    let event = prop_oneof![
        4 => (0..3_000_u64).prop_map(|delay| Event::Insert { delay: delay.saturating_sub(1_500) }),
        2 => (0..2_000_u64).prop_map(|delay| Event::Postpone { delay }),
        1 => Just(Event::Remove),
        6 => Just(Event::Pop),
        3 => Just(Event::Done),
        1 => Just(Event::Failed),
    ];
    prop::collection::vec((0..400_u64, 0..6_u8, event), 1..300)
}

proptest! {
    /// For any sequence of events: no key is in progress twice, no item leaves early, the limits hold, the counts are right, and
    /// in the end each queued key leaves once with its latest value.
    #[test]
    fn limits_hold_and_no_item_is_lost(events in events(), alternate: bool, limit: bool, interval: bool) {
        let start = Instant::now();
        let rate = limit.then_some(Rate { per_second: 4.0, burst_seconds: 0.5 });
        let min_interval = if interval { Duration::from_millis(700) } else { Duration::ZERO };
        let order = if alternate { Order::Alternate } else { Order::OldestFirst };
        let mut queue = RateLimitedQueue::new(Limits { rate, min_interval, max_delay: Some(seconds(2.0)), order }, start);
        let (mut now, mut value) = (start, 0_u32);
        // The latest value of each queued key, and the time before which it must not leave.
        let mut queued = HashMap::<u8, (u32, Instant)>::new();
        let mut in_progress = HashMap::<u8, u32>::new();
        let mut left = Vec::<(Instant, u8)>::new();
        for (wait, key, event) in events {
            now += Duration::from_millis(wait);
            queue.advance(now);
            value += 1;
            match event {
                Event::Insert { delay } | Event::Postpone { delay } => {
                    let at = now + Duration::from_millis(delay);
                    let earliest = queued.get(&key).map_or(at, |(_, earliest)| at.min(*earliest));
                    queued.insert(key, (value, earliest));
                    if matches!(event, Event::Insert { .. }) { queue.insert(key, value, at, now) } else { queue.postpone(key, value, at, now) }
                }
                Event::Remove if !in_progress.contains_key(&key) => {
                    queue.remove(&key);
                    queued.remove(&key);
                }
                Event::Pop => if let Some((key, value)) = queue.pop(now) {
                    let (latest, earliest) = queued.remove(&key).expect("queued");
                    prop_assert_eq!(value, latest);
                    prop_assert!(earliest <= now, "left before its time");
                    prop_assert!(in_progress.insert(key, value).is_none(), "in progress twice");
                    left.push((now, key));
                },
                Event::Done => if in_progress.remove(&key).is_some() {
                    queue.done(&key, now);
                },
                Event::Failed => if let Some(old) = in_progress.remove(&key) {
                    queue.failed(&key, old, now, 1.0);
                    // A retry may be earlier than the time for which the key was queued meanwhile.
                    queued.entry(key).and_modify(|(_, earliest)| *earliest = now).or_insert((old, now));
                },
                Event::Remove => {}
            }
            prop_assert_eq!(queue.in_progress(), in_progress.len());
            prop_assert!(queue.ready() + queue.delayed() <= queued.len());
        }
        for (key, _) in in_progress {
            queue.done(&key, now);
        }
        let mut expected: HashSet<(u8, u32)> = queued.into_iter().map(|(key, (value, _))| (key, value)).collect();
        while !expected.is_empty() {
            while let Some((key, value)) = queue.pop(now) {
                prop_assert!(expected.remove(&(key, value)), "{} left with {}", key, value);
                queue.done(&key, now);
                left.push((now, key));
            }
            match queue.next_due() {
                Some(due) => now = due.max(now + Duration::from_nanos(1)),
                None => prop_assert!(expected.is_empty(), "lost: {:?}", expected),
            }
        }
        prop_assert_eq!((queue.ready(), queue.delayed(), queue.next_due()), (0, 0, None));
        for (number, (from, key)) in left.iter().enumerate() {
            let later = &left[number + 1..];
            if let Some((next, _)) = later.iter().find(|(_, other)| other == key) {
                prop_assert!(*next - *from >= min_interval, "{:?} between two items of a key", *next - *from);
            }
            for (count, (to, _)) in (2_u32..).zip(later).filter(|_| limit) {
                let allowed = 2.0 + 4.0 * (*to - *from).as_secs_f64();
                prop_assert!(f64::from(count) <= allowed + 1e-3, "{} items in {:?}", count, *to - *from);
            }
        }
    }
}
