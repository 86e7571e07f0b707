//! Messages on their way into the database, gathered into transactions.

pub mod rows;
