//! Parts that are played: they report what a test wants, and do what they are told as real ones would answer.

use std::time::Duration;

use block::{ByteCount, Consistency, Epoch, Generation, GroupId, PointNote, UnixNanos, VolumeId};
use control::fleet::{
    Capacity, CheckIn, CheckInReply, Desired, DesiredTargetServer, GroupInfo, JobInfo, JobState, MachineInfo,
    Page, PartReport, PartRole, Protect, ResourceId, TaskKind, TaskState, TaskUpdate, UnixMillis,
    VolumeChoice,
};
use control::{
    AgentReport, CaptureMode, FailoverInfo, PointInfo, PointSelector, ProcessServerStatus, PromotedInfo,
    StateCode, TargetGroup, TargetServerStatus, VolumeReport, VolumeSummary,
};
use enrol::Client;
use serde_json::json;

use crate::support::Site;

/// A machine, a process server and a target server.
pub(crate) struct Parts {
    pub(crate) agent: Client,
    process: Client,
    target: Client,
    digests: [String; 3],
    /// How old the newest recovery point is; `None` before there is one.
    pub(crate) age: Option<Duration>,
    pub(crate) agent_state: StateCode,
    /// What the target keeps.
    group: Option<GroupId>,
    protects: bool,
    /// What the agent was asked to do, each once.
    pub(crate) asked: Vec<(ResourceId, TaskKind)>,
    /// Whether the agent says how its tasks go.
    pub(crate) answers: bool,
    /// Scripts that the agent has not done yet, by name.
    pub(crate) at_work: Vec<&'static str>,
    /// Where the target stands.
    pub(crate) standing: Standing,
    /// Of the agent: its disks are handed over.
    pub(crate) handed_over: bool,
    /// What the target was asked, in order, each as often as it did it.
    pub(crate) done_at_target: Vec<String>,
    /// The target begins what it is asked, and does not say so.
    pub(crate) mute_target: bool,
    /// Machines and drills that the target was asked to start.
    pub(crate) started: Vec<TaskKind>,
    /// What is started there does not come up.
    pub(crate) machine_fails: bool,
    /// Recovery points at the target, once there is one.
    pub(crate) points: u64,
    /// What the target was told last.
    pub(crate) told_target: DesiredTargetServer,
}

/// Where a played target stands in a failover.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Standing {
    pub(crate) generation: u64,
    pub(crate) failover: Option<FailoverInfo>,
    pub(crate) promoted: Option<PromotedInfo>,
}

impl Standing {
    /// Does what a target does, once.
    fn take(&mut self, kind: &TaskKind) -> bool {
        let before = (self.generation, self.failover.is_some(), self.promoted.is_some());
        match kind {
            TaskKind::FailOver { point, .. } if self.failover.is_none() => {
                self.failover = Some(FailoverInfo {
                    point: if let PointSelector::Epoch(epoch) = point { *epoch } else { Epoch(7) },
                    from: Generation(self.generation),
                    ended: Epoch(7),
                    complete: true,
                    written_bytes: ByteCount::ZERO,
                });
                self.generation += 1;
            }
            TaskKind::CommitFailover { .. } => self.failover = None,
            TaskKind::CancelFailover { .. } if self.failover.is_some() => {
                self.failover = None;
                self.generation -= 1;
            }
            TaskKind::Promote { .. } => {
                self.promoted =
                    Some(PromotedInfo { since: UnixNanos::now(), waiting_bytes: ByteCount::ZERO, open: 0 });
            }
            TaskKind::Demote { .. } => self.promoted = None,
            _ => {}
        }
        before != (self.generation, self.failover.is_some(), self.promoted.is_some())
    }
}

impl Parts {
    pub(crate) async fn enrol(site: &Site) -> Parts {
        Parts::enrol_as(site, ["web", "hub", "dr"]).await
    }

    pub(crate) async fn enrol_as(site: &Site, [machine, hub, target]: [&str; 3]) -> Parts {
        let part = async |role, name| site.part(&site.enrol(role, name).await);
        Parts {
            agent: part(PartRole::Agent, machine).await,
            process: part(PartRole::ProcessServer, hub).await,
            target: part(PartRole::TargetServer, target).await,
            points: 1,
            started: Vec::new(),
            machine_fails: false,
            told_target: DesiredTargetServer::default(),
            digests: Default::default(),
            age: Some(Duration::from_secs(1)),
            agent_state: StateCode::Replicating,
            group: None,
            protects: false,
            standing: Standing { generation: 1, failover: None, promoted: None },
            handed_over: false,
            done_at_target: Vec::new(),
            mute_target: false,
            asked: Vec::new(),
            answers: true,
            at_work: Vec::new(),
        }
    }

    /// Each reports once, and does what it is told.
    pub(crate) async fn round(&mut self) {
        self.agent_round().await;
        self.servers_round().await;
    }

