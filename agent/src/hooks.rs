//! Executables that quiesce applications before a freeze and let them go on after it. The contract is docs/hooks.md.
//!
//! A hook runs in a process group of its own, which is killed when its time is over. Its output is read as it comes, kept within a
//! limit, and never waited for: a process that a hook leaves behind may hold it open.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{PipeReader, PipeWriter, Read, pipe};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::config::AgentConfig;
use anyhow::{Context, bail, ensure};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::process::{Pid, Signal, kill_process_group};

/// Hooks that are run for one point. With more in the directory none is run, and the reason says so.
pub const HOOKS_MAX: usize = 64;
/// Bytes of a hook's output that are kept: the last ones.
pub const OUTPUT_BYTES_MAX: usize = 64 * 1024;
/// How often a running hook is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(5);
/// What hooks find programs by.
pub(crate) const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What a hook is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// Quiesce the application.
    PreFreeze,
    /// The cut has been taken, and everything is thawed: let it go on.
    PostThaw,
    /// There will be no such cut: let it go on.
    Abort,
}

impl Action {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Action::PreFreeze => "pre-freeze",
            Action::PostThaw => "post-thaw",
            Action::Abort => "abort",
        }
    }
}

/// A hook's place in the directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Hook {
    pub(crate) name: String,
    path: PathBuf,
}

/// The hooks of a directory by name; none when it does not exist.
///
/// # Errors
/// When somebody else than root or the agent's own user could put something else in a hook's place.
pub(crate) fn list(dir: &Path) -> anyhow::Result<Vec<Hook>> {
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.with_context(|| format!("list hooks in {}", dir.display()))?,
    };
    trust_way_to("hook", dir)?;
    let mut hooks = Vec::new();
    for entry in entries {
        let entry = entry.with_context(|| format!("list hooks in {}", dir.display()))?;
        let Ok(name) = entry.file_name().into_string() else { continue };
        if !is_hook_name(&name) {
            continue;
        }
        let path = entry.path();
        // Through a link, as packages put them.
        let path = fs::canonicalize(&path).with_context(|| format!("look at hook {}", path.display()))?;
        let metadata = fs::metadata(&path).with_context(|| format!("look at hook {}", path.display()))?;
        if !metadata.is_file() || metadata.permissions().mode() & 0o111 == 0 {
            continue;
        }
        trust_way_to("hook", &path)?;
        hooks.push(Hook { name, path });
    }
    ensure!(
        hooks.len() <= HOOKS_MAX,
        "{} hooks in {}, at most {HOOKS_MAX} are run",
        hooks.len(),
        dir.display()
    );
    hooks.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(hooks)
}

/// The names of the hooks that a configuration means, in the order in which they run.
///
/// # Errors
/// When one of them would not be run: somebody else could put something in its place.
pub fn check_hooks(config: &AgentConfig) -> anyhow::Result<Vec<String>> {
    Ok(list(&config.application.hooks)?.into_iter().map(|hook| hook.name).collect())
}

/// Letters, digits, hyphens and underscores: what editors and packages leave beside a file has other characters.
fn is_hook_name(name: &str) -> bool {
    !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_')
}

/// Nobody but root and our own user may own the file or a directory on the way to it, or write to them. A directory that
/// others write to with the sticky bit, as /tmp, lets them not touch what is not theirs.
pub(crate) fn trust_way_to(what: &str, path: &Path) -> anyhow::Result<()> {
    let path = fs::canonicalize(path).with_context(|| format!("look at {}", path.display()))?;
    let ours = rustix::process::geteuid().as_raw();
    for (step, part) in path.ancestors().enumerate() {
        let metadata = fs::metadata(part).with_context(|| format!("look at {}", part.display()))?;
        let (mode, owner) = (metadata.permissions().mode(), metadata.uid());
        ensure!(
            owner == 0 || owner == ours,
            "run {what} {}: {} belongs to user {owner}, not to root; chown it",
            path.display(),
            part.display()
        );
        let sticky = step > 0 && metadata.is_dir() && mode & 0o1000 != 0;
        ensure!(
            mode & 0o022 == 0 || sticky,
            "run {what} {}: {} can be written by others than its owner (mode {:04o}); chmod go-w it",
            path.display(),
            part.display(),
            mode & 0o7777
        );
    }
    Ok(())
}

