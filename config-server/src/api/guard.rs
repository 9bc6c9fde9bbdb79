//! Who asks, whether they may, and that it is kept in the audit log. Every act passes here.

use std::net::SocketAddr;
use std::sync::Arc;

use axum::extract::{FromRequestParts, Request, State};
use axum::http::header::{AUTHORIZATION, COOKIE as COOKIE_HEADER};
use axum::http::request::Parts;
use axum::http::{HeaderMap, Method};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use control::fleet::{Name, PartRole, ProblemCode, ResourceId, Role, Scope, UnixMillis};
use sqlx::Row;
use wire::{Identity, Serial};

use crate::api::act::Need;
use crate::app::{App, Shared};
use crate::audit::{begin_audit, end_audit};
use crate::fault::{Answer, Fault, ProblemTag, fault, internal};
use crate::secret::{digest, same};

/// The cookie with a session's secret. Its prefix makes browsers refuse it from elsewhere and over plain HTTP.
pub(crate) const COOKIE: &str = "__Host-seawall";
/// The header with the session's second secret.
pub(crate) const CSRF_HEADER: &str = "x-seawall-csrf";
/// What the text of a token begins with, so that people and scanners know what they have found.
pub(crate) const TOKEN_PREFIX: &str = "swt_";

/// Who is at the other end of a connection, as far as TLS tells.
#[derive(Clone, Debug)]
pub(crate) struct Peer {
    pub(crate) address: SocketAddr,
    pub(crate) certificate: Option<(Identity, Serial)>,
}

/// Who asks.
#[derive(Clone, Debug)]
pub(crate) enum Caller {
    Nobody,
    /// With a session or with a token; then its scopes.
    Person {
        id: ResourceId,
        name: Name,
        role: Role,
        session: Option<String>,
        token: Option<(Name, Vec<Scope>)>,
    },
    Part {
        id: ResourceId,
        role: PartRole,
        name: Name,
    },
}

impl Caller {
    /// For the audit log and for people.
    pub(crate) fn shown(&self) -> String {
        match self {
            Caller::Nobody => "nobody".to_owned(),
            Caller::Person { name, token: None, .. } => format!("user {name}"),
            Caller::Person { name, token: Some((token, _)), .. } => format!("token {token} of {name}"),
            Caller::Part { role, name, .. } => format!("{role} {name}"),
        }
    }

    /// The person.
    pub(crate) fn person(&self) -> Answer<(&ResourceId, &Name)> {
        match self {
            Caller::Person { id, name, .. } => Ok((id, name)),
            _ => Err(unauthenticated("Nobody is logged in")),
        }
    }

    /// The part.
    pub(crate) fn part(&self) -> Answer<(&ResourceId, PartRole, &Name)> {
        match self {
            Caller::Part { id, role, name, .. } => Ok((id, *role, name)),
            _ => Err(unauthenticated("No part of the fleet asks")),
        }
    }

    fn satisfies(&self, need: Need) -> Answer<()> {
        match (need, self) {
            (Need::Nothing, _) | (Need::Part, Caller::Part { .. }) => Ok(()),
            (Need::Part, _) => {
                Err(unauthenticated("This is for parts of the fleet, which show a certificate"))
            }
            (Need::Person(..), Caller::Nobody) => Err(unauthenticated("Nobody is logged in")),
            (Need::Person(..), Caller::Part { role, name, .. }) => Err(fault(
                ProblemCode::Forbidden,
                format!("This is for people and their programs, not for {role} {name}"),
                "Log in, or send a token.",
            )),
            (Need::Person(needed, scope), Caller::Person { name, role, token, .. }) => {
                if *role < needed {
                    return Err(fault(
                        ProblemCode::Forbidden,
                        format!("{name} is a {role}; this is for a {needed}"),
                        "Ask an administrator to do it, or for the role.",
                    ));
                }
                match token {
                    Some((token, scopes)) if !allows(scopes, scope) => Err(fault(
                        ProblemCode::Forbidden,
                        format!("Token {token} of {name} has not the scope {}", scope.as_str()),
                        "Make a token with that scope.",
                    )),
                    _ => Ok(()),
                }
            }
        }
    }
}

/// Administering includes everything, and operating includes reading.
fn allows(scopes: &[Scope], needed: Scope) -> bool {
    scopes.iter().any(|scope| match (scope, needed) {
        (Scope::Administer, _) => true,
        (Scope::Operate, Scope::Read) => true,
        (scope, needed) => *scope == needed,
    })
}

impl<S: Send + Sync> FromRequestParts<S> for Caller {
    type Rejection = Fault;
    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Caller, Fault> {
        parts.extensions.get::<Caller>().cloned().ok_or_else(|| internal("know who asks", "no guard"))
    }
}

impl<S: Send + Sync> FromRequestParts<S> for Peer {
    type Rejection = Fault;
    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Peer, Fault> {
        parts.extensions.get::<Peer>().cloned().ok_or_else(|| internal("know who asks", "no peer"))
    }
}

