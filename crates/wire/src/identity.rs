use std::fmt;
use std::str::FromStr;

use block::GroupId;

/// The longest name of an identity, in bytes. A longer one is refused.
pub const NAME_BYTES_MAX: usize = 64;

const SCHEME: &str = "seawall://";

/// What a component is allowed to be, bound to its certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// Captures a machine's disks and delivers changesets of its one group.
    Agent,
    /// Holds changesets of many groups and forwards them.
    ProcessServer,
    /// Applies changesets to replicas and serves points.
    TargetServer,
    /// Says who may talk to whom and what is protected; speaks HTTPS.
    ConfigServer,
    /// A person, or a program on behalf of one: asks, and reads views.
    Operator,
}

impl Role {
    /// All of them.
    pub const ALL: [Role; 5] =
        [Role::Agent, Role::ProcessServer, Role::TargetServer, Role::ConfigServer, Role::Operator];

    /// The name used in identities and configuration.
    pub const fn as_str(self) -> &'static str {
        match self {
            Role::Agent => "agent",
            Role::ProcessServer => "process-server",
            Role::TargetServer => "target-server",
            Role::ConfigServer => "config-server",
            Role::Operator => "operator",
        }
    }

    /// The DNS name in a server's certificate. Verifying it by TLS's own rules proves the role; it is never resolved
    /// (RFC 6761 reserves `.invalid`).
    pub(crate) fn dns_name(self) -> String {
        format!("{}.seawall.invalid", self.as_str())
    }

    /// Whether others connect to it.
    pub(crate) const fn is_server(self) -> bool {
        matches!(self, Role::ProcessServer | Role::TargetServer | Role::ConfigServer)
    }

    /// Whether it connects to others.
    pub(crate) const fn is_client(self) -> bool {
        // A target server connects to the config server.
        matches!(self, Role::Agent | Role::ProcessServer | Role::TargetServer | Role::Operator)
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Role {
    type Err = IdentityError;
    fn from_str(text: &str) -> Result<Role, IdentityError> {
        Role::ALL
            .into_iter()
            .find(|role| role.as_str() == text)
            .ok_or_else(|| IdentityError { text: shortened(text), why: "unknown role" })
    }
}

/// Who somebody is, as the authority wrote it into the certificate: `seawall://ROLE/NAME[?group=HEX]`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Identity {
    /// What it may be.
    pub role: Role,
    /// Its name: 1 to [`NAME_BYTES_MAX`] of letters, digits, `.`, `_` and `-`.
    pub name: String,
    /// The only group it may speak for; `None` for one that serves many.
    pub group: Option<GroupId>,
}

/// Why a text is not an identity.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("read identity {text:?}: {why}; expected seawall://ROLE/NAME[?group=HEX]")]
pub struct IdentityError {
    text: String,
    why: &'static str,
}

impl Identity {
    /// An identity that speaks for no group, or for many.
    ///
    /// # Errors
    /// When the name is empty, too long, or has other characters than letters, digits, `.`, `_` and `-`.
    pub fn new(role: Role, name: &str, group: Option<GroupId>) -> Result<Identity, IdentityError> {
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
        if name.is_empty() || name.len() > NAME_BYTES_MAX || !name.bytes().all(allowed) {
            let why = "a name is 1 to 64 letters, digits, dots, underscores and hyphens";
            return Err(IdentityError { text: shortened(name), why });
        }
        Ok(Identity { role, name: name.to_owned(), group })
    }

    /// The text in the certificate.
    pub fn to_uri(&self) -> String {
        match self.group {
            Some(group) => format!("{SCHEME}{}/{}?group={group}", self.role, self.name),
            None => format!("{SCHEME}{}/{}", self.role, self.name),
        }
    }

    /// Reads the text of a certificate. Only what [`Identity::to_uri`] writes is accepted.
    ///
    /// # Errors
    /// When it is anything else.
    pub fn from_uri(uri: &str) -> Result<Identity, IdentityError> {
        let error = |why| IdentityError { text: shortened(uri), why };
        let rest = uri.strip_prefix(SCHEME).ok_or_else(|| error("no seawall:// scheme"))?;
        let (role, rest) = rest.split_once('/').ok_or_else(|| error("no name"))?;
        let (name, group) = match rest.split_once('?') {
            None => (rest, None),
            Some((name, query)) => {
                let hex = query.strip_prefix("group=").ok_or_else(|| error("unknown parameter"))?;
                (name, Some(hex.parse().map_err(|_| error("the group is not 32 hexadecimal digits"))?))
            }
        };
        let identity = Identity::new(role.parse()?, name, group)?;
        if identity.to_uri() == uri { Ok(identity) } else { Err(error("not in canonical form")) }
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.role, self.name)
    }
}

fn shortened(text: &str) -> String {
    text.chars().take(128).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identities_survive_their_text() {
        for role in Role::ALL {
            for group in [None, Some(GroupId([0xab; 16]))] {
                let identity = Identity::new(role, "web-1.example", group).unwrap();
                assert_eq!(Identity::from_uri(&identity.to_uri()).unwrap(), identity);
            }
        }
    }

    #[test]
    fn anything_else_is_refused() {
        for bad in [
            "",
            "seawall://agent",
            "seawall://agent/",
            "seawall://root/x",
            "https://agent/x",
            "seawall://agent/a/b",
            "seawall://agent/a?group=12",
            "seawall://agent/a?group=ABABABABABABABABABABABABABABABAB",
            "seawall://agent/a?group=",
            "seawall://agent/a?other=1",
            "seawall://agent/a%20b",
        ] {
            assert!(Identity::from_uri(bad).is_err(), "{bad}");
        }
        assert!(Identity::new(Role::Agent, &"x".repeat(65), None).is_err());
    }
}
