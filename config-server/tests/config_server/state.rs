use control::fleet::{MachineInfo, Page, PartRole, Role, UserInfo};
use seawall_config_server::{Config, ConfigServer, backup, restore};
use serde_json::Value;

use crate::support::{Site, on_both, problem, site};

on_both! { everything_survives_a_restart_and_a_backup }

async fn everything_survives_a_restart_and_a_backup(mut site: Site) {
    site.make_user("vera", Role::Viewer).await;
    let state = site.enrol(PartRole::Agent, "web").await;
    let out = site.base.path().join("fleet.backup");
    let rows = backup(&site.config, &out).await.unwrap();
    assert!(rows > 10);
    // Never over another one.
    assert!(backup(&site.config, &out).await.is_err());
    site.stop().await;
    site.start().await;
    let machines: Page<MachineInfo> = site.administrator().await.get("/machines").await.unwrap();
    assert_eq!(machines.items[0].name.as_str(), "web");

    // A damaged backup is refused by name, and changes nothing.
    let other = site.base.path().join("other");
    let config = Config {
        database: site.empty_database(),
        authority: other.join("ca"),
        credentials: other.join("credentials"),
        ..site.config.clone()
    };
    let whole = std::fs::read(&out).unwrap();
    let damaged = site.base.path().join("damaged");
    for (bytes, named) in [
        (whole[..whole.len() - 1].to_vec(), "not whole"),
        (whole[..whole.len() / 2].to_vec(), "whole"),
        (String::from_utf8(whole.clone()).unwrap().replacen("vera", "eve", 1).into_bytes(), "checksum"),
        (b"{}\n".to_vec(), "no backup"),
    ] {
        std::fs::write(&damaged, bytes).unwrap();
        let error = format!("{:#}", restore(&config, &damaged).await.unwrap_err());
        assert!(error.contains(named), "{error}");
    }
    assert_eq!(restore(&config, &out).await.unwrap(), rows);
    let error = format!("{:#}", restore(&config, &out).await.unwrap_err());
    assert!(error.contains("in use"), "{error}");
    site.stop().await;
    site.config = config;
    let server = ConfigServer::start(site.config.clone()).await.unwrap();
    site.server = Some(server);
    // People and parts come back as if nothing had been.
    let users: Page<UserInfo> = site.administrator().await.get("/users").await.unwrap();
    assert_eq!(users.items.len(), 2);
    let said = control::fleet::CheckIn::default();
    site.part(&state).post::<_, Value>("/part/check-in", &said).await.unwrap();
}

#[tokio::test]
async fn another_authority_is_refused() {
    let site = site().await;
    let other = crate::support::site().await;
    let state = other.enrol(PartRole::Agent, "web").await;
    let credentials = wire::Credentials::load(&state.join(enrol::CURRENT)).unwrap();
    let client = enrol::Client::new(site.url.clone(), &other.trust(), Some(&credentials), None).unwrap();
    let error = client.get::<Value>("/health").await.unwrap_err();
    assert!(matches!(error, enrol::EnrolError::Tls { .. }), "{error}");
    assert_eq!(problem(site.stranger().get::<Value>("/nothing").await).code, "not-found");
}
