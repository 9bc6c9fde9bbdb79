//! `seawall init`: an authority, a group, and a directory with credentials and configuration for every part.
//!
//! Everything is made in DIR.partial, made durable, and given its name last: an init that is cut short leaves no
//! directory that looks whole, and what it left is named and never touched by the next one.

use clap::Args;
use std::collections::HashSet;
use std::fmt::Write as _;
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};
use block::GroupId;
use changeset::GroupKey;
use enrol::ServerUrl;
use seawall_agent::DeviceName;
use wire::{Authority, Identity, Role};

use crate::config::{OperatorConfig, OperatorSection};
use crate::text;

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  Everything on this machine, protecting one disk:
    seawall init /etc/seawall --device /dev/vdb
  Two disks of one machine, which always share one instant, with the servers elsewhere:
    seawall init /etc/seawall --device /dev/vdb --device /dev/vdc \\
        --process-server cache.example:7440 --target-server dr.example:7441")]
pub(crate) struct InitOptions {
    /// Directory to make; it must not exist, or be empty
    pub(crate) dir: PathBuf,
    /// Disk to protect, as the source names it: a path, or serial:..., wwn:..., ptuuid:..., fsuuid:...; once for each
    #[arg(long = "device", value_name = "PATH", required = true)]
    pub(crate) devices: Vec<PathBuf>,
    /// Name of the protected machine
    #[arg(long, default_value = "source")]
    pub(crate) name: String,
    /// Where the agent and the operator reach the process server
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:7440")]
    pub(crate) process_server: String,
    /// Where the process server and the operator reach the target server
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:7441")]
    pub(crate) target_server: String,
}

/// The parts, and what their directories and files are called.
const PARTS: [(Role, &str); 4] = [
    (Role::Agent, "agent"),
    (Role::ProcessServer, "process-server"),
    (Role::TargetServer, "target-server"),
    (Role::Operator, "operator"),
];

pub(crate) fn run(options: &InitOptions) -> anyhow::Result<()> {
    let dir = std::path::absolute(&options.dir).with_context(|| format!("make {}", options.dir.display()))?;
    make(options, &dir)?;
    Ok(text::say(&next_steps(options, &dir))?)
}

pub(crate) fn make(options: &InitOptions, dir: &Path) -> anyhow::Result<()> {
    let (Some(parent), Some(name)) = (dir.parent(), dir.file_name()) else {
        bail!("make {}: name a directory", dir.display());
    };
    // Everything that can be wrong with the options is found before anything is made.
    Endpoint::parse("--process-server", &options.process_server)?;
    Endpoint::parse("--target-server", &options.target_server)?;
    let volumes = volumes(&options.devices)?;
    let agent_name = Identity::new(Role::Agent, &options.name, None)
        .with_context(|| format!("use --name {}", options.name))?
        .name;

    match std::fs::read_dir(dir) {
        Ok(mut entries) => ensure!(
            entries.next().is_none(),
            "make {}: it is not empty, and nothing is ever overwritten; choose another directory, or remove it if \
             nobody uses its credentials",
            dir.display()
        ),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(error).with_context(|| format!("look into {}", dir.display())),
    }
    let partial = parent.join({
        let mut partial = name.to_owned();
        partial.push(".partial");
        partial
    });
    std::fs::create_dir_all(parent).with_context(|| format!("make directory {}", parent.display()))?;
    DirBuilder::new().mode(0o700).create(&partial).with_context(|| {
        format!("make directory {}; if an interrupted init left it, remove it", partial.display())
    })?;

    fill(options, &partial, &volumes, &agent_name)
        .and_then(|()| {
            // A new name is durable only when what it names is.
            sync_tree(&partial)?;
            std::fs::rename(&partial, dir).with_context(|| format!("name {}", dir.display()))?;
            File::open(parent)?.sync_all().with_context(|| format!("sync {}", parent.display()))
        })
        .inspect_err(|_| {
            // Made by this call, and nobody can have used it yet.
            let _ = std::fs::remove_dir_all(&partial);
        })
}

