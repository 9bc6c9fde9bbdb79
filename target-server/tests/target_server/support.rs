//! A target server in a temporary directory, with peers that talk to it.

use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use block::{ByteCount, ByteOffset, Consistency, Epoch, Generation, GroupId, UnixNanos, VolumeId};
use bytes::Bytes;
use changeset::{Fold, GroupKey, Level, SealOptions, Stamp, VolumeInfo, seal};
use control::{OperatorRequest, PointsReply, ServerStatus, TargetServerStatus};
use seawall_target_server::{
    Config, GroupConfig, Handle, RetentionConfig, TargetServer, UpkeepConfig, ViewEnd, ViewHash,
};
use wire::{Authority, Credentials, Held, Identity, Operator, Receipts, Role, Sender, WireError, connect};

pub(crate) const GROUP: GroupId = GroupId([1; 16]);
pub(crate) const OTHER_GROUP: GroupId = GroupId([2; 16]);
pub(crate) const VOLUME: VolumeId = VolumeId([3; 16]);
pub(crate) const GENERATION: Generation = Generation(1);
pub(crate) const SIZE: u64 = 8 << 20;

pub(crate) struct Site {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) config: Config,
    pub(crate) server: Option<Handle>,
}

impl Site {
    pub(crate) async fn new() -> Site {
        let dir = tempfile::tempdir().unwrap();
        let authority = Authority::create(&dir.path().join("ca")).unwrap();
        let roles = [
            ("target", Role::TargetServer, None),
            ("process", Role::ProcessServer, None),
            ("operator", Role::Operator, None),
            ("agent", Role::Agent, Some(GROUP)),
        ];
        for (name, role, group) in roles {
            let identity = Identity::new(role, name, group).unwrap();
            authority.issue(&identity, &dir.path().join(name)).unwrap();
        }
        let groups = [GROUP, OTHER_GROUP].map(|id| GroupConfig {
            id,
            key: write_key(dir.path(), id),
            retention: RetentionConfig::default(),
            upkeep: UpkeepConfig::default(),
            adopt_generation: None,
            devices: Vec::new(),
        });
        let config = Config {
            config_server: None,
            adoptable_devices: Vec::new(),
            proof: Default::default(),
            listen: "127.0.0.1:0".to_owned(),
            credentials: dir.path().join("target"),
            data: dir.path().join("data"),
            threads: 2,
            groups: groups.into(),
        };
        let mut site = Site { dir, config, server: None };
        site.start().await;
        site
    }

    pub(crate) async fn start(&mut self) {
        self.server = Some(TargetServer::start(self.config.clone()).await.unwrap());
    }

    pub(crate) async fn restart(&mut self) {
        self.server.take().unwrap().shutdown().await;
        self.start().await;
    }

    pub(crate) fn addr(&self) -> String {
        self.server.as_ref().unwrap().local_addr().to_string()
    }

    pub(crate) fn credentials(&self, name: &str) -> Credentials {
        Credentials::load(&self.dir.path().join(name)).unwrap()
    }

    pub(crate) async fn sender(
        &self,
        group: GroupId,
        generation: Generation,
    ) -> Result<(Sender, Receipts), WireError> {
        self.sender_as("process", group, generation).await
    }

    pub(crate) async fn sender_as(
        &self,
        name: &str,
        group: GroupId,
        generation: Generation,
    ) -> Result<(Sender, Receipts), WireError> {
        let connection = connect(&self.addr(), Role::TargetServer, &self.credentials(name)).await?;
        Sender::open(connection, group, generation).await
    }

    /// Delivers epochs of the group and waits until the last is applied.
    pub(crate) async fn deliver(&self, epochs: impl IntoIterator<Item = Epochal>) {
        let (mut sender, mut receipts) = self.sender(GROUP, GENERATION).await.unwrap();
        let mut last = sender.held().applied;
        for epochal in epochs {
            last = epochal.epoch;
            deliver(&mut sender, &epochal).await.unwrap();
        }
        until_applied(&mut receipts, last, sender.held()).await;
    }

    pub(crate) async fn ask(&self, request: &OperatorRequest) -> Result<String, WireError> {
        let request = serde_json::to_string(request).unwrap();
        Operator::call(&self.addr(), Role::TargetServer, &self.credentials("operator"), &request).await
    }

    pub(crate) async fn status(&self) -> TargetServerStatus {
        let json = self.ask(&OperatorRequest::Status).await.unwrap();
        match serde_json::from_str(&json).unwrap() {
            ServerStatus::TargetServer(status) => status,
            other => panic!("{other:?}"),
        }
    }

    pub(crate) async fn points(&self) -> Vec<u64> {
        let json = self.ask(&OperatorRequest::Points { group: Some(GROUP) }).await.unwrap();
        let reply: PointsReply = serde_json::from_str(&json).unwrap();
        reply.groups[0].points.iter().map(|point| point.epoch.0).collect()
    }

