use std::fmt;

/// Why a peer was refused. The numbers are part of the protocol and never change their meaning.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum RefusalCode {
    /// The two sides share no protocol version.
    Version,
    /// The peer's role may not do this.
    Unauthorised,
    /// The group is not the one the peer's certificate names.
    WrongGroup,
    /// The receiver knows no such group.
    UnknownGroup,
    /// The generation is fenced, or not known yet.
    Generation,
    /// The epoch is held already.
    Replayed,
    /// The epoch does not follow the one that is held.
    Gap,
    /// What arrived is not what the format or its authentication says.
    Corrupt,
    /// More bytes arrived than were granted.
    Credit,
    /// Something is larger or more than this side allows.
    Limit,
    /// The receiver has no space left.
    Full,
    /// The receiver cannot serve this now.
    Busy,
    /// A newer connection for the same group took over.
    Superseded,
    /// What was asked for is not there.
    NotFound,
    /// The store behind the receiver failed and waits for an operator.
    Failed,
    /// The receiver is stopping.
    Stopping,
    /// The request makes no sense to this side.
    BadRequest,
    /// A fault inside the receiver.
    Internal,
    /// A number that this version does not know.
    Other(u16),
}

/// Number, code, kebab-case name, and whether the same thing may work later without an operator.
const TABLE: [(u16, RefusalCode, &str, bool); 18] = [
    (1, RefusalCode::Version, "version", false),
    (2, RefusalCode::Unauthorised, "unauthorised", false),
    (3, RefusalCode::WrongGroup, "wrong-group", false),
    (4, RefusalCode::UnknownGroup, "unknown-group", true),
    (5, RefusalCode::Generation, "generation", false),
    (6, RefusalCode::Replayed, "replayed", true),
    (7, RefusalCode::Gap, "gap", true),
    (8, RefusalCode::Corrupt, "corrupt", true),
    (9, RefusalCode::Credit, "credit", true),
    (10, RefusalCode::Limit, "limit", false),
    (11, RefusalCode::Full, "full", true),
    (12, RefusalCode::Busy, "busy", true),
    (13, RefusalCode::Superseded, "superseded", true),
    (14, RefusalCode::NotFound, "not-found", false),
    (15, RefusalCode::Failed, "failed", false),
    (16, RefusalCode::Stopping, "stopping", true),
    (17, RefusalCode::BadRequest, "bad-request", false),
    (18, RefusalCode::Internal, "internal", true),
];

impl RefusalCode {
    /// The number on the wire.
    pub fn number(self) -> u16 {
        match self {
            RefusalCode::Other(number) => number,
            known => TABLE.iter().find(|row| row.1 == known).map_or(0, |row| row.0),
        }
    }

    /// The code of a number; [`RefusalCode::Other`] for one this version does not know.
    pub fn from_number(number: u16) -> RefusalCode {
        TABLE.iter().find(|row| row.0 == number).map_or(RefusalCode::Other(number), |row| row.1)
    }

    /// Whether trying again, without anyone mending anything, may succeed.
    pub fn is_retryable(self) -> bool {
        TABLE.iter().find(|row| row.1 == self).is_some_and(|row| row.3)
    }
}

impl fmt::Display for RefusalCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            RefusalCode::Other(number) => write!(f, "code {number}"),
            known => f.write_str(TABLE.iter().find(|row| row.1 == *known).map_or("unknown", |row| row.2)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_frozen() {
        for (index, (number, code, _, _)) in TABLE.iter().enumerate() {
            assert_eq!(usize::from(*number), index + 1);
            assert_eq!(RefusalCode::from_number(*number), *code);
            assert_eq!(code.number(), *number);
        }
        let golden = "version unauthorised wrong-group unknown-group generation replayed gap corrupt credit limit full \
                      busy superseded not-found failed stopping bad-request internal";
        let names: Vec<String> =
            (1..=18).map(|number| RefusalCode::from_number(number).to_string()).collect();
        assert_eq!(names.join(" "), golden);
        assert_eq!(RefusalCode::from_number(999), RefusalCode::Other(999));
        assert_eq!(RefusalCode::Other(999).number(), 999);
    }
}