    pub(crate) async fn agent_round(&mut self) {
        let mut said = base();
        let report = AgentReport { handed_over: self.handed_over, ..agent_report(self.agent_state) };
        said.report = self.protects.then(|| PartReport::Agent(Box::new(report)));
        let reply = say(&self.agent, &mut self.digests[0], said).await;
        if let Some(Desired::Agent(told)) = &reply.desired {
            self.protects = told.protection.is_some();
            self.group = told.protection.as_ref().map(|protection| protection.group).or(self.group);
        }
        let mut done = Vec::new();
        for task in reply.tasks {
            if !self.asked.iter().any(|(id, _)| *id == task.id) {
                self.asked.push((task.id.clone(), task.kind.clone()));
            }
            if !self.answers || self.at_work.iter().any(|script| is_of(&task.kind, script)) {
                continue;
            }
            let result = match task.kind {
                TaskKind::CheckDisks { devices, .. } => json!({
                    "disks": devices.iter().map(|device| json!({"device": device, "bytes": 1 << 30, "mode": "data"})).collect::<Vec<_>>(),
                    "link": {"reached": true, "ms": 1.0},
                    "bandwidth": {"bytes": 8 << 20, "time_us": 100_000, "bytes_per_s": 80 << 20},
                }),
                TaskKind::SealKey { targets, .. } => {
                    let keys =
                        targets.iter().map(|seal_for| (seal_for.target.to_string(), json!("ab".repeat(80))));
                    json!({"keys": keys.collect::<serde_json::Map<_, _>>()})
                }
                TaskKind::HandOver => {
                    self.handed_over = true;
                    json!({"epoch": 9, "equal": 1 << 30, "different": 0})
                }
                TaskKind::Release { .. } => {
                    self.handed_over = false;
                    json!({})
                }
                // A script whose name says so fails, or is not there.
                TaskKind::Script { command, .. } | TaskKind::CheckScript { command }
                    if command == "absent" =>
                {
                    let message = format!("find script {command}: there is none");
                    done.push(TaskUpdate {
                        id: task.id,
                        state: TaskState::Failed,
                        message,
                        result: json!(null),
                    });
                    continue;
                }
                TaskKind::Script { command, arguments, .. } => {
                    let fails = command == "fails"
                        && self.asked.iter().filter(|(_, kind)| is_of(kind, "fails")).count() == 1;
                    json!({ "succeeded": !fails, "how": "", "output": format!("{command} {}\n", arguments.join(" ")) })
                }
                _ => json!({}),
            };
            done.push(TaskUpdate { id: task.id, state: TaskState::Done, message: "Done.".into(), result });
        }
        if !done.is_empty() {
            let report = AgentReport { handed_over: self.handed_over, ..agent_report(self.agent_state) };
            let report = self.protects.then(|| PartReport::Agent(Box::new(report)));
            say(&self.agent, &mut self.digests[0], CheckIn { tasks: done, report, ..base() }).await;
        }
    }

    pub(crate) async fn servers_round(&mut self) {
        let process = CheckIn {
            address: Some("hub.example:7440".into()),
            report: Some(PartReport::ProcessServer(ProcessServerStatus {
                cache_used: ByteCount::gib(1),
                cache_limit: ByteCount::gib(16),
                state: StateCode::Replicating,
                ..ProcessServerStatus::default()
            })),
            ..base()
        };
        say(&self.process, &mut self.digests[1], process).await;
        let reply = self.target_says(Vec::new()).await;
        let mut done = Vec::new();
        for task in reply.tasks {
            if self.standing.take(&task.kind) {
                let json = serde_json::to_value(&task.kind).unwrap();
                self.done_at_target.push(json["task"].as_str().unwrap().to_owned());
            }
            let result = json!({"generation": self.standing.generation, "epoch": 8});
            let (mut state, mut message) = (TaskState::Done, "done at the target.");
            let fails = self.machine_fails && matches!(task.kind, TaskKind::Prove { .. });
            if matches!(task.kind, TaskKind::Prove { .. } | TaskKind::Drill { .. }) {
                self.started.push(task.kind);
                if fails {
                    (state, message) =
                        (TaskState::Failed, "Point 7 did not come up: no disk.\nThe last it said: ...");
                }
            }
            done.push(TaskUpdate { id: task.id, state, message: message.to_owned(), result });
        }
        if !done.is_empty() && !self.mute_target {
            self.target_says(done).await;
        }
    }

