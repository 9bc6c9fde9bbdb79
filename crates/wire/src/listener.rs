use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use rustls::pki_types::ServerName;
use tokio::io::{AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpSocket, TcpStream, lookup_host};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{sleep, timeout};
use tokio_rustls::{TlsAcceptor, TlsConnector, TlsStream};

use crate::credentials::{Credentials, identity_of, serial_of};
use crate::handshake::{HANDSHAKE_BYTES, Handshake, Purpose};
use crate::identity::{Identity, Role};
use crate::link::{Link, Shared, Timing};
use crate::renewal::LiveCredentials;
use crate::revoked::{Revocations, Serial};
use crate::{RefusalCode, WireError, tls};

/// How long TCP may take to connect to one address.
pub const CONNECT_TIME_MAX: Duration = Duration::from_secs(10);
/// How long a peer has from its connection until it is authenticated. Past it, it is dropped.
pub const HANDSHAKE_TIME_MAX: Duration = Duration::from_secs(10);
/// How many peers may be on their way to being authenticated. Further ones wait in the kernel's queue.
pub const HANDSHAKES_PENDING_MAX: usize = 64;
/// Connections that the kernel keeps until they are accepted.
pub const BACKLOG: u32 = 1024;

/// How often it is looked whether the certificate of a connected peer was revoked.
pub const REVOCATION_LOOK_EVERY: Duration = Duration::from_secs(5);

/// How much is read from a socket at once.
const SOCKET_READ_BYTES: usize = 256 * 1024;
/// How long to wait when the system has no descriptors or memory for a connection.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

type Stream = TlsStream<BufReader<TcpStream>>;

/// A port that peers of the same authority may connect to.
#[derive(Debug)]
pub struct Listener {
    listener: TcpListener,
    local: SocketAddr,
    credentials: Presented,
    pending: Arc<Semaphore>,
}

/// What is shown to peers.
#[derive(Debug)]
enum Presented {
    Fixed(Arc<Credentials>),
    Live(Arc<LiveCredentials>),
}

impl Listener {
    /// Listens on `addr` (`host:port`; port 0 for any).
    ///
    /// # Errors
    /// When the address cannot be resolved or is in use.
    pub async fn bind(addr: &str, credentials: Arc<Credentials>) -> Result<Listener, WireError> {
        Listener::bind_as(addr, Presented::Fixed(credentials)).await
    }

    /// As [`Listener::bind`], with credentials that may be replaced while it listens.
    ///
    /// # Errors
    /// As [`Listener::bind`].
    pub async fn bind_live(addr: &str, credentials: Arc<LiveCredentials>) -> Result<Listener, WireError> {
        Listener::bind_as(addr, Presented::Live(credentials)).await
    }

    async fn bind_as(addr: &str, credentials: Presented) -> Result<Listener, WireError> {
        let error = |source| WireError::Bind { addr: addr.to_owned(), source: Arc::new(source) };
        let first = lookup_host(addr).await.map_err(error)?.next();
        let first = first.ok_or_else(|| error(io::Error::other("the name has no address")))?;
        let listen = || {
            let socket = new_socket(first)?;
            socket.set_reuseaddr(true)?;
            socket.bind(first)?;
            socket.listen(BACKLOG)
        };
        let listener = listen().map_err(error)?;
        let local = listener.local_addr().map_err(error)?;
        let pending = Arc::new(Semaphore::new(HANDSHAKES_PENDING_MAX));
        Ok(Listener { listener, local, credentials, pending })
    }

    /// Where it listens.
    pub fn local_addr(&self) -> SocketAddr {
        self.local
    }

