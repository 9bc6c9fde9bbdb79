use sqlx::AnyConnection;

/// A number that grows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Counter {
    Event,
    Audit,
    Job,
    Declared,
    Revoked,
}

impl Counter {
    fn name(self) -> &'static str {
        match self {
            Counter::Event => "event",
            Counter::Audit => "audit",
            Counter::Job => "job",
            Counter::Declared => "declared",
            Counter::Revoked => "revoked",
        }
    }
}

/// The next number. Others wait for theirs until this transaction ends, so that numbers become visible in order.
pub(crate) async fn count(act: &mut AnyConnection, counter: Counter) -> Result<i64, sqlx::Error> {
    let statement = "UPDATE counters SET value = value + 1 WHERE name = $1 RETURNING value";
    sqlx::query_scalar(statement).bind(counter.name()).fetch_one(act).await
}

/// The last number given.
pub(crate) async fn read_count(act: &mut AnyConnection, counter: Counter) -> Result<i64, sqlx::Error> {
    sqlx::query_scalar("SELECT value FROM counters WHERE name = $1").bind(counter.name()).fetch_one(act).await
}
