//! What a machine says on its serial console, and whether that is what it should say.

use std::io::Write;
use std::time::{Duration, Instant};

use tokio::io::{AsyncRead, AsyncReadExt as _};

use crate::BootError;

/// What is kept of the console to be shown when it was in vain, in bytes.
pub const CONSOLE_TAIL_BYTES: usize = 4096;
/// The longest text to look for, in bytes.
pub const TEXT_BYTES_MAX: usize = 1024;
/// What is read of the console at a time, in bytes.
const READ_BYTES: usize = 16 * 1024;

/// Why a machine has not come up.
pub type Why = String;

/// What a console has said, against what it must say and what it must not.
#[derive(Debug)]
pub struct Watch<'a> {
    expect: Vec<(&'a str, Option<Duration>)>,
    never: &'a [String],
    /// The end of it, in which a text may have begun.
    tail: Vec<u8>,
}

impl<'a> Watch<'a> {
    /// Nothing has been said. Texts have 1 to [`TEXT_BYTES_MAX`] bytes.
    pub fn new(expect: &'a [String], never: &'a [String]) -> Watch<'a> {
        Watch { expect: expect.iter().map(|text| (text.as_str(), None)).collect(), never, tail: Vec::new() }
    }

    /// Takes what it says at a time. `Err`: what it should never have said.
    fn hear(&mut self, said: &[u8], at: Duration) -> Result<(), String> {
        self.tail.extend_from_slice(said);
        // Older bytes were looked at, but for a text that goes on here.
        let from = self.tail.len().saturating_sub(said.len() + TEXT_BYTES_MAX);
        let new = &self.tail[from..];
        let has = |text: &str| new.windows(text.len()).any(|window| window == text.as_bytes());
        let bad = self.never.iter().find(|text| has(text)).cloned();
        for (text, seen) in self.expect.iter_mut().filter(|(_, seen)| seen.is_none()) {
            *seen = has(text).then_some(at);
        }
        let surplus = self.tail.len().saturating_sub(CONSOLE_TAIL_BYTES);
        self.tail.drain(..surplus);
        bad.map_or(Ok(()), Err)
    }

    /// Whether all was said that must be.
    pub fn all_seen(&self) -> bool {
        self.expect.iter().all(|(_, seen)| seen.is_some())
    }

    /// What must be said, with when it was.
    pub fn expected(&self) -> &[(&'a str, Option<Duration>)] {
        &self.expect
    }

    /// What was not said, for people.
    pub fn missing(&self) -> String {
        let missing = self.expect.iter().filter(|(_, seen)| seen.is_none());
        missing.map(|(text, _)| format!("{text:?}")).collect::<Vec<_>>().join(", ")
    }

    /// The end of what was said, at most [`CONSOLE_TAIL_BYTES`].
    pub fn tail(&self) -> &[u8] {
        &self.tail
    }

    /// The last lines of that, as a terminal can show them.
    pub fn last_lines(&self, count: usize) -> Vec<String> {
        let said = String::from_utf8_lossy(&self.tail);
        let clean = |line: &str| line.chars().filter(|char| !char.is_control()).collect::<String>();
        let lines: Vec<String> =
            said.lines().map(clean).filter(|line: &String| !line.trim().is_empty()).collect();
        lines[lines.len().saturating_sub(count)..].to_vec()
    }
}

/// A console that is listened to.
pub struct Console<'a, 'b> {
    /// What it must say.
    pub watch: &'b mut Watch<'a>,
    /// Where all of it goes.
    pub log: Option<&'b mut (dyn Write + Send)>,
    /// Times count from here.
    pub began: Instant,
    /// Hears the last line each time something was said.
    pub shown: &'b mut (dyn FnMut(&str) + Send),
}

impl std::fmt::Debug for Console<'_, '_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Console").field("watch", &self.watch).finish_non_exhaustive()
    }
}

