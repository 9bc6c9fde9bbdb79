//! Over the wire.

use std::time::Duration;

use super::support::{
    Epochal, GENERATION, GROUP, Make, OTHER_GROUP, Site, VOLUME, content, deliver, epochal, key,
    until_applied,
};
use block::{Consistency, Epoch, Generation, GroupId};
use bytes::Bytes;
use control::{DeleteReply, OperatorRequest, PinReply, PointSelector, StateCode};
use seawall_target_server::{StartError, TargetServer, verify};
use wire::{Authority, Identity, RefusalCode, Role, WireError, connect};

fn code(error: &WireError) -> RefusalCode {
    error.refusal().unwrap_or_else(|| panic!("not a refusal: {error}"))
}

#[tokio::test]
async fn epochs_become_points_that_can_be_read() {
    let mut site = Site::new().await;
    assert_eq!(site.status().await.groups[0].state, StateCode::WaitingForAgent);
    let first = Make { consistency: Consistency::None, ..Make::default() }.epochal(1);
    site.deliver(std::iter::once(first).chain((2..=20).map(epochal))).await;
    for _ in 0..2 {
        assert_eq!(site.points().await, (2..=20).collect::<Vec<_>>());
        for epoch in [2, 3, 11, 20] {
            let view = site.view(PointSelector::Epoch(Epoch(epoch))).await.unwrap();
            assert!(view == content(epoch), "epoch {epoch}");
        }
        assert!(site.view(PointSelector::Latest).await.unwrap() == content(20));
        let status = site.status().await;
        let group = &status.groups[0];
        assert_eq!((group.applied, group.points, group.generation), (Epoch(20), 19, GENERATION));
        assert_eq!(group.newest_point.as_ref().unwrap().epoch, Epoch(20));
        assert_eq!(group.oldest_point.as_ref().unwrap().epoch, Epoch(2));
        assert_eq!(group.volumes[0].name, "sda");
        assert!(group.undo_bytes.0 > 10 << 20);
        site.restart().await;
    }
    let error = site.view(PointSelector::Epoch(Epoch(1))).await.unwrap_err();
    assert_eq!(code(&error), RefusalCode::NotFound);
    assert!(error.to_string().contains("no recovery point 1 of group"), "{error}");
    site.server.take().unwrap().shutdown().await;
    let report = verify(&site.config.data, GROUP).unwrap();
    assert_eq!((report.problems.len(), report.layers.len()), (0, 19));
}

#[tokio::test]
async fn a_sender_goes_on_where_it_was() {
    let mut site = Site::new().await;
    site.deliver((1..=3).map(epochal)).await;
    site.restart().await;
    let (mut sender, mut receipts) = site.sender(GROUP, GENERATION).await.unwrap();
    assert_eq!((sender.held().held, sender.held().applied), (Epoch(3), Epoch(3)));
    deliver(&mut sender, &epochal(4)).await.unwrap();
    until_applied(&mut receipts, Epoch(4), sender.held()).await;
    let status = site.status().await;
    assert_eq!(status.groups[0].state, StateCode::Replicating);
    assert!(status.groups[0].sender.as_ref().unwrap().contains("process"));
    assert_eq!(status.groups[1].state, StateCode::WaitingForAgent);
}

