//! A part's life in the fleet: reporting, hearing what to do, keeping its certificate good, believing nobody who was revoked.

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use block::UnixNanos;
use control::fleet::{
    CheckIn, CheckInReply, Desired, Renew, Renewed, ResourceId, Task, TaskState, TaskUpdate, UnixMillis,
};
use tokio::sync::{mpsc, watch};
use wire::{Credentials, Serial, WebTrust, new_request, revoked_text};

use crate::EnrolError;
use crate::client::Client;
use crate::credentials::{CURRENT, install, revoke};
use crate::state::{
    ConfigServerSection, keep_desired, keep_revoked_version, kept_desired, kept_revoked_version,
};

/// How often the config server is asked, until it says otherwise.
pub const ASK_EVERY: Duration = Duration::from_secs(5);
/// The shortest and the longest interval that the config server may ask for.
const INTERVAL: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(60));
/// When a task has ended, others may follow at once.
const GATHER: Duration = Duration::from_millis(20);
/// A certificate is renewed when less than this part of its time is left: one third.
pub const RENEW_PART: u32 = 3;
/// The time of a certificate, as far as this side knows.
const CERTIFICATE_TIME: Duration = Duration::from_secs(90 * 86_400);
/// A renewal that fails is tried again after so long.
const RENEW_AGAIN: Duration = Duration::from_secs(60);
/// Tasks whose results wait to be reported.
const RESULTS_WAITING_MAX: usize = 64;

/// When a certificate is to be renewed. How long ago it was tried is not measured by the clock, which may have jumped since.
#[derive(Debug, Default)]
struct Renewal {
    tried: Option<Instant>,
}

impl Renewal {
    /// Whether it is to be tried now; counted as a try. Also a success is not repeated at once: with a clock far ahead each new
    /// certificate is old.
    fn is_due(&mut self, expires: UnixNanos, now: UnixNanos, instant: Instant) -> bool {
        let lately = self.tried.is_some_and(|tried| instant.saturating_duration_since(tried) < RENEW_AGAIN);
        let due = !lately && expires.since(now) < CERTIFICATE_TIME / RENEW_PART;
        if due {
            self.tried = Some(instant);
        }
        due
    }
}

/// What a part does for the fleet; the part's own crate says how.
pub trait Charge: Send + Sync + 'static {
    /// How it is, for the next check-in. The clock, the certificate and the tasks are filled in by the member.
    fn report(&self) -> CheckIn;
    /// Hears what the config server answered, besides what the member itself does with it.
    fn hear(&self, _reply: &CheckInReply) {}
    /// Begins what was asked for, and says through `done` what became of it. Told again until then, also after a restart; the
    /// same task twice must do no harm.
    fn begin(self: Arc<Self>, task: Task, done: TaskDone);
}

/// Says how a task goes.
#[derive(Clone, Debug)]
pub struct TaskDone {
    id: ResourceId,
    updates: mpsc::Sender<TaskUpdate>,
}

impl TaskDone {
    /// It goes on.
    pub async fn running(&self, message: impl Into<String>) {
        self.say(TaskState::Running, message.into(), serde_json::Value::Null).await;
    }

    /// It is done.
    pub async fn done(self, message: impl Into<String>, result: serde_json::Value) {
        self.say(TaskState::Done, message.into(), result).await;
    }

    /// It could not be done.
    pub async fn failed(self, message: impl Into<String>) {
        self.say(TaskState::Failed, message.into(), serde_json::Value::Null).await;
    }

    async fn say(&self, state: TaskState, message: String, result: serde_json::Value) {
        let mut message = message;
        if message.len() > 2000 {
            let end = (0..=1990).rev().find(|end| message.is_char_boundary(*end)).unwrap_or(0);
            message.truncate(end);
            message.push_str(" ...");
        }
        // When the member has ended nobody waits for it.
        let _ = self.updates.send(TaskUpdate { id: self.id.clone(), state, message, result }).await;
    }
}

/// A part of a fleet.
#[derive(Debug)]
pub struct Member {
    section: ConfigServerSection,
    desired: watch::Sender<Option<(String, Desired)>>,
    renewed: watch::Sender<u64>,
}

