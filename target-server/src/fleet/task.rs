//! What the config server asks for once: the steps of a failover. Each is told again until it is known to be done, also after a
//! restart, so each finds what is done already and does it no second time.

use block::{Generation, GroupId};
use control::fleet::TaskKind;
use control::{FailoverReply, FailoverStep, PointSelector};
use enrol::TaskDone;
use serde_json::json;

use super::{Post, drill, prove};
use crate::refusal::Refusal;
use crate::server::Handle;

pub(super) async fn perform(post: std::sync::Arc<Post>, kind: TaskKind, done: TaskDone) {
    tracing::warn!(?kind, "the config server asks");
    if let TaskKind::Prove { group, point, volumes, proof } = kind {
        return prove::perform(post, prove::Asked { group, point, volumes, proof }, done).await;
    }
    if let TaskKind::Drill { .. } | TaskKind::EndDrill { .. } = kind {
        return drill::perform(post, kind, done).await;
    }
    // Reads and writes of the replica.
    let work = move || {
        let running = post.running.lock();
        let Some(failovers) = running.server.as_ref().map(Handle::failovers) else {
            return Err("this target server has not started what it is to do; look at its trouble".to_owned());
        };
        // What is told meanwhile may start the server anew, which waits for this.
        drop(running);
        step(&failovers, &kind).map_err(|refusal| refusal.message)
    };
    let worked = tokio::task::spawn_blocking(work).await;
    match worked.unwrap_or_else(|error| Err(error.to_string())) {
        Ok((message, reply)) => {
            let epoch = reply.point.as_ref().map(|point| point.epoch);
            let result = json!({
                "generation": reply.generation, "epoch": epoch, "changed_bytes": reply.changed_bytes,
            });
            done.done(message, result).await;
        }
        Err(error) => {
            tracing::warn!(error, "what the config server asked for was not done");
            done.failed(error).await;
        }
    }
}

/// What does a step on the groups of a server.
pub(crate) struct Failovers {
    pub(crate) server: std::sync::Arc<crate::server::Server>,
}

impl Failovers {
    fn run(&self, group: GroupId, step: FailoverStep) -> Result<FailoverReply, Refusal> {
        crate::failover::run(&self.server, group, step)
    }

    /// How it is now, as if a step had been done.
    fn now(&self, group: GroupId) -> Result<(Standing, FailoverReply), Refusal> {
        let (_, replica) = crate::retain::replica_of(&self.server, group)?;
        let standing = Standing {
            pending: replica.failover().map(|(failover, complete)| (failover.point, complete)),
            promoted: replica.promoted().is_some(),
            generation: replica.applied().0.unwrap_or_default(),
        };
        Ok((standing, crate::failover::reply(&replica, group, Default::default())))
    }
}

struct Standing {
    /// The point of a failover that is neither committed nor cancelled, and whether it is complete.
    pending: Option<(block::Epoch, bool)>,
    promoted: bool,
    generation: Generation,
}

fn step(failovers: &Failovers, kind: &TaskKind) -> Result<(String, FailoverReply), Refusal> {
    let point =
        |reply: &FailoverReply| reply.point.as_ref().map(|point| point.epoch.to_string()).unwrap_or_default();
    match kind {
        TaskKind::FailOver { group, point: wanted } => {
            let (now, as_is) = failovers.now(*group)?;
            let reply = match (now.pending, wanted) {
                // A second time it would put back what has been written meanwhile.
                (Some((pending, true)), PointSelector::Epoch(wanted)) if pending == *wanted => as_is,
                (Some((_, true)), PointSelector::Latest | PointSelector::Application) => as_is,
                (Some((pending, false)), PointSelector::Latest | PointSelector::Application) => {
                    failovers.run(*group, FailoverStep::Start(PointSelector::Epoch(pending)))?
                }
                _ => failovers.run(*group, FailoverStep::Start(*wanted))?,
            };
            let message = format!(
                "point {} is what was chosen, {} had changed since and were put back, and generation {} begins.",
                point(&reply),
                reply.changed_bytes,
                reply.generation
            );
            Ok((message, reply))
        }
        TaskKind::CommitFailover { group, generation } => {
            let (now, as_is) = failovers.now(*group)?;
            let reply = match now.pending {
                None if now.generation >= *generation => as_is,
                _ => failovers.run(*group, FailoverStep::Commit)?,
            };
            let message = format!("generation {} goes on from point {}.", reply.generation, point(&reply));
            Ok((message, reply))
        }
        TaskKind::CancelFailover { group, generation } => {
            let (now, as_is) = failovers.now(*group)?;
            let reply = match now.pending {
                None if now.generation < *generation => as_is,
                _ => failovers.run(*group, FailoverStep::Cancel)?,
            };
            let message =
                format!("Taken back: point {} is the newest again, and the source is taken.", point(&reply));
            Ok((message, reply))
        }
        TaskKind::Promote { group } => {
            let reply = failovers.run(*group, FailoverStep::Promote)?;
            let message = "Promoted: `seawall export --promoted` serves the volumes, and what is written to them stays.";
            Ok((message.to_owned(), reply))
        }
        TaskKind::Demote { group } => {
            let (now, as_is) = failovers.now(*group)?;
            let reply = if now.promoted { failovers.run(*group, FailoverStep::Demote)? } else { as_is };
            Ok((format!("Demoted: what was written is point {}.", point(&reply)), reply))
        }
        other => Err(Refusal::new(
            wire::RefusalCode::BadRequest,
            format!("this target server does not know the task {other:?}; upgrade it"),
        )),
    }
}
