//! What the fuzzer throws at what a part keeps of its fleet, and at what others sealed for it. Built for it alone.

use std::sync::OnceLock;

use block::GroupId;
use control::fleet::{Desired, DesiredAgent, DesiredProcessServer, DesiredTargetServer};

use crate::seal::{Opener, seal_key, unhex};
use crate::state::{FIRST_LINE, parse, text};
use crate::{Fingerprint, Profile, ServerUrl};

/// The file of what was told last. With the lowest bit of the first byte, the checksum is mended.
pub fn desired(data: &[u8]) {
    let Some((&way, data)) = data.split_first() else { return };
    let Ok(mut file) = std::str::from_utf8(data).map(str::to_owned) else { return };
    if way & 1 == 1 {
        let (head, json) = file.rsplit_once("\n{").unwrap_or(("", &file));
        let digest = head.split('\n').nth(1).unwrap_or_default().to_owned();
        let json = format!("{{{}", json.trim_end_matches('\n'));
        let sum = blake3::hash(json.as_bytes());
        file = format!("{FIRST_LINE}\n{digest}\n{}\n{json}\n", sum.to_hex());
    }
    if let Some((digest, desired)) = parse(&file) {
        let json = serde_json::to_string(&desired).expect("what was read can be written");
        assert_eq!(parse(&text(&digest, &json)), Some((digest, desired)));
    }
}

/// What [`desired`] begins with.
pub fn desired_seeds() -> Vec<Vec<u8>> {
    let all = [
        Desired::Agent(DesiredAgent::default()),
        Desired::ProcessServer(DesiredProcessServer::default()),
        Desired::TargetServer(DesiredTargetServer::default()),
    ];
    let file = |way: u8, desired: &Desired| {
        let json = serde_json::to_string(desired).expect("it can be written");
        [&[way][..], text("d1", &json).as_bytes()].concat()
    };
    all.iter().flat_map(|desired| [file(0, desired), file(1, desired)]).collect()
}

fn target() -> &'static Opener {
    static TARGET: OnceLock<Opener> = OnceLock::new();
    TARGET.get_or_init(|| {
        let dir = std::env::temp_dir().join(format!("seawall-fuzz-seal-{}", std::process::id()));
        std::fs::create_dir_all(&dir).expect("a directory for a file");
        let opener = Opener::open(&dir).expect("a new pair");
        // It is in memory now.
        let _ = std::fs::remove_dir_all(&dir);
        opener
    })
}

/// A group's key that somebody sealed; and the small texts that people give: addresses, fingerprints, profiles.
pub fn texts(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let group = GroupId([7; 16]);
    assert!(target().open_key(group, text).is_err(), "nobody can guess a sealed key");
    if let Some(bytes) = unhex(text) {
        assert_eq!(bytes.len() * 2, text.len());
    }
    if let Ok(sealed) = seal_key(group, text, &target().public_key()) {
        assert_eq!(*target().open_key(group, &sealed).expect("just sealed"), text.trim().to_lowercase());
    }
    let _ = seal_key(group, &"5a".repeat(32), text);
    if let Ok(url) = text.parse::<ServerUrl>() {
        assert_eq!(url.to_string().parse(), Ok(url));
    }
    if let Ok(fingerprint) = text.parse::<Fingerprint>() {
        assert_eq!(fingerprint.to_string(), text.to_lowercase());
    }
    let _ = toml::from_str::<Profile>(text);
    let _ = Fingerprint::of_pem(text);
}

/// What [`texts`] begins with.
pub fn texts_seeds() -> Vec<Vec<u8>> {
    let profile = format!(
        "server = \"https://seawall.example:7443\"\nfingerprint = \"{}\"\nuser = \"eve\"\ntoken = \"t\"\ntoken_id = \"{}\"\nexpires = 5\n",
        "0a".repeat(32),
        "0b".repeat(16)
    );
    ["5A".repeat(32).as_str(), "https://seawall.example:7443", "https://[::1]/", &profile]
        .map(|text| text.as_bytes().to_vec())
        .to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeds_are_read() {
        for seed in desired_seeds() {
            desired(&seed);
            assert!(parse(std::str::from_utf8(&seed[1..]).unwrap()).is_some());
        }
        texts_seeds().iter().for_each(|seed| texts(seed));
        assert!(toml::from_str::<Profile>(std::str::from_utf8(&texts_seeds()[3]).unwrap()).is_ok());
    }
}
