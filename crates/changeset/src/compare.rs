//! How source and target compare granules without telling anybody else what is in them: keyed checksums in sealed messages.
//!
//! The process server passes the messages on. Without the group's key it can neither read nor make one, nor use one a second
//! time: each conversation has a key of its own, derived from the group's and a random number, and each message a nonce of
//! its direction and number. A checksum also covers where its granule lies, so that equal content is not seen to be equal.
//! The bytes are in docs/formats/compare.md.

use block::{Epoch, Generation, Granule, GroupId, VolumeId};
use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};
use zeroize::Zeroizing;

use crate::bytes::u64_at;
use crate::key::{GroupKey, KeyError, fill_random};

/// Granules that one question is about at most: 16 MiB.
pub const COMPARED_GRANULES_MAX: u64 = 256;
/// Bytes of a conversation's random number.
pub const CONVERSATION_BYTES: usize = 16;
const MASK_BYTES: usize = COMPARED_GRANULES_MAX as usize / 8;
const DIGEST_BYTES: usize = 16;
const QUESTION_BYTES: usize = 8 + 16 + 8 + MASK_BYTES + DIGEST_BYTES;
const TAG_BYTES: usize = 16;
/// The longest message. A longer one is refused.
pub const COMPARE_MESSAGE_BYTES_MAX: usize = 1 + COMPARED_GRANULES_MAX as usize * DIGEST_BYTES + TAG_BYTES;

/// Granules that one answer names as damaged at most.
pub const DAMAGED_GRANULES_MAX: usize = 256;

/// A keyed checksum: the first half of a keyed BLAKE3.
pub type GranuleDigest = [u8; DIGEST_BYTES];

/// Makes checksums of a group's granules.
#[derive(Clone)]
pub struct Digester(Zeroizing<[u8; 32]>);

impl Digester {
    /// Of one history: after a failover nothing can be told from old checksums.
    pub fn new(key: &GroupKey, group: GroupId, generation: Generation) -> Digester {
        let mut material = group.0.to_vec();
        material.extend_from_slice(&generation.0.to_le_bytes());
        Digester(key.derive("seawall 2026 compare digest", &material))
    }

    /// Of a granule, which is shorter than others at the end of a volume.
    pub fn granule(&self, volume: VolumeId, granule: Granule, data: &[u8]) -> GranuleDigest {
        let mut hasher = blake3::Hasher::new_keyed(&self.0);
        hasher.update(&volume.0).update(&granule.0.to_le_bytes()).update(data);
        shortened(&hasher)
    }

    /// Of several granules' checksums, in order.
    pub fn all<'a>(&self, digests: impl Iterator<Item = &'a GranuleDigest>) -> GranuleDigest {
        let mut hasher = blake3::Hasher::new_keyed(&self.0);
        digests.for_each(|digest| {
            hasher.update(digest);
        });
        shortened(&hasher)
    }
}

fn shortened(hasher: &blake3::Hasher) -> GranuleDigest {
    *hasher.finalize().as_bytes().first_chunk().expect("16 of 32 bytes")
}

/// Whether the target holds what the source has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CompareQuestion {
    /// The target answers when it has applied this epoch.
    pub as_of: Epoch,
    /// Which volume.
    pub volume: VolumeId,
    /// The first of [`COMPARED_GRANULES_MAX`] granules; a multiple of it.
    pub first: Granule,
    /// Which of them are meant: the lowest bit of the first byte is the first granule.
    pub mask: [u8; MASK_BYTES],
    /// Of all their checksums.
    pub digest: GranuleDigest,
}

impl CompareQuestion {
    /// About these granules, which rise and lie within [`COMPARED_GRANULES_MAX`] from a multiple of it.
    pub fn new(
        as_of: Epoch,
        volume: VolumeId,
        granules: impl Iterator<Item = Granule>,
        digest: GranuleDigest,
    ) -> CompareQuestion {
        let (mut mask, mut first) = ([0; MASK_BYTES], Granule(0));
        for granule in granules {
            let offset = (granule.0 % COMPARED_GRANULES_MAX) as usize;
            first = Granule(granule.0 - offset as u64);
            mask[offset / 8] |= 1 << (offset % 8);
        }
        CompareQuestion { as_of, volume, first, mask, digest }
    }

    /// Which granules of the volume, from `first` on, the target knows to be damaged: a question about none. It is answered
    /// by the first [`DAMAGED_GRANULES_MAX`] of them.
    pub fn damaged(volume: VolumeId, first: Granule) -> CompareQuestion {
        CompareQuestion {
            as_of: Epoch::NONE,
            volume,
            first,
            mask: [0; MASK_BYTES],
            digest: [0; DIGEST_BYTES],
        }
    }

