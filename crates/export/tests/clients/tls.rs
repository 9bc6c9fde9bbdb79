//! TLS: who has a certificate of the authority and is let in, and nobody else.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

use export::{Export, Place, Security, TlsSide};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustls::pki_types::PrivateKeyDer;
use rustls::server::WebPkiClientVerifier;

use crate::support::{At, Lab, attempt, installed, run, start, text};

struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    fn new() -> Authority {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.distinguished_name.push(rcgen::DnType::CommonName, "authority of the test");
        Authority(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    fn issue(&self, name: &str) -> (rcgen::Certificate, KeyPair) {
        let mut params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        let key = KeyPair::generate().unwrap();
        (params.signed_by(&key, &self.0).unwrap(), key)
    }

    /// The directory of a client, as libnbd and QEMU want it.
    fn client(&self, dir: &Path, name: &str, trusted: &Authority) {
        let (certificate, key) = self.issue(name);
        std::fs::create_dir(dir).unwrap();
        std::fs::write(dir.join("ca-cert.pem"), trusted.0.pem()).unwrap();
        std::fs::write(dir.join("client-cert.pem"), certificate.pem()).unwrap();
        std::fs::write(dir.join("client-key.pem"), key.serialize_pem()).unwrap();
    }

    /// A server side that lets clients in whose name begins with "operator".
    fn side(&self) -> TlsSide {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut roots = rustls::RootCertStore::empty();
        roots.add(self.0.der().clone()).unwrap();
        let verifier =
            WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone()).build().unwrap();
        let (certificate, key) = self.issue("localhost");
        let config = rustls::ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_client_cert_verifier(verifier)
            .with_single_cert(
                vec![certificate.der().clone()],
                PrivateKeyDer::Pkcs8(key.serialize_der().into()),
            )
            .unwrap();
        let admit = |certificate: &rustls::pki_types::CertificateDer<'_>| match certificate
            .windows(8)
            .any(|window| window == b"operator")
        {
            true => Ok("operator".to_owned()),
            false => Err("no operator".to_owned()),
        };
        let config = Arc::new(config);
        TlsSide { config: Arc::new(move || config.clone()), admit: Arc::new(admit) }
    }
}

fn address(export: &Export) -> SocketAddr {
    match export.place() {
        Place::Tcp(address) => *address,
        other => panic!("{other:?}"),
    }
}

#[test]
fn only_admitted_clients_get_in() {
    if !installed("only_admitted_clients_get_in", &["nbdinfo", "nbdcopy", "qemu-img", "fio"]) {
        return;
    }
    let lab = Lab::new();
    let (authority, other) = (Authority::new(), Authority::new());
    let any: SocketAddr = "127.0.0.1:0".parse().unwrap();
    let overlay = lab.overlay(At::Newest, block::ByteCount::mib(256));
    let export = start(overlay, Place::Tcp(any), Security::Required(authority.side()));
    let port = address(&export).port();
    let dir = |name: &str| lab.path(name);
    authority.client(&dir("good"), "operator-1", &authority);
    authority.client(&dir("agent"), "agent-1", &authority);
    other.client(&dir("foreign"), "operator-2", &authority);
    let uri =
        |name: &str| format!("nbds://localhost:{port}/sda?tls-certificates={}", lab.path(name).display());

    let copy = lab.path("copy.img");
    run("nbdcopy", &["--connections=2", &uri("good"), text(&copy)]);
    assert!(std::fs::read(&copy).unwrap() == lab.content(At::Newest));
    let info = run("nbdinfo", &["--json", &uri("good")]);
    assert!(info.contains(r#""TLS": true"#) && info.contains("base:allocation"), "{info}");
    let creds = format!("tls-creds-x509,id=tls,dir={},endpoint=client", dir("good").display());
    let target = format!("driver=nbd,host=localhost,port={port},export=sda,tls-creds=tls");
    let image = lab.image(At::Newest);
    run(
        "qemu-img",
        &[
            "compare",
            "--object",
            &creds,
            "--image-opts",
            &target,
            &format!("driver=raw,file.driver=file,file.filename={}", image.display()),
        ],
    );
    // Writes, many at once, through TLS.
    let content = crate::support::noise(crate::support::SIZE as usize, 78);
    let source = lab.path("source.img");
    std::fs::write(&source, &content).unwrap();
    run(
        "nbdcopy",
        &["--connections=4", "--requests=64", "--request-size=65536", text(&source), &uri("good")],
    );
    run("nbdcopy", &["--connections=4", "--requests=64", "--request-size=4096", &uri("good"), text(&copy)]);
    assert!(std::fs::read(&copy).unwrap() == content);

    for name in ["agent", "foreign"] {
        let refused = attempt("nbdinfo", &[&uri(name)]);
        assert!(refused.is_err(), "{name}: {refused:?}");
    }
    let refused = attempt("nbdinfo", &[&format!("nbd://localhost:{port}/sda")]).unwrap_err();
    assert!(refused.contains("replied with error") && !refused.contains("export-size"), "{refused}");
    let listed = attempt("nbdinfo", &["--list", &format!("nbd://localhost:{port}/")]);
    assert!(!listed.unwrap_or_else(|error| error).contains("a disk of the test"));
    // A client that says nothing after the offer does not keep others out.
    assert_eq!(run("nbdinfo", &["--size", &uri("good")]).trim(), crate::support::SIZE.to_string());
}

#[test]
fn tls_may_be_offered_beside_plain() {
    if !installed("tls_may_be_offered_beside_plain", &["nbdinfo"]) {
        return;
    }
    let lab = Lab::new();
    let authority = Authority::new();
    authority.client(&lab.path("good"), "operator-1", &authority);
    let any: SocketAddr = "127.0.0.1:0".parse().unwrap();
    let export = start(lab.view(At::Older), Place::Tcp(any), Security::Offered(authority.side()));
    let port = address(&export).port();
    let plain = run("nbdinfo", &["--json", &format!("nbd://localhost:{port}/sda")]);
    assert!(plain.contains(r#""TLS": false"#), "{plain}");
    let certificates = lab.path("good");
    let uri = format!("nbds://localhost:{port}/sda?tls-certificates={}", certificates.display());
    assert!(run("nbdinfo", &["--json", &uri]).contains(r#""TLS": true"#));
    let open = start(lab.view(At::Older), Place::Tcp(any), Security::Open);
    let uri = uri.replace(&port.to_string(), &address(&open).port().to_string());
    assert!(attempt("nbdinfo", &[&uri]).is_err());
}
