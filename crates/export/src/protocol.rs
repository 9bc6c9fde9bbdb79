//! The protocol's numbers, and its fixed messages. All numbers are big-endian.

/// Decoding takes fixed-size messages, so the only thing that can be wrong is what they say.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Malformed {
    #[error("the magic number is {0:#x}")]
    Magic(u64),
    #[error("the client's flags are {0:#x}")]
    ClientFlags(u32),
    #[error("the data of option {option} is {length} bytes long")]
    OptionLength { option: u32, length: u32 },
    #[error("more than {} options", crate::OPTIONS_MAX)]
    Options,
    #[error("a write of {0} bytes")]
    WriteLength(u32),
    #[error("option {0} is not allowed before TLS")]
    TlsRequired(u32),
    #[error("no such disk")]
    UnknownExport,
}

pub(crate) const GREETING_MAGIC: u64 = 0x4e42_444d_4147_4943;
pub(crate) const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
pub(crate) const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
pub(crate) const REQUEST_MAGIC: u32 = 0x2560_9513;
pub(crate) const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
pub(crate) const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;

/// Both sides': fixed newstyle, and no zeroes after the answer to EXPORT_NAME.
pub(crate) const FIXED_NEWSTYLE: u32 = 1;
pub(crate) const NO_ZEROES: u32 = 2;

pub(crate) mod option {
    pub(crate) const EXPORT_NAME: u32 = 1;
    pub(crate) const ABORT: u32 = 2;
    pub(crate) const LIST: u32 = 3;
    pub(crate) const STARTTLS: u32 = 5;
    pub(crate) const INFO: u32 = 6;
    pub(crate) const GO: u32 = 7;
    pub(crate) const STRUCTURED_REPLY: u32 = 8;
    pub(crate) const LIST_META_CONTEXT: u32 = 9;
    pub(crate) const SET_META_CONTEXT: u32 = 10;
}

pub(crate) mod answer {
    pub(crate) const ACK: u32 = 1;
    pub(crate) const SERVER: u32 = 2;
    pub(crate) const INFO: u32 = 3;
    pub(crate) const META_CONTEXT: u32 = 4;
    pub(crate) const ERR_UNSUPPORTED: u32 = 0x8000_0001;
    pub(crate) const ERR_POLICY: u32 = 0x8000_0002;
    pub(crate) const ERR_INVALID: u32 = 0x8000_0003;
    pub(crate) const ERR_TLS_REQUIRED: u32 = 0x8000_0005;
    pub(crate) const ERR_UNKNOWN: u32 = 0x8000_0006;
}

pub(crate) mod info {
    pub(crate) const EXPORT: u16 = 0;
    pub(crate) const NAME: u16 = 1;
    pub(crate) const DESCRIPTION: u16 = 2;
    pub(crate) const BLOCK_SIZE: u16 = 3;
}

/// What the server can do, as told with a disk's size.
pub(crate) mod feature {
    pub(crate) const HAS_FLAGS: u16 = 1;
    pub(crate) const READ_ONLY: u16 = 1 << 1;
    pub(crate) const FLUSH: u16 = 1 << 2;
    pub(crate) const FUA: u16 = 1 << 3;
    pub(crate) const TRIM: u16 = 1 << 5;
    pub(crate) const WRITE_ZEROES: u16 = 1 << 6;
    pub(crate) const DONT_FRAGMENT: u16 = 1 << 7;
    pub(crate) const MULTI_CONNECTION: u16 = 1 << 8;
    pub(crate) const CACHE: u16 = 1 << 10;
    pub(crate) const FAST_ZERO: u16 = 1 << 11;
}

pub(crate) mod command {
    pub(crate) const READ: u16 = 0;
    pub(crate) const WRITE: u16 = 1;
    pub(crate) const DISCONNECT: u16 = 2;
    pub(crate) const FLUSH: u16 = 3;
    pub(crate) const TRIM: u16 = 4;
    pub(crate) const CACHE: u16 = 5;
    pub(crate) const WRITE_ZEROES: u16 = 6;
    pub(crate) const BLOCK_STATUS: u16 = 7;
}

