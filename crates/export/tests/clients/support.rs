//! A replica with two points, exports of it, and the programs that use them.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use block::{ByteCount, ByteOffset, Consistency, Epoch, Extent, Generation, GroupId, UnixNanos, VolumeId};
use changeset::{Changeset, Fold, GroupKey, Level, Opener, SealOptions, Stamp, VolumeInfo, seal};
use durable::RealStorage;
use export::{Disk, Export, Exported, Overlay, Place, Security, Space};
use replica::{GroupReplica, Options, Pace, PromotedVolume};

const GROUP: GroupId = GroupId([5; 16]);
const VOLUME: VolumeId = VolumeId([6; 16]);
/// Not a whole number of blocks.
pub(crate) const SIZE: u64 = (48 << 20) + 512;

/// Which of the two points.
#[derive(Clone, Copy, Debug)]
pub(crate) enum At {
    Older,
    Newest,
}

pub(crate) struct Lab {
    pub(crate) dir: tempfile::TempDir,
    replica: Arc<GroupReplica>,
    older: Vec<u8>,
    newest: Vec<u8>,
}

impl Lab {
    pub(crate) fn new() -> Lab {
        let dir = tempfile::tempdir().unwrap();
        let data = dir.path().join("data");
        let replica = Arc::new(open(&data));
        let mut content = vec![0; SIZE as usize];
        let mut write = |fold: &mut Fold, offset: usize, length: usize, seed: u64| {
            let bytes = noise(length, seed);
            fold.write(0, ByteOffset(offset as u64), &bytes);
            content[offset..offset + length].copy_from_slice(&bytes);
        };
        let mut fold = Fold::new();
        write(&mut fold, 0, 5 << 20, 1);
        write(&mut fold, 20 << 20, 3 << 20, 2);
        write(&mut fold, SIZE as usize - 512, 512, 3);
        replica.apply(&changeset(1, &fold)).unwrap();
        let mut fold = Fold::new();
        write(&mut fold, 4096, 8192, 4);
        write(&mut fold, (4 << 20) + 512, 1024, 5);
        write(&mut fold, 30 << 20, 1 << 20, 6);
        let older = {
            let mut older = vec![0; SIZE as usize];
            older[..5 << 20].copy_from_slice(&noise(5 << 20, 1));
            older[20 << 20..23 << 20].copy_from_slice(&noise(3 << 20, 2));
            older[SIZE as usize - 512..].copy_from_slice(&noise(512, 3));
            older
        };
        fold.zero(0, Extent::new(ByteOffset(21 << 20), ByteCount::mib(1)).unwrap());
        content[21 << 20..22 << 20].fill(0);
        replica.apply(&changeset(2, &fold)).unwrap();
        Lab { dir, replica, older, newest: content }
    }

    pub(crate) fn content(&self, at: At) -> &[u8] {
        match at {
            At::Older => &self.older,
            At::Newest => &self.newest,
        }
    }

    /// The content as a file.
    pub(crate) fn image(&self, at: At) -> PathBuf {
        let path = self.path(&format!("{at:?}.img"));
        std::fs::write(&path, self.content(at)).unwrap();
        path
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn view(&self, at: At) -> Arc<dyn Disk> {
        let epoch = match at {
            At::Older => Epoch(1),
            At::Newest => Epoch(2),
        };
        Arc::new(self.replica.view(VOLUME, epoch).unwrap())
    }

    pub(crate) fn view_at(&self, epoch: Epoch) -> Arc<dyn Disk> {
        Arc::new(self.replica.view(VOLUME, epoch).unwrap())
    }

    /// A writable disk.
    pub(crate) fn overlay(&self, at: At, limit: ByteCount) -> Arc<Overlay> {
        let dir = self.path("overlays");
        let space = Space::in_dir(self.dir.path(), limit);
        Arc::new(Overlay::create(&RealStorage, &dir, "1", self.view(at), space).unwrap())
    }

    /// The volume of the group, which is failed over to the older point and promoted.
    pub(crate) fn promoted(&self) -> Arc<PromotedVolume> {
        if self.replica.promoted().is_none() {
            self.replica.fail_over(Epoch(1), Generation(9), &Pace::unbounded()).unwrap();
            self.replica.promote().unwrap();
        }
        Arc::new(self.replica.promoted_volume(VOLUME).unwrap())
    }

    /// Opened anew, as by another process. Nobody may use the old one any more.
    pub(crate) fn reopened(self) -> Lab {
        drop(Arc::into_inner(self.replica).expect("nobody else has it"));
        Lab { replica: Arc::new(open(&self.dir.path().join("data"))), ..self }
    }

    pub(crate) fn replica(&self) -> &Arc<GroupReplica> {
        &self.replica
    }

    /// Serves a disk on a socket.
    pub(crate) fn serve(&self, disk: Arc<dyn Disk>) -> Served {
        let socket = self.path("nbd.sock");
        let export = start(disk, Place::Socket(socket.clone()), Security::Open);
        Served { uri: format!("nbd+unix:///sda?socket={}", socket.display()), socket, export }
    }
}

fn open(data: &Path) -> GroupReplica {
    GroupReplica::open(Arc::new(RealStorage), data, GROUP, Options::default()).unwrap().0
}

pub(crate) fn start(disk: Arc<dyn Disk>, place: Place, security: Security) -> Export {
    let exported = Exported { name: "sda".into(), description: "a disk of the test".into(), disk };
    Export::start(vec![exported], place, security).unwrap()
}

pub(crate) struct Served {
    pub(crate) uri: String,
    pub(crate) socket: PathBuf,
    pub(crate) export: Export,
}

fn changeset(epoch: u64, fold: &Fold) -> Changeset {
    let key = || GroupKey::from_bytes([3; 32]);
    let stamp = Stamp {
        group: GROUP,
        generation: Generation(1),
        epoch: Epoch(epoch),
        consistency: Consistency::Crash,
        cut_time: UnixNanos(epoch),
    };
    let volumes = [VolumeInfo { id: VOLUME, name: "sda".into(), size: ByteCount(SIZE), logical_block: 512 }];
    let sealed =
        seal(&stamp, &volumes, fold, &key(), SealOptions { level: Level::default(), threads: 1 }).unwrap();
    let mut opener = Opener::new(key(), GROUP, 1);
    for piece in sealed.pieces {
        opener.push(piece).unwrap();
    }
    opener.finish().unwrap()
}

/// Bytes without zeroes that cannot be guessed from their place.
pub(crate) fn noise(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 24) as u8 | 1
    };
    (0..length).map(|_| next()).collect()
}

