//! A fleet from its first command to its first recovery point, with the real programs and nothing but their commands, as the
//! README says it. A file is scanned, so that no privileges are needed.

use std::io::Write;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use seawall_tests::system::program;
use serde_json::Value;

/// Nothing waits longer; what is waited for comes much sooner.
const PATIENCE: Duration = Duration::from_secs(90);
const PASSWORD: &str = "correct horse battery";

/// A program that runs, killed when dropped.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

struct Site {
    base: tempfile::TempDir,
    server: String,
}

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

fn free_address() -> String {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string()
}

/// Runs a command that reads `input`.
fn told(command: &mut Command, input: &str) -> Output {
    let command = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    // A command that refuses before it reads closes its end.
    let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
    child.wait_with_output().unwrap()
}

impl Site {
    fn path(&self, name: &str) -> PathBuf {
        self.base.path().join(name)
    }

    fn command(&self, name: &str) -> Command {
        let mut command = Command::new(program(name).unwrap());
        command.current_dir(self.base.path()).env("SEAWALL_PROFILE", self.path("profile.toml"));
        command
    }

    fn run(&self, name: &str, config: &Path) -> Running {
        let log = std::fs::File::create(self.path(&format!("{name}.log"))).unwrap();
        let mut command = self.command(name);
        command.args(["run", "--config"]).arg(config).stdout(Stdio::null()).stderr(log);
        Running(command.spawn().unwrap())
    }

    fn seawall(&self, args: &[&str]) -> Output {
        self.command("seawall").args(args).output().unwrap()
    }

    /// What a command that succeeds shows.
    fn shown(&self, args: &[&str]) -> String {
        let output = self.seawall(args);
        assert!(output.status.success(), "{args:?}: {}", text(&output));
        String::from_utf8(output.stdout).unwrap()
    }

    /// What a command that succeeds says to programs: one object on one line.
    fn json(&self, args: &[&str]) -> Value {
        let shown = self.shown(&[args, &["--json"]].concat());
        assert_eq!(shown.lines().count(), 1, "{shown}");
        serde_json::from_str(&shown).unwrap()
    }

    /// What a command that fails says.
    fn refused(&self, args: &[&str]) -> String {
        let output = self.seawall(args);
        assert_eq!(output.status.code(), Some(1), "{args:?}: {}", text(&output));
        String::from_utf8(output.stderr).unwrap()
    }

