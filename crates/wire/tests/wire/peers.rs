//! Who is let in, and who gets nothing.

use std::sync::Arc;

use block::{ByteCount, Generation, GroupId};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use wire::{
    ALPN, Authority, Credentials, CredentialsError, Held, Identity, Opening, REVOKED_FILE, RefusalCode, Role,
    Sender, ServerNames, WireError, connect, connect_for, new_request, revoked_text,
};

use super::{GROUP, Site, accept, open};

#[tokio::test]
async fn both_sides_know_each_other() {
    let site = Site::new();
    let (listener, addr) = site.server().await;
    let agent = site.agent();
    let (client, server) = tokio::join!(connect(&addr, Role::TargetServer, &agent), accept(&listener));
    let (client, server) = (client.unwrap(), server.unwrap());
    assert_eq!(client.peer().to_uri(), "seawall://target-server/target");
    assert_eq!(server.peer(), agent.identity());
    assert_eq!(server.peer().group, Some(GROUP));
    assert!(client.cipher().starts_with("TLS13_"), "{}", client.cipher());
    assert_eq!(client.version(), 1);
}

/// A connection that lasts ends soon after its certificate was revoked, and another one is refused; an agent with another
/// certificate is let in.
#[tokio::test]
async fn who_is_revoked_is_cut_off_and_stays_out() {
    let site = Site::new();
    let (listener, addr) = site.server().await;
    let agent = site.agent();
    let connecting = async {
        let connection = connect(&addr, Role::TargetServer, &agent).await.unwrap();
        Sender::open(connection, GROUP, Generation(1)).await
    };
    let accepting = async {
        let Opening::Deliver(receiver) = open(&listener).await.unwrap() else { panic!("no delivery") };
        receiver.accept(Held::default(), ByteCount::mib(1));
        receiver
    };
    let (sender, receiver) = tokio::join!(connecting, accepting);
    let (_sender, mut receipts) = sender.unwrap();
    let list = site.dir.path().join("target").join(REVOKED_FILE);
    std::fs::write(&list, revoked_text([agent.serial()])).unwrap();
    let error = loop {
        if let Err(error) = receipts.next().await {
            break error;
        }
    };
    assert!(
        matches!(error, WireError::Refused { code: RefusalCode::Unauthorised, retry: false, .. }),
        "{error}"
    );
    assert!(error.to_string().contains("revoked"), "{error}");
    drop(receiver);
    let (client, server) = tokio::join!(connect(&addr, Role::TargetServer, &agent), accept(&listener));
    let error = server.unwrap_err();
    assert!(matches!(&error, WireError::Identity { reason, .. } if reason.contains("revoked")), "{error}");
    assert!(client.is_err());
    let other = site.issue(Role::Agent, "other", Some(GROUP));
    let (client, server) = tokio::join!(connect(&addr, Role::TargetServer, &other), accept(&listener));
    client.unwrap();
    server.unwrap();
}

/// What an authority signs from elsewhere works, and names only who the authority says.
#[tokio::test]
async fn a_key_made_elsewhere_is_signed() {
    let site = Site::new();
    let (listener, addr) = site.server().await;
    let (key, request) = new_request().unwrap();
    let identity = Identity::new(Role::Agent, "far", Some(GROUP)).unwrap();
    let day = std::time::Duration::from_secs(86_400);
    let signed = site.authority.sign(&request, &identity, &ServerNames::default(), day).unwrap();
    let dir = site.dir.path().join("far");
    std::fs::create_dir(&dir).unwrap();
    std::fs::write(dir.join("cert.pem"), &signed.certificate_pem).unwrap();
    std::fs::write(dir.join("ca.pem"), site.authority.certificate_pem()).unwrap();
    std::fs::write(dir.join("key.pem"), key).unwrap();
    std::fs::set_permissions(dir.join("key.pem"), std::os::unix::fs::PermissionsExt::from_mode(0o600))
        .unwrap();
    let agent = Credentials::load(&dir).unwrap();
    assert_eq!((agent.identity(), agent.serial()), (&identity, &signed.serial));
    let (client, server) = tokio::join!(connect(&addr, Role::TargetServer, &agent), accept(&listener));
    client.unwrap();
    assert_eq!(server.unwrap().peer(), &identity);
    // A request that its key has not signed proves nothing.
    let (_, other) = new_request().unwrap();
    let (head, tail) = (&request[..request.len() / 2], &other[other.len() / 2..]);
    assert!(site.authority.sign(&format!("{head}{tail}"), &identity, &ServerNames::default(), day).is_err());
}

