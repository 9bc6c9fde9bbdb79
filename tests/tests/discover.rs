//! What could be protected: disks and guests of enrolled machines, as `seawall discover` shows them.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use seawall_tests::site::{PATIENCE, Running, Site, told};
use seawall_tests::{cannot_run, site::PASSWORD};

/// Says what virsh(1) of libvirt 9 says, and refuses what could change something.
const VIRSH: &str = r#"#!/bin/sh
[ "$1" = --readonly ] || { echo "error: not read-only" >&2; exit 1; }
[ "$LC_ALL" = C ] || { echo "Fehler: fremde Sprache" >&2; exit 1; }
case "$2 $3 $4 $5" in
"list --all  ") cat <<'END'
 Id   Name              State
------------------------------------
 1    db with spaces    running
 -    old               shut off

END
;;
"domblklist --details --domain db with spaces") cat <<'END'
 Type   Device   Target   Source
------------------------------------------------
 file   disk     vda      /img/db 1.qcow2
 file   cdrom    sda      -

END
;;
"domblklist --details --domain old") echo "error: failed to get domain 'old'" >&2; exit 1;;
*) echo "error: unknown command: $*" >&2; exit 1;;
esac
"#;

fn start(site: &Site) -> Running {
    site.init();
    let server = site.run("seawall-config-server", Path::new("config/config-server.toml"));
    let url = format!("https://{}", site.server);
    let ca = site.path("config/ca/ca.pem").display().to_string();
    let began = Instant::now();
    let login = || {
        let mut command = site.command("seawall");
        told(command.args(["login", "--server", &url, "--ca-file", &ca]), PASSWORD)
    };
    while !login().status.success() {
        assert!(began.elapsed() < PATIENCE, "{}", site.logs());
        std::thread::sleep(Duration::from_millis(100));
    }
    server
}

fn agent(site: &Site, name: &str, change: impl FnOnce(&mut Command)) -> Running {
    let config = site.enrol("agent", name, &[]);
    let mut command = site.command("seawall-agent");
    command.args(["run", "--config"]).arg(config).stdout(Stdio::null());
    command.stderr(std::fs::File::create(site.path(&format!("{name}.log"))).unwrap());
    change(&mut command);
    Running(command.spawn().unwrap())
}

#[test]
fn guests_of_a_host_are_found() {
    let site = Site::empty();
    let _server = start(&site);
    assert!(site.shown(&["discover"]).contains("seawall machine push"));
    let bin = site.path("bin");
    std::fs::create_dir(&bin).unwrap();
    std::fs::write(bin.join("virsh"), VIRSH).unwrap();
    std::fs::set_permissions(bin.join("virsh"), std::fs::Permissions::from_mode(0o755)).unwrap();
    let path = format!("{}:{}", bin.display(), std::env::var("PATH").unwrap());
    let _host = agent(&site, "host", |command| {
        command.env("PATH", &path);
    });
    let found = site.until("the host tells its guests", &["discover", "host"], |said| {
        said["machines"][0]["guests"].as_array().is_some_and(|guests| !guests.is_empty())
    });
    let guests = &found["machines"][0]["guests"];
    assert_eq!(guests[0]["name"], "db with spaces");
    assert_eq!(guests[0]["state"], "running");
    assert_eq!(guests[0]["disks"], serde_json::json!([{ "target": "vda", "source": "/img/db 1.qcow2" }]));
    assert!(guests[1]["name"] == "old" && guests[1]["state"] == "shut off", "{guests}");
    let shown = site.shown(&["discover"]);
    for expected in ["db with spaces", "vda: /img/db 1.qcow2", "shut off"] {
        assert!(shown.contains(expected), "{shown}");
    }
    assert!(site.refused(&["discover", "nobody"]).contains("there are host"));
}

/// The real virsh, with the hypervisor that libvirt has for tests: one guest called `test`, which runs.
#[test]
fn the_real_virsh_is_understood() {
    if Command::new("virsh").arg("--version").output().is_err() {
        cannot_run("the_real_virsh_is_understood", "virsh, of libvirt-clients, is not installed");
        return;
    }
    let site = Site::empty();
    let _server = start(&site);
    let _host = agent(&site, "host", |command| {
        command.env("LIBVIRT_DEFAULT_URI", "test:///default");
    });
    let found = site.until("the host tells its guests", &["discover", "host"], |said| {
        said["machines"][0]["guests"].as_array().is_some_and(|guests| !guests.is_empty())
    });
    let guests = &found["machines"][0]["guests"];
    assert!(guests[0]["name"] == "test" && guests[0]["state"] == "running", "{guests}");
}

/// A disk with something on it, and somebody who writes: only root can make one.
#[test]
fn kernel_disks_are_found_with_what_is_on_them_and_how_much_is_written() {
    const TEST: &str = "kernel_disks_are_found_with_what_is_on_them_and_how_much_is_written";
    if !seawall_tests::root(TEST) {
        return;
    }
    let site = Site::empty();
    let _server = start(&site);
    let disk = scratch::LoopDisk::create(&site.path("disk.img"), 128 << 20).unwrap();
    scratch::FileSystem::Ext4.make(disk.device()).unwrap();
    let mount = scratch::Mount::new(disk.device(), &site.path("mnt"), "defaults").unwrap();
    let _agent = agent(&site, "web", |_| {});
    let device = disk.device().display().to_string();
    let rate = |said: &serde_json::Value| {
        let disks = said["machines"][0]["disks"].as_array()?;
        let found = disks.iter().find(|found| found["device"] == device.as_str())?;
        found["written_bytes_per_s"].as_u64()
    };
    let began = Instant::now();
    let found = loop {
        std::fs::write(mount.point().join("file"), vec![9u8; 8 << 20]).unwrap();
        std::fs::File::open(mount.point().join("file")).unwrap().sync_all().unwrap();
        let said = site.json(&["discover", "web"]);
        if rate(&said) > Some(0) {
            break said;
        }
        assert!(began.elapsed() < PATIENCE, "waited in vain for a rate: {said:#}\n{}", site.logs());
        std::thread::sleep(Duration::from_millis(500));
    };
    let disks = found["machines"][0]["disks"].as_array().unwrap();
    let found = disks.iter().find(|found| found["device"] == device.as_str()).unwrap();
    assert_eq!(found["bytes"], 128 << 20);
    assert_eq!(found["protected"], false);
    let on = &found["uses"][0];
    assert!(on["kind"] == "ext4" && on["mounted"].as_str().unwrap().ends_with("/mnt"), "{on}");
    let shown = site.shown(&["discover", "web"]);
    assert!(shown.contains(&device) && shown.contains("ext4 on") && shown.contains("128.0 MiB"), "{shown}");
    mount.unmount().unwrap();
}
