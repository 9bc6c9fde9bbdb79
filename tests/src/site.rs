//! A fleet of real programs in one directory, and the commands that are given to it. Whatever fails is a failed test.

use std::io::Write;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::system::program;

/// Nothing waits longer; what is waited for comes much sooner.
pub const PATIENCE: Duration = Duration::from_secs(90);
/// The administrator's.
pub const PASSWORD: &str = "correct horse battery";

/// A program that runs, killed when dropped.
#[derive(Debug)]
pub struct Running(pub Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A site: a directory, and where its config server listens.
#[derive(Debug)]
pub struct Site {
    /// Where everything is.
    pub base: tempfile::TempDir,
    /// Where the config server listens, `host:port`.
    pub server: String,
}

/// What a command has said.
pub fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// An address on which nobody listens.
pub fn free_address() -> String {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string()
}

/// Runs a command that reads `input`.
pub fn told(command: &mut Command, input: &str) -> Output {
    let command = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    // A command that refuses before it reads closes its end.
    let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
    child.wait_with_output().unwrap()
}

impl Site {
    /// An empty one.
    pub fn empty() -> Site {
        Site { base: tempfile::tempdir().unwrap(), server: free_address() }
    }

    /// Initialises the config server; what that says.
    pub fn init(&self) -> Output {
        let init = ["init", "config", "--name", "127.0.0.1", "--listen", &self.server];
        let output = told(self.command("seawall-config-server").args(init), &format!("{PASSWORD}\n"));
        assert!(output.status.success(), "{}", text(&output));
        output
    }

    /// Of a file of the site.
    pub fn path(&self, name: &str) -> PathBuf {
        self.base.path().join(name)
    }

    /// A program of Seawall, in the site's directory.
    pub fn command(&self, name: &str) -> Command {
        let mut command = Command::new(program(name).unwrap());
        command.current_dir(self.base.path()).env("SEAWALL_PROFILE", self.path("profile.toml"));
        command
    }

    /// Runs a server or an agent with its configuration.
    pub fn run(&self, name: &str, config: &Path) -> Running {
        let log = std::fs::File::create(self.path(&format!("{name}.log"))).unwrap();
        let mut command = self.command(name);
        command.args(["run", "--config"]).arg(config).stdout(Stdio::null()).stderr(log);
        Running(command.spawn().unwrap())
    }

    /// The operator's command.
    pub fn seawall(&self, args: &[&str]) -> Output {
        self.command("seawall").args(args).output().unwrap()
    }

    /// What a command that succeeds shows.
    pub fn shown(&self, args: &[&str]) -> String {
        let output = self.seawall(args);
        assert!(output.status.success(), "{args:?}: {}", text(&output));
        String::from_utf8(output.stdout).unwrap()
    }

    /// What a command that succeeds says to programs: one object on one line.
    pub fn json(&self, args: &[&str]) -> Value {
        let shown = self.shown(&[args, &["--json"]].concat());
        assert_eq!(shown.lines().count(), 1, "{shown}");
        serde_json::from_str(&shown).unwrap()
    }

    /// What a command that fails says.
    pub fn refused(&self, args: &[&str]) -> String {
        let output = self.seawall(args);
        // Failed, not found, unreachable, refused: docs/cli.md.
        assert!(matches!(output.status.code(), Some(1 | 4..=6)), "{args:?}: {}", text(&output));
        String::from_utf8(output.stderr).unwrap()
    }

    /// Waits until a command says what is wanted.
    pub fn until(&self, what: &str, args: &[&str], wanted: impl Fn(&Value) -> bool) -> Value {
        let began = Instant::now();
        loop {
            let said = self.json(args);
            if wanted(&said) {
                return said;
            }
            assert!(began.elapsed() < PATIENCE, "waited in vain: {what}\n{said:#}\n{}", self.logs());
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    /// What all programs have logged.
    pub fn logs(&self) -> String {
        let logs =
            ["seawall-config-server", "seawall-agent", "seawall-process-server", "seawall-target-server"];
        let read =
            |name: &&str| std::fs::read_to_string(self.path(&format!("{name}.log"))).unwrap_or_default();
        logs.iter().map(|name| format!("--- {name}\n{}", read(name))).collect()
    }

    /// Waits until the config server answers.
    pub fn answers(&self) {
        let began = Instant::now();
        while !self.seawall(&["events"]).status.success() {
            assert!(began.elapsed() < PATIENCE, "{}", self.logs());
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Enrols a part with the line that `seawall token create` prints, as far as it does not depend on the place.
    pub fn enrol(&self, role: &str, name: &str, more: &[&str]) -> PathBuf {
        let shown = self.shown(&["token", "create", "--role", role, "--name", name]);
        let line =
            shown.lines().find_map(|line| line.trim().strip_prefix(&format!("seawall-{role} "))).unwrap();
        let words: Vec<&str> = line.split(' ').collect();
        assert_eq!(words[0], "enroll", "{shown}");
        let given = |option: &str| words[words.iter().position(|word| *word == option).unwrap() + 1];
        let dir = self.path(name);
        std::fs::create_dir(&dir).unwrap();
        let config = dir.join("part.toml");
        let mut command = self.command(&format!("seawall-{role}"));
        command.args(["enroll", "--server", given("--server"), "--token", given("--token"), "--config"]);
        let output = command.arg(&config).args(more).output().unwrap();
        assert!(output.status.success() && text(&output).contains(name), "{}", text(&output));
        // It is good for one.
        let mut again = self.command(&format!("seawall-{role}"));
        again.args(["enroll", "--server", given("--server"), "--token", given("--token"), "--config"]);
        let output = again.arg(self.path("other.toml")).args(more).output().unwrap();
        assert!(
            !output.status.success() && text(&output).contains("seawall token create"),
            "{}",
            text(&output)
        );
        config
    }
}
