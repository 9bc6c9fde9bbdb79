//! A process of its own that thaws everything when the agent dies or a freeze lasts too long, whatever the agent does.
//!
//! It is the agent's program started again, before the first freeze. It holds every filesystem's directory open and gets all
//! its memory before anything is frozen, and touches no file afterwards: it cannot block on what it is to thaw.
//!
//! The agent tells what it is about to do, before it does it; each message is one byte and a number:
//! hold (with a directory), arm (with the budget in milliseconds), freezing, frozen, refused, done.
//! - The agent's end closes: it is gone, and with it every call it had in the kernel. What it had frozen is thawed.
//! - The budget passes: everything is thawed, and what is still being frozen is thawed as soon as that has ended, for as
//!   long as the agent has not said that it is done.
//! - A freeze that somebody else holds was refused to the agent, and is not ours to thaw. Only when the agent dies between
//!   the kernel's answer and its message, both within microseconds, such a freeze is thawed too: rather that than one
//!   that nobody lifts.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::mm::MlockAllFlags;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, send, sendmsg, socketpair,
};

use super::ioctl;

/// The hidden subcommand that makes a program the watchdog.
pub(super) const COMMAND: &str = "freeze-watchdog";
/// How often a freeze that is still on the way is tried to be thawed after the budget has passed.
const AGAIN: Duration = Duration::from_millis(5);
/// How long the watchdog may take to start; past it there is no freeze.
const START_MAX: Duration = Duration::from_secs(10);
const READY: u8 = b'R';
const MESSAGE_BYTES: usize = 9;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Message {
    Hold = b'H',
    Arm = b'A',
    Freezing = b'F',
    Frozen = b'K',
    Refused = b'N',
    Done = b'D',
}

impl Message {
    fn encode(self, number: u64) -> [u8; MESSAGE_BYTES] {
        let mut bytes = [0; MESSAGE_BYTES];
        bytes[0] = self as u8;
        bytes[1..].copy_from_slice(&number.to_le_bytes());
        bytes
    }

    fn decode(bytes: &[u8]) -> Option<(Message, u64)> {
        let bytes: &[u8; MESSAGE_BYTES] = bytes.try_into().ok()?;
        let all = [
            Message::Hold,
            Message::Arm,
            Message::Freezing,
            Message::Frozen,
            Message::Refused,
            Message::Done,
        ];
        let message = all.into_iter().find(|message| *message as u8 == bytes[0])?;
        Some((message, u64::from_le_bytes(bytes[1..].try_into().expect("8 of 9 bytes"))))
    }
}

/// The agent's side. Dropping it without [`Watchdog::done`] makes the process thaw everything at once.
#[derive(Debug)]
pub(super) struct Watchdog {
    channel: Option<OwnedFd>,
    child: Child,
}

impl Watchdog {
    /// Starts `program` as a watchdog that holds `dirs`, and waits until it is ready for a freeze.
    pub(super) fn start(program: &Path, dirs: &[&File]) -> anyhow::Result<Watchdog> {
        let (ours, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
                .context("make a channel to the watchdog")?;
        let child = Command::new(program)
            .arg(COMMAND)
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .current_dir("/")
            .env_clear()
            .spawn()
            .with_context(|| format!("start the watchdog ({} {COMMAND})", program.display()))?;
        let watchdog = Watchdog { channel: Some(ours), child };
        for dir in dirs {
            watchdog.hold(dir).context("give a directory to the watchdog")?;
        }
        watchdog.wait_ready()?;
        Ok(watchdog)
    }

    fn channel(&self) -> &OwnedFd {
        self.channel.as_ref().expect("it is closed only when done or dropped")
    }

    fn hold(&self, dir: &File) -> rustix::io::Result<()> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let fds = [dir.as_fd()];
        assert!(ancillary.push(SendAncillaryMessage::ScmRights(&fds)), "there is room for one");
        let bytes = Message::Hold.encode(0);
        sendmsg(self.channel(), &[IoSlice::new(&bytes)], &mut ancillary, SendFlags::NOSIGNAL).map(drop)
    }

    fn wait_ready(&self) -> anyhow::Result<()> {
        self.say(Message::Arm, u64::MAX)?;
        let mut byte = [0; 1];
        let mut fds = [PollFd::new(self.channel(), PollFlags::IN)];
        let ready = poll(&mut fds, Some(&timespec(START_MAX))).context("wait for the watchdog")?;
        if ready == 0 {
            bail!("wait for the watchdog: it is not ready after {START_MAX:?}");
        }
        let (read, _) = rustix::net::recv(self.channel(), &mut byte, RecvFlags::empty())
            .context("wait for the watchdog")?;
        if read == 0 || byte[0] != READY {
            bail!("wait for the watchdog: it ended instead of getting ready");
        }
        Ok(())
    }

    fn say(&self, message: Message, number: u64) -> anyhow::Result<()> {
        let bytes = message.encode(number);
        send(self.channel(), &bytes, SendFlags::NOSIGNAL).context("tell the watchdog: it has ended")?;
        Ok(())
    }

    /// From now on everything is thawed when `budget` has passed.
    pub(super) fn arm(&self, budget: Duration) -> anyhow::Result<()> {
        self.say(Message::Arm, budget.as_millis() as u64)
    }

    /// To be said before the filesystem is frozen.
    pub(super) fn freezing(&self, index: usize) -> anyhow::Result<()> {
        self.say(Message::Freezing, index as u64)
    }

    /// It was frozen.
    pub(super) fn frozen(&self, index: usize) -> anyhow::Result<()> {
        self.say(Message::Frozen, index as u64)
    }

