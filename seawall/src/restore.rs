//! `seawall restore`: a volume as it was at a point, as a sparse raw file.
//!
//! Crash order, and what breaks if it is reversed:
//! 1. every byte is in FILE.partial, and its length and hash are those that the server reckoned while sending; else a
//!    short or misplaced one could pass for a restored disk;
//! 2. FILE.partial is durable; else the name could survive a crash that the bytes do not;
//! 3. it gets its name, and the directory is made durable.

use std::fs::{File, OpenOptions};
use std::io::{IsTerminal, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, bail, ensure};
use block::{ByteCount, ByteOffset, GroupId, VolumeId};
use control::{OperatorRequest, PointsReply, ViewHead};
use indicatif::{ProgressBar, ProgressStyle};
use rustix::fs::{CWD, RenameFlags, renameat_with};
use seawall_target_server::{ViewEnd, ViewHash};

use crate::ask::Servers;
use crate::cli::RestoreOptions;
use crate::text;

pub(crate) async fn run(options: &RestoreOptions) -> anyhow::Result<()> {
    // Everything that can be wrong here is found before the server is asked.
    let target = Target::check(&options.out, options.force)?;
    let servers = Servers::load(&options.place)?;
    let (group, volume) = find(&servers.points(options.group).await?, &options.volume)?;
    let request = OperatorRequest::ReadView { group, volume, point: options.point };
    let started = Instant::now();
    let mut view = servers.view(&request).await?;
    let head: ViewHead = serde_json::from_str(view.head()).context("read what the view is")?;
    ensure!(
        head.group == group && head.volume.id == volume,
        "read volume {volume} of group {group}: the server sent volume {} of group {}",
        head.volume.id,
        head.group
    );

    let mut partial = target.create(head.volume.size)?;
    let bar = bar(head.volume.size, options.json);
    let mut interrupt = std::pin::pin!(tokio::signal::ctrl_c());
    loop {
        let next = tokio::select! {
            next = view.next() => next,
            _ = &mut interrupt => bail!("restore {}: interrupted; nothing is left", options.out.display()),
        };
        let Some((offset, bytes)) = next.context("read the view; nothing is left, try again")? else { break };
        tokio::task::block_in_place(|| partial.write(offset, &bytes))?;
        bar.set_position(partial.end);
    }
    let end: ViewEnd =
        serde_json::from_str(view.tail().unwrap_or_default()).context("read the end of the view")?;
    bar.set_message("making it durable");
    let written = tokio::task::block_in_place(|| partial.finish(&end))?;
    bar.finish_and_clear();
    Ok(text::say(&report(options, &head, written, started))?)
}

fn report(options: &RestoreOptions, head: &ViewHead, written: ByteCount, started: Instant) -> String {
    let seconds = started.elapsed().as_secs_f64();
    if options.json {
        let done = serde_json::json!({
            "group": head.group,
            "volume": head.volume,
            "point": head.point,
            "out": options.out,
            "data_bytes": written,
            "seconds": seconds,
        });
        format!("{done}\n")
    } else {
        let (local, _) = text::instant(head.point.cut_time);
        format!(
            "Restored {} as of point {} ({local}, {}-consistent) to {}: {}, of which {written} data, at {}.\n",
            head.volume.name,
            head.point.epoch,
            head.point.consistency,
            options.out.display(),
            head.volume.size,
            text::rate(written.get() as f64 / seconds.max(0.001)),
        )
    }
}

