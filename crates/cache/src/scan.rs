//! Reading a segment back: which records it has, and what is damaged.
//!
//! A torn tail is not damage, and must be told from it, since behind damage there may be changesets that were
//! acknowledged. Every record says up to where the segment was durable when it was written; so does the cursor file.
//! What is invalid before the greatest such offset was durable once, and is damage. What is invalid after it was never
//! acknowledged: the log ends there.
//! Left over is damage to the last few records of a crashed log, which nothing later vouches for. It looks like a torn tail; the
//! sender notices, since less is held than it was told.

use std::io;
use std::ops::Range;

use durable::StorageFile;

use crate::format::{Flaw, HEADER_BYTES, RecordHeader, SegmentHeader};

const HEADER: u64 = HEADER_BYTES as u64;
/// How much is read at once where records have to be searched for.
const SEARCH_BYTES: u64 = 1 << 20;

/// What a segment holds.
#[derive(Debug)]
pub(crate) struct Scan {
    pub(crate) header: Result<SegmentHeader, Flaw>,
    pub(crate) records: Vec<Record>,
    /// Ranges that were durable and are not readable.
    pub(crate) damaged: Vec<Range<u64>>,
    /// The byte after the last usable one. What follows was never durable.
    pub(crate) end: u64,
    /// Whether something follows.
    pub(crate) torn: bool,
    /// All before it was known to be durable.
    pub(crate) durable: u64,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Record {
    pub(crate) header: RecordHeader,
    /// The header is whole, the data is not. Only known where data was read.
    pub(crate) damaged: bool,
}

/// How to read a segment.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Depth {
    /// The log may end within it: it is the last.
    pub(crate) last: bool,
    /// All before this is known to be durable.
    pub(crate) durable: u64,
    /// Whether the data is read and compared with its checksums.
    pub(crate) data: bool,
}

pub(crate) fn scan(file: &dyn StorageFile, number: u64, depth: Depth) -> io::Result<Scan> {
    let length = file.len()?;
    let mut first = [0; 2 * HEADER_BYTES];
    let got = read_up_to(file, &mut first, 0)?;
    let header = SegmentHeader::decode(&first[..got.min(HEADER_BYTES)], number);
    let mut scan =
        Scan { header, records: Vec::new(), damaged: Vec::new(), end: length, torn: false, durable: 0 };
    let segment = match header {
        Ok(header) => header,
        Err(Flaw::Version(_)) => return Ok(scan),
        // The first record tells the salt as well.
        Err(_) => match first[..got].get(HEADER_BYTES..).and_then(|record| salvage(record, number)) {
            Some(segment) => {
                scan.damaged.push(0..HEADER);
                segment
            }
            None => {
                // Records are written only once the header is durable; so without one there are none, unless
                // something is there.
                scan.torn = depth.last && depth.durable <= HEADER && file.next_data(HEADER)?.is_none();
                if scan.torn {
                    scan.end = 0;
                } else {
                    scan.damaged.push(0..length);
                }
                return Ok(scan);
            }
        },
    };

    let mut holes: Vec<Range<u64>> = Vec::new();
    let mut at = HEADER;
    let mut buffer = Vec::new();
    while at < length {
        if let Some(record) = read_record(file, segment, at, length, depth.data, &mut buffer)? {
            at = record.header.end();
            scan.records.push(record);
        } else {
            let next = search(file, segment, at + HEADER, length)?.unwrap_or(length);
            holes.push(at..next);
            at = next;
        }
    }
    let vouched = scan.records.iter().map(|record| record.header.durable).max().unwrap_or(0);
    scan.durable = vouched.max(depth.durable);
    if depth.last {
        let bad_data = scan.records.iter().filter(|record| record.damaged).map(|record| record.header.offset);
        let torn_at =
            bad_data.chain(holes.iter().map(|hole| hole.start)).filter(|at| *at >= scan.durable).min();
        if let Some(torn_at) = torn_at {
            scan.torn = file
                .next_data(torn_at)?
                .is_some_and(|(start, end)| !is_zero(file, start, end).unwrap_or(false));
            scan.end = torn_at;
            scan.records.retain(|record| record.header.offset < torn_at);
            holes.retain(|hole| hole.start < torn_at);
        }
    }
    scan.damaged.extend(holes);
    Ok(scan)
}

fn salvage(record: &[u8], number: u64) -> Option<SegmentHeader> {
    let salt = u64::from_le_bytes(*record.get(8..16)?.first_chunk()?);
    let segment = SegmentHeader { number, salt };
    RecordHeader::decode(record, segment, HEADER).ok().map(|_| segment)
}

fn read_record(
    file: &dyn StorageFile,
    segment: SegmentHeader,
    at: u64,
    length: u64,
    data: bool,
    buffer: &mut Vec<u8>,
) -> io::Result<Option<Record>> {
    let mut bytes = [0; HEADER_BYTES];
    let got = read_up_to(file, &mut bytes, at)?;
    let Ok(header) = RecordHeader::decode(&bytes[..got], segment, at) else { return Ok(None) };
    if header.end() > length {
        return Ok(None);
    }
    let mut damaged = false;
    if data && header.length > 0 {
        buffer.resize(header.length as usize, 0);
        file.read_exact_at(buffer, header.payload_offset())?;
        damaged = crc32c::crc32c(buffer) != header.checksum;
    }
    Ok(Some(Record { header, damaged }))
}

/// The first place at or after `from` where a record starts. `from` is a multiple of the header's size.
fn search(file: &dyn StorageFile, segment: SegmentHeader, from: u64, length: u64) -> io::Result<Option<u64>> {
    let mut buffer = vec![0; SEARCH_BYTES as usize];
    let mut at = from;
    while let Some((start, _)) = file.next_data(at)? {
        at = at.max(start / HEADER * HEADER);
        if at + HEADER > length {
            break;
        }
        let got = read_up_to(file, &mut buffer, at)?;
        for candidate in buffer[..got].chunks_exact(HEADER_BYTES) {
            if RecordHeader::decode(candidate, segment, at).is_ok() {
                return Ok(Some(at));
            }
            at += HEADER;
        }
        if (got as u64) < HEADER {
            break;
        }
    }
    Ok(None)
}

fn is_zero(file: &dyn StorageFile, mut at: u64, end: u64) -> io::Result<bool> {
    let mut buffer = vec![0; SEARCH_BYTES as usize];
    while at < end {
        let got = read_up_to(file, &mut buffer, at)?;
        if got == 0 {
            break;
        }
        if buffer[..got].iter().any(|byte| *byte != 0) {
            return Ok(false);
        }
        at += got as u64;
    }
    Ok(true)
}

pub(crate) fn read_up_to(file: &dyn StorageFile, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut got = 0;
    while got < buffer.len() {
        match file.read_at(&mut buffer[got..], offset + got as u64)? {
            0 => break,
            count => got += count,
        }
    }
    Ok(got)
}
