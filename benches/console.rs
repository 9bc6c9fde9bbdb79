//! How soon the console's pages are painted, on loopback, in headless Chromium: the first contentful paint, by the browser's own
//! clock, from the moment the page was asked for. First with one machine, then with 2,000 that report every 5 s (quick: 200).
//!
//! The config server and its machines are those of the bench `fleet`; the aim is a second for every page. What is kept of a page is the
//! slowest of its loads.

use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use control::fleet::{GroupInfo, Page, PartRole};
use seawall_benches::fleet::{Meter, World};
use seawall_benches::site::{self, PASSWORD};
use seawall_benches::{quick, result};
use seawall_tests::browser::{Browser, ENTER, TAB};

/// What the aim allows.
const PAINT_AIM: Duration = Duration::from_secs(1);
/// How often each page is loaded.
const LOADS: usize = 5;
/// So that the fleet reports as it does all the time.
const WARM_UP: Duration = Duration::from_secs(10);

fn main() -> anyhow::Result<()> {
    site::run(measure())
}

async fn measure() -> anyhow::Result<()> {
    let machines = if quick() { 200 } else { 2000 };
    let base = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    let (server, site) = site::start(base.path()).await?;
    let client = site.client().await?;
    let (world, meter) = (World::new(), std::sync::Arc::new(Meter::default()));
    site::allow_rpo(&client).await?;
    for (role, name) in [(PartRole::TargetServer, "target"), (PartRole::ProcessServer, "process")] {
        site.join(&client, role, name, &world, &meter).await?;
    }
    site.join_machines(0..1, &world, &meter).await?;
    // A protection is refused before the servers have said where they are.
    tokio::time::sleep(WARM_UP).await;
    site::protect_all(&client, 1).await?;

    let browser = Browser::start()?;
    let url = server.url.to_string();
    browser.open(&format!("{url}/login"))?;
    show("login", 1, &[first_paint(&browser)?])?;
    browser.press(&format!("admin{TAB}{PASSWORD}{ENTER}"))?;
    browser.find("a[href='/settings']")?;
    let groups: Page<GroupInfo> = client.get("/groups").await?;
    let group = groups.items.first().context("there are no groups")?;
    let (group, machine) = (format!("/groups/{}", group.id), format!("/machines/{}", group.machine));
    let pages = [
        ("overview", "/"),
        ("group", group.as_str()),
        ("machine", machine.as_str()),
        ("machines", "/machines"),
        ("jobs", "/jobs"),
        ("events", "/events"),
    ];
    let others = [
        ("servers", "/servers"),
        ("policies", "/policies"),
        ("enrol", "/enrol"),
        ("approvals", "/approvals"),
        ("users", "/users"),
        ("audit", "/audit"),
        ("settings", "/settings"),
        ("alerts", "/settings/alerts"),
    ];
    for (name, path) in pages.iter().chain(&others) {
        show(name, 1, &paints(&browser, &format!("{url}{path}"))?)?;
    }

    let began = Instant::now();
    site.join_machines(1..machines, &world, &meter).await?;
    site::protect_all(&client, machines).await?;
    println!("console: {machines} machines protected after {:.0} s", began.elapsed().as_secs_f64());
    tokio::time::sleep(WARM_UP).await;
    for (name, path) in pages {
        show(name, machines, &paints(&browser, &format!("{url}{path}"))?)?;
    }
    let complaints = browser.complaints()?;
    ensure!(complaints.is_empty(), "the browser complains: {complaints:#?}");
    Ok(())
}

/// Loads a page several times; when it was painted, in milliseconds.
fn paints(browser: &Browser, url: &str) -> anyhow::Result<Vec<f64>> {
    let load = |_| {
        browser.open(url)?;
        browser.find("h1")?;
        // Not the login's page in its place.
        let shown = browser.run("return location.href")?;
        ensure!(shown == url, "{url} was asked for, and {shown} came");
        first_paint(browser)
    };
    (0..LOADS).map(load).collect()
}

fn first_paint(browser: &Browser) -> anyhow::Result<f64> {
    let script = "return performance.getEntriesByName('first-contentful-paint')[0]?.startTime";
    browser.until("the first paint", || browser.run(script).ok()?.as_f64())
}

fn show(page: &str, machines: usize, paints: &[f64]) -> anyhow::Result<()> {
    let slowest = paints.iter().copied().fold(0.0, f64::max);
    let name = format!("console_{page}_{machines}");
    result(&name, PAINT_AIM.as_secs_f64() * 1e3, "ms allowed", slowest)
}
