//! Boot proofs: a target server starts a machine on a point of a group, and its console tells whether it comes up. When somebody asks, and
//! as often as the group's policy says.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::time::Duration;

use block::GroupId;
use control::PointSelector;
use control::fleet::{GroupInfo, JobInfo, JobKind, PartRole, ProofPolicy, ResourceId, TaskKind, UnixMillis};
use serde::{Deserialize, Serialize};
use sqlx::Row;

use super::failover;
use crate::api::guard::parse;
use crate::app::App;
use crate::fault::{Answer, conflict, internal};
use crate::job::{Held, NewJob, insert_job, step};
use crate::store::Act;
use crate::view;

/// Between two looks at which proofs are due.
pub(crate) const LOOK_EVERY: Duration = Duration::from_secs(10);

/// What somebody wants to see proven.
#[derive(Clone, Debug)]
pub(crate) struct Wish {
    pub(crate) point: PointSelector,
    /// What the machine is, and what it must say.
    pub(crate) proof: ProofPolicy,
    /// Which of the group's targets; may be left out.
    pub(crate) target: Option<ResourceId>,
}

/// What a job is to do, with everything chosen.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Begun {
    group: GroupId,
    target: ResourceId,
    point: PointSelector,
    volumes: Vec<String>,
    proof: ProofPolicy,
}

/// What a group's policy says of proofs, or what goes without saying.
pub(crate) async fn policy_of(app: &App, group: &GroupInfo) -> Answer<ProofPolicy> {
    Ok(view::policy(&app.store, &group.policy).await?.policy.proof.unwrap_or_default())
}

/// Makes the job.
pub(crate) async fn begin(
    app: &App,
    act: &mut Act,
    id: &GroupId,
    wish: Wish,
    created_by: String,
) -> Answer<JobInfo> {
    let group = view::group(&app.store, id).await?;
    let target = target_of(&group, wish.target)?;
    if group.newest_point.is_none() {
        return Err(conflict(
            format!("{} has no recovery point at its target", group.name),
            "Wait for the first one; `seawall group show` says how far it is.",
        ));
    }
    let server = view::server(&app.store, PartRole::TargetServer, &target).await?;
    failover::reports(server.seen, &format!("The target server {}", server.name), "Start it.")?;
    let begun = Begun {
        group: *id,
        target,
        point: wish.point,
        volumes: group.volumes.iter().map(|volume| volume.name.to_string()).collect(),
        proof: wish.proof,
    };
    let new = NewJob {
        kind: JobKind::Prove,
        subject: group.name.to_string(),
        subject_id: id.to_string(),
        body: serde_json::to_string(&begun).map_err(|error| internal("keep a job", error))?,
        steps: vec![step("prove", "A machine is started on the point, and says what it must")],
        created_by,
    };
    insert_job(act, new).await
}

/// The target that starts the machine: as asked, else the one that has failed over, else the first.
pub(super) fn target_of(group: &GroupInfo, wanted: Option<ResourceId>) -> Answer<ResourceId> {
    let over = group.failover.as_ref().map(|standing| standing.target_server.clone());
    match wanted.or(over).or_else(|| group.target_servers.first().cloned()) {
        Some(target) if group.target_servers.contains(&target) => Ok(target),
        _ => Err(conflict(
            format!("That target server does not keep {}", group.name),
            "Name one that does; the group's page and `seawall group show` list them.",
        )),
    }
}

/// Brings such a job as far as it comes now.
pub(super) async fn advance(app: &App, act: &mut Act, held: &mut Held) -> Answer<()> {
    let Begun { group, target, point, volumes, proof } =
        serde_json::from_str(&held.body).map_err(|error| internal("read a job", error))?;
    failover::last(app, act, held, "prove", &target, TaskKind::Prove { group, point, volumes, proof }).await
}

