use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use super::Identity;

/// How a configuration names a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DeviceName {
    /// A device node, or a file for `scan`.
    Path(PathBuf),
    /// `serial:...`, as the disk tells it.
    Serial(String),
    /// `wwn:...`, as in /sys/block/sda/device/wwid.
    Wwn(String),
    /// `ptuuid:...`, of the partition table.
    PtUuid(String),
    /// `fsuuid:...`, of a file system on the disk, on a partition of it, or on a volume or array that it is below.
    FsUuid(String),
}

/// A text that names no disk.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "read device {0:?}: expected a path such as /dev/vda, or serial:..., wwn:..., ptuuid:... or fsuuid:... with a value"
)]
pub struct DeviceNameError(String);

impl FromStr for DeviceName {
    type Err = DeviceNameError;
    fn from_str(text: &str) -> Result<DeviceName, DeviceNameError> {
        if text.is_empty() {
            return Err(DeviceNameError(text.to_owned()));
        }
        let make: fn(String) -> DeviceName = match text.split_once(':').map(|(kind, _)| kind) {
            Some("serial") => DeviceName::Serial,
            Some("wwn") => DeviceName::Wwn,
            Some("ptuuid") => DeviceName::PtUuid,
            Some("fsuuid") => DeviceName::FsUuid,
            // Such as /dev/disk/by-path/pci-0000:00:05.0.
            _ if text.starts_with(['/', '.']) || !text.contains(':') => {
                return Ok(DeviceName::Path(text.into()));
            }
            _ => return Err(DeviceNameError(text.to_owned())),
        };
        match text.split_once(':') {
            Some((_, value)) if !value.is_empty() => Ok(make(value.to_owned())),
            _ => Err(DeviceNameError(text.to_owned())),
        }
    }
}

impl fmt::Display for DeviceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DeviceName::Path(path) => path.display().fmt(f),
            DeviceName::Serial(value) => write!(f, "serial:{value}"),
            DeviceName::Wwn(value) => write!(f, "wwn:{value}"),
            DeviceName::PtUuid(value) => write!(f, "ptuuid:{value}"),
            DeviceName::FsUuid(value) => write!(f, "fsuuid:{value}"),
        }
    }
}

impl DeviceName {
    /// Whether a whole disk of this identity is the one that is named.
    pub(super) fn is_of(&self, identity: &Identity) -> bool {
        let is = |own: &Option<String>, value: &str| {
            own.as_deref().is_some_and(|own| own.eq_ignore_ascii_case(value))
        };
        match self {
            DeviceName::Serial(value) => is(&identity.serial, value),
            // /dev/disk/by-id writes wwn-0x5000... for what sysfs calls naa.5000...
            DeviceName::Wwn(value) => {
                is(&identity.wwn, value)
                    || value.strip_prefix("0x").is_some_and(|digits| {
                        ["naa.", "eui."].iter().any(|kind| is(&identity.wwn, &format!("{kind}{digits}")))
                    })
            }
            DeviceName::PtUuid(value) => is(&identity.pt_uuid, value),
            DeviceName::Path(_) | DeviceName::FsUuid(_) => false,
        }
    }
}
