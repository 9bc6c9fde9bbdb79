//! `seawall machine push` against a real sshd of the test's own, below a directory of its own: nothing is installed into this
//! machine.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use seawall_tests::cannot_run;
use seawall_tests::site::{PASSWORD, PATIENCE, Running, Site, free_address, text, told};
use serde_json::Value;

const SSHD: &str = "/usr/sbin/sshd";

/// A host: an sshd that notes every command line that it is given.
struct Host<'a> {
    site: &'a Site,
    port: String,
    /// Whether it looks like one with systemd.
    systemd: bool,
    _sshd: Running,
}

impl Drop for Host<'_> {
    fn drop(&mut self) {
        // The agent that was started there is nobody's child.
        if let Some(agent) = self.agent() {
            let _ = Command::new("kill").args(["-KILL", &agent]).status();
        }
    }
}

/// systemctl, as far as a push uses it: the unit is looked at by systemd's own systemd-analyze, and its lines are run as they stand.
const SYSTEMCTL: &str = r#"#!/bin/sh
set -eu; unit=/etc/systemd/system/seawall-agent.service
echo "$*" >>HERE/systemctl
case "$1" in
daemon-reload | enable) exit 0 ;;
restart) ;;
*) echo "systemctl: $1 is not expected" >&2; exit 1 ;;
esac
systemd-analyze verify "$unit" >>HERE/verify 2>&1 || { cat HERE/verify >&2; exit 1; }
if [ -s HERE/pid ]; then
    kill -TERM "$(cat HERE/pid)"; while kill -0 "$(cat HERE/pid)" 2>/dev/null; do sleep 0.1; done
fi
$(sed -n 's/^ExecStartPre=//p' "$unit")
setsid $(sed -n 's/^ExecStart=//p' "$unit") >>HERE/agent.log 2>&1 </dev/null &
echo $! >HERE/pid
"#;

/// What sshd sees in place of this machine's own directories, in a mount namespace that ends with it.
const NAMESPACE: &str = r#"
set -eu; here=$1; shift
mkdir -p "$here/run/sshd" "$here/run/systemd/system" "$here/etc" "$here/sbin" "$here/units"
for pair in run:/run etc:/etc/seawall sbin:/usr/local/sbin units:/etc/systemd/system; do
    mount --bind "$here/${pair%%:*}" "${pair#*:}"
done
exec "$@"
"#;

fn run(command: &mut Command) -> Output {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", text(&output));
    output
}

fn write_program(path: &Path, content: &str) {
    std::fs::write(path, content).unwrap();
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
}

