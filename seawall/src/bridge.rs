//! A socket on this machine that leads to an export on the target server's, through TLS.
//!
//! Clients need no certificates and know nothing of it: what they say in the open goes on after STARTTLS, which the
//! bridge says for them. The socket lies in a directory that only this user can enter.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UnixListener, UnixStream};
use tokio::task::JoinHandle;
use tokio_rustls::TlsConnector;
use wire::{Credentials, Role};

/// What is on its way in one direction of one connection. More waits.
const BUFFER_BYTES: usize = 512 * 1024;
/// The greeting of an NBD server: two magic numbers and its flags.
const GREETING_BYTES: usize = 18;
/// The answer to an option without data: magic, option, kind, length.
const ANSWER_BYTES: usize = 20;
/// IHAVEOPT, STARTTLS, no data.
const START_TLS: [u8; 16] = [0x49, 0x48, 0x41, 0x56, 0x45, 0x4f, 0x50, 0x54, 0, 0, 0, 5, 0, 0, 0, 0];
/// What the answer says after the option: ACK, no data.
const ACK: [u8; 8] = [0, 0, 0, 1, 0, 0, 0, 0];

/// Ends with all of its connections when dropped.
#[derive(Debug)]
pub(crate) struct Bridge {
    socket: PathBuf,
    accepting: JoinHandle<()>,
    _dir: Option<tempfile::TempDir>,
}

impl Bridge {
    /// Listens at `socket`, or at a place of its own, for clients of the server at `addr` (host:port).
    pub(crate) fn start(
        addr: String,
        credentials: &Credentials,
        socket: Option<&Path>,
    ) -> anyhow::Result<Bridge> {
        let (dir, socket) = match socket {
            Some(socket) => (None, socket.to_owned()),
            None => {
                let dir = tempfile::Builder::new().prefix("seawall-").tempdir();
                let dir = dir.context("make a directory for a socket")?;
                let socket = dir.path().join("nbd.sock");
                (Some(dir), socket)
            }
        };
        let listener = UnixListener::bind(&socket)
            .with_context(|| format!("listen on {}: it must not exist yet", socket.display()))?;
        std::fs::set_permissions(&socket, std::os::unix::fs::PermissionsExt::from_mode(0o600))
            .with_context(|| format!("restrict {}", socket.display()))?;
        let (config, name) = wire::foreign_client(credentials, Role::TargetServer);
        let connector = TlsConnector::from(config);
        let accept = async move {
            let mut clients = tokio::task::JoinSet::new();
            let addr = Arc::new(addr);
            loop {
                tokio::select! {
                    client = listener.accept() => match client {
                        Ok((client, _)) => {
                            let (addr, connector, name) = (addr.clone(), connector.clone(), name.clone());
                            clients.spawn(async move {
                                if let Err(error) = lead(client, &addr, &connector, name).await {
                                    tracing::warn!(%addr, %error, "lead a client to the target server's export");
                                }
                            });
                        }
                        Err(error) => {
                            tracing::error!(%error, "accept a client of an export");
                            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                        }
                    },
                    Some(_) = clients.join_next() => {}
                }
            }
        };
        Ok(Bridge { socket, accepting: tokio::spawn(accept), _dir: dir })
    }

    pub(crate) fn socket(&self) -> &Path {
        &self.socket
    }
}

impl Drop for Bridge {
    fn drop(&mut self) {
        self.accepting.abort();
        // One that the user named; the other goes with its directory.
        let _ = std::fs::remove_file(&self.socket);
    }
}

/// Serves one client until either side ends.
async fn lead(
    mut client: UnixStream,
    addr: &str,
    connector: &TlsConnector,
    name: rustls_pki_types::ServerName<'static>,
) -> io::Result<()> {
    let mut server = TcpStream::connect(addr).await?;
    server.set_nodelay(true)?;
    let mut greeting = [0; GREETING_BYTES];
    server.read_exact(&mut greeting).await?;
    client.write_all(&greeting).await?;
    let mut flags = [0; 4];
    client.read_exact(&mut flags).await?;
    server.write_all(&flags).await?;
    server.write_all(&START_TLS).await?;
    let mut answer = [0; ANSWER_BYTES];
    server.read_exact(&mut answer).await?;
    if answer[12..] != ACK {
        return Err(io::Error::other("the export offers no TLS"));
    }
    let mut server = connector.connect(name, server).await?;
    server.get_mut().1.set_buffer_limit(Some(BUFFER_BYTES));
    match tokio::io::copy_bidirectional_with_sizes(&mut client, &mut server, BUFFER_BYTES, BUFFER_BYTES).await
    {
        // NBD's clients do not say goodbye to TLS.
        Err(error) if error.kind() != io::ErrorKind::UnexpectedEof => Err(error),
        _ => Ok(()),
    }
}
