//! Parts of a fleet as the config server sees them: what they report is made up, how they report is not.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use block::{ByteCount, Consistency, Epoch, Generation, GroupId, PointNote, UnixNanos, VolumeId};
use control::fleet::{
    Capacity, CheckIn, CheckInReply, Desired, DiskInfo, DiskUse, PartReport, PartRole, Task, TaskKind,
};
use control::{
    AgentReport, CaptureMode, PointInfo, ProcessGroup, ProcessServerStatus, StateCode, TargetGroup,
    TargetLink, TargetServerStatus, VolumeReport, VolumeSummary,
};
use enrol::seal::seal_key;
use enrol::{Charge, TaskDone};
use parking_lot::Mutex;
use serde_json::json;

/// Of so many groups one has a newest point that is too old.
pub const LATE_EVERY: usize = 200;
/// How old that point is.
const LATE: Duration = Duration::from_secs(3600);
/// The cut of an epoch is as old as this when it is told of.
const BEHIND: Duration = Duration::from_secs(2);
const DISK_BYTES: ByteCount = ByteCount::gib(40);
const STORE_BYTES: u64 = 1 << 50;
/// What groups' keys are sealed for; nobody has the secret key.
const SEALING_KEY: &str = "0900000000000000000000000000000000000000000000000000000000000000";
/// The group's key; nothing is sealed with it.
const KEY: &str = "0707070707070707070707070707070707070707070707070707070707070707";

/// What all parts agree on.
#[derive(Debug)]
pub struct World {
    began: Instant,
}

impl World {
    /// Begins now.
    pub fn new() -> Arc<World> {
        Arc::new(World { began: Instant::now() })
    }

    /// An epoch a second.
    fn epoch(&self) -> Epoch {
        Epoch(self.began.elapsed().as_secs() + 1)
    }
}

/// How long requests took, while it is measured.
#[derive(Debug, Default)]
pub struct Meter {
    measured: Mutex<Option<Figures>>,
}

impl Meter {
    /// Measures from now on.
    pub fn begin(&self) {
        *self.measured.lock() = Some(Figures::default());
    }

    /// What was measured.
    pub fn end(&self) -> Figures {
        let mut measured = self.measured.lock().take().unwrap_or_default();
        for times in measured.times.values_mut() {
            times.0.sort_unstable();
        }
        measured
    }

    /// A request was answered.
    pub fn took(&self, what: &'static str, time: Duration) {
        if let Some(figures) = &mut *self.measured.lock() {
            figures.times.entry(what).or_default().0.push(time);
        }
    }

    fn failed(&self) {
        if let Some(figures) = &mut *self.measured.lock() {
            figures.failed += 1;
        }
    }
}

/// What was measured.
#[derive(Debug, Default)]
pub struct Figures {
    times: BTreeMap<&'static str, Times>,
    failed: usize,
}

impl Figures {
    /// By kind of request.
    pub fn by_request(&self) -> impl Iterator<Item = (&'static str, &Times)> {
        self.times.iter().map(|(what, times)| (*what, times))
    }

    /// Of all requests.
    pub fn all(&self) -> Times {
        let mut all: Vec<Duration> = self.times.values().flat_map(|times| times.0.iter().copied()).collect();
        all.sort_unstable();
        Times(all)
    }

    /// Check-ins of machines that were answered.
    pub fn check_ins(&self) -> usize {
        self.times.get(check_in_of(PartRole::Agent)).map_or(0, Times::len)
    }

    /// Check-ins that were not answered.
    pub fn failed(&self) -> usize {
        self.failed
    }
}

/// Times, the shortest first.
#[derive(Debug, Default)]
pub struct Times(Vec<Duration>);

impl Times {
    /// So large a part of them took no longer.
    pub fn at(&self, part: f64) -> Duration {
        let place = (self.0.len() as f64 * part).ceil() as usize;
        self.0.get(place.saturating_sub(1)).copied().unwrap_or_default()
    }

    /// How many.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// None.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

const fn check_in_of(role: PartRole) -> &'static str {
    match role {
        PartRole::Agent => "check-in of a machine",
        PartRole::ProcessServer => "check-in of the process",
        PartRole::TargetServer => "check-in of the target",
    }
}

#[derive(Default)]
struct Told {
    digest: String,
    desired: Option<Desired>,
    /// When the check-in that is under way began.
    asked: Option<Instant>,
}

/// A part that does nothing but report.
pub struct Part {
    role: PartRole,
    name: String,
    world: Arc<World>,
    meter: Arc<Meter>,
    told: Mutex<Told>,
}

impl Part {
    /// One that was told nothing yet.
    pub fn new(role: PartRole, name: &str, world: Arc<World>, meter: Arc<Meter>) -> Part {
        Part { role, name: name.to_owned(), world, meter, told: Mutex::default() }
    }

