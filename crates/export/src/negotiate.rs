//! From the greeting to the choice of a disk.
//!
//! Nothing is allocated from a length that was not checked, and every option is answered or ends the connection.

use std::io;
use std::sync::Arc;

use crate::channel::{Channel, TlsSide};
use crate::disk::Disk;
use crate::protocol::{
    ALLOCATION, ALLOCATION_ID, FIXED_NEWSTYLE, GREETING_MAGIC, Malformed, NO_ZEROES, OPTION_HEAD_BYTES,
    OPTION_MAGIC, OPTION_REPLY_MAGIC, answer, feature, info, option, option_head, u16_at, u32_at,
};
use crate::{NAME_BYTES_MAX, OPTION_BYTES_MAX, OPTIONS_MAX, REQUEST_BYTES_MAX};

/// A disk with the name that clients choose it by.
#[derive(Clone, Debug)]
pub struct Exported {
    /// At most [`NAME_BYTES_MAX`] bytes. The first disk of an export also answers to the empty name.
    pub name: String,
    /// What it is, for people.
    pub description: String,
    /// The disk.
    pub disk: Arc<dyn Disk>,
}

/// What a client must show.
#[derive(Clone, Debug)]
pub enum Security {
    /// Nothing; the way to the listener is guarded by other means.
    Open,
    /// TLS may be used.
    Offered(TlsSide),
    /// Without TLS nothing is told and nothing is served.
    Required(TlsSide),
}

/// What a client and this side agreed on.
pub(crate) struct Agreed {
    pub(crate) channel: Arc<dyn Channel>,
    pub(crate) disk: Arc<dyn Disk>,
    pub(crate) structured: bool,
    pub(crate) allocation: bool,
}

/// Receives exactly `buffer.len()` bytes; `false` when the peer ended before the first.
pub(crate) fn receive_exact(channel: &dyn Channel, buffer: &mut [u8]) -> io::Result<bool> {
    let mut filled = 0;
    while filled < buffer.len() {
        match channel.receive(&mut buffer[filled..])? {
            0 if filled == 0 => return Ok(false),
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            count => filled += count,
        }
    }
    Ok(true)
}

fn malformed(why: Malformed) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

/// Negotiates; `None` when the client left in good order.
pub(crate) fn negotiate(
    channel: Arc<dyn Channel>,
    exports: &[Exported],
    security: &Security,
) -> io::Result<Option<Agreed>> {
    let mut greeting = Vec::with_capacity(18);
    greeting.extend_from_slice(&GREETING_MAGIC.to_be_bytes());
    greeting.extend_from_slice(&OPTION_MAGIC.to_be_bytes());
    greeting.extend_from_slice(&((FIXED_NEWSTYLE | NO_ZEROES) as u16).to_be_bytes());
    channel.send(&greeting)?;
    let mut flags = [0; 4];
    if !receive_exact(&*channel, &mut flags)? {
        return Ok(None);
    }
    let flags = u32_at(&flags, 0);
    if flags & !(FIXED_NEWSTYLE | NO_ZEROES) != 0 || flags & FIXED_NEWSTYLE == 0 {
        return Err(malformed(Malformed::ClientFlags(flags)));
    }
    let no_zeroes = flags & NO_ZEROES != 0;
    let mut haggling = Haggling { channel, exports, secure: false, structured: false, allocation: None };
    for _ in 0..OPTIONS_MAX {
        let mut head = [0; OPTION_HEAD_BYTES];
        if !receive_exact(&*haggling.channel, &mut head)? {
            return Ok(None);
        }
        let (number, length) = option_head(&head).map_err(malformed)?;
        if u64::from(length) > OPTION_BYTES_MAX.0 {
            return Err(malformed(Malformed::OptionLength { option: number, length }));
        }
        let mut data = vec![0; length as usize];
        if length > 0 && !receive_exact(&*haggling.channel, &mut data)? {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let hidden = matches!(security, Security::Required(_)) && !haggling.secure;
        match number {
            option::ABORT => {
                haggling.answer(number, answer::ACK, &[])?;
                return Ok(None);
            }
            option::STARTTLS => haggling.start_tls(security, &data)?,
            option::EXPORT_NAME if hidden => return Err(malformed(Malformed::TlsRequired(number))),
            _ if hidden => haggling.answer(number, answer::ERR_TLS_REQUIRED, b"use TLS first")?,
            option::EXPORT_NAME => return haggling.export_name(&data, no_zeroes).map(Some),
            option::INFO | option::GO => {
                if let Some(chosen) = haggling.go(number, &data)? {
                    return Ok(Some(haggling.agreed(chosen)));
                }
            }
            option::LIST => haggling.list(&data)?,
            option::STRUCTURED_REPLY if data.is_empty() => {
                haggling.structured = true;
                haggling.answer(number, answer::ACK, &[])?;
            }
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT => haggling.contexts(number, &data)?,
            option::STRUCTURED_REPLY => haggling.answer(number, answer::ERR_INVALID, b"data given")?,
            _ => haggling.answer(number, answer::ERR_UNSUPPORTED, b"unknown option")?,
        }
    }
    Err(malformed(Malformed::Options))
}

/// What has been agreed so far.
struct Haggling<'a> {
    channel: Arc<dyn Channel>,
    exports: &'a [Exported],
    secure: bool,
    structured: bool,
    /// The disk that block status was agreed on for.
    allocation: Option<usize>,
}