impl Console<'_, '_> {
    /// Listens until everything was said and the probe, begun then, has ended; or something that never should be, or the machine has ended.
    /// It is read to the end, also while the probe runs: a console that nobody reads makes its machine wait.
    ///
    /// # Errors
    /// When the console cannot be read or kept, or the probe not be run.
    pub async fn listen<P, E>(
        self,
        mut console: impl AsyncRead + Unpin,
        probe: Option<P>,
    ) -> Result<Result<(), Why>, E>
    where
        P: Future<Output = Result<Result<(), Why>, E>>,
        E: From<BootError>,
    {
        let Console { watch, mut log, began, shown } = self;
        let mut bytes = vec![0; READ_BYTES];
        let probes = probe.is_some();
        let mut waiting = probe.map(Box::pin);
        let mut probing = None;
        loop {
            if watch.all_seen() && probing.is_none() {
                if !probes {
                    return Ok(Ok(()));
                }
                probing = waiting.take();
            }
            let probed = async {
                match &mut probing {
                    Some(running) => running.await,
                    None => std::future::pending().await,
                }
            };
            let length = tokio::select! {
                length = console.read(&mut bytes) => length.map_err(BootError::io("read the machine's console"))?,
                probed = probed => return probed,
            };
            if length == 0 {
                let before = match probing.is_some() {
                    true => "the probe ended".to_owned(),
                    false => format!("it said {}", watch.missing()),
                };
                return Ok(Err(format!("the machine ended before {before}")));
            }
            if let Some(log) = &mut log {
                log.write_all(&bytes[..length]).map_err(BootError::io("write the console's file"))?;
            }
            if let Err(bad) = watch.hear(&bytes[..length], began.elapsed()) {
                return Ok(Err(format!("the machine said {bad:?}")));
            }
            let last: String = watch.last_lines(1).pop().unwrap_or_default().chars().take(120).collect();
            shown(&last);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(texts: &[&str]) -> Vec<String> {
        texts.iter().map(|text| (*text).to_owned()).collect()
    }

    #[test]
    fn texts_are_found_however_the_console_is_cut() {
        let (expect, never) = (texts(&["debian login:", "Reached target"]), texts(&["panic"]));
        let said =
            format!("{}Reached target Basic.\r\n\u{1b}[0mdebian login:", "x".repeat(3 * CONSOLE_TAIL_BYTES));
        for piece in [1, 2, 7, 4096, said.len()] {
            let mut watch = Watch::new(&expect, &never);
            for (index, piece) in said.as_bytes().chunks(piece).enumerate() {
                assert!(!watch.all_seen(), "not before the end");
                watch.hear(piece, Duration::from_secs(index as u64)).unwrap();
            }
            assert!(watch.all_seen() && watch.missing().is_empty(), "in pieces of {piece}");
            assert!(watch.expect[1].1 <= watch.expect[0].1 && watch.tail.len() <= CONSOLE_TAIL_BYTES);
            assert_eq!(watch.last_lines(1), ["[0mdebian login:"]);
        }
    }

    #[test]
    fn what_must_not_be_said_counts_even_with_what_must() {
        let (expect, never) = (texts(&["login:"]), texts(&["Kernel panic"]));
        let mut watch = Watch::new(&expect, &never);
        watch.hear(b"Kernel pan", Duration::ZERO).unwrap();
        assert_eq!(watch.hear(b"ic - not syncing\nlogin:", Duration::ZERO).unwrap_err(), "Kernel panic");
        assert_eq!(Watch::new(&expect, &never).missing(), "\"login:\"");
    }

    #[tokio::test]
    async fn a_machine_that_ends_too_early_has_not_come_up() {
        let expect = texts(&["login:"]);
        let none: Option<std::future::Pending<Result<Result<(), Why>, BootError>>> = None;
        let mut watch = Watch::new(&expect, &[]);
        let mut log = Vec::new();
        let console =
            Console { watch: &mut watch, log: Some(&mut log), began: Instant::now(), shown: &mut |_| {} };
        let why = console.listen(&b"GRUB\r\n"[..], none).await.unwrap().unwrap_err();
        assert!(why.contains("ended before it said \"login:\""), "{why}");
        assert_eq!(log, b"GRUB\r\n");

        // Also while the probe runs; and its word counts.
        for (said, ok) in [(Ok(()), true), (Err("no".to_owned()), false)] {
            let (mut watch, (machine, mut speaks)) = (Watch::new(&expect, &[]), tokio::io::duplex(64));
            let console = Console { watch: &mut watch, log: None, began: Instant::now(), shown: &mut |_| {} };
            let probe = async { Ok::<_, BootError>(said) };
            tokio::io::AsyncWriteExt::write_all(&mut speaks, b"login:").await.unwrap();
            assert_eq!(console.listen(machine, Some(probe)).await.unwrap().is_ok(), ok);
        }
        let mut watch = Watch::new(&expect, &[]);
        let console = Console { watch: &mut watch, log: None, began: Instant::now(), shown: &mut |_| {} };
        let probe = std::future::pending::<Result<Result<(), Why>, BootError>>();
        let why = console.listen(&b"login:"[..], Some(probe)).await.unwrap().unwrap_err();
        assert!(why.contains("before the probe ended"), "{why}");
    }
}
