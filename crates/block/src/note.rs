use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Bytes of a point's label in UTF-8. A longer one is refused.
pub const LABEL_BYTES_MAX: usize = 128;
/// Bytes of the reason why a point is less than was asked. A longer one is cut off, and says so.
pub const REASON_BYTES_MAX: usize = 1000;
/// Filesystems that a point names. Further ones are counted by the last name.
pub const FILESYSTEMS_MAX: usize = 64;
/// Bytes of a mount point. Of a longer one the end is kept.
pub const FILESYSTEM_BYTES_MAX: usize = 255;

/// Stands for what was cut off.
const ELLIPSIS: &str = "…";

/// What a person calls a point: 1 to [`LABEL_BYTES_MAX`] bytes, without control characters.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Label(String);

/// A text that is no label.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LabelError {
    /// No text.
    #[error("read label: it is empty; leave it out instead")]
    Empty,
    /// Too long.
    #[error("read label: it has {0} bytes, at most {LABEL_BYTES_MAX} are allowed")]
    Long(usize),
    /// It would not be shown as it is.
    #[error("read label {0:?}: control characters are not allowed")]
    Control(String),
}

impl Label {
    /// Its text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for Label {
    type Error = LabelError;
    fn try_from(text: String) -> Result<Label, LabelError> {
        match text.len() {
            0 => Err(LabelError::Empty),
            length if length > LABEL_BYTES_MAX => Err(LabelError::Long(length)),
            _ if text.contains(char::is_control) => Err(LabelError::Control(text)),
            _ => Ok(Label(text)),
        }
    }
}

impl FromStr for Label {
    type Err = LabelError;
    fn from_str(text: &str) -> Result<Label, LabelError> {
        Label::try_from(text.to_owned())
    }
}

impl From<Label> for String {
    fn from(label: Label) -> String {
        label.0
    }
}

impl fmt::Display for Label {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What is told of an epoch besides its consistency. Empty for one that nobody asked for.
///
/// Invariants, kept by [`PointNote::bounded`] and asked for by who reads one: texts are within their limits, without control
/// characters, and without blanks at their ends; there are no empty ones. So a note that was read is written as it was.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PointNote {
    /// What a person calls it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub label: Option<Label>,
    /// How long the filesystems were frozen, in whole microseconds; `None` when none was.
    #[serde(default, rename = "frozen_us", with = "micros", skip_serializing_if = "Option::is_none")]
    pub frozen: Option<Duration>,
    /// The mount points that were frozen.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub filesystems: Vec<String>,
    /// Why the consistency is less than was asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

impl PointNote {
    /// With every text cut to its limit and shown as it is read.
    #[must_use]
    pub fn bounded(self) -> PointNote {
        let clean = |text: &str| text.replace(char::is_control, " ").trim().to_owned();
        let mut filesystems: Vec<String> = self
            .filesystems
            .iter()
            .map(|path| keep_end(&clean(path)))
            .filter(|path| !path.is_empty())
            .collect();
        if filesystems.len() > FILESYSTEMS_MAX {
            let more = filesystems.len() - (FILESYSTEMS_MAX - 1);
            filesystems.truncate(FILESYSTEMS_MAX - 1);
            filesystems.push(format!("and {more} more"));
        }
        let reason =
            self.reason.map(|reason| keep_start(&clean(&reason))).filter(|reason| !reason.is_empty());
        let frozen = self.frozen.map(|frozen| Duration::from_micros(micros::of(frozen)));
        PointNote { label: self.label, frozen, filesystems, reason }
    }

    /// The first invariant that does not hold.
    ///
    /// # Errors
    /// Names it.
    pub fn check(&self) -> Result<(), &'static str> {
        let text = |text: &str, limit: usize| {
            !text.is_empty() && text.len() <= limit && !text.contains(char::is_control) && text.trim() == text
        };
        if !self.reason.as_deref().is_none_or(|reason| text(reason, REASON_BYTES_MAX)) {
            return Err("reason");
        }
        if self.filesystems.len() > FILESYSTEMS_MAX {
            return Err("number of filesystems");
        }
        if !self.filesystems.iter().all(|path| text(path, FILESYSTEM_BYTES_MAX)) {
            return Err("filesystem");
        }
        Ok(())
    }
}

