//! Drills: all volumes of a group at a point, writable at its target server, for a while. Replication goes on as if there were none.

use block::{GroupId, Label};
use control::PointSelector;
use control::fleet::{EndDrill, JobInfo, JobKind, PartRole, ResourceId, StartDrill, TaskKind};
use serde::{Deserialize, Serialize};

use super::{failover, proof};
use crate::app::App;
use crate::fault::{Answer, conflict, internal, invalid, not_found};
use crate::job::{Held, NewJob, insert_job, step};
use crate::store::Act;
use crate::view;

/// What a job is to do, with everything chosen.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Begun {
    group: GroupId,
    target: ResourceId,
    name: Label,
    point: PointSelector,
    lasts_s: u64,
}

const LASTS_S: std::ops::RangeInclusive<u64> = 60..=control::fleet::DRILL_LASTS_S_MAX;

/// Makes the job that begins one.
pub(crate) async fn begin(
    app: &App,
    act: &mut Act,
    id: &GroupId,
    asked: StartDrill,
    created_by: String,
) -> Answer<JobInfo> {
    let StartDrill { name, point, lasts_s, target_server } = asked;
    if !LASTS_S.contains(&lasts_s) {
        return Err(invalid(format!(
            "lasts_s is {lasts_s}, expected {} to {}",
            LASTS_S.start(),
            LASTS_S.end()
        )));
    }
    let group = view::group(&app.store, id).await?;
    let target = proof::target_of(&group, target_server)?;
    if group.drills.iter().any(|drill| drill.export.drill.as_ref() == Some(&name)) {
        return Err(conflict(
            format!("A drill of {} that is called {name} is running", group.name),
            "End it first, or give another name.",
        ));
    }
    if group.newest_point.is_none() {
        return Err(conflict(
            format!("{} has no recovery point at its target", group.name),
            "Wait for the first one; `seawall group show` says how far it is.",
        ));
    }
    let begun = Begun { group: *id, target, name, point, lasts_s };
    insert(app, act, JobKind::Drill, group.name.as_str(), &begun, created_by).await
}

/// Makes the job that ends one.
pub(crate) async fn end(
    app: &App,
    act: &mut Act,
    id: &GroupId,
    asked: EndDrill,
    created_by: String,
) -> Answer<JobInfo> {
    let group = view::group(&app.store, id).await?;
    let running = group.drills.iter().find(|drill| drill.export.drill.as_ref() == Some(&asked.name));
    let running = running.ok_or_else(|| not_found("drill", &asked.name))?;
    let begun = Begun {
        group: *id,
        target: running.target_server.clone(),
        name: asked.name,
        point: PointSelector::Latest,
        lasts_s: 0,
    };
    insert(app, act, JobKind::EndDrill, group.name.as_str(), &begun, created_by).await
}

async fn insert(
    app: &App,
    act: &mut Act,
    kind: JobKind,
    subject: &str,
    begun: &Begun,
    created_by: String,
) -> Answer<JobInfo> {
    let server = view::server(&app.store, PartRole::TargetServer, &begun.target).await?;
    failover::reports(server.seen, &format!("The target server {}", server.name), "Start it.")?;
    let title = match kind {
        JobKind::Drill => "The target serves the volumes, for writing",
        _ => "The target serves them no more, and drops what was written",
    };
    let new = NewJob {
        kind,
        subject: subject.to_owned(),
        subject_id: begun.group.to_string(),
        body: serde_json::to_string(begun).map_err(|error| internal("keep a job", error))?,
        steps: vec![step("drill", title)],
        created_by,
    };
    insert_job(act, new).await
}

/// Brings such a job as far as it comes now.
pub(super) async fn advance(app: &App, act: &mut Act, held: &mut Held) -> Answer<()> {
    let Begun { group, target, name, point, lasts_s } =
        serde_json::from_str(&held.body).map_err(|error| internal("read a job", error))?;
    let task = match held.job.kind {
        JobKind::Drill => TaskKind::Drill { group, point, name, lasts_s },
        _ => TaskKind::EndDrill { group, name },
    };
    failover::last(app, act, held, "drill", &target, task).await
}
