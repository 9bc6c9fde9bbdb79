//! Logging in, users, tokens for programs.

use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::http::header::SET_COOKIE;
use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use control::fleet::{
    ApiTokenInfo, AuditEntry, ChangePassword, ChangeUser, EventKind, Login, MadeToken, Name, NewApiToken,
    NewUser, Page, ProblemCode, ResourceId, Role, Scope, Session, UnixMillis, UserInfo,
};
use sqlx::any::AnyRow;
use sqlx::{AnyConnection, Row};

use crate::api::extract::{Body, Id, Part, Query};
use crate::api::guard::{COOKIE, Caller, Peer, TOKEN_PREFIX, parse, read_scopes};
use crate::app::Shared;
use crate::audit::audit_before;
use crate::fault::{Answer, conflict, fault, internal, invalid, not_found};
use crate::secret::{PASSWORD_BYTES, digest, hash_password, is_password, new_id, new_secret};
use crate::store::{Act, Said, say};

/// How long a session lasts.
pub(crate) const SESSION_TIME: Duration = Duration::from_secs(12 * 60 * 60);
/// Within this time failed logins are counted.
pub(crate) const LOGIN_WINDOW: Duration = Duration::from_secs(5 * 60);
/// Logins with one name from one address within the window.
pub(crate) const LOGINS_OF_NAME_AND_ADDRESS_MAX: i64 = 5;
/// Logins from one address within the window.
pub(crate) const LOGINS_OF_ADDRESS_MAX: i64 = 30;
/// Logins with one name within the window, from everywhere. High, since anybody can lock others out by it.
pub(crate) const LOGINS_OF_NAME_MAX: i64 = 100;
/// Users. More are refused.
pub(crate) const USERS_MAX: i64 = 1000;
/// Tokens of one user. More are refused.
pub(crate) const TOKENS_OF_USER_MAX: i64 = 100;
/// Scopes of one token: there are no more.
const SCOPES_MAX: usize = 4;
/// The longest life of a token, in days.
pub(crate) const TOKEN_DAYS_MAX: u32 = 366;

pub(crate) async fn login(
    State(app): State<Shared>,
    peer: Peer,
    Body(asked): Body<Login>,
) -> Answer<Response> {
    let address = peer.address.ip().to_string();
    // Noted before it is tried, so that many at once do not slip through.
    let attempt = note_attempt(&app, asked.name.as_str(), &address).await?;
    let row = sqlx::query("SELECT id, name, role, password, disabled, created FROM users WHERE name = $1")
        .bind(asked.name.as_str())
        .fetch_optional(&app.store.read)
        .await?;
    let user = row.as_ref().map(user).transpose()?.filter(|user| !user.disabled);
    let kept = match (&row, &user) {
        (Some(row), Some(_)) => Some(row.try_get::<String, _>("password")?),
        _ => None,
    };
    let right = check_password(&app, asked.password, kept).await?;
    let Some(user) = user.filter(|_| right) else {
        return Err(fault(
            ProblemCode::Unauthenticated,
            "The name or the password is wrong",
            "Try again, or ask an administrator for a new password.",
        ));
    };
    let (secret, csrf) = (new_secret(), new_secret());
    let expires = UnixMillis::now().plus(SESSION_TIME);
    let mut act = app.store.act().await?;
    // Whoever has the password is not to be kept out by those who guess from the same place.
    sqlx::query("DELETE FROM login_attempts WHERE id = $1 OR (name = $2 AND address = $3)")
        .bind(attempt.as_str())
        .bind(asked.name.as_str())
        .bind(&address)
        .execute(&mut *act)
        .await?;
    sqlx::query("INSERT INTO sessions (digest, user_id, csrf, expires) VALUES ($1, $2, $3, $4)")
        .bind(digest(&secret))
        .bind(user.id.as_str())
        .bind(&csrf)
        .bind(expires.0)
        .execute(&mut *act)
        .await?;
    act.commit().await?;
    let cookie = format!(
        "{COOKIE}={secret}; Path=/; Secure; HttpOnly; SameSite=Strict; Max-Age={}",
        SESSION_TIME.as_secs()
    );
    let name = user.name.clone();
    let mut response = Json(Session { user, csrf, expires }).into_response();
    set_cookie(&mut response, &cookie)?;
    response.extensions_mut().insert(crate::api::guard::What(format!("user {name}")));
    Ok(response)
}

