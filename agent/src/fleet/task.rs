//! What the config server asks for once.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context, bail};
use block::{Consistency, GroupId};
use capture::check::Places;
use changeset::GroupKey;
use control::fleet::{ProtectedVolume, Protection, SealFor, Task, TaskKind};
use control::{AgentAnswer, AgentRequest, ResyncWhen};
use durable::{RealStorage, Storage};
use enrol::TaskDone;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use wire::{HandshakeError, Purpose, Role, WireError};

use super::{FleetConfig, Post, script};
use crate::check;

pub(super) async fn perform(post: &Post, Task { id, kind }: Task, done: TaskDone) {
    let result = match kind {
        TaskKind::CheckDisks { devices, process_server } => check_disks(post, devices, &process_server).await,
        TaskKind::SealKey { group, targets } => seal_key(&post.config, group, &targets),
        TaskKind::Point { consistency, label } => point(post, &consistency, label, &done).await,
        TaskKind::Resync { volume } => resync(post, volume).await,
        TaskKind::HandOver => hand_over(post, &done).await,
        TaskKind::Release { devices } => release(post, &devices).await,
        TaskKind::FailOver { .. }
        | TaskKind::CommitFailover { .. }
        | TaskKind::CancelFailover { .. }
        | TaskKind::Promote { .. }
        | TaskKind::Demote { .. }
        | TaskKind::Prove { .. }
        | TaskKind::Drill { .. }
        | TaskKind::EndDrill { .. } => Err(anyhow::anyhow!("this is an agent; a target server does that")),
        TaskKind::Script { command, arguments, environment, timeout_s } => {
            let asked = script::Asked { command, arguments, environment, timeout_s };
            script::run(post, id, asked).await
        }
        TaskKind::CheckScript { command } => script::check(post, &command),
        TaskKind::Unknown => Err(anyhow::anyhow!("this agent does not know the task; upgrade it")),
    };
    match result {
        Ok((message, result)) => done.done(message, result).await,
        Err(error) => {
            let error = format!("{error:#}");
            tracing::warn!(error, "a task of the config server failed");
            done.failed(error).await;
        }
    }
}

async fn check_disks(
    post: &Post,
    devices: Vec<String>,
    process_server: &str,
) -> anyhow::Result<(String, Value)> {
    let volumes = devices.iter().enumerate();
    let volumes =
        volumes.map(|(place, device)| ProtectedVolume { name: format!("{place}"), device: device.clone() });
    // As they would be opened, with what the file says of the source.
    let protection = Protection { volumes: volumes.collect(), ..post.config.example() };
    let config = post.config.with(&protection)?;
    let report = tokio::task::spawn_blocking(move || check(&Places::default(), Some(&config), &[])).await?;
    let report = serde_json::to_value(&report).context("write what was found")?;
    let disks: Vec<Value> = report["devices"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|disk| {
            json!({
                "device": disk["device"], "bytes": disk["size"], "mode": disk["mode"], "why": disk["why"],
                "advice": disk["advice"], "written_bytes_per_s": written(post, disk["device"].as_str()),
            })
        })
        .collect();
    let (link, bandwidth) = way_to(&post.config, process_server).await;
    let found = json!({ "disks": disks, "link": link, "bandwidth": bandwidth, "facts": report["facts"] });
    Ok(("looked".into(), found))
}

/// How much was written to a disk in the last minutes, in bytes a second, when that was counted.
fn written(post: &Post, device: Option<&str>) -> Option<u64> {
    let device = std::fs::canonicalize(device?).ok()?;
    let disks = post.disks.lock();
    disks.iter().find(|disk| Path::new(&disk.device) == device)?.written_bytes_per_s
}

/// Whether the process server is reached, and what comes through: `{reached, ms, error, refused}` and
/// `{bytes, time_us, bytes_per_s, error, older}`.
async fn way_to(config: &FleetConfig, process_server: &str) -> (Value, Value) {
    let link = |link: Value| (link, Value::Null);
    let refused = |error: String| link(json!({ "reached": true, "refused": true, "error": error }));
    let credentials = match wire::Credentials::load(&config.config_server.state.join(enrol::CURRENT)) {
        Ok(credentials) => credentials,
        Err(error) => return refused(error.to_string()),
    };
    let began = Instant::now();
    let connecting = wire::connect_for(Purpose::Measure, process_server, Role::ProcessServer, &credentials);
    let connection = connecting.await;
    let reached = json!({ "reached": true, "ms": began.elapsed().as_secs_f64() * 1000.0 });
    let measured = match connection {
        Ok(connection) => wire::measure(connection).await,
        Err(error @ (WireError::Tls { .. } | WireError::Identity { .. })) => {
            return refused(error.to_string());
        }
        Err(error @ WireError::Handshake { source: HandshakeError::Declined(_), .. }) => {
            return (reached, json!({ "older": true, "error": error.to_string() }));
        }
        Err(error) => return link(json!({ "reached": false, "error": error.to_string() })),
    };
    let bandwidth = match measured {
        Ok(measured) => json!({
            "bytes": measured.bytes, "time_us": measured.time_us, "bytes_per_s": measured.bytes_per_s(),
        }),
        Err(error) => json!({ "error": error.to_string() }),
    };
    (reached, bandwidth)
}

