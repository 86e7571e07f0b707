//! Connections to PostgreSQL, and the quoting of names and texts in SQL. Knows no table.

pub mod connect;
pub mod identifier;
pub mod uri;
