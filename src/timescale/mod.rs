//! The tables of a Pipeline: desired schema, the plan that leads to it, and its execution.
