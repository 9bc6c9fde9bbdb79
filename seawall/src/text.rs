//! How figures are shown to people.

use std::io::Write;
use std::time::Duration;

use block::{ByteCount, UnixNanos};
use comfy_table::presets::UTF8_FULL_CONDENSED;
use comfy_table::{CellAlignment, ContentArrangement, Table};

/// Writes to standard output. Unlike `println!` it does not panic when the reader has gone.
pub(crate) fn say(text: &str) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()
}

/// A table with a heading; the columns named in `right` are aligned to the right.
pub(crate) fn table(heading: &[&str], right: &[usize]) -> Table {
    let mut table = Table::new();
    table.load_preset(UTF8_FULL_CONDENSED).set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(heading.iter().copied());
    for index in right {
        if let Some(column) = table.column_mut(*index) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table
}

/// `0.4 s`, `59 s`, `12 min`, `3 h 05 min`, `2 d 04 h`.
pub(crate) fn span(time: Duration) -> String {
    let seconds = time.as_secs();
    match seconds {
        0..10 => format!("{:.1} s", time.as_secs_f64()),
        10..120 => format!("{seconds} s"),
        120..3600 => format!("{} min", seconds / 60),
        3600..86_400 => format!("{} h {:02} min", seconds / 3600, seconds / 60 % 60),
        _ => format!("{} d {:02} h", seconds / 86_400, seconds / 3600 % 24),
    }
}

/// `12 ms`, `1.9 s`: for what lasts moments.
pub(crate) fn short(time: Duration) -> String {
    match time.as_millis() {
        0..1000 => format!("{:.0} ms", time.as_secs_f64() * 1000.0),
        _ => span(time),
    }
}

/// Bytes a second.
pub(crate) fn rate(bytes_per_s: f64) -> String {
    format!("{}/s", ByteCount(bytes_per_s.max(0.0) as u64))
}

/// An instant in this machine's time zone and in UTC.
pub(crate) fn instant(time: UnixNanos) -> (String, String) {
    let Ok(timestamp) = jiff::Timestamp::from_nanosecond(i128::from(time.0)) else {
        return ("unknown".to_owned(), "unknown".to_owned());
    };
    let local = timestamp.to_zoned(jiff::tz::TimeZone::system());
    (
        local.strftime("%Y-%m-%d %H:%M:%S%.3f %Z").to_string(),
        timestamp.strftime("%Y-%m-%dT%H:%M:%S%.3fZ").to_string(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans() {
        let cases = [
            (0, "0.0 s"),
            (9_940, "9.9 s"),
            (10_000, "10 s"),
            (119_999, "119 s"),
            (120_000, "2 min"),
            (3_900_000, "1 h 05 min"),
            (187_200_000, "2 d 04 h"),
        ];
        for (ms, expected) in cases {
            assert_eq!(span(Duration::from_millis(ms)), expected);
        }
    }

    #[test]
    fn moments() {
        assert_eq!(short(Duration::from_micros(12_300)), "12 ms");
        assert_eq!(short(Duration::from_millis(1_940)), "1.9 s");
    }

    #[test]
    fn instants_have_utc() {
        assert_eq!(instant(UnixNanos(1_700_000_000_123_456_789)).1, "2023-11-14T22:13:20.123Z");
        assert_eq!(rate(1536.0), "1.5 KiB/s");
    }
}
