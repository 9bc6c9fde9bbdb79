//! The whole story of a database: protected at one site, tried out at the other, lost, run there, and brought home; with the real
//! programs, each site in a network of its own.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use scratch::postgres::{Bench, PG_BIN, Postgres};
use scratch::{FileSystem, LoopDisk, Mount};
use seawall_tests::attached::Attached;
use seawall_tests::database::{Rows, examined, kill, make_rows_table, revived, stop};
use seawall_tests::network::TwoSites;
use seawall_tests::system::{Part, System};
use seawall_tests::{cannot_run, content, differing, name, root, text};
use serde_json::Value;

const DISK: u64 = 512 << 20;
/// Of the volume, what a comparison of all of it may cost: its checksums.
const CHECKSUMS_SHARE: u64 = 1000;

fn uri(volume: &Value) -> anyhow::Result<&str> {
    volume.as_str().context("an export's URI")
}

fn only_ebpf(system: &System) -> anyhow::Result<()> {
    system.edit(Part::Agent, |text| text.replace("source = \"auto\"", "source = \"ebpf\""))
}

/// At most 1.1 times the granules that differ have moved, and what a comparison costs.
fn little_moved(what: &str, system: &System, differed: u64) -> anyhow::Result<()> {
    let report = system.report()?;
    let sent = report["sent_bytes_total"].as_u64().context("bytes sent")?;
    let ratio = if differed == 0 { "-".into() } else { format!("{:.3}", sent as f64 / differed as f64) };
    println!("{what}: {sent} bytes moved, {differed} bytes of granules differed, ratio {ratio}");
    ensure!(
        sent <= differed * 11 / 10 + DISK / CHECKSUMS_SHARE,
        "{sent} bytes moved for {differed}: {report}"
    );
    Ok(())
}

