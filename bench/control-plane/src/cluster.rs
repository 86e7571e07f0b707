//! The cluster under test.

use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use k8s_openapi::api::core::v1::Namespace;
use kube::api::{Api, DeleteParams, ObjectMeta, PostParams};
use kube::{Client, Config};

/// Connection to the API server.
pub struct Cluster {
    /// Client of the API server.
    pub client: Client,
}

impl Cluster {
    /// Connects with KUBECONFIG.
    pub async fn connect() -> anyhow::Result<Self> {
        let config = Config::infer().await.context("no cluster: run.sh brings one up")?;
        Ok(Self { client: Client::try_from(config)? })
    }

    /// Creates a namespace.
    pub async fn create_namespace(&self, name: &str) -> anyhow::Result<()> {
        let metadata = ObjectMeta { name: Some(name.to_owned()), ..ObjectMeta::default() };
        Api::<Namespace>::all(self.client.clone())
            .create(&PostParams::default(), &Namespace { metadata, ..Namespace::default() })
            .await
            .context("the namespace of an earlier run is there: delete it")?;
        Ok(())
    }

    /// Deletes a namespace with its content.
    pub async fn delete_namespace(&self, name: &str) -> anyhow::Result<()> {
        let namespaces = Api::<Namespace>::all(self.client.clone());
        namespaces.delete(name, &DeleteParams::default()).await?;
        let deadline = Instant::now() + Duration::from_mins(20);
        while namespaces.get_opt(name).await?.is_some() {
            ensure!(Instant::now() < deadline, "namespace {name} does not go");
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        Ok(())
    }
}
