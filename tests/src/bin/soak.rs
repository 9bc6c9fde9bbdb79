//! Faults until time is up, under a database: pgbench on PostgreSQL on a protected ext4, random faults from the table in
//! docs/reliability.md, and random points restored and checked. `cargo xtask soak` runs it.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use clap::Parser;
use scratch::postgres::{Bench, PG_BIN, Postgres};
use scratch::{FileSystem, LoopDisk, Mount};
use seawall_tests::chance::Chance;
use seawall_tests::proxy::{Proxy, Weather};
use seawall_tests::system::{Part, System};

const MIB: u64 = 1 << 20;
/// The protected disk.
const DISK_BYTES: u64 = 640 * MIB;
/// Points that are restored and checked after each fault, besides the newest.
const POINTS_A_ROUND: usize = 1;
/// Points kept; older ones go, so that the target's disk does not fill up.
const POLICY: &str = "all for 5m, hourly for 1d";

const AGENT_STEPS: &[&str] =
    &["after-cut", "after-seal", "after-delivery", "before-acknowledged", "after-acknowledged"];
const PROCESS_STEPS: &[&str] =
    &["before-cache-write", "after-cache-write", "after-cache-sync", "before-rename", "after-cursors"];
const TARGET_STEPS: &[&str] =
    &["before-layer", "after-layer", "before-image-sync", "after-image", "after-state"];

/// Faults under a database until time is up.
#[derive(Parser)]
struct Options {
    /// For so long.
    #[arg(long, default_value_t = 10)]
    minutes: u64,
    /// Decides which faults, when, and which points.
    #[arg(long)]
    seed: Option<u64>,
}

