//! An authority, agents and target servers to put around a process server.

// Each test file uses its own part.
#![allow(dead_code, unreachable_pub)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use block::{ByteCount, Epoch, Generation, GroupId};
use bytes::Bytes;
use seawall_process_server::{Config, GroupConfig, ProcessServerSection};
use tokio::task::JoinHandle;
use wire::{
    Authority, Credentials, Held, Identity, Incoming, Listener, Opening, Operator, Receipts, RefusalCode,
    Role, Sender, WireError,
};

pub const LOCAL: &str = "127.0.0.1:0";
/// Long enough that it only passes when something hangs.
pub const HANG: Duration = Duration::from_secs(60);

pub fn group(number: u8) -> GroupId {
    GroupId([number; 16])
}

pub fn content(generation: u64, epoch: u64, size: usize) -> Bytes {
    let seed = generation.wrapping_mul(31).wrapping_add(epoch).wrapping_mul(0x9e37_79b9);
    (0..size).map(|index| (seed.wrapping_add(index as u64 * 7) >> 3) as u8).collect::<Vec<_>>().into()
}

/// A directory with everybody's credentials.
pub struct World {
    pub dir: tempfile::TempDir,
    authority: Authority,
}

impl World {
    pub fn new() -> World {
        let dir = tempfile::tempdir().unwrap();
        let authority = Authority::create(&dir.path().join("ca")).unwrap();
        World { dir, authority }
    }

    pub fn credentials(&self, role: Role, name: &str, group: Option<GroupId>) -> PathBuf {
        let dir = self.dir.path().join(format!("{role}-{name}"));
        if !dir.exists() {
            self.authority.issue(&Identity::new(role, name, group).unwrap(), &dir).unwrap();
        }
        dir
    }

    pub fn load(&self, role: Role, name: &str, group: Option<GroupId>) -> Arc<Credentials> {
        Arc::new(Credentials::load(&self.credentials(role, name, group)).unwrap())
    }

    pub fn config(&self, targets: &[(GroupId, &[&Target])]) -> Config {
        Config {
            config_server: None,
            process_server: ProcessServerSection {
                listen: LOCAL.to_owned(),
                credentials: self.credentials(Role::ProcessServer, "ps", None),
                cache: self.dir.path().join("cache"),
                cache_bytes: ByteCount::mib(192),
                targets: Vec::new(),
                resyncs_at_once: 4,
                retry: Default::default(),
            },
            groups: targets
                .iter()
                .map(|(id, targets)| GroupConfig {
                    id: *id,
                    targets: targets.iter().map(|target| target.address.clone()).collect(),
                })
                .collect(),
        }
    }

    pub async fn agent(&self, server: &str, number: u8, generation: u64) -> Result<Agent, WireError> {
        let credentials = self.load(Role::Agent, &format!("agent{number}"), Some(group(number)));
        let connection = wire::connect(server, Role::ProcessServer, &credentials).await?;
        let (sender, receipts) = Sender::open(connection, group(number), Generation(generation)).await?;
        Ok(Agent { held: sender.held(), sender, receipts, generation })
    }

    pub async fn comparison(&self, server: &str, number: u8) -> wire::Comparison {
        let credentials = self.load(Role::Agent, &format!("agent{number}"), Some(group(number)));
        let connection = wire::connect_for(wire::Purpose::Compare, server, Role::ProcessServer, &credentials)
            .await
            .unwrap();
        wire::Comparison::open(connection, group(number), Generation(1), [number; 16]).await.unwrap()
    }

    pub async fn target(&self, name: &str) -> Target {
        let credentials = self.load(Role::TargetServer, name, None);
        let listener = Listener::bind(LOCAL, credentials).await.unwrap();
        Target::run(listener, Arc::default())
    }

    pub async fn operator(&self, server: &str, request: &str) -> Result<String, WireError> {
        let credentials = self.load(Role::Operator, "op", None);
        Operator::call(server, Role::ProcessServer, &credentials, request).await
    }
}

pub struct Agent {
    pub sender: Sender,
    pub receipts: Receipts,
    pub held: Held,
    pub generation: u64,
}

impl Agent {
    pub async fn put(&mut self, epoch: u64, size: usize) -> Result<(), WireError> {
        let bytes = content(self.generation, epoch, size);
        self.sender.deliver(Epoch(epoch), ByteCount(size as u64), [bytes]).await
    }

    pub async fn wait(&mut self, enough: impl Fn(Held) -> bool) -> Result<Held, WireError> {
        while !enough(self.held) {
            self.held = tokio::time::timeout(HANG, self.receipts.next()).await.expect("hangs")?;
        }
        Ok(self.held)
    }

    pub async fn wait_cached(&mut self, epoch: u64) {
        self.wait(|held| held.held >= Epoch(epoch)).await.unwrap();
    }

    pub async fn wait_applied(&mut self, epoch: u64) {
        self.wait(|held| held.applied >= Epoch(epoch)).await.unwrap();
    }
}

/// What a target server got, by group.
#[derive(Default)]
pub struct Applied {
    pub got: BTreeMap<GroupId, Vec<(u64, u64, Bytes)>>,
    /// Generations before it are refused.
    pub fence: u64,
    /// What it held of a generation when that began.
    pub begins: BTreeMap<u64, u64>,
    /// Takes nothing while set.
    pub stuck: bool,
    pub refuse: Option<RefusalCode>,
    /// What it says of its replicas.
    pub condition: Option<wire::Condition>,
}

