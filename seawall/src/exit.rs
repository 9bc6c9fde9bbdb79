//! With what exit status the command ends: the same over all commands, documented in docs/cli.md.

use std::process::ExitCode;

use control::fleet::{Problem, ProblemCode};
use enrol::EnrolError;

/// How a command ended. The numbers never change their meaning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Exit {
    /// Done as asked.
    Done = 0,
    /// It could not be done; the error says why, and what to do.
    Failed = 1,
    /// The command line makes no sense; nothing was tried.
    Usage = 2,
    /// Done or looked at, and the outcome is less than it should be: a point of less consistency than asked for, damage found, a
    /// job that failed or was cancelled.
    Short = 3,
    /// What was named is not there.
    NotFound = 4,
    /// A server did not answer; trying again may help.
    Unreachable = 5,
    /// Nobody is logged in, or whoever is may not do this.
    Refused = 6,
    /// Nothing was done yet: a second person must approve it first.
    Waits = 7,
}

impl Exit {
    /// All of them.
    pub(crate) const ALL: [Exit; 8] = [
        Exit::Done,
        Exit::Failed,
        Exit::Usage,
        Exit::Short,
        Exit::NotFound,
        Exit::Unreachable,
        Exit::Refused,
        Exit::Waits,
    ];

    pub(crate) const fn code(self) -> u8 {
        self as u8
    }

    /// What it means, for docs/cli.md.
    pub(crate) const fn meaning(self) -> &'static str {
        match self {
            Exit::Done => "Done as asked.",
            Exit::Failed => "It could not be done; the error says why, and what to do.",
            Exit::Usage => "The command line makes no sense; nothing was tried.",
            Exit::Short => {
                "Done or looked at, and the outcome is less than it should be: a point of less consistency than asked for, \
                 damage found, a job that failed or was cancelled."
            }
            Exit::NotFound => "What was named is not there.",
            Exit::Unreachable => "A server did not answer; trying again may help.",
            Exit::Refused => "Nobody is logged in, or whoever is may not do this.",
            Exit::Waits => {
                "Nothing was done yet: a second person must approve it first (`seawall approval`)."
            }
        }
    }

    /// What an error says of the end: what is deepest in it counts.
    pub(crate) fn of(error: &anyhow::Error) -> Exit {
        let mut exit = Exit::Failed;
        for cause in error.chain() {
            if let Some(stop) = cause.downcast_ref::<Stop>() {
                exit = stop.exit;
            } else if let Some(error) = cause.downcast_ref::<EnrolError>() {
                exit = match error {
                    EnrolError::Unreachable { .. } => Exit::Unreachable,
                    EnrolError::Problem(problem) => of_problem(problem),
                    _ => exit,
                };
            } else if let Some(wire::WireError::Connect { .. }) = cause.downcast_ref() {
                exit = Exit::Unreachable;
            }
        }
        exit
    }
}

/// For the command's help.
pub(crate) fn help() -> String {
    let lines: Vec<String> =
        Exit::ALL.iter().map(|exit| format!("  {}  {}", exit.code(), exit.meaning())).collect();
    format!("Exit status of every command:\n{}", lines.join("\n"))
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> ExitCode {
        ExitCode::from(exit.code())
    }
}

fn of_problem(problem: &Problem) -> Exit {
    let is = |codes: &[ProblemCode]| codes.iter().any(|code| problem.is(*code));
    if is(&[ProblemCode::NotFound]) {
        Exit::NotFound
    } else if is(&[ProblemCode::Unauthenticated, ProblemCode::Forbidden, ProblemCode::Revoked]) {
        Exit::Refused
    } else if is(&[ProblemCode::ApprovalNeeded]) {
        Exit::Waits
    } else if is(&[ProblemCode::Unavailable, ProblemCode::TooMany]) {
        Exit::Unreachable
    } else {
        Exit::Failed
    }
}

/// An error for people whose exit status is known.
#[derive(Debug)]
pub(crate) struct Stop {
    exit: Exit,
    message: String,
}

impl std::fmt::Display for Stop {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Stop {}

/// An error that ends the command with this status.
pub(crate) fn stop(exit: Exit, message: impl Into<String>) -> anyhow::Error {
    anyhow::Error::new(Stop { exit, message: message.into() })
}

#[cfg(test)]
mod tests {
    use anyhow::Context;

    use super::*;

    #[test]
    fn numbers_are_what_scripts_know() {
        let numbers: Vec<u8> = Exit::ALL.iter().map(|exit| exit.code()).collect();
        assert_eq!(numbers, [0, 1, 2, 3, 4, 5, 6, 7]);
    }

    #[test]
    fn an_error_ends_as_its_cause_says() {
        let problem = |code| EnrolError::Problem(Box::new(Problem::new(code, "What", "Mend.")));
        for (code, exit) in [
            (ProblemCode::NotFound, Exit::NotFound),
            (ProblemCode::Unauthenticated, Exit::Refused),
            (ProblemCode::Forbidden, Exit::Refused),
            (ProblemCode::ApprovalNeeded, Exit::Waits),
            (ProblemCode::Unavailable, Exit::Unreachable),
            (ProblemCode::Conflict, Exit::Failed),
        ] {
            assert_eq!(Exit::of(&anyhow::Error::new(problem(code)).context("do it")), exit, "{code:?}");
        }
        let named = Err::<(), _>(stop(Exit::NotFound, "find machine web: none")).context("protect web");
        assert_eq!(Exit::of(&named.unwrap_err()), Exit::NotFound);
        assert_eq!(Exit::of(&anyhow::anyhow!("some other")), Exit::Failed);
    }
}
