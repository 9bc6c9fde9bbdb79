//! Points over NBD, asked for over the wire.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use block::{ByteCount, ByteOffset, Epoch, VolumeId};
use control::{
    ExportInfo, ExportPlace, ExportRequest, ExportsReply, OperatorRequest, PointSelector, VIEW_HASH_BYTES,
    VIEW_HASH_UNIT, ViewRange,
};
use seawall_target_server::{EXPORT_TIME_MAX, EXPORTS_MAX, unit_hash};
use wire::{Operator, RefusalCode, Role, ViewReader, WireError};

use super::support::{GROUP, SIZE, Site, VOLUME, content, epochal};

/// Nothing here is a measurement; past this something hangs.
const PATIENCE: Duration = Duration::from_secs(60);

fn request(point: PointSelector, place: ExportPlace) -> ExportRequest {
    ExportRequest::new(GROUP, vec![VOLUME], point, place)
}

async fn start(site: &Site, request: ExportRequest) -> Result<(ExportInfo, ViewReader), WireError> {
    let json = serde_json::to_string(&OperatorRequest::Export(request)).unwrap();
    let credentials = site.credentials("operator");
    let reader = Operator::stream(&site.addr(), Role::TargetServer, &credentials, &json).await?;
    Ok((serde_json::from_str(reader.head()).unwrap(), reader))
}

async fn list(site: &Site) -> Vec<ExportInfo> {
    let json = site.ask(&OperatorRequest::Exports).await.unwrap();
    serde_json::from_str::<ExportsReply>(&json).unwrap().exports
}