/// Runs a program that must succeed; its standard output.
pub(crate) fn run(program: &str, arguments: &[&str]) -> String {
    match attempt(program, arguments) {
        Ok(output) => output,
        Err(error) => panic!("{program} {arguments:?}: {error}"),
    }
}

/// Runs a program; what it said when it failed.
pub(crate) fn attempt(program: &str, arguments: &[&str]) -> Result<String, String> {
    // Debian's own, with its own Python for nbdsh. None of them takes long unless something hangs.
    let output = Command::new("timeout")
        .args(["120", program])
        .args(arguments)
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .output()
        .unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    if output.status.success() {
        Ok(text(&output.stdout))
    } else {
        Err(format!("{}: {}{}", output.status, text(&output.stdout), text(&output.stderr)))
    }
}

pub(crate) fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Whether the programs are there; if not, says that the test cannot run. `cargo xtask test` installs them.
pub(crate) fn installed(test: &str, programs: &[&str]) -> bool {
    let missing: Vec<_> = programs
        .iter()
        .filter(|program| {
            !["/usr/sbin", "/usr/bin", "/sbin", "/bin"]
                .iter()
                .any(|dir| Path::new(dir).join(program).exists())
        })
        .collect();
    if !missing.is_empty() {
        cannot_run(test, &format!("{missing:?} are not installed"));
    }
    missing.is_empty()
}

pub(crate) fn cannot_run(test: &str, why: &str) {
    eprintln!("NOT RUN: {test}: {why}");
    assert!(std::env::var_os("CI").is_none(), "{test} must run in CI, but: {why}");
}

/// What nbdsh prints when it runs `script` on an export.
pub(crate) fn nbdsh(uri: &str, script: &str) -> Result<String, String> {
    let connect = format!(
        "h.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)\nh.set_strict_mode(0)\nh.connect_uri({uri:?})"
    );
    attempt("nbdsh", &["-c", &connect, "-c", script])
}

/// Writes, zeroes, discards and reads with qemu-io; what a disk holds after it is [`written`].
pub(crate) fn write_and_read(uri: &str) {
    let commands = [
        "write -P 0x5a 4k 64k",
        "write -f -P 0x5b 1000k 3M",
        "write -P 0x33 700 300",
        "write -z 8k 8k",
        "write -z -u 2M 1M",
        "discard 3M 512k",
        "flush",
        "read -P 0x5a 4k 4k",
        "read -P 0 8k 8k",
        "read -P 0x5a 16k 52k",
        "read -P 0x5b 1000k 24k",
        "read -P 0 2M 1M",
        "read -P 0 3M 512k",
        "read -P 0x33 700 300",
    ];
    let mut arguments = vec!["-f", "raw"];
    for command in &commands {
        arguments.extend(["-c", command]);
    }
    arguments.push(uri);
    let output = run("qemu-io", &arguments);
    assert!(!output.contains("Pattern verification failed") && !output.contains("error"), "{output}");
}

/// What [`write_and_read`] makes of a disk.
pub(crate) fn written(disk: &mut [u8]) {
    for (start, length, byte) in [
        (4 << 10, 64 << 10, 0x5a),
        (1000 << 10, 3 << 20, 0x5b),
        (700, 300, 0x33),
        (8 << 10, 8 << 10, 0),
        (2 << 20, 1 << 20, 0),
        (3 << 20, 512 << 10, 0),
    ] {
        disk[start..start + length].fill(byte);
    }
}