/// A target server that "applies" into memory.
pub struct Target {
    pub address: String,
    pub applied: Arc<Mutex<Applied>>,
    cut: Arc<tokio::sync::Notify>,
    task: JoinHandle<()>,
}

impl Target {
    pub fn run(listener: Listener, applied: Arc<Mutex<Applied>>) -> Target {
        let address = listener.local_addr().to_string();
        let state = applied.clone();
        let cut = Arc::new(tokio::sync::Notify::new());
        let cuts = cut.clone();
        let task = tokio::spawn(async move {
            // Dropped with the task, so that a stopped target is really gone.
            let mut connections = tokio::task::JoinSet::new();
            loop {
                tokio::select! {
                    pending = listener.accept() => {
                        connections.spawn(serve(pending.unwrap(), state.clone()));
                    }
                    () = cuts.notified() => connections.abort_all(),
                }
            }
        });
        Target { address, applied, cut, task }
    }

    /// Cuts its connections.
    pub fn cut(&self) {
        self.cut.notify_one();
    }

    /// Stops it at once, like a machine that is switched off. Gives what is on its disk.
    pub async fn stop(self) -> Arc<Mutex<Applied>> {
        self.task.abort();
        let _ = self.task.await;
        self.applied
    }

    pub fn got(&self, number: u8) -> Vec<(u64, u64, Bytes)> {
        self.applied.lock().unwrap().got.get(&group(number)).cloned().unwrap_or_default()
    }

    /// Asserts that exactly these were applied, in order, with the right content.
    pub fn assert_got(&self, number: u8, expected: &[(u64, u64, usize)]) {
        let got = self.got(number);
        let names: Vec<_> =
            got.iter().map(|(generation, epoch, bytes)| (*generation, *epoch, bytes.len())).collect();
        assert_eq!(names, expected);
        for (generation, epoch, bytes) in got {
            assert!(bytes == content(generation, epoch, bytes.len()), "content of epoch {epoch}");
        }
    }

    pub fn change(&self, change: impl FnOnce(&mut Applied)) {
        change(&mut self.applied.lock().unwrap());
    }
}

async fn serve(pending: wire::Pending, state: Arc<Mutex<Applied>>) {
    let Ok(connection) = pending.handshake().await else { return };
    let mut receiver = match Opening::read(connection).await {
        Ok(Opening::Deliver(receiver)) => receiver,
        // Says back what it hears.
        Ok(Opening::Compare(mut comparison)) => {
            let _ = comparison.tell_turn(wire::Turn { ahead: 0, at_once: 1 }).await;
            while let Ok((number, message)) = comparison.next().await {
                let _ = comparison.send(number, message).await;
            }
            return;
        }
        _ => return,
    };
    let (group, generation) = (receiver.group(), receiver.generation().0);
    let answerer = receiver.answerer();
    let (fence, refuse) = {
        let state = state.lock().unwrap();
        (state.fence, state.refuse)
    };
    if let Some(code) = refuse {
        return answerer.refuse(code, "told to refuse");
    }
    if generation < fence {
        return answerer.refuse(RefusalCode::Generation, "fenced");
    }
    let last = |state: &Applied| {
        let of_generation = state.got.get(&group).into_iter().flatten().filter(|got| got.0 == generation);
        let begins = state.begins.get(&generation).copied().unwrap_or(0);
        Epoch(of_generation.map(|got| got.1).max().unwrap_or(begins))
    };
    let held = last(&state.lock().unwrap());
    receiver.accept(Held { held, applied: held }, ByteCount::mib(4));
    let mut open = None;
    while let Ok(Some(incoming)) = receiver.next().await {
        while state.lock().unwrap().stuck {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        match (incoming, &mut open) {
            (Incoming::Begin { epoch, .. }, open) => *open = Some((epoch, Vec::new())),
            (Incoming::Data(bytes), Some((_, all))) => {
                all.extend_from_slice(&bytes);
                answerer.grant(ByteCount(bytes.len() as u64));
            }
            (Incoming::End, open) => {
                let (epoch, bytes) = open.take().unwrap();
                let mut state = state.lock().unwrap();
                let last = last(&state);
                let begins = last == Epoch::NONE && !state.got.contains_key(&group);
                assert!(
                    epoch == last.next() || begins,
                    "in order, nothing twice, nothing left out: {epoch} after {last}"
                );
                state.got.entry(group).or_default().push((generation, epoch.0, bytes.into()));
                answerer.hold(Held { held: epoch, applied: epoch });
                if let Some(condition) = state.condition {
                    answerer.tell(condition);
                }
            }
            _ => {}
        }
    }
}

pub fn cache_dir(world: &World) -> PathBuf {
    world.dir.path().join("cache")
}

/// The process server's own program.
pub fn program() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_seawall-process-server"))
}

pub async fn until(what: &str, mut done: impl FnMut() -> bool) {
    let waited = async {
        while !done() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(HANG, waited).await.unwrap_or_else(|_| panic!("{what} does not happen"));
}
