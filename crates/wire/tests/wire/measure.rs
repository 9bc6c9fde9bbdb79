//! Measuring the way to a server.

use block::ByteCount;
use wire::{
    Credentials, MEASURE_BYTES_MAX, Measured, Opening, Purpose, RefusalCode, Role, WireError, connect_for,
};

use super::{Site, open};

async fn measure(addr: &str, credentials: &Credentials) -> Result<Measured, WireError> {
    wire::measure(connect_for(Purpose::Measure, addr, Role::TargetServer, credentials).await?).await
}

#[tokio::test]
async fn both_sides_know_what_came() {
    let site = Site::new();
    let (listener, addr) = site.server().await;
    let agent = site.agent();
    let server = async {
        let Opening::Measure(measurement) = open(&listener).await.unwrap() else { panic!("no measurement") };
        assert_eq!(measurement.peer().role, Role::Agent);
        measurement.take().await.unwrap()
    };
    let (told, counted) = tokio::join!(measure(&addr, &agent), server);
    let told = told.unwrap();
    assert_eq!(told, counted);
    // All but the piece with which the time begins.
    assert_eq!(told.bytes, ByteCount(MEASURE_BYTES_MAX.get() - 32 * 1024));
    assert!(told.bytes_per_s() > 0);
}

#[tokio::test]
async fn only_agents_measure_and_a_refusal_says_why() {
    let site = Site::new();
    let (listener, addr) = site.server().await;
    for credentials in [site.operator(), site.issue(Role::ProcessServer, "hub", None)] {
        let (told, opened) = tokio::join!(measure(&addr, &credentials), open(&listener));
        for error in [told.unwrap_err(), opened.err().unwrap()] {
            assert_eq!(error.refusal(), Some(RefusalCode::Unauthorised), "{error}");
            assert!(error.to_string().contains("may not measure"), "{error}");
        }
    }
    let agent = site.agent();
    let server = async {
        let Opening::Measure(measurement) = open(&listener).await.unwrap() else { panic!("no measurement") };
        measurement.refuse(RefusalCode::Busy, "measure: others do");
    };
    let (told, ()) = tokio::join!(measure(&addr, &agent), server);
    let error = told.unwrap_err();
    assert!(error.is_retryable() && error.to_string() == "refused (busy): measure: others do", "{error}");
}
