//! Writing to a promoted group's volume with the clients that people use: it stays, and the points from before are what they were.

use std::sync::atomic::{AtomicBool, Ordering};

use block::{ByteOffset, Epoch};
use export::Disk;

use crate::support::{At, Lab, SIZE, installed, nbdsh, noise, run, text, write_and_read, written};

fn whole(disk: &dyn Disk) -> Vec<u8> {
    let mut bytes = vec![0; disk.size().0 as usize];
    for (index, piece) in bytes.chunks_mut(1 << 20).enumerate() {
        disk.read_at(piece, ByteOffset((index as u64) << 20)).unwrap();
    }
    bytes
}

/// Cuts without a pause while `work` runs.
fn while_cut(lab: &Lab, work: impl FnOnce()) {
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                lab.replica().cut_promoted().unwrap();
            }
        });
        work();
        done.store(true, Ordering::Relaxed);
    });
}

#[test]
fn what_qemu_writes_stays() {
    if !installed("what_qemu_writes_stays", &["qemu-io"]) {
        return;
    }
    let lab = Lab::new();
    let mut expected = lab.content(At::Older).to_vec();
    let served = lab.serve(lab.promoted());
    write_and_read(&served.uri);
    drop(served);
    written(&mut expected);
    let (older, newest) = (lab.content(At::Older).to_vec(), lab.content(At::Newest).to_vec());
    let lab = lab.reopened();
    assert!(whole(&*lab.promoted()) == expected, "opened again, before anything was cut");
    lab.replica().demote().unwrap();
    let last = lab.replica().applied().1;
    assert!(whole(&*lab.view_at(last)) == expected, "demoted");
    assert!(whole(&*lab.view_at(Epoch(1))) == older && whole(&*lab.view_at(Epoch(2))) == newest);
}

/// A whole disk copied in on several connections while it is cut, and out again.
#[test]
fn nbdcopy_writes_a_promoted_disk() {
    if !installed("nbdcopy_writes_a_promoted_disk", &["nbdcopy"]) {
        return;
    }
    let lab = Lab::new();
    let served = lab.serve(lab.promoted());
    let mut content = noise(SIZE as usize, 78);
    content[10 << 20..20 << 20].fill(0);
    let (source, copy) = (lab.path("source.img"), lab.path("copy.img"));
    std::fs::write(&source, &content).unwrap();
    while_cut(&lab, || {
        run("nbdcopy", &["--connections=4", "--flush", text(&source), &served.uri]);
        run("nbdcopy", &["--connections=4", &served.uri, text(&copy)]);
    });
    assert!(std::fs::read(&copy).unwrap() == content);
    drop(served);
    lab.replica().demote().unwrap();
    assert!(whole(&*lab.view_at(lab.replica().applied().1)) == content);
}

/// Random writes whose every block says what it must be, while it is cut.
#[test]
fn fio_verifies_what_it_wrote_to_a_promoted_disk() {
    if !installed("fio_verifies_what_it_wrote_to_a_promoted_disk", &["fio"]) {
        return;
    }
    let lab = Lab::new();
    let served = lab.serve(lab.promoted());
    let uri = format!("--uri={}", served.uri);
    let arguments = [
        "--name=t",
        "--ioengine=nbd",
        &uri,
        "--rw=randrw",
        "--bsrange=512-64k",
        "--blockalign=512",
        "--size=32m",
        "--iodepth=16",
        "--fsync=32",
        "--verify=crc32c",
        "--verify_fatal=1",
        "--verify_state_save=0",
        "--do_verify=1",
        "--serialize_overlap=1",
    ];
    while_cut(&lab, || {
        let output = run("fio", &arguments);
        assert!(output.contains("err= 0"), "{output}");
    });
    assert!(lab.replica().applied().1 > Epoch(4), "it was cut on the way");
}

#[test]
fn a_promoted_disk_tells_its_holes_and_takes_every_request() {
    if !installed("a_promoted_disk_tells_its_holes_and_takes_every_request", &["nbdsh"]) {
        return;
    }
    let lab = Lab::new();
    let served = lab.serve(lab.promoted());
    let script = r#"
assert not h.is_read_only() and h.can_multi_conn() and h.can_trim() and h.can_zero() and h.can_fast_zero() and h.can_fua()
h.pwrite(b"a" * (1 << 20), 40 << 20, nbd.CMD_FLAG_FUA)
h.zero(8192, (40 << 20) + 4096, nbd.CMD_FLAG_NO_HOLE)
h.trim(1 << 20, 20 << 20)
h.trim(100, 1)
h.flush()
def status(offset, length):
    found = []
    h.block_status(length, offset, lambda context, offset, entries, err: found.extend(entries))
    return found
assert status(40 << 20, 1 << 20) == [4096, 0, 8192, 3, (1 << 20) - 12288, 0], status(40 << 20, 1 << 20)
assert status(20 << 20, 1 << 20) == [1 << 20, 3], status(20 << 20, 1 << 20)
assert h.pread(1 << 20, 20 << 20) == bytes(1 << 20)
h.pwrite(b"end", h.get_size() - 3)
assert h.pread(4, h.get_size() - 4)[1:] == b"end"
try:
    h.pwrite(b"x" * 513, h.get_size() - 512)
    assert False
except nbd.Error as e:
    assert e.errno == "ENOSPC", e
print("all right")
"#;
    assert_eq!(nbdsh(&served.uri, script).unwrap().trim(), "all right");
}
