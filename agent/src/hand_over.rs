//! Handing over: the disks are kept from everybody, what they hold is at the target, and checksums prove that it is the same. After that
//! a failover to the point that is made then loses nothing.
//!
//! A disk that is handed over is claimed by this process, so that nothing mounts it or its partitions, and set read-only, so that the
//! kernel refuses writes, also of who had it open before; the latter stays when the agent ends, until it is released or the machine
//! starts again. What gets past that all the same (a mapping of the device's memory) is found by the comparison.
//!
//! When anything fails, or whoever asked has gone, the disks are released.

use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use block::{ByteCount, Consistency, Epoch, Label};
use control::{AgentRefusal, ResyncWhen};
use parking_lot::Mutex;
use rustix::fd::OwnedFd;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use tokio::sync::mpsc;

use crate::compare::Comparisons;
use crate::order::{Comparing, Orders};
use crate::outbox::Outbox;
use crate::point::{Event, Points, Wish};

/// Comparisons in a row that may find something different, which is then sent. After more, something writes.
pub const COMPARISONS_MAX: u32 = 3;
/// What the last point is called.
const LABEL: &str = "handed over";
const LOOK_EVERY: Duration = Duration::from_millis(50);
const TELL_EVERY: Duration = Duration::from_secs(1);

type Refused = (AgentRefusal, String);

/// What was handed over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct HandedOver {
    /// The point that is what the disks are.
    pub(crate) epoch: Epoch,
    /// Bytes that the last comparison found to be the same: all.
    pub(crate) equal: ByteCount,
    /// Bytes that comparisons before it found different, and that were sent.
    pub(crate) different: ByteCount,
}

/// The disks of the group, and whether they are kept from others.
pub(crate) struct Disks {
    paths: Vec<PathBuf>,
    claims: Mutex<Option<Claims>>,
}

/// What keeps the disks from others.
struct Claims {
    _claimed: Vec<OwnedFd>,
    /// What came of it; nothing while it goes on.
    handed_over: Option<HandedOver>,
}

impl Disks {
    pub(crate) fn new(paths: Vec<PathBuf>) -> Disks {
        Disks { paths, claims: Mutex::new(None) }
    }

    /// What was handed over and not released.
    fn handed_over(&self) -> Option<HandedOver> {
        self.claims.lock().as_ref()?.handed_over
    }

    /// Whether nothing can write to them, be it that an agent before this one handed them over.
    pub(crate) fn are_handed_over(&self) -> bool {
        let claims = self.claims.lock();
        claims.as_ref().is_none_or(|claims| claims.handed_over.is_some())
            && self.paths.iter().all(|path| is_read_only(path) == Some(true))
    }

    /// Keeps them from everybody.
    fn keep(&self) -> Result<(), Refused> {
        let mut claims = self.claims.lock();
        if claims.is_some() {
            return Err((AgentRefusal::Busy, "hand over: the disks are handed over already".into()));
        }
        let claimed = self.paths.iter().map(claim).collect::<Result<Vec<_>, _>>()?;
        for path in &self.paths {
            if let Err(error) = set(path, "--setro") {
                let _ = self.writable();
                return Err((AgentRefusal::InUse, format!("hand over: {error:#}")));
            }
        }
        *claims = Some(Claims { _claimed: claimed, handed_over: None });
        Ok(())
    }

    /// Lets everybody write to them again.
    pub(crate) fn release(&self) -> anyhow::Result<()> {
        let mut claims = self.claims.lock();
        // An agent before this one may have set them.
        self.writable()?;
        *claims = None;
        Ok(())
    }

    fn writable(&self) -> anyhow::Result<()> {
        self.paths.iter().try_for_each(let_write)
    }
}

