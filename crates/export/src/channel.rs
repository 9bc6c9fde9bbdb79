//! What carries bytes to and from a client: a socket, with or without TLS. One thread receives, any number send.

use std::io::{self, Read, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Instant;

use parking_lot::Mutex;
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, Shutdown};
use rustls::ServerConnection;
use rustls::pki_types::CertificateDer;

/// How much sealed data is taken from a socket at once.
const SEALED_BYTES: usize = 128 * 1024;

/// Decides whether who proved to be the owner of a certificate may come in; a name for logs, or why not.
pub type Admit = dyn Fn(&CertificateDer<'_>) -> Result<String, String> + Send + Sync;

/// What is shown to a client that comes now.
pub type Shown = dyn Fn() -> Arc<rustls::ServerConfig> + Send + Sync;

/// The server's side of TLS.
#[derive(Clone)]
pub struct TlsSide {
    /// Asks for client certificates and verifies them. Asked anew for each client, since an export may outlive a certificate.
    pub config: Arc<Shown>,
    /// Asked when the certificate was verified.
    pub admit: Arc<Admit>,
}

impl std::fmt::Debug for TlsSide {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("TlsSide")
    }
}

/// A way to a client. Only one thread receives.
pub(crate) trait Channel: Send + Sync {
    /// Waits for bytes; 0 at the end.
    fn receive(&self, buffer: &mut [u8]) -> io::Result<usize>;
    /// Sends all of `bytes`, not mixed with what others send.
    fn send(&self, bytes: &[u8]) -> io::Result<()>;
    /// Goes on with TLS.
    fn start_tls(self: Arc<Self>, side: &TlsSide) -> io::Result<Arc<dyn Channel>>;
    /// The peer has said what it wants: from here on it may take its time.
    fn settle(&self) {}
    /// Ends both directions; whoever waits is woken.
    fn shut_down(&self);
}

/// A connected socket.
#[derive(Debug)]
pub(crate) struct Socket {
    fd: Arc<OwnedFd>,
    sending: Mutex<()>,
    /// Until when the peer must be settled; who says a byte now and then must not keep others out for ever.
    deadline: Instant,
    settled: AtomicBool,
}

impl Socket {
    pub(crate) fn new(fd: Arc<OwnedFd>, deadline: Instant) -> Socket {
        Socket { fd, sending: Mutex::new(()), deadline, settled: AtomicBool::new(false) }
    }

    fn receive_in_time(&self, buffer: &mut [u8]) -> io::Result<usize> {
        if !self.settled.load(Relaxed) && Instant::now() > self.deadline {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "it took too long to say what it wants"));
        }
        receive(&self.fd, buffer)
    }
}

fn receive(fd: &OwnedFd, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        match rustix::net::recv(fd, &mut *buffer, RecvFlags::empty()) {
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
            Ok((count, _)) => return Ok(count),
        }
    }
}

fn send(fd: &OwnedFd, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match rustix::net::send(fd, bytes, SendFlags::NOSIGNAL) {
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
            Ok(count) => bytes = &bytes[count..],
        }
    }
    Ok(())
}

impl Channel for Socket {
    fn receive(&self, buffer: &mut [u8]) -> io::Result<usize> {
        self.receive_in_time(buffer)
    }

    fn settle(&self) {
        self.settled.store(true, Relaxed);
    }

    fn send(&self, bytes: &[u8]) -> io::Result<()> {
        let _turn = self.sending.lock();
        send(&self.fd, bytes)
    }

    fn start_tls(self: Arc<Self>, side: &TlsSide) -> io::Result<Arc<dyn Channel>> {
        let mut connection = ServerConnection::new((side.config)()).map_err(io::Error::other)?;
        let mut raw = Shaking(&self);
        while connection.is_handshaking() {
            if let Err(error) = connection.complete_io(&mut raw) {
                // What is wrong is told to the client before the connection ends.
                let _ = connection.write_tls(&mut raw);
                return Err(error);
            }
        }
        let certificate = connection.peer_certificates().and_then(|chain| chain.first());
        let certificate = certificate.ok_or_else(|| io::Error::other("the client showed no certificate"))?;
        let name = (side.admit)(certificate).map_err(io::Error::other)?;
        tracing::debug!(client = name, "TLS established");
        let arrived = Arrived { bytes: vec![0; SEALED_BYTES].into(), start: 0, end: 0 };
        Ok(Arc::new(Tls { fd: self.fd.clone(), tls: Mutex::new(connection), arrived: Mutex::new(arrived) }))
    }

    fn shut_down(&self) {
        // It may have ended already.
        let _ = rustix::net::shutdown(&self.fd, Shutdown::Both);
    }
}

/// A socket during TLS's handshake.
struct Shaking<'a>(&'a Socket);

impl Read for Shaking<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.receive_in_time(buffer)
    }
}

impl Write for Shaking<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Raw(&self.0.fd).write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Where TLS writes to.
struct Raw<'a>(&'a OwnedFd);

impl Write for Raw<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        send(self.0, bytes).map(|()| bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// TLS over a socket. The socket is waited for without TLS's lock, so that sending goes on meanwhile.
struct Tls {
    fd: Arc<OwnedFd>,
    tls: Mutex<ServerConnection>,
    /// The receiving thread's.
    arrived: Mutex<Arrived>,
}

/// What has come from the socket and has not been opened.
struct Arrived {
    bytes: Box<[u8]>,
    start: usize,
    end: usize,
}

impl Channel for Tls {
    fn receive(&self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut arrived = self.arrived.lock();
        let Arrived { bytes, start, end } = &mut *arrived;
        loop {
            match self.tls.lock().reader().read(buffer) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                other => return other,
            }
            if start == end {
                (*start, *end) = (0, receive(&self.fd, bytes)?);
            }
            let mut tls = self.tls.lock();
            // At the end of the connection it is told so, by reading nothing.
            *start += tls.read_tls(&mut &bytes[*start..*end])?;
            let processed = tls.process_new_packets();
            while tls.wants_write() {
                tls.write_tls(&mut Raw(&self.fd))?;
            }
            processed.map_err(io::Error::other)?;
        }
    }

    fn send(&self, bytes: &[u8]) -> io::Result<()> {
        let mut tls = self.tls.lock();
        // Sealed and sent in parts, so that what is held back stays small.
        let mut left = bytes;
        while !left.is_empty() {
            let count = tls.writer().write(&left[..left.len().min(SEALED_BYTES / 2)])?;
            left = &left[count..];
            while tls.wants_write() {
                tls.write_tls(&mut Raw(&self.fd))?;
            }
        }
        Ok(())
    }

    fn start_tls(self: Arc<Self>, _: &TlsSide) -> io::Result<Arc<dyn Channel>> {
        Err(io::Error::other("TLS is on already"))
    }

    fn shut_down(&self) {
        // It may have ended already.
        let _ = rustix::net::shutdown(&self.fd, Shutdown::Both);
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;
    use std::time::Duration;

    use super::*;

    #[test]
    fn who_does_not_settle_in_time_is_left() {
        let (mut client, server) = UnixStream::pair().unwrap();
        client.write_all(b"ab").unwrap();
        let past = Instant::now() - Duration::from_millis(1);
        let socket = Socket::new(Arc::new(server.into()), past);
        let mut byte = [0];
        assert_eq!(socket.receive(&mut byte).unwrap_err().kind(), io::ErrorKind::TimedOut);
        socket.settle();
        assert_eq!((socket.receive(&mut byte).unwrap(), byte), (1, *b"a"));
    }
}
