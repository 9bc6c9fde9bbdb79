//! Failing over to a point, with the real programs: the source is kept out, nothing is lost, it can be taken back, and the volumes
//! can be used meanwhile.

use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, ensure};
use scratch::{FileSystem, LoopDisk, Mount, run};
use seawall_tests::attached::Attached;
use seawall_tests::system::{Part, System};
use seawall_tests::{name, root, text, wait_until};
use serde_json::Value;

const MIB: usize = 1 << 20;

/// Writes to the disk, and gives all of it.
fn write(disk: &LoopDisk, at: u64, byte: u8) -> anyhow::Result<Vec<u8>> {
    let file = std::fs::OpenOptions::new().write(true).open(disk.device())?;
    file.write_all_at(&vec![byte; 3 * MIB / 2 + 4096], at)?;
    file.sync_all()?;
    run("blockdev", &["--flushbufs", text(disk.device())])?;
    Ok(std::fs::read(disk.device())?)
}

fn group(system: &System) -> anyhow::Result<Value> {
    Ok(system.operator("status", &[])?["target_server"]["groups"][0].clone())
}

#[test]
fn kernel_a_failover_keeps_the_source_out_until_it_is_cancelled() -> anyhow::Result<()> {
    if !root("kernel_a_failover_keeps_the_source_out_until_it_is_cancelled") {
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    let disk = LoopDisk::create(&dir.path().join("disk.img"), 32 * MIB as u64)?;
    let mut system = System::init(&[disk.device()], 200)?;
    system.start_all()?;
    let first = write(&disk, 5 * MIB as u64, 1)?;
    let older = system.wait_for_now()?;
    let second = write(&disk, 6 * MIB as u64, 2)?;
    let newer = system.wait_for_now()?;
    ensure!(
        system.restored(&name(disk.device()), older)? == first
            && system.restored(&name(disk.device()), newer)? == second
    );
    for (step, says) in [("commit", "nothing to commit"), ("cancel", "nothing to commit")] {
        let refused = system.failover(&[step]).expect_err("there is none").to_string();
        ensure!(refused.contains(says), "{refused}");
    }

    let over = system.failover(&["start", "--point", &older.to_string()])?;
    let chosen = over["point"]["epoch"].as_u64().context("the new point")?;
    ensure!(chosen > newer && over["generation"] == 2, "{over}");
    ensure!(over["changed_bytes"].as_u64().is_some_and(|bytes| bytes > 0), "{over}");
    ensure!(
        system.restored(&name(disk.device()), chosen)? == first,
        "the volume is what it was at the point"
    );
    ensure!(system.restored(&name(disk.device()), newer)? == second, "what came after it is not lost");
    // The source goes on, and nothing of it arrives.
    let third = write(&disk, 7 * MIB as u64, 3)?;
    std::thread::sleep(Duration::from_secs(2));
    let state = group(&system)?;
    ensure!(state["applied"] == chosen && state["state"] == "failed-over", "{state}");
    ensure!(state["failover"]["point"] == older && state["failover"]["complete"] == true, "{state}");
    // It outlives the server.
    system.kill(Part::TargetServer)?;
    system.start(Part::TargetServer)?;
    wait_until("the target server is back", || {
        Ok(group(&system).is_ok_and(|state| state["applied"] == chosen))
    })?;
    ensure!(system.restored(&name(disk.device()), chosen)? == first);

    system.failover(&["cancel"])?;
    let back = system.wait_for_now()?;
    ensure!(system.restored(&name(disk.device()), back)? == third, "replication goes on where it was");
    ensure!(
        system.restored(&name(disk.device()), newer)? == second
            && system.restored(&name(disk.device()), older)? == first
    );

    // For good: the source is fenced, also when its agent starts again.
    system.failover(&["start", "--point", "latest"])?;
    let committed = system.failover(&["commit"])?;
    let chosen = committed["point"]["epoch"].as_u64().context("the newest point")?;
    write(&disk, 8 * MIB as u64, 4)?;
    for _ in 0..2 {
        system.stop(Part::Agent)?;
        system.start(Part::Agent)?;
        std::thread::sleep(Duration::from_secs(2));
        let state = group(&system)?;
        ensure!(state["applied"] == chosen && state["generation"] == committed["generation"], "{state}");
    }
    wait_until("the refusal is told", || {
        let status = system.operator("status", &[])?;
        Ok(status.to_string().contains("generation"))
    })?;
    ensure!(system.restored(&name(disk.device()), chosen)? == third);
    system.failover(&["cancel"]).expect_err("it was committed");
    system.stop(Part::Agent)
}

fn uri(socket: &Path, disk: &LoopDisk) -> String {
    format!("nbd+unix:///{}?socket={}", name(disk.device()), text(socket))
}

/// `seawall export` of the promoted disk, and the export's number.
fn export(system: &System, disk: &LoopDisk, socket: &Path) -> anyhow::Result<u64> {
    let name = name(disk.device());
    let arguments = [name.as_str(), "--promoted", "--socket", text(socket), "--detach"];
    let answer = system.operator("export", &arguments)?;
    ensure!(answer["export"]["promoted"] == true, "{answer}");
    answer["export"]["id"].as_u64().context("the export's number")
}

/// The source is lost; its file system goes on at the target, through a kill of the target server in the middle of writing, until
/// it is decided to go back.
#[test]
fn kernel_a_promoted_disk_is_used_and_survives_the_target_servers_end() -> anyhow::Result<()> {
    if !root("kernel_a_promoted_disk_is_used_and_survives_the_target_servers_end") {
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    let disk = LoopDisk::create(&dir.path().join("disk.img"), 64 * MIB as u64)?;
    FileSystem::Ext4.make(disk.device())?;
    let mut system = System::init(&[disk.device()], 200)?;
    system.start_all()?;
    {
        let source = Mount::new(disk.device(), &dir.path().join("source"), "rw")?;
        std::fs::write(source.point().join("before"), vec![7; 3 * MIB])?;
        source.unmount()?;
    }
    run("blockdev", &["--flushbufs", text(disk.device())])?;
    let before = std::fs::read(disk.device())?;
    let point = system.wait_for_now()?;

    let sockets = tempfile::tempdir()?;
    let place = text(sockets.path());
    let over = system.failover(&["start", "--point", &point.to_string(), "--promote", "--export", place])?;
    println!("from the command to the running export: {} ms", over["took_ms"]);
    let socket = sockets.path().join(format!("{}.sock", name(disk.device())));
    ensure!(over["uris"].as_array().is_some_and(|uris| uris.len() == 1) && socket.exists(), "{over}");
    ensure!(group(&system)?["state"] == "promoted", "{over}");
    let refused = system.failover(&["cancel"]).expect_err("it is promoted").to_string();
    ensure!(refused.contains("demote"), "{refused}");

    let used = Attached::new(&uri(&socket, &disk), &dir.path().join("first"))?;
    ensure!(std::fs::read(used.file("before"))? == vec![7; 3 * MIB]);
    let mut kept = Vec::new();
    for round in 0..20_u8 {
        let path = used.file(&format!("kept-{round}"));
        let content = vec![round + 1; 150_000 + usize::from(round) * 1000];
        std::fs::write(&path, &content)?;
        std::fs::File::open(&path)?.sync_all()?;
        kept.push((format!("kept-{round}"), content));
    }
    // Within a write, as a power cut of the target would come: some of it is there, nothing of it is promised.
    let busy = used.file("busy");
    let writer = std::thread::spawn(move || {
        let mut file = std::fs::File::create(busy)?;
        for round in 0..400_u32 {
            file.write_all(&vec![round as u8; 100_000])?;
            if round % 10 == 0 {
                file.sync_data()?;
            }
        }
        std::io::Result::Ok(())
    });
    std::thread::sleep(Duration::from_millis(300));
    system.kill(Part::TargetServer)?;
    let _ = writer.join();
    drop(used);

    system.start(Part::TargetServer)?;
    wait_until("the target server is back", || {
        Ok(group(&system).is_ok_and(|state| state["state"] == "promoted"))
    })?;
    for turn in ["second", "third"] {
        let again = sockets.path().join(format!("{turn}.sock"));
        let id = export(&system, &disk, &again)?;
        let used = Attached::new(&uri(&again, &disk), &dir.path().join(turn))?;
        for (name, content) in &kept {
            ensure!(
                std::fs::read(used.file(name))? == *content,
                "{name} was synced, and is another one ({turn})"
            );
        }
        std::fs::write(used.file(turn), turn)?;
        kept.push((turn.to_owned(), turn.as_bytes().to_vec()));
        let state = group(&system)?;
        ensure!(state["promoted"]["open"] == 1, "{state}");
        let refused = system.failover(&["demote"]).expect_err("it is exported").to_string();
        ensure!(refused.contains("seawall export list"), "{refused}");
        used.end()?;
        system.asked(&["export", "stop", &id.to_string()])?;
    }

    // What the source does meanwhile does not arrive; what was written is a point, and is given up when that is wanted.
    let after = write(&disk, 40 * MIB as u64, 9)?;
    system.failover(&["demote"])?;
    let state = group(&system)?;
    ensure!(
        state["state"] == "failed-over" && state["failover"]["written_bytes"].as_u64() > Some(MIB as u64),
        "{state}"
    );
    let newest = state["newest_point"]["epoch"].as_u64().context("the newest point")?;
    let copy = dir.path().join("copy.img");
    std::fs::write(&copy, system.restored(&name(disk.device()), newest)?)?;
    {
        let copy = LoopDisk::attach(&copy, 512)?;
        let mount = Mount::new(copy.device(), &dir.path().join("copy"), "ro")?;
        for (name, content) in &kept {
            ensure!(std::fs::read(mount.point().join(name))? == *content, "{name} at the point");
        }
        mount.unmount()?;
    }
    ensure!(system.restored(&name(disk.device()), point)? == before, "the point from before is what it was");
    system.failover(&["cancel"])?;
    let back = system.wait_for_now()?;
    ensure!(system.restored(&name(disk.device()), back)? == after, "replication goes on where it was");
    system.stop(Part::Agent)
}

/// From the command to the running exports, of a volume that has so many bytes and all of whose blocks are as at the point.
fn time_to_exports(dir: &Path, bytes: u64) -> anyhow::Result<f64> {
    std::fs::create_dir(dir)?;
    let disk = LoopDisk::create(&dir.join("disk.img"), bytes)?;
    let mut system = System::init(&[disk.device()], 200)?;
    let volume = name(disk.device());
    // Adopted, it has a point without that anything was read.
    let adopt =
        format!("\n[[group.volume]]\nname = {volume:?}\ndevice = {:?}\nadopt = true\n", text(disk.device()));
    system.edit(Part::TargetServer, |text| format!("{text}{adopt}"))?;
    system.start(Part::TargetServer)?;
    wait_until("there is a point", || Ok(system.points() == [1]))?;
    let mut times = Vec::new();
    for round in 0..5 {
        let place = dir.join(round.to_string());
        std::fs::create_dir(&place)?;
        let over = system.failover(&["start", "--point", "1", "--promote", "--export", text(&place)])?;
        times.push(over["took_ms"].as_f64().context("how long it took")?);
        let socket = place.join(format!("{volume}.sock"));
        let size = run("nbdinfo", &["--size", &uri(&socket, &disk)])?;
        ensure!(size == bytes.to_string() && over["changed_bytes"] == 0, "{size} {over}");
        system.asked(&["export", "stop", &over["exports"][0]["id"].to_string()])?;
        system.failover(&["demote"])?;
        system.failover(&["cancel"])?;
    }
    times.sort_by(f64::total_cmp);
    Ok(times[times.len() / 2])
}

/// A volume of any size is failed over, and how long that takes is printed: what counts is what changed since the point, not the size.
#[test]
fn kernel_a_large_volume_is_failed_over_as_a_small_one() -> anyhow::Result<()> {
    if !root("kernel_a_large_volume_is_failed_over_as_a_small_one") {
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    let small = time_to_exports(&dir.path().join("small"), 1 << 30)?;
    let large = time_to_exports(&dir.path().join("large"), 64 << 30)?;
    println!("to the running export: 1 GiB {small:.1} ms, 64 GiB {large:.1} ms, ratio {:.2}", large / small);
    Ok(())
}
