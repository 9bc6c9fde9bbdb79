use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{ResourceId, UnixMillis};

/// Receivers of each kind. More are refused.
pub const RECEIVERS_MAX: usize = 16;

super::names! {
    /// What is wrong.
    AlertKind {
        /// A group's newest recovery point is older than its policy allows.
        PointAge "point-age"
        /// A group has had no application-consistent point for longer than it may.
        ApplicationPointAge "application-point-age"
        /// A group's disks must be compared with their replicas, and that waits.
        Resync "resync"
        /// A group or a part needs a person.
        Trouble "trouble"
        /// A process server's cache is filling.
        Cache "cache"
        /// A target server's store is filling.
        Store "store"
        /// A group's machine did not come up when that was tried last.
        Proof "proof"
        /// A certificate ends soon and was not renewed.
        Certificate "certificate"
        /// A part does not report.
        Silent "silent"
    }
}

/// Something that somebody should be told of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct AlertInfo {
    /// Names it.
    pub id: ResourceId,
    /// What is wrong.
    pub kind: AlertKind,
    /// How much it matters: notice or trouble.
    pub severity: String,
    /// With what, as in `groups/ID`.
    pub subject: String,
    /// What is wrong, in a sentence.
    pub message: String,
    /// What to do about it.
    pub mend: String,
    /// Since when.
    pub raised: UnixMillis,
    /// When it was over; left out while it is not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cleared: Option<UnixMillis>,
}

/// When somebody is told, and who.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct AlertSettings {
    /// So long without an application-consistent point is told of, in seconds; 0 for never. Groups whose policy takes none do not
    /// count.
    #[schema(maximum = 31_536_000)]
    pub application_point_age_s: u64,
    /// A cache fuller than this is told of, in percent.
    #[schema(minimum = 1, maximum = 100)]
    pub cache_used_percent: u8,
    /// A store with less free than this is told of, in percent.
    #[schema(maximum = 99)]
    pub store_free_percent: u8,
    /// A certificate that ends within so many days is told of. Parts renew theirs by themselves, so this means that one cannot.
    #[schema(maximum = 365)]
    pub certificate_days: u16,
    /// Told by HTTP: a POST with JSON for each alert that is raised or cleared.
    #[schema(max_items = 16)]
    pub webhooks: Vec<Webhook>,
    /// Told by e-mail.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mail: Option<Mail>,
}

impl Default for AlertSettings {
    fn default() -> AlertSettings {
        AlertSettings {
            application_point_age_s: 0,
            cache_used_percent: 80,
            store_free_percent: 10,
            certificate_days: 7,
            webhooks: Vec::new(),
            mail: None,
        }
    }
}

/// Somebody who is told by HTTP.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Webhook {
    /// http:// or https://; for https the machine's own list of authorities counts.
    #[schema(min_length = 10, max_length = 1000, pattern = "^https?://")]
    pub url: String,
}

/// How e-mail is sent.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Mail {
    /// The mail server's name.
    #[schema(min_length = 1, max_length = 255)]
    pub server: String,
    /// Its port.
    pub port: u16,
    /// How the way there is protected.
    pub security: MailSecurity,
    /// Who logs in there; nobody when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(max_length = 255)]
    pub user: Option<String>,
    /// The password. Never told again; when left out the one from before stays, if server and user are the same.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(max_length = 1024)]
    pub password: Option<String>,
    /// The sender's address.
    #[schema(min_length = 3, max_length = 255)]
    pub from: String,
    /// The receivers' addresses.
    #[schema(min_items = 1, max_items = 16)]
    pub to: Vec<String>,
}

impl std::fmt::Debug for Mail {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "mail to {:?} through {}:{}", self.to, self.server, self.port)
    }
}

super::names! {
    /// How the way to a mail server is protected.
    MailSecurity {
        /// TLS from the beginning.
        Tls "tls"
        /// TLS after STARTTLS, which must be offered.
        Starttls "starttls"
        /// Not at all: for a mail server on the same machine.
        None "none"
    }
}
