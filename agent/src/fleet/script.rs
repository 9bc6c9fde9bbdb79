//! Scripts that recovery plans run on this machine, if its own configuration names a directory of them.
//!
//! Crash order of a script: 1. that it begins is noted durably under the task's id, 2. it is started, 3. what came of it is noted, 4. the
//! config server is told. Reversed, 2 before 1 would run it again after a crash, and 4 before 3 would make of a finished script one of
//! which nobody knows. A task is told again until it is answered: one that was noted is not run again. When the agent ends, the script is
//! killed; a killed agent leaves it running.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use control::fleet::plan::SCRIPT_OUTPUT_BYTES_MAX;
use control::fleet::{Name, ResourceId};
use durable::RealStorage;
use rustix::process::{Pid, Signal, kill_process_group};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::net::unix::pipe::Receiver;
use tokio::process::{Child, Command};

use super::Post;
use crate::hooks::{PATH, trust_way_to};

/// Notes of scripts that are kept; the oldest go. More than can be under way at once, which is [`control::fleet::TASKS_MAX`].
const NOTES_KEPT: usize = 256;
/// Where the notes are, in the state directory.
const NOTES_DIR: &str = "scripts-run";

/// Which scripts the fleet's recovery plans may run on this machine.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ScriptsSection {
    /// The directory of the scripts; nothing else is run.
    directory: PathBuf,
}

impl ScriptsSection {
    pub(super) fn check(&self) -> anyhow::Result<()> {
        ensure!(
            self.directory.is_absolute(),
            "directory of [scripts] is {}, expected a whole path",
            self.directory.display()
        );
        Ok(())
    }

    /// The file of a script that may be run.
    fn find(&self, command: &str) -> anyhow::Result<PathBuf> {
        let name: Name = command.parse().context("find the script")?;
        let path = self.directory.join(name.as_str());
        let metadata =
            std::fs::symlink_metadata(&path).with_context(|| format!("find script {}", path.display()))?;
        // A link would lead out of the directory that was named.
        ensure!(metadata.is_file(), "run script {}: it is no file", path.display());
        let mode = std::os::unix::fs::PermissionsExt::mode(&metadata.permissions());
        ensure!(mode & 0o111 != 0, "run script {}: it is not executable; chmod +x it", path.display());
        trust_way_to("script", &path)?;
        Ok(path)
    }
}

/// What is asked for.
#[derive(Debug)]
pub(super) struct Asked {
    pub(super) command: String,
    pub(super) arguments: Vec<String>,
    pub(super) environment: BTreeMap<String, String>,
    pub(super) timeout_s: u64,
}

/// What is known of a script that was run.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Note {
    Begun,
    Ended { message: String, result: Value },
}

fn section(post: &Post) -> anyhow::Result<&ScriptsSection> {
    post.config.scripts.as_ref().context(
        "this machine's agent runs no scripts; to let it, name their directory in its configuration: [scripts] directory = \"/etc/seawall/scripts\"",
    )
}

/// Says whether a script is there and would be run.
pub(super) fn check(post: &Post, command: &str) -> anyhow::Result<(String, Value)> {
    let path = section(post)?.find(command)?;
    Ok((format!("{} is there", path.display()), Value::Null))
}

/// Runs a script, unless it was begun before.
pub(super) async fn run(post: &Post, id: ResourceId, asked: Asked) -> anyhow::Result<(String, Value)> {
    let section = section(post)?;
    let notes = post.config.config_server.state.join(NOTES_DIR);
    let note = notes.join(id.as_str());
    match read(&note)? {
        Some(Note::Ended { message, result }) => return Ok((message, result)),
        Some(Note::Begun) => bail!(
            "the agent ended while {} ran; whether it has done its work is not known: look at the machine, then resume the run, which runs it again",
            asked.command
        ),
        None => {}
    }
    let path = section.find(&asked.command)?;
    prune(&notes)?;
    write(&note, &Note::Begun)?;
    let (message, result) = perform(&path, &asked).await?;
    write(&note, &Note::Ended { message: message.clone(), result: result.clone() })?;
    Ok((message, result))
}

