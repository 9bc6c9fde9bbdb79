//! Talks to the process server: delivers what the outbox holds, in order, and takes its acknowledgements.
//!
//! Retries: as [`wire::Retry`] says. What the peer refuses for good is tried again at the slow intervals only, because a
//! person may mend it; the state names it meanwhile.

use std::sync::Arc;
use std::time::{Duration, Instant};

use block::{Epoch, UnixNanos};
use wire::{Credentials, Receipts, Retry, Role, Sender, WireError};

use crate::config::AgentConfig;
use crate::outbox::{Mismatch, Outbox};
use crate::report::Reports;

/// How often the process server is told how the agent is.
const REPORT_EVERY: Duration = Duration::from_millis(500);
/// The wait before a connection that was refused for good is tried again.
const REFUSED_WAIT: Duration = Duration::from_secs(60);

enum Ended {
    Wire(WireError),
    Mismatch(Mismatch),
}

impl From<WireError> for Ended {
    fn from(error: WireError) -> Ended {
        Ended::Wire(error)
    }
}

impl From<Mismatch> for Ended {
    fn from(mismatch: Mismatch) -> Ended {
        Ended::Mismatch(mismatch)
    }
}

/// Runs until aborted.
pub(crate) async fn run(
    config: AgentConfig,
    credentials: Credentials,
    outbox: Arc<Outbox>,
    reports: Arc<Reports>,
) {
    let began = Instant::now();
    let mut retry = Retry::new(UnixNanos::now().0);
    loop {
        let ended = session(&config, &credentials, &outbox, &reports, &mut retry).await;
        let wait = match ended {
            Ended::Wire(error) => {
                tracing::warn!(%error, "delivery interrupted");
                reports.disconnected(&error);
                let wait = retry.failed(began.elapsed());
                if error.is_retryable() { wait } else { wait.max(REFUSED_WAIT) }
            }
            Ended::Mismatch(mismatch) => {
                tracing::error!(%mismatch, "delivery stopped");
                reports.mismatched(&mismatch);
                REFUSED_WAIT
            }
        };
        tokio::time::sleep(wait).await;
    }
}

async fn session(
    config: &AgentConfig,
    credentials: &Credentials,
    outbox: &Outbox,
    reports: &Reports,
    retry: &mut Retry,
) -> Ended {
    let opened = async {
        let connection =
            wire::connect(&config.agent.process_server, Role::ProcessServer, credentials).await?;
        Sender::open(connection, config.agent.group, config.agent.generation).await
    };
    let (sender, receipts) = match opened.await {
        Ok(halves) => halves,
        Err(error) => return error.into(),
    };
    let held = sender.held();
    if let Err(mismatch) = outbox.opened(held) {
        return mismatch.into();
    }
    retry.succeeded();
    reports.connected();
    tracing::info!(server = config.agent.process_server, held = held.held.0, "delivering");
    // A refusal tells more than the broken connection that follows it, so receipts are looked at first.
    tokio::select! {
        biased;
        ended = acknowledge(receipts, outbox) => ended,
        ended = send(sender, held.held, outbox, reports) => ended,
    }
}

async fn acknowledge(mut receipts: Receipts, outbox: &Outbox) -> Ended {
    loop {
        match receipts.next().await {
            Ok(held) => {
                if let Err(mismatch) = outbox.acknowledge(held) {
                    return mismatch.into();
                }
            }
            Err(error) => return error.into(),
        }
    }
}

async fn send(mut sender: Sender, mut after: Epoch, outbox: &Outbox, reports: &Reports) -> Ended {
    let mut tick = tokio::time::interval(REPORT_EVERY);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
    loop {
        let sent = tokio::select! {
            entry = outbox.next(after) => {
                after = entry.epoch;
                let sent = sender.deliver(entry.epoch, entry.bytes, entry.pieces).await;
                if sent.is_ok() {
                    reports.sent(entry.bytes);
                }
                sent
            }
            _ = tick.tick() => match serde_json::to_string(&reports.latest()) {
                Ok(json) => sender.report(&json).await,
                Err(error) => {
                    tracing::error!(%error, "encode the status report");
                    Ok(())
                }
            },
        };
        if let Err(error) = sent {
            return error.into();
        }
    }
}
