//! How parts come into the fleet, and go.

use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use block::GroupId;
use control::fleet::{
    Enrol, EnrolTokenInfo, Enrolled, EventKind, MadeEnrolToken, Name, NewEnrolToken, PartRole, ProblemCode,
    Renew, Renewed, ResourceId, UnixMillis,
};
use sqlx::Row;
use sqlx::any::AnyRow;
use wire::{Identity, ServerNames, Signed};

use crate::api::extract::{Body, Id};
use crate::api::guard::{Caller, parse};
use crate::app::{App, Shared};
use crate::fault::{Answer, conflict, fault, internal, invalid, not_found};
use crate::secret::{digest, new_id, new_secret};
use crate::store::{Act, Counter, Said, count, say};

/// How long a part's certificate is good. Parts renew theirs when a third of it is left.
pub(crate) const CERTIFICATE_TIME: Duration = Duration::from_secs(90 * 86_400);
/// The longest life of a token, in minutes.
pub(crate) const ENROL_TOKEN_MINUTES_MAX: u32 = 7 * 24 * 60;
/// How long a token for a server in the same process is good, in minutes: it is used at once.
const INVITATION_MINUTES: u32 = 5;
/// Tokens that are not used yet. More are refused.
pub(crate) const ENROL_TOKENS_MAX: i64 = 1000;
/// Parts of a fleet. More are refused.
pub(crate) const PARTS_MAX: i64 = 10_000;
/// Certificates of one part that have not ended. More are refused, so that a part that has gone wild does not fill the store.
pub(crate) const CERTIFICATES_OF_PART_MAX: i64 = 64;

pub(crate) async fn new_token(
    State(app): State<Shared>,
    caller: Caller,
    Body(asked): Body<NewEnrolToken>,
) -> Answer<(StatusCode, Json<MadeEnrolToken>)> {
    Ok((StatusCode::CREATED, Json(make_token(&app, asked, caller.shown()).await?)))
}

/// A token for one of the servers that run in one process with this one. Who would ask the API is not known there after the
/// first start. A part of that name that enrolled and never reported is one whose enrolment was cut short, and makes room.
pub(crate) async fn invite(app: &Shared, role: PartRole, name: &Name) -> Answer<MadeEnrolToken> {
    let mut act = app.store.act().await?;
    let cut_short: Vec<String> =
        sqlx::query_scalar("SELECT id FROM parts WHERE role = $1 AND live_name = $2 AND seen = 0")
            .bind(role.as_str())
            .bind(name.as_str())
            .fetch_all(&mut *act)
            .await?;
    for id in cut_short {
        remove_part(&mut act, role, &parse(id)?).await?;
    }
    act.commit().await?;
    let asked = NewEnrolToken { role, name: Some(name.clone()), minutes: INVITATION_MINUTES };
    make_token(app, asked, "the config server's own process".to_owned()).await
}

async fn make_token(app: &Shared, asked: NewEnrolToken, created_by: String) -> Answer<MadeEnrolToken> {
    if !(1..=ENROL_TOKEN_MINUTES_MAX).contains(&asked.minutes) {
        return Err(invalid(format!(
            "minutes is {}, expected 1 to {ENROL_TOKEN_MINUTES_MAX}",
            asked.minutes
        )));
    }
    let secret = new_secret();
    let created = UnixMillis::now();
    let info = EnrolTokenInfo {
        id: new_id(),
        role: asked.role,
        name: asked.name,
        created,
        expires: created.plus(Duration::from_secs(u64::from(asked.minutes) * 60)),
        created_by,
        used_by: None,
    };
    let mut act = app.store.act().await?;
    sqlx::query("DELETE FROM enrol_tokens WHERE expires < $1").bind(created.0).execute(&mut *act).await?;
    let there: i64 = sqlx::query_scalar("SELECT COUNT(*) FROM enrol_tokens WHERE used_by = ''")
        .fetch_one(&mut *act)
        .await?;
    if there >= ENROL_TOKENS_MAX {
        let detail = format!("There are {there} tokens that are not used");
        return Err(fault(ProblemCode::Limit, detail, "Delete some, or wait until they end."));
    }
    sqlx::query(
        "INSERT INTO enrol_tokens (id, digest, role, name, created, expires, created_by, used_by)
         VALUES ($1, $2, $3, $4, $5, $6, $7, '')",
    )
    .bind(info.id.as_str())
    .bind(digest(&secret))
    .bind(info.role.as_str())
    .bind(info.name.as_ref().map_or("", Name::as_str))
    .bind(created.0)
    .bind(info.expires.0)
    .bind(&info.created_by)
    .execute(&mut *act)
    .await?;
    act.commit().await?;
    let token = format!("{secret}.{}", app.fingerprint);
    Ok(MadeEnrolToken { token, info })
}