    /// Waits for the next connection. Cheap: nothing is asked of the peer yet; run [`Pending::handshake`] in a task of
    /// its own. Cancelling loses nothing.
    ///
    /// # Errors
    /// When the port itself failed. A single connection that fails is passed over.
    pub async fn accept(&self) -> Result<Pending, WireError> {
        let permit = Arc::clone(&self.pending).acquire_owned().await;
        let permit = permit.expect("the semaphore is never closed");
        loop {
            match self.listener.accept().await {
                Ok((stream, address)) => {
                    return Ok(Pending {
                        stream,
                        address,
                        credentials: match &self.credentials {
                            Presented::Fixed(credentials) => credentials.clone(),
                            Presented::Live(credentials) => credentials.current(),
                        },
                        _permit: permit,
                    });
                }
                Err(error) if is_passing(&error) => {
                    tracing::warn!(%error, local = %self.local, "accept a connection");
                    sleep(ACCEPT_PAUSE).await;
                }
                Err(error) => {
                    return Err(WireError::Bind { addr: self.local.to_string(), source: Arc::new(error) });
                }
            }
        }
    }
}

/// Errors of one connection, or of a system that is short of something for a while. The listener outlives them.
fn is_passing(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionReset, Interrupted, OutOfMemory, TimedOut};
    const ENFILE: i32 = 23;
    const EMFILE: i32 = 24;
    const ENOBUFS: i32 = 105;
    matches!(error.kind(), ConnectionAborted | ConnectionReset | Interrupted | OutOfMemory | TimedOut)
        || matches!(error.raw_os_error(), Some(ENFILE | EMFILE | ENOBUFS))
}

/// A connection of somebody not yet known.
#[derive(Debug)]
pub struct Pending {
    stream: TcpStream,
    address: SocketAddr,
    credentials: Arc<Credentials>,
    _permit: OwnedSemaphorePermit,
}

impl Pending {
    /// Where it comes from.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Authenticates the peer, within [`HANDSHAKE_TIME_MAX`]. Until it has, it gets no byte of Seawall's protocol.
    ///
    /// # Errors
    /// When it has no valid certificate of the same authority, or does not speak the protocol.
    pub async fn handshake(self) -> Result<Connection, WireError> {
        self.handshake_within(HANDSHAKE_TIME_MAX).await
    }

    pub(crate) async fn handshake_within(self, limit: Duration) -> Result<Connection, WireError> {
        let address = self.address.to_string();
        let shake = async {
            let acceptor = TlsAcceptor::from(self.credentials.server.clone());
            let buffered = BufReader::with_capacity(SOCKET_READ_BYTES, self.stream);
            let mut stream = acceptor.accept(buffered).await.map_err(|error| tls_error(&address, &error))?;
            stream.get_mut().1.set_buffer_limit(Some(tls::TLS_BUFFER_BYTES));
            let mut stream = TlsStream::from(stream);
            let (peer, watched) = authenticated(&stream, &address, &self.credentials)?;
            let offer = read_handshake(&mut stream, &address).await;
            // An acceptable offer is echoed; any other is answered too, so that the peer can name the difference.
            let purpose = offer.as_ref().map_or(Purpose::Deliver, |offer| offer.purpose);
            if !matches!(offer, Err(WireError::Handshake { source: crate::HandshakeError::Magic, .. })) {
                write_handshake(&mut stream, purpose, &address).await?;
            }
            let offer = offer?;
            let version = offer.version();
            Ok(Connection { peer, address: address.clone(), purpose, version, watched, stream })
        };
        match timeout(limit, shake).await {
            Ok(result) => result,
            Err(_) => Err(WireError::TimedOut { what: "shake hands", peer: address.clone(), after: limit }),
        }
    }
}

/// Connects to deliver; see [`connect_for`].
///
/// # Errors
/// As [`connect_for`].
pub async fn connect(addr: &str, expected: Role, credentials: &Credentials) -> Result<Connection, WireError> {
    connect_for(Purpose::Deliver, addr, expected, credentials).await
}