fn set_cookie(response: &mut Response, cookie: &str) -> Answer<()> {
    let value = HeaderValue::from_str(cookie).map_err(|error| internal("write a cookie", error))?;
    response.headers_mut().insert(SET_COOKIE, value);
    Ok(())
}

async fn check_password(app: &Shared, password: String, kept: Option<String>) -> Answer<bool> {
    if password.len() > *PASSWORD_BYTES.end() {
        return Ok(false);
    }
    let turn = app.password_checks.acquire().await.map_err(|error| internal("check a password", error))?;
    let checked = tokio::task::spawn_blocking(move || is_password(&password, kept.as_deref())).await;
    drop(turn);
    checked.map_err(|error| internal("check a password", error))
}

/// Notes an attempt to log in, and refuses it when there were too many.
async fn note_attempt(app: &Shared, name: &str, address: &str) -> Answer<ResourceId> {
    let since = UnixMillis::now().0 - LOGIN_WINDOW.as_millis() as i64;
    let id = new_id();
    let mut act = app.store.act().await?;
    sqlx::query("DELETE FROM login_attempts WHERE time < $1").bind(since).execute(&mut *act).await?;
    sqlx::query("INSERT INTO login_attempts (id, name, address, time) VALUES ($1, $2, $3, $4)")
        .bind(id.as_str())
        .bind(name)
        .bind(address)
        .bind(UnixMillis::now().0)
        .execute(&mut *act)
        .await?;
    act.commit().await?;
    let rows = sqlx::query(
        "SELECT name, address FROM login_attempts WHERE time >= $1 AND (name = $2 OR address = $3) LIMIT 1000",
    )
    .bind(since)
    .bind(name)
    .bind(address)
    .fetch_all(&app.store.read)
    .await?;
    let (mut both, mut from_address, mut with_name) = (0, 0, 0);
    for row in &rows {
        let (same_name, same_address) =
            (row.try_get::<String, _>("name")? == name, row.try_get::<String, _>("address")? == address);
        both += i64::from(same_name && same_address);
        from_address += i64::from(same_address);
        with_name += i64::from(same_name);
    }
    if both > LOGINS_OF_NAME_AND_ADDRESS_MAX
        || from_address > LOGINS_OF_ADDRESS_MAX
        || with_name > LOGINS_OF_NAME_MAX
    {
        let minutes = LOGIN_WINDOW.as_secs() / 60;
        return Err(fault(
            ProblemCode::TooMany,
            format!("There were too many attempts to log in as {name} or from {address}"),
            format!("Wait {minutes} minutes."),
        )
        .retry_after(LOGIN_WINDOW.as_secs()));
    }
    Ok(id)
}

pub(crate) async fn logout(State(app): State<Shared>, caller: Caller) -> Answer<Response> {
    if let Caller::Person { session: Some(session), .. } = &caller {
        let mut act = app.store.act().await?;
        sqlx::query("DELETE FROM sessions WHERE digest = $1").bind(session).execute(&mut *act).await?;
        act.commit().await?;
    }
    let mut response = StatusCode::NO_CONTENT.into_response();
    set_cookie(&mut response, &format!("{COOKIE}=; Path=/; Secure; HttpOnly; SameSite=Strict; Max-Age=0"))?;
    Ok(response)
}

pub(crate) async fn me(State(app): State<Shared>, caller: Caller) -> Answer<Json<UserInfo>> {
    let (id, _) = caller.person()?;
    Ok(Json(read_user(&app, id).await?))
}

