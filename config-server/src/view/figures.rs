use control::metrics::{self, Values};

use super::overview;
use crate::fault::Answer;
use crate::store::Store;

/// The fleet's figures, for Prometheus.
pub(crate) async fn figures(store: &Store) -> Answer<Values> {
    let mut values = Values::default();
    values.process("config-server", env!("CARGO_PKG_VERSION"));
    let now = overview(store).await?;
    for (metric, count) in [
        (&metrics::MACHINES, now.machines),
        (&metrics::GROUPS, now.groups),
        (&metrics::RECOVERABLE, now.groups_recoverable),
        (&metrics::IN_TROUBLE, now.groups_in_trouble),
        (&metrics::SILENT, now.silent_parts),
        (&metrics::JOBS, now.jobs),
        (&metrics::APPROVALS, now.approvals),
    ] {
        values.add(metric, &[], count as f64);
    }
    for (kind, raised) in crate::alert::raised_by_kind(store).await? {
        values.add(&metrics::ALERTS, &[kind.as_str()], raised as f64);
    }
    if let Some(worst) = now.worst_rpo_ms {
        values.add(&metrics::WORST, &[], worst as f64 / 1000.0);
    }
    Ok(values)
}
