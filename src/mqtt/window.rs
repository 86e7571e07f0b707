//! The order of acknowledgements: in the order of arrival (MQTT 5.0, 4.6), only after a message is settled, and only on the connection
//! that delivered the message.

use std::collections::VecDeque;

/// The messages of one connection that are not acknowledged yet.
#[derive(Debug, Default)]
pub struct Window {
    epoch: u64,
    /// The sequence number of the first message.
    first: u64,
    waiting: VecDeque<Waiting>,
    /// Number of the waiting messages that are settled.
    settled: usize,
}

#[derive(Clone, Copy, Debug)]
struct Waiting {
    packet_id: u16,
    settled: bool,
}

/// The position of a message in the order of arrival of its connection.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Place {
    epoch: u64,
    sequence: u64,
}

impl Window {
    /// A message has arrived. A message with the packet identifier 0 (QoS 0) is not acknowledged.
    pub fn arrive(&mut self, packet_id: u16) -> Place {
        self.waiting.push_back(Waiting { packet_id, settled: false });
        Place { epoch: self.epoch, sequence: self.first + self.waiting.len() as u64 - 1 }
    }

    /// The message is committed. Has no effect for a message of an earlier connection: its packet identifier is not valid on this one,
    /// and the broker sends the message again.
    pub fn settle(&mut self, place: Place) {
        if place.epoch != self.epoch {
            return;
        }
        let index = place.sequence.checked_sub(self.first).and_then(|index| usize::try_from(index).ok());
        if let Some(waiting) = index.and_then(|index| self.waiting.get_mut(index)) {
            self.settled += usize::from(!waiting.settled);
            waiting.settled = true;
        }
    }

    /// The packet identifier of the first message, if that is settled.
    pub fn next_settled(&mut self) -> Option<u16> {
        while self.waiting.front()?.settled {
            let waiting = self.waiting.pop_front()?;
            self.first += 1;
            self.settled -= 1;
            if waiting.packet_id > 0 {
                return Some(waiting.packet_id);
            }
        }
        None
    }

    /// The connection has ended: none of its messages is acknowledged.
    pub fn reset(&mut self) {
        self.epoch += 1;
        self.first = 0;
        self.settled = 0;
        self.waiting.clear();
    }

    /// The number of unacknowledged messages.
    #[must_use]
    pub fn len(&self) -> usize {
        self.waiting.len()
    }

    /// The number of settled messages that wait for the acknowledgement of an earlier one.
    #[must_use]
    pub fn blocked(&self) -> usize {
        self.settled
    }

    /// Whether every message is acknowledged.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_message_of_an_earlier_connection_is_not_acknowledged() {
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
        /// For every order of settling, each message is acknowledged once, in the order of arrival, and after it is settled.
        #[test]
        fn settled_messages_are_acknowledged_in_order_of_arrival(count in 1_u16..60, order in prop::collection::vec(any::<prop::sample::Index>(), 0..120)) {
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
                prop_assert_eq!(window.blocked(), settled.iter().filter(|settled| **settled).count() - ready);
            }
        }

        /// Over any number of connections, an acknowledged message is settled, of this connection, and the first of it.
        #[test]
        fn no_acknowledgement_crosses_a_connection(steps in prop::collection::vec(step(), 0..200)) {
            let mut window = Window::default();
            let (mut arrived, mut places, mut current) = (0_u16, Vec::new(), VecDeque::new());
            for step in steps {
                match step {
                    WindowStep::Arrive => {
                        arrived += 1;
                        places.push((arrived, window.arrive(arrived)));
                        current.push_back((arrived, false));
                    }
                    WindowStep::Settle(index) if !places.is_empty() => {
                        let (id, place) = *index.get(&places);
                        window.settle(place);
                        current.iter_mut().filter(|(known, _)| *known == id).for_each(|(_, settled)| *settled = true);
                    }
                    WindowStep::Settle(_) => {}
                    WindowStep::Acknowledge => {
                        let expected = current.pop_front_if(|(_, settled)| *settled).map(|(id, _)| id);
                        prop_assert_eq!(window.next_settled(), expected);
                    }
                    WindowStep::Reset => {
                        window.reset();
                        current.clear();
                    }
                }
                prop_assert_eq!(window.len(), current.len());
            }
        }
    }

    #[derive(Clone, Debug)]
    enum WindowStep {
        Arrive,
        Settle(prop::sample::Index),
        Acknowledge,
        Reset,
    }

    fn step() -> impl Strategy<Value = WindowStep> {
        prop_oneof![
            4 => Just(WindowStep::Arrive),
            4 => any::<prop::sample::Index>().prop_map(WindowStep::Settle),
            4 => Just(WindowStep::Acknowledge),
            1 => Just(WindowStep::Reset),
        ]
    }
}
