//! What runs in namespaces of its own: first nbdfuse and what waits for it, and in a mount namespace once more what mounts.
//!
//! The two are apart because of how the kernel takes a file system down when all are killed: in the last process that sees
//! the mount. Were that nbdfuse, it would wait for what the file system still writes to be taken by nbdfuse.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use scratch::{LoopDisk, Mount};

use super::find::{self, FileSystem};
use super::{Task, Work, copy, leave_error, list};
use crate::exit::Exit;

/// How long nbdfuse may take to show the export.
const FUSE_PATIENCE: Duration = Duration::from_secs(30);

/// What goes wrong is told by the outside.
pub(crate) fn run(task: &str) -> anyhow::Result<Exit> {
    let task: Task = serde_json::from_str(task).context("read what is to be done inside")?;
    let outcome = match &task.export {
        None => show(&task),
        Some(export) => look(&task, export).map(|()| Exit::Done),
    };
    Ok(outcome.unwrap_or_else(|error| {
        leave_error(&task.dir, &error);
        Exit::Failed
    }))
}

/// Shows the export as a file, and leaves the rest to a process that mounts where nbdfuse does not see it.
fn show(task: &Task) -> anyhow::Result<Exit> {
    let fused = Fused::start(&task.uri, &task.dir.join("export"))?;
    let task = Task { export: Some(fused.file()), ..task.clone() };
    let program = std::env::current_exe().context("find this program")?;
    let mut command = Command::new("unshare");
    command.args(["--mount", "--propagation", "private", "--"]).arg(program).arg("files-inside");
    let status =
        command.arg(serde_json::to_string(&task)?).status().context("run unshare (of util-linux)")?;
    Ok(if status.success() { Exit::Done } else { Exit::Failed })
}

fn look(task: &Task, export: &Path) -> anyhow::Result<()> {
    let disk = LoopDisk::attach(export, find::sector_bytes(export)?)?;
    let found = find::file_systems(disk.device())?;
    let mounted =
        || Mounted::new(disk.device(), choose(&found, task.fs.as_deref())?, &task.dir.join("files"));
    match &task.work {
        Work::List { path: None } => list::file_systems(&found, task.json),
        Work::List { path: Some(path) } => list::directory(mounted()?.root(), path, task.json),
        Work::Get { path, out } => copy::get(mounted()?.root(), path, out, task.json),
    }
}

/// The one that is meant.
fn choose<'a>(found: &'a [FileSystem], wanted: Option<&str>) -> anyhow::Result<&'a FileSystem> {
    let readable: Vec<&FileSystem> = found.iter().filter(|fs| fs.is_readable()).collect();
    let names = || found.iter().map(FileSystem::described).collect::<Vec<_>>().join("; ");
    match (wanted, readable.as_slice()) {
        (Some(wanted), _) => {
            let fs = found.iter().find(|fs| fs.is_called(wanted)).with_context(|| {
                format!(
                    "find file system {wanted}: the volume has {}",
                    if found.is_empty() { "none".to_owned() } else { names() }
                )
            })?;
            ensure!(fs.is_readable(), "look into {}: {} cannot be looked into", fs.name, fs.described());
            Ok(fs)
        }
        (None, [only]) => Ok(only),
        (None, []) if found.is_empty() => bail!("look into the volume: no file system was found on it"),
        (None, []) => bail!("look into the volume: none of what is on it can be looked into: {}", names()),
        (None, _) => {
            bail!("look into the volume: it has several file systems; say which with --fs NAME: {}", names())
        }
    }
}

/// A mounted file system with the loop device that it may need.
struct Mounted {
    mount: Mount,
    /// Goes after the mount.
    _disk: LoopDisk,
}

impl Mounted {
    fn new(disk: &Path, fs: &FileSystem, point: &Path) -> anyhow::Result<Mounted> {
        let disk = LoopDisk::attach_part(disk, fs.part.start, fs.part.end - fs.part.start)?;
        // Read-only to us; the journal is replayed all the same, into the overlay.
        let mut options = "ro,nosuid,nodev,noexec".to_owned();
        if fs.kind == "xfs" {
            // The source's own may be mounted on this very machine.
            options.push_str(",nouuid");
        }
        let mount = Mount::new(disk.device(), point, &options)
            .with_context(|| format!("look into {}", fs.described()))?;
        Ok(Mounted { mount, _disk: disk })
    }

    fn root(&self) -> &Path {
        self.mount.point()
    }
}

/// An export as a file.
struct Fused {
    child: Child,
    point: PathBuf,
}

impl Fused {
    fn start(uri: &str, point: &Path) -> anyhow::Result<Fused> {
        std::fs::create_dir(point).with_context(|| format!("create {}", point.display()))?;
        let mut command = Command::new("nbdfuse");
        let child = command.arg(point).arg(uri).stdin(Stdio::null()).spawn();
        let child =
            child.context("run nbdfuse: is it installed? On Debian it is in libnbd-bin, with fuse3")?;
        let mut fused = Fused { child, point: point.to_owned() };
        let limit = Instant::now() + FUSE_PATIENCE;
        while !fused.file().exists() {
            if let Some(status) = fused.child.try_wait().context("wait for nbdfuse")? {
                bail!(
                    "show the export as a file: nbdfuse: {status}; is fuse3 installed, and /dev/fuse there?"
                );
            }
            ensure!(Instant::now() < limit, "show the export as a file: nbdfuse does not get ready");
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(fused)
    }

    fn file(&self) -> PathBuf {
        self.point.join("nbd")
    }
}

impl Drop for Fused {
    fn drop(&mut self) {
        // The namespace's end would do the same; this way nbdfuse says goodbye to the server.
        let _ = Command::new("fusermount3").arg("-u").arg(&self.point).stderr(Stdio::null()).status();
        if self.child.try_wait().is_ok_and(|status| status.is_none()) {
            let _ = self.child.kill();
        }
        let _ = self.child.wait();
    }
}
