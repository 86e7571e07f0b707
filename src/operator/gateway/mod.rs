//! The reconciler of Gateways.