async fn until_none(site: &Site) {
    let gone = async {
        // It is no longer listed from when its end begins.
        while !list(site).await.is_empty() || socket(site).exists() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(PATIENCE, gone).await.expect("the export ends");
}

fn socket(site: &Site) -> PathBuf {
    site.dir.path().join("nbd.sock")
}

/// What a client reads; `None` when there is no such client here.
fn read(socket: &Path) -> Option<Vec<u8>> {
    let uri = format!("nbd+unix:///sda?socket={}", socket.display());
    let copy = socket.with_extension("img");
    match Command::new("nbdcopy").arg(uri).arg(&copy).status() {
        Ok(status) => {
            assert!(status.success(), "nbdcopy: {status}");
            Some(std::fs::read(copy).unwrap())
        }
        Err(error) => {
            let why = format!("nbdcopy (of libnbd-bin): {error}");
            eprintln!("NOT RUN: {why}");
            assert!(std::env::var_os("CI").is_none(), "it must run in CI, but: {why}");
            None
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_point_is_exported_while_replication_goes_on() {
    let mut site = Site::new().await;
    site.deliver((1..=3).map(epochal)).await;
    let (info, reader) =
        start(&site, request(PointSelector::Epoch(Epoch(2)), ExportPlace::Socket(socket(&site))))
            .await
            .unwrap();
    assert_eq!((info.point.epoch, info.volumes[0].name.as_str(), info.writable), (Epoch(2), "sda", false));
    assert_eq!(info.operator, "operator operator");
    let Some(found) = read(&socket(&site)) else { return };
    assert!(found == content(2));
    site.deliver((4..=12).map(epochal)).await;
    assert!(read(&socket(&site)).unwrap() == content(2), "what is applied later is not seen");
    let status = site.status().await;
    assert_eq!(status.exports.len(), 1);
    assert!(status.exports[0].read_bytes.0 > 0);
    // It ends with its operator's connection.
    drop(reader);
    until_none(&site).await;
    assert!(!socket(&site).exists());

    // Detached it stays, until it is stopped.
    let detached = ExportRequest {
        detach: true,
        writable: true,
        ..request(PointSelector::Latest, ExportPlace::Socket(socket(&site)))
    };
    let json = site.ask(&OperatorRequest::Export(detached.clone())).await.unwrap();
    let info: ExportInfo = serde_json::from_str(&json).unwrap();
    assert_eq!((info.point.epoch, info.detached), (Epoch(12), true));
    let uri = format!("nbd+unix:///sda?socket={}", socket(&site).display());
    let written = Command::new("qemu-io")
        .args(["-f", "raw", "-c", "write -P 7 0 1M", &uri])
        .output()
        .expect("qemu-io, of qemu-utils");
    assert!(written.status.success(), "{written:?}");
    let mut changed = content(12);
    changed[..1 << 20].fill(7);
    assert!(read(&socket(&site)).unwrap() == changed);
    assert!(site.view(PointSelector::Latest).await.unwrap() == content(12), "the replica does not change");
    let running = list(&site).await;
    assert_eq!((running.len(), running[0].overlay_bytes), (1, ByteCount::mib(1)));
    let json = site.ask(&OperatorRequest::StopExport { id: info.id }).await.unwrap();
    assert_eq!(serde_json::from_str::<ExportsReply>(&json).unwrap().exports[0].id, info.id);
    assert!(list(&site).await.is_empty() && !socket(&site).exists());
    let again = site.ask(&OperatorRequest::StopExport { id: info.id }).await.unwrap_err();
    assert_eq!(again.refusal(), Some(RefusalCode::NotFound));

    // The server's end is the end of detached ones too.
    site.ask(&OperatorRequest::Export(detached)).await.unwrap();
    site.restart().await;
    assert!(list(&site).await.is_empty() && !socket(&site).exists());
    assert!(site.view(PointSelector::Latest).await.unwrap() == content(12));
}

#[tokio::test(flavor = "multi_thread")]
async fn stopping_tells_the_operator_who_started_it() {
    let site = Site::new().await;
    site.deliver((1..=2).map(epochal)).await;
    let (info, mut reader) = start(&site, request(PointSelector::Latest, ExportPlace::Beside)).await.unwrap();
    assert!(matches!(info.place, ExportPlace::Tls(address) if address.port() > 0), "{info:?}");
    site.ask(&OperatorRequest::StopExport { id: info.id }).await.unwrap();
    let error = reader.next().await.unwrap_err();
    assert!(error.to_string().contains("was stopped"), "{error}");
}

/// With nobody there any more to stop it.
#[tokio::test(flavor = "multi_thread")]
async fn an_export_ends_when_its_time_is_over() {
    let site = Site::new().await;
    site.deliver((1..=2).map(epochal)).await;
    let limited = ExportRequest {
        writable: true,
        detach: true,
        drill: Some("monthly".parse().unwrap()),
        time_limit_s: Some(1),
        ..request(PointSelector::Latest, ExportPlace::Socket(socket(&site)))
    };
    let json = site.ask(&OperatorRequest::Export(limited.clone())).await.unwrap();
    let info: ExportInfo = serde_json::from_str(&json).unwrap();
    assert_eq!(info.drill.as_ref().unwrap().as_str(), "monthly");
    assert_eq!(info.until.unwrap().0 - info.since.0, 1_000_000_000);
    until_none(&site).await;
    let overlays = site.config.data.join(GROUP.to_string()).join("overlays");
    assert_eq!(std::fs::read_dir(&overlays).unwrap().count(), 0, "what was written is dropped");

    // An operator that is still there hears why.
    let attached = ExportRequest { detach: false, ..limited };
    let (_, mut reader) = start(&site, attached).await.unwrap();
    let error = reader.next().await.unwrap_err();
    assert!(error.to_string().contains("time is over"), "{error}");
    until_none(&site).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_exported_is_refused_and_leaves_nothing() {
    let site = Site::new().await;
    site.deliver((1..=2).map(epochal)).await;
    let at = |point| request(point, ExportPlace::Socket(socket(&site)));
    let latest = at(PointSelector::Latest);
    let cases = [
        (at(PointSelector::Epoch(Epoch(99))), "no recovery point 99"),
        (ExportRequest { volumes: vec![VolumeId([9; 16])], ..latest.clone() }, "no such volume"),
        (ExportRequest { volumes: vec![VOLUME, VOLUME], ..latest.clone() }, "twice"),
        (request(PointSelector::Latest, ExportPlace::Socket("relative.sock".into())), "absolute"),
        (ExportRequest { time_limit_s: Some(0), ..latest.clone() }, "from a second to 30 days"),
        (
            ExportRequest { time_limit_s: Some(EXPORT_TIME_MAX.as_secs() + 1), ..latest.clone() },
            "from a second to 30 days",
        ),
        (
            request(PointSelector::Latest, ExportPlace::Socket("/nonexistent/x.sock".into())),
            "/nonexistent/x.sock",
        ),
    ];
    for (request, expected) in cases {
        let error = start(&site, request).await.unwrap_err();
        assert!(error.to_string().contains(expected), "{expected} in {error}");
    }
    assert!(list(&site).await.is_empty());
    let mut readers = Vec::new();
    for _ in 0..EXPORTS_MAX {
        readers.push(start(&site, request(PointSelector::Latest, ExportPlace::Beside)).await.unwrap());
    }
    let error = start(&site, latest.clone()).await.unwrap_err();
    assert_eq!(error.refusal(), Some(RefusalCode::Busy), "{error}");
    assert!(error.to_string().contains("seawall export stop"), "{error}");
    drop(readers);
    until_none(&site).await;
    start(&site, latest).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn overlays_that_a_crash_left_are_removed() {
    let mut site = Site::new().await;
    let overlays = site.config.data.join(GROUP.to_string()).join("overlays");
    std::fs::create_dir_all(&overlays).unwrap();
    std::fs::write(overlays.join("3-abc.overlay"), "left").unwrap();
    site.restart().await;
    assert_eq!(std::fs::read_dir(&overlays).unwrap().count(), 0);
}

async fn stream(site: &Site, request: OperatorRequest) -> Result<Vec<(u64, Vec<u8>)>, WireError> {
    let json = serde_json::to_string(&request).unwrap();
    let credentials = site.credentials("operator");
    let mut reader = Operator::stream(&site.addr(), Role::TargetServer, &credentials, &json).await?;
    let mut pieces = Vec::new();
    while let Some((offset, bytes)) = reader.next().await? {
        pieces.push((offset.0, bytes.to_vec()));
    }
    Ok(pieces)
}

#[tokio::test(flavor = "multi_thread")]
async fn hashes_and_parts_of_a_view() {
    let site = Site::new().await;
    site.deliver((1..=3).map(epochal)).await;
    let point = PointSelector::Epoch(Epoch(2));
    let expected = content(2);
    let pieces =
        stream(&site, OperatorRequest::HashView { group: GROUP, volume: VOLUME, point }).await.unwrap();
    let units = SIZE.div_ceil(VIEW_HASH_UNIT.0) as usize;
    let mut hashes = vec![0; units * VIEW_HASH_BYTES];
    for (offset, bytes) in pieces {
        hashes[offset as usize..][..bytes.len()].copy_from_slice(&bytes);
    }
    for (unit, hash) in hashes.chunks(VIEW_HASH_BYTES).enumerate() {
        let start = unit * VIEW_HASH_UNIT.0 as usize;
        assert_eq!(hash, unit_hash(&expected[start..][..VIEW_HASH_UNIT.0 as usize]), "unit {unit}");
    }
    assert!(hashes.iter().any(|byte| *byte != 0));

    let range = |offset, length| ViewRange { offset: ByteOffset(offset), length: ByteCount(length) };
    let read =
        |ranges: Vec<ViewRange>| OperatorRequest::ReadView { group: GROUP, volume: VOLUME, point, ranges };
    let ranges = vec![range(100, 5000), range((1 << 20) - 3, 10), range(SIZE - 700, 700)];
    let mut found = vec![0; SIZE as usize];
    for (offset, bytes) in stream(&site, read(ranges.clone())).await.unwrap() {
        found[offset as usize..][..bytes.len()].copy_from_slice(&bytes);
    }
    let mut asked = vec![0; SIZE as usize];
    for range in &ranges {
        let part = range.offset.0 as usize..(range.offset.0 + range.length.0) as usize;
        asked[part.clone()].copy_from_slice(&expected[part]);
    }
    assert!(found == asked);
    for bad in [vec![range(SIZE - 1, 2)], vec![range(u64::MAX, 2)], vec![range(10, 10), range(5, 1)]] {
        let error = stream(&site, read(bad)).await.unwrap_err();
        assert_eq!(error.refusal(), Some(RefusalCode::BadRequest), "{error}");
    }
}