/// Connects to `addr` (`host:port`), and proves both sides: the peer must have a certificate of the same authority
/// that names the `expected` role, and must have accepted this side's.
///
/// # Errors
/// When nobody answers in time, either side is not accepted, or no protocol version is shared.
pub async fn connect_for(
    purpose: Purpose,
    addr: &str,
    expected: Role,
    credentials: &Credentials,
) -> Result<Connection, WireError> {
    let stream = connect_tcp(addr).await?;
    let shake = async {
        let name = ServerName::try_from(expected.dns_name())
            .map_err(|error| WireError::Identity { peer: addr.to_owned(), reason: error.to_string() })?;
        let connector = TlsConnector::from(credentials.client.clone());
        let buffered = BufReader::with_capacity(SOCKET_READ_BYTES, stream);
        let mut stream = connector.connect(name, buffered).await.map_err(|error| tls_error(addr, &error))?;
        stream.get_mut().1.set_buffer_limit(Some(tls::TLS_BUFFER_BYTES));
        let mut stream = TlsStream::from(stream);
        let (peer, watched) = authenticated(&stream, addr, credentials)?;
        if peer.role != expected {
            let reason = format!("it is a {}, expected a {expected}", peer.role);
            return Err(WireError::Identity { peer: addr.to_owned(), reason });
        }
        write_handshake(&mut stream, purpose, addr).await?;
        let answer = read_handshake(&mut stream, addr).await?;
        // One that does not know the purpose answers, to be understood, with one that it knows.
        if answer.purpose != purpose {
            let source = crate::HandshakeError::Declined(purpose.verb());
            return Err(WireError::Handshake { peer: addr.to_owned(), source });
        }
        let version = answer.version();
        Ok(Connection { peer, address: addr.to_owned(), purpose, version, watched, stream })
    };
    match timeout(HANDSHAKE_TIME_MAX, shake).await {
        Ok(result) => result,
        Err(_) => {
            Err(WireError::TimedOut { what: "shake hands", peer: addr.to_owned(), after: HANDSHAKE_TIME_MAX })
        }
    }
}

/// Tries each address of the name in turn.
async fn connect_tcp(addr: &str) -> Result<TcpStream, WireError> {
    let error = |source| WireError::Connect { addr: addr.to_owned(), source: Arc::new(source) };
    let mut last = io::Error::other("the name has no address");
    for address in lookup_host(addr).await.map_err(error)? {
        let attempt = async { new_socket(address)?.connect(address).await };
        match timeout(CONNECT_TIME_MAX, attempt).await {
            Ok(Ok(stream)) => return Ok(stream),
            Ok(Err(source)) => last = source,
            Err(_) => last = io::Error::new(io::ErrorKind::TimedOut, "no answer"),
        }
    }
    Err(error(last))
}

/// A listening socket hands these options down to the connections it accepts.
fn new_socket(address: SocketAddr) -> io::Result<TcpSocket> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    socket.set_nodelay(true)?;
    socket.set_keepalive(true)?;
    Ok(socket)
}

fn authenticated(
    stream: &Stream,
    peer: &str,
    credentials: &Credentials,
) -> Result<(Identity, Watched), WireError> {
    let certificate = tls::peer_certificate(stream.get_ref().1)
        .map_err(|reason| WireError::Tls { peer: peer.to_owned(), reason })?;
    let wrong = |reason: String| WireError::Identity { peer: peer.to_owned(), reason };
    let identity = identity_of(&certificate).map_err(wrong)?;
    let watched =
        Watched { serial: serial_of(&certificate).map_err(wrong)?, revocations: credentials.revocations() };
    match watched.revoked(&identity) {
        None => Ok((identity, watched)),
        Some(reason) => Err(wrong(reason)),
    }
}

/// A peer's certificate, which may be revoked while the connection lasts.
#[derive(Clone, Debug)]
struct Watched {
    serial: Serial,
    revocations: Arc<Revocations>,
}

impl Watched {
    fn revoked(&self, peer: &Identity) -> Option<String> {
        let reason = || {
            let serial = self.serial.as_str();
            format!("the certificate {serial} of {peer} was revoked; enrol it again to let it in")
        };
        self.revocations.contains(&self.serial).then(reason)
    }

