//! Talks to the process server: delivers what the outbox holds, in order, and takes its acknowledgements.
//!
//! Retries: as [`wire::Retry`] says. What the peer refuses for good is tried again at the slow intervals only, because a
//! person may mend it; the state names it meanwhile.

use std::sync::Arc;
use std::time::{Duration, Instant};

use block::{Epoch, UnixNanos};
use jiff::Timestamp;
use wire::{Credentials, Receipts, Retry, Role, Sender, WireError};

use crate::config::AgentConfig;
use crate::limits::{Pacer, Schedule};
use crate::outbox::{Entry, Mismatch, Outbox};
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
        ended = acknowledge(receipts, outbox) => ended,
        ended = way.run(held.held, outbox) => ended,
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
                    let sent = self.deliver(&entry).await;
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
        if self.schedule.bandwidth(Timestamp::now()).is_none() {
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
