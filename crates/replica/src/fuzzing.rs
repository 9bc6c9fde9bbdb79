//! What the fuzzer throws at the decoders of a replica's files. Built for it alone.
//!
//! Each takes bytes as they are, or (by the first byte) with what any forger can get right: magic, version, whose it is,
//! checksums; so that what lies behind them is reached. What is read must mean the same when it is written and read again.

use std::path::Path;
use std::sync::Arc;

use block::{ByteCount, Consistency, Epoch, Generation, GroupId, UnixNanos, VolumeId};
use changeset::VolumeInfo;
use durable::{CrashStorage, OpenMode, RecordFile, Storage, StorageFile};

use crate::bytes::{get_u16, get_u32, put};
use crate::image::{DataCursor, Image};
use crate::layer::{Entry, Header, Layer, LayerWriter, Meta, Scratch, file_name};
use crate::promoted::{journal, marker};
use crate::span::{SpanHeader, SpanRecord};
use crate::state::State;
use crate::tree::{
    Cursor, Kind, Limits, Pages, Record, Shape, Source, Stream, TreeWriter, check_whole, mend,
};
use crate::{Pace, Place, ReplicaError, bad, catalogue, pins, span, sums};

const GROUP: GroupId = GroupId([0x11; 16]);
const VOLUME: VolumeId = VolumeId([0x22; 16]);
const GENERATION: Generation = Generation(2);
const CRC_BYTES: usize = 4;
/// Sectors at which trees are searched.
const SOUGHT: [u64; 5] = [0, 9, 1024, 1 << 40, u64::MAX];

/// Whether to mend, how, and the rest.
fn split(data: &[u8]) -> Option<(u8, Vec<u8>)> {
    data.split_first().map(|(way, rest)| (*way, rest.to_vec()))
}

/// Puts a magic, a version and the checksum of all at the end.
fn sealed(bytes: &mut [u8], magic: &[u8; 8], version: u32) {
    let Some(body) = bytes.len().checked_sub(CRC_BYTES).filter(|body| *body >= 12) else { return };
    put(bytes, 0, magic);
    put(bytes, 8, &version.to_le_bytes());
    let crc = crc32c::crc32c(&bytes[..body]);
    put(bytes, body, &crc.to_le_bytes());
}

fn put_within(bytes: &mut [u8], at: usize, value: &[u8]) {
    if bytes.len() >= at + value.len() {
        put(bytes, at, value);
    }
}

/// Where a replica stands.
pub fn state(data: &[u8]) {
    let Some((way, mut bytes)) = split(data) else { return };
    if way & 1 == 1 {
        sealed(&mut bytes, b"SEAWREPL", [1, 3, 2, 4][usize::from(way >> 1 & 3)]);
    }
    if let Ok(state) = State::decode(&bytes) {
        assert_eq!(State::decode(&state.encode()), Ok(state));
    }
}

/// What [`state`] begins with.
pub fn state_seeds() -> Vec<Vec<u8>> {
    let mut state = State::new(GROUP);
    let empty = state.encode();
    state.generation = Some(GENERATION);
    (state.applied, state.floor) = (Epoch(9), Epoch(3));
    let volume = crate::state::VolumeState { info: info(), place: Place::File };
    state.volumes.push(volume);
    state.failover = Some(crate::Failover { point: Epoch(4), from: Generation(1), ended: Epoch(6) });
    let failed_over = state.encode();
    (state.failover, state.floor, state.unproven) = (None, Epoch::NONE, true);
    seeds([empty, failed_over, state.encode()])
}

/// The bytes as they are, and to be mended.
fn seeds(all: impl IntoIterator<Item = Vec<u8>>) -> Vec<Vec<u8>> {
    let ways = |bytes: Vec<u8>| [0, 1, 3].map(|way| [&[way][..], &bytes].concat());
    all.into_iter().flat_map(ways).collect()
}

