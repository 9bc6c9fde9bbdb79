//! The frozen first frame. Its layout never changes, so that any two versions can at least tell each other that they
//! cannot talk. The byte table is in docs/formats/wire.md.

use std::ops::RangeInclusive;

/// How long the frame is, in bytes.
pub const HANDSHAKE_BYTES: usize = 32;
/// What it begins with.
pub const HANDSHAKE_MAGIC: [u8; 8] = *b"SEAWIRE\n";
/// The protocol versions that this build speaks.
///
/// 1: the first.
pub const VERSIONS: RangeInclusive<u16> = 1..=1;

/// The upper half of the flags must be understood; the lower half may be ignored.
const FLAGS_MANDATORY: u64 = 0xffff_ffff_0000_0000;

/// What a connection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// Changesets of one group.
    Deliver,
    /// One request of an operator.
    Operate,
    /// Comparing what source and target of one group hold.
    Compare,
    /// How many bytes a second come through.
    Measure,
}

impl Purpose {
    /// What the connecting side wants to do.
    pub(crate) fn verb(self) -> &'static str {
        match self {
            Purpose::Deliver => "deliver",
            Purpose::Operate => "operate",
            Purpose::Compare => "compare",
            Purpose::Measure => "measure",
        }
    }
}

/// Why the first frame is not acceptable.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HandshakeError {
    /// Another protocol.
    #[error("the first bytes are not Seawall's")]
    Magic,
    /// Bytes were changed on the way, or made by a broken program.
    #[error("the checksum is {found:08x}, expected {expected:08x}")]
    Checksum {
        /// In the frame.
        found: u32,
        /// Of the frame.
        expected: u32,
    },
    /// The smallest version is above the largest.
    #[error("the version range {min} to {max} is empty")]
    Range {
        /// The smallest version.
        min: u16,
        /// The largest.
        max: u16,
    },
    /// No version is spoken by both.
    #[error("it speaks versions {min} to {max}, this side {} to {}; upgrade the older side", VERSIONS.start(), VERSIONS.end())]
    Version {
        /// The peer's smallest version.
        min: u16,
        /// The peer's largest.
        max: u16,
    },
    /// A purpose that this version does not know.
    #[error("unknown purpose {0}; upgrade this side")]
    Purpose(u16),
    /// The peer answered for another purpose, as one does that does not know ours.
    #[error("it cannot {0}; upgrade it")]
    Declined(&'static str),
    /// A flag that must be understood and is not.
    #[error("unknown mandatory flags {0:016x}; upgrade this side")]
    Flags(u64),
}

/// The first frame of each side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Handshake {
    pub(crate) version_min: u16,
    pub(crate) version_max: u16,
    pub(crate) purpose: Purpose,
    pub(crate) flags: u64,
}

impl Handshake {
    pub(crate) fn new(purpose: Purpose) -> Handshake {
        Handshake { version_min: *VERSIONS.start(), version_max: *VERSIONS.end(), purpose, flags: 0 }
    }

    pub(crate) fn encode(self) -> [u8; HANDSHAKE_BYTES] {
        let mut bytes = [0; HANDSHAKE_BYTES];
        bytes[0..8].copy_from_slice(&HANDSHAKE_MAGIC);
        bytes[8..10].copy_from_slice(&self.version_min.to_le_bytes());
        bytes[10..12].copy_from_slice(&self.version_max.to_le_bytes());
        let purpose: u16 = match self.purpose {
            Purpose::Deliver => 1,
            Purpose::Operate => 2,
            Purpose::Compare => 3,
            Purpose::Measure => 4,
        };
        bytes[12..14].copy_from_slice(&purpose.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.flags.to_le_bytes());
        let checksum = crc32c::crc32c(&bytes[..28]);
        bytes[28..32].copy_from_slice(&checksum.to_le_bytes());
        bytes
    }

    pub(crate) fn decode(bytes: &[u8; HANDSHAKE_BYTES]) -> Result<Handshake, HandshakeError> {
        let u16_at = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        if bytes[0..8] != HANDSHAKE_MAGIC {
            return Err(HandshakeError::Magic);
        }
        let found = u32::from_le_bytes([bytes[28], bytes[29], bytes[30], bytes[31]]);
        let expected = crc32c::crc32c(&bytes[..28]);
        if found != expected {
            return Err(HandshakeError::Checksum { found, expected });
        }
        let (min, max) = (u16_at(8), u16_at(10));
        if min > max {
            return Err(HandshakeError::Range { min, max });
        }
        if max < *VERSIONS.start() || min > *VERSIONS.end() {
            return Err(HandshakeError::Version { min, max });
        }
        let purpose = match u16_at(12) {
            1 => Purpose::Deliver,
            2 => Purpose::Operate,
            3 => Purpose::Compare,
            4 => Purpose::Measure,
            other => return Err(HandshakeError::Purpose(other)),
        };
        let mut flags = [0; 8];
        flags.copy_from_slice(&bytes[16..24]);
        let flags = u64::from_le_bytes(flags);
        if flags & FLAGS_MANDATORY != 0 {
            return Err(HandshakeError::Flags(flags & FLAGS_MANDATORY));
        }
        Ok(Handshake { version_min: min, version_max: max, purpose, flags })
    }

    /// The largest version that both speak. Both sides reckon the same one.
    pub(crate) fn version(self) -> u16 {
        self.version_max.min(*VERSIONS.end())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The handshake of version 1 as docs/formats/wire.md has it. If this test fails, the change is wrong, not the test.
    #[test]
    fn golden_bytes() {
        let golden: [u8; 32] = [
            0x53, 0x45, 0x41, 0x57, 0x49, 0x52, 0x45, 0x0a, // SEAWIRE\n
            0x01, 0x00, 0x01, 0x00, 0x01, 0x00, 0x00, 0x00, // versions 1 to 1, deliver, reserved
            0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, // flags
            0x00, 0x00, 0x00, 0x00, 0xf9, 0x1d, 0x68, 0x08, // reserved, crc32c
        ];
        let encoded = Handshake::new(Purpose::Deliver).encode();
        assert_eq!(encoded, golden, "{encoded:02x?}");
        assert_eq!(Handshake::decode(&golden).unwrap(), Handshake::new(Purpose::Deliver));
    }

    #[test]
    fn newer_peers_are_understood_where_versions_overlap() {
        let newer = Handshake { version_min: 1, version_max: 9, purpose: Purpose::Operate, flags: 0xff };
        assert_eq!(Handshake::decode(&newer.encode()).unwrap().version(), 1);
        let alien = Handshake { version_min: 2, ..newer };
        assert_eq!(Handshake::decode(&alien.encode()), Err(HandshakeError::Version { min: 2, max: 9 }));
        let demanding = Handshake { flags: 1 << 32, ..newer };
        assert_eq!(Handshake::decode(&demanding.encode()), Err(HandshakeError::Flags(1 << 32)));
    }

    proptest! {
        #[test]
        fn any_change_is_noticed(byte in 0..32_usize, bit in 0..8_u32) {
            let mut bytes = Handshake::new(Purpose::Deliver).encode();
            bytes[byte] ^= 1 << bit;
            prop_assert!(Handshake::decode(&bytes).is_err());
        }

        #[test]
        fn no_bytes_panic(bytes: [u8; 32]) {
            let _ = Handshake::decode(&bytes);
        }
    }
}