fn keep_start(text: &str) -> String {
    if text.len() <= REASON_BYTES_MAX {
        return text.to_owned();
    }
    let mut end = REASON_BYTES_MAX - ELLIPSIS.len();
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    format!("{}{ELLIPSIS}", &text[..end])
}

fn keep_end(text: &str) -> String {
    if text.len() <= FILESYSTEM_BYTES_MAX {
        return text.to_owned();
    }
    let mut start = text.len() - (FILESYSTEM_BYTES_MAX - ELLIPSIS.len());
    while !text.is_char_boundary(start) {
        start += 1;
    }
    format!("{ELLIPSIS}{}", &text[start..])
}

mod micros {
    use std::time::Duration;

    use serde::{Deserialize, Deserializer, Serializer};

    /// At least 1, so that it is told from no time at all.
    pub(super) fn of(time: Duration) -> u64 {
        u64::try_from(time.as_micros()).unwrap_or(u64::MAX).max(1)
    }

    pub(super) fn serialize<S: Serializer>(
        time: &Option<Duration>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        match time {
            Some(time) => serializer.serialize_some(&of(*time)),
            None => serializer.serialize_none(),
        }
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<Duration>, D::Error> {
        Ok(Option::<u64>::deserialize(deserializer)?.map(Duration::from_micros))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_short_and_printable() {
        assert_eq!(
            "before the upgrade, Grüße".parse::<Label>().unwrap().as_str(),
            "before the upgrade, Grüße"
        );
        assert_eq!("".parse::<Label>(), Err(LabelError::Empty));
        assert_eq!("x".repeat(LABEL_BYTES_MAX + 1).parse::<Label>(), Err(LabelError::Long(129)));
        assert!("x".repeat(LABEL_BYTES_MAX).parse::<Label>().is_ok());
        for bad in ["two\nlines", "\x1b[2J", "nul\0"] {
            assert!(matches!(bad.parse::<Label>(), Err(LabelError::Control(_))), "{bad:?}");
        }
    }

    /// A note with a blank at an end was read and then written without it: an undo layer's header was not the one that was in memory,
    /// and the layer counted as damaged.
    #[test]
    fn what_would_be_written_otherwise_breaks_an_invariant() {
        for text in [" /", "/vk ", "\u{3000}/"] {
            let filesystems = PointNote { filesystems: vec![text.to_owned()], ..PointNote::default() };
            let reason = PointNote { reason: Some(text.to_owned()), ..PointNote::default() };
            assert_eq!((filesystems.check(), reason.check()), (Err("filesystem"), Err("reason")));
            assert_eq!((filesystems.bounded().check(), reason.bounded().check()), (Ok(()), Ok(())));
        }
    }

    #[test]
    fn a_bounded_note_keeps_its_invariants() {
        let note = PointNote {
            label: None,
            frozen: Some(Duration::from_nanos(1)),
            filesystems: (0..100).map(|n| format!("/ü{}/{n}\n", "ü".repeat(n * 3))).collect(),
            reason: Some(format!("hook failed:\n\x07{}", "ß".repeat(2000))),
        };
        assert!(note.check().is_err());
        let bounded = note.bounded();
        assert_eq!(bounded.check(), Ok(()));
        assert_eq!(bounded.frozen, Some(Duration::from_micros(1)));
        assert_eq!(bounded.filesystems.last().unwrap(), "and 37 more");
        assert!(bounded.filesystems[62].ends_with("/62"), "{}", bounded.filesystems[62]);
        assert!(bounded.reason.as_ref().unwrap().starts_with("hook failed:  ß"));
        assert_eq!(bounded.clone().bounded(), bounded);
        assert_eq!(PointNote::default().bounded(), PointNote::default());
    }
}