/// Everything that must not be applied is refused by its name, and the replica is as it was.
#[tokio::test]
async fn what_must_not_be_applied_is_refused_by_name() {
    let site = Site::new().await;
    site.deliver((1..=2).map(epochal)).await;
    let good = epochal(3);
    let named = |epoch, of: Epochal| Epochal { epoch: Epoch(epoch), bytes: of.bytes };
    let flipped = |at: usize| {
        let mut bytes = good.bytes.to_vec();
        let at = if at < bytes.len() { at } else { bytes.len() - 1 };
        bytes[at] ^= 4;
        Epochal { epoch: Epoch(3), bytes: bytes.into() }
    };
    let cut = |length: usize| Epochal { epoch: Epoch(3), bytes: good.bytes.slice(..length) };
    let cases: Vec<(&str, Epochal, RefusalCode, &str)> = vec![
        ("replayed", epochal(2), RefusalCode::Replayed, "deliver epoch 2"),
        ("gap", epochal(4), RefusalCode::Gap, "deliver epoch 4"),
        (
            "replayed under a new number",
            named(3, epochal(2)),
            RefusalCode::Replayed,
            "its content is epoch 2",
        ),
        ("a later one under this number", named(3, epochal(4)), RefusalCode::Gap, "its content is epoch 4"),
        (
            "other generation inside",
            Make { generation: Generation(2), ..Make::default() }.epochal(3),
            RefusalCode::Generation,
            "generation 2",
        ),
        (
            "other group inside",
            Make { group: OTHER_GROUP, key: key(OTHER_GROUP), ..Make::default() }.epochal(3),
            RefusalCode::WrongGroup,
            "belongs to group",
        ),
        (
            "other key",
            Make { key: key(OTHER_GROUP), ..Make::default() }.epochal(3),
            RefusalCode::Unauthorised,
            "another key",
        ),
        ("header flipped", flipped(40), RefusalCode::Corrupt, "open changeset"),
        ("data flipped", flipped(good.bytes.len() / 2), RefusalCode::Corrupt, "open changeset"),
        ("trailer flipped", flipped(usize::MAX), RefusalCode::Corrupt, "open changeset"),
        ("cut short", cut(good.bytes.len() - 1), RefusalCode::Corrupt, "truncated"),
        ("empty", cut(0), RefusalCode::Corrupt, "truncated"),
        (
            "grown",
            Epochal { epoch: Epoch(3), bytes: Bytes::from([&good.bytes[..], &[0]].concat()) },
            RefusalCode::Corrupt,
            "open changeset",
        ),
    ];
    for (name, bad, expected, says) in cases {
        let (mut sender, mut receipts) = site.sender(GROUP, GENERATION).await.unwrap();
        // The refusal may come while it is still being sent.
        let sent = deliver(&mut sender, &bad).await;
        let error = match sent {
            Err(error) => error,
            Ok(()) => receipts.next().await.expect_err(name),
        };
        assert_eq!(code(&error), expected, "{name}: {error}");
        assert!(error.to_string().contains(says), "{name}: {error}");
        drop((sender, receipts));
        assert_eq!(site.points().await, [1, 2], "{name}");
        assert!(site.status().await.groups[0].last_error.as_ref().unwrap().contains(says), "{name}");
    }
    assert!(site.view(PointSelector::Latest).await.unwrap() == content(2));
    // And the good one is still taken.
    site.deliver([good]).await;
    assert!(site.view(PointSelector::Latest).await.unwrap() == content(3));
    assert!(site.view(PointSelector::Epoch(Epoch(2))).await.unwrap() == content(2));
}

#[tokio::test]
async fn who_may_not_deliver_is_refused_by_name() {
    let site = Site::new().await;
    site.deliver([epochal(1)]).await;
    let error = site.sender(GroupId([9; 16]), GENERATION).await.unwrap_err();
    assert_eq!(code(&error), RefusalCode::UnknownGroup, "{error}");
    assert!(error.to_string().contains("does not keep it"));
    let error = site.sender(GROUP, Generation(2)).await.unwrap_err();
    assert_eq!(code(&error), RefusalCode::Generation, "{error}");
    assert!(error.to_string().contains("follows generation 1"));
    let error = site.sender_as("agent", GROUP, GENERATION).await.unwrap_err();
    assert_eq!(code(&error), RefusalCode::Unauthorised, "{error}");
    assert_eq!(site.points().await, [1]);
    // An operator's credentials deliver nothing.
    let error = site.sender_as("operator", GROUP, GENERATION).await.unwrap_err();
    assert_eq!(code(&error), RefusalCode::Unauthorised, "{error}");
}

/// A sender that lost its connection without this side noticing is served at once on the new one.
#[tokio::test]
async fn the_newest_connection_of_a_group_takes_over() {
    let site = Site::new().await;
    let (mut old, mut old_receipts) = site.sender(GROUP, GENERATION).await.unwrap();
    deliver(&mut old, &epochal(1)).await.unwrap();
    until_applied(&mut old_receipts, Epoch(1), old.held()).await;
    // In the midst of a changeset.
    let second = epochal(2);
    old.begin(Epoch(2), block::ByteCount(second.bytes.len() as u64)).await.unwrap();
    old.data(second.bytes.slice(..100_000)).await.unwrap();
    let (mut new, mut new_receipts) = site.sender(GROUP, GENERATION).await.unwrap();
    assert_eq!(new.held().applied, Epoch(1));
    let error = old_receipts.next().await.unwrap_err();
    assert_eq!(code(&error), RefusalCode::Superseded, "{error}");
    assert!(error.is_retryable());
    deliver(&mut new, &second).await.unwrap();
    until_applied(&mut new_receipts, Epoch(2), new.held()).await;
    assert!(site.view(PointSelector::Latest).await.unwrap() == content(2));
}