impl Host<'_> {
    fn start(site: &Site, systemd: bool) -> Host<'_> {
        // It wants the directory of its package.
        std::fs::create_dir_all("/run/sshd").unwrap();
        let dir = site.path("host");
        std::fs::create_dir(&dir).unwrap();
        for key in ["host_key", "key", "other_key"] {
            run(Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(dir.join(key)));
        }
        std::fs::copy(dir.join("key.pub"), dir.join("authorized_keys")).unwrap();
        let here = dir.display();
        write_program(
            &dir.join("force"),
            &format!(
                "#!/bin/sh\nprintf '%s\\n' \"$SSH_ORIGINAL_COMMAND\" >>{here}/commands\n\
                 if [ -e {here}/user ]; then PATH={here}/user:$PATH; export PATH; fi\n\
                 exec sh -c \"$SSH_ORIGINAL_COMMAND\"\n"
            ),
        );
        let port = free_address().rsplit_once(':').unwrap().1.to_owned();
        let config = format!(
            "Port {port}\nListenAddress 127.0.0.1\nHostKey {here}/host_key\nAuthorizedKeysFile {here}/authorized_keys\n\
             PidFile none\nStrictModes no\nUsePAM no\nPasswordAuthentication no\nPermitRootLogin yes\n\
             ForceCommand {here}/force\n"
        );
        std::fs::write(dir.join("sshd_config"), config).unwrap();
        let log = std::fs::File::create(dir.join("sshd.log")).unwrap();
        let mut sshd = Command::new(if systemd { "unshare" } else { SSHD });
        if systemd {
            // Where the directories of the namespace are put; an empty one changes nothing.
            std::fs::create_dir_all("/etc/seawall").unwrap();
            sshd.args(["--mount", "--propagation", "private", "sh", "-c", NAMESPACE, "sh"])
                .arg(&dir)
                .arg(SSHD);
            std::fs::create_dir(dir.join("user")).unwrap();
            write_program(
                &dir.join("user/systemctl"),
                &SYSTEMCTL.replace("HERE", &dir.display().to_string()),
            );
        }
        sshd.args(["-D", "-e", "-f"]).arg(dir.join("sshd_config")).stdin(Stdio::null()).stderr(log);
        let mut sshd = Running(sshd.spawn().unwrap());
        let began = Instant::now();
        while std::net::TcpStream::connect(format!("127.0.0.1:{port}")).is_err() {
            let log = || std::fs::read_to_string(dir.join("sshd.log")).unwrap();
            assert!(sshd.0.try_wait().unwrap().is_none() && began.elapsed() < PATIENCE, "{}", log());
            std::thread::sleep(Duration::from_millis(50));
        }
        Host { site, port, systemd, _sshd: sshd }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.site.path("host").join(name)
    }

    fn push(&self, more: &[&str]) -> Output {
        let known = format!("UserKnownHostsFile={}", self.path("known").display());
        let (key, root) = (self.path("key"), self.path("root"));
        let mut args = vec!["machine", "push", "root@127.0.0.1", "--port", &self.port];
        args.extend(["--ssh-option", &known, "--ssh-option", "GlobalKnownHostsFile=/dev/null"]);
        if !self.systemd {
            args.extend(["--root", root.to_str().unwrap()]);
        }
        if !more.contains(&"--identity") {
            args.extend(["--identity", key.to_str().unwrap()]);
        }
        args.extend(more);
        let mut command = self.site.command("seawall");
        // Not what the user of the test has.
        command.args(&args).env_remove("SSH_AUTH_SOCK").stdin(Stdio::null());
        command.output().unwrap()
    }

    /// What a push that fails says.
    fn refused(&self, more: &[&str], exit: i32, expected: &str) {
        let output = self.push(more);
        assert_eq!(output.status.code(), Some(exit), "{more:?}: {}", text(&output));
        assert!(text(&output).contains(expected), "{more:?}: {}", text(&output));
    }

    /// The process of the agent there.
    fn agent(&self) -> Option<String> {
        let file = if self.systemd { "pid" } else { "root/run/seawall-agent.pid" };
        let id = std::fs::read_to_string(self.path(file)).ok()?.trim().to_owned();
        let program = std::fs::read_link(format!("/proc/{id}/exe")).ok()?;
        // In its namespace it has another path.
        let ours = match self.systemd {
            true => program.ends_with("seawall-agent"),
            false => program.starts_with(self.path("root")),
        };
        ours.then_some(id)
    }
}

/// Processes whose program is below a directory.
fn running_below(dir: &Path) -> usize {
    let processes = std::fs::read_dir("/proc").unwrap().flatten();
    let programs = processes.filter_map(|process| std::fs::read_link(process.path().join("exe")).ok());
    programs.filter(|program| program.starts_with(dir)).count()
}

/// A config server that runs, where somebody is logged in; and where it is.
fn logged_in(site: &Site) -> (Running, String) {
    site.init();
    let server = site.run("seawall-config-server", Path::new("config/config-server.toml"));
    let (url, ca) = (format!("https://{}", site.server), site.path("config/ca/ca.pem"));
    let began = Instant::now();
    let login = ["login", "--server", &url, "--ca-file", ca.to_str().unwrap()];
    while !told(site.command("seawall").args(login), PASSWORD).status.success() {
        assert!(began.elapsed() < PATIENCE, "{}", site.logs());
        std::thread::sleep(Duration::from_millis(100));
    }
    (server, url)
}

