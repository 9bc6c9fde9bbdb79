//! How a disk wants to be started, and what there is to start it with.

use std::path::{Path, PathBuf};

use control::fleet::BootFirmware;

use crate::BootError;

/// As much of a disk's beginning as is looked at: a partition table of 128 entries on sectors of 4 KiB.
pub const HEAD_BYTES: u64 = 40 << 10;
/// The type of an EFI system partition, as it lies on the disk.
const EFI_SYSTEM: [u8; 16] =
    [0x28, 0x73, 0x2a, 0xc1, 0x1f, 0xf8, 0xd2, 0x11, 0xba, 0x4b, 0x00, 0xa0, 0xc9, 0x3e, 0xc9, 0x3b];
/// The same in an MBR.
const EFI_SYSTEM_MBR: u8 = 0xef;
/// The most entries of a partition table that are looked at.
const ENTRIES_MAX: u32 = 256;
/// Where distributions put UEFI for virtual machines: its code, and the variables to begin with.
const UEFI: [(&str, &str); 5] = [
    ("/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd"),
    ("/usr/share/OVMF/OVMF_CODE.fd", "/usr/share/OVMF/OVMF_VARS.fd"),
    ("/usr/share/edk2/ovmf/OVMF_CODE.fd", "/usr/share/edk2/ovmf/OVMF_VARS.fd"),
    ("/usr/share/edk2/x64/OVMF_CODE.4m.fd", "/usr/share/edk2/x64/OVMF_VARS.4m.fd"),
    ("/usr/share/qemu/ovmf-x86_64-code.bin", "/usr/share/qemu/ovmf-x86_64-vars.bin"),
];

/// What the beginning of a disk tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    /// Whether it has an EFI system partition.
    pub efi: bool,
    /// Whether it has code for a BIOS.
    pub bios: bool,
    /// The sectors that its partition table counts in.
    pub sector_bytes: u32,
}

impl Head {
    /// Looks at the first [`HEAD_BYTES`] of a disk, or what there is of it.
    pub fn of(head: &[u8]) -> Head {
        let mut found = Head { efi: false, bios: false, sector_bytes: 512 };
        let Some(mbr) = head.get(..512).filter(|mbr| mbr[510..] == [0x55, 0xaa]) else { return found };
        found.bios = mbr[..440].iter().any(|byte| *byte != 0);
        found.efi = mbr[446..510].chunks_exact(16).any(|entry| entry[4] == EFI_SYSTEM_MBR);
        for sector_bytes in [512_usize, 4096] {
            let Some(gpt) =
                head.get(sector_bytes..sector_bytes + 92).filter(|gpt| gpt.starts_with(b"EFI PART"))
            else {
                continue;
            };
            found.sector_bytes = sector_bytes as u32;
            let number = |at: usize| u32::from_le_bytes([gpt[at], gpt[at + 1], gpt[at + 2], gpt[at + 3]]);
            // Of the place of the entries only the low half matters: they follow the header.
            let (first, count, size) = (number(72), number(80).min(ENTRIES_MAX), number(84));
            let entries = head.get((first as usize).saturating_mul(sector_bytes)..).unwrap_or_default();
            let mut entries = entries.chunks_exact((size as usize).clamp(128, 4096)).take(count as usize);
            found.efi |= entries.any(|entry| entry.starts_with(&EFI_SYSTEM));
        }
        found
    }

    /// What to start it with, and why.
    pub(crate) fn choose(self, wanted: BootFirmware) -> Result<(bool, &'static str), BootError> {
        Ok(match (wanted, self.efi, self.bios) {
            (BootFirmware::Uefi, ..) => (true, "as asked for"),
            (BootFirmware::Bios, ..) => (false, "as asked for"),
            (BootFirmware::Auto, true, _) => (true, "there is an EFI system partition"),
            (BootFirmware::Auto, false, true) => (false, "there is boot code and no EFI system partition"),
            (BootFirmware::Auto, false, false) => return Err(BootError::NothingToStart),
        })
    }
}

/// UEFI's code, and a copy of its variables for this machine alone.
pub(crate) fn uefi(dir: &Path) -> Result<(PathBuf, PathBuf), BootError> {
    let found = UEFI.iter().find(|(code, vars)| Path::new(code).exists() && Path::new(vars).exists());
    let (code, vars) = found.ok_or(BootError::NoFirmware)?;
    let copy = dir.join("uefi-variables.fd");
    std::fs::copy(vars, &copy).map_err(BootError::io(format!("copy {vars}")))?;
    Ok((PathBuf::from(code), copy))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gpt(sector: usize, kinds: &[[u8; 16]]) -> Vec<u8> {
        let mut head = vec![0; HEAD_BYTES as usize];
        head[510..512].copy_from_slice(&[0x55, 0xaa]);
        head[446 + 4] = 0xee;
        head[sector..sector + 8].copy_from_slice(b"EFI PART");
        head[sector + 72] = 2;
        head[sector + 80] = 128;
        head[sector + 84] = 128;
        for (index, kind) in kinds.iter().enumerate() {
            head[2 * sector + index * 128..][..16].copy_from_slice(kind);
        }
        head
    }

    #[test]
    fn disks_tell_how_they_want_to_be_started() {
        let other = [7; 16];
        for sector in [512, 4096] {
            let head = Head::of(&gpt(sector, &[other, EFI_SYSTEM]));
            assert_eq!(head, Head { efi: true, bios: false, sector_bytes: sector as u32 });
            assert!(head.choose(BootFirmware::Auto).unwrap().0);
            assert!(!head.choose(BootFirmware::Bios).unwrap().0);
        }
        let mut bios = gpt(512, &[other]);
        bios[0] = 0xeb;
        let head = Head::of(&bios);
        assert_eq!((head.efi, head.bios), (false, true));
        assert!(!head.choose(BootFirmware::Auto).unwrap().0);
        assert!(Head::of(&gpt(512, &[other])).choose(BootFirmware::Auto).is_err());
        assert!(Head::of(&[0; 4096]).choose(BootFirmware::Auto).is_err());
        // Whatever the numbers say, nothing is looked at that is not there.
        let mut wild = gpt(512, &[EFI_SYSTEM]);
        wild[512 + 72..512 + 92].fill(0xff);
        assert!(!Head::of(&wild).efi);
        for length in [0, 10, 512, 600, 1024] {
            Head::of(&bios[..length]);
        }
    }
}
