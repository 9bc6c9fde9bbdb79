//! What several commands share that look at something or change it: showing it again, asking before something is destroyed, and
//! acts that wait for a second person.

use std::io::{IsTerminal, Write};
use std::time::Duration;

use anyhow::{bail, ensure};
use clap::Args;
use control::fleet::{Approval, Confirm};
use hyper::Method;
use serde::Serialize;
use serde_json::{Value, json};

use super::{Fleet, ProfilePlace, advise, moment, say_json};
use crate::exit::Exit;
use crate::text;

/// How often something is shown again.
const WATCH_EVERY: Duration = Duration::from_secs(2);

/// As whom, and for whom the answer is.
#[derive(Debug, Args)]
pub(crate) struct Common {
    #[command(flatten)]
    pub(crate) place: ProfilePlace,
    /// One JSON object instead of text
    #[arg(long)]
    pub(crate) json: bool,
}

/// The same, for what moves.
#[derive(Debug, Args)]
pub(crate) struct Watched {
    #[command(flatten)]
    pub(crate) common: Common,
    /// Show it again every two seconds, until interrupted; with --json one object a line
    #[arg(long)]
    watch: bool,
}

impl Watched {
    /// Shows what `look` fetches, once or until interrupted.
    pub(crate) async fn show<T: Serialize, F: Future<Output = anyhow::Result<T>>>(
        &self,
        look: impl Fn() -> F,
        render: impl Fn(&T) -> String,
    ) -> anyhow::Result<Exit> {
        loop {
            let found = tokio::select! {
                found = look() => found?,
                _ = tokio::signal::ctrl_c() => return Ok(Exit::Done),
            };
            match self.common.json {
                true => say_json(&found)?,
                false => {
                    let mut shown = render(&found);
                    if self.watch && std::io::stdout().is_terminal() {
                        // Clear, and go to the corner.
                        shown.insert_str(0, "\x1b[2J\x1b[H");
                    }
                    text::say(&shown)?;
                }
            }
            if !self.watch {
                return Ok(Exit::Done);
            }
            tokio::select! {
                () = tokio::time::sleep(WATCH_EVERY) => {}
                _ = tokio::signal::ctrl_c() => return Ok(Exit::Done),
            }
        }
    }
}

/// Whether a person must be asked.
#[derive(Debug, Args)]
pub(crate) struct Certain {
    /// Do not ask
    #[arg(long)]
    pub(crate) yes: bool,
}

impl Certain {
    /// Asks for the name of what is to be destroyed, unless told not to.
    pub(crate) fn ask(&self, doing: &str, name: &str, about: &str) -> anyhow::Result<()> {
        if self.yes {
            return Ok(());
        }
        ensure!(
            std::io::stdin().is_terminal(),
            "{doing} {name}: {about} There is nobody to ask here; say --yes"
        );
        eprint!("{about} Type its name to go on: ");
        std::io::stderr().flush()?;
        let mut typed = String::new();
        std::io::stdin().read_line(&mut typed)?;
        if typed.trim() != name {
            bail!("{doing} {name}: {:?} was typed; nothing was done", typed.trim());
        }
        Ok(())
    }
}

/// What came of an act.
#[derive(Debug)]
pub(crate) enum Acted {
    /// It is done; with what it gave.
    Done(Value),
    /// It waits for a second person.
    Waits(Box<Approval>),
}

impl Acted {
    /// Says what came of it.
    pub(crate) fn say(&self, common: &Common, done: &str) -> anyhow::Result<Exit> {
        match (self, common.json) {
            (Acted::Done(Value::Null), true) => say_json(&json!({ "done": true }))?,
            (Acted::Done(given), true) => say_json(given)?,
            (Acted::Done(_), false) => text::say(&format!("{done}\n"))?,
            (Acted::Waits(approval), true) => say_json(approval)?,
            (Acted::Waits(approval), false) => text::say(&format!(
                "Nothing is done yet: a second person must approve it until {}:\n  seawall approval approve {}\n",
                moment(approval.expires),
                approval.id
            ))?,
        }
        Ok(match self {
            Acted::Done(_) => Exit::Done,
            Acted::Waits(_) => Exit::Waits,
        })
    }
}

impl Fleet {
    /// Has something changed, now or when a second person has approved it.
    pub(crate) async fn act(
        &self,
        method: Method,
        path: &str,
        body: &impl Serialize,
    ) -> anyhow::Result<Acted> {
        let given: Value = self.client().call(method, path, Some(body)).await.map_err(advise)?;
        // No other answer says who asked and until when.
        let waits = given.get("asked_by").is_some() && given["state"] == "waiting";
        match waits {
            true => Ok(Acted::Waits(serde_json::from_value(given)?)),
            false => Ok(Acted::Done(given)),
        }
    }

    /// Has something destroyed, whose name was typed.
    pub(crate) async fn destroy(&self, path: &str, name: &str) -> anyhow::Result<Acted> {
        self.act(Method::DELETE, path, &Confirm { confirm: name.to_owned() }).await
    }
}
