//! How fast a delivery is, against a bare copy over the same TLS. Run with
//! `cargo test --release -p wire --test wire throughput -- --ignored --nocapture`.

use std::time::Instant;

use block::{ByteCount, Epoch, Generation};
use bytes::Bytes;
use wire::{Held, Incoming, Opening, Role, Sender, connect};

use super::{GROUP, Site, open};

const CHANGESET: u64 = 64 << 20;
const CHANGESETS: u64 = 32;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a measurement, not a test"]
async fn throughput() {
    for _ in 0..3 {
        let (bare, bare_cpu) = measured(bare()).await;
        let (ours, our_cpu) = measured(delivery()).await;
        println!(
            "bare tokio-rustls {bare:.0} MB/s ({bare_cpu:.2} s of CPU), delivery {ours:.0} MB/s ({our_cpu:.2} s), \
             ratio {:.2}, of CPU {:.2}",
            ours / bare,
            bare_cpu / our_cpu
        );
    }
}

/// With the processor time that it took: on a busy machine the better measure.
async fn measured(run: impl Future<Output = f64>) -> (f64, f64) {
    let before = cpu_seconds();
    let rate = run.await;
    (rate, cpu_seconds() - before)
}

fn cpu_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    let after_name = stat.rsplit(')').next().unwrap();
    let ticks: u64 =
        after_name.split_whitespace().skip(11).take(2).map(|field| field.parse::<u64>().unwrap()).sum();
    ticks as f64 / 100.0
}

async fn delivery() -> f64 {
    let site = Site::new();
    let (listener, addr) = site.server().await;
    let agent = site.agent();
    let server = tokio::spawn(async move {
        let Opening::Deliver(mut receiver) = open(&listener).await.unwrap() else {
            panic!("expected a delivery")
        };
        receiver.accept(Held::default(), ByteCount::mib(32));
        let answerer = receiver.answerer();
        let mut taken = 0;
        while let Some(incoming) = receiver.next().await.unwrap() {
            if let Incoming::Data(data) = incoming {
                taken += data.len() as u64;
                answerer.grant(ByteCount(data.len() as u64));
            }
        }
        taken
    });
    let connection = connect(&addr, Role::TargetServer, &agent).await.unwrap();
    println!("{}", connection.cipher());
    let (mut sender, receipts) = Sender::open(connection, GROUP, Generation(1)).await.unwrap();
    let piece = Bytes::from(vec![0x5a; 1 << 20]);
    let start = Instant::now();
    for epoch in 1..=CHANGESETS {
        let pieces = (0..CHANGESET >> 20).map(|_| piece.clone());
        sender.deliver(Epoch(epoch), ByteCount(CHANGESET), pieces).await.unwrap();
    }
    drop((sender, receipts));
    let taken = server.await.unwrap();
    assert_eq!(taken, CHANGESET * CHANGESETS);
    taken as f64 / start.elapsed().as_secs_f64() / 1e6
}

/// The same bytes through tokio-rustls with the same ciphers and nothing else.
async fn bare() -> f64 {
    use std::sync::Arc;

    use rustls::crypto::ring::{cipher_suite::TLS13_AES_128_GCM_SHA256, default_provider};
    use rustls::pki_types::pem::PemObject;
    use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    let site = Site::new();
    let dir = site.issue_files(Role::TargetServer, "target", None);
    let provider = rustls::crypto::CryptoProvider {
        cipher_suites: vec![TLS13_AES_128_GCM_SHA256],
        ..default_provider()
    };
    let provider = Arc::new(provider);
    let chain = vec![CertificateDer::from_pem_file(dir.join("cert.pem")).unwrap()];
    let server = rustls::ServerConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(chain, PrivateKeyDer::from_pem_file(dir.join("key.pem")).unwrap())
        .unwrap();
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(dir.join("ca.pem")).unwrap()).unwrap();
    let client = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let server = tokio::spawn(async move {
        let (stream, _) = listener.accept().await.unwrap();
        let mut stream = tokio_rustls::TlsAcceptor::from(Arc::new(server)).accept(stream).await.unwrap();
        let mut buffer = vec![0; 256 << 10];
        let mut taken = 0;
        while let Ok(count @ 1..) = stream.read(&mut buffer).await {
            taken += count as u64;
        }
        taken
    });
    let stream = tokio::net::TcpStream::connect(addr).await.unwrap();
    let name = ServerName::try_from("target-server.seawall.invalid").unwrap();
    let mut stream = tokio_rustls::TlsConnector::from(Arc::new(client)).connect(name, stream).await.unwrap();
    let piece = vec![0x5a; 256 << 10];
    let start = Instant::now();
    for _ in 0..CHANGESET * CHANGESETS / piece.len() as u64 {
        stream.write_all(&piece).await.unwrap();
    }
    stream.shutdown().await.unwrap();
    let taken = server.await.unwrap();
    assert_eq!(taken, CHANGESET * CHANGESETS);
    taken as f64 / start.elapsed().as_secs_f64() / 1e6
}