    /// Whether it is about damage.
    pub fn is_about_damage(&self) -> bool {
        self.mask == [0; MASK_BYTES]
    }

    /// The granules that are meant, in order.
    pub fn granules(&self) -> impl Iterator<Item = Granule> + '_ {
        (0..COMPARED_GRANULES_MAX)
            .filter(|offset| self.mask[*offset as usize / 8] >> (offset % 8) & 1 == 1)
            .map(|offset| Granule(self.first.0 + offset))
    }
}

/// What the target says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CompareAnswer {
    /// It holds the same.
    Same,
    /// It does not: the checksums of what it holds, in the question's order.
    Differs(Vec<GranuleDigest>),
    /// It has no such volume, or not so large.
    Unknown,
    /// These are damaged; they rise.
    Damaged(Vec<Granule>),
}

/// Why a message is not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CompareError {
    /// It was not made with the group's key for this place in this conversation, or was altered.
    #[error("a message of a comparison is not authentic")]
    Authenticity,
    /// It is authentic and makes no sense: another version made it.
    #[error("a message of a comparison cannot be read; both sides must be of the same version")]
    Content,
}

/// Seals and opens the messages of one conversation.
pub struct Conversation(LessSafeKey);

#[derive(Clone, Copy)]
enum Direction {
    Question = 1,
    Answer = 2,
}

fn nonce(direction: Direction, number: u64) -> Nonce {
    let mut bytes = [0; 12];
    bytes[0] = direction as u8;
    bytes[4..].copy_from_slice(&number.to_le_bytes());
    Nonce::assume_unique_for_key(bytes)
}

impl Conversation {
    /// A random number for a new conversation.
    ///
    /// # Errors
    /// When the operating system gives no random bytes.
    pub fn id() -> Result<[u8; CONVERSATION_BYTES], KeyError> {
        let mut id = [0; CONVERSATION_BYTES];
        fill_random(&mut id).map_err(|_| KeyError::Entropy)?;
        Ok(id)
    }

    /// The conversation with this number, which must not have been used before.
    pub fn new(
        key: &GroupKey,
        group: GroupId,
        generation: Generation,
        id: &[u8; CONVERSATION_BYTES],
    ) -> Conversation {
        let mut material = group.0.to_vec();
        material.extend_from_slice(&generation.0.to_le_bytes());
        material.extend_from_slice(id);
        let key = key.derive("seawall 2026 compare conversation", &material);
        let key = UnboundKey::new(&CHACHA20_POLY1305, &*key).expect("the cipher's key has 32 bytes");
        Conversation(LessSafeKey::new(key))
    }

    fn seal(&self, direction: Direction, number: u64, mut bytes: Vec<u8>) -> Vec<u8> {
        let sealed = self.0.seal_in_place_append_tag(nonce(direction, number), Aad::empty(), &mut bytes);
        sealed.expect("a message is far below the cipher's limit");
        bytes
    }

    /// Seals whatever it is, as a faulty peer would.
    #[cfg(any(test, feature = "fuzzing"))]
    pub(crate) fn seal_arbitrary(&self, is_question: bool, number: u64, bytes: Vec<u8>) -> Vec<u8> {
        self.seal(if is_question { Direction::Question } else { Direction::Answer }, number, bytes)
    }

    fn open(&self, direction: Direction, number: u64, bytes: &[u8]) -> Result<Vec<u8>, CompareError> {
        if bytes.len() > COMPARE_MESSAGE_BYTES_MAX {
            return Err(CompareError::Content);
        }
        let mut bytes = bytes.to_vec();
        let plain = self.0.open_in_place(nonce(direction, number), Aad::empty(), &mut bytes);
        let length = plain.map_err(|_| CompareError::Authenticity)?.len();
        bytes.truncate(length);
        Ok(bytes)
    }

