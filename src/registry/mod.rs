//! The device registry in the database: the operator fills it, workers follow it.
