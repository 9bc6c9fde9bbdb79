//! The local socket by which root of this machine commands the agent. The conversation is in `control::agent`.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use block::Consistency;
use control::{AGENT_REQUEST_BYTES_MAX, AgentAnswer, AgentRefusal, AgentRequest};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, mpsc};

use crate::hand_over::{self, HandedOver, Means};
use crate::order::Comparing;
use crate::outbox::Outbox;
use crate::point::{Event, Points, Wish};

/// Conversations at the same time. A further one waits.
pub const CONVERSATIONS_MAX: usize = 8;
/// A request must have come after so long.
const REQUEST_MAX: Duration = Duration::from_secs(10);
/// How often it is looked whether a point is applied.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// Removes the socket's file when dropped.
#[derive(Debug)]
pub(crate) struct Socket {
    path: PathBuf,
    task: tokio::task::JoinHandle<()>,
}

impl Socket {
    /// Listens at `path`. Must be called on a tokio runtime.
    ///
    /// # Errors
    /// When the directory cannot be made or another agent listens there.
    pub(crate) fn listen(path: PathBuf, means: Means) -> anyhow::Result<Socket> {
        let listener = bind(&path).with_context(|| format!("listen for commands at {}", path.display()))?;
        let task = tokio::spawn(async move {
            let conversations = Arc::new(Semaphore::new(CONVERSATIONS_MAX));
            loop {
                let Ok(permit) = conversations.clone().acquire_owned().await else { return };
                let stream = match listener.accept().await {
                    Ok((stream, _)) => stream,
                    Err(error) => {
                        tracing::warn!(%error, "accept a command");
                        tokio::time::sleep(LOOK_EVERY).await;
                        continue;
                    }
                };
                let means = means.clone();
                tokio::spawn(async move {
                    if let Err(error) = converse(stream, &means).await {
                        tracing::debug!(error = format!("{error:#}"), "a command's conversation ended early");
                    }
                    drop(permit);
                });
            }
        });
        Ok(Socket { path, task })
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        self.task.abort();
        // Somebody may have removed it before us.
        let _ = fs::remove_file(&self.path);
    }
}

fn bind(path: &Path) -> anyhow::Result<UnixListener> {
    let dir = path.parent().context("name a file in a directory")?;
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create(dir)
        .with_context(|| format!("make directory {}", dir.display()))?;
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        Err(error) => return Err(error).context("look at it"),
        Ok(metadata) if !metadata.file_type().is_socket() => bail!("there is something else at its place"),
        Ok(_) => match std::os::unix::net::UnixStream::connect(path) {
            Ok(_) => bail!("another agent listens there; give each its own control_socket"),
            // Of an agent that was killed.
            Err(_) => fs::remove_file(path).context("remove what an agent before has left")?,
        },
    }
    let listener = UnixListener::bind(path)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).context("keep others out")?;
    Ok(listener)
}

async fn converse(stream: UnixStream, means: &Means) -> anyhow::Result<()> {
    // The file's mode keeps others out; this holds even where somebody has changed it.
    let uid = stream.peer_cred().context("ask who speaks")?.uid();
    let ours = rustix::process::geteuid().as_raw();
    let (reader, mut writer) = stream.into_split();
    let mut line = Vec::new();
    let mut reader = BufReader::new(reader.take(AGENT_REQUEST_BYTES_MAX as u64 + 1));
    tokio::time::timeout(REQUEST_MAX, reader.read_until(b'\n', &mut line))
        .await
        .context("wait for a request")?
        .context("read a request")?;
    if uid != 0 && uid != ours {
        let reason = format!("command the agent: user {uid} is not root");
        return refuse(&mut writer, AgentRefusal::NotAllowed, reason).await;
    }
    if line.len() > AGENT_REQUEST_BYTES_MAX {
        let reason = format!("read request: longer than {AGENT_REQUEST_BYTES_MAX} bytes");
        return refuse(&mut writer, AgentRefusal::BadRequest, reason).await;
    }
    match serde_json::from_slice(&line) {
        Ok(AgentRequest::Point { consistency: Consistency::None, .. }) => {
            let reason = "take a point: it cannot have no consistency at all".into();
            refuse(&mut writer, AgentRefusal::BadRequest, reason).await
        }
        Ok(AgentRequest::Point { consistency, label, wait }) => {
            tracing::info!(%consistency, label = label.as_ref().map(|label| label.as_str()), uid, "point asked for");
            take_point(Wish { consistency, label }, wait, &mut writer, &means.points, &means.outbox).await
        }
        Ok(AgentRequest::Resync { volume, when }) => {
            let orders = means.orders.clone();
            match tokio::task::spawn_blocking(move || orders.resync(volume, when)).await? {
                Ok(Comparing { volumes, bytes, begins }) => {
                    say(&mut writer, &AgentAnswer::Comparing { volumes, bytes, begins }).await
                }
                Err((code, reason)) => refuse(&mut writer, code, reason).await,
            }
        }
        Ok(AgentRequest::HandOver) => {
            tracing::warn!(uid, "handing over: the disks are kept from everybody");
            hand_over(means, reader.into_inner().into_inner(), &mut writer).await
        }
        Ok(AgentRequest::Release) => {
            tracing::warn!(uid, "disks released");
            let disks = means.disks.clone();
            match tokio::task::spawn_blocking(move || disks.release()).await? {
                Ok(()) => say(&mut writer, &AgentAnswer::Released).await,
                Err(error) => refuse(&mut writer, AgentRefusal::InUse, format!("release: {error:#}")).await,
            }
        }
        Err(error) => refuse(&mut writer, AgentRefusal::BadRequest, format!("read request: {error}")).await,
    }
}