/// PostgreSQL under pgbench is protected from A to B; tried out at B meanwhile; A is lost; B runs it, and is protected to A's old
/// disk; it goes home, and is protected to B again. At each stage no transaction is there by half, every index agrees with its table, and
/// the rows that were acknowledged are there: all that were before the point when A is lost, and all of them when it goes home.
#[test]
fn kernel_a_database_goes_over_and_comes_home() -> anyhow::Result<()> {
    let test = "kernel_a_database_goes_over_and_comes_home";
    if !root(test) {
        return Ok(());
    }
    if !Path::new(PG_BIN).join("pgbench").exists() {
        cannot_run(test, "PostgreSQL is missing");
        return Ok(());
    }
    let sites = TwoSites::make()?;
    let dir = tempfile::tempdir()?;
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755))?;
    let place = |name: &str| dir.path().join(name);
    let disk_a = LoopDisk::create(&place("a.img"), DISK)?;
    let name_a = name(disk_a.device());
    FileSystem::Ext4.make(disk_a.device())?;
    let mut forward = System::init_between(&[disk_a.device()], 200, &sites.a, &sites.b)?;
    only_ebpf(&forward)?;

    // A works and is protected.
    let mount_a = Mount::new(disk_a.device(), &place("a"), "defaults")?;
    let server_a = Postgres::init(&mount_a.point().join("pg"), &place("pg-a"))?;
    server_a.start()?;
    server_a.run("pgbench", &["--initialize", "--scale=2", "--quiet", "postgres"])?;
    make_rows_table(&server_a)?;
    forward.start_all()?;
    forward.wait_for_points("a first point", |points| !points.is_empty())?;
    let rows_a = Rows::start(&server_a, "A")?;
    let bench_a = Bench::start(&server_a);
    rows_a.wait_for_more()?;

    // A drill at B, while A goes on.
    let before = rows_a.acknowledged();
    let point = forward.wait_for_now()?;
    fs::create_dir(place("drill-nbd"))?;
    let sockets = place("drill-nbd");
    let drill =
        forward.asked(&["drill", "start", "--point", &point.to_string(), "--sockets", text(&sockets)])?;
    {
        let attached = Attached::new(uri(&drill["volumes"][0]["uri"])?, &place("drill"))?;
        let server = revived(&attached.file("pg"), &place("pg-drill"))?;
        let [found] = examined(&server, ["A"])?;
        ensure!(found >= before, "{found} rows in the drill, {before} were acknowledged before its point");
        server.run("pgbench", &["--client=2", "--time=1", "--no-vacuum", "postgres"])?;
        examined(&server, ["A"]).context("after the drill's own transactions")?;
        println!("drill: {found} rows, of which {before} had been acknowledged when it was asked for");
        rows_a.wait_for_more().context("A goes on during the drill")?;
        stop(&server)?;
        attached.end()?;
    }
    forward.asked(&["drill", "stop"])?;
    let after_drill = forward.wait_for_now()?;
    ensure!(after_drill > point, "points go on");

    // A is lost: first its way out, then all that runs there.
    sites.cut()?;
    rows_a.wait_for_more()?;
    kill(&server_a)?;
    forward.kill(Part::Agent)?;
    forward.kill(Part::ProcessServer)?;
    let acknowledged = rows_a.stop();
    drop(bench_a);
    let newest = forward.points().last().copied().context("a point")?;
    let cut_time = forward.point_at_target(&newest.into())?["cut_time"].as_u64().context("its time")?;
    let due = acknowledged.iter().filter(|time| time.0 < cut_time).count() as u64;

    // B takes over.
    fs::create_dir(place("nbd"))?;
    let begun = Instant::now();
    let over = forward.failover(&["start", "--promote", "--export", text(&place("nbd"))])?;
    let mut disk_b = Attached::new(uri(&over["uris"][0])?, &place("b"))?;
    let server_b = revived(&disk_b.file("pg"), &place("pg-b"))?;
    println!(
        "from the command to a database that answers at B: {:?} (export: {} ms)",
        begun.elapsed(),
        over["took_ms"]
    );
    let [survived] = examined(&server_b, ["A"])?;
    println!(
        "lost A: {} rows were acknowledged, {due} of them before the point, {survived} are at B",
        acknowledged.len()
    );
    ensure!(survived >= due && due > before, "{survived} rows survived of {due} from before the point");
    ensure!(survived < acknowledged.len() as u64, "nothing was written after the cut");
    let rows_b = Rows::start(&server_b, "B")?;
    let bench_b = Bench::start(&server_b);
    rows_b.wait_for_more()?;
    ensure!(forward.failover(&["commit"])?["generation"] == 2);
    std::thread::sleep(Duration::from_secs(2));
    // Quiet for a moment, so that it can be said what differs.
    drop(bench_b);
    let at_b = rows_b.stop().len() as u64;
    server_b.sql("checkpoint")?;

    // A's machine is there again; its disk becomes the replica of B's.
    mount_a.unmount()?;
    forward.detach()?;
    sites.mend()?;
    let found = content(disk_a.device())?;
    let name_b = name(disk_b.device());
    let mut back = System::init_between(&[disk_b.device()], 200, &sites.b, &sites.a)?;
    only_ebpf(&back)?;
    let adopt = format!(
        "\n[[group.volume]]\nname = {name_b:?}\ndevice = {:?}\nadopt = true\n",
        text(disk_a.device())
    );
    back.edit(Part::TargetServer, |text| format!("{text}{adopt}"))?;
    back.start_all()?;
    back.wait_for_points("a point of B", |points| points.len() > 1)?;
    little_moved("reverse protection", &back, differing(&found, &content(disk_b.device())?))?;
    ensure!(back.restored(&name_b, 1)? == found, "what A had written is kept as it was found");
    drop(found);

    // B goes on while it is protected; then it is stopped and goes home.
    let rows_b = Rows::start(&server_b, "C")?;
    let bench_b = Bench::start(&server_b);
    rows_b.wait_for_more()?;
    back.wait_for_now()?;
    drop(bench_b);
    let later_at_b = rows_b.stop().len() as u64;
    ensure!(examined(&server_b, ["A", "B", "C"])? == [survived, at_b, later_at_b]);
    stop(&server_b)?;
    disk_b.unmount()?;
    let handed = back.hand_over(&[])?;
    ensure!(handed["equal"] == DISK && handed["different"] == 0, "{handed}");
    back.failover(&["start", "--point", &handed["epoch"].to_string()])?;
    back.failover(&["commit"])?;
    for part in [Part::Agent, Part::ProcessServer, Part::TargetServer] {
        back.stop(part)?;
    }
    let last_at_b = content(disk_b.device())?;
    ensure!(content(disk_a.device())? == last_at_b, "A's disk is B's, byte for byte");
    back.detach()?;
    drop(back);
    drop(server_b);
    drop(disk_b);
    for export in over["exports"].as_array().context("exports")? {
        forward.asked(&["export", "stop", &export["id"].to_string()])?;
    }
    forward.failover(&["demote"])?;

    // A runs it again, protected to B as before.
    forward.failover(&["start"])?;
    ensure!(forward.failover(&["commit"])?["generation"] == 3);
    forward.edit(Part::Agent, |text| text.replace("generation = 1", "generation = 3"))?;
    let stale = forward.points().last().copied().context("a point")?;
    forward.start(Part::ProcessServer)?;
    forward.start(Part::Agent)?;
    forward.wait_for_points("a point of A", |points| points.last() > Some(&stale))?;
    little_moved(
        "protection in the old direction",
        &forward,
        differing(&last_at_b, &content(disk_a.device())?),
    )?;
    let mount_a = Mount::new(disk_a.device(), &place("a"), "defaults")?;
    let server_a = revived(&mount_a.point().join("pg"), &place("pg-a"))?;
    let home = [survived, at_b, later_at_b];
    ensure!(examined(&server_a, ["A", "B", "C"])? == home, "all that was acknowledged at B is at A");
    let rows_a = Rows::start(&server_a, "D")?;
    let bench_a = Bench::start(&server_a);
    rows_a.wait_for_more()?;
    let due = rows_a.acknowledged();
    let point = forward.wait_for_now()?;
    drop(bench_a);
    rows_a.stop();
    let image = place("again.img");
    forward.restore(&name_a, point, &image)?;
    {
        let copy = LoopDisk::attach(&image, 512)?;
        let mount = Mount::new(copy.device(), &place("again"), "defaults")?;
        let server = revived(&mount.point().join("pg"), &place("pg-again"))?;
        let [a, b, c, d] = examined(&server, ["A", "B", "C", "D"])?;
        ensure!([a, b, c] == home && d >= due, "{a} {b} {c} {d} rows at B, {home:?} and {due} are due");
        println!("home: {a} + {b} + {c} rows of before, and {d} new ones at B");
        stop(&server)?;
        mount.unmount()?;
    }
    stop(&server_a)?;
    mount_a.unmount()?;
    FileSystem::Ext4.check(disk_a.device())?;
    forward.stop(Part::Agent)?;
    forward.detach()
}
