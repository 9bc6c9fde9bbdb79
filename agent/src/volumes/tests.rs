use std::os::unix::fs::symlink;

use super::*;

fn config(dir: &Path, volumes: &str) -> AgentConfig {
    let text = include_str!("../../sample.toml").split("# The disks of a group").next().unwrap().to_owned();
    let path = dir.join("agent.toml");
    fs::write(&path, text + volumes).unwrap();
    AgentConfig::load(&path).unwrap()
}

fn settle(dir: &Path, volumes: &str) -> anyhow::Result<Volumes> {
    settle_in(&config(dir, volumes), &Disks::default(), &dir.join("run"))
}

#[test]
fn files_are_taken_as_they_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("disk.img");
    fs::write(&file, [0; 512]).unwrap();
    let volume = |name: &str, path: &Path| format!("[[volume]]\nname = {name:?}\ndevice = {path:?}\n");
    let found = settle(dir.path(), &volume("a", &file)).unwrap();
    assert_eq!(found.list[0].path, file);
    assert!(!dir.path().join("protected-disks").exists());

    let link = dir.path().join("link");
    symlink(&file, &link).unwrap();
    let error = settle(dir.path(), &(volume("a", &file) + &volume("b", &link))).unwrap_err().to_string();
    assert!(error.contains("\"a\" and \"b\"") && error.contains("Name it once"), "{error}");

    let error = settle(dir.path(), "[[volume]]\nname = \"a\"\ndevice = \"serial:no such\"\n").unwrap_err();
    assert!(error.to_string().contains("no disk of this machine"), "{error}");
}

#[test]
fn a_disk_is_taken_by_one_agent() {
    let dir = tempfile::tempdir().unwrap();
    let disk = |sequence| FoundDisk { path: "/dev/vdb".into(), identity: Default::default(), sequence };
    let group = block::GroupId([1; 16]);
    let take = |sequence| lock::take(dir.path(), &disk(sequence), &group);
    let held = take(Some(7)).unwrap().unwrap();
    let error = take(Some(7)).unwrap_err().to_string();
    let process = format!("process {}", std::process::id());
    assert!(
        error.contains("/dev/vdb") && error.contains(&process) && error.contains(&group.to_string()),
        "{error}"
    );
    let other = take(None).unwrap().unwrap();
    drop((held, other));
    take(Some(7)).unwrap().unwrap();
    // Where no lock can be had, that is said.
    fs::write(dir.path().join("file"), "").unwrap();
    assert!(lock::take(&dir.path().join("file"), &disk(None), &group).unwrap().is_err());
}
