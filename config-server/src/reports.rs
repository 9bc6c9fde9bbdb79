//! What parts reported last, as it came or was read: so that a look at the fleet need not read megabytes of JSON again.
//!
//! Consistency: the store says when a part was last heard of, and only a report of that very moment counts; any other is read
//! from the store. So of several config servers each may keep its own, and what is here can be lost at any time.

use std::collections::HashMap;
use std::sync::Arc;

use block::GroupId;
use control::fleet::{PartReport, UnixMillis};
use control::{AgentReport, ProcessGroup, ProcessServerStatus, TargetGroup, TargetServerStatus};
use parking_lot::Mutex;
use sqlx::{AnyPool, Row};

use crate::fault::{Answer, internal};

/// Reports that are read from the store with one statement.
const READ_AT_ONCE: usize = 200;

/// A server's status, with its groups by id.
#[derive(Debug)]
pub(crate) struct Served<S> {
    pub(crate) status: S,
    places: HashMap<GroupId, usize>,
}

impl Served<ProcessServerStatus> {
    pub(crate) fn group(&self, id: &GroupId) -> Option<&ProcessGroup> {
        self.status.groups.get(*self.places.get(id)?)
    }
}

impl Served<TargetServerStatus> {
    pub(crate) fn group(&self, id: &GroupId) -> Option<&TargetGroup> {
        self.status.groups.get(*self.places.get(id)?)
    }
}

/// What a part reported.
#[derive(Debug)]
pub(crate) enum Report {
    /// Nothing yet.
    Nothing,
    Agent(Box<AgentReport>),
    ProcessServer(Served<ProcessServerStatus>),
    TargetServer(Served<TargetServerStatus>),
}

impl From<Option<PartReport>> for Report {
    fn from(report: Option<PartReport>) -> Report {
        match report {
            None => Report::Nothing,
            Some(PartReport::Agent(report)) => Report::Agent(report),
            Some(PartReport::ProcessServer(status)) => {
                let places =
                    status.groups.iter().enumerate().map(|(place, group)| (group.group, place)).collect();
                Report::ProcessServer(Served { status, places })
            }
            Some(PartReport::TargetServer(status)) => {
                let places =
                    status.groups.iter().enumerate().map(|(place, group)| (group.group, place)).collect();
                Report::TargetServer(Served { status, places })
            }
        }
    }
}

/// The last report of each part that was heard of or asked for.
#[derive(Debug, Default)]
pub(crate) struct Reports {
    known: Mutex<HashMap<String, (UnixMillis, Arc<Report>)>>,
}

impl Reports {
    /// What a part reported at this moment, which the store has as well.
    pub(crate) fn put(&self, part: String, seen: UnixMillis, report: Option<PartReport>) {
        let report = Arc::new(Report::from(report));
        self.known.lock().insert(part, (seen, report));
    }

    /// Parts that have not been heard of since are read again when somebody asks.
    pub(crate) fn forget_before(&self, time: UnixMillis) {
        self.known.lock().retain(|_, (seen, _)| *seen >= time);
    }

    /// What these parts reported when they were last heard of.
    pub(crate) async fn of(
        &self,
        from: &AnyPool,
        parts: impl Iterator<Item = (String, UnixMillis)>,
    ) -> Answer<HashMap<String, Arc<Report>>> {
        let (mut found, mut missing) = (HashMap::new(), Vec::new());
        {
            let known = self.known.lock();
            for (part, seen) in parts {
                match known.get(&part).filter(|(of, _)| *of == seen) {
                    Some((_, report)) => _ = found.insert(part, report.clone()),
                    None => missing.push(part),
                }
            }
        }
        for parts in missing.chunks(READ_AT_ONCE) {
            let places: Vec<String> = (1..=parts.len()).map(|place| format!("${place}")).collect();
            let sql = format!("SELECT id, seen, report FROM parts WHERE id IN ({})", places.join(", "));
            let mut query = sqlx::query(&sql);
            for part in parts {
                query = query.bind(part.as_str());
            }
            for row in &query.fetch_all(from).await? {
                let (part, text): (String, String) = (row.try_get("id")?, row.try_get("report")?);
                let report: Option<PartReport> = match text.is_empty() {
                    true => None,
                    false => Some(
                        serde_json::from_str(&text)
                            .map_err(|error| internal("read a part's report", error))?,
                    ),
                };
                let (seen, report) = (UnixMillis(row.try_get("seen")?), Arc::new(Report::from(report)));
                self.known.lock().insert(part.clone(), (seen, report.clone()));
                found.insert(part, report);
            }
        }
        Ok(found)
    }
}
