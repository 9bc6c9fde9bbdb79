//! `seawall policy`: how groups are protected.

use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use clap::{Args, Subcommand};
use control::fleet::{Name, NewPolicy, Policy, PolicyInfo};
use hyper::Method;
use serde_json::{Value, json};

use super::change::{Certain, Common};
use super::{Fleet, not_there, say_json};
use crate::exit::Exit;
use crate::text;

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  seawall policy list
  seawall policy create gold --set epoch_interval_ms=500 --set rpo_s_max=60
  seawall policy show gold --json | tee gold.json
  seawall policy change gold --from gold.json")]
pub(crate) struct PolicyOptions {
    #[command(subcommand)]
    command: PolicyCommand,
}

#[derive(Debug, Subcommand)]
enum PolicyCommand {
    /// All of them
    #[command(after_help = "Example:\n  seawall policy list")]
    List(Common),
    /// What one says
    #[command(after_help = "Example:\n  seawall policy show default --json")]
    Show {
        /// Which, by name or id
        policy: String,
        #[command(flatten)]
        common: Common,
    },
    /// Make one
    #[command(after_help = "Examples:
  seawall policy create gold --set epoch_interval_ms=500
  seawall policy create gold --from gold.json

What is not said has its default.")]
    Create {
        /// Not taken yet
        name: Name,
        #[command(flatten)]
        says: Says,
        #[command(flatten)]
        common: Common,
    },
    /// Change one, and with it the groups that follow it
    #[command(after_help = "Examples:
  seawall policy change default --set application_every_s=3600
  seawall policy change default --set space_bytes_max=null
  seawall policy change gold --rename silver

What is not said stays. Exit status 7 when that would shorten retention and a second person must approve it.")]
    Change {
        /// Which, by name or id
        policy: String,
        /// Its new name
        #[arg(long, value_name = "NAME")]
        rename: Option<Name>,
        #[command(flatten)]
        says: Says,
        #[command(flatten)]
        common: Common,
    },
    /// Delete one that no group follows
    #[command(after_help = "Example:\n  seawall policy delete gold --yes")]
    Delete {
        /// Which, by name or id
        policy: String,
        #[command(flatten)]
        certain: Certain,
        #[command(flatten)]
        common: Common,
    },
}

#[derive(Debug, Args)]
struct Says {
    /// File with what it says, JSON as `show --json` gives it; - is standard input
    #[arg(long, value_name = "FILE")]
    from: Option<PathBuf>,
    /// One value, as in rpo_s_max=60; the value is JSON, null takes it away
    #[arg(long = "set", value_name = "KEY=VALUE")]
    set: Vec<String>,
}

impl PolicyOptions {
    pub(crate) fn json(&self) -> bool {
        match &self.command {
            PolicyCommand::List(common)
            | PolicyCommand::Show { common, .. }
            | PolicyCommand::Create { common, .. }
            | PolicyCommand::Change { common, .. }
            | PolicyCommand::Delete { common, .. } => common.json,
        }
    }
}

impl Says {
    /// What the policy says afterwards.
    fn over(&self, before: Policy) -> anyhow::Result<Policy> {
        let mut says = match &self.from {
            Some(file) => read(file)?,
            None => serde_json::to_value(before)?,
        };
        let table = says.as_object_mut().context("read the policy: it is no JSON object")?;
        for set in &self.set {
            let (key, value) = set
                .split_once('=')
                .with_context(|| format!("use --set {set}: expected KEY=VALUE, as in rpo_s_max=60"))?;
            // A word without quotes is text.
            let value = serde_json::from_str(value).unwrap_or_else(|_| Value::from(value));
            match value {
                Value::Null => drop(table.remove(key)),
                value => drop(table.insert(key.to_owned(), value)),
            }
        }
        serde_json::from_value(says).context("read the policy")
    }
}

/// A policy alone, or as `show --json` gives it.
fn read(file: &Path) -> anyhow::Result<Value> {
    let text = match file.as_os_str() == "-" {
        true => std::io::read_to_string(std::io::stdin()),
        false => std::fs::read_to_string(file),
    };
    let reading = || format!("read the policy in {}", file.display());
    let mut read: Value = serde_json::from_str(&text.with_context(reading)?).with_context(reading)?;
    Ok(match read.get_mut("policy") {
        Some(policy) => policy.take(),
        None => read,
    })
}

