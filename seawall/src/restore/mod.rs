//! `seawall restore`: a volume as it was at a point, as a raw or qcow2 file, or on a block device.
//!
//! Crash order of files, and what breaks if it is reversed:
//! 1. every byte is in FILE.partial, and what arrived has the length and the hash that the server reckoned while sending;
//!    else a short or misplaced one could pass for a restored disk;
//! 2. FILE.partial is durable; else the name could survive a crash that the bytes do not;
//! 3. it gets its name, and the directory is made durable.
//!
//! Going on after an interruption needs no note of what was done, which a crash could make a lie: what is there is compared,
//! unit by unit, with the hashes of the very point that is being restored, and only what differs is fetched. `--delta` is
//! the same on something that is there already.

mod compare;
mod qcow2;
mod target;

use crate::config::Place;
use clap::{Args, ValueEnum};
use std::io::IsTerminal;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, bail, ensure};
use block::{Bitmap, ByteCount, GroupId, VolumeId};
use control::{OperatorRequest, PointSelector, ViewHead, ViewRange};
use indicatif::{ProgressBar, ProgressStyle};
use seawall_target_server::{ViewEnd, ViewHash};
use tokio::signal::unix::{SignalKind, signal};
use wire::ViewReader;

use crate::ask::Servers;
use crate::export::find;
use crate::text;
use compare::Comparison;
use target::Target;

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  The newest state, as a raw image that any tool can boot or mount:
    seawall restore --volume vdb --point latest --out vdb.img
  An older one (`seawall points` lists them):
    seawall restore --volume vdb --point 1207 --out vdb-1207.img

  As qcow2, through qemu-img:
    seawall restore --volume vdb --point latest --out vdb.qcow2 --format qcow2
  Onto a disk that holds much of it already; only what differs is fetched and written:
    seawall restore --volume vdb --point latest --out /dev/vdc --delta --verify

A file appears under its name only when it is whole and durable; until then it is FILE.partial. Interrupted, the same command
goes on: what is there is compared with the point, piece by piece (a device: add --delta). What arrives is compared with the
hash that the server made while sending; --verify reads what was written once more.
A device that is mounted or in use, or not empty, is refused without --force or --delta; one that is too small always.")]
pub(crate) struct RestoreOptions {
    #[command(flatten)]
    pub(crate) place: Place,
    /// Volume, by name or identity
    #[arg(long, value_name = "NAME|ID")]
    pub(crate) volume: String,
    /// Group, where several have such a volume
    #[arg(long, value_name = "ID")]
    pub(crate) group: Option<GroupId>,
    /// Recovery point: `latest`, `application` (the newest application-consistent one), or the number of an epoch
    #[arg(long, value_name = "POINT")]
    pub(crate) point: PointSelector,
    /// File or block device to write
    #[arg(long, value_name = "FILE|DEVICE")]
    pub(crate) out: PathBuf,
    /// What to write
    #[arg(long, value_enum, default_value_t)]
    pub(crate) format: RestoreFormat,
    /// Change what is there, in place, where it differs from the point
    #[arg(long, conflicts_with = "force")]
    pub(crate) delta: bool,
    /// Replace FILE; overwrite DEVICE also when it is in use or not empty
    #[arg(long)]
    pub(crate) force: bool,
    /// Read everything once more at the end, and compare it with the point
    #[arg(long)]
    pub(crate) verify: bool,
    /// One JSON object at the end, and no progress
    #[arg(long)]
    pub(crate) json: bool,
}

/// What a restore writes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum RestoreFormat {
    /// The disk's bytes as they are, sparse
    #[default]
    Raw,
    /// QEMU's format; always compared with the point at the end
    Qcow2,
}

/// What a restore did.
struct Done {
    head: ViewHead,
    /// Written, without zeroes.
    written: ByteCount,
    /// What was there already.
    kept: ByteCount,
}

pub(crate) async fn run(options: &RestoreOptions) -> anyhow::Result<()> {
    let started = Instant::now();
    // Before anything is begun, so that no signal is lost.
    let mut terminate = signal(SignalKind::terminate()).context("wait for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("wait for SIGINT")?;
    let restore = async {
        match options.format {
            RestoreFormat::Raw => raw(options).await,
            RestoreFormat::Qcow2 => qcow2::restore(options).await,
        }
    };
    let done = tokio::select! {
        done = restore => done?,
        _ = terminate.recv() => bail!(interrupted(options)),
        _ = interrupt.recv() => bail!(interrupted(options)),
    };
    Ok(text::say(&report(options, &done, started))?)
}

fn interrupted(options: &RestoreOptions) -> String {
    format!("restore {}: interrupted; {}", options.out.display(), advice(options))
}

/// How to go on after a failure.
fn advice(options: &RestoreOptions) -> String {
    let out = options.out.display();
    match options.format {
        RestoreFormat::Qcow2 => "nothing is left; start again".to_owned(),
        RestoreFormat::Raw if options.delta => {
            format!("{out} is now part one, part the other; the same command goes on")
        }
        RestoreFormat::Raw if target::is_device(&options.out) => {
            format!("{out} is not whole; the same command with --delta goes on")
        }
        RestoreFormat::Raw => {
            format!("the same command goes on with {out}.partial, which may also be removed")
        }
    }
}

async fn raw(options: &RestoreOptions) -> anyhow::Result<Done> {
    // Everything that can be wrong here is found before the server is asked.
    let target = Target::check(options)?;
    let servers = Servers::load(&options.place)?;
    let (group, volume) = find(&servers.points(options.group).await?, &options.volume)?;
    let source = Source { servers: &servers, group, volume };
    let continued = target.continues();
    let mut done = match continued {
        true => delta(options, &source, target).await,
        false => whole(options, &source, target).await,
    }
    .with_context(|| advice(options))?;
    if continued {
        done.kept = ByteCount(done.kept.0.min(done.head.volume.size.0));
    }
    Ok(done)
}

/// Where the bytes come from.
struct Source<'a> {
    servers: &'a Servers,
    group: GroupId,
    volume: VolumeId,
}