#[tokio::test]
async fn another_authority_is_refused_by_both_sides() {
    let (site, other) = (Site::new(), Site::new());
    let (listener, addr) = site.server().await;
    let stranger = other.agent();
    let (client, server) = tokio::join!(connect(&addr, Role::TargetServer, &stranger), accept(&listener));
    for error in [client.unwrap_err(), server.unwrap_err()] {
        assert!(matches!(error, WireError::Tls { .. }), "{error}");
        assert!(!error.is_retryable());
    }
}

/// The server trusts the client's authority, the client not the server's.
#[tokio::test]
async fn a_client_whose_authority_is_unknown_is_refused_though_it_trusts_the_server() {
    let (site, other) = (Site::new(), Site::new());
    let (listener, addr) = site.server().await;
    let dir = other.issue_files(Role::Agent, "agent", Some(GROUP));
    std::fs::copy(site.dir.path().join("ca/ca.pem"), dir.join("ca.pem")).unwrap();
    let stranger = Credentials::load(&dir).unwrap();
    let (client, server) = tokio::join!(connect(&addr, Role::TargetServer, &stranger), accept(&listener));
    let error = client.unwrap_err();
    assert!(matches!(error, WireError::Tls { .. }), "{error}");
    assert!(server.is_err());
}

#[tokio::test]
async fn the_wrong_role_is_refused() {
    let site = Site::new();
    let (listener, addr) = site.server().await;
    let agent = site.agent();
    let (client, server) = tokio::join!(connect(&addr, Role::ProcessServer, &agent), accept(&listener));
    let error = client.unwrap_err();
    assert!(matches!(error, WireError::Tls { .. } | WireError::Identity { .. }), "{error}");
    assert!(server.is_err());
}

/// An agent's certificate is not one of a server: nobody can pose as a target with it.
#[tokio::test]
async fn an_agent_cannot_pose_as_a_server() {
    let site = Site::new();
    let agent = site.agent();
    let listener = wire::Listener::bind("127.0.0.1:0", agent.clone()).await.unwrap();
    let addr = listener.local_addr().to_string();
    for role in Role::ALL {
        let (client, server) = tokio::join!(connect(&addr, role, &agent), accept(&listener));
        assert!(client.is_err() && server.is_err(), "{role}");
    }
}

#[tokio::test]
async fn the_wrong_group_is_refused_by_name() {
    let site = Site::new();
    let (listener, addr) = site.server().await;
    let other = GroupId([8; 16]);
    let agent = site.agent();
    let delivery = async {
        let connection = connect(&addr, Role::TargetServer, &agent).await?;
        Sender::open(connection, other, Generation(1)).await
    };
    let (client, server) = tokio::join!(delivery, open(&listener));
    for error in [client.unwrap_err(), server.unwrap_err()] {
        assert_eq!(error.refusal(), Some(RefusalCode::WrongGroup));
        assert!(error.to_string().contains(&other.to_string()), "{error}");
        assert!(error.to_string().contains(&GROUP.to_string()), "{error}");
        assert!(!error.is_retryable());
    }
}

#[tokio::test]
async fn an_agent_whose_certificate_names_no_group_delivers_nothing_and_a_process_server_anything() {
    let site = Site::new();
    let (listener, addr) = site.server().await;
    for (role, name, accepted) in [(Role::Agent, "a", false), (Role::ProcessServer, "p", true)] {
        let credentials = site.issue(role, name, None);
        let delivery = async {
            let connection = connect(&addr, Role::TargetServer, &credentials).await?;
            Sender::open(connection, GROUP, Generation(1)).await
        };
        let server = async {
            match open(&listener).await? {
                Opening::Deliver(receiver) => {
                    receiver.accept(wire::Held::default(), block::ByteCount(1));
                    Ok(receiver)
                }
                _ => panic!("nobody asked"),
            }
        };
        let (client, server) = tokio::join!(delivery, server);
        assert_eq!(client.is_ok(), accepted);
        assert_eq!(server.map_err(|error: WireError| error.refusal()).err().flatten().is_none(), accepted);
    }
}

#[tokio::test]
async fn roles_do_only_what_is_theirs() {
    let site = Site::new();
    let (listener, addr) = site.server().await;
    let (agent, operator) = (site.agent(), site.operator());
    let (asked, opened) =
        tokio::join!(wire::Operator::call(&addr, Role::TargetServer, &agent, "{}"), open(&listener));
    assert_eq!(asked.unwrap_err().refusal(), Some(RefusalCode::Unauthorised));
    assert_eq!(opened.unwrap_err().refusal(), Some(RefusalCode::Unauthorised));
    let delivery = async {
        let connection = connect(&addr, Role::TargetServer, &operator).await?;
        Sender::open(connection, GROUP, Generation(1)).await
    };
    let (delivered, opened) = tokio::join!(delivery, open(&listener));
    assert_eq!(delivered.unwrap_err().refusal(), Some(RefusalCode::Unauthorised));
    assert_eq!(opened.unwrap_err().refusal(), Some(RefusalCode::Unauthorised));
}