/// When the last proof of a group began; `None` when there was none. Whether that ends well does not matter: what fails is told, and tried
/// again in its turn.
fn is_due(now: UnixMillis, last: Option<UnixMillis>, every_s: u64) -> bool {
    let every_ms = i64::try_from(every_s).unwrap_or(i64::MAX / 1000).saturating_mul(1000);
    every_s > 0 && last.is_none_or(|last| now.since(last) >= every_ms)
}

/// Begins the proofs that policies ask for: at each target server one at a time, that of whoever has waited longest.
pub(crate) async fn begin_due(app: &App) -> Answer<()> {
    let mut last: BTreeMap<String, i64> = BTreeMap::new();
    let rows = sqlx::query(
        "SELECT subject_id, MAX(created) AS last FROM jobs WHERE kind = 'prove' GROUP BY subject_id",
    )
    .fetch_all(&app.store.read)
    .await?;
    for row in rows {
        last.insert(row.try_get("subject_id")?, row.try_get("last")?);
    }
    let rows = sqlx::query(
        "SELECT g.id, p.name, p.policy FROM protection_groups g JOIN policies p ON p.id = g.policy_id WHERE g.state = 'protected'",
    )
    .fetch_all(&app.store.read)
    .await?;
    let now = UnixMillis::now();
    let mut due = Vec::new();
    for row in rows {
        let id: String = row.try_get("id")?;
        let Some(proof) = view::policy_of_text(&row.try_get::<String, _>("policy")?)?.proof else { continue };
        let before = last.get(&id).copied();
        if is_due(now, before.map(UnixMillis), proof.every_s) {
            due.push((before, id, row.try_get::<String, _>("name")?, proof));
        }
    }
    if due.is_empty() {
        return Ok(());
    }
    due.sort_by(|a, b| (a.0, &a.1).cmp(&(b.0, &b.1)));
    let mut busy = HashSet::new();
    let under_way: Vec<String> =
        sqlx::query_scalar("SELECT body FROM jobs WHERE kind = 'prove' AND state IN ('waiting', 'running')")
            .fetch_all(&app.store.read)
            .await?;
    for body in &under_way {
        let begun: Begun = serde_json::from_str(body).map_err(|error| internal("read a job", error))?;
        busy.insert(begun.target);
    }
    let mut targets: HashMap<String, Vec<ResourceId>> = HashMap::new();
    for row in sqlx::query("SELECT group_id, target_id FROM group_targets").fetch_all(&app.store.read).await?
    {
        targets.entry(row.try_get("group_id")?).or_default().push(parse(row.try_get("target_id")?)?);
    }
    for (_, id, policy, proof) in due {
        // Of thousands that are due most are not looked at any closer.
        if targets.get(&id).is_none_or(|targets| targets.iter().all(|target| busy.contains(target))) {
            continue;
        }
        let id: GroupId = parse(id)?;
        let group = view::group(&app.store, &id).await?;
        let Ok(target) = target_of(&group, None) else { continue };
        if busy.contains(&target) {
            continue;
        }
        let wish = Wish { point: PointSelector::Latest, proof, target: Some(target.clone()) };
        let mut act = app.store.act().await?;
        match begin(app, &mut act, &id, wish, format!("policy {policy}")).await {
            Ok(_) => {
                act.commit().await?;
                busy.insert(target);
                app.jobs_wake.notify_one();
            }
            // No point yet, a silent target, or another config server was first: looked at again.
            Err(fault) => tracing::debug!(%fault, group = %id, "begin a proof"),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_proof_is_due_at_once_and_the_next_in_its_turn() {
        let at = |seconds: i64| UnixMillis(1_000_000_000 + seconds * 1000);
        assert!(is_due(at(0), None, 600));
        assert!(!is_due(at(599), Some(at(0)), 600));
        assert!(is_due(at(600), Some(at(0)), 600));
        assert!(!is_due(at(600), None, 0), "only when somebody asks");
        assert!(!is_due(at(0), Some(at(100)), 600), "a clock that was set back");
    }
}