pub(crate) async fn change_own_password(
    State(app): State<Shared>,
    caller: Caller,
    Body(asked): Body<ChangePassword>,
) -> Answer<StatusCode> {
    let (id, _) = caller.person()?;
    if matches!(caller, Caller::Person { token: Some(_), .. }) {
        return Err(fault(
            ProblemCode::Forbidden,
            "A token cannot change its user's password",
            "Log in with your password; a session may do it.",
        ));
    }
    let kept: String = sqlx::query_scalar("SELECT password FROM users WHERE id = $1")
        .bind(id.as_str())
        .fetch_one(&app.store.read)
        .await?;
    if !check_password(&app, asked.old, Some(kept)).await? {
        return Err(fault(ProblemCode::Forbidden, "The old password is wrong", "Type it again."));
    }
    let hash = hashed(&app, asked.new).await?;
    let mut act = app.store.act().await?;
    set_password(&mut act, id, &hash).await?;
    act.commit().await?;
    Ok(StatusCode::NO_CONTENT)
}

/// All sessions end: whoever has stolen one loses it.
async fn set_password(act: &mut AnyConnection, id: &ResourceId, hash: &str) -> Answer<()> {
    sqlx::query("UPDATE users SET password = $1 WHERE id = $2")
        .bind(hash)
        .bind(id.as_str())
        .execute(&mut *act)
        .await?;
    sqlx::query("DELETE FROM sessions WHERE user_id = $1").bind(id.as_str()).execute(&mut *act).await?;
    Ok(())
}

async fn hashed(app: &Shared, password: String) -> Answer<String> {
    check_new_password(&password)?;
    let turn = app.password_checks.acquire().await.map_err(|error| internal("keep a password", error))?;
    let hash = tokio::task::spawn_blocking(move || hash_password(&password)).await;
    drop(turn);
    hash.map_err(|error| internal("keep a password", error))
}

pub(crate) fn check_new_password(password: &str) -> Answer<()> {
    if PASSWORD_BYTES.contains(&password.len()) {
        return Ok(());
    }
    let (least, most) = (PASSWORD_BYTES.start(), PASSWORD_BYTES.end());
    Err(invalid(format!("The password has {} bytes, expected {least} to {most}", password.len())))
}

fn user(row: &AnyRow) -> Answer<UserInfo> {
    Ok(UserInfo {
        id: parse(row.try_get("id")?)?,
        name: parse(row.try_get("name")?)?,
        role: parse(row.try_get("role")?)?,
        disabled: row.try_get::<i64, _>("disabled")? != 0,
        created: UnixMillis(row.try_get("created")?),
    })
}

async fn read_user(app: &Shared, id: &ResourceId) -> Answer<UserInfo> {
    let row = sqlx::query("SELECT id, name, role, disabled, created FROM users WHERE id = $1")
        .bind(id.as_str())
        .fetch_optional(&app.store.read)
        .await?;
    row.as_ref().map(user).transpose()?.ok_or_else(|| not_found("user", id))
}

pub(crate) async fn users(
    State(app): State<Shared>,
    Query(part): Query<Part>,
) -> Answer<Json<Page<UserInfo>>> {
    let limit = part.limit()?;
    let rows = sqlx::query(
        "SELECT id, name, role, disabled, created FROM users WHERE name > $1 ORDER BY name LIMIT $2",
    )
    .bind(part.after_text()?)
    .bind(limit)
    .fetch_all(&app.store.read)
    .await?;
    let items: Vec<UserInfo> = rows.iter().map(user).collect::<Answer<_>>()?;
    let next =
        (items.len() as i64 == limit).then(|| items.last().map(|last| last.name.to_string())).flatten();
    Ok(Json(Page { items, next }))
}

pub(crate) async fn new_user(
    State(app): State<Shared>,
    Body(asked): Body<NewUser>,
) -> Answer<(StatusCode, Json<UserInfo>)> {
    let hash = hashed(&app, asked.password).await?;
    let mut act = app.store.act().await?;
    let made = insert_user(&mut act, &asked.name, asked.role, &hash).await?;
    say(
        &mut act,
        Said::new(EventKind::Access, format!("users/{}", made.id), format!("User {} was made", made.name)),
    )
    .await?;
    act.commit().await?;
    Ok((StatusCode::CREATED, Json(made)))
}

