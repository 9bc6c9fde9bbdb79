//! Looking whether a step could be done, without doing anything.

use control::fleet::UnixMillis;
use control::fleet::plan::{PlanAction, PlanCommit, PlanDns, PlanFailover, PlanPoint, PlanProve, PlanScript};
use control::fleet::{Name, PartRole, TaskKind};

use super::step::{Doing, Went, ask_agent, group_named};
use super::{dns, webhook};
use crate::fault::Answer;
use crate::view;

pub(super) async fn look(doing: &mut Doing<'_>) -> Answer<Went> {
    let Some(action) = doing.step.action() else {
        return Ok(Went::Failed("The step says nothing to do.".to_owned(), "Correct the plan.".to_owned()));
    };
    match action {
        PlanAction::Wait(wait) => Ok(Went::Passed(format!("Would wait {} s.", wait.seconds))),
        PlanAction::Manual(_) => Ok(Went::Passed("Would wait for a person.".to_owned())),
        PlanAction::Failover(PlanFailover { groups, .. })
        | PlanAction::Commit(PlanCommit { groups })
        | PlanAction::Point(PlanPoint { groups, .. })
        | PlanAction::Prove(PlanProve { groups, .. }) => look_at_groups(doing, groups, "").await,
        PlanAction::Script(script) => look_at_script(doing, script).await,
        PlanAction::Dns(asked) => Ok(look_at_dns(doing, asked, "")),
        PlanAction::Webhook(asked) => {
            let asked = asked.clone();
            Ok(doing.effect("Correct the URL, or the config server's DNS.", || async move {
                webhook::check(&asked).await
            }))
        }
    }
}

pub(super) fn look_at_dns(doing: &Doing<'_>, asked: &PlanDns, before: &'static str) -> Went {
    let (keys, asked) = (doing.app.dns_keys.clone(), asked.clone());
    doing.effect("Correct the plan, or the DNS server.", || async move {
        dns::check(keys.as_deref(), &asked).await.map(|found| format!("{before}{found}"))
    })
}

pub(super) async fn look_at_groups(doing: &mut Doing<'_>, groups: &[Name], before: &str) -> Answer<Went> {
    let mut wrong = Vec::new();
    let goal_ms =
        doing.run.plan.goals.rpo_s.map(|rpo_s| i64::try_from(rpo_s.saturating_mul(1000)).unwrap_or(i64::MAX));
    let silent_before = UnixMillis(UnixMillis::now().0 - view::SILENT_AFTER.as_millis() as i64);
    for name in groups {
        let Some(group) = group_named(doing.app, name).await? else {
            wrong.push(format!("there is no group {name}"));
            continue;
        };
        if !group.protected {
            wrong.push(format!("{name} is not protected"));
        }
        match (group.rpo_ms, goal_ms) {
            (None, _) => wrong.push(format!("{name} has no recovery point")),
            (Some(age), Some(goal)) if age > goal => {
                wrong.push(format!(
                    "the newest point of {name} is {} s old; the goal is {} s",
                    age / 1000,
                    goal / 1000
                ));
            }
            _ => {}
        }
        let machine = view::machine(&doing.app.store, &group.machine).await?;
        if machine.seen.is_none_or(|seen| seen < silent_before) {
            wrong.push(format!("the machine {name} does not report"));
        }
        for target in &group.target_servers {
            let server = view::server(&doing.app.store, PartRole::TargetServer, target).await?;
            if server.seen.is_none_or(|seen| seen < silent_before) {
                wrong.push(format!("the target server {} of {name} does not report", server.name));
            }
        }
    }
    Ok(match wrong.is_empty() {
        true if groups.len() == 1 => {
            Went::Passed(format!("{before}The group has recovery points, and its servers report."))
        }
        true => Went::Passed(format!(
            "{before}All {} groups have recovery points, and their servers report.",
            groups.len()
        )),
        false => Went::Failed(
            format!("{}.", super::step::capital(&wrong.join("; "))),
            "Look at the groups, or correct the plan.".to_owned(),
        ),
    })
}

async fn look_at_script(doing: &mut Doing<'_>, script: &PlanScript) -> Answer<Went> {
    let kind = TaskKind::CheckScript { command: script.command.to_string() };
    let asked = match ask_agent(doing, &script.machine, |_| kind).await? {
        Ok(asked) => asked,
        Err(went) => return Ok(went),
    };
    Ok(match asked.state.as_str() {
        "done" => Went::Passed(format!("{} on {}.", asked.message, script.machine)),
        "failed" => Went::Failed(
            format!("{}.", super::step::capital(&asked.message)),
            format!("Put the script on {}, and look at its agent's configuration.", script.machine),
        ),
        _ => Went::On(format!("Waiting for the agent of {}.", script.machine)),
    })
}