pub(crate) async fn tokens(State(app): State<Shared>) -> Answer<Json<Vec<EnrolTokenInfo>>> {
    let rows = sqlx::query("SELECT * FROM enrol_tokens WHERE expires > $1 ORDER BY created")
        .bind(UnixMillis::now().0)
        .fetch_all(&app.store.read)
        .await?;
    let named = |text: String| if text.is_empty() { Ok(None) } else { parse(text).map(Some) };
    let token = |row: &AnyRow| -> Answer<EnrolTokenInfo> {
        Ok(EnrolTokenInfo {
            id: parse(row.try_get("id")?)?,
            role: parse(row.try_get("role")?)?,
            name: named(row.try_get("name")?)?,
            created: UnixMillis(row.try_get("created")?),
            expires: UnixMillis(row.try_get("expires")?),
            created_by: row.try_get("created_by")?,
            used_by: named(row.try_get("used_by")?)?,
        })
    };
    Ok(Json(rows.iter().map(token).collect::<Answer<_>>()?))
}

pub(crate) async fn delete_token(State(app): State<Shared>, Id(id): Id<ResourceId>) -> Answer<StatusCode> {
    let mut act = app.store.act().await?;
    let gone =
        sqlx::query("DELETE FROM enrol_tokens WHERE id = $1").bind(id.as_str()).execute(&mut *act).await?;
    if gone.rows_affected() == 0 {
        return Err(not_found("token", id));
    }
    act.commit().await?;
    Ok(StatusCode::NO_CONTENT)
}

