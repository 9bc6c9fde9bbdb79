use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::ResourceId;
use crate::PointSelector;

/// Texts that a machine must say. More are refused.
pub const PROOF_TEXTS_MAX: usize = 8;
/// The longest of them, in characters. Longer ones are refused.
pub const PROOF_TEXT_CHARS_MAX: usize = 200;

const EVERY_S: std::ops::RangeInclusive<u64> = 600..=366 * 86_400;
const WITHIN_S: std::ops::RangeInclusive<u64> = 10..=7200;
const MEMORY_BYTES: std::ops::RangeInclusive<u64> = 64 << 20..=1 << 40;
const CPUS: std::ops::RangeInclusive<u32> = 1..=255;

super::names! {
    /// What starts a system.
    BootFirmware {
        /// UEFI when there is an EFI system partition, else BIOS.
        Auto "auto"
        /// The BIOS that QEMU has.
        Bios "bios"
        /// OVMF.
        Uefi "uefi"
    }
}

super::names! {
    /// What a machine's disks are connected by.
    BootBus {
        /// virtio-blk; every Linux that ran in a virtual machine knows it.
        Virtio "virtio"
        /// virtio-scsi.
        Scsi "scsi"
        /// AHCI; for systems from physical machines.
        Sata "sata"
    }
}

/// How a group's machine is proven to come up from a recovery point.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ProofPolicy {
    /// A proof begins so long after the one before, in seconds, and the first at once; 0: only when somebody asks for one.
    #[serde(default)]
    #[schema(maximum = 31_622_400)]
    pub every_s: u64,
    /// What the machine must say on its serial console.
    #[serde(default = "expect")]
    #[schema(min_items = 1, max_items = 8)]
    pub expect: Vec<String>,
    /// How long that may take, in seconds.
    #[serde(default = "within_s")]
    #[schema(minimum = 10, maximum = 7200)]
    pub within_s: u64,
    /// The machine's memory.
    #[serde(default = "memory_bytes")]
    #[schema(minimum = 67_108_864, maximum = 1_099_511_627_776_u64)]
    pub memory_bytes: u64,
    /// Its processors.
    #[serde(default = "cpus")]
    #[schema(minimum = 1, maximum = 255)]
    pub cpus: u32,
    /// What starts it.
    #[serde(default = "firmware")]
    pub firmware: BootFirmware,
    /// What its disks are connected by.
    #[serde(default = "bus")]
    pub bus: BootBus,
    /// It has a network, which leads nowhere; without, it has none.
    #[serde(default)]
    pub isolated_network: bool,
}

fn expect() -> Vec<String> {
    vec!["login:".to_owned()]
}

fn within_s() -> u64 {
    600
}

fn memory_bytes() -> u64 {
    2 << 30
}

fn cpus() -> u32 {
    2
}

fn firmware() -> BootFirmware {
    BootFirmware::Auto
}

fn bus() -> BootBus {
    BootBus::Virtio
}

impl Default for ProofPolicy {
    fn default() -> ProofPolicy {
        ProofPolicy {
            every_s: 0,
            expect: expect(),
            within_s: within_s(),
            memory_bytes: memory_bytes(),
            cpus: cpus(),
            firmware: firmware(),
            bus: bus(),
            isolated_network: false,
        }
    }
}

impl ProofPolicy {
    /// Looks whether every value makes sense.
    ///
    /// # Errors
    /// The first that does not, with what would.
    pub fn check(&self) -> Result<(), String> {
        if self.every_s != 0 && !EVERY_S.contains(&self.every_s) {
            return Err(format!(
                "every_s of the proof is {}, expected 0 (when asked for) or {} to {}",
                self.every_s,
                EVERY_S.start(),
                EVERY_S.end()
            ));
        }
        if self.expect.is_empty() || self.expect.len() > PROOF_TEXTS_MAX {
            let count = self.expect.len();
            return Err(format!("expect of the proof has {count} texts, expected 1 to {PROOF_TEXTS_MAX}"));
        }
        let bad = self.expect.iter().find(|text| {
            text.is_empty()
                || text.chars().count() > PROOF_TEXT_CHARS_MAX
                || text.chars().any(char::is_control)
        });
        if let Some(bad) = bad {
            return Err(format!(
                "expect of the proof has {bad:?}, expected 1 to {PROOF_TEXT_CHARS_MAX} characters of one line"
            ));
        }
        let within = |name: &str, value: u64, range: std::ops::RangeInclusive<u64>| match range
            .contains(&value)
        {
            true => Ok(()),
            false => {
                Err(format!("{name} of the proof is {value}, expected {} to {}", range.start(), range.end()))
            }
        };
        within("within_s", self.within_s, WITHIN_S)?;
        within("memory_bytes", self.memory_bytes, MEMORY_BYTES)?;
        within("cpus", u64::from(self.cpus), u64::from(*CPUS.start())..=u64::from(*CPUS.end()))
    }
}

/// A proof that somebody asks for. What is left out is as the group's policy says.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct StartProof {
    /// latest, application (the newest that is application-consistent), or an epoch's number.
    #[serde(default)]
    #[schema(value_type = String, pattern = "^(latest|application|[1-9][0-9]{0,18})$", default = "latest")]
    pub point: PointSelector,
    /// What the machine must say on its serial console.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(min_items = 1, max_items = 8)]
    pub expect: Option<Vec<String>>,
    /// How long that may take, in seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 10, maximum = 7200)]
    pub within_s: Option<u64>,
    /// Which of its target servers starts the machine; may be left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target_server: Option<ResourceId>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_out_has_its_default_and_what_makes_no_sense_is_named() {
        let read: ProofPolicy = serde_json::from_str("{}").unwrap();
        assert_eq!(read, ProofPolicy::default());
        read.check().unwrap();
        let bad = |change: fn(&mut ProofPolicy), named: &str| {
            let mut proof = ProofPolicy::default();
            change(&mut proof);
            let error = proof.check().unwrap_err();
            assert!(error.contains(named), "{error}");
        };
        bad(|proof| proof.every_s = 1, "every_s of the proof is 1");
        bad(|proof| proof.expect.clear(), "0 texts");
        bad(|proof| proof.expect = vec![String::new()], "characters of one line");
        bad(|proof| proof.expect = vec!["x".repeat(201)], "characters of one line");
        bad(|proof| proof.expect = vec!["a\nb".into()], "characters of one line");
        bad(|proof| proof.within_s = 0, "within_s of the proof is 0");
        bad(|proof| proof.memory_bytes = 1, "memory_bytes");
        bad(|proof| proof.cpus = 256, "cpus of the proof is 256");
    }
}
