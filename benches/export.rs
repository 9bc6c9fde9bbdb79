//! Reading an exported recovery point, against `qemu-nbd` serving the replica's raw image: the same client (fio) on a Unix
//! socket, the same bytes in the system's cache. Sequential reads of 1 MiB, four under way; random ones of 4 KiB, sixteen.
//! The point is the newest one, and for `export_seq_older` the one before, after which 1 % of the blocks have changed.

use std::path::Path;
use std::sync::Arc;

use block::Epoch;
use durable::RealStorage;
use export::{Disk, Export, Exported, Place, Security};
use replica::{GroupReplica, Options};
use seawall_benches::disk::{IMAGE_BYTES, fill};
use seawall_benches::nbd::{self, Qemu};
use seawall_benches::{Pair, compare, data};

fn main() -> anyhow::Result<()> {
    if !nbd::is_possible("export") {
        return Ok(());
    }
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    // Socket paths must be short.
    let sockets = tempfile::tempdir()?;
    let (replica, _) =
        GroupReplica::open(Arc::new(RealStorage), dir.path(), data::GROUP, Options::default())?;
    let newest = fill(&replica)?;
    let volume = replica.volumes().remove(0);
    let image = volume.path.clone();
    // Everything is in the cache from here on.
    std::io::copy(&mut std::fs::File::open(&image)?, &mut std::io::sink())?;

    let theirs = sockets.path().join("qemu.sock");
    let _server = Qemu::serve(&image, &theirs, true)?;
    let start = |epoch: Epoch, name: &str| -> anyhow::Result<(Export, std::path::PathBuf)> {
        let disk: Arc<dyn Disk> = Arc::new(replica.view(volume.info.id, epoch)?);
        let socket = sockets.path().join(name);
        let exported = Exported { name: String::new(), description: String::new(), disk };
        Ok((Export::start(vec![exported], Place::Socket(socket.clone()), Security::Open)?, socket))
    };
    let (_newest, ours) = start(newest, "newest.sock")?;
    let (_older, older) = start(Epoch(newest.0 - 1), "older.sock")?;
    let seq = ["--rw=read", "--bs=1m", "--iodepth=4"];
    let rand = ["--rw=randread", "--bs=4k", "--iodepth=16", "--norandommap", "--randrepeat=1"];
    for (name, socket, kind, bytes) in [
        ("export_seq", &ours, &seq[..], IMAGE_BYTES),
        ("export_seq_older", &older, &seq[..], IMAGE_BYTES),
        ("export_rand4k", &ours, &rand[..], IMAGE_BYTES / 4),
    ] {
        let mut turn = 0;
        compare(name, bytes, || {
            turn += 1;
            let read = |socket: &Path| nbd::fio(socket, kind, bytes).expect("fio reads");
            if turn % 2 == 0 {
                let subject = read(socket);
                Pair { subject, limit: read(&theirs) }
            } else {
                let limit = read(&theirs);
                Pair { subject: read(socket), limit }
            }
        })?;
    }
    Ok(())
}