/// A part that enrols. Whoever has the token may, once.
pub(crate) async fn enrol(
    State(app): State<Shared>,
    Body(asked): Body<Enrol>,
) -> Answer<(StatusCode, Json<Enrolled>)> {
    let refused = || {
        fault(
            ProblemCode::Unauthenticated,
            "The token is unknown, was used, has ended, or is for another kind of part",
            "Make a new one: seawall token create.",
        )
    };
    // What follows the dot is for the part.
    let secret = asked.token.split('.').next().unwrap_or_default();
    let now = UnixMillis::now();
    let id = new_id();
    let mut act = app.store.act().await?;
    // Taking the token is one statement: two that come at once cannot both have it.
    let token_name: Option<String> = sqlx::query_scalar(
        "UPDATE enrol_tokens SET used_by = CASE WHEN name = '' THEN $1 ELSE name END
         WHERE digest = $2 AND role = $3 AND used_by = '' AND expires > $4 RETURNING name",
    )
    .bind(asked.name.as_str())
    .bind(digest(secret))
    .bind(asked.role.as_str())
    .bind(now.0)
    .fetch_optional(&mut *act)
    .await?;
    let token_name = token_name.ok_or_else(refused)?;
    let name: Name = if token_name.is_empty() { asked.name } else { parse(token_name)? };
    let taken: i64 = sqlx::query_scalar("SELECT COUNT(*) FROM parts WHERE role = $1 AND live_name = $2")
        .bind(asked.role.as_str())
        .bind(name.as_str())
        .fetch_one(&mut *act)
        .await?;
    if taken > 0 {
        return Err(conflict(
            format!("There is a {} {name} already", asked.role),
            "Choose another name with --name, or remove the old one first.",
        ));
    }
    let parts: i64 = sqlx::query_scalar("SELECT COUNT(*) FROM parts").fetch_one(&mut *act).await?;
    if parts >= PARTS_MAX {
        return Err(fault(
            ProblemCode::Limit,
            format!("The fleet has {parts} parts"),
            "Remove those that are gone.",
        ));
    }
    let group = (asked.role == PartRole::Agent).then(|| group_of(&new_id())).transpose()?;
    let signed = sign(&app, asked.role, &name, group, &asked.request)?;
    sqlx::query(
        "INSERT INTO parts (id, role, name, live_name, group_id, enrolled, removed, address, sealing_key, version, seen,
             silent, clock_ahead, certificate_expires, state, trouble, digest, report, disks, bytes_total, bytes_free)
         VALUES ($1, $2, $3, $3, $4, $5, 0, '', '', '', 0, 0, 0, $6, 'unknown', '', '', '', '[]', 0, 0)",
    )
    .bind(id.as_str())
    .bind(asked.role.as_str())
    .bind(name.as_str())
    .bind(group.map_or_else(String::new, |group| group.to_string()))
    .bind(now.0)
    .bind(UnixMillis::from(signed.expires).0)
    .execute(&mut *act)
    .await?;
    keep_certificate(&mut act, &id, &signed).await?;
    let subject = format!("{}/{id}", collection(asked.role));
    say(&mut act, Said::new(EventKind::Enrolled, subject, format!("The {} {name} enrolled", asked.role)))
        .await?;
    act.commit().await?;
    Ok((
        StatusCode::CREATED,
        Json(Enrolled {
            id,
            name,
            group,
            certificate: signed.certificate_pem,
            authority: app.authority.certificate_pem().to_owned(),
            expires: signed.expires.into(),
        }),
    ))
}

/// Where parts of a kind are in the API.
pub(crate) fn collection(role: PartRole) -> &'static str {
    match role {
        PartRole::Agent => "machines",
        PartRole::ProcessServer => "process-servers",
        PartRole::TargetServer => "target-servers",
    }
}

fn group_of(id: &ResourceId) -> Answer<GroupId> {
    parse(id.as_str().to_owned())
}

fn wire_role(role: PartRole) -> wire::Role {
    match role {
        PartRole::Agent => wire::Role::Agent,
        PartRole::ProcessServer => wire::Role::ProcessServer,
        PartRole::TargetServer => wire::Role::TargetServer,
    }
}

fn sign(app: &App, role: PartRole, name: &Name, group: Option<GroupId>, request: &str) -> Answer<Signed> {
    let identity = Identity::new(wire_role(role), name.as_str(), group)
        .map_err(|error| invalid(format!("The name cannot be used: {error}")))?;
    app.authority
        .sign(request, &identity, &ServerNames::default(), CERTIFICATE_TIME)
        .map_err(|error| invalid(format!("The request for a certificate cannot be used: {error}")))
}

async fn keep_certificate(act: &mut Act, part: &ResourceId, signed: &Signed) -> Answer<()> {
    sqlx::query("INSERT INTO certificates (serial, part_id, expires, revoked) VALUES ($1, $2, $3, 0)")
        .bind(signed.serial.as_str())
        .bind(part.as_str())
        .bind(UnixMillis::from(signed.expires).0)
        .execute(&mut **act)
        .await?;
    Ok(())
}