/// The key is made once: a second one would make everything at the target unreadable.
fn seal_key(config: &FleetConfig, group: GroupId, targets: &[SealFor]) -> anyhow::Result<(String, Value)> {
    let path = config.key_file();
    if !RealStorage.exists(&path).with_context(|| format!("look for {}", path.display()))? {
        let text = format!("{}\n", *GroupKey::generate()?.to_hex());
        durable::replace(&RealStorage, &path, text.as_bytes())
            .with_context(|| format!("write the group's key {}", path.display()))?;
        tracing::info!(path = %path.display(), "made the group's key; keep a copy of it where you keep keys");
    }
    let key = GroupKey::load(&path)?.to_hex();
    let mut keys = serde_json::Map::new();
    for target in targets {
        keys.insert(target.target.to_string(), enrol::seal::seal_key(group, &key, &target.key)?.into());
    }
    Ok((format!("sealed for {} targets", targets.len()), json!({ "keys": keys })))
}

async fn point(
    post: &Post,
    consistency: &str,
    label: Option<String>,
    done: &TaskDone,
) -> anyhow::Result<(String, Value)> {
    let consistency: Consistency =
        serde_json::from_value(consistency.into()).context("read what is asked for")?;
    let label = label.map(|label| label.parse()).transpose().context("read the label")?;
    let request = AgentRequest::Point { consistency, label, wait: true };
    let mut taken = None;
    let mut answers = ask(&socket(post)?, &request).await?;
    while let Some(line) = answers.next_line().await.context("read the agent's answer")? {
        match serde_json::from_str(&line).context("read the agent's answer")? {
            AgentAnswer::Progress { doing } => done.running(doing).await,
            AgentAnswer::Point(point) => taken = Some(point),
            AgentAnswer::Applied { .. } => break,
            AgentAnswer::Refused { reason, .. } => bail!("{reason}"),
            _ => bail!("the agent answered what it was not asked"),
        }
    }
    let point = taken.context("the agent ended without an answer")?;
    let less = point.consistency < point.asked;
    let why = match (&point.note.reason, less) {
        (Some(reason), true) => format!("; not {}-consistent: {reason}", point.asked),
        _ => String::new(),
    };
    let message =
        format!("Epoch {} is a {}-consistent point at the target{why}.", point.epoch, point.consistency);
    Ok((message, json!({ "epoch": point.epoch.0, "consistency": point.consistency, "less": less })))
}

async fn resync(post: &Post, volume: Option<String>) -> anyhow::Result<(String, Value)> {
    let mut answers = ask(&socket(post)?, &AgentRequest::Resync { volume, when: ResyncWhen::Now }).await?;
    let line = answers.next_line().await.context("read the agent's answer")?;
    match serde_json::from_str(&line.context("the agent ended without an answer")?)? {
        AgentAnswer::Comparing { volumes, bytes, .. } => {
            Ok((format!("Comparing {} ({bytes}) with the replica.", volumes.join(", ")), Value::Null))
        }
        AgentAnswer::Refused { reason, .. } => bail!("{reason}"),
        _ => bail!("the agent answered what it was not asked"),
    }
}

async fn hand_over(post: &Post, done: &TaskDone) -> anyhow::Result<(String, Value)> {
    let mut answers = ask(&socket(post)?, &AgentRequest::HandOver).await?;
    while let Some(line) = answers.next_line().await.context("read the agent's answer")? {
        match serde_json::from_str(&line).context("read the agent's answer")? {
            AgentAnswer::Progress { doing } => done.running(doing).await,
            AgentAnswer::HandedOver { epoch, equal, different } => {
                let message = format!(
                    "Point {epoch} is what the disks are: {equal} compared with the target's and found the same."
                );
                return Ok((
                    message,
                    json!({ "epoch": epoch.0, "equal": equal.0, "different": different.0 }),
                ));
            }
            AgentAnswer::Refused { reason, .. } => bail!("{reason}"),
            _ => bail!("the agent answered what it was not asked"),
        }
    }
    bail!("the agent ended without an answer")
}

async fn release(post: &Post, devices: &[String]) -> anyhow::Result<(String, Value)> {
    let done = || Ok(("The disks can be written to again.".to_owned(), Value::Null));
    if post.running.lock().protection.is_none() {
        // Handed over, failed over for good: nobody else knows of them any more.
        let devices = devices.to_vec();
        let released = tokio::task::spawn_blocking(move || crate::hand_over::let_write_all(&devices)).await?;
        return released.and_then(|()| done());
    }
    let mut answers = ask(&socket(post)?, &AgentRequest::Release).await?;
    let line = answers.next_line().await.context("read the agent's answer")?;
    match serde_json::from_str(&line.context("the agent ended without an answer")?)? {
        AgentAnswer::Released => done(),
        AgentAnswer::Refused { reason, .. } => bail!("{reason}"),
        _ => bail!("the agent answered what it was not asked"),
    }
}

/// The agent is asked as root of this machine asks it, so that there is one way.
fn socket(post: &Post) -> anyhow::Result<std::path::PathBuf> {
    let protection = post.running.lock().protection.clone();
    let protection = protection.context("nothing is protected on this machine")?;
    Ok(post.config.with(&protection)?.control_socket())
}

async fn ask(
    socket: &Path,
    request: &AgentRequest,
) -> anyhow::Result<tokio::io::Lines<BufReader<UnixStream>>> {
    let mut stream = UnixStream::connect(socket)
        .await
        .with_context(|| format!("ask the agent at {}", socket.display()))?;
    let mut line = serde_json::to_string(request)?;
    line.push('\n');
    stream.write_all(line.as_bytes()).await.context("ask the agent")?;
    Ok(BufReader::new(stream).lines())
}