/// A TLS client of its own, so that it can do what ours never does.
fn bare_client(site: &Site, proven: bool, alpn: &[u8]) -> TlsConnector {
    let dir = site.issue_files(Role::Agent, "bare", Some(GROUP));
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(dir.join("ca.pem")).unwrap()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots);
    let mut config = if proven {
        let chain = vec![CertificateDer::from_pem_file(dir.join("cert.pem")).unwrap()];
        config
            .with_client_auth_cert(chain, PrivateKeyDer::from_pem_file(dir.join("key.pem")).unwrap())
            .unwrap()
    } else {
        config.with_no_client_auth()
    };
    config.alpn_protocols = [alpn.to_vec()].into_iter().filter(|name| !name.is_empty()).collect();
    TlsConnector::from(Arc::new(config))
}

fn server_name() -> ServerName<'static> {
    ServerName::try_from("target-server.seawall.invalid").unwrap()
}

/// Everything that the application protocol gave a client that sends `first`.
async fn given(connector: TlsConnector, addr: &str, first: Vec<u8>) -> Vec<u8> {
    let mut bytes = Vec::new();
    let stream = TcpStream::connect(addr).await.unwrap();
    if let Ok(mut stream) = connector.connect(server_name(), stream).await {
        let _ = stream.write_all(&first).await;
        let _ = stream.flush().await;
        let _ = stream.read_to_end(&mut bytes).await;
    }
    bytes
}

fn good_handshake() -> Vec<u8> {
    let mut bytes = b"SEAWIRE\n\x01\x00\x01\x00\x01\x00".to_vec();
    bytes.resize(28, 0);
    bytes.extend(crc32c::crc32c(&bytes).to_le_bytes());
    bytes
}

#[tokio::test]
async fn a_peer_without_a_certificate_gets_not_one_byte() {
    let site = Site::new();
    let (listener, addr) = site.server().await;
    let client = given(bare_client(&site, false, ALPN), &addr, good_handshake());
    let (bytes, server) = tokio::join!(client, accept(&listener));
    assert_eq!(bytes, b"");
    let error = server.unwrap_err();
    assert!(matches!(error, WireError::Tls { .. }), "{error}");
}

#[tokio::test]
async fn another_application_protocol_or_none_gets_not_one_byte() {
    for alpn in [&b"h2"[..], b""] {
        let site = Site::new();
        let (listener, addr) = site.server().await;
        let client = given(bare_client(&site, true, alpn), &addr, good_handshake());
        let (bytes, server) = tokio::join!(client, accept(&listener));
        assert_eq!(bytes, b"");
        assert!(matches!(server.unwrap_err(), WireError::Tls { .. }));
    }
}

/// The bare client can talk when it does as it should; otherwise the tests around this one would prove nothing.
#[tokio::test]
async fn the_bare_client_is_answered_when_it_behaves() {
    let site = Site::new();
    let (listener, addr) = site.server().await;
    let client = given(bare_client(&site, true, ALPN), &addr, good_handshake());
    let server = async { accept(&listener).await.map(drop) };
    let (bytes, server) = tokio::join!(client, server);
    server.unwrap();
    assert_eq!(bytes, good_handshake());
}

#[tokio::test]
async fn garbage_after_tls_is_refused() {
    let site = Site::new();
    let (listener, addr) = site.server().await;
    let client = given(bare_client(&site, true, ALPN), &addr, vec![0x55; 64]);
    let (bytes, server) = tokio::join!(client, accept(&listener));
    assert_eq!(bytes, b"");
    let error = server.unwrap_err();
    assert!(error.to_string().contains("not Seawall's"), "{error}");
    assert!(!error.is_retryable());
}

#[tokio::test]
async fn a_version_of_the_future_is_told_ours() {
    let site = Site::new();
    let (listener, addr) = site.server().await;
    let mut alien = good_handshake();
    alien[8..12].copy_from_slice(&[7, 0, 9, 0]);
    let checksum = crc32c::crc32c(&alien[..28]).to_le_bytes();
    alien[28..].copy_from_slice(&checksum);
    let client = given(bare_client(&site, true, ALPN), &addr, alien);
    let (bytes, server) = tokio::join!(client, accept(&listener));
    assert_eq!(bytes, good_handshake());
    let error = server.unwrap_err();
    assert!(error.to_string().contains("versions 7 to 9, this side 1 to 1"), "{error}");
}

