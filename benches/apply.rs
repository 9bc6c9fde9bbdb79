//! Applying an epoch with its undo layer, durably, against plain pwrite of the same extents and one fdatasync.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Instant;

use block::{Consistency, Epoch};
use changeset::{Changeset, Level, Opener, Payload, SealOptions, Stamp, seal};
use durable::RealStorage;
use replica::{GroupReplica, Options, Retention};
use seawall_benches::{Pair, compare, data};

fn main() -> anyhow::Result<()> {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    let fold = data::fold(&data::mix());
    let key = data::key();
    let mut epoch = Epoch::NONE;
    let mut next = || -> anyhow::Result<Changeset> {
        epoch = epoch.next();
        let stamp = Stamp { consistency: Consistency::Crash, ..data::stamp(epoch) };
        let sealed =
            seal(&stamp, &data::volumes(), &fold, &key, SealOptions { level: Level::Store, threads: 2 })?;
        let mut opener = Opener::new(key.clone(), data::GROUP, 2);
        sealed.pieces.into_iter().try_for_each(|piece| opener.push(piece))?;
        Ok(opener.finish()?)
    };
    let options =
        Options { retention: Retention { points_max: 3, ..Retention::default() }, ..Options::default() };
    let (replica, _) = GroupReplica::open(Arc::new(RealStorage), dir.path(), data::GROUP, options)?;
    // From the second epoch on there is a point to go back to, so every epoch gets its layer.
    replica.apply(&next()?)?;
    let plain = File::create(dir.path().join("plain"))?;
    plain.set_len(data::VOLUME_BYTES.0)?;
    let mut turn = 0;
    compare("apply", data::MIX_BYTES as u64, || {
        turn += 1;
        let changeset = next().expect("the mix seals and opens");
        let zeroes = vec![0; 1 << 20];
        let subject = || {
            let start = Instant::now();
            replica.apply(&changeset).expect("the epoch follows");
            start.elapsed()
        };
        let limit = || {
            let start = Instant::now();
            for change in changeset.changes() {
                let (offset, length) = (change.extent.offset().0, change.extent.length().0);
                match change.payload {
                    Payload::Data(bytes) => plain.write_all_at(bytes, offset).expect("the disk takes it"),
                    Payload::Zero => {
                        for at in (0..length).step_by(zeroes.len()) {
                            let part = &zeroes[..(length - at).min(zeroes.len() as u64) as usize];
                            plain.write_all_at(part, offset + at).expect("the disk takes it");
                        }
                    }
                }
            }
            plain.sync_data().expect("the disk syncs");
            start.elapsed()
        };
        if turn % 2 == 0 {
            let subject = subject();
            Pair { subject, limit: limit() }
        } else {
            let limit = limit();
            Pair { subject: subject(), limit }
        }
    })
}
