//! The way from the agent to the process server: whether it is there, and whether it carries what the disks write.

use std::time::Duration;

use block::ByteCount;
use control::fleet::StepState;
use serde_json::Value;

/// From here on a link is warned of, in percent: what the disks write, of what comes through.
pub(super) const CHURN_WARNED_PERCENT: u64 = 70;
/// From here on a link is refused, in percent. What is overwritten within an epoch is sent once, and compressed: seldom to less
/// than a quarter; a link that would need more than that never catches up.
pub(super) const CHURN_REFUSED_PERCENT: u64 = 400;

const MEND_WAY: &str =
    "Let its port through, or give the process server an address that the machine reaches.";
const MEND_TRUST: &str = "Look at both sides' certificates and clocks: `seawall server list`, the agent's log. Enrol again what has no valid one.";
const MEND_SLOW: &str = "Give the machine a faster way to a process server, name one that is nearer (--process-server), or raise the policy's bandwidth.";

/// What a check has found: the state, what was found, and the mend.
pub(super) type Found = (StepState, String, String);

/// `link: {reached, ms, error, refused}` of the agent.
pub(super) fn reached(link: &Value) -> Found {
    let error = link["error"].as_str().unwrap_or("it says nothing of it");
    match (link["reached"].as_bool(), link["refused"].as_bool()) {
        (Some(true), Some(true)) => {
            let message = format!("The agent and the process server do not accept each other: {error}");
            (StepState::Failed, message, MEND_TRUST.to_owned())
        }
        (Some(true), _) => {
            let ms = link["ms"].as_f64().unwrap_or_default();
            (StepState::Passed, format!("Reached in {ms:.0} ms."), String::new())
        }
        _ => {
            let message = format!("The agent does not reach the process server: {error}");
            (StepState::Failed, message, MEND_WAY.to_owned())
        }
    }
}

/// `bandwidth: {bytes, time_us, bytes_per_s, error, older}` of the agent, and of each disk `bytes` and `written_bytes_per_s`.
/// `limit` is what the policy lets pass, in bytes a second.
pub(super) fn carries(checked: &Value, limit: Option<u64>) -> Found {
    let bandwidth = &checked["bandwidth"];
    let upgrade = |who: &str| {
        let message = format!("Not measured: the {who} is older, and cannot.");
        (StepState::Skipped, message, format!("Upgrade the {who}."))
    };
    if bandwidth.is_null() {
        return upgrade("agent");
    }
    if bandwidth["older"] == true {
        return upgrade("process server");
    }
    let Some(measured) = bandwidth["bytes_per_s"].as_u64() else {
        let error = bandwidth["error"].as_str().unwrap_or("the agent says nothing of it");
        let mend = "Look at the process server's log, and ask again.".to_owned();
        return (StepState::Warned, format!("Not measured: {error}"), mend);
    };
    if measured == 0 {
        let time = Duration::from_micros(bandwidth["time_us"].as_u64().unwrap_or_default());
        let message = format!("Next to nothing came through in {:.1} s.", time.as_secs_f64());
        return (StepState::Failed, message, MEND_SLOW.to_owned());
    }
    let rate = limit.map_or(measured, |limit| measured.min(limit)).max(1);
    let per_s = |bytes: u64| format!("{}/s", ByteCount(bytes));
    let mut message = format!("{} came through", per_s(measured));
    if rate < measured {
        message += &format!(", and the policy lets {} pass", per_s(rate));
    }
    let disks = checked["disks"].as_array().map(Vec::as_slice).unwrap_or_default();
    let written: Option<u64> = disks.iter().map(|disk| disk["written_bytes_per_s"].as_u64()).sum();
    let bytes: u64 = disks.iter().filter_map(|disk| disk["bytes"].as_u64()).sum();
    message += &match written {
        Some(written) => format!("; the disks were written with {} in the last minutes.", per_s(written)),
        None => "; how much is written to the disks is not known yet.".to_owned(),
    };
    let copy = span(Duration::from_secs_f64(bytes as f64 / rate as f64));
    message +=
        &format!(" The first copy of {} takes about {copy}, less where it compresses.", ByteCount(bytes));
    let share = u128::from(written.unwrap_or(0)) * 100 / u128::from(rate);
    let state = match share {
        share if share >= u128::from(CHURN_REFUSED_PERCENT) => StepState::Failed,
        share if share >= u128::from(CHURN_WARNED_PERCENT) => StepState::Warned,
        _ => return (StepState::Passed, message, String::new()),
    };
    message += &format!(" They need up to {share} % of the way, so that points get old while they write so.");
    (state, message, MEND_SLOW.to_owned())
}