/// The policy of this name or id.
pub(super) async fn find(fleet: &Fleet, named: &str) -> anyhow::Result<PolicyInfo> {
    let policies: Vec<PolicyInfo> = fleet.get("/policies").await?;
    let found = policies.iter().find(|policy| policy.name.as_str() == named || policy.id.as_str() == named);
    let found = found
        .ok_or_else(|| not_there("policy", named, policies.iter().map(|policy| policy.name.as_str())))?;
    fleet.get(&format!("/policies/{}", found.id)).await
}

pub(crate) async fn run(options: &PolicyOptions) -> anyhow::Result<Exit> {
    match &options.command {
        PolicyCommand::List(common) => {
            let policies: Vec<PolicyInfo> = Fleet::open(&common.place)?.get("/policies").await?;
            match common.json {
                true => say_json(&json!({ "policies": policies }))?,
                false => text::say(&render(&policies))?,
            }
            Ok(Exit::Done)
        }
        PolicyCommand::Show { policy, common } => {
            let policy = find(&Fleet::open(&common.place)?, policy).await?;
            match common.json {
                true => say_json(&policy)?,
                false => text::say(&render_one(&policy)?)?,
            }
            Ok(Exit::Done)
        }
        PolicyCommand::Create { name, says, common } => {
            let asked = NewPolicy { name: name.clone(), policy: says.over(Policy::default())? };
            let acted = Fleet::open(&common.place)?.act(Method::POST, "/policies", &asked).await?;
            acted.say(common, &format!("The policy {name} is made."))
        }
        PolicyCommand::Change { policy, rename, says, common } => {
            ensure!(
                rename.is_some() || says.from.is_some() || !says.set.is_empty(),
                "change policy {policy}: say what, with --set, --from or --rename"
            );
            let fleet = Fleet::open(&common.place)?;
            let before = find(&fleet, policy).await?;
            let name = rename.clone().unwrap_or(before.name);
            let asked = NewPolicy { name: name.clone(), policy: says.over(before.policy)? };
            let acted = fleet.act(Method::PUT, &format!("/policies/{}", before.id), &asked).await?;
            acted.say(common, &format!("The policy {name} is changed; {} groups follow it.", before.groups))
        }
        PolicyCommand::Delete { policy, certain, common } => {
            let fleet = Fleet::open(&common.place)?;
            let policy = find(&fleet, policy).await?;
            certain.ask("delete policy", policy.name.as_str(), "The policy will be gone.")?;
            let acted = fleet.destroy(&format!("/policies/{}", policy.id), policy.name.as_str()).await?;
            acted.say(common, &format!("The policy {} is gone.", policy.name))
        }
    }
}

fn render(policies: &[PolicyInfo]) -> String {
    let mut table =
        text::table(&["Policy", "A point every", "Older is trouble", "Kept", "Groups"], &[1, 2, 4]);
    for policy in policies {
        table.add_row([
            policy.name.to_string(),
            format!("{} ms", policy.policy.epoch_interval_ms),
            format!("{} s", policy.policy.rpo_s_max),
            policy.policy.retention_text(),
            policy.groups.to_string(),
        ]);
    }
    format!("{table}\n")
}

fn render_one(policy: &PolicyInfo) -> anyhow::Result<String> {
    let mut table = text::table(&["Key", "Value"], &[]);
    if let Value::Object(says) = serde_json::to_value(&policy.policy)? {
        for (key, value) in says {
            let value = if key == "retention" { policy.policy.retention_text() } else { value.to_string() };
            table.add_row([key, value]);
        }
    }
    Ok(format!("Policy {} ({}), followed by {} groups\n{table}\n", policy.name, policy.id, policy.groups))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_set_is_set_and_the_rest_stays() {
        let says = |set: &[&str]| Says { from: None, set: set.iter().map(|set| (*set).to_owned()).collect() };
        let before = Policy { time_zone: Some("UTC".into()), ..Policy::default() };
        let after = says(&["rpo_s_max=60", "time_zone=Europe/Berlin"]).over(before.clone()).unwrap();
        assert_eq!((after.rpo_s_max, after.time_zone.as_deref()), (60, Some("Europe/Berlin")));
        assert_eq!(after.retention, before.retention);
        assert_eq!(says(&["time_zone=null"]).over(before.clone()).unwrap().time_zone, None);
        for (bad, named) in [("rpo=60", "rpo"), ("rpo_s_max", "KEY=VALUE"), ("rpo_s_max=soon", "soon")] {
            let error = format!("{:#}", says(&[bad]).over(before.clone()).unwrap_err());
            assert!(error.contains(named), "{error}");
        }
    }
}
