//! `seawall export`: a point as a disk for other programs.

use crate::config::Place;
use block::ByteCount;
use clap::{Args, Subcommand};
use control::PointSelector;
use std::fmt::Write as _;
use std::path::Path;
use std::path::PathBuf;

use anyhow::{Context, bail};
use block::{GroupId, VolumeId};
use control::{ExportInfo, ExportPlace, ExportRequest, PointsReply};
use tokio::signal::unix::{SignalKind, signal};

use crate::ask::Servers;
use crate::bridge::Bridge;
use crate::{libvirt, text};

#[derive(Debug, Args)]
#[command(
    args_conflicts_with_subcommands = true,
    after_help = "Examples:
  For programs on this machine, through a socket that leads to the target server; ends with Ctrl-C:
    seawall export vda --point latest
  To write to without changing anything, at a place of one's choice:
    seawall export vda vdb --point 1207 --writable --local /tmp/drill.sock
  On the target server's machine, until it is stopped:
    seawall export vda --point latest --socket /run/seawall/vda.sock --detach
  For other machines, with TLS and an operator's certificate:
    seawall export vda --point latest --listen 0.0.0.0:10809 --detach
  A machine for libvirt:
    seawall export vda --point latest --writable --socket /run/seawall/vda.sock --detach --libvirt-xml
  A volume of a group that was failed over and promoted; what is written stays:
    seawall export vda --promoted --socket /run/seawall/vda.sock --detach
  What is running, and its end:
    seawall export list
    seawall export stop 3

Clients are qemu-img, qemu-nbd, nbdcopy, nbdfuse, nbd-client and any other that speaks NBD. What is written goes into an overlay
at the target, of at most --limit, and is dropped at the end; with --promoted it stays."
)]
pub(crate) struct ExportOptions {
    #[command(subcommand)]
    pub(crate) command: Option<ExportCommand>,
    #[command(flatten)]
    pub(crate) start: ExportStartOptions,
}

