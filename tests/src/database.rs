//! PostgreSQL that somebody relies on: rows that were acknowledged, an end as by a power cut, and a beginning from what that left.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use anyhow::{Context, ensure};
use block::UnixNanos;
use parking_lot::Mutex;
use scratch::postgres::Postgres;
use scratch::run;

use crate::{text, wait_until};

/// The table of [`Rows`].
///
/// # Errors
/// What the server says.
pub fn make_rows_table(server: &Postgres) -> anyhow::Result<()> {
    server.sql("create table numbered (writer text, number bigint, primary key (writer, number))").map(drop)
}

/// Rows 1, 2, 3, ... of one writer, each a transaction of its own that is waited for.
pub struct Rows {
    acknowledged: Arc<Mutex<Vec<UnixNanos>>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Rows {
    /// Begins to write as `writer`.
    ///
    /// # Errors
    /// When psql does not start.
    pub fn start(server: &Postgres, writer: &str) -> anyhow::Result<Rows> {
        let mut command = server.command("psql");
        command.args(["-XAtq", "-d", "postgres"]);
        let mut session =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?;
        let (acknowledged, stop) = (Arc::new(Mutex::new(Vec::new())), Arc::new(AtomicBool::new(false)));
        let (told, ends, writer) = (acknowledged.clone(), stop.clone(), writer.to_owned());
        let mut to = session.stdin.take().context("its input")?;
        let mut from = BufReader::new(session.stdout.take().context("its output")?);
        let thread = std::thread::spawn(move || {
            for number in 1_u64.. {
                if ends.load(Ordering::SeqCst) || write(&mut to, &mut from, &writer, number).is_err() {
                    break;
                }
                told.lock().push(UnixNanos::now());
            }
            end(session, to);
        });
        Ok(Rows { acknowledged, stop, thread: Some(thread) })
    }

    /// How many were acknowledged until now.
    pub fn acknowledged(&self) -> u64 {
        self.acknowledged.lock().len() as u64
    }

    /// Waits until more are than now.
    ///
    /// # Errors
    /// When nothing is acknowledged any more.
    pub fn wait_for_more(&self) -> anyhow::Result<()> {
        let before = self.acknowledged();
        wait_until("rows are acknowledged", || Ok(self.acknowledged() > before + 10))
    }

    /// Ends. Gives when each row was acknowledged.
    pub fn stop(mut self) -> Vec<UnixNanos> {
        self.join();
        std::mem::take(&mut *self.acknowledged.lock())
    }

    fn join(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            thread.join().expect("the writer does not panic");
        }
    }
}

impl Drop for Rows {
    fn drop(&mut self) {
        self.join();
    }
}

/// One row; it returns when the server has said that it is there.
fn write(to: &mut ChildStdin, from: &mut impl BufRead, writer: &str, number: u64) -> anyhow::Result<()> {
    writeln!(to, "insert into numbered values ('{writer}', {number}) returning number;")?;
    to.flush()?;
    let mut said = String::new();
    from.read_line(&mut said)?;
    ensure!(said.trim() == number.to_string(), "{said:?} in place of {number}");
    Ok(())
}

fn end(mut session: Child, input: ChildStdin) {
    drop(input);
    let _ = session.wait();
}

/// Everything that must hold of a server's content holds: pgbench's balances, every index, and the rows of each of `writers` are the
/// first so many, without a hole. Gives how many.
///
/// # Errors
/// When something does not.
pub fn examined<const N: usize>(server: &Postgres, writers: [&str; N]) -> anyhow::Result<[u64; N]> {
    server.check()?;
    let mut found = [0; N];
    for (found, writer) in found.iter_mut().zip(writers) {
        let said = server.sql(&format!(
            "select count(*), coalesce(min(number), 1), coalesce(max(number), 0) from numbered where writer = '{writer}'"
        ))?;
        let numbers: Vec<u64> = said.split('|').map(str::parse).collect::<Result<_, _>>()?;
        ensure!(
            numbers.len() == 3 && numbers[1] == 1 && numbers[0] == numbers[2],
            "rows of {writer} are missing: count|first|last is {said}"
        );
        *found = numbers[0];
    }
    Ok(found)
}

/// Starts a server from what another one has left on a disk, wherever that one was.
///
/// # Errors
/// When it does not start.
pub fn revived(data: &Path, place: &Path) -> anyhow::Result<Postgres> {
    let server = Postgres::at(data, place)?;
    match fs::remove_file(data.join("postmaster.pid")) {
        // The lock file of a server that ran at the cut names a process that may run here.
        Ok(()) => {}
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(error.into()),
    }
    server.start()?;
    Ok(server)
}

/// Ends it well.
///
/// # Errors
/// What `pg_ctl` says.
pub fn stop(server: &Postgres) -> anyhow::Result<()> {
    server.run("pg_ctl", &["--pgdata", text(&server.data), "--mode=fast", "--wait", "stop"]).map(drop)
}

/// kill -9 of all its processes. What it has left in this machine's memory, which a power cut would take away, goes too.
///
/// # Errors
/// When it does not run.
pub fn kill(server: &Postgres) -> anyhow::Result<()> {
    let lock = fs::read_to_string(server.data.join("postmaster.pid")).context("read what runs")?;
    let lines: Vec<&str> = lock.lines().collect();
    let postmaster: u32 = lines.first().context("a process")?.trim().parse()?;
    let maps = fs::read_to_string(format!("/proc/{postmaster}/maps"))?;
    let shared: Vec<String> =
        maps.lines().filter_map(|line| line.find("/dev/shm/").map(|at| line[at..].to_owned())).collect();
    let children = run("pgrep", &["--parent", &postmaster.to_string()])?;
    // First, so that it does not see them end.
    run("kill", &["-9", &postmaster.to_string()])?;
    for child in children.lines() {
        // Ended already, when it saw that its parent has.
        let _ = Command::new("kill").args(["-9", child]).stderr(Stdio::null()).status();
    }
    wait_until("its processes have ended", || {
        // One that nobody has waited for yet has no memory any more, and so no command line.
        let runs = |child| fs::read(format!("/proc/{child}/cmdline")).is_ok_and(|line| !line.is_empty());
        Ok(!children.lines().any(runs))
    })?;
    for file in shared {
        let _ = fs::remove_file(file);
    }
    if let Some(segment) = lines.get(6).and_then(|line| line.split_whitespace().nth(1)) {
        let _ = Command::new("ipcrm").args(["--shmem-id", segment]).stderr(Stdio::null()).status();
    }
    Ok(())
}
