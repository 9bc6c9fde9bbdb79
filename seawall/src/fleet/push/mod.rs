//! `seawall machine push`: brings a machine into the fleet over SSH, or the program of one up to date.
//!
//! What is done there, in order, and what a push that is cut short leaves:
//! 1. the program beside the one in use: nothing has changed, the next push replaces it;
//! 2. the check with it;
//! 3. the enrolment, with a token that comes by standard input: enrolled, nothing runs yet, the next push goes on;
//! 4. the program takes its name in one step, and the service starts anew.

mod ssh;

use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use clap::Args;
use control::fleet::{MachineInfo, MadeEnrolToken, Name, NewEnrolToken, Overview, PartRole, UnixMillis};
use enrol::ServerUrl;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};

use super::change::Common;
use super::{Fleet, say_json};
use crate::exit::{Exit, stop};
use crate::text;
use ssh::Ssh;

/// The token is used within moments, in minutes.
const TOKEN_MINUTES: u32 = 10;
/// How long the machine's first report may take.
const REPORT_TIME_MAX: Duration = Duration::from_secs(60);
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// The largest program, in bytes. A larger file is none of ours.
const PROGRAM_BYTES_MAX: u64 = 1 << 30;
const UNIT: &str = include_str!("../../../../packaging/systemd/seawall-agent.service");

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  seawall machine push root@web.example
  seawall machine push admin@web.example --port 2222 --identity ~/.ssh/fleet --name web
  The same again brings the agent's program up to date:
    seawall machine push root@web.example --agent-binary ./seawall-agent-0.2

Uses the system's ssh, with its keys and known hosts. There it needs root, or sudo without a password. Copies the agent's program to
/usr/local/sbin, looks with it whether the kernel can be followed, enrols with a one-time token that is given over standard input, and
starts a systemd service; where there is no systemd it starts the agent in a session of its own, and says so. Waits for the first report.")]
pub(crate) struct PushOptions {
    /// The machine, as ssh names it: USER@HOST
    #[arg(value_name = "USER@HOST")]
    destination: String,
    /// Port of its sshd
    #[arg(long)]
    port: Option<u16>,
    /// Key to show
    #[arg(long, value_name = "FILE")]
    identity: Option<PathBuf>,
    /// An option of ssh, as in ProxyJump=gate.example; once for each
    #[arg(long = "ssh-option", value_name = "KEY=VALUE")]
    ssh_options: Vec<String>,
    /// The agent's program [default: seawall-agent beside this command]
    #[arg(long, value_name = "PATH")]
    agent_binary: Option<PathBuf>,
    /// Name of the machine in the fleet [default: its host name]
    #[arg(long)]
    name: Option<Name>,
    /// Where the machine finds the config server [default: where this command does]
    #[arg(long, value_name = "URL")]
    server: Option<ServerUrl>,
    /// Go on although the kernel there cannot be followed by eBPF
    #[arg(long)]
    despite_check: bool,
    /// Install below this directory there, and start without systemd
    #[arg(long, value_name = "DIR")]
    root: Option<PathBuf>,
    #[command(flatten)]
    pub(super) common: Common,
}

/// What was found there: `key value` on each line.
const PROBE: &str = r#"
echo "system $(uname -s)"; echo "machine $(uname -m)"; echo "kernel $(uname -r)"; echo "uid $(id -u)"
echo "host $(cat /proc/sys/kernel/hostname)"
if [ "$(id -u)" != 0 ]; then
    if ! command -v sudo >/dev/null 2>&1; then echo "sudo none"
    elif sudo -n true 2>/dev/null; then echo "sudo yes"
    else echo "sudo asks"; fi
fi
if [ -d /run/systemd/system ] && command -v systemctl >/dev/null 2>&1; then echo "systemd yes"; fi
"#;

/// Of the root directory $1.
const STATE: &str = r#"
e="$1/etc/seawall"
if [ -e "$e/state/credentials" ]; then echo "enrolled yes"; fi
if [ -e "$e/agent.toml" ]; then echo "config yes"; sed -n 's/^url = "\(.*\)"$/url \1/p' "$e/agent.toml"; fi
if [ -e "$e/name" ]; then echo "name $(cat "$e/name")"; fi
"#;

const UPLOAD: &str = r#"
set -eu; umask 022; d="$1/usr/local/sbin"; mkdir -p "$d"
cat >"$d/.seawall-agent.new"; chmod 755 "$d/.seawall-agent.new"; wc -c <"$d/.seawall-agent.new"
"#;

const CHECK: &str = r#""$1/usr/local/sbin/.seawall-agent.new" check --json"#;

