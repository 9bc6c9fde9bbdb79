//! The whole system as an administrator runs it: the real programs as processes, from the directory that `seawall init` makes.

use std::fs;
use std::net::TcpListener;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use serde_json::Value;

use crate::network::Side;

/// A program of the system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// seawall-agent.
    Agent,
    /// seawall-process-server.
    ProcessServer,
    /// seawall-target-server.
    TargetServer,
}

impl Part {
    /// What its program is called, after `seawall-`.
    pub fn name(self) -> &'static str {
        match self {
            Part::Agent => "agent",
            Part::ProcessServer => "process-server",
            Part::TargetServer => "target-server",
        }
    }
}

/// A group's processes, in a directory of their own. Dropping it kills them.
pub struct System {
    dir: tempfile::TempDir,
    running: Vec<(Part, Child)>,
    /// Where the agent's program, configuration and log are, when not with the others.
    agent_home: Option<PathBuf>,
    /// The network namespaces that parts run in, when not in the test's.
    networks: Vec<(Part, String)>,
    /// The one that the operator's commands run in, likewise.
    operator_network: Option<String>,
}

/// A program in a network namespace. Only the network is another: the mount of BPF's file system must stay in sight.
fn within(network: Option<&str>, program: &Path) -> Command {
    let Some(network) = network else { return Command::new(program) };
    let mut command = Command::new("nsenter");
    command.arg(format!("--net={network}")).arg(program);
    command
}

/// A program that `cargo build` made, beside the running program or above the running test.
///
/// # Errors
/// When it was not built.
pub fn program(name: &str) -> anyhow::Result<PathBuf> {
    let test = std::env::current_exe().context("find the test program")?;
    let found = test.ancestors().skip(1).take(2).map(|dir| dir.join(name)).find(|path| path.exists());
    found.with_context(|| format!("{name} is missing: run `cargo build --workspace --bins` first"))
}

fn free_port() -> anyhow::Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

/// Whether a process has a handler for SIGTERM.
fn catches_term(child: &Child) -> bool {
    let status = fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap_or_default();
    let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:"));
    let caught = caught.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    caught.is_some_and(|mask| mask & 1 << (15 - 1) != 0)
}

/// What a command answered with `--json`, unless it is an error.
fn answer(output: &Output) -> anyhow::Result<Value> {
    let answer: Value = serde_json::from_slice(&output.stdout)
        .with_context(|| String::from_utf8_lossy(&output.stderr).into_owned())?;
    match answer["error"].as_str() {
        Some(error) => bail!("{error}"),
        None => Ok(answer),
    }
}

impl System {
    /// Makes authority, identities and configuration for these disks. `epoch_ms` between cuts.
    ///
    /// # Errors
    /// When `seawall init` fails.
    pub fn init(devices: &[&Path], epoch_ms: u64) -> anyhow::Result<System> {
        let (process, target) =
            (format!("127.0.0.1:{}", free_port()?), format!("127.0.0.1:{}", free_port()?));
        System::init_at(devices, epoch_ms, &process, &target)
    }

    /// As [`System::init`]; agent and process server are in one network, the target server and the operator in the other.
    ///
    /// # Errors
    /// When `seawall init` fails.
    pub fn init_between(
        devices: &[&Path],
        epoch_ms: u64,
        source: &Side,
        target: &Side,
    ) -> anyhow::Result<System> {
        let at = |side: &Side, port: u16| format!("{}:{port}", side.address);
        let mut system = System::init_at(devices, epoch_ms, &at(source, 7440), &at(target, 7441))?;
        system.networks = vec![
            (Part::Agent, source.namespace.clone()),
            (Part::ProcessServer, source.namespace.clone()),
            (Part::TargetServer, target.namespace.clone()),
        ];
        system.operator_network = Some(target.namespace.clone());
        Ok(system)
    }

