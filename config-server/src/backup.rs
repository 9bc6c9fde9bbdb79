//! The whole state in one file, whatever the database is: `backup` and `restore`. docs/formats/config-backup.md has the
//! lines.
//!
//! Consistency: a backup is one snapshot of the database. A restore is one transaction into an empty one.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, BufWriter, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use anyhow::{Context, bail, ensure};
use durable::{OpenMode, RealStorage, Storage};
use serde_json::{Map, Value, json};
use sqlx::{Connection, Executor, Row};

use crate::config::Config;
use crate::store::{Backend, Store, ensure_empty, schema_version};

/// The first line names it.
const MAGIC: &str = "seawall-config-backup";
/// The version of the lines. 1: the first.
const VERSION: u64 = 1;
/// The longest line, in bytes: a server's report of all of its groups is the largest.
const LINE_BYTES_MAX: u64 = 64 << 20;
/// Files of the authority.
const AUTHORITY: [&str; 2] = ["ca.pem", "key.pem"];

/// Every table, parents first, with its columns: `n` are numbers, the others texts. A test compares it with the database.
const TABLES: [(&str, &str); 24] = [
    ("counters", "name n:value"),
    ("settings", "name value"),
    ("users", "id name role password n:disabled n:created"),
    ("sessions", "digest user_id csrf n:expires"),
    ("api_tokens", "id digest user_id name scopes n:created n:expires"),
    ("login_attempts", "id name address n:time"),
    ("enrol_tokens", "id digest role name n:created n:expires created_by used_by"),
    (
        "parts",
        "id role name live_name group_id n:enrolled n:removed address sealing_key version n:seen n:silent n:clock_ahead \
         n:certificate_expires state trouble digest report disks n:bytes_total n:bytes_free guests",
    ),
    ("certificates", "serial part_id n:expires n:revoked"),
    ("policies", "id name policy n:changed"),
    (
        "protection_groups",
        "id machine_id n:generation state policy_id process_id n:created n:looked n:committed reversed_by",
    ),
    ("group_targets", "group_id target_id sealed_key"),
    ("point_lists", "group_id target_id n:time n:newest list"),
    ("volumes", "group_id name device n:place adopt"),
    (
        "jobs",
        "id n:number kind subject subject_id state n:percent message body steps created_by n:created n:changed lease_holder \
         n:lease_until",
    ),
    ("plans", "id name text n:changed changed_by"),
    ("plan_answers", "run_id step n:attempt n:done note who n:time"),
    ("tasks", "id job_id part_id task state message result n:created"),
    ("events", "n:id n:time kind severity subject message"),
    ("audit", "n:id n:time who address act what n:status problem"),
    ("approvals", "id act what asker_id asked_by n:asked n:expires state answered_by"),
    ("alerts", "id open_key kind severity subject message mend n:raised n:gone n:cleared"),
    ("notices", "id receiver body n:tries n:next_try n:created"),
    ("samples", "group_id n:step n:slot n:rpo n:churn n:sent n:dirty n:unsent"),
];

fn columns(list: &str) -> impl Iterator<Item = (&str, bool)> {
    list.split_whitespace().map(|column| match column.strip_prefix("n:") {
        Some(number) => (number, true),
        None => (column, false),
    })
}

/// Writes lines, and hashes them.
struct Lines<W: Write> {
    to: W,
    hash: blake3::Hasher,
    rows: u64,
}

impl<W: Write> Lines<W> {
    fn line(&mut self, value: &Value) -> anyhow::Result<()> {
        let mut line = serde_json::to_vec(value)?;
        line.push(b'\n');
        self.hash.update(&line);
        self.to.write_all(&line).context("write the backup")
    }
}

/// Writes the state of the config server of `config`, which may run, to the new file `out`, with mode 0600. How many rows.
///
/// # Errors
/// When the database cannot be read, or the file is there or cannot be written; then nothing is left of it.
pub async fn backup(config: &Config, out: &Path) -> anyhow::Result<u64> {
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(out);
    let file = file.with_context(|| format!("create {}", out.display()))?;
    let written = write(config, &file).await;
    match &written {
        Ok(_) => {
            file.sync_all().with_context(|| format!("sync {}", out.display()))?;
            let parent =
                out.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
            RealStorage.sync_dir(parent).with_context(|| format!("sync {}", parent.display()))?;
        }
        // A part of a backup must not be taken for one.
        Err(_) => {
            let _ = std::fs::remove_file(out);
        }
    }
    written
}

