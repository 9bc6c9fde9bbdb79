//! `seawall-agent check`: what capture needs of this machine, which mode each disk would have, and what to do for a better one.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use block::{ByteCount, VolumeId};
use capture::check::{Fact, Finding, Places, machine};
use capture::{Device, DeviceName, Disks, FoundDisk, KernelTap, KernelTapOptions, ScanSource};
use comfy_table::presets::UTF8_FULL_CONDENSED;
use comfy_table::{ContentArrangement, Table};
use control::CaptureMode;
use serde::Serialize;

use crate::config::{AgentConfig, SourceChoice, default_ring};
use crate::source::PROBE_RING;

/// Tables are no wider than this, in characters.
const TABLE_WIDTH: u16 = 120;

/// What was found.
#[derive(Debug, Serialize)]
pub struct CheckReport {
    /// The machine.
    facts: Vec<FactReport>,
    /// The disks.
    devices: Vec<DeviceReport>,
    /// As [`CheckReport::exit_status`].
    exit_status: u8,
}

#[derive(Debug, Serialize)]
struct FactReport {
    name: &'static str,
    finding: &'static str,
    found: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    advice: String,
}

#[derive(Debug, Default, Serialize)]
struct DeviceReport {
    device: PathBuf,
    /// Its marks, by which it is found again.
    #[serde(skip_serializing_if = "Option::is_none")]
    known_by: Option<String>,
    /// How the name became this disk.
    #[serde(skip_serializing_if = "Option::is_none")]
    note: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    size: Option<ByteCount>,
    #[serde(skip_serializing_if = "Option::is_none")]
    logical_block: Option<u32>,
    /// How its writes would be captured; none when it cannot be protected.
    mode: Option<CaptureMode>,
    why: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    advice: String,
}

/// Looks at the machine and tries each disk: with a configuration, its disks as it says; beside them, those that are named;
/// if there are none, all disks of the machine.
pub fn check(places: &Places, config: Option<&AgentConfig>, named: &[DeviceName]) -> CheckReport {
    let ring = config.map_or_else(default_ring, |config| config.agent.ring_bytes);
    let facts = machine(places, ring);
    let choice = config.map_or(SourceChoice::Auto, |config| config.agent.source);
    let mut wanted: Vec<DeviceName> =
        config.iter().flat_map(|config| &config.volume).map(|volume| volume.device.clone()).collect();
    wanted.extend(named.iter().cloned());
    if wanted.is_empty() {
        wanted = all_disks();
    }
    let disks = Disks::default();
    let found: Vec<Candidate> = wanted.iter().flat_map(|name| look_below(&disks, name, choice)).collect();
    let data = all_with_data(&found, choice, &facts);
    let devices: Vec<DeviceReport> =
        found.into_iter().map(|candidate| candidate.tried(choice, data, &facts)).collect();
    let exit_status = if devices.iter().any(|device| device.mode.is_none()) {
        2
    } else {
        let lower = facts.iter().any(|fact| fact.finding >= Finding::NoData)
            || devices.iter().any(|device| device.mode != Some(CaptureMode::Data));
        u8::from(lower)
    };
    CheckReport { facts: facts.into_iter().map(FactReport::from).collect(), devices, exit_status }
}

/// What stands in the way of a better mode, in words.
pub(crate) fn obstacles(facts: &[Fact]) -> Vec<String> {
    let in_the_way = facts.iter().filter(|fact| fact.finding >= Finding::NoData);
    in_the_way.map(|fact| format!("{}: {}. {}", fact.name, fact.found, fact.advice)).collect()
}

impl From<Fact> for FactReport {
    fn from(fact: Fact) -> FactReport {
        let finding = match fact.finding {
            Finding::Good => "good",
            Finding::Note => "note",
            Finding::NoData => "no data mode",
            Finding::NoEbpf => "no eBPF capture",
        };
        FactReport { name: fact.name, finding, found: fact.found, advice: fact.advice }
    }
}

impl CheckReport {
    /// 0: the writes of every disk would be captured with their data. 1: some disk would have a lower mode. 2: some
    /// disk cannot be protected.
    pub fn exit_status(&self) -> u8 {
        self.exit_status
    }