/// Goes on only as long as whoever asked is there: else disks would stay shut that nobody knows of.
async fn hand_over<R: AsyncReadExt + Unpin, W: AsyncWriteExt + Unpin>(
    means: &Means,
    mut reader: R,
    writer: &mut W,
) -> anyhow::Result<()> {
    let (sender, mut doing) = mpsc::unbounded_channel();
    let mut handing = std::pin::pin!(hand_over::run(means, &sender));
    let mut more = [0; 16];
    loop {
        tokio::select! {
            Some(doing) = doing.recv() => say(writer, &AgentAnswer::Progress { doing }).await?,
            read = reader.read(&mut more) => if read.context("hear whoever asked")? == 0 {
                bail!("whoever asked to hand over has gone");
            },
            done = &mut handing => return match done {
                Ok(HandedOver { epoch, equal, different }) => {
                    tracing::warn!(%epoch, %equal, "handed over");
                    say(writer, &AgentAnswer::HandedOver { epoch, equal, different }).await
                }
                Err((code, reason)) => refuse(writer, code, reason).await,
            },
        }
    }
}

async fn take_point<W: AsyncWriteExt + Unpin>(
    wish: Wish,
    wait: bool,
    writer: &mut W,
    points: &Points,
    outbox: &Outbox,
) -> anyhow::Result<()> {
    let (sender, mut events) = mpsc::unbounded_channel();
    if let Err((code, reason)) = points.begin(wish, sender) {
        return refuse(writer, code, reason).await;
    }
    let point = loop {
        match events.recv().await {
            Some(Event::Doing(doing)) => say(writer, &AgentAnswer::Progress { doing }).await?,
            Some(Event::Taken(point)) => break point,
            Some(Event::Refused(code, reason)) => return refuse(writer, code, reason).await,
            None => {
                let reason = "take a point: the agent is stopping".into();
                return refuse(writer, AgentRefusal::Stopping, reason).await;
            }
        }
    };
    let epoch = point.epoch;
    say(writer, &AgentAnswer::Point(point)).await?;
    if !wait {
        return Ok(());
    }
    let mut cached = false;
    loop {
        let held = outbox.progress().held;
        if held.applied >= epoch {
            return say(writer, &AgentAnswer::Applied { epoch }).await;
        }
        if held.held >= epoch && !cached {
            cached = true;
            let doing = "the process server holds it; waiting for the target".into();
            say(writer, &AgentAnswer::Progress { doing }).await?;
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

async fn refuse<W: AsyncWriteExt + Unpin>(
    writer: &mut W,
    code: AgentRefusal,
    reason: String,
) -> anyhow::Result<()> {
    say(writer, &AgentAnswer::Refused { code, reason }).await
}

async fn say<W: AsyncWriteExt + Unpin>(writer: &mut W, answer: &AgentAnswer) -> anyhow::Result<()> {
    let mut line = serde_json::to_vec(answer).context("write an answer")?;
    line.push(b'\n');
    writer.write_all(&line).await.context("write an answer")
}