async fn write(config: &Config, file: &File) -> anyhow::Result<u64> {
    let store = Store::open(&config.database).await?;
    let mut lines = Lines { to: BufWriter::new(file), hash: blake3::Hasher::new(), rows: 0 };
    lines.line(&json!({ "magic": MAGIC, "version": VERSION, "schema": schema_version() }))?;
    for name in AUTHORITY {
        let path = config.authority.join(name);
        let text = std::fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
        lines.line(&json!({ "authority": name, "text": text }))?;
    }
    let mut connection = store.read.acquire().await?;
    let mut snapshot = connection.begin().await?;
    if store.backend == Backend::Postgres {
        snapshot.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY").await?;
    }
    for (table, list) in TABLES {
        let names: Vec<&str> = columns(list).map(|(name, _)| name).collect();
        let sql = format!("SELECT {} FROM {table}", names.join(", "));
        let mut rows = sqlx::query(&sql).fetch(&mut *snapshot);
        while let Some(row) = std::future::poll_fn(|context| rows.as_mut().poll_next(context)).await {
            let row = row.with_context(|| format!("read the table {table}"))?;
            let mut values = Map::new();
            for (name, is_number) in columns(list) {
                let value = match is_number {
                    true => Value::from(row.try_get::<i64, _>(name)?),
                    false => Value::from(row.try_get::<String, _>(name)?),
                };
                values.insert(name.to_owned(), value);
            }
            lines.line(&json!({ "table": table, "row": values }))?;
            lines.rows += 1;
        }
    }
    snapshot.rollback().await?;
    let rows = lines.rows;
    let last = json!({ "rows": rows, "blake3": lines.hash.finalize().to_hex().as_str() });
    lines.line(&last)?;
    lines.to.flush().context("write the backup")?;
    drop(connection);
    store.close().await;
    Ok(rows)
}

/// Reads the file of [`backup`] into the empty database of `config`, and its authority where there is none. How many rows.
///
/// # Errors
/// When the file is damaged, of a newer version, or not whole; when the database or the authority is in use. Then nothing was
/// changed.
pub async fn restore(config: &Config, from: &Path) -> anyhow::Result<u64> {
    let rows = verify(from).with_context(|| format!("read the backup {}", from.display()))?;
    let store = Store::open(&config.database).await?;
    ensure_empty(&store).await?;
    let mut act = store.act().await.map_err(anyhow::Error::new)?;
    for (table, _) in TABLES.iter().rev() {
        // What an empty database begins with is in the backup as well.
        act.execute(format!("DELETE FROM {table}").as_str()).await?;
    }
    let mut authority = Vec::new();
    for line in lines_of(from)? {
        let value: Value = serde_json::from_slice(&line?)?;
        if let Some(name) = value["authority"].as_str() {
            authority.push((name.to_owned(), value["text"].as_str().unwrap_or_default().to_owned()));
        }
        let Some(table) = value["table"].as_str() else { continue };
        let known = TABLES.iter().find(|(name, _)| *name == table);
        let (table, list) = known.with_context(|| format!("the table {table} is not known"))?;
        let names: Vec<&str> = columns(list).map(|(name, _)| name).collect();
        let places: Vec<String> = (1..=names.len()).map(|place| format!("${place}")).collect();
        let sql = format!("INSERT INTO {table} ({}) VALUES ({})", names.join(", "), places.join(", "));
        let mut query = sqlx::query(&sql);
        for (name, is_number) in columns(list) {
            let value = &value["row"][name];
            query = match is_number {
                true => {
                    query.bind(value.as_i64().with_context(|| format!("{name} of {table} is no number"))?)
                }
                false => {
                    let text = value.as_str().with_context(|| format!("{name} of {table} is no text"))?;
                    query.bind(text.to_owned())
                }
            };
        }
        query.execute(&mut *act).await.with_context(|| format!("restore a row of {table}"))?;
    }
    restore_authority(&config.authority, &authority)?;
    act.commit().await.context("keep what was restored")?;
    store.close().await;
    Ok(rows)
}

/// The authority of the backup must be the one that is there, or there must be none.
fn restore_authority(dir: &Path, files: &[(String, String)]) -> anyhow::Result<()> {
    RealStorage.create_dir_all(dir).with_context(|| format!("make directory {}", dir.display()))?;
    // The key first: a certificate without its key would look like an authority that works.
    for (name, text) in files.iter().rev() {
        ensure!(AUTHORITY.contains(&name.as_str()), "the backup has a file {name:?} of the authority");
        let path = dir.join(name);
        match std::fs::read_to_string(&path) {
            Ok(there) if there == *text => {}
            Ok(_) => bail!(
                "{} is of another authority than the backup's; choose another directory",
                path.display()
            ),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                let write = || {
                    let file = RealStorage.open(&path, OpenMode::CreateNew)?;
                    file.write_all_at(text.as_bytes(), 0)?;
                    file.sync_data()?;
                    RealStorage.sync_dir(dir)
                };
                write().with_context(|| format!("write {}", path.display()))?;
            }
            Err(error) => return Err(error).with_context(|| format!("read {}", path.display())),
        }
    }
    Ok(())
}

