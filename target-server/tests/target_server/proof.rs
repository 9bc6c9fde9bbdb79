//! What is kept of a boot proof.

use block::{Epoch, VolumeId};
use control::{OperatorRequest, ProofInfo};
use wire::{RefusalCode, WireError};

use super::support::{GROUP, Site, VOLUME, epochal};

async fn prove(site: &Site, epoch: u64, volume: VolumeId, took_ms: u64) -> Result<ProofInfo, WireError> {
    let request =
        OperatorRequest::Proven { group: GROUP, epoch: Epoch(epoch), volumes: vec![volume], took_ms };
    site.ask(&request).await.map(|json| serde_json::from_str(&json).unwrap())
}

async fn shown(site: &Site) -> (Option<ProofInfo>, Vec<String>) {
    let group = site.status().await.groups.remove(0);
    (group.proof, group.warnings)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_last_proof_is_kept_and_shown() {
    let mut site = Site::new().await;
    site.deliver((1..=3).map(epochal)).await;
    assert_eq!(shown(&site).await, (None, Vec::new()));
    prove(&site, 2, VOLUME, 1).await.unwrap();
    let proof = prove(&site, 3, VOLUME, 41_000).await.unwrap();
    assert_eq!((proof.epoch, proof.took_ms, &proof.volumes[..]), (Epoch(3), 41_000, &["sda".to_owned()][..]));
    assert_eq!(proof.operator, "operator operator");
    for (epoch, volume) in [(99, VOLUME), (3, VolumeId([9; 16]))] {
        let refused = prove(&site, epoch, volume, 1).await.unwrap_err();
        assert_eq!(refused.refusal(), Some(RefusalCode::NotFound), "{refused}");
    }
    assert_eq!(shown(&site).await, (Some(proof.clone()), Vec::new()));
    site.restart().await;
    assert_eq!(shown(&site).await, (Some(proof), Vec::new()));

    // Damaged, it is told, harms nothing, and is replaced by the next one.
    let file = site.config.data.join(GROUP.to_string()).join("proof");
    let mut bytes = std::fs::read(&file).unwrap();
    bytes[40] ^= 1;
    std::fs::write(&file, bytes).unwrap();
    site.restart().await;
    let (none, warnings) = shown(&site).await;
    assert!(none.is_none() && warnings[0].contains("seawall prove"), "{warnings:?}");
    let again = prove(&site, 3, VOLUME, 40_000).await.unwrap();
    assert_eq!(shown(&site).await, (Some(again), Vec::new()));
}
