//! Restoring to qcow2: QEMU's own tool reads an export, which is private to this command, and writes the file.

use std::process::Stdio;

use anyhow::{Context, bail, ensure};
use block::ByteCount;
use control::{ExportPlace, ExportRequest, ViewHead};
use tokio::io::AsyncReadExt;
use tokio::process::Command;

use super::{Done, bar};
use crate::ask::Servers;
use crate::export::{find, uri};
use crate::restore::RestoreOptions;
use crate::restore::target::Naming;

const TOOL: &str = "qemu-img";

pub(super) async fn restore(options: &RestoreOptions) -> anyhow::Result<Done> {
    ensure!(!options.delta, "restore to qcow2: --delta goes with raw files and devices only");
    // What an interrupted one left cannot be gone on with.
    let naming = Naming::check(&options.out, options.force, true)?;
    let servers = Servers::load(&options.place)?;
    let (group, volume) = find(&servers.points(options.group).await?, &options.volume)?;
    let request = ExportRequest::new(group, vec![volume], options.point, ExportPlace::Beside);
    let mut held = servers.export(request).await?;
    let bridge = servers.bridge(&held.info, None)?;
    let summary = held.info.volumes.first().context("the target server exported nothing")?.clone();
    let source = uri(&held.info, Some(bridge.socket()), &summary.name);
    let partial = naming.lock_new()?;
    let path = partial.path().as_os_str().to_owned();
    let bar = bar(summary.size, options.json);
    let work = async {
        let mut convert = Command::new(TOOL);
        // Eight requests at once, as they complete: the file is sparse anyway.
        convert.args(["convert", "-p", "-n", "-W", "-m", "8", "-f", "raw", "-O", "qcow2"]);
        let mut create = Command::new(TOOL);
        create.args(["create", "-q", "-f", "qcow2"]).arg(&path).arg(summary.size.0.to_string());
        run(create, |_| {}).await?;
        convert.arg(&source).arg(&path);
        let size = summary.size.0 as f64;
        run(convert, |percent| bar.set_position((size * percent / 100.0) as u64)).await?;
        bar.set_message("verifying");
        bar.set_position(0);
        let mut compare = Command::new(TOOL);
        compare.args(["compare", "-p", "-f", "raw", "-F", "qcow2"]).arg(&source).arg(&path);
        run(compare, |percent| bar.set_position((size * percent / 100.0) as u64)).await
    };
    tokio::select! {
        outcome = work => outcome?,
        error = held.ended() => return Err(error),
    }
    let written = std::fs::metadata(&path).context("look at what was written")?.len();
    bar.set_message("making it durable");
    tokio::task::block_in_place(|| partial.name())?;
    bar.finish_and_clear();
    let head = ViewHead { group, volume: summary, point: held.info.point.clone() };
    Ok(Done { head, written: ByteCount(written), kept: ByteCount::ZERO })
}

/// Runs the tool, which writes its progress as `(12.34/100%)`.
async fn run(mut command: Command, progress: impl Fn(f64)) -> anyhow::Result<()> {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    let mut child = command.spawn().with_context(|| {
        format!("run {TOOL}: is it installed? On Debian it is in qemu-utils; or restore to raw, which needs nothing")
    })?;
    let mut out = child.stdout.take().context("read the tool's output")?;
    let mut errors = child.stderr.take().context("read the tool's errors")?;
    let read_errors = async {
        let mut text = String::new();
        // What cannot be read is not told.
        let _ = errors.read_to_string(&mut text).await;
        text
    };
    let read_progress = async {
        let mut bytes = [0; 4096];
        while let Ok(count @ 1..) = out.read(&mut bytes).await {
            let text = String::from_utf8_lossy(&bytes[..count]);
            let last = text.rsplit('(').find_map(|part| part.split_once('/')?.0.trim().parse().ok());
            if let Some(percent) = last {
                progress(percent);
            }
        }
    };
    let (errors, ()) = tokio::join!(read_errors, read_progress);
    let status = child.wait().await.with_context(|| format!("wait for {TOOL}"))?;
    if !status.success() {
        bail!("{TOOL}: {status}: {}", errors.trim());
    }
    Ok(())
}