    fn until(&self, what: &str, args: &[&str], wanted: impl Fn(&Value) -> bool) -> Value {
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

    fn logs(&self) -> String {
        let logs =
            ["seawall-config-server", "seawall-agent", "seawall-process-server", "seawall-target-server"];
        let read =
            |name: &&str| std::fs::read_to_string(self.path(&format!("{name}.log"))).unwrap_or_default();
        logs.iter().map(|name| format!("--- {name}\n{}", read(name))).collect()
    }

    fn answers(&self) {
        let began = Instant::now();
        while !self.seawall(&["events"]).status.success() {
            assert!(began.elapsed() < PATIENCE, "{}", self.logs());
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Enrols a part with the line that `seawall token create` prints, as far as it does not depend on the place.
    fn enrol(&self, role: &str, name: &str, more: &[&str]) -> PathBuf {
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

#[test]
fn from_an_empty_directory_to_the_first_point() {
    let site = Site { base: tempfile::tempdir().unwrap(), server: free_address() };
    let init = ["init", "config", "--name", "127.0.0.1", "--listen", &site.server];
    let output = told(site.command("seawall-config-server").args(init), &format!("{PASSWORD}\n"));
    assert!(output.status.success(), "{}", text(&output));
    // The line that it prints is the one to type.
    let line = text(&output).lines().find_map(|line| line.trim().strip_prefix("seawall ").map(str::to_owned));
    let line = line.unwrap_or_else(|| panic!("{}", text(&output)));
    let login: Vec<&str> = line.split(' ').collect();

    assert!(site.refused(&["machine", "list"]).contains("seawall login"));
    let output = told(site.command("seawall").args(&login), PASSWORD);
    assert!(
        !output.status.success() && text(&output).contains("seawall-config-server run"),
        "{}",
        text(&output)
    );

    let config_server = site.run("seawall-config-server", Path::new("config/config-server.toml"));
    let began = Instant::now();
    loop {
        let output = told(site.command("seawall").args(&login), PASSWORD);
        if output.status.success() {
            break;
        }
        assert!(began.elapsed() < PATIENCE, "{}\n{}", text(&output), site.logs());
        std::thread::sleep(Duration::from_millis(100));
    }
    let output = told(site.command("seawall").args(&login), "wrong, and long enough\n");
    assert!(!output.status.success() && text(&output).contains("password is wrong"), "{}", text(&output));
    let mut strange = login.clone();
    let last = strange.len() - 1;
    let other = strange[last].replace(['0', '1', '2', '3', '4', '5', '6', '7'], "8");
    strange[last] = &other;
    let output = told(site.command("seawall").args(&strange), PASSWORD);
    assert!(!output.status.success() && text(&output).contains("check-config"), "{}", text(&output));

    assert!(site.shown(&["machine", "list"]).contains("seawall token create"));
    assert!(site.refused(&["protect", "web", "/dev/null"]).contains("there is none at all yet"));
    let (process_address, target_address) = (free_address(), free_address());
    let target = site.enrol("target-server", "dr", &["--advertise", &target_address]);
    let process = site.enrol("process-server", "cache", &["--advertise", &process_address]);
    let agent = site.enrol("agent", "web", &[]);
    let tokens = site.json(&["token", "list"]);
    let used: Vec<_> = tokens["tokens"].as_array().unwrap().iter().map(|token| &token["used_by"]).collect();
    assert_eq!(used, ["dr", "cache", "web"], "{tokens}");
    let unused = site.json(&["token", "create"])["id"].as_str().unwrap().to_owned();
    site.shown(&["token", "delete", &unused]);
    assert!(site.refused(&["token", "delete", &unused]).contains("There is no token"));

    // A file is scanned; a disk would be captured.
    let mut file = std::fs::OpenOptions::new().append(true).open(&agent).unwrap();
    let socket = site.path("agent.sock");
    write!(file, "\n[agent]\nsource = \"scan\"\ncontrol_socket = {:?}\n", socket.display().to_string())
        .unwrap();
    let disk = site.path("disk.img");
    std::fs::write(&disk, vec![7; 4 << 20]).unwrap();
    let _target = site.run("seawall-target-server", &target);
    let _process = site.run("seawall-process-server", &process);
    let _agent = site.run("seawall-agent", &agent);
    site.until("the agent reports", &["machine", "list"], |said| said["machines"][0]["seen"].is_i64());

    // Placement is by free space among those that report: asked again until both do.
    let disk = disk.to_str().unwrap();
    let asked = ["protect", "web", disk, "--policy", "default", "--target-server", "dr"];
    assert!(site.refused(&["protect", "web", disk, "--policy", "gold"]).contains("there are default"));
    assert!(site.refused(&["protect", "web", disk, "--target-server", "cache"]).contains("there are dr"));
    let began = Instant::now();
    let warned = loop {
        let output = site.seawall(&[&asked[..], &["--watch", "--json"]].concat());
        let job = String::from_utf8(output.stdout.clone()).unwrap();
        let job: Value = serde_json::from_str(job.lines().last().unwrap()).unwrap();
        let failed = |job: &Value| {
            job["steps"].as_array().is_some_and(|steps| steps.iter().any(|step| step["state"] == "failed"))
        };
        if job["error"].is_null() && !failed(&job) {
            assert_eq!(output.status.code(), Some(3), "a warning is not passed over: {}", text(&output));
            break job;
        }
        assert!(began.elapsed() < PATIENCE, "{job:#}\n{}", site.logs());
        std::thread::sleep(Duration::from_millis(200));
    };
    assert_eq!(warned["state"], "failed", "{warned:#}");
    assert_eq!(site.json(&["machine", "show", "web"])["machine"]["protected"], false);
    let output = site.seawall(&[&asked[..], &["--despite-warnings", "--watch"]].concat());
    assert!(output.status.success(), "{}\n{}", text(&output), site.logs());
    for expected in ["The first recovery point", "is a recovery point", "done, 100 %: web is protected."] {
        assert!(text(&output).contains(expected), "{expected}: {}", text(&output));
    }

    let web = site.json(&["machine", "show", "web"]);
    assert!(web["machine"]["protected"] == true && web["group"]["points"].as_u64() > Some(0), "{web:#}");
    let shown = site.shown(&["machine", "show", "web"]);
    assert!(shown.contains("disk.img") && shown.contains("policy default"), "{shown}");
    let jobs = site.json(&["job", "list"]);
    let job = jobs["jobs"][0]["id"].as_str().unwrap();
    assert_eq!(site.json(&["job", "show", job])["state"], "done");
    assert!(site.shown(&["job", "list"]).contains(job));
    assert!(site.refused(&["job", "cancel", job]).contains("ended"));
    // The newest ones, the oldest of them first.
    let events = site.json(&["events", "--last", "1000"]);
    let events = events["events"].as_array().unwrap();
    let messages: Vec<_> = events.iter().map(|event| event["message"].as_str().unwrap()).collect();
    let said = |what: &str| messages.iter().position(|message| message.contains(what));
    assert!(said("agent web enrolled") > said("target-server dr enrolled"), "{messages:#?}");
    let last = site.json(&["events", "--last", "1"]);
    assert!(
        last["events"].as_array().unwrap().len() == 1
            && last["events"][0]["id"].as_i64() >= events.last().unwrap()["id"].as_i64()
    );

    // A job outlives its config server.
    assert!(site.refused(&["unprotect", "web"]).contains("--yes"));
    let id = site.json(&["unprotect", "web", "--yes"])["id"].as_str().unwrap().to_owned();
    drop(config_server);
    let watching = site.command("seawall").args(["job", "show", &id, "--watch"]).output().unwrap();
    assert_eq!(
        watching.status.code(),
        Some(1),
        "what cannot be begun is not waited for: {}",
        text(&watching)
    );
    let _config_server = site.run("seawall-config-server", Path::new("config/config-server.toml"));
    site.answers();
    let output = site.seawall(&["job", "show", &id, "--watch"]);
    assert!(output.status.success() && text(&output).contains("unprotect web"), "{}", text(&output));
    assert!(site.refused(&["unprotect", "web", "--yes"]).contains("not protected"));
    assert!(site.shown(&["machine", "show", "web"]).contains("seawall protect web"));

    let profile = std::fs::read(site.path("profile.toml")).unwrap();
    assert!(site.shown(&["logout"]).contains("Logged out"));
    assert!(site.refused(&["events"]).contains("seawall login"));
    // What was copied before is worth nothing now.
    let stolen = site.path("stolen.toml");
    std::fs::write(&stolen, profile).unwrap();
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o600);
    std::fs::set_permissions(&stolen, mode).unwrap();
    let refused = site.refused(&["events", "--profile", stolen.to_str().unwrap()]);
    assert!(refused.contains("log in again"), "{refused}");
}
