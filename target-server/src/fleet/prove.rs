//! Boot proofs that the config server asks for: a machine is started here, on overlays of a point, and its console tells whether it comes
//! up. It reaches nobody.

use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};

use block::{ByteCount, ByteOffset, GroupId, VolumeId};
use boot::{Accelerator, Console, Disks, HEAD_BYTES, Hardware, Head, Machine, Watch, Why};
use control::fleet::ProofPolicy;
use control::{ExportInfo, ExportPlace, ExportRequest, PointSelector};
use durable::RealStorage;
use enrol::TaskDone;
use serde_json::json;
use tokio::process::Command;
use wire::RefusalCode;

use super::{OPERATOR, Post};
use crate::config::ProofConfig;
use crate::refusal::Refusal;
use crate::server::{Handle, Server};
use crate::{export, operate, proof, retain};

/// What a machine that has come up does not say.
const NEVER: [&str; 2] = ["Kernel panic", "emergency mode"];
/// Of the console of the last machine, in the group's directory: its beginning, at most so much.
const CONSOLE_BYTES_MAX: usize = 1 << 20;
const CONSOLE_FILE: &str = "proof-console";
/// Lines of it that are told when it was in vain.
const LINES_TOLD: usize = 12;
/// The export ends by itself so long after the machine must have come up.
const GRACE: Duration = Duration::from_secs(60);

/// What is to be proven.
pub(super) struct Asked {
    pub(super) group: GroupId,
    pub(super) point: PointSelector,
    pub(super) volumes: Vec<String>,
    pub(super) proof: ProofPolicy,
}

/// One at a time: machines take memory and processors.
pub(super) async fn perform(post: Arc<Post>, asked: Asked, done: TaskDone) {
    let _turn = match post.proving.try_lock() {
        Ok(turn) => turn,
        Err(_) => {
            done.running("Waiting for another proof at this target server to end.").await;
            post.proving.lock().await
        }
    };
    done.running("A machine is started on the point.").await;
    let server = post.running.lock().server.as_ref().map(Handle::shared);
    let Some(server) = server else {
        return done.failed("this target server has not started what it is to do; look at its trouble").await;
    };
    match prove(&server, &post.config.proof, &asked).await {
        Ok((message, result)) => done.done(message, result).await,
        Err(refusal) => {
            tracing::warn!(group = %asked.group, error = refusal.message, "a point is not proven");
            done.failed(refusal.message).await;
        }
    }
}

async fn prove(
    server: &Arc<Server>,
    config: &ProofConfig,
    asked: &Asked,
) -> Result<(String, serde_json::Value), Refusal> {
    let began = Instant::now();
    let failed = |error: String| Refusal::new(RefusalCode::Failed, format!("prove a point: {error}"));
    let dir = tempfile::Builder::new()
        .prefix("seawall-proof-")
        .tempdir()
        .map_err(|error| failed(format!("make a directory: {error}")))?;
    let socket = dir.path().join("disks");
    let within = Duration::from_secs(asked.proof.within_s);
    let (request, head) = {
        let (server, group, point) = (server.clone(), asked.group, asked.point);
        let (names, socket) = (asked.volumes.clone(), socket.clone());
        let look = move || -> Result<(ExportRequest, Head), Refusal> {
            let (epoch, volumes) = found(&server, group, point, &names)?;
            let head = head(&server, group, volumes[0], epoch)?;
            let request = ExportRequest {
                writable: true,
                time_limit_s: Some((within + GRACE).as_secs()),
                ..ExportRequest::new(group, volumes, epoch, ExportPlace::Socket(socket))
            };
            Ok((request, head))
        };
        tokio::task::spawn_blocking(look).await.map_err(|error| failed(error.to_string()))??
    };
    let exported = export::start_detached(server, request, OPERATOR.to_owned()).await?;
    let outcome = tokio::select! {
        outcome = run(config, asked, &exported, head, dir.path(), &socket, began) => outcome,
        () = server.stopping() => Err(Refusal::new(RefusalCode::Stopping, "prove a point: this target server is stopping")),
    };
    export::end(server, exported.id).await;
    let Ran { outcome, took, console, last } = outcome?;
    keep_console(server, asked.group, &console);
    let epoch = exported.point.epoch;
    if let Err(why) = outcome {
        let said = match last.is_empty() {
            true => {
                "It said nothing on its serial console; does its system use that (console=ttyS0)?".to_owned()
            }
            false => format!("The last it said:\n{}", last.join("\n")),
        };
        return Err(Refusal::new(
            RefusalCode::Failed,
            format!("Point {epoch} did not come up: {why}. {said}"),
        ));
    }
    let took_ms = u64::try_from(took.as_millis()).unwrap_or(u64::MAX);
    let volumes: Vec<VolumeId> = exported.volumes.iter().map(|volume| volume.id).collect();
    let kept = {
        let (server, group) = (server.clone(), asked.group);
        let keep = move || proof::keep(&server, OPERATOR.to_owned(), group, epoch, &volumes, took_ms);
        tokio::task::spawn_blocking(keep).await.map_err(|error| failed(error.to_string()))??
    };
    let message = format!("A machine came up from point {epoch} in {:.1} s.", took.as_secs_f64());
    Ok((message, json!({ "epoch": epoch, "took_ms": took_ms, "proof": kept })))
}