/// Where there is systemd, the agent becomes a service: its unit is sound by systemd's own tool, its lines start the agent that was
/// sent, and a second push starts the new program in place of the old one. systemd itself does not run here: who it would be is
/// [`SYSTEMCTL`].
#[test]
fn where_there_is_systemd_the_agent_is_a_service() {
    const TEST: &str = "where_there_is_systemd_the_agent_is_a_service";
    if !seawall_tests::root(TEST) {
        return;
    }
    for (program, package) in [(SSHD, "openssh-server"), ("/usr/bin/systemd-analyze", "systemd")] {
        if !Path::new(program).exists() {
            return cannot_run(TEST, &format!("{program}, of {package}, is not installed"));
        }
    }
    let own = || std::fs::read_dir("/etc/seawall").map_or(0, Iterator::count);
    let before = own();
    let site = Site::empty();
    let (_server, _) = logged_in(&site);
    let host = Host::start(&site, true);
    let accept = ["--ssh-option", "StrictHostKeyChecking=accept-new"];
    let output = host.push(&[&accept[..], &["--name", "web", "--json"]].concat());
    let log = || std::fs::read_to_string(host.path("agent.log")).unwrap_or_default();
    assert!(output.status.success(), "{}\n{}", text(&output), log());
    let said: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(said["systemd"] == true && said["enrolled"] == true, "{said}");
    let first = host.agent().expect("the agent runs");
    let unit = std::fs::read_to_string(host.path("units/seawall-agent.service")).unwrap();
    assert_eq!(unit, include_str!("../../packaging/systemd/seawall-agent.service"));
    assert!(host.path("sbin/seawall-agent").exists() && host.path("etc/agent.toml").exists());
    let asked = "daemon-reload\nenable --quiet seawall-agent.service\nrestart seawall-agent.service\n";
    assert_eq!(std::fs::read_to_string(host.path("systemctl")).unwrap(), asked);
    assert!(site.json(&["machine", "list"])["machines"][0]["seen"].is_i64());

    let output = host.push(&["--json"]);
    assert!(output.status.success(), "{}\n{}", text(&output), log());
    let said: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(said["systemd"] == true && said["enrolled"] == false, "{said}");
    assert_ne!(host.agent().expect("the agent runs"), first);
    assert_eq!(std::fs::read_to_string(host.path("systemctl")).unwrap(), asked.repeat(2));
    // Not put into this machine.
    assert_eq!(own(), before);
    // Fails unless it is empty, as it is where there was none.
    let _ = std::fs::remove_dir("/etc/seawall");
}

