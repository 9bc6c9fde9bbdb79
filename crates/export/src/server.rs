//! Listeners, and the threads of their connections.

use std::collections::BTreeMap;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed, Ordering::SeqCst};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use block::ByteCount;
use parking_lot::Mutex;
use rustix::fd::{AsFd, OwnedFd};
use rustix::net::{Shutdown, sockopt};

use crate::channel::{Channel, Socket};
use crate::negotiate::{Exported, Security, negotiate};
use crate::session::{self, Counters};
use crate::{CONNECTIONS_MAX, NEGOTIATION_SILENCE_MAX, NEGOTIATION_TIME_MAX};

/// What a socket may hold of answers that the client has not taken, so that both sides work at the same time. Where the
/// kernel allows less, it is less.
const SEND_BUFFER_BYTES: usize = 1 << 20;
/// How long to wait when no connection can be accepted.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// Where an export is to be reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// A Unix socket that is made, for its owner only.
    Socket(PathBuf),
    /// A TCP port; 0 for any.
    Tcp(SocketAddr),
}

/// Why an export does not listen.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// The path is taken.
    #[error("listen on {}: it exists and is in use, or is no socket; choose another path", path.display())]
    Taken {
        /// Which.
        path: PathBuf,
    },
    /// The system refused.
    #[error("listen on {place}: {source}")]
    Io {
        /// On what.
        place: String,
        /// The system's answer.
        source: io::Error,
    },
}

/// What an export has done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counted {
    /// Clients connected now.
    pub connections: usize,
    /// Requests so far.
    pub requests: u64,
    /// Asked for by reads.
    pub read: ByteCount,
    /// Sent with writes.
    pub written: ByteCount,
}

/// Disks that are being served. Dropping it ends all connections, and waits until nothing of it runs any more.
pub struct Export {
    listener: Arc<OwnedFd>,
    place: Place,
    /// The socket's own number, so that another one of the same name is not removed.
    inode: Option<u64>,
    shared: Arc<Shared>,
    accepting: Option<JoinHandle<()>>,
}

impl std::fmt::Debug for Export {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Export").field("place", &self.place).finish_non_exhaustive()
    }
}

struct Shared {
    exports: Vec<Exported>,
    security: Security,
    counters: Counters,
    ending: AtomicBool,
    open: Mutex<BTreeMap<u64, Open>>,
    next: AtomicU64,
}

/// A connection.
struct Open {
    socket: Arc<OwnedFd>,
    /// Taken by whoever waits for its end.
    thread: Option<JoinHandle<()>>,
}

impl Export {
    /// Listens and serves in threads of its own.
    ///
    /// # Errors
    /// When the place cannot be listened on.
    pub fn start(exports: Vec<Exported>, place: Place, security: Security) -> Result<Export, ListenError> {
        let failed = |source| {
            let place = match &place {
                Place::Socket(path) => path.display().to_string(),
                Place::Tcp(address) => address.to_string(),
            };
            ListenError::Io { place, source }
        };
        let (listener, place, inode): (OwnedFd, Place, Option<u64>) = match &place {
            Place::Socket(path) => {
                remove_dead(path)?;
                let listener = bind_private(path).map_err(failed)?;
                let inode = std::fs::symlink_metadata(path).map_err(failed)?.ino();
                (listener.into(), place, Some(inode))
            }
            Place::Tcp(address) => {
                let listener = TcpListener::bind(address).map_err(failed)?;
                let address = listener.local_addr().map_err(failed)?;
                (listener.into(), Place::Tcp(address), None)
            }
        };
        let listener = Arc::new(listener);
        let shared = Arc::new(Shared {
            exports,
            security,
            counters: Counters::default(),
            ending: AtomicBool::new(false),
            open: Mutex::default(),
            next: AtomicU64::new(0),
        });
        let accept = {
            let (shared, listener, tcp) = (shared.clone(), listener.clone(), inode.is_none());
            move || shared.accept(&listener, tcp)
        };
        let accepting = std::thread::Builder::new().name("nbd-accept".to_owned()).spawn(accept);
        let accepting =
            accepting.map_err(|source| ListenError::Io { place: format!("{place:?}"), source })?;
        Ok(Export { listener, place, inode, shared, accepting: Some(accepting) })
    }

    /// Where it listens; a port of 0 has become a real one.
    pub fn place(&self) -> &Place {
        &self.place
    }

    /// What is served.
    pub fn exported(&self) -> &[Exported] {
        &self.shared.exports
    }

    /// What it has done so far.
    pub fn counted(&self) -> Counted {
        let counters = &self.shared.counters;
        Counted {
            connections: counters.connections.load(Relaxed),
            requests: counters.requests.load(Relaxed),
            read: ByteCount(counters.read_bytes.load(Relaxed)),
            written: ByteCount(counters.written_bytes.load(Relaxed)),
        }
    }
}

