//! What capture needs of a machine, found by trying and not by version numbers. Reads and tries only; nothing stays.

mod trial;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use block::ByteCount;
use rustix::thread::{CapabilitySet, capabilities};

/// What something means for capture.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Finding {
    /// As it should be.
    Good,
    /// Capture works; something beside it does not.
    Note,
    /// No write data: bitmap mode is the best there is.
    NoData,
    /// No eBPF capture: `scan` is the best there is.
    NoEbpf,
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fact {
    /// What was looked at.
    pub name: &'static str,
    /// What it means.
    pub finding: Finding,
    /// What was found, in words.
    pub found: String,
    /// What to do about it; empty when nothing need be done.
    pub advice: String,
}

/// Where this looks: the running system, or a tree that looks like one.
#[derive(Clone, Debug)]
pub struct Places {
    root: PathBuf,
}

impl Default for Places {
    fn default() -> Places {
        Places { root: "/".into() }
    }
}

/// Magic of a BPF file system in statfs.
const BPF_FS_MAGIC: i64 = 0xcafe_4a11;
/// A group without limit reads so large a number, or `max`.
const UNLIMITED_BYTES: u64 = 1 << 62;

impl Places {
    /// A tree that looks like a system: `root`/sys, `root`/proc.
    pub fn below(root: &Path) -> Places {
        Places { root: root.to_owned() }
    }

    fn at(&self, path: &str) -> PathBuf {
        self.root.join(path)
    }
}

/// Looks at everything that capture with a ring of this size needs, apart from the disks.
pub fn machine(places: &Places, ring: ByteCount) -> Vec<Fact> {
    let mut facts = vec![kernel(), types(places), lockdown(places), privileges()];
    facts.extend(trial::all(ring));
    facts.push(pins(places));
    facts.push(memory(places, ring));
    facts
}

fn fact(name: &'static str, finding: Finding, found: impl Into<String>, advice: &str) -> Fact {
    Fact { name, finding, found: found.into(), advice: advice.to_owned() }
}

fn kernel() -> Fact {
    let system = rustix::system::uname();
    let (release, machine) = (system.release().to_string_lossy(), system.machine().to_string_lossy());
    match &*machine {
        "x86_64" => fact("kernel", Finding::Good, format!("{release}, {machine}"), ""),
        _ => fact(
            "kernel",
            Finding::NoEbpf,
            format!("{release}, {machine}: the capture program is for x86_64"),
            "Use source = \"scan\".",
        ),
    }
}

fn types(places: &Places) -> Fact {
    let path = places.at("sys/kernel/btf/vmlinux");
    match fs::File::open(&path) {
        Ok(_) => fact("kernel types (BTF)", Finding::Good, "present", ""),
        Err(error) => fact(
            "kernel types (BTF)",
            Finding::NoEbpf,
            format!("open {}: {error}", path.display()),
            "Use a kernel that is built with CONFIG_DEBUG_INFO_BTF, as Debian's are.",
        ),
    }
}

fn lockdown(places: &Places) -> Fact {
    const NAME: &str = "lockdown";
    let path = places.at("sys/kernel/security/lockdown");
    let text = match fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return fact(
                NAME,
                Finding::Good,
                "none known (securityfs is not mounted, or has no lockdown)",
                "",
            );
        }
        Err(error) => {
            return fact(NAME, Finding::Good, format!("not known: {}: {error}", path.display()), "");
        }
    };
    // As in "none [integrity] confidentiality".
    match text.split_once('[').and_then(|(_, rest)| rest.split_once(']')).map(|(mode, _)| mode) {
        Some("confidentiality") => fact(
            NAME,
            Finding::NoEbpf,
            "confidentiality: it forbids reading kernel memory",
            "Boot with lockdown=integrity, which Secure Boot is content with.",
        ),
        Some(mode) => fact(NAME, Finding::Good, mode, ""),
        None => fact(NAME, Finding::Good, format!("not known: {:?}", text.trim()), ""),
    }
}

fn privileges() -> Fact {
    const NAME: &str = "privileges";
    let held = match capabilities(None) {
        Ok(sets) => sets.effective,
        Err(error) => return fact(NAME, Finding::Note, format!("ask the kernel for them: {error}"), ""),
    };
    privileges_of(held)
}

fn privileges_of(held: CapabilitySet) -> Fact {
    const NAME: &str = "privileges";
    const ADVICE: &str = "Run as root, or give the program CAP_BPF, CAP_PERFMON and CAP_SYS_ADMIN, and read access to the disks.";
    // Before there were the two others, CAP_SYS_ADMIN stood for them, and it still does.
    let all = held.contains(CapabilitySet::SYS_ADMIN);
    let missing: Vec<&str> = [
        ("CAP_BPF", !all && !held.contains(CapabilitySet::BPF)),
        ("CAP_PERFMON", !all && !held.contains(CapabilitySet::PERFMON)),
        ("CAP_SYS_ADMIN", !all),
    ]
    .into_iter()
    .filter_map(|(name, missing)| missing.then_some(name))
    .collect();
    match missing.as_slice() {
        [] => fact(NAME, Finding::Good, "CAP_BPF, CAP_PERFMON, CAP_SYS_ADMIN", ""),
        ["CAP_SYS_ADMIN"] => fact(
            NAME,
            Finding::NoData,
            "CAP_SYS_ADMIN is missing: the kernel hides where pages are, and file systems cannot be frozen",
            ADVICE,
        ),
        some => fact(NAME, Finding::NoEbpf, format!("missing: {}", some.join(", ")), ADVICE),
    }
}

