//! The first output: a hypertable of TimescaleDB.
//!
//! The operator's part brings the table to the desired schema (`schema`, `observe`, `plan`, `execute`). The worker's part writes batches
//! (`writers`): `transaction` stores one, in the format of a binary COPY (`copy`, a crate), with its dead letters (`dead_letters`,
//! `dead_letter_quota`); `fault` judges what the database refuses. `write_probe` proves beforehand that a write succeeds.

pub mod dead_letter_quota;
mod dead_letters;
pub mod execute;
mod fault;
pub mod observe;
pub mod plan;
mod rows;
pub mod schema;
pub mod statements;
pub mod target;
pub mod transaction;
pub mod write_probe;
pub mod writers;

pub use fleetwright_copy as copy;