    async fn target_says(&mut self, tasks: Vec<TaskUpdate>) -> CheckInReply {
        let standing = self.standing;
        let groups = self.group.map(|group| TargetGroup {
            generation: Generation(standing.generation),
            failover: standing.failover,
            promoted: standing.promoted,
            points: if self.age.is_some() { self.points } else { 0 },
            ..target_group(group, self.age)
        });
        let target = CheckIn {
            tasks,
            address: Some("dr.example:7441".into()),
            sealing_key: Some("12".repeat(32)),
            capacity: Some(Capacity { bytes_total: 1 << 40, bytes_free: 1 << 39 }),
            report: Some(PartReport::TargetServer(TargetServerStatus {
                groups: groups.into_iter().collect(),
                state: StateCode::Replicating,
                ..TargetServerStatus::default()
            })),
            ..base()
        };
        let reply = say(&self.target, &mut self.digests[2], target).await;
        if let Some(Desired::TargetServer(told)) = &reply.desired {
            self.told_target.clone_from(told);
        }
        reply
    }

    /// Has the machine's disk protected, up to the first recovery point.
    pub(crate) async fn protect(&mut self, operator: &Client) -> GroupInfo {
        self.round().await;
        let machines: Page<MachineInfo> = operator.get("/machines").await.unwrap();
        let machine = &machines.items[0];
        let disk = VolumeChoice::of("/dev/vdb");
        let asked = Protect {
            volumes: vec![disk],
            policy: None,
            process_server: None,
            target_servers: vec![],
            despite_warnings: false,
            reverses: None,
        };
        let job: JobInfo = operator.post(&format!("/machines/{}/protect", machine.id), &asked).await.unwrap();
        self.until_ended(operator, job).await;
        operator.get(&format!("/groups/{}", machine.group)).await.unwrap()
    }

    /// Goes on until a job has ended well.
    pub(crate) async fn until_ended(&mut self, operator: &Client, job: JobInfo) -> JobInfo {
        self.until(operator, job, JobState::Done).await
    }

    /// Goes on until a job has ended in this way.
    pub(crate) async fn until(&mut self, operator: &Client, job: JobInfo, how: JobState) -> JobInfo {
        for _ in 0..600 {
            self.round().await;
            let job: JobInfo = operator.get(&format!("/jobs/{}", job.id)).await.unwrap();
            if job.state.ended() {
                assert_eq!(job.state, how, "{job:#?}");
                return job;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        panic!("the job does not end: {:?}", operator.get::<JobInfo>(&format!("/jobs/{}", job.id)).await);
    }
}

/// Whether a task is to run this script.
pub(crate) fn is_of(kind: &TaskKind, script: &str) -> bool {
    matches!(kind, TaskKind::Script { command, .. } if command == script)
}

fn base() -> CheckIn {
    CheckIn { version: "1".into(), time: UnixMillis::now(), ..CheckIn::default() }
}

/// A check-in, and the digest of what it was told from then on.
async fn say(client: &Client, digest: &mut String, mut said: CheckIn) -> CheckInReply {
    said.digest.clone_from(digest);
    let reply: CheckInReply = client.post("/part/check-in", &said).await.unwrap();
    digest.clone_from(&reply.digest);
    reply
}

fn agent_report(state: StateCode) -> AgentReport {
    let volume = VolumeSummary { id: VolumeId([1; 16]), name: "vdb".into(), size: ByteCount::gib(1) };
    AgentReport {
        time: UnixNanos::now(),
        volumes: vec![VolumeReport {
            volume,
            device: "/dev/vdb".into(),
            mode: CaptureMode::Data,
            dirty_bytes: ByteCount::mib(1),
            draining_bytes: ByteCount::ZERO,
            drained_total: ByteCount::ZERO,
        }],
        churn_bytes_per_s: 1e6,
        sent_bytes_per_s: 5e5,
        state,
        ..AgentReport::default()
    }
}

fn target_group(group: GroupId, age: Option<Duration>) -> TargetGroup {
    let nanos = |age: Duration| u64::try_from(age.as_nanos()).unwrap();
    let cut = |age| UnixNanos(UnixNanos::now().0 - nanos(age));
    let point = age.map(|age| PointInfo {
        epoch: Epoch(7),
        cut_time: cut(age),
        consistency: Consistency::Crash,
        note: PointNote::default(),
        changed_bytes: ByteCount(4096),
        pin: None,
        kept_for: None,
        unusable: None,
    });
    TargetGroup {
        group,
        generation: Generation(1),
        sender: Some("hub".into()),
        volumes: Vec::new(),
        applied: Epoch(if age.is_some() { 7 } else { 0 }),
        applied_cut_time: age.map_or(UnixNanos(0), cut),
        failover: None,
        promoted: None,
        oldest_point: point.clone(),
        points: u64::from(point.is_some()),
        proof: None,
        newest_point: point,
        newest_application_cut_time: None,
        undo_bytes: ByteCount::mib(1),
        applied_bytes_total: ByteCount::mib(2),
        applied_bytes_per_s: 1.0,
        apply_ms_p50: 1.0,
        apply_ms_p99: 2.0,
        state: if age.is_some() { StateCode::Replicating } else { StateCode::InitialCopy },
        last_error: None,
        warnings: Vec::new(),
    }
}