    fn init_at(devices: &[&Path], epoch_ms: u64, process: &str, target: &str) -> anyhow::Result<System> {
        let dir = tempfile::tempdir()?;
        let mut command = Command::new(program("seawall")?);
        command.arg("init").arg(dir.path().join("seawall"));
        for device in devices {
            command.arg("--device").arg(device);
        }
        command.args(["--process-server", process, "--target-server", target]);
        let output = command.output()?;
        ensure!(output.status.success(), "seawall init: {}", String::from_utf8_lossy(&output.stderr));
        let (running, networks) = (Vec::new(), Vec::new());
        let system = System { dir, running, agent_home: None, networks, operator_network: None };
        let socket = system.socket();
        // Tests of when a resync begins say so themselves; all others must not depend on the hour.
        system.edit(Part::Agent, |text| format!("{text}\n[resync]\nwindow = []\n"))?;
        system.edit(Part::Agent, |text| {
            let text = text.replace(
                "keep_tracking = true",
                &format!("keep_tracking = true\ntracking_folder = {:?}", system.tracking()),
            );
            text.replace(
                "epoch_interval_ms = 1000",
                &format!(
                    "epoch_interval_ms = {epoch_ms}\ncontrol_socket = {:?}",
                    socket.display().to_string()
                ),
            )
        })?;
        fs::create_dir(system.dir.path().join("bpf"))?;
        Ok(system)
    }

    /// The directory for this test's own files.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Where the agent keeps its tracking: in a BPF file system of this test's own, which the agent mounts.
    pub fn tracking(&self) -> PathBuf {
        self.dir.path().join("bpf/seawall")
    }

