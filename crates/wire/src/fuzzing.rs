//! What the fuzzer throws at what peers send. Built for it alone.

use std::sync::OnceLock;
use std::time::Duration;

use rustls::pki_types::CertificateDer;

use crate::authority::{Authority, ServerNames, new_request};
use crate::compare::{Comparison, Turn};
use crate::credentials::{identity_of, serial_of};
use crate::frame::{Accept, Begin, Condition, Frame, FrameKind, Held, Open, Outgoing, Refuse};
use crate::handshake::{Handshake, Purpose};
use crate::link::FrameReader;
use crate::measure::{Measured, Measurement};
use crate::revoked::{parse, revoked_text};
use crate::{HANDSHAKE_BYTES, HANDSHAKE_MAGIC, Identity, Role};

const SILENCE_MAX: Duration = Duration::from_secs(60);

/// A runtime for readers that never wait, since what they read is in memory.
fn block_on<F: Future>(future: F) -> F::Output {
    thread_local! {
        static RUNTIME: tokio::runtime::Runtime =
            tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime without input and output");
    }
    RUNTIME.with(|runtime| runtime.block_on(future))
}

/// A peer's frames. What is read is what was sent, and each payload may be any message.
pub fn frames(data: &[u8]) {
    let mut read = 0;
    block_on(async {
        let mut reader = FrameReader::new(data);
        while let Ok(Some(frame)) = reader.next(SILENCE_MAX).await {
            let again = Outgoing::new(frame.kind, frame.argument, vec![frame.payload.clone()]);
            assert_eq!(&data[read..read + again.header.len()], again.header);
            read += again.len();
            assert_eq!(&data[read - frame.payload.len()..read], frame.payload);
            messages(&frame);
        }
    });
}

fn messages(frame: &Frame) {
    let _ = frame.message::<Open>();
    let _ = frame.message::<Accept>();
    let _ = frame.message::<Begin>();
    let _ = frame.message::<Held>();
    let _ = frame.message::<Condition>();
    let _ = frame.message::<Refuse>().map(Refuse::into_error);
    let _ = frame.message::<Measured>().map(Measured::bytes_per_s);
    let _ = Comparison::opening(frame);
    let _ = Measurement::opening(frame);
    if let Some(turn) = Turn::decode(&frame.payload) {
        assert_eq!(turn.encode(), frame.payload);
    }
}

/// What [`frames`] begins with: a delivery, its answers, a comparison, a measurement.
pub fn frames_seeds() -> Vec<Vec<u8>> {
    use block::{ByteCount, Epoch, Generation, GroupId};
    let open = Open { group: GroupId([1; 16]), generation: Generation(2) };
    let held = Held { held: Epoch(5), applied: Epoch(4) };
    let accept = Accept { held, credit: ByteCount::mib(4), rebased: false };
    let refuse = Refuse::new(crate::RefusalCode::Gap, true, "epoch 9 after 5");
    let plain = |kind, payload: &'static [u8]| Outgoing::new(kind, 6, vec![payload.into()]);
    let deliver = [
        Outgoing::message(FrameKind::Open, 0, &open),
        Outgoing::message(FrameKind::Begin, 6, &Begin { total: ByteCount(5) }),
        plain(FrameKind::Data, b"01234"),
        plain(FrameKind::End, b""),
    ];
    let answer = [
        Outgoing::message(FrameKind::Accept, 0, &accept),
        Outgoing::message(FrameKind::Hold, 0, &held),
        Outgoing::message(
            FrameKind::Condition,
            8192,
            &Condition { has_point: true, damaged: ByteCount(4096), unproven: ByteCount(8192) },
        ),
        Outgoing::message(FrameKind::Refuse, 0, &refuse),
    ];
    let compare = [plain(FrameKind::Compare, &[3; 40]), plain(FrameKind::Compare, &[0; 8])];
    let measured = Measured { bytes: ByteCount::mib(8), time_us: 70_000 };
    let measure = [
        Outgoing::new(FrameKind::Probe, 6, Vec::new()),
        Outgoing::new(FrameKind::Probe, 0, vec![bytes::Bytes::from_static(b"012345")]),
        Outgoing::message(FrameKind::Measured, 0, &measured),
    ];
    let bytes = |frames: &[Outgoing]| {
        let parts = frames.iter().flat_map(|frame| {
            std::iter::once(&frame.header[..]).chain(frame.payload.iter().map(|part| &part[..]))
        });
        parts.collect::<Vec<_>>().concat()
    };
    vec![bytes(&deliver), bytes(&answer), bytes(&compare), bytes(&measure)]
}

