//! The command in a directory of the test's own, with all parts in one process.

use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

/// Nothing here is a measurement; past this the parts hang.
const PATIENCE: Duration = Duration::from_secs(120);

pub(crate) fn seawall(dir: &Path, args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_seawall"));
    command.env("SEAWALL_DIR", dir.join("site")).current_dir(dir).args(args);
    command.output().unwrap()
}

pub(crate) fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

pub(crate) fn json(dir: &Path, args: &[&str]) -> Value {
    let output = seawall(dir, args);
    let stdout = String::from_utf8(output.stdout.clone()).unwrap();
    assert_eq!(stdout.lines().count(), 1, "one object on one line:\n{}", text(&output));
    serde_json::from_str(&stdout).unwrap()
}

/// All parts in one process, ended when dropped.
pub(crate) struct Running(Child);

impl Running {
    pub(crate) fn start(dir: &Path) -> Running {
        let mut command = Command::new(env!("CARGO_BIN_EXE_seawall"));
        command.args(["run", "--dir"]).arg(dir.join("site")).stderr(Stdio::null());
        Running(command.spawn().unwrap())
    }

    /// As `systemctl stop` does.
    pub(crate) fn stop(mut self) {
        let killed = Command::new("kill").arg(self.0.id().to_string()).status().unwrap();
        assert!(killed.success());
        assert!(self.0.wait().unwrap().success());
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

pub(crate) fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// Waits until the status says what is wanted, and gives it.
pub(crate) fn status_when(dir: &Path, wanted: impl Fn(&Value) -> bool) -> Value {
    let start = Instant::now();
    loop {
        let status = json(dir, &["status", "--json"]);
        if wanted(&status) {
            return status;
        }
        assert!(start.elapsed() < PATIENCE, "{status:#}");
        std::thread::sleep(Duration::from_millis(100));
    }
}

#[allow(dead_code, reason = "not every test program looks at it")]
pub(crate) fn applied(status: &Value) -> u64 {
    status["groups"][0]["ladder"]["applied"].as_u64().unwrap_or(0)
}

/// Makes a site that protects `dir/disk.img` by scanning it; ports are free ones.
#[allow(dead_code, reason = "not every test program wants it made for it")]
pub(crate) fn init(dir: &Path) {
    let (process, target) = (format!("127.0.0.1:{}", free_port()), format!("127.0.0.1:{}", free_port()));
    let init =
        ["init", "site", "--device", "disk.img", "--process-server", &process, "--target-server", &target];
    let output = seawall(dir, &init);
    assert!(output.status.success(), "{}", text(&output));
    let config = dir.join("site/agent/agent.toml");
    let scan = std::fs::read_to_string(&config).unwrap().replace("\"auto\"", "\"scan\"");
    std::fs::write(&config, scan).unwrap();
}

/// Waits for something to become true.
#[allow(dead_code, reason = "not every test program waits for more than the status")]
pub(crate) fn until(wanted: impl Fn() -> bool) {
    let start = Instant::now();
    while !wanted() {
        assert!(start.elapsed() < PATIENCE, "it does not happen");
        std::thread::sleep(Duration::from_millis(50));
    }
}