/// The token comes by standard input and goes on in the environment, which only root can look at.
const ENROL: &str = r#"
set -eu; umask 077; read -r token; e="$1/etc/seawall"; mkdir -p "$e"
if [ -n "$1" ] && ! [ -e "$e/agent.toml" ]; then
    printf '[config_server]\nurl = "%s"\nstate = "state"\n[agent]\ncontrol_socket = "%s"\ntracking_folder = "%s"\n' \
        "$2" "$1/run/seawall-agent.sock" "$1/run/tracking" >"$e/agent.toml"
fi
SEAWALL_ENROL_TOKEN="$token" "$1/usr/local/sbin/.seawall-agent.new" enroll --server "$2" --name "$3" --config "$e/agent.toml"
printf '%s\n' "$3" >"$e/name"
"#;

/// The unit comes by standard input.
const START_SERVICE: &str = r#"
set -eu; umask 022; d=/usr/local/sbin; mv -f "$d/.seawall-agent.new" "$d/seawall-agent"
cat >/etc/systemd/system/seawall-agent.service
systemctl daemon-reload; systemctl enable --quiet seawall-agent.service; systemctl restart seawall-agent.service
"#;

const START_ALONE: &str = r#"
set -eu; umask 022; b="$1/usr/local/sbin/seawall-agent"; p="$1/run/seawall-agent.pid"; l="$1/var/log/seawall-agent.log"
mkdir -p "$1/run" "$1/var/log"; mv -f "$b" "$b.old" 2>/dev/null || true
mv -f "$1/usr/local/sbin/.seawall-agent.new" "$b"
if [ -s "$p" ]; then
    old=$(cat "$p")
    case "$(readlink "/proc/$old/exe" 2>/dev/null || true)" in
        "$b"|"$b.old"|"$b (deleted)"|"$b.old (deleted)")
            kill -TERM "$old" 2>/dev/null || true; n=0
            while kill -0 "$old" 2>/dev/null && [ $n -lt 300 ]; do sleep 0.1; n=$((n+1)); done ;;
    esac
fi
rm -f "$b.old"
setsid sh -c 'echo $$ >"$1"; exec "$2" run --config "$3"' agent "$p" "$b" "$1/etc/seawall/agent.toml" </dev/null >>"$l" 2>&1 &
"#;

const LOG: &str = r#"
if [ -e "$1/var/log/seawall-agent.log" ]; then tail -n 5 "$1/var/log/seawall-agent.log"
else journalctl -u seawall-agent.service -n 5 --no-pager -o cat 2>/dev/null; fi
"#;

/// The value of a key of what a script said.
fn told<'a>(said: &'a str, key: &str) -> Option<&'a str> {
    said.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' ')).map(str::trim)
}