fn fill(options: &InitOptions, dir: &Path, volumes: &[(String, PathBuf)], agent: &str) -> anyhow::Result<()> {
    let authority = Authority::create(&dir.join("ca"))?;
    let group = new_group()?;
    let key = GroupKey::generate()?.to_hex();
    for (role, part) in PARTS {
        let here = dir.join(part);
        let (name, group) = match role {
            Role::Agent => (agent, Some(group)),
            _ => (part, None),
        };
        authority.issue(&Identity::new(role, name, group)?, &here)?;
        if matches!(role, Role::Agent | Role::TargetServer) {
            write_new(&here.join("group.key"), format!("{}\n", *key).as_bytes(), 0o600)?;
        }
    }
    let process_listen = Endpoint::parse("--process-server", &options.process_server)?.listen();
    let target_listen = Endpoint::parse("--target-server", &options.target_server)?.listen();
    let agent = agent_config(&group, &options.process_server, volumes);
    write_new(&dir.join("agent/agent.toml"), agent.as_bytes(), 0o644)?;
    let process = process_config(&group, &process_listen, &options.target_server);
    write_new(&dir.join("process-server/process-server.toml"), process.as_bytes(), 0o644)?;
    let target = target_config(&group, &target_listen);
    write_new(&dir.join("target-server/target-server.toml"), target.as_bytes(), 0o644)?;
    let operator = OperatorConfig {
        operator: OperatorSection {
            process_server: options.process_server.clone(),
            target_server: options.target_server.clone(),
            credentials: ".".into(),
        },
    };
    let operator = toml::to_string(&operator).context("write the operator's configuration")?;
    write_new(&dir.join("operator/operator.toml"), operator.as_bytes(), 0o644)
}

/// Random, from the same source as the keys.
fn new_group() -> anyhow::Result<GroupId> {
    let seed = GroupKey::generate()?.to_hex();
    let digest = blake3::derive_key("seawall 2026 group id", seed.as_bytes());
    let mut id = [0; 16];
    id.copy_from_slice(&digest[..16]);
    Ok(GroupId(id))
}

fn quoted(text: &str) -> String {
    toml::Value::from(text).to_string()
}

fn agent_config(group: &GroupId, process_server: &str, volumes: &[(String, PathBuf)]) -> String {
    let mut text = format!(
        "# The agent: captures this machine's disks. `seawall-agent check-config --config FILE` tests it.\n\
         [agent]\n\
         group = \"{group}\"\n\
         generation = 1\n\
         group_key = \"group.key\"\n\
         credentials = \".\"\n\
         process_server = {}\n\
         # Between two recovery points.\n\
         epoch_interval_ms = 1000\n\
         # Kernel memory for writes that the agent has not taken yet.\n\
         ring_bytes = \"128MiB\"\n\
         # The agent's memory for what is not cached yet.\n\
         epoch_memory_bytes = \"256MiB\"\n\
         # auto, ebpf or scan.\n\
         source = \"auto\"\n\
         # The kernel goes on tracking while the agent is stopped; `seawall-agent detach` ends it.\n\
         keep_tracking = true\n\
         \n\
         # More than crash-consistent points: `seawall point now`, or one each so many seconds.\n\
         [application]\n\
         every_s = 0\n\
         # Executables that quiesce applications; docs/hooks.md.\n\
         hooks = \"hooks\"\n",
        quoted(process_server)
    );
    for (name, device) in volumes {
        let device = quoted(&device.to_string_lossy());
        let _ = write!(text, "\n[[volume]]\nname = {}\ndevice = {device}\n", quoted(name));
    }
    text
}

fn process_config(group: &GroupId, listen: &str, target: &str) -> String {
    format!(
        "# The process server: keeps changes durably and forwards them.\n\
         [process_server]\n\
         listen = {}\n\
         credentials = \".\"\n\
         cache = \"cache\"\n\
         cache_bytes = \"16GiB\"\n\
         \n\
         [[group]]\n\
         id = \"{group}\"\n\
         targets = [{}]\n",
        quoted(listen),
        quoted(target)
    )
}

fn target_config(group: &GroupId, listen: &str) -> String {
    format!(
        "# The target server: applies changes to replicas and serves recovery points.\n\
         listen = {}\n\
         credentials = \".\"\n\
         # Replicas and their recovery points are below it.\n\
         data = \"data\"\n\
         \n\
         [[group]]\n\
         id = \"{group}\"\n\
         key = \"group.key\"\n\
         \n\
         # Which recovery points are kept; besides, `space_max = \"500 GiB\"` bounds what they take.\n\
         [group.retention]\n\
         policy = \"all for 24h, hourly for 7d, daily for 30d, weekly for 1y\"\n",
        quoted(listen)
    )
}

