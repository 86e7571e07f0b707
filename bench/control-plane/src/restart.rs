//! Restart of the operator, which must write nothing for an unchanged fleet.

use std::time::Duration;

use fleetwright_e2e::audit::Mark;

use crate::fleet::Fleet;
use crate::operator::Operator;
use crate::report::{heading, row};

/// Time in which writes of the new pod are counted.
const AFTERWARDS: Duration = Duration::from_secs(30);

/// Deletes the operator's pod and counts the writes of the new one.
pub async fn measure(operator: &Operator, fleet: &Fleet<'_>) -> anyhow::Result<()> {
    heading("restart of the operator");
    let mark = Mark::now()?;
    let time = operator.restart().await?;
    operator.watched(tokio::time::sleep(AFTERWARDS)).await;
    row("until all is listed, and it is ready", &format!("{:.1} s", time.as_secs_f64()));
    row("writes", &mark.writes(fleet.namespace)?.len().to_string());
    row("memory", &format!("{:.0} MiB", operator.look().await?.mebibytes));
    Ok(())
}