pub(super) async fn run(options: &PushOptions) -> anyhow::Result<Exit> {
    let tell = |line: &str| {
        if !options.common.json {
            eprintln!("{line}");
        }
    };
    let fleet = Fleet::open(&options.common.place)?;
    let (path, program) = program(options.agent_binary.as_deref())?;
    let root = match &options.root {
        None => String::new(),
        Some(dir) => {
            let dir = dir.to_str().context("use --root: the name is not UTF-8")?.trim_end_matches('/');
            ensure!(
                dir.starts_with('/') && !dir.contains(['"', '\n']),
                "use --root {dir}: name an absolute directory"
            );
            dir.to_owned()
        }
    };
    let destination = &options.destination;
    ensure!(!destination.starts_with('-'), "reach {destination}: expected USER@HOST");
    let mut ssh = Ssh::new(destination, options.port, options.identity.as_deref(), &options.ssh_options)?;

    let probed = ssh.done("look at the system", PROBE, &[], b"").await?;
    let found = |key| told(&probed, key).unwrap_or_default();
    ensure!(
        found("system") == "Linux",
        "push to {destination}: it runs {}, and the agent needs Linux",
        found("system")
    );
    let (built, there) = (architecture(&program), found("machine"));
    ensure!(
        built == Some(there),
        "push to {destination}: its processor is {there}, and {} is for {}; name a program for it with --agent-binary",
        path.display(),
        built.unwrap_or("another one, or no program at all")
    );
    match (found("uid"), found("sudo")) {
        ("0", _) => {}
        (_, "yes") => ssh.use_sudo(),
        (_, "none") => {
            bail!("push to {destination}: the user is not root, and there is no sudo; use root@HOST")
        }
        _ => bail!(
            "push to {destination}: the user is not root, and sudo asks for a password there; use root@HOST, or let sudo \
             be used without one"
        ),
    }
    let systemd = found("systemd") == "yes" && root.is_empty();
    tell(&format!("{destination}: Linux {}, {there}", found("kernel")));

    upload(&ssh, &root, &program, options.common.json).await?;
    check(&ssh, &root, options, &tell).await?;

    let server = options.server.clone().unwrap_or_else(|| fleet.client().server().clone());
    let state = ssh.done("look for an agent", STATE, &[&root], b"").await?;
    let enrolled = told(&state, "enrolled") == Some("yes");
    let kept = told(&state, "name").map(str::to_owned);
    let host = found("host").to_owned();
    let name: Name = match (&options.name, kept.filter(|_| enrolled)) {
        (Some(name), Some(kept)) if name.as_str() != kept => {
            bail!("push to {destination} as {name}: it is in the fleet as {kept} already; leave --name out")
        }
        (Some(name), _) => name.clone(),
        (None, Some(kept)) => kept.parse().context("use the name that is kept there")?,
        (None, None) => {
            host.parse().with_context(|| format!("use the host name {host}; give one with --name"))?
        }
    };
    if enrolled {
        let url = told(&state, "url").unwrap_or_default();
        ensure!(
            url.parse::<ServerUrl>().ok().as_ref() == Some(&server),
            "push to {destination}: it is in a fleet already, that of {url}, and this is {server}; take it out there and \
             remove {root}/etc/seawall on it first"
        );
        tell(&format!("It is in the fleet already, as {name}: only its program is exchanged."));
    } else {
        let asked = NewEnrolToken { role: PartRole::Agent, name: Some(name.clone()), minutes: TOKEN_MINUTES };
        let made: MadeEnrolToken = fleet.post("/enrol-tokens", &asked).await?;
        let arguments = [root.as_str(), &server.to_string(), name.as_str()];
        let input = format!("{}\n", made.token);
        if let Err(error) = ssh.done("enrol", ENROL, &arguments, input.as_bytes()).await {
            // Nobody is to find it useful.
            let _ = fleet.delete(&format!("/enrol-tokens/{}", made.info.id)).await;
            return Err(error);
        }
        tell(&format!("Enrolled as {name}."));
    }

    match systemd {
        true => {
            ssh.done("start the service", START_SERVICE, &[], UNIT.as_bytes()).await?;
            tell("The service seawall-agent runs.");
        }
        false => {
            ssh.done("start the agent", START_ALONE, &[&root], b"").await?;
            tell(
                "There is no systemd: the agent runs in a session of its own, and will not after a restart of the machine.",
            );
        }
    }
    // By the config server's clock; the program before does not report any more.
    let started = fleet.get::<Overview>("/overview").await?.time;
    let machine = reported(&fleet, &name, started).await;
    let machine = match machine {
        Ok(machine) => machine,
        Err(error) => {
            let log = ssh.done("look at the log", LOG, &[&root], b"").await.unwrap_or_default();
            return Err(error.context(format!("Its log says: {}", log.trim())));
        }
    };
    match options.common.json {
        true => say_json(&json!({ "machine": machine, "enrolled": !enrolled, "systemd": systemd }))?,
        false => text::say(&format!(
            "{name} reports. Now: seawall discover {name}; seawall protect {name} DISK --watch\n"
        ))?,
    }
    Ok(Exit::Done)
}

/// The agent's program.
fn program(named: Option<&Path>) -> anyhow::Result<(PathBuf, Vec<u8>)> {
    let path = match named {
        Some(path) => path.to_owned(),
        None => {
            std::env::current_exe().context("find this command's program")?.with_file_name("seawall-agent")
        }
    };
    let read = || -> anyhow::Result<Vec<u8>> {
        let file = std::fs::File::open(&path)?;
        let mut program = Vec::new();
        file.take(PROGRAM_BYTES_MAX + 1).read_to_end(&mut program)?;
        ensure!(program.len() as u64 <= PROGRAM_BYTES_MAX, "it has more than {PROGRAM_BYTES_MAX} bytes");
        Ok(program)
    };
    let program = read().with_context(|| {
        format!("read the agent's program {}; name another one with --agent-binary", path.display())
    })?;
    Ok((path, program))
}

/// For which processor a program of ELF is, as uname(1) calls it.
fn architecture(program: &[u8]) -> Option<&'static str> {
    let is_elf = program.starts_with(b"\x7fELF\x02\x01");
    let machine = u16::from_le_bytes([*program.get(18)?, *program.get(19)?]);
    match machine {
        62 if is_elf => Some("x86_64"),
        183 if is_elf => Some("aarch64"),
        _ => None,
    }
}