/// Makes a user.
pub(crate) async fn insert_user(
    act: &mut AnyConnection,
    name: &Name,
    role: Role,
    hash: &str,
) -> Answer<UserInfo> {
    let users: i64 = sqlx::query_scalar("SELECT COUNT(*) FROM users").fetch_one(&mut *act).await?;
    if users >= USERS_MAX {
        return Err(fault(
            ProblemCode::Limit,
            format!("There are {users} users"),
            "Ask whether all are needed.",
        ));
    }
    let taken: i64 = sqlx::query_scalar("SELECT COUNT(*) FROM users WHERE name = $1")
        .bind(name.as_str())
        .fetch_one(&mut *act)
        .await?;
    if taken > 0 {
        return Err(conflict(format!("There is a user {name} already"), "Choose another name."));
    }
    let made =
        UserInfo { id: new_id(), name: name.clone(), role, disabled: false, created: UnixMillis::now() };
    sqlx::query(
        "INSERT INTO users (id, name, role, password, disabled, created) VALUES ($1, $2, $3, $4, 0, $5)",
    )
    .bind(made.id.as_str())
    .bind(name.as_str())
    .bind(role.as_str())
    .bind(hash)
    .bind(made.created.0)
    .execute(&mut *act)
    .await?;
    Ok(made)
}

pub(crate) async fn change_user(
    State(app): State<Shared>,
    Id(id): Id<ResourceId>,
    Body(asked): Body<ChangeUser>,
) -> Answer<Json<UserInfo>> {
    let hash = match asked.password {
        Some(password) => Some(hashed(&app, password).await?),
        None => None,
    };
    let before = read_user(&app, &id).await?;
    let mut act = app.store.act().await?;
    if let Some(role) = asked.role {
        sqlx::query("UPDATE users SET role = $1 WHERE id = $2")
            .bind(role.as_str())
            .bind(id.as_str())
            .execute(&mut *act)
            .await?;
    }
    if let Some(disabled) = asked.disabled {
        sqlx::query("UPDATE users SET disabled = $1 WHERE id = $2")
            .bind(i64::from(disabled))
            .bind(id.as_str())
            .execute(&mut *act)
            .await?;
        sqlx::query("DELETE FROM sessions WHERE user_id = $1").bind(id.as_str()).execute(&mut *act).await?;
    }
    if let Some(hash) = &hash {
        set_password(&mut act, &id, hash).await?;
    }
    ensure_administrator(&mut act).await?;
    let said =
        Said::new(EventKind::Access, format!("users/{id}"), format!("User {} was changed", before.name));
    say(&mut act, said).await?;
    act.commit().await?;
    Ok(Json(read_user(&app, &id).await?))
}

async fn ensure_administrator(act: &mut Act) -> Answer<()> {
    let left: i64 =
        sqlx::query_scalar("SELECT COUNT(*) FROM users WHERE role = 'administrator' AND disabled = 0")
            .fetch_one(&mut **act)
            .await?;
    if left > 0 {
        return Ok(());
    }
    Err(conflict("No administrator would be left", "Make another user an administrator first."))
}

pub(crate) async fn tokens(State(app): State<Shared>, caller: Caller) -> Answer<Json<Vec<ApiTokenInfo>>> {
    let (user, _) = caller.person()?;
    let rows = sqlx::query(
        "SELECT t.id, t.name, t.scopes, t.created, t.expires, u.name AS owner
         FROM api_tokens t JOIN users u ON u.id = t.user_id WHERE t.user_id = $1 ORDER BY t.created",
    )
    .bind(user.as_str())
    .fetch_all(&app.store.read)
    .await?;
    let token = |row: &AnyRow| -> Answer<ApiTokenInfo> {
        Ok(ApiTokenInfo {
            id: parse(row.try_get("id")?)?,
            name: parse(row.try_get("name")?)?,
            user: parse(row.try_get("owner")?)?,
            scopes: read_scopes(&row.try_get::<String, _>("scopes")?)?,
            created: UnixMillis(row.try_get("created")?),
            expires: UnixMillis(row.try_get("expires")?),
        })
    };
    Ok(Json(rows.iter().map(token).collect::<Answer<_>>()?))
}

