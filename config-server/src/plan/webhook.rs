//! Telling something else by HTTP.

use control::fleet::plan::PlanWebhook;
use tokio::net::lookup_host;

use super::effect::Trouble;
use crate::alert::web_agent;

/// Sends it; `key` is the same each time that the same step is tried, so that a receiver can know it again.
pub(super) async fn send(webhook: &PlanWebhook, key: String) -> Result<String, Trouble> {
    let asked = webhook.clone();
    let sent = tokio::task::spawn_blocking(move || send_now(&asked, &key)).await;
    sent.map_err(|error| Trouble::Final(format!("send the webhook: {error}")))?
}

fn send_now(webhook: &PlanWebhook, key: &str) -> Result<String, Trouble> {
    let host = host(webhook);
    let mut request = ureq::http::Request::builder()
        .method(webhook.method.as_str())
        .uri(&webhook.url)
        .header("Idempotency-Key", key);
    for (name, value) in &webhook.headers {
        request = request.header(name, value);
    }
    let has_type = webhook.headers.keys().any(|name| name.eq_ignore_ascii_case("content-type"));
    if webhook.method.has_body() && !has_type {
        request = request.header("Content-Type", "application/json");
    }
    let agent = web_agent();
    let senseless = |error: ureq::http::Error| Trouble::Final(format!("ask {host}: {error}"));
    let sent = match webhook.method.has_body() {
        true => agent.run(request.body(webhook.body.clone()).map_err(senseless)?),
        false => agent.run(request.body(()).map_err(senseless)?),
    };
    match sent {
        Ok(response) if response.status().is_success() => {
            Ok(format!("{host} answered {}.", response.status().as_u16()))
        }
        Ok(response) => Err(Trouble::Final(format!(
            "{host} answered {}; redirections are not followed",
            response.status()
        ))),
        Err(ureq::Error::StatusCode(status)) if status >= 500 || status == 429 => {
            Err(Trouble::Passing(format!("{host} answered {status}")))
        }
        Err(ureq::Error::StatusCode(status)) => Err(Trouble::Final(format!("{host} answered {status}"))),
        Err(error @ (ureq::Error::BadUri(_) | ureq::Error::Http(_))) => {
            Err(Trouble::Final(format!("ask {host}: {error}")))
        }
        Err(error) => Err(Trouble::Passing(format!("ask {host}: {error}"))),
    }
}

/// Looks whether the host's name means something.
pub(super) async fn check(webhook: &PlanWebhook) -> Result<String, Trouble> {
    let host = host(webhook);
    let usual = if webhook.url.starts_with("https:") { 443 } else { 80 };
    let has_port = host.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok());
    let place = if has_port { host.clone() } else { format!("{host}:{usual}") };
    let found = lookup_host(&place).await.map(|mut found| found.next());
    match found {
        Ok(Some(address)) => Ok(format!("{host} is {}; it was not asked.", address.ip())),
        Ok(None) => Err(Trouble::Passing(format!("{host} has no address"))),
        Err(error) => Err(Trouble::Passing(format!("find the host {host}: {error}"))),
    }
}

/// The URL's host and port, without what may be secret.
fn host(webhook: &PlanWebhook) -> String {
    let rest = webhook.url.split_once("://").map_or(webhook.url.as_str(), |(_, rest)| rest);
    let place = rest.split(['/', '?', '#']).next().unwrap_or_default();
    place.rsplit_once('@').map_or(place, |(_, host)| host).to_owned()
}