/// The one volume of this name or identity.
fn find(reply: &PointsReply, wanted: &str) -> anyhow::Result<(GroupId, VolumeId)> {
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

/// Progress goes by the place reached on the volume: what is zero is not sent.
fn bar(size: ByteCount, json: bool) -> ProgressBar {
    if json || !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style = "{bar:40} {bytes} of {total_bytes}, {bytes_per_sec}, {eta} left {msg}";
    let style = ProgressStyle::with_template(style).unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(size.get()).with_style(style)
}

/// A file that may be made.
#[derive(Debug)]
struct Target {
    out: PathBuf,
    partial: PathBuf,
    force: bool,
}

impl Target {
    fn check(out: &Path, force: bool) -> anyhow::Result<Target> {
        let Some(name) = out.file_name() else { bail!("restore to {}: name a file", out.display()) };
        let mut partial = name.to_owned();
        partial.push(".partial");
        let target = Target { out: out.to_owned(), partial: out.with_file_name(partial), force };
        if let Ok(found) = std::fs::metadata(out) {
            ensure!(
                !found.file_type().is_block_device(),
                "restore to {}: it is a block device; restore to a file, then copy it there",
                out.display()
            );
            ensure!(found.is_file(), "restore to {}: it is not a regular file", out.display());
            ensure!(
                force,
                "restore to {}: it exists; choose another name, or replace it with --force",
                out.display()
            );
        }
        if target.partial.exists() {
            ensure!(
                force,
                "restore to {}: {} exists, left by a restore that was cut short or is still running; remove it, or \
                 use --force",
                out.display(),
                target.partial.display()
            );
        }
        Ok(target)
    }

    fn create(self, size: ByteCount) -> anyhow::Result<Partial> {
        let path = self.partial.clone();
        if self.force {
            match std::fs::remove_file(&path) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(error).with_context(|| format!("remove {}", path.display()));
                }
                _ => {}
            }
        }
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)
            .with_context(|| format!("create {}", path.display()))?;
        let hash = ViewHash::new();
        let partial = Partial { target: self, file, size, end: 0, written: 0, hash, named: false };
        partial.file.set_len(size.get()).with_context(|| format!("size {} to {size}", path.display()))?;
        Ok(partial)
    }
}

/// The file before it has its name. Removed when dropped before that.
#[derive(Debug)]
struct Partial {
    target: Target,
    file: File,
    size: ByteCount,
    /// The end of what has been written; views come in order.
    end: u64,
    written: u64,
    hash: ViewHash,
    named: bool,
}

impl Partial {
    fn write(&mut self, offset: ByteOffset, bytes: &[u8]) -> anyhow::Result<()> {
        let end = offset.checked_add(ByteCount(bytes.len() as u64)).map_or(u64::MAX, ByteOffset::get);
        ensure!(
            offset.get() >= self.end && end <= self.size.get(),
            "write {} bytes at {offset}: the server sent them out of place (at {} of {})",
            bytes.len(),
            self.end,
            self.size.get()
        );
        self.file.write_all_at(bytes, offset.get()).with_context(|| {
            format!("write {} bytes at {offset} of {}", bytes.len(), self.target.partial.display())
        })?;
        self.hash.update(offset, bytes);
        self.end = end;
        self.written += bytes.len() as u64;
        Ok(())
    }