/// Points that do not go.
pub fn pins(data: &[u8]) {
    let Some((way, mut bytes)) = split(data) else { return };
    if way & 1 == 1 {
        put_within(&mut bytes, 16, &GROUP.0);
        sealed(&mut bytes, b"SEAWPINS", 1);
    }
    if let Ok(found) = pins::decode(&bytes, GROUP) {
        assert_eq!(pins::decode(&pins::encode(GROUP, &found), GROUP), Ok(found));
    }
}

/// What [`pins()`] begins with.
pub fn pins_seeds() -> Vec<Vec<u8>> {
    let label = "audit".parse().ok();
    let pin = crate::Pin { label, pinned: UnixNanos(5), expires: Some(UnixNanos(9)) };
    let plain = crate::Pin { label: None, expires: None, ..pin.clone() };
    seeds([pins::encode(GROUP, &[(Epoch(3), pin), (Epoch(7), plain)].into())])
}

/// Whether a group is promoted.
pub fn promoted(data: &[u8]) {
    let Some((way, mut bytes)) = split(data) else { return };
    if way & 1 == 1 {
        put_within(&mut bytes, 16, &GROUP.0);
        sealed(&mut bytes, b"SEAWPROM", 1);
    }
    if let Ok(found) = marker::Marker::decode(&bytes, GROUP) {
        assert_eq!(marker::Marker::decode(&found.encode(GROUP), GROUP), Ok(found));
    }
}

/// What [`promoted()`] begins with.
pub fn promoted_seeds() -> Vec<Vec<u8>> {
    let marker =
        marker::Marker { promoted: true, generation: GENERATION, own: Epoch(9), since: UnixNanos(5) };
    seeds([
        marker.encode(GROUP).to_vec(),
        marker::Marker { promoted: false, ..marker }.encode(GROUP).to_vec(),
    ])
}

/// What was written to a promoted group.
pub fn journal(data: &[u8]) {
    let Some((way, mut bytes)) = split(data) else { return };
    if way & 1 == 1 {
        mend_journal(&mut bytes);
    }
    let Ok(Some(header)) = journal::Header::decode(&bytes) else { return };
    assert_eq!(journal::Header::decode(&header.encode()), Ok(Some(header)));
    let read = |buffer: &mut [u8], at: u64| {
        let rest = usize::try_from(at).ok().and_then(|at| bytes.get(at..)).unwrap_or_default();
        let length = rest.len().min(buffer.len());
        buffer[..length].copy_from_slice(&rest[..length]);
        Ok::<_, ()>(length)
    };
    let mut again = header.encode().to_vec();
    let mut end = header.end();
    let found = journal::read_records(&header, read, |record| {
        let (head, behind) = journal::encode_record(&record, end);
        again.extend_from_slice(&head);
        if let journal::Payload::Data(data) = record.payload {
            again.extend_from_slice(data);
        }
        end = behind;
        Ok(())
    });
    assert_eq!(found, Ok(end));
    // What lies between the fields is not read.
    assert_eq!(again.len() as u64, end.length);
    assert_eq!(again[journal::HEADER_BYTES..], bytes[journal::HEADER_BYTES..again.len()]);
}

/// Puts the right checksums where records seem to be.
fn mend_journal(bytes: &mut [u8]) {
    if bytes.len() < journal::HEADER_BYTES {
        return;
    }
    put(bytes, 0, b"SEAWJRNL");
    put(bytes, 8, &journal::VERSION.to_le_bytes());
    let crc = crc32c::crc32c(&bytes[..60]);
    put(bytes, 60, &crc.to_le_bytes());
    let mut chain = crc32c::crc32c(&bytes[..journal::HEADER_BYTES]);
    let mut at = journal::HEADER_BYTES;
    while at + journal::RECORD_BYTES <= bytes.len() {
        let length = if bytes[at + 32] == 1 { get_u32(bytes, at + 24) as usize } else { 0 };
        let data = at + journal::RECORD_BYTES;
        if length > bytes.len() - data {
            return;
        }
        chain = crc32c::crc32c_append(chain, &bytes[at..at + 36]);
        chain = crc32c::crc32c_append(chain, &bytes[data..data + length]);
        put(bytes, at + 36, &chain.to_le_bytes());
        at = data + length;
    }
}

