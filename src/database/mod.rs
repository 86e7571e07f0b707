//! Connections to PostgreSQL, their health, and the quoting of names and texts in SQL. Independent of all tables.

pub mod connect;
pub mod health;
pub mod identifier;
pub mod read_limits;
pub mod transport;
pub mod uri;
