//! Exports and restores as an operator asks for them.

mod support;

use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use serde_json::Value;

use support::{Running, applied, init, json, seawall, status_when, text};

const DISK_BYTES: usize = 24 << 20;

/// A disk with data here and there, protected; the number of a point that holds it, and of a later one where it was
/// changed.
fn two_points(dir: &Path) -> (Running, Vec<u8>, String, Vec<u8>, String) {
    let mut older = vec![0_u8; DISK_BYTES];
    for (index, byte) in older[1 << 20..9 << 20].iter_mut().enumerate() {
        *byte = (index / 511) as u8 | 1;
    }
    older[..512].fill(8);
    older[DISK_BYTES - 4096..].fill(9);
    std::fs::write(dir.join("disk.img"), &older).unwrap();
    init(dir);
    let running = Running::start(dir);
    status_when(dir, |status| status["groups"][0]["points"].as_u64() > Some(0));
    let latest =
        || json(dir, &["points", "--last", "1", "--json"])["groups"][0]["points"][0]["epoch"].to_string();
    let first = latest();
    let mut newer = older.clone();
    newer[3 << 20..(3 << 20) + 5000].fill(0xb2);
    newer[4 << 20..5 << 20].fill(0);
    newer[20 << 20..21 << 20].fill(0xc3);
    let image = std::fs::OpenOptions::new().write(true).open(dir.join("disk.img")).unwrap();
    image.write_all_at(&newer, 0).unwrap();
    let changed_at = applied(&status_when(dir, |_| true));
    status_when(dir, |status| applied(status) >= changed_at + 3);
    (running, older, first, newer, latest())
}

fn missing(program: &str) -> bool {
    let missing = Command::new(program).arg("--version").output().is_err();
    if missing {
        eprintln!("NOT RUN: a part of recover: {program} is not installed (`cargo xtask test` does)");
        assert!(std::env::var_os("CI").is_none(), "{program} must be there in CI");
    }
    missing
}

#[test]
fn restores_go_on_differ_and_verify() {
    let base = tempfile::tempdir().unwrap();
    let dir = base.path();
    let (running, older, first, newer, last) = two_points(dir);
    let restore = |point: &str, out: &str, more: &[&str]| {
        let args = ["restore", "--volume", "disk.img", "--point", point, "--out", out, "--json"];
        let output = seawall(dir, &[&args[..], more].concat());
        let done: Value = serde_json::from_slice(&output.stdout).unwrap_or(Value::Null);
        (output.status.success(), done, text(&output))
    };

    // What a restore left that was killed: some of it right, some of it not, and too short.
    let mut partial = older[..10 << 20].to_vec();
    partial[2 << 20..(2 << 20) + 10].fill(1);
    partial[9 << 20..(9 << 20) + 10].fill(1);
    std::fs::write(dir.join("a.img.partial"), &partial).unwrap();
    let (ok, done, said) = restore(&first, "a.img", &["--verify"]);
    assert!(ok && std::fs::read(dir.join("a.img")).unwrap() == older, "{said}");
    assert!(!dir.join("a.img.partial").exists());
    let (written, kept) = (done["data_bytes"].as_u64().unwrap(), done["kept_bytes"].as_u64().unwrap());
    assert!(written < 1 << 20 && kept > 20 << 20, "only what differs is fetched: {done}");
    assert!(std::fs::metadata(dir.join("a.img")).unwrap().blocks() * 512 < 12 << 20, "it is sparse");

    // From one point to another, and back, in place.
    let (ok, done, said) = restore(&last, "a.img", &["--delta", "--verify"]);
    assert!(ok && std::fs::read(dir.join("a.img")).unwrap() == newer, "{said}");
    assert!(done["data_bytes"].as_u64().unwrap() < 3 << 20, "{done}");
    let (ok, _, said) = restore(&first, "a.img", &["--delta"]);
    assert!(ok && std::fs::read(dir.join("a.img")).unwrap() == older, "{said}");
    let (ok, done, _) = restore(&first, "a.img", &["--delta"]);
    assert!(ok && done["data_bytes"] == 0 && done["kept_bytes"] == DISK_BYTES, "{done}");

    if !missing("qemu-img") {
        let (ok, _, said) = restore(&last, "b.qcow2", &["--format", "qcow2"]);
        assert!(ok, "{said}");
        std::fs::write(dir.join("newer.img"), &newer).unwrap();
        let compared = Command::new("qemu-img")
            .current_dir(dir)
            .args(["compare", "b.qcow2", "newer.img"])
            .output()
            .unwrap();
        assert!(compared.status.success(), "{compared:?}");
        let (ok, _, said) = restore(&last, "b.qcow2", &["--format", "qcow2"]);
        assert!(!ok && said.contains("--force"), "{said}");
    }

    if scratch::is_root() {
        let disk = scratch::LoopDisk::create(&dir.join("device"), 25 << 20).unwrap();
        let device = disk.device().to_str().unwrap();
        let read = || {
            let mut found = vec![0; DISK_BYTES];
            std::fs::File::open(device).unwrap().read_exact(&mut found).unwrap();
            found
        };
        let (ok, _, said) = restore(&first, device, &["--verify"]);
        assert!(ok && read() == older, "{said}");
        let (ok, _, said) = restore(&last, device, &[]);
        assert!(!ok && said.contains("not empty"), "{said}");
        let (ok, done, said) = restore(&last, device, &["--delta", "--verify"]);
        assert!(ok && read() == newer && done["data_bytes"].as_u64().unwrap() < 3 << 20, "{said}");
        let (ok, _, said) = restore(&first, device, &["--force"]);
        assert!(ok && read() == older, "{said}");
    } else {
        eprintln!("NOT RUN: restores to a device: it needs root, for loop devices");
        assert!(std::env::var_os("CI").is_none());
    }
    running.stop();
}

