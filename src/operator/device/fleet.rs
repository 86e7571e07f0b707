//! The devices of all Gateways, as the operator knows them: what events change, and what follows from it. Pure.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// All devices.
#[derive(Debug, Default)]
pub struct Fleet {}

/// The devices, shared by the reconcilers. Locked for moments only, never across an await.
#[derive(Clone, Debug, Default)]
pub struct SharedFleet(Arc<Mutex<Fleet>>);

impl SharedFleet {
    /// The devices.
    pub fn lock(&self) -> MutexGuard<'_, Fleet> {
        // A panic elsewhere ends the process soon; until then a partly applied event is no worse than a missed one.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