impl Member {
    /// Reads what was told last. Nothing is connected yet.
    ///
    /// # Errors
    /// When the part has not enrolled, or its files cannot be read.
    pub fn open(section: ConfigServerSection) -> Result<Member, EnrolError> {
        let credentials = section.state.join(CURRENT);
        if !credentials.exists() {
            return Err(EnrolError::Credentials(format!(
                "find the credentials in {}: there are none; enrol first, with a token of the config server",
                credentials.display()
            )));
        }
        let (desired, _) = watch::channel(kept_desired(&section.state)?);
        Ok(Member { section, desired, renewed: watch::channel(0).0 })
    }

    /// What is to be done, with its digest; changes when the config server says so.
    pub fn desired(&self) -> watch::Receiver<Option<(String, Desired)>> {
        self.desired.subscribe()
    }

    /// Grows when there are new credentials.
    pub fn renewed(&self) -> watch::Receiver<u64> {
        self.renewed.subscribe()
    }

    /// The directory of the credentials in use.
    pub fn credentials(&self) -> std::path::PathBuf {
        self.section.state.join(CURRENT)
    }

    /// Reports and hears, for ever. An absent config server is tried again at each interval, and said once.
    pub async fn run<C: Charge>(&self, charge: Arc<C>) {
        let (updates, mut results) = mpsc::channel::<TaskUpdate>(RESULTS_WAITING_MAX);
        let mut waiting: HashMap<ResourceId, TaskUpdate> = HashMap::new();
        let mut begun: HashSet<ResourceId> = HashSet::new();
        let mut connected: Option<(u64, Client)> = None;
        let mut reached = true;
        let mut renewal = Renewal::default();
        loop {
            while let Ok(update) = results.try_recv() {
                waiting.insert(update.id.clone(), update);
            }
            let asked = self.ask(&*charge, &mut connected, &waiting, &mut renewal).await;
            let interval = match asked {
                Ok(reply) => {
                    if !reached {
                        tracing::info!(server = %self.section.url, "the config server is reached again");
                        reached = true;
                    }
                    // What has been told need not be told again; what is not asked for any more has been taken.
                    waiting.clear();
                    self.take(&reply);
                    charge.hear(&reply);
                    begun.retain(|id| reply.tasks.iter().any(|task| task.id == *id));
                    for task in reply.tasks {
                        if begun.insert(task.id.clone()) {
                            let done = TaskDone { id: task.id.clone(), updates: updates.clone() };
                            charge.clone().begin(task, done);
                        }
                    }
                    Duration::from_millis(reply.interval_ms).clamp(INTERVAL.0, INTERVAL.1)
                }
                Err(error) => {
                    if reached {
                        let error = error.to_string();
                        tracing::warn!(error, "report to the config server; what it said last goes on");
                        reached = false;
                    }
                    connected = None;
                    ASK_EVERY
                }
            };
            // Half an interval either way, so that parts that were started together do not come together for ever.
            let jitter = interval.mul_f64(0.9 + 0.2 * fraction());
            tokio::select! {
                () = tokio::time::sleep(jitter) => {}
                Some(update) = results.recv() => {
                    waiting.insert(update.id.clone(), update);
                    tokio::time::sleep(GATHER).await;
                }
            }
        }
    }

    async fn ask<C: Charge>(
        &self,
        charge: &C,
        connected: &mut Option<(u64, Client)>,
        waiting: &HashMap<ResourceId, TaskUpdate>,
        renewal: &mut Renewal,
    ) -> Result<CheckInReply, EnrolError> {
        let generation = *self.renewed.borrow();
        if connected.as_ref().is_none_or(|(of, _)| *of != generation) {
            *connected = Some((generation, self.connect()?));
        }
        let Some((_, client)) = connected else {
            return Err(EnrolError::Credentials("connect to the config server".into()));
        };
        let credentials = self.load()?;
        if renewal.is_due(credentials.expires(), UnixNanos::now(), Instant::now())
            && let Err(error) = self.renew(client).await
        {
            let error = error.to_string();
            tracing::error!(error, "renew the certificate; tried again");
        }
        let mut said = charge.report();
        said.time = UnixMillis::now();
        said.certificate_expires = credentials.expires().into();
        said.revoked_version = kept_revoked_version(&self.section.state);
        said.tasks = waiting.values().take(control::fleet::TASKS_MAX).cloned().collect();
        said.shorten();
        client.post("/part/check-in", &said).await
    }