fn lines_of(path: &Path) -> anyhow::Result<impl Iterator<Item = anyhow::Result<Vec<u8>>>> {
    let mut reader = BufReader::new(File::open(path).with_context(|| format!("open {}", path.display()))?);
    Ok(std::iter::from_fn(move || {
        let mut line = Vec::new();
        match reader.by_ref().take(LINE_BYTES_MAX + 1).read_until(b'\n', &mut line) {
            Ok(0) => None,
            Ok(count) if count as u64 > LINE_BYTES_MAX => {
                Some(Err(anyhow::anyhow!("a line has more than {LINE_BYTES_MAX} bytes")))
            }
            Ok(_) => Some(Ok(line)),
            Err(error) => Some(Err(error.into())),
        }
    }))
}

/// Looks at all of a file before anything of it is used: magic, version, length, checksum.
fn verify(path: &Path) -> anyhow::Result<u64> {
    let mut hash = blake3::Hasher::new();
    let mut rows = 0;
    let mut first = true;
    let mut lines = lines_of(path)?;
    while let Some(line) = lines.next() {
        let line = line?;
        ensure!(line.ends_with(b"\n"), "it ends in the middle of a line; the backup is not whole");
        let value: Value = serde_json::from_slice(&line).context("a line is not JSON")?;
        if first {
            first = false;
            ensure!(value["magic"] == MAGIC, "it is no backup of a config server");
            let version = value["version"].as_u64().unwrap_or(u64::MAX);
            ensure!(version == VERSION, "it has version {version}, this program reads {VERSION}");
            let schema = value["schema"].as_i64().unwrap_or(i64::MAX);
            ensure!(
                schema == schema_version(),
                "its tables have version {schema}, here they have {}; restore it with the version of Seawall that made it",
                schema_version()
            );
        } else if let Some(expected) = value["blake3"].as_str() {
            ensure!(
                hash.finalize().to_hex().as_str() == expected,
                "its checksum is wrong; it was changed or damaged"
            );
            ensure!(value["rows"].as_u64() == Some(rows), "it has {rows} rows, its last line says otherwise");
            // What follows would be restored, and nothing speaks for it.
            ensure!(
                lines.next().is_none(),
                "there is something behind its last line; it was changed or damaged"
            );
            return Ok(rows);
        } else if value["table"].is_string() {
            rows += 1;
        }
        hash.update(&line);
    }
    bail!("its last line is missing; the backup is not whole")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whatever is changed, cut off, doubled or added: it is refused, and nothing panics.
    #[test]
    fn a_backup_that_was_changed_is_refused() {
        let mut whole =
            format!("{{\"magic\":{MAGIC:?},\"version\":{VERSION},\"schema\":{}}}\n", schema_version());
        whole += "{\"authority\":\"key.pem\",\"text\":\"secret\"}\n";
        for row in 0..9 {
            whole += &format!("{{\"table\":\"users\",\"row\":{{\"id\":\"u{row}\",\"created\":{row}}}}}\n");
        }
        let hash = blake3::hash(whole.as_bytes()).to_hex();
        whole += &format!("{{\"rows\":9,\"blake3\":\"{hash}\"}}\n");
        let whole = whole.into_bytes();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("fleet.backup");
        let read = |bytes: &[u8]| {
            std::fs::write(&path, bytes).unwrap();
            verify(&path)
        };
        assert_eq!(read(&whole).unwrap(), 9);
        for length in 0..whole.len() {
            read(&whole[..length]).unwrap_err();
        }
        for bit in 0..whole.len() * 8 {
            let mut changed = whole.clone();
            changed[bit / 8] ^= 1 << (bit % 8);
            read(&changed).unwrap_err();
        }
        let lines: Vec<&[u8]> = whole.split_inclusive(|byte| *byte == b'\n').collect();
        for place in 0..lines.len() {
            let (mut without, mut twice) = (lines.clone(), lines.clone());
            without.remove(place);
            twice.insert(place, lines[place]);
            read(&without.concat()).unwrap_err();
            read(&twice.concat()).unwrap_err();
        }
        // A row behind the checksum.
        read(&[&whole[..], lines[2]].concat()).unwrap_err();
        for odd in ["[]\n", "null\n", "{}\n", "\n", "{\"blake3\":\"\"}\n"] {
            read(odd.as_bytes()).unwrap_err();
        }
    }

    /// A column that a migration adds must be in every backup.
    #[tokio::test]
    async fn the_tables_are_those_of_the_database() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&format!("sqlite:{}", dir.path().join("fleet.db").display())).await.unwrap();
        let tables: Vec<String> = sqlx::query_scalar(
            "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%' AND name <> '_sqlx_migrations'",
        )
        .fetch_all(&store.read)
        .await
        .unwrap();
        assert_eq!(tables.len(), TABLES.len(), "{tables:?}");
        for (table, list) in TABLES {
            let rows =
                sqlx::query(&format!("PRAGMA table_info({table})")).fetch_all(&store.read).await.unwrap();
            let there: Vec<(String, bool)> = rows
                .iter()
                .map(|row| (row.get::<String, _>("name"), row.get::<String, _>("type") == "BIGINT"))
                .collect();
            let ours: Vec<(String, bool)> =
                columns(list).map(|(name, number)| (name.to_owned(), number)).collect();
            assert_eq!(ours, there, "{table}");
        }
    }
}
