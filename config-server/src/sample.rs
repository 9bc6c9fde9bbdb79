//! Figures for charts: of each stretch of time the first that come, of agents what they write and send, of targets how old the
//! newest point is. Those of one transaction of check-ins are written with few statements: a target tells of every group.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use block::{ByteCount, GroupId};
use control::fleet::{PartReport, UnixMillis};
use control::{AgentReport, TargetServerStatus};

use crate::fault::Answer;
use crate::store::Act;

/// Distances between figures for charts, in seconds, and how long they are kept.
pub const SAMPLE_STEPS: [(i64, Duration); 2] =
    [(30, Duration::from_secs(6 * 3600)), (600, Duration::from_secs(90 * 86_400))];
/// Rows of one statement.
const ROWS_AT_ONCE: usize = 250;

/// Which stretches already have figures: by part (and group, where a part tells of several) and step.
pub(crate) type Slots = HashMap<(String, i64), i64>;
/// Group, step, slot. In order, so that several config servers lock rows in the same order.
type Key = (String, i64, i64);

/// The figures of one transaction.
pub(crate) struct Samples<'a> {
    slots: &'a Slots,
    now: UnixMillis,
    taken: Vec<((String, i64), i64)>,
    /// What agents told: age unknown, churn, sent, dirty, unsent.
    agents: BTreeMap<Key, [i64; 5]>,
    /// What targets told: age, and nothing else.
    ages: BTreeMap<Key, [i64; 5]>,
}

impl<'a> Samples<'a> {
    pub(crate) fn new(slots: &'a Slots, now: UnixMillis) -> Samples<'a> {
        Samples { slots, now, taken: Vec::new(), agents: BTreeMap::new(), ages: BTreeMap::new() }
    }

    /// What a part reported, if it is the first of a stretch; `group` is an agent's.
    pub(crate) fn take(&mut self, part: &str, group: Option<&str>, report: Option<&PartReport>) {
        for (step, _) in SAMPLE_STEPS {
            let slot = self.now.0.div_euclid(step * 1000);
            match (report, group) {
                (Some(PartReport::Agent(report)), Some(group)) => {
                    self.of_agent(part, group, step, slot, report)
                }
                (Some(PartReport::TargetServer(status)), _) => self.of_target(part, step, slot, status),
                _ => {}
            }
        }
    }

    fn is_first(&mut self, what: String, step: i64, slot: i64) -> bool {
        let key = (what, step);
        let first = self.slots.get(&key) != Some(&slot);
        if first {
            self.taken.push((key, slot));
        }
        first
    }

    fn of_agent(&mut self, part: &str, group: &str, step: i64, slot: i64, report: &AgentReport) {
        if !self.is_first(part.to_owned(), step, slot) {
            return;
        }
        let rate = |value: f64| value.max(0.0) as i64;
        let bytes = |value: ByteCount| i64::try_from(value.get()).unwrap_or(i64::MAX);
        let figures = [
            -1,
            rate(report.churn_bytes_per_s),
            rate(report.sent_bytes_per_s),
            bytes(report.remaining_bytes()),
            bytes(report.unsent_bytes),
        ];
        self.agents.insert((group.to_owned(), step, slot), figures);
    }

    fn of_target(&mut self, part: &str, step: i64, slot: i64, status: &TargetServerStatus) {
        for group in &status.groups {
            let Some(point) = &group.newest_point else { continue };
            let id: &GroupId = &group.group;
            if self.is_first(format!("{part} {id}"), step, slot) {
                let age = self.now.since(UnixMillis::from(point.cut_time)).max(0);
                self.ages.insert((id.to_string(), step, slot), [age, 0, 0, 0, 0]);
            }
        }
    }

    /// Writes them. What is given counts as taken when the transaction has ended well.
    pub(crate) async fn keep(self, act: &mut Act) -> Answer<Vec<((String, i64), i64)>> {
        let of_agents =
            "churn = excluded.churn, sent = excluded.sent, dirty = excluded.dirty, unsent = excluded.unsent";
        write(act, self.agents, of_agents).await?;
        write(act, self.ages, "rpo = excluded.rpo").await?;
        Ok(self.taken)
    }
}

async fn write(act: &mut Act, figures: BTreeMap<Key, [i64; 5]>, instead: &str) -> Answer<()> {
    let rows: Vec<(Key, [i64; 5])> = figures.into_iter().collect();
    for rows in rows.chunks(ROWS_AT_ONCE) {
        let row = |row: usize| {
            let places: Vec<String> = (row * 8 + 1..=row * 8 + 8).map(|place| format!("${place}")).collect();
            format!("({})", places.join(", "))
        };
        let values: Vec<String> = (0..rows.len()).map(row).collect();
        let sql = format!(
            "INSERT INTO samples (group_id, step, slot, rpo, churn, sent, dirty, unsent) VALUES {}
             ON CONFLICT (group_id, step, slot) DO UPDATE SET {instead}",
            values.join(", ")
        );
        let mut query = sqlx::query(&sql).persistent(rows.len() == ROWS_AT_ONCE);
        for ((group, step, slot), figures) in rows {
            query = query.bind(group.as_str()).bind(*step).bind(*slot);
            for figure in figures {
                query = query.bind(*figure);
            }
        }
        query.execute(&mut **act).await?;
    }
    Ok(())
}

/// Lets old figures go.
pub(crate) async fn prune_samples(act: &mut Act) -> Answer<()> {
    for (step, kept) in SAMPLE_STEPS {
        let oldest = (UnixMillis::now().0 - kept.as_millis() as i64).div_euclid(step * 1000);
        sqlx::query("DELETE FROM samples WHERE step = $1 AND slot < $2")
            .bind(step)
            .bind(oldest)
            .execute(&mut **act)
            .await?;
    }
    Ok(())
}