    /// It was not: what is frozen there is not ours.
    pub(super) fn refused(&self, index: usize) -> anyhow::Result<()> {
        self.say(Message::Refused, index as u64)
    }

    /// Everything is thawed: the watchdog ends and touches nothing any more.
    pub(super) fn done(self) {
        // When it has ended already there is nobody to tell.
        let _ = self.say(Message::Done, 0);
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.channel.take();
        // It ends now that the channel is closed: after thawing, unless it was told that all is done.
        if let Err(error) = self.child.wait() {
            tracing::warn!(%error, "wait for the end of the watchdog");
        }
    }
}

fn timespec(time: Duration) -> Timespec {
    Timespec { tv_sec: time.as_secs() as i64, tv_nsec: i64::from(time.subsec_nanos()) }
}

/// The program that started the agent, even when its file has been replaced since.
pub(super) fn own_program() -> PathBuf {
    PathBuf::from("/proc/self/exe")
}

/// What a filesystem is to the watchdog.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Not touched, or not by us.
    Free,
    /// The agent is about to freeze it, or does.
    Freezing,
    /// The agent has frozen it.
    Frozen,
}

struct Guard {
    held: Vec<(OwnedFd, State)>,
    deadline: Option<Instant>,
}

/// Is the watchdog: never returns before everything that it was told of is thawed.
pub(super) fn main() -> ExitCode {
    let channel = io::stdin();
    let mut guard = Guard { held: Vec::with_capacity(rustix_fds_max()), deadline: None };
    // A terminal's interrupt and a service's stop are for the agent.
    ignore_signals();
    // Neither the kernel's memory killer nor a page that is not there may keep it from thawing. Without the privilege it
    // does its work all the same: reading is not frozen.
    let _ = std::fs::write("/proc/self/oom_score_adj", "-1000");
    let _ = rustix::mm::mlockall(MlockAllFlags::CURRENT | MlockAllFlags::FUTURE);
    loop {
        let wait = match guard.deadline {
            None => None,
            Some(deadline) => match deadline.checked_duration_since(Instant::now()) {
                Some(left) => Some(left),
                None if guard.thaw() => None,
                None => Some(AGAIN),
            },
        };
        let mut fds = [PollFd::new(&channel, PollFlags::IN)];
        let timeout = wait.map(timespec);
        match poll(&mut fds, timeout.as_ref()) {
            Ok(0) | Err(rustix::io::Errno::INTR) => continue,
            Ok(_) => {}
            Err(_) => return guard.end(),
        }
        match receive(&channel) {
            Ok(Some((Message::Done, _, _))) => return ExitCode::SUCCESS,
            Ok(Some((message, number, dir))) => guard.take(message, number, dir, &channel),
            // The agent is gone, or speaks nonsense.
            Ok(None) | Err(_) => return guard.end(),
        }
    }
}

/// Filesystems that memory is got for beforehand; more cost an allocation, which is locked too.
fn rustix_fds_max() -> usize {
    super::FILESYSTEMS_FROZEN_MAX
}

impl Guard {
    fn take(&mut self, message: Message, number: u64, dir: Option<OwnedFd>, channel: impl AsFd) {
        let mut set = |state| {
            if let Some(held) = usize::try_from(number).ok().and_then(|index| self.held.get_mut(index)) {
                held.1 = state;
            }
        };
        match message {
            Message::Hold => self.held.extend(dir.map(|dir| (dir, State::Free))),
            Message::Arm if number == u64::MAX => {
                // The way through the kernel and our own code has been gone once before it counts.
                self.thaw();
                // Who cannot be answered is gone, which is seen next.
                let _ = send(channel, &[READY], SendFlags::NOSIGNAL);
            }
            Message::Arm => self.deadline = Some(Instant::now() + Duration::from_millis(number)),
            Message::Freezing => set(State::Freezing),
            Message::Frozen => set(State::Frozen),
            Message::Refused => set(State::Free),
            Message::Done => {}
        }
    }

    /// Thaws what the agent has frozen, the last first; then what it may just be freezing, which can block until the freeze has
    /// ended. Whether nothing is left.
    fn thaw(&mut self) -> bool {
        for (dir, state) in self.held.iter_mut().rev() {
            if *state == State::Frozen {
                // Thawed by us, or by somebody before us.
                let _ = ioctl::thaw(dir.as_fd());
                *state = State::Free;
            }
        }
        for (dir, state) in &mut self.held {
            if *state == State::Freezing {
                let _ = ioctl::thaw(dir.as_fd());
            }
        }
        self.held.iter().all(|(_, state)| *state == State::Free)
    }

    /// The agent is gone, and no call of it is in the kernel any more: one round thaws everything.
    fn end(mut self) -> ExitCode {
        self.thaw();
        ExitCode::FAILURE
    }
}

fn receive(channel: impl AsFd) -> rustix::io::Result<Option<(Message, u64, Option<OwnedFd>)>> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut bytes = [0; MESSAGE_BYTES];
    let received =
        recvmsg(channel, &mut [IoSliceMut::new(&mut bytes)], &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
    if received.bytes == 0 {
        return Ok(None);
    }
    let mut dir = None;
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(fds) = message {
            dir = fds.last().or(dir);
        }
    }
    let message = Message::decode(&bytes[..received.bytes]);
    Ok(message.map(|(message, number)| (message, number, dir)))
}

#[expect(unsafe_code, reason = "ignoring a signal has no safe wrapper")]
fn ignore_signals() {
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT, libc::SIGPIPE] {
        // SAFETY: no handler of ours is called.
        unsafe { libc::signal(signal, libc::SIG_IGN) };
    }
}