fn is_read_only(path: &PathBuf) -> Option<bool> {
    let number = std::fs::metadata(path).ok().filter(|data| data.file_type().is_block_device())?.rdev();
    let (major, minor) = (rustix::fs::major(number), rustix::fs::minor(number));
    Some(std::fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/ro")).ok()?.trim() == "1")
}

/// Lets everybody write to disks, as configurations name them.
pub(crate) fn let_write_all(devices: &[String]) -> anyhow::Result<()> {
    let disks = capture::Disks::default();
    for device in devices {
        let name: capture::DeviceName =
            device.parse().with_context(|| format!("read the disk's name {device}"))?;
        for disk in disks.resolve(&name).with_context(|| format!("find the disk {device}"))?.disks {
            let_write(&disk.path)?;
        }
    }
    Ok(())
}

/// Lets everybody write to a disk and its partitions.
fn let_write(path: &PathBuf) -> anyhow::Result<()> {
    set(path, "--setrw")
}

fn claim(path: &PathBuf) -> Result<OwnedFd, Refused> {
    // Of a block device, O_EXCL without O_CREAT asks for it alone, partitions included.
    let flags = OFlags::RDONLY | OFlags::EXCL | OFlags::CLOEXEC;
    rustix::fs::open(path, flags, Mode::empty()).map_err(|errno| {
        let why = match errno {
            Errno::BUSY => {
                let used = used(path);
                format!("it is in use{used}; stop what uses it, unmount it, and ask again")
            }
            errno => errno.to_string(),
        };
        (AgentRefusal::InUse, format!("hand over {}: {why}", path.display()))
    })
}

/// Where a disk's parts are mounted, for people.
fn used(path: &PathBuf) -> String {
    let output =
        Command::new("lsblk").args(["--noheadings", "--raw", "--output", "MOUNTPOINT"]).arg(path).output();
    let text = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
    let places: Vec<&str> = text.lines().filter(|line| !line.is_empty()).collect();
    if places.is_empty() { String::new() } else { format!(" (mounted at {})", places.join(", ")) }
}

/// Sets a disk and its partitions read-only or writable, by blockdev(8) of util-linux.
fn set(path: &PathBuf, how: &str) -> anyhow::Result<()> {
    let listed = Command::new("lsblk")
        .args(["--noheadings", "--raw", "--paths", "--output", "PATH,TYPE"])
        .arg(path)
        .output()?;
    let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
    let parts = listed.lines().filter_map(|line| line.split_once(' ')).filter(|(_, kind)| *kind == "part");
    let devices = std::iter::once(path.clone()).chain(parts.map(|(path, _)| PathBuf::from(path)));
    for device in devices {
        let output = Command::new("blockdev").arg(how).arg(&device).output()?;
        anyhow::ensure!(
            output.status.success(),
            "blockdev {how} {}: {}",
            device.display(),
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(())
}

/// Releases what was kept, unless all went well.
struct Kept(Option<Arc<Disks>>);

impl Drop for Kept {
    fn drop(&mut self) {
        if let Some(disks) = self.0.take()
            && let Err(error) = disks.release()
        {
            tracing::error!("release disks that were not handed over: {error:#}; `blockdev --setrw` does it");
        }
    }
}

/// What handing over needs of the agent.
#[derive(Clone)]
pub(crate) struct Means {
    pub(crate) disks: Arc<Disks>,
    pub(crate) points: Arc<Points>,
    pub(crate) orders: Arc<Orders>,
    pub(crate) outbox: Arc<Outbox>,
    pub(crate) comparisons: Arc<Comparisons>,
}

/// Hands over; what it is doing goes to `doing`. Dropping it before its end releases the disks.
pub(crate) async fn run(means: &Means, doing: &mpsc::UnboundedSender<String>) -> Result<HandedOver, Refused> {
    let tell = |text: String| drop(doing.send(text));
    // Whoever asks again, because the answer was lost, gets it again.
    if let Some(handed_over) = means.disks.handed_over() {
        return Ok(handed_over);
    }
    let disks = means.disks.clone();
    blocking(move || disks.keep()).await?;
    let mut kept = Kept(Some(means.disks.clone()));
    let mut different = ByteCount::ZERO;
    let mut equal = None;
    for _ in 0..COMPARISONS_MAX {
        let (bytes, found) = compare(means, &tell).await?;
        if found == ByteCount::ZERO {
            equal = Some(bytes);
            break;
        }
        tell(format!("{found} were different and are sent; comparing again"));
        different = different.saturating_add(found);
    }
    let Some(equal) = equal else {
        let why = format!(
            "hand over: {COMPARISONS_MAX} comparisons found something different; something writes to the disks, \
             or the replica is damaged. Find out what, and ask again"
        );
        return Err((AgentRefusal::InUse, why));
    };
    let epoch = last_point(means, &tell).await?;
    kept.0 = None;
    let handed_over = HandedOver { epoch, equal, different };
    if let Some(claims) = &mut *means.disks.claims.lock() {
        claims.handed_over = Some(handed_over);
    }
    Ok(handed_over)
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Refused> + Send + 'static,
) -> Result<T, Refused> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|error| Err((AgentRefusal::Stopping, error.to_string())))
}

/// Compares everything; gives how much that was, and how much of it differed.
async fn compare(means: &Means, tell: &impl Fn(String)) -> Result<(ByteCount, ByteCount), Refused> {
    let (orders, resyncs) = (means.orders.clone(), &means.comparisons.resyncs);
    let before = resyncs.counts();
    let Comparing { bytes, .. } = blocking(move || orders.resync(None, ResyncWhen::Now)).await?;
    let mut told = tokio::time::Instant::now();
    loop {
        tokio::time::sleep(LOOK_EVERY).await;
        let now = resyncs.counts();
        let compared = now.0.saturating_sub(before.0);
        if compared >= bytes && resyncs.status().is_none() {
            return Ok((bytes, now.1.saturating_sub(before.1)));
        }
        if told.elapsed() >= TELL_EVERY {
            told = tokio::time::Instant::now();
            tell(format!("compared {} of {bytes} with the replica", compared.min(bytes)));
        }
    }
}

/// A point with all that the disks hold, at the target.
async fn last_point(means: &Means, tell: &impl Fn(String)) -> Result<Epoch, Refused> {
    let label = Label::try_from(LABEL.to_owned()).expect("it is short and plain");
    let (sender, mut events) = mpsc::unbounded_channel();
    means.points.begin(Wish { consistency: Consistency::Crash, label: Some(label) }, sender)?;
    let epoch = loop {
        match events.recv().await {
            Some(Event::Doing(_)) => {}
            Some(Event::Taken(point)) => break point.epoch,
            Some(Event::Refused(code, reason)) => return Err((code, reason)),
            None => return Err((AgentRefusal::Stopping, "hand over: the agent is stopping".into())),
        }
    };
    tell(format!("point {epoch} is what the disks are; waiting until the target holds it"));
    while means.outbox.progress().held.applied < epoch {
        tokio::time::sleep(LOOK_EVERY).await;
    }
    Ok(epoch)
}
