use std::str::FromStr;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

/// How log lines look. They go to standard error.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Format {
    /// For people; coloured on a terminal.
    #[default]
    Human,
    /// One JSON object a line.
    Json,
}

/// Why logging did not start.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The filter is not one.
    #[error("read log filter {filter:?}: {source}; expected for example `info` or `info,wire=debug`")]
    Filter {
        /// What was given.
        filter: String,
        /// What is wrong with it.
        source: tracing_subscriber::filter::ParseError,
    },
    /// It was started before in this process.
    #[error("start logging: it was started before")]
    Started,
    /// A format of another name.
    #[error("read log format {0:?}: expected `human` or `json`")]
    Format(String),
}

impl FromStr for Format {
    type Err = LogError;
    fn from_str(text: &str) -> Result<Format, LogError> {
        match text {
            "human" => Ok(Format::Human),
            "json" => Ok(Format::Json),
            other => Err(LogError::Format(other.chars().take(64).collect())),
        }
    }
}

/// Starts logging for the process: what `filter` lets through (as in `RUST_LOG`: `info,wire=debug`), to standard error.
///
/// # Errors
/// When the filter cannot be read, or logging was started before.
pub fn init(format: Format, filter: &str) -> Result<(), LogError> {
    let filter = EnvFilter::try_new(filter)
        .map_err(|source| LogError::Filter { filter: filter.to_owned(), source })?;
    let registry = tracing_subscriber::registry().with(filter);
    let started = match format {
        Format::Human => {
            let colours = std::io::IsTerminal::is_terminal(&std::io::stderr());
            let layer = tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_ansi(colours);
            registry.with(layer).try_init()
        }
        Format::Json => {
            let layer =
                tracing_subscriber::fmt::layer().json().flatten_event(true).with_writer(std::io::stderr);
            registry.with(layer).try_init()
        }
    };
    started.map_err(|_| LogError::Started)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_filter_is_named_and_a_second_start_refused() {
        let error = init(Format::Json, "wire=loud=quiet").unwrap_err();
        assert!(error.to_string().contains("wire=loud=quiet"), "{error}");
        init(Format::Human, "off").unwrap();
        assert!(matches!(init(Format::Human, "off"), Err(LogError::Started)));
    }
}