/// The first bytes of a peer. With the lowest bit of the first byte, magic and checksum are mended.
pub fn handshake(data: &[u8]) {
    let Some((&way, data)) = data.split_first() else { return };
    let Some(bytes) = data.first_chunk::<HANDSHAKE_BYTES>() else { return };
    let mut bytes = *bytes;
    if way & 1 == 1 {
        bytes[..8].copy_from_slice(&HANDSHAKE_MAGIC);
        let checksum = crc32c::crc32c(&bytes[..28]);
        bytes[28..].copy_from_slice(&checksum.to_le_bytes());
    }
    if let Ok(handshake) = Handshake::decode(&bytes) {
        assert_eq!(Handshake::decode(&handshake.encode()), Ok(handshake));
        assert!((handshake.version_min..=handshake.version_max).contains(&handshake.version()));
    }
}

/// What [`handshake`] begins with.
pub fn handshake_seeds() -> Vec<Vec<u8>> {
    let of = |way, purpose| [&[way][..], &Handshake::new(purpose).encode()].concat();
    vec![of(0, Purpose::Deliver), of(1, Purpose::Operate), of(1, Purpose::Compare), of(1, Purpose::Measure)]
}

/// The list of revoked certificates.
pub fn revoked(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Ok(serials) = parse(text) {
        assert_eq!(parse(&revoked_text(&serials)), Ok(serials));
    }
}

/// What [`revoked`] begins with.
pub fn revoked_seeds() -> Vec<Vec<u8>> {
    let serials = [crate::Serial::from_bytes(&[7; 16]), crate::Serial::from_bytes(&[9; 20])];
    vec![revoked_text(&serials).into_bytes(), revoked_text([]).into_bytes()]
}

fn operator() -> Identity {
    Identity::new(Role::Operator, "fuzz", None).expect("a sound name")
}

fn authority() -> &'static Authority {
    static AUTHORITY: OnceLock<Authority> = OnceLock::new();
    AUTHORITY.get_or_init(|| {
        let dir = std::env::temp_dir().join(format!("seawall-fuzz-{}", std::process::id()));
        let authority = Authority::create(&dir).expect("a directory for files");
        // It is all in memory now.
        let _ = std::fs::remove_dir_all(&dir);
        authority
    })
}

/// A request for a certificate, as parts send it when they enrol; and a certificate, of which a peer has proven only that the
/// authority signed it.
pub fn certificate(data: &[u8]) {
    if let Ok(text) = std::str::from_utf8(data)
        && let Ok(signed) =
            authority().sign(text, &operator(), &ServerNames::default(), Duration::from_secs(60))
    {
        let der = der(&signed.certificate_pem);
        assert_eq!(identity_of(&der).expect("the identity that was asked for"), operator());
        assert_eq!(serial_of(&der).expect("a number"), signed.serial);
    }
    let der = CertificateDer::from_slice(data);
    let _ = (identity_of(&der), serial_of(&der), std::str::from_utf8(data).map(crate::fingerprint));
    if let Ok(identity) =
        std::str::from_utf8(data).map_err(drop).and_then(|uri| Identity::from_uri(uri).map_err(drop))
    {
        assert_eq!(identity.to_uri().as_bytes(), data);
    }
}

fn der(pem: &str) -> CertificateDer<'static> {
    use rustls::pki_types::pem::PemObject;
    CertificateDer::from_pem_slice(pem.as_bytes()).expect("our own certificate")
}

/// What [`certificate`] begins with.
pub fn certificate_seeds() -> Vec<Vec<u8>> {
    let (_, request) = new_request().expect("randomness");
    let signed = authority().sign(&request, &operator(), &ServerNames::default(), Duration::from_secs(60));
    let pem = signed.expect("our own request").certificate_pem;
    vec![request.into_bytes(), der(&pem).to_vec(), pem.into_bytes(), operator().to_uri().into_bytes()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeds_are_read() {
        for (seeds, run) in [
            (frames_seeds(), frames as fn(&[u8])),
            (handshake_seeds(), handshake),
            (revoked_seeds(), revoked),
            (certificate_seeds(), certificate),
        ] {
            seeds.iter().for_each(|seed| run(seed));
        }
        let counts = frames_seeds()
            .iter()
            .map(|seed| {
                block_on(async {
                    let mut reader = FrameReader::new(&seed[..]);
                    let mut count = 0;
                    while reader.next(SILENCE_MAX).await.unwrap().is_some() {
                        count += 1;
                    }
                    count
                })
            })
            .collect::<Vec<u32>>();
        assert_eq!(counts, [4, 4, 2, 3]);
    }
}
