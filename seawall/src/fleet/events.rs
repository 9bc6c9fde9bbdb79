//! `seawall events`: what has happened in the fleet, and what happens.

use clap::Args;
use control::fleet::{EventInfo, Page, UserInfo};
use serde_json::json;

use super::{AGAIN_AFTER, Fleet, ProfilePlace, advise, moment, say_json};
use crate::text;

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  seawall events
  seawall events --last 100 --json | jq -r '.events[] | select(.severity == \"trouble\").message'
  seawall events --watch")]
pub(crate) struct EventsOptions {
    #[command(flatten)]
    place: ProfilePlace,
    /// The newest so many
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u16).range(1..=1000))]
    last: u16,
    /// Then whatever happens, until interrupted
    #[arg(long)]
    watch: bool,
    /// One JSON object instead of a table; with --watch one for each event, one a line
    #[arg(long)]
    pub(crate) json: bool,
}

pub(crate) async fn run(options: &EventsOptions) -> anyhow::Result<()> {
    let fleet = Fleet::open(&options.place)?;
    let events: Page<EventInfo> = fleet.get(&format!("/events?last={}", options.last)).await?;
    match (options.watch, options.json) {
        (false, true) => say_json(&json!({ "events": events.items })),
        (false, false) => Ok(text::say(&render(&events.items))?),
        (true, _) => watch(&fleet, events.items, options.json).await,
    }
}

async fn watch(fleet: &Fleet, before: Vec<EventInfo>, json: bool) -> anyhow::Result<()> {
    let mut after = 0;
    for event in &before {
        after = event.id;
        say(event, json)?;
    }
    loop {
        let mut failed = None;
        let streamed = fleet
            .client()
            .follow(&format!("/events/stream?after={after}"), |data| {
                let told = serde_json::from_str::<EventInfo>(data).map_err(anyhow::Error::new);
                let told = told.and_then(|event| {
                    say(&event, json)?;
                    Ok(event.id)
                });
                match told {
                    Ok(id) => after = id,
                    Err(error) => failed = Some(error),
                }
                failed.is_none()
            })
            .await;
        if let Some(error) = failed {
            return Err(error);
        }
        match streamed {
            // Streams end now and then, so that whoever has lost the right to one loses it.
            Ok(()) => {}
            Err(error) if error.is_retryable() => {
                tracing::warn!(%error, "the events are not heard; trying again");
                let _: UserInfo = fleet.get_patiently("/me", |_| {}).await?;
            }
            Err(error) => return Err(advise(error)),
        }
        tokio::time::sleep(AGAIN_AFTER).await;
    }
}

fn say(event: &EventInfo, json: bool) -> anyhow::Result<()> {
    match json {
        true => say_json(event),
        false => {
            let line = format!("{}  {:7}  {}\n", moment(event.time), event.severity, event.message);
            Ok(text::say(&line)?)
        }
    }
}

fn render(events: &[EventInfo]) -> String {
    if events.is_empty() {
        return "Nothing has happened yet.\n".to_owned();
    }
    let mut table = text::table(&["When", "How", "What"], &[]);
    for event in events {
        table.add_row([moment(event.time), event.severity.clone(), event.message.clone()]);
    }
    format!("{table}\n")
}
