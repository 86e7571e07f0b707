//! Which messages may be acknowledged: in the order of their arrival (MQTT 5.0, 4.6), once each is settled, and never on
//! another connection than the one they came by.

use std::collections::VecDeque;

/// The messages of one connection that are not acknowledged yet.
#[derive(Debug, Default)]
pub struct Window {
    epoch: u64,
    /// Sequence number of the front.
    first: u64,
    waiting: VecDeque<Waiting>,
}

#[derive(Clone, Copy, Debug)]
struct Waiting {
    packet_id: u16,
    settled: bool,
}

/// A message's place in the order of arrival, on one connection.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Place {
    epoch: u64,
    sequence: u64,
}

impl Window {
    /// A message has arrived. A packet identifier of 0 (QoS 0) holds its place and is never acknowledged.
    pub fn arrive(&mut self, packet_id: u16) -> Place {
        self.waiting.push_back(Waiting { packet_id, settled: false });
        Place { epoch: self.epoch, sequence: self.first + self.waiting.len() as u64 - 1 }
    }

    /// What the message said is committed. Nothing happens if it came by an earlier connection: that one's identifiers mean
    /// nothing on this one, and the broker sends the message again.
    pub fn settle(&mut self, place: Place) {
        if place.epoch != self.epoch {
            return;
        }
        let index = place.sequence.checked_sub(self.first).and_then(|index| usize::try_from(index).ok());
        if let Some(waiting) = index.and_then(|index| self.waiting.get_mut(index)) {
            waiting.settled = true;
        }
    }

    /// The next message to acknowledge, if the one that arrived first is settled.
    pub fn next_settled(&mut self) -> Option<u16> {
        while self.waiting.front()?.settled {
            let waiting = self.waiting.pop_front()?;
            self.first += 1;
            if waiting.packet_id > 0 {
                return Some(waiting.packet_id);
            }
        }
        None
    }

    /// The connection has ended: nothing of it will be acknowledged.
    pub fn reset(&mut self) {
        self.epoch += 1;
        self.first = 0;
        self.waiting.clear();
    }

    /// How many messages are not acknowledged.
    pub fn len(&self) -> usize {
        self.waiting.len()
    }

    /// Whether every message is acknowledged.
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn nothing_crosses_a_reconnect() {
        let mut window = Window::default();
        let before = window.arrive(7);
        window.reset();
        let after = window.arrive(8);
        window.settle(before);
        assert_eq!(window.next_settled(), None);
        window.settle(after);
        assert_eq!(window.next_settled(), Some(8));
        assert!(window.is_empty());
    }

    proptest! {
        /// Whatever the order in which messages settle, they are acknowledged in the order of arrival, each once, and none
        /// before it is settled.
        #[test]
        fn acknowledged_in_order(count in 1_u16..60, order in prop::collection::vec(any::<prop::sample::Index>(), 0..120)) {
            let mut window = Window::default();
            let places: Vec<Place> = (0..count).map(|id| window.arrive(id)).collect();
            let mut settled = vec![false; places.len()];
            let mut acknowledged = Vec::new();
            for index in order {
                let index = index.index(places.len());
                window.settle(places[index]);
                settled[index] = true;
                acknowledged.extend(std::iter::from_fn(|| window.next_settled()));
                let ready = settled.iter().take_while(|settled| **settled).count();
                let expected: Vec<u16> = (0..u16::try_from(ready).unwrap()).filter(|id| *id > 0).collect();
                prop_assert_eq!(&acknowledged, &expected);
            }
        }

        /// Over any number of connections: what is acknowledged was settled, came by this connection, and nothing before it waits.
        #[test]
        fn no_acknowledgement_crosses_a_connection(steps in prop::collection::vec(step(), 0..200)) {
            let mut window = Window::default();
            let (mut arrived, mut places, mut current) = (0_u16, Vec::new(), VecDeque::new());
            for step in steps {
                match step {
                    Step::Arrive => {
                        arrived += 1;
                        places.push((arrived, window.arrive(arrived)));
                        current.push_back((arrived, false));
                    }
                    Step::Settle(index) if !places.is_empty() => {
                        let (id, place) = *index.get(&places);
                        window.settle(place);
                        current.iter_mut().filter(|(known, _)| *known == id).for_each(|(_, settled)| *settled = true);
                    }
                    Step::Settle(_) => {}
                    Step::Acknowledge => {
                        let expected = current.pop_front_if(|(_, settled)| *settled).map(|(id, _)| id);
                        prop_assert_eq!(window.next_settled(), expected);
                    }
                    Step::Reset => {
                        window.reset();
                        current.clear();
                    }
                }
                prop_assert_eq!(window.len(), current.len());
            }
        }
    }

    #[derive(Clone, Debug)]
    enum Step {
        Arrive,
        Settle(prop::sample::Index),
        Acknowledge,
        Reset,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => Just(Step::Arrive),
            4 => any::<prop::sample::Index>().prop_map(Step::Settle),
            4 => Just(Step::Acknowledge),
            1 => Just(Step::Reset),
        ]
    }
}