    /// Tables for people.
    pub fn render(&self) -> String {
        let mut out = String::new();
        let mut table = table(&["Needed for capture", "Finding", "Found"]);
        for fact in &self.facts {
            table.add_row([fact.name, fact.finding, &fact.found]);
        }
        let _ = writeln!(out, "{table}");
        for fact in self.facts.iter().filter(|fact| !fact.advice.is_empty()) {
            let _ = writeln!(out, "{}: {}", fact.name, fact.advice);
        }
        if self.devices.is_empty() {
            out.push_str("\nNo disk was named, and none was found that can be captured.\n");
            return out;
        }
        let mut disks = table_of_disks();
        for device in &self.devices {
            disks.add_row([
                device.device.display().to_string(),
                device.size.map_or_else(|| "-".to_owned(), |size| size.to_string()),
                device.mode.map_or_else(|| "none".to_owned(), |mode| mode.to_string()),
                device.why.clone(),
            ]);
        }
        let _ = writeln!(out, "\n{disks}");
        for device in &self.devices {
            if let Some(known_by) = &device.known_by {
                let _ = writeln!(out, "{}: known by {known_by}", device.device.display());
            }
        }
        let mut notes: Vec<&String> = self.devices.iter().filter_map(|device| device.note.as_ref()).collect();
        notes.dedup();
        for note in notes {
            let _ = writeln!(out, "{note}");
        }
        for device in self.devices.iter().filter(|device| !device.advice.is_empty()) {
            let _ = writeln!(out, "{}: {}", device.device.display(), device.advice);
        }
        out
    }
}

fn table(heading: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_preset(UTF8_FULL_CONDENSED).set_content_arrangement(ContentArrangement::Dynamic);
    table.set_width(TABLE_WIDTH).set_header(heading.iter().copied());
    table
}

fn table_of_disks() -> Table {
    table(&["Disk", "Size", "Mode", "Why"])
}

/// Every disk with a size whose driver uses requests.
pub(crate) fn all_disks() -> Vec<DeviceName> {
    let names = fs::read_dir("/sys/block").into_iter().flatten().flatten().map(|entry| entry.file_name());
    let mut disks: Vec<PathBuf> = names
        .filter(|name| {
            let sys = Path::new("/sys/block").join(name);
            let empty = fs::read_to_string(sys.join("size")).is_ok_and(|size| size.trim() == "0");
            sys.join("mq").exists() && !empty
        })
        .map(|name| Path::new("/dev").join(name))
        .collect();
    disks.sort();
    disks.into_iter().map(DeviceName::Path).collect()
}

/// What a name means.
struct Candidate {
    path: PathBuf,
    known_by: Option<String>,
    note: Option<String>,
    /// Why the name means no disk.
    error: Option<String>,
}

/// The disks that a name means, as the agent would take them.
fn look_below(disks: &Disks, name: &DeviceName, choice: SourceChoice) -> Vec<Candidate> {
    let candidate =
        |path: &Path| Candidate { path: path.to_owned(), known_by: None, note: None, error: None };
    match (name, disks.resolve(name)) {
        (DeviceName::Path(path), resolved) if choice == SourceChoice::Scan || resolved.is_err() => {
            vec![candidate(path)]
        }
        (_, Ok(resolved)) => {
            let with_note = |disk: &FoundDisk| Candidate {
                known_by: Some(disk.identity.to_string()),
                note: resolved.note.clone(),
                ..candidate(&disk.path)
            };
            resolved.disks.iter().map(with_note).collect()
        }
        (_, Err(error)) => {
            vec![Candidate { error: Some(error.to_string()), ..candidate(Path::new(&name.to_string())) }]
        }
    }
}

/// Whether the writes of all these disks are captured with their data, tried at once: the kernel verifies the programs at each
/// attempt, which is most of its time. When not, each disk is tried by itself.
fn all_with_data(candidates: &[Candidate], choice: SourceChoice, facts: &[Fact]) -> bool {
    if !matches!(choice, SourceChoice::Auto | SourceChoice::Ebpf) {
        return false;
    }
    // A disk that has two names is one disk.
    let mut paths: Vec<&Path> = candidates.iter().map(|candidate| candidate.path.as_path()).collect();
    paths.sort_unstable();
    paths.dedup();
    let devices: Option<Vec<Device>> = paths.into_iter().map(|path| Device::open(path).ok()).collect();
    devices.is_some_and(|devices| !devices.is_empty() && try_ebpf(&devices, true, facts) == Ok(None))
}

impl Candidate {
    fn tried(self, choice: SourceChoice, all_with_data: bool, facts: &[Fact]) -> DeviceReport {
        let report = match self.error {
            Some(why) => DeviceReport { device: self.path, why, ..DeviceReport::default() },
            None => look(&self.path, choice, all_with_data, facts),
        };
        DeviceReport { known_by: self.known_by, note: self.note, ..report }
    }
}