/// `seawall export` as a process; what it prints as JSON. Ended when dropped.
struct Exporting(Child, Value);

impl Exporting {
    fn start(dir: &Path, args: &[&str]) -> Exporting {
        let mut command = Command::new(env!("CARGO_BIN_EXE_seawall"));
        command.env("SEAWALL_DIR", dir.join("site")).current_dir(dir).arg("export").args(args).arg("--json");
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        Exporting(child, serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line}")))
    }

    fn uri(&self) -> &str {
        self.1["uris"][0].as_str().unwrap()
    }

    fn interrupt(mut self) {
        let killed = Command::new("kill").arg(self.0.id().to_string()).status().unwrap();
        assert!(killed.success());
        assert!(self.0.wait().unwrap().success());
    }
}

impl Drop for Exporting {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn copied(dir: &Path, uri: &str) -> Vec<u8> {
    let copy = dir.join("copy.img");
    let output = Command::new("nbdcopy").arg(uri).arg(&copy).output().unwrap();
    assert!(output.status.success(), "nbdcopy {uri}: {output:?}");
    std::fs::read(copy).unwrap()
}

#[test]
fn exports_are_started_listed_and_stopped() {
    if missing("nbdcopy") || missing("qemu-io") {
        return;
    }
    let base = tempfile::tempdir().unwrap();
    let dir = base.path();
    let (running, older, first, newer, last) = two_points(dir);

    // Through TLS, by a socket on this machine.
    let socket = dir.join("local.sock");
    let local = socket.to_str().unwrap();
    let exporting = Exporting::start(dir, &["disk.img", "--point", &first, "--local", local, "--writable"]);
    assert!(copied(dir, exporting.uri()) == older);
    let write = Command::new("qemu-io")
        .args(["-f", "raw", "-c", "write -P 7 0 1M", exporting.uri()])
        .output()
        .unwrap();
    assert!(write.status.success(), "{write:?}");
    let mut changed = older.clone();
    changed[..1 << 20].fill(7);
    assert!(copied(dir, exporting.uri()) == changed);
    let listed = text(&seawall(dir, &["export", "list"]));
    assert!(listed.contains("disk.img") && listed.contains("1.0 MiB of 16.0 GiB"), "{listed}");
    let status = text(&seawall(dir, &["status"]));
    assert!(status.contains("Export 1: disk.img at point"), "{status}");
    exporting.interrupt();
    assert!(!socket.exists());
    support::until(|| json(dir, &["export", "list", "--json"])["exports"].as_array().unwrap().is_empty());

    // One that is killed leaves nothing at the server.
    let exporting = Exporting::start(dir, &["disk.img", "--point", "latest"]);
    assert!(copied(dir, exporting.uri()) == newer);
    drop(exporting);
    support::until(|| json(dir, &["export", "list", "--json"])["exports"].as_array().unwrap().is_empty());

    // On the server's machine, until it is stopped.
    let server = dir.join("server.sock");
    let place = server.to_str().unwrap();
    let args = ["export", "disk.img", "--point", &last, "--socket", place, "--detach", "--writable"];
    let xml = text(&seawall(dir, &[&args[..], &["--libvirt-xml"]].concat()));
    assert!(xml.starts_with("<domain") && xml.contains(place), "{xml}");
    assert!(copied(dir, &format!("nbd+unix:///disk.img?socket={place}")) == newer);
    let listed = json(dir, &["export", "list", "--json"]);
    let id = listed["exports"][0]["id"].to_string();
    assert_eq!(listed["exports"][0]["detached"], true);
    let stopped = text(&seawall(dir, &["export", "stop", &id]));
    assert!(stopped.contains("Stopped export"), "{stopped}");
    assert!(!server.exists());
    let again = seawall(dir, &["export", "stop", &id]);
    assert!(!again.status.success() && text(&again).contains("no such export"), "{}", text(&again));

    // Plain TCP only when asked for; TLS without a certificate is nothing.
    let exporting =
        Exporting::start(dir, &["disk.img", "--point", &first, "--listen", "127.0.0.1:0", "--plain"]);
    assert!(exporting.uri().starts_with("nbd://") && copied(dir, exporting.uri()) == older);
    exporting.interrupt();
    let exporting = Exporting::start(dir, &["disk.img", "--point", &first, "--listen", "127.0.0.1:0"]);
    let plain = exporting.uri().replace("nbds://", "nbd://");
    let refused = Command::new("nbdinfo").arg(&plain).output().unwrap();
    assert!(!refused.status.success(), "{refused:?}");
    // QEMU, with the operator's own certificate.
    let tls = dir.join("tls");
    std::fs::create_dir(&tls).unwrap();
    let operator = dir.join("site/operator");
    for (from, to) in
        [("ca.pem", "ca-cert.pem"), ("cert.pem", "client-cert.pem"), ("key.pem", "client-key.pem")]
    {
        std::fs::copy(operator.join(from), tls.join(to)).unwrap();
    }
    let (host, port) =
        exporting.uri()["nbds://".len()..].split_once('/').unwrap().0.rsplit_once(':').unwrap();
    let creds = format!("tls-creds-x509,id=tls,dir={},endpoint=client", tls.display());
    let image = format!(
        "driver=nbd,host={host},port={port},export=disk.img,tls-creds=tls,tls-hostname=target-server.seawall.invalid"
    );
    let output =
        Command::new("qemu-img").args(["info", "--object", &creds, "--image-opts", &image]).output().unwrap();
    assert!(
        output.status.success() && String::from_utf8_lossy(&output.stdout).contains("24 MiB"),
        "{output:?}"
    );
    // An agent's certificate is of the same authority, and is no operator's.
    for (from, to) in [("cert.pem", "client-cert.pem"), ("key.pem", "client-key.pem")] {
        std::fs::copy(dir.join("site/agent").join(from), tls.join(to)).unwrap();
    }
    let output =
        Command::new("qemu-img").args(["info", "--object", &creds, "--image-opts", &image]).output().unwrap();
    assert!(!output.status.success(), "{output:?}");
    running.stop();
    drop(exporting);
}
