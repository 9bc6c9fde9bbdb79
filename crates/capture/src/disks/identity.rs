use std::fmt;
use std::fs;
use std::path::Path;

use super::probe::Tags;

/// What a disk is known by, whatever the kernel calls it. Marks of the device itself come before marks of its content.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Identity {
    /// World-wide name, as sysfs gives it.
    pub wwn: Option<String>,
    /// Serial number.
    pub serial: Option<String>,
    /// UUID of its partition table.
    pub pt_uuid: Option<String>,
    /// UUID of a file system, or of a member of a larger one, on the whole disk.
    pub fs_uuid: Option<String>,
}

/// Whether two identities are one disk's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sameness {
    /// They have a mark in common.
    Same,
    /// They differ in a mark that both have.
    Different,
    /// No mark that both have: nothing can be said.
    Unknown,
}

impl Identity {
    /// Of the disk whose directory in sysfs this is.
    pub(super) fn read(sys: &Path, tags: Tags) -> Identity {
        let text = |name: &str| {
            let text = fs::read_to_string(sys.join(name)).ok()?;
            let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
            (!text.is_empty()).then_some(text)
        };
        Identity {
            wwn: text("wwid").or_else(|| text("device/wwid")),
            serial: text("serial").or_else(|| text("device/serial")).or_else(|| unit_serial(sys)),
            pt_uuid: tags.pt_uuid,
            // The members of an array share its UUID.
            fs_uuid: tags.uuid_sub.or(tags.uuid),
        }
    }

    fn marks(&self) -> [&Option<String>; 4] {
        [&self.wwn, &self.serial, &self.pt_uuid, &self.fs_uuid]
    }

    /// The first mark that both have decides: a disk stays itself when its content is made anew.
    pub fn sameness(&self, other: &Identity) -> Sameness {
        let mut both = self.marks().into_iter().zip(other.marks());
        match both.find(|(own, other)| own.is_some() && other.is_some()) {
            Some((own, other)) if own == other => Sameness::Same,
            Some(_) => Sameness::Different,
            None => Sameness::Unknown,
        }
    }

    /// Whether nothing is known.
    pub fn is_empty(&self) -> bool {
        self.marks().iter().all(|mark| mark.is_none())
    }
}

/// A SCSI disk's serial number: page 0x80 of its vital product data, after a header of 4 bytes.
fn unit_serial(sys: &Path) -> Option<String> {
    let page = fs::read(sys.join("device/vpd_pg80")).ok()?;
    let text = String::from_utf8_lossy(page.get(4..)?).trim_matches(['\0', ' ']).to_owned();
    (!text.is_empty()).then_some(text)
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = ["wwn", "serial", "ptuuid", "fsuuid"];
        let marks: Vec<String> = names
            .iter()
            .zip(self.marks())
            .filter_map(|(name, mark)| mark.as_ref().map(|mark| format!("{name}:{mark}")))
            .collect();
        f.write_str(if marks.is_empty() { "no mark of its own".into() } else { marks.join(", ") }.as_str())
    }
}