    /// Ends the connection when the certificate is revoked.
    async fn watch(self, peer: Identity, link: std::sync::Weak<Shared>) {
        loop {
            sleep(REVOCATION_LOOK_EVERY).await;
            let Some(link) = link.upgrade() else { return };
            if let Some(reason) = self.revoked(&peer) {
                link.refuse(RefusalCode::Unauthorised, false, &reason);
                return;
            }
        }
    }
}

async fn write_handshake(stream: &mut Stream, purpose: Purpose, peer: &str) -> Result<(), WireError> {
    let write = async {
        stream.write_all(&Handshake::new(purpose).encode()).await?;
        stream.flush().await
    };
    write.await.map_err(|error| tls_error(peer, &error))
}

async fn read_handshake(stream: &mut Stream, peer: &str) -> Result<Handshake, WireError> {
    let mut bytes = [0; HANDSHAKE_BYTES];
    // In TLS 1.3 a client learns only here that its certificate was not accepted.
    stream.read_exact(&mut bytes).await.map_err(|error| tls_error(peer, &error))?;
    Handshake::decode(&bytes).map_err(|source| WireError::Handshake { peer: peer.to_owned(), source })
}

/// What TLS says is one thing, what the network says another.
fn tls_error(peer: &str, error: &io::Error) -> WireError {
    match error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
        Some(tls) => WireError::Tls { peer: peer.to_owned(), reason: tls.to_string() },
        None => WireError::lost(peer, io::Error::new(error.kind(), error.to_string())),
    }
}

/// A peer that has proven who it is. Nothing has been said yet.
#[derive(Debug)]
pub struct Connection {
    peer: Identity,
    address: String,
    purpose: Purpose,
    version: u16,
    watched: Watched,
    stream: Stream,
}

impl Connection {
    /// Who it is.
    pub fn peer(&self) -> &Identity {
        &self.peer
    }

    /// Where it is.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// What the connecting side wants.
    pub fn purpose(&self) -> Purpose {
        self.purpose
    }

    /// The protocol version that both speak.
    pub fn version(&self) -> u16 {
        self.version
    }

    /// The cipher that TLS chose, for logs.
    pub fn cipher(&self) -> String {
        let suite = self.stream.get_ref().1.negotiated_cipher_suite();
        suite.map_or_else(String::new, |suite| format!("{:?}", suite.suite()))
    }

    pub(crate) fn start(self, timing: Timing) -> (Identity, Link) {
        let label = format!("{} at {}", self.peer, self.address);
        let link = Link::start(self.stream, label, timing);
        tokio::spawn(self.watched.watch(self.peer.clone(), Arc::downgrade(&link.shared)));
        (self.peer, link)
    }
}

#[cfg(test)]
mod tests {
    use block::UnixNanos;

    use super::*;
    use crate::Authority;
    use crate::credentials::CredentialsError;

    const DAY: Duration = Duration::from_secs(24 * 60 * 60);

    /// Credentials that are valid for some days before and after now (negative: not valid now).
    fn issue(
        authority: &Authority,
        dir: &std::path::Path,
        role: Role,
        from: i32,
        until: i32,
    ) -> std::path::PathBuf {
        let now = Duration::from_nanos(UnixNanos::now().0);
        let at = |days: i32| if days < 0 { now - DAY * days.unsigned_abs() } else { now + DAY * days as u32 };
        let dir = dir.join(format!("{role}{from}{until}"));
        let group = (role == Role::Agent).then_some(block::GroupId([1; 16]));
        let identity = Identity::new(role, "x", group).unwrap();
        authority.issue_between(&identity, &dir, at(from), at(until)).unwrap();
        dir
    }