/// A name for each disk: its last part, made different where two agree.
fn volumes(devices: &[PathBuf]) -> anyhow::Result<Vec<(String, PathBuf)>> {
    let mut names = HashSet::new();
    let mut paths = HashSet::new();
    let mut volumes = Vec::new();
    for device in devices {
        let text = device.to_str();
        let text =
            text.with_context(|| format!("use --device {}: the name is not UTF-8", device.display()))?;
        let (path, base) = match text.parse().with_context(|| format!("use --device {text}"))? {
            DeviceName::Path(path) => {
                let path = std::path::absolute(&path).with_context(|| format!("use --device {text}"))?;
                let base = path.file_name().and_then(|name| name.to_str()).unwrap_or_default().to_owned();
                (path, base)
            }
            // By what it is known by: serial:... and the like.
            mark => (mark.to_string().into(), mark.to_string().replace(':', "-")),
        };
        ensure!(paths.insert(path.clone()), "use --device {}: it is named twice", device.display());
        ensure!(!base.is_empty(), "use --device {}: name a disk or file", device.display());
        let numbered = (2..).map(|number| format!("{base}-{number}"));
        let name = std::iter::once(base.clone()).chain(numbered).find(|name| !names.contains(name));
        let name = name.expect("there are more numbers than devices");
        names.insert(name.clone());
        volumes.push((name, path));
    }
    Ok(volumes)
}

/// A host and a port, in the text that a person gave.
pub(crate) struct Endpoint {
    pub(crate) host: String,
    pub(crate) port: u16,
}

impl Endpoint {
    pub(crate) fn parse(option: &str, text: &str) -> anyhow::Result<Endpoint> {
        let fault = || format!("use {option} {text}: expected HOST:PORT, as in dr.example:7441");
        let (host, port) = text.rsplit_once(':').with_context(fault)?;
        let port: u16 = port.parse().ok().filter(|port| *port > 0).with_context(fault)?;
        let bracketed = host.starts_with('[') && host.ends_with(']');
        ensure!(!host.is_empty() && (bracketed || !host.contains(':')), "{}", fault());
        Ok(Endpoint { host: host.to_owned(), port })
    }

    fn address(&self) -> Option<std::net::IpAddr> {
        self.host.trim_start_matches('[').trim_end_matches(']').parse().ok()
    }

    pub(crate) fn is_loopback(&self) -> bool {
        self.host == "localhost" || self.address().is_some_and(|address| address.is_loopback())
    }

    /// Where programs of this machine reach a server that listens here.
    pub(crate) fn own_address(&self) -> String {
        let every = self.address().is_some_and(|address| address.is_unspecified());
        let host = if every { "127.0.0.1" } else { self.host.as_str() };
        format!("{host}:{}", self.port)
    }

    /// The same for a config server.
    pub(crate) fn own_url(&self) -> anyhow::Result<ServerUrl> {
        Ok(format!("https://{}", self.own_address()).parse()?)
    }

    /// Of a config server that listens here, for those who reach this machine by `name`.
    pub(crate) fn url_of(&self, name: &str) -> anyhow::Result<ServerUrl> {
        let address: Option<std::net::IpAddr> = name.parse().ok();
        let host = match address {
            Some(std::net::IpAddr::V6(address)) => format!("[{address}]"),
            _ => name.to_owned(),
        };
        Ok(format!("https://{host}:{}", self.port).parse()?)
    }

    /// What the certificate of a config server that listens here has to name.
    pub(crate) fn names(&self, name: &str) -> Vec<String> {
        let mut names = vec![name.to_owned()];
        let own = self.host.trim_start_matches('[').trim_end_matches(']');
        let every = self.address().is_some_and(|address| address.is_unspecified());
        for other in [if every { "localhost" } else { own }, "localhost", "127.0.0.1"] {
            if !names.iter().any(|there| there == other) {
                names.push(other.to_owned());
            }
        }
        names
    }

    /// Where the server itself listens: on loopback when it is reached there, else on every address.
    fn listen(&self) -> String {
        match (self.is_loopback(), self.address()) {
            (true, _) => format!("{}:{}", self.host, self.port),
            (false, Some(std::net::IpAddr::V6(_))) => format!("[::]:{}", self.port),
            (false, _) => format!("0.0.0.0:{}", self.port),
        }
    }
}

fn write_new(path: &Path, contents: &[u8], mode: u32) -> anyhow::Result<()> {
    let write = || {
        let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(path)?;
        file.write_all(contents)?;
        file.sync_all()
    };
    write().with_context(|| format!("create {}", path.display()))
}