/// What [`journal()`] begins with.
pub fn journal_seeds() -> Vec<Vec<u8>> {
    let previous = journal::End { length: 900, chain: 7 };
    let header = journal::Header { group: GROUP, generation: GENERATION, epoch: Epoch(9), previous };
    let mut bytes = header.encode().to_vec();
    let mut end = header.end();
    for payload in
        [journal::Payload::Data(&[7; 600]), journal::Payload::Zeroes(1 << 40), journal::Payload::Data(b"x")]
    {
        let (head, behind) =
            journal::encode_record(&journal::Record { volume: VOLUME, offset: 512, payload }, end);
        bytes.extend_from_slice(&head);
        if let journal::Payload::Data(data) = payload {
            bytes.extend_from_slice(data);
        }
        end = behind;
    }
    seeds([header.encode().to_vec(), bytes])
}

/// The list of damaged blocks.
pub fn damaged(data: &[u8]) {
    let Some((way, mut bytes)) = split(data) else { return };
    if way & 1 == 1 {
        put_within(&mut bytes, 16, &GROUP.0);
        sealed(&mut bytes, b"SEAWBADB", 1);
    }
    if let Ok(found) = bad::decode(&bytes, GROUP) {
        assert_eq!(bad::decode(&bad::encode(GROUP, &found), GROUP), Ok(found));
    }
}

/// What [`damaged`] begins with.
pub fn damaged_seeds() -> Vec<Vec<u8>> {
    let mut blocks = bad::BadBlocks::default();
    assert!([3, 4, 700].into_iter().all(|block| blocks.push(block)));
    seeds([bad::encode(GROUP, &[(VOLUME, blocks)].into())])
}

fn info() -> VolumeInfo {
    VolumeInfo { id: VOLUME, name: "sda".to_owned(), size: ByteCount(1 << 20), logical_block: 512 }
}

/// A layer file with data, zeroes and a note.
fn layer_bytes(epoch: u64) -> Vec<u8> {
    let storage = CrashStorage::new();
    let path = Path::new("/image");
    let file = storage.open(path, OpenMode::CreateNew).expect("a new file");
    file.set_len(1 << 20).expect("room");
    file.write_all_at(&[0x5a; 512], 4096).expect("room");
    let image = Image::open(&storage, path, Place::File).expect("just made");
    let meta = Meta {
        group: GROUP,
        generation: GENERATION,
        epoch: Epoch(epoch),
        cut_time: UnixNanos(7),
        consistency: Consistency::Crash,
        note: block::PointNote { label: "nightly".parse().ok(), ..Default::default() },
        written: ByteCount(512),
        zeroed: ByteCount(512),
        volumes: [info()].into(),
    };
    let mut scratch = Scratch::default();
    let mut layer =
        LayerWriter::create(&storage, Path::new("/"), meta, &mut scratch).expect("room for a layer");
    layer.keep(0, 4096..4608, &image, &mut DataCursor::default(), None).expect("a sound image");
    layer.keep(0, 65536..66048, &image, &mut DataCursor::default(), None).expect("a sound image");
    layer.finish().expect("room for a layer");
    let name = file_name(Epoch(epoch - 1), Epoch(epoch));
    whole(&*storage.open(&Path::new("/").join(name), OpenMode::Read).expect("just written"))
}

fn whole(file: &dyn StorageFile) -> Vec<u8> {
    let mut bytes = vec![0; file.len().expect("a file has a length") as usize];
    file.read_exact_at(&mut bytes, 0).expect("a file can be read");
    bytes
}

fn stored(path: &Path, bytes: &[u8]) -> (CrashStorage, Arc<dyn StorageFile>) {
    let storage = CrashStorage::new();
    let file = storage.open(path, OpenMode::CreateNew).expect("a new file");
    file.write_all_at(bytes, 0).expect("room");
    (storage, file)
}

