//! The shipped hooks with real servers: what each promises, from the agent to a server that starts from the restored disk.

use std::fs::{self, File};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use scratch::postgres::{Bench, PG_BIN, Postgres, directory_of};
use scratch::{FileSystem, LoopDisk, Mount, run};
use seawall_tests::system::{Part, System};
use seawall_tests::{root, text};
use serde_json::Value;

const MIB: u64 = 1 << 20;
/// Nothing here is a measurement; past this something hangs.
const PATIENCE: Duration = Duration::from_secs(120);

fn wait_until(what: &str, mut holds: impl FnMut() -> bool) -> anyhow::Result<()> {
    let limit = Instant::now() + PATIENCE;
    while !holds() {
        ensure!(Instant::now() < limit, "{what}: not within {PATIENCE:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// A disk with a filesystem, mounted where other users can go.
struct Site {
    mount: Mount,
    disk: LoopDisk,
    name: String,
    dir: tempfile::TempDir,
}

impl Site {
    fn make() -> anyhow::Result<Site> {
        let dir = tempfile::tempdir()?;
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755))?;
        let disk = LoopDisk::create(&dir.path().join("disk.img"), 640 * MIB)?;
        FileSystem::Ext4.make(disk.device())?;
        let mount = Mount::new(disk.device(), &dir.path().join("mnt"), "defaults")?;
        let name = disk.device().file_name().context("name")?.to_string_lossy().into_owned();
        Ok(Site { mount, disk, name, dir })
    }

    /// Replicates the disk with these shipped hooks and variables for them; waits for the first point.
    fn replicate(&self, hooks: &[&str], variables: &[(&str, &str)]) -> anyhow::Result<System> {
        let mut system = System::init(&[self.disk.device()], 500)?;
        let variables: String =
            variables.iter().map(|(name, value)| format!("{name} = {value:?}\n")).collect();
        // Servers that share two processors with a test are slow.
        let settings = format!(
            "every_s = 0\nbudget_ms = 10000\nhook_timeout_ms = 60000\nenvironment = {{ {} }}\n",
            variables.trim_end().replace('\n', ", ")
        );
        system.edit(Part::Agent, |text| {
            text.replace("source = \"auto\"", "source = \"ebpf\"").replace("every_s = 0\n", &settings)
        })?;
        let shipped = Path::new(env!("CARGO_MANIFEST_DIR")).join("../packaging/hooks");
        let dir = system.place(Part::Agent).join("hooks");
        fs::create_dir_all(&dir)?;
        for (number, name) in hooks.iter().enumerate() {
            let to = dir.join(format!("{}0-{name}", number + 1));
            fs::copy(shipped.join(name), &to)?;
            fs::set_permissions(&to, fs::Permissions::from_mode(0o755))?;
        }
        system.start_all()?;
        system.wait_for_points("a first point", |points| !points.is_empty())?;
        Ok(system)
    }

    /// Restores the disk at a point and mounts it.
    fn restored(&self, system: &System, epoch: u64) -> anyhow::Result<(Mount, LoopDisk)> {
        let image = system.dir().join(format!("restored-{epoch}.img"));
        system.restore(&self.name, epoch, &image)?;
        let disk = LoopDisk::attach(&image, 512)?;
        let mount = Mount::new(disk.device(), &self.dir.path().join("restored"), "defaults")?;
        Ok((mount, disk))
    }
}

fn application(point: &Value) -> anyhow::Result<u64> {
    ensure!(point["consistency"] == "application" && point.get("reason").is_none(), "{point}");
    point["epoch"].as_u64().context("epoch")
}

/// Points that nobody asked for, some of the newest.
fn crash_points(system: &System, count: usize) -> anyhow::Result<Vec<u64>> {
    let reply = system.operator("points", &[])?;
    let points = reply["groups"][0]["points"].as_array().context("points")?;
    let crash = points.iter().filter(|point| point["consistency"] == "crash");
    let epochs: Vec<u64> = crash.filter_map(|point| point["epoch"].as_u64()).collect();
    ensure!(epochs.len() >= count, "{} crash-consistent points", epochs.len());
    let step = (epochs.len() / count).max(1);
    Ok(epochs.into_iter().rev().step_by(step).take(count).collect())
}

fn can_run(test: &str, programs: &[&str]) -> bool {
    if !root(test) {
        return false;
    }
    match programs.iter().find(|program| !Path::new(program).exists()) {
        None => true,
        Some(missing) => {
            seawall_tests::cannot_run(test, &format!("{missing} is missing"));
            false
        }
    }
}

/// The online hook under pgbench, with the generic one beside it. What was committed before the freeze is in the point and what
/// was committed after it is not; the server recovers by a short replay; `pg_amcheck` finds nothing. The same for points
/// that nobody asked for, whose recovery may be longer.
#[test]
fn kernel_postgresql_online_points_recover() -> anyhow::Result<()> {
    let pgbench = format!("{PG_BIN}/pgbench");
    if !can_run("kernel_postgresql_online_points_recover", &[&pgbench]) {
        return Ok(());
    }
    let site = Site::make()?;
    let place = site.dir.path().join("pg");
    let server = Postgres::init(&site.mount.point().join("pg"), &place)?;
    server.start()?;
    server.run("pgbench", &["--initialize", "--scale=5", "--quiet", "postgres"])?;
    server.sql("create table said (word text primary key)")?;
    let say = |word: &str| {
        format!(
            "runuser -u postgres -- {PG_BIN}/psql -h {} -U postgres -d postgres -qc \"insert into said values ('{word}')\"",
            place.display()
        )
    };
    let system = site.replicate(
        &["postgresql", "generic"],
        &[
            ("POSTGRESQL_DATA", text(&server.data)),
            ("GENERIC_QUIESCE", &say("quiesced")),
            ("GENERIC_RESUME", &say("resumed")),
        ],
    )?;
    let bench = Bench::start(&server);
    std::thread::sleep(Duration::from_secs(2));
    server.sql("insert into said values ('before')")?;
    let (point, _) = system.point(&["--label", "under pgbench", "--wait"])?;
    let epoch = application(&point).with_context(|| system.logged(Part::Agent))?;
    println!("PostgreSQL online: frozen for {} us", point["frozen_us"]);
    ensure!(server.sql("select word from said order by word")? == "before\nquiesced\nresumed");
    // More points that nobody asked for.
    std::thread::sleep(Duration::from_secs(3));
    let crash = crash_points(&system, 3)?;
    drop(bench);

    for (number, epoch) in std::iter::once(epoch).chain(crash.iter().copied()).enumerate() {
        let (mount, disk) = site.restored(&system, epoch)?;
        let place = site.dir.path().join(format!("restored-pg-{epoch}"));
        let copy = Postgres::at(&mount.point().join("pg"), &place)?;
        // The lock file of the server that ran at the cut names a process that may run here.
        fs::remove_file(copy.data.join("postmaster.pid"))?;
        copy.start().with_context(|| format!("point {epoch}"))?;
        let log = copy.log();
        // That a recovery is seen when there is one: of a running server there always is.
        ensure!(log.contains("database system was not properly shut down"), "{log}");
        copy.check().with_context(|| format!("point {epoch}"))?;
        if number == 0 {
            ensure!(copy.sql("select word from said order by word")? == "before\nquiesced");
        }
        println!("PostgreSQL point {epoch}: {}", redo(&log));
        drop(copy);
        mount.unmount()?;
        drop(disk);
    }
    Ok(())
}

/// How much was replayed, in the server's words.
fn redo(log: &str) -> String {
    let line =
        |what: &str| log.lines().find_map(|line| line.split_once(what)).map_or("-", |(_, rest)| rest.trim());
    format!("redo from {} to {}", line("redo starts at"), line("redo done at"))
}

/// The clean hook: the server starts from the point without recovery, and serves again at the source.
#[test]
fn kernel_postgresql_clean_points_need_no_recovery() -> anyhow::Result<()> {
    let pgbench = format!("{PG_BIN}/pgbench");
    if !can_run("kernel_postgresql_clean_points_need_no_recovery", &[&pgbench]) {
        return Ok(());
    }
    let site = Site::make()?;
    let server = Postgres::init(&site.mount.point().join("pg"), &site.dir.path().join("pg"))?;
    server.start()?;
    server.run("pgbench", &["--initialize", "--scale=5", "--quiet", "postgres"])?;
    let mut system = site.replicate(&["postgresql-clean"], &[("POSTGRESQL_DATA", text(&server.data))])?;
    let bench = Bench::start(&server);
    std::thread::sleep(Duration::from_secs(2));
    let (point, _) = system.point(&["--wait"])?;
    let epoch = application(&point).with_context(|| system.logged(Part::Agent))?;
    println!("PostgreSQL clean: frozen for {} us", point["frozen_us"]);
    server.sql("select 1").context("it serves again")?;

    // Killed while the server is down: it is started again all the same.
    let hook = system.place(Part::Agent).join("hooks/90-wait");
    let begun = system.dir().join("begun");
    fs::write(
        &hook,
        // It hangs, but no longer than this test is there.
        format!(
            "#!/bin/bash\ntouch {0}\n[ $1 != pre-freeze ] || while [ -e {0} ]; do sleep 0.2; done\n",
            begun.display()
        ),
    )?;
    fs::set_permissions(&hook, fs::Permissions::from_mode(0o755))?;
    let asked = ask_in_background(&system)?;
    wait_until("the last hook is run", || begun.exists())?;
    ensure!(server.sql("select 1").is_err(), "the server is down");
    system.kill(Part::Agent)?;
    wait_until("the server serves again", || server.sql("select 1").is_ok())?;
    end(asked)?;
    drop(bench);

    let (mount, _disk) = site.restored(&system, epoch)?;
    let copy = Postgres::at(&mount.point().join("pg"), &site.dir.path().join("restored-pg"))?;
    ensure!(!copy.data.join("postmaster.pid").exists(), "no server ran at the cut");
    copy.start()?;
    let log = copy.log();
    ensure!(log.contains("database system was shut down at"), "{log}");
    for recovery in ["not properly shut down", "redo starts", "recovery"] {
        ensure!(!log.contains(recovery), "{recovery:?} in {log}");
    }
    copy.check()?;
    println!("PostgreSQL point {epoch}: {}", redo(&log));
    drop(copy);
    mount.unmount()
}

fn ask_in_background(system: &System) -> anyhow::Result<Child> {
    let seawall = seawall_tests::system::program("seawall")?;
    let mut command = Command::new(seawall);
    command.args(["point", "now", "--socket"]).arg(system.socket());
    command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().context("ask for a point")
}

fn end(mut child: Child) -> anyhow::Result<()> {
    wait_until("the command ends with the agent", || !matches!(child.try_wait(), Ok(None)))
}

/// A MariaDB server. Stopped when dropped.
struct Mariadb {
    place: PathBuf,
    server: Child,
}

impl Mariadb {
    fn init(data: &Path) -> anyhow::Result<()> {
        directory_of("mysql", data)?;
        let datadir = format!("--datadir={}", data.display());
        run("mariadb-install-db", &["--no-defaults", "--user=mysql", &datadir, "--skip-test-db"]).map(drop)
    }

    fn start(data: &Path, place: &Path) -> anyhow::Result<Mariadb> {
        directory_of("mysql", place)?;
        fs::write(
            place.join("client.cnf"),
            format!("[client]\nsocket={}\n", place.join("socket").display()),
        )?;
        let log = File::create(place.join("log"))?;
        let server = Command::new("mariadbd")
            .args(["--no-defaults", "--user=mysql", "--skip-networking", "--innodb-buffer-pool-size=64M"])
            .arg(format!("--datadir={}", data.display()))
            .arg(format!("--socket={}", place.join("socket").display()))
            .arg(format!("--pid-file={}", place.join("pid").display()))
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()?;
        let mut started = Mariadb { place: place.to_owned(), server };
        let limit = Instant::now() + PATIENCE;
        while started.sql("select 1").is_err() {
            let ended = started.server.try_wait()?;
            ensure!(ended.is_none() && Instant::now() < limit, "start MariaDB: {ended:?} {}", started.log());
            std::thread::sleep(Duration::from_millis(100));
        }
        Ok(started)
    }

    fn log(&self) -> String {
        fs::read_to_string(self.place.join("log")).unwrap_or_default()
    }

    fn defaults(&self) -> String {
        format!("--defaults-file={}", self.place.join("client.cnf").display())
    }

    fn sql(&self, statements: &str) -> anyhow::Result<String> {
        run("mariadb", &[&self.defaults(), "--batch", "--skip-column-names", "-e", statements])
    }

    /// Every table of these databases is sound.
    fn check(&self, databases: &[&str]) -> anyhow::Result<()> {
        let defaults = self.defaults();
        let said = run(
            "mariadb-check",
            &[&[&defaults, "--check", "--extended", "--databases"], databases].concat(),
        )?;
        let lines = said.lines().filter(|line| !line.trim().is_empty());
        let bad: Vec<&str> = lines.clone().filter(|line| !line.trim_end().ends_with("OK")).collect();
        ensure!(bad.is_empty() && lines.count() > 0, "mariadb-check: {said}\n{}", self.log());
        Ok(())
    }
}

impl Drop for Mariadb {
    fn drop(&mut self) {
        // Ended already, or ends now.
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}

/// Sessions that write to tables of engines with and without transactions and change their definitions, all the time.
struct Load {
    stop: Arc<AtomicBool>,
    rounds: Arc<AtomicU64>,
    threads: Vec<JoinHandle<anyhow::Result<()>>>,
}

impl Load {
    fn start(server: &Mariadb) -> Load {
        let (stop, rounds) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let session = |number: u64| {
            let (defaults, stop, rounds) = (server.defaults(), stop.clone(), rounds.clone());
            std::thread::spawn(move || -> anyhow::Result<()> {
                let mut round = 0;
                while !stop.load(Ordering::SeqCst) {
                    round += 1;
                    // A transaction writes the same to two tables; tables without transactions follow.
                    let mut script = String::new();
                    for row in 0..20 {
                        let value = format!("{number}, {}", round * 100 + row);
                        script += &format!(
                            "begin; insert into inno.a values ({value}); insert into inno.b values ({value}); commit;\n\
                             insert into plain.m values ({value}); insert into plain.r values ({value});\n"
                        );
                    }
                    if number == 0 {
                        script += "create or replace table plain.tmp (n int) engine=MyISAM; \
                                   insert into plain.tmp values (1); alter table plain.tmp add column k int;\n";
                    }
                    run("mariadb", &[&defaults, "-e", &script])?;
                    rounds.fetch_add(1, Ordering::SeqCst);
                }
                Ok(())
            })
        };
        let threads = (0..3).map(session).collect();
        Load { stop, rounds, threads }
    }

    /// Waits until more is written than now.
    fn wait_for_more(&self) -> anyhow::Result<()> {
        let before = self.rounds.load(Ordering::SeqCst);
        wait_until("writes go on", || self.rounds.load(Ordering::SeqCst) > before + 3)
    }

    fn stop(mut self) -> anyhow::Result<()> {
        self.stop.store(true, Ordering::SeqCst);
        self.threads.drain(..).try_for_each(|thread| thread.join().expect("a session does not panic"))
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        for thread in self.threads.drain(..) {
            // There is another failure to tell.
            let _ = thread.join();
        }
    }
}

/// The MariaDB hook, with either lock. In its points tables of every engine are sound; in points that nobody asked for those with
/// transactions are. No transaction is there by half; what was committed before is there.
fn mariadb(lock: &str) -> anyhow::Result<()> {
    let site = Site::make()?;
    let data = site.mount.point().join("db");
    Mariadb::init(&data)?;
    let server = Mariadb::start(&data, &site.dir.path().join("mariadb"))?;
    server.sql(
        "create database inno; create database plain;\
         create table inno.a (s int, n int, primary key (s, n)) engine=InnoDB; create table inno.b like inno.a;\
         create table plain.m (s int, n int, key (n)) engine=MyISAM;\
         create table plain.r (s int, n int, key (n)) engine=Aria;\
         create table inno.said (word varchar(20)) engine=InnoDB;",
    )?;
    let cnf = server.place.join("client.cnf");
    let mut system =
        site.replicate(&["mariadb"], &[("MARIADB_DEFAULTS_FILE", text(&cnf)), ("MARIADB_LOCK", lock)])?;
    let load = Load::start(&server);
    load.wait_for_more()?;
    let mut asked = Vec::new();
    for number in 0..3 {
        server.sql(&format!("insert into inno.said values ('before {number}')"))?;
        let (point, _) = system.point(&["--wait"])?;
        let epoch = application(&point).with_context(|| system.logged(Part::Agent))?;
        println!("MariaDB, {lock}: frozen for {} us", point["frozen_us"]);
        asked.push((epoch, number));
        load.wait_for_more().context("the lock is released")?;
    }
    std::thread::sleep(Duration::from_secs(2));
    let crash = crash_points(&system, 2)?;

    // Killed with the lock held: it is released all the same.
    let hook = system.place(Part::Agent).join("hooks/90-wait");
    let begun = system.dir().join("begun");
    fs::write(
        &hook,
        // It hangs, but no longer than this test is there.
        format!(
            "#!/bin/bash\ntouch {0}\n[ $1 != pre-freeze ] || while [ -e {0} ]; do sleep 0.2; done\n",
            begun.display()
        ),
    )?;
    fs::set_permissions(&hook, fs::Permissions::from_mode(0o755))?;
    let waiting = ask_in_background(&system)?;
    wait_until("the last hook is run", || begun.exists())?;
    let rounds = load.rounds.load(Ordering::SeqCst);
    std::thread::sleep(Duration::from_secs(1));
    let meanwhile = load.rounds.load(Ordering::SeqCst);
    ensure!(meanwhile <= rounds + 3, "commits do not wait for the lock: {rounds} {meanwhile}");
    system.kill(Part::Agent)?;
    load.wait_for_more().context("the lock goes with the agent")?;
    end(waiting)?;
    load.stop()?;
    drop(server);

    let points = asked.iter().map(|(epoch, number)| (*epoch, Some(*number)));
    for (epoch, number) in points.chain(crash.into_iter().map(|epoch| (epoch, None))) {
        let (mount, disk) = site.restored(&system, epoch)?;
        let copy = Mariadb::start(&mount.point().join("db"), &site.dir.path().join("restored-mariadb"))
            .with_context(|| format!("point {epoch}"))?;
        let databases: &[&str] = if number.is_some() { &["inno", "plain", "mysql"] } else { &["inno"] };
        copy.check(databases).with_context(|| format!("point {epoch}, asked for: {number:?}"))?;
        let halves = copy.sql(
            "select count(*) from inno.a left join inno.b using (s, n) where inno.b.s is null;\
             select count(*) from inno.b left join inno.a using (s, n) where inno.a.s is null;",
        )?;
        ensure!(halves == "0\n0", "transactions by half: {halves}");
        if let Some(number) = number {
            let said = copy.sql(&format!("select count(*) from inno.said where word = 'before {number}'"))?;
            ensure!(said == "1", "what was committed before is missing: {said}");
        }
        drop(copy);
        mount.unmount()?;
        drop(disk);
    }
    Ok(())
}

#[test]
fn kernel_mariadb_points_with_backup_stages() -> anyhow::Result<()> {
    let test = "kernel_mariadb_points_with_backup_stages";
    if can_run(test, &["/usr/sbin/mariadbd"]) { mariadb("auto") } else { Ok(()) }
}

#[test]
fn kernel_mariadb_points_with_a_read_lock() -> anyhow::Result<()> {
    let test = "kernel_mariadb_points_with_a_read_lock";
    if can_run(test, &["/usr/sbin/mariadbd"]) { mariadb("tables") } else { Ok(()) }
}

/// A server of which a part lies elsewhere is refused, with what to do; one that lies elsewhere as a whole is left alone.
#[test]
fn kernel_a_server_on_other_disks_is_not_promised() -> anyhow::Result<()> {
    if !can_run("kernel_a_server_on_other_disks_is_not_promised", &[&format!("{PG_BIN}/initdb")]) {
        return Ok(());
    }
    let site = Site::make()?;
    let server = Postgres::init(&site.mount.point().join("pg"), &site.dir.path().join("pg"))?;
    let elsewhere = site.dir.path().join("wal");
    run("mv", &[text(&server.data.join("pg_wal")), text(&elsewhere)])?;
    std::os::unix::fs::symlink(&elsewhere, server.data.join("pg_wal"))?;
    ensure!(fs::metadata(&elsewhere)?.dev() != fs::metadata(site.mount.point())?.dev());
    server.start()?;
    let system = site.replicate(&["postgresql"], &[("POSTGRESQL_DATA", text(&server.data))])?;
    let (point, code) = system.point(&[])?;
    let reason = point["reason"].as_str().unwrap_or_default();
    ensure!(code == 3 && point["consistency"] == "filesystem", "{point}");
    ensure!(reason.contains("pg_wal does not lie on the group's disks"), "{reason}");
    Ok(())
}
