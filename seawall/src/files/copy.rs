//! A file or directory, out of a point.

use std::fs::{File, OpenOptions};
use std::io::{IsTerminal, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use block::ByteCount;
use indicatif::{ProgressBar, ProgressStyle};

use super::list::{path_of, resolve};
use crate::text;

/// Read at once. Zeroes of this length become holes.
const PIECE_BYTES: usize = 256 * 1024;

pub(super) fn get(root: &Path, path: &Path, out: &Path, json: bool) -> anyhow::Result<()> {
    let started = Instant::now();
    let open = resolve(root, path)?;
    let source = path_of(&open);
    let metadata = std::fs::metadata(&source).with_context(|| format!("get {}", path.display()))?;
    let hidden = json || !std::io::stderr().is_terminal();
    let bytes = if metadata.is_dir() {
        ensure!(out.as_os_str() != "-", "get {}: it is a directory; name one with --out", path.display());
        directory(&source, out, hidden)?
    } else {
        ensure!(metadata.is_file(), "get {}: it is neither a file nor a directory", path.display());
        file(&source, &metadata, out, hidden).with_context(|| format!("get {}", path.display()))?
    };
    if out.as_os_str() == "-" {
        return Ok(());
    }
    let seconds = started.elapsed().as_secs_f64();
    let shown = match json {
        true => {
            let done = serde_json::json!({ "path": path, "out": out, "bytes": bytes, "seconds": seconds });
            format!("{done}\n")
        }
        false => format!(
            "Got {} to {}: {bytes} at {}.\n",
            path.display(),
            out.display(),
            text::rate(bytes.get() as f64 / seconds.max(0.001))
        ),
    };
    Ok(text::say(&shown)?)
}

fn file(source: &Path, metadata: &std::fs::Metadata, out: &Path, hidden: bool) -> anyhow::Result<ByteCount> {
    let mut input = File::open(source).context("open it")?;
    let bar = match hidden {
        true => ProgressBar::hidden(),
        false => ProgressBar::new(metadata.len())
            .with_style(style("{bar:40} {bytes} of {total_bytes}, {bytes_per_sec}, {eta} left")),
    };
    let mut piece = vec![0; PIECE_BYTES];
    let mut total = 0;
    if out.as_os_str() == "-" {
        let mut output = std::io::stdout().lock();
        loop {
            let count = input.read(&mut piece).context("read it")?;
            if count == 0 {
                break;
            }
            output.write_all(&piece[..count])?;
            total += count as u64;
            bar.set_position(total);
        }
        output.flush()?;
        return Ok(ByteCount(total));
    }
    // It gets its name when it is whole.
    let mut partial = out.file_name().context("name a file with --out")?.to_owned();
    partial.push(".partial");
    let partial = out.with_file_name(partial);
    let copied = (|| {
        let mut output = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(metadata.mode() & 0o777)
            .open(&partial)
            .with_context(|| format!("create {}", partial.display()))?;
        loop {
            let count = input.read(&mut piece).context("read it")?;
            if count == 0 {
                break;
            }
            if piece[..count].iter().all(|byte| *byte == 0) {
                output.seek(SeekFrom::Current(count as i64))?;
            } else {
                output.write_all(&piece[..count]).with_context(|| format!("write {}", partial.display()))?;
            }
            total += count as u64;
            bar.set_position(total);
        }
        output.set_len(total)?;
        output.set_modified(metadata.modified()?)?;
        output.sync_all().with_context(|| format!("make {} durable", partial.display()))?;
        std::fs::hard_link(&partial, out).with_context(|| format!("name {}", out.display()))
    })();
    let removed = std::fs::remove_file(&partial);
    copied?;
    removed.with_context(|| format!("remove {}", partial.display()))?;
    bar.finish_and_clear();
    Ok(ByteCount(total))
}

/// Everything below, with owners, links and attributes, by the system's own tool.
fn directory(source: &Path, out: &Path, hidden: bool) -> anyhow::Result<ByteCount> {
    let bar = if hidden { ProgressBar::hidden() } else { ProgressBar::new_spinner() };
    bar.set_style(style("{spinner} copying, {elapsed}"));
    bar.enable_steady_tick(Duration::from_millis(200));
    let mut command = Command::new("cp");
    command.args(["-a", "--sparse=always", "--one-file-system", "--"]).arg(source.join(".")).arg(out);
    let output = command.output().context("run cp")?;
    ensure!(
        output.status.success(),
        "copy to {}: {}",
        out.display(),
        String::from_utf8_lossy(&output.stderr).trim()
    );
    bar.finish_and_clear();
    let mut total = 0;
    let mut left = vec![out.to_owned()];
    while let Some(dir) = left.pop() {
        for entry in std::fs::read_dir(&dir).with_context(|| format!("look at {}", dir.display()))? {
            let entry = entry?;
            let metadata = entry.metadata()?;
            if metadata.is_dir() {
                left.push(entry.path());
            } else if metadata.is_file() {
                total += metadata.len();
            }
        }
    }
    Ok(ByteCount(total))
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}
