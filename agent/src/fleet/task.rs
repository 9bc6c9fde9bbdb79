//! What the config server asks for once.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use block::{Consistency, GroupId};
use capture::check::Places;
use changeset::GroupKey;
use control::fleet::{ProtectedVolume, Protection, SealFor, TaskKind};
use control::{AgentAnswer, AgentRequest, ResyncWhen};
use durable::{RealStorage, Storage};
use enrol::TaskDone;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::timeout;

use super::{FleetConfig, Post};
use crate::check;

/// How long a connection to the process server may take.
const CONNECT_TIME_MAX: Duration = Duration::from_secs(10);

pub(super) async fn perform(post: &Post, kind: TaskKind, done: TaskDone) {
    let result = match kind {
        TaskKind::CheckDisks { devices, process_server } => {
            check_disks(&post.config, devices, &process_server).await
        }
        TaskKind::SealKey { group, targets } => seal_key(&post.config, group, &targets),
        TaskKind::Point { consistency, label } => point(post, &consistency, label, &done).await,
        TaskKind::Resync { volume } => resync(post, volume).await,
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
    config: &FleetConfig,
    devices: Vec<String>,
    process_server: &str,
) -> anyhow::Result<(String, Value)> {
    let volumes = devices.iter().enumerate();
    let volumes =
        volumes.map(|(place, device)| ProtectedVolume { name: format!("{place}"), device: device.clone() });
    // As they would be opened, with what the file says of the source.
    let config = config.with(&Protection { volumes: volumes.collect(), ..config.example() })?;
    let report = tokio::task::spawn_blocking(move || check(&Places::default(), Some(&config), &[])).await?;
    let report = serde_json::to_value(&report).context("write what was found")?;
    let disks: Vec<Value> = report["devices"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|disk| {
            json!({
                "device": disk["device"], "bytes": disk["size"], "mode": disk["mode"], "why": disk["why"],
                "advice": disk["advice"],
            })
        })
        .collect();
    let began = Instant::now();
    let link = match timeout(CONNECT_TIME_MAX, TcpStream::connect(process_server)).await {
        Ok(Ok(_)) => json!({ "reached": true, "ms": began.elapsed().as_secs_f64() * 1000.0 }),
        Ok(Err(error)) => {
            json!({ "reached": false, "error": format!("connect to {process_server}: {error}") })
        }
        Err(_) => json!({ "reached": false, "error": format!("connect to {process_server}: no answer") }),
    };
    Ok(("looked".into(), json!({ "disks": disks, "link": link, "facts": report["facts"] })))
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
