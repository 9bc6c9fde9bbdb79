//! Virtual machines of this host, as virsh(1) of libvirt tells them. It is only asked, never told anything.

use std::process::Command;

use anyhow::{Context, ensure};
use control::fleet::{GUEST_DISKS_MAX, GUESTS_MAX, GuestDisk, GuestInfo};

/// How long virsh may take, in seconds, as timeout(1) takes it: a libvirtd that hangs must not hold up the agent.
const VIRSH_TIME_MAX: &str = "10";
/// The longest name and the longest source of a disk, in characters. Longer ones are cut.
const NAME_MAX: usize = 255;
const SOURCE_MAX: usize = 240;
/// What virsh says of a guest's state.
const STATES: [&str; 8] =
    ["running", "idle", "paused", "in shutdown", "shut off", "crashed", "pmsuspended", "no state"];

/// The guests; `None` where there is no virsh.
pub(super) fn guests() -> anyhow::Result<Option<Vec<GuestInfo>>> {
    let Some(list) = virsh(&["list", "--all"])? else { return Ok(None) };
    let mut guests = listed(&list);
    for guest in &mut guests {
        // One that was just removed has no disks to tell.
        if let Ok(Some(text)) = virsh(&["domblklist", "--details", "--domain", &guest.name]) {
            guest.disks = disks(&text);
        }
    }
    Ok(Some(guests))
}

/// What it says; `None` when there is none.
fn virsh(arguments: &[&str]) -> anyhow::Result<Option<String>> {
    let search = std::env::var_os("PATH").unwrap_or_default();
    if !std::env::split_paths(&search).any(|dir| dir.join("virsh").is_file()) {
        return Ok(None);
    }
    let mut command = Command::new("timeout");
    command.args([VIRSH_TIME_MAX, "virsh", "--readonly"]).args(arguments).env("LC_ALL", "C");
    let output = command.output().context("run virsh")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "virsh {}: {}: {}", arguments.join(" "), output.status, said.trim());
    Ok(Some(String::from_utf8_lossy(&output.stdout).into_owned()))
}

fn cut(text: &str, most: usize) -> String {
    text.chars().take(most).collect()
}

/// Lines of id, name and state. A name may have spaces; a state is one of those that are known.
fn listed(text: &str) -> Vec<GuestInfo> {
    let guest = |line: &str| {
        let (id, rest) = line.trim().split_once(char::is_whitespace)?;
        ensure_id(id)?;
        let rest = rest.trim();
        let state = STATES.iter().find(|state| {
            rest.strip_suffix(**state).is_some_and(|name| name.ends_with(char::is_whitespace))
        })?;
        let name = rest.strip_suffix(state)?.trim();
        let named = GuestInfo { name: cut(name, NAME_MAX), state: (*state).to_owned(), disks: Vec::new() };
        (!name.is_empty()).then_some(named)
    };
    text.lines().filter_map(guest).take(GUESTS_MAX).collect()
}

/// A number, or a hyphen for a guest that does not run.
fn ensure_id(text: &str) -> Option<()> {
    (text == "-" || text.bytes().all(|byte| byte.is_ascii_digit())).then_some(())
}

/// Lines of type, device, target and source. A source may have spaces.
fn disks(text: &str) -> Vec<GuestDisk> {
    let disk = |line: &str| {
        let mut rest = line.trim();
        let mut word = || {
            let (word, after) = rest.split_once(char::is_whitespace)?;
            rest = after.trim_start();
            Some(word.to_owned())
        };
        let (_, device, target) = (word()?, word()?, word()?);
        let of_disk = device == "disk" && rest != "-" && !rest.is_empty();
        of_disk.then(|| GuestDisk { target: cut(&target, 60), source: cut(rest, SOURCE_MAX) })
    };
    text.lines().filter_map(disk).take(GUEST_DISKS_MAX).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As virsh 9.0.0 writes it.
    const LIST: &str = " Id   Name              State
------------------------------------
 1    web               running
 12   db with spaces    paused
 -    old               shut off

";
    const DISKS: &str = " Type    Device   Target   Source
----------------------------------------------------------------
 file    disk     vda      /var/lib/libvirt/images/web 1.qcow2
 block   disk     vdb      /dev/vg0/data
 file    cdrom    sda      -
 network disk     vdc      -

";

    #[test]
    fn guests_and_their_disks_are_read() {
        let guests = listed(LIST);
        let told: Vec<(&str, &str)> =
            guests.iter().map(|guest| (guest.name.as_str(), guest.state.as_str())).collect();
        assert_eq!(told, [("web", "running"), ("db with spaces", "paused"), ("old", "shut off")]);
        let disks = disks(DISKS);
        let told: Vec<(&str, &str)> =
            disks.iter().map(|disk| (disk.target.as_str(), disk.source.as_str())).collect();
        assert_eq!(told, [("vda", "/var/lib/libvirt/images/web 1.qcow2"), ("vdb", "/dev/vg0/data")]);
    }

    #[test]
    fn nothing_is_made_of_what_is_no_list() {
        for text in ["", "error: failed to connect", " Id Name State\n---\n", " 1 running", " x web running"]
        {
            assert_eq!(listed(text), [], "{text}");
        }
        let many: String = (0..GUESTS_MAX + 9).map(|id| format!(" {id} g{id} running\n")).collect();
        assert_eq!(listed(&many).len(), GUESTS_MAX);
        let many: String = (0..99).map(|id| format!(" file disk vd{id} /img{id}\n")).collect();
        assert_eq!(super::disks(&many).len(), GUEST_DISKS_MAX);
    }
}
