//! A PostgreSQL server of a test's own, and pgbench on it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use anyhow::{Context, bail, ensure};

use crate::run;

fn as_text(path: &Path) -> &str {
    path.to_str().expect("test paths are UTF-8")
}

/// Makes a directory that belongs to a user.
///
/// # Errors
/// When it cannot be made.
pub fn directory_of(user: &str, path: &Path) -> anyhow::Result<()> {
    fs::create_dir_all(path)?;
    run("chown", &[user, as_text(path)]).map(drop)
}

/// Where Debian has its programs.
pub const PG_BIN: &str = "/usr/lib/postgresql/15/bin";

/// A PostgreSQL server. Stopped when dropped.
pub struct Postgres {
    /// Its data.
    pub data: PathBuf,
    /// Its socket and log, not on the replicated disk.
    pub place: PathBuf,
}

impl Postgres {
    /// Makes a cluster.
    ///
    /// # Errors
    /// What `initdb` says.
    pub fn init(data: &Path, place: &Path) -> anyhow::Result<Postgres> {
        directory_of("postgres", data)?;
        let server = Postgres::at(data, place)?;
        server.run("initdb", &["--pgdata", as_text(data), "--auth=trust", "--username=postgres"])?;
        Ok(server)
    }

    /// A cluster that is there.
    ///
    /// # Errors
    /// When its place cannot be made.
    pub fn at(data: &Path, place: &Path) -> anyhow::Result<Postgres> {
        directory_of("postgres", place)?;
        Ok(Postgres { data: data.to_owned(), place: place.to_owned() })
    }

    /// One of its programs, as the user that it runs as.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new("runuser");
        command.args(["-u", "postgres", "--", &format!("{PG_BIN}/{program}")]).current_dir("/");
        command.env("PGHOST", &self.place).env("PGPORT", "5432").env("PGUSER", "postgres");
        command
    }

    /// Runs one of its programs. Gives what it says.
    ///
    /// # Errors
    /// When it fails; with the server's log.
    pub fn run(&self, program: &str, arguments: &[&str]) -> anyhow::Result<String> {
        let output = self.command(program).args(arguments).output()?;
        let said = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        if !output.status.success() {
            let log = self.log();
            bail!("{program} {arguments:?}: {said} {} {log}", String::from_utf8_lossy(&output.stderr));
        }
        Ok(said)
    }

    /// Starts the server, and waits until it serves.
    ///
    /// # Errors
    /// When it does not; with its log.
    pub fn start(&self) -> anyhow::Result<()> {
        let options = format!("-k {} -c listen_addresses= -c max_wal_size=256MB", self.place.display());
        let log = self.place.join("log");
        let data = as_text(&self.data);
        // It keeps its standard output open.
        let status = self
            .command("pg_ctl")
            .args([
                "--pgdata",
                data,
                "--wait",
                "--timeout=100",
                "--log",
                as_text(&log),
                "--options",
                &options,
                "start",
            ])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()?;
        ensure!(status.success(), "start PostgreSQL: {}", self.log());
        Ok(())
    }

    /// What it has logged.
    pub fn log(&self) -> String {
        fs::read_to_string(self.place.join("log")).unwrap_or_default()
    }

    /// Runs a statement. Gives its rows.
    ///
    /// # Errors
    /// What the server says.
    pub fn sql(&self, statement: &str) -> anyhow::Result<String> {
        self.run("psql", &["-XAtq", "-v", "ON_ERROR_STOP=1", "-d", "postgres", "-c", statement])
    }

    /// Every index agrees with its table, every page is sound, and no transaction of pgbench is there by half.
    ///
    /// # Errors
    /// When one does not hold.
    pub fn check(&self) -> anyhow::Result<()> {
        let arguments = ["--all", "--install-missing", "--heapallindexed", "--parent-check", "--rootdescend"];
        self.run("pg_amcheck", &arguments).context("pg_amcheck")?;
        let sums = self.sql(
            "select (select sum(abalance) from pgbench_accounts), (select sum(tbalance) from pgbench_tellers), \
             (select sum(bbalance) from pgbench_branches), (select coalesce(sum(delta), 0) from pgbench_history)",
        )?;
        let mut sums = sums.split('|');
        let first = sums.next().context("sums")?;
        ensure!(sums.all(|sum| sum == first), "a transaction is there by half: {first}");
        Ok(())
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        if self.data.join("postmaster.pid").exists() {
            let data = as_text(&self.data);
            // Fails when it has ended in this instant.
            let _ = self
                .command("pg_ctl")
                .args(["--pgdata", data, "--mode=immediate", "--silent", "stop"])
                .status();
        }
    }
}

/// pgbench again and again, also when the server is not there for a while. Counts the runs that ended well.
pub struct Bench {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Bench {
    /// Begins.
    pub fn start(server: &Postgres) -> Bench {
        let stop = Arc::new(AtomicBool::new(false));
        let ends = stop.clone();
        let (data, place) = (server.data.clone(), server.place.clone());
        let thread = std::thread::spawn(move || {
            let server = std::mem::ManuallyDrop::new(Postgres { data, place });
            while !ends.load(Ordering::SeqCst) {
                let mut command = server.command("pgbench");
                command.args(["--client=4", "--time=1", "--no-vacuum", "postgres"]);
                // Fails when the server is stopped under it, as the clean hook does.
                let _ = command.stdout(Stdio::null()).stderr(Stdio::null()).status();
            }
        });
        Bench { stop, thread: Some(thread) }
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            // It does not panic.
            let _ = thread.join();
        }
    }
}
