//! What fuzzers and property tests throw at the protocol: a client's bytes, without a network.

use std::io;
use std::sync::Arc;

use block::{ByteCount, ByteOffset, Extent};
use parking_lot::Mutex;

use crate::channel::{Channel, TlsSide};
use crate::disk::check_range;
use crate::negotiate::{Exported, Security, negotiate};
use crate::session::{self, Counters};
use crate::{Disk, DiskError};

/// The size of the disk that arbitrary clients get.
pub const DISK_BYTES: usize = 256 * 1024;

/// A disk in memory.
#[derive(Debug)]
struct Memory(Mutex<Vec<u8>>);

impl Disk for Memory {
    fn size(&self) -> ByteCount {
        ByteCount(DISK_BYTES as u64)
    }

    fn is_writable(&self) -> bool {
        true
    }

    fn read_at(&self, buffer: &mut [u8], offset: ByteOffset) -> Result<(), DiskError> {
        check_range(self.size(), offset, buffer.len() as u64)?;
        buffer.copy_from_slice(&self.0.lock()[offset.0 as usize..][..buffer.len()]);
        Ok(())
    }

    fn next_data(&self, offset: ByteOffset) -> Result<Option<Extent>, DiskError> {
        let start = offset.0.next_multiple_of(8192);
        Ok((start < DISK_BYTES as u64)
            .then(|| Extent::new(ByteOffset(start), ByteCount(4096)).expect("a range within a small disk")))
    }

    fn write_at(&self, data: &[u8], offset: ByteOffset) -> Result<(), DiskError> {
        check_range(self.size(), offset, data.len() as u64)?;
        self.0.lock()[offset.0 as usize..][..data.len()].copy_from_slice(data);
        Ok(())
    }

    fn zero(&self, extent: Extent, _: bool) -> Result<(), DiskError> {
        self.write_at(&vec![0; extent.length().0 as usize], extent.offset())
    }

    fn trim(&self, extent: Extent) -> Result<(), DiskError> {
        self.zero(extent, false)
    }
}

/// A client that says what it says whatever it is answered.
struct Script {
    said: Mutex<(Vec<u8>, usize)>,
    chunk: usize,
    heard: Mutex<Vec<u8>>,
}

impl Channel for Script {
    fn receive(&self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut said = self.said.lock();
        let (bytes, at) = &mut *said;
        let count = buffer.len().min(self.chunk).min(bytes.len() - *at);
        buffer[..count].copy_from_slice(&bytes[*at..*at + count]);
        *at += count;
        Ok(count)
    }

    fn send(&self, bytes: &[u8]) -> io::Result<()> {
        self.heard.lock().extend_from_slice(bytes);
        Ok(())
    }

    fn start_tls(self: Arc<Self>, _: &TlsSide) -> io::Result<Arc<dyn Channel>> {
        Err(io::Error::other("no TLS here"))
    }

    fn shut_down(&self) {}
}

/// Serves a client that says arbitrary bytes, in three ways: as they are; after a sound beginning, so that requests are
/// reached; and as the tails of requests with the right magic. Panics on a fault.
pub fn serve_arbitrary(data: &[u8]) {
    let Some((&way, data)) = data.split_first() else { return };
    let said = match way & 3 {
        0 => data.to_vec(),
        1 => [&opening(way & 4 != 0)[..], data].concat(),
        _ => {
            let mut said = opening(way & 4 != 0);
            for request in data.chunks(24) {
                let mut head = [0; 28];
                head[..4].copy_from_slice(&crate::protocol::REQUEST_MAGIC.to_be_bytes());
                head[4..4 + request.len()].copy_from_slice(request);
                // Most offsets and lengths within the disk, and most commands known.
                head[6] = 0;
                head[7] &= 7;
                head[16..21].fill(0);
                head[24..26].fill(0);
                said.extend_from_slice(&head);
                if head[7] == 1 {
                    said.resize(said.len() + usize::from(head[26]) * 256 + usize::from(head[27]), 7);
                }
            }
            said
        }
    };
    // The result is of no interest: anything but a panic is right.
    let _ = serve_script(said, 1 + usize::from(way) * 16);
}

/// Serves a client that says `said` in chunks; what it was answered.
///
/// # Errors
/// As sessions end.
pub fn serve_script(said: Vec<u8>, chunk: usize) -> Result<Vec<u8>, (io::Error, Vec<u8>)> {
    let script = Arc::new(Script { said: Mutex::new((said, 0)), chunk, heard: Mutex::default() });
    let disk: Arc<dyn Disk> = Arc::new(Memory(Mutex::new(vec![1; DISK_BYTES])));
    let exports = [Exported { name: "disk".to_owned(), description: String::new(), disk }];
    let outcome = match negotiate(script.clone(), &exports, &Security::Open) {
        Ok(Some(agreed)) => session::serve(agreed, &Counters::default()),
        Ok(None) => Ok(()),
        Err(error) => Err(error),
    };
    let heard = std::mem::take(&mut *script.heard.lock());
    outcome.map(|()| heard.clone()).map_err(|error| (error, heard))
}

