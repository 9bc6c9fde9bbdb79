//! Passing comparisons on to a target, unread.
//!
//! All targets of a group apply the same changesets, so any of them can answer; the first that can be reached does, one that was
//! never compared before one that has damage, and that before the others. A conversation waits for its turn before it is passed on.

use std::sync::Arc;

use wire::{Comparison, Purpose, RefusalCode, Role, Turn, WireError};

use crate::server::Server;
use crate::turns::Place;

/// Serves one conversation until either side ends it.
pub(crate) async fn serve(server: &Arc<Server>, mut source: Comparison) {
    let group = source.group();
    let Some(hub) = server.hub(group) else {
        let message = format!("compare group {group}: no target is configured for it; add a [[group]]");
        return source.refuse(RefusalCode::UnknownGroup, &message);
    };
    let stopping = "compare: this process server is stopping";
    // Kept until the conversation ends.
    let _turn = tokio::select! {
        turn = wait(server, &source) => match turn {
            Some(turn) => turn,
            None => return,
        },
        () = server.stopping() => return source.refuse(RefusalCode::Stopping, stopping),
    };
    let mut failure = None;
    for route in hub.routes_by_need() {
        match reach(server, &source, &route.address).await {
            Ok(mut target) => {
                tracing::debug!(%group, target = route.address, "comparison begins");
                if source.tell_turn(Turn { ahead: 0, at_once: server.turns.at_once() }).await.is_err() {
                    return;
                }
                tokio::select! {
                    ended = pass(&mut source, &mut target) => {
                        let Err(error) = ended;
                        tracing::debug!(%group, target = route.address, %error, "comparison ended");
                        // What the target refuses, the source is refused; the end of either ends both.
                        source.refuse(RefusalCode::Stopping, &error.to_string());
                    }
                    () = server.stopping() => source.refuse(RefusalCode::Stopping, stopping),
                }
                return;
            }
            Err(error) => failure = Some(format!("{}: {error}", route.address)),
        }
    }
    let why = failure.unwrap_or_else(|| "it has none".to_owned());
    source.refuse(RefusalCode::Busy, &format!("compare group {group}: no target can be reached: {why}"));
}

/// Until it is the source's turn; `None` when the source has gone.
async fn wait(server: &Server, source: &Comparison) -> Option<Place> {
    let mut place = server.turns.enter();
    loop {
        let turn = place.turn();
        if turn.ahead == 0 {
            return Some(place);
        }
        source.tell_turn(turn).await.ok()?;
        tokio::select! {
            () = place.moved() => {}
            _ = source.ended() => return None,
        }
    }
}

async fn reach(server: &Server, source: &Comparison, address: &str) -> Result<Comparison, WireError> {
    let connection =
        wire::connect_for(Purpose::Compare, address, Role::TargetServer, &server.credentials.current())
            .await?;
    let mut target =
        Comparison::open(connection, source.group(), source.generation(), source.conversation()).await?;
    while target.turn().await?.ahead > 0 {}
    Ok(target)
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