fn pins(places: &Places) -> Fact {
    const NAME: &str = "BPF file system";
    const ADVICE: &str = "Mount it: mount -t bpf bpf /sys/fs/bpf";
    let path = places.at("sys/fs/bpf");
    match rustix::fs::statfs(&path) {
        Ok(stat) if stat.f_type == BPF_FS_MAGIC => fact(NAME, Finding::Good, "mounted at /sys/fs/bpf", ""),
        Ok(_) => fact(NAME, Finding::Note, "not mounted at /sys/fs/bpf", ADVICE),
        Err(error) => fact(NAME, Finding::Note, format!("look at {}: {error}", path.display()), ADVICE),
    }
}

/// The least that the process's control groups allow, against what the ring alone takes.
fn memory(places: &Places, ring: ByteCount) -> Fact {
    const NAME: &str = "memory limit";
    let groups = fs::read_to_string(places.at("proc/self/cgroup")).unwrap_or_default();
    // Version 2 has a single line: "0::/path".
    let own = groups.lines().find_map(|line| line.strip_prefix("0::/")).unwrap_or_default();
    let mut least = UNLIMITED_BYTES;
    let top = places.at("sys/fs/cgroup");
    for dir in top.join(own).ancestors().take_while(|dir| dir.starts_with(&top)) {
        let text = fs::read_to_string(dir.join("memory.max")).unwrap_or_default();
        least = least.min(text.trim().parse().unwrap_or(UNLIMITED_BYTES));
    }
    if least >= UNLIMITED_BYTES {
        return fact(NAME, Finding::Good, "none", "");
    }
    let limit = ByteCount(least);
    if limit <= ring {
        return fact(
            NAME,
            Finding::NoEbpf,
            format!("{limit} for this process, and the ring alone takes {ring}"),
            "Raise the limit (MemoryMax= of the service), or make ring_bytes smaller.",
        );
    }
    fact(NAME, Finding::Good, format!("{limit} for this process"), "")
}

#[cfg(test)]
mod tests {
    use super::*;

    const RING: ByteCount = ByteCount::mib(16);

    fn tree(files: &[(&str, &str)]) -> (tempfile::TempDir, Places) {
        let dir = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        let places = Places::below(dir.path());
        (dir, places)
    }

    #[test]
    fn missing_types_prevent_ebpf() {
        let (_dir, places) = tree(&[]);
        let found = types(&places);
        assert_eq!(found.finding, Finding::NoEbpf);
        assert!(found.found.contains("vmlinux") && found.advice.contains("CONFIG_DEBUG_INFO_BTF"));
        let (_dir, places) = tree(&[("sys/kernel/btf/vmlinux", "")]);
        assert_eq!(types(&places).finding, Finding::Good);
    }

    #[test]
    fn only_confidentiality_lockdown_prevents_ebpf() {
        for (text, finding, found) in [
            ("[none] integrity confidentiality\n", Finding::Good, "none"),
            ("none [integrity] confidentiality\n", Finding::Good, "integrity"),
            ("none integrity [confidentiality]\n", Finding::NoEbpf, "forbids reading kernel memory"),
            ("gibberish", Finding::Good, "not known"),
        ] {
            let (_dir, places) = tree(&[("sys/kernel/security/lockdown", text)]);
            let fact = lockdown(&places);
            assert!(fact.finding == finding && fact.found.contains(found), "{text}: {fact:?}");
        }
        let (_dir, places) = tree(&[]);
        assert_eq!(lockdown(&places).finding, Finding::Good);
    }

    #[test]
    fn missing_privileges_are_named() {
        let both = CapabilitySet::BPF | CapabilitySet::PERFMON;
        for (held, finding, found) in [
            (CapabilitySet::SYS_ADMIN, Finding::Good, "CAP_BPF, CAP_PERFMON, CAP_SYS_ADMIN"),
            (both, Finding::NoData, "CAP_SYS_ADMIN is missing"),
            (CapabilitySet::BPF, Finding::NoEbpf, "missing: CAP_PERFMON, CAP_SYS_ADMIN"),
            (CapabilitySet::empty(), Finding::NoEbpf, "missing: CAP_BPF, CAP_PERFMON, CAP_SYS_ADMIN"),
        ] {
            let fact = privileges_of(held);
            assert!(fact.finding == finding && fact.found.contains(found), "{held:?}: {fact:?}");
        }
    }

    #[test]
    fn the_least_memory_limit_counts() {
        let cgroup = ("proc/self/cgroup", "0::/system.slice/seawall.service\n");
        let own = "sys/fs/cgroup/system.slice/seawall.service/memory.max";
        let (_dir, places) = tree(&[cgroup, (own, "max\n")]);
        assert_eq!(memory(&places, RING).found, "none");
        let (_dir, places) =
            tree(&[cgroup, (own, "max\n"), ("sys/fs/cgroup/system.slice/memory.max", "1000000\n")]);
        let fact = memory(&places, RING);
        assert!(fact.finding == Finding::NoEbpf && fact.advice.contains("ring_bytes"), "{fact:?}");
        let (_dir, places) = tree(&[cgroup, (own, "1000000000\n")]);
        assert_eq!(memory(&places, RING).finding, Finding::Good);
    }

    #[test]
    fn a_plain_directory_is_no_bpf_file_system() {
        let (_dir, places) = tree(&[("sys/fs/bpf/file", "")]);
        assert!(pins(&places).found.contains("not mounted"));
        let (_dir, places) = tree(&[]);
        assert_eq!(pins(&places).finding, Finding::Note);
    }

    /// A ring that no kernel gives is refused in words.
    #[test]
    fn a_ring_that_is_refused_is_said() {
        let fact = trial::ring(ByteCount(u64::MAX / 2));
        assert!(fact.finding == Finding::NoEbpf && fact.advice.contains("ring_bytes"), "{fact:?}");
    }
}
