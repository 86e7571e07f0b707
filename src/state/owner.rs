//! The owner of rows and tables in a database.

/// The Pipeline that a table, its dead letters and its sessions belong to.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub struct Owner {
    /// Namespace of the Pipeline.
    pub namespace: String,
    /// Name of the Pipeline.
    pub pipeline: String,
}

impl Owner {
    /// The prefix of the names of its sessions in the database: `<namespace>/<pipeline>/`.
    #[must_use]
    pub fn sessions(&self) -> String {
        format!("{}/{}/", self.namespace, self.pipeline)
    }
}