    /// Where the agent listens for commands.
    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("agent.sock")
    }

    /// The directory of a part.
    pub fn place(&self, part: Part) -> PathBuf {
        if let (Part::Agent, Some(home)) = (part, &self.agent_home) {
            return home.clone();
        }
        self.dir.path().join("seawall").join(part.name())
    }

    /// Moves the agent's program, configuration, credentials and log below `home`, which must not exist.
    ///
    /// # Errors
    /// When they cannot be copied.
    pub fn move_agent(&mut self, home: &Path) -> anyhow::Result<()> {
        let (from, to) = (self.place(Part::Agent), home.to_str().context("path")?);
        scratch::run("cp", &["-rp", from.to_str().context("path")?, to])?;
        fs::copy(program("seawall-agent")?, home.join("seawall-agent"))?;
        self.agent_home = Some(home.to_owned());
        Ok(())
    }

    /// The configuration file of a part.
    pub fn config(&self, part: Part) -> PathBuf {
        self.place(part).join(format!("{}.toml", part.name()))
    }

    /// Changes a part's configuration.
    ///
    /// # Errors
    /// When the file cannot be read or written, or the change changes nothing.
    pub fn edit(&self, part: Part, change: impl Fn(&str) -> String) -> anyhow::Result<()> {
        let path = self.config(part);
        let text = fs::read_to_string(&path)?;
        let changed = change(&text);
        ensure!(changed != text, "the change of {} changes nothing:\n{text}", path.display());
        fs::write(path, changed).context("write the configuration")
    }

    /// Starts a part as a process; its log goes to a file.
    ///
    /// # Errors
    /// When the program is missing.
    pub fn start(&mut self, part: Part) -> anyhow::Result<()> {
        self.start_with(part, &[])
    }

    /// As [`System::start`], with variables in its environment.
    ///
    /// # Errors
    /// When the program is missing.
    pub fn start_with(&mut self, part: Part, variables: &[(&str, &str)]) -> anyhow::Result<()> {
        let log = fs::OpenOptions::new().create(true).append(true).open(self.log(part))?;
        let program = match (part, &self.agent_home) {
            (Part::Agent, Some(home)) => home.join("seawall-agent"),
            _ => program(&format!("seawall-{}", part.name()))?,
        };
        let network = self.networks.iter().find(|(inside, _)| *inside == part);
        let child = within(network.map(|(_, network)| network.as_str()), &program)
            .args(["--log", self.log_filter(part), "run", "--config"])
            .arg(self.config(part))
            .envs(variables.iter().copied())
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()?;
        self.running.push((part, child));
        Ok(())
    }

    /// Starts all three.
    ///
    /// # Errors
    /// When a program is missing.
    pub fn start_all(&mut self) -> anyhow::Result<()> {
        [Part::TargetServer, Part::ProcessServer, Part::Agent]
            .into_iter()
            .try_for_each(|part| self.start(part))
    }

    fn log(&self, part: Part) -> PathBuf {
        match (part, &self.agent_home) {
            (Part::Agent, Some(home)) => home.join("agent.log"),
            _ => self.dir.path().join(format!("{}.log", part.name())),
        }
    }

    /// An agent whose log may be frozen logs as much as it can.
    fn log_filter(&self, part: Part) -> &'static str {
        match (part, &self.agent_home) {
            (Part::Agent, Some(_)) => "trace",
            _ => "info",
        }
    }

    /// The process that runs a part.
    ///
    /// # Errors
    /// When it does not run.
    pub fn pid(&self, part: Part) -> anyhow::Result<u32> {
        let running = self.running.iter().find(|(running, _)| *running == part);
        running.map(|(_, child)| child.id()).context("it does not run")
    }

    /// What a part has logged; for messages of failed tests.
    pub fn logged(&self, part: Part) -> String {
        fs::read_to_string(self.log(part)).unwrap_or_default()
    }

    /// Lets the agent run in a network of its own from its next start on.
    pub fn enter_network(&mut self, namespace: &str) {
        self.networks = vec![(Part::Agent, namespace.to_owned())];
    }

    /// Where a server listens, as its configuration says.
    ///
    /// # Errors
    /// When that does not say it.
    pub fn listens(&self, part: Part) -> anyhow::Result<String> {
        let text = fs::read_to_string(self.config(part))?;
        let listen = text.lines().find_map(|line| line.strip_prefix("listen = "));
        Ok(listen.context("where it listens")?.trim_matches('"').to_owned())
    }

    /// kill -9.
    ///
    /// # Errors
    /// When the part does not run.
    pub fn kill(&mut self, part: Part) -> anyhow::Result<()> {
        let index =
            self.running.iter().position(|(running, _)| *running == part).context("it does not run")?;
        let (_, mut child) = self.running.remove(index);
        if let Some(status) = child.try_wait()? {
            bail!("{} had ended by itself: {status}\n{}", part.name(), self.logged(part));
        }
        child.kill()?;
        child.wait()?;
        Ok(())
    }

    /// The operator's command, where the operator is.
    fn seawall(&self) -> anyhow::Result<Command> {
        Ok(within(self.operator_network.as_deref(), &program("seawall")?))
    }

    /// What `seawall status --json` prints, also when a server does not answer.
    ///
    /// # Errors
    /// When it prints nothing of the kind.
    pub fn status(&self) -> anyhow::Result<Value> {
        let output = self
            .seawall()?
            .args(["status", "--json", "--dir"])
            .arg(self.dir.path().join("seawall"))
            .output()?;
        serde_json::from_slice(&output.stdout)
            .with_context(|| format!("read status: {}", String::from_utf8_lossy(&output.stderr)))
    }

    /// Waits until a part has been killed, by itself or by somebody else.
    ///
    /// # Errors
    /// When it does not run, ends otherwise, or has not ended within 60 s.
    pub fn wait_killed(&mut self, part: Part) -> anyhow::Result<()> {
        let index =
            self.running.iter().position(|(running, _)| *running == part).context("it does not run")?;
        let limit = Instant::now() + Duration::from_secs(60);
        loop {
            if let Some(status) = self.running[index].1.try_wait()? {
                self.running.remove(index);
                let killed = status.signal() == Some(9);
                ensure!(killed, "{} ended by itself: {status}\n{}", part.name(), self.logged(part));
                return Ok(());
            }
            ensure!(Instant::now() < limit, "{} goes on\n{}", part.name(), self.logged(part));
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Ends the tracking that a stopped agent has left, as a restart of the machine does.
    ///
    /// # Errors
    /// When the agent's program says why it cannot.
    pub fn detach(&self) -> anyhow::Result<()> {
        let config = self.config(Part::Agent);
        let output =
            Command::new(program("seawall-agent")?).args(["detach", "--config"]).arg(config).output()?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Ok(())
    }

    /// SIGTERM, and waits for the end.
    ///
    /// # Errors
    /// When it does not run, or does not end well within 30 s.
    pub fn stop(&mut self, part: Part) -> anyhow::Result<()> {
        let index =
            self.running.iter().position(|(running, _)| *running == part).context("it does not run")?;
        let (_, mut child) = self.running.remove(index);
        let limit = Instant::now() + Duration::from_secs(30);
        // One that has just been started may not listen yet.
        while !catches_term(&child) && child.try_wait()?.is_none() && Instant::now() < limit {
            std::thread::sleep(Duration::from_millis(5));
        }
        scratch::run("kill", &["-TERM", &child.id().to_string()])?;
        loop {
            if let Some(status) = child.try_wait()? {
                ensure!(status.success(), "{} ended with {status}\n{}", part.name(), self.logged(part));
                return Ok(());
            }
            if Instant::now() > limit {
                child.kill()?;
                child.wait()?;
                bail!("{} did not stop within 30 s of SIGTERM\n{}", part.name(), self.logged(part));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Runs the operator's command with `--json` and gives its answer.
    ///
    /// # Errors
    /// When it fails; the error holds what it said.
    pub fn operator(&self, command: &str, arguments: &[&str]) -> anyhow::Result<Value> {
        let output = self
            .seawall()?
            .arg(command)
            .arg("--dir")
            .arg(self.dir.path().join("seawall"))
            .arg("--json")
            .args(arguments)
            .output()?;
        if !output.status.success() {
            bail!(
                "seawall {command} {}: {}",
                arguments.join(" "),
                String::from_utf8_lossy(&output.stderr).trim()
            );
        }
        let text = String::from_utf8_lossy(&output.stdout);
        let last = text.lines().last().unwrap_or_default();
        serde_json::from_str(last).with_context(|| format!("read what seawall {command} said: {last}"))
    }

    /// `seawall point now` with these arguments. Gives the point, also when it is less than was asked for, and the exit status.
    ///
    /// # Errors
    /// When there is none; the error holds what the command said.
    pub fn point(&self, arguments: &[&str]) -> anyhow::Result<(Value, i32)> {
        let output = Command::new(program("seawall")?)
            .args(["point", "now", "--json", "--socket"])
            .arg(self.socket())
            .args(arguments)
            .output()?;
        let code = output.status.code().context("the command was killed")?;
        let text = String::from_utf8_lossy(&output.stdout);
        let said: Value = serde_json::from_str(text.trim()).with_context(|| {
            format!("read what seawall point now said: {text}{}", String::from_utf8_lossy(&output.stderr))
        })?;
        match said["error"].as_str() {
            Some(error) => bail!("{error}"),
            None => Ok((said, code)),
        }
    }

    /// `seawall hand-over` with these arguments: what it answers.
    ///
    /// # Errors
    /// When the agent refuses; the error says why.
    pub fn hand_over(&self, arguments: &[&str]) -> anyhow::Result<Value> {
        let output = Command::new(program("seawall")?)
            .args(["hand-over", "--json", "--socket"])
            .arg(self.socket())
            .args(arguments)
            .output()?;
        answer(&output)
    }

    /// What the target says of a point.
    ///
    /// # Errors
    /// When there is no such point.
    pub fn point_at_target(&self, epoch: &Value) -> anyhow::Result<Value> {
        let reply = self.operator("points", &[])?;
        let points = reply["groups"][0]["points"].as_array().context("points")?;
        let found = points.iter().find(|point| point["epoch"] == *epoch);
        found.cloned().with_context(|| format!("point {epoch} at the target: {reply}"))
    }

    /// The numbers of the recovery points, oldest first; none when the target server cannot be asked.
    pub fn points(&self) -> Vec<u64> {
        let Ok(reply) = self.operator("points", &[]) else { return Vec::new() };
        let points = reply["groups"][0]["points"].as_array().cloned().unwrap_or_default();
        points.iter().filter_map(|point| point["epoch"].as_u64()).collect()
    }

    /// Waits until a condition on the points holds.
    ///
    /// # Errors
    /// When it does not within 120 s; the error holds the logs.
    pub fn wait_for_points(&self, what: &str, holds: impl Fn(&[u64]) -> bool) -> anyhow::Result<Vec<u64>> {
        let limit = Instant::now() + Duration::from_secs(120);
        loop {
            let points = self.points();
            if holds(&points) {
                return Ok(points);
            }
            if Instant::now() > limit {
                let status =
                    self.operator("status", &[]).map_or_else(|error| error.to_string(), |s| s.to_string());
                let logs: Vec<String> = [Part::Agent, Part::ProcessServer, Part::TargetServer]
                    .map(|part| format!("--- {}\n{}", part.name(), self.logged(part)))
                    .into();
                bail!("{what}: not within 120 s; points {points:?}; status {status}\n{}", logs.join("\n"));
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Waits for a recovery point whose cut was taken after now: everything durable before is in it.
    ///
    /// # Errors
    /// As [`System::wait_for_points`].
    pub fn wait_for_now(&self) -> anyhow::Result<u64> {
        let now = block::UnixNanos::now().0;
        let limit = Instant::now() + Duration::from_secs(120);
        while Instant::now() < limit {
            if let Ok(reply) = self.operator("points", &[])
                && let Some(newest) = reply["groups"][0]["points"].as_array().and_then(|points| points.last())
                && newest["cut_time"].as_u64().is_some_and(|time| time > now)
            {
                return newest["epoch"].as_u64().context("a point has an epoch");
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        self.wait_for_points("a point from now", |_| false).map(|_| 0)
    }

    /// What the process server was told by the running agent, from now on.
    ///
    /// # Errors
    /// When it is told nothing within 30 s.
    pub fn report(&self) -> anyhow::Result<Value> {
        let now = block::UnixNanos::now().0;
        let limit = Instant::now() + Duration::from_secs(30);
        loop {
            let status = self.operator("status", &[])?;
            let report = &status["process_server"]["groups"][0]["report"];
            if report["time"].as_u64() > Some(now) {
                return Ok(report.clone());
            }
            ensure!(Instant::now() < limit, "no new report in {status}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Bytes that the running agent has read from its disks, as it says from now on.
    ///
    /// # Errors
    /// As [`System::report`].
    pub fn drained(&self) -> anyhow::Result<u64> {
        self.report()?["volumes"][0]["drained_total"].as_u64().context("drained_total in a report")
    }

    /// `[resync]` of the agent: hours that begin in two hours, whatever the time is.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn close_hours(&self) -> anyhow::Result<()> {
        let hour = (block::UnixNanos::now().0 / 1_000_000_000 / 3600) % 24;
        let text = format!(
            "[resync]\ntime_zone = \"UTC\"\n[[resync.window]]\nfrom = \"{:02}:00\"\nto = \"{:02}:00\"\n",
            (hour + 2) % 24,
            (hour + 3) % 24
        );
        self.edit(Part::Agent, |config| config.replace("[resync]\nwindow = []\n", &text))
    }

    /// `seawall` with these arguments, `--dir` and `--json`: what it answers.
    ///
    /// # Errors
    /// What it answers of the kind.
    pub fn asked(&self, arguments: &[&str]) -> anyhow::Result<Value> {
        let mut command = self.seawall()?;
        command.args(arguments).arg("--json").arg("--dir").arg(self.dir.path().join("seawall"));
        let output = command.output()?;
        answer(&output)
    }

    /// `seawall failover` with these arguments.
    ///
    /// # Errors
    /// As [`System::asked`].
    pub fn failover(&self, arguments: &[&str]) -> anyhow::Result<Value> {
        self.asked(&[&["failover"], arguments, &["--yes"]].concat())
    }

    /// What a volume is at a point.
    ///
    /// # Errors
    /// As [`System::restore`].
    pub fn restored(&self, volume: &str, point: u64) -> anyhow::Result<Vec<u8>> {
        let out = self.dir.path().join("restored");
        self.restore(volume, point, &out)?;
        Ok(fs::read(out)?)
    }

    /// Restores a volume at a point to a file.
    ///
    /// # Errors
    /// When the command fails.
    pub fn restore(&self, volume: &str, point: u64, out: &Path) -> anyhow::Result<()> {
        let out = out.to_str().context("path")?;
        let point = point.to_string();
        let arguments = ["--force", "--volume", volume, "--point", &point, "--out", out];
        self.operator("restore", &arguments).map(drop)
    }
}

impl Drop for System {
    fn drop(&mut self) {
        for (_, child) in &mut self.running {
            // Ended already, or ends now.
            let _ = child.kill();
            let _ = child.wait();
        }
        // With the file system, everything that was pinned in it goes. It is not there if no agent ran.
        let _ = Command::new("umount").arg(self.dir.path().join("bpf")).stderr(Stdio::null()).status();
    }
}
