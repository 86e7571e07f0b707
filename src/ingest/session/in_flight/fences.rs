//! Acknowledgements, and the PINGREQs whose answers prove that the broker has processed them.

use super::InFlight;
use crate::state::redelivery::Acknowledged;

/// A PINGREQ, and what its answer proves.
#[derive(Debug)]
pub enum Fence {
    /// The first PINGREQ of a connection: before its answer, most brokers have sent all unacknowledged messages again.
    Login,
    /// The broker has processed these acknowledgements before the answer.
    Acknowledged(Vec<Acknowledged>),
    /// The same. The login was so long ago that every broker has sent all unacknowledged messages again.
    Regular(Vec<Acknowledged>),
}

impl InFlight {
    /// The next message to acknowledge.
    pub fn next_acknowledgement(&mut self) -> Option<u16> {
        let packet_id = self.window.next_settled()?;
        self.acknowledged.extend(self.redelivery.acknowledge(packet_id));
        Some(packet_id)
    }

    /// Whether a PINGREQ should follow the acknowledgements.
    pub fn wants_fence(&self) -> bool {
        !self.acknowledged.is_empty()
    }

    /// A PINGREQ is sent after acknowledgements.
    pub fn fence(&mut self) {
        self.fences.push_back(Fence::Acknowledged(std::mem::take(&mut self.acknowledged)));
    }

    /// A keep alive PINGREQ is sent, some seconds after the login or the previous one.
    pub fn regular_fence(&mut self) {
        self.fences.push_back(Fence::Regular(std::mem::take(&mut self.acknowledged)));
    }

    /// A PINGREQ is answered: the broker has processed the packets before it.
    pub fn fence_answered(&mut self) {
        match self.fences.pop_front() {
            Some(Fence::Login) => self.redelivery.expect_marked(),
            Some(Fence::Acknowledged(acknowledged)) => self.confirm(acknowledged),
            Some(Fence::Regular(acknowledged)) => {
                self.confirm(acknowledged);
                self.redelivery.end_resending();
            }
            None => {}
        }
    }

    fn confirm(&mut self, acknowledged: Vec<Acknowledged>) {
        for acknowledged in acknowledged {
            self.redelivery.confirm(acknowledged);
        }
    }
}