impl Haggling<'_> {
    fn answer(&self, option: u32, kind: u32, data: &[u8]) -> io::Result<()> {
        let mut bytes = Vec::with_capacity(20 + data.len());
        bytes.extend_from_slice(&OPTION_REPLY_MAGIC.to_be_bytes());
        bytes.extend_from_slice(&option.to_be_bytes());
        bytes.extend_from_slice(&kind.to_be_bytes());
        bytes.extend_from_slice(&(data.len() as u32).to_be_bytes());
        bytes.extend_from_slice(data);
        self.channel.send(&bytes)
    }

    fn find(&self, name: &[u8]) -> Option<usize> {
        let by_name = self.exports.iter().position(|export| export.name.as_bytes() == name);
        by_name.or_else(|| (name.is_empty() && !self.exports.is_empty()).then_some(0))
    }

    fn agreed(self, chosen: usize) -> Agreed {
        Agreed {
            disk: self.exports[chosen].disk.clone(),
            allocation: self.structured && self.allocation == Some(chosen),
            structured: self.structured,
            channel: self.channel,
        }
    }

    fn start_tls(&mut self, security: &Security, data: &[u8]) -> io::Result<()> {
        match security {
            _ if !data.is_empty() => self.answer(option::STARTTLS, answer::ERR_INVALID, b"data given"),
            _ if self.secure => self.answer(option::STARTTLS, answer::ERR_INVALID, b"TLS is on already"),
            Security::Open => self.answer(option::STARTTLS, answer::ERR_POLICY, b"no TLS here"),
            Security::Offered(side) | Security::Required(side) => {
                self.answer(option::STARTTLS, answer::ACK, &[])?;
                self.channel = self.channel.clone().start_tls(side)?;
                // What was said in the open could have been anybody's words.
                (self.secure, self.structured, self.allocation) = (true, false, None);
                Ok(())
            }
        }
    }

    fn list(&self, data: &[u8]) -> io::Result<()> {
        if !data.is_empty() {
            return self.answer(option::LIST, answer::ERR_INVALID, b"data given");
        }
        for export in self.exports {
            let mut data = (export.name.len() as u32).to_be_bytes().to_vec();
            data.extend_from_slice(export.name.as_bytes());
            data.extend_from_slice(export.description.as_bytes());
            self.answer(option::LIST, answer::SERVER, &data)?;
        }
        self.answer(option::LIST, answer::ACK, &[])
    }

    /// The old way to choose. There is no way to refuse but to end the connection.
    fn export_name(self, name: &[u8], no_zeroes: bool) -> io::Result<Agreed> {
        let chosen = self.find(name).ok_or_else(|| malformed(Malformed::UnknownExport))?;
        let disk = &self.exports[chosen].disk;
        let mut bytes = disk.size().0.to_be_bytes().to_vec();
        bytes.extend_from_slice(&features(&**disk, self.structured).to_be_bytes());
        if !no_zeroes {
            bytes.resize(bytes.len() + 124, 0);
        }
        self.channel.send(&bytes)?;
        Ok(self.agreed(chosen))
    }

    /// INFO and GO: the disk, when GO chose one.
    fn go(&self, number: u32, data: &[u8]) -> io::Result<Option<usize>> {
        let Some((name, wanted)) = parse_go(data) else {
            self.answer(number, answer::ERR_INVALID, b"malformed")?;
            return Ok(None);
        };
        let Some(chosen) = self.find(name) else {
            self.answer(number, answer::ERR_UNKNOWN, b"no such disk; NBD_OPT_LIST lists them")?;
            return Ok(None);
        };
        let export = &self.exports[chosen];
        let tell =
            |kind: u16, data: &[u8]| self.answer(number, answer::INFO, &[&kind.to_be_bytes(), data].concat());
        if wanted.contains(&info::NAME) {
            tell(info::NAME, export.name.as_bytes())?;
        }
        if wanted.contains(&info::DESCRIPTION) {
            tell(info::DESCRIPTION, export.description.as_bytes())?;
        }
        // Any range is served; whole blocks are served best.
        let sizes = [1, block::BLOCK_BYTES as u32, REQUEST_BYTES_MAX.0 as u32].map(u32::to_be_bytes);
        tell(info::BLOCK_SIZE, &sizes.concat())?;
        let mut size = export.disk.size().0.to_be_bytes().to_vec();
        size.extend_from_slice(&features(&*export.disk, self.structured).to_be_bytes());
        tell(info::EXPORT, &size)?;
        self.answer(number, answer::ACK, &[])?;
        Ok((number == option::GO).then_some(chosen))
    }

    /// LIST_META_CONTEXT and SET_META_CONTEXT.
    fn contexts(&mut self, number: u32, data: &[u8]) -> io::Result<()> {
        let set = number == option::SET_META_CONTEXT;
        if set {
            self.allocation = None;
        }
        let Some((name, queries)) = parse_contexts(data) else {
            return self.answer(number, answer::ERR_INVALID, b"malformed");
        };
        if set && !self.structured {
            return self.answer(number, answer::ERR_INVALID, b"agree on structured replies first");
        }
        let Some(chosen) = self.find(name) else {
            return self.answer(number, answer::ERR_UNKNOWN, b"no such disk; NBD_OPT_LIST lists them");
        };
        // A listing also takes the namespace alone, or no query for everything.
        let wanted = queries.iter().any(|query| *query == ALLOCATION || !set && *query == b"base:");
        if wanted || !set && queries.is_empty() {
            let id = if set { ALLOCATION_ID } else { 0 };
            self.answer(number, answer::META_CONTEXT, &[&id.to_be_bytes(), ALLOCATION].concat())?;
            if set {
                self.allocation = Some(chosen);
            }
        }
        self.answer(number, answer::ACK, &[])
    }
}