async fn upload(ssh: &Ssh, root: &str, program: &[u8], quiet: bool) -> anyhow::Result<()> {
    let bar = if quiet { ProgressBar::hidden() } else { ProgressBar::new(program.len() as u64) };
    bar.set_style(ProgressStyle::with_template(
        "Copying the agent {bar:30} {bytes}/{total_bytes} {bytes_per_sec} [{eta} left]",
    )?);
    let sent = ssh.run(UPLOAD, &[root], program, |bytes| bar.inc(bytes as u64)).await;
    bar.finish_and_clear();
    let said = ssh.must("copy the agent", sent?)?;
    ensure!(
        said.trim().parse() == Ok(program.len()),
        "copy the agent: {} of {} bytes arrived; try again",
        said.trim(),
        program.len()
    );
    Ok(())
}

/// Looks with the program itself whether the kernel there can be followed.
async fn check(ssh: &Ssh, root: &str, options: &PushOptions, tell: &impl Fn(&str)) -> anyhow::Result<()> {
    let output = ssh.run(CHECK, &[root], b"", |_| {}).await?;
    let report: Value = serde_json::from_slice(&output.stdout).map_err(|_| {
        let said = String::from_utf8_lossy(&output.stderr);
        anyhow::anyhow!(
            "try the agent's program on {}: {}; it needs glibc of the same age or newer there, and a directory from which \
             programs may be run",
            options.destination,
            said.trim()
        )
    })?;
    let missing = missing(&report);
    for disk in report["devices"].as_array().into_iter().flatten() {
        if disk["mode"].is_null() {
            tell(&format!(
                "{} cannot be protected as it is: {}",
                disk["device"].as_str().unwrap_or_default(),
                disk["why"].as_str().unwrap_or_default()
            ));
        }
    }
    if missing.is_empty() {
        return Ok(());
    }
    let missing = missing.join("; ");
    if options.despite_check {
        tell(&format!("Not as it should be: {missing}"));
        return Ok(());
    }
    Err(stop(
        Exit::Short,
        format!(
            "push to {}: its disks could only be followed by checksums (scan): {missing}. Mend that, or say --despite-check",
            options.destination
        ),
    ))
}

/// What keeps eBPF from following disks, with what to do.
fn missing(report: &Value) -> Vec<String> {
    let facts = report["facts"].as_array().into_iter().flatten();
    let bad = facts.filter(|fact| fact["finding"] == "no eBPF capture");
    bad.map(|fact| {
        let text = |key: &str| fact[key].as_str().unwrap_or_default().to_owned();
        format!("{}: {} {}", text("name"), text("found"), text("advice")).trim().to_owned()
    })
    .collect()
}

/// Waits until the machine has reported since then.
async fn reported(fleet: &Fleet, name: &Name, since: UnixMillis) -> anyhow::Result<MachineInfo> {
    let began = Instant::now();
    loop {
        let machines: Vec<MachineInfo> = fleet.all("/machines").await?;
        let machine = machines.into_iter().find(|machine| machine.name == *name);
        if let Some(machine) = machine.filter(|machine| machine.seen.is_some_and(|seen| seen > since)) {
            return Ok(machine);
        }
        if began.elapsed() > REPORT_TIME_MAX {
            return Err(stop(
                Exit::Short,
                format!(
                    "wait for the first report of {name}: none within {} s; look whether it reaches the config server",
                    REPORT_TIME_MAX.as_secs()
                ),
            ));
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_says_for_which_processor_it_is() {
        let mut elf = b"\x7fELF\x02\x01\x01".to_vec();
        elf.resize(64, 0);
        for (machine, expected) in [(62u16, Some("x86_64")), (183, Some("aarch64")), (3, None)] {
            elf[18..20].copy_from_slice(&machine.to_le_bytes());
            assert_eq!(architecture(&elf), expected);
        }
        assert_eq!(architecture(b"#!/bin/sh\nexec true, and some more\n"), None);
        assert_eq!(architecture(b"\x7fELF\x02\x01"), None);
    }

    #[test]
    fn what_is_missing_is_told_with_what_to_do() {
        let report = json!({ "facts": [
            { "name": "kernel", "finding": "no eBPF capture", "found": "5.10.0, x86_64", "advice": "Use 5.17 or newer." },
            { "name": "lockdown", "finding": "good", "found": "none" },
        ]});
        assert_eq!(missing(&report), ["kernel: 5.10.0, x86_64 Use 5.17 or newer."]);
        assert_eq!(told("uid 0\nhost web\nhosts no\n", "host"), Some("web"));
        assert_eq!(told("uid 0\n", "host"), None);
    }
}