/// The checksums of a layer's header: of the table, of the note, of the header.
fn mend_layer_head(head: &mut [u8], table: &[u8], note: &[u8]) {
    put(head, 0, b"SEAWUNDO");
    put(head, 16, &GROUP.0);
    put(head, 108, &crc32c::crc32c(note).to_le_bytes());
    put(head, 120, &crc32c::crc32c(table).to_le_bytes());
    let crc = crc32c::crc32c(&head[..Header::HEAD_BYTES - CRC_BYTES]);
    put(head, Header::HEAD_BYTES - CRC_BYTES, &crc.to_le_bytes());
}

fn mend_layer(bytes: &mut [u8], version: u32) {
    let length = bytes.len() as u64;
    let Some((head, rest)) = bytes.split_at_mut_checked(Header::HEAD_BYTES) else { return };
    put(head, 8, &version.to_le_bytes());
    put(head, 96, &length.to_le_bytes());
    let table = (get_u32(head, 12) as usize).saturating_mul(Header::ROW_BYTES).min(rest.len());
    let (table, rest) = rest.split_at(table);
    let note = rest.split_at((get_u32(head, 104) as usize).min(rest.len())).0;
    mend_layer_head(head, table, note);
    let path = Path::new("/l");
    let (_, file) = stored(path, bytes);
    let Ok(header) = Header::read(&*file, path) else { return };
    let mut crc = 0;
    match header.kind {
        Kind::Bare => crc = crc32c::crc32c(&bytes[header.index_position() as usize..]),
        Kind::Paged => {
            for (_, shape) in header.trees().filter(|(_, shape)| shape.records > 0) {
                crc = crc32c::crc32c_append(crc, &mend::<Entry>(&shape, bytes).to_le_bytes());
            }
        }
    }
    let (head, _) = bytes.split_at_mut(Header::HEAD_BYTES);
    put(head, 116, &crc.to_le_bytes());
    let crc = crc32c::crc32c(&head[..Header::HEAD_BYTES - CRC_BYTES]);
    put(head, Header::HEAD_BYTES - CRC_BYTES, &crc.to_le_bytes());
}

struct File {
    file: Arc<dyn StorageFile>,
    pages: Pages,
}

impl Source for File {
    fn pages(&self) -> &Pages {
        &self.pages
    }
    fn serial(&self) -> u64 {
        1
    }
    fn path(&self) -> &Path {
        Path::new("/l")
    }
    fn open(&self) -> Result<Arc<dyn StorageFile>, ReplicaError> {
        Ok(self.file.clone())
    }
}

/// Reads a tree in both ways. `is_whole`: it was found to be sound, so both must agree.
fn read_tree<R: Record>(shape: &Shape, file: &Arc<dyn StorageFile>, is_whole: bool) {
    let records: Result<Vec<R>, _> = Stream::<R>::new(shape.clone(), file.clone(), Path::new("/l")).collect();
    let source = File { file: file.clone(), pages: Pages::new(64) };
    for at in SOUGHT {
        let found = Cursor::<R>::seek(shape, &source, at).and_then(|mut cursor| cursor.next(&source));
        if is_whole {
            let records = records.as_ref().expect("a sound tree can be read");
            let expected = records.iter().find(|record| record.end() > at).copied();
            assert_eq!(found.expect("a sound tree can be searched"), expected, "at {at}");
        }
    }
}

/// An undo layer.
pub fn layer(data: &[u8]) {
    let Some((way, mut bytes)) = split(data) else { return };
    if way & 1 == 1 {
        mend_layer(&mut bytes, 3 - u32::from(way >> 1 & 1));
    }
    let path = Path::new("/l");
    let (storage, file) = stored(path, &bytes);
    let Ok(layer) = Layer::open(&storage, path) else { return };
    if layer.header.kind == Kind::Paged {
        let (_, again) =
            stored(path, &[&layer.header.encode()[..], &bytes[layer.header.encode().len()..]].concat());
        assert_eq!(Header::read(&*again, path).expect("what is written can be read"), layer.header);
    }
    let is_whole = layer.check(&storage, &Pace::unbounded()).is_ok();
    for (_, shape) in layer.header.trees() {
        read_tree::<Entry>(&shape, &file, is_whole);
    }
}

