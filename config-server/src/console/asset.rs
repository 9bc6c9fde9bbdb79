//! The files that pages load, in the binary. Their addresses have their content's hash, so that browsers may keep them.

use std::sync::LazyLock;

use axum::extract::Path;
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE};
use axum::response::{IntoResponse, Response};

use super::no_page;
use crate::fault::Answer;

/// Hexadecimal digits of the hash in an address.
const HASH_DIGITS: usize = 12;

struct Asset {
    name: &'static str,
    kind: &'static str,
    bytes: &'static [u8],
}

const JAVASCRIPT: &str = "text/javascript; charset=utf-8";
const CSS: &str = "text/css; charset=utf-8";

/// Which version of what is vendored, and under which licence: assets/vendor/README.md.
const ASSETS: [Asset; 8] = [
    Asset { name: "style.css", kind: CSS, bytes: include_bytes!("../../assets/style.css") },
    Asset { name: "theme.js", kind: JAVASCRIPT, bytes: include_bytes!("../../assets/theme.js") },
    Asset { name: "console.js", kind: JAVASCRIPT, bytes: include_bytes!("../../assets/console.js") },
    Asset { name: "charts.js", kind: JAVASCRIPT, bytes: include_bytes!("../../assets/charts.js") },
    Asset { name: "icon.svg", kind: "image/svg+xml", bytes: include_bytes!("../../assets/icon.svg") },
    Asset {
        name: "htmx.js",
        kind: JAVASCRIPT,
        bytes: include_bytes!("../../assets/vendor/htmx-4.0.1.min.js"),
    },
    Asset {
        name: "uPlot.js",
        kind: JAVASCRIPT,
        bytes: include_bytes!("../../assets/vendor/uPlot-1.6.32.iife.min.js"),
    },
    Asset { name: "uPlot.css", kind: CSS, bytes: include_bytes!("../../assets/vendor/uPlot-1.6.32.min.css") },
];

static HASHES: LazyLock<Vec<String>> = LazyLock::new(|| {
    ASSETS.iter().map(|asset| blake3::hash(asset.bytes).to_hex()[..HASH_DIGITS].to_owned()).collect()
});

/// Where a file is.
pub(super) fn address(name: &str) -> String {
    let place = ASSETS.iter().position(|asset| asset.name == name);
    let hash = place.map_or("", |place| HASHES[place].as_str());
    format!("/assets/{hash}-{name}")
}

pub(super) async fn serve(Path(asked): Path<String>) -> Answer<Response> {
    let found = asked.split_once('-').and_then(|(hash, name)| {
        let place = ASSETS.iter().position(|asset| asset.name == name)?;
        (HASHES[place] == hash).then(|| &ASSETS[place])
    });
    // Another hash is of another version's page: it is to load itself anew, and not to mix versions.
    let asset = found.ok_or_else(|| no_page(&asked))?;
    let heads = [(CONTENT_TYPE, asset.kind), (CACHE_CONTROL, "public, max-age=31536000, immutable")];
    Ok((heads, asset.bytes).into_response())
}