/// Runs hooks for one point.
#[derive(Debug)]
pub(crate) struct Runner {
    environment: BTreeMap<String, String>,
    timeout: Duration,
    stop: Arc<AtomicBool>,
    /// Hooks read its end when we drop ours, or die.
    alive: (PipeReader, Option<PipeWriter>),
    state: PathBuf,
}

impl Runner {
    /// Hooks find `environment`, and a directory of their own, `state`, which is made now and removed with this value.
    pub(crate) fn new(
        environment: BTreeMap<String, String>,
        timeout: Duration,
        state: &Path,
        stop: Arc<AtomicBool>,
    ) -> anyhow::Result<Runner> {
        if let Err(error) = fs::remove_dir_all(state)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            bail!("empty the hooks' directory {}: {error}", state.display());
        }
        fs::DirBuilder::new()
            .recursive(true)
            .create(state)
            .and_then(|()| fs::set_permissions(state, fs::Permissions::from_mode(0o700)))
            .with_context(|| format!("make the hooks' directory {}", state.display()))?;
        let (reader, writer) = pipe().context("make a pipe for hooks")?;
        Ok(Runner { environment, timeout, stop, alive: (reader, Some(writer)), state: state.to_owned() })
    }

    /// Adds a variable.
    pub(crate) fn set(&mut self, name: &str, value: String) {
        self.environment.insert(name.to_owned(), value);
    }

    /// Runs a hook to its end or its time-out. What it printed goes to the log, and its last line into the error.
    pub(crate) fn run(&self, hook: &Hook, action: Action) -> anyhow::Result<()> {
        let began = Instant::now();
        let (output, result) = self.run_to_end(hook, action);
        let printed = String::from_utf8_lossy(&output);
        let name = &hook.name;
        for line in printed.lines().filter(|line| !line.trim().is_empty()) {
            tracing::info!(hook = name, action = action.name(), "{line}");
        }
        let ms = began.elapsed().as_millis() as u64;
        let said = printed.lines().rev().find(|line| !line.trim().is_empty()).map(str::trim);
        match result {
            Ok(()) => {
                tracing::info!(hook = name, action = action.name(), ms, "hook succeeded");
                Ok(())
            }
            Err(error) => {
                let said = said.map(|said| format!(": {said}")).unwrap_or_default();
                bail!("hook {name} failed at {}: {error:#}{said}", action.name())
            }
        }
    }

    fn run_to_end(&self, hook: &Hook, action: Action) -> (Vec<u8>, anyhow::Result<()>) {
        let mut output = Output::default();
        let result = (|| {
            let mut child = self.start(hook, action, &mut output)?;
            let ended = self.wait(&mut child, &mut output);
            output.take();
            match ended? {
                status if status.success() => Ok(()),
                status => bail!("{status}"),
            }
        })();
        (output.kept, result)
    }

    fn start(&self, hook: &Hook, action: Action, output: &mut Output) -> anyhow::Result<Child> {
        let (reader, writer) = pipe().context("make a pipe for its output")?;
        fcntl_setfl(&reader, fcntl_getfl(&reader)? | OFlags::NONBLOCK)?;
        output.reader = Some(reader);
        let stdin = self.alive.0.try_clone().context("duplicate the hooks' pipe")?;
        Command::new(&hook.path)
            .arg(action.name())
            .env_clear()
            .env("PATH", PATH)
            .env("LC_ALL", "C.UTF-8")
            .envs(&self.environment)
            .env("SEAWALL_HOOK", &hook.name)
            .env("SEAWALL_STATE", &self.state)
            .current_dir("/")
            .stdin(stdin)
            .stdout(Stdio::from(writer.try_clone().context("duplicate the pipe for its output")?))
            .stderr(Stdio::from(writer))
            .process_group(0)
            .spawn()
            .with_context(|| format!("start {}", hook.path.display()))
    }

    /// Waits for the hook itself, not for what it left behind.
    fn wait(&self, child: &mut Child, output: &mut Output) -> anyhow::Result<ExitStatus> {
        let limit = Instant::now() + self.timeout;
        loop {
            if let Some(status) = child.try_wait().context("wait for it")? {
                return Ok(status);
            }
            output.take();
            let stopping = self.stop.load(Ordering::SeqCst);
            if stopping || Instant::now() >= limit {
                let group = Pid::from_child(child);
                // Only fails when it has ended in this instant.
                let _ = kill_process_group(group, Signal::KILL);
                child.wait().context("wait for it")?;
                if stopping {
                    bail!("the agent is stopping; killed");
                }
                bail!("not done after {} ms; killed", self.timeout.as_millis());
            }
            std::thread::sleep(LOOK_EVERY);
        }
    }

    /// From now on hooks run to their end although the agent is stopping: applications must be let go on.
    pub(crate) fn finish_while_stopping(&mut self) {
        self.stop = Arc::default();
    }
}