    #[tokio::test]
    async fn expired_and_future_certificates_are_refused_by_the_other_side_too() {
        let base = tempfile::tempdir().unwrap();
        let authority = Authority::create(&base.path().join("ca")).unwrap();
        let make = |role, from, until| issue(&authority, base.path(), role, from, until);
        for (from, until) in [(-9, -1), (1, 9)] {
            let (server, agent) = (make(Role::TargetServer, from, until), make(Role::Agent, from, until));
            for dir in [&server, &agent] {
                let error = Credentials::load(dir).unwrap_err();
                assert!(matches!(error, CredentialsError::Expired { .. }), "{error}");
            }
            let good =
                |role| Credentials::load_expired(&make(role, -1 - from.abs(), 100 + until.abs())).unwrap();
            let bad = |dir| Credentials::load_expired(dir).unwrap();
            for (server, agent) in
                [(bad(&server), good(Role::Agent)), (good(Role::TargetServer), bad(&agent))]
            {
                let listener = Listener::bind("127.0.0.1:0", Arc::new(server)).await.unwrap();
                let addr = listener.local_addr().to_string();
                let accept = async { listener.accept().await.unwrap().handshake().await };
                let (client, server) = tokio::join!(connect(&addr, Role::TargetServer, &agent), accept);
                for error in [client.unwrap_err(), server.unwrap_err()] {
                    assert!(matches!(error, WireError::Tls { .. }), "{error}");
                }
            }
        }
    }

    /// As a peer of before a purpose existed: it reads no offer that it knows, answers with one that it knows, and ends.
    #[tokio::test]
    async fn a_purpose_that_an_older_peer_does_not_know_is_named() {
        let base = tempfile::tempdir().unwrap();
        let authority = Authority::create(&base.path().join("ca")).unwrap();
        let load = |role| Credentials::load(&issue(&authority, base.path(), role, -1, 1)).unwrap();
        let (server, agent) = (load(Role::ProcessServer), load(Role::Agent));
        let listener = Listener::bind("127.0.0.1:0", Arc::new(server)).await.unwrap();
        let addr = listener.local_addr().to_string();
        let older = async {
            let pending = listener.accept().await.unwrap();
            let stream = BufReader::with_capacity(SOCKET_READ_BYTES, pending.stream);
            let accepted =
                TlsAcceptor::from(pending.credentials.server.clone()).accept(stream).await.unwrap();
            let mut stream = TlsStream::from(accepted);
            assert_eq!(read_handshake(&mut stream, "agent").await.unwrap().purpose, Purpose::Measure);
            write_handshake(&mut stream, Purpose::Deliver, "agent").await.unwrap();
        };
        let connect = connect_for(Purpose::Measure, &addr, Role::ProcessServer, &agent);
        let (connection, ()) = tokio::join!(connect, older);
        let error = connection.unwrap_err();
        assert_eq!(error.to_string(), format!("shake hands with {addr}: it cannot measure; upgrade it"));
    }

    /// One that connects and says nothing, and one that authenticates and says nothing, are both dropped in time.
    #[tokio::test]
    async fn nobody_is_waited_for_longer_than_the_limit() {
        let base = tempfile::tempdir().unwrap();
        let authority = Authority::create(&base.path().join("ca")).unwrap();
        let load = |role| Credentials::load(&issue(&authority, base.path(), role, -1, 1)).unwrap();
        let (server, agent) = (load(Role::TargetServer), load(Role::Agent));
        let listener = Listener::bind("127.0.0.1:0", Arc::new(server)).await.unwrap();
        let addr = listener.local_addr();
        let limit = Duration::from_millis(100);
        let _mute = TcpStream::connect(addr).await.unwrap();
        let error = listener.accept().await.unwrap().handshake_within(limit).await.unwrap_err();
        assert!(matches!(error, WireError::TimedOut { .. }), "{error}");

        let stream = TcpStream::connect(addr).await.unwrap();
        let name = ServerName::try_from(Role::TargetServer.dns_name()).unwrap();
        let connector = TlsConnector::from(agent.client.clone());
        let (client, server) = tokio::join!(connector.connect(name, stream), async {
            listener.accept().await.unwrap().handshake_within(limit).await
        });
        client.unwrap();
        let error = server.unwrap_err();
        assert!(matches!(error, WireError::TimedOut { .. }), "{error}");
        assert!(error.is_retryable());
    }
}