fn look(path: &Path, choice: SourceChoice, all_with_data: bool, facts: &[Fact]) -> DeviceReport {
    let opened = Device::open(path);
    let mut report = DeviceReport {
        device: path.to_owned(),
        size: opened.as_ref().ok().map(Device::size).or_else(|| file_size(path)),
        logical_block: opened.as_ref().ok().map(Device::logical_block),
        ..DeviceReport::default()
    };
    let tried = match opened {
        Ok(_) if all_with_data => Ok(None),
        Ok(device) => try_ebpf(&[device], choice != SourceChoice::EbpfBitmap, facts),
        Err(error) => Err(error.to_string()),
    };
    let (why_not_ebpf, advice) = match (choice, tried) {
        (SourceChoice::Scan, _) => ("scan, as configured".to_owned(), String::new()),
        (_, Ok(None)) => {
            report.mode = Some(CaptureMode::Data);
            report.why = "eBPF: tried, and it works".into();
            return report;
        }
        (SourceChoice::Ebpf, Ok(Some(why))) => {
            report.why = format!("source = \"ebpf\" insists on write data, and: {why}");
            report.advice = "Use source = \"auto\" to follow granules only.".into();
            return report;
        }
        (SourceChoice::EbpfBitmap, Ok(Some(_))) => {
            report.mode = Some(CaptureMode::Bitmap);
            report.why = "eBPF without write data, as configured".into();
            return report;
        }
        (SourceChoice::Auto, Ok(Some(why))) => {
            report.mode = Some(CaptureMode::Bitmap);
            report.why = format!("eBPF without write data: {why}");
            report.advice = advice_for(facts, Finding::NoData);
            return report;
        }
        (SourceChoice::Auto, Err(why)) => {
            (format!("eBPF capture is not possible: {why}"), advice_for(facts, Finding::NoEbpf))
        }
        (SourceChoice::Ebpf | SourceChoice::EbpfBitmap, Err(why)) => {
            report.why = why;
            report.advice = advice_for(facts, Finding::NoEbpf);
            return report;
        }
    };
    report.advice = advice;
    match ScanSource::open(&[(VolumeId([0; 16]), "check".into(), path.to_owned())], 1000) {
        Ok(_) => {
            report.mode = Some(CaptureMode::Scan);
            report.why = why_not_ebpf;
        }
        Err(error) if why_not_ebpf.contains(&error.to_string()) => report.why = why_not_ebpf,
        Err(error) => report.why = format!("{why_not_ebpf}; and not by scan: {error}"),
    }
    report
}

/// Of a file that is scanned in place of a disk.
fn file_size(path: &Path) -> Option<ByteCount> {
    let metadata = fs::metadata(path).ok().filter(fs::Metadata::is_file)?;
    Some(ByteCount(metadata.len()))
}

/// Attaches and detaches again: why not with data, or why not at all.
fn try_ebpf(devices: &[Device], data: bool, facts: &[Fact]) -> Result<Option<String>, String> {
    if let Some(fact) = facts.iter().find(|fact| fact.finding == Finding::NoEbpf) {
        return Err(format!("{}: {}", fact.name, fact.found));
    }
    let options = KernelTapOptions { ring: PROBE_RING, data, keep: None };
    let volumes: Vec<(VolumeId, &Device)> =
        devices.iter().zip(0_u128..).map(|(device, index)| (VolumeId(index.to_be_bytes()), device)).collect();
    let tap = KernelTap::attach(&volumes, &options).map_err(|error| error.to_string())?;
    Ok(tap.why_not_data().map(str::to_owned))
}

fn advice_for(facts: &[Fact], finding: Finding) -> String {
    facts.iter().find(|fact| fact.finding >= finding).map(|fact| fact.advice.clone()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A machine without kernel types: files can be scanned, and it is said why and what to do.
    #[test]
    fn without_kernel_types_a_file_is_scanned() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("disk.img");
        fs::write(&file, [0; 4096]).unwrap();
        let report =
            check(&Places::below(dir.path()), None, &[file, dir.path().join("absent")].map(DeviceName::Path));
        assert_eq!(report.devices[0].mode, Some(CaptureMode::Scan));
        assert_eq!(report.devices[1].mode, None);
        assert_eq!(report.exit_status(), 2);
        let shown = report.render();
        for expected in
            ["kernel types (BTF)", "no eBPF capture", "CONFIG_DEBUG_INFO_BTF", "scan", "No such file"]
        {
            assert!(shown.contains(expected), "{expected} in\n{shown}");
        }
    }
}
