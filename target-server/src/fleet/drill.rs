//! Drills that the config server asks for: all volumes of a group at a point, writable, for a while. What is asked for again is there already, or
//! has ended already.

use std::sync::Arc;

use block::{GroupId, Label};
use control::fleet::TaskKind;
use control::{ExportInfo, ExportPlace, ExportRequest};
use enrol::TaskDone;
use serde_json::json;
use wire::RefusalCode;

use super::Post;
use crate::export;
use crate::refusal::Refusal;
use crate::server::{Handle, Server};

pub(super) async fn perform(post: Arc<Post>, kind: TaskKind, done: TaskDone) {
    let server = post.running.lock().server.as_ref().map(Handle::shared);
    let Some(server) = server else {
        return done.failed("this target server has not started what it is to do; look at its trouble").await;
    };
    match step(&server, kind).await {
        Ok((message, result)) => done.done(message, result).await,
        Err(refusal) => done.failed(refusal.message).await,
    }
}

async fn step(server: &Arc<Server>, kind: TaskKind) -> Result<(String, serde_json::Value), Refusal> {
    match kind {
        TaskKind::Drill { group, point, name, lasts_s } => {
            let running = of(server, group, &name).into_iter().next();
            let info = match running {
                Some(info) => info,
                None => {
                    let request = ExportRequest {
                        writable: true,
                        detach: true,
                        drill: Some(name),
                        time_limit_s: Some(lasts_s),
                        ..ExportRequest::new(group, Vec::new(), point, ExportPlace::Beside)
                    };
                    export::start_detached(server, request, super::OPERATOR.to_owned()).await?
                }
            };
            let place = match &info.place {
                ExportPlace::Tls(address) => format!("nbds://{address}"),
                other => format!("{other:?}"),
            };
            let message = format!("Point {} is served at {place} for writing.", info.point.epoch);
            Ok((message, json!({ "export": info })))
        }
        TaskKind::EndDrill { group, name } => {
            let mut dropped = 0_u64;
            for info in of(server, group, &name) {
                if let Some(ended) = export::end(server, info.id).await {
                    dropped = dropped.saturating_add(ended.overlay_bytes.0);
                }
            }
            let message = format!("Ended; {} that was written is dropped.", block::ByteCount(dropped));
            Ok((message, json!({ "overlay_bytes": dropped })))
        }
        other => Err(Refusal::new(RefusalCode::BadRequest, format!("{other:?} is no drill"))),
    }
}

/// The exports of that drill.
fn of(server: &Server, group: GroupId, name: &Label) -> Vec<ExportInfo> {
    let mut all = server.exports.list();
    all.retain(|export| export.group == group && export.drill.as_ref() == Some(name));
    all
}
