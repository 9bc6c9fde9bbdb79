use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// The port of a config server, when an address names none.
const PORT: u16 = 7443;

/// Where a config server is: `https://HOST[:PORT]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerUrl {
    host: String,
    port: u16,
}

/// A text that is no address of a config server.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "use the config server {0:?}: expected https://HOST or https://HOST:PORT, as in https://seawall.example:7443"
)]
pub struct ServerUrlError(String);

impl ServerUrl {
    /// For a connection, `host:port`.
    pub fn address(&self) -> String {
        format!("{}:{}", self.host, self.port)
    }
}

impl fmt::Display for ServerUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "https://{}:{}", self.host, self.port)
    }
}

impl FromStr for ServerUrl {
    type Err = ServerUrlError;
    fn from_str(text: &str) -> Result<ServerUrl, ServerUrlError> {
        let error = || ServerUrlError(text.chars().take(200).collect());
        let place = text.strip_prefix("https://").ok_or_else(error)?.trim_end_matches('/');
        let (host, port) = match place.rsplit_once(':') {
            // The colons of an address in brackets are its own.
            Some((host, port)) if !port.ends_with(']') => (host, port.parse().map_err(|_| error())?),
            _ => (place, PORT),
        };
        let bracketed = host.starts_with('[') && host.ends_with(']');
        let inside = host.trim_start_matches('[').trim_end_matches(']');
        let fits = |byte: u8| {
            byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-') || (bracketed && byte == b':')
        };
        if port == 0 || inside.is_empty() || host.len() > 255 || !inside.bytes().all(fits) {
            return Err(error());
        }
        Ok(ServerUrl { host: host.to_owned(), port })
    }
}

impl Serialize for ServerUrl {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for ServerUrl {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_strictly() {
        let read = |text: &str| text.parse::<ServerUrl>().map(|url| url.address());
        assert_eq!(read("https://a.example").unwrap(), "a.example:7443");
        assert_eq!(read("https://a.example:1/").unwrap(), "a.example:1");
        assert_eq!(read("https://[::1]:9").unwrap(), "[::1]:9");
        assert_eq!(read("https://[::1]").unwrap(), "[::1]:7443");
        for bad in [
            "http://a",
            "a:1",
            "https://",
            "https://a:0",
            "https://a:x",
            "https://a/b",
            "https://a b",
            "https://u@a",
        ] {
            assert!(read(bad).is_err(), "{bad}");
        }
    }
}