#[test]
fn a_machine_is_pushed_into_the_fleet_and_brought_up_to_date() {
    const TEST: &str = "a_machine_is_pushed_into_the_fleet_and_brought_up_to_date";
    if !seawall_tests::root(TEST) {
        return;
    }
    if !Path::new(SSHD).exists() {
        return cannot_run(TEST, "sshd, of openssh-server, is not installed");
    }
    let site = Site::empty();
    let (_server, url) = logged_in(&site);
    let host = Host::start(&site, false);

    // Whoever is not known, on either side, and whoever is not there.
    host.refused(&[], 6, "is not known here");
    let accept = ["--ssh-option", "StrictHostKeyChecking=accept-new"];
    let other = host.path("other_key");
    host.refused(&[&accept[..], &["--identity", other.to_str().unwrap()]].concat(), 6, "Permission denied");
    let nobody = free_address().rsplit_once(':').unwrap().1.to_owned();
    let output = site.seawall(&["machine", "push", "root@127.0.0.1", "--port", &nobody]);
    assert_eq!(output.status.code(), Some(5), "{}", text(&output));
    // Programs that would not run there.
    let mut elf = b"\x7fELF\x02\x01\x01".to_vec();
    elf.resize(64, 0);
    elf[18] = 183;
    std::fs::write(host.path("foreign"), elf).unwrap();
    host.refused(&["--agent-binary", host.path("foreign").to_str().unwrap()], 1, "is for aarch64");
    host.refused(&["--agent-binary", host.path("force").to_str().unwrap()], 1, "no program at all");
    host.refused(&["--agent-binary", "/nowhere"], 1, "/nowhere");
    // A kernel that is too old, as the agent's program says it.
    std::fs::write(
        host.path("old.c"),
        r#"#include <stdio.h>
        int main(void) { puts("{\"facts\":[{\"name\":\"kernel\",\"finding\":\"no eBPF capture\",\"found\":\"5.10\",\"advice\":\"Use a newer one.\"}],\"devices\":[]}"); return 2; }"#,
    )
    .unwrap();
    run(Command::new("gcc").arg(host.path("old.c")).arg("-o").arg(host.path("old")));
    host.refused(&["--agent-binary", host.path("old").to_str().unwrap()], 3, "kernel: 5.10 Use a newer one.");
    // A user who is not root.
    std::fs::create_dir(host.path("user")).unwrap();
    write_program(&host.path("user/id"), "#!/bin/sh\necho 1000\n");
    write_program(&host.path("user/sudo"), "#!/bin/sh\necho 'sudo: a password is required' >&2\nexit 1\n");
    host.refused(&[], 1, "sudo asks for a password");
    std::fs::remove_dir_all(host.path("user")).unwrap();
    assert!(site.json(&["machine", "list"])["machines"].as_array().unwrap().is_empty());
    assert!(host.agent().is_none() && !host.path("root/etc").exists());

    let output = host.push(&["--name", "web"]);
    assert!(output.status.success() && text(&output).contains("Enrolled as web"), "{}", text(&output));
    assert!(text(&output).contains("There is no systemd"), "{}", text(&output));
    assert!(site.json(&["machine", "list"])["machines"][0]["seen"].is_i64());
    let first = host.agent().expect("the agent runs");
    // The token came by standard input: no command line has had it, here or there.
    let commands = std::fs::read_to_string(host.path("commands")).unwrap();
    assert!(commands.contains("enroll --server"), "{commands}");
    let secret = commands.as_bytes().windows(64).any(|text| text.iter().all(u8::is_ascii_hexdigit));
    assert!(!secret, "{commands}");

    // Again: another program, nothing else.
    let key = std::fs::read(host.path("root/etc/seawall/state/credentials/key.pem")).unwrap();
    host.refused(&["--name", "other"], 1, "in the fleet as web already");
    assert_eq!(host.agent().as_deref(), Some(first.as_str()), "what is refused leaves the agent alone");
    let output = host.push(&["--json"]);
    assert!(output.status.success(), "{}", text(&output));
    let said: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(said["enrolled"] == false && said["machine"]["name"] == "web", "{said}");
    let second = host.agent().expect("the agent runs");
    assert_ne!(first, second);
    assert_eq!(running_below(&host.path("root")), 1, "the one before has ended");
    assert_eq!(std::fs::read(host.path("root/etc/seawall/state/credentials/key.pem")).unwrap(), key);
    assert_eq!(site.json(&["machine", "list"])["machines"].as_array().unwrap().len(), 1);
    let tokens = site.json(&["token", "list"]);
    assert!(tokens["tokens"].as_array().unwrap().iter().all(|token| token["used_by"] == "web"), "{tokens}");

    // A machine of another fleet is left to it.
    let config = host.path("root/etc/seawall/agent.toml");
    let text_before = std::fs::read_to_string(&config).unwrap();
    std::fs::write(&config, text_before.replace(&url, "https://other.example:7443")).unwrap();
    host.refused(&[], 1, "in a fleet already");
    std::fs::write(&config, text_before).unwrap();
}
