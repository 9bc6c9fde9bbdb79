//! The commands that speak to the config server: as whom is said by a profile, which `seawall login` makes.

pub(crate) mod alert;
pub(crate) mod api;
pub(crate) mod api_token;
pub(crate) mod approval;
pub(crate) mod change;
pub(crate) mod discover;
pub(crate) mod drill;
pub(crate) mod events;
pub(crate) mod failover;
pub(crate) mod group;
pub(crate) mod home;
pub(crate) mod job;
pub(crate) mod login;
pub(crate) mod look;
pub(crate) mod machine;
pub(crate) mod plan;
pub(crate) mod policy;
pub(crate) mod protect;
pub(crate) mod push;
pub(crate) mod server;
pub(crate) mod setting;
pub(crate) mod token;
pub(crate) mod user;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::Context;
use block::UnixNanos;
use clap::Args;
use control::fleet::{MachineInfo, Page, ProblemCode, ResourceId, UnixMillis};
use enrol::{Client, EnrolError, Profile};
use hyper::Method;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::exit::{Exit, stop};
use crate::text;

/// Entries that are asked for at once; the config server gives no more.
const PAGE_ENTRIES: usize = 1000;

/// Whoever watches asks again after so long when the config server does not answer.
const AGAIN_AFTER: Duration = Duration::from_secs(2);
/// A config server that does not answer for so long ends the watching; what it does goes on.
const SILENT_TIME_MAX: Duration = Duration::from_secs(300);

/// Where the profile is.
#[derive(Clone, Debug, Default, Args)]
pub(crate) struct ProfilePlace {
    /// Profile that `seawall login` made [default: $SEAWALL_PROFILE, else ~/.config/seawall/profile.toml]
    #[arg(long, value_name = "FILE")]
    profile: Option<PathBuf>,
}

impl ProfilePlace {
    pub(crate) fn find(&self) -> anyhow::Result<PathBuf> {
        let named =
            |variable| std::env::var_os(variable).filter(|value| !value.is_empty()).map(PathBuf::from);
        if let Some(profile) = self.profile.clone().or_else(|| named("SEAWALL_PROFILE")) {
            return Ok(profile);
        }
        let configuration = named("XDG_CONFIG_HOME").or_else(|| Some(named("HOME")?.join(".config")));
        let configuration =
            configuration.context("find the profile: HOME is not set; name a file with --profile")?;
        Ok(configuration.join("seawall/profile.toml"))
    }
}

/// The config server, to whoever has logged in.
#[derive(Debug)]
pub(crate) struct Fleet {
    client: Client,
}

impl Fleet {
    pub(crate) fn open(place: &ProfilePlace) -> anyhow::Result<Fleet> {
        let path = place.find()?;
        let profile = match Profile::load(&path) {
            Err(EnrolError::File { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
                return Err(stop(
                    Exit::Refused,
                    format!(
                        "read profile {}: there is none; log in with `seawall login --server URL --fingerprint HEX`, \
                         or name another one with --profile",
                        path.display()
                    ),
                ));
            }
            loaded => loaded?,
        };
        let client = profile.client().map_err(advise)?;
        Ok(Fleet { client })
    }

    pub(crate) fn client(&self) -> &Client {
        &self.client
    }

    pub(crate) async fn get<R: DeserializeOwned>(&self, path: &str) -> anyhow::Result<R> {
        self.client.get(path).await.map_err(advise)
    }

    /// Like [`Fleet::get`], but waits for a config server that does not answer, for example because it starts anew.
    pub(crate) async fn get_patiently<R: DeserializeOwned>(
        &self,
        path: &str,
        mut waiting: impl FnMut(&EnrolError),
    ) -> anyhow::Result<R> {
        let began = Instant::now();
        loop {
            match self.client.get(path).await {
                Err(error) if error.is_retryable() && began.elapsed() < SILENT_TIME_MAX => {
                    waiting(&error);
                    tokio::time::sleep(AGAIN_AFTER).await;
                }
                answered => return answered.map_err(advise),
            }
        }
    }

    pub(crate) async fn post<B: Serialize, R: DeserializeOwned>(
        &self,
        path: &str,
        body: &B,
    ) -> anyhow::Result<R> {
        self.client.post(path, body).await.map_err(advise)
    }

    pub(crate) async fn delete(&self, path: &str) -> anyhow::Result<()> {
        self.client.call(Method::DELETE, path, None::<&()>).await.map_err(advise)
    }

    /// A whole list, which the config server gives in parts.
    pub(crate) async fn all<R: DeserializeOwned>(&self, path: &str) -> anyhow::Result<Vec<R>> {
        let mut all = Vec::new();
        let mut after = String::new();
        loop {
            let part: Page<R> = self.get(&format!("{path}?limit={PAGE_ENTRIES}{after}")).await?;
            all.extend(part.items);
            match part.next {
                Some(next) => after = format!("&after={next}"),
                None => return Ok(all),
            }
        }
    }

    /// The machine of this name or id.
    pub(crate) async fn machine(&self, named: &str) -> anyhow::Result<MachineInfo> {
        let machines: Vec<MachineInfo> = self.all("/machines").await?;
        let found =
            machines.iter().find(|machine| machine.name.as_str() == named || machine.id.as_str() == named);
        let Some(found) = found else {
            return Err(not_there("machine", named, machines.iter().map(|machine| machine.name.as_str())));
        };
        self.get(&format!("/machines/{}", found.id)).await
    }
}

/// The id of the one of this name.
fn id_of<'a>(
    what: &str,
    named: &str,
    mut there: impl Iterator<Item = (&'a str, &'a ResourceId)> + Clone,
) -> anyhow::Result<ResourceId> {
    let names = there.clone().map(|(name, _)| name);
    match there.find(|(name, _)| *name == named) {
        Some((_, id)) => Ok(id.clone()),
        None => Err(not_there(what, named, names)),
    }
}