    fn agent(&self) -> AgentReport {
        let epoch = self.world.epoch();
        let before = |epochs: u64| Epoch(epoch.0.saturating_sub(epochs));
        let volume = |number: u8, device: &str| VolumeReport {
            volume: VolumeSummary {
                id: VolumeId([number; 16]),
                name: device.rsplit('/').next().unwrap_or(device).to_owned(),
                size: DISK_BYTES,
            },
            device: device.to_owned(),
            mode: CaptureMode::Data,
            dirty_bytes: ByteCount::ZERO,
            draining_bytes: ByteCount::ZERO,
            drained_total: ByteCount(DISK_BYTES.0 + epoch.0 * 4096),
        };
        AgentReport {
            time: UnixNanos::now(),
            version: env!("CARGO_PKG_VERSION").into(),
            captured: epoch,
            sealed: before(1),
            cached: before(1),
            applied: before(2),
            sealed_cut_time: ago(BEHIND / 2),
            volumes: vec![volume(1, "/dev/vda"), volume(2, "/dev/vdb")],
            churn_bytes_per_s: 1e6 + (epoch.0 % 97) as f64 * 1e4,
            sent_bytes_per_s: 4e5 + (epoch.0 % 89) as f64 * 1e4,
            written_bytes_total: ByteCount(epoch.0 * 1_000_000),
            sent_bytes_total: ByteCount(epoch.0 * 400_000),
            ring_used: ByteCount(epoch.0 % 4096),
            ring_bytes: ByteCount::mib(64),
            epoch_memory_used: ByteCount::mib(1),
            epoch_memory_limit: ByteCount::mib(256),
            processors_used: 0.02,
            memory_resident: ByteCount::mib(90),
            state: StateCode::Replicating,
            ..AgentReport::default()
        }
    }

    fn process_server(&self, groups: &[GroupId], targets: &[String]) -> ProcessServerStatus {
        let epoch = self.world.epoch();
        let link = |address: &String| TargetLink {
            address: address.clone(),
            connected: true,
            applied: Epoch(epoch.0.saturating_sub(2)),
            backlog_bytes: ByteCount::ZERO,
            sent_bytes_total: ByteCount(epoch.0 * 400_000),
            sent_bytes_per_s: 4e5,
            state: StateCode::Replicating,
            last_error: None,
            next_try: None,
        };
        let group = |(number, group): (usize, &GroupId)| ProcessGroup {
            group: *group,
            generation: Generation(1),
            agent: Some(format!("machine-{number:04}")),
            cached: Epoch(epoch.0.saturating_sub(1)),
            cached_bytes: ByteCount(400_000),
            received_bytes_total: ByteCount(epoch.0 * 400_000),
            received_bytes_per_s: 4e5,
            targets: targets.iter().map(link).collect(),
            report: None,
            state: StateCode::Replicating,
            last_error: None,
            bottleneck: None,
        };
        ProcessServerStatus {
            time: UnixNanos::now(),
            name: self.name.clone(),
            version: env!("CARGO_PKG_VERSION").into(),
            state: StateCode::Replicating,
            cache_used: ByteCount::gib(1),
            cache_limit: ByteCount::gib(100),
            fsync_ms_p50: 1.5,
            fsync_ms_p99: 4.5,
            groups: groups.iter().enumerate().map(group).collect(),
            ..ProcessServerStatus::default()
        }
    }

    fn target_server(&self, groups: &[GroupId]) -> TargetServerStatus {
        let epoch = self.world.epoch();
        let volume = |number: u8, name: &str| VolumeSummary {
            id: VolumeId([number; 16]),
            name: name.to_owned(),
            size: DISK_BYTES,
        };
        let point = |epoch: Epoch, age: Duration| PointInfo {
            epoch,
            cut_time: ago(age),
            consistency: Consistency::Crash,
            note: PointNote::default(),
            changed_bytes: ByteCount(1_000_000),
            pin: None,
            kept_for: None,
            unusable: None,
        };
        let group = |(number, group): (usize, &GroupId)| {
            let age = if number % LATE_EVERY == 0 { LATE } else { BEHIND };
            TargetGroup {
                group: *group,
                generation: Generation(1),
                sender: Some("process".into()),
                volumes: vec![volume(1, "vda"), volume(2, "vdb")],
                applied: Epoch(epoch.0.saturating_sub(2)),
                applied_cut_time: ago(age),
                failover: None,
                promoted: None,
                proof: None,
                newest_point: Some(point(Epoch(epoch.0.saturating_sub(2)), age)),
                oldest_point: Some(point(Epoch(1), Duration::from_secs(86_400))),
                points: 400,
                newest_application_cut_time: Some(ago(LATE)),
                undo_bytes: ByteCount::gib(3),
                applied_bytes_total: ByteCount(epoch.0 * 400_000),
                applied_bytes_per_s: 4e5,
                apply_ms_p50: 3.5,
                apply_ms_p99: 12.5,
                state: StateCode::Replicating,
                last_error: None,
                warnings: Vec::new(),
            }
        };
        TargetServerStatus {
            time: UnixNanos::now(),
            name: self.name.clone(),
            version: env!("CARGO_PKG_VERSION").into(),
            state: StateCode::Replicating,
            groups: groups.iter().enumerate().map(group).collect(),
            ..TargetServerStatus::default()
        }
    }
}