/// What [`layer`] begins with.
pub fn layer_seeds() -> Vec<Vec<u8>> {
    seeds([layer_bytes(5)])
}

/// What all layers' headers say.
pub fn catalogue(data: &[u8]) {
    let Some((way, mut bytes)) = split(data) else { return };
    if way & 1 == 1 {
        mend_catalogue(&mut bytes);
    }
    // Whatever is known is of the right group, and no layer leads forward.
    for (back, epoch) in
        catalogue::decode(&bytes, GROUP, Some(GENERATION), Epoch(100)).iter().flatten().map(|(at, _)| at)
    {
        assert!(back < epoch);
    }
}

fn mend_catalogue(bytes: &mut [u8]) {
    put_within(bytes, 16, &GROUP.0);
    put_within(bytes, 32, &GENERATION.0.to_le_bytes());
    put_within(bytes, 40, &9_u64.to_le_bytes());
    let (mut at, mut table) = (64, Vec::new());
    while let Some(row) = bytes.get(at..at + 8) {
        let (rows, note, same) = (usize::from(get_u16(row, 0)), usize::from(get_u16(row, 2)), row[4]);
        let head = at + 8;
        let entries = head + Header::HEAD_BYTES + note;
        let after = entries + rows * 8;
        let own = if same == 0 { rows * Header::ROW_BYTES } else { 0 };
        if bytes.len() < after + own {
            break;
        }
        if same == 0 {
            table = bytes[after..after + own].to_vec();
        }
        for (row, entries) in
            table.chunks_exact_mut(Header::ROW_BYTES).zip(bytes[entries..after].chunks_exact(8))
        {
            put(row, 24, entries);
        }
        let note = bytes[head + Header::HEAD_BYTES..entries].to_vec();
        let head = &mut bytes[head..head + Header::HEAD_BYTES];
        put(head, 8, &3_u32.to_le_bytes());
        mend_layer_head(head, &table, &note);
        at = after + own;
    }
    sealed(bytes, b"SEAWCATA", 1);
}

/// What [`catalogue()`] begins with.
pub fn catalogue_seeds() -> Vec<Vec<u8>> {
    let open = |epoch| {
        let path = Path::new("/l");
        let (storage, _) = stored(path, &layer_bytes(epoch));
        Arc::new(Layer::open(&storage, path).expect("a sound layer"))
    };
    seeds([catalogue::encode(GROUP, GENERATION, &[open(5), open(6)])])
}

/// Which epochs overwrote what first.
pub fn span(data: &[u8]) {
    let Some((way, mut bytes)) = split(data) else { return };
    if way & 1 == 1 {
        mend_span(&mut bytes);
    }
    let path = Path::new("/l");
    let (_, file) = stored(path, &bytes);
    let Ok(header) = SpanHeader::read(&*file, path) else { return };
    let (_, again) = stored(path, &[&header.encode()[..], &bytes[header.encode().len()..]].concat());
    assert_eq!(SpanHeader::read(&*again, path).expect("what is written can be read"), header);
    let named = Path::new("/").join(span::file_name(header.first, header.last));
    let (storage, file) = stored(&named, &bytes);
    let is_whole = span::check(&storage, &named).is_ok();
    for (_, shape) in header.trees() {
        read_tree::<SpanRecord>(&shape, &file, is_whole);
    }
}