/// What can be done with a disk.
fn features(disk: &dyn Disk, structured: bool) -> u16 {
    use feature::{
        CACHE, DONT_FRAGMENT, FAST_ZERO, FLUSH, FUA, HAS_FLAGS, MULTI_CONNECTION, READ_ONLY, TRIM,
        WRITE_ZEROES,
    };
    // What one connection has written and had answered, every other one reads.
    let mut flags = HAS_FLAGS | FLUSH | MULTI_CONNECTION | CACHE;
    flags |= if disk.is_writable() { FUA | TRIM | WRITE_ZEROES | FAST_ZERO } else { READ_ONLY };
    if structured { flags | DONT_FRAGMENT } else { flags }
}

/// A length of 4 bytes and as many bytes.
fn split_text(data: &[u8]) -> Option<(&[u8], &[u8])> {
    if data.len() < 4 {
        return None;
    }
    let length = u32_at(data, 0) as usize;
    if length > NAME_BYTES_MAX {
        return None;
    }
    data[4..].split_at_checked(length)
}

/// The name, and what is to be told.
fn parse_go(data: &[u8]) -> Option<(&[u8], Vec<u16>)> {
    let (name, rest) = split_text(data)?;
    if rest.len() < 2 || rest.len() != 2 + usize::from(u16_at(rest, 0)) * 2 {
        return None;
    }
    Some((name, rest[2..].chunks_exact(2).map(|pair| u16_at(pair, 0)).collect()))
}

/// The name, and the queries.
fn parse_contexts(data: &[u8]) -> Option<(&[u8], Vec<&[u8]>)> {
    let (name, rest) = split_text(data)?;
    if rest.len() < 4 {
        return None;
    }
    let count = u32_at(rest, 0);
    let mut rest = &rest[4..];
    let mut queries = Vec::new();
    for _ in 0..count {
        // Each takes 4 bytes at least, so the number of them is bounded by the option's length.
        let (query, after) = split_text(rest)?;
        queries.push(query);
        rest = after;
    }
    rest.is_empty().then_some((name, queries))
}