fn sync_tree(dir: &Path) -> anyhow::Result<()> {
    let sync = |path: &Path| -> std::io::Result<()> { File::open(path)?.sync_all() };
    for (_, part) in PARTS {
        sync(&dir.join(part)).with_context(|| format!("sync {part}"))?;
    }
    sync(&dir.join("ca")).context("sync ca")?;
    sync(dir).with_context(|| format!("sync {}", dir.display()))
}

fn next_steps(options: &InitOptions, dir: &Path) -> String {
    let dir = dir.display();
    let volume = volumes(&options.devices).ok().and_then(|volumes| volumes.into_iter().next());
    let volume = volume.map_or_else(|| "NAME".to_owned(), |(name, _)| name);
    // The disk may be an image file of that name.
    let out = if volume.ends_with(".img") { format!("restored-{volume}") } else { format!("{volume}.img") };
    let mut text =
        format!("Made {dir}: an authority, a group with its key, and a directory for every part.\n\n");
    let local = [&options.process_server, &options.target_server]
        .iter()
        .all(|addr| addr.starts_with("127.") || addr.starts_with("localhost:") || addr.starts_with("[::1]"));
    if local {
        let _ = write!(
            text,
            "Run everything on this machine, as root for the disks:\n  seawall run --dir {dir}\n\n\
             or each part on its own, in this order:\n"
        );
    } else {
        let _ = write!(
            text,
            "Copy {dir}/target-server, {dir}/process-server and {dir}/agent each to its machine, as a whole and in\n\
             private, and there run, in this order:\n"
        );
    }
    for part in ["target-server", "process-server", "agent"] {
        let _ = writeln!(text, "  seawall-{part} run --config {dir}/{part}/{part}.toml");
    }
    let _ = write!(
        text,
        "\nThen, from here:\n  \
         seawall status --dir {dir} --watch\n  \
         seawall points --dir {dir}\n  \
         seawall restore --dir {dir} --volume {volume} --point latest --out {out}\n\n\
         Keep {dir}/ca to yourself: who has it can let anybody in.\n"
    );
    text
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn options(dir: &Path) -> InitOptions {
        InitOptions {
            dir: dir.to_owned(),
            devices: vec!["/dev/vdb".into(), "/dev/mapper/vdb".into()],
            name: "web-1".into(),
            process_server: "cache.example:7440".into(),
            target_server: "[2001:db8::1]:7441".into(),
        }
    }

    #[test]
    fn disks_are_named_by_path_or_by_what_they_are_known_by() {
        let named = |devices: &[&str]| volumes(&devices.iter().map(PathBuf::from).collect::<Vec<_>>());
        let found = named(&["/dev/vdb", "serial:S1", "/dev/mapper/vdb", "fsuuid:1-2"]).unwrap();
        let names: Vec<&str> = found.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["vdb", "serial-S1", "vdb-2", "fsuuid-1-2"]);
        assert_eq!(found[1].1, PathBuf::from("serial:S1"));
        for (devices, fault) in
            [(&["serial:"][..], "serial"), (&["colour:red"], "fsuuid"), (&["wwn:1", "wwn:1"], "twice")]
        {
            let error = format!("{:#}", named(devices).unwrap_err());
            assert!(error.contains(fault), "{devices:?}: {error}");
        }
    }

    #[test]
    fn every_part_gets_what_it_needs_and_no_more() {
        let base = tempfile::tempdir().unwrap();
        let dir = base.path().join("deep/seawall");
        make(&options(&dir), &dir).unwrap();
        let mut found = Vec::new();
        for part in std::fs::read_dir(&dir).unwrap() {
            let part = part.unwrap().path();
            for file in std::fs::read_dir(&part).unwrap() {
                let file = file.unwrap().path();
                let mode = std::fs::metadata(&file).unwrap().permissions().mode() & 0o777;
                let secret =
                    file.extension().is_some_and(|extension| extension == "key") || file.ends_with("key.pem");
                assert_eq!(mode, if secret { 0o600 } else { 0o644 }, "{}", file.display());
                found.push(file.strip_prefix(&dir).unwrap().display().to_string());
            }
        }
        found.sort();
        let expected = "agent/agent.toml agent/ca.pem agent/cert.pem agent/group.key agent/key.pem \
            ca/ca.pem ca/key.pem operator/ca.pem operator/cert.pem operator/key.pem operator/operator.toml \
            process-server/ca.pem process-server/cert.pem process-server/key.pem \
            process-server/process-server.toml target-server/ca.pem target-server/cert.pem \
            target-server/group.key target-server/key.pem target-server/target-server.toml";
        assert_eq!(found.join(" "), expected.split_whitespace().collect::<Vec<_>>().join(" "));
        assert!(!base.path().join("deep/seawall.partial").exists());
        for (role, part) in PARTS {
            let credentials = wire::Credentials::load(&dir.join(part)).unwrap();
            assert_eq!(credentials.identity().role, role);
            assert_eq!(credentials.identity().group.is_some(), role == Role::Agent);
        }
    }

    #[test]
    fn the_configurations_are_accepted_by_the_parts() {
        let base = tempfile::tempdir().unwrap();
        let dir = base.path().join("seawall");
        make(&options(&dir), &dir).unwrap();
        let agent = seawall_agent::AgentConfig::load(&dir.join("agent/agent.toml")).unwrap();
        let names: Vec<&str> = agent.volume.iter().map(|volume| volume.name.as_str()).collect();
        assert_eq!(names, ["vdb", "vdb-2"]);
        assert_eq!(agent.agent.process_server, "cache.example:7440");
        let identity = wire::Credentials::load(&agent.agent.credentials).unwrap().identity().clone();
        assert_eq!(identity.group, Some(agent.agent.group));
        changeset::GroupKey::load(&agent.agent.group_key).unwrap();
        let process =
            seawall_process_server::Config::load(&dir.join("process-server/process-server.toml")).unwrap();
        assert_eq!(process.targets_of(agent.agent.group), ["[2001:db8::1]:7441"]);
        assert_eq!(process.process_server.listen, "0.0.0.0:7440");
        let target =
            seawall_target_server::Config::load(&dir.join("target-server/target-server.toml")).unwrap();
        assert_eq!(target.groups[0].id, agent.agent.group);
        seawall_target_server::TargetServer::check(&target).unwrap();
        let place = crate::config::Place { dir: Some(dir) };
        let operator = OperatorConfig::load(&place).unwrap();
        assert_eq!(operator.operator.target_server, "[2001:db8::1]:7441");
    }

    #[test]
    fn nothing_is_ever_overwritten() {
        let base = tempfile::tempdir().unwrap();
        let dir = base.path().join("seawall");
        make(&options(&dir), &dir).unwrap();
        let before = std::fs::read(dir.join("ca/key.pem")).unwrap();
        let error = make(&options(&dir), &dir).unwrap_err();
        assert!(format!("{error:#}").contains("not empty"), "{error:#}");
        assert_eq!(std::fs::read(dir.join("ca/key.pem")).unwrap(), before);

        let other = base.path().join("other");
        std::fs::create_dir(base.path().join("other.partial")).unwrap();
        let error = make(&options(&other), &other).unwrap_err();
        assert!(format!("{error:#}").contains("interrupted init"), "{error:#}");
        assert!(base.path().join("other.partial").exists());
    }

    #[test]
    fn what_is_wrong_is_found_before_anything_is_made() {
        let base = tempfile::tempdir().unwrap();
        let dir = base.path().join("seawall");
        type Spoil = fn(&mut InitOptions);
        let wrong: [(&str, Spoil); 6] = [
            ("HOST:PORT", |options| options.process_server = "cache.example".into()),
            ("HOST:PORT", |options| options.target_server = "::1:7441".into()),
            ("HOST:PORT", |options| options.target_server = "dr:0".into()),
            ("named twice", |options| options.devices = vec!["/dev/vdb".into(), "/dev/vdb".into()]),
            ("a disk or file", |options| options.devices = vec!["/".into()]),
            ("letters", |options| options.name = "web 1".into()),
        ];
        for (expected, spoil) in wrong {
            let mut options = options(&dir);
            spoil(&mut options);
            let error = make(&options, &dir).unwrap_err();
            assert!(format!("{error:#}").contains(expected), "{error:#}");
            assert_eq!(std::fs::read_dir(base.path()).unwrap().count(), 0);
        }
    }

    #[test]
    fn servers_listen_where_they_are_reached() {
        for (given, listen) in [
            ("127.0.0.1:7440", "127.0.0.1:7440"),
            ("localhost:1", "localhost:1"),
            ("[::1]:7440", "[::1]:7440"),
            ("dr.example:7441", "0.0.0.0:7441"),
            ("192.0.2.1:7441", "0.0.0.0:7441"),
            ("[2001:db8::1]:7441", "[::]:7441"),
        ] {
            assert_eq!(Endpoint::parse("x", given).unwrap().listen(), listen);
        }
    }
}