/// What is done to the system.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Fault {
    /// `kill -9` at a step of a crash order.
    KillAgentAt(&'static str),
    KillProcessServerAt(&'static str),
    KillTargetServerAt(&'static str),
    /// `kill -9` at any moment.
    Kill(Part3),
    /// Both servers at once.
    KillServers,
    /// As a restart of the source machine: tracking ends.
    LoseTracking,
    /// The way is cut in the middle of frames, or is down, or slow.
    Cut(Way),
    Down(Way),
    Slow(Way),
    /// The process server's cache is lost.
    EmptyProcessServer,
    /// Nothing; points are checked.
    Nothing,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Part3 {
    Agent,
    ProcessServer,
    TargetServer,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Way {
    ToProcessServer,
    ToTarget,
}

impl From<Part3> for Part {
    fn from(part: Part3) -> Part {
        match part {
            Part3::Agent => Part::Agent,
            Part3::ProcessServer => Part::ProcessServer,
            Part3::TargetServer => Part::TargetServer,
        }
    }
}

impl Fault {
    fn any(chance: &mut Chance) -> Fault {
        let way = chance.of(&[Way::ToProcessServer, Way::ToTarget]);
        match chance.below(12) {
            0 => Fault::KillAgentAt(chance.of(AGENT_STEPS)),
            1 => Fault::KillProcessServerAt(chance.of(PROCESS_STEPS)),
            2 | 3 => Fault::KillTargetServerAt(chance.of(TARGET_STEPS)),
            4 => Fault::Kill(chance.of(&[Part3::Agent, Part3::ProcessServer, Part3::TargetServer])),
            5 => Fault::KillServers,
            6 => Fault::LoseTracking,
            7 => Fault::Cut(way),
            8 => Fault::Down(way),
            9 => Fault::Slow(way),
            10 => Fault::EmptyProcessServer,
            _ => Fault::Nothing,
        }
    }

    fn kind(self) -> &'static str {
        match self {
            Fault::KillAgentAt(_) => "agent killed at a step",
            Fault::KillProcessServerAt(_) => "process server killed at a step",
            Fault::KillTargetServerAt(_) => "target server killed at a step",
            Fault::Kill(_) => "a part killed at any moment",
            Fault::KillServers => "both servers killed",
            Fault::LoseTracking => "tracking lost",
            Fault::Cut(_) => "link cut in the middle of frames",
            Fault::Down(_) => "link down",
            Fault::Slow(_) => "link slow",
            Fault::EmptyProcessServer => "process server replaced by an empty one",
            Fault::Nothing => "none",
        }
    }
}

struct Soak {
    system: System,
    process: Proxy,
    target: Proxy,
    chance: Chance,
}

impl Soak {
    fn die_at(&mut self, part: Part, step: &str) -> anyhow::Result<()> {
        let fault = format!("{step}:{}", 1 + self.chance.below(5));
        self.system.stop(part)?;
        self.system.start_with(part, &[(durable::FAULT_VARIABLE, &fault)])?;
        self.system.wait_killed(part).with_context(|| fault.clone())?;
        self.pause(500);
        self.system.start(part)
    }

    fn pause(&mut self, most_ms: u64) {
        std::thread::sleep(Duration::from_millis(self.chance.below(most_ms)));
    }

    fn way(&self, way: Way) -> &Proxy {
        match way {
            Way::ToProcessServer => &self.process,
            Way::ToTarget => &self.target,
        }
    }

    fn inflict(&mut self, fault: Fault) -> anyhow::Result<()> {
        match fault {
            Fault::KillAgentAt(step) => self.die_at(Part::Agent, step),
            Fault::KillProcessServerAt(step) => self.die_at(Part::ProcessServer, step),
            Fault::KillTargetServerAt(step) => self.die_at(Part::TargetServer, step),
            Fault::Kill(part) => {
                self.system.kill(part.into())?;
                self.pause(3000);
                self.system.start(part.into())
            }
            Fault::KillServers => {
                self.system.kill(Part::ProcessServer)?;
                self.system.kill(Part::TargetServer)?;
                self.pause(2000);
                self.system.start(Part::TargetServer)?;
                self.pause(1000);
                self.system.start(Part::ProcessServer)
            }
            Fault::LoseTracking => {
                self.system.stop(Part::Agent)?;
                self.system.detach()?;
                self.pause(2000);
                self.system.start(Part::Agent)
            }
            Fault::Cut(way) => {
                for _ in 0..3 {
                    let bytes = 2000 + self.chance.below(2_000_000);
                    self.way(way).set(Weather::Down);
                    self.way(way).set(Weather::Cut(bytes));
                    self.pause(3000);
                }
                self.way(way).set(Weather::Clear);
                Ok(())
            }
            Fault::Down(way) => {
                self.way(way).set(Weather::Down);
                self.pause(8000);
                self.way(way).set(Weather::Clear);
                Ok(())
            }
            Fault::Slow(way) => {
                let rate = 100_000 + self.chance.below(900_000);
                self.way(way).set(Weather::Slow(rate));
                self.pause(8000);
                self.way(way).set(Weather::Clear);
                Ok(())
            }
            Fault::EmptyProcessServer => {
                self.system.kill(Part::ProcessServer)?;
                std::fs::remove_dir_all(self.system.place(Part::ProcessServer).join("cache"))?;
                self.system.start(Part::ProcessServer)
            }
            Fault::Nothing => {
                self.pause(3000);
                Ok(())
            }
        }
    }
}

/// The database at a point: the server starts, every index agrees with its table, and no transaction is there by half.
fn check(system: &System, name: &str, point: u64, dir: &Path) -> anyhow::Result<()> {
    let image = dir.join("restored.img");
    system.restore(name, point, &image)?;
    let disk = LoopDisk::attach(&image, 512)?;
    let mount = Mount::new(disk.device(), &dir.join("restored"), "defaults")?;
    let place = dir.join("restored-pg");
    let copy = Postgres::at(&mount.point().join("pg"), &place)?;
    // Of the server that ran at the cut.
    std::fs::remove_file(copy.data.join("postmaster.pid"))?;
    let checked = copy.start().and_then(|()| copy.check());
    drop(copy);
    mount.unmount()?;
    drop(disk);
    std::fs::remove_dir_all(&place)?;
    checked
}

fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    ensure!(scratch::is_root(), "the soak needs root, for loop devices, mounts and eBPF");
    ensure!(Path::new(PG_BIN).join("pgbench").exists(), "{PG_BIN}/pgbench is missing: install postgresql-15");
    let chance = match options.seed {
        Some(seed) => {
            println!("seed {seed}");
            Chance::new(seed)
        }
        None => Chance::from_environment(),
    };
    let until = Instant::now() + Duration::from_secs(options.minutes * 60);

    let dir = tempfile::tempdir()?;
    std::fs::set_permissions(dir.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    let disk = LoopDisk::create(&dir.path().join("disk.img"), DISK_BYTES)?;
    FileSystem::Ext4.make(disk.device())?;
    let mount = Mount::new(disk.device(), &dir.path().join("mnt"), "defaults")?;
    let name = disk.device().file_name().context("a name")?.to_string_lossy().into_owned();
    let server = Postgres::init(&mount.point().join("pg"), &dir.path().join("pg"))?;
    server.start()?;
    server.run("pgbench", &["--initialize", "--scale=5", "--quiet", "postgres"])?;

    let mut system = System::init(&[disk.device()], 500)?;
    system.edit(Part::Agent, |text| text.replace("source = \"auto\"", "source = \"ebpf\""))?;
    system.edit(Part::TargetServer, |text| {
        text.replace("all for 24h, hourly for 7d, daily for 30d, weekly for 1y", POLICY)
    })?;
    system.start_all()?;
    system.wait_for_now()?;
    let process = Proxy::before(&mut system, Part::ProcessServer)?;
    let target = Proxy::before(&mut system, Part::TargetServer)?;
    system.wait_for_now()?;
    let bench = Bench::start(&server);
    let mut soak = Soak { system, process, target, chance };

    let mut faults: BTreeMap<&str, u64> = BTreeMap::new();
    let (mut rounds, mut points, mut failures) = (0, 0, Vec::new());
    while Instant::now() < until {
        let fault = Fault::any(&mut soak.chance);
        rounds += 1;
        *faults.entry(fault.kind()).or_default() += 1;
        println!("round {rounds}: {fault:?}");
        soak.inflict(fault).with_context(|| format!("round {rounds}: {fault:?}"))?;
        // Without anyone's help there is a point from now on.
        let newest =
            soak.system.wait_for_now().with_context(|| format!("round {rounds}: after {fault:?}"))?;
        let all = soak.system.points();
        let mut wanted = vec![newest];
        wanted.extend((0..POINTS_A_ROUND).filter_map(|_| {
            let known: Vec<u64> = all.iter().copied().filter(|point| *point < newest).collect();
            (!known.is_empty()).then(|| soak.chance.of(&known))
        }));
        for point in wanted {
            points += 1;
            if let Err(error) = check(&soak.system, &name, point, dir.path()) {
                // Retention may have let go an old one meanwhile.
                if soak.system.points().contains(&point) {
                    println!("FAILURE: round {rounds}, {fault:?}, point {point}: {error:#}");
                    failures.push(format!("round {rounds}, {fault:?}, point {point}: {error:#}"));
                } else {
                    points -= 1;
                }
            }
        }
    }
    drop(bench);
    soak.system.stop(Part::Agent)?;
    println!("rounds: {rounds}");
    for (kind, count) in &faults {
        println!("fault: {kind}: {count}");
    }
    println!("points checked: {points}");
    println!("failures: {}", failures.len());
    ensure!(failures.is_empty(), "{}", failures.join("\n"));
    Ok(())
}