fn mend_span(bytes: &mut [u8]) {
    const HEADER_BYTES: usize = 80;
    let length = bytes.len() as u64;
    let Some((head, rest)) = bytes.split_at_mut_checked(HEADER_BYTES) else { return };
    put(head, 0, b"SEAWSPAN");
    put(head, 8, &1_u32.to_le_bytes());
    put(head, 16, &GROUP.0);
    put(head, 56, &length.to_le_bytes());
    let table = (get_u32(head, 12) as usize).saturating_mul(24).min(rest.len());
    put(head, 68, &crc32c::crc32c(&rest[..table]).to_le_bytes());
    let seal = |head: &mut [u8]| {
        let crc = crc32c::crc32c(&head[..HEADER_BYTES - CRC_BYTES]);
        put(head, HEADER_BYTES - CRC_BYTES, &crc.to_le_bytes());
    };
    seal(head);
    let path = Path::new("/l");
    let (_, file) = stored(path, bytes);
    let Ok(header) = SpanHeader::read(&*file, path) else { return };
    let mut crc = 0;
    for (_, shape) in header.trees() {
        crc = crc32c::crc32c_append(crc, &mend::<SpanRecord>(&shape, bytes).to_le_bytes());
    }
    put(bytes, 64, &crc.to_le_bytes());
    seal(&mut bytes[..HEADER_BYTES]);
}

/// What [`span()`] begins with: a span of one page, and one whose tree has two levels.
pub fn span_seeds() -> Vec<Vec<u8>> {
    let written = |records: u64| {
        let mut header = SpanHeader {
            group: GROUP,
            generation: GENERATION,
            first: Epoch(1),
            last: Epoch(16),
            volumes: [(VOLUME, records)].into(),
            index_crc: 0,
        };
        let (_, shape) = header.trees().next().expect("one volume");
        let mut tree = TreeWriter::new::<SpanRecord>(&shape);
        let mut pages = vec![0; header.file_bytes() as usize];
        let mut sink = |position: u64, bytes: &[u8]| -> Result<(), ReplicaError> {
            put(&mut pages, position as usize, bytes);
            Ok(())
        };
        for number in 0..records {
            let segment = crate::segment::Segment {
                start_sector: number * 3,
                sectors: 2,
                epoch: Epoch(1 + number % 16),
                zeroes: number % 2 == 1,
            };
            tree.push(&SpanRecord::of(&segment, Epoch(1)), &mut sink).expect("nothing can fail");
        }
        let tree = tree.finish(&mut sink).expect("nothing can fail");
        header.index_crc = crc32c::crc32c(&tree.to_le_bytes());
        let head = header.encode();
        put(&mut pages, 0, &head);
        pages
    };
    seeds([written(3), written(300)])
}

/// Pages of nothing but records and keys, as spans and layers have them, of any number of levels.
pub fn tree(data: &[u8]) {
    let Some((records, bytes)) = data.split_first_chunk::<2>() else { return };
    let records = u64::from(u16::from_le_bytes(*records) % 2048);
    let limits = Limits { sectors: 1 << 41, values: 0..64 };
    let shape = Shape { base: 0, records, kind: Kind::Paged, limits };
    let mut bytes = bytes.to_vec();
    bytes.resize(shape.bytes::<SpanRecord>() as usize, 0);
    mend::<SpanRecord>(&shape, &mut bytes);
    let path = Path::new("/l");
    let (_, file) = stored(path, &bytes);
    read_tree::<SpanRecord>(&shape, &file, check_whole::<SpanRecord>(&shape, &file, path).is_ok());
}

/// What [`tree`] begins with.
pub fn tree_seeds() -> Vec<Vec<u8>> {
    let tree = |records: u16, span: &[u8]| [&records.to_le_bytes()[..], &span[1 + 80 + 24..]].concat();
    let spans = span_seeds();
    vec![tree(3, &spans[0]), tree(300, &spans[3])]
}