impl ExportOptions {
    pub(crate) fn json(&self) -> bool {
        match &self.command {
            None => self.start.json,
            Some(ExportCommand::List(options)) => options.json,
            Some(ExportCommand::Stop(options)) => options.json,
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct ExportStartOptions {
    #[command(flatten)]
    pub(crate) place: Place,
    /// Volumes of one group, by name or identity
    #[arg(value_name = "VOLUME", required = true)]
    pub(crate) volumes: Vec<String>,
    /// Recovery point: `latest`, `application` (the newest application-consistent one), or the number of an epoch
    #[arg(long, value_name = "POINT", required_unless_present = "promoted")]
    pub(crate) point: Option<PointSelector>,
    /// Group, where several have such a volume
    #[arg(long, value_name = "ID")]
    pub(crate) group: Option<GroupId>,
    /// Take writes, and drop them at the end
    #[arg(long, group = "writes")]
    pub(crate) writable: bool,
    /// The volumes of a promoted group as they are now; take writes, which stay
    #[arg(long, group = "writes", conflicts_with_all = ["point", "writable"])]
    pub(crate) promoted: bool,
    /// What may be written to each volume, such as 10GiB [default: 16GiB]
    #[arg(long, value_name = "SIZE", requires = "writable")]
    pub(crate) limit: Option<ByteCount>,
    /// Socket to make on this machine [default: one of its own]
    #[arg(long, value_name = "PATH", conflicts_with_all = ["socket", "listen", "detach"])]
    pub(crate) local: Option<PathBuf>,
    /// Socket to make on the target server's machine, for its user only
    #[arg(long, value_name = "PATH", conflicts_with = "listen")]
    pub(crate) socket: Option<PathBuf>,
    /// Address and port for the target server to listen on
    #[arg(long, value_name = "ADDR:PORT")]
    pub(crate) listen: Option<std::net::SocketAddr>,
    /// Without TLS: everybody who reaches the port reads the volumes
    #[arg(long, requires = "listen")]
    pub(crate) plain: bool,
    /// Go on when this command has ended, until `seawall export stop`
    #[arg(long)]
    pub(crate) detach: bool,
    /// Show a libvirt domain with these disks, and nothing else
    #[arg(long, requires = "writes")]
    pub(crate) libvirt_xml: bool,
    /// One JSON object instead of text
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ExportCommand {
    /// Show what is exported
    List(ExportListOptions),
    /// End an export; its clients are disconnected
    Stop(ExportStopOptions),
}

#[derive(Debug, Args)]
pub(crate) struct ExportListOptions {
    #[command(flatten)]
    pub(crate) place: Place,
    /// One JSON object instead of a table
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct ExportStopOptions {
    #[command(flatten)]
    pub(crate) place: Place,
    /// Number of the export, as `seawall export list` shows it
    pub(crate) id: u64,
    /// One JSON object instead of text
    #[arg(long)]
    pub(crate) json: bool,
}

pub(crate) async fn run(options: &ExportOptions) -> anyhow::Result<()> {
    match &options.command {
        None => start(&options.start).await,
        Some(ExportCommand::List(list)) => {
            let reply = Servers::load(&list.place)?.exports().await?;
            let shown = match list.json {
                true => format!("{}\n", serde_json::to_string(&reply)?),
                false => table(&reply.exports),
            };
            Ok(text::say(&shown)?)
        }
        Some(ExportCommand::Stop(stop)) => {
            let reply = Servers::load(&stop.place)?.stop_export(stop.id).await?;
            let shown = match (stop.json, reply.exports.first()) {
                (false, Some(info)) => format!("Stopped export {}: {}.\n", info.id, told(info)),
                _ => format!("{}\n", serde_json::to_string(&reply)?),
            };
            Ok(text::say(&shown)?)
        }
    }
}

async fn start(options: &ExportStartOptions) -> anyhow::Result<()> {
    let servers = Servers::load(&options.place)?;
    let (group, volumes) = find_all(&servers.points(options.group).await?, &options.volumes)?;
    let (place, plain) = match (&options.socket, options.listen) {
        (Some(path), _) => (ExportPlace::Socket(std::path::absolute(path)?), true),
        (None, Some(address)) if options.plain => (ExportPlace::Plain(address), true),
        (None, Some(address)) => (ExportPlace::Tls(address), false),
        // For a bridge to this machine.
        (None, None) => (ExportPlace::Beside, false),
    };
    let request = ExportRequest {
        writable: options.writable,
        promoted: options.promoted,
        overlay_limit: options.limit,
        detach: options.detach,
        ..ExportRequest::new(group, volumes, options.point.unwrap_or_default(), place)
    };
    // Before anything is started, so that no signal is lost.
    let mut terminate = signal(SignalKind::terminate()).context("wait for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("wait for SIGINT")?;
    let mut held = servers.export(request).await?;
    let bridged = options.socket.is_none() && options.listen.is_none();
    let bridge = match bridged {
        true => Some(servers.bridge(&held.info, options.local.as_deref())?),
        false => None,
    };
    text::say(&announce(options, &held.info, bridge.as_ref(), plain)?)?;
    if options.detach {
        return Ok(());
    }
    tokio::select! {
        _ = terminate.recv() => Ok(()),
        _ = interrupt.recv() => Ok(()),
        error = held.ended() => Err(error),
    }
}

fn announce(
    options: &ExportStartOptions,
    info: &ExportInfo,
    bridge: Option<&Bridge>,
    plain: bool,
) -> anyhow::Result<String> {
    let socket = bridge.map(Bridge::socket);
    let uris: Vec<String> = info.volumes.iter().map(|volume| uri(info, socket, &volume.name)).collect();
    if options.libvirt_xml {
        return libvirt::domain(info, socket);
    }
    if options.json {
        let done = serde_json::json!({ "export": info, "uris": uris });
        return Ok(format!("{done}\n"));
    }
    let mut out = format!("Export {}: {}.\n", info.id, told(info));
    for uri in &uris {
        let _ = writeln!(out, "  {uri}");
    }
    if !plain && bridge.is_none() {
        out.push_str(
            "Clients show a certificate of an operator (operator/cert.pem and key.pem), and expect of the server that \
             ca.pem vouches for the name target-server.seawall.invalid (QEMU: tls-hostname).\n",
        );
    }
    if options.detach {
        let _ = writeln!(out, "It goes on until `seawall export stop {}`.", info.id);
    } else {
        out.push_str("It ends with this command (Ctrl-C).\n");
    }
    Ok(out)
}

/// What libnbd and QEMU take.
pub(crate) fn uri(info: &ExportInfo, bridge: Option<&Path>, volume: &str) -> String {
    let name = percent(volume);
    match (socket(info, bridge), &info.place) {
        (Some(socket), _) => format!("nbd+unix:///{name}?socket={}", percent(&socket.display().to_string())),
        (None, ExportPlace::Tls(address)) => format!("nbds://{address}/{name}"),
        (None, ExportPlace::Plain(address)) => format!("nbd://{address}/{name}"),
        (None, ExportPlace::Beside | ExportPlace::Socket(_)) => "unknown".to_owned(),
    }
}

/// The socket that clients use, when they use one.
pub(crate) fn socket<'a>(info: &'a ExportInfo, bridge: Option<&'a Path>) -> Option<&'a Path> {
    match &info.place {
        _ if bridge.is_some() => bridge,
        ExportPlace::Socket(path) => Some(path),
        _ => None,
    }
}

/// A text within a URI.
fn percent(text: &str) -> String {
    let mut out = String::new();
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~/".contains(&byte) {
            out.push(byte.into());
        } else {
            let _ = write!(out, "%{byte:02X}");
        }
    }
    out
}

fn told(info: &ExportInfo) -> String {
    let volumes: Vec<&str> = info.volumes.iter().map(|volume| volume.name.as_str()).collect();
    if info.promoted {
        return format!("{}, promoted: what is written stays", volumes.join(", "));
    }
    let kind = if info.writable { "writable, its writes are dropped at the end" } else { "read-only" };
    let (local, _) = text::instant(info.point.cut_time);
    format!("{} at point {} ({local}), {kind}", volumes.join(", "), info.point.epoch)
}

fn table(exports: &[ExportInfo]) -> String {
    if exports.is_empty() {
        return "No export is running.\n".to_owned();
    }
    let heading = ["ID", "Volumes", "Point", "Where", "Clients", "Read", "Overlay", "Operator", "Detached"];
    let mut table = text::table(&heading, &[0, 2, 4, 5, 6]);
    for info in exports {
        let volumes: Vec<&str> = info.volumes.iter().map(|volume| volume.name.as_str()).collect();
        let place = match &info.place {
            ExportPlace::Socket(path) => path.display().to_string(),
            ExportPlace::Tls(address) => format!("{address}, TLS"),
            ExportPlace::Plain(address) => format!("{address}, plain"),
            ExportPlace::Beside => String::new(),
        };
        let overlay = match info.writable {
            _ if info.promoted => "promoted".to_owned(),
            true => format!("{} of {}", info.overlay_bytes, info.overlay_limit),
            false => "read-only".to_owned(),
        };
        table.add_row([
            info.id.to_string(),
            volumes.join(", "),
            info.point.epoch.to_string(),
            place,
            info.connections.to_string(),
            info.read_bytes.to_string(),
            overlay,
            info.operator.clone(),
            if info.detached { "yes" } else { "no" }.to_owned(),
        ]);
    }
    format!("{table}\n")
}

/// The volumes of these names or identities, of one group; none for all.
pub(crate) fn find_all(reply: &PointsReply, wanted: &[String]) -> anyhow::Result<(GroupId, Vec<VolumeId>)> {
    let mut found: Option<(GroupId, Vec<VolumeId>)> = None;
    for name in wanted {
        let (group, volume) = find(reply, name)?;
        let (first, volumes) = found.get_or_insert((group, Vec::new()));
        if *first != group {
            bail!(
                "export {}: they are of several groups, whose points have nothing in common",
                wanted.join(", ")
            );
        }
        volumes.push(volume);
    }
    found.context("name a volume")
}

/// The one volume of this name or identity.
pub(crate) fn find(reply: &PointsReply, wanted: &str) -> anyhow::Result<(GroupId, VolumeId)> {
    let volumes = || {
        reply.groups.iter().flat_map(|group| group.volumes.iter().map(move |volume| (group.group, volume)))
    };
    let mut fitting =
        volumes().filter(|(_, volume)| volume.name == wanted || volume.id.to_string() == wanted);
    match (fitting.next(), fitting.next()) {
        (Some((group, volume)), None) => Ok((group, volume.id)),
        (Some((first, _)), Some((second, _))) => bail!(
            "find volume {wanted}: groups {first} and {second} both have one; say which with --group ID"
        ),
        (None, _) => {
            let names: Vec<&str> = volumes().map(|(_, volume)| volume.name.as_str()).collect();
            let known = if names.is_empty() { "it has none yet".to_owned() } else { names.join(", ") };
            bail!("find volume {wanted}: the target server has no such volume; it has: {known}")
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use block::{ByteCount, Consistency, Epoch, Generation, PointNote, UnixNanos};
    use control::{GroupPoints, PointInfo, VolumeSummary};

    use super::*;

    pub(crate) fn info(place: ExportPlace) -> ExportInfo {
        let volume = |id, name: &str| VolumeSummary {
            id: VolumeId([id; 16]),
            name: name.into(),
            size: ByteCount::gib(1),
        };
        ExportInfo {
            id: 3,
            group: GroupId([1; 16]),
            point: PointInfo {
                epoch: Epoch(7),
                cut_time: UnixNanos(1_700_000_000_000_000_000),
                consistency: Consistency::Crash,
                note: PointNote::default(),
                changed_bytes: ByteCount(0),
                pin: None,
                kept_for: None,
                unusable: None,
            },
            volumes: vec![volume(1, "vda"), volume(2, "vd b")],
            place,
            writable: true,
            promoted: false,
            detached: true,
            operator: "operator o".into(),
            since: UnixNanos(0),
            drill: None,
            until: None,
            connections: 2,
            read_bytes: ByteCount::mib(3),
            written_bytes: ByteCount(0),
            overlay_bytes: ByteCount::kib(64),
            overlay_limit: ByteCount::gib(16),
        }
    }

    #[test]
    fn uris_are_what_clients_take() {
        let socket = info(ExportPlace::Socket("/run/a b.sock".into()));
        assert_eq!(uri(&socket, None, "vd b"), "nbd+unix:///vd%20b?socket=/run/a%20b.sock");
        let tcp = info(ExportPlace::Tls("[::1]:10809".parse().unwrap()));
        assert_eq!(uri(&tcp, None, "vda"), "nbds://[::1]:10809/vda");
        assert_eq!(uri(&tcp, Some(Path::new("/t/s")), "vda"), "nbd+unix:///vda?socket=/t/s");
    }

    #[test]
    fn exports_are_a_table() {
        let shown = table(&[info(ExportPlace::Plain("127.0.0.1:9".parse().unwrap()))]);
        for expected in ["vda, vd b", "127.0.0.1:9, plain", "64.0 KiB of 16.0 GiB", "operator o", "yes"] {
            assert!(shown.contains(expected), "{expected} in\n{shown}");
        }
        assert!(table(&[]).contains("No export"));
    }

    #[test]
    fn volumes_are_found_by_name_or_identity() {
        let volume =
            |id, name: &str| VolumeSummary { id: VolumeId([id; 16]), name: name.into(), size: ByteCount(1) };
        let group = |id, volumes| GroupPoints {
            group: GroupId([id; 16]),
            generation: Generation(1),
            volumes,
            points: Vec::new(),
            omitted: 0,
        };
        let reply = PointsReply {
            groups: vec![
                group(1, vec![volume(3, "root"), volume(4, "data")]),
                group(2, vec![volume(5, "root"), volume(6, "other")]),
            ],
        };
        assert_eq!(find(&reply, "data").unwrap(), (GroupId([1; 16]), VolumeId([4; 16])));
        let by_id = find(&reply, &VolumeId([5; 16]).to_string()).unwrap();
        assert_eq!(by_id, (GroupId([2; 16]), VolumeId([5; 16])));
        assert!(find(&reply, "root").unwrap_err().to_string().contains("--group"));
        assert!(find(&reply, "vdz").unwrap_err().to_string().contains("data"));
        let both = |names: [&str; 2]| find_all(&reply, &names.map(str::to_owned));
        assert!(both(["data", "other"]).unwrap_err().to_string().contains("several groups"));
        let third = VolumeId([3; 16]).to_string();
        assert_eq!(both(["data", &third]).unwrap().1, [VolumeId([4; 16]), VolumeId([3; 16])]);
    }
}
