//! Values in words.

use block::{ByteCount, UnixNanos};
use control::fleet::UnixMillis;
use control::{Severity, StateCode};
use maud::{Markup, html};

/// Bytes, in binary units.
pub(super) fn bytes(bytes: u64) -> String {
    ByteCount(bytes).to_string()
}

/// A rate.
pub(super) fn rate(bytes_s: f64) -> String {
    format!("{}/s", ByteCount(bytes_s.max(0.0) as u64))
}

/// A span as people say it: one unit, or two where one says little.
pub(super) fn span(ms: i64) -> String {
    let ms = ms.max(0);
    let seconds = ms / 1000;
    match seconds {
        _ if ms < 1000 => format!("{ms} ms"),
        0..10 => format!("{:.1} s", ms as f64 / 1000.0),
        10..120 => format!("{seconds} s"),
        120..7200 => format!("{} min", seconds / 60),
        7200..172_800 => format!("{} h {} min", seconds / 3600, seconds % 3600 / 60),
        _ => format!("{} days", seconds / 86_400),
    }
}

/// A number with spaces between thousands.
pub(super) fn number(value: u64) -> String {
    let digits = value.to_string();
    let mut shown = String::with_capacity(digits.len() + digits.len() / 3);
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place).is_multiple_of(3) {
            shown.push('\u{202f}');
        }
        shown.push(digit);
    }
    shown
}

/// `1 point`, `2 points`.
pub(super) fn count(value: u64, one: &str, many: &str) -> String {
    format!("{} {}", number(value), if value == 1 { one } else { many })
}

/// Of nanoseconds, what pages count in.
pub(super) fn millis(time: UnixNanos) -> UnixMillis {
    UnixMillis::from(time)
}

/// Year, month and day of a day since 1970, in the Gregorian calendar (Howard Hinnant's algorithm).
fn civil(days: i64) -> (i64, i64, i64) {
    let shifted = days + 719_468;
    let era = shifted.div_euclid(146_097);
    let of_era = shifted.rem_euclid(146_097);
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    (year_of_era + era * 400 + i64::from(month <= 2), month, day)
}

/// An instant in UTC, as `2026-01-31T23:59:59` with this between day and time.
pub(super) fn utc(time: UnixMillis, between: char) -> String {
    let (days, in_day) = (time.0.div_euclid(86_400_000), time.0.rem_euclid(86_400_000) / 1000);
    let (year, month, day) = civil(days);
    let (hour, minute, second) = (in_day / 3600, in_day % 3600 / 60, in_day % 60);
    format!("{year:04}-{month:02}-{day:02}{between}{hour:02}:{minute:02}:{second:02}")
}

/// An instant. The page's script writes it in the viewer's zone; without it, it stays in UTC.
pub(super) fn moment(time: UnixMillis) -> Markup {
    html! { time datetime=(format!("{}Z", utc(time, 'T'))) data-moment { (utc(time, ' ')) " UTC" } }
}

/// How long ago an instant is; the page's script counts on.
pub(super) fn ago(time: UnixMillis) -> Markup {
    let text = format!("{} ago", span(UnixMillis::now().since(time)));
    html! { time datetime=(format!("{}Z", utc(time, 'T'))) data-ago=(time.0) { (text) } }
}

/// An instant, and how long ago that is.
pub(super) fn when(time: UnixMillis) -> Markup {
    html! { (moment(time)) " " span.quiet { "(" (ago(time)) ")" } }
}

/// An instant to come.
pub(super) fn until(time: UnixMillis) -> Markup {
    let left = time.since(UnixMillis::now());
    html! { (moment(time)) " " span.quiet { @if left > 0 { "(in " (span(left)) ")" } @else { "(over)" } } }
}

/// What a severity looks like besides its colour, which not everybody sees.
pub(super) fn sign(severity: Severity) -> (&'static str, &'static str) {
    match severity {
        Severity::Good => ("good", "✓"),
        Severity::Notice => ("notice", "!"),
        Severity::Trouble => ("trouble", "✕"),
    }
}

/// A word with its severity.
pub(super) fn badge(severity: Severity, text: &str) -> Markup {
    let (class, sign) = sign(severity);
    html! { span.badge.(class) { span aria-hidden="true" { (sign) } " " (text) } }
}

/// A state with its meaning for whoever points at it.
pub(super) fn state(code: StateCode) -> Markup {
    let (class, sign) = sign(code.severity());
    html! {
        span.badge.(class) title=(code.meaning()) { span aria-hidden="true" { (sign) } " " (readable(code.code())) }
    }
}

/// `catching-up` as people write it.
pub(super) fn readable(code: &str) -> String {
    code.replace('-', " ")
}

/// A text for one parameter of a query.
pub(super) fn in_query(text: &str) -> String {
    let mut query = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' | b'/' => {
                query.push(byte as char)
            }
            _ => query.push_str(&format!("%{byte:02X}")),
        }
    }
    query
}

/// A word for a shell.
pub(super) fn shell(word: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_./:=@,+%".contains(&byte);
    if !word.is_empty() && word.bytes().all(plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instants_are_written_in_utc() {
        for (ms, text) in [
            (0, "1970-01-01 00:00:00"),
            (951_782_400_000, "2000-02-29 00:00:00"),
            (1_767_225_599_999, "2025-12-31 23:59:59"),
            (-1, "1969-12-31 23:59:59"),
            (4_107_542_400_000, "2100-03-01 00:00:00"),
        ] {
            assert_eq!(utc(UnixMillis(ms), ' '), text);
        }
    }

    #[test]
    fn values_read_as_people_say_them() {
        let spans = [(-5, "0 ms"), (999, "999 ms"), (1500, "1.5 s"), (119_000, "119 s"), (120_000, "2 min")];
        for (ms, text) in spans {
            assert_eq!(span(ms), text);
        }
        assert_eq!(span(7_260_000), "2 h 1 min");
        assert_eq!(span(3 * 86_400_000), "3 days");
        assert_eq!(number(1_234_567), "1\u{202f}234\u{202f}567");
        assert_eq!(number(12), "12");
    }

    /// A command that is copied does what the page says, whatever a disk is called.
    #[test]
    fn words_for_a_shell_are_one_word() {
        assert_eq!(shell("/dev/vda"), "/dev/vda");
        for word in ["", "a b", "$(reboot)", "it's", "a;b", "`x`"] {
            let output =
                std::process::Command::new("sh").arg("-c").arg(format!("printf %s {}", shell(word))).output();
            assert_eq!(String::from_utf8(output.unwrap().stdout).unwrap(), word);
        }
        assert_eq!(in_query("/a?b=c&d"), "/a%3Fb%3Dc%26d");
    }
}