/// The checksums of an image's blocks, and as of when they are.
pub fn checksums(data: &[u8]) {
    let Some((way, mut bytes)) = split(data) else { return };
    let dir = Path::new("/r");
    if way & 2 == 0 {
        let storage = CrashStorage::new();
        storage.create_dir_all(dir).expect("room");
        if RecordFile::create(&storage, &sums::record_path(dir), &bytes).is_ok() {
            // An error would be of the storage.
            let read = sums::SumsRecord::read(&storage, dir, GROUP, GENERATION).expect("a file can be read");
            assert!(read.is_none() || bytes.starts_with(b"SEAWSUMR\x01\0\0\0"));
        }
        return;
    }
    if way & 1 == 1 {
        put_within(&mut bytes, 0, &sums::header(GROUP, VOLUME));
        for (page, number) in bytes.chunks_exact_mut(4096).skip(1).zip(0..) {
            let crc = sums::page_crc(number, (&*page).try_into().expect("a whole page"));
            put(page, 4092, &crc.to_le_bytes());
        }
    }
    let path = sums::path(dir, VOLUME);
    let storage = CrashStorage::new();
    storage.create_dir_all(path.parent().expect("a directory")).expect("room");
    storage.open(&path, OpenMode::CreateNew).and_then(|file| file.write_all_at(&bytes, 0)).expect("room");
    let is_sound = sums::check(&storage, &path, GROUP, VOLUME).is_ok();
    let mut sums = sums::Sums::open(&storage, dir, GROUP, VOLUME, false).expect("derived, so made anew");
    for block in [0, 1, sums::PAGE_SUMS - 1, sums::PAGE_SUMS, 1 << 40] {
        sums.get(block).expect("what is damaged is not known");
    }
    assert!(!is_sound || sums.damaged == 0);
}

/// What [`checksums`] begins with.
pub fn checksums_seeds() -> Vec<Vec<u8>> {
    let record = sums::encode_record(GROUP, GENERATION, Epoch(7));
    let mut file = sums::header(GROUP, VOLUME).to_vec();
    file.resize(4096, 0);
    file.resize(2 * 4096, 3);
    vec![[&[0][..], &record].concat(), [&[2][..], &file].concat(), [&[3][..], &file].concat()]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A catalogue may name a layer as long as can be counted; where its index ends was reckoned with an overflow.
    #[test]
    fn lengths_past_counting_are_refused() {
        let mut bytes = catalogue_seeds()[0][1..].to_vec();
        let head = 64 + 8;
        let entries = (u64::MAX - 8192) / 24;
        let of_volume = head + Header::HEAD_BYTES + usize::from(get_u16(&bytes, 64 + 2));
        for (at, value) in [(head + 80, entries), (head + 88, 0), (head + 96, u64::MAX), (of_volume, entries)]
        {
            put(&mut bytes, at, &value.to_le_bytes());
        }
        mend_catalogue(&mut bytes);
        let refused = catalogue::decode(&bytes, GROUP, Some(GENERATION), Epoch(100)).unwrap_err();
        assert!(refused.contains("do not make a file"), "{refused}");
    }

    /// Mending takes a sound file for what it is, so that the fuzzer does reach what lies behind the checksums; and a seed is read.
    #[test]
    fn what_is_sound_stays_so_when_mended() {
        for (seeds, mend, run) in [
            (layer_seeds(), (|bytes| mend_layer(bytes, 3)) as fn(&mut [u8]), layer as fn(&[u8])),
            (span_seeds(), mend_span, span),
            (pins_seeds(), |bytes| sealed(bytes, b"SEAWPINS", 1), pins),
            (damaged_seeds(), |bytes| sealed(bytes, b"SEAWBADB", 1), damaged),
            (state_seeds(), |bytes| sealed(bytes, b"SEAWREPL", 4), state),
            (promoted_seeds(), |bytes| sealed(bytes, b"SEAWPROM", 1), promoted),
            (journal_seeds(), mend_journal, journal),
        ] {
            for seed in seeds {
                run(&seed);
                let mut bytes = seed[1..].to_vec();
                mend(&mut bytes);
                assert!(bytes == seed[1..]);
            }
        }
        let seed = &catalogue_seeds()[0][1..];
        let applied = Epoch(100);
        assert_eq!(catalogue::decode(seed, GROUP, Some(GENERATION), applied).unwrap().len(), 2);
        let mut mended = seed.to_vec();
        mend_catalogue(&mut mended);
        assert_eq!(catalogue::decode(&mended, GROUP, Some(GENERATION), applied).unwrap().len(), 2);
        for seed in [tree_seeds(), checksums_seeds(), catalogue_seeds()].concat() {
            [tree, checksums, catalogue].iter().for_each(|run| run(&seed));
        }
    }
}