fn read(note: &Path) -> anyhow::Result<Option<Note>> {
    let reading = || format!("read what is known of a script, in {}", note.display());
    match std::fs::read(note) {
        Ok(bytes) => Ok(Some(serde_json::from_slice(&bytes).with_context(reading)?)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(reading),
    }
}

fn write(path: &Path, note: &Note) -> anyhow::Result<()> {
    let bytes = serde_json::to_vec(note)?;
    durable::replace(&RealStorage, path, &bytes)
        .with_context(|| format!("note what is known of a script, in {}", path.display()))
}

/// Makes the directory of notes, with room for one more.
fn prune(notes: &Path) -> anyhow::Result<()> {
    let doing = || format!("keep notes of scripts in {}", notes.display());
    std::fs::create_dir_all(notes).with_context(doing)?;
    let mut all = Vec::new();
    for entry in std::fs::read_dir(notes).with_context(doing)? {
        let entry = entry.with_context(doing)?;
        all.push((entry.metadata().with_context(doing)?.modified().with_context(doing)?, entry.path()));
    }
    all.sort();
    let excess = (all.len() + 1).saturating_sub(NOTES_KEPT);
    for (_, path) in all.iter().take(excess) {
        std::fs::remove_file(path).with_context(doing)?;
    }
    Ok(())
}

/// Kills what was started and what that has started, unless it has ended.
struct Group(Option<Pid>);

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(group) = self.0 {
            // Only fails when it has ended in this instant.
            let _ = kill_process_group(group, Signal::KILL);
        }
    }
}

/// Runs it to its end or its time-out. What could not even be started is an error; what failed is a result, with its output.
async fn perform(path: &Path, asked: &Asked) -> anyhow::Result<(String, Value)> {
    let starting = || format!("start script {}", path.display());
    let (reader, writer) = std::io::pipe().with_context(starting)?;
    let output = Receiver::from_owned_fd(reader.into()).with_context(starting)?;
    let began = Instant::now();
    let child = Command::new(path)
        .args(&asked.arguments)
        .env_clear()
        .env("PATH", PATH)
        .env("LC_ALL", "C.UTF-8")
        .envs(&asked.environment)
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::from(writer.try_clone().with_context(starting)?))
        .stderr(Stdio::from(writer))
        .process_group(0)
        .spawn()
        .with_context(starting)?;
    let pid = child.id().and_then(|id| Pid::from_raw(i32::try_from(id).ok()?));
    let mut group = Group(pid);
    let mut kept = Vec::new();
    let limit = Duration::from_secs(asked.timeout_s);
    let ended = tokio::time::timeout(limit, wait(child, &output, &mut kept)).await;
    let name = &asked.command;
    let (succeeded, how) = match ended {
        Ok(status) => {
            group.0 = None;
            let status = status.with_context(|| format!("wait for script {}", path.display()))?;
            (status.success(), status.to_string())
        }
        Err(_) => {
            drop(group);
            take(&output, &mut kept);
            (false, format!("not done after {} s; killed", asked.timeout_s))
        }
    };
    let output = readable(&kept);
    let said = output.lines().rev().find(|line| !line.trim().is_empty()).map(str::trim);
    let said = said.map(|said| format!(": {said}")).unwrap_or_default();
    let message = match succeeded {
        true => format!("{name} succeeded after {:.1} s{said}", began.elapsed().as_secs_f64()),
        false => format!("{name} failed: {how}{said}"),
    };
    tracing::info!(script = name, succeeded, how, "a recovery plan ran a script");
    Ok((message, json!({ "succeeded": succeeded, "how": how, "output": output })))
}

/// Waits for the script itself, not for what it left behind, which may hold its output open.
async fn wait(mut child: Child, output: &Receiver, kept: &mut Vec<u8>) -> std::io::Result<ExitStatus> {
    let mut open = true;
    loop {
        tokio::select! {
            status = child.wait() => {
                take(output, kept);
                return status;
            }
            ready = output.readable(), if open => {
                ready?;
                open = take(output, kept);
            }
        }
    }
}