/// What a client says up to its first request.
pub fn opening(structured: bool) -> Vec<u8> {
    let mut said = 3_u32.to_be_bytes().to_vec();
    let mut option = |number: u32, data: &[u8]| {
        said.extend_from_slice(&crate::protocol::OPTION_MAGIC.to_be_bytes());
        said.extend_from_slice(&number.to_be_bytes());
        said.extend_from_slice(&(data.len() as u32).to_be_bytes());
        said.extend_from_slice(data);
    };
    if structured {
        option(8, &[]);
        let query = [&4_u32.to_be_bytes()[..], b"disk", &1_u32.to_be_bytes(), &15_u32.to_be_bytes()];
        option(10, &[&query.concat()[..], b"base:allocation"].concat());
    }
    option(7, &[&4_u32.to_be_bytes()[..], b"disk", &[0, 0]].concat());
    said
}

/// What [`serve_arbitrary`] begins with: a negotiation, and requests to be put into shape.
pub fn serve_seeds() -> Vec<Vec<u8>> {
    let requests: Vec<u8> = (0..8_u8).flat_map(|command| [command; 24]).collect();
    vec![
        [&[0x40][..], &opening(true)].concat(),
        [&[0x41][..], &requests].concat(),
        [&[0x42][..], &requests].concat(),
        [&[0xf6][..], &requests].concat(),
    ]
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]
        #[test]
        fn arbitrary_clients_do_no_harm(data in prop::collection::vec(any::<u8>(), 0..600)) {
            serve_arbitrary(&data);
        }
    }

    #[test]
    fn seeds_do_no_harm() {
        serve_seeds().iter().for_each(|seed| serve_arbitrary(seed));
    }

    fn request(flags: u16, command: u16, offset: u64, length: u32) -> Vec<u8> {
        let mut bytes = crate::protocol::REQUEST_MAGIC.to_be_bytes().to_vec();
        bytes.extend_from_slice(&flags.to_be_bytes());
        bytes.extend_from_slice(&command.to_be_bytes());
        bytes.extend_from_slice(&[9; 8]);
        bytes.extend_from_slice(&offset.to_be_bytes());
        bytes.extend_from_slice(&length.to_be_bytes());
        bytes
    }

    /// What a sound client says is served, to the byte, however it is cut up.
    #[test]
    fn a_simple_read_is_answered_to_the_byte() {
        let begin = serve_script(opening(false), 7).unwrap();
        for chunk in [1, 13, 100_000] {
            let said = [opening(false), request(0, 1, 10, 3), b"xyz".to_vec(), request(0, 0, 9, 5)].concat();
            let heard = serve_script(said, chunk).unwrap();
            let head = [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0, 9, 9, 9, 9, 9, 9, 9, 9];
            let expected = [&head[..], &head, &[1], b"xyz", &[1]].concat();
            assert_eq!(heard[begin.len()..], expected);
        }
    }

    #[test]
    fn what_breaks_the_protocol_is_left() {
        let long_write = [opening(true), request(0, 1, 0, u32::MAX)].concat();
        let wrong_magic = [opening(true), vec![0; 28]].concat();
        let mut long_option = opening(false);
        let at = long_option.len() - 10 - 4;
        long_option[at..at + 4].copy_from_slice(&u32::MAX.to_be_bytes());
        let wrong_flags = 0x8000_0003_u32.to_be_bytes().to_vec();
        let half = opening(true)[..19].to_vec();
        for said in [long_write, wrong_magic, long_option, wrong_flags, half] {
            assert!(serve_script(said.clone(), 1000).is_err(), "{said:?}");
        }
    }

    /// Requests that cannot be done are answered with an error, and the next one is served.
    #[test]
    fn bad_requests_are_answered() {
        let size = DISK_BYTES as u64;
        let bad = [
            (request(0, 0, size, 1), 22),
            (request(0, 0, u64::MAX, 2), 22),
            (request(0, 0, 0, 0), 22),
            (request(0, 0, 0, (32 << 20) + 1), 22),
            (request(0, 77, 0, 1), 22),
            (request(0x8000, 0, 0, 1), 22),
            (request(0, 7, 0, 0), 22),
            (request(0, 4, size - 1, 2), 28),
            (request(0, 6, u64::MAX, 2), 28),
            ([request(0, 1, size, 2), vec![0; 2]].concat(), 28),
        ];
        let begin = serve_script(opening(true), 100).unwrap().len();
        for (said, errno) in bad {
            let said = [opening(true), said, request(0, 3, 0, 0)].concat();
            let heard = serve_script(said.clone(), 100).unwrap();
            let answer = &heard[begin..];
            assert_eq!(
                (&answer[..8], answer[23]),
                (&[0x66, 0x8e, 0x33, 0xef, 0, 1, 0x80, 1][..], errno),
                "{said:?}"
            );
            assert_eq!(answer[answer.len() - 20..][..8], [0x66, 0x8e, 0x33, 0xef, 0, 1, 0, 0]);
        }
    }
}