/// Many at once, of one group: whatever the order of turns, epochs are applied once each and in order.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn senders_that_fight_do_no_harm() {
    let site = Site::new().await;
    let epochs: Vec<Epochal> = (1..=12).map(epochal).collect();
    let fight = async |_: usize| {
        loop {
            let Ok((mut sender, mut receipts)) = site.sender(GROUP, GENERATION).await else { continue };
            let mut held = sender.held();
            while held.applied < Epoch(12) {
                let next = &epochs[held.applied.0 as usize];
                if deliver(&mut sender, next).await.is_err() {
                    break;
                }
                match receipts.next().await {
                    Ok(news) => held = news,
                    Err(_) => break,
                }
            }
            if held.applied == Epoch(12) {
                return;
            }
        }
    };
    tokio::join!(fight(0), fight(1), fight(2));
    assert_eq!(site.points().await, (1..=12).collect::<Vec<_>>());
    for epoch in [1, 7, 12] {
        assert!(site.view(PointSelector::Epoch(Epoch(epoch))).await.unwrap() == content(epoch));
    }
}

/// Stopping in the midst of everything: what was acknowledged is there afterwards, the rest can be sent again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stopping_keeps_what_was_acknowledged() {
    let mut site = Site::new().await;
    let mut acknowledged = Epoch(0);
    for round in 0..6 {
        let (mut sender, mut receipts) = site.sender(GROUP, GENERATION).await.unwrap();
        assert!(sender.held().applied >= acknowledged);
        let from = sender.held().applied.0;
        let server = site.server.take().unwrap();
        let send = async {
            for epoch in from + 1.. {
                if deliver(&mut sender, &epochal(epoch)).await.is_err() {
                    break;
                }
            }
        };
        let stop = async {
            let mut last = Epoch(from);
            while last.0 < from + round % 3 {
                last = receipts.next().await.unwrap().applied;
            }
            server.shutdown().await;
            loop {
                match receipts.next().await {
                    Ok(held) => last = held.applied,
                    Err(error) => return (last, error),
                }
            }
        };
        let ((), (last, error)) = tokio::join!(send, stop);
        assert_eq!(code(&error), RefusalCode::Stopping, "{error}");
        acknowledged = last;
        site.start().await;
        let status = site.status().await;
        assert!(status.groups[0].applied >= acknowledged);
    }
    let last = *site.points().await.last().unwrap();
    assert!(site.view(PointSelector::Latest).await.unwrap() == content(last));
}

/// Pins, deleting and scrubbing over the wire, with what is refused by name.
#[tokio::test]
async fn operators_pin_delete_and_scrub() {
    let mut site = Site::new().await;
    site.deliver((1..=9).map(epochal)).await;
    let pin = |point, label: Option<&str>| OperatorRequest::Pin {
        group: GROUP,
        point,
        label: label.map(|label| label.parse().unwrap()),
        expires: None,
    };
    let delete = |epoch| OperatorRequest::DeletePoint { group: GROUP, epoch: Epoch(epoch) };
    let answer = site.ask(&pin(PointSelector::Epoch(Epoch(4)), Some("audit"))).await.unwrap();
    let pinned: PinReply = serde_json::from_str(&answer).unwrap();
    assert_eq!((pinned.point.epoch, pinned.point.pin.unwrap().label.unwrap().as_str()), (Epoch(4), "audit"));
    for (request, says) in [
        (delete(4), "it is pinned"),
        (delete(9), "it is the newest"),
        (
            delete(40),
            "there is no recovery point 40 of group 01010101010101010101010101010101; the nearest is 9",
        ),
        (pin(PointSelector::Epoch(Epoch(30)), None), "there is no recovery point 30"),
        (OperatorRequest::Unpin { group: GROUP, point: PointSelector::Latest }, "it is not pinned"),
        (
            OperatorRequest::Pin {
                group: GROUP,
                point: PointSelector::Latest,
                label: None,
                expires: Some(block::UnixNanos(1)),
            },
            "its expiry lies in the past",
        ),
    ] {
        let error = site.ask(&request).await.unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
    }
    for epoch in [1, 6] {
        let answer = site.ask(&delete(epoch)).await.unwrap();
        assert_eq!(serde_json::from_str::<DeleteReply>(&answer).unwrap().epoch, Epoch(epoch));
    }
    site.restart().await;
    assert_eq!(site.points().await, [2, 3, 4, 5, 7, 8, 9]);
    for epoch in [2, 4, 5, 7] {
        assert!(
            site.view(PointSelector::Epoch(Epoch(epoch))).await.unwrap() == content(epoch),
            "epoch {epoch}"
        );
    }
    let listed: control::PointsReply =
        serde_json::from_str(&site.ask(&OperatorRequest::Points { group: Some(GROUP) }).await.unwrap())
            .unwrap();
    let kept: Vec<_> =
        listed.groups[0].points.iter().map(|point| point.kept_for.as_deref().unwrap()).collect();
    assert_eq!(kept, ["all", "all", "pinned", "all", "all", "all", "newest"]);

    assert!(site.scrub().await.findings.is_empty());
    // A bit of the layer that leads from 5 to 4 flips.
    let layer = site.config.data.join(GROUP.to_string()).join("layers/00000000000000000005.layer");
    let mut bytes = std::fs::read(&layer).unwrap();
    bytes[4500] ^= 1;
    std::fs::write(&layer, &bytes).unwrap();
    let report = site.scrub().await;
    assert_eq!(report.findings.len(), 1, "{report:?}");
    assert_eq!((report.findings[0].points, report.findings[0].points_count), (Some((Epoch(2), Epoch(4))), 3));
    let error = site.view(PointSelector::Epoch(Epoch(4))).await.unwrap_err();
    assert_eq!(code(&error), RefusalCode::Corrupt, "{error}");
    assert!(site.view(PointSelector::Epoch(Epoch(5))).await.unwrap() == content(5));
    let status = site.status().await;
    let group = &status.groups[0];
    assert!(group.warnings.iter().any(|warning| warning.contains("3 recovery points cannot be viewed")));
    assert!(group.warnings.iter().any(|warning| warning.contains("00000000000000000005.layer")));
    assert_eq!(group.oldest_point.as_ref().unwrap().epoch, Epoch(5));
    assert_eq!(group.state, StateCode::WaitingForAgent, "replication is not concerned");
}