/// Takes what is there; whether there may be more.
fn take(output: &Receiver, kept: &mut Vec<u8>) -> bool {
    let mut buffer = [0; 4096];
    loop {
        match output.try_read(&mut buffer) {
            Ok(0) => return false,
            Ok(read) => {
                kept.extend_from_slice(&buffer[..read]);
                if kept.len() > SCRIPT_OUTPUT_BYTES_MAX {
                    kept.drain(..kept.len() - SCRIPT_OUTPUT_BYTES_MAX);
                }
            }
            Err(error) => return error.kind() == std::io::ErrorKind::WouldBlock,
        }
    }
}

/// Lines of text; what is neither becomes a question mark, so that it stays small in JSON too.
fn readable(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    text.chars()
        .map(|one| match one {
            '\n' | '\t' => one,
            '\u{fffd}' => '?',
            one if one.is_control() => '?',
            one => one,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;
    use std::sync::Arc;

    use parking_lot::Mutex;

    use super::super::FleetConfig;
    use super::*;

    struct Place {
        dir: tempfile::TempDir,
        post: Post,
    }

    impl Place {
        fn new() -> Place {
            let dir = tempfile::tempdir().unwrap();
            let scripts = dir.path().join("scripts");
            fs::create_dir(&scripts).unwrap();
            fs::set_permissions(&scripts, PermissionsExt::from_mode(0o755)).unwrap();
            let text = format!(
                "[config_server]\nurl = \"https://c.example\"\nstate = \"state\"\n[scripts]\ndirectory = {scripts:?}\n"
            );
            let file = dir.path().join("agent.toml");
            fs::write(&file, text).unwrap();
            let config = FleetConfig::load(&file).unwrap().unwrap();
            let post =
                Post { config, running: Mutex::default(), disks: Mutex::default(), guests: Mutex::default() };
            Place { dir, post }
        }

        fn add(&self, name: &str, mode: u32, script: &str) -> PathBuf {
            let path = self.dir.path().join("scripts").join(name);
            fs::write(&path, format!("#!/bin/bash\n{script}\n")).unwrap();
            fs::set_permissions(&path, PermissionsExt::from_mode(mode)).unwrap();
            path
        }

        async fn run(
            &self,
            id: u8,
            command: &str,
            arguments: &[&str],
            timeout_s: u64,
        ) -> anyhow::Result<(String, Value)> {
            let asked = Asked {
                command: command.to_owned(),
                arguments: arguments.iter().map(|one| (*one).to_owned()).collect(),
                environment: BTreeMap::from([("SEAWALL_PLAN".to_owned(), "shop".to_owned())]),
                timeout_s,
            };
            run(&self.post, ResourceId::from_bytes([id; 16]), asked).await
        }
    }

    #[tokio::test]
    async fn a_script_is_run_once_with_what_it_was_given() {
        let place = Place::new();
        let count = place.dir.path().join("count");
        place.add(
            "start-web.sh",
            0o755,
            &format!("echo x >> {count:?}; echo \"$1|$2|$SEAWALL_PLAN|$HOME|$PWD\" >&2"),
        );
        let (message, result) = place.run(1, "start-web.sh", &["a b", "$(id)"], 60).await.unwrap();
        assert!(
            message.contains("start-web.sh succeeded") && message.ends_with("a b|$(id)|shop||/"),
            "{message}"
        );
        assert_eq!(result["output"], "a b|$(id)|shop||/\n");
        // Told again, it answers the same and runs nothing.
        assert_eq!(place.run(1, "start-web.sh", &[], 60).await.unwrap(), (message, result));
        assert_eq!(fs::read_to_string(&count).unwrap().lines().count(), 1);
        // Another task is another run.
        place.run(2, "start-web.sh", &[], 60).await.unwrap();
        assert_eq!(fs::read_to_string(&count).unwrap().lines().count(), 2);
    }

    #[tokio::test]
    async fn of_one_that_was_interrupted_nobody_knows() {
        let place = Place::new();
        let pid = place.dir.path().join("pid");
        place.add("slow", 0o755, &format!("echo $$ > {pid:?}.new; mv {pid:?}.new {pid:?}; sleep 1000"));
        let place = Arc::new(place);
        let running = tokio::spawn({
            let place = place.clone();
            async move { place.run(1, "slow", &[], 1000).await.map(drop) }
        });
        while !pid.exists() {
            assert!(!running.is_finished(), "{:?}", running.await);
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        running.abort();
        assert!(running.await.unwrap_err().is_cancelled());
        let pid = fs::read_to_string(&pid).unwrap();
        while fs::read_to_string(format!("/proc/{}/stat", pid.trim()))
            .is_ok_and(|stat| !stat.contains(") Z "))
        {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let error = place.run(1, "slow", &[], 1000).await.unwrap_err().to_string();
        assert!(error.contains("is not known"), "{error}");
    }

    #[tokio::test]
    async fn output_is_bounded_and_failures_have_it() {
        let place = Place::new();
        place.add(
            "loud",
            0o755,
            "head -c 1000000 /dev/zero | tr '\\0' '\\377'; printf 'a\\001\\n'; echo last; exit 3",
        );
        let (message, result) = place.run(1, "loud", &[], 60).await.unwrap();
        assert_eq!(message, "loud failed: exit status: 3: last");
        let output = result["output"].as_str().unwrap();
        assert!(
            output.ends_with("??a?\nlast\n") && output.len() == SCRIPT_OUTPUT_BYTES_MAX,
            "{}",
            output.len()
        );
        place.add("hung", 0o755, "echo waiting; sleep 1000 & wait");
        let (message, result) = place.run(2, "hung", &[], 1).await.unwrap();
        assert_eq!(message, "hung failed: not done after 1 s; killed: waiting");
        assert_eq!(result["succeeded"], false);
        // What it leaves behind is not waited for.
        place.add("leaves", 0o755, "sleep 5 & echo done");
        let (message, _) = place.run(3, "leaves", &[], 60).await.unwrap();
        assert!(message.ends_with("done"), "{message}");
    }

    #[tokio::test]
    async fn nothing_but_what_is_in_the_directory_is_run() {
        let mut place = Place::new();
        let refused = async |place: &Place, command: &str| {
            let error = format!("{:#}", place.run(9, command, &[], 60).await.unwrap_err());
            assert_eq!(format!("{:#}", check(&place.post, command).unwrap_err()), error);
            assert!(!place.dir.path().join("state").join(NOTES_DIR).exists(), "nothing was begun");
            error
        };
        place.add("ok", 0o755, "true");
        check(&place.post, "ok").unwrap();
        for name in ["../agent.toml", "/bin/true", ".", "", "a/b"] {
            assert!(refused(&place, name).await.contains("is not a name"));
        }
        assert!(refused(&place, "absent").await.contains("No such file"));
        std::os::unix::fs::symlink("/bin/true", place.dir.path().join("scripts/link")).unwrap();
        assert!(refused(&place, "link").await.contains("it is no file"));
        place.add("plain", 0o644, "true");
        assert!(refused(&place, "plain").await.contains("chmod +x"));
        place.add("open", 0o757, "true");
        assert!(refused(&place, "open").await.contains("can be written by others"));
        place.post.config.scripts = None;
        assert!(refused(&place, "ok").await.contains("[scripts] directory"));
    }

    #[test]
    fn old_notes_go() {
        let dir = tempfile::tempdir().unwrap();
        let notes = dir.path().join(NOTES_DIR);
        for number in 0..NOTES_KEPT + 5 {
            prune(&notes).unwrap();
            write(&notes.join(format!("{number:03}")), &Note::Begun).unwrap();
        }
        assert_eq!(fs::read_dir(&notes).unwrap().count(), NOTES_KEPT);
        assert!(!notes.join("000").exists() && notes.join(format!("{}", NOTES_KEPT + 4)).exists());
    }
}