    /// Scrubs everything of the group.
    pub(crate) async fn scrub(&self) -> control::ScrubReply {
        let request = serde_json::to_string(&OperatorRequest::Scrub { group: GROUP, volume: None }).unwrap();
        let credentials = self.credentials("operator");
        let mut reader =
            Operator::stream(&self.addr(), Role::TargetServer, &credentials, &request).await.unwrap();
        while let Some((_, line)) = reader.next().await.unwrap() {
            serde_json::from_slice::<control::ScrubProgressInfo>(&line).unwrap();
        }
        serde_json::from_str(reader.tail().unwrap()).unwrap()
    }

    /// Reads a view over the wire; checks its end against what came.
    pub(crate) async fn view(&self, point: control::PointSelector) -> Result<Vec<u8>, WireError> {
        let request = OperatorRequest::ReadView { group: GROUP, volume: VOLUME, point, ranges: Vec::new() };
        let request = serde_json::to_string(&request).unwrap();
        let credentials = self.credentials("operator");
        let mut reader = Operator::stream(&self.addr(), Role::TargetServer, &credentials, &request).await?;
        let head: control::ViewHead = serde_json::from_str(reader.head()).unwrap();
        let mut content = vec![0; head.volume.size.0 as usize];
        let (mut hash, mut bytes) = (ViewHash::new(), 0);
        while let Some((offset, data)) = reader.next().await? {
            content[offset.0 as usize..][..data.len()].copy_from_slice(&data);
            hash.update(offset, &data);
            bytes += data.len() as u64;
        }
        let end: ViewEnd = serde_json::from_str(reader.tail().unwrap()).unwrap();
        assert_eq!((end.tail.sent_bytes, end.blake3), (ByteCount(bytes), hash.finish()));
        Ok(content)
    }
}

pub(crate) fn key(group: GroupId) -> GroupKey {
    GroupKey::from_bytes([group.0[0]; 32])
}

fn write_key(dir: &Path, group: GroupId) -> PathBuf {
    use std::io::Write;
    let path = dir.join(format!("{group}.key"));
    let mut file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path).unwrap();
    writeln!(file, "{}", key(group).to_hex().as_str()).unwrap();
    path
}

/// A sealed changeset.
#[derive(Clone)]
pub(crate) struct Epochal {
    pub(crate) epoch: Epoch,
    pub(crate) bytes: Bytes,
}

/// What is different from a good changeset.
pub(crate) struct Make {
    pub(crate) group: GroupId,
    pub(crate) generation: Generation,
    pub(crate) key: GroupKey,
    pub(crate) consistency: Consistency,
}

impl Default for Make {
    fn default() -> Make {
        Make { group: GROUP, generation: GENERATION, key: key(GROUP), consistency: Consistency::Crash }
    }
}

/// An epoch that fills MiB number `epoch` of the volume with its own noise, and the first sector with its number.
pub(crate) fn epochal(epoch: u64) -> Epochal {
    Make::default().epochal(epoch)
}

impl Make {
    pub(crate) fn epochal(&self, epoch: u64) -> Epochal {
        let mut fold = Fold::new();
        fold.write(0, ByteOffset((epoch % 8) << 20), &noise(epoch));
        fold.write(0, ByteOffset(0), &[epoch as u8; 512]);
        let stamp = Stamp {
            group: self.group,
            generation: self.generation,
            epoch: Epoch(epoch),
            consistency: self.consistency,
            cut_time: UnixNanos(epoch),
        };
        let volumes =
            [VolumeInfo { id: VOLUME, name: "sda".to_owned(), size: ByteCount(SIZE), logical_block: 512 }];
        let options = SealOptions { level: Level::default(), threads: 1 };
        let sealed = seal(&stamp, &volumes, &fold, &self.key, options).unwrap();
        let bytes: Vec<u8> = sealed.pieces.iter().flat_map(|piece| piece.to_vec()).collect();
        Epochal { epoch: Epoch(epoch), bytes: bytes.into() }
    }
}

/// A MiB that cannot be compressed.
fn noise(seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mut words = Vec::with_capacity(1 << 20);
    while words.len() < 1 << 20 {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        words.extend_from_slice(&state.to_le_bytes());
    }
    words
}

/// What the volume holds at an epoch.
pub(crate) fn content(epoch: u64) -> Vec<u8> {
    let mut content = vec![0; SIZE as usize];
    for epoch in 1..=epoch {
        let at = ((epoch % 8) << 20) as usize;
        content[at..at + (1 << 20)].copy_from_slice(&noise(epoch));
        content[..512].fill(epoch as u8);
    }
    content
}

pub(crate) async fn deliver(sender: &mut Sender, epochal: &Epochal) -> Result<(), WireError> {
    sender.deliver(epochal.epoch, ByteCount(epochal.bytes.len() as u64), [epochal.bytes.clone()]).await
}

pub(crate) async fn until_applied(receipts: &mut Receipts, epoch: Epoch, mut held: Held) {
    while held.applied < epoch {
        held = receipts.next().await.unwrap();
        assert_eq!(held.held, held.applied);
    }
    assert_eq!(held.applied, epoch);
}
