use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

/// What happens to an epoch, in sectors.
#[derive(Clone, Debug)]
pub(crate) enum Step {
    Write { volume: u16, sector: u64, data: Vec<u8> },
    Zero { volume: u16, sector: u64, sectors: u64 },
}

/// The simple-minded fold: a map from every sector to its content (`None` reads as zeroes).
pub(crate) type Oracle = BTreeMap<(u16, u64), Option<u8>>;

impl Step {
    pub(crate) fn fold(&self, fold: &mut Fold) {
        match self {
            Step::Write { volume, sector, data } => {
                let bytes: Vec<u8> = data.iter().flat_map(|byte| [*byte; 512]).collect();
                fold.write(*volume, ByteOffset(sector * 512), &bytes);
            }
            Step::Zero { volume, sector, sectors } => {
                fold.zero(*volume, Extent::new(ByteOffset(sector * 512), ByteCount(sectors * 512)).unwrap());
            }
        }
    }

    pub(crate) fn oracle(&self, oracle: &mut Oracle) {
        match self {
            Step::Write { volume, sector, data } => {
                oracle.extend(
                    data.iter().enumerate().map(|(i, byte)| ((*volume, sector + i as u64), Some(*byte))),
                );
            }
            Step::Zero { volume, sector, sectors } => {
                oracle.extend((*sector..sector + sectors).map(|sector| ((*volume, sector), None)));
            }
        }
    }
}

/// Steps that hit each other often: two volumes of 600 sectors (4.7 granules), lengths that cross blocks and granules.
pub(crate) fn steps() -> impl Strategy<Value = Vec<Step>> {
    let write = (0..2_u16, 0..450_u64, 1..150_usize, any::<u8>(), any::<bool>()).prop_map(
        |(volume, sector, sectors, byte, aligned)| {
            let (sector, sectors) =
                if aligned { (sector & !7, sectors.next_multiple_of(8)) } else { (sector, sectors) };
            let data = (0..sectors).map(|i| if byte < 64 { 0 } else { byte.wrapping_add(i as u8) }).collect();
            Step::Write { volume, sector, data }
        },
    );
    let small = (0..2_u16, 0..590_u64, 1..10_usize, prop_oneof![Just(0), any::<u8>()]).prop_map(
        |(volume, sector, sectors, byte)| Step::Write { volume, sector, data: vec![byte; sectors] },
    );
    let zero = (0..2_u16, 0..450_u64, 1..150_u64).prop_map(|(volume, sector, sectors)| Step::Zero {
        volume,
        sector,
        sectors,
    });
    let one = prop_oneof![2 => write, 2 => small, 1 => zero];
    proptest::collection::vec(one, 0..40)
}

/// What it reads as: zeroes are zeroes however they came.
pub(crate) fn read(oracle: &Oracle) -> Oracle {
    oracle.iter().map(|(place, byte)| (*place, byte.filter(|byte| *byte != 0))).collect()
}

fn content(fold: &Fold) -> Oracle {
    let mut found = Oracle::new();
    let mut last = None;
    fold.for_each_run(|volume, sector, sectors, run| {
        assert!(sectors > 0 && last <= Some((volume, sector)), "sorted and disjoint");
        last = Some((volume, sector + sectors));
        for i in 0..sectors {
            let byte = match run {
                Run::Zero => None,
                Run::Data { page, first } => {
                    let at = (u64::from(first) + i) as usize * 512;
                    let sector = &fold.page(page)[at..at + 512];
                    assert!(sector.iter().all(|byte| *byte == sector[0]));
                    Some(sector[0])
                }
            };
            found.insert((volume, sector + i), byte);
        }
    });
    found
}

proptest! {
    #[test]
    fn a_fold_is_what_its_steps_leave(rounds in proptest::collection::vec(steps(), 1..3)) {
        let mut fold = Fold::new();
        for steps in rounds {
            // What an earlier epoch left in the pages must not show.
            fold.clear();
            prop_assert!(fold.is_empty());
            let mut oracle = Oracle::new();
            for step in &steps {
                let before = fold.plain_bytes();
                step.fold(&mut fold);
                step.oracle(&mut oracle);
                if let Step::Write { data, .. } = step {
                    prop_assert!(fold.plain_bytes() <= before + ByteCount(data.len() as u64 * 512));
                }
            }
            let found = content(&fold);
            prop_assert_eq!(read(&found), read(&oracle));
            prop_assert_eq!(fold.is_empty(), oracle.is_empty());
            let data = || found.iter().filter_map(|(place, byte)| Some((*place, (*byte)?)));
            prop_assert_eq!(fold.plain_bytes().0, data().count() as u64 * 512);
            // A page for each block that holds data and no more, and none for a block of zeroes.
            let mut blocks = BTreeMap::<(u16, u64), Vec<u8>>::new();
            for ((volume, sector), byte) in data() {
                blocks.entry((volume, sector / 8)).or_default().push(byte);
            }
            prop_assert_eq!(fold.arena.pages_used(), blocks.len() as u64);
            prop_assert!(!blocks.values().any(|block| *block == [0; 8]));
            // Zero ranges that touch are one.
            let ranges = fold.zeroes.iter().flat_map(|zeroes| zeroes.iter().zip(zeroes.iter().skip(1)));
            prop_assert!(ranges.into_iter().all(|((_, end), (start, _))| end < start));
            prop_assert_eq!(fold.zero_ranges, fold.zeroes.iter().map(ZeroSet::len).sum::<usize>());
        }
    }
}

#[test]
fn a_huge_discard_costs_what_the_epoch_holds() {
    let mut fold = Fold::new();
    fold.write(0, ByteOffset(1 << 40), &[1; 4096]);
    fold.write(1, ByteOffset(1 << 40), &[1; 4096]);
    // Walking its 2^46 granules would never end.
    fold.zero(0, Extent::new(ByteOffset(0), ByteCount(1 << 62)).unwrap());
    assert_eq!(fold.plain_bytes(), ByteCount(4096));
    assert_eq!(content_bytes(&fold), 4096);
}

fn content_bytes(fold: &Fold) -> u64 {
    let mut bytes = 0;
    fold.for_each_run(|_, _, sectors, run| {
        bytes += if matches!(run, Run::Data { .. }) { sectors * 512 } else { 0 }
    });
    bytes
}

#[test]
fn the_last_bytes_of_the_address_space_fold() {
    let mut fold = Fold::new();
    let last = u64::MAX - 1023;
    fold.write(255, ByteOffset(last), &[7; 512]);
    fold.zero(255, Extent::new(ByteOffset(last - 512), ByteCount(512)).unwrap());
    let mut seen = Vec::new();
    fold.for_each_run(|volume, sector, sectors, _| seen.push((volume, sector, sectors)));
    assert_eq!(seen, [(255, last / 512 - 1, 1), (255, last / 512, 1)]);
}

#[test]
fn limits_are_announced() {
    let mut fold = Fold::new();
    assert!(fold.fits(PLAIN_BYTES_MAX) && !fold.fits(PLAIN_BYTES_MAX + ByteCount(512)));
    for range in 0..ZERO_RANGES_MAX as u64 {
        assert!(fold.fits(ByteCount::ZERO));
        fold.zero(0, Extent::new(ByteOffset(range * 1024), ByteCount(512)).unwrap());
    }
    assert!(!fold.fits(ByteCount::ZERO));
    fold.clear();
    assert!(fold.fits(ByteCount::ZERO));
}

#[test]
#[should_panic(expected = "not whole sectors")]
fn a_write_of_half_a_sector_is_refused() {
    Fold::new().write(0, ByteOffset(0), &[0; 256]);
}