impl Drop for Runner {
    fn drop(&mut self) {
        self.alive.1.take();
        if let Err(error) = fs::remove_dir_all(&self.state) {
            tracing::warn!(path = %self.state.display(), %error, "remove the hooks' directory");
        }
    }
}

/// What a hook printed.
#[derive(Default)]
struct Output {
    reader: Option<PipeReader>,
    kept: Vec<u8>,
}

impl Output {
    /// Takes what is there.
    fn take(&mut self) {
        let Some(reader) = &mut self.reader else { return };
        let mut buffer = [0; 4096];
        // Ends when nothing is there now, when nobody can write any more, or on an error: output is not worth one.
        while let Ok(read @ 1..) = reader.read(&mut buffer) {
            self.kept.extend_from_slice(&buffer[..read]);
            if self.kept.len() > OUTPUT_BYTES_MAX {
                self.kept.drain(..self.kept.len() - OUTPUT_BYTES_MAX);
            }
        }
    }
}

/// Whether the directory can hold the hooks' state: it must not lie on what is frozen.
pub(crate) fn lies_on(path: &Path, dir: &File) -> bool {
    match (fs::metadata(path), dir.metadata()) {
        (Ok(path), Ok(dir)) => path.dev() == dir.dev(),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Place {
        dir: tempfile::TempDir,
    }

    impl Place {
        fn new() -> Place {
            let dir = tempfile::tempdir().unwrap();
            fs::create_dir(dir.path().join("hooks")).unwrap();
            Place { dir }
        }

        fn hooks(&self) -> PathBuf {
            self.dir.path().join("hooks")
        }

        fn add(&self, name: &str, mode: u32, script: &str) {
            let path = self.hooks().join(name);
            let text = format!("#!/bin/bash\n{script}\n");
            fs::write(&path, text).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        }

        fn runner(&self, timeout_ms: u64) -> Runner {
            let environment = BTreeMap::from([("GIVEN".to_owned(), "a b".to_owned())]);
            let state = self.dir.path().join("run/state");
            Runner::new(environment, Duration::from_millis(timeout_ms), &state, Arc::default()).unwrap()
        }

        fn only(&self) -> Hook {
            let hooks = list(&self.hooks()).unwrap();
            assert_eq!(hooks.len(), 1, "{hooks:?}");
            hooks.into_iter().next().unwrap()
        }
    }

    #[test]
    fn hooks_are_executables_in_order_of_name() {
        let place = Place::new();
        for (name, mode) in
            [("50-b", 0o755), ("10-a", 0o700), ("60-c~", 0o755), ("20-x.disabled", 0o755), ("30-off", 0o644)]
        {
            place.add(name, mode, "true");
        }
        fs::create_dir(place.hooks().join("40-dir")).unwrap();
        std::os::unix::fs::symlink("/bin/true", place.hooks().join("05-link")).unwrap();
        let names: Vec<String> = list(&place.hooks()).unwrap().into_iter().map(|hook| hook.name).collect();
        assert_eq!(names, ["05-link", "10-a", "50-b"]);
        assert_eq!(list(&place.dir.path().join("none")).unwrap(), []);
    }

    #[test]
    fn what_others_can_change_is_not_run() {
        let place = Place::new();
        place.add("10-a", 0o755, "true");
        let refused = |path: PathBuf, mode: u32, back: u32| {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            let error = format!("{:#}", list(&place.hooks()).unwrap_err());
            fs::set_permissions(&path, fs::Permissions::from_mode(back)).unwrap();
            list(&place.hooks()).unwrap();
            error
        };
        assert!(refused(place.hooks().join("10-a"), 0o775, 0o755).contains("10-a can be written by others"));
        assert!(refused(place.hooks().join("10-a"), 0o757, 0o755).contains("mode 0757"));
        assert!(refused(place.hooks(), 0o777, 0o755).contains("hooks can be written by others"));
        assert!(refused(place.dir.path().to_owned(), 0o770, 0o700).contains("can be written by others"));
        if rustix::process::geteuid().is_root() {
            std::os::unix::fs::chown(place.hooks().join("10-a"), Some(65534), None).unwrap();
            let error = format!("{:#}", list(&place.hooks()).unwrap_err());
            assert!(error.contains("belongs to user 65534"), "{error}");
        }
    }

    #[test]
    fn a_hook_finds_what_it_was_promised() {
        let place = Place::new();
        place.add(
            "10-a",
            0o755,
            r#"test "$1 $GIVEN $SEAWALL_HOOK $PWD" = "pre-freeze a b 10-a /" && test -w "$SEAWALL_STATE" && test -z "$HOME""#,
        );
        let runner = place.runner(20_000);
        runner.run(&place.only(), Action::PreFreeze).unwrap();
        let error = runner.run(&place.only(), Action::Abort).unwrap_err().to_string();
        assert_eq!(error, "hook 10-a failed at abort: exit status: 1");
        drop(runner);
        assert!(!place.dir.path().join("run/state").exists());
    }

    #[test]
    fn the_reason_is_the_last_line_and_output_is_bounded() {
        let place = Place::new();
        place.add("10-a", 0o755, "yes | head -c 1000000; echo; echo 'the server is not there' >&2; exit 3");
        let (output, result) = place.runner(20_000).run_to_end(&place.only(), Action::PreFreeze);
        assert_eq!(output.len(), OUTPUT_BYTES_MAX);
        assert!(result.unwrap_err().to_string().contains("exit status: 3"));
        let error = place.runner(20_000).run(&place.only(), Action::PreFreeze).unwrap_err().to_string();
        assert!(error.ends_with("exit status: 3: the server is not there"), "{error}");
    }

    fn is_running(pid: &str) -> bool {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        !stat.is_empty() && !stat.contains(") Z ")
    }

    fn wait_until(what: &str, holds: impl Fn() -> bool) {
        let limit = Instant::now() + Duration::from_secs(60);
        while !holds() {
            assert!(Instant::now() < limit, "{what}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    #[test]
    fn a_hung_hook_is_killed_with_its_children() {
        let place = Place::new();
        place.add("10-a", 0o755, "sleep 1000 & echo $! > $SEAWALL_STATE/child; echo waiting; wait");
        let runner = place.runner(500);
        let error = runner.run(&place.only(), Action::PreFreeze).unwrap_err().to_string();
        assert_eq!(error, "hook 10-a failed at pre-freeze: not done after 500 ms; killed: waiting");
        let child = fs::read_to_string(place.dir.path().join("run/state/child")).unwrap();
        wait_until("the child is killed as well", || !is_running(child.trim()));
    }

    /// A holder outlives its hook, and learns from its standard input that the point is over.
    #[test]
    fn what_a_hook_leaves_behind_is_not_waited_for_and_hears_the_end() {
        let place = Place::new();
        place.add(
            "10-a",
            0o755,
            "exec 3<&0; ( cat <&3 >/dev/null; echo over > $OUT ) & echo started; exit 0",
        );
        let mut runner = place.runner(20_000);
        let out = place.dir.path().join("over");
        runner.set("OUT", out.display().to_string());
        runner.run(&place.only(), Action::PreFreeze).unwrap();
        assert!(!out.exists(), "the point is not over");
        drop(runner);
        wait_until("the holder hears the end", || out.exists());
    }
}
