//! Writing to overlays; the view below stays as it was.

use block::ByteCount;

use crate::support::{At, Lab, attempt, installed, nbdsh, noise, run, text, write_and_read};

#[test]
fn qemu_io_writes_zeroes_and_discards() {
    if !installed("qemu_io_writes_zeroes_and_discards", &["qemu-io"]) {
        return;
    }
    let lab = Lab::new();
    let overlay = lab.overlay(At::Older, ByteCount::mib(512));
    let served = lab.serve(overlay.clone());
    write_and_read(&served.uri);
    // The view below has not changed, and other exports of it do not see the writes.
    let mut below = vec![0; 8 << 20];
    lab.view(At::Older).read_at(&mut below, block::ByteOffset(0)).unwrap();
    assert!(below == lab.content(At::Older)[..8 << 20]);
    assert!(overlay.held() > ByteCount::mib(1) && overlay.held() < ByteCount::mib(5), "{}", overlay.held());
}

/// A whole disk copied in on several connections, and out again.
#[test]
fn nbdcopy_writes_a_disk() {
    if !installed("nbdcopy_writes_a_disk", &["nbdcopy"]) {
        return;
    }
    let lab = Lab::new();
    let served = lab.serve(lab.overlay(At::Newest, ByteCount::mib(512)));
    let mut content = noise(crate::support::SIZE as usize, 77);
    content[10 << 20..20 << 20].fill(0);
    let (source, copy) = (lab.path("source.img"), lab.path("copy.img"));
    std::fs::write(&source, &content).unwrap();
    run("nbdcopy", &["--connections=4", "--flush", text(&source), &served.uri]);
    run("nbdcopy", &["--connections=4", &served.uri, text(&copy)]);
    assert!(std::fs::read(&copy).unwrap() == content);
}

/// Random writes whose every block says what it must be.
#[test]
fn fio_verifies_what_it_wrote() {
    if !installed("fio_verifies_what_it_wrote", &["fio"]) {
        return;
    }
    let lab = Lab::new();
    let served = lab.serve(lab.overlay(At::Newest, ByteCount::mib(512)));
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
        "--verify=crc32c",
        "--verify_fatal=1",
        "--verify_state_save=0",
        "--do_verify=1",
        "--serialize_overlap=1",
    ];
    let output = run("fio", &arguments);
    assert!(output.contains("err= 0"), "{output}");
}

/// The drill learns that its space is used up; what it wrote before is still there.
#[test]
fn a_full_overlay_is_an_error_to_its_client_only() {
    if !installed("a_full_overlay_is_an_error_to_its_client_only", &["nbdsh"]) {
        return;
    }
    let lab = Lab::new();
    let served = lab.serve(lab.overlay(At::Older, ByteCount::mib(2)));
    let script = r#"
import errno
assert not h.is_read_only() and h.can_multi_conn() and h.can_trim() and h.can_zero() and h.can_fast_zero() and h.can_fua()
h.pwrite(b"a" * (1 << 20), 0, nbd.CMD_FLAG_FUA)
h.pwrite(b"b" * (1 << 20), 30 << 20)
def full(what):
    try:
        what()
        assert False
    except nbd.Error as e:
        assert e.errnum == errno.ENOSPC, e
full(lambda: h.pwrite(b"c", 40 << 20))
full(lambda: h.pwrite(b"c" * 4096, h.get_size()))
full(lambda: h.zero(1 << 20, 40 << 20, nbd.CMD_FLAG_NO_HOLE))
h.zero(8 << 20, 36 << 20, nbd.CMD_FLAG_FAST_ZERO)
h.pwrite(b"d" * 512, 100)
h.trim(1 << 20, 0)
h.zero(8192, 40 << 20, nbd.CMD_FLAG_NO_HOLE)
h.pwrite(b"e" * 4096, 40 << 20)
assert h.pread(1 << 20, 0) == bytes(1 << 20)
assert h.pread(1 << 20, 30 << 20) == b"b" * (1 << 20)
assert h.pread(8192, 40 << 20) == b"e" * 4096 + bytes(4096)
extents = []
h.block_status(1 << 20, 40 << 20, lambda context, offset, entries, err: extents.extend(entries))
assert extents == [8192, 0, (1 << 20) - 8192, 3], extents
print("all right")
"#;
    assert_eq!(nbdsh(&served.uri, script).unwrap().trim(), "all right");
}

/// A file system as people use it: made, filled, and found sound after the client is gone.
#[test]
fn two_exports_of_one_point_do_not_see_each_other() {
    if !installed("two_exports_of_one_point_do_not_see_each_other", &["qemu-io"]) {
        return;
    }
    let lab = Lab::new();
    let first = lab.overlay(At::Newest, ByteCount::mib(64));
    let second = lab.overlay(At::Newest, ByteCount::mib(64));
    let served = lab.serve(first);
    run("qemu-io", &["-f", "raw", "-c", "write -P 1 0 1M", &served.uri]);
    drop(served);
    let served = lab.serve(second);
    let first_word = lab.content(At::Newest)[0];
    run("qemu-io", &["-f", "raw", "-c", &format!("read -P {first_word} 0 1"), &served.uri]);
    let output = attempt("qemu-io", &["-f", "raw", "-c", "read -P 1 0 1M", &served.uri]);
    assert!(output.unwrap_err().contains("Pattern verification failed"));
}
