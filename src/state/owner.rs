//! The owner of rows and tables in a database.

use tokio_postgres::types::{ToSql, Type};

/// A parameter of a statement.
pub type Parameter<'a> = (&'a (dyn ToSql + Sync), Type);

/// A namespace of a cluster. Clusters that share a database may have namespaces of the same name.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub struct ClusterNamespace {
    /// UID of the cluster's namespace `kube-system`, which identifies a cluster by convention
    /// (<https://opentelemetry.io/docs/specs/semconv/resource/k8s/#cluster>).
    pub cluster: String,
    /// Name of the namespace.
    pub namespace: String,
}

/// The Pipeline that a table, its dead letters and its sessions belong to.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub struct Owner {
    /// Identity of the cluster; see [`ClusterNamespace::cluster`].
    pub cluster: String,
    /// Namespace of the Pipeline.
    pub namespace: String,
    /// Name of the Pipeline.
    pub pipeline: String,
}

impl Owner {
    /// The condition that a row belongs to the owner, with [`Self::parameters`] as the first parameters of the statement.
    pub const CONDITION: &str = "cluster = $1 AND namespace = $2 AND pipeline = $3";

    /// The parameters of [`Self::CONDITION`].
    #[must_use]
    pub fn parameters(&self) -> [Parameter<'_>; 3] {
        [(&self.cluster, Type::TEXT), (&self.namespace, Type::TEXT), (&self.pipeline, Type::TEXT)]
    }

    /// The prefix of the names of its sessions in the database: `<namespace>/<pipeline>/`.
    #[must_use]
    pub fn sessions(&self) -> String {
        format!("{}/{}/", self.namespace, self.pipeline)
    }

    /// The namespace of the Pipeline.
    #[must_use]
    pub fn cluster_namespace(&self) -> ClusterNamespace {
        ClusterNamespace { cluster: self.cluster.clone(), namespace: self.namespace.clone() }
    }
}