    fn finish(mut self, end: &ViewEnd) -> anyhow::Result<ByteCount> {
        let (partial, out) = (&self.target.partial, &self.target.out);
        ensure!(
            self.written == end.tail.sent_bytes.get(),
            "verify {}: {} bytes arrived, the server sent {}; try again",
            partial.display(),
            self.written,
            end.tail.sent_bytes.get()
        );
        let hash = std::mem::take(&mut self.hash).finish();
        ensure!(
            hash == end.blake3,
            "verify {}: its data has the hash {hash}, the server sent {}; try again",
            partial.display(),
            end.blake3
        );
        let length =
            self.file.seek(SeekFrom::End(0)).with_context(|| format!("verify {}", partial.display()))?;
        ensure!(length == self.size.get(), "verify {}: somebody else changed its length", partial.display());
        self.file.sync_all().with_context(|| format!("make {} durable", partial.display()))?;
        let flags = if self.target.force { RenameFlags::empty() } else { RenameFlags::NOREPLACE };
        match renameat_with(CWD, partial, CWD, out, flags) {
            // Some filesystems cannot refuse to replace; there the check at the start must do.
            Err(rustix::io::Errno::INVAL) if !out.exists() => std::fs::rename(partial, out),
            other => other.map_err(std::io::Error::from),
        }
        .with_context(|| format!("name {}", out.display()))?;
        self.named = true;
        let dir = out.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
        File::open(dir)
            .and_then(|dir| dir.sync_all())
            .with_context(|| format!("make the name of {} durable", out.display()))?;
        Ok(ByteCount(self.written))
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        if !self.named {
            // Nobody else knows of it, and it is no disk.
            let _ = std::fs::remove_file(&self.target.partial);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use block::{Generation, VolumeId};
    use control::{GroupPoints, ViewTail, VolumeSummary};

    use super::*;

    /// What the server says at the end after sending these.
    fn end(sent: &[(u64, &[u8])]) -> ViewEnd {
        let mut hash = ViewHash::new();
        for (offset, bytes) in sent {
            hash.update(ByteOffset(*offset), bytes);
        }
        let bytes = sent.iter().map(|(_, bytes)| bytes.len() as u64).sum();
        ViewEnd { tail: ViewTail { sent_bytes: ByteCount(bytes) }, blake3: hash.finish() }
    }

    #[test]
    fn a_whole_file_gets_its_name_and_stays_sparse() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("disk.img");
        let mut partial = Target::check(&out, false).unwrap().create(ByteCount::mib(64)).unwrap();
        partial.write(ByteOffset(4096), b"abc").unwrap();
        partial.write(ByteOffset((64 << 20) - 1), b"z").unwrap();
        assert!(!out.exists() && dir.path().join("disk.img.partial").exists());
        assert_eq!(partial.finish(&end(&[(4096, b"abc"), ((64 << 20) - 1, b"z")])).unwrap(), ByteCount(4));
        let found = std::fs::read(&out).unwrap();
        assert_eq!((&found[4096..4099], found[(64 << 20) - 1], found.len()), (&b"abc"[..], b'z', 64 << 20));
        assert!(std::fs::metadata(&out).unwrap().blocks() < 1000);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_short_or_misplaced_view_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("disk.img");
        let start = || Target::check(&out, false).unwrap().create(ByteCount(1000)).unwrap();
        let mut partial = start();
        partial.write(ByteOffset(0), b"abc").unwrap();
        let error = partial.finish(&end(&[(0, b"abcd")])).unwrap_err();
        assert!(error.to_string().contains("3 bytes arrived, the server sent 4"), "{error}");
        let mut partial = start();
        partial.write(ByteOffset(0), b"abc").unwrap();
        assert!(partial.finish(&end(&[(0, b"abd")])).unwrap_err().to_string().contains("has the hash"));
        let mut partial = start();
        partial.write(ByteOffset(10), b"abc").unwrap();
        assert!(partial.write(ByteOffset(12), b"d").is_err());
        assert!(partial.write(ByteOffset(999), b"de").is_err());
        assert!(partial.write(ByteOffset(u64::MAX), b"de").is_err());
        drop(partial);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn existing_files_are_replaced_by_force_only() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("disk.img");
        std::fs::write(&out, "old").unwrap();
        assert!(Target::check(&out, false).unwrap_err().to_string().contains("--force"));
        let partial = Target::check(&out, true).unwrap().create(ByteCount(3)).unwrap();
        assert_eq!(std::fs::read(&out).unwrap(), b"old");
        partial.finish(&end(&[])).unwrap();
        assert_eq!(std::fs::read(&out).unwrap(), [0; 3]);

        let other = dir.path().join("other.img");
        std::fs::write(dir.path().join("other.img.partial"), "left").unwrap();
        assert!(Target::check(&other, false).unwrap_err().to_string().contains("cut short"));
        Target::check(&other, true).unwrap().create(ByteCount(3)).unwrap().finish(&end(&[])).unwrap();
        assert!(Target::check(dir.path(), true).is_err());
    }

    /// The name was taken while the restore ran.
    #[test]
    fn a_file_that_came_meanwhile_is_not_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("disk.img");
        let partial = Target::check(&out, false).unwrap().create(ByteCount(3)).unwrap();
        std::fs::write(&out, "new").unwrap();
        assert!(partial.finish(&end(&[])).is_err());
        assert_eq!(std::fs::read(&out).unwrap(), b"new");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
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
                group(1, vec![volume(3, "data"), volume(4, "log")]),
                group(2, vec![volume(5, "data")]),
            ],
        };
        assert_eq!(find(&reply, "log").unwrap(), (GroupId([1; 16]), VolumeId([4; 16])));
        assert_eq!(find(&reply, &"05".repeat(16)).unwrap(), (GroupId([2; 16]), VolumeId([5; 16])));
        assert!(find(&reply, "data").unwrap_err().to_string().contains("--group"));
        assert!(find(&reply, "boot").unwrap_err().to_string().contains("data, log, data"));
    }
}
