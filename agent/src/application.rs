//! `[application]`: when points are taken that more than a power cut could have left, and how.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use block::Consistency;
use serde::Deserialize;

/// The shortest and the longest time between two scheduled points, in seconds; 0 means that none are scheduled.
pub const EVERY_S: (u64, u64) = (10, 31 * 86_400);
/// The shortest and the longest time that filesystems may be frozen, in milliseconds.
pub const BUDGET_MS: (u64, u64) = (50, 60_000);
/// The shortest and the longest time that one run of a hook may take, in milliseconds.
pub const HOOK_TIMEOUT_MS: (u64, u64) = (100, 600_000);
/// Variables that `[application.environment]` may give to hooks. More are refused.
pub const ENVIRONMENT_MAX: usize = 256;

/// `[application]`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ApplicationSection {
    /// Between two scheduled points, in seconds; 0 for none.
    pub every_s: u64,
    /// What a scheduled point should be: application or filesystem.
    pub consistency: Consistency,
    /// How long filesystems may be frozen.
    pub budget_ms: u64,
    /// Directory of the hooks. Relative to the configuration file.
    pub hooks: PathBuf,
    /// How long one run of a hook may take.
    pub hook_timeout_ms: u64,
    /// Mount points of filesystems that are neither frozen nor part of what a point promises.
    pub leave_out: Vec<PathBuf>,
    /// What hooks find in their environment besides what docs/hooks.md names.
    pub environment: BTreeMap<String, String>,
}

impl Default for ApplicationSection {
    fn default() -> ApplicationSection {
        ApplicationSection {
            every_s: 0,
            consistency: Consistency::Application,
            budget_ms: 2000,
            hooks: "hooks".into(),
            hook_timeout_ms: 30_000,
            // FAT cannot be frozen, and is written by hand or by an upgrade only.
            leave_out: ["/boot/efi", "/efi", "/boot/firmware"].map(PathBuf::from).into(),
            environment: BTreeMap::new(),
        }
    }
}

impl ApplicationSection {
    /// How long filesystems may be frozen.
    pub fn budget(&self) -> Duration {
        Duration::from_millis(self.budget_ms)
    }

    /// How long one run of a hook may take.
    pub fn hook_timeout(&self) -> Duration {
        Duration::from_millis(self.hook_timeout_ms)
    }

    /// Between two scheduled points.
    pub fn every(&self) -> Option<Duration> {
        (self.every_s > 0).then(|| Duration::from_secs(self.every_s))
    }

    /// The first thing that is wrong.
    pub(crate) fn check(&self) -> Result<(), String> {
        let within = |name: &str, value: u64, (least, most): (u64, u64)| match value {
            value if (least..=most).contains(&value) => Ok(()),
            value => Err(format!("[application] {name} = {value}: must be {least} to {most}")),
        };
        if self.every_s > 0 {
            within("every_s", self.every_s, EVERY_S)?;
        }
        within("budget_ms", self.budget_ms, BUDGET_MS)?;
        within("hook_timeout_ms", self.hook_timeout_ms, HOOK_TIMEOUT_MS)?;
        if !matches!(self.consistency, Consistency::Application | Consistency::Filesystem) {
            return Err(format!(
                "[application] consistency = \"{}\": must be \"application\" or \"filesystem\"; crash-consistent \
                 points are taken at every epoch_interval_ms",
                self.consistency
            ));
        }
        if let Some(path) = self.leave_out.iter().find(|path| !path.is_absolute()) {
            return Err(format!("[application] leave_out names {}: not an absolute path", path.display()));
        }
        if self.environment.len() > ENVIRONMENT_MAX {
            return Err(format!(
                "[application.environment] has {} variables, at most {ENVIRONMENT_MAX} go",
                self.environment.len()
            ));
        }
        for (name, value) in &self.environment {
            let plain = name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
            if !plain || name.is_empty() || name.starts_with(|first: char| first.is_ascii_digit()) {
                return Err(format!("[application.environment] {name:?}: not the name of a variable"));
            }
            if name.starts_with("SEAWALL_") {
                return Err(format!(
                    "[application.environment] {name}: names with SEAWALL_ are the agent's own"
                ));
            }
            if value.contains('\0') {
                return Err(format!("[application.environment] {name}: its value holds a zero byte"));
            }
        }
        Ok(())
    }
}