impl Source<'_> {
    async fn read(
        &self,
        point: PointSelector,
        ranges: Vec<ViewRange>,
    ) -> anyhow::Result<(ViewHead, ViewReader)> {
        let (group, volume) = (self.group, self.volume);
        self.ask(&OperatorRequest::ReadView { group, volume, point, ranges }).await
    }

    async fn hashes(&self, point: PointSelector) -> anyhow::Result<(ViewHead, ViewReader)> {
        let (group, volume) = (self.group, self.volume);
        self.ask(&OperatorRequest::HashView { group, volume, point }).await
    }

    async fn ask(&self, request: &OperatorRequest) -> anyhow::Result<(ViewHead, ViewReader)> {
        let view = self.servers.view(request).await?;
        let head: ViewHead = serde_json::from_str(view.head()).context("read what the view is")?;
        ensure!(
            head.group == self.group && head.volume.id == self.volume,
            "read volume {} of group {}: the server sent volume {} of group {}",
            self.volume,
            self.group,
            head.volume.id,
            head.group
        );
        Ok((head, view))
    }
}

/// Takes what a server sends, and checks at the end that it is what it meant to send.
struct Receiver {
    view: ViewReader,
    hash: ViewHash,
    received: u64,
}

impl Receiver {
    fn new(view: ViewReader) -> Receiver {
        Receiver { view, hash: ViewHash::new(), received: 0 }
    }

    async fn next(&mut self) -> anyhow::Result<Option<(u64, bytes::Bytes)>> {
        if let Some((offset, bytes)) = self.view.next().await.context("read the view")? {
            self.hash.update(offset, &bytes);
            self.received += bytes.len() as u64;
            return Ok(Some((offset.0, bytes)));
        }
        let end: ViewEnd =
            serde_json::from_str(self.view.tail().unwrap_or_default()).context("read the end of the view")?;
        check_end(self.received, std::mem::take(&mut self.hash), &end)?;
        Ok(None)
    }
}

fn check_end(received: u64, hash: ViewHash, end: &ViewEnd) -> anyhow::Result<()> {
    ensure!(
        received == end.tail.sent_bytes.get(),
        "verify the view: {received} bytes arrived, the server sent {}; try again",
        end.tail.sent_bytes.get()
    );
    let hash = hash.finish();
    ensure!(
        hash == end.blake3,
        "verify the view: its data has the hash {hash}, the server sent {}; try again",
        end.blake3
    );
    Ok(())
}

/// Everything, onto something that is empty or is to be overwritten.
async fn whole(options: &RestoreOptions, source: &Source<'_>, target: Target) -> anyhow::Result<Done> {
    let (head, view) = source.read(options.point, Vec::new()).await?;
    let size = head.volume.size;
    let output = tokio::task::block_in_place(|| target.open(size))?;
    let bar = bar(size, options.json);
    let mut view = Receiver::new(view);
    let (mut at, mut written) = (0, 0);
    while let Some((offset, bytes)) = view.next().await? {
        let end = offset.saturating_add(bytes.len() as u64);
        ensure!(
            offset >= at && end <= size.0,
            "write {} bytes at {offset}: the server sent them out of place (at {at} of {})",
            bytes.len(),
            size.0
        );
        tokio::task::block_in_place(|| {
            output.zero(at, offset)?;
            output.write(offset, &bytes)
        })?;
        written += bytes.len() as u64;
        at = end;
        bar.set_position(at);
    }
    tokio::task::block_in_place(|| output.zero(at, size.0))?;
    bar.set_message("making it durable");
    let mut done = Done { head, written: ByteCount(written), kept: ByteCount::ZERO };
    finish(options, source, output, &mut done).await?;
    bar.finish_and_clear();
    Ok(done)
}

