//! What happens: lists, the stream, and what parts report.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::sse::{Event, KeepAlive, Sse};
use control::fleet::{CheckIn, CheckInReply, EventInfo, Page, ProblemCode};
use serde::Deserialize;
use tokio::sync::{OwnedSemaphorePermit, watch};
use tokio::time::Instant;
use tokio_stream::Stream;

use crate::api::extract::{LargeBody, Part, Query};
use crate::api::guard::Caller;
use crate::app::{App, Shared};
use crate::checkin;
use crate::fault::{Answer, fault, invalid};
use crate::store::{events_after, newest_event};

/// Streams at the same time. More are refused.
pub(crate) const STREAMS_MAX: usize = 1000;
/// A stream ends after so long, so that whoever lost the right to it loses it; clients go on with another one.
pub(crate) const STREAM_TIME_MAX: Duration = Duration::from_secs(15 * 60);
/// Events that are read at once.
const EVENTS_AT_ONCE: i64 = 200;

pub(crate) async fn check_in(
    State(app): State<Shared>,
    caller: Caller,
    LargeBody(said): LargeBody<CheckIn>,
) -> Answer<Json<CheckInReply>> {
    let (id, role, name) = caller.part()?;
    let who = (id.to_string(), role, name.to_string());
    Ok(Json(checkin::check_in(&app, who, said).await?))
}

/// Which events.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Which {
    #[serde(default)]
    after: Option<String>,
    #[serde(default)]
    limit: Option<i64>,
    #[serde(default)]
    last: Option<i64>,
}

pub(crate) async fn events(
    State(app): State<Shared>,
    Query(which): Query<Which>,
) -> Answer<Json<Page<EventInfo>>> {
    let Which { after, limit, last } = which;
    if last.is_some() && (after.is_some() || limit.is_some()) {
        return Err(invalid("last is given beside after or limit; it says by itself which events"));
    }
    let part = Part { after, limit: last.or(limit) };
    let limit = part.limit()?;
    let mut from = app.store.read.acquire().await?;
    let after = match (&part.after, last) {
        // Events have numbers without gaps.
        (None, Some(last)) => newest_event(&mut from).await?.saturating_sub(last).max(0),
        (None, None) => 0,
        (Some(text), _) => text.parse().map_err(|_| invalid("after is no `next` of a part before"))?,
    };
    let items = events_after(&mut from, after, limit).await?;
    let full = last.is_none() && items.len() as i64 == limit;
    let next = full.then(|| items.last().map(|last| last.id.to_string())).flatten();
    Ok(Json(Page { items, next }))
}

/// Where to go on.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct From {
    #[serde(default)]
    after: Option<i64>,
}

pub(crate) async fn stream(
    State(app): State<Shared>,
    Query(from): Query<From>,
    headers: HeaderMap,
) -> Answer<Sse<impl Stream<Item = Result<Event, Infallible>>>> {
    let permit = app.streams.clone().try_acquire_owned().map_err(|_| {
        fault(
            ProblemCode::Unavailable,
            format!("{STREAMS_MAX} streams are open"),
            "Close one, or ask for lists.",
        )
        .retry_after(30)
    })?;
    let last = headers.get("last-event-id").and_then(|id| id.to_str().ok()).and_then(|id| id.parse().ok());
    let newest = app.newest_event.clone();
    let after = last.or(from.after).unwrap_or_else(|| *newest.borrow());
    let following = Following {
        app,
        newest,
        after,
        read: VecDeque::new(),
        ends: Instant::now() + STREAM_TIME_MAX,
        _permit: permit,
    };
    Ok(Sse::new(tokio_stream_of(following)).keep_alive(KeepAlive::new().interval(Duration::from_secs(15))))
}

struct Following {
    app: Shared,
    newest: watch::Receiver<i64>,
    after: i64,
    read: VecDeque<EventInfo>,
    ends: Instant,
    _permit: OwnedSemaphorePermit,
}

impl Following {
    async fn next(&mut self) -> Option<EventInfo> {
        loop {
            if let Some(event) = self.read.pop_front() {
                self.after = event.id;
                return Some(event);
            }
            let newest = *self.newest.borrow_and_update();
            if newest > self.after {
                match self.look().await {
                    Ok(events) if !events.is_empty() => {
                        self.read = events.into();
                        continue;
                    }
                    // Events before the oldest that is kept are gone.
                    Ok(_) => self.after = newest,
                    Err(error) => {
                        tracing::warn!(%error, "read events for a stream");
                        return None;
                    }
                }
            }
            let mut stopping = self.app.stopping.clone();
            tokio::select! {
                changed = self.newest.changed() => if changed.is_err() { return None },
                _ = stopping.wait_for(|stopping| *stopping) => return None,
                () = tokio::time::sleep_until(self.ends) => return None,
            }
        }
    }

    async fn look(&self) -> Result<Vec<EventInfo>, sqlx::Error> {
        let mut from = self.app.store.read.acquire().await?;
        events_after(&mut from, self.after, EVENTS_AT_ONCE).await
    }
}

fn tokio_stream_of(following: Following) -> impl Stream<Item = Result<Event, Infallible>> {
    let (events, stream) = tokio::sync::mpsc::channel(16);
    tokio::spawn(async move {
        let mut following = following;
        loop {
            let next = tokio::select! {
                next = following.next() => next,
                // Whoever listened has gone.
                () = events.closed() => None,
            };
            let Some(event) = next else { return };
            let data = serde_json::to_string(&event).unwrap_or_default();
            let sent = Event::default().id(event.id.to_string()).event(event.kind).data(data);
            if events.send(Ok(sent)).await.is_err() {
                return;
            }
        }
    });
    tokio_stream::wrappers::ReceiverStream::new(stream)
}

/// Tells streams when there are new events. One look a half second serves all, and finds those of other config servers too.
pub(crate) async fn watch_events(app: std::sync::Arc<App>, newest: watch::Sender<i64>) {
    let mut stopping = app.stopping.clone();
    loop {
        tokio::select! {
            () = tokio::time::sleep(Duration::from_millis(500)) => {}
            _ = stopping.wait_for(|stopping| *stopping) => return,
        }
        let looked = async {
            let mut from = app.store.read.acquire().await?;
            newest_event(&mut from).await
        };
        match looked.await {
            Ok(found) => {
                newest.send_if_modified(|known| std::mem::replace(known, found) != found);
            }
            Err(error) => tracing::warn!(%error, "look for new events"),
        }
    }
}
