//! Reading exports, with and without structured replies, on one and on several connections.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::Duration;

use block::{ByteCount, ByteOffset, Extent};
use export::{Disk, DiskError};

use crate::support::{At, Lab, attempt, installed, nbdsh, run, text};

#[test]
fn qemu_reads_what_the_view_holds() {
    if !installed("qemu_reads_what_the_view_holds", &["qemu-img", "qemu-nbd"]) {
        return;
    }
    let lab = Lab::new();
    for at in [At::Older, At::Newest] {
        let served = lab.serve(lab.view(at));
        let list = run("qemu-nbd", &["--list", "--socket", text(&served.socket)]);
        for expected in ["export: 'sda'", "a disk of the test", "size:  50332160", "base:allocation", "multi"]
        {
            assert!(list.contains(expected), "{expected} in {list}");
        }
        let image = lab.image(at);
        run("qemu-img", &["compare", "-f", "raw", "-F", "raw", &served.uri, text(&image)]);
        let copy = lab.path("copy.img");
        run("qemu-img", &["convert", "-f", "raw", "-O", "raw", &served.uri, text(&copy)]);
        assert!(std::fs::read(&copy).unwrap() == lab.content(at), "{at:?}");
        let qcow2 = lab.path("copy.qcow2");
        run("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", &served.uri, text(&qcow2)]);
        run("qemu-img", &["compare", "-F", "raw", text(&qcow2), text(&image)]);
        // Holes are told.
        let map = run("qemu-img", &["map", "-f", "raw", "--output=json", &served.uri]);
        assert!(map.contains(r#""zero": true, "data": false"#) && map.contains(r#""data": true"#), "{map}");
        assert!(served.export.counted().requests > 0);
    }
}

#[test]
fn libnbd_reads_what_the_view_holds() {
    if !installed("libnbd_reads_what_the_view_holds", &["nbdinfo", "nbdcopy", "nbdsh"]) {
        return;
    }
    let lab = Lab::new();
    let served = lab.serve(lab.view(At::Older));
    let info = run("nbdinfo", &["--json", &served.uri]);
    for expected in [
        r#""export-size": 50332160"#,
        r#""is_read_only": true"#,
        r#""can_multi_conn": true"#,
        r#""can_df": true"#,
        r#""block_size_preferred": 4096"#,
        r#""description": "a disk of the test""#,
        r#""base:allocation""#,
    ] {
        assert!(info.contains(expected), "{expected} in {info}");
    }
    let map = run("nbdinfo", &["--map", "--totals", &served.uri]);
    assert!(map.contains("hole,zero"), "{map}");
    for options in [
        &["--connections=4", "--requests=64"][..],
        &["--synchronous"],
        &["--no-extents", "--request-size=8192"],
    ] {
        let copy = lab.path("copy.img");
        let arguments = [options, &[&served.uri, text(&copy)]].concat();
        run("nbdcopy", &arguments);
        assert!(std::fs::read(&copy).unwrap() == lab.content(At::Older), "{options:?}");
    }
    let missing = served.uri.replace("sda", "sdb");
    let refused = attempt("nbdinfo", &[&missing]).unwrap_err();
    assert!(refused.contains("export: sdb"), "{refused}");
}

/// Every way to ask, at odd places: what comes is the content, and errors are errors.
#[test]
fn every_kind_of_read() {
    if !installed("every_kind_of_read", &["nbdsh"]) {
        return;
    }
    let lab = Lab::new();
    let served = lab.serve(lab.view(At::Newest));
    let image = lab.image(At::Newest);
    let script = format!(
        r#"
import errno
content = open({image:?}, "rb").read()
assert h.get_size() == len(content)
assert h.is_read_only()
def check(handle):
    for offset, length in [(0, 1), (511, 2), (4095, 4098), (0, 65536), (3 << 20, 5 << 20), (22 << 20, 1 << 20),
                           (len(content) - 700, 700), (1 << 20, 32 << 20), (10 << 20, 4 << 20)]:
        assert handle.pread(length, offset) == content[offset:offset+length], (offset, length)
    for offset, length in [(len(content), 1), (len(content) - 1, 2), (1 << 63, 512)]:
        try:
            handle.pread(length, offset)
            assert False
        except nbd.Error as e:
            assert e.errnum == errno.EINVAL, e
    for change in [lambda: handle.pwrite(b"x", 0), lambda: handle.trim(512, 0), lambda: handle.zero(512, 0)]:
        try:
            change()
            assert False
        except nbd.Error as e:
            assert e.errnum == errno.EPERM, e
check(h)
assert h.pread(65536, 5, nbd.CMD_FLAG_DF) == content[5:65541]
try:
    h.pread(1 << 20, 0, nbd.CMD_FLAG_DF)
    assert False
except nbd.Error as e:
    assert e.errnum == errno.EOVERFLOW, e
chunks = []
h.pread_structured(24 << 20, 0, lambda data, offset, status, err: chunks.append((offset, len(data), status)))
assert any(status == nbd.READ_HOLE for _, _, status in chunks), chunks
assert sum(length for _, length, status in chunks if status == nbd.READ_HOLE) >= 8 << 20, chunks
h.cache(1 << 20, 0)
h.flush()
extents = []
h.block_status(len(content), 0, lambda context, offset, entries, err: extents.extend(entries))
at = 0
for length, state in zip(extents[::2], extents[1::2]):
    assert state in (0, 3)
    if state == 3:
        assert not any(content[at:at+length]), (at, length)
    at += length
assert at == len(content), at
one = []
h.block_status(len(content), 0, lambda context, offset, entries, err: one.extend(entries), nbd.CMD_FLAG_REQ_ONE)
assert one == extents[:2], one
plain = nbd.NBD()
plain.set_strict_mode(0)
plain.set_request_structured_replies(False)
plain.connect_uri({uri:?})
assert not plain.get_structured_replies_negotiated()
check(plain)
old = nbd.NBD()
old.set_strict_mode(0)
old.set_handshake_flags(0)
old.connect_uri({uri:?})
check(old)
print("all right")
"#,
        uri = served.uri
    );
    // Clients that know no fixed newstyle are not served: everybody has known it since 2011.
    let script = script
        .replace("old.set_handshake_flags(0)", "old.set_handshake_flags(nbd.HANDSHAKE_FLAG_FIXED_NEWSTYLE)");
    assert_eq!(nbdsh(&served.uri, &script).unwrap().trim(), "all right");
}

/// Many requests at once on several connections, checked byte by byte.
#[test]
fn fio_reads() {
    if !installed("fio_reads", &["fio"]) {
        return;
    }
    let lab = Lab::new();
    let served = lab.serve(lab.view(At::Newest));
    for (kind, size) in [("randread", "4k"), ("read", "1m")] {
        let uri = format!("--uri={}", served.uri);
        let arguments =
            ["--name=t", "--ioengine=nbd", &uri, "--iodepth=32", "--size=40m", "--thread", "--numjobs=2"];
        run("fio", &[&arguments[..], &[&format!("--rw={kind}"), &format!("--bs={size}")]].concat());
    }
    let counted = served.export.counted();
    assert!(counted.read.0 >= 4 * (40 << 20), "{counted:?}");
}

/// A disk whose reads wait, as of a cold medium: they must wait at the same time, and still answer what was asked.
#[test]
fn reads_that_wait_wait_together() {
    if !installed("reads_that_wait_wait_together", &["nbdcopy"]) {
        return;
    }
    let lab = Lab::new();
    let slow = Arc::new(Slow::new(lab.view(At::Newest)));
    let served = lab.serve(slow.clone());
    let copy = lab.path("copy.img");
    let arguments = ["--connections=1", "--requests=32", "--request-size=65536", &served.uri, text(&copy)];
    run("nbdcopy", &arguments);
    assert!(std::fs::read(&copy).unwrap() == lab.content(At::Newest));
    let together = slow.most.load(SeqCst);
    assert!(together > 4, "{together} reads at the same time");
    // Leaving in the midst of reads ends them, and the export.
    let mut client = std::os::unix::net::UnixStream::connect(&served.socket).unwrap();
    // No zeroes, the only option EXPORT_NAME, of the disk without a name.
    let mut said = vec![0, 0, 0, 3];
    said.extend_from_slice(b"IHAVEOPT\x00\x00\x00\x01\x00\x00\x00\x00");
    for number in 0..40_u64 {
        said.extend_from_slice(&[0x25, 0x60, 0x95, 0x13, 0, 0, 0, 0]);
        said.extend_from_slice(&number.to_be_bytes());
        said.extend_from_slice(&(number * 65536).to_be_bytes());
        said.extend_from_slice(&65536_u32.to_be_bytes());
    }
    std::io::Write::write_all(&mut client, &said).unwrap();
    drop(client);
    while served.export.counted().connections > 0 {
        std::thread::yield_now();
    }
}

/// A disk below which every read takes a while.
#[derive(Debug)]
struct Slow {
    below: Arc<dyn Disk>,
    now: AtomicUsize,
    most: AtomicUsize,
}

impl Slow {
    fn new(below: Arc<dyn Disk>) -> Slow {
        Slow { below, now: Default::default(), most: Default::default() }
    }
}

impl Disk for Slow {
    fn size(&self) -> ByteCount {
        self.below.size()
    }

    fn is_writable(&self) -> bool {
        false
    }

    fn read_at(&self, buffer: &mut [u8], offset: ByteOffset) -> Result<(), DiskError> {
        let now = self.now.fetch_add(1, SeqCst) + 1;
        self.most.fetch_max(now, SeqCst);
        std::thread::sleep(Duration::from_millis(2));
        self.now.fetch_sub(1, SeqCst);
        self.below.read_at(buffer, offset)
    }

    fn next_data(&self, offset: ByteOffset) -> Result<Option<Extent>, DiskError> {
        self.below.next_data(offset)
    }
}