/// The point, and its volumes of these names, in this order.
fn found(
    server: &Server,
    group: GroupId,
    point: PointSelector,
    names: &[String],
) -> Result<(PointSelector, Vec<VolumeId>), Refusal> {
    let (_, replica) = retain::replica_of(server, group)?;
    let point = replica.point(retain::epoch_of(&replica, point)?)?;
    let volume = |name: &String| {
        let info = point.volumes.iter().find(|info| info.name == *name);
        info.map(|info| info.id).ok_or_else(|| {
            let message = format!("prove point {}: it has no volume {name}", point.epoch);
            Refusal::new(RefusalCode::NotFound, message)
        })
    };
    let volumes: Vec<VolumeId> = names.iter().map(volume).collect::<Result<_, _>>()?;
    if volumes.is_empty() {
        return Err(Refusal::new(RefusalCode::BadRequest, "prove a point: no volume is named"));
    }
    Ok((PointSelector::Epoch(point.epoch), volumes))
}

fn head(server: &Server, group: GroupId, volume: VolumeId, point: PointSelector) -> Result<Head, Refusal> {
    let (_, view) = operate::open_view(server, group, volume, point)?;
    let mut bytes = vec![0; HEAD_BYTES.min(view.size().0) as usize];
    view.read_at(&mut bytes, ByteOffset(0))?;
    Ok(Head::of(&bytes))
}

/// How it went.
struct Ran {
    outcome: Result<(), Why>,
    took: Duration,
    console: Vec<u8>,
    last: Vec<String>,
}

async fn run(
    config: &ProofConfig,
    asked: &Asked,
    exported: &ExportInfo,
    head: Head,
    dir: &Path,
    socket: &Path,
    began: Instant,
) -> Result<Ran, Refusal> {
    let failed = |error: String| Refusal::new(RefusalCode::Failed, format!("prove a point: {error}"));
    let wanted = &asked.proof;
    let hardware = Hardware {
        network: if wanted.isolated_network { "isolated" } else { "none" }.to_owned(),
        firmware: wanted.firmware,
        bus: wanted.bus,
        accelerator: Accelerator::Auto,
        memory: ByteCount(wanted.memory_bytes),
        cpus: wanted.cpus,
        qemu: config.qemu.clone(),
        more: Vec::new(),
    };
    let names: Vec<&str> = exported.volumes.iter().map(|volume| volume.name.as_str()).collect();
    let name = format!("seawall-{}", exported.point.epoch);
    let disks = Disks { machine: &name, socket, names: &names, head };
    let machine = Machine::new(&hardware, disks, dir, false).map_err(|error| failed(error.to_string()))?;
    let mut command = machine.command();
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut running =
        command.spawn().map_err(|error| failed(format!("run setpriv (of util-linux): {error}")))?;
    let (Some(console), Some(errors)) = (running.stdout.take(), running.stderr.take()) else {
        return Err(failed("the machine has no console".to_owned()));
    };
    // What QEMU itself complains of is worth telling when nothing comes of it.
    let errors = tokio::spawn(async move {
        let mut text = Vec::new();
        let mut errors = tokio::io::AsyncReadExt::take(errors, 4096);
        let _ = tokio::io::AsyncReadExt::read_to_end(&mut errors, &mut text).await;
        String::from_utf8_lossy(&text).trim().to_owned()
    });
    let never: Vec<String> = NEVER.iter().map(|text| (*text).to_owned()).collect();
    let mut watch = Watch::new(&wanted.expect, &never);
    let mut said = Beginning(Vec::new());
    let listening = Console { watch: &mut watch, log: Some(&mut said), began, shown: &mut |_| {} };
    let probing = config.probe.as_deref().map(|program| probe(program, asked, exported));
    let within = Duration::from_secs(wanted.within_s);
    let listened = listening.listen::<_, boot::BootError>(console, probing);
    let listened = tokio::time::timeout(within.saturating_sub(began.elapsed()), listened).await;
    let took = began.elapsed();
    boot::end(&mut running).await.map_err(|error| failed(error.to_string()))?;
    let by_itself = matches!(&listened, Ok(Ok(Err(_))));
    let mut outcome = match listened {
        Ok(listened) => listened.map_err(|error| failed(error.to_string()))?,
        Err(_) if watch.all_seen() => Err(format!("the probe has not ended within {} s", wanted.within_s)),
        Err(_) => Err(format!("it has not said {} within {} s", watch.missing(), wanted.within_s)),
    };
    if let Err(why) = &mut outcome
        && by_itself
        && watch.tail().is_empty()
        && let Ok(complaint) = errors.await
        && !complaint.is_empty()
    {
        *why = format!("{why}: {complaint}");
    }
    let last = watch.last_lines(LINES_TOLD);
    Ok(Ran { outcome, took, console: said.0, last })
}

async fn probe(
    program: &Path,
    asked: &Asked,
    exported: &ExportInfo,
) -> Result<Result<(), Why>, boot::BootError> {
    let mut command = Command::new(program);
    command.env("SEAWALL_GROUP", asked.group.to_string());
    command.env("SEAWALL_POINT", exported.point.epoch.to_string());
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).kill_on_drop(true);
    let status = command
        .status()
        .await
        .map_err(|source| boot::BootError::Io { doing: format!("run {}", program.display()), source })?;
    Ok(if status.success() { Ok(()) } else { Err(format!("{} ended with {status}", program.display())) })
}

/// Takes all, and keeps what comes first.
struct Beginning(Vec<u8>);

impl std::io::Write for Beginning {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let room = CONSOLE_BYTES_MAX.saturating_sub(self.0.len()).min(bytes.len());
        self.0.extend_from_slice(&bytes[..room]);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// For whoever wants to know more than the job tells. What cannot be kept changes nothing about the proof.
fn keep_console(server: &Server, group: GroupId, console: &[u8]) {
    let Some(group) = server.group(group) else { return };
    let dir = group.overlays.parent().unwrap_or(&group.overlays);
    if let Err(error) = durable::replace(&RealStorage, &dir.join(CONSOLE_FILE), console) {
        tracing::warn!(%error, "keep what a machine said");
    }
}