    fn load(&self) -> Result<Credentials, EnrolError> {
        Credentials::load(&self.credentials()).map_err(|error| EnrolError::Credentials(error.to_string()))
    }

    fn connect(&self) -> Result<Client, EnrolError> {
        let authority = read(&self.credentials().join(wire::CA_FILE))?;
        Client::new(self.section.url.clone(), &WebTrust::Authority(authority), Some(&self.load()?), None)
    }

    async fn renew(&self, client: &Client) -> Result<(), EnrolError> {
        let (key, request) = new_request().map_err(|error| EnrolError::Credentials(error.to_string()))?;
        let renewed: Renewed = client.post("/part/renew", &Renew { request }).await?;
        install(&self.section.state, &key, &renewed.certificate, &renewed.authority)?;
        tracing::info!(expires = renewed.expires.0, "the certificate was renewed");
        self.renewed.send_modify(|count| *count += 1);
        Ok(())
    }

    /// What was told is kept before it is acted on, so that a restart acts on it too.
    fn take(&self, reply: &CheckInReply) {
        if let Some(revoked) = &reply.revoked {
            let serials: Vec<Serial> =
                revoked.serials.iter().filter_map(|text| Serial::from_hex(text)).collect();
            // The list first: its number says that it is there.
            let kept = revoke(&self.section.state, &revoked_text(&serials))
                .and_then(|()| keep_revoked_version(&self.section.state, revoked.version));
            match kept {
                Ok(()) => tracing::info!(
                    certificates = serials.len(),
                    "certificates that are not believed any more"
                ),
                Err(error) => tracing::error!(%error, "keep the list of revoked certificates; tried again"),
            }
        }
        if let Some(desired) = &reply.desired {
            if let Err(error) = keep_desired(&self.section.state, &reply.digest, desired) {
                // Acted on all the same; a restart without the config server would not know of it.
                tracing::error!(%error, "keep what is to be done");
            }
            self.desired.send_replace(Some((reply.digest.clone(), desired.clone())));
        }
    }
}

fn read(path: &Path) -> Result<String, EnrolError> {
    std::fs::read_to_string(path).map_err(crate::error::file("read", path))
}

/// Between 0 and 1, different each time; nothing depends on how random it is.
fn fraction() -> f64 {
    let nanos = UnixNanos::now().0 ^ (u64::from(std::process::id()) << 20);
    f64::from(blake3::hash(&nanos.to_le_bytes()).as_bytes()[0]) / 255.0
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAY: Duration = Duration::from_secs(86_400);

    /// A clock that jumps neither keeps a certificate from being renewed nor has it renewed again and again.
    #[test]
    fn a_jumping_clock_makes_no_renewal_spin_or_wait() {
        let at = |days: u64| UnixNanos(days * DAY.as_nanos() as u64);
        let (expires, begun) = (at(1000 + 90), Instant::now());
        let mut renewal = Renewal::default();
        let mut tries = |day: u64, from: u64, seconds: u64, expires| {
            (from..from + seconds)
                .filter(|second| renewal.is_due(expires, at(day), begun + Duration::from_secs(*second)))
                .count()
        };
        assert_eq!(tries(1000, 0, 100, expires), 0);
        // A day ahead, a day back: as before.
        assert_eq!((tries(1001, 100, 100, expires), tries(999, 200, 100, expires)), (0, 0));
        // Years ahead, where every certificate is old: once in a while.
        assert_eq!(tries(9000, 1000, 600, expires), 10);
        // Tried while the clock was ahead; back again, and due: at once, not years later.
        assert_eq!(tries(1000 + 61, 1700, 1, expires), 1);
        assert_eq!(tries(1000 + 61, 1701, 60, expires), 1);
    }
}
