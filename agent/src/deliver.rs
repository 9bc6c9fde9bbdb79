//! Talks to the process server: delivers what the outbox holds, in order, and takes its acknowledgements.
//!
//! Retries: as [`wire::Retry`] says; the state names the reason and the next try.

use std::sync::Arc;
use std::time::{Duration, Instant};

use block::{ByteCount, Epoch, Generation, UnixNanos};
use durable::fault_point;
use jiff::Timestamp;
use wire::{
    Credentials, FailureClass, LiveCredentials, Peers, Receipts, Retry, Role, Sender, WireError, Woken,
};

use crate::compare::Comparisons;
use crate::config::AgentConfig;
use crate::limits::{Pacer, Schedule};
use crate::outbox::{Entry, Mismatch, Outbox};
use crate::report::Reports;
use crate::resync::Resyncs;

/// How often the process server is told how the agent is.
const REPORT_EVERY: Duration = Duration::from_millis(500);

/// A larger changeset is sent in pieces, with reports in between: on a slow way it takes long.
const WHOLE_BYTES_MAX: ByteCount = ByteCount::mib(1);

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
    (credentials, peers): (Arc<LiveCredentials>, Peers),
    outbox: Arc<Outbox>,
    comparisons: Arc<Comparisons>,
    reports: Arc<Reports>,
) {
    let mut retry = Retry::new(&config.retry, &peers, &config.agent.process_server, UnixNanos::now().0);
    loop {
        let ended =
            session(&config, &credentials.current(), (&outbox, &comparisons.resyncs), &reports, &mut retry)
                .await;
        let pause = match ended {
            Ended::Wire(error) => {
                let pause = retry.failed(&error);
                tracing::warn!(%error, next_s = pause.wait.as_secs_f64(), "delivery interrupted");
                reports.disconnected(&error, pause.next_try());
                pause
            }
            Ended::Mismatch(mismatch) => {
                let pause = retry.refused(FailureClass::NonRecoverable);
                tracing::error!(%mismatch, "delivery stopped");
                reports.mismatched(&mismatch, pause.next_try());
                pause
            }
        };
        if retry.pause(pause, credentials.renewed()).await == Woken::Returned {
            tracing::info!("the process server is back");
        }
    }
}

async fn session(
    config: &AgentConfig,
    credentials: &Credentials,
    (outbox, resyncs): (&Outbox, &Resyncs),
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
    if sender.rebased() && outbox.is_behind(held) {
        // What it had acknowledged after that is in no replica. The agent begins anew after what the replicas hold.
        resyncs.rebase(held.held);
    }
    if sender.rebased() && config.agent.generation > Generation(1) {
        // It begins after a failover, which was somebody's decision.
        resyncs.at_once();
    }
    if let Err(mismatch) = outbox.opened(held) {
        return mismatch.into();
    }
    retry.succeeded();
    reports.connected();
    tracing::info!(server = config.agent.process_server, held = held.held.0, "delivering");
    let way = Way {
        sender,
        reports,
        reported: Instant::now() - REPORT_EVERY,
        schedule: Schedule::new(&config.limits),
        pacer: Pacer::new(Instant::now()),
    };
    // A refusal tells more than the broken connection that follows it, so receipts are looked at first.
    tokio::select! {
        biased;
        ended = acknowledge(receipts, outbox, resyncs) => ended,
        ended = way.run(held.held, outbox) => ended,
    }
}

async fn acknowledge(mut receipts: Receipts, outbox: &Outbox, resyncs: &Resyncs) -> Ended {
    let mut condition = receipts.condition();
    loop {
        let receipt = tokio::select! {
            receipt = receipts.next() => receipt,
            Ok(()) = condition.changed() => {
                if let Some(condition) = *condition.borrow_and_update() {
                    resyncs.conditioned(condition);
                }
                continue;
            }
        };
        match receipt {
            Ok(held) => {
                if let Err(mismatch) = outbox.acknowledge(held) {
                    return mismatch.into();
                }
            }
            Err(error) => return error.into(),
        }
    }
}

/// The sending half of a session.
struct Way<'a> {
    sender: Sender,
    reports: &'a Reports,
    reported: Instant,
    schedule: Schedule,
    pacer: Pacer,
}

impl Way<'_> {
    async fn run(mut self, mut after: Epoch, outbox: &Outbox) -> Ended {
        // Before anything else, so that nothing is known of this session without it.
        if let Err(error) = self.report().await {
            return error.into();
        }
        loop {
            let wait = REPORT_EVERY.saturating_sub(self.reported.elapsed());
            let sent = tokio::select! {
                entry = outbox.next(after) => {
                    after = entry.epoch;
                    fault_point("before-delivery");
                    let sent = self.deliver(&entry).await;
                    fault_point("after-delivery");
                    if sent.is_ok() {
                        self.reports.sent(entry.bytes);
                    }
                    sent
                }
                () = tokio::time::sleep(wait) => self.report().await,
            };
            if let Err(error) = sent {
                return error.into();
            }
        }
    }

    async fn report(&mut self) -> Result<(), WireError> {
        self.reported = Instant::now();
        match serde_json::to_string(&self.reports.latest()) {
            Ok(json) => self.sender.report(&json).await,
            Err(error) => {
                tracing::error!(%error, "encode the status report");
                Ok(())
            }
        }
    }

    /// Sends a changeset, no faster than the limit of the hour.
    async fn deliver(&mut self, entry: &Entry) -> Result<(), WireError> {
        if self.schedule.bandwidth(Timestamp::now()).is_none() && entry.bytes <= WHOLE_BYTES_MAX {
            return self.sender.deliver(entry.epoch, entry.bytes, entry.pieces.iter().cloned()).await;
        }
        self.sender.begin(entry.epoch, entry.bytes).await?;
        for piece in &entry.pieces {
            let mut piece = piece.clone();
            while !piece.is_empty() {
                // Asked again and again: the hour may change while a large one is sent.
                let rate = self.schedule.bandwidth(Timestamp::now());
                let slice = piece.split_to(rate.map_or(piece.len(), Pacer::slice).min(piece.len()));
                if let Some(rate) = rate {
                    tokio::time::sleep(self.pacer.wait(Instant::now(), slice.len(), rate)).await;
                }
                self.sender.data(slice).await?;
                if self.reported.elapsed() >= REPORT_EVERY {
                    self.report().await?;
                }
            }
        }
        self.sender.end().await
    }
}
