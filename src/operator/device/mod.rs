//! The reconciler of Devices.