fn ago(age: Duration) -> UnixNanos {
    UnixNanos(UnixNanos::now().0.saturating_sub(age.as_nanos() as u64))
}

/// A machine with two disks, as an agent tells of them every time.
fn disks() -> Vec<DiskInfo> {
    let disk = |device: &str, mounted: &str| DiskInfo {
        device: device.to_owned(),
        known_by: format!("serial:{}", device.replace('/', "-")),
        bytes: DISK_BYTES.0,
        uses: vec![DiskUse {
            device: format!("{device}1"),
            kind: "ext4".into(),
            mounted: mounted.to_owned(),
        }],
        written_bytes_per_s: Some(UnixNanos::now().0 % 1_000_000),
    };
    vec![disk("/dev/vda", "/"), disk("/dev/vdb", "/var/lib/data")]
}

impl Charge for Part {
    fn report(&self) -> CheckIn {
        let mut told = self.told.lock();
        let mut said = CheckIn {
            version: env!("CARGO_PKG_VERSION").into(),
            digest: told.digest.clone(),
            ..CheckIn::default()
        };
        let capacity = Capacity { bytes_total: STORE_BYTES, bytes_free: STORE_BYTES / 2 };
        match self.role {
            PartRole::Agent => said.disks = Some(disks()),
            PartRole::ProcessServer => {
                said.address = Some("127.0.0.1:7442".into());
                said.capacity = Some(capacity);
                said.report = Some(PartReport::ProcessServer(self.process_server(&[], &[])));
            }
            PartRole::TargetServer => {
                said.address = Some("127.0.0.1:7441".into());
                said.capacity = Some(capacity);
                said.sealing_key = Some(SEALING_KEY.into());
                said.report = Some(PartReport::TargetServer(self.target_server(&[])));
            }
        }
        match &told.desired {
            Some(Desired::Agent(desired)) if desired.protection.is_some() => {
                said.report = Some(PartReport::Agent(Box::new(self.agent())));
            }
            Some(Desired::ProcessServer(desired)) => {
                let groups: Vec<GroupId> = desired.groups.iter().map(|group| group.id).collect();
                let targets = desired.groups.first().map_or(&[][..], |group| &group.targets);
                said.report = Some(PartReport::ProcessServer(self.process_server(&groups, targets)));
            }
            Some(Desired::TargetServer(desired)) => {
                let groups: Vec<GroupId> = desired.groups.iter().map(|group| group.id).collect();
                said.report = Some(PartReport::TargetServer(self.target_server(&groups)));
            }
            _ => {}
        }
        if told.asked.is_some() {
            // The one before was not heard of.
            self.meter.failed();
        }
        told.asked = Some(Instant::now());
        said
    }

    fn hear(&self, reply: &CheckInReply) {
        let mut told = self.told.lock();
        if let Some(asked) = told.asked.take() {
            self.meter.took(check_in_of(self.role), asked.elapsed());
        }
        if let Some(desired) = &reply.desired {
            told.digest.clone_from(&reply.digest);
            told.desired = Some(desired.clone());
        }
    }

    fn begin(self: Arc<Self>, task: Task, done: TaskDone) {
        tokio::spawn(async move {
            match task.kind {
                TaskKind::CheckDisks { devices, .. } => {
                    let disk =
                        |device: &String| json!({ "device": device, "bytes": DISK_BYTES.0, "mode": "data" });
                    let disks: Vec<_> = devices.iter().map(disk).collect();
                    let link = json!({ "reached": true, "ms": 1.0 });
                    let bandwidth = json!({ "bytes": 8 << 20, "time_us": 100_000, "bytes_per_s": 80 << 20 });
                    let found = json!({ "disks": disks, "link": link, "bandwidth": bandwidth });
                    done.done("looked", found).await;
                }
                TaskKind::SealKey { group, targets } => {
                    let sealed = targets.iter().map(|to| {
                        let sealed = seal_key(group, KEY, &to.key).unwrap_or_default();
                        (to.target.to_string(), sealed.into())
                    });
                    let keys: serde_json::Map<_, _> = sealed.collect();
                    done.done("sealed", json!({ "keys": keys })).await;
                }
                other => done.failed(format!("a machine that is made up cannot do {other:?}")).await,
            }
        });
    }
}