/// A replica that does not open stops its group and no other.
#[tokio::test]
async fn a_broken_replica_stops_its_own_group_only() {
    let mut site = Site::new().await;
    site.deliver([epochal(1)]).await;
    site.server.take().unwrap().shutdown().await;
    std::fs::write(site.config.data.join(GROUP.to_string()).join("state"), b"rubbish").unwrap();
    site.start().await;
    let status = site.status().await;
    assert_eq!(status.groups[0].state, StateCode::Corrupt);
    assert_eq!(status.state, StateCode::Corrupt);
    assert!(status.groups[0].last_error.as_ref().unwrap().contains("state"));
    let error = site.sender(GROUP, GENERATION).await.unwrap_err();
    assert_eq!(code(&error), RefusalCode::Failed, "{error}");
    let (mut sender, mut receipts) = site.sender(OTHER_GROUP, GENERATION).await.unwrap();
    let make = Make { group: OTHER_GROUP, key: key(OTHER_GROUP), ..Make::default() };
    deliver(&mut sender, &make.epochal(1)).await.unwrap();
    until_applied(&mut receipts, Epoch(1), sender.held()).await;
}

#[tokio::test]
async fn operators_learn_what_is_wrong_with_a_request() {
    let site = Site::new().await;
    let error = site.ask(&OperatorRequest::Points { group: Some(GroupId([9; 16])) }).await.unwrap_err();
    assert_eq!(code(&error), RefusalCode::UnknownGroup);
    let error = site.view(PointSelector::Latest).await.unwrap_err();
    assert!(error.to_string().contains("no recovery point yet"), "{error}");
    let credentials = site.credentials("operator");
    let error =
        wire::Operator::call(&site.addr(), Role::TargetServer, &credentials, r#"{"request":"format-disk"}"#)
            .await
            .unwrap_err();
    assert_eq!(code(&error), RefusalCode::BadRequest);
    assert!(error.to_string().contains("format-disk"), "{error}");
    // A process server asks nothing.
    let error = wire::Operator::call(
        &site.addr(),
        Role::TargetServer,
        &site.credentials("process"),
        r#"{"request":"status"}"#,
    )
    .await
    .unwrap_err();
    assert_eq!(code(&error), RefusalCode::Unauthorised);
}

#[tokio::test]
async fn a_server_does_not_start_with_another_parts_credentials() {
    let site = Site::new().await;
    let mut config = site.config.clone();
    config.credentials = site.dir.path().join("process");
    let error = TargetServer::start(config.clone()).await.unwrap_err();
    assert!(matches!(error, StartError::Role { role: Role::ProcessServer, .. }), "{error}");
    assert!(TargetServer::check(&config).is_err());
    config.credentials = site.config.credentials.clone();
    TargetServer::check(&config).unwrap();
    config.groups[0].key = site.dir.path().join("nothing");
    let error = TargetServer::check(&config).unwrap_err().to_string();
    assert!(error.contains("load the key of group"), "{error}");
    // Two servers on the same data: the second serves no group, and says why.
    let second = TargetServer::start(site.config.clone()).await.unwrap();
    assert!(second.status().groups[0].last_error.as_ref().unwrap().contains("another process"));
    let connection =
        connect(&second.local_addr().to_string(), Role::TargetServer, &site.credentials("process")).await;
    let error = wire::Sender::open(connection.unwrap(), GROUP, GENERATION).await.unwrap_err();
    assert_eq!(code(&error), RefusalCode::Failed);
    second.shutdown().await;
}

/// Another authority takes over, step by step, while everything runs: new credentials count for whoever comes then, for exports that
/// there are too, and whoever is there stays.
#[tokio::test(flavor = "multi_thread")]
async fn renewed_credentials_count_without_a_restart() {
    let site = Site::new().await;
    site.deliver([epochal(1)]).await;
    let (mut sender, mut receipts) = site.sender(GROUP, GENERATION).await.unwrap();
    let request = OperatorRequest::Export(control::ExportRequest {
        detach: true,
        ..control::ExportRequest::new(
            GROUP,
            vec![VOLUME],
            PointSelector::Latest,
            control::ExportPlace::Beside,
        )
    });
    let info: control::ExportInfo = serde_json::from_str(&site.ask(&request).await.unwrap()).unwrap();
    let control::ExportPlace::Tls(export) = info.place else { panic!("{:?}", info.place) };

    let next = Authority::create(&site.dir.path().join("next-ca")).unwrap();
    for (name, role) in [("next-target", Role::TargetServer), ("next-operator", Role::Operator)] {
        let identity = Identity::new(role, name.trim_start_matches("next-"), None).unwrap();
        next.issue(&identity, &site.dir.path().join(name)).unwrap();
    }
    // Knows the new authority only, so nobody of the old one.
    let operator = site.credentials("next-operator");
    let address = site.addr();
    let ask = || wire::Operator::call(&address, Role::TargetServer, &operator, r#"{"request":"status"}"#);
    ask().await.unwrap_err();
    starttls(export, &operator).unwrap_err();

    let (own, new) = (site.dir.path().join("target"), site.dir.path().join("next-target"));
    let both = [&own, &new].map(|dir| std::fs::read_to_string(dir.join(wire::CA_FILE)).unwrap()).concat();
    std::fs::write(own.join(wire::CA_FILE), both).unwrap();
    for file in [wire::CERT_FILE, wire::KEY_FILE] {
        std::fs::copy(new.join(file), own.join(file)).unwrap();
    }
    let taken = async {
        while ask().await.is_err() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    // Not a measurement; past it they are never taken.
    tokio::time::timeout(Duration::from_secs(60), taken).await.expect("the new credentials are taken");
    starttls(export, &operator).unwrap();
    // A delivery from before goes on.
    deliver(&mut sender, &epochal(2)).await.unwrap();
    until_applied(&mut receipts, Epoch(2), sender.held()).await;
}

/// A client of an export, up to the end of the TLS handshake and the first byte behind it.
fn starttls(export: std::net::SocketAddr, credentials: &wire::Credentials) -> std::io::Result<()> {
    use std::io::{Read, Write};
    let mut stream = std::net::TcpStream::connect(export)?;
    stream.read_exact(&mut [0; 18])?;
    stream.write_all(&3_u32.to_be_bytes())?;
    stream.write_all(&[&b"IHAVEOPT"[..], &5_u32.to_be_bytes(), &0_u32.to_be_bytes()].concat())?;
    stream.read_exact(&mut [0; 20])?;
    let (config, name) = wire::foreign_client(credentials, Role::TargetServer);
    let client = rustls::ClientConnection::new(config, name).map_err(std::io::Error::other)?;
    let mut tls = rustls::StreamOwned::new(client, stream);
    // NBD_OPT_LIST: an answer comes only when the server has taken this side's certificate as well.
    tls.write_all(&[&b"IHAVEOPT"[..], &3_u32.to_be_bytes(), &0_u32.to_be_bytes()].concat())?;
    tls.read_exact(&mut [0; 20])
}