/// What differs, onto something that holds much of it.
async fn delta(options: &RestoreOptions, source: &Source<'_>, target: Target) -> anyhow::Result<Done> {
    let (head, hashes) = source.hashes(options.point).await?;
    let size = head.volume.size;
    let output = tokio::task::block_in_place(|| target.open(size))?;
    let bar = bar(size, options.json);
    bar.set_message("comparing");
    let differing = compare(&output, size, hashes, &bar).await?;
    // From here on the very point that was compared, also when a newer one has come.
    let point = PointSelector::Epoch(head.point.epoch);
    bar.set_message("fetching what differs");
    bar.set_length(differing.count() * control::VIEW_HASH_UNIT.0);
    bar.set_position(0);
    let mut written = 0;
    for ranges in compare::batches(&differing, size) {
        let (again, view) = source.read(point, ranges.clone()).await?;
        ensure!(again.point == head.point, "read point {point}: the server means another one by it now");
        let mut view = Receiver::new(view);
        // What is not sent of the ranges is zeroes.
        let mut gaps = compare::Gaps::new(&ranges);
        while let Some((offset, bytes)) = view.next().await? {
            let zeroes = gaps.before(offset, bytes.len() as u64)?;
            tokio::task::block_in_place(|| {
                zeroes.into_iter().try_for_each(|gap| output.zero(gap.start, gap.end))?;
                output.write(offset, &bytes)
            })?;
            written += bytes.len() as u64;
            bar.inc(bytes.len() as u64);
        }
        tokio::task::block_in_place(|| {
            gaps.rest().into_iter().try_for_each(|gap| output.zero(gap.start, gap.end))
        })?;
    }
    let different = (differing.count() * control::VIEW_HASH_UNIT.0).min(size.0);
    let mut done = Done { head, written: ByteCount(written), kept: ByteCount(size.0 - different) };
    bar.set_message("making it durable");
    finish(options, source, output, &mut done).await?;
    bar.finish_and_clear();
    Ok(done)
}

/// Makes it durable, looks at it once more when asked to, and gives it its name.
async fn finish(
    options: &RestoreOptions,
    source: &Source<'_>,
    mut output: target::Output,
    done: &mut Done,
) -> anyhow::Result<()> {
    tokio::task::block_in_place(|| output.make_durable())?;
    if options.verify {
        let bar = bar(done.head.volume.size, options.json);
        bar.set_message("verifying");
        let (_, hashes) = source.hashes(PointSelector::Epoch(done.head.point.epoch)).await?;
        let differing = compare(&output, done.head.volume.size, hashes, &bar).await?;
        bar.finish_and_clear();
        ensure!(
            differing.is_empty(),
            "verify {}: {} of its units differ from point {} after they were written; look at the medium",
            options.out.display(),
            differing.count(),
            done.head.point.epoch
        );
    }
    tokio::task::block_in_place(|| output.name())
}

/// The units of what is there that differ from the view.
async fn compare(
    output: &target::Output,
    size: ByteCount,
    hashes: ViewReader,
    bar: &ProgressBar,
) -> anyhow::Result<Bitmap> {
    let mut comparison = Comparison::new(output, size);
    let mut hashes = Receiver::new(hashes);
    while let Some((offset, bytes)) = hashes.next().await? {
        let at = tokio::task::block_in_place(|| comparison.take(offset, &bytes))?;
        bar.set_position(at);
    }
    tokio::task::block_in_place(|| comparison.finish())
}

fn report(options: &RestoreOptions, done: &Done, started: Instant) -> String {
    let seconds = started.elapsed().as_secs_f64();
    let Done { head, written, kept } = done;
    if options.json {
        let done = serde_json::json!({
            "group": head.group,
            "volume": head.volume,
            "point": head.point,
            "out": options.out,
            "data_bytes": written,
            "kept_bytes": kept,
            "seconds": seconds,
        });
        return format!("{done}\n");
    }
    let (local, _) = text::instant(head.point.cut_time);
    let kept = match kept.0 {
        0 => String::new(),
        _ => format!(", {kept} was there already"),
    };
    format!(
        "Restored {} as of point {} ({local}, {}-consistent) to {}: {}, of which {written} data written{kept}, at {}.\n",
        head.volume.name,
        head.point.epoch,
        head.point.consistency,
        options.out.display(),
        head.volume.size,
        text::rate(written.get() as f64 / seconds.max(0.001)),
    )
}

/// Progress goes by the place reached on the volume: what is zero is not sent.
fn bar(size: ByteCount, json: bool) -> ProgressBar {
    if json || !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style = "{bar:40} {bytes} of {total_bytes}, {bytes_per_sec}, {eta} left {msg}";
    let style = ProgressStyle::with_template(style).unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(size.get()).with_style(style)
}

#[cfg(test)]
mod tests {
    use block::ByteOffset;
    use control::ViewTail;

    use super::*;

    #[test]
    fn a_short_or_changed_view_is_found() {
        let hash = |bytes: &[u8]| {
            let mut hash = ViewHash::new();
            hash.update(ByteOffset(4096), bytes);
            hash
        };
        let end = ViewEnd { tail: ViewTail { sent_bytes: ByteCount(3) }, blake3: hash(b"abc").finish() };
        check_end(3, hash(b"abc"), &end).unwrap();
        let error = check_end(2, hash(b"ab"), &end).unwrap_err();
        assert!(error.to_string().contains("2 bytes arrived, the server sent 3"), "{error}");
        let error = check_end(3, hash(b"abd"), &end).unwrap_err();
        assert!(error.to_string().contains("has the hash"), "{error}");
    }
}
