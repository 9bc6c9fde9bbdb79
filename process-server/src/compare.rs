//! Passing comparisons on to a target, unread.
//!
//! All targets of a group apply the same changesets, so any of them can answer; the first that can be reached does.

use std::sync::Arc;

use wire::{Comparison, Purpose, RefusalCode, Role, WireError};

use crate::server::Server;

/// Serves one conversation until either side ends it.
pub(crate) async fn serve(server: &Arc<Server>, mut source: Comparison) {
    let group = source.group();
    let Some(hub) = server.hub(group) else {
        let message = format!("compare group {group}: no target is configured for it; add a [[group]]");
        return source.refuse(RefusalCode::UnknownGroup, &message);
    };
    let mut failure = None;
    for route in &hub.routes {
        match reach(server, &source, &route.address).await {
            Ok(mut target) => {
                tracing::debug!(%group, target = route.address, "comparison begins");
                tokio::select! {
                    ended = pass(&mut source, &mut target) => {
                        let Err(error) = ended;
                        tracing::debug!(%group, target = route.address, %error, "comparison ended");
                        // What the target refuses, the source is refused; the end of either ends both.
                        source.refuse(RefusalCode::Stopping, &error.to_string());
                    }
                    () = server.stopping() => {
                        source.refuse(RefusalCode::Stopping, "compare: this process server is stopping");
                    }
                }
                return;
            }
            Err(error) => failure = Some(format!("{}: {error}", route.address)),
        }
    }
    let why = failure.unwrap_or_else(|| "it has none".to_owned());
    source.refuse(RefusalCode::Busy, &format!("compare group {group}: no target can be reached: {why}"));
}

async fn reach(server: &Server, source: &Comparison, address: &str) -> Result<Comparison, WireError> {
    let connection =
        wire::connect_for(Purpose::Compare, address, Role::TargetServer, &server.credentials).await?;
    Comparison::open(connection, source.group(), source.generation(), source.conversation()).await
}

/// Both ways, until one of them ends.
async fn pass(
    source: &mut Comparison,
    target: &mut Comparison,
) -> Result<std::convert::Infallible, WireError> {
    loop {
        tokio::select! {
            question = source.next() => {
                let (number, message) = question?;
                target.send(number, message).await?;
            }
            answer = target.next() => {
                let (number, message) = answer?;
                source.send(number, message).await?;
            }
        }
    }
}
