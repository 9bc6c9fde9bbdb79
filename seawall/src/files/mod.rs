//! `seawall files`: single files of a point, without restoring it.
//!
//! The point is exported with an overlay, so that file systems replay their journals as after a power cut and nothing of the
//! replica changes. nbdfuse makes a file of the export, a loop device a disk of that, and the kernel mounts it.
//!
//! All of this happens in a process with a mount namespace and a process namespace of its own (`inside`): mounts are seen by
//! nobody else, and when that process ends, however it ends, the kernel ends its helpers, takes the mounts down, and with
//! the last user the loop device. It is killed when this one is.

mod copy;
mod find;
mod inside;
mod list;
mod lvm;

use crate::config::Place;
use block::GroupId;
use clap::{Args, Subcommand};
use control::PointSelector;
use std::path::Path;
use std::path::PathBuf;
use std::process::Stdio;

use anyhow::{Context, bail, ensure};
use control::{ExportPlace, ExportRequest};
use serde::{Deserialize, Serialize};
use tokio::process::Command;

use crate::ask::Servers;
use crate::export::{find, uri};

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  What file systems there are:
    seawall files ls vda --point latest
  A directory, and a file of it:
    seawall files ls vda --point 1207 /etc
    seawall files get vda --point 1207 /etc/fstab --out fstab.old
  A directory with everything below, of the second partition:
    seawall files get vda --point latest /srv/data --fs p2 --out /tmp/data
  To another program:
    seawall files get vda --point latest /var/lib/app.sql --out - | head

As root; nbdfuse (of libnbd-bin, with fuse3) is needed. File systems are mounted on an overlay where nobody else sees them,
so that their journals are replayed and the replica does not change; nothing stays behind, also when the command is killed.")]
pub(crate) struct FilesOptions {
    #[command(subcommand)]
    pub(crate) action: FilesAction,
}

impl FilesOptions {
    pub(crate) fn common(&self) -> &FilesCommon {
        match &self.action {
            FilesAction::Ls(options) => &options.common,
            FilesAction::Get(options) => &options.common,
        }
    }
}

#[derive(Debug, Subcommand)]
pub(crate) enum FilesAction {
    /// List file systems, or what is in a directory
    Ls(FilesLsOptions),
    /// Copy a file, or a directory with everything below it
    Get(FilesGetOptions),
}

#[derive(Clone, Debug, Args)]
pub(crate) struct FilesCommon {
    #[command(flatten)]
    pub(crate) place: Place,
    /// Volume, by name or identity
    #[arg(value_name = "VOLUME")]
    pub(crate) volume: String,
    /// Recovery point: `latest`, `application` (the newest application-consistent one), or the number of an epoch
    #[arg(long, value_name = "POINT")]
    pub(crate) point: PointSelector,
    /// Group, where several have such a volume
    #[arg(long, value_name = "ID")]
    pub(crate) group: Option<GroupId>,
    /// File system, where there are several: its name, label or UUID, as `ls` without a path shows them
    #[arg(long, value_name = "NAME")]
    pub(crate) fs: Option<String>,
    /// One JSON object instead of text
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct FilesLsOptions {
    #[command(flatten)]
    pub(crate) common: FilesCommon,
    /// What to list; without it the file systems
    pub(crate) path: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct FilesGetOptions {
    #[command(flatten)]
    pub(crate) common: FilesCommon,
    /// What to get
    pub(crate) path: PathBuf,
    /// Where to; `-` for standard output [default: its name, here]
    #[arg(long, value_name = "FILE|DIR")]
    pub(crate) out: Option<PathBuf>,
}

pub(crate) use inside::run as run_inside;

/// Where what went wrong inside is told, below the private directory.
const ERROR_FILE: &str = "error";

/// What is to be done inside.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Task {
    /// A directory that is this task's own.
    dir: std::path::PathBuf,
    /// The export.
    uri: String,
    /// The export as a file, once it is one.
    export: Option<std::path::PathBuf>,
    /// Which file system, when there are several.
    fs: Option<String>,
    work: Work,
    json: bool,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
enum Work {
    /// Lists file systems, or a directory of one.
    List { path: Option<std::path::PathBuf> },
    /// Copies a file or directory out.
    Get { path: std::path::PathBuf, out: std::path::PathBuf },
}

pub(crate) async fn run(options: &FilesOptions) -> anyhow::Result<()> {
    let (common, work) = match &options.action {
        FilesAction::Ls(ls) => (&ls.common, Work::List { path: ls.path.clone() }),
        FilesAction::Get(get) => {
            let name = get.path.file_name();
            let out = match (&get.out, name) {
                (Some(out), Some(name)) if out.is_dir() => out.join(name),
                (Some(out), _) => out.clone(),
                (None, Some(name)) => name.into(),
                (None, None) => bail!("get {}: say where to with --out", get.path.display()),
            };
            let out = if out.as_os_str() == "-" { out } else { std::path::absolute(out)? };
            ensure!(
                out.as_os_str() == "-" || !out.exists(),
                "get {}: {} exists; choose another name",
                get.path.display(),
                out.display()
            );
            (&get.common, Work::Get { path: get.path.clone(), out })
        }
    };
    ensure!(
        rustix::process::geteuid().is_root(),
        "look into a point: it needs root, for loop devices and mounts; or export the point (`seawall export`) and use \
         a tool such as guestfish on it"
    );
    let servers = Servers::load(&common.place)?;
    let (group, volume) = find(&servers.points(common.group).await?, &common.volume)?;
    let request = ExportRequest {
        writable: true,
        ..ExportRequest::new(group, vec![volume], common.point, ExportPlace::Beside)
    };
    let mut held = servers.export(request).await?;
    let bridge = servers.bridge(&held.info, None)?;
    let name = &held.info.volumes.first().context("the target server exported nothing")?.name;
    let dir = bridge.socket().parent().context("the bridge's directory")?.to_owned();
    let task = Task {
        uri: uri(&held.info, Some(bridge.socket()), name),
        export: None,
        fs: common.fs.clone(),
        json: common.json,
        dir: dir.clone(),
        work,
    };
    tokio::select! {
        outcome = in_private(&task) => outcome,
        error = held.ended() => Err(error),
    }
}

/// Runs this program once more, in namespaces of its own.
async fn in_private(task: &Task) -> anyhow::Result<()> {
    let program = std::env::current_exe().context("find this program")?;
    // Called on the program's first thread, whose end is the program's: that is what the kernel looks at.
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "unshare", "--mount", "--propagation", "private"]);
    command.args(["--pid", "--fork", "--kill-child=KILL", "--mount-proc", "--"]);
    command.arg(program).arg("files-inside").arg(serde_json::to_string(task)?);
    command.stdin(Stdio::null()).kill_on_drop(true);
    let mut child = command.spawn().context("run setpriv and unshare (of util-linux)")?;
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    let status = tokio::select! {
        status = child.wait() => status.context("wait for unshare")?,
        _ = tokio::signal::ctrl_c() => bail!("interrupted"),
        _ = terminate.recv() => bail!("interrupted"),
    };
    if status.success() {
        return Ok(());
    }
    match std::fs::read_to_string(task.dir.join(ERROR_FILE)) {
        Ok(error) => bail!("{error}"),
        Err(_) => bail!("look into the point: {status}"),
    }
}

/// Tells the outside what went wrong.
fn leave_error(dir: &Path, error: &anyhow::Error) {
    // When this fails too, the exit status still says that something did.
    let _ = std::fs::write(dir.join(ERROR_FILE), format!("{error:#}"));
}