/// What was named is not among these.
fn not_there<'a>(what: &str, named: &str, names: impl Iterator<Item = &'a str>) -> anyhow::Error {
    stop(Exit::NotFound, format!("find {what} {named}: {}", there_are(names)))
}

/// Names shown where one was not found.
const NAMES_SHOWN: usize = 10;

/// `there is none of that name; there are a, b`
fn there_are<'a>(names: impl Iterator<Item = &'a str>) -> String {
    let names: Vec<&str> = names.collect();
    match names.len() {
        0 => "there is none at all yet".to_owned(),
        count if count > NAMES_SHOWN => {
            format!("none of {count} is called so; there are {}, ...", names[..NAMES_SHOWN].join(", "))
        }
        _ => format!("none is called so; there are {}", names.join(", ")),
    }
}

/// The error, with what to do.
fn advise(error: EnrolError) -> anyhow::Error {
    match &error {
        EnrolError::Unreachable { .. } => stop(
            Exit::Unreachable,
            format!(
                "{error}. Look whether it runs (`seawall-config-server run`) and whether the network lets the port through."
            ),
        ),
        EnrolError::Tls { .. } => anyhow::anyhow!(
            "{error}. Compare the fingerprint with the one that `seawall-config-server check-config` prints there; \
             `seawall login` with the right one mends the profile."
        ),
        EnrolError::Problem(problem) if problem.is(ProblemCode::Unauthenticated) => {
            stop(Exit::Refused, format!("{}; log in again with `seawall login`", problem.detail))
        }
        _ => anyhow::Error::new(error),
    }
}

/// An instant in this machine's time zone.
fn moment(time: UnixMillis) -> String {
    let nanos = u64::try_from(time.0).unwrap_or_default().saturating_mul(1_000_000);
    text::instant(UnixNanos(nanos)).0
}

/// How long ago.
fn ago(time: UnixMillis) -> String {
    let ms = UnixMillis::now().since(time);
    let span = Duration::from_millis(u64::try_from(ms).unwrap_or_default());
    format!("{} ago", text::span(span))
}

/// One JSON object on a line.
fn say_json(value: &impl Serialize) -> anyhow::Result<()> {
    Ok(text::say(&format!("{}\n", serde_json::to_string(value)?))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_there_is_is_named() {
        assert_eq!(there_are(["a", "b"].into_iter()), "none is called so; there are a, b");
        assert!(there_are(std::iter::empty()).contains("none at all"));
        let many: Vec<String> = (0..11).map(|number| number.to_string()).collect();
        let shown = there_are(many.iter().map(String::as_str));
        assert!(shown.contains("none of 11") && shown.ends_with("9, ..."), "{shown}");
    }

    #[test]
    fn a_problem_keeps_its_mend_and_a_lost_login_says_so() {
        let problem =
            |code| EnrolError::Problem(Box::new(control::fleet::Problem::new(code, "What", "Mend.")));
        assert_eq!(advise(problem(ProblemCode::Conflict)).to_string(), "What; Mend.");
        let shown = advise(problem(ProblemCode::Unauthenticated)).to_string();
        assert_eq!(shown, "What; log in again with `seawall login`");
    }
}