/// `59 s`, `12 min`, `3 h 05 min`, `2 d 04 h`.
fn span(time: Duration) -> String {
    match time.as_secs() {
        seconds @ 0..120 => format!("{} s", seconds.max(1)),
        seconds @ 120..3600 => format!("{} min", seconds / 60),
        seconds @ 3600..86_400 => format!("{} h {:02} min", seconds / 3600, seconds / 60 % 60),
        seconds => format!("{} d {:02} h", seconds / 86_400, seconds / 3600 % 24),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const MIB: u64 = 1 << 20;

    fn found(per_s: u64, written: Option<u64>, limit: Option<u64>) -> Found {
        let disk = |written: Option<u64>| json!({ "bytes": 60 * 100 * MIB, "written_bytes_per_s": written });
        let disks = [disk(written), disk(written.map(|_| 0))];
        let bandwidth = json!({ "bytes": per_s, "time_us": 1_000_000, "bytes_per_s": per_s });
        carries(&json!({ "disks": disks, "bandwidth": bandwidth }), limit)
    }

    #[test]
    fn what_is_written_is_compared_with_what_comes_through() {
        for (written, state) in [
            (None, StepState::Passed),
            (Some(0), StepState::Passed),
            (Some(69 * MIB), StepState::Passed),
            (Some(70 * MIB), StepState::Warned),
            (Some(399 * MIB), StepState::Warned),
            (Some(400 * MIB), StepState::Failed),
            (Some(u64::MAX), StepState::Failed),
        ] {
            let (found, message, mend) = found(100 * MIB, written, None);
            assert_eq!(found, state, "{message}");
            assert_eq!(mend.is_empty(), state == StepState::Passed, "{mend}");
            assert!(message.contains("100.0 MiB/s came through"), "{message}");
        }
        let (_, message, _) = found(100 * MIB, Some(70 * MIB), None);
        assert!(
            message.contains("70.0 MiB/s in the last minutes") && message.contains("up to 70 %"),
            "{message}"
        );
    }

    #[test]
    fn the_first_copy_takes_as_long_as_the_narrower_of_way_and_policy_makes_it() {
        let (state, message, _) = found(100 * MIB, Some(8 * MIB), None);
        assert!(state == StepState::Passed && message.contains("takes about 2 min"), "{message}");
        let (state, message, mend) = found(100 * MIB, Some(8 * MIB), Some(10 * MIB));
        assert!(
            message.contains("the policy lets 10.0 MiB/s pass") && message.contains("about 20 min"),
            "{message}"
        );
        assert!(state == StepState::Warned && mend.contains("policy"), "{mend}");
        // A wide policy makes no link wider.
        let (_, message, _) = found(MIB, Some(0), Some(u64::MAX));
        assert!(message.contains("about 3 h 20 min") && !message.contains("policy"), "{message}");
    }

    #[test]
    fn what_was_not_measured_is_not_called_good() {
        let of = |bandwidth: Value| carries(&json!({ "disks": [], "bandwidth": bandwidth }), None);
        assert_eq!(of(Value::Null).0, StepState::Skipped);
        assert_eq!(of(json!({ "older": true, "error": "x" })).2, "Upgrade the process server.");
        let (state, message, _) = of(json!({ "error": "refused (busy): others measure" }));
        assert!(state == StepState::Warned && message.contains("others measure"), "{message}");
        assert_eq!(of(json!({ "bytes_per_s": 0, "bytes": 0, "time_us": 2_000_000 })).0, StepState::Failed);
    }

    #[test]
    fn who_is_not_reached_and_who_is_not_accepted_have_different_mends() {
        assert_eq!(reached(&json!({ "reached": true, "ms": 1.2 })).0, StepState::Passed);
        for (link, mend) in [
            (json!({ "reached": false, "error": "connect to x: no answer" }), MEND_WAY),
            (json!({ "reached": true, "refused": true, "error": "of another authority" }), MEND_TRUST),
            (Value::Null, MEND_WAY),
        ] {
            let found = reached(&link);
            assert_eq!((found.0, found.2.as_str()), (StepState::Failed, mend));
            assert!(found.1.contains(link["error"].as_str().unwrap_or("says nothing")), "{}", found.1);
        }
    }
}
