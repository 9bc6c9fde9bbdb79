//! `seawall api`: any act of the config server's API, for what has no command of its own.

use anyhow::{Context, bail};
use clap::Args;
use hyper::Method;
use serde_json::Value;

use super::{Fleet, ProfilePlace, advise};
use crate::text;

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  seawall api GET /overview
  seawall api GET /events?last=5 | jq -r '.items[].message'
  seawall api POST /groups/0123456789abcdef0123456789abcdef/resync

GET /openapi.json lists every act, with what it takes and gives. The answer is JSON; where there is none, nothing is written.")]
pub(crate) struct ApiOptions {
    #[command(flatten)]
    place: ProfilePlace,
    /// GET, POST, PUT, PATCH or DELETE
    #[arg(value_name = "METHOD", value_parser = method)]
    method: Method,
    /// Below /api/v1, as in /groups
    #[arg(value_name = "PATH", value_parser = path)]
    path: String,
    /// What is sent, JSON
    #[arg(value_name = "JSON", value_parser = body)]
    body: Option<Value>,
}

fn method(text: &str) -> Result<Method, String> {
    let known = [Method::GET, Method::POST, Method::PUT, Method::PATCH, Method::DELETE];
    let found = known.into_iter().find(|method| method.as_str().eq_ignore_ascii_case(text));
    found.ok_or_else(|| "expected GET, POST, PUT, PATCH or DELETE".to_owned())
}

fn path(text: &str) -> Result<String, String> {
    let plain = text.starts_with('/') && text.bytes().all(|byte| byte.is_ascii_graphic());
    if plain { Ok(text.to_owned()) } else { Err("expected a path below /api/v1, as in /groups".to_owned()) }
}

fn body(text: &str) -> Result<Value, String> {
    serde_json::from_str(text).map_err(|error| format!("it is no JSON: {error}"))
}

pub(crate) async fn run(options: &ApiOptions) -> anyhow::Result<()> {
    let ApiOptions { place, method, path, body } = options;
    if *method == Method::GET && body.is_some() {
        bail!("GET {path}: GET sends nothing; leave the JSON out");
    }
    // Whatever changes something has a body, if an empty one.
    let empty = Value::Object(serde_json::Map::new());
    let body = (*method != Method::GET).then(|| body.as_ref().unwrap_or(&empty));
    let answer: Value =
        Fleet::open(place)?.client().call(method.clone(), path, body).await.map_err(advise)?;
    if answer.is_null() {
        return Ok(());
    }
    let answer = serde_json::to_string(&answer).context("write the answer")?;
    Ok(text::say(&format!("{answer}\n"))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_act_is_refused_before_it_is_sent() {
        assert_eq!(method("patch"), Ok(Method::PATCH));
        assert!(method("BREW").unwrap_err().contains("DELETE"));
        assert!(path("groups").is_err() && path("/a b").is_err() && path("/groups?limit=1").is_ok());
        assert!(body("{").unwrap_err().contains("no JSON"));
    }
}