pub(crate) async fn new_token(
    State(app): State<Shared>,
    caller: Caller,
    Body(asked): Body<NewApiToken>,
) -> Answer<(StatusCode, Json<MadeToken>)> {
    let (user, user_name) = caller.person()?;
    if !(1..=TOKEN_DAYS_MAX).contains(&asked.days) {
        return Err(invalid(format!("days is {}, expected 1 to {TOKEN_DAYS_MAX}", asked.days)));
    }
    if asked.scopes.len() > SCOPES_MAX {
        return Err(invalid(format!("scopes has {} entries, at most {SCOPES_MAX} go", asked.scopes.len())));
    }
    let mut scopes = asked.scopes.clone();
    scopes.sort_unstable();
    scopes.dedup();
    if scopes.is_empty() {
        return Err(invalid("scopes is empty; such a token could do nothing"));
    }
    if let Caller::Person { token: Some((_, own)), .. } = &caller
        && let Some(more) =
            scopes.iter().find(|scope| !own.contains(scope) && !own.contains(&Scope::Administer))
    {
        let detail = format!("The token that asks has not the scope {} itself", more.as_str());
        return Err(fault(ProblemCode::Forbidden, detail, "Log in to make such a token."));
    }
    let secret = format!("{TOKEN_PREFIX}{}", new_secret());
    let created = UnixMillis::now();
    let info = ApiTokenInfo {
        id: new_id(),
        name: asked.name,
        user: user_name.clone(),
        scopes,
        created,
        expires: created.plus(Duration::from_secs(u64::from(asked.days) * 86_400)),
    };
    let mut act = app.store.act().await?;
    sqlx::query("DELETE FROM api_tokens WHERE expires < $1").bind(created.0).execute(&mut *act).await?;
    let there: i64 = sqlx::query_scalar("SELECT COUNT(*) FROM api_tokens WHERE user_id = $1")
        .bind(user.as_str())
        .fetch_one(&mut *act)
        .await?;
    if there >= TOKENS_OF_USER_MAX {
        let detail = format!("{user_name} has {there} tokens");
        return Err(fault(ProblemCode::Limit, detail, "Delete those that are not used."));
    }
    let scopes: Vec<&str> = info.scopes.iter().map(|scope| scope.as_str()).collect();
    sqlx::query(
        "INSERT INTO api_tokens (id, digest, user_id, name, scopes, created, expires) VALUES ($1, $2, $3, $4, $5, $6, $7)",
    )
    .bind(info.id.as_str())
    .bind(digest(&secret))
    .bind(user.as_str())
    .bind(info.name.as_str())
    .bind(scopes.join(" "))
    .bind(created.0)
    .bind(info.expires.0)
    .execute(&mut *act)
    .await?;
    let said = Said::new(
        EventKind::Access,
        format!("tokens/{}", info.id),
        format!("{user_name} made token {}", info.name),
    );
    say(&mut act, said).await?;
    act.commit().await?;
    Ok((StatusCode::CREATED, Json(MadeToken { token: secret, info })))
}

pub(crate) async fn delete_token(
    State(app): State<Shared>,
    caller: Caller,
    Id(id): Id<ResourceId>,
) -> Answer<StatusCode> {
    let (user, name) = caller.person()?;
    let mut act = app.store.act().await?;
    let gone = sqlx::query("DELETE FROM api_tokens WHERE id = $1 AND user_id = $2")
        .bind(id.as_str())
        .bind(user.as_str())
        .execute(&mut *act)
        .await?;
    if gone.rows_affected() == 0 {
        return Err(not_found("token", id));
    }
    say(&mut act, Said::new(EventKind::Access, format!("tokens/{id}"), format!("{name} deleted a token")))
        .await?;
    act.commit().await?;
    Ok(StatusCode::NO_CONTENT)
}

pub(crate) async fn audit(
    State(app): State<Shared>,
    Query(part): Query<Part>,
) -> Answer<Json<Page<AuditEntry>>> {
    Ok(Json(audit_before(&app.store, part.before_number()?, part.limit()?).await?))
}