pub(crate) mod flag {
    pub(crate) const FUA: u16 = 1;
    pub(crate) const NO_HOLE: u16 = 2;
    pub(crate) const DONT_FRAGMENT: u16 = 4;
    pub(crate) const ONE_EXTENT: u16 = 8;
    pub(crate) const FAST_ZERO: u16 = 16;
}

pub(crate) mod chunk {
    pub(crate) const DONE: u16 = 1;
    pub(crate) const NONE: u16 = 0;
    pub(crate) const DATA: u16 = 1;
    pub(crate) const HOLE: u16 = 2;
    pub(crate) const BLOCK_STATUS: u16 = 5;
    pub(crate) const ERROR: u16 = 0x8001;
}

/// Linux's numbers, as the protocol fixes them.
pub(crate) mod errno {
    pub(crate) const PERMISSION: u32 = 1;
    pub(crate) const IO: u32 = 5;
    pub(crate) const INVALID: u32 = 22;
    pub(crate) const NO_SPACE: u32 = 28;
    pub(crate) const OVERFLOW: u32 = 75;
}

/// The only metadata context there is, its number, and the state of an extent that is a hole and reads as zeroes.
pub(crate) const ALLOCATION: &[u8] = b"base:allocation";
pub(crate) const ALLOCATION_ID: u32 = 1;
pub(crate) const HOLE_AND_ZERO: u32 = 3;

pub(crate) fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

pub(crate) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from(u16_at(bytes, at)) << 16 | u32::from(u16_at(bytes, at + 2))
}

pub(crate) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) << 32 | u64::from(u32_at(bytes, at + 4))
}

/// The head of an option: magic, number, length of what follows.
pub(crate) const OPTION_HEAD_BYTES: usize = 16;

/// Reads an option's head.
pub(crate) fn option_head(bytes: &[u8; OPTION_HEAD_BYTES]) -> Result<(u32, u32), Malformed> {
    let magic = u64_at(bytes, 0);
    if magic != OPTION_MAGIC {
        return Err(Malformed::Magic(magic));
    }
    Ok((u32_at(bytes, 8), u32_at(bytes, 12)))
}

/// A request; the data of a write follows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Request {
    pub(crate) flags: u16,
    pub(crate) command: u16,
    pub(crate) cookie: u64,
    pub(crate) offset: u64,
    pub(crate) length: u32,
}

impl Request {
    pub(crate) const BYTES: usize = 28;

    pub(crate) fn decode(bytes: &[u8; Request::BYTES]) -> Result<Request, Malformed> {
        let magic = u32_at(bytes, 0);
        if magic != REQUEST_MAGIC {
            return Err(Malformed::Magic(magic.into()));
        }
        Ok(Request {
            flags: u16_at(bytes, 4),
            command: u16_at(bytes, 6),
            cookie: u64_at(bytes, 8),
            offset: u64_at(bytes, 16),
            length: u32_at(bytes, 24),
        })
    }

    /// Byte after the last, when that fits in 64 bits.
    pub(crate) fn end(&self) -> Option<u64> {
        self.offset.checked_add(self.length.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes as a client on the wire sends them (NBD_CMD_WRITE with FUA of 4096 bytes at 1 MiB).
    #[test]
    fn a_request_is_read_as_the_protocol_says() {
        let mut bytes = [0; Request::BYTES];
        bytes[..8].copy_from_slice(&[0x25, 0x60, 0x95, 0x13, 0, 1, 0, 1]);
        bytes[8..16].copy_from_slice(&[1, 2, 3, 4, 5, 6, 7, 8]);
        bytes[16..24].copy_from_slice(&[0, 0, 0, 0, 0, 16, 0, 0]);
        bytes[24..].copy_from_slice(&[0, 0, 16, 0]);
        let expected = Request {
            flags: flag::FUA,
            command: command::WRITE,
            cookie: 0x0102_0304_0506_0708,
            offset: 1 << 20,
            length: 4096,
        };
        assert_eq!(Request::decode(&bytes), Ok(expected));
        bytes[3] = 0x14;
        assert_eq!(Request::decode(&bytes), Err(Malformed::Magic(0x2560_9514)));
    }
}