/// What an act says of itself for the audit log.
#[derive(Clone, Debug)]
pub(crate) struct What(pub(crate) String);

/// What a guard knows.
#[derive(Clone)]
pub(crate) struct Guarded {
    pub(crate) app: Shared,
    pub(crate) need: Need,
    pub(crate) label: Arc<str>,
    pub(crate) audited: bool,
    /// What may be after the question mark.
    pub(crate) parameters: Arc<[&'static str]>,
}

pub(crate) async fn guard(State(guarded): State<Guarded>, mut request: Request, next: Next) -> Response {
    let Some(peer) = request.extensions().get::<Peer>().cloned() else {
        return internal("know who asks", "no peer").into_response();
    };
    let app = &guarded.app;
    let (caller, allowed) = match caller(app, &peer, request.headers(), request.method(), guarded.need).await
    {
        Ok(caller) => {
            let allowed = caller.satisfies(guarded.need);
            (caller, allowed)
        }
        Err(fault) => (Caller::Nobody, Err(fault)),
    };
    let entry = match guarded.audited {
        false => None,
        true => {
            let what = request.uri().path().chars().take(200).collect::<String>();
            match begin_audit(&app.store, &caller, &peer, &guarded.label, &what).await {
                Ok(entry) => Some(entry),
                // What cannot be written down is not done.
                Err(fault) => return fault.into_response(),
            }
        }
    };
    let response = match allowed {
        Err(fault) => fault.into_response(),
        Ok(()) if let Some(fault) = unknown_parameter(&request, &guarded.parameters) => fault.into_response(),
        Ok(()) => {
            request.extensions_mut().insert(caller);
            next.run(request).await
        }
    };
    if let Some(entry) = entry {
        let problem = response.extensions().get::<ProblemTag>().map_or("", |tag| tag.0.as_str());
        let what = response.extensions().get::<What>().map(|what| what.0.as_str());
        let status = response.status().as_u16();
        if let Err(fault) = end_audit(&app.store, entry, what, status, problem).await {
            tracing::error!(%fault, entry, status, "write an act's result into the audit log");
        }
    }
    response
}

/// Acts without parameters do not look at them at all; what is not looked at is refused, so that nobody relies on it.
fn unknown_parameter(request: &Request, known: &[&str]) -> Option<Fault> {
    let query = request.uri().query().unwrap_or_default();
    let mut names = query.split('&').map(|pair| pair.split('=').next().unwrap_or_default());
    let unknown = names.find(|name| !name.is_empty() && !known.contains(name))?;
    let expected = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
    Some(fault(
        ProblemCode::BadRequest,
        format!(
            "There is no parameter {:?} here; expected: {expected}",
            unknown.chars().take(80).collect::<String>()
        ),
        "Send what the OpenAPI document says: GET /api/v1/openapi.json.",
    ))
}

fn unauthenticated(detail: &str) -> Fault {
    fault(
        ProblemCode::Unauthenticated,
        detail,
        "Log in with POST /api/v1/login, send a token, or show a certificate.",
    )
}

async fn caller(app: &App, peer: &Peer, headers: &HeaderMap, method: &Method, need: Need) -> Answer<Caller> {
    if need == Need::Part {
        return match &peer.certificate {
            Some((identity, serial)) => part(app, identity, serial).await,
            None => Ok(Caller::Nobody),
        };
    }
    if let Some(value) = headers.get(AUTHORIZATION) {
        let token = value.to_str().ok().and_then(|value| value.strip_prefix("Bearer "));
        return match token {
            Some(token) => by_token(app, token.trim()).await,
            None => Err(unauthenticated("The Authorization header is not `Bearer TOKEN`")),
        };
    }
    match session_secret(headers) {
        Some(secret) => by_session(app, &secret, headers, method, need).await,
        None => Ok(Caller::Nobody),
    }
}

/// The secret of the session, from its cookie.
pub(crate) fn session_secret(headers: &HeaderMap) -> Option<String> {
    let cookies = headers.get_all(COOKIE_HEADER).iter().filter_map(|cookie| cookie.to_str().ok());
    let mut pairs =
        cookies.flat_map(|cookie| cookie.split(';')).filter_map(|pair| pair.trim().split_once('='));
    pairs.find(|(name, _)| *name == COOKIE).map(|(_, value)| value.to_owned())
}

/// The second secret of a session that goes on, for the forms of its own pages.
pub(crate) async fn csrf_of_session(app: &App, secret: &str) -> Answer<String> {
    let csrf = sqlx::query_scalar("SELECT csrf FROM sessions WHERE digest = $1 AND expires > $2")
        .bind(digest(secret))
        .bind(UnixMillis::now().0)
        .fetch_optional(&app.store.read)
        .await?;
    csrf.ok_or_else(|| unauthenticated("The session has ended"))
}

async fn by_session(
    app: &App,
    secret: &str,
    headers: &HeaderMap,
    method: &Method,
    need: Need,
) -> Answer<Caller> {
    let digest = digest(secret);
    let row = sqlx::query(
        "SELECT u.id, u.name, u.role, s.csrf FROM sessions s JOIN users u ON u.id = s.user_id
         WHERE s.digest = $1 AND s.expires > $2 AND u.disabled = 0",
    )
    .bind(&digest)
    .bind(UnixMillis::now().0)
    .fetch_optional(&app.store.read)
    .await?;
    let Some(row) = row else {
        if need == Need::Nothing {
            return Ok(Caller::Nobody);
        }
        return Err(unauthenticated("The session has ended"));
    };
    let changes = !matches!(*method, Method::GET | Method::HEAD);
    let csrf = headers.get(CSRF_HEADER).and_then(|csrf| csrf.to_str().ok()).unwrap_or_default();
    if changes && need != Need::Nothing && !same(csrf, &row.try_get::<String, _>("csrf")?) {
        return Err(fault(
            ProblemCode::Csrf,
            "The header X-Seawall-CSRF is missing, or is another session's",
            "Send the `csrf` of the login's answer in it.",
        ));
    }
    Ok(Caller::Person {
        id: parse(row.try_get("id")?)?,
        name: parse(row.try_get("name")?)?,
        role: parse(row.try_get("role")?)?,
        session: Some(digest),
        token: None,
    })
}

async fn by_token(app: &App, token: &str) -> Answer<Caller> {
    let unknown = || unauthenticated("The token is unknown, has ended, or its user is disabled");
    if !token.starts_with(TOKEN_PREFIX) {
        return Err(unknown());
    }
    let row = sqlx::query(
        "SELECT u.id, u.name, u.role, t.name AS token, t.scopes FROM api_tokens t JOIN users u ON u.id = t.user_id
         WHERE t.digest = $1 AND t.expires > $2 AND u.disabled = 0",
    )
    .bind(digest(token))
    .bind(UnixMillis::now().0)
    .fetch_optional(&app.store.read)
    .await?
    .ok_or_else(unknown)?;
    let scopes: String = row.try_get("scopes")?;
    Ok(Caller::Person {
        id: parse(row.try_get("id")?)?,
        name: parse(row.try_get("name")?)?,
        role: parse(row.try_get("role")?)?,
        session: None,
        token: Some((parse(row.try_get("token")?)?, read_scopes(&scopes)?)),
    })
}

/// Scopes as they are kept: their names with spaces.
pub(crate) fn read_scopes(text: &str) -> Answer<Vec<Scope>> {
    text.split_whitespace().map(|scope| parse(scope.to_owned())).collect()
}

/// A text of the store as what it is.
pub(crate) fn parse<T: std::str::FromStr>(text: String) -> Answer<T>
where
    T::Err: std::fmt::Display,
{
    text.parse().map_err(|error| internal("read its store", error))
}

async fn part(app: &App, identity: &Identity, serial: &Serial) -> Answer<Caller> {
    let role = part_role(identity.role).ok_or_else(|| {
        fault(
            ProblemCode::Forbidden,
            format!("This is for agents, process servers and target servers, not for {identity}"),
            "Enrol the part, and use its certificate.",
        )
    })?;
    let row = sqlx::query(
        "SELECT p.id, c.revoked, c.part_id AS owner FROM parts p LEFT JOIN certificates c ON c.serial = $1
         WHERE p.role = $2 AND p.live_name = $3",
    )
    .bind(serial.as_str())
    .bind(role.as_str())
    .bind(&identity.name)
    .fetch_optional(&app.store.read)
    .await?;
    let unknown = || {
        fault(
            ProblemCode::Revoked,
            format!("The fleet has no {identity} with the certificate {}", serial.as_str()),
            "Enrol it again, with a new token.",
        )
    };
    let row = row.ok_or_else(unknown)?;
    let id: String = row.try_get("id")?;
    // A certificate that the store does not know was issued after the backup that the store was restored from.
    if row.try_get::<Option<i64>, _>("revoked")?.unwrap_or(0) != 0
        || row.try_get::<Option<String>, _>("owner")?.is_some_and(|owner| owner != id)
    {
        return Err(unknown());
    }
    Ok(Caller::Part { id: parse(id)?, role, name: parse(identity.name.clone())? })
}

pub(crate) fn part_role(role: wire::Role) -> Option<PartRole> {
    match role {
        wire::Role::Agent => Some(PartRole::Agent),
        wire::Role::ProcessServer => Some(PartRole::ProcessServer),
        wire::Role::TargetServer => Some(PartRole::TargetServer),
        wire::Role::ConfigServer | wire::Role::Operator => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scopes_include_what_is_less() {
        for (has, needed, allowed) in [
            (Scope::Read, Scope::Read, true),
            (Scope::Read, Scope::Operate, false),
            (Scope::Operate, Scope::Read, true),
            (Scope::Operate, Scope::Enrol, false),
            (Scope::Enrol, Scope::Read, false),
            (Scope::Operate, Scope::Administer, false),
            (Scope::Administer, Scope::Enrol, true),
        ] {
            assert_eq!(allows(&[has], needed), allowed, "{has:?} for {needed:?}");
        }
    }
}
