//! `seawall group drill`: a test failover of a group, by the config server.

use std::time::Duration;

use block::Label;
use clap::{Args, Subcommand};
use control::fleet::{EndDrill, GroupInfo, StartDrill};
use control::{ExportPlace, PointSelector};
use serde_json::json;

use super::Fleet;
use super::group::{Followed, Which, begin, target_named};
use crate::exit::Exit;
use crate::text;

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  seawall group drill start web --watch
  seawall group drill start web --point application --for 30m --name monthly --watch
  seawall group show web
  seawall group drill stop web --watch

All volumes of the group are served at its target over NBD with TLS, for clients with an operator's certificate, and can be written
to. What is written is dropped at the end. Replication goes on meanwhile, as if there were no drill.")]
pub(crate) struct GroupDrillOptions {
    #[command(subcommand)]
    step: Step,
}

#[derive(Debug, Subcommand)]
enum Step {
    /// Serve all its volumes at a point, writable, until the time is over
    #[command(after_help = "Example:\n  seawall group drill start web --for 2h --watch")]
    Start {
        #[command(flatten)]
        which: Which,
        /// Recovery point: latest, application (the newest that is application-consistent), or an epoch's number
        #[arg(long, value_name = "POINT", default_value_t)]
        point: PointSelector,
        /// What to call it
        #[arg(long, value_name = "NAME", default_value = "drill", value_parser = crate::point::parse_label)]
        name: Label,
        /// How long it lasts at most, as in 30m, 4h, 2d; up to 30d
        #[arg(long = "for", value_name = "SPAN", default_value = "4h", value_parser = seawall_target_server::parse_span)]
        lasts: Duration,
        /// Which of its target servers, by name
        #[arg(long, value_name = "NAME")]
        target_server: Option<String>,
        #[command(flatten)]
        followed: Followed,
    },
    /// End it; clients are disconnected, and what was written is dropped
    #[command(after_help = "Example:\n  seawall group drill stop web --watch")]
    Stop {
        #[command(flatten)]
        which: Which,
        /// Which
        #[arg(long, value_name = "NAME", default_value = "drill", value_parser = crate::point::parse_label)]
        name: Label,
        #[command(flatten)]
        followed: Followed,
    },
}

impl GroupDrillOptions {
    pub(crate) fn json(&self) -> bool {
        match &self.step {
            Step::Start { followed, .. } | Step::Stop { followed, .. } => followed.json(),
        }
    }
}

pub(super) async fn run(options: &GroupDrillOptions) -> anyhow::Result<Exit> {
    match &options.step {
        Step::Start { which, point, name, lasts, target_server, followed } => {
            let target_server = match target_server {
                Some(named) => Some(target_named(&Fleet::open(followed.place())?, named).await?),
                None => None,
            };
            let asked =
                StartDrill { name: name.clone(), point: *point, lasts_s: lasts.as_secs(), target_server };
            begin(which, "drill", &json!(asked), followed).await
        }
        Step::Stop { which, name, followed } => {
            begin(which, "drill/end", &json!(EndDrill { name: name.clone() }), followed).await
        }
    }
}

/// The drills that are running, in lines.
pub(super) fn render(group: &GroupInfo) -> String {
    let mut shown = String::new();
    for export in group.drills.iter().map(|drill| &drill.export) {
        let place = match &export.place {
            ExportPlace::Tls(address) => format!("nbds://{address}"),
            ExportPlace::Plain(address) => format!("nbd://{address}"),
            ExportPlace::Socket(path) => path.display().to_string(),
            ExportPlace::Beside => "the target server".to_owned(),
        };
        let name = export.drill.as_ref().map(ToString::to_string).unwrap_or_default();
        let until =
            export.until.map_or_else(String::new, |until| format!(" until {}", text::instant(until).0));
        shown += &format!("Drill {name}: point {} is served at {place}{until}.\n", export.point.epoch);
    }
    shown
}