    /// The question with this number, of which a conversation has one.
    pub fn seal_question(&self, number: u64, question: &CompareQuestion) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(QUESTION_BYTES + TAG_BYTES);
        bytes.extend_from_slice(&question.as_of.0.to_le_bytes());
        bytes.extend_from_slice(&question.volume.0);
        bytes.extend_from_slice(&question.first.0.to_le_bytes());
        bytes.extend_from_slice(&question.mask);
        bytes.extend_from_slice(&question.digest);
        self.seal(Direction::Question, number, bytes)
    }

    /// Opens a question.
    ///
    /// # Errors
    /// When it is not authentic, or none.
    pub fn open_question(&self, number: u64, bytes: &[u8]) -> Result<CompareQuestion, CompareError> {
        let bytes = self.open(Direction::Question, number, bytes)?;
        if bytes.len() != QUESTION_BYTES {
            return Err(CompareError::Content);
        }
        let question = CompareQuestion {
            as_of: Epoch(u64_at(&bytes, 0)),
            volume: VolumeId(bytes[8..24].try_into().expect("16 bytes")),
            first: Granule(u64_at(&bytes, 24)),
            mask: bytes[32..32 + MASK_BYTES].try_into().expect("32 bytes"),
            digest: bytes[32 + MASK_BYTES..].try_into().expect("16 bytes"),
        };
        let aligned = question.is_about_damage() || question.first.0.is_multiple_of(COMPARED_GRANULES_MAX);
        let in_range = question.first.0 <= u64::MAX / block::GRANULE_BYTES - COMPARED_GRANULES_MAX;
        if aligned && in_range { Ok(question) } else { Err(CompareError::Content) }
    }

    /// The answer to the question with this number.
    pub fn seal_answer(&self, number: u64, answer: &CompareAnswer) -> Vec<u8> {
        let mut bytes = match answer {
            CompareAnswer::Same => vec![0],
            CompareAnswer::Differs(_) => vec![1],
            CompareAnswer::Unknown => vec![2],
            CompareAnswer::Damaged(_) => vec![3],
        };
        if let CompareAnswer::Differs(digests) = answer {
            bytes.extend(digests.iter().flatten());
        }
        if let CompareAnswer::Damaged(granules) = answer {
            bytes.extend(
                granules.iter().take(DAMAGED_GRANULES_MAX).flat_map(|granule| granule.0.to_le_bytes()),
            );
        }
        self.seal(Direction::Answer, number, bytes)
    }

    /// Opens the answer to a question about so many granules; about damage, 0.
    ///
    /// # Errors
    /// When it is not authentic, or none to that question.
    pub fn open_answer(
        &self,
        number: u64,
        granules: usize,
        bytes: &[u8],
    ) -> Result<CompareAnswer, CompareError> {
        let bytes = self.open(Direction::Answer, number, bytes)?;
        let (kind, rest) = bytes.split_first().ok_or(CompareError::Content)?;
        match (kind, rest.len()) {
            (0, 0) => Ok(CompareAnswer::Same),
            (2, 0) => Ok(CompareAnswer::Unknown),
            (1, length) if length == granules * DIGEST_BYTES => {
                let digests = rest.chunks_exact(DIGEST_BYTES);
                Ok(CompareAnswer::Differs(digests.map(|bytes| bytes.try_into().expect("16 bytes")).collect()))
            }
            (3, length) if granules == 0 && length % 8 == 0 && length / 8 <= DAMAGED_GRANULES_MAX => {
                let damaged: Vec<Granule> = (0..length / 8).map(|at| Granule(u64_at(rest, at * 8))).collect();
                let in_range = damaged.last().is_none_or(|last| last.0 < u64::MAX / block::GRANULE_BYTES);
                match damaged.is_sorted_by(|one, next| one < next) && in_range {
                    true => Ok(CompareAnswer::Damaged(damaged)),
                    false => Err(CompareError::Content),
                }
            }
            _ => Err(CompareError::Content),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const GROUP: GroupId = GroupId([1; 16]);
    const VOLUME: VolumeId = VolumeId([2; 16]);

    fn key() -> GroupKey {
        GroupKey::from_bytes([7; 32])
    }

    fn conversation(id: u8) -> Conversation {
        Conversation::new(&key(), GROUP, Generation(1), &[id; 16])
    }

    fn question() -> CompareQuestion {
        let granules = [256, 257, 300, 511].map(Granule).into_iter();
        CompareQuestion::new(Epoch(9), VOLUME, granules, [5; 16])
    }

    #[test]
    fn messages_survive_and_tell_who_made_them() {
        let (ours, theirs) = (conversation(1), conversation(1));
        let sealed = ours.seal_question(3, &question());
        assert_eq!(theirs.open_question(3, &sealed), Ok(question()));
        assert_eq!(question().granules().map(|granule| granule.0).collect::<Vec<_>>(), [256, 257, 300, 511]);
        // Another place, another conversation, another key, another direction.
        assert_eq!(theirs.open_question(4, &sealed), Err(CompareError::Authenticity));
        assert_eq!(conversation(2).open_question(3, &sealed), Err(CompareError::Authenticity));
        let other = Conversation::new(&GroupKey::from_bytes([8; 32]), GROUP, Generation(1), &[1; 16]);
        assert_eq!(other.open_question(3, &sealed), Err(CompareError::Authenticity));
        assert_eq!(theirs.open_answer(3, 4, &sealed), Err(CompareError::Authenticity));
        for answer in
            [CompareAnswer::Same, CompareAnswer::Unknown, CompareAnswer::Differs(vec![[1; 16], [2; 16]])]
        {
            let sealed = theirs.seal_answer(3, &answer);
            assert_eq!(ours.open_answer(3, 2, &sealed), Ok(answer.clone()));
            if answer != CompareAnswer::Same && answer != CompareAnswer::Unknown {
                assert_eq!(ours.open_answer(3, 3, &sealed), Err(CompareError::Content));
            }
        }
    }

    #[test]
    fn damage_is_asked_for_and_told() {
        let (ours, theirs) = (conversation(1), conversation(1));
        let question = CompareQuestion::damaged(VOLUME, Granule(77));
        let sealed = ours.seal_question(5, &question);
        let opened = theirs.open_question(5, &sealed).unwrap();
        assert!(opened.is_about_damage() && opened == question);
        for granules in [vec![], vec![Granule(3), Granule(900)]] {
            let sealed = theirs.seal_answer(5, &CompareAnswer::Damaged(granules.clone()));
            assert_eq!(ours.open_answer(5, 0, &sealed), Ok(CompareAnswer::Damaged(granules)));
            assert_eq!(ours.open_answer(5, 1, &sealed), Err(CompareError::Content));
        }
        for bad in [vec![Granule(3), Granule(3)], vec![Granule(4), Granule(3)], vec![Granule(u64::MAX)]] {
            let sealed = theirs.seal_answer(6, &CompareAnswer::Damaged(bad));
            assert_eq!(ours.open_answer(6, 0, &sealed), Err(CompareError::Content));
        }
    }

    #[test]
    fn checksums_are_of_a_place_and_a_key() {
        let digester = Digester::new(&key(), GROUP, Generation(1));
        let digest = digester.granule(VOLUME, Granule(1), b"data");
        assert_eq!(digest, digester.granule(VOLUME, Granule(1), b"data"));
        assert_ne!(digest, digester.granule(VOLUME, Granule(2), b"data"));
        assert_ne!(digest, digester.granule(VolumeId([3; 16]), Granule(1), b"data"));
        assert_ne!(digest, digester.granule(VOLUME, Granule(1), b"date"));
        let later = Digester::new(&key(), GROUP, Generation(2));
        assert_ne!(digest, later.granule(VOLUME, Granule(1), b"data"));
        assert_ne!(digester.all([[1; 16], [2; 16]].iter()), digester.all([[2; 16], [1; 16]].iter()));
    }

    /// As docs/formats/compare.md has it.
    #[test]
    fn golden_bytes() {
        let sealed = conversation(1).seal_question(3, &question());
        assert_eq!(sealed.len(), QUESTION_BYTES + TAG_BYTES);
        let hash = blake3::hash(&sealed).to_hex();
        assert_eq!(&hash[..32], GOLDEN_QUESTION, "{hash}");
        let answer = conversation(1).seal_answer(3, &CompareAnswer::Differs(vec![[9; 16]]));
        let hash = blake3::hash(&answer).to_hex();
        assert_eq!(&hash[..32], GOLDEN_ANSWER, "{hash}");
    }
    const GOLDEN_QUESTION: &str = "4190b897d9e4f1520c33d9e57be98d6b";
    const GOLDEN_ANSWER: &str = "2f1f169d2058991b4fdb89644ced5bba";

    proptest! {
        #[test]
        fn no_bytes_panic(number: u64, bytes in proptest::collection::vec(any::<u8>(), 0..5000), granules in 0..300_usize) {
            let conversation = conversation(1);
            prop_assert!(conversation.open_question(number, &bytes).is_err());
            prop_assert!(conversation.open_answer(number, granules, &bytes).is_err());
            // Authentic, but of whatever content.
            let sealed = conversation.seal(Direction::Question, number, bytes.clone());
            let _ = conversation.open_question(number, &sealed);
            let sealed = conversation.seal(Direction::Answer, number, bytes);
            let _ = conversation.open_answer(number, granules, &sealed);
        }
    }
}