#[tokio::test]
async fn garbage_instead_of_tls_is_refused() {
    let site = Site::new();
    let (listener, addr) = site.server().await;
    let client = async {
        let mut stream = TcpStream::connect(&addr).await.unwrap();
        stream.write_all(b"GET / HTTP/1.1\r\nHost: seawall\r\n\r\n").await.unwrap();
        let mut bytes = Vec::new();
        let _ = stream.read_to_end(&mut bytes).await;
        bytes
    };
    let (bytes, server) = tokio::join!(client, accept(&listener));
    // A TLS alert is all it gets.
    assert!(bytes.is_empty() || bytes[0] == 21, "{bytes:?}");
    assert!(server.is_err());
}

/// A peer that connects and says nothing holds one of a bounded number of places, for a bounded time; others that
/// behave are served meanwhile.
#[tokio::test]
async fn the_silent_do_not_keep_out_the_others() {
    let site = Site::new();
    let (listener, addr) = site.server().await;
    let mut silent = Vec::new();
    for _ in 0..wire::HANDSHAKES_PENDING_MAX - 1 {
        let stream = TcpStream::connect(&addr).await.unwrap();
        silent.push((stream, listener.accept().await.unwrap()));
    }
    let agent = site.agent();
    let (client, server) = tokio::join!(connect(&addr, Role::TargetServer, &agent), accept(&listener));
    assert!(client.is_ok() && server.is_ok());

    // With the last place taken, the next one waits until a place is free.
    let _last = (TcpStream::connect(&addr).await.unwrap(), listener.accept().await.unwrap());
    let _queued = TcpStream::connect(&addr).await.unwrap();
    let mut accepting = std::pin::pin!(listener.accept());
    for _ in 0..100 {
        tokio::select! {
            biased;
            _ = &mut accepting => panic!("more than the limit are pending"),
            () = tokio::task::yield_now() => {}
        }
    }
    silent.pop();
    accepting.await.unwrap();
}

#[tokio::test]
async fn nobody_there_is_told_as_such() {
    let site = Site::new();
    let (listener, addr) = site.server().await;
    drop(listener);
    let error = connect(&addr, Role::TargetServer, &site.agent()).await.unwrap_err();
    assert!(matches!(error, WireError::Connect { .. }), "{error}");
    assert!(error.is_retryable());
    assert!(error.to_string().contains(&addr), "{error}");
    let purpose = wire::Purpose::Operate;
    assert!(connect_for(purpose, "127.0.0.1", Role::TargetServer, &site.operator()).await.is_err());
}

#[test]
fn credentials_are_never_overwritten_and_keys_never_shared() {
    use std::os::unix::fs::PermissionsExt;
    let site = Site::new();
    assert!(Authority::create(&site.dir.path().join("ca")).is_err());
    let dir = site.issue_files(Role::Operator, "operator", None);
    let before = std::fs::read(dir.join("key.pem")).unwrap();
    let identity = wire::Identity::new(Role::Operator, "operator", None).unwrap();
    let error = site.authority.issue(&identity, &dir).unwrap_err();
    assert!(error.to_string().contains("key.pem"), "{error}");
    assert_eq!(std::fs::read(dir.join("key.pem")).unwrap(), before);
    for key in [dir.join("key.pem"), site.dir.path().join("ca/key.pem")] {
        assert_eq!(std::fs::metadata(&key).unwrap().permissions().mode() & 0o777, 0o600);
    }
    std::fs::set_permissions(dir.join("key.pem"), std::fs::Permissions::from_mode(0o640)).unwrap();
    let error = Credentials::load(&dir).unwrap_err();
    assert!(matches!(error, CredentialsError::Exposed { mode: 0o640, .. }), "{error}");
}

#[tokio::test]
async fn an_authority_that_was_loaded_again_issues_what_its_peers_accept() {
    let site = Site::new();
    let (listener, addr) = site.server().await;
    let again = Authority::load(&site.dir.path().join("ca")).unwrap();
    let dir = site.dir.path().join("late");
    again.issue(&wire::Identity::new(Role::Agent, "late", Some(GROUP)).unwrap(), &dir).unwrap();
    let late = Credentials::load(&dir).unwrap();
    let (client, server) = tokio::join!(connect(&addr, Role::TargetServer, &late), accept(&listener));
    assert!(client.is_ok());
    assert_eq!(server.unwrap().peer().name, "late");
}
