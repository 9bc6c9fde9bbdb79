//! The commands of the README, one after another, on an image file that is scanned: no privileges are needed.

mod support;

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde_json::Value;

use support::{Running, applied, free_port, json, seawall, status_when, text};

#[test]
fn from_init_to_restore() {
    let base = tempfile::tempdir().unwrap();
    let dir = base.path();
    let mut disk = vec![0_u8; 8 << 20];
    disk[1 << 20..][..300_000].fill(0xa1);
    std::fs::write(dir.join("disk.img"), &disk).unwrap();

    let (process, target) = (format!("127.0.0.1:{}", free_port()), format!("127.0.0.1:{}", free_port()));
    let init =
        ["init", "site", "--device", "disk.img", "--process-server", &process, "--target-server", &target];
    let output = seawall(dir, &init);
    assert!(output.status.success(), "{}", text(&output));
    assert!(text(&output).contains("seawall run --dir"), "{}", text(&output));
    let again = seawall(dir, &init);
    assert!(!again.status.success() && text(&again).contains("not empty"), "{}", text(&again));
    let config = dir.join("site/agent/agent.toml");
    let scan = std::fs::read_to_string(&config).unwrap().replace("\"auto\"", "\"scan\"");
    std::fs::write(&config, scan).unwrap();

    // Nobody runs: said as such, by exit status and by name.
    let output = seawall(dir, &["status"]);
    assert!(!output.status.success());
    for expected in [process.as_str(), target.as_str(), "Connection refused", "seawall run"] {
        assert!(text(&output).contains(expected), "{}", text(&output));
    }

    let running = Running::start(dir);
    let first = status_when(dir, |status| status["groups"][0]["points"].as_u64() > Some(0));
    let group = &first["groups"][0];
    assert_eq!(group["agent"], "source");
    assert_eq!(group["volumes"][0]["name"], "disk.img");
    assert!(group["lag_seconds"].as_f64().is_some(), "{group:#}");
    let shown = text(&seawall(dir, &["status"]));
    assert!(shown.contains("disk.img") && shown.contains("State: "), "{shown}");

    let points = json(dir, &["points", "--json"]);
    let old = points["groups"][0]["points"][0]["epoch"].as_u64().unwrap().to_string();
    let shown = text(&seawall(dir, &["points"]));
    assert!(shown.contains("crash"), "{shown}");

    // An older point stays what it was when the disk changes. Two epochs on, the change is in for certain.
    let before = disk.clone();
    disk[5 << 20..][..4096].fill(0xb2);
    let image = std::fs::OpenOptions::new().write(true).open(dir.join("disk.img")).unwrap();
    image.write_all_at(&[0xb2; 4096], 5 << 20).unwrap();
    let changed_at = applied(&status_when(dir, |_| true));
    status_when(dir, |status| applied(status) >= changed_at + 3);
    let restore = |point: &str, out: &str, more: &[&str]| {
        let args = ["restore", "--volume", "disk.img", "--point", point, "--out", out];
        seawall(dir, &[&args[..], more].concat())
    };
    let output = restore("latest", "new.img", &[]);
    assert!(output.status.success(), "{}", text(&output));
    let output = restore(&old, "old.img", &["--json"]);
    let done: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(done["point"]["epoch"].to_string(), old);
    assert!(std::fs::read(dir.join("new.img")).unwrap() == disk, "the newest point is the disk");
    assert!(std::fs::read(dir.join("old.img")).unwrap() == before, "the older point is the disk before");

    let output = restore("latest", "new.img", &[]);
    assert!(!output.status.success() && text(&output).contains("--force"), "{}", text(&output));
    let output = restore("999999", "none.img", &["--json"]);
    let refused: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(refused["error"].as_str().unwrap().contains("no recovery point 999999 of group"), "{refused}");
    assert!(!output.status.success());
    let left: Vec<_> = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(!left.iter().any(|name| name.to_string_lossy().contains("none.img")), "{left:?}");

    // Pinned under a name, shown so, not to be deleted; then unpinned, and deleted by name.
    let output = seawall(dir, &["pin", &old, "--label", "audit", "--for", "30d"]);
    assert!(output.status.success() && text(&output).contains("audit"), "{}", text(&output));
    let shown = text(&seawall(dir, &["points"]));
    assert!(shown.contains("pinned \"audit\" for 29 d"), "{shown}");
    let output = seawall(dir, &["point", "delete", &old, "--yes"]);
    assert!(!output.status.success() && text(&output).contains("it is pinned"), "{}", text(&output));
    let output = seawall(dir, &["pin", "999999"]);
    assert!(!output.status.success() && text(&output).contains("the nearest is"), "{}", text(&output));
    let output = seawall(dir, &["unpin", &old]);
    assert!(output.status.success(), "{}", text(&output));
    let points = json(dir, &["points", "--json"]);
    let gone = points["groups"][0]["points"][1]["epoch"].as_u64().unwrap().to_string();
    let output = seawall(dir, &["point", "delete", &gone]);
    assert!(
        !output.status.success() && text(&output).contains("--yes"),
        "asks, and nobody is there: {}",
        text(&output)
    );
    let deleted = json(dir, &["point", "delete", &gone, "--yes", "--json"]);
    assert_eq!(deleted["epoch"].to_string(), gone);
    let output = restore(&gone, "gone.img", &[]);
    assert!(!output.status.success() && text(&output).contains("the nearest is"), "{}", text(&output));

    // All is sound; a flipped bit in an undo layer is found, and costs the points before it.
    let scrubbed = json(dir, &["scrub", "--json"]);
    assert_eq!(scrubbed["findings"].as_array().unwrap().len(), 0, "{scrubbed}");
    let output = seawall(dir, &["scrub", "disk.img"]);
    assert!(output.status.success() && text(&output).contains("sound"), "{}", text(&output));
    let output = seawall(dir, &["verify"]);
    assert!(output.status.code() == Some(1) && text(&output).contains("has it open"), "{}", text(&output));

    running.stop();
    let output = seawall(dir, &["verify"]);
    assert!(output.status.success() && text(&output).contains("sound"), "{}", text(&output));
    let verified = json(dir, &["verify", "--json"]);
    assert_eq!(verified["sound"], true, "{verified}");
    assert!(verified["replicas"][0]["compared_bytes"].as_u64().unwrap() > 0, "{verified}");
    let verified = json(dir, &["verify", "disk.img", "--point", &old, "--json"]);
    assert_eq!(
        (&verified["points"][0]["sound"], &verified["sound"]),
        (&true.into(), &true.into()),
        "{verified}"
    );
    let output = seawall(dir, &["verify", "disk.img", "--point", "999999"]);
    assert!(output.status.code() == Some(3) && text(&output).contains("nearest"), "{}", text(&output));
    let output = seawall(dir, &["verify", "other.img"]);
    assert!(output.status.code() == Some(1) && text(&output).contains("other.img"), "{}", text(&output));
    let image = found(dir, "replica.img");
    let (sound, mut damaged) = (std::fs::read(&image).unwrap(), std::fs::read(&image).unwrap());
    let last = damaged.len() - 1;
    damaged[last] ^= 1;
    std::fs::write(&image, &damaged).unwrap();
    let output = seawall(dir, &["verify", "disk.img", "--point", "latest"]);
    assert!(output.status.code() == Some(3) && text(&output).contains("NOT SOUND"), "{}", text(&output));
    std::fs::write(&image, &sound).unwrap();
    // What was applied is still there.
    let running = Running::start(dir);
    status_when(dir, |status| applied(status) > changed_at);
    let output = restore(&old, "again.img", &[]);
    assert!(output.status.success(), "{}", text(&output));
    assert!(std::fs::read(dir.join("again.img")).unwrap() == before);
    running.stop();
}

/// The first file of this name below a directory.
fn found(dir: &Path, name: &str) -> PathBuf {
    let mut dirs = vec![dir.to_owned()];
    while let Some(dir) = dirs.pop() {
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            match path.is_dir() {
                true => dirs.push(path),
                false if path.file_name().is_some_and(|found| found == name) => return path,
                false => {}
            }
        }
    }
    panic!("no {name}");
}