impl Drop for Export {
    fn drop(&mut self) {
        self.shared.ending.store(true, SeqCst);
        // Nobody comes in any more before the last ones are sent away.
        let _ = rustix::net::shutdown(&*self.listener, Shutdown::Both);
        if let Some(accepting) = self.accepting.take() {
            let _ = accepting.join();
        }
        let threads: Vec<_> = {
            let mut open = self.shared.open.lock();
            for Open { socket, .. } in open.values() {
                let _ = rustix::net::shutdown(&**socket, Shutdown::Both);
            }
            open.values_mut().filter_map(|open| open.thread.take()).collect()
        };
        for thread in threads {
            let _ = thread.join();
        }
        if let (Place::Socket(path), Some(inode)) = (&self.place, self.inode)
            && std::fs::symlink_metadata(path).is_ok_and(|found| found.ino() == inode)
            && let Err(error) = std::fs::remove_file(path)
        {
            tracing::warn!(path = %path.display(), %error, "remove the socket of an export");
        }
    }
}

/// Removes a socket that nobody listens on any more.
fn remove_dead(path: &Path) -> Result<(), ListenError> {
    let Ok(found) = std::fs::symlink_metadata(path) else { return Ok(()) };
    let dead = found.file_type().is_socket()
        && UnixStream::connect(path).is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused);
    if !dead {
        return Err(ListenError::Taken { path: path.to_owned() });
    }
    std::fs::remove_file(path).map_err(|source| ListenError::Io { place: path.display().to_string(), source })
}

/// Nobody but the owner can connect, at no time: the name appears only when the permissions are right.
fn bind_private(path: &Path) -> io::Result<UnixListener> {
    let mut hidden = path.file_name().ok_or(io::ErrorKind::InvalidInput)?.to_owned();
    hidden.push(format!(".{}", std::process::id()));
    let hidden = path.with_file_name(hidden);
    let listener = UnixListener::bind(&hidden)?;
    let named = std::fs::set_permissions(&hidden, std::fs::Permissions::from_mode(0o600))
        .and_then(|()| std::fs::hard_link(&hidden, path));
    std::fs::remove_file(&hidden)?;
    named.map(|()| listener)
}

impl Shared {
    fn accept(self: &Arc<Self>, listener: &OwnedFd, tcp: bool) {
        while !self.ending.load(SeqCst) {
            match rustix::net::accept_with(listener, rustix::net::SocketFlags::CLOEXEC) {
                Ok(socket) => self.admit(socket, tcp),
                Err(_) if self.ending.load(SeqCst) => return,
                Err(rustix::io::Errno::INTR | rustix::io::Errno::CONNABORTED) => {}
                Err(error) => {
                    tracing::error!(%error, "accept a connection to an export; tried again");
                    std::thread::sleep(ACCEPT_PAUSE);
                }
            }
        }
    }

    fn admit(self: &Arc<Self>, socket: OwnedFd, tcp: bool) {
        let mut open = self.open.lock();
        if open.len() >= CONNECTIONS_MAX {
            tracing::warn!("a connection to an export was closed: {CONNECTIONS_MAX} are open already");
            return;
        }
        // Only for speed.
        let _ = sockopt::set_socket_send_buffer_size_force(socket.as_fd(), SEND_BUFFER_BYTES)
            .or_else(|_| sockopt::set_socket_send_buffer_size(socket.as_fd(), SEND_BUFFER_BYTES));
        if tcp {
            let _ = sockopt::set_tcp_nodelay(socket.as_fd(), true);
            let _ = sockopt::set_socket_keepalive(socket.as_fd(), true);
        }
        let number = self.next.fetch_add(1, Relaxed);
        let socket = Arc::new(socket);
        let serve = {
            let (shared, socket) = (self.clone(), socket.clone());
            move || {
                shared.serve(&socket);
                // At the end of the export the thread is waited for, and not here.
                shared.open.lock().remove(&number);
            }
        };
        match std::thread::Builder::new().name("nbd".to_owned()).spawn(serve) {
            Ok(thread) => {
                open.insert(number, Open { socket, thread: Some(thread) });
            }
            Err(error) => tracing::error!(%error, "start a thread for a connection to an export"),
        }
    }

    fn serve(&self, socket: &Arc<OwnedFd>) {
        self.counters.connections.fetch_add(1, Relaxed);
        let outcome = self.converse(socket);
        self.counters.connections.fetch_sub(1, Relaxed);
        // The listing of open connections has a handle, which alone would not end it.
        let _ = rustix::net::shutdown(&**socket, Shutdown::Both);
        match outcome {
            Ok(()) => tracing::debug!("an export's client left"),
            Err(_) if self.ending.load(SeqCst) => {}
            Err(error) => tracing::info!(%error, "the connection of an export's client ended"),
        }
    }

    fn converse(&self, socket: &Arc<OwnedFd>) -> io::Result<()> {
        let channel: Arc<dyn Channel> =
            Arc::new(Socket::new(socket.clone(), Instant::now() + NEGOTIATION_TIME_MAX));
        sockopt::set_socket_timeout(&**socket, sockopt::Timeout::Recv, Some(NEGOTIATION_SILENCE_MAX))?;
        let Some(agreed) = negotiate(channel, &self.exports, &self.security)? else { return Ok(()) };
        sockopt::set_socket_timeout(&**socket, sockopt::Timeout::Recv, None)?;
        agreed.channel.settle();
        session::serve(agreed, &self.counters)
    }
}
