//! Agents measure the way to here before their disks are protected.

use tokio::time::timeout;
use wire::{MEASURE_WAIT_MAX, Measurement, RefusalCode};

use crate::server::Server;

/// Measurements at a time: those that go on together share the link, and each would see a part of it. Others wait for
/// [`MEASURE_WAIT_MAX`], and are refused as busy then.
pub const MEASURES_AT_ONCE: usize = 2;

/// Serves one measurement.
pub(crate) async fn serve(server: &Server, measurement: Measurement) {
    let agent = measurement.peer().to_string();
    let turn = tokio::select! {
        turn = timeout(MEASURE_WAIT_MAX, server.measuring.acquire()) => turn,
        () = server.stopping() => {
            return measurement.refuse(RefusalCode::Stopping, "measure: this process server is stopping");
        }
    };
    // It is never closed.
    let Ok(Ok(_turn)) = turn else {
        let message = format!("measure: {MEASURES_AT_ONCE} others measure, and more wait; try again later");
        return measurement.refuse(RefusalCode::Busy, &message);
    };
    tokio::select! {
        measured = measurement.take() => match measured {
            Ok(measured) => {
                tracing::info!(agent, bytes = %measured.bytes, time_us = measured.time_us, "the way to here was measured");
            }
            Err(error) => tracing::info!(agent, %error, "a measurement ended"),
        },
        () = server.stopping() => {}
    }
}