/// A part's next certificate, for a new key.
pub(crate) async fn renew(
    State(app): State<Shared>,
    caller: Caller,
    Body(asked): Body<Renew>,
) -> Answer<(StatusCode, Json<Renewed>)> {
    let (id, role, name) = caller.part()?;
    let group: String = sqlx::query_scalar("SELECT group_id FROM parts WHERE id = $1")
        .bind(id.as_str())
        .fetch_one(&app.store.read)
        .await?;
    let group = if group.is_empty() { None } else { Some(parse(group)?) };
    let signed = sign(&app, role, name, group, &asked.request)?;
    let now = UnixMillis::now();
    let mut act = app.store.act().await?;
    // Nobody needs to know of those that have ended.
    sqlx::query("DELETE FROM certificates WHERE expires < $1").bind(now.0).execute(&mut *act).await?;
    let there: i64 = sqlx::query_scalar("SELECT COUNT(*) FROM certificates WHERE part_id = $1")
        .bind(id.as_str())
        .fetch_one(&mut *act)
        .await?;
    if there >= CERTIFICATES_OF_PART_MAX {
        let detail = format!("The {role} {name} has {there} certificates that have not ended");
        return Err(fault(
            ProblemCode::Limit,
            detail,
            "Look why it asks so often; remove it and enrol it again.",
        ));
    }
    keep_certificate(&mut act, id, &signed).await?;
    act.commit().await?;
    Ok((
        StatusCode::CREATED,
        Json(Renewed {
            certificate: signed.certificate_pem,
            authority: app.authority.certificate_pem().to_owned(),
            expires: signed.expires.into(),
        }),
    ))
}

/// Takes a part out of the fleet, and its certificates out of belief.
pub(crate) async fn remove_part(act: &mut Act, role: PartRole, id: &ResourceId) -> Answer<()> {
    let name: Option<String> =
        sqlx::query_scalar("SELECT name FROM parts WHERE id = $1 AND role = $2 AND removed = 0")
            .bind(id.as_str())
            .bind(role.as_str())
            .fetch_optional(&mut **act)
            .await?;
    let name = name.ok_or_else(|| not_found(role.as_str(), id))?;
    let used: i64 = match role {
        PartRole::Agent => {
            sqlx::query_scalar(
                "SELECT COUNT(*) FROM protection_groups WHERE machine_id = $1 AND state = 'protected'",
            )
            .bind(id.as_str())
            .fetch_one(&mut **act)
            .await?
        }
        PartRole::ProcessServer => {
            sqlx::query_scalar(
                "SELECT COUNT(*) FROM protection_groups WHERE process_id = $1 AND state <> 'removed'",
            )
            .bind(id.as_str())
            .fetch_one(&mut **act)
            .await?
        }
        PartRole::TargetServer => {
            sqlx::query_scalar(
                "SELECT COUNT(*) FROM group_targets t JOIN protection_groups g ON g.id = t.group_id
                 WHERE t.target_id = $1 AND g.state <> 'removed'",
            )
            .bind(id.as_str())
            .fetch_one(&mut **act)
            .await?
        }
    };
    if used > 0 {
        return Err(conflict(
            format!("The {role} {name} is used by {used} groups"),
            "End their protection, move or remove them first.",
        ));
    }
    let revoked = count(act, Counter::Revoked).await?;
    sqlx::query("UPDATE certificates SET revoked = $1 WHERE part_id = $2 AND revoked = 0")
        .bind(revoked)
        .bind(id.as_str())
        .execute(&mut **act)
        .await?;
    sqlx::query("UPDATE parts SET removed = $1, live_name = id WHERE id = $2")
        .bind(UnixMillis::now().0)
        .bind(id.as_str())
        .execute(&mut **act)
        .await?;
    count(act, Counter::Declared).await?;
    let message = format!("The {role} {name} was removed, and its certificates revoked");
    say(act, Said::new(EventKind::Removed, format!("{}/{id}", collection(role)), message)).await?;
    Ok(())
}

/// The certificates that are revoked and have not ended.
pub(crate) async fn revoked(app: &App) -> Answer<control::fleet::Revoked> {
    let mut from = app.store.read.acquire().await?;
    let version = crate::store::read_count(&mut from, Counter::Revoked).await?;
    let serials: Vec<String> = sqlx::query_scalar(
        "SELECT serial FROM certificates WHERE revoked > 0 AND expires > $1 ORDER BY serial LIMIT $2",
    )
    .bind(UnixMillis::now().0)
    .bind(i64::try_from(wire::REVOKED_MAX).map_err(|error| internal("count", error))?)
    .fetch_all(&mut *from)
    .await?;
    Ok(control::fleet::Revoked { version, serials })
}
