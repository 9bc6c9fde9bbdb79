//! The state: SQLite in one file, or PostgreSQL, through the same statements.
//!
//! Consistency: an act is one transaction, with the event that tells of it. Several config servers may use one PostgreSQL;
//! nothing that they must agree on is kept in memory. One SQLite file belongs to one config server.
//! Crash consistency: what was answered is durable (SQLite: WAL with full synchronisation).
//! Retries: none here; a store that does not answer is a problem for whoever asked, who tries again.

mod counter;
mod event;
mod setting;

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, ensure};
use sqlx::any::AnyPoolOptions;
use sqlx::migrate::{Migration, MigrationType, Migrator};
use sqlx::{Any, AnyConnection, AnyPool, Executor, Transaction};

pub(crate) use counter::{Counter, count, read_count};
pub(crate) use event::{Said, events_after, newest_event, prune_events, say, severity_name};
pub(crate) use setting::{read_settings, write_settings};

use crate::declared::DeclaredCache;
use crate::fault::Answer;
use crate::reports::Reports;

/// Connections for reading.
const READERS: u32 = 8;
/// Connections for writing, to PostgreSQL. SQLite has one writer at a time anyway.
const WRITERS: u32 = 8;
/// How long an act waits for a connection. Past it the answer is that the store does not answer.
const ACQUIRE_MAX: Duration = Duration::from_secs(10);

/// SQLite's log goes into the file when it has so many pages of 4 KiB: seldom, for whoever writes waits for it, and what was
/// written again and again meanwhile goes there once.
const LOG_PAGES: u32 = 8192;

const MIGRATIONS: [(i64, &str, &str); 7] = [
    (1, "fleet", include_str!("../../migrations/0001_fleet.sql")),
    (2, "points", include_str!("../../migrations/0002_points.sql")),
    (3, "alerts", include_str!("../../migrations/0003_alerts.sql")),
    (4, "guests", include_str!("../../migrations/0004_guests.sql")),
    (5, "lifecycle", include_str!("../../migrations/0005_lifecycle.sql")),
    (6, "plans", include_str!("../../migrations/0006_plans.sql")),
    (7, "home", include_str!("../../migrations/0007_home.sql")),
];

/// Which database it is, where that makes a difference.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Backend {
    Sqlite,
    Postgres,
}

/// The state of the fleet.
#[derive(Clone, Debug)]
pub(crate) struct Store {
    pub(crate) read: AnyPool,
    write: AnyPool,
    pub(crate) backend: Backend,
    pub(crate) reports: Arc<Reports>,
    pub(crate) declared: Arc<DeclaredCache>,
}

/// Several statements that happen together or not at all.
pub(crate) type Act = Transaction<'static, Any>;

impl Store {
    /// Opens the database of a URL, `sqlite:PATH` or `postgres://...`, and brings its tables up to date.
    ///
    /// # Errors
    /// When it cannot be reached, or belongs to a newer version.
    pub(crate) async fn open(url: &str) -> anyhow::Result<Store> {
        sqlx::any::install_default_drivers();
        let backend = backend_of(url)?;
        let shown = without_password(url);
        let full = match backend {
            Backend::Sqlite if url.contains('?') => url.to_owned(),
            Backend::Sqlite => format!("{url}?mode=rwc"),
            Backend::Postgres => url.to_owned(),
        };
        let options = |connections: u32| {
            let options = AnyPoolOptions::new().max_connections(connections).acquire_timeout(ACQUIRE_MAX);
            options.after_connect(move |connection, _| Box::pin(prepare(connection, backend)))
        };
        let writers = if backend == Backend::Sqlite { 1 } else { WRITERS };
        let write =
            options(writers).connect(&full).await.with_context(|| format!("open the database {shown}"))?;
        migrate(&write).await.with_context(|| format!("bring the tables of {shown} up to date"))?;
        let read =
            options(READERS).connect(&full).await.with_context(|| format!("open the database {shown}"))?;
        Ok(Store { read, write, backend, reports: Arc::default(), declared: Arc::default() })
    }

    /// Begins an act. Dropped before its end, it has not happened.
    pub(crate) async fn act(&self) -> Answer<Act> {
        Ok(self.write.begin().await?)
    }

    /// Closes all connections; for SQLite, what is in the log goes into the file.
    pub(crate) async fn close(&self) {
        self.read.close().await;
        self.write.close().await;
    }
}

fn backend_of(url: &str) -> anyhow::Result<Backend> {
    let scheme = url.split(':').next().unwrap_or_default();
    match scheme {
        "sqlite" => Ok(Backend::Sqlite),
        "postgres" | "postgresql" => Ok(Backend::Postgres),
        _ => anyhow::bail!(
            "use the database {:?}: expected sqlite:PATH or postgres://USER:PASSWORD@HOST/DATABASE",
            without_password(url)
        ),
    }
}

/// A URL as it may be shown.
fn without_password(url: &str) -> String {
    match url.split_once("://").and_then(|(scheme, rest)| Some((scheme, rest.rsplit_once('@')?))) {
        Some((scheme, (_, place))) => format!("{scheme}://...@{place}"),
        None => url.to_owned(),
    }
}

async fn prepare(connection: &mut AnyConnection, backend: Backend) -> Result<(), sqlx::Error> {
    if backend == Backend::Sqlite {
        let checkpoint = format!("wal_autocheckpoint = {LOG_PAGES}");
        for pragma in [
            "journal_mode = WAL",
            "synchronous = FULL",
            "foreign_keys = ON",
            "busy_timeout = 5000",
            &checkpoint,
        ] {
            connection.execute(format!("PRAGMA {pragma}").as_str()).await?;
        }
    }
    Ok(())
}

/// Several config servers may start at once: the database's own lock lets one at a time do this.
async fn migrate(pool: &AnyPool) -> anyhow::Result<()> {
    let migrations = MIGRATIONS.iter().map(|(version, name, sql)| {
        Migration::new(*version, (*name).into(), MigrationType::Simple, (*sql).into(), false)
    });
    let migrator = Migrator { migrations: migrations.collect(), ..Migrator::DEFAULT };
    migrator.run(pool).await.map_err(|error| match error {
        sqlx::migrate::MigrateError::VersionMissing(version) => {
            anyhow::anyhow!("they are of a newer version of Seawall (migration {version}); start that one")
        }
        other => anyhow::Error::new(other),
    })
}

/// The newest migration there is.
pub(crate) fn schema_version() -> i64 {
    MIGRATIONS.iter().map(|(version, ..)| *version).max().unwrap_or_default()
}

/// That nobody has used the state yet.
pub(crate) async fn ensure_empty(store: &Store) -> anyhow::Result<()> {
    for table in ["users", "parts", "protection_groups"] {
        let rows: i64 =
            sqlx::query_scalar(&format!("SELECT COUNT(*) FROM {table}")).fetch_one(&store.read).await?;
        ensure!(rows == 0, "the database is in use: there are {rows} {table}; choose an empty one");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passwords_in_urls_are_not_shown() {
        assert_eq!(without_password("postgres://u:p@ss@h/db"), "postgres://...@h/db");
        assert_eq!(without_password("sqlite:/x/y"), "sqlite:/x/y");
        assert!(backend_of("mysql://x").is_err());
    }
}
